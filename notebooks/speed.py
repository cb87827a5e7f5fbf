"""How fast is a token? Every ratio sets two things against each other: in turns, in one process, on real text.

python notebooks/speed.py         the table, with the device's name; about ten minutes on 2 cores
"""

import copy
import platform
import sys
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from wherever it is started

import torch
from torch import Tensor

from generate import Timed, Tokenizer, default_device, default_dtype, now
from gvote import GVote
from model import DEFAULT, KVCache, Llama, checkpoint_folder

DEVICE = default_device()
DTYPE = default_dtype(DEVICE)


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


def show(what: str, seconds: list[list[float]], target: float):
    """One line: how many times as fast as the first step the second is; the median of the rounds, and their range."""
    slow, fast = seconds
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    times = f"{1000 * median(slow):8.1f} ms {1000 * median(fast):8.1f} ms"
    print(f"{what:58}{times}  {median(ratios):5.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})  {target:5.2f}", flush=True)


def read(model: Llama, ids: Tensor, policy=None) -> KVCache:
    cache = KVCache(model.config, max_new_tokens=64)
    model(ids, cache, policy)
    return cache


def one_token(model: Llama, cache: KVCache, compile: bool = False):
    """A step that reads the same token at the same place whenever it is called."""
    token = torch.full((cache.batch_size, 1), 5, device=DEVICE)

    def step():
        model(token, cache, compile=compile)
        cache.length -= 1

    return step


def batch_of(n: int, cache: KVCache) -> KVCache:
    """The cache of n equal prompts."""
    batch = copy.copy(cache)
    batch.batch_size = n
    batch.layers = [[rows for _ in range(n) for rows in copy.deepcopy(tables)] for tables in cache.layers]
    return batch


def hugging_face(ids: Tensor, press=None):
    """transformers' model, and a step that decodes one token after ids with its default cache."""
    from contextlib import nullcontext

    from transformers import DynamicCache, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(checkpoint_folder(DEFAULT), dtype=DTYPE, attn_implementation="sdpa")
    model, cache = model.to(DEVICE).eval(), DynamicCache()
    with press(model) if press else nullcontext():
        model(ids, past_key_values=cache, logits_to_keep=1)
    n_rows, token = cache.get_seq_length(), ids[:, :1]

    def step():
        model(token, past_key_values=cache)
        cache.crop(n_rows)

    return model, step


@torch.no_grad()
def main(n: int = 4096, n_long: int = 8192 - 64, n_repeats: int = 11):
    print(f"{device_name()}; {DTYPE}; torch {torch.__version__}".replace("torch.", "", 1))
    print(f"{'':58}{'first':>11} {'second':>11}  times as fast (range)  target")
    model, tokenizer = Llama.from_pretrained(dtype=DTYPE, device=DEVICE), Tokenizer(checkpoint_folder(DEFAULT))
    text = "".join(topics[name] for name in ("objects", "import", "compound"))
    ids = tokenizer.encode(text, chat=False)[:, :n_long].to(DEVICE)
    long, long_gvote = read(model, ids), read(model, ids, GVote())
    full, gvote = read(model, ids[:, :n]), read(model, ids[:, :n], GVote())
    theirs, their_token = hugging_face(ids[:, :n])

    show(f"{n} tokens, full cache: transformers, ours", race(n_repeats, their_token, one_token(model, full)), 1.2)
    steps = their_token, one_token(model, full, compile=True)
    show(f"{n} tokens, full cache: transformers, ours compiled", race(n_repeats, *steps), 2.2)
    kept = f"GVote ({long_gvote.usage:.0%} kept)"
    show(f"{n_long} tokens: full, {kept}", race(n_repeats, one_token(model, long), one_token(model, long_gvote)), 1.15)
    steps = one_token(model, long, compile=True), one_token(model, long_gvote, compile=True)
    show(f"{n_long} tokens, compiled: full, {kept}", race(n_repeats, *steps), 1.35)
    steps = one_token(model, long_gvote), one_token(model, long_gvote, compile=True)
    show(f"{n_long} tokens, {kept}: eager, compiled", race(n_repeats, *steps), 1)
    steps = one_token(model, batch_of(8, full)), one_token(model, batch_of(8, gvote))
    show(f"{n} tokens, 8 prompts: full, GVote ({gvote.usage:.0%} kept)", race(n_repeats, *steps), 1.4)
    del long, long_gvote, steps

    if DTYPE == torch.float32:
        half = Llama.from_pretrained(dtype=torch.bfloat16, device=DEVICE)
        steps = one_token(model, full), one_token(half, read(half, ids[:, :n]))
        show(f"{n} tokens, full cache: float32, bfloat16", race(n_repeats, *steps), 1.6)
        del half, steps
    try:
        from kvpress import AdaKVPress, ExpectedAttentionPress
    except ModuleNotFoundError:
        print("without kvpress, which is not installed")
    else:
        _, step = hugging_face(ids[:, :n], AdaKVPress(ExpectedAttentionPress(0.5)))
        show(f"{n} tokens: kvpress' AdaKV, GVote", race(n_repeats, step, one_token(model, gvote)), 2)

    timed = []

    def with_gvote():
        timed.append(Timed(GVote()))
        read(model, ids[:, :n], timed[-1])

    seconds = race(min(n_repeats, 5), lambda: theirs(ids[:, :n], logits_to_keep=1), with_gvote)
    show(f"{n} tokens, prefill: transformers, ours with GVote", seconds, 1)
    shares = [gvote.seconds / total for gvote, total in zip(timed[2:], seconds[1], strict=True)]
    print(f"GVote's share of the prefill: {median(shares):.1%}, target 3%")


if __name__ == "__main__":
    main()
