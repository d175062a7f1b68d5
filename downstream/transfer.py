"""Transfer to the eleven sets of Ericsson et al. 2021 (https://arxiv.org/abs/2011.13377), and to any other.

    python -m downstream.transfer RUN --sets dtd pets flowers102 --root DIR          features, logistic regression
    python -m downstream.transfer RUN --sets dtd --how finetuned                     all weights, 20 settings of SGD
    python -m downstream.transfer RUN RUN2 random:resnet10_16 --sets shapes-hard cifar10      side by side

Frozen (SimCLR, appendix B.8.1): un-augmented images with the short side at 224 px and the center cut out; softmax
regression with one of 45 penalties 1e-6, ..., 1e5 on the sum of the losses, chosen on the validation part, fitted again
on training and validation images together. Fine-tuned: SGD with Nesterov momentum 0.9 and a cosine to 0, random crops
and flips, the best pair of rate and weight decay chosen likewise. Scores: top-1, its mean over classes, or the mean
over classes of VOC 2007's 11-point average precision, whichever is published for the set. Results go into
RUN/evaluate.json, where the same command finds what is done.
"""

import copy
import hashlib
import json
import math
import typing
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import checkpoints
import common
import data
import evaluate
import logistic
import optim
import runs
import sets
from downstream import annotated, finetune, metrics

PUBLISHED_SETS = ("aircraft", "caltech101", "cars", "cifar10", "cifar100", "dtd", "flowers102", "food101", "pets",
                  "sun397", "voc2007")  # fmt: skip
METRICS = dict.fromkeys(("aircraft", "caltech101", "flowers102", "pets"), "mean per class")  # others: top-1
METRICS["voc2007"] = "11-point mAP"
PENALTIES = torch.logspace(-6, 5, 45, dtype=torch.float64).tolist()
GRIDS = {  # of fine-tuning. weight_decay: divided by the rate. norms: BatchNorm's momentum by the length of an epoch
    "report": dict(updates=5_000, batch_size=64, lr=torch.logspace(-4, -1, 4).tolist(), norms=False,
                   weight_decay=[0.0, *torch.logspace(-6, -3, 4).tolist()]),  # Ericsson et al., A.2
    "simclr": dict(updates=20_000, batch_size=256, lr=torch.logspace(-4, -1, 7).tolist(), norms=True,
                   weight_decay=[0.0, *torch.logspace(-6, -3, 7).tolist()]),  # SimCLR, B.8.1
}  # fmt: skip
# Ericsson et al. 2021, table 1, in the order of PUBLISHED_SETS. Copies of it have misprints: frozen, supervised Food
# 64.49; fine-tuned, supervised Pets 82.42, MoCo v2 Aircraft 78.87 and Pets 78.80.
PUBLISHED = {
    "frozen": {
        "supervised": (43.59, 90.18, 44.92, 91.42, 73.90, 72.23, 89.93, 69.49, 91.45, 60.49, 83.60),
        "InstDisc": (36.87, 71.12, 28.98, 80.28, 59.97, 68.46, 83.44, 63.39, 68.78, 49.47, 74.37),
        "PIRL": (37.08, 74.48, 28.72, 82.53, 61.26, 68.99, 83.60, 64.65, 71.36, 53.89, 76.61),
        "SimCLR": (44.90, 90.05, 43.73, 91.18, 72.73, 74.20, 90.87, 67.47, 83.33, 59.21, 80.77),
        "MoCo v2": (41.79, 87.92, 39.31, 92.28, 74.90, 73.88, 90.07, 68.95, 83.30, 60.32, 82.69),
        "BYOL": (53.87, 91.46, 56.40, 93.26, 77.86, 76.91, 94.50, 73.01, 89.10, 59.99, 81.14),
        "SwAV": (54.04, 90.84, 54.06, 93.99, 79.58, 77.02, 94.62, 76.62, 87.60, 65.58, 83.68),
    },
    "finetuned": {
        "supervised": (83.50, 91.01, 82.61, 96.39, 82.91, 73.30, 95.50, 84.60, 92.42, 63.56, 84.76),
        "PIRL": (72.68, 70.83, 61.02, 92.23, 66.48, 64.26, 89.81, 74.96, 76.26, 50.38, 69.90),
        "SimCLR": (81.06, 90.35, 83.78, 97.07, 84.53, 71.54, 93.75, 82.40, 84.10, 63.31, 82.58),
        "MoCo v2": (79.87, 84.38, 75.20, 96.45, 71.33, 69.47, 94.35, 76.78, 79.80, 55.77, 71.71),
        "BYOL": (79.45, 89.40, 84.60, 97.01, 83.95, 73.62, 94.48, 85.54, 89.62, 63.96, 82.70),
        "SwAV": (83.08, 89.85, 86.76, 96.78, 84.37, 75.16, 95.46, 87.22, 89.05, 66.24, 84.66),
    },
}


# ============ sets and scores ============


class Task(typing.NamedTuple):
    """A set: training images with the validation part (its places: `val`), test images, labels int64 [N], or [N, C] as
    `present` makes them."""

    train: sets.Files | sets.Images
    test: sets.Files | sets.Images
    y: torch.Tensor
    test_y: torch.Tensor
    val: torch.Tensor
    classes: int
    metric: str
    contents: str = ""  # changes when an image or a label does


def open_set(name, root, device, seed=0):
    """The Task of a named set or folder. Where no validation part is published it is a random fifth."""
    if name == "voc2007":
        parts = [annotated.voc(root, "2007", which, name) for which in ("train", "val", "test")]
        truth = [torch.stack([present(json.loads(record)) for _, record in part.items]) for part in parts]
        train, test = parts[0].items + parts[1].items, parts[2].items
        train, test = (
            sets.Files(name, [(path, 0) for path, _ in items], annotated.VOC, root) for items in (train, test)
        )
        y, test_y, last = torch.cat(truth[:2]), truth[2], len(parts[1])
    else:
        train, test = (sets.load(name, root, split, device) for split in ("train", "test"))
        y, test_y, last = sets.labels_of(train), sets.labels_of(test), getattr(train, "validation", 0)
        if min(y.min(), test_y.min()) < 0:
            common.fail(f"{name}: every image needs a label (class folders), in the training and in the test part")
    if len(train) < evaluate.FEWEST:
        common.fail(f"{name}: {len(train)} training images, fewer than {evaluate.FEWEST}")
    order = torch.arange(len(train))
    if not last:
        order, last = torch.randperm(len(train), generator=sets.generator(seed, "validation")), len(train) // 5
    classes = y.shape[1] if y.ndim > 1 else evaluate.classes_of(train)
    seen = f"{train.contents()} {test.contents()} {y.tolist()} {test_y.tolist()}"
    digest, metric = hashlib.sha1(seen.encode()).hexdigest(), METRICS.get(name, "top-1")
    return Task(train, test, y, test_y, order[-last:].sort().values, classes, metric, digest)


def present(record):
    """1 for each class of VOC that an image shows, -1 for the others, 0 where all its objects are difficult: [20]."""
    truth = torch.full((len(annotated.VOC),), -1)
    for label, difficult in sorted(zip(record["labels"], record["ignored"], strict=True), key=lambda o: not o[1]):
        truth[label] = 0 if difficult else 1
    return truth


def score(logits, y, metric):
    """The score in per cent of logits [N, C] for labels y [N], or [N, C] as `present` makes them for the mAP, which
    leaves difficult objects out, as VOC's devkit does (Ericsson et al. count them as absent)."""
    if metric == "11-point mAP":
        hits = torch.tensor([-1, 1, 0], dtype=torch.int8)[y]  # for y = 0, 1, -1: does not count, right, wrong
        columns = [c for c in range(y.shape[1]) if (y[:, c] == 1).any()]
        ap = [metrics.average_precision(logits[:, c], hits[None, :, c], int((y[:, c] == 1).sum()), 11) for c in columns]
        return 100 * torch.cat(ap).mean().item() if ap else 0.0
    right = (logits.argmax(1) == y).double()
    if metric == "top-1":
        return 100 * right.mean().item()
    sums = torch.zeros(int(y.max()) + 1, dtype=torch.double).index_add_(0, y, right)
    counts = y.bincount()
    return 100 * (sums[counts > 0] / counts[counts > 0]).mean().item()


# ============ frozen ============


def fit_frozen(x, y, classes, penalties):
    """Weights [P, d, C] and biases [P, 1, C] of softmax regression or, for y [N, C], of a logistic regression a class,
    that minimize the SUM of the losses + penalty / 2 |W|^2 for each of P penalties."""
    penalties, y = torch.tensor(penalties, dtype=x.dtype) / len(x), y.to(x.device)  # logistic.fit takes the mean
    if y.ndim == 1:
        w, b = logistic.fit(x, y, classes, penalties)
        return w, b[:, None]
    # A logistic regression with weights v is one of two classes with -v / 2 and v / 2, whose squares are half of v's.
    labels = (y == 1).long().T.repeat(len(penalties), 1)  # [P * C, N]; difficult ones count as absent
    w, b = logistic.fit(x, labels, 2, 2 * penalties.repeat_interleave(classes))  # [P * C, d, 2]
    w, b = (t.diff(dim=-1).view(len(penalties), classes, -1) for t in (w, b))
    return w.mT, b.mT


def frozen(task, features, test_features, penalties=PENALTIES):
    """{"score", "penalty", "grid"} of the (features, labels) of training and test images: the penalty is chosen on the
    validation part, then all are used. A label of -1: an image that does not decode."""
    (z, found), (test_z, test_found) = features, test_features
    kept, test_kept = (found >= 0).cpu(), (test_found >= 0).cpu()
    val = torch.isin(torch.arange(len(z)), task.val)
    x, val_x, all_x = (z[rows.to(z.device)] for rows in (kept & ~val, kept & val, kept))
    w, b = fit_frozen(x, task.y[kept & ~val], task.classes, penalties)
    val_y = task.y[kept & val]
    scores = [score((val_x @ w_ + b_).cpu(), val_y, task.metric) for w_, b_ in zip(w, b, strict=True)]
    best = penalties[scores.index(max(scores))]
    (w,), (b,) = fit_frozen(all_x, task.y[kept], task.classes, [best])
    result = score((test_z @ w + b).cpu()[test_kept], task.test_y[test_kept], task.metric)
    grid = {f"penalty {p:.3g}": round(s, 2) for p, s in zip(penalties, scores, strict=True)}
    return {"score": result, "chosen": f"penalty {best:.3g}", "grid": grid}


# ============ fine-tuned ============


def fit_finetuned(task, rows, model, lr, weight_decay, r):
    """(a copy of the backbone with a linear head, trained on the images at `rows`; its last loss)"""
    torch.manual_seed(model.seed)  # of the head
    net = nn.Sequential(copy.deepcopy(model.backbone), nn.Linear(model.backbone.dim, task.classes))
    net.to(model.device, memory_format=torch.channels_last).train()
    train, y = sets.pick(task.train, rows), task.y[rows]
    view = data.view(**{k: model.preprocess[k] for k in ("size", "interpolation", "mean", "std")})
    how = min(r["batch_size"], len(train)), model.seed
    loader = data.Loader(train, [view], *how, workers=model.workers, device=model.device)
    for m in net.modules() if r["norms"] else ():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.momentum = min(10 / loader.steps, 0.1)  # SimCLR, B.8.1
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=weight_decay / lr)
    criterion, words = F.cross_entropy, f"lr {lr:.1g} wd {weight_decay:.1g}"
    if y.ndim > 1:
        criterion, y = F.binary_cross_entropy_with_logits, (y == 1).float()
    factor = lambda step: optim.cosine(step, r["updates"], 1.0, 0.0)
    how = r["updates"], factor, model.amp, words, criterion
    return net, finetune.fit(net, optimizer, loader, y.to(model.device), *how)


def finetuned(task, model, r, known, keep):
    """The same for all weights. `known`: the part of the grid that is done; `keep(grid)` is called after each pair."""

    def measure(net, images, y):
        how = model.preprocess, model.device
        logits, found = evaluate.extract(net, images, *how, workers=model.workers, amp=model.amp)
        kept = (found >= 0).cpu()
        return score(logits.cpu()[kept], y[kept], task.metric)

    pairs = {f"lr {lr:.3g} wd {wd:.3g}": (lr, wd) for lr in r["lr"] for wd in r["weight_decay"]}
    places = torch.arange(len(task.y))
    rows, grid = places[~torch.isin(places, task.val)], dict(known)
    for name, pair in pairs.items() if len(pairs) > 1 else ():
        if name not in grid:
            net, loss = fit_finetuned(task, rows, model, *pair, r)
            held_out = sets.pick(task.train, task.val), task.y[task.val]
            grid[name] = round(measure(net, *held_out), 2) if math.isfinite(loss) else -1.0
            keep(grid)
    best = max(pairs, key=lambda name: grid.get(name, 0.0))  # the first of the best
    net, loss = fit_finetuned(task, places, model, *pairs[best], r)
    if not math.isfinite(loss):
        common.fail(f"fine-tuning diverged at {best}: try a lower --lr")
    return {"score": measure(net, task.test, task.test_y), "chosen": best, "grid": grid}


# ============ the command ============


def table(rows, how, names):
    """Markdown of {backbone: {set: score}} with the published rows below, for the sets `names`."""
    cell = lambda value: f"{value:.2f}" if value is not None else "-"
    lines = [f"| {how} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cell(found.get(n)) for n in names)} |" for name, found in rows.items()]
    if set(names) & set(PUBLISHED_SETS):
        for method, values in PUBLISHED[how].items():
            found = dict(zip(PUBLISHED_SETS, values, strict=True))
            lines.append(f"| {method}, ResNet-50, published | {' | '.join(cell(found.get(n)) for n in names)} |")
    return "\n".join(lines)


def parse_args(argv=None):
    p = evaluate.flags(__doc__, several=True)
    p.add_argument(
        "--sets", nargs="+", default=PUBLISHED_SETS, help="named sets, voc2007, folders (default: the eleven)"
    )
    p.add_argument("--how", nargs="+", choices=PUBLISHED, default=["frozen"], help="frozen finetuned (default: frozen)")
    p.add_argument("--grid", choices=GRIDS, default="report", help="of fine-tuning; preset of the flags below")
    p.add_argument("--updates", type=int, help="of each run of fine-tuning")
    p.add_argument("--batch-size", type=int, help="of fine-tuning")
    p.add_argument("--lr", type=float, nargs="+", help="of fine-tuning, one or more")
    p.add_argument("--weight-decay", type=float, nargs="+", help="of fine-tuning, one or more; divided by the rate")
    r = GRIDS[p.parse_args(argv).grid]
    p.set_defaults(**{k: v for k, v in r.items() if k != "norms"})
    args = p.parse_args(argv)
    evaluate.one_process()
    evaluate.check_flags(args)
    common.at_least(1, args, "updates")
    common.at_least(2, args, "batch_size")
    common.at_least(1e-9, args, "lr")
    common.at_least(0, args, "weight_decay")
    if args.data or args.limit:
        common.fail("--sets takes the place of --data, and whole sets are used: no --limit")
    return args, {k: getattr(args, k) for k in ("updates", "batch_size", "lr", "weight_decay")} | {"norms": r["norms"]}


class Model:
    """A backbone of the command line, and how it is run. Results go into `folder`."""

    def __init__(self, target, args, device):
        opened = checkpoints.open_backbone(target, args.arch, args.size, args.seed)
        self.backbone, preprocess, _, self.path = opened
        self.preprocess = preprocess | {"interpolation": "bicubic", "short": preprocess["size"]}
        self.backbone.to(device, memory_format=torch.channels_last)
        self.device, self.workers, self.seed = device, args.workers, args.seed
        self.amp = common.bf16_is_fast(device) if args.amp is None else args.amp
        self.folder = self.path.parent if self.path else Path("runs", f"transfer-{target.replace(':', '-')}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            common.fail(f"{self.folder}: {runs.reason(error)}")
        digest = self.path and hashlib.sha1(self.path.read_bytes()).hexdigest()
        self.about = f"seed {self.seed}; weights {digest}; {'bf16' if self.amp else 'fp32'}"

    def measure(self, name, task, how, r):
        """The result of `frozen` or `finetuned`, from evaluate.json if it is there."""
        parts = " + ".join(str(n) for n in (len(task.y) - len(task.val), len(task.val), len(task.test_y)))
        protocol = f"{task.metric}; {parts} images at {self.preprocess['size']} px, {task.contents}; {self.about}"
        protocol += f"; {json.dumps(r)}" * (how == "finetuned")
        key = hashlib.sha1(protocol.encode()).hexdigest()[:8]  # results of other settings stay
        known = evaluate.read_json(self.folder).get(name, {}).get("transfer", {}).get(how, {}).get(key, {})
        if "score" in known:
            return known

        def keep(result):
            result = {"protocol": protocol} | result
            evaluate.write_json(self.folder, name, {"transfer": {how: {key: result}}})
            return result

        if how == "finetuned":
            return keep(finetuned(task, self, r, known.get("grid", {}), lambda grid: keep({"grid": grid})))
        images, settings = {"train": task.train, "test": task.test}, (self.device, self.workers, self.amp)
        return keep(frozen(task, *(
            evaluate.cached(self.backbone, self.path, images[part], f"transfer-{part}", self.preprocess, *settings)
            for part in images  # beside the features of evaluate.py, whose images are cut otherwise
        )))  # fmt: skip


def main(argv=None):
    args, r = parse_args(argv)
    device = common.setup(args.device)[2]
    scores = {how: {name: {} for name in args.checkpoint} for how in args.how}
    tasks = {name: open_set(name, args.root, device, args.seed) for name in args.sets}
    for target in args.checkpoint:
        model = Model(target, args, device)
        for name, task in tasks.items():
            for how in args.how:
                found = model.measure(name, task, how, r)
                scores[how][target][name] = found["score"]
                print(
                    f"{target} on {name}, {how}: {task.metric} {found['score']:.2f}   ({found['chosen']})", flush=True
                )
    for how in args.how:
        print(f"\n{table(scores[how], how, args.sets)}")


if __name__ == "__main__":
    common.run(main)
