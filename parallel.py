"""
Several processes as one. torchrun starts them, on one machine or several:

    torchrun --nproc-per-node 8 -- train.py --model llamagen-xl-384
    torchrun --nproc-per-node 8 -- train.py --model llamagen-3b-384 --shard
    torchrun --nproc-per-node 8 -- evaluate.py --ckpt out/llamagen-xl-384 --num 50000

The lone -- is needed, because torchrun takes --num for a flag of its own.

Plain `python` is a world of one, in which every function here returns what it was given. Otherwise each process draws,
judges and learns from its own prompts, whole groups of them. Judgements are gathered, so that every process compares
all N images and logs what one process would have logged; gradients are averaged once per update. Random numbers belong
to images, not to processes, so any number of processes draws the same pictures, and goes on with each other's runs.

Only the first process writes files and speaks, unless another one fails.
"""

import os
import signal
import sys
import time
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor


def rank():
    """Which process this is; 0 writes and speaks."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def start(device):
    """Joins the processes that torchrun started, if it did. Returns this one's device: `device`, or its own GPU."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, closed by the end of the process
    return device


def share(n):
    """
    The indices in range(n) that are this process's. All processes have the same number of them, because sharded models
    work only together: where n does not divide, the last ones do some of the first again.
    """
    size = -(-n // world())
    return [k % n for k in range(rank() * size, (rank() + 1) * size)]


def gather(x, n=None):
    """The rows (m, ...) of all processes, one process after the other; the first n of them."""
    if world() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)[:n]


def average(metrics):
    """{name: number}, the same on all processes: floats are averaged, counts were the same already."""
    if world() == 1:
        return metrics
    names = [name for name, value in metrics.items() if isinstance(value, float)]
    values = torch.tensor([metrics[name] for name in names], dtype=torch.float64)
    dist.all_reduce(values)
    return metrics | dict(zip(names, (values / world()).tolist(), strict=True))


def largest(number):
    """The largest of the processes' numbers (integers)."""
    if world() == 1:
        return number
    number = torch.tensor(number)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def average_and_clip(model, most):
    """
    Averages the gradients over the processes, scales them to a norm of at most `most`, and returns the norm before.

    By hand, because DistributedDataParallel averages only what went through its own forward, and our loss calls
    `hidden` and `head`: it would train each process for itself, without a word. Sharded gradients are averaged already.
    """
    for p in model.parameters():
        if world() > 1 and p.grad is not None and not isinstance(p.grad, DTensor):
            dist.all_reduce(p.grad)
            p.grad /= world()
    return whole(torch.nn.utils.clip_grad_norm_(model.parameters(), most))


def is_alone(error):
    """Whether a RuntimeError is what gloo or NCCL make of a process that has ended."""
    return world() > 1 and any(name in str(error) for name in ("gloo", "NCCL"))


def wait_to_speak():
    """What goes wrong for all is said once, by the first process: the others wait until torchrun has ended them."""
    if rank() > 0:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        time.sleep(2)


# ---------------------------------------------------------------------------------------------------------------
# Sharding


def shard(model):
    """
    FSDP (arXiv 2304.11277): each process keeps its part of every weight, and with it of gradients and of AdamW's
    moments. A block's weights are gathered when it is used; a rollout gathers all of them once, not once per token.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    for method in ("with_null", "hidden", "generate"):  # what is called from outside and reads weights
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


def whole(state):
    """A state_dict, or any part of one, with its sharded tensors gathered. All processes must call it."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    return state.full_tensor() if isinstance(state, DTensor) else state


def part_of(value, like):
    """The part of a whole tensor that belongs where the sharded tensor `like` is; all of it if that is not sharded."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def load(state, model, optimizer):
    """Puts a whole state (policy, optimizer) into a model and its optimizer, sharded or not."""
    own = model.state_dict()
    model.load_state_dict({name: part_of(value, own[name]) for name, value in state["policy"].items()})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        k: {name: part_of(value, parameters[k]) if value.dim() else value for name, value in entry.items()}
        for k, entry in state["optimizer"]["state"].items()
    }  # the one without dimension counts steps
    optimizer.load_state_dict(state["optimizer"] | dict(state=moments))
