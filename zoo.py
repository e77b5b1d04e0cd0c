"""
The model table, and how weights are found and loaded.

    MODELS                                one row per model: the toys in weights/, LlamaGen's on the Hugging Face hub
    find_policy, find_base                --ckpt, --model and --task -> the row, the weights, what their header says
    load_model, load_tokenizer, load_encoder   the three networks of a row, loaded strictly
    captions_of, read_prompts             what a model can be asked for, and what the judges read about it
    add_model_flags, run_script           what the scripts share on the command line

Files are read as tensors only; nothing in them is ever executed. LlamaGen's and AR-GRPO's files need no conversion.
"""

import argparse
import hashlib
import html
import json
import os
import re
import shutil
import sys
import tempfile
import time
import urllib.parse
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import data
import parallel
from model import ModelConfig, Transformer, rope_2d
from tokenizer import VQConfig, VQModel

# Also inside pyiqa, which would unpickle whatever is in a file. The opposite variable would win over it.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # without a network, a dozen lines of retries hide our sentence
os.environ["MPLBACKEND"] = "Agg"  # figures go to files; a notebook's backend may not exist here
WEIGHTS = Path(__file__).parent / "weights"
COMPLEX = ("cpu", "cuda")  # the kinds of devices that surely have complex numbers


class Mistake(ValueError):
    """What the user can mend, in one sentence that says how. The scripts end with it, without a traceback."""


SIZES = {  # layers, heads, C              parameters at the grid and vocabulary that the size was released for
    "toy-c2i": (6, 5, 160),  # 2.3M
    "toy-t2i": (6, 5, 160),  # 2.3M
    "toy-c2i-small": (4, 3, 96),  # 0.6M
    "GPT-B": (12, 12, 768),  # 111M
    "GPT-L": (24, 16, 1024),  # 343M
    "GPT-XL": (36, 20, 1280),  # 775M
    "GPT-XXL": (48, 24, 1536),  # 1.4B
    "GPT-3B": (24, 32, 3200),  # 3.1B
}
# @REVISION is the commit of the hub's repository that is downloaded, so nobody can replace a file. We know no commit of
# LlamaGen's two repositories, so their newest is taken; of OpenAI's CLIP, what open_clip takes.
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


def _toy(name, task, **config):
    config = ModelConfig(task, *SIZES[name], vocab_size=512, grid_size=8, **config)
    files = WEIGHTS / f"{name}.safetensors", WEIGHTS / "toy-vq.safetensors"
    return ModelRow(config, *files, VQ_TOY, WEIGHTS / "toy-t5" if task == "t2i" else None, torch.float32)


def _llamagen_c2i(size, grid, file):
    config, repo = ModelConfig("c2i", *SIZES[size], grid_size=grid), "hf:FoundationVision/LlamaGen"
    return ModelRow(config, f"{repo}/{file}", f"{repo}/vq_ds16_c2i.pt", cfg_scale=4.0, top_k=2000)


def _llamagen_t2i(grid, file):
    config, repo = ModelConfig("t2i", *SIZES["GPT-XL"], grid_size=grid, cond_len=120), "hf:peizesun/llamagen_t2i"
    files = f"{repo}/{file}", f"{repo}/vq_ds16_t2i.pt"
    return ModelRow(config, *files, text_encoder=FLAN_T5_XL, cfg_scale=7.5, top_k=1000)


MODELS = {
    "toy-c2i": _toy("toy-c2i", "c2i", num_classes=40),
    "toy-t2i": _toy("toy-t2i", "t2i", caption_dim=64, cond_len=12),
    "toy-c2i-small": _toy("toy-c2i-small", "c2i", num_classes=40),
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

# What the paper's judges load. --judge-files DIR is searched first: for the file, or (clip, qwen) for a folder with the
# repository's name that holds its files.
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
    """Turns whatever a library raises inside (each has its own errors for a missing or cut file) into a Mistake."""
    try:
        yield
    except (Mistake, torch.OutOfMemoryError):
        raise
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        reason = text.split(". ")[0][:200]  # the first sentence, because libraries explain at length
        raise Mistake(f"{what} cannot be read ({reason}); {remedy}") from None


@contextmanager
def tensors_only():
    """Keeps libraries from unpickling: inside, torch.load reads tensors and plain values alone, whatever it is told."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")  # the second would win
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        del os.environ[names[0]]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextmanager
def writing(path):
    """Turns what libraries raise on a full disk, rarely with the file's name, into an OSError that names `path`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # only an error of the system has a strerror; torch's and numpy's speak of their containers and elements
        reason = getattr(error, "strerror", None) or f"is the disk full? {str(error).splitlines()[0]}"
        raise OSError(f"{path} could not be written ({reason})") from None


def make_folder(folder):
    """Makes `folder` if need be, and tries to write in it: now, not after hours of work. Raises OSError."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def write_whole(path, write):
    """
    write(temporary path), flush to disk, rename: a killed run or a full disk leaves the old file or the new. Only the
    first process writes. Raises OSError.
    """
    if parallel.rank() > 0:
        return
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")  # the suffix stays: PIL reads the format from it
    try:
        with writing(path):
            write(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk need not stay full


def save_weights(weights, path, header):
    """A safetensors file with a header {name: value}, byte for byte the same for the same weights."""
    # one entry, because the library writes several in random order
    save_file(weights, path, metadata={"ar-grpo": json.dumps(header, sort_keys=True)})
    umask = os.umask(0)
    os.umask(umask)
    with suppress(OSError):  # the library makes files that only their owner may read; some file systems have no modes
        os.chmod(path, 0o666 & ~umask)


def hub_place(where):
    """("OWNER/REPO", REVISION or None, FILE or "") of "hf:OWNER/REPO@REVISION/FILE". Raises Mistake."""
    form = re.fullmatch(r"(?:hf:)?([^/@]+/[^/@]+)(?:@([^/@]+))?(?:/(.+))?", str(where))
    if not form:
        raise Mistake(f"{where}: neither here nor of the form OWNER/REPO, as the hub has it")
    return form[1], form[2], form[3] or ""


def folder_or_repo(where):
    """What from_pretrained takes for a folder, OWNER/REPO or OWNER/REPO@REVISION: (where, {"revision": ...})."""
    if Path(where).exists() or "@" not in str(where):
        return where, {}
    repo, revision, _ = hub_place(where)
    return repo, dict(revision=revision)


def find_file(where, flag="--ckpt or --vq-ckpt", folder=None):
    """
    The path of a weights file: `where` itself, or for "hf:OWNER/REPO/FILE" the copy in `folder` or in the Hugging Face
    hub's cache, downloaded on first use (HF_HOME moves the cache, HF_HUB_OFFLINE=1 forbids downloads). A folder stands
    for the policy or model inside it. Raises Mistake, which names the `flag` that takes another file, and
    FileNotFoundError.
    """
    if not str(where).startswith("hf:"):
        path = Path(where)
        for name in ("policy.safetensors", "model.safetensors"):
            if (path / name).is_file():
                return path / name
        if not where or not path.is_file():
            raise FileNotFoundError(f"{where or repr('')}: no such weights file")
        return path
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
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def content_hash(path):
    """sha256 of a file, or of the names and contents of all files in a folder. Raises OSError."""
    if path.is_file():
        return file_hash(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    listed = [(str(file.relative_to(path)), file_hash(file)) for file in files]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def content_of(model, base, vq_ckpt=None, text_encoder=None):
    """
    {name: sha256} of the files that a policy is trained with: wherever they lie, and whatever their names, this is how
    they are known again. A text encoder on the hub is known by its repository and commit. Raises Mistake, OSError.
    """
    row = MODELS[model]
    content = dict(base=content_hash(find_file(base)), tokenizer=content_hash(find_file(vq_ckpt or row.vq_ckpt)))
    if row.config.task == "t2i":
        encoder = text_encoder or row.text_encoder
        content["text encoder"] = content_hash(Path(encoder)) if Path(encoder).exists() else str(encoder)
    return content


def find_policy(ckpt=None, model=None, task=None):
    """
    (name of MODELS, path of the weights, header) from --ckpt, --model and --task. Our own files say in their header
    which model they are. `path` is the row's own where no --ckpt is given.

    header: step (0: not a file of ours); text_pad, cfg_scale and temperature that the policy was trained with, or the
    row's own; content, of the files that it was trained with ({}: unknown), and where its base was. Raises Mistake if
    the three disagree, FileNotFoundError.
    """
    path, found = None, {}
    if ckpt is not None:
        path = find_file(ckpt)
        if path.suffix == ".safetensors":
            with reading(path, "the file is damaged or cut"), safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                found = dict(json.loads(metadata.get("ar-grpo", "{}")))
    written_by = found.get("model")
    name = model or written_by or f"toy-{task or 'c2i'}"
    if written_by not in (None, name):
        raise Mistake(f"{path} holds a {written_by} model, not {name}; all weights must be of one model")
    row = MODELS[name]
    if task not in (None, row.config.task):
        where = f"{path} holds" if written_by else "the model is"
        raise Mistake(f"{where} {name}, which is {row.config.task}: leave out --task {task}")
    plain = dict(step=0, text_pad="left", cfg_scale=row.cfg_scale, temperature=1.0, content={}, base_path=None)
    return name, path or row.ckpt, plain | found


def find_base(name, header, base=None):
    """
    (path, header) of the base that a policy with this header began from: `base`, or where it was in training, or the
    row's own, whichever has its content. A foreign file does not say what it began from: `base`, or the row's own.
    Raises Mistake, OSError.
    """
    wanted = header["content"].get("base")
    if wanted is None:
        return find_policy(base, name)[1:]
    for place in [base] if base else filter(None, [header["base_path"], MODELS[name].ckpt]):
        with suppress(FileNotFoundError):
            if content_hash(find_file(place, "--base")) == wanted:
                return find_policy(place, name)[1:]
    where = f"--base {base} is another file" if base else "it is no longer where it was, nor is it the model's own"
    raise Mistake(
        f"the base that this policy began from is missing: {where}; give the file with --base (sha256 {wanted})"
    )


def check_tokenizer(name, header, vq_ckpt=None):
    """Raises Mistake unless the tokenizer in use has the content of the one that the policy was trained with."""
    wanted, place = header["content"].get("tokenizer"), vq_ckpt or MODELS[name].vq_ckpt
    if wanted and content_hash(find_file(place)) != wanted:
        raise Mistake(f"the policy was trained with another tokenizer than {place}: give that one with --vq-ckpt")


def part_of(names, prefix):
    """
    {name in a file: name in the model}. AR-GRPO's files hold several models (gpt_model.*, vq_model.* and the frozen
    ref_model.*, which is the base again); of those, only the weights under `prefix`.
    """
    several = ("gpt_model.", "vq_model.", "ref_model.")
    if not prefix or not any(name.startswith(several) for name in names):
        return {name: name for name in names}
    others = tuple(set(several) - {prefix})
    return {name: name.removeprefix(prefix) for name in names if not name.startswith(others)}


def load_tensors(path):
    """
    torch.load of tensors and plain values, on the CPU. The tensors stay in the file until they are used, so sizes are
    known before memory is taken. LlamaGen's training checkpoints also hold an argparse.Namespace, which is harmless.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the form of torch before 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)


def read_weights(path, prefix=""):
    """
    The tensors of a .safetensors or official .pt file, by name, on the CPU; of a file that holds several models only
    those under `prefix`, without it. Raises Mistake if the file is cut, holds more than tensors or has neither form.
    """
    if Path(path).suffix == ".safetensors":
        with reading(path, "the file is damaged or cut"), safe_open(path, framework="pt") as file:
            return {ours: file.get_tensor(name) for name, ours in part_of(file.keys(), prefix).items()}
    try:
        found = load_tensors(path)
    except (FileNotFoundError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        stranger = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it also holds a {stranger[1]}, which is not loaded" if stranger else "it is damaged or cut"
        raise Mistake(f"{path}: {reason}; save its weights alone with torch.save(model.state_dict(), ...)") from None
    for key in ("ema", "model", "module", "state_dict"):  # official wrappers; moving averages first where present
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    named = isinstance(found, dict) and all(isinstance(name, str) for name in found)
    if not named or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise Mistake(f"{path}: holds no named tensors; of a folder that train.py wrote, give policy.safetensors")
    # what DistributedDataParallel and torch.compile put before every name
    found = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in found.items()}
    return {ours: found[name] for name, ours in part_of(found, prefix).items()}


def load_strict(module, weights, source, ignore=()):
    """
    Puts `weights` (a dict of tensors) into `module`, in the module's own dtypes. Every name and shape must agree, but
    for names in `ignore`, and every number must be finite. Raises Mistake; `source` is the file's name in it.
    """
    dtypes = {name: value.dtype for name, value in module.state_dict().items()}
    # a copy, because the file may change under the values
    weights = {k: v.to(dtypes.get(k, v.dtype), copy=True) for k, v in weights.items() if k not in ignore}
    with reading(source, "it is a file of another model or size"):
        module.load_state_dict(weights, assign=True)  # assign: a module on the meta device gets its memory here
    for name, value in weights.items():
        if not value.isfinite().all():
            raise Mistake(f"{source}: {name} holds NaN or infinity; the file is damaged, or of a run that diverged")
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
    if torch.device(device).type not in COMPLEX:
        model.rope = torch.view_as_real(model.rope)
    return model.eval().to(device)


def load_tokenizer(name, path=None, device="cpu"):
    """The image tokenizer of the model `name`, frozen, in float32. Raises as `load_model`."""
    path = find_file(path or MODELS[name].vq_ckpt)
    with torch.device("meta"):
        model = VQModel(MODELS[name].vq_config)
    load_strict(model, read_weights(path, "vq_model."), path, ignore=("quantize.codebook_used",))
    return model.eval().requires_grad_(False).to(device)


def load_encoder(name, path=None, device="cpu"):
    """
    The function encode(prompts, pad="left") of the model `name`: from B labels or B captions to its conditioning
    (cond, cond_mask), which is labels (B,) and ones (B, 1), or text features (B, P, caption_dim) and (B, P).
    """
    row = MODELS[name]
    if row.config.task == "t2i":
        return TextEncoder(path or row.text_encoder, row.config, device, row.text_dtype)

    def encode_labels(labels, pad=None):
        return torch.tensor(labels, device=device), torch.ones(len(labels), 1, dtype=torch.bool, device=device)

    return encode_labels


class TextEncoder:
    """
    The frozen T5 encoder: captions -> (features (B, P, caption_dim) float32, mask (B, P) bool).

    pad="left": LlamaGen's form. The text stands next to the image, because token 0 is predicted from position P - 1,
    and padding features are zero. pad="right": the form of the released AR-GRPO, for weights that were trained with it.
    Padding stands next to the image and keeps T5's output there, so token 0 is predicted from that.

    path is a folder in transformers' form, or OWNER/REPO or OWNER/REPO@REVISION on the hub. Raises Mistake.
    """

    def __init__(self, path, config, device="cpu", dtype=torch.float32):
        from transformers import AutoTokenizer, T5EncoderModel
        from transformers.utils import logging

        logging.disable_progress_bar()  # one per file, amid our own lines
        self.cond_len, self.device = config.cond_len, device
        with reading(f"--text-encoder {path}", "give a folder that holds a T5 encoder, or connect to the internet"):
            place, revision = folder_or_repo(path)
            self.words = AutoTokenizer.from_pretrained(place, **revision)
            self.t5, info = T5EncoderModel.from_pretrained(place, dtype=dtype, output_loading_info=True, **revision)
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


def left_pad(features, mask):
    """Right-padded features (B, P, C) and mask (B, P) -> the same with padding zeroed and moved to the left."""
    order = mask.argsort(dim=-1, stable=True)  # padding (0) first, text (1) last in its own order
    mask = mask.gather(-1, order).bool()
    features = features.gather(1, order[..., None].expand_as(features))
    return features * mask[..., None], mask


# What is removed from a caption before T5 reads it, in this order. LlamaGen inherited the cleaning from DeepFloyd IF.
# Captions from the web need it. It also changes case, quotes, hyphens and spacing of plain ones, and so their features.
_FILE_ENDINGS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_NOISE = [(re.compile(pattern), instead) for pattern, instead in (
    # web addresses, but for what follows a "?"
    (r"\b((https?|www):(/{1,3}|[a-z\d%])|[a-z\d.\-]+\.(com|co|ru|net|org|edu|gov|it)[\w/\-]*\b/?(?!@))", ""),
    (r"@\w+\b", ""),  # handles
    ("[\u31c0-\u9fff]+", ""),  # Chinese characters and their like, which this T5 does not know
    ("[\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58"
     "\ufe63\uff0d]+", "-"),  # every kind of dash
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    (r"\d{1,3}(\.\d{1,3}){3}", " "),  # IP addresses
    (r"\d:\d\d\s+$|#\d{1,3}\b|#\d{5,}\b|\b\d{6,}\b", ""),  # numbers of articles
    (r"\\n", " "),  # a newline that somebody escaped
    (rf"\S+\.({_FILE_ENDINGS})", ""),  # file names
    ("[\"']{2,}", '"'),  # doubled punctuation
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)]  # fmt: skip
_REMAINS = [(re.compile(pattern), instead) for pattern, instead in (
    (r"\b[a-z]{1,3}\d{3,15}\b", ""),  # codes of articles: jc6640
    (r"\b[a-z]+\d+[a-z]+\b|\b\d+[a-z]+\d+\b|\b[a-z]+\d+[a-z]+\d+[a-z\d]*\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping|(free\s)?download(\sfree)?|\bclick\b\s(for|on)\s\w+", ""),  # shop talk
    (rf"\b({_FILE_ENDINGS})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes: 30x40
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),  # "red,blue" is read as "red, blue"
    (r"\s+", " "),
    (r"^\s*[\"'](.+)[\"']\s*$", r"\1"),  # quotes around it all
    (r"^\s*['_,\-:;]|['_,\-:+]\s*$|^\s*\.\S+\s*$", ""),  # loose ends
)]  # fmt: skip


def clean_caption(caption):
    """A caption as LlamaGen's text encoder reads it: lower-cased and cleaned, twice."""
    import ftfy

    for _ in range(2):  # the second time removes what the first one uncovered
        caption = urllib.parse.unquote_plus(caption).strip().lower().replace("<person>", "person")
        caption = html.unescape(re.sub("<[^<>]*>", "", caption))  # tags, then entities
        for pattern, instead in _NOISE:
            caption = pattern.sub(instead, caption)
        if len(re.findall("[-_]", caption)) > 3:  # this-is-my-holiday-picture
            caption = re.sub("[-_]", " ", caption)
        caption = html.unescape(html.unescape(ftfy.fix_text(caption)))
        for pattern, instead in _REMAINS:
            caption = pattern.sub(instead, caption)
        caption = caption.strip()
    return caption


def autocast(device, dtype):
    """
    The precision of sampling and scoring, a context manager. Weights stay float32. With dtype bfloat16 the layers'
    matrix products are taken in it. Logits, softmax, loss and the tokenizer are always float32.
    """
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


# ---------------------------------------------------------------------------------------------------------------
# What a model can be asked for

# Each colour and each shape at least once, so that the first grid shows the whole toy world.
DEFAULT_CLASSES = ("red circle", "green square", "blue triangle", "yellow cross", "cyan ring", "magenta cross",
                   "orange triangle", "white circle")  # fmt: skip


def class_names(model):
    """The class names of a c2i model: the toy's 40 or ImageNet's 1,000."""
    return data.TOY_CLASSES if is_toy(model) else data.imagenet_classes()


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


def read_prompts(model, classes=None, prompts=None):
    """What --classes and --prompts ask a model for: a list of labels or of captions. Raises Mistake, OSError."""
    task = MODELS[model].config.task
    if (prompts if task == "c2i" else classes) is not None:
        flag, other = ("--prompts", "--classes") if task == "c2i" else ("--classes", "--prompts")
        raise Mistake(f"{model} is a {task} model: it takes {other}, not {flag}")
    if task == "t2i" and not prompts and not is_toy(model):
        raise Mistake(f"{model} needs --prompts: captions, or files of them")
    try:
        if task == "c2i":
            classes = classes or (DEFAULT_CLASSES if is_toy(model) else range(8))
            return [data.find_class(name, is_toy(model)) for name in classes]
        captions = []
        for prompt in prompts or data.balanced_captions(6):
            captions += data.read_prompt_file(prompt) if data.is_prompt_file(prompt) else [prompt]
        if is_toy(model):  # in the one form that its text encoder knows; refuses what would draw nonsense
            return [data.toy_caption(caption) for caption in captions]
    except ValueError as error:
        raise Mistake(str(error)) from None
    empty = [caption for caption in captions if not clean_caption(caption)]
    if empty:
        print(f"left out, because nothing of it remains after T5's cleaning: {empty[0]!r} ({len(empty)} in all)")
    captions = [caption for caption in captions if caption not in empty]
    if not captions:
        raise Mistake("--prompts: no caption is left")
    return captions


def fixed_prompts(model, n):
    """The n labels or captions that every evaluation of a model uses: all in turn."""
    config = MODELS[model].config
    return [k % config.num_classes for k in range(n)] if config.task == "c2i" else data.balanced_captions(n)


# ---------------------------------------------------------------------------------------------------------------
# The command line, as far as the scripts share it


def script_parser(doc=None, **options):
    """An argparse parser that prints `doc` as it is and takes no abbreviated flags."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=form, allow_abbrev=False, **options)


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
        "and loss are float32 (default: bfloat16 on a GPU, and for LlamaGen on a processor with instructions for it; "
        "else float32)")  # fmt: skip
    add("--compile", action="store_true", help="compile the steps of sampling: takes a minute or more and a C++ "
        "compiler, and pays off in long runs on a GPU")  # fmt: skip


def setup_device(args):
    """
    Joins the other processes if there are any, and has GPUs take float32 convolutions in float32. Raises Mistake unless
    torch can put a tensor on --device and choose its precision there.
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
    for it; else float32. On 2 cores with avx512_bf16 a step of GPT-B took 0.87 of its time in float32. The toy's
    products are too small to gain.
    """
    able = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch cannot say
    quick = not is_toy(name) and (able.get("avx512_bf16") or able.get("amx_bf16"))
    return "bfloat16" if device.startswith("cuda") or quick else "float32"


class BusyHint:
    """
    Says once that another program keeps the processor busy. Threads wait for each other: on two cores of which one is
    busy, two threads take twice as long as one. The number is not changed here, because sums would round differently.
    """

    def __init__(self):
        self.wall, self.cpu, self.said = time.perf_counter(), time.process_time(), False

    def check(self):
        """Looks at the time since the last check that was 5 s ago or more."""
        wall, cpu, threads = time.perf_counter() - self.wall, time.process_time() - self.cpu, torch.get_num_threads()
        if self.said or wall < 5:
            return
        if threads > 1 and cpu < 0.8 * wall * threads:
            print(f"another program keeps the processor busy: {threads} threads get {cpu / wall:.1f} cores; as long as "
                  f"it runs, OMP_NUM_THREADS={threads - 1} in front of the command is faster")  # fmt: skip
            self.said = True
        self.wall, self.cpu = self.wall + wall, self.cpu + cpu


def synchronize(device):
    """Waits for a GPU, whose work is asynchronous."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory_gb(device):
    """GB at the worst moment so far: of the GPU, or of the process on a CPU. None where that cannot be asked."""
    if torch.device(device).type != "cpu":
        allocated = getattr(torch.accelerator, "max_memory_allocated", lambda device: 0)  # since torch 2.9
        return allocated(device) / 1e9 or None  # 0 where the device does not count
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def check_range(args, **least):
    """Check that each flag is finite and >= its minimum; skip flags that are None. Raises Mistake."""
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


def run_script(parse_args, run, argv=None):
    """
    run(parse_args(argv)). What the user can mend, a Mistake or an OSError, ends in its own sentence and exit code 1.
    Anything else is a bug, ours or that of a reader who changed the code, and keeps its traceback.
    """
    script = Path(sys.modules[run.__module__].__file__).name
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 gets ? for what it lacks
    try:
        run(parse_args(argv))
    except (Mistake, OSError) as error:
        text = str(error)  # may quote a file of the user's that is no caption but a book
        parallel.wait_to_speak()
        sys.exit(f"{script}: {text if len(text) < 1000 else f'{text[:500]} [...] {text[-400:]}'}")
    except RuntimeError as error:
        if not parallel.is_alone(error):
            raise
        sys.exit(f"{script}: another process of this run has ended; --resume continues from the last save")
    except KeyboardInterrupt:
        print(f"{script}: stopped", file=sys.stderr)
        sys.exit(130)
