"""
AR-GRPO (arXiv 2508.06924) in a hundred lines that run: the first file to read.

    python minimal.py     # trains the toy of 40 classes, such as "red ring", for 60 steps

A transformer writes a picture as T = 64 tokens, each one of V = 512 codes. Two judges score the pictures. Each class
gets a group of G pictures. If a picture scores above its group's mean, all its tokens become likelier; if below, less
likely. That is group relative policy optimisation (GRPO, arXiv 2402.03300).

Writes out/minimal/before-after.png, and out/minimal/step.png: the tensors of the first step. train.py is the same with
flags, resuming, several processes, captions and the official models; a test checks that both end with the same weights.

Shapes: B classes per step, G pictures of each, N = B*G pictures, T tokens of a picture, V codes.
"""

from pathlib import Path

import numpy as np
import torch

import data
import report
from model import image_noise
from prompts import captions_of
from rewards import load_judges
from tokenizer import to_unit
from zoo import load_model, load_tokenizer

SEED = 0
LR = 3.6e-4
KL_COEF = 0.045  # beta: how strongly the policy is held near the model that it started as
CLIP_EPS = 0.2  # epsilon: with several updates per batch, how far one batch may move a token's probability
MAX_GRAD_NORM = 1.0
REWARD_WEIGHTS = {"clip": 1.0, "realism": 0.25}  # clip: does it show the class? realism: does it look well made?
OUT = Path("out/minimal")


def log_policy(model, labels, tokens, cfg_scale):
    """log pi (N, T, V), nats: the distribution over the codes at each token; one pass, with guidance two."""
    logits = model(labels, tokens)  # (N, T, V): logits[:, t] predicts tokens[:, t] from the class and the tokens before
    if cfg_scale > 1:  # guidance: away from what the model would write without a class
        without = model(model.cls_embedding.null(labels), tokens)  # (N, T, V)
        logits = without + cfg_scale * (logits - without)
    return logits.log_softmax(-1)


def train(steps=60, B=8, G=8, cfg_scale=1.0, updates=1):
    """Trains the toy's base on its classes, prints a line per step, and returns the policy."""
    policy, ref_model = load_model("toy-c2i"), load_model("toy-c2i")  # the reference stays as it is
    tokenizer, judges = load_tokenizer("toy-c2i"), load_judges(REWARD_WEIGHTS)
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0)
    T = policy.config.num_tokens
    for step in range(steps):
        # 1. sample G pictures of each of B classes; a group is G consecutive rows
        classes = np.random.default_rng([SEED, step]).choice(40, B, replace=False)
        labels = torch.from_numpy(classes).repeat_interleave(G)  # (N,)
        noise = image_noise(range(B * G), T, SEED, step)  # (N, T) in [0, 1): picks each token from its distribution
        tokens, _ = policy.generate(labels, cfg_scale=cfg_scale, noise=noise)  # (N, T), without gradient

        # 2. judge: only the scores are needed, no gradient of tokenizer or judges
        captions = captions_of("toy-c2i", labels.tolist())  # N times "a photo of a red ring"
        images = to_unit(tokenizer.decode(tokens))  # (N, 3, 64, 64) in [0, 1]
        scores = {name: judge(images, captions) for name, judge in judges.items()}  # (N,) each
        rewards = sum(REWARD_WEIGHTS[name] * scores[name] for name in scores)  # (N,)

        # 3. compare inside each group: no value network
        groups = rewards.view(B, G)  # (B, G)
        advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)  # (B, G)
        advantages = advantages.view(B * G, 1)  # (N, 1): one number for all tokens of a picture

        # 4. learn
        warm_up = min(1, (step + 1) / (0.1 * steps))
        decay = 1 - step / steps
        optimizer.param_groups[0]["lr"] = LR * warm_up * decay
        with torch.no_grad():
            ref_logp = log_policy(ref_model, labels, tokens, cfg_scale)  # (N, T, V)
            ref_logprobs = ref_logp.gather(-1, tokens[..., None])[..., 0]  # (N, T)
        for update in range(updates):
            logp = log_policy(policy, labels, tokens, cfg_scale)  # (N, T, V)
            logprobs = logp.gather(-1, tokens[..., None])[..., 0]  # (N, T): log pi of the tokens drawn
            if update == 0:
                old_logprobs = logprobs.detach()  # (N, T): constants, of the policy before its first update
            ratio = (logprobs - old_logprobs).exp()  # (N, T): 1 in each step's first update, but with a gradient
            clipped = ratio.clamp(1 - CLIP_EPS, 1 + CLIP_EPS)  # (N, T)
            gain = torch.minimum(ratio * advantages, clipped * advantages)  # (N, T)
            d = ref_logprobs - logprobs  # (N, T)
            kl = d.exp() - d - 1  # (N, T): "k3" estimates KL(policy || reference); never negative, 0 in step 0
            loss = (KL_COEF * kl - gain).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
            optimizer.step()

        # 5. report: these pictures are from before the update. The verifier knows what is right; training never sees it
        right = np.mean([data.satisfies(image, caption) for image, caption in zip(images, captions, strict=True)])
        print(f"step {step:3d}  reward {rewards.mean():.3f}  right {right:4.0%}  kl {kl.mean():.4f}", flush=True)
        if step == 0:
            with torch.no_grad():
                after = log_policy(policy, labels, tokens, cfg_scale).gather(-1, tokens[..., None])[..., 0]  # (N, T)
            change = after - old_logprobs  # (N, T) nats: what the update did to each token
            report.draw_step(
                OUT / "step.png", captions[0], images, tokens, scores, rewards, advantages, change, REWARD_WEIGHTS, G
            )
    return policy


def main():
    policy = train()
    tokenizer = load_tokenizer("toy-c2i")
    labels = torch.arange(8) * 6 % 40  # (8,): all shapes and most colours
    noise = image_noise(range(8), 64, 1234)  # (8, T)
    rows = []
    for model in (load_model("toy-c2i"), policy):  # the same classes and random numbers
        tokens, _ = model.generate(labels, noise=noise)  # (8, T)
        rows.append(to_unit(tokenizer.decode(tokens)))  # (8, 3, 64, 64)
    captions = captions_of("toy-c2i", labels.tolist())
    report.save_grid(OUT / "before-after.png", torch.cat(rows), captions * 2, columns=8, title="before above after")
    print(f"Look at {OUT}/before-after.png and {OUT}/step.png")


if __name__ == "__main__":
    main()
