"""GVote's rivals, which are told how much to keep, and the oracle, which knows the future.

All are policies, as described at `Policy` in gvote.py: policy(attn, hidden, keys, values) -> keep mask (B, H_kv, T).

Where NVIDIA's kvpress has the same method, the settings are its defaults, and the tests compare the kept keys.
Letters for shapes as in gvote.py.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gvote import attention, layer_generator, top_p_mask


def keep_best(scores: Tensor, n_keep: int) -> Tensor:
    """The mask, bool, of the n_keep highest scores over the last dim."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(n_keep, dim=-1).indices, True)


def observed_attention(attn: nn.Module, hidden: Tensor, keys: Tensor, first: int, last: int) -> Tensor:
    """What the prompt's tokens first to last - 1 pay to the keys, by causal attention: (B, H_kv, G, tokens, T)."""
    positions = torch.arange(first, last, device=keys.device)
    queries = attn.queries(hidden[:, first:last], positions).unflatten(1, (keys.size(1), -1)).float()
    scores = queries @ keys[:, :, None].float().mT / math.sqrt(keys.size(-1))
    future = torch.arange(keys.size(2), device=keys.device) > positions[:, None]
    return scores.masked_fill(future, -math.inf).softmax(dim=-1)


@dataclass(frozen=True)
class FixedBudget:
    """Every head keeps the given share of its keys, those with the highest scores (B, H_kv, T)."""

    share: float

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share!r}")

    def n_keep(self, keys: Tensor) -> int:
        return int(self.share * keys.size(2))

    def scores(self, attn: nn.Module, hidden: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, attn: nn.Module, hidden: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return keep_best(self.scores(attn, hidden, keys, values), self.n_keep(keys))


@dataclass(frozen=True)
class Random(FixedBudget):
    """Any keys: what the others have to beat."""

    seed: int = 0

    def scores(self, attn, hidden, keys, values):
        return torch.rand(keys.shape[:3], generator=layer_generator(attn, self.seed)).to(keys.device)


class KeyNorm(FixedBudget):
    """The shortest keys, which tend to get the most attention (Devoto et al. 2024, arXiv 2406.11430)."""

    def scores(self, attn, hidden, keys, values):
        return -keys.norm(dim=-1)


@dataclass(frozen=True)
class StreamingLLM(FixedBudget):
    """The first tokens, on which attention rests, and the newest (Xiao et al. 2023, arXiv 2309.17453)."""

    n_sink: int = 4

    def scores(self, attn, hidden, keys, values):
        position = torch.arange(keys.size(2), device=keys.device)
        return position.where(position >= self.n_sink, keys.size(2)).float().expand(keys.shape[:3])


class H2O(FixedBudget):
    """Half of the budget for the newest tokens, half for the heavy hitters: the keys on which most attention has
    accumulated while the prompt was read (Zhang et al. 2023, arXiv 2306.14048)."""

    def scores(self, attn, hidden, keys, values):
        n_tokens, chunk = keys.size(2), 256  # a few rows of the T x T attention at a time
        parts = (observed_attention(attn, hidden, keys, i, min(i + chunk, n_tokens)) for i in range(0, n_tokens, chunk))
        total = sum(part.sum(dim=(2, 3)) for part in parts)
        total[:, :, n_tokens - self.n_keep(keys) // 2 :] = math.inf
        return total


@dataclass(frozen=True)
class SnapKV(FixedBudget):
    """What the last `window` tokens attend to, averaged over `kernel` neighbouring keys (Li et al. 2024, arXiv
    2404.14469). The window itself is kept."""

    window: int = 64
    kernel: int = 5

    def scores(self, attn, hidden, keys, values):
        n_tokens = keys.size(2)
        if n_tokens <= self.window:
            raise ValueError(f"SnapKV needs a prompt of more than window={self.window} tokens, got {n_tokens}")
        observed = observed_attention(attn, hidden, keys, n_tokens - self.window, n_tokens)
        scores = observed.mean(dim=(2, 3))[..., : -self.window]
        scores = F.avg_pool1d(scores, self.kernel, stride=1, padding=self.kernel // 2)
        return F.pad(scores, (0, self.window), value=math.inf)


@dataclass(frozen=True)
class ExpectedAttention(FixedBudget):
    """The attention expected from Gaussian queries at the next positions, in closed form, times the norm of the value
    (Devoto et al. 2025, arXiv 2510.00636). The first `n_sink` tokens are kept, and not fitted."""

    n_future: int = 512
    n_sink: int = 4

    def scores(self, attn, hidden, keys, values):
        n_tokens, dim = keys.shape[2:]
        unrotated = attn.queries(hidden, torch.zeros(n_tokens, device=keys.device)).float()  # position 0: no rotation
        future = torch.arange(n_tokens, n_tokens + self.n_future, device=keys.device)
        rotated = attn.queries(hidden[:, -1:].expand(-1, self.n_future, -1), future).float().mean(dim=2)
        # the average rotation is what happened to the last token's query; channel i turns with channel i + D/2
        before, after = (torch.complex(*q.chunk(2, dim=-1)) for q in (unrotated[:, :, -1], rotated))  # (B, H, D/2)
        turn = (after * before.conj()).sum(dim=(0, 1)) / before.abs().square().sum(dim=(0, 1))
        cos, sin = torch.diag(turn.real), torch.diag(turn.imag)
        unrotated = unrotated[:, :, self.n_sink :]  # (B, H, T - n_sink, D)
        mean = unrotated.mean(dim=2)
        centered = unrotated - mean[:, :, None]
        covariance = centered.mT @ centered / centered.size(2)  # (B, H, D, D)
        rotation = torch.cat((torch.cat((cos, -sin), dim=1), torch.cat((sin, cos), dim=1)))  # the average one, (D, D)
        mean, covariance = mean @ rotation.T, rotation @ covariance @ rotation.T

        k = keys[:, :, self.n_sink :].float().repeat_interleave(mean.size(1) // keys.size(1), dim=1)
        log = (k @ mean[..., None]).squeeze(-1) / math.sqrt(dim) + ((k @ covariance) * k).sum(dim=-1) / dim / 2
        expected = log.softmax(dim=-1).unflatten(1, (keys.size(1), -1)).mean(dim=2)  # (B, H_kv, T - n_sink)
        return F.pad(expected * values[:, :, self.n_sink :].norm(dim=-1), (self.n_sink, 0), value=math.inf)


@dataclass(frozen=True)
class AdaKV:
    """Another policy's scores, with its budget shared by the heads of a layer: the best keys of all heads together, but
    in each head at least `floor` of its own budget (Feng et al. 2024, arXiv 2407.11550)."""

    policy: FixedBudget
    floor: float = 0.2

    def __call__(self, attn: nn.Module, hidden: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        n_keep = self.policy.n_keep(keys)
        scores = self.policy.scores(attn, hidden, keys, values)
        safe = keep_best(scores, max(1, int(self.floor * n_keep)))
        scores = scores.masked_fill(safe, math.inf).flatten(1)  # (B, H_kv * T)
        return keep_best(scores, n_keep * keys.size(1)).view_as(safe)


@dataclass(frozen=True)
class Oracle:
    """GVote with perfect foresight: the true future queries select and unite, instead of sampled ones.

    future: hidden states (B, S, C) of each layer, of the S tokens that follow the prompt in the full-cache run.
    """

    future: list[Tensor]
    top_p: float = 0.95

    def __call__(self, attn: nn.Module, hidden: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        after = self.future[attn.layer]
        positions = torch.arange(keys.size(2), keys.size(2) + after.size(1), device=keys.device)
        return top_p_mask(attention(attn.queries(after, positions), keys), self.top_p).any(dim=2)
