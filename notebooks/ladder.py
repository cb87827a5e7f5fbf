"""The ladder of notebook 5: from GVote to the oracle, one change at a time. It writes nothing.

A voter is a hidden state at a position. Projected and rotated it is a query, and its vote for a key is
the share of its attention that the key gets. A rung of the ladder is a pair of functions, for one layer:

    votes = voters(task, layer)    of N voters for the prompt's T keys: (1, H_kv, N, T)
    top_p = count(votes)           from which top_p on each key is kept: (1, H_kv, T)

Every task has a seed of its own, from which all samples are drawn. Up to the rung "every token", the prompt's
first four tokens do not vote, as in GVote.
"""

import math
from collections.abc import Callable, Sequence
from statistics import fmean, median
from time import process_time

import torch
import torch.nn.functional as F
from torch import Tensor

import baselines
from generate import checkpoint_folder, generate, stop_tokens
from gvote import N_SINK, attention, fit_gaussian, layer_generator, sample_queries
from model import KVCache, Llama
from stats import ratio, with_interval
from tasks import Task, code, continuation, entry, keep_share, needle, prose, recall

# ---- Who votes


def vote(task: Task, layer: int, hidden: Tensor, positions: Tensor) -> Tensor:
    """The votes of hidden states (1, N, C) at positions (N,): those of all query heads that share keys."""
    attn, _, keys, _ = task.layers[layer]
    return attention(attn.queries(hidden, positions.to(keys.device)), keys)


def following(task: Task, n: int) -> Tensor:
    """GVote's positions: the next one, the one after it, and so on."""
    return torch.arange(task.n_prompt, task.n_prompt + n)


def samples_256(task: Task, layer: int, n: int = 256) -> Tensor:
    attn, hidden, keys, _ = task.layers[layer]
    return attention(sample_queries(attn, *fit_gaussian(hidden), n, task.n_prompt, task.seed), keys)


def samples_8(task: Task, layer: int) -> Tensor:
    return samples_256(task, layer, n=8)


def correlated_256(task: Task, layer: int) -> Tensor:
    """Random mixtures of the prompt's own deviations from their mean have just its covariance."""
    attn, hidden, _, _ = task.layers[layer]
    fitted = hidden[:, N_SINK:]
    mean, n = fitted.mean(dim=1, keepdim=True), fitted.size(1)
    mix = torch.randn(256, n, generator=layer_generator(attn, task.seed), device="cpu")
    mix = mix.to(hidden.device) / math.sqrt(n)
    return vote(task, layer, mean + mix @ (fitted - mean), following(task, 256))


def some_real(task: Task, layer: int) -> Tensor:
    """The hidden states of 256 random tokens of the prompt."""
    attn, hidden, _, _ = task.layers[layer]
    generator = layer_generator(attn, task.seed)
    return hidden[:, torch.randint(N_SINK, task.n_prompt, (256,), generator=generator, device="cpu")]


def real_256(task: Task, layer: int) -> Tensor:
    return vote(task, layer, some_real(task, layer), following(task, 256))


def real_next(task: Task, layer: int) -> Tensor:
    """All of them stand where the next token will be."""
    return vote(task, layer, some_real(task, layer), torch.full((256,), task.n_prompt))


def every_token(task: Task, layer: int, step: int = 1) -> Tensor:
    """All tokens of the prompt, or every step-th, stand where the next token will be."""
    hidden = task.layers[layer][1][:, ::step]
    return vote(task, layer, hidden, torch.full((hidden.size(1),), task.n_prompt))


def every_4th(task: Task, layer: int) -> Tensor:
    return every_token(task, layer, step=4)


def read_twice(task: Task, layer: int) -> Tensor:
    """KVzip's: the prompt's tokens, read once more. Only the strongest vote for each key is there."""
    if not hasattr(task, "second"):
        task.second = baselines.second_reading(task.model, task.tokenizer, task.prompt)
    return task.second[layer][:, :, None]


def future(task: Task, layer: int) -> Tensor:
    """The oracle: the true hidden states that follow the prompt, at their positions."""
    return task.attention[layer]


def future_8(task: Task, layer: int) -> Tensor:
    """Eight of them, evenly spread, up to the last."""
    votes = task.attention[layer].unflatten(2, (-1, task.after.size(1)))  # (1, H_kv, G, N, T)
    return votes[:, :, :, torch.linspace(0, task.after.size(1) - 1, 8).round().long()].flatten(2, 3)


# ---- How the votes are counted


def union(votes: Tensor) -> Tensor:
    """GVote's: a key is kept as soon as it is in the nucleus of one voter."""
    return entry(votes).amin(dim=2)


def strongest(votes: Tensor) -> Tensor:
    """A key's score is the strongest vote for it. Each head keeps one nucleus of the scores."""
    scores = votes.amax(dim=2)
    return entry(scores / scores.sum(dim=-1, keepdim=True))


def layer_nucleus(votes: Tensor) -> Tensor:
    """One nucleus of the scores for all heads of a layer together."""
    scores = votes.amax(dim=2)
    return entry((scores / scores.sum(dim=(1, 2), keepdim=True)).flatten(1)).view_as(scores)


def bar(votes: Tensor) -> Tensor:
    """PeakVotes': no nucleus. A key is kept if a vote for it reaches 1 - top_p, in all heads and layers."""
    return 1 - votes.amax(dim=2)


def bar_with_neighbours(votes: Tensor) -> Tensor:
    """The same, but a tenth of a key's strongest vote also counts for the 3 keys on each side of it: what
    PeakVotes does where every 4th token votes."""
    scores = votes.amax(dim=2)
    return 1 - scores.maximum(0.1 * F.max_pool1d(scores, kernel_size=7, stride=1, padding=3))


# ---- The ladder

Rung = tuple[Callable, Callable]  # voters, count
# as PeakVotes in prompts of up to 512 tokens
PEAK_VOTES = "one bar: PeakVotes"
# each rung changes one thing in the one before it
CHANGED: dict[str, dict[str, Rung]] = {
    "other voters": {
        "256 samples": (samples_256, union),
        "full covariance": (correlated_256, union),
        "real hidden states": (real_256, union),
        "all at the next position": (real_next, union),
        "every token": (every_token, union),
    },
    "another count": {
        "strongest vote": (every_token, strongest),
        "one nucleus a layer": (every_token, layer_nucleus),
        PEAK_VOTES: (every_token, bar),
    },
    # these and the next are compared with PeakVotes
    "voters out of reach": {
        "second reading (KVzip)": (read_twice, bar),
        "true future: oracle": (future, bar),
        "oracle, GVote's union": (future, union),
        "8 of the true future": (future_8, union),
    },
    "fewer voters": {
        "every 4th token votes": (every_4th, bar),
        "every 4th, for neighbours": (every_4th, bar_with_neighbours),
    },
}
OUT_OF_REACH = CHANGED["voters out of reach"]
REACHABLE: dict[str, Rung] = {"GVote": (samples_8, union)}
REACHABLE |= CHANGED["other voters"] | CHANGED["another count"]
LADDER = REACHABLE | OUT_OF_REACH
# beside PeakVotes
BESIDE = OUT_OF_REACH | CHANGED["fewer voters"]


def kept_by(task: Task, rung: Rung, share: float = 0.25) -> list[Tensor]:
    """The keep masks of all layers, at one top_p that keeps this share of all keys."""
    voters, count = rung
    return keep_share([count(voters(task, layer)) for layer in range(len(task.layers))], share)


def climb(tasks: list[Task], rungs: dict[str, Rung]) -> dict[str, list[dict]]:
    """Each rung at 25% of the keys. For each task: its masks, the figures of `Task.test`, and its cost, the
    processor time of voting and counting as a share of that of reading the prompt."""
    rows = {name: [] for name in rungs}
    for task in tasks:
        start, masks, cost = process_time(), [], []
        task.model(task.prompt, KVCache(task.model.config))
        prefill = process_time() - start
        for rung in rungs.values():
            start = process_time()
            masks.append(kept_by(task, rung))
            cost.append((process_time() - start) / prefill)
            # only the second reading counts
            if rung[0] is read_twice:
                cost[-1] -= 1
        for name, *row in zip(rungs, masks, cost, task.test(masks), strict=True):
            rows[name].append({"masks": row[0], "cost": row[1], **row[2]})
    return rows


def factors(rows: dict[str, list[dict]], rungs: dict[str, Rung], against="") -> dict[str, tuple]:
    """By what each of these rungs multiplies the KL, task by task: the geometric mean, and its 95% interval.
    They are compared with one rung, or, if none is given, each with the one before."""
    before = [against] * len(rungs) if against else ["", *rungs]
    kls = {name: [row["kl"] for row in of_rung] for name, of_rung in rows.items()}
    return {name: ratio(kls[name], kls[other]) for name, other in zip(rungs, before, strict=False) if other}


def steps(found: dict[str, dict[str, list[dict]]], rungs: dict[str, Rung], against="") -> list[list[str]]:
    """A table with a line for each of these rungs; found: text, needles and padlock -> what `climb` found.
    The first rung has its mean KL, the others their `factors`."""
    lines = [["25% of the keys", "text, times", "needles, times", "found", "padlock", "cost"]]
    times = [factors(found[kind], rungs, against) for kind in ("text", "needles")]
    for name, (voters, _) in rungs.items():
        text, needles, (padlock,) = (found[kind][name] for kind in ("text", "needles", "padlock"))
        if name in times[0]:
            cells = [with_interval(*by_name[name]) for by_name in times]
        else:
            cells = [f"KL {fmean(row['kl'] for row in rows):.2f}" for rows in (text, needles)]
        answered = f"{sum(row['exact'] for row in needles):.0f} of {len(needles)}"
        cost = "-" if voters in (future, future_8) else f"{median(row['cost'] for row in text):.0%}"
        lines.append([name, *cells, answered, "right" if padlock["exact"] else "wrong", cost])
    return lines


# ---- What it is climbed with


def padlock(model: Llama, tokenizer, prompt: Tensor) -> Task:
    """The running example: its prompt ends with the question, and the full cache's own answer follows."""
    answer = list(generate(model, prompt, 24, stop=stop_tokens(checkpoint_folder())))
    task = Task(model, prompt, torch.tensor([answer]), len(answer))
    task.tokenizer, task.seed = tokenizer, 0
    return task


def tasks_of(model: Llama, tokenizer, kind: str, n: int, n_chars=1600) -> list[Task]:
    """The first n pages of prose or modules of code, cut after 512 tokens, or the first n needles that the
    full cache answers, in n_chars of text."""
    if kind == "needle":
        found = (recall(model, tokenizer, needle(i, n_chars), question_after=True) for i in range(100))
        solved = (task for task in found if task.exact(task.full))
        tasks = [next(solved) for _ in range(n)]
    else:
        texts = list((prose() if kind == "prose" else code()).values())[:n]
        tasks = [continuation(model, tokenizer, text, n_prompt=512) for text in texts]
    for number, task in enumerate(tasks):
        task.tokenizer, task.seed = tokenizer, 100 * ("prose", "code", "needle").index(kind) + number
    return tasks


def say(task: Task, masks: list[Tensor]) -> str:
    """What the model answers, greedily, when each layer keeps these keys."""
    stop = stop_tokens(checkpoint_folder())
    tokens = generate(task.model, task.prompt, 24, lambda attn, *_: masks[attn.layer], stop=stop)
    return task.tokenizer.decode(list(tokens), skip_special_tokens=True)


# ---- Which heads carry the digits, and who votes for them


def name(head: int) -> str:
    """Heads are numbered through all layers of three KV heads each: 56 is 18.2, KV head 2 of layer 18."""
    return f"{head // 3}.{head % 3}"


def digits_at(task: Task) -> Tensor:
    """Where in the prompt the digits of the answer are."""
    digits = [i for i in task.after[0].tolist() if task.tokenizer.decode([i]).isdigit()]
    ids = task.prompt[0].tolist()
    start = next(i for i in range(task.n_prompt) if ids[i : i + len(digits)] == digits)
    return torch.arange(start, start + len(digits))


def asked(task: Task) -> Tensor:
    """The largest share of its attention to the prompt that a token after it pays to the digits, by head."""
    at = digits_at(task)
    return torch.cat([true[0, :, :, at].sum(dim=-1).amax(dim=1) for true in task.attention])


def give_back(task: Task, masks: list[Tensor], heads: Sequence[int]) -> list[Tensor]:
    """The masks, with the digits, ten tokens before them and the full stop kept in these heads."""
    at, kept = digits_at(task), torch.stack(masks)  # (layers, 1, H_kv, T)
    rows = torch.tensor(list(heads), dtype=torch.long)[:, None]
    kept.flatten(0, 2)[rows, torch.arange(at[0] - 10, at[-1] + 2)] = True
    return list(kept)


def given_back(tasks: list[Task], rows: list[dict], heads: Sequence[int]) -> tuple[float, float]:
    """Mean KL, and how many answers are right, if what `climb` found gets the note back in these heads."""
    pairs = zip(tasks, rows, strict=True)
    tested = [task.test([give_back(task, row["masks"], heads)])[0] for task, row in pairs]
    return sum(row["kl"] for row in tested) / len(tested), sum(row["exact"] for row in tested)


def votes_for_digits(task: Task, head: int, voters: Callable = every_token) -> tuple[Tensor, Tensor]:
    """In one head: the strongest vote for each digit, and which voter cast it."""
    config = task.model.config
    votes = voters(task, head // 3)[0, head % 3][:, digits_at(task)]  # (G * N, digits)
    return votes.unflatten(0, (config.n_head // config.n_kv_head, -1)).amax(dim=0).max(dim=0)
