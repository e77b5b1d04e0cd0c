"""
Draws pictures: load, encode the prompts, generate tokens, decode, save a labelled grid.

    python sample.py                                              # the toy base, at once
    python sample.py --ckpt out/c2i --compare                     # base above tuned, same seeds
    python sample.py --ckpt out/best --compare out/c2i            # base, out/c2i, out/best
    python sample.py --classes "red circle" 7 --num 8 --cfg-scale 2
    python sample.py --task t2i --prompts "a red circle and a blue square"
    python sample.py --task t2i --prompts my_prompts.txt --npz samples.npz
    python sample.py --best-of 4                                  # of four candidates for each picture the judges' best
    python sample.py --model llamagen-b-256 --classes goldfish "golden retriever"

Prompts are classes by name or number (c2i), or captions or files of them (t2i). Every picture has its own random
numbers, a function of --seed and its place in the list, so base and tuned model draw from the same ones.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import parallel
import zoo
from model import image_noise
from prompts import captions_of, load_encoder, read_prompts
from rewards import (
    BEST_BY,
    add_judge_flags,
    fill_missing,
    judge_images,
    judge_options,
    load_judges,
    parse_rewards,
    weighted_sum,
)
from tokenizer import to_uint8, to_unit
from zoo import Mistake


@torch.no_grad()
def draw(
    model, tokenizer, encode, prompts, seed=0, first=0, batch_size=64, decode_batch=64, dtype="float32", progress=False,
    **sampling,
):  # fmt: skip
    """
    One picture per prompt: images (n, 3, H, W) in [0, 1] and tokens (n, T), on the CPU. `encode` pads as the model was
    trained (partial(encode, pad="right") where that is the right side). `sampling` goes to Transformer.generate, under
    autocast to `dtype`. Picture k depends on seed (a number or several), first + k and its prompt alone, so a long list
    can be drawn in pieces. progress: a bar on stderr, with the time left.
    """
    device, T = model.output.weight.device, model.config.num_tokens
    batches = torch.tensor(parallel.share(len(prompts))).split(batch_size)  # each process draws its share
    images, tokens = [], []
    hidden = not progress or parallel.rank() > 0
    with tqdm(total=T * len(batches), unit="token", leave=False, disable=hidden) as bar:
        # generate normalises once per token; what a hook returns would replace the output
        hook = model.norm.register_forward_hook(lambda *_: bar.update() and None)
        for rows in batches:
            cond, cond_mask = encode([prompts[k] for k in rows])
            noise = image_noise(first + rows, T, *np.atleast_1d(seed).tolist())
            with zoo.autocast(device, dtype):
                batch, _ = model.generate(cond, cond_mask, noise=noise, **sampling)
            images += [to_unit(tokenizer.decode(part)).cpu() for part in batch.split(decode_batch)]
            tokens.append(batch.cpu())
        hook.remove()
    return parallel.gather(torch.cat(images), len(prompts)), parallel.gather(torch.cat(tokens), len(prompts))


CANDIDATE = 2**31  # follows --seed in the random numbers of further candidates; those of training have their step there


@torch.no_grad()
def draw_best(
    best_of, judges, weights, captions, model, tokenizer, encode, prompts, seed=0, first=0, batch_size=64,
    progress=False, **options,
):  # fmt: skip
    """
    Like `draw`, but draws `best_of` candidates per prompt and keeps the one with the highest weighted reward; a missing
    score has no say. Candidate 0 is what `draw` draws; candidate j of picture k depends on seed, first + k and j.
    progress: a bar of candidates.
    """
    if best_of == 1:
        return draw(model, tokenizer, encode, prompts, seed, first, batch_size, progress=progress, **options)
    images, tokens = [], []
    hidden = not progress or parallel.rank() > 0
    with tqdm(total=len(prompts) * best_of, unit="picture", leave=False, disable=hidden) as bar:
        for batch in torch.arange(len(prompts)).split(batch_size * parallel.world()):
            batch_prompts, start = [prompts[k] for k in batch], int(batch[0])
            rows = parallel.share(len(batch))  # each process judges its share
            row_captions = [captions[start + k] for k in rows]
            candidates, rewards = [], []
            for j in range(best_of):
                own_seed = (seed, CANDIDATE, j) if j else seed
                candidate = draw(
                    model, tokenizer, encode, batch_prompts, own_seed, first + start, batch_size, **options
                )
                candidates.append(candidate)
                scores, _ = judge_images(judges, candidate[0][rows].to(model.output.weight.device), row_captions)
                rewards.append(scores)
                bar.update(len(batch))
            scores = {}
            for name in rewards[0]:
                values = torch.stack([found[name] for found in rewards], 1)  # (n, best_of)
                scores[name] = fill_missing(parallel.gather(values, len(batch)).flatten(), best_of)
            best = weighted_sum(scores, weights).view(-1, best_of).argmax(1).tolist()
            images += [candidates[j][0][k] for k, j in enumerate(best)]
            tokens += [candidates[j][1][k] for k, j in enumerate(best)]
    return torch.stack(images), torch.stack(tokens)


MARKS = {True: "\u2713\u00a0", False: "\u2717\u00a0"}  # check mark, ballot cross; spaces that do not break
MARK_COLOURS = {MARKS[True]: "#15803d", MARKS[False]: "#b91c1c"}


def label_images(model, images, captions, prefix=""):
    """A label for each image (n, 3, H, W): `prefix`, its caption, and for a toy whether the verifier accepts it."""
    labels = [prefix + " ".join(caption.removeprefix("a photo of ").split()) for caption in captions]
    if not zoo.is_toy(model):
        return labels
    right = [data.satisfies(image, caption) for image, caption in zip(images, captions, strict=True)]
    return [MARKS[r] + label for r, label in zip(right, labels, strict=True)]


def wrap(text, width, font):
    """The text in lines of at most `width` px. A word that is longer is cut."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines += [""] if lines[-1] else []
        for character in word:
            lines += [""] if lines[-1] and font.getlength(lines[-1] + character) > width else []
            lines[-1] += character
    return lines


def label_lines(label, width, font, most=4):
    """The lines of a label: at most `most` for its first line, a caption of any length; as many as the rest needs."""
    caption, *rest = label.split("\n")
    lines = wrap(caption[:500], width, font)  # 500: nobody sees more, and it could be a whole book
    lines = lines if len(lines) <= most else [*lines[: most - 1], f"{lines[most - 1][:-3]}..."]
    return lines + [line for text in rest for line in wrap(text, width, font)]


def label_font():
    """DejaVu Sans, which matplotlib brings along and which knows the languages of Europe and the Near East."""
    import matplotlib

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 10)


def save_grid(path, images, labels, columns, title=""):
    """
    Writes images (n, 3, H, W) in [0, 1] as a grid `columns` wide, each with its label below it: a caption, which may
    begin with a mark, and after a newline the judges' scores.
    """
    n, _, height, width = images.shape
    zoom, font = max(1, 128 // width), label_font()
    labels = [label_lines(label, width * zoom, font) for label in labels]
    lines = max(len(label) for label in labels)
    cell_w, cell_h = width * zoom + 6, height * zoom + 13 * lines + 6
    top = 20 if title else 0
    sheet = Image.new("RGB", (columns * cell_w, top + -(-n // columns) * cell_h), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((4, 3), title, fill="black", font=font)
    for k, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = k % columns * cell_w + 3, top + k // columns * cell_h + 3
        pixels = to_uint8(image * 2 - 1).permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(pixels).resize((width * zoom, height * zoom), Image.NEAREST), (x, y))
        for j, text in enumerate(label):
            pen.text((x, y + height * zoom + 13 * j), text, fill="black", font=font)
        if label[0][:2] in MARK_COLOURS:
            pen.text((x, y + height * zoom), label[0][:2], fill=MARK_COLOURS[label[0][:2]], font=font, stroke_width=0.5)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    zoo.write_whole(Path(path), sheet.save)


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


def write_npz(path, arrays):
    with open(path, "wb") as file:  # given a name, np.savez would add .npz to it
        np.savez(file, **arrays)


def parse_args(argv=None):
    parser = zoo.script_parser(__doc__)
    add = parser.add_argument_group("what is drawn").add_argument
    zoo.add_model_flags(add)
    add("--ckpt", metavar="PATH", help="weights, or a folder that train.py wrote (default: the model's base)")
    add("--base", metavar="PATH", help="weights of the base for --compare (default: those that --ckpt began from)")
    add("--compare", nargs="*", metavar="PATH", help="draw the base too, and the policies of these folders or files, "
        "above the model of --ckpt, with the same seeds")  # fmt: skip
    add("--classes", nargs="+", metavar="CLASS", help="c2i: names or numbers (default: eight of them)")
    add(
        "--prompts", nargs="+", metavar="TEXT", help="t2i: captions, or files of them (.txt, .csv, .tsv, .json, .jsonl)"
    )
    add("--num", type=int, default=4, help="images for each class or prompt (default 4)")
    add = parser.add_argument_group("how it is drawn").add_argument
    add("--cfg-scale", type=float, help="guidance; 1 is none (default: what our own --ckpt was trained with; toys 1, "
        "LlamaGen c2i 4.0, t2i 7.5)")  # fmt: skip
    add("--temperature", type=float, help="divides the logits; 0 always takes the likeliest (default: what our own "
        "--ckpt was trained with, else 1)")  # fmt: skip
    add("--top-k", type=int, help="keep the k likeliest tokens; 0: all (default: toys 0, LlamaGen 2000 c2i, 1000 t2i)")
    add("--top-p", type=float, default=1.0, help="keep the likeliest tokens of this total mass (default 1, all)")
    add("--seed", type=int, default=0, help="seed of the random numbers that tokens are drawn with (default 0)")
    add("--batch-size", type=int, default=64, help="images generated at once; bounds memory (default 64)")
    add("--best-of", type=int, default=1, metavar="N", help="draw N candidates for each picture and keep the one with "
        "the highest weighted reward (default 1)")  # fmt: skip
    add("--rewards", help="judge=weight,... that choose for --best-of (default: the toy's clip=1,realism=0.25, else "
        "clip)")  # fmt: skip
    add_judge_flags(add)
    add = parser.add_argument_group("where it goes").add_argument
    add("--out", type=Path, default="out/samples.png", help="file of the grid (default out/samples.png)")
    add("--npz", type=Path, metavar="FILE", help="file that gets --ckpt's uint8 images (n, H, W, 3) as arr_0, their "
        "tokens, and labels or prompts (default: none)")  # fmt: skip
    return resolve(parser.parse_args(argv))


def resolve(args):
    """Checks the flags and fills in what depends on others. Raises Mistake, OSError."""
    zoo.setup_device(args)
    if args.compare is not None and not args.ckpt:
        raise Mistake("--compare sets the model of --ckpt against its base, so it needs --ckpt")
    if args.base and args.compare is None:
        raise Mistake("--base is what --compare sets beside --ckpt; to draw from it alone, give it as --ckpt")
    if args.rewards and args.best_of == 1:
        raise Mistake("--rewards choose among candidates: say how many with --best-of N")
    args.model, path, header = zoo.find_policy(args.ckpt, args.model, args.task)
    zoo.check_tokenizer(args.model, header, args.vq_ckpt)
    args.dtype = args.dtype or zoo.quick_dtype(args.model, args.device)
    args.policies = compared_policies(args, header)
    prefix = f"{Path(args.ckpt).name}: " if args.compare else "tuned: " if args.policies else ""
    args.policies.append((prefix, path, args.text_pad or header["text_pad"]))
    args.cfg_scale = header["cfg_scale"] if args.cfg_scale is None else args.cfg_scale
    args.temperature = header["temperature"] if args.temperature is None else args.temperature
    args.top_k = zoo.MODELS[args.model].top_k if args.top_k is None else args.top_k
    zoo.check_range(args, num=1, batch_size=1, cfg_scale=1, temperature=0, top_k=0, seed=0, best_of=1)
    if not 0 < args.top_p <= 1:  # also refuses NaN
        raise Mistake(f"--top-p must be above 0 and at most 1, not {args.top_p}")
    args.judge_weights = parse_rewards(args.rewards or BEST_BY.get(args.model, "clip")) if args.best_of > 1 else {}
    args.judge_options = judge_options(args, args.model)
    prompts = read_prompts(args.model, args.classes, args.prompts)
    args.prompts = [prompt for prompt in prompts for _ in range(args.num)]
    check_outputs(args)
    return args


def compared_policies(args, header):
    """[(prefix of its labels, weights, padding)] of the base and of those that --compare names. Raises Mistake."""
    if args.compare is None:
        return []
    _, base, base_header = zoo.find_policy(zoo.base_of(args.model, header, args.base), args.model)
    policies = [("base: ", base, base_header["text_pad"])]
    for place in args.compare:
        _, path, own_header = zoo.find_policy(place, args.model)
        zoo.check_tokenizer(args.model, own_header, args.vq_ckpt)
        policies.append((f"{Path(place).name}: ", path, own_header["text_pad"]))  # as it was trained
    return policies


def check_outputs(args):
    """Raises Mistake or OSError if --out or --npz cannot be written: now, not after the drawing."""
    if args.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise Mistake(f"--out {args.out}: the grid's name ends in .png, .jpg or .webp")
    if args.npz and args.npz.resolve() == args.out.resolve():
        raise Mistake(f"--out and --npz are both {args.out}")
    for file in filter(None, (args.out, args.npz)):
        if file.is_dir():
            raise Mistake(f"{file} is a folder; --out and --npz name files")
        zoo.make_folder(file.parent)


def run(args):
    tokenizer = zoo.load_tokenizer(args.model, args.vq_ckpt, args.device)
    encode = load_encoder(args.model, args.text_encoder, args.device, args.prompts)
    options = dict(seed=args.seed, batch_size=args.batch_size, dtype=args.dtype, progress=True)
    options |= dict(cfg_scale=args.cfg_scale, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    captions = captions_of(args.model, args.prompts)
    judges = load_judges(args.judge_weights, args.device, args.judge_options)
    images, labels = [], []
    for prefix, path, pad in args.policies:
        model = zoo.load_model(args.model, path, args.device, args.compile)
        what = captions, model, tokenizer, partial(encode, pad=pad), args.prompts
        own_images, tokens = draw_best(args.best_of, judges, args.judge_weights, *what, **options)
        images.append(own_images)
        labels.append(label_images(args.model, own_images, captions, prefix))
        del model  # before the next one: two of the large ones may not fit
    if args.npz:  # before the grid, which can be too wide for its format; of the last policy, --ckpt
        key = "labels" if zoo.MODELS[args.model].config.task == "c2i" else "prompts"
        pixels = to_uint8(own_images * 2 - 1).permute(0, 2, 3, 1).numpy()
        arrays = {"arr_0": pixels, "tokens": tokens.numpy(), key: np.array(args.prompts)}
        zoo.write_whole(args.npz, lambda path: write_npz(path, arrays))
        print(f"{args.npz}: arr_0 {pixels.shape} uint8, tokens {tuple(tokens.shape)}, {key}")
    # a row of the grid holds the --num pictures of one prompt, or of several
    columns = min(len(captions), args.num * max(1, 8 // args.num))
    chosen = f", best of {args.best_of}" if args.best_of > 1 else ""
    title = f"{args.model}, cfg {args.cfg_scale:g}, seed {args.seed}{chosen}"
    save_grid(args.out, *interleave(images, labels, columns), columns, title)
    settings = f"cfg {args.cfg_scale:g}, temperature {args.temperature:g}{chosen}"
    print(f"{args.out}: {len(captions) * len(images)} pictures of {args.model}, {settings}")


def main(argv=None):
    zoo.run_script(parse_args, run, argv)


if __name__ == "__main__":
    main()
