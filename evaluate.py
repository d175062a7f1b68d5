"""What the frozen features of a network tell: of a run, of plain torchvision weights, or of random init.

    python evaluate.py runs/byol-shapes                              k-NN and linear probes on the data of the run
    python evaluate.py runs/byol-cifar10 --data cifar100 --probe knn linear lbfgs mlp      mlp: one hidden layer
    python evaluate.py resnet50.pth --arch resnet50 --data DIR       a plain torchvision state dict
    python evaluate.py random:resnet18 --data cifar10 --size 32      the baseline that every number stands beside
    python evaluate.py RUN --probe linear mlp --labels 1 10 100      on shares of the labels
    python evaluate.py RUN --probe lbfgs --penalty study             the regulariser of Kolesnikov et al. 2019

Features are extracted once, in eval() and inference mode, and cached beside the checkpoint: whatever a probe does, the
backbone is frozen by construction. Every number is printed with its protocol and kept in RUN/evaluate.json. The
training scripts call the same functions, and so do the commands in downstream/ and analysis/, which ask other
questions.
"""

import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import checkpoints
import common
import data
import optim
import runs
import sets

KS = (1, 10, 20, 100, 200)
FEWEST = 10  # labelled images that a linear probe needs
PROBES = ("knn", "linear", "lbfgs", "mlp")
MOVED = {  # probes that are commands of their own
    "finetune": "downstream.finetune", "depth": "analysis.depth", "schedule": "analysis.schedule",
    "perceptual": "analysis.reconstruct", "pictures": "analysis.reconstruct",
    **dict.fromkeys(("neighbours", "gradients", "localisation", "swap"), "analysis.diagnose"),
}  # fmt: skip


# ============ features ============


@contextlib.contextmanager
def in_eval(*modules):
    """Within it the modules are in eval mode; after it each of their parts is in the mode it was in."""
    modes = [(m, m.training) for module in modules for m in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def room(device):
    """Bytes that features may take there: half of what a GPU has free, or of a rank's part of the computer's memory;
    the least of all ranks."""
    if device.type == "cuda":  # torch keeps freed memory for itself, and the driver does not know that it is free
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + cached
    else:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
        free = pages / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = torch.tensor(free / 2, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(free, dist.ReduceOp.MIN)
    return free.item()


def storage(n, device):
    """How n features are kept, {"dtype", "device"}: the first that has room of fp32 and fp16 on `device`, fp32 and fp16
    on the CPU."""
    places = [(where, dtype) for where in (device, torch.device("cpu")) for dtype in (torch.float32, torch.float16)]
    where, dtype = next((p for p in places if n * p[1].itemsize <= room(p[0])), places[-1])
    return {"dtype": dtype, "device": where}


def extract(backbone, dataset, preprocess, device, batch_size=512, workers=0, amp=False, progress=False):
    """Features [N, d], kept as `storage` says, and labels [N] on `device` (-1: none) of the un-augmented images, in
    order.

    All ranks must call it: each extracts its share, and all get the whole. It takes no more memory than what it returns
    and a batch.
    """
    wanted = getattr(backbone, "preprocess", {})  # of a network of colour channels
    if any(tuple(preprocess[k]) != tuple(v) for k, v in wanted.items()):
        common.fail("networks of colour channels take images in [0, 1], not normalized ones: cmc.py trains them")
    rank, world = common.rank(), common.world_size()
    if world > 1:  # without SyncBN each rank has its own averages; those of rank 0 are saved, so all use them
        for buffer in backbone.buffers():
            dist.broadcast(buffer, 0)
    share, at = math.ceil(len(dataset) / world), 0
    mine = torch.arange(rank * share, (rank + 1) * share) % len(dataset)  # the last share is filled up from the front
    features, labels = None, torch.empty(world, share, dtype=torch.int64)
    plain = data.batches(dataset, preprocess, batch_size, device, workers, mine)
    with in_eval(backbone), torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
        for x, y in tqdm(plain, "features", math.ceil(share / batch_size), leave=False, disable=not progress or None):
            z = backbone(x).float()
            if features is None:
                with torch.inference_mode(False):  # L-BFGS differentiates through products with them
                    features = torch.empty(world, share, z.shape[1], **storage(world * share * z.shape[1], device))
                largest = torch.finfo(features.dtype).max
            features[rank, at : at + len(z)] = z.clamp(-largest, largest) if features.dtype == torch.float16 else z
            labels[rank, at : at + len(z)] = y
            at += len(z)
    for r in range(world if world > 1 else 0):  # in place: no rank ever holds a part twice
        dist.broadcast(features[r], r)
        dist.broadcast(labels[r], r)
    return features.flatten(0, 1)[: len(dataset)], labels.flatten()[: len(dataset)].to(device)


def with_labels(features, labels):
    """Those with a label; a copy where some have none. Labels stay on a GPU, where probes compute, even where features
    are on the CPU."""
    labels = labels.to(features.device) if labels.device.type == "cpu" else labels
    keep = labels >= 0
    return (features, labels) if keep.all() else (features[keep.to(features.device)], labels[keep])


def health(features):
    """Label-free figures: feature_std, the mean per-dimension standard deviation of the L2-normalised features times
    sqrt(d) (1: spread over the sphere, 0: collapsed), and the effective rank (Roy and Vetterli 2007) of 2,000 of
    them."""
    some = torch.linspace(0, len(features) - 1, min(2000, len(features)), device=features.device).long()
    z = F.normalize(features[some].float(), dim=1)  # spread over the set, which may be sorted by class
    s = torch.linalg.svdvals(z - z.mean(0))
    p = s / s.sum().clamp(min=1e-12)
    rank = torch.exp(-(p * p.clamp(min=1e-12).log()).sum())
    return {"feature_std": (z.std(0).mean() * z.shape[1] ** 0.5).item(), "effective_rank": rank.item()}


# ============ k nearest neighbours ============


def nearest(keys, queries, k, device=None, chunk=500, most=2**26):
    """(cosines, places) [Q, k] of the k of `keys` [N, d] most like each of `queries` [Q, d], nearest first. In fp32: in
    bf16 the neighbours of a random or half collapsed network, all of them close, blur. At a time `most` numbers of the
    keys are normalized (256 MB), and there are `chunk` cosines for each."""
    part = max(1, most // keys.shape[1])
    best, unit = {}, lambda x: F.normalize(x.to(device, torch.float32), dim=1)
    for start in range(0, len(keys), part):
        some = unit(keys[start : start + part]).T
        for i, q in enumerate(queries.split(chunk)):
            s, at = (unit(q) @ some).topk(min(k, some.shape[1]), 1)  # [c, k]
            at += start
            if start:
                s, at = torch.cat([best[i][0], s], 1), torch.cat([best[i][1], at], 1)
                s, order = s.topk(min(k, s.shape[1]), 1)
                at = at.gather(1, order)
            best[i] = s, at
    return tuple(torch.cat(t) for t in zip(*best.values(), strict=True))


@torch.inference_mode()
def knn(keys, key_labels, queries, query_labels, ks=KS, temperature=0.1, chunk=500, also=()):
    """Top-1 in per cent of the k-NN classifier with cosine similarity: {k: (weighted, majority)}.

    keys [N, d], queries [M, d], any scale; labels int64, all >= 0. One top-k of the largest k, sorted, serves every k.
    Weighted: each neighbour votes exp(s / T) (Wu et al. 2018, sec. 3.4); majority: each votes 1, the nearer class wins
    a tie; also: further T, whose weighted votes follow in the tuple. A k above N is left out; if all are, k is N.
    """
    classes, device = int(max(key_labels.max(), query_labels.max())) + 1, key_labels.device
    ks = [k for k in ks if k <= len(keys)] or [len(keys)]
    right = torch.zeros(len(ks), 2 + len(also), device=device)
    found = (t.split(chunk) for t in (*nearest(keys, queries, max(ks), device, chunk), query_labels))
    for s, neighbour, y in zip(*found, strict=True):
        votes = key_labels[neighbour]
        weighted, *others = (torch.exp((s - 1) / t) for t in (temperature, *also))
        ballots = torch.stack([weighted, 1 + s * 1e-4, *others])  # [2 + len(also), c, k]
        for i, k in enumerate(ks):
            box = torch.zeros(len(ballots), len(y), classes, device=device)
            box.scatter_add_(2, votes[:, :k].expand(len(ballots), -1, -1), ballots[:, :, :k])
            right[i] += (box.argmax(2) == y).sum(1)
    percent = (100 * right / len(queries)).tolist()
    return {k: tuple(row) for k, row in zip(ks, percent, strict=True)}


# ============ linear probes ============

LRS, DECAYS = (1.0, 3.0, 10.0, 30.0, 100.0), (0.0, 1e-6, 1e-5)  # for features of mean norm 1
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # of standardised features


def fit_sgd(x, y, classes, lrs, decays, epochs, batch_size, seed, scale=1.0, rows=None):
    """Softmax regressions for all G pairs (lr, weight decay) at once, on x / scale or on their `rows`: weights [G, C,
    d] and biases [G, C, 1].

    The heads are one matrix of G * C rows, trained on the same batches by SGD with Nesterov momentum 0.9 and a cosine
    to 0; the gradient of the cross-entropy is written out, (softmax - one-hot)^T x, so a step is two products. Of the
    features only a batch is ever copied, to where the labels are.
    """
    rows, lr_decay = torch.arange(len(x)) if rows is None else rows, [(lr, wd) for lr in lrs for wd in decays]
    grid, batch_size = torch.tensor(lr_decay, device=y.device).repeat_interleave(classes, 0), min(batch_size, len(rows))
    lr, decay = grid[:, :1], grid[:, 1:]  # [G * C, 1]
    w = torch.zeros(len(grid), x.shape[1] + 1, device=y.device)  # the last column is the bias
    v, xb, minus = torch.zeros_like(w), w.new_ones(batch_size, w.shape[1]), w.new_full((len(lr_decay), batch_size), -1)
    steps, g = len(rows) // batch_size, data.generator(seed, "linear")
    for epoch in range(epochs):
        order = rows[torch.randperm(len(rows), generator=g)[: steps * batch_size]].view(steps, batch_size)
        true = y[order.to(y.device)] * batch_size + torch.arange(batch_size, device=y.device)  # places in [C, b]
        for step, (some, right) in enumerate(zip(order.to(x.device), true, strict=True), epoch * steps):
            torch.div(x.index_select(0, some).to(y.device, torch.float32), scale, out=xb[:, :-1])
            # The batch as last dimension: a softmax over the last one is slow where there are few classes.
            p = (w @ xb.T).view(-1, classes, batch_size).softmax(1)  # [G, C, b]
            p.view(len(minus), -1).scatter_add_(1, right.expand(len(minus), -1), minus)
            u = (p.flatten(0, 1) @ xb).div_(batch_size).addcmul_(w, decay)
            v.mul_(0.9).add_(u)
            w.addcmul_(lr, u.add_(v, alpha=0.9), value=-optim.cosine(step, epochs * steps, 1.0, 0.0))
    return w.view(-1, classes, x.shape[1] + 1).split([x.shape[1], 1], 2)


def hits(logits, y):
    """Whether each of the five best classes is the right one, bool [..., N, 5], for logits [..., N, C] and labels
    [N]."""
    return logits.topk(min(5, logits.shape[-1]), -1).indices == y[:, None]


def per_cent(right):
    """(top-1, top-5) of `hits`."""
    return 100 * right[..., 0].float().mean(-1), 100 * right.any(-1).float().mean(-1)


def accuracy(logits, y):
    """(top-1, top-5) in per cent for logits [..., N, C] and labels [N]."""
    return per_cent(hits(logits, y))


def accuracy_of(net, x, y, rows=None, chunk=1024):
    """The same of `net`, features [n, d] to logits, on x and y or on their `rows`. In parts, so that there are never
    all logits (of a whole grid, of 1000 classes) at a time, nor a copy of the features."""
    parts = (torch.arange(len(x)) if rows is None else rows).split(chunk)
    x_of = lambda rows: x[rows.to(x.device)].to(y.device, torch.float32)
    return per_cent(torch.cat([hits(net(x_of(part)), y[part.to(y.device)]) for part in parts], -2))


def held_out(n, seed):
    """(places to train on, places of a tenth, at most 10,000) of a TRAINING set: the tenth chooses hyper-parameters."""
    order = torch.randperm(n, generator=data.generator(seed, "held out"))
    size = min(10_000, max(1, n // 10))
    return order[size:], order[:size]


@torch.no_grad()
def fit_linear(x, y, classes, epochs=100, batch_size=256, lrs=LRS, decays=DECAYS, seed=0):
    """A softmax regression: the grid on nine tenths of the training features, the best pair by the last tenth, then
    that pair on all of them, which BYOL does not do. Features are divided by their mean norm, one number, so that one
    grid fits every method. Returns that number, w [1, C, d], b [1, C, 1] and {"lr", "weight_decay", "grid"}; `grid` has
    the held-out top-1 of each pair."""
    scale = torch.cat([part.to(y.device, torch.float32).norm(dim=1) for part in x.split(8192)]).mean()
    train, val = held_out(len(x), seed)
    w, b = fit_sgd(x, y, classes, lrs, decays, epochs, batch_size, seed, scale, train)
    scores = accuracy_of(lambda z: z / scale @ w.mT + b.mT, x, y, val)[0]  # [G]
    pairs = [(lr, wd) for lr in lrs for wd in decays]
    lr, wd = pairs[int(scores.argmax())]
    grid = {f"lr {a:g} wd {c:g}": round(s, 2) for (a, c), s in zip(pairs, scores.tolist(), strict=True)}
    w, b = fit_sgd(x, y, classes, [lr], [wd], epochs, batch_size, seed, scale)
    return scale, w, b, {"lr": lr, "weight_decay": wd, "grid": grid}


@torch.inference_mode()
def linear_sgd(x, y, test_x, test_y, **settings):
    """`fit_linear` and its accuracy on the test features: {"top1", "top5", "lr", "weight_decay", "grid"}."""
    scale, w, b, chosen = fit_linear(x, y, int(max(y.max(), test_y.max())) + 1, **settings)
    top1, top5 = accuracy_of(lambda z: (z / scale @ w.mT + b.mT)[0], test_x, test_y)
    return {"top1": top1.item(), "top5": top5.item(), **chosen}


def fit_lbfgs(x, y, classes, penalty, start=None, iterations=200):
    """The minimiser of mean cross-entropy + penalty / 2 |W|^2, by full-batch L-BFGS: W [d, C] and b [C]."""
    w = torch.zeros(x.shape[1], classes, device=x.device) if start is None else start[0].clone()
    b = torch.zeros(classes, device=x.device) if start is None else start[1].clone()
    w.requires_grad_(), b.requires_grad_()
    optimizer = torch.optim.LBFGS([w, b], max_iter=iterations, history_size=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ w + b, y) + penalty / 2 * w.pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.detach(), b.detach()


def standardised(x, test_x):
    """Both sets of features, each dimension to mean 0 and deviation 1 over the training set `x`."""
    x, test_x = x.float(), test_x.float()
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    return (x - mean) / std, (test_x - mean) / std


def linear_lbfgs(x, y, test_x, test_y, penalties=PENALTIES, seed=0):
    """Multinomial logistic regression on standardised features; no learning rate, of several penalties the best chosen
    on the held-out tenth of the training set. Returns {"top1", "top5", "penalty", "grid"}.

    penalties = "study": that of Kolesnikov et al. 2019, 100 / (M C) for M features and C classes, on features as they
    are, with their 800 updates. It counts per image, as the cross-entropy here is a mean (sum or mean: they do not
    say)."""
    classes, updates = int(max(y.max(), test_y.max())) + 1, 200
    y, test_y = y.to(x.device), test_y.to(x.device)  # it computes where the features are
    if penalties == "study":
        x, test_x, penalties, updates = x.float(), test_x.float(), [100 / (x.shape[1] * classes)], 800
    else:
        x, test_x = standardised(x, test_x)
    head, scores = None, []
    if len(penalties) > 1:
        train, val = held_out(len(x), seed)
        for penalty in penalties:  # from strong to weak, each starting where the last ended
            head = fit_lbfgs(x[train], y[train], classes, penalty, head)
            scores.append(accuracy_of(lambda z: z @ head[0] + head[1], x, y, val)[0].item())  # noqa: B023, called here
    best = penalties[scores.index(max(scores))] if scores else penalties[0]
    w, b = fit_lbfgs(x, y, classes, best, iterations=updates)
    top1, top5 = accuracy_of(lambda z: z @ w + b, test_x, test_y)
    grid = {f"penalty {p:g}": round(s, 2) for p, s in zip(penalties, scores, strict=False)}
    return {"top1": top1.item(), "top5": top5.item(), "penalty": best, "grid": grid}


# ============ a probe with a hidden layer ============


def fit_mlp(x, y, classes, lrs, passes, hidden, batch_size, seed):
    """A network for each rate, with one hidden layer, ReLU and dropout 0.5, all from one init and on the same batches:
    Adam and a cosine to 0. Where a pass has fewer than 30 updates, there are more than `passes`."""
    device, batch_size = y.device, min(batch_size, len(x))
    steps = len(x) // batch_size
    epochs, g = math.ceil(passes * max(1, 30 / steps)), data.generator(seed, "mlp")
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(seed)  # of weights and dropout; outside, the random numbers go on as they were
        layers = nn.Linear(x.shape[1], hidden), nn.ReLU(), nn.Dropout(0.5), nn.Linear(hidden, classes)
        nets = [copy.deepcopy(nn.Sequential(*layers)).to(device) for _ in lrs]
        groups = [{"params": net.parameters(), "lr": lr} for net, lr in zip(nets, lrs, strict=True)]
        optimizer = torch.optim.Adam(groups, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
        for _ in range(epochs):
            order = torch.randperm(len(x), generator=g)[: steps * batch_size]
            for rows in order.view(steps, batch_size):
                xb, yb = x[rows.to(x.device)].to(device), y[rows.to(device)]
                loss = sum(F.cross_entropy(net(xb), yb) for net in nets)  # no weight is in two of them
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return [net.eval() for net in nets]


@torch.no_grad()
def mlp_probe(x, y, test_x, test_y, lrs=(3e-4, 1e-3, 3e-3), passes=10, hidden=1000, batch_size=256, seed=0):
    """What is in the features, but not linearly (Kolesnikov et al. 2019, Figure 3): one hidden layer on standardised
    features. The rate is chosen on the held-out tenth by runs of `passes` // 3, then all training images are used.
    Theirs has the same layers, but SGD with momentum 0.9 and lr 0.1 * batch / 256 on features of random crops as they
    are. Returns {"top1", "top5", "lr", "grid"}."""
    classes, (x, test_x) = int(max(y.max(), test_y.max())) + 1, standardised(x, test_x)
    train, val = held_out(len(x), seed)
    nets = fit_mlp(x[train], y[train], classes, lrs, passes // 3, hidden, batch_size, seed)
    scores = [accuracy_of(net, x, y, val)[0].item() for net in nets]
    lr = lrs[scores.index(max(scores))]
    (net,) = fit_mlp(x, y, classes, [lr], passes, hidden, batch_size, seed)
    top1, top5 = accuracy_of(net, test_x, test_y)
    grid = {f"lr {a:g}": round(s, 2) for a, s in zip(lrs, scores, strict=True)}
    return {"top1": top1.item(), "top5": top5.item(), "lr": lr, "grid": grid}


# ============ the probes together, during and after training ============

TRAIN_IMAGES, TEST_IMAGES = 50_000, 10_000  # at most so many make a point of the k-NN curves


def first(dataset, n):
    """At most n images of a set, always the same ones."""
    return sets.subset(dataset, n, 0) if len(dataset) > n else dataset


def knn_curves(train, test):
    """{"knn20", "knn200"}, weighted k-NN (T 0.1) on (features, labels) pairs; {} where either has no labels."""
    (x, y), (test_x, test_y) = with_labels(*train), with_labels(*test)
    scores = knn(x, y, test_x, test_y, (20, 200)) if len(x) and len(test_x) else {}
    return {f"knn{k}": weighted for k, (weighted, _) in scores.items()}


def monitor(backbone, train, test, preprocess, device, workers=0, amp=False, head=None):
    """What a training script logs between epochs: `health`, and where there are labels `knn_curves`; with a `head`, the
    200-NN of its outputs as well (embedding_knn200). All ranks must call it."""
    pair = extract(backbone, first(train, TRAIN_IMAGES), preprocess, device, workers=workers, amp=amp)
    numbers = health(pair[0])
    if not (pair[1] >= 0).any():  # on all ranks alike; the test images would tell nothing
        return numbers
    pairs = pair, extract(backbone, first(test, TEST_IMAGES), preprocess, device, workers=workers, amp=amp)
    numbers |= knn_curves(*pairs)
    if head is not None and (pairs[1][1] >= 0).any():
        with in_eval(head), torch.inference_mode():
            (x, y), (test_x, test_y) = (with_labels(*pair) for pair in pairs)
            x, test_x = (head(features.to(device, torch.float32)) for features in (x, test_x))
            scores = knn(x, y, test_x, test_y, (200,))
        numbers |= {f"embedding_knn{k}": weighted for k, (weighted, _) in scores.items()}
    return numbers


def tops(r):
    return f"top-1 {r['top1']:.2f}  top-5 {r['top5']:.2f}"


def kept(x):
    return f"kept in {'fp16' if x.dtype == torch.float16 else 'fp32'} on {x.device.type}"


def run_probes(train, test, probes, temperature=0.1, seed=0, say=print, penalties=None, amp=False, share=False):
    """Run `probes` on (features, labels) pairs; prints each result with its protocol and returns them as a dict, with
    the label-free health figures unless the pairs are a `share` of others. penalties: of `linear_lbfgs`, if not its
    own. amp: whether the backbone ran in bf16, for the protocol."""
    results = {}
    if not share:
        results["health"] = h = health(train[0])
        say("health   " + "  ".join(f"{k} {v:.3g}" for k, v in h.items()))
        say("         of training features, without labels; feature_std: 1 if they are spread evenly, 0 at collapse")
        if h["feature_std"] < 0.05:
            say("warning: the features are nearly constant (collapse): probes read what little is left")
    (x, y), (test_x, test_y) = with_labels(*train), with_labels(*test)
    if not len(x) or not len(test_x):
        say("no labels: k-NN and linear probes left out")
        return results
    sizes = f"{len(x)} training and {len(test_x)} test images, no augmentation, frozen pooled {x.shape[1]}-d features"
    sizes += f" of a {'bf16' if amp else 'fp32'} backbone, {kept(x)}"
    if "knn" in probes:
        also = (0.07,) if temperature != 0.07 else ()  # that of published 20-NN figures, in DINO's code
        scores = knn(x, y, test_x, test_y, temperature=temperature, also=also)
        names = ["weighted", "majority", *(f"T {t:g}" for t in also)]
        results["knn"] = {f"{k}": dict(zip(names, row, strict=True)) for k, row in scores.items()}
        say("k-NN     " + "".join(f"{f'k={k}':>8}" for k in scores))
        for name, row in zip(names, zip(*scores.values(), strict=True), strict=True):
            say(f"{name:<9}" + "".join(f"{v:8.2f}" for v in row))
        dino = "; T 0.07: as in DINO" if also else ""
        say(f"         cosine similarity, weight exp(s / {temperature:g}){dino}; {sizes}")
    if len(x) < FEWEST:
        say(f"fewer than {FEWEST} labelled images: linear probes left out")
        return results
    if "linear" in probes:
        r = results["linear"] = linear_sgd(x, y, test_x, test_y, seed=seed)
        say(f"linear   {tops(r)}   (frozen; lr {r['lr']:g}, wd {r['weight_decay']:g})")
        say(
            f"         SGD 100 epochs, batch 256, cosine; lr and wd chosen on a tenth of TRAIN, then all of it; {sizes}"
        )
        say("         held-out top-1: " + ", ".join(f"{k}: {v}" for k, v in r["grid"].items()))
    if "lbfgs" in probes:
        r = results["lbfgs"] = linear_lbfgs(x, y, test_x, test_y, penalties or PENALTIES, seed)
        how = f"standardised, penalty {'chosen on a tenth of TRAIN' if r['grid'] else 'given'}"
        how = "as they are, penalty 100 / (M C), 800 updates" if penalties == "study" else how
        say(f"lbfgs    {tops(r)}   (frozen; penalty {r['penalty']:g})")
        say(f"         logistic regression, features {how}; {sizes}")
    if "mlp" in probes:
        r = results["mlp"] = mlp_probe(x, y, test_x, test_y, seed=seed)
        say(f"mlp      {tops(r)}   (frozen; lr {r['lr']:g})")
        say("         one hidden layer of 1000, ReLU, dropout 0.5; standardised features; Adam, batch 256, cosine")
        say("         10 passes, 300 updates at least; lr chosen on a tenth of TRAIN, then all of it; " + sizes)
    return results


def final_probes(backbone, train, test, preprocess, device, args, log, method, step):
    """The end of a training run: the probes, OUT/evaluate.json, the last point of the curves, TensorBoard's embedding
    projector, and the result line, which rank 0 gets. All ranks must call it."""
    with common.explained(f"the run is safe: python evaluate.py {args.out} --device cpu repeats its probes"):
        pairs = [extract(backbone, s, preprocess, device, workers=args.workers, amp=args.amp) for s in (train, test)]
        result = report(pairs, test, preprocess, args, log, method, step) if log.rank == 0 else None
    common.any_rank(False)  # the other ranks wait here: none leaves while rank 0 still works
    return result


def report(pairs, test, preprocess, args, log, method, step):
    """What rank 0 does of `final_probes`, on the (features, labels) pairs of training and test images."""
    results = run_probes(*pairs, args.probes, seed=args.seed, say=log.say, amp=args.amp)
    write_json(log.out, args.data, results)
    figures = {}
    if "knn" in results:
        figures["knn"] = results["knn"]["20" if "20" in results["knn"] else "1"]["weighted"]
    figures |= {k: results[k]["top1"] for k in ("linear", "lbfgs", "mlp") if k in results}
    few = [first(sets.Images("", *pair), n) for pair, n in zip(pairs, (TRAIN_IMAGES, TEST_IMAGES), strict=True)]
    if "knn" in results and all(len(f) == len(x) for f, (x, _) in zip(few, pairs, strict=True)):
        last = {f"knn{k}": results["knn"][f"{k}"]["weighted"] for k in (20, 200) if f"{k}" in results["knn"]}
    else:
        last = knn_curves(*((f.images, f.labels) for f in few))  # of the images that `monitor` draws
    finals = {f"final_{k}": v for k, v in figures.items()}
    log.record("eval", step, epoch=args.epochs, **finals, **last, **results["health"])
    some = torch.randperm(len(test), generator=data.generator("projector"))[:1000]
    x, _ = next(data.batches(test, preprocess | {"mean": (0, 0, 0), "std": (1, 1, 1)}, len(some), "cpu", 0, some))
    name = lambda i: str(test.classes[i]).encode(errors="backslashreplace").decode() if test.classes and i >= 0 else "?"
    names = [name(i) for i in pairs[1][1].cpu()[some].tolist()]
    log.writer.add_embedding(pairs[1][0][some.to(pairs[1][0].device)].float().cpu(), names, x, step)
    log.writer.close()
    found = [f"{k} {v:.1f}" for k, v in figures.items()] or [f"{k} {v:.2f}" for k, v in results["health"].items()]
    return f"{method} {args.data}: {' '.join(found)} ({args.out})"


# ============ evaluate.json ============

MERGED = {"finetune": 1, "depth": 1, "schedule": 1, "labels": 2}  # of these, other shares, layers and epochs stay


def merged(old, new, levels):
    return old | {k: merged(old.get(k, {}), v, levels - 1) for k, v in new.items()} if levels else new


def write_json(out, name, results):
    """OUT/evaluate.json, in which results of other data and other probes stay. A broken one is set aside, not lost."""
    path, name = Path(out, "evaluate.json"), str(name)
    try:
        known = json.loads(path.read_text()) if path.is_file() else {}
        own = known.get(name, {})
        known[name] = own | {key: merged(own.get(key, {}), r, MERGED.get(key, 0)) for key, r in results.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        known, aside = {name: results}, (path.with_name(f"evaluate.json.broken{i}") for i in count(1))
        os.replace(path, aside := next(p for p in aside if not p.exists()))
        print(f"warning: {path} cannot be read ({runs.reason(error)}): set aside as {aside.name}", flush=True)
    runs.write_text(path, json.dumps(known, indent=1) + "\n")
    return path


# ============ what the commands on a checkpoint share ============


def cached(backbone, path, dataset, split, preprocess, device, workers, amp):
    """`extract` with a file beside the checkpoint; its name has a hash of checkpoint, data and preprocessing, and an
    old file of the same split goes when a new one is written."""
    if path is None or not os.access(path.parent, os.W_OK):
        return extract(backbone, dataset, preprocess, device, workers=workers, amp=amp, progress=True)
    key = hashlib.sha1(path.read_bytes())
    key.update(f"{dataset.fingerprint()} {sorted(preprocess.items())} {amp}".encode())
    name = f"features-{path.stem}-{Path(dataset.name).name}-{split}-"
    file = path.parent / f"{name}{key.hexdigest()[:16]}.pt"
    if file.is_file():
        with contextlib.suppress(EOFError, KeyError, AttributeError, ValueError):  # a damaged cache is made again
            features, labels = (runs.load(file)[k] for k in ("features", "labels"))
            fits = features.shape == (len(dataset), backbone.dim) and labels.shape == (len(dataset),)
            if fits and labels.dtype == torch.int64 and features.is_floating_point() and features.isfinite().all():
                where = storage(features.numel(), device)
                if features.dtype == torch.float16:  # its digits are gone, and the protocol says so
                    where["dtype"] = torch.float16
                return features.to(**where), labels.to(device)
    features, labels = extract(backbone, dataset, preprocess, device, workers=workers, amp=amp, progress=True)
    for old in filter(Path.is_file, path.parent.glob(f"{name}*.pt")):
        old.unlink()
    if not file.is_dir():
        runs.write(file, {"features": features.cpu(), "labels": labels.cpu()})
    return features, labels


def flags(doc):
    """A parser with the flags that every command on a checkpoint has."""
    p = argparse.ArgumentParser(description=doc, formatter_class=common.Help)
    p.add_argument("checkpoint", help="a run folder, its backbone.pt, a torchvision state dict, or random:ARCH")
    p.add_argument("--data", help="named set or folder (default: what the checkpoint was trained on)")
    p.add_argument("--root", default="datasets", help="where named sets live")
    p.add_argument("--arch", help="the architecture of a plain state dict")
    p.add_argument("--size", type=int, default=0, help="image size in px (default: the checkpoint's, else 224)")
    p.add_argument("--limit", type=int, default=0, help="use N training images (0: all)")
    p.add_argument("--workers", type=int, default=2, help="decoding workers, for folders")
    p.add_argument("--seed", type=int, default=0, help="of held-out slice, shares, batches, pictures, random:ARCH")
    p.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: cuda, else mps, else cpu")
    p.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bf16 (default: where the device has it)")
    return p


def label_flags(p, default):
    p.add_argument("--labels", type=float, nargs="+", help=f"per cent of the labels, one or more (default: {default})")
    p.add_argument("--label-list", help="instead: a file that names the labelled images, one a line (folders only)")


def within(least, most, args, *names):
    """`common.at_least` for flags that may be lists, or not given (None)."""
    for name in names:
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None:
                common.at_least(least, argparse.Namespace(**{name: value}), name, most=most)


class Subject:
    """What a command works on, from the flags of `flags`: `backbone` on its `device`, its `preprocess`, `about` (what
    the file says of itself), `path` (that file; None for random:ARCH), and `sets`, {"train", "test"}, of the data
    `name`."""

    def __init__(self, args):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            common.fail("this command runs in one process: start it with python, not torchrun")
        within(0, math.inf, args, "limit", "workers")
        within(-(2**63), 2**63 - 1, args, "seed")
        within(*checkpoints.SIZES, argparse.Namespace(size=args.size or None), "size")
        self.device, self.workers = common.setup(args.device)[2], args.workers
        self.amp = common.bf16_is_fast(self.device) if args.amp is None else args.amp
        opened = checkpoints.open_backbone(args.checkpoint, args.arch, args.size, args.seed)
        self.backbone, self.preprocess, self.about, self.path = opened
        self.name = args.data or self.about.get("data") or common.fail("say which data with --data")
        run = (
            f"{self.about['method']}, epoch {self.about['epoch']}, {self.about['arch']}"
            if "method" in self.about
            else ""
        )
        print(f"{run or args.checkpoint} on {self.name} at {self.preprocess['size']} px")
        self.backbone.to(self.device, memory_format=torch.channels_last)
        how = self.device, args.limit, args.seed
        self.sets = {split: sets.load(self.name, args.root, split, *how) for split in ("train", "test")}

    def features(self):
        """The (features, labels) pairs of the training and of the test images."""
        how = self.preprocess, self.device, self.workers, self.amp
        return [cached(self.backbone, self.path, images, split, *how) for split, images in self.sets.items()]

    def need_labels(self, what, shares=None):
        """Exit code 2 unless the test set and each share of the training set, {name: places} (none: all), have
        labels."""
        train, test = (sets.labels_of(s) >= 0 for s in self.sets.values())
        for share, rows in (shares or {"": slice(None)}).items():
            n, name = int(train[rows].sum()), self.sets["train" if share else "test"].name
            if n < FEWEST or not test.any():
                has = f"{n} for the share {share}" if share else "too few labels"
                common.fail(
                    f"{what}: {FEWEST} labelled training images and a labelled test set are needed; {name} has {has}"
                )

    def label_shares(self, args, what, default=()):
        """{name: places of the labelled training images} for --labels (or the `default`, per cent) or --label-list."""
        labels = sets.labels_of(self.sets["train"])
        if args.labels and args.label_list:
            common.fail("--labels and --label-list exclude each other")
        for percent in args.labels or ():
            if not 0 < percent <= 100:
                common.fail(f"--labels {percent:g}: a share is above 0 and at most 100 per cent")
        if args.label_list:
            rows = sets.listed(self.sets["train"], args.label_list)
            shares = {Path(args.label_list).stem: rows[labels[rows] >= 0]}
        else:
            shares = {f"{p:g}": sets.share(labels, p, args.seed) for p in args.labels or default}
        if shares:
            self.need_labels(what, shares)
        return shares

    def folder(self, out, files):
        """Where to write `files`: the folder `out`, else the checkpoint's, else the current one, if that can be."""
        folder = Path(out or (self.path.parent if self.path else "."))
        if not folder.is_dir():
            common.fail(f"--out {out}: there is no such folder")
        if not os.access(folder, os.W_OK):
            common.fail(f"{folder} is read-only: say with --out where to write {files}")
        return folder

    def write(self, results):
        """RUN/evaluate.json; a folder that is read-only costs no numbers."""
        if self.path and results:
            folder = self.path.parent
            writable = os.access(folder, os.W_OK)
            print(
                f"written to {write_json(folder, self.name, results)}"
                if writable
                else f"not written: {folder} is read-only"
            )


def classes_of(dataset):
    """How many classes a set has: its names, and where it has none, its largest label."""
    return len(dataset.classes) if dataset.classes else int(sets.labels_of(dataset).max()) + 1


# ============ the command ============


def probe_name(name):
    """The type of --probe: a name, unless it is of what has a command of its own."""
    if name in MOVED:
        common.fail(f"--probe {name} is a command of its own: python -m {MOVED[name]} RUN")
    return name


def main():
    p = flags(__doc__)
    p.add_argument("--probe", nargs="+", type=probe_name, choices=PROBES, default=["knn", "linear"], help="which")
    label_flags(p, 100)
    p.add_argument("--temperature", type=float, default=0.1, help="T of the weighted k-NN vote; DINO uses 0.07")
    p.add_argument("--penalty", help="lbfgs: a number, or study: 100 / (features * classes) (default: chosen on TRAIN)")
    args = p.parse_args()
    try:
        args.penalty = [float(args.penalty)] if args.penalty not in (None, "study") else args.penalty
    except ValueError:
        common.fail(f"--penalty {args.penalty}: a number or 'study' is expected")
    within(0, 1e6, args, *["penalty"] * (args.penalty != "study"))
    within(1e-4, 1e4, args, "temperature")

    subject, results = Subject(args), {}
    shares = subject.label_shares(args, " ".join(args.probe))
    train, test = subject.features()
    settings = dict(temperature=args.temperature, seed=args.seed, penalties=args.penalty, amp=subject.amp)
    if not shares or 100 in (args.labels or ()):
        results = run_probes(train, test, args.probe, **settings)
    for name, rows in shares.items():
        if args.label_list or name != "100":  # all of the labels stands above
            print(f"{name}{'' if args.label_list else ' %'} of the labels")
            part = train[0][rows.to(train[0].device)], train[1][rows]
            found = run_probes(part, test, args.probe, share=True, **settings)
            results["labels"] = results.get("labels", {}) | {name: found | {"images": len(rows)}}
    subject.write(results)


if __name__ == "__main__":
    common.run(main)
