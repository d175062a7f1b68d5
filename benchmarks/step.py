"""A BYOL training step: ResNet-18 at 32 px, two views that are augmented already, against lightly's example.

    python benchmarks/step.py                              five variants, minutes on a CPU
    python benchmarks/step.py --batch-size 32 --repeats 2  short

Then the parts of our own step, with the augmentation and the loader that precede it in a run. Both sides train the
same network: torchvision's ResNet-18 with the stem for small images, heads 512-1024-256 and 256-1024-256.
"""

import argparse
import copy
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import timing

import backbones
import byol
import common
import data
import optim
import sets

try:
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.utils.scheduler import cosine_schedule
except ImportError:
    NegativeCosineSimilarity = None

RECIPE = byol.RECIPES["cifar10"]
ARCH, SIZE, DIM = RECIPE["arch"], RECIPE["size"], RECIPE["dim"]  # resnet18, 32 px, 256
HIDDEN, TOTAL = 1024, 10_000  # lightly's width of the heads; steps that the schedules stretch over


class Ours:
    """Model, optimizer and the body of byol.py's training loop."""

    def __init__(self, device, amp, compiled=False, recipe=RECIPE, hidden=HIDDEN):
        self.device, self.amp, self.recipe, self.count = device, amp, recipe, 0
        torch.manual_seed(0)
        backbone = backbones.build(recipe["arch"], recipe["size"])
        self.model = byol.BYOL(backbone, hidden, recipe["dim"]).to(device, memory_format=torch.channels_last)
        groups = optim.param_groups(nn.ModuleList([self.model.f, self.model.g]), recipe["weight_decay"], lr_factor=1.0)
        groups += optim.param_groups(self.model.q, recipe["weight_decay"], lr_factor=recipe["predictor_lr"])
        self.optimizer = optim.OPTIMIZERS[recipe["optimizer"]](groups, lr=recipe["lr"])
        if compiled:
            self.model.f.compile(), self.model.target["f"].compile()

    def step(self, xs, mark=lambda name: None):
        lr = optim.cosine(self.count, TOTAL, self.recipe["lr"], 0.0, 10)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            loss = self.model(xs)
        mark("loss")
        loss.backward()
        mark("backward")
        self.optimizer.step()
        self.optimizer.zero_grad()
        mark("optimizer")
        self.model.update_target(optim.cosine(self.count, TOTAL, self.recipe["tau"], 1.0))
        mark("target's average")
        self.count += 1


class Lightly(nn.Module):
    """The model and the step of lightly's examples/pytorch/byol.py, with the stem for small images."""

    def __init__(self, device, amp):
        super().__init__()
        self.device, self.amp, self.count = device, amp, 0
        torch.manual_seed(0)
        resnet = torchvision.models.resnet18()
        resnet.conv1, resnet.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        self.backbone = nn.Sequential(*list(resnet.children())[:-1])
        self.projection_head = BYOLProjectionHead(512, HIDDEN, DIM)
        self.prediction_head = BYOLPredictionHead(DIM, HIDDEN, DIM)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.to(device)
        self.criterion = NegativeCosineSimilarity()
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.06)

    def online(self, x):
        return self.prediction_head(self.projection_head(self.backbone(x).flatten(start_dim=1)))

    def momentum(self, x):
        return self.projection_head_momentum(self.backbone_momentum(x).flatten(start_dim=1)).detach()

    def step(self, xs):
        momentum = cosine_schedule(self.count, TOTAL, 0.996, 1)
        update_momentum(self.backbone, self.backbone_momentum, m=momentum)
        update_momentum(self.projection_head, self.projection_head_momentum, m=momentum)
        x0, x1 = xs
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            p0, z0, p1, z1 = self.online(x0), self.momentum(x0), self.online(x1), self.momentum(x1)
            loss = 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))
        loss.detach()  # the example adds it to a sum
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.count += 1


def compare(args, device, amp):
    g = data.generator("step")
    xs = [torch.randn(args.batch_size, 3, SIZE, SIZE, generator=g).to(device) for _ in range(2)]
    runs = {"ours bf16": Ours(device, True), "ours fp32": Ours(device, False)}
    if args.compile:
        runs["ours bf16 --compile"] = Ours(device, True, compiled=True)
    if NegativeCosineSimilarity:
        runs |= {"lightly as shipped": Lightly(device, False), "lightly bf16": Lightly(device, True)}
    variants = {name: lambda run=run: run.step(xs) for name, run in runs.items()}
    times = timing.interleaved(variants, device, args.repeats, args.seconds)
    rows = []
    for name, seconds in times.items():
        each = statistics.median(seconds)
        row = [name, f"{args.batch_size / each:.1f}", f"{each:.4f}"]
        row += [timing.ratio(times, name, reference) for reference in ("lightly as shipped", "lightly bf16")]
        rows.append([*row, timing.spread(seconds)])
    default = "bf16" if amp else "fp32"
    title = f"BYOL step, {ARCH} at {SIZE} px, batch {args.batch_size}; byol.py's default on this device: {default}"
    timing.table(title, ["", "pairs/s", "s/step", "vs lightly as shipped", "vs lightly bf16", "spread"], rows)


def parts(args, device, amp):
    """Where the time of a step goes: the loop of byol.py over data.Loader, on a set in memory."""
    views = [data.view(SIZE, **view) for view in RECIPE["views"]]
    g, steps = data.generator("parts"), args.repeats + 1
    images = torch.randint(256, (args.batch_size * steps, 3, SIZE, SIZE), dtype=torch.uint8, generator=g).to(device)
    loader = data.Loader(sets.Images("noise", images), views, args.batch_size, 0, device=device)
    run, all_steps = Ours(device, amp), []

    def mark(name):  # the time since the last mark was spent on `name`
        nonlocal last
        last, before = timing.clock(device), last
        now[name] += last - before

    # The target's half of BYOL.forward lies between these two; each of them is called for either view.
    hooks = [
        run.model.target["f"].register_forward_pre_hook(lambda *_: mark("forward, online")),
        run.model.target["g"].register_forward_hook(lambda *_: mark("forward, target")),
    ]
    batches = loader.epoch(0)
    for _ in range(steps):
        now, last = defaultdict(float), timing.clock(device)
        index = torch.arange(args.batch_size, device=device)
        crops = [data.random_crops(images[index], view, g) for view in views]
        mark("  random crops, alone")
        for crop, view in zip(crops, views, strict=True):
            data.augment(crop, view, g)
        mark("  color, alone")
        _, xs = next(batches)
        mark("views, from the loader")
        run.step(xs, mark)
        all_steps.append(now)
    for hook in hooks:
        hook.remove()

    medians = {name: statistics.median(step[name] for step in all_steps[1:]) for name in all_steps[0]}
    total = sum(seconds for name, seconds in medians.items() if not name.startswith(" "))
    order = ["views, from the loader", "  random crops, alone", "  color, alone", "forward, online", "forward, target"]
    order += ["loss", "backward", "optimizer", "target's average"]
    rows = [[name, f"{1000 * medians[name]:.2f}", f"{100 * medians[name] / total:.1f} %"] for name in order]
    title = f"parts of our step, {'bf16' if amp else 'fp32'}, batch {args.batch_size}, the device waited for after each"
    timing.table(title, ["", "ms", "share"], rows)

    # The same loop as a run does it, without waiting for the device between the parts.
    waited, start, batches = 0.0, timing.clock(device), loader.epoch(1)
    for _ in range(steps):
        asked = time.perf_counter()
        _, xs = next(batches)
        waited += time.perf_counter() - asked
        run.step(xs)
    seconds = timing.clock(device) - start
    rate = steps * args.batch_size / seconds
    print(f"the same loop undisturbed: {rate:.1f} pairs/s, data wait {100 * waited / seconds:.1f} %")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=5, help="rounds; every variant runs once in each")
    p.add_argument("--seconds", type=float, default=1.0, help="a step is repeated until this time is filled")
    p.add_argument("--batch-size", type=int, default=256, help="pairs of a step")
    p.add_argument("--threads", type=int, default=2, help="on the CPU")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="time --compile as well")
    args = p.parse_args()
    _, _, device = common.setup()
    torch.set_num_threads(args.threads)
    timing.where(device)
    if not NegativeCosineSimilarity:
        print("lightly is not installed: left out")
    amp = common.bf16_is_fast(device)
    compare(args, device, amp)
    parts(args, device, amp)


if __name__ == "__main__":
    main()
