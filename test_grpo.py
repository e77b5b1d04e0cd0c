"""
The invariants, one a test. Each names the bug that it keeps out. No network, no mocks, tiny seeded models.

    pytest -q test_grpo.py
"""

import base64
import hashlib
import http.server
import io
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bench
import data
import evaluate
import pretrain
import rewards
import sample
import train
from grpo import decoupled_advantages, fill_missing, group_advantages, grpo_loss, sample_groups, token_logprobs
from model import (
    MODELS,
    SIZES,
    ModelConfig,
    TextEncoder,
    Transformer,
    autocast,
    is_toy,
    keep_likeliest,
    left_pad,
    load_model,
    policy_logprobs,
    weights_header,
)
from tokenizer import TOKENIZERS, VQConfig, VQModel, load_strict, load_tokenizer, to_uint8, to_unit

HERE = Path(__file__).parent
C2I = ModelConfig("c2i", n_layer=2, n_head=2, dim=32, vocab_size=24, grid_size=3, num_classes=5)
T2I = ModelConfig("t2i", n_layer=2, n_head=2, dim=32, vocab_size=24, grid_size=3, caption_dim=16, cond_len=6)


@pytest.fixture(autouse=True)
def no_network_no_gpu(monkeypatch):
    """The same on every machine: what is not in a folder here is not to be had, and scripts run in float32 on the CPU."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


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
    return torch.randn(n, config.cond_len, config.caption_dim) * mask[..., None], mask


# ---------------------------------------------------------------------------------------------------------------
# the transformer


@pytest.mark.parametrize("config", [C2I, T2I], ids=["c2i", "t2i"])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
def test_cached_decoding_equals_the_full_forward_pass(config, cfg_scale):
    """A cache that is off by one position still draws plausible pictures; only the full pass shows it."""
    model, (cond, mask) = tiny(config), tiny_cond(config)
    tokens, logprobs = model.generate(cond, mask, cfg_scale=cfg_scale, generator=torch.Generator().manual_seed(1))
    both, both_mask = model.with_null(cond, mask) if cfg_scale > 1 else (cond, mask)
    logits = model(both, tokens.repeat(len(both) // len(cond), 1), both_mask)
    full = policy_logprobs(logits, cfg_scale).gather(-1, tokens[..., None])[..., 0]
    assert (logprobs - full).abs().max() < 1e-4
    greedy, _ = model.generate(cond, mask, cfg_scale=cfg_scale, temperature=0)
    logits = model(both, greedy.repeat(len(both) // len(cond), 1), both_mask)
    assert (policy_logprobs(logits, cfg_scale).argmax(-1) == greedy).all()


def test_padding_of_a_caption_is_invisible():
    """Whatever stands at padding positions must not reach an image token, and text must."""
    model, (cond, mask) = tiny(T2I), tiny_cond(T2I)
    tokens = torch.randint(24, (4, 9))
    noise = torch.randn_like(cond)
    same, other = torch.where(mask[..., None], cond, noise), torch.where(mask[..., None], noise, cond)
    assert torch.allclose(model(cond, tokens, mask), model(same, tokens, mask), atol=1e-5)
    assert (model(cond, tokens, mask) - model(other, tokens, mask)).abs().amax((1, 2)).min() > 1e-3


def test_conditioning_positions_have_zero_queries_and_keys():
    """LlamaGen's cos = sin = 0 there: leaving the text unrotated instead draws other pictures from official weights."""
    rope = tiny(T2I).rope
    assert not rope[:6].any() and torch.allclose(rope[6:].abs(), torch.ones(9, 8))


def test_guidance_interval_guides_token_0_and_the_next_k_plus_1():
    model, (cond, _) = tiny(C2I), tiny_cond(C2I)
    free, _ = model.generate(cond, temperature=0)
    guided, _ = model.generate(cond, temperature=0, cfg_scale=4)
    some, logprobs = model.generate(cond, temperature=0, cfg_scale=4, cfg_interval=1)
    assert (some[:, :3] == guided[:, :3]).all() and not (free == guided).all()
    unguided = policy_logprobs(model(cond, some)).gather(-1, some[..., None])[..., 0]
    assert torch.allclose(logprobs[:, 3:], unguided[:, 3:], atol=1e-4)


def test_top_k_and_top_p_keep_the_likeliest():
    logp = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert keep_likeliest(logp, top_k=2).exp()[0].tolist() == pytest.approx([0.625, 0.375, 0, 0])
    assert keep_likeliest(logp, top_p=0.6).exp()[0].tolist() == pytest.approx([0.625, 0.375, 0, 0])
    assert keep_likeliest(logp, top_p=1e-9).exp()[0].tolist() == pytest.approx([1, 0, 0, 0])  # never empty


def test_left_padding_moves_the_text_next_to_the_image():
    features, mask = torch.arange(1.0, 9).view(2, 4, 1), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    moved, moved_mask = left_pad(features, mask)
    assert moved[..., 0].tolist() == [[0, 0, 1, 2], [5, 6, 7, 8]] and moved_mask.tolist()[0] == [
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize(
    "name, millions", [("GPT-B", 111), ("GPT-L", 343), ("GPT-XL", 775), ("GPT-XXL", 1411), ("GPT-3B", 3100)]
)
def test_sizes_have_the_published_parameter_counts(name, millions):
    """A wrong hidden width would only surface when a user's download fails to load."""
    with torch.device("meta"):
        model = Transformer(ModelConfig("c2i", *SIZES[name]))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_the_state_dict_bears_the_official_names():
    """Official files load without conversion, so a renamed attribute breaks every download."""
    with torch.device("meta"):
        c2i, t2i = (
            {name: tuple(w.shape) for name, w in Transformer(MODELS[m].config).state_dict().items()}
            for m in ("llamagen-b-256", "llamagen-t2i-xl-256")
        )
    block = {f"layers.11.{name}" for name in (
        "attention.wqkv.weight", "attention.wo.weight", "attention_norm.weight", "ffn_norm.weight",
        "feed_forward.w1.weight", "feed_forward.w2.weight", "feed_forward.w3.weight",
    )}  # fmt: skip
    assert {name for name in c2i if name.startswith("layers.11.")} == block
    assert c2i["cls_embedding.embedding_table.weight"] == (1001, 768) and c2i["output.weight"] == (16384, 768)
    assert c2i["layers.0.feed_forward.w1.weight"] == (2048, 768) and c2i["layers.0.attention.wqkv.weight"] == (
        2304,
        768,
    )
    assert {name for name in c2i if "layers" not in name} == {
        "cls_embedding.embedding_table.weight", "tok_embeddings.weight", "norm.weight", "output.weight"}  # fmt: skip
    assert t2i["cls_embedding.uncond_embedding"] == (120, 2048)
    assert t2i["cls_embedding.cap_proj.fc1.weight"] == (1280, 2048)


def test_bfloat16_rounds_the_layers_and_neither_weights_nor_logits():
    """A softmax over bfloat16 logits gives log-probabilities with two digits: the ratio would be noise."""
    model, (cond, mask) = tiny(T2I), tiny_cond(T2I)
    tokens = torch.randint(24, (4, 9))
    exact = model(cond, tokens, mask)
    with autocast("cpu", "bfloat16"):
        rounded = model(cond, tokens, mask)
        _, drawn = model.generate(cond, mask, cfg_scale=2.0)
    with autocast("cpu", "bfloat16"):  # text must not be rounded in one of sampler and scorer only
        tokens, old = model.generate(cond, mask, generator=torch.Generator().manual_seed(0))
        new, _ = token_logprobs(model, cond, tokens, mask)
    assert (new - old).abs().mean() < 0.02
    assert rounded.dtype == drawn.dtype == torch.float32 and model.output.weight.dtype == torch.float32
    assert 1e-5 < (rounded - exact).abs().max() < 0.2
    assert (rounded.bfloat16().float() != rounded).float().mean() > 0.9  # the head itself was not rounded


# ---------------------------------------------------------------------------------------------------------------
# text

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
    """Features at padding, or text away from the image, and official weights see a prompt they never learned."""
    folder = save_tiny_t5(tmp_path / "t5")
    left, right = (TextEncoder(folder, 12, 64, pad=pad) for pad in ("left", "right"))
    captions = ["A Photo of a red circle", "cat", "a photo of a red circle"]
    features, mask = left(captions)
    assert features.shape == (3, 12, 64) and features.dtype == torch.float32 and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [7, 2, 7] and mask[1].tolist() == [False] * 10 + [True] * 2  # with </s>
    assert not features[~mask].any() and torch.equal(features[0], features[2])  # case is lost
    other, other_mask = right(captions)
    assert other_mask[1].tolist() == [True] * 2 + [False] * 10 and torch.equal(other[1, :2], features[1, 10:])
    alone, _ = left(["cat"])
    assert torch.allclose(alone[0], features[1], atol=1e-5)
    _, full = left(["a photo of a red circle, a photo of a red circle, a photo of a red circle"])
    assert full.all()  # longer ones are cut to P


@pytest.mark.parametrize("caption, cleaned", [
    ("A Photo of a “red” Cat,Dog", 'a photo of a "red" cat, dog'),
    ("see https://example.com/a, it is good", "see , it is good"),
    ("see www.example.com/a?b=c now", "see ?b=c now"),
    ("by @someone  <b>bold</b>", "by bold"),
    ("holiday picture IMG_001.png", "holiday picture"),
    ("tom &lt;3 jerry!!", "tom <3 jerry!!"),
    ("wait...what", "wait what"),
    ("'quoted.'", "quoted."),
])  # fmt: skip
def test_captions_are_cleaned(caption, cleaned):
    assert data.clean_caption(caption) == cleaned


def test_cleaning_leaves_the_toy_captions_alone():
    for captions in data.T2I_CAPTIONS.values():
        assert all(data.clean_caption(caption) == caption for caption in captions)


# ---------------------------------------------------------------------------------------------------------------
# the tokenizer


def test_loading_keeps_the_modules_own_types():
    """MANIQA indexes with a buffer of integers; weights in half precision become the module's float32."""
    module = torch.nn.Linear(2, 2)
    module.register_buffer("index", torch.zeros(2, dtype=torch.long))
    loaded = load_strict(module, {k: v.half() for k, v in module.state_dict().items()}, "a file")
    assert loaded.index.dtype == torch.long and loaded.weight.dtype == torch.float32


def test_vq8_has_the_official_shape():
    with torch.device("meta"):
        model = VQModel(TOKENIZERS["vq-8"])
        assert model.decode(torch.zeros(1, 32**2, dtype=torch.long)).shape == (1, 3, 256, 256)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(70, rel=0.02)


def test_vq16_has_the_official_shape():
    with torch.device("meta"):
        model = VQModel(TOKENIZERS["vq-16"])
    state = model.state_dict()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(71.9, rel=0.01)
    assert tuple(state["encoder.conv_blocks.4.attn.1.proj_out.weight"].shape) == (512, 512, 1, 1)
    assert tuple(state["decoder.conv_blocks.0.upsample.conv.weight"].shape) == (512, 512, 3, 3)
    assert "encoder.conv_blocks.4.downsample.conv.weight" not in state


def test_every_patch_size_keeps_the_grid():
    for config in (VQConfig((1, 1), 16, 32, 4, ch=32), VQConfig((1,), 16, 32, 4, ch=32, patch=2)):
        model = VQModel(config)
        tokens = model.encode(torch.rand(2, 3, 16, 16) * 2 - 1)
        assert tokens.shape == (2, 64) and model.decode(tokens).shape == (2, 3, 16, 16)


def test_the_toy_tokenizer_round_trips():
    """A tokenizer that loses shapes or colours would put a ceiling on every result without a word."""
    tokenizer = load_tokenizer("toy", MODELS["toy-c2i"].vq_ckpt)
    captions = [data.class_caption(name) for name in data.TOY_CLASSES] + data.balanced_captions(48)
    images = torch.from_numpy(data.render(captions, np.random.default_rng(7))) * 2 - 1
    with torch.no_grad():
        output = tokenizer.decode(tokenizer.encode(images)).clamp(-1, 1)
    assert 10 * torch.log10(4 / (output - images).square().mean()) > 22  # dB
    assert np.mean([data.satisfies(i / 2 + 0.5, c) for i, c in zip(output, captions, strict=True)]) > 0.95


def test_pixels_are_truncated_as_officially():
    assert to_uint8(torch.tensor([-1.0, 0.0, 1.0, 5.0])).tolist() == [0, 128, 255, 255]


# ---------------------------------------------------------------------------------------------------------------
# GRPO


@pytest.mark.parametrize("config", [C2I, T2I], ids=["c2i", "t2i"])
@pytest.mark.parametrize("cfg_scale, temperature", [(1.0, 1.0), (2.0, 1.0), (3.0, 0.7)])
def test_sampler_and_scorer_are_one_policy(config, cfg_scale, temperature):
    """The official release samples with guidance and scores without: its ratio says 1 while the two differ by 0.86."""
    model, (cond, mask) = tiny(config), tiny_cond(config, 2)
    cond, mask, tokens, old = sample_groups(
        model, cond, mask, 3, torch.Generator().manual_seed(0), cfg_scale, temperature
    )
    new, entropy = token_logprobs(model, cond, tokens, mask, cfg_scale, temperature)
    assert tokens.shape == old.shape == new.shape == entropy.shape == (6, 9)
    assert ((new - old).exp() - 1).abs().max() < 1e-4
    if cfg_scale > 1:
        unguided, _ = token_logprobs(model, cond, tokens, mask, 1.0, temperature)
        assert ((unguided - old).exp() - 1).abs().mean() > 0.05


def loss_gradient(model, cond, tokens, old, ref, advantages, micro_batch):
    model.zero_grad()
    for rows in torch.arange(len(tokens)).split(micro_batch):
        logprobs, _ = token_logprobs(model, cond[rows], tokens[rows])
        loss, _ = grpo_loss(logprobs, old[rows], ref[rows], advantages[rows], kl_coef=0.1)
        (loss * len(rows) / len(tokens)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_the_micro_batch_size_does_not_change_the_gradient():
    """A mean of means weighs the images of a short last micro-batch more than the others."""
    model, other = tiny(C2I), tiny(C2I, seed=1)
    cond, _, tokens, old = sample_groups(model, torch.arange(2), None, 4, torch.Generator().manual_seed(0))
    ref, advantages = token_logprobs(other, cond, tokens)[0].detach(), torch.randn(8)
    whole = loss_gradient(model, cond, tokens, old, ref, advantages, 8)
    for size in (1, 3, 4):
        assert torch.allclose(loss_gradient(model, cond, tokens, old, ref, advantages, size), whole, atol=1e-6)


def test_at_ratio_1_the_gradient_is_reinforce_with_a_group_baseline():
    model = tiny(C2I)
    cond, _, tokens, old = sample_groups(model, torch.arange(2), None, 4, torch.Generator().manual_seed(0))
    advantages = group_advantages(torch.randn(8), 4)
    logprobs, _ = token_logprobs(model, cond, tokens)
    loss, _ = grpo_loss(logprobs, old, old, advantages, kl_coef=0.0)
    ours = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    reinforce = torch.autograd.grad(
        -(advantages[:, None] * logprobs).mean(), list(model.parameters()), allow_unused=True
    )
    for a, b in zip(ours, reinforce, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_equal_rewards_give_exactly_zero_advantage():
    """Rounding of the mean, divided by 1e-4, would otherwise push the policy about at random."""
    for value in (0.1, 1 / 3, 1e6, -7.7):
        assert not group_advantages(torch.full((24,), value), 8).any()
        assert not decoupled_advantages({"a": torch.full((24,), value)}, {"a": 1.0}, 8).any()


def test_advantages_compare_inside_the_group_only():
    r = torch.tensor([1.0, 2, 3, 101, 102, 103])
    a = group_advantages(r, 3)
    assert torch.allclose(a[:3], a[3:], atol=1e-3) and a[:3].tolist() == pytest.approx([-1, 0, 1], abs=1e-3)


def test_decoupled_advantages_let_a_small_reward_speak():
    """Summed, a judge with a hundredth of the other's spread is not heard; normalised first, it weighs the same."""
    loud, quiet = torch.tensor([0.0, 1, 0, 1]), torch.tensor([0.0, 0, 0.01, 0.01])
    a = decoupled_advantages({"loud": loud, "quiet": quiet}, {"loud": 1.0, "quiet": 1.0}, 4)
    assert a[1].item() == pytest.approx(a[2].item(), abs=0.05) and a[3] > 0.5
    summed = group_advantages(loud + quiet, 4)
    assert summed[1] - summed[2] > 1


def test_kl_is_never_negative_and_zero_at_the_start():
    logprobs = torch.randn(64, 9) * 3
    assert grpo_loss(logprobs, logprobs, logprobs, torch.zeros(64))[1]["kl"] == 0
    kls = [
        grpo_loss(logprobs[k : k + 1], logprobs[k : k + 1], torch.randn(1, 9) * 3, torch.zeros(1))[1]["kl"]
        for k in range(64)
    ]
    assert min(kls) > 0
    near = logprobs + torch.randn(64, 9) * 1e-4  # where e^d - d - 1 is all rounding
    kl = grpo_loss(logprobs, logprobs, near, torch.zeros(64))[1]["kl"]
    assert kl == pytest.approx(float((near - logprobs).double().square().mean() / 2), rel=0.01)
    each = zip(logprobs.view(-1, 1, 1), near.view(-1, 1, 1), strict=True)
    assert all(grpo_loss(p, p, q, torch.zeros(1))[1]["kl"] >= 0 for p, q in each)


@pytest.mark.parametrize(
    "advantage, log_ratio, gradient", [(1, 1, False), (1, -1, True), (-1, -1, False), (-1, 1, True)]
)
def test_clipping_acts_on_the_right_side_for_each_sign(advantage, log_ratio, gradient):
    """Clipping both sides for both signs would forbid undoing a bad update."""
    logprobs = torch.full((1, 1), float(log_ratio), requires_grad=True)
    zero = torch.zeros(1, 1)
    loss, stats = grpo_loss(logprobs, zero, zero, torch.tensor([float(advantage)]), clip_eps=0.2, kl_coef=0.0)
    loss.backward()
    assert bool(logprobs.grad.any()) == gradient and stats["clip_frac"] == (not gradient)


def test_a_bandit_sized_run_learns():
    """The parts together, by the loop's own steps: reward = share of even tokens. Signs and baselines fail here."""
    model, generator = tiny(C2I), torch.Generator().manual_seed(0)
    ref = tiny(C2I)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    history = []
    for _ in range(40):
        cond, _, tokens, old = sample_groups(model, torch.arange(4), None, 8, generator)
        reward = (tokens % 2 == 0).float().mean(1)
        logprobs, _ = token_logprobs(model, cond, tokens)
        with torch.no_grad():
            ref_logprobs, _ = token_logprobs(ref, cond, tokens)
        loss, _ = grpo_loss(logprobs, old, ref_logprobs, group_advantages(reward, 8), kl_coef=0.01)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(reward.mean().item())
    assert np.mean(history[-5:]) > np.mean(history[:5]) + 0.25


# ---------------------------------------------------------------------------------------------------------------
# the toy world


def test_the_verifier_is_right_on_renders_and_on_wrong_captions():
    rng = np.random.default_rng(3)
    captions = [data.class_caption(name) for name in data.TOY_CLASSES] * 3 + data.balanced_captions(240)
    images = data.render(captions, rng)
    assert np.mean([data.satisfies(i, c) for i, c in zip(images, captions, strict=True)]) >= 0.99
    assert (
        np.mean([data.satisfies(i, data.wrong_caption(c, rng)) for i, c in zip(images, captions, strict=True)]) <= 0.01
    )


def test_the_verifier_refuses_malformed_pictures():
    """A verifier that forgives blobs, strays or a second object would reward the very things that RL hacks."""
    rng = np.random.default_rng(0)
    image, other = data.render(["a red circle", "two circles"], rng)
    assert data.satisfies(image, "a red circle") and not data.satisfies(other, "a circle")
    half = image.copy()
    half[:, :, : int(data.find_objects(image)[0][0]["x"])] = 0.1
    assert not data.satisfies(half, "a red circle")
    noise = rng.random((3, 64, 64)).astype(np.float32)
    assert not data.satisfies(noise, "a circle") and not data.satisfies(np.zeros((3, 64, 64)), "a circle")


def test_renders_are_a_function_of_the_generator():
    captions = data.balanced_captions(12)
    a, b = (data.render(captions, np.random.default_rng(5)) for _ in range(2))
    assert (a == b).all() and a.min() >= 0 and a.max() <= 1


def test_crowds_are_right_for_no_caption():
    every = [caption for captions in data.T2I_CAPTIONS.values() for caption in captions]
    for image in data.render_crowds(every, np.random.default_rng(0)):
        assert len(data.find_objects(image)[0]) in (3, 4)
        assert not any(data.satisfies(image, caption) for caption in every)


def test_captions_parse_and_wrong_ones_exclude_them():
    rng = np.random.default_rng(0)
    for category, captions in data.T2I_CAPTIONS.items():
        for caption in captions:
            assert data.category_of(caption) == category
            wrong = data.wrong_caption(caption, rng)
            assert data.category_of(wrong) == category and data.meaning(wrong) != data.meaning(caption)
    assert data.meaning("a circle left of a square") == data.meaning("a square right of a circle")
    assert data.parse("two crosses") == ([(2, None, "cross")], None)
    assert data.toy_caption("Two circles.") == "a photo of two circles"
    for caption in ("a red banana", "a cyan circle", "a red circle left of a blue square"):
        with pytest.raises(ValueError, match=r"banana|never learned"):
            data.toy_caption(caption)


def test_classes_by_name_or_number():
    assert data.find_class("Red Circle", data.TOY_CLASSES) == data.find_class("0", data.TOY_CLASSES) == 0
    with pytest.raises(ValueError, match="red circle"):
        data.find_class("red circel", data.TOY_CLASSES)
    with pytest.raises(ValueError, match="0 to 39"):
        data.find_class("40", data.TOY_CLASSES)
    assert data.find_class("goldfish", data.imagenet_classes()) == 1


def test_prompt_files_of_every_form(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "a.json").write_text('["one", {"prompt": "two"}]')
    (tmp_path / "a.jsonl").write_text('{"caption": "one"}\n"two"\n')
    assert all(data.read_prompts(tmp_path / f"a.{form}") == ["one", "two"] for form in ("txt", "json", "jsonl"))
    (tmp_path / "bad.json").write_text("[1")
    (tmp_path / "empty.txt").write_text("\n")
    for name in ("bad.json", "empty.txt", "a.csv", "none.txt"):
        (tmp_path / "a.csv").write_text("x")
        with pytest.raises((ValueError, FileNotFoundError), match=name):
            data.read_prompts(tmp_path / name)


# ---------------------------------------------------------------------------------------------------------------
# the judges


def test_scores_that_are_not_finite_have_no_say():
    """Set to 0, an unreadable image would win its group under a metric that is never positive."""
    score = torch.tensor([-3.0, torch.nan, -1, -2, torch.inf, torch.nan, torch.nan, torch.nan])
    assert fill_missing(score, 4).tolist() == [-3, -2, -1, -2, 0, 0, 0, 0]
    assert group_advantages(fill_missing(score, 4), 4)[[1, 4, 5, 6, 7]].tolist() == [0, 0, 0, 0, 0]
    assert rewards.weighted_sum({"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}, {"a": 2.0, "b": 1.0}) == 4


def test_the_toy_judges_rank_right_above_wrong():
    judges = rewards.load_judges(["clip", "critic"])
    rng = np.random.default_rng(0)
    single = [data.class_caption(name) for name in data.TOY_CLASSES]  # the critic knows these alone
    captions = single + data.balanced_captions(60)
    images = torch.from_numpy(data.render(captions, rng)) * 2 - 1
    tokenizer = load_tokenizer("toy", MODELS["toy-c2i"].vq_ckpt)  # judges only ever see what it decoded
    with torch.no_grad():
        images = to_unit(tokenizer.decode(tokenizer.encode(images)))
    right, _ = rewards.score(judges, images, captions)
    wrong, seconds = rewards.score(judges, images, [data.wrong_caption(c, rng) for c in captions])
    noise, _ = rewards.score(judges, torch.rand(100, 3, 64, 64), captions)
    assert (right["clip"] > wrong["clip"]).float().mean() > 0.9 and set(seconds) == {"clip", "critic"}
    assert right["critic"][:40].mean() > noise["critic"].mean() + 0.2
    with pytest.raises(ValueError, match="64 px"):  # its score of anything else would mean nothing
        judges["critic"](torch.rand(1, 3, 256, 256), ["a"])


def test_the_t2i_base_hears_which_object_is_named_first():
    """
    It begins each picture with that one. While the text encoder knew only which two objects there are, "a and b" and
    "b and a" were the same to it, and bindings were right by chance.
    """
    captions = [c for kind in ("two objects", "binding") for c in data.T2I_CAPTIONS[kind] for _ in range(8)]
    assert data.reading_order("a circle below a square")[0][0] == (1, None, "square")
    turned = [data.write(data.parse(caption)[0][::-1], None) for caption in captions]
    model, encode = load_model("toy-t2i"), sample.make_encoder("toy-t2i")
    tokenizer = load_tokenizer("toy", MODELS["toy-t2i"].vq_ckpt)
    with torch.no_grad():
        tokens = tokenizer.encode(torch.from_numpy(data.render(captions, np.random.default_rng(0))) * 2 - 1)
        asked = [encode(texts) for texts in (captions, turned)]
        right, wrong = (token_logprobs(model, cond, tokens, mask)[0].sum(1) for cond, mask in asked)  # (N,), nats
    assert (right > wrong).float().mean() > 0.8


def test_clip_scores_do_not_depend_on_the_batch():
    """Text features are computed once per distinct prompt; an index off by one would give everyone another's."""
    judge = rewards.load_judges(["clip"])["clip"]
    captions = ["a photo of a red circle", "a photo of two squares", "a photo of a red circle"]
    images = torch.from_numpy(data.render(captions, np.random.default_rng(0)))
    alone = torch.cat([judge(i[None], [c]) for i, c in zip(images, captions, strict=True)])
    assert torch.allclose(judge(images, captions), alone, atol=1e-5)


def test_a_metric_that_cannot_judge_says_so():
    """pyiqa counts among its no-reference metrics some that want larger pictures, captions or a folder of pictures."""
    metric = torch.nn.Conv2d(3, 1, 99)
    metric.lower_better, metric.metric_name = False, "niqe"
    with pytest.raises(ValueError, match=r"pyiqa:niqe cannot judge pictures of 64 px"):
        rewards.pyiqa_scores(torch.rand(2, 3, 64, 64), ["a", "b"], metric)


def test_any_pyiqa_metric_is_a_judge():
    """Higher must be better: piqe counts distortions, 0 to 100, and is turned; entropy counts detail and is not."""
    judges = rewards.load_judges(["pyiqa:piqe", "pyiqa:entropy"])
    images = torch.stack([torch.rand(3, 64, 64), torch.full((3, 64, 64), 0.5)])
    scores, _ = rewards.score(judges, images, ["a", "b"])
    assert scores["pyiqa:piqe"].shape == (2,) and (scores["pyiqa:piqe"] <= 0).all()
    assert scores["pyiqa:entropy"][0] > scores["pyiqa:entropy"][1] >= 0


# ---------------------------------------------------------------------------------------------------------------
# the paper's judges: tiny models in the forms of the real ones, saved to a folder, then loaded by the real code

TINY_CLIP = dict(
    embed_dim=16,
    vision_cfg=dict(image_size=32, layers=2, width=32, head_width=16, patch_size=16),
    text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1),
)
PAPER = ["clip", "clip-step", "hps", "hps-step", "maniqa", "qwen-match", "qwen-real", "qwen-odd"]


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
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=special[0], eos_token=special[2], additional_special_tokens=special
    )
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
    """What --reward-weights names, with tiny models under the real ones' file names; and clip.pt."""
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
    images = (
        torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))
        ** torch.arange(1, n + 1)[:, None, None, None]
    )
    images[0, 0] = 1
    return images, ["a red circle", "a {strange} prompt that is a good deal longer", "two dogs", "a red circle"][:n]


def test_every_judge_of_the_paper_trains(judges_folder, tiny_open_clip, tmp_path):
    """Each on its own works before the names, the shared models and the log have met; this is where they meet."""
    names = [*PAPER, "critic", "pyiqa:piqe"]
    flags = ["--clip-model", "tiny", "--clip-pretrained", str(judges_folder / "clip.pt")]
    flags += ["--reward-weights", str(judges_folder), "--judge-batch", "3", "--rewards", ",".join(names)]
    flags += ["--steps", "2", "--group-size", "2", "--prompts-per-step", "1", "--classes", "7", "--out", str(tmp_path)]
    train.main(flags)
    rows = read_metrics(tmp_path)
    assert len(rows) == 2 and all(row[f"{name}_not_finite"] == 0 for row in rows for name in names)
    assert 0 < rows[0]["qwen-match_mean"] < 5 and 0 < rows[0]["qwen-odd_mean"] < 1
    assert rows[0]["reward"] == pytest.approx(sum(rows[0][f"{name}_mean"] for name in names), rel=1e-4)
    readme = (HERE / "README.md").read_text()
    judged = f"^({'|'.join(names)})_(mean|std|not_finite)$"
    for key in rows[0]:
        glossary = re.sub(judged, r"NAME_\2", key)
        assert f"`{glossary}`" in readme


@pytest.mark.parametrize("judge", ["clip", "hps"])
def test_clip_and_hps_run_once_and_read_each_prompt_once(judge, judges_folder, tiny_open_clip):
    """The official code encodes each of N captions, of which only B differ, and each picture twice."""
    options = dict(clip_model="tiny", clip_pretrained=str(judges_folder / "clip.pt"), reward_weights=judges_folder)
    judges = rewards.load_judges([f"{judge}-step", judge], options=options)
    model = judges[judge].keywords["judge"].keywords["model"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # HPSv2.1's file is half precision
    seen = []
    model.visual.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    model.token_embedding.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    images, prompts = some_images()
    scores, seconds = rewards.score(judges, images, prompts)
    assert sorted(seen) == [3, 4] and set(scores) == set(seconds) == {judge, f"{judge}-step"}
    assert torch.equal(scores[f"{judge}-step"], rewards.step_of(scores[judge])) and scores[judge].unique().numel() == 4
    only, _ = rewards.score(rewards.load_judges([f"{judge}-step"], options=options), images, prompts)
    assert list(only) == [f"{judge}-step"] and torch.equal(only[f"{judge}-step"], scores[f"{judge}-step"])


def test_the_step_function_keeps_its_edges_and_nan():
    """NaN compares false with everything, so a chain of `where` would give it the best score."""
    cosines = torch.tensor([-0.1, 0.0, 0.29, 0.3, 0.59, 0.6, torch.nan])
    assert rewards.step_of(cosines).tolist()[:6] == [-1, 0.5, 0.5, 1, 1, 1.5] and rewards.step_of(cosines)[6].isnan()


def test_openai_weights_get_the_activation_they_were_trained_with(tmp_path):
    """With plain "ViT-B-32" open_clip warns and goes on with the exact GELU: plausible cosines, all a little wrong."""
    import open_clip

    folder = tmp_path / "vit_base_patch32_clip_224.openai"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=TINY_CLIP, preprocess_cfg={})))
    torch.save(open_clip.CLIP(**TINY_CLIP).state_dict(), folder / "open_clip_pytorch_model.bin")
    for name in ("ViT-B-32", "ViT-B-32-quickgelu"):
        model, words = rewards.load_clip(name, "openai", tmp_path)
        assert isinstance(model.visual.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)
        assert words(["a dog"]).shape == (1, 77)


def test_the_toy_keeps_its_own_clip():
    toy, real = train.parse_args([]), train.parse_args(["--clip-pretrained", "laion2b_s34b_b79k"])
    assert rewards.judge_options(toy, "toy-c2i")["clip_model"] == rewards.TOY_CLIP
    assert rewards.judge_options(toy, "llamagen-xl-384")["clip_model"] == "ViT-B-32-quickgelu"
    assert rewards.judge_options(toy, "llamagen-xl-384")["clip_pretrained"] == "openai"
    assert rewards.judge_options(real, "toy-c2i")["clip_model"] == "ViT-B-32-quickgelu"


def test_maniqa_in_a_batch_is_maniqa_alone(judges_folder):
    """Random crops would tell equal pictures apart, and a reshape that is wrong by one axis mixes their crops."""
    judge = rewards.load_judges(["maniqa"], options=dict(reward_weights=judges_folder, judge_batch=2))["maniqa"]
    images, prompts = some_images(3, 232)
    images[2] = images[0]  # the third is in a batch of its own
    with torch.no_grad():
        scores = judge(images, prompts, crops=2)
    assert scores[0] == pytest.approx(scores[2].item(), rel=1e-5) and scores[0] != pytest.approx(
        scores[1].item(), rel=0.01
    )
    assert judge.keywords["network"].test_sample == 2  # at 232 px the grid has a step, so two crops are two


def test_qwen_in_a_batch_is_qwen_alone(judges_folder):
    """Left padding, shared answers' tokens and the order of (image, question) pairs all fail here when wrong."""
    names = ["qwen-match", "qwen-real", "qwen-odd"]
    images, prompts = some_images()
    judges = rewards.load_judges(names, options=dict(reward_weights=judges_folder, judge_batch=3))
    assert list(judges) == ["qwen"]
    scores, _ = rewards.score(judges, images, prompts)
    for name in names:
        alone = rewards.load_judges([name], options=dict(reward_weights=judges_folder))
        one_by_one = [
            rewards.score(alone, image[None], [prompt])[0][name] for image, prompt in zip(images, prompts, strict=True)
        ]
        assert torch.allclose(scores[name], torch.cat(one_by_one), atol=1e-4) and scores[name].std() > 1e-3


def test_half_a_qwen_is_refused(judges_folder, tmp_path):
    """transformers warns and fills the gap with random numbers, and the answers go on looking like answers."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(judges_folder / "Qwen2.5-VL-3B-Instruct", folder := tmp_path / "Qwen2.5-VL-3B-Instruct")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        rewards.load_qwen(tmp_path, "cpu")


def test_qwen_that_writes_nonsense_is_missing_and_not_zero(judges_folder):
    judges = rewards.load_judges(["qwen-real"], options=dict(reward_weights=judges_folder, qwen_answer="json"))
    assert rewards.score(judges, *some_images(2))[0]["qwen-real"].isnan().all()  # the tiny model babbles
    readable = {'{"score": 4}': 4, 'Sure!\n```json\n{"score": "2.5"}\n``` is it.': 2.5, "{'Score': 0}": 0}
    assert {text: rewards.read_score(text, 5) for text in readable} == readable
    for text in ("", "4", "I would say 4", '{"score": 6}', '{"score": -1}', '{"score": "high"}', '{"score": 50}'):
        assert math.isnan(rewards.read_score(text, 5))
    assert math.isnan(rewards.read_score('{"score": 4}', 1))


def test_the_expected_answer_is_a_mean_over_answers_alone():
    logprobs = {"5": math.log(0.5), "0": math.log(0.25), "The": math.log(0.25)}
    assert rewards.expected_worth(logprobs, rewards.RATING) == pytest.approx(5 * 0.5 / 0.75)
    assert rewards.expected_worth({"Yes": -1.0, "yes": -1.0, "no": -1.0}, rewards.YES_NO) == pytest.approx(2 / 3)
    assert math.isnan(rewards.expected_worth({"The": 0.0}, rewards.YES_NO))


def test_answers_must_be_single_distinct_tokens(judges_folder):
    """Otherwise first tokens are read: "10" and "1" would be one answer, and a vocabulary without either another."""
    _, processor = rewards.load_qwen(judges_folder, "cpu")
    assert len(set(rewards.answer_tokens(processor.tokenizer, rewards.YES_NO | rewards.RATING))) == 10
    for answers in (["yes!", "no"], ["1", "10"], ["yes", "yes"]):
        with pytest.raises(ValueError, match="--qwen-answer json"):
            rewards.answer_tokens(processor.tokenizer, answers)


class Server(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server whose answers say how red the picture is: level 51 k rates k."""

    failures = 0  # how many questions it will not answer

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
        picture, _ = asked["messages"][0]["content"]
        file = io.BytesIO(base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,")))
        pixels = np.array(Image.open(file))  # (H, W, 3)
        level = set(pixels[..., 0].ravel().tolist())
        assert len(level) == 1 and not pixels[:, :4, 1:].any() and (pixels[:, 4:, 2] == 200).all()
        assert asked["model"] == "tiny" and self.path == "/v1/chat/completions"
        answer = str(level.pop() // 51)
        content = "I do not know." if answer == "5" else f'Here: {{"score": {answer}}}'
        top = [dict(token=answer, logprob=math.log(0.5)), dict(token="The", logprob=math.log(0.5))]
        logprobs = dict(content=[dict(top_logprobs=top)]) if asked.get("top_logprobs") else None
        self.reply(dict(choices=[dict(message=dict(content=content), logprobs=logprobs)]))

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def test_a_server_may_answer_for_qwen(server, monkeypatch):
    """JPEG would change the levels and smear the edge, and answers must come back in the order of the pictures."""
    monkeypatch.setattr(rewards, "SERVER_PAUSES", (0, 0))
    images = torch.zeros(4, 3, 8, 8)
    images[:, 0] = (torch.tensor([3.0, 0, 5, 1]) / 5).view(4, 1, 1)
    images[:, 2, :, 4:] = 200 / 255
    for url, answer, last in ((server, "probability", 5), (server + "/v1", "json", torch.nan)):
        judges = rewards.load_judges(["qwen-match"], options=dict(qwen_server=url, qwen_answer=answer))
        monkeypatch.setattr(Server, "failures", 2)  # which alone may not end a run
        scores = rewards.score(judges, images, ["x"] * 4)[0]["qwen-match"]
        assert torch.equal(scores.nan_to_num(-1), torch.tensor([3.0, 0, last, 1]).nan_to_num(-1))
    monkeypatch.setattr(Server, "failures", 100)
    with pytest.raises(ValueError, match="503"):
        rewards.score(judges, images, ["x"] * 4)


def test_the_readmes_own_reward_works_as_printed(tmp_path, monkeypatch):
    """It is the first thing that people will change, so it has to work word for word."""
    section = (HERE / "README.md").read_text().split("## Write your own reward in ten lines")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    flag = re.search(r"--rewards ([^\s`]+)", section)[1]
    monkeypatch.setattr(rewards, "JUDGES", dict(rewards.JUDGES))
    assert len(code.strip().splitlines()) <= 10
    exec(code, dict(vars(rewards)))  # as if it stood at the end of rewards.py; JUDGES is the only thing it changes
    train.main(["--steps", "1", "--rewards", flag, "--out", str(tmp_path), *TINY_RUN, *TWO["c2i"]])
    own = set(rewards.JUDGES) - {"clip", "hps", "maniqa", "critic"}
    assert len(own) == 1 and read_metrics(tmp_path)[0][f"{own.pop()}_std"] > 0


# ---------------------------------------------------------------------------------------------------------------
# the scripts, through their own main

TINY_RUN = ["--prompts-per-step", "2", "--group-size", "2", "--sample-every", "2", "--save-every", "1"]
TWO = {"c2i": ["--classes", "red circle", "7"], "t2i": ["--prompts", "two circles", "a circle above a square"]}


def read_metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "seconds" not in k and "memory" not in k} for row in rows]


def test_scores_that_are_missing_are_said_to_be(tmp_path, monkeypatch):
    """A mean of 0 for a judge that said nothing would be read as its worst verdict."""
    silent, loud = torch.full((4,), torch.nan), torch.tensor([1.0, 3, torch.nan, torch.inf])
    judges = dict(silent=lambda device, options: lambda *_: silent, loud=lambda device, options: lambda *_: loud)
    monkeypatch.setattr(rewards, "JUDGES", rewards.JUDGES | judges)
    train.main(["--steps", "1", "--out", str(tmp_path), *TINY_RUN, "--classes", "0", "1", "2", "3", "--rewards",
                "clip,silent=2,loud"])  # fmt: skip
    (row,) = read_metrics(tmp_path)
    assert "silent_mean" not in row and row["silent_not_finite"] == 4 and np.isfinite(row["reward"])
    assert row["loud_mean"] == 2 and row["loud_not_finite"] == 2
    judges = rewards.load_judges(["silent", "loud"])
    found = evaluate.mean_rewards(torch.rand(4, 3, 64, 64), ["x"] * 4, judges)
    assert found == {"missing: silent": 1, "reward: loud": 2, "missing: loud": 0.5}


def test_every_policy_is_asked_as_it_was_trained(tmp_path):
    """Were the first --ckpt's padding everyone's, the base's figures would depend on what it is compared with."""
    from safetensors.torch import load_file, save_file

    weights = load_file(MODELS["toy-t2i"].ckpt)
    for pad in ("left", "right"):
        save_file(weights, tmp_path / f"{pad}.safetensors", metadata=dict(format="pt", model="toy-t2i", text_pad=pad))
    for order in (["left", "right"], ["right", "left"]):
        paths = [str(tmp_path / f"{pad}.safetensors") for pad in order]
        evaluate.main(["--ckpt", *paths, "--num", "48", "--cfg-scale", "1", "--rewards", "clip"])
    a, b = (json.loads((tmp_path / f"evaluation{k}.json").read_text())["columns"] for k in ("", "-2"))  # both are kept
    assert a["base, cfg 1"] == b["base, cfg 1"] == a["tuned 1, cfg 1"] == b["tuned 2, cfg 1"]
    assert a["tuned 2, cfg 1"] == b["tuned 1, cfg 1"] != a["base, cfg 1"]


@pytest.mark.parametrize("task", ["c2i", "t2i"])
def test_train_sample_and_evaluate_run(task, tmp_path, capsys):
    run = tmp_path / "run"
    train.main(["--task", task, "--steps", "2", "--out", str(run), "--updates-per-batch", "2", *TINY_RUN, *TWO[task]])
    assert {"before.png", "after.png", "curves.png", "policy.safetensors", "state.pt"} < {p.name for p in run.iterdir()}
    assert list(run.glob("events*")) and list(run.glob("samples/*.png"))
    assert weights_header(run / "policy.safetensors")["text_pad"] == "left"  # our default, whatever the release does
    first, second = read_metrics(run)
    assert (first["step"], second["step"]) == (0, 1) and first["sampler_gap"] < 1e-4
    assert first["kl"] > 0 and first["ratio"] != 1  # the second update of a batch scores a policy that has moved
    readme = (HERE / "README.md").read_text()
    for key in first:  # the glossary explains what is logged
        judged = re.sub("^(clip|critic)_(mean|std|not_finite)$", r"NAME_\2", key)
        assert f"`{judged}`" in readme
    sample.main(
        [
            "--ckpt",
            str(run),
            "--compare",
            "--num",
            "1",
            "--out",
            str(tmp_path / "s.png"),
            "--npz",
            str(tmp_path / "s.npz"),
        ]
    )
    found = np.load(tmp_path / "s.npz")
    assert (
        found["arr_0"].dtype == np.uint8 and found["arr_0"].shape[1:] == (64, 64, 3) and found["tokens"].shape[1] == 64
    )
    evaluate.main(["--ckpt", str(run), "--num", "48", "--cfg-scale", "1"])
    columns = json.loads((run / "evaluation.json").read_text())["columns"]
    assert set(columns) == {"base, cfg 1", "tuned, cfg 1", "renders, round trip"}
    assert columns["renders, round trip"]["right: all"] > 0.9 and "recall" in columns["base, cfg 1"]


def test_a_killed_run_continues_as_if_it_had_never_stopped(tmp_path):
    """Resuming without optimizer, learning rate or random state gives a curve that only looks the same."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train.main(["--steps", "5", "--out", str(whole), *TINY_RUN, *TWO["c2i"]])
    command = [sys.executable, HERE / "train.py", "--steps", "5", "--out", str(broken), *TINY_RUN, *TWO["c2i"]]
    command += ["--device", "cpu"]  # the fixture that hides a GPU from these tests does not reach another process
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (broken / "state.pt").exists():
        time.sleep(0.02)
    process.kill()
    process.wait()
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # and in the middle of a line, after the last save
    train.main(["--steps", "5", "--out", str(broken), "--resume", *TINY_RUN, *TWO["c2i"]])
    assert read_metrics(whole) == read_metrics(broken)
    start = read_metrics(whole)[0]
    assert start["kl"] == 0 and start["ratio"] == pytest.approx(1, abs=1e-4)
    a, b = (load_model("toy-c2i", folder / "policy.safetensors") for folder in (whole, broken))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_run_is_not_resumed_against_another_base(tmp_path):
    """Its KL would be to weights that it never began from, and nothing in the log would say so."""
    base, flags = tmp_path / "base.safetensors", ["--out", str(tmp_path / "run"), *TINY_RUN, *TWO["c2i"]]
    shutil.copy(MODELS["toy-c2i"].ckpt, base)
    train.main(["--ckpt", str(base), "--steps", "1", "--lr-schedule", "constant", *flags])
    shutil.copy(tmp_path / "run/policy.safetensors", base)
    with pytest.raises(SystemExit, match="has changed since the run"):
        train.main(["--ckpt", str(base), "--steps", "2", "--lr-schedule", "constant", "--resume", *flags])


def test_a_stage_that_is_stopped_leaves_the_old_weights(tmp_path, monkeypatch):
    """A text encoder of random weights in the place of the trained one would load without a word."""
    shutil.copytree(HERE / "weights", tmp_path / "weights")
    before = {path: path.read_bytes() for path in (tmp_path / "weights").rglob("*") if path.is_file()}
    monkeypatch.setattr(data, "sample_captions", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    for stage in ("t5", "clip", "t2i"):
        with pytest.raises(SystemExit, match="stopped"):
            pretrain.main(["--stages", stage, "--out", str(tmp_path / "weights")])
    assert all(path.read_bytes() == content for path, content in before.items())


def test_the_same_seed_draws_the_same_pictures():
    model, tokenizer = load_model("toy-c2i"), load_tokenizer("toy", MODELS["toy-c2i"].vq_ckpt)
    encode = sample.make_encoder("toy-c2i")
    (a, s), (b, t), (_, u) = (sample.draw(model, tokenizer, encode, [0, 1], seed=seed) for seed in (3, 3, 4))
    assert torch.equal(s, t) and torch.equal(a, b) and not torch.equal(s, u)


def test_precision_and_recall_know_the_extremes():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((200, 4)), rng.standard_normal((200, 4))
    assert min(evaluate.precision_recall(a, b)) > 0.85 and evaluate.precision_recall(a + 100, b) == (0, 0)
    collapsed = np.repeat(b[:1], 200, 0) + 1e-3 * a
    precision, recall = evaluate.precision_recall(collapsed, b)
    assert precision == 1 and recall < 0.1
    assert evaluate.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert evaluate.frechet_distance(a + 1, a) == pytest.approx(4, rel=1e-6)


def test_shipped_weights_are_what_their_reports_describe():
    reports = {path.stem: json.loads(path.read_text()) for path in (HERE / "weights").glob("*.json")}
    assert set(reports) == {"toy-vq", "toy-t5", "toy-c2i", "toy-t2i", "toy-clip", "toy-critic"}
    folders = {
        "toy-t5": "toy-t5/model",
        "toy-clip": "toy-clip/open_clip_model",
    }  # in transformers' and open_clip's form
    for name, found in reports.items():
        path = HERE / f"weights/{folders.get(name, name)}.safetensors"
        assert hashlib.sha256(path.read_bytes()).hexdigest() == found["sha256"] and found["seed"] is not None
    right = reports["toy-t2i"]["figures"]["right, cfg 1"]  # room for GRPO, and right samples in most of its groups
    assert 0.5 <= right["all"] <= 0.7 and min(right.values()) >= 0.2
    assert sum(p.stat().st_size for p in (HERE / "weights").rglob("*") if p.is_file()) < 20e6


def test_the_readme_holds():
    """Commands that no longer parse and links to the wrong line are what makes people stop reading."""
    readme = (HERE / "README.md").read_text()
    links = re.findall(r"\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)", readme)
    assert len(links) > 5
    for name, path, line in links:
        assert name in (HERE / path).read_text().splitlines()[int(line) - 1], f"{name} is not at {path}:{line}"
    commands = re.findall(r"^python (\w+)\.py *(.*?) *(?:#.*)?$", readme, re.MULTILINE)
    assert {"train", "sample", "evaluate", "pretrain", "bench"} <= {script for script, _ in commands}
    parsers = {"train": train.parse_args, "sample": sample.parse_args, "evaluate": evaluate.parse_args}
    for script, flags in commands:
        if script in parsers and "--ckpt" not in flags:
            parsers[script](shlex.split(flags))


def wrong_files(folder):
    (folder / "cut.safetensors").write_bytes((HERE / "weights/toy-c2i.safetensors").read_bytes()[:9000])
    (folder / "cut.pt").write_bytes(b"PK\x03\x04 not whole")
    torch.save({"model": {"w": torch.zeros(2)}, "code": Path}, folder / "code.pt")
    (folder / "prompts.json").write_text("{")
    small = {"layers.0.attention.wqkv.weight": torch.zeros(3, 3)}
    torch.save({"model": small}, folder / "small.pt")
    torch.save({"model": [torch.zeros(2)]}, folder / "list.pt")
    state = load_model("toy-c2i").state_dict()
    torch.save(state | {"extra.weight": torch.zeros(1)}, folder / "extra.pt")
    torch.save({name: w for name, w in state.items() if name != "norm.weight"}, folder / "missing.pt")
    torch.save(state | {"norm.weight": torch.zeros(99)}, folder / "shape.pt")
    torch.save({f"vq_model.{name}": w for name, w in state.items()}, folder / "only-vq.pt")
    (folder / "text").mkdir()
    (folder / "text/config.json").write_text("{}")
    (folder / "notes.txt").write_text("these are not weights")
    for name in ("narrow", "cut-t5", "gap-t5"):
        save_tiny_t5(folder / name, dim=32 if name == "narrow" else 64)
    whole = (folder / "cut-t5/model.safetensors").read_bytes()
    (folder / "cut-t5/model.safetensors").write_bytes(whole[: len(whole) // 2])
    from safetensors.torch import load_file, save_file

    some = load_file(folder / "gap-t5/model.safetensors")
    some.pop("encoder.final_layer_norm.weight")
    save_file(some, folder / "gap-t5/model.safetensors", metadata={"format": "pt"})
    (folder / "run").mkdir()
    (folder / "run/state.pt").write_bytes(b"x")
    (folder / "judges/Qwen2.5-VL-3B-Instruct").mkdir(parents=True)
    (folder / "judges/HPS_v2.1_compressed.pt").write_bytes(b"PK\x03\x04 not whole")
    torch.save({"w": torch.zeros(2)}, folder / "judges/ckpt_koniq10k.pt")


def test_every_official_form_of_file_loads(tmp_path):
    """Each wrapper seen in the wild, through the command line, draws the very tokens that our own files draw."""
    from safetensors.torch import load_file, save_file

    gpt = {k: v.float() for k, v in load_file(MODELS["toy-c2i"].ckpt).items()}
    vq = {k: v.float() for k, v in load_file(MODELS["toy-c2i"].vq_ckpt).items()}
    noise = {name: torch.randn_like(weight) for name, weight in gpt.items()}
    vq["quantize.codebook_used"] = torch.zeros(65536)
    forms = {
        "nested.pt": {"model": gpt, "optimizer": {"step": torch.tensor(3)}, "steps": 5},
        "bare.pt": gpt,
        "freqs.pt": {"model": gpt | {"freqs_cis": torch.zeros(65, 16, 2)}},
        "module.pt": {"module": gpt},
        "state_dict.pt": {"state_dict": gpt},
        "half.pt": {"model": {k: v.half() for k, v in gpt.items()}},
    }
    for name, content in forms.items():
        torch.save(content, tmp_path / name)
    torch.save(
        {"ema": vq, "model": {name: torch.randn_like(weight) for name, weight in vq.items()}}, tmp_path / "vq.pt"
    )
    both = {f"gpt_model.{k}": v for k, v in gpt.items()} | {f"vq_model.{k}": v for k, v in vq.items()}
    save_file(both | {f"ref_model.{k}": v for k, v in noise.items()}, tmp_path / "ar-grpo.safetensors")
    drawn = {}
    for name, tokenizer in [("ours", None), *((form, "vq.pt") for form in forms), ("ar-grpo.safetensors",) * 2]:
        files = [] if name == "ours" else ["--ckpt", str(tmp_path / name), "--vq-ckpt", str(tmp_path / tokenizer)]
        out = ["--out", str(tmp_path / "s.png"), "--npz", str(tmp_path / "s.npz")]
        sample.main(["--model", "toy-c2i", *files, "--classes", "red circle", "--num", "2", *out])
        drawn[name] = dict(np.load(tmp_path / "s.npz"))
    for name, found in drawn.items():
        assert (found["tokens"] == drawn["ours"]["tokens"]).all(), name
        assert (found["arr_0"] == drawn["ours"]["arr_0"]).all(), name


@pytest.mark.parametrize("name", ["llamagen-b-256", "llamagen-t2i-xl-256"])
def test_the_official_path_end_to_end(name, tmp_path, monkeypatch, capsys):
    """ImageNet's names, T5, the authors' guidance, official files, bfloat16, no verifier: what the toys do not pass."""
    row = MODELS[name]  # fewer layers and tokens; .ci/run does the same with all of GPT-B
    config = replace(row.config, n_layer=1, n_head=2, dim=64, grid_size=4, caption_dim=64)
    monkeypatch.setitem(MODELS, name, replace(row, config=config))
    torch.manual_seed(0)
    gpt, vq = Transformer(config).state_dict(), VQModel(TOKENIZERS["vq-16"]).state_dict()
    torch.save({"model": gpt | {"freqs_cis": torch.zeros(17, 16, 2)}}, tmp_path / "gpt.pt")
    torch.save({"model": vq | {"quantize.codebook_used": torch.zeros(65536)}}, tmp_path / "vq.pt")
    files, gpt, run = ["--vq-ckpt", str(tmp_path / "vq.pt")], str(tmp_path / "gpt.pt"), str(tmp_path / "run")
    asked, pad = ["--classes", "goldfish"], "left"
    if config.task == "t2i":
        files += ["--text-encoder", str(save_tiny_t5(tmp_path / "t5"))]
        asked, pad = ["--prompts", "a photo of a cat"], "right"
    few = ["--prompts-per-step", "1", "--group-size", "2", "--rewards", "pyiqa:entropy", "--dtype", "bfloat16"]
    pads = ["--text-pad", pad] if config.task == "t2i" else []
    train.main(["--model", name, "--ckpt", gpt, *files, *asked, *few, *pads, "--steps", "1", "--out", run])
    (first,) = read_metrics(tmp_path / "run")
    assert first["kl"] == 0 and first["ratio"] == pytest.approx(1, abs=1e-4) and "verifier" not in first
    assert first["sampler_gap"] < 0.02  # rounding alone
    # our own checkpoint names its model and its padding; the base is given because the hub cannot be asked here
    header = weights_header(tmp_path / "run/policy.safetensors")
    assert header["text_pad"] == pad and float(header["cfg_scale"]) == {"c2i": 2, "t2i": 4}[config.task]
    out = ["--out", str(tmp_path / "a.png"), "--npz", str(tmp_path / "new/a.npz")]
    sample.main(["--ckpt", run, "--compare", "--base", gpt, *files, *asked, "--num", "2", *out])
    assert f"cfg {float(header['cfg_scale']):g}" in capsys.readouterr().out  # a policy is drawn from as it was trained
    found = np.load(tmp_path / "new/a.npz")
    assert found["arr_0"].shape == (2, 64, 64, 3) and len(found["labels" if config.task == "c2i" else "prompts"]) == 2
    evaluate.main(["--ckpt", run, "--base", gpt, *files, *asked, "--num", "2", "--rewards", "pyiqa:entropy"])
    columns = json.loads((tmp_path / "run/evaluation.json").read_text())["columns"]
    cfg = f"cfg {float(header['cfg_scale']):g}"
    assert set(columns) == {"base, cfg 1", "tuned, cfg 1", f"base, {cfg}", f"tuned, {cfg}"}
    assert {"reward: pyiqa:entropy", "entropy"} == set(columns[f"base, {cfg}"]) == set(columns[f"tuned, {cfg}"])
    # the paper's settings: scored without the guidance that it samples with, so another policy is scored
    preset = ["--preset", f"paper-{config.task}", "--model", name, "--steps", "1", "--out", str(tmp_path / "paper")]
    train.main([*preset, "--ckpt", gpt, *files, *asked, *few])
    (paper,) = read_metrics(tmp_path / "paper")
    assert paper["lr"] == 1e-5 and paper["kl"] == 0 and paper["sampler_gap"] > 2 * first["sampler_gap"]


def test_out_of_memory_is_told_from_our_bugs():
    with pytest.raises(RuntimeError) as none_left:
        torch.empty(10**15)
    assert sample.is_out_of_memory(none_left.value) and sample.is_out_of_memory(torch.OutOfMemoryError())
    assert not sample.is_out_of_memory(RuntimeError("shape mismatch"))


def test_print_files_says_where_everything_is_expected(capsys):
    for name, row in MODELS.items():
        sample.main(["--model", name, "--print-files"])
        said = capsys.readouterr().out
        for where in filter(None, (row.ckpt, row.vq_ckpt, row.text_encoder)):
            assert str(where).removeprefix("hf:").split("/")[-1] in said
        assert ("huggingface.co" in said) == (not is_toy(name)) and "--vq-ckpt PATH" in said


def test_presets_are_the_releases_and_the_command_line_wins():
    args = train.parse_args(["--preset", "paper-c2i"])
    assert (args.model, args.steps, args.prompts_per_step, args.group_size) == ("llamagen-xl-384", 400, 4, 8)
    assert (args.lr, args.kl_coef, args.cfg_scale, args.score_cfg, args.lr_schedule) == (1e-5, 0.1, 2, 1, "constant")
    assert args.weights["clip"] == 5 and args.weights["qwen-odd"] == 0.25 and len(args.weights) == 8
    args = train.parse_args(["--preset", "paper-t2i", "--prompts", "a cat", "--kl-coef", "0.5", "--score-cfg", "same"])
    assert (args.model, args.kl_coef, args.score_cfg, args.text_pad) == ("llamagen-t2i-xl-256", 0.5, 4, "right")
    ours = train.parse_args(["--model", "llamagen-xl-384"])  # where the release is wrong, our own default differs
    assert (ours.score_cfg, ours.cfg_scale, ours.lr_schedule) == (2, 2, "linear")


WRONG = [  # (script, flags, a part of its one sentence)
    (sample, ["--ckpt", "{}/none.safetensors"], "no such weights file"),
    (sample, ["--ckpt", "{}/cut.safetensors"], "not a whole safetensors file"),
    (sample, ["--ckpt", "{}/cut.pt"], "truncated"),
    (sample, ["--ckpt", "{}/code.pt"], "more than tensors"),
    (sample, ["--ckpt", str(HERE / "weights/toy-t2i.safetensors")], "another model"),
    (sample, ["--ckpt", str(HERE / "weights/toy-vq.safetensors")], "another model"),
    (sample, ["--classes", "red circel"], "did you mean 'red circle'"),
    (sample, ["--classes", "99"], "0 to 39"),
    (sample, ["--prompts", "a red circle"], "--classes, not --prompts"),
    (sample, ["--task", "t2i", "--prompts", "a dog"], "not in the toy world"),
    (sample, ["--task", "t2i", "--prompts", "{}/prompts.json"], "prompts.json"),
    (sample, ["--task", "t2i", "--model", "toy-c2i"], "--task is t2i"),
    (sample, ["--top-p", "0"], "--top-p"),
    (sample, ["--compare"], "--ckpt"),
    (sample, ["--out", "/proc/none/grid.png"], "/proc/none"),
    (sample, ["--out", "{}/grid"], "ends in .png"),
    (sample, ["--npz", "{}"], "is a folder"),
    (sample, ["--base", "{}/none"], "--compare"),
    (evaluate, ["--cfg-scale", "1", "nan"], "--cfg-scale"),
    (pretrain, ["--quick", "--out", str(HERE / "weights/../weights")], "overwrite the shipped weights"),
    (pretrain, ["--quick", "--out", "{}/cut.pt"], "cut.pt"),
    (bench, ["--images", "-1"], "at least 1"),
    (bench, ["--device", "warp"], "no such device"),
    (train, ["--rewards", "clop=1"], "no judge is called 'clop'"),
    (train, ["--rewards", "clip=x"], "not a number"),
    (train, ["--rewards", "clip,clip=2"], "named twice"),
    (train, ["--rewards", "clip=0"], "all weights are 0"),
    (train, ["--seed", "-1"], "--seed must be at least 0"),
    (train, ["--seed", "99999999999999999999"], "--seed must be"),
    (train, ["--kl-coef", "inf"], "--kl-coef must be at least 0 and finite"),
    (train, ["--temperature", "inf"], "finite"),
    (train, ["--out", "{}/cut.pt"], "choose another folder"),
    (sample, ["--cfg-scale", "0"], "--cfg-scale >= 1"),
    (sample, ["--temperature", "nan"], "--temperature >= 0"),
    (train, ["--rewards", "pyiqa:nonsense"], "no no-reference metric"),
    (train, ["--rewards", "hps", "--reward-weights", "{}/none"], "no such folder"),
    (train, ["--rewards", "hps", "--reward-weights", "{}/run"], "huggingface.co/xswu/HPSv2"),
    (train, ["--rewards", "hps", "--reward-weights", "{}/judges"], "truncated"),
    (train, ["--rewards", "maniqa"], "ckpt_koniq10k.pt is not in --reward-weights"),
    (train, ["--rewards", "maniqa", "--reward-weights", "{}/judges"], "another model"),
    (train, ["--rewards", "clip", "--clip-model", "ViT-Z"], "open_clip has no model 'ViT-Z'"),
    (train, ["--rewards", "clip", "--clip-pretrained", "opanai"], "neither a file nor a tag"),
    (train, ["--rewards", "clip", "--clip-pretrained", "openai"], "timm/vit_base_patch32_clip_224.openai"),
    (train, ["--rewards", "clip", "--clip-model", "ViT-B-32", "--clip-pretrained", "{}/cut.pt"], "could not be loaded"),
    (train, ["--rewards", "qwen-real"], "huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct"),
    (train, ["--rewards", "qwen-real", "--reward-weights", "{}/judges"], "could not be loaded"),
    (train, ["--rewards", "qwen-odd", "--qwen-server", "http://127.0.0.1:9"], "127.0.0.1:9/v1/models does not answer"),
    (train, ["--rewards", "qwen-odd", "--qwen-server", "localhost"], "does not answer"),
    (train, ["--qwen-answer", "maybe"], "--qwen-answer"),
    (train, ["--judge-batch", "0"], "--judge-batch"),
    (evaluate, ["--rewards", "hps"], "huggingface.co/xswu/HPSv2"),
    (train, ["--group-size", "1"], "at least 2"),
    (train, ["--score-cfg", "some"], "some"),
    (train, ["--lr", "0"], "above 0"),
    (train, ["--stepz", "3"], "unrecognized"),
    (train, ["--out", "{}/run"], "holds a run"),
    (train, ["--out", "{}/run", "--resume"], "cannot be read"),
    (train, ["--out", "{}/empty", "--resume"], "nothing to resume"),
    (evaluate, ["--num", "3"], "--num"),
    (train, ["--device", "warp"], "no such device"),
    (sample, ["--device", "warp"], "no such device"),
    (pretrain, ["--quick"], "overwrite the shipped weights"),
    (pretrain, ["--stages", "critic", "--out", "{}"], "weights file"),
    (evaluate, ["--ckpt", "{}/none"], "no such weights file"),
    # the official models
    (sample, ["--model", "llamagen-b-512"], "invalid choice: 'llamagen-b-512'"),
    (sample, ["--model", "llamagen-b-256"], "vq_ds16_c2i.pt of huggingface.co/FoundationVision/LlamaGen cannot be had"),
    (sample, ["--ckpt", "hf:nobody/nothing/x.pt"], "x.pt of huggingface.co/nobody/nothing cannot be had"),
    (sample, ["--ckpt", "hf:nobody"], "hf:OWNER/REPO/FILE"),
    (sample, ["--vq-ckpt", "{}/none.pt"], "none.pt: no such weights file"),
    (sample, ["--vq-ckpt", str(HERE / "weights/toy-c2i.safetensors")], "encoder.conv_in.weight is missing"),
    (sample, ["--ckpt", "{}/small.pt"], "is missing; this is a file of another model"),
    (sample, ["--ckpt", "{}/list.pt"], "holds no named tensors"),
    (sample, ["--ckpt", "{}/extra.pt"], "extra.weight is unknown"),
    (sample, ["--ckpt", "{}/missing.pt"], "norm.weight is missing"),
    (sample, ["--ckpt", "{}/shape.pt"], "norm.weight is [99], not [160]"),
    (sample, ["--ckpt", "{}/only-vq.pt"], "is missing"),
    (sample, ["--ckpt", "{}/notes.txt"], "truncated, or holds more than tensors"),
    (sample, ["--task", "t2i", "--model", "llamagen-b-256"], "--model llamagen-b-256 is a c2i model"),
    (sample, ["--task", "t2i", "--text-encoder", "{}/text"], "no T5 encoder to be had there"),
    (sample, ["--task", "t2i", "--text-encoder", "nobody/nothing"], "no T5 encoder to be had there"),
    (sample, ["--task", "t2i", "--text-encoder", "{}/narrow"], "32 wide, the model's 64"),
    (sample, ["--task", "t2i", "--text-encoder", "{}/cut-t5"], "no T5 encoder to be had there"),
    (sample, ["--task", "t2i", "--text-encoder", "{}/gap-t5"], "is missing or misshapen"),
    (sample, ["--print-files", "--ckpt", "hf:nobody"], "OWNER/REPO"),
    (sample, ["--task", "t2i", "--print-files", "--text-encoder", "foo"], "OWNER/REPO"),
    (sample, ["--dtype", "float8"], "invalid choice: 'float8'"),
    (train, ["--preset", "paper"], "invalid choice: 'paper'"),
    (train, ["--preset", "paper-c2i", "--task", "t2i"], "--task is t2i"),
    (train, ["--preset", "paper-t2i", "--classes", "goldfish"], "takes --prompts, not --classes"),
    (train, ["--model", "llamagen-t2i-xl-256", "--prompts", "{}/none.txt"], "none.txt: no such prompt file"),
    (train, ["--model", "llamagen-t2i-xl-256"], "needs --prompts"),
    (train, ["--adam-beta2", "1"], "--adam-beta2"),
]  # fmt: skip


@pytest.mark.parametrize(
    "script, flags, sentence", WRONG, ids=[f"{s.__name__} {' '.join(f)}"[-60:] for s, f, _ in WRONG]
)
def test_what_a_user_can_do_wrong_ends_in_one_sentence(script, flags, sentence, tmp_path, capsys, monkeypatch):
    wrong_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        script.main([flag.replace("{}", str(tmp_path)) for flag in flags])
    said = capsys.readouterr().err.strip().splitlines()[-1:] if stop.value.code == 2 else [str(stop.value.code)]
    assert stop.value.code != 0 and sentence in said[0] and "\n" not in said[0] and "Traceback" not in said[0]
