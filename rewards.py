"""
The judges, and how their scores become one reward.

A judge is a function  fn(images (N, 3, H, W) in [0, 1], prompts: N strings) -> scores (N,)  made by a factory that
loads its weights and imports its library. Prompts repeat inside a batch (a group of samples shares its prompt), so a
judge computes text features once per distinct prompt. Adding a judge is a factory and a line in JUDGES.

    clip         cosine of image and caption features of an open_clip model: does it show what was asked?
    critic       toy only: probability that the picture is real and not sampled: does it look right?
    pyiqa:NAME   any no-reference quality metric of pyiqa, negated where lower is better (piqe needs no download)

`--rewards clip=1,critic=0.25` is their weighted sum. A score that is not finite has no say (it counts as its
group's mean) and is counted in the log; the official code scores an unreadable answer like the worst picture.
"""

import math
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from tokenizer import ResBlock, load_strict, read_weights

WEIGHTS = Path(__file__).parent / "weights"
TOY_CLIP = f"local-dir:{WEIGHTS / 'toy-clip'}"  # an open_clip model name: configuration, weights and words in a folder


# ---------------------------------------------------------------------------------------------------------------
# CLIP (arXiv 2103.00020)


def load_clip(name=TOY_CLIP, pretrained=None, device="cpu"):
    """(model, tokenizer) of open_clip, frozen, in eval mode. `name` is whatever open_clip.create_model takes."""
    import open_clip

    model = open_clip.create_model(name, pretrained=pretrained, device=device)
    return model.eval().requires_grad_(False), open_clip.get_tokenizer(name)


def clip_image_features(model, images):
    """Unit image features (N, E) of images (N, 3, H, W) in [0, 1], resized and normalised as the model was trained."""
    side = model.visual.image_size
    side = side[0] if isinstance(side, tuple) else side
    if images.shape[-1] != side:
        images = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (images.new_tensor(v)[:, None, None] for v in (model.visual.image_mean, model.visual.image_std))
    return model.encode_image((images - mean) / std, normalize=True)


def clip_scores(images, prompts, model, words):
    """Cosine of each image with its prompt, (N,) in [-1, 1]."""
    distinct = list(dict.fromkeys(prompts))
    texts = model.encode_text(words(distinct).to(images.device), normalize=True)  # (distinct, E)
    which = torch.tensor([distinct.index(prompt) for prompt in prompts], device=images.device)
    return (clip_image_features(model, images) * texts[which]).sum(-1)


def clip_judge(device, name=TOY_CLIP):
    model, words = load_clip(name, device=device)
    return partial(clip_scores, model=model, words=words)


# ---------------------------------------------------------------------------------------------------------------
# The toy's critic: what MANIQA and the realism questions are to the real run.


def critic_network():
    """Images (N, 3, 64, 64) in [-1, 1] -> one "real?" logit (N, 1). 0.9M parameters, most of them at 8x8 and 4x4."""
    return nn.Sequential(
        nn.PixelUnshuffle(4), nn.Conv2d(48, 64, 3, padding=1), ResBlock(64, 64),  # (N, 64, 16, 16)
        nn.Conv2d(64, 128, 3, 2, 1), ResBlock(128, 128),  # (N, 128, 8, 8)
        nn.Conv2d(128, 128, 3, 2, 1), ResBlock(128, 128),  # (N, 128, 4, 4)
        nn.GroupNorm(32, 128), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 1),
    )  # fmt: skip


def critic_scores(images, prompts, network):
    return network(images * 2 - 1)[:, 0].sigmoid()


def critic_judge(device, path=WEIGHTS / "toy-critic.safetensors"):
    network = load_strict(critic_network(), read_weights(path), path).eval().requires_grad_(False)
    return partial(critic_scores, network=network.to(device))


# ---------------------------------------------------------------------------------------------------------------
# pyiqa


def pyiqa_scores(images, prompts, metric):
    sign = -1 if metric.lower_better else 1
    return sign * torch.cat([metric(image[None]).reshape(1) for image in images])


def pyiqa_judge(name, device):
    import pyiqa

    known = pyiqa.list_models("NR")
    if name not in known:
        raise ValueError(f"pyiqa has no no-reference metric {name!r}; it has {', '.join(known)}")
    return partial(pyiqa_scores, metric=pyiqa.create_metric(name, device=device))


# ---------------------------------------------------------------------------------------------------------------
# Putting judges together

JUDGES = {"clip": clip_judge, "critic": critic_judge}  # and pyiqa:NAME


def parse_rewards(text):
    """ "clip=1,critic=0.5" -> {"clip": 1.0, "critic": 0.5}; a name alone weighs 1. Raises ValueError."""
    weights = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise ValueError(f"--rewards: {weight!r} in {part!r} is not a number") from None
        if name not in JUDGES and not name.startswith("pyiqa:"):
            raise ValueError(f"--rewards: no judge is called {name!r}; there are {', '.join(JUDGES)} and pyiqa:NAME")
        if not math.isfinite(weights[name]):
            raise ValueError(f"--rewards: the weight of {name} is not finite")
    return weights


def load_judges(names, device="cpu"):
    """{name: judge} for names of JUDGES or pyiqa:NAME, each loaded once. Raises ValueError, FileNotFoundError."""
    judges = {}
    for name in names:
        kind, _, metric = name.partition(":")
        judges[name] = pyiqa_judge(metric, device) if kind == "pyiqa" else JUDGES[name](device)
    return judges


@torch.no_grad()
def score(judges, images, prompts):
    """
    What each judge says of images (N, 3, H, W) in [0, 1]: {name: scores (N,), float32, may hold NaN} and
    {name: seconds}.
    """
    scores, seconds = {}, {}
    for name, judge in judges.items():
        start = time.perf_counter()
        scores[name] = judge(images, prompts).float()
        if images.is_cuda:
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - start
    return scores, seconds


def weighted_sum(scores, weights):
    """Rewards (N,): the sum over judges of weight x score. Missing scores are for grpo.fill_missing to see to."""
    return sum(weights[name] * values for name, values in scores.items())
