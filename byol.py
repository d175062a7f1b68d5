"""BYOL: Bootstrap Your Own Latent (Grill et al., 2020, https://arxiv.org/abs/2006.07733).

Two views of an image go through two networks. The online network (backbone f, projector g, predictor q) predicts how
the target network (f', g') projects the other view. There are no negatives. Two things prevent collapse: the target is
an exponential moving average of the online network and gets no gradient, and only the online network has a predictor.

    view 1 -> f -> g -> q -> p1 --.
                                   |  minimize |n(p1) - n(z2)|^2, and the same with the views swapped
    view 2 -> f' -> g' ---> z2 ---'   (n: L2-normalize)        f', g'  <-  tau f', g' + (1 - tau) f, g

    differences       paper                       official code               here (more in docs/byol.md)
    target at start   -                           another random init         copy of the online network
    random crop       Inception crop, bicubic     one try, clipped: area .52  up to ten tries (torchvision): area .43
    resizing          -                           bicubic, no antialiasing    bicubic, antialiased; test images bilinear
    initial weights   -                           truncated normal, fan-in    f: He, fan-out; heads: torch's default
    linear probe      80 epochs, crops and flips  the same                    un-augmented frozen features, 100 epochs
    small images      -                           imagenette at 128 px only   recipes below; 3x3 stem under 64 px
    precision         -                           fp32                        bf16 autocast, loss and EMA in fp32

Measured with this file (k-NN: 20 neighbors; protocols and curves in results/README.md):

    command                      network, epochs    seeds  k-NN                linear            device, commit
    python byol.py               resnet10_16, 24    0 1 2  64.7 54.7 65.5      67.1 53.9 65.9    2 cores, 3 min, bc86536
                                 random init        0 1 2  14.7 13.1 16.6      15.5 (seed 0)
    python byol.py --data cifar10 --arch resnet10_32 --hidden 1024 --epochs 18 --batch-size 128 --lr 0.06
           --weight-decay 1e-3 --warmup-epochs 1 --tau 0.97 (images recompressed as JPEG)
                                 resnet10_32, 18    0      53.9                57.8              1 core, 37 min, 8ab7a2e
                                 random init        0      34.7                not run

    python byol.py                                                           shapes, minutes on a laptop
    torchrun --standalone --nproc_per_node=8 byol.py --data imagenet --root DIR
"""

import copy

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

METHOD = "byol"

# ============ recipes: one per data regime; every entry but `views` is the default of a flag ============

RECIPES = {
    # Minutes on a CPU, so unlike the paper: AdamW, a small network, a low tau_base, and ten times the learning rate for
    # the predictor, without which a run this short hardly improves on the random init (docs/byol.md).
    "shapes": dict(
        arch="resnet10_16", size=32, epochs=24, batch_size=64, optimizer="adamw", lr=4e-3, weight_decay=1e-4,
        warmup_epochs=1.0, tau=0.9, hidden=256, dim=128, predictor_lr=10.0, eval_every=2,
        views=[dict(scale=(0.5, 1.0), interpolation="bilinear", jitter=(0.4, 0.4, 0.4, 0.5), jitter_p=1.0,
                    gray=0.5)] * 2,
    ),
    # lightly's SGD setting with the paper's heads, schedules and decay exclusions. lightly's loss is a quarter of ours:
    # its lr of 0.06 per 128 images and weight decay of 5e-4 become 0.03 per 256 and 2e-3. Not run in full yet.
    "cifar10": dict(
        arch="resnet18", size=32, epochs=200, batch_size=512, optimizer="sgd", lr=0.03, weight_decay=2e-3,
        warmup_epochs=10, tau=0.99, hidden=4096, dim=256, predictor_lr=1.0, eval_every=10,
        views=[  # no blur at 32 px
            dict(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray=0.2, solarize=0.0),
            dict(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray=0.2, solarize=0.2),
        ],
    ),
    # The code's preset for 300 epochs. Its presets for 100 and 1000 epochs: docs/byol.md.
    "imagenet": dict(
        arch="resnet50", size=224, epochs=300, batch_size=4096,  # sec. 3.3; 300 epochs: code, configs/byol.py
        optimizer="lars", lr=0.3, weight_decay=1e-6, tau=0.99,  # code, configs/byol.py
        warmup_epochs=10, hidden=4096, dim=256, predictor_lr=1.0, eval_every=10,  # sec. 3.3
        views=[  # appendix B, table 6: the two views differ in blur and solarize
            dict(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray=0.2, blur=1.0, solarize=0.0),
            dict(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray=0.2, blur=0.1, solarize=0.2),
        ],
    ),
}  # fmt: skip
# A folder of photographs, for a laptop or one GPU: hyper-parameters of `shapes`, the paper's views.
RECIPES["folder"] = RECIPES["shapes"] | training.FOLDER | dict(views=RECIPES["imagenet"]["views"])


def parse_args(argv=None):
    p, known = training.flags(METHOD, __doc__, RECIPES, argv)
    # BYOL
    p.add_argument("--tau", type=float, help="tau_base of the target's EMA, rises to 1; too high is slow in short runs")
    p.add_argument("--hidden", type=int, help="hidden width of the heads")
    p.add_argument("--dim", type=int, help="D, width of the vectors that the loss compares")
    p.add_argument("--predictor-lr", type=float, help="factor on the predictor's learning rate; 1 in the paper")
    args = training.parse(p, METHOD, RECIPES[known.recipe], argv)
    common.at_least(1, args, "hidden", "dim")
    common.at_least(0, args, "tau", most=1)
    common.at_least(0, args, "predictor_lr")
    return args


# ============ the method ============


def mlp(inputs, hidden, outputs):
    """Projector, predictor: linear, BatchNorm, ReLU, linear without bias; no BatchNorm at the end (BYOL, sec. 3.3)."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, outputs, bias=False)
    )


def regression_loss(p, z):
    """|n(p) - n(z)|^2 = 2 - 2 cos(p, z), mean over the batch (BYOL, eq. 2). p, z: [B, D]; no gradient into z."""
    p, z = F.normalize(p.float(), dim=1), F.normalize(z.detach().float(), dim=1)
    return 2 - 2 * (p * z).sum(1).mean()


class BYOL(nn.Module):
    """Online network f, g, q and target network f', g'; `forward((v1, v2))` is the loss of sec. 3.1, in [0, 8]."""

    def __init__(self, backbone, hidden=4096, dim=256):
        super().__init__()
        self.f = backbone
        self.g = mlp(backbone.dim, hidden, dim)
        self.q = mlp(dim, hidden, dim)
        self.target = nn.ModuleDict({"f": copy.deepcopy(self.f), "g": copy.deepcopy(self.g)}).requires_grad_(False)

    def forward(self, views):
        v1, v2 = views
        # One forward pass per view: BatchNorm has separate statistics for each, as in the official code.
        p1, p2 = self.q(self.g(self.f(v1))), self.q(self.g(self.f(v2)))  # [B, D]
        with torch.no_grad():  # in train mode, as in the code: the target normalizes with batch statistics, too
            z1, z2 = (self.target["g"](self.target["f"](v)) for v in views)  # [B, D]
        self.feature_std = F.normalize(z1.float(), dim=1).std(0).mean() * z1.shape[1] ** 0.5  # 1: spread, 0: collapsed
        return regression_loss(p1, z2) + regression_loss(p2, z1)  # symmetrized, sec. 3.1

    @torch.no_grad()
    def update_target(self, tau):
        """xi <- tau xi + (1 - tau) theta (eq. 1), parameters only: the target has its own BatchNorm averages."""
        xi = list(self.target.parameters())
        theta = [*self.f.parameters(), *self.g.parameters()]
        torch._foreach_lerp_(xi, theta, 1 - tau)


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
    model = BYOL(backbones.build(args.arch, args.size), args.hidden, args.dim)
    model = model.to(device, memory_format=torch.channels_last)
    ddp = model
    if world > 1:
        parallel.sync_batch_norm(model)  # statistics of the global batch, as in the paper
        ddp = parallel.wrap(model, device)
    if args.compile:
        model.f.compile(), model.target["f"].compile()  # in place: keeps the names in state_dict()

    # ============ optimizer ============
    lr = args.lr * args.batch_size / 256
    groups = optim.param_groups(nn.ModuleList([model.f, model.g]), args.weight_decay, lr_factor=1.0)
    groups += optim.param_groups(model.q, args.weight_decay, lr_factor=args.predictor_lr)
    optimizer = optim.OPTIMIZERS[args.optimizer](groups, lr=lr)

    # ============ run: print the recipe, go on from a checkpoint ============
    run = training.Run(METHOD, args, model, {"optimizer": optimizer}, loader, views, preprocess, labelled, test, device)
    run.describe(
        f"lr {args.lr:g} x {args.batch_size} / 256 = {lr:.4g}, {run.warmup} steps of warm-up, q {args.predictor_lr:g}x",
        f"{args.optimizer}: {optim.count(optimizer)}; tau {args.tau:g} -> 1; chance-level loss 4",
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
                group["lr"] = lr_now * group["lr_factor"]
            for _, _, xs in run.passes(ddp):
                with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                    loss = ddp(xs) / args.accumulate
                loss.backward()
                run.log.loss += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            tau = optim.cosine(step, run.total, args.tau, 1.0)  # sec. 3.3: 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2
            model.update_target(tau)  # after the step, as in the official code
            run.end_step(lr_now, tau=tau, feature_std=model.feature_std)
        run.save()
    if run.stopped:
        return common.STOPPED
    run.finish()


if __name__ == "__main__":
    common.run(main)
