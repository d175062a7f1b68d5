"""MoCo: Momentum Contrast (He et al., 2019, https://arxiv.org/abs/1911.05722), and MoCo v2 (Chen et al., 2020,
https://arxiv.org/abs/2003.04297).

One view of an image is the query, the other the key. The loss is the cross-entropy of picking the query's own key among
K + 1 keys. The K negatives are keys of earlier batches in a queue, so their number does not depend on the batch size.
The key network is a slow moving average of the query network, so that keys from different steps remain consistent.

    view 1 -> f -> g -> q ----.                                          f', g'  <-  m f', g' + (1 - m) f, g
                              |-- cross-entropy of q.k among q.k and q.queue, over tau; no gradient into k and queue
    view 2 -> f' -> g' -> k --'   (q, k: L2-normalized)
                     |_ after the step into the queue, in place of the oldest keys

    differences          paper                     official code                here (more in docs/moco.md)
    shuffled BatchNorm   keys, over the GPUs       the same                     the same; --bn-splits, as in the demo
    symmetric loss       no                        no; demo: optional           no; --symmetric
    learning rate        v1 steps, v2 cosine       by the epoch (demo's cosine  by the epoch, counted from 0
                                                   counts from 1)
    gray, jitter in v1   -                         gray first                   jitter, then gray
    blur                 v2: sigma U(.1, 2)        Pillow's box filters         a true Gaussian
    linear probe         lr 30, 100 epochs, crops  the same                     un-augmented frozen features
    small images         -                         demo: CIFAR-10 at 32 px      recipes below; 3x3 stem under 64 px
    precision            -                         fp32                         bf16 autocast; L2, loss, queue in fp32

    demo: the authors' notebook for CIFAR-10 on one GPU, which the recipe `cifar10` follows

Measured with this file (k-NN: 20 neighbors; protocols and curves in results/README.md):

    command                      network, epochs    seeds  k-NN              linear            device, commit
    python moco.py               resnet10_16, 24    0      68.8              70.8              2 cores, 2.7 min, 3980407
                                 random init        0      14.7              not run
    python moco.py --data cifar10 (images recompressed as JPEG), epoch 1 of 200; 200-NN of the output of g (demo: 31.98)
                                 resnet18, 1        0      31.7              not run           1 core, 44cd552

    python moco.py                                                           shapes, minutes on a laptop
    python moco.py --data cifar10                                            the authors' demo
    torchrun --standalone --nproc_per_node=8 moco.py --data imagenet --root DIR --version 1
"""

import argparse
import copy
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

import backbones
import common
import data
import optim
import parallel
import sets
import training

METHOD = "moco"

# ============ recipes: one per data regime; every entry but `views` is the default of a flag ============

RECIPES = {
    # Minutes on a CPU, so unlike the paper: AdamW, a small network, a lower momentum, a warm-up.
    "shapes": dict(
        arch="resnet10_16", size=32, epochs=24, batch_size=64, optimizer="adamw", lr=4e-3, weight_decay=1e-4,
        schedule="cosine", warmup_epochs=1.0, v=2, mlp=True, queue=2048, momentum=0.99, temperature=0.1, dim=128,
        bn_splits=1, eval_every=2,
        views=[dict(scale=(0.5, 1.0), interpolation="bilinear", jitter=(0.4, 0.4, 0.4, 0.5), jitter_p=1.0,
                    gray=0.5)] * 2,
    ),
    # The authors' demo (colab/moco_cifar10_demo.ipynb): lr 0.06 for 512 images, BatchNorm as on 8 GPUs, no blur.
    "cifar10": dict(
        arch="resnet18", size=32, epochs=200, batch_size=512, optimizer="sgd", lr=0.03, weight_decay=5e-4,
        schedule="cosine", warmup_epochs=0, v=1, mlp=False, queue=4096, momentum=0.99, temperature=0.1, dim=128,
        bn_splits=8, eval_every=10,
        views=[dict(interpolation="bilinear", jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray=0.2,
                    mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))] * 2,
    ),
    "imagenet": dict(
        arch="resnet50", size=224, epochs=200, batch_size=256,  # v1, sec. 4, training
        optimizer="sgd", lr=0.03, weight_decay=1e-4, schedule="cosine", warmup_epochs=0,  # the same; cosine: v2, sec. 3
        v=2, mlp=True, temperature=0.2,  # v2, table 1 and 2 (code, README.md)
        queue=65536, momentum=0.999, dim=128,  # v1, sec. 3.3 and 4.1
        bn_splits=1, eval_every=10,
        views=[dict(scale=(0.2, 1.0), interpolation="bilinear", jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray=0.2,
                    blur=0.5)] * 2,  # v2, sec. 3; code, main_moco.py
    ),
}  # fmt: skip
OTHER_VERSION = {  # what --v changes in a recipe of the other version
    "shapes": {1: dict(mlp=False)},
    "folder": {1: dict(mlp=False)},
    "cifar10": {2: dict(mlp=True)},
    "imagenet": {1: dict(  # v1, sec. 3.3 and 4.1; views: code, main_moco.py
        mlp=False, temperature=0.07, schedule="steps",
        views=[dict(scale=(0.2, 1.0), interpolation="bilinear", jitter=(0.4,) * 4, jitter_p=1.0, gray=0.2)] * 2,
    )},
}  # fmt: skip
# A folder of photographs, for a laptop or one GPU: hyper-parameters of `shapes`, the paper's views.
RECIPES["folder"] = RECIPES["shapes"] | training.FOLDER | dict(views=RECIPES["imagenet"]["views"])


def recipe_of(name, v=None):
    """The recipe as in version `v` of the paper."""
    return RECIPES[name] | OTHER_VERSION.get(name, {}).get(v, {}) | ({"v": v} if v in (1, 2) else {})


def views_of(args):
    return [data.view(args.size, **v) for v in recipe_of(args.recipe, args.v)["views"]]


def parse_args(argv=None):
    p, known = training.flags(METHOD, __doc__, RECIPES, argv, (("--v", "--version"), {"type": int}))
    p.add_argument("--schedule", choices=("steps", "cosine"), help="steps: x 0.1 after 60 %% and 80 %% of the epochs")
    # MoCo
    p.add_argument("--v", "--version", type=int, choices=(1, 2), help="of the paper; sets the other defaults")
    p.add_argument("--mlp", action=argparse.BooleanOptionalAction, help="two layers in g, as in v2, instead of one")
    p.add_argument("--queue", type=int, help="K, negatives: keys of earlier batches")
    p.add_argument("--momentum", type=float, help="m of the key network's EMA; too low: inconsistent keys")
    p.add_argument("--temperature", type=float, help="tau of the softmax over cosines; lower is sharper")
    p.add_argument("--dim", type=int, help="D, width of the vectors that the loss compares")
    p.add_argument("--bn-splits", type=int, help="BatchNorm over so many parts of a batch, as on so many GPUs")
    p.add_argument("--symmetric", action="store_true", help="both views are queries; the two losses are summed")
    args = training.parse(p, METHOD, recipe_of(known.recipe, known.v), argv)
    common.at_least(1, args, "dim", "queue", "bn_splits")
    common.at_least(0, args, "momentum", most=1)
    if not 0 < args.temperature < math.inf:
        common.fail(f"--temperature {args.temperature:g}: it must be above 0 and finite")
    return args


# ============ the method ============


class SplitBatchNorm(nn.BatchNorm2d):
    """BatchNorm with separate statistics for each of `splits` parts of a batch [B, C, H, W], as on so many GPUs (the
    authors' demo). The running averages are the means over the parts."""

    def __init__(self, channels, splits):
        super().__init__(channels)
        self.splits = splits

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        averages = [torch.stack([t] * self.splits) for t in (self.running_mean, self.running_var)]  # [splits, C]
        norm = functools.partial(F.batch_norm, training=True, momentum=self.momentum, eps=self.eps)
        # F.batch_norm updates the averages of its part. A batch that does not divide gives fewer parts.
        parts = zip(x.chunk(self.splits), *averages, strict=False)
        y = torch.cat([norm(part, mean, var, self.weight, self.bias) for part, mean, var in parts])
        if self.track_running_stats:  # False while a RevNet recomputes a stage in backward
            self.running_mean.copy_(averages[0].mean(0))
            self.running_var.copy_(averages[1].mean(0))
            self.num_batches_tracked += 1
        return y


def split_batchnorm(net, splits):
    """Replaces every BatchNorm2d of `net` by a SplitBatchNorm of the same name; returns `net`."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, SplitBatchNorm(child.num_features, splits))
    return net


def info_nce(q, k, queue, temperature):
    """InfoNCE (eq. 1): cross-entropy of q.k among q.k and q.queue, over tau; mean over the batch. q, k: [B, D], queue:
    [K, D], all unit vectors. Returns (loss, [B, K + 1] logits)."""
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / temperature  # the own key is class 0
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device)), logits


class MoCo(nn.Module):
    """Query network f, g, key network f', g' and queue; `forward((v1, v2), draw)` is the loss of sec. 3.1. `draw`,
    another tuple of numbers in every pass, seeds the shuffling of the keys (sec. 3.3). Collective."""

    def __init__(self, backbone, queue=65536, dim=128, temperature=0.2, mlp=True, bn_splits=1, symmetric=False):
        super().__init__()
        self.temperature, self.symmetric, self.seen, self.figures = temperature, symmetric, [], {}
        self.f = split_batchnorm(backbone, bn_splits) if bn_splits > 1 else backbone
        self.g = nn.Linear(backbone.dim, dim)
        if mlp:
            self.g = nn.Sequential(nn.Linear(backbone.dim, backbone.dim), nn.ReLU(inplace=True), self.g)  # v2, sec. 3
        self.key = nn.ModuleDict({"f": copy.deepcopy(self.f), "g": copy.deepcopy(self.g)}).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue, dim), dim=1))  # [K, D], fp32
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))  # to the oldest row

    def forward(self, views, draw=(0,)):
        v1, v2 = views
        loss = self.contrast(v1, v2, (*draw, 0))
        return loss + self.contrast(v2, v1, (*draw, 1)) if self.symmetric else loss

    def contrast(self, query, other, draw):
        """The loss of one direction: queries from the images `query` [b, 3, H, W], keys from `other`."""
        q = self.g(self.f(query))  # [b, D]
        keys = self.keys(other, draw)  # [world x b, D]
        with torch.autocast(q.device.type, enabled=False):
            q, rank = F.normalize(q.float(), dim=1), common.rank()
            k = keys[rank * len(q) : (rank + 1) * len(q)]
            loss, logits = info_nce(q, k, self.queue, self.temperature)
        self.seen.append(keys)
        with torch.no_grad():
            self.figures = {  # of the last direction
                "feature_std": q.std(0).mean() * q.shape[1] ** 0.5,  # 1: spread, 0: collapsed
                "own_cosine": (q * k).sum(1).mean(),
                "right": 100 * (logits[:, :1] > logits[:, 1:]).all(1).float().mean(),  # top-1 accuracy, %
            }
        return loss

    @torch.no_grad()
    def keys(self, x, draw):
        """Keys of the images x [b, 3, H, W] of all ranks, ordered by rank. Shuffled BatchNorm (sec. 3.3): each rank
        encodes a random part of all images, because batch statistics shared by a query and its key identify the key."""
        x_all, b = common.gather(x), len(x)
        order = torch.randperm(len(x_all), generator=data.generator("shuffle", *draw))  # the same on every rank
        rank = common.rank()
        part, back = order[rank * b : (rank + 1) * b], order.argsort()
        # The key network is in train mode, as in the code: BatchNorm uses batch statistics.
        k = self.key["g"](self.key["f"](x_all[part.to(x.device, non_blocking=True)]))
        return common.gather(F.normalize(k.float(), dim=1))[back.to(x.device, non_blocking=True)]

    @torch.no_grad()
    def update_key_network(self, m):
        """theta_k <- m theta_k + (1 - m) theta_q (eq. 2), parameters only."""
        theta_q = [*self.f.parameters(), *self.g.parameters()]
        torch._foreach_lerp_(list(self.key.parameters()), theta_q, 1 - m)

    @torch.no_grad()
    def enqueue(self):
        """Replaces the oldest keys in the queue by those of all ranks since the last call."""
        keys = torch.cat(self.seen)
        self.seen.clear()
        rows = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[rows] = keys
        self.pointer.add_(len(keys)).remainder_(len(self.queue))


def rate(step, steps, epochs, lr, warmup, schedule):
    """Constant within an epoch, as in the code: half a cosine, or x 0.1 after 60 and 80 % of the run."""
    epoch = step // steps
    if schedule == "cosine":
        now = optim.cosine(epoch, epochs, lr, 0.0)
    else:
        now = lr * 0.1 ** ((epoch >= 0.6 * epochs) + (epoch >= 0.8 * epochs))
    return now * step / warmup if step < warmup else now


# ============ the run ============


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = common.setup(args.device)
    args.amp = common.bf16_is_fast(device) if args.amp is None else args.amp

    # ============ data ============
    views = views_of(args)
    train, labelled, test = sets.splits(args, device)
    per_pass = training.images_per_pass(args, world, len(train))
    if per_pass < 2 * args.bn_splits or per_pass % args.bn_splits:
        common.fail(f"--bn-splits {args.bn_splits}: the {per_pass} images of a pass need equal parts of two or more")
    new_keys = args.batch_size * (2 if args.symmetric else 1)
    training.lower(args, "queue", len(train) // new_keys * new_keys, len(train))
    if args.queue % new_keys:
        common.fail(f"--queue {args.queue} is not a multiple of the {new_keys} keys of an update")
    loader = data.Loader(train, views, per_pass, args.seed, rank, world, args.workers, device)
    preprocess = {"mean": views[0]["mean"], "std": views[0]["std"], "size": args.size, "interpolation": "bilinear"}

    # ============ model ============
    torch.manual_seed(args.seed)  # the same initial weights on every rank
    f = backbones.build(args.arch, args.size)
    model = MoCo(f, args.queue, args.dim, args.temperature, args.mlp, args.bn_splits, args.symmetric)
    model = model.to(device, memory_format=torch.channels_last)
    ddp = model
    if world > 1:
        # No SyncBatchNorm: with global statistics, shuffling would have no effect.
        ddp = parallel.wrap(model, device)
    if args.bn_splits > 1 and not any(isinstance(m, SplitBatchNorm) for m in model.modules()):
        common.fail(f"--bn-splits {args.bn_splits}: {args.arch} has no BatchNorm2d to split")
    if args.compile:
        model.f.compile(), model.key["f"].compile()  # in place: keeps the names in state_dict()

    # ============ optimizer ============
    lr = args.lr * args.batch_size / 256
    params = [p for p in model.parameters() if p.requires_grad]  # all are decayed, as in the official code
    groups = [{"params": params, "weight_decay": args.weight_decay, "adapt": True}]
    optimizer = optim.OPTIMIZERS[args.optimizer](groups, lr=lr)

    # ============ run: print the recipe, go on from a checkpoint ============
    run = training.Run(METHOD, args, model, {"optimizer": optimizer}, loader, views, preprocess, labelled, test, device)
    bn = f"BatchNorm in {args.bn_splits} parts, keys shuffled" if args.bn_splits * world > 1 else "BatchNorm not split"
    layers = "2 layers" if args.mlp else "1 layer"
    chance = math.log(args.queue + 1) * (2 if args.symmetric else 1)
    run.describe(
        f"lr {args.lr:g} x {args.batch_size} / 256 = {lr:.4g}, {run.warmup} steps of warm-up, schedule {args.schedule}",
        f"{args.optimizer}: {optim.count(optimizer)}; m {args.momentum:g}",
        f"queue {args.queue} x {args.dim}, {model.queue.numel() * 4 / 1e6:.1f} MB a rank; "
        f"tau {args.temperature:g}; {layers} in g; {bn}",
        f"chance-level loss ln(K + 1){' x 2' if args.symmetric else ''} = {chance:.2f}",
    )
    if not run.begin():
        return

    # ============ training ============
    while run.is_training():
        if run.probe_is_due():
            run.probe(model.g)
        for step in run.epoch():
            lr_now = rate(step, run.steps, args.epochs, lr, run.warmup, args.schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr_now
            model.update_key_network(args.momentum)  # before the forward pass, as in the official code
            for key, _, xs in run.passes(ddp):
                with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                    loss = ddp(xs, (args.seed, *key)) / args.accumulate
                loss.backward()
                run.log.loss += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            model.enqueue()  # after the update: its logits use the old queue
            run.end_step(lr_now, **model.figures)
        run.save()
    if run.stopped:
        return common.STOPPED
    run.finish()


if __name__ == "__main__":
    common.run(main)
