"""
AR-GRPO (arXiv 2508.06924): reinforcement learning for an autoregressive image model, from sampling to update.

    python train.py --task c2i                        # toy classes, no download, minutes on a laptop
    python train.py --task t2i                        # toy captions
    python train.py --task c2i --resume               # continue a run that was stopped
    python train.py --task c2i --rewards clip=1,realism=0.25,pyiqa:piqe=0.01 --kl-coef 0.1 --out out/mine
    python train.py --preset paper-c2i                # the paper's run: LlamaGen-XL at 384 px, its eight rewards
    python train.py --model llamagen-b-256            # a smaller model, with our settings
    python train.py --preset best-c2i                 # one step beyond the paper

    max_pi  E[ reward(image) ] - beta KL(pi || pi_ref)      image = decode(tokens), tokens ~ pi(. | class or caption)
                                                            (which KL's gradient is taken: see grpo.grpo_loss)

The loop is the function `train`. Results go to a folder (out/TASK); its report.html shows them, and runs.py lists the
files. The README explains what is logged. minimal.py is the same algorithm in a hundred lines; this adds flags,
resuming, several processes, the official models, and what goes beyond the paper.

Differences from the official code: the log-probabilities that are trained are those of the distribution that drew the
images (--learn-cfg; see grpo.py). Weights are float32; the official t2i run keeps them in bfloat16, and its c2i run
samples in float32 and learns in bfloat16. Every random number comes from (seed, step), so a resumed run draws what the
unbroken one would have drawn.

Shapes: B prompts per step, G = group_size samples each, of which K = learn_from are learned from (all by default), N =
B*G images, T image tokens, V codes, n images in a micro-batch. Of several processes each sees only its own B and N.
"""

if __name__ == "__main__":  # before torch, whose OpenMP reads it while it loads
    import os

    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads spin while they wait for each other: by default so long that one busy core makes a step ten times as
        # slow (RESULTS.md). It changes no sum. Other systems than Linux have other libraries, which do not read it.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import copy
from functools import partial
from pathlib import Path

import numpy as np
import torch

import data
import parallel
import sample
import zoo
from grpo import (
    ADVANTAGES,
    Batch,
    at_tokens,
    entropy_of,
    exact_kl,
    extremes,
    grpo_loss,
    log_policy,
    sample_groups,
    sampler_gap,
    split,
    take,
    token_weights,
)
from model import adapters, image_noise
from parallel import say
from prompts import captions_of, load_encoder, read_prompts, wordnet_classes
from rewards import (
    add_judge_flags,
    fill_missing,
    judge_images,
    judge_options,
    load_judges,
    parse_rewards,
    weighted_sum,
)
from runs import Run
from tokenizer import to_unit
from zoo import Mistake

MAX_GRAD_NORM = 1.0  # the release's; the toys' gradients stay below it most of the time
WARMUP = 0.1  # of the steps, with --lr-schedule linear
SAMPLE_EVERY = 50  # steps between grids of the same prompts and seeds


@torch.enable_grad()  # a caller may have switched gradients off
def train(args, run):
    """The loop: sample, judge, compare, learn, report and save. run: a `Run`, entered."""
    policy, ref_model, tokenizer, encode, judges, optimizer = build(args)
    run.begin(policy, optimizer)
    announce(args, policy, args.steps - run.first_step)
    draw_grid = partial(sample.draw_grid, args, policy, tokenizer, encode, judges)
    before = draw_grid("before.png", "before: the base model") if run.first_step == 0 else None
    G, T = args.group_size, policy.config.num_tokens
    rows = parallel.share(args.prompts_per_step * G)  # this process's N rows of the step's images
    autocast = zoo.autocast(args.device, args.dtype)
    for step in range(run.first_step, args.steps):
        # 1. sample G images for each prompt from the current policy
        prompts, captions = pick_prompts(args, step)
        noise = image_noise(rows, T, args.seed, step)  # (N, T): the same on resume and for any number of processes
        with autocast:  # a block of its own: the casts that it remembers carry no gradient
            cond, cond_mask = encode(prompts)  # (B, ...), (B, P)
            rollout = sample_groups(policy, cond, cond_mask, G, noise, args.cfg_scale, args.temperature)
        run.lap("sample")

        # 2. judge
        images = decode(tokenizer, rollout.tokens, args.micro_batch)  # (N, 3, H, W) in [0, 1]
        run.lap("decode")
        scores, metrics = judge(judges, images, captions, G)  # {judge: scores of the images of all processes}

        # 3. compare inside each group
        rewards, advantages, compared = compare(args, scores, rows)  # (N,), (N,)
        metrics |= compared
        kept = extremes(advantages, G, args.learn_from)  # (B*K,): the rows to learn from; all N without --learn-from
        advantages = advantages[kept]  # (B*K,)
        rollout = take(rollout, kept)
        run.lap("judge")

        # 4. learn: --updates-per-batch steps of AdamW
        metrics["lr"] = set_lr(args, optimizer, step)
        parts = split(Batch(*rollout, advantages), args.micro_batch)
        history = []
        grad_norms = []
        for update in range(args.updates_per_batch):
            optimizer.zero_grad()
            for k, part in enumerate(parts):
                with autocast:
                    if update == 0 or args.kl == "exact":
                        with torch.no_grad():
                            ref_logp = log_policy(ref_model, part, args.ref_cfg, args.temperature)  # (n, T, V)
                    logp = log_policy(policy, part, args.learn_cfg, args.temperature)  # (n, T, V), requires grad
                logprobs = at_tokens(logp, part.tokens)  # (n, T)
                if update == 0:  # kept for the updates that follow
                    # pi_old from this pass, not sampled_logprobs: those may have other guidance, and in bfloat16 one
                    # full pass rounds differently from token-by-token decoding
                    part = part._replace(
                        old_logprobs=logprobs.detach(),
                        ref_logprobs=at_tokens(ref_logp, part.tokens),
                    )
                    if args.weigh_tokens:  # beyond the paper
                        part = share_out(args, ref_model, part)
                    parts[k] = part
                kl = exact_kl(logp, ref_logp) if args.kl == "exact" else None  # beyond the paper; None: k3
                loss, stats = grpo_loss(
                    logprobs,
                    part.old_logprobs,
                    part.ref_logprobs,
                    part.advantages,
                    args.clip_eps,
                    args.kl_coef,
                    kl,
                )
                fraction = len(logprobs) / len(advantages)  # the last micro-batch may be a short one
                scaled_loss = loss * fraction
                scaled_loss.backward()
                stats["entropy"] = entropy_of(logp.detach()).mean()
                if update == 0:  # after an update the gap would also measure how far the policy has moved
                    stats["sampler_gap"] = sampler_gap(logprobs, part.sampled_logprobs)
                history.append((fraction, stats))
            grad_norm = parallel.average_and_clip(policy, MAX_GRAD_NORM)
            grad_norms.append(grad_norm)
            if grad_norm.isfinite():  # a NaN must not reach the weights
                optimizer.step()
        run.lap("learn")

        # 5. report and save
        metrics |= learning_metrics(history, grad_norms)
        metrics |= verify(args, images, captions)
        run.lap("report")
        own_scores = {name: values[rows] for name, values in scores.items()}
        sample.draw_group(args, step, policy, parts, images, captions, own_scores, rewards, kept)
        if (step + 1) % SAMPLE_EVERY == 0:
            draw_grid(f"samples/step_{step + 1:05d}.png", f"after {step + 1} steps")
        run.end_step(step, parallel.average({"step": step} | metrics))
    sample.finish_run(args, {"base": ref_model, "tuned": policy}, before, tokenizer, encode, judges)


# ---------------------------------------------------------------------------------------------------------------
# The loop's small steps


def pick_prompts(args, step):
    """
    This process's B prompts (labels or captions) of a step, and the N captions that the judges read, one per image.
    The step's prompts are drawn from (seed, step): from a pool without repeats if it is large enough, else from the
    toy's captions, every category equally often.
    """
    rng = np.random.default_rng([args.seed, step])
    count = args.prompts_per_step
    if args.pool is None:
        picked = data.sample_captions(count, rng)
    else:
        repeats = len(args.pool) < count
        picked = [args.pool[k] for k in rng.choice(len(args.pool), count, replace=repeats)]
    prompts = [picked[k] for k in parallel.share(count)]
    captions = captions_of(args.model, prompts, args.class_names)
    return prompts, [caption for caption in captions for _ in range(args.group_size)]


@torch.no_grad()
def decode(tokenizer, tokens, micro_batch):
    """Tokens (N, T) -> images (N, 3, H, W) in [0, 1], `micro_batch` at a time."""
    return to_unit(torch.cat([tokenizer.decode(part) for part in tokens.split(micro_batch)]))


def judge(judges, images, captions, group_size):
    """
    Scores images (N, 3, H, W) in [0, 1]: {judge: scores of the images of all processes}, and what the log says about
    them, {name: number}. A missing score (not finite) becomes the mean of its group, where it neither helps nor hurts.
    """
    scores, seconds = judge_images(judges, images, captions)
    metrics = {}
    for name, values in scores.items():
        values = parallel.gather(values)
        finite = values[values.isfinite()]
        if len(finite):
            metrics[f"{name}_mean"] = finite.mean().item()
            metrics[f"{name}_std"] = finite.std(correction=0).item()  # of a single score 0, not NaN
        metrics[f"{name}_not_finite"] = len(values) - len(finite)
        metrics[f"{name}_seconds"] = seconds[name]
        scores[name] = fill_missing(values, group_size)
    return scores, metrics


def compare(args, scores, rows):
    """
    Rewards and advantages (N,) of the images `rows`, and {name: number} for the log. scores: {judge: scores of the
    images of all processes}. All are needed, because GDPO normalises over the batch.
    """
    G = args.group_size
    rewards = weighted_sum(scores, args.rewards)
    advantages = ADVANTAGES[args.reward_norm](rewards, G, scores, args.rewards)
    groups = rewards.view(-1, G)
    metrics = {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std().item(),
        "advantage_std": advantages.std().item(),
        "advantage_max": advantages.abs().max().item(),
        "equal_groups": (groups == groups[:, :1]).all(1).float().mean().item(),
    }
    return rewards[rows], advantages[rows], metrics


@torch.no_grad()
def share_out(args, ref_model, part):
    """A micro-batch whose advantages (n,) are shared out among the tokens: (n, T)."""
    with zoo.autocast(args.device, args.dtype):
        logp = log_policy(ref_model, part, args.learn_cfg, args.temperature)  # (n, T, V)
    weights = token_weights(part.ref_logprobs, at_tokens(logp, part.tokens))  # (n, T)
    return part._replace(advantages=part.advantages[:, None] * weights)


def set_lr(args, optimizer, step):
    """Sets the learning rate of a step, and returns it."""
    lr = args.lr
    if args.lr_schedule == "linear":
        # Adam's first steps are as long as any, but their direction comes from few gradients: without the warm-up the
        # policy drifts away from the reference early, and loses diversity that it does not get back (RESULTS.md).
        lr *= min(1, (step + 1) / (WARMUP * args.steps)) * (1 - step / args.steps)
    for parameters in optimizer.param_groups:
        parameters["lr"] = lr
    return lr


def verify(args, images, captions):
    """{"right": share of the toy's images (N, 3, H, W) that the verifier accepts}. The policy never hears of it."""
    if not zoo.is_toy(args.model):
        return {}
    right = [data.satisfies(image, caption) for image, caption in zip(images.cpu(), captions, strict=True)]
    return dict(right=float(np.mean(right)))


def learning_metrics(history, grad_norms):
    """
    {name: number} of a step's updates. history: (fraction of the images that are learned from, {name: mean}) of each
    micro-batch. grad_norms: of each update, before clipping.
    """
    metrics = dict(grad_norm=torch.stack(grad_norms).max().item())  # NaN if one of them is
    for name in history[0][1]:
        found = [(stats[name].item(), fraction) for fraction, stats in history if name in stats]
        values, fractions = zip(*found, strict=True)
        metrics[name] = float(np.average(values, weights=fractions))
    return metrics


# ---------------------------------------------------------------------------------------------------------------
# Before the loop


def build(args):
    """
    The policy, its frozen copy, the tokenizer, the prompt encoder, the judges, the optimizer. All networks stay in eval
    mode: with dropout, the policy that is learned would not be the one that sampled.
    """
    policy = zoo.load_model(args.model, args.base, args.device, args.compile)
    # With adapters the weights themselves never change, so policy and reference share them: deepcopy does not copy what
    # its second argument holds.
    shared = {id(p): p for p in policy.parameters()} if args.lora_rank else {}
    ref_model = copy.deepcopy(policy, shared).requires_grad_(False)
    if args.lora_rank:
        adapters(policy, args.lora_rank, torch.Generator().manual_seed(args.seed))
    policy.checkpoint_layers = args.checkpoint_layers
    if args.task == "t2i":
        # LlamaGen's "no text" is random and was never trained; training it under guidance changed nothing (RESULTS.md)
        policy.cls_embedding.uncond_embedding.requires_grad_(False)
    if args.shard:
        parallel.shard(policy)
        parallel.shard(ref_model)
    tokenizer = zoo.load_tokenizer(args.model, args.vq_ckpt, args.device)
    encode = partial(load_encoder(args.model, args.text_encoder, args.device, args.pool or ()), pad=args.text_pad)
    judges = load_judges(args.rewards, args.device, args.judge_options)
    learned = [p for p in policy.parameters() if p.requires_grad]
    # no weight decay: the KL already says where the weights should stay
    optimizer = torch.optim.AdamW(learned, lr=args.lr, betas=(0.9, args.adam_beta2), weight_decay=0)
    return policy, ref_model, tokenizer, encode, judges, optimizer


def announce(args, policy, steps):
    """Prints what the run will do."""
    B, G, K, T = args.prompts_per_step, args.group_size, args.learn_from, policy.config.num_tokens
    few = f"learning from the {K // 2} worst and {K - K // 2} best of each {G}, " if K < G else ""
    here = min(B * K // parallel.world(), args.micro_batch)  # images of this process
    millions = sum(p.numel() for p in policy.parameters()) / 1e6
    say(f"{args.model}: {millions:.1f}M parameters, {T} tokens per image, on {args.device}")
    say(f"{B * G} images/step = {B} prompts x {G} samples, {few}in micro-batches of {here}; "
        f"{args.updates_per_batch} update(s) per batch, {steps} steps")  # fmt: skip
    rewards = ",".join(f"{judge}={weight:g}" for judge, weight in args.rewards.items())
    say(f"rewards {rewards}; sampled at cfg {args.cfg_scale:g}, learned at cfg {args.learn_cfg:g}; "
        f"lr {args.lr:g}, KL {args.kl_coef:g} ({args.kl}); writing to {args.out}/")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Recipes and flags

# The paper's eight rewards. It gives them all weight 1 and scales them inside: the cosines by 5, MANIQA by 2, Qwen's
# answers by 1/4. Here a judge keeps its own scale and the factor is its weight.
EIGHT = "clip=5,clip-step=1,hps=5,hps-step=1,maniqa=2,qwen-match=0.25,qwen-real=0.25,qwen-odd=0.25"

# What a model's row, or --preset, changes about the defaults below. "script": the official training script, which its
# author calls indicative. What the toys have was measured (README, "Results").
TOY = dict(
    rewards="clip=1,realism=0.25",
    micro_batch=64,
    adam_beta2=0.95,  # a run of 100 steps does not fill an average over 1,000
)
LLAMAGEN = dict(
    rewards=EIGHT,  # paper
    micro_batch=8,  # ours; affects memory only
    adam_beta2=0.999,  # script
    lr=1e-5,  # script
)
PAPER = dict(
    learn_cfg=1.0,  # script: log-probabilities without guidance
    lr_schedule="constant",  # script, in effect
)
BEYOND = dict(kl="exact", weigh_tokens=True, cfg_scale=1.0)  # found on the toys; not measured on LlamaGen
BEST_TOY = BEYOND | dict(reward_norm="mean", group_size=16, learn_from=8)
RECIPES = {
    "toy-c2i": TOY | dict(steps=90, lr=3.6e-4, kl_coef=0.045),
    # captions are harder: more samples per prompt, and an exact KL (RESULTS.md, "Captions")
    "toy-t2i": TOY | dict(steps=127, lr=6e-4, kl="exact", kl_coef=0.1, group_size=16, learn_from=8),
    # script: 4 GPUs x 8 images = 4 classes x 8; 4 x 16 = 8 captions x 8
    "llamagen-c2i": LLAMAGEN | dict(steps=400, prompts_per_step=4, cfg_scale=2.0, kl_coef=0.1),
    "llamagen-t2i": LLAMAGEN | dict(steps=600, prompts_per_step=8, cfg_scale=4.0, kl_coef=1.0),
}
RECIPES |= {
    # script: judges read "a photo of tench, Tinca tinca"
    "paper-c2i": RECIPES["llamagen-c2i"] | PAPER | dict(model="llamagen-xl-384", class_names=wordnet_classes),
    # script: text features are not moved to the left
    "paper-t2i": RECIPES["llamagen-t2i"] | PAPER | dict(model="llamagen-t2i-xl-256", text_pad="right"),
    "best-c2i": RECIPES["toy-c2i"] | BEST_TOY | dict(model="toy-c2i", ref_cfg=2.0, kl_coef=0.28, steps=110, lr=5e-4),
    "best-t2i": RECIPES["toy-t2i"] | BEST_TOY | dict(model="toy-t2i", ref_cfg=3.0, kl_coef=0.25, steps=150, lr=6e-4),
    # the guidance of the rollout moves into the reference
    "best-llamagen-c2i": RECIPES["llamagen-c2i"] | BEYOND | dict(model="llamagen-xl-384", ref_cfg=2.0),
    "best-llamagen-t2i": RECIPES["llamagen-t2i"] | BEYOND | dict(model="llamagen-t2i-xl-256", ref_cfg=4.0),
}
PRESETS = [name for name in RECIPES if name.startswith(("paper-", "best-"))]


def add_flags(parser):
    """What --resume may change stands in runs.FREE."""
    add = parser.add_argument_group("what is trained").add_argument
    add("--preset", choices=PRESETS, help="paper-: the official release's settings; best-: one step beyond it. "
        "Explicit flags override it")  # fmt: skip
    zoo.add_model_flags(add)
    add("--ckpt", type=zoo.user_path, metavar="PATH", help="start from these weights, also the KL's reference "
        "(default: the model's base)")  # fmt: skip
    add("--classes", nargs="+", metavar="CLASS", help="c2i: only these classes, names or numbers (default: all)")
    add("--prompts", nargs="+", metavar="TEXT", help="t2i: captions or files of them (the toy has its own)")
    add("--steps", type=int, help="batches sampled and learned from (default %(default)s)")
    add = parser.add_argument_group("sampling").add_argument
    add("--prompts-per-step", type=int, default=8, help="B, prompts per step (default %(default)s)")
    add("--group-size", type=int, default=8, help="G, samples per prompt (default %(default)s; paper: 8)")
    add("--temperature", type=float, default=1.0, help="divides the logits in sampling and learning (default "
        "%(default)s, the paper's)")  # fmt: skip
    add("--cfg-scale", type=float, default=1.0, help="guidance in sampling; 1 is none (default %(default)s)")
    add = parser.add_argument_group("judging").add_argument
    add("--rewards", help="judge=weight,... (default %(default)s)")
    add("--reward-norm", choices=ADVANTAGES, default="group", help="group: the reward against its group's mean, in "
        "units of its spread (GRPO); mean: not divided by the spread (Dr. GRPO); each: normalise every judge first "
        "(GDPO) (default %(default)s)")  # fmt: skip
    add_judge_flags(add)
    add = parser.add_argument_group("learning").add_argument
    add("--learn-cfg", type=float, help="guidance of the distribution that is learned; the release's: 1 (default "
        "%(default)s; None: as in sampling)")  # fmt: skip
    add("--lr", type=float, help="AdamW's learning rate (default %(default)s)")
    add("--lr-schedule", choices=("linear", "constant"), default="linear", help="linear: it rises for a tenth of "
        "--steps, then falls to 0, which averages the noise out; constant: the release's "
        "(default %(default)s)")  # fmt: skip
    add("--kl-coef", type=float, help="the paper's beta (default %(default)s)")
    add("--clip-eps", type=float, default=0.2, help="epsilon of the clipped ratio (default %(default)s, the paper's)")
    add("--updates-per-batch", type=int, default=1, help="AdamW steps per batch; above 1 the clip acts (default "
        "%(default)s, the release's)")  # fmt: skip
    add("--lora-rank", type=int, default=0, metavar="R", help="learn a change of rank R beside each matrix of the "
        "blocks, which policy and reference share; wants 10 times the --lr (default %(default)s: train "
        "all weights)")  # fmt: skip
    add = parser.add_argument_group("one step beyond the paper").add_argument
    add("--kl", choices=("k3", "exact"), default="k3", help="k3: estimate the KL from the tokens drawn, as in GRPO; "
        "exact: sum over the vocabulary, without noise (default %(default)s)")  # fmt: skip
    add("--ref-cfg", type=float, help="guidance of the KL's reference; a larger one teaches the policy what guidance "
        "gives, so that it needs none (default %(default)s; None: as in learning)")  # fmt: skip
    add("--weigh-tokens", action=argparse.BooleanOptionalAction, default=False, help="with --ref-cfg: give each token "
        "a share of its image's advantage in proportion to what guidance changes about it")  # fmt: skip
    add("--learn-from", type=int, metavar="K", help="learn only from K of the --group-size images, half with the "
        "lowest advantages and half with the highest (default %(default)s; None: all)")  # fmt: skip
    add = parser.add_argument_group("memory and processes").add_argument
    add("--micro-batch", type=int, help="images per backward pass; affects memory only (default %(default)s)")
    add("--checkpoint-layers", action="store_true", help="recompute each block's activations in the backward pass: "
        "less memory, a third more time")  # fmt: skip
    add("--shard", action="store_true", help="with torchrun: divide weights, gradients and moments among the processes")
    add = parser.add_argument_group("bookkeeping").add_argument
    add("--seed", type=int, default=0, help="seed of prompts and sampling (default %(default)s)")
    add("--out", type=zoo.user_path, help="folder to write to (default out/TASK or out/PRESET; LlamaGen: "
        "out/[PRESET-]MODEL)")  # fmt: skip
    add("--save-every", type=int, default=25, help="steps between saves for --resume (default %(default)s)")
    add("--resume", action="store_true", help="continue the run in --out, with the same flags")
    parser.set_defaults(class_names=None)  # no flag: a recipe's names of the classes; None: the model's own


def parse_args(argv=None):
    """Parses the flags; the recipe of --preset or of the model sets the defaults. Raises Mistake, OSError."""
    parser = zoo.script_parser(__doc__, add_help=False)
    add_flags(parser)
    chosen, _ = parser.parse_known_args(argv)
    preset = RECIPES.get(chosen.preset, {})
    model, base, header = zoo.find_policy(chosen.ckpt, chosen.model or preset.get("model"), chosen.task)
    task = zoo.MODELS[model].config.task
    if preset and (zoo.MODELS[preset["model"]].config.task, zoo.is_toy(preset["model"])) != (task, zoo.is_toy(model)):
        raise Mistake(f"--preset {chosen.preset} is not for {model}")
    own = f"{'toy' if zoo.is_toy(model) else 'llamagen'}-{task}"
    parser.set_defaults(**(preset or RECIPES[own]))
    parser.add_argument("-h", "--help", action="help", help="show this, with the values of the --preset beside it")
    args = parser.parse_args(argv)
    args.model, args.base, args.task = model, base, task
    args.text_pad = args.text_pad or header["text_pad"]
    return resolve(args)


def resolve(args):
    """Checks the flags and fills in what depends on others. Raises Mistake, OSError."""
    zoo.setup_device(args)
    args.dtype = args.dtype or zoo.quick_dtype(args.model, args.device)
    args.class_names = args.class_names and args.class_names()
    args.learn_cfg = args.cfg_scale if args.learn_cfg is None else args.learn_cfg
    args.ref_cfg = args.learn_cfg if args.ref_cfg is None else args.ref_cfg
    zoo.check_range(args, steps=1, prompts_per_step=1, group_size=2, micro_batch=1, updates_per_batch=1, save_every=1)
    zoo.check_range(args, seed=0, cfg_scale=1, learn_cfg=1, ref_cfg=1, kl_coef=0, clip_eps=0, lora_rank=0)
    zoo.check_range(args, learn_from=2, temperature=1e-6, lr=1e-12)
    if args.weigh_tokens and args.ref_cfg == args.learn_cfg:
        raise Mistake(f"--weigh-tokens measures what guidance changes, so --ref-cfg and --learn-cfg must differ; both "
                      f"are {args.ref_cfg:g} (or give --no-weigh-tokens)")  # fmt: skip
    args.learn_from = min(args.learn_from or args.group_size, args.group_size)
    if args.shard and parallel.world() == 1:
        raise Mistake("--shard divides the model among processes: start them with torchrun --nproc-per-node N train.py")
    if args.shard and (args.lora_rank or args.compile):
        raise Mistake("--shard divides the weights that --lora-rank shares and --compile copies: leave one of them out")
    if args.prompts_per_step % parallel.world():
        raise Mistake(f"--prompts-per-step {args.prompts_per_step} is not a multiple of {parallel.world()} processes")
    args.rewards, args.judge_options = parse_rewards(args.rewards), judge_options(args, args.model)
    args.pool = None  # what prompts are picked from; None: the toy's captions
    if args.classes or args.prompts or (args.task == "t2i" and not zoo.is_toy(args.model)):
        args.pool = read_prompts(args.model, args.classes, args.prompts)
    elif args.task == "c2i":
        args.pool = list(range(zoo.MODELS[args.model].config.num_classes))
    if args.out is None:
        name = args.preset or args.task
        if not zoo.is_toy(args.model):
            name = f"{args.preset}-{args.model}" if args.preset else args.model
        args.out = Path("out", name)
    return args


def run(args):
    with Run(args) as folder:
        train(args, folder)


def main(argv=None):
    zoo.run_script(parse_args, run, argv)


if __name__ == "__main__":
    main()
