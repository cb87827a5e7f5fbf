"""Any policy on the benchmarks of EleutherAI's lm-evaluation-harness: RULER, LongBench, GSM8K and many more.

python notebooks/benchmarks.py --policy full gvote peak_votes --tasks niah_single_1 --limit 20
python notebooks/benchmarks.py --policy full ideas.py:newest_half SnapKVPress:0.25 --limit 20
python notebooks/benchmarks.py --model meta-llama/Llama-3.1-8B-Instruct --tasks niah_single_1 gsm8k
accelerate launch notebooks/benchmarks.py --model owner/name       shares the prompts among all GPUs

Install it first: pip install -r requirements-benchmarks.txt. Prompts and metrics are the harness' own, and
`lm_eval ls tasks` lists its tasks. A prompt goes through the model's chat template, if it has one, and its
cache is compressed before the answer begins. A press of kvpress, such as SnapKVPress, is told what share of
the keys to keep.

RULER's niah_single_1, niah_multikey_2, niah_multikey_3, ruler_vt, ruler_fwe and ruler_cwe make their prompts
themselves. Most other tasks fetch their data from the hub. Notebook 6 shows results/benchmarks.jsonl, which
--out wrote.
"""

import argparse
import io
import json
import random
import sys
from collections import ChainMap
from contextlib import nullcontext, redirect_stdout
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean

# from wherever it is started
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kvpress
import numpy as np

try:
    from lm_eval import simple_evaluate
except ModuleNotFoundError:
    sys.exit("error: lm-evaluation-harness is missing: pip install -r requirements-benchmarks.txt")
from lm_eval.api.metrics import mean
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers.utils.logging import disable_progress_bar

from baselines import METHODS, check_share
from generate import DEFAULT, checkpoint_folder, default_device, default_dtype, load_tokenizer, make_policy
from press import PolicyPress


class CompressedLM(HFLM):
    """The harness' model of transformers. `press` compresses each prompt's cache, and None leaves it full;
    `kept` notes the share of the prompt's keys that stay."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        # the harness by itself shares prompts only among the GPUs of one machine
        if hasattr(self, "accelerator"):
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    def _model_generate(self, context, **settings):
        with self.press(self.model) if self.press else nullcontext():
            tokens = super()._model_generate(context, **settings)
        self.kept[tuple(context[0].tolist())] = 1 - self.press.compression_ratio if self.press else 1.0
        return tokens


def told(press: type, share: float) -> kvpress.BasePress:
    check_share(share)
    return press(compression_ratio=1 - share)


POLICIES = METHODS | {press.__name__: partial(told, press) for press in kvpress.ScorerPress.__subclasses__()}


def make_press(text: str) -> kvpress.BasePress | None:
    """What text names, None for the full cache. Raises ValueError as `make_policy` does."""
    policy = make_policy(text, POLICIES)
    if hasattr(policy, "for_prompt"):
        raise ValueError(f"{text} reads each prompt twice, which a press cannot do: it does not run here")
    return policy if policy is None or isinstance(policy, kvpress.BasePress) else PolicyPress(policy)


def load_tasks(manager: TaskManager, name: str, length: int) -> list:
    """The harness' task or tasks of that name; RULER's have up to `length` tokens, the answer's included."""
    random.seed(0), np.random.seed(0)
    manager.metadata["max_seq_lengths"] = [length]
    try:
        with redirect_stdout(sys.stderr):
            tasks = list(manager.load([name])["tasks"].values())
    # no such task, no network, a package that it needs
    except Exception as error:
        raise ValueError(f"{name} cannot be loaded (most tasks' data is on the hub): {error}") from None
    for task in tasks:
        if task.OUTPUT_TYPE != "generate_until":
            raise ValueError(f"{task.task_name} generates no text: there is no cache to compress")
        # RULER calls its metrics by length, and has a mean of its own, of which the harness knows no error
        task.aggregation()[str(length)] = mean
    return tasks


def run(lm: CompressedLM, manager: TaskManager, task, press: kvpress.BasePress | None, limit: int | None):
    """Score and standard error by metric, and the mean share of keys kept; in the other processes of
    `accelerate launch`, an empty dict."""
    lm.press, lm.kept = press, {}
    settings = dict(task_manager=manager, apply_chat_template=bool(lm.tokenizer.chat_template))
    found = simple_evaluate(lm, tasks=[task], limit=limit, **settings)
    kept = lm.gather_object(lm.kept)
    if found is None:
        return {}
    results = found["results"][task.task_name]
    # -1 is RULER's for lengths without prompts
    metrics = [key for key, score in results.items() if "," in key and "_stderr," not in key and score != -1]
    scores = {key: (results[key], results[key.replace(",", "_stderr,")]) for key in metrics}
    about = {"lm_eval": found["lm_eval_version"], "commit": found["git_hash"]}
    return about | {"n": results["sample_len"], "kept": fmean(ChainMap(*kept).values()), "scores": scores}


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--policy", nargs="+", default=["full", "gvote", "peak_votes"], metavar="NAME[:LEVEL]",
        help=f"full, {', '.join(POLICIES)}, or FILE.py:NAME (default: full gvote peak_votes)")  # fmt: skip
    add("--tasks", nargs="+", default=["niah_single_1"], metavar="NAME", help="default: niah_single_1")
    add("--length", type=int, nargs="+", default=[4096], metavar="N", help="of RULER's tasks (default: 4096)")
    add("--limit", type=int, metavar="N", help="the first N prompts of each task (default: all)")
    add("--model", default=DEFAULT, help="a checkpoint folder or a hub name (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on cuda, else float32")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="add the results to FILE; what it holds is not run again, even if the code has changed since",
    )
    parser.error = lambda message: sys.exit(f"error: {message} (--help shows all options)")
    args = parser.parse_args()
    presses = {policy: make_press(policy) for policy in args.policy}
    folder, device = checkpoint_folder(args.model), default_device()
    dtype = args.dtype or str(default_dtype(device)).removeprefix("torch.")
    manager = TaskManager(metadata={"pretrained": str(folder)})
    tasks = [(n, task) for n in args.length for name in args.tasks for task in load_tasks(manager, name, n)]
    file = args.out.open("a+") if args.out else io.StringIO()
    file.seek(0)
    done = [json.loads(line) for line in file]
    disable_progress_bar()
    settings = dict(tokenizer=load_tokenizer(folder), device=str(device), dtype=dtype)
    lm = CompressedLM(str(folder), **settings)
    for (length, task), (policy, press) in product(tasks, presses.items()):
        what = {"policy": policy, "task": task.task_name, "length": length, "limit": args.limit}
        what |= {"model": args.model, "dtype": dtype}
        row = next((row for row in done if what.items() <= row.items()), None)
        if row is None:
            row = what | run(lm, manager, task, press, args.limit)
            if lm.rank == 0:
                print(json.dumps(row), file=file, flush=True)
        for metric, (score, error) in row["scores"].items() if lm.rank == 0 else ():
            name = f"{policy:28}{task.task_name:16}{metric:26}n = {row['n']:<5}"
            figures = f"score {score:.3f}   standard error {error:.3}   {row['kept']:.1%} of the keys"
            print(name + figures, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
