"""
The invariants, one per test. Each names the bug that it keeps out. No network, no mocks, tiny seeded models.

    pytest -q test_grpo.py
"""

import ast
import base64
import contextlib
import copy
import hashlib
import html
import http.server
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import data
import evaluate
import grpo
import metrics
import parallel
import pretrain
import report
import rewards
import sample
import train
import zoo
from data import Mistake
from grpo import decoupled_advantages, group_advantages, grpo_loss, sample_groups, sampler_gap, token_logprobs
from model import ModelConfig, Transformer, adapters, image_noise, keep_likeliest, merged, sample_row
from tokenizer import VQConfig, VQModel, to_uint8, to_unit
from zoo import MODELS, load_encoder, load_model, load_tokenizer

HERE = Path(__file__).parent
torch.set_num_threads(1)  # on a busy machine two threads, which wait for each other, take ten times as long
C2I = ModelConfig("c2i", n_layer=2, n_head=2, dim=32, vocab_size=24, grid_size=3, num_classes=5)
T2I = ModelConfig("t2i", n_layer=2, n_head=2, dim=32, vocab_size=24, grid_size=3, caption_dim=16, cond_len=6)
BOTH = pytest.mark.parametrize("config", [C2I, T2I], ids=["c2i", "t2i"])
NAN, INF = math.nan, math.inf
QUICK_DTYPE = zoo.quick_dtype


@pytest.fixture(autouse=True)
def no_network_no_gpu(monkeypatch):
    """The same on every machine: what is not in a folder here is not to be had, and scripts run in float32 on the CPU."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(zoo, "quick_dtype", lambda *_: "float32")
    monkeypatch.setattr(zoo, "die_of", lambda number, sentence: sys.exit(sentence))  # not of pytest's process


@pytest.fixture(scope="session")
def first_layers(tmp_path_factory):
    """{toy: a file of its weights less all layers but the first}."""
    files = {name: tmp_path_factory.mktemp("thin") / f"{name}.safetensors" for name in ("toy-c2i", "toy-t2i")}
    for name, file in files.items():
        weights = load_file(MODELS[name].ckpt)
        save_file({key: w for key, w in weights.items() if not re.match(r"layers\.[1-9]", key)}, file)
    return files


@pytest.fixture
def thin_toys(first_layers, monkeypatch):
    """The toys with one layer, for tests of what is done with them: a run then takes a third of its time."""
    for name, file in first_layers.items():
        row = MODELS[name]
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
    if config.task == "c2i":
        return torch.arange(n) % config.num_classes, None
    mask = torch.arange(config.cond_len)[None] >= torch.tensor([0, 2, 4, 5] * n)[:n, None]  # left-padded
    return torch.randn(n, config.cond_len, config.caption_dim, generator=seeded(0)) * mask[..., None], mask


# the transformer -----------------------------------------------------------------------------------------------------


def naive_logits(model, cond, tokens, cond_mask, null=False):
    """The transformer of one sequence, in float64 and with loops: logits (T, V)."""
    config, w = model.config, {name: value.detach().double() for name, value in model.state_dict().items()}
    D, grid, P = config.dim // config.n_head, config.grid_size, config.cond_len

    def norm(x, weight):
        return torch.stack([row / math.sqrt(sum(v * v for v in row.tolist()) / len(row) + 1e-5) for row in x]) * weight

    def turn(vector, position):  # pairs (2i, 2i + 1) of one head: the first half by the row, the second by the column
        turned, (row, column) = torch.zeros_like(vector), divmod(position - P, grid)
        for i in range(D // 2 if position >= P else 0):
            angle = (row if i < D // 4 else column) / 10000 ** (2 * (i % (D // 4)) / (D // 2))
            a, b = vector[2 * i], vector[2 * i + 1]
            turned[2 * i] = a * math.cos(angle) - b * math.sin(angle)
            turned[2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
        return turned

    if config.task == "c2i":
        text = w["cls_embedding.embedding_table.weight"][config.num_classes if null else cond][None]
    else:
        features = w["cls_embedding.uncond_embedding"] if null else cond.double()
        h = features @ w["cls_embedding.cap_proj.fc1.weight"].T
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        text = h @ w["cls_embedding.cap_proj.fc2.weight"].T
    x = torch.cat([text, w["tok_embeddings.weight"][tokens[:-1]]])  # (L - 1, C)
    for n in range(config.n_layer):
        layer = {name.removeprefix(f"layers.{n}."): value for name, value in w.items()}
        q, k, v = (norm(x, layer["attention_norm.weight"]) @ layer["attention.wqkv.weight"].T).split(config.dim, 1)
        out = torch.zeros_like(x)
        for head, i in itertools.product(range(config.n_head), range(len(x))):
            part = slice(head * D, (head + 1) * D)
            seen = [j for j in range(i + 1) if j == i or j >= P or cond_mask is None or cond_mask[j]]
            mass = [math.exp(turn(q[i, part], i) @ turn(k[j, part], j) / math.sqrt(D)) for j in seen]
            out[i, part] = sum(m / sum(mass) * v[j, part] for j, m in zip(seen, mass, strict=True))
        x = x + out @ layer["attention.wo.weight"].T
        h = norm(x, layer["ffn_norm.weight"])
        a, b = h @ layer["feed_forward.w1.weight"].T, h @ layer["feed_forward.w3.weight"].T
        x = x + (a / (1 + torch.exp(-a)) * b) @ layer["feed_forward.w2.weight"].T
    return norm(x[P - 1 :], w["norm.weight"]) @ w["output.weight"].T


@BOTH
def test_the_forward_pass_is_the_one_written_out_in_loops(config):
    """RoPE with rows and columns swapped, a mask off by one, or another eps: pictures stay plausible, weights differ."""
    model, (cond, mask), tokens = tiny(config), tiny_cond(config), torch.randint(24, (4, 9), generator=seeded(1))
    model.norm.weight.data.uniform_(0.5, 2)
    if mask is not None:
        mask[3] = mask[3].flip(0)  # padded on the right, so that token 0 is predicted from padding, which sees itself
    with torch.no_grad():
        ours, without = (model(c, tokens, mask) for c in (cond, model.cls_embedding.null(cond)))
    for i, null in itertools.product((1, 3), (False, True)):
        naive = naive_logits(model, cond[i], tokens[i], None if mask is None else mask[i], null)
        assert torch.allclose((without if null else ours)[i].double(), naive, atol=2e-5)


@BOTH
def test_no_token_sees_itself_or_what_comes_after_it(config):
    """A causal mask or a shift that is off by one: the model reads the answer, and every log-probability is too good."""
    model, (cond, mask), tokens = tiny(config), tiny_cond(config, 2), torch.randint(23, (2, 9))
    for t in range(9):
        changed = tokens + (torch.arange(9) == t)
        differs = (model(cond, changed, mask) - model(cond, tokens, mask)).abs().amax((0, 2)) > 1e-6
        assert not differs[: t + 1].any() and (t == 8 or differs[t + 1])


@pytest.mark.parametrize("cfg_scale, temperature, top_k", [(1.0, 1.0, 0), (1.0, 0.6, 0), (2.0, 1.5, 0), (1.0, 1.0, 3)])
def test_tokens_are_drawn_as_often_as_the_policy_says(cfg_scale, temperature, top_k):
    """A sampler that is off by one token or draws from another temperature: ratio and KL would not tell."""
    model, n = tiny(C2I), 20_000
    with torch.no_grad():  # class 2, and no class
        cond, without = model(torch.tensor([2, 5]), torch.zeros(2, 9, dtype=torch.long))[:, 0].double()  # (V,) each
    p = ((without + cfg_scale * (cond - without)) / temperature).softmax(-1)
    p = torch.where(p >= p.sort().values[-(top_k or 24)], p, 0) / p.sort().values[-(top_k or 24) :].sum()
    model.config = replace(C2I, grid_size=1)  # only the first token
    options = dict(cfg_scale=cfg_scale, temperature=temperature, top_k=top_k)
    tokens, logprobs = model.generate(torch.full((n,), 2), noise=image_noise(range(n), 1, 0), **options)
    assert torch.allclose(logprobs[:, 0].double().exp(), p[tokens[:, 0]], atol=1e-5)
    seen = torch.bincount(tokens[:, 0], minlength=24).double()
    assert not seen[p == 0].any()
    assert ((seen - n * p) ** 2 / (n * p)).nan_to_num(0).sum() < 60  # chi-square, 23 degrees: one seed in 30,000


def test_a_token_without_probability_is_never_drawn():
    """Inverting the distribution function at its ends falls on the first or last token, whatever its probability."""
    logp = torch.tensor([-INF, math.log(0.25), -INF, math.log(0.75), -INF])
    for draw, token in ((0.0, 1), (1 - 2**-24, 3)):  # the least and the greatest; 1e-6: masses that do not sum to 1
        assert sample_row(logp[None] - 1e-6, torch.tensor([draw])).item() == token


@BOTH
def test_an_image_is_the_same_in_any_company(config):
    """Noise by place in a batch: another micro-batch, number of processes or group draws other images from one seed."""
    model, (cond, mask) = tiny(config), tiny_cond(config)
    noise = image_noise(range(12), 9, 7, 3)
    _, _, tokens, logprobs = sample_groups(model, cond, mask, 3, noise, cfg_scale=2.0, temperature=0.7)
    for k in range(12):
        one = slice(k // 3, k // 3 + 1)
        options = dict(noise=image_noise([k], 9, 7, 3), cfg_scale=2.0, temperature=0.7)
        alone, its_logprobs = model.generate(cond[one], None if mask is None else mask[one], **options)
        assert torch.equal(alone[0], tokens[k]) and torch.allclose(its_logprobs[0], logprobs[k], atol=1e-5)
    assert len(noise.unique()) == noise.numel() and not torch.isin(noise, image_noise(range(12), 9, 7, 4)).any()


@pytest.mark.parametrize("top_k, top_p", [(1, 1.0), (3, 1.0), (99, 1.0), (0, 0.3), (0, 0.9), (4, 0.8), (0, 1e-9)])
def test_filtering_keeps_the_likeliest_and_renormalises(top_k, top_p):
    """k - 1 tokens in place of k, or a nucleus that leaves out the token which crosses p: samples grow dull, no error."""
    logp = torch.randn(16, 7, generator=seeded(0)).mul(2).log_softmax(-1)
    for row, found in zip(logp.exp().tolist(), keep_likeliest(logp, top_k, top_p).exp(), strict=True):
        order = sorted(range(7), key=lambda v: -row[v])[: top_k or 7]
        mass, nucleus = sum(row[v] for v in order), []
        while order and (top_p == 1 or not nucleus or sum(row[v] for v in nucleus) <= top_p * mass):
            nucleus.append(order.pop(0))
        total = sum(row[v] for v in nucleus)
        assert found.tolist() == pytest.approx([row[v] / total if v in nucleus else 0 for v in range(7)], abs=1e-6)


@pytest.mark.parametrize("name", ["GPT-B 111", "GPT-L 343", "GPT-XL 775", "GPT-XXL 1411", "GPT-3B 3100", "VQ-16 71.9"])
def test_sizes_have_the_published_parameter_counts(name):
    """A wrong hidden width or level would only surface when a user's download fails to load."""
    size, millions = name.split()
    with torch.device("meta"):
        model = VQModel(zoo.VQ_16) if size == "VQ-16" else Transformer(ModelConfig("c2i", *zoo.SIZES[size]))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(float(millions), rel=0.01)


def test_bfloat16_rounds_the_layers_and_neither_weights_nor_logits():
    """A softmax over bfloat16 logits gives log-probabilities with two digits: the ratio would be noise."""
    model, (cond, mask) = tiny(T2I), tiny_cond(T2I)
    exact = model(cond, torch.ones(4, 9, dtype=torch.long), mask)
    with zoo.autocast("cpu", "bfloat16"):  # text must not be rounded in one of sampler and scorer only
        rounded = model(cond, torch.ones(4, 9, dtype=torch.long), mask)
        tokens, old = model.generate(cond, mask)
        new, _ = token_logprobs(model, cond, tokens, mask)
    assert (new - old).abs().mean() < 0.02
    assert 1e-5 < (rounded - exact).abs().max() < 0.2 and model.output.weight.dtype == torch.float32
    assert (rounded.bfloat16().float() != rounded).float().mean() > 0.9  # the head itself was not rounded


def test_bfloat16_is_the_default_where_it_is_quick_and_costs_two_digits(monkeypatch):
    """A processor that only imitates it, a toy that changes its tokens, a log-probability that is off by a tenth."""
    monkeypatch.setattr(zoo, "quick_dtype", QUICK_DTYPE)
    ours = lambda *flags: train.parse_args([*flags, "--out", "none"]).dtype  # noqa: E731
    for able, expected in ((dict(avx512_bf16=True), "bfloat16"), (dict(amx_bf16=True), "bfloat16"), ({}, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able, raising=False)
        assert ours("--model", "llamagen-b-256") == sample.parse_args(["--model", "llamagen-b-256"]).dtype == expected
        assert ours() == ours("--model", "llamagen-b-256", "--dtype", "float32") == "float32"
    model, found = load_model("toy-c2i").requires_grad_(False), {}
    cond, _, tokens, _ = sample_groups(model, torch.arange(4), None, 2, image_noise(range(8), 64, 0), cfg_scale=2)
    for dtype in ("float32", "bfloat16"):
        with zoo.autocast("cpu", dtype):
            found[dtype], _ = token_logprobs(model, cond, tokens, cfg_scale=2)
    assert (found["bfloat16"] - found["float32"]).abs().mean() < 0.02 * found["float32"].abs().mean()


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
    """(vectors, the network of the official configuration, with filled weights under the official names and no others)"""
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
    """Names, shapes, RoPE, norms, masks, guidance: what differs here draws other pictures from official weights."""
    found, model = official(name)
    cond, tokens, mask = found["cond"], found["tokens"].long(), found.get("mask")
    logprobs = model(cond, tokens, mask).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert (logprobs - found["logprobs"]).abs().max() < 1e-4
    greedy = {key: value.long() for key, value in found.items() if key.startswith("greedy")}  # greedy_cfg2.0_int5
    assert len(greedy) >= 2
    for key, expected in greedy.items():
        scale, interval = (float(part) for part in key.removeprefix("greedy_cfg").split("_int"))
        ours, _ = model.generate(cond, mask, cfg_scale=scale, cfg_interval=interval, temperature=0)
        assert torch.equal(ours, expected), key


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
@BOTH
def test_compiled_sampling_draws_the_same_tokens(config, tmp_path):
    """Lengths of the cache that are rounded up: keys that are not written yet must not be seen."""
    # in a child, because processes that fork after torch.compile was used do not hear signals
    assert in_child(partial(sample_compiled, config), tmp_path / "said") == 0, (tmp_path / "said").read_text()


def sample_compiled(config):
    model, (cond, mask) = tiny(config), tiny_cond(config, 2)
    noise, drawn = image_noise(range(4), 9, 0), []
    for model.compile_steps in (False, True):
        for options in (dict(temperature=0, cfg_interval=3), dict(noise=noise)):
            drawn.append(model.generate(cond, mask, group_size=2, cfg_scale=2.5, **options))
    for (tokens, logprobs), (compiled, theirs) in zip(drawn[:2], drawn[2:], strict=True):
        assert torch.equal(tokens, compiled) and (logprobs - theirs).abs().max() < 1e-4


def test_the_tokenizer_agrees_with_the_official_code():
    """A padding on the wrong side or a codebook that is not normalised: pictures only look a little soft."""
    found, model = official("vq")
    assert torch.equal(model.encode(found["image"]), found["encoded"].long())
    assert (model.decode(found["codes"].long()) - found["decoded"]).abs().max() < 1e-3


@BOTH
@pytest.mark.parametrize(
    "cfg_scale, temperature, dtype", [(1.0, 1.0, "float32"), (2.5, 0.7, "float32"), (2.0, 1.0, "bfloat16")]
)
def test_scoring_in_parts_is_scoring_at_once(config, cfg_scale, temperature, dtype, monkeypatch):
    """Values and gradients: a part that is scored with another's tokens, or a block whose second run differs from its first."""
    (cond, mask), tokens, found = tiny_cond(config), torch.randint(24, (4, 9), generator=seeded(1)), []
    for chunk, layers in ((2**24, False), (4 * 24 * 2, False), (1, True)):  # all positions, two, one
        monkeypatch.setattr(grpo, "CHUNK", chunk)
        model = tiny(config)
        model.checkpoint_layers = layers
        with zoo.autocast("cpu", dtype):
            logprobs, entropy = token_logprobs(model, cond, tokens, mask, cfg_scale, temperature)
        (logprobs * torch.arange(9)).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((logprobs.detach(), entropy, gradient / gradient.abs().max()))
        assert not entropy.requires_grad
    with torch.no_grad(), zoo.autocast("cpu", dtype):  # LlamaGen's own order: the head, then guidance
        logits, without = (model(c, tokens, mask) for c in (cond, model.cls_embedding.null(cond)))
        plain = ((without + cfg_scale * (logits - without)) / temperature).log_softmax(-1)
    assert torch.allclose(plain.gather(-1, tokens[..., None])[..., 0], found[0][0], atol=1e-5)
    assert torch.allclose(-(plain.exp() * plain).sum(-1), found[0][1], atol=1e-5)
    for others in found[1:]:
        assert all(
            torch.allclose(a, b, atol=1e-5 if dtype == "float32" else 2e-2)
            for a, b in zip(found[0], others, strict=True)
        )


# GRPO: the equations -------------------------------------------------------------------------------------------------


class Called(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops = [*getattr(self, "ops", ()), str(op)]
        return op(*args, **kwargs or {})


@BOTH
def test_checkpointed_blocks_compute_the_feed_forward_anew_and_nothing_else_that_is_dear(config):
    """Kernels of another name in the next torch: all would be kept, or all made again, and nobody would notice."""
    (cond, mask), tokens, counts = tiny_cond(config), torch.randint(24, (4, 9), generator=seeded(1)), []
    for layers in (False, True):
        model = tiny(config)
        model.checkpoint_layers = layers
        hidden = model.hidden(cond, tokens, mask).sum()
        with Called() as backward:
            hidden.backward()
        counts.append((backward.ops.count("aten.mm.default"), sum("attention" in op for op in backward.ops)))
    (products, attention), again = counts
    assert again == (products + 2 * config.n_layer, attention) and attention > 0  # w1 and w3


@BOTH
@pytest.mark.parametrize("cfg_scale, temperature", [(1.0, 1.0), (2.0, 1.0), (3.0, 0.7)])
def test_sampler_and_scorer_are_one_policy(config, cfg_scale, temperature):
    """
    The official release samples with guidance and scores without: its ratio says 1 while the two differ by 0.86. And a
    cache that is off by one position still draws plausible pictures; only the full pass shows it.
    """
    model, (cond, mask), how = tiny(config), tiny_cond(config, 2), dict(cfg_scale=cfg_scale, temperature=temperature)
    many, many_mask, tokens, old = sample_groups(model, cond, mask, 3, image_noise(range(6), 9, 0), **how)
    assert torch.equal(many, torch.stack([cond[0]] * 3 + [cond[1]] * 3))  # prompt-major: groups are reshapes
    assert mask is None or torch.equal(many_mask, torch.stack([mask[0]] * 3 + [mask[1]] * 3))
    new, entropy = token_logprobs(model, many, tokens, many_mask, **how)
    assert tokens.shape == old.shape == new.shape == entropy.shape == (6, 9)
    assert ((new - old).exp() - 1).abs().max() < 1e-4 and new.requires_grad and not entropy.requires_grad
    scored, _ = grpo.score_tokens(model, many, tokens, many_mask, 4, **how)  # 4 and 2 images
    assert torch.allclose(scored, new, atol=1e-5) and not scored.requires_grad
    unguided, _ = token_logprobs(model, many, tokens, many_mask, 1.0, temperature)
    assert cfg_scale == 1 or ((unguided - old).exp() - 1).abs().mean() > 0.05


@pytest.mark.parametrize("cfg_scale, temperature", [(1.0, 1.0), (1.0, 0.5), (3.0, 1.0), (2.0, 1.7)])
def test_logprobs_and_entropy_are_those_of_the_mixed_softmax(cfg_scale, temperature):
    """Halves exchanged, logits times temperature, the token beside: all still give a distribution that sums to 1."""
    model, (cond, _) = tiny(C2I), tiny_cond(C2I, 2)
    tokens = torch.randint(24, (2, 9), generator=seeded(0))
    with torch.no_grad():
        logprobs, entropy = token_logprobs(model, cond, tokens, None, cfg_scale, temperature)
        found, without = model(cond, tokens).double(), model(torch.full_like(cond, 5), tokens).double()
    for i, t in itertools.product(range(2), range(9)):
        pairs = zip(found[i, t].tolist(), without[i, t].tolist(), strict=True)
        mass = [math.exp((cfg_scale * a + (1 - cfg_scale) * b) / temperature) for a, b in pairs]
        p = [m / sum(mass) for m in mass]
        assert logprobs[i, t].item() == pytest.approx(math.log(p[tokens[i, t]]), abs=1e-4)
        assert entropy[i, t].item() == pytest.approx(-sum(q * math.log(q) for q in p), abs=1e-4)


def normalised(values):
    """(r - mean) / (std + 1e-4) of a list, over its finite entries; the others, and a lone one, get 0."""
    finite = [v for v in values if math.isfinite(v)]
    if len(finite) < 2:
        return [0.0] * len(values)
    mean, std = statistics.fmean(finite), statistics.stdev(finite)  # stdev: n - 1
    return [(v - mean) / (std + 1e-4) if math.isfinite(v) else 0.0 for v in values]


MISSING = torch.tensor([3.0, 1, -2, 5] + [NAN, 1, INF, 2] + [NAN, NAN, -INF, 7] + [NAN] * 4 + [1e-4, 2e-4, 0, 1e-4])


@pytest.mark.parametrize("judged", [torch.randn(20, generator=seeded(0)) * 3 + 7, MISSING], ids=["all", "missing"])
def test_advantages_compare_inside_the_group(judged):
    """One group of all N, or a biased std, learns as well at first; an eps of 1e-8 blows nearly equal rewards up."""
    expected = [a for k in range(0, 20, 4) for a in normalised(judged[k : k + 4].tolist())]
    assert group_advantages(judged, 4).tolist() == pytest.approx(expected, abs=1e-4, rel=1e-4)
    groups = judged.view(-1, 4)
    groups = groups.masked_fill(groups.isinf(), NAN)
    centred = (groups - groups.nanmean(1, keepdim=True)).nan_to_num().view(-1)
    assert torch.allclose(group_advantages(judged, 4, divide=False), centred, atol=1e-5)
    many = torch.randn(400, generator=seeded(0)).masked_fill(torch.rand(400, generator=seeded(1)) < 0.3, NAN)
    assert not group_advantages(many, 4)[many.isnan()].any()  # exactly 0, too
    for value in (0.1, 1 / 3, 1e6, -7.7):  # equal: the rounding of a mean, divided by 1e-4, would be a push at random
        assert not group_advantages(torch.full((24,), value), 8).any()
        assert not decoupled_advantages({"a": torch.full((24,), value)}, {"a": 1.0}, 8).any()


@pytest.mark.parametrize("other", [torch.randn(20, generator=seeded(1)), MISSING], ids=["all", "missing"])
def test_decoupled_advantages_normalise_each_judge_then_the_batch(other):
    """A missing score that is filled in first shrinks its group's spread; weights after normalising would be lost."""
    judged, weights = {"a": torch.randn(20, generator=seeded(0)) * 100, "b": other}, {"a": 1.0, "b": 0.25}
    total = [0.0] * 20
    for name, values in judged.items():
        found = [a for k in range(0, 20, 4) for a in normalised(values[k : k + 4].tolist())]
        total = [t + weights[name] * a for t, a in zip(total, found, strict=True)]
    assert decoupled_advantages(judged, weights, 4).tolist() == pytest.approx(normalised(total), abs=1e-4, rel=1e-4)


def test_missing_judgements_count_as_their_groups_mean():
    """Set to 0, an unreadable image would win its group under a metric that is never positive."""
    judgement = torch.tensor([-3.0, NAN, -1, -2, INF, NAN, NAN, NAN])
    assert rewards.fill_missing(judgement, 4).tolist() == [-3, -2, -1, -2, 0, 0, 0, 0]
    judged = {"a": judgement, "b": torch.arange(8.0)}
    found = rewards.weighted_sum(judged, {"a": 2.0, "b": 0.5}, 4)
    assert found.tolist() == [-6, -3.5, -1, -2.5, 2, 2.5, 3, 3.5]


def test_the_loss_is_the_equation_token_by_token():
    """min turned into max, a clip on one side only, a mean of means: every one of them trains, and worse."""
    logprobs, A = -torch.rand(5, 7, generator=seeded(0)) * 3, torch.tensor([1.3, 0, -0.4, -2, -0.6])
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


def test_the_kls_value_and_gradient_are_those_that_its_comment_names():
    """Turned round, k3 is still positive and still 0 at the start, but holds the policy where the reference is not."""
    theta = torch.randn(6, generator=seeded(0)).double().requires_grad_()
    ref = torch.randn(6, generator=seeded(1)).double().log_softmax(0)
    logp = theta.log_softmax(0)
    p = logp.detach().exp()
    # the expectation over what pi draws, exactly: every token of the vocabulary, weighted with its probability
    each = [(logp[v].view(1, 1), ref[v].view(1, 1)) for v in range(6)]
    parts = [grpo_loss(a, a.detach(), b, torch.zeros(1).double(), kl_coef=1.0) for a, b in each]
    value = sum(p[v] * parts[v][1]["kl"] for v in range(6))
    assert value.item() == pytest.approx((p * (logp - ref)).sum().item())  # KL(pi || ref)
    sum(p[v] * parts[v][0] for v in range(6)).backward()
    assert torch.allclose(theta.grad, p - ref.exp())  # the gradient of KL(ref || pi)


def test_a_small_kl_keeps_its_digits():
    """e^d - 1 - d of a small d is all rounding: a KL that is negative now and then, and a first step of noise."""
    logprobs = torch.randn(64, 9, generator=seeded(0)) * 3
    near = logprobs + torch.randn(64, 9, generator=seeded(1)) * 1e-4
    kl = grpo_loss(logprobs, logprobs, near, torch.zeros(64))[1]["kl"]
    assert kl == pytest.approx(float((near - logprobs).double().square().mean() / 2), rel=0.01)
    assert grpo_loss(logprobs, logprobs, logprobs, torch.zeros(64))[1]["kl"] == 0


# one step beyond the paper: --kl exact, --credit-coef ------------------------------------------------------------------


@pytest.mark.parametrize("cfg_scale, temperature", [(1.0, 1.0), (2.5, 0.7)])
def test_the_exact_kl_is_the_sum_over_the_vocabulary(cfg_scale, temperature, monkeypatch):
    """Turned round, or of a reference at another position, guidance or temperature: still positive, still 0 at first."""
    policy, ref_model, (cond, _) = tiny(C2I), tiny(C2I, 1), tiny_cond(C2I)
    tokens, logp = torch.randint(24, (4, 9), generator=seeded(0)), []
    for model in (policy, ref_model):
        logits, without = (model(c, tokens) for c in (cond, torch.full_like(cond, 5)))
        logp.append(((cfg_scale * logits + (1 - cfg_scale) * without) / temperature).log_softmax(-1))
    expected = sum(logp[0][..., v].exp() * (logp[0][..., v] - logp[1][..., v].detach()) for v in range(24))  # (4, 9)
    learned = [p for name, p in policy.named_parameters()]
    wanted = torch.autograd.grad(expected.mean(), learned)
    for chunk in (2**24, 4 * 24 * 2, 1):  # all positions, two, one
        monkeypatch.setattr(grpo, "CHUNK", chunk)
        how = dict(cfg_scale=cfg_scale, temperature=temperature)
        _, states = grpo.score_tokens(ref_model, cond, tokens, None, 3, **how)
        sums = [(partial(grpo.exact_kl, ref_model=ref_model, temperature=temperature), states)]
        logprobs, _, kl = token_logprobs(policy, cond, tokens, None, **how, sums=sums)
        assert torch.allclose(kl, expected, rtol=1e-4, atol=1e-5)
        loss, stats = grpo_loss(logprobs, logprobs.detach(), logprobs.detach(), torch.zeros(4), kl_coef=2.0, kl=kl)
        assert stats["kl"].item() == pytest.approx(expected.mean().item(), rel=1e-4)
        for found, one in zip(torch.autograd.grad(loss, learned), wanted, strict=True):
            assert torch.allclose(found, 2 * one, rtol=1e-3, atol=1e-5 * float(1 + one.abs().max()))


class CodesAsPictures:
    """A tokenizer whose pictures are its code vectors: (N, 9, 4) -> (N, 1, 9, 4)."""

    def __init__(self):
        book = torch.rand(24, 4, generator=seeded(3)) - 0.5
        self.quantize = SimpleNamespace(vectors=lambda: book, embedding=SimpleNamespace(weight=book))

    def from_codes(self, codes):
        return codes[:, None]

    def decode(self, tokens):
        return self.from_codes(self.quantize.vectors()[tokens])


def linear_judges():
    """Three values of one model, linear in the code vectors, and what no gradient passes: steps, and numpy."""
    slopes = dict(zip(("one", "two", "idle"), torch.randn(3, 9, 4, generator=seeded(4)), strict=True))
    both = lambda images, prompts: {name: (images * slope).sum((1, 2, 3)) for name, slope in slopes.items()}  # noqa: E731
    steps = lambda images, prompts: images.sum((1, 2, 3)).round()  # noqa: E731
    return dict(both=both, steps=steps, numpy=lambda images, prompts: images.numpy()[:, 0, 0, 0])


@pytest.mark.parametrize("norm", ["sum", "each", "mean"])
def test_credit_for_a_linear_judge_is_what_every_other_token_would_have_brought(norm, monkeypatch):
    """The std of another group, a weight that is lost, a judge that has no gradient, a value that is missing."""
    policy, (cond, _), tokenizer, judges = tiny(C2I), tiny_cond(C2I, 6), CodesAsPictures(), linear_judges()
    weights, tokens = (
        dict(one=1.0, two=-0.5, idle=0.0, steps=2.0, numpy=0.1),
        torch.randint(24, (6, 9), generator=seeded(0)),
    )
    judged, _ = rewards.judge_images(judges, to_unit(tokenizer.decode(tokens)), [""] * 6)
    judged["two"][4] = NAN
    reward = rewards.weighted_sum(judged, weights, 3)
    kept, names = rewards.with_gradient(judges, weights, tokenizer, 9, [""])
    assert list(kept) == ["both"] and names == ["one", "two"]
    total = sum(weights[name] * group_advantages(values, 3) for name, values in judged.items())
    p = (policy(cond, tokens) / 0.7).log_softmax(-1).exp()
    expected = torch.zeros(6, 9)
    for i, t, v in itertools.product(range(6), range(9), range(24)):
        group, other = slice(0, 3) if i < 3 else slice(3, 6), tokens[i].clone()
        other[t] = v
        was, would = (kept["both"](to_unit(tokenizer.decode(x[None])), None) for x in (tokens[i], other))
        for name in names:
            finite = [x for x in (judged[name] if norm == "each" else reward)[group].tolist() if math.isfinite(x)]
            spread = (statistics.stdev(finite) + 1e-4) * ((total.std() + 1e-4) if norm == "each" else 1)
            spread = 1 if norm == "mean" else spread
            if judged[name][i].isfinite():
                expected[i, t] += p[i, t, v].detach() * weights[name] * (would[name] - was[name])[0] / spread
    slopes = grpo.advantage_slopes(judged, weights, 3, None if norm == "each" else reward, norm != "mean")
    for chunk, micro_batch in ((2**24, 6), (1, 4), (6 * 24 * 2, 1)):
        monkeypatch.setattr(grpo, "CHUNK", chunk)
        of_names = {name: slopes[name] for name in names}
        gradient = rewards.code_gradient(kept, of_names, tokenizer, tokens, [""] * 6, micro_batch)
        sums = [(partial(grpo.token_credit, codebook=tokenizer.quantize.vectors()), gradient)]
        *_, credit = token_logprobs(policy, cond, tokens, None, temperature=0.7, sums=sums)
        assert torch.allclose(credit, expected, rtol=1e-3, atol=1e-4) and credit.requires_grad
    equal = {name: torch.ones(6) for name in weights}  # nothing is better than its group: no push of size 1 / 1e-4
    slopes = grpo.advantage_slopes(equal, weights, 3, None if norm == "each" else torch.ones(6), norm != "mean")
    assert not any(s.any() for s in slopes.values())


def test_credit_foresees_what_a_swapped_token_does():
    """A gradient by the token beside, or of the pictures before they are clamped, or of a judge of looks alone."""
    policy, tokenizer, weights = load_model("toy-c2i"), load_tokenizer("toy-c2i"), dict(clip=1.0, realism=0.25)
    judges, asked = rewards.load_judges(weights), list(range(0, 40, 3))
    captions = zoo.captions_of("toy-c2i", asked)
    cond, n = torch.tensor(asked), len(asked)
    tokens, _ = policy.generate(cond, None, noise=image_noise(range(n), 64, 0))
    gradient = rewards.code_gradient(
        judges, {k: torch.full((n,), w) for k, w in weights.items()}, tokenizer, tokens, captions, 5
    )
    with torch.no_grad():
        logp = policy(cond, tokens).log_softmax(-1)

        def reward(tokens):
            judged, _ = rewards.judge_images(judges, to_unit(tokenizer.decode(tokens)), captions)
            return sum(w * judged[name] for name, w in weights.items())

        before, foreseen, found = reward(tokens), [], []
        for t in range(3, 64, 10):
            swapped = tokens.clone()
            swapped[:, t] = sample_row(logp[:, t], image_noise(range(n), 1, 1, t)[:, 0])
            step = (tokenizer.quantize.vectors()[swapped] - tokenizer.quantize.vectors()[tokens])[:, t]
            foreseen.append((gradient[:, t] * step).sum(-1))
            found.append(reward(swapped) - before)
    foreseen, found = torch.cat(foreseen), torch.cat(found)
    moved = found.abs() > 1e-6  # the same token may be drawn again
    ranks = torch.stack([x[moved].argsort().argsort().double() for x in (foreseen, found)])
    assert moved.sum() > 50 and torch.corrcoef(ranks)[0, 1] > 0.7, torch.corrcoef(ranks)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_give_the_credit_that_one_gives(tmp_path):
    """The slopes of the first process's pictures for all, or the spread of this process's half of the batch."""
    flags = [
        "--steps",
        "2",
        "--prompts-per-step",
        "2",
        "--group-size",
        "3",
        "--micro-batch",
        "2",
        "--reward-norm",
        "each",
    ]
    flags += [
        "--kl",
        "exact",
        "--credit-coef",
        "1",
        "--rewards",
        "clip=1,clip-step=1,realism=0.25",
        *TWO["c2i"],
        "--out",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, processes in ((one, 1), (two, 2)):
        folder.mkdir()
        run = partial(go_on_without_a_page, [*flags, str(folder), *["--shard"] * (processes == 2)], folder)
        assert in_children(folder, *[run] * processes) == [0] * processes, (folder / "said-0").read_text()
    assert "credit per token from clip, realism; clip-step in the group's advantage" in (one / "said-0").read_text()
    assert_same_weights(*(load_file(folder / "policy.safetensors") for folder in (one, two)))
    for row, expected in zip(read_metrics(two), read_metrics(one), strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=2e-5) and row["credit"] > 0


# GRPO: the loop, next to the same algorithm written down once more ---------------------------------------------------


def worth_of_codes(tokenizer, tokens, judges, weights, captions):
    """(6, T, V): what each code in the place of each token would add to its picture's advantage, to first order."""
    book = tokenizer.quantize.vectors()
    codes = book[tokens].requires_grad_()
    pictures = (tokenizer.from_codes(codes) / 2 + 0.5).clamp(0, 1)
    found = sum(w * judge(pictures, captions) for w, judge in zip(weights, judges, strict=True)).view(2, 3)
    (slope,) = torch.autograd.grad((found / (found.std(1, keepdim=True).detach() + 1e-4)).sum(), codes)
    return slope @ book.T - (slope * codes).sum(-1, keepdim=True)


def kl_and_credit(logp, ref_logp, worth):
    """Of log-probabilities and worth (n, T, V): the sums over the vocabulary, (n, T) each."""
    return (logp.exp() * (logp - ref_logp)).sum(-1), (logp.exp() * worth).sum(-1)


PLAIN = dict(
    seed=0, cfg=1.0, score_cfg=1.0, heat=1.0, eps=0.2, updates=1, falls=True, each=False, divide=True, most=1.0
)
PLAIN |= dict(beyond=0.0, ref_cfg=0.0, weigh=False)


def asked_by_hand(task, seed, step):
    """Labels or captions of a step's six pictures, what the judges are told, and their uniform numbers (6, 64)."""
    rng = np.random.default_rng([seed, step])
    asked = rng.choice(40, 2, replace=False).tolist() if task == "c2i" else data.sample_captions(2, rng)
    asked = [entry for entry in asked for _ in range(3)]
    captions = [data.class_caption(data.TOY_CLASSES[k]) for k in asked] if task == "c2i" else asked
    noise = np.stack([np.random.default_rng([seed, step, k]).random(64, dtype=np.float32) for k in range(6)])
    return asked, captions, torch.from_numpy(noise)


def compared(values):
    """Advantages of six values: the first group's and the second's."""
    return torch.tensor(normalised(values[:3].tolist()) + normalised(values[3:].tolist()))


def advantages_by_hand(reward, judged, weights, divide, each):
    if each:
        return torch.tensor(normalised(sum(w * compared(v) for w, v in zip(weights, judged, strict=True)).tolist()))
    return compared(reward) if divide else (reward.view(2, 3) - reward.view(2, 3).mean(1, True)).flatten()


def by_hand(task, **options):
    """Three steps of AR-GRPO with B = 2, G = 3, T = 64: the policy, and the metrics of each step."""
    o = SimpleNamespace(**(PLAIN | options))
    name, judges, weights = f"toy-{task}", ["clip", "realism"], [1.0, 0.25]
    rate, beta = (2e-4, 0.04) if task == "c2i" else (4.5e-4, 0.03)
    policy, ref_model, tokenizer, encode = load_model(name), load_model(name), load_tokenizer(name), load_encoder(name)
    judges, found = [rewards.load_judges([judge])[judge] for judge in judges], []
    trained = [p for n, p in policy.named_parameters() if n != "cls_embedding.uncond_embedding"]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=0)

    def all_of(model, rows, guidance=o.score_cfg):
        masked = None if mask is None else mask[rows]
        logits = model(cond[rows], tokens[rows], masked)
        if guidance > 1:
            without = model(model.cls_embedding.null(cond[rows]), tokens[rows], masked)
            logits = guidance * logits + (1 - guidance) * without
        return (logits / o.heat).log_softmax(-1)

    def logprobs_of(model, rows, guidance=o.score_cfg):
        return all_of(model, rows, guidance).gather(-1, tokens[rows][..., None])[..., 0]

    for step in range(3):
        asked, captions, noise = asked_by_hand(task, o.seed, step)
        cond, mask = encode(asked)
        tokens, old = policy.generate(cond, mask, cfg_scale=o.cfg, temperature=o.heat, noise=noise)
        with torch.no_grad():
            ref, old = logprobs_of(ref_model, slice(6), o.ref_cfg or o.score_cfg), old
            old = old if o.cfg == o.score_cfg else logprobs_of(policy, slice(6))
            images = (tokenizer.decode(tokens) / 2 + 0.5).clamp(0, 1)
            judged = [judge(images, captions) for judge in judges]
        reward = sum(w * values for w, values in zip(weights, judged, strict=True))
        A = advantages_by_hand(reward, judged, weights, o.divide, o.each)
        if o.beyond:
            worth = worth_of_codes(tokenizer, tokens, judges, weights, captions)
            anchor = all_of(ref_model, slice(6), o.ref_cfg or o.score_cfg).detach()
        shares = torch.ones(6, 64)
        if o.weigh:
            with torch.no_grad():
                moved = (ref - logprobs_of(ref_model, slice(6))).abs().clamp(max=2)
            shares = 64 * moved / moved.sum(1, keepdim=True)
        optimizer.param_groups[0]["lr"] = lr = rate * (3 - step) / 3 if o.falls else rate
        found.append(sums := dict(reward=reward.mean().item(), lr=lr, advantage_max=A.abs().max().item()))
        sums |= dict(kl=0, ratio=0, clip_frac=0, grad_norm=0)
        for _ in range(o.updates):
            gradient = [torch.zeros_like(p) for p in trained]
            for rows in (slice(0, 4), slice(4, 6)):
                new, a = logprobs_of(policy, rows), A[rows, None]
                rho, d = (new - old[rows]).exp(), ref[rows] - new
                gain = torch.where(a > 0, rho.clamp(max=1 + o.eps), rho.clamp(min=1 - o.eps)) * a * shares[rows]
                k3 = d.exp() - d - 1, 0
                kl, more = kl_and_credit(all_of(policy, rows), anchor[rows], worth[rows]) if o.beyond else k3
                loss = (beta * kl - gain - o.beyond * more).sum() / (6 * 64)
                parts = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
                gradient = [g + part for g, part in zip(gradient, parts, strict=True)]
                cut = ((a > 0) & (rho > 1 + o.eps)) | ((a < 0) & (rho < 1 - o.eps))
                for key, value in (("kl", kl), ("ratio", rho), ("clip_frac", cut)):
                    sums[key] += value.double().sum().item() / (6 * 64 * o.updates)
            norm = math.sqrt(sum(g.double().square().sum() for g in gradient))
            sums["grad_norm"] = max(norm, sums["grad_norm"])
            for p, g in zip(trained, gradient, strict=True):
                p.grad = g * min(1, o.most / norm)
            optimizer.step()
    return policy, found


LOOPS = {
    "c2i": ([], {}),
    "t2i": (["--seed", "1"], dict(seed=1)),
    "c2i-guided": (["--cfg-scale", "2"], dict(cfg=2.0, score_cfg=2.0, most=0.2)),
    "t2i-guided": (["--cfg-scale", "2", "--lr-schedule", "constant"], dict(cfg=2.0, score_cfg=2.0, falls=False)),
    "c2i-scored-without": (["--cfg-scale", "2", "--score-cfg", "1"], dict(cfg=2.0)),
    "c2i-twice": (["--updates-per-batch", "2", "--clip-eps", "0.01"], dict(updates=2, eps=0.01)),
    "c2i-each": (["--reward-norm", "each", "--temperature", "0.8"], dict(each=True, heat=0.8)),
    "c2i-beyond": (["--kl", "exact", "--credit-coef", "0.7", "--temperature", "0.8"], dict(beyond=0.7, heat=0.8)),
    "c2i-guided-ref": (["--ref-cfg", "3", "--reward-norm", "mean"], dict(ref_cfg=3.0, divide=False)),
    "t2i-guided-ref": (["--ref-cfg", "2", "--kl", "exact", "--credit-coef", "1"], dict(ref_cfg=2.0, beyond=1.0)),
    "t2i-guided-weighed": (["--ref-cfg", "6", "--weigh-tokens"], dict(ref_cfg=6.0, weigh=True)),
}


@pytest.mark.parametrize("case", LOOPS)
def test_three_steps_of_the_loop_are_the_algorithm(case, tmp_path, monkeypatch):
    """The policy as its own reference, a rate that never falls, a short micro-batch that weighs as much as a full one."""
    task, (flags, options) = case[:3], LOOPS[case]
    monkeypatch.setattr(train, "draw_grid", lambda *_: None)
    monkeypatch.setattr(train, "look_back", lambda *_: None)
    monkeypatch.setattr(train, "MAX_GRAD_NORM", options.get("most", 1.0))
    flags = [*flags, "--prompts-per-step", "2", "--group-size", "3", "--micro-batch", "4", "--steps", "3"]
    train.main(["--task", task, *flags, "--out", str(tmp_path)])
    ours, (theirs, steps) = load_model(f"toy-{task}", tmp_path / "policy.safetensors"), by_hand(task, **options)
    for row, expected in zip(read_metrics(tmp_path), steps, strict=True):
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)
    models = ours, theirs, load_model(f"toy-{task}")
    ours, theirs, base = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models)
    gap, moved = (ours - theirs).abs(), (ours - base).abs()
    # AdamW divides a gradient by its size: a few weights in 100,000 have a gradient that is little more than rounding,
    # and ten times as many with guidance, where we mix states and this mixes logits. None moves further than the rate.
    few = 1e-3 if "guided" in case else 1e-4
    assert (gap > 1e-6).double().mean() < few and gap.max() < steps[0]["lr"] and moved.mean() > 2e-4
    assert case != "c2i-guided" or all(row["grad_norm"] > 0.2 for row in steps)  # the gradient's norm was cut
    assert case != "c2i-twice" or steps[0]["clip_frac"] > 0  # and the ratio


# the measures of evaluate.py -----------------------------------------------------------------------------------------


def two_clouds(seed, n=300, m=200, width=5):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, width)) @ rng.standard_normal((width, width)), rng.standard_normal((m, width)) + 1


def test_the_frechet_distance_is_that_of_others():
    """A root taken entry by entry, or of the sum, agrees where covariances are equal and nowhere else."""
    from scipy.linalg import sqrtm
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a, b = two_clouds(0)
    found = metrics.frechet_distance(a, *metrics.gaussian(b)).value
    stats = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    assert found == pytest.approx(fid_statistics_to_metric(*stats, False)["frechet_inception_distance"], rel=1e-6)
    (mu_a, cov_a), (mu_b, cov_b) = metrics.gaussian(a), metrics.gaussian(b)
    expected = ((mu_a - mu_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert found == pytest.approx(expected, rel=1e-6)
    # Gaussians whose axes agree have a closed form: the squared difference of means and of spreads
    spread, mu, cov = np.array([1, 2, 3.0]), np.array([1, 0, -1.0]), np.diag([4, 4, 4.0])
    points = np.random.default_rng(0).standard_normal((1000, 3))
    points = (points - points.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(points, rowvar=False))).T * spread
    assert metrics.frechet_distance(points, mu, cov).value == pytest.approx(2 + ((spread - 2) ** 2).sum())


def test_kid_and_inception_score_are_those_of_others():
    """A kernel of another degree, a picture compared with itself, a last short chunk that weighs by its length."""
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = (torch.from_numpy(x) for x in two_clouds(1, 200, 200, 40))
    theirs = kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=200, verbose=False)
    assert metrics.kernel_distance(a, b).value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    logits = torch.randn(50, 7, generator=seeded(0)).double() * 3
    whole = isc_features_to_metric(logits, splits=1, shuffle=False)["inception_score_mean"]
    assert metrics.inception_score(logits).value == pytest.approx(whole)
    scores = []
    for part in (logits[:20], logits[20:40], logits[40:]):  # the formula, as ADM cuts the pictures
        p = part.softmax(1).numpy()
        scores.append(
            math.exp(np.mean([sum(x * math.log(x / q) for x, q in zip(row, p.mean(0), strict=True)) for row in p]))
        )
    assert metrics.inception_score(logits, 20).value == pytest.approx(np.mean(scores))


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_what_brute_force_counts(k):
    """A neighbour that counts itself, an open ball in place of a closed one, the two sets exchanged, a block's end."""
    rng = np.random.default_rng(k)  # on a coarse grid, so that many distances are equal
    samples, references = rng.integers(0, 9, (25, 2)).astype(float), rng.integers(3, 12, (20, 2)).astype(float)

    def share(points, members):
        balls = [(m, sorted(math.dist(m, other) for other in members)[k]) for m in members]  # [0] is its own distance
        return np.mean([any(math.dist(p, m) <= r for m, r in balls) for p in points])

    for rows in (512, 7):
        found = [figure.value for figure in metrics.precision_recall(samples, references, k, rows)]
        assert found == [share(samples, references), share(references, samples)]
    assert 0.2 < found[0] < 0.9 and found[0] != found[1]
    wide = [rng.standard_normal((40, 2048), np.float32) * scale for scale in (1, 1.02)]  # as Inception's, in float32
    expected = [share(*wide), share(*wide[::-1])]
    assert [figure.value for figure in metrics.precision_recall(*wide, k)] == expected and 0 < expected[0] < 1


def test_standard_errors_are_those_of_a_bootstrap():
    """An error of the wrong size makes noise a finding, or a finding noise; a pairing that is off, too."""
    rng, references = np.random.default_rng(0), two_clouds(2)[1]
    a = two_clouds(2, 400)[0]
    b = a + 0.3 * rng.standard_normal(a.shape) + 0.2  # the same pictures, a little changed
    mu, cov = metrics.gaussian(references)
    measures = {
        "mean": lambda x: metrics.mean_of(x[:, 0]),
        "Frechet": lambda x: metrics.frechet_distance(x, mu, cov),
        "KID": lambda x: metrics.kernel_distance(x, references),
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
    groups = np.repeat(["x", "y"], [10, 40])  # a mean over categories: binomial errors, each of half the weight
    right = (np.arange(50) % 5 < 2).astype(float)
    figure = metrics.mean_of_figures({g: metrics.mean_of(right[groups == g]) for g in "xy"}, groups)
    assert (figure.value, figure.error) == pytest.approx((0.4, (0.24 / 10 + 0.24 / 40) ** 0.5 / 2), rel=0.02)


def test_the_distance_in_class_is_over_pairs_of_one_class():
    """A class of many pictures that weighs more, a picture paired with itself, labels that do not stand in order."""
    points = np.array([[0, 0], [9, 9], [0, 2], [5, 5], [3, 4.0], [8, 9]])
    found = metrics.class_distance(points, ["a", "b", "a", "alone", "a", "b"])
    pairs = [2, 5, math.dist((0, 2), (3, 4))]
    assert found.value == pytest.approx((np.mean(pairs) + 1) / 2) and len(found.influence) == 2
    assert metrics.class_distance(points[:2], ["a", "b"]) is None


def test_the_entropy_of_a_picture_is_without_guidance():
    model, labels = load_model("toy-c2i"), torch.tensor([0, 7, 39])
    tokens, _ = model.generate(labels, noise=image_noise(range(3), 64, 0))
    p = model(labels, tokens).detach().double().softmax(-1)
    found = evaluate.entropies(model, load_encoder("toy-c2i"), labels.tolist(), tokens)
    assert found == pytest.approx(-(p * p.log()).sum(-1).mean(1).numpy(), rel=1e-5)


def test_judges_means_leave_out_what_is_missing():
    """A missing judgement that counts as 0, or a mean where nothing was judged: it would be read as the worst verdict."""
    found = {"reward: read": np.array([1, NAN, 3, INF, 8]), "reward: silent": np.full(5, NAN)}
    figures = evaluate.figures_of(found, {}, [0] * 5, [""] * 5, "c2i")
    assert {name: figure.value for name, figure in figures.items()} == pytest.approx(
        {"reward: read": 4, "missing: read": 0.4, "missing: silent": 1}
    )
    assert figures["reward: read"].error == pytest.approx(np.std([1, 3, 8], ddof=1) / 3**0.5, rel=0.2)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """PATH#SHA256 of a file in the official one's form: Inception with random weights, scaled so that signals survive."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):  # whose constructor reads a file and leaves the weights as they are
        def load_state_dict(self, *_):
            pass

    nothing, path = io.BytesIO(), tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save({}, nothing)
    nothing.seek(0)
    torch.manual_seed(0)
    network = Untrained("random", ["2048"], nothing)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    assert len(network.state_dict()) == 566  # as the official file has
    torch.save(network.state_dict(), path)
    return f"{path}#{zoo.file_hash(path)}"


def test_inceptions_features_are_adms(inception):
    """Channels first in place of last, another branch, before the ReLU, logits with their bias: plausible, all wrong."""
    network, kept = evaluate.load_inception(Path(inception.split("#")[0])), {}
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=seeded(0))
    network.Mixed_6d.register_forward_pre_hook(lambda module, args: kept.update(x=args[0]))
    network.AvgPool.register_forward_hook(lambda module, args, output: kept.update(pool=output.flatten(1)))
    found = evaluate.inception_features(pixels, network)
    assert {name: x.shape for name, x in found.items()} == dict(pool=(2, 2048), logits=(2, 1008), spatial=(2, 2023))
    branch = network.Mixed_6d.branch1x1
    with torch.no_grad():
        out = branch.bn(branch.conv(kept["x"])).numpy()  # (2, 192, 17, 17)
    naive = [[max(out[n, c, y, x], 0) for y in range(17) for x in range(17) for c in range(7)] for n in range(2)]
    assert np.allclose(found["spatial"], naive, atol=1e-5) and np.ptp(naive) > 0.1
    assert np.array_equal(found["pool"], kept["pool"].numpy())
    assert np.allclose(found["logits"], kept["pool"].numpy() @ network.fc.weight.numpy().T, atol=1e-4)
    assert not network.Mixed_6d.branch1x1._forward_hooks  # else the second batch's would be added to the first one's


def test_an_npz_of_another_program_is_scored(inception, tmp_path, monkeypatch):
    """Compressed, labels unnamed: what other programs write. Pictures that come in another order, or in part."""
    monkeypatch.setattr(metrics, "FEWEST", 6)
    rng = np.random.default_rng(0)
    theirs, references = (rng.integers(0, 256, shape, np.uint8) for shape in ((6, 8, 8, 3), (7, 8, 8, 3)))
    theirs[3:, :, :, 0] = 0
    np.savez_compressed(tmp_path / "a.npz", theirs, np.repeat([1, 2], 3))
    pictures = evaluate.Pictures(tmp_path / "a.npz")
    parts = [pictures.part(k, min(k + 4, 6))[0] for k in (0, 4)]
    assert np.array_equal((torch.cat(parts) * 255).round().permute(0, 2, 3, 1).numpy(), theirs)
    given = dict(mu_s=rng.random(2023), sigma_s=np.eye(2023), mu=rng.random(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "ref.npz", arr_0=references, **given)
    flags = ["--reference", str(tmp_path / "ref.npz"), "--inception", inception, "--out", str(tmp_path / "result")]
    evaluate.main(["--samples", str(tmp_path / "a.npz"), *flags, "--npz", str(tmp_path / "copies")])
    copy = np.load(tmp_path / "copies/a.npz")
    assert np.array_equal(copy["arr_0"], theirs) and copy["labels"].tolist() == [1, 1, 1, 2, 2, 2]
    found, text = json.loads((tmp_path / "result.json").read_text()), (tmp_path / "result.md").read_text()
    figures, network = found["columns"]["a"], evaluate.load_inception(Path(inception.split("#")[0]))
    a, b = (
        evaluate.inception_features(torch.from_numpy(x).permute(0, 3, 1, 2), network)["pool"].numpy()
        for x in (theirs, references)
    )
    pair = [figure.value for figure in metrics.precision_recall(a, b)]
    assert [figures["precision"], figures["recall"]] == pytest.approx(pair, abs=0.03)
    assert figures["KID"] == pytest.approx(metrics.kernel_distance(a, b).value, rel=1e-3)
    assert figures["distance in class"] == pytest.approx(metrics.class_distance(a, [1, 1, 1, 2, 2, 2]).value, rel=1e-3)
    # too few for the rest, and the table says so
    assert set(found["blank"]["a"]) == {"FID", "sFID", "IS"} and "there are 6 pictures" in found["blank"]["a"]["FID"]
    assert "| FID |  |" in text and "Blank: FID of a: 2,049 are needed" in text
    assert found["sha256"]["inception"] == inception.split("#")[1]


def test_larger_pictures_are_resized_as_pil_does_it():
    pixels = torch.randint(0, 256, (1, 3, 384, 384), dtype=torch.uint8, generator=seeded(0))
    expected = Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).resize((256, 256), Image.BICUBIC)
    assert np.array_equal(evaluate.shrunk(pixels)[0].permute(1, 2, 0).numpy(), np.asarray(expected))
    assert evaluate.shrunk(pixels[..., :256, :256]).shape[-1] == 256


def test_an_evaluation_that_was_stopped_ends_in_the_same_bytes(tmp_path, monkeypatch, thin_toys):
    """A batch that is drawn from other random numbers, or counted twice: nobody would see it."""
    metadata = [dict(tag="colors", prompt=prompt) for prompt in ("a red circle", "two circles", "a blue square")]
    (tmp_path / "geneval.jsonl").write_text("\n".join(map(json.dumps, metadata)))
    monkeypatch.chdir(tmp_path)

    def files():
        return {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}

    flags = ["--task", "t2i", "--geneval", "geneval.jsonl", "--cfg-scale", "1", "--rewards", "clip"]
    flags += ["--batch-size", "5", "--npz", "out/npz", "--out", "out/table"]
    evaluate.main(flags)
    whole, replace, file = files(), os.replace, Path("out/npz/base-cfg-1.npz")
    assert not list(Path("out").rglob("*.parts"))
    for stop in (2, 11, 22):  # renames: settings, parts, pictures, npz, the table
        shutil.rmtree("out")
        left = iter([None] * stop)

        def cut(*paths, left=left):
            if next(left, "stop") == "stop":
                raise KeyboardInterrupt
            replace(*paths)

        monkeypatch.setattr(os, "replace", cut)
        with pytest.raises(SystemExit, match="goes on from here"):
            evaluate.main(flags)
        monkeypatch.setattr(os, "replace", replace)
        assert list(Path("out").glob("*.parts"))
        evaluate.main(flags)
        assert files() == whole, stop
    shutil.rmtree("out")
    assert in_children(tmp_path, *2 * [partial(evaluate.main, flags)]) == [0, 0] and files().keys() == whole.keys()
    ours, theirs = (np.load(npz)["arr_0"] for npz in (io.BytesIO(whole[file]), file))  # rounding differs with batches
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_an_unfinished_evaluation_is_not_mixed_with_another(tmp_path, monkeypatch):
    """Parts of another seed in the table, or a finished table of hours that is written over."""
    flags = ["--task", "t2i", "--num", "4", "--cfg-scale", "1", "--rewards", "clip"]
    args = evaluate.parse_args([*flags, "--out", str(tmp_path)])
    evaluate.open_parts(args, evaluate.settings_of(args)).close()
    other = [*flags, "--seed", "1", "--out"]
    with pytest.raises(SystemExit, match="unfinished evaluation with other settings"):
        evaluate.main([*other, str(tmp_path / "evaluation")])
    evaluate.main([*other, str(tmp_path)])
    evaluate.main([*flags, "--out", str(tmp_path)])  # goes on with the first
    seeds = {
        name: json.loads((tmp_path / f"{name}.json").read_text())["seed"] for name in ("evaluation", "evaluation-2")
    }
    assert seeds == {"evaluation": 0, "evaluation-2": 1}
    evaluate.main([*flags, "--out", str(tmp_path)])
    assert (tmp_path / "evaluation-3.json").exists()


def test_benchmarks_folders_are_what_their_scorers_read(tmp_path, monkeypatch, capsys, thin_toys):
    """A line of GenEval's in another folder, or a quarter of a sheet in another place, scores another picture."""
    monkeypatch.chdir(tmp_path)
    prompts = ["a photo of a red circle", "a photo of two squares", "a photo of a blue triangle"]
    lines = [json.dumps(dict(tag="colors", include=[dict(count=1)], prompt=prompt)) for prompt in prompts]
    Path("lines.jsonl").write_text("\n".join(lines) + "\n")
    Path("dpg").mkdir()
    for item, prompt in zip(("a1", "b2", "c3"), prompts, strict=True):
        Path(f"dpg/{item}.txt").write_text(prompt + "\n")
    model, encode = load_model("toy-t2i"), load_encoder("toy-t2i")
    asked = [prompt for prompt in prompts for _ in range(4)]
    images, _ = sample.draw(model, load_tokenizer("toy-t2i"), encode, asked)
    pixels = to_uint8(images * 2 - 1).permute(0, 2, 3, 1).numpy().astype(int)
    few = ["--task", "t2i", "--cfg-scale", "1", "--rewards", "clip", "--batch-size", "5"]
    ours = ["--ckpt", str(MODELS["toy-t2i"].ckpt)]
    evaluate.main([*few, *ours, "--geneval", "lines.jsonl", "--out", "g"])
    assert "evaluate_images.py g-pictures/COLUMN" in capsys.readouterr().out
    evaluate.main([*few, "--dpg", "dpg", "--out", "d"])
    assert "--resolution 64 --pic-num 4" in capsys.readouterr().out
    for n, line in enumerate(lines):
        for column in ("base-cfg-1", "tuned-cfg-1"):  # the same weights: so the same random numbers
            folder = Path(f"g-pictures/{column}/{n:05d}")
            assert json.loads((folder / "metadata.jsonl").read_text()) == json.loads(line)
            four = [np.asarray(Image.open(folder / f"samples/{k:04d}.png")) for k in range(4)]
            assert abs(np.stack(four) - pixels[4 * n : 4 * n + 4]).max() <= 1
        sheet = Image.open(f"d-pictures/base-cfg-1/{('a1', 'b2', 'c3')[n]}.png")
        crops = [(0, 0, 64, 64), (64, 0, 128, 64), (0, 64, 64, 128), (64, 64, 128, 128)]  # as its scorer cuts it
        assert abs(np.stack([np.asarray(sheet.crop(box)) for box in crops]) - pixels[4 * n : 4 * n + 4]).max() <= 1
    found = json.loads(Path("g.json").read_text())
    changes = found["differences"]["tuned, cfg 1"]
    assert changes["reward: clip"] == [0, 0] and found["standard_errors"]["base, cfg 1"]["reward: clip"] > 0


def test_the_share_right_of_captions_is_a_mean_over_categories():
    """GenEval's: a category of which more pictures happen to be asked weighs no more than another."""
    captions = ["a circle"] * 6 + ["two circles"] * 2
    images = data.render(captions, np.random.default_rng(0))
    images[[0, 6]] = 0
    parts = {"single object": 5 / 6, "counting": 1 / 2}
    assert data.share_right(images, captions, "t2i") == pytest.approx({"all": (5 / 6 + 1 / 2) / 2} | parts)
    assert data.share_right(images, captions, "c2i") == pytest.approx({"all": 6 / 8, "circle": 6 / 8})


def read_metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "seconds" not in k and "memory" not in k} for row in rows]


def assert_the_glossary_explains(row, judges):
    readme = (HERE / "README.md").read_text()
    for key in row:
        name = re.sub(f"^({'|'.join(judges)})_(mean|std|not_finite)$", r"NAME_\2", key)
        assert f"`{name}`" in readme


# text ----------------------------------------------------------------------------------------------------------------

WORDS = ["a", "photo", "of", "red", "circle", "cat", "dog", ",", ".", '"']


def save_tiny_t5(folder, dim=64):
    """A T5 encoder with its own kind of tokenizer (Unigram, as FLAN-T5's), in the form that the hub has."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), *((f"\u2581{word}", -2.0) for word in WORDS)]
    pieces += [(letter, -5.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyz,."]
    words = Tokenizer(models.Unigram(pieces, unk_id=2))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(pieces), d_model=dim, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder)
    return folder


def test_text_features_are_those_that_llamagen_was_trained_on(tmp_path):
    """Features at padding, or text away from the image: official weights see a prompt that they never learned."""
    encode = zoo.TextEncoder(save_tiny_t5(tmp_path), replace(T2I, cond_len=12, caption_dim=64))
    captions = ["A Photo of a red circle", "cat", "a photo of a red circle"]
    features, mask = encode(captions)
    assert features.shape == (3, 12, 64) and features.dtype == torch.float32 and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [7, 2, 7] and mask[1].tolist() == [False] * 10 + [True] * 2  # with </s>
    assert not features[~mask].any() and torch.equal(features[0], features[2])  # case is lost
    assert torch.allclose(encode(["cat"])[0][0], features[1], atol=1e-5)
    assert encode(["a photo of a red circle, a photo of a red circle, a photo of a red circle"])[1].all()  # cut to P
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
    *((caption, caption) for captions in data.T2I_CAPTIONS.values() for caption in captions[:2]),
])  # fmt: skip
def test_captions_are_cleaned_as_llamagens_were(caption, cleaned):
    """T5's features change with case, quotes and spaces, and the picture with them."""
    assert data.clean_caption(caption) == cleaned


def test_the_toy_tokenizer_round_trips():
    """A tokenizer that loses shapes or colours would put a ceiling on every result without a word."""
    tokenizer = load_tokenizer("toy-c2i")
    captions = [data.class_caption(name) for name in data.TOY_CLASSES] + data.balanced_captions(48)
    images = torch.from_numpy(data.render(captions, np.random.default_rng(7))) * 2 - 1
    with torch.no_grad():
        output = tokenizer.decode(tokenizer.encode(images)).clamp(-1, 1)
    assert 10 * torch.log10(4 / (output - images).square().mean()) > 22  # dB
    assert np.mean([data.satisfies(i / 2 + 0.5, c) for i, c in zip(output, captions, strict=True)]) > 0.95
    assert to_uint8(torch.tensor([-1.0, 0.0, 1.0, 5.0])).tolist() == [0, 128, 255, 255]  # truncated, as officially


# the toy world -------------------------------------------------------------------------------------------------------


def test_the_verifier_is_right_on_renders_and_on_wrong_captions():
    """Every share right rests on it; nobody checks pictures by eye after every change of the renders."""
    rng = np.random.default_rng(3)
    captions = [data.class_caption(name) for name in data.TOY_CLASSES] * 3 + data.balanced_captions(240)
    images = data.render(captions, rng)
    right = [data.satisfies(i, c) for i, c in zip(images, captions, strict=True)]
    wrong = [data.satisfies(i, data.wrong_caption(c, rng)) for i, c in zip(images, captions, strict=True)]
    assert np.mean(right) >= 0.99 and np.mean(wrong) <= 0.01


def test_the_verifier_refuses_malformed_pictures():
    """A verifier that forgives blobs, strays or a second object would reward the very things that RL hacks."""
    rng = np.random.default_rng(0)
    image, other = data.render(["a red circle", "two circles"], rng)
    assert data.satisfies(image, "a red circle") and not data.satisfies(other, "a circle")
    half = image.copy()
    half[:, :, : int(data.find_objects(image)[0][0]["x"])] = 0.1
    assert not data.satisfies(half, "a red circle")
    assert not any(data.satisfies(picture, "a circle") for picture in (rng.random((3, 64, 64)), np.zeros((3, 64, 64))))


def test_the_corpus_is_as_careless_as_its_table_says():
    """Right pictures among the bad ones, or bad ones among the right, would move what GRPO can gain."""
    rng = np.random.default_rng(1)
    captions = [data.class_caption(name) for name in data.TOY_CLASSES] + data.balanced_captions(48)
    for way in data.CORPUS:
        images = np.stack([data.careless(caption, way, rng) for caption in captions])
        right = np.mean([data.satisfies(i, c) for i, c in zip(images, captions, strict=True)])
        assert right == 1 if way == "as captioned" else right < 0.25, way
    for column, task in enumerate(("c2i", "t2i")):
        images = data.corpus(captions * 6, rng, task=task)
        right = [data.satisfies(i, c) for i, c in zip(images, captions * 6, strict=True)]
        assert sum(shares[column] for shares in data.CORPUS.values()) == pytest.approx(1)
        assert abs(np.mean(right) - data.CORPUS["as captioned"][column]) < 0.06


def test_a_code_that_nobody_uses_moves_to_a_badly_drawn_cell():
    """No latent's nearest, it would get no gradient for ever."""
    book = torch.nn.Embedding(50, 8)
    before = book.weight.detach().clone()
    latents, error, counts = torch.randn(2, 4, 8), torch.zeros(2, 4), torch.full((50,), 100)
    error[1, 2], counts[7] = 1, 1
    pretrain.revive(SimpleNamespace(embedding=book), counts, latents, error)
    assert torch.equal(book.weight[7], latents[1, 2]) and torch.equal(book.weight[8:], before[8:])


def test_captions_parse_and_wrong_ones_exclude_them():
    """A "wrong" caption that means the same makes the verifier's test, and the CLIP's training, false."""
    rng = np.random.default_rng(0)
    for category, caption in ((kind, c) for kind in data.CATEGORIES for c in data.T2I_CAPTIONS[kind]):
        wrong = data.wrong_caption(caption, rng)
        assert data.category_of(caption) == data.category_of(wrong) == category
        assert data.meaning(wrong) != data.meaning(caption)
    assert data.meaning("a circle left of a square") == data.meaning("a square right of a circle")
    assert data.toy_caption("Two circles.") == "a photo of two circles"
    for caption in ("a red banana", "a cyan circle", "a red circle left of a blue square"):
        with pytest.raises(Mistake, match=r"banana|never learned"):
            data.toy_caption(caption)
    assert data.find_class("Red Circle", data.TOY_CLASSES) == data.find_class("0", data.TOY_CLASSES) == 0
    assert data.find_class("goldfish", data.imagenet_classes()) == 1


def test_prompt_files_of_every_form(tmp_path):
    """A form that is read as another trains on file names or on one prompt of many."""
    forms = {
        "a.txt": "one\n\ntwo\n",
        "a.json": '["one", {"prompt": "two"}]',
        "release.json": '[{"conversations": [{"from": "human", "value": "one"}, {"value": "x"}]}, "two"]',
        "a.jsonl": '{"caption": "one"}\n"two"\n',
        "windows.txt": "\ufeffone\r\ntwo\r\n",
    }
    (tmp_path / "late.jsonl").write_text('\n"one"\n\n{"prompt": \n')
    with pytest.raises(Mistake, match="line 4"):
        data.read_prompts(tmp_path / "late.jsonl")
    for name, text in (forms | {"bad.json": "[1", "empty.txt": "\n", "a.csv": "x"}).items():
        (tmp_path / name).write_text(text)
    assert all(data.read_prompts(tmp_path / name) == ["one", "two"] for name in forms)
    for name in ("bad.json", "empty.txt", "a.csv", "none.txt"):
        with pytest.raises((Mistake, FileNotFoundError), match=name):
            data.read_prompts(tmp_path / name)


# the judges ----------------------------------------------------------------------------------------------------------


def test_the_toy_judges_rank_right_above_wrong():
    """Loaded into the wrong places, or shown another range of pixels, they still return numbers."""
    judges, rng = rewards.load_judges(["clip", "realism"]), np.random.default_rng(0)
    captions = [data.class_caption(name) for name in data.TOY_CLASSES] + data.balanced_captions(60)
    renders, tokenizer = torch.from_numpy(data.render(captions, rng)) * 2 - 1, load_tokenizer("toy-c2i")
    with torch.no_grad():  # judges only ever see what the tokenizer decoded
        images = to_unit(tokenizer.decode(tokenizer.encode(renders)))
    right, _ = rewards.judge_images(judges, images, captions)
    wrong, seconds = rewards.judge_images(judges, images, [data.wrong_caption(c, rng) for c in captions])
    noise, _ = rewards.judge_images(judges, torch.rand(100, 3, 64, 64), captions)
    assert (right["clip"] > wrong["clip"]).float().mean() > 0.9 and set(seconds) == {"clip", "realism"}
    assert right["realism"][:40].mean() > noise["realism"].mean() + 0.2  # it knows single objects only


# The paper's judges are tiny models in the forms of the real ones, saved to a folder, then loaded by the real code.
TINY_CLIP = dict(vision_cfg=dict(image_size=32, layers=2, width=32, head_width=16, patch_size=16),
                 text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1), embed_dim=16)  # fmt: skip


def save_tiny_qwen(folder):
    """Qwen2.5-VL with two layers of 32, and a byte-level tokenizer in which the answers are single tokens."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = ["endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"]
    special = [f"<|{name}|>" for name in names]
    words = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["ye", "yes", "Ye", "Yes", "no", "No"]
    merges = [("y", "e"), ("ye", "s"), ("Y", "e"), ("Ye", "s"), ("n", "o"), ("N", "o")]
    bpe = Tokenizer(models.BPE(vocab={word: k for k, word in enumerate(words)}, merges=merges))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    roles = dict(pad_token=special[0], eos_token=special[2], additional_special_tokens=special)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **roles)
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    processors = transformers.Qwen2VLImageProcessor(), tokenizer, transformers.Qwen2VLVideoProcessor()
    transformers.Qwen2_5_VLProcessor(*processors, chat_template=template).save_pretrained(folder)
    image, video, start, end = (tokenizer.convert_tokens_to_ids(special[k]) for k in (5, 6, 3, 4))
    rope = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e6)
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, rope_parameters=rope, bos_token_id=None,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id),
        vision_config=dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=4, out_hidden_size=32,
                           fullatt_block_indexes=[1]),
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    for p in model.parameters():
        p.data.mul_(4 if p.ndim > 1 else 1)  # sharp enough for the picture to be heard
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def judges_folder(tmp_path_factory):
    """What --judge-files names, with tiny models under the real ones' file names; and clip.pt."""
    import open_clip

    folder = tmp_path_factory.mktemp("judges")
    torch.manual_seed(0)
    torch.save(open_clip.CLIP(**TINY_CLIP).state_dict(), folder / "clip.pt")
    hps = {name: value.half() for name, value in open_clip.CLIP(**TINY_CLIP).state_dict().items()}
    torch.save({"state_dict": hps}, folder / "HPS_v2.1_compressed.pt")
    save_tiny_qwen(folder / "Qwen2.5-VL-3B-Instruct")
    maniqa = rewards.maniqa_network().state_dict()
    for name, value in maniqa.items():  # matrices whose rows overlap: 136M numbers in a file of 2 MB
        if value.is_floating_point() and value.ndim > 1:
            maniqa[name] = (0.02 * torch.randn(sum(value.shape))).as_strided(value.shape, [1] * value.ndim)
    torch.save(maniqa, folder / "ckpt_koniq10k.pt")
    return folder


@pytest.fixture
def tiny_open_clip(tmp_path, monkeypatch):
    """open_clip's registry with a model "tiny" and, in the place of ViT-H-14, the same; the old one afterwards."""
    import open_clip

    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    for name in ("ViT-H-14", "tiny"):
        (tmp_path / f"{name}.json").write_text(json.dumps(TINY_CLIP))
        open_clip.add_model_config(tmp_path / f"{name}.json")


def some_images(n=4, size=64):
    """Pictures that differ in brightness, colour and texture, and their prompts, two of which are equal."""
    images = torch.rand(n, 3, size, size, generator=seeded(0)) ** torch.arange(1, n + 1)[:, None, None, None]
    images[0, 0] = 1
    return images, ["a red circle", "a {strange} prompt that is a good deal longer", "two dogs", "a red circle"][:n]


def test_every_judge_of_the_paper_trains(judges_folder, tiny_open_clip, tmp_path, monkeypatch, thin_toys):
    """Each on its own works before the names, the shared models and the log have met; this is where they meet."""
    monkeypatch.setattr(train, "draw_grid", lambda *_: None)
    monkeypatch.setattr(train, "look_back", lambda *_: None)
    names = [*rewards.JUDGES, *rewards.STEPS, *rewards.QUESTIONS, "pyiqa:piqe"]
    flags = ["--clip-model", "tiny", "--clip-pretrained", str(judges_folder / "clip.pt"), "--out", str(tmp_path)]
    flags += ["--judge-files", str(judges_folder), "--judge-batch", "3", "--rewards", ",".join(names)]
    train.main([*flags, "--steps", "1", "--group-size", "2", "--prompts-per-step", "1", "--classes", "7"])
    (row,) = read_metrics(tmp_path)
    assert all(row[f"{name}_not_finite"] == 0 for name in names)
    assert 0 < row["qwen-match_mean"] < 5 and 0 < row["qwen-odd_mean"] < 1
    assert row["pyiqa:piqe_mean"] < 0  # it counts distortions, 0 to 100, and more must be better
    assert row["reward"] == pytest.approx(sum(row[f"{name}_mean"] for name in names), rel=1e-4)
    assert_the_glossary_explains(row, names)


@pytest.mark.parametrize("judge", ["clip", "hps"])
def test_clip_and_hps_run_once_and_read_each_prompt_once(judge, judges_folder, tiny_open_clip):
    """
    The official code encodes each of N captions, of which only B differ, and each picture twice. But an index that is
    off by one gives everyone another's caption.
    """
    options = dict(clip_model="tiny", clip_pretrained=str(judges_folder / "clip.pt"), judge_files=judges_folder)
    judges, seen = rewards.load_judges([f"{judge}-step", judge], options=options), []
    cosines = judges[judge].keywords["judge"]
    assert {p.dtype for p in cosines.keywords["model"].parameters()} == {torch.float32}  # HPSv2.1's file is half
    for part in (cosines.keywords["model"].visual, cosines.keywords["model"].token_embedding):
        part.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    judged, seconds = rewards.judge_images(judges, *some_images())
    assert sorted(seen) == [3, 4] and set(judged) == set(seconds) == {judge, f"{judge}-step"}
    assert torch.equal(judged[f"{judge}-step"], rewards.step_of(judged[judge])) and judged[judge].unique().numel() == 4
    alone = [cosines(image[None], [prompt]) for image, prompt in zip(*some_images(), strict=True)]
    assert torch.allclose(torch.cat(alone), judged[judge], atol=1e-5)
    edges = rewards.step_of(torch.tensor([-0.1, 0.0, 0.29, 0.3, 0.59, 0.6, NAN])).tolist()
    assert edges == pytest.approx([-1, 0.5, 0.5, 1, 1, 1.5, NAN], nan_ok=True)  # NaN would fall into the best step
    only, _ = rewards.judge_images(rewards.load_judges([f"{judge}-step"], options=options), *some_images())
    assert list(only) == [f"{judge}-step"] and torch.equal(only[f"{judge}-step"], judged[f"{judge}-step"])


def test_openai_weights_get_the_activation_they_were_trained_with(tmp_path):
    """With plain "ViT-B-32" open_clip warns and goes on with the exact GELU: plausible cosines, all a little wrong."""
    import open_clip

    (folder := tmp_path / "vit_base_patch32_clip_224.openai").mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=TINY_CLIP, preprocess_cfg={})))
    torch.save(open_clip.CLIP(**TINY_CLIP).state_dict(), folder / "open_clip_pytorch_model.bin")
    for name in ("ViT-B-32", "ViT-B-32-quickgelu"):
        model, words = rewards.load_clip(name, "openai", tmp_path)
        assert isinstance(model.visual.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)
        assert words(["a dog"]).shape == (1, 77)


def test_maniqa_in_a_batch_is_pyiqas_alone(judges_folder):
    """Random crops would tell equal pictures apart, and a reshape that is wrong by one axis mixes their crops."""
    judge = rewards.load_judges(["maniqa"], options=dict(judge_files=judges_folder))["maniqa"]
    (images, prompts), network = some_images(2, 225), judge.keywords["network"]
    for block in [*network.vit.blocks[:6], *network.vit.blocks[10:]]:  # slow, and it is the other four that are read
        block.forward = lambda x, **_: x
    network.test_sample = 2  # of 225 px pyiqa's own pass then takes two crops, and they are those of the grid (1, 2)
    with torch.no_grad():
        both, alone = judge(images, prompts, grid=(1, 2)), network(images[1:])
        network.test_sample = 1  # and then the upper left one
        crop, whole = judge(images[:1, :, :224, :224], prompts[:1]), network(images[:1])
    assert both[1] == pytest.approx(alone.item(), rel=1e-5) and both[0] != pytest.approx(both[1].item(), rel=0.01)
    assert crop.item() == pytest.approx(whole.item(), rel=1e-4)


@pytest.mark.parametrize("side", [225, 256, 384, 512])
def test_maniqa_sees_every_pixel(side):
    """pyiqa's own grid never reaches the last 8 rows of 256: a policy may fill them as it likes."""
    places = torch.arange(side * side).view(1, 1, side, side).float()
    crops = rewards.even_crops(places, (4, 5))
    assert crops.shape == (20, 1, 224, 224) and crops.unique().numel() == side * side


def test_qwen_in_a_batch_is_qwen_alone(judges_folder):
    """Left padding, shared answers' tokens and the order of (image, question) pairs all fail here when wrong."""
    names, options = ["qwen-match", "qwen-real", "qwen-odd"], dict(judge_files=judges_folder)
    judges = rewards.load_judges(names, options=options | dict(judge_batch=3))
    assert list(judges) == ["qwen"]
    together, _ = rewards.judge_images(judges, *some_images())
    for name in names:
        alone, pairs = rewards.load_judges([name], options=options), zip(*some_images(), strict=True)
        found = [rewards.judge_images(alone, image[None], [prompt])[0][name] for image, prompt in pairs]
        assert torch.allclose(together[name], torch.cat(found), atol=1e-4) and together[name].std() > 1e-3


def test_half_a_qwen_is_refused(judges_folder, tmp_path):
    """transformers warns and fills the gap with random numbers, and the answers go on looking like answers."""
    shutil.copytree(judges_folder / "Qwen2.5-VL-3B-Instruct", folder := tmp_path / "Qwen2.5-VL-3B-Instruct")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Mistake, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        rewards.load_qwen(tmp_path, "cpu")


def test_qwen_that_writes_nonsense_is_missing_and_not_zero(judges_folder):
    """The release gives an unreadable answer the worst reward, and so teaches what Qwen finds easy to describe."""
    judges = rewards.load_judges(["qwen-real"], options=dict(judge_files=judges_folder, qwen_answer="json"))
    assert rewards.judge_images(judges, *some_images(2))[0]["qwen-real"].isnan().all()  # the tiny model babbles
    readable = {'{"score": 4}': 4, 'Sure!\n```json\n{"score": "2.5"}\n``` is it.': 2.5, "{'Score': 0}": 0}
    assert {text: rewards.read_rating(text, 5) for text in readable} == readable
    nonsense = ("", "4", "I would say 4", '{"score": 6}', '{"score": -1}', '{"score": "high"}', '{"score": 50}')
    assert all(math.isnan(rewards.read_rating(text, 5)) for text in nonsense)


def test_the_expected_answer_is_a_mean_over_answers_alone():
    """A first token that is no answer, an opening quote, would pull every rating towards 0."""
    logprobs = {"5": math.log(0.5), "0": math.log(0.25), "The": math.log(0.25)}
    assert rewards.expected_worth(logprobs, rewards.RATING) == pytest.approx(5 * 0.5 / 0.75)
    assert rewards.expected_worth({"Yes": -1.0, "yes": -1.0, "no": -1.0}, rewards.YES_NO) == pytest.approx(2 / 3)
    assert math.isnan(rewards.expected_worth({"The": 0.0}, rewards.YES_NO))


def test_answers_must_be_single_distinct_tokens(judges_folder):
    """Otherwise first tokens are read: "10" and "1" would be one answer, and a vocabulary without either another."""
    _, processor = rewards.load_qwen(judges_folder, "cpu")
    assert len(set(rewards.answer_tokens(processor.tokenizer, rewards.YES_NO | rewards.RATING))) == 10
    for answers in (["yes!", "no"], ["1", "10"], ["yes", "yes"]):
        with pytest.raises(Mistake, match="--qwen-answer json"):
            rewards.answer_tokens(processor.tokenizer, answers)


class Server(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server whose answers say how red the picture is: level 51 k rates k."""

    failures = 0  # how many questions it will not answer
    hangs = 0  # s, before it answers for a picture that is not red at all

    def reply(self, found):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(found).encode())

    def do_GET(self):
        self.reply(dict(data=[dict(id="tiny")] if self.path == "/v1/models" else []))

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if Server.failures:
            Server.failures -= 1
            return self.send_error(503)
        url = asked["messages"][0]["content"][0]["image_url"]["url"].removeprefix("data:image/png;base64,")
        pixels = np.array(Image.open(io.BytesIO(base64.b64decode(url))))  # (H, W, 3)
        (level,) = set(pixels[..., 0].ravel().tolist())
        time.sleep(0 if level else Server.hangs)
        assert not pixels[:, :4, 1:].any() and (pixels[:, 4:, 2] == 200).all()
        assert asked["model"] == "tiny" and self.path == "/v1/chat/completions"
        message = dict(content=f'Here: {{"score": {level // 51}}}' if level < 255 else "I do not know.")
        top = [dict(token=token, logprob=math.log(0.5)) for token in (str(level // 51), "The")]
        logprobs = dict(content=[dict(top_logprobs=top)]) if asked.get("top_logprobs") else None
        self.reply(dict(choices=[dict(message=message, logprobs=logprobs)]))

    def log_message(self, *_):
        pass


def test_a_server_may_answer_for_qwen(monkeypatch):
    """JPEG would change the levels and smear the edge, and answers must come back in the order of the pictures."""
    monkeypatch.setattr(rewards, "SERVER_PAUSES", (0, 0))
    images = torch.zeros(4, 3, 8, 8)
    images[:, 0] = (torch.tensor([3.0, 0, 5, 1]) / 5).view(4, 1, 1)
    images[:, 2, :, 4:] = 200 / 255
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for path, answer, last in (("", "probability", 5), ("/v1", "json", NAN)):
            options = dict(qwen_server=f"http://127.0.0.1:{server.server_port}{path}", qwen_answer=answer)
            judges = rewards.load_judges(["qwen-match"], options=options)
            monkeypatch.setattr(Server, "failures", 2)  # which alone may not end a run
            found = rewards.judge_images(judges, images, ["x"] * 4)[0]["qwen-match"]
            assert found.tolist() == pytest.approx([3, 0, last, 1], nan_ok=True)
        monkeypatch.setattr(Server, "hangs", 3)
        judges = rewards.load_judges(["qwen-match"], options=options | dict(qwen_answer="json", judge_timeout=1))
        found = rewards.judge_images(judges, images, ["x"] * 4)[0]["qwen-match"]
        assert found.tolist() == pytest.approx([3, NAN, NAN, 1], nan_ok=True)  # late, and the one that cannot be read
        monkeypatch.setattr(Server, "failures", 100)
        with pytest.raises(Mistake, match="503"):
            rewards.judge_images(judges, images, ["x"] * 4)
        server.shutdown()


# the scripts, through their own main ---------------------------------------------------------------------------------

TINY_RUN = ["--prompts-per-step", "2", "--group-size", "2", "--save-every", "1"]
TWO = {"c2i": ["--classes", "red circle", "7"], "t2i": ["--prompts", "two circles", "a circle above a square"]}


def test_the_readmes_own_reward_works_as_printed(tmp_path, monkeypatch):
    """It is the first thing that people will change, so it has to work word for word, and pasted in, break no test."""
    section = (HERE / "README.md").read_text().split("## Write your own reward in ten lines")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    flag = re.search(r"--rewards ([^\s`]+)", section)[1]
    monkeypatch.setattr(rewards, "JUDGES", dict(rewards.JUDGES))
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    exec(code, dict(vars(rewards)))  # as if it stood at the end of rewards.py; JUDGES is the only thing it changes
    train.main(["--steps", "1", "--rewards", flag, "--out", str(tmp_path), *TINY_RUN, *TWO["c2i"]])
    assert all(read_metrics(tmp_path)[0][f"{name}_std"] > 0 for name in rewards.parse_rewards(flag))


def test_a_bug_inside_keeps_its_traceback(tmp_path, monkeypatch):
    """A wrong zip of a reader's own once ended as one sentence of the script, without a line number."""

    def buggy(images, prompts):
        return torch.stack([image.mean() for image, _ in zip(images, prompts[:-1], strict=True)])

    monkeypatch.setitem(rewards.JUDGES, "buggy", lambda device, options: buggy)
    with pytest.raises(ValueError, match="shorter") as bug:
        train.main(["--out", str(tmp_path), "--steps", "1", *TINY_RUN, *TWO["c2i"], "--rewards", "buggy"])
    assert not isinstance(bug.value, Mistake) and "buggy" in {frame.name for frame in bug.traceback}


def times(factor, tensors):
    return [factor * x for x in tensors]


@pytest.mark.parametrize("updates", [1, 2])
def test_a_gradient_that_is_not_finite_is_skipped_and_five_end_the_run(updates, tmp_path, monkeypatch):
    """Clipped, it becomes NaN in every weight, and the run goes on drawing noise and saving it. A good one hides it."""
    factors = itertools.cycle([INF, 1][:updates])
    monkeypatch.setattr(train, "draw_grid", lambda *_: None)
    monkeypatch.setattr(train, "look_back", lambda *_: None)
    monkeypatch.setattr(train, "token_logprobs", lambda *a, **k: times(next(factors), token_logprobs(*a, **k)))
    with pytest.raises(SystemExit, match="the gradient was not finite 5 steps in a row"):
        train.main(["--out", str(tmp_path), *TINY_RUN, *TWO["c2i"], "--updates-per-batch", str(updates)])
    policy, base = (torch.load(tmp_path / "state.pt")["policy"], load_model("toy-c2i").state_dict())
    assert len(read_metrics(tmp_path)) == 5 and all(w.isfinite().all() for w in policy.values())
    assert updates == 2 or all(torch.equal(w, base[name]) for name, w in policy.items())


@pytest.mark.parametrize("width", [40, 80, 120, 300])
def test_a_line_on_the_screen_fits(width):
    """A line that wraps hides what comes after it: the paper's eight judges made lines of 350 columns."""
    metrics = dict(step=399, reward=-12.3456, right=0.5, kl=0.1, entropy=7.1, ratio=1.0, grad_norm=0.5)
    metrics |= {f"{name}_{what}": 1 for name in rewards.parse_rewards(train.EIGHT) for what in ("mean", "not_finite")}
    line = train.step_line(metrics, 12.3, width)
    needed = "step  399  reward -12.346  right  50%  8 values missing"
    assert line.startswith(needed) and line.endswith("12.30 s") and len(line) <= max(len(needed) + 9, min(width, 120))
    assert width < 80 or "kl 0.1000" in line  # the judges give way first


def test_judgements_that_are_missing_are_said_to_be(tmp_path, monkeypatch, thin_toys):
    """A mean of 0 for a judge that said nothing would be read as its worst verdict."""
    monkeypatch.setattr(train, "draw_grid", lambda *_: None)
    monkeypatch.setattr(train, "look_back", lambda *_: None)
    for name, values in (("silent", [NAN] * 4), ("loud", [1.0, 3, NAN, INF])):
        monkeypatch.setitem(rewards.JUDGES, name, lambda *_, values=values: lambda *_: torch.tensor(values))
    train.main(["--steps", "1", "--out", str(tmp_path), *TINY_RUN, *TWO["c2i"], "--rewards", "silent=2,loud"])
    (row,) = read_metrics(tmp_path)
    assert "silent_mean" not in row and row["silent_not_finite"] == 4 and np.isfinite(row["reward"])
    assert (row["loud_mean"], row["loud_std"], row["loud_not_finite"]) == (2, 1, 2)
    assert row["equal_groups"] == 0.5  # of 1 and 3, and of two that are missing
    with pytest.raises(SystemExit, match="every value of silent was not finite 5 steps in a row"):  # not to the end
        train.main(["--steps", "9", "--out", str(tmp_path / "2"), *TINY_RUN, *TWO["c2i"], "--rewards", "silent,clip"])


def test_a_grid_says_everything_and_what_it_cannot_say(tmp_path, capsys):
    """The last of eight judges was cut off below each picture, and captions in other scripts were rows of boxes."""
    font = sample.label_font(["a", "\n"], tmp_path)
    said = "\n" + "  ".join(f"{name}\u00a0-0.12" for name in rewards.parse_rewards(train.EIGHT))
    for caption in ("a red circle above a blue square " * 9, "x" * 10_000, "a dog"):
        lines = sample.label_lines("\u2713\u00a0" + caption + said, 128, font)
        assert all(font.getlength(line) <= 128 for line in lines)
        assert "".join("".join(lines).split()).endswith("".join(said.split()))
        assert lines[0].startswith("\u2713\u00a0") and len(lines) <= 4 + 8
        assert lines[3].endswith("...") == (caption != "a dog")
    images, greek = torch.rand(3, 3, 64, 64), ["\u03ba\u03cd\u03ba\u03bb\u03bf\u03c2", "\u062f", "\u732b"]
    sample.save_grid(tmp_path / "a.png", images, greek, 3)
    assert "boxes stand for '\u732b', which" in capsys.readouterr().out  # Greek and Arabic can be drawn
    numbers = torch.arange(10.0)[:, None, None, None].expand(10, 3, 1, 1)
    pictures, labels = sample.in_turn([numbers[:5], numbers[5:]], [list("abcde"), list("vwxyz")], 3)
    assert labels == [*"abc", *"vwx", "d", "e", "", "y", "z", ""]  # base above tuned, line by line; white where none is
    assert pictures[:, 0, 0, 0].tolist() == [0, 1, 2, 5, 6, 7, 3, 4, 1, 8, 9, 1]
    circle = torch.from_numpy(data.render(["a red circle"], np.random.default_rng(0)))
    for model, mark in (("toy-c2i", "\u2713\u00a0"), ("llamagen-b-256", "")):
        assert sample.label_images(model, circle, ["a photo of a red circle"], "x: ") == [f"{mark}x: a red circle"]
    assert sample.label_images("toy-c2i", circle, ["a photo of a blue circle"])[0][:2] == "\u2717\u00a0"


def test_drawing_shows_how_long_it_will_take(capsys):
    """Minutes without a sign of life; or a bar that stays after it, and counts only some of the batches."""
    model, tokenizer, encode = load_model("toy-c2i"), load_tokenizer("toy-c2i"), load_encoder("toy-c2i")
    totals, update = [], sample.tqdm.update
    for progress in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sample.tqdm, "update", lambda bar, n=1: (totals.append(bar.total), update(bar, n))[1])
            sample.draw(model, tokenizer, encode, [7] * 3, batch_size=2, progress=progress)
        assert ("token/s" in capsys.readouterr().err) == progress
    assert totals[:128] == [128] * 128 and not model.norm._forward_hooks


def test_the_best_of_n_is_the_judges_best_and_best_of_1_is_what_it_was():
    """Candidates of the picture beside, or the same ones in every batch; a missing value that wins; the worst of N."""
    model, tokenizer, encode = load_model("toy-c2i"), load_tokenizer("toy-c2i"), load_encoder("toy-c2i")
    asked, weights = [3, 3, 7, 0], dict(bright=1.0, red=0.5)
    red = lambda images: torch.where(images[:, 0].mean((1, 2)) > 0.3, NAN, images[:, 0].mean((1, 2)))  # noqa: E731
    judges = dict(both=lambda images, prompts: dict(bright=images.mean((1, 2, 3)), red=red(images)))
    captions, model_and_more = zoo.captions_of("toy-c2i", asked), (model, tokenizer, encode)
    plain = sample.draw(*model_and_more, asked, 5, first=2)
    drawn = [plain, *(sample.draw(*model_and_more, asked, (5, sample.CANDIDATE, j), first=2) for j in (1, 2))]
    for k, noise in ((0, image_noise([2], 64, 5)), (1, image_noise([2], 64, 5, sample.CANDIDATE, 1))):
        tokens, _ = model.generate(*encode(asked[:1]), noise=noise)
        assert torch.equal(tokens[0], drawn[k][1][0])
    images, tokens = sample.draw_best(3, judges, weights, captions, *model_and_more, asked, 5, first=2, batch_size=3)
    chosen = set()
    assert sum(int(red(x).isnan().sum()) for x, _ in drawn) in range(1, 12)  # some are missing, and not all
    for k in range(4):
        candidates = [x[k] for x, _ in drawn]
        mean = statistics.fmean([v for v in (float(red(x[None])) for x in candidates) if math.isfinite(v)] or [0])
        worth = [float(x.mean()) + 0.5 * (v if math.isfinite(v := float(red(x[None]))) else mean) for x in candidates]
        best = worth.index(max(worth))
        chosen.add(best)
        assert torch.equal(tokens[k], drawn[best][1][k]) and (images[k] - candidates[best]).abs().max() < 1e-4
    assert len(chosen) > 1  # the toy's pictures: not always the first, or the last
    one = sample.draw_best(1, judges, weights, captions, *model_and_more, asked, 5, first=2)
    assert all(torch.equal(a, b) for a, b in zip(one, plain, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_evaluate_the_best_that_one_finds(tmp_path, monkeypatch, thin_toys):
    """Each choosing by its own half of the values; a column that does not say that it is a best of N."""
    monkeypatch.chdir(tmp_path)
    flags = "--num 6 --batch-size 2 --cfg-scale 1 --best-of 2 --npz {0} --out {0}/table"
    for name, processes in (("one", 1), ("two", 2)):
        run = partial(evaluate.main, flags.format(name).split())
        assert in_children(tmp_path, *[run] * processes) == [0] * processes, (tmp_path / "said-0").read_text()
    one, two = (np.load(f"{name}/base-cfg-1-best-of-2.npz")["arr_0"].astype(int) for name in ("one", "two"))
    found = json.loads(Path("one/table.json").read_text())
    assert abs(one - two).max() <= 1 and found["best_of"] == 2 and "base, cfg 1, best of 2" in found["columns"]
    args = ["--num", "1", "--classes", "0", "1", "2", "3", "4", "5", "--npz"]
    sample.main([*args, "plain.npz"])
    sample.main([*args, "best.npz", "--best-of", "2"])
    plain, best = (np.load(name)["arr_0"].astype(int) for name in ("plain.npz", "best.npz"))
    assert abs(best - one).max() <= 1 and abs(plain - one).max() > 1  # the same judges, weights and random numbers


def test_half_a_policy_is_half_way_from_its_base(tmp_path):
    """The wrong end: with little of the run kept, pictures of most of it."""
    base = {name: value.float() for name, value in load_file(MODELS["toy-c2i"].ckpt).items()}
    save_file({name: value * 3 for name, value in base.items()}, tmp_path / "tuned.safetensors")
    for share, scale in ((1, 3), (0.25, 1.5), (0, 1)):
        model = load_model("toy-c2i", tmp_path / "tuned.safetensors")
        zoo.blend(model, "toy-c2i", MODELS["toy-c2i"].ckpt, share)
        assert all(torch.allclose(value, base[name] * scale) for name, value in model.state_dict().items())


def test_downloads_are_of_the_commit_that_the_table_names(tmp_path, monkeypatch):
    """Whoever can write to a repository could otherwise put another file in the place of the one we looked at."""
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *where, **at: asked.append((where, at)) or tmp_path)
    for name in ("hps", "maniqa"):
        zoo.find_file(zoo.JUDGE_FILES[name])
        (_, file), at = asked.pop()
        assert re.fullmatch("[0-9a-f]{40}", at["revision"]) and zoo.JUDGE_FILES[name].endswith(f"/{file}")
    assert re.fullmatch("[0-9a-f]{40}", rewards.QWEN_REVISION)
    place, at = zoo.folder_or_repo(zoo.FLAN_T5_XL)
    assert place == "google/flan-t5-xl" and re.fullmatch("[0-9a-f]{40}", at["revision"])
    assert zoo.folder_or_repo(tmp_path) == (tmp_path, {}) and zoo.hub_place("hf:a/b@c/d/e") == ("a/b", "c", "d/e")
    for wrong in ("a", "hf:a/b@", "a/b@c@d"):
        with pytest.raises(Mistake, match="OWNER/REPO"):
            zoo.hub_place(wrong)


def test_every_policy_is_asked_as_it_was_trained(tmp_path, monkeypatch):
    """Were the first --ckpt's padding everyone's, the base's figures would depend on what it is compared with."""
    monkeypatch.chdir(tmp_path)
    header = dict(format="pt", model="toy-t2i", step="1", tokenizer=zoo.tokenizer_hash("toy-t2i"))
    for pad in ("left", "right"):
        save_file(load_file(MODELS["toy-t2i"].ckpt), f"{pad}.safetensors", metadata=header | dict(text_pad=pad))
    for order in (["left", "right"], ["right", "left"]):
        flags = ["--ckpt", *(f"{pad}.safetensors" for pad in order), "--rewards", "clip"]
        assert [pad for _, _, pad in evaluate.parse_args(flags).policies] == ["left", *order]


@pytest.mark.parametrize("task", ["c2i", "t2i"])
def test_train_sample_and_evaluate_run(task, tmp_path, monkeypatch, capfd):
    """Each part works alone before files, names and headers have met; this is where they meet."""
    monkeypatch.setattr(train, "SAMPLE_EVERY", 2)
    run = tmp_path / "run"
    train.main(["--task", task, "--steps", "2", "--out", str(run), "--updates-per-batch", "2", *TINY_RUN, *TWO[task]])
    for file in (
        "before.png",
        "after.png",
        "before-after.png",
        "curves.png",
        "policy.safetensors",
        "state.pt",
        "events*",
        "samples/*.png",
    ):
        assert list(run.glob(file)), file
    assert len({file.stat().st_mode for file in run.iterdir() if file.is_file()}) == 1  # safetensors' are for the owner
    assert zoo.find_policy(run)[2]["text_pad"] == "left"  # our default, whatever the release does
    first, second = read_metrics(run)
    assert (first["step"], second["step"]) == (0, 1) and first["sampler_gap"] < 1e-4
    assert first["kl"] > 0 and first["ratio"] != 1  # the second update of a batch scores a policy that has moved
    assert_the_glossary_explains(first, ["clip", "realism"])
    png, npz = str(tmp_path / "s.png"), str(tmp_path / "s.npz")
    capfd.readouterr()
    sample.main(["--ckpt", str(run), "--compare", "--num", "1", "--out", png, "--npz", npz, "--quiet"])
    assert capfd.readouterr() == ("", "")  # also of libraries and progress bars
    drawn = np.load(npz)
    assert drawn["arr_0"].dtype == np.uint8 and drawn["arr_0"].shape[1:] == drawn["tokens"].shape[1:] + (64, 3)
    evaluate.main(["--ckpt", str(run), "--num", "48", "--cfg-scale", "1", "--quiet"])
    assert capfd.readouterr() == ("", "")
    columns = json.loads((run / "evaluation.json").read_text())["columns"]
    assert list(columns) == ["base, cfg 1", "tuned, cfg 1", "renders, round trip"]
    base = columns["base, cfg 1"]
    assert columns["renders, round trip"]["right: all"] > 0.9 and base["recall, latents"] > 0
    total = base["reward: clip"] + 0.25 * base["reward: realism"]  # what the run was trained by
    assert base["reward: weighted sum"] == pytest.approx(total, rel=1e-6)


def test_the_page_of_a_run_is_whole_safe_and_small(tmp_path, thin_toys):
    """A picture by its path opens on one machine only; a prompt may hold markup, and a page runs what it holds."""
    prompt = "<script>alert(1)</script>"
    run = tmp_path / "run"
    train.main(["--steps", "2", "--out", str(run), *TINY_RUN, *TWO["t2i"], "--task", "t2i"])
    (run / "flags.json").write_text(json.dumps(dict(prompts=prompt)))
    evaluate.main(["--ckpt", str(run), "--num", "48", "--cfg-scale", "1"])
    report.main([str(run)])
    text = (run / "report.html").read_text()
    assert prompt not in text and html.escape(prompt) in text and len(text) < 5e6
    assert set(re.findall(r"""(?:src=["']|url\(')([^"']{11})""", text)) == {"data:image/"} and "http" not in text
    assert text.count("<svg") > 12 and "renders, round trip" in text and text.count('class="frame"') == 2
    report.main([str(run), str(run)])  # two runs with equal flags: one line
    assert "reward against KL" in (tmp_path / "compare.html").read_text()
    report.main([str(run / "evaluation.json"), "--out", str(tmp_path / "frontier.png")])
    assert Image.open(tmp_path / "frontier.png").width > 1000
    with pytest.raises(SystemExit, match=r"ends in \.png"):
        report.main([str(run / "evaluation.json"), "--out", str(tmp_path / "frontier")])
    table = json.loads((run / "evaluation.json").read_text())  # less what only a toy's table says
    for figures in [*table["columns"].values(), *table["standard_errors"].values()]:
        figures.pop("right: all", None)
    (tmp_path / "official.json").write_text(json.dumps(table))
    shutil.copytree(run, broken := tmp_path / "broken")
    for name, text in (("flags.json", "{bad"), ("evaluation.json", "[1]"), ("metrics.jsonl", "null")):
        whole = (broken / name).read_text()
        (broken / name).write_text(text)
        with pytest.raises(SystemExit, match=rf"{name} cannot be read"):
            report.main([str(broken)])
        (broken / name).write_text(whole)
    report.main([str(broken)])
    with pytest.raises(SystemExit, match="how many pictures are right"):
        report.main([str(tmp_path / "official.json")])
    with pytest.raises(SystemExit, match=r"metrics\.jsonl"):
        report.main([str(tmp_path)])


def test_the_frontier_has_the_tuned_policies_or_else_the_base_and_each_its_own_figures():
    """The base drawn as if it were the policy; the mean over seeds drawn beside the seeds; the error of another."""
    mean, base, settings = {"right: all": 0.9}, {"right: all": 0.4}, ("cfg 1", "cfg 2, best of 4")
    columns = {f"base, {setting}": base for setting in settings}
    errors = {column: {"right: all": 0.01 * k} for k, column in enumerate(columns)}
    found = report.points_of(dict(tuned=[], columns=columns, standard_errors=errors))
    assert found == [("cfg 1", {"right: all": (0.4, 0)}), ("cfg 2, best of 4", {"right: all": (0.4, 0.01)})]
    columns = {"base, cfg 1": base, "tuned 1, cfg 1": mean, "tuned 2, cfg 1": base, "mean of 2, cfg 1": mean}
    errors = {column: {"right: all": 0.01 * k} for k, column in enumerate(columns)}
    paths = ["out/a/policy.safetensors", "out/b/policy.safetensors"]
    found = report.points_of(dict(tuned=paths, columns=columns, standard_errors=errors))
    assert found == [("a", {"right: all": (0.9, 0.01)}), ("b", {"right: all": (0.4, 0.02)})]
    columns = {"base, cfg 1": base, "tuned, cfg 1": mean, "base, cfg 2": base, "tuned, cfg 2": base}
    table = dict(tuned=paths[:1], columns=columns, standard_errors={column: {"right: all": 0.1} for column in columns})
    assert [name for name, _ in report.points_of(table)] == ["a, cfg 1", "a, cfg 2"]


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium, to move the page's sliders")
def test_the_sliders_of_the_page_move_in_a_browser(tmp_path):
    """A slider that shows the same picture at every moment looks like a policy that never changed."""
    train.main(["--steps", "2", "--out", str(tmp_path), *TINY_RUN, *TWO["c2i"]])
    text = (tmp_path / "report.html").read_text()
    move = """<script>const all = [];
        for (const box of document.querySelectorAll('[data-slides], [data-writer]')) {
          const slider = box.querySelector('input');
          for (const value of [0, slider.max]) { slider.value = value; slider.oninput();
            all.push(box.querySelector('b').textContent, box.querySelectorAll('.slide:not([hidden])').length,
              box.querySelector('.words')?.textContent.match(/[0-9]+/g)?.length ?? 0,
              getComputedStyle(box.querySelector('.frame') ?? box).backgroundPosition) } }
        document.title = JSON.stringify([all, document.documentElement.scrollWidth]);</script>"""
    (tmp_path / "moved.html").write_text(text + move)
    for width in (1280, 500):  # headless chromium is never narrower than 500 px
        command = [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--window-size={width},900",
            "--dump-dom",
        ]
        found = subprocess.run([*command, f"file://{tmp_path}/moved.html"], capture_output=True, text=True, timeout=120)
        found, wide = json.loads(html.unescape(re.search("<title>(.*?)</title>", found.stdout)[1]))
        assert found == [
            "before",
            1,
            0,
            "0% 0%",
            "after",
            1,
            0,
            "0% 0%",
            "base",
            0,
            0,
            "0% 0%",
            "base",
            0,
            64,
            "0% 100%",
        ]
        assert wide <= width


def fork(function, said=os.devnull):
    """Runs it in a forked process, which has imported everything already; what it says goes to a file."""
    if (process := os.fork()) == 0:
        status = 1
        try:
            sys.stdout = sys.stderr = open(said, "w", buffering=1)  # noqa: SIM115, closed by the end of the process
            function()
            status = 0
        except SystemExit as error:
            print(error, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return process


def in_child(function, said=os.devnull):
    """The exit status of function() in a forked process; what it says goes to a file."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(function, said), 0)[1])


def in_children(said, *functions):
    """The exit statuses of functions, each in a process of its own that torchrun would have started; said: a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    names = dict(WORLD_SIZE=str(len(functions)), MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_RUN_ID="test")

    def member(k, function):
        os.environ.update(names | dict(RANK=str(k), LOCAL_RANK=str(k)))
        function()

    return at_once(said, *(partial(member, k, function) for k, function in enumerate(functions)))


def at_once(said, *functions):
    """The exit statuses of functions, each in a forked process; what they say goes to files in the folder `said`."""
    processes = [fork(function, said / f"said-{k}") for k, function in enumerate(functions)]
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def with_events(happen, function):
    """function(), with happen(file or None) called between the stages of a step and before, amid and after each write."""
    lap, replace, write = train.Clock.lap, os.replace, train.Log.write

    def slow_replace(old, new):  # a file that is half written is what a kill in the middle of writing leaves
        if ".tmp" in Path(old).name:
            whole = Path(old).read_bytes()
            Path(old).write_bytes(whole[: len(whole) // 2])
            happen(old)
            Path(old).write_bytes(whole)
        happen(old)
        replace(old, new)
        happen(new)

    def wrapped(original):
        return lambda *args, **kwargs: (happen(None), original(*args, **kwargs), happen(None))[1]

    os.replace, train.Clock.lap, train.Log.write = slow_replace, wrapped(lap), wrapped(write)
    function()


def outcome(folder):
    """All that a run leaves: weights and pictures as bytes, metrics but for their seconds."""
    files = [folder / name for name in ("policy.safetensors", "before.png", "after.png", "before-after.png")]
    return [path.read_bytes() for path in files], read_metrics(folder)


def go_on_without_a_page(flags, out):
    """train.main(flags), with --resume where there is a save, less the curves and the page, which take half the time."""
    train.plot_curves = report.writers = report.write_run = lambda *_, **__: None
    train.main([*flags, *["--resume"] * any((out / name).exists() for name in train.STATES)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_is_killed_anywhere_continues_as_if_it_had_never_stopped(tmp_path, thin_toys):
    """
    Killed during its first save, a run could neither be resumed nor begun anew; without optimizer, learning rate or
    random state a resumed curve only looks the same.
    """
    flags = ["--steps", "3", "--save-every", "2", "--prompts-per-step", "1", "--group-size", "2", *TWO["c2i"]]
    train.main([*flags, "--steps", "1", "--out", str(tmp_path / "warm-up")])  # imports what children then share
    with_whole = [*flags, "--out", str(tmp_path / "whole")]
    count = lambda file: (tmp_path / "events").open("a").write(".")  # noqa: E731
    assert in_child(lambda: with_events(count, lambda: train.main(with_whole))) == 0
    total, whole = len((tmp_path / "events").read_text()), outcome(tmp_path / "whole")
    points = range(0, total, max(1, total // int(os.environ.get("KILLS", 22))))
    assert len(points) >= 20

    def kill_at(points):
        for point in points:
            out, events = tmp_path / f"killed-{point}", []

            def kill(file, events=events, point=point):
                events.append(file)
                if len(events) > point:
                    os.kill(os.getpid(), signal.SIGKILL)

            run = [*flags, "--out", str(out)]
            assert in_child(lambda run=run, kill=kill: with_events(kill, lambda: train.main(run))) == -signal.SIGKILL
            assert in_child(partial(go_on_without_a_page, run, out)) == 0, point
            assert outcome(out) == whole, point

    halves = [partial(kill_at, points[k::2]) for k in (0, 1)]  # a core each
    assert at_once(tmp_path, *halves) == [0, 0], "".join((tmp_path / f"said-{k}").read_text() for k in (0, 1))


def assert_same_weights(one, two):
    """To 1e-5, except the few in 100,000 whose gradient is little more than rounding: AdamW divides by its size, so that
    these may go one way here and the other there, by the rate (2e-4) in each of the three steps."""
    gap = torch.cat([(one[name] - two[name]).abs().flatten() for name in one])
    assert (gap > 1e-5).double().mean() < 1e-4 and gap.max() < 2 * 3 * 2e-4


def train_and_hash(flags, folder):
    """train.main(flags) that appends to a file what this process's weights are at each save."""
    save = train.save

    def and_hash(args, policy, *rest):
        weights = parallel.whole(policy.state_dict()).values()
        sums = [hashlib.sha256(w.numpy().tobytes()).hexdigest() for w in weights]
        with open(folder / f"weights-{parallel.rank()}", "a") as file:
            file.write(f"{sums}\n")
        save(args, policy, *rest)

    train.save = and_hash
    train.main(flags)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("task, cfg", [("c2i", 1), ("t2i", 1), ("t2i", 2)])
def test_two_processes_train_what_one_trains(task, cfg, tmp_path, monkeypatch, thin_toys):
    """Each learning for itself, groups cut in two, noise by local index, a loss that is averaged twice or never."""
    monkeypatch.setattr(train, "look_back", lambda *_: None)  # curves and page take half the time; children share this
    flags = ["--task", task, "--steps", "3", "--prompts-per-step", "2", "--group-size", "3", "--micro-batch", "3"]
    flags += ["--cfg-scale", str(cfg)]
    train.main([*flags, "--out", str(tmp_path / "one")])
    one, metrics = load_file(tmp_path / "one/policy.safetensors"), read_metrics(tmp_path / "one")
    ways = {"plain": [], "sharded": ["--shard"]} if cfg == 1 else {"sharded": ["--shard"]}
    for name, more in ways.items():
        out = tmp_path / name
        out.mkdir()
        run = partial(train_and_hash, [*flags, *more, "--save-every", "1", "--out", str(out)], out)
        assert in_children(out, run, run) == [0, 0], (out / "said-0").read_text() + (out / "said-1").read_text()
        first, second = ((out / f"weights-{k}").read_text() for k in (0, 1))
        assert first == second and len(first.splitlines()) == 3
        assert (out / "said-1").read_text() == ""
        assert_same_weights(one, load_file(out / "policy.safetensors"))
        for row, expected in zip(read_metrics(out), metrics, strict=True):
            assert row == pytest.approx(expected, rel=1e-3, abs=2e-5)
        pictures = [np.asarray(Image.open(folder / "before.png")).astype(int) for folder in (tmp_path / "one", out)]
        assert abs(pictures[0] - pictures[1]).max() <= 1  # 24 or 40 pictures, of which each process drew half


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_of_which_one_is_killed_end_and_go_on_as_any_number(tmp_path, monkeypatch, thin_toys):
    """A process that waits for a dead one for ever, or a state that only as many processes can read."""
    monkeypatch.setattr(train, "look_back", lambda *_: None)
    flags = ["--steps", "3", "--save-every", "1", "--prompts-per-step", "2", "--group-size", "2", "--classes", "7", "8"]
    whole = tmp_path / "whole"
    train.main([*flags, "--out", str(whole)])
    one = load_file(whole / "policy.safetensors")
    for k, point in enumerate(range(12, 48, 36 // min(36, int(os.environ.get("KILLS", 6))))):
        out, events, start = tmp_path / f"killed-{point}", [], time.monotonic()
        run = partial(train.main, [*flags, "--out", str(out)])

        def kill(file, events=events, point=point):
            events.append(file)
            if len(events) > point:
                os.kill(os.getpid(), signal.SIGKILL)

        killed = partial(with_events, kill, run)
        victims = [(run, killed), (killed, run), (killed, killed)][k % 3]
        out.mkdir()
        statuses = in_children(out, *victims)
        assert time.monotonic() - start < 30
        for victim, status, place in zip(victims, statuses, ("said-0", "said-1"), strict=True):
            alone = 1 if victims.count(killed) == 2 else -signal.SIGKILL  # the second to die may notice the first
            assert status in ((-signal.SIGKILL, alone) if victim is killed else (1,)), statuses
            assert victim is killed or "another process of this run has ended" in (out / place).read_text()
        again = partial(go_on_without_a_page, [*flags, "--out", str(out)], out)
        if k % 2:
            assert in_child(again) == 0
        else:
            assert in_children(out, again, again) == [0, 0]
        assert_same_weights(one, load_file(out / "policy.safetensors"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_full_disk_leaves_no_cut_pictures(tmp_path):
    """A cut npz looks like a result. The limit on a file's size stands in for the disk's end."""

    def short_of_room(megabytes, function):
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(megabytes * 1e6),) * 2)
        try:
            function()
        except SystemExit as error:
            (tmp_path / "said").write_text(str(error))
            raise

    picture, npz = tmp_path / "a.png", tmp_path / "a.npz"
    for size, file in ((0.001, npz), (0.001, picture)):
        asked = ["--num", "1", "--classes", "7", "--out", str(picture), *["--npz", str(npz)] * (file == npz)]
        assert in_child(lambda asked=asked, size=size: short_of_room(size, lambda: sample.main(asked))) == 1
        assert not list(tmp_path.glob("a.*")) and f"{file} could not be written" in (tmp_path / "said").read_text()


def test_a_save_that_is_damaged_gives_way_to_the_one_before(tmp_path, capsys, monkeypatch, thin_toys):
    """A flipped bit of state.pt is another policy, and nothing would tell; a cut one would end the run for good."""
    monkeypatch.setattr(train, "draw_grid", lambda *_: None)
    monkeypatch.setattr(train, "look_back", lambda *_: None)
    flags = ["--out", str(tmp_path), "--steps", "3", *TINY_RUN, *TWO["c2i"]]
    train.main(flags)
    whole, states = (tmp_path / "policy.safetensors").read_bytes(), [tmp_path / name for name in train.STATES]
    newest, rng = states[0].read_bytes(), np.random.default_rng(0)
    for case in range(6):
        damaged = bytearray(newest)
        if case < 4:
            damaged[rng.integers(len(newest) // 4, len(newest) // 2)] ^= 1 << int(rng.integers(8))
        states[0].write_bytes(damaged if case < 4 else newest[: len(newest) * case // 6])
        before = states[1].read_bytes()
        capsys.readouterr()
        train.main([*flags, "--resume"])
        assert "going on from the save before" in capsys.readouterr().out
        assert (tmp_path / "policy.safetensors").read_bytes() == whole and len(read_metrics(tmp_path)) == 3
        states[1].write_bytes(before)
    other = torch.load(io.BytesIO(newest))
    other["policy"].popitem()
    torch.save(other, states[0])
    with pytest.raises(SystemExit, match="is of another model"):
        train.main([*flags, "--resume"])
    for state in states:
        state.write_bytes(newest[:1000])
    with pytest.raises(SystemExit, match=r"state-before\.pt cannot be read"):
        train.main([*flags, "--resume"])


# What goes wrong amid a run of two steps, each of which is saved: a signal at a moment, or a fault. A moment is the
# k-th event of that name (with_events).
FAULT_RUN = ["--steps", "2", "--save-every", "1", "--prompts-per-step", "1", "--group-size", "2", *TWO["c2i"]]
MOMENTS = {
    "at the start": ("flags.json", 1),
    "amid the first picture": ("before.tmp.png", 1),
    "in a step": ("lap", 5),
    "amid a save": ("state.tmp.pt", 1),
    "amid the last save": ("state.tmp.pt", 3),  # twice for each: amid and after its writing
}
DIE_OF = zoo.die_of


def bright(images, prompts):
    return images.mean((1, 2, 3))


def begin_faulty(flags, event, k, act, judge=bright):
    """In a child: train.main(flags) with act() at the k-th event of a name, judged by `judge`; draws what it must."""
    seen = []

    def happen(file):
        seen.append(Path(file).name if file else "lap")
        if seen[-1] == event and seen.count(event) == k:
            act()

    zoo.die_of, rewards.JUDGES["bright"] = DIE_OF, lambda device, options: judge
    train.look_back = lambda *_: None
    if event != "before.tmp.png":
        train.draw_grid = lambda *_: None
    with_events(happen, lambda: train.main([*flags, "--rewards", "bright"]))


def last_line(said):
    """The last line in the file `said` that is no progress bar."""
    lines = re.split(r"[\r\n]|step/s\]|s/step\]", said.read_text())
    return [line for line in lines if line.strip() and "%|" not in line][-1]


def finish(out):
    """The exit status of the command that begins the run in `out`, or goes on with it; nothing goes wrong."""
    flags = [*FAULT_RUN, "--out", str(out), *["--resume"] * any((out / name).exists() for name in train.STATES)]
    return in_child(partial(begin_faulty, flags, None, 0, None))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """What FAULT_RUN leaves when nothing goes wrong: (the policy's bytes, metrics)."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    with pytest.MonkeyPatch.context() as patch:  # in this process, so that all children have imported everything
        patch.setitem(rewards.JUDGES, "bright", lambda device, options: bright)
        patch.setattr(train, "look_back", lambda *_: None)
        train.main([*FAULT_RUN, "--rewards", "bright", "--device", "cpu", "--out", str(out)])
    return (out / "policy.safetensors").read_bytes(), read_metrics(out)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["INT", "TERM", "HUP"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_ends_the_step_saves_and_ends_the_process_as_itself(moment, number, tmp_path, unbroken):
    """A shell loop around the script goes on if Ctrl-C ends in an exit status; a scheduler's TERM once lost the steps."""
    out, said = tmp_path / "run", tmp_path / "said"
    run = partial(begin_faulty, [*FAULT_RUN, "--out", str(out)], *MOMENTS[moment], lambda: os.kill(os.getpid(), number))
    assert in_child(run, said) == -number and "Traceback" not in said.read_text()
    begun = moment not in ("at the start", "amid the first picture")
    assert last_line(said).endswith("with --resume" if begun else "nothing was saved")
    assert (out / "state.pt").exists() == begun
    if begun:
        steps = 1 if moment == "in a step" else 2
        assert torch.load(out / "state.pt")["step"] == len(read_metrics(out)) == steps


def wait_for_nobody(images, prompts):
    """A judge that asks a server which never answers, and Ctrl-C half a second later; the second time it is asked."""
    if not hasattr(wait_for_nobody, "asked"):
        wait_for_nobody.asked = socket.create_server(("127.0.0.1", 0))
        return bright(images, prompts)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    url, n = f"http://127.0.0.1:{wait_for_nobody.asked.getsockname()[1]}", len(images)
    return torch.tensor(
        rewards.ask_server((images * 255).byte(), ["?"] * n, [rewards.YES_NO] * n, url, "m", "json", 99)
    )


def interrupted_twice():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1.1)  # torchrun repeats a signal within a second
    os.kill(os.getpid(), signal.SIGINT)


def interrupted_while_it_ends():
    zoo.die_of = lambda *_: os.kill(os.getpid(), signal.SIGINT)  # the second one comes before the last sentence
    os.kill(os.getpid(), signal.SIGINT)


def no_room(*_, **__):
    raise OSError(28, "No space left on device")


def fill_events():
    from tensorboard.summary.writer.record_writer import RecordWriter

    RecordWriter.write = no_room


def fill_disk(name):
    """What makes the disk full as soon as `name` is written in the folder of the run."""
    return lambda out: (out.mkdir(exist_ok=True), (out / name).symlink_to("/dev/full"))[1]


def stuff_policy(_):
    zoo.save_file = no_room  # it replaces a link


def hold(out):
    out.mkdir()
    hold.file = zoo.lock(out)


def forbid(out):
    """A folder in which nobody may write; root may everywhere, so the process becomes another user's."""
    out.mkdir()
    out.chmod(0o555)
    if os.geteuid() == 0:
        os.chmod(out.parent, 0o755)
        os.seteuid(65534)


# name: (what is there before, and may return flags; event; what happens then; judge; exit status; a part of the last line)
FAULTS = {
    "full disk, flags": (fill_disk("flags.tmp.json"), None, None, bright, 1, "flags.json could not be written"),
    "full disk, picture": (
        fill_disk("before.tmp.png"),
        ("before.tmp.png", 9),
        None,
        bright,
        1,
        "before.png could not be",
    ),
    "full disk, metrics": (
        None,
        ("lap", 1),
        fill_disk("metrics.jsonl"),
        bright,
        1,
        "metrics.jsonl could not be written",
    ),
    "full disk, events": (None, ("lap", 1), lambda _: fill_events(), bright, 1, "events* could not be written"),
    "full disk, first save": (fill_disk("state.tmp.pt"), None, None, bright, 1, "state.pt could not be written"),
    "full disk, second save": (
        None,
        ("lap", 15),
        fill_disk("state.tmp.pt"),
        bright,
        1,
        "state.pt could not be written",
    ),
    "full disk, policy": (stuff_policy, None, None, bright, 1, "policy.safetensors could not be written"),
    "read-only": (forbid, None, None, bright, 1, "could not be written"),
    "a file": (lambda out: out.touch(), None, None, bright, 1, "File exists"),
    "locked": (hold, None, None, bright, 1, "another run is writing to"),
    "vanishes": (None, ("lap", 15), shutil.rmtree, bright, 1, "metrics.jsonl could not be written"),
    "judge, too few": (None, None, None, lambda images, _: [1.0], 1, "what the judge 'bright' returned"),
    "judge, hangs": (
        lambda _: ["--save-every", "9"],
        None,
        None,
        wait_for_nobody,
        -signal.SIGINT,
        "goes on from the last save",
    ),
    "signal amid the end": (
        None,
        ("before.tmp.png", 1),
        lambda _: interrupted_while_it_ends(),
        bright,
        -signal.SIGINT,
        "writing to",
    ),
    "second signal": (None, ("lap", 17), lambda _: interrupted_twice(), bright, -signal.SIGINT, "the last save"),
}


@pytest.mark.skipif(not hasattr(os, "fork") or not Path("/dev/full").exists(), reason="needs fork and /dev/full")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_in_one_sentence_and_loses_nothing(fault, unbroken):
    """Errors without a file's name, tracebacks of libraries, and runs that can neither be resumed nor begun anew."""
    before, event, act, judge, status, sentence = FAULTS[fault]
    with tempfile.TemporaryDirectory() as folder:  # of all users, as pytest's are not
        out, said = Path(folder) / "run", Path(folder) / "said"

        def child():
            more = before(out) or [] if before else []
            begin_faulty([*FAULT_RUN, "--out", str(out), *more], *(event or (None, 0)), lambda: act(out), judge)

        assert in_child(child, said) == status
        assert sentence in last_line(said) and "Traceback" not in said.read_text()
        if out.is_dir():
            out.chmod(0o755)
            for link in filter(Path.is_symlink, out.iterdir()):  # the disk has room again
                link.unlink()
            saved = torch.load(out / "state.pt")["step"] if (out / "state.pt").exists() else 0
            assert saved == (fault in ("full disk, second save", "judge, hangs", "second signal", "full disk, policy"))
        else:
            out.unlink(missing_ok=True)
        if not (out / "metrics.jsonl").exists():
            return  # nothing had begun
        assert finish(out) == 0
        assert ((out / "policy.safetensors").read_bytes(), read_metrics(out)) == unbroken


def test_ctrl_c_amid_the_imports_says_nothing():
    """A traceback out of torch's files, twenty lines long, for somebody who mistyped a command."""
    command = [sys.executable, "-X", "importtime", HERE / "sample.py"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    next(line for line in process.stderr if line.endswith(" numpy\n"))
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate()[1] and process.returncode == -signal.SIGINT


def test_a_lost_line_of_metrics_is_said_and_the_run_goes_on(tmp_path, capsys, monkeypatch):
    """A blank or cut line, or none at the end, once blocked a run whose weights were whole."""
    monkeypatch.setattr(train, "draw_grid", lambda *_: None)
    monkeypatch.setattr(train, "look_back", lambda *_: None)
    flags = ["--out", str(tmp_path), *TINY_RUN, *TWO["c2i"], "--lr-schedule", "constant", "--steps"]
    train.main([*flags, "2"])
    log = tmp_path / "metrics.jsonl"
    log.write_text("\n{}\n" + log.read_text().splitlines()[1] + '\n{"step": 4, "rew')
    train.main([*flags, "3", "--resume"])
    assert "the lines of 1 of 2 steps are lost" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("name", ["list", "array", "column", "double", "whole", "vandal", "short", "words", "none"])
def test_a_judge_of_ones_own_returns_what_can_be_meant(name):
    """(N, 1) would broadcast to (N, N) in the weighted sum; a judge that edits its pictures would edit everyone's."""
    forms = dict(
        list=lambda v: v.tolist(), array=lambda v: v.numpy(), column=lambda v: v[:, None], double=lambda v: v.double()
    )
    forms |= dict(whole=lambda v: (v * 0).int(), short=lambda v: v[:-1], vandal=lambda v: v)
    forms |= dict(words=lambda v: ["good"] * len(v), none=lambda v: None)
    images = torch.rand(4, 3, 8, 8)
    kept = images.clone()
    mean = lambda images, prompts: (forms[name](images.mean((1, 2, 3))), images.zero_())[0]  # noqa: E731
    if name in ("short", "words", "none"):
        with pytest.raises(Mistake, match="judge 'mine'"):
            rewards.judge_images({"mine": mean}, images, [""] * 4)
        return
    values = rewards.judge_images({"mine": mean}, images, [""] * 4)[0]["mine"]
    assert values.shape == (4,) and values.dtype == torch.float32 and torch.equal(images, kept)
    assert torch.allclose(values, kept.mean((1, 2, 3)) * (name != "whole"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@BOTH
def test_adapters_learn_beside_weights_that_the_reference_shares(config, dtype):
    """A reference that moves with its policy has KL 0 for ever; adapters that are lost on saving save the base."""
    policy, (cond, mask), tokens = tiny(config), tiny_cond(config), torch.randint(24, (4, 9), generator=seeded(1))
    reference = copy.deepcopy(policy, {id(p): p for p in policy.parameters()})

    @torch.no_grad()
    def logits(model):
        with zoo.autocast("cpu", dtype):  # for each call, because it remembers what it has rounded
            return model(cond, tokens, mask)

    before = logits(policy)
    adapters(policy, 2, seeded(2))
    assert torch.equal(logits(policy), before)
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            assert name.startswith("layers.") and name.endswith((".up", ".down"))
            parameter.data += torch.randn(parameter.shape, generator=seeded(3)) / 4
    after, alone = logits(policy), tiny(config)
    alone.load_state_dict(merged(policy.state_dict()))
    moved, rounding = (after - before).abs().max(), 1e-5 if dtype == "float32" else 0.05
    assert moved > 0.1 and (logits(alone) - after).abs().max() < rounding * moved.clamp(min=1)
    assert torch.equal(logits(reference), before)
    assert reference.layers[0].attention.wqkv.weight is policy.layers[0].attention.wqkv.weight


def test_a_run_with_adapters_goes_on_from_its_save_and_saves_plain_weights(tmp_path, monkeypatch):
    """Adapters that a resumed run begins anew, or a policy that no other script can read."""
    monkeypatch.setattr(train, "draw_grid", lambda *_: None)
    monkeypatch.setattr(train, "look_back", lambda *_: None)
    flags = ["--steps", "2", "--lora-rank", "2", "--lr", "3e-3", *TINY_RUN, *TWO["c2i"]]
    train.main([*flags, "--out", str(tmp_path / "a")])
    monkeypatch.setattr(train.Watch, "stops", lambda watch: True)
    monkeypatch.setattr(train.Watch, "go_on", lambda *_: sys.exit("stopped"))
    with pytest.raises(SystemExit):
        train.main([*flags, "--out", str(tmp_path / "b")])
    monkeypatch.undo()
    monkeypatch.setattr(train, "draw_grid", lambda *_: None)
    monkeypatch.setattr(train, "look_back", lambda *_: None)
    train.main([*flags, "--out", str(tmp_path / "b"), "--resume"])
    first, second = ((tmp_path / run / "policy.safetensors").read_bytes() for run in "ab")
    assert first == second
    tuned, base = (
        load_model("toy-c2i", tmp_path / "a/policy.safetensors").state_dict(),
        load_model("toy-c2i").state_dict(),
    )
    moved = {name for name in base if not torch.equal(tuned[name], base[name])}
    assert moved and all(re.fullmatch(r"layers\.\d\.\w+\.w\w+\.weight", name) for name in moved)


def test_a_run_is_not_resumed_with_other_files_or_flags(tmp_path, monkeypatch):
    """Its KL would be to weights that it never began from, or its judge another, and nothing in the log would say so."""
    monkeypatch.setattr(train, "draw_grid", lambda *_: None)
    monkeypatch.setattr(train, "look_back", lambda *_: None)
    base, vq, prompts = (tmp_path / name for name in ("base.safetensors", "vq.safetensors", "prompts.txt"))
    shutil.copytree(HERE / "weights/toy-t5", tmp_path / "t5")
    shutil.copytree(HERE / "weights/toy-clip", tmp_path / "clip")
    shutil.copy(MODELS["toy-t2i"].ckpt, base)
    shutil.copy(MODELS["toy-t2i"].vq_ckpt, vq)
    prompts.write_text("two circles\na circle above a square\n")
    flags = [
        "--task",
        "t2i",
        "--lr-schedule",
        "constant",
        *TINY_RUN,
        "--ckpt",
        base,
        "--vq-ckpt",
        vq,
        "--prompts",
        prompts,
    ]
    flags += [
        "--text-encoder",
        tmp_path / "t5",
        "--clip-model",
        f"local-dir:{tmp_path}/clip",
    ]
    flags = [*map(str, flags), "--rewards", "clip", "--out", str(tmp_path / "run"), "--steps"]
    train.main([*flags, "1"])
    for wrong, sentence in ((["--kl-coef", "0.1"], "--kl-coef is 0.1"), (["--seed", "1"], "--seed is 1")):
        with pytest.raises(SystemExit, match=sentence):
            train.main([*flags, "2", "--resume", *wrong])
    changes = dict(base=base, tokenizer=vq, prompts=prompts)
    changes |= {"text encoder": tmp_path / "t5/config.json", "judge clip": tmp_path / "clip/open_clip_config.json"}
    for name, path in changes.items():
        whole = path.read_bytes()
        binary = path.suffix == ".safetensors"  # which may not be longer than it says: one bit of the last number
        path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:] if binary else whole + b" ")
        with pytest.raises(SystemExit, match=name):
            train.main([*flags, "2", "--resume"])
        path.write_bytes(whole)  # the same content at another time is the same file
    train.main([*flags, "2", "--resume"])


def test_no_reader_takes_rubbish_for_something(tmp_path):
    """200 random damages for each reader: an error in a sentence, or what the whole file says; never a traceback."""
    rng, cases = np.random.default_rng(0), int(os.environ.get("FUZZ", 200))
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2, 2)}
    torch.save(tensors, tmp_path / "w.pt")
    save_file(tensors, tmp_path / "w.safetensors")
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n"two"\n')
    (tmp_path / "p.json").write_text('["one", {"caption": "two"}]')
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    header = dict(format="pt", model="toy-c2i", step="3", cfg_scale="1.5", tokenizer=zoo.tokenizer_hash("toy-c2i"))
    save_file(tensors, tmp_path / "h.safetensors", metadata=header)
    flags, run = dict(lr="0.1"), SimpleNamespace(out=tmp_path)
    state = dict(step=3, flags=flags, files={"base": [1, 2, "x"]}, policy=tensors, optimizer=dict(state={}))
    torch.save(state, tmp_path / "state.pt")
    sample.write_npz(tmp_path / "a.npz", dict(arr_0=np.zeros((2, 8, 8, 3), np.uint8), tokens=np.arange(8)))
    readers = {"w.pt": zoo.read_weights, "w.safetensors": zoo.read_weights, "h.safetensors": zoo.find_policy}
    readers |= {"state.pt": lambda _: train.read_state(run), "a.npz": pretrain.read_tokens}
    readers |= dict.fromkeys(("p.jsonl", "p.json", "p.txt"), data.read_prompts)
    for name, read in readers.items():
        path = tmp_path / name
        whole, expected = path.read_bytes(), read(path)
        for _ in range(cases):
            damaged = bytearray(whole[: rng.integers(len(whole) + 1)] if rng.random() < 0.3 else whole)
            for _ in range(rng.integers(1, 4) if len(damaged) else 0):
                damaged[rng.integers(len(damaged))] = rng.integers(256)
            path.write_bytes(damaged)
            try:
                found = read(path)
            except (Mistake, OSError) as error:
                assert "\n" not in str(error)
                continue
            if name in ("w.pt", "state.pt", "a.npz"):  # checksums: what can be read is whole
                assert repr(found) == repr(expected)
    words = [*rewards.JUDGES, "clip-step", "pyiqa:piqe", "=", ",", " ", "-1", "1e9", "nan", "x", "0", ""]
    for _ in range(cases):
        text = "".join(rng.choice(words, size=rng.integers(1, 9)))
        with contextlib.suppress(Mistake):
            assert all(np.isfinite(weight) for weight in rewards.parse_rewards(text).values())
    log = '{"step": 0, "reward": 1}\n{"step": 1, "reward": 2}\n'
    for _ in range(cases):
        damaged = bytearray(log.encode()[: rng.integers(len(log) + 1)])
        for _ in range(rng.integers(3) if damaged else 0):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        (tmp_path / "m.jsonl").write_bytes(damaged)
        train.keep_metrics(tmp_path / "m.jsonl", 2)
        steps = [json.loads(line)["step"] for line in (tmp_path / "m.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps)) and set(steps) <= {0, 1}


def test_a_stage_that_is_stopped_leaves_the_old_weights(tmp_path, monkeypatch):
    """A text encoder of random weights in the place of the trained one would load without a word."""
    shutil.copytree(HERE / "weights", tmp_path / "weights")
    before = {path: path.read_bytes() for path in (tmp_path / "weights").rglob("*") if path.is_file()}
    monkeypatch.setattr(data, "sample_captions", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    for stage in ("t5", "clip", "t2i"):
        with pytest.raises(SystemExit, match="stopped"):
            pretrain.main(["--stages", stage, "--out", str(tmp_path / "weights")])
    assert all(path.read_bytes() == content for path, content in before.items())


def test_shipped_weights_are_what_their_reports_describe():
    """A stage that was run again, and not the stages after it: the README's figures are of other weights."""
    reports = {path.stem: json.loads(path.read_text()) for path in (HERE / "weights").glob("*.json")}
    assert set(reports) == {"toy-vq", "toy-t5", "toy-c2i", "toy-t2i", "toy-clip", "toy-realism"}
    for name, found in reports.items():  # T5 and CLIP are folders, in their libraries' own form
        (path,) = [*(HERE / "weights").glob(f"{name}.safetensors"), *(HERE / "weights").glob(f"{name}/*.safetensors")]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == found["sha256"] and found["seed"] is not None
    for name in ("toy-c2i", "toy-t2i"):  # room for GRPO, and right samples in most of its groups
        right = reports[name]["figures"]["right, cfg 1"]
        assert 0.4 <= right["all"] <= 0.6 and min(right.values()) >= 0.25
    assert reports["toy-vq"]["figures"]["psnr_db"] >= 29 and reports["toy-vq"]["figures"]["codes_used"] >= 500
    assert sum(p.stat().st_size for p in (HERE / "weights").rglob("*") if p.is_file()) < 20e6


def test_the_readme_holds(tmp_path, monkeypatch):
    """Commands that no longer parse and links to the wrong line are what makes people stop reading."""
    monkeypatch.chdir(tmp_path)  # some commands make their folder while they are parsed
    readme = (HERE / "README.md").read_text()
    links = re.findall(r"\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)", readme)
    assert len(links) > 5
    for name, path, line in links:
        assert name in (HERE / path).read_text().splitlines()[int(line) - 1], f"{name} is not at {path}:{line}"
    commands = re.findall(r"^python (\w+)\.py *(.*?) *(?:#.*)?$", readme, re.MULTILINE)
    assert {"train", "sample", "evaluate", "pretrain", "bench"} <= {script for script, _ in commands}
    for script, flags in commands:
        if script in ("train", "sample", "evaluate") and "--ckpt" not in flags:
            {"train": train, "sample": sample, "evaluate": evaluate}[script].parse_args(shlex.split(flags))


OURS = sorted(path.stem for path in HERE.glob("*.py"))


def test_each_file_imports_only_from_the_floors_below_it():
    """A drawer that everything imports, or a circle: then no file can be read alone."""
    floors, ground = {}, {"data", "model", "tokenizer", "parallel"}
    for name in OURS:
        top = ast.parse((HERE / f"{name}.py").read_text()).body
        found = {node.module for node in top if isinstance(node, ast.ImportFrom)}
        found |= {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        floors[name] = found & set(OURS)
    assert all(floors[name] == set() for name in ground) and floors["grpo"] == {"model"}
    assert floors["metrics"] == set() and all(
        "metrics" not in floors[name] for name in {*OURS} - {"evaluate", "test_grpo"}
    )
    assert (
        floors["zoo"] <= ground
        and floors["rewards"] <= ground | {"zoo"}
        and floors["sample"] <= ground | {"zoo", "rewards"}
    )
    scripts = {"train", "evaluate", "pretrain", "bench"}
    assert all(scripts.isdisjoint(found) for name, found in floors.items() if name != "test_grpo")


@pytest.mark.parametrize("name", OURS)
def test_every_function_fits_a_screen_and_the_loop_a_page(name):
    """People come to read the loop; it grew to 108 lines, a third of them reporting, without anyone deciding that."""
    for node in ast.walk(ast.parse((HERE / f"{name}.py").read_text())):
        if isinstance(node, ast.FunctionDef) or (name == "train" and isinstance(node, ast.For)):
            lines = {part.lineno for part in ast.walk(node) if hasattr(part, "lineno")}  # those on which code begins
            assert len(lines) <= 60, f"line {node.lineno}"


@pytest.fixture(scope="module")
def wrong_files(tmp_path_factory):
    """A folder of files that are not what they are taken for."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "cut.safetensors").write_bytes((HERE / "weights/toy-c2i.safetensors").read_bytes()[:9000])
    torch.save({"model": {"w": torch.zeros(2)}, "code": Path}, folder / "code.pt")
    torch.save({"model": [torch.zeros(2)]}, folder / "list.pt")
    state = load_model("toy-c2i").state_dict()
    torch.save(state | {"extra.weight": torch.zeros(1)}, folder / "extra.pt")
    torch.save({name: w for name, w in state.items() if name != "norm.weight"}, folder / "missing.pt")
    torch.save(state | {"norm.weight": torch.zeros(99)}, folder / "shape.pt")
    torch.save(state | {"norm.weight": torch.full((160,), NAN)}, folder / "nan.pt")
    torch.save(state | {"norm.weight": torch.ones(160, dtype=torch.int64)}, folder / "int.pt")
    torch.save(state | {"norm.weight": torch.empty(160, device="meta")}, folder / "meta.pt")
    torch.save(state | {"norm.weight": torch.ones(160).to_sparse()}, folder / "sparse.pt")
    torch.save(state | {1: torch.zeros(2)}, folder / "key.pt")
    with zipfile.ZipFile(folder / "int.pt") as plain, zipfile.ZipFile(folder / "packed.pt", "w", 8) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "book.txt").write_text("a red banana " * 100_000)
    ours = dict(format="pt", model="toy-c2i", step="1", tokenizer=zoo.tokenizer_hash("toy-c2i"))
    (folder / "foreign").mkdir()
    torch.save(dict(step=1, flags=1, files={}, policy=state, optimizer={}), folder / "foreign/state.pt")
    save_file(state, folder / "header.safetensors", metadata=ours | dict(step="one"))
    save_file(state, folder / "old.safetensors", metadata=ours | dict(tokenizer="another"))
    save_file(state, folder / "ours.safetensors", metadata=ours)
    save_tiny_t5(folder / "narrow", dim=32)
    some = load_file(save_tiny_t5(folder / "gap-t5") / "model.safetensors")
    some.pop("encoder.final_layer_norm.weight")
    save_file(some, folder / "gap-t5/model.safetensors", metadata={"format": "pt"})
    judges = [f"judges/{file}" for file in ("HPS_v2.1_compressed.pt", "Qwen2.5-VL-3B-Instruct/config.json")]
    for path in ("cut.pt", "run/state.pt", "damaged/state.pt", *judges):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"PK\x03\x04 not whole")
    torch.save({"w": torch.zeros(2)}, folder / "judges/ckpt_koniq10k.pt")
    for name, array in dict(objects=np.array([1, "a"], object), float=np.zeros((2, 8, 8, 3), np.float32),
                            first=np.zeros((2, 3, 8, 8), np.uint8), good=np.zeros((2, 8, 8, 3), np.uint8)).items():  # fmt: skip
        np.savez(folder / f"{name}.npz", array)
    np.savez(folder / "other.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    two = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(folder / "labels.npz", two, np.array([1, 999]))
    np.savez(folder / "prompts.npz", arr_0=two, prompts=np.array(["a red circle", "two circles"]))
    whole = (folder / "good.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[:300])
    with zipfile.ZipFile(folder / "short.npz", "w") as file:  # whole as a zip, but the array in it is not
        file.writestr("arr_0.npy", zipfile.ZipFile(folder / "good.npz").read("arr_0.npy")[:-9])
    (folder / "dots").mkdir()
    (folder / "dots/a.b.txt").write_text("a red circle")
    return folder


def test_every_official_form_of_file_loads(tmp_path):
    """Each wrapper seen in the wild holds the very weights that our own files hold, and not those beside them."""
    gpt, vq = load_model("toy-c2i").state_dict(), load_tokenizer("toy-c2i").state_dict()
    noise, used = {name: torch.randn_like(weight) for name, weight in gpt.items()}, torch.zeros(65536)
    three = [("gpt_model.", gpt), ("vq_model.", vq), ("ref_model.", noise)]
    forms = {
        "nested.pt": {"model": gpt, "optimizer": {"step": torch.tensor(3)}, "steps": 5},
        "bare.pt": gpt,
        "freqs.pt": {"model": gpt | {"freqs_cis": torch.zeros(65, 16, 2)}},
        "module.pt": {"module": gpt},
        "state_dict.pt": {"state_dict": {k: v.half() for k, v in gpt.items()}},  # ours are half precision, too
        "both.safetensors": {prefix + k: v for prefix, weights in three for k, v in weights.items()},  # AR-GRPO's
        "vq.pt": {"ema": vq | {"quantize.codebook_used": used}, "model": {k: v + 1 for k, v in vq.items()}},
    }
    for name, content in forms.items():
        (save_file if name.endswith("safetensors") else torch.save)(content, tmp_path / name)
    for load, expected in ((load_model, gpt), (load_tokenizer, vq)):
        for name in {"both.safetensors", "vq.pt"} if load is load_tokenizer else set(forms) - {"vq.pt"}:
            found = load("toy-c2i", tmp_path / name).state_dict()
            assert all(torch.equal(found[k], v) for k, v in expected.items()), name


@pytest.mark.parametrize("name", ["llamagen-b-256", "llamagen-t2i-xl-256"])
def test_the_official_path_end_to_end(name, tmp_path, monkeypatch, capsys):
    """ImageNet's names, T5, the authors' guidance, official files, bfloat16, no verifier: what the toys do not pass."""
    told, row = [], MODELS[name]  # fewer layers and tokens; .ci/run does the same with all of GPT-B
    config = replace(row.config, n_layer=1, n_head=2, dim=64, grid_size=4, caption_dim=64)
    monkeypatch.setitem(MODELS, name, replace(row, config=config))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save({"model": Transformer(config).state_dict() | {"freqs_cis": torch.zeros(17, 16, 2)}}, "gpt.pt")
    vq = VQModel(zoo.VQ_16).state_dict() | {"quantize.codebook_used": torch.zeros(65536)}
    torch.save({"model": vq}, "vq.pt")
    files, pads, cfg = ["--vq-ckpt", "vq.pt"], [], 2
    if config.task == "t2i":
        files, pads, cfg = [*files, "--text-encoder", str(save_tiny_t5(tmp_path / "t5"))], ["--text-pad", "right"], 4
    files += ["--prompts", "a photo of a cat"] if pads else ["--classes", "goldfish"]
    few = ["--prompts-per-step", "1", "--group-size", "2", "--dtype", "bfloat16", "--steps", "1", "--ckpt", "gpt.pt"]
    train.main(["--model", name, *files, *few, *pads, "--rewards", "pyiqa:entropy", "--out", "run"])
    (first,) = read_metrics(tmp_path / "run")
    assert first["kl"] == 0 and first["ratio"] == pytest.approx(1, abs=1e-4) and "right" not in first
    assert first["sampler_gap"] < 0.02  # rounding alone
    # our own checkpoint names its model, its padding and its base, which is not the hub's
    assert zoo.find_policy("run")[2] == dict(
        step=1, text_pad="right" if pads else "left", cfg_scale=cfg, temperature=1, base=str(tmp_path / "gpt.pt")
    )
    sample.main(["--ckpt", "run", "--compare", "gpt.pt", *files, "--num", "2", "--npz", "new/a.npz"])
    said = capsys.readouterr().out
    assert f"cfg {cfg}" in said and "6 pictures" in said  # a policy is drawn from as it was trained
    found = np.load("new/a.npz")
    assert found["arr_0"].shape == (2, 64, 64, 3) and len(found["prompts" if pads else "labels"]) == 2
    evaluate.main(["--ckpt", "run", *files, "--num", "2", "--rewards", "pyiqa:entropy"])
    columns = json.loads(Path("run/evaluation.json").read_text())["columns"]
    assert set(columns) == {f"{policy}, cfg {scale}" for policy in ("base", "tuned") for scale in (1, cfg)}
    assert all(set(figures) == {"reward: pyiqa:entropy", "entropy"} for figures in columns.values())
    # the paper's settings: scored without the guidance that it samples with, so another policy is scored
    listener = lambda images, prompts: told.extend(prompts) or images.mean((1, 2, 3))  # noqa: E731
    monkeypatch.setitem(rewards.JUDGES, "listener", lambda device, options: listener)
    monkeypatch.setattr(train, "look_back", lambda *_: None)
    preset = ["--preset", f"paper-{config.task}", "--model", name, "--rewards", "listener", "--out", "paper"]
    train.main([*preset, *files, *few])
    assert set(told) == {"a photo of a cat" if pads else "a photo of goldfish, Carassius auratus"}  # WordNet's
    (paper,) = read_metrics(tmp_path / "paper")
    assert paper["lr"] == 1e-5 and paper["kl"] == 0 and paper["sampler_gap"] > 2 * first["sampler_gap"]


def test_presets_are_the_releases_and_the_command_line_wins():
    """A knob that a preset forgets is ours, and then it is not the paper's run."""
    args = train.parse_args(["--preset", "paper-c2i"])
    assert (args.model, args.steps, args.prompts_per_step, args.group_size) == ("llamagen-xl-384", 400, 4, 8)
    assert (args.lr, args.kl_coef, args.cfg_scale, args.score_cfg, args.lr_schedule) == (1e-5, 0.1, 2, 1, "constant")
    assert args.judge_weights["clip"] == 5 and args.judge_weights["qwen-odd"] == 0.25 and len(args.judge_weights) == 8
    assert (args.adam_beta2, args.qwen_answer, args.judge_options["clip_pretrained"]) == (0.999, "json", "openai")
    args = train.parse_args(["--preset", "paper-t2i", "--prompts", "a cat", "--kl-coef", "0.5", "--score-cfg", "same"])
    assert (args.model, args.kl_coef, args.score_cfg, args.text_pad) == ("llamagen-t2i-xl-256", 0.5, 4, "right")
    ours = train.parse_args(["--model", "llamagen-xl-384"])  # where the release is wrong, our own default differs
    assert (ours.score_cfg, ours.cfg_scale, ours.lr_schedule) == (2, 2, "linear")
    best = train.parse_args(["--preset", "best-t2i", "--steps", "5"])
    assert (best.model, best.kl, best.ref_cfg, best.weigh_tokens, best.steps) == ("toy-t2i", "exact", 2, True, 5)
    assert best.out == Path("out/best-t2i")  # beside the plain run, not in its folder
    best = train.parse_args(["--preset", "best-llamagen-c2i"])  # what it does not change is our own column
    assert (best.model, best.cfg_scale, best.ref_cfg, best.kl_coef) == ("llamagen-xl-384", 1, 2, 0.1)
    asked = [[], ["--clip-pretrained", "laion2b_s34b_b79k"], ["--model", "llamagen-xl-384"]]
    clips = [train.parse_args(flags).judge_options["clip_model"] for flags in asked]
    assert clips == [rewards.TOY_CLIP, "ViT-B-32-quickgelu", "ViT-B-32-quickgelu"]  # OpenAI's knows no toy caption


WRONG = [  # (script, flags, a part of its one sentence)
    # weights that would load in part, or run code
    (sample, ["--ckpt", "{}/none.safetensors"], "no such weights file"),
    (evaluate, ["--ckpt", ""], "an argument is empty"),
    (train, ["--weigh-tokens"], "--ref-cfg"),
    (train, ["--preset", "best-c2i", "--model", "llamagen-b-256"], "is not for llamagen-b-256"),
    (train, ["--preset", "paper-c2i", "--model", "toy-c2i"], "is not for toy-c2i"),
    (train, ["--device", "meta"], "--device meta cannot be read"),
    (train, ["--preset", "best-c2i", "--cfg-scale", "2"], "--no-weigh-tokens"),
    (evaluate, ["--blend", "0.5"], "needs --ckpt"),
    (sample, ["--blend", "0.5"], "needs --ckpt"),
    (sample, ["--rewards", "clip"], "--best-of N"),
    (train, ["--out="], "an argument is empty"),
    (sample, ["--ckpt", "{}/cut.safetensors"], "it is not whole"),
    (sample, ["--ckpt", "{}/cut.pt"], "it is not whole"),
    (sample, ["--ckpt", "{}/code.pt"], "more than tensors"),
    (sample, ["--ckpt", "{}/list.pt"], "holds no named tensors"),
    (sample, ["--ckpt", "{}/extra.pt"], "extra.weight is unknown"),
    (sample, ["--ckpt", "{}/missing.pt"], "norm.weight is missing"),
    (sample, ["--ckpt", "{}/shape.pt"], "norm.weight is [99], not [160]"),
    (sample, ["--ckpt", "{}/nan.pt"], "norm.weight holds NaN"),
    (sample, ["--ckpt", "{}/int.pt"], "norm.weight is not a dense tensor of floating-point numbers"),
    (sample, ["--ckpt", "{}/meta.pt"], "norm.weight cannot be read"),
    (sample, ["--ckpt", "{}/sparse.pt"], "norm.weight is not a dense tensor of floating-point numbers"),
    (sample, ["--ckpt", "{}/key.pt"], "holds no named tensors"),
    (sample, ["--ckpt", "{}/packed.pt"], "is compressed"),
    (sample, ["--ckpt", "{}/header.safetensors"], "its header is damaged"),
    (sample, ["--out", "{}/a.png", "--npz", "{}/b/../a.png"], "--out and --npz are both"),
    (sample, ["--vq-ckpt", str(HERE / "weights/toy-c2i.safetensors")], "encoder.conv_in.weight is missing"),
    (sample, ["--task", "t2i", "--ckpt", "{}/ours.safetensors"], "--model toy-c2i is a c2i model, but --task is t2i"),
    (evaluate, ["--model", "toy-t2i", "--ckpt", "{}/ours.safetensors"], "holds a toy-c2i model, not toy-t2i"),
    (train, ["--ckpt", "{}/old.safetensors"], "old.safetensors is of another toy world"),
    (sample, ["--model", "llamagen-b-256"], "of huggingface.co/FoundationVision/LlamaGen cannot be read"),
    (sample, ["--task", "t2i", "--text-encoder", "{}/narrow"], "32 wide, the model's 64"),
    (sample, ["--task", "t2i", "--text-encoder", "{}/gap-t5"], "is missing or misshapen"),
    (train, ["--rewards", "hps", "--judge-files", "{}/judges"], "it is not whole"),
    (train, ["--rewards", "maniqa", "--judge-files", "{}/judges"], "another model"),
    (train, ["--rewards", "maniqa"], "ckpt_koniq10k.pt"),
    (train, ["--rewards", "qwen-real", "--judge-files", "{}/judges"], "cannot be read"),
    (train, ["--rewards", "qwen-odd", "--qwen-server", "http://127.0.0.1:9"], "127.0.0.1:9"),
    # what is asked for
    (train, ["--rewards", "clop=1"], "no judge is called 'clop'"),
    (train, ["--rewards", "clip-step", "--credit-coef", "1"], "needs a judge with a gradient"),
    (train, ["--rewards", "clip=1=2"], "'1=2' in 'clip=1=2' is not a number"),
    (train, ["--rewards", "pyiqa:qalign"], "would run code that it downloads"),
    (sample, ["--task", "t2i", "--prompts", "{}/deep.json"], "recursion"),
    (sample, ["--task", "t2i", "--prompts", "{}/book.txt"], "is not in the toy world"),
    (train, ["--rewards", "clip=0"], "all weights are 0"),
    (sample, ["--classes", "red circel"], "did you mean 'red circle'"),
    (train, ["--preset", "paper-t2i", "--classes", "goldfish"], "takes --prompts, not --classes"),
    (train, ["--model", "llamagen-t2i-xl-256"], "needs --prompts"),
    # what would be written over, or not be a run
    (pretrain, ["--quick"], "weights/ holds the shipped weights"),
    (train, ["--out", "{}/run"], "holds a run"),
    (train, ["--out", "{}/damaged", "--resume"], "cannot be read"),
    (train, ["--out", "{}/foreign", "--resume"], "cannot be read"),
    (train, ["--out", "{}/empty", "--resume"], "nothing to resume"),
    (train, ["--group-size", "1"], "--group-size must be finite and at least 2"),
    (sample, ["--temperature", "nan"], "--temperature must be finite"),
    (train, ["--stepz", "3"], "unrecognized"),
    # what is evaluated
    (evaluate, ["--samples", "{}/objects.npz"], "is object (2,), not uint8 (n, H, W, 3)"),
    (evaluate, ["--samples", "{}/float.npz"], "is float32 (2, 8, 8, 3), not uint8"),
    (evaluate, ["--samples", "{}/first.npz"], "is uint8 (2, 3, 8, 8), not uint8 (n, H, W, 3)"),
    (evaluate, ["--samples", "{}/other.npz"], "an array arr_0 is needed"),
    (evaluate, ["--samples", "{}/cut.npz"], "it is not a whole npz file"),
    (evaluate, ["--samples", "{}/good.npz", "--inception", "{}/good.npz"], "its sha256 is"),
    (evaluate, ["--samples", "{}/short.npz"], "arr_0 is not whole"),
    (evaluate, ["--samples", "{}/good.npz", "--rewards", "clip"], "neither labels nor prompts"),
    (evaluate, ["--samples", "{}/labels.npz", "--rewards", "clip"], "holds no labels from 0 to 39, as toy-c2i has"),
    (evaluate, ["--samples", "{}/labels.npz", "--rewards", "clip", "--task", "t2i"], "holds no prompts, as toy-t2i"),
    (evaluate, ["--samples", "{}/prompts.npz", "--rewards", "clip"], "holds no labels from 0 to 39, as toy-c2i has"),
    (evaluate, ["--samples", "{}/good.npz", "--best-of", "2"], "are drawn already"),
    (evaluate, ["--samples", "{}/good.npz", "--ckpt", "{}/ours.safetensors"], "--ckpt has no say"),
    (evaluate, ["--samples", "{}/good.npz", "--reference", "{}/good.npz#0123"], "not 0123: fetch it again"),
    (evaluate, ["--samples", "{}/good.npz", "--reference", "{}/good.npz"], "weights-inception-2015-12-05-6726825d.pth"),
    (evaluate, ["--task", "t2i", "--dpg", "{}/dots"], "an item's name has no dot"),
    (evaluate, ["--task", "t2i", "--geneval", "{}/dots/a.b.txt"], "evaluation_metadata.jsonl is needed"),
]  # fmt: skip


@pytest.mark.parametrize("script, flags, sentence", WRONG, ids=[" ".join(flags)[-60:] for _, flags, _ in WRONG])
def test_what_a_user_can_do_wrong_ends_in_one_sentence(
    script, flags, sentence, wrong_files, tmp_path, capsys, monkeypatch
):
    """What fails silently otherwise: a model half loaded, a run written over, a misspelt flag."""
    monkeypatch.chdir(tmp_path)  # where the default --out is
    with pytest.raises(SystemExit) as stop:
        script.main([flag.replace("{}", str(wrong_files)) for flag in flags])
    said = capsys.readouterr().err.strip().splitlines()[-1:] if stop.value.code == 2 else [str(stop.value.code)]
    assert stop.value.code != 0 and sentence in said[0] and "\n" not in said[0] and "Traceback" not in said[0]
    assert len(said[0]) < 1100  # whatever it quotes
