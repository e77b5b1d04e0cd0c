"""
The judges, and how what they say of a picture becomes one reward.

A judge is a function  fn(images (N, 3, H, W) in [0, 1], prompts: N strings) -> values (N,), higher is better.  It is
made by a factory, which imports its library and loads its weights. Adding a judge takes a factory and a line in JUDGES.
Prompts repeat inside a batch (the samples of a group share one), so a judge reads each distinct prompt once. A model
that gives several values returns {name: values (N,)}.

    clip         cosine of image and caption features of an open_clip model: does it show what was asked?
    hps          the same of HPSv2.1, a CLIP trained on which of two pictures people preferred
    clip-step, hps-step   the two cosines in four steps, as in the paper; they need no further forward pass
    maniqa       MANIQA trained on KonIQ: technical quality, no caption
    qwen-match, qwen-real, qwen-odd   three questions to Qwen2.5-VL: match, 0 to 5; is it real, is nothing odd, 0 to 1
    realism      toy only: probability that the picture is a clean render, not spoilt or sampled: does it look right?
    pyiqa:NAME   any no-reference quality metric of pyiqa, negated where lower is better (piqe needs no download)

`--rewards clip=1,realism=0.25` is their weighted sum. Each judge keeps its own scale; the paper's multipliers (5 for
the cosines, 2 for MANIQA, 1/4 for each question) are weights. A judge of weight 0 is logged and has no say: this is how
to hold one out, to see whether the policy got better or only learned to please the others.

A value that is not finite is missing: it counts as the mean of its group, and the log counts it. Every judge loads
strictly: one that was half initialised at random would still return plausible numbers. Weights come from
--judge-files DIR where the file is there (`python sample.py --print-files` has the names), else from the hub.

Where the official code differs: it rounds pictures down to 8 bits before CLIP, HPS and MANIQA; it runs HPS in half
precision; MANIQA sees random crops. Its prompt for Qwen puts the text before the image and asks for a description, five
criteria and a score, in up to 256 tokens. It tries three times, and an unreadable answer then counts as the worst one.

    python rewards.py     # what the toy's two judges say of right pictures and of wrong ones
"""

import base64
import http.client
import io
import json
import math
import re
import time
import urllib.request
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import zoo
from data import Mistake
from tokenizer import ResBlock, to_unit

TOY_CLIP = f"local-dir:{zoo.WEIGHTS / 'toy-clip'}"  # an open_clip name: configuration, weights and words in a folder

# What a factory may want to know; add_judge_flags describes each. load_judges fills in what its caller leaves out.
OPTIONS = dict(clip_model=TOY_CLIP, clip_pretrained=None, judge_files=None, qwen_answer="probability",
               qwen_server=None, judge_batch=16, judge_timeout=300.0)  # fmt: skip


def add_judge_flags(add):
    """The flags that train.py, sample.py and evaluate.py share: whose weights judge, and how."""
    add("--clip-model", help="clip: a model of open_clip (default: the toy's CLIP for a toy, else ViT-B-32-quickgelu)")
    add("--clip-pretrained", metavar="TAG", help="clip: a tag of that model or a file (default openai, the paper's)")
    add("--judge-files", metavar="DIR", help="folder that is searched for judges' weights before the hub is asked")
    add("--qwen-answer", choices=("probability", "json"), default="probability",
        help="probability (default): the mean over the answer tokens' probabilities, one forward pass; "
             "json: generated text that is parsed, as in the paper")  # fmt: skip
    add("--qwen-server", metavar="URL", help="OpenAI-compatible server to ask (default: a Qwen in this process)")
    add("--judge-timeout", type=float, default=300.0, help="seconds that --qwen-server may take per batch; late values "
        "are missing (300)")  # fmt: skip
    add("--judge-batch", type=int, default=16, help="images per pass of maniqa and qwen; affects memory only (16)")


def judge_options(args, model):
    """The options dict of parsed flags, for judging pictures of the model named `model`. Raises Mistake."""
    zoo.check_range(args, judge_batch=1, judge_timeout=0)
    options = {name: getattr(args, name) for name in OPTIONS}
    # The toy's CLIP knows only the toy's pictures; open_clip's models know none of them.
    if options["clip_model"] or options["clip_pretrained"] or not zoo.is_toy(model):
        options["clip_model"] = options["clip_model"] or "ViT-B-32-quickgelu"
        in_folder = options["clip_model"].startswith("local-dir:")  # which holds its weights
        options["clip_pretrained"] = options["clip_pretrained"] or (None if in_folder else "openai")
    else:
        options["clip_model"] = TOY_CLIP
    if options["judge_files"] and not Path(options["judge_files"]).is_dir():
        raise Mistake(f"--judge-files: no such folder: {options['judge_files']}")
    return options


# ---------------------------------------------------------------------------------------------------------------
# CLIP (arXiv 2103.00020) and HPSv2.1 (arXiv 2306.09341), which is a CLIP with other weights


def load_clip(name=TOY_CLIP, pretrained=None, folder=None, device="cpu"):
    """
    (model, words) of open_clip: the network, frozen, in eval mode, float32, and its text tokenizer. `name`: of
    open_clip's list, or local-dir:FOLDER, or hf-hub:REPO; `pretrained`: a tag of that list, or a file.
    FOLDER/<name of the tag's hub repository>/ is looked for before the hub is asked. Raises Mistake.
    """
    import open_clip

    wanted = f"--clip-model {name} {pretrained or ''}".strip()
    tag = open_clip.get_pretrained_cfg(name, pretrained or "")  # {} where it is none of open_clip's list
    repo = tag.get("hf_hub", "").strip("/")
    local = Path(folder or "") / Path(repo).name
    if folder and repo and local.is_dir():
        name, pretrained = f"local-dir:{local}", None
    # OpenAI trained with x sigmoid(1.702 x). With the exact GELU of plain "ViT-B-32" open_clip only warns, and every
    # cosine is a little off; so the tag decides.
    options = dict(device=device, force_quick_gelu=tag.get("quick_gelu", False), require_pretrained=True)
    remedy = f"DIR/{Path(repo).name} of --judge-files DIR may hold the files of huggingface.co/{repo}"
    with zoo.reading(wanted, remedy if repo else "open_clip.list_pretrained() names models and tags"):
        model, words = open_clip.create_model(name, pretrained, **options), open_clip.get_tokenizer(name)
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


def clip_cosines(images, prompts, model, words):
    """Cosine of each image with its prompt, (N,) in [-1, 1]."""
    distinct = list(dict.fromkeys(prompts))
    texts = model.encode_text(words(distinct).to(images.device), normalize=True)  # (distinct, E)
    which = torch.tensor([distinct.index(prompt) for prompt in prompts], device=images.device)
    return (clip_image_features(model, images) * texts[which]).sum(-1)


def clip_judge(device, options):
    model, words = load_clip(options["clip_model"], options["clip_pretrained"], options["judge_files"], device)
    return partial(clip_cosines, model=model, words=words)


def hps_judge(device, options):
    """HPSv2.1: its checkpoint replaces every weight of open_clip's ViT-H-14, so LAION's 4 GB are never fetched."""
    import open_clip

    path = judge_file("hps", options)
    weights = zoo.read_weights(path)  # first, because a cut file is found at once and the model takes ten seconds
    model = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))  # 986M parameters, float32
    model.visual.image_mean, model.visual.image_std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    zoo.load_strict(model, weights, path)  # the file is half precision; copied into float32
    model = model.eval().requires_grad_(False).to(device)
    return partial(clip_cosines, model=model, words=open_clip.get_tokenizer("ViT-H-14"))


def judge_file(judge, options):
    return zoo.find_file(zoo.JUDGE_FILES[judge], "--judge-files DIR", options["judge_files"])


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
# The toy's judge of looks: what MANIQA and the realism questions are to the real run


def realism_network():
    """Images (N, 3, 64, 64) in [-1, 1] -> one "well made?" logit (N, 1). 0.9M parameters, most at 8x8 and 4x4."""
    return nn.Sequential(
        nn.PixelUnshuffle(4), nn.Conv2d(48, 64, 3, padding=1), ResBlock(64, 64),  # (N, 64, 16, 16)
        nn.Conv2d(64, 128, 3, 2, 1), ResBlock(128, 128),  # (N, 128, 8, 8)
        nn.Conv2d(128, 128, 3, 2, 1), ResBlock(128, 128),  # (N, 128, 4, 4)
        nn.GroupNorm(32, 128), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 1),
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
# pyiqa, and MANIQA (arXiv 2204.08958) through it


def pyiqa_values(images, prompts, metric):
    """The metric of each image (N, 3, H, W) in [0, 1], turned so that more is better: (N,)."""
    sign, what = -1 if metric.lower_better else 1, f"pyiqa:{metric.metric_name}: a picture of {images.shape[-1]} px"
    measure = metric.net if torch.is_grad_enabled() else metric  # pyiqa's outer layer switches gradients off
    with zoo.reading(what, "leave it out of --rewards"):  # some want larger pictures, or captions, or a folder
        # one at a time, because not every metric of pyiqa takes several
        return sign * torch.cat([measure(image[None]).reshape(1) for image in images])


def pyiqa_judge(name, device):
    """Any no-reference metric of pyiqa. Raises Mistake if it has no `name` or cannot fetch its weights."""
    import pyiqa

    if name not in (known := pyiqa.list_models("NR")):
        raise Mistake(f"pyiqa has no no-reference metric {name!r}; it has {', '.join(known)}")
    if name.startswith(("qalign", "compare2score")):  # trust_remote_code=True
        raise Mistake(f"pyiqa:{name} would run code that it downloads; choose another metric")
    with zoo.reading(f"pyiqa:{name}", f"pyiqa keeps what it downloads in {torch.hub.get_dir()}/pyiqa"):
        return partial(pyiqa_values, metric=pyiqa.create_metric(name, device=device))


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


def even_crops(images, grid):
    """
    Square images (N, 3, H, H) -> crops (N * rows * columns, 3, 224, 224), image-major, at evenly spaced places of which
    the first and last touch the edges: with the grid (4, 5) every pixel up to 896 px is in some crop. At 224 px or
    below there is one crop per image, enlarged if need be.
    """
    if images.shape[-1] <= 224:
        return F.interpolate(images, (224, 224), mode="bilinear") if images.shape[-1] < 224 else images
    rows, columns = (torch.linspace(0, images.shape[-1] - 224, n).round().int().tolist() for n in grid)
    return torch.stack([images[..., y : y + 224, x : x + 224] for y in rows for x in columns], 1).flatten(0, 1)


def maniqa_patches(crops, network):
    """Crops (n, 3, 224, 224) in [0, 1] -> the quality of each patch of 8 px, and its weight: (n, 784) each."""
    network.vit((crops - network.default_mean.to(crops)) / network.default_std.to(crops))
    x = network.extract_feature(network.save_output).transpose(1, 2)  # (n, 4 * 768, 784), of four of the 12 layers
    network.save_output.outputs.clear()
    stages = ((network.tablock1, network.conv1, network.swintransformer1),
              (network.tablock2, network.conv2, network.swintransformer2))  # fmt: skip
    for attention, narrow, swin in stages:
        for block in attention:
            x = block(x)
        x = swin(narrow(x.unflatten(2, (28, 28)))).flatten(2)  # (n, 768, 784), then (n, 384, 784)
    x = x.transpose(1, 2)
    return network.fc_score(x)[..., 0], network.fc_weight(x)[..., 0]


def maniqa_values(images, prompts, network, batch, grid=(4, 5)):
    """
    MANIQA's value of each square image (N, 3, H, H) in [0, 1]: (N,), about 0 to 1, higher is better: the weighted mean
    over the patches of 20 crops of 224 px. The crops are ours. pyiqa's never reach the last 8 rows of 256, or the last
    40 of 384. The official code's are random: two equal pictures of a group are then told apart, a value depends on
    what else drew random numbers, and a resumed run leaves the curve of the unbroken one.
    """
    values = []
    for part in images.split(batch):
        # Peak memory: batch x 20 crops x 785 tokens x 768 floats for each of the 12 layers, 0.6 GB per image.
        quality, weight = (x.reshape(len(part), -1) for x in maniqa_patches(even_crops(part, grid), network))
        values.append((quality * weight).sum(1) / (weight.sum(1) + 1e-8))  # 1e-8 as pyiqa
    return torch.cat(values)


def maniqa_judge(device, options):
    path = judge_file("maniqa", options)
    weights = {name.removeprefix("module."): value for name, value in zoo.read_weights(path).items()}  # as pyiqa does
    network = zoo.load_strict(maniqa_network(), weights, path).eval().requires_grad_(False).to(device)
    return partial(maniqa_values, network=network, batch=options["judge_batch"])


# ---------------------------------------------------------------------------------------------------------------
# Three questions to Qwen2.5-VL (arXiv 2502.13923). The wording is ours; what is asked is the paper's.

QWEN, QWEN_REVISION, _ = zoo.hub_place(zoo.JUDGE_FILES["qwen"])
SERVER_PAUSES = (2, 20)  # s
RATING = {str(k): k for k in range(6)}  # answer token -> what it is worth
YES_NO = {"yes": 1, "Yes": 1, "no": 0, "No": 0}
QUESTIONS = {
    "qwen-match": (
        'An image generator was given the caption "{prompt}" and drew this picture. Rate the picture from 0 to 5. Ask '
        "yourself whether it shows what the caption says, whether anything is missing, and whether it is realistic, "
        "sharp and free of artefacts. 0 is useless, 5 could not be better.", RATING),
    "qwen-real": ("Was this picture taken or made by a person, rather than by an AI image generator?", YES_NO),
    "qwen-odd": (
        "Think of distorted bodies and objects, wrong numbers of parts, things that merge or float, smeared textures "
        "and garbled writing. Is this picture free of all such oddities?", YES_NO),
}  # fmt: skip


def question_text(name, prompt, answer):
    """What is asked about a picture of `prompt`, ending in how to answer: with a single token, or with JSON."""
    question, worth = QUESTIONS[name]
    how = "Answer with one digit and nothing else." if worth is RATING else "Answer yes or no, and nothing else."
    if answer == "json":
        scale = "N is your rating, 0 to 5" if worth is RATING else "N is 1 for yes and 0 for no"
        how = f'Answer with JSON and nothing else: {{"score": N}}, where {scale}.'
    return f"{question.format(prompt=prompt)} {how}"


def read_rating(text, highest):
    """The N of {"score": N} anywhere in a generated text; NaN if there is none or it is not within 0 to `highest`."""
    match = re.search(r"""["']?score["']?\s*[:=]\s*["']?(-?\d+(?:\.\d+)?)""", text, re.IGNORECASE)
    rating = float(match[1]) if match else math.nan
    return rating if 0 <= rating <= highest else math.nan


def expected_worth(logprobs, worth):
    """
    Mean worth under the probabilities of the answers that are in `logprobs` {token: nats}, renormalised: what the
    model gives to any other first token (an opening quote, a "The") is ignored. NaN if it holds no answer at all.
    """
    mass = {token: math.exp(logprobs[token]) for token in worth if token in logprobs}
    total = sum(mass.values())
    return sum(p * worth[token] for token, p in mass.items()) / total if total else math.nan


def qwen_values(images, prompts, names, answer, ask):
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
    json: up to 64 tokens, the likeliest ones, then read_rating.
    """
    values = []
    for k in range(0, len(texts), batch):
        chats = [[dict(role="user", content=[dict(type="image"), dict(type="text", text=text)])]
                 for text in texts[k : k + batch]]  # fmt: skip
        chats = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=chats, images=list(pixels[k : k + batch]), padding=True, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)  # (n, P) tokens, padded on the left: replies start together
        if answer == "json":
            tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            replies = processor.batch_decode(tokens, skip_special_tokens=True)
            pairs = zip(replies, worths[k : k + batch], strict=True)
            values += [read_rating(reply, max(worth.values())) for reply, worth in pairs]
        else:
            logits = model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float()  # (n, V)
            for logprobs, worth in zip(logits.log_softmax(-1), worths[k : k + batch], strict=True):
                of_answers = logprobs[answer_tokens(processor.tokenizer, worth)].tolist()
                values.append(expected_worth(dict(zip(worth, of_answers, strict=True)), worth))
    return values


def answer_tokens(tokenizer, worth):
    """
    The ids of the answers in `worth`. Raises Mistake if one takes several tokens, whose first would not stand for it,
    or if two are the same (the "unknown" of a vocabulary that has neither).
    """
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in worth]
    if any(len(tokens) != 1 for tokens in ids) or len({tokens[0] for tokens in ids}) < len(ids):
        answers = ", ".join(worth)
        raise Mistake(f"{answers} are not single, distinct tokens of this tokenizer; use --qwen-answer json")
    return [tokens[0] for tokens in ids]


def load_qwen(folder, device):
    """(model, processor): FOLDER/Qwen2.5-VL-3B-Instruct, else the hub's; bfloat16 on a GPU. Raises Mistake."""
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()  # one per file, amid our own lines
    local = Path(folder or "") / Path(QWEN).name
    source, at = (local, {}) if folder and local.is_dir() else (QWEN, dict(revision=QWEN_REVISION))
    dtype = torch.bfloat16 if str(device).startswith("cuda") else torch.float32
    remedy = f"DIR/{Path(QWEN).name} of --judge-files DIR may hold the files of huggingface.co/{QWEN}"
    with zoo.reading(source, f"{remedy}, and --qwen-server URL needs none"):
        processor = AutoProcessor.from_pretrained(source, **at)
        options = dict(dtype=dtype, output_loading_info=True)
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(source, **options, **at)
    for name in [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        # transformers only warns, and fills the gap with random numbers
        raise Mistake(f"{source}: {name} is missing, unknown or of another shape; fetch the files again")
    processor.tokenizer.padding_side = "left"
    return model.eval().requires_grad_(False).to(device), processor


def call_server(url, path, body=None, timeout=300.0):
    """
    The JSON that an OpenAI-compatible server returns, for a GET, or for a POST of `body`, which is sent again after
    each of SERVER_PAUSES: one request lost among the paper's 38,400 must not end a run of days. Raises Mistake.
    """
    data = None if body is None else json.dumps(body).encode()
    address = f"{url.rstrip('/').removesuffix('/v1')}/v1/{path}"
    for pause in (*(SERVER_PAUSES if data else ()), None):
        try:
            request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return json.load(reply)
        except (OSError, ValueError, http.client.HTTPException) as error:  # refused, lost, slow; no JSON; half a reply
            if pause is None:
                raise Mistake(f"--qwen-server: {address} does not answer ({error})") from None
            time.sleep(pause)


def ask_server_once(pixels, text, worth, url, model, answer, timeout):
    """As ask_model, of one picture (3, H, W), which travels as PNG and so arrives as it is. Raises Mistake."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
    picture = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [dict(type="image_url", image_url=dict(url=picture)), dict(type="text", text=text)]
    body = dict(model=model, temperature=0, messages=[dict(role="user", content=content)])
    body |= dict(max_tokens=64) if answer == "json" else dict(max_tokens=1, logprobs=True, top_logprobs=20)
    remedy = "OpenAI's form is needed" if answer == "json" else "if it gives no logprobs, use --qwen-answer json"
    with zoo.reading(f"--qwen-server {url}: its answer", remedy):
        choice = call_server(url, "chat/completions", body, timeout)["choices"][0]
        if answer == "json":
            return read_rating(choice["message"]["content"] or "", max(worth.values()))
        likeliest = choice["logprobs"]["content"][0]["top_logprobs"]  # an answer that is not among 20 weighs nothing
        return expected_worth({entry["token"]: entry["logprob"] for entry in likeliest}, worth)


def ask_server(pixels, texts, worths, url, model, answer, timeout):
    """As ask_model. 32 requests at a time, which the server batches; NaN for what is not there after `timeout` s."""
    pool, ask = ThreadPoolExecutor(32), partial(ask_server_once, url=url, model=model, answer=answer, timeout=timeout)
    try:
        asked = [pool.submit(ask, *one) for one in zip(pixels.cpu(), texts, worths, strict=True)]
        with zoo.at_the_first_signal():
            done, _ = wait(asked, timeout, FIRST_EXCEPTION)
        return [one.result() if one in done else math.nan for one in asked]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after one failure the rest need not be sent


def qwen_judge(device, options, names):
    """One judge for all of the questions `names`. Raises Mistake."""
    answer, url = options["qwen_answer"], options["qwen_server"]
    if url:
        with zoo.reading(
            f"--qwen-server {url}: its list of models", "OpenAI's form is needed"
        ):  # now, not after the first batch
            model = call_server(url, "models")["data"][0]["id"]
        ask = partial(ask_server, url=url, model=model, answer=answer, timeout=options["judge_timeout"])
    else:
        model, processor = load_qwen(options["judge_files"], device)
        if answer == "probability":  # now, not after the first batch
            for name in names:
                answer_tokens(processor.tokenizer, QUESTIONS[name][1])
        batch = options["judge_batch"] * len(names)
        ask = partial(ask_model, model=model, processor=processor, answer=answer, batch=batch)
    return partial(qwen_values, names=names, answer=answer, ask=ask)


# ---------------------------------------------------------------------------------------------------------------
# Putting judges together

# whose best of N is taken where no --rewards says so; else clip's
BEST_BY = dict.fromkeys(("toy-c2i", "toy-t2i"), "clip=1,realism=0.25")
# name -> factory(device, options)
JUDGES = {"clip": clip_judge, "hps": hps_judge, "maniqa": maniqa_judge, "realism": realism_judge}
STEPS = {"clip-step": "clip", "hps-step": "hps"}  # name -> the judge whose cosine is put into steps


def parse_rewards(text):
    """ "clip=1,realism=0.5" -> {"clip": 1.0, "realism": 0.5}; a name alone weighs 1. Raises Mistake."""
    weights, known = {}, [*JUDGES, *STEPS, *QUESTIONS]
    for part in text.split(","):
        name, weight = (word.strip() for word in part.partition("=")[::2])
        if name in weights:
            raise Mistake(f"--rewards: {name} is named twice")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise Mistake(f"--rewards: {weight!r} in {part!r} is not a number") from None
        if name not in known and not name.startswith("pyiqa:"):
            raise Mistake(f"--rewards: no judge is called {name!r}; there are {', '.join(known)} and pyiqa:NAME")
        if not math.isfinite(weights[name]):
            raise Mistake(f"--rewards: the weight of {name} is not finite")
    if not any(weights.values()):
        raise Mistake("--rewards: all weights are 0, so nothing would be learned")
    return weights


def load_judges(names, device="cpu", options=None):
    """
    {name: judge} for the names of a --rewards; those that share a model are one entry, under the model's name.
    `options`: see OPTIONS. Raises Mistake, FileNotFoundError.
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


def files_of_judges(names, options):
    """{name: path} of the weights that the judges `names` read; a path that does not exist stands for the hub."""
    folder, files = Path(options["judge_files"] or "."), {}
    if "clip" in names or "clip-step" in names:
        kind, _, place = options["clip_model"].partition(":")
        files["clip"] = Path(place if kind == "local-dir" else options["clip_pretrained"])
    if "realism" in names:
        files["realism"] = zoo.WEIGHTS / "toy-realism.safetensors"
    if any(name in QUESTIONS for name in names):
        files["qwen"] = folder / Path(QWEN).name
    for judge in ("hps", "maniqa"):
        if judge in names or f"{judge}-step" in names:
            files[judge] = judge_file(judge, options)
    return files


@torch.no_grad()
def judge_images(judges, images, prompts):
    """
    What each judge says of images (N, 3, H, W) in [0, 1]: {name: values (N,), float32, may hold NaN} and
    {name: seconds}. A shared forward pass is charged to the first of its names.
    """
    judged, seconds = {}, {}
    for name, judge in judges.items():
        start = time.perf_counter()
        try:
            values = judge(images.clone(), prompts)  # a copy: a judge that edits its pictures edits nobody else's
        except Exception as error:
            error.add_note(f"in the judge {name!r}")
            raise
        values = by_name(name, values)
        judged |= {each: as_values(each, numbers, images) for each, numbers in values.items()}
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        seconds |= dict.fromkeys(values, 0.0) | {next(iter(values)): time.perf_counter() - start}
    return judged, seconds


def by_name(name, values):
    """{name: (N,)} of what a judge returned, which gives one value or several."""
    return values if isinstance(values, dict) else {name: values}


def as_values(name, numbers, images):
    """What a judge returned (list, array or tensor, (N,) or (N, 1)) as float32 (N,). Raises Mistake, naming it."""
    with zoo.reading(f"what the judge {name!r} returned", "a judge returns one number per picture"):
        values = torch.as_tensor(numbers, device=images.device).float()
        return values.reshape(len(images))


def fill_missing(values, group_size):
    """
    A judge's values (N,) with those that are not finite set to the mean of their group's finite ones (0 if it has
    none), where they neither help nor hurt. A plain 0 would be the best value of a metric that is never positive.
    """
    groups = values.view(-1, group_size)
    finite = groups.isfinite()
    mean = torch.where(finite, groups, 0).sum(1, keepdim=True) / finite.sum(1, keepdim=True).clamp(min=1)
    return torch.where(finite, groups, mean).flatten()


def weighted_sum(judged, weights, group_size):
    """Rewards (N,): the sum over judges of weight x value, where a missing value has no say."""
    return sum(weights[name] * fill_missing(values, group_size) for name, values in judged.items())


# ---------------------------------------------------------------------------------------------------------------
# What a judge would have said of another code: --credit-coef


def code_gradient(judges, slopes, tokenizer, tokens, prompts, micro_batch):
    """
    d/dz of the sum over judges of slope x value, at z, the code vectors that tokens (N, T) stand for: (N, T, D).

    slopes   {name: (N,)}, of grpo.advantage_slopes; what judges return beside these names has no say
    `micro_batch` images pass decoder and judges at a time, and one judge after the other, so that at most one judge's
    activations are held. No weight gets a gradient. Where a judge's gradient is not finite, it has no say.
    """
    found = []
    for rows in torch.arange(len(tokens), device=tokens.device).split(micro_batch):
        codes = tokenizer.quantize.vectors()[tokens[rows]].requires_grad_()  # (n, T, D)
        decoded = to_unit(tokenizer.from_codes(codes))
        images, some = decoded.detach().requires_grad_(), [prompts[k] for k in rows.tolist()]
        push = torch.zeros_like(images)
        for name, judge in judges.items():
            values = judge(images.clone(), some)
            values = {each: as_values(each, v, images) for each, v in by_name(name, values).items() if each in slopes}
            total = sum(torch.where(v.isfinite(), slopes[each][rows] * v, 0).sum() for each, v in values.items())
            push += torch.autograd.grad(total, images)[0].nan_to_num(0, 0, 0)
        found.append(torch.autograd.grad(decoded, codes, push)[0])
    return torch.cat(found)


def with_gradient(judges, weights, tokenizer, num_tokens, prompt):
    """
    ({name: judge}, [name, ...]): the judges that autograd can differentiate, and the names of their values that have a
    weight and a gradient. Each is asked about one picture of `prompt` [caption]: a step function's gradient is 0
    everywhere. Raises Mistake if there is none.
    """
    kept, names = {}, []
    tokens = torch.arange(num_tokens, device=tokenizer.quantize.embedding.weight.device)[None]  # (1, T), all different
    for name, judge in judges.items():
        images = to_unit(tokenizer.decode(tokens)).requires_grad_()
        try:
            values = judge(images.clone(), prompt)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, Mistake):  # numpy, for one, refuses tensors that want a gradient
            continue
        for each, value in by_name(name, values).items():
            if weights[each] and getattr(value, "requires_grad", False):
                (slope,) = torch.autograd.grad(value.sum(), images, retain_graph=True, allow_unused=True)
                if slope is not None and slope.isfinite().all() and slope.any():
                    kept[name] = judge
                    names.append(each)
    if not names:
        raise Mistake(f"--credit-coef needs a judge with a gradient, and of {', '.join(weights)} none has one")
    return kept, names


def demo():
    """What the toy's judges say of 40 right pictures, and of the same spoilt in three ways."""
    import numpy as np

    import data

    rng, tokenizer = np.random.default_rng(0), zoo.load_tokenizer("toy-c2i")
    prompts = [data.class_caption(name) for name in data.TOY_CLASSES]
    with torch.no_grad():  # judges only ever see what the tokenizer decoded
        right = to_unit(tokenizer.decode(tokenizer.encode(torch.from_numpy(data.render(prompts, rng)) * 2 - 1)))
    torn = torch.cat([right[:, :, :32], right[:, :, 32:].roll(16, -1)], 2)  # the lower half is moved by 16 px
    noise = torch.from_numpy(rng.random(right.shape, np.float32))
    wrong = [data.wrong_caption(prompt, rng) for prompt in prompts]
    judges = load_judges(["clip", "realism"])
    print("mean of 40 pictures       clip  realism")
    cases = {"right": (right, prompts), "with a wrong caption": (right, wrong), "torn in two": (torn, prompts)}
    for name, (images, texts) in (cases | {"noise": (noise, prompts)}).items():
        judged, _ = judge_images(judges, images, texts)
        print(f"{name:22}{judged['clip'].mean():8.2f} {judged['realism'].mean():8.2f}")


if __name__ == "__main__":
    demo()
