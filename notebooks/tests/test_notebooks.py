"""The notebooks' helpers: baselines and press against kvpress, tasks against cases by hand."""

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
import torch.nn.functional as F

import baselines
import ladder
import tasks
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
from gvote import GVote, PeakVotes, top_p_mask
from model import KVCache, Llama
from tasks import record
from test_gvote import TINY, random_ids, tiny_llama

# ---- baselines.py


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


@pytest.fixture(scope="module")
def small() -> Llama:
    """It reads the default model's tokens."""
    return tiny_llama(vocab_size=49152)


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
    try:
        torch.set_default_device("meta")
        found = masks()
    finally:
        torch.set_default_device(None)
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


# ---- tasks.py


def test_needles_can_be_found_and_repeated():
    for seed in range(20):
        context, question, answer = tasks.needle(seed)
        assert tasks.needle(seed) == (context, question, answer) != tasks.needle(seed + 1)
        words = re.findall(r"\w+", answer)
        assert words and all(word in context for word in words) and answer not in question


def test_needle_lies_in_a_haystack_of_the_wanted_length():
    for seed in range(20):
        context, question, answer = tasks.needle(seed, 500 * (seed + 1))
        (found,) = re.findall(r"^The special magic number for \w+ is \d{7}\.$", context, re.M)
        assert found == question.strip() + answer and len(context) == 500 * (seed + 1) + len(found) + 1


@pytest.mark.parametrize("question_after", [True, False])
def test_task_measures_what_a_cache_forgot(llama, tokenizer, question_after):
    context, question, answer = tasks.needle(0)
    task = tasks.recall(llama, tokenizer, (context, question, answer), question_after)
    n_context, n_question, n_answer = (len(tokenizer(t).input_ids) for t in (context, question, answer))
    assert task.n_prompt == n_context + (0 if question_after else n_question)
    assert task.n_scored == n_answer - (
        0 if question_after else 1
    )  # the prompt itself predicts the first token
    digits = torch.tensor(
        [tokenizer.decode([i]).isdigit() for i in encode(tokenizer, context, chat=False)[0]]
    )
    no_digits = ~F.pad(digits, (0, task.n_prompt - len(digits))).expand(1, 3, -1)
    full, blind, again = task.test([task.everything, [no_digits] * 30, task.everything])
    assert task.exact(task.full) and full["exact"] == 1 and abs(full["kl"]) < 1e-6
    assert full == pytest.approx(again, abs=1e-6)
    assert blind["exact"] == 0 and blind["kl"] > 1
    (alone,) = task.test([[no_digits] * 30])
    assert blind == pytest.approx(alone, rel=1e-3)


def test_continuation_is_cut_where_it_says(llama, tokenizer):
    task = tasks.continuation(llama, tokenizer, tasks.prose()["import"], n_prompt=96, n_next=20)
    ids = torch.cat((encode(tokenizer, tasks.prose()["import"], chat=False)[:, :96], task.after), dim=1)
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


# ---- ladder.py


def test_rungs_keep_what_the_methods_keep(llama, tokenizer):
    (task,) = ladder.tasks_of(llama, tokenizer, "needle", 1, n_chars=400)
    policies = {"GVote": GVote(0.9, seed=task.seed), ladder.PEAK_VOTES: PeakVotes(0.1)}
    for name, policy in policies.items():
        voters, count = ladder.LADDER[name]
        for layer in task.layers:
            assert torch.equal(count(voters(task, layer[0].layer)) <= 0.9, policy(*layer))
    second = [ladder.bar(ladder.read_twice(task, layer)) for layer in range(len(task.layers))]
    for layer in second:
        layer[..., :4] = -1  # KVzip keeps the first four tokens in any case
    zipped = baselines.KVzip(0.25).masks(llama, tokenizer, task.prompt)
    assert torch.equal(torch.stack(tasks.keep_share(second, 0.25)), zipped)
    rows = ladder.climb([task], {"oracle": ladder.LADDER["true future: oracle"]})["oracle"]
    assert torch.cat(rows[0]["masks"]).float().mean() == pytest.approx(0.25, abs=1e-3)


def test_a_note_is_given_back_to_some_heads(llama, tokenizer):
    (task,) = ladder.tasks_of(llama, tokenizer, "needle", 1, n_chars=400)
    nothing = [torch.zeros_like(layer) for layer in task.everything]
    back = torch.stack(ladder.give_back(task, nothing, [3, 89]))[:, 0]  # (layers, H_kv, T)
    assert back.any(dim=-1).nonzero().tolist() == [[1, 0], [29, 2]]
    kept = task.prompt[0, back[1, 0]].tolist()
    assert re.search(r"number for \w+ is \d{7}\.$", tokenizer.decode(kept))


# ---- press.py

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
    """What the press keeps of prompts, by layer: masks like a policy's, None where it left the layer
    alone."""
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
