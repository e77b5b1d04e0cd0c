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
from prompts import captions_of, load_encoder, read_prompts
from rewards import held_out, judge_images, parse_rewards
from runs import warnings
from sample import draw, interleave, label_images, save_grid, write_npz
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
    return images, captions_of(args.model, prompts, args.class_names)


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
    captions = captions_of(args.model, prompts, args.class_names)
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
# One group, dissected


class Group(NamedTuple):
    """What one step did with a group of G pictures."""

    caption: str
    rewarded: str  # --rewards
    images: np.ndarray  # (G, 3, H, W) in [0, 1]
    scores: dict  # {judge: (G,)}
    rewards: np.ndarray  # (G,)
    advantages: np.ndarray  # (G,)
    change: np.ndarray  # (G, T) nats, of each token's log-probability in the update
    weights: np.ndarray  # (G, T), the tokens' shares of the advantage with --weigh-tokens, or (G, 1)
    drawn: int = 0  # with --learn-from, G are those that were learned from, of this many


GROUP_NOTE = (
    "One number, its advantage, pushes the whole picture: background tokens as hard as the object's, and a bad patch "
    "in a good picture the wrong way too. All pictures share the model's weights, so some tokens move against the push."
)


def draw_group(group):
    """A matplotlib figure of a Group: a column per picture, worst to best; the maps of all pictures on one scale."""
    import matplotlib.pyplot as plt

    order = np.argsort(group.rewards)
    G, T = group.change.shape
    shared = group.weights.shape[1] > 1
    # all lengths are in inches; a picture takes a square of one unit
    unit = 1.15
    left = 1.85
    width = left + G * unit + 0.2
    gaps = [0.84 + 0.14 * len(group.scores), 0.2] + [0.42] * (1 + shared)  # above each row
    heights = [unit, 0.9] + [unit] * (1 + shared)
    total = sum(gaps) + sum(heights) + 0.85
    figure = plt.figure(figsize=(width, total))
    bottoms = np.cumsum(np.add(gaps, heights))  # from the top of the figure
    boxes = [(left / width, 1 - y / total, G * unit / width, h / total) for y, h in zip(bottoms, heights, strict=True)]
    rows = [figure.add_axes(box, xlim=(0, G), xticks=[]) for box in boxes]
    names = [
        "1. sample and judge\n\nreward:\n" + group.rewarded.replace(",", "\n+ ").replace("=", " × "),
        "2. compare\n\nadvantage: the reward\nagainst the group's mean",
    ]
    if shared:
        names.append("3. divide\n\neach token's share\nof the advantage")
    names.append(f"{len(names) + 1}. learn\n\nwhat one update did\nto each of the\n{T} tokens")
    for row, name in zip(rows, names, strict=True):
        row.text(-0.03, 0.5, name, transform=row.transAxes, ha="right", va="center", fontsize=8)
    of = f" of {group.drawn}" if group.drawn > G else ""
    title = f"One group: {G}{of} pictures for “{group.caption}”, from the lowest reward to the highest"
    figure.text(left / width, 1 - 0.3 / total, title, fontsize=10)
    largest = abs(group.advantages).max() * 1.5 or 1
    rows[1].set(ylim=(-largest, largest))
    rows[1].axhline(0, color="black", linewidth=0.6)
    rows[1].tick_params(labelsize=6)
    for row in (rows[0], *rows[2:]):
        row.set(ylim=(0, 1), yticks=[], frame_on=False)
    top = np.percentile(abs(group.change), 98) or 1
    for column, k in enumerate(order):
        square, middle = (column + 0.03, column + 0.97, 0, 1), column + 0.5
        draw_square(rows[0], square, group.images[k].transpose(1, 2, 0), T)
        said = [f"{judge.removeprefix('pyiqa:')} {values[k]:.2f}" for judge, values in group.scores.items()]
        rows[0].text(middle, 1.2, "\n".join(said), ha="center", va="bottom", fontsize=7, color="grey")
        rows[0].text(
            middle, 1.03, f"reward {group.rewards[k]:.3f}", ha="center", va="bottom", fontsize=8, weight="bold"
        )
        advantage = group.advantages[k]
        rows[1].bar([middle], [advantage], color="dimgrey", width=0.5)
        vertical = "bottom" if advantage > 0 else "top"
        rows[1].text(middle, advantage, f"{advantage:+.2f}", ha="center", va=vertical, fontsize=8)
        if shared:
            shares = np.nan_to_num(group.weights)  # a picture of advantage 0 has none
            draw_square(rows[2], square, shares[k], T, cmap="Greys", vmin=0, vmax=shares.max() or 1)
        draw_square(rows[-1], square, group.change[k], T, cmap="RdBu", vmin=-top, vmax=top)
        pushed = "shared out among" if shared else "pushes all of"
        rows[-1 - shared].text(middle, 1.06, f"{pushed}\nits {T} tokens", ha="center", fontsize=6.5, color="grey")
        with_it = np.mean(np.sign(group.change[k]) == np.sign(advantage))
        rows[-1].text(
            middle, -0.06, f"{with_it:.0%} moved as pushed", ha="center", va="top", fontsize=6.5, color="grey"
        )
    bar = figure.add_axes([0.5 - 1.6 / width, 0.3 / total, 3.2 / width, 0.09 / total])
    figure.colorbar(rows[-1].images[-1], cax=bar, orientation="horizontal", extend="both")
    bar.tick_params(labelsize=6)
    bar.set_title("less likely      change of log-probability, nats      more likely", fontsize=7, pad=2)
    return figure


def draw_square(axes, place, values, T, **colours):
    """Draws a picture (H, W, 3) or the values of its tokens (T,) at `place`, with the grid of its tokens."""
    side = math.isqrt(T)
    axes.imshow(values if values.ndim == 3 else values.reshape(side, side), extent=place, aspect="auto", **colours)
    x, y = (np.linspace(*ends, side + 1) for ends in (place[:2], place[2:]))
    axes.hlines(y, *place[:2], color="white", alpha=0.15, linewidth=0.4)
    axes.vlines(x, *place[2:], color="white", alpha=0.15, linewidth=0.4)


def save_group(path, group):
    """Keeps a Group as an npz."""
    arrays = {f"score {judge}": values for judge, values in group.scores.items()}
    arrays |= {name: value for name, value in group._asdict().items() if name != "scores"}
    zoo.write_whole(path, lambda place: write_npz(place, arrays))


def load_group(path):
    with zoo.reading(path, "delete it: the page can do without"), np.load(path, allow_pickle=False) as file:
        scores = {name.removeprefix("score "): file[name] for name in file.files if name.startswith("score ")}
        fields = {name: file[name] for name in file.files if not name.startswith("score ")}
        return Group(**fields | dict(scores=scores, caption=str(fields["caption"]), rewarded=str(fields["rewarded"])))


def groups(folder):
    """The section with the groups of a run's first, middle and last step."""
    import matplotlib.pyplot as plt

    figures = ""
    for path in sorted((folder / "samples").glob("group_*.npz")):
        figure, picture = draw_group(load_group(path)), io.BytesIO()
        figure.savefig(picture, dpi=80)
        plt.close(figure)
        step = int(path.stem.removeprefix("group_"))
        figures += (
            f'<figure class="wide"><img alt="" src="{data_uri(Image.open(picture))}">'
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
        base = zoo.base_of(name, header)
        zoo.check_tokenizer(name, header)
    except Mistake:
        print(f"{folder}: no picture token by token, because its base or tokenizer is no longer where it was")
        return ""
    encode = partial(load_encoder(name), pad=header["text_pad"])
    policies = {"base": zoo.load_model(name, base), "tuned": zoo.load_model(name, path)}
    prompt = read_prompts(name)[0]
    sampling = dict(cfg_scale=header["cfg_scale"], temperature=header["temperature"])
    caption = captions_of(name, [prompt])[0]
    return writers(policies, zoo.load_tokenizer(name), encode, caption, prompt, **sampling)


def main(argv=None):
    zoo.run_script(parse_args, run, argv)


if __name__ == "__main__":
    main()
