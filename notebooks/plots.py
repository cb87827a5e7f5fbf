"""What the notebooks share: the style of their pictures, and a look at what each layer hands to a policy."""

import os
from bisect import bisect_left, bisect_right
from itertools import accumulate

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from gvote import attention
from model import KVCache, Llama, keep_all

# Okabe and Ito's palette: told apart by colour-blind readers, and in grey
BLACK, GREY, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#000000", "#999999", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip

plt.rcParams.update(
    {
        "figure.figsize": (8, 3.4),
        "figure.dpi": 90,
        "figure.constrained_layout.use": True,
        "font.size": 13,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, RED, SKY, PINK, BLACK, GREY]),
        "image.cmap": "viridis",
    }
)


def save(figure, name: str):
    """Writes a picture that README.md shows, but not one from a short run."""
    if not os.environ.get("GVOTE_FAST"):
        figure.savefig(f"notebooks/images/{name}.png", dpi=110)


def name_lines(axis, ends: list[tuple[float, str, str]], gap: float = 0.07):
    """Names lines at the right of a picture, in their colours, instead of a legend. ends: height, name and
    colour of each. The gap between two names, a share of the picture's height, is kept even where lines end
    together."""
    to_axes = axis.transData + axis.transAxes.inverted()
    x = axis.get_xlim()[1]
    ends = sorted((to_axes.transform((x, y))[1], name, color) for y, name, color in ends)
    heights = [height for height, *_ in ends]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    heights[-1] = min(heights[-1], 1)
    for i in range(len(heights) - 1, 0, -1):
        heights[i - 1] = min(heights[i - 1], heights[i] - gap)
    for height, (_, name, color) in zip(heights, ends, strict=True):
        axis.text(1.02, height, name, color=color, va="center", transform=axis.transAxes)


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


def look_up(model: Llama, prompt: Tensor, answer: list[int], positions: list[int]) -> list[int]:
    """The heads, numbered through all layers, in which a token of the answer pays more than half of its
    attention to the prompt (1, T) to the keys at these positions."""
    n_tokens, paid = prompt.size(1), []
    for attn, hidden, keys, _ in record(model, torch.cat((prompt, torch.tensor([answer])), dim=1)):
        queries = attn.queries(hidden[:, n_tokens:], n_tokens + torch.arange(len(answer)))
        probs = attention(queries, keys[:, :, :n_tokens])[0]  # (H_kv, G * N, T)
        paid.append(probs[..., positions].sum(dim=-1).amax(dim=-1))
    return (torch.cat(paid) > 0.5).nonzero().flatten().tolist()
