"""How much memory does a cache take while a prompt is read? Counted by us, and seen by the operating system.

Notebook 3 calls `held` and `fresh_processes`; those start this file, once for each run.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from generate import QUESTION, built_in_text, checkpoint_folder, encode, load_tokenizer
from gvote import GVote, Policy
from model import KVCache, Llama
from speed import DEVICE, load

WAYS = ("full cache", "GVote, layer by layer", "GVote, after the last layer")
MIB = 2**20


def held(model: Llama, prompt: Tensor, policy: Policy) -> list[int]:
    """Bytes that the caches of all layers take together: when each layer has just made its keys, and at the
    end. No rows are reserved for new tokens."""
    cache, nbytes = KVCache(model.config, max_new_tokens=0), []

    def watched(attn, hidden, keys, values):
        nbytes.append(cache.nbytes + keys.nbytes + values.nbytes)  # the layers before, and this one's
        return policy(attn, hidden, keys, values)

    model(prompt, cache, watched)
    return [*nbytes, cache.nbytes]


def resident(name: str) -> int:
    """Bytes: what the process has now (VmRSS) or had at most (VmHWM); on CUDA, what torch allocated."""
    if DEVICE.type == "cuda":
        return {"VmRSS": torch.cuda.memory_allocated, "VmHWM": torch.cuda.max_memory_allocated}[name]()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def fresh_processes(n_runs: int) -> Iterator[str]:
    """A line for each way to read the running example: by how much a fresh process grows, at most, over n
    runs."""
    if DEVICE.type != "cuda" and not Path("/proc/self/clear_refs").exists():
        yield "not measured: this needs CUDA, or Linux with its /proc"
        return
    # glibc keeps freed memory for later: so told, it returns it at once, and a peak counts what is in use
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    for way in WAYS:
        command, peaks = [sys.executable, __file__, way], []
        for _ in range(n_runs):
            done = subprocess.run(command, env=settings, capture_output=True, text=True)
            if done.returncode:
                yield f"not measured: {done.stderr.strip().splitlines()[-1]}"
                return
            peaks.append(int(done.stdout) / MIB)
        yield f"{way:28} {median(peaks):5.0f} MiB more at the peak ({min(peaks):.0f}-{max(peaks):.0f})"


def main(way: str):
    model, tokenizer, full = load()[0], load_tokenizer(checkpoint_folder()), []
    prompt = encode(tokenizer, f"{built_in_text(tokenizer)}\n\n{QUESTION}").to(DEVICE)  # as in start.py

    def compress_later(attn, hidden, keys, values):
        full.append((attn.layer, keys, values, GVote()(attn, hidden, keys, values)))
        return torch.zeros_like(full[-1][-1])

    model(prompt[:, :16], KVCache(model.config))  # warm up
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far: loading the model takes more
    before = resident("VmRSS")
    cache = KVCache(model.config, max_new_tokens=0)
    model(prompt, cache, dict(zip(WAYS, (None, GVote(), compress_later), strict=True))[way])
    for layer in full:
        cache.fill(*layer)
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main(sys.argv[1])
