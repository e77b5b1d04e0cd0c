"""
AR-GRPO (arXiv 2508.06924): reinforcement learning for an autoregressive image model, from sampling to update.

    python train.py --task c2i                        # toy classes, no download, minutes on a laptop
    python train.py --task t2i                        # toy captions
    python train.py --task c2i --resume               # go on with a run that was stopped
    python train.py --task c2i --rewards clip=1,realism=0.25,pyiqa:piqe=0.01 --kl-coef 0.1 --out out/mine
    python train.py --preset paper-c2i                # the paper's run: LlamaGen-XL at 384 px, its eight rewards
    python train.py --model llamagen-b-256            # the same with our own settings, and a smaller model
    python train.py --preset best-c2i                 # one step beyond the paper

    max_pi  E[ reward(image) ] - beta KL(pi || pi_ref)      image = decode(tokens), tokens ~ pi(. | class or caption)

The loop is the function `train`. A folder of results (out/TASK): report.html (a page with all of it), before.png,
after.png, before-after.png, curves.png, metrics.jsonl (a line per step; the README explains every entry), flags.json,
samples/ (the same prompts and seeds as training goes on), TensorBoard events, policy.safetensors, and state.pt and
state-before.pt, the last two saves, for --resume.

Differences from the official code: the log-probabilities that are trained are those of the distribution that drew the
images (--score-cfg; see grpo.py), weights are float32 (its t2i run keeps them in bfloat16; its c2i rollouts are float32
and its scoring bfloat16), and every random number comes from (seed, step), so a resumed run draws what the unbroken one
would have drawn.

Shapes: B prompts per step, G = group_size samples each, N = B*G images, T image tokens.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # else Ctrl-C amid the imports below ends in their traceback

import argparse
import copy
import json
import shutil
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
from data import Mistake
from grpo import (
    advantage_slopes,
    decoupled_advantages,
    exact_kl,
    group_advantages,
    grpo_loss,
    sample_groups,
    sampler_gap,
    score_tokens,
    token_credit,
    token_logprobs,
    token_weights,
)
from model import adapters, image_noise, merged
from rewards import (
    add_judge_flags,
    code_gradient,
    files_of_judges,
    judge_images,
    judge_options,
    load_judges,
    parse_rewards,
    weighted_sum,
    with_gradient,
)
from sample import draw, in_turn, label_images, save_grid
from tokenizer import to_unit

# The paper's eight rewards. It gives them all weight 1 and scales them inside: the cosines by 5, MANIQA by 2, Qwen's
# answers by 1/4; here a judge keeps its own scale and the factor is its weight.
EIGHT = "clip=5,clip-step=1,hps=5,hps-step=1,maniqa=2,qwen-match=0.25,qwen-real=0.25,qwen-odd=0.25"

# Every default: what is set where the command line leaves a knob open. A --preset is what the official release used;
# "script" is its training script for the task, which its author calls indicative. The llamagen columns are the
# release's except where it is wrong (RESULTS.md, "Differences"); the toys' were measured (README, "Results").
COLUMNS = ("toy-c2i", "toy-t2i", "llamagen-c2i", "llamagen-t2i", "paper-c2i", "paper-t2i")
KNOBS = {
    "model": (None, None, None, None, "llamagen-xl-384", "llamagen-t2i-xl-256"),  # the paper's main models
    "steps": (170, 220, 400, 600, 400, 600),  # script
    "prompts_per_step": (8, 8, 4, 8, 4, 8),  # script: 4 GPUs x 8 images = 4 classes x 8; 4 x 16 = 8 captions x 8
    "group_size": (8, 8, 8, 8, 8, 8),  # paper and script
    "micro_batch": (64, 64, 8, 8, 8, 8),  # ours: memory, not the result
    "temperature": (1.0, 1.0, 1.0, 1.0, 1.0, 1.0),  # script: of the rollout; no top-k, no top-p
    "cfg_scale": (1.0, 1.0, 2.0, 4.0, 2.0, 4.0),  # script; its author trained the released t2i weights at 2.0
    "score_cfg": ("same", "same", "same", "same", "1", "1"),  # code: log-probabilities without guidance
    "text_pad": (None, None, None, None, None, "right"),  # code: features are not moved to the left; None: as --ckpt
    # the class names that judges read; code: WordNet's, "a photo of tench, Tinca tinca"; None: the model's
    "names_for_judges": (None, None, None, None, data.wordnet_classes, None),
    "rewards": ("clip=1,realism=0.25", "clip=1,realism=0.25", EIGHT, EIGHT, EIGHT, EIGHT),  # paper
    "qwen_answer": ("probability", "probability", "probability", "probability", "json", "json"),  # script
    "lr": (2e-4, 4.5e-4, 1e-5, 1e-5, 1e-5, 1e-5),  # script
    "lr_schedule": ("linear", "linear", "linear", "linear", "constant", "constant"),  # script: in effect constant
    # script: AdamW's default. The toys' 200 steps would not fill an average over 1,000.
    "adam_beta2": (0.95, 0.95, 0.999, 0.999, 0.999, 0.999),
    "kl_coef": (0.04, 0.03, 0.1, 1.0, 0.1, 1.0),  # script: the paper's beta
    "clip_eps": (0.2, 0.2, 0.2, 0.2, 0.2, 0.2),  # script: the paper's epsilon
    "updates_per_batch": (1, 1, 1, 1, 1, 1),  # script
    "lora_rank": (0,) * 6,  # all weights are learned
    # one step beyond the paper, off: see BEST
    "ref_cfg": ("same",) * 6,
    "kl": ("k3",) * 6,
    "reward_norm": ("sum",) * 6,
    "weigh_tokens": (False,) * 6,
    "credit_coef": (0.0,) * 6,
}  # fmt: skip
# --preset best-...: the column of KNOBS that it starts from, and what it changes (README, "One step beyond the paper").
# Found on the toys. On LlamaGen nothing of it has been measured; the guidance of the rollout moves into the reference.
BEYOND = dict(kl="exact", weigh_tokens=True, cfg_scale=1.0)
TOYS = BEYOND | dict(reward_norm="mean", ref_cfg=2.0)
BEST = {
    "best-c2i": ("toy-c2i", TOYS | dict(model="toy-c2i", kl_coef=0.13, steps=270)),
    "best-t2i": ("toy-t2i", TOYS | dict(model="toy-t2i", kl_coef=0.1, steps=300)),
    "best-llamagen-c2i": ("llamagen-c2i", BEYOND | dict(model="llamagen-xl-384", ref_cfg=2.0)),
    "best-llamagen-t2i": ("llamagen-t2i", BEYOND | dict(model="llamagen-t2i-xl-256", ref_cfg=4.0)),
}
STATES = "state.pt", "state-before.pt"  # the newest save of a run and the one before
PATIENCE = 5  # steps in a row
MAX_GRAD_NORM = 1.0  # script; the toys' gradients stay below it most of the time
SAMPLE_EVERY = 50  # steps between grids of the same prompts and seeds


def parse_args(argv=None):
    parser = zoo.script_parser(__doc__)
    add = parser.add_argument_group("what is trained").add_argument
    add("--preset", choices=[*COLUMNS[4:], *BEST], help="paper-: set what the official release used; best-: what "
        "went beyond it here; flags beside it win")  # fmt: skip
    zoo.add_model_flags(add)
    add("--ckpt", metavar="PATH", help="start from these weights, also the KL's reference (default: the model's base)")
    add("--classes", nargs="+", metavar="CLASS", help="c2i: only these classes, names or numbers (default: all)")
    add("--prompts", nargs="+", metavar="TEXT", help="t2i: captions or files of them (the toy has its own)")
    add("--steps", type=int, help="batches sampled and learned from (default: toys 170 and 220, LlamaGen 400 and 600)")
    add = parser.add_argument_group("sampling").add_argument
    add("--prompts-per-step", type=int, help="B, prompts per step (default 8; LlamaGen c2i 4, as the release)")
    add("--group-size", type=int, help="G, samples per prompt (default 8, the paper's)")
    add("--temperature", type=float, help="divides the logits in sampling and scoring (default 1, the paper's)")
    add("--cfg-scale", type=float, help="guidance while sampling; 1 is none (default: toys 1, LlamaGen c2i 2, t2i 4)")
    add = parser.add_argument_group("judging").add_argument
    add("--rewards", help="judge=weight,... (default: the toys' own; for LlamaGen the paper's eight)")
    add("--reward-norm", choices=("sum", "each", "mean"), help="sum: add the rewards, then normalise in the group "
        "(GRPO, default); each: normalise each reward first (GDPO); mean: only subtract the group's mean of the sum "
        "(Dr. GRPO)")  # fmt: skip
    add_judge_flags(add)
    add = parser.add_argument_group("learning").add_argument
    add("--score-cfg", help="guidance while scoring: 'same' as sampling (default), or a number; the release uses 1")
    add("--ref-cfg", help="guidance of the KL's reference: 'same' as scoring (default), or a number; a larger one "
        "teaches the policy what guidance gives, so that it needs none")  # fmt: skip
    add("--weigh-tokens", action=argparse.BooleanOptionalAction, help="with --ref-cfg: a token has a share in its "
        "image's advantage as large as what guidance changes about it (default: the same for all)")  # fmt: skip
    add("--lr", type=float, help="AdamW's learning rate (default: toys 2e-4 and 4.5e-4, LlamaGen 1e-5, the release's)")
    add("--lr-schedule", choices=("linear", "constant"), help="linear (default): the rate falls to 0 over --steps, "
        "which takes the noise out again; constant: the release's")  # fmt: skip
    add("--kl-coef", type=float, help="the paper's beta (default: c2i 0.1, t2i 1, the release's; toys 0.04 and 0.03)")
    add("--kl", choices=("k3", "exact"), help="k3 (default): the KL is estimated from the tokens drawn, "
        "as in GRPO; exact: it is summed over the vocabulary, without noise")  # fmt: skip
    add("--credit-coef", type=float, metavar="C", help="C times credit per token, by the gradient of the "
        "judges that have one; --clip-eps does not hold it, the KL does (default 0: none, as in GRPO)")  # fmt: skip
    add("--clip-eps", type=float, help="epsilon of the clipped ratio (default 0.2, the paper's)")
    add("--updates-per-batch", type=int, help="AdamW steps per batch; above 1 clipping acts (default 1, the release's)")
    add("--lora-rank", type=int, metavar="R", help="learn a change of rank R beside each matrix of the "
        "blocks, which policy and reference then share; wants 10 times the --lr (default 0: learn all)")  # fmt: skip
    add("--checkpoint-layers", action="store_true", help="keep of each block what attention made, and compute the rest "
        "again in the backward pass: two fifths of the memory")  # fmt: skip
    add("--shard", action="store_true", help="with torchrun: divide weights, gradients and moments among the processes")
    add("--micro-batch", type=int, help="images per backward pass; affects memory only (default 64; LlamaGen 8)")
    add = parser.add_argument_group("bookkeeping").add_argument
    add("--seed", type=int, default=0, help="seed of prompts and sampling (default 0)")
    add("--out", type=Path, help="folder to write to (default out/TASK or out/PRESET; LlamaGen: out/[PRESET-]MODEL)")
    add("--save-every", type=int, default=25, help="steps between saves for --resume (default 25)")
    add("--resume", action="store_true", help="go on with the run in --out, with the same flags")
    parser.set_defaults(qwen_answer=None)  # from KNOBS, as the others
    return resolve(parser.parse_args(argv))


def resolve(args):
    """Fills in what the command line left open. Raises Mistake, OSError."""
    zoo.settle_device(args)
    start, changes = BEST.get(args.preset, (args.preset, {}))
    if args.preset:
        args.model = args.model or changes.get("model") or KNOBS["model"][COLUMNS.index(start)]
        args.task = args.task or start[-3:]
    args.model, args.base, header = zoo.find_policy(args.ckpt, args.model, args.task)
    args.task = zoo.MODELS[args.model].config.task
    args.dtype = args.dtype or zoo.quick_dtype(args.model, args.device)
    column = f"{'toy' if zoo.is_toy(args.model) else 'llamagen'}-{args.task}"
    if args.preset and start.replace("paper", "llamagen") != column:
        raise Mistake(f"--preset {args.preset} is not for {args.model}")
    for knob, values in KNOBS.items():
        if getattr(args, knob, None) is None:
            setattr(args, knob, changes.get(knob, values[COLUMNS.index(start or column)]))
    args.text_pad = args.text_pad or header["text_pad"]
    args.names_for_judges = args.names_for_judges and args.names_for_judges()
    args.score_cfg = same_or_number("--score-cfg", args.score_cfg, args.cfg_scale)
    args.ref_cfg = same_or_number("--ref-cfg", args.ref_cfg, args.score_cfg)
    if args.weigh_tokens and args.ref_cfg == args.score_cfg:
        raise Mistake(
            f"--weigh-tokens asks what guidance changes, so --ref-cfg has to be another than --score-cfg, and both are "
            f"{args.ref_cfg:g}; or give --no-weigh-tokens"
        )
    zoo.check_range(args, steps=1, prompts_per_step=1, group_size=2, micro_batch=1, updates_per_batch=1, save_every=1)
    zoo.check_range(
        args, seed=0, cfg_scale=1, score_cfg=1, ref_cfg=1, kl_coef=0, clip_eps=0, temperature=1e-6, lr=1e-12
    )
    zoo.check_range(args, lora_rank=0, credit_coef=0)
    if args.shard and parallel.world() == 1:
        raise Mistake("--shard divides the model among processes: start them with torchrun --nproc-per-node N train.py")
    if args.shard and args.lora_rank:
        raise Mistake("--lora-rank shares weights between policy and reference, which --shard divides: leave one out")
    if args.shard and args.compile:
        raise Mistake("--compile copies the blocks, which --shard has divided: leave one of them out")
    if args.prompts_per_step % parallel.world():
        raise Mistake(
            f"--prompts-per-step {args.prompts_per_step} cannot be divided among {parallel.world()} processes"
        )
    args.judge_weights, args.judge_options = parse_rewards(args.rewards), judge_options(args, args.model)
    args.pool = None  # what prompts are picked from; None: the toy's captions
    if args.classes or args.prompts or (args.task == "t2i" and not zoo.is_toy(args.model)):
        args.pool = zoo.read_asked(args.model, args.classes, args.prompts)
    elif args.task == "c2i":
        args.pool = list(range(zoo.MODELS[args.model].config.num_classes))
    official = args.model if args.preset is None else f"{args.preset}-{args.model}"
    args.out = args.out or Path("out", args.preset or args.task if zoo.is_toy(args.model) else official)
    return args


def same_or_number(flag, value, same):
    """The number that is meant by a flag that also takes 'same'. Raises Mistake."""
    try:
        return same if value == "same" else float(value)
    except ValueError:
        raise Mistake(f"{flag} is 'same' or a number, not {value!r}") from None


def claim(args):
    """Makes the output folder and holds it for this run, before anything takes time. Raises Mistake, OSError."""
    if args.resume and not saves(args):
        raise FileNotFoundError(f"{args.out}: nothing to resume; leave out --resume to start a run in it")
    zoo.make_folder(args.out)
    zoo.make_folder(args.out / "samples")
    args.lock = zoo.lock(args.out) if parallel.rank() == 0 else None
    if not args.resume and saves(args):
        raise Mistake(f"{args.out} holds a run: continue it with --resume, or choose another --out, or delete it")


def build(args):
    """The policy, its frozen copy, the tokenizer, the encoder of what is asked, the judges, the optimizer."""
    claim(args)  # first, because loading takes time
    policy = zoo.load_model(args.model, args.base, args.device, args.compile)
    # beside adapters the weights never change, so policy and reference share them
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
    encode = zoo.load_encoder(args.model, args.text_encoder, args.device)
    judges = load_judges(args.judge_weights, args.device, args.judge_options)
    if args.credit_coef:
        first = (args.pool or data.balanced_captions(1))[:1]  # the same for all processes
        asked = zoo.captions_of(args.model, first, args.names_for_judges)
        args.credited = with_gradient(judges, args.judge_weights, tokenizer, policy.config.num_tokens, asked)
    # no weight decay: the KL says already where the weights should stay
    betas = (0.9, args.adam_beta2)
    learned = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=args.lr, betas=betas, weight_decay=0)
    return policy, ref_model, tokenizer, partial(encode, pad=args.text_pad), judges, optimizer


def train(args):
    """The loop: sample, judge, compare, learn, report, save."""
    policy, ref_model, tokenizer, encode, judges, optimizer = build(args)
    grid = partial(draw_grid, args, policy, tokenizer, encode, judges)
    start_step = begin(args, policy, optimizer, grid)
    G, device, weights = args.group_size, args.device, args.judge_weights
    each, divide = args.reward_norm == "each", args.reward_norm != "mean"
    # which of a step's N images this process makes
    mine = [p * G + k for p in parallel.share(args.prompts_per_step) for k in range(G)]
    scoring = dict(cfg_scale=args.score_cfg, temperature=args.temperature)
    # pi_old is the sampler. It is scored anew if the guidance is another one than in sampling, or if bfloat16 rounds
    # one pass over all tokens otherwise than token by token.
    sampler_differs = args.score_cfg != args.cfg_scale or args.dtype == "bfloat16"
    log, watch = Log(args, start_step), Watch(args, start_step)
    for step in range(start_step, args.steps):
        clock = Clock(device)

        # 1. sample G images per prompt from the current policy
        asked = pick_prompts(args, step)  # B labels or captions, or this process's share of them
        prompts = [p for p in zoo.captions_of(args.model, asked, args.names_for_judges) for _ in range(G)]  # N
        # each image's own numbers: a resumed run, or one of other batches, draws what this one would have drawn
        noise = image_noise(mine, policy.config.num_tokens, args.seed, step)  # (N, T)
        with zoo.autocast(device, args.dtype):
            cond, cond_mask, tokens, sampled_logprobs = sample_groups(
                policy, *encode(asked), G, noise, args.cfg_scale, args.temperature
            )  # (N, ...), (N, P) or None, (N, T), (N, T)
        clock.lap("sample")

        # 2. judge
        images = decode(tokenizer, tokens, args.micro_batch)  # (N, 3, H, W) in [0, 1]
        clock.lap("decode")
        judged, judge_seconds = judge(judges, images, prompts, partial(save, args, policy, optimizer, step))

        # 3. compare inside each group: every process has heard of all N images
        rewards = weighted_sum(judged, weights, G)  # (N,)
        advantages = group_advantages(rewards, G, divide) if not each else decoupled_advantages(judged, weights, G)
        clock.lap("judge")

        # 4. learn: --updates-per-batch AdamW steps on this batch, each accumulated over micro-batches
        with zoo.autocast(device, args.dtype):
            drawn = cond, tokens, cond_mask, args.micro_batch
            ref_logprobs, _ = ref = score_tokens(ref_model, *drawn, args.ref_cfg, args.temperature)  # (N, T), states
            old_logprobs = score_tokens(policy, *drawn, **scoring)[0] if sampler_differs else sampled_logprobs
        # beyond the paper: A (N, T), and {"kl" or "credit": (function, (N, T, ...))}; without its flags A (N,), and {}
        A, further = further_terms(args, advantages[mine], judged, mine, prompts, tokenizer, ref_model, drawn, *ref)
        clock.lap("reference")
        lr, history, norms = set_lr(args, optimizer, step), [], []
        for update in range(args.updates_per_batch):
            optimizer.zero_grad()
            for rows in torch.arange(len(mine), device=device).split(args.micro_batch):
                part = cond[rows], tokens[rows], None if cond_mask is None else cond_mask[rows]
                sums = [(function, x[rows]) for function, x in further.values()]  # none in plain GRPO
                with zoo.autocast(device, args.dtype):
                    logprobs, entropy, *sums = token_logprobs(policy, *part, **scoring, sums=sums)  # (n, T) each
                batch = old_logprobs[rows], ref_logprobs[rows], A[rows], args.clip_eps, args.kl_coef
                loss, stats = grpo_loss(logprobs, *batch, **dict(zip(further, sums, strict=True)))
                (loss * (len(rows) / len(mine))).backward()  # the last micro-batch may be a short one
                gap = sampler_gap(logprobs, sampled_logprobs[rows])
                history.append((update, len(rows), stats | dict(entropy=entropy.mean(), sampler_gap=gap)))
            norms.append(parallel.average_and_clip(policy, MAX_GRAD_NORM))
            if norms[-1].isfinite():  # else this update is skipped, and the watch counts the step
                optimizer.step()
        clock.lap("learn")

        # 5. report
        metrics = step_metrics(step, rewards, advantages, judged, judge_seconds, history, norms, lr, G)
        metrics = parallel.average(metrics | verify(args, images, prompts))
        log.write(metrics, clock)

        # 6. save
        if (step + 1) % SAMPLE_EVERY == 0:
            grid(f"samples/step_{step + 1:05d}.png", f"after {step + 1} steps")
        if watch.stops() or (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(args, policy, optimizer, step + 1)
        watch.go_on(metrics, len(rewards))
    log.close()
    after = grid("after.png", f"after {args.steps} steps of GRPO")
    look_back(args, {"base": ref_model, "tuned": policy}, after, tokenizer, encode)


# ---------------------------------------------------------------------------------------------------------------
# The loop's small steps


def pick_prompts(args, step):
    """
    This process's share of the B labels or captions of a step, which are a function of (seed, step) alone, distinct
    where the pool allows it.
    """
    rng, pool, B = np.random.default_rng([args.seed, step]), args.pool, args.prompts_per_step
    if pool is None:  # the toy's captions: every category equally often, and some captions twice
        picked = data.sample_captions(B, rng)
    else:
        picked = [pool[k] for k in rng.choice(len(pool), B, replace=len(pool) < B)]
    return [picked[k] for k in parallel.share(B)]


@torch.no_grad()
def decode(tokenizer, tokens, micro_batch):
    """Tokens (N, T) -> images (N, 3, H, W) in [0, 1], `micro_batch` at a time."""
    return to_unit(torch.cat([tokenizer.decode(part) for part in tokens.split(micro_batch)]))


def judge(judges, images, prompts, save):
    """
    judge_images of this process's images: {name: (N,)}, of the images of all processes, and {name: seconds}. A server
    that hangs is left at the first Ctrl-C: the policy is still that of the step before, and is saved.
    """
    try:
        judged, seconds = judge_images(judges, images, prompts)
    except KeyboardInterrupt:
        save()
        raise
    return {name: parallel.gather(values) for name, values in judged.items()}, seconds


def further_terms(args, A, judged, mine, prompts, tokenizer, ref_model, drawn, ref_logprobs, ref_states):
    """
    What goes beyond the paper. --weigh-tokens: the advantages A (N,) become (N, T). --kl exact and --credit-coef add to
    grpo_loss {its argument: (function, x (N, T, ...))}, which are `sums` of token_logprobs. judged: of the images of
    all processes, of which `mine` are this one's.
    """
    terms = {}
    if args.weigh_tokens:
        with zoo.autocast(args.device, args.dtype):
            unguided, _ = score_tokens(ref_model, *drawn, args.score_cfg, args.temperature)
        A = A[:, None] * token_weights(ref_logprobs, unguided)
    if args.kl == "exact":
        terms["kl"] = partial(exact_kl, ref_model=ref_model, temperature=args.temperature), ref_states
    if args.credit_coef:
        each = args.reward_norm == "each"
        of_sum = None if each else weighted_sum(judged, args.judge_weights, args.group_size)
        slopes = advantage_slopes(judged, args.judge_weights, args.group_size, of_sum, args.reward_norm != "mean")
        slopes = {name: args.credit_coef * slopes[name][mine] for name in args.credited[1]}
        gradient = code_gradient(args.credited[0], slopes, tokenizer, drawn[1], prompts, args.micro_batch)  # (N, T, D)
        terms["credit"] = partial(token_credit, codebook=tokenizer.quantize.vectors()), gradient
    return A, terms


def set_lr(args, optimizer, step):
    """Sets the learning rate of a step, and returns it."""
    lr = args.lr * (1 - step / args.steps if args.lr_schedule == "linear" else 1)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def verify(args, images, prompts):
    """{"right": share of the toy's images (N, 3, H, W) that the verifier accepts}. The policy never hears of it."""
    if not zoo.is_toy(args.model):
        return {}
    right = [data.satisfies(image, prompt) for image, prompt in zip(images.cpu(), prompts, strict=True)]
    return dict(right=float(np.mean(right)))


# ---------------------------------------------------------------------------------------------------------------
# Reporting


class Watch:
    """
    Ends a run after a step. Ctrl-C, SIGTERM or SIGHUP ask for it (a second one stops at once); so does a run that
    learns nothing any more: for PATIENCE steps in a row no gradient, or no value from a judge.
    """

    def __init__(self, args, start_step):
        self.args, self.bad, self.done = args, {}, start_step
        self.asked = self.stopping = 0  # the signal's number, once all processes know of it
        for number in zoo.STOPS:
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        # torchrun repeats a Ctrl-C that came to all; pictures of a run that is saved are left to --resume
        if self.done == self.args.steps or (self.asked and time.monotonic() > self.since + 1):
            zoo.interrupt(number, frame)
        self.asked, self.since = number, time.monotonic()
        tqdm.write("this step will be finished and saved; a second signal stops at once")

    def stops(self):
        """Whether this step is the last one, because a signal came to any of the processes."""
        self.stopping = parallel.largest(self.asked)
        return self.stopping > 0

    def go_on(self, metrics, N):
        """metrics: those of a step; N: images per step. Raises KeyboardInterrupt, Mistake."""
        self.done += 1
        if self.stopping or (self.done == self.args.steps and self.stops()):  # a signal may come amid the last save
            zoo.interrupt(self.stopping, None)
        bad = {"the gradient": not np.isfinite(metrics["grad_norm"])}
        bad |= {f"every value of {name}": metrics[f"{name}_not_finite"] == N for name in self.args.judge_weights}
        self.bad = {what: self.bad.get(what, 0) + 1 if failed else 0 for what, failed in bad.items()}
        if lost := " and ".join(what for what, steps in self.bad.items() if steps >= PATIENCE):
            raise Mistake(f"{lost} was not finite {PATIENCE} steps in a row; the last save is in {self.args.out}")


class Clock:
    """The seconds of a step's parts. Waits for the GPU at each lap, because its work is asynchronous."""

    def __init__(self, device):
        self.device, self.seconds, self.since = device, {}, time.perf_counter()

    def lap(self, part):
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[part], self.since = now - self.since, now


def step_metrics(step, rewards, advantages, judged, judge_seconds, history, norms, lr, group_size):
    """
    {name: number} of a step; the README's glossary explains each.

    rewards, advantages (N,); judged {name: (N,)}; history: a list of (update, images, {name: mean over these images});
    norms: of each update's gradient, 0-dimensional
    """
    metrics = dict(step=step, reward=rewards.mean().item(), reward_std=rewards.std().item())
    for name in history[0][2]:  # weighted, because the last micro-batch may be a short one
        # sampler_gap before the first update only: afterwards it would say how far the policy has moved
        some = [(n, stats[name].item()) for update, n, stats in history if update == 0 or name != "sampler_gap"]
        metrics[name] = float(np.average([value for _, value in some], weights=[n for n, _ in some]))
    for name, values in judged.items():
        finite = values[values.isfinite()]
        if len(finite):  # else there is no mean, and 0 may be the worst score
            metrics |= {f"{name}_mean": finite.mean().item(), f"{name}_std": finite.std(correction=0).item()}
        metrics |= {f"{name}_not_finite": len(values) - len(finite), f"{name}_seconds": judge_seconds[name]}
    groups = rewards.view(-1, group_size)
    return metrics | dict(
        grad_norm=torch.stack(norms).max().item(), lr=lr,  # NaN, if one of them is
        advantage_std=advantages.std().item(), advantage_max=advantages.abs().max().item(),
        equal_groups=(groups == groups[:, :1]).all(1).float().mean().item(),
    )  # fmt: skip


def step_line(metrics, seconds, width):
    """What the screen shows of a step, in at most 120 columns or `width`: what matters least is left out first."""
    judges = [name.removesuffix("_not_finite") for name in metrics if name.endswith("_not_finite")]
    missing = sum(metrics[f"{name}_not_finite"] for name in judges)
    parts = [f"step {metrics['step']:4d}", f"reward {metrics['reward']:6.3f}"]
    parts += [f"right {metrics['right']:4.0%}"] if "right" in metrics else []
    parts += [f"{missing} values missing"] if missing else []
    some = [f"kl {metrics['kl']:.4f}", f"entropy {metrics['entropy']:.3f}"]
    some += [f"{name} {metrics.get(f'{name}_mean', np.nan):6.3f}" for name in judges]
    some += [f"ratio {metrics['ratio']:.4f}", f"grad {metrics['grad_norm']:5.2f}"]
    while len(line := "  ".join([*parts, *some, f"{seconds:.2f} s"])) > min(120, width) and some:
        some.pop()
    return line


class Log:
    """Where the metrics of a step go: a line of metrics.jsonl, TensorBoard, a line on the screen."""

    def __init__(self, args, start_step):
        self.args, self.start_step = args, start_step
        self.bar = tqdm(initial=start_step, total=args.steps, unit="step", disable=parallel.rank() > 0)
        if parallel.rank() == 0:
            from torch.utils.tensorboard import SummaryWriter  # here, because its import takes seconds

            self.events = SummaryWriter(args.out, purge_step=start_step)

    def write(self, metrics, clock):
        if parallel.rank() > 0:
            return
        clock.lap("report")
        metrics |= {f"seconds_{part}": value for part, value in clock.seconds.items()}
        metrics |= {} if (peak := zoo.peak_memory_gb(self.args.device)) is None else dict(peak_memory_gb=peak)
        metrics = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in metrics.items()}
        log = self.args.out / "metrics.jsonl"
        with zoo.writing(log), open(log, "a") as file:
            file.write(json.dumps(metrics) + "\n")
        with zoo.writing(f"{self.args.out}/events*"):
            for name, value in metrics.items():
                self.events.add_scalar(name, value, metrics["step"])
        seconds = sum(clock.seconds.values())
        self.bar.write(step_line(metrics, seconds, shutil.get_terminal_size((120, 24)).columns))
        if metrics["step"] == self.start_step + 1:  # the first step pays for warming up
            left = self.args.steps - metrics["step"] - 1
            self.bar.write(f"about {seconds * left / 60:.1f} min to go, at the speed of this step")
        self.bar.update()

    def close(self):
        self.bar.close()
        if parallel.rank() == 0:
            self.events.close()


def draw_shown(args, policy, tokenizer, encode):
    """Pictures (n, 3, H, W) in [0, 1] of the same prompts and seeds each time, their captions, columns of a grid."""
    shown = data.balanced_captions(24)
    if args.pool:  # all of the toy's classes; of large pictures a page
        shown = args.pool[:: -(-len(args.pool) // (40 if zoo.is_toy(args.model) else 16))]
    sampling = dict(cfg_scale=args.cfg_scale, temperature=args.temperature, dtype=args.dtype)
    # one seed whatever --seed is: grids of runs compare
    images, _ = draw(policy, tokenizer, encode, shown, seed=1234, decode_batch=args.micro_batch, **sampling)
    # a category per column; two of the toy's colours per row
    columns = min(len(shown), len(data.CATEGORIES) if args.task == "t2i" else 10)
    return images, zoo.captions_of(args.model, shown, args.names_for_judges), columns


def draw_grid(args, policy, tokenizer, encode, judges, name, title):
    """
    Draws args.out/NAME: below each picture what the verifier finds (of a toy's) and what the judges say. Returns the
    pictures (n, 3, H, W).
    """
    images, captions, columns = draw_shown(args, policy, tokenizer, encode)
    judged, _ = judge_images(judges, images.to(args.device), captions)
    labels = label_images(args.model, images, captions)
    for k in range(len(labels)):  # spaces that do not break: a judge's value stays beside its name
        verdicts = [f"{judge.removeprefix('pyiqa:')}\u00a0{values[k]:.2f}" for judge, values in judged.items()]
        labels[k] += "\n" + "\u00a0 ".join(verdicts)
    save_grid(args.out / name, images, labels, columns, title=title)
    return images


def draw_before_and_after(args, base, after, tokenizer, encode):
    """before-after.png: each line of before.png above the same line of after.png, whose pictures are (n, 3, H, W)."""
    before, captions, columns = draw_shown(args, base, tokenizer, encode)
    labels = [label_images(args.model, before, captions, "before: ")]
    labels += [label_images(args.model, after, captions, "after: ")]
    title = f"before above after {args.steps} steps of GRPO"
    save_grid(args.out / "before-after.png", *in_turn([before, after], labels, columns), columns, title=title)


def look_back(args, policies, after, tokenizer, encode):
    """
    Curves, a picture of before and after, and the page of the run. policies: {name: model}, base and tuned; after: what
    after.png shows, (n, 3, H, W).
    """
    plot_curves(args)
    draw_before_and_after(args, policies["base"], after, tokenizer, encode)
    asked = args.pool[0] if args.pool else data.balanced_captions(6)[-1]
    (prompt,) = zoo.captions_of(args.model, [asked])
    sampling = dict(cfg_scale=args.cfg_scale, temperature=args.temperature)
    with zoo.autocast(args.device, args.dtype):
        report.write_run(args.out, report.writers(policies, tokenizer, encode, prompt, asked, **sampling))
    print(f"Look at {args.out}/report.html, or before-after.png and curves.png; "
          f"then: python evaluate.py --ckpt {args.out}")  # fmt: skip


def plot_curves(args):
    """curves.png from metrics.jsonl: a dot per step and a running mean over a tenth of the run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    logged = [json.loads(line) for line in (args.out / "metrics.jsonl").read_text().splitlines()]
    panels = [("reward", "reward"), ("kl", "KL to the reference, nats/token"), ("entropy", "entropy, nats/token")]
    panels += [("right", "share right, by the verifier")] if "right" in logged[0] else []
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3), layout="constrained")
    for axis, (key, title) in zip(axes, panels, strict=True):
        values, width = np.array([line[key] for line in logged]), max(1, len(logged) // 10)
        smooth = np.convolve(values, np.ones(width) / width, "valid")
        axis.plot(values, ".", markersize=2, alpha=0.4)
        axis.plot(np.arange(width - 1, len(values)) - (width - 1) / 2, smooth)
        axis.set(title=title, xlabel="step")
    zoo.write_whole(args.out / "curves.png", lambda path: figure.savefig(path, dpi=90))
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------
# Beginning, saving, resuming


def begin(args, policy, optimizer, grid):
    """Begins a run, or goes on with the one in the output folder; says what will happen; returns the first step."""
    start_step = resume(args, policy, optimizer) if args.resume else 0
    flags = json.dumps(flags_that_matter(args) | dict(steps=args.steps), indent=1)
    zoo.write_whole(args.out / "flags.json", lambda path: path.write_text(flags))
    N, T = args.prompts_per_step * args.group_size, policy.config.num_tokens
    millions = sum(p.numel() for p in policy.parameters()) / 1e6
    print(f"{args.model}: {millions:.1f}M parameters, {T} tokens per image, on {args.device}")
    print(
        f"{N} images/step = {args.prompts_per_step} prompts x {args.group_size} samples, in micro-batches of "
        f"{min(N, args.micro_batch)}; {args.updates_per_batch} update(s) per batch, {args.steps - start_step} steps"
    )
    print(f"rewards {args.rewards}; sampled at cfg {args.cfg_scale:g}, scored at cfg {args.score_cfg:g}; "
          f"lr {args.lr:g}, KL {args.kl_coef:g}; writing to {args.out}/")  # fmt: skip
    if args.credit_coef:
        others = ", ".join(name for name in args.judge_weights if name not in args.credited[1]) or "no other judge"
        print(f"credit per token from {', '.join(args.credited[1])}; {others} in the group's advantage alone")
    if start_step == 0:
        log = args.out / "metrics.jsonl"  # of a run that never saved, or somebody else's
        if parallel.rank() == 0 and log.exists():
            with open(args.out / "metrics-before.jsonl", "ab") as before:
                before.write(log.read_bytes())
            log.unlink()
        grid("before.png", "before: the base model")
    return start_step


def flags_that_matter(args):
    """The flags that a resumed run must share with the first to draw the same curve."""
    free = ["out", "resume", "quiet", "device", "save_every", "micro_batch", "checkpoint_layers", "shard", "compile"]
    free += ["judge_files", "qwen_server", "judge_batch", "judge_timeout"]  # where the judges are, not what they say
    free += ["ckpt", "base"]  # compared by their content
    # these follow from other flags
    free += ["lock", "files", "pool", "judge_weights", "judge_options", "names_for_judges", "credited"]
    free += ["steps"] if args.lr_schedule == "constant" else []  # with "linear" it sets every step's learning rate
    return {name: str(value) for name, value in vars(args).items() if name not in free}


def files_read(args):
    """{name: path} of what the run reads, so far as it is on this machine."""
    row = zoo.MODELS[args.model]
    files = {"base": zoo.find_file(args.base), "tokenizer": zoo.find_file(args.vq_ckpt or row.vq_ckpt)}
    files |= {"text encoder": Path(args.text_encoder or row.text_encoder)} if args.task == "t2i" else {}
    files |= {f"prompts {k}": Path(p) for k, p in enumerate(args.prompts or [], 1) if data.is_prompt_file(p)}
    files |= {f"judge {name}": path for name, path in files_of_judges(args.judge_weights, args.judge_options).items()}
    return {name: path for name, path in files.items() if path.exists()}


def save(args, policy, optimizer, step):
    """
    state.pt, all that --resume needs; it alone decides whether there is a run, and the one before is kept in case that
    the newest is damaged. Then policy.safetensors for sample.py and evaluate.py. (seed, step) is all the random state.
    """
    args.files = zoo.fingerprint(files_read(args), getattr(args, "files", None))
    state = dict(step=step, flags=flags_that_matter(args), files=args.files)
    state |= dict(policy=parallel.whole(policy.state_dict()), optimizer=parallel.whole(optimizer.state_dict()))
    newest, before = (args.out / name for name in STATES)
    zoo.write_whole(newest, lambda path: torch.save(state, path), keep=before)
    save_policy(args, state["policy"], step)


def save_policy(args, weights, step):
    """policy.safetensors; its header says which model this is, what it began from, how it was asked and its world."""
    weights = {name: value.detach().contiguous() for name, value in merged(weights).items()}
    header = dict(format="pt", model=args.model, step=str(step), base=str(Path(zoo.find_file(args.base)).resolve()))
    header |= {name: str(getattr(args, name)) for name in ("text_pad", "cfg_scale", "temperature")}
    header |= dict(tokenizer=zoo.tokenizer_hash(args.model))
    zoo.write_whole(args.out / "policy.safetensors", lambda path: zoo.save_weights(weights, path, header))


def saves(args):
    """The saves of the run in args.out, the newest first."""
    return [path for name in STATES if (path := args.out / name).is_file()]


def read_state(args):
    """The newest whole state of the run in args.out. Raises Mistake."""
    for path in (paths := saves(args)):
        try:
            with zoo.reading(path, f"start again in another --out, or from the last policy with --ckpt {args.out}"):
                state = zoo.load_tensors(path)  # on the CPU, where AdamW wants its step counters
                parts = {key: dict(state[key]) for key in ("flags", "files", "policy", "optimizer")}
                return parts | dict(step=int(state["step"]))
        except Mistake as error:
            if path == paths[-1]:
                raise
            print(f"{error}\ngoing on from the save before, {paths[-1]}")


def resume(args, policy, optimizer):
    """Restores policy and optimizer from state.pt and returns the next step. Raises Mistake."""
    state = read_state(args)
    step, now = state["step"], flags_that_matter(args)
    for name, value in state["flags"].items():
        if name in now and now[name] != value:  # --steps is among them with one schedule only
            raise Mistake(f"--{name.replace('_', '-')} is {now[name]}, but the run in {args.out} began with {value}")
    args.files = zoo.fingerprint(files_read(args), state["files"])
    hashes, before = ({name: entry[2] for name, entry in files.items()} for files in (args.files, state["files"]))
    if changed := [name for name in hashes | before if hashes.get(name) != before.get(name)]:
        raise Mistake(f"{', '.join(changed)}: changed since the run in {args.out} began; start again in another --out")
    if step > args.steps:
        raise Mistake(f"the run in {args.out} has done {step} steps already; --steps counts them all")
    with zoo.reading(f"a state in {args.out}", "it is of another model; start again in another --out"):
        parallel.load(state, policy, optimizer)
    save_policy(args, state["policy"], step)  # a run that was killed between its two files has an older one
    keep_metrics(args.out / "metrics.jsonl", step)
    return step


def keep_metrics(path, step):
    """
    Leaves in metrics.jsonl a whole line for each of the first `step` steps, and says how many are lacking: a run that
    was killed leaves lines after its last save, and the last one cut.
    """
    kept = {}
    for line in path.read_text(errors="replace").split("\n") if path.exists() else []:
        try:
            number = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            continue  # cut, blank, or no line of ours
        if number in range(step):
            kept[number] = line + "\n"
    if len(kept) < step:
        print(f"{path}: the lines of {step - len(kept)} of {step} steps are lost; the weights are whole")
    zoo.write_whole(path, lambda new: new.write_text("".join(kept[number] for number in sorted(kept))))


def how_to_go_on(args):
    if args and saves(args):
        return f"stopped; the same command goes on from the last save in {args.out} with --resume"
    return "stopped; nothing was saved"


def main(argv=None):
    zoo.run_script(parse_args, train, argv, how_to_go_on)


if __name__ == "__main__":
    main()
