"""
How fast decoding and learning are, on random weights (speed does not depend on them), beside what they could be.

    python bench.py                                          # both parts; GPT-B at 256 px, some minutes on 2 cores
    python bench.py --parts decode --dtype bfloat16          # one of them
    python bench.py --compile --models llamagen-b-256 llamagen-xl-384 llamagen-t2i-xl-256 --images 32   # on a GPU

    decode     sampling tokens, beside a plain version (whole cache under a mask, both halves of the batch through the
               head, the condition computed for each image) and beside the machine's limit
    learn      scoring and its backward pass, beside a version that keeps all logits: time and peak memory

train.py logs the seconds of the other parts, of each judge, and the peak memory, on every step.

Versions that are compared run alternately, --repeat times, so a busy machine is busy for all of them. Ratios are
medians, with the smallest and the largest in brackets. The limit of decoding: every token needs every matrix once, so
it takes at least as long as these products alone, which read the weights as fast as memory allows. (On a GPU they are
replayed as one graph, because launching most of them takes longer than computing them.)

Shapes as in model.py.
"""

import json
import multiprocessing
import platform
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch

import zoo
from grpo import grpo_loss, token_logprobs
from model import Linear, Transformer, cache_dtype, image_noise, policy_logprobs, record, rounded, sample_row
from zoo import Mistake


def seconds(fn, device):
    """Seconds that fn() takes."""
    zoo.synchronize(device)
    start = time.perf_counter()
    fn()
    zoo.synchronize(device)
    return time.perf_counter() - start


def alternate(versions, repeat, device):
    """{name: seconds of each of `repeat` calls} of {name: function}, by turns, after a first call of each."""
    for fn in versions.values():
        fn()
    rounds = [{name: seconds(fn, device) for name, fn in versions.items()} for _ in range(repeat)]
    return {name: [times[name] for times in rounds] for name in versions}


def ratio(over, under):
    """The median of over[k] / under[k] and its range, as text and as numbers."""
    found = sorted(a / b for a, b in zip(over, under, strict=True))
    return f"{median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})", [median(found), found[0], found[-1]]


def random_model(args, name):
    """(model, cond, cond_mask): a transformer of the table's shape, and B = --images / G conditions for it."""
    torch.manual_seed(0)
    config = zoo.MODELS[name].config
    model, B = Transformer(config).eval().to(args.device), args.images // args.group_size
    model.compile_steps = args.compile
    cond = torch.arange(B, device=args.device) % config.num_classes
    if config.task == "t2i":
        cond = torch.randn(B, config.cond_len, config.caption_dim, device=args.device)
    return model, cond, torch.ones(B, config.cond_len, dtype=torch.bool, device=args.device)


@torch.no_grad()
def plain_generate(model, cond, cond_mask, cfg_scale, noise):
    """Sampling as a first version would do it. In float32 it draws the same tokens. Returns (N, T)."""
    config, N, L = model.config, len(cond), len(model.rope)
    cond, cond_mask = model.with_null(cond, cond_mask)
    x, mask = model.embed(cond), model.padded_causal_mask(cond_mask)
    heads = config.n_head, L, config.dim // config.n_head
    kind = x.device.type
    cache = torch.zeros(config.n_layer, 2, 2 * N, *heads, dtype=cache_dtype(kind), device=x.device)
    place, tokens = torch.arange(config.cond_len, device=x.device), []
    for i in range(config.num_tokens):
        for layer, layer_cache in zip(model.layers, cache, strict=True):
            x = layer(x, model.rope[place], mask[:, :, place], layer_cache, place)
        cond_logits, uncond_logits = model.head(model.norm(x[:, -1:].float()))[:, 0].chunk(2)
        logp = policy_logprobs(uncond_logits + (cond_logits - uncond_logits) * cfg_scale)
        tokens.append(sample_row(logp, noise[:, i].to(x.device)))
        x, place = model.tok_embeddings(tokens[-1][:, None]).repeat(2, 1, 1), place[-1:] + 1
    return torch.stack(tokens, 1)


@torch.no_grad()
def stream(matrices, model, rows, tokens):
    """The matrix products of decoding `tokens` tokens for a batch of `rows`, and nothing else."""
    inputs = {m: torch.ones(rows, 1, m.in_features, dtype=m.weight.dtype, device=m.weight.device) for m in matrices}
    hidden = torch.ones(rows // 2, 1, model.config.dim, device=model.rope.device)
    for _ in range(tokens):
        for matrix, x in inputs.items():
            matrix(x)
        model.head(hidden)


def decode(args, name):
    model, cond, cond_mask = random_model(args, name)
    config, N, G = model.config, len(cond) * args.group_size, args.group_size
    noise, dtype = image_noise(range(N), config.num_tokens, 0), getattr(torch, args.dtype)
    repeated = cond.repeat_interleave(G, 0), cond_mask.repeat_interleave(G, 0)
    layers = [rounded(layer, dtype) for layer in model.layers]  # with matrices as autocast casts them
    matrices = [module for layer in layers for module in layer.modules() if isinstance(module, Linear)]
    few = max(1, config.num_tokens // 8)
    limit = partial(stream, matrices, model, 2 * N, few)
    if args.device.startswith("cuda"):
        limit()
        limit = record(limit).replay
    versions = {
        "ours": partial(model.generate, cond, cond_mask, cfg_scale=args.cfg_scale, noise=noise, group_size=G),
        "plain": partial(plain_generate, model, *repeated, args.cfg_scale, noise),
        "limit": limit,
    }
    with zoo.autocast(args.device, args.dtype):
        timed = alternate(versions, args.repeat, args.device)
    timed["limit"] = [t * config.num_tokens / few for t in timed["limit"]]
    per_second = N * config.num_tokens / median(timed["ours"])
    weights = sum(m.weight.numel() * m.weight.element_size() for m in [*matrices, model.output])
    bandwidth = weights * config.num_tokens / median(timed["limit"]) / 1e9
    to_limit, to_plain = ratio(timed["ours"], timed["limit"]), ratio(timed["plain"], timed["ours"])
    print(f"decode {name}: {N} images of {config.num_tokens} tokens, cfg {args.cfg_scale:g}: "
          f"{median(timed['ours']):.3f} s, {per_second:.0f} tokens/s")  # fmt: skip
    print(f"  {to_limit[0]} times the limit ({weights / 1e6:.0f} MB per token at {bandwidth:.0f} GB/s)")
    print(f"  {to_plain[0]} times as fast as the plain version")
    # of the cache, keys and values of all layers are read, half of its length on average
    with zoo.autocast(args.device, args.dtype):
        size = cache_dtype(torch.device(args.device).type).itemsize
    read = weights + config.n_layer * 2 * N * config.dim * size * (2 * config.cond_len + config.num_tokens)
    reached, copied = read * config.num_tokens / median(timed["ours"]) / 1e9, copy_rate(args)
    print(f"  weights and cache are read at {reached:.0f} GB/s, memory is copied at {copied:.0f} GB/s")
    rates = dict(tokens_per_second=per_second, limit_gb_s=bandwidth, read_gb_s=reached, copy_gb_s=copied)
    return rates | dict(seconds=timed, to_limit=to_limit[1], to_plain=to_plain[1])


@torch.no_grad()
def copy_rate(args):
    """GB/s read and written by copying a tensor that no cache holds."""
    a = torch.ones(2**28 if args.device.startswith("cuda") else 2**26, device=args.device)
    copies = alternate({"copy": partial(torch.empty_like(a).copy_, a)}, 5, args.device)["copy"]
    return 2 * 4 * len(a) / median(copies) / 1e9


def learn(args, name):
    """Ours with and without --checkpoint-layers, and the version with all logits, by turns, each in its own process."""
    found = {"ours": [], "checkpointed": [], "all logits": []}
    for _ in range(args.repeat):
        for version, runs in found.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # peak memory is that of a process
                runs.append(pool.apply(learning_step, (args, name, version)))
    times = {version: [run[0] for run in runs] for version, runs in found.items()}
    peaks = {version: max(run[1] for run in runs) for version, runs in found.items()}
    print(f"learn {name}: {args.micro_batch} images, all logits kept: {median(times['all logits']):.2f} s, "
          f"{peaks['all logits']:.2f} GB at most")  # fmt: skip
    slower = {version: ratio(times[version], times["all logits"]) for version in ("ours", "checkpointed")}
    for version, (told, _) in slower.items():
        print(f"  {version}: {told} of that time, {peaks[version]:.2f} GB")
    return dict(seconds=times, peak_gb=peaks, slower={version: numbers for version, (_, numbers) in slower.items()})


def learning_step(args, name, version):
    """(seconds, peak GB above what was there before) of one micro-batch, scored and differentiated."""
    zoo.setup_device(args)
    torch.set_num_threads(args.threads)
    model, cond, cond_mask = random_model(args, name)
    for warm in (True, False):
        rows = torch.arange(1 if warm else args.micro_batch, device=args.device) % len(cond)
        before = zoo.peak_memory_gb(args.device)
        taken = seconds(partial(differentiate, args, model, cond[rows], cond_mask[rows], version), args.device)
    return taken, zoo.peak_memory_gb(args.device) - before


def differentiate(args, model, cond, cond_mask, version):
    tokens = torch.randint(model.config.vocab_size, (len(cond), model.config.num_tokens), device=args.device)
    model.checkpoint_layers = version == "checkpointed"
    score = all_logits if version == "all logits" else token_logprobs
    with zoo.autocast(args.device, args.dtype):
        logprobs, *_ = score(model, cond, tokens, cond_mask, args.cfg_scale)
    old = logprobs.detach()
    grpo_loss(logprobs, old, old, torch.ones(len(cond), device=args.device))[0].backward()


def all_logits(model, cond, tokens, cond_mask, cfg_scale):
    """grpo.token_logprobs as a first version would do it."""
    (cond, cond_mask), both = model.with_null(cond, cond_mask), tokens.repeat(2, 1)
    cond_logits, uncond_logits = model(cond, both, cond_mask).chunk(2)
    logp = policy_logprobs(uncond_logits + (cond_logits - uncond_logits) * cfg_scale)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, tokens[..., None])[..., 0], entropy.detach()


PARTS = {"decode": decode, "learn": learn}


def parse_args(argv=None):
    parser = zoo.script_parser(__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default: all)")
    add("--models", nargs="+", choices=zoo.MODELS, default=["llamagen-b-256"], help="rows of the model table "
        "(default llamagen-b-256)")  # fmt: skip
    add("--images", type=int, default=8, help="images sampled at once (default 8)")
    add("--group-size", type=int, default=8, help="of them share a condition (default 8)")
    add("--micro-batch", type=int, default=16, help="images per backward pass (default 16)")
    add("--cfg-scale", type=float, default=2.0, help="guidance; doubles the batch (default 2)")
    add("--repeat", type=int, default=3, help="timed rounds (default 3)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: the GPU if there is one")
    add("--dtype", choices=("float32", "bfloat16"), help="of matrix products (default bfloat16 on a GPU, else float32)")
    add("--compile", action="store_true", help="compile the steps of sampling")
    add("--json", type=Path, metavar="FILE", help="file that gets all numbers (default: none)")
    args = parser.parse_args(argv)
    zoo.setup_device(args)
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    zoo.check_range(args, images=1, group_size=1, micro_batch=1, repeat=1)
    if args.images % args.group_size:
        raise Mistake(f"--images {args.images} is not a multiple of --group-size {args.group_size}")
    if args.json and args.json.is_dir():
        raise Mistake(f"--json {args.json} is a folder: give a file")
    if args.json:
        zoo.make_folder(args.json.parent)
    if not args.cfg_scale > 1:
        raise Mistake("--cfg-scale must be above 1: the versions that are compared differ in guidance")
    args.threads = torch.get_num_threads()
    return args


def run(args):
    cuda = args.device.startswith("cuda")
    machine = torch.cuda.get_device_name(args.device) if cuda else f"{platform.machine()}, {args.threads} threads"
    print(f"{machine}, torch {torch.__version__}, {args.dtype}{', compiled' if args.compile else ''}")
    found = dict(machine=machine, torch=torch.__version__, flags={k: str(v) for k, v in vars(args).items()})
    for part in args.parts:
        found[part] = {name: PARTS[part](args, name) for name in args.models}
        if args.json:  # after each part, since the later ones may take long
            args.json.write_text(json.dumps(found, indent=1) + "\n")


def main(argv=None):
    zoo.run_script(parse_args, run, argv)


if __name__ == "__main__":
    main()
