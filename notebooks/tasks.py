"""What a compressed cache is tested on: real text that goes on, and a needle in a haystack.

Each task is a prompt, whose cache a policy compresses, and tokens that follow it. How far are the model's
predictions of these from those with the full cache, and does it still know the answer?
"""

import inspect
import random
from bisect import bisect_left, bisect_right
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
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
    at = torch.arange(n_tokens, n_tokens + len(answer), device=prompt.device)
    for attn, hidden, keys, _ in record(model, torch.cat((prompt, prompt.new_tensor([answer])), dim=1)):
        queries = attn.queries(hidden[:, n_tokens:], at)
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
        # no cache is needed for the prompt's own prediction
        self.n_scored = min(n_answer, after.size(1) - 1)
        layers = record(model, torch.cat((prompt, after), dim=1))
        # each policy compresses these, without reading the prompt again
        self.layers = [
            (attn, hidden[:, :n_prompt], keys[:, :, :n_prompt], values[:, :, :n_prompt])
            for attn, hidden, keys, values in layers
        ]
        future = [hidden[:, n_prompt:] for _, hidden, _, _ in layers]
        positions = torch.arange(n_prompt, n_prompt + after.size(1), device=after.device)
        # of the true future queries to the prompt, each (1, H_kv, G * N, T)
        self.attention = [
            attention(attn.queries(hidden, positions), keys)
            for (attn, _, keys, _), hidden in zip(self.layers, future, strict=True)
        ]
        self.everything = [torch.ones_like(keys[..., 0], dtype=torch.bool) for _, _, keys, _ in self.layers]
        self.full = self.predict([self.everything])[0]

    def predict(self, variants: list[list[Tensor]]) -> Tensor:
        """Log probabilities (variants, n_scored, V) of the answer's tokens after variants of the prompt's
        cache: each is a list of keep masks, one a layer. They are read as one batch."""
        n = len(variants)
        cache = KVCache(self.model.config, n, self.after.size(1))
        for (attn, _, keys, values), *masks in zip(self.layers, *variants, strict=True):
            cache.fill(attn.layer, *(x.expand(n, -1, -1, -1) for x in (keys, values)), torch.cat(masks))
        cache.advance(self.n_prompt)
        logits = self.model(self.after[:, :-1].expand(n, -1), cache, all_logits=True)
        return logits[:, -self.n_scored :].float().log_softmax(dim=-1)

    def exact(self, log_probs: Tensor) -> bool:
        """Is each token of the answer the likeliest one? Then greedy decoding gives the answer word for
        word."""
        return bool((log_probs.argmax(dim=-1) == self.after[0, -self.n_scored :]).all())

    def test(self, variants: list[list[Tensor]]) -> list[dict[str, float]]:
        """Figures of each variant of the prompt's cache.

        exact  1 if greedy decoding gives the answer word for word, else 0
        kl     divergence from the full cache's predictions, nats per token
        """
        results = []
        # so many at a time: the weights are read once for all of them
        n = max(1, 512 // self.after.size(1))
        for part in (variants[i : i + n] for i in range(0, len(variants), n)):
            for log_probs in self.predict(part):
                kl = (self.full.exp() * (self.full - log_probs)).sum(dim=-1).mean().item()
                results.append({"exact": float(self.exact(log_probs)), "kl": kl})
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
    context = encode(tokenizer, texts[0], chat=False).to(model.norm.weight.device)
    question, answer = (
        context.new_tensor([tokenizer(text, add_special_tokens=False).input_ids]) for text in texts[1:]
    )
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


# Texts for evaluate.py alone: nothing in this repo was chosen on them. requirements.txt pins the packages
# they come from, so they are the same on every machine and in every Python


def docstrings() -> list[str]:
    """The docstrings of torch of more than 1,000 characters, in random order."""
    from torch import distributions, fft, linalg, nn, optim, sparse, special
    from torch.autograd import functional
    from torch.nn import init, utils
    from torch.optim import lr_scheduler
    from torch.utils import data

    spaces = (torch, Tensor, nn, nn.functional, init, utils, optim, lr_scheduler, distributions, linalg)
    spaces += (special, fft, sparse, functional, data)
    # Python's own, which torch imports, differ from Python to Python; kl_divergence gets its text when torch
    # is imported, in no fixed order
    found = {
        inspect.getdoc(x) or ""
        for space in spaces
        for name, x in vars(space).items()
        if name[0] != "_" and name != "kl_divergence" and not inspect.ismodule(x)
        if (getattr(x, "__module__", None) or "torch").startswith("torch")
    }
    longest = sorted(text for text in found if len(text) > 1000)
    return random.Random(0).sample(longest, len(longest))


def modules() -> dict[str, str]:
    """Modules of four packages that requirements.txt installs."""
    names = """
        transformers.generation.logits_process transformers.tokenization_utils_base transformers.trainer
        transformers.modeling_utils huggingface_hub.hf_api huggingface_hub.file_download gguf.gguf_writer
        _pytest.fixtures
    """
    return {name: Path(find_spec(name).origin).read_text("utf-8") for name in names.split()}


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


# Prompts for evaluate.py: needles, texts and code, and numbers of which one of three is asked for

KINDS = ("needle", "text", "code", "one of three")
# tokens by which a text goes on
N_NEXT = 64


def plan(lengths, n_needles: int, n_texts: int) -> list[tuple[int, str, int]]:
    """Length, kind and number of each prompt: so many needles, and of each other kind so many texts."""
    counts = dict(zip(KINDS, (n_needles, n_texts, n_texts, n_texts), strict=True))
    return [(length, kind, i) for length in lengths for kind, n in counts.items() for i in range(n)]


# notebook 4's
LENGTHS = (400, 1500, 4000, 8000)
PLAN = plan(LENGTHS[:3], 24, 8) + plan(LENGTHS[3:], 4, 4)


def prompts(tokenizer, asked=PLAN) -> list[tuple[Tensor, dict]]:
    """Of each prompt of a plan the tokens (T,), of which none is in two prompts, and its length, kind, number
    and seed. Raises ValueError where the texts end."""
    prose = [encode(tokenizer, "\n\n".join(docstrings()), chat=False)[0]]
    code = [encode(tokenizer, source, chat=False)[0] for source in modules().values()]
    found = {}
    # those of notebook 4 are cut first, so that they are the same whatever is asked for
    for key in dict.fromkeys(PLAN + asked):
        length, kind, number = key
        texts, n_tokens = (code if kind == "code" else prose), length + N_NEXT * (kind in ("text", "code"))
        place = number % len(texts)
        ids, texts[place] = texts[place][:n_tokens], texts[place][n_tokens:]
        if len(ids) < n_tokens:
            raise ValueError(f"no text is left for {kind} {number + 1} of {length} tokens: ask for less")
        about = {"length": length, "kind": kind, "number": number, "seed": len(found) + 1}
        found[key] = ids, about
    # so a stopped run has some of each kind
    return [found[key] for key in sorted(dict.fromkeys(asked), key=lambda key: (key[0], key[2]))]


def make_task(model: Llama, tokenizer, ids: Tensor, about: dict) -> Task:
    if about["kind"] in ("text", "code"):
        ids = ids[None].to(model.norm.weight.device)
        return Task(model, ids[:, : about["length"]], ids[:, about["length"] :], N_NEXT)
    page, n_others = tokenizer.decode(ids), 2 * (about["kind"] == "one of three")
    return recall(model, tokenizer, needle(about["seed"], page=page, n_others=n_others), question_after=True)
