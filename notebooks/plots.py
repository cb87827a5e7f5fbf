"""What the notebooks share: the style of their pictures, and a look at what each layer hands to a policy."""

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from model import KVCache, Llama

# Okabe and Ito's palette: told apart by colour-blind readers, and in grey
BLACK, GREY, ORANGE, SKY, GREEN, BLUE, RED, PINK = (
    "#000000", "#999999", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
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
    """Writes a picture that README.md shows."""
    figure.savefig(f"notebooks/images/{name}.png", dpi=110)


def record(model: Llama, ids: Tensor) -> list[tuple]:
    """Reads prompts ids (B, T) and returns (attn, hidden, keys, values) of each layer: what a policy is given."""
    layers = []

    def keep_all(attn, hidden, keys, values):
        layers.append((attn, hidden, keys, values))
        return torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)

    model(ids, KVCache(model.config, len(ids)), keep_all)
    return layers
