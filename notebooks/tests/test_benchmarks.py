"""Policies and presses through lm-evaluation-harness, on a small model with random weights."""

import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch

pytest.importorskip("lm_eval", reason="pip install -r requirements-benchmarks.txt")

import lm_eval

import benchmarks
from generate import checkpoint_folder, load_tokenizer, make_policy
from model import KVCache, Llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint with weights so large that attention is uneven, and with the default model's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=49152, hidden_size=64, intermediate_size=64, max_position_embeddings=1024)
    heads = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3, eos_token_id=2))
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder), load_tokenizer(checkpoint_folder()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def manager(folder):
    """Of RULER's tasks alone: to list all tasks takes seconds."""
    ruler = Path(lm_eval.__file__).parent / "tasks" / "ruler"
    settings = dict(include_path=ruler, include_defaults=False)
    return benchmarks.TaskManager(metadata={"pretrained": str(folder)}, **settings)


@pytest.fixture(scope="module")
def task(manager):
    (task,) = benchmarks.load_tasks(manager, "ruler_fwe", 400)
    return task


def answers(lm, manager, task) -> dict[str, list]:
    """What the model says to two prompts."""
    found = benchmarks.simple_evaluate(
        lm, tasks=[task], limit=2, apply_chat_template=True, task_manager=manager
    )
    return {sample["arguments"][0][0]: sample["resps"] for sample in found["samples"]["ruler_fwe"]}


def test_each_prompt_is_compressed(folder, manager, task):
    tokenizer = load_tokenizer(folder)
    settings = dict(tokenizer=tokenizer, device="cpu", dtype=torch.float32)
    lm, said = benchmarks.CompressedLM(str(folder), **settings), {}
    for name in ("full", "gvote", "snapkv:0.5", "SnapKVPress:0.5"):
        lm.press, lm.kept = benchmarks.make_press(name), {}
        said[name] = answers(lm, manager, task)
    assert said["full"] == answers(benchmarks.HFLM(str(folder), **settings), manager, task)
    assert said["SnapKVPress:0.5"] == said["snapkv:0.5"]  # one frees the others' keys, one hides them
    assert said["full"] != said["gvote"] != said["snapkv:0.5"] != said["full"]

    llama, shares = Llama.from_pretrained(folder), []
    for prompt in said["full"]:
        cache = KVCache(llama.config)
        llama(tokenizer(prompt, return_tensors="pt").input_ids, cache, make_policy("gvote"))
        shares.append(cache.usage)
    row = benchmarks.run(lm, manager, task, benchmarks.make_press("gvote"), 2)
    assert row["n"] == 2 and row["kept"] == pytest.approx(fmean(shares)) and 0.1 < row["kept"] < 0.9
    assert list(row["scores"]) == ["400,none"]
    full = benchmarks.run(lm, manager, task, None, 1)
    assert full["kept"] == 1 and full["scores"]["400,none"][1] == "N/A"


def test_benchmarks_command(folder, manager, tmp_path, monkeypatch, capsys):
    out, runs = tmp_path / "results.jsonl", []

    def run(lm, manager, task, press, limit):
        runs.append((task.task_name, press, limit))
        return {"n": 3, "kept": 0.25, "scores": {"400,none": (2 / 3, 1 / 3)}}

    def command(*policies):
        argv = ["--tasks", "ruler_fwe", "--length", "400", "--limit", "3", "--model", folder, "--out", out]
        monkeypatch.setattr(sys, "argv", ["benchmarks.py", *map(str, argv), "--policy", *policies])
        benchmarks.main()
        return capsys.readouterr().out.splitlines()

    monkeypatch.setattr(benchmarks, "run", run)
    monkeypatch.setattr(benchmarks, "TaskManager", lambda metadata: manager)
    first = command("full", "gvote")
    assert [line.split()[:3] for line in first] == [
        [name, "ruler_fwe", "400,none"] for name in ("full", "gvote")
    ]
    assert all(line.endswith("score 0.667   standard error 0.333   25.0% of the keys") for line in first)
    assert command("gvote", "KeyDiffPress:0.3")[0] == first[1]
    assert [(name, limit) for name, _, limit in runs] == 3 * [
        ("ruler_fwe", 3)
    ]  # what is known is not run again
    assert runs[0][1] is None and runs[2][1].compression_ratio == pytest.approx(0.7)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["policy"] for row in rows] == ["full", "gvote", "KeyDiffPress:0.3"]


def test_benchmarks_errors_are_one_line(manager, monkeypatch):
    for name, match in [
        ("SnapKVPress", "SnapKVPress needs the share of keys to keep, as in SnapKVPress:0.5"),
        ("SnapKVPress:0", r"share must be in \(0, 1\], got 0.0"),
        ("kvzip:0.5", "kvzip:0.5 reads each prompt twice"),
    ]:
        with pytest.raises(ValueError, match=match):
            benchmarks.make_press(name)

    def offline(path, **_):
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", offline)
    for name, match in [("niah_single_2", "Couldn't reach '.*essays' on the Hub"), ("nonsense", "nonsense")]:
        with pytest.raises(ValueError, match=rf"{name} cannot be loaded \(most .* the hub\): .*{match}"):
            benchmarks.load_tasks(manager, name, 400)

    command = [sys.executable, benchmarks.__file__, "--policy", "half:0.5"]
    done = subprocess.run(command, capture_output=True, text=True)
    known = "only full, gvote, .*, SnapKVPress, .* and FILE.py:NAME"
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(f"error: there is no policy 'half:0.5', {known}\n", done.stderr)
