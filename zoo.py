"""
The model table, and how weights are found and loaded.

    MODELS                            one row per model: the toys in weights/, LlamaGen's on the Hugging Face hub
    find_policy, base_of              --ckpt, --model and --task -> the row, the weights, what their header says
    load_model, load_tokenizer        the networks of a row, loaded strictly
    add_model_flags, run_script       what the scripts share on the command line

Files are read as tensors only; nothing in them is ever executed. LlamaGen's and AR-GRPO's files need no conversion.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import parallel
from model import ModelConfig, Transformer, rope_2d
from tokenizer import VQConfig, VQModel

WEIGHTS = Path(__file__).parent / "weights"


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
# @REVISION is the commit of the hub's repository that is downloaded, so nobody can replace a file. We know none of
# LlamaGen's two repositories, so their newest is taken.
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
    best_by: str = "clip"  # the rewards that choose a best of N


def _toy(name, task, **config):
    config = ModelConfig(task, *SIZES[name], vocab_size=512, grid_size=8, **config)
    files = WEIGHTS / f"{name}.safetensors", WEIGHTS / "toy-vq.safetensors"
    encoder = WEIGHTS / "toy-t5" if task == "t2i" else None
    return ModelRow(config, *files, VQ_TOY, encoder, torch.float32, best_by="clip=1,realism=0.25")


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


def is_toy(name):
    return name.startswith("toy-")


# ---------------------------------------------------------------------------------------------------------------
# Files


def user_path(text):
    """
    Every path of the command line goes through here: ~ is the home folder, which a shell leaves alone behind --out=.
    hf:OWNER/REPO/FILE, a place on the hub, comes back as it is.
    """
    if not text:
        raise argparse.ArgumentTypeError("a path is needed, not an empty text")
    return text if text.startswith("hf:") else Path(os.path.expanduser(text))


@contextmanager
def reading(what, remedy):
    """
    Turns whatever a library raises inside into a Mistake that quotes it. The remedy is for files that are missing or
    hold something else. Where the system or a package refuses (no permission, no such module), it would be a guess.
    """
    try:
        yield
    except (Mistake, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if misfit():
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        reason = text.split(". ")[0][:200]  # the first sentence, because libraries explain at length
        system = getattr(error, "errno", None) and not isinstance(error, FileNotFoundError)
        advice = "" if system or isinstance(error, (ImportError, MemoryError)) else f"; {remedy}"
        raise Mistake(f"{what} cannot be read ({reason}){advice}") from None


@contextmanager
def writing(path):
    """Turns what libraries raise while they write, rarely with the file's name, into an OSError that names `path`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        full = re.search(r"unexpected pos|failed writing|requested and \d+ written", reason)  # torch and numpy say
        raise OSError(f"{path} could not be written ({reason}){'; is the disk full?' if full else ''}") from None


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
            with open(temporary, "r+b") as file:  # Windows flushes only what is open for writing
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk need not stay full


def save_weights(weights, path, header):
    """A safetensors file with a header {name: value}, byte for byte the same for the same weights."""
    Path(path).touch()
    mode = os.stat(path).st_mode
    # one entry, because the library writes several in random order
    save_file(weights, path, metadata={"ar-grpo": json.dumps(header, sort_keys=True)})
    os.chmod(path, mode)  # the library's files can be read by their owner alone


def hub_place(where):
    """("OWNER/REPO", REVISION or None, FILE or "") of "hf:OWNER/REPO@REVISION/FILE". Raises Mistake."""
    form = re.fullmatch(r"(?:hf:)?([^/@]+/[^/@]+)(?:@([^/@]+))?(?:/(.+))?", str(where))
    if not form:
        raise Mistake(f"{where}: neither here nor of the form OWNER/REPO, as the hub has it")
    return form[1], form[2], form[3] or ""


def find_file(where, flag="--ckpt or --vq-ckpt"):
    """
    The path of a weights file: `where` itself, or for "hf:OWNER/REPO/FILE" the copy in the Hugging Face hub's cache,
    downloaded on first use (HF_HOME moves the cache, HF_HUB_OFFLINE=1 forbids downloads). A folder stands for the
    policy or model inside it. Raises Mistake, which names the `flag` that takes another file.
    """
    if not str(where).startswith("hf:"):
        path = Path(where)
        for file in (path, path / "policy.safetensors", path / "model.safetensors"):  # of a run; of a model of the hub
            if file.is_file():
                return file
        raise Mistake(f"{path} is no weights file, nor a folder with policy.safetensors or model.safetensors (shards "
                      f"must first be joined): give one with {flag}")  # fmt: skip
    from huggingface_hub import hf_hub_download

    repo, revision, file = hub_place(where)
    if not file:
        raise Mistake(f"{where}: a file on the hub is written hf:OWNER/REPO/FILE")
    with reading(f"{file} of huggingface.co/{repo}", f"fetch it elsewhere and give it with {flag}"):
        return Path(hf_hub_download(repo, file, revision=revision))


def file_hash(path):
    """
    sha256 of a file, or of all names and contents in a folder but hidden ones: .cache of the hub's downloads, .DS_Store
    of macOS. Raises OSError.
    """
    path = Path(path)
    if path.is_dir():
        names = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
        visible = [name for name in names if not any(part.startswith(".") for part in name.parts)]
        listed = [(str(name), file_hash(path / name)) for name in visible]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def content_of(model, base, vq_ckpt=None, text_encoder=None):
    """
    {name: sha256} of the files that a policy is trained with, by which they are known again wherever they lie. A text
    encoder on the hub is known by its repository and commit. Raises Mistake, OSError.
    """
    row = MODELS[model]
    content = dict(base=file_hash(find_file(base)), tokenizer=file_hash(find_file(vq_ckpt or row.vq_ckpt)))
    if row.config.task == "t2i":
        encoder = text_encoder or row.text_encoder
        content["text encoder"] = file_hash(Path(encoder)) if Path(encoder).exists() else str(encoder)
    return content


def find_policy(ckpt=None, model=None, task=None):
    """
    (name of MODELS, path of the weights, header) from --ckpt, --model and --task. Our own files say in their header
    which model they are. header: step (0: not a file of ours); text_pad, cfg_scale and temperature that the policy was
    trained with, or the row's own; content, of the files that it was trained with ({}: unknown). Raises Mistake.
    """
    path, found = None, {}
    if ckpt is not None:
        path = find_file(ckpt)
        if path.suffix == ".safetensors":
            with reading(path, "it is damaged or cut: fetch it again"), safe_open(path, framework="pt") as file:
                found = dict(json.loads((file.metadata() or {}).get("ar-grpo", "{}")))
    written_by = found.get("model")
    name = model or written_by or f"toy-{task or 'c2i'}"
    if name not in MODELS:
        raise Mistake(f"no model is called {name}; the table has {', '.join(MODELS)}")
    if written_by not in (None, name):
        raise Mistake(f"{path} holds a {written_by} model, not {name}; all weights must be of one model")
    row = MODELS[name]
    if task not in (None, row.config.task):
        raise Mistake(f"the model is {name}, which is {row.config.task}: leave out --task {task}")
    plain = dict(step=0, text_pad="left", cfg_scale=row.cfg_scale, temperature=1.0, content={})
    return name, path or row.ckpt, plain | found


def base_of(name, header, base=None):
    """
    The weights that a policy with this header began from: `base`, or the row's own. A file of ours knows them by their
    sha256. Raises Mistake.
    """
    path, wanted = find_file(base or MODELS[name].ckpt, "--base"), header["content"].get("base")
    if wanted and file_hash(path) != wanted:
        raise Mistake(f"the policy did not begin from {path}: give its own base with --base (sha256 {wanted})")
    return path


def check_tokenizer(name, header, vq_ckpt=None):
    """Raises Mistake unless the tokenizer in use has the content of the one that the policy was trained with."""
    wanted, place = header["content"].get("tokenizer"), vq_ckpt or MODELS[name].vq_ckpt
    if wanted and file_hash(find_file(place)) != wanted:
        raise Mistake(f"the policy was trained with another tokenizer than {place}: give that one with --vq-ckpt")


def part_of(names, prefix):
    """
    {name in a file: name in the model}. AR-GRPO's files hold several models (gpt_model.*, vq_model.* and the frozen
    ref_model.*, which is the base again); of those, only the weights under `prefix`.
    """
    several = ("gpt_model.", "vq_model.", "ref_model.")
    wanted = [name for name in names if name.startswith(prefix) or not name.startswith(several)]
    return {name: name.removeprefix(prefix) for name in wanted}


def load_tensors(path):
    """
    torch.load of tensors and plain values, on the CPU, where they stay in the file until they are used. LlamaGen's
    training checkpoints also hold an argparse.Namespace, which is harmless.
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
        with reading(path, "it is damaged or cut: fetch it again"), safe_open(path, framework="pt") as file:
            return {ours: file.get_tensor(name) for name, ours in part_of(file.keys(), prefix).items()}
    try:
        found = load_tensors(path)
    except (OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if stranger := re.search(r"GLOBAL (\S+)", str(error)):
            raise Mistake(f"{path}: it also holds a {stranger[1]}, which is not loaded; save its weights alone with "
                          "torch.save(model.state_dict(), ...)") from None  # fmt: skip
        raise Mistake(f"{path}: it is cut, or a git-lfs pointer or a web page in its place; fetch it again") from None
    for key in ("ema", "model", "module", "state_dict"):  # official wrappers; moving averages first where present
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise Mistake(f"{path}: holds no named tensors; of a folder that train.py wrote, give policy.safetensors")
    # what DistributedDataParallel and torch.compile put before every name
    found = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): value for name, value in found.items()}
    return {ours: found[name] for name, ours in part_of(found, prefix).items()}


def load_strict(module, weights, source, ignore=()):
    """
    Puts `weights` (a dict of tensors) into `module`, in the module's own dtypes. Every name and shape must agree, but
    for names in `ignore`, and every number must be finite. Raises Mistake; `source` is the file's name in it.
    """
    dtypes = {name: value.dtype for name, value in module.state_dict().items()}
    weights = {name: value for name, value in weights.items() if name not in ignore}
    for name, value in weights.items():
        if dtypes.get(name, value.dtype).is_floating_point and not value.is_floating_point():
            raise Mistake(f"{source}: {name} holds {value.dtype}, whole numbers: a quantised file, which is not loaded")
    # a copy, because the file may change under the values
    weights = {name: value.to(dtypes.get(name, value.dtype), copy=True) for name, value in weights.items()}
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
    Takes LlamaGen's files, AR-GRPO's (`gpt_model.*` of them) and ours. Raises Mistake.
    """
    path = find_file(path or MODELS[name].ckpt)
    with torch.device("meta"):  # no memory and no random numbers for weights that are about to be replaced
        model = Transformer(MODELS[name].config).float()  # whatever the caller's default is
    load_strict(model, read_weights(path, "gpt_model."), path, ignore=("freqs_cis",))
    model.rope, model.compile_steps = rope_2d(model.config), compile_steps
    return model.eval().to(device)


def load_tokenizer(name, path=None, device="cpu"):
    """The image tokenizer of the model `name`, frozen, in float32. Raises as `load_model`."""
    path = find_file(path or MODELS[name].vq_ckpt)
    with torch.device("meta"):
        model = VQModel(MODELS[name].vq_config).float()
    load_strict(model, read_weights(path, "vq_model."), path, ignore=("quantize.codebook_used",))
    return model.eval().requires_grad_(False).to(device)


def autocast(device, dtype):
    """A context manager: matrix products of the layers in `dtype`. Weights, logits and loss are always float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


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
    add("--vq-ckpt", type=user_path, metavar="PATH", help="tokenizer's weights, or hf:OWNER/REPO[@REVISION]/FILE "
        "(default: the model's own)")  # fmt: skip
    add("--text-encoder", type=user_path, metavar="PATH", help="t2i: T5's folder or OWNER/REPO[@REVISION] (default: "
        "the model's own)")  # fmt: skip
    add("--text-pad", choices=("left", "right"), help="t2i: the side on which captions are padded; right for the "
        "released AR-GRPO weights (default: what our own --ckpt was trained with, else left, as LlamaGen)")  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="device to run on (default: the GPU if there is one)")
    add("--dtype", choices=("float32", "bfloat16"), help="precision of the layers' matrix products; weights, logits "
        "and loss are float32 (default: bfloat16 on a GPU, and for LlamaGen on a processor, that has it in hardware; "
        "else float32)")  # fmt: skip
    add("--compile", action="store_true", help="compile the steps of sampling: takes a minute or more and a C++ "
        "compiler, and pays off in long runs on a GPU")  # fmt: skip


def setup_device(args):
    """
    Takes this process's own GPU for --device cuda, and joins the other processes if there are any. Raises Mistake
    unless torch can work on the device, OSError if the others cannot be reached.
    """
    args.device = parallel.own_device(args.device)
    with reading(f"--device {args.device}", "leave it out to take what there is"):
        torch.empty(0, device=args.device)
        torch.autocast(torch.device(args.device).type)  # which refuses "meta"
    if getattr(args, "compile", False) and not shutil.which(os.environ.get("CXX", "g++")):
        raise Mistake("--compile needs a C++ compiler: install g++, or set CXX to yours, or leave it out")
    parallel.start(args.device)


def quick_dtype(name, device):
    """
    The default of --dtype for the model `name`: bfloat16 on a GPU, and for LlamaGen on a processor, that has it in
    hardware; else float32. On 2 cores with avx512_bf16 a step of GPT-B took 0.87 of its time in float32; the toy's
    products are too small to gain.
    """
    if device.startswith("cuda"):
        with torch.cuda.device(device):
            quick = torch.cuda.is_bf16_supported(including_emulation=False)  # a T4 emulates it, and is slower in it
    else:
        able = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch cannot say
        quick = not is_toy(name) and (able.get("avx512_bf16") or able.get("amx_bf16"))
    return "bfloat16" if quick else "float32"


def synchronize(device):
    """Waits for a GPU, whose work is asynchronous."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory_gb(device):
    """GB at the worst moment so far: of an NVIDIA GPU, else of the process. None where that cannot be asked."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
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


@contextmanager
def environment(**values):
    """os.environ with these values; in the end it is put back as it was, whatever was changed inside."""
    before = dict(os.environ)
    try:
        os.environ.update(values)
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def tensors_only():
    """Inside, no torch.load runs a pickle, also in libraries that would (pyiqa, torch-fidelity). A context manager."""
    return environment(TORCH_FORCE_WEIGHTS_ONLY_LOAD="1", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="0")


@contextmanager
def guest():
    """
    What a script sets for its whole process. All of it is put back in the end, because the process may be a notebook's
    or another program's. (A `runs.Run` puts back its signal handlers.) Importing our files changes nothing.
    """
    streams, dtype, tf32 = (sys.stdout, sys.stderr), torch.get_default_dtype(), torch.backends.cudnn.allow_tf32
    quiet = os.environ.get("HF_HUB_VERBOSITY", "error")  # without a network, a dozen lines of retries hide our sentence
    with tensors_only(), environment(HF_HUB_VERBOSITY=quiet), torch.enable_grad():
        try:
            sys.stdout, sys.stderr = map(parallel.Screen, streams)
            torch.set_default_dtype(torch.float32)
            torch.backends.cudnn.allow_tf32 = False  # float32 means float32 to the tokenizer's and judges' convolutions
            yield
        finally:
            sys.stdout, sys.stderr = streams
            torch.set_default_dtype(dtype)
            torch.backends.cudnn.allow_tf32 = tf32


MISFITS = {  # what an error and its way say where packages do not fit each other: what helps
    r"torchvision::|torchvision.*(CUDA|undefined symbol|partially initialized)": "torchvision is not the one for this "
    "torch: pip install --upgrade torch torchvision brings a pair",
    r"lib(cu|nv|nccl|hip|amd|roc|rccl|MIOpen)\S*\.so\S*: cannot open": "a library of CUDA or ROCm is missing: install "
    "the torch and torchvision that https://pytorch.org lists for this machine",
}  # fmt: skip


def misfit():
    """What MISFITS has for the error that is being handled, or None."""
    said = traceback.format_exc()
    return next((advice for sign, advice in MISFITS.items() if re.search(sign, said)), None)


def sentence_of(error):
    """What to say of an error that the user can mend; None for a bug, ours or of a reader who changed the code."""
    if advice := misfit():
        return f"{advice} ({' '.join(str(error).split())[:200]})"
    if parallel.world() > 1 and isinstance(error, RuntimeError) and re.search("gloo|NCCL", str(error)):
        return "another process of this run has ended; --resume continues from the last save"
    if not isinstance(error, (Mistake, OSError)):
        return None
    text = str(error)  # may quote a file of the user's that is no caption but a book
    return text if len(text) < 1000 else f"{text[:500]} [...] {text[-400:]}"


def run_script(parse_args, run, argv=None):
    """run(parse_args(argv)). What the user can mend ends in one sentence and exit code 1, a bug in its traceback."""
    script = Path(getattr(sys.modules[run.__module__], "__file__", "")).name or "python"  # a notebook has no file
    with guest():
        try:
            run(parse_args(argv))
        except KeyboardInterrupt:
            print(f"{script}: stopped", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            if (sentence := sentence_of(error)) is None:
                raise
            if parallel.rank() > 0:  # the first process says what all of them meet, and torchrun then ends the others
                time.sleep(2)
            sys.exit(f"{script}: {sentence}")
