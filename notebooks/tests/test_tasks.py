"""tasks.py: tasks against cases by hand."""

import re

import pytest
import torch
import torch.nn.functional as F

import baselines
import tasks
from generate import (
    encode,
)
from gvote import top_p_mask


def test_needles_can_be_found_and_repeated():
    for seed in range(20):
        context, question, answer = tasks.needle(seed)
        assert tasks.needle(seed) == (context, question, answer) != tasks.needle(seed + 1)
        words = re.findall(r"\w+", answer)
        assert words and all(word in context for word in words) and answer not in question


def test_needle_lies_in_a_haystack_of_the_wanted_length():
    for seed in range(20):
        context, question, answer = tasks.needle(seed, 500 * (seed + 1))
        (found,) = re.findall(r"^The special magic number for \w+ is \d{7}\.$", context, re.M)
        assert found == question.strip() + answer and len(context) == 500 * (seed + 1) + len(found) + 1


@pytest.mark.parametrize("question_after", [True, False])
def test_task_measures_what_a_cache_forgot(llama, tokenizer, question_after):
    context, question, answer = tasks.needle(0)
    task = tasks.recall(llama, tokenizer, (context, question, answer), question_after)
    n_context, n_question, n_answer = (len(tokenizer(t).input_ids) for t in (context, question, answer))
    assert task.n_prompt == n_context + (0 if question_after else n_question)
    assert task.n_scored == n_answer - (
        0 if question_after else 1
    )  # the prompt itself predicts the first token
    digits = torch.tensor(
        [tokenizer.decode([i]).isdigit() for i in encode(tokenizer, context, chat=False)[0]]
    )
    no_digits = ~F.pad(digits, (0, task.n_prompt - len(digits))).expand(1, 3, -1)
    full, blind, again = task.test([task.everything, [no_digits] * 30, task.everything])
    assert task.exact(task.full) and full["exact"] == 1 and abs(full["kl"]) < 1e-6
    assert full == pytest.approx(again, abs=1e-6)
    assert blind["exact"] == 0 and blind["kl"] > 1
    (alone,) = task.test([[no_digits] * 30])
    assert blind == pytest.approx(alone, rel=1e-3)


def test_continuation_is_cut_where_it_says(llama, tokenizer):
    task = tasks.continuation(llama, tokenizer, tasks.prose()["import"], n_prompt=96, n_next=20)
    ids = torch.cat((encode(tokenizer, tasks.prose()["import"], chat=False)[:, :96], task.after), dim=1)
    expected = llama(ids[:, :-1], all_logits=True)[0, 96:].log_softmax(dim=-1)
    torch.testing.assert_close(task.full, expected, rtol=0, atol=1e-3)
    policies = (baselines.Random(0.3), baselines.H2O(0.6))
    chance, best = task.test([[policy(*layer) for layer in task.layers] for policy in policies])
    assert chance["kl"] > best["kl"] > 0
    with pytest.raises(ValueError, match="has [0-9]+ tokens, 9096 are needed"):
        tasks.continuation(llama, tokenizer, tasks.prose()["import"], n_prompt=9000, n_next=96)


def test_entry_is_the_nucleus_at_every_top_p():
    probs = torch.rand(2, 3, 50, generator=torch.Generator().manual_seed(0)) ** 4
    probs[..., 7] = probs[..., 30]  # of equal keys the earlier one goes first
    probs /= probs.sum(dim=-1, keepdim=True)
    for top_p in (1e-6, 0.3, 0.9, 0.999):
        assert torch.equal(tasks.entry(probs) < top_p, top_p_mask(probs, top_p))


@pytest.mark.parametrize("share", [0.1, 0.25, 1.0])
def test_keep_share_is_one_threshold_for_all_layers(share):
    entries = [torch.rand(1, 2, 40, generator=torch.Generator().manual_seed(i)) * (i + 1) for i in range(3)]
    masks = tasks.keep_share(entries, share)
    kept = torch.cat([layer[keep] for layer, keep in zip(entries, masks, strict=True)])
    dropped = torch.cat([layer[~keep] for layer, keep in zip(entries, masks, strict=True)])
    assert len(kept) == int(share * 240) and (dropped > kept.max()).all()
