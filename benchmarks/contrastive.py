"""Training steps of SimCLR, MoCo and SwAV, ResNet-18 at 32 px, against lightly's examples.

    python benchmarks/contrastive.py                               minutes on a CPU
    python benchmarks/contrastive.py --batch-size 32 --repeats 2   short

Both sides train the same network, torchvision's ResNet-18, with heads 512-512-128, 512 prototypes, and SwAV's two large
and six small crops. First as lightly's examples stand: with their stem, which is that for large images, and with the
views made in the step, each side by its own code. Then with the stem for small images, on views that are made already.
Last, memory and time of SimCLR's loss for large batches.
"""

import argparse
import copy
import itertools
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.transforms.v2.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import timing

import backbones
import common
import data
import moco
import sets
import simclr
import swav

try:
    from lightly import loss as losses
    from lightly import transforms
    from lightly.models import modules
    from lightly.models.utils import deactivate_requires_grad, update_momentum
except ImportError:
    modules = None

ARCH, SIZE, SMALL, DIM, QUEUE = "resnet18", 32, 16, 128, 4096


class Ours:
    """Model, optimizer and the body of a script's training loop."""

    def __init__(self, method, device, amp, small_stem):
        self.method, self.device, self.amp, self.count = method, device, amp, 0
        torch.manual_seed(0)
        f = backbones.build(ARCH, SIZE if small_stem else 224)
        if method == "SimCLR":
            model = simclr.SimCLR(f, 512, DIM, layers=2, temperature=0.5)
        elif method == "MoCo":
            model = moco.MoCo(f, QUEUE, DIM, temperature=0.1, mlp=True)
        else:
            model = swav.SwAV(f, 512, 512, DIM)
        self.model = model.to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.06, momentum=0.9)

    def step(self, xs):
        if self.method == "MoCo":
            self.model.update_key_network(0.99)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            loss = self.model(xs, (0, self.count)) if self.method == "MoCo" else self.model(xs)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.method == "MoCo":
            self.model.enqueue()
        self.count += 1


class Lightly(nn.Module):
    """Models and steps of lightly's examples/pytorch/{simclr,moco,swav}.py, as they stand or with the stem for small
    images."""

    def __init__(self, method, device, amp, small_stem):
        super().__init__()
        self.method, self.device, self.amp = method, device, amp
        torch.manual_seed(0)
        resnet = torchvision.models.resnet18()
        if small_stem:
            resnet.conv1, resnet.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        self.backbone = nn.Sequential(*list(resnet.children())[:-1])
        head = {"SimCLR": "SimCLRProjectionHead", "MoCo": "MoCoProjectionHead", "SwAV": "SwaVProjectionHead"}[method]
        self.projection_head = getattr(modules, head)(512, 512, DIM)
        if method == "SimCLR":
            self.criterion = losses.NTXentLoss()
        elif method == "MoCo":
            self.backbone_momentum = copy.deepcopy(self.backbone)
            self.projection_head_momentum = copy.deepcopy(self.projection_head)
            deactivate_requires_grad(self.backbone_momentum)
            deactivate_requires_grad(self.projection_head_momentum)
            self.criterion = losses.NTXentLoss(memory_bank_size=(QUEUE, DIM))
        else:
            self.prototypes, self.criterion = modules.SwaVPrototypes(DIM, n_prototypes=512), losses.SwaVLoss()
        self.to(device), self.criterion.to(device)
        self.optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.06, momentum=0.9)

    def embed(self, x):
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def loss(self, xs):
        if self.method == "SimCLR":
            return self.criterion(self.embed(xs[0]), self.embed(xs[1]))
        if self.method == "MoCo":
            update_momentum(self.backbone, self.backbone_momentum, m=0.99)
            update_momentum(self.projection_head, self.projection_head_momentum, m=0.99)
            query = self.embed(xs[0])
            key = self.projection_head_momentum(self.backbone_momentum(xs[1]).flatten(start_dim=1)).detach()
            return self.criterion(query, key)
        self.prototypes.normalize()
        scores = [self.prototypes(F.normalize(self.embed(x), dim=1, p=2)) for x in xs]
        return self.criterion(scores[:2], scores[2:])

    def step(self, xs):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            loss = self.loss(xs)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def our_views(method, images, batch_size, device):
    """Endless batches of views by data.Loader, of a recipe for CIFAR-10."""
    recipe = {"SimCLR": simclr, "MoCo": moco, "SwAV": swav}[method].RECIPES["cifar10"]["views"]
    if method == "SwAV":
        recipe = swav.multi_crop(recipe, 6, SMALL)
    views = [data.view(**{"size": SIZE, **v}) for v in recipe]
    loader = data.Loader(sets.Images("noise", images.to(device)), views, batch_size, 0, device=device)
    for epoch in itertools.count():
        yield from (xs for _, xs in loader.epoch(epoch))


def lightly_views(method, images, batch_size, device):
    """The same by lightly's transforms, without blur as ours, of Pillow images, as torchvision's CIFAR10 hands them
    out."""
    if method == "SimCLR":
        transform = transforms.SimCLRTransform(input_size=SIZE, gaussian_blur=0.0)
    elif method == "MoCo":
        transform = transforms.MoCoV2Transform(input_size=SIZE, gaussian_blur=0.0)
    else:
        transform = transforms.SwaVTransform(crop_sizes=(SIZE, SMALL), crop_counts=(2, 6), gaussian_blur=0.0)
    images = [to_pil_image(image) for image in images]
    while True:
        for start in range(0, len(images), batch_size):
            made = [transform(image) for image in images[start : start + batch_size]]
            yield [torch.stack(view).to(device) for view in zip(*made, strict=True)]


def compare(method, args, device, small_stem):
    g = data.generator("contrastive")
    sizes = [SIZE] * 2 + [SMALL] * 6 * (method == "SwAV")
    xs = [torch.randn(args.batch_size, 3, size, size, generator=g).to(device) for size in sizes]
    images = torch.randint(256, (4 * args.batch_size, 3, SIZE, SIZE), dtype=torch.uint8, generator=g)
    variants = {"ours bf16": (Ours, True), "ours fp32": (Ours, False)}
    if modules:
        variants |= {"lightly as shipped": (Lightly, False), "lightly bf16": (Lightly, True)}
    steps = {}
    for name, (cls, amp) in variants.items():
        run, views = cls(method, device, amp, small_stem), itertools.repeat(xs)
        if not small_stem:
            views = (our_views if cls is Ours else lightly_views)(method, images, args.batch_size, device)
        steps[name] = lambda run=run, views=views: run.step(next(views))
    times = timing.interleaved(steps, device, args.repeats)
    rows = []
    for name, seconds in times.items():
        each = statistics.median(seconds)
        row = [name, f"{args.batch_size / each:.1f}", f"{each:.4f}"]
        row += [timing.ratio(times, name, reference) for reference in ("lightly as shipped", "lightly bf16")]
        rows.append([*row, timing.spread(seconds)])
    what = (
        "stem for small images, views made already" if small_stem else "stem for large images, views made in the step"
    )
    title = f"{method} step, {ARCH}, batch {args.batch_size}, views of {' '.join(map(str, sizes))} px; {what}"
    timing.table(title, ["", "images/s", "s/step", "vs lightly as shipped", "vs lightly bf16", "spread"], rows)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=3, help="rounds; every variant runs once in each")
    p.add_argument("--batch-size", type=int, default=128, help="images of a step")
    p.add_argument("--threads", type=int, default=2, help="on the CPU")
    args = p.parse_args()
    _, _, device = common.setup()
    torch.set_num_threads(args.threads)
    timing.where(device)
    for small_stem in (False, True):
        for method in ("SimCLR", "MoCo", "SwAV"):
            compare(method, args, device, small_stem)


if __name__ == "__main__":
    main()
