"""
How fast decoding is, on random weights: speed does not depend on what a weight says.

    python bench.py                                    # GPT-B, 256 px, 8 images with guidance, float32
    python bench.py --size toy-c2i --images 64 --cfg-scale 1 --repeat 5

Decoding one token reads every weight once and, in each layer, the filled part of the key-value cache. On a CPU the
weights are most of it, so the time hardly grows with the number of images until the arithmetic takes as long as the
reading.
"""

import time

import torch

import zoo
from data import Mistake
from model import ModelConfig, Transformer


def parse_args(argv=None):
    parser = zoo.script_parser(__doc__)
    add = parser.add_argument
    add("--size", choices=zoo.SIZES, default="GPT-B", help="a row of the size table (default GPT-B)")
    add("--images", type=int, default=8, help="images generated at once (default 8)")
    add("--grid", type=int, help="tokens along a side: 16 is 256 px, 24 is 384 px (default 16; a toy has its own)")
    add("--cfg-scale", type=float, default=2.0, help="guidance; above 1 doubles the batch (default 2)")
    add("--repeat", type=int, default=2, help="timed runs; the first one also warms up (default 2)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: the GPU if there is one")
    args = parser.parse_args(argv)
    zoo.settle_device(args)
    zoo.check_range(args, images=1, grid=1, cfg_scale=1, repeat=1)
    toy = zoo.MODELS.get(args.size)
    if toy and args.grid:
        raise Mistake(f"{args.size} has a grid of its own; leave out --grid")
    if toy and toy.config.task != "c2i":
        raise Mistake("--size must be class-conditional: a caption's length would be one more thing to choose")
    args.config = toy.config if toy else ModelConfig("c2i", *zoo.SIZES[args.size], grid_size=args.grid or 16)
    return args


def run(args):
    torch.manual_seed(0)
    config = args.config
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
    zoo.run_script(parse_args, run, argv)


if __name__ == "__main__":
    main()
