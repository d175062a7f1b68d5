"""InstDisc and Distilling Localization: instance discrimination with a memory bank, and copy-and-paste by saliency.

InstDisc: Unsupervised Feature Learning via Non-Parametric Instance Discrimination (Wu et al., 2018,
https://arxiv.org/abs/1805.01978). DiLo: Distilling Localization for Self-Supervised Representation Learning (Zhao et
al., 2020, https://arxiv.org/abs/2004.06638).

Every image is a class of its own. A memory bank holds one feature per image, and a view is classified by its cosines
with the rows of the bank. DiLo (--copy-paste) pastes the salient object of some views onto another background first, so
that the background cannot identify the image.

    image --[paste on a background]--> crop, jitter, gray -> f -> g -> v --.
              ^ mask (saliency.py)                                         |  -log P(i | v), eq. 1 and 2
                   bank V [n, D]: row i, the positive, and the negatives --'
                          row i <- n(m row i + (1 - m) v)  after the step       (n: L2 normalization)

    differences          paper                        official code       here (more in docs/instdisc.md)
    loss                 NCE (InstDisc), softmax-NCE  NCE, full softmax   softmax-NCE; --loss nce or softmax (eq. 1)
    negatives            K per image                  K per image         K per batch, shared by all ranks
    positive among them  -                            kept                masked
    proximal term        between two features         bank momentum 0.5   bank momentum 0.5
    paste (DiLo)         before all augmentations     not published       between crop and jitter; the background is
                                                                          cropped and flipped independently
    mask                 RBD, threshold not stated    -                   binary at twice its mean, or --soft-masks; no
                                                                          paste below 5 % or above 90 % of the image
    textures             MIT VisTex                   -                   filtered noise in two colors
    image backgrounds    no response of a network     -                   half-size crops with the least saliency

Measured with this file (k-NN: 20 neighbors; protocols, tables 1 and 2 and curves in results/README.md):

    command                                  network, epochs  seeds  k-NN       linear     device, commit
    python instdisc.py                       resnet10_16, 24  0      83.3       80.6       2 CPU cores, 2.2 min, 3628f2c
                                             random init     0      14.7       not run
    ... --copy-paste 0.5                     resnet10_16, 24  0      83.4       79.0       the same, 3.1 min with masks
    both again, on one core                  resnet10_16, 24  0      79.8 82.4  76.3 78.0  1 CPU core, f7158bf
    ... --data shapes-hard                   resnet10_16, 24  0 1    50.0 53.7  50.6 53.9  the same
    ... --data shapes-hard --copy-paste 0.5  resnet10_16, 24  0 1    64.8 66.1  61.6 63.4  the same
    imagenette at 96 px                      resnet10_32, 60  0      52.0       57.3       the same core
    imagenette at 96 px, --copy-paste 0.5    resnet10_32, 60  0      57.3       61.4       the same

    python instdisc.py                                                       shapes, minutes on a laptop
    python instdisc.py --copy-paste 0.5                                      with RBD masks, made before training
    python saliency.py DIR --out MASKS && python instdisc.py --data DIR --copy-paste 0.5 --masks MASKS
    torchrun --standalone --nproc_per_node=8 instdisc.py --data imagenet --root DIR --copy-paste 0.5 --masks MASKS
    python -m experiments.ablate instdisc                                    tables 1 and 2
"""

import contextlib
import hashlib
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.v2 import functional as tvf

import backbones
import common
import data
import evaluate
import optim
import runs
import saliency
import sets
import training

METHOD = "instdisc"

# ============ recipes: one per data regime; every entry but `views` is the default of a flag ============

RECIPES = {
    # Quick on a CPU, so unlike the paper: AdamW, a small network, cosine.
    "shapes": dict(
        arch="resnet10_16", size=32, epochs=24, batch_size=64, optimizer="adamw", lr=4e-3, weight_decay=1e-4,
        schedule="cosine", warmup_epochs=1.0, loss="softmax-nce", negatives=4096, temperature=0.1, bank_momentum=0.5,
        dim=128, eval_every=2,
        views=[dict(scale=(0.5, 1.0), interpolation="bilinear", jitter=(0.4, 0.4, 0.4, 0.5), jitter_p=1.0, grey=0.5)],
    ),
    # Code, cifar.py: full softmax, lr 0.03 for 128 images, no flip. Not run in full yet.
    "cifar10": dict(
        arch="resnet18", size=32, epochs=200, batch_size=128, optimizer="sgd", lr=0.06, weight_decay=5e-4,
        schedule="steps", warmup_epochs=0, loss="softmax", negatives=4096, temperature=0.1, bank_momentum=0.5,
        dim=128, eval_every=10,
        views=[dict(scale=(0.2, 1.0), interpolation="bilinear", flip=0.0, jitter=(0.4,) * 4, jitter_p=1.0, grey=0.2)],
    ),
    # DiLo's ablations; its final models have K = 65536 (sec. 6.3).
    "imagenet": dict(
        # DiLo, sec. 6.1, except batch size and weight decay: InstDisc's (code, main.py).
        arch="resnet50", size=224, epochs=200, batch_size=256, optimizer="sgd", lr=0.03, weight_decay=1e-4,
        schedule="steps", warmup_epochs=0, loss="softmax-nce", negatives=4096, temperature=0.07, bank_momentum=0.5,
        dim=128, eval_every=10,
        views=[dict(scale=(0.2, 1.0), interpolation="bilinear", jitter=(0.4,) * 4, jitter_p=1.0, grey=0.2)],  # main.py
    ),
}  # fmt: skip
LOSSES = ("softmax", "nce", "softmax-nce", "supervised")
TABLE_1 = ("none", "flip", "crop", "scale", "jitter", "grey")  # none: a center crop
# A folder of photographs, for a laptop or one GPU: the small network's numbers, the paper's views.
RECIPES["folder"] = RECIPES["shapes"] | training.FOLDER | dict(views=RECIPES["imagenet"]["views"])


def parse_args(argv=None):
    p, known = training.flags(METHOD, __doc__, RECIPES, argv)
    p.add_argument("--schedule", choices=("steps", "cosine"), help="steps: x 0.1 after 60 %% and 80 %% of the epochs")
    # InstDisc
    p.add_argument("--loss", choices=LOSSES, help="softmax: over the whole bank; supervised: with labels, no bank")
    p.add_argument("--negatives", type=int, help="K, negatives sampled from the bank")
    p.add_argument("--temperature", type=float, help="tau of the softmax over cosines; lower is sharper")
    p.add_argument("--bank-momentum", type=float, help="m, share of the old row in the new one")
    p.add_argument("--dim", type=int, help="D, width of the vectors that the loss compares")
    p.add_argument("--augment", default=TABLE_1[-1], choices=TABLE_1, help="augmentations up to this one (table 1)")
    # Distilling Localization
    p.add_argument("--copy-paste", type=float, default=0.0, help="probability that a view is pasted; 0.5 in the paper")
    p.add_argument("--masks", default="rbd", help=f"{', '.join(saliency.METHODS)}, exact, or a folder of masks or maps")
    p.add_argument("--soft-masks", action="store_true", help="alpha is the saliency, not a mask at twice its mean")
    p.add_argument("--background", default="grey", choices=("grey", "textures", "images"), help="backgrounds")
    p.add_argument("--blend", default="none", choices=data.BLENDS, help="of the mask's edge; mix: in half of the views")
    args = training.parse(p, METHOD, RECIPES[known.recipe], argv)
    common.at_least(1, args, "dim", "negatives")
    common.at_least(0, args, "copy_paste", "bank_momentum", most=1)
    least = 0.02 if args.loss == "nce" else 0.0  # below that NCE's exp(s / tau) overflows fp32
    if not args.temperature > least:
        common.fail(f"--temperature {args.temperature:g}: with --loss {args.loss} it must be above {least:g}")
    return args


# ============ the method ============


class FullSoftmax(torch.autograd.Function):
    """-log P(i | v) over all n rows of the bank (DiLo, eq. 1), mean over the batch: one pass over the bank in chunks of
    `chunk` rows, with a running maximum, sum of exponentials and exponentially weighted sum of rows."""

    @staticmethod
    def forward(ctx, v, bank, index, temperature, chunk=16_384):
        top, total, mean = v.new_full((len(v), 1), -math.inf), 0.0, 0.0
        for rows in bank.split(chunk):
            s = v @ rows.T / temperature  # [B, c]
            was, top = top, torch.maximum(top, s.amax(1, keepdim=True))
            p, shrink = s.sub_(top).exp_(), (was - top).exp()
            total, mean = total * shrink + p.sum(1, keepdim=True), mean * shrink + p @ rows
        own = bank[index]  # [B, D]
        ctx.save_for_backward((mean / total - own) / (temperature * len(v)))  # d loss / d v
        return (top + total.log() - (v * own).sum(1, keepdim=True) / temperature).mean()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None, None, None, None


def draw_negatives(n, K, seed, step, device):
    """The K bank rows that are an update's negatives, drawn uniformly: the same for the whole batch and on all ranks,
    so that all logits are one matrix product."""
    return torch.randint(n, (K,), generator=data.generator(seed, "negatives", step)).to(device, non_blocking=True)


def scores(v, bank, index, negatives, temperature):
    """s / tau of v [B, D] with its own bank row, [B], and with the rows `negatives`, [B, K] (-inf: its own row)."""
    others = v @ bank[negatives].T / temperature
    others = others.masked_fill(negatives == index[:, None], -math.inf)
    return (v * bank[index]).sum(1) / temperature, others


def softmax_nce(v, bank, index, negatives, temperature):
    """Cross-entropy of the positive among K + 1 rows (DiLo, sec. 6.1), mean over the batch."""
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


def chance(loss, n, K, dim, temperature, classes):
    """Chance level: the loss of features independent of the bank. The cosine of random unit vectors has variance 1 / D,
    so ln E[exp(s / tau)] = 1 / (2 D tau^2)."""
    spread = 1 / (2 * dim * temperature**2)
    if loss == "supervised":
        return math.log(classes)
    if loss == "softmax":
        return math.log(n) + spread
    if loss == "softmax-nce":
        return math.log(1 + K * math.exp(spread))
    return math.log(1 + K * math.exp(spread)) + 1 + 1e-7 * n  # nce


class InstDisc(nn.Module):
    """Backbone f, linear layer g, bank V; `forward((x,), index, negatives)` is the loss of views x of images `index`.
    With labels [n] it is table 1's supervised network: cross-entropy of g, no bank."""

    def __init__(self, backbone, n, dim=128, temperature=0.07, loss="softmax-nce", momentum=0.5, labels=None):
        super().__init__()
        self.temperature, self.loss, self.momentum = temperature, loss, momentum
        self.seen, self.figures = [], {}
        self.f = backbone
        self.g = nn.Linear(backbone.dim, dim if labels is None else int(labels.max()) + 1)
        if labels is None:
            self.register_buffer("bank", F.normalize(torch.rand(n, dim) - 0.5, dim=1))  # V, fp32
            self.register_buffer("Z", torch.zeros(()))
        else:
            self.register_buffer("labels", labels, persistent=False)

    def forward(self, views, index, negatives=None, first=False):
        """`first`: the run's first batch, which sets NCE's constant Z. Collective."""
        out = self.g(self.f(*views))
        with torch.autocast(out.device.type, enabled=False):
            if self.loss == "supervised":
                return F.cross_entropy(out.float(), self.labels[index])
            v = F.normalize(out.float(), dim=1)  # [B, D]
            self.seen.append((index, v.detach()))
            self.figures = {
                "feature_std": v.detach().std(0).mean() * v.shape[1] ** 0.5,  # 1: spread, 0: collapsed
                "own_cosine": (v.detach() * self.bank[index]).sum(1).mean(),  # the row is an epoch old
            }
            if self.loss == "softmax":
                return FullSoftmax.apply(v, self.bank, index, self.temperature)
            if self.loss == "softmax-nce":
                return softmax_nce(v, self.bank, index, negatives, self.temperature)
            if first:
                self.Z.copy_(self.estimate_Z(v.detach(), index, negatives))
            return nce(v, self.bank, index, negatives, self.temperature, self.Z)

    @torch.no_grad()
    def estimate_Z(self, v, index, negatives):
        """n times the mean of exp(s / tau) over the batch of all ranks (InstDisc, sec. 3.2)."""
        own, others = scores(v, self.bank, index, negatives, self.temperature)
        e = torch.cat([own[:, None], others], 1).exp()
        total = common.all_reduce(torch.stack([e.sum(), (e > 0).sum()]))  # masked rows do not count
        return len(self.bank) * total[0] / total[1]

    @torch.no_grad()
    def update_bank(self):
        """v_i <- n(m v_i + (1 - m) v) for the images of all ranks since the last update. Collective: every rank writes
        the same rows, each once, as no image occurs twice in an epoch."""
        if self.loss == "supervised":
            return
        index, v = (torch.cat(parts) for parts in zip(*self.seen, strict=True))
        self.seen.clear()
        index, v = common.gather(index), common.gather(v)
        self.bank[index] = F.normalize(torch.lerp(v, self.bank[index], self.momentum), dim=1)


def probe_bank(model, train, y, test, preprocess, device, workers, amp, recompute=False):
    """Health of the bank, and the accuracy of a 200-NN classifier of test embeddings (weights exp(s / tau), InstDisc,
    sec. 3.4) whose training set is the bank with labels y [n] (-1: ignored); `recompute`: also with embeddings of the
    un-augmented training images in place of the bank. Collective."""
    if model.loss == "supervised":
        return {}
    numbers = {f"bank_{k}": value for k, value in evaluate.health(model.bank).items()}
    net = nn.Sequential(model.f, model.g)
    embed = lambda images: evaluate.extract(net, images, preprocess, device, workers=workers, amp=amp)
    queries, query_labels = evaluate.with_labels(*embed(evaluate.first(test, 10_000)))
    if (y >= 0).any() and len(queries):
        banks = {"bank_knn200": model.bank} | ({"embedding_knn200": embed(train)[0]} if recompute else {})
        for name, bank in banks.items():
            found = evaluate.knn(*evaluate.with_labels(bank, y), queries, query_labels, (200,), model.temperature)
            numbers[name] = next(iter(found.values()))[0]
    return numbers


# ============ copy-and-paste: masks and backgrounds ============


def open_maps(args, train, device):
    """Saliency of every training image, uint8 [n, h, w]: computed for a set in memory and kept in --root, read from a
    folder, or the exact masks of a set that has them. Collective."""
    if args.masks == "exact":
        if train.masks is None:
            common.fail(f"--masks exact: {train.name} has no masks of its own")
        return train.masks * 255
    if args.masks not in saliency.METHODS:
        if not Path(args.masks).is_dir():
            common.fail(f"--masks {args.masks}: neither {', '.join(saliency.METHODS)} or exact, nor a folder")
        return sets.read_masks(args.masks, train)
    if isinstance(train, sets.Files):
        common.fail(
            f"--masks {args.masks}: of a folder they are made beforehand, python saliency.py {args.data} --method "
            f"{args.masks} --out MASKS, and used with --masks MASKS"
        )
    key = hashlib.sha1(train.fingerprint().encode() + Path(saliency.__file__).read_bytes()).hexdigest()[:12]
    file = Path(args.root) / f"saliency-{args.masks}-{Path(train.name).name}-{key}.pt"
    maps = None
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        with contextlib.suppress(EOFError):  # a damaged file is made again
            maps = runs.load(file).get("maps") if file.exists() else None
        if not torch.is_tensor(maps) or maps.shape[:1] != (len(train),):
            saliency.make_folder(file.parent)
            maps = saliency.of(train, args.masks, device).cpu()
            runs.write(file, {"maps": maps})
    common.any_rank(False)  # the others wait here
    return runs.load(file)["maps"] if maps is None else maps


def textures(n, size, seed):
    """Drawn textures, uint8 [n, 3, size, size], in place of VisTex's photographs: noise, filtered in the frequency domain by
    a power law (rough to smooth) and a preferred direction (fabric to wood), in a mix of two colours."""
    g = data.generator(seed, "textures")
    u = lambda low, high: low + (high - low) * torch.rand(n, 1, 1, generator=g)
    fy, fx = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None]
    angle, stretch = u(0, math.pi), u(1, 6)
    across, along = angle.cos() * fx + angle.sin() * fy, angle.cos() * fy - angle.sin() * fx  # [n, size, size / 2 + 1]
    gain = ((stretch * along) ** 2 + across**2).add(size**-2).pow(-u(0.3, 1.2))
    t = torch.fft.irfft2(torch.fft.rfft2(torch.randn(n, size, size, generator=g)) * gain, s=(size, size))
    t = ((t - t.mean((1, 2), keepdim=True)) / t.std((1, 2), keepdim=True) / 4 + 0.5).clamp(0, 1)[:, None]
    one, other = torch.rand(2, n, 3, 1, 1, generator=g)
    return (torch.lerp(one, other, t) * 255).to(torch.uint8)


def quiet_crops(train, maps, usable, n, size, device):
    """Backgrounds from the images themselves: in each of the `usable` the window of half its height and width with the least
    saliency, of the `n` images where that is lowest, uint8 [n, 3, size, size]."""
    whole = torch.tensor(maps.shape[1:])
    h, w = (max(1, s // 2) for s in maps.shape[1:])
    least, place = [], []
    for part in maps.split(4096):
        area = F.pad(part.float().cumsum(1).cumsum(2), (1, 0, 1, 0))  # sums of all windows from four corners
        windows = area[:, h:, w:] - area[:, :-h, w:] - area[:, h:, :-w] + area[:, :-h, :-w]
        low = windows.flatten(1).min(1)
        least.append(low.values), place.append(low.indices)
    least, place = torch.cat(least).masked_fill(~usable, math.inf), torch.cat(place)
    chosen = least.argsort(stable=True)[: min(n, int(usable.sum()))]
    columns = maps.shape[2] - w + 1
    corner = (
        torch.stack([place[chosen] // columns, place[chosen] % columns], 1) / whole
    )  # [n, 2], as shares of the side
    share = torch.tensor([h, w]) / whole
    if isinstance(train, sets.Images):
        images = train.images[chosen.to(train.images.device)]
        side = torch.tensor(images.shape[2:])
        boxes = torch.cat([corner * side, (share * side).expand(len(chosen), 2)], 1)
        crops = data.crop_resize(images, boxes, torch.zeros(len(chosen), dtype=torch.bool), size, "bilinear")
        return (crops * 255).round().to(torch.uint8)
    crops = []
    for i, (top, left) in zip(chosen.tolist(), corner.tolist(), strict=True):
        try:
            image, _ = train.read(i)
        except OSError:  # named when training meets it
            continue
        high, wide = image.shape[1:]
        box = int(top * high), int(left * wide), max(1, int(share[0] * high)), max(1, int(share[1] * wide))
        crops.append(tvf.resized_crop(image, *box, [size, size], antialias=True))
    return torch.stack(crops).to(device)


def objects(args, train, device, say):
    """(alpha uint8 [n, h, w] on the CPU, grounds uint8 [G, 3, S, S] on the device or None, cut uint8 [n] on the CPU or None)
    for data.Loader."""
    maps = open_maps(args, train, device).cpu()
    alpha, cut, area, unusable = saliency.pasteable(maps, soft=args.soft_masks)
    if unusable.all():
        common.fail(f"--masks {args.masks}: no mask is neither empty nor full, so there is nothing to paste")
    share = 100 * area[~unusable].mean()
    say(
        f"copy-paste {args.copy_paste:g} by {args.masks} on {args.background}: objects cover {share:.0f} % of their "
        f"images; {int(unusable.sum())} of {len(alpha)} masks are nearly empty or full, their images are not pasted; "
        f"{alpha.numel() / 1e6:.0f} MB a process"
    )
    grounds = None
    if args.background == "textures":
        grounds = textures(1000, args.size, args.seed).to(device)
    elif args.background == "images":
        grounds = quiet_crops(train, maps, ~unusable, 1000, args.size, device)
    return alpha, grounds, cut


def learning_rate(step, total, lr, warmup, schedule):
    if schedule == "cosine" or step < warmup:
        return optim.cosine(step, total, lr, 0.0, warmup)
    return lr * 0.1 ** ((step >= 0.6 * total) + (step >= 0.8 * total))  # epochs 120 and 160 of 200 (DiLo, sec. 6.1)


def augmented(view, upto):
    """A recipe's view with table 1's augmentations up to and including `upto`."""
    level, view = TABLE_1.index(upto), dict(view)
    view |= {"grey": 0.0} if level < 5 else {}
    view |= {"jitter_p": 0.0} if level < 4 else {}
    view |= {"scale": ((224 / 256) ** 2,) * 2, "ratio": "square"} if level < 3 else {}  # 224 px of a short side of 256
    view |= {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)} if level < 2 else {}  # the largest central square
    view |= {"flip": 0.0} if level < 1 else {}
    return view


def views_of(args):
    views = [data.view(args.size, **augmented(v, args.augment)) for v in RECIPES[args.recipe]["views"]]
    return [v | {"paste": args.copy_paste, "blend": args.blend} for v in views]


# ============ the run ============


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = common.setup(args.device)
    args.amp = common.bf16_is_fast(device) if args.amp is None else args.amp

    # ============ data ============
    views = views_of(args)
    train, labelled, test = sets.splits(args, device)
    if args.loss == "supervised":
        train = labelled  # the probes' training set
    per_pass = training.images_per_pass(args, world, len(train))
    n, sampled = len(train), args.loss in ("nce", "softmax-nce")
    if sampled:
        training.lower(args, "negatives", n - 1, n)
    loader = data.Loader(train, views, per_pass, args.seed, rank, world, args.workers, device)
    preprocess = {"mean": views[0]["mean"], "std": views[0]["std"], "size": args.size, "interpolation": "bilinear"}

    # ============ model ============
    torch.manual_seed(args.seed)  # the same initial weights on every rank
    bank_labels = sets.labels_of(train).clone()
    labels = bank_labels.clone() if args.loss == "supervised" else None
    if labels is not None and (labels < 0).any():
        common.fail(f"--loss supervised: {train.name} has images without labels")
    if labelled is not train:  # the unlabeled images that train also has may be the probes' test set
        probed = sets.load(args.data, args.root, "train")
        known = {probed.key(i) for i in range(len(probed))}
        bank_labels[torch.tensor([train.key(i) not in known for i in range(len(train))])] = -1
    f = backbones.build(args.arch, args.size)
    model = InstDisc(f, n, args.dim, args.temperature, args.loss, args.bank_momentum, labels)
    model = model.to(device, memory_format=torch.channels_last)
    ddp = model
    if world > 1:
        # No SyncBatchNorm, as in the code. All ranks write the same bank: DDP need not broadcast it (ImageNet: 656 MB).
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["bank", "Z", "labels"])
        ddp = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    if args.compile:
        model.f.compile()  # in place: the names in state_dict() stay

    # ============ optimizer ============
    lr = args.lr * args.batch_size / 256
    optimizer = optim.OPTIMIZERS[args.optimizer](optim.param_groups(model, args.weight_decay), lr=lr)

    # ============ run: print the recipe, go on from a checkpoint ============
    run = training.Run(METHOD, args, model, {"optimizer": optimizer}, loader, views, preprocess, labelled, test, device)
    bank = []
    if labels is None:
        rows = f"{'all' if args.loss == 'softmax' else args.negatives} rows at tau {args.temperature:g}"
        bank = [f"bank {n} x {args.dim}, {model.bank.numel() * 4 / 1e6:.1f} MB a rank; {args.loss}, {rows}"]
    start = chance(args.loss, n, args.negatives, args.dim, args.temperature, model.g.out_features)
    run.describe(
        f"lr {args.lr:g} x {args.batch_size} / 256 = {lr:.4g}, {run.warmup} steps of warm-up, schedule {args.schedule}",
        f"{args.optimizer}: {optim.count(optimizer)}",
        *bank,
        f"chance-level loss {start:.2f}",
    )
    if run.resume():
        return
    if args.copy_paste:  # the same loader, with masks
        masks = objects(args, train, device, run.say)
        run.loader = data.Loader(train, views, per_pass, args.seed, rank, world, args.workers, device, *masks)

    # ============ training ============
    while run.is_training():
        if run.probe_is_due():
            run.probe(**probe_bank(model, train, bank_labels, test, preprocess, device, args.workers, args.amp))
        for step in run.epoch():
            lr_now = learning_rate(step, run.total, lr, run.warmup, args.schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr_now
            negatives = draw_negatives(n, args.negatives, args.seed, step, device) if sampled else None
            for key, index, xs in run.passes(ddp):
                with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                    loss = ddp(xs, index, negatives, first=key == (0, 1)) / args.accumulate
                loss.backward()
                run.log.loss += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            model.update_bank()  # after the step: logits use the old rows
            run.end_step(lr_now, **model.figures)
        run.save()
    if run.stopped:
        return common.STOPPED
    final = probe_bank(model, train, bank_labels, test, preprocess, device, args.workers, args.amp, recompute=True)
    if final:
        run.log.record("eval", run.step, epoch=args.epochs, **final)
        run.log.say("  ".join(f"{k} {v:.2f}" for k, v in final.items()))
    run.finish()


if __name__ == "__main__":
    common.run(main)
