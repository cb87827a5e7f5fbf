"""What a compressed cache is tested on: real text that goes on, needles in a haystack, patterns with examples.

Each task is a prompt, whose cache a policy compresses, and tokens that follow it. How far are the model's predictions
of these from those with the full cache, and does it still know the answer?
"""

import hashlib
import inspect
import random
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

from generate import Tokenizer
from gvote import Policy, attention
from model import KVCache, Llama
from plots import record

THINGS = (
    "apple river candle forest window garden planet mirror bottle castle dragon engine feather guitar hammer island "
    "jacket kettle ladder magnet needle orange pencil rabbit saddle temple violin walnut zebra basket button carpet"
).split()
NAMES = "Anna Ben Clara David Emma Frank Grace Henry Isabel Jack Kate Leo Mary Nora Oscar Paul Rosa Sam Tina".split()


class Task:
    """A prompt (1, T), and the tokens after it (1, N), whose last n_answer are the answer.

    The prompt is read once; `test` compresses its cache by a policy, and reads the other tokens on top of it.
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
        self.future = [hidden[:, n_prompt:] for _, hidden, _, _ in layers]
        positions = torch.arange(n_prompt, n_prompt + after.size(1), device=after.device)
        self.attention = [  # of the true future queries to the prompt, each (1, H_kv, G * N, T)
            attention(attn.queries(future, positions), keys)
            for (attn, _, keys, _), future in zip(self.layers, self.future, strict=True)
        ]
        everything = [torch.ones_like(keys[..., 0], dtype=torch.bool) for _, _, keys, _ in self.layers]
        self.full, self.full_bytes = self.predict(everything)

    def predict(self, masks: list[Tensor]) -> tuple[Tensor, int]:
        """Log probabilities (n_scored, V) of the answer's tokens, and the bytes of the prompt's cache."""
        cache = KVCache(self.model.config, max_new_tokens=0)
        for (attn, _, keys, values), keep in zip(self.layers, masks, strict=True):
            cache.fill(attn.layer, keys, values, keep)
        cache.advance(self.n_prompt)
        nbytes = cache.nbytes
        logits = self.model(self.after[:, :-1], cache, all_logits=True)[0, -self.n_scored :]
        return logits.float().log_softmax(dim=-1), nbytes

    def exact(self, log_probs: Tensor) -> bool:
        """Is each token of the answer the likeliest one? Then greedy decoding gives the answer word for word."""
        return bool((log_probs.argmax(dim=-1) == self.after[0, -self.n_scored :]).all())

    def test(self, policy: Policy) -> dict[str, float | Tensor]:
        """Figures of one policy.

        kept   share of the full cache's bytes that the prompt's cache takes
        exact  1 if greedy decoding gives the answer word for word, else 0
        kl     divergence from the full cache's predictions, nats per token
        held   (layers, H_kv), share of the true future queries' attention to the prompt that falls on kept keys
        """
        masks = [policy(*layer) for layer in self.layers]
        log_probs, nbytes = self.predict(masks)
        return {
            "kept": nbytes / self.full_bytes,
            "exact": float(self.exact(log_probs)),
            "kl": (self.full.exp() * (self.full - log_probs)).sum(dim=-1).mean().item(),
            "held": torch.stack(
                [
                    (true @ keep[..., None].float()).mean(dim=(0, 2, 3))
                    for true, keep in zip(self.attention, masks, strict=True)
                ]
            ),
        }


def entry(probs: Tensor) -> Tensor:
    """The top_p at which each key enters the nucleus over the last dim: what the better keys hold together.

    So `entry(probs) < top_p` is `top_p_mask(probs, top_p)`, for every top_p below 1 at once.
    """
    ranked, order = probs.float().sort(dim=-1, descending=True, stable=True)
    mass_before = ranked.cumsum(dim=-1) - ranked
    return torch.empty_like(mass_before).scatter_(-1, order, mass_before)


def keep_share(entries: list[Tensor], share: float) -> list[Tensor]:
    """The keep masks of all layers, at one top_p that keeps this share of all keys; entries: by layer, of `entry`."""
    flat = torch.cat([layer.flatten() for layer in entries])
    top_p = flat.kthvalue(int(share * len(flat))).values
    return [layer <= top_p for layer in entries]


def remember(name: str, compute: Callable, *recipe):
    """compute()'s result, saved in notebooks/results under the name and a fingerprint of its recipe: the functions,
    modules (their source) and settings (their repr) that it comes from. Where one of them changed, it is made anew."""
    text = "\n".join(
        inspect.getsource(x) if inspect.isroutine(x) or inspect.ismodule(x) or inspect.isclass(x) else repr(x)
        for x in recipe
    )
    file = Path("notebooks/results") / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.pt"
    if not file.exists():
        result = compute()
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(result, file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)
    return torch.load(file)


def continuation(model: Llama, tokenizer: Tokenizer, text: str, n_prompt: int = 768, n_next: int = 128) -> Task:
    """A text cut after n_prompt tokens; the answer is how it goes on. Raises ValueError if the text is too short."""
    ids = tokenizer.encode(text, chat=False)[:, : n_prompt + n_next].to(model.norm.weight.device)
    if ids.size(1) < n_prompt + n_next:
        raise ValueError(f"the text has {ids.size(1)} tokens, {n_prompt + n_next} are needed")
    return Task(model, ids[:, :n_prompt], ids[:, n_prompt:], n_next)


def recall(model: Llama, tokenizer: Tokenizer, texts: tuple[str, str, str], question_after: bool) -> Task:
    """(context, question, answer) as a task. Is the question in the compressed prompt, or read after it?"""
    context, question, answer = (tokenizer.encode(text, chat=False).to(model.norm.weight.device) for text in texts)
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

    return {module.__name__: inspect.getsource(module) for module in (argparse, datetime, difflib, tarfile, textwrap)}


# Tasks with an answer: each takes a seed, and returns (context, question, answer)


def hide(rng: random.Random, facts: list[str], n_chars: int = 1600) -> str:
    """Puts the facts, in their order, between lines of n_chars from a page of the Python language reference."""
    page = rng.choice([topic for topic in sorted(topics.values()) if len(topic) > 2 * n_chars])
    start = rng.randrange(len(page) - n_chars)
    lines = page[start : start + n_chars].split("\n")
    for fact, at in zip(facts[::-1], sorted(rng.sample(range(1, len(lines)), len(facts)), reverse=True), strict=True):
        lines.insert(at, fact)
    return "\n".join(lines)


def number(rng: random.Random, n_digits: int) -> str:
    return "".join(rng.choices("0123456789", k=n_digits))


def needle(seed: int, n_needles: int = 1, n_chars: int = 1600) -> tuple[str, str, str]:
    """Seven digits in a haystack (as RULER's niah_single and, with more needles, niah_multikey; arXiv 2404.06654)."""
    rng = random.Random(seed)
    numbers = {thing: number(rng, 7) for thing in rng.sample(THINGS, n_needles)}
    facts = [f"The special magic number for {thing} is {digits}." for thing, digits in numbers.items()]
    thing, digits = rng.choice(list(numbers.items()))
    return hide(rng, facts, n_chars), f"\n\nThe special magic number for {thing} is", f" {digits}."


def needles(seed: int) -> tuple[str, str, str]:
    """Four needles, one of them asked for."""
    return needle(seed, 4)


def pattern(seed: int) -> tuple[str, str, str]:
    """Thirty examples of a rewriting, and a new case."""
    rng = random.Random(seed)
    pairs = [(rng.choice(NAMES), rng.choice(THINGS)) for _ in range(31)]
    lines = [f"{name} likes the {thing}. -> The {thing} is liked by {name}." for name, thing in pairs]
    question, answer = lines.pop().split(" ->")
    return "\n".join(lines), f"\n{question} ->", answer


def table(seed: int) -> tuple[str, str, str]:
    """Key-value recall: twenty pairs, one of them asked for."""
    rng = random.Random(seed)
    pairs = [f'"{thing}": "{number(rng, 4)}"' for thing in rng.sample(THINGS, 20)]
    key, value = rng.choice(pairs).split(' "')
    return "\n".join(pairs), f"\n\n{key}", f' "{value}'


def variables(seed: int) -> tuple[str, str, str]:
    """Variable tracking in a haystack (as RULER's vt): a value, and a name that refers to another one."""
    rng = random.Random(seed)
    (first, second), value = rng.sample(THINGS, 2), number(rng, 5)
    facts = [f"The value of {first} is {value}.", f"The value of {second} is the value of {first}."]
    return hide(rng, facts), f"\n\nThe value of {second} is the value of {first}, which is", f" {value}."
