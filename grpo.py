"""
GRPO for images: sample groups, compare inside each group, push what was better than its group, stay near the reference.

    1. sample_groups     G images a prompt from the current policy
    2. group_advantages  A_i = (r_i - mean of its group) / (std of its group + 1e-4)          no value network
    3. token_logprobs    log pi(token_t | cond, tokens_<t) of every token, by policy and reference
    4. grpo_loss         the clipped objective and the KL penalty

GRPO: arXiv 2402.03300, eq. 3-4. For autoregressive images: arXiv 2508.06924 (AR-GRPO). An image is an episode of T
actions, the tokens; the reward comes once, at its end, and every token of an image shares its image's advantage.

Where we differ from the official code: it samples with guidance but scores log-probabilities without it, so that it
trains another distribution than the one that drew the images. Here sampler and scorer share
`model.policy_logprobs`, and with the same cfg_scale their ratio is 1 on a fresh batch.

Everything is a pure function of tensors. Shapes: B prompts, G samples each, N = B*G images, prompt-major (a group is
consecutive rows, so a group is a reshape), T image tokens, V codes.
"""

import torch

from model import policy_logprobs


def sample_groups(model, cond, cond_mask, group_size, generator=None, cfg_scale=1.0, temperature=1.0):
    """
    G images a prompt: cond (B, ...) and cond_mask (B, P) or None are encoded once a prompt, then repeated here.
    Returns cond (N, ...), cond_mask (N, P) or None, tokens (N, T) and old_logprobs (N, T), nats.
    """
    cond = cond.repeat_interleave(group_size, 0)
    cond_mask = None if cond_mask is None else cond_mask.repeat_interleave(group_size, 0)
    tokens, old_logprobs = model.generate(
        cond, cond_mask, cfg_scale=cfg_scale, temperature=temperature, generator=generator
    )
    return cond, cond_mask, tokens, old_logprobs


def token_logprobs(model, cond, tokens, cond_mask=None, cfg_scale=1.0, temperature=1.0):
    """
    What the policy gives each token of tokens (N, T), in one teacher-forced pass (two halves of a batch if guided).

    Returns logprobs (N, T), nats, with gradient, and the entropy (N, T), nats, without, of the distribution that is
    scored: the guided one only if cfg_scale > 1 here. Memory: logits and their log-softmax, each N*T*V*4 bytes.
    """
    both_tokens = tokens
    if cfg_scale > 1:
        (cond, cond_mask), both_tokens = model.with_null(cond, cond_mask), tokens.repeat(2, 1)
    logp = policy_logprobs(model(cond, both_tokens, cond_mask), cfg_scale, temperature)  # (N, T, V)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, tokens[..., None])[..., 0], entropy


@torch.no_grad()
def frozen_logprobs(model, cond, tokens, cond_mask, micro_batch, **scoring):
    """token_logprobs without gradient, `micro_batch` images at a time: (N, T), nats."""
    parts = torch.arange(len(tokens), device=tokens.device).split(micro_batch)
    masks = [None if cond_mask is None else cond_mask[rows] for rows in parts]
    each = zip(parts, masks, strict=True)
    return torch.cat([token_logprobs(model, cond[rows], tokens[rows], mask, **scoring)[0] for rows, mask in each])


def group_advantages(rewards, group_size):
    """
    A_i = (r_i - mean(group)) / (std(group) + 1e-4), std unbiased; rewards (N,) -> advantages (N,), unitless.

    1e-4 not 1e-8: a group of all but equal rewards would otherwise be blown up into noise. Equal rewards give exactly
    zero: differences are taken from the group's first member before the mean, which rounding would leave off by an ulp.
    """
    groups = rewards.view(-1, group_size)
    groups = groups - groups[:, :1]
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def fill_missing(score, group_size):
    """
    A judge's scores (N,) with those that are not finite set to the mean of their group's finite ones (0 if it has
    none), where they neither help nor hurt. A plain 0 would be the best score of a metric that is never positive.
    """
    groups = score.view(-1, group_size)
    finite = groups.isfinite()
    mean = torch.where(finite, groups, 0).sum(1, keepdim=True) / finite.sum(1, keepdim=True).clamp(min=1)
    return torch.where(finite, groups, mean).flatten()


def decoupled_advantages(scores, weights, group_size):
    """
    GDPO (arXiv 2601.05242): normalise each reward inside its group, then sum, then normalise over the batch, so that
    a reward of small spread is not drowned by one of large spread.

    scores, weights   {name: (N,)}, finite, and {name: float}
    Returns advantages (N,), unitless.
    """
    total = 0
    for name, score in scores.items():
        total = total + weights[name] * group_advantages(score, group_size)
    return (total - total.mean()) / (total.std() + 1e-4) if total.abs().max() > 0 else total


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, clip_eps=0.2, kl_coef=0.1):
    """
    L = mean over images i, tokens t of  -min(rho A_i, clip(rho, 1-eps, 1+eps) A_i) + beta (e^d - d - 1)
        rho = pi/pi_old at token t,  d = log(pi_ref/pi)                     GRPO: arXiv 2402.03300; k3: Schulman 2020

    logprobs      (N, T) nats, requires grad       old_logprobs  (N, T) nats, no grad
    ref_logprobs  (N, T) nats, frozen ref_model    advantages    (N,)  unitless, from group_advantages
    Every image has exactly T tokens: no EOS, no padding, no mask. Returns (scalar loss, dict of detached scalars).

    The value of the first term says little: at rho = 1 it is -mean(A), which is 0 by construction. Its gradient is
    what counts: there, REINFORCE's with the group's mean as baseline.
    """
    A = advantages[:, None]  # (N, 1): one advantage for all tokens of an image
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    # The minimum keeps the gradient where clipping would hide a mistake: for A > 0 only rho > 1 + eps is cut off,
    # for A < 0 only rho < 1 - eps.
    policy_loss = -torch.minimum(ratio * A, clipped * A)
    d = ref_logprobs - logprobs
    # k3: an unbiased estimate of KL(pi || pi_ref) that is never negative. expm1(d), because the rounding of e^d - 1
    # turned it negative while d is small, as in the first steps.
    kl = d.expm1() - d
    loss = (policy_loss + kl_coef * kl).mean()
    cut = ((A > 0) & (ratio > 1 + clip_eps)) | ((A < 0) & (ratio < 1 - clip_eps))
    stats = dict(loss=loss, kl=kl.mean(), ratio=ratio.mean(), clip_frac=cut.float().mean())
    return loss, {name: value.detach() for name, value in stats.items()}
