"""For notebook 3: how fast is a token, and how much memory does a cache take? Writes nothing.

python notebooks/speed.py         two tables of times, with the device's name; five minutes on 2 cores

Every ratio of times sets two things against each other: in turns, in one process, on real text. Memory is
counted by us, and seen by the operating system in processes of their own, which import this file.
"""

import argparse
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # no traceback, also while torch is being imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from wherever it is started

import torch
from torch import Tensor

from generate import checkpoint_folder, compiled_call, default_device, default_dtype, encode
from gvote import GVote, PeakVotes, Policy
from model import KVCache, Llama, keep_all
from stats import print_table

DEVICE = default_device()
DTYPE = default_dtype(DEVICE)
EAGER = None
CONTEXTS = [512, 1024, 2048, 4096, 8192 - 64]
WAYS = ("full cache", "GVote, layer by layer", "GVote, after the last layer")
MORE_WAYS = (*WAYS, "PeakVotes, layer by layer")


def model_and_prompts() -> tuple[Llama, Tensor, Tensor]:
    """The default model, the running example (1, T), and the longest prompt that leaves 64 tokens of the
    model's context."""
    from start import model, prompt, tokenizer  # not above: it loads the model

    text = "".join(topics[name] for name in ("objects", "import", "compound"))
    pages = encode(tokenizer, text, chat=False)[:, : model.config.context_length - 64]
    return model.to(DEVICE, DTYPE), prompt.to(DEVICE), pages.to(DEVICE)


def device_name() -> str:
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor()])[0]}, {torch.get_num_threads()} threads"


def now() -> float:
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()  # else the clock is read while the device still works
    return time.perf_counter()


class Timed:
    """Any policy, with its seconds counted."""

    def __init__(self, policy: Policy):
        self.policy, self.seconds = policy, 0.0

    def __call__(self, attn, hidden, keys, values) -> Tensor:
        start = now()
        keep = self.policy(attn, hidden, keys, values)
        self.seconds += now() - start
        return keep


def race(n_repeats: int, *steps, n_warm: int = 2) -> list[list[float]]:
    """Seconds of each step in n_repeats rounds, in which the steps take turns. Rounds to warm up do not
    count."""
    seconds = [[] for _ in steps]
    for _ in range(n_warm + n_repeats):
        for step, times in zip(steps, seconds, strict=True):
            start = now()
            step()
            times.append(now() - start)
    return [times[n_warm:] for times in seconds]


def times_as_fast(slow: list[float], fast: list[float]) -> str:
    """Median times, and how many times as fast the second is: the median of the rounds, and their range."""
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    times = f"{1000 * median(slow):7.1f} ms {1000 * median(fast):7.1f} ms"
    return f"{times}  {median(ratios):5.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"


def filled_cache(model: Llama, ids: Tensor, policy=None, n: int = 1) -> KVCache:
    """That of n equal prompts."""
    cache = KVCache(model.config, n, max_new_tokens=64)

    def fill(attn, hidden, keys, values):
        keep = (policy or keep_all)(attn, hidden, keys, values)
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


def hugging_face(ids: Tensor):
    """transformers' model, and a step that decodes one token after ids with its default cache."""
    from transformers import DynamicCache, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(checkpoint_folder(), dtype=DTYPE, attn_implementation="sdpa")
    model, cache = model.to(DEVICE).eval().requires_grad_(False), DynamicCache()
    model(ids, past_key_values=cache, logits_to_keep=1)
    n_rows, token = cache.get_seq_length(), ids[:, :1]

    def step():
        model(token, past_key_values=cache)
        cache.crop(n_rows)

    return model, step


def bandwidth(n_repeats: int = 10) -> float:
    """Bytes per second that the device reads from its memory: how fast it sums half a GiB."""
    block = torch.ones(2**27, dtype=torch.float32, device=DEVICE)
    return block.nbytes / median(race(n_repeats, lambda: block.sum().item())[0])


def attention_only(model: Llama, cache: KVCache):
    """Of a step that reads a token, only its attention to the cache, in all layers."""
    config, slots = model.config, torch.zeros(1, dtype=torch.long, device=DEVICE)
    shape = (cache.batch_size, config.n_head, 1, config.head_dim)
    queries = torch.randn(shape, device=DEVICE, dtype=DTYPE)
    keys = queries[:, : config.n_kv_head]  # for what is measured, any will do

    def step():
        for table in cache.layers:
            table.attend(queries, keys, keys, slots, 1)

    return step


def in_fresh_process(call: str, **variables: str) -> float:
    """The number that a call of a function of this file, such as "first_compiled_token()", returns in a
    process of its own with these environment variables. Raises OSError, with its last line, if it fails."""
    command = [sys.executable, "-c", f"import speed; print(speed.{call})"]
    settings = dict(cwd=Path(__file__).parent, env=os.environ | variables, capture_output=True, text=True)
    # Ctrl-C ends us, and we end it
    done = subprocess.run(command, start_new_session=True, **settings)
    if done.returncode:
        raise OSError(done.stderr.strip().splitlines()[-1])
    return float(done.stdout)


def first_compiled_token() -> float:
    """Seconds, of which nearly all go into compiling."""
    model, prompt, _ = model_and_prompts()
    step = one_token(model, filled_cache(model, prompt[:, :100]), compiled_call(DEVICE))
    return race(1, step, n_warm=0)[0][0]


def by_context(model: Llama, ids: Tensor, contexts: list[int], n_repeats: int = 11) -> tuple[dict, dict]:
    """The full cache against GVote's, eager and compiled: one token after prompts of several lengths, all in
    turns.

    Prints a table. Returns the seconds of all rounds by (context, "eager" or "compiled", "full" or "GVote"),
    and the caches by (context, "full" or "GVote").
    """
    caches, shares, compiled = {}, {}, compiled_call(DEVICE)
    for n in contexts:
        gvote, start = Timed(GVote()), now()
        full, kept = (KVCache(model.config, max_new_tokens=64) for _ in range(2))

        # one reading serves both caches
        def fill_both(attn, hidden, keys, values, full=full, gvote=gvote):
            full.fill(attn.layer, keys, values, keep_all(attn, hidden, keys, values))
            return gvote(attn, hidden, keys, values)

        model(ids[:, :n], kept, fill_both)
        full.advance(n)
        shares[n] = gvote.seconds / (now() - start)
        caches |= {(n, "full"): full, (n, "GVote"): kept}
    calls = {"eager": EAGER, "compiled": compiled}
    runs = [(n, how, way) for how in calls for n, way in caches]
    steps = {(n, how, way): one_token(model, caches[n, way], calls[how]) for n, how, way in runs}
    seconds = dict(zip(steps, race(n_repeats, *steps.values()), strict=True))
    lines = [["tokens", "kept", "choosing"]]
    lines[0] += [f"{how}: full, GVote, times as fast (range)" for how in calls]
    for n in contexts:
        times = [times_as_fast(seconds[n, how, "full"], seconds[n, how, "GVote"]) for how in calls]
        lines.append([f"{n:,}", f"{caches[n, 'GVote'].usage:.0%}", f"{shares[n]:.1%}", *times])
    print_table(lines)
    return seconds, caches


def side_by_side(model: Llama, ids: Tensor, n: int = 4096, n_repeats: int = 11):
    """Our decoding and prefill against transformers', one prompt against eight. Prints a table."""
    with tempfile.TemporaryDirectory() as folder:
        # the compiler's cache is empty, and then it is what the first process left
        variables = {"TORCHINDUCTOR_CACHE_DIR": folder}
        first, later = (in_fresh_process("first_compiled_token()", **variables) for _ in range(2))
    print(f"first compiled token of the first process: {first:.1f} s, of a later process: {later:.1f} s")
    compiled = compiled_call(DEVICE)

    def print_line(what: str, slow: list[float], fast: list[float]):
        print(f"{what:66}{times_as_fast(slow, fast)}", flush=True)

    print(f"{'one token, if not said otherwise':66}     first     second   times as fast (range)")
    for length in (128, n):
        full, (theirs, their_token) = filled_cache(model, ids[:, :length]), hugging_face(ids[:, :length])
        for name, call in (("ours", EAGER), ("ours compiled", compiled)):
            seconds = race(n_repeats, their_token, one_token(model, full, call))
            print_line(f"{length} tokens, full cache: transformers, {name}", *seconds)
    caches = [filled_cache(model, ids[:, :n], policy, 8) for policy in (None, GVote())]
    for name, call in (("", EAGER), (", compiled", compiled)):
        seconds = race(n_repeats, *(one_token(model, cache, call) for cache in caches))
        print_line(f"{n} tokens, 8 prompts{name}: full, GVote ({caches[1].usage:.0%} kept)", *seconds)
    del caches
    runs = {"GVote": [], "PeakVotes": []}

    def prefill(name: str, policy: Policy):
        runs[name].append(Timed(policy))
        model(ids[:, :n], KVCache(model.config), runs[name][-1])

    ours = (lambda: prefill("GVote", GVote()), lambda: prefill("PeakVotes", PeakVotes()))
    rounds = min(n_repeats, 3)
    slow, *seconds = race(rounds, lambda: theirs(ids[:, :n], logits_to_keep=1), *ours, n_warm=1)
    print_line(f"{n} tokens, prefill: transformers, ours with GVote", slow, seconds[0])
    for name, times in zip(runs, seconds, strict=True):
        shares = [timed.seconds / total for timed, total in zip(runs[name][1:], times, strict=True)]
        low, high = min(shares), max(shares)
        share = f"{median(shares):.0%} of a prefill of {n} tokens ({low:.0%}–{high:.0%})"
        print(f"{name}: choosing the keys takes {share}")


# How much memory does a cache take while a prompt is read?


def bytes_held(model: Llama, prompt: Tensor, policy: Policy) -> list[int]:
    """Bytes that the caches of all layers take together: when each layer has just made its keys, and at the
    end. There is no room for new tokens."""
    cache, nbytes = KVCache(model.config, max_new_tokens=0), []

    def watched(attn, hidden, keys, values):
        # the layers before, and this one's
        nbytes.append(cache.nbytes + keys.nbytes + values.nbytes)
        return policy(attn, hidden, keys, values)

    model(prompt, cache, watched)
    return [*nbytes, cache.nbytes]


def resident(name: str) -> int:
    """Bytes: what the process has now (VmRSS) or had at most (VmHWM); on CUDA, what torch allocated."""
    if DEVICE.type == "cuda":
        return {"VmRSS": torch.cuda.memory_allocated, "VmHWM": torch.cuda.max_memory_allocated}[name]()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def growth(way: str) -> int:
    """By how many bytes does this process grow, at most, while it reads the running example?"""
    (model, prompt, _), full = model_and_prompts(), []

    def compress_later(attn, hidden, keys, values):
        full.append((attn.layer, keys, values, GVote()(attn, hidden, keys, values)))
        return torch.zeros_like(full[-1][-1])

    model(prompt[:, :16], KVCache(model.config))  # warm up
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        # forgets the peak so far: loading the model takes more
        Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    cache = KVCache(model.config, max_new_tokens=0)
    policies = (None, GVote(), compress_later, PeakVotes())
    model(prompt, cache, dict(zip(MORE_WAYS, policies, strict=True))[way])
    for layer in full:
        cache.fill(*layer)
    return resident("VmHWM") - before


def fresh_processes(n_runs: int) -> Iterator[str]:
    """A line for each way to read the running example: by how much a fresh process grows, over n runs."""
    # glibc keeps freed memory for later: so told, it returns it at once, and a peak counts what is in use
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    for way in MORE_WAYS:
        try:
            peaks = [in_fresh_process(f"growth({way!r})", **at_once) / 2**20 for _ in range(n_runs)]
        except OSError as error:
            yield f"not measured, which needs CUDA or Linux with its /proc ({error})"
            return
        yield f"{way:28} {median(peaks):5.0f} MiB more at the peak ({min(peaks):.0f}–{max(peaks):.0f})"


if __name__ == "__main__":
    layout = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=layout).parse_args()
    print(f"{device_name()}; {DTYPE}; torch {torch.__version__}".replace("torch.", "", 1))
    model, _, pages = model_and_prompts()
    by_context(model, pages, CONTEXTS)
    side_by_side(model, pages)
