"""For all notebooks: their pictures, one function each, named after the question that it answers.

Writes images/*.png, by `save_picture`. Draws what it is given, and measures nothing.
"""

import inspect
import math
import os
import re
import textwrap
from itertools import count, product, takewhile
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
    """Which words does a policy throw away, and in which heads the note's digits? Side by side, passages of
    the prompt, each token shaded by the share of all heads that keep its key. Below, a box for each head,
    filled if it keeps all digits: first the heads that read them, then the others.

    panels: by name a cache and the answer's text. words: of the prompt's tokens. note, question: which of
    them are the note and the question. readers: (layer, head) of the heads that read the digits.
    """
    words = [word.replace("\n", " ") for word in words]
    around = range(note.start - 50, note.stop + 45)
    passage = [*range(10), *around, *range(question.start - 7, question.stop)]
    digits = [i for i in note if words[i].isdigit()]
    # black text stays readable on all
    shades = LinearSegmentedColormap.from_list("kept", ["white", "#5b9bd5"])
    width, n_columns, gutter, line = 9.2, 42, 4, 1
    column = width / (len(panels) * (n_columns + gutter) - gutter + 2)  # inches
    figure, axis = plt.subplots(layout="none")
    axis.set(position=(0, 0, 1, 1), xlim=(-1, width / column - 1))
    axis.axis("off")
    # a letter is as wide as a column
    font = {"family": "DejaVu Sans Mono", "size": 72 * column / 0.602, "va": "center_baseline"}

    def write(text: str, x: float = 0, share: float | None = None, weight: str = "normal"):
        x += left
        if share is not None:
            axis.add_patch(plt.Rectangle((x, line - 0.45), len(text), 0.9, color=shades(share), linewidth=0))
        axis.text(x, line, text, weight=weight, **font)

    left, last, kept = 0, 0, next(iter(panels.values()))[0].kept  # (n_layer, H_kv)
    others = [head for head in product(*map(range, kept.shape)) if head not in readers]
    for i, share in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        write(f"{share:4.0%} ", 5 * i, share)
    axis.add_patch(plt.Rectangle((0, line - 0.45), 25, 0.9, fill=False, linewidth=0.5))
    write(f"of the {kept.numel()} key/value heads keep the token's key", 26)
    for left, name in zip(count(0, n_columns + gutter), panels, strict=False):
        cache, answer = panels[name]
        heads = torch.cat([table.positions for table in cache.layers]).bincount(minlength=len(words))
        shares = (heads / kept.numel()).tolist()
        line, x, before = 2.8, 0, -1
        write(f"{name} keeps {cache.usage:.0%} of all keys", weight="bold")
        line += 1.2
        for i in passage:
            left_out = i - before - 1
            gap, word, before = f" [{left_out} tokens] " if left_out else "", words[i], i
            # of a word of several tokens
            rest = takewhile(lambda w: w[0] != " ", words[i + 1 : passage[-1] + 1])
            if x + len(gap + word) + (sum(map(len, rest)) if word[0] == " " else 0) > n_columns:
                line, x, gap, word = line + 1, 0, gap.lstrip(), word if gap else word.lstrip()
            write(gap, x)
            x += len(gap)
            write(word, x, shares[i], "bold" if i in digits else "normal")
            if i in note:  # its line above and below, and its two ends
                edges = [((x, x + len(word)), (line + y, line + y)) for y in (-0.45, 0.45)]
                ends = [(x, i == note[0]), (x + len(word), i == note[-1])]
                edges += [((at, at), (line - 0.45, line + 0.45)) for at, is_end in ends if is_end]
                for (start, stop), heights in edges:
                    axis.plot((left + start, left + stop), heights, color=RED, linewidth=2.5)
            x += len(word)
        for of_these, what, color in ((readers, "heads that read the code", RED), (others, "others", BLUE)):
            found = [set(digits) <= set(cache.kept_positions(*head).tolist()) for head in of_these]
            line += 1.5
            write(f"{sum(found)} of {len(found)} {what} keep it", weight="bold")
            line += 0.6
            for i, keeps in enumerate(found):
                corner = (left + 0.1 + i % n_columns, line + 0.6 * (i // n_columns))
                axis.add_patch(plt.Rectangle(corner, 0.75, 0.4, color=color, fill=keeps))
        right = "right" if "".join(words[i] for i in digits) in answer else "wrong"
        line += 2.2
        said = textwrap.shorten(answer, 74, placeholder=" ...")
        for part in textwrap.wrap(f"Answer ({right}): {said}", n_columns):
            write(part)
            line += 1
        last = max(last, line)
    axis.set_ylim(last, 0)
    figure.set_size_inches(width, 2 * column * last)  # a line is as high as two columns are wide
    return figure


# Notebook 1: GVote on one head


def show_code(*functions):
    """Shows functions as a notebook's output, without their docstrings."""
    codes = (textwrap.dedent(inspect.getsource(function)) for function in functions)
    code = "\n\n".join(re.sub(r'\s*""".*?"""', "", each, count=1, flags=re.DOTALL).rstrip() for each in codes)
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


def which_tokens_vote(words: list[str], votes: Tensor, bar: float):
    """Whom do a few tokens vote for, and which keys reach the bar? One head: votes (G * T, T) of the tokens.
    Those of the first query head are rows of their own, of the others there is the strongest."""
    n = len(words)
    rows = torch.stack([*votes[:n], votes[n:].amax(dim=0), votes.amax(dim=0)])
    figure, axis = plt.subplots(figsize=(7.6, 4.6))
    colors = LinearSegmentedColormap.from_list("votes", ["white", SKY, GREEN], N=3)
    reached = (rows >= bar).float()
    reached[-1] *= 2
    axis.imshow(reached, cmap=colors, vmin=0, vmax=2, aspect="auto", alpha=0.85)
    for voter, shares in enumerate(rows.tolist()):
        for key, share in enumerate(shares):
            color, weight = BLACK if share >= bar else GREY, "bold" if voter > n else None
            axis.text(key, voter, f"{100 * share:.1f}", color=color, weight=weight, ha="center", va="center")
    # right of this line, a voter looks at later tokens
    steps = [(i + 0.5, y) for i in range(n - 1) for y in (i - 0.5, i + 0.5)]
    axis.plot(*zip(*steps, strict=True), color=RED, linewidth=2.5)
    axis.set_xticks(range(n), [word.strip() for word in words])
    axis.set_xticks([i + 0.5 for i in range(n - 1)], minor=True)
    axis.set_yticks(range(n + 2), [*(word.strip() for word in words), "two more\nquery heads", "strongest"])
    axis.set_ylabel("voters: all tokens,\nmoved to the next position")
    axis.set_yticks([i + 0.5 for i in range(n + 1)], minor=True)
    axis.grid(which="minor", color="white", linewidth=2)
    axis.tick_params(which="both", length=0)
    axis.xaxis.tick_top()
    axis.spines[:].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color, alpha=0.85) for color in (SKY, GREEN)]
    handles.append(plt.Line2D([], [], color=RED, linewidth=2.5))
    names = [f"at least {bar:.1%}", "kept", "right of it: keys of later tokens"]
    figure.legend(handles, names, ncols=3, loc="outside lower center", fontsize=12)
    figure.suptitle("votes: attention (%)", fontsize=12)
    plt.show()


def how_many_votes(sizes: Tensor, current: Tensor, n: int):
    """How many keys does each sample vote for? sizes (G, S): by GVote's rule. n: by the paper's rule, the
    mean of current (G,), the sizes of the current query's nuclei."""
    figure, axis = plt.subplots(figsize=(9.2, 3.6))
    n_heads, n_samples = sizes.shape
    # before the line
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}
    starts = [g * (n_samples + 3) for g in range(n_heads)]
    for start, dots, diamond in zip(starts, sizes.tolist(), current.tolist(), strict=True):
        axis.plot(range(start, start + n_samples), dots, "o", color=BLUE, markersize=7)
        for x, size in enumerate(dots, start):
            axis.text(x, 1.15 * size, f"{size}", ha="center", fontsize=11, bbox=box)
        axis.plot(start + n_samples, diamond, "D", color=BLACK)
        axis.text(start + n_samples, 1.15 * diamond, f"{diamond}", ha="center", fontsize=11)
    axis.axhline(n, color=RED, zorder=0)
    axis.set_xticks([start + 3.5 for start in starts], [f"query head {g}" for g in range(n_heads)])
    axis.tick_params(axis="x", length=0)
    axis.set(ylabel="keys voted for", yscale="log", xlim=(-0.8, starts[-1] + n_samples + 1), ylim=(5, 1000))
    axis.set_yticks([10, 100, 1000], ["10", "100", "1,000"])
    ends = [(300, "\u25cf GVote:\na dot per sample", BLUE), (n, f"paper's rule:\n{n} keys each", RED)]
    name_lines(axis, [*ends, (9, "\u25c6 nucleus of the\ncurrent query", BLACK)])
    plt.show()


def where_votes_fall(
    panels: dict[str, Tensor], peak: Tensor, bar: float, words: list[str], near: range, marked: list[int]
):
    """Which keys near the note get votes? One head: panels: by rule, the votes (G * S, T) of its samples;
    peak (T,), PeakVotes' strongest vote for each key, and its bar. words: of the prompt; near: which of them
    to show; marked: which of these are the code."""
    figure, axes = plt.subplots(3, 1, figsize=(9.2, 7.6), sharex=True)
    for axis, (title, votes) in zip(axes, panels.items(), strict=False):
        kept = votes.any(dim=0)
        for marks, top, color in ((votes, 0, BLUE), (kept[None], len(votes) + 1, GREEN)):
            shades = LinearSegmentedColormap.from_list("votes", ["white", color])
            extent = (near[0] - 0.5, near[-1] + 0.5, top + max(len(marks), 4) - 0.5, top - 0.5)
            style = {"cmap": shades, "vmin": 0, "vmax": 1, "interpolation": "nearest"}
            axis.imshow(marks[:, near].float(), aspect="auto", extent=extent, **style)
        for y in (7.5, 15.5, 23.5):
            axis.axhline(y, color=GREY, linewidth=0.8)
        axis.set_title(f"{title} (keeps {kept.float().mean():.0%} of this head's keys)", fontsize=13)
        axis.set(ylim=(len(votes) + 4.5, -0.5))
        axis.set_yticks([3.5, 11.5, 19.5, 26.5], [*(f"query head {g}" for g in range(3)), "kept"])
        axis.tick_params(axis="y", length=0)
    kept, axis = peak >= bar, axes[-1]
    for which, color in ((kept, GREEN), (~kept, GREY)):
        dots = [i for i in near if which[i]]
        axis.plot(dots, 100 * peak[dots], "o", color=color)
    axis.axhline(100 * bar, color=BLACK, linewidth=1)
    axis.set_title(f"PeakVotes (keeps {kept.float().mean():.0%} of this head's keys)", fontsize=13)
    axis.set(yscale="log", ylabel="strongest vote", ylim=(0.05, 150))
    axis.set_yticks([0.1, 1, 10, 100], ["0.1%", "1%", "10%", "100%"])
    axis.text(near[-1] + 0.7, 100 * bar, f"bar: {bar:.2%}", va="center")
    axis.set_xlim(near[0] - 0.5, near[-1] + 0.5)
    axis.set_xticks(near, [words[i].strip(" ").replace("\n", "\\n") or "\u2423" for i in near], rotation=90)
    axis.set_xlabel(
        "keys near the note (green: kept; a blue cell: one sample votes for one key)", fontsize=12
    )
    for axis in axes:
        axis.axvspan(marked[0] - 0.5, marked[-1] + 0.5, color=RED, alpha=0.12, linewidth=0)
    for tick, i in zip(axes[-1].get_xticklabels(), near, strict=True):
        tick.set(fontsize=11, color=RED if i in marked else BLACK)
    plt.show()


def what_all_heads_keep(panels: dict[str, Tensor]):
    """Which keys do all heads keep? panels: by rule (layers, H_kv, T); a cell is the mean of 32 tokens."""
    figure, axes = plt.subplots(1, len(panels), figsize=(9.2, 4.4), sharey=True)
    for axis, (title, kept) in zip(axes, panels.items(), strict=True):
        cells = 100 * F.avg_pool1d(kept.flatten(0, 1).float(), 32, ceil_mode=True)
        extent = (0, 32 * cells.size(1), len(kept), 0)
        image = axis.imshow(cells, aspect="auto", vmin=0, vmax=100, interpolation="nearest", extent=extent)
        axis.set_title(f"{title}:\nkeeps {kept.float().mean():.0%}", fontsize=13)
        axis.set(xticks=[0, 500, 1000], yticks=[0, 10, 20, 30])
    axes[0].set_ylabel("layer (three heads each)")
    figure.supxlabel("position in the prompt (a cell: one head, 32 tokens)", fontsize=13)
    figure.colorbar(image, ax=axes, ticks=[0, 50, 100], label="keys kept (%)")
    plt.show()


def do_samples_ask(heads: list[tuple[int, int]], paid: dict[str, list[Tensor]], even: float):
    """Who asks for what the answer reads? heads: (layer, head) of some. paid: by voter, in all heads, the
    attention to it: of one query, or of several (N,). even: an even share."""
    figure, axis = plt.subplots(figsize=(9.2, 4.2))
    x, ends = range(len(heads)), [(100 * even, "spread evenly", BLACK)]
    for (name, each), color, marker in zip(paid.items(), (RED, GREEN, SKY), "Dso", strict=True):
        shares = torch.stack(each).unflatten(0, (-1, 3))[tuple(zip(*heads, strict=True))].view(len(heads), -1)
        axis.plot(x, 100 * shares.clamp(min=1e-7), marker, color=color, markersize=4 if marker == "o" else 7)
        print(f"attention to the code, {name}: {shares.min():.2%} to {shares.max():.2%}")
        ends.append((100 * shares.log().mean().exp().item(), textwrap.fill(name, 18), color))
    print(f"attention to the code, spread evenly: {even:.2%}")
    axis.axhline(100 * even, color=BLACK, linewidth=1, linestyle="--")
    axis.set_xticks(x, [f"{layer}.{head}" for layer, head in heads], fontsize=10)
    axis.set(xlabel="heads that read the code (layer.head)", ylabel="attention paid\nto the code")
    axis.set(yscale="log", ylim=(5e-6, 300))
    ticks = [1e-5, 1e-3, 0.1, 1, 10, 100]
    axis.set_yticks(ticks, ["0.00001%\nor less", *(f"{tick:g}%" for tick in ticks[1:])])
    name_lines(axis, ends, gap=0.15)
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

RULE_COLORS = {"GVote": BLUE, "GVote, paper's rule": ORANGE}


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
    names = [*sorted(others, key=lambda name: sum(shares[name]["GVote"])), first]
    figure, axis = plt.subplots(figsize=(8, 5))
    # one above the other, so that no rule hides the other
    for (rule, color), shift in zip(RULE_COLORS.items(), (0.17, -0.17), strict=True):
        dots = [(share, y + shift) for y, name in enumerate(names) for share in shares[name][rule]]
        axis.plot(*zip(*dots, strict=True), "o", color=color, alpha=0.6, markeredgewidth=0, label=rule)
    for y in range(len(names) - 1):
        axis.axhline(y + 0.5, color=GREY, linewidth=1 if y == len(names) - 2 else 0.3)
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


def do_longer_prompts_keep_less(prompts: dict[str, dict]):
    """Does a longer prompt keep a smaller share? prompts: rule -> tokens -> mean share kept (%) of some
    prompts, and its interval."""
    figure, axis = plt.subplots(figsize=(8, 3.4))
    for rule, color in RULE_COLORS.items():
        lengths, shares = list(prompts[rule]), list(prompts[rule].values())
        mean, low, high = zip(*shares, strict=True)
        axis.fill_between(lengths, low, high, color=color, alpha=0.25, linewidth=0)
        axis.plot(lengths, mean, "o-", color=color, label=rule)
        for tokens, share in zip(lengths, mean, strict=True):
            axis.text(tokens, share + 4, f"{share:.0f}%", color=color, ha="center")
    axis.set(xlabel="tokens in the prompt", ylabel="keys kept (%)", ylim=(0, 85), xscale="log")
    axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axis.minorticks_off()
    axis.margins(x=0.08)
    figure.legend(loc="outside right center")
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
    lines = [[f"{last:,} tokens, ms per token", "measured", "limit", "measured / limit"]]
    for how in ("eager", "compiled"):
        for way in ("full", "GVote"):
            time = measured[last, how, way]
            lines.append(
                [f"{way}, {how}", f"{time:.1f}", f"{limit[last, way]:.1f}", f"{time / limit[last, way]:.1f}"]
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


def what_do_kept_keys_buy(lines: dict[str, list[tuple]], rules: dict[str, tuple]):
    """How well does a method do with the keys that it keeps? lines: of each method that is told its share,
    (keys kept in %, KL, numbers found in %) for each share. rules: the same of each rule with a budget of its
    own, but of KL and numbers found also both ends of the interval."""
    colors = {"GVote": BLUE, "GVote, paper's rule": SKY, "PeakVotes": RED, "KVzip": PINK, "H2O": ORANGE}
    colors |= {"SnapKV": GREEN, "AdaKV": GREEN, "KeyDiff": GREY, "random": GREY}
    dashes = {"AdaKV": "dashed", "StreamingLLM": "dashed", "random": "dotted"}
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 4.4), sharex=True, width_ratios=(1, 0.8))
    for panel, axis in enumerate(axes, start=1):
        for method, points in lines.items():
            shares, heights = [point[0] for point in points], [point[panel] for point in points]
            style = {"color": colors.get(method, BLACK), "linestyle": dashes.get(method, "solid")}
            axis.plot(shares, heights, marker="o", markersize=3.5, linewidth=1.4, **style)
        for rule, point in rules.items():
            mean, low, high = point[panel]
            axis.plot((point[0], point[0]), (low, high), color=colors[rule], linewidth=2.5)
            style = {"color": colors[rule], "markersize": 16, "markeredgecolor": BLACK}
            axis.plot(point[0], mean, "*", zorder=3, **style)
            above = {"xytext": (0, 10), "textcoords": "offset points", "ha": "center", "color": colors[rule]}
            above["bbox"] = {"color": "white", "alpha": 0.8, "pad": 1}
            axis.annotate(rule.removeprefix("GVote, "), (point[0], high), fontsize=11, **above)
        axis.set(xlabel="keys kept (%)", xlim=(10, 78))
    axes[0].set(yscale="log")
    axes[1].set(ylim=(-5, 118), yticks=range(0, 101, 20))
    low, high = axes[0].get_ylim()
    plain_log(axes[0].yaxis, math.ceil(math.log10(low)), math.floor(math.log10(high)))
    axes[0].set_title("KL on text and code (nats per token)", fontsize=13)
    axes[1].set_title("numbers found (%)", fontsize=13)
    named = {method: f"{method} ({dashes[method]})" if method in dashes else method for method in lines}
    ends = [(lines[method][-1][1], name, colors.get(method, BLACK)) for method, name in named.items()]
    name_lines(axes[0], ends, gap=0.075)
    plt.show()
    return figure


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
    colors = dict(zip(changed, (BLUE, ORANGE, GREEN, BLACK), strict=True))
    color = {rung: colors[what] for what, rungs in changed.items() for rung in rungs}
    figure, axes = plt.subplots(1, len(panels), figsize=(9.2, 6), sharex=True, sharey=True)
    for axis, (title, blocks) in zip(axes, panels.items(), strict=True):
        lines = [line for block in blocks for line in block.items()]
        for y, (rung, (factor, low, high)) in enumerate(lines):
            # an interval that holds 1 shows no difference
            face = "white" if low <= 1 <= high else color[rung]
            axis.plot([low, high], [y, y], color=color[rung], linewidth=2)
            axis.plot(factor, y, "o", color=color[rung], markerfacecolor=face, markersize=8)
        axis.axvline(1, color=BLACK, linewidth=0.8, zorder=0)
        axis.axhline(len(blocks[0]) - 0.5, color=GREY, linewidth=1)
        axis.set(title=title, xscale="log", ylim=(len(lines) - 0.5, -0.5))
        axis.set_yticks(range(len(lines)), [rung for rung, _ in lines])
        axis.set_xticks([0.1, 1, 10, 100], ["\u00d7 0.1", "\u00d7 1", "\u00d7 10", "\u00d7 100"])
        axis.grid(axis="x", alpha=0.3)
    figure.supxlabel("times the KL of the rung before (below the line: of one bar)", fontsize=12)
    handles = [plt.Line2D([], [], marker="o", linewidth=2, color=c, label=what) for what, c in colors.items()]
    style = {"marker": "o", "color": BLACK, "markerfacecolor": "white", "linewidth": 0}
    handles.append(plt.Line2D([], [], label="hollow: no difference shown", **style))
    figure.legend(handles=handles, ncols=3, loc="outside upper center", fontsize=12)
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
