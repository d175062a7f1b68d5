"""Pretext tasks: rotation, exemplar, jigsaw, relative patch location, colorization, and the study that compares them:
Revisiting Self-Supervised Visual Representation Learning (Kolesnikov, Zhai, Beyer, 2019,
https://arxiv.org/abs/1901.09005).

The tasks are those of Gidaris et al. 2018 (rotation), Dosovitskiy et al. 2014 (exemplar), Noroozi and Favaro 2016
(jigsaw), Doersch et al. 2015 (relative patch location) and Zhang, Isola, Efros 2016 (colorization).

Predict something about an unlabeled image that is known by construction: how it was rotated, where a patch was, which
color it had. The answers are discarded, the features are kept. The study finds that the network architecture matters as
much as the task.

    rotation      image -> 4 rotations          -> f -> linear -> which rotation
    exemplar      image -> 8 augmented copies   -> f -> linear -> L2 -> triplet loss, copies against other images
    jigsaw        image -> 3 x 3 patches, each  -> f -> linear -> concat in permuted order -> MLP -> which permutation
    relative      image -> 3 x 3 patches, each  -> f -> linear -> concat neighbor and center -> MLP -> which neighbor
    colorization  lightness                     -> f's last map -> deconvolution -> color bin of every fourth pixel

    differences              paper                       official code             here (more in docs/pretext.md)
    exemplar: normalization  -                           each dimension over the   each embedding; --normalize batch is
                                                         batch                     the code's
    exemplar: triplets       of the batch                of one device's images    negatives from all ranks
    patches: grayscale       independent, p = 2/3        whole image, p = 0.66     independent, p = 2/3 (--color)
    patches: weight decay    -                           head 5e-4, 5 x the trunk  head as the trunk
    colorization (Zhang)     5 nearest of 313 bins       10 nearest                5 nearest
      network                VGG-like                    dilated                   any backbone but a VGG
    BatchNorm                -                           momentum 0.01, eps 1e-3   torch's: 0.1, 1e-5
    weight decay             L2, convolutions            not the RevNet's root     all weights of 2 or more dimensions

Measured with this file (k-NN: 20 neighbors; random init -> trained; more in results/README.md):

    command                                        epochs  seed  pretext accuracy  k-NN          linear  device, commit
    python pretext.py (shapes-natural)             10      0     39.6 (chance 25)  26.1 -> 69.4  67.6    1 core, d5b0b69
    python pretext.py --task exemplar              6       0     98.2 (1.4)        15.8 -> 54.1  56.2    the same
    python pretext.py --task jigsaw                10      0     57.6 (1)          19.3 -> 35.3  41.8    the same
    python pretext.py --task relative              10      0     41.0 (12.5)       19.3 -> 31.5  43.1    the same
    python pretext.py --task colorization (natural) 10     0     4.2 (1.1)         57.0 -> 90.6  96.4    the same
    imagenette at 96 px, rotation, resnet10_32     20      0     60.7 (25)         35.8 -> 47.1  54.3    1 core, 0617bdd
    imagenette at 96 px, jigsaw, resnet10_32_s8    20      0     29.5 (1)          33.9 -> 44.1  55.6    the same
    imagenette at 96 px, relative, resnet10_32_s8  20      0     34.2 (12.5)       33.9 -> 47.6  55.2    the same

    python pretext.py                                                        rotation, on upright shapes
    python pretext.py --task jigsaw                                          or exemplar, relative, colorization
    python pretext.py --task rotation --data DIR --arch revnet50_k4          any folder, any backbone (backbones.py)
    torchrun --standalone --nproc_per_node=8 pretext.py --task rotation --data imagenet --root DIR
    python -m experiments.study                                              which backbone suits which task
"""

import functools
import itertools
import math
import re
import types

import torch
import torch.nn.functional as F
from torch import nn

import backbones
import checkpoints
import common
import data
import evaluate
import optim
import parallel
import sets
import training

METHOD = "pretext"

# ============ recipes: one per data regime; every entry but `views` is the default of a flag ============

HALF = dict(interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)  # pixels in [-1, 1] (code)
INCEPTION = dict(scale=(0.05, 1.0), jitter=(32 / 255, 0.5, 0.5, 0.2), jitter_p=1.0, **HALF)  # TF-slim's
RECIPES = {
    # Quick on a CPU, so unlike the paper: AdamW, a small network, cosine.
    "shapes": dict(
        task="rotation", arch="resnet10_16", size=32, epochs=10, batch_size=64, optimizer="adamw", lr=4e-3,
        weight_decay=1e-4, warmup_epochs=1.0, drop_at=[], embedding=64, head=256, eval_every=2,
        views=[dict(scale=(0.6, 1.0), jitter=(0.4, 0.4, 0.4, 0.5), jitter_p=1.0, **HALF)],
    ),
    # Made from the ImageNet recipe; as a whole not run yet.
    "cifar10": dict(
        task="rotation", arch="revnet50_k4", size=32, epochs=105, batch_size=128, optimizer="sgd", lr=0.1,
        weight_decay=1e-4, warmup_epochs=5.0, drop_at=[15 / 35, 25 / 35], embedding=256, head=1024, eval_every=5,
        views=[dict(scale=(0.3, 1.0), **HALF)],
    ),
    # The study's: code, config/TASK/imagenet.sh. A batch counts images, not their copies or patches.
    "imagenet": dict(
        task="rotation", arch="revnet50_k16", size=224, epochs=35, batch_size=64, optimizer="sgd", lr=0.1,
        weight_decay=1e-4, warmup_epochs=5.0, drop_at=[15 / 35, 25 / 35], embedding=1000, head=4096, eval_every=5,
        views=[INCEPTION],
    ),
}  # fmt: skip
# What tasks change in them. Patches are cut from a random crop of fixed scale: 255 of 292 px (code), 30 of 32 px.
LARGE = {"arch": "resnet50v1_k8", "batch_size": 128,
         "views": [dict(scale=((255 / 292) ** 2,) * 2, ratio=None, flip=0.0, **HALF)]}  # fmt: skip
SMALL = {"views": [dict(scale=((30 / 32) ** 2,) * 2, ratio=None, **HALF)]}
V1 = {"arch": "resnet50v1_k4"}
BY_TASK = {
    "shapes": {"exemplar": {"epochs": 6}, "jigsaw": SMALL, "relative": SMALL,
               "colorization": {"views": [dict(scale=(0.6, 1.0), **HALF)]}},
    "folder": {"jigsaw": SMALL, "relative": SMALL, "colorization": {"views": [dict(scale=(0.4, 1.0), **HALF)]}},
    "cifar10": {"exemplar": V1, "jigsaw": SMALL | V1, "relative": SMALL | V1, "colorization": V1 | {"head": 256}},
    "imagenet": {
        "exemplar": {"arch": "resnet50v1_k12"}, "jigsaw": LARGE, "relative": LARGE,
        # Zhang et al.: Adam, 3e-5 for a batch of 40, 500,000 updates, x 0.1 every 225,000 (code, solver.prototxt).
        "colorization": V1 | {"batch_size": 40, "optimizer": "adamw", "lr": 1.92e-4, "weight_decay": 1e-3, "epochs": 16,
                              "warmup_epochs": 0, "drop_at": [0.45, 0.9], "head": 256,
                              "views": [dict(scale=(0.4, 1.0), **HALF)]},
    },
}  # fmt: skip
# A folder of photographs, for a laptop or one GPU: the small network's numbers, the paper's views.
RECIPES["folder"] = RECIPES["shapes"] | training.FOLDER | dict(views=[INCEPTION])


def recipe_of_task(name, task):
    return RECIPES[name] | BY_TASK.get(name, {}).get(task, {})


def parse_args(argv=None):
    # The objects of `shapes` have random rotation and color, so these cannot be predicted.
    dataset = lambda known: "shapes-natural" if known.task in ("rotation", "colorization") else "shapes"
    p, known = training.flags(METHOD, __doc__, RECIPES, argv, (("--task",), {"default": "rotation"}), dataset)
    p.add_argument("--drop-at", type=float, nargs="*", help="shares of the run, lr / 10 after each (none: cosine)")
    # pretext tasks
    p.add_argument("--task", choices=TASKS, help="pretext task")
    p.add_argument("--embedding", type=int, help="width of the embedding of an image or patch")
    p.add_argument("--head", type=int, help="hidden width of the head (jigsaw, relative, colorization)")
    p.add_argument("--copies", type=int, default=8, help="exemplar: augmented copies of each image")
    p.add_argument("--margin", type=float, default=0.5, help="exemplar: of the triplet loss, in squared distance")
    p.add_argument(
        "--normalize",
        default="embedding",
        choices=("embedding", "batch"),
        help="exemplar: L2 of embeddings, or over the batch",
    )
    p.add_argument("--permutations", type=int, default=100, help="jigsaw: number of permutations, of 362,880")
    p.add_argument("--color", default="keep", choices=("keep", "drop"), help="patches: 2/3 in gray, or one channel")
    args = training.parse(p, f"{METHOD}-{known.task}", recipe_of_task(known.recipe, known.task), argv)
    common.at_least(1, args, "embedding", "head")
    common.at_least(0, args, "margin")
    common.at_least(2, args, "copies", "permutations")
    if args.permutations > 10_000:
        common.fail(f"--permutations {args.permutations}: at most 10000; selecting one takes a pass over all 362,880")
    if not all(0 < at < 1 for at in args.drop_at):
        common.fail(f"--drop-at {' '.join(f'{at:g}' for at in args.drop_at)}: shares of the run are between 0 and 1")
    if args.task == "colorization":
        if args.size % 8:
            common.fail(f"--size {args.size}: for colorization it must be a multiple of 8")
        if not trunk_name(args).endswith("_s8"):
            common.fail(f"--arch {args.arch}: colorization needs a total stride of 8, _s8 or none said")
        if re.match(r"vgg\d+_k", args.arch):
            common.fail(f"--arch {args.arch}: colorization uses the last map, so its fc6 and fc7 would not be trained")
        if args.compile:
            common.fail("--compile: colorization calls f.stages, which is not compiled")
    if args.task in PATCHES:
        geometry(args.size)
    return args


def views_of(args):
    views = recipe_of_task(args.recipe, args.task)["views"]
    size = 3 * geometry(args.size)[0] if args.task in PATCHES else args.size
    return [data.view(size, **v) for v in views] * (args.copies if args.task == "exemplar" else 1)


# ============ what the tasks share ============
# A task is a module with: draw(n, g), random numbers for n images, on the CPU (tensors of n rows, or of one row for all
# images); inputs(views, *numbers), the input of f, image by image; forward(f, views, *numbers) -> (loss, accuracy);
# chance(n), their chance level (accuracy in %) in a batch of n images; `sees`, the input that probes must give f.


def classify(logits, labels):
    """(cross-entropy, accuracy) of logits [N, C], labels [N]."""
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(logits.float(), labels), (logits.detach().argmax(1) == labels).float().mean()


# ============ rotation ============


class Rotation(nn.Module):
    """Predict the rotation, 0, 90, 180 or 270 degrees; all four of each image are in the batch."""

    def __init__(self, f, args):
        super().__init__()
        self.sees = {}
        self.head = nn.Linear(f.dim, 4)

    def chance(self, n):
        return math.log(4), 25.0

    def draw(self, n, g):
        return ()

    def inputs(self, views):
        return torch.stack([views[0].rot90(k, (2, 3)) for k in range(4)], 1).flatten(0, 1)  # [B * 4, 3, S, S]

    def forward(self, f, views):
        x = self.inputs(views)
        return classify(self.head(f(x)), torch.arange(4, device=x.device).repeat(len(x) // 4))


# ============ exemplar ============


def semi_hard(d, own, copies, margin):
    """Triplet loss with semi-hard negatives (Schroff et al. 2015) of squared distances d [A, N], A anchors to N
    candidates. own [A, N]: whether a candidate is of the anchor's image; copies [A, k]: those that are, not the anchor.

    For each positive pair (a, p) the negative is the nearest one farther than p or, if there is none, the farthest.
    Mean over pairs of max(0, margin + d_ap - d_an).
    """
    ap = d.gather(1, copies)  # [A, k]
    others = d.masked_fill(own, math.inf)[:, None]
    beyond = others.masked_fill(others <= ap.detach()[:, :, None], math.inf).amin(2)  # [A, k]
    farthest = d.masked_fill(own, -math.inf).amax(1, keepdim=True)
    an = torch.where(beyond.isinf(), farthest, beyond)
    return (margin + ap - an).clamp(min=0).mean()


class Exemplar(nn.Module):
    """Embed copies of the same image close to each other. `accuracy`: of classifying copies by their nearest neighbor.

    With p = 0.66 all copies of an image are gray; all are standardized. With `--normalize batch` (code) distances, and
    so the effect of the margin, depend on the batch size.
    """

    def __init__(self, f, args):
        super().__init__()
        self.margin, self.copies, self.sees = args.margin, args.copies, {"standardize": True}
        self.over_batch = args.normalize == "batch"
        self.head = nn.Linear(f.dim, args.embedding)

    def chance(self, n):
        # For equal vectors d_an = d_ap, and for random ones the nearest negative beyond p is hardly farther than p.
        return self.margin, 100 * (self.copies - 1) / (n * self.copies - 1)

    def draw(self, n, g):
        return (torch.rand(n, generator=g) < 0.66,)

    def inputs(self, views, gray):
        x = torch.stack(views, 1)  # [B, copies, 3, S, S]
        x = torch.where(gray[:, None, None, None, None], x.mean(2, keepdim=True), x)
        return data.standardize(x.flatten(0, 1))

    def forward(self, f, views, gray):
        z = self.head(f(self.inputs(views, gray)))
        with torch.autocast(z.device.type, enabled=False):
            z = z.float() if self.over_batch else F.normalize(z.float(), dim=1)  # [B * copies, E]
            rank, candidates = common.rank(), common.gather(z)  # gradients flow back to the rank of a candidate
            row, share = torch.arange(len(candidates), device=z.device), slice(rank * len(z), (rank + 1) * len(z))
            if self.over_batch:
                candidates = F.normalize(candidates, dim=0)
                z = candidates[share]
            anchor = row[share, None]
            own = anchor // self.copies == row // self.copies  # [A, N]
            place, other = anchor % self.copies, row[: self.copies - 1]
            copies = anchor - place + other + (other >= place)  # [A, copies - 1]
            squares = z.square().sum(1, keepdim=True) + candidates.square().sum(1) if self.over_batch else 2
            d = squares - 2 * z @ candidates.T
            nearest = d.detach().masked_fill(anchor == row, math.inf).argmin(1, keepdim=True)
            return semi_hard(d, own, copies, self.margin), own.gather(1, nearest).float().mean()


# ============ patches: jigsaw and relative patch location ============

PATCHES = ("jigsaw", "relative")
GRAY, COLOR = 3, 4  # modes of a patch; 0, 1, 2: this channel replaces all three (Doersch et al.)


def color_matrices(device):
    """The five modes as matrices on the channels, [5, 3, 3]; built on the device, so that no step waits for a copy."""
    one = torch.eye(3, device=device)
    return torch.stack([*(row.expand(3, 3) for row in one), torch.full_like(one, 1 / 3), one])


def geometry(size):
    """(cell, patch, stride of the trunk) in px for views of `size` px: (85, 64, 8) at 224 px (code) and in the same
    proportions (42, 32, 8) at 128 px, (32, 24, 4) at 96, (21, 16, 4) at 64, (10, 8, 4) at 32."""
    cell = 85 if size == 224 else size // 3
    patch = 2 * round(cell * 64 / 85 / 2)
    if patch < 8:
        common.fail(f"--size {size}: too small for a grid of 3 x 3 patches, which needs 30 px or more")
    return cell, patch, 8 if patch >= 32 else 4


def trunk_name(args):
    """--arch, with the task's total stride appended unless the name has one. For patches of 32 px and more VGGs keep
    all poolings (code); networks that are not in the study's form always keep their strides."""
    base, k, *_, stride, _ = backbones.parts(args.arch)
    if stride or args.task not in (*PATCHES, "colorization"):
        return args.arch
    if args.task == "colorization":
        return f"{args.arch}_s8"
    stride = geometry(args.size)[2]
    if base not in (backbones.STUDY if k else backbones.PLAIN):
        return args.arch
    return f"{args.arch}_s{32 if base.startswith('vgg') and stride == 8 else stride}"


def draw_patches(n, cell, patch, color, g):
    """(where [n, 9, 2], offsets of patches in their cells, uniform; mode [n, 9], of their colors)."""
    where = torch.randint(cell - patch + 1, (n, 9, 2), generator=g)
    if color == "drop":
        return where, torch.randint(3, (n, 9), generator=g)
    return where, torch.where(torch.rand(n, 9, generator=g) < 2 / 3, GRAY, COLOR)


def cut(x, where, mode, cell, patch):
    """Nine patches of each image, row by row: x [B, 3, 3 cell, 3 cell] -> [B * 9, 3, patch, patch], standardized.

    Gaps and random offsets prevent a shortcut: edges that continue in the next patch. Another one is chromatic
    aberration, which gives away the place of a patch in a photograph. Grayscale and standardization reduce it; a third
    of the patches keep their colors, and gray ones are slightly blurred. A single channel removes it (test_pretext.py).
    """
    b, corner = len(x), where + cell * torch.cartesian_prod(*2 * [torch.arange(3, device=x.device)])  # [B, 9, 2]
    windows = x.unfold(2, patch, 1).unfold(3, patch, 1)  # [B, 3, rows, columns, patch, patch], a view
    image = torch.arange(b, device=x.device)[:, None]
    patches = windows[image, :, corner[..., 0], corner[..., 1]]  # [B, 9, 3, patch, patch]
    with torch.autocast(x.device.type, enabled=False):
        patches = color_matrices(x.device)[mode] @ patches.flatten(3)
    return data.standardize(patches.view(b * 9, 3, patch, patch))


def patch_head(width, hidden, classes):
    """The head of both patch tasks (code, patch_utils.py)."""
    first = nn.Linear(width, hidden)
    nn.init.trunc_normal_(first.weight, std=0.005)
    nn.init.constant_(first.bias, 0.1)
    return nn.Sequential(
        first, nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(hidden, classes)
    )


@functools.cache
def permutations(n):
    """n permutations of nine patches, [n, 9], chosen greedily: first the identity, then always the one with the largest
    mean Hamming distance to those chosen, the first of equals."""
    candidates = torch.tensor(list(itertools.permutations(range(9))), dtype=torch.uint8)
    chosen, distance = [0], torch.zeros(len(candidates), dtype=torch.int32)
    for _ in range(n - 1):
        distance += (candidates != candidates[chosen[-1]]).sum(1, dtype=torch.int32)
        distance[chosen[-1]] = -9 * n  # not again
        chosen.append(int(distance.argmax()))
    return candidates[chosen].long()


class Jigsaw(nn.Module):
    """Predict the permutation of the patches. A pass draws 8 permutations for the whole batch; patches go through the
    trunk once, and their features are permuted."""

    def __init__(self, f, args):
        super().__init__()
        self.cell, self.patch, _ = geometry(args.size)
        self.color, self.sees = args.color, {"patch": self.patch, "cell": self.patch, "standardize": True}
        self.register_buffer("permutations", permutations(args.permutations))
        self.embed = nn.Linear(f.dim, args.embedding)
        self.head = patch_head(9 * args.embedding, args.head, args.permutations)

    def chance(self, n):
        return math.log(len(self.permutations)), 100 / len(self.permutations)

    def draw(self, n, g):
        picks = torch.randperm(len(self.permutations), generator=g)[None, :8]
        return *draw_patches(n, self.cell, self.patch, self.color, g), picks

    def inputs(self, views, where, mode, picks):
        return cut(views[0], where, mode, self.cell, self.patch)

    def forward(self, f, views, where, mode, picks):
        z = self.embed(f(self.inputs(views, where, mode, picks))).unflatten(0, (-1, 9))  # [B, 9, E]
        rows = z[:, self.permutations[picks[0]]]  # [B, 8, 9, E]
        return classify(self.head(rows.flatten(2).flatten(0, 1)), picks[0].repeat(len(z)))


class Relative(nn.Module):
    """Predict where a patch lies relative to the center one, for all 8 neighbors of each image."""

    def __init__(self, f, args):
        super().__init__()
        self.cell, self.patch, _ = geometry(args.size)
        self.color, self.sees = args.color, {"patch": self.patch, "cell": self.patch, "standardize": True}
        self.embed = nn.Linear(f.dim, args.embedding)
        self.head = patch_head(2 * args.embedding, args.head, 8)

    def chance(self, n):
        return math.log(8), 12.5

    def draw(self, n, g):
        return draw_patches(n, self.cell, self.patch, self.color, g)

    def inputs(self, views, where, mode):
        return cut(views[0], where, mode, self.cell, self.patch)

    def forward(self, f, views, where, mode):
        z = self.embed(f(self.inputs(views, where, mode))).unflatten(0, (-1, 9))  # [B, 9, E]
        neighbors, center = torch.cat([z[:, :4], z[:, 5:]], 1), z[:, 4:5].expand(-1, 8, -1)
        pairs = torch.cat([neighbors, center], 2)  # [B, 8, 2 E]
        return classify(self.head(pairs.flatten(0, 1)), torch.arange(8, device=z.device).repeat(len(z)))


# ============ colorization ============


def ab_bins():
    """Color bins [313, 2]: points of a grid of spacing 10 in (a, b) that lie in the convex hull of the sRGB gamut or
    have one of their 8 neighbors there."""
    side = torch.linspace(0, 1, 17)
    a, b = backbones.to_lab(torch.cartesian_prod(side, side, side).T[None])[0, 1:]  # [17^3] each
    angle = torch.arange(0, 2 * math.pi, 2 * math.pi / 3600)
    u = torch.stack([angle.cos(), angle.sin()], 1)  # [3600, 2]
    reach = (u @ torch.stack([a, b])).amax(1)  # the hull is where u . (a, b) <= reach for every direction u
    grid = torch.cartesian_prod(*2 * [torch.arange(-120.0, 121, 10)])  # [625, 2]
    inside = (grid @ u.T <= reach).all(1).view(1, 1, 25, 25)
    return grid[F.max_pool2d(inside.float(), 3, 1, 1).flatten() > 0]


def soften(ab, bins, k=5, sigma=5.0):
    """Soft targets of colors ab [..., 2]: (k nearest bins, nearest first; Gaussian weights that sum to 1), [..., k]."""
    d, nearest = torch.cdist(ab, bins).topk(k, largest=False)  # [..., k]
    return nearest, torch.softmax(-d.square() / (2 * sigma**2), -1)


def ab_prior(dataset, size, bins, device, workers, n=2000):
    """Share of pixels whose nearest bin is each of `bins`, [Q], over every fourth pixel of n images."""
    some = torch.linspace(0, len(dataset) - 1, min(n, len(dataset))).long()
    plain = {"size": size, "interpolation": "bilinear", "mean": (0, 0, 0), "std": (1, 1, 1)}
    count = torch.zeros(len(bins))
    for x, _ in data.batches(dataset, plain, 64, device, workers, some):
        ab = backbones.to_lab(x)[:, 1:, ::4, ::4].movedim(1, -1)
        count += torch.bincount(soften(ab, bins.to(device), 1)[0].flatten(), minlength=len(bins)).cpu()
    return count / count.sum()


class Colorization(nn.Module):
    """Predict the color bin of every fourth pixel from lightness (Zhang et al., sec. 2).

    Rare colors are weighted up: w = 1 / ((1 - lambda) p + lambda / Q), lambda = 0.5, p smoothed, scaled to
    sum_q p_q w_q = 1 (eq. 4). Gray images have weight 0. `accuracy`: of the nearest bin, weighted as in the loss.
    """

    def __init__(self, f, args, prior):
        super().__init__()
        self.sees = {"lightness": True}
        bins = ab_bins()
        near = torch.softmax(-torch.cdist(bins, bins).square() / (2 * 5.0**2), 1)  # smoothing, sigma 5
        w = 1 / (0.5 * prior @ near + 0.5 / len(bins))
        self.register_buffer("bins", bins)
        self.register_buffer("w", w / (prior * w).sum())
        self.head = nn.Sequential(
            nn.ConvTranspose2d(f.channels, args.head, 4, 2, 1, bias=False), nn.BatchNorm2d(args.head),
            nn.ReLU(inplace=True), nn.Conv2d(args.head, len(bins), 1),
        )  # fmt: skip
        self.chance_accuracy = 100 * (prior * self.w).max().item()  # of always predicting one bin

    def chance(self, n):
        return math.log(len(self.bins)), self.chance_accuracy

    def draw(self, n, g):
        return ()

    def lab(self, views):
        return backbones.to_lab(views[0].float() / 2 + 0.5)

    def inputs(self, views):
        return backbones.lightness(self.lab(views))

    def forward(self, f, views):
        with torch.autocast(views[0].device.type, enabled=False):
            lab = self.lab(views)
            ab = lab[:, 1:, ::4, ::4].movedim(1, -1)  # [B, S / 4, S / 4, 2]
            nearest, q = soften(ab, self.bins)  # [B, S / 4, S / 4, 5]
        logits = self.head(f.stages(backbones.lightness(lab))[-1])  # [B, Q, S / 4, S / 4]
        with torch.autocast(logits.device.type, enabled=False):
            log_p = logits.float().movedim(1, -1).log_softmax(-1)
            colored = (ab.abs() > 5).flatten(1).any(1).view(-1, 1, 1)  # (code)
            w = self.w[nearest[..., 0]] * colored
            loss = (-(q * log_p.gather(-1, nearest)).sum(-1) * w).mean()
            right = log_p.detach().argmax(-1) == nearest[..., 0]
            return loss, (right * w).sum() / w.sum().clamp(min=1e-8)


# ============ the method ============

TASKS = dict(rotation=Rotation, exemplar=Exemplar, jigsaw=Jigsaw, relative=Relative, colorization=Colorization)


class Pretext(nn.Module):
    """Trunk f and a task; `forward(views, *numbers)` is the loss; the accuracy in per cent is in `figures`."""

    def __init__(self, backbone, task):
        super().__init__()
        self.f, self.task, self.figures = backbone, task, {}

    def forward(self, views, *numbers):
        loss, accuracy = self.task(self.f, views, *numbers)
        self.figures = {"accuracy": 100 * accuracy}
        return loss


def draw_share(task, n, rank, world, device, *key):
    """The task's random numbers for this rank's n images: its rows of those drawn for the batch of all ranks."""
    whole = task.draw(world * n, data.generator(*key))
    mine = slice(rank * n, (rank + 1) * n)
    return [(t[mine] if len(t) == world * n else t).to(device, non_blocking=True) for t in whole]


@torch.inference_mode()
def pretext_accuracy(model, loader, draw, device, amp):
    """Accuracy in per cent in eval mode, over one epoch of a loader of augmented test images. Collective."""
    accuracies = []
    parallel.same_buffers(model)
    with evaluate.in_eval(model):
        for step, (_, xs) in enumerate(loader.epoch(0)):
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                model(xs, *draw(loader.batch_size, "test", step))
            accuracies.append(model.figures["accuracy"])
    return (common.all_reduce(torch.stack(accuracies).mean()) / common.world_size()).item()


def shown(task, xs, *numbers):
    """The trunk's inputs, in [-1, 1]; that is two standard deviations where they are standardized."""
    x = task.inputs(xs, *numbers)
    return x / 2 if "standardize" in task.sees else x


def seen(args, xs, views, g):
    """What the trunk sees, for `python data.py show`."""
    prior = [torch.ones(len(ab_bins()))] if args.task == "colorization" else []
    task = TASKS[args.task](types.SimpleNamespace(dim=1, channels=1), args, *prior)
    x = data.pixels(shown(task, xs, *task.draw(len(xs[0]), g)), views[0])
    return {"view": data.pixels(xs[0], views[0]), args.task: data.tiles(x, len(xs[0]))}


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
    test_part = evaluate.first(test, 2000)  # for the pretext accuracy
    few = min(per_pass, len(test_part) // world)
    test_loader = data.Loader(test_part, views, max(1, few), args.seed, rank, world, min(args.workers, 1), device)

    # ============ model ============
    torch.manual_seed(args.seed)  # the same initial weights on every rank
    arch, patch = trunk_name(args), geometry(args.size)[1] if args.task in PATCHES else 0
    f = backbones.build(arch, patch or args.size)
    prior = [ab_prior(train, args.size, ab_bins(), device, args.workers)] if args.task == "colorization" else []
    if prior and prior[0].max() == 1:
        common.fail(f"--task colorization: all images of {train.name} are gray")
    model = Pretext(f, TASKS[args.task](f, args, *prior)).to(device, memory_format=torch.channels_last)
    preprocess = {"mean": HALF["mean"], "std": HALF["std"], "size": 3 * patch or args.size, "interpolation": "bilinear"}
    preprocess |= {"sees": model.task.sees} if model.task.sees else {}
    f = checkpoints.as_trained(model.f, preprocess)  # for the probes
    ddp = model
    if world > 1:
        ddp = parallel.wrap(model, device)  # no SyncBatchNorm, as in the code
    if args.compile:
        model.f.compile()  # in place: the names in state_dict() stay

    # ============ optimizer ============
    lr = args.lr * args.batch_size / 256
    optimizer = optim.OPTIMIZERS[args.optimizer](optim.param_groups(model, args.weight_decay), lr=lr)

    # ============ run: print the recipe, go on from a checkpoint ============
    draw = lambda n, *key: draw_share(model.task, n, rank, world, device, args.seed, args.task, *key)
    run = training.Run(
        METHOD, args, model, {"optimizer": optimizer}, loader, views, preprocess, labelled, test, device,
        title=f"{METHOD}-{args.task}", backbone=f, arch=arch, built_for=patch or args.size,
    )  # fmt: skip
    notes = []
    if patch:
        notes = [f"9 patches of {patch} px at random places in cells of {model.task.cell} px; probes at {3 * patch} px"]
    if args.task in ("rotation", "colorization") and args.data in ("shapes", "shapes-hard"):
        notes += [f"warning: objects of {args.data} have random rotation and color; use --data shapes-natural"]
    drops = f"a tenth at {', '.join(f'{at:.0%}' for at in args.drop_at)}" if args.drop_at else "cosine"
    loss, accuracy = model.task.chance(world * per_pass)
    run.describe(
        *notes,
        f"lr {args.lr:g} x {args.batch_size} / 256 = {lr:.4g}, {run.warmup} steps of warm-up, {drops}",
        f"{args.optimizer}: {optim.count(optimizer)}",
        f"chance-level loss {loss:.2f}, accuracy {accuracy:.3g} %",
        forward=lambda m, xs: m(xs, *m.task.draw(per_pass, data.generator("memory"))),
    )
    if not run.begin():
        return

    def accuracies():
        """{"pretext_accuracy": on test images}; {} if there are too few."""
        return {"pretext_accuracy": pretext_accuracy(model, test_loader, draw, device, args.amp)} if few > 1 else {}

    # ============ training ============
    while run.is_training():
        if run.probe_is_due():
            run.probe(**accuracies())
        for step in run.epoch():
            lr_now = optim.rate(step, run.total, lr, run.warmup, args.drop_at)
            for group in optimizer.param_groups:
                group["lr"] = lr_now
            for key, _, xs in run.passes(ddp, picture=False):
                numbers = draw(per_pass, *key)
                if key == (0, 1):
                    inputs = shown(model.task, xs, *numbers).unflatten(0, (per_pass, -1)).unbind(1)
                    run.log.image("views", data.picture(inputs, views[:1] * len(inputs)))
                # Dropout uses torch's global generator, which is not in checkpoints; so it is seeded in each pass.
                torch.manual_seed(data.generator(args.seed, "dropout", *key, rank).initial_seed())
                with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                    loss = ddp(xs, *numbers) / args.accumulate
                loss.backward()
                run.log.loss += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            run.end_step(lr_now, **model.figures)
        run.save()
    if run.stopped:
        return common.STOPPED
    if not (final := accuracies()):
        return run.finish()
    run.log.record("eval", run.step, epoch=args.epochs, **final)
    result = {"accuracy": final["pretext_accuracy"], "chance": model.task.chance(world * few)[1]}
    run.finish(f" pretext accuracy {result['accuracy']:.1f} (chance {result['chance']:.3g})", pretext=result)


if __name__ == "__main__":
    common.run(main)
