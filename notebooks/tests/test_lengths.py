"""The tables at three lengths: statistics against cases by hand, shortcuts against the methods."""

import math

import pytest
import torch

import baselines
import lengths
import stats
import tables
import tasks
from generate import encode
from gvote import GVote, PeakVotes


def test_wilson_by_hand():
    assert stats.wilson(1.0, 12) == pytest.approx((0.7575, 1.0), abs=1e-4)  # 1 / (1 + z^2 / n): at least 76%
    assert stats.wilson(0.5, 4) == pytest.approx((0.1500, 0.8500), abs=1e-4)
    assert stats.wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


def test_bootstrap_by_hand():
    assert stats.bootstrap([3.0] * 5) == (3, 3, 3)
    # two values: a quarter of all draws are both 0, a quarter both 1
    assert stats.bootstrap([0.0, 1.0]) == (0.5, 0, 1)
    # twelve: the number of ones is binomial, 2.5% of it are at most 3, 97.5% at most 9
    mean, low, high = stats.bootstrap([0.0, 1.0] * 6)
    assert (mean, low, high) == pytest.approx((0.5, 3 / 12, 9 / 12))
    # many: the normal interval
    values = [math.sin(i) for i in range(400)]
    spread = math.sqrt(sum((x - sum(values) / 400) ** 2 for x in values)) / 400
    mean, low, high = stats.bootstrap(values, n_draws=4000)
    assert (high - low) / (2 * 1.96 * spread) == pytest.approx(1, abs=0.05)


def test_log_ratio_by_hand():
    assert stats.log_ratio([0.2, 0.1], [0.1, 0.2]) == pytest.approx([math.log(2), -math.log(2)])
    assert stats.log_ratio([1e-9], [-1e-9]) == [0]  # both are rounding errors
    with pytest.raises(ValueError):
        stats.log_ratio([0.1], [0.1, 0.2])


def test_lengths_keep_what_the_methods_keep(llama, tokenizer):
    """The shortcuts of lengths.py (each score once, for all shares) against the methods themselves."""
    torch.set_grad_enabled(False)
    instance = next(lengths.instances(tokenizer))
    task = lengths.make_task(llama, tokenizer, **instance)
    assert torch.equal(task.prompt, lengths.make_task(llama, tokenizer, **instance).prompt)
    masks, _ = lengths.compress(task, tokenizer, seed=7, shares=(0.3,))
    own = {"GVote": GVote(seed=7), "GVote, paper's rule": GVote(seed=7, budget="current_query")}
    for method, policy in (own | {"PeakVotes": PeakVotes()}).items():
        for layer, keep in zip(task.layers, masks[method, "own"], strict=True):
            assert torch.equal(keep, policy(*layer))
    for layer, keep in zip(task.layers, masks["H2O", 0.3], strict=True):
        assert torch.equal(keep, baselines.H2O(0.3)(*layer))
    for chunk in (2048, 200):
        scores = -torch.stack(lengths.kvzip(task, tokenizer, chunk=chunk))
        expected = baselines.second_reading(llama, tokenizer, task.prompt, chunk=chunk)
        torch.testing.assert_close(scores[..., 4:], expected[..., 4:], rtol=1e-3, atol=1e-5)
    zipped = baselines.KVzip(0.3).masks(llama, tokenizer, task.prompt)
    assert (zipped != torch.stack(masks["KVzip", 0.3])).float().mean() < 1e-4
    assert (task.n_prompt, len(masks)) == (pytest.approx(417, abs=5), 5 + 12)


def test_no_token_is_in_two_instances(tokenizer):
    found = list(lengths.instances(tokenizer))
    assert len(found) == 3 * 26 and len({each["seed"] for each in found}) == len(found)
    assert all(len(each["ids"]) >= each["length"] for each in found)
    prose = torch.cat([each["ids"] for each in found if each["kind"] != "code"])
    whole = encode(tokenizer, "\n\n".join(tasks.docstrings()), chat=False)[0]
    assert torch.equal(prose, whole[: len(prose)])


def test_tables_of_notebook_4_by_hand(llama, tokenizer):
    torch.set_grad_enabled(False)
    text, needle = [[0.25, 0.1, 0], [0.75, 0.3, 0]], [[0.5, 0.02, 1]] * 12
    found = "12 of 12 (76-100%)"
    assert tables.line({"needle": needle, "text": text}) == ["50%", found, "0.020", "0.200"]
    assert tables.line({"needle": needle[:3] + text[:1], "one of three": needle}) == [
        "48%", "3 of 4 (30-95%)", "12 of 12", "0.040"
    ]  # fmt: skip
    assert len(tables.measured("H2O", 0.25, 400)) == len(tables.HEAD)
    assert len(tables.rows("full", "own", None, *lengths.KINDS)) == 3 * sum(lengths.KINDS.values())
    assert len(tables.rows("full", "own", 4000, "text", "needle")) == 4 + 12
    assert tables.ratio("H2O", "H2O", None, "text") == (1, 1, 1)
    there, back = (tables.ratio(*pair, 400, "text") for pair in (("H2O", "KVzip"), ("KVzip", "H2O")))
    assert there == pytest.approx([1 / back[i] for i in (0, 2, 1)], rel=0.05)
    task = lengths.make_task(llama, tokenizer, **next(lengths.instances(tokenizer)))
    assert tables.tried("full", llama, tokenizer, [task])[0][:2] == (1, 0)
    kept, _, _ = tables.tried("h2o:0.5", llama, tokenizer, [task])[0]
    assert kept == pytest.approx(0.5, abs=0.01)
