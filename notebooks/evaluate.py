"""What does a policy keep, find and lose? A row in a table for each, on prompts with numbers, text and code.

python notebooks/evaluate.py                                           full gvote peak_votes h2o:0.3
python notebooks/evaluate.py full gvote ideas.py:newest_half           the function of that name in a file
python notebooks/evaluate.py h2o:0.25 gvote_at:0.25 oracle:0.25        equal shares: each keeps 25%

What is measured is added to notebooks/results/evaluate.jsonl, prompt by prompt. A run that was stopped goes
on when it is called again. If a policy is added to the command, only that one is measured. A result is used
again only if the model, dtype, device, this repo's code and the Python files beside FILE.py are unchanged.
Notebook 4 shows results/experiments.jsonl, the large run, which this command never changes.

The columns, for each length and for all. kept, at most: the mean and the largest share of keys that stay.
needles found: prompts that hide a number, and are asked for it after the compression; it is found if it is
told digit by digit. one of three: the same, with two other numbers in the text. KL: how far predictions are
from those with the full cache, in nats per token, on texts and on code. times ...'s: the KL as a multiple of
that of the first policy that is not full, the geometric mean over the same prompts; less than 1 is better.
time: to choose the keys, in % of the time to read the prompt. Brackets hold 95% intervals. A policy that
draws is run with three seeds on each prompt, and the mean counts.
"""

import argparse
import csv
import hashlib
import json
import shlex
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from statistics import fmean, median

if __name__ == "__main__":
    # Ctrl-C shows no traceback, also while torch is being imported; SIGTERM removes temporary folders
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
# from wherever it is started
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from tqdm import tqdm

import generate
import stats
from baselines import METHODS, check_share
from generate import DEFAULT, make_policy, prepare
from gvote import GVote, PeakVotes
from model import KVCache, Llama
from speed import device_name, now
from tasks import KINDS, Task, gvote_entry, keep_share, make_task, plan, prompts

HERE = Path(__file__).resolve().parent
RESULTS, EXPERIMENTS = HERE / "results" / "evaluate.jsonl", HERE / "results" / "experiments.jsonl"
SOURCES = [HERE.parent / file for file in ("generate.py", "gvote.py", "model.py")]
SOURCES += [HERE / file for file in ("baselines.py", "evaluate.py", "tasks.py")]
# of a policy that draws
N_SEEDS = 3

# ---- Policies


@dataclass(frozen=True)
class AtShare:
    """A rule with a budget of its own, told a share: its threshold, one for all layers and heads, is moved
    until they keep that. rule: a budget of GVote's, "peak_votes", or "oracle", which knows the next queries;
    told no share, it has PeakVotes' bar. No policy: it needs a task, and chooses for all layers at once."""

    rule: str
    share: float | None
    seed: int = 0

    def __post_init__(self):
        check_share(1 if self.share is None else self.share)

    def masks(self, task: Task) -> list[Tensor]:
        if self.rule == "oracle":
            entries = [-true.amax(dim=2) for true in task.attention]
        elif self.rule == "peak_votes":
            entries = [-PeakVotes().strongest_votes(*layer[:3]) for layer in task.layers]
        else:
            policy = GVote(seed=self.seed, budget=self.rule)
            entries = [gvote_entry(layer, policy) for layer in task.layers]
        if self.share is not None:
            return keep_share(entries, self.share)
        return [layer <= -PeakVotes().bar_for(task.n_prompt) for layer in entries]


POLICIES = METHODS | {
    "gvote_at": lambda share: AtShare("per_sample", share),
    "gvote_current_query_at": lambda share: AtShare("current_query", share),
    "peak_votes_at": lambda share: AtShare("peak_votes", share),
    "oracle": lambda share=None: AtShare("oracle", share),
}


def measure(policy, task: Task, tokenizer, seed: int = 0) -> dict[str, float]:
    """A policy's figures on a task: share of the keys kept, KL, 1 if the answer is found, and seconds to
    choose the keys. For a policy that draws they are means over three seeds, which follow from this one."""
    policies, runs = [policy], []
    if is_dataclass(policy) and hasattr(policy, "seed"):
        policies = [replace(policy, seed=N_SEEDS * seed + i) for i in range(N_SEEDS)]
    for policy in policies:
        start = now()
        if isinstance(policy, AtShare):
            masks = policy.masks(task)
        else:
            policy = prepare(policy, task.model, tokenizer, task.prompt)
            masks = [policy(*layer) for layer in task.layers] if policy else task.everything
        seconds = now() - start
        (tested,) = task.test([masks])
        kept = torch.cat(masks).float().mean().item()
        runs.append({"kept": kept, "kl": tested["kl"], "found": tested["exact"], "seconds": seconds})
    return {name: round(mean(runs, name), 5) for name in runs[0]}


# ---- Results


def fingerprint(*parts) -> str:
    """Of files, and of what can be printed."""
    contents = [part.read_bytes() if isinstance(part, Path) else part for part in parts]
    return hashlib.sha256(repr(contents).encode()).hexdigest()[:12]


def read(file: Path) -> list[dict]:
    """The rows of a file of results, one for each prompt and policy. A line that was cut is left out."""
    rows = []
    for text in file.read_text("utf-8").splitlines() if file.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        policies = line.pop("policies", {})
        rows += [line | {"policy": name} | figures for name, figures in policies.items()]
    return rows


def add(file: Path, line: dict):
    """A new line comes first, as the last one may have been cut."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as results:
        results.write("\n" + json.dumps(line))


def code_of(name: str, settings: dict) -> str:
    """The fingerprint of all that a policy's figures depend on, but the prompt. For FILE.py:NAME that
    includes the Python files beside it, which it may import."""
    folders = [Path(name.rpartition(":")[0]).resolve().parent] if ".py:" in name else []
    beside = [file for folder in folders for file in sorted(folder.glob("*.py"))]
    return fingerprint(name, settings, *SOURCES, *beside)


def run(model, tokenizer, policies: dict, prompts: list, file=None, settings=None) -> tuple[list, set]:
    """The rows of policies (by name) on prompts, and the names of those that failed; their tracebacks are
    shown. What a file of results has by the same code and settings is not measured again, the rest added."""
    codes = {name: code_of(name, settings) for name in policies}
    known = {(row["prompt"], row.get("code")): row for row in (read(file) if file else [])}
    rows, failed, todo = [], set(), []
    for ids, about in prompts:
        about = about | {"prompt": fingerprint(about, ids.tolist())}
        keys = {name: (about["prompt"], code) for name, code in codes.items()}
        rows += [known[key] for key in keys.values() if key in known]
        todo.append((ids, about, [name for name, key in keys.items() if key not in known]))
    total = sum(about["length"] * len(names) for _, about, names in todo)
    if file and total:
        # of the code now running, and the last that changed the rules
        git = {"commit": "describe --always --dirty --exclude=*", "rules": "log -1 --format=%h ../gvote.py"}
        about_run = {"run": settings, "command": shlex.join(sys.argv)}
        for what, command in git.items():
            done = subprocess.run(["git", *command.split()], cwd=HERE, capture_output=True, text=True)
            about_run[what] = done.stdout.strip()
        add(file, about_run)
    # shown in a terminal, with the time that is left
    with tqdm(total=total, unit=" tokens", unit_scale=True, leave=False, disable=None) as bar:
        for ids, about, names in todo:
            names, figures = [name for name in names if name not in failed], {}
            if not names:
                continue
            task, line = make_task(model, tokenizer, ids, about), about
            if about["kind"] == "text":
                start = now()
                model(task.prompt, KVCache(model.config))
                line = about | {"prefill": round(now() - start, 5)}
            for name in names:
                bar.set_postfix_str(name)
                try:
                    figures[name] = measure(policies[name], task, tokenizer, about["seed"])
                    figures[name]["code"] = codes[name]
                except Exception:
                    failed.add(name)
                    bar.write(f"{name} failed:\n{traceback.format_exc()}", file=sys.stderr)
                bar.update(about["length"])
            rows += [line | {"policy": name} | row for name, row in figures.items()]
            if file and figures:
                add(file, line | {"policies": figures})
    return rows, failed


# ---- Tables


def select(rows: list[dict], policy: str, length: int | None = None, kinds=KINDS) -> list[dict]:
    """A policy's rows on prompts of one length (None: of all) and some kinds, in the same order for each
    policy."""
    found = [row for row in rows if row["policy"] == policy and length in (None, row["length"])]
    found = [row for row in found if row["kind"] in kinds]
    return sorted(found, key=lambda row: (row["length"], KINDS.index(row["kind"]), row["number"]))


def mean(rows: list[dict], figure: str) -> float:
    return fmean(row[figure] for row in rows)


def count(rows: list[dict], interval: bool = True) -> str:
    """How many numbers were found, and the 95% interval of the share."""
    return stats.tally([row["found"] for row in rows], interval)


def kl_ratio(rows: list[dict], policy: str, reference: str, *of) -> tuple[float, float, float]:
    """By what is a KL multiplied if the policy takes the place of the reference? Prompt by prompt: the
    geometric mean, and its 95% interval, of the prompts on which both were measured."""
    kls = [{row["prompt"]: row["kl"] for row in select(rows, name, *of)} for name in (policy, reference)]
    both = [prompt for prompt in kls[0] if prompt in kls[1]]
    return stats.ratio(*([of_one[prompt] for prompt in both] for of_one in kls))


def cost(rows: list[dict]) -> float:
    """The time to choose the keys, as a share of that to read the prompt: medians of the texts."""
    rows = [row for row in rows if "prefill" in row]
    return median(row["seconds"] for row in rows) / median(row["prefill"] for row in rows)


def table(rows: list[dict], policies: list[str], length: int | None) -> list[list[str]]:
    reference = next((name for name in policies if name != "full"), "full")
    lines = [[f"{length:,} tokens" if length else "all lengths", "kept", "at most", "needles found"]]
    lines[0] += ["one of three", "KL: text", "code", f"times {reference}'s", "time"]
    for name in policies:
        needles, texts, code, threes = (select(rows, name, length, [kind]) for kind in KINDS)
        every, cells = select(rows, name, length), []
        for some in (texts, code):
            cells.append(stats.with_interval(*stats.bootstrap([row["kl"] for row in some]), ".3f"))
        cells.append(stats.with_interval(*kl_ratio(rows, name, reference, length, ["text", "code"])))
        kept = [f"{mean(every, 'kept'):.0%}", f"{max(row['kept'] for row in every):.0%}"]
        lines.append([name, *kept, count(needles), count(threes, False), *cells, f"{cost(texts):.0%}"])
    return lines


# ---- The command


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = f"full, {', '.join(POLICIES)}, or FILE.py:NAME, which takes no level"
    levels = "the level is top_p for gvote, the bar for peak_votes, and the share to keep for all others"
    add("policies", nargs="*", default=["full", "gvote", "peak_votes", "h2o:0.3"], metavar="NAME[:LEVEL]",
        help=f"{names}; {levels} (default: full gvote peak_votes h2o:0.3)")  # fmt: skip
    add("--lengths", type=int, nargs="+", default=[400, 1500], metavar="N", help="tokens (default: 400 1500)")
    needles = "of each length: prompts with a number (default: %(default)s)"
    add("--needles", type=int, default=4, metavar="N", help=needles)
    texts = "of each length: texts, modules of code, and prompts with three numbers (default: %(default)s)"
    add("--texts", type=int, default=2, metavar="N", help=texts)
    add("--model", default=DEFAULT, help="a checkpoint folder or a hub name (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on cuda, else float32")
    add("--device", help="default: cuda or mps where there is one, else cpu")
    add("--csv", metavar="PATH", help="write the figures of each prompt to a file")
    add("--results", type=Path, default=RESULTS, metavar="PATH", help="another file than evaluate.jsonl")
    parser.error = lambda message: sys.exit(f"error: {message} (--help shows all options)")
    return parser.parse_args()


def main():
    args = parse_args()
    policies = {name: make_policy(name, POLICIES) for name in args.policies}
    if min(args.lengths) < 100 or args.needles < 1 or args.texts < 1:
        raise ValueError("a prompt has at least 100 tokens, and there are at least 1 needle and 1 text")
    device = generate.usable_device(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else generate.default_dtype(device)
    folder = generate.checkpoint_folder(args.model)
    tokenizer = generate.load_tokenizer(folder)
    some = prompts(tokenizer, plan(args.lengths, args.needles, args.texts))
    settings = {"model": args.model, "dtype": str(dtype), "device": str(device), "machine": device_name()}
    settings["torch"] = torch.__version__
    for file in sorted(folder.glob("*.safetensors")):
        settings[file.name] = [file.stat().st_size, file.stat().st_mtime]
    torch.set_grad_enabled(False)
    model = Llama.from_pretrained(folder, dtype, device)
    rows, failed = run(model, tokenizer, policies, some, args.results, settings)
    done = [name for name in policies if name not in failed]
    lengths = sorted(set(args.lengths))
    for length in lengths + [None] * (len(lengths) > 1) if done else []:
        stats.print_table(table(rows, done, length))
    if args.csv:
        columns = ["length", "kind", "number", "policy", "kept", "kl", "found", "seconds", "prefill"]
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    if failed:
        sys.exit(f"failed: {', '.join(sorted(failed))}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        generate.command(main)
    except KeyboardInterrupt:
        print("stopped: the same command goes on where it was", file=sys.stderr)
        sys.exit(130)
