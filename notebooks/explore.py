"""Beside the notebooks, a page to play with: what does a rule keep of a prompt? Writes explore.html.

python notebooks/explore.py                                       the built-in text and a question about it
python notebooks/explore.py --file notes.txt --question "Who?"    yours (and --model FOLDER --out page.html)

The prompt is read once, in float32 on the CPU. The page, explore.template.html, gets for each key the first
setting that keeps it. For six telling heads it gets what the rules look at, and is a gvote.py in JavaScript.
"""

import argparse
import base64
import gzip
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from wherever it is started

import torch

import generate
from gvote import GVote, PeakVotes, attention, current_query_mask, fit_gaussian, sample_queries, top_p_mask
from model import BLOCK, Llama
from tasks import entry, heads_that_read, place, record

TOP_P = [i / 100 for i in range(1, 101)]  # the settings on offer, in the order in which more is kept
BARS = [i / 1000 for i in range(200, -1, -1)]
N_SAMPLES, N_TELLING, NEW_TOKENS = 16, 6, 128  # new tokens: the command's cache has rows for as many
DEFAULTS = {"top_p": GVote.top_p, "n_samples": GVote.n_samples, "bar": PeakVotes.bar}
RULES = (GVote(), GVote(budget="current_query"), PeakVotes())


def look(attn, hidden, keys, values) -> tuple[list[torch.Tensor], list[list]]:
    """What the page gets of a layer: first settings, of GVote's rules (S, H_kv, T) and PeakVotes; and of each
    head what the rules look at, after the numbers of samples that this is for."""
    gaussian, n_tokens, numbers = fit_gaussian(hidden), keys.size(2), range(1, N_SAMPLES + 1)
    queries = (sample_queries(attn, *gaussian, n, n_tokens, GVote.seed) for n in numbers)
    probs = [attention(each, keys) for each in queries]  # (1, H_kv, G * S, T)
    current = attention(attn.queries(hidden[:, -1:], torch.tensor([n_tokens - 1])), keys)  # (1, H_kv, G, T)
    # times T / 400 beyond 400 tokens, to compare with a `bar`: (1, H_kv, T)
    score = PeakVotes().strongest_votes(attn, hidden, keys) * max(1, n_tokens / 400)
    entries = torch.cat([entry(x).amin(dim=2) for x in probs])
    by_nucleus = torch.bucketize(entries, torch.tensor(TOP_P[:-1]), right=True)
    ranks = (x.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) for x in probs)
    best = torch.cat([x.amin(dim=2) for x in ranks])
    votes = (current_query_mask(probs[0][:, :, :1], current, top_p) for top_p in TOP_P)
    by_size = sum((best >= vote.sum(dim=-1)).int() for vote in votes)  # all samples' votes are of one size
    by_bar = len(BARS) - torch.bucketize(score[0], torch.tensor(BARS[::-1]), right=True)
    # fewer samples are the first of the most, unless a small matrix product rounds differently
    rows = [x.unflatten(2, (-1, n)) for x, n in zip(probs, numbers, strict=True)]
    own = [n for n in numbers if n == N_SAMPLES or not torch.equal(rows[n - 1], rows[-1][:, :, :, :n])]
    given = [probs[n - 1] for n in own]  # where no top_p below 1 reaches, 0 will do, which gzip likes
    given = [x * (top_p_mask(x, 0.995) | current_query_mask(x, current, TOP_P[-2])) for x in given]
    heads = zip(*(x[0] for x in (*given, current, score)), strict=True)
    return [by_nucleus, by_size, by_bar], [[own, *head] for head in heads]


def make_page(model: Llama, tokenizer, text: str, stop: list[int], name=generate.DEFAULT, options=()) -> str:
    ids = generate.encode(tokenizer, text)
    first, heads = zip(*(look(*layer) for layer in record(model, ids)), strict=True)
    first, heads = [torch.cat(x, dim=-2).byte() for x in zip(*first, strict=True)], sum(heads, [])
    gvote = first[0][GVote.n_samples - 1] <= TOP_P.index(GVote.top_p)
    peak_votes = first[2] <= BARS.index(PeakVotes.bar)
    more = (peak_votes.sum(dim=-1) - gvote.sum(dim=-1)).argsort(descending=True)
    telling = {i: heads[i] for i in more[:N_TELLING].tolist()}
    first[:2] = [x.diff(dim=0, prepend=torch.zeros_like(x[:1])) for x in first[:2]]  # modulo 256, for gzip
    arrays = [x for _, *arrays in telling.values() for x in arrays] + first  # float32 first: so it is aligned
    packed = gzip.compress(b"".join(x.numpy().tobytes() for x in arrays), mtime=0)
    # a character of several tokens comes with the last; of the end of the chat template nothing is left over
    *words, _ = generate.pieces(tokenizer, ids[0].tolist())
    note = list(place(words, generate.NOTE))
    digits = [i for i in note if words[i].isdigit()]
    answers = [list(generate.generate(model, ids, NEW_TOKENS, rule, stop=stop)) for rule in (None, *RULES)]
    data = {
        "model": name, "options": options, "config": vars(model.config), "new_tokens": NEW_TOKENS,
        "top_p": TOP_P, "bar": BARS, "n_samples": N_SAMPLES, "defaults": DEFAULTS, "words": words,
        "note": note, "digits": digits, "answers": tokenizer.batch_decode(answers, skip_special_tokens=True),
        "readers": heads_that_read(model, ids, answers[0], digits),
        "arrays": base64.b64encode(packed).decode(),
        "telling": [{"head": i, "own": own} for i, (own, *_) in telling.items()], "block": BLOCK,
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
