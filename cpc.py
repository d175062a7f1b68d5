"""CPC: Contrastive Predictive Coding (van den Oord et al., 2018, https://arxiv.org/abs/1807.03748), and CPC v2:
Data-Efficient Image Recognition with Contrastive Predictive Coding (Henaff et al., 2019,
https://arxiv.org/abs/1905.09272).

An image is cut into a grid of overlapping patches. From the upper rows, predict the features of patches further down,
well enough to identify the true patch among all patches of the batch. Features shared by distant patches, those of the
object or texture, can be predicted; local noise cannot.

    image -> G x G patches -> f (g_enc) -> z [G, G] --> g (g_ar), rows up to i -> c_ij -> W_k c_ij = z^_(i+k,j)
                                            |                                                  |
                                            '--> z_(i+k,j) and all other patches of the batch -'  cross-entropy of z^.z
    v2: also upwards, to the left and to the right, on the grid rotated by 180, 90 and 270 degrees

    differences          paper                          no official code; used:   here (more in docs/cpc.md)
    f of v1              ResNet-101 v2 without norm,    pre-activation, 3         ResNet-50 v2 without norm, 2048-d;
                         3 stages, 1024-d               stages, 1024-d            residual branches start at 0 (Fixup)
    f of v2              ResNet-161, 4096-d; also       -                         ResNet-50; layer norm over one patch
                         ResNet-50; layer norm
    g of v1              "PixelCNN-style"               4 gated layers as wide    4 gated layers of 256 channels
                                                        as z                      (--context-width) between 1x1 layers
    negatives            other patches and images       v1: 16 drawn,             all targets of the batch, on all ranks
                                                        v2: all of the batch
    patches of v1        60 of 64 px at random, padded  STL-10: whole             as the paper; whole at 32 px
    patches of v2        AutoAugment, elastic, shear,   -                         color jitter .8 (Szegedy et al.) and
                         histogram, color .8, gray .25                            grayscale .25 only
    optimizer            Adam; v2: beta_1 .8, clipped,  v1: Adam                  AdamW, beta_1 .9, clipped in v2,
                         Polyak average .9999                                     cosine schedule; no weight averaging
    representation       v1: mean of z; v2: classifier  -                         mean of z over the grid (evaluate.py)
                         per patch, mean of logits

"Used": for v1 the CPC of Greedy InfoMax's release (STL-10), for v2 the pseudo-code of its appendix.

Measured with this file (k-NN: 20 neighbors; random init -> trained; protocols and curves in results/README.md):

    command                              network, epochs       seed  k-NN          linear  device
    python cpc.py                        resnet10_16_ln, 8     0     15.8 -> 48.8  60.1    2 CPU cores, 4.0 min, 102c386
    the same                             resnet10_16_ln, 8     0     15.8 -> 47.8  60.4    1 CPU core, 5 min
    python cpc.py --v 1                  resnet10_16_nobn, 12  0     19.0 -> 32.9  51.7    the same, 5 min
    imagenette at 96 px, 5 x 5 of 24 px  resnet10_16_ln, 10    0     33.2 -> 35.9  44.2    the same, 6 min

    python cpc.py                                                            v2 on shapes, minutes on a laptop
    python cpc.py --v 1                                                      v1
    torchrun --standalone --nproc_per_node=8 cpc.py --data imagenet --root DIR
"""

import math
import types

import torch
import torch.nn.functional as F
from torch import nn

import backbones
import checkpoints
import common
import data
import optim
import parallel
import sets
import training

METHOD = "cpc"

# ============ recipes: one per data regime; every entry but `views` is the default of a flag ============

# Views are crops in [0, 1]; patches are augmented independently and then normalized to [-1, 1].
PLAIN = dict(interpolation="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
V1 = dict(context="pixelcnn", directions=1, target_dim=0, patch_jitter=0.0, patch_gray=0.0)
V2 = dict(context="rows", directions=4, target_dim=64, border=0)
COLOURS = dict(patch_jitter=0.8, patch_gray=0.25)  # v2, appendix
RECIPES = {
    # Quick on a CPU, so unlike the paper: a small network, a high learning rate, crops of any scale, few patches, each
    # with colors of its own, because otherwise brightness and color are all that is learned (docs/cpc.md).
    "shapes": dict(
        arch="resnet10_16_ln", size=32, epochs=8, batch_size=64, optimizer="adamw", lr=4e-3, weight_decay=1e-4,
        warmup_epochs=1.0, clip=0.0, v=2, patch=12, stride=5, steps=2, context_width=32, **V2, eval_every=2,
        patch_jitter=1.0, patch_gray=0.5,
        views=[dict(scale=(0.6, 1.0), **PLAIN)],
    ),
    # Derived from the ImageNet recipe; not run yet.
    "cifar10": dict(
        arch="resnet18_ln", size=32, epochs=200, batch_size=256, optimizer="adamw", lr=4e-4, weight_decay=0.0,
        warmup_epochs=5, clip=0.01, v=2, steps=3, context_width=256, **V2, **COLOURS, eval_every=10,
        views=[dict(scale=(0.6, 1.0), **PLAIN)],
    ),
    # v2, appendix: Adam, 4e-4 for a batch of 512, 200 epochs, clipped; pseudo-code: one prediction step, 256 channels.
    "imagenet": dict(
        arch="resnet50_ln", size=260, epochs=200, batch_size=512, optimizer="adamw", lr=2e-4, weight_decay=0.0,
        warmup_epochs=0, clip=0.01, v=2, steps=1, context_width=256, **V2, **COLOURS, eval_every=10,
        views=[dict(scale=((260 / 300) ** 2,) * 2, ratio=None, **PLAIN)],  # 260 px of 300
    ),
}  # fmt: skip
OTHER_VERSION = {  # what --v changes in a recipe of the other version
    "shapes": {1: dict(  # unlike v1, the brightness of each patch is jittered
        V1 | dict(patch_jitter=1.0), arch="resnet10_16_nobn", border=0, epochs=12,
        views=[dict(scale=(0.6, 1.0), gray=1.0, **PLAIN)],
    )},
    "folder": {1: dict(V1, arch="resnet10_32_nobn", border=0, views=[dict(scale=(0.6, 1.0), gray=1.0, **PLAIN)])},
    "cifar10": {1: dict(
        V1, arch="resnet18_nobn", lr=2e-4, clip=0.0, steps=5, border=0,
        views=[dict(scale=(0.6, 1.0), gray=1.0, **PLAIN)],
    )},
    "imagenet": {1: dict(  # v1, sec. 3.2: Adam, 2e-4 for a batch of 32 x 16; gray, 256 px of 300, patches 60 px of 64
        V1, arch="resnet50v2_k4_nobn", size=256, lr=1e-4, clip=0.0, steps=5, border=2,
        views=[dict(scale=((256 / 300) ** 2,) * 2, ratio=None, gray=1.0, **PLAIN)],
    )},
}  # fmt: skip
TURNS = {1: (0,), 2: (0, 2), 4: (0, 1, 2, 3)}  # --directions: by how many times 90 degrees the grid is rotated
SZEGEDY = (32 / 255, 0.5, 0.5, 0.2)  # brightness, contrast, saturation, hue (TF-slim's)
JITTER = {"shapes": (0.4, 0.4, 0.4, 0.5)}  # of patches, where it is not that of Szegedy et al.
SCALE = 0.1  # factor on predictions (v2, pseudo-code), so that all logits are nearly equal at first
# A folder of photographs, for a laptop or one GPU: the small network's numbers, the paper's views.
RECIPES["folder"] = (
    RECIPES["shapes"] | training.FOLDER | dict(arch="resnet10_32_ln", patch=24, stride=18, steps=3, **COLOURS)
)


def recipe_of(name, v=None):
    """The recipe as in version `v` of the paper."""
    return RECIPES[name] | OTHER_VERSION.get(name, {}).get(v, {}) | ({"v": v} if v in (1, 2) else {})


def views_of(args):
    return [data.view(args.size, **v) for v in recipe_of(args.recipe, args.v)["views"]]


def parse_args(argv=None):
    p, known = training.flags(METHOD, __doc__, RECIPES, argv, (("--v", "--version"), {"type": int}))
    p.add_argument("--clip", type=float, help="largest norm of the gradient (0: no clipping)")
    # CPC
    # --version: under torchrun --v is ambiguous, as it also abbreviates torchrun's own flags
    p.add_argument("--v", "--version", type=int, choices=(1, 2), help="of the paper; sets the other defaults")
    p.add_argument("--patch", type=int, help="side of a patch in px (default: the recipe's, or by --size and --v)")
    p.add_argument("--stride", type=int, help="px from one patch to the next (default: as --patch)")
    p.add_argument("--border", type=int, help="crop patches at random by this many px on each side, then pad")
    p.add_argument("--patch-jitter", type=float, help="probability of color jitter, for each patch independently")
    p.add_argument("--patch-gray", type=float, help="probability of grayscale, for each patch independently")
    p.add_argument("--context", choices=CONTEXTS, help="g, the context network: of v1 (pixelcnn) or of v2 (rows)")
    p.add_argument("--context-width", type=int, help="hidden channels of g")
    p.add_argument("--directions", type=int, choices=TURNS, help="of prediction. 1: down, 2: also up, 4: also sideways")
    p.add_argument("--skip", type=int, help="rows skipped before the first predicted one (default: those that overlap)")
    p.add_argument("--steps", type=int, help="K, rows predicted after the skipped ones; distant ones are harder")
    p.add_argument("--target-dim", type=int, help="width that targets z are projected to (0: no projection, v1)")
    args = training.parse(p, METHOD, recipe_of(known.recipe, known.v), argv)
    if args.patch is None or args.stride is None:
        patch, stride = layout(args.size, args.v)
        args.patch = patch if args.patch is None else args.patch
        args.stride = stride if args.stride is None else args.stride
    common.at_least(4, args, "patch")
    common.at_least(1, args, "steps", "context_width", "stride")
    rows = rows_of(args.size, args.patch, args.stride)
    if args.skip is None:
        args.skip = math.ceil(args.patch / args.stride) - 1
    common.at_least(0, args, "clip", "border", "target_dim", "skip")
    common.at_least(0, args, "patch_jitter", "patch_gray", most=1)
    if args.steps > (most := rows - 1 - args.skip):
        left = f"{max(most, 0)} of {rows} rows are left to predict after the first and --skip {args.skip}"
        common.fail(f"--steps {args.steps}: {left}")
    if 2 * args.border > args.patch - 4:
        common.fail(f"--border {args.border}: it leaves less than 4 px of a patch of {args.patch} px")
    return args


# ============ the method ============


def layout(size, v):
    """(patch, stride) in px for views of `size` px. v1, a grid of 7 x 7: (64, 32) at 256 px, (24, 12) at 96, (16, 8) at
    64, (8, 4) at 32. v2, a grid of 6 x 6: (80, 36) at 260 px, (36, 12) at 96, (24, 8) at 64, (12, 4) at 32."""
    if (size, v) == (260, 2):
        return 80, 36
    if size < 32 or size % 8:
        known = "32 px and more, multiples of 8 (v2: also 260)"
        common.fail(f"--size {size}: no default grid (they exist for {known}); set --patch and --stride")
    return (2 if v == 1 else 3) * size // 8, size // 8


def rows_of(size, patch, stride):
    """G, the number of rows and of columns in the grid of patches that covers an image of `size` px."""
    if patch > size:
        common.fail(f"--patch {patch} is larger than --size {size}")
    rows, rest = divmod(size - patch, stride)
    if rest:
        fit = f"{size - rest} or {size - rest + stride} px"
        common.fail(f"--size {size}: patches of {patch} px, one every {stride} px, fit {fit}")
    if rows == 0:
        common.fail(f"--patch {patch}: an image of {size} px has one row of patches, and CPC needs two")
    return rows + 1


def cut_grid(x, shift, patch, stride, border):
    """Cut images x [B, 3, S, S] into patches, row by row, cropped to p = patch - 2 border px: [B * G * G, 3, p, p].
    shift [B, G * G, 2], 0 to 2 border: offset of the crop in its patch, down and right."""
    p, rows = patch - 2 * border, torch.arange(0, x.shape[-1] - patch + 1, stride, device=x.device)
    corner = torch.cartesian_prod(rows, rows) + shift  # [B, G * G, 2]
    windows = x.unfold(2, p, 1).unfold(3, p, 1)  # [B, 3, S - p + 1, S - p + 1, p, p], a view
    image = torch.arange(len(x), device=x.device)[:, None]
    return windows[image, :, corner[..., 0], corner[..., 1]].flatten(0, 1)


def gate(x):
    a, b = x.chunk(2, 1)
    return a.tanh() * b.sigmoid()


class GatedLayer(nn.Module):
    """A layer of the gated PixelCNN (van den Oord et al. 2016, https://arxiv.org/abs/1606.05328, fig. 2), masked only
    for rows below: a vertical stack v, of 3x3 convolutions without their last row, feeds a horizontal stack h."""

    def __init__(self, width):
        super().__init__()
        self.vertical = nn.Conv2d(width, 2 * width, (2, 3))
        self.horizontal = nn.Conv2d(width, 2 * width, (1, 3), padding=(0, 1))
        self.across, self.out = nn.Conv2d(2 * width, 2 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, v, h):
        v = self.vertical(F.pad(v, (1, 1, 1, 0)))  # zeros above, none below
        return gate(v), h + self.out(gate(self.horizontal(h) + self.across(v)))


class PixelCNN(nn.Module):
    """g of v1: z [B, C, G, G] -> c [B, width, G, G]; c_ij depends on rows up to i."""

    def __init__(self, inputs, width, layers=4):
        super().__init__()
        self.first, self.last, self.dim = nn.Conv2d(inputs, width, 1), nn.Conv2d(width, width, 1), width
        self.layers = nn.ModuleList(GatedLayer(width) for _ in range(layers))

    def forward(self, z):
        v = h = self.first(z)
        for layer in self.layers:
            v, h = layer(v, h)
        return self.last(h)


class RowNetwork(nn.Module):
    """g of v2 (pseudo-code): z [B, C, G, G] -> c [B, C, G, G]; c_ij depends on rows up to i."""

    def __init__(self, inputs, width, blocks=5):
        super().__init__()
        self.dim = inputs
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs, width, 1), nn.ReLU(inplace=True), nn.Conv2d(width, width, (1, 3), padding=(0, 1)),
                nn.ZeroPad2d((0, 0, 1, 0)), nn.Conv2d(width, width, (2, 1)), nn.ReLU(inplace=True),  # rows i - 1, i
                nn.Conv2d(width, inputs, 1),
            ) for _ in range(blocks)
        )  # fmt: skip

    def forward(self, z):
        for block in self.blocks:
            z = z + block(z)
        return z.relu()


CONTEXTS = {"pixelcnn": PixelCNN, "rows": RowNetwork}


def info_nce_loss(p, targets, labels):
    """InfoNCE (v1, eq. 4): cross-entropy of the true target among all, with logits p.z. p [n, D], targets [N, D],
    labels [n]. Returns (loss, accuracy), means over n."""
    logits = p @ targets.T  # [n, N]
    return F.cross_entropy(logits, labels), (logits.detach().argmax(1) == labels).float().mean()


class CPC(nn.Module):
    """Encoder f, context network g and W_k; `forward((x,), key)` is the loss of images x in [0, 1]. `key`, different
    integers in each pass, seeds the augmentation of patches. In eval mode there is none."""

    def __init__(self, backbone, args):
        super().__init__()
        self.patch, self.stride, self.border = args.patch, args.stride, args.border
        self.rows, self.skip, self.steps = rows_of(args.size, args.patch, args.stride), args.skip, args.steps
        self.turns, dim = TURNS[args.directions], args.target_dim or backbone.dim
        self.augmentation = data.view(
            args.patch - 2 * args.border, jitter=JITTER.get(args.recipe, SZEGEDY), jitter_p=args.patch_jitter,
            gray=args.patch_gray, mean=data.HALF, std=data.HALF,
        )  # fmt: skip
        self.f, self.g = backbone, CONTEXTS[args.context](backbone.dim, args.context_width)
        self.target = nn.Linear(backbone.dim, dim) if args.target_dim else nn.Identity()
        # For each direction all K matrices W_k in one layer.
        self.W = nn.ModuleList(nn.Conv2d(self.g.dim, self.steps * dim, 1, bias=False) for _ in self.turns)

    def patches(self, x, key):
        """Images [B, 3, S, S] in [0, 1] -> patches for f, [B * G * G, 3, patch, patch] in [-1, 1], row by row."""
        border, n = self.border * self.training, self.rows**2
        g = data.generator("patches", *key, common.rank())
        shift = torch.randint(2 * border + 1, (len(x), n, 2), generator=g).to(x.device, non_blocking=True)
        x = cut_grid(x, shift, self.patch, self.stride, border)
        if not self.training:
            return data.normalize(x, data.HALF, data.HALF)
        return F.pad(data.augment(x, self.augmentation, g), [border] * 4)

    def predictions(self, z):
        """Grid z [B, C, G, G] -> for each direction and step (predictions [B, n, D], target [n]), where `target` is the
        place of the predicted patch in z, counted row by row."""
        c = self.g(torch.cat([z.rot90(turn, (2, 3)) for turn in self.turns]))  # prediction is always downwards
        grid, predictions = torch.arange(self.rows**2, device=z.device).view(self.rows, -1), []
        for turn, W, c_turned in zip(self.turns, self.W, c.chunk(len(self.turns)), strict=True):
            z_hat, place = W(c_turned).unflatten(1, (self.steps, -1)), grid.rot90(turn)  # [B, K, D, G, G], [G, G]
            for k in range(self.steps):
                ahead = 1 + self.skip + k  # rows from the context down to the target
                predictions.append((z_hat[:, k, :, :-ahead].flatten(2).transpose(1, 2), place[ahead:].flatten()))
        return predictions

    def forward(self, views, key=(0,)):
        (x,), n = views, self.rows**2
        z = self.f(self.patches(x, key)).unflatten(0, (-1, n))  # [B, G * G, C]
        predictions, t = self.predictions(z.transpose(1, 2).unflatten(2, (self.rows, -1))), self.target(z)
        with torch.autocast(z.device.type, enabled=False):
            t = t.float()  # [B, G * G, D]
            candidates = common.gather(t).flatten(0, 1)  # [N, D]; gradients flow back to the rank of each
            # Place of an image in the batch of all ranks, [B, 1].
            image = common.rank() * len(x) + torch.arange(len(x), device=x.device)[:, None]
            terms = [info_nce_loss(SCALE * p.float().flatten(0, 1), candidates, (n * image + target).flatten())
                     for p, target in predictions]  # fmt: skip
            loss, right = (torch.stack(values).mean() for values in zip(*terms, strict=True))
        with torch.no_grad():
            unit = F.normalize(t.flatten(0, 1), dim=1)
            self.figures = {
                "bound": math.log(len(candidates)) - loss,  # on the mutual information, nats (v1, eq. 5)
                "right": 100 * right,  # accuracy in per cent
                "feature_std": unit.std(0).mean() * unit.shape[1] ** 0.5,  # 1: spread, 0: collapsed
            }
        return loss


def seen(args, xs, views, g):
    """What f sees, for `python data.py show`."""
    patches = CPC(types.SimpleNamespace(dim=1), args).patches(xs[0], (args.seed,)) / 2 + 0.5
    return {"view 1": data.pixels(xs[0], views[0]), "patches": data.tiles(patches, len(xs[0]))}


# ============ the run ============


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = common.setup(args.device)
    args.amp = common.bf16_is_fast(device) if args.amp is None else args.amp

    # ============ data ============
    views = views_of(args)
    train, labelled, test = sets.splits(args, device)
    per_pass = training.images_per_pass(args, world, len(train))
    loader = data.Loader(train, views, per_pass, args.seed, rank, world, args.workers, device)
    preprocess = {"mean": data.HALF, "std": data.HALF, "size": args.size, "interpolation": "bilinear"}
    gray = 1 in (views[0]["gray"], args.patch_gray)
    preprocess["sees"] = {"patch": args.patch, "stride": args.stride, "gray": gray}

    # ============ model ============
    torch.manual_seed(args.seed)  # the same initial weights on every rank
    f = backbones.build(args.arch, args.patch)
    if any(isinstance(m, nn.BatchNorm2d) for m in f.modules()):
        common.fail(f"--arch {args.arch}: BatchNorm leaks information between patches; add _ln or _nobn to the name")
    model = CPC(f, args).to(device, memory_format=torch.channels_last)
    f = checkpoints.as_trained(model.f, preprocess)  # for the probes
    ddp = model
    if world > 1:
        ddp = parallel.wrap(model, device)
    if args.compile:
        model.f.compile(), model.g.compile()  # in place: the names in state_dict() stay

    # ============ optimizer ============
    lr = args.lr * args.batch_size / 256
    optimizer = optim.OPTIMIZERS[args.optimizer](optim.param_groups(model, args.weight_decay), lr=lr)

    # ============ run: print the recipe, go on from a checkpoint ============
    run = training.Run(
        METHOD, args, model, {"optimizer": optimizer}, loader, views, preprocess, labelled, test, device,
        backbone=f, built_for=args.patch,
    )  # fmt: skip
    ahead = f"{1 + args.skip} to {args.steps + args.skip}" if args.steps > 1 else f"{1 + args.skip}"
    candidates = world * per_pass * model.rows**2
    targets = sum(model.rows * (model.rows - args.skip - k) for k in range(1, args.steps + 1))  # per image, direction
    predictions = targets * args.directions * per_pass
    run.describe(
        f"v{args.v}: {model.rows} x {model.rows} patches of {args.patch} px, stride {args.stride}; predicts "
        f"{ahead} rows ahead in {args.directions} directions",
        f"lr {args.lr:g} x {args.batch_size} / 256 = {lr:.4g}, {run.warmup} steps of warm-up",
        f"{args.optimizer}: {optim.count(optimizer)}",
        f"{predictions} predictions a pass and rank, {candidates} candidates: "
        f"logits of {predictions * candidates * 4 / 1e6:.1f} MB",
        f"chance-level loss ln(N) = {math.log(candidates):.2f}",
        forward=lambda m, xs: m.eval()(xs),  # without the augmentation of patches, which keeps nothing
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
            for key, _, xs in run.passes(ddp):
                with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                    loss = ddp(xs, (args.seed, *key)) / args.accumulate
                loss.backward()
                run.log.loss += loss.detach()
            if args.clip:
                nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            optimizer.zero_grad()
            run.end_step(lr_now, **model.figures)
        run.save()
    if run.stopped:
        return common.STOPPED
    run.finish()


if __name__ == "__main__":
    common.run(main)
