"""
Draws pictures: load, encode what is asked, generate tokens, decode, save a labelled grid.

    python sample.py                                              # the toy base, at once
    python sample.py --ckpt out/c2i --compare                     # base above tuned, same seeds
    python sample.py --classes "red circle" 7 --num 8 --cfg-scale 2
    python sample.py --task t2i --prompts "a red circle and a blue square"
    python sample.py --task t2i --prompts my_prompts.txt --npz samples.npz
    python sample.py --model llamagen-b-256 --print-files         # the official models: which files, from where
    python sample.py --model llamagen-b-256 --classes goldfish "golden retriever"

What can be asked for: classes by name or number (c2i), captions or a file of them (t2i). Same seed, same pictures, on
one machine and batch size; base and tuned model then draw from the same random numbers.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import data
from model import MODELS, TextEncoder, autocast, check_device, is_toy, load_model, weights_header
from tokenizer import find_file, load_tokenizer, to_uint8, to_unit

# One picture a colour and each shape at least once, so that the first grid shows the whole toy world.
DEFAULT_CLASSES = ["red circle", "green square", "blue triangle", "yellow cross", "cyan ring", "magenta cross",
                   "orange triangle", "white circle"]  # fmt: skip


def class_names(name):
    """The class names of a c2i model: the toy's 40 or ImageNet's 1,000."""
    return data.TOY_CLASSES if is_toy(name) else data.imagenet_classes()


def captions_of(name, asked):
    """What the judges read: t2i captions as they are, c2i labels as "a photo of a red circle"."""
    if MODELS[name].config.task == "t2i":
        return list(asked)
    names = class_names(name)
    if is_toy(name):
        return [data.class_caption(names[label]) for label in asked]
    return [f"a photo of {names[label]}" for label in asked]  # the release's, without an article


def make_encoder(name, device="cpu", text_encoder=None, text_pad="left"):
    """
    The function from what is asked, a list of B labels or B captions, to (cond, cond_mask), the transformer's
    conditioning: labels (B,) and None, or text features (B, P, caption_dim) and (B, P).
    """
    row = MODELS[name]
    if row.config.task == "t2i":
        path = text_encoder or row.text_encoder
        return TextEncoder(path, row.config.cond_len, row.config.caption_dim, device, row.text_dtype, text_pad)
    return lambda labels: (torch.tensor(labels, device=device), None)


@torch.no_grad()
def draw(model, tokenizer, encode, asked, seed=0, batch_size=64, decode_batch=64, dtype="float32", **sampling):
    """
    One picture for each entry of `asked`: images (n, 3, H, W) in [0, 1] and tokens (n, T), on the CPU.
    `sampling` goes to Transformer.generate, under autocast to `dtype`. The pictures depend on seed and batch_size.
    """
    device = model.output.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    images, tokens = [], []
    for k in range(0, len(asked), batch_size):
        cond, cond_mask = encode(asked[k : k + batch_size])
        with autocast(device, dtype):
            drawn, _ = model.generate(cond, cond_mask, generator=generator, **sampling)
        images += [to_unit(tokenizer.decode(part)).cpu() for part in drawn.split(decode_batch)]
        tokens.append(drawn.cpu())
    return torch.cat(images), torch.cat(tokens)


def wrap(label, width, font, most=4):
    """The lines, `most` at most, in which a label (may have newlines) fits into `width` px; a longer word is cut."""
    lines = []
    for text in label.split("\n"):
        lines.append("")
        for word in text.split(" "):
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and font.getlength(longer) > width:
                lines.append(word)
            else:
                lines[-1] = longer
    for k, line in enumerate(lines):
        while font.getlength(line) > width:
            line = line[:-1]
        lines[k] = line
    return lines[:most]


def save_grid(path, images, labels, columns, title=""):
    """
    Writes a PNG of images (n, 3, H, W) in [0, 1], `columns` wide, each with its label (may have newlines) below it.
    """
    n, _, height, width = images.shape
    zoom = max(1, 128 // width)
    font = ImageFont.load_default(11)
    labels = [wrap(label, width * zoom, font) for label in labels]
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
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def resolve_ckpt(ckpt, model_name, task):
    """
    (model name, weights path) from --ckpt, --model and --task: a folder stands for the policy inside it, and our own
    files say which model they are. Raises ValueError if the three disagree, FileNotFoundError.
    """
    path = find_file(ckpt) if ckpt else None
    if path and path.is_dir():
        path = path / "policy.safetensors"
    if path and not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    written_by = header_of(path).get("model")
    name = model_name or written_by or f"toy-{task or 'c2i'}"
    if written_by and written_by != name:
        raise ValueError(
            f"{path} holds a {written_by} model, not {name}; --model, --preset and all weights must be of one model"
        )
    if task and MODELS[name].config.task != task:
        raise ValueError(f"--model {name} is a {MODELS[name].config.task} model, but --task is {task}")
    return name, path


def read_asked(name, classes, prompts):
    """What --classes and --prompts ask of the model `name`: a list of labels or of captions. Raises ValueError."""
    task = MODELS[name].config.task
    if (prompts if task == "c2i" else classes) is not None:
        flag, other = ("--prompts", "--classes") if task == "c2i" else ("--classes", "--prompts")
        raise ValueError(f"{name} is a {task} model: it takes {other}, not {flag}")
    if task == "c2i":
        names = class_names(name)
        return [data.find_class(c, names) for c in classes or (DEFAULT_CLASSES if is_toy(name) else range(8))]
    found = []
    if not prompts and not is_toy(name):
        raise ValueError(f"{name} needs --prompts: captions, or .txt, .json and .jsonl files of them")
    for prompt in prompts or data.balanced_captions(6):
        is_file = prompt.endswith((".txt", ".json", ".jsonl"))
        found += data.read_prompts(prompt) if is_file else [prompt]
    if is_toy(name):  # in the one form that its text encoder has read; refuses what would draw nonsense
        found = [data.toy_caption(caption) for caption in found]
    return found


def add_model_flags(add):
    """The flags that train.py, sample.py and evaluate.py share: which model, its files, where it runs."""
    add("--task", choices=("c2i", "t2i"), help="class-to-image or text-to-image (default: what --ckpt is, else c2i)")
    add("--model", choices=MODELS, help="a row of the model table (default: the task's toy)")
    add("--vq-ckpt", metavar="PATH", help="the tokenizer's weights, or hf:OWNER/REPO/FILE (default: the model's own)")
    add("--text-encoder", metavar="PATH", help="t2i: folder or OWNER/REPO of the T5 encoder (default: the model's own)")
    add(
        "--text-pad",
        choices=("left", "right"),
        help="t2i: where captions are padded; right for the released AR-GRPO weights (default: what our own --ckpt was "
        "trained with, else left, as LlamaGen)",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: the GPU if there is one")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the layers' products; weights, logits and loss are float32 (default bfloat16 on a GPU, else float32)",
    )


def settle_precision(args):
    """Raises ValueError if there is no such device; else sets --dtype where it was left open."""
    check_device(args.device)
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")


def header_of(path):
    """What our own weights file at `path` says of itself: model, step, text_pad, cfg_scale. Else, or for None, {}."""
    return weights_header(path) if path else {}


def padding_for(path, text_pad):
    """`text_pad`, or where that is None what the policy at `path` (None: the model's own base) was trained with."""
    return text_pad or header_of(path).get("text_pad", "left")


def load_around(name, args):
    """
    (tokenizer, encode): what stands around the transformer `name`. Where --text-pad is open, captions are padded on the
    left until encode.pad says otherwise.
    """
    row = MODELS[name]
    tokenizer = load_tokenizer(row.tokenizer, args.vq_ckpt or row.vq_ckpt, args.device)
    return tokenizer, make_encoder(name, args.device, args.text_encoder, args.text_pad or "left")


def print_files(name, args):
    """Prints what the model `name` is loaded from: each file, its source, and where it is or is expected."""
    from huggingface_hub import constants, try_to_load_from_cache

    row = MODELS[name]
    parts = [("transformer", "--ckpt", args.ckpt or row.ckpt), ("tokenizer", "--vq-ckpt", args.vq_ckpt or row.vq_ckpt)]
    if row.config.task == "t2i":
        parts.append(("text encoder", "--text-encoder", args.text_encoder or row.text_encoder))
    for part, flag, where in parts:
        where = str(where)
        if Path(where).exists() or not (where.startswith("hf:") or flag == "--text-encoder"):
            print(f"{part:13}{where}: {'here' if Path(where).exists() else 'not here'}; another file: {flag} PATH")
            continue
        owner, _, repo = where.removeprefix("hf:").partition("/")
        repo, *file = repo.split("/", 1)
        if not (owner and repo):
            raise ValueError(f"{where}: neither here nor of the form OWNER/REPO, as the hub has it")
        found = try_to_load_from_cache(f"{owner}/{repo}", file[0] if file else "config.json")
        cache = Path(constants.HF_HUB_CACHE) / f"models--{owner}--{repo}"
        state = f"here: {found}" if isinstance(found, str) else f"not here; expected under {cache}/snapshots"
        print(f"{part:13}{file[0] if file else repo}, from https://huggingface.co/{owner}/{repo}")
        print(f"{'':13}{state}; downloaded on first use, or give {flag} PATH")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    # what is drawn
    add_model_flags(add)
    add("--ckpt", metavar="PATH", help="weights, or a folder that train.py wrote (default: the model's base)")
    add("--base", metavar="PATH", help="weights of the base for --compare (default: the model's own)")
    add("--print-files", action="store_true", help="only list the files of the model, and where they are expected")
    add("--compare", action="store_true", help="draw the base too, above the model of --ckpt, with the same seeds")
    add("--classes", nargs="+", metavar="CLASS", help="c2i: names or numbers")
    add("--prompts", nargs="+", metavar="TEXT", help="t2i: captions, or .txt, .json and .jsonl files of them")
    add("--num", type=int, default=4, help="images for each class or prompt (default 4)")
    # how
    add(
        "--cfg-scale",
        type=float,
        help="guidance; 1 is none (default: what our own --ckpt was trained with; toys 1, LlamaGen c2i 4.0, t2i 7.5)",
    )
    add("--temperature", type=float, default=1.0, help="0 takes the likeliest token always (default 1)")
    add("--top-k", type=int, help="keep the k likeliest tokens; 0: all (default: toys 0, LlamaGen 2000 c2i, 1000 t2i)")
    add("--top-p", type=float, default=1.0, help="keep the likeliest tokens of this total mass (default 1, all)")
    add("--seed", type=int, default=0, help="of the random numbers that tokens are drawn with (default 0)")
    add("--batch-size", type=int, default=64, help="images generated at once; bounds memory (default 64)")
    # where to
    add("--out", default="out/samples.png", help="the grid (default out/samples.png)")
    add(
        "--npz",
        metavar="FILE",
        help="also write --ckpt's uint8 images (n, H, W, 3) as arr_0, tokens, and labels or prompts",
    )
    args = parser.parse_args(argv)
    if args.num < 1 or args.batch_size < 1:
        parser.error("--num and --batch-size must be at least 1")
    cfg_scale = 1 if args.cfg_scale is None else args.cfg_scale
    if not 0 <= args.temperature < np.inf or (args.top_k or 0) < 0 or not 0 < args.top_p <= 1:  # also refuses NaN
        parser.error("needed: --temperature >= 0, --top-k >= 0, 0 < --top-p <= 1")
    if not 1 <= cfg_scale < np.inf or not 0 <= args.seed < 2**63:
        parser.error("needed: --cfg-scale >= 1, 0 <= --seed < 2^63")
    if args.compare and not args.ckpt:
        parser.error("--compare sets the model of --ckpt against its base, so it needs --ckpt")
    if args.base and not args.compare:
        parser.error("--base is what --compare draws beside --ckpt; to draw from it alone, give it as --ckpt")
    return args


def run(args):
    settle_precision(args)
    if args.print_files:  # with --model, --ckpt is not looked for: it may be what is missing
        return print_files(args.model or resolve_ckpt(args.ckpt, None, args.task)[0], args)
    name, path = resolve_ckpt(args.ckpt, args.model, args.task)
    row = MODELS[name]
    trained_with = float(header_of(path).get("cfg_scale", row.cfg_scale))
    cfg_scale = trained_with if args.cfg_scale is None else args.cfg_scale
    top_k = row.top_k if args.top_k is None else args.top_k
    asked = [entry for entry in read_asked(name, args.classes, args.prompts) for _ in range(args.num)]
    for file in filter(None, (args.out, args.npz)):  # now, not after the drawing
        if Path(file).is_dir():
            raise ValueError(f"{file} is a folder; --out and --npz name files")
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    if Path(args.out).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out {args.out}: the grid's name ends in .png, .jpg or .webp")
    tokenizer, encode = load_around(name, args)
    labels = [caption.removeprefix("a photo of ") for caption in captions_of(name, asked)]
    sampling = dict(cfg_scale=cfg_scale, temperature=args.temperature, top_k=top_k, top_p=args.top_p, dtype=args.dtype)
    rows = []  # one (images, tokens, label prefix) a model
    models = [("", path, args.text_pad)]
    if args.compare:  # the base's captions as the base was trained, whatever --text-pad says of --ckpt
        models = [("base: ", resolve_ckpt(args.base, name, None)[1], None), ("tuned: ", path, args.text_pad)]
    for which, weights, text_pad in models:
        model = load_model(name, weights, args.device)
        encode.pad = padding_for(weights, text_pad)
        images, tokens = draw(model, tokenizer, encode, asked, args.seed, args.batch_size, **sampling)
        rows.append((images, tokens, which))
        del model  # before the next one: two of the large ones may not fit
    if args.npz:  # before the grid, which can be too wide for its format
        key = "labels" if row.config.task == "c2i" else "prompts"
        pixels = to_uint8(rows[-1][0] * 2 - 1).permute(0, 2, 3, 1).numpy()
        with open(args.npz, "wb") as file:  # np.savez would add .npz to a name
            np.savez(file, arr_0=pixels, tokens=rows[-1][1].numpy(), **{key: np.array(asked)})
        print(f"{args.npz}: arr_0 {pixels.shape} uint8, tokens {tuple(rows[-1][1].shape)}, {key}")
    # a line of the grid: the num pictures of one class or prompt; with --compare the base's line comes first
    order = [(drawn, k) for k in range(0, len(asked), args.num) for drawn in rows]
    images = torch.cat([drawn[0][k : k + args.num] for drawn, k in order])
    captions = [drawn[2] + labels[j] for drawn, k in order for j in range(k, k + args.num)]
    columns = args.num if args.compare or args.num > 1 else min(len(asked), 8)
    if not args.compare and columns <= 4:  # two classes side by side make a squarer sheet
        columns = min(2 * columns, len(asked))
    save_grid(args.out, images, captions, columns, f"{name}, cfg {cfg_scale:g}, seed {args.seed}")
    print(f"{args.out}: {len(images)} pictures of {name}, cfg {cfg_scale:g}, temperature {args.temperature:g}")


def is_out_of_memory(error):
    """Whether an error says so. Python's and that of torch's GPUs have a class, that of torch's CPU has only words."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def run_script(script, run, args, remedy, stopped=lambda: "stopped"):
    """
    run(args), where what the user can mend ends in one sentence and exit code 1: an OSError or ValueError in its own,
    memory that is out in the `remedy`, Ctrl-C in what stopped() returns. Anything else is our bug and its traceback.
    """
    try:
        run(args)
    except (OSError, ValueError) as error:
        sys.exit(f"{script}: {error}")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(f"{script}: out of memory; {remedy}")
    except KeyboardInterrupt:
        sys.exit(f"\n{script}: {stopped()}")


def main(argv=None):
    run_script("sample.py", run, parse_args(argv), "lower --batch-size")


if __name__ == "__main__":
    main()
