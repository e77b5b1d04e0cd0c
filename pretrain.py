"""
Makes every weight of the toy world from nothing: the tokenizer, the base transformers, the judges.

    python pretrain.py                       # everything, in order; writes weights/
    python pretrain.py --stages clip         # one of the stages; later ones read what earlier ones wrote
    python pretrain.py --quick --out /tmp/w  # a few steps of each: does it run?

Nobody needs this to use the project: its results are in weights/, each with a JSON that says how it was made and how
good it is. Everything takes about 3 hours on 2 cores of an AMD EPYC with avx512_bf16, and longer on processors without
instructions for bfloat16. Every stage has its own seed and reads only files, so each can be run alone.

The bases learn from pictures as careless as those of the web (data.CORPUS), until more steps no longer help. They draw
well, but as often the wrong thing as their corpus shows it. Tokenizer and judges learn from clean renders.

Shapes: B images, P words, T = 64 tokens, V = 512 codes, D numbers per code.
"""

if __name__ == "__main__":  # before torch, whose OpenMP reads it while it loads; see train.py
    import os

    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import json
import math
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import trange

import data
import zoo
from model import Transformer
from prompts import TextEncoder, captions_of, load_encoder
from rewards import clip_image_features, realism_network
from sample import draw
from tokenizer import VQModel, to_unit
from zoo import Mistake


def world_captions(n, rng):
    """n captions, half from c2i's classes and half from t2i: tokenizer and judges serve both tasks."""
    names = [data.TOY_CLASSES[k] for k in rng.integers(len(data.TOY_CLASSES), size=n - n // 2)]
    return [data.class_caption(name) for name in names] + data.sample_captions(n // 2, rng)


def renders(captions, rng):
    """Renders of captions as a tensor (B, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(data.render(captions, rng)) * 2 - 1


def dtype_here():
    """bfloat16 on processors with instructions for it, where it halves the time; float32 on others."""
    return zoo.quick_dtype("llamagen-b-256", "cpu")


class Fit:
    """
    What all stages share: AdamW, clipped gradients, a progress bar. The learning rate warms up, falls along a cosine to
    a fiftieth at five sixths of the steps, and stays.
    """

    def __init__(self, name, parameters, steps, lr, betas=(0.9, 0.95), weight_decay=0.0, warmup=50):
        self.parameters, self.lr, self.warmup = list(parameters), lr, warmup
        self.optimizer = torch.optim.AdamW(self.parameters, betas=betas, weight_decay=weight_decay)
        self.steps, self.shown = trange(steps, desc=name), []

    def learn(self, loss, number):
        """A step on `loss`. `number` says how it goes: the bar shows its mean of twenty steps."""
        step = len(self.shown)
        done = min(1, step / (len(self.steps) * 5 / 6))
        now = self.lr * min(1, (step + 1) / self.warmup) * (0.51 + 0.49 * math.cos(math.pi * done))
        for group in self.optimizer.param_groups:
            group["lr"] = now
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.shown.append(number)
        self.steps.set_postfix_str(f"{np.mean(self.shown[-20:]):.3f}", refresh=False)


def save_half(module, path):
    weights = {name: value.detach().half().contiguous() for name, value in module.state_dict().items()}
    save_file(weights, path, metadata={"format": "pt"})


def report(args, path, figures, seed, seconds):
    """Writes NAME.json beside the weights at `path`: command, seed, seconds, figures, sha256."""
    facts = dict(
        command=" ".join(["python pretrain.py", *sys.argv[1:]]), seed=seed, seconds=round(seconds),
        threads=torch.get_num_threads(), figures=figures, sha256=zoo.file_hash(path),
    )  # fmt: skip
    place = path if path.parent == args.out else path.parent  # toy-t5 and toy-clip are folders
    place.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {seconds:.0f} s, {json.dumps(figures)}")


def toy_tokenizer(args):
    return zoo.load_tokenizer("toy-c2i", args.out / "toy-vq.safetensors")


# ---------------------------------------------------------------------------------------------------------------
# 1. The tokenizer


@torch.no_grad()
def revive(codebook, counts, latents, error):
    """
    Moves codes of few uses, counts (V,), to latents (B, T, D) of badly decoded cells, chosen in proportion to their
    squared error (B, T) (Jukebox, arXiv 2005.00341, section 3.1). A code that is no latent's nearest gets no gradient:
    without restarts half of the toy's codebook ends up unused.
    """
    dead = counts < 0.02 * counts.float().mean()
    if dead.any():
        cells = torch.multinomial(error.flatten(), int(dead.sum()))
        codebook.embedding.weight[dead] = latents.flatten(0, 1)[cells]


def train_vq(args, seed, steps=7500, batch=32, lr=1e-3):
    """
    VQGAN's loss (arXiv 2012.09841, eq. 4): reconstruction + |sg(z) - e|^2 + 0.25 |z - sg(e)|^2. Without LPIPS, whose
    weights would be a download, and without the discriminator, which caused halos around the objects.
    """
    rng = np.random.default_rng(seed)
    model, side = VQModel(zoo.VQ_TOY), 8  # px of a token's cell
    fit, counts = Fit("tokenizer", model.parameters(), steps, lr), torch.zeros(512)
    for step in fit.steps:
        images = renders(world_captions(batch, rng), rng)
        with zoo.autocast("cpu", dtype_here()):
            latents = model.latents(images).float()  # (B, T, D)
            tokens = model.nearest(latents)  # (B, T)
            codes = model.quantize.vectors()[tokens]  # (B, T, D)
            straight = latents + (codes - latents).detach()  # d straight / d latents = 1
            output = model.from_codes(straight)  # (B, 3, 64, 64)
        commitment = (codes - latents.detach()).square().mean() + 0.25 * (codes.detach() - latents).square().mean()
        squared = (output.float() - images).square()
        loss = squared.mean() + 0.1 * (output - images).abs().mean() + commitment
        fit.learn(loss, squared.mean().item())
        counts += torch.bincount(tokens.flatten(), minlength=512)
        if step % 50 == 49:
            if step < steps * 5 // 6:  # later ones would not find their place in time
                revive(model.quantize, counts, latents, F.avg_pool2d(squared.detach().mean(1), side).flatten(1))
            counts.zero_()
    path = args.out / "toy-vq.safetensors"
    save_half(model, path)
    model = toy_tokenizer(args)  # the figures are those of the float16 weights that are shipped
    rng = np.random.default_rng(seed + 1000)
    captions = world_captions(args.eval_images, rng)
    images = renders(captions, rng)
    with torch.no_grad():
        tokens = torch.cat([model.encode(part) for part in images.split(64)])
        output = torch.cat([model.decode(part) for part in tokens.split(64)]).clamp(-1, 1)
    right = [data.satisfies(image / 2 + 0.5, caption) for image, caption in zip(output, captions, strict=True)]
    psnr = 10 * torch.log10(4 / (output - images).square().mean())  # dB; images are in [-1, 1]
    figures = dict(
        images=len(captions), psnr_db=round(float(psnr), 2), codes_used=len(tokens.unique()), codes=512,
        verifier_on_round_trips=float(np.mean(right)),
    )  # fmt: skip
    return path, figures


# ---------------------------------------------------------------------------------------------------------------
# 2. The base transformers


WORDS = ["a", "an", "photo", "of", "and", "left", "right", "above", "below", *data.COUNTS, *data.COLOURS, *data.SHAPES]
WORDS += [shape + "s" for shape in data.SHAPES]
# the end of text has the highest id, where CLIP pools the text
VOCABULARY = {word: k for k, word in enumerate(["<pad>", "<unk>", *WORDS, "</s>"])}


def write_words(name):
    """Saves the tokenizer of the toy's captions, one token per word, in transformers' form: returns its folder NAME."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", VOCABULARY["</s>"])])
    special = dict(pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
    folder = Path(tempfile.mkdtemp(), name)  # a stage that is stopped leaves the old weights in their place
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def slots(caption):
    """A picture's content in reading order, as six class numbers: count, colour, shape, colour, shape, relation."""
    objects, relation = data.reading_order(caption)
    (count, colour, shape), (_, colour2, shape2) = (*objects, (0, None, None))[:2]
    colours, shapes = (None, *data.COLOURS), (None, *data.SHAPES)
    first = [count, colours.index(colour), data.SHAPES.index(shape)]
    second = [colours.index(colour2), shapes.index(shape2)]
    return [*first, *second, (None, *data.RELATIONS).index(relation)]


def train_t5(args, seed, steps=800, batch=64, lr=2e-3):
    """
    The toy's text encoder: a two-layer T5 learns to parse, from captions alone. A linear layer must read the picture's
    content, in reading order, from the features at every word. FLAN-T5 brings as much to LlamaGen.

    At every word, because image tokens attend equally to all of the text (see model.rope_2d). In order, because a T5
    that knows only which two objects there are leaves the transformer to guess which comes first, and bindings stay at
    chance. A T5 trained only through the pictures left even colours at chance after 1,200 steps.
    """
    from transformers import T5Config, T5EncoderModel

    rng, folder = np.random.default_rng(seed), write_words("toy-t5")
    config = zoo.MODELS["toy-t2i"].config
    T5EncoderModel(
        T5Config(
            vocab_size=len(VOCABULARY), d_model=config.caption_dim, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=len(VOCABULARY) - 1,
        )
    ).save_pretrained(folder)  # fmt: skip
    encode = TextEncoder(folder, config)
    sizes = [4, 9, 5, 9, 6, 5]  # how many classes each slot has
    head = nn.Linear(config.caption_dim, sum(sizes))
    parameters = [*encode.t5.requires_grad_(True).parameters(), *head.parameters()]
    fit = Fit("t5", parameters, steps, lr, betas=(0.9, 0.98), weight_decay=0.01)
    for _ in fit.steps:
        captions = data.sample_captions(batch, rng)
        features, mask = encode(captions)  # (B, P, C), (B, P)
        target = torch.tensor([slots(caption) for caption in captions])[:, None].expand(-1, mask.shape[1], -1)[mask]
        logits = head(features[mask]).split(sizes, -1)  # six times (words of the batch, classes)
        loss = sum(F.cross_entropy(part, target[:, k]) for k, part in enumerate(logits))
        found = torch.stack([part.argmax(-1) for part in logits], -1)
        fit.learn(loss, (found == target).all(-1).float().mean().item())
    save_half(encode.t5, folder / "model.safetensors")
    path = args.out / "toy-t5/model.safetensors"
    shutil.copytree(folder, path.parent, dirs_exist_ok=True)
    figures = dict(words_that_know_the_whole_meaning=round(float(np.mean(fit.shown[-20:])), 4))
    return path, figures


def train_base(args, seed, name, steps=6000, batch=32, lr=2e-3):
    """
    Maximum likelihood on tokens, the condition dropped with probability 0.1. The first half of the steps sees clean
    renders, the second half the careless corpus, which the base ends up imitating. (From the corpus alone 20% of the
    c2i base's samples were right after 4,600 steps; from clean renders 75% after 1,500.) The last sixth hardly lowers
    the held-out loss, so more steps would not help.
    """
    rng, tokenizer = np.random.default_rng(seed), toy_tokenizer(args)
    model, encode = Transformer(zoo.MODELS[name].config), load_encoder(name, args.out / "toy-t5")
    unseen = np.random.default_rng([seed, 1])
    held_out = [corpus_batch(name, tokenizer, 48, unseen) for _ in range(args.eval_images // 48)]
    fit, figures, fakes = Fit(name, model.parameters(), steps, lr), {}, []
    for step in fit.steps:
        prompts, tokens = corpus_batch(name, tokenizer, batch, rng, clean=step < steps // 2)
        cond, cond_mask = encode(prompts)
        dropped = torch.from_numpy(rng.random(batch) < 0.1).view(-1, *[1] * (cond.dim() - 1))
        cond = torch.where(dropped, model.cls_embedding.null(cond), cond)
        with zoo.autocast("cpu", dtype_here()):
            logits = model(cond, tokens, cond_mask)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        fit.learn(loss, loss.item())
        if step + 1 in (steps // 2, steps * 5 // 6, steps):
            nats = mean_loss(model, encode, held_out)
            figures[f"held-out loss after {step + 1} steps, nats per token"] = round(nats, 4)
        # the realism judge's negatives: pictures of a base that has hardly begun, and of the finished one
        if step + 1 in (steps // 10, steps):
            prompts = sample_prompts(name, args.eval_images, rng)
            images, tokens = draw(model, tokenizer, encode, prompts, seed=step)
            fakes.append(tokens)
    right = [data.satisfies(*pair) for pair in zip(images, captions_of(name, prompts), strict=True)]
    figures["right, cfg 1"] = dict(all=round(float(np.mean(right)), 3))
    np.savez(args.out / f"{name}-fakes.npz", tokens=torch.cat(fakes).numpy().astype(np.uint16))
    path = args.out / f"{name}.safetensors"
    save_half(model, path)
    return path, figures


@torch.no_grad()
def corpus_batch(name, tokenizer, n, rng, clean=False):
    """n random labels or captions and the tokens (n, T) of their pictures, clean or careless."""
    prompts = sample_prompts(name, n, rng)
    paint = data.render if clean else partial(data.corpus, task=zoo.MODELS[name].config.task)
    images = paint(captions_of(name, prompts), rng)  # (n, 3, 64, 64) in [0, 1]
    return prompts, tokenizer.encode(torch.from_numpy(images) * 2 - 1)


@torch.no_grad()
def mean_loss(model, encode, batches):
    """Cross-entropy, nats per token, of a base in [(prompts, tokens)]."""
    losses = []
    for prompts, tokens in batches:
        cond, cond_mask = encode(prompts)
        losses.append(F.cross_entropy(model(cond, tokens, cond_mask).flatten(0, 1), tokens.flatten()).item())
    return float(np.mean(losses))


def sample_prompts(name, n, rng):
    """n random labels or captions, as the model `name` takes them."""
    if zoo.MODELS[name].config.task == "c2i":
        return rng.integers(zoo.MODELS[name].config.num_classes, size=n).tolist()
    # the two categories of most captions three times as often as the others: they take longest to learn
    return data.sample_captions(n, rng, data.CATEGORIES + 2 * ("position", "binding"))


# ---------------------------------------------------------------------------------------------------------------
# 3. The judges

MALFORMED = tuple(way for way in data.SPOILT if way != "stray object")  # two circles are right for "two circles"
CLIP_CONFIG = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 64, "layers": 4, "width": 96, "head_width": 32, "patch_size": 8},
        # hf_tokenizer_name only says that the words are in transformers' form: open_clip reads them from its folder
        "text_cfg": {
            "context_length": 12, "hf_tokenizer_name": "toy", "width": 64, "heads": 4, "layers": 2,
            "vocab_size": len(VOCABULARY),
        },
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}  # fmt: skip


def exclusive_losses(logits, captions, texts):
    """
    CLIP's two cross-entropies, of logits (B, M), for captions that repeat or are true together. A pair (image, text) is
    positive if the image's caption means the same, negative if it has the same category and another meaning, and
    ignored between categories ("a circle" is also true of "a red circle"). A positive competes with the negatives of
    its row, then of its column. captions: B strings, or None for an image that no text is true of.
    """
    key = {t: (data.category_of(t), data.meaning(t)) for t in {*texts, *filter(None, captions)}}
    same_kind = torch.tensor([[c is None or key[c][0] == key[t][0] for t in texts] for c in captions])
    positive = torch.tensor([[c is not None and key[c] == key[t] for t in texts] for c in captions])
    negatives = logits.masked_fill(~same_kind | positive, -1e4)
    by_row = F.softplus(negatives.logsumexp(1, keepdim=True) - logits)
    by_column = F.softplus(negatives.logsumexp(0, keepdim=True) - logits)
    return by_row[positive].mean() + by_column[positive].mean()


def train_clip(args, seed, steps=1200, batch=40, lr=1e-3):
    """
    A CLIP on round trips of renders. Images meet captions that are wrong in one attribute (NegCLIP, arXiv 2210.01936;
    without them CLIP learns no left and right), and captions meet badly made and crowded images.
    """
    import open_clip

    rng, folder = np.random.default_rng(seed), write_words("toy-clip")
    (folder / "open_clip_config.json").write_text(json.dumps(CLIP_CONFIG, indent=1) + "\n")
    model, words = open_clip.create_model(f"local-dir:{folder}"), open_clip.get_tokenizer(f"local-dir:{folder}")
    tokenizer = toy_tokenizer(args)
    fit = Fit("clip", model.parameters(), steps, lr, betas=(0.9, 0.98), weight_decay=0.05, warmup=200)
    for _ in fit.steps:
        captions = world_captions(batch, rng)
        images = renders(captions, rng)
        wrong = [data.corpus(captions[::4], rng, MALFORMED), data.render_crowds(captions[1::4], rng)]
        wrong = torch.from_numpy(np.concatenate(wrong)) * 2 - 1  # right for no caption
        with torch.no_grad():
            images = to_unit(tokenizer.decode(tokenizer.encode(torch.cat([images, wrong]))))
        texts = list(dict.fromkeys(captions + [data.wrong_caption(c, rng) for c in captions for _ in range(2)]))
        text_features = model.encode_text(words(texts), normalize=True)
        logits = model.logit_scale.exp() * clip_image_features(model, images) @ text_features.T
        loss = exclusive_losses(logits, captions + [None] * len(wrong), texts)
        fit.learn(loss, loss.item())
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))  # as CLIP
    save_half(model, folder / "open_clip_model.safetensors")
    path = args.out / "toy-clip/open_clip_model.safetensors"
    shutil.copytree(folder, path.parent, dirs_exist_ok=True)
    figures = dict(loss=round(float(np.mean(fit.shown[-50:])), 3))
    return path, figures


def train_realism(args, seed, steps=1000, batch=48, lr=1e-3):
    """
    Cross-entropy between round trips of clean renders, half of a batch, and badly made pictures of the corpus and
    samples of the two bases, a quarter each.
    """
    rng = np.random.default_rng(seed)
    tokenizer, network = toy_tokenizer(args), realism_network()
    fakes = [np.load(args.out / f"{name}-fakes.npz")["tokens"] for name in ("toy-c2i", "toy-t2i")]
    fakes = torch.from_numpy(np.concatenate(fakes).astype(np.int64))  # (drawn, T)
    fit = Fit("realism", network.parameters(), steps, lr, betas=(0.9, 0.99), weight_decay=0.05)
    for _ in fit.steps:
        with torch.no_grad():
            spoilt = torch.from_numpy(data.corpus(world_captions(batch // 4, rng), rng, data.SPOILT)) * 2 - 1
            shown = tokenizer.encode(torch.cat([renders(world_captions(batch // 2, rng), rng), spoilt]))
            fake = fakes[rng.integers(len(fakes), size=batch - len(shown))]
            images = tokenizer.decode(torch.cat([shown, fake])).clamp(-1, 1)
        target = torch.zeros(batch)
        target[: batch // 2] = 1
        logits = network(images)[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits, target)
        fit.learn(loss, ((logits > 0) == (target > 0)).float().mean().item())
    path = args.out / "toy-realism.safetensors"
    save_half(network, path)
    return path, dict(accuracy=round(float(np.mean(fit.shown[-50:])), 3))


STAGES = {  # name: (what trains it, seed)
    "vq": (train_vq, 1),
    "t5": (train_t5, 6),
    "c2i": (partial(train_base, name="toy-c2i"), 2),
    "t2i": (partial(train_base, name="toy-t2i", steps=6400), 3),
    "c2i-small": (partial(train_base, name="toy-c2i-small"), 7),
    "clip": (train_clip, 4),
    "realism": (train_realism, 5),
}


def parse_args(argv=None):
    parser = zoo.script_parser(__doc__)
    add = parser.add_argument
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="what to make, in this order (default: all)")
    add("--out", type=zoo.user_path, default=zoo.WEIGHTS, help="folder to write to (default: weights/)")
    add("--quick", action="store_true", help="five steps per stage and few images: a check that it runs; needs --out")
    args = parser.parse_args(argv)
    if args.quick and args.out.resolve() == zoo.WEIGHTS.resolve():
        raise Mistake("--quick needs --out: weights/ holds the shipped weights")
    args.eval_images = 48 if args.quick else 1024
    return args


def run(args):
    zoo.make_folder(args.out)
    for name in args.stages:
        train, seed = STAGES[name]
        start = time.time()
        torch.manual_seed(seed)
        path, figures = train(args, seed, **(dict(steps=5) if args.quick else {}))
        report(args, path, figures, seed, time.time() - start)


def main(argv=None):
    zoo.run_script(parse_args, run, argv)


if __name__ == "__main__":
    main()
