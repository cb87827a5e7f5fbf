"""Any policy of this repo on every model that kvpress supports, and in its pipeline and its evaluation."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import kvpress
import torch
from transformers import DynamicCache, Gemma3ForCausalLM
from transformers.models.phi3.modeling_phi3 import (
    apply_rotary_pos_emb,
)  # as the others', and for parts of a head too

from gvote import Policy


def queries(module, hidden, positions):  # as `Policy` describes them, of an attention module of transformers
    q, rope = kvpress.utils.get_prerope_query_states(module, hidden), module.rotary_emb
    kind = "" if hasattr(rope, "inv_freq") else f"{module.layer_type}_"  # Gemma 3 has two kinds of layers
    freq, scale = (
        getattr(rope, kind + name) for name in ("inv_freq", "attention_scaling")
    )  # rope() may change them
    angles = (positions[:, None] * freq.to(q.device).float()).repeat(1, 2)[None]  # (1, N, D)
    q, _ = apply_rotary_pos_emb(q, q, *((turn * scale).to(q.dtype) for turn in (angles.cos(), angles.sin())))
    return q * (
        module.scaling * q.size(-1) ** 0.5
    )  # policies divide by the root of D, Gemma by what its config says


@dataclass
class PolicyPress(kvpress.BasePress):
    """`with PolicyPress(GVote())(model): model(ids, past_key_values=cache)` masks in cache what the policy
    drops.

    Masked keys are hidden from later queries until the model reads another prompt; no memory is freed, as it
    is by `KVCache` in model.py. Layers with a sliding window are left alone. ValueError where masks would go
    wrong.
    """

    policy: Policy
    dropped: dict = field(
        default_factory=dict, init=False, repr=False
    )  # share of the last prompt's keys, by layer

    @property
    def compression_ratio(self):
        if not self.dropped or None in self.dropped.values():  # kvpress's evaluation sets what hasattr finds
            raise AttributeError("compression_ratio comes out of a prompt: none was read yet")
        return sum(self.dropped.values()) / len(self.dropped)

    @compression_ratio.setter
    def compression_ratio(self, value):
        raise AttributeError(f"compression_ratio cannot be set: {self.policy} finds it in a prompt")

    def post_init_from_model(self, model):
        if not isinstance(model, (*kvpress.SUPPORTED_MODELS, Gemma3ForCausalLM)):
            raise ValueError(f"{type(model).__name__} is not in kvpress.SUPPORTED_MODELS")
        config = model.config.get_text_config(decoder=True)
        if config._attn_implementation == "eager":
            raise ValueError(
                "eager attention ignores masked keys: load the model with attn_implementation='sdpa'"
            )
        windows = [layer.get_max_cache_shape() for layer in DynamicCache(config=config).layers]  # -1 for none
        self.dropped = dict.fromkeys(
            i for i, w in enumerate(windows) if not 0 < w < config.max_position_embeddings
        )
        if not self.dropped:
            raise ValueError("every layer has a sliding window: there is nothing to compress")

    def compress(self, module, hidden, keys, values, attentions, kwargs):
        if module.layer_idx not in self.dropped:
            return keys, values
        if not isinstance(cache := kwargs["past_key_values"], DynamicCache):
            raise ValueError(f"keys can be masked in a DynamicCache, not in a {type(cache).__name__}")
        if module.masked_key_indices is not None or keys.size(2) != hidden.size(1):
            raise ValueError("two presses compress the same prompt: use one")
        mask, position, index = (
            kwargs[name] for name in ("attention_mask", "position_ids", "cache_position")
        )
        if (
            (position != index).any()
            or isinstance(mask, torch.Tensor)
            and not mask.flatten(1)[:, -len(index) :].all()
        ):
            raise ValueError(
                "the prompts of a batch need one length, without padding, and positions from 0 on"
            )
        attn = SimpleNamespace(
            layer=module.layer_idx, queries=lambda x, at: queries(module, x.to(keys.dtype), at)
        )
        drop = torch.ones_like(keys[..., 0], dtype=torch.bool).masked_fill(
            self.policy(attn, hidden, keys, values), 0
        )
        self.dropped[module.layer_idx] = drop.float().mean().item()
        module.masked_key_indices = drop.nonzero(as_tuple=True)
        return keys, values
