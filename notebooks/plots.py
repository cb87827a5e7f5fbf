"""For all notebooks: their pictures, one function each, named after the question that it answers.

Writes images/*.png, by `save_picture`. Draws what it is given, and measures nothing.
"""

import inspect
import math
import os
import textwrap
from itertools import takewhile
from statistics import median

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor

from model import BLOCK, KVCache, Table
from stats import print_table, wilson, with_interval

# Okabe and Ito's palette: told apart by colour-blind readers, and in grey
BLACK, GREY, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#000000", "#999999", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip

plt.rcParams.update(
    {
        "figure.figsize": (8, 3.4),
        "figure.dpi": 90,
        "figure.constrained_layout.use": True,
        "font.size": 13,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, RED, SKY, PINK, BLACK, GREY]),
        "image.cmap": "viridis",
    }
)


def save_picture(figure, name: str):
    """Writes a picture that README.md shows, but not one from a short run."""
    if not os.environ.get("GVOTE_FAST"):
        figure.savefig(f"notebooks/images/{name}.png", dpi=110)


def name_lines(axis, ends: list[tuple[float, str, str]], gap: float = 0.07):
    """Names lines at the right of a picture, in their colours, instead of a legend. ends: height, name and
    colour of each. The gap between two names, a share of the picture's height, is kept even where lines end
    together."""
    to_axes = axis.transData + axis.transAxes.inverted()
    x = axis.get_xlim()[1]
    ends = sorted((to_axes.transform((x, y))[1], name, color) for y, name, color in ends)
    heights = [height for height, *_ in ends]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    heights[-1] = min(heights[-1], 1)
    for i in range(len(heights) - 1, 0, -1):
        heights[i - 1] = min(heights[i - 1], heights[i] - gap)
    for height, (_, name, color) in zip(heights, ends, strict=True):
        axis.text(1.02, height, name, color=color, va="center", transform=axis.transAxes)


def words_kept(panels: dict, words: list[str], note: range, question: range, readers: list[tuple[int, int]]):
    """Which words does a policy throw away? Passages of the prompt, each token shaded by the share of all
    heads that keep its key; below, the heads that look the note's digits up, filled if they keep them.

    panels: by name a cache and the answer's text. words: of the prompt's tokens. note, question: which of
    them are the note and the question. readers: (layer, head) of the heads that read the digits.
    """
    words = [word.replace("\n", " ") for word in words]
    around = range(note.start - 50, note.stop + 45)
    passage = [*range(10), *around, *range(question.start - 7, question.stop)]
    digits = [i for i in note if words[i].isdigit()]
    # black text stays readable on all
    shades = LinearSegmentedColormap.from_list("kept", ["white", "#5b9bd5"])
    width, n_columns, line = 7.55, 52, 1
    column = width / (n_columns + 2)  # inches
    figure, axis = plt.subplots(layout="none")
    axis.set(position=(0, 0, 1, 1), xlim=(-1, n_columns + 1))
    axis.axis("off")
    # a letter is as wide as a column
    font = {"family": "DejaVu Sans Mono", "size": 72 * column / 0.602, "va": "center_baseline"}

    def write(text: str, x: float = 0, share: float | None = None, weight: str = "normal"):
        if share is not None:
            axis.add_patch(plt.Rectangle((x, line - 0.45), len(text), 0.9, color=shades(share), linewidth=0))
        axis.text(x, line, text, weight=weight, **font)

    write("Which words are kept? It matters in which heads.", weight="bold")
    line += 1.3
    for i, share in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        write(f"{share:4.0%} ", 5 * i, share)
    axis.add_patch(plt.Rectangle((0, line - 0.45), 25, 0.9, fill=False, linewidth=0.5))
    write(f"of the {next(iter(panels.values()))[0].kept.numel()} heads keep it", 26)
    for name, (cache, answer) in panels.items():
        heads = torch.cat([table.positions for table in cache.layers]).bincount(minlength=len(words))
        shares = (heads / cache.kept.numel()).tolist()
        line, x, before = line + 2, 0, -1
        write(f"{name} keeps {cache.usage:.0%} of all keys", weight="bold")
        line += 1.2
        for i in passage:
            left_out = i - before - 1
            gap, word, before = f" [{left_out} tokens] " if left_out else "", words[i], i
            rest = takewhile(lambda w: w[0] != " ", words[i + 1 : i + 5])  # of a word of several tokens
            if x + len(gap + word) + (sum(map(len, rest)) if word[0] == " " else 0) > n_columns:
                line, x, gap, word = line + 1, 0, gap.lstrip(), word if gap else word.lstrip()
            write(gap, x)
            x += len(gap)
            write(word, x, shares[i], "bold" if i in digits else "normal")
            if i in note:  # its line above and below, and its two ends
                edges = [((x, x + len(word)), (line + y, line + y)) for y in (-0.45, 0.45)]
                ends = [(x, i == note[0]), (x + len(word), i == note[-1])]
                edges += [((at, at), (line - 0.45, line + 0.45)) for at, is_end in ends if is_end]
                for edge in edges:
                    axis.plot(*edge, color=RED, linewidth=2.5)
            x += len(word)
        found = [set(digits) <= set(cache.kept_positions(*head).tolist()) for head in readers]
        right = "right" if "".join(words[i] for i in digits) in answer else "wrong"
        line += 1.4
        write(f"{sum(found)} of {len(found)} heads that read the code keep it", weight="bold")
        for i, keeps in enumerate(found):
            corner = (n_columns - 7.6 + i % 8, line - 0.4 + i // 8)
            axis.add_patch(plt.Rectangle(corner, 0.7, 0.7, color=RED, fill=keeps))
        line += 1.1
        said = textwrap.shorten(answer, 84, placeholder=" ...")
        for part in textwrap.wrap(f"Answer ({right}): {said}", n_columns - 10):
            write(part)
            line += 1
        line -= 0.6
    axis.set_ylim(line + 1, 0)
    figure.set_size_inches(width, 2 * column * (line + 1))  # a line is as high as two columns are wide
    return figure


# Notebook 1: GVote on one head


def show_code(*functions):
    """Shows functions as a notebook's output, without their docstrings."""
    parts = [inspect.getsource(function).split('"""', 2) for function in functions]
    code = "\n\n".join(signature.rstrip() + body.rstrip() for signature, _, body in parts)
    display(Markdown(f"```python\n{code}\n```"))


def print_vectors(names: list[str], vectors: Tensor, n: int = 6):
    """What is in these vectors? The first n numbers of each, a line per vector."""
    print(f"the first {n} of {vectors.size(-1)} numbers")
    numbers = [[f"{x:.2f}" for x in vector[:n]] for vector in vectors.tolist()]
    print_table([[name.strip(), *line, "..."] for name, line in zip(names, numbers, strict=True)])


def how_many_keys(words: list[str], queries: dict[str, Tensor], top_p: float = 0.95):
    """How many keys hold top_p of a query's attention? queries: by name the attention to each word, (T,)."""
    head, *lines = [[] for _ in range(len(words) + 1)]
    for name, probs in queries.items():
        head += [name, "attention", "added up", "nucleus"]
        total = 0.0
        for line, i in zip(lines, probs.argsort(descending=True).tolist(), strict=True):
            inside, total = "yes" if total < top_p else "-", total + probs[i].item()
            line += [words[i].strip(), f"{probs[i]:.1%}", f"{total:.1%}", inside]
    print_table([head, *lines])


def which_keys_get_votes(words: list[str], probs: Tensor, panels: dict[str, Tensor], n_samples: int = 8):
    """Which of a few keys get a vote, and from whom? One head: probs (G * S, T), and by rule its votes. The
    samples of the first query head are rows of their own, those of the others are one row together."""
    figure, axes = plt.subplots(1, len(panels), figsize=(9.2, 4.7), sharey=True)
    colors = LinearSegmentedColormap.from_list("votes", ["white", SKY, ORANGE, GREEN], N=4)
    for axis, (title, votes) in zip(axes, panels.items(), strict=True):
        got = torch.stack([*votes[:n_samples], votes[n_samples:].any(dim=0)])
        so_far = got.cumsum(dim=0) > 0
        first = got & (got.cumsum(dim=0) == 1)
        cells = torch.cat((got.float() + first.float(), 3 * so_far[-1:].float()))
        axis.imshow(cells, cmap=colors, vmin=0, vmax=3, aspect="auto", alpha=0.85)
        style = {"ha": "center", "va": "center", "fontsize": 12}
        for sample in range(n_samples):
            for key, share in enumerate(probs[sample].tolist()):
                color = BLACK if votes[sample, key] else GREY
                axis.text(key, sample, f"{100 * share:.0f}", color=color, **style)
        for y, kept in enumerate([*so_far, so_far[-1]]):
            weight = "bold" if y == n_samples + 1 else None
            axis.text(len(words) - 0.3, y, f"{kept.sum()} of {len(words)}", va="center", weight=weight)
        axis.text(len(words) - 0.3, -0.62, "so far", va="bottom", fontsize=12)
        axis.set_title(title, fontsize=13, pad=10)
        axis.set_xticks(range(len(words)), [word.strip() for word in words], fontsize=12)
        axis.set_xticks([i + 0.5 for i in range(len(words) - 1)], minor=True)
        axis.set_yticks([i + 0.5 for i in range(n_samples + 1)], minor=True)
        axis.grid(which="minor", color="white", linewidth=2)
        axis.tick_params(which="both", length=0)
        axis.xaxis.tick_top()
        axis.spines[:].set_visible(False)
    names = [*(f"sample {s}" for s in range(n_samples)), "two more\nquery heads", "kept"]
    axes[0].set_yticks(range(len(names)), names)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color, alpha=0.85) for color in (ORANGE, SKY, GREEN)]
    names = ["first vote for this key", "another vote", "kept"]
    figure.legend(handles, names, ncols=3, loc="outside lower center", fontsize=12)
    figure.suptitle("numbers: attention (%); colour: votes", fontsize=12)
    plt.show()


def how_many_votes(sizes: Tensor, current: Tensor, n: int):
    """How many keys does each sample vote for? sizes (G, S): by the default rule. n: by the paper's rule, the
    mean of current (G,), the sizes of the current query's nuclei."""
    figure, axis = plt.subplots(figsize=(9.2, 3.6))
    n_heads, n_samples = sizes.shape
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}  # before the line
    starts = [g * (n_samples + 3) for g in range(n_heads)]
    for start, bars, diamond in zip(starts, sizes.tolist(), current.tolist(), strict=True):
        axis.bar(range(start, start + n_samples), bars, color=SKY)
        for x, size in enumerate(bars, start):
            axis.text(x, 1.05 * size, f"{size}", ha="center", fontsize=11, bbox=box)
        axis.plot(start + n_samples, diamond, "D", color=BLACK)
        axis.text(start + n_samples + 0.45, 1.04 * diamond, f"{diamond}", va="bottom", fontsize=11)
    axis.axhline(n, color=RED, zorder=0)
    axis.set_xticks([start + 3.5 for start in starts], [f"query head {g}" for g in range(n_heads)])
    axis.tick_params(axis="x", length=0)
    axis.set(ylabel="keys voted for", yscale="log", xlim=(-0.8, starts[-1] + n_samples + 1.6), ylim=(5, 1000))
    axis.set_yticks([10, 100, 1000], ["10", "100", "1,000"])
    ends = [(300, "default rule:\na bar per sample", BLUE), (n, f"paper's rule:\n{n} keys each", RED)]
    name_lines(axis, [*ends, (9, "\u25c6 nucleus of the\ncurrent query", BLACK)])
    plt.show()


def where_votes_fall(panels: dict[str, Tensor], name: str, marked: list[int]):
    """Where in the prompt are the keys that get votes? panels: by rule, the votes (G * S, T) of a head's 24
    samples. The marked tokens have a line with this name."""
    figure, axes = plt.subplots(1, len(panels), figsize=(9.2, 4), sharey=True)
    for axis, (title, votes) in zip(axes, panels.items(), strict=True):
        kept = votes.any(dim=0)
        for marks, top, color in ((votes, 0, BLUE), (kept[None], len(votes) + 1, GREEN)):
            # the share of 8 tokens: there is no room for all
            share = F.avg_pool1d(marks.float(), 8, ceil_mode=True)
            shades = LinearSegmentedColormap.from_list("votes", ["white", color])
            extent = (0, 8 * share.size(1), top + max(len(marks), 4) - 0.5, top - 0.5)
            style = {"cmap": shades, "vmin": 0, "vmax": 1, "interpolation": "nearest"}
            axis.imshow(share, aspect="auto", extent=extent, **style)
        for y in (7.5, 15.5, 23.5):
            axis.axhline(y, color=GREY, linewidth=0.8)
        axis.axvline(sum(marked) / len(marked), color=RED, linewidth=1.5)
        axis.text(sum(marked) / len(marked), -1, name, color=RED, ha="center", va="bottom")
        axis.set_title(f"{title}: keeps {kept.float().mean():.0%}", fontsize=13, pad=24)
        axis.set(xlabel="position in the prompt (token)", xticks=[0, 500, 1000])
        axis.set(xlim=(0, len(kept)), ylim=(len(votes) + 4.5, -0.5))
    names = [*(f"query head {g}\n(8 samples)" for g in range(3)), "kept"]
    axes[0].set_yticks([3.5, 11.5, 19.5, 26.5], names)
    for axis in axes:
        axis.tick_params(axis="y", length=0)
    figure.supxlabel("the darker, the more of eight neighbouring keys get a vote", fontsize=12)
    plt.show()


def what_all_heads_keep(panels: dict[str, Tensor]):
    """Which keys do all heads keep? panels: by rule (layers, H_kv, T); a cell is the mean of 32 tokens."""
    figure, axes = plt.subplots(1, len(panels), figsize=(9.2, 4.4), sharey=True)
    for axis, (title, kept) in zip(axes, panels.items(), strict=True):
        cells = 100 * F.avg_pool1d(kept.flatten(0, 1).float(), 32, ceil_mode=True)
        extent = (0, 32 * cells.size(1), len(kept), 0)
        image = axis.imshow(cells, aspect="auto", vmin=0, vmax=100, interpolation="nearest", extent=extent)
        axis.set_title(f"{title}: keeps {kept.float().mean():.0%}", fontsize=13)
        axis.set(xlabel="position in the prompt (token)", xticks=[0, 500, 1000], yticks=[0, 10, 20, 30])
    axes[0].set_ylabel("layer (three heads each)")
    figure.colorbar(image, ax=axes, ticks=[0, 50, 100], label="keys kept (%)")
    plt.show()


def do_samples_ask(heads: list[tuple[int, int]], paid: dict[str, list[Tensor]], even: float):
    """Do the samples ask for what the answer reads? heads: (layer, head) of some. paid: in all heads, the
    attention to it of the answer's best query, and of the samples (G * S,). even: an even share."""
    figure, axis = plt.subplots(figsize=(9.2, 3.8))
    x = range(len(heads))
    for (name, each), color, marker in zip(paid.items(), (RED, SKY), "Do", strict=True):
        shares = torch.stack(each).unflatten(0, (-1, 3))[tuple(zip(*heads, strict=True))].view(len(heads), -1)
        axis.plot(x, 100 * shares.clamp(min=1e-7), marker, color=color, markersize=7 if color == RED else 4)
        print(f"attention to the code, {name}: {shares.min():.2%} to {shares.max():.2%}")
    print(f"attention to the code, spread evenly: {even:.2%}")
    axis.axhline(100 * even, color=BLACK, linewidth=1, linestyle="--")
    axis.set_xticks(x, [f"{layer}.{head}" for layer, head in heads], fontsize=11)
    axis.set(xlabel="heads that read the code (layer.head)", ylabel="attention paid\nto the code (%)")
    axis.set(yscale="log", ylim=(5e-6, 300))
    axis.set_yticks([1e-5, 1e-3, 0.1, 10, 100], ["0.00001\nor less", "0.001", "0.1", "10", "100"])
    ends = [(70, "the answer's\nbest query", RED), (100 * even, "spread evenly", BLACK)]
    name_lines(axis, [*ends, (1e-3, "24 samples\nin each head", BLUE)], gap=0.13)
    plt.show()


def distance_by_layer(figures: dict[str, list[float]]):
    """How far from a Gaussian are the states that GVote fits? figures: of question 1 in questions.py."""
    figure, axis = plt.subplots()
    by_layer, ends = figures["the hidden states, by layer"], []
    axis.plot(by_layer, color=BLUE, linewidth=2)
    for name, color in (("Gaussian", BLACK), ("Laplace", GREY)):
        height = figures[f"a {name}"][0]
        axis.axhline(height, color=color, linewidth=1)
        ends.append((height, f"random numbers,\n{name}", color))
    axis.set(xlabel="layer", ylabel="distance from a\nGaussian (std)", ylim=(0, 0.17))
    name_lines(axis, [*ends, (by_layer[-1], "the hidden states", BLUE)], gap=0.15)
    plt.show()


# Notebook 2: what moves the budget

RULE_COLORS = {"per_sample": BLUE, "current_query": ORANGE}


def how_even_is_attention(curves: dict[str, Tensor], top_p: float):
    """How evenly do the samples spread their attention? curves: name of a prompt -> the attention (in %) that
    the best 1, 2, ..., T keys hold together, mean over all samples and heads."""
    figure, axis = plt.subplots(figsize=(8, 3.8))
    colors = (BLUE, RED, PINK)
    for (name, curve), color in zip(curves.items(), colors, strict=False):
        share = torch.linspace(0, 100, len(curve) + 1)[1:]
        axis.plot(share, curve, color=color, linewidth=2.5, label=name)
    axis.plot([0, 100], [0, 100], ":", color=BLACK, label="all keys get the same")
    axis.axhline(100 * top_p, color=GREY, linewidth=1, label=f"{top_p:.0%}, as in a nucleus")
    axis.set(xlabel="keys, best first (% of the prompt)", ylabel="their attention, added up (%)")
    axis.set(xlim=(0, 100), ylim=(0, 101))
    figure.legend(loc="outside right center", fontsize=12)
    plt.show()


def which_prompts_keep_most(shares: dict[str, dict[str, list[float]]]):
    """Do prompts differ by more than one prompt's seeds do? shares: name -> rule -> shares kept (%). The
    first are one prompt's seeds, the others have one dot per prompt."""
    first, *others = shares
    names = [*sorted(others, key=lambda name: sum(shares[name]["per_sample"])), first]
    figure, axis = plt.subplots(figsize=(8, 4.4))
    for rule, color in RULE_COLORS.items():
        dots = [(share, y) for y, name in enumerate(names) for share in shares[name][rule]]
        axis.plot(*zip(*dots, strict=True), "o", color=color, alpha=0.5, markeredgewidth=0, label=rule)
    axis.axhline(len(names) - 1.5, color=GREY, linewidth=1)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="keys kept (%)", xlim=(0, 101))
    figure.legend(ncols=2, loc="outside upper center")
    plt.show()


def what_do_the_settings_do(panels: dict[str, tuple[list, dict[str, list[list[float]]]]]):
    """How much does each setting move the kept share? panels: setting -> its values, and rule -> one curve
    (%) per text. The first text is the line, the others are shaded."""
    figure, axes = plt.subplots(1, len(panels), figsize=(8.6, 3.8), sharey=True)
    for axis, (title, (values, by_rule)) in zip(axes, panels.items(), strict=True):
        for rule, curves in by_rule.items():
            curves, color = torch.tensor(curves), RULE_COLORS[rule]
            low, high = curves[1:].amin(dim=0), curves[1:].amax(dim=0)
            axis.fill_between(values, low, high, color=color, alpha=0.25, linewidth=0)
            axis.plot(values, curves[0], "o-", color=color, label=rule)
        axis.set(xlabel=f"{title} (dotted: the default)", ylim=(0, 100))
    values = panels["number of samples"][0]
    axes[1].set_xscale("log")
    axes[1].set_xticks(values, values)
    axes[1].minorticks_off()
    for axis, default in zip(axes, (0.95, 8), strict=True):
        axis.axvline(default, color=BLACK, linestyle=":")
    axes[0].set_ylabel("keys kept (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=2, loc="outside upper center")
    plt.show()


def do_longer_prompts_keep_less(pages: dict[str, dict]):
    """Does a longer prompt keep a smaller share? pages: rule -> tokens -> mean share kept (%) of some
    prompts, and its interval."""
    figure, axis = plt.subplots(figsize=(8, 3.2))
    for rule, color in RULE_COLORS.items():
        mean, low, high = zip(*pages[rule].values(), strict=True)
        axis.vlines(list(pages[rule]), low, high, color=color, linewidth=2)
        axis.plot(list(pages[rule]), mean, "o:", color=color, linewidth=1, markersize=4, label=rule)
    axis.set(xlabel="tokens in the prompt", ylabel="keys kept (%)", ylim=(0, 80), xlim=(0, 4500))
    axis.set_xticks(list(pages[rule]), [f"{n:,}" for n in pages[rule]])
    axis.legend(loc="upper right")
    plt.show()


# Notebook 3: memory and speed


def where_do_rows_go(cache: KVCache, layer: int):
    """Where do the rows of a layer's table go? On the left which keys each head kept, on the right the table,
    32 rows a line. The cache is of one prompt."""
    table, n_tokens = cache.layers[layer], cache.prompt_length
    figure, (dense, rows) = plt.subplots(1, 2, figsize=(9.2, 3.8), width_ratios=(56, 38))
    head_ends = [first + table.room for first in table.first_new.tolist()]
    for head, color in enumerate((BLUE, ORANGE, GREEN)):
        kept = cache.kept_positions(layer, head).tolist()
        dropped = {"marker": "s", "color": GREY, "alpha": 0.25, "label": "a dropped key"}
        dense.scatter(range(n_tokens), [head] * n_tokens, s=19, **dropped)
        dense.scatter(kept, [head] * len(kept), s=19, marker="s", color=color)
        new, end = head_ends[head] - table.room, head_ends[head]
        for at, style in (
            (torch.arange(new - len(kept), new), {"color": color, "label": "a kept key"}),
            (
                torch.arange(new, end),
                {"facecolor": "white", "edgecolor": color, "label": "room for a new one"},
            ),
        ):
            rows.scatter(at % BLOCK, at // BLOCK, s=19, marker="s", **style)
    n_rows = table.keys.flatten(0, -2).size(0)
    rest = torch.arange(head_ends[-1], n_rows)
    rows.scatter(rest % BLOCK, rest // BLOCK, s=19, color=GREY, marker="x", label="the rest of a block")
    dense.set(xlabel="position in the prompt", ylabel="head", yticks=range(3), ylim=(2.7, -0.7))
    dense.set_title(f"of {n_tokens} keys the heads keep {', '.join(map(str, table.kept))}", fontsize=13)
    rows.set(xlabel="row in the block", ylabel="block", yticks=range(n_rows // BLOCK))
    rows.set_title("the layer's table, one colour per head", fontsize=13)
    rows.invert_yaxis()
    of_table = rows.get_legend_handles_labels()[0]
    handles = [dense.get_legend_handles_labels()[0][0], *of_table[:2], of_table[-1]]
    figure.legend(handles=handles, ncols=4, loc="outside lower center", fontsize=12)
    plt.show()


def how_much_is_held(bytes_held: dict[str, list[int]]):
    """How many bytes do the caches hold while a prompt is read? bytes_held: for each way to read it, when
    each layer has just made its keys, and at the end."""
    figure, axis = plt.subplots(figsize=(4.4, 3.8))
    styles = ((ORANGE, "-"), (BLUE, "-"), (GREEN, ":"))
    for (way, nbytes), (color, style) in zip(bytes_held.items(), styles, strict=True):
        mib = torch.tensor(nbytes) / 2**20
        axis.plot(range(1, len(mib) + 1), mib, style, color=color, linewidth=3)
        print(f"{way:28} peak {mib.max():6.1f} MiB, in the end {mib[-1]:6.1f} MiB")
    top = max(map(max, bytes_held.values())) / 2**20
    axis.text(12, 0.58 * top, "full cache", color=ORANGE, ha="right", fontsize=16)
    axis.text(31, 0.26 * top, "GVote,\nlayer by layer", color=BLUE, ha="right", va="top", fontsize=16)
    axis.text(16, 0.82 * top, "GVote, after\nthe last layer", color=GREEN, ha="right", fontsize=16)
    axis.set_xlabel("layer being read (31: done)", fontsize=17)
    axis.set_ylabel("cache held (MiB)", fontsize=17)
    axis.set_ylim(0, None)
    axis.tick_params(labelsize=16)
    plt.show()


def how_near_the_limit(seconds: dict, caches: dict, weight_bytes: int, bandwidth: float):
    """How much of a token's time does it take to read the bytes? seconds and caches: of speed.by_context;
    bandwidth in bytes per second. The picture shows all contexts, the table the longest."""
    contexts = sorted({n for n, _ in caches})
    limit = {key: 1000 * (weight_bytes + cache.nbytes) / bandwidth for key, cache in caches.items()}
    measured = {key: 1000 * median(times) for key, times in seconds.items()}  # both in ms
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.6), sharey=True)
    for axis, how in zip(axes, ("eager", "compiled"), strict=True):
        for way, color in (("full", ORANGE), ("GVote", BLUE)):
            axis.plot(contexts, [measured[n, how, way] for n in contexts], "o-", color=color)
            axis.plot(contexts, [limit[n, way] for n in contexts], "o:", color=color, markersize=4)
        axis.set_title(how, fontsize=13)
        axis.set(xlabel="tokens in the prompt", xlim=(0, 1.03 * contexts[-1]), ylim=(0, None))
        axis.set_xticks(contexts[-3:], [f"{n:,}" for n in contexts[-3:]])
    axes[0].set_ylabel("time per token (ms)")
    last = contexts[-1]
    named = (("full cache", "full", ORANGE), ("GVote", "GVote", BLUE))
    ends = [(measured[last, "compiled", way], name, color) for name, way, color in named]
    name_lines(
        axes[1], ends + [(limit[last, way], f"{name}, limit", color) for name, way, color in named], gap=0.09
    )
    plt.show()
    lines = [[f"{last:,} tokens, ms per token", "measured", "limit", "limit / measured"]]
    for how in ("eager", "compiled"):
        for way in ("full", "GVote"):
            time = measured[last, how, way]
            lines.append(
                [f"{way}, {how}", f"{time:.1f}", f"{limit[last, way]:.1f}", f"{limit[last, way] / time:.0%}"]
            )
    print_table(lines)


def which_blocks_are_read(table: Table):
    """Which blocks of rows does the kernel read for the first new token? Prints one line per block."""
    n_blocks = table.keys.flatten(0, -2).size(0) // BLOCK
    marks, readers = ["."] * n_blocks * BLOCK, [[] for _ in range(n_blocks)]
    for head, (new, kept) in enumerate(zip(table.first_new.tolist(), table.kept, strict=True)):
        marks[new - kept : new + 1] = [f"{head}"] * kept + ["n"]
        for block in range((new - kept) // BLOCK, new // BLOCK + 1):
            readers[block].append(f"{head}")
    print("block  0, 1, 2: a key that this head kept   n: the new token's   .: empty")
    for block, heads in enumerate(readers):
        row = "".join(marks[BLOCK * block : BLOCK * (block + 1)])
        print(f"{block:5}  {row}  " + (f"read by head {', '.join(heads)}" if heads else "not read"))


# Notebook 4: does it pay?


def plain_log(axis, lowest: int, highest: int):
    """Powers of ten, from 10**lowest on, as plain numbers."""
    powers = range(lowest, highest + 1)
    axis.set_ticks([10.0**n for n in powers], [f"{10.0**n:.{max(-n, 0)}f}" for n in powers], fontsize=11)


def loss_by_share(panels: dict[str, tuple[dict, dict]], what: str):
    """What does a method lose for what it keeps? panels: title -> lines, name -> [(keys kept in %, KL), ...],
    and points, the same for rules at their own setting."""
    colors = {"GVote": BLUE, "GVote, paper's rule": SKY, "H2O": ORANGE, "KVzip": PINK, "PeakVotes": RED}
    colors |= {"SnapKV": GREEN, "KeyDiff": GREY}
    width = 2.1 + 2.35 * len(panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 3.5), squeeze=False, sharey=True)
    for axis, (title, (lines, points)) in zip(axes[0], panels.items(), strict=True):
        for method, line in lines.items():
            axis.plot(*zip(*line, strict=True), "o-", color=colors[method], markersize=4, linewidth=1.5)
        for method, point in points.items():
            axis.plot(*point, "*", color=colors[method], markersize=15, markeredgecolor=BLACK)
        axis.set(xlabel="keys kept (%)", yscale="log", xlim=(5, 75), xticks=[25, 50, 75])
        axis.set_title(title, fontsize=13)
    low, high = axes[0, 0].get_ylim()
    plain_log(axes[0, 0].yaxis, math.ceil(math.log10(low)), math.floor(math.log10(high)))
    axes[0, 0].set_ylabel(f"KL on {what}\n(nats per token)")
    ends = [(line[-1][1], method, colors[method]) for method, line in lines.items()]
    star = points["GVote, paper's rule"][1]
    axes[0, 0].plot([], [], "*", color="white", markersize=15, markeredgecolor=BLACK, label="its own setting")
    figure.legend(loc="outside upper left", fontsize=12)
    name_lines(axes[0, -1], [*ends, (star * 1.5, "paper's rule", SKY)], gap=0.1)
    plt.show()


def more_than_chance(panels: dict[str, list[tuple]], xlabel: str):
    """Which differences are more than chance? panels: title -> (name, ratio, low, high) for each line. An
    interval that holds 1 shows no difference: it is grey."""
    n_lines = len(next(iter(panels.values())))
    figure, axes = plt.subplots(1, len(panels), figsize=(9.2, 1.2 + 0.3 * n_lines), sharey=True, sharex=True)
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for y, (_, factor, low, high) in enumerate(lines):
            color = GREY if low <= 1 <= high else BLUE if high < 1 else RED
            axis.plot([low, high], [y, y], color=color, linewidth=2.5)
            axis.plot(factor, y, "o", color=color, markersize=7)
        axis.axvline(1, color=BLACK, linewidth=0.8)
        axis.set(xscale="log", ylim=(n_lines - 0.5, -0.5))
        axis.set_title(title, fontsize=13)
        axis.set_yticks(range(n_lines), [name for name, *_ in lines], fontsize=12)
        low, high = axis.get_xlim()
        plain_log(axis.xaxis, math.ceil(math.log10(low)), math.floor(math.log10(high)))
        axis.grid(axis="x", alpha=0.3)
    figure.supxlabel(xlabel, fontsize=12)
    plt.show()


# Notebook 5: who votes


def which_rung_helps(panels: dict[str, list[dict[str, tuple]]], changed: dict[str, dict]):
    """Which change brings GVote closer to the full cache? panels: title -> blocks of rungs: by name what a
    rung multiplies the KL by, and the 95% interval. changed: what was changed -> the rungs, by name, where it
    was."""
    colors = dict(zip(changed, (BLUE, ORANGE, GREEN), strict=True))
    color = {rung: colors[what] for what, rungs in changed.items() for rung in rungs}
    figure, axes = plt.subplots(1, len(panels), figsize=(9.2, 6), sharex=True, sharey=True)
    for axis, (title, blocks) in zip(axes, panels.items(), strict=True):
        lines = [line for block in blocks for line in block.items()]
        for y, (rung, (factor, low, high)) in enumerate(lines):
            # an interval that holds 1 shows no difference
            face = "white" if low <= 1 <= high else color.get(rung, BLACK)
            axis.plot([low, high], [y, y], color=color.get(rung, BLACK), linewidth=2)
            axis.plot(factor, y, "o", color=color.get(rung, BLACK), markerfacecolor=face, markersize=8)
        axis.axvline(1, color=BLACK, linewidth=0.8, zorder=0)
        axis.axhline(len(blocks[0]) - 0.5, color=GREY, linewidth=1)
        axis.set(title=title, xscale="log", ylim=(len(lines) - 0.5, -0.5))
        axis.set_yticks(range(len(lines)), [rung for rung, _ in lines])
        axis.set_xticks([0.1, 1, 10, 100], ["\u00d7 0.1", "\u00d7 1", "\u00d7 10", "\u00d7 100"])
        axis.grid(axis="x", alpha=0.3)
    figure.supxlabel("times the KL of the rung before (below the line: of one bar)", fontsize=12)
    handles = [plt.Line2D([], [], marker="o", linewidth=2, color=c, label=what) for what, c in colors.items()]
    style = {"marker": "o", "color": BLACK, "markerfacecolor": "white"}
    handles.append(plt.Line2D([], [], label="no difference shown", **style))
    figure.legend(handles=handles, ncols=2, loc="outside upper center", fontsize=12)
    plt.show()


def which_heads_carry_the_code(falls: list[float], named: dict[int, str]):
    """By how much does the answer's KL fall when one head gets the code back? falls: of each head; named: the
    heads that read the code, and their names."""
    figure, axis = plt.subplots(figsize=(9.2, 3.4))
    axis.bar(range(len(falls)), falls, color=[RED if head in named else GREY for head in range(len(falls))])
    for head, name in named.items():
        if falls[head] > 0.2:
            axis.text(head, falls[head], name, color=RED, ha="center", va="bottom")
    axis.set(xlabel="layer (three heads each)", ylabel="KL falls by\n(nats per token)")
    axis.set_xticks(range(1, len(falls), 15), range(0, len(falls) // 3, 5))
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in (RED, GREY)]
    axis.legend(handles, ["one of the nine heads", "another head"], loc="upper left")
    plt.show()


def who_asks_for_the_code(heads: dict[str, dict[str, Tensor]], words: list[str], digits: range):
    """Which voters want which keys? heads: title -> name of the voters -> the strongest vote for each key
    around a note of these words; digits: where among them its digits stand."""
    figure, axes = plt.subplots(len(heads), 1, figsize=(9.2, 3.2 * len(heads)), sharex=True)
    for axis, (title, voters) in zip(axes, heads.items(), strict=True):
        votes = 100 * torch.stack(list(voters.values()))
        image = axis.imshow(votes, norm="log", vmin=0.03, vmax=100, aspect="auto", interpolation="nearest")
        axis.set_title(title)
        axis.set_yticks(range(len(voters)), voters, fontsize=12)
        for edge in (digits[0] - 0.5, digits[-1] + 0.5):
            axis.axvline(edge, color=ORANGE, linewidth=2)
    names = [word.replace("\n", "\\n").strip(" ") or "␣" for word in words]
    axes[-1].set_xticks(range(len(words)), names, rotation=90)
    bar = figure.colorbar(image, ax=axes, label="strongest vote (share of a query's attention)")
    bar.set_ticks([0.1, 1, 10, 100], labels=["0.1%", "1%", "10%", "100%"])
    bar.minorticks_off()
    plt.show()


# Notebook 6: any model


def which_policies_solve_it(rows: list[dict]):
    """Which policies still solve a benchmark's tasks? rows: of results/benchmarks.jsonl. Prints mean scores,
    their 95% intervals, and the shares of the keys kept."""
    plain = {"full": "full cache", "gvote": "GVote", "gvote_current_query": "GVote, paper's rule"}
    plain["peak_votes"] = "PeakVotes"
    table = {}
    for row in rows:
        ((score, _),) = row["scores"].values()
        name = plain.get(row["policy"], row["policy"].replace("Press:", ", told "))
        task = f"{row['task']}, {row['length']:,} tokens, {row['n']} prompts"
        scored = with_interval(score, *wilson(score, row["n"]), ".2f")
        table.setdefault(name, {})[task] = f"{scored}, {row['kept']:.0%}"
    header = ["score (95% interval), keys kept", *table["full cache"]]
    print_table([header, *([name, *cells.values()] for name, cells in table.items())])
