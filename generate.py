"""Ask a Llama about a long text twice: with its full KV cache, and with what GVote keeps of it.

python generate.py                                        the default model, a built-in text and a question about it
python generate.py "Why is the sky blue?"                 your prompt
python generate.py --file notes.txt --question "Who?"     your text (- for standard input) and a question about it
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C ends without a traceback, also while torch is still being imported
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))

import torch
from torch import Tensor

from gvote import GVote, Policy
from model import DEFAULT, KVCache, Llama, checkpoint_folder, read_json

QUESTION = "According to the text, what three things does every object have?"


def generate(
    model: Llama,
    ids: Tensor,
    max_new_tokens: int,
    policy: Policy | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Collection[int] = (),
    cache: KVCache | None = None,
    compile: bool = False,
) -> Iterator[int]:
    """Yields the tokens that follow the prompt ids (1, T), as they come; greedy unless temperature > 0.

    Ends after max_new_tokens, after a token in `stop` (which is yielded too), or when the model's context is full.
    policy compresses the prompt's cache. A new cache is made unless one is given, to look at it afterwards.
    compile=True reads all tokens but the prompt through torch.compile: see `decode_step` in model.py.
    Raises ValueError for invalid settings, an empty prompt, or one that exceeds the context.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a number of at least 0, got {temperature}")
    cache = cache or KVCache(model.config, max_new_tokens=max_new_tokens)
    generator = torch.Generator().manual_seed(seed % 2**32)
    for _ in range(max_new_tokens):
        logits = model(ids, cache, policy, compile=compile)[0, -1]
        if temperature == 0:
            ids = logits.argmax()[None, None]
        else:
            probs = (logits.float() / temperature).softmax(dim=-1).cpu()
            ids = torch.multinomial(probs, 1, generator=generator)[None].to(ids.device)
        policy = None  # the prompt is read and compressed
        token = ids.item()
        yield token
        if token in stop or cache.length == model.config.context_length:
            return


class Tokenizer:
    """A checkpoint folder's tokenizer with its chat template and its end tokens."""

    def __init__(self, folder: Path):
        import tokenizers

        path = folder / "tokenizer.json"
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(f"{path} cannot be read: {error}") from None
        settings, generation, template = (
            folder / name for name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")
        )
        self.settings = read_json(settings) if settings.exists() else {}
        self.template = template.read_text("utf-8") if template.exists() else self.settings.get("chat_template")
        if isinstance(self.template, list):  # several templates by name
            self.template = {each["name"]: each["template"] for each in self.template}.get("default")
        end = read_json(generation if generation.exists() else folder / "config.json").get("eos_token_id")
        self.stop = end if isinstance(end, list) else [end]

    def encode(self, text: str, chat: bool = True) -> Tensor:
        """Token ids (1, T) of a user's message in the model's chat format, or with chat=False of the bare text."""
        if chat and self.template:
            return torch.tensor([self.tokenizer.encode(self.render(text), add_special_tokens=False).ids])
        return torch.tensor([self.tokenizer.encode(text).ids], dtype=torch.long)

    def render(self, text: str) -> str:
        """The user's message through the chat template: a program that comes with the weights, hence the sandbox."""
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str):
            raise ValueError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals.update(raise_exception=raise_exception, strftime_now=time.strftime)
        specials = {name: self.settings[name] for name in ("bos_token", "eos_token") if self.settings.get(name)}
        specials = {name: token["content"] if isinstance(token, dict) else token for name, token in specials.items()}
        messages = [{"role": "user", "content": text}]
        try:
            template = environment.from_string(self.template)
            return template.render(messages=messages, add_generation_prompt=True, **specials)
        except Exception as error:  # whatever the program does wrong
            raise ValueError(f"the model's chat template fails ({error}); --raw goes without it") from None


def built_in_text(tokenizer: Tokenizer, n_tokens: int = 1100) -> str:
    from pydoc_data.topics import topics  # the Python language reference, in every Python

    return tokenizer.tokenizer.decode(tokenizer.tokenizer.encode(topics["objects"]).ids[:n_tokens])


def default_device() -> torch.device:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()  # else the clock is read while the device still works
    return time.perf_counter()


class Timed:
    """Any policy, with its seconds counted."""

    def __init__(self, policy: Policy):
        self.policy, self.seconds = policy, 0.0

    def __call__(self, attn, hidden, keys, values) -> Tensor:
        start = now(keys.device)
        keep = self.policy(attn, hidden, keys, values)
        self.seconds += now(keys.device) - start
        return keep


def answer(model: Llama, tokenizer: Tokenizer, ids: Tensor, policy: Policy | None, args) -> tuple[KVCache, str]:
    """Streams one answer; returns the cache it used and its row of figures."""
    cache, policy = KVCache(model.config, max_new_tokens=args.max_new_tokens), policy and Timed(policy)
    tokens, shown, times = [], "", [now(ids.device)]
    settings = (policy, args.temperature, args.seed, tokenizer.stop, cache, args.compile)
    for token in generate(model, ids, args.max_new_tokens, *settings):
        times.append(time.perf_counter())
        tokens.append(token)
        text = tokenizer.tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):  # else a character of several tokens, not all of them here yet
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    prefill, decode = times[1] - times[0], times[-1] - times[1]
    gvote = f"{policy.seconds:.2f}" if policy else "-"
    speed = f"{(len(tokens) - 1) / decode:.1f}" if len(tokens) > 1 else "-"
    return cache, f"{cache.usage:>8.0%}{cache.nbytes / 2**20:>11.1f}{prefill:>11.2f}{gvote:>9}{speed:>10}"


def chart(cache: KVCache) -> str:
    """The share of keys kept in each layer, as a line of bars."""
    share = cache.kept.float().mean(dim=1) / cache.prompt_length
    bars = "".join("▁▂▃▄▅▆▇█"[min(int(8 * s), 7)] for s in share)
    least, most = share.argmin().item(), share.argmax().item()
    return f"{bars}  {share[least]:.0%} (layer {least}) to {share[most]:.0%} (layer {most})"


def read_text(path: str) -> str:
    try:
        with open(0 if path == "-" else path, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8") from None


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", help="a prompt instead of the built-in text")
    parser.add_argument("--file", metavar="PATH", help="read the prompt from a file, - for standard input")
    parser.add_argument("--question", help="asked about the prompt, after it")
    parser.add_argument("--model", default=DEFAULT, help="a checkpoint folder or a hub name (default: %(default)s)")
    parser.add_argument(
        "--top-p", type=float, default=GVote.top_p, help="share of attention that a sample keeps (default: %(default)s)"
    )
    parser.add_argument("--samples", type=int, default=GVote.n_samples, help="sampled queries (default: %(default)s)")
    parser.add_argument(
        "--budget", default=GVote.budget, help="per_sample, or current_query as in the paper (default: %(default)s)"
    )
    parser.add_argument("--no-gvote", action="store_true", help="answer with the full cache only")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="of the samples and of the answer (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on cuda, else float32"
    )
    parser.add_argument("--device", help="default: cuda or mps where there is one, else cpu")
    parser.add_argument("--compile", action="store_true", help="faster tokens, after some minutes for torch.compile")
    parser.add_argument("--raw", action="store_true", help="do not use the model's chat template")
    parser.error = lambda message: sys.exit(f"error: {message} (--help shows all options)")  # one line, not the usage
    return parser.parse_args()


def main():
    args = parse_args()
    try:
        device = torch.zeros((), device=args.device or default_device()).device
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device {args.device} cannot be used: {str(error).splitlines()[0]}") from None
    dtype = getattr(torch, args.dtype) if args.dtype else default_dtype(device)
    policy = GVote(args.top_p, args.samples, args.seed, args.budget)

    if args.prompt is not None and args.file is not None:
        raise ValueError("give a prompt or --file, not both")
    folder = checkpoint_folder(args.model)
    tokenizer = Tokenizer(folder)
    text = args.prompt if args.file is None else read_text(args.file)
    question = args.question
    if text is None:
        text, question = built_in_text(tokenizer), question or QUESTION
    if not text.strip():
        raise ValueError("the prompt is empty")
    text = f"{text}\n\n{question}" if question else text
    text.encode()  # a ValueError for arguments that are not UTF-8
    ids = tokenizer.encode(text, chat=not args.raw).to(device)
    model = Llama.from_pretrained(folder, dtype, device)
    # the first pass is slower than those after it, compiled or not: that is not the full cache's fault
    for _ in generate(model, ids[:, :1024], 3, compile=args.compile):
        pass

    print(f"{args.model}, {ids.size(1)} tokens of prompt, {dtype} on {device}".replace("torch.", ""))
    print(f"{question}\n\nWith the full cache:" if question else "\nWith the full cache:")
    full = answer(model, tokenizer, ids, None, args)[1]  # the full cache is freed before the next run
    header = f"\n{'':10}{'kept':>8}{'cache MiB':>11}{'prefill s':>11}{'GVote s':>9}{'tokens/s':>10}\n{'full':10}{full}"
    if args.no_gvote:
        print(header)
        return
    print(f"\nWith what {policy} keeps:")
    cache, row = answer(model, tokenizer, ids, policy, args)
    print(f"{header}\n{'GVote':10}{row}\n\nkept by layer  {chart(cache)}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows a question mark
    try:
        main()
    except BrokenPipeError:  # the reader left, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
