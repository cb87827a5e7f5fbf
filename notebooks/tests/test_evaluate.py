"""evaluate.py: tables against cases by hand; runs that are stopped, changed and added to."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import evaluate
import tasks
from baselines import Random
from evaluate import AtShare
from generate import DEFAULT, checkpoint_folder, make_policy
from gvote import GVote, PeakVotes
from test_gvote import TINY


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list:
    return tasks.prompts(tokenizer)


def fingerprints(prompts: list) -> list[str]:
    return [evaluate.fingerprint(about, ids.tolist()) for ids, about in prompts]


def test_prompts_are_the_same_on_every_machine(prompts):
    """The texts come with torch and others: versions that change them would change all results."""
    stored = [row["prompt"] for row in evaluate.read(evaluate.EXPERIMENTS) if row["policy"] == "full"]
    assert sorted(fingerprints(prompts)) == sorted(stored) and len(set(stored)) == 3 * (24 + 3 * 8) + 16
    kept = [row["policy"] for row in evaluate.read(evaluate.EXPERIMENTS)]
    assert all(make_policy(name, evaluate.POLICIES) or name == "full" for name in set(kept))


def test_no_token_is_in_two_prompts(prompts, tokenizer):
    by_seed = sorted(prompts, key=lambda prompt: prompt[1]["seed"])
    prose = torch.cat([ids for ids, about in by_seed if about["kind"] != "code"])
    whole = tokenizer("\n\n".join(tasks.docstrings()), add_special_tokens=False).input_ids
    assert prose.tolist() == whole[: len(prose)]
    code = torch.cat([ids for ids, about in by_seed if about["kind"] == "code" and about["number"] == 2])
    source = list(tasks.modules().values())[2]
    assert code.tolist() == tokenizer(source, add_special_tokens=False).input_ids[: len(code)]


def test_few_prompts_are_the_first_of_all_and_more_follow(prompts, tokenizer):
    few = tasks.prompts(tokenizer, tasks.plan([1500, 300], n_needles=5, n_texts=9))
    assert [(about["length"], about["kind"]) for _, about in few].count((1500, "one of three")) == 9
    assert len(few) == 2 * (5 + 9 + 9 + 9) and few[0][1]["length"] == 300
    known = set(fingerprints(prompts))
    new = [about for (_, about), found in zip(few, fingerprints(few), strict=True) if found not in known]
    assert all(about["length"] == 300 or about["number"] == 8 for about in new) and len(new) == 32 + 3
    assert min(about["seed"] for about in new) > len(prompts) and all(len(ids) >= 300 for ids, _ in few)
    with pytest.raises(ValueError, match="no text is left for code 7 of 13000 tokens: ask for less"):
        tasks.prompts(tokenizer, [(13000, "code", 6)])


@pytest.mark.parametrize("rule", ["per_sample", "current_query", "peak_votes", "oracle"])
def test_a_rule_told_its_own_share_keeps_its_own_keys(rule, small, tokenizer, prompts):
    task = tasks.make_task(small, tokenizer, *prompts[0])
    if rule == "oracle":
        own = AtShare(rule, None).masks(task)
        assert task.n_prompt > 400
        assert torch.equal(own[2], task.attention[2].amax(dim=2) >= 10 / task.n_prompt)
    else:
        policy = PeakVotes(0.04) if rule == "peak_votes" else GVote(0.6, seed=7, budget=rule)
        own = [policy(*layer) for layer in task.layers]
    kept, n_keys = sum(mask.sum().item() for mask in own), sum(mask.numel() for mask in own)
    assert 0.02 < kept / n_keys < 0.98
    told = AtShare(rule, (kept + 0.5) / n_keys, seed=7).masks(task)
    if rule == "current_query":
        # the votes of all samples come at once, so many keys enter at the same top_p
        assert sum(mask.sum().item() for mask in told) == pytest.approx(kept, rel=0.02)
    else:
        assert all(map(torch.equal, told, own))


def test_measure_by_hand(small, tokenizer, prompts):
    task = tasks.make_task(small, tokenizer, *prompts[0])
    full = evaluate.measure(None, task, tokenizer)
    assert (full["kept"], full["kl"]) == (1, 0)
    half = evaluate.measure(make_policy("random:0.5", evaluate.POLICIES), task, tokenizer, seed=3)
    kls = []
    # three seeds that no other prompt has
    for seed in (9, 10, 11):
        masks = [Random(0.5, seed)(*layer) for layer in task.layers]
        other = task.predict([masks])[0]
        kls.append((task.full.exp() * (task.full - other)).sum(dim=-1).mean().item())
    assert half["kept"] == pytest.approx(0.5, abs=0.01) and max(kls) - min(kls) > 0.001
    assert half["kl"] == pytest.approx(sum(kls) / 3, abs=1e-5) and min(kls) > 0.01


def test_no_tensor_is_made_on_the_default_device(small, tokenizer, prompts):
    """On a GPU, a tensor made without a device would be on the CPU."""
    names = ["full", "gvote_at:0.3", "gvote_current_query_at:0.3", "peak_votes_at:0.3", "oracle", "h2o:0.3"]
    policies = [make_policy(name, evaluate.POLICIES) for name in names]

    def kls() -> list[float]:
        task = tasks.make_task(small, tokenizer, *prompts[1])
        return [evaluate.measure(policy, task, tokenizer)["kl"] for policy in policies]

    expected = kls()
    with torch.device("meta"):
        found = kls()
    assert found == expected


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines() if line]


def figures(rows: list[dict]) -> list[tuple]:
    return sorted((row["prompt"], row["policy"], row["kept"], row["kl"], row["found"]) for row in rows)


@pytest.fixture
def measured(monkeypatch) -> tuple:
    """The policies that were really measured, and a spy that stops at one of them."""
    asked, measure = [], evaluate.measure

    def spy(policy, *args):
        asked.append(policy)
        if len(asked) == spy.stop_at:
            raise KeyboardInterrupt
        return measure(policy, *args)

    spy.stop_at = None
    monkeypatch.setattr(evaluate, "measure", spy)
    return asked, spy


def test_a_stopped_run_goes_on(small, tokenizer, prompts, tmp_path, measured):
    asked, spy = measured
    file, some = tmp_path / "new" / "results.jsonl", prompts[:4]
    policies = {"full": None, "gvote": GVote()}
    whole, failed = evaluate.run(small, tokenizer, policies, some)
    assert len(whole) == 8 and not failed and {row["kind"] for row in whole} == set(tasks.KINDS)
    assert ["prefill" in row for row in evaluate.select(whole, "gvote")] == [False, True, False, False]
    asked.clear()
    spy.stop_at = 6
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(small, tokenizer, policies, some, file)
    assert len(evaluate.read(file)) == 4 and "run" in lines_of(file)[0]
    text = file.read_text()
    file.write_text(text[:-30])  # the second prompt's line
    asked.clear()
    spy.stop_at = None
    rows, _ = evaluate.run(small, tokenizer, policies, some, file)
    assert len(asked) == 6 and figures(rows) == figures(whole) == figures(evaluate.read(file))
    asked.clear()
    more = policies | {"peak_votes": PeakVotes()}
    rows, _ = evaluate.run(small, tokenizer, more, prompts[:5], file)
    assert asked == [PeakVotes()] * 4 + list(more.values()) and len(rows) == 15
    before = file.read_text()
    assert figures(evaluate.run(small, tokenizer, more, prompts[:5], file)[0]) == figures(rows)
    assert file.read_text() == before and len(asked) == 7


def test_rows_of_other_code_are_not_used(small, tokenizer, prompts, tmp_path, measured, monkeypatch):
    asked, _ = measured
    ideas, source, file = tmp_path / "ideas.py", tmp_path / "source.py", tmp_path / "results.jsonl"
    idea = "def keep(attn, hidden, keys, values):\n    return keys[..., 0] > {}\n"
    source.write_text("")
    monkeypatch.setattr(evaluate, "SOURCES", [source])
    names = ["full", f"{ideas}:keep"]

    def rows(**settings) -> list[dict]:
        asked.clear()
        policies = {name: make_policy(name, evaluate.POLICIES) for name in names}
        return evaluate.run(small, tokenizer, policies, prompts[:1], file, settings)[0]

    ideas.write_text(idea.format(0))
    some = rows(model="a")
    assert len(asked) == 2 and figures(rows(model="a")) == figures(some) and len(asked) == 0
    ideas.write_text(idea.format(0.5))
    fewer = rows(model="a")
    assert len(asked) == 1 and fewer[1]["kept"] < some[1]["kept"]
    (tmp_path / "helper.py").write_text("")
    rows(model="a")
    assert len(asked) == 1
    rows(model="b")
    assert len(asked) == 2
    source.write_text("# changed")
    rows(model="b")
    assert len(asked) == 2
    rows(model="b")
    assert len(asked) == 0


def test_table_by_hand():
    def row(kind, number, policy, kept, kl, found=0.0, length=400, **times):
        return {"length": length, "kind": kind, "number": number, "policy": policy, "kept": kept, "kl": kl,
                "found": found, "prompt": f"{length} {kind} {number}"} | times  # fmt: skip

    rows = []
    for policy, kept, kl in (("full", 1, 0), ("half", 0.5, 0.1), ("few", 0.1, 0.4)):
        for i in range(4):
            rows.append(row("needle", i, policy, kept, kl, float(policy != "few" and i > 0)))
        rows += [row("text", i, policy, kept, kl * (1 + i), seconds=i, prefill=2) for i in range(2)]
        rows += [row("code", 0, policy, kept + kl, kl), row("one of three", 0, policy, kept, kl, 1.0)]
        rows.append(row("text", 0, policy, 0, 9, length=900))
    head = ["400 tokens", "kept", "at most", "needles found", "one of three", "KL: text", "code"]
    half = ["half", "51%", "60%", "3 of 4 (30–95%)", "1 of 1", "0.150 (0.100–0.200)", "0.100 (0.100–0.100)"]
    few = ["few", "15%", "50%", "0 of 4 (0–49%)", "1 of 1", "0.600 (0.400–0.800)", "0.400 (0.400–0.400)"]
    assert evaluate.table(rows[::-1], ["half", "few"], 400) == [
        [*head, "times half's", "time"],
        [*half, "1.00 (1.00–1.00)", "25%"],
        [*few, "4.00 (4.00–4.00)", "25%"],
    ]
    assert evaluate.table(rows, ["full", "few", "half"], 400)[3][7:] == ["0.25 (0.25–0.25)", "25%"]
    assert evaluate.mean(evaluate.select(rows, "few", None, ["text"]), "kl") == pytest.approx(
        (0.4 + 0.8 + 9) / 3
    )


# ---- The command


@pytest.fixture(scope="module")
def checkpoint(small, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint_folder(DEFAULT) / file, folder)
    names = {
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_kv_head": "num_key_value_heads",
    }
    names |= {
        "n_embd": "hidden_size",
        "n_hidden": "intermediate_size",
        "context_length": "max_position_embeddings",
    }
    names |= {"vocab_size": "vocab_size", "norm_eps": "rms_norm_eps", "head_dim": "head_dim"}
    sizes = {theirs: getattr(small.config, ours) for ours, theirs in names.items()}
    settings = {"model_type": "llama", "tie_word_embeddings": True, "rope_theta": TINY.rope_theta}
    (folder / "config.json").write_text(json.dumps(sizes | settings))
    weights = {f"model.{name}": x for name, x in small.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors")
    return folder


IDEAS = """
import time

def sound(attn, hidden, keys, values):
    return keys[..., 0] > 0

def broken(attn, hidden, keys, values):
    batch, heads = keys.shape

def slow(attn, hidden, keys, values):
    print("called", flush=True)
    time.sleep(60)
"""


def test_command(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "ideas.py").write_text(IDEAS)
    monkeypatch.chdir(tmp_path)
    sizes = ["--lengths", "100", "130", "--needles", "2", "--texts", "1", "--device", "cpu"]
    options = [*sizes, "--model", str(checkpoint), "--results", "results.jsonl", "--csv", "rows.csv"]

    def main(*args):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *args])
        evaluate.main()

    main("full", "ideas.py:sound", "oracle", *options)
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if line] == (
        ["100", "full", "ideas.py:sound", "oracle", "130", "full", "ideas.py:sound", "oracle"]
        + ["all", "full", "ideas.py:sound", "oracle"]
    )
    with open("rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * (2 + 1 + 1 + 1)
    kept = [float(row["kept"]) for row in rows if row["policy"] == "ideas.py:sound"]
    assert f"{sum(kept) / len(kept):.0%}" in out and all(0.3 < share < 0.7 for share in kept)
    assert [row["prefill"] != "" for row in rows] == [row["kind"] == "text" for row in rows]

    with pytest.raises(SystemExit, match="failed: ideas.py:broken"):
        main("full", "ideas.py:broken", "ideas.py:sound", *options)
    printed = capsys.readouterr()
    line = 1 + IDEAS.splitlines().index("    batch, heads = keys.shape")
    assert f'ideas.py", line {line}, in broken' in printed.err and printed.err.count("Traceback") == 1
    assert [line.split()[0] for line in printed.out.splitlines() if line][-2:] == ["full", "ideas.py:sound"]
    for args, message in [
        (["gvote_at"], "gvote_at needs the share of keys to keep, as in gvote_at:0.5"),
        (["oracle:0"], "share must be in"),
        (["half"], "there is no policy 'half', only full, gvote, .*oracle and FILE.py:NAME"),
        (["full", "--lengths", "50"], "at least 100 tokens"),
        (["full", "--needles", "0"], "at least 1 needle"),
        (["full", "--device", "quantum"], "device quantum cannot be used: "),
    ]:
        with pytest.raises(ValueError, match=message):
            main(*args)


def test_ctrl_c_keeps_what_was_measured(checkpoint, tmp_path):
    (tmp_path / "ideas.py").write_text(IDEAS)
    command = [sys.executable, evaluate.__file__, "full", "ideas.py:slow", "--model", checkpoint]
    options = [
        "--lengths",
        "100",
        "--needles",
        "2",
        "--texts",
        "1",
        "--results",
        "results.jsonl",
        "--device",
        "cpu",
    ]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([*command, *options], cwd=tmp_path, **pipes) as process:
        assert process.stdout.readline() == "called\n"
        os.kill(process.pid, signal.SIGINT)
        out, error = process.communicate()
    assert (
        process.returncode == 130
        and out == ""
        and error == "stopped: the same command goes on where it was\n"
    )
