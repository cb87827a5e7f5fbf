"""plots.py: pictures of prompts of any length, and which blocks of a table's rows are read."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch

import plots
from generate import NOTE, QUESTION, encode, pieces
from gvote import GVote, PeakVotes
from model import KVCache, keep_all
from tasks import place
from test_gvote import random_ids, tiny_llama

plt.switch_backend("agg")


@pytest.mark.parametrize("n_before", [60, 300])
def test_the_note_is_found_by_its_text(tokenizer, n_before):
    """Python 3.13's page, for one, is longer than that of 3.11."""
    text = "word " * n_before + NOTE + " and" * 77 + f"\n\n{QUESTION}"
    *words, _ = pieces(tokenizer, encode(tokenizer, text)[0].tolist())
    note, question = place(words, NOTE), place(words, QUESTION)
    assert note.start > n_before and "".join(words[i] for i in note).strip() == NOTE
    ids = random_ids(len(words))
    caches = KVCache(tiny_llama().config), KVCache(tiny_llama().config)
    for cache, policy in zip(caches, (keep_all, GVote(0.5)), strict=True):
        tiny_llama()(ids, cache, policy)
    panels = {"all": (caches[0], "It is 4471."), "GVote": (caches[1], "It is 44.")}
    figure = plots.words_kept(panels, words, note, question, readers=[(0, 1), (2, 0)])
    texts = figure.axes[0].texts
    bold = [text.get_text() for text in texts if text.get_weight() == "bold"]
    assert [text for text in bold if text.isdigit()] == list("4471") * 2
    n_others = caches[0].kept.numel() - 2
    kept = [text for text in bold if "keep it" in text]
    assert kept[0].startswith("2 of 2 heads") and kept[1].startswith(f"{n_others} of {n_others} others")
    said = [text.get_text() for text in texts if text.get_text().startswith("Answer")]
    assert said == ["Answer (right): It is 4471.", "Answer (wrong): It is 44."]
    plt.close(figure)


@pytest.mark.parametrize("n_tokens", [96, 97])
def test_pictures_show_all_of_a_prompt(n_tokens, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: None)
    kept = torch.zeros(30, 3, n_tokens, dtype=torch.bool)
    kept[..., -1] = True
    plots.what_all_heads_keep({"one rule": kept, "another": kept})
    cells = plt.gcf().axes[0].images[0].get_array()
    n_last = n_tokens - 32 * (cells.shape[1] - 1)
    assert cells.shape[0] == 90 and 0 < n_last <= 32
    assert cells[0].tolist() == pytest.approx([0] * (cells.shape[1] - 1) + [100 / n_last])
    plt.close("all")


def test_a_vote_near_the_note_stands_at_its_own_key(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: None)
    votes, peak = torch.zeros(24, 60, dtype=torch.bool), torch.linspace(0, 0.59, 60)
    votes[3, 41] = True
    plots.where_votes_fall({"a": votes, "b": votes}, peak, 0.405, ["w"] * 60, range(35, 50), [41, 42])
    first, _, last = plt.gcf().axes
    cells = first.images[0]
    assert cells.get_array()[3].tolist() == [i == 41 for i in range(35, 50)]
    assert cells.get_extent()[:2] == [34.5, 49.5]
    kept, dropped, bar = last.lines
    assert kept.get_xdata().tolist() == list(range(41, 50)) and min(kept.get_ydata()) > bar.get_ydata()[0]
    assert dropped.get_xdata().tolist() == list(range(35, 41))
    plt.close("all")


def test_code_is_shown_without_its_docstring(monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "display", shown.append)
    plots.show_code(PeakVotes.bar_for, PeakVotes.__call__)
    assert '"""' not in shown[0].data
    assert "\ndef bar_for(" in shown[0].data and "\ndef __call__(" in shown[0].data


def test_a_block_is_read_by_each_head_with_rows_in_it(capsys):
    # as in Table: heads of 30, 0 and 5 kept keys, each with room for 4
    keys, new = torch.zeros(2, 32, 8), torch.tensor([30, 34, 43])
    plots.which_blocks_are_read(SimpleNamespace(keys=keys, first_new=new, kept=[30, 0, 5]))
    _, first, second = capsys.readouterr().out.splitlines()
    assert first == f"    0  {'0' * 30}n.  read by head 0"
    assert second == f"    1  ..n...22222n{'.' * 20}  read by head 1, 2"


def test_a_rung_has_a_line_with_its_interval_in_each_panel(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: None)
    blocks = [{"one": (0.5, 0.4, 0.6), "two": (0.9, 0.7, 1.2)}, {"three": (3.0, 2.0, 5.0)}]
    changed = {"voters": {"one": None}, "count": {"two": None}, "reach": {"three": None}, "fewer": {}}
    plots.which_rung_helps({"text": blocks, "needles": blocks}, changed)
    for axis in plt.gcf().axes:
        lines = [
            (list(line.get_xdata()), line.get_ydata()[0]) for line in axis.lines if len(line.get_xdata()) == 2
        ]
        for y, (_, low, high) in enumerate((blocks[0] | blocks[1]).values()):
            assert ([low, high], y) in lines
        # white where the interval holds 1
        assert [line.get_markerfacecolor() == "white" for line in axis.lines if line.get_marker() == "o"] == [
            False,
            True,
            False,
        ]
    plt.close("all")


def test_a_policy_is_a_line_and_a_task_a_column(capsys):
    row = {"task": "words", "length": 2048, "n": 10, "kept": 1.0, "policy": "full", "scores": {"x": [0.5, 0]}}
    rows = [row, row | {"task": "numbers"}]
    rows += [each | {"policy": "SnapKVPress:0.25", "kept": 0.25} for each in rows]
    plots.which_policies_solve_it(rows)
    header, full, told = capsys.readouterr().out.strip().splitlines()
    assert header.split("   ")[-2:] == [
        "words, 2,048 tokens, 10 prompts",
        "numbers, 2,048 tokens, 10 prompts",
    ]
    assert full.startswith("full cache") and full.count("0.50 (0.24–0.76), 100%") == 2
    assert told.startswith("SnapKV, told 0.25") and told.count("0.50 (0.24–0.76), 25%") == 2
