"""InstDisc and Distilling Localization: instance discrimination with a memory bank, and copy-and-paste by saliency.

InstDisc: Unsupervised Feature Learning via Non-Parametric Instance Discrimination (Wu et al., 2018,
https://arxiv.org/abs/1805.01978). DiLo: Distilling Localization for Self-Supervised Representation Learning (Zhao et
al., 2020, https://arxiv.org/abs/2004.06638).

Every image is a class of its own. A memory bank holds one feature per image, and a view is classified by its cosines
with the rows of the bank. DiLo (--copy-paste) pastes the salient object of some views onto another background first, so
that the background cannot identify the image.

    image -> crop --[paste on a background]--> jitter, gray -> f -> g -> v --.
                     ^ copy_paste.py, saliency.py                            |  -log P(i | v), eq. 1 and 2
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

import math

import torch
import torch.nn.functional as F
from torch import nn

import backbones
import common
import copy_paste
import data
import evaluate
import optim
import parallel
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
        views=[dict(scale=(0.5, 1.0), interpolation="bilinear", jitter=(0.4, 0.4, 0.4, 0.5), jitter_p=1.0, gray=0.5)],
    ),
    # Code, cifar.py: full softmax, lr 0.03 for 128 images, no flip. Not run in full yet.
    "cifar10": dict(
        arch="resnet18", size=32, epochs=200, batch_size=128, optimizer="sgd", lr=0.06, weight_decay=5e-4,
        schedule="steps", warmup_epochs=0, loss="softmax", negatives=4096, temperature=0.1, bank_momentum=0.5,
        dim=128, eval_every=10,
        views=[dict(scale=(0.2, 1.0), interpolation="bilinear", flip=0.0, jitter=(0.4,) * 4, jitter_p=1.0, gray=0.2)],
    ),
    # DiLo's ablations; its final models have K = 65536 (sec. 6.3).
    "imagenet": dict(
        # DiLo, sec. 6.1, except batch size and weight decay: InstDisc's (code, main.py).
        arch="resnet50", size=224, epochs=200, batch_size=256, optimizer="sgd", lr=0.03, weight_decay=1e-4,
        schedule="steps", warmup_epochs=0, loss="softmax-nce", negatives=4096, temperature=0.07, bank_momentum=0.5,
        dim=128, eval_every=10,
        views=[dict(scale=(0.2, 1.0), interpolation="bilinear", jitter=(0.4,) * 4, jitter_p=1.0, gray=0.2)],  # main.py
    ),
}  # fmt: skip
LOSSES = ("softmax", "nce", "softmax-nce", "supervised")
DROPS = {"cosine": [], "steps": [120 / 200, 160 / 200]}  # shares of the run; DiLo, sec. 6.1
TABLE_1 = ("none", "flip", "crop", "scale", "jitter", "gray")  # none: a center crop
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
    p.add_argument("--soft-masks", action="store_true", help="M is the saliency, without a threshold")
    p.add_argument("--background", default="gray", choices=copy_paste.BACKGROUNDS, help="what is pasted on")
    p.add_argument("--blend", default="none", choices=copy_paste.BLENDS, help="of the edges; mix: of half of the masks")
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
        banks = {"bank": model.bank} | ({"embedding": embed(train)[0]} if recompute else {})
        for name, bank in banks.items():
            found = evaluate.knn(*evaluate.with_labels(bank, y), queries, query_labels, (200,), model.temperature)
            numbers |= {f"{name}_knn{k}": weighted for k, (weighted, _, *_) in found.items()}
    return numbers


# ============ views ============


def prepare(args, train, device, say):
    """(the training set, the augmentation) for data.Loader: with --copy-paste, images with masks, and the paste. Also
    for `data.py show`. Collective."""
    return copy_paste.prepare(args, train, device, say) if args.copy_paste else (train, data.augment)


def augmented(view, upto):
    """A recipe's view with table 1's augmentations up to and including `upto`."""
    level, view = TABLE_1.index(upto), dict(view)
    view |= {"gray": 0.0} if level < 5 else {}
    view |= {"jitter_p": 0.0} if level < 4 else {}
    view |= {"scale": ((224 / 256) ** 2,) * 2, "ratio": "square"} if level < 3 else {}  # 224 px of a short side of 256
    view |= {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)} if level < 2 else {}  # the largest central square
    view |= {"flip": 0.0} if level < 1 else {}
    return view


def views_of(args):
    return [data.view(args.size, **augmented(v, args.augment)) for v in RECIPES[args.recipe]["views"]]


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
    labels = bank_labels if args.loss == "supervised" else None
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
        ddp = parallel.wrap(model, device)  # no SyncBatchNorm, as in the code
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
        forward=lambda m, xs: m(xs, torch.arange(per_pass), torch.arange(args.negatives)),
    )
    if not run.begin():
        return
    if args.copy_paste:  # the same loader, with masks
        masked, augment = prepare(args, train, device, run.say)
        run.loader = data.Loader(masked, views, per_pass, args.seed, rank, world, args.workers, device, augment)

    # ============ training ============
    while run.is_training():
        if run.probe_is_due():
            run.probe(**probe_bank(model, train, bank_labels, test, preprocess, device, args.workers, args.amp))
        for step in run.epoch():
            lr_now = optim.rate(step, run.total, lr, run.warmup, DROPS[args.schedule])
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
