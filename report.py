"""
Grids and pages of a run: one HTML file with everything inside, which opens without a network.

    python report.py out/c2i                    # writes out/c2i/report.html; train.py does so too when it ends
    python report.py out/seed0 out/seed1 out/x  # several runs on one page, out/compare.html
    python report.py base.json tuned.json --out frontier.png  # tables of evaluate.py: accuracy against diversity
    python report.py out/seed0 out/seed1 out/seed2 --out assets/curves_c2i.json  # the band behind runs of this recipe

A run's page shows its settings, a curve for each metric with its healthy range, the same prompts and seeds during
training, one picture as base and tuned model write it token by token from the same random numbers, and the table of
evaluate.py where there is one. In a comparison, runs whose settings are equal except for the seed are one line with a
band.

Shapes: n pictures, T image tokens.
"""

import base64
import html
import io
import json
import math
import textwrap
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import data
import zoo
from grpo import policy_states
from model import image_noise, policy_logprobs
from rewards import held_out, judge_images, parse_rewards
from runs import warnings
from sample import draw, interleave, label_images, save_grid
from tokenizer import to_uint8
from zoo import Mistake

ASSETS = Path(__file__).parent / "assets"
NOTES = {  # metric: (what is healthy, the range of it that is drawn as a band or None)
    "reward": ("rises, then levels off", None),
    "right": ("rises with the reward; if it falls meanwhile, the judges are hacked", None),
    "kl": ("rises early, with --ref-cfg from above 0, then stays flat or falls; nats per token", None),
    "entropy": ("drifts down a little; a plunge is collapse; nats per token", None),
    "reward_std": ("falls slowly; at 0 nothing is left to learn from", None),
    "ratio": ("1 with one update per batch", (0.99, 1.01)),
    "clip_frac": ("0 with one update per batch, below 0.2 with several", (0, 0.2)),
    "sampler_gap": ("below 1e-4 in float32, a few per cent in bfloat16", None),
    "grad_norm": ("steady; it is clipped to 1", None),
    "loss": ("beta times kl with one update per batch", None),
    "equal_groups": ("near 0: such groups teach nothing", (0, 0.2)),
    "advantage_max": ("at most (G-1)/sqrt(G), 2.5 for 8 samples, where the spread divides it", None),
}
STYLE = """
:root { color-scheme: light dark; --soft: #94a3b855 }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1240px; padding: 0 16px 48px;
  overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
.charts { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 280px), 1fr)) }
figure { margin: 0; border: 1px solid var(--soft); border-radius: 8px; padding: 8px } figcaption { font-size: .85rem }
svg { width: 100%; height: auto; display: block }
img { max-width: 100%; height: auto } input[type=range] { width: 100% }
.wide, pre { overflow-x: auto } .wide img { min-width: 640px } table { border-collapse: collapse; font-size: .85rem }
td, th { border-bottom: 1px solid var(--soft); padding: 2px 8px; text-align: right; white-space: nowrap }
.pair { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)) }
.writers { display: flex; flex-wrap: wrap; gap: 24px } .frame { width: 192px; height: 192px; background-color: #888;
  image-rendering: pixelated } .words { display: grid; width: 256px; margin: 8px 0 }
.words button { font: 9px/1.8 ui-monospace, monospace; padding: 0; border: 1px solid #0000; background: none;
  color: inherit; cursor: pointer } .words .now { border-color: currentcolor; font-weight: bold }
.likely { display: grid; grid-template-columns: 32px 3em 1fr; gap: 2px 8px; align-items: center; width: 256px;
  font: 11px ui-monospace, monospace } .likely .drawn { font-weight: bold }
.bar { background: #64748b55; white-space: nowrap }
.patch { width: 32px; height: 32px; image-rendering: pixelated }
"""
SCRIPT = """
for (const box of document.querySelectorAll('[data-slides]')) {
  const slides = [...box.querySelectorAll('.slide')], slider = box.querySelector('input');
  const name = box.querySelector('b');
  const show = () => slides.forEach((slide, k) => { slide.hidden = k != slider.value;
    if (k == slider.value) name.textContent = slide.dataset.name });
  slider.oninput = show; show();
}
for (const box of document.querySelectorAll('[data-writer]')) {
  const slider = box.querySelector('input'), play = box.querySelector('button'), T = +box.dataset.tokens;
  const columns = 8, last = +slider.max, writers = [...box.querySelectorAll('[data-likely]')];
  const show = (now) => { const k = +slider.value;
    for (const frame of box.querySelectorAll('.frame')) frame.style.backgroundPosition =
      `${k % columns / (columns - 1) * 100}% ${Math.floor(k / columns) / (Math.ceil((last + 1) / columns) - 1) * 100}%`;
    for (const writer of writers) {
      const tokens = JSON.parse(writer.dataset.tokens), likely = JSON.parse(writer.dataset.likely)[now];
      [...writer.querySelector('.words').children].forEach((cell, i) => {
        cell.textContent = i < T * k / last ? tokens[i] : '.'; cell.className = i == now ? 'now' : '' });
      const rows = writer.querySelector('.likely').children;
      likely.forEach(([code, p], j) => { const [patch, name, bar] = [0, 1, 2].map((c) => rows[3 * j + c]);
        patch.style.backgroundPosition = `${j * 25}% ${now / (T - 1) * 100}%`;
        name.textContent = code; name.className = bar.className = code == tokens[now] ? 'drawn' : '';
        bar.firstChild.style.width = `${p}%`; bar.firstChild.textContent = `${p}%` }) } };
  const written = () => Math.max(0, Math.ceil(T * slider.value / last) - 1);
  for (const writer of writers) [...writer.querySelector('.words').children].forEach((cell, i) => {
    cell.onclick = () => { slider.value = Math.ceil((i + 1) / T * last); show(i) } });
  let timer = null;
  play.onclick = () => { if (timer) { clearInterval(timer); timer = null; return }
    if (+slider.value == last) slider.value = 0;
    timer = setInterval(() => { slider.value = +slider.value + 1; show(written());
      if (+slider.value == last) { clearInterval(timer); timer = null } }, 80) };
  slider.oninput = () => show(written()); show(Math.floor(T / 2 + Math.sqrt(T) / 2));  // the picture's middle
}
"""


# ---------------------------------------------------------------------------------------------------------------
# Pictures of a run


def shown_prompts(args):
    """The labels or captions of every grid of a run, and the number of its columns."""
    if not args.pool:
        return data.balanced_captions(24), len(data.CATEGORIES)  # a category per column
    # all of the toy's classes, two of its colours per row; of large pictures a page
    prompts = args.pool[:: -(-len(args.pool) // (40 if zoo.is_toy(args.model) else 16))]
    return prompts, min(len(prompts), len(data.CATEGORIES) if args.task == "t2i" else 10)


def draw_shown(args, policy, tokenizer, encode):
    """Pictures (n, 3, H, W) in [0, 1] of the same prompts and seeds each time, and their captions."""
    prompts, _ = shown_prompts(args)
    sampling = dict(cfg_scale=args.cfg_scale, temperature=args.temperature, dtype=args.dtype)
    # one seed whatever --seed is, so that grids of runs compare
    images, _ = draw(policy, tokenizer, encode, prompts, seed=1234, decode_batch=args.micro_batch, **sampling)
    return images, zoo.captions_of(args.model, prompts, args.class_names)


def draw_grid(args, policy, tokenizer, encode, judges, name, title):
    """
    Draws args.out/NAME: below each picture its caption, for a toy the verifier's mark, and the judges' scores. Returns
    the pictures (n, 3, H, W).
    """
    images, captions = draw_shown(args, policy, tokenizer, encode)
    scores, _ = judge_images(judges, images.to(args.device), captions)
    labels = label_images(args.model, images, captions)
    for k in range(len(labels)):  # spaces that do not break: a score stays beside its judge's name
        verdicts = [f"{judge.removeprefix('pyiqa:')}\u00a0{values[k]:.2f}" for judge, values in scores.items()]
        labels[k] += "\n" + "\u00a0 ".join(verdicts)
    _, columns = shown_prompts(args)
    save_grid(args.out / name, images, labels, columns, title=title)
    return images


def finish_run(args, policies, before, tokenizer, encode, judges):
    """
    After training: after.png, before-after.png, curves.png and the page. policies: {"base": model, "tuned": model};
    before: the pictures of before.png, or None where the run was resumed. All processes must call it.
    """
    if before is None:
        before, _ = draw_shown(args, policies["base"], tokenizer, encode)
    title = f"after {args.steps} steps of GRPO"
    after = draw_grid(args, policies["tuned"], tokenizer, encode, judges, "after.png", title)
    prompts, columns = shown_prompts(args)
    captions = zoo.captions_of(args.model, prompts, args.class_names)
    labels = [label_images(args.model, before, captions, "before: ")]
    labels += [label_images(args.model, after, captions, "after: ")]
    pictures, texts = interleave([before, after], labels, columns)
    save_grid(args.out / "before-after.png", pictures, texts, columns, title=f"before above {title}")
    write_curves(args.out)
    sampling = dict(cfg_scale=args.cfg_scale, temperature=args.temperature)
    with zoo.autocast(args.device, args.dtype):
        written = writers(policies, tokenizer, encode, captions[-1], prompts[-1], **sampling)
    write_run(args.out, written)
    print(f"Look at {args.out}/report.html, or before-after.png and curves.png; "
          f"then: python evaluate.py --ckpt {args.out}")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# One step

UNIT = 1.15  # inches of a picture and its gap
LEFT, RIGHT, BOTTOM = 2.0, 0.2, 1.15  # inches around the rows; the names of the rows stand on the left
LEAST = 6.6  # inches of the first row, which is as wide for two pictures
CORNER = 8  # words of a side that are shown: more would be too small to read
SMALL = dict(color="grey", fontsize=7)


@contextmanager
def our_style():
    """
    Inside, matplotlib's own defaults hold, whatever the user's files and notebook say. Text stays as it is: what stands
    between the "$" of two prices is no formula.
    """
    import matplotlib.style  # not pyplot, which would choose a backend

    with matplotlib.style.context(["default", {"text.parse_math": False, "text.usetex": False}]):
        yield


def as_array(values):
    """A tensor of any device and type, or an array, as a numpy array of float32."""
    return torch.as_tensor(values).detach().float().cpu().numpy()


def draw_step(path, caption, images, tokens, scores, rewards, advantages, change, weights, n):
    """
    Draws what a step did with one group of K pictures: a row per tensor, a column per picture, from the lowest reward
    to the highest. Takes tensors or arrays. Writes a .png; raises OSError.

    images      (K, 3, H, W) in [0, 1]       tokens   (K, T)
    scores      {judge: (K,)}                weights  {judge: weight}
    rewards     (K,)                         n        pictures of the whole step, for the shapes beside the rows
    advantages  (K,), or (K, T) with token weights
    change      (K, T) nats, of each token's log-probability in the update
    """
    order = np.argsort(as_array(rewards))
    scores = {judge.removeprefix("pyiqa:"): as_array(values)[order] for judge, values in scores.items()}
    weights = {judge.removeprefix("pyiqa:"): weight for judge, weight in weights.items()}
    images, tokens, rewards, advantages, change = (
        as_array(values)[order] for values in (images, tokens, rewards, advantages, change)
    )
    figure = step_figure(caption, images, tokens, scores, rewards, advantages, change, weights, n)
    zoo.write_whole(Path(path), lambda place: figure.savefig(place, dpi=100, format="png"))


@our_style()
def step_figure(caption, images, tokens, scores, rewards, advantages, change, weights, n):
    """The figure of draw_step, from arrays in the order in which they are drawn."""
    K, T = change.shape
    shared_out = advantages.ndim == 2
    # the weights of an image's tokens have mean 1, so the mean is the advantage that they share out
    of_image = advantages.mean(1) if shared_out else advantages  # (K,)
    above = [0.6, 0.4 + 0.14 * len(scores), 0.2, 0.2, 0.2, 0.2][: 5 + shared_out]
    heights = [1.5, UNIT, max(0.8, 0.5 + 0.12 * len(weights)), 0.9, UNIT, UNIT][: 5 + shared_out]
    figure, rows = stack_rows(heights, above, K)
    few = f"{K} of the {n}" if n > K else f"the {K}"
    rows[0].set_title(f"One group: {few} pictures of a step, for “{shortened(caption, 50)}”", loc="left", fontsize=10)

    name_row(rows[0], "sample", f"tokens ({n}, {T})", f"a picture is {T} words")
    draw_words(rows[0], images[-1], tokens[-1])
    name_row(rows[1], "judge", f"images {(n, *images.shape[1:])}", f"each judge: scores ({n},)")
    draw_squares(rows[1], images.transpose(0, 2, 3, 1), T)
    for k in range(K):
        said = [f"{judge[:14]} {values[k]:.2f}" for judge, values in scores.items()]
        rows[1].text(k + 0.5, 1.05, "\n".join(said), ha="center", va="bottom", **SMALL)
    weighted = [f"{weight:g} × {judge}" for judge, weight in weights.items()]
    name_row(rows[2], "add up", f"rewards ({n},)", "\n+ ".join(weighted))
    draw_bars(rows[2], rewards, "{:.2f}")
    name_row(rows[3], "compare", f"advantages ({n},)", "the reward against\nits group's mean")
    draw_bars(rows[3], of_image, "{:+.2f}")
    if shared_out:
        name_row(rows[4], "divide", f"advantages ({n}, {T})", "each token's share\nof the advantage")
        with np.errstate(all="ignore"):  # an advantage of 0 has no shares
            shares = np.nan_to_num(advantages / of_image[:, None], posinf=0, neginf=0)
        draw_squares(rows[4], shares, T, cmap="Greys", vmin=0, vmax=shares.max() or 1)
    name_row(rows[-1], "learn", f"change of log pi ({n}, {T})", "what the update did\nto each token")
    change = np.nan_to_num(change)
    most = np.percentile(abs(change), 98) or 1
    draw_squares(rows[-1], change, T, cmap="RdBu", vmin=-most, vmax=most)
    for k in range(K):
        pushed = np.mean(np.sign(change[k]) == np.sign(of_image[k]))
        rows[-1].text(k + 0.5, -0.06, f"{pushed:.0%} moved\nas pushed", ha="center", va="top", **SMALL)
    scale = rows[-1].inset_axes([0.4, -0.72, 2.8, 0.08], transform=rows[-1].transData)
    figure.colorbar(rows[-1].images[-1], cax=scale, orientation="horizontal", extend="both")
    scale.tick_params(labelsize=6)
    scale.set_title("less likely      change of log-probability, nats      more likely", fontsize=7, pad=2)
    return figure


def stack_rows(heights, above, K):
    """A figure and its rows, one below the other: of each its height and the gap above it, in inches."""
    from matplotlib.figure import Figure

    width = LEFT + max(K * UNIT, LEAST) + RIGHT
    total = sum(above) + sum(heights) + BOTTOM
    figure, rows, bottom = Figure(figsize=(width, total)), [], total
    for gap, height in zip(above, heights, strict=True):
        bottom -= gap + height
        row = figure.add_axes([LEFT / width, bottom / total, K * UNIT / width, height / total])
        row.set(xlim=(0, K), ylim=(0, height / UNIT), xticks=[], yticks=[], frame_on=False)
        rows.append(row)
    return figure, rows


def name_row(row, verb, tensor, note):
    """Beside a row: what is done, the tensor that comes out of it, and a note."""
    lines = [(verb, dict(fontsize=10, weight="bold")), (tensor, dict(family="monospace", fontsize=8)), (note, SMALL)]
    place = dict(xycoords="axes fraction", textcoords="offset points", ha="right", va="top", linespacing=1.3)
    for k, (text, style) in enumerate(lines):
        row.annotate(text, (0, 1), (-10, -14 * k), **place, **style)


def draw_words(row, image, tokens):
    """A picture (3, H, W) beside the words of its tokens (T,); of many tokens those of a corner."""
    T, size = len(tokens), row.get_ylim()[1]
    side = math.isqrt(T)
    shown = min(side, CORNER)
    draw_square(row, 0.03, image.transpose(1, 2, 0), T, size)
    left, line, word = size + 0.1, size / shown, 1.7 * size / shown  # a word is wider than its line is high
    for i in range(shown):
        for j in range(shown):
            place = left + (j + 0.5) * word, size - (i + 0.5) * line
            row.text(*place, f"{tokens[i * side + j]:.0f}", ha="center", va="center", family="monospace", fontsize=6.5)
    note = f"The policy writes {T} words, row by row. Each is a code of the tokenizer's book"
    note += "." if shown == side else f". Here those of the corner, {shown} by {shown}."
    row.text(left + 1.7 * size + 0.15, size, textwrap.fill(note, 34), va="top", linespacing=1.3, **SMALL)


def draw_squares(row, values, T, **colours):
    """A square for each of K pictures (K, H, W, 3), or for the values of their tokens (K, T)."""
    for k in range(len(values)):
        draw_square(row, k + 0.03, values[k], T, 0.94, **colours)


def draw_square(row, left, values, T, size, **colours):
    """A picture (H, W, 3), or the values of its tokens (T,), with the grid of its tokens."""
    side = math.isqrt(T)
    values = values if values.ndim == 3 else values.reshape(side, side)
    row.imshow(values, extent=(left, left + size, 0, size), aspect="auto", **colours)
    lines = np.linspace(0, size, side + 1)
    row.hlines(lines, left, left + size, color="white", alpha=0.15, linewidth=0.4)
    row.vlines(left + lines, 0, size, color="white", alpha=0.15, linewidth=0.4)


def draw_bars(row, values, form):
    """A bar for each of the values (K,), and its number."""
    low, high = min(0, values.min()), max(0, values.max())
    room = 0.3 * (high - low) or 1  # for the numbers
    row.set_ylim(low - room * (low < 0), high + room * (high > 0))
    row.axhline(0, color="black", linewidth=0.6, clip_on=False)
    row.bar(np.arange(len(values)) + 0.5, values, color="dimgrey", width=0.5)
    for k, value in enumerate(values):
        row.text(k + 0.5, value, form.format(value), ha="center", va="top" if value < 0 else "bottom", fontsize=8)


def shortened(text, most):
    """A caption of any length, in one line."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}\u2026"


GROUP_NOTE = (
    "One number, its advantage, pushes the whole picture: background tokens as hard as the object's, and a bad patch "
    "in a good picture the wrong way too. All pictures share the model's weights, so some tokens move against the push."
)


def groups(folder):
    """The section with the groups of a run's first, middle and last step."""
    figures = ""
    for path in sorted((folder / "samples").glob("group_*.png")):
        step = int(path.stem.removeprefix("group_"))
        figures += (
            f'<figure class="wide"><img alt="" src="{data_uri(Image.open(path))}">'
            f"<figcaption>step {step}</figcaption></figure>"
        )
    return f"<h2>One group, dissected</h2><p>{GROUP_NOTE}</p>{figures}" if figures else ""


# ---------------------------------------------------------------------------------------------------------------
# Curves


def read_metrics(folder):
    """The lines of a run's metrics.jsonl as dicts. Raises FileNotFoundError, Mistake."""
    path = folder / "metrics.jsonl"
    with zoo.reading(path, "give a folder that train.py wrote"):
        rows = [dict(json.loads(line)) for line in path.read_text().splitlines() if line.strip()]
    if not rows:
        raise Mistake(f"{path} is empty: nothing to report yet")
    return rows


class Series(NamedTuple):
    """One line of a panel; all arrays have the length of x."""

    label: str
    x: np.ndarray
    line: np.ndarray
    dots: np.ndarray = None
    low: np.ndarray = None  # low to high is drawn as a band
    high: np.ndarray = None


def draw_panel(axes, title, series, healthy=None, x_name="step", band=None):
    """
    Draws a panel: for each Series its dots, its line and its band, the healthy range (low, high) in green, and in grey
    the band (steps, low, high) of our own runs.
    """
    if band:
        axes.fill_between(*band, color="grey", alpha=0.2, linewidth=0)
    for k, one in enumerate(series):
        colour = f"C{k}"
        if one.dots is not None:
            axes.plot(one.x, one.dots, ".", color=colour, markersize=2, alpha=0.4)
        if one.low is not None:
            axes.fill_between(one.x, one.low, one.high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(one.x, one.line, color=colour, linewidth=1.3, label=one.label)
    if healthy:
        axes.set_ylim(axes.get_ylim())  # the range must not widen the axis
        axes.axhspan(*healthy, color="tab:green", alpha=0.12, linewidth=0)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x_name, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))  # longer numbers do not fit beside the axis
    axes.grid(alpha=0.2)


def smooth(values):
    """A running mean over a tenth of the run, of the values that are finite."""
    half = max(1, len(values) // 10) // 2
    windows = [values[max(0, k - half) : k + half + 1] for k in range(len(values))]
    means = [window[np.isfinite(window)].mean() if np.isfinite(window).any() else np.nan for window in windows]
    return np.array(means)


def column(rows, key):
    return np.array([row.get(key, np.nan) for row in rows], float)


def keys_of(rows):
    """All metrics of a run, also those that its first step lacks."""
    return list(dict.fromkeys(key for row in rows for key in row))


def metric_keys(rows):
    """The metrics that get a panel: those with a note, then the judges, then what a step costs."""
    found = keys_of(rows)
    keys = [key for key in NOTES if key in found]
    keys += [key for key in found if key.endswith("_mean")]
    keys += [key for key in ("lr", "peak_memory_gb") if key in found]
    return [key for key in keys if np.isfinite(column(rows, key)).any()]


def curve(rows, key):
    values = column(rows, key)
    return Series(key, column(rows, "step"), smooth(values), dots=values)


def write_bands(folders, path):
    """
    Keeps the curves of several seeds of one recipe, for `bands`: {"flags": settings, "seeds": [{metric: values}]}.
    """
    flags = read_flags(folders[0])
    seeds = []
    for folder in folders:
        rows = read_metrics(folder)
        keys = [key for key in metric_keys(rows) if key not in ("lr", "peak_memory_gb")]
        seeds.append({key: [float(f"{value:.3g}") for value in column(rows, key)] for key in keys})
    text = json.dumps(dict(flags=flags, seeds=seeds))
    zoo.write_whole(path, lambda place: place.write_text(text + "\n"))


def bands(flags):
    """
    {metric: (steps, low, high)} of our own runs of the same recipe, {} for any other: the range of three seeds within a
    tenth of the run.
    """
    free = {"seed", "dtype"}  # these do not make another recipe
    recipe = {name: value for name, value in flags.items() if name not in free}
    for path in ASSETS.glob("curves_*.json"):
        kept = json.loads(path.read_text())
        if {name: value for name, value in kept["flags"].items() if name not in free} == recipe:
            return {key: band_around([seed[key] for seed in kept["seeds"]]) for key in kept["seeds"][0]}
    return {}


def band_around(curves):
    """(steps, lowest, highest) of some curves (seeds, steps) within a tenth of the run around each step."""
    curves = np.array(curves)
    steps = np.arange(curves.shape[1])
    half = max(1, len(steps) // 20)
    windows = [curves[:, max(0, k - half) : k + half + 1] for k in steps]
    return steps, [window.min() for window in windows], [window.max() for window in windows]


def write_curves(folder):
    """curves.png from metrics.jsonl: reward, KL, entropy and for a toy the share right."""
    import matplotlib.pyplot as plt

    rows = read_metrics(folder)
    titles = dict(reward="reward", kl="KL to the reference, nats/token", entropy="entropy, nats/token")
    if "right" in keys_of(rows):
        titles["right"] = "share right, by the verifier"
    figure, axes = plt.subplots(1, len(titles), figsize=(4 * len(titles), 3), layout="constrained")
    grey = bands(read_flags(folder))
    for panel, (key, title) in zip(axes, titles.items(), strict=True):
        draw_panel(panel, title, [curve(rows, key)], band=grey.get(key))
    if grey:
        axes[0].set_xlabel("step (grey: our three seeds)", fontsize=8)
    zoo.write_whole(folder / "curves.png", lambda path: figure.savefig(path, dpi=90))
    plt.close(figure)


def panel_svg(title, note, series, healthy=None, x_name="step", band=None):
    """
    A panel as an SVG inside a <figure>, with its note and the names of its lines below, where long names have room.
    Grey text is readable on light and dark pages.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_hex

    grey = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#808080")
    with plt.rc_context(grey | {"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure, axes = plt.subplots(figsize=(3.6, 2.3))
        figure.subplots_adjust(left=0.17, right=0.98, bottom=0.18, top=0.9)  # a computed layout takes twice as long
        draw_panel(axes, title, series, healthy, x_name, band)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata=dict(Date=None))
        plt.close(figure)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
    names = ""
    for k, one in enumerate(series):
        if len(series) > 1 and np.isfinite(one.line).any():
            names += f'<br><span style="color:{to_hex(f"C{k}")}">\u25a0</span> {html.escape(one.label)}'
    return f"<figure>{svg}<figcaption><b>{html.escape(title)}</b> {html.escape(note)}{names}</figcaption></figure>"


def charts(rows, flags):
    """A panel for each metric of a run, and one of the seconds."""
    held = [f"{judge}_mean" for judge in held_out(parse_rewards(flags.get("rewards", "clip")))]
    notes = NOTES | dict.fromkeys(held, ("held out: it has no say, so what it says is evidence", None))
    panels = []
    grey = bands(flags)
    for key in metric_keys(rows):
        note, healthy = notes.get(key, ("", None))
        panels.append(panel_svg(key, note, [curve(rows, key)], healthy, band=grey.get(key)))
    parts = [key for key in keys_of(rows) if key.startswith("seconds_") or key.endswith("_seconds")]
    if parts:
        lines = [curve(rows, key)._replace(dots=None, label=key.replace("seconds_", "")) for key in parts]
        panels.append(panel_svg("seconds", "of each part of a step, and of each judge", lines))
    said = "<p>Grey: the range of our three seeds of the same recipe.</p>" if grey else ""
    return f'{said}<div class="charts">{"".join(panels)}</div>'


# ---------------------------------------------------------------------------------------------------------------
# Pictures inside a page


def data_uri(image):
    """A PIL image as the source of an <img>: WebP, lossless if it is small."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "WEBP", quality=85, lossless=image.width * image.height < 400_000, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def slides(folder):
    """The grids of a run: before and after side by side, then all behind a slider, at most ten of those between."""
    between = sorted((folder / "samples").glob("step_*.png"))
    if len(between) > 10:  # for the size of the page
        between = [between[k] for k in np.linspace(0, len(between) - 1, 10).round().astype(int)]
    paths = [path for path in (folder / "before.png", *between, folder / "after.png") if path.exists()]
    figures = "".join(
        f"""<div class="slide wide" data-name="{path.stem.replace("_", " ")}">
            <img alt="{path.stem}" src="{data_uri(Image.open(path))}"></div>"""
        for path in paths
    )
    ends = [path for path in paths if path.stem in ("before", "after")]
    pair = "".join(f'<figure><img alt="" src="{data_uri(Image.open(path))}">{path.stem}</figure>' for path in ends)
    slider = f'<input type="range" aria-label="moment of training" min="0" max="{len(paths) - 1}" value="0">'
    title = "<h2>The same prompts and seeds during training</h2>"
    slides = f"{title}<div data-slides>{slider}<b></b>{figures}</div>" if paths else ""
    return f'<h2>Before and after</h2><div class="pair">{pair}</div>{slides}' if pair else slides


class Written(NamedTuple):
    """One picture as a model wrote it."""

    tokens: list  # T codes
    likely: list  # for each token the LIKELY likeliest [code, per cent]
    moments: int
    frames: Image.Image  # the picture at each moment, eight in a row
    patches: Image.Image = None  # a row per token: its cell with each of its likeliest codes; of a toy


LIKELY = 5


@torch.no_grad()
def write_picture(model, tokenizer, cond, cond_mask, cfg_scale, temperature):
    """
    A picture as it is Written, from cond (1, ...) and cond_mask (1, P): one moment after each token for a toy; nine
    moments else, because a large tokenizer takes a second for each on a CPU.
    """
    noise = image_noise([0], model.config.num_tokens, 7)
    tokens, _ = model.generate(cond, cond_mask, cfg_scale=cfg_scale, temperature=temperature, noise=noise)
    states = policy_states(model, cond, tokens, cond_mask, cfg_scale)
    shares, codes = policy_logprobs(model.head(states)[0], temperature).exp().topk(LIKELY)  # (T, LIKELY)
    T, side, device = tokens.shape[1], math.isqrt(tokens.shape[1]), tokens.device
    moments = torch.linspace(0, T, (T if T <= 64 else 8) + 1, device=device).round().long()[:, None]
    frames = decode_beginnings(tokenizer, tokens, moments, tokens[0, (moments - 1).clamp(min=0)])
    written = (torch.arange(T, device=device) < moments).view(-1, 1, side, side).float()
    frames = frames * torch.nn.functional.interpolate(written, frames.shape[2:], mode="nearest")  # 0 is grey
    patches = None
    if T <= 64:
        place = torch.arange(T, device=device).repeat_interleave(LIKELY)
        pictures = decode_beginnings(tokenizer, tokens, place[:, None], codes.view(-1, 1))
        cells = pictures.unflatten(2, (side, -1)).unflatten(4, (side, -1))  # (n, 3, side, px, side, px)
        patches = sheet_of(cells[torch.arange(len(cells), device=device), :, place // side, :, place % side], LIKELY)
    frames = sheet_of(frames, 8)
    frames.thumbnail((8 * 192, 10_000))  # of large pictures a small one
    rows = zip(codes.tolist(), shares.tolist(), strict=True)
    likely = [[[code, round(100 * p)] for code, p in zip(*row, strict=True)] for row in rows]
    return Written(tokens[0].tolist(), likely, len(moments), frames, patches)


def decode_beginnings(tokenizer, tokens, lengths, codes):
    """
    Pictures (n, 3, H, W) of the first `lengths` (n, 1) of tokens (1, T). The decoder sees all cells at once, so it gets
    `codes` (n, 1) in those that are not written yet.
    """
    beginnings = torch.where(torch.arange(tokens.shape[1], device=tokens.device) < lengths, tokens, codes)  # (n, T)
    return torch.cat([tokenizer.decode(part) for part in beginnings.split(16)])


def sheet_of(images, columns):
    """Images (n, 3, H, W) in [-1, 1] as one picture, `columns` in a row."""
    blank = images.new_zeros(-len(images) % columns, *images.shape[1:])
    rows = torch.cat([images, blank]).unflatten(0, (-1, columns))  # (rows, columns, 3, H, W)
    pixels = to_uint8(rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2))  # (rows * H, columns * W, 3)
    return Image.fromarray(pixels.cpu().numpy())


def background(sheet, columns, rows):
    """CSS that shows one cell of a sheet; the script moves it to another."""
    return f"background-size:{100 * columns}% {100 * rows}%;background-image:url('{data_uri(sheet)}')"


def writers(policies, tokenizer, encode, caption, prompt, cfg_scale, temperature):
    """The section in which {name: model} write the same prompt from the same random numbers."""
    boxes, (cond, cond_mask) = "", encode([prompt])
    for name, model in policies.items():
        found = write_picture(model, tokenizer, cond, cond_mask, cfg_scale, temperature)
        T, side = len(found.tokens), math.isqrt(len(found.tokens))
        frames = background(found.frames, 8, math.ceil(found.moments / 8))
        patch = background(found.patches, LIKELY, T) if found.patches else "display:none"
        cells = "<button></button>" * T
        bars = '<div class="patch"></div><span></span><div><div class="bar"></div></div>' * LIKELY
        boxes += f"""<div data-tokens="{found.tokens}" data-likely="{found.likely}"><b>{html.escape(name)}</b>
            <style>#{name} .patch {{ {patch} }}</style>
            <div class="frame" style="{frames}"></div>
            <div class="words" style="grid-template-columns:repeat({side},1fr)">{cells}</div>
            <div class="likely" id="{name}">{bars}</div></div>"""
    last = found.moments - 1
    slider = f'<input type="range" aria-label="moments" min="0" max="{last}" value="{last}">'
    return f"""<h2>One picture, token by token: {html.escape(caption)}</h2>
        <p>Below each picture its tokens; click one. The bars are the codes that the model found likeliest there, each
        with the patch that it would have drawn; bold is what was drawn.</p>
        <div data-writer data-tokens="{T}"><button>play</button> {slider}
        <div class="writers">{boxes}</div></div>"""


# ---------------------------------------------------------------------------------------------------------------
# Pages


def page(title, *parts):
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>"
            f"{''.join(parts)}<script>{SCRIPT}</script></html>")  # fmt: skip


def facts(rows, flags):
    """What was run, and what came of it."""
    tenth = max(1, len(rows) // 10)
    said = [f"{len(rows)} steps"]
    for key in ("reward", "right"):
        if key in keys_of(rows):
            first, last = (column(part, key).mean() for part in (rows[:tenth], rows[-tenth:]))
            said.append(f"{key} {first:.3f} to {last:.3f} (means of the first and the last {tenth} steps)")
    shown = "\n".join(f"{name:20} {value}" for name, value in flags.items() if value != "None")
    ails = "".join(f"<li>step {step}: {html.escape(sentence)}" for step, sentence in ailments(rows, flags))
    warned = f"<ul>{ails}</ul>" if ails else ""
    settings = f"<details><summary>settings</summary><pre>{html.escape(shown)}</pre></details>"
    return f"<p>{'; '.join(said)}</p>{warned}{settings}"


def ailments(rows, flags):
    """[(step, sentence)]: each warning of a run, where it was first given."""
    found = {}
    if set(flags) >= {"updates_per_batch", "dtype", "rewards"}:
        for k in range(len(rows)):
            for what, sentence in warnings(rows[: k + 1][-41:], flags).items():
                found.setdefault(what, (rows[k]["step"], sentence))
    return list(found.values())


def newest_table(folder):
    """(columns, standard errors) of the newest table of evaluate.py beside the run, {} without one. Raises Mistake."""
    tables = sorted(folder.glob("evaluation*.json"), key=lambda path: path.stat().st_mtime)
    if not tables:
        return {}, {}
    with zoo.reading(tables[-1], "evaluate the run again, or delete it"):
        table = json.loads(tables[-1].read_text())
        columns = {name: dict(figures) for name, figures in table["columns"].items()}
        return columns, dict(table.get("standard_errors", {}))


def evaluation(folder):
    """The newest table of evaluate.py beside the run, if there is one."""
    columns, errors = newest_table(folder)
    if not columns:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = ""
    for metric in dict.fromkeys(metric for figures in columns.values() for metric in figures):
        cells = [f"{figures[metric]:.3f}" if metric in figures else "" for figures in columns.values()]
        spreads = [errors.get(name, {}).get(metric) for name in columns]
        cells = [c if e is None else f"{c} ± {e:.3f}" for c, e in zip(cells, spreads, strict=True)]
        body += f"<tr><th>{html.escape(metric)}</th><td>{'</td><td>'.join(cells)}</td></tr>"
    return f'<h2>Evaluation</h2><div class="wide"><table><tr><th></th>{head}</tr>{body}</table></div>'


def read_flags(folder):
    """{setting: value} of a run, as train.py wrote them."""
    path = folder / "flags.json"
    with zoo.reading(path, "delete it: the page can do without"):
        return dict(json.loads(path.read_text())) if path.exists() else {}


def write_run(folder, written="", path=None):
    """The page at `path` or FOLDER/report.html; `written` is the section of `writers`. Raises Mistake, OSError."""
    folder, rows = Path(folder), read_metrics(Path(folder))
    flags = read_flags(folder)
    parts = facts(rows, flags), slides(folder), groups(folder), written, evaluation(folder)
    text = page(f"AR-GRPO: {folder}", *parts, "<h2>Curves</h2>", charts(rows, flags))
    zoo.write_whole(path or folder / "report.html", lambda place: place.write_text(text, encoding="utf-8"))


def write_comparison(folders, path):
    """One page for several runs; runs whose settings are equal except for the seed are one line with a band."""
    by_flags = {}
    for folder in folders:
        flags = {name: value for name, value in read_flags(folder).items() if name != "seed"}
        by_flags.setdefault(json.dumps(flags, sort_keys=True), []).append((folder.name, read_metrics(folder)))
    runs = []  # [(label, [rows of each seed])]
    for members in by_flags.values():
        length = min(len(rows) for _, rows in members)
        runs.append((" ".join(name for name, _ in members), [rows[:length] for _, rows in members]))
    panels = []
    for key in metric_keys([row for _, seeds in runs for rows in seeds for row in rows]):
        note, healthy = NOTES.get(key, ("", None))
        series = [band_of(label, seeds, key) for label, seeds in runs]  # all, so that a run keeps its colour
        panels.append(panel_svg(key, note, series, healthy))
    bought = []
    for label, seeds in runs:
        kl, reward = (np.mean([smooth(column(rows, key)) for rows in seeds], 0) for key in ("kl", "reward"))
        bought.append(Series(label, kl, reward))
    panels.append(panel_svg("reward against KL", "what a nat of distance bought", bought, x_name="kl"))
    recall = recall_lines(folders)
    if recall:
        panels.append(panel_svg("right against recall", "newest evaluation, from the base", recall, x_name="recall"))
    text = page("AR-GRPO: runs compared", f'<div class="charts">{"".join(panels)}</div>')
    zoo.write_whole(path, lambda place: place.write_text(text, encoding="utf-8"))


def band_of(label, seeds, key):
    """The mean of several seeds' smoothed curves, with the band from the lowest to the highest."""
    values = np.stack([smooth(column(rows, key)) for rows in seeds])
    return Series(label, column(seeds[0], "step"), values.mean(0), low=values.min(0), high=values.max(0))


def recall_lines(folders):
    """For each run that was evaluated: share right against recall in latents, from the base to the tuned policy."""
    lines = []
    for folder in folders:
        needed = {"recall, latents", "right: all"}
        columns = [figures for figures in newest_table(folder)[0].values() if needed <= set(figures)]
        if len(columns) > 1:
            recall, right = (np.array([figures[key] for figures in columns[:2]]) for key in sorted(needed))
            lines.append(Series(folder.name, recall, right))
    return lines


# ---------------------------------------------------------------------------------------------------------------
# The frontier


def write_frontier(paths, place):
    """
    What accuracy costs, as a figure: each table of evaluate.py is a line through its policies, with standard errors;
    tables of a base are a line through its guidance scales, one through its best-of-N, one of other temperatures. On
    the left the share right against recall in latents, which no reward sees. On the right against the judges' weighted
    sum: a policy below the line of best-of-N, which raises the reward without touching a weight, is hacking the judges.
    A row per task. Raises Mistake, also for tables of different numbers of pictures, because recall depends on it.
    """
    import matplotlib.pyplot as plt

    if place.suffix not in (".png", ".svg", ".pdf"):
        raise Mistake(f"--out {place}: the figure's name ends in .png, .svg or .pdf")
    tasks = {}  # {task: {label of a line: [(name of a point, {metric: (value, standard error)})]}}
    numbers = set()
    for path in paths:
        with zoo.reading(path, "give a .json that evaluate.py wrote"):
            table = json.loads(path.read_text())
            numbers.add(table["num"])
            lines = tasks.setdefault(table["task"], {})
            lines.setdefault(line_label(table, path), []).extend(points_of(table))
    if len(numbers) > 1:
        raise Mistake(f"the tables are of {sorted(numbers)} pictures, on which recall depends: give all the same --num")
    points = [figures for lines in tasks.values() for line in lines.values() for _, figures in line]
    if not any("right: all" in figures for figures in points):
        raise Mistake("none of these tables says how many pictures are right: only the toys' do")
    shape = dict(figsize=(13, 4.4 * len(tasks)), width_ratios=(4, 4, 3), squeeze=False, layout="constrained")
    figure, rows = plt.subplots(len(tasks), 3, **shape)
    for (left, right, names), (task, lines) in zip(rows, tasks.items(), strict=True):
        draw_frontier(left, lines, "recall, latents", f"right, {task}")
        draw_frontier(right, lines, "reward: weighted sum", f"right, {task}")
        # beside the panels, because names at the points would cover each other
        names.legend(*left.get_legend_handles_labels(), loc="center left", fontsize=7, title="a ring: the line begins")
        names.axis("off")
    zoo.write_whole(place, lambda path: figure.savefig(path, dpi=110, format=place.suffix[1:]))
    plt.close(figure)


def line_label(table, path):
    """The name of the line that a table of evaluate.py belongs to."""
    if table["tuned"]:
        return path.parent.resolve().name if path.stem.startswith("evaluation") else path.stem
    kind = ", best of N" if table["best_of"] > 1 else ""
    return f"base{kind}" + (", cooler or hotter" if table["temperature"] != 1 else "")


def draw_frontier(axes, lines, key, ylabel):
    """Draws {label: points}, each as a line with its errors; the legend lists the line's points in their order."""
    for k, (label, points) in enumerate(lines.items()):
        found = [(name, *f[key], *f["right: all"]) for name, f in points if {key, "right: all"} <= set(f)]
        if found:
            names, x, dx, y, dy = zip(*found, strict=True)
            name = label if names == (label,) else textwrap.fill(f"{label}: {'; '.join(names)}", 48)
            style = dict(color=f"C{k}", marker="o", markersize=4, linewidth=1, elinewidth=0.4)
            axes.errorbar(x, y, np.array(dy, float), np.array(dx, float), label=name, **style)
            axes.plot(x[0], y[0], "o", color=f"C{k}", markersize=8, fillstyle="none")
    axes.set(xlabel=key, ylabel=ylabel)
    axes.grid(alpha=0.3)


def points_of(table):
    """[(name, {metric: (value, standard error)})] of the policies in a table of evaluate.py (tuned if any)."""
    folders = [Path(path).parent.name for path in table["tuned"]]
    heat = "" if table["temperature"] == 1 else f", temperature {table['temperature']:g}"
    wanted = "tuned" if folders else "base"
    columns = [name for name in table["columns"] if name.startswith(wanted)]
    settings = [name.split(", ", 1)[1] for name in columns]
    points = []
    for name, setting in zip(columns, settings, strict=True):
        label = setting
        if folders:  # "tuned, cfg 1", or "tuned 2, cfg 1" of several
            number = name.split(", ")[0].removeprefix("tuned").strip() or "1"
            folder = folders[int(number) - 1]
            label = f"{folder}, {setting}" if len(set(settings)) > 1 else folder
        figures, errors = table["columns"][name], table["standard_errors"][name]
        points.append((label + heat, {key: (figures[key], errors[key]) for key in errors}))
    return points


def parse_args(argv=None):
    parser = zoo.script_parser(__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, help="folders that train.py wrote, or .json that evaluate.py wrote"
    )
    parser.add_argument("--out", type=Path, help="file of the page or picture (default: report.html in the run; of "
                        "several, compare.html beside the first; of tables, frontier.png there); NAME.json keeps the "
                        "curves of several runs, as the band behind others of their recipe")  # fmt: skip
    return parser.parse_args(argv)


def run(args):
    if all(path.suffix == ".json" for path in args.runs):
        path = args.out or args.runs[0].parent / "frontier.png"
        write_frontier(args.runs, path)
    elif args.out and args.out.suffix == ".json":
        path = args.out
        write_bands(args.runs, path)
    elif len(args.runs) == 1:
        (folder,) = args.runs
        path = args.out or folder / "report.html"
        write_run(folder, written_by(folder), path)
    else:
        path = args.out or args.runs[0].parent / "compare.html"
        write_comparison(args.runs, path)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def written_by(folder):
    """
    The section of `writers` for the policy in the folder. Empty if there is none, if its base or tokenizer is missing,
    or if there is no prompt to give it.
    """
    if not (folder / "policy.safetensors").exists():
        return ""
    name, path, header = zoo.find_policy(folder)
    if not zoo.is_toy(name) and zoo.MODELS[name].config.task == "t2i":
        return ""
    try:
        base, _ = zoo.find_base(name, header)
        zoo.check_tokenizer(name, header)
    except Mistake:
        print(f"{folder}: no picture token by token, because its base or tokenizer is no longer where it was")
        return ""
    encode = partial(zoo.load_encoder(name), pad=header["text_pad"])
    policies = {"base": zoo.load_model(name, base), "tuned": zoo.load_model(name, path)}
    prompt = zoo.read_prompts(name)[0]
    sampling = dict(cfg_scale=header["cfg_scale"], temperature=header["temperature"])
    caption = zoo.captions_of(name, [prompt])[0]
    return writers(policies, zoo.load_tokenizer(name), encode, caption, prompt, **sampling)


def main(argv=None):
    zoo.run_script(parse_args, run, argv)


if __name__ == "__main__":
    main()
