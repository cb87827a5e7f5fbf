"""Beside the notebooks, a page to play with: what does a rule keep of a prompt? Writes explore.html.

python notebooks/explore.py                                       the built-in text and a question about it
python notebooks/explore.py --file notes.txt --question "Who?"    yours (and --model FOLDER --out page.html)

The prompt is read once, in float32 on the CPU. The page, explore.template.html, gets for each key the first
setting that keeps it; and, for the heads that read the note's code, each sample's attention and votes.
"""

import argparse
import base64
import gzip
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from wherever it is started

import torch
from torch import Tensor

import generate
from gvote import GVote, PeakVotes, attention, current_query_mask, fit_gaussian, sample_queries
from model import BLOCK, Llama
from tasks import entry, heads_that_read, place, record

TOP_P = [i / 100 for i in range(1, 101)]  # the settings on offer, in the order in which more is kept
BARS = [i / 1000 for i in range(200, -1, -1)]
N_SAMPLES, NEW_TOKENS = 16, 128  # new tokens: the command's cache has rows for as many
DEFAULTS = {"top_p": GVote.top_p, "n_samples": GVote.n_samples, "bar": PeakVotes.bar}
RULES = (GVote(), GVote(budget="current_query"), PeakVotes())


def look(attn, hidden, keys, values) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the page gets of a layer.

    Of each sample, its attention, in hundredths of a percent, and the numbers of the first settings with
    which it votes for each key by GVote's two rules, all (H_kv, G, S, T); and the number of the first bar
    with which PeakVotes keeps each key, (H_kv, T).
    """
    n_tokens = keys.size(2)
    # fewer samples are the first of these, so there is nothing to store for each number of samples
    queries = sample_queries(attn, *fit_gaussian(hidden), N_SAMPLES, n_tokens, GVote.seed)
    probs = attention(queries, keys)  # (1, H_kv, G * S, T)
    current = attention(attn.queries(hidden[:, -1:], torch.tensor([n_tokens - 1])), keys)
    by_nucleus = torch.bucketize(entry(probs), torch.tensor(TOP_P[:-1]), right=True)
    ranks = probs.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    # all samples' votes are of one size, so the first sample's tell it
    votes = (current_query_mask(probs[:, :, :1], current, top_p) for top_p in TOP_P)
    by_size = sum(ranks >= vote.sum(dim=-1, keepdim=True) for vote in votes)
    bars = torch.tensor([PeakVotes(bar).bar_for(n_tokens) for bar in reversed(BARS)])
    peak = PeakVotes().strongest_votes(attn, hidden, keys)[0]
    by_bar = len(BARS) - torch.bucketize(peak, bars, right=True)
    samples = (x[0].unflatten(1, (-1, N_SAMPLES)) for x in ((10000 * probs).round(), by_nucleus, by_size))
    return *samples, by_bar


def make_page(model: Llama, tokenizer, text: str, stop: list[int], name=generate.DEFAULT, options=()) -> str:
    ids = generate.encode(tokenizer, text)
    parts = zip(*(look(*layer) for layer in record(model, ids)), strict=True)
    shares, *first, by_bar = [torch.cat(x).short() for x in parts]  # (layers * H_kv, ...)
    # a head keeps what any of its query heads' first samples votes for: (S, layers * H_kv, T)
    kept_by = [x.amin(dim=1).cummin(dim=1).values.transpose(0, 1) for x in first]
    # a character of several tokens comes with the last; of the end of the chat template nothing is left over
    *words, _ = generate.pieces(tokenizer, ids[0].tolist())
    note = list(place(words, generate.NOTE))
    digits = [i for i in note if words[i].isdigit()]
    answers = [list(generate.generate(model, ids, NEW_TOKENS, rule, stop=stop)) for rule in (None, *RULES)]
    readers = heads_that_read(model, ids, answers[0], digits)
    # without a note, every eighth head
    looked_at = readers or list(range(0, len(by_bar), 8))
    # each plane is what it adds to the one before, modulo 256, for gzip
    planes = [x.diff(dim=0, prepend=torch.zeros_like(x[:1])) for x in kept_by]
    # 16 bits first: so they are aligned
    arrays = [shares[looked_at], *(x.byte() for x in (*(x[looked_at] for x in first), *planes, by_bar))]
    packed = gzip.compress(b"".join(x.numpy().tobytes() for x in arrays), mtime=0)
    data = {
        "model": name, "options": options, "config": vars(model.config), "new_tokens": NEW_TOKENS,
        "top_p": TOP_P, "bar": BARS, "n_samples": N_SAMPLES, "defaults": DEFAULTS, "words": words,
        "bar_scale": PeakVotes().bar_for(len(words)) / PeakVotes.bar,
        "note": note, "digits": digits, "answers": tokenizer.batch_decode(answers, skip_special_tokens=True),
        "readers": readers, "looked_at": looked_at, "block": BLOCK,
        "arrays": base64.b64encode(packed).decode(),
    }  # fmt: skip
    page = Path(__file__).with_name("explore.template.html").read_text("utf-8")
    return page.replace("DATA", json.dumps(data).replace("<", "\\u003c"), 1)  # so no word can end the script


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for option in ("file", "question", "model", "out"):
        parser.add_argument(f"--{option}")
    args = parser.parse_args()
    folder = generate.checkpoint_folder(name := args.model or generate.DEFAULT)
    model, tokenizer = Llama.from_pretrained(folder), generate.load_tokenizer(folder)
    text = generate.read_text(args.file) if args.file else generate.built_in_text(tokenizer)
    question = args.question or ("" if args.file else generate.QUESTION)
    text = f"{text}\n\n{question}" if question else text
    given = [f"--{option}" for option in ("file", "question", "model") if getattr(args, option)]
    page = make_page(model, tokenizer, text, generate.stop_tokens(folder), name, given)
    Path(args.out or Path(__file__).with_name("explore.html")).write_text(page, encoding="utf-8")
