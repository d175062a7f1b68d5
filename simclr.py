"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations (Chen et al., 2020,
https://arxiv.org/abs/2002.05709).

Two views of each of B images go through one network, backbone f and projector g. For each of the 2B views, the loss is
the cross-entropy of picking the other view of the same image among the 2B - 1 others. The views of the other images are
the negatives, so a large batch helps. There is no memory bank and no second network; the negatives prevent collapse.

    view 1 of B images --.                           .-- z_1 .. z_B ------.
                          >-- one batch -> f -> g --<                      > each z_i: -log P(its other view | all but
    view 2 of B images --'                           '-- z_B+1 .. z_2B ---'  itself), softmax of cosines / tau (eq. 1)

    differences       paper                     official code                here (more in docs/simclr.md)
    loss              mean over the 2B views    sum of the two directions:   mean over the 2B views: half the step where
                                                twice that                   LARS does not adapt (biases, BatchNorm)
    projector         2 layers                  3 by default                 3, --layers 2
    weight decay      1e-6                      1e-4 in its commands         1e-4
    learning rate     0.3 x B / 256             0.075 x sqrt(B) in its       0.075 x sqrt(B); --scaling
                                                command, also 4.8 for 4096
    random crop       Inception crop            TensorFlow's: mean area .39  torchvision's: mean area .43
    blur              -                         one sigma a batch and view   one sigma an image
    initial weights   -                         truncated normal; last BN    f: He, fan-out, as torchvision;
                                                of a block 0; g N(0, 0.01)   g: N(0, 0.01)
    linear probe      crops and flips           the same                     un-augmented frozen features, 100 epochs

Measured with this file (k-NN: 20 neighbors; protocols and curves in results/README.md):

    command                      network, epochs    seeds  k-NN              linear            device, commit
    python simclr.py             resnet10_16, 24    0      86.2              87.1              2 cores, 3.0 min, 3980407
                                 random init        0      14.7              not run
    python simclr.py --data cifar10 --limit 10000 --arch resnet10_16 --batch-size 128 --epochs 20 --warmup-epochs 2
           (images recompressed as JPEG)
                                 resnet10_16, 20    0      42.3              not run           1 core, f2b4cb3
                                 random init        0      27.1              not run
    cifar10, imagenet            in full                   not run             not run

    python simclr.py                                                         shapes, minutes on a laptop
    torchrun --standalone --nproc_per_node=8 simclr.py --data imagenet --root DIR
"""

import functools
import itertools
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

METHOD = "simclr"

# ============ recipes: one per data regime; every entry but `views` is the default of a flag ============

RECIPES = {
    # Minutes on a CPU, so unlike the paper: AdamW, a small network, a small batch.
    "shapes": dict(
        arch="resnet10_16", size=32, epochs=24, batch_size=64, optimizer="adamw", lr=4e-3, scaling="linear",
        weight_decay=1e-4, warmup_epochs=1.0, temperature=0.2, layers=2, hidden=256, dim=128, eval_every=2,
        views=[dict(scale=(0.5, 1.0), interpolation="bilinear", jitter=(0.4, 0.4, 0.4, 0.5), jitter_p=1.0,
                    gray=0.5)] * 2,
    ),
    # The code's command for CIFAR-10: no blur, jitter at half strength. Not run in full yet.
    "cifar10": dict(
        arch="resnet18", size=32, epochs=1000, batch_size=512, optimizer="lars", lr=1.0, scaling="linear",
        weight_decay=1e-4, warmup_epochs=10, temperature=0.5, layers=3, hidden=512, dim=128, eval_every=10,
        views=[dict(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray=0.2, mean=(0.0,) * 3, std=(1.0,) * 3)] * 2,
    ),
    # The code's command for 100 epochs. The paper's: --lr 0.3 --scaling linear --weight-decay 1e-6 --layers 2.
    "imagenet": dict(
        arch="resnet50", size=224, epochs=100, batch_size=4096, optimizer="lars", warmup_epochs=10,  # sec. 2.3
        lr=0.075, scaling="sqrt", weight_decay=1e-4, temperature=0.1,  # code, README.md
        layers=3, hidden=2048, dim=128, eval_every=10,  # code, run.py; 128: sec. 2.3
        views=[  # appendix A, strength 1
            dict(jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.8, gray=0.2, blur=0.5, mean=(0.0,) * 3, std=(1.0,) * 3)
        ] * 2,
    ),
}  # fmt: skip
# A folder of photographs, for a laptop or one GPU: hyper-parameters of `shapes`, the paper's views.
RECIPES["folder"] = RECIPES["shapes"] | training.FOLDER | dict(views=RECIPES["imagenet"]["views"])
# LARS with the learning rate inside the momentum buffer, as in the official code
OPTIMIZERS = optim.OPTIMIZERS | {"lars": functools.partial(optim.LARS, inside=True)}


def parse_args(argv=None):
    p, known = training.flags(METHOD, __doc__, RECIPES, argv)
    # SimCLR
    p.add_argument("--scaling", choices=("linear", "sqrt"), help="of lr with the batch size B: x B / 256, or x sqrt(B)")
    p.add_argument("--temperature", type=float, help="tau of the softmax over cosines; lower is sharper")
    p.add_argument("--layers", type=int, choices=(2, 3), help="layers of the projector; 2 in the paper")
    p.add_argument("--hidden", type=int, help="hidden width of the heads")
    p.add_argument("--dim", type=int, help="D, width of the vectors that the loss compares")
    args = training.parse(p, METHOD, RECIPES[known.recipe], argv)
    common.at_least(1, args, "hidden", "dim")
    if not 0 < args.temperature < math.inf:
        common.fail(f"--temperature {args.temperature:g}: it must be above 0 and finite")
    return args


# ============ the method ============


def projector(inputs, hidden, outputs, layers):
    """Linear, BatchNorm, ReLU (once with 2 layers, twice with 3), then linear, BatchNorm. Linear layers and the last
    BatchNorm have no bias; linear weights are initialized with N(0, 0.01) (code, model.py)."""
    widths, modules = [inputs, *[hidden] * (layers - 1)], []
    for a, b in itertools.pairwise(widths):
        modules += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU(inplace=True)]
    modules += [nn.Linear(widths[-1], outputs, bias=False), nn.BatchNorm1d(outputs)]
    modules[-1].bias.requires_grad_(False)  # torch has no BatchNorm without a bias: it stays 0
    for m in modules:
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=0.01)
    return nn.Sequential(*modules)


def nt_xent(z, z_all, offset, temperature):
    """NT-Xent (eq. 1): -log P(other view | all but itself), mean over the anchors z [2b, D], first views of b images,
    then their second views. z_all [2B, D]: the views of all ranks, z from row `offset` on. All are unit vectors."""
    row = torch.arange(len(z), device=z.device)
    s = (z / temperature @ z_all.T).scatter(1, offset + row[:, None], -math.inf)  # [2b, 2B], without each view itself
    return F.cross_entropy(s, offset + row.roll(len(z) // 2))


class SimCLR(nn.Module):
    """Backbone f, projector g; `forward((v1, v2))` is NT-Xent over the views of all ranks. Collective."""

    def __init__(self, backbone, hidden=2048, dim=128, layers=3, temperature=0.1):
        super().__init__()
        self.temperature, self.figures = temperature, {}
        self.f = backbone
        self.g = projector(backbone.dim, hidden, dim, layers)

    def forward(self, views):
        z = self.g(self.f(torch.cat(views)))  # [2b, D]; one batch for BatchNorm, as in the official code
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.float(), dim=1)
            z1, z2 = z.detach().chunk(2)
            self.figures = {
                "feature_std": z.detach().std(0).mean() * z.shape[1] ** 0.5,  # 1: spread, 0: collapsed
                "positive_cosine": (z1 * z2).sum(1).mean(),  # between the two views of an image
            }
            z_all, offset = common.gather(z), common.rank() * len(z)  # differentiable: sums the gradients of all ranks
            # The mean over this rank's anchors: DDP averages the gradients of the ranks to that of the mean over all.
            return nt_xent(z, z_all, offset, self.temperature)


# ============ the run ============


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = common.setup(args.device)
    args.amp = common.bf16_is_fast(device) if args.amp is None else args.amp

    # ============ data ============
    views = [data.view(args.size, **v) for v in RECIPES[args.recipe]["views"]]
    train, labelled, test = sets.splits(args, device)
    per_pass = training.images_per_pass(args, world, len(train))
    loader = data.Loader(train, views, per_pass, args.seed, rank, world, args.workers, device)
    preprocess = {"mean": views[0]["mean"], "std": views[0]["std"], "size": args.size, "interpolation": "bilinear"}

    # ============ model ============
    torch.manual_seed(args.seed)  # the same initial weights on every rank
    model = SimCLR(backbones.build(args.arch, args.size), args.hidden, args.dim, args.layers, args.temperature)
    model = model.to(device, memory_format=torch.channels_last)
    ddp = model
    if world > 1:
        parallel.sync_batch_norm(model)  # statistics of the global batch, as in the paper
        ddp = parallel.wrap(model, device)
    if args.compile:
        model.f.compile()  # in place: keeps the names in state_dict()

    # ============ optimizer ============
    factor, how = args.batch_size / 256, f"{args.batch_size} / 256"
    if args.scaling == "sqrt":
        factor, how = args.batch_size**0.5, f"sqrt({args.batch_size})"
    lr = args.lr * factor
    optimizer = OPTIMIZERS[args.optimizer](optim.param_groups(model, args.weight_decay), lr=lr)

    # ============ run: print the recipe, go on from a checkpoint ============
    run = training.Run(METHOD, args, model, {"optimizer": optimizer}, loader, views, preprocess, labelled, test, device)
    B = world * per_pass  # images of a pass over all ranks: with --accumulate, negatives come from the same pass
    run.describe(
        f"lr {args.lr:g} x {how} = {lr:.4g}, {run.warmup} steps of warm-up",
        f"{args.optimizer}: {optim.count(optimizer)}",
        f"{2 * B - 2} negatives per view, B = {B}; tau {args.temperature:g}",
        f"chance-level loss ln(2B - 1) = {math.log(2 * B - 1):.2f}",
    )
    if not run.begin():
        return

    # ============ training ============
    while run.is_training():
        if run.probe_is_due():
            run.probe()
        for step in run.epoch():
            lr_now = optim.cosine(step, run.total, lr, 0.0, run.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr_now
            for _, _, xs in run.passes(ddp):
                with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                    loss = ddp(xs) / args.accumulate
                loss.backward()
                run.log.loss += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            run.end_step(lr_now, **model.figures)
        run.save()
    if run.stopped:
        return common.STOPPED
    run.finish()


if __name__ == "__main__":
    common.run(main)
