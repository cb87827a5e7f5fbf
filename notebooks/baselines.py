"""GVote's rivals, which are told how much to keep, and the command of generate.py with all methods.

python notebooks/baselines.py --policy full gvote h2o:0.5 kvzip:0.25

All are policies, as described at `Policy` in gvote.py: policy(attn, hidden, keys, values) -> keep mask (B,
H_kv, T). Only KVzip has to read the prompt once before it can be one. Notebooks 4 and 5 measure them.

Where NVIDIA's kvpress has the same method, the settings are its defaults, and the tests compare the kept
keys. Every head keeps at least one key, however small the share. `METHODS`, at the end, lists the methods by
name. Letters for shapes as in gvote.py.
"""

import math
import signal
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

if __name__ == "__main__":
    # Ctrl-C shows no traceback, also while torch is being imported; SIGTERM removes temporary folders
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
# from wherever it is started
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import generate
from generate import POLICIES, render
from gvote import Policy, layer_generator
from model import KVCache, Llama


def keep_best(scores: Tensor, n_keep: int) -> Tensor:
    """The mask, bool, of the n_keep highest scores over the last dim."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(n_keep, dim=-1).indices, True)


def never_dropped(scores: Tensor, n: int) -> Tensor:
    """n scores above all others, falling: should the budget be smaller than n, it goes to the first of
    them."""
    return scores.amax() + torch.arange(n, 0, -1, device=scores.device)


def observed_attention(
    attn: nn.Module, hidden: Tensor, keys: Tensor, first: int, last: int, seen=None
) -> Tensor:
    """The attention that tokens first to last - 1 of a prompt pay to keys up to their own, or of these only
    to the ones marked in seen (T,): (B, H_kv, G, tokens, last)."""
    positions, keys = torch.arange(last, device=keys.device), keys[:, :, :last]
    queries = attn.queries(hidden[:, first:last], positions[first:]).unflatten(1, (keys.size(1), -1)).float()
    scores = queries @ keys[:, :, None].float().mT / math.sqrt(keys.size(-1))
    unseen = positions > positions[first:, None]
    if seen is not None:
        unseen |= ~seen[:last]
    return scores.masked_fill_(unseen, -math.inf).softmax(dim=-1)


def check_share(share: float):
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share!r}")


@dataclass(frozen=True)
class FixedBudget:
    """Every head keeps the given share of its keys, those with the highest scores (B, H_kv, T)."""

    share: float

    def __post_init__(self):
        check_share(self.share)

    def n_keep(self, keys: Tensor) -> int:
        return max(1, int(self.share * keys.size(2)))

    def scores(self, attn: nn.Module, hidden: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, attn: nn.Module, hidden: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return keep_best(self.scores(attn, hidden, keys, values), self.n_keep(keys))


@dataclass(frozen=True)
class Random(FixedBudget):
    """Any keys: what the others have to beat."""

    seed: int = 0

    def scores(self, attn, hidden, keys, values):
        generator = layer_generator(attn, self.seed)
        noise = torch.rand(keys.shape[:3], generator=generator, dtype=torch.float32, device="cpu")
        return noise.to(keys.device)


class KeyNorm(FixedBudget):
    """The shortest keys, which tend to get the most attention (Devoto et al. 2024, arXiv 2406.11430)."""

    def scores(self, attn, hidden, keys, values):
        return -keys.norm(dim=-1)


class KeyDiff(FixedBudget):
    """The keys least like their head's mean direction (Park et al. 2025, arXiv 2504.15364), in one piece."""

    def scores(self, attn, hidden, keys, values):
        return -F.cosine_similarity(keys, F.normalize(keys, dim=-1).mean(dim=2, keepdim=True), dim=-1)


@dataclass(frozen=True)
class StreamingLLM(FixedBudget):
    """The first tokens, on which attention rests, and the newest (Xiao et al. 2023, arXiv 2309.17453)."""

    n_sink: int = 4

    def scores(self, attn, hidden, keys, values):
        position = torch.arange(keys.size(2), device=keys.device)
        scores = position.where(position >= self.n_sink, 2 * keys.size(2) - position)
        return scores.float().expand(keys.shape[:3])


class H2O(FixedBudget):
    """Half of the budget for the newest tokens, half for the heavy hitters: the keys on which most attention
    has accumulated while the prompt was read (Zhang et al. 2023, arXiv 2306.14048)."""

    def scores(self, attn, hidden, keys, values):
        # a few rows of the T x T attention at a time
        n_tokens, chunk = keys.size(2), 256
        total = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
        for first in range(0, n_tokens, chunk):
            last = min(first + chunk, n_tokens)
            total[..., :last] += observed_attention(attn, hidden, keys, first, last).sum(dim=(2, 3))
        total[:, :, n_tokens - self.n_keep(keys) // 2 :] = math.inf
        return total


@dataclass(frozen=True)
class SnapKV(FixedBudget):
    """What the last `window` tokens attend to, averaged over `kernel` neighbouring keys (Li et al. 2024,
    arXiv 2404.14469). The window itself is kept, or the newest tokens of it, where the budget is smaller."""

    window: int = 64
    kernel: int = 5

    def __post_init__(self):
        super().__post_init__()
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, as it is centred on a key, got {self.kernel}")

    def scores(self, attn, hidden, keys, values):
        n_tokens = keys.size(2)
        if n_tokens <= self.window:
            return torch.arange(n_tokens, device=keys.device, dtype=torch.float32).expand(keys.shape[:3])
        observed = observed_attention(attn, hidden, keys, n_tokens - self.window, n_tokens)
        scores = observed.mean(dim=(2, 3))[..., : -self.window]
        scores = F.avg_pool1d(scores, self.kernel, stride=1, padding=self.kernel // 2)
        scores = F.pad(scores, (0, self.window))
        scores[..., -self.window :] = never_dropped(scores, self.window).flip(0)
        return scores


@dataclass(frozen=True)
class ExpectedAttention(FixedBudget):
    """The attention expected from Gaussian queries at the next positions, in closed form, times the norm of
    the value (Devoto et al. 2025, arXiv 2510.00636). The first `n_sink` tokens are kept, and not fitted."""

    n_future: int = 512
    n_sink: int = 4

    def scores(self, attn, hidden, keys, values):
        n_tokens, dim = keys.shape[2:]
        n_sink = min(self.n_sink, n_tokens - 1)
        # position 0: no rotation
        unrotated = attn.queries(hidden, torch.zeros(n_tokens, device=keys.device)).float()
        future = torch.arange(n_tokens, n_tokens + self.n_future, device=keys.device)
        rotated = attn.queries(hidden[:, -1:].expand(-1, self.n_future, -1), future).float().mean(dim=2)
        # the average rotation is what happened to the last token's query; channel i turns with i + D/2
        before, after = (torch.complex(*q.chunk(2, dim=-1)) for q in (unrotated[:, :, -1], rotated))
        turn = (after * before.conj()).sum(dim=(0, 1)) / before.abs().square().sum(dim=(0, 1))
        cos, sin = torch.diag(turn.real), torch.diag(turn.imag)
        unrotated = unrotated[:, :, n_sink:]  # (B, H, T - n_sink, D)
        mean = unrotated.mean(dim=2)
        centered = unrotated - mean[:, :, None]
        covariance = centered.mT @ centered / centered.size(2)  # (B, H, D, D)
        # the average one, (D, D)
        rotation = torch.cat((torch.cat((cos, -sin), dim=1), torch.cat((sin, cos), dim=1)))
        mean, covariance = mean @ rotation.T, rotation @ covariance @ rotation.T

        k = keys[:, :, n_sink:].float().repeat_interleave(mean.size(1) // keys.size(1), dim=1)
        log = (k @ mean[..., None]).squeeze(-1) / math.sqrt(dim)
        log = log + ((k @ covariance) * k).sum(dim=-1) / dim / 2
        expected = log.softmax(dim=-1).unflatten(1, (keys.size(1), -1)).mean(dim=2)  # (B, H_kv, T - n_sink)
        scores = F.pad(expected * values[:, :, n_sink:].norm(dim=-1), (n_sink, 0))
        scores[..., :n_sink] = never_dropped(scores, n_sink)
        return scores


@dataclass(frozen=True)
class AdaKV:
    """Another policy's scores, with its budget shared by the heads of a layer: the best keys of all heads
    together, but in each head at least `floor` of its own budget (Feng et al. 2024, arXiv 2407.11550)."""

    policy: FixedBudget
    floor: float = 0.2

    def __call__(self, attn: nn.Module, hidden: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        n_keep = self.policy.n_keep(keys)
        scores = self.policy.scores(attn, hidden, keys, values)
        safe = keep_best(scores, max(1, int(self.floor * n_keep)))
        scores = scores.masked_fill(safe, math.inf).flatten(1)
        return keep_best(scores, n_keep * keys.size(1)).view_as(safe)


def read_again(model: Llama, ids: Tensor, again: Tensor, start: int, end: int, n_sink: int) -> Tensor:
    """The largest attention that tokens `again` (B, N), read after prompts ids (B, T), pay to the prompts'
    keys from start to end: (layers, B, H_kv, end - start). Their softmax is over those, the first n_sink, and
    one another."""
    ids, n_tokens, scores = torch.cat((ids, again), dim=1), ids.size(1), []
    position = torch.arange(ids.size(1), device=ids.device)
    seen = (position < n_sink) | (position >= start) & (position < end) | (position >= n_tokens)

    def score(attn, hidden, keys, values):
        best = keys.new_zeros((*keys.shape[:2], end - start), dtype=torch.float32)
        for first in range(n_tokens, len(position), 256):
            paid = observed_attention(attn, hidden, keys, first, min(first + 256, len(position)), seen)
            best = best.maximum(paid[..., start:end].amax(dim=(2, 3)))
        scores.append(best)
        return torch.zeros_like(keys[..., 0], dtype=torch.bool)

    model(ids, KVCache(model.config, len(ids), max_new_tokens=0), score)
    return torch.stack(scores)


def requests(model: Llama, tokenizer, ids: Tensor, chunk: int = 2048) -> list[tuple[int, Tensor]]:
    """What the model reads after prompts ids (B, T), to repeat them chunk by chunk: where a chunk starts, and
    tokens (B, N): a request, the beginning of the model's turn, and the chunk. Raises ValueError if that
    exceeds its context.
    """

    def encode(text):
        return ids.new_tensor(tokenizer(text, add_special_tokens=False).input_ids).expand(len(ids), -1)

    template = render(tokenizer, "<<prompt>>") if tokenizer.chat_template else "<<prompt>>\n"
    turn, parts = encode(template.partition("<<prompt>>")[2]), []
    for start in range(0, ids.size(1), chunk):
        if start == 0:
            request = encode("\n\nRepeat the previous context exactly.")
        else:
            # its last words say where
            request = encode("\n\nRepeat the part of the previous context exactly, starting with")
            request = torch.cat((request, ids[:, start - 8 : start]), dim=1)
        parts.append((start, torch.cat((request, turn, ids[:, start : start + chunk]), dim=1)))
    longest, context = ids.size(1) + max(again.size(1) for _, again in parts), model.config.context_length
    if longest > context:
        excess = f"{longest} tokens exceed the model's context of {context}"
        raise ValueError(f"KVzip reads the prompt twice: {excess}")
    return parts


def second_reading(model: Llama, tokenizer, ids: Tensor, n_sink: int = 4, chunk: int = 2048) -> Tensor:
    """What KVzip scores keys by: the largest attention that each gets, in any layer and head, while the model
    reads prompts ids (B, T) once more, chunk by chunk, after a request to repeat them. (layers, B, H_kv, T)

    Short code, not fast: every chunk is read after a prompt that is read anew. With one chunk that costs
    nothing extra.
    """
    scores = []
    for start, again in requests(model, tokenizer, ids, chunk):
        end = min(start + chunk, ids.size(1))
        scores.append(read_again(model, ids, again, start, end, n_sink))
    return torch.cat(scores, dim=-1)


@dataclass(frozen=True)
class KVzip:
    """The keys to which most attention is paid while the model repeats the prompt; the best of all layers and
    heads together, and the first `n_sink` (Kim et al. 2025, arXiv 2505.23416).

    No policy, as it reads the prompt twice, with the whole cache in memory, before any layer can drop a key:
    `for_prompt` makes one (see `prepare` in generate.py).
    """

    share: float
    n_sink: int = 4

    def __post_init__(self):
        check_share(self.share)

    def masks(self, model: Llama, tokenizer, ids: Tensor) -> Tensor:
        """What each layer keeps of prompts ids (B, T): (layers, B, H_kv, T) bool."""
        scores = second_reading(model, tokenizer, ids, self.n_sink).transpose(0, 1)  # (B, layers, H_kv, T)
        scores[..., : self.n_sink] = never_dropped(scores, self.n_sink)[: scores.size(-1)]
        n_keep = max(scores[0, ..., 0].numel(), int(self.share * scores[0].numel()))
        return keep_best(scores.flatten(1), n_keep).view_as(scores).transpose(0, 1)

    def for_prompt(self, model: Llama, tokenizer, ids: Tensor) -> Policy:
        """The policy for prompts ids, which are read once more when the first layer asks. Raises ValueError,
        at once, if the context has no room for that."""
        requests(model, tokenizer, ids)
        masks = cache(lambda: self.masks(model, tokenizer, ids))
        return lambda attn, hidden, keys, values: masks()[attn.layer]


# those of generate.py, and others, which are made from the share of keys to keep
METHODS = POLICIES | {
    "kvzip": KVzip,
    "h2o": H2O,
    "expected_attention": ExpectedAttention,
    "snapkv": SnapKV,
    "adakv_snapkv": lambda share: AdaKV(SnapKV(share)),
    "streaming_llm": StreamingLLM,
    "key_norm": KeyNorm,
    "key_diff": KeyDiff,
    "random": Random,
}

if __name__ == "__main__":
    generate.POLICIES.update(METHODS)
    generate.command()
