"""press.py: what a press keeps, on every family of models that kvpress supports, and its errors."""

import math

import pytest
import torch

import baselines
from generate import (
    DEFAULT,
    checkpoint_folder,
)
from gvote import GVote, PeakVotes
from model import KVCache, Llama
from test_gvote import random_ids

# What makes queries differ between families: other frequencies from position 64 on, or by the kind of layer;
# heads that are rotated in part; query norms; a scale. Layers with a window are left alone, unless all fits
# it (512).
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
LONGROPE |= {"rope_theta": 1e4, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
HYBRID = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 16}
GEMMA = HYBRID | {"query_pre_attn_scalar": 8, "rope_parameters": {"full_attention": LINEAR}}
FAMILIES = [
    ("Llama", {}),
    ("Mistral", {"sliding_window": None}),
    ("Phi3", {"sliding_window": 512, "rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    ("Phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}),
    ("Qwen2", HYBRID | {"use_sliding_window": True}),
    ("Qwen3", {}),
    ("Gemma3", GEMMA),
    ("Gemma3Text", GEMMA),
]


def hf_model(family: str, **settings):
    import transformers

    heads = dict(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    sizes = dict(vocab_size=49152, hidden_size=128, intermediate_size=64, max_position_embeddings=512)
    sizes |= heads | {"pad_token_id": 0} | settings
    if family == "Gemma3":
        vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        vision["image_size"] = 14
        sizes = dict(text_config=sizes, vision_config=vision, mm_tokens_per_image=1)
    name = {"Gemma3": "Gemma3ForConditionalGeneration", "Gemma3Text": "Gemma3ForCausalLM"}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, name.get(family, f"{family}ForCausalLM"))(config)
    for weight in model.parameters():
        # large enough for uneven attention
        torch.nn.init.normal_(weight, std=0.3 if weight.dim() > 1 else 2.0)
    return model.eval().requires_grad_(False)


def press_masks(press, model, ids, cache=None, **kwargs) -> list:
    """What the press keeps of prompts, by layer: masks like a policy's, None where it left the layer
    alone."""
    from transformers import DynamicCache

    cache, masks = DynamicCache() if cache is None else cache, []
    with torch.no_grad(), press(model):
        model(ids, past_key_values=cache, **kwargs)
    layers = getattr(model.model, "language_model", model.model).layers
    for layer, kept in zip(layers, cache.layers, strict=True):
        dropped = layer.self_attn.masked_key_indices
        masks.append(None if dropped is None else torch.ones(kept.keys.shape[:3], dtype=torch.bool))
        if dropped is not None:
            masks[-1][dropped] = False
    return masks


@pytest.fixture(scope="module")
def ours_and_theirs(tmp_path_factory) -> tuple:
    """A tiny model as this repo reads it, and as transformers does."""
    folder, theirs = tmp_path_factory.mktemp("tiny"), hf_model("Llama")
    theirs.save_pretrained(folder)
    return Llama.from_pretrained(folder), theirs


@pytest.mark.parametrize("policy", [GVote(), GVote(budget="current_query"), PeakVotes()])
def test_press_keeps_what_llama_keeps(ours_and_theirs, policy):
    from transformers import DynamicCache

    from press import PolicyPress

    (llama, hf_llama), ids, keep = ours_and_theirs, random_ids(142) + 3, []

    def spy(*layer):
        keep.append(policy(*layer))
        return keep[-1]

    press, cache, hf_cache = PolicyPress(policy), KVCache(llama.config), DynamicCache()
    llama(ids[:, :130], cache, spy)
    assert 0.1 < cache.usage < 0.9
    for mask, expected in zip(press_masks(press, hf_llama, ids[:, :130], hf_cache), keep, strict=True):
        assert torch.equal(mask, expected)
    assert press.compression_ratio == pytest.approx(1 - cache.usage)
    for a, b in [(130, 131), (131, 132), (132, 141), (141, 142)]:  # single tokens and many at once
        with torch.no_grad():
            logits = hf_llama(ids[:, a:b], past_key_values=hf_cache).logits
        ours, atol = llama(ids[:, a:b], cache, all_logits=True), 1e-3 * logits.std().item()
        torch.testing.assert_close(logits, ours, rtol=0, atol=atol)


@pytest.mark.parametrize("family, settings", FAMILIES)
def test_press_on_every_family(family, settings, monkeypatch):
    from kvpress import KVPressTextGenerationPipeline
    from kvpress.attention_patch import attention_patch
    from transformers import PreTrainedTokenizerFast
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from press import PolicyPress

    model, ids, own_queries = hf_model(family, **settings), random_ids(62, batch_size=2) + 3, {}
    layers = getattr(model.model, "language_model", model.model).layers
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module, query, *args, **kwargs):
        own_queries[module.layer_idx] = query
        return attend(module, query, *args, **kwargs)

    def policy(attn, hidden, keys, values):
        queries = attn.queries(hidden, torch.arange(62))
        scores = queries @ keys.repeat_interleave(2, dim=1).mT / math.sqrt(32)
        own = (
            own_queries[attn.layer]
            @ keys.repeat_interleave(2, dim=1).mT
            * layers[attn.layer].self_attn.scaling
        )
        torch.testing.assert_close(scores, own, rtol=1e-4, atol=1e-4)
        near, far = (attn.queries(hidden[:, :2], torch.tensor(at)) for at in ([3, 5], [63, 65]))
        products = [(a * b).sum(dim=-1) for a, b in (near.unbind(dim=2), far.unbind(dim=2))]
        torch.testing.assert_close(
            *products, rtol=1e-4, atol=1e-4
        )  # only the distance of two positions matters
        return GVote()(attn, hidden, keys, values)

    with monkeypatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attention_patch(spy))
        masks = press_masks(PolicyPress(policy), model, ids)
    press = PolicyPress(GVote())
    again, alone = press_masks(press, model, ids), press_masks(press, model, ids[1:])
    assert len(masks) == 3 and [mask is None for mask in masks] == [False, "layer_types" in settings, False]
    for mask, same, one in zip(masks, again, alone, strict=True):
        if mask is not None:
            assert torch.equal(same, mask) and torch.equal(one, mask[1:])
            shares = mask.float().mean(dim=2)  # (B, H_kv)
            assert 0 < shares.mean() < 1 and len(shares.unique()) > 1
    dropped = [1 - mask.float().mean() for mask in alone if mask is not None]
    assert press.compression_ratio == pytest.approx(torch.stack(dropped).mean().item())

    with press(model):
        answer = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert answer.shape == (2, 68) and press.compression_ratio != pytest.approx(
        torch.stack(dropped).mean().item()
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint_folder(DEFAULT))
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    output = pipeline("The cat sat. " * 30, questions=["Who?", "Did it?"], press=press, max_new_tokens=4)
    assert len(output["answers"]) == 2 and 0 < press.compression_ratio < 1


@pytest.mark.parametrize(
    "family, name, policy",
    [
        ("Phi3", "SnapKVPress", baselines.AdaKV(baselines.SnapKV(0.4))),
        ("Qwen3", "ExpectedAttentionPress", baselines.AdaKV(baselines.ExpectedAttention(0.4))),
    ],
)
def test_press_runs_the_baselines(family, name, policy):
    import kvpress

    from press import PolicyPress

    model, ids = hf_model(family), random_ids(300, batch_size=2) + 3
    press = PolicyPress(policy)
    masks = press_masks(press, model, ids)
    expected = press_masks(kvpress.AdaKVPress(getattr(kvpress, name)(0.6)), model, ids)
    different = sum((mask != other).sum() for mask, other in zip(masks, expected, strict=True))
    assert different <= 1e-3 * 3 * masks[0].numel() and press.compression_ratio == pytest.approx(0.6)
    for policy in (
        baselines.Random(0.3),
        baselines.KeyNorm(0.3),
        baselines.StreamingLLM(0.3),
        baselines.H2O(0.3),
    ):
        press_masks(press := PolicyPress(policy), model, ids)
        assert press.compression_ratio == pytest.approx(0.7)


def test_press_errors_are_clear(monkeypatch):
    from kvpress import KnormPress
    from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel, QuantizedCache, StaticCache
    from transformers.cache_utils import Cache, QuantizedLayer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from press import PolicyPress

    class Layer(QuantizedLayer):  # as with the backends, which are packages of their own
        def _quantize(self, tensor, axis):
            return tensor

        def _dequantize(self, tensor):
            return tensor

    class Quantized(QuantizedCache):
        def __init__(self):
            Cache.__init__(self, layers=[Layer() for _ in range(3)])

    model, ids, press = hf_model("Llama"), random_ids(20, batch_size=2) + 3, PolicyPress(GVote())
    eager_llama, eager_gemma = hf_model("Llama"), hf_model("Gemma3", **GEMMA)
    for other in (eager_llama, eager_gemma):
        other.set_attn_implementation("eager")
    # as kernels-community's, which are registered when a model asks for them
    monkeypatch.setitem(AttentionInterface._global_mapping, "mine", sdpa_attention_forward)
    registered_later = hf_model("Llama")
    registered_later.set_attn_implementation("mine")
    assert not hasattr(press, "compression_ratio")  # else kvpress's evaluation sets it
    with pytest.raises(AttributeError, match="none was read yet"):
        press.compression_ratio  # noqa: B018
    with pytest.raises(AttributeError, match=r"cannot be set: GVote\(top_p=0.95.* finds it in a prompt"):
        press.compression_ratio = 0.5
    with press(model):
        assert not hasattr(press, "compression_ratio")
    for other, match in [
        (
            GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8)),
            "GPT2LMHeadModel is not in kvpress.SUPPORTED",
        ),
        (hf_model("Granite"), "GraniteForCausalLM is not in kvpress.SUPPORTED_MODELS"),
        (eager_llama, "eager attention ignores masked keys: load .*'sdpa'"),
        (eager_gemma, "eager attention ignores masked keys: load .*'sdpa'"),
        (registered_later, "^mine attention ignores masked keys: load .*'sdpa'"),
        (hf_model("Mistral", sliding_window=16), "every layer has a sliding window"),
    ]:
        with pytest.raises(ValueError, match=match), press(other):
            pass
    for cache in (Quantized(), StaticCache(config=model.config, max_cache_len=50)):
        with (
            pytest.raises(ValueError, match=f"in a DynamicCache, not in a {type(cache).__name__}"),
            press(model),
        ):
            model(ids, past_key_values=cache)
    for outer in (press, PolicyPress(PeakVotes()), KnormPress(0.5)):
        with (
            pytest.raises(ValueError, match="two presses compress the same prompt"),
            outer(model),
            press(model),
        ):
            model(ids)
    padded = torch.ones_like(ids)
    padded[1, :4] = 0
    for settings in (
        {"attention_mask": padded},
        {"attention_mask": padded.flip(1)},
        {"position_ids": ids[:1]},
    ):
        with (
            pytest.raises(ValueError, match="one length, without padding, and positions from 0 on"),
            press(model),
        ):
            model(ids, **settings)
    with pytest.raises(ValueError, match="one length, without padding"), press(model):
        model.generate(ids, attention_mask=padded, max_new_tokens=1)
    press_masks(press, model, ids, attention_mask=torch.ones_like(ids))
    for wrong, match in [
        (lambda *layer: layer[2][..., 0], "boolean"),
        (lambda *layer: layer[2][..., 1:, 0] > 0, "19"),
    ]:
        with pytest.raises(RuntimeError, match=match), PolicyPress(wrong)(model):
            model(ids)
