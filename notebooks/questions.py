"""For notebooks 1 to 4: eight questions of the paper's reviewers, measured. Writes results/questions.json.

python notebooks/questions.py            all eight, half an hour on one core
python notebooks/questions.py 3 8        only these: the other results stay as they are

Each question is a function that measures one text, or one prompt, by its number, which is also the seed of
what GVote draws for it. It returns figures by name. The file has a list for each figure, with one value per
text, so that two figures can be compared text by text.
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
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from wherever it is started

import torch
from IPython.display import Markdown
from torch import Tensor

from baselines import METHODS, observed_attention
from generate import encode, generate, next_turn
from gvote import N_SINK, GVote, attention, fit_gaussian, sample_queries
from model import Llama
from speed import device_name
from stats import bootstrap, with_interval
from tasks import NAMES, THINGS, Task, continuation, gvote_entry, keep_share, record

RESULTS = Path(__file__).with_name("results") / "questions.json"
N_PROMPT = 1024  # tokens that are compressed
RULES = ("per_sample", "current_query")  # this repo's default, and the paper's
IN_WORDS = dict(zip(RULES, ("GVote", "GVote, paper's rule"), strict=True))
PAGES = "typesseq typesmapping debugger strings comparisons execmodel".split()
MORE_PAGES = "assignment try calls sequence-types numeric-types function".split()
MODULES = "ast heapq random shutil statistics zipfile".split()
Figures = dict[str, list[float]]


def passages() -> list[str]:
    """Twelve texts, in turns pages of the Python language reference and modules of its standard library. They
    are not those of tasks.py."""
    modules = [inspect.getsource(importlib.import_module(name)) for name in MODULES]
    return [text for pair in zip(map(topics.get, PAGES), modules, strict=True) for text in pair]


def plain(tokenizer, text: str) -> Tensor:
    return encode(tokenizer, text, chat=False)


def cut(tokenizer, text: str, n_tokens: int) -> str:
    return tokenizer.decode(plain(tokenizer, text)[0, :n_tokens], clean_up_tokenization_spaces=False)


def passage_task(model: Llama, tokenizer, number: int, n_next: int = 64) -> Task:
    return continuation(model, tokenizer, passages()[number], N_PROMPT, n_next)


def masks(task: Task, policy) -> list[Tensor]:
    return [policy(*layer) for layer in task.layers]


def share(masks: list[Tensor]) -> float:
    """The share of keys kept, in %."""
    return 100 * torch.cat(masks).float().mean().item()


def kept_and_kl(task: Task, variants: dict[str, list[Tensor]]) -> dict[str, float]:
    """Of each variant of the prompt's cache, a list of keep masks."""
    kl = [result["kl"] for result in task.test(list(variants.values()))]
    figures = {f"{name}, kept": share(masks) for name, masks in variants.items()}
    return figures | {f"{name}, kl": each for name, each in zip(variants, kl, strict=True)}


# 1. Is it Gaussian?


def gaussian_distance(x: Tensor) -> Tensor:
    """How far each channel of x (N, C) is from a Gaussian, (C,): its values in order, against the quantiles
    of a Gaussian with the same mean and standard deviation. Mean distance, in standard deviations."""
    std, mean = torch.std_mean(x, dim=0, correction=0)
    ordered = ((x - mean) / std).sort(dim=0).values
    quantiles = torch.distributions.Normal(0, 1).icdf((torch.arange(len(x)) + 0.5) / len(x))
    return (ordered - quantiles[:, None]).abs().mean(dim=0)


@cache
def random_distances() -> tuple[Tensor, Tensor]:
    """The distances of 10,000 samples, each as large as a text: from a Gaussian, and from a Laplace."""
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(N_PROMPT - N_SINK, 10_000, generator=draw)
    laplace = torch.empty_like(normal).exponential_(generator=draw) * normal.sign()
    return gaussian_distance(normal), gaussian_distance(laplace)


def gaussian(model: Llama, tokenizer, number: int) -> dict:
    """The mean distance of what GVote fits, and of equally large samples of a Gaussian and of a Laplace."""
    layers = record(model, plain(tokenizer, passages()[number])[:, :N_PROMPT])
    distance = torch.stack([gaussian_distance(hidden[0, N_SINK:]) for _, hidden, _, _ in layers])
    normal, laplace = random_distances()
    return {
        "the hidden states": distance.mean(),
        "the hidden states, by layer": distance.mean(dim=1).tolist(),
        "a Gaussian": normal.mean(),
        "a Laplace": laplace.mean(),
    }


# 2. Are sampled queries good proxies of the future ones?


def overlap(p: Tensor, q: Tensor) -> Tensor:
    """What two distributions over the last dim share: 1 if they are equal, 0 if no key has a part in both."""
    return p.minimum(q).sum(dim=-1)


def proxies(model: Llama, tokenizer, number: int) -> dict:
    """For each kind of proxies, over all query heads: the overlap of their mean attention with that of the
    next 64 queries."""
    task, overlaps = passage_task(model, tokenizer, number, 128), defaultdict(list)
    picked = torch.randperm(N_PROMPT, generator=torch.Generator().manual_seed(number))
    moved = {"8 random tokens": picked[:8], "64 random tokens": picked[:64]}
    moved["the last 64 tokens"] = torch.arange(N_PROMPT - 64, N_PROMPT)
    for (attn, hidden, keys, _), future in zip(task.layers, task.attention, strict=True):
        next_64, after = future.unflatten(2, (-1, 128)).split(64, dim=3)  # (1, H_kv, G, N, T) each
        window = observed_attention(attn, hidden, keys, N_PROMPT - 64, N_PROMPT)
        paid = {"the 64 after those": after, "SnapKV, window": window, "the last query": window[..., -1:, :]}
        queries = {}
        for n in (8, 64):
            queries[f"{n} samples"] = sample_queries(attn, *fit_gaussian(hidden), n, N_PROMPT, number)
        for name, tokens in moved.items():
            queries[name] = attn.queries(hidden[:, tokens], N_PROMPT + torch.arange(len(tokens)))
        for name, each in queries.items():
            paid[name] = attention(each, keys).unflatten(2, (-1, each.size(2)))
        for name, each in paid.items():
            overlaps[name].append(overlap(each.mean(dim=3), next_64.mean(dim=3)).mean())
    return {name: torch.stack(by_layer).mean() for name, by_layer in overlaps.items()}


# 3. How much do two runs differ?


def seeds(model: Llama, tokenizer, number: int, n: int = 20) -> dict:
    task, figures = passage_task(model, tokenizer, number), {}
    for rule in RULES:
        runs = [masks(task, GVote(seed=n * number + i, budget=rule)) for i in range(n)]
        kept = torch.tensor([share(run) for run in runs])
        kl = torch.tensor([result["kl"] for result in task.test(runs)])
        figures |= {
            f"{rule}, kept": kept.mean(),
            f"{rule}, kept, range": kept.max() - kept.min(),
            f"{rule}, kl": kl.mean(),
            f"{rule}, kl, worst / best": kl.max() / kl.min(),
            f"{rule}, kl, two runs": (kl[::2] / kl[1::2]).log().abs().mean().exp(),
        }
    return figures


# 4. When does the paper's rule help, when does it hurt?

ENDINGS = {
    "question": "\n\nWhat is this text about?",
    "full stop": "",
    "mid-word": " The next section expl",
    "code": "\n\n   for i in range(10):\n       print(i",
}


def endings(model: Llama, tokenizer, number: int) -> dict:
    """A page, cut after a sentence, with four endings; what follows is the full cache's answer. "equal" is
    per_sample at a top_p with which it keeps as much as current_query does."""
    start, figures = cut(tokenizer, topics[(PAGES + MORE_PAGES)[number]], N_PROMPT - 20), {}
    start = start[: start.rindex(".") + 1]
    for ending, words in ENDINGS.items():
        prompt = plain(tokenizer, start + words)
        task = Task(model, prompt, torch.tensor([list(generate(model, prompt, 32))]), 32)
        variants = {rule: masks(task, GVote(seed=number, budget=rule)) for rule in RULES}
        entries = [gvote_entry(layer, GVote(seed=number)) for layer in task.layers]
        variants["equal"] = keep_share(entries, share(variants["current_query"]) / 100)
        figures |= kept_and_kl(task, {f"{ending}, {name}": each for name, each in variants.items()})
    return figures


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


def cap(model: Llama, tokenizer, number: int) -> dict:
    task, variants = passage_task(model, tokenizer, number), {}
    for rule in RULES:
        entries = [gvote_entry(layer, GVote(seed=number, budget=rule)) for layer in task.layers]
        variants[f"{rule}, own"] = [each < 0.95 for each in entries]
        for most in CAPS:
            variants[f"{rule}, {most:.0%}"] = [capped(each, most) for each in entries]
    variants |= {f"{name}, {most:.0%}": masks(task, METHODS[name](most)) for name in RIVALS for most in CAPS}
    return kept_and_kl(task, variants)


# 6. Could one pool of samples serve every prompt?


@cache
def fits(model: Llama, tokenizer) -> list[list[tuple[Tensor, Tensor]]]:
    """The Gaussians of all texts, by text and layer."""
    texts = (record(model, plain(tokenizer, text)[:, :N_PROMPT]) for text in passages())
    return [[fit_gaussian(hidden) for _, hidden, _, _ in layers] for layers in texts]


def mixture(fits: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of equally long texts together, from those of each."""
    means, stds = (torch.stack(x) for x in zip(*fits, strict=True))
    mean = means.mean(dim=0)
    return mean, ((stds**2 + means**2).mean(dim=0) - mean**2).sqrt()


def pool(model: Llama, tokenizer, number: int) -> dict:
    """With the Gaussian of this text, of another of its kind, of one of the other kind, and of all others."""
    task, by_text = passage_task(model, tokenizer, number), fits(model, tokenizer)
    others, variants = by_text[:number] + by_text[number + 1 :], {}
    gaussians = {
        "own": by_text[number],
        "same kind": by_text[(number + 2) % len(by_text)],
        "other kind": by_text[(number + 1) % len(by_text)],
        "all others": [mixture(of_layer) for of_layer in zip(*others, strict=True)],
    }
    for rule in RULES:
        policy = GVote(seed=number, budget=rule)
        for name, of_layers in gaussians.items():
            entries = map(gvote_entry, task.layers, [policy] * len(task.layers), of_layers)
            variants[f"{rule}, {name}"] = [each < policy.top_p for each in entries]
    times = [time.perf_counter()]
    for attn, hidden, _, _ in task.layers:
        sample_queries(attn, *fit_gaussian(hidden), 8, N_PROMPT, number)
    times.append(time.perf_counter())
    masks(task, GVote(seed=number))
    times.append(time.perf_counter())
    in_percent = 100 * (times[1] - times[0]) / (times[2] - times[1])
    return kept_and_kl(task, variants) | {"time of the samples": in_percent}


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


def later(model: Llama, tokenizer, number: int) -> dict:
    """The KL of the first and of the last 32 of 256 tokens. Then two chats of two turns: with general
    questions, and about numbers that are hidden in the text. "exact" is 1 if an answer is word for word."""
    task, figures = passage_task(model, tokenizer, number, 256), {}
    for rule in RULES:
        first, *_, last = tokenwise(task, rule, number)[0].chunk(8)
        figures |= {f"{rule}, first 32": first.mean(), f"{rule}, last 32": last.mean()}
    lines, draw = cut(tokenizer, passages()[number], N_PROMPT - 128).split("\n"), random.Random(number)
    chats, turns = {"general": chat(model, tokenizer, "\n".join(lines), (FIRST, None), (SECOND, None))}, []
    for thing in draw.sample(THINGS, 2):
        fact = f"The special magic number for {thing} is {''.join(draw.choices('0123456789', k=7))}."
        lines.insert(draw.randrange(1, len(lines)), fact)
        turns.append((f"What is the special magic number for {thing}?", fact))
    chats["number"] = chat(model, tokenizer, "\n".join(lines), *turns)
    for what, (task, places) in chats.items():
        full = task.full.argmax(dim=-1) == task.after[0, 1:]
        by_rule = {rule: tokenwise(task, rule, number) for rule in RULES}
        for turn, place in zip(("first", "second"), places, strict=True):
            figures[f"full cache, {what}, {turn}, exact"] = full[place].all()
            for rule, (kl, right) in by_rule.items():
                figures[f"{rule}, {what}, {turn}, kl"] = kl[place].mean()
                figures[f"{rule}, {what}, {turn}, exact"] = right[place].all()
    return figures


# 8. Is an automatic budget safe?

KINDS = (
    "prose", "code", "list of facts", "numbers", "random words", "random tokens", "a sentence repeated",
    "a word repeated",
)  # fmt: skip


@cache
def prompts(tokenizer) -> list[Tensor]:
    """Forty prompts, five of each kind, in turns: number i is of the kind KINDS[i % 8]."""
    found, draw, texts = [], random.Random(0), passages()
    for i in range(5):
        facts = [
            f"{draw.choice(NAMES)} has {draw.randrange(2, 99)} {draw.choice(THINGS)}s." for _ in range(400)
        ]
        numbers = [str(draw.randrange(10_000)) for _ in range(1000)]
        tokens = torch.tensor([draw.choices(range(1000, 49_000), k=N_PROMPT)])  # no special ones
        words = " ".join(draw.choices(THINGS + NAMES, k=2000))
        sentences = f"{NAMES[i]} puts the {THINGS[i]} on the table. " * 200
        word = f" {('the', 'no', 'table', 'hello', 'zero')[i]}" * 1200
        written = [*texts[2 * i : 2 * i + 2], "\n".join(facts), " ".join(numbers), words, sentences, word]
        found += [plain(tokenizer, text)[:, :N_PROMPT] for text in written]
        found.insert(-2, tokens)
    return found


def safe(model: Llama, tokenizer, number: int) -> dict:
    """The share kept of a prompt, in %."""
    layers = record(model, prompts(tokenizer)[number])
    return {rule: share([GVote(seed=number, budget=rule)(*layer) for layer in layers]) for rule in RULES}


# The results

QUESTIONS = dict(enumerate((gaussian, proxies, seeds, endings, cap, pool, later, safe), start=1))


def results() -> dict[str, dict]:
    return json.loads(RESULTS.read_text("utf-8"))


def figures_of(number: int) -> Figures:
    return results()[str(number)]["figures"]


def ask(number: int, model: Llama, tokenizer, n: int) -> Figures:
    """A question's figures of the first n texts. Of a curve, such as "by layer", there is only the mean."""
    figures = defaultdict(list)
    for text in range(n):
        for name, value in QUESTIONS[number](model, tokenizer, text).items():
            figures[name].append(value if isinstance(value, list) else float(value))
    return {
        name: list(map(fmean, zip(*values, strict=True))) if isinstance(values[0], list) else values
        for name, values in figures.items()
    }


def ask_again(number: int, model: Llama, tokenizer, n: int):
    """How far are the figures of the first n texts, measured again, from those in the file of results?"""
    again, off = ask(number, model, tokenizer, n), []
    for name, before in figures_of(number).items():
        if len(again[name]) == n:
            off += [abs(x - y) / (abs(y) or 1) for x, y in zip(again[name], before, strict=False)]
    print(f"check: {n} of the texts measured anew, at most {max(off):.1%} off the stored numbers")


def grid(header: list[str], lines: Iterable[list[str]]) -> Markdown:
    """A table for a notebook."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))


def by_name(number: int, columns: Iterable[str], titles: dict[str, str | tuple[str, str]]) -> Markdown:
    """A question's means and 95% intervals as a table. titles: the names of figures, with {} in place of the
    column, and what to call them, perhaps with a number format."""
    figures, columns, lines = figures_of(number), list(columns), []
    for name, title in titles.items():
        title, spec = title if isinstance(title, tuple) else (title, ".3g")
        found = [figures.get(name.format(column)) for column in columns]
        lines.append([title, *(with_interval(*bootstrap(x), spec) if x else "–" for x in found)])
    return grid(["", *(IN_WORDS.get(column, column) for column in columns)], lines)


def kept_by_length() -> dict[str, dict[int, tuple[float, float, float]]]:
    """From notebook 4's results: rule's name -> tokens -> share kept (%) of all prompts of this length, mean
    and 95% interval."""
    import evaluate

    rows, names = evaluate.read(evaluate.EXPERIMENTS), ("gvote", "gvote_current_query")
    found = {}
    for label, name in zip(IN_WORDS.values(), names, strict=True):
        lengths = sorted({row["length"] for row in rows if row["policy"] == name})
        kept = {n: [100 * row["kept"] for row in evaluate.select(rows, name, n)] for n in lengths}
        found[label] = {n: bootstrap(shares) for n, shares in kept.items()}
    return found


def main(numbers: list[int]):
    from start import model, tokenizer  # loads it

    git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()  # of the code now running
    machine = f"{device_name()}, Python {platform.python_version()}, torch {torch.__version__}"
    for number in numbers or QUESTIONS:
        start = time.perf_counter()
        figures = ask(number, model, tokenizer, 40 if number == 8 else 12)
        about = {"commit": commit, "machine": machine, "seconds": round(time.perf_counter() - start)}
        rounded = {name: [float(f"{x:.4g}") for x in values] for name, values in figures.items()}
        text = json.dumps(results() | {str(number): about | {"figures": rounded}}, indent=1)
        # a list is one line
        text = re.sub(r"\[[^]]*]", lambda numbers: " ".join(numbers[0].split()), text)
        RESULTS.write_text(text + "\n", "utf-8")
        for name, values in rounded.items():
            print(f"{number}. {name}: {with_interval(*bootstrap(values), '.3g')}", flush=True)


if __name__ == "__main__":
    main([int(number) for number in sys.argv[1:]])
