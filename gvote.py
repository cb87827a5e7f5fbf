"""GVote: keep just the keys that future queries will need (Tang et al. 2025, arXiv 2509.03136).

After the prompt is read, its keys fill the cache. The ones that matter are those that future queries will attend to.
Nobody knows these queries; but queries are projections of hidden states, and hidden states look much like draws from a
Gaussian. So draw some, let each select the keys it needs, and keep every key that got a vote. For one layer:

    1. fit_gaussian     mean and standard deviation of the prompt's hidden states, channel by channel
    2. sample_queries   draw hidden states, project and rotate them into queries at the next positions
    3. top_p_mask       each query selects its nucleus: the fewest keys that hold at least `top_p` of its attention
    4. GVote            each key/value head keeps the union of what its samples selected

How many keys a head keeps is set nowhere: it is what comes out. In the paper's own step 3 all samples of a head select
equally many keys: budget="current_query", see `GVote`. `PeakVotes`, below, is a variant of ours.

Shapes: B prompts, T tokens, C channels; H query heads and H_kv key/value heads, each shared by a group of G = H / H_kv
query heads; D channels a head; S samples, so G * S of them vote on the keys of one key/value head.
"""

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A policy decides which keys a layer keeps once it has read the prompt: keep = policy(attn, hidden, keys, values)
#   attn    the layer's attention module: attn.queries(hidden, positions) projects hidden states (B, N, C) and rotates
#           them to positions (N,), giving queries (B, H, N, D); attn.layer is the layer's number
#   hidden  (B, T, C), what this attention read: the layer's input after its RMSNorm
#   keys    (B, H_kv, T, D), rotated
#   values  (B, H_kv, T, D)
#   keep    (B, H_kv, T) bool, True where the key and its value stay
Policy = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def fit_gaussian(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Step 1: mean and standard deviation of hidden (B, T, C) over the tokens: both (B, C), float32."""
    std, mean = torch.std_mean(hidden.float(), dim=1, correction=0)
    return mean, std


def layer_generator(attn: nn.Module, seed: int) -> torch.Generator:
    """A layer's own randomness, drawn on the CPU, so that it is the same on any device."""
    return torch.Generator().manual_seed(int(1000 * seed + attn.layer) % 2**32)


def sample_queries(attn: nn.Module, mean: Tensor, std: Tensor, n_samples: int, position: int, seed: int) -> Tensor:
    """Step 2: S plausible future queries (B, H, S, D), one at each of the positions from `position` on.

    Every layer has noise of its own. The prompts of a batch share it, so a prompt's samples are the same in any batch.
    """
    noise = torch.randn(n_samples, mean.size(-1), generator=layer_generator(attn, seed)).to(mean.device)
    hidden = mean[:, None] + std[:, None] * noise  # (B, S, C)
    positions = torch.arange(position, position + n_samples, device=mean.device)
    return attn.queries(hidden, positions)


def attention(queries: Tensor, keys: Tensor) -> Tensor:
    """softmax(q K^T / sqrt(D)), float32, of queries (B, H, S, D) over all keys (B, H_kv, T, D): (B, H_kv, G * S, T)."""
    queries = queries.unflatten(1, (keys.size(1), -1)).flatten(2, 3)  # (B, H_kv, G * S, D)
    return (queries.float() @ keys.float().mT / math.sqrt(keys.size(-1))).softmax(dim=-1)


def top_p_mask(probs: Tensor, top_p: float) -> Tensor:
    """Step 3: the nucleus (Holtzman et al. 2020), the smallest set that sums to at least top_p over the last dim; bool.

    The key that crosses top_p is in, so the set is never empty. Of keys with equal probability the earlier ones go
    first. top_p=1 keeps all, even those of probability zero.
    """
    if top_p == 1:
        return torch.ones_like(probs, dtype=torch.bool)
    ranked, order = probs.float().sort(dim=-1, descending=True, stable=True)
    needed = ranked.cumsum(dim=-1) - ranked < top_p  # the better keys together hold less than top_p
    needed[..., 0] = True  # the best key is in, even if top_p is so small that it is 0 in float32
    return torch.empty_like(needed).scatter_(-1, order, needed)


def check(top_p: float, n_samples: int, seed: int = 0, budget: str = "per_sample"):
    """Raises ValueError, with the value, for a setting that makes no sense."""
    if not (isinstance(top_p, numbers.Real) and 0 < top_p <= 1):  # NaN fails the comparison
        raise ValueError(f"top_p must be a number in (0, 1], got {top_p!r}")
    if not (isinstance(n_samples, numbers.Integral) and n_samples >= 1):
        raise ValueError(f"n_samples must be a whole number of at least 1, got {n_samples!r}")
    if not isinstance(seed, numbers.Integral):
        raise ValueError(f"seed must be a whole number, got {seed!r}")
    if budget not in ("per_sample", "current_query"):
        raise ValueError(f"budget must be 'per_sample' or 'current_query', got {budget!r}")


@dataclass(frozen=True)
class GVote:
    """Step 4, and the whole of GVote as a `Policy`.

    budget="per_sample" (this repo's default): each sample votes for its own nucleus.
    budget="current_query" (the paper's rule): the nucleus of the prompt's last query sets a size, and each sample votes
    for that many of its best keys. Query heads that share keys use the mean of their sizes, rounded up (our reading).
    The paper recommends top_p=0.95 and 8 samples or more, for its rule.

    Raises ValueError, with the value, for invalid settings, and where hidden and keys do not fit each other.
    """

    top_p: float = 0.95
    n_samples: int = 8
    seed: int = 0
    budget: str = "per_sample"

    def __post_init__(self):
        check(self.top_p, self.n_samples, self.seed, self.budget)

    def __call__(self, attn: nn.Module, hidden: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if hidden.dim() != 3 or keys.dim() != 4 or hidden.shape[:2] != (keys.size(0), keys.size(2)) or not keys.numel():
            shapes = f"{tuple(hidden.shape)} and {tuple(keys.shape)}"
            raise ValueError(f"hidden and keys must be (B, T, C) and (B, H_kv, T, D), not empty, got {shapes}")
        n_tokens = hidden.size(1)
        mean, std = fit_gaussian(hidden)
        queries = sample_queries(attn, mean, std, self.n_samples, n_tokens, self.seed)
        probs = attention(queries, keys)  # (B, H_kv, G * S, T)
        if self.budget == "per_sample":
            votes = top_p_mask(probs, self.top_p)
        else:
            last = attn.queries(hidden[:, -1:], torch.tensor([n_tokens - 1], device=hidden.device))  # (B, H, 1, D)
            size = top_p_mask(attention(last, keys), self.top_p).sum(dim=-1, keepdim=True)  # (B, H_kv, G, 1)
            order = probs.argsort(dim=-1, descending=True, stable=True)
            rank = order.argsort(dim=-1)  # the place of each key in that order
            votes = rank < size.float().mean(dim=2, keepdim=True)  # the mean over the group; `<` rounds it up
        return votes.any(dim=2)


@dataclass(frozen=True)
class PeakVotes:
    """A variant of ours, not the paper's: the prompt's own tokens vote, and the strongest vote for a key counts.

    A vote is a share of attention. The voters are the prompt's hidden states, all of them as queries at the next
    position, from which they see every key, also those of later tokens. (A guess why that helps: when a word returns,
    the model looks up what followed it before.) A key's score is the largest share that any voter gives it. It stays
    if that is at least 1 - top_p: one bar for all heads and layers, so a head may keep nothing.

    n_samples bounds the cost. Of a longer prompt every k-th token votes, with k = ceil(T / n_samples), counted from
    the last, and a vote counts for the k keys around it (k + 1 if k is even): the tokens left out may want those.

    Measured on SmolLM2-135M (notebook 4: four texts, four modules of code, 12 needles, which are numbers hidden in a
    text): held to 15% or 25% of the keys, its KL divergence from the full cache on text and code is about half of that
    of KVzip, which reads the prompt twice. At 25% both find all needles, at 15% PeakVotes 8 and KVzip 12; GVote finds
    none with half of the keys. At its own top_p it keeps 23% to 30% and finds all. To choose takes 40% of the time in
    which 768 tokens are read, and 25% for 4,096 (notebook 3; an Intel Xeon); GVote's choice takes 12% and 9%.
    """

    top_p: float = 0.98
    n_samples: int = 1024

    def __post_init__(self):
        check(self.top_p, self.n_samples)

    def score(self, attn: nn.Module, hidden: Tensor, keys: Tensor) -> Tensor:
        n_tokens = hidden.size(1)
        k = math.ceil(n_tokens / self.n_samples)
        peak = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
        # so many voters at a time that their votes take 1 MiB a query head: larger parts are slower
        for voters in torch.arange(n_tokens - 1, -1, -k, device=keys.device).split(max(1, 2**18 // n_tokens)):
            queries = attn.queries(hidden[:, voters], torch.full_like(voters, n_tokens))
            peak = peak.maximum(attention(queries, keys).amax(dim=2))
        return F.max_pool1d(peak, k // 2 * 2 + 1, stride=1, padding=k // 2)

    def __call__(self, attn: nn.Module, hidden: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.score(attn, hidden, keys) >= 1 - self.top_p
