"""
How good is a policy, next to the base it came from? In the toy world, where truth is known; by judges; and by the
field's protocols, so that figures compare with other people's.

    python evaluate.py --ckpt out/c2i              # base and tuned side by side, at cfg 1 and 2
    python evaluate.py --ckpt out/seed0 out/seed1  # several policies of one model: their mean beside their base
    python evaluate.py --task t2i --num 512        # the base alone
    python evaluate.py --best-of 4                 # the line to beat: the best of four by the judges, without training
    python evaluate.py --ckpt out/llamagen-b-256 --cfg-scale 2 --num 50000 --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate.py --samples theirs.npz --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate.py --ckpt out/llamagen-t2i-xl-256 --prompts drawbench.txt --rewards clip,hps,maniqa
    python evaluate.py --ckpt out/llamagen-t2i-xl-256 --geneval evaluation_metadata.jsonl

    right         share of pictures that the verifier accepts (data.py), in all and by shape (c2i) or category (t2i)
    rewards       mean score of each judge
    entropy       nats per token, of the conditional model on its own samples: how undecided the policy still is
    Frechet, precision, recall, distance in class: see metrics.py

For a toy the last line is given twice: in features of the toy CLIP, which is also a judge, and in the latents of the
tokenizer's encoder, which no reward sees. References are fresh renders; these figures compare with each other and with
nothing else. The last column is renders that went through the tokenizer and back: what a perfect transformer would
reach. With --reference they are taken in Inception's features as ADM does (arXiv 2105.05233), with sFID, Inception
score and KID: FID and sFID against the file's statistics, the rest against its pictures.

Every figure has its standard error. Base and tuned draw from the same random numbers, so their difference is computed
per picture and has its own standard error. A figure for which there are too few pictures is left out, and the table
says why.

Each column's pictures are drawn into one file of 8-bit pixels, and then scored from it. An interrupted evaluation
continues at the first picture that is missing when the same command is given again, and ends in the same table. Under
torchrun all processes draw and score. The first one writes a Markdown table, which is printed too, and JSON next to the
checkpoint.

Shapes: n pictures, m references, E features per picture, T image tokens.
"""

import hashlib
import io
import itertools
import json
import re
import shutil
import textwrap
import zipfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import parallel
import zoo
from grpo import token_logprobs
from metrics import as_cells, as_table, compare, feature_figures, mean_of, mean_of_figures, reference_of
from prompts import captions_of, fixed_prompts, load_encoder, read_prompt_file, read_prompts
from rewards import (
    BEST_BY,
    OPTIONS,
    add_judge_flags,
    clip_image_features,
    held_out,
    judge_images,
    judge_options,
    load_clip,
    load_judges,
    parse_rewards,
    weighted_sum,
)
from sample import draw_best, write_npz
from tokenizer import to_uint8
from zoo import Mistake

# ---------------------------------------------------------------------------------------------------------------
# The Inception network

# Where torch-fidelity keeps its copy of the Inception network of 2015. The name holds the first digits of the sha256.
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_HASH = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIDE = 256  # px: LlamaGen's table has its pictures of 384 px resized to this


def checked_file(where, flag, expected=None):
    """
    (path, sha256) of `where`: a path or hf:OWNER/REPO/FILE, which #SHA256 (64 digits) may follow. Raises Mistake if the
    file's hash is another than that, or than `expected`.
    """
    said = re.fullmatch(r"(.+)#([0-9a-f]{64})", str(where))
    path = zoo.find_file(said[1] if said else where, flag)
    found, wanted = zoo.file_hash(path), said[2] if said else expected
    if wanted and found != wanted:
        raise Mistake(
            f"{flag} {where}: its sha256 is {found}, not {wanted}; to use this very file, give {path}#{found}"
        )
    return path, found


def inception_file(where):
    """(path, sha256) of the Inception network's weights; torch-fidelity's own if `where` is None. Raises Mistake."""
    if where:
        return checked_file(where, "--inception", INCEPTION_HASH)
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with zoo.reading(URL_INCEPTION_V3, "fetch it elsewhere and give it with --inception"):
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), INCEPTION_HASH)
    return checked_file(path, "--inception", INCEPTION_HASH)


def load_inception(path, device="cpu"):
    """torch-fidelity's Inception: TensorFlow's network of 2015 with its own resizing to 299 px. Raises Mistake."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    weights = io.BytesIO()  # torch-fidelity unpickles whatever it is given, so it gets tensors that we have read
    torch.save(zoo.read_weights(path), weights)
    weights.seek(0)
    with zoo.reading(path, "it is not the Inception network in torch-fidelity's form"):
        network = FeatureExtractorInceptionV3("adm", ["2048", "logits_unbiased"], weights)
    return network.to(device)


@torch.no_grad()
def inception_features(pixels, network):
    """
    Of pictures (n, 3, H, W), uint8: pool (n, 2048); logits (n, 1008) without bias; spatial (n, 2023), the first 7
    channels of Mixed_6d's first branch, 17 x 17 each, channels last as in TensorFlow. On the CPU.
    """
    seen = []
    hook = network.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, output: seen.append(output[:, :7]))
    try:
        pool, logits = network(pixels.to(network.fc.weight.device))
    finally:
        hook.remove()
    spatial = seen[0].permute(0, 2, 3, 1).flatten(1)
    return dict(pool=pool.cpu(), logits=logits.cpu(), spatial=spatial.cpu())


def shrunk(pixels):
    """Pictures (n, 3, H, W), uint8, on the CPU; larger ones resized to 256 px by PIL's bicubic filter."""
    if pixels.shape[-1] <= SIDE:
        return pixels
    small = [Image.fromarray(x.permute(1, 2, 0).numpy()).resize((SIDE, SIDE), Image.BICUBIC) for x in pixels]
    return torch.from_numpy(np.stack([np.asarray(x) for x in small])).permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------------------------
# Pictures: drawn into a file, or taken from somebody's npz


def open_array(path, shape, dtype, fill):
    """
    The .npy at `path` as a memory-mapped array that can be written; new ones are filled with `fill`. All of it is on
    disk before it is mapped, because a mapped page that finds the disk full kills the process. Raises OSError.
    """
    if not path.exists():
        filled = np.broadcast_to(np.asarray(fill, dtype), shape)  # takes no memory
        zoo.write_whole(path, lambda temporary: np.save(temporary, filled))
    return np.lib.format.open_memmap(path, "r+")


@torch.no_grad()
def draw_column(number, name, args, model, tokenizer, encode, cfg, judges, captions):
    """
    Draws the pictures of one policy at one guidance scale into files of args.work. Returns the pixels (n, H, W, 3),
    uint8, memory-mapped, and the entropies (n,). Pictures that are there already are not drawn again.
    """
    row, n = zoo.MODELS[args.model], len(args.prompts)
    options = dict(batch_size=args.batch_size, dtype=args.dtype)
    options |= dict(cfg_scale=cfg, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    files = [args.work / f"{number}-{what}.npy" for what in ("pixels", "tokens", "entropy")]
    done = 0
    if parallel.rank() == 0:
        pixels = open_array(files[0], (n, side_of(row), side_of(row), 3), np.uint8, 0)
        tokens = open_array(files[1], (n, row.config.num_tokens), np.int32, -1)
        entropy = open_array(files[2], (n,), np.float64, np.nan)
        done = int((tokens[:, 0] >= 0).sum())  # tokens are written last, so what has tokens is complete
    start = parallel.largest(done)
    with tqdm(total=n, initial=start, desc=name, unit="picture", disable=parallel.rank() > 0) as bar:
        while start < n:
            stop = min(start + args.batch_size * parallel.world(), n)
            prompts, best = args.prompts[start:stop], (args.best_of, judges, args.judge_weights, captions[start:stop])
            images, new = draw_best(*best, model, tokenizer, encode, prompts, args.seed, first=start, **options)
            new_entropy = entropies(model, encode, prompts, new, args.dtype)
            if parallel.rank() == 0:
                new_pixels = to_uint8(images * 2 - 1)
                if args.items:
                    write_benchmark(args, args.pictures / file_name(name), new_pixels, start)
                with zoo.writing(args.work):
                    pixels[start:stop] = new_pixels.permute(0, 2, 3, 1).numpy()
                    entropy[start:stop] = new_entropy
                    pixels.flush()
                    entropy.flush()
                    tokens[start:stop] = new.numpy()
                    tokens.flush()
            bar.update(stop - start)
            start = stop
    parallel.largest(0)  # the first process has written everything
    return np.load(files[0], mmap_mode="r"), np.load(files[2])


def side_of(row):
    """Pixels on a side of a model's pictures."""
    return row.config.grid_size * row.vq_config.patch * 2 ** (len(row.vq_config.ch_mult) - 1)


@torch.no_grad()
def entropies(model, encode, prompts, tokens, dtype):
    """Entropy of the conditional model, nats per token, over its own samples tokens (n, T): the mean of each, (n,)."""
    rows = parallel.share(len(prompts))
    cond, cond_mask = encode([prompts[k] for k in rows])
    with zoo.autocast(cond.device, dtype):
        _, entropy, _ = token_logprobs(model, cond, tokens[rows].to(cond.device), cond_mask)
    return parallel.gather(entropy.mean(1).cpu().double(), len(prompts)).numpy()


def open_pictures(path, unpacked):
    """
    The pictures arr_0 (n, H, W, 3), uint8, of an npz in ADM's form, whoever wrote it. They are unpacked once into the
    file `unpacked` and memory-mapped: 50,000 take 10 GB. Raises Mistake, FileNotFoundError.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such npz file")
    with zoo.reading(path, "an npz of arrays is needed"):
        if not unpacked.exists() and parallel.rank() == 0:
            with zipfile.ZipFile(path) as archive:
                if "arr_0.npy" not in archive.namelist():
                    raise Mistake(f"{path} holds no pictures: an array arr_0 is needed, uint8, (n, H, W, 3)")
                with archive.open("arr_0.npy") as source, open(unpacked.with_suffix(".tmp"), "wb") as target:
                    shutil.copyfileobj(source, target, 2**20)
            unpacked.with_suffix(".tmp").rename(unpacked)
        parallel.largest(0)
        pixels = np.load(unpacked, mmap_mode="r", allow_pickle=False)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape:
        raise Mistake(f"{path}: arr_0 is {pixels.dtype} {pixels.shape}, not uint8 (n, H, W, 3)")
    return pixels


def array_of(path, *names):
    """The first of these arrays that an npz holds, or None. Raises Mistake."""
    with zoo.reading(path, "an npz of arrays is needed"), np.load(path, allow_pickle=False) as file:
        return next((file[name] for name in names if name in file.files), None)


def labels_of(path, n):
    """The n labels or prompts beside the pictures of an npz, or None; (n, 1) and one-hot will do. Raises Mistake."""
    labels = array_of(path, "labels", "prompts", "arr_1")  # ours, ours, ADM's
    if labels is None:
        return None
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    elif labels.ndim == 2 and labels.dtype.kind in "iufb" and ((labels != 0).sum(1) == 1).all():
        labels = labels.argmax(1)
    if labels.shape != (n,):
        raise Mistake(f"{path}: its labels are {labels.shape}; {n} pictures need {n} labels")
    return labels


def write_column(path, pixels, prompts):
    """--npz: a column's pictures as an npz in ADM's form, unpacked, at most 256 px wide, with n labels or prompts."""
    if parallel.rank() > 0:
        return
    unpacked = path.with_suffix(".tmp.npy")
    if pixels.shape[1] > SIDE:
        unpacked.unlink(missing_ok=True)  # a killed evaluation's
        small = open_array(unpacked, (len(pixels), SIDE, SIDE, 3), np.uint8, 0)
        for k in range(0, len(pixels), 64):
            small[k : k + 64] = shrunk(as_tensor(pixels[k : k + 64])).permute(0, 2, 3, 1).numpy()
        pixels = small
    key = "labels" if np.asarray(prompts).dtype.kind == "i" else "prompts"
    zoo.write_whole(path, lambda temporary: write_npz(temporary, {"arr_0": pixels, key: np.asarray(prompts)}))
    unpacked.unlink(missing_ok=True)


def as_tensor(pixels):
    """Pixels (n, H, W, 3), uint8, of an array -> (n, 3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2)


def renders(captions, seed):
    """Renders of captions, pixels (n, 64, 64, 3), uint8, each from (*seed, its number)."""
    images = [data.render([caption], np.random.default_rng([*seed, k])) for k, caption in enumerate(captions)]
    return to_uint8(torch.from_numpy(np.concatenate(images)) * 2 - 1).permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def round_trips(pixels, tokenizer, device):
    """Pixels (n, H, W, 3), uint8, through the tokenizer and back."""
    trips = []
    for part in as_tensor(pixels).split(64):
        decoded = tokenizer.decode(tokenizer.encode((part / 255 * 2 - 1).to(device)))
        trips.append(to_uint8(decoded).cpu())
    return torch.cat(trips).permute(0, 2, 3, 1).numpy()


# ---------------------------------------------------------------------------------------------------------------
# Scoring


class Tools(NamedTuple):
    """What looks at a picture."""

    networks: dict = {}  # {name: images (n, 3, 64, 64) in [0, 1] -> features (n, E)}, a toy's
    inception: torch.nn.Module = None
    judges: dict = {}  # as load_judges returns them
    weights: dict = {}  # of the judges, by name
    verifier: bool = False


def score(name, pixels, captions, args, tools):
    """
    {quantity: array (n, ...)}: what `tools` say about pixels (n, H, W, 3), uint8, batch by batch. Of several processes
    each scores its share.
    """
    found, size = {}, args.batch_size * parallel.world()
    for start in tqdm(range(0, len(pixels), size), desc=f"{name}: scores", leave=False, disable=parallel.rank() > 0):
        n = min(size, len(pixels) - start)
        rows = [start + k for k in parallel.share(n)]
        for quantity, values in score_batch(
            as_tensor(pixels[rows]), [captions[k] for k in rows], tools, args.device
        ).items():
            found.setdefault(quantity, []).append(parallel.gather(values, n).numpy())
    return {quantity: np.concatenate(parts) for quantity, parts in found.items()}


@torch.no_grad()
def score_batch(pixels, captions, tools, device):
    """{quantity: (n, ...)} of pixels (n, 3, H, W), uint8."""
    images, found = pixels / 255, {}
    if tools.verifier:
        right = [data.satisfies(*pair) for pair in zip(images, captions, strict=True)]
        found["right"] = torch.tensor(right, dtype=torch.float64)
    found |= {name: network(images) for name, network in tools.networks.items()}
    if tools.inception:
        found |= inception_features(shrunk(pixels), tools.inception)
    scores, _ = judge_images(tools.judges, images.to(device), captions)
    scores = {judge: values.cpu().double() for judge, values in scores.items()}
    for judge, values in scores.items():
        label = f"{judge} (held out)" if judge in held_out(tools.weights) else judge
        found[f"reward: {label}"] = values
    if len(scores) > 1:
        found["reward: weighted sum"] = weighted_sum(scores, tools.weights)
    return found


# ---------------------------------------------------------------------------------------------------------------
# Benchmarks with scorers of their own: we write the folders that these read

GENEVAL = (
    "github.com/djghosh13/geneval with its Mask2Former (evaluation/download_models.sh) and a GPU: "
    "python evaluation/evaluate_images.py {folder} --outfile results.jsonl --model-path MODELS, "
    "then python evaluation/summary_scores.py results.jsonl"
)
DPG = (
    "github.com/TencentQQGYLab/ELLA with modelscope's mPLUG-large and a GPU: accelerate launch "
    "dpg_bench/compute_dpg_bench.py --image-root-path {folder} --resolution {side} --pic-num 4 --vqa-model mplug"
)


def read_benchmark(args):
    """
    (prompts, items) of --geneval FILE or --dpg FOLDER. items: lines of GenEval's metadata, or DPG-Bench's item names.
    Raises Mistake, OSError.
    """
    if args.geneval:
        if args.geneval.suffix != ".jsonl":
            raise Mistake(f"--geneval {args.geneval}: GenEval's evaluation_metadata.jsonl is needed")
        prompts = read_prompt_file(args.geneval)
        lines = [line for line in args.geneval.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        if len(lines) != len(prompts):
            raise Mistake(f"--geneval {args.geneval}: a line of it has no prompt")
        return prompts, lines
    paths = sorted(args.dpg.glob("*.txt"))
    if not paths:
        raise Mistake(f"--dpg {args.dpg}: a folder of ITEM.txt is needed, as DPG-Bench's dpg_bench/prompts")
    for path in paths:
        if "." in path.stem:  # its scorer takes the item's name up to the first dot
            raise Mistake(f"--dpg {path}: an item's name has no dot")
    return [path.read_text(encoding="utf-8-sig").strip() for path in paths], [path.stem for path in paths]


def write_benchmark(args, folder, pixels, start):
    """
    Puts pictures (n, 3, H, W), uint8, four in a row per item, where the scorers look for them: for GenEval
    FOLDER/00000/samples/0000.png and metadata.jsonl, for DPG-Bench a sheet of 2 x 2, FOLDER/ITEM.png.
    """
    for k, picture in enumerate(pixels, start):
        item, place, side = args.items[k // 4], k % 4, picture.shape[-1]
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        if args.geneval:
            path = folder / f"{k // 4:05d}/samples/{place:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parents[1] / "metadata.jsonl").write_text(item + "\n", encoding="utf-8")
        else:
            path = folder / f"{item}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            sheet = Image.open(path).convert("RGB") if place else Image.new("RGB", (2 * side, 2 * side))
            sheet.paste(image, (place % 2 * side, place // 2 * side))
            image = sheet
        zoo.write_whole(path, image.save)


def how_to_score(args):
    """What is needed to score the pictures of a benchmark."""
    side = side_of(zoo.MODELS[args.model])
    return f"To score: {(GENEVAL if args.geneval else DPG).format(folder=args.pictures / 'COLUMN', side=side)}"


# ---------------------------------------------------------------------------------------------------------------
# Figures. A text in the place of a figure says why there is none.


def right_figures(right, captions, task):
    """
    {"right: all": Figure, and by shape (c2i) or category (t2i)} of right (n,), 1 where the verifier accepts a picture.
    For t2i "all" is the mean over categories, as in GenEval.
    """
    kinds = np.array([data.kind_of(caption, task) for caption in captions])
    order = data.SHAPES if task == "c2i" else data.CATEGORIES
    parts = {kind: mean_of(right[kinds == kind]) for kind in order if (kinds == kind).any()}
    whole = mean_of(right) if task == "c2i" else mean_of_figures(parts, kinds)
    return {f"right: {kind}": figure for kind, figure in ({"all": whole} | parts).items()}


def figures_of(found, references, prompts, captions, task):
    """{name of metric: figure or reason} of what `score` has found."""
    figures = right_figures(found["right"], captions, task) if "right" in found else {}
    figures |= feature_figures(found, references, prompts)
    for name, values in found.items():
        if name.startswith("reward: "):
            missing = ~np.isfinite(values)
            figures |= {} if missing.all() else {name: mean_of(values)}
            figures |= {name.replace("reward", "missing"): mean_of(missing.astype(float))} if missing.any() else {}
    return figures | ({"entropy": mean_of(found["entropy"])} if "entropy" in found else {})


# ---------------------------------------------------------------------------------------------------------------
# The table


WHOLE_WORDS = dict(break_long_words=False, break_on_hyphens=False)  # a path is one


def write_results(args, settings, columns):
    """
    Writes NAME.md and NAME.json of {(cfg, column): {metric: Figure or reason}}, and returns the text: settings, a table
    for each cfg with the differences from its first column, and why a cell is blank. The table has the mean of several
    policies, NAME.json also each of them.
    """
    values, changes, tables = {name: compare([found]) for (_, name), found in columns.items()}, {}, []
    last = {name: values[name] for cfg, name in columns if cfg is None}  # the renders
    for cfg in dict.fromkeys(cfg for cfg, _ in columns if cfg is not None):
        (first, base), *others = [(name, found) for (own, name), found in columns.items() if own == cfg]
        shown = alone = {name: [found] for name, found in others}
        if len(others) > 1 and not args.samples:
            shown = {f"mean of {len(others)}, cfg {cfg:g}": [found for _, found in others]}
        values |= {name: compare(runs) for name, runs in shown.items()}
        for name, runs in (alone | shown).items():
            changes[name] = compare(runs, base, paired=not args.samples)
        cells = {first: dict.fromkeys(base, "")}  # a row for each metric, those too that are blank everywhere
        cells = {name: cells.get(name, {}) | as_cells(values[name]) for name in (first, *shown)}
        cells |= {f"{name.split(',')[0]} minus {first.split(',')[0]}": as_cells(changes[name], "+") for name in shown}
        tables.append(as_table(cells | {name: as_cells(found) for name, found in last.items()}))
        last = {}
    said = {k: v for k, v in settings.items() if k != "sha256" and v not in (None, "", []) and v != OPTIONS.get(k)}
    parts = [textwrap.fill(", ".join(f"{key} {value}" for key, value in said.items()), 120, **WHOLE_WORDS), *tables]
    if changes:
        paired = "not paired" if args.samples else "paired by picture"
        parts.append(f"Behind ± stand standard errors; differences are {paired}.")
    blank = {name: {m: f for m, f in found.items() if isinstance(f, str)} for (_, name), found in columns.items()}
    reasons = {}
    for name, found in blank.items():
        for metric, why in found.items():
            reasons.setdefault((metric, why), []).append(name)
    parts += [f"Blank: {metric} of {'; '.join(names)}: {why}." for (metric, why), names in reasons.items()]
    parts += [how_to_score(args)] if args.items else []
    facts = dict(columns={name: {m: value for m, (value, _) in found.items()} for name, found in values.items()})
    facts["standard_errors"] = {name: {m: error for m, (_, error) in found.items()} for name, found in values.items()}
    facts = settings | facts | dict(differences=changes, blank=blank)
    text = "\n\n".join(parts) + "\n"
    for suffix, content in ((".json", json.dumps(facts, indent=1) + "\n"), (".md", text)):
        path = args.out.with_name(args.out.name + suffix)
        zoo.write_whole(path, lambda path, content=content: path.write_text(content, encoding="utf-8"))
    return text


# ---------------------------------------------------------------------------------------------------------------
# The command line


def parse_args(argv=None):
    parser = zoo.script_parser(__doc__)
    add = parser.add_argument_group("what is evaluated").add_argument
    zoo.add_model_flags(add)
    add("--ckpt", nargs="+", metavar="PATH", default=[], help="weights, or folders that train.py wrote, all of one "
        "model (default: only the base)")  # fmt: skip
    add("--base", metavar="PATH", help="weights of the base (default: those that the first --ckpt began from)")
    only = parser.add_mutually_exclusive_group().add_argument
    only("--classes", nargs="+", metavar="CLASS", help="c2i: only these, names or numbers, in turn (default: all)")
    only("--prompts", nargs="+", metavar="TEXT", help="t2i: captions or files of them, in turn (the toy has its own)")
    only("--geneval", type=Path, metavar="FILE", help="t2i: GenEval's evaluation_metadata.jsonl; draws four pictures "
         "per line into the folders that its scorer reads")  # fmt: skip
    only("--dpg", type=Path, metavar="FOLDER", help="t2i: DPG-Bench's prompts; draws four pictures per ITEM.txt, on "
         "one sheet as its scorer reads them")  # fmt: skip
    only("--samples", nargs="+", type=Path, default=[], metavar="FILE", help="npz files whose pictures, arr_0 uint8 "
         "(n, H, W, 3), are scored in a model's place")  # fmt: skip
    add("--num", type=int, help="pictures for each column (default 1024: standard error 1.5 points; --samples: all)")
    add("--cfg-scale", type=float, nargs="+", help="guidance to sample with (default: 1 and what the first --ckpt was "
        "trained with, or 2 if that is 1)")  # fmt: skip
    add("--temperature", type=float, help="divides the logits (default: what the first --ckpt was trained with, "
        "else 1)")  # fmt: skip
    add("--top-k", type=int, default=0, help="keep the k likeliest tokens (default 0, all, as LlamaGen's evaluation)")
    add("--top-p", type=float, default=1.0, help="keep the likeliest tokens of this total mass (default 1, all)")
    add("--best-of", type=int, default=1, metavar="N", help="evaluate the best of N candidates per picture, by the "
        "weighted sum of --rewards (default 1)")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of sampling; the renders have another (default 0)")
    add("--batch-size", type=int, default=64, help="images generated at once; bounds memory (default 64)")
    add("--out", type=Path, help="FOLDER/NAME of the .md and .json (default: evaluation, -2, ... beside the first "
        "--ckpt, else in out)")  # fmt: skip
    add("--npz", type=Path, metavar="FOLDER", help="folder that gets each column's pictures as an npz in ADM's form, "
        "larger ones resized to 256 px (default: none)")  # fmt: skip
    add = parser.add_argument_group("judging").add_argument
    add("--reference", metavar="PATH", help="ADM's protocol: npz of reference pictures arr_0, with mu, sigma, mu_s and "
        "sigma_s if they are of more pictures; a path or hf:OWNER/REPO/FILE, with #SHA256 to be checked")  # fmt: skip
    add("--inception", metavar="PATH", help="torch-fidelity's Inception weights, likewise (default: its own download)")
    add("--rewards", help="judges to report, and their weights in the sum that --best-of goes by (default: "
        "clip=1,realism=0.25 for the toys, else clip; --samples: none)")  # fmt: skip
    add_judge_flags(add)
    return resolve(parser.parse_args(argv))


def resolve(args):
    """Checks the flags and fills in what depends on others. Raises Mistake, OSError."""
    args.flags = list(vars(args))  # what decides the figures: see settings_of
    zoo.setup_device(args)
    zoo.check_range(args, num=1, batch_size=1, cfg_scale=1, temperature=0, top_k=0, seed=0, best_of=1)
    if not 0 < args.top_p <= 1:  # also refuses NaN
        raise Mistake(f"--top-p must be above 0 and at most 1, not {args.top_p}")
    if args.samples and args.best_of > 1:
        raise Mistake("--best-of draws pictures, and --samples are drawn already: leave one out")
    if args.samples and args.ckpt:
        raise Mistake("--samples are scored in a model's place, so --ckpt has no say: leave one out")
    args.model, _, header = zoo.find_policy(args.ckpt[0] if args.ckpt else None, args.model, args.task)
    args.task, args.policies = zoo.MODELS[args.model].config.task, []
    args.dtype = args.dtype or zoo.quick_dtype(args.model, args.device)
    args.toy = zoo.is_toy(args.model) and not args.samples
    if not args.samples:
        _, args.base, base_header = zoo.find_policy(zoo.base_of(args.model, header, args.base), args.model)
        base_pad = base_header["text_pad"]
        # --text-pad is what --ckpt was trained with; of the base only where it is evaluated alone
        args.policies = [("base", args.base, base_pad if args.ckpt else args.text_pad or base_pad)]
        args.cfg_scale = args.cfg_scale or [1.0, header["cfg_scale"] if header["cfg_scale"] > 1 else 2.0]
        args.temperature = header["temperature"] if args.temperature is None else args.temperature
    for k, ckpt in enumerate(args.ckpt, 1):
        _, path, own_header = zoo.find_policy(ckpt, args.model)
        zoo.base_of(args.model, own_header, args.base)  # all of them must have begun from this base
        zoo.check_tokenizer(args.model, own_header, args.vq_ckpt)
        name = f"tuned {k}" if len(args.ckpt) > 1 else "tuned"
        args.policies.append((name, path, args.text_pad or own_header["text_pad"]))
    args.tuned = [path for _, path, _ in args.policies[1:]]
    args.rewards = args.rewards or ("" if args.samples else BEST_BY.get(args.model, "clip"))
    args.judge_weights = parse_rewards(args.rewards) if args.rewards else {}
    args.judge_options = judge_options(args, args.model)
    args.items = []
    args.prompts = [] if args.samples else prompts_of(args)
    # beside a policy of ours, but not in weights/ or in the hub's cache
    folder = args.tuned[0].parent if args.tuned and header["step"] else Path("out")
    args.folder = folder if args.out is None else args.out if args.out.is_dir() else None
    args.out = args.out.with_suffix("") if args.out and args.out.suffix in (".md", ".json") else args.out
    if args.folder is None and not args.out.name:
        raise Mistake(f"--out {args.out}: FOLDER/NAME is needed, for NAME.md and NAME.json")
    zoo.make_folder(args.folder or args.out.parent)
    if args.npz:
        zoo.make_folder(args.npz)
    return args


def prompts_of(args):
    """A label or caption per picture; sets args.items for a benchmark. Raises Mistake, OSError."""
    if args.geneval or args.dpg:
        if args.num:
            raise Mistake("--num: a benchmark has four pictures for each of its prompts; leave it out")
        prompts, args.items = read_benchmark(args)
        return [prompt for prompt in read_prompts(args.model, None, prompts) for _ in range(4)]
    num = args.num or 1024
    if args.classes or args.prompts or (args.task == "t2i" and not args.toy):
        pool = read_prompts(args.model, args.classes, args.prompts)
        return [pool[k % len(pool)] for k in range(num)]
    return fixed_prompts(args.model, num)


# Where files lie, or how fast it goes. What the files hold stands in `sha256`.
NO_MATTER = ("base", "vq_ckpt", "text_encoder", "tuned", "samples", "reference", "inception", "judge_files",
             "qwen_server", "judge_batch", "judge_timeout", "batch_size", "compile", "npz")  # fmt: skip


def settings_of(args):
    """
    What decides the figures, for the table and the JSON: every flag, and the sha256 of files and prompts. Sets
    args.reference_path and args.inception_path. Raises Mistake, OSError.
    """
    hashes = {which: zoo.content_hash(zoo.find_file(path)) for which, path, _ in args.policies}
    hashes["samples"] = [zoo.content_hash(zoo.find_file(path, "--samples")) for path in args.samples]
    if not args.samples:
        hashes |= zoo.content_of(args.model, args.base, args.vq_ckpt, args.text_encoder)
    hashes["prompts"] = hashlib.sha256(json.dumps(args.prompts).encode()).hexdigest()
    args.reference_path = args.inception_path = None
    if args.reference:
        args.reference_path, hashes["reference"] = checked_file(args.reference, "--reference")
    if args.reference or args.inception:
        args.inception_path, hashes["inception"] = inception_file(args.inception)
    flags = {name: getattr(args, name) for name in args.flags if name not in ("out", "ckpt", "prompts")}
    flags["device"] = args.device.partition(":")[0]  # each process of torchrun has a GPU of its own
    flags["num"] = args.num if args.samples else len(args.prompts)
    flags |= dict(tuned=args.tuned, pad=[pad for *_, pad in args.policies], sha256=hashes)
    if args.samples:
        unused = "model", "cfg_scale", "temperature", "top_k", "top_p", "seed", "dtype", "best_of"
        flags |= dict.fromkeys(unused)
    return json.loads(json.dumps(flags, default=str))


def open_work(args, settings):
    """
    Sets args.out, args.pictures and args.work, the folder of what is drawn so far. It is named after what decides the
    figures, so only the same command finds it again. A finished table is never written over, because it may have taken
    hours, except where --out names it.
    """
    if args.folder:
        numbered = (args.folder / f"evaluation{f'-{k}' if k > 1 else ''}" for k in itertools.count(1))
        args.out = next(out for out in numbered if not out.with_name(out.name + ".json").exists())
    decides = json.dumps({name: value for name, value in settings.items() if name not in NO_MATTER})
    args.work = args.out.with_name(f"{hashlib.sha256(decides.encode()).hexdigest()[:12]}.parts")
    zoo.make_folder(args.work)
    args.pictures = args.out.with_name(args.out.name + "-pictures")


def file_name(name, number=None):
    """A column's name for a file. Names of npz files may become equal, so these are numbered."""
    plain = re.sub(r"[^\w.]+", "-", name)
    return plain if number is None else f"{number}-{plain}"


def run(args):
    settings = settings_of(args)
    open_work(args, settings)
    networks, inception = {}, None
    if args.toy:
        # the toy's own tokenizer, whatever --vq-ckpt is, so that figures of all policies compare
        tokenizer = zoo.load_tokenizer(args.model)
        networks["CLIP"] = partial(clip_image_features, load_clip()[0])
        networks["latents"] = lambda images: tokenizer.latents(images * 2 - 1).flatten(1)
    if args.inception_path:
        inception = load_inception(args.inception_path, args.device)
    judges = load_judges(args.judge_weights, args.device, args.judge_options)
    tools = Tools(networks, inception, judges, args.judge_weights, args.toy)
    columns = {}  # (cfg, name): {metric: Figure or reason}; cfg None: not against the base
    for key, figures in (of_samples if args.samples else of_policies)(args, tools):
        columns[key] = figures
        text = write_results(args, settings, columns)  # each time, because a column of a large model takes hours
    parallel.largest(0)  # waits for all processes
    if parallel.rank() == 0:
        shutil.rmtree(args.work, ignore_errors=True)
    print(f"{text}\n{args.out}.md and .json")


def references_of(args, tools, captions):
    """{features: Reference}: a toy's from fresh renders, Inception's from --reference. Raises Mistake."""
    found = {}
    if args.toy:
        features = score("fresh renders", renders(captions, [args.seed, 1]), captions, args, Tools(tools.networks))
        found = {name: reference_of(values) for name, values in features.items()}
    if args.reference_path:
        pixels = open_pictures(args.reference_path, args.work / "reference.npy")
        features = score("reference", pixels, [""] * len(pixels), args, Tools(inception=tools.inception))
        for name, mean, cov in (("pool", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
            known, width = (
                (array_of(args.reference_path, mean), array_of(args.reference_path, cov)),
                features[name].shape[1],
            )
            if known[0] is not None and [np.shape(x) for x in known] != [(width,), (width, width)]:
                raise Mistake(f"{args.reference_path}: {mean} and {cov} are not a mean and covariance of {width}")
            # those of all of ImageNet's pictures, where the file holds 10,000
            found[name] = reference_of(features[name], known if known[0] is not None else None)
    return found


def of_policies(args, tools):
    """((cfg, column), figures) of each policy at each guidance scale, and of a toy's round trips."""
    for _, path, _ in args.policies:
        zoo.read_weights(zoo.find_file(path))  # a damaged file shows now, and not after the columns before it
    captions = captions_of(args.model, args.prompts)
    references = references_of(args, tools, captions)
    tokenizer = zoo.load_tokenizer(args.model, args.vq_ckpt, args.device)
    encode = load_encoder(args.model, args.text_encoder, args.device, args.prompts)
    summed = partial(figures_of, references=references, prompts=args.prompts, captions=captions, task=args.task)
    numbers = itertools.count(1)
    for which, path, pad in args.policies:
        model = zoo.load_model(args.model, path, args.device, args.compile)
        for cfg in args.cfg_scale:
            name = f"{which}, cfg {cfg:g}" + (f", best of {args.best_of}" if args.best_of > 1 else "")
            column = next(numbers), name, args, model, tokenizer, partial(encode, pad=pad), cfg, tools.judges, captions
            pixels, entropy = draw_column(*column)
            if args.npz:
                write_column(args.npz / f"{file_name(name)}.npz", pixels, args.prompts)
            yield (cfg, name), summed(score(name, pixels, captions, args, tools) | dict(entropy=entropy))
        del model, column  # before the next one: two of the large ones may not fit
    if args.toy:
        trips = round_trips(renders(captions, [args.seed, 2]), tokenizer, args.device)
        yield (None, "renders, round trip"), summed(score("renders", trips, captions, args, tools))


def of_samples(args, tools):
    """((1, file), figures) of each npz of --samples. Raises Mistake."""
    config, opened = zoo.MODELS[args.model].config, []
    for number, path in enumerate(args.samples, 1):  # all of them now, not the last one after hours
        pixels = open_pictures(path, args.work / f"{number}.npy")
        labels = labels_of(path, len(pixels))
        if tools.judges and labels is None:
            raise Mistake(f"{path} holds neither labels nor prompts, so no judge can be asked: leave out --rewards")
        if tools.judges and not fit(labels, config):
            wanted = "prompts" if config.task == "t2i" else f"labels from 0 to {config.num_classes - 1}"
            raise Mistake(f"{path} holds no {wanted}, as {args.model} has: say with --model whose they are, or leave "
                          "out --rewards")  # fmt: skip
        opened.append((number, path, pixels, labels))
    references, stems = references_of(args, tools, None), [path.stem for path in args.samples]
    for number, path, pixels, labels in opened:
        name = path.stem if stems.count(path.stem) == 1 else str(path)
        count = min(args.num or len(pixels), len(pixels))
        pixels = pixels[:count]
        # unlabelled: no two are known to be of one class
        prompts = np.arange(count) if labels is None else labels[:count]
        captions = captions_of(args.model, prompts.tolist()) if tools.judges else [""] * count
        if args.npz:
            write_column(args.npz / f"{file_name(name, number)}.npz", pixels, prompts)
        found = score(name, pixels, captions, args, tools)
        yield (1, name), figures_of(found, references, prompts, captions, args.task)


def fit(prompts, config):
    """Whether an array holds prompts for a model of this configuration: strings (t2i), or numbers of its classes."""
    if config.task == "t2i":
        return prompts.dtype.kind == "U"
    return prompts.dtype.kind in "iu" and prompts.min() >= 0 and prompts.max() < config.num_classes


def main(argv=None):
    zoo.run_script(parse_args, run, argv)


if __name__ == "__main__":
    main()
