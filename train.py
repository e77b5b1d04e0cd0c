"""
AR-GRPO (arXiv 2508.06924): reinforcement learning for an autoregressive image model, from sampling to update.

    python train.py --task c2i                        # toy classes, no download, minutes on a laptop
    python train.py --task t2i                        # toy captions
    python train.py --task c2i --resume               # go on with a run that was stopped
    python train.py --task c2i --rewards clip=1,critic=0.25,pyiqa:piqe=0.01 --kl-coef 0.1 --out out/mine
    python train.py --preset paper-c2i                # the paper's run: LlamaGen-XL at 384 px, its eight rewards
    python train.py --model llamagen-b-256            # the same with our own settings, and a smaller model

    max_pi  E[ reward(image) ] - beta KL(pi || pi_ref)      image = decode(tokens), tokens ~ pi(. | class or caption)

A folder of results (out/TASK): before.png, after.png, curves.png, metrics.jsonl (a line a step; the README explains
every entry), samples/ (the same prompts and seeds as training goes on), TensorBoard events, policy.safetensors and
state.pt for --resume.

Differences from the official code: the log-probabilities that are trained are those of the distribution that drew the
images (--score-cfg; see grpo.py), weights are float32, and every random number comes from (seed, step), so a
resumed run draws what the unbroken one would have drawn.

Shapes: B prompts a step, G = group_size samples each, N = B*G images, T image tokens, V codes.
"""

import argparse
import copy
import hashlib
import json
import mmap
import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

import data
from grpo import (
    decoupled_advantages,
    fill_missing,
    frozen_logprobs,
    group_advantages,
    grpo_loss,
    sample_groups,
    token_logprobs,
)
from model import MODELS, autocast, is_toy, load_model
from rewards import add_judge_flags, judge_options, load_judges, parse_rewards, score, weighted_sum
from sample import (
    add_model_flags,
    captions_of,
    draw,
    load_around,
    padding_for,
    read_asked,
    resolve_ckpt,
    run_script,
    save_grid,
    settle_precision,
)
from tokenizer import find_file, to_unit

# The paper's eight rewards. It gives them all weight 1 and scales them inside: the cosines by 5, MANIQA by 2, Qwen's
# answers by 1/4; here a judge keeps its own scale and the factor is its weight.
EIGHT = "clip=5,clip-step=1,hps=5,hps-step=1,maniqa=2,qwen-match=0.25,qwen-real=0.25,qwen-odd=0.25"

# What is set if neither the command line nor a preset says otherwise. The toys' figures were measured (README,
# "Results"); LlamaGen's are the release's, but where it is wrong (README, "Differences").
TOY = dict(
    steps=200, prompts_per_step=8, micro_batch=64, lr=2e-4, lr_schedule="linear", adam_beta2=0.95, kl_coef=0.04,
    cfg_scale=1.0, score_cfg="same",
)  # fmt: skip
LLAMAGEN = dict(
    micro_batch=8, lr=1e-5, lr_schedule="linear", adam_beta2=0.999, score_cfg="same", rewards=EIGHT,
)  # fmt: skip
DEFAULTS = {
    "toy-c2i": TOY | dict(steps=170, rewards="clip=1,critic=0.25"),
    "toy-t2i": TOY | dict(rewards="clip=1"),  # the critic knows single objects only
    "llamagen-c2i": LLAMAGEN | dict(steps=400, prompts_per_step=4, kl_coef=0.1, cfg_scale=2.0),
    "llamagen-t2i": LLAMAGEN | dict(steps=600, prompts_per_step=8, kl_coef=1.0, cfg_scale=4.0),
}
# What the official release ran; the command line still wins. "Script": the release's training script for the task;
# the author calls the scripts indicative.
PRESETS = {
    "paper-c2i": dict(
        model="llamagen-xl-384",  # paper: its main class-to-image model (B and L at 256 and 384 were trained too)
        rewards=EIGHT,  # paper and script: eight rewards of weight 1, their factors as above
        qwen_answer="json",  # script: Qwen writes JSON, which is parsed
        steps=400,  # script
        prompts_per_step=4,  # script: 4 GPUs x 8 images = 4 classes x 8
        group_size=8,  # paper and script
        lr=1e-5,  # script
        lr_schedule="constant",  # script: its schedule is in effect constant
        adam_beta2=0.999,  # script: AdamW's default
        kl_coef=0.1,  # script: beta
        cfg_scale=2.0,  # script: of the rollout; no top-k, no top-p
        score_cfg="1",  # code: log-probabilities of the conditional model, without guidance
        temperature=1.0,  # script
        clip_eps=0.2,  # script: epsilon
        updates_per_batch=1,  # script
        max_grad_norm=1.0,  # script
    ),
    "paper-t2i": dict(
        model="llamagen-t2i-xl-256",  # paper: XL, stage 1, 256 px
        rewards=EIGHT,  # paper and script, as for c2i
        qwen_answer="json",  # script
        steps=600,  # script
        prompts_per_step=8,  # script: 4 GPUs x 16 images = 8 captions x 8
        group_size=8,  # paper and script
        lr=1e-5,  # script
        lr_schedule="constant",  # script, as for c2i
        adam_beta2=0.999,  # script: AdamW's default
        kl_coef=1.0,  # script: ten times c2i's
        cfg_scale=4.0,  # script; the released weights were trained at 2.0, says the author
        score_cfg="1",  # code, as for c2i
        text_pad="right",  # code: the features are not moved to the left
        temperature=1.0,  # script
        clip_eps=0.2,  # script
        updates_per_batch=1,  # script
        max_grad_norm=1.0,  # script
    ),
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    # what is trained, on what
    add("--preset", choices=PRESETS, help="set what the official release used; flags beside it win")
    add_model_flags(add)
    add("--ckpt", metavar="PATH", help="start from these weights, also the KL's reference (default: the model's base)")
    add("--classes", nargs="+", metavar="CLASS", help="c2i: only these, names or numbers (default: all)")
    add("--prompts", nargs="+", metavar="TEXT", help="t2i: captions or files of them (the toy has its own)")
    # how many
    add("--steps", type=int, help="batches sampled and learned from (default: toys 170 and 200, LlamaGen 400 and 600)")
    add("--prompts-per-step", type=int, help="B (default 8; LlamaGen c2i 4, as the release)")
    add("--group-size", type=int, default=8, help="G, samples a prompt (default 8, the paper's)")
    add("--micro-batch", type=int, help="images a backward pass; changes memory, not the result (64; LlamaGen 8)")
    # sampling and scoring: one policy
    add("--temperature", type=float, default=1.0, help="of sampling and scoring (default 1, the paper's)")
    add("--cfg-scale", type=float, help="guidance while sampling; 1 is none (default: toys 1, c2i 2, t2i 4)")
    add("--score-cfg", help="guidance while scoring: 'same' (default), or a number; the release: 1")
    # judging
    add("--rewards", help="judge=weight,... (default: the toys' own; for LlamaGen the paper's eight)")
    add(
        "--reward-norm",
        choices=("sum", "each"),
        default="sum",
        help="sum: add the rewards, then normalise in the group (GRPO, default); each: normalise each first (GDPO)",
    )
    # learning
    add("--lr", type=float, help="AdamW's learning rate (default: toys 2e-4, LlamaGen 1e-5, the release's)")
    add("--adam-beta2", type=float, help="AdamW's second beta (default: toys 0.95, LlamaGen 0.999)")
    add(
        "--lr-schedule",
        choices=("linear", "constant"),
        help="linear (default): down to 0 over --steps, which takes the noise out again; constant: the release's",
    )
    add("--kl-coef", type=float, help="the paper's beta (default: toys 0.04; the release's 0.1 for c2i, 1.0 for t2i)")
    add("--clip-eps", type=float, default=0.2, help="epsilon of the clipped ratio (default 0.2, the paper's)")
    add("--updates-per-batch", type=int, default=1, help="above 1 the ratio leaves 1 and clipping acts (default 1)")
    add("--max-grad-norm", type=float, default=1.0, help="(default 1, the release's)")
    # bookkeeping
    add("--seed", type=int, default=0, help="of prompts and sampling (default 0)")
    add("--out", help="folder to write to (default out/TASK; LlamaGen: out/MODEL or out/PRESET-MODEL)")
    add("--sample-every", type=int, default=50, help="steps between grids of the same prompts and seeds (default 50)")
    add("--save-every", type=int, default=25, help="steps between saves for --resume (default 25)")
    add("--resume", action="store_true", help="go on with the run in --out, with the same flags")
    add_judge_flags(parser)
    args = parser.parse_args(argv)
    if args.preset:  # once more, with the preset's values in place of the defaults
        parser.set_defaults(**PRESETS[args.preset])
        args = parser.parse_args(argv)
    try:
        args.model, args.ckpt = resolve_ckpt(args.ckpt, args.model, args.task)
        args.task = MODELS[args.model].config.task
        family = f"{'toy' if is_toy(args.model) else 'llamagen'}-{args.task}"
        for name, value in DEFAULTS[family].items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        args.weights = parse_rewards(args.rewards)
        args.text_pad = padding_for(args.ckpt, args.text_pad)
        judge_options(args, args.model)  # here for its errors only
        try:
            args.score_cfg = args.cfg_scale if args.score_cfg == "same" else float(args.score_cfg)
        except ValueError:
            raise ValueError(f"--score-cfg is 'same' or a number, not {args.score_cfg!r}") from None
        settle_precision(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    official = args.model if args.preset is None else f"{args.preset}-{args.model}"
    args.out = Path(args.out or f"out/{args.task if is_toy(args.model) else official}")
    at_least = dict(steps=1, prompts_per_step=1, group_size=2, micro_batch=1, updates_per_batch=1, sample_every=1,
                    save_every=1, cfg_scale=1, score_cfg=1, kl_coef=0, clip_eps=0, seed=0)  # fmt: skip
    for name, least in at_least.items():
        if not least <= getattr(args, name) < 2**40:  # also refuses NaN and infinity
            parser.error(f"--{name.replace('_', '-')} must be at least {least} and finite")
    if not (0 < args.temperature < np.inf and 0 < args.lr < np.inf and args.max_grad_norm > 0):
        parser.error("--temperature, --lr and --max-grad-norm must be above 0, the first two finite")
    if not 0 < args.adam_beta2 < 1:
        parser.error("--adam-beta2 must be between 0 and 1")
    return args


# ---------------------------------------------------------------------------------------------------------------
# Bookkeeping


def lap(seconds, part, since, device):
    """Adds the time since `since` to seconds[part] and returns now. Waits for the GPU, whose work is asynchronous."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    now = time.perf_counter()
    seconds[part] = seconds.get(part, 0) + now - since
    return now


def peak_memory_gb(device):
    """GB at the worst moment so far: of the GPU, or of the process on a CPU. None on Windows, which cannot say."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def pick_prompts(args, pool, step):
    """The B labels or captions of a step, a function of (seed, step) alone. Distinct where a pool allows it."""
    rng = np.random.default_rng([args.seed, step])
    if pool is None:  # the toy's captions: every category equally often, and some captions twice
        return data.sample_captions(args.prompts_per_step, rng)
    picks = rng.choice(len(pool), args.prompts_per_step, replace=len(pool) < args.prompts_per_step)
    return [pool[k] for k in picks]


def write_whole(path, write):
    """
    write(temporary path), then a rename: a run that is killed, or a full disk, leaves the old file or the new.
    Raises OSError.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (RuntimeError, SafetensorError) as error:  # what torch and safetensors make of a full disk
        raise OSError(f"{path} could not be written ({str(error).splitlines()[0]}); is the disk full?") from None
    finally:
        temporary.unlink(missing_ok=True)  # a full disk need not stay full


def save_policy(args, policy, step):
    state = {name: value.detach().contiguous() for name, value in policy.state_dict().items()}
    # sample.py and evaluate.py read from the header which model this is, how it was asked and with what guidance
    header = dict(format="pt", model=args.model, step=str(step), text_pad=args.text_pad, cfg_scale=str(args.cfg_scale))
    write_whole(args.out / "policy.safetensors", lambda path: save_file(state, path, metadata=header))


def flags_that_matter(args):
    """The flags that a resumed run must share with the first to draw the same curve."""
    free = ["out", "resume", "device", "sample_every", "save_every", "micro_batch"]
    free += ["reward_weights", "qwen_server", "judge_batch"]  # where the judges are, not what they say
    free += ["steps"] if args.lr_schedule == "constant" else []  # with "linear" it sets every step's learning rate
    return {name: str(value) for name, value in vars(args).items() if name not in free}


def file_hash(path):
    """sha256 of a file that may be larger than memory."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return hashlib.sha256(content).hexdigest()


def save_state(args, policy, optimizer, step, base):
    """
    state.pt: all that --resume needs. Random state is not in it because (seed, step) is all the random state; of the
    base only its file_hash, `base`.
    """
    state = dict(step=step, flags=flags_that_matter(args), base=base)
    state |= dict(policy=policy.state_dict(), optimizer=optimizer.state_dict())
    write_whole(args.out / "state.pt", lambda path: torch.save(state, path))


def load_state(args, policy, optimizer, base):
    """Restores policy and optimizer and returns the next step. Raises FileNotFoundError, or ValueError."""
    path = args.out / "state.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: nothing to resume; leave out --resume to start a run in {args.out}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # AdamW wants its step counters there
        step, flags, began_with = state["step"], state["flags"], state["base"]
    except Exception as error:  # torch raises half a dozen kinds for a file that is not whole
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}); start again in another --out, from the base or with "
            f"--ckpt {args.out} from the last policy"
        ) from None
    now = flags_that_matter(args)
    for name, value in flags.items():
        if name in now and now[name] != value:  # --steps is among them with one schedule only
            raise ValueError(
                f"--{name.replace('_', '-')} is {now.get(name)}, but the run in {args.out} began with {value}"
            )
    if began_with != base:
        raise ValueError(
            f"the base ({args.ckpt or args.model}) has changed since the run in {args.out} began; bring back the old "
            f"weights, or start again in another --out"
        )
    if step > args.steps:
        raise ValueError(f"the run in {args.out} has done {step} steps already; --steps counts them all")
    policy.load_state_dict(state["policy"])
    optimizer.load_state_dict(state["optimizer"])
    lines = (args.out / "metrics.jsonl").read_text().splitlines(keepends=True)
    write_whole(args.out / "metrics.jsonl", lambda path: path.write_text("".join(lines[:step])))
    return step


def draw_grid(args, path, model, tokenizer, encode, judges, asked, title):
    """The captioned grid: the same prompts and seeds each time, below each picture what the judges say of it."""
    sampling = dict(cfg_scale=args.cfg_scale, temperature=args.temperature, dtype=args.dtype)
    # --seed or not: grids of runs compare
    images, _ = draw(model, tokenizer, encode, asked, seed=1234, decode_batch=args.micro_batch, **sampling)
    captions = captions_of(args.model, asked)
    scores, _ = score(judges, images.to(args.device), captions)
    labels = []
    for k, caption in enumerate(captions):
        said = [f"{name.removeprefix('pyiqa:')} {values[k]:.2f}" for name, values in scores.items()]
        said = "\n".join("  ".join(said[j : j + 2]) for j in range(0, len(said), 2))  # two fit below a picture
        labels.append(f"{caption.removeprefix('a photo of ')}\n{said}")
    columns = len(data.CATEGORIES) if args.task == "t2i" else 10  # a category a column; two of the toy's colours a row
    save_grid(path, images, labels, columns, title=title)


def plot_curves(args):
    """curves.png from metrics.jsonl: a dot a step and a running mean over a tenth of the run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    logged = [json.loads(line) for line in (args.out / "metrics.jsonl").read_text().splitlines()]
    panels = [("reward", "reward"), ("kl", "KL to the reference, nats/token"), ("entropy", "entropy, nats/token")]
    panels += [("verifier", "share right, by the verifier")] if "verifier" in logged[0] else []
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3), layout="constrained")
    for axis, (key, title) in zip(axes, panels, strict=True):
        values, width = np.array([line[key] for line in logged]), max(1, len(logged) // 10)
        smooth = np.convolve(values, np.ones(width) / width, "valid")
        axis.plot(values, ".", markersize=2, alpha=0.4)
        axis.plot(np.arange(width - 1, len(values)) - (width - 1) / 2, smooth)
        axis.set(title=title, xlabel="step")
    figure.savefig(args.out / "curves.png", dpi=90)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------


def train(args):
    if not args.resume and any((args.out / file).exists() for file in ("state.pt", "policy.safetensors")):
        raise ValueError(f"{args.out} holds a run: continue it with --resume, or choose another --out, or delete it")
    started, row, device = time.perf_counter(), MODELS[args.model], args.device
    pool = None  # what prompts are picked from; None: the toy's captions
    if args.classes or args.prompts or (args.task == "t2i" and not is_toy(args.model)):
        pool = read_asked(args.model, args.classes, args.prompts)
    elif args.task == "c2i":
        pool = list(range(row.config.num_classes))

    # build: the policy, its frozen copy, the tokenizer, the judges
    policy = load_model(args.model, args.ckpt, device)
    ref_model = copy.deepcopy(policy).requires_grad_(False)
    tokenizer, encode = load_around(args.model, args)
    judges = load_judges(args.weights, device, judge_options(args, args.model))
    # No weight decay: the KL says already where the weights should stay. The toys' beta 2 is .95: 200 steps would
    # not fill an average over 1,000.
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(0.9, args.adam_beta2), weight_decay=0)
    generator = torch.Generator(device)
    base = file_hash(find_file(args.ckpt or row.ckpt))
    start_step = load_state(args, policy, optimizer, base) if args.resume else 0
    try:
        (args.out / "samples").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {args.out} cannot be written ({error.strerror}); choose another folder") from None

    # say what will happen
    B, G, T = args.prompts_per_step, args.group_size, row.config.num_tokens
    N = B * G
    millions = sum(p.numel() for p in policy.parameters()) / 1e6
    print(f"{args.model}: {millions:.1f}M parameters, {T} tokens an image, on {device}")
    print(f"{N} images/step = {B} prompts x {G} samples, {-(-N // args.micro_batch)} micro-batches, "
          f"{args.updates_per_batch} update(s) a batch, {args.steps - start_step} steps")  # fmt: skip
    print(f"rewards {args.rewards}; sampled at cfg {args.cfg_scale:g}, scored at cfg {args.score_cfg:g}; "
          f"lr {args.lr:g}, KL {args.kl_coef:g}; writing to {args.out}/")  # fmt: skip
    most = 40 if is_toy(args.model) else 16  # all of the toy's classes; of large pictures a page
    shown = pool[:: -(-len(pool) // most)] if pool else data.balanced_captions(24)  # what the grids show
    if start_step == 0:
        title = "before: the base model"
        draw_grid(args, args.out / "before.png", policy, tokenizer, encode, judges, shown, title)
        # A rehearsal of a step's sampling, because time is not proportional to images (24 for before.png take most of
        # what 64 take). An update then costs about 1.2 times that.
        since, asked = time.perf_counter(), [shown[k % len(shown)] for k in range(N)]
        sampling = dict(cfg_scale=args.cfg_scale, temperature=args.temperature, dtype=args.dtype)
        draw(policy, tokenizer, encode, asked, batch_size=N, decode_batch=args.micro_batch, **sampling)
        minutes = (time.perf_counter() - since) * (1 + 1.2 * args.updates_per_batch) * args.steps / 60
        print(f"about {minutes:.0f} min, going by one sampling; saved for --resume every {args.save_every} steps")
    else:
        logged = [json.loads(line) for line in (args.out / "metrics.jsonl").read_text().splitlines()]
        each = np.median([sum(line[key] for key in line if key.startswith("seconds_")) for line in logged])
        print(f"about {each * (args.steps - start_step) / 60:.0f} min, going by the {start_step} steps so far")

    from torch.utils.tensorboard import SummaryWriter  # here, because its import takes seconds

    events = SummaryWriter(args.out, purge_step=start_step)
    if start_step == 0:
        (args.out / "metrics.jsonl").write_text("")
    for step in (bar := tqdm(range(start_step, args.steps), initial=start_step, total=args.steps, unit="step")):
        seconds, since = {}, time.perf_counter()

        # 1. sample G images per prompt from the current policy
        asked = pick_prompts(args, pool, step)
        prompts = [caption for caption in captions_of(args.model, asked) for _ in range(G)]
        cond, cond_mask = encode(asked)  # (B, ...), once a prompt
        # a resumed run draws what this one would have drawn; a large prime, so that runs of other seeds share nothing
        generator.manual_seed(args.seed * 1_000_003 + step)
        with autocast(device, args.dtype):
            cond, cond_mask, tokens, old_logprobs = sample_groups(
                policy, cond, cond_mask, G, generator, args.cfg_scale, args.temperature
            )  # (N, ...), (N, P), (N, T), (N, T)
        since = lap(seconds, "sample", since, device)

        # 2. judge: decode, score, compare inside each group
        with torch.no_grad():
            decoded = [tokenizer.decode(part) for part in tokens.split(args.micro_batch)]
        images = to_unit(torch.cat(decoded))  # (N, 3, H, W)
        since = lap(seconds, "decode", since, device)
        scores, judge_seconds = score(judges, images, prompts)  # {name: (N,)}
        heard = {name: fill_missing(values, G) for name, values in scores.items()}
        rewards = weighted_sum(heard, args.weights)  # (N,)
        if args.reward_norm == "sum":
            advantages = group_advantages(rewards, G)  # (N,)
        else:
            advantages = decoupled_advantages(heard, args.weights, G)
        since = lap(seconds, "judge", since, device)

        # what the frozen reference gives the same tokens; and the policy, where the sampler spoke for another one or
        # bfloat16 rounded it otherwise (by token and by sequence, products are summed in another order)
        scoring = dict(cfg_scale=args.score_cfg, temperature=args.temperature)
        sampled_logprobs = old_logprobs  # (N, T)
        with autocast(device, args.dtype):
            ref_logprobs = frozen_logprobs(ref_model, cond, tokens, cond_mask, args.micro_batch, **scoring)  # (N, T)
            if args.score_cfg != args.cfg_scale or args.dtype == "bfloat16":
                old_logprobs = frozen_logprobs(policy, cond, tokens, cond_mask, args.micro_batch, **scoring)  # (N, T)
        since = lap(seconds, "reference", since, device)

        # 3. learn: --updates-per-batch updates on this batch, each accumulated over micro-batches
        sums, sampler_gap, lr = {}, 0.0, args.lr * (1 - step / args.steps if args.lr_schedule == "linear" else 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for update in range(args.updates_per_batch):
            optimizer.zero_grad()
            for rows in torch.arange(N, device=device).split(args.micro_batch):
                mask = None if cond_mask is None else cond_mask[rows]
                with autocast(device, args.dtype):
                    logprobs, entropy = token_logprobs(policy, cond[rows], tokens[rows], mask, **scoring)  # (n, T) each
                loss, stats = grpo_loss(
                    logprobs, old_logprobs[rows], ref_logprobs[rows], advantages[rows], args.clip_eps, args.kl_coef
                )
                if update == 0:  # what `ratio` cannot show: does what is scored differ from what drew the tokens?
                    gap = (logprobs.detach() - sampled_logprobs[rows]).exp() - 1  # (n, T)
                    sampler_gap += gap.abs().mean().item() * len(rows) / N
                share = len(rows) / N  # a mean of means would be wrong for an uneven last micro-batch
                (loss * share).backward()
                for name, value in (stats | {"entropy": entropy.mean()}).items():
                    sums[name] = sums.get(name, 0) + value.item() * share / args.updates_per_batch
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
            if not grad_norm.isfinite():
                raise ValueError(f"step {step}: the gradient is not finite; start again with a lower --lr")
            optimizer.step()
        since = lap(seconds, "learn", since, device)

        # 4. report
        spread = rewards.view(B, G)
        metrics = dict(step=step, reward=rewards.mean().item(), reward_std=rewards.std().item(), **sums)
        for name, values in scores.items():
            finite = values[values.isfinite()]
            if len(finite):  # else there is no mean, and 0 may be the worst score
                metrics |= {f"{name}_mean": finite.mean().item(), f"{name}_std": finite.std(correction=0).item()}
            metrics |= {f"{name}_not_finite": int((~values.isfinite()).sum()), f"{name}_seconds": judge_seconds[name]}
        if is_toy(args.model):  # for the curves only; the policy never hears of it
            right = [data.satisfies(image, prompt) for image, prompt in zip(images.cpu(), prompts, strict=True)]
            metrics["verifier"] = float(np.mean(right))
        metrics |= dict(
            grad_norm=grad_norm.item(), lr=lr,
            advantage_std=advantages.std().item(), advantage_max=advantages.abs().max().item(),
            equal_groups=(spread == spread[:, :1]).all(1).float().mean().item(),
            sampler_gap=sampler_gap,
            peak_memory_gb=peak_memory_gb(device),
        )  # fmt: skip
        lap(seconds, "report", since, device)
        metrics |= {f"seconds_{part}": value for part, value in seconds.items()}
        metrics = {name: value for name, value in metrics.items() if value is not None}
        metrics = {
            name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in metrics.items()
        }
        with open(args.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        for name, value in metrics.items():
            events.add_scalar(name, value, step)
        judged = " ".join(f"{name} {metrics.get(name + '_mean', np.nan):6.3f}" for name in scores)
        verified = f" right {metrics['verifier']:4.0%}" if is_toy(args.model) else ""
        bar.write(
            f"step {step:4d}  reward {metrics['reward']:6.3f} ({judged}){verified}  kl {metrics['kl']:.4f}  "
            f"entropy {metrics['entropy']:.3f}  ratio {metrics['ratio']:.4f}  grad {metrics['grad_norm']:5.2f}  "
            f"{sum(seconds.values()):.2f} s ({' '.join(f'{part} {value:.2f}' for part, value in seconds.items())})"
        )

        # 5. save
        if (step + 1) % args.sample_every == 0:
            path = args.out / f"samples/step_{step + 1:05d}.png"
            draw_grid(args, path, policy, tokenizer, encode, judges, shown, f"after {step + 1} steps")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_policy(args, policy, step + 1)
            save_state(args, policy, optimizer, step + 1, base)
    events.close()

    title = f"after {args.steps} steps of GRPO"
    draw_grid(args, args.out / "after.png", policy, tokenizer, encode, judges, shown, title)
    plot_curves(args)
    also = "" if is_toy(args.model) else " with the same --vq-ckpt, --text-encoder, --classes or --prompts"
    print(f"{(time.perf_counter() - started) / 60:.1f} min. Look at {args.out}/before.png, after.png and curves.png; "
          f"then: python evaluate.py --ckpt {args.out}{also}")  # fmt: skip


def how_to_go_on(args):
    saved = (args.out / "state.pt").exists()
    then = f"goes on from the last save in {args.out} with --resume" if saved else "starts again: nothing was saved"
    return f"stopped; the same command {then}"


def main(argv=None):
    args = parse_args(argv)
    remedy = "lower --micro-batch and --judge-batch first (the result stays the same), then --prompts-per-step"
    run_script("train.py", train, args, remedy, partial(how_to_go_on, args))


if __name__ == "__main__":
    main()
