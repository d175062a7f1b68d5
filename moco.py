"""MoCo: Momentum Contrast (He et al., 2019, https://arxiv.org/abs/1911.05722), and MoCo v2 (Chen et al., 2020,
https://arxiv.org/abs/2003.04297).

One view of an image is a query, the other a key. By its cosine the query must pick its own key out of K + 1: the others are keys
of other images, from a queue of the last batches, so that their number has nothing to do with the size of a batch; and
the network that makes keys is a slow average of the other one, so that keys of different age can be compared.

    view 1 -> f -> g -> q ----.                                          f', g'  <-  m f', g' + (1 - m) f, g
                              |-- cross-entropy of q.k among q.k and q.queue, over tau; no gradient into k and queue
    view 2 -> f' -> g' -> k --'   (q, k: L2-normalised)
                     |_ after the step into the queue, in place of the oldest

    differences          paper                     official code                here (more in docs/moco.md)
    shuffled BatchNorm   keys, over the GPUs       the same; order drawn by     the same; every process draws the same order;
                                                   rank 0 and sent              --bn-splits does it within one process
                                                                                (the authors' CIFAR-10 demo)
    symmetric loss       no                        no; demo: optional, summed   --symmetric, summed; 2 B keys enter the queue
    learning rate        v1 steps, v2 cosine       by the epoch (demo's cosine  by the epoch, counted from 0;
                                                   counts from 1)               --warmup-epochs, 0 in the papers' recipes
    grey, jitter in v1   -                         grey first                   jitter, then grey
    blur                 v2: sigma U(.1, 2)        Pillow's box filters         a true Gaussian
    batch in passes      -                         -                            --accumulate: all passes see one queue
    k-NN monitor         -                         demo: 200-NN on q, T 0.1     embedding_knn200 (the demo's), knn20 of f
    linear probe         lr 30, 100 epochs, crops  the same                     un-augmented frozen features (evaluate.py)
    small images         -                         demo: CIFAR-10 at 32 px      recipes below; 3x3 stem under 64 px
    precision            -                         fp32                         bf16 autocast; L2, loss and queue in fp32

Measured with this file (k-NN: 20 neighbours; protocols and curves in results/README.md):

    command                      network, epochs    seeds  k-NN                linear              device, commit
    python moco.py               resnet10_16, 24    0      68.8                70.8                2 CPU cores, 2.7 min, 3980407
                                 at random          0      14.7                not run
    python moco.py --data cifar10 (images recompressed as JPEG), stopped after epoch 1 of 200: 200-NN of the embeddings
                                 resnet18, 1        0      31.7 (demo: 31.98)  not run             1 CPU core, 44cd552

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
from torch.nn.parallel import DistributedDataParallel

import backbones
import common
import data
import optim
import sets
import training

METHOD = "moco"

# ============ recipes: one per data regime; every entry but `views` is the default of a flag ============

RECIPES = {
    # Quick on a CPU, so unlike the paper: AdamW, a small network, a faster key network, a warm-up.
    "shapes": dict(
        arch="resnet10_16", size=32, epochs=24, batch_size=64, optimizer="adamw", lr=4e-3, weight_decay=1e-4,
        schedule="cosine", warmup_epochs=1.0, v=2, mlp=True, queue=2048, momentum=0.99, temperature=0.1, dim=128,
        bn_splits=1, eval_every=2,
        views=[dict(scale=(0.5, 1.0), interpolation="bilinear", jitter=(0.4, 0.4, 0.4, 0.5), jitter_p=1.0, grey=0.5)] * 2,
    ),
    # The authors' demo (colab/moco_cifar10_demo.ipynb): lr 0.06 for 512 images, BatchNorm of 8 GPUs, no blur.
    "cifar10": dict(
        arch="resnet18", size=32, epochs=200, batch_size=512, optimizer="sgd", lr=0.03, weight_decay=5e-4,
        schedule="cosine", warmup_epochs=0, v=1, mlp=False, queue=4096, momentum=0.99, temperature=0.1, dim=128,
        bn_splits=8, eval_every=10,
        views=[dict(interpolation="bilinear", jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grey=0.2,
                    mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))] * 2,
    ),
    "imagenet": dict(
        arch="resnet50", size=224, epochs=200, batch_size=256,  # v1, sec. 4, training
        optimizer="sgd", lr=0.03, weight_decay=1e-4, schedule="cosine", warmup_epochs=0,  # the same; cosine: v2, sec. 3
        v=2, mlp=True, temperature=0.2,  # v2, table 1 and 2 (code, README.md)
        queue=65536, momentum=0.999, dim=128,  # v1, sec. 3.3 and 4.1
        bn_splits=1, eval_every=10,
        views=[dict(scale=(0.2, 1.0), interpolation="bilinear", jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grey=0.2,
                    blur=0.5)] * 2,  # v2, sec. 3; code, main_moco.py
    ),
}  # fmt: skip
OTHER_VERSION = {  # what --v changes in a recipe that is of the other version
    "shapes": {1: dict(mlp=False)},
    "folder": {1: dict(mlp=False)},
    "cifar10": {2: dict(mlp=True)},
    "imagenet": {1: dict(  # v1, sec. 3.3 and 4.1; views: code, main_moco.py
        mlp=False, temperature=0.07, schedule="steps",
        views=[dict(scale=(0.2, 1.0), interpolation="bilinear", jitter=(0.4,) * 4, jitter_p=1.0, grey=0.2)] * 2,
    )},
}  # fmt: skip
# A folder of photographs, for a laptop or one GPU: the small network's numbers, the paper's views.
RECIPES["folder"] = RECIPES["shapes"] | training.FOLDER | dict(views=RECIPES["imagenet"]["views"])


def recipe_of(name, v=None):
    """The recipe, with the changes that version `v` makes in it."""
    return RECIPES[name] | OTHER_VERSION.get(name, {}).get(v, {}) | ({"v": v} if v in (1, 2) else {})


def views_of(args):
    return [data.view(args.size, **v) for v in recipe_of(args.recipe, args.v)["views"]]


def parse_args(argv=None):
    p, known = training.flags(METHOD, __doc__, RECIPES, argv, "--v", "--version", type=int)
    p.add_argument("--schedule", choices=("steps", "cosine"), help="steps: x 0.1 after 60 %% and 80 %% of the epochs")
    # MoCo
    p.add_argument(
        "--v", "--version", type=int, choices=(1, 2), help="the paper's version: it decides the other defaults"
    )
    p.add_argument(
        "--mlp", action=argparse.BooleanOptionalAction, help="g: two layers with a ReLU, or one linear layer"
    )
    p.add_argument("--queue", type=int, help="K, keys of other images that a query is compared with")
    p.add_argument(
        "--momentum", type=float, help="m of the key network's average; keys of very different age if too low"
    )
    p.add_argument(
        "--temperature", type=float, help="tau, what the cosines are divided by before the softmax; lower is sharper"
    )
    p.add_argument("--dim", type=int, help="D, width of the vectors that the loss compares")
    p.add_argument("--bn-splits", type=int, help="BatchNorm over so many parts of a batch, each like a GPU of its own")
    p.add_argument("--symmetric", action="store_true", help="each view once the query, once the key; the losses add up")
    args = training.parse(p, METHOD, recipe_of(known.recipe, known.v), argv)
    common.at_least(1, args, "dim", "queue", "bn_splits")
    common.at_least(0, args, "momentum")
    if not args.momentum <= 1:
        common.fail(f"--momentum {args.momentum:g}: it must be at most 1")
    if not 0 < args.temperature < math.inf:
        common.fail(f"--temperature {args.temperature:g}: it must be above 0 and finite")
    return args


# ============ the method ============


class SplitBatchNorm(nn.BatchNorm2d):
    """BatchNorm that sees `splits` parts of a batch [B, C, H, W], each by itself, as that many GPUs would (the authors'
    demo); the running averages are the means of the parts' own."""

    def __init__(self, channels, splits):
        super().__init__(channels)
        self.splits = splits

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        averages = [torch.stack([t] * self.splits) for t in (self.running_mean, self.running_var)]  # [splits, C]
        norm = functools.partial(F.batch_norm, training=True, momentum=self.momentum, eps=self.eps)
        # Each part moves its own averages. A batch that does not divide, as in the estimate of the time, has fewer parts.
        parts = zip(x.chunk(self.splits), *averages, strict=False)
        y = torch.cat([norm(part, mean, var, self.weight, self.bias) for part, mean, var in parts])
        if self.track_running_stats:  # not while a RevNet computes a stage anew
            self.running_mean.copy_(averages[0].mean(0))
            self.running_var.copy_(averages[1].mean(0))
            self.num_batches_tracked += 1
        return y


def split_batchnorm(net, splits):
    """The same network with SplitBatchNorm in the place of BatchNorm2d; names in state_dict() stay."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, SplitBatchNorm(child.num_features, splits))
    return net


def info_nce(q, k, queue, temperature):
    """InfoNCE (MoCo, eq. 1): cross-entropy of q.k among q.k and q.queue, over T; mean over the batch. q, k: [B, D], queue:
    [K, D], all of unit length. Returns (loss, [B, K + 1] logits)."""
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / temperature  # the own key is class 0
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device)), logits


class MoCo(nn.Module):
    """Query network f, g, key network f', g' and queue; `forward((v1, v2), draw)` is the loss of sec. 3.1. `draw`, numbers
    that differ from pass to pass, seeds the order in which BatchNorm sees the keys."""

    def __init__(self, backbone, queue=65536, dim=128, temperature=0.2, mlp=True, bn_splits=1, symmetric=False):
        super().__init__()
        self.temperature, self.symmetric, self.seen, self.figures = temperature, symmetric, [], {}
        self.f = split_batchnorm(backbone, bn_splits) if bn_splits > 1 else backbone
        self.g = nn.Linear(backbone.dim, dim)
        if mlp:
            self.g = nn.Sequential(nn.Linear(backbone.dim, backbone.dim), nn.ReLU(inplace=True), self.g)  # v2, sec. 3
        self.target = nn.ModuleDict({"f": copy.deepcopy(self.f), "g": copy.deepcopy(self.g)}).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue, dim), dim=1))  # fp32, one row a key
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))  # the oldest row

    def forward(self, views, draw=(0,)):
        v1, v2 = views
        loss = self.contrast(v1, v2, (*draw, 0))
        return loss + self.contrast(v2, v1, (*draw, 1)) if self.symmetric else loss

    def contrast(self, query, other, draw):
        q = self.g(self.f(query))  # [b, D]
        keys = self.keys(other, draw)  # [W b, D]
        with torch.autocast(q.device.type, enabled=False):
            q, rank = F.normalize(q.float(), dim=1), common.rank()
            k = keys[rank * len(q) : (rank + 1) * len(q)]
            loss, logits = info_nce(q, k, self.queue, self.temperature)
        self.seen.append(keys)
        with torch.no_grad():
            self.figures = {  # of the last direction
                "feature_std": q.std(0).mean() * q.shape[1] ** 0.5,  # 1: spread, 0: collapsed
                "own_cosine": (q * k).sum(1).mean(),
                # Queries that are nearer to their own key than to all others, per cent.
                "right": 100 * (logits[:, :1] > logits[:, 1:]).all(1).float().mean(),
            }
        return loss

    @torch.no_grad()
    def keys(self, x, draw):
        """k of the images of all processes, in their order. Each process encodes a random share of them (sec. 3.3): a query
        and its key must not meet the same BatchNorm statistics, which would tell them apart from all others."""
        every, b = common.gather(x), len(x)
        order = torch.randperm(len(every), generator=data.generator("shuffle", *draw))
        rank = common.rank()
        share, back = order[rank * b : (rank + 1) * b], order.argsort()
        # The key network stays in train mode: batch statistics, and running averages of its own.
        k = self.target["g"](self.target["f"](every[share.to(x.device, non_blocking=True)]))
        return common.gather(F.normalize(k.float(), dim=1))[back.to(x.device, non_blocking=True)]

    @torch.no_grad()
    def update_key_network(self, m):
        """theta_k <- m theta_k + (1 - m) theta_q (eq. 2). Parameters only."""
        theta_q = [*self.f.parameters(), *self.g.parameters()]
        torch._foreach_lerp_(list(self.target.parameters()), theta_q, 1 - m)

    @torch.no_grad()
    def enqueue(self):
        """The keys since the last call, of all processes, in place of the oldest ones."""
        keys = torch.cat(self.seen)
        self.seen.clear()
        rows = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[rows] = keys
        self.pointer.add_(len(keys)).remainder_(len(self.queue))


def rate(step, steps, epochs, lr, warmup, schedule):
    """The learning rate changes between epochs, as published: half a cosine, or a tenth after epochs 120 and 160 of 200."""
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
        common.fail(
            f"--bn-splits {args.bn_splits}: not so many equal parts of two or more in the {per_pass} images of a pass"
        )
    new_keys = args.batch_size * (2 if args.symmetric else 1)
    training.lower(args, "queue", len(train) // new_keys * new_keys, len(train))
    if args.queue % new_keys:
        common.fail(f"--queue {args.queue} is not a multiple of the {new_keys} keys of an update")
    loader = data.Loader(train, views, per_pass, args.seed, rank, world, args.workers, device)
    preprocess = {"mean": views[0]["mean"], "std": views[0]["std"], "size": args.size, "interpolation": "bilinear"}

    # ============ model ============
    torch.manual_seed(args.seed)  # the same initial weights in every process
    model = MoCo(
        backbones.build(args.arch, args.size),
        args.queue,
        args.dim,
        args.temperature,
        args.mlp,
        args.bn_splits,
        args.symmetric,
    ).to(device, memory_format=torch.channels_last)
    ddp = model
    if world > 1:
        # No SyncBN: over all processes, statistics would tell a query's key again. The queue is the same everywhere: DDP
        # need not send it before each step.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["queue", "pointer"])
        ddp = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    if args.bn_splits > 1 and not any(isinstance(m, SplitBatchNorm) for m in model.modules()):
        common.fail(f"--bn-splits {args.bn_splits}: {args.arch} has no BatchNorm to split")
    if args.compile:
        model.f.compile(), model.target["f"].compile()  # in place: the names in state_dict() stay

    # ============ optimizer ============
    lr = args.lr * args.batch_size / 256
    everything = [p for p in model.parameters() if p.requires_grad]  # decays, as in the official code
    groups = [{"params": everything, "weight_decay": args.weight_decay, "adapt": True}]
    optimizer = optim.OPTIMIZERS[args.optimizer](groups, lr=lr)

    # ============ run: print the recipe, go on from a checkpoint ============
    run = training.Run(METHOD, args, model, {"optimizer": optimizer}, loader, views, preprocess, labelled, test, device)
    bn = f"BatchNorm in {args.bn_splits} parts, keys shuffled" if args.bn_splits * world > 1 else "BatchNorm not split"
    layers = "two layers" if args.mlp else "one layer"
    chance = math.log(args.queue + 1) * (2 if args.symmetric else 1)
    run.describe(
        f"lr {args.lr:g} x {args.batch_size} / 256 = {lr:.4g}, {run.warmup} steps of warm-up, schedule {args.schedule}",
        f"{args.optimizer}: {optim.count(optimizer)}; m {args.momentum:g}",
        f"queue {args.queue} x {args.dim}, {model.queue.numel() * 4 / 1e6:.1f} MB a rank; "
        f"tau {args.temperature:g}; {layers} in g; {bn}",
        f"loss of equal logits ln(K + 1) = {chance:.2f}",
    )
    if run.resume():
        return

    # ============ training ============
    while run.is_training():
        if run.probe_is_due():
            run.probe(model.g)
        for step in run.epoch():
            lr_now = rate(step, run.steps, args.epochs, lr, run.warmup, args.schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr_now
            model.update_key_network(args.momentum)  # before the keys, as in the official code
            for key, _, xs in run.passes(ddp):
                with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                    loss = ddp(xs, (args.seed, *key)) / args.accumulate
                loss.backward()
                run.log.loss += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            model.enqueue()  # after the logits of the update, which are those of the old queue
            run.end_step(lr_now, **model.figures)
        run.save()
    if run.stopped:
        return common.STOPPED
    run.finish()


if __name__ == "__main__":
    common.run(main)
