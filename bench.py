"""
How fast decoding is, on random weights: speed does not depend on what a weight says.

    python bench.py                                    # GPT-B, 256 px, 8 images with guidance, float32
    python bench.py --size toy-c2i --images 64 --cfg-scale 1 --repeat 5

Decoding one token reads every weight once and, in each layer, the filled part of the key-value cache; on a CPU the
weights are most of it, so the time hardly grows with the number of images until the arithmetic catches up.
"""

import argparse
import time

import torch

from model import MODELS, SIZES, ModelConfig, Transformer, check_device
from sample import run_script


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--size", choices=SIZES, default="GPT-B", help="a row of the size table (default GPT-B)")
    add("--images", type=int, default=8, help="images generated at once (default 8)")
    add("--grid", type=int, help="tokens along a side: 16 is 256 px, 24 is 384 px (default 16; a toy has its own)")
    add("--cfg-scale", type=float, default=2.0, help="above 1 doubles the batch (default 2)")
    add("--repeat", type=int, default=2, help="timed runs; the first one also warms up (default 2)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: the GPU if there is one")
    args = parser.parse_args(argv)
    if min(args.images, args.repeat, 1 if args.grid is None else args.grid) < 1 or not args.cfg_scale >= 1:
        parser.error("--images, --grid, --repeat and --cfg-scale must be at least 1")
    if args.size in MODELS and args.grid:
        parser.error(f"{args.size} has a grid of its own; leave out --grid")
    if args.size in MODELS and MODELS[args.size].config.task != "c2i":
        parser.error("only class-conditional sizes: a caption's length would be one more thing to choose")
    return args


def run(args):
    check_device(args.device)
    torch.manual_seed(0)
    toy = args.size in MODELS
    config = MODELS[args.size].config if toy else ModelConfig("c2i", *SIZES[args.size], grid_size=args.grid or 16)
    model = Transformer(config).eval().to(args.device)
    labels = torch.arange(args.images, device=args.device) % config.num_classes
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{args.size}: {millions:.0f}M parameters, {args.images} images of {config.num_tokens} tokens, "
          f"cfg {args.cfg_scale:g}, float32, {args.device}, {torch.get_num_threads()} threads")  # fmt: skip
    for k in range(args.repeat):
        start = time.perf_counter()
        model.generate(labels, cfg_scale=args.cfg_scale)
        if args.device.startswith("cuda"):
            torch.cuda.synchronize(args.device)
        seconds = time.perf_counter() - start
        print(f"run {k + 1}: {seconds:.2f} s, {args.images * config.num_tokens / seconds:.0f} tokens/s")


def main(argv=None):
    run_script("bench.py", run, parse_args(argv), "lower --images")


if __name__ == "__main__":
    main()
