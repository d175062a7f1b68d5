"""PIRL: Self-Supervised Learning of Pretext-Invariant Representations (Misra, van der Maaten, 2019,
https://arxiv.org/abs/1912.01991).

To solve a pretext task, features must encode the transformation t of the image. PIRL trains the opposite: image I and
transformed image I^t get the same representation, different from those of other images. t cuts out nine patches and
shuffles them (or rotates the image). Both I and I^t are contrasted with a memory bank of earlier features.

    I    one crop                         -> phi -> f ---------------- f(v_I) ---.
                                                                                 |  lambda L(m_I, g(v_I^t))
    I^t  9 shuffled patches of another    -> phi -> linear, concat -> g(v_I^t) --|  + (1 - lambda) L(m_I, f(v_I)), eq. 5
                                                                                 |
                         bank M [n, D]: m_I, row of the image, and N negatives --'
                             m_I <- n(m m_I + (1 - m) f(v_I))  after the step       (n: L2 normalization)

    differences          paper                        official code (VISSL)      here (more in docs/pirl.md)
    loss L               eq. 4: -log h of the         InstDisc's NCE with a      eq. 4; --nce constant-z is the code's,
                         positive - sum log(1 - h)    constant Z; or cross-      --nce cross-entropy its other one
                                                      entropy
    negatives            N per image                  N per image and term       N per batch, shared by both terms and
                                                                                 all ranks
    colors               -                            six random operations      jitter, grayscale

Measured with this file (k-NN: 20 neighbors; random init -> trained):

    command                                  network, epochs  seeds  k-NN          linear  device
    python pirl.py                           resnet10_16, 20  0      14.7 -> 70.1  68.3    2 CPU cores, 3.9 min, 102c386
    the same                                 resnet10_16, 20  0      14.7 -> 70.8  70.5    1 CPU core, 5.4 min
    imagenette at 96 px                      resnet10_32, 20  0      34.6 -> 47.2  57.0    1 CPU core, 9.6 min
    --transform rotation, CIFAR-10, ImageNet                         not run

    python pirl.py                                                           shapes, minutes on a laptop
    python pirl.py --transform rotation                                      invariant to rotation instead
    torchrun --standalone --nproc_per_node=8 pirl.py --data imagenet --root DIR
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import backbones
import common
import data
import evaluate
import optim
import parallel
import revisiting
import sets
import training

METHOD = "pirl"

# ============ recipes: one per data regime; every entry but `views` is the default of a flag ============
# Views: the image, and the crop that patches are cut from; patches get the color augmentation of the image's view.

RECIPES = {
    # Quick on a CPU, so unlike the paper: AdamW, a small network, a warm-up.
    "shapes": dict(
        transform="jigsaw", arch="resnet10_16", size=32, epochs=20, batch_size=64, optimizer="adamw", lr=4e-3,
        weight_decay=1e-4, warmup_epochs=1.0, lam=0.5, nce="paper", negatives=4096, temperature=0.1, bank_momentum=0.5,
        dim=128, eval_every=2,
        views=[dict(scale=(0.5, 1.0), interpolation="bilinear", jitter=(0.4, 0.4, 0.4, 0.5), jitter_p=1.0, gray=0.5),
               dict(scale=(0.6, 1.0), interpolation="bilinear")],
    ),
    # The ImageNet recipe with the crops, tau and weight decay of InstDisc's CIFAR-10. Not run in full yet.
    "cifar10": dict(
        transform="jigsaw", arch="resnet18", size=32, epochs=200, batch_size=256, optimizer="sgd", lr=0.03,
        weight_decay=5e-4, warmup_epochs=0, lam=0.5, nce="paper", negatives=4096, temperature=0.1, bank_momentum=0.5,
        dim=128, eval_every=10,
        views=[dict(scale=(0.2, 1.0), interpolation="bilinear", jitter=(0.4,) * 4, jitter_p=1.0, gray=0.2),
               dict(scale=(0.6, 1.0), interpolation="bilinear")],
    ),
    "imagenet": dict(  # code, pirl_jigsaw_4node_resnet50.yaml
        transform="jigsaw", lam=0.5, nce="paper", negatives=32_000, temperature=0.07, bank_momentum=0.5, dim=128,
        arch="resnet50", size=224, epochs=800, batch_size=1024, optimizer="sgd", lr=0.03, weight_decay=1e-4,
        warmup_epochs=0, eval_every=10,
        views=[dict(interpolation="bilinear", jitter=(0.4, 0.4, 0.4, 0.2), jitter_p=1.0, gray=0.2),
               dict(scale=(0.6, 1.0), interpolation="bilinear")],
    ),
}  # fmt: skip
NO_COLOR = dict(jitter_p=0.0, gray=0.0, mean=(0.0,) * 3, std=(1.0,) * 3)  # pixels in [0, 1], as before augmentation
# A folder of photographs, for a laptop or one GPU: the small network's numbers, the paper's views.
RECIPES["folder"] = RECIPES["shapes"] | training.FOLDER | dict(views=RECIPES["imagenet"]["views"])


def parse_args(argv=None):
    p, known = training.flags(METHOD, __doc__, RECIPES, argv)
    # PIRL
    p.add_argument("--transform", choices=("jigsaw", "rotation"), help="t, which features become invariant to")
    p.add_argument("--lambda", dest="lam", type=float, help="weight of I^t against I; 0: only I, 1: only I^t")
    p.add_argument("--nce", choices=FORMS, help="L: eq. 4; its first term, -log h, alone; InstDisc's NCE (code)")
    p.add_argument("--negatives", type=int, help="K, negatives sampled from the bank")
    p.add_argument("--temperature", type=float, help="tau of the softmax over cosines; lower is sharper")
    p.add_argument("--bank-momentum", type=float, help="m, share of the old row in the new one")
    p.add_argument("--dim", type=int, help="D, width of the vectors that the loss compares")
    args = training.parse(p, METHOD, RECIPES[known.recipe], argv)
    common.at_least(1, args, "dim", "negatives")
    common.at_least(0, args, "bank_momentum", most=1)
    if not 0 <= args.lam <= 1:
        common.fail(f"--lambda {args.lam:g}: it must be at least 0 and at most 1")
    least = 0.02 if args.nce == "constant-z" else 0.0  # below that its exp(s / tau) overflows fp32
    if not least < args.temperature < math.inf:
        common.fail(f"--temperature {args.temperature:g}: with --nce {args.nce} it must be above {least:g}")
    if args.transform == "jigsaw":
        puzzle_grid(args.size)
    return args


def views_of(args):
    """The image, and the crop that is transformed; its colors are augmented after that, patch by patch."""
    image, crop = RECIPES[args.recipe]["views"]
    size, crop = (3 * puzzle_grid(args.size)[0], crop) if args.transform == "jigsaw" else (args.size, image)
    return [data.view(args.size, **image), data.view(size, **crop) | NO_COLOR]


# ============ the transformations ============
# Each is a transformation t with its head g: draw(n, g) gives the random numbers for n images, on the CPU; transform(x,
# *numbers) the parts of I^t [B, P, 3, s, s] from crops x; forward(v) applies g to the features v of the parts,
# [B * P, width] -> [B, D]; `description` is for the recipe line.


def puzzle_grid(size):
    """(cell, patch) in px for views of `size` px: (85, 64) at 224 px (code: a crop of 255 px) and in about the same
    proportions (36, 28) at 96 px, (24, 18) at 64, (12, 10) at 32."""
    cell = round(size * 85 / 224)
    patch = 2 * round(cell * 64 / 85 / 2)
    # With smaller patches the last map is 1 x 1, for which oneDNN's bf16 strided convolutions have undefined gradients.
    if patch < 10:
        common.fail(f"--size {size}: too small for a grid of 3 x 3 patches, which needs 31 px or more")
    return cell, patch


def pieces(x, where, order, cell, patch):
    """Nine patches of each image: x [B, 3, 3 cell, 3 cell] -> [B, 9, 3, patch, patch]. order [B, 9]: the cell of each,
    counted row by row; where [B, 9, 2]: its offset in that cell, down and right."""
    corner = where + cell * torch.stack([order // 3, order % 3], 2)  # [B, 9, 2]
    windows = x.unfold(2, patch, 1).unfold(3, patch, 1)  # [B, 3, rows, columns, patch, patch], a view
    image = torch.arange(len(x), device=x.device)[:, None]
    return windows[image, :, corner[..., 0], corner[..., 1]]


class Jigsaw(nn.Module):
    """Nine patches in a random order, any of 9!; g: a linear layer per patch, concatenation, another linear layer."""

    def __init__(self, width, dim, size):
        super().__init__()
        self.cell, self.patch = puzzle_grid(size)
        self.each, self.joined = nn.Linear(width, dim), nn.Linear(9 * dim, dim)
        self.description = f"9 patches of {self.patch} px at random places in cells of {self.cell} px, in random order"

    def draw(self, n, g):
        where = torch.randint(self.cell - self.patch + 1, (n, 9, 2), generator=g)
        return where, torch.rand(n, 9, generator=g).argsort(1)

    def transform(self, x, where, order):
        return pieces(x, where, order, self.cell, self.patch)

    def forward(self, v):
        return self.joined(self.each(v).unflatten(0, (-1, 9)).flatten(1))  # [B * 9, D] -> [B, 9 D] -> [B, D]


class Rotation(nn.Module):
    """Rotation by 0, 90, 180 or 270 degrees, equally likely; g: a linear layer."""

    def __init__(self, width, dim):
        super().__init__()
        self.linear = nn.Linear(width, dim)
        self.description = "0, 90, 180 or 270 degrees"

    def draw(self, n, g):
        return (torch.randint(4, (n, 1, 1, 1), generator=g),)

    def transform(self, x, turns):
        x = torch.where(turns % 2 == 1, x.rot90(1, (2, 3)), x)
        return torch.where(turns > 1, x.rot90(2, (2, 3)), x)[:, None]  # [B, 1, 3, S, S]

    def forward(self, v):
        return self.linear(v)


def transformation(args, width):
    return Jigsaw(width, args.dim, args.size) if args.transform == "jigsaw" else Rotation(width, args.dim)


def draw_share(task, n, rank, world, device, *key):
    """The task's random numbers for this rank's n images: its rows of those drawn for the batch of all ranks."""
    whole = task.draw(world * n, data.generator(*key))
    mine = slice(rank * n, (rank + 1) * n)
    return [(t[mine] if len(t) == world * n else t).to(device, non_blocking=True) for t in whole]


# ============ the method ============


def draw_negatives(n, K, seed, step, device):
    """The K bank rows that are an update's negatives, drawn uniformly: the same for the whole batch and on all ranks,
    so that all logits are one matrix product."""
    return torch.randint(n, (K,), generator=data.generator(seed, "negatives", step)).to(device, non_blocking=True)


def against_bank(v, bank, index, negatives, temperature):
    """Logits s / tau of the vectors v [B, V, D] of images `index` with the images' bank rows, [B, V], and with the rows
    `negatives` [K], [B, V, K]; -inf where a negative is the image's own row."""
    others = v @ bank[negatives].T / temperature
    others = others.masked_fill((negatives == index[:, None])[:, None], -math.inf)
    return (v * bank[index][:, None]).sum(2) / temperature, others


# The forms of L: from the logits of the positive [...] and of the negatives [..., N], the bank size n and Z to [...].


def paper_form(own, others, n=None, Z=None):
    """-log h(positive) - sum log(1 - h(negative)), h: the softmax over all N + 1 rows (PIRL, eq. 3 and 4). Only the
    largest negative can have h near 1, where 1 - h loses precision; its 1 - h is summed over all other rows instead."""
    top, at = others.max(-1, keepdim=True)
    others = others.scatter(-1, at, -math.inf)
    rest = torch.cat([own[..., None], others], -1).logsumexp(-1, keepdim=True)
    largest = F.softplus(top - rest)  # -log(1 - h) of the largest negative
    total = rest + largest  # log of the denominator
    return (total + largest)[..., 0] - own - torch.log1p(-(others - total).exp()).sum(-1)


def cross_entropy(own, others, n=None, Z=None):
    """-log h(positive), InfoNCE."""
    return torch.cat([own[..., None], others], -1).logsumexp(-1) - own


EPS = torch.finfo(torch.float32).eps  # code, nce_loss.py


def constant_z(own, others, n, Z):
    """InstDisc's NCE, the code's loss: is a row the positive or one of N drawn from noise P_n = 1 / n? It is the former
    with probability P / (P + N P_n), P = exp(s / tau) / Z. Sum over the N + 1 rows."""
    noise = others.shape[-1] / n
    return ((noise + EPS) * Z / own.exp()).log1p() + ((others.exp() / Z + EPS) / noise).log1p().sum(-1)


FORMS = {"paper": paper_form, "cross-entropy": cross_entropy, "constant-z": constant_z}


def chance_loss(nce, K, n, dim, temperature):
    """Chance level: the loss of features independent of the bank. The cosine of random unit vectors has variance 1 / D,
    so E[exp(s / tau)] = exp(1 / (2 D tau^2)). The negatives' h are small and sum to 1 - h(positive)."""
    others = K * math.exp(1 / (2 * dim * temperature**2))
    return math.log1p(others) + {"paper": others / (1 + others), "cross-entropy": 0.0, "constant-z": 1 + EPS * n}[nce]


class PIRL(nn.Module):
    """Backbone f (the paper's phi), heads head_f and head_g (its f and g), bank M and, for constant-z, Z.

    `forward((x,), parts, index, negatives)` is the loss (eq. 5) of the images `index`, with views x [B, 3, S, S] and
    parts [B, P, 3, s, s] of I^t.
    """

    def __init__(self, backbone, head_g, n, dim=128, temperature=0.07, lam=0.5, momentum=0.5, nce="paper"):
        super().__init__()
        self.temperature, self.lam, self.momentum, self.nce = temperature, lam, momentum, FORMS[nce]
        self.seen = []
        self.f = backbone
        self.head_f, self.head_g = nn.Linear(backbone.dim, dim), head_g
        self.register_buffer("bank", F.normalize(torch.rand(n, dim) - 0.5, dim=1))  # M, fp32
        self.register_buffer("Z", torch.zeros(()))

    def forward(self, views, parts, index, negatives, first=False):
        """`first`: the run's first pass, which sets Z. Collective."""
        g = self.head_g(self.f(parts.flatten(0, 1)))  # g(v_I^t) [B, D]
        f = self.head_f(self.f(*views))  # f(v_I) [B, D]
        with torch.autocast(f.device.type, enabled=False):
            v = F.normalize(torch.stack([g, f], 1).float(), dim=2)  # [B, 2, D]
            own, others = against_bank(v, self.bank, index, negatives, self.temperature)
            if first and self.nce is constant_z:
                self.Z.copy_(self.estimate_Z(own.detach(), others.detach()))
            loss_transformed, loss_image = self.nce(own, others, len(self.bank), self.Z).mean(0)
        g, f = v.detach().unbind(1)
        self.seen.append((index, f))
        self.figures = {
            "feature_std": f.std(0).mean() * f.shape[1] ** 0.5,  # 1: spread, 0: collapsed
            "own_cosine": own.detach()[:, 1].mean() * self.temperature,  # of f(v_I) and m_I, which is an epoch old
            "invariance": (g * f).sum(1).mean(),  # cosine of g(v_I^t) and f(v_I)
        }
        return self.lam * loss_transformed + (1 - self.lam) * loss_image  # eq. 5

    def estimate_Z(self, own, others):
        """n times the mean of exp(s / tau) over the transformed images of all ranks and their K + 1 rows (code)."""
        e = torch.cat([own[:, :1], others[:, 0]], 1).exp()  # [B, K + 1]
        total = common.all_reduce(torch.stack([e.sum(), (e > 0).sum()]))  # masked rows do not count
        return len(self.bank) * total[0] / total[1]

    @torch.no_grad()
    def update_bank(self):
        """m_I <- n(m m_I + (1 - m) f(v_I)) for the images of all ranks since the last update; g is never stored.
        Collective: every rank writes the same rows, each once, as no image occurs twice in an epoch."""
        index, f = (torch.cat(parts) for parts in zip(*self.seen, strict=True))
        self.seen.clear()
        index, f = common.gather(index), common.gather(f)
        self.bank[index] = F.normalize(torch.lerp(f, self.bank[index], self.momentum), dim=1)


def seen(args, xs, views, g):
    """What f sees, for `python data.py show`."""
    head = transformation(args, 1)
    parts = head.transform(xs[1], *head.draw(len(xs[0]), g)).flatten(0, 1)
    parts = data.pixels(data.augment(parts, views[0], g), views[0])
    return {"I": data.pixels(xs[0], views[0]), "I^t": data.tiles(parts, len(xs[0]))}


# ============ the run ============


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = common.setup(args.device)
    args.amp = common.bf16_is_fast(device) if args.amp is None else args.amp

    # ============ data ============
    views = views_of(args)
    train, labelled, test = sets.splits(args, device)
    per_pass = training.images_per_pass(args, world, len(train))
    n = len(train)
    training.lower(args, "negatives", n - 1, n)
    loader = data.Loader(train, views, per_pass, args.seed, rank, world, args.workers, device)
    preprocess = {"mean": views[0]["mean"], "std": views[0]["std"], "size": args.size, "interpolation": "bilinear"}

    # ============ model ============
    torch.manual_seed(args.seed)  # the same initial weights on every rank
    backbone = backbones.build(args.arch, args.size)
    if args.transform == "jigsaw" and isinstance(backbone, (revisiting.VGG, backbones.Torchvision)):
        common.fail(f"--arch {args.arch}: the patches are too small for it; use a ResNet or RevNet")
    head_g = transformation(args, backbone.dim)
    model = PIRL(backbone, head_g, n, args.dim, args.temperature, args.lam, args.bank_momentum, args.nce)
    model = model.to(device, memory_format=torch.channels_last)
    ddp = model
    if world > 1:
        ddp = parallel.wrap(model, device)  # no SyncBatchNorm, as in the code
    if args.compile:
        model.f.compile()  # in place: the names in state_dict() stay

    # ============ optimizer ============
    lr = args.lr * args.batch_size / 256
    optimizer = optim.OPTIMIZERS[args.optimizer](optim.param_groups(model, args.weight_decay), lr=lr)

    # ============ run: print the recipe, go on from a checkpoint ============
    def transformed(x, *key):
        """The parts of I^t; transformed first, so that the colors of each part are augmented independently."""
        parts = head_g.transform(x, *draw_share(head_g, len(x), rank, world, device, args.seed, args.transform, *key))
        g = data.generator(args.seed, "colours", *key, rank)
        return data.augment(parts.flatten(0, 1), views[0], g).unflatten(0, (len(x), -1))

    run = training.Run(METHOD, args, model, {"optimizer": optimizer}, loader, views, preprocess, labelled, test, device)
    size = model.bank.numel() * 4 / 1e6
    start = chance_loss(args.nce, args.negatives, n, args.dim, args.temperature)
    run.describe(
        f"lr {args.lr:g} x {args.batch_size} / 256 = {lr:.4g}, {run.warmup} steps of warm-up",
        f"{args.optimizer}: {optim.count(optimizer)}",
        f"{args.transform}: {head_g.description}",
        f"bank {n} x {args.dim}, {size:.1f} MB a rank; {args.nce} at tau {args.temperature:g}",
        f"{args.negatives} negatives; lambda {args.lam:g}; chance-level loss {start:.2f}",
        forward=lambda m, xs: m(
            xs[:1], m.head_g.transform(xs[1], *m.head_g.draw(per_pass, data.generator("memory"))),
            torch.arange(per_pass), torch.arange(args.negatives),
        ),
    )  # fmt: skip
    if not run.begin():
        return

    # ============ training ============
    while run.is_training():
        if run.probe_is_due():
            run.probe(model.head_f, **{f"bank_{k}": value for k, value in evaluate.health(model.bank).items()})
        for step in run.epoch():
            lr_now = optim.cosine(step, run.total, lr, lr / 1000, run.warmup)  # 0.12 to 0.00012 (code)
            for group in optimizer.param_groups:
                group["lr"] = lr_now
            negatives = draw_negatives(n, args.negatives, args.seed, step, device)
            for key, index, (x, crops) in run.passes(ddp, picture=False):
                parts = transformed(crops, *key)
                if key == (0, 1):
                    run.log.image("views", data.picture([x, *parts.unbind(1)], views[:1] * (1 + parts.shape[1])))
                with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                    loss = ddp((x,), parts, index, negatives, first=key == (0, 1)) / args.accumulate
                loss.backward()
                run.log.loss += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            model.update_bank()  # after the step: logits use the old rows
            run.end_step(lr_now, **model.figures)
        run.save()
    if run.stopped:
        return common.STOPPED
    run.finish()


if __name__ == "__main__":
    common.run(main)
