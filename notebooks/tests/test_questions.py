"""questions.py: its statistics on small cases made by hand, and its file of results."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

import evaluate
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
    expected = [[[True, True, False, True], [False, True, False, False]]]
    assert questions.capped(entries, 0.5).tolist() == expected
    assert torch.equal(questions.capped(entries, 0.99), entries < 0.95)  # asks for less than the cap
    for most in (0.1, 0.3, 0.62):
        assert questions.capped(noise(1, 3, 40).sigmoid(), most).float().mean() <= most


def test_a_mixture_is_the_fit_to_all_texts_together():
    texts = [noise(100, 5) * scale + scale for scale in (1, 2, 5)]
    fits = [(x.mean(dim=0), x.std(dim=0, correction=0)) for x in texts]
    mean, std = questions.mixture(fits)
    torch.testing.assert_close(mean, torch.cat(texts).mean(dim=0))
    torch.testing.assert_close(std, torch.cat(texts).std(dim=0, correction=0))


def test_where_the_answers_of_a_chat_are(llama, tokenizer):
    turns = ("Who is Ann?", None), ("And?", "No.")
    task, places = questions.chat(llama, tokenizer, "Ann has a cat.", *turns)
    right = task.full.argmax(dim=-1) == task.after[0, 1:]
    assert right[places[0]].all()  # the first answer is the full cache's own
    assert tokenizer.decode(task.after[0, 1:][places[1]]) == "No."


def test_forty_prompts_of_one_length(tokenizer):
    prompts = questions.prompts(tokenizer)
    assert len(prompts) == 40 and {ids.shape for ids in prompts} == {(1, questions.N_PROMPT)}
    assert len({tuple(ids[0].tolist()) for ids in prompts}) == 40
    of_one_word = [ids for ids, kind in zip(prompts, 5 * questions.KINDS, strict=True) if "word rep" in kind]
    assert len(of_one_word) == 5 and all(len(ids.unique()) == 1 for ids in of_one_word)


def test_figures_have_a_value_for_each_text_and_a_curve_is_a_mean(monkeypatch):
    def measured(model, tokenizer, number):
        return {"kept": torch.tensor(number + 1.0), "by layer": [number, 2.0 * number, 7.0]}

    monkeypatch.setitem(questions.QUESTIONS, 1, measured)
    assert questions.ask(1, None, None, 3) == {"kept": [1, 2, 3], "by layer": [1, 2, 7]}


def test_what_was_measured_is_in_the_file_and_in_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(questions, "RESULTS", tmp_path / "questions.json")
    monkeypatch.setitem(sys.modules, "start", SimpleNamespace(model=None, tokenizer=None))
    monkeypatch.setitem(questions.QUESTIONS, 8, lambda *_: {"a, kept": 50.0, "b, kept": 12.345678})
    questions.RESULTS.write_text('{"3": "stays"}')
    questions.main([8])
    assert questions.results()["3"] == "stays"
    assert questions.figures_of(8) == {"a, kept": [50.0] * 40, "b, kept": [12.35] * 40}
    table = questions.by_name(8, "abc", {"{}, kept": "share", "{}, kl": ("KL", ".1f")}).data
    assert table.splitlines()[2:] == ["| share | 50 (50–50) | 12.3 (12.3–12.3) | – |", "| KL | – | – | – |"]
    header = questions.by_name(8, questions.RULES, {}).data.splitlines()[0]
    assert header == "|  | GVote | GVote, paper's rule |"
    capsys.readouterr()
    monkeypatch.setitem(questions.QUESTIONS, 8, lambda *_: {"a, kept": 60.0, "b, kept": 12.35})
    questions.ask_again(8, None, None, 2)
    assert capsys.readouterr().out.startswith("check: 2 of the texts measured anew, at most 20.0% off")


def test_the_file_of_results_has_all_texts():
    for number in questions.QUESTIONS:
        figures = questions.figures_of(number)
        lengths = {len(values) for name, values in figures.items() if not name.endswith("by layer")}
        assert lengths == {40 if number == 8 else 12}
        assert all(math.isfinite(x) for values in figures.values() for x in values)


def test_the_kept_share_by_length_is_of_all_kinds(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "EXPERIMENTS", tmp_path / "some.jsonl")
    for length, kind, kept in ((50, "needle", 0.25), (50, "text", 0.75), (7000, "code", 0.125)):
        line = {"length": length, "kind": kind, "number": 0}
        policies = {name: {"kept": kept} for name in ("full", "gvote", "gvote_current_query")}
        evaluate.add(evaluate.EXPERIMENTS, line | {"policies": policies})
    found = questions.kept_by_length()
    assert [*found] == ["GVote", "GVote, paper's rule"]
    assert {n: mean for n, (mean, _, _) in found["GVote"].items()} == {50: 50.0, 7000: 12.5}
