"""The tables of notebook 4: what it reads off results/lengths.json, and what it measures itself."""

import json
from statistics import fmean, median

import stats
from baselines import METHODS
from generate import make_policy, prepare
from lengths import KINDS, LENGTHS, RESULTS, RIVALS, SHARES, compress, make_task, measure

DATA = json.loads(RESULTS.read_text())
OURS = ["GVote", "GVote, paper's rule", "PeakVotes"]  # set their budget themselves
EQUAL = ["oracle", "PeakVotes", "KVzip", *RIVALS, "GVote", "GVote, paper's rule"]  # in tables at equal shares
HEAD = ["kept", "needles found", "one of three", "KL: needle", "text", "code"]  # of what `line` gives


def rows(method: str, at: float | str, length: int | None, *kinds: str) -> list[list[float]]:
    """(share kept, KL, 1 if found else 0) of each prompt of these kinds. at: a share, or "own". No length is
    all of them."""
    results = [DATA["results"][str(n)] for n in LENGTHS if length in (n, None)]
    return [row for result in results for kind in kinds for row in result[kind][method][str(at)]]


def mean_kl(*of) -> float:
    return fmean(kl for _, kl, _ in rows(*of))


def found(prompts: list, interval: bool = True) -> str:
    """How many numbers were found, and the 95% interval of the share."""
    right = [exact for *_, exact in prompts]
    low, high = stats.wilson(fmean(right), len(right))
    return f"{sum(right):.0f} of {len(right)}" + interval * f" ({100 * low:.0f}-{high:.0%})"


def line(by_kind: dict[str, list]) -> list[str]:
    """A table's row, below `HEAD`, without the columns of kinds that are not there."""
    kept = fmean(share for prompts in by_kind.values() for share, *_ in prompts)
    counts = [
        found(by_kind[kind], kind == "needle") for kind in ("needle", "one of three") if kind in by_kind
    ]
    kls = [fmean(kl for _, kl, _ in by_kind[kind]) for kind in ("needle", "text", "code") if kind in by_kind]
    return [f"{kept:.0%}", *counts, *(f"{kl:.3f}" for kl in kls)]


def measured(method: str, at: float | str, length: int | None = None) -> list[str]:
    """A method's row in a table of one length, or of all."""
    return line({kind: rows(method, at, length, kind) for kind in KINDS})


def tried(name: str, model, tokenizer, tasks: list) -> list[list[float]]:
    """What `rows` gives, measured now, for the method of this name ("h2o:0.5", "ideas.py:newest_half")."""
    found = []
    for task in tasks:
        policy = prepare(make_policy(name, METHODS), model, tokenizer, task.prompt)
        masks = [policy(*layer) for layer in task.layers] if policy else task.everything
        found.append(measure(task, {name: masks})[name])
    return found


def differences(model, tokenizer, instance: dict) -> tuple[float, ...]:
    """Of one prompt, measured again: by how much, at most, do share kept, KL and found of all methods differ
    from the JSON's?"""
    task, off = make_task(model, tokenizer, **instance), []
    again = measure(task, compress(task, tokenizer, instance["seed"])[0])
    written = DATA["results"][str(instance["length"])][instance["kind"]]
    for (method, at), figures in again.items():
        before = written[method][str(at)][instance["number"]]
        off.append([abs(new - old) for new, old in zip(figures, before, strict=True)])
    return tuple(map(max, zip(*off, strict=True)))


def panel(length: int, *kinds: str) -> tuple[dict, dict]:
    """What `loss_by_share` in plots.py draws: (keys kept in %, KL) of methods at each share, and of the rules
    at their own setting."""

    def point(*of):
        return 100 * fmean(share for share, *_ in rows(*of)), mean_kl(*of)

    told = ["GVote", "PeakVotes", "H2O", "KVzip", "KeyDiff", "SnapKV"]
    lines = {method: [point(method, share, length, *kinds) for share in SHARES] for method in told}
    return lines, {method: point(method, "own", length, *kinds) for method in OURS}


def ratio(
    method: str, reference: str, length: int | None, *kinds: str, at=0.25
) -> tuple[float, float, float]:
    """By what is a KL multiplied if this method takes the place of the reference? Prompt by prompt: the
    geometric mean, and its 95% interval."""
    kls, others = ([kl for _, kl, _ in rows(m, at, length, *kinds)] for m in (method, reference))
    return stats.ratio(kls, others)


def ratio_text(*of, **at) -> str:
    return stats.with_interval(*ratio(*of, **at))


def cost(method: str, length: int) -> float:
    """The time for choosing the keys, as a share of the time for reading the prompt: medians of the texts."""
    seconds = DATA["seconds"][str(length)]
    return median(seconds[method]) / median(seconds["prefill"])
