"""
How good is a policy, next to the base it came from? For the toy world, where truth is known.

    python evaluate.py --ckpt out/c2i              # base and tuned side by side, at cfg 1 and 2
    python evaluate.py --ckpt out/seed0 out/seed1  # several policies of one model beside their base
    python evaluate.py --task t2i --num 512        # the base alone

    right         share of pictures that the verifier accepts (data.py), in all and by shape (c2i) or category (t2i)
    rewards       mean score of each judge
    entropy       nats per token, of the conditional model on its own samples: how undecided the policy still is
    Frechet       distance of Gaussians fitted to features of samples and of fresh renders (arXiv 1706.08500)
    precision     share of samples that lie among the renders; recall: of renders among the samples (arXiv 1904.06991)

Features are the toy CLIP's, so these three numbers compare with each other and with nothing else. The last column
is renders that went through the tokenizer and back: what a perfect transformer would score.

Writes a Markdown table (printed too) and JSON next to the checkpoint.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

import data
from grpo import token_logprobs
from model import MODELS, check_device, load_model
from rewards import add_judge_flags, clip_image_features, judge_options, load_clip, load_judges, parse_rewards, score
from sample import captions_of, draw, make_encoder, resolve_ckpt
from tokenizer import load_tokenizer


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
def measure(name, images, captions, judges, clip, renders_features, device):
    """The metrics of images (n, 3, 64, 64) in [0, 1] as {name of metric: figure}."""
    features = torch.cat([clip_image_features(clip, part) for part in images.split(256)]).double().numpy()
    accuracy = verifier_accuracy(images, captions, MODELS[name].config.task)
    figures = {f"right: {kind}": share for kind, share in accuracy.items()}
    scores = {}
    for k in range(0, len(images), 256):
        for judge, values in score(judges, images[k : k + 256].to(device), captions[k : k + 256])[0].items():
            scores.setdefault(judge, []).append(values.cpu())
    figures |= {f"reward: {judge}": float(torch.cat(values).nanmean()) for judge, values in scores.items()}
    figures["Frechet x 1000"] = 1000 * frechet_distance(features, renders_features)  # unit features: it is small
    figures["precision"], figures["recall"] = precision_recall(features, renders_features)
    return figures


@torch.no_grad()
def mean_entropy(model, encode, asked, tokens, batch_size=64):
    """Entropy of the conditional model, nats per token, over its own samples tokens (n, N)."""
    total = 0.0
    for k in range(0, len(asked), batch_size):
        cond, cond_mask = encode(asked[k : k + batch_size])
        _, entropy = token_logprobs(model, cond, tokens[k : k + batch_size].to(cond.device), cond_mask)  # (n, N)
        total += entropy.mean(1).sum().item()
    return total / len(asked)


def as_table(columns):
    """A Markdown table of {column: {metric: figure}}; a metric that a column lacks is left blank."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for metric in dict.fromkeys(metric for figures in columns.values() for metric in figures):
        form = "{:.1%}" if metric.startswith("right") else "{:.3f}"
        cells = [form.format(figures[metric]) if metric in figures else "" for figures in columns.values()]
        lines.append(f"| {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--task", choices=("c2i", "t2i"), help="(default: what --ckpt is, else c2i)")
    add("--model", choices=MODELS, help="a row of the model table (default: the task's toy)")
    add(
        "--ckpt",
        nargs="+",
        metavar="PATH",
        default=[],
        help="weights, or folders that train.py wrote, all of one model (default: only the base)",
    )
    add("--num", type=int, default=1024, help="pictures for each column (default 1024: standard error 1.5 points)")
    add("--cfg-scale", type=float, nargs="+", default=[1.0, 2.0], help="guidance to sample with (default 1 and 2)")
    add("--rewards", default="clip,critic", help="judges to report (default clip,critic)")
    add("--seed", type=int, default=0, help="of sampling; the renders' is another (default 0)")
    add("--batch-size", type=int, default=64, help="images at once (default 64)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: the GPU if there is one")
    add("--out", help="where to write NAME.md and NAME.json (default: evaluation beside the first --ckpt, else in out)")
    add_judge_flags(parser)
    args = parser.parse_args(argv)
    if args.num < 48 or min(args.cfg_scale) < 1 or args.batch_size < 1:
        parser.error("needed: --num >= 48, --cfg-scale >= 1, --batch-size >= 1")
    return args


def run(args):
    check_device(args.device)
    name, _ = resolve_ckpt(args.ckpt[0] if args.ckpt else None, args.model, args.task)
    paths = [resolve_ckpt(ckpt, name, args.task)[1] for ckpt in args.ckpt]
    row, device = MODELS[name], args.device
    weights = parse_rewards(args.rewards)
    tokenizer, encode = load_tokenizer(row.tokenizer, row.vq_ckpt, device), make_encoder(name, device)
    judges, (clip, _) = load_judges(weights, device, judge_options(args, name)), load_clip()  # features: on the CPU
    asked = fixed_asked(name, args.num)
    captions = captions_of(name, asked)

    renders = torch.from_numpy(data.render(captions, np.random.default_rng([args.seed, 1])))
    with torch.no_grad():
        renders_features = torch.cat([clip_image_features(clip, part) for part in renders.split(256)]).double().numpy()
    columns = {}
    several = len(paths) > 1
    for which, path in [("base", None)] + [(f"tuned {k}" if several else "tuned", p) for k, p in enumerate(paths, 1)]:
        model = load_model(name, path, device)
        for cfg in args.cfg_scale:
            images, tokens = draw(model, tokenizer, encode, asked, args.seed, args.batch_size, cfg_scale=cfg)
            figures = measure(name, images, captions, judges, clip, renders_features, device)
            figures["entropy"] = mean_entropy(model, encode, asked, tokens, args.batch_size)
            columns[f"{which}, cfg {cfg:g}"] = figures
    fresh = torch.from_numpy(data.render(captions, np.random.default_rng([args.seed, 2]))) * 2 - 1
    with torch.no_grad():
        trips = [tokenizer.decode(tokenizer.encode(part.to(device))).cpu() for part in fresh.split(256)]
    trips = (torch.cat(trips) / 2 + 0.5).clamp(0, 1)
    columns["renders, round trip"] = measure(name, trips, captions, judges, clip, renders_features, device)

    order = sorted(columns, key=lambda c: c.split("cfg")[-1])  # base and tuned of one cfg side by side
    head = f"{name}, {args.num} samples a column, seed {args.seed}; tuned: {', '.join(map(str, paths)) or 'none'}"
    table = f"{head}\n\n{as_table({c: columns[c] for c in order})}\n"
    out = Path(args.out) if args.out else (paths[0].parent if paths else Path("out")) / "evaluation"
    out.parent.mkdir(parents=True, exist_ok=True)
    facts = dict(model=name, tuned=[str(path) for path in paths], num=args.num, seed=args.seed, columns=columns)
    out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    out.with_suffix(".md").write_text(table)
    print(table + f"\n{out.with_suffix('.md')} and .json")


def main(argv=None):
    args = parse_args(argv)
    try:
        run(args)
    except (OSError, ValueError) as error:  # what the user can mend, in one sentence; anything else is our bug
        sys.exit(f"evaluate.py: {error}")


if __name__ == "__main__":
    main()
