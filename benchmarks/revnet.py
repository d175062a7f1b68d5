"""What the RevNet's memory-saving backward pass saves and costs: memory and time of a forward and backward pass, beside
the plain graph of the same network and ResNet v2 of the same widening factor.

    python benchmarks/revnet.py                                             small, a minute on a CPU
    python benchmarks/revnet.py --size 224 --batch-size 64 --depth 50       on a GPU

"kept" is what autograd holds between the two passes, each storage once, parameters aside: it grows with the batch.
"peak" is all that a process needs at most for three passes of each kind, less what it held before the network.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import timing

import backbones
import common

VARIANTS = {  # name in the table: family, whether to recompute
    "ResNet{} v2": ("resnet{}v2", False),
    "RevNet{}, plain graph": ("revnet{}", False),
    "RevNet{}, recomputation": ("revnet{}", True),
}


class Step:
    """The network, a batch, and a forward and backward pass."""

    def __init__(self, variant, depth, args, device, amp):
        family, recompute = VARIANTS[variant]
        torch.manual_seed(0)
        self.net = backbones.build(f"{family.format(depth)}_k{args.k:g}", args.size)
        self.net.recompute = recompute  # ResNet v2 does not look at it
        self.net.to(device, memory_format=torch.channels_last)
        x = torch.randn(args.batch_size, 3, args.size, args.size, device=device)
        self.x, self.device, self.amp = x.contiguous(memory_format=torch.channels_last), device, amp

    def forward(self):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return self.net(self.x).square().mean()

    def __call__(self):
        self.forward().backward()
        self.net.zero_grad()

    def kept(self):
        """MB that autograd holds after the forward pass."""
        own, found = {p.untyped_storage().data_ptr() for p in self.net.parameters()}, {}

        def remember(t):  # holds t, so that no other storage gets its address
            found.setdefault(t.untyped_storage().data_ptr(), t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
            self.forward()
        return sum(t.untyped_storage().nbytes() for p, t in found.items() if p not in own) / 2**20


def peak(variant, depth, args, device, amp):
    words = [f"--{k.replace('_', '-')}={getattr(args, k)}" for k in ("k", "size", "batch_size", "threads")]
    words = [__file__, *words, "--depth", depth, "--peak", variant]
    return timing.peak_memory(lambda: Step(variant, depth, args, device, amp), device, words)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--depth", nargs="+", choices=backbones.DEPTHS, default=["14", "50"])
    p.add_argument("--k", type=float, default=4, help="widening factor; 4 is the usual width")
    p.add_argument("--size", type=int, default=64, help="px; the total stride follows from it")
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--repeats", type=int, default=5, help="rounds; every variant runs once in each")
    p.add_argument("--threads", type=int, default=2, help="on the CPU")
    p.add_argument("--peak", choices=VARIANTS, help=argparse.SUPPRESS)
    args = p.parse_args()
    _, _, device = common.setup()
    torch.set_num_threads(args.threads)
    amp = common.bf16_is_fast(device)
    if args.peak:
        timing.print_peak(lambda: Step(args.peak, args.depth[0], args, device, amp))
        return
    timing.where(device)
    for depth in args.depth:
        steps = {variant: Step(variant, depth, args, device, amp) for variant in VARIANTS}
        times = timing.interleaved(steps, device, args.repeats)
        kept = {variant: step.kept() for variant, step in steps.items()}
        parameters = {v: sum(p.numel() for p in step.net.parameters()) / 1e6 for v, step in steps.items()}
        del steps
        plain = list(VARIANTS)[1]
        rows = [
            [
                variant.format(depth),
                f"{parameters[variant]:.1f}",
                f"{kept[variant]:.1f}",
                f"{peak(variant, depth, args, device, amp):.0f}",
                f"{1000 * statistics.median(seconds):.0f}",
                f"{1 / float(timing.ratio(times, variant, plain)[:-1]):.2f}x",
                timing.spread(seconds),
            ]
            for variant, seconds in times.items()
        ]
        title = f"k {args.k:g} at {args.size} px, batch {args.batch_size}, {'bf16' if amp else 'fp32'}"
        timing.table(title, ["", "M parameters", "kept MB", "peak MB", "ms", "of the plain graph's", "spread"], rows)


if __name__ == "__main__":
    main()
