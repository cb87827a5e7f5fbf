"""Eight questions that the paper's reviewers asked, and what this repo measures on each.

python notebooks/questions.py            all eight, half an hour on one core; writes results/questions.json
python notebooks/questions.py 3 8        only these: the other results stay as they are
python notebooks/questions.py table      measures nothing, prints the answers

Each question is a function. It returns figures by name, each a list with one value per text, so that two of
them can be compared text by text. `table` makes sentences of what the file of results holds.
"""

import importlib
import inspect
import json
import platform
import random
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from wherever it is started

import torch
from torch import Tensor

from baselines import METHODS, observed_attention
from generate import DEFAULT, checkpoint_folder, encode, generate, load_tokenizer, next_turn
from gvote import N_SINK, GVote, attention, fit_gaussian, sample_queries
from model import Llama
from speed import device_name
from stats import bootstrap, ratio, wilson
from tasks import LENGTHS, NAMES, THINGS, Task, continuation, gvote_entry, keep_share, record

RESULTS = Path(__file__).with_name("results") / "questions.json"
N_PROMPT, N_NEXT = 1024, 64  # tokens that are compressed, and tokens after them
RULES = ("per_sample", "current_query")  # this repo's default, and the paper's
NAMED = ("the default rule", "the paper's rule")
Figures = dict[str, list]  # by name, one value per text
PAGES = "typesseq typesmapping debugger strings comparisons execmodel".split()
MORE_PAGES = "assignment try calls sequence-types numeric-types function".split()
MODULES = "ast heapq random shutil statistics zipfile".split()


def passages(n: int = 12) -> list[str]:
    """Up to 12 texts, in turns pages of the Python language reference and modules of its standard library.
    They are not those of tasks.py."""
    modules = [inspect.getsource(importlib.import_module(name)) for name in MODULES]
    return [text for pair in zip(map(topics.get, PAGES), modules, strict=True) for text in pair][:n]


def plain(tokenizer, text: str) -> Tensor:
    return encode(tokenizer, text, chat=False)


def cut(tokenizer, text: str, n_tokens: int) -> str:
    return tokenizer.decode(plain(tokenizer, text)[0, :n_tokens], clean_up_tokenization_spaces=False)


def read(model: Llama, tokenizer, n: int, n_next: int = N_NEXT) -> Iterator[tuple[int, Task]]:
    """The texts as tasks, each with a number, which is also the seed of what GVote draws for it."""
    for number, text in enumerate(passages(n)):
        yield number, continuation(model, tokenizer, text, N_PROMPT, n_next)


def masks(task: Task, policy: Callable) -> list[Tensor]:
    return [policy(*layer) for layer in task.layers]


def share(variant: list[Tensor]) -> float:
    """The share of keys kept, in %."""
    return 100 * torch.cat(variant).float().mean().item()


# 1. Is it Gaussian?


def gaussian_distance(x: Tensor) -> Tensor:
    """How far each channel of x (N, C) is from a Gaussian, (C,): its values in order, against the quantiles
    of a Gaussian with the same mean and standard deviation. Mean distance, in standard deviations."""
    std, mean = torch.std_mean(x, dim=0, correction=0)
    ordered = ((x - mean) / std).sort(dim=0).values
    quantiles = torch.distributions.Normal(0, 1).icdf((torch.arange(len(x)) + 0.5) / len(x))
    return (ordered - quantiles[:, None]).abs().mean(dim=0)


def gaussian(model: Llama, tokenizer, n: int = 12) -> Figures:
    """Before and after the norm, of all tokens and without the first: the channels' distance, mean, by layer
    and worst, and how many channels (in %) are farther than 99% of equally large Gaussian samples."""
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(N_PROMPT - N_SINK, 10_000, generator=draw)
    laplace = torch.empty_like(normal).exponential_(generator=draw) * normal.sign()
    limit = gaussian_distance(normal).quantile(0.99)
    figures, inputs = defaultdict(list), []
    for text in passages(n):
        inputs.clear()  # of each layer, before its norm
        hooks = [
            block.input_layernorm.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
            for block in model.layers
        ]
        layers = record(model, plain(tokenizer, text)[:, :N_PROMPT])
        for hook in hooks:
            hook.remove()
        for where, states in (("before", inputs), ("after", [hidden[0] for _, hidden, _, _ in layers])):
            for which, skipped in (("all", 0), ("rest", N_SINK)):
                distance = torch.stack([gaussian_distance(x[skipped:]) for x in states])  # (layers, C)
                figures[f"{where}, {which}"].append(distance.mean().item())
                figures[f"{where}, {which}, by layer"].append(distance.mean(dim=1).tolist())
                figures[f"{where}, {which}, worst channel"].append(distance.max().item())
                figures[f"{where}, {which}, far"].append(100 * (distance > limit).float().mean().item())
        for name, x in (("a Gaussian", normal), ("a Laplace", laplace)):
            figures[name].append(gaussian_distance(x).mean().item())
    return figures


def answer_gaussian(f: Figures) -> str:
    return (
        "The distance of the hidden states from a Gaussian, as notebook 1 defines it, is "
        f"{show(f['after, rest'])} standard deviations. "
        f"Random numbers that were drawn from a Gaussian have a distance of {f['a Gaussian'][0]:.3f}, and "
        f"those drawn from a Laplace distribution {f['a Laplace'][0]:.3f}."
    )


# 2. Are sampled queries good proxies of the future ones?


def overlap(p: Tensor, q: Tensor) -> Tensor:
    """What two distributions over the last dim share: 1 if they are equal, 0 if no key has a part in both."""
    return p.minimum(q).sum(dim=-1)


def proxies(model: Llama, tokenizer, n: int = 12) -> Figures:
    """For each kind of proxies, over all query heads: the overlap of their mean attention with that of the
    next 64 queries ("mean"), and the overlap of such a query with the proxy most like it ("best")."""
    figures = defaultdict(list)
    for number, task in read(model, tokenizer, n, 2 * N_NEXT):
        by_layer = defaultdict(list)
        picked = torch.randperm(N_PROMPT, generator=torch.Generator().manual_seed(number))
        moved = {  # the prompt's own queries, moved to the next positions
            "8 random tokens": picked[:8],
            "64 random tokens": picked[:N_NEXT],
            "the first 64 tokens": torch.arange(N_NEXT),
            "the last 64 tokens": torch.arange(N_PROMPT - N_NEXT, N_PROMPT),
        }
        for (attn, hidden, keys, _), future in zip(task.layers, task.attention, strict=True):
            true, after = future.unflatten(2, (-1, 2 * N_NEXT)).split(N_NEXT, dim=3)  # (1, H_kv, G, N, T)
            window = observed_attention(attn, hidden, keys, N_PROMPT - N_NEXT, N_PROMPT)
            found = {
                "the 64 after those": after,
                "SnapKV, window": window,
                "the last query": window[..., -1:, :],
            }
            for name, tokens in moved.items():
                found[name] = attn.queries(hidden[:, tokens], N_PROMPT + torch.arange(len(tokens)))
            for size in (8, N_NEXT):
                found[f"{size} samples"] = sample_queries(attn, *fit_gaussian(hidden), size, N_PROMPT, number)
            for name, each in found.items():
                paid = attention(each, keys).unflatten(2, (-1, each.size(2))) if each.dim() == 4 else each
                some = true[..., ::4, :]  # one in four is enough
                best = torch.stack([overlap(one[..., None, :], some) for one in paid.unbind(dim=3)]).amax(
                    dim=0
                )
                by_layer[f"{name}, mean"].append(overlap(paid.mean(dim=3), true.mean(dim=3)).mean())
                by_layer[f"{name}, best"].append(best.mean())
        for name, values in by_layer.items():
            figures[name].append(torch.stack(values).mean().item())
    return figures


def answer_proxies(f: Figures) -> str:
    samples, tokens, window = (
        show(f[f"{name}, mean"], ".2f") for name in ("8 samples", "8 random tokens", "SnapKV, window")
    )
    return (
        f"The attention of 8 samples overlaps with that of the next 64 true queries by {samples}, where 1 is "
        f"equal. 8 random tokens of the prompt reach {tokens}, and SnapKV's 64 last queries {window}."
    )


# 3. How much do two runs differ?


def seeds(model: Llama, tokenizer, n: int = 12, n_seeds: int = 20) -> Figures:
    figures = defaultdict(list)
    for number, task in read(model, tokenizer, n):
        for rule in RULES:
            runs = [masks(task, GVote(seed=n_seeds * number + i, budget=rule)) for i in range(n_seeds)]
            shares = torch.tensor([share(run) for run in runs])
            kl = torch.tensor([result["kl"] for result in task.test(runs)])
            figures[f"{rule}, kept"].append(shares.mean().item())
            figures[f"{rule}, kept, std"].append(shares.std().item())
            figures[f"{rule}, kept, range"].append((shares.max() - shares.min()).item())
            figures[f"{rule}, kl"].append(kl.mean().item())
            figures[f"{rule}, kl, worst / best"].append((kl.max() / kl.min()).item())
            figures[f"{rule}, kl, two runs"].append((kl[::2] / kl[1::2]).log().abs().mean().exp().item())
    return figures


def answer_seeds(f: Figures) -> str:
    ours, paper = (show(f[f"{rule}, kept, range"], ".1f") for rule in RULES)
    return (
        f"From the lowest to the highest of 20 seeds, the kept share differs by {ours} points with the "
        f"default rule, and by {paper} with the paper's."
    )


# 4. When does the paper's rule help, when does it hurt?

ENDINGS = {
    "question": "\n\nWhat is this text about?",
    "full stop": "",
    "mid-word": " The next section expl",
    "code": "\n\n   for i in range(10):\n       print(i",
}


def endings(model: Llama, tokenizer, n: int = 12) -> Figures:
    """Twelve pages, cut after a sentence, with four endings each; what follows is the full cache's answer.
    "equal" is per_sample at a top_p with which it keeps as much as current_query does."""
    figures = defaultdict(list)
    for number, name in enumerate((PAGES + MORE_PAGES)[:n]):
        start = cut(tokenizer, topics[name], N_PROMPT - 20)
        start = start[: start.rindex(".") + 1]
        for ending, words in ENDINGS.items():
            prompt = plain(tokenizer, start + words)
            task = Task(model, prompt, torch.tensor([list(generate(model, prompt, 32))]), 32)
            found = {
                rule: [gvote_entry(layer, GVote(seed=number, budget=rule)) for layer in task.layers]
                for rule in RULES
            }
            variants = {rule: [x < 0.95 for x in found[rule]] for rule in RULES}
            for rule in RULES:
                figures[f"{ending}, {rule}, kept"].append(share(variants[rule]))
            variants["equal"] = keep_share(found["per_sample"], share(variants["current_query"]) / 100)
            for rule, result in zip(variants, task.test(list(variants.values())), strict=True):
                figures[f"{ending}, {rule}, kl"].append(result["kl"])
    return figures


def answer_endings(f: Figures) -> str:
    by_ending = [
        f"{ending} {show_ratio(f[f'{ending}, current_query, kl'], f[f'{ending}, equal, kl'])}"
        for ending in ENDINGS
    ]
    return (
        "The KL of the paper's rule, divided by the default's at the same share, depends on the prompt's "
        f"end: {', '.join(by_ending)}."
    )


# 5. Can the memory be capped?

CAPS = (0.2, 0.4)
RIVALS = ("h2o", "snapkv", "adakv_snapkv", "expected_attention")


def capped(entries: Tensor, most: float, top_p: float = 0.95) -> Tensor:
    """A layer's mask: of the keys that enter below top_p at most this share of all, those that enter first.
    Each layer by itself, so that the cap holds while the prompt is read, too."""
    flat = entries.flatten()
    best = flat.argsort(stable=True)[: int(most * len(flat))]
    mask = torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, best, True)
    return (mask & (flat < top_p)).view_as(entries)


def cap(model: Llama, tokenizer, n: int = 12) -> Figures:
    figures = defaultdict(list)
    for number, task in read(model, tokenizer, n):
        found = {
            rule: [gvote_entry(layer, GVote(seed=number, budget=rule)) for layer in task.layers]
            for rule in RULES
        }
        variants = {f"{rule}, own": [x < 0.95 for x in found[rule]] for rule in RULES}
        for most in CAPS:
            variants |= {f"{rule}, {most:.0%}": [capped(x, most) for x in found[rule]] for rule in RULES}
            variants |= {f"{name}, {most:.0%}": masks(task, METHODS[name](most)) for name in RIVALS}
        for (name, variant), result in zip(variants.items(), task.test(list(variants.values())), strict=True):
            figures[f"{name}, kept"].append(share(variant))
            figures[f"{name}, kl"].append(result["kl"])
    return figures


def answer_cap(f: Figures) -> str:
    most, sentences = f"{CAPS[0]:.0%}", []
    for rule, name in zip(RULES, NAMED, strict=True):
        kl = f[f"{rule}, {most}, kl"]
        own, h2o = show_ratio(kl, f[f"{rule}, own, kl"]), show_ratio(kl, f[f"h2o, {most}, kl"])
        sentences.append(f"the KL of {name} is {own} times what it is without a cap, and {h2o} times H2O's")
    return f"At {most} of the keys, {'. There, '.join(sentences)}."


# 6. Could one pool of samples serve every prompt?


def mixture(fits: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of equally long texts together, from those of each."""
    means, stds = (torch.stack(x) for x in zip(*fits, strict=True))
    mean = means.mean(dim=0)
    return mean, ((stds**2 + means**2).mean(dim=0) - mean**2).sqrt()


def pool(model: Llama, tokenizer, n: int = 12) -> Figures:
    """With the Gaussian of this text, of another of its kind, of one of the other kind, and of all others."""
    figures, fits = defaultdict(list), []  # fits: by text and layer
    for text in passages():
        layers = record(model, plain(tokenizer, text)[:, :N_PROMPT])
        fits.append([fit_gaussian(hidden) for _, hidden, _, _ in layers])
    for number, task in read(model, tokenizer, n):
        others = fits[:number] + fits[number + 1 :]
        gaussians = {
            "own": fits[number],
            "same kind": fits[(number + 2) % len(fits)],
            "other kind": fits[(number + 1) % len(fits)],
            "all others": [mixture(of_layer) for of_layer in zip(*others, strict=True)],
        }
        for rule in RULES:
            variants = []
            for by_layer in gaussians.values():
                pairs = zip(task.layers, by_layer, strict=True)
                policy = GVote(seed=number, budget=rule)
                variants.append([gvote_entry(layer, policy, fit) < policy.top_p for layer, fit in pairs])
            for name, variant, result in zip(gaussians, variants, task.test(variants), strict=True):
                figures[f"{rule}, {name}, kept"].append(share(variant))
                figures[f"{rule}, {name}, kl"].append(result["kl"])
        times = [time.perf_counter()]
        for attn, hidden, _, _ in task.layers:
            sample_queries(attn, *fit_gaussian(hidden), 8, N_PROMPT, number)
        times.append(time.perf_counter())
        masks(task, GVote(seed=number))
        times.append(time.perf_counter())
        figures["time of the samples"].append(100 * (times[1] - times[0]) / (times[2] - times[1]))
    return figures


def answer_pool(f: Figures) -> str:
    ours, paper = (show_ratio(f[f"{rule}, all others, kl"], f[f"{rule}, own, kl"]) for rule in RULES)
    saved = show(f["time of the samples"], ".0f", "%")
    return (
        f"With samples made from 11 other texts, the KL of the default rule is {ours} times as high, and "
        f"that of the paper's {paper} times. The samples, which need not be made then, take {saved} of "
        f"GVote's time."
    )


# 7. What becomes of long answers, and of a second turn?

FIRST, SECOND = "What is this text about?", "Which detail of the text did you not mention?"


def tokenwise(task: Task, rule: str, seed: int) -> tuple[Tensor, Tensor]:
    """Of each token after the first: KL from the full cache's prediction, and is the likeliest one right?"""
    log_probs = task.predict([masks(task, GVote(seed=seed, budget=rule))])[0]
    kl = (task.full.exp() * (task.full - log_probs)).sum(dim=-1)
    return kl, log_probs.argmax(dim=-1) == task.after[0, 1:]


def chat(model, tokenizer, text: str, *turns: tuple[str, str | None]) -> tuple[Task, list[slice]]:
    """Turns about a text: a question, and the answer, or None for what the full cache answers. Compressed are
    the text and the first question. Also says where among the scored tokens the answers are."""
    prompt = ids = encode(tokenizer, f"{text}\n\n{turns[0][0]}")
    end, places = tokenizer.eos_token_id, []
    for number, (question, answer) in enumerate(turns):
        ids = next_turn(tokenizer, ids, question) if number > 0 else ids
        if answer is None:
            new = ids.new_tensor([[token for token in generate(model, ids, 64, stop=[end]) if token != end]])
        else:
            new = plain(tokenizer, answer)
        first = ids.size(1) - prompt.size(1) - 1  # the prompt's own prediction, -1, is not scored
        places.append(slice(max(0, first), first + new.size(1)))
        ids = torch.cat((ids, new), dim=1)
    after = ids[:, prompt.size(1) :]
    return Task(model, prompt, after, after.size(1)), places


def long_answers(model: Llama, tokenizer, n: int = 12) -> Figures:
    """KL over 256 tokens of a text that goes on, in eight parts."""
    figures = defaultdict(list)
    for number, task in read(model, tokenizer, n, 256):
        for rule in RULES:
            parts = [part.mean().item() for part in tokenwise(task, rule, number)[0].chunk(8)]
            figures[f"{rule}, by part"].append(parts)
            figures[f"{rule}, first 32"].append(parts[0])
            figures[f"{rule}, last 32"].append(parts[-1])
    return figures


def second_turn(model: Llama, tokenizer, n: int = 12) -> Figures:
    """Chats of two turns: two general questions, and two after a number that is hidden in the text."""
    figures = defaultdict(list)
    for number, text in enumerate(passages(n)):
        lines, draw = cut(tokenizer, text, N_PROMPT - 128).split("\n"), random.Random(number)
        general = chat(model, tokenizer, "\n".join(lines), (FIRST, None), (SECOND, None))
        turns = []
        for thing in draw.sample(THINGS, 2):
            fact = f"The special magic number for {thing} is {''.join(draw.choices('0123456789', k=7))}."
            lines.insert(draw.randrange(1, len(lines)), fact)
            turns.append((f"What is the special magic number for {thing}?", fact))
        hidden = chat(model, tokenizer, "\n".join(lines), *turns)
        for what, (task, places) in (("general", general), ("number", hidden)):
            for rule in RULES:
                kl, right = tokenwise(task, rule, number)
                for turn, place in zip(("first", "second"), places, strict=True):
                    figures[f"{rule}, {what}, {turn}, kl"].append(kl[place].mean().item())
                    figures[f"{rule}, {what}, {turn}, exact"].append(float(right[place].all()))
            full = task.full.argmax(dim=-1) == task.after[0, 1:]
            for turn, place in zip(("first", "second"), places, strict=True):
                figures[f"full cache, {what}, {turn}, exact"].append(float(full[place].all()))
    return figures


def later(model: Llama, tokenizer, n: int = 12) -> Figures:
    return long_answers(model, tokenizer, n) | second_turn(model, tokenizer, n)


def answer_later(f: Figures) -> str:
    ours, paper = (show_ratio(f[f"{rule}, last 32"], f[f"{rule}, first 32"]) for rule in RULES)
    full, *found = (count(f[f"{who}, number, second, exact"]) for who in ("full cache", *RULES))
    return (
        f"From the first to the last 32 of 256 tokens the KL changes by a factor of {ours} with the default "
        f"rule, and of {paper} with the paper's. Asked for a hidden number in a second turn, the full cache "
        f"tells {full}, the default rule {found[0]}, and the paper's {found[1]}."
    )


# 8. Is an automatic budget safe?

KINDS = (
    "prose", "code", "list of facts", "numbers", "random words", "random tokens", "a sentence repeated",
    "a word repeated",
)  # fmt: skip


def prompts(tokenizer) -> list[Tensor]:
    """Forty prompts, five of each kind, in turns: number i is of the kind KINDS[i % 8]."""
    found, draw, texts = [], random.Random(0), passages()
    for i in range(5):
        facts = [
            f"{draw.choice(NAMES)} has {draw.randrange(2, 99)} {draw.choice(THINGS)}s." for _ in range(400)
        ]
        numbers = [str(draw.randrange(10_000)) for _ in range(1000)]
        tokens = torch.tensor([draw.choices(range(1000, 49_000), k=N_PROMPT)])  # no special ones
        written = (
            *texts[2 * i : 2 * i + 2],
            "\n".join(facts),
            " ".join(numbers),
            " ".join(draw.choices(THINGS + NAMES, k=2000)),
            tokens,
            f"{NAMES[i]} puts the {THINGS[i]} on the table. " * 200,
            f" {('the', 'no', 'table', 'hello', 'zero')[i]}" * 1200,
        )
        found += [x if isinstance(x, Tensor) else plain(tokenizer, x)[:, :N_PROMPT] for x in written]
    return found


def safe(model: Llama, tokenizer, n: int = 40) -> Figures:
    """The share kept of each prompt, in %."""
    figures = defaultdict(list)
    for number, ids in enumerate(prompts(tokenizer)[:n]):
        layers = record(model, ids)
        for rule in RULES:
            figures[rule].append(share([GVote(seed=number, budget=rule)(*layer) for layer in layers]))
    return figures


def answer_safe(f: Figures) -> str:
    sentences = []
    for rule, name in zip(RULES, NAMED, strict=True):
        by_kind = {kind: max(f[rule][i :: len(KINDS)]) for i, kind in enumerate(KINDS)}
        most, next_most, *_ = sorted(by_kind, key=by_kind.get, reverse=True)
        sentences.append(
            f"{name} keeps up to {by_kind[most]:.0f}% of a prompt of the kind '{most}', and up to "
            f"{by_kind[next_most]:.0f}% of any other prompt"
        )
    return f"{'; '.join(sentences).capitalize()}."


# The results, and sentences made of them


def show(values: list[float], spec: str = ".3f", unit: str = "") -> str:
    """The mean of the texts, and its 95% interval."""
    return "{:{s}}{u} ({:{s}}–{:{s}})".format(*bootstrap(values), s=spec, u=unit)


def show_ratio(values: list[float], others: list[float]) -> str:
    """The geometric mean of the texts' ratios, and its 95% interval: text by text, so that what all of a
    text's figures have in common drops out."""
    return "{:.2f} ({:.2f}–{:.2f})".format(*ratio(values, others))


def count(right: list[float]) -> str:
    """How often, and the 95% interval of the share (Wilson's)."""
    low, high = wilson(sum(right) / len(right), len(right))
    return f"{sum(right):.0f} of {len(right)} ({low:.0%}–{high:.0%})"


@dataclass(frozen=True)
class Question:
    title: str
    measure: Callable[..., Figures]
    answer: Callable[[Figures], str]
    notebook: str


GAUSSIAN, BUDGET, MEMORY = "1_walkthrough", "2_the_budget_finds_itself", "3_memory_and_speed"
QUALITY = "4_experiments"
QUESTIONS = {
    1: Question("Is it Gaussian?", gaussian, answer_gaussian, GAUSSIAN),
    2: Question("Are sampled queries good proxies?", proxies, answer_proxies, GAUSSIAN),
    3: Question("How much do two runs differ?", seeds, answer_seeds, BUDGET),
    4: Question("When does the paper's rule help, when does it hurt?", endings, answer_endings, BUDGET),
    5: Question("Can the memory be capped, and what does it cost?", cap, answer_cap, MEMORY),
    6: Question("Could one pool of samples serve every prompt?", pool, answer_pool, BUDGET),
    7: Question("What becomes of long answers, and of a second turn?", later, answer_later, QUALITY),
    8: Question("Is an automatic budget safe?", safe, answer_safe, BUDGET),
}


def results() -> dict[str, dict]:
    return json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}


def figures_of(number: int) -> Figures:
    """A question's figures from the file of results: by text, or a curve."""
    figures = results()[str(number)]["figures"]
    return {
        name: figure["by_text"] if "by_text" in figure else figure["mean"] for name, figure in figures.items()
    }


class Markdown(str):
    """Text that a notebook shows as a table, and print as it is."""

    def _repr_markdown_(self) -> str:
        return self


def table(*numbers: int) -> Markdown:
    """The questions (all of them, if none is named), what was measured, and the notebook that says more."""
    found = results()
    lines = ["| Question | Measured: mean (95% interval) | Texts | Notebook |", "| --- | --- | --- | --- |"]
    for number in numbers or QUESTIONS:
        question, result = QUESTIONS[number], found.get(str(number))
        answer = question.answer(figures_of(number)) if result else "not measured yet"
        link = f"[{question.notebook[0]}]({question.notebook}.ipynb)"
        lines.append(
            f"| {number}. {question.title} | {answer} | {result['texts'] if result else 0} | {link} |"
        )
    return Markdown("\n".join(lines))


def grid(header: list[str], rows: Iterable[list[str]]) -> Markdown:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))


def by_name(number: int, columns: Iterable[str], rows: dict[str, str | tuple[str, str]]) -> Markdown:
    """A question's means and 95% intervals as a table. rows: the names of figures, with {} in place of the
    column, and what to call them, perhaps with a number format."""
    figures, columns, lines = figures_of(number), list(columns), []
    for name, title in rows.items():
        title, spec = title if isinstance(title, tuple) else (title, ".3g")
        found = [figures.get(name.format(column)) for column in columns]
        lines.append([title, *(show(x, spec) if x else "–" for x in found)])
    return grid(["", *columns], lines)


def kept_by_length() -> dict[str, dict[int, tuple[float, float, float]]]:
    """From notebook 4's results: rule -> tokens -> share kept (%) of 12 pages with a needle: mean and 95%
    interval."""
    import evaluate

    def shares(name: str, n_tokens: int) -> list[float]:
        found = evaluate.select(rows, name, n_tokens, ["needle"])
        return [100 * row["kept"] for row in found]

    rows, names = evaluate.read(evaluate.EXPERIMENTS), ("gvote", "gvote_current_query")
    return {
        rule: {n_tokens: bootstrap(shares(name, n_tokens)) for n_tokens in LENGTHS}
        for rule, name in zip(RULES, names, strict=True)
    }


def compare(number: int, again: Figures):
    """Figures of the first texts, measured again, against those in the file of results; times left aside."""
    before, off = figures_of(number), {}
    for name in again:
        if "time" not in name and isinstance(again[name][0], float):
            pairs = zip(again[name], before[name], strict=False)  # of fewer texts
            off[name] = max(abs(new - old) / (abs(old) or 1) for new, old in pairs)
    n_texts = len(next(iter(again.values())))
    print(
        f"check: {n_texts} of the texts measured anew, at most {max(off.values()):.1%} off the stored numbers"
    )


def summary(values: list) -> dict:
    """Of a figure: mean and 95% interval of the texts, and each text's value; of curves only their mean."""
    if isinstance(values[0], list):
        return {"mean": [rounded(fmean(point)) for point in zip(*values, strict=True)]}
    mean, low, high = map(rounded, bootstrap(values))
    return {"mean": mean, "interval": [low, high], "by_text": list(map(rounded, values))}


def rounded(x: float) -> float:
    return float(f"{x:.4g}")


def save(everything: dict[str, dict]):
    text = json.dumps(dict(sorted(everything.items())), indent=1, ensure_ascii=False)
    text = re.sub(r"\[[^]]*]", lambda numbers: " ".join(numbers[0].split()), text)  # a list is one line
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text + "\n", "utf-8")


def load() -> tuple:
    torch.set_grad_enabled(False)
    folder = checkpoint_folder()
    return Llama.from_pretrained(folder), load_tokenizer(folder)


def main(numbers: list[int]):
    git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(
        git, capture_output=True, text=True
    ).stdout.strip()  # that of the code now running
    model, tokenizer = load()
    for number in numbers or QUESTIONS:
        question, start = QUESTIONS[number], time.perf_counter()
        figures = question.measure(model, tokenizer)
        result = {
            "question": question.title,
            "command": f"python notebooks/questions.py {number}",
            "commit": commit,
            "machine": f"{device_name()}, Python {platform.python_version()}, torch {torch.__version__}",
            "settings": f"{DEFAULT}, float32, top_p 0.95, 8 samples, {N_PROMPT} tokens of prompt",
            "seconds": round(time.perf_counter() - start),
            "texts": max(map(len, figures.values())),
            "figures": {name: summary(values) for name, values in figures.items()},
        }
        save(results() | {str(number): result})
        print(f"{number}. {question.title} ({result['seconds']} s)\n{question.answer(figures)}\n", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        print(table())
    else:
        main([int(number) for number in sys.argv[1:]])
