"""The paper's benchmarks, GSM8K, RULER and LongBench, from local JSONL files in the formats they are
published in.

python notebooks/benchmarks.py gsm8k test.jsonl --model meta-llama/Llama-3.1-8B-Instruct --method gvote:0.95
python notebooks/benchmarks.py ruler 4096/data/niah_single_1/validation.jsonl --method full
python notebooks/benchmarks.py longbench LongBench/data/qasper.jsonl --method snapkv:0.5

A method has its level after a colon: top_p of GVote, the bar of PeakVotes, the share of keys that any other
keeps. Every finished example is a line in --out, with its settings: one file can take all runs. Whatever
stopped a run, the same command goes on where it was. Answers are greedy.
"""

import argparse
import difflib
import hashlib
import itertools
import json
import os
import re
import string
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from wherever it is started

import torch
from tqdm import tqdm

from baselines import METHODS, KVzip
from generate import (
    DEFAULT,
    checkpoint_folder,
    default_device,
    default_dtype,
    encode,
    generate,
    load_tokenizer,
    make_policy,
    prepare,
    render,
    stop_tokens,
)
from gvote import Policy
from model import KVCache, Llama, read_json
from stats import wilson


@dataclass(frozen=True)
class Example:
    """One line of a benchmark's file: what the model is asked, and how its answer is scored (0 to 1)."""

    task: str
    prompt: str
    max_new_tokens: int
    score: Callable[[str], float] = field(repr=False)
    chat: bool = True  # the prompt goes through the model's chat template
    answer_prefix: str = ""  # what the model's answer is made to begin with
    cut_middle: bool = False  # of a prompt that exceeds the context; else that is an error
    first_line: bool = False  # of the answer is what counts


# ---- GSM8K (github.com/openai/grade-school-math)


def gsm8k(path: Path, raw: dict) -> Example:
    """Zero-shot, with a prompt of ours; right if the answer's last number is the one after ####."""
    prompt = f"{raw['question']}\n\nThink step by step, and end with the answer as a number."
    gold = last_number(raw["answer"].partition("####")[2])
    if gold is None:
        raise ValueError("the answer does not end with #### and a number")
    return Example("gsm8k", prompt, 512, lambda answer: float(last_number(answer) == gold))


def last_number(text: str) -> float | None:
    """Commas, a dollar sign and a full stop at the end do not matter: "$1,234.50." is 1234.5, and "42.00" is
    42."""
    numbers = re.findall(r"-?\$?[\d,]*\.?\d+", text)
    return float(re.sub("[$,]", "", numbers[-1])) if numbers else None


# ---- RULER (github.com/NVIDIA/RULER: scripts/data/synthetic/constants.py,
# scripts/eval/synthetic/constants.py)

RULER_MAX_NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}


def ruler(path: Path, raw: dict) -> Example:
    """The file's name says the task, or its folder's, as in niah_single_1/validation.jsonl.

    The chat template goes around the input, and the answer's prefix after it. But an input that brings a
    template (RULER writes it for every --model_template_type but base), or its prefix, as in older files,
    stays as it is.
    """
    names = [
        name for name in (path.stem, path.resolve().parent.name) if name.split("_")[0] in RULER_MAX_NEW_TOKENS
    ]
    if not names:
        raise ValueError(
            "neither the file nor its folder has the name of a task of RULER, such as niah_single_1 or vt"
        )
    kind, references = names[0].split("_")[0], [reference.lower() for reference in raw["outputs"]]
    combine = max if kind == "qa" else mean  # string_match_part, string_match_all

    def score(answer: str) -> float:
        return combine([float(reference in answer.lower()) for reference in references])

    chat = "answer_prefix" in raw and not raw["input"].startswith(("<|", "[INST]"))
    prefix = raw.get("answer_prefix", "")
    return Example(names[0], raw["input"], RULER_MAX_NEW_TOKENS[kind], score, chat, prefix)


# ---- LongBench (github.com/THUDM/LongBench: pred.py, eval.py, metrics.py in its folder LongBench)


def longbench(path: Path, raw: dict) -> Example:
    """Prompts and answer lengths are LongBench's own config/*.json, beside the data or in ../config.

    Two details differ from pred.py: a long prompt is cut with the chat template already around it, up to the
    model's context, and samsum's answer may begin with an empty line.
    """
    dataset, answers, classes = raw["dataset"], raw["answers"], raw["all_classes"]
    if dataset not in LONGBENCH:
        raise ValueError(
            f"{dataset!r} is none of LongBench's English and code datasets: {', '.join(LONGBENCH)}"
        )
    few_shot = dataset in ("trec", "triviaqa", "samsum")

    def score(answer: str) -> float:
        answer = answer.lstrip("\n").split("\n")[0] if few_shot else answer
        return max(LONGBENCH[dataset](answer, reference, classes) for reference in answers)

    prompt = longbench_config(path.parent, "dataset2prompt.json")[dataset].format(**raw)
    max_new_tokens = longbench_config(path.parent, "dataset2maxlen.json")[dataset]
    chat = not few_shot and dataset not in ("lcc", "repobench-p")
    return Example(dataset, prompt, max_new_tokens, score, chat, cut_middle=True, first_line=few_shot)


@cache
def longbench_config(folder: Path, name: str) -> dict:
    for path in (folder / name, folder.resolve().parent / "config" / name):
        if path.exists():
            return read_json(path)
    raise FileNotFoundError(f"LongBench's {name} is neither in {folder} nor in its ../config")


def f1(n_same: int, n_answer: int, n_reference: int) -> float:
    return 2 * n_same / (n_answer + n_reference)  # the harmonic mean of precision and recall


def qa_f1(answer: str, reference: str, _) -> float:
    """F1 of the words, without case, punctuation and articles."""
    texts = (
        text.lower().translate(str.maketrans("", "", string.punctuation)) for text in (answer, reference)
    )
    a, b = (re.sub(r"\b(a|an|the)\b", " ", text).split() for text in texts)
    return f1((Counter(a) & Counter(b)).total(), len(a), len(b)) if a and b else 0.0


def rouge_l(answer: str, reference: str, _) -> float:
    """ROUGE-L of the package rouge 1.0.1, as LongBench calls it: F1 of the distinct words. Those in the
    longest common subsequence of any two sentences are shared. Every full stop ends a sentence; an empty one
    is an empty word."""
    a, b = ([part.split() or [""] for part in text.split(".") if part] for text in (answer, reference))
    shared = set()
    for x, y in itertools.product(a, b):
        row = [()] * (len(x) + 1)  # the longest common subsequence of y so far and the first j words of x
        for word in y:
            above, row = row, [()]
            for j, other in enumerate(x):  # of two that are equally long, the package's choice
                row.append((*above[j], word) if other == word else max(row[-1], above[j + 1], key=len))
        shared.update(row[-1])
    return f1(len(shared), len(set().union(*a)), len(set().union(*b))) if a and b else 0.0


def classification(answer: str, reference: str, classes: list[str]) -> float:
    """1 / the number of classes that the answer names, if the right one is among them."""
    named = [name for name in classes if name in answer]
    for name in named:
        if name in reference and name != reference:
            named.remove(name)  # inside its own loop, as published: the one after it is skipped
    return 1 / len(named) if reference in named else 0.0


def count(answer: str, reference: str, _) -> float:
    """The share of the answer's numbers that are the right one; for passage retrieval the 7 of "Paragraph
    7"."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(reference.removeprefix("Paragraph ")) / len(numbers) if numbers else 0.0


def code_similarity(answer: str, reference: str, _) -> float:
    """Of the first line without a comment or a fence, in whole percent. fuzzywuzzy uses difflib too, but not
    where python-Levenshtein is installed: there the published scorer's figures differ a little."""
    lines = (line for line in answer.lstrip("\n").split("\n") if not re.search("[`#]|//", line))
    return round(100 * difflib.SequenceMatcher(None, next(lines, ""), reference).ratio()) / 100


QA = ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa")
LONGBENCH = {
    **dict.fromkeys(QA, qa_f1),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), rouge_l),
    **dict.fromkeys(("passage_retrieval_en", "passage_count"), count),
    **dict.fromkeys(("lcc", "repobench-p"), code_similarity),
    "trec": classification,
}

# ---- the run

BENCHMARKS = {"gsm8k": gsm8k, "ruler": ruler, "longbench": longbench}


def read_lines(path: Path, make: Callable[[dict], object]) -> list:
    """What `make` makes of each object of a JSONL file. Raises ValueError, with the line, where it cannot."""
    made = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                made.append(make(json.loads(line)))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                kinds = {KeyError: "a field is missing: ", json.JSONDecodeError: "not JSON: "}
                raise ValueError(f"{path}, line {number}: {kinds.get(type(error), '')}{error}") from None
    return made


def finished(out: Path, settings: dict) -> dict[int, dict]:
    """The lines of a results file that were made by the same settings, by the number of their example.

    A line at the end that was not written whole is removed. Raises ValueError for a file of another kind.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    open(out, "a").close()  # a file that cannot be written is better known before the first answer
    content, start = out.read_bytes(), b'{"settings": '
    half = content.rpartition(b"\n")[2]
    if not all(line.startswith(start[: len(line)]) for line in content.splitlines()):
        raise ValueError(f"{out} is not a file of results: it is left as it is")
    os.truncate(out, len(content) - len(half))
    rows = read_lines(out, lambda row: (row["settings"], row["example"], row))
    return {example: row for made_by, example, row in rows if made_by == settings}


def answer(model: Llama, tokenizer, stop: list[int], method: Policy | KVzip | None, example: Example):
    """The greedy answer, and the share of the prompt's keys kept. Raises ValueError for a prompt that is too
    long."""
    if example.chat and tokenizer.chat_template:
        text = render(tokenizer, example.prompt) + example.answer_prefix
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    else:
        ids = encode(tokenizer, example.prompt + example.answer_prefix, chat=False)
    room = model.config.context_length - example.max_new_tokens
    if ids.size(1) > room and not example.cut_middle:
        raise ValueError(
            f"a prompt of {ids.size(1)} tokens leaves no room for an answer: at most {room} would fit"
        )
    if ids.size(1) > room:
        ids = torch.cat((ids[:, : room // 2], ids[:, -(room // 2) :]), dim=1)
    cache, tokens, text = KVCache(model.config, max_new_tokens=example.max_new_tokens), [], ""
    ids = ids.to(model.norm.weight.device)
    policy = prepare(method, model, tokenizer, ids)
    for token in generate(model, ids, example.max_new_tokens, policy, stop=stop, cache=cache):
        tokens.append(token)
        text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if example.first_line and "\n" in text.lstrip("\n"):
            break
    return text, cache.usage


def run(examples: list[Example], done: dict[int, dict], out: Path, settings: dict, answer: Callable):
    """Answers what is not in `done` yet, and adds it there; each answer is a line in `out` at once."""
    with open(out, "a") as file, tqdm(total=len(examples), initial=len(done)) as bar:
        for number, example in enumerate(examples):
            if number not in done:
                prediction, kept = answer(example)
                row = {"settings": settings, "example": number, "prediction": prediction}
                done[number] = row | {"score": example.score(prediction), "kept": kept}
                file.write(json.dumps(done[number]) + "\n")
                file.flush()
                bar.set_postfix_str(
                    f"score {100 * mean(row['score'] for row in done.values()):.1f}", refresh=False
                )
                bar.update()


def summary(done: dict[int, dict]) -> str:
    score, kept = (mean(row[what] for row in done.values()) for what in ("score", "kept"))
    low, high = wilson(score, len(done))
    interval = f"score {100 * score:.1f} (95% interval {100 * low:.1f} to {100 * high:.1f})"
    return f"{interval}, {len(done)} examples, {kept:.1%} of the keys kept"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("data", type=Path, help="a JSONL file as published")
    parser.add_argument(
        "--model", default=DEFAULT, help="a checkpoint folder or a hub name (default: %(default)s)"
    )
    parser.add_argument(
        "--method", default="gvote", help=f"default: %(default)s; or full, {', '.join(METHODS)}"
    )
    parser.add_argument("--out", type=Path, default="results/benchmarks.jsonl", help="default: %(default)s")
    parser.error = lambda message: sys.exit(f"error: {message} (--help shows all options)")
    args = parser.parse_args()
    method = make_policy(args.method, METHODS)

    examples = read_lines(args.data, lambda raw: BENCHMARKS[args.benchmark](args.data, raw))
    if not examples:
        raise ValueError(f"{args.data} is empty")
    device = default_device()
    dtype = default_dtype(device)
    settings = {
        "benchmark": args.benchmark,
        "task": examples[0].task,
        "data": hashlib.sha256(args.data.read_bytes() + repr(examples).encode()).hexdigest()[
            :16
        ],  # and the prompts
        "model": args.model,
        "method": args.method,
        "policy": repr(method),
        "dtype": str(dtype),
    }
    done = finished(args.out, settings)
    if len(done) < len(examples):
        folder = checkpoint_folder(args.model)
        tokenizer, model = load_tokenizer(folder), Llama.from_pretrained(folder, dtype, device)
        run(
            examples, done, args.out, settings, partial(answer, model, tokenizer, stop_tokens(folder), method)
        )
    print(f"{settings['task']}, {args.method}: {summary(done)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
