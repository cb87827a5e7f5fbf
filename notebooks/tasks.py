"""What a compressed cache is tested on.

Continuation: the cache of a prompt is compressed, and the text goes on. How far are the model's predictions of each
next token from those with the full cache?
"""

import inspect

import torch
from torch import Tensor

from generate import Tokenizer
from gvote import Policy, attention
from model import KVCache, Llama
from plots import record


def prose() -> dict[str, str]:
    """Pages of the Python language reference, in every Python."""
    from pydoc_data.topics import topics

    return {name: topics[name] for name in ("import", "compound", "specialnames", "objects", "formatstrings")}


def code() -> dict[str, str]:
    """Modules of Python's standard library."""
    import argparse
    import datetime
    import difflib
    import tarfile
    import textwrap

    return {module.__name__: inspect.getsource(module) for module in (argparse, datetime, difflib, tarfile, textwrap)}


class Continuation:
    """One text, cut after n_prompt tokens; `test` compresses the cache of these and reads the n_next tokens after them.

    Raises ValueError if the text is too short.
    """

    def __init__(self, model: Llama, tokenizer: Tokenizer, text: str, n_prompt: int = 768, n_next: int = 128):
        ids = tokenizer.encode(text, chat=False)[:, : n_prompt + n_next].to(model.norm.weight.device)
        if ids.size(1) < n_prompt + n_next:
            raise ValueError(f"the text has {ids.size(1)} tokens, {n_prompt + n_next} are needed")
        self.model, self.n_prompt, self.next_ids = model, n_prompt, ids[0, n_prompt:]
        self.layers = record(model, ids[:, :n_prompt])  # each policy compresses these, without reading the prompt again
        self.future = [hidden[:, n_prompt:] for _, hidden, _, _ in record(model, ids)]
        positions = torch.arange(n_prompt, n_prompt + n_next, device=ids.device)
        self.attention = [  # of the true future queries to the prompt, each (1, H_kv, G * n_next, T)
            attention(attn.queries(after, positions), keys)
            for (attn, _, keys, _), after in zip(self.layers, self.future, strict=True)
        ]
        everything = [torch.ones_like(keys[..., 0], dtype=torch.bool) for _, _, keys, _ in self.layers]
        self.full, self.full_bytes = self.predict(everything)

    def predict(self, masks: list[Tensor]) -> tuple[Tensor, int]:
        """Log probabilities (n_next - 1, V) of all next tokens but the first, and the bytes of the prompt's cache."""
        cache = KVCache(self.model.config, max_new_tokens=0)
        for (attn, _, keys, values), keep in zip(self.layers, masks, strict=True):
            cache.store(attn.layer, keys, values, keep)
        cache.length = cache.prompt_length = self.n_prompt
        nbytes = cache.nbytes
        logits = self.model(self.next_ids[None, :-1], cache, all_logits=True)[0]
        return logits.float().log_softmax(dim=-1), nbytes

    def test(self, policy: Policy) -> dict[str, float]:
        """Figures of one policy on this text.

        kept        share of the full cache's bytes that the prompt's cache takes
        kl          divergence from the full cache's predictions, nats per token
        nll         of the text, nats per token
        agree       share of tokens where the likeliest next token is that of the full cache
        held        share of the true future queries' attention to the prompt that falls on kept keys
        held_worst  the same, of the head where it is least
        """
        masks = [policy(*layer) for layer in self.layers]
        log_probs, nbytes = self.predict(masks)
        held = []
        for true, keep in zip(self.attention, masks, strict=True):
            held.append((true @ keep[..., None].float()).mean(dim=(0, 2, 3)))
        held = torch.stack(held)  # (layers, H_kv)
        return {
            "kept": nbytes / self.full_bytes,
            "kl": (self.full.exp() * (self.full - log_probs)).sum(dim=-1).mean().item(),
            "nll": -log_probs.gather(1, self.next_ids[1:, None]).mean().item(),
            "agree": (log_probs.argmax(dim=-1) == self.full.argmax(dim=-1)).float().mean().item(),
            "held": held.mean().item(),
            "held_worst": held.min().item(),
        }
