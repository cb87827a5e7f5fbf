"""A Llama to read in one sitting. Its KV cache holds only the keys that a policy kept. Inference only.

Top to bottom: config, rotary embedding, modules, model, KV cache. A prompt and what follows it take two
paths: `read_prompt` attends within the prompt, and fills the cache with what a policy keeps; `read_tokens`
attends to the cache. Modules are named as in Hugging Face checkpoints, so weights load unchanged.

Shapes: B prompts, T tokens, C = n_embd channels, V = vocab_size; H = n_head query heads, H_kv = n_kv_head
key/value heads, each shared by a group of G = H / H_kv query heads; D = head_dim; N = B * H_kv.
"""

import json
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# the settings that have another name in a Hugging Face config.json
HF_NAMES = {
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size", "n_hidden": "intermediate_size", "context_length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps", "tied": "tie_word_embeddings",
}  # fmt: skip


@dataclass
class LlamaConfig:
    """The sizes of a Llama, by default SmolLM2-135M's. Raises ValueError for any that is wrong.

    n_hidden: channels inside the MLP. head_dim: if None, n_embd / n_head. rope_scaling: of Llama 3.1 and
    later, a value for each name in LLAMA3_ROPE. tied: the output projection is the embedding.
    """

    vocab_size: int = 49152
    n_layer: int = 30
    n_head: int = 9
    n_kv_head: int = 3
    n_embd: int = 576
    n_hidden: int = 1536
    head_dim: int | None = None
    context_length: int = 8192
    norm_eps: float = 1e-5
    rope_theta: float = 100_000.0
    rope_scaling: dict | None = None
    attention_bias: bool = False
    tied: bool = True

    def __post_init__(self):
        for field in fields(self):
            value, name = getattr(self, field.name), HF_NAMES.get(field.name, field.name)
            if field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}, expected true or false")
            kind = {int: numbers.Integral, float: numbers.Real}.get(field.type)
            if kind and not (isinstance(value, kind) and value > 0):
                raise ValueError(f"{name} is {value!r}, expected a positive number ({field.type.__name__})")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"{self.n_head} query heads cannot share {self.n_kv_head} key/value heads")
        if self.head_dim is None:
            self.head_dim = self.n_embd // self.n_head
        if not isinstance(self.head_dim, numbers.Integral) or self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim!r}, expected an even number")

    @classmethod
    def from_file(cls, path: Path) -> "LlamaConfig":
        """Reads a Hugging Face config.json. Raises ValueError for what this file does not implement."""
        raw = {name: value for name, value in read_json(path).items() if value is not None}
        # the second name is that of transformers before version 5
        rotary = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        rope_type = rotary.get("rope_type") or rotary.get("type") or "default"
        for name, found, known in (
            ("model_type", raw.get("model_type"), ("llama",)),
            ("hidden_act", raw.get("hidden_act", "silu"), ("silu", "swish")),
            ("rope_type", rope_type, ("default", "llama3")),
            ("partial_rotary_factor", rotary.get("partial_rotary_factor", 1), (1,)),
            ("mlp_bias", raw.get("mlp_bias", False), (False,)),
            ("quantization_config", raw.get("quantization_config"), (None,)),
        ):
            if found not in known:
                raise ValueError(f"{path}: {name} is {found!r}, expected {' or '.join(map(repr, known))}")
        defaults = {"head_dim": None, "attention_bias": False, "tie_word_embeddings": False}
        defaults["num_key_value_heads"] = raw.get("num_attention_heads")
        raw = defaults | raw
        raw["rope_theta"] = rotary.get("rope_theta", raw.get("rope_theta", 10_000.0))
        raw["rope_scaling"] = None
        try:
            if rope_type == "llama3":
                raw["rope_scaling"] = {name: float(rotary[name]) for name in LLAMA3_ROPE}
            return cls(**{field.name: raw[HF_NAMES.get(field.name, field.name)] for field in fields(cls)})
        except KeyError as error:
            raise ValueError(f"{path} lacks {error}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None


def rope(positions: Tensor, config: LlamaConfig, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """Rotary embedding (Su et al. 2021): cos and sin (T, D) for `rotate`, at positions (T,)."""
    channels = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    freq = config.rope_theta ** -(channels / config.head_dim)
    if config.rope_scaling:
        # slow turns are slowed down by `factor`, fast ones stay, those between blend
        factor, low, high, context = (config.rope_scaling[name] for name in LLAMA3_ROPE)
        fast = ((freq * context / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        freq = freq * (fast + (1 - fast) / factor)
    angles = positions[:, None] * freq  # (T, D/2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    # the sign is in sin, so that rotate only has to add
    return torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the head vectors of x (B, heads, T, D); the checkpoints pair channel i with channel i + D/2."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if not (torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() == self.in_features):
            return super().forward(x)
        # for one row on a CPU, compiled: BLAS would take 1.7 times as long on an AMD EPYC, as long on a Xeon
        y = (self.weight * x).sum(dim=-1, keepdim=True).mT  # (1, 1, channels out)
        return y if self.bias is None else y + self.bias


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): G query heads share one key/value head."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        n_q, n_kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.q_proj = Linear(config.n_embd, n_q, bias=config.attention_bias)
        self.k_proj = Linear(config.n_embd, n_kv, bias=config.attention_bias)
        self.v_proj = Linear(config.n_embd, n_kv, bias=config.attention_bias)
        self.o_proj = Linear(n_q, config.n_embd, bias=config.attention_bias)

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, heads * D) -> (B, heads, T, D)"""
        return x.view(*x.shape[:2], -1, self.config.head_dim).transpose(1, 2)

    def queries(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """This layer's queries (B, H, T, D) for any hidden states (B, T, C), rotated to positions (T,)."""
        queries = self.heads(self.q_proj(hidden.to(self.q_proj.weight.dtype)))
        return rotate(queries, *rope(positions.to(queries.device), self.config, queries.dtype))

    def project(self, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """hidden (B, T, C) -> rotated queries (B, H, T, D) and keys, and values (B, H_kv, T, D)."""
        queries = rotate(self.heads(self.q_proj(hidden)), *rotation)
        keys = rotate(self.heads(self.k_proj(hidden)), *rotation)
        return queries, keys, self.heads(self.v_proj(hidden))

    def read_prompt(self, hidden: Tensor, rotation, cache: "KVCache", policy: Callable) -> Tensor:
        """A prompt's tokens attend to one another; the policy chooses which of their keys go to the cache."""
        queries, keys, values = self.project(hidden, rotation)
        y = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        # it copies what is kept: keys and values themselves are freed on return
        cache.fill(self.layer, keys, values, policy(self, hidden, keys, values))
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def read_tokens(self, hidden: Tensor, rotation, table: "Table", slots: Tensor, n_used: int) -> Tensor:
        """Tokens after the prompt join the layer's table, and attend to what it holds.

        `Table.attend` explains slots and n_used, which say where in the table their places are.
        """
        y = table.attend(*self.project(hidden, rotation), slots, n_used)
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

    def read_prompt(self, x: Tensor, rotation, cache: "KVCache", policy: Callable) -> Tensor:
        x = x + self.self_attn.read_prompt(self.input_layernorm(x), rotation, cache, policy)
        return x + self.mlp(self.post_attention_layernorm(x))

    def read_tokens(self, x: Tensor, rotation, table: "Table", slots: Tensor, n_used: int) -> Tensor:
        x = x + self.self_attn.read_tokens(self.input_layernorm(x), rotation, table, slots, n_used)
        return x + self.mlp(self.post_attention_layernorm(x))


def keep_all(attn: Attention, hidden: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The policy that drops nothing."""
    return torch.ones_like(keys[..., 0], dtype=torch.bool)


def just_run(function: Callable, *args) -> Tensor:
    return function(*args)


class Llama(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.requires_grad_(False)

    def forward(
        self,
        ids: Tensor,
        cache: "KVCache | None" = None,
        policy: Callable | None = None,
        all_logits: bool = False,
        call: Callable | None = None,
    ) -> Tensor:
        """Logits after the last token of ids (B, T): (B, 1, V); with all_logits after each, (B, T, V).

        With a cache, ids continue at position cache.length and are added to it. With a policy (see `Policy`
        in gvote.py) the cache must be new and ids are the prompt. Each layer copies what the policy keeps
        into the cache, and its other keys are freed before the next layer makes its own. The prompt's own
        logits do not depend on the policy.

        call(function, *args) runs the parts of a step that reads one token after the prompt: read_tokens of
        each block, and then lm_head. `compiled_call` in generate.py compiles them.

        Raises ValueError where ids, cache, policy and the model's context do not fit each other.
        """
        if ids.dim() != 2 or ids.size(1) == 0:
            raise ValueError(f"ids are {tuple(ids.shape)}, expected (B, T) with at least one token")
        if policy is not None and (cache is None or cache.length > 0):
            raise ValueError("a policy compresses the prompt: pass it with the prompt and a new KVCache")
        cache = cache or KVCache(self.config, len(ids), max_new_tokens=0)
        start, end = cache.length, cache.length + ids.size(1)
        if end > self.config.context_length:
            raise ValueError(f"{end} tokens exceed the model's context of {self.config.context_length}")
        if cache.batch_size != len(ids):
            raise ValueError(f"{len(ids)} prompts do not fit a cache with batch_size={cache.batch_size}")
        if start > 0 and end - cache.prompt_length > cache.max_new_tokens:
            made, needed = cache.max_new_tokens, end - cache.prompt_length
            raise ValueError(f"the cache is full: made with max_new_tokens={made}, this needs {needed}")
        positions = torch.arange(start, end, device=ids.device)
        x = self.embed_tokens(ids)  # (B, T, C)
        rotation = rope(positions, self.config, x.dtype)
        if call is None or start == 0 or ids.size(1) > 1:
            call = just_run
        if start == 0:
            for block in self.layers:
                x = block.read_prompt(x, rotation, cache, policy or keep_all)
        else:
            slots, n_used = positions - cache.prompt_length, end - cache.prompt_length
            for block, table in zip(self.layers, cache.layers, strict=True):
                x = call(block.read_tokens, x, rotation, table, slots, n_used)
        logits = call(self.lm_head, self.norm(x if all_logits else x[:, -1:]))
        # last, so that an interrupted call can be repeated: it would write the same rows
        cache.advance(ids.size(1))
        return logits

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype=torch.float32, device="cpu") -> "Llama":
        """Loads a Hugging Face checkpoint from a folder: config.json and *.safetensors, never a pickle.

        Raises ValueError or OSError, naming the file or the weight and what was expected, for other
        architectures and for what is missing, cut short, superfluous or misshapen. The default model's
        weights had 4 bits before they became float16: every result of this repo is one of a 4-bit model.
        """
        from safetensors import SafetensorError, safe_open

        folder, weights = Path(folder), {}
        config, index = LlamaConfig.from_file(folder / "config.json"), folder / "model.safetensors.index.json"
        files = ["model.safetensors"]
        # an index beside the single file is a leftover: transformers does not read it either
        if index.exists() and not (folder / files[0]).exists():
            file_of = read_json(index).get("weight_map")
            if not isinstance(file_of, dict):
                raise ValueError(f"{index} lacks weight_map, which says in which file a weight is")
            files = sorted(set(file_of.values()))
        for file in files:
            try:
                with safe_open(folder / file, framework="pt") as tensors:
                    for name in tensors.keys():
                        # old files hold frequencies, torch.compile puts _orig_mod before names
                        if not name.endswith("rotary_emb.inv_freq"):
                            ours = name.replace("_orig_mod.", "").removeprefix("model.")
                            weights[ours] = tensors.get_tensor(name).to(device, dtype)
            except SafetensorError as error:
                raise ValueError(f"{folder / file} is damaged ({error}): delete {folder}") from None
        embedding = weights.get("embed_tokens.weight")
        if config.tied and embedding is not None:
            # a projection of the file's own is used if it differs from the embedding, as in transformers 5
            config.tied = torch.equal(weights.setdefault("lm_head.weight", embedding), embedding)
        # on "meta" the model has shapes only: the weights become its parameters
        with torch.device("meta"):
            model = cls(config)
        try:
            model.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            # it names all that is missing, misshapen or too much
            raise ValueError(f"{folder}: {error}") from None
        if config.tied:
            # assigned, they are two parameters
            model.lm_head.weight = model.embed_tokens.weight
        return model


# Compiled attention reads a table in blocks of so many rows.
BLOCK = 32


class Table:
    """One layer's cache: the rows of N heads (of all prompts), head after head, a key and a value a row.

    Heads keep different numbers of keys. A dense (H_kv, T, D) tensor would pad them all to the longest; here
    a dropped key is a row that does not exist. Each head has one row per key that it kept of the prompt, and
    then its room: `room` rows, one per token after the prompt, written in place as the tokens come. Two heads
    with room for 3 tokens, of which 2 have been read:

                  head 0, kept[0] = 6          head 1, kept[1] = 1
        keys    | k  k  k  k  k  k  n  n  .  | k  n  n  .  |
        row       0  1  2  3  4  5  6  7  8    9  10 11 12
                  |                 |          |  |
                  first_row[0] = 0  |          |  first_new[1] = 10
                  first_new[0] = 6             first_row[1] = 9

        k  a kept key of the prompt; positions, with one number per k, says which token's it is
        n  a new token's key         .  still empty
    """

    # a cache made in inference mode can be used outside of it too
    @torch.inference_mode(False)
    def __init__(self, keys: Tensor, values: Tensor, keep: Tensor, room: int):
        # a prompt's keys and values (B, H_kv, T, D), and which of them to keep: (B, H_kv, T) bool
        head_of_key, positions = keep.flatten(0, 1).nonzero(as_tuple=True)
        n_kept = keep.sum(dim=2).flatten()  # (N,)
        self.first_row = (n_kept + room).cumsum(0) - (n_kept + room)
        self.first_new = self.first_row + n_kept
        self.room, self.kept, self.positions = room, n_kept.tolist(), positions.int()
        # whole blocks, only the last of which is padded; zeros, as what is masked gets multiplied by 0
        n_rows = len(positions) + room * len(n_kept)
        shape = (math.ceil(n_rows / BLOCK), BLOCK, keys.size(-1))
        self.keys, self.values = keys.new_zeros(shape), values.new_zeros(shape)
        # a kept key lies behind all that were kept before it, and behind the rooms of the heads before
        rows = torch.arange(len(positions), device=keys.device) + room * head_of_key
        self.keys.flatten(0, 1)[rows], self.values.flatten(0, 1)[rows] = keys[keep], values[keep]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, slots: Tensor, n_used: int) -> Tensor:
        """Writes new tokens' keys and values (B, H_kv, T, D) into each head's room. Their queries then attend
        to all that the head holds. Queries, and the attention's output, which is returned: (B, H, T, D).

        slots (T,): the tokens' places in the room, from 0 for the first token after the prompt. n_used: how
        many places are taken by then, slots[-1] + 1, as a number, since to read it from a GPU is to wait.
        """
        all_keys, all_values = self.keys.flatten(0, 1), self.values.flatten(0, 1)  # (rows, D)
        rows = self.first_new[:, None] + slots  # (N, T)
        all_keys[rows], all_values[rows] = keys.flatten(0, 1), values.flatten(0, 1)
        if torch.compiler.is_compiling() and queries.size(2) == 1:
            return self.flex_attend(queries, all_keys, all_values, slots)
        n_group, n_tokens = queries.size(1) // keys.size(1), queries.size(2)
        # a group is G heads of T rows each; but one token in half precision is one head of G rows, since SDPA
        # on a CPU repacks half-precision keys for each head
        one_head = n_tokens == 1 and queries.dtype != torch.float32
        shape = (1, n_group) if one_head else (n_group, n_tokens)
        y, first = [], 0
        for group, kept in zip(queries.reshape(len(self.kept), 1, *shape, -1), self.kept, strict=True):
            n_rows = kept + n_used
            key, value = (x[None, None, first : first + n_rows] for x in (all_keys, all_values))
            visible = None
            if n_tokens > 1:
                # the last rows are the new tokens': each token sees the rows up to its own
                visible = torch.ones(n_tokens, n_rows, dtype=torch.bool, device=queries.device)
                visible = visible.tril(n_rows - n_tokens)
            y.append(F.scaled_dot_product_attention(group, key, value, visible, enable_gqa=True))
            first += kept + self.room
        return torch.cat(y).view_as(queries)

    def flex_attend(self, queries: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> Tensor:
        """One new token's attention, compiled; keys and values (rows, D) of all heads. One kernel serves all
        heads, and each reads the blocks that hold its rows. A mask hides other heads' rows in these blocks.

        Each of the N heads is passed as a prompt of one head, and its G queries as that prompt's tokens: for
        this shape inductor has a kernel for decoding (flex_decoding.py lists the conditions). It never ran on
        a GPU. What is known: inductor's code for an H100 compiles, is one kernel a layer, fits a CUDA graph,
        and, run by Triton's interpreter, is within 5e-7 of eager float32 code.
        """
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        def own_row(head: Tensor, _: Tensor, query: Tensor, row: Tensor) -> Tensor:
            return (row >= self.first_row[head]) & (row <= self.first_new[head] + slots[0])

        n_blocks, first_block = self.keys.size(0), self.first_row // BLOCK
        n_read = (self.first_new + slots) // BLOCK - first_block + 1  # (N,)
        blocks = first_block[:, None] + torch.arange(n_blocks, device=slots.device)  # the first n_read count
        groups = queries.reshape(len(self.kept), 1, -1, queries.size(-1))  # (N, 1, G, D)
        mask = BlockMask.from_kv_blocks(
            n_read.int()[:, None, None],
            blocks.clamp(max=n_blocks - 1).int()[:, None, None],  # (N, 1, 1, blocks)
            BLOCK_SIZE=(128, BLOCK),
            mask_mod=own_row,
            seq_lengths=(groups.size(2), n_blocks * BLOCK),
            compute_q_blocks=False,
        )
        return flex_attention(groups, keys[None, None], values[None, None], block_mask=mask).view_as(queries)

    @property
    def nbytes(self) -> int:
        tensors = (self.keys, self.values, self.positions, self.first_row, self.first_new)
        return sum(x.untyped_storage().nbytes() for x in tensors)


class KVCache:
    """The keys and values of B prompts of one length, in one `Table` per layer.

    max_new_tokens is the room for what follows the prompt, which may be several turns: the cache does not
    grow. Raises ValueError, with the value, for a size that makes no sense.
    """

    def __init__(self, config: LlamaConfig, batch_size: int = 1, max_new_tokens: int = 256):
        for name, size, least in (("batch_size", batch_size, 1), ("max_new_tokens", max_new_tokens, 0)):
            if not (isinstance(size, numbers.Integral) and size >= least):
                raise ValueError(f"{name} must be a whole number of at least {least}, got {size!r}")
        self.config, self.batch_size, self.max_new_tokens = config, batch_size, max_new_tokens
        # length: how many tokens have been read, so also the next token's position
        self.length = self.prompt_length = 0
        self.layers: list[Table | None] = [None] * config.n_layer

    def fill(self, layer: int, keys: Tensor, values: Tensor, keep: Tensor):
        """Keeps a prompt's rotated keys and its values (B, H_kv, T, D) where keep (B, H_kv, T) is True."""
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != keys.shape[:3]:
            found = f"{keep.dtype} {tuple(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
            raise ValueError(f"a policy's mask is {found}, expected torch.bool {tuple(keys.shape[:3])}")
        room = min(self.max_new_tokens, self.config.context_length - keep.size(2))
        self.layers[layer] = Table(keys, values, keep.to(keys.device), room)

    def advance(self, n_tokens: int):
        """Counts tokens that all layers have read, the prompt first. A negative number takes back tokens
        after the prompt. Raises ValueError if it is larger than there are."""
        if self.length + n_tokens < self.prompt_length:
            raise ValueError(f"{-n_tokens} tokens cannot be taken back: that is part of the prompt")
        self.length += n_tokens
        self.prompt_length = self.prompt_length or self.length

    @property
    def nbytes(self) -> int:
        """Bytes allocated, rows still empty and bookkeeping included."""
        return sum(table.nbytes for table in self.layers if table is not None)

    @property
    def kept(self) -> Tensor:
        """How many keys of the prompt each head kept, summed over the batch: (n_layer, H_kv), on the CPU."""
        if self.length == 0:
            raise ValueError("the cache is empty: nothing is kept before a prompt is read")
        kept = torch.tensor([table.kept for table in self.layers], device="cpu")  # (n_layer, N)
        return kept.unflatten(1, (self.batch_size, -1)).sum(dim=1)

    @property
    def usage(self) -> float:
        """The share of the prompt's keys that was kept, over all layers, heads and prompts."""
        return self.kept.sum().item() / (self.kept.numel() * self.batch_size * self.prompt_length)

    def kept_positions(self, layer: int, kv_head: int, prompt: int = 0) -> Tensor:
        """Which of the prompt's positions this head kept, ascending."""
        table, head = self.layers[layer], prompt * self.config.n_kv_head + kv_head
        return table.positions.split(table.kept)[head].cpu()


def read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from None
