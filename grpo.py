"""
GRPO for images: sample groups, compare inside each group, push what beat its group, stay near the reference.

    sample_groups     G images for each prompt from the current policy
    group_advantages  A_i = (r_i - mean of its group) / (std of its group + 1e-4)          no value network
    token_logprobs    log pi(token_t | cond, tokens_<t) of every token, by policy and reference
    grpo_loss         the clipped objective and the KL penalty

GRPO: arXiv 2402.03300, eq. 3-4. For autoregressive images: arXiv 2508.06924 (AR-GRPO). The state is the prompt and the
tokens so far, the action is the next token, an episode is one image of T tokens. The reward comes once, at the end, and
all tokens of an image share its advantage.

Where we differ from the official code: it samples with guidance but scores log-probabilities without it, so it trains
another distribution than the one that drew the images. Here sampler and scorer share `model.guide` and
`model.policy_logprobs`. With the same cfg_scale their ratio is 1 on a fresh batch.

Everything is a pure function of tensors. `python grpo.py` works through one group. Shapes: B prompts, G samples each,
N = B*G images, prompt-major (a group is G consecutive rows, so grouping is a reshape), T image tokens, V codes,
P conditioning positions, C the transformer's width; n and t are some of N and of T.
"""

from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from model import guide, policy_logprobs

CHUNK = 2**24  # logits held at once: 67 MB


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
    tokens, logprobs = model.generate(
        cond, cond_mask, cfg_scale=cfg_scale, temperature=temperature, noise=noise, group_size=group_size
    )
    cond = cond.repeat_interleave(group_size, 0)
    cond_mask = cond_mask.repeat_interleave(group_size, 0)
    return Rollout(cond, cond_mask, tokens, logprobs)


def group_advantages(rewards, group_size, divide=True):
    """
    A_i = (r_i - mean(group)) / (std(group) + 1e-4), std unbiased; rewards (N,) -> advantages (N,), unitless.
    divide=False: A_i = r_i - mean(group), in units of the reward (Dr. GRPO, arXiv 2503.20783). A group whose rewards
    hardly differ then has little weight; with the division it has as much as any other.
    """
    groups = rewards.view(-1, group_size)
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
    Every image has exactly T tokens: no EOS, no padding, no mask. Returns (scalar loss, dict of detached scalars).
    Beyond the paper: kl (N, T) nats, of exact_kl, replaces k3; advantages are (N, T) with token_weights.

    The value of the first term says little: at rho = 1 it is -mean(A), which is 0 for whole groups. Its gradient is
    what counts: there it is REINFORCE's, with the group's mean as baseline.
    """
    A = advantages.view(len(logprobs), -1)  # (N, 1): one for all tokens of an image; (N, T) with token weights
    ratio = (logprobs - old_logprobs).exp()
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
    clipped_tokens = ((A > 0) & (ratio > 1 + clip_eps)) | ((A < 0) & (ratio < 1 - clip_eps))
    stats = dict(loss=loss, kl=kl.mean(), ratio=ratio.mean(), clip_frac=clipped_tokens.float().mean())
    return loss, {name: value.detach() for name, value in stats.items()}


def token_logprobs(model, cond, tokens, cond_mask, cfg_scale=1.0, temperature=1.0, ref_model=None, ref_states=None):
    """
    Log-probability of every token (N, T), from one teacher-forced pass (a doubled batch with guidance).

    Returns logprobs (N, T), nats, with gradient; the entropy (N, T), nats, of the distribution that is scored, without
    gradient; and None, or with a ref_model and its policy_states `exact_kl` (N, T), nats, with gradient.
    """
    states = policy_states(model, cond, tokens, cond_mask, cfg_scale)
    return score_states(model, states, tokens, temperature, ref_model, ref_states)


@torch.no_grad()
def score_tokens(model, rollout, micro_batch, cfg_scale=1.0, temperature=1.0):
    """
    token_logprobs of a Rollout without gradient, `micro_batch` images at a time: logprobs (N, T), nats, and the
    policy_states (N, T, C) that they came from. These are small beside the logits: LlamaGen's C is V/5 to V/21.
    """
    logprobs, states = [], []
    for part in split(rollout, micro_batch):
        states.append(policy_states(model, part.cond, part.tokens, part.cond_mask, cfg_scale))
        logprobs.append(score_states(model, states[-1], part.tokens, temperature)[0])
    return torch.cat(logprobs), torch.cat(states)


def policy_states(model, cond, tokens, cond_mask, cfg_scale=1.0):
    """Guided normed states (N, T, C). `model.head` turns them into the logits that the tokens (N, T) are drawn from."""
    if cfg_scale <= 1:
        return model.hidden(cond, tokens, cond_mask)
    cond, cond_mask = model.with_null(cond, cond_mask)
    return guide(model.hidden(cond, tokens.repeat(2, 1), cond_mask), cfg_scale)  # (2N, T, C) -> (N, T, C)


def score_states(model, states, tokens, temperature=1.0, ref_model=None, ref_states=None):
    """
    Like token_logprobs, from states (N, T, C). Logits (N, T, V) would be the largest tensors of training. So they are
    made for some positions at a time, and made again for the backward pass.
    """
    at_once = max(1, CHUNK // (len(tokens) * model.config.vocab_size))
    if at_once >= tokens.shape[1]:
        return score_positions(model, states, tokens, temperature, ref_model, ref_states)
    parts = []
    for start in range(0, tokens.shape[1], at_once):
        some = slice(start, start + at_once)
        part = checkpoint(
            score_positions, model, states[:, some], tokens[:, some], temperature,
            ref_model, ref_states[:, some] if ref_model else None,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
        parts.append(part)
    logprobs, entropies, kls = zip(*parts, strict=True)
    kl = torch.cat(kls, 1) if ref_model else None
    return torch.cat(logprobs, 1), torch.cat(entropies, 1), kl


def score_positions(model, states, tokens, temperature, ref_model, ref_states):
    """Log-probabilities, entropies and exact KL or None, (N, t) nats, of tokens (N, t) from states (N, t, C)."""
    logp = policy_logprobs(model.head(states), temperature)  # (N, t, V)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
        ref_logp = policy_logprobs(ref_model.head(ref_states), temperature) if ref_model else None
    kl = exact_kl(logp, ref_logp) if ref_model else None
    return logp.gather(-1, tokens[..., None])[..., 0], entropy, kl


class Batch(NamedTuple):
    """What a step learns from: the fields of its Rollout, and those that the loss needs; a row per image."""

    cond: torch.Tensor
    cond_mask: torch.Tensor
    tokens: torch.Tensor
    sampled_logprobs: torch.Tensor
    old_logprobs: torch.Tensor  # (N, T) nats, of pi_old: the sampler's, or recomputed
    ref_logprobs: torch.Tensor  # (N, T) nats
    ref_states: torch.Tensor  # (N, T, C): where --kl exact gets the reference's logits from
    advantages: torch.Tensor  # (N,), or (N, T) with --weigh-tokens


def split(batch, size):
    """Micro-batches of at most `size` images of a Rollout or Batch; the last one may be short."""
    columns = [tensor.split(size) for tensor in batch]
    return [type(batch)(*tensors) for tensors in zip(*columns, strict=True)]


def take(batch, rows):
    """Some rows of a Rollout or Batch."""
    return type(batch)(*[tensor[rows] for tensor in batch])


def sampler_gap(logprobs, sampled_logprobs):
    """
    mean |pi(token) / pi_sampler(token) - 1| of (N, T) nats each: is what is scored what was sampled? The mean of the
    ratio itself cannot tell, because it is 1 in expectation whatever the two distributions are.
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
    rank = advantages.view(-1, group_size).argsort(dim=1, stable=True).argsort(dim=1)  # (B, G), 0 is the lowest
    kept = (rank < keep // 2) | (rank >= group_size - (keep - keep // 2))
    return kept.flatten().nonzero()[:, 0]


def decoupled_advantages(scores, weights, group_size):
    """
    GDPO (arXiv 2601.05242): normalise each judge's scores inside their group, then sum, then normalise over the batch.
    A judge of small spread is then not drowned by one of large spread.

    scores, weights   {judge: (N,)} and {judge: float}
    Returns advantages (N,), unitless.
    """
    total = sum(weights[judge] * group_advantages(values, group_size) for judge, values in scores.items())
    return (total - total.mean()) / (total.std() + 1e-4) if total.any() else total


def exact_kl(logp, ref_logp):
    """
    KL(pi || pi_ref) at each position, (N, t) nats: the sum over the vocabulary that k3 estimates from the token drawn.
    logp (N, t, V) nats, requires grad; ref_logp (N, t, V) nats.

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


def demo(prompt="red ring", seed=11):
    """One group of eight from the toy base, and one update on it alone: out/group.png."""
    from pathlib import Path

    import numpy as np

    import data
    import report
    import zoo
    from model import image_noise
    from rewards import judge_images, load_judges, parse_rewards, weighted_sum
    from tokenizer import to_unit

    policy, tokenizer = zoo.load_model("toy-c2i"), zoo.load_tokenizer("toy-c2i")
    cond, cond_mask = zoo.load_encoder("toy-c2i")([data.TOY_CLASSES.index(prompt)])
    rollout = sample_groups(policy, cond, cond_mask, 8, image_noise(range(8), 64, seed))
    with torch.no_grad():
        images = to_unit(tokenizer.decode(rollout.tokens))  # (8, 3, 64, 64)
    captions = [data.class_caption(prompt)] * 8
    scores, _ = judge_images(load_judges(["clip", "realism"]), images, captions)
    weights = "clip=1,realism=0.25"
    rewards = weighted_sum(scores, parse_rewards(weights))
    advantages = group_advantages(rewards, 8)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-4, weight_decay=0)
    logprobs, _, _ = token_logprobs(policy, rollout.cond, rollout.tokens, rollout.cond_mask)
    old = rollout.sampled_logprobs
    loss, stats = grpo_loss(logprobs, old, old, advantages)  # the policy is still its own reference
    loss.backward()
    optimizer.step()
    after, _ = score_tokens(policy, rollout, 8)
    print(f"{captions[0]}: loss {stats['loss']:.4f}, ratio {stats['ratio']:.4f}: only its gradient counts")
    for i in range(8):
        change = (after - logprobs)[i].mean().item()
        print(
            f"picture {i}  reward {rewards[i]:.2f}  advantage {advantages[i]:+.2f}  its tokens moved {change:+.3f} nats"
        )
    group = report.Group(
        captions[0], weights, images.numpy(), {judge: values.numpy() for judge, values in scores.items()},
        rewards.numpy(), advantages.numpy(), (after - logprobs.detach()).numpy(), np.ones((8, 1)), drawn=8,
    )  # fmt: skip
    Path("out").mkdir(exist_ok=True)
    report.draw_group(group).savefig("out/group.png", dpi=100)
    print(f"out/group.png. {report.GROUP_NOTE}")


if __name__ == "__main__":
    demo()
