"""A Llama to read in one sitting, with a KV cache in which every head holds only the keys it kept. Inference only.

Top to bottom: config, rotary embedding, modules, model, KV cache. Modules are named as in Hugging Face checkpoints, so
weights load unchanged.

Shapes: B prompts, T tokens, C = n_embd channels; H = n_head query heads, H_kv = n_kv_head key/value heads, each shared
by a group of G = H / H_kv query heads; D = head_dim; V = vocab_size. In a cache, N = B * H_kv heads, and P pages.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def rope(positions: Tensor, config: LlamaConfig, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """Rotary embedding (Su et al. 2021): what `rotate` needs to turn a head to positions (T,), cos and sin (T, D)."""
    freq = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim)
    if llama3 := config.rope_scaling:  # slow turns are slowed down by `factor`, fast ones stay, those between blend
        turns = freq * llama3["original_max_position_embeddings"] / (2 * math.pi)
        low, high = llama3["low_freq_factor"], llama3["high_freq_factor"]
        fast = ((turns - low) / (high - low)).clamp(0, 1)
        freq = freq * (fast + (1 - fast) / llama3["factor"])
    angles = positions[:, None] * freq  # (T, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=1).to(dtype), torch.cat((-sin, sin), dim=1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the head vectors of x (B, heads, T, D); the checkpoints pair channel i with channel i + D/2."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if not (torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() == self.in_features):
            return super().forward(x)
        # compiled for a single row on a CPU, products and a sum: BLAS took as long on an Intel Xeon, and in all a step
        # with it 1.7 times as long on an AMD EPYC
        y = (self.weight * x).sum(dim=-1, keepdim=True).mT  # (1, 1, channels out)
        return y if self.bias is None else y + self.bias


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
        """(B, T, heads * D) -> (B, heads, T, D)"""
        return x.view(*x.shape[:2], -1, self.config.head_dim).transpose(1, 2)

    def queries(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """This layer's queries (B, H, N, D) for any hidden states (B, N, C), rotated to positions (N,)."""
        queries = self.heads(self.q_proj(hidden.to(self.q_proj.weight.dtype)))
        return rotate(queries, *rope(positions, self.config, queries.dtype))

    def forward(self, hidden: Tensor, rotation, table=None, new=None, n_new=None, cache=None, policy=None) -> Tensor:
        """hidden (B, T, C) -> (B, T, C). rotation: of its positions, from `rope`.

        The prompt: attends to itself, and fills this layer of the cache, if there is one, with what the policy keeps.
        Later tokens: join the layer's table, and attend to what is in it; new and n_new as for `Table.attend`.
        """
        q = rotate(self.heads(self.q_proj(hidden)), *rotation)  # (B, H, T, D)
        k = rotate(self.heads(self.k_proj(hidden)), *rotation)  # (B, H_kv, T, D)
        v = self.heads(self.v_proj(hidden))
        if table is not None:
            y = table.attend(q, k, v, new, n_new)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            if cache is not None:
                keep = torch.ones_like(k[..., 0], dtype=torch.bool) if policy is None else policy(self, hidden, k, v)
                cache.fill(self.layer, k, v, keep)
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

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *args, **kwargs)
        return x + self.mlp(self.post_attention_layernorm(x))


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
        call: Callable = nn.Module.__call__,
    ) -> Tensor:
        """Logits after the last token of ids (B, T), as (B, 1, V); with all_logits after every token, (B, T, V).

        With a cache, ids continue at position cache.length and join it. With a policy (see `Policy` in gvote.py) the
        cache must be new and ids are the prompt: each layer keeps only what the policy selects, right after its own
        attention, so at no time do two layers hold all their keys. The prompt's own logits do not depend on the policy.
        Single tokens after the prompt go through call(module, *args), which may be a compiled one: `compiled_call` in
        generate.py. Raises ValueError where ids, cache, policy and the model's context do not fit each other.
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
        x = self.embed_tokens(ids)  # (B, T, C)
        rotation = rope(positions, self.config, x.dtype)
        if start == 0:
            for block in self.layers:
                x = block(x, rotation, cache=cache, policy=policy)
        else:
            call = call if ids.size(1) == 1 else nn.Module.__call__
            cache.reserve(ids.size(1))
            new, n_new = positions - cache.prompt_length, start + ids.size(1) - cache.prompt_length
            for block, table in zip(self.layers, cache.layers, strict=True):
                x = call(block, x, rotation, table, new, n_new)
        if cache is not None:
            cache.advance(ids.size(1))
        x = self.norm(x if all_logits else x[:, -1:])
        return call(self.lm_head, x) if x.size(1) == 1 else self.lm_head(x)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype=torch.float32, device="cpu") -> "Llama":
        """Loads a Hugging Face checkpoint from a folder: config.json and *.safetensors, never a pickle.

        Raises ValueError or OSError, naming the file or the weight and what was expected, for other architectures and
        for what is missing, cut short, superfluous or misshapen.
        """
        from safetensors import SafetensorError, safe_open

        folder = Path(folder)
        with torch.device("meta"):  # shapes only: the weights loaded below become the parameters
            model = cls(LlamaConfig.from_file(folder / "config.json"))
        index = folder / "model.safetensors.index.json"
        files = read_json(index).get("weight_map", {}).values() if index.exists() else ["model.safetensors"]
        weights = {}
        for file in sorted(set(files)):
            try:
                with safe_open(folder / file, framework="pt") as tensors:
                    for name in tensors.keys():
                        if not name.endswith("rotary_emb.inv_freq"):  # in old files, computed here
                            weights[name.removeprefix("model.")] = tensors.get_tensor(name).to(device, dtype)
            except SafetensorError as error:
                raise ValueError(f"{folder / file} is damaged or cut short ({error}): fetch it again") from None
        if model.config.tied and "embed_tokens.weight" in weights:  # of which some files hold a copy
            weights["lm_head.weight"] = weights["embed_tokens.weight"]
        try:
            model.load_state_dict(weights, assign=True)
        except RuntimeError as error:  # it names all that is missing, misshapen or too much
            raise ValueError(f"{folder}: {error}") from None
        if model.config.tied:  # assigned, they would be two parameters
            model.lm_head.weight = model.embed_tokens.weight
        return model


PAGE = 32  # rows: more waste memory at a head's end (64: 4% of 1,000 rows, 32: 2%), and were no faster on a CPU


class Table:
    """One layer's cache: the rows of N heads (of all prompts) in one tensor, head after head, a key and a value a row.

    Heads keep different numbers of keys; to attention they are what sequences of different length are to a serving
    engine, a ragged batch (as in PagedAttention, Kwon et al. 2023). A dense (H_kv, T, D) tensor would pad them all to
    the longest; here a dropped key is a row that is not there. A head's rows fill whole pages: first what it kept of
    the prompt, then the tokens to come, allocated in advance and written in place.
    """

    @torch.inference_mode(False)  # a cache made in inference mode can be used outside of it too
    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor, kept: Tensor, filled: int, reserved: int):
        # keys, values (rows, D): of each head, one head after the other, what it kept and `filled` tokens after it
        # positions: of the kept keys, one head after the other; kept (N,): how many these are, on the CPU
        # reserved: tokens after the prompt to have rows for
        n_pages = (kept + reserved + PAGE - 1) // PAGE
        first = PAGE * (n_pages.cumsum(0) - n_pages)  # (N,), a head's first row
        shape = (int(n_pages.sum()), PAGE, keys.size(-1))
        self.kept, self.reserved, self.starts, self.positions = kept.tolist(), reserved, first.tolist(), positions.int()
        self.ends = (first + kept).to(keys.device)  # (N,), the row of a head's first token after the prompt
        self.first_page = (first // PAGE).int().to(keys.device)  # (N,)
        self.keys, self.values = keys.new_zeros(shape), values.new_zeros(shape)
        rows = self.rows(filled)
        self.keys.view(-1, shape[-1])[rows], self.values.view(-1, shape[-1])[rows] = keys, values

    def rows(self, filled: int) -> Tensor:
        """The rows of each head, one head after the other: what it kept, and `filled` tokens after it."""
        counts = torch.tensor(self.kept) + filled
        shift = torch.tensor(self.starts) - counts.cumsum(0) + counts
        return (torch.arange(int(counts.sum())) + shift.repeat_interleave(counts)).to(self.keys.device)

    def grown(self, reserved: int) -> "Table":
        """A copy with rows for more tokens after the prompt."""
        rows = self.rows(self.reserved)
        keys, values = (x.flatten(0, 1)[rows] for x in (self.keys, self.values))
        return Table(keys, values, self.positions, torch.tensor(self.kept), self.reserved, reserved)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, new: Tensor, n_new: int) -> Tensor:
        """Adds new tokens' keys and values (B, H_kv, T, D); their queries (B, H, T, D) attend, the result is like them.

        new (T,): a token's number, where the first token after the prompt has 0. n_new: how many there are by now.
        """
        all_keys, all_values = self.keys.flatten(0, 1), self.values.flatten(0, 1)  # (rows, D)
        rows = self.ends[:, None] + new  # (N, T)
        all_keys[rows], all_values[rows] = keys.flatten(0, 1), values.flatten(0, 1)
        if torch.compiler.is_compiling():
            return self.flex_attend(queries, new)
        # a group's queries are heads of their own in float32, which spread over the cores; in half precision they are
        # rows of one head, because SDPA on a CPU repacks the keys for every head there
        n_group, n_tokens = queries.size(1) // keys.size(1), queries.size(2)
        shape = (n_group, n_tokens) if queries.dtype == torch.float32 else (1, n_group * n_tokens)
        y, visible = [], None  # a single token sees all rows
        for n, group in enumerate(queries.reshape(len(self.starts), 1, *shape, -1)):
            first, last = self.starts[n], self.starts[n] + self.kept[n] + n_new
            if n_tokens > 1:  # the last rows are theirs: each sees those before it
                visible = torch.ones(n_tokens, last - first, dtype=torch.bool, device=new.device)
                visible = visible.tril(last - first - n_tokens).repeat(shape[1] // n_tokens, 1)
            key, value = (x[None, None, first:last] for x in (all_keys, all_values))
            y.append(F.scaled_dot_product_attention(group, key, value, visible, enable_gqa=True))
        return torch.cat(y).view_as(queries)

    def flex_attend(self, queries: Tensor, new: Tensor) -> Tensor:
        """One new token's attention, compiled: a single kernel for all heads, each of which reads its own pages.

        On a GPU inductor takes its kernel for decoding (flex_decoding.py) if there are fewer than 128 query rows, if
        the numbers of prompts and heads are known when it compiles, if the mask has one head, if query heads that share
        keys are a power of two, and if its tile of 64 keys, or fewer, divides PAGE. So each of the N heads is a prompt
        of its own with one head, and a group's G queries are its query rows. None was at hand: never run there.
        """
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        def visible(n: Tensor, head: Tensor, query: Tensor, row: Tensor) -> Tensor:
            return row <= self.ends[n] + new[0]

        groups = queries.reshape(len(self.ends), 1, -1, queries.size(-1))  # (N, 1, G, D)
        n_pages = self.keys.size(0)
        used = (self.ends + new) // PAGE - self.first_page + 1  # (N,)
        pages = (self.first_page[:, None] + torch.arange(n_pages, device=new.device)).clamp(max=n_pages - 1)  # (N, P)
        mask = BlockMask.from_kv_blocks(
            used.int()[:, None, None],
            pages.int()[:, None, None],
            BLOCK_SIZE=(128, PAGE),
            mask_mod=visible,
            seq_lengths=(groups.size(2), n_pages * PAGE),
            compute_q_blocks=False,  # those are for training
        )
        keys, values = (x.flatten(0, 1)[None, None] for x in (self.keys, self.values))
        return flex_attention(groups, keys, values, block_mask=mask).view_as(queries)

    @property
    def nbytes(self) -> int:
        tensors = (self.keys, self.values, self.positions, self.ends, self.first_page)
        return sum(x.untyped_storage().nbytes() for x in tensors)


class KVCache:
    """The keys and values of B prompts of one length, in every layer; a head holds only those its policy kept.

    max_new_tokens is the room allocated for what follows the prompt. Should it run out, the cache grows by itself.
    Raises ValueError, with the value, for a size that makes no sense.
    """

    def __init__(self, config: LlamaConfig, batch_size: int = 1, max_new_tokens: int = 256):
        for name, size, least in (("batch_size", batch_size, 1), ("max_new_tokens", max_new_tokens, 0)):
            if not (isinstance(size, int) and size >= least):
                raise ValueError(f"{name} must be a whole number of at least {least}, got {size!r}")
        self.config, self.batch_size, self.max_new_tokens = config, batch_size, max_new_tokens
        self.length = self.prompt_length = 0  # length: tokens read, so also the next token's position
        self.layers: list[Table | None] = [None] * config.n_layer

    def fill(self, layer: int, keys: Tensor, values: Tensor, keep: Tensor):
        """Keeps a prompt's rotated keys and its values (B, H_kv, T, D) where keep (B, H_kv, T) is True."""
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != keys.shape[:3]:
            found = f"{keep.dtype} {tuple(keep.shape)}" if isinstance(keep, Tensor) else type(keep).__name__
            raise ValueError(f"a policy's mask is {found}, expected torch.bool {tuple(keys.shape[:3])}")
        reserved = min(self.max_new_tokens, self.config.context_length - keep.size(2))
        kept, positions = keep.sum(dim=2).flatten().cpu(), keep.nonzero()[:, 2]
        self.layers[layer] = Table(keys[keep], values[keep], positions, kept, 0, reserved)

    def reserve(self, n_tokens: int):
        """Sees to it that every layer has rows for n_tokens more."""
        n_new = self.length - self.prompt_length
        for layer, table in enumerate(self.layers):
            if table.reserved < n_new + n_tokens:  # each by itself: an interrupted step may be followed by any other
                reserved = n_new + max(n_tokens, self.max_new_tokens)
                self.layers[layer] = table.grown(min(reserved, self.config.context_length - self.prompt_length))

    def advance(self, n_tokens: int):
        """Counts tokens that every layer has read; the first ones are the prompt. A negative number takes them back."""
        self.length += n_tokens
        self.prompt_length = self.prompt_length or self.length

    @property
    def nbytes(self) -> int:
        """Bytes allocated, rows still empty and bookkeeping included."""
        return sum(table.nbytes for table in self.layers if table is not None)

    @property
    def kept(self) -> Tensor:
        """How many of the prompt's keys each KV head kept, summed over the batch: (n_layer, H_kv), on the CPU."""
        if self.length == 0:
            raise ValueError("the cache is empty: nothing is kept before a prompt is read")
        return torch.tensor([table.kept for table in self.layers]).unflatten(1, (self.batch_size, -1)).sum(dim=1)

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
