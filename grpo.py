"""
GRPO for images: sample groups, compare inside each group, push what was better than its group, stay near the reference.

    sample_groups     G images per prompt from the current policy
    group_advantages  A_i = (r_i - mean of its group) / (std of its group + 1e-4)          no value network
    token_logprobs    log pi(token_t | cond, tokens_<t) of every token, by policy and reference
    grpo_loss         the clipped objective and the KL penalty
    exact_kl, token_credit, token_weights    one step beyond the paper

GRPO: arXiv 2402.03300, eq. 3-4. For autoregressive images: arXiv 2508.06924 (AR-GRPO). The state is the prompt and the
tokens so far, the action is the next token, an episode is one image of T tokens. The reward comes once, at its end, and
every token of an image shares its image's advantage.

Where we differ from the official code: it samples with guidance but scores log-probabilities without it, so that it
trains another distribution than the one that drew the images. Here sampler and scorer share `model.guide` and
`model.policy_logprobs`, and with the same cfg_scale their ratio is 1 on a fresh batch.

Everything is a pure function of tensors; `python grpo.py` works through one group. Shapes: B prompts, G samples each,
N = B*G images, prompt-major (a group is consecutive rows, so a group is a reshape), T image tokens, V codes of D
channels, P conditioning positions, C the transformer's width; n and t are some of N and of T.
"""

import torch
from torch.utils.checkpoint import checkpoint

from model import guide, policy_logprobs

CHUNK = 2**24  # logits at once: 67 MB


def sample_groups(model, cond, cond_mask, group_size, noise=None, cfg_scale=1.0, temperature=1.0):
    """
    G images per prompt: cond (B, ...) and cond_mask (B, P) or None are encoded once per prompt, noise (N, T) is
    `model.image_noise`. Returns cond (N, ...), cond_mask (N, P) or None, tokens (N, T), sampled_logprobs (N, T), nats.
    """
    sampling = dict(cfg_scale=cfg_scale, temperature=temperature, noise=noise, group_size=group_size)
    tokens, sampled_logprobs = model.generate(cond, cond_mask, **sampling)
    cond_mask = None if cond_mask is None else cond_mask.repeat_interleave(group_size, 0)
    return cond.repeat_interleave(group_size, 0), cond_mask, tokens, sampled_logprobs


def token_logprobs(model, cond, tokens, cond_mask=None, cfg_scale=1.0, temperature=1.0, sums=()):
    """
    What the policy gives each token of tokens (N, T), in one teacher-forced pass (two halves of a batch if guided).

    Returns logprobs (N, T), nats, with gradient, and without gradient the entropy (N, T), nats, of the distribution
    that is scored: the guided one only if cfg_scale > 1 here. Logits (N, T, V) would be the largest tensors of
    training, so they are made for some positions at a time, and where that is not all of them, made again for the
    backward pass.

    sums: what else is summed over the vocabulary while the logits are there, pairs of a function and what it reads at
    each position, x (N, T, ...). function(logp (N, t, V), tokens (N, t), x (N, t, ...)) -> (N, t); each adds a (N, T).
    """
    return score_states(model, policy_states(model, cond, tokens, cond_mask, cfg_scale), tokens, temperature, sums)


def policy_states(model, cond, tokens, cond_mask=None, cfg_scale=1.0):
    """Guided normed states (N, T, C): of them `model.head` makes the logits from which tokens (N, T) are drawn."""
    if cfg_scale <= 1:
        return model.hidden(cond, tokens, cond_mask)
    cond, cond_mask = model.with_null(cond, cond_mask)
    return guide(model.hidden(cond, tokens.repeat(2, 1), cond_mask), cfg_scale)  # (2N, T, C) -> (N, T, C)


def score_states(model, hidden, tokens, temperature=1.0, sums=()):
    """As token_logprobs, from states hidden (N, T, C)."""
    at_once = max(1, CHUNK // (len(tokens) * model.config.vocab_size))
    functions, read = [function for function, _ in sums], [x for _, x in sums]
    parts = list(zip(*(x.split(at_once, 1) for x in (hidden, tokens, *read)), strict=True))
    if len(parts) == 1:
        return score_part(model, temperature, functions, *parts[0])
    options = dict(use_reentrant=False, preserve_rng_state=False)
    scored = [checkpoint(score_part, model, temperature, functions, *part, **options) for part in parts]
    return tuple(torch.cat(values, 1) for values in zip(*scored, strict=True))


def score_part(model, temperature, functions, hidden, tokens, *read):
    """Log-probabilities and entropies (N, t), nats, of tokens (N, t) from guided normed states (N, t, C); and sums."""
    logp = policy_logprobs(model.head(hidden), temperature)  # (N, t, V)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    sums = [function(logp, tokens, x) for function, x in zip(functions, read, strict=True)]
    return logp.gather(-1, tokens[..., None])[..., 0], entropy, *sums


@torch.no_grad()
def score_tokens(model, cond, tokens, cond_mask, micro_batch, cfg_scale=1.0, temperature=1.0):
    """
    token_logprobs without gradient, `micro_batch` images at a time: logprobs (N, T), nats, and the states (N, T, C)
    that they came from, which take little memory beside the logits: LlamaGen's C is V / 5 to V / 21.
    """
    scored = []
    for rows in torch.arange(len(tokens), device=tokens.device).split(micro_batch):
        mask = None if cond_mask is None else cond_mask[rows]
        hidden = policy_states(model, cond[rows], tokens[rows], mask, cfg_scale)
        scored.append((score_states(model, hidden, tokens[rows], temperature)[0], hidden))
    return tuple(torch.cat(values) for values in zip(*scored, strict=True))


def group_advantages(rewards, group_size, divide=True):
    """
    A_i = (r_i - mean(group)) / (std(group) + 1e-4), std unbiased; rewards (N,) -> advantages (N,), unitless.
    divide=False: A_i = r_i - mean(group), in units of the reward (Dr. GRPO, arXiv 2503.20783). A group of equally good
    pictures, whose rewards differ by the judges' taste only, then says little; divided, it says as much as any other.

    A reward that is not finite is missing: mean and std are those of the group's other members, and its advantage is 0.
    1e-4 not 1e-8: nearly equal rewards would otherwise be blown up into noise.
    """
    centred, std = deviations(rewards, group_size)
    return (centred / (std + 1e-4) if divide else centred).flatten()


def deviations(rewards, group_size):
    """r_i - mean(group), (B, G), 0 where it is missing, and std(group), (B, 1): see group_advantages."""
    groups = rewards.view(-1, group_size)
    finite = groups.isfinite()
    count = finite.sum(1, keepdim=True).clamp(min=1)
    mean = torch.where(finite, groups, 0).sum(1, keepdim=True) / count
    groups = torch.where(finite, groups, mean)
    groups = groups - groups[:, :1]  # equal rewards then give exactly 0, where rounding of their mean would not
    # the filled members deviate by 0, so they count in the divisor only
    std = groups.std(1, keepdim=True) * ((group_size - 1) / (count - 1).clamp(min=1)).sqrt()
    return torch.where(finite, groups - groups.mean(1, keepdim=True), 0), std


def decoupled_advantages(judged, weights, group_size):
    """
    GDPO (arXiv 2601.05242): normalise each judge's values inside their group, then sum, then normalise over the batch,
    so that a judge of small spread is not drowned by one of large spread.

    judged, weights   {name: (N,)}, where NaN is missing and has no say, and {name: float}
    Returns advantages (N,), unitless.
    """
    total = sum_of_advantages(judged, weights, group_size)
    return (total - total.mean()) / (total.std() + 1e-4) if total.any() else total


def sum_of_advantages(judged, weights, group_size):
    """The weighted sum over judges of group_advantages, (N,): what decoupled_advantages normalises over the batch."""
    return sum(weights[name] * group_advantages(values, group_size) for name, values in judged.items())


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, clip_eps=0.2, kl_coef=0.1, kl=None, credit=None):
    """
    L = mean over images i, tokens t of  -min(rho A_i, clip(rho, 1-eps, 1+eps) A_i) + beta (e^d - d - 1)
        rho = pi/pi_old at token t,  d = log(pi_ref/pi)                     GRPO: arXiv 2402.03300; k3: Schulman 2020

    logprobs      (N, T) nats, requires grad       old_logprobs  (N, T) nats, no grad
    ref_logprobs  (N, T) nats, frozen ref_model    advantages    (N,)  unitless, from group_advantages
    Every image has exactly T tokens: no EOS, no padding, no mask. Returns (scalar loss, dict of detached scalars).
    One step beyond the paper: kl (N, T) nats, of exact_kl, replaces k3; credit (N, T), of token_credit, is subtracted;
    advantages are (N, T) where token_weights gives each token its share.

    The value of the first term says little: at rho = 1 it is -mean(A), which is 0 by construction. Its gradient is
    what counts: there, REINFORCE's with the group's mean as baseline.
    """
    A = advantages.view(len(logprobs), -1)  # (N, 1): one advantage for all tokens of an image
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    # Only moves too far in the wanted direction are cut off: A > 0 and rho > 1 + eps, A < 0 and rho < 1 - eps. A token
    # that moved the wrong way keeps its gradient.
    policy_loss = -torch.minimum(ratio * A, clipped * A)
    d = ref_logprobs - logprobs
    # k3. Its *value* is an unbiased estimate of KL(pi || pi_ref) from tokens that pi drew, and never negative. Its
    # *gradient*, since drawing is not differentiated, is in expectation that of KL(pi_ref || pi).
    # expm1(d), because the rounding of e^d - 1 is larger than the result while d is small, as in the first steps.
    kl = d.expm1() - d if kl is None else kl
    loss = (policy_loss + kl_coef * kl - (0 if credit is None else credit)).mean()
    cut = ((A > 0) & (ratio > 1 + clip_eps)) | ((A < 0) & (ratio < 1 - clip_eps))
    stats = dict(loss=loss, kl=kl.mean(), ratio=ratio.mean(), clip_frac=cut.float().mean())
    stats |= {} if credit is None else dict(credit=credit.abs().mean())
    return loss, {name: value.detach() for name, value in stats.items()}


def sampler_gap(logprobs, sampled_logprobs):
    """
    mean |pi(token) / pi_sampler(token) - 1| of (N, T) nats each: is what is scored what was sampled? The mean of the
    ratio itself cannot tell, because it is 1 in expectation whatever the two distributions are.
    """
    return ((logprobs.detach() - sampled_logprobs).exp() - 1).abs().mean()


# ---------------------------------------------------------------------------------------------------------------
# One step beyond the paper: --kl exact, --credit-coef and --weigh-tokens. The first two are functions for the `sums` of
# token_logprobs.


def exact_kl(logp, tokens, ref_hidden, ref_model, temperature):
    """
    KL(pi || pi_ref) at each position, (n, t) nats: the sum over the vocabulary that k3 estimates from the token drawn.

    logp  (n, t, V) nats, requires grad       ref_hidden  (n, t, C), the reference's `policy_states`

    The value has no noise. The gradient is that of this KL, where k3's is that of KL(pi_ref || pi) and as noisy as one
    draw (grpo_loss). As with k3, which positions are visited is not differentiated.
    """
    with torch.no_grad():
        ref_logp = policy_logprobs(ref_model.head(ref_hidden), temperature)  # (n, t, V)
    return (logp.exp() * (logp - ref_logp)).sum(-1)


def token_credit(logp, tokens, gradient, codebook):
    """
    sum_k pi(k) g . (e_k - z) at each position, (n, t) unitless: what the policy's next token adds to the advantage.

    logp      (n, t, V) nats, requires grad      gradient  (n, t, D) g, of the image's advantage by its code vectors
    tokens    (n, t), drawn: z = e_token         codebook  (V, D), its rows are the e_k

    The policy gradient is  grad E[r] = E sum_t sum_k grad pi_t(k) Q_t(k),  Q_t(k): the mean reward with code k at t.
    GRPO knows of Q_t only what the token drawn brought, mixed with what all the others of its image brought. Judges and
    decoder are differentiable, so to first order all V codes are known at once: Q_t(k) - Q_t(token) = g . (e_k - z).
    It is the straight-through estimator (arXiv 1308.3432), with which the tokenizer itself learns through its codebook.

    Biased twice: far codes are judged by the slope at z, and the later tokens are held fixed, where a policy would have
    gone on otherwise. So it mends form, and knows little of choices between whole alternatives. What follows the slope
    of a judge is also what deceives it: watch the verifier, or a judge of weight 0.
    """
    with torch.autocast(logp.device.type, enabled=False):  # bfloat16 would leave the mean two digits
        return (gradient * (logp.exp() @ codebook - codebook[tokens])).sum(-1)


def token_weights(guided, unguided, most=2.0):
    """
    Which share of its image's advantage each token gets, (N, T), of mean 1 over an image: how many nats guidance moves
    its log-probability (N, T) under the reference, at most `most` nats. What guidance leaves alone, such as a
    background, has little to do with what was asked, so neither has the picture's success: it keeps its diversity.

    After arXiv 2605.29198, which weights by |log p(token | cond) - log p(token | null)|; the guided log-probability is
    apart from the unguided one by cfg - 1 times that, and by what normalises it. The cap keeps one odd token from
    taking an image's whole push; where guidance moves nothing (below 1e-3 nats on average) all shares are near 0.
    """
    weights = (guided - unguided).abs().clamp(max=most)
    return weights / weights.mean(1, keepdim=True).clamp(min=1e-3)


def advantage_slopes(judged, weights, group_size, rewards=None, divide=True):
    """
    {judge: (N,)}: by how much an image's advantage grows per unit of a judge's value, its group's mean and spread held
    fixed. 0 where the value is missing, or the group's values are all equal: such a group teaches nothing here either.

    judged, weights   as in decoupled_advantages, whose slopes these are if `rewards` is None
    rewards, divide   (N,) and whether, else: the slopes are those of group_advantages(rewards, group_size, divide)
    """
    each = rewards is None
    scale = sum_of_advantages(judged, weights, group_size).std() + 1e-4 if each else 1
    slopes = {}
    for name, values in judged.items():
        _, std = deviations(values if each else rewards, group_size)  # (B, 1)
        std = std.expand(-1, group_size).flatten()  # (N,)
        slope = weights[name] / (std + 1e-4 if divide else torch.ones_like(std)) / scale
        slopes[name] = torch.where((std > 0) & values.isfinite(), slope, 0)
    return slopes


def demo():
    """One group of eight, from rewards to the push that each image's tokens get."""
    rewards = torch.tensor([0.91, 0.74, 0.88, 0.62, 0.95, 0.70, 0.81, 0.59])
    advantages = group_advantages(rewards, 8)
    logprobs = torch.full((8, 1), -2.0, requires_grad=True)  # T = 1; policy = old policy = reference, as at step 0
    loss, stats = grpo_loss(logprobs, logprobs.detach(), logprobs.detach(), advantages)
    loss.backward()
    print(f"eight pictures of one prompt: mean reward {rewards.mean():.3f}, std {rewards.std():.3f}")
    print("image  reward  advantage  d loss / d log-probability")
    for i in range(8):
        push = "its tokens become likelier" if advantages[i] > 0 else "its tokens become less likely"
        print(f"{i:5d}  {rewards[i]:6.2f}  {advantages[i]:+9.2f}  {logprobs.grad[i, 0]:+10.3f}   {push}")
    print(
        f"loss {stats['loss'].abs():.4f}, ratio {stats['ratio']:.0f}, KL {stats['kl']:.0f}: the gradient is what counts"
    )


if __name__ == "__main__":
    demo()
