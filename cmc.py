"""CMC: Contrastive Multiview Coding (Tian, Krishnan and Isola, 2019, https://arxiv.org/abs/1906.05849).

The views are color channels: lightness L and color ab of one image share its content. Each view has its own network
and its own memory bank with a row per image. The loss is the cross-entropy (or NCE) of picking an image's row among K
negatives in the other view's bank, so features keep what views share. For evaluation, those of all views are joined.

    image -> crop, flip -> Lab -.-> L  -> f1 -> g1 -> z1 -- its row among K negatives of bank 2: -log h, both ways
                                '-> ab -> f2 -> g2 -> z2 -- its row among K negatives of bank 1
                    row i of bank 1 <- n(m row + (1 - m) z1), of bank 2 with z2, after the step       (n: L2-normalize)

    differences          paper                        official code              here (more in docs/cmc.md)
    views                Lab, YDbDr; NYU: L, ab,      Lab, YCbCr; YDbDr in       Lab, YDbDr; L, a, b (--split)
                         depth, normals, classes      PyContrast
    loss                 NCE                          NCE, softmax               both (--contrast)
    negatives            K from the bank              K for each image           K for the whole batch, on all ranks
    ResNets              half the width for a view,   half the width but for     half the width: resnet50_lab (v1);
                         the usual (66.2), twice      the first convolution      the usual: resnet50_w2_lab (v2); no v3
    weight decay         -                            on all parameters          not on biases and BatchNorm
    linear probe         lr 30, 60 epochs, crops,     the same                   un-augmented frozen features,
                         by layer                                                100 epochs
    small images         STL-10 at 64 px              tau 0.1                    recipes below; 3x3 stem under 64 px
    precision            -                            fp32; fp16 is worse        bf16 autocast; L2, loss, banks in fp32

Measured with this file (k-NN: 20 neighbors; protocols and curves in results/README.md):

    command                                     network, epochs      seeds  k-NN  linear   device
    python cmc.py                               resnet10_16_lab, 24  0      46.5  49.3     1 core, 3 min
                                                random init          0      13.5  not run
    ... --data shapes-natural                   resnet10_16_lab, 24  0      79.3  not run  the same
                                                random init          0      25.4  not run
    ... --data cifar10 --arch resnet10_32 --epochs 15 (images recompressed as JPEG)
                                                resnet10_32_lab, 15  0      49.9  51.9     1 core, 12 min
                                                random init          0      36.3  not run

    python cmc.py                                                            shapes, minutes on a laptop
    python cmc.py --split lab3 --graph full                                  three views, all pairs of them
    torchrun --standalone --nproc_per_node=8 cmc.py --data imagenet --root DIR
"""

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

METHOD = "cmc"

# ============ recipes: one per data regime; every entry but `views` is the default of a flag ============

RECIPES = {
    # Minutes on a CPU, so unlike the paper: AdamW, a small network, a cosine schedule, softmax.
    "shapes": dict(
        arch="resnet10_16", size=32, epochs=24, batch_size=64, optimizer="adamw", lr=1e-2, weight_decay=1e-4,
        warmup_epochs=1.0, drop_at=[], split="lab", graph="core", contrast="softmax-nce", negatives=4096,
        temperature=0.1, bank_momentum=0.5, dim=128, eval_every=2,
        views=[dict(scale=(0.5, 1.0), interpolation="bilinear", jitter=(0.4, 0.4, 0.4, 0.5), jitter_p=1.0,
                    **backbones.RGB)],
    ),
    # The paper has no CIFAR-10. InstDisc's setting (its code, cifar.py) with a flip and without jitter; tau as in CMC's
    # code for STL-10. Not run in full yet.
    "cifar10": dict(
        arch="resnet18", size=32, epochs=200, batch_size=128, optimizer="sgd", lr=0.06, weight_decay=5e-4,
        warmup_epochs=0, drop_at=[0.6, 0.8], split="lab", graph="core", contrast="softmax-nce", negatives=4096,
        temperature=0.1, bank_momentum=0.5, dim=128, eval_every=10,
        views=[dict(scale=(0.2, 1.0), interpolation="bilinear", **backbones.RGB)],
    ),
    # ResNet-50 v1, half the width per view. PyContrast: K = 65536, softmax, 200 epochs, and jitter before the color
    # conversion, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=1.0. The paper's best result uses YDbDr (--split ydbdr).
    "imagenet": dict(
        arch="resnet50", size=224, epochs=240, batch_size=128, optimizer="sgd",
        lr=0.06, weight_decay=1e-4,  # lr 0.03 for a batch of 128: code, train_CMC.py
        warmup_epochs=0, drop_at=[120 / 240, 160 / 240, 200 / 240],  # code, train_CMC.py
        split="lab", graph="core", contrast="nce", negatives=16_384, temperature=0.07,  # code, train_CMC.py
        bank_momentum=0.5, dim=128, eval_every=10,  # code, train_CMC.py
        views=[dict(scale=(0.08, 1.0), interpolation="bilinear", **backbones.RGB)],  # code, README
    ),
}  # fmt: skip
GRAPHS, CONTRASTS = ("core", "full"), ("nce", "softmax-nce")
# A folder of photographs, for a laptop or one GPU: hyper-parameters of `shapes`, the paper's views.
RECIPES["folder"] = RECIPES["shapes"] | training.FOLDER | dict(views=RECIPES["imagenet"]["views"], lr=1e-2)


def parse_args(argv=None):
    p, known = training.flags(METHOD, __doc__, RECIPES, argv)
    p.add_argument("--drop-at", type=float, nargs="*", help="shares of the run, lr / 10 after each (none: cosine)")
    # CMC
    p.add_argument("--split", choices=backbones.SPLITS, help="views V1, V2, ...: L and ab, Y and DbDr, or L, a and b")
    p.add_argument("--graph", choices=GRAPHS, help="pairs of views: V1 with each other view, or all pairs")
    p.add_argument("--contrast", choices=CONTRASTS, help="NCE, or cross-entropy over K + 1 rows")
    p.add_argument("--negatives", type=int, help="K, negatives sampled from the bank")
    p.add_argument("--temperature", type=float, help="tau of the softmax over cosines; lower is sharper")
    p.add_argument("--bank-momentum", type=float, help="m, share of the old row in the new one")
    p.add_argument("--dim", type=int, help="D, width of the vectors that the loss compares")
    args = training.parse(p, METHOD, RECIPES[known.recipe], argv)
    common.at_least(1, args, "dim", "negatives")
    common.at_least(0, args, "bank_momentum", most=1)
    if not all(0 < at < 1 for at in args.drop_at):
        common.fail(f"--drop-at {' '.join(f'{at:g}' for at in args.drop_at)}: shares of the run are between 0 and 1")
    least = 0.02 if args.contrast == "nce" else 0.0  # NCE's exp(s / tau) overflows below that
    if not least < args.temperature < math.inf:
        common.fail(f"--temperature {args.temperature:g}: with --contrast {args.contrast} it must be above {least:g}")
    if backbones.parts(args.arch).split not in (None, args.split):
        common.fail(f"--arch {args.arch}: --split {args.split} needs other views; omit the suffix")
    return args


# ============ the method ============


def draw_negatives(n, K, seed, step, device):
    """The K bank rows that are an update's negatives, drawn uniformly: the same for the whole batch and on all ranks,
    so that all logits are one matrix product."""
    return torch.randint(n, (K,), generator=data.generator(seed, "negatives", step)).to(device, non_blocking=True)


def scores(v, bank, index, negatives, temperature):
    """s / tau of v [B, D] with its own bank row, [B], and with the rows `negatives`, [B, K] (-inf: its own row)."""
    others = v @ bank[negatives].T / temperature
    others = others.masked_fill(negatives == index[:, None], -math.inf)
    return (v * bank[index]).sum(1) / temperature, others


def l_contrast(v, bank, index, negatives, temperature):
    """L_contrast: cross-entropy of the own row among K + 1 (sec. 3), mean over the batch. ln K minus this loss is
    a lower bound on the mutual information of the two views, in nats."""
    own, others = scores(v, bank, index, negatives, temperature)
    return (torch.logsumexp(torch.cat([own[:, None], others], 1), 1) - own).mean()


def nce(v, bank, index, negatives, temperature, Z):
    """Noise-contrastive estimation (InstDisc, sec. 3.2): is a row the view's own, or one of K drawn with P_n = 1 / n?
    With P = exp(s / tau) / Z, the former has probability P / (P + K P_n). Sum over K + 1 rows, mean over the batch."""
    own, others = scores(v, bank, index, negatives, temperature)
    noise, eps = len(negatives) / len(bank), 1e-7  # eps: code, NCECriterion.py
    h = own.exp() / Z
    missed = -(h / (h + noise + eps)).log()
    taken = (1 + (others.exp() / Z + eps) / noise).log().sum(1)
    return (missed + taken).mean()


def chance_level(form, n, K, dim, temperature):
    """The loss of one direction for random unit vectors: their cosines have variance 1 / D, so that
    ln E[exp(s / tau)] = 1 / (2 D tau^2)."""
    softmax = math.log(1 + K * math.exp(1 / (2 * dim * temperature**2)))
    return softmax + 1 + 1e-7 * n if form == "nce" else softmax


class CMC(nn.Module):
    """Each of M views has a network (in f, a backbones.Split), a linear head in g and a memory bank; each direction of
    a pair of views has a constant Z. `forward((x,), index, negatives)` is the loss L_C or L_F of RGB images x in [0, 1]
    at the positions `index` of the data set."""

    def __init__(self, backbone, n, dim=128, temperature=0.07, contrast="nce", momentum=0.5, graph="core"):
        super().__init__()
        self.temperature, self.contrast, self.momentum = temperature, contrast, momentum
        self.seen, self.figures = [], {}
        self.f = backbone
        self.g = nn.ModuleList(nn.Linear(width, dim) for width in backbone.widths)
        pairs = list(itertools.combinations(range(len(self.g)), 2))  # full graph: L_F
        if graph == "core":  # L_C: those with V1
            pairs = [(i, j) for i, j in pairs if i == 0]
        # (a view, the view whose bank it is compared with)
        self.directions = [direction for i, j in pairs for direction in ((i, j), (j, i))]
        self.register_buffer("bank", F.normalize(torch.rand(len(self.g), n, dim) - 0.5, dim=2))  # [M, n, D], fp32
        self.register_buffer("Z", torch.zeros(len(self.directions)))

    def forward(self, views, index, negatives, first=False):
        """`first`: whether this is the run's first batch, which sets NCE's constants Z. The same on all ranks."""
        features = self.f(*views).split(self.f.widths, 1)  # M of [B, d]
        out = torch.stack([g(h) for g, h in zip(self.g, features, strict=True)])
        with torch.autocast(out.device.type, enabled=False):
            z = F.normalize(out.float(), dim=2)  # [M, B, D]
            self.seen.append((index, z.detach()))
            if first and self.contrast == "nce":
                self.Z.copy_(self.estimate_Z(z.detach(), index, negatives))
            pairs = zip(self.directions, self.Z, strict=True)
            losses = [self.direction_loss(z[i], j, index, negatives, Z) for (i, j), Z in pairs]
            self.figures = self.measure(z.detach(), index)
            return torch.stack(losses).sum()  # L(V1, V2) = both directions, summed over the pairs

    def direction_loss(self, v, j, index, negatives, Z):
        """The loss of v [B, D], features of one view, with the bank of view j."""
        if self.contrast == "softmax-nce":
            return l_contrast(v, self.bank[j], index, negatives, self.temperature)
        return nce(v, self.bank[j], index, negatives, self.temperature, Z)

    def measure(self, z, index):
        """Numbers for the log, means over views or directions."""
        own = self.bank[:, index]  # [M, B, D]
        return {
            "feature_std": z.std(1).mean() * z.shape[2] ** 0.5,  # 1: spread, 0: collapsed
            "own_cosine": torch.stack([(z[i] * own[j]).sum(1).mean() for i, j in self.directions]).mean(),
            "view_cosine": torch.stack([(z[i] * z[j]).sum(1).mean() for i, j in self.directions[::2]]).mean(),
        }

    @torch.no_grad()
    def estimate_Z(self, z, index, negatives):
        """n times the mean of exp(s / tau) over all ranks' batches, by direction (code, NCEAverage.py). Collective."""
        found = [scores(z[i], self.bank[j], index, negatives, self.temperature) for i, j in self.directions]
        e = torch.stack([torch.cat([own[:, None], others], 1) for own, others in found]).exp()  # [directions, B, K + 1]
        total = common.all_reduce(torch.stack([e.sum((1, 2)), (e > 0).sum((1, 2))]))  # e = 0 in excluded rows
        return self.bank.shape[1] * total[0] / total[1]

    @torch.no_grad()
    def update_bank(self):
        """Row i <- n(m row i + (1 - m) z) in each view's bank, for the images of all ranks since the last call. No row
        is written twice, as an epoch has no image twice. All ranks hold the same banks. Collective."""
        indices, zs = zip(*self.seen, strict=True)
        index, z = torch.cat(indices), torch.cat(zs, 1)
        self.seen.clear()
        index, z = common.gather(index), common.gather(z, 1)
        self.bank[:, index] = F.normalize(torch.lerp(z, self.bank[:, index], self.momentum), dim=2)


def seen(args, xs, views, g):
    """What the networks see, for `python data.py show`."""
    rows = {"view 1": data.pixels(xs[0], views[0])}
    names = iter(("Y", "Db", "Dr") if args.split == "ydbdr" else ("L", "a", "b"))
    for j, view in enumerate(backbones.channel_views(xs[0], args.split), 1):
        rows |= {f"V{j}: {next(names)}": (c / 2 + 0.5).expand(-1, 3, -1, -1) for c in view.split(1, 1)}
    return rows


# ============ the run ============


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = common.setup(args.device)
    args.amp = common.bf16_is_fast(device) if args.amp is None else args.amp
    args.arch = f"{args.arch.removesuffix(f'_{args.split}')}_{args.split}"

    # ============ data ============
    views = [data.view(args.size, **v) for v in RECIPES[args.recipe]["views"]]
    train, labelled, test = sets.splits(args, device)
    per_pass = training.images_per_pass(args, world, len(train))
    n = len(train)
    training.lower(args, "negatives", n - 1, n)
    loader = data.Loader(train, views, per_pass, args.seed, rank, world, args.workers, device)
    preprocess = {"mean": views[0]["mean"], "std": views[0]["std"], "size": args.size, "interpolation": "bilinear"}

    # ============ model ============
    torch.manual_seed(args.seed)  # the same initial weights on every rank
    f = backbones.build(args.arch, args.size)
    model = CMC(f, n, args.dim, args.temperature, args.contrast, args.bank_momentum, args.graph)
    model = model.to(device, memory_format=torch.channels_last)
    ddp = model
    if world > 1:
        ddp = parallel.wrap(model, device)  # no SyncBatchNorm: statistics per GPU, as with the code's DataParallel
    if args.compile:
        model.f.compile()  # in place: keeps the names in state_dict()

    # ============ optimizer ============
    lr = args.lr * args.batch_size / 256
    optimizer = optim.OPTIMIZERS[args.optimizer](optim.param_groups(model, args.weight_decay), lr=lr)

    # ============ run: print the recipe, go on from a checkpoint ============
    run = training.Run(METHOD, args, model, {"optimizer": optimizer}, loader, views, preprocess, labelled, test, device)
    drops = f"a tenth at {', '.join(f'{at:.0%}' for at in args.drop_at)}" if args.drop_at else "cosine"
    start = len(model.directions) * chance_level(args.contrast, n, args.negatives, args.dim, args.temperature)
    size = model.bank.numel() * 4 / 1e6
    run.describe(
        f"lr {args.lr:g} x {args.batch_size} / 256 = {lr:.4g}, {run.warmup} steps of warm-up, then {drops}",
        f"{args.optimizer}: {optim.count(optimizer)}",
        f"{len(model.g)} banks {n} x {args.dim}, {size:.1f} MB a rank; {args.contrast}, {args.negatives} negatives, "
        f"tau {args.temperature:g}",
        f"views of {args.split}, {args.graph} graph: {len(model.directions)} directions; chance-level loss {start:.2f}",
        forward=lambda m, xs: m(xs, torch.arange(per_pass), torch.arange(args.negatives)),
    )
    if not run.begin():
        return

    # ============ training ============
    while run.is_training():
        if run.probe_is_due():
            run.probe()
        for step in run.epoch():
            lr_now = optim.rate(step, run.total, lr, run.warmup, args.drop_at)
            for group in optimizer.param_groups:
                group["lr"] = lr_now
            negatives = draw_negatives(n, args.negatives, args.seed, step, device)
            for key, index, xs in run.passes(ddp):
                with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                    loss = ddp(xs, index, negatives, first=key == (0, 1)) / args.accumulate
                loss.backward()
                run.log.loss += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            model.update_bank()  # after the update: its logits use the old banks
            run.end_step(lr_now, **model.figures)
        run.save()
    if run.stopped:
        return common.STOPPED
    run.finish()


if __name__ == "__main__":
    common.run(main)
