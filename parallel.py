"""
Several processes as one: one per GPU, on one machine or several.

    torchrun --nproc-per-node 8 -- train.py --model llamagen-xl-384
    torchrun --nproc-per-node 8 -- train.py --model llamagen-3b-384 --shard
    torchrun --nproc-per-node 8 -- evaluate.py --ckpt out/llamagen-xl-384 --num 50000

The lone -- is needed, because torchrun would take --num for a flag of its own. srun and mpirun can start them as well.

Plain `python` is a world of one, in which every function here returns its argument. Otherwise each process samples,
judges and learns from its own prompts, whole groups of them. Scores are gathered, gradients averaged. Random numbers
belong to images, so any number of processes draws the same images, and can resume each other's runs. Only the first
process writes files and prints.
"""

import os
import sys
from contextlib import suppress
from functools import partial

import torch
import torch.distributed as dist
from tqdm import tqdm

LAUNCHERS = [  # rank, number of processes, rank on its machine, as srun and mpirun set them
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
]


def rank():
    """Which process this is. 0 writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


class Screen:
    """A stream that outlives its reader: what a closed terminal (EIO) or pipe (EPIPE) does not take goes nowhere."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
        except UnicodeEncodeError:  # a terminal that is not UTF-8 gets ? for what it lacks
            self.stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
        except (OSError, ValueError):  # ValueError: it has been closed here
            self.silence()
        except RuntimeError:  # a signal's line amid another
            pass

    def flush(self):
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.silence()

    def silence(self):
        with suppress(OSError, ValueError):  # with what it still holds, which the interpreter flushes in the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def say(text):
    """Prints a line above the progress bar: how ours reach the screen. Only the first process speaks."""
    if rank() == 0:
        screen = Screen(sys.stdout)
        tqdm.write(text, file=screen)
        screen.flush()


def own_device(device):
    """This process's device: of several for cuda, a GPU of its own. Tells torch what srun or mpirun say."""
    env = os.environ
    for own_rank, size, local_rank in LAUNCHERS:
        if "WORLD_SIZE" not in env and int(env.get(size, 1)) > 1:
            env.update(RANK=env[own_rank], WORLD_SIZE=env[size], LOCAL_RANK=env.get(local_rank, env[own_rank]))
    several = int(env.get("WORLD_SIZE", 1)) > 1
    return f"cuda:{env.get('LOCAL_RANK', 0)}" if device == "cuda" and several else device


def start(device):
    """Joins the other processes, if WORLD_SIZE says that there are any. Raises ConnectionError."""
    env = os.environ
    if int(env.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    env.setdefault("MASTER_ADDR", "127.0.0.1")  # of several machines each has to be told where the first one is
    env.setdefault("MASTER_PORT", "29500")
    place = f"MASTER_ADDR:MASTER_PORT {env['MASTER_ADDR']}:{env['MASTER_PORT']}"
    if not dist.is_torchelastic_launched():  # it may be a scheduler's variables that nobody meant
        say(f"waiting for all of {env['WORLD_SIZE']} processes at {place}; to run as one, unset WORLD_SIZE")
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    except (RuntimeError, ValueError) as error:
        advice = "; another job has this port: set MASTER_PORT to a free one" if "EADDRINUSE" in str(error) else ""
        reason = str(error).splitlines()[0][:300]
        raise ConnectionError(f"the processes cannot join at {place} ({reason}){advice}") from None
    if rank() > 0:  # the libraries' lines, too
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, closed by the end of the process


def share(n):
    """
    This process's indices in range(n). Sharded models only work together, so all processes get the same number: where
    n does not divide, the last ones repeat some of the first indices.
    """
    size = -(-n // world())
    return [k % n for k in range(rank() * size, (rank() + 1) * size)]


def gather(x, n=None):
    """The rows (m, ...) of all processes in the order of their ranks; the first n of them."""
    if world() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)[:n]


def average(metrics):
    """{name: number} of each process -> the same on all. Floats are averaged; integers are the same already."""
    names = [name for name, value in metrics.items() if isinstance(value, float)]
    values = torch.tensor([metrics[name] for name in names], dtype=torch.float64)
    if world() > 1:
        dist.all_reduce(values)
    return metrics | dict(zip(names, (values / world()).tolist(), strict=True))


def largest(number):
    """The largest of the processes' integers."""
    number = torch.tensor(number)
    if world() > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def average_and_clip(model, most):
    """
    Averages the gradients over the processes, scales them to a norm of at most `most`, and returns the norm before.
    By hand, because DistributedDataParallel averages only what went through its own forward, and our loss calls
    `hidden` and `head`. Sharded gradients are averaged already.
    """
    for p in model.parameters():
        if world() > 1 and p.grad is not None and not hasattr(p.grad, "full_tensor"):  # a DTensor has it
            dist.all_reduce(p.grad)
            p.grad /= world()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), most)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


# ---------------------------------------------------------------------------------------------------------------
# Sharding


def shard(model):
    """
    FSDP (arXiv 2304.11277): each process keeps its part of all weights, gradients and AdamW moments. A block's weights
    are gathered when it is used. A rollout gathers all of them once, not once per token.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    # `head` needs no entry: it follows `hidden`, after which the root's weights stay gathered
    for method in ("with_null", "hidden", "generate"):  # called from outside, and they read weights
        register_fsdp_forward_method(model, method)
    model.generate = partial(generate_gathered, model, model.generate)


def generate_gathered(model, generate, *args, **kwargs):
    for layer in model.layers:
        layer.set_reshard_after_forward(False)
    try:
        return generate(*args, **kwargs)
    finally:
        for layer in model.layers:
            layer.set_reshard_after_forward(True)
            layer.reshard()


def full_state(model, optimizer):
    """(weights, optimizer state) by parameter name, whole and on the CPU. All processes must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict  # takes a second to import

    return get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_full_state(model, optimizer, weights, optimizer_state):
    """Puts what `full_state` returned into a model and its optimizer, sharded or not."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    options = StateDictOptions(full_state_dict=True)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=optimizer_state, options=options)
