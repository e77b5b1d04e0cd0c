"""
The judges, and how their scores become one reward.

A judge is a function  fn(images (N, 3, H, W) in [0, 1], prompts: N strings) -> scores (N,)  made by a factory that
loads its weights and imports its library. Prompts repeat inside a batch (a group of samples shares its prompt), so a
judge computes text features once per distinct prompt. Adding a judge is a factory and a line in JUDGES. Where several
scores come out of one model, a single function returns {name: scores (N,)}.

    clip         cosine of image and caption features of an open_clip model: does it show what was asked?
    hps          the same of HPSv2.1, a CLIP trained on which of two pictures people preferred
    clip-step, hps-step   the two cosines in four steps, as the paper; no further forward pass
    maniqa       MANIQA trained on KonIQ: technical quality, no caption
    qwen-match, qwen-real, qwen-odd   three questions to Qwen2.5-VL: match, 0 to 5; is it real, is nothing odd, 0 to 1
    critic       toy only: probability that the picture is real and not sampled: does it look right?
    pyiqa:NAME   any no-reference quality metric of pyiqa, negated where lower is better (piqe needs no download)

`--rewards clip=1,critic=0.25` is their weighted sum. Each judge keeps its own scale; the paper's multipliers (5 for
the cosines, 2 for MANIQA, 1/4 for each question) are weights. A score that is not finite has no say (it counts as its
group's mean) and is counted in the log; the official code scores an unreadable answer like the worst picture.

Where weights come from: --reward-weights DIR if the file is there (README, "Several judges", has the names), else the
hub. Every judge loads strictly: one that was half initialised at random would still return plausible numbers.
"""

import base64
import http.client
import io
import json
import math
import re
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import is_toy
from tokenizer import ResBlock, find_file, load_strict, read_weights

WEIGHTS = Path(__file__).parent / "weights"
TOY_CLIP = f"local-dir:{WEIGHTS / 'toy-clip'}"  # an open_clip model name: configuration, weights and words in a folder

# What a factory may want to know; add_judge_flags describes each. load_judges fills in what its caller leaves out.
OPTIONS = dict(clip_model=TOY_CLIP, clip_pretrained=None, reward_weights=None, qwen_answer="probability",
               qwen_server=None, judge_batch=16)  # fmt: skip


def add_judge_flags(parser):
    """The flags that train.py and evaluate.py share: whose weights judge, and how."""
    add = parser.add_argument_group("the judges' models").add_argument
    add("--clip-model", help="clip: a model of open_clip (default: the toy's CLIP for a toy, else ViT-B-32-quickgelu)")
    add("--clip-pretrained", metavar="TAG", help="clip: a tag of that model or a file (default openai, the paper's)")
    add("--reward-weights", metavar="DIR", help="judges' weights are looked for here before the hub (README: names)")
    add("--qwen-answer", choices=("probability", "json"), default="probability",
        help="probability (default): the mean over the answer tokens' probabilities, one forward pass; "
             "json: generated text, parsed, as the paper")  # fmt: skip
    add("--qwen-server", metavar="URL", help="ask this OpenAI-compatible server, not a local Qwen (default: local)")
    add("--judge-batch", type=int, default=16, help="images at once in maniqa and qwen; memory, not the result (16)")


def judge_options(args, model):
    """The options dict of parsed flags, for judging pictures of the model named `model`. Raises ValueError."""
    options = {name: getattr(args, name) for name in OPTIONS}
    real = options["clip_model"] or options["clip_pretrained"] or not is_toy(model)
    if real:  # the toy's CLIP has seen nothing but shapes; open_clip's have never seen any
        options["clip_model"] = options["clip_model"] or "ViT-B-32-quickgelu"
        options["clip_pretrained"] = options["clip_pretrained"] or "openai"
    else:
        options["clip_model"] = TOY_CLIP
    if options["judge_batch"] < 1:
        raise ValueError("--judge-batch must be at least 1")
    if options["reward_weights"] and not Path(options["reward_weights"]).is_dir():
        raise ValueError(f"--reward-weights: no such folder: {options['reward_weights']}")
    return options


def short(error):
    """The first sentence of an exception: libraries explain at length, and ours is one sentence."""
    return re.split(r"\n|\. ", f"{type(error).__name__}: {error}")[0][:200]


def find_weights(repo, filename, folder):
    """
    The path of DIR/filename (--reward-weights) if it is there, else of the hub's copy, downloaded once.
    Raises FileNotFoundError.
    """
    if folder and (Path(folder) / filename).is_file():
        return Path(folder) / filename
    try:
        return find_file(f"hf:{repo}/{filename}", "put it into --reward-weights DIR")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{filename} is not in --reward-weights ({folder or 'not given'}); {error}") from None


# ---------------------------------------------------------------------------------------------------------------
# CLIP (arXiv 2103.00020) and HPSv2.1 (arXiv 2306.09341), which is a CLIP with other weights


def load_clip(name=TOY_CLIP, pretrained=None, folder=None, device="cpu"):
    """
    (model, tokenizer) of open_clip, frozen, in eval mode, float32. `name`: of open_clip's list, or local-dir:FOLDER, or
    hf-hub:REPO; `pretrained`: a tag of that list, or a file. FOLDER/<name of the tag's hub repository>/ goes before the
    hub. Raises ValueError.
    """
    import open_clip

    quick_gelu, wanted, hint = False, name, ""
    if ":" not in name:
        if name not in open_clip.list_models():
            raise ValueError(f"--clip-model: open_clip has no model {name!r}; open_clip.list_models() names them")
        tag = open_clip.get_pretrained_cfg(name, pretrained or "")
        if not tag and not Path(pretrained or "").is_file():
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "no tags"
            raise ValueError(f"--clip-pretrained: {pretrained!r} is neither a file nor a tag of {name}; it has {tags}")
        # OpenAI trained with x sigmoid(1.702 x). With the exact GELU of plain "ViT-B-32" open_clip only warns, and
        # every cosine is a little off; so the tag decides.
        quick_gelu = bool(tag and tag.get("quick_gelu"))
        repo = (tag or {}).get("hf_hub", "").strip("/")
        wanted = f"{name} {pretrained}"
        if repo:
            hint = f"; --reward-weights DIR may hold the files of huggingface.co/{repo} in {Path(repo).name}/"
        local = Path(folder or "") / Path(repo).name
        if folder and repo and local.is_dir():
            name, pretrained = f"local-dir:{local}", None
    try:
        model = open_clip.create_model(
            name, pretrained, device=device, force_quick_gelu=quick_gelu, require_pretrained=True
        )
        words = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip raises half a dozen kinds for files that are absent, cut or another model's
        raise ValueError(f"CLIP {wanted} could not be loaded ({short(error)}){hint}") from None
    return model.eval().requires_grad_(False), words


def clip_image_features(model, images):
    """
    Unit image features (N, E) of square images (N, 3, H, H) in [0, 1], resized and normalised as the model was trained.
    Bicubic with antialiasing is what open_clip's own preprocessing does to a picture file, up to rounding.
    """
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


def clip_judge(device, options):
    model, words = load_clip(options["clip_model"], options["clip_pretrained"], options["reward_weights"], device)
    return partial(clip_scores, model=model, words=words)


def hps_judge(device, options):
    """HPSv2.1: its checkpoint replaces every weight of open_clip's ViT-H-14, so LAION's 4 GB are never fetched."""
    path = find_weights("xswu/HPSv2", "HPS_v2.1_compressed.pt", options["reward_weights"])
    weights = read_weights(path)
    import open_clip

    model = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))  # 986M parameters, float32
    model.visual.image_mean, model.visual.image_std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    load_strict(model, weights, path)  # the file is half precision; copied into float32
    model = model.eval().requires_grad_(False).to(device)
    return partial(clip_scores, model=model, words=open_clip.get_tokenizer("ViT-H-14"))


def step_of(cosines):
    """The paper's step function of cosines (N,): below 0 -> -1, below 0.3 -> 0.5, below 0.6 -> 1, else 1.5."""
    values = cosines.new_tensor([-1, 0.5, 1, 1.5])
    which = torch.bucketize(cosines, cosines.new_tensor([0, 0.3, 0.6]), right=True)
    return torch.where(cosines.isfinite(), values[which], torch.nan)  # NaN would fall into the best step


def with_step(images, prompts, judge, base, names):
    """{name: (N,)} for `names` among the judge `base` and its step, from one forward pass."""
    cosines = judge(images, prompts)
    return {name: cosines if name == base else step_of(cosines) for name in names}


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
    """Probability that each image (N, 3, 64, 64) in [0, 1] is real: (N,). Raises ValueError for another size."""
    if images.shape[-1] != 64:
        raise ValueError("--rewards: critic knows the toy world's 64 px pictures only")
    return network(images * 2 - 1)[:, 0].sigmoid()


def critic_judge(device, options):
    path = WEIGHTS / "toy-critic.safetensors"
    network = load_strict(critic_network(), read_weights(path), path).eval().requires_grad_(False)
    return partial(critic_scores, network=network.to(device))


# ---------------------------------------------------------------------------------------------------------------
# pyiqa, and MANIQA (arXiv 2204.08958) through it


def pyiqa_scores(images, prompts, metric):
    """The metric of each image (N, 3, H, W) in [0, 1], turned so that more is better: (N,). One at a time: not every
    metric of pyiqa takes several."""
    sign = -1 if metric.lower_better else 1
    try:
        return sign * torch.cat([metric(image[None]).reshape(1) for image in images])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # some want larger pictures, or captions, or a folder
        raise ValueError(
            f"pyiqa:{metric.metric_name} cannot judge pictures of {images.shape[-1]} px one by one ({short(error)}); "
            f"leave it out of --rewards"
        ) from None


def pyiqa_judge(name, device):
    """Any no-reference metric of pyiqa. Raises ValueError if it has no `name` or cannot fetch its weights."""
    import pyiqa

    known = pyiqa.list_models("NR")
    if name not in known:
        raise ValueError(f"pyiqa has no no-reference metric {name!r}; it has {', '.join(known)}")
    try:
        metric = pyiqa.create_metric(name, device=device)
    except Exception as error:  # each metric downloads in its own way
        raise ValueError(
            f"pyiqa:{name} could not be built ({short(error)}); pyiqa keeps what it downloads in "
            f"{torch.hub.get_dir()}/pyiqa"
        ) from None
    return partial(pyiqa_scores, metric=metric)


def maniqa_network():
    """pyiqa's MANIQA as its metric `maniqa` has it, 136M parameters, with random weights and without a download."""
    import timm
    from pyiqa.archs.maniqa_arch import MANIQA

    create = timm.create_model
    # pyiqa fetches the ImageNet weights of the backbone whatever it is told, and the checkpoint then replaces them.
    timm.create_model = lambda name, pretrained: create(name, pretrained=False)
    try:
        return MANIQA(train_dataset="koniq", scale=0.8, pretrained=False)
    finally:
        timm.create_model = create


def maniqa_scores(images, prompts, network, batch, crops=20):
    """
    MANIQA's score of each square image (N, 3, H, H) in [0, 1]: (N,), about 0 to 1, higher is better: the weighted mean
    over the patches of 20 crops of 224 px, which pyiqa takes on a regular grid. The official code draws its crops at
    random; then two equal pictures of a group are told apart, a score depends on what else drew random numbers, and a
    resumed run leaves the curve of the unbroken one.
    """
    # Below 228 px the grid has a step of 0: pyiqa enlarges to 225 px and takes the same crop 20 times. Once will do.
    network.test_sample = crops if images.shape[-1] >= 228 else 1
    # Peak memory: batch x 20 crops x 785 tokens x 768 floats for each of the 12 layers, 0.6 GB an image.
    return torch.cat([network(part)[:, 0] for part in images.split(batch)])


def maniqa_judge(device, options):
    path = find_weights("chaofengc/IQA-PyTorch-Weights", "ckpt_koniq10k.pt", options["reward_weights"])
    weights = {name.removeprefix("module."): value for name, value in read_weights(path).items()}  # as pyiqa does
    network = load_strict(maniqa_network(), weights, path).eval().requires_grad_(False).to(device)
    return partial(maniqa_scores, network=network, batch=options["judge_batch"])


# ---------------------------------------------------------------------------------------------------------------
# Three questions to Qwen2.5-VL (arXiv 2502.13923). The wording is ours; what is asked is the paper's.

QWEN = "Qwen/Qwen2.5-VL-3B-Instruct"
SERVER_PAUSES = (2, 20)  # s
RATING = {str(k): k for k in range(6)}  # answer token -> what it is worth
YES_NO = {"yes": 1, "Yes": 1, "no": 0, "No": 0}
QUESTIONS = {
    "qwen-match": (
        'An image generator was given the caption "{prompt}" and drew this picture. Rate the picture from 0 to 5. Ask '
        "yourself whether it shows what the caption says, whether anything is missing, and whether it is realistic, "
        "sharp and free of artefacts. 0 is useless, 5 could not be better.",
        RATING,
    ),
    "qwen-real": ("Was this picture taken or made by a person, rather than by an AI image generator?", YES_NO),
    "qwen-odd": (
        "Think of distorted bodies and objects, wrong numbers of parts, things that merge or float, smeared textures "
        "and garbled writing. Is this picture free of all such oddities?",
        YES_NO,
    ),
}


def question_text(name, prompt, answer):
    """What is asked about a picture of `prompt`, ending in how to answer: with a single token, or with JSON."""
    question, worth = QUESTIONS[name]
    rating = worth is RATING
    if answer == "json":
        scale = "N is your rating, 0 to 5" if rating else "N is 1 for yes and 0 for no"
        how = f'Answer with JSON and nothing else: {{"score": N}}, where {scale}.'
    else:
        how = "Answer with one digit and nothing else." if rating else "Answer yes or no, and nothing else."
    return f"{question.format(prompt=prompt)} {how}"


def read_score(text, most):
    """The N of {"score": N} anywhere in a generated text; NaN if there is none or it is not within 0 to `most`."""
    found = re.search(r"""["']?score["']?\s*[:=]\s*["']?(-?\d+(?:\.\d+)?)""", text, re.IGNORECASE)
    value = float(found[1]) if found else math.nan
    return value if 0 <= value <= most else math.nan


def expected_worth(logprobs, worth):
    """
    Mean worth under the probabilities of the answers that are in `logprobs` {token: nats}, renormalised: what the
    model gives to any other first token (an opening quote, a "The") is ignored. NaN if it holds no answer at all.
    """
    mass = {token: math.exp(logprobs[token]) for token in worth if token in logprobs}
    total = sum(mass.values())
    return sum(p * worth[token] for token, p in mass.items()) / total if total else math.nan


def qwen_scores(images, prompts, names, answer, ask):
    """{name: (N,)} of the questions `names`, all asked of all images (N, 3, H, W) in [0, 1] in one go."""
    pixels = (images * 255).round().to(torch.uint8)  # 8 bits, as in the files that it was trained on; never JPEG
    which = [k for k in range(len(prompts)) for _ in names]  # image-major
    texts = [question_text(name, prompt, answer) for prompt in prompts for name in names]
    values = ask(pixels[which], texts, [QUESTIONS[name][1] for _ in prompts for name in names])
    values = torch.tensor(values, device=images.device).view(len(prompts), len(names))
    return {name: values[:, k] for k, name in enumerate(names)}


def ask_model(pixels, texts, worths, model, processor, answer, batch):
    """
    n answers, as floats, to n texts about n uint8 pictures (n, 3, H, W), `batch` at once.
    probability: one forward pass, expected_worth over the answers' tokens at the first position of the reply.
    json: up to 64 tokens, greedily, then read_score.
    """
    values = []
    for k in range(0, len(texts), batch):
        talks = [[dict(role="user", content=[dict(type="image"), dict(type="text", text=text)])]
                 for text in texts[k : k + batch]]  # fmt: skip
        written = processor.apply_chat_template(talks, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=written, images=list(pixels[k : k + batch]), padding=True, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)  # (n, P) tokens, padded on the left: replies start together
        some = worths[k : k + batch]
        if answer == "json":
            tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            replies = processor.batch_decode(tokens, skip_special_tokens=True)
            values += [read_score(reply, max(worth.values())) for reply, worth in zip(replies, some, strict=True)]
        else:
            logits = model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float()  # (n, V)
            logprobs = logits.log_softmax(-1)
            for row, worth in zip(logprobs, some, strict=True):
                found = row[answer_tokens(processor.tokenizer, worth)].tolist()
                values.append(expected_worth(dict(zip(worth, found, strict=True)), worth))
    return values


def answer_tokens(tokenizer, worth):
    """
    The ids of the answers in `worth`. Raises ValueError if one takes several tokens, whose first would not stand for
    it, or if two are the same (the "unknown" of a vocabulary that has neither).
    """
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in worth]
    if any(len(found) != 1 for found in ids) or len({found[0] for found in ids}) < len(ids):
        answers = ", ".join(worth)
        raise ValueError(f"{answers} are not single, distinct tokens of this tokenizer; use --qwen-answer json")
    return [found[0] for found in ids]


def load_qwen(folder, device):
    """(model, processor): FOLDER/Qwen2.5-VL-3B-Instruct, else the hub's; bfloat16 on a GPU. Raises ValueError."""
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()  # one a shard, amid our own lines
    local = Path(folder or "") / Path(QWEN).name
    source = local if folder and local.is_dir() else QWEN
    dtype = torch.bfloat16 if str(device).startswith("cuda") else torch.float32
    try:
        processor = AutoProcessor.from_pretrained(source)
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(source, dtype=dtype, output_loading_info=True)
    except Exception as error:  # transformers raises half a dozen kinds for files that are absent or cut
        raise ValueError(
            f"{source} could not be loaded ({short(error)}); --reward-weights DIR may hold the files of "
            f"huggingface.co/{QWEN} in {Path(QWEN).name}/, and --qwen-server URL needs none"
        ) from None
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:  # transformers only warns, and fills the gap with random numbers
        raise ValueError(f"{source}: {wrong[0]} is missing, unknown or of another shape; fetch the files again")
    processor.tokenizer.padding_side = "left"
    return model.eval().requires_grad_(False).to(device), processor


def call_server(url, path, body=None):
    """
    The JSON that an OpenAI-compatible server returns, for a GET, or a POST of `body`, which is sent again after each of
    SERVER_PAUSES: one request lost among the paper's 38,400 must not end a run of days. Raises ValueError.
    """
    data = None if body is None else json.dumps(body).encode()
    address = f"{url.rstrip('/').removesuffix('/v1')}/v1/{path}"
    for pause in (*(SERVER_PAUSES if data else ()), None):
        try:
            request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=300) as reply:
                return json.load(reply)
        except (OSError, ValueError, http.client.HTTPException) as error:
            # refused, lost, slow or an HTTP status; no address or no JSON; half a reply
            if pause is None:
                raise ValueError(f"--qwen-server: {address} does not answer ({short(error)})") from None
            time.sleep(pause)


def ask_server_once(pixels, text, worth, url, model, answer):
    """As ask_model, of one picture (3, H, W), which travels as PNG and so arrives as it is."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
    url_of_picture = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [dict(type="image_url", image_url=dict(url=url_of_picture)), dict(type="text", text=text)]
    body = dict(model=model, temperature=0, messages=[dict(role="user", content=content)])
    body |= dict(max_tokens=64) if answer == "json" else dict(max_tokens=1, logprobs=True, top_logprobs=20)
    reply = call_server(url, "chat/completions", body)
    try:
        choice = reply["choices"][0]
        if answer == "json":
            return read_score(choice["message"]["content"] or "", max(worth.values()))
        likeliest = choice["logprobs"]["content"][0]["top_logprobs"]  # an answer that is not among 20 weighs nothing
        return expected_worth({entry["token"]: entry["logprob"] for entry in likeliest}, worth)
    except (KeyError, IndexError, TypeError):
        hint = "" if answer == "json" else "; if it gives no logprobs, use --qwen-answer json"
        raise ValueError(f"--qwen-server: {url} answered in another form than OpenAI's{hint}") from None


def ask_server(pixels, texts, worths, url, model, answer):
    """As ask_model. 32 requests at a time, which the server batches."""
    pool, ask = ThreadPoolExecutor(32), partial(ask_server_once, url=url, model=model, answer=answer)
    try:
        return list(pool.map(ask, pixels.cpu(), texts, worths))
    finally:
        pool.shutdown(cancel_futures=True)  # after one failure the rest need not be sent


def qwen_judge(device, options, names):
    """One judge for all of the questions `names`. Raises ValueError."""
    answer, url = options["qwen_answer"], options["qwen_server"]
    if url:
        try:  # the first model that it serves; and whether it is there comes out now, not after the first batch
            model = call_server(url, "models")["data"][0]["id"]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"--qwen-server: {url} names no model that it serves") from None
        ask = partial(ask_server, url=url, model=model, answer=answer)
    else:
        model, processor = load_qwen(options["reward_weights"], device)
        if answer == "probability":  # now, not after the first batch
            for name in names:
                answer_tokens(processor.tokenizer, QUESTIONS[name][1])
        batch = options["judge_batch"] * len(names)
        ask = partial(ask_model, model=model, processor=processor, answer=answer, batch=batch)
    return partial(qwen_scores, names=names, answer=answer, ask=ask)


# ---------------------------------------------------------------------------------------------------------------
# Putting judges together

# name -> factory(device, options)
JUDGES = {"clip": clip_judge, "hps": hps_judge, "maniqa": maniqa_judge, "critic": critic_judge}
STEPS = {"clip-step": "clip", "hps-step": "hps"}  # name -> the judge whose cosine it is the step of


def parse_rewards(text):
    """ "clip=1,critic=0.5" -> {"clip": 1.0, "critic": 0.5}; a name alone weighs 1. Raises ValueError."""
    weights, known = {}, [*JUDGES, *STEPS, *QUESTIONS]
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        if name in weights:
            raise ValueError(f"--rewards: {name} is named twice")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise ValueError(f"--rewards: {weight!r} in {part!r} is not a number") from None
        if name not in known and not name.startswith("pyiqa:"):
            raise ValueError(f"--rewards: no judge is called {name!r}; there are {', '.join(known)} and pyiqa:NAME")
        if not math.isfinite(weights[name]):
            raise ValueError(f"--rewards: the weight of {name} is not finite")
    if not any(weights.values()):
        raise ValueError("--rewards: all weights are 0, so nothing would be learned")
    return weights


def load_judges(names, device="cpu", options=None):
    """
    {name: judge} for the names of a --rewards; those that share a model are one entry, under the model's name.
    `options`: see OPTIONS. Raises ValueError, FileNotFoundError.
    """
    judges, options = {}, OPTIONS | (options or {})
    for name in names:
        kind, _, metric = name.partition(":")
        base = STEPS.get(name, name)
        if kind == "pyiqa":
            judges[name] = pyiqa_judge(metric, device)
        elif name in QUESTIONS:
            if "qwen" not in judges:
                judges["qwen"] = qwen_judge(device, options, [other for other in names if other in QUESTIONS])
        elif base not in judges:
            judges[base] = JUDGES[base](device, options)
            both = [other for other in names if STEPS.get(other, other) == base]
            if both != [base]:
                judges[base] = partial(with_step, judge=judges[base], base=base, names=both)
    return judges


@torch.no_grad()
def score(judges, images, prompts):
    """
    What each judge says of images (N, 3, H, W) in [0, 1]: {name: scores (N,), float32, may hold NaN} and
    {name: seconds}. Of names that share a forward pass the first is charged with it.
    """
    scores, seconds = {}, {}
    for name, judge in judges.items():
        start = time.perf_counter()
        said = judge(images, prompts)
        said = said if isinstance(said, dict) else {name: said}
        scores |= {each: values.float() for each, values in said.items()}
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        seconds |= dict.fromkeys(said, 0.0) | {next(iter(said)): time.perf_counter() - start}
    return scores, seconds


def weighted_sum(scores, weights):
    """Rewards (N,): the sum over judges of weight x score. Missing scores are for grpo.fill_missing to see to."""
    return sum(weights[name] * values for name, values in scores.items())
