"""speed.py: who takes turns with whom, and bytes by hand. No time is asserted."""

from types import SimpleNamespace

import pytest
import torch

import speed
from gvote import GVote
from model import BLOCK, KVCache, keep_all
from test_gvote import TINY, random_ids, tiny_llama


def test_steps_take_turns_and_warm_rounds_do_not_count():
    turns = []
    seconds = speed.race(3, lambda: turns.append("a"), lambda: turns.append("b"), n_warm=1)
    assert turns == ["a", "b"] * 4 and [len(times) for times in seconds] == [3, 3]


def test_times_as_fast_is_of_the_rounds():
    # the medians' ratio would be 2
    found = speed.times_as_fast([1.0, 2.0, 9.0], [1.0, 1.0, 3.0])
    assert found.split() == ["2000.0", "ms", "1000.0", "ms", "2.00", "(1.00–3.00)"]
    assert speed.times_as_fast([4.0, 1.0, 2.0], [1.0, 1.0, 4.0]).split()[4:] == ["1.00", "(0.50–4.00)"]


def test_one_token_reads_the_same_rows_again_and_again():
    model, ids = tiny_llama().to(speed.DEVICE), random_ids(90).to(speed.DEVICE)
    alone, pair = (speed.filled_cache(model, ids, GVote(), n) for n in (1, 2))
    expected = KVCache(model.config)
    model(ids, expected, GVote())
    assert alone.length == 90 and torch.equal(alone.kept, expected.kept)
    assert torch.equal(pair.kept, 2 * alone.kept) and pair.batch_size == 2
    step = speed.one_token(model, pair)
    step()
    table = pair.layers[0]
    before = table.keys.clone()
    step()
    assert pair.length == 90 and torch.equal(table.keys, before)


def test_bytes_are_those_of_the_layers_so_far():
    model, ids = tiny_llama().to(speed.DEVICE), random_ids(100).to(speed.DEVICE)
    row = 2 * TINY.head_dim * 4
    dense = 100 * TINY.n_kv_head * row
    # a position a key, and two numbers a head
    layer = -(-100 * TINY.n_kv_head // BLOCK) * BLOCK * row + 100 * TINY.n_kv_head * 4 + TINY.n_kv_head * 16
    expected = [n * layer + dense for n in range(TINY.n_layer)] + [TINY.n_layer * layer]
    assert speed.bytes_held(model, ids, keep_all) == expected
    assert max(speed.bytes_held(model, ids, GVote(0.5))) < max(expected)


def test_a_fresh_process_returns_a_number_or_its_last_line(monkeypatch):
    assert speed.in_fresh_process("os.environ['GVOTE_X'].__len__()", GVOTE_X="four") == 4
    failed = SimpleNamespace(returncode=1, stderr="Traceback\n  line 7\nOSError: the disk is full\n")
    monkeypatch.setattr(speed.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(OSError, match="^OSError: the disk is full$"):
        speed.in_fresh_process("first_compiled_token()")
    lines = list(speed.fresh_processes(1))
    assert len(lines) == 1 and lines[0].startswith("not measured") and "the disk is full" in lines[0]
