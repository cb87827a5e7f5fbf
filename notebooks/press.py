"""For notebook 6: any policy of this repo on every model that kvpress supports. Writes nothing.

A `PolicyPress` also works in kvpress' pipeline and in its evaluation.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import kvpress
import torch
from transformers import DynamicCache, Gemma3ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# as the other models', and for parts of a head too
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

from gvote import Policy


def queries(module, hidden, positions):
    """As `Policy` describes them, of an attention module of transformers."""
    q, rope = kvpress.utils.get_prerope_query_states(module, hidden), module.rotary_emb
    # Gemma 3 has two kinds of layers
    kind = "" if hasattr(rope, "inv_freq") else f"{module.layer_type}_"
    # a call of rope() may change these
    freq, scale = (getattr(rope, kind + name) for name in ("inv_freq", "attention_scaling"))
    angles = (positions.to(q.device)[:, None] * freq.to(q.device).float()).repeat(1, 2)[None]  # (1, N, D)
    q, _ = apply_rotary_pos_emb(q, q, *((turn * scale).to(q.dtype) for turn in (angles.cos(), angles.sin())))
    # policies divide by the root of D, Gemma by what its config says
    return q * (module.scaling * q.size(-1) ** 0.5)


def hide(policy, module, hidden, keys, values):
    """Hides what a policy drops of a layer's keys (B, H_kv, T, D) from later queries. Returns its share."""

    def layer_queries(hidden, positions):
        return queries(module, hidden.to(keys.dtype), positions)

    attn = SimpleNamespace(layer=module.layer_idx, queries=layer_queries)
    # a policy may make its mask and its positions on the CPU, as in model.py
    keep = policy(attn, hidden, keys, values).to(keys.device)
    drop = torch.ones_like(keys[..., 0], dtype=torch.bool).masked_fill(keep, 0)
    # kvpress gives these keys no attention
    module.masked_key_indices = drop.nonzero(as_tuple=True)
    return drop.float().mean().item()


@dataclass
class PolicyPress(kvpress.BasePress):
    """`with PolicyPress(GVote())(model): model(ids, past_key_values=cache)` masks in cache what the policy
    drops.

    Masked keys are hidden from later queries until the model reads another prompt; no memory is freed, as it
    is by `KVCache` in model.py. Layers with a sliding window are left alone. ValueError where masks would go
    wrong.
    """

    policy: Policy
    # by layer: the share of the last prompt's keys
    dropped: dict = field(default_factory=dict, init=False, repr=False)

    @property
    def compression_ratio(self):
        # kvpress' evaluation sets what hasattr finds, which must not be this one
        if not self.dropped or None in self.dropped.values():
            raise AttributeError("compression_ratio comes out of a prompt: none was read yet")
        return sum(self.dropped.values()) / len(self.dropped)

    @compression_ratio.setter
    def compression_ratio(self, value):
        raise AttributeError(f"compression_ratio cannot be set: {self.policy} finds it in a prompt")

    def post_init_from_model(self, model):
        if not isinstance(model, (*kvpress.SUPPORTED_MODELS, Gemma3ForCausalLM)):
            raise ValueError(f"{type(model).__name__} is not in kvpress.SUPPORTED_MODELS")
        config = model.config.get_text_config(decoder=True)
        # masks work in the functions that kvpress patched when it was imported: not in eager attention, and
        # not in one that was registered later, as those of kernels-community are
        function = ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation)
        if function is None or function.__module__ != kvpress.attention_patch.__name__:
            found = f"{config._attn_implementation} attention ignores masked keys"
            raise ValueError(f"{found}: load the model with attn_implementation='sdpa'")
        windows = [layer.get_max_cache_shape() for layer in DynamicCache(config=config).layers]  # -1 for none
        free = [i for i, w in enumerate(windows) if not 0 < w < config.max_position_embeddings]
        if not free:
            raise ValueError("every layer has a sliding window: there is nothing to compress")
        self.dropped = dict.fromkeys(free)

    def compress(self, module, hidden, keys, values, attentions, kwargs):
        if module.layer_idx not in self.dropped:
            return keys, values
        if not isinstance(cache := kwargs["past_key_values"], DynamicCache):
            raise ValueError(f"keys can be masked in a DynamicCache, not in a {type(cache).__name__}")
        if module.masked_key_indices is not None or keys.size(2) != hidden.size(1):
            raise ValueError("two presses compress the same prompt: use one")
        mask, position, index = map(kwargs.get, ("attention_mask", "position_ids", "cache_position"))
        padded = isinstance(mask, torch.Tensor) and not mask.flatten(1)[:, -len(index) :].all()
        if padded or (position != index).any():
            needed = "one length, without padding, and positions from 0 on"
            raise ValueError(f"the prompts of a batch need {needed}")
        self.dropped[module.layer_idx] = hide(self.policy, module, hidden, keys, values)
        return keys, values
