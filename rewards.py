"""
The judges, and how their scores become one reward.

A judge is a function  fn(images (N, 3, H, W) in [0, 1], prompts: N strings) -> scores (N,), higher is better; a model
that gives several scores returns {name: scores (N,)}. A factory imports its library, loads its weights and returns the
judge. To add one, write a factory and a line in JUDGES, at the end.

    clip         cosine of image and caption features of an open_clip model: does it show the caption?
    realism      toy only: probability that the picture is a clean render, not spoilt or sampled: does it look right?
    hps          cosine of HPSv2.1, a CLIP trained on which of two pictures people preferred
    clip-step, hps-step   the two cosines in four steps, as in the paper; they need no further forward pass
    maniqa       MANIQA trained on KonIQ: technical quality, no caption
    qwen-match, qwen-real, qwen-odd   three questions to Qwen2.5-VL: match, 0 to 5; is it real, is nothing odd, 0 to 1
    pyiqa:NAME   any no-reference quality metric of pyiqa, negated where lower is better (piqe needs no download)

The reward is their weighted sum, `--rewards clip=1,realism=0.25`. Each judge keeps its own scale; the paper's
multipliers (5 for the cosines, 2 for MANIQA, 1/4 for each question) are weights. A judge of weight 0 is held out: it is
logged and has no say, which shows whether the policy got better or only learned to please the others.

A score that is not finite is missing and counts as the mean of its group. Every judge loads strictly: one that is half
random would still return plausible numbers. Weights come from the Hugging Face hub: HF_HOME moves its cache, and
HF_HUB_OFFLINE=1 forbids downloads.

The official code rounds pictures down to 8 bits before CLIP, HPS and MANIQA, runs HPS in half precision, and shows
MANIQA random crops. Its prompt for Qwen asks for a description, five criteria and a score, in up to 256 tokens; after
three tries, an unreadable answer counts as the worst one.
"""

import asyncio
import base64
import io
import json
import math
import os
import re
import threading
import time
from functools import partial
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F

import parallel
import zoo
from tokenizer import ResBlock
from zoo import Mistake

TOY_CLIP = f"local-dir:{zoo.WEIGHTS / 'toy-clip'}"  # an open_clip name: configuration, weights and words in a folder
# The paper's judges on the hub, each at a commit, so nobody can replace a file. CLIP is what open_clip takes.
HPS = "hf:xswu/HPSv2@697403c78157020a1ae59d23f111aa58ced35b0a/HPS_v2.1_compressed.pt"
MANIQA = "hf:chaofengc/IQA-PyTorch-Weights@0df2df423c65f6a64209309695f3845727431027/ckpt_koniq10k.pt"
QWEN, QWEN_COMMIT = "Qwen/Qwen2.5-VL-3B-Instruct", "66285546d2b821cf421d4f5eb2576359d3770cd3"
AT_ONCE = 8  # images in a pass of MANIQA or Qwen: affects memory only
HUB_CACHE = "HF_HOME, the folder of the hub's cache"  # which brings a judge's files to a machine without a network


# ---------------------------------------------------------------------------------------------------------------
# From --rewards to one number per picture


def parse_rewards(text):
    """ "clip=1,realism=0.5" -> {"clip": 1.0, "realism": 0.5}; a name alone weighs 1. Raises Mistake."""
    weights = {}
    for part in text.split(","):
        name, _, weight = (word.strip() for word in part.partition("="))
        if name in weights:
            raise Mistake(f"--rewards: {name} is named twice")
        try:
            weights[name] = float(weight or 1)
            assert math.isfinite(weights[name])
        except (ValueError, AssertionError):
            raise Mistake(f"--rewards: {weight!r} in {part!r} is not a finite number") from None
        if name not in JUDGES and not name.startswith("pyiqa:"):
            raise Mistake(f"--rewards: no judge is called {name!r}; there are {', '.join(JUDGES)} and pyiqa:NAME")
    if not any(weights.values()):
        raise Mistake("--rewards: all weights are 0, so nothing would be learned")
    return weights


def load_judges(names, device="cpu", options=None):
    """
    {name: judge}. Names of one factory share a model and a forward pass: they are one judge, under the first of them.
    `options`: any of judge_options; the others are added to it, and the model of a server. Raises Mistake,
    FileNotFoundError.
    """
    options = {} if options is None else options
    for flag, value in judge_options().items():
        options.setdefault(flag, value)
    together = {}  # {factory, or pyiqa:NAME: the names that are one judge}
    for name in names:
        together.setdefault(JUDGES.get(name, name), []).append(name)
    judges = {}
    for own in together.values():
        options["names"] = own
        judges[own[0]] = JUDGES.get(own[0], pyiqa_judge)(device, options)
    return judges


@torch.no_grad()
def judge_images(judges, images, prompts):
    """
    Scores of images (N, 3, H, W) in [0, 1]: {name: (N,) float32, may hold NaN}, and {name: seconds}; names of one
    forward pass share its seconds. Raises Mistake if a judge returns something else.
    """
    scores, seconds = {}, {}
    for judge_name, judge in judges.items():
        start = time.perf_counter()
        found = judge(images.clone(), list(prompts))  # copies, which a judge may edit
        what = f"the {type(found).__name__} that the judge {judge_name!r} returned"
        found = found if isinstance(found, dict) else {judge_name: found}
        with zoo.reading(what, "a judge returns one number per picture"):
            assert judge_name in found, f"no {judge_name}"
            for name, values in found.items():
                values = torch.as_tensor(values).detach()
                assert not values.is_complex(), "complex numbers"
                scores[name] = values.float().to(images.device).reshape(len(images))
        zoo.synchronize(images.device)
        seconds |= dict.fromkeys(found, (time.perf_counter() - start) / len(found))
    return scores, seconds


def fill_missing(values, group_size):
    """
    Scores (N,) with those that are not finite set to the mean of their group's finite ones (0 if it has none), where
    they neither help nor hurt. A plain 0 would be the best score of a metric that is never positive.
    """
    groups = values.view(-1, group_size)
    finite = groups.isfinite()
    mean = torch.where(finite, groups, 0).sum(1, keepdim=True) / finite.sum(1, keepdim=True).clamp(min=1)
    return torch.where(finite, groups, mean).flatten()


def weighted_sum(scores, weights):
    """Rewards (N,): the sum over judges of weight x score. {judge: (N,)}, {judge: float} -> (N,)."""
    return sum(weights[name] * values for name, values in scores.items())


def add_judge_flags(add):
    """The flags that train.py, sample.py and evaluate.py share: whose weights judge, and how."""
    add("--clip-model", help="clip: a model of open_clip (default: the toy's CLIP for a toy, else ViT-B-32-quickgelu)")
    add("--clip-pretrained", metavar="TAG", help="clip: a tag of that model or a file (default openai, the paper's)")
    add("--qwen-server", metavar="URL", help="OpenAI-compatible server to ask (default: a Qwen in this process); "
        "OPENAI_API_KEY holds its key if it wants one")  # fmt: skip
    add("--qwen-model", metavar="NAME", help="the server's model to ask (default: the only one it lists)")
    add("--judge-timeout", type=float, default=300.0, help="seconds that --qwen-server may take per batch, retries "
        "included; late scores are missing (default 300)")  # fmt: skip


def judge_options(args=None, model="toy-c2i"):
    """{flag: value} of `args`, or of the defaults, for judging pictures of the model `model`. Raises Mistake."""
    parser = zoo.script_parser()
    add_judge_flags(parser.add_argument)
    defaults = parser.parse_args([])
    zoo.check_range(args or defaults, judge_timeout=0)
    options = {name: getattr(args or defaults, name) for name in vars(defaults)}
    # The toy's CLIP knows only the toy's pictures; open_clip's models know none of them.
    own = zoo.is_toy(model) and not options["clip_pretrained"]
    options["clip_model"] = options["clip_model"] or (TOY_CLIP if own else "ViT-B-32-quickgelu")
    if not options["clip_model"].startswith("local-dir:"):  # whose folder holds the weights
        options["clip_pretrained"] = options["clip_pretrained"] or "openai"
    return options


# ---------------------------------------------------------------------------------------------------------------
# CLIP (arXiv 2103.00020)


def load_clip(name=TOY_CLIP, pretrained=None, device="cpu"):
    """
    (model, words) of open_clip, which loads strictly: the frozen network, float32, and its text tokenizer. `name` is
    one of its list, local-dir:FOLDER or hf-hub:REPO; `pretrained` is a tag of that list, or a file. Raises Mistake.
    """
    import open_clip

    # OpenAI trained with x sigmoid(1.702 x). With the exact GELU of plain "ViT-B-32", open_clip only warns, and every
    # cosine is a little off. So the tag decides.
    gelu = open_clip.get_pretrained_cfg(name, pretrained or "").get("quick_gelu", False)
    options = dict(device=device, force_quick_gelu=gelu, require_pretrained=True)
    wanted = f"CLIP {name} {pretrained or ''}".strip()
    with zoo.reading(wanted, f"it is looked for in {HUB_CACHE}"):
        model, words = open_clip.create_model(name, pretrained, **options), open_clip.get_tokenizer(name)
    return model.eval().requires_grad_(False), words


def clip_image_features(model, images):
    """Unit features (N, E) of square images (N, 3, H, H) in [0, 1], preprocessed as open_clip does, up to rounding."""
    images = F.interpolate(images, model.visual.image_size, mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (images.new_tensor(v)[:, None, None] for v in (model.visual.image_mean, model.visual.image_std))
    return model.encode_image((images - mean) / std, normalize=True)


def step_of(cosines):
    """The paper's step function of cosines (N,): below 0 -> -1, below 0.3 -> 0.5, below 0.6 -> 1, else 1.5."""
    values = cosines.new_tensor([-1, 0.5, 1, 1.5])
    which = torch.bucketize(cosines, cosines.new_tensor([0, 0.3, 0.6]), right=True)
    return torch.where(cosines.isfinite(), values[which], torch.nan)  # NaN would fall into the best step


def clip_scores(images, prompts, model, words, names, warned):
    """
    Cosine of each image with its prompt, (N,) in [-1, 1], or {name: (N,)} where `names` also ask for its step.
    `warned`: empty until a line has said that captions are cut.
    """
    distinct = list(dict.fromkeys(prompts))  # the samples of a group share a prompt
    tokens = words(distinct)  # (distinct, 77): no more of a caption is read
    whole = words(distinct, 8 * tokens.shape[1])[:, : tokens.shape[1]]  # has no end mark where a caption was cut
    if not warned and (cut := (whole != tokens).any(1).sum().item()):
        warned.append(f"{names[0]}: {cut} of {len(distinct)} captions are longer than this CLIP reads, and are cut")
        parallel.say(warned[0])
    texts = model.encode_text(tokens.to(images.device), normalize=True)  # (distinct, E)
    which = torch.tensor([distinct.index(prompt) for prompt in prompts], device=images.device)
    cosines = (clip_image_features(model, images) * texts[which]).sum(-1)
    if names in (["clip"], ["hps"]):
        return cosines
    return {name: step_of(cosines) if name.endswith("-step") else cosines for name in names}


def clip_judge(device, options):
    model, words = load_clip(options["clip_model"], options["clip_pretrained"], device)
    return partial(clip_scores, model=model, words=words, names=options["names"], warned=[])


def hps_judge(device, options):
    """HPSv2.1 (arXiv 2306.09341) is a CLIP whose weights replace all of open_clip's ViT-H-14: 986M, in float32."""
    weights = str(zoo.find_file(HPS, HUB_CACHE))
    return clip_judge(device, options | dict(clip_model="ViT-H-14", clip_pretrained=weights))


# ---------------------------------------------------------------------------------------------------------------
# The toy's judge of looks, in the place of MANIQA and the questions about realism


def realism_network():
    """Images (N, 3, 64, 64) in [-1, 1] -> one "well made?" logit (N, 1). 0.9M parameters, most at 8x8 and 4x4."""
    return nn.Sequential(
        nn.PixelUnshuffle(4), nn.Conv2d(48, 64, 3, padding=1), ResBlock(64, 64),  # (N, 64, 16, 16)
        nn.Conv2d(64, 128, 3, 2, 1), ResBlock(128, 128),  # (N, 128, 8, 8)
        nn.Conv2d(128, 128, 3, 2, 1), ResBlock(128, 128),  # (N, 128, 4, 4)
        nn.GroupNorm(32, 128), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 1),  # (N, 1)
    )  # fmt: skip


def realism_values(images, prompts, network):
    """Probability that each image (N, 3, 64, 64) in [0, 1] is a clean render: (N,). Raises Mistake for another size."""
    if images.shape[-1] != 64:
        raise Mistake("--rewards: realism knows only the toy world's pictures of 64 px")
    return network(images * 2 - 1)[:, 0].sigmoid()


def realism_judge(device, options):
    path = zoo.WEIGHTS / "toy-realism.safetensors"
    network = zoo.load_strict(realism_network(), zoo.read_weights(path), path).eval().requires_grad_(False)
    return partial(realism_values, network=network.to(device))


# ---------------------------------------------------------------------------------------------------------------
# pyiqa, and MANIQA (arXiv 2204.08958) through it. pyiqa's licence (PolyForm Noncommercial) binds whoever uses these.


def pyiqa_values(images, prompts, metric):
    """The metric of each image (N, 3, H, W) in [0, 1], turned so that more is better: (N,)."""
    sign, what = -1 if metric.lower_better else 1, f"pyiqa:{metric.metric_name}: a picture of {images.shape[-1]} px"
    # Some want larger pictures, or captions, or a folder. Some load a file only now, and would unpickle it.
    with zoo.tensors_only(), zoo.reading(what, "leave it out of --rewards"):
        # one at a time, because not every metric of pyiqa takes several
        return sign * torch.cat([metric(image[None]).reshape(1) for image in images])


def pyiqa_judge(device, options):
    """A no-reference metric of pyiqa that does not run code that it downloads. Raises Mistake."""
    import pyiqa

    name = options["names"][0].removeprefix("pyiqa:")
    foreign = ("qalign", "compare2score")  # trust_remote_code=True
    known = [metric for metric in pyiqa.list_models("NR") if not metric.startswith(foreign)]
    if name not in known:
        raise Mistake(f"pyiqa:{name} is none of the metrics that can judge here: {', '.join(known)}")
    where = f"pyiqa keeps what it downloads in {torch.hub.get_dir()}/pyiqa"
    with zoo.tensors_only(), zoo.reading(f"pyiqa:{name}", where):
        return partial(pyiqa_values, metric=pyiqa.create_metric(name, device=device))


def maniqa_network():
    """pyiqa's MANIQA, 136M parameters, with random weights and without a download."""
    import timm
    from pyiqa.archs.maniqa_arch import MANIQA

    # pyiqa fetches the backbone's ImageNet weights in any case, which the checkpoint replaces
    create = timm.create_model
    with mock.patch("timm.create_model", lambda name, pretrained: create(name, pretrained=False)):
        return MANIQA(train_dataset="koniq", scale=0.8, pretrained=False, test_sample=1)  # it gets single crops


def even_crops(images, rows, columns):
    """
    Square images (N, 3, H, H) -> crops (N * rows * columns, 3, 224, 224), image-major, evenly spaced from edge to edge.
    Images of 224 px or less are one crop, enlarged if need be.
    """
    side = max(images.shape[-1], 224)
    images = F.interpolate(images, (side, side), mode="bilinear")  # leaves images of that size as they are
    tops = torch.linspace(0, side - 224, rows).round().int().unique().tolist()
    lefts = torch.linspace(0, side - 224, columns).round().int().unique().tolist()
    return torch.stack([images[..., y : y + 224, x : x + 224] for y in tops for x in lefts], 1).flatten(0, 1)


def maniqa_values(images, prompts, network, rows=4, columns=5):
    """
    MANIQA's scores (N,), about 0 to 1, of square images (N, 3, H, H) in [0, 1]: the mean over 20 crops, as in the
    official code. Its crops are random, so two equal pictures of a group get different scores, and pyiqa's never reach
    the last 8 rows of 256.
    """
    scores = []
    for part in images.split(AT_ONCE):
        # Peak memory: 20 crops x 785 tokens x 768 floats for each of the 12 layers, 0.6 GB per image.
        # pyiqa enlarges 224 px to 225, which blurs. Of 225 px it takes the first 224 as they are.
        crops = F.pad(even_crops(part, rows, columns), (0, 1, 0, 1))
        scores.append(network(crops).view(len(part), -1).mean(1))
    return torch.cat(scores)


def maniqa_judge(device, options):
    path = zoo.find_file(MANIQA, HUB_CACHE)
    network = zoo.load_strict(maniqa_network(), zoo.read_weights(path), path).eval().requires_grad_(False).to(device)
    return partial(maniqa_values, network=network)


# ---------------------------------------------------------------------------------------------------------------
# Three questions to Qwen2.5-VL (arXiv 2502.13923). The wording is ours; what is asked is the paper's.

# name: (the question, the highest N of its answer, what N means)
QUESTIONS = {
    "qwen-match": (
        'An image generator was given the caption "{prompt}" and drew this picture. Rate the picture from 0 to 5. Ask '
        "yourself whether it shows what the caption says, whether anything is missing, and whether it is realistic, "
        "sharp and free of artefacts. 0 is useless, 5 could not be better.",
        5, "your rating, 0 to 5"),
    "qwen-real": (
        "Was this picture taken or made by a person, rather than by an AI image generator?",
        1, "1 for yes and 0 for no"),
    "qwen-odd": (
        "Think of distorted bodies and objects, wrong numbers of parts, things that merge or float, smeared textures "
        "and garbled writing. Is this picture free of all such oddities?",
        1, "1 for yes and 0 for no"),
}  # fmt: skip


def question_text(name, prompt):
    """The question about a picture of `prompt`, and the form of the answer."""
    question, _, meaning = QUESTIONS[name]
    form = f'Answer with JSON and nothing else: {{"score": N}}, where N is {meaning}.'
    return f"{question.format(prompt=prompt)} {form}"


def read_rating(text, highest):
    """The last N of "score": N in a text, outside its <think> block; NaN if there is none within 0 to `highest`."""
    answer = text.split("</think>")[-1].split("<think>")[0]  # a block that max_tokens cut off has no end
    ratings = re.findall(r"""\bscore["'*]*\s*[:=]["'*\s]*(-?\d+(?:\.\d+)?)""", answer, re.IGNORECASE)
    rating = float(ratings[-1]) if ratings else math.nan
    return rating if 0 <= rating <= highest else math.nan


def qwen_scores(images, prompts, names, ask):
    """
    {name: (N,)} for the questions `names` about images (N, 3, H, W) in [0, 1]. `ask` maps questions (picture, text) to
    texts, "" for one that is late.
    """
    pixels = (images * 255).round().to(torch.uint8).cpu()  # 8 bits, as in the files that it was trained on
    scores = {}
    for name in names:
        pairs = zip(pixels, prompts, strict=True)
        replies = ask([(picture, question_text(name, prompt)) for picture, prompt in pairs])
        highest = QUESTIONS[name][1]
        scores[name] = torch.tensor([read_rating(reply, highest) for reply in replies], device=images.device)
    return scores


def ask_model(questions, model, processor):
    """The likeliest replies, of up to 64 tokens, to questions (picture (3, H, W) uint8, text)."""
    replies = []
    for k in range(0, len(questions), AT_ONCE):
        pictures, texts = zip(*questions[k : k + AT_ONCE], strict=True)
        chats = [[dict(role="user", content=[dict(type="image"), dict(type="text", text=text)])] for text in texts]
        chats = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=chats, images=list(pictures), padding=True, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)  # (n, P) tokens, padded on the left: replies start together
        tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        replies += processor.batch_decode(tokens, skip_special_tokens=True)
    return replies


def load_qwen(device):
    """(model, processor) of Qwen2.5-VL-3B-Instruct; bfloat16 on a GPU. Raises Mistake."""
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    dtype = torch.bfloat16 if str(device).startswith("cuda") else torch.float32
    with zoo.reading(QWEN, f"it is looked for in {HUB_CACHE}, and --qwen-server URL needs none"):
        processor = AutoProcessor.from_pretrained(QWEN, revision=QWEN_COMMIT)
        options = dict(revision=QWEN_COMMIT, dtype=dtype, output_loading_info=True)
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(QWEN, **options)
    for name in [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        # transformers only warns, and fills the gap with random numbers
        raise Mistake(f"{QWEN}: {name} is missing, unknown or of another shape; fetch the files again")
    processor.tokenizer.padding_side = "left"
    return model.eval().requires_grad_(False).to(device), processor


def ask_server(questions, loop, **how):
    """
    Like ask_model, of a server, which gets all questions at once and batches them. While this thread waits, another one
    runs the event loop. Raises Mistake.
    """
    replies = [asyncio.run_coroutine_threadsafe(ask_once(*question, **how), loop) for question in questions]
    return [reply.result() for reply in replies]


async def ask_once(picture, text, client, model, timeout):
    """
    The reply to one question; "" if it is not there after `timeout` seconds, or refused with 429 or 5xx, or no JSON.
    Raises Mistake. The picture (3, H, W) travels as PNG and so arrives unchanged.
    """
    import openai
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [dict(type="image_url", image_url=dict(url=url)), dict(type="text", text=text)]
    how = dict(model=model, messages=[dict(role="user", content=content)], temperature=0, max_tokens=256)
    try:
        reply = await asyncio.wait_for(client.chat.completions.create(**how), timeout)
    except (asyncio.TimeoutError, openai.RateLimitError, openai.InternalServerError, json.JSONDecodeError):
        return ""  # the client raises the second and third at once if Retry-After is above two minutes
    except openai.APIStatusError as error:  # no repetition can mend any other
        raise Mistake(f"--qwen-server {client.base_url} refuses: {' '.join(str(error).split())[:500]}") from None
    with zoo.reading(f"--qwen-server {client.base_url}: its answer", "OpenAI's form is needed"):
        return str(reply.choices[0].message.content)


def server_asker(options):
    """ask_server for the server and the model of `options`. Raises Mistake if it is down or lists several models."""
    import openai

    url, name = options["qwen_server"], options["qwen_model"]
    key = os.environ.get("OPENAI_API_KEY", "").strip()  # local servers need none, but the client wants one
    server = dict(base_url=f"{url.rstrip('/').removesuffix('/v1')}/v1", api_key=key or "none")
    with zoo.reading(f"--qwen-server {url}: its list of models", "it must run at this address"):
        listed = [model.id for model in openai.OpenAI(**server, timeout=60).models.list().data]
    if not name and len(listed) != 1:
        raise Mistake(f"--qwen-server {url} lists {', '.join(listed) or 'no models'}: name one with --qwen-model")
    options["qwen_model"] = name or listed[0]  # the run remembers it
    # the client repeats what was lost, and what was refused with 429 or 5xx, when Retry-After says so
    client = openai.AsyncOpenAI(**server, max_retries=10**6)
    # An event loop in a thread of its own: a notebook's thread has one already. A daemon never delays the exit.
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    timeout = options["judge_timeout"] / len(options["names"])  # s, for one question about all pictures
    return partial(ask_server, loop=loop, client=client, model=options["qwen_model"], timeout=timeout)


def qwen_judge(device, options):
    """One judge for all of the questions in options["names"]. Raises Mistake."""
    if not options["qwen_server"]:
        model, processor = load_qwen(device)
        ask = partial(ask_model, model=model, processor=processor)
        return partial(qwen_scores, names=options["names"], ask=ask)
    judge = partial(qwen_scores, names=options["names"], ask=server_asker(options))
    judge(torch.zeros(1, 3, 64, 64), ["nothing"])  # a server that refuses does so now, not after a rollout
    return judge


# name -> factory(device, options). Names of one factory share its model: it finds in options["names"] which of them are
# wanted, and its judge returns {name: scores} if there are several.
JUDGES = {"clip": clip_judge, "realism": realism_judge, "hps": hps_judge, "maniqa": maniqa_judge}
JUDGES |= {"clip-step": clip_judge, "hps-step": hps_judge, **dict.fromkeys(QUESTIONS, qwen_judge)}
