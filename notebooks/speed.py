"""How fast is a token? Every ratio sets two things against each other: in turns, in one process, on real
text.

python notebooks/speed.py         two tables, with the device's name; about five minutes on 2 cores
"""

import argparse
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # no traceback, also while torch is being imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from wherever it is started

import torch
from torch import Tensor

from generate import checkpoint_folder, compiled_call, default_device, default_dtype, encode, load_tokenizer
from gvote import GVote, PeakVotes, Policy
from model import KVCache, Llama, keep_all

DEVICE = default_device()
DTYPE = default_dtype(DEVICE)
EAGER = None
CONTEXTS = [512, 1024, 2048, 4096, 8192 - 64]


def device_name() -> str:
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next(
        (line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor()
    )
    return f"{name}, {torch.get_num_threads()} threads"


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


def compare(slow: list[float], fast: list[float]) -> str:
    """Median times, and how many times as fast the second is: the median of the rounds, and their range."""
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    times = f"{1000 * median(slow):7.1f} ms {1000 * median(fast):7.1f} ms"
    return f"{times}  {median(ratios):5.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"


def read(model: Llama, ids: Tensor, policy=None, n: int = 1) -> KVCache:
    """The cache of n equal prompts."""
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


def bandwidth(n_repeats: int = 10) -> float:
    """Bytes per second that the device reads from its memory: how fast it sums half a GiB."""
    block = torch.ones(2**27, dtype=torch.float32, device=DEVICE)
    return block.nbytes / median(race(n_repeats, lambda: block.sum().item())[0])


def attention_only(model: Llama, cache: KVCache):
    """Of a step that reads a token, only its attention to the cache, in all layers."""
    config, new = model.config, torch.zeros(1, dtype=torch.long, device=DEVICE)
    shape = (cache.batch_size, config.n_head, 1, config.head_dim)
    queries = torch.randn(shape, device=DEVICE, dtype=DTYPE)
    keys = queries[:, : config.n_kv_head]  # for what is measured, any will do

    def step():
        for table in cache.layers:
            table.attend(queries, keys, keys, new, 1)

    return step


def first_compiled_token() -> float:
    """Seconds, of which nearly all go into compiling."""
    model = Llama.from_pretrained(checkpoint_folder(), DTYPE, DEVICE)
    step = one_token(
        model, read(model, torch.zeros(1, 100, dtype=torch.long, device=DEVICE)), compiled_call(DEVICE)
    )
    start = now()
    step()
    return now() - start


def compile_seconds() -> list[float]:
    """Of the first compiled token in a new process: with an empty compiler's cache, and with the one it
    left."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            command = [sys.executable, "-c", "import speed; print(speed.first_compiled_token())"]
            env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
            settings = dict(
                env=env, stdout=subprocess.PIPE, text=True, start_new_session=True
            )  # Ctrl-C ends us, we it
            done = subprocess.run(command, cwd=Path(__file__).parent, **settings)
            if done.returncode:
                raise OSError("a new process could not compile a token: is the disk full?")
            seconds.append(float(done.stdout))
    return seconds


def load() -> tuple[Llama, Tensor]:
    """The default model, and the longest prompt (1, T) that leaves it 64 tokens of its context."""
    model, tokenizer = (
        Llama.from_pretrained(checkpoint_folder(), DTYPE, DEVICE),
        load_tokenizer(checkpoint_folder()),
    )
    text = "".join(topics[name] for name in ("objects", "import", "compound"))
    return model, encode(tokenizer, text, chat=False)[:, : model.config.context_length - 64].to(DEVICE)


@torch.no_grad()
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

        def fill_both(attn, hidden, keys, values, full=full, gvote=gvote):  # one reading serves both caches
            full.fill(attn.layer, keys, values, keep_all(attn, hidden, keys, values))
            return gvote(attn, hidden, keys, values)

        model(ids[:, :n], kept, fill_both)
        full.advance(n)
        shares[n] = gvote.seconds / (now() - start)
        caches |= {(n, "full"): full, (n, "GVote"): kept}
    calls = {"eager": EAGER, "compiled": compiled}
    steps = {
        (n, how, way): one_token(model, cache, calls[how])
        for how in calls
        for (n, way), cache in caches.items()
    }
    seconds = dict(zip(steps, race(n_repeats, *steps.values()), strict=True))
    print("        GVote    its share of                one token:")
    print("tokens  keeps    the prefill                 full      GVote   times as fast (range)")
    for n in contexts:
        for how in calls:
            share = f"{caches[n, 'GVote'].usage:7.0%}{shares[n]:13.1%}" if how == "eager" else " " * 20
            slow, fast = seconds[n, how, "full"], seconds[n, how, "GVote"]
            print(f"{n:6}{share}   {how:>9}{compare(slow, fast)}", flush=True)
    return seconds, caches


@torch.no_grad()
def side_by_side(model: Llama, ids: Tensor, n: int = 4096, n_repeats: int = 11):
    """Our decoding and prefill against transformers' and kvpress'. Prints a table."""
    try:
        first, later = compile_seconds()
        print(f"first compiled token of the first process: {first:.1f} s, of a later process: {later:.1f} s")
    except OSError as error:
        print(f"first compiled token: not measured ({error})")
    compiled = compiled_call(DEVICE)

    def show(what: str, slow: list[float], fast: list[float]):
        print(f"{what:66}{compare(slow, fast)}", flush=True)

    print(f"{'one token, if not said otherwise':66}     first     second   times as fast (range)")
    for length in (128, n):
        full, (theirs, their_token) = read(model, ids[:, :length]), hugging_face(ids[:, :length])
        for name, call in (("ours", EAGER), ("ours compiled", compiled)):
            seconds = race(n_repeats, their_token, one_token(model, full, call))
            show(f"{length} tokens, full cache: transformers, {name}", *seconds)
    caches = [read(model, ids[:, :n], policy, 8) for policy in (None, GVote())]
    for name, call in (("", EAGER), (", compiled", compiled)):
        seconds = race(n_repeats, *(one_token(model, cache, call) for cache in caches))
        show(f"{n} tokens, 8 prompts{name}: full, GVote ({caches[1].usage:.0%} kept)", *seconds)
    del caches
    from kvpress import AdaKVPress, ExpectedAttentionPress

    _, step = hugging_face(ids[:, :n], AdaKVPress(ExpectedAttentionPress(0.5)))
    gvote = one_token(model, read(model, ids[:, :n], GVote()))
    masked, full, ours = race(n_repeats, step, their_token, gvote)
    show(f"{n} tokens: kvpress' AdaKV (50% masked), ours with GVote", masked, ours)
    show(f"{n} tokens: transformers' full cache, ours with GVote", full, ours)

    timed = []

    def prefill():
        timed.append(Timed(GVote()))
        model(ids[:, :n], KVCache(model.config), timed[-1])

    seconds = race(min(n_repeats, 3), lambda: theirs(ids[:, :n], logits_to_keep=1), prefill, n_warm=1)
    show(f"{n} tokens, prefill: transformers, ours with GVote", *seconds)
    shares = [gvote.seconds / total for gvote, total in zip(timed[1:], seconds[1], strict=True)]
    print(f"GVote's share of its prefill: {median(shares):.1%} ({min(shares):.1%}-{max(shares):.1%})")
    timed, start = Timed(PeakVotes()), now()
    model(ids[:, :n], KVCache(model.config), timed)
    print(f"PeakVotes' share of its prefill: {timed.seconds / (now() - start):.1%}")


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(f"{device_name()}; {DTYPE}; torch {torch.__version__}".replace("torch.", "", 1))
    model, ids = load()
    by_context(model, ids, CONTEXTS)
    side_by_side(model, ids)
