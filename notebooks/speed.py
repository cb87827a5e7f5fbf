"""How fast is a token? Every ratio sets two things against each other: in turns, in one process, on real text.

python notebooks/speed.py         the table, with the device's name; about ten minutes on 2 cores
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from wherever it is started

import torch
from torch import Tensor, nn

from generate import Timed, Tokenizer, checkpoint_folder, compiled_call, default_device, default_dtype, now
from gvote import GVote, PeakVotes
from model import KVCache, Llama

DEVICE = default_device()
DTYPE = default_dtype(DEVICE)
EAGER = nn.Module.__call__


def device_name() -> str:
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {torch.get_num_threads()} threads"


def race(n_repeats: int, *steps) -> list[list[float]]:
    """Seconds of each step in n_repeats rounds, in which the steps take turns. Two rounds before these do not count."""
    seconds = [[] for _ in steps]
    for _ in range(n_repeats + 2):
        for step, times in zip(steps, seconds, strict=True):
            start = now(DEVICE)
            step()
            times.append(now(DEVICE) - start)
    return [times[2:] for times in seconds]


def show(what: str, seconds: list[list[float]]):
    """One line: how many times as fast as the first step the second is; the median of the rounds, and their range."""
    slow, fast = seconds
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    times = f"{1000 * median(slow):8.1f} ms {1000 * median(fast):8.1f} ms"
    print(f"{what:66}{times}  {median(ratios):5.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})", flush=True)


def read(model: Llama, ids: Tensor, policy=None, n: int = 1) -> KVCache:
    """The cache of n equal prompts."""
    cache = KVCache(model.config, n, max_new_tokens=64)

    def fill(attn, hidden, keys, values):
        keep = policy(attn, hidden, keys, values) if policy else torch.ones_like(keys[..., 0], dtype=torch.bool)
        cache.fill(attn.layer, *(x.expand(n, *x.shape[1:]) for x in (keys, values, keep)))
        return keep

    model(ids, KVCache(model.config, max_new_tokens=0), fill)
    cache.advance(ids.size(1))
    return cache


def one_token(model: Llama, cache: KVCache, call=EAGER):
    """A step that reads the same token at the same place whenever it is called."""
    token = torch.full((cache.batch_size, 1), 5, device=DEVICE)

    def step():
        model(token, cache, call=call)
        cache.advance(-1)

    return step


def hugging_face(ids: Tensor, press=None):
    """transformers' model, and a step that decodes one token after ids with its default cache."""
    from transformers import DynamicCache, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(checkpoint_folder(), dtype=DTYPE, attn_implementation="sdpa")
    model, cache = model.to(DEVICE).eval(), DynamicCache()
    with press(model) if press else nullcontext():
        model(ids, past_key_values=cache, logits_to_keep=1)
    n_rows, token = cache.get_seq_length(), ids[:, :1]

    def step():
        model(token, past_key_values=cache)
        cache.crop(n_rows)

    return model, step


def first_compiled_token() -> float:
    """Seconds, of which nearly all go into compiling."""
    model = Llama.from_pretrained(checkpoint_folder(), DTYPE, DEVICE)
    step = one_token(model, read(model, torch.zeros(1, 100, dtype=torch.long, device=DEVICE)), compiled_call(DEVICE))
    start = now(DEVICE)
    step()
    return now(DEVICE) - start


def compile_seconds() -> list[float]:
    """Of the first compiled token in a new process: with an empty compiler's cache, and with the one it left."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            command = [sys.executable, "-c", "import speed; print(speed.first_compiled_token())"]
            env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
            done = subprocess.run(command, cwd=Path(__file__).parent, env=env, stdout=subprocess.PIPE, text=True)
            seconds.append(float(done.stdout))
    return seconds


@torch.no_grad()
def table(n: int = 4096, n_long: int = 8192 - 64, n_repeats: int = 11):
    print(f"{device_name()}; {DTYPE}; torch {torch.__version__}".replace("torch.", "", 1))
    print("first compiled token of a process: {:.1f} s, of a later one: {:.1f} s".format(*compile_seconds()))
    print(f"{'one token, if not said otherwise':66}{'first':>11} {'second':>11}  times as fast (range)")
    folder, compiled = checkpoint_folder(), compiled_call(DEVICE)
    model, tokenizer = Llama.from_pretrained(folder, DTYPE, DEVICE), Tokenizer(folder)
    text = "".join(topics[name] for name in ("objects", "import", "compound"))
    ids = tokenizer.encode(text, chat=False)[:, :n_long].to(DEVICE)

    for length in (128, 1024, n):
        cache, (theirs, their_token) = read(model, ids[:, :length]), hugging_face(ids[:, :length])
        for name, call in (("ours", EAGER), ("ours compiled", compiled)):
            seconds = race(n_repeats, their_token, one_token(model, cache, call))
            show(f"{length} tokens, full cache: transformers, {name}", seconds)
    for length, batch_size in ((n_long, 1), (n, 8)):
        full, gvote = (read(model, ids[:, :length], policy, batch_size) for policy in (None, GVote()))
        prompts = f", {batch_size} prompts" if batch_size > 1 else ""
        for name, call in (("", EAGER), (", compiled", compiled)):
            seconds = race(n_repeats, one_token(model, full, call), one_token(model, gvote, call))
            show(f"{length} tokens{prompts}{name}: full, GVote ({gvote.usage:.0%} kept)", seconds)
    del full, gvote

    if DTYPE == torch.float32:
        half = Llama.from_pretrained(folder, torch.bfloat16, DEVICE)
        caches = read(model, ids[:, :n]), read(half, ids[:, :n])
        for name, call in (("", EAGER), (", compiled", compiled)):
            seconds = race(n_repeats, one_token(model, caches[0], call), one_token(half, caches[1], call))
            show(f"{n} tokens, full cache{name}: float32, bfloat16", seconds)
        del half, caches
    from kvpress import AdaKVPress, ExpectedAttentionPress

    _, step = hugging_face(ids[:, :n], AdaKVPress(ExpectedAttentionPress(0.5)))
    gvote = read(model, ids[:, :n], GVote())
    show(f"{n} tokens: kvpress' AdaKV (50% masked), GVote", race(n_repeats, step, one_token(model, gvote)))

    timed = []

    def with_gvote():
        timed.append(Timed(GVote()))
        model(ids[:, :n], KVCache(model.config), timed[-1])

    seconds = race(min(n_repeats, 3), lambda: theirs(ids[:, :n], logits_to_keep=1), with_gvote)
    show(f"{n} tokens, prefill: transformers, ours with GVote", seconds)
    shares = [gvote.seconds / total for gvote, total in zip(timed[2:], seconds[1], strict=True)]
    print(f"GVote's share of the prefill: {median(shares):.1%} ({min(shares):.1%}-{max(shares):.1%})")
    timed, start = Timed(PeakVotes()), now(DEVICE)
    model(ids[:, :n], KVCache(model.config), timed)
    print(f"PeakVotes' share, once: {timed.seconds / (now(DEVICE) - start):.1%}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        table()
    except KeyboardInterrupt:
        sys.exit(130)
