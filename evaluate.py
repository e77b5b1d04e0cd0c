"""
How good is a policy, next to the base it came from? In the toy world, where truth is known; by judges; and by the
field's protocols, so that figures stand beside other people's.

    python evaluate.py --ckpt out/c2i              # base and tuned side by side, at cfg 1 and 2
    python evaluate.py --ckpt out/seed0 out/seed1  # several policies of one model: their mean beside their base
    python evaluate.py --task t2i --num 512        # the base alone
    python evaluate.py --best-of 4                 # the line to beat: the best of four by the judges, without training
    python evaluate.py --ckpt out/llamagen-b-256 --cfg-scale 2 --num 50000 --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate.py --samples theirs.npz --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate.py --ckpt out/llamagen-t2i-xl-256 --prompts drawbench.txt --rewards clip,hps,maniqa
    python evaluate.py --ckpt out/llamagen-t2i-xl-256 --geneval evaluation_metadata.jsonl

    right         share of pictures that the verifier accepts (data.py), in all and by shape (c2i) or category (t2i)
    rewards       mean value of each judge
    entropy       nats per token, of the conditional model on its own samples: how undecided the policy still is
    Frechet, precision, recall, distance in class: see metrics.py

For a toy the last line is given twice: in features of the toy CLIP, which is also a judge, and in the latents of the
tokenizer's encoder, which no reward sees. References are fresh renders; these figures compare with each other and with
nothing else. The last column is renders that went through the tokenizer and back: what a perfect transformer would
reach. With --reference they are taken in Inception's features as ADM does (arXiv 2105.05233), with sFID, Inception
score and KID: FID and sFID against the file's statistics, the rest against its pictures.

Every figure has its standard error. All policies draw the same picture numbers from the same random numbers, so what a
tuned policy differs by is paired, picture by picture, with an error of its own. A figure for which there are too few
pictures is left out, and the table says why.

Pictures stream through in batches. An evaluation that is stopped goes on when the same command is given again, and ends
in the same bytes. Under torchrun all processes draw and judge. The first writes a Markdown table, which is printed too,
and JSON next to the checkpoint.

Shapes: n pictures, m references, E features per picture, T image tokens.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # else Ctrl-C amid the imports below ends in their traceback

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
from data import Mistake
from grpo import token_logprobs
from metrics import as_cells, as_table, compare, feature_figures, mean_of, mean_of_figures, reference_of
from rewards import (
    BEST_BY,
    OPTIONS,
    add_judge_flags,
    clip_image_features,
    judge_images,
    judge_options,
    load_clip,
    load_judges,
    parse_rewards,
)
from sample import draw_best, write_npz
from tokenizer import to_uint8, to_unit

# ---------------------------------------------------------------------------------------------------------------
# Networks and files

# Where torch-fidelity keeps its copy of the Inception network of 2015. The name holds the first digits of the sha256.
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_HASH = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIDE = 256  # px: LlamaGen's table has its pictures of 384 px resized to this


def checked_file(where, flag, expected=None):
    """
    (path, sha256) of `where`: a path or hf:OWNER/REPO/FILE, which #SHA256 may follow. Raises Mistake if the file is
    another than that, or than `expected`.
    """
    where, _, said = str(where).partition("#")
    path = zoo.find_file(where, flag)
    found = zoo.file_hash(path)
    if found != (said or expected or found):
        raise Mistake(f"{flag} {where}: its sha256 is {found}, not {said or expected}: fetch it again, or give "
                      f"{where}#{found} to use this very file")  # fmt: skip
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

    weights = io.BytesIO()  # torch-fidelity unpickles whatever it is given: so it gets tensors that we have read
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
    """Pictures (n, 3, H, W), uint8, on the CPU; larger ones at 256 px, by PIL's bicubic filter."""
    if pixels.shape[-1] <= SIDE:
        return pixels
    small = [Image.fromarray(x.permute(1, 2, 0).numpy()).resize((SIDE, SIDE), Image.BICUBIC) for x in pixels]
    return torch.from_numpy(np.stack([np.asarray(x) for x in small])).permute(0, 3, 1, 2)


class Pictures:
    """
    The pictures arr_0 (n, H, W, 3), uint8, of an npz in ADM's form, whoever wrote it, read batch by batch: a file of
    50,000 takes 10 GB. `asked`: its labels or prompts, or None. Raises Mistake, FileNotFoundError.
    """

    def __init__(self, path):
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such npz file")
        with self.reading():
            self.zip = zipfile.ZipFile(path)
            if "arr_0.npy" not in self.zip.namelist():
                raise Mistake(f"{path} holds no pictures: an array arr_0 is needed, uint8, (n, H, W, 3)")
            self.file = self.zip.open("arr_0.npy")
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            self.shape, by_column, dtype = read[np.lib.format.read_magic(self.file)](self.file)
            self.start = self.file.tell()
            whole = self.start + int(np.prod(self.shape, dtype=object)) * dtype.itemsize
        if dtype != np.uint8 or by_column or len(self.shape) != 4 or self.shape[3] != 3 or 0 in self.shape:
            raise Mistake(f"{path}: arr_0 is {dtype} {self.shape}, not uint8 (n, H, W, 3) row by row")
        if whole != self.zip.getinfo("arr_0.npy").file_size:
            raise Mistake(f"{path}: arr_0 is not whole")
        found = [self.named(name) for name in ("labels", "prompts", "arr_1")]  # ours, ours, ADM's
        self.asked = next((labels for labels in found if labels is not None), None)

    def reading(self):
        return zoo.reading(self.path, "it is not a whole npz file of arrays: fetch it again")

    def __len__(self):
        return self.shape[0]

    def named(self, name):
        """Another array of the file by its name, or None. Raises Mistake."""
        with self.reading(), np.load(self.path, allow_pickle=False) as file:
            return file[name] if name in file.files else None

    def part(self, start, stop):
        """Pictures start .. stop-1, (stop-start, 3, H, W) in [0, 1]: a source of `stream`. Going back is slow."""
        size = int(np.prod(self.shape[1:]))
        with self.reading():
            self.file.seek(self.start + start * size)
            found = np.frombuffer(self.file.read((stop - start) * size), np.uint8).reshape(-1, *self.shape[1:])
        return torch.from_numpy(found.astype(np.float32)).permute(0, 3, 1, 2) / 255, {}


# ---------------------------------------------------------------------------------------------------------------
# The stream: pictures pass through judges and networks in batches; what they say of each stays in a file per batch.


class Tools(NamedTuple):
    """What looks at a picture."""

    networks: dict = {}  # {name: images (n, 3, 64, 64) in [0, 1] -> features (n, E)}, a toy's
    inception: torch.nn.Module = None
    judges: dict = {}  # as load_judges returns them
    weights: dict = {}  # theirs, by name
    verifier: bool = False


def slug(name):
    """The name of a column as a file's: "base-cfg-1"."""
    return re.sub(r"[^\w.]+", "-", name)


def parts_of(name, args):
    """The files of a column's batches, FIRST-STOP.npz, in order."""
    return sorted((args.parts / slug(name)).glob("*[0-9].npz"))


def stream(name, count, args, source, tools, captions, keep=False):
    """
    {quantity: array (count, ...)}: source(start, stop) -> images (stop-start, 3, H, W) in [0, 1] and what it says of
    them, with what `tools` say, batch by batch. `keep`: the pixels stay in the parts. Each batch is written whole, so
    after a stop only the one that was under way is computed again. Of several processes the first gets the result.
    """
    (args.parts / slug(name)).mkdir(exist_ok=True)
    done = parts_of(name, args)
    start = int(done[-1].stem.split("-")[1]) if done else 0
    with tqdm(total=count, initial=start, desc=name, unit="picture", mininterval=1, disable=parallel.rank() > 0) as bar:
        while start < count:
            stop = min(start + args.batch_size * parallel.world(), count)
            images, found = source(start, stop)
            found |= looked_at(images, captions[start:stop], tools, keep, args.device)
            path = args.parts / slug(name) / f"{start:07d}-{stop:07d}.npz"
            zoo.write_whole(path, partial(write_npz, arrays=found))
            bar.update(stop - start)
            start = stop
    whole = {}
    for path in parts_of(name, args) if parallel.rank() == 0 else []:
        first, stop = map(int, path.stem.split("-"))
        with np.load(path) as part:
            for quantity in part.files:
                if quantity == "pixels":  # these are as large as all else together
                    continue
                values = part[quantity]
                whole.setdefault(quantity, np.empty((count, *values.shape[1:]), values.dtype))[first:stop] = values
    return whole


@torch.no_grad()
def looked_at(images, captions, tools, keep=False, device="cpu"):
    """
    What `tools` say of images (n, 3, H, W) in [0, 1]: a dict of arrays (n, ...). `keep`: with the pixels, (n, H, W, 3).
    Of several processes each looks at its share.
    """
    found, n, mine = {}, len(images), parallel.share(len(images))
    images, captions = images[mine], [captions[k] for k in mine]
    if tools.verifier:
        right = [data.satisfies(*pair) for pair in zip(images, captions, strict=True)]
        found["right"] = torch.tensor(right, dtype=torch.float64)
    found |= {name: network(images) for name, network in tools.networks.items()}
    if tools.inception or keep:
        pixels = shrunk(to_uint8(images * 2 - 1))
        found |= inception_features(pixels, tools.inception) if tools.inception else {}
        found |= dict(pixels=pixels.permute(0, 2, 3, 1)) if keep else {}
    judged, _ = judge_images(tools.judges, images.to(device), captions)
    judged = {judge: values.cpu().double() for judge, values in judged.items()}
    found |= {f"reward: {judge}": values for judge, values in judged.items()}
    if len(judged) > 1:
        found["reward: weighted sum"] = sum(tools.weights[judge] * values for judge, values in judged.items())
    return {name: parallel.gather(values, n).numpy() for name, values in found.items()}


@torch.no_grad()
def entropies(model, encode, asked, tokens, dtype="float32"):
    """Entropy of the conditional model, nats per token, over its own samples tokens (n, T): the mean of each, (n,)."""
    mine = parallel.share(len(asked))
    cond, cond_mask = encode([asked[k] for k in mine])
    with zoo.autocast(cond.device, dtype):
        entropy = token_logprobs(model, cond, tokens[mine].to(cond.device), cond_mask)[1]
    return parallel.gather(entropy.mean(1).cpu().double(), len(asked)).numpy()


def drawn(start, stop, args, model, tokenizer, encode, cfg, folder, judges, captions):
    """Pictures start .. stop-1 of one policy and their entropy; --geneval's and --dpg's go to `folder`."""
    asked, options = args.asked[start:stop], dict(batch_size=args.batch_size, dtype=args.dtype)
    sampling = dict(cfg_scale=cfg, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    best = args.best_of, judges, args.judge_weights, captions[start:stop]
    images, tokens = draw_best(*best, model, tokenizer, encode, asked, args.seed, first=start, **options, **sampling)
    if args.items and parallel.rank() == 0:
        write_benchmark(args, folder, to_uint8(images * 2 - 1), start)
    return images, dict(entropy=entropies(model, encode, asked, tokens, args.dtype))


def fresh_renders(start, stop, captions, seed):
    """Renders of captions start .. stop-1, (stop-start, 3, 64, 64) in [0, 1], each from (*seed, its number)."""
    one = [data.render([captions[k]], np.random.default_rng([*seed, k])) for k in range(start, stop)]
    return torch.from_numpy(np.concatenate(one)), {}


@torch.no_grad()
def round_trips(start, stop, captions, seed, tokenizer, device):
    """Other renders, through the tokenizer and back."""
    fresh, _ = fresh_renders(start, stop, captions, [seed, 2])
    return to_unit(tokenizer.decode(tokenizer.encode((fresh * 2 - 1).to(device)))).cpu(), {}


def join_npz(name, args, asked):
    """--npz: a column's pictures from its parts into one npz in ADM's form, unheld, with n labels or prompts."""
    if parallel.rank() > 0:
        return
    asked, paths = np.asarray(asked), parts_of(name, args)
    shape = np.load(paths[0])["pixels"].shape[1:]
    header = dict(descr="|u1", fortran_order=False, shape=(len(asked), *shape))

    def write(path):
        with zipfile.ZipFile(path, "w") as file:
            with file.open("arr_0.npy", "w", force_zip64=True) as array:
                np.lib.format.write_array_header_1_0(array, header)
                for part in paths:
                    array.write(np.load(part)["pixels"].tobytes())
            with file.open("labels.npy" if asked.dtype.kind == "i" else "prompts.npy", "w") as array:
                np.lib.format.write_array(array, asked, allow_pickle=False)

    args.npz.mkdir(parents=True, exist_ok=True)
    zoo.write_whole(args.npz / f"{slug(name)}.npz", write)


# ---------------------------------------------------------------------------------------------------------------
# Benchmarks whose scorers are programs of their own: we write the folders that they read.

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
        prompts = data.read_prompts(args.geneval)
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
    Puts pictures (n, 3, H, W), uint8, of which each item has four in a row, where the scorers look for them:
    FOLDER/00000/samples/0000.png and metadata.jsonl for GenEval, one sheet of 2 x 2 FOLDER/ITEM.png for DPG-Bench.
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
    row = zoo.MODELS[args.model]
    side = row.config.grid_size * row.vq_config.patch * 2 ** (len(row.vq_config.ch_mult) - 1)
    return f"To score: {(GENEVAL if args.geneval else DPG).format(folder=args.pictures / 'COLUMN', side=side)}"


# ---------------------------------------------------------------------------------------------------------------
# Which figures of what a stream has found. A text in the place of a figure says why there is none.


def right_figures(right, captions, task):
    """As data.share_right, of right (n,), which is 1 where the verifier accepts the picture."""
    kinds = np.array([data.kind_of(caption, task) for caption in captions])
    order = data.SHAPES if task == "c2i" else data.CATEGORIES
    parts = {kind: mean_of(right[kinds == kind]) for kind in order if (kinds == kind).any()}
    whole = mean_of(right) if task == "c2i" else mean_of_figures(parts, kinds)
    return {f"right: {kind}": figure for kind, figure in ({"all": whole} | parts).items()}


def figures_of(found, references, asked, captions, task):
    """{name of metric: figure or reason} of what a stream has found."""
    figures = right_figures(found["right"], captions, task) if "right" in found else {}
    figures |= feature_figures(found, references, asked)
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
    Writes NAME.md and NAME.json of {(cfg, column): {metric: Figure or reason}}, so far as there are columns, and
    returns the text: settings, a table for each cfg with the differences from its first column, why a cell is blank. Of
    several policies the table has the mean; NAME.json has each.
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
    add("--blend", type=float, default=1.0, metavar="A", help="evaluate base + A (tuned - base), of the weights: "
        "nearer to the base the pictures vary more (default 1, tuned)")  # fmt: skip
    add("--best-of", type=int, default=1, metavar="N", help="evaluate the best of N candidates for each picture, by "
        "the weighted sum of --rewards (default 1)")  # fmt: skip
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
    """Fills in what the command line left open. Raises Mistake, OSError."""
    args.flags = list(vars(args))  # what decides the figures: see settings_of
    zoo.settle_device(args)
    zoo.check_range(args, num=1, batch_size=1, cfg_scale=1, temperature=0, top_k=0, seed=0, best_of=1, blend=0)
    if not 0 < args.top_p <= 1:  # also refuses NaN
        raise Mistake(f"--top-p must be above 0 and at most 1, not {args.top_p}")
    if args.samples and args.best_of > 1:
        raise Mistake("--best-of draws pictures, and --samples are drawn already: leave one out")
    if args.samples and args.ckpt:
        raise Mistake("--samples are scored in a model's place, so --ckpt has no say: leave one out")
    if args.blend != 1 and not args.ckpt:
        raise Mistake("--blend mixes the weights of --ckpt with its base's, so it needs --ckpt")
    args.model, _, header = zoo.find_policy(args.ckpt[0] if args.ckpt else None, args.model, args.task)
    args.task, args.policies = zoo.MODELS[args.model].config.task, []
    args.dtype = args.dtype or zoo.quick_dtype(args.model, args.device)
    args.toy = zoo.is_toy(args.model) and not args.samples
    if not args.samples:
        # --text-pad is what --ckpt was trained with; of the base only where it is evaluated alone
        _, args.base, base_header = zoo.find_policy(args.base or header["base"], args.model)
        args.policies = [("base", args.base, (args.text_pad if not args.ckpt else None) or base_header["text_pad"])]
        args.cfg_scale = args.cfg_scale or [1.0, header["cfg_scale"] if header["cfg_scale"] > 1 else 2.0]
        args.temperature = header["temperature"] if args.temperature is None else args.temperature
    for k, ckpt in enumerate(args.ckpt, 1):
        _, path, own_header = zoo.find_policy(ckpt, args.model)
        name = f"tuned {k}" if len(args.ckpt) > 1 else "tuned"
        args.policies.append((name, path, args.text_pad or own_header["text_pad"]))
    args.tuned = [path for _, path, _ in args.policies[1:]]
    args.rewards = args.rewards or ("" if args.samples else BEST_BY.get(args.model, "clip"))
    args.judge_weights = parse_rewards(args.rewards) if args.rewards else {}
    args.judge_options = judge_options(args, args.model)
    args.items, args.asked = [], []
    if not args.samples:
        args.asked = what_is_asked(args)
        args.num = len(args.asked)
    # beside a policy of ours, but not in weights/ or in the hub's cache
    folder = args.tuned[0].parent if args.tuned and header["step"] else Path("out")
    args.folder = folder if args.out is None else args.out if args.out.is_dir() else None
    args.out = args.out.with_suffix("") if args.out and args.out.suffix in (".md", ".json") else args.out
    if args.folder is None and not args.out.name:
        raise Mistake(f"--out {args.out}: FOLDER/NAME is needed, for NAME.md and NAME.json")
    zoo.make_folder(args.folder or args.out.parent)
    return args


def what_is_asked(args):
    """A label or caption per picture; sets args.items where a benchmark is asked for. Raises Mistake, OSError."""
    if args.geneval or args.dpg:
        if args.num:
            raise Mistake("--num: a benchmark has four pictures for each of its prompts; leave it out")
        prompts, args.items = read_benchmark(args)
        return [prompt for prompt in zoo.read_asked(args.model, None, prompts) for _ in range(4)]
    num = args.num or 1024
    if args.classes or args.prompts or (args.task == "t2i" and not args.toy):
        pool = zoo.read_asked(args.model, args.classes, args.prompts)
        return [pool[k % len(pool)] for k in range(num)]
    return zoo.fixed_asked(args.model, num)


def settings_of(args):
    """
    What decides the figures, for the table and the JSON: every flag, and the sha256 of the files that may change. Sets
    args.reference_path and args.inception_path. Raises Mistake, OSError.
    """
    files = {which: path for which, path, _ in args.policies} | {str(path): path for path in args.samples}
    files |= dict(tokenizer=args.vq_ckpt or zoo.MODELS[args.model].vq_ckpt) if not args.samples else {}
    hashes = {name: zoo.file_hash(zoo.find_file(path, "--samples or --ckpt")) for name, path in files.items()}
    hashes["asked"] = hashlib.sha256(json.dumps(args.asked).encode()).hexdigest()
    args.reference_path = args.inception_path = None
    if args.reference:
        args.reference_path, hashes["reference"] = checked_file(args.reference, "--reference")
    if args.reference or args.inception:
        args.inception_path, hashes["inception"] = inception_file(args.inception)
    flags = {name: getattr(args, name) for name in args.flags if name not in ("out", "ckpt")}
    flags["device"] = args.device.partition(":")[0]  # each process of torchrun has a GPU of its own
    flags |= dict(tuned=args.tuned, pad=[pad for *_, pad in args.policies], sha256=hashes)
    if args.samples:
        unused = "model", "cfg_scale", "temperature", "top_k", "top_p", "seed", "dtype", "best_of", "blend"
        flags |= dict.fromkeys(unused)
    return json.loads(json.dumps(flags, default=str))


def open_parts(args, settings):
    """
    Sets args.out, args.parts (the folder of what is computed so far) and args.pictures, and returns the lock on them.
    An unfinished evaluation with these very settings is gone on with. A finished table is never written over, because
    it may have taken hours, except where --out names it. Raises Mistake, OSError.
    """
    written = json.dumps(settings, indent=1)
    many = (f"evaluation{f'-{k}' if k > 1 else ''}" for k in itertools.count(1))
    names = (args.folder / name for name in many) if args.folder else [args.out]
    for args.out in names:
        args.parts = args.out.with_name(args.out.name + ".parts")
        args.pictures = args.out.with_name(args.out.name + "-pictures")
        before = args.parts / "settings.json"
        if before.exists() and before.read_text(encoding="utf-8") == written:
            break
        if not before.exists() and not (args.folder and args.out.with_name(args.out.name + ".json").exists()):
            break
    else:
        raise Mistake(f"{args.parts} holds an unfinished evaluation with other settings: give its command again to end "
                      "it, delete it, or choose another --out")  # fmt: skip
    args.parts.mkdir(parents=True, exist_ok=True)
    held = zoo.lock(args.parts) if parallel.rank() == 0 else None
    zoo.write_whole(args.parts / "settings.json", lambda path: path.write_text(written, encoding="utf-8"))
    return held


def run(args):
    settings = settings_of(args)
    held = open_parts(args, settings)
    networks, inception = {}, None
    if args.toy:
        eyes = zoo.load_tokenizer(args.model)  # the toy's own, whatever --vq-ckpt is: figures of all policies compare
        networks["CLIP"] = partial(clip_image_features, load_clip()[0])
        networks["latents"] = lambda images: eyes.latents(images * 2 - 1).flatten(1)
    if args.inception_path:
        inception = load_inception(args.inception_path, args.device)
    judges = load_judges(args.judge_weights, args.device, args.judge_options)
    columns = {}  # (cfg, name): {metric: Figure or reason}; cfg None: not against the base
    try:
        tools = Tools(networks, inception, judges, args.judge_weights, args.toy)
        for key, found in (of_samples if args.samples else of_policies)(args, tools):
            columns[key] = found
            text = write_results(args, settings, columns)  # each time, because a column of a large model takes hours
        parallel.largest(0)  # waits for all processes
        if parallel.rank() == 0:
            shutil.rmtree(args.parts)
    finally:
        if held:
            held.close()
    print(f"{text}\n{args.out}.md and .json")


def references_of(args, tools, captions):
    """{features: Reference}: a toy's from fresh renders, Inception's from --reference. Raises Mistake."""
    found = {}
    if args.toy:
        source = partial(fresh_renders, captions=captions, seed=[args.seed, 1])
        features = stream("fresh renders", args.num, args, source, Tools(tools.networks), captions)
        found = {name: reference_of(values) for name, values in features.items()}
    if args.reference_path:
        pictures = Pictures(args.reference_path)
        no_captions, eyes = [""] * len(pictures), Tools(inception=tools.inception)
        features = stream("reference", len(pictures), args, pictures.part, eyes, no_captions)
        for name, mean, cov in (("pool", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
            if name in features:
                known, width = (pictures.named(mean), pictures.named(cov)), features[name].shape[1]
                if known[0] is not None and [np.shape(x) for x in known] != [(width,), (width, width)]:
                    raise Mistake(f"{args.reference_path}: {mean} and {cov} are not a mean and covariance of {width}")
                # those of all of ImageNet's pictures, where the file holds 10,000
                found[name] = reference_of(features[name], known if known[0] is not None else None)
    return found


def of_policies(args, tools):
    """((cfg, column), figures) of each policy at each guidance scale, and of a toy's round trips."""
    captions = zoo.captions_of(args.model, args.asked)
    references = references_of(args, tools, captions)
    tokenizer = zoo.load_tokenizer(args.model, args.vq_ckpt, args.device)
    encode = zoo.load_encoder(args.model, args.text_encoder, args.device)
    summed = partial(figures_of, references=references, asked=args.asked, captions=captions, task=args.task)
    for which, path, pad in args.policies:
        model = zoo.load_model(args.model, path, args.device, args.compile)
        if which != "base" and args.blend != 1:
            zoo.blend(model, args.model, args.base, args.blend)
        for cfg in args.cfg_scale:
            name = f"{which}, cfg {cfg:g}" + (f", best of {args.best_of}" if args.best_of > 1 else "")
            name += f", blend {args.blend:g}" if which != "base" and args.blend != 1 else ""
            own = dict(model=model, tokenizer=tokenizer, encode=partial(encode, pad=pad), cfg=cfg)
            own |= dict(judges=tools.judges, captions=captions)
            source = partial(drawn, args=args, folder=args.pictures / slug(name), **own)
            found = stream(name, args.num, args, source, tools, captions, keep=bool(args.npz))
            if args.npz:
                join_npz(name, args, args.asked)
            yield (cfg, name), summed(found)
        del model, own, source  # before the next one: two of the large ones may not fit
    if args.toy:
        source = partial(round_trips, captions=captions, seed=args.seed, tokenizer=tokenizer, device=args.device)
        yield (None, "renders, round trip"), summed(stream("renders", args.num, args, source, tools, captions))


def of_samples(args, tools):
    """((1, file), figures) of each npz of --samples. Raises Mistake."""
    opened = [(path, Pictures(path)) for path in args.samples]  # all of them now, not the last one after hours
    config = zoo.MODELS[args.model].config
    for path, pictures in opened:
        if pictures.asked is not None and len(pictures.asked) != len(pictures):
            raise Mistake(f"{path} holds {len(pictures)} pictures and {len(pictures.asked)} labels")
        if tools.judges and pictures.asked is None:
            raise Mistake(f"{path} holds neither labels nor prompts, so no judge can be asked: leave out --rewards")
        if tools.judges and not fit(pictures.asked, config):
            wanted = "prompts" if config.task == "t2i" else f"labels from 0 to {config.num_classes - 1}"
            raise Mistake(f"{path} holds no {wanted}, as {args.model} has: say with --model whose they are, or leave "
                          "out --rewards")  # fmt: skip
    references, stems = references_of(args, tools, None), [path.stem for path in args.samples]
    for path, pictures in opened:
        name = path.stem if stems.count(path.stem) == 1 else str(path)
        count = min(args.num or len(pictures), len(pictures))
        # unlabelled: no two are known to be of one class
        asked = np.arange(count) if pictures.asked is None else pictures.asked[:count]
        captions = zoo.captions_of(args.model, asked.tolist()) if tools.judges else [""] * count
        found = stream(name, count, args, pictures.part, tools, captions, keep=bool(args.npz))
        if args.npz:
            join_npz(name, args, asked)
        yield (1, name), figures_of(found, references, asked, captions, args.task)


def fit(asked, config):
    """Whether an array is of what a model of this configuration is asked: strings (t2i), or numbers of its classes."""
    if config.task == "t2i":
        return asked.dtype.kind == "U"
    return asked.dtype.kind in "iu" and asked.min() >= 0 and asked.max() < config.num_classes


def stopped(args):
    return "stopped; the same command goes on from here" if args else "stopped"


def main(argv=None):
    zoo.run_script(parse_args, run, argv, stopped)


if __name__ == "__main__":
    main()
