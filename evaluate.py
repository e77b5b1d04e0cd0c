"""
How good is a policy, next to the base it came from? In the toy world, where truth is known, and by judges elsewhere.

    python evaluate.py --ckpt out/c2i              # base and tuned side by side, at cfg 1 and 2
    python evaluate.py --ckpt out/seed0 out/seed1  # several policies of one model beside their base
    python evaluate.py --task t2i --num 512        # the base alone
    python evaluate.py --ckpt out/llamagen-b-256 --classes goldfish rooster --num 64 --rewards clip

    right         share of pictures that the verifier accepts (data.py), in all and by shape (c2i) or category (t2i)
    rewards       mean value of each judge
    entropy       nats per token, of the conditional model on its own samples: how undecided the policy still is
    Frechet       distance of Gaussians fitted to features of samples and of fresh renders (arXiv 1706.08500)
    precision     share of samples that look like some render; recall: of renders that look like some sample
                  (arXiv 1904.06991)

The last three are given twice: in features of the toy CLIP, which is also a judge, and in the latents of the
tokenizer's encoder, which no reward sees. They compare with each other and with nothing else. The last column is
renders that went through the tokenizer and back: what a perfect transformer would reach. LlamaGen has no verifier and
no renders, so rewards and entropy are measured.

Writes a Markdown table, which is printed too, and JSON next to the checkpoint.

Shapes: n pictures, m renders, E features per picture, T image tokens.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # else Ctrl-C amid the imports below ends in their traceback

import itertools
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch

import data
import zoo
from data import Mistake
from grpo import token_logprobs
from rewards import (
    add_judge_flags,
    clip_image_features,
    judge_images,
    judge_options,
    load_clip,
    load_judges,
    parse_rewards,
)
from sample import draw
from tokenizer import to_unit


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
    Improved precision and recall (arXiv 1904.06991, eq. 1-2) of features samples (n, E) and renders (m, E).

    Around each render lies a ball that reaches to its k-th nearest other render. Precision is the share of samples that
    lie in at least one of these balls. Recall is the same with the roles exchanged: the share of renders that lie in a
    ball around a sample.
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
    {"reward: JUDGE": mean value} of images (n, 3, H, W) in [0, 1]. Values that are not finite are left out, and
    "missing: JUDGE" is their share; a judge that has no other values has no mean.
    """
    judged = {}
    for k in range(0, len(images), batch_size):
        part = images[k : k + batch_size].to(device)
        for judge, values in judge_images(judges, part, captions[k : k + batch_size])[0].items():
            judged.setdefault(judge, []).append(values)
    figures = {}
    for judge, values in judged.items():
        values = torch.cat(values)
        finite = values[values.isfinite()]
        figures |= {f"reward: {judge}": finite.mean().item()} if len(finite) else {}
        missing = 1 - len(finite) / len(values)
        figures |= {f"missing: {judge}": missing} if missing else {}
    return figures


@torch.no_grad()
def features_of(images, networks):
    """{name: features (n, E), float64} of images (n, 3, 64, 64) in [0, 1]; networks: {name: images -> (n, E)}."""
    parts = images.split(256)
    return {name: torch.cat([f(part) for part in parts]).double().numpy() for name, f in networks.items()}


def toy_metrics(task, images, captions, networks, of_renders):
    """What only the toy world can say of images (n, 3, 64, 64) in [0, 1], as {name of metric: figure}."""
    figures = {f"right: {kind}": share for kind, share in data.share_right(images, captions, task).items()}
    for name, features in features_of(images, networks).items():
        figures[f"Frechet, {name}"] = frechet_distance(features, of_renders[name])
        pair = precision_recall(features, of_renders[name])
        figures[f"precision, {name}"], figures[f"recall, {name}"] = pair
    return figures


@torch.no_grad()
def mean_entropy(model, encode, asked, tokens, batch_size=64, dtype="float32"):
    """Entropy of the conditional model, nats per token, over its own samples tokens (n, T)."""
    total = 0.0
    for k in range(0, len(asked), batch_size):
        cond, cond_mask = encode(asked[k : k + batch_size])
        with zoo.autocast(cond.device, dtype):
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


def write_results(args, columns):
    """
    Writes NAME.md and NAME.json of {(cfg, column): {metric: figure}}, so far as there are columns, and returns the
    table: columns of one cfg side by side, the renders last.
    """
    by_name = {name: columns[cfg, name] for cfg, name in sorted(columns, key=lambda column: column[0])}
    facts = dict(model=args.model, tuned=[str(path) for path in args.tuned], num=args.num, seed=args.seed)
    facts |= dict(temperature=args.temperature, base=str(args.policies[0][1]))
    tuned = ", ".join(facts["tuned"]) or "none"
    head = f"{args.model}, {args.num} samples per column, seed {args.seed}; tuned: {tuned}"
    table = f"{head}\n\n{as_table(by_name)}\n"
    for suffix, text in ((".json", json.dumps(facts | dict(columns=by_name), indent=1) + "\n"), (".md", table)):
        zoo.write_whole(args.out.with_name(args.out.name + suffix), lambda path, text=text: path.write_text(text))
    return table


def free_name(folder):
    """FOLDER/evaluation, or with -2, -3, ... behind it: never an older table, which may have taken hours."""
    names = (folder / f"evaluation{f'-{k}' if k > 1 else ''}" for k in itertools.count(1))
    return next(name for name in names if not name.with_name(name.name + ".json").exists())


def parse_args(argv=None):
    parser = zoo.script_parser(__doc__)
    add = parser.add_argument_group("what is evaluated").add_argument
    zoo.add_model_flags(add)
    add("--ckpt", nargs="+", metavar="PATH", default=[], help="weights, or folders that train.py wrote, all of one "
        "model (default: only the base)")  # fmt: skip
    add("--base", metavar="PATH", help="weights of the base (default: those that the first --ckpt began from)")
    add("--classes", nargs="+", metavar="CLASS", help="c2i: only these, names or numbers, in turn (default: all)")
    add("--prompts", nargs="+", metavar="TEXT", help="t2i: captions or files of them, in turn (the toy has its own)")
    add("--num", type=int, default=1024, help="pictures for each column (default 1024: standard error 1.5 points)")
    add("--cfg-scale", type=float, nargs="+", help="guidance to sample with (default: 1 and what the first --ckpt was "
        "trained with, or 2 if that is 1)")  # fmt: skip
    add(
        "--temperature", type=float, help="divides the logits (default: what the first --ckpt was trained with, else 1)"
    )
    add("--seed", type=int, default=0, help="seed of sampling; the renders have another (default 0)")
    add("--batch-size", type=int, default=64, help="images generated at once; bounds memory (default 64)")
    add("--out", type=Path, help="FOLDER/NAME of the .md and .json (default: evaluation, -2, ... beside the first "
        "--ckpt, else in out)")  # fmt: skip
    add = parser.add_argument_group("judging").add_argument
    add("--rewards", help="judges to report (default: clip,realism for the toys, else clip)")
    add_judge_flags(add)
    return resolve(parser.parse_args(argv))


def resolve(args):
    """Fills in what the command line left open. Raises Mistake, OSError."""
    zoo.settle_device(args)
    args.model, _, header = zoo.find_policy(args.ckpt[0] if args.ckpt else None, args.model, args.task)
    args.task, toy = zoo.MODELS[args.model].config.task, zoo.is_toy(args.model)
    # --text-pad is what --ckpt was trained with; of the base only where it is evaluated alone
    _, base, base_header = zoo.find_policy(args.base or header["base"], args.model)
    args.policies = [("base", base, (args.text_pad if not args.ckpt else None) or base_header["text_pad"])]
    for k, ckpt in enumerate(args.ckpt, 1):
        _, path, own_header = zoo.find_policy(ckpt, args.model)
        name = f"tuned {k}" if len(args.ckpt) > 1 else "tuned"
        args.policies.append((name, path, args.text_pad or own_header["text_pad"]))
    args.tuned = [path for _, path, _ in args.policies[1:]]
    if not args.cfg_scale:
        args.cfg_scale = [1.0, header["cfg_scale"] if header["cfg_scale"] > 1 else 2.0]
    args.temperature = header["temperature"] if args.temperature is None else args.temperature
    # Frechet distance, precision and recall mean nothing for fewer than 48
    zoo.check_range(args, num=48 if toy else 1, batch_size=1, cfg_scale=1, temperature=0, seed=0)
    args.judge_weights = parse_rewards(args.rewards or ("clip,realism" if toy else "clip"))
    args.judge_options = judge_options(args, args.model)
    if args.classes or args.prompts or (args.task == "t2i" and not toy):
        pool = zoo.read_asked(args.model, args.classes, args.prompts)
        args.asked = [pool[k % len(pool)] for k in range(args.num)]
    else:
        args.asked = zoo.fixed_asked(args.model, args.num)
    # beside a policy of ours, but not in weights/ or in the hub's cache
    folder = args.tuned[0].parent if args.tuned and header["step"] else Path("out")
    args.out = free_name(args.out or folder) if args.out is None or args.out.is_dir() else args.out
    args.out = args.out.with_suffix("") if args.out.suffix in (".md", ".json") else args.out
    if not args.out.name:
        raise Mistake(f"--out {args.out}: FOLDER/NAME is needed, for NAME.md and NAME.json")
    zoo.make_folder(args.out.parent)
    return args


def run(args):
    tokenizer = zoo.load_tokenizer(args.model, args.vq_ckpt, args.device)
    encode = zoo.load_encoder(args.model, args.text_encoder, args.device)
    judges = load_judges(args.judge_weights, args.device, args.judge_options)
    captions, networks, of_renders = zoo.captions_of(args.model, args.asked), None, None
    if zoo.is_toy(args.model):
        eyes = zoo.load_tokenizer(args.model)  # the toy's own, whatever --vq-ckpt is: figures of all policies compare
        latents = lambda images: eyes.latents(images * 2 - 1).flatten(1)  # noqa: E731
        networks = {"CLIP": partial(clip_image_features, load_clip()[0]), "latents": latents}
        renders = torch.from_numpy(data.render(captions, np.random.default_rng([args.seed, 1])))
        of_renders = features_of(renders, networks)
    measure = partial(figures_of, args, captions, judges, networks, of_renders)
    columns = {}  # (cfg, name): {metric: figure}
    for which, path, pad in args.policies:
        model, padded = zoo.load_model(args.model, path, args.device), partial(encode, pad=pad)
        options = dict(batch_size=args.batch_size, dtype=args.dtype)
        for cfg in args.cfg_scale:
            sampling = dict(cfg_scale=cfg, temperature=args.temperature, progress=True)
            images, tokens = draw(model, tokenizer, padded, args.asked, args.seed, **options, **sampling)
            entropy = mean_entropy(model, padded, args.asked, tokens, **options)
            columns[cfg, f"{which}, cfg {cfg:g}"] = measure(images) | dict(entropy=entropy)
            table = write_results(args, columns)  # each time, because a column of a large model takes hours
        del model  # before the next one: two of the large ones may not fit
    if networks:
        columns[np.inf, "renders, round trip"] = measure(round_trips(tokenizer, captions, args))  # inf: the last column
        table = write_results(args, columns)
    print(f"{table}\n{args.out}.md and .json")


def figures_of(args, captions, judges, networks, of_renders, images):
    """{metric: figure} of images (n, 3, H, W) in [0, 1]; networks and of_renders are None except for a toy."""
    figures = toy_metrics(args.task, images, captions, networks, of_renders) if networks else {}
    return figures | mean_rewards(images, captions, judges, args.device, args.batch_size)


@torch.no_grad()
def round_trips(tokenizer, captions, args):
    """Fresh renders of captions through the tokenizer and back, (m, 3, 64, 64) in [0, 1]."""
    fresh = torch.from_numpy(data.render(captions, np.random.default_rng([args.seed, 2]))) * 2 - 1
    parts = [tokenizer.decode(tokenizer.encode(part.to(args.device))).cpu() for part in fresh.split(256)]
    return to_unit(torch.cat(parts))


def main(argv=None):
    zoo.run_script(parse_args, run, argv)


if __name__ == "__main__":
    main()
