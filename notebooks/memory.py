"""By how much does a fresh process grow while it reads a prompt? Run by notebook 3, once for each way to
compress."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from gvote import GVote
from model import KVCache
from speed import DEVICE, load

WAYS = ("full cache", "GVote, layer by layer", "GVote, after the last layer")


def resident(name: str) -> int:
    """Bytes: what the process has now (VmRSS) or had at most (VmHWM); on CUDA, what torch allocated."""
    if DEVICE.type == "cuda":
        return {"VmRSS": torch.cuda.memory_allocated, "VmHWM": torch.cuda.max_memory_allocated}[name]()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def main(way: str, n_tokens: int):
    model, ids = load()
    ids, full = ids[:, :n_tokens], []

    def compress_later(attn, hidden, keys, values):
        full.append((attn.layer, keys, values, GVote()(attn, hidden, keys, values)))
        return torch.zeros_like(full[-1][-1])

    model(ids[:, :16], KVCache(model.config))  # warm up
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far: loading the model takes more
    before = resident("VmRSS")
    cache = KVCache(model.config, max_new_tokens=0)
    model(ids, cache, dict(zip(WAYS, (None, GVote(), compress_later), strict=True))[way])
    for layer in full:
        cache.fill(*layer)
    print(resident("VmHWM") - before, cache.nbytes)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
