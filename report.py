"""
Paints arrays: grids, curves, one step, the frontier, and the page of a run, which opens without a network.

    python report.py out/c2i                      # writes out/c2i/report.html; train.py does so too when it ends
    python report.py out/seed0 out/seed1 out/x    # the curves of several runs in one picture, out/compare.png
    python report.py base.json tuned.json --out frontier.png   # tables of evaluate.py: what accuracy costs
    python report.py out/seed0 out/seed1 out/seed2 --out assets/curves_c2i.json   # the band behind runs of this task

A run's page is assets/page.html, filled. In the picture of several runs, those whose settings are equal except for the
seed are one line with a band.

Nothing here runs a model; what does is in sample.py. Shapes: K pictures of a group, n of a step, T image tokens.
"""

import base64
import io
import json
import math
import os
import textwrap
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import jinja2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import parallel
import zoo
from runs import warnings
from zoo import Mistake

ASSETS = Path(__file__).parent / "assets"


@contextmanager
def optional(what):
    """A picture that fails costs itself and a line, not the run."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        parallel.say(f"{what} is left out ({type(error).__name__}: {reason})")


def load_matplotlib():
    """matplotlib without pyplot, which would choose a backend for the caller."""
    backend = os.environ.get("MPLBACKEND", "")
    package = backend.removeprefix("module://").partition(".")[0]
    # a script that a notebook starts inherits the notebook's backend, which its own environment may lack
    is_missing = backend.startswith("module://") and find_spec(package) is None
    with zoo.environment(MPLBACKEND="" if is_missing else backend):
        import matplotlib.style
    return matplotlib


def our_style():
    """A context in which assets/figures.mplstyle holds."""
    return load_matplotlib().style.context(["default", ASSETS / "figures.mplstyle"])


def save_figure(path, draw, *arguments):
    """Writes the matplotlib figure that draw(*arguments) returns. Raises Mistake, OSError."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise Mistake(f"{path}: a figure's name ends in .png, .svg or .pdf")
    path.parent.mkdir(parents=True, exist_ok=True)
    with our_style():
        figure = draw(*arguments)
        zoo.write_whole(path, lambda place: figure.savefig(place, dpi=100))


def as_array(values):
    """A tensor of any device and type, or an array, as a numpy array of float32."""
    return torch.as_tensor(values).detach().float().cpu().numpy()


def as_pixels(images):
    """Images (..., 3, H, W) in [0, 1] -> uint8 (..., H, W, 3)."""
    rounded = (as_array(images) * 255 + 0.5).clip(0, 255).astype(np.uint8)
    return np.moveaxis(rounded, -3, -1)


def plain(text):
    """Text that can be drawn and written: half of a character (a lone surrogate) becomes "?"."""
    return text.encode(errors="replace").decode()


# ---------------------------------------------------------------------------------------------------------------
# Grids

MARKS = {True: "\u2713\u00a0", False: "\u2717\u00a0"}  # check mark, ballot cross; spaces that do not break
MARK_COLOURS = {MARKS[True]: "#15803d", MARKS[False]: "#b91c1c"}
CELL = 128  # pixels of a small picture in a grid
WIDEST = 16_383  # pixels that WebP holds side by side; a grid that would be wider gets fewer columns


def label_lines(label, width):
    """The lines of a label, of at most `width` characters: at most four for its first line, the caption."""
    caption, *rest = plain(label).split("\n")
    lines = textwrap.wrap(caption[:500], width, max_lines=4, placeholder="...", break_on_hyphens=False)
    for text in rest:
        lines += textwrap.wrap(text, width, break_on_hyphens=False)
    return lines


def save_grid(path, images, labels, columns, title=""):
    """
    Writes images (n, 3, H, W) in [0, 1] as a grid `columns` wide, each with its label below it: a caption, which may
    begin with a mark, and after a newline the judges' scores. Raises OSError.
    """
    path = Path(path)
    # all characters are as wide, and it knows the languages of Europe
    font = ImageFont.truetype(f"{load_matplotlib().get_data_path()}/fonts/ttf/DejaVuSansMono.ttf", 9)
    n, _, height, width = images.shape
    zoom = max(1, CELL // width)
    labels = [label_lines(label, int(width * zoom / font.getlength("m"))) for label in labels]
    lines = max(len(label) for label in labels)
    cell_w, cell_h = width * zoom + 6, height * zoom + 13 * lines + 6
    columns = min(columns, WIDEST // cell_w)
    top = 20 if title else 0
    rows = -(-n // columns)
    sheet = Image.new("RGB", (columns * cell_w, top + rows * cell_h), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((4, 3), plain(title), fill="black", font=font)
    for k, (pixels, label) in enumerate(zip(as_pixels(images), labels, strict=True)):
        x, y = k % columns * cell_w + 3, top + k // columns * cell_h + 3
        picture = Image.fromarray(pixels).resize((width * zoom, height * zoom), Image.NEAREST)
        sheet.paste(picture, (x, y))
        below = x, y + height * zoom
        pen.text(below, "\n".join(label), fill="black", font=font, spacing=3)
        mark = "".join(label)[:2]
        if mark in MARK_COLOURS:
            pen.text(below, mark, fill=MARK_COLOURS[mark], font=font, stroke_width=0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    zoo.write_whole(path, sheet.save)


def interleave(images, labels, columns):
    """
    (images, labels) of a grid `columns` wide in which each row of the first model's images stands above the same row of
    the next one's. images: a list of (n, 3, H, W), one per model; labels: a list of n per model.
    """
    pictures, texts = [], []
    for k in range(0, len(labels[0]), columns):
        for own_images, own_labels in zip(images, labels, strict=True):
            row = own_images[k : k + columns]
            blank = columns - len(row)  # the last row may be short
            pictures += [row, torch.ones(blank, *row.shape[1:])]
            texts += own_labels[k : k + columns] + [""] * blank
    return torch.cat(pictures), texts


# ---------------------------------------------------------------------------------------------------------------
# One step

UNIT = 1.15  # inches of a picture and its gap
LEFT, TOP, BOTTOM = 2.0, 0.6, 1.15  # inches around the rows; their names stand on the left
GAP = 0.2  # inches between rows
LEAST = 6.6  # inches of the first row, which is as wide for two pictures
CORNER = 8  # words of a side that are shown: more would be too small to read
SMALL = dict(color="grey", fontsize=7)


def draw_step(path, caption, images, tokens, scores, rewards, advantages, change, weights, K):
    """
    Draws what a step did with its first group of K pictures: a row per tensor, a column per picture, from the lowest
    reward to the highest. Takes tensors or arrays of all n pictures of the step. Writes a .png; raises OSError.

    images      (n, 3, H, W) in [0, 1]       tokens   (n, T)
    scores      {judge: (n,)}                weights  {judge: weight}
    rewards     (n,)                         caption  of the first group
    advantages  (n,) or (n, 1), or (n, T) with token weights
    change      (n, T) nats, of each token's log-probability in the update; the first K are enough
    """
    n = len(images)
    order = np.argsort(as_array(rewards)[:K])
    arrays = [as_array(values)[:K][order] for values in (images, tokens, rewards, advantages, change)]
    scores = {judge: as_array(values)[:K][order] for judge, values in scores.items()}
    save_figure(Path(path), step_figure, caption, *arrays, scores, weights, n)


def step_figure(caption, images, tokens, rewards, advantages, change, scores, weights, n):
    """The figure of draw_step, from arrays in the order in which they are drawn."""
    K, T = change.shape
    advantages = advantages.reshape(K, -1)  # (K, 1) or (K, T)
    shared_out = advantages.shape[1] > 1
    # the weights of an image's tokens have mean 1, so the mean is the advantage that they share out
    of_image = advantages.mean(1)  # (K,)
    said = 0.14 * len(scores)  # inches: a line for each judge
    heights = [UNIT, UNIT + 0.2 + said, 0.5 + said, 0.9, UNIT]
    if shared_out:
        heights.append(UNIT)
    figure, rows = stack_rows(heights, K)
    title = f"One group: {K} of the {n} pictures of a step, for “{' '.join(plain(caption).split())[:44]}”"
    rows[0].set_title(title, loc="left", fontsize=10)

    side = math.isqrt(T)
    words = tokens[-1].reshape(side, side)[:CORNER, :CORNER]
    note = f"a picture is {T} words"
    if side > CORNER:
        note += ",\nhere those of the corner"
    name_row(rows[0], "sample", f"tokens ({n}, {T})", note)
    draw_squares(rows[0], images[-1:].transpose(0, 2, 3, 1), side)
    lines = ["".join(f"{word:6.0f}" for word in line) for line in words]
    style = dict(family="monospace", fontsize=7, linespacing=1.4)
    rows[0].text(1, 0.47, "\n".join(lines), va="center", **style)
    name_row(rows[1], "judge", f"images {(n, *images.shape[1:])}", f"each judge: scores ({n},)")
    draw_squares(rows[1], images.transpose(0, 2, 3, 1), side)
    for k in range(K):
        said = "\n".join(f"{judge[-14:]} {values[k]:.2f}" for judge, values in scores.items())
        rows[1].text(k + 0.5, 1.05, said, ha="center", va="bottom", **SMALL)
    terms = [f"{weight:g} × {judge[-20:]}" for judge, weight in weights.items()]
    name_row(rows[2], "add up", f"rewards ({n},)", "\n+ ".join(terms))
    draw_bars(rows[2], rewards, "{:.2f}")
    name_row(rows[3], "compare", f"advantages ({n},)", "the reward against\nits group's mean")
    draw_bars(rows[3], of_image, "{:+.2f}")
    if shared_out:
        name_row(rows[4], "divide", f"advantages ({n}, {T})", "each token's share\nof the advantage")
        share = advantages / np.where(of_image, of_image, np.inf)[:, None]  # an advantage of 0 has none
        draw_squares(rows[4], share, side, cmap="Greys", vmin=0, vmax=share.max())
    name_row(rows[-1], "learn", f"change ({n}, {T})", "of log pi: what the\nupdate did to each token")
    most = np.nanpercentile(abs(change), 98) or 1
    draw_squares(rows[-1], change, side, cmap="RdBu", vmin=-most, vmax=most)
    for k in range(K):
        pushed = np.mean(np.sign(change[k]) == np.sign(of_image[k]))
        moved = f"{pushed:.0%} moved\nas pushed"
        rows[-1].text(k + 0.5, -0.06, moved, ha="center", va="top", **SMALL)
    place = [0.4, -0.72, 2.8, 0.08]
    scale = rows[-1].inset_axes(place, transform=rows[-1].transData)
    figure.colorbar(rows[-1].images[-1], cax=scale, orientation="horizontal", extend="both")
    scale.tick_params(labelsize=6)
    scale.set_title("less likely      change of log-probability, nats      more likely", fontsize=7, pad=2)
    return figure


def stack_rows(heights, K):
    """A figure and its rows, one below the other, of these heights in inches."""
    from matplotlib.figure import Figure

    width = LEFT + max(K * UNIT, LEAST) + 0.2
    total = TOP + sum(heights) + GAP * (len(heights) - 1) + BOTTOM
    right = (LEFT + K * UNIT) / width
    figure = Figure(figsize=(width, total))
    figure.subplots_adjust(LEFT / width, BOTTOM / total, right, 1 - TOP / total)
    figure.subplots_adjust(hspace=GAP / np.mean(heights))
    rows = figure.subplots(len(heights), height_ratios=heights)
    for row, height in zip(rows, heights, strict=True):
        row.set(xlim=(0, K), ylim=(0, height / UNIT))
        row.set(xticks=[], yticks=[], frame_on=False)
    return figure, rows


def name_row(row, verb, tensor, note):
    """Beside a row: what is done, the tensor that comes out of it, and a note."""
    place = dict(xycoords="axes fraction", textcoords="offset points", ha="right", va="top")
    row.annotate(verb, (0, 1), (-10, 0), fontsize=10, weight="bold", **place)
    row.annotate(tensor, (0, 1), (-10, -14), fontsize=8, family="monospace", **place)
    row.annotate(note, (0, 1), (-10, -28), linespacing=1.3, **SMALL, **place)


def draw_squares(row, values, side, **colours):
    """A square for each of K pictures (K, H, W, 3), or for the values of their tokens (K, T)."""
    for k, square in enumerate(values):
        square = square if square.ndim == 3 else square.reshape(side, side)
        place = k + 0.03, k + 0.97, 0, 0.94
        row.imshow(square, extent=place, aspect="auto", **colours)


def draw_bars(row, values, form):
    """A bar for each of the values (K,), and its number."""
    low, high = min(0, values.min()), max(1e-9, values.max())
    row.set_ylim(1.4 * low, 1.4 * high)  # room for the numbers
    row.axhline(0, color="black", linewidth=0.6, clip_on=False)
    places = np.arange(len(values)) + 0.5
    bars = row.bar(places, values, color="dimgrey", width=0.5)
    row.bar_label(bars, fmt=form, fontsize=8, padding=1)


# ---------------------------------------------------------------------------------------------------------------
# Curves

# What gets a panel, in this order; then the judges, the rate and the memory. assets/page.html says what is healthy.
METRICS = (
    "reward", "right", "kl", "entropy", "reward_std", "ratio", "clip_frac", "sampler_gap", "grad_norm", "loss",
    "equal_groups", "advantage_max",
)  # fmt: skip
HEALTHY = {"ratio": (0.99, 1.01), "clip_frac": (0, 0.2), "equal_groups": (0, 0.2)}  # drawn in green
OF_ITS_TASK = ("kl", "entropy", "right")  # compare with the default's whatever the flags
OF_ITS_REWARDS = ("reward", "reward_std", "loss", "advantage_max")  # only where the rewards are the same
POINTS = 300  # of a curve: all of 20,000 steps would look the same, in a page of 100 MB


def read_metrics(folder):
    """The lines of a run's metrics.jsonl as dicts. Raises FileNotFoundError, Mistake."""
    path = folder / "metrics.jsonl"
    with zoo.reading(path, "give a folder that train.py wrote"):
        rows = [dict(json.loads(line)) for line in path.read_text().splitlines()]
    if not rows:
        raise Mistake(f"{path} is empty: nothing to report yet")
    return rows


def read_json(path):
    """What a .json of a run holds, {} if it is not there. Raises Mistake."""
    with zoo.reading(path, "delete it: the page can do without"):
        return dict(json.loads(path.read_text())) if path.exists() else {}


def column(rows, key):
    """(steps,) of a metric; NaN where a step lacks it."""
    return np.array([row.get(key, np.nan) for row in rows], float)


def panels_of(runs):
    """{metric: {label: (seeds, steps)}} of {label: the rows of each seed}; only what is a number somewhere."""
    all_rows = [row for seeds in runs.values() for rows in seeds for row in rows]
    judges = dict.fromkeys(key for row in all_rows for key in row if key.endswith("_mean"))
    panels = {}
    for key in (*METRICS, *judges, "lr", "peak_memory_gb"):
        if np.isfinite(column(all_rows, key)).any():
            # a run that lacks a metric keeps its place, so that it has one colour in all panels
            panels[key] = lines = {}
            for label, seeds in runs.items():
                lines[label] = [column(rows, key) for rows in seeds]
    return panels


def seconds_of(rows):
    """The panel of the seconds: a line for each part of a step, and for each judge."""
    found = dict.fromkeys(key for row in rows for key in row)
    parts = [key for key in found if key.startswith("seconds_") or key.endswith("_seconds")]
    return {key.replace("seconds_", ""): [column(rows, key)] for key in parts}


def around(values):
    """Values (steps,) within a tenth of the run around each step: (steps, window), NaN beyond its ends."""
    half = len(values) // 20
    padded = np.pad(values, half, constant_values=np.nan)
    return np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)


def smooth(values, at):
    """The running mean over a tenth of the run, of the values that are finite, at some of its steps."""
    finite = np.ma.masked_invalid(around(values)[at])  # (points, window)
    return finite.mean(1).filled(np.nan)


def draw_curves(panels, columns, bands):
    """
    A figure with a panel for each metric of {metric: {label: (seeds, steps)}}: the seeds' smoothed mean, and what lies
    between the lowest and the highest. In grey the `bands` of default_bands, in green what is healthy.
    """
    from matplotlib.figure import Figure

    legend = {}
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.4 * rows), layout="constrained")
    for k, (key, lines) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, k)
        draw_panel(axes, key, lines, bands.get(key))
        handles, labels = axes.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    if len(legend) > 1:
        figure.legend(legend.values(), legend, loc="outside lower center", ncols=min(4, 2 * columns))
    return figure


def draw_panel(axes, key, lines, band):
    """A panel of draw_curves. A single curve also shows its values, as dots."""
    shade = dict(alpha=0.2, linewidth=0)
    if band:
        low, high = band
        axes.fill_between(range(len(low)), low, high, color="grey", label="the default, three seeds", **shade)
    for k, (label, seeds) in enumerate(lines.items()):
        length = min(len(values) for values in seeds)
        at = np.unique(np.linspace(0, length - 1, POINTS).astype(int))
        smoothed = np.stack([smooth(values[:length], at) for values in seeds])  # (seeds, points)
        axes.plot(at, smoothed.mean(0), color=f"C{k}", label=plain(label))
        low, high = smoothed.min(0), smoothed.max(0)
        axes.fill_between(at, low, high, color=f"C{k}", **shade)
        if len(lines) == len(seeds) == 1:
            axes.plot(at, seeds[0][at], ".", color=f"C{k}", alpha=0.4)
    if key in HEALTHY:
        axes.set_ylim(axes.get_ylim())  # the range must not widen the axis
        axes.axhspan(*HEALTHY[key], color="tab:green", alpha=0.12, linewidth=0)
    axes.set(title=plain(key), xlabel="step")
    axes.grid(True)


def write_curves(folder):
    """curves.png of a run: reward, share right, KL and entropy."""
    panels = panels_of({"this run": [read_metrics(folder)]})
    main = {key: panels[key] for key in METRICS[:4] if key in panels}
    bands = default_bands(read_json(folder / "flags.json"))
    save_figure(folder / "curves.png", draw_curves, main, len(main), bands)


def compare_runs(folders, path):
    """The curves of several runs; those whose settings are equal except for the seed are one line."""
    flags = [read_json(folder / "flags.json") for folder in folders]
    recipes = {}  # {settings: folders}
    for folder, settings in zip(folders, flags, strict=True):
        recipe = json.dumps({**settings, "seed": None}, sort_keys=True)
        recipes.setdefault(recipe, []).append(folder)
    runs = {}
    for seeds in recipes.values():
        runs[" ".join(map(str, seeds))] = [read_metrics(folder) for folder in seeds]
    one_task = len({settings.get("model") for settings in flags}) == 1
    bands = min(map(default_bands, flags), key=len) if one_task else {}  # of reward only if all have the default's
    save_figure(path, draw_curves, panels_of(runs), 4, bands)


def write_bands(folders, path):
    """Keeps where several seeds of a recipe went: {"flags": settings, "bands": {metric: [lowest, highest]}}."""
    runs, bands = [read_metrics(folder) for folder in folders], {}
    for key in OF_ITS_TASK + OF_ITS_REWARDS:
        values = np.stack([around(column(rows, key)) for rows in runs])  # (seeds, steps, window)
        limits = np.nanmin(values, (0, 2)), np.nanmax(values, (0, 2))
        bands[key] = [[float(f"{x:.3g}") for x in limit] for limit in limits]
    flags = read_json(folders[0] / "flags.json")
    text = json.dumps(dict(flags=flags, bands=bands))
    zoo.write_whole(path, lambda place: place.write_text(text + "\n"))


def default_bands(flags):
    """{metric: [lowest, highest]} of the default of a run's toy task, as write_bands kept it; {} for other models."""
    bands = {}
    for path in ASSETS.glob("curves_*.json"):
        kept = json.loads(path.read_text())
        if kept["flags"]["model"] == flags.get("model"):
            same = kept["flags"]["rewards"] == flags.get("rewards")
            bands = {key: kept["bands"][key] for key in OF_ITS_TASK + OF_ITS_REWARDS * same}
    return bands


# ---------------------------------------------------------------------------------------------------------------
# The page


def data_uri(image):
    """A PIL image as the source of an <img>: WebP, lossless if it is small."""
    file = io.BytesIO()
    small = image.width * image.height < 400_000
    image.convert("RGB").save(file, "WEBP", quality=85, lossless=small)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def pictures_of(paths):
    """{name: source} of the pictures that are there."""
    found = {}
    for path in paths:
        with zoo.reading(path, "delete it: the page can do without"):
            if path.exists():
                found[path.stem.replace("_", " ")] = data_uri(Image.open(path))
    return found


def sheet_of(images, columns):
    """Images (n, 3, H, W) in [0, 1] as one picture, `columns` in a row, as a data URI."""
    from torchvision.utils import make_grid

    sheet = Image.fromarray(as_pixels(make_grid(torch.as_tensor(images), columns, padding=0)))
    sheet.thumbnail((columns * 192, 100_000))  # of large pictures a small one
    return data_uri(sheet)


def save_writers(folder, caption, writers):
    """
    Keeps a picture as {name: model} wrote it, for the page: samples/writers.json. Each model has

    tokens  (T,) codes         likely  (T, L) codes        shares  (T, L), their probabilities
    frames  (M, 3, H, W) in [0, 1], the picture at M moments
    patches (T * L, 3, h, w) in [0, 1], what each likely code would have drawn, or None
    """
    models = []
    for name, found in writers.items():
        per_cent = (100 * as_array(found["shares"])).round()
        likely = np.stack([as_array(found["likely"]), per_cent], 2).astype(int)  # (T, L, 2)
        model = dict(name=name, tokens=found["tokens"].tolist(), likely=likely.tolist())
        model["moments"] = len(found["frames"])
        model["frames"] = sheet_of(found["frames"], 8)
        if found["patches"] is not None:
            model["patches"] = sheet_of(found["patches"], likely.shape[1])
        models.append(model)
    text = json.dumps(dict(caption=plain(caption), models=models))
    zoo.write_whole(folder / "samples/writers.json", lambda place: place.write_text(text))


def chart_of(key, lines, bands):
    """A panel as an SVG."""
    text = io.StringIO()
    with our_style():
        figure = draw_curves({key: lines}, 1, bands)
        figure.savefig(text, format="svg", transparent=True, metadata=dict(Date=None))
    return text.getvalue().partition("<svg")[2]


def write_page(folder, path=None):
    """The page of a run at `path` or FOLDER/report.html: assets/page.html, filled. Raises Mistake, OSError."""
    rows, flags = read_metrics(folder), read_json(folder / "flags.json")
    ailments = {}
    settled = isinstance(flags.get("rewards"), dict)  # not without flags.json, or in a run of an older version
    for k, row in enumerate(rows if settled else []):
        recent = rows[max(0, k - 40) : k + 1]
        for what, sentence in warnings(recent, flags).items():
            ailments.setdefault(what, (row["step"], sentence))  # where it was first given
    bands = default_bands(flags)
    panels = panels_of({"this run": [rows]}) | dict(seconds=seconds_of(rows))
    tables = [read_json(path) for path in folder.glob("evaluation*.json")]
    between = sorted((folder / "samples").glob("step_*.png"))
    between = between[:: -(-len(between) // 10) or 1]  # for the size of the page
    page = jinja2.Template((ASSETS / "page.html").read_text(encoding="utf-8"), autoescape=True)
    text = page.render(
        title=f"AR-GRPO: {folder}",
        rows=rows,
        flags=flags,
        ailments=ailments,
        slides=pictures_of([folder / "before.png", *between, folder / "after.png"]),
        groups=pictures_of(sorted((folder / "samples").glob("group_*.png"))),
        writers=read_json(folder / "samples/writers.json"),
        table=max(tables, key=lambda table: table.get("time", 0), default=None),
        charts={key: chart_of(key, lines, bands) for key, lines in panels.items() if lines},
    )
    text = plain(text)
    zoo.write_whole(path or folder / "report.html", lambda place: place.write_text(text, encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------
# The frontier

RIGHT, RECALL, REWARD = "right: all", "recall, latents", "reward: weighted sum"


def lines_of(paths):
    """
    {task: {line: {point: {policy: {metric: (value, standard error)}}}}} of tables of evaluate.py. The base is a line
    through its guidance scales, and one through its best of N. Each table of tuned policies is a line through their
    numbers of steps, from the base. Policies that share a point are seeds. Raises Mistake.
    """
    tasks, numbers = {}, set()
    for path in paths:
        with zoo.reading(path, "make it anew with evaluate.py"):
            table = json.loads(path.read_text())
            lines = tasks.setdefault(table["task"], {})
            for name, record in table["records"].items():
                figures, errors = table["columns"][name], table["standard_errors"][name]
                if record["cfg"] and {RIGHT, RECALL} <= set(figures):  # renders have no cfg
                    numbers.add(record["num"])
                    line, point = place_of(record, path)
                    found = {key: (value, errors[key] or 0) for key, value in figures.items()}
                    lines.setdefault(line, {}).setdefault(point, {})[record["policy"]] = found
    if not all(tasks.values()):
        raise Mistake("a table has no share right or no recall, which those of the toys have from 48 pictures on")
    if len(numbers) > 1:
        raise Mistake(f"the tables are of {sorted(numbers)} pictures, on which recall depends: give all the same --num")
    for lines in tasks.values():
        base = lines.get(("base, guidance", None), {})
        for (_, cfg), points in lines.items():
            if cfg and (cfg, f"cfg {cfg:g}") in base:  # the line begins there
                points[0, ""] = base[cfg, f"cfg {cfg:g}"]
    return tasks


def place_of(record, path):
    """Where a column of evaluate.py belongs: ((label of a line, its cfg or None), (number along the line, name))."""
    cfg, best_of = record["cfg"], record["best_of"]
    steps = record["steps"]  # only tuned policies have some
    if not steps and best_of == 1:
        return ("base, guidance", None), (cfg, f"cfg {cfg:g}")
    guided = f", cfg {cfg:g}" if cfg != 1 else ""
    if not steps:
        return (f"base, best of N{guided}", cfg), (best_of, f"best of {best_of}")
    label = path.parent.resolve().name if path.stem.startswith("evaluation") else path.stem
    return (f"{label}{guided}", cfg), (steps, f"{steps} steps")


def frontier_figure(tasks):
    """
    What accuracy costs, a row per task: the share right against recall in latents, which no reward sees, and against
    the judges' weighted sum. There a policy below the line of best-of-N, which touches no weight, hacks the judges.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.4 * len(tasks)), layout="constrained")
    grid = figure.subplots(len(tasks), 3, width_ratios=(4, 4, 2), squeeze=False)
    for (left, right, names), (task, lines) in zip(grid, tasks.items(), strict=True):
        draw_frontier(left, lines, RECALL)
        draw_frontier(right, lines, REWARD)
        left.set_ylabel(f"right, {task}")
        names.legend(*left.get_legend_handles_labels(), loc="center left", fontsize=8, frameon=False)
        names.axis("off")
    return figure


def draw_frontier(axes, lines, key):
    """The share right against another figure: each line with the names of its points and their errors."""
    for k, ((label, _), points) in enumerate(lines.items()):
        seeds = [points[at].values() for at in sorted(points)]
        x, dx = np.transpose([seeds_mean(own, key) for own in seeds])
        y, dy = np.transpose([seeds_mean(own, RIGHT) for own in seeds])
        style = dict(color=f"C{k}", marker="o", markersize=4, linewidth=1, elinewidth=0.6)
        axes.errorbar(x, y, dy, dx, label=label, **style)
        style = dict(textcoords="offset points", fontsize=7, color=f"C{k}")
        for i, (_, name) in enumerate(sorted(points)):
            axes.annotate(name, (x[i], y[i]), (5, 5), **style)
    axes.set_xlabel(key)
    axes.margins(0.15)  # for the names
    axes.grid(True)


def seeds_mean(seeds, key):
    """(mean, standard error) of a figure over seeds, [{metric: (value, error)}]. The error includes their spread."""
    found = [figures.get(key, (np.nan, 0)) for figures in seeds]
    values, errors = np.transpose(found)
    variance = (errors**2).mean()
    if len(values) > 1:
        variance += values.var(ddof=1)
    return values.mean(), math.sqrt(variance / len(values))


# ---------------------------------------------------------------------------------------------------------------
# The command line


def parse_args(argv=None):
    parser = zoo.script_parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=zoo.user_path, help="folders of train.py, or tables (.json) of evaluate.py")
    add("--out", type=zoo.user_path, help="file of the page or picture (default: report.html in the run; of several, "
        "compare.png beside the first; of tables, frontier.png there); NAME.json keeps the curves of several runs, as "
        "the band behind others of their task")  # fmt: skip
    return parser.parse_args(argv)


def run(args):
    first = args.runs[0]
    if all(path.suffix == ".json" for path in args.runs):
        path = args.out or first.parent / "frontier.png"
        save_figure(path, frontier_figure, lines_of(args.runs))
    elif args.out and args.out.suffix == ".json":
        path = args.out
        write_bands(args.runs, path)
    elif len(args.runs) > 1:
        path = args.out or first.parent / "compare.png"
        compare_runs(args.runs, path)
    else:
        path = args.out or first / "report.html"
        write_page(first, path)
    parallel.say(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def main(argv=None):
    zoo.run_script(parse_args, run, argv)


if __name__ == "__main__":
    main()
