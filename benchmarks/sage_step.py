"""What SaGe costs over BYOL: time and peak memory of a training step, with the parts of L_G switched on one by one.

    python benchmarks/sage_step.py                          the shapes and cifar10 recipes, minutes on a CPU
    python benchmarks/sage_step.py --recipe imagenet        on a GPU

Views are ready; a step is forward, backward, the optimizers and the target's average. The evaluator is a network of the
encoder's architecture. Memory is the peak of a process that makes three steps, less what it held before the model.
"""

import argparse
import functools
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import timing

import backbones
import byol
import common
import data
import optim
import sage

NOTHING = {"d": 1.0, "pixel": 0.0, "maps": 0.0, "semantic": 0.0}
WEIGHTS = {
    "BYOL": None,
    "SaGe without L_G": NOTHING,
    "SaGe, pixels only": NOTHING | {"pixel": 0.1},
    "SaGe": NOTHING | {"pixel": 0.1, "maps": 0.1, "semantic": 0.1},
    "SaGe, --checkpoint-activations": NOTHING | {"pixel": 0.1, "maps": 0.1, "semantic": 0.1, "recompute": True},
}


class Step:
    """The model, the optimizers and the body of the training loop of byol.py or sage.py."""

    def __init__(self, recipe, weights, batch_size, device, amp):
        r, self.amp, self.device = sage.RECIPES[recipe], amp, device
        torch.manual_seed(0)
        backbone, painter, evaluator = backbones.build(r["arch"], r["size"]), (), None
        if weights and weights["pixel"]:
            painter = sage.build_decoder(backbone, r["size"], r["bottleneck"], r["width"], pool=False)
        if weights and weights["maps"]:
            preprocess = {"mean": data.MEAN, "std": data.STD}
            recompute, h = "recompute" in weights, backbones.build(r["arch"], r["size"])
            evaluator = sage.Evaluator(h, preprocess, r["levels"], recompute=recompute)
        if weights:
            model = sage.SaGe(backbone, r["hidden"], r["dim"], weights, *painter, evaluator=evaluator)
        else:
            model = byol.BYOL(backbone, r["hidden"], r["dim"])
        self.model = model.to(device, memory_format=torch.channels_last)
        encoder = torch.nn.ModuleList([model.f, model.g, model.q])
        groups = optim.param_groups(encoder, r["weight_decay"], lr_factor=1.0)
        self.optimizers = [optim.OPTIMIZERS[r["optimizer"]](groups, lr=1e-3)]
        if painter:
            weights_ = [*model.bottleneck.parameters(), *model.decoder.parameters()]
            self.optimizers.append(torch.optim.Adam(weights_, lr=1e-3))
        g = data.generator("sage")
        xs = [torch.rand(batch_size, 3, r["size"], r["size"], generator=g) * 2 - 1 for _ in range(2)]
        self.xs = [x.to(device) for x in xs]

    def __call__(self):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            loss = self.model(self.xs)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.model.update_target(0.99)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--recipe", nargs="+", choices=sage.RECIPES, default=["shapes", "cifar10"])
    p.add_argument("--repeats", type=int, default=5, help="rounds; every variant runs once in each")
    p.add_argument("--batch-size", type=int, default=64, help="pairs of a step")
    p.add_argument("--threads", type=int, default=2, help="on the CPU")
    p.add_argument("--peak", choices=WEIGHTS, help=argparse.SUPPRESS)
    args = p.parse_args()
    _, _, device = common.setup()
    torch.set_num_threads(args.threads)
    amp = common.bf16_is_fast(device)
    if args.peak:
        timing.print_peak(lambda: Step(args.recipe[0], WEIGHTS[args.peak], args.batch_size, device, amp))
        return
    timing.where(device)
    for recipe in args.recipe:
        variants = {name: Step(recipe, weights, args.batch_size, device, amp) for name, weights in WEIGHTS.items()}
        times = timing.interleaved(variants, device, args.repeats, seconds=0.5)
        del variants
        memory = {}
        for name, weights in WEIGHTS.items():
            build = functools.partial(Step, recipe, weights, args.batch_size, device, amp)
            words = [__file__, "--peak", name, "--recipe", recipe, "--batch-size", args.batch_size]
            memory[name] = timing.peak_memory(build, device, words)
        rows = [
            [
                name,
                f"{1000 * statistics.median(seconds):.1f}",
                f"{1 / float(timing.ratio(times, name, 'BYOL')[:-1]):.2f}x",
                f"{memory[name]:.0f}",
                f"{memory[name] / memory['BYOL']:.2f}x",
                timing.spread(seconds),
            ]
            for name, seconds in times.items()
        ]
        r = sage.RECIPES[recipe]
        title = f"{recipe}: {r['arch']} at {r['size']} px, batch {args.batch_size}, {'bf16' if amp else 'fp32'}"
        timing.table(title, ["", "ms/step", "of BYOL's", "peak MB", "of BYOL's", "spread"], rows)


if __name__ == "__main__":
    main()
