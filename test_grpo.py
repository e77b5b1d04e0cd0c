"""
The invariants, one per test. Each docstring names the bug that the test catches. No network; tiny seeded models.

    pytest -q test_grpo.py              # the quick ones
    pytest -q test_grpo.py -m slow      # the slow ones: more runs, a browser, official sizes
"""

import argparse
import asyncio
import base64
import copy
import errno
import hashlib
import html
import http.server
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import matplotlib.figure
import matplotlib.text
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import evaluate
import grpo
import metrics
import minimal
import parallel
import pretrain
import report
import rewards
import runs
import sample
import train
import zoo
from grpo import at_tokens, entropy_of, group_advantages, grpo_loss, log_policy, sample_groups, sampler_gap
from model import ModelConfig, Transformer, adapters, image_noise, keep_likeliest, merged, rounded, sample_row
from prompts import captions_of, clean_caption, find_class, load_encoder, read_prompts
from tokenizer import VQConfig, VQModel, to_uint8, to_unit
from zoo import MODELS, Mistake, load_model, load_tokenizer

HERE = Path(zoo.__file__).parent
torch.set_num_threads(1)  # on a busy machine two threads, which wait for each other, take ten times as long
C2I = ModelConfig("c2i", n_layer=2, n_head=2, dim=32, vocab_size=24, grid_size=3, num_classes=5)
T2I = ModelConfig("t2i", n_layer=2, n_head=2, dim=32, vocab_size=24, grid_size=3, caption_dim=16, cond_len=6)
BOTH = pytest.mark.parametrize("config", [C2I, T2I], ids=["c2i", "t2i"])
NAN, INF = math.nan, math.inf
QUICK_DTYPE = zoo.quick_dtype


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def no_network_no_gpu(monkeypatch):
    """The same on every machine: what is not in a folder here is not to be had, and scripts run in float32 on the CPU."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(zoo, "quick_dtype", lambda *_: "float32")


@pytest.fixture
def thin_toys(tmp_path_factory, monkeypatch):
    """The toys with one layer, for tests of what is done with them: a run then takes a third of its time."""
    for name in ("toy-c2i", "toy-t2i"):
        row, file = MODELS[name], tmp_path_factory.mktemp("thin") / f"{name}.safetensors"
        weights = {key: w for key, w in load_file(row.ckpt).items() if not re.match(r"layers\.[1-9]", key)}
        save_file(weights, file)
        monkeypatch.setitem(MODELS, name, replace(row, config=replace(row.config, n_layer=1), ckpt=file))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def tiny(config, seed=0):
    """A random model with sharp enough outputs that a wrong position or mask shows."""
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    for p in model.parameters():
        p.data.mul_(5 if p.ndim == 2 else 1)
    return model


def tiny_cond(config, n=4):
    """(cond, cond_mask) of n prompts; captions of several lengths, padded on the left."""
    if config.task == "c2i":
        return torch.arange(n) % config.num_classes, torch.ones(n, 1, dtype=torch.bool)
    mask = torch.arange(config.cond_len)[None] >= torch.tensor([0, 2, 4, 5] * n)[:n, None]
    return torch.randn(n, config.cond_len, config.caption_dim, generator=seeded(0)) * mask[..., None], mask


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# the algorithm: minimal.py, and what goes beyond it, written a second time ---------------------------------------------------------------------------------


def beyond_minimal(task, lr, kl_coef, ref_cfg=1.0, mean=False, weigh=False, steps=2, B=2, G=4, K=2):
    """What train.py adds to minimal.py, without grpo.py and micro-batches, on the toy: the policy after `steps`."""
    name = f"toy-{task}"
    policy, ref_model, tokenizer, encode = load_model(name), load_model(name), load_tokenizer(name), load_encoder(name)
    judges = rewards.load_judges(["clip", "realism"])
    learned = [p for n, p in policy.named_parameters() if n != "cls_embedding.uncond_embedding"]
    optimizer = torch.optim.AdamW(learned, betas=(0.9, 0.95), weight_decay=0)
    for step in range(steps):
        # sample, judge and compare
        rng = np.random.default_rng([0, step])
        prompts = rng.choice(40, B, replace=False).tolist() if task == "c2i" else data.sample_captions(B, rng)
        prompts = [prompt for prompt in prompts for _ in range(G)]
        captions = captions_of(name, prompts)
        cond, mask = encode(prompts)
        tokens, _ = policy.generate(cond, mask, noise=image_noise(range(B * G), 64, 0, step))
        with torch.no_grad():
            images = (tokenizer.decode(tokens) / 2 + 0.5).clamp(0, 1)
            reward = judges["clip"](images, captions) + 0.25 * judges["realism"](images, captions)
        groups = reward.view(B, G)
        A = (groups - groups.mean(1, keepdim=True)) / (1 if mean else groups.std(1, keepdim=True) + 1e-4)
        # of each group the K // 2 worst and the others best; each token's share of the advantage
        kept = []
        for group in range(0, B * G, G):
            order = sorted(range(group, group + G), key=lambda k: reward[k])
            kept += sorted(order[: K // 2] + order[G - K + K // 2 :])
        cond, mask, tokens, A = cond[kept], mask[kept], tokens[kept], A.flatten()[kept, None]
        at_tokens = partial(torch.gather, dim=-1, index=tokens[..., None])
        with torch.no_grad():
            logits, without = ref_model(cond, tokens, mask), ref_model(ref_model.cls_embedding.null(cond), tokens, mask)
            ref, plain = (without + ref_cfg * (logits - without)).log_softmax(-1), logits.log_softmax(-1)
            moved = (at_tokens(ref) - at_tokens(plain))[..., 0].abs().clamp(max=2)
        A = A * (moved / moved.mean(1, keepdim=True) if weigh else 1)
        # learn
        optimizer.param_groups[0]["lr"] = lr * (steps - step) / steps
        for update in range(2):
            logp = policy(cond, tokens, mask).log_softmax(-1)
            if update == 0:
                old = logp.detach()
            kl = (logp.exp() * (logp - ref)).sum(-1)
            gain = at_tokens(logp - old)[..., 0].exp() * A
            optimizer.zero_grad()
            (kl_coef * kl - gain).mean().backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
    return policy


MINIMAL = {  # flags of train.py, arguments of minimal.train, constants of it and of train.py
    "plain": ([], {}, {}),
    "guided": (["--cfg-scale", "2"], dict(cfg_scale=2.0), dict(MAX_GRAD_NORM=0.2)),
    # at 0.01 a token stands so near the clip's edge that another number of threads puts it on the other side
    "twice": (["--updates-per-batch", "2", "--clip-eps", "0.05"], dict(updates=2), dict(CLIP_EPS=0.05)),
}
BEYOND = {
    "t2i": dict(lr=6e-4, kl_coef=0.1),
    "best-c2i": dict(lr=5e-4, kl_coef=0.28, ref_cfg=2.0, mean=True, weigh=True),
    "best-t2i": dict(lr=6e-4, kl_coef=0.25, ref_cfg=3.0, mean=True, weigh=True),
}


def assert_ends_in(policy, folder, task):
    """The run's weights are those of the policy, and others than the base's."""
    ours, theirs, base = (flat(m) for m in (load_model(f"toy-{task}", folder), policy, load_model(f"toy-{task}")))
    assert (ours - theirs).abs().max() < 3e-6 and (ours - base).abs().mean() > 5e-5


@pytest.mark.parametrize("case", MINIMAL)
def test_a_run_of_train_py_ends_in_the_weights_of_minimal_py(case, tmp_path, monkeypatch, short_runs, smooth_adam):
    """Catches: a rate that never falls, a short micro-batch of another weight, a clip on one side, another default."""
    flags, options, constants = MINIMAL[case]
    for name, value in constants.items():
        monkeypatch.setattr(minimal, name, value)
    monkeypatch.setattr(train, "MAX_GRAD_NORM", minimal.MAX_GRAD_NORM)
    few = ["--steps", "2", "--prompts-per-step", "2", "--group-size", "3", "--micro-batch", "4"]
    train.main(["--task", "c2i", *flags, *few, "--out", str(tmp_path)])
    assert_ends_in(minimal.train(2, 2, 3, **options), tmp_path, "c2i")
    log = read_metrics(tmp_path)
    assert case != "guided" or all(row["grad_norm"] > 0.2 for row in log)  # the gradient was clipped
    assert case != "twice" or log[0]["clip_frac"] > 0  # and the ratio


@pytest.mark.parametrize("case", [slow("t2i"), slow("best-c2i"), "best-t2i"])
def test_what_goes_beyond_the_paper_is_its_second_writing(case, tmp_path, short_runs, smooth_adam):
    """Catches: images kept of the wrong group, a reference of other guidance or of another micro-batch."""
    flags = ["--preset", case] if case.startswith("best-") else ["--task", case]
    flags += ["--updates-per-batch", "2", "--clip-eps", "9"]  # nothing is clipped
    few = ["--steps", "2", "--prompts-per-step", "2", "--group-size", "4", "--learn-from", "2", "--micro-batch", "3"]
    train.main([*flags, *few, "--out", str(tmp_path)])
    assert_ends_in(beyond_minimal(case[-3:], **BEYOND[case]), tmp_path, case[-3:])


def test_the_rate_rises_for_a_tenth_of_the_run_and_falls_to_0():
    """Catches: a run without its warm-up, which ends with less diversity."""
    args, optimizer = SimpleNamespace(lr=1.0, lr_schedule="linear", steps=20), SimpleNamespace(param_groups=[])
    rates = [train.set_lr(args, optimizer, step) for step in range(20)]
    assert rates == pytest.approx([0.5, 0.95] + [1 - step / 20 for step in range(2, 20)])
    args.lr_schedule = "constant"  # the paper's
    assert train.set_lr(args, optimizer, 0) == train.set_lr(args, optimizer, 19) == 1


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


TWO = {"c2i": ["--classes", "7", "8"], "t2i": ["--prompts", "two circles", "a circle above a square"]}


@pytest.fixture
def short_runs(monkeypatch, thin_toys):
    """Runs of one layer, and without grids and pages, which take most of the time of a short one."""
    monkeypatch.setattr(sample, "draw_grid", lambda *_: None)
    monkeypatch.setattr(sample, "finish_run", lambda *_: None)
    monkeypatch.setattr(report, "draw_step", lambda *_, **__: None)


@pytest.fixture
def tiny_run(tmp_path):
    """tiny_run(task, *flags): a training of two steps on four pictures, in tmp_path/run: (args, folder, metrics)."""
    return partial(run_in, tmp_path / "run")


def run_in(folder, task, *flags):
    few = ["--steps", "2", "--prompts-per-step", "2", "--group-size", "2"]
    argv = ["--task", task, *few, *TWO[task], "--out", str(folder), *flags]
    train.main(argv)
    return train.parse_args(argv), folder, read_metrics(folder)


@pytest.fixture
def smooth_adam(monkeypatch):
    """
    AdamW divides a gradient by its size, so where that is little more than rounding, the machine decides which way a
    weight goes. With an epsilon of 1e-4 such weights stay, and two ways to compute a step agree in every weight.
    """
    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=1e-4))


# the equations -------------------------------------------------------------------------------------------------------


def normalised(values):
    """(r - mean) / (std + 1e-4) of numbers."""
    return (values - np.mean(values)) / (np.std(values, ddof=1) + 1e-4)


def by_group(values):
    return np.concatenate([normalised(values[k : k + 4].double().numpy()) for k in range(0, len(values), 4)])


def test_advantages_compare_inside_the_group():
    """Catches: one group of all N, a biased std, an eps of 1e-8 that blows nearly equal rewards up."""
    judged = torch.cat([torch.randn(16, generator=seeded(0)) * 3 + 7, torch.tensor([1e-4, 2e-4, 0, 1e-4])])
    assert group_advantages(judged, 4).tolist() == pytest.approx(by_group(judged), abs=1e-4, rel=1e-4)
    for value in (0.1, 1 / 3, 1e6, -7.7):  # equal: the rounding of a mean, divided by 1e-4, would be a random push
        equal = torch.full((24,), value)
        assert not group_advantages(equal, 8).any() and not grpo.decoupled_advantages({"a": equal}, {"a": 1.0}, 8).any()
    assert group_advantages(torch.tensor([True, False]), 2).tolist() == pytest.approx([0.707, -0.707], abs=1e-3)
    with pytest.raises(ValueError, match="two images or more"):
        group_advantages(judged, 1)


def test_decoupled_advantages_normalise_each_judge_then_the_batch():
    """Catches: weights applied before normalising, where they would be lost; no second normalisation."""
    scores = {"a": torch.randn(20, generator=seeded(0)) * 100, "b": torch.randn(20, generator=seeded(1))}
    total = by_group(scores["a"]) + 0.25 * by_group(scores["b"])
    found = grpo.decoupled_advantages(scores, {"a": 1.0, "b": 0.25}, 4)
    assert found.tolist() == pytest.approx(normalised(total), abs=1e-4, rel=1e-4)


def test_the_extremes_are_the_lowest_and_the_highest_of_each_group():
    """Catches: an odd K that loses its middle, rows of the wrong group, equal rewards that keep more or fewer than K."""
    values = torch.tensor([3.0, 1, 2, 0, 5, 1, 1, 1, 1, 1])
    assert grpo.extremes(values, 5, 3).tolist() == [0, 3, 4, 5, 8, 9]  # one low and two high of each five
    assert grpo.extremes(values, 5, 2).tolist() == [3, 4, 5, 9]
    assert grpo.extremes(values, 5, 5).tolist() == list(range(10))


def test_a_token_that_guidance_leaves_alone_gets_little_of_the_push():
    """Catches: 0 / 0 where guidance moves nothing, a tiny move blown up, an odd token that takes the whole push."""
    moved = torch.tensor([[0.5, -1, 9, 0.5], [5e-4, 0, 0, 15e-4], [0, 0, 0, 0]])
    shares = [[0.5, 1, 2, 0.5], [0.5, 0, 0, 1.5], [0, 0, 0, 0]]
    assert torch.allclose(grpo.token_weights(moved, torch.zeros(3, 4)), torch.tensor(shares))


def test_the_loss_is_the_equation_token_by_token():
    """Catches: min turned into max, a clip on one side only, a mean of means: all of them train, and worse."""
    logprobs, A = -torch.rand(5, 7, generator=seeded(0)) * 3, torch.tensor([0.8, 0, -0.4, -2, -0.6])
    old, ref = logprobs + 0.4 * torch.randn(2, 5, 7, generator=seeded(1))
    loss, stats = grpo_loss(logprobs, old, ref, A, clip_eps=0.3, kl_coef=0.7)
    terms, cut = [], {True: 0, False: 0}  # by the sign of the advantage
    for i, t in itertools.product(range(5), range(7)):
        rho, a, d = math.exp(logprobs[i, t] - old[i, t]), A[i].item(), float(ref[i, t] - logprobs[i, t])
        kl, is_cut = math.exp(d) - d - 1, (a > 0 and rho > 1.3) or (a < 0 and rho < 0.7)
        cut[a > 0] += is_cut
        terms.append((-min(rho * a, min(max(rho, 0.7), 1.3) * a) + 0.7 * kl, kl, rho, is_cut, abs(rho - 1)))
    assert min(cut.values()) > 1  # both sides were reached
    found = [loss, *(stats[name] for name in ("loss", "kl", "ratio", "clip_frac")), sampler_gap(logprobs, old)]
    means = np.mean(terms, 0)
    assert [value.item() for value in found] == pytest.approx([means[0], *means], abs=1e-5)
    assert grpo_loss.__defaults__[:2] == (0.2, 0.1)  # the paper's
    logprobs.requires_grad_()  # given twice, as in the first update: the gradient is REINFORCE's, and not 0
    loss, stats = grpo_loss(logprobs, logprobs, logprobs.detach(), A, kl_coef=0.0)
    loss.backward()
    assert torch.allclose(logprobs.grad, -A[:, None].expand(5, 7) / 35)
    logged = *stats.values(), sampler_gap(logprobs, old)  # must not keep the graph
    assert not any(value.requires_grad for value in logged)


def test_a_small_kl_keeps_its_digits():
    """Catches: e^d - 1 - d, which is all rounding for a small d: a first step of noise, and a KL below 0."""
    logprobs = torch.randn(64, 9, generator=seeded(0)) * 3
    near = logprobs + torch.randn(64, 9, generator=seeded(1)) * 1e-4
    kl = grpo_loss(logprobs, logprobs, near, torch.zeros(64))[1]["kl"]
    assert kl == pytest.approx(float((near - logprobs).double().square().mean() / 2), rel=0.01)
    assert grpo_loss(logprobs, logprobs, logprobs, torch.zeros(64))[1]["kl"] == 0


# the transformer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg_scale, temperature, top_k", [(1.0, 1.0, 0), (1.0, 0.6, 0), (2.0, 1.5, 0), (1.0, 1.0, 3)])
def test_tokens_are_drawn_as_often_as_the_policy_says(cfg_scale, temperature, top_k):
    """Catches: a sampler that is off by one token or draws at another temperature; ratio and KL would not tell."""
    model, n = tiny(C2I), 20_000
    with torch.no_grad():  # class 2, and no class
        cond, without = model(torch.tensor([2, 5]), torch.zeros(2, 9, dtype=torch.long))[:, 0].double()  # (V,) each
    p = ((without + cfg_scale * (cond - without)) / temperature).softmax(-1)
    p = torch.where(p >= p.sort().values[-(top_k or 24)], p, 0) / p.sort().values[-(top_k or 24) :].sum()
    model.config = replace(C2I, grid_size=1)  # only the first token
    options = dict(cfg_scale=cfg_scale, temperature=temperature, top_k=top_k)
    tokens, logprobs = model.generate(torch.full((n,), 2), noise=torch.rand(n, 1, generator=seeded(0)), **options)
    assert torch.allclose(logprobs[:, 0].double().exp(), p[tokens[:, 0]], atol=1e-5)
    seen = torch.bincount(tokens[:, 0], minlength=24).double()
    assert not seen[p == 0].any()
    assert ((seen - n * p) ** 2 / (n * p)).nan_to_num(0).sum() < 60  # chi-square, 23 degrees: one seed in 30,000


@BOTH
def test_an_image_is_the_same_in_any_company(config):
    """Catches: noise by place in a batch, with which another micro-batch or number of processes draws other images."""
    model, (cond, mask) = tiny(config), tiny_cond(config)
    noise = image_noise(range(12), 9, 7, 3)
    rollout = sample_groups(model, cond, mask, 3, noise, cfg_scale=2.0, temperature=0.7)
    for k in range(12):
        one = slice(k // 3, k // 3 + 1)
        options = dict(noise=image_noise([k], 9, 7, 3), cfg_scale=2.0, temperature=0.7)
        its_mask = mask[one] if k > 2 else None  # the first prompt has no padding
        alone, its_logprobs = model.generate(cond[one], its_mask, **options)
        assert torch.equal(alone[0], rollout.tokens[k])
        assert torch.allclose(its_logprobs[0], rollout.sampled_logprobs[k], atol=1e-5)
    assert len(noise.unique()) == noise.numel() and not torch.isin(noise, image_noise(range(12), 9, 7, 4)).any()


@pytest.mark.parametrize("top_k, top_p", [(1, 1.0), (3, 1.0), (99, 1.0), (0, 0.3), (0, 0.9), (4, 0.8), (0, 1e-9)])
def test_filtering_keeps_the_likeliest_and_nothing_else_is_drawn(top_k, top_p):
    """Catches: k - 1 tokens in place of k, a nucleus without the token that crosses p, the first or last token drawn."""
    logp = torch.randn(16, 7, generator=seeded(0)).mul(2).log_softmax(-1)
    kept = keep_likeliest(logp, top_k, top_p)
    for row, found in zip(logp.exp().tolist(), kept.exp(), strict=True):
        order = sorted(range(7), key=lambda v: -row[v])[: top_k or 7]
        mass, nucleus = sum(row[v] for v in order), []
        while order and (top_p == 1 or not nucleus or sum(row[v] for v in nucleus) <= top_p * mass):
            nucleus.append(order.pop(0))
        total = sum(row[v] for v in nucleus)
        assert found.tolist() == pytest.approx([row[v] / total if v in nucleus else 0 for v in range(7)], abs=1e-6)
    for draw, pick in ((0.0, 0), (1 - 2**-24, -1)):  # the least and the greatest; 1e-6: masses that do not sum to 1
        tokens = sample_row(kept - 1e-6, torch.full((16,), draw)).tolist()
        assert tokens == [row.isfinite().nonzero()[pick].item() for row in kept]


@BOTH
@pytest.mark.parametrize("cfg_scale, temperature", [(1.0, 1.0), (2.0, 1.0), (3.0, 0.7)])
def test_what_is_learned_is_what_was_sampled(config, cfg_scale, temperature):
    """Catches: guidance in sampling alone, as in the release (its ratio says 1, they differ by 0.86); a cache off by one."""
    model, (cond, mask) = tiny(config), tiny_cond(config, 2)
    how = dict(cfg_scale=cfg_scale, temperature=temperature) if cfg_scale > 1 else {}  # the defaults are the first case
    rollout = sample_groups(model, cond, mask, 3, image_noise(range(6), 9, 0), **how)
    logprobs = at_tokens(log_policy(model, rollout, **how), rollout.tokens)
    assert ((logprobs - rollout.sampled_logprobs).exp() - 1).abs().max() < 1e-4
    unguided = at_tokens(log_policy(model, rollout, 1.0, temperature), rollout.tokens)
    assert cfg_scale == 1 or sampler_gap(unguided, rollout.sampled_logprobs) > 0.05


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_guidance_mixes_logits_and_a_recomputed_block_is_the_same(config, dtype):
    """Catches: states that are mixed after the head's rounding, a block whose second run differs, a wrong entropy."""
    (cond, mask), tokens, found = tiny_cond(config), torch.randint(24, (4, 9), generator=seeded(1)), []
    for layers in (False, True):
        model = tiny(config)
        model.checkpoint_layers = layers
        with zoo.autocast("cpu", dtype):
            logp = log_policy(model, grpo.Rollout(cond, mask, tokens, tokens), 2.5, 0.7)
        (at_tokens(logp, tokens) * torch.arange(9)).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((logp.detach(), gradient / gradient.abs().max()))
    with torch.no_grad(), zoo.autocast("cpu", dtype):  # LlamaGen's own order: the head, then guidance
        logits, without = (model(c, tokens, mask) for c in (cond, model.cls_embedding.null(cond)))
        plain = ((without + 2.5 * (logits - without)) / 0.7).log_softmax(-1)
    assert torch.allclose(plain, found[0][0], atol=1e-5)
    assert torch.allclose(-(plain.exp() * plain).sum(-1), entropy_of(found[0][0]), atol=1e-5)
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-5 if dtype == "float32" else 2e-2)


def test_bfloat16_rounds_the_layers_and_neither_weights_nor_logits():
    """Catches: a softmax over bfloat16 logits, whose log-probabilities have two digits: the ratio would be noise."""
    model, (cond, mask) = tiny(T2I), tiny_cond(T2I)
    exact = model(cond, torch.ones(4, 9, dtype=torch.long), mask)
    with zoo.autocast("cpu", "bfloat16"):
        ours = model(cond, torch.ones(4, 9, dtype=torch.long), mask)
        tokens, old = model.generate(cond, mask)
        new = at_tokens(log_policy(model, grpo.Rollout(cond, mask, tokens, old)), tokens)
    assert (new - old).abs().mean() < 0.02
    assert (new - old)[:, 0].abs().mean() < 1e-3  # text is rounded alike in sampler and scorer
    assert 1e-5 < (ours - exact).abs().max() < 0.2 and model.output.weight.dtype == torch.float32
    assert (ours.bfloat16().float() != ours).float().mean() > 0.9  # the head itself was not rounded
    layer = model.layers[0]
    copied = rounded(layer, torch.bfloat16)  # of --compile
    dtypes = [x.attention.wo.weight.dtype for x in (copied, layer)] + [copied.ffn_norm.weight.dtype]
    assert dtypes == [torch.bfloat16, torch.float32, torch.float32] and rounded(layer, torch.float32) is layer


def test_bfloat16_is_the_default_where_the_hardware_has_it(monkeypatch):
    """Catches: bfloat16 on a GPU or a processor that only imitates it, or for a toy on one, which gains nothing."""
    for able, expected in (("avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), ("avx2", "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {able: True}, raising=False)
        assert QUICK_DTYPE("llamagen-b-256", "cpu") == expected and QUICK_DTYPE("toy-c2i", "cpu") == "float32"
    monkeypatch.setattr(torch.cuda, "device", mock.MagicMock())
    for inside, expected in ((True, "bfloat16"), (False, "float32")):  # a T4 has it by emulation alone
        supported = lambda including_emulation=True, inside=inside: including_emulation or inside  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert QUICK_DTYPE("toy-c2i", "cuda:1") == expected


class Dtypes(TorchDispatchMode):
    seen = set()  # of what operations return

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        found = op(*args, **kwargs or {})
        self.seen |= {x.dtype for x in tree_leaves(found) if isinstance(x, torch.Tensor)}
        return found


@BOTH
def test_a_device_never_sees_float64_or_complex_numbers(config):
    """Catches: a rotation by complex numbers, or a sum in float64, on an accelerator that has neither (MPS)."""
    model, tokenizer, (cond, mask) = tiny(config), load_tokenizer("toy-c2i"), tiny_cond(config)
    noise = image_noise(range(8), 9, 0)
    with Dtypes() as watch:
        rollout = sample_groups(model, cond, mask, 2, noise, 2.0, 0.7)
        tokenizer.encode(tokenizer.decode(rollout.tokens[:1, :1].expand(1, 64)))
        logp = log_policy(model, rollout, 2.0, 0.7)
        logprobs, A = at_tokens(logp, rollout.tokens), grpo.decoupled_advantages({"a": torch.rand(8)}, {"a": 1.0}, 2)
        A = A[:, None] * grpo.token_weights(logprobs, rollout.sampled_logprobs)
        grpo_loss(logprobs, logprobs, logprobs, A, kl=grpo.exact_kl(logp, logp))[0].backward()
        sampler_gap(entropy_of(logp), rollout.sampled_logprobs)
    assert {torch.float32, torch.int64} < watch.seen
    assert watch.seen.isdisjoint({torch.float64, torch.complex64, torch.complex128})


# the official code's own outputs: assets/official-*.npz --------------------------------------------------------------
#
# Made by the official LlamaGen code (FoundationVision/LlamaGen) in float32 on a CPU. Each file holds inputs, outputs and
# `meta`: the official configuration, and every parameter's name and shape. Weights are made from these by `fill`.


def fill(name, shape):
    """Weights from a name and a shape: gains near 1, biases near 0, matrices scaled by 1/sqrt(fan-in)."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    noise = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        return torch.from_numpy((0.1 * noise + (1.0 if name.endswith("weight") else 0.0)).astype(np.float32))
    gain = 4.0 if name == "output.weight" else 1.0  # a sharper head keeps greedy choices away from ties
    return torch.from_numpy((gain * noise / np.sqrt(int(np.prod(shape[1:])))).astype(np.float32))


def official(name):
    """(vectors, the network of the official configuration, with filled weights under the official names, no others)"""
    vectors = np.load(HERE / f"assets/official-{name}.npz")
    meta = json.loads(str(vectors["meta"]))
    a, filled = meta["args"], {name: fill(name, shape) for name, shape in meta["shapes"].items()}
    if name == "vq":
        sizes = tuple(a["encoder_ch_mult"]), a["z_channels"], a["codebook_size"], a["codebook_embed_dim"]
        model = VQModel(VQConfig(*sizes))
    else:
        sizes = a["n_layer"], a["n_head"], a["dim"], a["vocab_size"], math.isqrt(a["block_size"])
        text = a.get("num_classes", 1000), a.get("caption_dim", 2048), a["cls_token_num"]
        model = Transformer(ModelConfig(name, *sizes, *text))
    model = zoo.load_strict(model, filled, name, ignore=("quantize.codebook_used",)).eval().requires_grad_(False)
    return {key: torch.from_numpy(vectors[key]) for key in vectors.files if key != "meta"}, model


@pytest.mark.parametrize("name", ["c2i", "t2i"])
def test_the_transformer_agrees_with_the_official_code(name):
    """Catches: names, shapes, RoPE, norms, masks or guidance that differ and draw other pictures."""
    found, model = official(name)
    cond, tokens, mask = found["cond"], found["tokens"].long(), found.get("mask")
    logprobs = model(cond, tokens, mask).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert (logprobs - found["logprobs"]).abs().max() < 1e-4
    assert torch.allclose(model(cond, tokens), model(cond, tokens, torch.ones(cond.shape[:2])), atol=1e-4)  # no padding
    greedy = {key: value.long() for key, value in found.items() if key.startswith("greedy")}  # greedy_cfg2.0_int5
    for key, expected in greedy.items():
        scale, interval = (float(part) for part in key.removeprefix("greedy_cfg").split("_int"))
        ours, said = model.generate(cond, mask, cfg_scale=scale, cfg_interval=interval, temperature=0)
        assert torch.equal(ours, expected), key
        if scale == 1:  # the log-probabilities are those of temperature 1
            assert torch.allclose(said, at_tokens(model(cond, ours, mask).log_softmax(-1), ours), atol=1e-4)


def test_the_tokenizer_agrees_with_the_official_code():
    """Catches: a padding on the wrong side or a codebook that is not normalised: pictures only look a little soft."""
    found, model = official("vq")
    assert torch.equal(model.encode(found["image"]), found["encoded"].long())
    assert (model.decode(found["codes"].long()) - found["decoded"]).abs().max() < 1e-3
    assert to_uint8(torch.tensor([-1, 0, 0.005, 5])).tolist() == [0, 128, 128, 255]  # truncated, as officially


@pytest.mark.parametrize("name", ["GPT-B 111", "GPT-L 343", "GPT-XL 775", "GPT-XXL 1411", "GPT-3B 3100", "VQ-16 71.9"])
def test_sizes_have_the_published_parameter_counts(name):
    """Catches: a wrong hidden width or level, which would only surface when a user's download fails to load."""
    size, millions = name.split()
    with torch.device("meta"):
        model = VQModel(zoo.VQ_16) if size == "VQ-16" else Transformer(ModelConfig("c2i", *zoo.SIZES[size]))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(float(millions), rel=0.01)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
@BOTH
def test_compiled_sampling_draws_the_same_tokens(config, tmp_path):
    """Catches: cache lengths that are rounded up, with keys that are seen before they are written."""
    model, (cond, mask) = tiny(config), tiny_cond(config, 4)

    def compare():
        for options in (dict(temperature=0, cfg_interval=3), dict(noise=image_noise(range(4), 9, 0))):
            model.compile_steps = False
            tokens, logprobs = model.generate(cond, mask, cfg_scale=2.5, **options)
            model.compile_steps = True
            compiled, theirs = model.generate(cond, mask, cfg_scale=2.5, **options)
            assert torch.equal(tokens, compiled) and (logprobs - theirs).abs().max() < 1e-4

    # in a child, because processes that fork after torch.compile was used do not hear signals
    assert in_children(tmp_path, compare) == [0], (tmp_path / "said-0").read_text()


def test_adapters_learn_beside_weights_that_the_reference_shares():
    """Catches: a reference that moves with its policy (KL 0 for ever); adapters that are lost on saving."""
    policy, (cond, mask), tokens = tiny(T2I), tiny_cond(T2I), torch.randint(24, (4, 9), generator=seeded(1))
    reference, alone = copy.deepcopy(policy, {id(p): p for p in policy.parameters()}), tiny(T2I)
    before = policy(cond, tokens, mask)
    adapters(policy, 2, seeded(2))
    assert torch.equal(policy(cond, tokens, mask), before)
    down = policy.layers[0].attention.wqkv.down  # the same for every run of a seed, and outputs of size 1
    assert torch.equal(down, torch.randn(2, 32, generator=seeded(2)) / 32**0.5)
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            assert name.startswith("layers.") and name.endswith((".up", ".down"))
            parameter.data += torch.randn(parameter.shape, generator=seeded(3)) / 4
    alone.load_state_dict(merged(policy.state_dict()))
    after = policy(cond, tokens, mask)
    assert (after - before).abs().max() > 0.1 and torch.allclose(alone(cond, tokens, mask), after, atol=1e-4)
    assert torch.equal(reference(cond, tokens, mask), before)


def test_the_flags_reach_the_models(thin_toys):
    """Catches: --lora-rank that learns all weights or copies them, --checkpoint-layers or --text-pad without effect."""
    flags = "--task t2i --text-pad right --lora-rank 2 --checkpoint-layers --rewards clip"
    policy, ref_model, _, encode, _, optimizer = train.build(train.parse_args(flags.split()))
    assert encode(["circle"])[1][0].tolist() == [True] * 2 + [False] * 10
    assert {min(p.shape) for p in optimizer.param_groups[0]["params"]} == {2} and policy.checkpoint_layers
    assert ref_model.layers[0].attention.wo.weight is policy.layers[0].attention.wo.weight


# runs: killed, stopped, resumed, on several processes ----------------------------------------------------------------


def member(function, said, environment):
    """What a forked process does, which has imported everything already; its output goes to a file."""
    sys.stdout = sys.stderr = open(said, "w", buffering=1)  # noqa: SIM115, closed by the end of the process
    os.environ.update(environment)
    function()


def in_children(folder, *functions, **environment):
    """
    The exit statuses of functions, each a process of one group; what they print goes to folder/said-RANK. A variable of
    the environment that is empty is not set.
    """
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    names = dict(RANK="{}", WORLD_SIZE=str(len(functions)), MASTER_ADDR="127.0.0.1", MASTER_PORT=port) | environment
    processes = []
    for k, function in enumerate(functions):
        arguments = function, folder / f"said-{k}", {name: value.format(k) for name, value in names.items() if value}
        processes.append(multiprocessing.get_context("fork").Process(target=member, args=arguments))
        processes[-1].start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def at_call(number, module, name, do):
    """Lets do(arguments of the call) happen before call `number` of module.name."""
    original, calls = getattr(module, name), itertools.count(1)

    def called(*args, **options):
        if next(calls) == number:
            do(*args)
        return original(*args, **options)

    setattr(module, name, called)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def cut_and_die(state, path):
    Path(path).write_bytes(b"half of a state")
    die()


def half_a_line_and_die(run, steps_done):
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    die()


KILLS = {  # amid the save, policy.safetensors is new and state.pt is not
    "amid the first save": (1, torch, "save", cut_and_die),
    "after a line of metrics that was not saved": (2, runs.Run, "save", half_a_line_and_die),
    "while the pages are made": (1, sample, "finish_run", die),
}


def outcome(folder):
    """All that a run leaves: weights and pictures as bytes, metrics without their seconds."""
    files = [*folder.glob("*.safetensors"), *folder.glob("[ab]*.png")]  # after, before, before-after
    return {path.name: path.read_bytes() for path in files}, without_seconds(folder)


def without_seconds(folder):
    return [{k: v for k, v in row.items() if "seconds" not in k and "memory" not in k} for row in read_metrics(folder)]


@pytest.mark.parametrize("pages, more", [("short_runs", []), slow("thin_toys", ["--lora-rank", "2", "--lr", "3e-3"])])
def test_a_killed_run_continues_as_if_it_had_never_stopped(pages, more, request, tmp_path):
    """Catches: a lost optimizer, adapters that start anew, a save that is half written, lines of metrics that are twice."""
    request.getfixturevalue(pages)
    flags = ["c2i", "--save-every", "1", *more]
    run_in(tmp_path / "whole", *flags)

    def killed(place):
        at_call(*KILLS[place])
        run_in(tmp_path / place, *flags)

    for place in KILLS:
        assert in_children(tmp_path, partial(killed, place)) == [-signal.SIGKILL], place
        run_in(tmp_path / place, *flags, *["--resume"] * (tmp_path / place / "state.pt").exists())
        assert outcome(tmp_path / place) == outcome(tmp_path / "whole"), place
        assert not list((tmp_path / place).glob("*.tmp*"))
    load_model("toy-c2i", tmp_path / "whole")  # plain weights, whatever was learned


@pytest.mark.parametrize("number", [signal.SIGINT, slow(signal.SIGUSR1)])
def test_a_signal_ends_the_step_saves_and_gives_its_status(number, tiny_run, tmp_path, short_runs):
    """Catches: a Ctrl-C that loses the step, an exit status of 0, after which a shell loop goes on."""

    def send(times, *_):
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(1.1)  # within a second it is the same signal, which torchrun passes on

    def signalled(times):
        at_call(1, train, "judge_images", partial(send, times))
        # a background process may ignore it
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        tiny_run("c2i")

    # the second one stops at once: as Python ends by a Ctrl-C, or by the signal itself
    assert in_children(tmp_path, partial(signalled, 2)) == [130 if number == signal.SIGINT else -number]
    assert not (tmp_path / "run/state.pt").exists()
    assert in_children(tmp_path, partial(signalled, 1)) == [128 + number]
    assert "--resume" in (tmp_path / "said-0").read_text() and len(read_metrics(tmp_path / "run")) == 1
    assert [row["step"] for row in tiny_run("c2i", "--resume")[2]] == [0, 1]


@pytest.mark.parametrize("case", ["t2i --shard --cfg-scale 2", slow("c2i"), slow("t2i")])
def test_two_processes_train_what_one_trains_and_resume_each_other(case, tmp_path, short_runs, smooth_adam):
    """Catches: each learning for itself, groups cut in two, a loss that is averaged twice, a state only N can read."""
    flags = [*case.split(), "--group-size", "3", "--micro-batch", "3"]
    one, two = tmp_path / "one", tmp_path / "two"
    run_in(one, *[flag for flag in flags if flag != "--shard"])
    run = partial(run_in, two, *flags, "--save-every", "1")

    def killed():
        at_call(2, train, "judge_images", die)
        run()

    assert in_children(tmp_path, killed, run) == [-signal.SIGKILL, 1], (tmp_path / "said-1").read_text()
    assert "another process of this run has ended" in (tmp_path / "said-1").read_text()
    if "--shard" in flags:  # goes on as two, else as one
        assert in_children(tmp_path, *2 * [partial(run, "--resume")]) == [0, 0], (tmp_path / "said-0").read_text()
    else:
        run("--resume")
    ours, theirs = (flat(load_model(f"toy-{flags[0]}", folder)) for folder in (one, two))
    assert (ours - theirs).abs().max() < 3e-6
    for row, expected in zip(without_seconds(two), without_seconds(one), strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=2e-5)


def test_whoever_starts_several_processes_they_join_or_read_why(tmp_path):
    """Catches: a RANK=1 that silences a plain run; srun's processes that each do all; --device blamed for a taken port."""

    def ranks():
        parallel.start(parallel.own_device("cpu"))
        parallel.largest(0)  # waits for all: the first process keeps the store through which the others join
        (tmp_path / f"rank-{parallel.rank()}").write_text(str(parallel.world()))

    slurm = dict(WORLD_SIZE="", RANK="", SLURM_PROCID="{}", SLURM_STEP_NUM_TASKS="2", SLURM_LOCALID="{}")
    assert in_children(tmp_path, ranks, ranks, **slurm) == [0, 0], (tmp_path / "said-1").read_text()
    assert {path.name: path.read_text() for path in tmp_path.glob("rank-*")} == {"rank-0": "2", "rank-1": "2"}
    assert in_children(tmp_path, ranks, WORLD_SIZE="1", RANK="1") == [0]
    assert (tmp_path / "rank-0").read_text() == "1"
    train_one = partial(run_in, tmp_path / "run", "c2i")
    with socket.socket(socket.AF_INET6) as other:
        other.bind(("::", 0))
        other.listen()
        taken = str(other.getsockname()[1])
        kubernetes = "tcp://10.0.0.1:80"  # its variable of that name
        for port, reason in ((taken, "set MASTER_PORT"), (kubernetes, "tcp://10.0.0.1")):
            assert in_children(tmp_path, train_one, WORLD_SIZE="2", MASTER_PORT=port) == [1]
            said = (tmp_path / "said-0").read_text().splitlines()[-1]
            assert reason in said and "--device" not in said and said.startswith("train.py: "), said


def test_a_run_is_resumed_by_content_not_by_path(tiny_run, tmp_path, short_runs):
    """Catches: a resumed run whose KL is to other weights or that logs a step twice; one refused as its files moved."""
    here, there, row = tmp_path / "here", tmp_path / "there", MODELS["toy-t2i"]
    shutil.copytree(row.text_encoder, here / "t5")
    shutil.copy(row.ckpt, here / "base.safetensors")
    shutil.copy(row.vq_ckpt, here / "vq.safetensors")
    (here / "a.txt").write_text("two circles\na circle above a square\n")

    def run(folder, steps, *more):
        files = f"--ckpt {folder}/base.safetensors --vq-ckpt {folder}/vq.safetensors --text-encoder {folder}/t5"
        flags = f"{files} --prompts {folder}/a.txt --lr-schedule constant --rewards clip --steps {steps}"
        return [row["step"] for row in tiny_run("t2i", *flags.split(), *more)[2]]

    def refused(folder, sentence, *more):
        with pytest.raises(SystemExit, match=sentence):
            run(folder, 2, "--resume", *more)

    run(here, 1)
    refused(here, "--kl-coef is ", "--kl-coef", "0.7")
    refused(here, "--rewards is ", "--rewards", "clip=2")
    here.rename(there)
    for file in there.rglob("*"):
        names = {"base": "base", "vq": "tokenizer", "config": "text encoder", "a": "prompts"}
        if file.stem in names:
            whole = file.read_bytes()
            binary = file.suffix == ".safetensors"  # one bit of its last number
            flipped = whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:]
            file.write_bytes(flipped if binary else whole.replace(b"two", b"three") + b" ")
            refused(there, f"another {names[file.stem]}")
            file.write_bytes(whole)
    assert run(there, 2, "--resume") == [0, 1]
    # somebody has deleted the log, and the step that was logged since then was not saved
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 2}\n')
    assert run(there, 3, "--resume") == [2]
    with pytest.raises(SystemExit, match="has done 3 steps already"):
        run(there, 2, "--resume")
    (tmp_path / "run/metrics.jsonl").unlink()
    assert run(there, 4, "--resume") == [3]


@pytest.mark.parametrize("updates", [1, 2])
def test_a_gradient_that_is_not_finite_is_skipped_and_five_end_the_run(updates, tiny_run, monkeypatch, short_runs):
    """Catches: an infinite gradient that is clipped to NaN in every weight; of two updates, a good one that hides it."""
    factors, folder = itertools.cycle([INF, 1][:updates]), tiny_run.args[0]

    def loss_times_factor(*inputs):
        loss, stats = grpo_loss(*inputs)
        return loss * next(factors), stats

    monkeypatch.setattr(train, "grpo_loss", loss_times_factor)
    with pytest.raises(SystemExit, match="the gradient was not finite 5 steps in a row"):
        tiny_run("c2i", "--save-every", "5", "--steps", "9", "--updates-per-batch", str(updates))
    policy, base = flat(load_model("toy-c2i", folder)), flat(load_model("toy-c2i"))
    assert len(read_metrics(folder)) == 5 and torch.equal(policy, base) == (updates == 1)


def test_a_steps_figures_are_of_all_its_images():
    """Catches: a prompt twice while another is left out, an extreme on one side only, a short micro-batch that counts as a full one."""
    args = train.parse_args(["--classes", *"0123", "--prompts-per-step", "4", "--group-size", "4", "--rewards", "clip"])
    assert all(sorted(train.pick_prompts(args, step)[0]) == [0, 1, 2, 3] for step in range(5))
    _, _, logged = train.compare(args, {"clip": torch.tensor([0.0, 1, 1, 1, 2, 2, 2, 2])}, slice(8))
    expected = dict(reward=11 / 8, reward_std=0.744, advantage_std=0.655, advantage_max=1.5, equal_groups=0.5)
    assert logged == pytest.approx(expected, rel=1e-3)
    history = [(0.75, dict(kl=torch.tensor(1.0), gap=torch.tensor(3.0))), (0.25, dict(kl=torch.tensor(5.0)))]
    assert train.learning_metrics(history, list(torch.tensor([2.0, 1]))) == dict(grad_norm=2, kl=2, gap=3)


def test_missing_scores_are_said_to_be_missing(tiny_run, monkeypatch, short_runs):
    """Catches: a missing score set to 0, which wins its group where scores are negative, or logged as a mean of 0."""
    for name, values in (("silent", [NAN] * 8), ("loud", [-3.0, NAN, -1, -2, INF, NAN, 5, NAN])):
        monkeypatch.setitem(rewards.JUDGES, name, lambda *_, values=values: lambda *_: torch.tensor(values))
    _, _, (row,) = tiny_run("c2i", "--steps", "1", "--group-size", "4", "--rewards", "silent=2,loud")
    expected = dict(silent_not_finite=8, loud_not_finite=4, loud_mean=-0.25, loud_std=3.11247)
    expected |= dict(reward=1.5, equal_groups=0.5)  # of -3, its group's mean -2, -1, -2, and 5 four times
    assert "silent_mean" not in row and {name: row[name] for name in expected} == expected


def test_only_five_failures_in_a_row_end_a_run():
    """Catches: failures that are counted over a whole run, so that a run of days ends at its fifth lost step."""
    args = SimpleNamespace(prompts_per_step=2, group_size=2, rewards={"clip": 1.0})
    fine = dict(grad_norm=1.0, clip_not_finite=3)
    for failure, said in ((dict(clip_not_finite=4), "score of clip"), (dict(grad_norm=INF), "gradient")):
        lost = fine | failure
        run = SimpleNamespace(args=args, history=[*[lost] * 4, fine, *[lost] * 4], folder="out")
        runs.Run.check_that_it_learns(run)
        run.history.append(lost)
        with pytest.raises(Mistake, match=f"{said} was not finite 5 steps in a row"):
            runs.Run.check_that_it_learns(run)


def test_a_run_says_what_ails_it_and_a_healthy_one_says_nothing():
    """Catches: a warning that never comes, or comes in a healthy run."""
    rng, settings = np.random.default_rng(0), dict(dtype="float32", rewards={"clip": 1.0, "realism": 0.0})
    healthy = dict(
        grad_norm=0.3, equal_groups=0.1, sampler_gap=1e-5, entropy=2.0, kl=0.1, clip_std=0.2, realism_std=0.1
    )

    def said(after=25, steps=50, **changes):
        history = []
        for step in range(steps):
            noise = {name: 0.5 + 0.05 * rng.random() for name in ("reward", "right", "realism_mean", "clip_mean")}
            history.append(healthy | noise | (changes if step >= after else {}))
        return set(runs.warnings(history, settings))

    assert said() == said(right=0.2) == said(reward=0.9, clip_mean=0.2) == set()
    assert said(after=45, equal_groups=1, clip_std=0.0) == said(after=0, steps=9, equal_groups=1) == set()
    hacked = dict(reward=0.9, right=0.2)
    ailing = {
        "gradient": dict(grad_norm=0.0), "equal": dict(equal_groups=1), "kl": dict(kl=1.2), "gap": dict(sampler_gap=15e-4),
        "clip": dict(clip_std=0.0), "right": hacked, "realism_mean": dict(reward=0.9, realism_mean=0.2),
    }  # fmt: skip
    assert all(said(**changes) == {what} for what, changes in ailing.items())
    assert said(grad_norm=0.0, equal_groups=1) == {"equal"}  # which explains it
    assert said(steps=45, entropy=0.9) == said(after=20, steps=21, entropy=0.9) == {"entropy"}
    assert said(steps=46, entropy=0.9) == set()  # it has not fallen since
    assert said(after=10, steps=20, **hacked) == {"right"}  # a run may be hacked within twenty steps
    for errors, found in ((3.5, {"right"}), (2.5, set())):  # of the difference of two means of 20 steps
        rising = [99, -99] * 15 + [(-1) ** step + 0.3244 * errors * (step >= 20) for step in range(40)]
        assert set(runs.warnings([healthy | dict(reward=r, right=-r) for r in rising], settings)) == found
    settings["dtype"] = "bfloat16"
    assert said(sampler_gap=0.09) == set() and said(sampler_gap=0.15) == {"gap"}
    del healthy["clip_std"]
    assert said() == {"clip"}  # missing


def test_what_is_shown_never_ends_a_run(tiny_run, tmp_path, monkeypatch, short_runs):
    """Catches: steps lost to a terminal that was closed, or to `| head`."""
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(train, "decode", train.decode)  # put back afterwards
    with open(write, "w", buffering=1) as stream:
        at_call(2, train, "decode", lambda *_: monkeypatch.setattr(sys, "stdout", stream))
        tiny_run("c2i")
        parallel.Screen(stream).flush()
    print("closed", file=parallel.Screen(stream))
    assert torch.load(tmp_path / "run/state.pt")["step"] == 2


def test_a_bug_inside_keeps_its_traceback_and_leaves_the_process_as_it_was(tiny_run, monkeypatch, short_runs):
    """Catches: a reader's own bug without its line; in a notebook, a failed cell that holds the folder or the signals."""
    wrong = [1]

    def buggy(images, prompts):
        return torch.stack([image.mean() for image, _ in zip(images, prompts[len(wrong) :], strict=True)])

    monkeypatch.setitem(rewards.JUDGES, "buggy", lambda *_: buggy)
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    flags = ["c2i", "--steps", "1", "--rewards", "buggy"]
    with pytest.raises(ValueError, match="shorter") as bug:  # which a notebook holds, and with it the run
        tiny_run(*flags)
    assert not isinstance(bug.value, Mistake) and "buggy" in {frame.name for frame in bug.traceback}
    assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers
    wrong.clear()
    thread = threading.Thread(target=tiny_run, args=flags)  # where Python lets nobody handle signals
    thread.start()
    thread.join()
    assert len(tiny_run(*flags, "--resume")[2]) == 1  # it was saved


def test_a_new_run_begins_its_own_curve_and_spares_a_table(tiny_run, short_runs):
    """Catches: the curve of two runs as one; a table of evaluate.py whose policy is written over."""
    _, folder, _ = tiny_run("c2i")
    (folder / "state.pt").unlink()
    assert len(tiny_run("c2i")[2]) == 2
    (folder / "state.pt").unlink()
    (folder / "evaluation.json").write_text("{}")
    with pytest.raises(SystemExit, match="holds a table"):
        tiny_run("c2i")
    assert len(read_metrics(folder)) == 2


FULL = {"state.pt": (torch, "save", 10**5), "metrics.jsonl": (runs.Run, "log", 999)}


@pytest.mark.parametrize("file", FULL)
def test_a_full_disk_ends_in_a_sentence_and_the_run_goes_on_later(file, tiny_run, tmp_path, short_runs):
    """Catches: a state that is cut. The limit on a file's size stands in for the end of the disk."""
    import resource

    module, name, room = FULL[file]

    def fill(*_):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    def short_of_room():
        at_call(2, module, name, fill)
        tiny_run("c2i", "--save-every", "1")

    assert in_children(tmp_path, short_of_room) == [1]
    said = (tmp_path / "said-0").read_text()
    assert f"{file} could not be written" in said and "Traceback" not in said
    assert torch.load(tmp_path / "run/state.pt")["step"] == 1 and not list((tmp_path / "run").glob("*.tmp*"))
    assert len(tiny_run("c2i", "--save-every", "1", "--resume")[2]) == 2


def test_one_run_holds_a_folder_and_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch, capsys):
    """Catches: two runs that write into one folder; a run that cannot start on Lustre, where flock() is unknown."""
    first = runs.hold(tmp_path)
    with pytest.raises(Mistake, match="another run is writing"):
        runs.hold(tmp_path)
    first.release()
    monkeypatch.setattr("fcntl.flock", mock.Mock(side_effect=OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))))
    assert runs.hold(tmp_path) is None and "no lock on this file system" in capsys.readouterr().out


PRESETS = {  # the first two are the release's
    "--preset paper-c2i": dict(
        model="llamagen-xl-384", steps=400, prompts_per_step=4, group_size=8, lr=1e-5, kl_coef=0.1, cfg_scale=2,
        learn_cfg=1, lr_schedule="constant", adam_beta2=0.999,
    ),
    "--preset paper-t2i --prompts cat --kl-coef 0.5": dict(
        model="llamagen-t2i-xl-256", kl_coef=0.5, cfg_scale=4, text_pad="right",
    ),
    "--preset best-llamagen-c2i": dict(cfg_scale=1, ref_cfg=2, kl_coef=0.1, learn_cfg=1, kl="exact"),
    "--preset best-c2i": dict(lr=5e-4, kl_coef=0.28, ref_cfg=2, reward_norm="mean", weigh_tokens=True),
    "--task t2i": dict(lr=6e-4, kl_coef=0.1, kl="exact", reward_norm="group", group_size=16, learn_from=8),
}  # fmt: skip


def test_presets_are_the_releases_and_the_command_line_wins():
    """Catches: a setting that a preset forgets, which is then ours and not the paper's."""
    for flags, expected in PRESETS.items():
        found = vars(train.parse_args(flags.split()))
        assert {name: found[name] for name in expected} == expected, flags
    args = train.parse_args(["--preset", "paper-c2i"])
    assert args.rewards["clip"] == 5 and args.rewards["qwen-odd"] == 0.25 and len(args.rewards) == 8
    assert args.judge_options["clip_pretrained"] == "openai" and args.class_names[1] == "goldfish, Carassius auratus"
    flags = [], ["--model", "llamagen-xl-384"], ["--clip-pretrained", "a.pt"], ["--clip-model", "RN50"]
    options = [train.parse_args(more).judge_options for more in flags]
    clips = [(each["clip_model"], each["clip_pretrained"]) for each in options]
    assert clips[:2] == [(rewards.TOY_CLIP, None), ("ViT-B-32-quickgelu", "openai")]  # OpenAI's knows no toy caption
    assert clips[2:] == [("ViT-B-32-quickgelu", "a.pt"), ("RN50", "openai")]


# files and prompts ----------------------------------------------------------------------------------------------------


def test_text_features_are_those_that_llamagen_was_trained_on():
    """Catches: features at padding, or text away from the image: official weights see a prompt that they never learned."""
    encode = load_encoder("toy-t2i")
    captions = ["<b>A Photo</b> of a red circle", "circle", "a photo of a red circle"]
    features, mask = encode(captions)
    assert mask.sum(1).tolist() == [7, 2, 7] and mask[1].tolist() == [False] * 10 + [True] * 2  # with </s>
    assert not features[~mask].any() and torch.equal(features[0], features[2])  # cleaned
    long = "a photo of a red circle, a photo of a red circle, a photo of a red circle"
    assert encode.count_cut([*captions, long, long]) == 1  # cut to P
    # The released AR-GRPO pads on the right and predicts token 0 from what T5 makes of the last padding position.
    other, other_mask = encode(captions, "right")
    read = encode.words(captions[1], max_length=12, padding="max_length", return_tensors="pt")
    raw = encode.t5(read.input_ids, read.attention_mask).last_hidden_state[0]
    assert torch.allclose(other[1], raw, atol=1e-6) and other_mask[1].tolist() == [True] * 2 + [False] * 10
    assert torch.equal(other[1, :2], features[1, 10:]) and other[1, -1].abs().max() > 0.01


@pytest.mark.parametrize("caption, cleaned", [
    ("A Photo of a “red” Cat,Dog", 'a photo of a "red" cat, dog'),
    ("see https://example.com/a, it is good", "see , it is good"),
    ("see www.example.com/a?b=c now", "see ?b=c now"),
    ("by @someone  <b>bold</b>", "by bold"),
    ("holiday picture IMG_001.png", "holiday picture"),
    ("tom &lt;3 jerry!!", "tom <3 jerry!!"),
    ("wait...what", "wait what"),
    ("'quoted.'", "quoted."),
    ("A 4x4 truck and a Ford F150 at 10:30", "a truck and a ford at 10:30"),  # LlamaGen took them for articles
    *((caption, caption) for captions in data.T2I_CAPTIONS.values() for caption in captions[:2]),
])  # fmt: skip
def test_captions_are_cleaned_as_llamagens_were(caption, cleaned):
    """Catches: t5's features change with case, quotes and spaces, and the picture with them."""
    assert clean_caption(caption) == cleaned


FORMS = {
    "a.txt": "one\n\ntwo\n",
    "a.json": '["one", {"prompt": "two"}]',
    "release.json": '[{"conversations": [{"from": "human", "value": "one"}, {"value": "x"}]}, "two"]',
    "coco.json": '{"info": {}, "annotations": [{"id": 1, "caption": "one"}, {"id": 2, "caption": "two"}]}',
    "lines.json": '{"prompt": "one"}\n{"prompt": "two"}\n',
    "a.jsonl": '{"caption": "one"}\n"two"\n',
    "windows.TXT": "\ufeffone\r\ntwo\r\n",
    "a.csv": 'Prompts,Category\n"one",Colors\ntwo,Counting\n',
    "a.tsv": "Category\tPrompt\nx\tone\ny\ttwo\n",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_prompt_files_of_every_form(encoding, tmp_path):
    """Catches: a form that is read as another, and trains on the file's name or on one prompt of many."""
    for name, text in FORMS.items():
        text = text if encoding == "utf-8" else text.removeprefix("\ufeff")  # utf-16 writes a mark of its own
        (tmp_path / name).write_text(text, encoding=encoding)
        found = read_prompts("llamagen-t2i-xl-256", None, [str(tmp_path / name), "three"])
        assert found == ["one", "two", "three"], name


def test_a_path_is_never_taken_for_a_caption_nor_a_caption_for_a_path(tmp_path, capsys):
    """Catches: training for days on the caption "drawbench.csv"; a caption of which T5 reads nothing."""
    files = {"bad.json": b"[1", "empty.txt": b"\n", "two.csv": b"a,b\n1,2\n", "late.jsonl": b'"one"\n{"prompt": \n'}
    files |= {"list.parquet": b"x", "latin.txt": "caf\u00e9".encode("latin-1")}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    for name in (*files, "none.txt", "folder"):
        with pytest.raises((Mistake, FileNotFoundError), match=name):
            read_prompts("llamagen-t2i-xl-256", None, [str(tmp_path / name)])
    prompts = ["a dog " * 80, "half of a pair: \ud83d", "https://example.com/a"]
    assert read_prompts("llamagen-t2i-xl-256", None, prompts) == [prompts[0], "half of a pair: ?"]
    assert "https://example.com/a" in capsys.readouterr().out
    with pytest.raises(Mistake, match="no caption is left"):
        read_prompts("llamagen-t2i-xl-256", None, prompts[2:])


def test_classes_have_names_numbers_and_wordnets_ids():
    """Catches: the first of two classes of one name, taken in silence."""
    assert {find_class("llamagen-b-256", name) for name in ("Goldfish", "1", 1, "n01443537")} == {1}
    assert find_class("toy-c2i", "Red Circle") == find_class("toy-c2i", "0") == 0
    for name, labels in (("sunglasses", "836 and 837"), ("missile", "657 and 744")):
        with pytest.raises(Mistake, match=labels):
            find_class("llamagen-b-256", name)


def test_what_a_policy_was_trained_with_is_known_by_content(tmp_path, monkeypatch, thin_toys):
    """Catches: another base that is compared in silence, because it lies where the right one lay or is the default."""
    monkeypatch.chdir(tmp_path)
    for name, place in (("mine", MODELS["toy-c2i"].ckpt), ("vq", MODELS["toy-c2i"].vq_ckpt)):
        save_file({key: 1.01 * value for key, value in load_file(place).items()}, f"{name}.safetensors")
    header = dict(model="toy-c2i", step=1, content=zoo.content_of("toy-c2i", Path("mine.safetensors")))
    for name in ("one", "two"):  # the same bytes, in whatever order the header is
        zoo.save_weights(load_file("mine.safetensors"), f"{name}.safetensors", header)
        header = dict(reversed(header.items()))
    assert Path("one.safetensors").read_bytes() == Path("two.safetensors").read_bytes()
    _, _, found = zoo.find_policy("one.safetensors")
    assert zoo.base_of("toy-c2i", found, "mine.safetensors") == Path("mine.safetensors")
    compare = ["--compare", "--num", "1", "--out", "a.png"]
    for script, flags in ((sample, compare), (sample, [*compare, "--base", MODELS["toy-c2i"].ckpt]), (evaluate, [])):
        with pytest.raises(SystemExit, match="--base"):
            script.main(["--ckpt", "one.safetensors", "--classes", "7", *map(str, flags)])
    with pytest.raises(SystemExit, match="another tokenizer"):
        sample.main(["--ckpt", "one.safetensors", "--vq-ckpt", "vq.safetensors"])


def test_every_official_form_of_file_loads(tmp_path, thin_toys):
    """Catches: a wrapper seen in the wild whose weights are refused, or taken from those that lie beside them."""
    gpt, vq = load_model("toy-c2i").state_dict(), load_tokenizer("toy-c2i").state_dict()
    noise, used = {name: torch.randn_like(weight) for name, weight in gpt.items()}, torch.zeros(65536)
    three = [("gpt_model.", gpt), ("vq_model.", vq), ("ref_model.", noise)]
    forms = {
        "nested.pt": {"model": gpt, "optimizer": {"step": torch.tensor(3)}, "steps": 5},
        "freqs.pt": gpt | {"freqs_cis": torch.zeros(65, 16, 2)},
        "module.pt": {"module": {f"module._orig_mod.{name}": weight for name, weight in gpt.items()}},
        "training.pt": {"model": gpt, "args": argparse.Namespace(lr=1e-4)},  # LlamaGen's own script's
        "state_dict.pt": {"state_dict": {k: v.half() for k, v in gpt.items()}},  # ours are half precision, too
        "both.safetensors": {prefix + k: v for prefix, weights in three for k, v in weights.items()},  # AR-GRPO's
        "vq.pt": {"ema": vq | {"quantize.codebook_used": used}, "model": {k: v + 1 for k, v in vq.items()}},
    }
    for name, content in forms.items():
        (save_file if name.endswith("safetensors") else torch.save)(content, tmp_path / name)
    for load, expected in ((load_model, gpt), (load_tokenizer, vq)):
        for name in {"both.safetensors", "vq.pt"} if load is load_tokenizer else forms.keys() - {"vq.pt"}:
            found = load("toy-c2i", tmp_path / name).state_dict()
            assert all(torch.equal(found[k], v) for k, v in expected.items()), name


GUEST = """
import hashlib, os, signal, sys, torch
vars(hashlib).pop("file_digest", None)  # Python 3.10 does not have it


def state():
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    switches = torch.get_default_dtype(), torch.is_grad_enabled(), torch.backends.cudnn.allow_tf32
    return dict(os.environ), handlers, switches, sys.stdout, sys.stderr


before = state()
import MODULES
assert state() == before and "matplotlib" not in sys.modules


def run(path):
    assert torch.ones(1, requires_grad=True).mul(2).requires_grad and torch.ones(1).dtype == torch.float32
    zoo.write_whole(path, lambda place: torch.save(dict(w=torch.zeros(2), step=3), place))
    assert zoo.load_tensors(path)["step"] == 3 and len(zoo.file_hash(path)) == 64
    os.environ["RANK"] = "1"
    print("\u00b1 is printed")


torch.set_default_dtype(torch.float64)
torch.set_grad_enabled(False)
before = state()
zoo.run_script(lambda argv: zoo.Path("state.pt"), run)
assert state() == before
"""


def test_our_files_are_guests_in_the_process(tmp_path):
    """Catches: an import or a script that changes its caller; a variable of somebody's shell that ends a run."""
    modules = ", ".join(name for name in OURS if name != "test_grpo")
    # not pytest's own environment, which has imported our files
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    environment |= dict(TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1", PYTHONIOENCODING="ascii", PYTHONPATH=str(HERE))
    (tmp_path / "script.py").write_text(GUEST.replace("MODULES", modules))
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "? is printed" in done.stdout, done.stderr


def test_a_remedy_is_true():
    """Catches: an advice that cannot help, such as to fetch a file again where the disk is full."""
    for error, helps in ((ValueError("cut"), True), (OSError(errno.ENOSPC, "x"), False), (ImportError("x"), False)):
        with pytest.raises(Mistake) as said, zoo.reading("it", "fetch it"):
            raise error
        assert ("fetch it" in str(said.value)) == helps
    for error, asked in ((RuntimeError("unexpected pos 576 vs 534"), True), (OSError("broken data stream"), False)):
        with pytest.raises(OSError) as said, zoo.writing("it"):
            raise error
        assert ("is the disk full?" in str(said.value)) == asked
    misfits = "operator torchvision::nms does not exist", "libcudart.so.12: cannot open shared object file"
    for text in (*misfits, "a bug"):
        try:
            raise RuntimeError(text)
        except RuntimeError as error:
            found = zoo.sentence_of(error)
        assert found is None if text == "a bug" else f"({text})" in found and "install" in found


def test_paths_are_what_their_owner_means(tmp_path, monkeypatch):
    """Catches: a folder named ~; another text encoder, because somebody has looked into its folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert zoo.user_path("~/a") == tmp_path / "a" and zoo.user_path("hf:a/b/c") == "hf:a/b/c"
    shutil.copytree(HERE / "weights/toy-t5", tmp_path / "t5")
    before = zoo.file_hash(tmp_path / "t5")
    (tmp_path / "t5/.cache").mkdir()
    for hidden in (".DS_Store", ".cache/a.metadata"):
        (tmp_path / "t5" / hidden).write_text("now")
    assert zoo.file_hash(tmp_path / "t5") == before
    assert zoo.find_file(tmp_path / "t5") == tmp_path / "t5/model.safetensors"


def test_downloads_are_of_the_commit_that_the_table_names(tmp_path, monkeypatch):
    """Catches: whoever can write to a repository puts another file in the place of the one that we looked at."""
    download = mock.Mock(return_value=tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for place in (rewards.HPS, rewards.MANIQA):
        zoo.find_file(place)
        repo, file = download.call_args.args
        assert place == f"hf:{repo}@{download.call_args.kwargs['revision']}/{file}"
    place, revision, _ = zoo.hub_place(zoo.FLAN_T5_XL)
    assert place == "google/flan-t5-xl" and re.fullmatch("[0-9a-f]{40}", revision)
    for wrong in ("a", "hf:a/b@", "a/b@c@d"):
        with pytest.raises(Mistake, match="OWNER/REPO"):
            zoo.hub_place(wrong)


@pytest.fixture(scope="module")
def wrong_files(tmp_path_factory):
    """A folder of files that are not what they are taken for."""
    from transformers import T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("wrong")
    (folder / "cut.safetensors").write_bytes((HERE / "weights/toy-c2i.safetensors").read_bytes()[:9000])
    state = load_model("toy-c2i").state_dict()
    torch.save({name: w for name, w in state.items() if name != "norm.weight"}, folder / "missing.pt")
    torch.save(state | {"norm.weight": torch.full((160,), NAN)}, folder / "nan.pt")
    torch.save({name: w.char() for name, w in state.items()}, folder / "int8.pt")
    torch.save({"model": state, "code": Path}, folder / "code.pt")
    torch.save([torch.ones(2)], folder / "list.pt")
    zoo.save_weights(state, folder / "ours.safetensors", dict(model="toy-c2i"))
    (folder / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4f1d\nsize 444983394\n")
    (folder / "book.txt").write_text("a red banana " * 100_000)
    (folder / "shards").mkdir()
    for name in ("narrow", "gap-t5"):
        shutil.copytree(HERE / "weights/toy-t5", folder / name)
    narrow = T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(narrow).save_pretrained(folder / "narrow")
    some = load_file(folder / "gap-t5/model.safetensors")
    some.pop("encoder.final_layer_norm.weight")
    save_file(some, folder / "gap-t5/model.safetensors", metadata={"format": "pt"})
    (folder / "run").mkdir()
    (folder / "run/state.pt").write_bytes(b"PK\x03\x04 not whole")
    two = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(folder / "float.npz", two.astype(np.float32))
    np.savez(folder / "good.npz", two)
    np.savez(folder / "labels.npz", two, np.array([1, 999]))
    np.savez(folder / "onehot.npz", two, np.eye(2, 40))
    with zipfile.ZipFile(folder / "short.npz", "w") as file:  # whole as a zip, but the array in it is not
        file.writestr("arr_0.npy", zipfile.ZipFile(folder / "good.npz").read("arr_0.npy")[:-9])
    return folder


WRONG = [  # (script, flags, a part of its one sentence)
    # weights that would load in part, or run code
    (sample, ["--ckpt", "{}/shards"], "shards must first be joined"),
    (sample, ["--ckpt", "{}/cut.safetensors"], "damaged or cut"),
    (sample, ["--vq-ckpt", "{}/cut.safetensors"], "damaged or cut"),
    (sample, ["--ckpt", "{}/pointer.pt"], "fetch it again"),
    (sample, ["--ckpt", "{}/list.pt"], "holds no named tensors"),
    (sample, ["--ckpt", "{}/int8.pt"], "torch.int8, whole numbers"),
    (sample, ["--ckpt", "{}/code.pt"], "which is not loaded; save its weights alone"),
    (sample, ["--ckpt", "{}/missing.pt"], "norm.weight"),
    (sample, ["--ckpt", "{}/nan.pt"], "norm.weight holds NaN"),
    (sample, ["--task", "t2i", "--ckpt", "{}/ours.safetensors"], "toy-c2i, which is c2i: leave out --task"),
    (sample, ["--model", "llamagen-b-256"], "of huggingface.co/FoundationVision/LlamaGen cannot be read"),
    (sample, ["--task", "t2i", "--text-encoder", "{}/narrow"], "32 wide, the model's 64"),
    (sample, ["--task", "t2i", "--text-encoder", "{}/gap-t5"], "is missing or has another shape"),
    # flags
    (train, ["--preset", "best-c2i", "--model", "llamagen-b-256"], "is not for llamagen-b-256"),
    (train, ["--preset", "best-c2i", "--cfg-scale", "2"], "--no-weigh-tokens"),
    (train, ["--device", "meta"], "--device meta cannot be read"),
    (train, ["--group-size", "1"], "--group-size must be finite and at least 2"),
    (train, ["--stepz", "3"], "unrecognized"),
    (train, ["--judge-timeout", "-1"], "--judge-timeout must be finite and at least 0"),
    (sample, ["--out", "{}/a.png", "--npz", "{}/b/../a.png"], "its name ends in .npz"),
    (sample, ["--npz", "{}/good.npz"], "choose another name for --npz"),
    (train, ["--rewards", "clop=1"], "no judge is called 'clop'"),
    (train, ["--rewards", "pyiqa:qalign"], "none of the metrics that can judge here"),
    # prompts
    (sample, ["--task", "t2i", "--prompts", "{}/book.txt"], "is not in the toy world"),
    (sample, ["--classes", "red circel"], "did you mean 'red circle'"),
    (train, ["--model", "llamagen-t2i-xl-256"], "needs --prompts"),
    # what would be written over, or not be a run
    (pretrain, ["--quick"], "weights/ holds the shipped weights"),
    (train, ["--out", "{}/run"], "holds a run"),
    (train, ["--out", "{}/run", "--resume"], "cannot be read"),
    # what is evaluated
    (evaluate, ["--ckpt", "{}/run/state.pt"], "fetch it again"),
    (evaluate, ["--samples", "{}/book.txt"], "an npz with pictures arr_0"),
    (evaluate, ["--samples", "{}/float.npz"], "is float32 (2, 8, 8, 3); an npz with pictures arr_0, uint8"),
    (evaluate, ["--samples", "{}/short.npz"], "an npz with pictures arr_0"),
    (evaluate, ["--samples", "{}/good.npz", "--inception", "{}/good.npz"], "its sha256 is"),
    (evaluate, ["--samples", "{}/good.npz", "--rewards", "clip"], "holds no labels or prompts of toy-c2i"),
    (evaluate, ["--samples", "{}/labels.npz", "--rewards", "clip"], "holds no labels or prompts of toy-c2i"),
    (evaluate, ["--samples", "{}/onehot.npz"], "2 pictures need 2 labels, of shape (2,)"),
    (evaluate, ["--samples", "{}/good.npz", "--reference", "{}/good.npz"], "weights-inception-2015-12-05-6726825d.pth"),
]


@pytest.mark.parametrize("script, flags, sentence", WRONG, ids=[" ".join(flags)[-60:] for _, flags, _ in WRONG])
def test_what_a_user_can_do_wrong_ends_in_one_sentence(
    script, flags, sentence, wrong_files, tmp_path, capsys, monkeypatch
):
    """Catches: what otherwise fails in silence, a model half loaded, a run written over; or only after hours of drawing."""
    monkeypatch.chdir(tmp_path)  # where the default --out is
    monkeypatch.setattr(evaluate, "draw_column", lambda *_: pytest.fail("drawn"))
    with pytest.raises(SystemExit) as stop:
        script.main([flag.replace("{}", str(wrong_files)) for flag in flags])
    said = capsys.readouterr().err.strip().splitlines()[-1:] if stop.value.code == 2 else [str(stop.value.code)]
    assert stop.value.code != 0 and sentence in said[0] and "\n" not in said[0] and "Traceback" not in said[0]
    assert len(said[0]) < 1100  # whatever it quotes


# the toy world --------------------------------------------------------------------------------------------------------


def toy_captions(n):
    """A caption of each class, and n of all categories."""
    return [data.class_caption(name) for name in data.TOY_CLASSES] + data.balanced_captions(n)


def test_the_verifier_is_right_on_renders_and_on_wrong_captions():
    """Catches: a verifier that a change of the renders made wrong, or that forgives blobs, strays or a second object."""
    rng, captions = np.random.default_rng(3), toy_captions(240)
    pairs = list(zip(data.render(captions, rng), captions, strict=True))
    assert np.mean([data.satisfies(image, caption) for image, caption in pairs]) >= 0.99
    assert np.mean([data.satisfies(image, data.wrong_caption(caption, rng)) for image, caption in pairs]) <= 0.01
    image, two = data.render(["a red circle", "two circles"], rng)
    half = image.copy()
    half[:, :, : int(data.find_objects(image)[0][0]["x"])] = 0.1
    bad = two, half, rng.random((3, 64, 64)), np.zeros((3, 64, 64))
    assert data.satisfies(image, "a circle") and not any(data.satisfies(picture, "a circle") for picture in bad)


def test_captions_parse_and_wrong_ones_exclude_them():
    """Catches: a "wrong" caption that means the same makes the verifier's test, and the CLIP's training, false."""
    rng = np.random.default_rng(0)
    for category, caption in ((kind, c) for kind in data.CATEGORIES for c in data.T2I_CAPTIONS[kind]):
        wrong = data.wrong_caption(caption, rng)
        assert data.category_of(caption) == data.category_of(wrong) == category
        assert data.meaning(wrong) != data.meaning(caption)
    assert data.meaning("a circle left of a square") == data.meaning("a square right of a circle")
    assert data.toy_caption("Two circles.") == "a photo of two circles"
    for caption in ("a red banana", "a cyan circle", "a red circle left of a blue square"):
        with pytest.raises(ValueError, match=r"banana|never learned"):
            data.toy_caption(caption)


def test_a_stage_that_is_stopped_leaves_the_old_weights(tmp_path, monkeypatch):
    """Catches: a text encoder of random weights in the place of the trained one, which would load without a word."""
    shutil.copytree(HERE / "weights", tmp_path / "weights")
    before = {path: path.read_bytes() for path in (tmp_path / "weights").rglob("*") if path.is_file()}
    monkeypatch.setattr(data, "sample_captions", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    for stage in ("t5", "clip", "t2i"):
        with pytest.raises(SystemExit):
            pretrain.main(["--stages", stage, "--out", str(tmp_path / "weights")])
    assert all(path.read_bytes() == content for path, content in before.items())


def test_shipped_weights_are_what_their_reports_describe():
    """Catches: a stage that was run again, and not the stages after it: the README's figures are of other weights."""
    reports = {path.stem: json.loads(path.read_text()) for path in (HERE / "weights").glob("*.json")}
    assert set(reports) == {"toy-vq", "toy-t5", "toy-c2i", "toy-c2i-small", "toy-t2i", "toy-clip", "toy-realism"}
    for name, found in reports.items():  # T5 and CLIP are folders, in their libraries' own form
        (path,) = [*(HERE / "weights").glob(f"{name}.safetensors"), *(HERE / "weights").glob(f"{name}/*.safetensors")]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == found["sha256"] and found["seed"] is not None
    for name in ("toy-c2i", "toy-t2i"):  # room for GRPO, and right samples in most of its groups
        right = reports[name]["figures"]["right, cfg 1"]
        assert 0.4 <= right["all"] <= 0.6 and min(right.values()) >= 0.25
    assert reports["toy-vq"]["figures"]["psnr_db"] >= 29 and reports["toy-vq"]["figures"]["codes_used"] >= 500
    assert sum(p.stat().st_size for p in (HERE / "weights").rglob("*") if p.is_file()) < 20e6


# the judges -----------------------------------------------------------------------------------------------------------


def test_the_toy_judges_rank_right_above_wrong():
    """Catches: loaded into the wrong places, or shown another range of pixels, they still return numbers."""
    judges, rng = rewards.load_judges(["clip", "realism"]), np.random.default_rng(0)
    captions, tokenizer = toy_captions(60), load_tokenizer("toy-c2i")
    with torch.no_grad():  # judges only ever see what the tokenizer decoded
        renders = torch.from_numpy(data.render(captions, rng)) * 2 - 1
        images = to_unit(tokenizer.decode(tokenizer.encode(renders)))
    right, _ = rewards.judge_images(judges, images, captions)
    wrong, seconds = rewards.judge_images(judges, images, [data.wrong_caption(c, rng) for c in captions])
    noise, _ = rewards.judge_images(judges, torch.rand(100, 3, 64, 64), captions)
    assert (right["clip"] > wrong["clip"]).float().mean() > 0.9 and set(seconds) == {"clip", "realism"}
    assert right["realism"][:40].mean() > noise["realism"].mean() + 0.2  # it knows single objects only
    network = judges["realism"].keywords["network"]  # which reads [-1, 1]
    assert torch.allclose(right["realism"], network(images * 2 - 1)[:, 0].sigmoid(), atol=1e-5)
    with pytest.raises(Mistake, match="64 px"):
        judges["realism"](torch.zeros(1, 3, 32, 32), ["x"])


JUDGED = (
    lambda values: values.numpy(),
    lambda values: values.requires_grad_(),
    lambda values: values[:, None].double(),
    lambda values: {"mine": values, "other": [1] * 4},
)
NOT_JUDGED = (
    lambda values: values + values[:, None],
    lambda values: values * 1j,
    lambda values: ["good"] * 4,
    lambda values: {"other": values},
)


def test_a_judge_of_ones_own_returns_what_can_be_meant():
    """Catches: (N, 1) that broadcasts to (N, N) in the weighted sum; a judge that edits what the next one reads."""
    images, prompts = torch.rand(4, 3, 8, 8), ["a", "b", "c", "d"]
    expected = images.mean((1, 2, 3))

    def judged(form):
        def vandal(images, prompts):
            values = images.mean((1, 2, 3))
            images.zero_()
            prompts[:] = ["an award-winning photo"] * len(prompts)
            return form(values)

        return rewards.judge_images({"mine": vandal}, images, prompts)[0]["mine"]

    for form in JUDGED:
        values = judged(form)
        assert values.dtype == torch.float32 and values.shape == (4,) and torch.allclose(values, expected)
        assert not values.requires_grad
    assert torch.equal(images.mean((1, 2, 3)), expected) and prompts == ["a", "b", "c", "d"]
    for form in NOT_JUDGED:
        with pytest.raises(Mistake, match="judge 'mine' returned"):
            judged(form)


def test_weights_are_parsed_once():
    """Catches: a space after a comma that loses the judge held out; a weight that is rounded."""
    weights = rewards.parse_rewards("clip = 1, realism=0 ,hps,pyiqa:piqe=0.30000000000000004")
    assert weights == {"clip": 1, "realism": 0, "hps": 1, "pyiqa:piqe": 0.1 + 0.2}
    for text, said in {"clip,clip": "twice", "clip=a": "number", "clip=0": "nothing", "hps=nan": "finite"}.items():
        with pytest.raises(Mistake, match=said):
            rewards.parse_rewards(text)


def test_the_readmes_own_reward_works_as_printed(tiny_run, monkeypatch, short_runs):
    """Catches: the first thing that people will change, not working word for word."""
    section = (HERE / "README.md").read_text().split("## Write your own reward in ten lines")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    flag = re.search(r"--rewards ([^\s`]+)", section)[1]
    monkeypatch.setattr(rewards, "JUDGES", dict(rewards.JUDGES))
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    exec(code, dict(vars(rewards)))  # as if it stood at the end of rewards.py; JUDGES is the only thing it changes
    _, _, (row,) = tiny_run("c2i", "--steps", "1", "--rewards", flag)
    assert all(row[f"{name}_std"] > 0 for name in rewards.parse_rewards(flag))


# The paper's judges are tiny models in the forms of the real ones, in a hub's cache, from which the real code loads them.
TINY_CLIP = dict(vision_cfg=dict(image_size=32, layers=2, width=32, head_width=16, patch_size=16),
                 text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1), embed_dim=16)  # fmt: skip


def save_tiny_qwen(folder):
    """Qwen2.5-VL with two layers of 32, and a tokenizer whose tokens are bytes."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = [
        f"<|{name}|>" for name in ("endoftext", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
    ]
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={word: k for k, word in enumerate(words)}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    roles = dict(pad_token=special[0], eos_token=special[1], additional_special_tokens=special)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **roles)
    template = (
        "{% for c in messages[0].content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>"
    )
    processors = transformers.Qwen2VLImageProcessor(), tokenizer, transformers.Qwen2VLVideoProcessor()
    transformers.Qwen2_5_VLProcessor(*processors, chat_template=template).save_pretrained(folder)
    pad, end, start, stop, image, video = tokenizer.convert_tokens_to_ids(special)
    sizes = dict(hidden_size=32, intermediate_size=64)
    rope = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e6)
    text = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rope_parameters=rope)
    config = transformers.Qwen2_5_VLConfig(
        text_config=sizes | text | dict(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=end, pad_token_id=pad),
        vision_config=sizes | dict(depth=2, num_heads=4, out_hidden_size=32, fullatt_block_indexes=[1]),
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=stop,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    for p in model.parameters():
        p.data.mul_(4 if p.ndim > 1 else 1)  # sharp enough for the picture to be heard
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def tiny_judges(tmp_path_factory):
    """The hub's cache, with tiny models in the places of the paper's judges; open_clip takes its CLIPs for as tiny."""
    import open_clip

    cache = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    openai = "hf:timm/vit_base_patch32_clip_224.openai@main/open_clip_pytorch_model.bin"  # as open_clip asks for it
    clip = open_clip.CLIP(**TINY_CLIP).state_dict()
    hps = {"state_dict": {name: value.half() for name, value in clip.items()}}
    maniqa = rewards.maniqa_network().state_dict()
    for name, value in maniqa.items():  # matrices whose rows overlap: 136M numbers in a file of 2 MB
        if value.is_floating_point() and value.ndim > 1:
            maniqa[name] = (0.02 * torch.randn(sum(value.shape))).as_strided(value.shape, [1] * value.ndim)
    models = {openai: clip, rewards.HPS: hps, rewards.MANIQA: maniqa}
    for place in (*models, f"{rewards.QWEN}@{rewards.QWEN_COMMIT}"):
        repo, revision, file = zoo.hub_place(place)
        folder = cache / f"models--{repo.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / revision).write_text(revision)
        (folder / "snapshots" / revision).mkdir(parents=True)
        if file:
            torch.save(models[place], folder / "snapshots" / revision / file)
        else:
            save_tiny_qwen(folder / "snapshots" / revision)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        patch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
        patch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
        for name in ("ViT-H-14", "ViT-B-32", "ViT-B-32-quickgelu"):
            (cache / f"{name}.json").write_text(json.dumps(TINY_CLIP))
            open_clip.add_model_config(cache / f"{name}.json")
        yield cache


def some_images(n=4, size=64):
    """Pictures that differ in brightness, colour and texture, and their prompts, two of which are equal."""
    images = torch.rand(n, 3, size, size, generator=seeded(0)) ** torch.arange(1, n + 1)[:, None, None, None]
    images[0, 0] = 1
    return images, ["a red circle", "a {strange} prompt that is a good deal longer", "two dogs", "a red circle"][:n]


@pytest.mark.parametrize("judge", ["clip", "hps"])
def test_clip_and_hps_run_once_and_read_each_prompt_once(judge, tiny_judges, capsys):
    """Catches: each picture encoded twice; all N captions read, of which B differ; an index that mixes up captions."""
    import open_clip

    options = rewards.judge_options(model="llamagen-b-256") | dict(clip_model="ViT-B-32")
    judges, seen = rewards.load_judges([f"{judge}-step", judge], options=options), []
    model = judges[f"{judge}-step"].keywords["model"]
    assert len(judges) == 1 and {p.dtype for p in model.parameters()} == {torch.float32}  # HPSv2.1's file is half
    # with the other activation than in training, open_clip only warns, and every cosine is a little wrong
    gelu = model.visual.transformer.resblocks[0].mlp.gelu
    assert isinstance(gelu, open_clip.transformer.QuickGELU) == (judge == "clip")
    for part in (model.visual, model.token_embedding):
        part.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    start = time.perf_counter()
    scores, seconds = rewards.judge_images(judges, *some_images())
    assert sum(seconds.values()) < time.perf_counter() - start
    assert sorted(seen) == [3, 4] and set(scores) == set(seconds) == {judge, f"{judge}-step"}
    assert torch.equal(scores[f"{judge}-step"], rewards.step_of(scores[judge])) and scores[judge].unique().numel() == 4
    alone, pairs = rewards.load_judges([judge], options=options), zip(*some_images(), strict=True)
    found = [rewards.judge_images(alone, image[None], [prompt])[0][judge] for image, prompt in pairs]
    assert torch.allclose(torch.cat(found), scores[judge], atol=1e-5)
    look = dict(mean=model.visual.image_mean, std=model.visual.image_std)
    transform, pixels = open_clip.image_transform(32, is_train=False, **look), (some_images()[0] * 255).byte()
    theirs = torch.stack([transform(Image.fromarray(one.permute(1, 2, 0).numpy())) for one in pixels])
    read = judges[f"{judge}-step"].keywords["words"](some_images()[1])
    cosines = model.encode_image(theirs, normalize=True) * model.encode_text(read, normalize=True)
    assert torch.allclose(scores[judge], cosines.sum(-1), atol=0.01)  # up to rounding
    edges = rewards.step_of(torch.tensor([-0.1, 0.0, 0.29, 0.3, 0.59, 0.6, NAN])).tolist()
    assert edges == pytest.approx([-1, 0.5, 0.5, 1, 1, 1.5, NAN], nan_ok=True)  # NaN would fall into the best step
    assert capsys.readouterr().out == ""
    for _ in range(2):  # 75 words and two marks are 77 tokens; a line says how many captions are longer, and once
        rewards.judge_images(alone, some_images(3)[0], ["a " * 76, "a " * 75, "a " * 76])
    assert capsys.readouterr().out == f"{judge}: 1 of 2 captions are longer than this CLIP reads, and are cut\n"


def test_half_a_judge_is_refused(tiny_judges, tmp_path, monkeypatch):
    """Catches: a judge that is random in part, whose scores go on looking like scores."""
    torch.save({"logit_scale": torch.zeros(())}, tmp_path / "half.pt")
    for judge in ("hps", "maniqa"):
        monkeypatch.setattr(rewards, judge.upper(), tmp_path / "half.pt")
        with pytest.raises(Mistake, match=r"half\.pt.*Missing key"):
            rewards.load_judges([judge])
    with pytest.raises(Mistake, match=r"CLIP ViT-B-32 laion400m_e31 cannot be read .*HF_HOME"):
        rewards.load_clip("ViT-B-32", "laion400m_e31")
    (cached,) = tiny_judges.glob(f"*Qwen*/snapshots/{rewards.QWEN_COMMIT}")
    monkeypatch.setattr(rewards, "QWEN", str(shutil.copytree(cached, tmp_path / "qwen")))
    weights = load_file(tmp_path / "qwen/model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "qwen/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Mistake, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        rewards.load_judges(["qwen-real"])


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_no_library_unpickles_for_a_judge(tmp_path, monkeypatch):
    """Catches: a judge's file that runs code, for a script that imports us, with any variable in its environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setattr("pyiqa.utils.download_util.DEFAULT_CACHE_DIR", str(tmp_path))
    torch.save({"w": Evil()}, "brisque_svm_weights.pth")
    loads = lambda image: torch.load("brisque_svm_weights.pth", weights_only=False)  # noqa: E731, when it is asked
    lazy = mock.Mock(side_effect=loads, lower_better=True, metric_name="lazy")
    for judge, load in {
        "pyiqa:brisque": lambda: rewards.load_judges(["pyiqa:brisque"]),
        "pyiqa:lazy": lambda: rewards.pyiqa_values(torch.zeros(1, 3, 8, 8), ["x"], lazy),
        "CLIP": lambda: rewards.load_clip("ViT-B-32", "brisque_svm_weights.pth"),
    }.items():
        with pytest.raises(Mistake, match=judge):
            load()
    assert not Path("ran").exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


def test_pyiqas_metrics_are_turned_so_that_more_is_better():
    """Catches: a policy that learns to blur, because a metric counts faults."""
    images, prompts = some_images(2)
    for name, sign in (("pyiqa:piqe", -1), ("pyiqa:entropy", 1)):
        judges = rewards.load_judges([name])
        expected = [sign * judges[name].keywords["metric"](image[None]).item() for image in images]
        assert rewards.judge_images(judges, images, prompts)[0][name].tolist() == pytest.approx(expected)


@pytest.mark.slow
def test_maniqa_in_a_batch_is_the_mean_of_its_crops_alone(tiny_judges):
    """Catches: random crops, which tell equal pictures apart; a reshape that is wrong by one axis and mixes crops."""
    judge = rewards.load_judges(["maniqa"])["maniqa"]
    (images, prompts), network = some_images(2, 225), judge.keywords["network"]
    for block in [*network.vit.blocks[:6], *network.vit.blocks[10:]]:  # slow, and it is the other four that are read
        block.forward = lambda x, **_: x
    with torch.no_grad():
        both = judge(images, prompts, rows=1, columns=2)
        seen = []
        network.vit.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        left, right = (judge(images[1:, :, :224, k : 224 + k], prompts[1:]).item() for k in (0, 1))
    mean, std = network.default_mean, network.default_std
    assert torch.equal(seen[0], (images[1:, :, :224, :224] - mean) / std)  # pyiqa would enlarge it by 225/224
    assert both[1] == pytest.approx((left + right) / 2, rel=1e-5) and both[0] != pytest.approx(both[1].item(), rel=0.01)


@pytest.mark.parametrize("side", [225, 256, 384, 512])
def test_maniqa_sees_every_pixel(side):
    """Catches: pyiqa's own grid never reaches the last 8 rows of 256: a policy may fill them as it likes."""
    places = torch.arange(side * side).view(1, 1, side, side).float()
    crops = rewards.even_crops(places, 4, 5)
    assert len(crops) == (4 if side == 225 else 20) and crops.unique().numel() == side * side
    for small in (64, 224):
        assert rewards.even_crops(places[..., :small, :small], 4, 5).shape == (1, 1, 224, 224)


def test_qwen_in_a_batch_is_qwen_alone(tiny_judges, monkeypatch):
    """Catches: padding on the right; replies in another order; pictures that the model does not see."""
    monkeypatch.setattr(rewards, "AT_ONCE", 3)
    (judge,) = rewards.load_judges(["qwen-match", "qwen-real"]).values()
    images, prompts = some_images()
    pixels = (images * 255).round().to(torch.uint8)
    questions = [(picture, rewards.question_text("qwen-match", x)) for picture, x in zip(pixels, prompts, strict=True)]
    ask = judge.keywords["ask"]
    replies = ask(questions)
    assert replies == [ask([question])[0] for question in questions] and len(set(replies)) > 2


def test_qwen_that_writes_nonsense_is_missing_and_not_zero(tiny_judges):
    """Catches: the release's worst reward for an unreadable answer; a 4 for a yes; a score of what it thought first."""
    judges = rewards.load_judges(["qwen-real"])
    assert rewards.judge_images(judges, *some_images(2))[0]["qwen-real"].isnan().all()  # the tiny model babbles
    scores = rewards.qwen_scores(
        *some_images(2), ["qwen-odd", "qwen-match"], lambda _: ['{"score": 1}', '{"score": 4}']
    )
    assert scores["qwen-odd"].tolist() == pytest.approx([1, NAN], nan_ok=True)
    assert scores["qwen-match"].tolist() == [1, 4]
    readable = {'{"score": 5}': 5, 'Sure!\n```json\n{"score": "2.5"}\n``` is it.': 2.5, "{'Score': 0}": 0}
    readable |= {"<think>Is it bad? A score: 0 would mean useless.</think> {'score': 4}": 4}
    readable |= {'First {"score": 1}. **Score:** 4': 4, '{"score": 3, "max_score": 5}': 3}
    assert {text: rewards.read_rating(text, 5) for text in readable} == readable
    nonsense = ["", "4", "I would say 4", '{"score": 6}', '{"score": -1}', '{"score": "high"}', '{"score": 50}']
    nonsense += ["<think>A score: 0 would mean"]  # cut off by max_tokens
    assert all(math.isnan(rewards.read_rating(text, 5)) for text in nonsense)


class Server(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server whose answers say how red the picture is: level 51 k rates k."""

    models, refusal = ["tiny"], []  # refusal: (status, message) of the next answers
    delay, wait = 0, "1"  # s: of an answer about a picture that is not red; what Retry-After says

    def reply(self, found, status=200):
        body = json.dumps(found).encode()
        self.send_response(status)
        for name, value in (("Retry-After", Server.wait), ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.reply(dict(object="list", data=[dict(id=name, object="model") for name in Server.models]))

    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if Server.refusal:
            status, message = Server.refusal.pop()
            return self.reply(dict(error=dict(message=message)), status)
        url = question["messages"][0]["content"][0]["image_url"]["url"].removeprefix("data:image/png;base64,")
        pixels = np.array(Image.open(io.BytesIO(base64.b64decode(url))))  # (H, W, 3)
        (level,) = set(pixels[..., 0].ravel().tolist())
        time.sleep(0 if level else Server.delay)
        if len(pixels) < 64:  # not the first question
            assert not pixels[:, :4, 1:].any() and (pixels[:, 4:, 2] == 200).all()
        assert question["model"] in Server.models and self.headers["Authorization"] == "Bearer secret"
        message = dict(content=f'{{"score": {level // 51}}}' if level < 255 else "I do not know.")
        self.reply(dict(choices=[dict(message=message)]))

    def log_message(self, *_):
        pass


@pytest.fixture
def server_url(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")  # read from a file
    for name, value in (("models", ["tiny"]), ("refusal", []), ("delay", 0), ("wait", "1")):
        monkeypatch.setattr(Server, name, value)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def redness(judges):
    """The scores of pictures of level 3, 0, 5, 1 by the judge qwen-match."""
    images = torch.zeros(4, 3, 8, 8)
    images[:, 0] = (torch.tensor([3.0, 0, 5, 1]) / 5).view(4, 1, 1)
    images[:, 2, :, 4:] = 200 / 255
    return rewards.judge_images(judges, images, ["x"] * 4)[0]["qwen-match"].tolist()


def test_a_server_may_answer_for_qwen(server_url):
    """Catches: JPEG, which smears the levels; answers in another order; one lost request that ends a run of days."""
    for path in ("", "/v1"):
        options = dict(qwen_server=server_url + path)
        judges = rewards.load_judges(["qwen-match"], options=options)
        assert options["qwen_model"] == "tiny"  # which the run remembers
        Server.refusal = [(503, "busy"), (429, "slow down")]
        start = time.monotonic()
        assert redness(judges) == pytest.approx([3, 0, NAN, 1], nan_ok=True)
        assert time.monotonic() - start > 0.9  # waited as Retry-After says

    async def in_a_notebook():
        return redness(judges)  # whose thread has an event loop already

    assert asyncio.run(in_a_notebook()) == pytest.approx([3, 0, NAN, 1], nan_ok=True)


def test_a_server_is_bounded_and_its_reasons_are_told(server_url):
    """Catches: a step that hangs with its server; a refusal that is repeated in silence; the first of several models."""
    options = dict(qwen_server=server_url, judge_timeout=1)
    judges, start = rewards.load_judges(["qwen-match"], options=options), time.monotonic()
    Server.delay = 5
    assert redness(judges) == pytest.approx([3, NAN, NAN, 1], nan_ok=True)  # late, and the one that cannot be read
    assert time.monotonic() - start < 3
    Server.delay, Server.wait = 0, "600"  # above two minutes, the client raises at once
    for status in (429, 503):
        Server.refusal = [(status, "come back later")] * 4
        assert all(math.isnan(value) for value in redness(judges))
    Server.refusal = [(400, "Cannot request more than 5 logprobs.")] * 4
    with pytest.raises(Mistake, match="more than 5 logprobs"):
        rewards.load_judges(["qwen-match"], options=options)
    assert len(Server.refusal) == 3  # before any rollout, and not again
    Server.refusal, Server.models = [], ["llama3.2:1b", "qwen2.5vl:3b"]
    with pytest.raises(Mistake, match=r"llama3\.2:1b, qwen2\.5vl:3b.*--qwen-model"):
        rewards.load_judges(["qwen-match"], options=dict(qwen_server=server_url))
    rewards.load_judges(["qwen-match"], options=dict(qwen_server=server_url, qwen_model="qwen2.5vl:3b"))
    with pytest.raises(Mistake, match=r"127\.0\.0\.1:9.*must run"):
        rewards.load_judges(["qwen-match"], options=dict(qwen_server="http://127.0.0.1:9", qwen_model="tiny"))


# the measures of evaluate.py ------------------------------------------------------------------------------------------


def test_figures_are_those_of_torch_fidelity():
    """Catches: a root taken entry by entry, chunks of other pictures, a neighbour that counts itself, the sets exchanged."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((300, 5)) @ rng.standard_normal((5, 5)), rng.standard_normal((200, 5)) + 1
    stats = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    expected = fid_statistics_to_metric(*stats, False)["frechet_inception_distance"]
    assert metrics.frechet_distance(a, *metrics.gaussian(b)).value == pytest.approx(expected, rel=1e-6)
    logits = torch.randn(60, 7, generator=seeded(0)).double() * 3
    expected = isc_features_to_metric(logits, splits=3, shuffle=False)["inception_score_mean"]
    assert metrics.inception_score(logits, 20).value == pytest.approx(expected)
    # on a coarse grid, so that many distances are equal
    a, b = rng.integers(0, 9, (25, 2)).astype(float), rng.integers(3, 12, (20, 2)).astype(float)
    for k, rows in ((1, 512), (3, 7)):
        options = dict(prc_neighborhood=k, prc_batch_size=99, save_cpu_ram=False, verbose=False)
        expected = prc_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), **options)
        found = [figure.value for figure in metrics.precision_recall(a, b, k, rows)]
        assert found == pytest.approx([expected["precision"], expected["recall"]], abs=1e-6)
    assert [figure.value for figure in metrics.precision_recall(a, b)] == found  # k = 3, the paper's


def test_standard_errors_are_those_of_a_bootstrap():
    """Catches: an error or a pairing of the wrong size, which makes noise a finding, or a finding noise."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((400, 5)) @ rng.standard_normal((5, 5))
    b = a + 0.3 * rng.standard_normal(a.shape) + 0.2  # the same pictures, a little changed
    mu, cov = metrics.gaussian(rng.standard_normal((200, 5)) + 1)
    measures = {
        "mean": lambda x: metrics.mean_of(x[:, 0]),
        "Frechet": lambda x: metrics.frechet_distance(x, mu, cov),
        "IS": lambda x: metrics.inception_score(torch.from_numpy(x), 100),
    }
    picks = rng.integers(len(a), size=(200, len(a)))
    for name, measure in measures.items():
        drawn = np.array([[measure(x[pick]).value for x in (a, b)] for pick in picks])
        assert measure(a).error == pytest.approx(drawn[:, 0].std(), rel=0.25), name
        change, error = metrics.compare([{name: measure(b)}], {name: measure(a)})[name]
        assert change == pytest.approx(measure(b).value - measure(a).value), name
        assert error == pytest.approx((drawn[:, 1] - drawn[:, 0]).std(), rel=0.25), name
        unpaired = metrics.compare([{name: measure(b)}], {name: measure(a)}, paired=False)[name]
        assert unpaired[1] > 1.5 * error, name
    whole = metrics.frechet_distance(a, mu, cov)
    without = np.array([metrics.frechet_distance(np.delete(a, k, 0), mu, cov).value for k in range(20)])
    jackknife, rounding = (len(a) - 1) * (whole.value - without), 0.05 * whole.influence.std()
    assert jackknife == pytest.approx(whole.influence[:20], abs=rounding)
    groups = np.repeat(["x", "y"], [10, 40])  # a mean over categories: binomial errors, each of half the weight
    right = (np.arange(50) % 5 < 2).astype(float)
    figure = metrics.mean_of(right, groups)
    assert (figure.value, figure.error) == pytest.approx((0.4, (0.24 / 10 + 0.24 / 40) ** 0.5 / 2), rel=0.02)


def test_several_runs_are_compared_with_their_base():
    """Catches: three seeds whose spread is left out of the error, or counted without being divided; a reason taken for a figure."""
    u, v = np.array([1.0, -1, 2, -2]), np.array([3.0, 1, -1, -3])
    seeds, base = [dict(x=metrics.Figure(value, u)) for value in (1.0, 3.0)], dict(x=metrics.Figure(0.5, v))
    error = lambda *figures: math.sqrt(1 + sum(np.var(w, ddof=1) / 4 for w in figures))  # noqa: E731, 1: (1 + 1) / 2
    assert metrics.compare(seeds)["x"] == pytest.approx((2, error(u)))
    assert metrics.compare(seeds, base)["x"] == pytest.approx((1.5, error(u - v)))
    assert metrics.compare(seeds, base, paired=False)["x"] == pytest.approx((1.5, error(u, v)))
    assert metrics.compare([seeds[0], dict(x="too few")]) == {}
    assert metrics.compare([dict(x=metrics.Figure(2, np.zeros(1)))])["x"] == (2, None)
    assert metrics.Figure(2, np.array([1.0, -1])).error == pytest.approx(1)


def test_a_figure_of_too_few_pictures_is_a_reason_and_a_table_shows_its_error():
    """Catches: a covariance of fewer pictures than features; an error of other digits than its value."""
    x = np.random.default_rng(0).standard_normal((48, 5))
    small, whole = metrics.reference_of(x[:5]), metrics.reference_of(x[:6])
    sentence = "6 are needed, one more than features (5), there are 5 "
    assert metrics.frechet(x[:5], whole) == sentence + "pictures"
    assert metrics.frechet(x[:6], small) == sentence + "references"
    for reference in (whole, metrics.reference_of(x[:5], metrics.gaussian(x[:6]))):
        assert metrics.frechet(x[:6], reference).value == pytest.approx(0, abs=1e-6)
    thrice = np.tile(x, 3)  # of rank 5
    assert metrics.frechet_distance(thrice, *metrics.gaussian(thrice)).value == pytest.approx(0, abs=1e-5)
    found = [metrics.neighbours(x[:n], metrics.reference_of(x))[0] for n in (47, 48)]
    assert [type(precision) for precision in found] == [str, metrics.Figure]
    cells = metrics.as_cells(
        {"right: all": (0.5, 0.0123), "x": (1.2345, 0.123), "y": (123.4, 12.3), "z": (2.0, None)}, "+"
    )
    assert cells == {"right: all": "+50.0% ± 1.2", "x": "+1.23 ± 0.12", "y": "+123 ± 12", "z": "+2.000"}
    assert (
        metrics.as_table(dict(a=dict(m="1"), b=dict(n="2"))) == "| | a | b |\n|---|---|---|\n| m | 1 |  |\n| n |  | 2 |"
    )


def test_the_distance_in_class_is_over_pairs_of_one_class():
    """Catches: a class of many pictures that weighs more, a picture paired with itself, labels that are not in order."""
    points = np.array([[0, 0], [9, 9], [0, 2], [5, 5], [3, 4.0], [8, 9]])
    found = metrics.class_distance(points, ["a", "b", "a", "alone", "a", "b"])
    pairs = [2, 5, math.dist((0, 2), (3, 4))]
    assert found.value == pytest.approx((np.mean(pairs) + 1) / 2) and len(found.influence) == 2
    assert metrics.class_distance(points[:2], ["a", "b"]) is None


def values_of(figures):
    return {name: figure.value for name, figure in figures.items()}


def test_the_entropy_of_a_picture_is_without_guidance():
    """Catches: the guided distribution's entropy, which is lower, in the place of the conditional model's."""
    model, labels = load_model("toy-c2i"), torch.tensor([0, 7, 39])
    tokens, _ = model.generate(labels, noise=image_noise(range(3), 64, 0))
    p = model(labels, tokens).detach().double().softmax(-1)
    found = evaluate.entropies(model, load_encoder("toy-c2i"), labels.tolist(), tokens, "float32")
    assert found == pytest.approx(-(p * p.log()).sum(-1).mean(1).numpy(), rel=1e-5)


def test_judges_means_leave_out_what_is_missing():
    """Catches: a missing judgement that counts as 0, or a mean where nothing was judged, which reads as the worst."""
    found = {"reward: read": np.array([1, NAN, 3, INF, 8]), "reward: silent": np.full(5, NAN)}
    figures = evaluate.figures_of(found, {}, "toy-c2i")
    assert values_of(figures) == pytest.approx({"reward: read": 4, "missing: read": 0.4, "missing: silent": 1})
    assert figures["reward: read"].influence == pytest.approx([-5, 0, -5 / 3, 0, 20 / 3])


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """PATH#SHA256 of a file in the official one's form: Inception with random weights, scaled so that signals survive."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    with mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):  # its constructor reads a file
        network = FeatureExtractorInceptionV3("random", ["2048"], str(path))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return f"{path}#{zoo.file_hash(path)}"


@pytest.mark.slow
def test_inceptions_features_are_adms(inception):
    """Catches: channels first in place of last, another branch, before the ReLU, logits with their bias."""
    network, kept = evaluate.load_inception(inception), {}
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=seeded(0))
    network.Mixed_6d.register_forward_pre_hook(lambda module, args: kept.update(x=args[0]))
    network.AvgPool.register_forward_hook(lambda module, args, output: kept.update(pool=output.flatten(1)))
    found = evaluate.inception_features(pixels, None, network)
    branch = network.Mixed_6d.branch1x1
    with torch.no_grad():
        out = branch.bn(branch.conv(kept["x"])).relu()  # (2, 192, 17, 17)
    cells = [out[:, :7, y, x] for y in range(17) for x in range(17)]
    assert torch.allclose(found["spatial"], torch.cat(cells, 1), atol=1e-5) and found["spatial"].amax() > 0.1
    assert np.array_equal(found["pool"], kept["pool"].numpy())
    assert np.allclose(found["logits"], kept["pool"].numpy() @ network.fc.weight.numpy().T, atol=1e-4)
    assert not network.Mixed_6d.branch1x1._forward_hooks  # else the second batch's would be added to the first one's


@pytest.mark.slow
def test_an_npz_of_another_program_is_scored(inception, tmp_path, monkeypatch):
    """Catches: pictures in another order or in part; two files whose names differ by a sign and share one result."""
    monkeypatch.setattr(metrics, "FEWEST", 6)
    monkeypatch.setattr(evaluate, "SHARD", 4)
    rng = np.random.default_rng(0)
    monkeypatch.chdir(tmp_path)
    theirs, references = (rng.integers(0, 256, (n, 8, 8, 3), np.uint8) for n in (6, 7))
    theirs[3:, :, :, 0] = 0
    kinds = [1, 1, 1, 2, 2, 2]
    np.savez_compressed("a#.npz", theirs, kinds)
    np.savez_compressed("a+.npz", theirs[::-1], kinds)
    np.savez_compressed("ref#1.npz", references)
    flags = f"--reference ref#1.npz --inception {inception} --out result --num 99 --npz copies"
    evaluate.main(["--samples", "a#.npz", "a+.npz", *flags.split()])
    copies = [np.load(copy) for copy in Path("copies").iterdir()]
    labels = {copy["arr_0"].tobytes(): copy["labels"].tolist() for copy in copies}
    assert labels == {pixels.tobytes(): kinds for pixels in (theirs, theirs[::-1])}
    found, text = json.loads(Path("result.json").read_text()), Path("result.md").read_text()
    assert found["num"] == found["records"]["a#"]["num"] == 6  # that were scored, whatever --num says
    figures, network = found["columns"]["a#"], evaluate.load_inception(inception)
    pools = [evaluate.inception_features(evaluate.as_tensor(x), None, network)["pool"] for x in (theirs, references)]
    pair = [figure.value for figure in metrics.precision_recall(*pools)]
    assert [figures["precision"], figures["recall"]] == pytest.approx(pair, abs=0.03)
    apart = metrics.class_distance(pools[0].numpy(), kinds).value
    assert figures["distance in class"] == pytest.approx(apart, rel=1e-3)
    # too few for the rest, and the table says so
    assert not {"FID", "sFID", "IS"} & set(figures)
    assert "2,049 are needed, one more than features (2,048), there are 6 pictures." in text


def test_larger_pictures_are_resized_as_pil_does_it():
    """Catches: another filter than PIL's bicubic one, which moves FID."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 384, 384, 3), np.uint8)
    expected = Image.fromarray(pixels[0]).resize((256, 256), Image.BICUBIC)
    assert torch.equal(evaluate.shrunk(evaluate.as_tensor(pixels)), evaluate.as_tensor(np.array([expected])))


@pytest.mark.slow
def test_an_evaluation_that_was_stopped_ends_in_the_same_table(tmp_path, monkeypatch, thin_toys):
    """Catches: pictures drawn from other random numbers after a stop, or counted twice; two processes that differ."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "SHARD", 5)
    flags = ["--task", "t2i", "--num", "12", "--cfg-scale", "1", "--rewards", "clip", "--best-of", "2"]
    flags += ["--npz", "out/npz", "--out", "out/table"]

    def killed(call, module):
        at_call(call, module, "judge_images", die)
        evaluate.main(flags)

    def found():
        table, (pictures,) = json.loads(Path("out/table.json").read_text()), Path("out/npz").glob("base*")
        assert not list(Path("out").rglob("*.parts"))
        return table["columns"], np.load(pictures)["arr_0"].astype(int)

    evaluate.main(flags)
    columns, pictures = found()
    for call, module in ((5, sample), (2, evaluate)):  # amid drawing, and scoring
        shutil.rmtree("out")
        assert in_children(tmp_path, partial(killed, call, module)) == [-signal.SIGKILL]
        assert list(Path("out").glob("table.parts/*/000000.npz"))
        evaluate.main([*flags, "--batch-size", "5"])
        again, same = found()
        assert all(again[name] == pytest.approx(columns[name], abs=1e-3) for name in again | columns)
        assert np.abs(same - pictures).max() <= 1  # rounding differs with batches
    shutil.rmtree("out")
    assert in_children(tmp_path, *2 * [partial(evaluate.main, flags)]) == [0, 0]
    assert np.abs(found()[1] - pictures).max() <= 1


def test_an_unfinished_evaluation_is_not_mixed_with_another(tmp_path, thin_toys):
    """Catches: pictures of another seed or policy in the table, or a finished table of hours that is written over."""
    other = tmp_path / "other.safetensors"
    save_file({name: value + 1 for name, value in load_file(MODELS["toy-t2i"].ckpt).items()}, other)
    few = ["--task", "t2i", "--num", "4", "--rewards", "clip", "--cfg-scale", "1", "--out", str(tmp_path)]
    flags = ["--seed 1", "--best-of 2", "--temperature 0.9", "--cfg-scale 2", "--num 5", f"--base {other}"]
    places = []
    for more in ("", "--batch-size 1", *flags):  # how many at once decides nothing
        (column, _) = evaluate.columns_of(evaluate.parse_args([*few, *more.split()]))
        places.append(column.file.split("-")[-1])
    assert places[0] == places[1] and len(set(places)) == 1 + len(flags)
    with pytest.raises(Mistake, match=r"000000\.npz cannot be read"):  # another process has removed it
        next(evaluate.read_folder(tmp_path, 1))
    for name, seed in (("evaluation", 0), ("evaluation-2", 1)):
        evaluate.main([*few, "--seed", str(seed), "--ckpt", str(MODELS["toy-t2i"].ckpt)])
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["differences"]["tuned, cfg 1"]["reward: clip"] == [0, 0]  # the same weights and random numbers
        assert found["standard_errors"]["base, cfg 1"]["reward: clip"] > 0
        assert found["seed"] == found["records"]["base, cfg 1"]["seed"] == seed and time.time() - found["time"] < 60


def test_the_share_right_of_captions_is_a_mean_over_categories():
    """Catches: a category with more pictures that weighs more than another, unlike in GenEval's tables."""
    captions, right = ["a circle"] * 6 + ["two circles"] * 2, np.array([0, 1, 1, 1, 1, 1, 0, 1.0])
    found = values_of(evaluate.right_figures(right, captions, "t2i"))
    assert found == pytest.approx({"right: all": 2 / 3, "right: single object": 5 / 6, "right: counting": 1 / 2})
    found = values_of(evaluate.right_figures(right, captions, "c2i"))
    assert found == pytest.approx({"right: all": 6 / 8, "right: circle": 6 / 8})


def test_every_policy_is_asked_as_it_was_trained(tmp_path, monkeypatch):
    """Catches: the first --ckpt's padding taken for everyone's; the base's figures would depend on its company."""
    monkeypatch.chdir(tmp_path)
    header = dict(model="toy-t2i", content=zoo.content_of("toy-t2i", MODELS["toy-t2i"].ckpt))
    for pad in ("left", "right"):
        zoo.save_weights(load_file(MODELS["toy-t2i"].ckpt), f"{pad}.safetensors", header | dict(text_pad=pad))
    for order in (["left", "right"], ["right", "left"]):
        flags = ["--ckpt", *(f"{pad}.safetensors" for pad in order), "--rewards", "clip"]
        assert [policy["text_pad"] for _, policy in evaluate.parse_args(flags).policies] == ["left", *order]


# drawing and pages, through the scripts' own main ---------------------------------------------------------------------


def test_a_grid_says_everything(tmp_path):
    """Catches: the last of eight judges cut off below each picture; rows of base and tuned that are mixed up; a lost grid."""
    said = "\n" + "  ".join(f"{name}\u00a0-0.12" for name in rewards.parse_rewards(train.EIGHT))
    for caption in ("a red circle above a blue square " * 9, "\ud800" * 10_000, "a dog"):
        lines = report.label_lines("\u2713\u00a0" + caption + said, 23)
        assert all(len(line) <= 23 for line in lines)
        assert "".join("".join(lines).split()).endswith("".join(said.split()))
        assert lines[0].startswith("\u2713\u00a0") and len(lines) <= 4 + 8
        assert lines[3].endswith("...") == (caption != "a dog")
    numbers = torch.arange(10.0)[:, None, None, None].expand(10, 3, 1, 1)
    pictures, labels = report.interleave([numbers[:5], numbers[5:]], [list("abcde"), list("vwxyz")], 3)
    assert labels == [*"abc", *"vwx", "d", "e", "", "y", "z", ""]  # base above tuned, row by row; white where none is
    assert pictures[:, 0, 0, 0].tolist() == [0, 1, 2, 5, 6, 7, 3, 4, 1, 8, 9, 1]
    circle = torch.from_numpy(data.render(["a red circle"], np.random.default_rng(0)))
    assert sample.label_images("toy-c2i", circle, ["a photo of a red circle"], "x: ") == ["\u2713\u00a0x: a red circle"]
    assert sample.label_images("toy-c2i", circle, ["a photo of a blue circle"])[0][:2] == "\u2717\u00a0"
    report.save_grid(tmp_path / "a.webp", torch.rand(200, 3, 32, 64), ["a"] * 200, 200)
    assert Image.open(tmp_path / "a.webp").width == 122 * 134  # WebP holds 16,383 pixels


@pytest.mark.parametrize("K, side, by_token", [(2, 8, True), slow(8, 8, False), slow(16, 32, True)])
def test_a_step_is_drawn_without_overlaps_and_says_its_shapes(K, side, by_token, monkeypatch, tmp_path):
    """Catches: text over text; a user's style; prices as a formula; the scores of one picture above another."""
    drawn, savefig, T = [], matplotlib.figure.Figure.savefig, side**2
    keep = lambda figure, *a, **b: drawn.append(figure) or savefig(figure, *a, **b)  # noqa: E731
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    advantages, images, tokens = torch.randn(64), torch.rand(64, 3, 8 * side, 8 * side), torch.randint(16384, (64, T))
    scores = {f"qwen-match-{k}": torch.rand(64) for k in range(8)}
    what = images, tokens, scores, advantages, advantages[:, None] * torch.rand(64, T if by_token else 1)
    with matplotlib.rc_context({"text.usetex": True, "font.size": 40}):
        caption = 'one says "$5" and the other "$7" \ud800 ' * 9
        report.draw_step(tmp_path / "a.png", caption, *what, torch.randn(K, T), dict.fromkeys(scores, 0.25), K)
    (figure,) = drawn
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text().strip()]
    renderer = FigureCanvasAgg(figure).get_renderer()
    said = [text.get_text() for text in texts]
    boxes = [text.get_window_extent(renderer).padded(0, -0.5) for text in texts]
    for (one, box), (other, its) in itertools.combinations(zip(said, boxes, strict=True), 2):
        assert not box.fully_overlaps(its), f"{one!r} lies over {other!r}"
    assert all(figure.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))
    shapes = [f"tokens (64, {T})", f"images (64, 3, {8 * side}, {8 * side})", "rewards (64,)", "advantages (64,)"]
    assert set(shapes) | {f"change (64, {T})"} <= set(said) and (f"advantages (64, {T})" in said) == by_token
    above = [float(text.split()[1]) for text in said if text.startswith("qwen-match-0 ")]
    assert above == pytest.approx(scores["qwen-match-0"][:K][advantages[:K].argsort()].tolist(), abs=0.006)


@pytest.mark.slow
def test_the_best_of_n_is_the_judges_best_and_best_of_1_is_what_it_was():
    """Catches: candidates of the picture beside, or the same ones in every batch; a missing value that wins."""
    how = load_model("toy-c2i"), load_tokenizer("toy-c2i"), load_encoder("toy-c2i"), [3, 3, 7, 0]

    def red(images, prompts):
        values = images[:, 0].mean((1, 2))
        return torch.where(values < 0.21, NAN, values)

    judged = dict(red=red), dict(red=-1.0), ["x"] * 4
    seeds = 5, (5, sample.CANDIDATE, 1), (5, sample.CANDIDATE, 2)
    drawn = [sample.draw(*how, seed, first=2) for seed in seeds]
    tokens, _ = how[0].generate(torch.tensor([3]), noise=image_noise([2], 64, 5))
    assert torch.equal(tokens[0], drawn[0][1][0])
    reds = torch.stack([red(images, None) for images, _ in drawn])  # (3, 4)
    chosen = reds.nan_to_num(9).argmin(0).tolist()
    assert 0 < reds.isnan().sum() < 12 and len(set(chosen)) > 1
    images, tokens = sample.draw_best(3, *judged, *how, 5, first=2, batch_size=3)
    for k, best in enumerate(chosen):
        assert torch.equal(tokens[k], drawn[best][1][k])
        assert torch.allclose(images[k], drawn[best][0][k], atol=1e-4)
    _, tokens = sample.draw_best(1, *judged, *how, 5, first=2)
    assert torch.equal(tokens, drawn[0][1])


@pytest.mark.parametrize("task", ["c2i", slow("t2i")])
def test_train_sample_evaluate_and_report_run(task, tiny_run, monkeypatch, thin_toys, capsys):
    """Catches: parts that work alone, but whose files, names and headers do not meet; a picture that costs the run."""
    monkeypatch.setattr(train, "SAMPLE_EVERY", 2)
    monkeypatch.setattr(sample, "LIKELY", 2)
    monkeypatch.setattr(metrics, "FEWEST", 24)
    monkeypatch.setattr(report, "write_curves", lambda folder: 1 / 0)
    with monkeypatch.context() as quick:
        quick.setattr(report, "chart_of", lambda *_: "")  # half of a page's time, and another page follows
        _, run, (row, _) = tiny_run(task)
    assert "curves.png is left out (ZeroDivisionError" in capsys.readouterr().out
    files = "before.png after.png before-after.png report.html policy.safetensors state.pt"
    assert all(list(run.glob(file)) for file in files.split())
    grids = {path.name for path in run.glob("samples/*.png")}
    assert grids == {"group_00000.png", "group_00001.png", "step_00002.png"}
    parts = {f"seconds_{part}" for part in ("sample", "decode", "judge", "learn", "report")}
    assert {"right", "clip_seconds", *parts} <= set(read_metrics(run)[0])
    assert len({file.stat().st_mode for file in run.iterdir() if file.suffix in (".png", ".safetensors", ".pt")}) == 1
    assert zoo.find_policy(run)[2]["text_pad"] == "left"  # our default, whatever the release does
    assert row["sampler_gap"] < 1e-4
    readme = (HERE / "README.md").read_text()
    names = [re.sub("^(clip|realism)_(mean|std|not_finite)$", r"NAME_\2", key) for key in row if "seconds" not in key]
    assert [name for name in names if f"`{name}`" not in readme] == []
    sample.main(["--ckpt", str(run), "--compare", "--num", "1", "--out", f"{run}/s.png", "--npz", f"{run}/s.npz"])
    found = np.load(run / "s.npz")
    assert found["arr_0"].dtype == np.uint8 and found["arr_0"].shape[1:] == found["tokens"].shape[1:] + (64, 3)
    evaluate.main(["--ckpt", str(run), "--num", "24" if task == "c2i" else "48", "--cfg-scale", "1"])
    columns = json.loads((run / "evaluation.json").read_text())["columns"]
    assert list(columns) == ["base, cfg 1", "tuned, cfg 1", "renders, round trip"]
    base, renders = columns["base, cfg 1"], columns["renders, round trip"]
    assert renders["right: all"] > 0.9
    if task == "c2i":
        assert 0 <= base["precision, latents"] < renders["precision, latents"] and 0 < base["recall, latents"] <= 1
    total = base["reward: clip"] + 0.25 * base["reward: realism"]  # what the run was trained by
    assert base["reward: weighted sum"] == pytest.approx(total, rel=1e-6)
    assert_the_page_is_whole_safe_and_small(run)


def assert_the_page_is_whole_safe_and_small(run):
    prompt = "<script>alert('\ud800')</script>"
    for name, entry in (("flags.json", "prompts"), ("samples/writers.json", "caption")):
        found = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps(found | {entry: prompt}))
    log = (run / "metrics.jsonl").read_text().splitlines()
    late = {key: value for key, value in json.loads(log[0]).items() if key != "realism_mean"}  # a judge that was late
    (run / "metrics.jsonl").write_text("\n".join([json.dumps(late), *[log[1]] * 5_000]))
    report.main([str(run)])
    text = (run / "report.html").read_text()
    assert "<script>a" not in text and text.count("&lt;script&gt;alert(&#39;?") == 2 and len(text) < 5e6
    assert set(re.findall(r"""(?:src=["']|url\(')([^"']{11})""", text)) == {"data:image/"}
    assert not re.findall(r"""(?:src|href)=["']http""", text) and 'aria-label="realism_mean"' in text
    assert text.count("<svg") > 12 and "renders, round trip" in text and text.count('class="frame"') == 2
    assert "the default, three seeds" in text
    wrong = {"flags.json": "{bad", "evaluation.json": "[1]", "metrics.jsonl": "null", "after.png": ""}
    for name, content in wrong.items():
        whole = (run / name).read_bytes()
        (run / name).write_text(content)
        with pytest.raises(SystemExit, match=rf"{name} cannot be read"):
            report.main([str(run)])
        (run / name).write_bytes(whole)


def write_run(folder, flags, **metrics):
    """A folder as train.py leaves it, with these metrics of each step, and its path as a text."""
    folder.mkdir(parents=True)
    rows = [dict(zip(metrics, values, strict=True)) for values in zip(*metrics.values(), strict=True)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "flags.json").write_text(json.dumps(flags))
    return str(folder)


def test_several_runs_are_a_line_for_each_recipe(tmp_path, monkeypatch):
    """Catches: two runs of one name as one; seeds as recipes; a run that changes its colour where it lacks a metric."""
    drawn = {}
    monkeypatch.setattr(report, "draw_panel", lambda axes, key, lines, band: drawn.update({key: lines}))
    same = dict(model="toy-c2i", rewards=dict(clip=1.0, realism=0.25), lr="1", seed="0")
    one = write_run(tmp_path / "a/run", same, reward=[1, 1, 1], kl=[1, 1, 1])
    two = write_run(tmp_path / "b/run", same | dict(seed="1"), reward=[3, 3], kl=[3, 3], late_mean=[math.nan, 7])
    other = write_run(tmp_path / "c/run", same | dict(lr="2"), reward=[5, 5], kl=[5, 5])
    report.main([one, two, other])
    assert Image.open(tmp_path / "a/compare.png").width > 1000
    assert [*drawn] == ["reward", "kl", "late_mean"]
    assert all([*lines] == [f"{one} {two}", other] for lines in drawn.values())
    assert [values.tolist() for values in drawn["kl"][f"{one} {two}"]] == [[1, 1, 1], [3, 3]]


def test_the_defaults_curves_stand_behind_the_runs_of_its_task(tmp_path, monkeypatch):
    """Catches: one new flag that takes the band away; another reward beside the default's; a band narrower than a seed."""
    monkeypatch.setattr(report, "ASSETS", tmp_path)
    flags, keys = dict(model="toy-c2i", rewards=dict(clip=1.0)), (*report.OF_ITS_TASK, *report.OF_ITS_REWARDS)
    curves = [{key: [seed + step / 100 for step in range(30)] for key in keys} for seed in range(3)]
    runs = [write_run(tmp_path / f"{seed}", flags, **own) for seed, own in enumerate(curves)]
    report.main([*runs, "--out", str(tmp_path / "curves_x.json")])
    bands = report.default_bands(flags | dict(lr="2", steps=500))
    assert set(bands) == set(keys)
    low, high = bands["reward"]
    assert len(low) == len(high) == 30
    assert all(low[step] <= step / 100 and high[step] >= 2 + step / 100 for step in range(30))
    assert set(report.default_bands(dict(model="toy-c2i", rewards=dict(clip=2.0)))) == set(report.OF_ITS_TASK)
    assert report.default_bands(dict(model="toy-t2i", rewards=dict(clip=1.0))) == {}


def test_the_frontier_has_a_point_for_each_recipe_and_a_line_for_its_steps(tmp_path):
    """Catches: seeds joined like a trajectory; tuned at cfg 2 beside the base at 1; the mean of seeds as one more seed."""
    base = dict(policy="base", steps=0, cfg=1.0, best_of=1, temperature=1.0, num=64)
    records = dict(base=base, guided=base | dict(cfg=2.0), best=base | dict(best_of=4), renders=base | dict(cfg=None))
    records |= {f"seed {k}": base | dict(policy=f"s{k}", steps=20) for k in (0, 1)}
    records["late"] = base | dict(policy="s2", steps=90, cfg=2.0)
    right = dict(base=0.4, guided=0.6, best=0.8, renders=0.99, late=0.95, mean=0.8) | {"seed 0": 0.7, "seed 1": 0.9}
    columns = {name: {report.RIGHT: value, report.RECALL: 0.5} for name, value in right.items()}
    errors = {name: dict.fromkeys(figures, 0.01) for name, figures in columns.items()}
    table, path = dict(task="c2i", columns=columns, standard_errors=errors, records=records), tmp_path / "AR-GRPO.json"
    path.write_text(json.dumps(table))
    (lines,) = report.lines_of([path, path]).values()  # what stands in two tables counts once
    found = {
        label: {name: [figures[report.RIGHT][0] for figures in seeds.values()] for (_, name), seeds in points.items()}
        for (label, _), points in lines.items()
    }
    assert found == {
        "base, guidance": {"cfg 1": [0.4], "cfg 2": [0.6]},
        "base, best of N": {"best of 4": [0.8], "": [0.4]},
        "AR-GRPO": {"20 steps": [0.7, 0.9], "": [0.4]},
        "AR-GRPO, cfg 2": {"90 steps": [0.95], "": [0.6]},
    }
    seeds = lines["AR-GRPO", 1.0][20, "20 steps"].values()
    assert report.seeds_mean(seeds, report.RIGHT) == pytest.approx((0.8, math.sqrt((0.02 + 0.01**2) / 2)))
    report.main([str(path), "--out", str(tmp_path / "frontier.png")])
    assert Image.open(tmp_path / "frontier.png").width > 1000
    (tmp_path / "few.json").write_text(path.read_text().replace('"num": 64', '"num": 2'))
    with pytest.raises(SystemExit, match="give all the same --num"):
        report.main([str(path), str(tmp_path / "few.json")])


MOVE = """
  const page = frame.contentDocument, found = [];
  const move = (slider, value) => { slider.value = value; slider.oninput() };
  const look = () => page.querySelectorAll('.model').forEach((one) => found.push(
    [...one.querySelectorAll('.words button')].filter((cell) => cell.textContent != '.').length,
    one.querySelector('.now').textContent == one.querySelector('.likely .drawn')?.textContent,
    getComputedStyle(one.querySelector('.frame')).backgroundPosition));
  for (const value of [0, 99]) { move(page.querySelector('#slides input'), value);
    found.push(page.querySelector('#slides b').textContent, page.querySelectorAll('.slide:not([hidden])').length) }
  move(page.querySelector('#writer input'), 64); look();
  page.querySelectorAll('.words button')[9].onclick(); look();
  document.title = JSON.stringify([found, page.documentElement.scrollWidth,
    frame.contentWindow.matchMedia('(prefers-color-scheme: dark)').matches]);
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium, to move the page's controls")
def test_the_controls_of_the_page_move_in_a_browser(tiny_run, tmp_path, thin_toys):
    """Catches: a slider that shows the same picture at every moment looks like a policy that never changed."""
    _, run, _ = tiny_run("c2i")
    text = html.escape((run / "report.html").read_text())
    for width, dark in ((1280, False), (400, True)):  # in a frame: no window is narrower than 500 px
        frame = f'<iframe id="frame" width="{width}" height="900" srcdoc="{text}"></iframe>'
        (tmp_path / "moved.html").write_text(f"{frame}<script>frame.onload = () => {{ {MOVE} }}</script>")
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,900", "--dump-dom"]
        command += ["--virtual-time-budget=5000", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
        done = subprocess.run([*command, f"file://{tmp_path}/moved.html"], capture_output=True, text=True, timeout=120)
        found, wide, is_dark = json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))
        assert found[:4] == ["before", 1, "after", 1] and wide <= width and is_dark == dark
        (ends, clicked) = found[4:10], found[10:]
        # all 64 tokens, then ten; a code that was drawn is mostly, but not always, among the five likeliest
        assert ends[::3] == [64, 64] and clicked[::3] == [10, 10] and any(found[5::3]) and ends[2] != clicked[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llamagen-b-256", "llamagen-t2i-xl-256"])
def test_the_official_path_end_to_end(name, tmp_path, monkeypatch, capsys):
    """Catches: ImageNet's names, T5, the authors' guidance, official files, bfloat16: what the toys do not pass."""
    monkeypatch.chdir(tmp_path)
    # fewer layers and tokens; .ci/run does the same with all of GPT-B
    config = replace(MODELS[name].config, n_layer=1, n_head=2, dim=64, grid_size=4, caption_dim=64)
    files = dict(ckpt=tmp_path / "gpt.pt", vq_ckpt=tmp_path / "vq.pt", text_encoder=HERE / "weights/toy-t5")
    row = replace(MODELS[name], config=config, vq_config=replace(zoo.VQ_16, ch=32), **files)
    monkeypatch.setitem(MODELS, name, row)
    torch.manual_seed(0)
    torch.save({"model": Transformer(config).state_dict() | {"freqs_cis": torch.zeros(17, 16, 2)}}, "gpt.pt")
    vq = VQModel(row.vq_config).state_dict() | {"quantize.codebook_used": torch.zeros(65536)}
    torch.save({"model": vq}, "vq.pt")
    what, pads, cfg = ["--classes", "goldfish"], [], 2
    if config.task == "t2i":
        what, pads, cfg = ["--prompts", "a photo of a cat"], ["--text-pad", "right"], 4
    few = ["--prompts-per-step", "1", "--group-size", "2", "--dtype", "bfloat16", "--steps", "1", *what]
    train.main(["--model", name, *few, *pads, "--rewards", "pyiqa:piqe", "--out", "run"])
    (first,) = read_metrics(tmp_path / "run")
    assert first["kl"] == 0 and first["ratio"] == pytest.approx(1, abs=1e-4) and "right" not in first
    assert first["sampler_gap"] < 0.02  # rounding alone
    assert first["pyiqa:piqe_mean"] < 0  # it counts distortions, 0 to 100, and more must be better
    header = zoo.find_policy("run")[2]
    assert header["step"] == 1 and header["text_pad"] == ("right" if pads else "left") and header["cfg_scale"] == cfg
    sample.main(["--ckpt", "run", "--compare", *what, "--num", "2", "--npz", "new/a.npz"])
    said = capsys.readouterr().out
    assert f"cfg {cfg}" in said and "4 pictures" in said  # a policy is drawn from as it was trained
    found = np.load("new/a.npz")
    assert found["arr_0"].shape == (2, 64, 64, 3) and len(found["prompts" if pads else "labels"]) == 2
    evaluate.main(["--ckpt", "run", *what, "--num", "2", "--rewards", "pyiqa:entropy"])
    columns = json.loads(Path("run/evaluation.json").read_text())["columns"]
    assert set(columns) == {f"{policy}, cfg {scale}" for policy in ("base", "tuned") for scale in (1, cfg)}
    assert all(set(figures) == {"reward: pyiqa:entropy", "entropy"} for figures in columns.values())
    # the paper's settings: learned without the guidance that it samples with, so another policy is learned
    told, preset = [], ["--preset", f"paper-{config.task}", "--model", name, "--rewards", "listener", "--out", "paper"]
    listener = lambda images, prompts: told.extend(prompts) or images.mean((1, 2, 3))  # noqa: E731
    monkeypatch.setitem(rewards.JUDGES, "listener", lambda device, options: listener)
    monkeypatch.setattr(sample, "finish_run", lambda *_: None)
    train.main([*preset, *few])
    assert set(told) == {"a photo of a cat" if pads else "a photo of goldfish, Carassius auratus"}  # WordNet's
    (paper,) = read_metrics(tmp_path / "paper")
    assert paper["lr"] == 1e-5 and paper["kl"] == 0 and paper["sampler_gap"] > 2 * first["sampler_gap"]


def test_the_readme_holds(tmp_path, monkeypatch):
    """Catches: commands that no longer parse and links to the wrong line are what makes people stop reading."""
    monkeypatch.chdir(tmp_path)  # some commands make their folder while they are parsed
    readme = (HERE / "README.md").read_text()
    links = re.findall(r"\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)", readme)
    assert len(links) > 5
    for name, path, line in links:
        assert name in (HERE / path).read_text().splitlines()[int(line) - 1], f"{name} is not at {path}:{line}"
    (loop,) = re.findall(r"```python\nfor step in range\(steps\):\n(.*?)```", readme, re.DOTALL)
    assert textwrap.indent(loop, "    ") in (HERE / "minimal.py").read_text() and loop.count("\n") > 35
    commands = re.findall(r"^python (\w+)\.py *(.*?) *(?:#.*)?$", readme, re.MULTILINE)
    assert {"train", "sample", "evaluate", "pretrain", "report"} <= {script for script, _ in commands}
    exercises = re.findall(r"^\d\. `(--.*?)`", readme, re.MULTILINE)
    assert len(exercises) == 5
    commands += [("train", flags) for flags in exercises]
    for script, flags in commands:
        if script in ("train", "sample", "evaluate") and "--ckpt" not in flags:
            try:
                {"train": train, "sample": sample, "evaluate": evaluate}[script].parse_args(shlex.split(flags))
            except Mistake as error:  # all that is missing is a download
                assert "huggingface.co/" in str(error), flags


def test_the_readmes_snippets_write_what_scorers_read(tmp_path, monkeypatch):
    """Catches: a line of GenEval's in another folder, or DPG's four pictures in another order: others are scored."""
    monkeypatch.chdir(tmp_path)
    geneval, dpg = re.findall(r"```python\n# .*?(from pathlib.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 2, 2, 3), np.uint8)
    np.savez("geneval.npz", arr_0=pixels)
    np.savez("dpg.npz", arr_0=pixels)
    Path("evaluation_metadata.jsonl").write_text("first\nsecond\n")
    Path("dpg_bench/prompts").mkdir(parents=True)
    for name in "ab":
        Path(f"dpg_bench/prompts/{name}.txt").touch()
    exec(geneval, {})
    exec(dpg, {})
    for n, line in enumerate(("first", "second")):
        assert Path(f"geneval/{n:05d}/metadata.jsonl").read_text() == line
        four = [np.asarray(Image.open(f"geneval/{n:05d}/samples/{k:04d}.png")) for k in range(4)]
        assert np.array_equal(four, pixels[4 * n : 4 * n + 4])
    a, b, c, d = pixels[4:]
    assert np.array_equal(np.asarray(Image.open("dpg/b.png")), np.block([[[a], [b]], [[c], [d]]]))


OURS = sorted(path.stem for path in HERE.glob("*.py"))


def test_each_file_imports_only_from_the_floors_below_it():
    """Catches: a room that everything imports, or a circle: then no file can be read alone."""
    floors, ground = {}, {"data", "model", "tokenizer", "parallel"}
    for name in OURS:
        found = re.findall(r"^(?:from|import) (\w+)", (HERE / f"{name}.py").read_text(), re.MULTILINE)
        floors[name] = set(found) & set(OURS)
    assert not any(floors[name] for name in ground | {"metrics"}) and floors["grpo"] == {"model"}
    assert floors["zoo"] <= ground and floors["rewards"] | floors["runs"] <= ground | {"zoo"}
    assert floors["prompts"] <= {"zoo", "data", "parallel"}
    assert {"model", "sample", "grpo", "rewards"}.isdisjoint(floors["report"])  # it paints arrays
    scripts = {"train", "evaluate", "minimal"}
    assert all(scripts.isdisjoint(floors[name]) for name in {*OURS} - {"test_grpo", "pretrain"})
