"""
A page per run, to look at: one HTML file with everything inside, which opens without a network.

    python report.py out/c2i                    # writes out/c2i/report.html; train.py does so too when it ends
    python report.py out/seed0 out/seed1 out/x  # several runs on one page, out/compare.html
    python report.py base.json tuned.json --out frontier.png  # tables of evaluate.py: accuracy against diversity

Runs whose flags are equal except for the seed are one line with a band. A run's page shows its flags, a curve for each
metric with what is healthy, the same prompts and seeds as training goes on, one picture as it is written token by
token, by base and tuned model from the same random numbers, and the table of evaluate.py where there is one. Charts are
plain SVG in the colours of the page, so they are sharp at any size and readable in the dark.

Shapes: T image tokens.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # else Ctrl-C amid the imports below ends in their traceback

import base64
import html
import io
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import zoo
from data import Mistake
from model import image_noise
from tokenizer import to_uint8

NOTES = {  # metric: (what is healthy, the range of it that is drawn as a band or None)
    "reward": ("rises, then levels off", None),
    "right": ("rises with the reward; if it falls meanwhile, the judges are hacked", None),
    "kl": ("rises early, with --ref-cfg from above 0, then stays flat or falls; nats per token", None),
    "entropy": ("drifts down a little; a plunge is collapse; nats per token", None),
    "reward_std": ("falls slowly; at 0 nothing is left to learn from", None),
    "ratio": ("1 with one update per batch", (0.99, 1.01)),
    "clip_frac": ("0 with one update per batch, below 0.2 with several", (0, 0.2)),
    "sampler_gap": ("below 1e-4 in float32, a few per cent in bfloat16", None),
    "grad_norm": ("steady; it is cut to 1", None),
    "loss": ("beta times kl with one update per batch and no --credit-coef", None),
    "equal_groups": ("near 0: such groups teach nothing", (0, 0.2)),
    "advantage_max": ("at most (G-1)/sqrt(G), 2.5 for 8 samples, where they are divided by their spread", None),
}
STYLE = """
:root { color-scheme: light dark; --line: #2563eb; --soft: #94a3b855; --good: #16a34a22 }
@media (prefers-color-scheme: dark) { :root { --line: #60a5fa; --good: #22c55e2a } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1240px; padding: 0 16px 48px;
  overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
.charts { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 280px), 1fr)) }
figure { margin: 0; border: 1px solid var(--soft); border-radius: 8px; padding: 8px } figcaption { font-size: .85rem }
svg { width: 100%; height: auto; display: block } svg text { fill: currentColor; font-size: 11px }
img { max-width: 100%; height: auto } input[type=range] { width: 100% }
.wide, pre { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem }
td, th { border-bottom: 1px solid var(--soft); padding: 2px 8px; text-align: right; white-space: nowrap }
.pair { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)) }
.writers { display: flex; flex-wrap: wrap; gap: 24px } .frame { width: 192px; height: 192px; background-color: #888;
  image-rendering: pixelated } .words { font: 10px/1.6 ui-monospace, monospace; white-space: pre; width: 240px }
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
  const slider = box.querySelector('input'), button = box.querySelector('button'), T = +box.dataset.tokens;
  const side = Math.round(Math.sqrt(T)), columns = 8, last = +slider.max;
  const show = () => { const k = +slider.value, done = Math.round(T * k / last);
    for (const frame of box.querySelectorAll('.frame')) frame.style.backgroundPosition =
      `${k % columns / (columns - 1) * 100}% ${Math.floor(k / columns) / (Math.ceil((last + 1) / columns) - 1) * 100}%`;
    for (const words of box.querySelectorAll('.words')) { const all = JSON.parse(words.dataset.tokens);
      words.textContent = all.map((t, i) => (i < done ? String(t) : '.').padStart(5) +
        ((i + 1) % side ? '' : '\\n')).join('') } };
  let timer = null;
  button.onclick = () => { if (timer) { clearInterval(timer); timer = null; return }
    if (+slider.value == last) slider.value = 0;
    timer = setInterval(() => { slider.value = +slider.value + 1; show();
      if (+slider.value == last) { clearInterval(timer); timer = null } }, 80) };
  slider.oninput = show; show();
}
"""


def read_metrics(folder):
    """The lines of a run's metrics.jsonl as dicts. Raises FileNotFoundError, Mistake."""
    path = folder / "metrics.jsonl"
    with zoo.reading(path, "give a folder that train.py wrote"):
        rows = [dict(json.loads(line)) for line in path.read_text().splitlines() if line.strip()]
    if not rows:
        raise Mistake(f"{path} is empty: nothing to report yet")
    return rows


# ---------------------------------------------------------------------------------------------------------------
# Charts


def chart(title, note, series, band=None, x_name="step"):
    """
    An SVG in a <figure>. series: [(label, x, y, low or None, high or None)], arrays; low to high is drawn as a band.
    Values that are not finite are left out.
    """
    width, height, left, bottom, top = 320, 190, 46, 26, 8
    flat = lambda arrays: np.concatenate([np.asarray(a, float).ravel() for a in arrays if a is not None])  # noqa: E731
    xs, ys = flat([s[1] for s in series]), flat([part for s in series for part in s[2:]])
    ys = ys[np.isfinite(ys)] if np.isfinite(ys).any() else np.zeros(1)
    (x0, x1), (y0, y1) = (xs.min(), xs.max()), (ys.min(), ys.max())
    pad = 0.05 * (y1 - y0) or abs(y1) * 0.1 or 1
    y0, y1, x1 = y0 - pad, y1 + pad, x1 if x1 > x0 else x0 + 1
    at_x = lambda x: left + (x - x0) / (x1 - x0) * (width - left - 8)  # noqa: E731
    at_y = lambda y: top + (y1 - min(max(y, y0), y1)) / (y1 - y0) * (height - top - bottom)  # noqa: E731
    path = lambda x, y: " ".join(f"{at_x(a):.1f},{at_y(b):.1f}" for a, b in zip(x, y, strict=True) if math.isfinite(b))  # noqa: E731
    drawn = []
    if band:
        drawn.append(f'<rect x="{left}" width="{width - left - 8}" y="{at_y(band[1]):.1f}" '
                     f'height="{max(0, at_y(band[0]) - at_y(band[1])):.1f}" fill="var(--good)"/>')  # fmt: skip
    for k in range(3):
        y = y0 + pad + k / 2 * (y1 - y0 - 2 * pad)
        drawn.append(f'<line x1="{left}" x2="{width - 8}" y1="{at_y(y):.1f}" y2="{at_y(y):.1f}" stroke="var(--soft)"/>'
                     f'<text x="{left - 4}" y="{at_y(y) + 4:.1f}" text-anchor="end">{y:.2g}</text>')  # fmt: skip
    for k, (label, x, y, low, high) in enumerate(series):
        colour = "var(--line)" if len(series) == 1 else f"hsl({k * 137 % 360} 65% 50%)"
        if low is not None:
            drawn.append(f'<polygon points="{path(x, low)} {path(x[::-1], high[::-1])}" fill="{colour}" opacity=".2"/>')
        drawn.append(f'<polyline points="{path(x, y)}" fill="none" stroke="{colour}" stroke-width="1.6">'
                     f"<title>{html.escape(label)}</title></polyline>")  # fmt: skip
    drawn.append(f'<text x="{left}" y="{height - 8}">{x0:.3g}</text>'
                 f'<text x="{width - 8}" y="{height - 8}" text-anchor="end">{x1:.3g}</text>'
                 f'<text x="{(left + width) / 2}" y="{height - 8}" text-anchor="middle">{x_name}</text>')  # fmt: skip
    title, note = html.escape(title), html.escape(note)
    return f"""<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}">{"".join(drawn)}</svg>
        <figcaption><b>{title}</b> {note}</figcaption></figure>"""


def smooth(values):
    """A running mean over a twentieth of the run, of the values that are finite."""
    values = np.asarray(values, float)
    half = max(1, len(values) // 20) // 2
    with np.errstate(invalid="ignore"):
        return np.array([np.nanmean(values[max(0, k - half) : k + half + 1]) for k in range(len(values))])


def column(rows, key):
    return np.array([row.get(key, np.nan) for row in rows], float)


def charts(rows):
    """One chart for each metric of a run: those with a note first, then the judges and the seconds."""
    keys = [key for key in NOTES if key in rows[0]]
    keys += [key for key in rows[0] if key.endswith("_mean")]
    keys += [key for key in rows[0] if key not in keys and key != "step" and not key.endswith(("_std", "_not_finite"))]
    steps, made = column(rows, "step"), []
    for key in keys:
        values = column(rows, key)
        if np.isfinite(values).any():
            note, band = NOTES.get(key, ("", None))
            spread = (np.minimum(values, smooth(values)), np.maximum(values, smooth(values)))
            made.append(chart(key, note, [(key, steps, smooth(values), *spread)], band))
    return f'<div class="charts">{"".join(made)}</div>'


# ---------------------------------------------------------------------------------------------------------------
# Pictures


def data_uri(image):
    """A PIL image as the text of an <img>: WebP, lossless if it is small."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "WEBP", quality=85, lossless=image.width * image.height < 400_000, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def slides(folder):
    """The grids of a run: before and after side by side, then all behind one slider, at most ten from between."""
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
    title = "<h2>The same prompts and seeds as training goes on</h2>"
    slides = f"{title}<div data-slides>{slider}<b></b>{figures}</div>" if paths else ""
    return f'<h2>Before and after</h2><div class="pair">{pair}</div>{slides}' if pair else slides


@torch.no_grad()
def writing(model, tokenizer, cond, cond_mask, **sampling):
    """
    One picture as it is written: its tokens (T,), and a sheet of pictures, eight in a row, one for each moment: all of
    0 to T tokens for a toy, nine moments else, because a large tokenizer needs a second for each on a CPU. Cells that
    are not written yet are grey; the decoder, which looks at all cells at once, sees the last token repeated there.
    """
    tokens, _ = model.generate(cond, cond_mask, noise=image_noise([0], model.config.num_tokens, 7), **sampling)
    T, side = tokens.shape[1], math.isqrt(tokens.shape[1])
    moments = np.linspace(0, T, (T if T <= 64 else 8) + 1).round().astype(int)
    last = torch.as_tensor(moments, device=tokens.device)[:, None]  # (moments, 1)
    place = torch.arange(T, device=tokens.device)
    so_far = tokens[0, torch.minimum(place, (last - 1).clamp(min=0))]  # (moments, T)
    images = torch.cat([tokenizer.decode(part) for part in so_far.split(16)])  # (moments, 3, H, W)
    written = (place < last).view(-1, 1, side, side).float()
    images = images * torch.nn.functional.interpolate(written, images.shape[2:], mode="nearest")  # 0 is grey
    frames = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
    n, height, width, _ = frames.shape
    sheet = np.full((math.ceil(n / 8) * height, 8 * width, 3), 128, np.uint8)
    for k, frame in enumerate(frames):
        sheet[k // 8 * height :, k % 8 * width :][:height, :width] = frame
    sheet = Image.fromarray(sheet)
    sheet.thumbnail((8 * 192, 10_000))  # of large pictures a small one
    return tokens[0].tolist(), n, sheet


def writers(policies, tokenizer, encode, prompt, asked, **sampling):
    """The section in which {name: model} write the same prompt from the same random numbers."""
    boxes, (cond, cond_mask) = "", encode([asked])
    for name, model in policies.items():
        tokens, moments, sheet = writing(model, tokenizer, cond, cond_mask, **sampling)
        size = f"background-size:800% {math.ceil(moments / 8) * 100}%"
        boxes += f"""<div><b>{html.escape(name)}</b>
            <div class="frame" style="{size};background-image:url('{data_uri(sheet)}')"></div>
            <div class="words" data-tokens="{json.dumps(tokens)}"></div></div>"""
    slider = f'<input type="range" aria-label="moments" min="0" max="{moments - 1}" value="{moments - 1}">'
    return f"""<h2>One picture, token by token: {html.escape(prompt)}</h2>
        <div data-writer data-tokens="{len(tokens)}"><button>play</button> {slider}
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
        if key in rows[0]:
            first, last = (column(part, key).mean() for part in (rows[:tenth], rows[-tenth:]))
            said.append(f"{key} {first:.3f} to {last:.3f} (means of the first and the last {tenth} steps)")
    shown = "\n".join(f"{name:20} {value}" for name, value in flags.items() if value not in (None, "None", False))
    return f"<p>{'; '.join(said)}</p><details><summary>flags</summary><pre>{html.escape(shown)}</pre></details>"


def newest_table(folder):
    """(columns, standard errors) of the newest table of evaluate.py beside the run, {} without one. Raises Mistake."""
    tables = sorted(folder.glob("evaluation*.json"), key=lambda path: path.stat().st_mtime)
    if not tables:
        return {}, {}
    with zoo.reading(tables[-1], "evaluate the run again, or delete it"):
        found = json.loads(tables[-1].read_text())
        return {name: dict(figures) for name, figures in found["columns"].items()}, dict(
            found.get("standard_errors", {})
        )


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
    """{flag: value} of a run, as train.py wrote them; {} of one that is older than that."""
    path = folder / "flags.json"
    with zoo.reading(path, "delete it: the page can do without"):
        return dict(json.loads(path.read_text())) if path.exists() else {}


def write_run(folder, written="", path=None):
    """The page at `path` or FOLDER/report.html; `written` is the section of `writers`. Raises Mistake, OSError."""
    folder, rows = Path(folder), read_metrics(Path(folder))
    parts = facts(rows, read_flags(folder)), slides(folder), written, evaluation(folder)
    text = page(f"AR-GRPO: {folder}", *parts, "<h2>Curves</h2>", charts(rows))
    zoo.write_whole(path or folder / "report.html", lambda place: place.write_text(text, encoding="utf-8"))


def write_comparison(folders, path):
    """One page for several runs; runs whose flags are equal except for the seed are one line, with a band."""
    groups = {}
    for folder in map(Path, folders):
        flags = {k: v for k, v in read_flags(folder).items() if k not in ("seed", "out")}
        groups.setdefault(json.dumps(flags, sort_keys=True), []).append((folder, read_metrics(folder)))
    lines, made = [], []
    for members in groups.values():
        label = " ".join(folder.name for folder, _ in members)
        length = min(len(rows) for _, rows in members)
        lines.append((label, [rows[:length] for _, rows in members]))
    for key in [key for key in NOTES if any(key in runs[0][0] for _, runs in lines)]:
        series = []
        for label, runs in lines:
            values = np.stack([smooth(column(rows, key)) for rows in runs])
            if np.isfinite(values).all():
                series.append((label, column(runs[0], "step"), values.mean(0), values.min(0), values.max(0)))
        made += [chart(key, NOTES[key][0], series)] if series else []
    both = [(label, np.mean([smooth(column(r, "kl")) for r in runs], 0),
             np.mean([smooth(column(r, "reward")) for r in runs], 0), None, None) for label, runs in lines]  # fmt: skip
    made.append(chart("reward against KL", "what a nat of distance bought", both, x_name="kl"))
    recall = recall_points(folders)
    if recall:
        made.append(chart("right against recall", "newest evaluation, from the base", recall, x_name="recall"))
    names = "".join(
        f'<li style="color:hsl({k * 137 % 360} 65% 50%)">{html.escape(label)}</li>'
        for k, (label, _) in enumerate(lines)
    )
    text = page("AR-GRPO: runs compared", f"<ul>{names}</ul>", f'<div class="charts">{"".join(made)}</div>')
    zoo.write_whole(path, lambda place: place.write_text(text, encoding="utf-8"))


def recall_points(folders):
    """[(run, recall of base and tuned, right of base and tuned, None, None)] of the runs that were evaluated."""
    found = []
    for folder in map(Path, folders):
        keys = "recall, latents", "right: all"
        columns = [figures for figures in newest_table(folder)[0].values() if set(keys) <= set(figures)]
        if len(columns) > 1:
            pair = [np.array([figures[key] for figures in columns[:2]]) for key in keys]
            found.append((folder.name, *pair, None, None))
    return found


def write_frontier(paths, place):
    """
    What accuracy costs, as a picture: each table of evaluate.py is a line through its policies, with standard errors;
    tables of a base are a line through its guidance scales, one through its best-of-N, and one of other temperatures.
    On the left the share right against recall in latents, which no reward sees; on the right against the judges'
    weighted sum: below the line of best-of-N, which raises the reward without touching a weight, the judges are being
    hacked. A row per task. Raises Mistake.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if place.suffix not in (".png", ".svg", ".pdf"):
        raise Mistake(f"--out {place}: the figure's name ends in .png, .svg or .pdf")
    tables = {}
    for path in paths:
        with zoo.reading(path, "give a .json that evaluate.py wrote"):
            table = json.loads(path.read_text())
            kind = ", best of N" * (table["best_of"] > 1) + ", cooler or hotter" * (table["temperature"] != 1)
            own = path.parent.resolve().name if path.stem.startswith("evaluation") else path.stem
            label = own if table["tuned"] else f"base{kind}"
            heat = "" if table["temperature"] == 1 else f", temperature {table['temperature']:g}"
            lines = tables.setdefault(table["task"], {})
            lines[label] = lines.get(label, []) + [(name + heat, figures) for name, figures in points_of(table)]
    if not any("right: all" in f for lines in tables.values() for points in lines.values() for _, f in points):
        raise Mistake("none of these tables says how many pictures are right: only the toys' do")
    figure, rows = plt.subplots(len(tables), 2, figsize=(11, 4.6 * len(tables)), squeeze=False)
    for row, (task, lines) in zip(rows, tables.items(), strict=True):
        for axes, key in zip(row, ("recall, latents", "reward: weighted sum"), strict=True):
            for k, (label, points) in enumerate(lines.items()):
                found = [(name, f[key], f["right: all"]) for name, f in points if {key, "right: all"} <= set(f)]
                if found:
                    names, xs, ys = zip(*found, strict=True)
                    (x, dx), (y, dy) = np.transpose(xs), np.transpose(ys)
                    style = dict(color=f"C{k}", marker="o", markersize=4, linewidth=1, elinewidth=0.4)
                    axes.errorbar(x, y, dy, dx, label=label, **style)
                    for name, *at in zip(names, x, y, strict=True):  # every other line's above, so that fewer collide
                        axes.annotate(name, at, fontsize=6, xytext=(3, 3 if k % 2 else -8), textcoords="offset points")
            axes.set(xlabel=key, ylabel=f"right, {task}")
            axes.grid(alpha=0.3)
        row[0].legend(fontsize=7)
    figure.tight_layout()
    zoo.write_whole(place, lambda path: figure.savefig(path, dpi=110, format=place.suffix[1:]))
    plt.close(figure)


def points_of(table):
    """[(name, {metric: (value, standard error)})] of the policies in a table of evaluate.py (tuned if any)."""
    folders = {f"tuned {k}": Path(path).parent.name for k, path in enumerate(table["tuned"], 1)}
    drawn = [(column, *column.split(", ", 1)) for column in table["columns"] if column.startswith(("base, ", "tuned"))]
    drawn = [each for each in drawn if each[1] != "base" or not folders]
    several, found = len({setting for _, _, setting in drawn}) > 1, []
    for column, which, setting in drawn:
        folder = folders.get(which if len(folders) > 1 else "tuned 1")
        name = ", ".join([folder] * bool(folder) + [setting] * (several or not folder))
        figures, errors = table["columns"][column], table["standard_errors"][column]
        found.append((name, {key: (figures[key], errors[key]) for key in errors}))
    return found


def parse_args(argv=None):
    parser = zoo.script_parser(__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, help="folders that train.py wrote, or .json that evaluate.py wrote"
    )
    parser.add_argument("--out", type=Path, help="file of the page or picture (default: report.html in the run; of "
                        "several, compare.html beside the first; of tables, frontier.png there)")  # fmt: skip
    return parser.parse_args(argv)


def run(args):
    if all(path.suffix == ".json" for path in args.runs):
        path = args.out or args.runs[0].parent / "frontier.png"
        write_frontier(args.runs, path)
    elif len(args.runs) == 1:
        (folder,) = args.runs
        path = args.out or folder / "report.html"
        write_run(folder, write_pictures(folder), path)
    else:
        path = args.out or args.runs[0].parent / "compare.html"
        write_comparison(args.runs, path)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def write_pictures(folder):
    """The section of `writers` for the policy in the folder; empty if there is none, or no prompt to ask it for."""
    if not (folder / "policy.safetensors").exists():
        return ""
    name, path, header = zoo.find_policy(folder)
    if not zoo.is_toy(name) and zoo.MODELS[name].config.task == "t2i":
        return ""
    encode = partial(zoo.load_encoder(name), pad=header["text_pad"])
    policies = {"base": zoo.load_model(name, header["base"]), "tuned": zoo.load_model(name, path)}
    asked = zoo.read_asked(name)[0]
    sampling = dict(cfg_scale=header["cfg_scale"], temperature=header["temperature"])
    return writers(policies, zoo.load_tokenizer(name), encode, zoo.captions_of(name, [asked])[0], asked, **sampling)


def main(argv=None):
    zoo.run_script(parse_args, run, argv)


if __name__ == "__main__":
    main()
