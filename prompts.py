"""
What a model can be asked for: classes and captions, files of captions, and how T5 reads them.

    read_prompts    --classes and --prompts -> labels or captions
    captions_of     labels or captions -> what the judges read
    load_encoder    labels or captions -> the transformer's conditioning; captions go through the frozen T5
"""

import csv
import difflib
import html
import io
import json
import os
import re
import urllib.parse
from functools import partial
from pathlib import Path

import torch

import data
from parallel import say
from zoo import MODELS, Mistake, hub_place, is_toy, reading, user_path

# Each colour and each shape at least once, so that the first grid shows the whole toy world.
DEFAULT_CLASSES = ("red circle", "green square", "blue triangle", "yellow cross", "cyan ring", "magenta cross",
                   "orange triangle", "white circle")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Classes


def class_names(model):
    """The class names of a c2i model: the toy's 40 or ImageNet's 1,000, as open_clip carries them: "tench"."""
    if is_toy(model):
        return data.TOY_CLASSES
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return IMAGENET_CLASSNAMES


def wordnet_classes():
    """ImageNet's in WordNet's words, as the official AR-GRPO gives them to its judges: "tench, Tinca tinca"."""
    from timm.data import ImageNetInfo

    return tuple(map(ImageNetInfo("imagenet-1k").index_to_description, range(1000)))


def find_class(model, text):
    """
    The label of a class of a c2i model, by number ("1"), name ("goldfish") or ImageNet's WordNet id ("n01443537").
    Raises Mistake for an unknown or ambiguous one.
    """
    text = str(text).strip().lower()
    names = [name.lower() for name in class_names(model)]
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    known = names
    if re.fullmatch(r"n\d{8}", text) and not is_toy(model):
        from timm.data import ImageNetInfo

        known = ImageNetInfo("imagenet-1k").label_names()
    labels = [label for label, name in enumerate(known) if name == text]
    if len(labels) == 1:
        return labels[0]
    if labels:
        raise Mistake(f"{text!r} names the classes {' and '.join(map(str, labels))}: give the number of one of them")
    near = difflib.get_close_matches(text, names, n=3, cutoff=0)
    numbers = f"numbers run from 0 to {len(names) - 1}"
    raise Mistake(f"no class is called {text!r}; did you mean {' or '.join(map(repr, near))}? ({numbers})")


# ---------------------------------------------------------------------------------------------------------------
# Captions, and files of them


def captions_of(model, prompts, names=None):
    """
    What the judges read: t2i captions as they are, c2i labels as "a photo of a red circle". `names` replaces the
    model's own class names.
    """
    if MODELS[model].config.task == "t2i":
        return list(prompts)
    names = names or class_names(model)
    # for ImageNet the release's form, without an article
    return [data.class_caption(names[k]) if is_toy(model) else f"a photo of {names[k]}" for k in prompts]


def fixed_prompts(model, n):
    """The n labels or captions that every evaluation of a model uses: all in turn."""
    config = MODELS[model].config
    return [k % config.num_classes for k in range(n)] if config.task == "c2i" else data.balanced_captions(n)


def read_prompts(model, classes=None, prompts=None):
    """What --classes and --prompts ask a model for: a list of labels or of captions. Raises Mistake, OSError."""
    task, toy = MODELS[model].config.task, is_toy(model)
    if (prompts if task == "c2i" else classes) is not None:
        flag, other = ("--prompts", "--classes") if task == "c2i" else ("--classes", "--prompts")
        raise Mistake(f"{model} is a {task} model: it takes {other}, not {flag}")
    if task == "c2i":
        return [find_class(model, name) for name in classes or (DEFAULT_CLASSES if toy else range(8))]
    if not prompts and not toy:
        raise Mistake(f"{model} needs --prompts: captions, or files of them")
    texts = []
    for prompt in prompts or data.balanced_captions(6):
        is_file = Path(prompt).suffix.lower() in READERS or os.path.exists(os.path.expanduser(prompt))
        texts += read_prompt_file(user_path(prompt)) if is_file else [prompt]
    captions = [known_caption(model, text) for text in texts]
    if "" in captions:
        first = texts[captions.index("")]
        say(f"left out, because nothing of it remains after T5's cleaning: {first!r} ({captions.count('')} in all)")
    captions = [caption for caption in captions if caption]
    if not captions:
        raise Mistake("--prompts: no caption is left")
    return captions


def known_caption(model, text):
    """
    A caption in the form that a t2i model's text encoder knows: a toy's own form of it, else as it is; "" if T5's
    cleaning leaves nothing of it. Raises Mistake if a toy never learned it.
    """
    text = text.encode(errors="replace").decode()  # no font and no file takes half of a surrogate pair
    if not is_toy(model):
        return text if clean_caption(text) else ""
    try:
        return data.toy_caption(text)
    except ValueError as error:
        raise Mistake(str(error)) from None


def read_prompt_file(path):
    """
    The prompts of a file in UTF-8, or UTF-16 with its mark: .txt, one per line; .csv and .tsv, the column called
    prompt, caption or text; .json and .jsonl, strings, or objects with the text under one of these names, or the
    release's {"conversations": [{"value": text}]}, in a list, in COCO's "annotations" or one per line.
    Lines without text are left out. Raises Mistake.
    """
    with reading(path, f"prompts are read from files in UTF-8 that end in {', '.join(READERS)}"):
        content = path.read_bytes()
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        prompts = [prompt.strip() for prompt in READERS[path.suffix.lower()](text)]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise Mistake(f"{path}: no prompts in it")
    return prompts


def table_prompts(text, delimiter):
    """The prompts of a table whose first line names its columns."""
    table = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    table.fieldnames = [name.strip().lower() for name in table.fieldnames or ()]
    return [prompt_of(row) or "" for row in table]  # None: a line that is too short


def json_prompts(text):
    """The prompts of a JSON list, of COCO's annotations, or of one JSON value per line."""
    try:
        found = json.loads(text)
    except ValueError:
        found = [json.loads(line) for line in text.split("\n") if line.strip()]
    if isinstance(found, dict):
        found = found.get("annotations", [found])
    entries = found if isinstance(found, list) else [found]
    return [entry if isinstance(entry, str) else prompt_of(entry) for entry in entries]


def prompt_of(entry):
    """The text in an object of a JSON file, or in a row of a table. Raises ValueError."""
    if "conversations" in entry:
        entry = entry["conversations"][0]
    for key in ("prompt", "prompts", "caption", "captions", "text", "value"):
        if key in entry:
            return entry[key]
    raise ValueError(f"{str(entry)[:60]} has nothing called prompt, caption or text")


READERS = {  # the text of a file -> its prompts
    ".txt": str.splitlines,
    ".csv": partial(table_prompts, delimiter=","),
    ".tsv": partial(table_prompts, delimiter="\t"),
    ".json": json_prompts,
    ".jsonl": json_prompts,
}


# ---------------------------------------------------------------------------------------------------------------
# Conditioning


def load_encoder(name, path=None, device="cpu", captions=()):
    """
    The function encode(prompts, pad="left") of the model `name`: from B labels or captions to (cond, cond_mask), which
    are labels (B,) and ones (B, 1), or text features (B, P, caption_dim) and (B, P). Says how many of the run's
    `captions` are too long. Raises Mistake.
    """
    row = MODELS[name]
    if row.config.task == "c2i":
        return partial(encode_labels, device=device)
    encode = TextEncoder(path or row.text_encoder, row.config, device, row.text_dtype)
    if cut := encode.count_cut(captions):
        say(f"{cut} of {len(set(captions))} captions are longer than the {row.config.cond_len} tokens that T5 reads, "
            "and are cut there")  # fmt: skip
    return encode


def encode_labels(labels, pad=None, device="cpu"):
    return torch.tensor(labels, device=device), torch.ones(len(labels), 1, dtype=torch.bool, device=device)


class TextEncoder:
    """
    The frozen T5 encoder: captions -> (features (B, P, caption_dim) float32, mask (B, P) bool).

    pad="left": LlamaGen's form. The text stands next to the image, because token 0 is predicted from position P - 1,
    and padding features are zero. pad="right": the form of the released AR-GRPO, for weights that were trained with it.
    Token 0 is predicted from what T5 puts out at a padding position.
    path: a folder in transformers' form, or OWNER/REPO[@REVISION] on the hub. Raises Mistake.
    """

    def __init__(self, path, config, device="cpu", dtype=torch.float32):
        from transformers import AutoTokenizer, T5EncoderModel
        from transformers.utils import logging

        logging.disable_progress_bar()  # one per file, amid our own lines
        self.cond_len, self.device = config.cond_len, device
        place, revision = (path, None) if Path(path).exists() else hub_place(path)[:2]
        options = dict(revision=revision or "main")
        with reading(f"--text-encoder {path}", "give a folder that holds a T5 encoder, or connect to the internet"):
            self.words = AutoTokenizer.from_pretrained(place, **options)
            self.t5, info = T5EncoderModel.from_pretrained(place, dtype=dtype, output_loading_info=True, **options)
        for name in [*info["missing_keys"], *info["mismatched_keys"]]:  # transformers only warns, and fills in noise
            raise Mistake(f"--text-encoder {path}: {name} is missing or has another shape; fetch the files again")
        if (width := self.t5.config.d_model) != config.caption_dim:
            raise Mistake(f"--text-encoder {path}: its features are {width} wide, the model's {config.caption_dim}")
        self.t5.eval().requires_grad_(False).to(device)

    def __call__(self, captions, pad="left"):
        distinct = list(dict.fromkeys(captions))  # a repeated caption is read once
        options = dict(max_length=self.cond_len, padding="max_length", truncation=True, return_tensors="pt")
        words = self.words([clean_caption(caption) for caption in distinct], **options).to(self.device)
        # T5 was trained and is run in its own dtype; autocast would round its float32 parts too
        with torch.autocast(torch.device(self.device).type, enabled=False):
            features = self.t5(words.input_ids, words.attention_mask).last_hidden_state.float()
        mask = words.attention_mask
        features, mask = left_pad(features, mask) if pad == "left" else (features, mask.bool())
        which = torch.tensor([distinct.index(caption) for caption in captions], device=mask.device)
        return features[which], mask[which]

    def count_cut(self, captions):
        """How many distinct captions have more than P tokens, of which T5 reads the first P."""
        cleaned = [clean_caption(caption) for caption in dict.fromkeys(captions)]
        words = self.words(cleaned, verbose=False).input_ids if cleaned else []
        return sum(len(tokens) > self.cond_len for tokens in words)


def left_pad(features, mask):
    """Right-padded features (B, P, C) and mask (B, P) -> the same with padding zeroed and moved to the left."""
    order = mask.argsort(dim=-1, stable=True)  # padding (0) first, text (1) last in its own order
    mask = mask.gather(-1, order).bool()
    features = features.gather(1, order[..., None].expand_as(features))
    return features * mask[..., None], mask


# What is removed from a caption before T5 reads it, in this order. LlamaGen inherited the cleaning from DeepFloyd IF.
# It also changes case, quotes, hyphens and spacing of plain captions, and so their features. Left out are only its
# rules for a shop's slogans ("free shipping").
NOISE = (
    # web addresses, but for what follows a "?"
    (r"\b((https?|www):(/{1,3}|[a-z\d%])|[a-z\d.\-]+\.(com|co|ru|net|org|edu|gov|it)[\w/\-]*\b/?(?!@))", ""),
    (r"@\w+\b", ""),  # handles
    ("[\u31c0-\u9fff]+", ""),  # Chinese characters and their like, which this T5 does not know
    ("[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58"
     "\ufe63\uff0d]+", "-"),  # every kind of dash
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    (r"\d{1,3}(\.\d{1,3}){3}", " "),  # IP addresses
    (r"\d:\d\d\s+$|#\d{1,3}\b|#\d{5,}\b|\b\d{6,}\b", ""),  # a time at the end, "bus #12", numbers of articles
    (r"\\n", " "),  # a newline that somebody escaped
    (r"\S+\.(png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)", ""),  # file names
    ("[\"']{2,}", '"'),  # doubled punctuation
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)  # fmt: skip
LOOSE_ENDS = (
    (r"\b[a-z]{1,3}\d{3,15}\b", ""),  # codes of articles, but also "a ford f150"
    (r"\b[a-z]+\d+[a-z]+\b|\b\d+[a-z]+\d+\b|\b[a-z]+\d+[a-z]+\d+[a-z\d]*\b", ""),  # and "r2d2", "a 4x4 truck"
    (r"\bpage\s+\d+\b", ""),
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),  # "red,blue" is read as "red, blue"
    (r"\s+", " "),
    (r"^\s*[\"'](.+)[\"']\s*$", r"\1"),  # quotes around it all
    (r"^\s*['_,\-:;]|['_,\-:+]\s*$|^\s*\.\S+\s*$", ""),
)  # fmt: skip


def clean_caption(caption):
    """A caption as LlamaGen's text encoder reads it: lower-cased and cleaned, twice."""
    import ftfy

    for _ in range(2):  # the second time removes what the first one uncovered
        caption = urllib.parse.unquote_plus(caption).strip().lower().replace("<person>", "person")
        caption = html.unescape(re.sub("<[^<>]*>", "", caption))  # tags, then entities
        for pattern, instead in NOISE:
            caption = re.sub(pattern, instead, caption)
        if len(re.findall("[-_]", caption)) > 3:  # this-is-my-holiday-picture
            caption = re.sub("[-_]", " ", caption)
        caption = html.unescape(html.unescape(ftfy.fix_text(caption)))
        for pattern, instead in LOOSE_ENDS:
            caption = re.sub(pattern, instead, caption)
        caption = caption.strip()
    return caption
