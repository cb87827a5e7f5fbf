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
