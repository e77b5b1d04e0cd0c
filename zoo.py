"""
The models: which there are, where their files lie, how they are found, read and loaded.

    MODELS                                a row per model: two toys in weights/, LlamaGen's on the Hugging Face hub
    find_policy                           --ckpt, --model and --task -> the row's name, the weights' path, what they say
    load_model, load_tokenizer, load_encoder   the three networks of a row, strictly: no weight missing, none unknown
    captions_of, read_asked               what can be asked of a model, and how the judges are told
    add_model_flags, run_script           what the scripts share on the command line

Files are read as tensors only; nothing in them is ever executed. A file of LlamaGen's or AR-GRPO's needs no conversion.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import zipfile
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import data
import parallel
from data import Mistake
from model import ModelConfig, Transformer, rope_2d
from tokenizer import VQConfig, VQModel

os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # also inside pyiqa, which would unpickle whatever is in a file
os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # without a network, a dozen lines of retries hide our sentence
WEIGHTS = Path(__file__).parent / "weights"

SIZES = {  # layers, heads, C              parameters at the grid and vocabulary that the size was released for
    "toy-c2i": (6, 5, 160),  # 2.3M
    "toy-t2i": (6, 5, 160),  # 2.3M
    "GPT-B": (12, 12, 768),  # 111M
    "GPT-L": (24, 16, 1024),  # 343M
    "GPT-XL": (36, 20, 1280),  # 775M
    "GPT-XXL": (48, 24, 1536),  # 1.4B
    "GPT-3B": (24, 32, 3200),  # 3.1B
}
# @REVISION is the commit of the hub's repository that is downloaded, so that nobody can put another file in its place.
# Of LlamaGen's two repositories we know no commit, so their newest is taken; of OpenAI's CLIP what open_clip takes.
FLAN_T5_XL = "google/flan-t5-xl@7d6315df2c2fb742f0f5b556879d730926ca9001"
VQ_16 = VQConfig(ch_mult=(1, 1, 2, 2, 4))  # 72M, 256 px -> 256 tokens
VQ_TOY = VQConfig(ch_mult=(1, 2), z_channels=64, codebook_size=512, ch=32, patch=4)  # 1.0M, 64 px -> 64 tokens


@dataclass
class ModelRow:
    config: ModelConfig
    ckpt: str | Path  # a path, or hf:OWNER/REPO/FILE on the Hugging Face hub, or hf:OWNER/REPO@REVISION/FILE
    vq_ckpt: str | Path
    vq_config: VQConfig = VQ_16
    text_encoder: str | Path = None  # t2i only: a folder in transformers' form, or OWNER/REPO, or OWNER/REPO@REVISION
    text_dtype: torch.dtype = torch.bfloat16  # what the features were computed in when the model was trained
    cfg_scale: float = 1.0  # guidance and filtering of its authors' demo (their evaluation: 1.65 to 2.0, top-k 0)
    top_k: int = 0


def _toy(task, **config):
    config = ModelConfig(task, *SIZES[f"toy-{task}"], vocab_size=512, grid_size=8, **config)
    files = WEIGHTS / f"toy-{task}.safetensors", WEIGHTS / "toy-vq.safetensors"
    return ModelRow(config, *files, VQ_TOY, WEIGHTS / "toy-t5" if task == "t2i" else None, torch.float32)


def _llamagen_c2i(size, grid, file):
    config, repo = ModelConfig("c2i", *SIZES[size], grid_size=grid), "hf:FoundationVision/LlamaGen"
    return ModelRow(config, f"{repo}/{file}", f"{repo}/vq_ds16_c2i.pt", cfg_scale=4.0, top_k=2000)


def _llamagen_t2i(grid, file):
    config, repo = ModelConfig("t2i", *SIZES["GPT-XL"], grid_size=grid, cond_len=120), "hf:peizesun/llamagen_t2i"
    files = f"{repo}/{file}", f"{repo}/vq_ds16_t2i.pt"
    return ModelRow(config, *files, text_encoder=FLAN_T5_XL, cfg_scale=7.5, top_k=1000)


MODELS = {
    "toy-c2i": _toy("c2i", num_classes=40),
    "toy-t2i": _toy("t2i", caption_dim=64, cond_len=12),
    "llamagen-b-256": _llamagen_c2i("GPT-B", 16, "c2i_B_256.pt"),
    "llamagen-b-384": _llamagen_c2i("GPT-B", 24, "c2i_B_384.pt"),
    "llamagen-l-256": _llamagen_c2i("GPT-L", 16, "c2i_L_256.pt"),
    "llamagen-l-384": _llamagen_c2i("GPT-L", 24, "c2i_L_384.pt"),
    "llamagen-xl-384": _llamagen_c2i("GPT-XL", 24, "c2i_XL_384.pt"),
    "llamagen-xxl-384": _llamagen_c2i("GPT-XXL", 24, "c2i_XXL_384.pt"),
    "llamagen-3b-384": _llamagen_c2i("GPT-3B", 24, "c2i_3B_384.pt"),
    "llamagen-t2i-xl-256": _llamagen_t2i(16, "t2i_XL_stage1_256.pt"),
    "llamagen-t2i-xl-512": _llamagen_t2i(32, "t2i_XL_stage2_512.pt"),
}

# What the paper's judges load. --judge-files DIR is searched first: for the file, or (clip, qwen) for a folder that
# bears the repository's name and holds its files.
JUDGE_FILES = {
    "clip": "hf:timm/vit_base_patch32_clip_224.openai/open_clip_model.safetensors",
    "hps": "hf:xswu/HPSv2@697403c78157020a1ae59d23f111aa58ced35b0a/HPS_v2.1_compressed.pt",
    "maniqa": "hf:chaofengc/IQA-PyTorch-Weights@0df2df423c65f6a64209309695f3845727431027/ckpt_koniq10k.pt",
    "qwen": "hf:Qwen/Qwen2.5-VL-3B-Instruct@66285546d2b821cf421d4f5eb2576359d3770cd3/config.json",
}


def is_toy(name):
    return name.startswith("toy-")


# ---------------------------------------------------------------------------------------------------------------
# Files


@contextmanager
def reading(what, remedy):
    """Whatever a library raises inside (each has kinds of its own for what is absent or cut) becomes a Mistake."""
    try:
        yield
    except (Mistake, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # the first sentence, because libraries explain at length, and torch advises to unpickle whatever it is
        reason = re.split(r"\n|\. ", f"{type(error).__name__}: {error}")[0][:200]
        raise Mistake(f"{what} cannot be read ({reason}); {remedy}") from None


@contextmanager
def writing(path):
    """What libraries make of a full disk, which rarely says of which file, becomes an OSError that names `path`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(f"{path} could not be written ({str(error).splitlines()[0]})") from None


def make_folder(folder):
    """Makes `folder` if need be, and tries to write in it: now, not after hours of work. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder), tempfile.TemporaryFile(dir=folder):
        pass


def write_whole(path, write, keep=None):
    """
    write(temporary path), then a rename: a run that is killed, or a full disk, leaves the old file or the new. The old
    one becomes `keep` where that is given. Of several processes the first one writes. Raises OSError.
    """
    if parallel.rank() > 0:
        return
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")  # the suffix stays: PIL reads the format from it
    try:
        with writing(path):
            write(temporary)
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)  # safetensors writes files that only their owner may read
            if keep and path.exists():
                os.replace(path, keep)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk need not stay full


def save_weights(weights, path, header):
    """A safetensors file with a header {name: text}, byte for byte the same for the same weights."""
    save_file(weights, path, metadata=header)
    with open(path, "r+b") as file:  # the library writes the header's entries in random order
        size = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(size))
        entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def lock(folder):
    """
    Holds `folder` until the returned file is closed, which the end of the process does, however it ends. Raises Mistake
    if another process holds it. Windows has no such lock.
    """
    try:
        import fcntl
    except ImportError:
        return None
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Mistake(f"another run is writing to {folder}: wait for it, or choose another --out") from None
    return file


def fingerprint(files, known=None):
    """
    {name: [size, time of change, sha256]} of files {name: path}; a folder stands for all files in it. Of a file that
    has the size and time that `known` has, the hash is taken from there: large ones take seconds.
    """
    found, known = {}, known or {}
    for name, path in files.items():
        for part in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if part.is_file():
                key = f"{name}/{part.relative_to(path)}" if path.is_dir() else name
                size_and_time = [part.stat().st_size, part.stat().st_mtime_ns]
                if known.get(key, [])[:2] == size_and_time:
                    found[key] = known[key]
                else:
                    found[key] = [*size_and_time, file_hash(part)]
    return found


def hub_place(where):
    """
    ("OWNER/REPO", REVISION or None, FILE or "") of "hf:OWNER/REPO/FILE", where @REVISION may follow REPO and the rest
    may be absent. Raises Mistake.
    """
    form = re.fullmatch(r"(?:hf:)?([^/@]+/[^/@]+)(?:@([^/@]+))?(?:/(.+))?", str(where))
    if not form:
        raise Mistake(f"{where}: neither here nor of the form OWNER/REPO, as the hub has it")
    return form[1], form[2], form[3] or ""


def folder_or_repo(where):
    """What from_pretrained takes of a folder, of OWNER/REPO or of OWNER/REPO@REVISION: (where, {"revision": ...})."""
    if Path(where).exists() or "@" not in str(where):
        return where, {}
    repo, revision, _ = hub_place(where)
    return repo, dict(revision=revision)


def find_file(where, flag="--ckpt or --vq-ckpt", folder=None):
    """
    The path of a weights file: `where` itself, or for "hf:OWNER/REPO/FILE" the copy in `folder`, or in the Hugging Face
    hub's cache, downloaded on first use (HF_HOME moves the cache, HF_HUB_OFFLINE=1 forbids downloads). @REVISION behind
    REPO takes the repository as it was at that commit.
    Raises Mistake, which names the `flag` that takes another file, and FileNotFoundError.
    """
    if not str(where).startswith("hf:"):
        if not Path(where).is_file():
            raise FileNotFoundError(f"{where}: no such weights file")
        return Path(where)
    from huggingface_hub import hf_hub_download

    repo, revision, file = hub_place(where)
    if not file:
        raise Mistake(f"{where}: a file on the hub is written hf:OWNER/REPO/FILE")
    if folder and (Path(folder) / file).is_file():
        return Path(folder) / file
    with reading(f"{file} of huggingface.co/{repo}", f"fetch it elsewhere and give it with {flag}"):
        return Path(hf_hub_download(repo, file, revision=revision))


def file_hash(path):
    """sha256 of the file at `path`, as 64 hexadecimal digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_hash(name):
    """sha256 of the toy's tokenizer, which pretrain.py may make anew; "" for LlamaGen's, which stay as they are."""
    return file_hash(MODELS[name].vq_ckpt) if is_toy(name) else ""


def find_policy(ckpt=None, model=None, task=None):
    """
    (name of MODELS, path of the weights, header) from --ckpt, --model and --task. A folder stands for the policy inside
    it, and our own files say in their header which model they are. `path` is the row's own where no --ckpt is given.

    header: step (0: not a file of ours); text_pad, cfg_scale and temperature that the policy was trained with, or the
    row's own; base, the weights that it began from, or None where they are no longer there. Raises Mistake if the three
    disagree, FileNotFoundError.
    """
    path, found = None, {}
    if ckpt is not None:
        folder = Path(ckpt)
        path = find_file(folder / "policy.safetensors" if folder.is_dir() else ckpt)
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with reading(path, "it is not whole: fetch it again"), safe_open(path, framework="pt") as file:
                found = file.metadata() or {}
    written_by = found.get("model") if found.get("model") in MODELS else None
    name = model or written_by or f"toy-{task or 'c2i'}"
    if written_by not in (None, name):
        raise Mistake(f"{path} holds a {written_by} model, not {name}; all weights must be of one model")
    row = MODELS[name]
    if task not in (None, row.config.task):
        raise Mistake(f"--model {name} is a {row.config.task} model, but --task is {task}")
    found = found if written_by else {}
    if found and found.get("tokenizer", "") != tokenizer_hash(name):
        raise Mistake(f"{path} is of another toy world: its tokens belong to another tokenizer than {row.vq_ckpt}; "
                      "train it again")  # fmt: skip
    with reading(path, "its header is damaged: fetch it again"):
        header = dict(
            step=int(found.get("step", 0)),
            text_pad=found.get("text_pad", "left"),
            cfg_scale=float(found.get("cfg_scale", row.cfg_scale)),
            temperature=float(found.get("temperature", 1)),
            base=found["base"] if Path(found.get("base", "")).is_file() else None,
        )
    return name, path or row.ckpt, header


def part_of(names, prefix):
    """
    {name in a file: name in the model} of the weights under `prefix`, where a file holds several models as AR-GRPO's do
    (gpt_model.*, vq_model.* and the frozen ref_model.*, which is the base again); of all of them where it holds one.
    """
    several = ("gpt_model.", "vq_model.", "ref_model.")
    if not prefix or not any(name.startswith(several) for name in names):
        return {name: name for name in names}
    others = tuple(set(several) - {prefix})
    return {name: name.removeprefix(prefix) for name in names if not name.startswith(others)}


def load_tensors(path):
    """
    torch.load of tensors and plain values alone, on the CPU, after a look at the checksums that torch.save wrote and
    torch.load ignores: with a flipped bit it would be another policy. What is returned stays in the file until it
    is looked at, so that sizes are known before memory is taken. Raises ValueError and torch's own errors.
    """
    whole = zipfile.is_zipfile(path)  # else the form of torch before 1.6, which has no checksums
    if whole:
        with zipfile.ZipFile(path) as parts:
            if packed := [part.filename for part in parts.infolist() if part.compress_type != zipfile.ZIP_STORED]:
                raise ValueError(f"{packed[0]} is compressed")  # torch never does; it may be of any size
            if damaged := parts.testzip():
                raise ValueError(f"{damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=whole)


def read_weights(path, prefix=""):
    """
    The tensors of a .safetensors or official .pt file, by name, on the CPU; of a file that holds several models only
    those under `prefix`, without it. Raises Mistake when the file is cut, holds more than tensors or is of neither
    form.
    """
    if Path(path).suffix == ".safetensors":
        from safetensors import safe_open

        with reading(path, "it is not whole: fetch it again"), safe_open(path, framework="pt") as file:
            return {ours: file.get_tensor(name) for name, ours in part_of(file.keys(), prefix).items()}
    with reading(path, "it is not whole, or holds more than tensors: fetch it again"):
        found = load_tensors(path)
    for key in ("ema", "model", "module", "state_dict"):  # official wrappers; moving averages first where present
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    named = isinstance(found, dict) and all(isinstance(name, str) for name in found)
    if not named or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise Mistake(f"{path}: holds no named tensors; of a folder that train.py wrote, give policy.safetensors")
    return {ours: found[name] for name, ours in part_of(found, prefix).items()}


def check_tensor(value, like, what):
    """Raises Mistake unless `value` is a plain tensor of the shape and the kind of `like`, and finite."""
    if value.shape != like.shape:
        sizes = f"{list(value.shape)}, not {list(like.shape)}"
        raise Mistake(f"{what} is {sizes}; this is a file of another model or size")
    if value.is_floating_point() != like.is_floating_point() or value.layout != torch.strided:
        kind = "floating-point" if like.is_floating_point() else "whole"
        raise Mistake(f"{what} is not a dense tensor of {kind} numbers")
    if not value.isfinite().all():
        raise Mistake(f"{what} holds NaN or infinity; the file is damaged, or of a run that diverged")


def load_strict(module, weights, source, ignore=()):
    """
    Puts `weights` (a dict of tensors) into `module`, in the module's own dtypes. Every name and shape must agree,
    except names in `ignore`. Raises Mistake with the first offender; `source` is the file's name for the sentence.
    """
    expected = module.state_dict()
    weights = {name: value for name, value in weights.items() if name not in ignore}
    for name in [*expected, *weights]:
        if name not in weights or name not in expected:
            kind = "missing" if name in expected else "unknown"
            raise Mistake(f"{source}: {name} is {kind}; this is a file of another model")
        with reading(f"{source}: {name}", "it is no plain tensor"):  # what nested or empty ones raise, or 8-bit floats
            check_tensor(weights[name], expected[name], f"{source}: {name}")
    # assign: a module built on the meta device gets its memory here; copy: the file may change under the values
    weights = {name: value.to(expected[name].dtype, copy=True) for name, value in weights.items()}
    module.load_state_dict(weights, assign=True)
    return module


# ---------------------------------------------------------------------------------------------------------------
# Networks


def load_model(name, path=None, device="cpu", compile_steps=False):
    """
    The transformer `name` of MODELS with the weights at `path` (its own base weights if None), float32, in eval mode.
    Takes LlamaGen's files, AR-GRPO's (`gpt_model.*` of them) and ours. Raises Mistake, FileNotFoundError.
    """
    path = find_file(path or MODELS[name].ckpt)
    with torch.device("meta"):  # no memory and no random numbers for weights that are about to be replaced
        model = Transformer(MODELS[name].config)
    load_strict(model, read_weights(path, "gpt_model."), path, ignore=("freqs_cis",))
    model.rope, model.compile_steps = rope_2d(model.config), compile_steps
    return model.eval().to(device)


@torch.no_grad()
def blend(model, name, base, share):
    """Sets a model's weights to theta_ref + share (theta - theta_ref), theta_ref those at `base`: 1 keeps, 0 undoes."""
    for own, start in zip(model.parameters(), load_model(name, base).parameters(), strict=True):
        own.copy_(start.to(own.device).lerp(own, share))


def load_tokenizer(name, path=None, device="cpu"):
    """The image tokenizer of the model `name`, frozen, in float32. Raises as `load_model`."""
    path = find_file(path or MODELS[name].vq_ckpt)
    with torch.device("meta"):
        model = VQModel(MODELS[name].vq_config)
    load_strict(model, read_weights(path, "vq_model."), path, ignore=("quantize.codebook_used",))
    return model.eval().requires_grad_(False).to(device)


def load_encoder(name, path=None, device="cpu"):
    """
    The function encode(asked, pad="left") of the model `name`: from a list of B labels or B captions to (cond,
    cond_mask), the transformer's conditioning: labels (B,) and None, or text features (B, P, caption_dim) and (B, P).
    """
    row = MODELS[name]
    if row.config.task == "t2i":
        return TextEncoder(path or row.text_encoder, row.config, device, row.text_dtype)
    return lambda labels, pad=None: (torch.tensor(labels, device=device), None)


class TextEncoder:
    """
    The frozen T5 encoder: captions -> (features (B, P, caption_dim) float32, mask (B, P) bool).

    pad="left": LlamaGen's form. The text stands next to the image, because token 0 is predicted from position P - 1,
    and padding features are zero. pad="right": the form of the released AR-GRPO, for weights that were trained with it.
    Padding stands next to the image and keeps what T5 makes of it, so token 0 is predicted from that.

    path is a folder in transformers' form, or OWNER/REPO or OWNER/REPO@REVISION on the hub. Raises Mistake.
    """

    def __init__(self, path, config, device="cpu", dtype=torch.float32):
        from transformers import AutoTokenizer, T5EncoderModel
        from transformers.utils import logging

        logging.disable_progress_bar()  # one per file, amid our own lines
        self.cond_len, self.device = config.cond_len, device
        with reading(f"--text-encoder {path}", "give a folder that holds a T5 encoder, or connect to the internet"):
            place, at = folder_or_repo(path)
            self.words = AutoTokenizer.from_pretrained(place, **at)
            self.t5, info = T5EncoderModel.from_pretrained(place, dtype=dtype, output_loading_info=True, **at)
        for name in [*info["missing_keys"], *info["mismatched_keys"]]:  # transformers only warns, and fills in noise
            raise Mistake(f"--text-encoder {path}: {name} is missing or misshapen; fetch the files again")
        if (width := self.t5.config.d_model) != config.caption_dim:
            raise Mistake(f"--text-encoder {path}: its features are {width} wide, the model's {config.caption_dim}")
        self.t5.eval().requires_grad_(False).to(device)

    def __call__(self, captions, pad="left"):
        distinct = list(dict.fromkeys(captions))  # a step may ask for a prompt twice; it is read once
        options = dict(max_length=self.cond_len, padding="max_length", truncation=True, return_tensors="pt")
        found = self.words([data.clean_caption(caption) for caption in distinct], **options).to(self.device)
        # T5 was trained and is run in its own dtype: under autocast its float32 parts would be rounded too
        with torch.autocast(torch.device(self.device).type, enabled=False):
            features = self.t5(found.input_ids, found.attention_mask).last_hidden_state.float()
        mask = found.attention_mask
        features, mask = left_pad(features, mask) if pad == "left" else (features, mask.bool())
        which = torch.tensor([distinct.index(caption) for caption in captions], device=mask.device)
        return features[which], mask[which]


def left_pad(features, mask):
    """Right-padded features (B, P, C) and mask (B, P) -> the same with padding zeroed and moved to the left."""
    order = mask.argsort(dim=-1, stable=True)  # padding (0) first, text (1) last in its own order
    mask = mask.gather(-1, order).bool()
    features = features.gather(1, order[..., None].expand_as(features))
    return features * mask[..., None], mask


def autocast(device, dtype):
    """
    The precision of sampling and scoring: weights stay float32; with dtype bfloat16 the layers' matrix products are
    taken in it. Logits, softmax, loss and the tokenizer are float32 always. A context manager.
    """
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


# ---------------------------------------------------------------------------------------------------------------
# What is asked of a model

# One picture of each colour and each shape at least once, so that the first grid shows the whole toy world.
DEFAULT_CLASSES = ("red circle", "green square", "blue triangle", "yellow cross", "cyan ring", "magenta cross",
                   "orange triangle", "white circle")  # fmt: skip


def class_names(model):
    """The class names of a c2i model: the toy's 40 or ImageNet's 1,000."""
    return data.TOY_CLASSES if is_toy(model) else data.imagenet_classes()


def captions_of(model, asked, names=None):
    """
    What the judges read: t2i captions as they are, c2i labels as "a photo of a red circle". `names` replaces the
    model's own class names.
    """
    if MODELS[model].config.task == "t2i":
        return list(asked)
    names = names or class_names(model)
    # for ImageNet the release's form, without an article
    return [data.class_caption(names[k]) if is_toy(model) else f"a photo of {names[k]}" for k in asked]


def read_asked(model, classes=None, prompts=None):
    """What --classes and --prompts ask of a model: a list of labels or of captions. Raises Mistake."""
    task = MODELS[model].config.task
    if (prompts if task == "c2i" else classes) is not None:
        flag, other = ("--prompts", "--classes") if task == "c2i" else ("--classes", "--prompts")
        raise Mistake(f"{model} is a {task} model: it takes {other}, not {flag}")
    if task == "c2i":
        classes = classes or (DEFAULT_CLASSES if is_toy(model) else range(8))
        return [data.find_class(c, class_names(model)) for c in classes]
    if not prompts and not is_toy(model):
        raise Mistake(f"{model} needs --prompts: captions, or .txt, .json and .jsonl files of them")
    found = []
    for prompt in prompts or data.balanced_captions(6):
        found += data.read_prompts(prompt) if data.is_prompt_file(prompt) else [prompt]
    # the toy's in the one form that its text encoder has read; refuses what would draw nonsense
    return [data.toy_caption(caption) for caption in found] if is_toy(model) else found


def fixed_asked(model, n):
    """The n labels or captions that every evaluation of a model uses: all in turn."""
    config = MODELS[model].config
    return [k % config.num_classes for k in range(n)] if config.task == "c2i" else data.balanced_captions(n)


# ---------------------------------------------------------------------------------------------------------------
# The command line, as far as the scripts share it


class Parser(argparse.ArgumentParser):
    def parse_args(self, argv=None):
        for text in sys.argv[1:] if argv is None else argv:
            if not text or (text.startswith("--") and text.endswith("=")):  # it would stand for the default
                self.error("an argument is empty; is a variable of the shell not set?")
        return super().parse_args(argv)


def script_parser(doc):
    """
    An argparse parser that prints `doc` as it is and takes neither abbreviated flags nor empty arguments; all scripts
    have --quiet.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--quiet", action="store_true", help="print nothing except what ends the run early")
    return parser


@contextmanager
def silence():
    """Nothing that is printed inside, by us, by libraries or by progress bars, is seen."""
    nowhere = open(os.devnull, "w")  # noqa: SIM115  never closed: loggers that are made inside keep it
    with redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def add_model_flags(add):
    """The flags that train.py, sample.py and evaluate.py share: which model, its files, where it runs."""
    add("--task", choices=("c2i", "t2i"), help="class-to-image or text-to-image (default: what --ckpt is, else c2i)")
    add("--model", choices=MODELS, help="a row of the model table (default: the task's toy)")
    add("--vq-ckpt", metavar="PATH", help="tokenizer's weights, or hf:OWNER/REPO[@REVISION]/FILE (default: its own)")
    add("--text-encoder", metavar="PATH", help="t2i: T5's folder or OWNER/REPO[@REVISION] (default: the model's own)")
    add("--text-pad", choices=("left", "right"), help="t2i: the side on which captions are padded; right for the "
        "released AR-GRPO weights (default: what our own --ckpt was trained with, else left, as LlamaGen)")  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="device to run on (default: the GPU if there is one)")
    add("--dtype", choices=("float32", "bfloat16"), help="precision of the layers' matrix products; weights, logits "
        "and loss are float32 (default bfloat16 on a GPU, and for LlamaGen on a processor with instructions for it; "
        "else float32)")  # fmt: skip
    add("--compile", action="store_true", help="compile the steps of sampling, which takes a minute or more and a C++ "
        "compiler, and pays off in long runs on a GPU")  # fmt: skip


def settle_device(args):
    """
    Joins the processes of torchrun if there are any, and has GPUs take float32 convolutions in float32. Raises Mistake
    unless torch can put a tensor on --device and choose its precision there.
    """
    torch.backends.cudnn.allow_tf32 = False  # the tokenizer's and the judges'; True is torch's default
    with reading(f"--device {args.device}", "leave it out to take what there is"):
        args.device = parallel.start(args.device)
        torch.empty(0, device=args.device)
        torch.autocast(torch.device(args.device).type)  # which refuses "meta"
    if getattr(args, "compile", False) and not shutil.which(os.environ.get("CXX", "g++")):
        raise Mistake("--compile needs a C++ compiler: install g++, or set CXX to yours, or leave it out")


def quick_dtype(name, device):
    """
    The default of --dtype for the model `name`: bfloat16 on a GPU, and for LlamaGen on a processor with instructions
    for it; else float32. On 2 cores with avx512_bf16 a step of GPT-B took 0.87 of its time in float32, while the toy's
    products are too small to gain. Weights that do not learn (--lora-rank) gain less: they are rounded at every use.
    """
    able = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch cannot say
    quick = not is_toy(name) and (able.get("avx512_bf16") or able.get("amx_bf16"))
    return "bfloat16" if device.startswith("cuda") or quick else "float32"


def peak_memory_gb(device):
    """GB at the worst moment so far: of the GPU, or of the process on a CPU. None on Windows, which cannot say."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def check_range(args, **least):
    """Raises Mistake unless each flag is finite and at least the number that is given for it. None is left alone."""
    for name, low in least.items():
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not low <= value < 2**40:  # also refuses NaN
                raise Mistake(f"--{name.replace('_', '-')} must be finite and at least {low:g}, not {value}")


def print_files(name, args):
    """Prints each file of the model `name` and of the paper's judges, its source, and whether it is here."""
    from huggingface_hub import constants, try_to_load_from_cache

    row = MODELS[name]
    parts = [("transformer", "--ckpt PATH", args.ckpt or row.ckpt)]
    parts += [("tokenizer", "--vq-ckpt PATH", args.vq_ckpt or row.vq_ckpt)]
    if row.config.task == "t2i":
        parts += [("text encoder", "--text-encoder PATH", args.text_encoder or row.text_encoder)]
    if not is_toy(name):
        parts += [(f"judge {judge}", "--judge-files DIR", where) for judge, where in JUDGE_FILES.items()]
    for part, flag, where in parts:
        if Path(where).exists():
            print(f"{part:13}{where}: here; another file: {flag}")
            continue
        repo, revision, file = hub_place(where)
        found = try_to_load_from_cache(repo, file or "config.json", revision=revision)
        cache = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
        state = f"here: {found}" if isinstance(found, str) else f"not here; expected under {cache}/snapshots"
        at = f"/tree/{revision}" if revision else ""
        print(f"{part:13}{file or Path(repo).name}, from https://huggingface.co/{repo}{at}")
        print(f"{'':13}{state}; downloaded on first use, or give {flag}")


STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
STOPS = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]  # nohup's SIGHUP stays ignored


@contextmanager
def at_the_first_signal():
    """Inside, where the main thread waits for what may never come, the first signal ends the script already."""
    before = {number: signal.signal(number, interrupt) for number in STOPS}
    yield
    for number, handler in before.items():  # not after a signal: a second one then ends the process at once
        signal.signal(number, handler)


def interrupt(number, frame):
    for each in STOPS:  # a second signal ends the process wherever it is, without a word
        signal.signal(each, signal.SIG_DFL)
    raise KeyboardInterrupt(number)


def die_of(number, sentence):
    """Ends the process as the signal would have: a shell loop around the script then stops too."""
    if parallel.rank() == 0:
        print(f"\n{sentence}", file=sys.stderr, flush=True)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def run_script(parse_args, run, argv=None, stopped=lambda args: "stopped"):
    """
    run(parse_args(argv)). What the user can mend, a Mistake or an OSError, ends in its own sentence and exit code 1;
    Ctrl-C, SIGTERM and SIGHUP end in what stopped(args) returns. Anything else is a bug, of ours or of a reader who
    changed the code, and keeps its traceback.
    """
    script, args = Path(sys.modules[run.__module__].__file__).name, None
    before = {number: signal.signal(number, interrupt) for number in STOPS}
    try:
        args = parse_args(argv)
        with silence() if args.quiet else nullcontext():
            run(args)
    except (Mistake, OSError) as error:
        text = str(error)  # may quote a file of the user's that is no caption but a book
        parallel.wait_to_speak()
        sys.exit(f"{script}: {text if len(text) < 1000 else f'{text[:500]} [...] {text[-400:]}'}")
    except RuntimeError as error:
        if not parallel.is_alone(error):
            raise
        sys.exit(f"{script}: another process of this run has ended, so this one is {stopped(args)}")
    except KeyboardInterrupt as error:
        die_of(error.args[0] if error.args else signal.SIGINT, f"{script}: {stopped(args)}")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
