"""
GRPO for images: sample groups, compare inside each group, push what beat its group, stay near the reference.

    sample_groups     G images for each prompt from the current policy
    group_advantages  A_i = (r_i - mean of its group) / (std of its group + 1e-4)          no value network
    log_policy        log pi(v | cond, tokens_<t) of every code v at every position t
    grpo_loss         the clipped objective and the KL penalty

GRPO: arXiv 2402.03300, eq. 3-4. For autoregressive images: arXiv 2508.06924 (AR-GRPO). The state is the prompt and the
tokens so far, the action is the next token, an episode is one image of T tokens. The reward comes once, at the end, and
all tokens of an image share its advantage.

Where we differ from the official code: it samples with guidance but takes log-probabilities without it, so it trains
another distribution than the one that drew the images. Here the sampler and `log_policy` share `model.guide` and
`model.policy_logprobs`. With the same cfg_scale they are one distribution, which `sampler_gap` measures.

Nothing here keeps a state, reads or prints. Shapes: B prompts, G samples each, N = B*G images, prompt-major (a group is
G consecutive rows, so grouping is a reshape), T image tokens, V codes, P conditioning positions; n of the N images are
in a micro-batch.
"""

from typing import NamedTuple

import torch

from model import guide, policy_logprobs


class Rollout(NamedTuple):
    """What the policy drew; a row per image."""

    cond: torch.Tensor  # (N, ...)
    cond_mask: torch.Tensor  # (N, P)
    tokens: torch.Tensor  # (N, T)
    sampled_logprobs: torch.Tensor  # (N, T) nats, of the distribution that the tokens were drawn from


def sample_groups(model, cond, cond_mask, group_size, noise=None, cfg_scale=1.0, temperature=1.0):
    """
    G images per prompt. cond (B, ...) and cond_mask (B, P) are encoded once per prompt; noise (N, T) is
    `model.image_noise`. Returns a Rollout of N images.
    """
    cond = cond.repeat_interleave(group_size, 0)  # (N, ...), prompt-major
    cond_mask = cond_mask.repeat_interleave(group_size, 0)  # (N, P)
    tokens, logprobs = model.generate(cond, cond_mask, cfg_scale=cfg_scale, temperature=temperature, noise=noise)
    return Rollout(cond, cond_mask, tokens, logprobs)


def group_advantages(rewards, group_size, divide=True):
    """
    A_i = (r_i - mean(group)) / (std(group) + 1e-4), std unbiased; rewards (N,) -> advantages (N,), unitless.
    divide=False: A_i = r_i - mean(group), in units of the reward (Dr. GRPO, arXiv 2503.20783). A group whose rewards
    hardly differ then has little weight; with the division it has as much as any other.

    Raises ValueError for groups of one image, which has nothing to be compared with.
    """
    if group_size < 2:
        raise ValueError("a group needs two images or more: their rewards are compared with each other")
    groups = rewards.reshape(-1, group_size) * 1.0  # (B, G); rewards may be whole numbers or bools
    groups = groups - groups[:, :1]  # makes equal rewards exactly 0; the rounding of their mean would not
    centred = groups - groups.mean(1, keepdim=True)
    # 1e-4 not 1e-8: nearly equal rewards would otherwise be blown up into noise
    scale = groups.std(1, keepdim=True) + 1e-4 if divide else 1
    return (centred / scale).flatten()


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, clip_eps=0.2, kl_coef=0.1, kl=None):
    """
    L = mean over images i, tokens t of  -min(rho A_i, clip(rho, 1-eps, 1+eps) A_i) + beta (e^d - d - 1)
        rho = pi/pi_old at token t,  d = log(pi_ref/pi)                     GRPO: arXiv 2402.03300; k3: Schulman 2020

    logprobs      (N, T) nats, requires grad       old_logprobs  (N, T) nats, no grad
    ref_logprobs  (N, T) nats, frozen ref_model    advantages    (N,)  unitless, from group_advantages
    Every image has exactly T tokens: no EOS, no padding, no mask. So the losses that differ in how they average over
    tokens of longer and shorter answers (GRPO, BNPO, DAPO, Dr. GRPO) are one and the same here.
    Returns (scalar loss, dict of detached scalars).
    Beyond the paper: kl (N, T) nats, of exact_kl, replaces k3; advantages are (N, T) with token_weights.

    The value of the first term says little: at rho = 1 it is -mean(A), which is 0 for whole groups. Its gradient
    counts: at rho = 1 it is REINFORCE's, with the group's mean as baseline, in units of the group's std.
    """
    A = advantages.view(len(logprobs), -1)  # (N, 1): one for all tokens of an image; (N, T) with token weights
    ratio = (logprobs - old_logprobs.detach()).exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    # Only moves too far in the wanted direction are cut off: A > 0 and rho > 1 + eps, A < 0 and rho < 1 - eps. A token
    # that moved the wrong way keeps its gradient.
    policy_loss = -torch.minimum(ratio * A, clipped * A)
    if kl is None:
        # k3. Its *value* is an unbiased estimate of KL(pi || pi_ref) from tokens that pi drew, and never negative. Its
        # *gradient*, since drawing is not differentiated, is in expectation that of KL(pi_ref || pi).
        # expm1(d), because the rounding of e^d - 1 is larger than the result while d is small, as in the first steps.
        d = ref_logprobs - logprobs
        kl = d.expm1() - d
    loss = (policy_loss + kl_coef * kl).mean()
    too_high = (A > 0) & (ratio > 1 + clip_eps)
    too_low = (A < 0) & (ratio < 1 - clip_eps)
    stats = {
        "loss": loss,
        "kl": kl.mean(),
        "ratio": ratio.mean(),
        "clip_frac": (too_high | too_low).float().mean(),
    }
    return loss, {name: value.detach() for name, value in stats.items()}


def log_policy(model, batch, cfg_scale=1.0, temperature=1.0):
    """
    log pi (n, T, V), nats: the distribution over the codes at every position of batch.tokens (n, T), with this guidance
    and temperature. batch: a Rollout or a Batch. One teacher-forced pass; with guidance over a doubled batch, whose
    halves are mixed before the head.

    The largest tensor of training: 0.3 GB for 8 images of 384 px. At the peak five of this size are alive, six with
    --kl exact. --micro-batch sets n.
    """
    if cfg_scale <= 1:
        states = model.hidden(batch.cond, batch.tokens, batch.cond_mask)  # (n, T, C)
    else:
        cond, cond_mask = model.with_null(batch.cond, batch.cond_mask)  # (2n, ...), (2n, P)
        states = guide(model.hidden(cond, batch.tokens.repeat(2, 1), cond_mask), cfg_scale)  # (2n, T, C) -> (n, T, C)
    return policy_logprobs(model.head(states), temperature)


def at_tokens(logp, tokens):
    """The log-probabilities (n, T) that logp (n, T, V) gives to tokens (n, T)."""
    return logp.gather(-1, tokens[..., None])[..., 0]


def entropy_of(logp):
    """Entropy (n, T), nats, of logp (n, T, V): how undecided the policy is at each position."""
    return -(logp.exp() * logp).sum(-1)


class Batch(NamedTuple):
    """What a step learns from: its Rollout, and what the loss needs; a row per image."""

    cond: torch.Tensor
    cond_mask: torch.Tensor
    tokens: torch.Tensor
    sampled_logprobs: torch.Tensor
    advantages: torch.Tensor  # (N,), or (N, T) with --weigh-tokens
    # filled in by the first update; last, because `split` leaves out what is None
    old_logprobs: torch.Tensor = None  # (N, T) nats, of pi_old, the policy before that update
    ref_logprobs: torch.Tensor = None  # (N, T) nats


def split(batch, size):
    """Micro-batches of at most `size` images of a Rollout or Batch; the last one may be short."""
    columns = [values.split(size) for values in batch if values is not None]
    return [type(batch)(*values) for values in zip(*columns, strict=True)]


def take(batch, rows):
    """Some rows of a Rollout or Batch."""
    return type(batch)(*[values[rows] for values in batch])


def sampler_gap(logprobs, sampled_logprobs):
    """
    mean |pi(token) / pi_sampler(token) - 1|, from the log-probabilities (N, T) of both. Near 0 if the distribution that
    is learned is the one that was sampled. The mean of the ratio cannot tell: its expectation is 1 for any two.
    """
    return ((logprobs.detach() - sampled_logprobs).exp() - 1).abs().mean()


# ---------------------------------------------------------------------------------------------------------------
# One step beyond the paper: --learn-from, --reward-norm each, --kl exact, --weigh-tokens


def extremes(advantages, group_size, keep):
    """
    The rows (B * K,), ascending, of the images to learn from: in each group the K//2 lowest and the K - K//2 highest of
    advantages (N,), where K = keep; all rows where keep is group_size. An image of small advantage costs a full
    backward pass too. So sample and judge more, and learn from the extremes.

    After PODS (arXiv 2504.13818), which also searches for the best split, and normalises over the images that it keeps.
    Here advantages compare with all of the group, so those that are kept need not sum to 0.
    """
    groups = advantages.view(-1, group_size)
    order = groups.argsort(dim=1, stable=True)  # (B, G)
    rank = order.argsort(dim=1)  # (B, G), 0 is the lowest
    lowest = keep // 2
    highest = keep - lowest
    kept = (rank < lowest) | (rank >= group_size - highest)
    return kept.flatten().nonzero()[:, 0]


def decoupled_advantages(scores, weights, group_size):
    """
    GDPO (arXiv 2601.05242): normalise each judge's scores inside their group, then sum, then normalise over the batch.
    A judge of small spread is then not drowned by one of large spread.

    scores, weights   {judge: (N,)} and {judge: float}
    Returns advantages (N,), unitless.
    """
    total = sum(weights[judge] * group_advantages(values, group_size) for judge, values in scores.items())
    return (total - total.mean()) / (total.std() + 1e-4)


# --reward-norm: functions of the rewards (N,), G, the judges' scores {judge: (N,)} and their weights {judge: float},
# which return advantages (N,)
ADVANTAGES = {
    "group": lambda rewards, group_size, scores, weights: group_advantages(rewards, group_size),
    "mean": lambda rewards, group_size, scores, weights: group_advantages(rewards, group_size, divide=False),
    "each": lambda rewards, group_size, scores, weights: decoupled_advantages(scores, weights, group_size),
}


def exact_kl(logp, ref_logp):
    """
    KL(pi || pi_ref) at each position, (n, T) nats: the sum over the vocabulary that k3 estimates from the token drawn.
    logp (n, T, V) nats, requires grad; ref_logp (n, T, V) nats.

    The value has no noise. The gradient is that of this KL, where k3's is that of KL(pi_ref || pi) and as noisy as one
    draw (grpo_loss). As with k3, which positions are visited is not differentiated.
    """
    return (logp.exp() * (logp - ref_logp)).sum(-1)


def token_weights(guided, unguided, most=2.0):
    """
    Each token's share of its image's advantage, (N, T), mean 1 over an image: by how many nats guidance moves its
    log-probability (N, T) under the reference, at most `most` nats. A token that guidance leaves alone, such as
    background, has little to do with the prompt. So it gets little of the push, and backgrounds keep their diversity.

    After arXiv 2605.29198, which weights by |log p(token | cond) - log p(token | null)|. Up to normalisation, guidance
    moves a log-probability by cfg - 1 times that difference. The cap keeps one odd token from taking an image's whole
    push. Where guidance moves nothing (below 1e-3 nats on average) all shares are near 0.
    """
    weights = (guided - unguided).abs().clamp(max=most)
    return weights / weights.mean(1, keepdim=True).clamp(min=1e-3)
