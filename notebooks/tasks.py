"""What a compressed cache is tested on: real text that goes on, a needle in a haystack, a pattern with
examples.

Each task is a prompt, whose cache a policy compresses, and tokens that follow it. How far are the model's
predictions of these from those with the full cache, and does it still know the answer?
"""

import inspect
import random
from bisect import bisect_left, bisect_right
from itertools import accumulate
from pydoc_data.topics import topics

import torch
from torch import Tensor

from generate import encode
from gvote import GVote, attention, fit_gaussian, sample_queries
from model import KVCache, Llama, keep_all

THINGS = (
    "apple river candle forest window garden planet mirror bottle castle dragon engine feather guitar "
    "hammer island jacket kettle ladder magnet needle orange pencil rabbit saddle temple violin "
    "walnut zebra basket button carpet"
).split()
NAMES = (
    "Anna Ben Clara David Emma Frank Grace Henry Isabel Jack Kate Leo Mary Nora Oscar Paul Rosa Sam Tina"
).split()


def record(model: Llama, ids: Tensor) -> list[tuple]:
    """Reads prompts ids (B, T) and returns (attn, hidden, keys, values) of each layer: what a policy is
    given."""
    layers = []

    def look(*layer):
        layers.append(layer)
        return keep_all(*layer)

    model(ids, KVCache(model.config, len(ids)), look)
    return layers


def place(words: list[str], passage: str) -> range:
    """The numbers of a passage's tokens in a text of tokens with these words: none where there is no such."""
    start, ends = "".join(words).find(passage), list(accumulate(map(len, words)))
    return range(bisect_right(ends, start), bisect_left(ends, start + len(passage)) + 1 if start >= 0 else 0)


def heads_that_read(model: Llama, prompt: Tensor, answer: list[int], positions: list[int]) -> list[int]:
    """The heads, numbered through all layers, in which a token of the answer pays more than half of its
    attention to the prompt (1, T) to the keys at these positions."""
    n_tokens, paid = prompt.size(1), []
    for attn, hidden, keys, _ in record(model, torch.cat((prompt, torch.tensor([answer])), dim=1)):
        queries = attn.queries(hidden[:, n_tokens:], n_tokens + torch.arange(len(answer)))
        probs = attention(queries, keys[:, :, :n_tokens])[0]  # (H_kv, G * N, T)
        paid.append(probs[..., positions].sum(dim=-1).amax(dim=-1))
    return (torch.cat(paid) > 0.5).nonzero().flatten().tolist()


class Task:
    """A prompt (1, T), and the tokens after it (1, N), whose last n_answer are the answer.

    The prompt is read once; `test` compresses its cache, in several ways, and reads the other tokens on top
    of each.
    """

    def __init__(self, model: Llama, prompt: Tensor, after: Tensor, n_answer: int):
        n_prompt = prompt.size(1)
        self.model, self.prompt, self.n_prompt, self.after = model, prompt, n_prompt, after
        self.n_scored = min(n_answer, after.size(1) - 1)  # no cache is needed for the prompt's own prediction
        layers = record(model, torch.cat((prompt, after), dim=1))
        self.layers = [  # each policy compresses these, without reading the prompt again
            (attn, hidden[:, :n_prompt], keys[:, :, :n_prompt], values[:, :, :n_prompt])
            for attn, hidden, keys, values in layers
        ]
        future = [hidden[:, n_prompt:] for _, hidden, _, _ in layers]
        positions = torch.arange(n_prompt, n_prompt + after.size(1), device=after.device)
        self.attention = [  # of the true future queries to the prompt, each (1, H_kv, G * N, T)
            attention(attn.queries(hidden, positions), keys)
            for (attn, _, keys, _), hidden in zip(self.layers, future, strict=True)
        ]
        self.everything = [torch.ones_like(keys[..., 0], dtype=torch.bool) for _, _, keys, _ in self.layers]
        self.full = self.predict([self.everything])[0]

    def predict(self, variants: list[list[Tensor]]) -> Tensor:
        """Log probabilities (variants, n_scored, V) of the answer's tokens after variants of the prompt's
        cache: each is a list of keep masks, one a layer. They are read as one batch."""
        cache = KVCache(self.model.config, len(variants), self.after.size(1))
        for (attn, _, keys, values), *masks in zip(self.layers, *variants, strict=True):
            cache.fill(
                attn.layer, *(x.expand(len(masks), -1, -1, -1) for x in (keys, values)), torch.cat(masks)
            )
        cache.advance(self.n_prompt)
        logits = self.model(self.after[:, :-1].expand(len(variants), -1), cache, all_logits=True)[
            :, -self.n_scored :
        ]
        return logits.float().log_softmax(dim=-1)

    def exact(self, log_probs: Tensor) -> bool:
        """Is each token of the answer the likeliest one? Then greedy decoding gives the answer word for
        word."""
        return bool((log_probs.argmax(dim=-1) == self.after[0, -self.n_scored :]).all())

    def test(self, variants: list[list[Tensor]]) -> list[dict[str, float]]:
        """Figures of each variant of the prompt's cache.

        exact  1 if greedy decoding gives the answer word for word, else 0
        kl     divergence from the full cache's predictions, nats per token
        held   share of the true future queries' attention to the prompt that falls on kept keys, mean of all
        heads
        """
        results, paid = [], torch.cat([true.mean(dim=2) for true in self.attention])  # (layers, H_kv, T)
        n = max(1, 512 // self.after.size(1))  # so many at a time: the weights are read once for all of them
        for part in (variants[i : i + n] for i in range(0, len(variants), n)):
            for masks, log_probs in zip(part, self.predict(part), strict=True):
                kl = (self.full.exp() * (self.full - log_probs)).sum(dim=-1).mean().item()
                held = (paid * torch.cat(masks)).sum(dim=-1).mean().item()
                results.append({"exact": float(self.exact(log_probs)), "kl": kl, "held": held})
        return results


def entry(probs: Tensor) -> Tensor:
    """The top_p at which each key enters the nucleus over the last dim: what the better keys hold together.

    So `entry(probs) < top_p` is `top_p_mask(probs, top_p)`, for every top_p below 1 at once.
    """
    ranked, order = probs.float().sort(dim=-1, descending=True, stable=True)
    mass_before = ranked.cumsum(dim=-1) - ranked
    return torch.empty_like(mass_before).scatter_(-1, order, mass_before)


def gvote_entry(layer: tuple, policy: GVote, gaussian: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The top_p from which on GVote, with its other settings as in policy, keeps each key: (1, H_kv, T).

    So `gvote_entry(layer, policy) < policy.top_p` is `policy(*layer)`. layer: what a policy is given.
    gaussian: a mean and a standard deviation to sample from, if not those of this prompt.
    """
    attn, hidden, keys, _ = layer
    n_tokens = hidden.size(1)
    mean, std = gaussian or fit_gaussian(hidden)
    samples = sample_queries(attn, mean, std, policy.n_samples, n_tokens, policy.seed)
    probs = attention(samples, keys)  # (1, H_kv, G * S, T)
    if policy.budget == "per_sample":
        return entry(probs).amin(dim=2)
    current = attn.queries(hidden[:, -1:], torch.tensor([n_tokens - 1], device=hidden.device))
    nuclei = entry(attention(current, keys))  # (1, H_kv, G, T)
    rank = probs.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1).amin(dim=2)
    # the mean size of the G nuclei exceeds a rank once they hold more than G times as many keys together
    return nuclei.flatten(2).sort(dim=-1).values.gather(-1, nuclei.size(2) * rank)


def keep_share(entries: list[Tensor], share: float) -> list[Tensor]:
    """The keep masks of all layers, at one top_p that keeps this share of all keys; entries: by layer, of
    `entry`."""
    flat = torch.cat([layer.flatten() for layer in entries])
    top_p = flat.kthvalue(int(share * len(flat))).values
    return [layer <= top_p for layer in entries]


def continuation(model: Llama, tokenizer, text: str, n_prompt: int = 768, n_next: int = 64) -> Task:
    """A text cut after n_prompt tokens; the answer is how it goes on. Raises ValueError if the text is too
    short."""
    ids = encode(tokenizer, text, chat=False)[:, : n_prompt + n_next].to(model.norm.weight.device)
    if ids.size(1) < n_prompt + n_next:
        raise ValueError(f"the text has {ids.size(1)} tokens, {n_prompt + n_next} are needed")
    return Task(model, ids[:, :n_prompt], ids[:, n_prompt:], n_next)


def recall(model: Llama, tokenizer, texts: tuple[str, str, str], question_after: bool) -> Task:
    """(context, question, answer) as a task. Is the question in the compressed prompt, or read after it?"""
    context = encode(tokenizer, texts[0], chat=False)
    question, answer = (
        tokenizer(t, add_special_tokens=False, return_tensors="pt").input_ids for t in texts[1:]
    )
    context, question, answer = (ids.to(model.norm.weight.device) for ids in (context, question, answer))
    if question_after:
        return Task(model, context, torch.cat((question, answer), dim=1), answer.size(1))
    return Task(model, torch.cat((context, question), dim=1), answer, answer.size(1))


# Texts that go on


def prose() -> dict[str, str]:
    """Pages of the Python language reference, in every Python."""
    return {name: topics[name] for name in ("import", "compound", "specialnames", "objects", "formatstrings")}


def code() -> dict[str, str]:
    """Modules of Python's standard library."""
    import argparse
    import datetime
    import difflib
    import tarfile
    import textwrap

    return {
        module.__name__: inspect.getsource(module)
        for module in (argparse, datetime, difflib, tarfile, textwrap)
    }


# Texts for the tables at three lengths (lengths.py) alone: nothing in this repo was chosen on them


def docstrings() -> list[str]:
    """The docstrings of NumPy and pyplot of more than 3,000 characters, in random order."""
    import matplotlib.pyplot as plt
    import numpy as np

    spaces = (np, np.linalg, np.random, plt)
    found = {inspect.getdoc(x) or "" for space in spaces for name, x in vars(space).items() if name[0] != "_"}
    return random.Random(0).sample(
        longest := sorted(text for text in found if len(text) > 3000), len(longest)
    )


def modules() -> dict[str, str]:
    """Modules of four packages that requirements.txt installs."""
    import gguf.vocab
    import jinja2.compiler
    import matplotlib.font_manager
    import tqdm.std

    found = (gguf.vocab, jinja2.compiler, matplotlib.font_manager, tqdm.std)
    return {module.__name__: inspect.getsource(module) for module in found}


# Tasks with an answer: each takes a seed, and returns (context, question, answer)


def needle(seed: int, n_chars: int = 1600, page: str = "", n_others: int = 0) -> tuple[str, str, str]:
    """Seven digits in a haystack (RULER's niah_single, arXiv 2404.06654): in n_chars of the Python language
    reference, or in a page. n_others more numbers, of other things, are in it too (niah_multikey)."""
    rng = random.Random(seed)
    thing, digits = rng.choice(THINGS), "".join(rng.choices("0123456789", k=7))
    if not page:
        page = rng.choice([topic for topic in sorted(topics.values()) if len(topic) > 2 * n_chars])
        start = rng.randrange(len(page) - n_chars)
        page = page[start : start + n_chars]
    lines = page.split("\n")
    hide = "The special magic number for {} is {}.".format
    lines.insert(rng.randrange(1, len(lines)), hide(thing, digits))
    for other in rng.sample([name for name in THINGS if name != thing], n_others):
        lines.insert(rng.randrange(1, len(lines)), hide(other, "".join(rng.choices("0123456789", k=7))))
    return "\n".join(lines), f"\n\nThe special magic number for {thing} is", f" {digits}."


def pattern(seed: int) -> tuple[str, str, str]:
    """Thirty examples of a rewriting, and a new case."""
    rng = random.Random(seed)
    pairs = [(rng.choice(NAMES), rng.choice(THINGS)) for _ in range(31)]
    lines = [f"{name} likes the {thing}. -> The {thing} is liked by {name}." for name, thing in pairs]
    question, answer = lines.pop().split(" ->")
    return "\n".join(lines), f"\n{question} ->", answer
