"""The statistics of questions.py, on small cases made by hand."""

import json
import math

import pytest
import torch

import questions
import tasks
from gvote import GVote
from model import Attention, LlamaConfig


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_gaussian_distance():
    assert (questions.gaussian_distance(5 * noise(4000, 3) - 7) < 0.03).all()  # at any mean and scale
    spike = torch.zeros(1000, 1)
    spike[0] = 1  # nearly all values are at the mean: E|z| = sqrt(2 / pi) from their places
    assert questions.gaussian_distance(spike).item() == pytest.approx(math.sqrt(2 / math.pi), abs=0.05)
    coin = torch.tensor([-1.0, 1.0]).repeat_interleave(2000)[:, None]  # E||z| - 1|
    assert questions.gaussian_distance(coin).item() == pytest.approx(0.5354, abs=0.001)


def test_overlap():
    p = torch.tensor([0.5, 0.5, 0, 0])
    others = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.9, 0.1], [0.25, 0.25, 0.25, 0.25]])
    assert questions.overlap(p, others).tolist() == [1, 0, 0.5]


@pytest.fixture
def layer() -> tuple:
    torch.manual_seed(0)
    config = LlamaConfig(n_layer=1, n_head=4, n_kv_head=2, n_embd=32, head_dim=16)
    attn = Attention(config, layer=3).requires_grad_(False)
    return attn, noise(1, 50, 32), 20 * noise(1, 2, 50, 16), None


@pytest.mark.parametrize("rule", questions.RULES)
@pytest.mark.parametrize("top_p", [0.3, 0.7, 0.95])
def test_entries_are_gvotes_masks(layer, rule, top_p):
    expected = GVote(top_p, seed=5, budget=rule)(*layer)
    assert torch.equal(tasks.gvote_entry(layer, GVote(seed=5, budget=rule)) < top_p, expected)
    assert 0 < expected.sum() < expected.numel()


def test_a_cap_keeps_the_first_to_enter_and_never_more():
    entries = torch.tensor([[[0.0, 0.4, 0.97, 0.2], [0.6, 0.1, 0.9, 0.99]]])  # 2 heads, 4 keys
    assert questions.capped(entries, 0.5).tolist() == [
        [[True, True, False, True], [False, True, False, False]]
    ]
    assert torch.equal(questions.capped(entries, 0.99), entries < 0.95)  # asks for less than the cap
    for most in (0.1, 0.3, 0.62):
        assert questions.capped(noise(1, 3, 40).sigmoid(), most).float().mean() <= most


def test_a_mixture_is_the_fit_to_all_texts_together():
    texts = [noise(100, 5) * scale + scale for scale in (1, 2, 5)]
    fits = [(x.mean(dim=0), x.std(dim=0, correction=0)) for x in texts]
    mean, std = questions.mixture(fits)
    torch.testing.assert_close(mean, torch.cat(texts).mean(dim=0))
    torch.testing.assert_close(std, torch.cat(texts).std(dim=0, correction=0))


def test_ratios_are_of_the_same_text():
    assert questions.show_ratio([2, 20, 200, 2000], [1, 10, 100, 1000]) == "2.00 (2.00–2.00)"
    assert questions.show_ratio([1, 4], [2, 2]) == "1.00 (0.50–2.00)"  # half and double


def test_where_the_answers_of_a_chat_are():
    model, tokenizer = questions.load()
    task, places = questions.chat(model, tokenizer, "Ann has a cat.", ("Who is Ann?", None), ("And?", "No."))
    right = task.full.argmax(dim=-1) == task.after[0, 1:]
    assert right[places[0]].all()  # the first answer is the full cache's own
    assert tokenizer.decode(task.after[0, 1:][places[1]]) == "No."


def test_forty_prompts_of_one_length():
    _, tokenizer = questions.load()
    prompts = questions.prompts(tokenizer)
    assert len(prompts) == 40 and {ids.shape for ids in prompts} == {(1, questions.N_PROMPT)}
    assert len({tuple(ids[0].tolist()) for ids in prompts}) == 40


def test_answers_follow_the_file_of_results(tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "RESULTS", tmp_path / "questions.json")
    assert questions.table().count("not measured yet") == 8
    for most in (97.0, 62.0):
        values = [50.0] * 7 + [most]
        figures = {rule: questions.summary(values) for rule in questions.RULES}
        questions.RESULTS.write_text(json.dumps({"8": {"texts": 8, "figures": figures}}))
        assert f"{most:.0f}%" in questions.table(8)
        grid = questions.by_name(8, [*questions.RULES, "other"], {"{}": "kept"})
        assert [len(line.split("|")) for line in grid.splitlines()] == [6, 6, 6]
        assert f"| {50 + (most - 50) / 8:.3g} (" in grid and grid.endswith("| – |")


def test_all_questions_are_answered():
    table = questions.table()
    assert "not measured yet" not in table and "nan" not in table and "inf" not in table
    assert len(table.splitlines()) == 2 + len(questions.QUESTIONS)
