"""The tables of notebook 4: how well each method does at 400, 1,500 and 4,000 tokens, and how much it keeps.

python notebooks/lengths.py    an hour on one core; adds to results/lengths.json, so a stopped run goes on

Nothing in this repo was chosen on these texts (`docstrings` and `modules` in tasks.py).
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from time import process_time

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from wherever it is started

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines import H2O, METHODS, Random, keep_best, requests
from generate import checkpoint_folder, encode, load_tokenizer
from gvote import GVote, PeakVotes, attention
from model import KVCache, Llama, rope, rotate
from tasks import Task, docstrings, gvote_entry, keep_share, modules, needle, recall

RESULTS = Path(__file__).parent / "results" / "lengths.json"
LENGTHS = (400, 1500, 4000)
KINDS = {"needle": 12, "text": 4, "code": 4, "one of three": 6}  # and how many instances at each length
SHARES = (0.15, 0.25, 0.5)
N_NEXT = 64  # tokens by which a text goes on
BAR = PeakVotes().bar
OWN = {  # a rule's own setting, as the threshold of `enters`
    "GVote": 0.95, "GVote, paper's rule": 0.95, "PeakVotes": -BAR, "PeakVotes, before": -0.02, "oracle": -BAR
}  # fmt: skip
RIVALS = {  # are told a share
    "H2O": "h2o", "SnapKV": "snapkv", "AdaKV (SnapKV)": "adakv_snapkv", "KeyDiff": "key_diff",
    "expected attention": "expected_attention", "random": "random",
}  # fmt: skip


def instances(tokenizer) -> Iterator[dict]:
    """Kind, length, number and seed of each instance, and its text as tokens: no token is in two of them."""
    prose = encode(tokenizer, "\n\n".join(docstrings()), chat=False)[0]
    code = [encode(tokenizer, source, chat=False)[0] for source in modules().values()]
    seed = 0
    for length in LENGTHS:
        for kind, n in KINDS.items():
            for number in range(n):
                n_tokens, seed = length + N_NEXT * (kind in ("text", "code")), seed + 1
                if kind == "code":
                    ids, code[number] = code[number][:n_tokens], code[number][n_tokens:]
                else:
                    ids, prose = prose[:n_tokens], prose[n_tokens:]
                yield {"kind": kind, "length": length, "number": number, "seed": seed, "ids": ids}


def make_task(model: Llama, tokenizer, kind: str, length: int, seed: int, ids: Tensor, **_) -> Task:
    if kind in ("text", "code"):
        return Task(model, ids[None, :length], ids[None, length:], N_NEXT)
    page, n_others = tokenizer.decode(ids), 2 * (kind == "one of three")
    return recall(model, tokenizer, needle(seed, page=page, n_others=n_others), question_after=True)


# From which threshold on a method without a budget keeps each key, by layer: (1, H_kv, T)


def gvote(task: Task, seed: int, budget: str = "per_sample") -> list[Tensor]:
    return [gvote_entry(layer, GVote(seed=seed, budget=budget)) for layer in task.layers]


def peak_votes(task: Task) -> list[Tensor]:
    return [-PeakVotes().score(attn, hidden, keys) for attn, hidden, keys, _ in task.layers]


def peak_votes_before(task: Task) -> list[Tensor]:
    """PeakVotes as it was: every k-th token votes, so that 1,024 do, and votes count for the keys around."""
    k, found = math.ceil(task.n_prompt / 1024), []
    for attn, hidden, keys, _ in task.layers:
        voters = torch.arange(task.n_prompt - 1, -1, -k)
        queries = attn.queries(hidden[:, voters], torch.full_like(voters, task.n_prompt))
        peaks = [attention(part, keys).amax(dim=2) for part in queries.split(64, dim=2)]
        peak = torch.stack(peaks).amax(dim=0)
        found.append(-F.max_pool1d(peak, k // 2 * 2 + 1, stride=1, padding=k // 2))
    return found


def kvzip(task: Task, tokenizer, n_sink: int = 4, chunk: int = 2048) -> list[Tensor]:
    """As `second_reading` in baselines.py, but on top of the keys that the first reading left: faster."""
    model, n_tokens, scores = task.model, task.n_prompt, []
    for start, again in requests(model, tokenizer, task.prompt, chunk):
        positions = torch.arange(n_tokens + again.size(1))
        in_chunk = (positions >= start) & (positions < min(start + chunk, n_tokens))
        scored = ((positions < n_sink) | in_chunk | (positions >= n_tokens)).nonzero()[:, 0]
        visible = positions <= positions[n_tokens:, None]
        rotation = rope(positions[n_tokens:], model.config)
        x, best = model.embed_tokens(again), []
        for block, (attn, _, keys, values) in zip(model.layers, task.layers, strict=True):
            hidden = block.input_layernorm(x)
            q = attn.queries(hidden, positions[n_tokens:])
            k = torch.cat((keys, rotate(attn.heads(attn.k_proj(hidden)), *rotation)), dim=2)
            v = torch.cat((values, attn.heads(attn.v_proj(hidden))), dim=2)
            y = F.scaled_dot_product_attention(q, k, v, visible, enable_gqa=True)
            x = x + attn.o_proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.post_attention_layernorm(x))
            k, unseen = k[:, :, None, scored], ~visible[:, scored]
            peak = torch.zeros(k.size(1), len(scored))
            for rows in torch.arange(again.size(1)).split(256):
                paid = q[:, :, rows].unflatten(1, (k.size(1), -1)) @ k.mT / math.sqrt(k.size(-1))
                paid = paid.masked_fill_(unseen[rows], -math.inf).softmax(dim=-1)
                peak = peak.maximum(paid[0].amax(dim=(1, 2)))
            best.append(peak[:, in_chunk[scored]])
        scores.append(torch.stack(best))
    found = -torch.cat(scores, dim=-1)
    found[..., :n_sink] = -math.inf  # the first are kept
    return list(found[:, None])


def h2o(task: Task, shares: tuple[float, ...]) -> list[list[Tensor]]:
    """What `H2O` keeps at several shares: the attention, which is the costly part, is summed up once."""
    totals, variants = [H2O(1e-9).scores(*layer) for layer in task.layers], []
    for share in shares:
        n_keep, masks = int(share * task.n_prompt), []
        for total in totals:
            scores = total.clone()
            scores[..., task.n_prompt - n_keep // 2 :] = math.inf  # the newest
            masks.append(keep_best(scores, n_keep))
        variants.append(masks)
    return variants


def compress(task: Task, tokenizer, seed: int, shares=SHARES) -> tuple[dict, dict]:
    """Each method's variants of the prompt's cache: (method, share or "own") -> keep masks by layer. And the
    seconds that each took, but those of "oracle" and "random" mean nothing."""
    ways = {
        "GVote": lambda: gvote(task, seed),
        "GVote, paper's rule": lambda: gvote(task, seed, "current_query"),
        "PeakVotes": lambda: peak_votes(task),
        "PeakVotes, before": lambda: peak_votes_before(task),
        "KVzip": lambda: kvzip(task, tokenizer),
        "oracle": lambda: [-true.amax(dim=2) * max(1, task.n_prompt / 400) for true in task.attention],
    }
    variants, seconds = {}, {}
    for method, way in ways.items():
        start = process_time()
        found = way()
        seconds[method] = process_time() - start
        if method in OWN:
            variants[method, "own"] = [layer <= OWN[method] for layer in found]
        variants |= {(method, share): keep_share(found, share) for share in shares}
    for method, name in RIVALS.items():
        start = process_time()
        if method == "H2O":
            variants |= {
                (method, share): masks for share, masks in zip(shares, h2o(task, shares), strict=True)
            }
            seconds[method] = process_time() - start
            continue
        for share in shares:
            policy = Random(share, seed) if method == "random" else METHODS[name](share)
            variants[method, share] = [policy(*layer) for layer in task.layers]
        seconds[method] = (process_time() - start) / len(shares)
    return variants, seconds


def measure(task: Task, variants: dict) -> dict:
    """(method, share or "own") -> (share of the keys kept, KL, 1 if the answer was right)"""
    figures = zip(variants.items(), task.test(list(variants.values())), strict=True)
    kept = {key: torch.cat(masks).float().mean().item() for key, masks in variants.items()}
    return {key: (kept[key], row["kl"], row["exact"]) for (key, _), row in figures}


def about() -> dict:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    with open("/proc/cpuinfo") as file:
        machine = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    about = {"command": "python notebooks/lengths.py", "commit": git.stdout.strip(), "bar": BAR}
    about |= {"machine": machine, "threads": torch.get_num_threads()}
    packages = ("torch", "numpy", "matplotlib", "gguf", "jinja2", "tqdm")
    return about | {"versions": {name: version(name) for name in packages}, "results": {}, "seconds": {}}


def main():
    torch.set_grad_enabled(False)
    model, tokenizer = Llama.from_pretrained(checkpoint_folder()), load_tokenizer(checkpoint_folder())
    done = json.loads(RESULTS.read_text()) if RESULTS.exists() else about()
    in_turn = sorted(instances(tokenizer), key=lambda each: (each["length"], each["number"]))
    for instance in in_turn:  # so a stopped run has some of each kind
        kind, length = instance["kind"], str(instance["length"])
        results = done["results"].setdefault(length, {}).setdefault(kind, {})
        if len(results.get("full", {"own": []})["own"]) > instance["number"]:
            continue
        start = process_time()
        task = make_task(model, tokenizer, **instance)
        variants, seconds = compress(task, tokenizer, instance["seed"])
        for (method, at), figures in measure(task, {("full", "own"): task.everything} | variants).items():
            row = [round(figure, 5) for figure in figures]
            results.setdefault(method, {}).setdefault(str(at), []).append(row)
        if kind == "text":
            prefill = process_time()
            model(task.prompt, KVCache(model.config, max_new_tokens=0))
            for method, took in ({"prefill": process_time() - prefill} | seconds).items():
                done["seconds"].setdefault(length, {}).setdefault(method, []).append(round(took, 2))
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(done).replace(', "', ',\n"') + "\n")
        print(length, kind, instance["number"], task.n_prompt, f"{process_time() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
