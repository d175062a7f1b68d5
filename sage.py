"""SaGe: Semantic-Aware Generation (Tian et al., 2021, https://arxiv.org/abs/2111.13163), on top of BYOL.

BYOL makes the features of two views agree and so discards what only one of them shows. SaGe keeps it: a decoder
recovers each view from a short vector of its feature map, and a frozen evaluator h, a BYOL network trained before,
compares the recovered view with the original. Decoder and evaluator are discarded after training.

    view 1 = x1 -> f ---> g -> q -> p1  ~  z2 <- g' <- f' <- view 2     L_D: BYOL's loss, symmetrized over the views
                   |
                   '-> bottleneck -> decoder -> x~1                     L_G: |x1 - x~1|^2 and |h_l(x1) - h_l(x~1)|^2 on
                                                                             several levels l, and the same for view 2

    The paper's names: its h_D is g and q here, as in byol.py; its g is `decoder`, its h_G is h.

    differences         paper                        official code                   here (more in docs/sage.md)
    target's tau_base   0.9                          0.99                            0.99, BYOL's preset for 300 epochs
    decoder's channels  512 ... 16: 15.6 M           256, 512 ... 32: 11.3 M         the code's, which match table 9
    decoder call        fig. 1                       missing                         as in fig. 1
    weights in L_G      0.1 each, 0.1 on their sum   0.1, 0.1 and 1/30 for each map  the code's
    1x1 feature of h    2048-d, pooled               256-d, of the projector         pooled; --semantic projector
    h frozen            yes                          weights only; batch statistics  weights and BatchNorm (eval mode)
    input of h          -                            the views as they are           renormalized with h's mean and std
    LARS                -                            adapts the shortcuts' BatchNorm no BatchNorm is adapted (BYOL)

Measured with this file (k-NN: 20 neighbors; protocols, curves and more in results/README.md):

    command                      network, epochs    seeds  k-NN                linear              device, commit
    python sage.py               resnet10_16, 7     0      64.8                58.9                2 CPU cores, fdfcbc7:
                                 its evaluator, 24  0      64.7                67.1                3 min after 4 min of
                                 random init        0      13.3                not run             stage 1
    python sage.py --data cifar10 --limit 10000 (10,000 images, recompressed as JPEG; flags in results/README.md)
                                 resnet10_16, 20    0 1 2  42.2 42.7 43.7      45.0 45.1 45.1      1 CPU core, 556c071
                                 its evaluator, 20  0 1 2  39.2 39.4 39.5      43.0 43.2 42.8
                                 random init        0      25.8                not run

    python sage.py                                                           shapes, minutes on a laptop
    torchrun --standalone --nproc_per_node=8 sage.py --data imagenet --root DIR
    python -m experiments.ablate sage --epochs 8                             every row of tables 6-10
"""

import argparse
import copy
import functools
import gc
import itertools
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import backbones
import byol
import checkpoints
import common
import data
import optim
import runs
import sets
import training
from analysis import reconstruct

METHOD = "sage"

# ============ recipes: one per data regime; every entry but `views` is the default of a flag ============

SIGNED = dict(mean=data.HALF, std=data.HALF)  # appendix B: pixels in [-1, 1], the range of the decoder's tanh
RECIPES = {
    # As byol.py's for 7 epochs, and with larger weights in L_G: with 0.1 the decoder learns little in so few updates.
    "shapes": dict(
        arch="resnet10_16", size=32, epochs=7, batch_size=64, optimizer="adamw", lr=4e-3, weight_decay=1e-4,
        warmup_epochs=1.0, tau=0.9, hidden=256, dim=128, predictor_lr=10.0, eval_every=2,
        levels=[0, 1, 2], bottleneck=256, width=128, decoder_lr=0.012,
        weight_pixel=3.0, weight_maps=1.0, weight_semantic=1.0,
        views=[  # as in byol.py but for mean and std
            dict(scale=(0.5, 1.0), interpolation="bilinear", jitter=(0.4, 0.4, 0.4, 0.5), jitter_p=1.0, gray=0.5,
                 **SIGNED),
        ] * 2,
    ),
    "cifar10": dict(
        arch="resnet18", size=32, epochs=200, batch_size=512, optimizer="sgd", lr=0.03, weight_decay=2e-3,
        warmup_epochs=10, tau=0.99, hidden=4096, dim=256, predictor_lr=1.0, eval_every=10,
        levels=[1, 2, 3], bottleneck=128, width=256, decoder_lr=5e-4,
        weight_pixel=0.1, weight_maps=0.1, weight_semantic=0.1,  # the official code's, as below
        views=[  # no blur at 32 px
            dict(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray=0.2, solarize=0.0, **SIGNED),
            dict(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray=0.2, solarize=0.2, **SIGNED),
        ],
    ),
    # "SaGe (short)" of table 2; for the ablations of tables 6-10: 100 epochs.
    "imagenet": dict(
        arch="resnet50", size=224, epochs=300, batch_size=4096,  # sec. 4.1; the batch: appendix B
        optimizer="lars", lr=0.3, weight_decay=1e-6, tau=0.99,  # sec. 4.1: lr 4.8 = 0.3 x 4096 / 256; tau: code
        warmup_epochs=10, hidden=4096, dim=256, predictor_lr=1.0, eval_every=10,  # appendix B
        levels=[1, 2, 3], bottleneck=512, width=512, decoder_lr=0.003,  # sec. 4.1: 0.048 = 0.003 x 4096 / 256
        weight_pixel=0.1, weight_maps=0.1, weight_semantic=0.1,  # code: 1/10, 1/30 for each of three maps, 1/10
        checkpoint_activations=True,  # for 8 GPUs of 80 GB; the paper has 32 GPUs
        views=[  # appendix B: as BYOL's but for mean and std
            dict(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray=0.2, blur=1.0, solarize=0.0, **SIGNED),
            dict(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray=0.2, blur=0.1, solarize=0.2, **SIGNED),
        ],
    ),
}  # fmt: skip
# A folder of photographs, for a laptop or one GPU: the small network's numbers, the paper's views.
RECIPES["folder"] = RECIPES["shapes"] | training.FOLDER | dict(views=RECIPES["imagenet"]["views"])
SEMANTIC, TERMS = ("pooled", "projector"), ("d", "pixel", "maps", "semantic")


def parse_args(argv=None):
    p, known = training.flags(METHOD, __doc__, RECIPES, argv)
    # BYOL
    p.add_argument("--tau", type=float, help="tau_base of the target's EMA, rises to 1; too high is slow in short runs")
    p.add_argument("--hidden", type=int, help="hidden width of the heads")
    p.add_argument("--dim", type=int, help="D, width of the vectors that the loss compares")
    p.add_argument("--predictor-lr", type=float, help="factor on the predictor's learning rate; 1 in the paper")
    # SaGe: the decoder (the paper's g), the evaluator (h_G), the weights of the loss (0 switches a term off)
    p.add_argument("--bottleneck", type=int, help="length of the vector that a view is recovered from (table 8)")
    p.add_argument("--pool", action="store_true", help="bottleneck: average pooling, not a convolution (fig. 5)")
    p.add_argument("--width", type=int, help="decoder channels after the first upsampling, halved by each (table 9)")
    p.add_argument("--decoder-lr", type=float, help="Adam's for bottleneck and decoder, multiplied by batch size / 256")
    p.add_argument("--freeze-decoder", action="store_true", help="leave bottleneck and decoder untrained (table 10)")
    p.add_argument("--evaluator", help="BYOL run, its backbone.pt or random:ARCH (default: stage 1 trains a BYOL run)")
    p.add_argument("--evaluator-arch", help="backbone of stage 1's BYOL run (default: --arch)")
    p.add_argument("--evaluator-epochs", type=int, help="epochs of stage 1's BYOL run (default: byol.py's)")
    p.add_argument("--train-evaluator", action="store_true", help="do not freeze it (sec. 3.4: costs over 20 points)")
    p.add_argument("--levels", type=int, nargs="+", help="stages of the evaluator whose maps are compared, from 0")
    p.add_argument("--semantic", choices=SEMANTIC, default=SEMANTIC[0], help="evaluator's 1x1 feature (appendix A)")
    p.add_argument("--weight-d", type=float, default=1.0, help="of L_D, BYOL's loss")
    p.add_argument("--weight-pixel", type=float, help="lambda of L_MSE (eq. 4)")
    p.add_argument("--weight-maps", type=float, help="lambda of the mean over --levels (eq. 4)")
    p.add_argument("--weight-semantic", type=float, help="lambda of the 1x1 feature (eq. 4)")
    p.add_argument("--checkpoint-activations", action=argparse.BooleanOptionalAction, default=False,
                   help="recompute the frozen evaluator's maps of recovered views: less memory, more time")  # fmt: skip
    p.add_argument("--classifier", help="marks recovered images that it recognizes (from downstream.finetune --save)")
    args = training.parse(p, METHOD, RECIPES[known.recipe], argv)
    common.at_least(1, args, "hidden", "dim", "bottleneck", "width", "evaluator_epochs")
    common.at_least(0, args, "tau", most=1)
    common.at_least(0, args, "predictor_lr", "decoder_lr", *(f"weight_{term}" for term in TERMS))
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


class Decoder(nn.Module):
    """A vector [B, dim, 1, 1] -> an image [B, 3, side 2^doublings, the same] in [-1, 1] (sec. 4.1).

    A transposed convolution to `side` px, then `doublings` 4x4 ones of stride 2, all with BatchNorm and ReLU, then a
    1x1 convolution and tanh. Channels as in the official code, which match table 9: 256 after the first layer, `width`
    after the second, halved by each further one; never more than `width` or fewer than 16.
    """

    def __init__(self, dim, width, side, doublings):
        super().__init__()
        channels = [min(256, width), *(max(16, width // 2**i) for i in range(doublings))]
        layers = [nn.ConvTranspose2d(dim, channels[0], side), nn.BatchNorm2d(channels[0]), nn.ReLU(inplace=True)]
        for before, after in itertools.pairwise(channels):
            up = nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)
            layers += [up, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels[-1], 3, 1))
        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def forward(self, x):
        return self.layers(x).float().tanh()


def build_decoder(backbone, size, dim, width, pool):
    """Bottleneck and decoder for the last map of `backbone` at `size` px, [B, C, k, k] -> [B, dim, 1, 1] -> image.

    The bottleneck is a k x k convolution, which keeps positions apart (sec. 4.1), or with `pool` the mean over the map,
    which does not; its vector has C numbers.
    """
    with torch.no_grad():
        channels, side = backbone.eval().stages(torch.zeros(1, 3, size, size))[-1].shape[1:3]
    backbone.train()
    if channels != backbone.dim:
        common.fail(f"--arch: its vector has {backbone.dim} numbers, its last map {channels} channels; they must agree")
    doublings = round(math.log2(size / side))
    if side * 2**doublings != size:
        fits = "for ResNets use 32, 48 or a multiple of 32 from 64 to 224"
        common.fail(f"--size {size}: the last map, {side} px, doubles to {side * 2**doublings} in the decoder; {fits}")
    bottleneck = nn.AdaptiveAvgPool2d(1) if pool else nn.Conv2d(channels, dim, side)
    if not pool:
        nn.init.kaiming_normal_(bottleneck.weight, nonlinearity="relu"), nn.init.zeros_(bottleneck.bias)
    return bottleneck, Decoder(channels if pool else dim, width, side, doublings)


class Autoencoder(nn.Module):
    """Backbone, bottleneck and decoder: x [B, 3, S, S] in [-1, 1] -> x~ of the same shape and range."""

    def __init__(self, backbone, bottleneck, decoder):
        super().__init__()
        self.f, self.bottleneck, self.decoder = backbone, bottleneck, decoder

    def forward(self, x):
        return self.decoder(self.bottleneck(self.f.stages(x)[-1]))


class Evaluator(nn.Module):
    """h_G (appendix A): images in [-1, 1] -> (the maps of the stages `levels`, the 1x1 feature [B, d]).

    Frozen: no gradients for its weights and always in eval mode, but gradients pass through it to its input. The input
    is renormalized with the mean and std of `preprocess`, those it was trained with. `recompute`: its maps of recovered
    views are not kept for the backward pass but computed once more.
    """

    def __init__(self, backbone, preprocess, levels, projector=None, frozen=True, recompute=False):
        super().__init__()
        self.recompute = recompute and frozen  # otherwise BatchNorm's averages would see each batch twice
        self.net, self.projector, self.levels, self.frozen = backbone, projector, levels, frozen
        mean, std = (torch.tensor(preprocess[k]).view(3, 1, 1) for k in ("mean", "std"))
        self.register_buffer("scale", 0.5 / std)  # (x / 2 + 1 / 2 - mean) / std
        self.register_buffer("shift", (0.5 - mean) / std)
        self.requires_grad_(not frozen).train()

    def train(self, mode=True):
        return super().train(mode and not self.frozen)

    def forward(self, x):
        maps = self.net.stages(x * self.scale + self.shift)
        semantic = maps[-1].mean((2, 3))
        return [maps[i] for i in self.levels], self.projector(semantic) if self.projector else semantic

    @torch.no_grad()
    def calibrate(self, x):
        """Set the BatchNorm statistics of a random network to those of the images `x`; with the initial ones (mean 0,
        variance 1) eval mode would not normalize."""
        torch.optim.swa_utils.update_bn([x * self.scale + self.shift], self.net)


class SaGe(nn.Module):
    """BYOL's f, g, q and target f', g', with bottleneck, decoder and evaluator h; `forward((v1, v2))` is eq. 3.

    If L_D has weight 0, its heads are not trained. `parts` holds the unweighted terms of the last forward; those of L_G
    are means over the two views.
    """

    def __init__(self, backbone, hidden, dim, weights, bottleneck=None, decoder=None, evaluator=None):
        super().__init__()
        self.f = backbone
        self.g = mlp(backbone.dim, hidden, dim)
        self.q = mlp(dim, hidden, dim)
        self.target = nn.ModuleDict({"f": copy.deepcopy(self.f), "g": copy.deepcopy(self.g)}).requires_grad_(False)
        self.weights = weights
        if not weights["d"]:
            self.g.requires_grad_(False), self.q.requires_grad_(False)
        self.bottleneck, self.decoder, self.h = bottleneck, decoder, evaluator

    def compare(self, x_, semantic, *maps):
        """Mean squared errors of the evaluator's maps (averaged) and of its 1x1 feature, of x~ against those of x."""
        maps_, semantic_ = self.h(x_)
        mse = [F.mse_loss(m_.float(), m.float()) for m, m_ in zip(maps, maps_, strict=True)]
        return sum(mse) / len(mse), F.mse_loss(semantic_.float(), semantic.float())

    def forward(self, views):
        v1, v2 = views
        # One forward per view, so that BatchNorm takes its statistics per view, as in the official code.
        m1, m2 = self.f.stages(v1)[-1], self.f.stages(v2)[-1]  # [B, C, k, k]
        y1, y2 = m1.mean((2, 3)), m2.mean((2, 3))  # [B, C]
        loss, self.parts, features = 0.0, {}, y1
        if self.weights["d"]:
            p1, p2 = self.q(self.g(y1)), self.q(self.g(y2))  # [B, D]
            with torch.no_grad():  # the target stays in train mode: batch statistics, its own running averages
                z1, z2 = (self.target["g"](self.target["f"](v)) for v in views)  # [B, D]
            features = z1
            l_d = regression_loss(p1, z2) + regression_loss(p2, z1)  # L_D: BYOL, eq. 2, symmetrized
            loss, self.parts["l_d"] = self.weights["d"] * l_d, l_d.detach()
        if self.decoder:
            # A recovered view is compared with its own original only (sec. 3.4). The decoder's BatchNorm takes its
            # statistics per view, too; the evaluator's is frozen, so both views go through it in one batch.
            x = torch.cat(views)  # [2B, 3, S, S]
            x_ = torch.cat([self.decoder(self.bottleneck(m)) for m in (m1, m2)])  # x~
            terms = {"pixel": F.mse_loss(x_, x)}  # means over all elements, as in the official code
            if self.h:
                with torch.set_grad_enabled(not self.h.frozen and torch.is_grad_enabled()):
                    maps, semantic = self.h(x)
                again = functools.partial(checkpoint, self.compare, use_reentrant=False, preserve_rng_state=False)
                compare = again if self.h.recompute else self.compare
                terms["maps"], terms["semantic"] = compare(x_, semantic, *maps)
            # eq. 4, summed over the two views: twice the mean over 2B
            loss = loss + 2 * sum(self.weights[k] * term for k, term in terms.items() if self.weights[k])
            self.parts |= {k: term.detach() for k, term in terms.items()}
        features = F.normalize(features.detach().float(), dim=1)
        self.feature_std = features.std(0).mean() * features.shape[1] ** 0.5  # 1: spread, 0: collapsed
        return loss

    @torch.no_grad()
    def update_target(self, tau):
        """xi <- tau xi + (1 - tau) theta (BYOL, eq. 1), parameters only: the target has its own BatchNorm averages."""
        xi = list(self.target.parameters())
        theta = [*self.f.parameters(), *self.g.parameters()]
        torch._foreach_lerp_(xi, theta, 1 - tau)


# ============ the evaluator (stage 1); reading runs ============


def stage_1(args, rank):
    """The folder, beside --out, of a finished BYOL run on the same data. If there is none, byol.main trains it first.
    None if a signal stopped that. Collective."""
    parts = ["byol", training.name_of(args.data), args.evaluator_arch, args.evaluator_epochs]
    out = Path(args.out).absolute().parent / "-".join(str(part) for part in parts if part)
    checkpoint = out / "checkpoint.pt"
    try:
        found = runs.load(checkpoint) if checkpoint.exists() else {}
    except EOFError:
        found = {}  # byol.main deals with a damaged checkpoint
    asked, old = vars(args), found.get("settings", vars(args))
    if any(os.path.realpath(str(old.get(k))) != os.path.realpath(str(asked[k])) for k in ("data", "limit", "size")):
        has = " ".join(f"--{k} {old.get(k)}" for k in ("data", "limit", "size"))
        common.fail(f"{out} holds a run with {has}; name an evaluator with --evaluator, or choose another --out")
    if not common.any_rank(found.get("result")):
        if rank == 0:
            print(f"stage 1: training the evaluator, a BYOL run, in {out} (--evaluator names another)", flush=True)
        flags = ["--out", str(out), "--arch", args.evaluator_arch or args.arch, "--amp" if args.amp else "--no-amp"]
        flags += ["--epochs", str(args.evaluator_epochs)] if args.evaluator_epochs else []
        flags += [f"--{name.replace('_', '-')}" for name in ("in_memory", "changed_data", "dry_run", "compile")
                  if getattr(args, name)]  # fmt: skip
        shared = "data recipe root limit workers seed device size batch_size accumulate log_every"
        for name in args.given.intersection(shared.split()):  # the others have the same defaults
            flags += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        stopped = byol.main([*flags, "--probes", *args.probes])
        gc.collect()  # frees its model and ends its loader workers
        if args.dry_run:
            return f"random:{args.evaluator_arch or args.arch}"
        if stopped:
            return None
    return str(out)


def check_levels(args, backbone):
    with torch.no_grad():
        stages = len(backbone.eval().stages(torch.zeros(1, 3, args.size, args.size)))
    if not all(0 <= level < stages for level in args.levels):
        common.fail(f"--levels {args.levels}: the evaluator has {stages} stages, counted from 0")


def open_evaluator(args, name):
    """(Evaluator, its description) from `name`: a run, a file or random:ARCH. Weights that do not fit are an error."""
    # With f's seed a random evaluator of the same architecture would have f's initial weights.
    backbone, preprocess, about, path = checkpoints.open_backbone(name, None, args.size, args.seed + 1000)
    if path and about.get("method") != "byol":
        method = about.get("method", "something else")
        common.fail(f"--evaluator {name} was trained by {method}; a BYOL run is needed (sec. 3.4)")
    if path and about["preprocess"]["size"] != args.size:
        common.fail(f"--evaluator {name} was trained at {about['preprocess']['size']} px, --size is {args.size}")
    check_levels(args, backbone)
    projector = None
    if args.semantic == "projector":
        if not path or not (path.parent / "checkpoint.pt").exists():
            common.fail(f"--semantic projector: {name} has no checkpoint.pt with a projector")
        found = runs.load(path.parent / "checkpoint.pt", "model")["model"]
        weights = {k.removeprefix("g."): v for k, v in found.items() if k.startswith("g.")}
        projector = mlp(backbone.dim, len(weights["0.weight"]), len(weights["3.weight"]))
        projector.load_state_dict(weights)
    description = f"{name}: {about['arch']}, BYOL for {about['epoch']} epochs" if path else name
    frozen, recompute = not args.train_evaluator, args.checkpoint_activations
    return Evaluator(backbone, preprocess, args.levels, projector, frozen, recompute), description


def autoencoder(folder):
    """The Autoencoder of a run, on the CPU and in eval mode; analysis/reconstruct.py reads it."""
    try:
        found = runs.load(Path(folder, "checkpoint.pt"), "settings", "model")
    except EOFError as error:  # the decoder is in no other file
        common.fail(f"the decoder cannot be read: {error}")
    s = found["settings"]
    backbone = backbones.build(s["arch"], s["size"])
    weights = {k: v for k, v in found["model"].items() if k.startswith(("f.", "bottleneck.", "decoder."))}
    if not any(k.startswith("decoder.") for k in weights):
        common.fail(f"{folder} was trained without L_G and has no decoder")
    net = Autoencoder(backbone, *build_decoder(backbone, s["size"], s["bottleneck"], s["width"], s["pool"]))
    net.load_state_dict(weights)
    return net.eval()


# ============ the run ============


def main(argv=None):
    args = parse_args(argv)
    weights = {term: getattr(args, f"weight_{term}") for term in TERMS}
    if not any(weights.values()):
        common.fail("--weight-d and all weights of L_G are 0: nothing is left to train")
    rank, world, device = common.setup(args.device)
    args.amp = common.bf16_is_fast(device) if args.amp is None else args.amp
    uses_evaluator = weights["maps"] > 0 or weights["semantic"] > 0
    uses_decoder = uses_evaluator or weights["pixel"] > 0
    classifier = reconstruct.open_classifier(args.classifier).to(device) if args.classifier else None
    source = args.evaluator
    if uses_evaluator and not source:
        # Refuse settings that do not fit the networks now, not after stage 1.
        build_decoder(backbones.build(args.arch, args.size), args.size, args.bottleneck, args.width, args.pool)
        check_levels(args, backbones.build(args.evaluator_arch or args.arch, args.size))
        source = stage_1(args, rank)
        if not source:
            return common.STOPPED

    # ============ data ============
    views = [data.view(args.size, **v) for v in RECIPES[args.recipe]["views"]]
    train, labelled, test = sets.splits(args, device)
    per_pass = training.images_per_pass(args, world, len(train))
    loader = data.Loader(train, views, per_pass, args.seed, rank, world, args.workers, device)
    preprocess = {"mean": views[0]["mean"], "std": views[0]["std"], "size": args.size, "interpolation": "bilinear"}

    # ============ model ============
    evaluator, description = open_evaluator(args, source) if uses_evaluator else (None, "none")
    description = "stage 1's BYOL run" if args.dry_run and uses_evaluator and not args.evaluator else description
    if classifier:
        reconstruct.check_classifier(classifier, test)
    torch.manual_seed(args.seed)  # the same initial weights on every rank
    backbone, decoder = backbones.build(args.arch, args.size), ()
    if uses_decoder:
        decoder = build_decoder(backbone, args.size, args.bottleneck, args.width, args.pool)
        nn.ModuleList(decoder).requires_grad_(not args.freeze_decoder)
    model = SaGe(backbone, args.hidden, args.dim, weights, *decoder, evaluator=evaluator)
    model.to(device, memory_format=torch.channels_last)
    if uses_evaluator and source.startswith("random:") and not args.dry_run:
        some = torch.randperm(len(train), generator=data.generator(args.seed, "calibrate"))[:512]
        evaluator.calibrate(next(data.batches(train, preprocess, 512, device, indices=some))[0])
    ddp = model
    if world > 1:
        if device.type == "cuda":  # the paper's BatchNorm sees the global batch; there is no such layer for the CPU
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        ids = [device.index] if device.type == "cuda" else None
        # Stages of a trained evaluator that are not among --levels get no gradient.
        ddp = DistributedDataParallel(model, device_ids=ids, find_unused_parameters=args.train_evaluator)
    if args.compile:
        model.compile()  # in place: the names in state_dict() stay

    # ============ optimizer ============
    lr, decoder_lr = args.lr * args.batch_size / 256, args.decoder_lr * args.batch_size / 256
    groups = optim.param_groups(nn.ModuleList([model.f, model.g]), args.weight_decay, lr_factor=1.0)
    groups += optim.param_groups(model.q, args.weight_decay, lr_factor=args.predictor_lr)
    if args.train_evaluator and uses_evaluator:
        groups += optim.param_groups(model.h, args.weight_decay, lr_factor=1.0)
    optimizers = {"optimizer": optim.OPTIMIZERS[args.optimizer](groups, lr=lr)}
    if uses_decoder and not args.freeze_decoder:  # sec. 4.1: Adam, no decay
        parameters = [*model.bottleneck.parameters(), *model.decoder.parameters()]
        optimizers["decoder_optimizer"] = torch.optim.Adam(parameters, lr=decoder_lr)

    # ============ run: print the recipe, go on from a checkpoint ============
    run = training.Run(METHOD, args, model, optimizers, loader, views, preprocess, labelled, test, device)
    millions = [f"{sum(p.numel() for p in m.parameters()) / 1e6:.2f} M" for m in decoder]
    rate = f"adam lr {args.decoder_lr:g} x {args.batch_size} / 256 = {decoder_lr:.4g}"
    run.describe(
        f"lr {args.lr:g} x {args.batch_size} / 256 = {lr:.4g}, {run.warmup} steps of warm-up, q {args.predictor_lr:g}x",
        f"{args.optimizer}: {optim.count(optimizers['optimizer'])}; tau {args.tau:g} -> 1",
        f"parameters of bottleneck, decoder: {' '.join(millions)}; {'frozen' if args.freeze_decoder else rate}",
        f"evaluator {description}; weights {', '.join(f'{k} {w:g}' for k, w in weights.items())}",
        "chance-level L_D 4",
    )
    if not run.begin():
        return

    def picture():
        if uses_decoder and rank == 0:
            net = Autoencoder(model.f, model.bottleneck, model.decoder)
            image = reconstruct.draw_recoveries({"": net}, test, views, device, classifier, amp=args.amp)
            run.log.image("reconstructions", image, run.step)

    # ============ training ============
    while run.is_training():
        if run.probe_is_due():
            run.probe()
            picture()
        for step in run.epoch():
            lr_now = optim.cosine(step, run.total, lr, 0.0, run.warmup)
            for group in optimizers["optimizer"].param_groups:
                group["lr"] = lr_now * group["lr_factor"]
            if "decoder_optimizer" in optimizers:  # constant (sec. 4.1) after the warm-up (code)
                [group] = optimizers["decoder_optimizer"].param_groups
                group["lr"] = decoder_lr * (step / run.warmup if step < run.warmup else 1)
            for _, _, xs in run.passes(ddp):
                with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                    loss = ddp(xs) / args.accumulate
                loss.backward()
                run.log.loss += loss.detach()
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
            tau = optim.cosine(step, run.total, args.tau, 1.0)  # BYOL, sec. 3.3
            model.update_target(tau)  # after the step, as in the official code
            run.end_step(lr_now, tau=tau, feature_std=model.feature_std, **model.parts)
        run.save()
    if run.stopped:
        return common.STOPPED
    picture()
    run.finish()


if __name__ == "__main__":
    common.run(main)
