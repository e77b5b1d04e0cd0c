"""
Draws pictures of a policy: load, encode the prompts, generate tokens, decode, save a labelled grid.

    python sample.py                                              # the toy base, at once
    python sample.py --ckpt out/c2i --compare                     # base above tuned, same seeds
    python sample.py --ckpt out/best --compare out/c2i            # base, out/c2i, out/best
    python sample.py --classes "red circle" 7 --num 8 --cfg-scale 2
    python sample.py --task t2i --prompts "a red circle and a blue square" my_prompts.txt --npz samples.npz
    python sample.py --best-of 4                                  # of four candidates for each picture the judges' best
    python sample.py --model llamagen-b-256 --classes goldfish "golden retriever"

Every picture has its own random numbers, a function of --seed and its place in the list, so base and tuned model draw
from the same ones.
"""

import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import parallel
import report
import zoo
from grpo import Batch, Rollout, at_tokens, log_policy, take
from model import image_noise
from prompts import captions_of, load_encoder, read_prompts
from rewards import (
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
    trained. `sampling` goes to Transformer.generate, under autocast to `dtype`. Picture k depends on seed (a number or
    several), first + k and its prompt alone, so a long list can be drawn in pieces. progress: a bar on stderr.
    """
    device, T = model.output.weight.device, model.config.num_tokens
    batches = torch.tensor(parallel.share(len(prompts))).split(batch_size)  # each process draws its share
    images, tokens = [], []
    hidden = not progress or parallel.rank() > 0
    for rows in tqdm(batches, unit="batch", leave=False, disable=hidden):
        cond, cond_mask = encode([prompts[k] for k in rows])
        noise = image_noise(first + rows, T, *np.atleast_1d(seed).tolist())
        with zoo.autocast(device, dtype):
            batch, _ = model.generate(cond, cond_mask, noise=noise, **sampling)
        images += [to_unit(tokenizer.decode(part)).cpu() for part in batch.split(decode_batch)]
        tokens.append(batch.cpu())
    n = len(prompts)
    return parallel.gather(torch.cat(images), n), parallel.gather(torch.cat(tokens), n)


CANDIDATE = 2**31  # follows --seed in the random numbers of further candidates; those of training have their step there


@torch.no_grad()
def draw_best(
    best_of, judges, weights, captions, model, tokenizer, encode, prompts, seed=0, first=0, batch_size=64, **options,
):  # fmt: skip
    """
    Like `draw`, but draws `best_of` candidates per prompt and keeps the one with the highest weighted reward; a missing
    score has no say. Candidate 0 is what `draw` draws; candidate j of picture k depends on seed, first + k and j.
    """
    if best_of == 1:
        return draw(model, tokenizer, encode, prompts, seed, first, batch_size, **options)
    images, tokens, size = [], [], batch_size * parallel.world()
    device = model.output.weight.device
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        rows = parallel.share(len(batch))  # each process judges its share
        row_captions = [captions[start + k] for k in rows]
        candidates, rewards = [], []
        for j in range(best_of):
            own_seed = (seed, CANDIDATE, j) if j else seed
            candidate = draw(model, tokenizer, encode, batch, own_seed, first + start, batch_size, **options)
            candidates.append(candidate)
            scores, _ = judge_images(judges, candidate[0][rows].to(device), row_captions)
            rewards.append(scores)
        scores = {}
        for name in rewards[0]:
            values = torch.stack([found[name] for found in rewards], 1)  # (n, best_of)
            scores[name] = fill_missing(parallel.gather(values, len(batch)).flatten(), best_of)
        best = weighted_sum(scores, weights).view(-1, best_of).argmax(1).tolist()
        images += [candidates[j][0][k] for k, j in enumerate(best)]
        tokens += [candidates[j][1][k] for k, j in enumerate(best)]
    return torch.stack(images), torch.stack(tokens)


def label_images(model, images, captions, prefix=""):
    """A label for each image (n, 3, H, W): `prefix`, its caption, and for a toy whether the verifier accepts it."""
    labels = [prefix + " ".join(caption.removeprefix("a photo of ").split()) for caption in captions]
    if not zoo.is_toy(model):
        return labels
    right = [data.satisfies(image, caption) for image, caption in zip(images, captions, strict=True)]
    return [report.MARKS[r] + label for r, label in zip(right, labels, strict=True)]


# ---------------------------------------------------------------------------------------------------------------
# Pictures of a run of train.py. All processes must call these functions.


def shown_prompts(args):
    """The labels or captions of every grid of a run, and the number of its columns."""
    if not args.pool:
        return data.balanced_captions(24), len(data.CATEGORIES)  # a category per column
    # all of the toy's classes, two of its colours per row; of large pictures a page
    most = 40 if zoo.is_toy(args.model) else 16
    prompts = args.pool[:: -(-len(args.pool) // most)]
    return prompts, min(len(prompts), len(data.CATEGORIES) if args.task == "t2i" else 10)


def draw_grid(args, policy, tokenizer, encode, judges, name, title):
    """
    Draws args.out/NAME, the same prompts and seeds each time: below each picture its caption, for a toy the verifier's
    mark, and the judges' scores. Returns the pictures (n, 3, H, W).
    """
    prompts, columns = shown_prompts(args)
    captions = captions_of(args.model, prompts, args.class_names)
    sampling = dict(cfg_scale=args.cfg_scale, temperature=args.temperature, dtype=args.dtype)
    # one seed whatever --seed is, so that grids of runs compare
    images, _ = draw(policy, tokenizer, encode, prompts, seed=1234, decode_batch=args.micro_batch, **sampling)
    scores, _ = judge_images(judges, images.to(args.device), captions)
    labels = label_images(args.model, images, captions)
    for k in range(len(labels)):  # spaces that do not break: a score stays beside its judge's name
        verdicts = [f"{judge.removeprefix('pyiqa:')}\u00a0{values[k]:.2f}" for judge, values in scores.items()]
        labels[k] += "\n" + "\u00a0 ".join(verdicts)
    with report.optional(name):
        report.save_grid(args.out / name, images, labels, columns, title=title)
    return images


@torch.no_grad()
def draw_group(args, step, policy, parts, images, captions, scores, rewards, kept):
    """
    Of the first, the middle and the last step, draws what the update did to the tokens of one group. parts: its
    micro-batches; kept: the rows of images, scores and rewards that they hold.
    """
    if step not in (0, args.steps // 2, args.steps - 1):
        return
    batch = Batch(*[torch.cat(values) for values in zip(*parts, strict=True)])
    group = take(batch, slice(args.learn_from))
    with zoo.autocast(args.device, args.dtype):
        after = at_tokens(log_policy(policy, group, args.learn_cfg, args.temperature), group.tokens)  # (K, T)
    path = args.out / f"samples/group_{step:05d}.png"
    with report.optional(path):
        report.draw_step(
            path,
            captions[0],
            images[kept],
            batch.tokens,
            {name: values[kept] for name, values in scores.items()},
            rewards[kept],
            batch.advantages,
            after - group.old_logprobs,
            args.rewards,
            args.learn_from,
        )


def finish_run(args, policies, before, tokenizer, encode, judges):
    """
    After training: after.png, before-after.png, curves.png and the page. policies: {"base": model, "tuned": model};
    before: the pictures of before.png, or None where the run was resumed.
    """
    if before is None:
        before = draw_grid(args, policies["base"], tokenizer, encode, judges, "before.png", "before: the base model")
    title = f"after {args.steps} steps of GRPO"
    after = draw_grid(args, policies["tuned"], tokenizer, encode, judges, "after.png", title)
    prompts, columns = shown_prompts(args)
    captions = captions_of(args.model, prompts, args.class_names)
    labels = [label_images(args.model, before, captions, "before: ")]
    labels += [label_images(args.model, after, captions, "after: ")]
    with report.optional("before-after.png"):
        pictures, texts = report.interleave([before, after], labels, columns)
        report.save_grid(args.out / "before-after.png", pictures, texts, columns, title=f"before above {title}")
    with report.optional("curves.png"):
        report.write_curves(args.out)
    with report.optional("the picture token by token"), zoo.autocast(args.device, args.dtype):
        cond, cond_mask = encode(prompts[-1:])
        written = {}
        for name, model in policies.items():
            written[name] = write_picture(model, tokenizer, cond, cond_mask, args.cfg_scale, args.temperature)
        report.save_writers(args.out, captions[-1], written)
    with report.optional("report.html"):
        report.write_page(args.out)
    parallel.say(
        f"Look at {args.out}/report.html, or before-after.png and curves.png; "
        f"then: python evaluate.py --ckpt {args.out}"
    )


LIKELY = 5  # codes that are shown for each token


@torch.no_grad()
def write_picture(model, tokenizer, cond, cond_mask, cfg_scale, temperature):
    """How the model writes a picture, for `report.save_writers`, from cond (1, ...) and cond_mask (1, P)."""
    noise = image_noise([0], model.config.num_tokens, 7)
    tokens, _ = model.generate(cond, cond_mask, cfg_scale=cfg_scale, temperature=temperature, noise=noise)
    logp = log_policy(model, Rollout(cond, cond_mask, tokens, None), cfg_scale, temperature)  # (1, T, V)
    shares, likely = logp[0].exp().topk(LIKELY)  # (T, LIKELY)
    T, device = model.config.num_tokens, tokens.device
    side = math.isqrt(T)
    M = 1 + (T if T <= 64 else 8)  # moments: a large tokenizer takes a second for each on a CPU
    moments = torch.linspace(0, T, M, device=device).round().long()[:, None]  # (M, 1)
    frames = decode_beginnings(tokenizer, tokens, moments, tokens[0, (moments - 1).clamp(min=0)])
    written = (torch.arange(T, device=device) < moments).view(-1, 1, side, side).float()
    written = torch.nn.functional.interpolate(written, frames.shape[2:], mode="nearest")
    frames = frames * written + 0.5 * (1 - written)  # grey where nothing is written yet
    patches = None
    if T <= 64:
        place = torch.arange(T, device=device).repeat_interleave(LIKELY)
        pictures = decode_beginnings(tokenizer, tokens, place[:, None], likely.view(-1, 1))  # (T * LIKELY, 3, H, W)
        cells = pictures.unflatten(2, (side, -1)).unflatten(4, (side, -1))  # (T * LIKELY, 3, side, px, side, px)
        every = torch.arange(len(place), device=device)
        patches = cells[every, :, place // side, :, place % side]  # (T * LIKELY, 3, px, px)
    return dict(tokens=tokens[0], likely=likely, shares=shares, frames=frames, patches=patches)


def decode_beginnings(tokenizer, tokens, lengths, codes):
    """
    Pictures (n, 3, H, W) in [0, 1] of the first `lengths` (n, 1) of tokens (1, T). The decoder sees all cells at once,
    so it gets `codes` (n, 1) in those that are not written yet.
    """
    places = torch.arange(tokens.shape[1], device=tokens.device)
    beginnings = torch.where(places < lengths, tokens, codes)  # (n, T)
    return to_unit(torch.cat([tokenizer.decode(part) for part in beginnings.split(16)]))


# ---------------------------------------------------------------------------------------------------------------
# The command line


def add_sampling_flags(add):
    """The flags that sample.py and evaluate.py share: how tokens are drawn, and which pictures are kept."""
    add("--temperature", type=float, help="divides the logits; 0 always takes the likeliest (default: what our own "
        "--ckpt was trained with, else 1)")  # fmt: skip
    add("--top-p", type=float, default=1.0, help="keep the likeliest tokens of this total mass (default 1, all)")
    add("--seed", type=int, default=0, help="seed of the random numbers that tokens are drawn with (default 0)")
    add("--batch-size", type=int, default=64, help="images generated at once; bounds memory (default 64)")
    add("--best-of", type=int, default=1, metavar="N", help="draw N candidates for each picture and keep the one with "
        "the highest weighted reward (default 1)")  # fmt: skip
    add("--rewards", help="judge=weight,... that score, and choose for --best-of (default: the toy's "
        "clip=1,realism=0.25, else clip)")  # fmt: skip
    add_judge_flags(add)


def check_sampling(args):
    """Raises Mistake unless the flags of sampling are in their ranges."""
    zoo.check_range(args, num=1, batch_size=1, cfg_scale=1, temperature=0, top_k=0, seed=0, best_of=1)
    if not 0 < args.top_p <= 1:  # also refuses NaN
        raise Mistake(f"--top-p must be above 0 and at most 1, not {args.top_p}")


def parse_args(argv=None):
    parser = zoo.script_parser(__doc__)
    add = parser.add_argument_group("what is drawn").add_argument
    zoo.add_model_flags(add)
    add("--ckpt", type=zoo.user_path, metavar="PATH", help="weights, or a folder that train.py wrote (default: the "
        "model's base)")  # fmt: skip
    add("--base", type=zoo.user_path, metavar="PATH", help="weights of the base for --compare (default: those that "
        "--ckpt began from)")  # fmt: skip
    add("--compare", nargs="*", type=zoo.user_path, metavar="PATH", help="draw the base too, and the policies of these "
        "folders or files, above the model of --ckpt, with the same seeds")  # fmt: skip
    add("--classes", nargs="+", metavar="CLASS", help="c2i: names or numbers (default: eight of them)")
    add("--prompts", nargs="+", metavar="TEXT", help="t2i: captions, or files of them")
    add("--num", type=int, default=4, help="images for each class or prompt (default 4)")
    add = parser.add_argument_group("how it is drawn").add_argument
    add("--cfg-scale", type=float, help="guidance; 1 is none (default: what our own --ckpt was trained with; toys 1, "
        "LlamaGen c2i 4.0, t2i 7.5)")  # fmt: skip
    add("--top-k", type=int, help="keep the k likeliest tokens; 0: all (default: toys 0, LlamaGen 2000 c2i, 1000 t2i)")
    add_sampling_flags(add)
    add = parser.add_argument_group("where it goes").add_argument
    add("--out", type=zoo.user_path, default="out/samples.png", help="file of the grid (default out/samples.png)")
    add("--npz", type=zoo.user_path, metavar="FILE.npz", help="file that gets --ckpt's uint8 images (n, H, W, 3) as "
        "arr_0, their tokens, and labels or prompts (default: none)")  # fmt: skip
    return resolve(parser.parse_args(argv))


def resolve(args):
    """Checks the flags and fills in what depends on others. Raises Mistake, OSError."""
    zoo.setup_device(args)
    if args.compare is not None and not args.ckpt:
        raise Mistake("--compare sets the model of --ckpt against its base, so it needs --ckpt")
    args.model, path, header = zoo.find_policy(args.ckpt, args.model, args.task)
    row = zoo.MODELS[args.model]
    zoo.check_tokenizer(args.model, header, args.vq_ckpt)
    args.dtype = args.dtype or zoo.quick_dtype(args.model, args.device)
    args.policies = compared_policies(args, header)
    prefix = f"{Path(args.ckpt).name}: " if args.compare else "tuned: " if args.policies else ""
    args.policies.append((prefix, path, args.text_pad or header["text_pad"]))
    args.cfg_scale = header["cfg_scale"] if args.cfg_scale is None else args.cfg_scale
    args.temperature = header["temperature"] if args.temperature is None else args.temperature
    args.top_k = row.top_k if args.top_k is None else args.top_k
    check_sampling(args)
    args.rewards = parse_rewards(args.rewards or row.best_by) if args.best_of > 1 else {}
    args.judge_options = judge_options(args, args.model)
    prompts = read_prompts(args.model, args.classes, args.prompts)
    args.prompts = [prompt for prompt in prompts for _ in range(args.num)]
    check_outputs(args)
    return args


def compared_policies(args, header):
    """[(prefix of its labels, weights, padding)] of the base and of those that --compare names. Raises Mistake."""
    if args.compare is None:
        return []
    places = [("base: ", zoo.base_of(args.model, header, args.base))]
    places += [(f"{Path(place).name}: ", place) for place in args.compare]
    policies = []
    for prefix, place in places:
        _, path, own_header = zoo.find_policy(place, args.model)
        zoo.check_tokenizer(args.model, own_header, args.vq_ckpt)
        policies.append((prefix, path, own_header["text_pad"]))  # as it was trained
    return policies


def check_outputs(args):
    """Raises Mistake or OSError if --out or --npz cannot be written: now, not after the drawing."""
    if args.out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise Mistake(f"--out {args.out}: the grid's name ends in .png, .jpg or .webp")
    zoo.make_folder(args.out.parent)
    if not args.npz:
        return
    if args.npz.suffix != ".npz":
        raise Mistake(f"--npz {args.npz}: its name ends in .npz")
    zoo.make_folder(args.npz.parent)
    if args.npz.exists():
        with zoo.reading(args.npz, "choose another name for --npz"), np.load(args.npz) as old:
            old["tokens"]  # which all files of ours have


def run(args):
    tokenizer = zoo.load_tokenizer(args.model, args.vq_ckpt, args.device)
    encode = load_encoder(args.model, args.text_encoder, args.device, args.prompts)
    options = dict(seed=args.seed, batch_size=args.batch_size, dtype=args.dtype, progress=True)
    options |= dict(cfg_scale=args.cfg_scale, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    captions = captions_of(args.model, args.prompts)
    judges = load_judges(args.rewards, args.device, args.judge_options)
    images, labels, seconds = [], [], 0
    for prefix, path, pad in args.policies:
        model = zoo.load_model(args.model, path, args.device, args.compile)
        padded = partial(encode, pad=pad)
        began = time.perf_counter()
        own_images, tokens = draw_best(
            args.best_of, judges, args.rewards, captions, model, tokenizer, padded, args.prompts, **options
        )
        seconds += time.perf_counter() - began
        images.append(own_images)
        labels.append(label_images(args.model, own_images, captions, prefix))
        del model  # before the next one: two of the large ones may not fit
    if args.npz:  # of the last policy, --ckpt
        key = "labels" if zoo.MODELS[args.model].config.task == "c2i" else "prompts"
        pixels = to_uint8(own_images * 2 - 1).permute(0, 2, 3, 1).numpy()
        arrays = {"arr_0": pixels, "tokens": tokens.numpy(), key: np.array(args.prompts)}
        zoo.write_whole(args.npz, partial(np.savez, **arrays))
        parallel.say(f"{args.npz}: arr_0 {pixels.shape} uint8, tokens {tuple(tokens.shape)}, {key}")
    # a row of the grid holds the --num pictures of one prompt, or of several
    columns = min(len(captions), args.num * max(1, 8 // args.num))
    chosen = f", best of {args.best_of}" if args.best_of > 1 else ""
    title = f"{args.model}, cfg {args.cfg_scale:g}, seed {args.seed}{chosen}"
    report.save_grid(args.out, *report.interleave(images, labels, columns), columns, title)
    drawn = len(captions) * len(images)
    pace = drawn * args.best_of / seconds
    parallel.say(f"{args.out}: {drawn} pictures of {title}, drawn at {pace:.1f} pictures/s")


def main(argv=None):
    zoo.run_script(parse_args, run, argv)


if __name__ == "__main__":
    main()
