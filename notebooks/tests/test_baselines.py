"""baselines.py: methods against kvpress', and by hand; the command with all of them."""

import json
import math
import re
import shutil
import subprocess
import sys
from functools import partial
from pydoc_data.topics import topics

import pytest
import torch

import baselines
from generate import (
    DEFAULT,
    POLICIES,
    checkpoint_folder,
    encode,
    load_tokenizer,
    make_policy,
    prepare,
    render,
)
from gvote import GVote
from model import KVCache
from tasks import record
from test_gvote import TINY, random_ids, tiny_llama


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


def test_snapkv_keeps_the_newest_of_its_window():
    for n_tokens in (200, 64, 40, 1):
        n_keep = max(1, int(0.15 * n_tokens))
        for layer in record(tiny_llama(), random_ids(n_tokens, batch_size=2)):
            keep = baselines.SnapKV(0.15)(*layer)
            assert keep.sum() == 2 * TINY.n_kv_head * n_keep and keep[..., -n_keep:].all()
    with pytest.raises(ValueError, match="kernel must be odd, .* got 4"):
        baselines.SnapKV(0.5, kernel=4)


@pytest.mark.parametrize("name", baselines.METHODS)
@pytest.mark.parametrize("share", [0.001, 0.5])
def test_every_method_reads_the_shortest_prompts(name, share, small, tokenizer):
    n_heads = TINY.n_layer * TINY.n_kv_head
    for n_tokens in (1, 2, 3, 4, 5, 30):
        ids, cache = torch.arange(20, 20 + n_tokens)[None], KVCache(TINY)
        method = make_policy(f"{name}:{share}", baselines.METHODS)
        small(ids, cache, prepare(method, small, tokenizer, ids))
        # those have no share
        if name in POLICIES:
            continue
        if name == "kvzip":
            assert cache.kept.sum() == max(n_heads, int(n_heads * share * n_tokens))
        else:
            assert cache.kept.sum() == n_heads * max(1, int(share * n_tokens))
        # a head may leave its share to others
        assert cache.kept.min() >= 1 or share == 0.5


@pytest.mark.parametrize("name", baselines.METHODS)
def test_no_method_makes_a_tensor_on_the_default_device(name, small, tokenizer):
    """On a GPU, a tensor made without a device would be on the CPU."""
    ids = torch.arange(20, 120)[None]
    method = make_policy(f"{name}:0.3", baselines.METHODS)

    def masks() -> list[torch.Tensor]:
        policy = prepare(method, small, tokenizer, ids)
        return [policy(*layer) for layer in record(small, ids)]

    expected = masks()
    with torch.device("meta"):
        found = masks()
    assert all(map(torch.equal, found, expected))


@pytest.fixture(scope="session")
def hf_llama():
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(checkpoint_folder(DEFAULT), dtype=torch.float32)


@pytest.mark.parametrize(
    "name, policy",
    [
        ("KnormPress", baselines.KeyNorm(0.4)),
        ("StreamingLLMPress", baselines.StreamingLLM(0.4)),
        ("KeyDiffPress", baselines.KeyDiff(0.4)),
        ("SnapKVPress", baselines.SnapKV(0.4)),
        ("ExpectedAttentionPress", baselines.ExpectedAttention(0.4)),
        ("AdaKVPress SnapKVPress", baselines.AdaKV(baselines.SnapKV(0.4))),
        ("AdaKVPress ExpectedAttentionPress", baselines.AdaKV(baselines.ExpectedAttention(0.4))),
    ],
)
def test_baselines_keep_what_kvpress_keeps(hf_llama, real_layers, tokenizer, name, policy):
    """On the default model. H2O has no counterpart: ObservedAttentionPress averages, and has no recent
    half."""
    import kvpress
    from transformers import DynamicCache

    n_tokens = 256
    *wrappers, press = name.split()
    press = getattr(kvpress, press)(compression_ratio=0.6)
    for wrapper in wrappers:
        press = getattr(kvpress, wrapper)(press)
    cache = DynamicCache()
    with torch.no_grad(), press(hf_llama):
        hf_llama(encode(tokenizer, topics["import"], chat=False)[:, :n_tokens], past_key_values=cache)

    different = 0
    for attn, hidden, keys, values in real_layers:
        hidden, keys, values = hidden[:, :n_tokens], keys[:, :, :n_tokens], values[:, :, :n_tokens]
        keep = policy(attn, hidden, keys, values)
        expected = torch.ones_like(keep)
        module = hf_llama.model.layers[attn.layer].self_attn
        # kvpress only masks where heads differ
        if wrappers:
            expected[module.masked_key_indices] = False
        else:
            positions = torch.cdist(cache.layers[attn.layer].keys[0], keys[0]).argmin(dim=-1)
            expected = torch.zeros_like(keep).scatter_(-1, positions[None], True)
        assert torch.equal(keep.sum(dim=(1, 2)), expected.sum(dim=(1, 2)))
        different += (keep != expected).sum().item()
    # ties: float32 sums in another order
    assert different <= 2e-4 * len(real_layers) * keep.numel()


def test_kvzip_keeps_what_kvpress_keeps(llama, hf_llama, tokenizer, monkeypatch):
    """On the default model, in one chunk and in three. Theirs leaves out the first tokens, as many as the
    chat template puts before a message, whether the prompt has them or not: here they get a template that
    puts nothing there."""
    kvpress = pytest.importorskip("kvpress")
    from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerFast

    folder = checkpoint_folder(DEFAULT)
    their_tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    turn = render(tokenizer, "<<p>>").partition("<<p>>")[2]
    their_tokenizer.chat_template = f"{{{{ messages[0]['content'] + {turn!r} }}}}"
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda _: their_tokenizer)
    ids, second_reading = encode(tokenizer, topics["import"], chat=False)[:, :150], baselines.second_reading
    for chunk in (2048, 60):
        with torch.no_grad(), kvpress.KVzipPress(compression_ratio=0.6, chunk_size=chunk)(hf_llama):
            hf_llama(input_ids=ids, past_key_values=DynamicCache())
        monkeypatch.setattr(baselines, "second_reading", partial(second_reading, chunk=chunk))
        keep = baselines.KVzip(0.4).masks(llama, tokenizer, ids)
        expected = torch.ones_like(keep)
        for layer, module in zip(expected, hf_llama.model.layers, strict=True):
            layer[module.self_attn.masked_key_indices] = False
        assert keep.sum() == expected.sum() == 0.4 * keep.numel() and keep[..., :4].all()
        assert (keep != expected).sum() <= 1e-4 * keep.numel()  # ties: float32 sums in another order


def test_kvzip_is_a_policy_for_its_prompts(llama, tokenizer):
    ids = encode(tokenizer, "The code is 7425. Is it 7425, or 7526?", chat=False).repeat(2, 1)
    ids[1] = ids[1].flip(0)
    masks, cache = baselines.KVzip(0.5).masks(llama, tokenizer, ids), KVCache(llama.config, 2)
    assert masks.shape == (30, 2, 3, ids.size(1)) and (masks.sum(dim=(0, 2, 3)) == 45 * ids.size(1)).all()
    assert torch.equal(
        masks[:, 1:], baselines.KVzip(0.5).masks(llama, tokenizer, ids[1:])
    )  # alone as in a batch
    llama(ids, cache, prepare(baselines.KVzip(0.5), llama, tokenizer, ids))
    assert torch.equal(cache.kept, masks.sum(dim=(1, 3)))
    one_pass = baselines.H2O(0.5)
    assert prepare(one_pass, llama, tokenizer, ids) is one_pass
    with pytest.raises(ValueError, match="got 1.5"):
        baselines.KVzip(1.5)


def test_kvzip_says_at_once_that_the_context_is_too_short(llama, tokenizer):
    ids = torch.full((1, 4200), 30)
    with pytest.raises(
        ValueError, match=r"KVzip reads the prompt twice: \d+ tokens exceed .* context of 8192"
    ):
        prepare(baselines.KVzip(0.5), tiny_llama(), tokenizer, ids.repeat(1, 2)[:, :8000])
    assert callable(prepare(baselines.KVzip(0.5), tiny_llama(), tokenizer, ids))


def test_kvzip_takes_what_follows_the_prompt_in_any_template(llama, tmp_path):
    shutil.copy(checkpoint_folder() / "tokenizer.json", tmp_path)
    template = "Who? {{ messages[0].content }} What?<|im_end|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = load_tokenizer(tmp_path)
    ((_, again),) = baselines.requests(llama, tokenizer, torch.tensor([[30, 31]]))
    assert tokenizer.decode(again[0, :-2]) == "\n\nRepeat the previous context exactly. What?<|im_end|>"


def test_methods_are_made_from_their_names():
    assert make_policy("adakv_snapkv:0.5", baselines.METHODS) == baselines.AdaKV(baselines.SnapKV(0.5))
    assert make_policy("gvote:0.9", baselines.METHODS) == GVote(0.9)
    for name in set(baselines.METHODS) - set(POLICIES) - {"adakv_snapkv"}:
        assert make_policy(f"{name}:0.25", baselines.METHODS).share == 0.25
        with pytest.raises(ValueError, match=f"{name} needs the share of keys to keep, as in {name}:0.5"):
            make_policy(name, baselines.METHODS)
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got nan"):
        make_policy("kvzip:nan", baselines.METHODS)


def test_baselines_is_the_command_with_all_methods(tokenizer):
    args = [
        "The code is 7425.",
        "--policy",
        "kvzip:0.5",
        "h2o:0.5",
        "--max-new-tokens",
        "2",
        "--device",
        "cpu",
    ]
    command = [sys.executable, baselines.__file__, *args]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^kvzip:0.5 +50%", done.stdout, re.M)
    assert re.search(r"^h2o:0.5 +\d\d%", done.stdout, re.M)
