"""ladder.py: rungs against the methods that they are."""

import re

import pytest
import torch

import baselines
import ladder
import tasks
from gvote import GVote, PeakVotes


def test_rungs_keep_what_the_methods_keep(llama, tokenizer):
    (task,) = ladder.tasks_of(llama, tokenizer, "needle", 1, n_chars=400)
    policies = {"GVote": GVote(0.9, seed=task.seed), ladder.PEAK_VOTES: PeakVotes(0.1)}
    for name, policy in policies.items():
        voters, count = ladder.LADDER[name]
        for layer in task.layers:
            assert torch.equal(count(voters(task, layer[0].layer)) <= 0.9, policy(*layer))
    second = [ladder.bar(ladder.read_twice(task, layer)) for layer in range(len(task.layers))]
    for layer in second:
        layer[..., :4] = -1  # KVzip keeps the first four tokens in any case
    zipped = baselines.KVzip(0.25).masks(llama, tokenizer, task.prompt)
    assert torch.equal(torch.stack(tasks.keep_share(second, 0.25)), zipped)
    rows = ladder.climb([task], {"oracle": ladder.LADDER["true future: oracle"]})["oracle"]
    assert torch.cat(rows[0]["masks"]).float().mean() == pytest.approx(0.25, abs=1e-3)


def test_a_note_is_given_back_to_some_heads(llama, tokenizer):
    (task,) = ladder.tasks_of(llama, tokenizer, "needle", 1, n_chars=400)
    nothing = [torch.zeros_like(layer) for layer in task.everything]
    back = torch.stack(ladder.give_back(task, nothing, [3, 89]))[:, 0]  # (layers, H_kv, T)
    assert back.any(dim=-1).nonzero().tolist() == [[1, 0], [29, 2]]
    kept = task.prompt[0, back[1, 0]].tolist()
    assert re.search(r"number for \w+ is \d{7}\.$", tokenizer.decode(kept))


def test_a_vote_also_counts_for_neighbours():
    votes = torch.full((1, 1, 2, 60), 0.01)
    votes[..., 1, 30] = 0.5
    strength = 1 - ladder.bar_with_neighbours(votes)[0, 0]
    expected = torch.full((60,), 0.01)
    expected[30 - 3 : 30 + 4] = 0.05
    expected[30] = 0.5
    torch.testing.assert_close(strength, expected)


def test_factors_compare_with_the_rung_before_or_with_one():
    kls = {"a": (8.0, 2.0), "b": (4.0, 1.0), "c": (1.0, 1.0)}
    rows = {name: [{"kl": kl} for kl in values] for name, values in kls.items()}
    assert ladder.factors(rows, kls) == {
        "b": pytest.approx((0.5, 0.5, 0.5)),
        "c": pytest.approx((0.5, 0.25, 1.0)),
    }
    assert ladder.factors(rows, kls, against="b")["a"] == pytest.approx((2.0, 2.0, 2.0))
