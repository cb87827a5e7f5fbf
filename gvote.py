"""GVote: keep just the keys that future queries will need (Tang et al. 2025, arXiv 2509.03136).

After the prompt is read, its keys fill the cache. Only those that future queries attend to will matter.
Nobody knows these queries. But queries are projections of hidden states, and hidden states look much like
draws from a Gaussian. So GVote draws some, and lets each vote for the keys it needs. For one layer:

    1. fit_gaussian     mean and standard deviation of the prompt's hidden states, channel by channel
    2. sample_queries   draw hidden states, project and rotate them into queries at the next positions
    3. each of these queries votes for keys, by one of two rules:
       top_p_mask           this repo's default: for its own nucleus
       current_query_mask   the paper's rule: for its own n best keys, where n is how many keys there are in
                            the nucleus of the current query, which is the query of the prompt's last token
    4. GVote.__call__   each key/value head keeps the union: every key that got a vote

Nobody sets how many keys a head keeps: that number follows from the votes. All this was written from
summaries of the paper, not from the paper itself. `PeakVotes`, at the end, is a variant of ours.

Shapes: B prompts, T tokens, C channels; H query heads and H_kv key/value heads, each shared by a group of
G = H / H_kv query heads; D channels a head; S samples, so G * S of them vote on one key/value head's keys.
"""

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# A policy decides which keys a layer keeps of the prompt: keep = policy(attn, hidden, keys, values)
#   attn    the layer's attention module: attn.queries(hidden, positions) makes queries (B, H, N, D) of hidden
#           states (B, N, C), rotated to positions (N,); attn.layer is the layer's number
#   hidden  (B, T, C), what this attention read: the layer's input after its RMSNorm
#   keys    (B, H_kv, T, D), rotated; values (B, H_kv, T, D)
#   keep    (B, H_kv, T) bool, True where the key and its value stay; a head may keep none
Policy = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]

# A summary of the paper leaves the first tokens out of the statistics: they are sinks, which get much
# attention whatever their content. It does not say how many: StreamingLLM (arXiv 2309.17453) keeps 4 as
# sinks. They can be voted for like any other key.
N_SINK = 4

# of PeakVotes, at most
N_VOTERS = 512


def fit_gaussian(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Step 1: mean and standard deviation of hidden (B, T, C) over the tokens: both (B, C), float32.

    The first N_SINK tokens are left out, unless there are no others.
    """
    fitted = hidden[:, N_SINK:] if hidden.size(1) > N_SINK else hidden
    std, mean = torch.std_mean(fitted.float(), dim=1, correction=0)
    return mean, std


def layer_generator(attn: nn.Module, seed: int) -> torch.Generator:
    """A layer's own source of noise, on the CPU, so that the noise is the same on any device."""
    return torch.Generator("cpu").manual_seed((1000 * int(seed) + attn.layer) % 2**32)


def sample_queries(attn, mean: Tensor, std: Tensor, n_samples: int, position: int, seed: int) -> Tensor:
    """Step 2: S plausible future queries (B, H, S, D); sample s stands at `position` + s.

    Every layer has noise of its own. The prompts of a batch share it, so a prompt has the same samples alone
    as in a batch.
    """
    generator, shape = layer_generator(attn, seed), (n_samples, mean.size(-1))
    noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    hidden = mean[:, None] + std[:, None] * noise.to(mean.device)  # (B, S, C)
    positions = torch.arange(position, position + n_samples, device=mean.device)
    return attn.queries(hidden, positions)


def attention(queries: Tensor, keys: Tensor) -> Tensor:
    """N queries (B, H, N, D), all keys (B, H_kv, T, D) -> softmax(q K^T / sqrt(D)) (B, H_kv, G * N, T)."""
    queries = queries.unflatten(1, (keys.size(1), -1)).flatten(2, 3)  # (B, H_kv, G * N, D)
    return (queries.float() @ keys.float().mT / math.sqrt(keys.size(-1))).softmax(dim=-1)


def top_p_mask(probs: Tensor, top_p: float) -> Tensor:
    """Step 3, this repo's default: each query votes for its nucleus, the fewest keys that together hold at
    least `top_p` of its attention (Holtzman et al. 2020). probs (..., T) -> votes (..., T) bool.

    The key that crosses top_p is in, so a nucleus is never empty. Of keys with equal probability the earlier
    ones go first. top_p=1 votes for all, even those of probability zero.
    """
    if top_p == 1:
        return torch.ones_like(probs, dtype=torch.bool)
    ranked, order = probs.float().sort(dim=-1, descending=True, stable=True)
    held_by_better = ranked.cumsum(dim=-1) - ranked
    chosen = held_by_better < top_p
    # from the order of rank back to that of the keys
    return torch.empty_like(chosen).scatter_(-1, order, chosen)


def current_query_mask(probs: Tensor, current: Tensor, top_p: float) -> Tensor:
    """Step 3, the paper's rule: each query votes for its own n best keys, where n is the size of the current
    query's nucleus. probs (B, H_kv, G * S, T), and current (B, H_kv, G, T), its attention -> votes, bool.

    The current query is the query of the prompt's last token. The summaries do not mention query heads that
    share keys: each of the G heads has a current query, and n is the mean size of their nuclei, rounded up.
    """
    sizes = top_p_mask(current, top_p).sum(dim=-1)  # (B, H_kv, G)
    n_group = sizes.size(-1)
    n = (sizes.sum(dim=-1) + n_group - 1) // n_group  # (B, H_kv)
    order = probs.argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(probs.size(-1), device=probs.device)
    chosen = (rank < n[..., None, None]).expand_as(order)
    return torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, chosen)


@dataclass(frozen=True)
class GVote:
    """Step 4, and all of GVote as a `Policy`: a key stays if any of its head's G * S queries voted for it.

    budget="per_sample" (this repo's default) votes by `top_p_mask`, budget="current_query" (the paper's rule)
    by `current_query_mask`. top_p=0.95 and 8 samples are what the paper recommends for its rule.

    Raises ValueError, with the value, for invalid settings, and where hidden and keys do not fit each other.
    """

    top_p: float = 0.95
    n_samples: int = 8
    seed: int = 0
    budget: str = "per_sample"

    def __post_init__(self):
        # NaN fails the comparison; with a top_p that float32 rounds to 0, a nucleus would be empty
        least = torch.finfo(torch.float32).tiny
        if not (isinstance(self.top_p, numbers.Real) and least <= self.top_p <= 1):
            raise ValueError(f"top_p must be a number in (0, 1] in float32, got {self.top_p!r}")
        if not (isinstance(self.n_samples, numbers.Integral) and self.n_samples >= 1):
            raise ValueError(f"n_samples must be a whole number of at least 1, got {self.n_samples!r}")
        if not isinstance(self.seed, numbers.Integral):
            raise ValueError(f"seed must be a whole number, got {self.seed!r}")
        if self.budget not in ("per_sample", "current_query"):
            raise ValueError(f"budget must be 'per_sample' or 'current_query', got {self.budget!r}")

    def __call__(self, attn: nn.Module, hidden: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        dims_fit = hidden.dim() == 3 and keys.dim() == 4 and keys.numel() > 0
        if not (dims_fit and hidden.shape[:2] == (keys.size(0), keys.size(2))):
            expected = "(B, T, C) and (B, H_kv, T, D), not empty"
            found = f"{tuple(hidden.shape)} and {tuple(keys.shape)}"
            raise ValueError(f"hidden and keys must be {expected}, got {found}")
        n_tokens = hidden.size(1)
        mean, std = fit_gaussian(hidden)
        queries = sample_queries(attn, mean, std, self.n_samples, n_tokens, self.seed)
        probs = attention(queries, keys)  # (B, H_kv, G * S, T)
        if self.budget == "per_sample":
            votes = top_p_mask(probs, self.top_p)
        else:
            current = attn.queries(hidden[:, -1:], torch.tensor([n_tokens - 1], device=hidden.device))
            votes = current_query_mask(probs, attention(current, keys), self.top_p)
        return votes.any(dim=2)  # the union


@dataclass(frozen=True)
class PeakVotes:
    """A variant of ours, not the paper's: the prompt's own tokens vote, and a key's strongest vote counts.

    Hidden states of the prompt become queries at position T, as the next query would be; there is no causal
    mask, so each sees every key. Its vote for a key is the share of its attention that the key gets. A key
    stays if any vote for it reaches the bar, which is the same for all heads and layers.

    In a prompt of up to N_VOTERS tokens all of them vote. In a longer one only every step-th votes, so the
    time grows with T and not with its square. To make up for the tokens that are left out, each vote also
    counts for the keys less than `step` away, at a tenth of its size.

    The more keys there are, the less attention each gets. So a prompt of more than 400 tokens has a lower
    bar: bar * 400 / T. By default this is 10 / T, ten times what a key would get if all got the same. Raises
    ValueError, with the value, for a bar outside of [0, 0.5].
    """

    bar: float = 0.025

    def __post_init__(self):
        if not (isinstance(self.bar, numbers.Real) and 0 <= self.bar <= 0.5):
            raise ValueError(f"bar must be a number in [0, 0.5], a share of attention, got {self.bar!r}")

    def bar_for(self, n_tokens: int) -> float:
        """The bar for a prompt of so many tokens."""
        return self.bar * min(1, 400 / n_tokens)

    def strongest_votes(self, attn: nn.Module, hidden: Tensor, keys: Tensor) -> Tensor:
        """The strongest vote for each key: (B, H_kv, T), shares of attention."""
        n_tokens = hidden.size(1)
        # the last token votes, and every step-th before it
        step = math.ceil(n_tokens / N_VOTERS)
        voters = hidden[:, (n_tokens - 1) % step :: step]
        peak = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
        # some voters at a time: their votes take 1 MiB a query head, and more would be slower on a CPU
        for some in voters.split(max(1, 2**18 // n_tokens), dim=1):
            queries = attn.queries(some, torch.full((some.size(1),), n_tokens, device=keys.device))
            peak = peak.maximum(attention(queries, keys).amax(dim=2))
        nearby = nn.functional.max_pool1d(peak, 2 * step - 1, stride=1, padding=step - 1)
        return peak.maximum(nearby / 10)

    def __call__(self, attn: nn.Module, hidden: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.strongest_votes(attn, hidden, keys) >= self.bar_for(hidden.size(1))
