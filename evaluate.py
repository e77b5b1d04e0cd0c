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

    right         share of pictures that the verifier accepts (data.py), in all and by shape (c2i) or category (t2i)
    rewards       mean score of each judge
    entropy       nats per token, of the conditional model on its own samples: how undecided the policy still is
    Frechet, precision, recall, distance in class: see metrics.py

For a toy the last line is given twice: in features of the toy CLIP, which is also a judge, and in the latents of the
tokenizer's encoder, which no reward sees. References are fresh renders; these figures compare with each other and with
nothing else. The last column is renders that went through the tokenizer and back: what a perfect transformer would
reach. With --reference they are taken in Inception's features as ADM does (arXiv 2105.05233), with sFID and Inception
score: FID and sFID against the file's statistics, the rest against its pictures.

Base and tuned draw from the same random numbers, so their difference is computed per picture and has its own standard
error.

Everything that is scored is a column: a folder of shards, npz files of 256 pictures with their prompts, or one npz of
somebody else's, which is streamed. A column's folder is named after what decides its pictures, and a shard that exists
is done, so an interrupted evaluation continues when the same command is given again. Under torchrun all processes draw
and score; the first one writes a Markdown table, which is printed too, and JSON.

Shapes: n pictures, T image tokens.
"""

if __name__ == "__main__":  # before torch, whose OpenMP reads it while it loads; see train.py
    import os

    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import hashlib
import json
import math
import re
import shutil
import textwrap
import time
import zipfile
from contextlib import suppress
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
from grpo import Rollout, entropy_of, log_policy
from metrics import as_cells, as_table, compare, feature_figures, mean_of, reference_of
from prompts import captions_of, fixed_prompts, load_encoder, read_prompts
from rewards import (
    clip_image_features,
    judge_images,
    judge_options,
    load_clip,
    load_judges,
    parse_rewards,
    weighted_sum,
)
from sample import add_sampling_flags, check_sampling, draw_best
from tokenizer import to_uint8
from zoo import Mistake

# ---------------------------------------------------------------------------------------------------------------
# The Inception network

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's copy
INCEPTION_HASH = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIDE = 256  # px: LlamaGen's table has its pictures of 384 px resized to this


def checked_file(where, flag, expected=None):
    """(path, sha256) of `where`, which #SHA256 may follow. Raises Mistake if it is another than that or `expected`."""
    said = re.fullmatch(r"(.+)#([0-9a-f]{64})", str(where))
    path = zoo.find_file(said[1] if said else where, flag)
    found, wanted = zoo.file_hash(path), said[2] if said else expected
    if wanted and found != wanted:
        raise Mistake(
            f"{flag} {where}: its sha256 is {found}, not {wanted}; to use this very file, give {path}#{found}"
        )
    return path, found


def load_inception(where=None, device="cpu"):
    """TensorFlow's Inception of 2015, from `where` or torch-fidelity's own download. Raises Mistake."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = checked_file(where, "--inception", INCEPTION_HASH)[0] if where else None
    with zoo.reading(path or INCEPTION, "give it, in torch-fidelity's form, with --inception"), zoo.tensors_only():
        network = FeatureExtractorInceptionV3("adm", ["2048", "logits_unbiased"], path)
    if not where:
        checked_file(Path(torch.hub.get_dir(), "checkpoints", INCEPTION), "--inception", INCEPTION_HASH)
    return network.to(device)


@torch.no_grad()
def inception_features(pixels, prompts, network):
    """
    Of pictures (n, 3, H, W), uint8: pool (n, 2048); logits (n, 1008) without bias; spatial (n, 2023), the first 7
    channels of Mixed_6d's first branch, 17 x 17 each, channels last as in TensorFlow. On the CPU.
    """
    seen = []
    hook = network.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, output: seen.append(output[:, :7]))
    pool, logits = network(shrunk(pixels).to(network.fc.weight.device))
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
# Columns: what is scored, and what decides its pictures


class Column(NamedTuple):
    """Pictures with one place in the table."""

    name: str
    file: str  # a name for files, another one for everything that makes other pictures
    record: dict  # what the column is, and all that decides its pictures
    shards: partial  # yields its pictures, SHARD at a time
    weights: Path = None  # that draw them


def columns_of(args):
    """The columns of --samples, or of policies and a toy's round trips. Raises Mistake, OSError."""
    columns = []
    for path in args.samples:  # all are looked at now, not the last one after hours
        prompts = labels_of(path, args)[: args.num]
        name = path.stem if [other.stem for other in args.samples].count(path.stem) == 1 else str(path)
        record = dict(role=name, name=name, policy=zoo.file_hash(path), cfg=None, num=len(prompts))
        columns.append(Column(name, file_name(name, record), record, partial(read_npz, path, prompts)))
    for path, policy in args.policies:
        zoo.read_weights(path)  # a damaged file shows now, and not after the columns before it
        record = policy | record_of(args, path)
        for cfg in args.cfg_scale:
            record = record | dict(cfg=cfg)
            name = f"{policy['role']}, cfg {cfg:g}" + (f", best of {args.best_of}" if args.best_of > 1 else "")
            file = file_name(name, record)
            columns.append(Column(name, file, record, partial(read_folder, args.work / file, record["num"]), path))
    if args.toy:
        tokenizer = zoo.load_tokenizer(args.model, args.vq_ckpt, args.device)
        record = dict(role="renders", name="renders", policy=None, cfg=None, num=len(args.prompts))
        columns.append(Column("renders, round trip", "renders", record, partial(renders, args, 2, tokenizer)))
    return columns


def record_of(args, path):
    """{what: value or sha256} of what decides the pictures of the policy at `path`, but for guidance and padding."""
    flags = "task", "model", "dtype", "seed", "temperature", "top_k", "top_p", "best_of", "rewards", "judge_options"
    record = {flag: getattr(args, flag) for flag in flags}
    record["content"] = zoo.content_of(args.model, path, args.vq_ckpt, args.text_encoder)
    record["policy"] = record["content"].pop("base")
    record["num"] = len(args.prompts)
    record["prompts"] = hash_of(args.prompts)
    record["device"] = args.device.partition(":")[0]  # each process of torchrun has a GPU of its own
    return record


def hash_of(what):
    """Hexadecimal digits for anything that JSON can hold."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def file_name(name, record):
    """A column's name for files."""
    return re.sub(r"[^\w.]+", "-", name) + "-" + hash_of(record)


# ---------------------------------------------------------------------------------------------------------------
# Shards: {arr_0: pixels (n, H, W, 3) uint8, as ADM calls them; prompts: labels or captions (n,)}; in the folder of a
# policy also tokens (n, T), and entropy (n,) in nats

SHARD = 256  # pictures: neither --batch-size nor the number of processes moves the limits of a shard


def draw_column(args, column, judges, tokenizer, encode):
    """Draws the shards that a policy's folder lacks. All processes draw a shard together."""
    model = zoo.load_model(args.model, column.weights, args.device, args.compile)
    encode = partial(encode, pad=column.record["text_pad"])
    zoo.make_folder(args.work / column.file)
    options = dict(cfg_scale=column.record["cfg"], temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    options |= dict(batch_size=args.batch_size, dtype=args.dtype, progress=True)
    starts = range(0, len(args.prompts), SHARD)
    for start in tqdm(starts, desc=column.name, unit="shard", disable=parallel.rank() > 0):
        path, prompts = args.work / column.file / f"{start:06d}.npz", args.prompts[start : start + SHARD]
        if parallel.largest(int(path.exists())):  # the same answer in all processes
            continue
        captions = captions_of(args.model, prompts)
        images, tokens = draw_best(
            args.best_of, judges, args.rewards, captions, model, tokenizer, encode, prompts, args.seed, start, **options
        )
        shard = dict(
            arr_0=as_pixels(images * 2 - 1),
            prompts=np.array(prompts),
            tokens=tokens.numpy(),
            entropy=entropies(model, encode, prompts, tokens, args.dtype),
        )
        zoo.write_whole(path, partial(np.savez, **shard))
    parallel.largest(0)  # waits for the first process, which writes


@torch.no_grad()
def entropies(model, encode, prompts, tokens, dtype):
    """Entropy of the conditional model, nats per token, over its own samples tokens (n, T): the mean of each, (n,)."""
    found, device = [], model.output.weight.device
    for rows in torch.tensor(parallel.share(len(prompts))).split(8):  # (8, T, V): 0.3 GB for LlamaGen at 384 px
        rollout = Rollout(*encode([prompts[k] for k in rows]), tokens[rows].to(device), None)
        with zoo.autocast(device, dtype):
            found.append(entropy_of(log_policy(model, rollout)).mean(1).cpu().double())
    return parallel.gather(torch.cat(found), len(prompts)).numpy()


def read_folder(folder, n):
    """Yields the shards of a policy's n pictures. Raises Mistake."""
    for start in range(0, n, SHARD):
        path = folder / f"{start:06d}.npz"
        with zoo.reading(path, "delete it if it is there, and give the same command again"), np.load(path) as shard:
            yield dict(shard)


@torch.no_grad()
def renders(args, seed, tokenizer=None):
    """Yields shards of renders of the prompts, from (--seed, seed, a number); with a tokenizer, through it and back."""
    for start in range(0, len(args.prompts), SHARD):
        prompts = args.prompts[start : start + SHARD]
        captions = enumerate(captions_of(args.model, prompts), start)
        images = [data.render([caption], np.random.default_rng([args.seed, seed, k])) for k, caption in captions]
        pixels = as_pixels(torch.from_numpy(np.concatenate(images)) * 2 - 1)
        if tokenizer:
            images = (as_tensor(pixels) / 255 * 2 - 1).to(args.device).split(64)
            pixels = as_pixels(torch.cat([tokenizer.decode(tokenizer.encode(part)) for part in images]))
        yield dict(arr_0=pixels, prompts=np.array(prompts))


def as_pixels(images):
    """Images (n, 3, H, W) in [-1, 1] -> (n, H, W, 3) uint8, an array."""
    return to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()


def as_tensor(pixels):
    """Pixels (n, H, W, 3) uint8, an array -> (n, 3, H, W)."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


NPZ = "an npz with pictures arr_0, uint8 (n, H, H, 3), is needed"


def open_pictures(npz):
    """The array arr_0 of an open npz as a stream of bytes, and its shape (n, H, H, 3). Raises Mistake."""
    stream = npz.zip.open("arr_0.npy")
    np.lib.format.read_magic(stream)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)  # version 2 is for headers beyond 64 kB
    if dtype != np.uint8 or fortran or shape[1:] != (shape[1], shape[1], 3) or 0 in shape:
        raise Mistake(f"{npz.zip.filename}: arr_0 is {dtype} {shape}; {NPZ}")
    return stream, shape


def read_npz(path, prompts=None):
    """Yields the pictures of somebody's npz as shards, the first n with prompts (n,), else all. Raises Mistake."""
    with zoo.reading(path, NPZ), np.load(path) as npz:
        stream, (n, *size) = open_pictures(npz)
        prompts = np.arange(n) if prompts is None else prompts
        for start in range(0, len(prompts), SHARD):
            part = prompts[start : start + SHARD]
            pixels = np.frombuffer(bytearray(stream.read(len(part) * math.prod(size))), np.uint8)  # writable
            yield dict(arr_0=pixels.reshape(-1, *size), prompts=part)


def labels_of(path, args):
    """
    The labels or prompts (n,) beside the pictures of an npz; without any, n numbers, because no two pictures are known
    to be of one class. Raises Mistake.
    """
    with zoo.reading(path, NPZ), np.load(path) as npz:
        n = open_pictures(npz)[1][0]
        labels = next((npz[key] for key in ("labels", "prompts", "arr_1") if key in npz), None)  # ours, ours, ADM's
    config = zoo.MODELS[args.model].config
    fit = labels is not None and labels.dtype.kind in ("U" if config.task == "t2i" else "iu")
    if fit and config.task == "c2i":
        fit = labels.min() >= 0 and labels.max() < config.num_classes
    if args.rewards and not fit:
        raise Mistake(f"{path} holds no labels or prompts of {args.model}: say whose with --model, or omit --rewards")
    if labels is None:
        return np.arange(n)
    if labels.shape != (n,):
        raise Mistake(f"{path}: its labels are {labels.shape}; {n} pictures need {n} labels, of shape ({n},)")
    return labels


def join(column, path):
    """Writes a column as one npz in ADM's form, unpacked, at most 256 px wide, with its labels or prompts."""
    n, side, prompts = column.record["num"], min(SIDE, next(column.shards())["arr_0"].shape[1]), []
    header = dict(descr="|u1", fortran_order=False, shape=(n, side, side, 3))
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for shard in column.shards():
                file.write(shrunk(as_tensor(shard["arr_0"])).permute(0, 2, 3, 1).numpy().tobytes())
                prompts.append(shard["prompts"])
        prompts = np.concatenate(prompts)
        key = "labels" if prompts.dtype.kind == "i" else "prompts"
        with archive.open(f"{key}.npy", "w") as file:
            np.lib.format.write_array(file, prompts)


# ---------------------------------------------------------------------------------------------------------------
# Scoring


@torch.no_grad()
def score(name, shards, looks, args):
    """
    {quantity: array (n, ...)}: what each of `looks`, functions look(pixels, prompts), says about pictures, and their
    prompts and entropy. Of several processes each scores its share.
    """
    found, size = {}, args.batch_size * parallel.world()
    for shard in tqdm(shards, desc=f"{name}: scores", unit="shard", leave=False, disable=parallel.rank() > 0):
        for start in range(0, len(shard["arr_0"]), size):
            n = min(size, len(shard["arr_0"]) - start)
            rows = [start + k for k in parallel.share(n)]
            pixels = as_tensor(shard["arr_0"][rows])
            for look in looks:
                for quantity, values in look(pixels, shard["prompts"][rows].tolist()).items():
                    found.setdefault(quantity, []).append(parallel.gather(values, n).numpy())
        for quantity in {"prompts", "entropy"} & shard.keys():
            found.setdefault(quantity, []).append(shard[quantity])
    return {quantity: np.concatenate(parts) for quantity, parts in found.items()}


def toy_features(pixels, prompts, clip, tokenizer):
    """Features of the toy's pictures."""
    images = pixels / 255
    return {"CLIP": clip_image_features(clip, images), "latents": tokenizer.latents(images * 2 - 1).flatten(1)}


def verify(pixels, prompts, model):
    """Whether the toy's pictures are right."""
    right = [data.satisfies(*pair) for pair in zip(pixels / 255, captions_of(model, prompts), strict=True)]
    return {"right": torch.tensor(right, dtype=torch.float64)}


def ask_judges(pixels, prompts, judges, args):
    """What the judges say, and their weighted sum."""
    scores, _ = judge_images(judges, (pixels / 255).to(args.device), captions_of(args.model, prompts))
    scores = {judge: values.cpu().double() for judge, values in scores.items()}
    found = {}
    for judge, values in scores.items():
        label = f"{judge} (held out)" if args.rewards[judge] == 0 else judge
        found[f"reward: {label}"] = values
    if len(scores) > 1:
        found["reward: weighted sum"] = weighted_sum(scores, args.rewards)
    return found


def adm_references(args, look):
    """{features: Reference} of --reference. Raises Mistake."""
    (path, digest), references = checked_file(args.reference, "--reference"), {}
    args.reference = f"{path}#{digest}"  # as the table says it
    found = score("reference", read_npz(path), [look], args)
    for name, mean, cov in (("pool", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
        # those of all of ImageNet's pictures, where the file holds 10,000
        with zoo.reading(path, NPZ), np.load(path) as npz:
            known = [npz[key] for key in (mean, cov) if key in npz]
        references[name] = reference_of(found[name], known)
    return references


# ---------------------------------------------------------------------------------------------------------------
# Figures, and the table of them. A text in the place of a figure says why there is none.


def right_figures(right, captions, task):
    """
    {"right: all": Figure, and by shape (c2i) or category (t2i)} of right (n,), 1 where the verifier accepts a picture.
    For t2i "all" is the mean over categories, as in GenEval.
    """
    kinds = np.array([data.kind_of(caption, task) for caption in captions])
    order = data.SHAPES if task == "c2i" else data.CATEGORIES
    figures = {"right: all": mean_of(right, kinds if task == "t2i" else None)}
    return figures | {f"right: {kind}": mean_of(right[kinds == kind]) for kind in order if kind in kinds}


def figures_of(found, references, model):
    """{name of metric: figure or reason} of what `score` has found."""
    figures = {}
    if "right" in found:
        captions = captions_of(model, found["prompts"].tolist())
        figures = right_figures(found["right"], captions, zoo.MODELS[model].config.task)
    figures |= feature_figures(found, references)
    for name, values in found.items():
        if name.startswith("reward: "):
            missing = ~np.isfinite(values)
            figures |= {} if missing.all() else {name: mean_of(values)}
            figures |= {name.replace("reward", "missing"): mean_of(missing.astype(float))} if missing.any() else {}
    return figures | ({"entropy": mean_of(found["entropy"])} if "entropy" in found else {})


def tables_of(columns, figures, paired):
    """
    (values, changes, tables) of {column: {metric: Figure or reason}}. values, and changes from the first column of the
    same cfg: {column: {metric: (value, standard error)}}. A table in Markdown for each cfg.
    """
    values, changes, tables = {name: compare([found]) for name, found in figures.items()}, {}, []
    last = {column.name: as_cells(values[column.name]) for column in columns if column.record["role"] == "renders"}
    for cfg in dict.fromkeys(column.record["cfg"] for column in columns if column.name not in last):
        base, *others = [c for c in columns if c.record["cfg"] == cfg and c.name not in last]
        shown = {column.name: (column.record["role"], [column]) for column in others}
        if len(others) > 1 and paired:  # policies, not files of others: their mean stands for them
            role = f"mean of {len(others)}"
            shown = {f"{role}, cfg {cfg:g}": (role, others)}
        cells, differences = {base.name: as_cells(values[base.name])}, {}
        for name, (role, own) in shown.items():
            found = [figures[column.name] for column in own]
            values[name] = compare(found)
            changes[name] = compare(found, figures[base.name], paired)
            cells[name] = as_cells(values[name])
            differences[f"{role} minus {base.record['role']}"] = as_cells(changes[name], "+")
        tables.append(as_table(cells | differences | last))
        last = {}
    return values, changes, tables


def write_results(args, columns, figures):
    """Writes NAME.md: settings, tables and why a figure is missing, and NAME.json. Returns the text."""
    values, changes, tables = tables_of(columns, figures, paired=not args.samples)
    facts = {flag: getattr(args, flag) for flag in args.flags}
    facts["tuned"] = [path for path, policy in args.policies[1:]]
    numbers = {column.record["num"] for column in columns}
    facts["num"] = numbers.pop() if len(numbers) == 1 else sorted(numbers)  # of pictures that were scored
    said = []
    for flag, value in facts.items():
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        said += [f"{flag} {text}"] if text not in ("None", "") else []
    parts = [textwrap.fill(", ".join(said), 120, break_long_words=False, break_on_hyphens=False), *tables]
    if changes:
        paired = "not paired" if args.samples else "paired by picture"
        parts.append(f"Behind ± stand standard errors; differences are {paired}.")
    for found in figures.values():
        missing = [f"No {metric}: {why}." for metric, why in found.items() if isinstance(why, str)]
        parts += [line for line in missing if line not in parts]
    facts["time"] = time.time()
    facts["records"] = {column.name: column.record for column in columns}
    facts |= dict(columns={}, standard_errors={}, differences=changes)
    for name, found in values.items():
        facts["columns"][name] = {metric: value for metric, (value, _) in found.items()}
        facts["standard_errors"][name] = {metric: error for metric, (_, error) in found.items()}
    text, facts = "\n\n".join(parts), json.dumps(facts, indent=1, default=str)
    for suffix, content in ((".json", facts), (".md", text)):
        path = args.out.with_name(args.out.name + suffix)
        zoo.write_whole(path, partial(Path.write_text, data=f"{content}\n", encoding="utf-8"))
    return text


# ---------------------------------------------------------------------------------------------------------------
# The command line


def parse_args(argv=None):
    parser = zoo.script_parser(__doc__)
    add = parser.add_argument_group("what is evaluated").add_argument
    zoo.add_model_flags(add)
    add("--ckpt", nargs="+", type=zoo.user_path, metavar="PATH", default=[], help="weights, or folders that train.py "
        "wrote, from one base (default: only the base)")  # fmt: skip
    add("--base", type=zoo.user_path, metavar="PATH", help="weights of the base (default: those that the first --ckpt "
        "began from)")  # fmt: skip
    only = parser.add_mutually_exclusive_group().add_argument
    only("--classes", nargs="+", metavar="CLASS", help="c2i: only these, names or numbers, in turn (default: all)")
    only("--prompts", nargs="+", metavar="TEXT", help="t2i: captions or files of them, in turn (the toy has its own)")
    only("--samples", nargs="+", type=zoo.user_path, default=[], metavar="FILE", help="npz files whose pictures are "
         "scored in a model's place")  # fmt: skip
    add("--num", type=int, help="pictures for each column (default 1024: standard error 1.5 points; --samples: all)")
    add("--cfg-scale", type=float, nargs="+", help="guidance to sample with (default: 1 and what the first --ckpt was "
        "trained with, or 2 if that is 1)")  # fmt: skip
    add("--top-k", type=int, default=0, help="keep the k likeliest tokens (default 0, all, as LlamaGen's evaluation)")
    add_sampling_flags(add)
    add("--out", type=zoo.user_path, help="FOLDER/NAME of the .md and .json (default: evaluation, -2, ... beside the "
        "first --ckpt, else in out)")  # fmt: skip
    add("--npz", type=zoo.user_path, metavar="FOLDER", help="gets each column's pictures as an npz in ADM's form")
    add = parser.add_argument_group("ADM's protocol").add_argument
    add("--reference", type=zoo.user_path, metavar="PATH", help="npz of reference pictures, as ADM's; a path or "
        "hf:OWNER/REPO/FILE, with #SHA256 to be checked")  # fmt: skip
    add("--inception", type=zoo.user_path, metavar="PATH", help="torch-fidelity's weights (default: its own download)")
    return resolve(parser.parse_args(argv))


def resolve(args):
    """Checks the flags and fills in what depends on others. Raises Mistake, OSError."""
    args.flags = [flag for flag in vars(args) if flag not in ("out", "ckpt", "prompts")]  # for the table
    zoo.setup_device(args)
    check_sampling(args)
    if args.samples and (args.ckpt or args.best_of > 1):
        raise Mistake("--samples are drawn already, so --ckpt and --best-of have no say: leave them out")
    args.model, _, header = zoo.find_policy(args.ckpt[0] if args.ckpt else None, args.model, args.task)
    row = zoo.MODELS[args.model]
    args.task = row.config.task
    args.dtype = args.dtype or zoo.quick_dtype(args.model, args.device)
    args.toy = zoo.is_toy(args.model) and not args.samples
    args.rewards = args.rewards or ("" if args.samples else row.best_by)
    args.rewards = parse_rewards(args.rewards) if args.rewards else {}
    args.judge_options = judge_options(args, args.model)
    args.policies = []
    if not args.samples:
        args.cfg_scale = args.cfg_scale or [1.0, header["cfg_scale"] if header["cfg_scale"] > 1 else 2.0]
        args.temperature = header["temperature"] if args.temperature is None else args.temperature
        args.policies = policies_of(args, header)
        args.prompts = prompts_of(args)
    name_files(args, header)
    if args.npz:
        zoo.make_folder(args.npz)
    return args


def name_files(args, header):
    """Sets args.out, and args.work for shards. In a folder no table is written over: others are evaluation-2, ..."""
    if args.out and not args.out.is_dir():
        args.out = args.out.with_suffix("") if args.out.suffix in (".md", ".json") else args.out
    else:
        ours = args.ckpt and header["step"]  # a folder of ours, not of the hub's cache
        folder = args.out or (args.policies[1][0].parent if ours else Path("out"))
        args.out = folder / "evaluation"
        number = 1
        while args.out.with_suffix(".json").exists():
            number += 1
            args.out = folder / f"evaluation-{number}"
    args.work = args.out.with_name(f"{args.out.name}.parts")
    zoo.make_folder(args.out.parent)


def policies_of(args, header):
    """[(path, record)] of the base and of --ckpt, of which the first has this header. Raises Mistake, OSError."""
    args.base = zoo.base_of(args.model, header, args.base)
    policies = []
    for k, ckpt in enumerate([args.base, *args.ckpt]):
        _, path, own = zoo.find_policy(ckpt, args.model)
        # --text-pad is what --ckpt was trained with; of the base only where it is evaluated alone
        pad = own["text_pad"] if args.ckpt and k == 0 else args.text_pad or own["text_pad"]
        role = "base" if k == 0 else f"tuned {k}" if len(args.ckpt) > 1 else "tuned"
        if k > 0:
            zoo.base_of(args.model, own, args.base)  # all of them must have begun from this base
            zoo.check_tokenizer(args.model, own, args.vq_ckpt)
        name = path.parent.name if path.stem == "policy" else path.stem
        policies.append((path, dict(role=role, name=name, steps=own["step"], text_pad=pad)))
    return policies


def prompts_of(args):
    """A label or caption per picture. Raises Mistake, OSError."""
    num = args.num or 1024
    pool = fixed_prompts(args.model, num)
    if args.classes or args.prompts or (args.task == "t2i" and not args.toy):
        pool = read_prompts(args.model, args.classes, args.prompts)
    return [pool[k % len(pool)] for k in range(num)]


def run(args):
    judges = load_judges(args.rewards, args.device, args.judge_options)
    columns, looks, references = columns_of(args), [], {}
    # 1. what looks at pictures, and at references
    if args.toy:
        # the toy's own tokenizer, whatever --vq-ckpt is, so that figures of all policies compare
        look = partial(toy_features, clip=load_clip()[0], tokenizer=zoo.load_tokenizer(args.model))
        found = score("fresh renders", renders(args, 1), [look], args)
        references |= {name: reference_of(found[name]) for name in ("CLIP", "latents")}
        looks += [partial(verify, model=args.model), look]
    if args.reference or args.inception:
        look = partial(inception_features, network=load_inception(args.inception, args.device))
        references |= adm_references(args, look) if args.reference else {}
        looks.append(look)
    if judges:
        looks.append(partial(ask_judges, judges=judges, args=args))
    # 2. draw what is not there yet, and score
    if args.policies:
        tokenizer = zoo.load_tokenizer(args.model, args.vq_ckpt, args.device)
        encode = load_encoder(args.model, args.text_encoder, args.device, args.prompts)
    for column in columns:
        if column.weights:
            draw_column(args, column, judges, tokenizer, encode)
    figures = {}
    for column in columns:
        found = score(column.name, column.shards(), looks, args)
        figures[column.name] = figures_of(found, references, args.model)
    # 3. write
    for column in columns:
        if args.npz:
            zoo.write_whole(args.npz / f"{column.file}.npz", partial(join, column))
    text = write_results(args, columns, figures)
    parallel.largest(0)  # waits for all processes
    if parallel.rank() == 0:
        for column in columns:
            shutil.rmtree(args.work / column.file, ignore_errors=True)
        with suppress(OSError):  # another evaluation, which was interrupted, may have its columns there
            args.work.rmdir()
    parallel.say(f"{text}\n\n{args.out}.md and .json")


def main(argv=None):
    zoo.run_script(parse_args, run, argv)


if __name__ == "__main__":
    main()
