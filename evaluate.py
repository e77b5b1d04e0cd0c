"""
How good is a policy, next to the base it came from? In the toy world, where truth is known, and by judges elsewhere.

    python evaluate.py --ckpt out/c2i              # base and tuned side by side, at cfg 1 and 2
    python evaluate.py --ckpt out/seed0 out/seed1  # several policies of one model beside their base
    python evaluate.py --task t2i --num 512        # the base alone
    python evaluate.py --ckpt out/llamagen-b-256 --classes goldfish rooster --num 64 --rewards clip

    right         share of pictures that the verifier accepts (data.py), in all and by shape (c2i) or category (t2i)
    rewards       mean score of each judge
    entropy       nats per token, of the conditional model on its own samples: how undecided the policy still is
    Frechet       distance of Gaussians fitted to features of samples and of fresh renders (arXiv 1706.08500)
    precision     share of samples that lie among the renders; recall: of renders among the samples (arXiv 1904.06991)

Features are the toy CLIP's, so these three numbers compare with each other and with nothing else. The last column
is renders that went through the tokenizer and back: what a perfect transformer would score. For LlamaGen, which has no
verifier and no renders, rewards and entropy are measured.

Writes a Markdown table (printed too) and JSON next to the checkpoint.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch

import data
from grpo import token_logprobs
from model import MODELS, autocast, is_toy, load_model
from rewards import add_judge_flags, clip_image_features, judge_options, load_clip, load_judges, parse_rewards, score
from sample import (
    add_model_flags,
    captions_of,
    draw,
    header_of,
    load_around,
    padding_for,
    read_asked,
    resolve_ckpt,
    run_script,
    settle_precision,
)
from tokenizer import to_unit


def fixed_asked(name, n):
    """The n labels or captions that every evaluation of the model `name` uses: all in turn."""
    config = MODELS[name].config
    return [k % config.num_classes for k in range(n)] if config.task == "c2i" else data.balanced_captions(n)


def verifier_accuracy(images, captions, task):
    """{"all": share right, and by shape (c2i) or category (t2i); for t2i "all" is the mean over categories}."""
    right = np.array([data.satisfies(image, caption) for image, caption in zip(images, captions, strict=True)])
    kinds = np.array([data.parse(c)[0][0][2] if task == "c2i" else data.category_of(c) for c in captions])
    order = data.SHAPES if task == "c2i" else data.CATEGORIES
    parts = {kind: float(right[kinds == kind].mean()) for kind in order if (kinds == kind).any()}
    return {"all": float(right.mean() if task == "c2i" else np.mean(list(parts.values())))} | parts


def frechet_distance(a, b):
    """
    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2) of features a (n, E) and b (m, E), float64 (arXiv 1706.08500).
    """
    from scipy.linalg import sqrtm

    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(cov_a @ cov_b).real  # imaginary parts are rounding
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root))


def precision_recall(samples, renders, k=3):
    """
    Improved precision and recall (arXiv 1904.06991, eq. 1-2) of features (n, E) and (m, E): a point lies among a set
    if it is no farther from some member than that member is from its k-th nearest fellow.
    """
    samples, renders = torch.as_tensor(samples), torch.as_tensor(renders)
    across = torch.cdist(samples, renders)  # (n, m)
    reach_of_renders = torch.cdist(renders, renders).kthvalue(k + 1, dim=1).values  # k + 1: itself is the first
    reach_of_samples = torch.cdist(samples, samples).kthvalue(k + 1, dim=1).values
    precision = (across <= reach_of_renders[None]).any(1).double().mean()
    recall = (across <= reach_of_samples[:, None]).any(0).double().mean()
    return float(precision), float(recall)


@torch.no_grad()
def mean_rewards(images, captions, judges, device="cpu", batch_size=256):
    """
    {judge: mean score} of images (n, 3, H, W) in [0, 1]. Scores that are not finite are left out and their share is
    told; a judge without any has no mean.
    """
    scores = {}
    for k in range(0, len(images), batch_size):
        part = images[k : k + batch_size].to(device)
        for judge, values in score(judges, part, captions[k : k + batch_size])[0].items():
            scores.setdefault(judge, []).append(values)
    figures = {}
    for judge, values in scores.items():
        values = torch.cat(values)
        finite = values[values.isfinite()]
        figures |= {f"reward: {judge}": finite.mean().item()} if len(finite) else {}
        missing = 1 - len(finite) / len(values)
        figures |= {f"missing: {judge}": missing} if missing else {}
    return figures


@torch.no_grad()
def clip_features(clip, images):
    """The toy CLIP's features (n, E), float64, of images (n, 3, 64, 64) in [0, 1]."""
    return torch.cat([clip_image_features(clip, part) for part in images.split(256)]).double().numpy()


def toy_metrics(task, images, captions, clip, renders_features):
    """What only the toy world can say of images (n, 3, 64, 64) in [0, 1], as {name of metric: figure}."""
    features, accuracy = clip_features(clip, images), verifier_accuracy(images, captions, task)
    figures = {f"right: {kind}": share for kind, share in accuracy.items()}
    figures["Frechet x 1000"] = 1000 * frechet_distance(features, renders_features)  # unit features: it is small
    figures["precision"], figures["recall"] = precision_recall(features, renders_features)
    return figures


@torch.no_grad()
def mean_entropy(model, encode, asked, tokens, batch_size=64, dtype="float32"):
    """Entropy of the conditional model, nats per token, over its own samples tokens (n, T)."""
    total = 0.0
    for k in range(0, len(asked), batch_size):
        cond, cond_mask = encode(asked[k : k + batch_size])
        with autocast(cond.device, dtype):
            _, entropy = token_logprobs(model, cond, tokens[k : k + batch_size].to(cond.device), cond_mask)  # (n, T)
        total += entropy.mean(1).sum().item()
    return total / len(asked)


def as_table(columns):
    """A Markdown table of {column: {metric: figure}}; a metric that a column lacks is left blank."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for metric in dict.fromkeys(metric for figures in columns.values() for metric in figures):
        form = "{:.1%}" if metric.startswith(("right", "missing")) else "{:.3f}"
        cells = [form.format(figures[metric]) if metric in figures else "" for figures in columns.values()]
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_results(out, facts, columns):
    """Writes NAME.md and NAME.json of the columns so far, and returns the table."""
    tuned = ", ".join(facts["tuned"]) or "none"
    head = f"{facts['model']}, {facts['num']} samples a column, seed {facts['seed']}; tuned: {tuned}"
    table = f"{head}\n\n{as_table(columns)}\n"
    out.with_name(out.name + ".json").write_text(json.dumps(facts | dict(columns=columns), indent=1) + "\n")
    out.with_name(out.name + ".md").write_text(table)
    return table


def free_name(folder):
    """FOLDER/evaluation, or with -2, -3, ... behind it: the table of a large model takes hours to make again."""
    names = (folder / f"evaluation{f'-{k}' if k > 1 else ''}" for k in itertools.count(1))
    return next(name for name in names if not name.with_name(name.name + ".json").exists())


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add_model_flags(add)
    add(
        "--ckpt",
        nargs="+",
        metavar="PATH",
        default=[],
        help="weights, or folders that train.py wrote, all of one model (default: only the base)",
    )
    add("--base", metavar="PATH", help="weights of the base (default: the model's own)")
    add("--classes", nargs="+", metavar="CLASS", help="c2i: only these, names or numbers, in turn (default: all)")
    add("--prompts", nargs="+", metavar="TEXT", help="t2i: captions or files of them, in turn (the toy has its own)")
    add("--num", type=int, default=1024, help="pictures for each column (default 1024: standard error 1.5 points)")
    add(
        "--cfg-scale",
        type=float,
        nargs="+",
        help="guidance to sample with (default: 1 and what the first --ckpt was trained with, or 2 if that is 1)",
    )
    add("--rewards", help="judges to report (default: clip,critic for the toys, else clip)")
    add("--seed", type=int, default=0, help="of sampling; the renders' is another (default 0)")
    add("--batch-size", type=int, default=64, help="images at once (default 64)")
    add(
        "--out",
        help="FOLDER/NAME of the .md and .json (default: evaluation, -2, ... beside the first --ckpt, else in out)",
    )
    add_judge_flags(parser)
    args = parser.parse_args(argv)
    if args.num < 1 or args.batch_size < 1 or not 0 <= args.seed < 2**63:
        parser.error("needed: --num >= 1, --batch-size >= 1, 0 <= --seed < 2^63")
    if not all(1 <= scale < np.inf for scale in args.cfg_scale or []):  # also refuses NaN
        parser.error("needed: --cfg-scale >= 1")
    return args


def run(args):
    settle_precision(args)
    name, _ = resolve_ckpt(args.ckpt[0] if args.ckpt else None, args.model, args.task)
    paths = [resolve_ckpt(ckpt, name, args.task)[1] for ckpt in args.ckpt]
    row, device, toy = MODELS[name], args.device, is_toy(name)
    if toy and args.num < 48:
        raise ValueError("--num must be at least 48: Frechet distance, precision and recall mean nothing for fewer")
    if args.classes or args.prompts or (row.config.task == "t2i" and not toy):
        pool = read_asked(name, args.classes, args.prompts)
        asked = [pool[k % len(pool)] for k in range(args.num)]
    else:
        asked = fixed_asked(name, args.num)
    captions = captions_of(name, asked)
    tokenizer, encode = load_around(name, args)
    judges = load_judges(
        parse_rewards(args.rewards or ("clip,critic" if toy else "clip")), device, judge_options(args, name)
    )
    ours = header_of(paths[0]) if paths else {}
    if not args.cfg_scale:
        trained_with = float(ours.get("cfg_scale", row.cfg_scale))
        args.cfg_scale = [1.0, trained_with if trained_with > 1 else 2.0]
    beside = paths[0].parent if ours else Path("out")  # beside a policy of ours, but not in weights/ or the hub's cache
    out = Path(args.out) if args.out else free_name(beside)
    if not out.name:
        raise ValueError(f"--out {args.out}: FOLDER/NAME is needed, for NAME.md and NAME.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    facts = dict(model=name, tuned=[str(path) for path in paths], num=args.num, seed=args.seed)

    if toy:
        clip, _ = load_clip()
        renders = torch.from_numpy(data.render(captions, np.random.default_rng([args.seed, 1])))
        renders_features = clip_features(clip, renders)
    columns = {}  # (cfg, name): {metric: figure}
    several = len(paths) > 1
    policies = [("base", resolve_ckpt(args.base, name, None)[1])] + [
        (f"tuned {k}" if several else "tuned", p) for k, p in enumerate(paths, 1)
    ]
    for which, path in policies:
        model = load_model(name, path, device)
        encode.pad = padding_for(path, args.text_pad if path in paths or not paths else None)
        for cfg in args.cfg_scale:
            images, tokens = draw(
                model, tokenizer, encode, asked, args.seed, args.batch_size, dtype=args.dtype, cfg_scale=cfg
            )
            figures = toy_metrics(row.config.task, images, captions, clip, renders_features) if toy else {}
            figures |= mean_rewards(images, captions, judges, device, args.batch_size)
            figures["entropy"] = mean_entropy(model, encode, asked, tokens, args.batch_size, args.dtype)
            columns[cfg, f"{which}, cfg {cfg:g}"] = figures
            ordered = sorted(columns, key=lambda column: column[0])  # base and tuned of one cfg side by side
            by_name = {column[1]: columns[column] for column in ordered}
            table = write_results(out, facts, by_name)  # each time: a column of a large model takes hours
        del model  # before the next one: two of the large ones may not fit
    if toy:
        fresh = torch.from_numpy(data.render(captions, np.random.default_rng([args.seed, 2]))) * 2 - 1
        with torch.no_grad():
            trips = [tokenizer.decode(tokenizer.encode(part.to(device))).cpu() for part in fresh.split(256)]
        trips = to_unit(torch.cat(trips))
        figures = toy_metrics(row.config.task, trips, captions, clip, renders_features)
        figures |= mean_rewards(trips, captions, judges, device, args.batch_size)
        table = write_results(out, facts, by_name | {"renders, round trip": figures})
    print(table + f"\n{out}.md and .json")


def main(argv=None):
    run_script("evaluate.py", run, parse_args(argv), "lower --batch-size")


if __name__ == "__main__":
    main()
