"""Probes for any checkpoint of this repository, plain torchvision weights, or a random network.

    python evaluate.py runs/byol-shapes                               k-NN and linear probes on the data it was trained on
    python evaluate.py runs/byol-cifar10 --data cifar100 --probe knn linear lbfgs
    python evaluate.py resnet50.pth --arch resnet50 --data DIR        a plain torchvision state dict
    python evaluate.py random:resnet18 --data cifar10 --size 32       the baseline that every number stands beside
    python evaluate.py RUN --probe linear mlp --labels 1 10 100       on shares of the labels; mlp: one hidden layer
    python evaluate.py RUN --probe depth [--layers block3 pre_logits] a linear probe at every depth of the network
    python evaluate.py RUN --probe lbfgs --penalty study              the regulariser of Kolesnikov et al. 2019
    python evaluate.py RUN --probe schedule --decay-at 30 120 480     SGD's accuracy over epochs by when its rate decays
    python evaluate.py RUN --probe finetune --labels 1 10             all weights, on 1 % and on 10 % of the labels
    python evaluate.py RUN --probe finetune --labels 100 --save FILE  the same on all labels, kept as a classifier
    python evaluate.py RUN --probe perceptual --classifier FILE       does it recognise the images that RUN recovers?
    python evaluate.py RUN --probe pictures --beside RUN2             RUN/reconstructions.png
    python evaluate.py RUN --probe neighbours gradients --beside random:resnet10_16     RUN/neighbours.png, RUN/gradients.png
    python evaluate.py RUN --probe localisation swap                  does it look at the object, or at the background?
    python evaluate.py resnet50.pth --arch resnet50 --data DIR --probe localisation --masks DIR2

For k-NN and linear probes features come from the backbone in eval() and inference mode, once, and are cached beside the
checkpoint: whatever these probes do, the backbone is frozen by construction. Every number is printed with its protocol,
and RUN/evaluate.json keeps them. The training scripts call the same functions.
"""

import argparse
import contextlib
import copy
import difflib
import hashlib
import importlib
import json
import math
import os
import re
import typing
from itertools import count, zip_longest
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from torch import nn
from torchvision.transforms.v2 import functional as tvf
from tqdm import tqdm

import backbones
import common
import data
import optim
import runs

KS = (1, 10, 20, 100, 200)
FEWEST = 10  # labelled images that a linear probe needs
PROBES = ("knn", "linear", "lbfgs", "mlp")  # of frozen features: what the training scripts can end with
DIAGNOSIS = ("neighbours", "gradients", "localisation", "swap")
MORE = ("depth", "schedule", "finetune", "perceptual", "pictures", *DIAGNOSIS)


# ============ what a network was trained to see ============


class Trunk(nn.Module):
    """A backbone `f` behind what it was trained to see, so that all of this file works with methods that do not look at
    plain RGB images. Images [B, 3, S, S] in [-1, 1] to [B, dim].

    lightness: of Lab the L alone, as `data.lightness` gives it. grey: luma in the place of all channels. patch: of the
    3 x 3 cells of `cell` px in the middle of an image the central `patch` px each or, with a `stride`, every patch of a
    grid over the whole image, one every `stride` px; the image's features are the mean over these. standardise: each
    patch, or the image where there are none, to mean 0 and deviation 1.
    """

    def __init__(self, f, lightness=False, standardise=False, patch=0, cell=0, stride=0, grey=False):
        super().__init__()
        self.f, self.dim = f, f.dim
        self.lightness, self.standardise, self.grey = lightness, standardise, grey
        self.preprocess = getattr(f, "preprocess", {})  # of a network of colour channels, which `extract` looks at
        self.patch, self.cell, self.stride = patch, cell, stride

    def see(self, x):
        """What f gets: [B, 3, S, S], or n patches an image, [B * n, 3, patch, patch]."""
        if self.lightness:
            x = data.lightness(data.to_lab(x / 2 + 0.5))
        if self.grey:
            x = data.grey(x).expand(-1, 3, -1, -1)
        if self.stride:
            x = x.unfold(2, self.patch, self.stride).unfold(3, self.patch, self.stride)  # [B, 3, G, G, patch, patch]
            x = x.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        elif self.patch:
            x = tvf.center_crop(x, [3 * self.cell] * 2).unflatten(2, (3, -1)).unflatten(4, (3, -1))  # [B, 3, 3, c, 3, c]
            inside = slice(start := (self.cell - self.patch) // 2, start + self.patch)
            x = x[:, :, :, inside, :, inside].permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        return data.standardise(x) if self.standardise else x

    def mean(self, features, images):
        """Over the patches of each image: [B * n, ...] to [B, ...]."""
        return features.unflatten(0, (images, -1)).mean(1) if self.patch else features

    def forward(self, x):
        return self.mean(self.f(self.see(x)), len(x))  # [B, dim]

    def taps(self, x, most=9000):
        """{layer: map [B, C, h, w] or vector [B, dim]} of f, in order of depth, each pooled to `most` features at most
        (`shrink`), and then averaged over the patches."""
        return {name: self.mean(shrink(tap, most), len(x)) for name, tap in self.f.taps(self.see(x)).items()}


def shrink(tap, most):
    """A map [B, C, H, W] of more than `most` features max-pooled by windows of ceil(sqrt(features / most)) px, of which
    only whole ones count; others, and vectors [B, d], as they are (the study's evaluation at all depths)."""
    if tap.ndim == 2 or tap[0].numel() <= most:
        return tap
    return F.max_pool2d(tap, min(math.ceil(math.sqrt(tap[0].numel() / most)), *tap.shape[2:]))  # a window fits the map


def as_trained(f, preprocess, size=0):
    """The backbone `f` behind what it was trained to see: a Trunk if a checkpoint's `preprocess` says so under "sees" (a
    Trunk's arguments), else f. `size`: px that were asked for instead of its own."""
    if not preprocess.get("sees"):
        return f
    trunk = Trunk(f, **preprocess["sees"])
    if trunk.patch and size not in (0, preprocess["size"]):
        common.fail(f"images of {size} px: this network looks at patches cut from {preprocess['size']} px, no other size")
    if trunk.stride and trunk.patch > preprocess["size"]:
        common.fail(f"patches of {trunk.patch} px do not fit images of {preprocess['size']} px")
    if not trunk.stride and (3 * trunk.cell > preprocess["size"] or trunk.patch > trunk.cell):
        common.fail(f"a grid of 3 x 3 cells of {trunk.cell} px, patches of {trunk.patch} px in them, does not fit images of "
                    f"{preprocess['size']} px")  # fmt: skip
    return trunk


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
    """Bytes that features may take there: half of what a GPU has free, or of the computer's memory, in the process with
    the least; under torchrun each process of a computer gets its part of that."""
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
    """How n features are kept, {"dtype", "device"}: the first that has room of fp32 and fp16 on `device`, fp32 and fp16 in
    the computer's memory."""
    places = [(where, dtype) for where in (device, torch.device("cpu")) for dtype in (torch.float32, torch.float16)]
    where, dtype = next((p for p in places if n * p[1].itemsize <= room(p[0])), places[-1])
    return {"dtype": dtype, "device": where}


def extract(backbone, dataset, preprocess, device, batch_size=512, workers=0, amp=False, progress=False):
    """Features [N, d], kept as `storage` says, and labels [N] on `device` (-1: none) of the un-augmented images, in order.

    Under torchrun every process does its share and all get the whole: every process must call it. It takes no more memory
    than what it returns and a batch.
    """
    wanted = getattr(backbone, "preprocess", {})  # of a network of colour channels
    if any(tuple(preprocess[k]) != tuple(v) for k, v in wanted.items()):
        common.fail("networks of colour channels take images in [0, 1], not normalised ones: cmc.py trains them")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if world > 1:  # without SyncBN each process has averages of its own; those of rank 0 are saved, so all use them
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
    for r in range(world if world > 1 else 0):  # in place: no process ever holds a part twice
        dist.broadcast(features[r], r)
        dist.broadcast(labels[r], r)
    return features.flatten(0, 1)[: len(dataset)], labels.flatten()[: len(dataset)].to(device)


def labelled(features, labels):
    """Those with a label; a copy where some have none. Labels stay on a GPU, where probes compute, though features may be
    in the computer's memory."""
    labels = labels.to(features.device) if labels.device.type == "cpu" else labels
    keep = labels >= 0
    return (features, labels) if keep.all() else (features[keep.to(features.device)], labels[keep])


def health(features):
    """Label-free figures: feature_std, the mean per-dimension standard deviation of the L2-normalised features times
    sqrt(d) (1: spread over the sphere, 0: collapsed), and the effective rank (Roy and Vetterli 2007) of 2,000 of them."""
    some = torch.linspace(0, len(features) - 1, min(2000, len(features)), device=features.device).long()
    z = F.normalize(features[some].float(), dim=1)  # spread over the set, which may be sorted by class
    s = torch.linalg.svdvals(z - z.mean(0))
    p = s / s.sum().clamp(min=1e-12)
    rank = torch.exp(-(p * p.clamp(min=1e-12).log()).sum())
    return {"feature_std": (z.std(0).mean() * z.shape[1] ** 0.5).item(), "effective_rank": rank.item()}


# ============ k nearest neighbours ============


def nearest(bank, queries, k, device=None, chunk=500, most=2**26):
    """(cosines, places) [Q, k] of the k vectors of `bank` [N, d] most like each of `queries` [Q, d], nearest first, computed
    in fp32: in bf16 the neighbours of a random or half collapsed network, all of them close, blur. `most`: of
    the bank's numbers at a time, 256 MB of them are normalised; beside them and the result there are `chunk` cosines each."""
    part = max(1, most // bank.shape[1])
    best, unit = {}, lambda x: F.normalize(x.to(device, torch.float32), dim=1)
    for start in range(0, len(bank), part):
        some = unit(bank[start : start + part]).T
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
def knn(bank, bank_labels, queries, query_labels, ks=KS, temperature=0.1, chunk=500, also=()):
    """Top-1 in per cent of the k-NN classifier with cosine similarity: {k: (weighted, majority)}.

    bank [N, d], queries [M, d], any scale; labels int64, all >= 0. One top-k of the largest k, sorted, serves every k.
    Weighted: each neighbour votes exp(s / T) (Wu et al. 2018, sec. 3.4); majority: each votes 1, the nearer class wins
    a tie; also: further T, whose weighted votes follow in the tuple. A k beyond the bank is left out; of a bank smaller
    than every k, all is used.
    """
    classes, device = int(max(bank_labels.max(), query_labels.max())) + 1, bank_labels.device
    ks = [k for k in ks if k <= len(bank)] or [len(bank)]
    right = torch.zeros(len(ks), 2 + len(also), device=device)
    found = (t.split(chunk) for t in (*nearest(bank, queries, max(ks), device, chunk), query_labels))
    for s, neighbour, y in zip(*found, strict=True):
        votes = bank_labels[neighbour]
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


def fit_sgd(x, y, classes, lrs, decays, epochs, batch_size, seed, scale=1.0, rows=None):
    """Softmax regressions for every pair (lr, weight decay) at once, on x / scale or on their `rows`: weights [G, C, d] and
    biases [G, C].

    The G heads are one matrix of G * C rows, trained on the same batches by SGD with Nesterov momentum 0.9 and a cosine
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
    """Whether each of the five best classes is the right one, bool [..., N, 5], for logits [..., N, C] and labels [N]."""
    return logits.topk(min(5, logits.shape[-1]), -1).indices == y[:, None]


def per_cent(right):
    """(top-1, top-5) of `hits`."""
    return 100 * right[..., 0].float().mean(-1), 100 * right.any(-1).float().mean(-1)


def accuracy(logits, y):
    """(top-1, top-5) in per cent for logits [..., N, C] and labels [N]."""
    return per_cent(hits(logits, y))


def judged(net, x, y, rows=None, chunk=1024):
    """The same of `net`, features [n, d] to logits, on x and y or on their `rows`; in parts, so that not all logits (of a
    whole grid, of 1000 classes) are there at a time, nor a copy of the features."""
    parts = (torch.arange(len(x)) if rows is None else rows).split(chunk)
    x_of = lambda rows: x[rows.to(x.device)].to(y.device, torch.float32)
    return per_cent(torch.cat([hits(net(x_of(part)), y[part.to(y.device)]) for part in parts], -2))


def held_out(n, seed):
    """A tenth of the TRAINING set (at most 10,000 images), on which settings are chosen; the test set chooses nothing."""
    order = torch.randperm(n, generator=data.generator(seed, "held out"))
    size = min(10_000, max(1, n // 10))
    return order[size:], order[:size]


@torch.no_grad()
def fit_linear(x, y, classes, epochs=100, batch_size=256, lrs=LRS, decays=DECAYS, seed=0):
    """A softmax regression: the whole grid on nine tenths of the training features, the best pair on the last tenth, then
    that pair on all of them, which BYOL does not do. Features are divided by their mean norm, one number, so that one grid
    fits every method. Returns that number, w [1, C, d], b [1, C, 1] and {"lr", "weight_decay", "grid"}; `grid` has the
    held-out top-1 of each pair."""
    scale = torch.cat([part.to(y.device, torch.float32).norm(dim=1) for part in x.split(8192)]).mean()
    train, val = held_out(len(x), seed)
    w, b = fit_sgd(x, y, classes, lrs, decays, epochs, batch_size, seed, scale, train)
    scores = judged(lambda z: z / scale @ w.mT + b.mT, x, y, val)[0]  # [G]
    pairs = [(lr, wd) for lr in lrs for wd in decays]
    lr, wd = pairs[int(scores.argmax())]
    grid = {f"lr {a:g} wd {c:g}": round(s, 2) for (a, c), s in zip(pairs, scores.tolist(), strict=True)}
    w, b = fit_sgd(x, y, classes, [lr], [wd], epochs, batch_size, seed, scale)
    return scale, w, b, {"lr": lr, "weight_decay": wd, "grid": grid}


@torch.inference_mode()
def linear_sgd(x, y, test_x, test_y, fitted=None, **settings):
    """Linear probe: `fit_linear`, or what it has `fitted` already, judged on the test features. Returns {"top1", "top5",
    "lr", "weight_decay", "grid"}."""
    scale, w, b, chosen = fitted or fit_linear(x, y, int(max(y.max(), test_y.max())) + 1, **settings)
    top1, top5 = judged(lambda z: (z / scale @ w.mT + b.mT)[0], test_x, test_y)
    return {"top1": top1.item(), "top5": top5.item(), **chosen}


def linear_head(scale, w, b, _):
    """What `fit_linear` found as an nn.Linear from features as they are to logits."""
    head = nn.Linear(w.shape[2], w.shape[1], device=w.device)
    head.load_state_dict({"weight": w[0] / scale, "bias": b[0, :, 0]})
    return head


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


def linear_lbfgs(x, y, test_x, test_y, penalties=(1e-1, 1e-2, 1e-3, 1e-4, 1e-5), seed=0):
    """Multinomial logistic regression on standardised features; no learning rate, of several penalties the best chosen on
    the held-out tenth of the training set. Returns {"top1", "top5", "penalty", "grid"}.

    penalties = "study": that of Kolesnikov et al. 2019, 100 / (M C) for M features and C classes, on features as they are
    and with their 800 updates. It counts per image, as the cross-entropy here is a mean (their sum or mean is not said)."""
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
            scores.append(judged(lambda z: z @ head[0] + head[1], x, y, val)[0].item())  # noqa: B023, called here
    best = penalties[scores.index(max(scores))] if scores else penalties[0]
    w, b = fit_lbfgs(x, y, classes, best, iterations=updates)
    top1, top5 = judged(lambda z: z @ w + b, test_x, test_y)
    grid = {f"penalty {p:g}": round(s, 2) for p, s in zip(penalties, scores, strict=False)}
    return {"top1": top1.item(), "top5": top5.item(), "penalty": best, "grid": grid}


@torch.inference_mode()
def late_decays(x, y, test_x, test_y, decay_at=(30, 120, 480), batch_size=2048, seed=0):
    """How late should the rate decay? (Kolesnikov et al. 2019, Figure 8) Softmax regression by SGD on features as they are:
    momentum 0.9, no weight decay, lr 0.1 * batch / 256, x 0.1 after D and D + 20 epochs of D + 40. Returns {D: test top-1
    in per cent after each epoch}. Until its first decay every D trains alike: one run at the full rate serves all."""
    batch_size = min(batch_size, len(x))
    steps, lr, columns = len(x) // batch_size, 0.1 * batch_size / 256, torch.arange(batch_size, device=y.device)

    def train(w, v, first, last, lr):
        """Epochs `first` to `last`, not included, of weights and momentum [C, 1 + d], in place: top-1 after each. The first
        column is the bias: a column of ones in the features would need a copy of them all."""
        curve = []
        for epoch in tqdm(range(first, last), f"lr {lr:g}", unit="epoch", leave=False, disable=None):
            order = torch.randperm(len(x), generator=data.generator(seed, "late decays", epoch))
            for rows in order[: steps * batch_size].view(steps, batch_size):
                xb = x.index_select(0, rows.to(x.device)).to(y.device, torch.float32)
                p = (w[:, 1:] @ xb.T).add_(w[:, :1]).softmax(0)  # [C, b]
                p[y[rows.to(y.device)], columns] -= 1  # the gradient of the cross-entropy, as in `fit_sgd`
                gradient = torch.cat([p.sum(1, keepdim=True), p @ xb], 1)
                w.sub_(v.mul_(0.9).add_(gradient, alpha=1 / batch_size), alpha=lr)
            curve.append(judged(lambda z: z @ w[:, 1:].T + w[:, 0], test_x, test_y)[0])
        return curve

    w = torch.zeros(int(max(y.max(), test_y.max())) + 1, 1 + x.shape[1], device=y.device)
    v, start, full, curves = torch.zeros_like(w), 0, [], {}
    for d in sorted(set(decay_at)):
        full += train(w, v, start, d, lr)
        branch = w.clone(), v.clone()
        tail = train(*branch, d, d + 20, 0.1 * lr) + train(*branch, d + 20, d + 40, 0.01 * lr)
        start, curves[d] = d, torch.stack(full + tail).tolist()
    return curves


# ============ a probe with a hidden layer ============


def fit_mlp(x, y, classes, lrs, passes, hidden, batch_size, seed):
    """A network for each rate, with one hidden layer, ReLU and dropout 0.5, all from one start and on the same batches:
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
    features. The rate is chosen on the held-out tenth of the training set by runs of `passes` // 3, then all of it is used.
    Theirs has the same layers, but SGD with momentum 0.9 and lr 0.1 * batch / 256 on features that are not standardised,
    of random crops. Returns {"top1", "top5", "lr", "grid"}."""
    classes, (x, test_x) = int(max(y.max(), test_y.max())) + 1, standardised(x, test_x)
    train, val = held_out(len(x), seed)
    nets = fit_mlp(x[train], y[train], classes, lrs, passes // 3, hidden, batch_size, seed)
    scores = [judged(net, x, y, val)[0].item() for net in nets]
    lr = lrs[scores.index(max(scores))]
    (net,) = fit_mlp(x, y, classes, [lr], passes, hidden, batch_size, seed)
    top1, top5 = judged(net, test_x, test_y)
    grid = {f"lr {a:g}": round(s, 2) for a, s in zip(lrs, scores, strict=True)}
    return {"top1": top1.item(), "top5": top5.item(), "lr": lr, "grid": grid}


# ============ a probe at every depth ============


class Depths(nn.Module):
    """The `layers` of a backbone (none: all), each pooled to `most` features at most, as one long vector of an image:
    [B, 3, size, size] to [B, n]. `shapes`: {layer: (C, h, w) or (dim,)}, in order of depth. A layer that the network does
    not have ends the program with exit code 2.

    As in the study's code, root is after the first pooling, and a RevNet's block before the pooling that follows it. Unlike
    there, the last block of a ResNet v2 or RevNet is after the last BatchNorm (and ReLU), and a VGG's block after its
    max-pooling."""

    def __init__(self, backbone, layers, size, most=9000):
        super().__init__()
        self.trunk, self.most = backbone if isinstance(backbone, Trunk) else Trunk(backbone), most
        if not hasattr(self.trunk.f, "taps"):
            common.fail("depth needs a backbone with `taps`, which gives its layers by name (backbones.py)")
        with in_eval(backbone), torch.inference_mode():
            taps = self.trunk.taps(torch.zeros(1, 3, size, size, device=next(backbone.parameters()).device), most)
        for name in layers:
            if name not in taps:
                near = difflib.get_close_matches(name, taps, 1, 0.0)[0]
                common.fail(f"--layers {name}: did you mean {near!r}? This network has {', '.join(taps)}")
        self.shapes = {name: tuple(tap.shape[1:]) for name, tap in taps.items() if not layers or name in layers}

    def forward(self, x):
        taps = self.trunk.taps(x, self.most)
        return torch.cat([taps[name].flatten(1) for name in self.shapes], 1)


def depth(net, train, test, preprocess, device, workers=0, amp=False, seed=0):
    """A linear probe on each of the layers of a `Depths` (Kolesnikov et al. 2019, Figure 5), whose features are extracted in
    one pass over each set: {layer: {"shape", "features", "top1", "top5", "lr", "weight_decay", "grid"}}. Where those of all
    layers would need more memory than there is `room` for, in one pass for each layer. No weight decay is tried: the study
    has none."""
    shapes, images, results = net.shapes, len(train) + len(test), {}
    fits = 4 * images * sum(map(math.prod, shapes.values())) <= room(device)
    for names in [list(shapes)] if fits else [[name] for name in shapes]:
        net.shapes = {name: shapes[name] for name in names}  # what its forward gives
        sizes = [math.prod(shapes[name]) for name in names]
        (x, y), (test_x, test_y) = (
            labelled(*extract(net, s, preprocess, device, 128, workers, amp, progress=True)) for s in (train, test)
        )
        for name, n, a, b in zip(names, sizes, x.split(sizes, 1), test_x.split(sizes, 1), strict=True):
            r = linear_sgd(a, y, b, test_y, decays=(0.0,), seed=seed)
            results[name] = {"shape": list(shapes[name]), "features": n, "kept": kept(x)} | r
        del x, test_x, a, b  # before the next layer's are there
    net.shapes = shapes
    return results


def classes_of(dataset):
    """How many classes a set has: its names, and where it has none, its largest label."""
    return len(dataset.classes) if dataset.classes else int(data.labels_of(dataset).max()) + 1


# ============ fine-tuning on a share of the labels ============

# The semi-supervised protocol of SwAV (eval_semisup.py) and SaGe (configs/benchmarks/semi_classification): SGD with momentum
# 0.9, 20 epochs, rates x 0.2 at 60 % and 80 %, batch 256, random crops and flips, one rate for the trunk and one for the
# head. Their rates are for ImageNet, and SaGe does not say which of its grid won. What fits the head depends on the scale of
# the features, which differs by method, and few images need other rates: hence a small grid of our own (measured:
# results/README.md).
TRUNK_LRS, HEAD_LRS = (0.02, 0.1), (0.02, 0.2)
SCRATCH_LRS = (0.1,), (0.1,)  # random:ARCH, a network trained with labels alone: the trunk has everything to learn
SAGE_LRS = [(lr, factor * lr) for lr in (0.1, 0.01, 0.001) for factor in (1, 10, 100)]
PROTOCOLS = {  # {per cent of the labels: (pairs of rates for trunk and head, weight decay)}
    "swav": {1: ([(0.02, 5.0)], 0.0), 10: ([(0.01, 0.2)], 0.0)},
    "sage": {1: (SAGE_LRS, 5e-4), 10: (SAGE_LRS, 1e-4)},
}


def fit_finetune(backbone, train, preprocess, device, trunk_lr, head_lr, epochs, batch_size, weight_decay=0.0, workers=0,
                 amp=False, seed=0):  # fmt: skip
    """A copy of `backbone` and a linear head on top, trained together: (nn.Sequential, mean loss of the last epoch).

    BatchNorm is in train mode, the head starts at zero. The loss is NaN or infinite, and training stops, if it diverges.
    """
    y = data.labels_of(train).to(device)
    net = nn.Sequential(copy.deepcopy(backbone), nn.Linear(backbone.dim, classes_of(train))).to(device).train()
    for p in net[1].parameters():
        nn.init.zeros_(p)
    groups = [{"params": part.parameters(), "lr": lr} for part, lr in zip(net, (trunk_lr, head_lr), strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=weight_decay)
    drops = [math.ceil(0.6 * epochs), math.ceil(0.8 * epochs)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, 0.2)
    view = data.view(**{k: preprocess[k] for k in ("size", "interpolation", "mean", "std")})
    loader = data.Loader(train, [view], min(batch_size, len(train)), seed, workers=workers, device=device)
    for epoch in tqdm(range(epochs), f"lr {trunk_lr:g} {head_lr:g}", unit="epoch", leave=False, disable=None):
        total = 0.0
        for index, (x,) in loader.epoch(epoch):
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                logits = net(x)
            loss = F.cross_entropy(logits.float(), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        schedule.step()
        mean = float(total) / loader.steps
        if not math.isfinite(mean):
            break
    return net, mean


def finetune(backbone, train, test, preprocess, device, pairs, epochs=20, batch_size=256, weight_decay=0.0, workers=0, amp=False,
             seed=0):  # fmt: skip
    """Fine-tune `backbone`, which stays as it is, on `train`, all of it labelled, and classify `test`.

    Of several `pairs` of learning rates (trunk, head) the best is chosen on a held-out tenth of `train`, then fitted on all.
    Returns (nn.Sequential of trunk and head in eval mode, {"top1", "top5", "images", "trunk_lr", "head_lr",
    "weight_decay", "epochs", "batch_size", "updates", "grid"}). Ends the program where training diverges.
    """
    grid = {}
    # Of few images smaller batches, so that an epoch still has updates; BatchNorm needs some images in each.
    batch_size = min(batch_size, max(32, len(train) // 16))
    settings = (epochs, batch_size, weight_decay, workers, amp, seed)
    if len(pairs) > 1:
        rows, val = (data.pick(train, part) for part in held_out(len(train), seed))
        for pair in pairs:
            net, loss = fit_finetune(backbone, rows, preprocess, device, *pair, *settings)
            top1, _ = judged(lambda z: z, *labelled(*extract(net, val, preprocess, device, workers=workers, amp=amp)))
            grid[pair] = round(top1.item(), 2) if math.isfinite(loss) else -1.0
    pair = max(pairs, key=lambda pair: grid.get(pair, 0.0))  # the first of the best
    net, loss = fit_finetune(backbone, train, preprocess, device, *pair, *settings)
    if not math.isfinite(loss):
        common.fail(f"fine-tuning diverged at --trunk-lr {pair[0]:g} --head-lr {pair[1]:g}: try lower ones")
    top1, top5 = judged(lambda z: z, *labelled(*extract(net, test, preprocess, device, workers=workers, amp=amp)))
    updates = epochs * (len(train) // min(batch_size, len(train)))
    result = {"top1": top1.item(), "top5": top5.item(), "images": len(train), "trunk_lr": pair[0], "head_lr": pair[1]}
    result |= {"weight_decay": weight_decay, "epochs": epochs, "batch_size": batch_size, "updates": updates}
    return net.eval(), result | {"grid": {f"trunk {a:g} head {b:g}": score for (a, b), score in grid.items()}}


# ============ classifiers ============


class Classifier(nn.Module):
    """A frozen network whose forward takes images in [-1, 1], of any square size, to logits [B, classes]: it resizes them
    to the size it was trained at and normalises them by its own mean and std."""

    def __init__(self, net, classes, mean, std, size):
        super().__init__()
        self.net, self.classes, self.size = net, classes, size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, x):
        x = (x.float() / 2 + 0.5 - self.mean) / self.std
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return self.net(x)


def open_classifier(target, arch=None, size=None):
    """The Classifier in a file of --save, in a torchvision state dict (`arch` names its network; `size` in px, default
    224), or "torchvision:NAME" with its default weights, which torchvision downloads. Bad input ends the program."""
    try:
        if target.startswith("torchvision:"):
            name = target.removeprefix("torchvision:")
            best = torchvision.models.get_model_weights(name).DEFAULT
            net, own = torchvision.models.get_model(name, weights=best), best.transforms()
            return Classifier(net, len(best.meta["categories"]), own.mean, own.std, size or own.crop_size[0])
        if not Path(target).is_file():
            common.fail(f"--classifier {target}: no such file")
        found = runs.load(target)
        if found.get("kind") == "classifier" and {"state_dict", "preprocess"} <= set(found):
            own = well_formed(target, found)["preprocess"]
            backbone = backbones.build(found["arch"], found.get("built_for", own["size"]))
            backbone.load_state_dict(found["state_dict"])
            head = nn.Linear(backbone.dim, len(found["head"]["bias"]))
            head.load_state_dict(found["head"])
            net = nn.Sequential(as_trained(backbone, own, size or 0), head)
            return Classifier(net, head.out_features, own["mean"], own["std"], size or own["size"])
        if "preprocess" in found or "model" in found:
            common.fail(f"--classifier {target} holds no classifier: --probe finetune --save FILE makes one")
        if not arch:
            common.fail(f"--classifier {target} holds a plain state dict: say of which network with --classifier-arch")
        biases = [v for k, v in weights(f"--classifier {target}", found).items() if k.endswith(".bias") and v.ndim == 1]
        if not biases:
            common.fail(f"--classifier {target} is not a state dict: it holds no weights by name")
        net = torchvision.models.get_model(arch, weights=None, num_classes=len(biases[-1]))
        net.load_state_dict(found)
        return Classifier(net, len(biases[-1]), data.MEAN, data.STD, size or 224)
    except OSError as error:  # urllib's errors are of this kind
        common.fail(f"--classifier {target} could not be fetched: {runs.reason(error)}")
    except (EOFError, ValueError, AttributeError) as error:  # AttributeError: torchvision's networks for other tasks
        common.fail(f"--classifier {target}: {runs.reason(error)}")
    except RuntimeError as error:
        common.fail(f"--classifier {target} does not fit the architecture: {' '.join(str(error).split())[:300]}")


# ============ recovered images: the perceptual test and pictures ============

HALF = (0.5, 0.5, 0.5)  # mean and std that take [0, 1] to [-1, 1]


def guesses(classifier):
    """How many a classifier has for one picture: five as in SaGe (sec. 4.4), one of ten classes or fewer, of which five
    would say little."""
    return 1 if classifier.classes <= 10 else 5


def check_classifier(classifier, dataset):
    """Stop unless the outputs of `classifier` can be the classes of `dataset`."""
    if not (data.labels_of(dataset) >= 0).any():
        common.fail(f"{dataset.name} has no labels, so there is nothing that a classifier could recognise")
    if classifier.classes != classes_of(dataset):
        common.fail(f"the classifier knows {classifier.classes} classes, {dataset.name} has {classes_of(dataset)}")


@torch.inference_mode()
def perceptual(autoencoder, classifier, dataset, size, device, batch_size=256, workers=0, amp=False):
    """The perceptual test of SaGe (sec. 4.4): does a network trained with labels still recognise the recovered images?

    autoencoder: [B, 3, size, size] in [-1, 1] to the same; classifier: from open_classifier, or None for the error
    alone. Returns {"mse"}, the mean squared difference of images in [-1, 1], and top-1 and top-5 in per cent of the
    recovered and of the un-augmented images themselves: {"top1", "top5", "originals_top1", "originals_top5"}.
    """
    if classifier is not None:
        check_classifier(classifier, dataset)
    plain = {"size": size, "interpolation": "bilinear", "mean": HALF, "std": HALF}
    errors, logits, originals, labels = [], [], [], []
    with in_eval(autoencoder), torch.autocast(device.type, torch.bfloat16, enabled=amp):
        for x, y in data.batches(dataset, plain, batch_size, device, workers):
            recovered = autoencoder(x).float()
            errors.append((recovered - x).square().mean((1, 2, 3)))
            if classifier is not None:
                logits.append(classifier(recovered).float())
                originals.append(classifier(x).float())
                labels.append(y)
    result = {"mse": torch.cat(errors).mean().item()}
    for name, scores in (("", logits), ("originals_", originals)) if labels else ():
        top1, top5 = accuracy(*labelled(torch.cat(scores), torch.cat(labels)))
        result |= {f"{name}top1": top1.item(), f"{name}top5": top5.item()}
    return result


GAP, STRIP = 4, 16  # px between pictures, and of the strip for what is written under one
PASSES, FAILS = (0, 160, 0), (220, 0, 0)


def figure(rows, headings=None, frames=False):
    """Rows of pictures with words, as float [3, H, W] in [0, 1].

    rows: list of (name, images [N, 3, S, S] in [-1, 1], captions, marks). The name stands at the left. Images are
    enlarged by a whole factor, without smoothing, to at least 96 px. captions, marks: one string and one bool (or None)
    an image, or None: written under the image, as a green dot for True and a red one for False; `frames`: as a frame of
    that colour around the image. headings: {column: what to write above it}.
    """
    pixels = [(images.float().cpu() + 1).mul(127.5).round().clamp(0, 255).byte() for _, images, _, _ in rows]
    pixels = [x.repeat_interleave(k := math.ceil(96 / x.shape[-1]), 2).repeat_interleave(k, 3) for x in pixels]
    cell, most = max(x.shape[-1] for x in pixels), max(len(x) for x in pixels)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = 2 * GAP + math.ceil(max(ruler.textlength(name) for name, *_ in rows))
    heights = [cell + GAP + STRIP * bool(captions or marks) for _, _, captions, marks in rows]
    top = GAP + STRIP * bool(headings)
    canvas = Image.new("RGB", (left + most * (cell + GAP), top + sum(heights)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, words in (headings or {}).items():
        draw.text((left + column * (cell + GAP), 2), words, fill="black")
    for (name, _, captions, marks), x, height in zip(rows, pixels, heights, strict=True):
        draw.text((GAP, top + cell // 2 - 6), name, fill="black")
        for i in range(len(x)):
            at, below = left + i * (cell + GAP), top + cell
            canvas.paste(tvf.to_pil_image(x[i]), (at, top))
            if captions:
                words = captions[i]
                while ruler.textlength(words) > cell - STRIP:
                    words = words[:-1]
                draw.text((at + STRIP, below + 2), words, fill="black")
            if marks and marks[i] is not None:
                colour = PASSES if marks[i] else FAILS
                if frames:
                    draw.rectangle((at - 2, top - 2, at + cell + 1, below + 1), outline=colour, width=4)
                else:
                    draw.ellipse((at + 3, below + 3, at + STRIP - 4, below + STRIP - 4), fill=colour)
        top += height
    return tvf.pil_to_tensor(canvas).float() / 255


@torch.inference_mode()
def reconstructions(autoencoders, dataset, views, device, classifier=None, n=8, seed=0, amp=False):
    """A `figure` of `n` images of a set and of one cut of each per view, all with what the autoencoders recover of them.

    autoencoders: {name: module}, each [B, 3, S, S] in [-1, 1] to the same; with one of name "" the rows need no names.
    views: of data.view, with mean = std = 0.5. The images and the cuts depend on `seed` alone. Under a recovery stand its
    mean squared error and, with a classifier, whether the image's class is among its first `guesses`.
    """
    picked = data.pick(dataset, torch.randperm(len(dataset), generator=data.generator(seed, "pictures"))[:n])
    plain = {"size": views[0]["size"], "interpolation": "bilinear", "mean": HALF, "std": HALF}
    x, y = next(data.batches(picked, plain, len(picked), device))
    index, cuts = next(data.Loader(picked, views, len(picked), seed, device=device).epoch(0))
    places = index.argsort()  # the loader shuffles
    sources = [("image", x), *((f"view {i}", cut[places]) for i, cut in enumerate(cuts, 1))]
    rows = []
    modules = [*autoencoders.values(), *([classifier] if classifier is not None else [])]
    with in_eval(*modules), torch.autocast(device.type, torch.bfloat16, enabled=amp):
        for source, x in sources:
            rows.append((source, x, None, None))
            for name, autoencoder in autoencoders.items():
                recovered = autoencoder(x).float()
                captions = [f"{e:.3f}" for e in (recovered - x).square().mean((1, 2, 3)).tolist()]
                marks = None
                if classifier is not None:
                    best = classifier(recovered).topk(guesses(classifier), 1).indices.cpu()
                    hits = (best == y[:, None]).any(1).tolist()
                    marks = [hit if label >= 0 else None for hit, label in zip(hits, y.tolist(), strict=True)]
                rows.append((f"recovered ({name})" if name else "recovered", recovered, captions, marks))
    return figure(rows)


# ============ visual diagnosis: what does a network look at? (Distilling Localization, sec. 3) ============


def pixel_gradients(net, x, y):
    """d score_y / d x, float [B, 3, S, S], the score being the logit of class y [B] for x [B, 3, S, S], net in eval mode.

    One backward for the batch, as in eval mode no image's score depends on another image. No parameter gets a gradient,
    and the caller may be in inference mode."""
    with torch.inference_mode(False), torch.enable_grad(), in_eval(net):
        x = x.detach().clone().requires_grad_()  # a clone made here is no inference tensor
        scores = net(x).gather(1, y.clone().to(x.device)[:, None])
        return torch.autograd.grad(scores.sum(), x)[0].float()


def class_gradients(net, x, y):
    """The saliency of each pixel for class y (Simonyan et al. 2014): the largest |d score_y / d x| of its channels.

    net: normalised images [B, 3, S, S] to logits [B, C]; y int64 [B]. Returns float [B, S, S]; more in `pixel_gradients`.
    """
    return pixel_gradients(net, x, y).abs().amax(1)


class Model(typing.NamedTuple):
    """What the pictures need of a backbone: `net` is it with a linear head on top (None without labels), bank and queries
    are its features of the training and of the test images, [N, d]."""

    name: str
    net: nn.Sequential | None
    preprocess: dict
    bank: torch.Tensor
    queries: torch.Tensor


def choose(labels, n, seed):
    """Places of `n` labelled images, drawn by `seed`, as evenly of all classes as can be, sorted by class."""
    g = data.generator(seed, "queries")
    order = torch.randperm(len(labels), generator=g)
    order = order[labels[order] >= 0]
    order = order[labels[order].argsort(stable=True)]
    y = labels[order]
    turn = torch.arange(len(y)) - torch.searchsorted(y, y)  # 0: the first image of a class, 1: the second, ...
    return order[(turn + torch.rand(len(y), generator=g)).argsort()[:n].sort().values]


def title(dataset, label):
    """The name of a class, without the WordNet number that folders of ImageNet's classes may begin with."""
    name = "" if label < 0 else str(dataset.classes[label] if dataset.classes else label)
    return re.sub(r"^n\d{8}_", "", name)


def shown(model, dataset, rows, device, size):
    """The images at `rows` as the model sees them, [B, 3, size, size] in [-1, 1] for a `figure`."""
    x, _ = next(data.batches(dataset, model.preprocess | {"mean": HALF, "std": HALF}, len(rows), device, 0, rows))
    return F.interpolate(x, (size, size))


def attention(model, dataset, rows, device, size):
    """The same in grey under black-red-yellow-white heat: the class gradients of each image for its true label. The
    hottest hundredth of an image's pixels is white, so that one of them does not leave all others dark."""
    maps = class_gradients(model.net, *next(data.batches(dataset, model.preprocess, len(rows), device, 0, rows)))
    heat = (maps / maps.flatten(1).quantile(0.99, 1).clamp(min=1e-30)[:, None, None]).clamp(0, 1)[:, None]
    heat = F.interpolate(heat, (size, size))
    hot = (3 * heat - torch.arange(3, device=device).view(3, 1, 1)).clamp(0, 1)
    return 2 * torch.lerp(0.6 * data.grey(shown(model, dataset, rows, device, size) / 2 + 0.5), hot, heat) - 1


def neighbours(models, train, test, rows, device, k=3):
    """A `figure` with a row for each test image of `rows`: for every model the class gradients and the k nearest training
    images by cosine, framed green if they are of the image's class and red if not (Figures 2 and 7 to 13). Without labels
    no gradients (a model's `net` is None), no frames and no captions."""
    size, labels, y = max(m.preprocess["size"] for m in models), data.labels_of(train), data.labels_of(test)[rows]
    none = [None] * len(rows)
    columns = [(shown(models[0], test, rows, device, size), [f"# {i}" for i in rows.tolist()], none)]
    headings = {0: "query"}
    for m in models:
        headings[len(columns)] = m.name
        if m.net is not None:
            columns.append((attention(m, test, rows, device, size), ["gradient"] * len(rows), none))
        for places in nearest(m.bank, m.queries[rows.to(m.queries.device)], k, device)[1].T.cpu():
            theirs = labels[places].tolist()
            marks = [None if a < 0 else a == b for a, b in zip(theirs, y.tolist(), strict=True)]
            columns.append((shown(m, train, places, device, size), [title(train, a) for a in theirs], marks))
    table = []
    for i, label in enumerate(y.tolist()):
        images, captions, marks = zip(*([part[i] for part in column] for column in columns), strict=True)
        table.append((title(test, label), torch.stack(images), captions, marks))
    return figure(table, headings, frames=True)


def gradients(models, test, rows, device):
    """A `figure` of the test images at `rows` and, for every model, their class gradients for the true label; below them
    the class that the model's linear classifier names, and whether it is right."""
    size, y = max(m.preprocess["size"] for m in models), data.labels_of(test)[rows].tolist()
    table = [("image", shown(models[0], test, rows, device, size), [title(test, label) for label in y], None)]
    for m in models:
        best = m.net[1](m.queries[rows.to(m.queries.device)].to(device, torch.float32)).argmax(1).tolist()
        marks = [a == b for a, b in zip(best, y, strict=True)]
        table.append((m.name, attention(m, test, rows, device, size), [title(test, label) for label in best], marks))
    return figure(table)


def object_masks(dataset, size, folder=None):
    """Where the objects are, bool [N, H, W], from `folder` or the set's own: of a set in memory on its images as they
    are, of a folder on the images as a network of `size` px sees them. No masks: exit code 2."""
    if folder is None:
        if dataset.masks is None:
            common.fail(f"{dataset.name} has no masks of its objects: name a folder of masks with --masks")
        return dataset.masks > 0
    if isinstance(dataset, data.Images):
        return data.read_masks(folder, dataset, dataset.images.shape[-1]) > 128

    def shape(i):
        try:
            if isinstance(dataset.items, list):
                with Image.open(dataset.path(i)) as image:  # reads no pixel
                    return image.size[::-1]
            return dataset.read(i)[0].shape[1:]
        except OSError:
            return size, size  # without a label from `data.batches`, and so left out

    masks = data.read_masks(folder, dataset, size)  # squashed to a square: back to each image's shape, then cut as it is
    whole = (tvf.resize(mask[None], list(shape(i))) for i, mask in enumerate(masks))
    return torch.cat([data.fit(mask, size, "nearest-exact") for mask in whole]) > 128


def with_object(dataset, masks):
    """Places of the labelled images with an object in their mask."""
    return ((data.labels_of(dataset) >= 0) & masks.flatten(1).any(1).cpu()).nonzero()[:, 0]


def partners(n, seed):
    """A random image for each of n, int64 [n]: a permutation in which none keeps its place."""
    order = torch.randperm(n, generator=data.generator(seed, "swap"))
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def localisation(backbone, head, dataset, masks, preprocess, device, batch_size=64, workers=0, seed=0):
    """How much of the gradients for the true labels lies on the objects, where masks [N, H, W] are True. Per cent:

    energy: the share of their squares, summed over channels, that lies inside the object, mean over the images.
    pointing: the images whose map (`class_gradients`) has its maximum inside (Zhang et al. 2016's pointing game).
    area: the share of pixels that are inside, mean over the images: the energy of a uniform map.
    energy_other, pointing_other: with the object of another image: the score of attending to a place, not to the object.
    Returns these and the number of "images"; images without a label or an object are left out.
    """
    rows, net, found = with_object(dataset, masks), nn.Sequential(backbone, head), []
    if len(rows) < 2:
        common.fail(f"localisation needs 2 test images with labels and objects; {dataset.name} has {len(rows)}")
    pairs = rows.split(batch_size), rows[partners(len(rows), seed)].split(batch_size)
    plain = data.batches(dataset, preprocess, batch_size, device, workers, rows)
    for (x, y), *places in zip(plain, *pairs, strict=True):
        m = masks[torch.cat(places).to(masks.device)].byte()
        m = data.fit(m, preprocess["size"], "nearest-exact").to(device).flatten(1).view(2, len(x), -1) > 0  # own, other
        keep = ((y >= 0).to(device) & m[0].any(1)).nonzero()[:, 0]  # an image that does not decode has no label
        m, g = m[:, keep], pixel_gradients(net, x[keep], y[keep.cpu()]).flatten(2)  # [2, b, S * S], [b, 3, S * S]
        g = g / g.abs().amax((1, 2), keepdim=True).clamp(min=1e-30)  # squares of small numbers would vanish
        energy, top = g.square().sum(1), g.abs().amax(1).argmax(1)
        share = (energy * m).sum(2) / energy.sum(1).clamp(min=1e-30)  # [2, b]
        hit = m[:, torch.arange(len(keep), device=device), top]  # [2, b]
        found.append(torch.cat([share, hit, m[:1].float().mean(2)]).cpu().double())
    means = (100 * torch.cat(found, 1).mean(1)).tolist()
    names = ("energy", "energy_other", "pointing", "pointing_other", "area")
    return dict(zip(names, means, strict=True)) | {"images": sum(f.shape[1] for f in found)}


def fill(images, masks):
    """Images [B, C, H, W] in which what masks [B, H, W] cover (True) is made up from the pixels around it.

    A normalised convolution, the mean of x (1 - m) over the mean of 1 - m, as wide as each hole needs: an image of half
    the size is filled first, and gives the start for some steps of diffusion, in which a slope keeps its slope. Other
    pixels stay as they are; an image that is covered whole becomes 0.5.
    """
    hole, known = masks[:, None], (~masks[:, None]).to(images.dtype)
    guess = torch.full_like(images, 0.5)
    if max(images.shape[2:]) > 1:
        weight = F.avg_pool2d(known, 2, ceil_mode=True)
        half = F.avg_pool2d(images * known, 2, ceil_mode=True) / weight.clamp(min=1e-6)
        guess = F.interpolate(fill(half, weight[:, 0] == 0), scale_factor=2, mode="bilinear")
        guess = guess[:, :, : images.shape[2], : images.shape[3]]
    x = torch.where(hole, guess, images)
    for _ in range(10):
        x = torch.where(hole, F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1), x)
    return x


def composites(dataset, masks, preprocess, device, rows, seed=0, batch_size=250, workers=0):
    """Yields ({version: uint8 [b, 3, S, S]}, labels [b]) of the images at `rows`: the "original"; "swapped", the object on
    the ground of its partner, whose own object is filled in; "removed", its own ground without it; "grey", the object
    on mid-grey. All are made at the size of the data (of a folder: at the network's) and then cut as any image is."""
    size = preprocess["size"]
    side = dataset.images.shape[-1] if isinstance(dataset, data.Images) else size
    pixels = preprocess | {"size": side, "mean": (0, 0, 0), "std": (1, 1, 1)}
    # Edges are soft, so an object colours pixels outside its mask: what is filled in is wider by a margin.
    masks, margin = data.fit(masks.byte(), side, "nearest-exact"), max(1, side // 16)
    pairs = rows, partners(len(dataset), seed)[rows]
    streams = [data.batches(dataset, pixels, batch_size, device, workers, part) for part in pairs]
    for (x, y), (other, _), *places in zip(*streams, *(part.split(batch_size) for part in pairs), strict=True):
        m = masks[torch.cat(places).to(masks.device)].to(device)
        wide = F.max_pool2d(m[:, None].float(), 2 * margin + 1, 1, margin)[:, 0] > 0
        own, ground = fill(torch.cat([x, other]), wide).chunk(2)
        m = m[: len(x), None] > 0
        made = {"original": x, "swapped": x.where(m, ground), "removed": own, "grey": x.where(m, 0.5)}
        cut = lambda v: data.fit((255 * v).round().byte(), size, preprocess["interpolation"])
        yield {name: cut(v) for name, v in made.items()}, y


@torch.inference_mode()
def swap(backbone, head, bank, bank_labels, dataset, masks, preprocess, device, k=20, temperature=0.1, seed=0, workers=0,
         amp=False):  # fmt: skip
    """Top-1 in per cent of weighted k-NN and of `head` on the `composites` of a set, both made with ordinary training
    images: bank [N, d] with labels, and a linear layer fitted on it. {version: {"knn", "linear"}}, the number of "images",
    and "object": of the swapped images, the share in per cent whose feature is nearer (cosine) to the image that the
    object is from than to the one that the ground is from. Where grounds tell nothing about the class, accuracies stay as
    they are, and only this figure shows how much of the ground a feature holds."""
    rows = with_object(dataset, masks)
    if len(dataset) < 2 or not len(rows):
        common.fail(f"swap needs 2 test images with labels and objects; {dataset.name} has {len(rows)} of {len(dataset)}")
    features, labels = {}, []
    with in_eval(backbone), torch.autocast(device.type, torch.bfloat16, enabled=amp):
        for made, y in composites(dataset, masks, preprocess, device, rows, seed, workers=workers):
            labels.append(y)
            for name, v in made.items():
                x = data.normalise(v.float() / 255, preprocess["mean"], preprocess["std"])
                features.setdefault(name, []).append(backbone(x).float())
    result = {}
    for name, parts in features.items():
        x, y = labelled(torch.cat(parts), torch.cat(labels))
        (votes,) = knn(bank, bank_labels, x, y, (k,), temperature).values()
        result[name] = {"knn": votes[0], "linear": accuracy(head(x), y)[0].item()}
    place = torch.full((len(dataset),), -1).scatter_(0, rows, torch.arange(len(rows)))
    partner = place[partners(len(dataset), seed)[rows]]
    kept = (partner >= 0).nonzero()[:, 0]  # whose partner is among the images, too
    plain, swapped = (F.normalize(torch.cat(features[v]), dim=1) for v in ("original", "swapped"))
    object_, ground = ((swapped[kept] * plain[other]).sum(1) for other in (kept, partner[kept]))
    return result | {"images": len(y), "object": 100 * (object_ > ground).float().mean().item()}


@torch.inference_mode()
def swap_picture(net, dataset, masks, preprocess, device, rows, seed=0):
    """A `figure` of the composites of the images at `rows`, with what `net` takes each for."""
    made, y = next(composites(dataset, masks, preprocess, device, rows, seed, len(rows)))
    table = []
    with in_eval(net):
        for name, v in made.items():
            best = net(data.normalise(v.float() / 255, preprocess["mean"], preprocess["std"])).argmax(1).tolist()
            marks = [a == b for a, b in zip(best, y.tolist(), strict=True)]
            table.append((name, v.float() / 127.5 - 1, [title(dataset, label) for label in best], marks))
    return figure(table)


# ============ all of it for one backbone ============


BANK, QUERIES = 50_000, 10_000  # at most so many training and test images make a point of the k-NN curves


def curve(bank, test):
    """{"knn20", "knn200"}, weighted k-NN (T 0.1) on (features, labels) pairs; {} where either has no labels."""
    (x, y), (test_x, test_y) = labelled(*bank), labelled(*test)
    scores = knn(x, y, test_x, test_y, (20, 200)) if len(x) and len(test_x) else {}
    return {f"knn{k}": weighted for k, (weighted, _) in scores.items()}


def online(backbone, bank, test, preprocess, device, workers=0, amp=False, head=None):
    """What a training script logs between epochs: 20-NN and 200-NN (`curve`) of BANK training and QUERIES test images at
    most, where there are labels, and the label-free health figures; with a `head`, the 200-NN of what that makes of the
    features as well (embedding_knn200). Every process must call it."""
    pair = extract(backbone, first(bank, BANK), preprocess, device, workers=workers, amp=amp)
    numbers = health(pair[0])
    if not (pair[1] >= 0).any():  # on every process alike; the test images would tell nothing
        return numbers
    pairs = pair, extract(backbone, first(test, QUERIES), preprocess, device, workers=workers, amp=amp)
    numbers |= curve(*pairs)
    if head is not None and (pairs[1][1] >= 0).any():
        with in_eval(head), torch.inference_mode():
            (x, y), (test_x, test_y) = ((head(x.to(device, torch.float32)), y) for x, y in (labelled(*p) for p in pairs))
            scores = knn(x, y, test_x, test_y, (200,))
        numbers |= {f"embedding_knn{k}": weighted for k, (weighted, _) in scores.items()}
    return numbers


def first(dataset, n):
    return data.subset(dataset, n, 0) if len(dataset) > n else dataset


def tops(r):
    return f"top-1 {r['top1']:.2f}  top-5 {r['top5']:.2f}"


def kept(x):
    return f"kept in {'fp16' if x.dtype == torch.float16 else 'fp32'} on {x.device.type}"


def probe(train, test, probes, say=print, **settings):
    """The label-free health figures and `judge` on (features, labels) pairs; prints and returns the results."""
    results = {"health": health(train[0])}
    say("health   " + "  ".join(f"{k} {v:.3g}" for k, v in results["health"].items()))
    say("         of training features, no labels used; feature_std is 1 where features are spread evenly, 0 at collapse")
    if results["health"]["feature_std"] < 0.05:
        say("warning: the features are nearly constant (collapse): probes read what little is left")
    return results | judge(train, test, probes, say=say, **settings)


def judge(train, test, probes, temperature=0.1, seed=0, say=print, fitted=None, penalties=None, amp=False):
    """Run `probes` on (features, labels) pairs; prints each result with its protocol and returns them as a dict. `fitted`:
    what `fit_linear` found on them, where it has been called already. penalties: of `linear_lbfgs`, if not its own. amp:
    whether the backbone ran in bf16, for the protocol."""
    (x, y), (test_x, test_y), results = labelled(*train), labelled(*test), {}
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
        say(f"         cosine similarity, weight exp(s / {temperature:g}){'; T 0.07: as in DINO' if also else ''}; {sizes}")
    if len(x) < FEWEST:
        say(f"fewer than {FEWEST} labelled images: linear probes left out")
        return results
    if "linear" in probes:
        r = results["linear"] = linear_sgd(x, y, test_x, test_y, fitted, seed=seed)
        say(f"linear   {tops(r)}   (frozen; lr {r['lr']:g}, wd {r['weight_decay']:g})")
        say("         SGD 100 epochs, batch 256, cosine; lr and wd chosen on a tenth of TRAIN, then all of it; " + sizes)
        say("         held-out top-1: " + ", ".join(f"{k}: {v}" for k, v in r["grid"].items()))
    if "lbfgs" in probes:
        r = linear_lbfgs(x, y, test_x, test_y, seed=seed, **({"penalties": penalties} if penalties else {}))
        results["lbfgs"] = r
        how = "chosen on a tenth of TRAIN" if r["grid"] else "given"
        how = f"standardised, penalty {how}" if penalties != "study" else "as they are, penalty 100 / (M C), 800 updates"
        say(f"lbfgs    {tops(r)}   (frozen; penalty {r['penalty']:g})")
        say(f"         logistic regression, features {how}; {sizes}")
    if "mlp" in probes:
        r = results["mlp"] = mlp_probe(x, y, test_x, test_y, seed=seed)
        say(f"mlp      {tops(r)}   (frozen; lr {r['lr']:g})")
        say("         one hidden layer of 1000, ReLU, dropout 0.5; standardised features; Adam, batch 256, cosine")
        say("         10 passes, 300 updates at least; lr chosen on a tenth of TRAIN, then all of it; " + sizes)
    return results


def finish(backbone, bank, test, preprocess, device, args, log, method, step):
    """The end of a training run: the probes, OUT/evaluate.json, TensorBoard's embedding projector, and the result line.
    Every process must call it."""
    with common.explained(f"the run is safe: python evaluate.py {args.out} --device cpu repeats its probes"):
        pairs = [extract(backbone, s, preprocess, device, workers=args.workers, amp=args.amp) for s in (bank, test)]
        result = report(pairs, test, preprocess, args, log, method, step) if log.rank == 0 else None
    common.any_rank(False)  # the others wait here: none leaves while one still works
    return result


def report(pairs, test, preprocess, args, log, method, step):
    results, figures = probe(*pairs, args.probes, seed=args.seed, say=log.say, amp=args.amp), {}
    write_json(log.out, args.data, results)
    few = [first(data.Images("", *pair), n) for pair, n in zip(pairs, (BANK, QUERIES), strict=True)]  # as `online` draws them
    if "knn" in results and all(len(f) == len(x) for f, (x, _) in zip(few, pairs, strict=True)):
        last = {f"knn{k}": results["knn"][f"{k}"]["weighted"] for k in (20, 200) if f"{k}" in results["knn"]}
    else:
        last = curve(*((f.images, f.labels) for f in few))
    if "knn" in results:
        figures["knn"] = results["knn"]["20" if "20" in results["knn"] else "1"]["weighted"]
    figures |= {k: results[k]["top1"] for k in ("linear", "lbfgs", "mlp") if k in results}
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


SIZES = 2, 4096  # px, the least and the most
SEES = dict(lightness=bool, standardise=bool, grey=bool, patch=int, cell=int, stride=int)  # the arguments of a Trunk


def weights(path, found):
    """`found` if it is a dict of finite tensors by name, as `load_state_dict` takes it; else exit code 2."""
    if not isinstance(found, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in found.items()):
        common.fail(f"{path} is not a state dict: it holds other things than weights by name")
    bad = [k for k, v in found.items() if not v.isfinite().all()]
    return found if not bad else common.fail(f"{path}: the weights {bad[0]} are not finite")


def well_formed(path, found):
    """`found` if it says all that a backbone.pt or a file of --save says, each of its kind and in its bounds; else exit
    code 2. What is read after it needs no checks of its own."""
    number = lambda v: isinstance(v, int | float) and -1e6 < v < 1e6
    three = lambda v: isinstance(v, list | tuple) and len(v) == 3 and all(map(number, v))
    pixels = lambda v, least=SIZES[0]: type(v) is int and least <= v <= SIZES[1]
    preprocess = found["preprocess"] if isinstance(found["preprocess"], dict) else {}
    mean, std, size, sees = (preprocess.get(k, {}) for k in ("mean", "std", "size", "sees"))
    right = {
        "arch": isinstance(found.get("arch"), str),
        "data": isinstance(found.get("data", ""), str),
        "method": isinstance(method := found.get("method", "byol"), str) and method.isidentifier(),  # never a path
        "epoch": "method" not in found or (type(found.get("epoch")) is int and found["epoch"] >= 0),
        "built_for": pixels(found.get("built_for", SIZES[0])),
        "size": pixels(size),
        "mean": three(mean),
        "std": three(std) and min(std) > 0,
        "interpolation": preprocess.get("interpolation") in ("bilinear", "bicubic"),
        "sees": isinstance(sees, dict)
        and all(type(v) is SEES.get(k) for k, v in sees.items())
        and all(pixels(sees.get(k, 0), 0) for k in ("patch", "cell", "stride"))
        and bool(sees.get("patch")) == bool(sees.get("cell") or sees.get("stride")),
        "head": found.get("kind") != "classifier"
        or (set(head := weights(f"{path}: its head", found.get("head"))) == {"weight", "bias"} and head["bias"].ndim == 1),
        "classes": isinstance(found.get("classes", []), list),
    }  # fmt: skip
    wrong = [name for name, ok in right.items() if not ok]
    if wrong:
        common.fail(f"{path} is no checkpoint of ours: what it says of {', '.join(wrong)} is missing or cannot be")
    weights(path, found["state_dict"])
    return found


def open_backbone(target, arch, size, seed):
    """(backbone, preprocess, what the file says of itself, path or None) for a run folder, a file, or random:ARCH."""
    preprocess = {"mean": data.MEAN, "std": data.STD, "size": size or 224, "interpolation": "bilinear"}
    try:
        if target.startswith("random:"):
            torch.manual_seed(seed)
            backbone = backbones.build(target.removeprefix("random:"), preprocess["size"])
            return backbone, preprocess | getattr(backbone, "preprocess", {}), {}, None
        path = Path(target, "backbone.pt") if os.path.isdir(target) else Path(target)
        if not os.path.isfile(path):
            common.fail(f"{path}: no such checkpoint (a run folder, a .pt file, or random:ARCH is expected)")
        found = runs.load(path)
        if "state_dict" in found and "preprocess" in found:
            preprocess = well_formed(path, found)["preprocess"] | ({"size": size} if size else {})
            backbone = backbones.build(found["arch"], found.get("built_for", found["preprocess"]["size"]))
            backbone.load_state_dict(found["state_dict"])
            return as_trained(backbone, found["preprocess"], size), preprocess, found, path
        if "model" in found:
            common.fail(f"{path} is a training checkpoint; the backbone is in backbone.pt beside it")
        if not arch:
            common.fail(f"{path} holds a plain state dict; only evaluate.py --arch can say of which network")
        backbone = backbones.build(arch, preprocess["size"])
        heads, own = ("fc.", "classifier.", "head.", "heads.", "AuxLogits.", "aux1.", "aux2."), backbone.state_dict()
        backbone.load_state_dict({k: v for k, v in weights(path, found).items() if k in own or not k.startswith(heads)})
        return backbone, preprocess | getattr(backbone, "preprocess", {}), {}, path
    except EOFError as error:
        common.fail(str(error))
    except RuntimeError as error:  # load_state_dict is strict: the first line names the class, the second what is wrong
        common.fail(f"{target} does not fit the architecture: {' '.join(str(error).split())[:300]}")


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


def need_labels(what, sets, shares=None):
    """Exit code 2 unless the test set and each of the shares, {name: places} (none: all), of the training set have labels."""
    train, test = (data.labels_of(s) for s in sets.values())
    for name, rows in (shares or {"": slice(None)}).items():
        n = int((train[rows] >= 0).sum())
        if n < FEWEST or not (test >= 0).any():
            has = f"{sets['train'].name} has {n} for the share {name}" if name else f"{sets['test'].name} has too few labels"
            common.fail(f"{what}: {FEWEST} labelled training images and a labelled test set are needed; {has}")


def label_shares(args, sets, what, default=()):
    """{name: places of the labelled training images} for --labels (else for the `default`, per cent) or --label-list."""
    train = sets["train"]
    labels = data.labels_of(train)
    if args.label_list:
        rows = data.listed(train, args.label_list)
        shares = {Path(args.label_list).stem: rows[labels[rows] >= 0]}
    else:
        shares = {f"{p:g}": data.share(labels, p, args.seed) for p in args.labels or default}
    if shares:
        need_labels(what, sets, shares)
    return shares


def run_frozen(args, pairs, shares, fitted, amp):
    """The probes of PROBES that were asked for, on all labels or on the shares; prints and returns the results."""
    settings = dict(probes=args.probe, temperature=args.temperature, seed=args.seed, penalties=args.penalty, amp=amp)
    results, (x, y) = {}, pairs[0]
    if not shares or 100 in (args.labels or ()):
        results = probe(*pairs, fitted=fitted, **settings)
    for name, rows in shares.items():
        if args.label_list or name != "100":  # all of the labels stands above
            print(f"{name}{'' if args.label_list else ' %'} of the labels")
            part = judge((x[rows.to(x.device)], y[rows]), pairs[1], **settings)
            results["labels"] = results.get("labels", {}) | {name: part | {"images": len(rows)}}
    return results


def run_schedule(args, pairs, path):
    """Figure 8: prints the accuracies, writes schedule.csv, and returns {D: {"final", "curve"}}."""
    (x, y), (test_x, test_y) = (labelled(*pair) for pair in pairs)
    curves = late_decays(x, y, test_x, test_y, args.decay_at, seed=args.seed)
    for d, curve in curves.items():
        some = ", ".join(f"{curve[e - 1]:.2f} after {e}" for e in (1, d, d + 20))
        print(f"schedule first decay at {d}: top-1 {curve[-1]:.2f} after {d + 40} epochs   ({some})")
    print(f"         SGD 0.9, no weight decay, batch {min(2048, len(x))}, lr 0.1 * batch / 256, x 0.1 twice, 20 epochs apart")
    print(f"         {len(x)} training and {len(test_x)} test images, no augmentation; {x.shape[1]}-d features as they are")
    file, columns = Path(args.out or (path.parent if path else "."), "schedule.csv"), zip_longest(*curves.values())
    rows = [",".join("" if a is None else f"{a:.2f}" for a in row) for row in columns]
    table = ["epoch," + ",".join(f"decay at {d}" for d in curves), *(f"{e},{row}" for e, row in enumerate(rows, 1))]
    runs.write_text(file, "\n".join(table) + "\n")
    print(f"{file}: top-1 after every epoch")
    return {f"{d}": {"final": curve[-1], "curve": curve} for d, curve in curves.items()}


def run_depth(args, net, sets, preprocess, device, amp):
    """Figure 5: prints a table of the layers of `net`, a Depths, and returns the results by layer."""
    results = depth(net, *sets.values(), preprocess, device, args.workers, amp, args.seed)
    best = max(r["top1"] for r in results.values())
    print(f"{'depth':<12}{'shape':>14}{'features':>10}{'top-1':>8}")
    for name, r in results.items():
        shape = "x".join(map(str, [*r["shape"][1:], r["shape"][0]]))
        print(f"{name:<12}{shape:>14}{r['features']:>10}{r['top1']:8.2f}{'  best' if r['top1'] == best else ''}")
    print(f"         linear probes of frozen maps, max-pooled to {args.most_features} features at most (height x width x "
          "channels)")  # fmt: skip
    print("         SGD 100 epochs, batch 256, cosine, wd 0; lr chosen on a tenth of TRAIN, then all of it; no augmentation")
    return results


def run_finetune(args, backbone, about, sets, preprocess, device, amp):
    """Fine-tune on every share that was asked for; prints the results, and returns them as {share: result}."""
    train, results, scratch = sets["train"], {}, args.checkpoint.startswith("random:")
    trunk, head = SCRATCH_LRS if scratch else (TRUNK_LRS, HEAD_LRS)
    pairs, decay = [(a, b) for a in args.trunk_lr or trunk for b in args.head_lr or head], args.weight_decay
    given, how = args.trunk_lr or args.head_lr, "a small grid of our own, for small data (published ones: --protocol)"
    how = f"{args.protocol}'s, published for ImageNet" if args.protocol else "given" if given else how
    for name, rows in label_shares(args, sets, "fine-tuning", (1, 10)).items():
        if args.protocol:
            share = 100 * len(rows) / len(train) if args.label_list else float(name)
            near = [found for p, found in PROTOCOLS[args.protocol].items() if 0.8 < share / p < 1.25]
            one_or_ten = f"--protocol {args.protocol} has rates for 1 and 10 % of the labels; {args.label_list} has {share:.3g} %"
            pairs, decay = near[0] if near else common.fail(one_or_ten)
        settings = pairs, args.finetune_epochs, args.batch_size, decay, args.workers, amp, args.seed
        net, r = finetune(backbone, data.pick(train, rows), sets["test"], preprocess, device, *settings)
        results[name] = r
        rates = f"(trunk lr {r['trunk_lr']:g}, head lr {r['head_lr']:g})"
        print(f"finetune {name}{'' if args.label_list else ' %'}   {tops(r)}   {rates}")
        print(f"         {'from random weights' if scratch else 'all weights fine-tuned'}, {r['images']} labelled images, "
              f"{r['epochs']} epochs = {r['updates']} updates of {r['batch_size']}, random crops and flips")  # fmt: skip
        print(f"         SGD 0.9, wd {r['weight_decay']:g}, rates x 0.2 at 60 % and 80 %, {how}; un-augmented test images")
        if r["grid"]:
            grid = ", ".join(f"{k}: {v if v >= 0 else 'diverged'}" for k, v in r["grid"].items())
            print(f"         rates chosen on a tenth of these images, then all of them; held-out top-1: {grid}")
    if args.save:
        trunk = net[0].f if isinstance(net[0], Trunk) else net[0]  # what it sees is in `preprocess`
        weights = [{k: v.cpu() for k, v in part.state_dict().items()} for part in (trunk, net[1])]
        arch = about.get("arch") or args.arch or args.checkpoint.removeprefix("random:")
        # The stem was chosen by the size of the pretraining, which --size may since have changed.
        built_for = about.get("built_for", about.get("preprocess", preprocess)["size"])
        runs.write(args.save, {
            "kind": "classifier", "arch": arch, "state_dict": weights[0], "head": weights[1], "preprocess": preprocess,
            "built_for": built_for, "classes": list(train.classes or []), "data": train.name,
        })  # fmt: skip
        print(f"the last of them is saved in {args.save}")
    return results


def names_of(checkpoints):
    """A short name for each, as different as they are."""
    paths = [p.parent if p.name == "backbone.pt" else p for p in (Path(c).resolve() for c in checkpoints)]
    names = [p.name for p in paths]
    return names if len(set(names)) == len(names) else [f"{p.parent.name}/{p.name}" for p in paths]


def open_autoencoder(run):
    """(the script of the run's method, its autoencoder, what backbone.pt says) for a run folder or the backbone.pt in it."""
    *_, about, path = open_backbone(str(run), None, 0, 0)
    method = about.get("method") or common.fail(f"{run} is not a run of a method that makes images")
    script = importlib.import_module(method) if (Path(__file__).parent / f"{method}.py").is_file() else None
    if not hasattr(script, "autoencoder"):
        common.fail(f"{method} does not make images: the perceptual test and pictures need a run with a decoder")
    return script, script.autoencoder(str(path.parent)), about


def run_images(args, path, dataset, device, amp):
    """The perceptual test and pictures, as far as they were asked for; prints and returns the results."""
    classifier, results = None, {}
    if args.classifier:
        classifier = open_classifier(args.classifier, args.classifier_arch, args.classifier_size).to(device)
        check_classifier(classifier, dataset)
    script, autoencoder, about = open_autoencoder(args.checkpoint)
    size = about["preprocess"]["size"]  # the decoder's: it has no other
    autoencoder.to(device)
    if "perceptual" in args.probe:
        r = perceptual(autoencoder, classifier, dataset, size, device, workers=args.workers, amp=amp)
        results["perceptual"] = r | {"classifier": args.classifier}
        print(f"perceptual {tops(r)}  MSE {r['mse']:.4f}   (recovered images)")
        print(f"           top-1 {r['originals_top1']:.2f}  top-5 {r['originals_top5']:.2f}               (the images)")
        print(f"         {len(dataset)} un-augmented test images at {size} px, judged by {args.classifier}; "
              "MSE of pixels in [-1, 1]")  # fmt: skip
    if "pictures" in args.probe:
        names = names_of([path, *args.beside])
        autoencoders = {names[0] if args.beside else "": autoencoder}
        for name, run in zip(names[1:], args.beside, strict=True):
            _, other, its = open_autoencoder(run)
            if its["preprocess"]["size"] != size:
                common.fail(f"--beside {run}: its images have {its['preprocess']['size']} px, not {size}")
            autoencoders[name] = other.to(device)
        recipe = args.recipe or data.recipe_for(about["data"], script.RECIPES)
        if recipe not in script.RECIPES:
            common.fail(f"--recipe {recipe}: {about['method']}.py has {', '.join(script.RECIPES)}")
        views = [data.view(size, **{**v, "mean": HALF, "std": HALF}) for v in script.RECIPES[recipe]["views"]]
        file = Path(args.out or path.parent, "reconstructions.png")
        picture = reconstructions(autoencoders, dataset, views, device, classifier, seed=args.seed, amp=amp)
        runs.write_picture(file, picture)
        print(f"{file}: images, their views, and what is recovered of each, with its MSE in [-1, 1]")
        if classifier:
            print(f"         green: {args.classifier} has the right class among its first {guesses(classifier)}")
    return results


def ready_for_diagnosis(args, sets, preprocess):
    """(places of the queries, masks or None, backbones of --beside as `open_backbone` gives them), or exit code 2."""
    test, labels = sets["test"], data.labels_of(sets["test"])
    labels = labels if (labels >= 0).any() else torch.zeros_like(labels)  # neighbours are shown without, too
    for i in args.queries or []:
        if not 0 <= i < len(test) or labels[i] < 0:
            common.fail(f"--queries {i}: the test images of {test.name} with a label are among 0 to {len(test) - 1}")
    rows = torch.tensor(args.queries) if args.queries else choose(labels, 8, args.seed)
    masks = None
    if {"localisation", "swap"} & set(args.probe):
        masks = object_masks(test, preprocess["size"], args.masks)
    if "swap" in args.probe and len(test) < 2:
        common.fail(f"swap needs another image's background: {test.name} has {len(test)} test image")
    beside = []
    if {"neighbours", "gradients"} & set(args.probe):
        for target in args.beside:
            size = args.size or (preprocess["size"] if target.startswith("random:") else 0)
            beside.append(open_backbone(target, args.arch, size, args.seed))
    return rows, masks, beside


def fit_pairs(train, test, seed):
    """`fit_linear` on a pair of training features and labels, for all classes that it or the test pair has; None where there
    are too few labels."""
    (x, y), (_, test_y) = labelled(*train), labelled(*test)
    enough = len(x) >= FEWEST and len(test_y)
    return fit_linear(x, y, int(max(y.max(), test_y.max())) + 1, seed=seed) if enough else None


def run_diagnosis(args, backbone, path, sets, pairs, fitted, preprocess, ready, device, amp):
    """The probes of DIAGNOSIS that were asked for; writes the pictures, prints and returns the numbers."""
    (rows, masks, beside), results, folder = ready, {}, Path(args.out or (path.parent if path else "."))
    test, size, head = sets["test"], preprocess["size"], linear_head(*fitted) if fitted else None
    how = "linear classifier on frozen features (that of the linear probe{})"
    how = how.format(f"; lr {fitted[3]['lr']:g}, wd {fitted[3]['weight_decay']:g}" if fitted else "")
    if {"neighbours", "gradients"} & set(args.probe):
        names = names_of([path or args.checkpoint, *args.beside])
        models = [Model(names[0], head and nn.Sequential(backbone, head), preprocess, pairs[0][0], pairs[1][0])]
        for name, (net, its, _, file) in zip(names[1:], beside, strict=True):
            net.to(device, memory_format=torch.channels_last)
            both = [cached(net, file, sets[s], s, its, device, args.workers, amp) for s in sets]
            net = head and nn.Sequential(net, linear_head(*fit_pairs(*both, args.seed)))
            models.append(Model(name, net, its, both[0][0], both[1][0]))
    if "neighbours" in args.probe:
        runs.write_picture(folder / "neighbours.png", neighbours(models, sets["train"], test, rows, device, args.top))
        print(f"{folder / 'neighbours.png'}: test images, {args.top} nearest training images by cosine")
        print("         class gradients; green frame: the image's class, red: another" + "; no labels: left out" * (not head))
    if "gradients" in args.probe:
        runs.write_picture(folder / "gradients.png", gradients(models, test, rows, device))
        print(f"{folder / 'gradients.png'}: |d score / d pixel| for the TRUE label, through a {how}")
        print("         below: the class that it names; green: right, red: wrong")
    if "localisation" in args.probe:
        r = localisation(backbone, head, test, masks, preprocess, device, workers=args.workers, seed=args.seed)
        results["localisation"] = r
        print(f"localisation   energy {r['energy']:.2f}  pointing {r['pointing']:.2f}   (a uniform map: {r['area']:.2f})")
        print(f"  other image  energy {r['energy_other']:.2f}  pointing {r['pointing_other']:.2f}   (the object of another "
              "image: the score of a bias to places)")  # fmt: skip
        print(f"         gradient of the TRUE label's score, {r['images']} un-augmented test images at {size} px, per cent")
        print("         energy: of its squares, those inside the object; pointing: of images, those with its maximum inside")
        print(f"         {how}")
    if "swap" in args.probe:
        r = swap(backbone, head, *labelled(*pairs[0]), test, masks, preprocess, device, 20, args.temperature, args.seed,
                 args.workers, amp)  # fmt: skip
        results["swap"] = r
        versions = [v for v in r if isinstance(r[v], dict)]
        print("swap     " + "".join(f"{v:>10}" for v in versions))
        for name in ("knn", "linear"):
            print(f"{name:<9}" + "".join(f"{r[v][name]:10.2f}" for v in versions))
        print(f"         top-1 of {r['images']} test images: as they are; the object on another's ground, whose object is")
        print("         filled in; the ground alone, the object filled in; the object on mid-grey")
        print(f"         20-NN, cosine, weight exp(s / {args.temperature:g}); {how}")
        print("         both made with ordinary training images")
        print(f"object   {r['object']:.2f} % of the swapped images are nearer to the object's image than to the ground's")
        picture = swap_picture(nn.Sequential(backbone, head), test, masks, preprocess, device, rows, args.seed)
        runs.write_picture(folder / "swap.png", picture)
        print(f"{folder / 'swap.png'}: some of them, with what the linear classifier takes them for")
    return results


RANGES = [  # of numbers, so that none overflows later
    (0, math.inf, "limit workers"), (1, math.inf, "finetune_epochs top most_features decay_at"), (2, math.inf, "batch_size"),
    (0, 1e6, "weight_decay trunk_lr head_lr penalty"), (1e-4, 1e4, "temperature"), (-(2**63), 2**63 - 1, "seed"),
    (*SIZES, "size classifier_size"),
]  # fmt: skip


def parse_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help)
    p.add_argument("checkpoint", help="a run folder, its backbone.pt, a torchvision state dict, or random:ARCH")
    p.add_argument("--data", help="named set or folder (default: what the checkpoint was trained on)")
    p.add_argument("--root", default="datasets", help="where named sets live")
    p.add_argument("--probe", nargs="+", choices=(*PROBES, *MORE), default=["knn", "linear"], help="which probes")
    p.add_argument("--arch", help="the architecture of a plain state dict")
    p.add_argument("--size", type=int, default=0, help="image size in px (default: the checkpoint's, else 224)")
    p.add_argument("--limit", type=int, default=0, help="use N training images (0: all)")
    p.add_argument("--temperature", type=float, default=0.1, help="T of the weighted k-NN vote; DINO uses 0.07")
    p.add_argument("--workers", type=int, default=2, help="decoding processes, for folders")
    p.add_argument("--seed", type=int, default=0, help="of held-out slice, shares, batches, pictures, random:ARCH")
    p.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: cuda, else mps, else cpu")
    p.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bf16 (default: where the device has it)")
    p.add_argument("--out", help="folder for pictures and tables (default: the checkpoint's; for random:ARCH the current one)")
    p.add_argument("--beside", nargs="+", default=[], help="other checkpoints that the pictures show, too")
    p.add_argument("--labels", type=float, nargs="+",
                   help=f"per cent of the labels, one or more: {' '.join(PROBES)} (default: 100), finetune (1 10)")  # fmt: skip
    p.add_argument("--label-list", help="instead: a file that names the labelled images, one a line (folders only)")
    p.add_argument("--penalty", help="lbfgs: a number, or study: 100 / (features * classes) (default: chosen on TRAIN)")
    p.add_argument("--layers", nargs="+", default=[], help="depth: only these (default: all)")
    p.add_argument("--most-features", type=int, default=9000, help="depth: of a layer, more are pooled; fewer is faster")
    p.add_argument("--decay-at", type=int, nargs="+", default=[30, 120, 480], help="schedule: epochs until the first decay")
    f = p.add_argument_group("finetune")
    f.add_argument("--trunk-lr", type=float, nargs="+", help=f"(default: {TRUNK_LRS}, random:ARCH {SCRATCH_LRS[0]})")
    f.add_argument("--head-lr", type=float, nargs="+", help=f"(default: {HEAD_LRS}, random:ARCH {SCRATCH_LRS[1]})")
    f.add_argument("--protocol", choices=PROTOCOLS, help="rates and decay as published for 1 and 10 %% of ImageNet's labels")
    f.add_argument("--finetune-epochs", type=int, default=20, help="passes over the labelled images")
    f.add_argument("--batch-size", type=int, default=256, help="at most; smaller where there are few images")
    f.add_argument("--weight-decay", type=float, default=0.0, help="on all weights")
    f.add_argument("--save", help="write the last fine-tuned network here, for --classifier")
    r = p.add_argument_group("perceptual and pictures")
    r.add_argument("--classifier", help="judges recovered images: a file of --save, a state dict, or torchvision:NAME")
    r.add_argument("--classifier-arch", help="torchvision's name of the network, for a state dict")
    r.add_argument("--classifier-size", type=int, default=0, help="px that it sees (default: its own, else 224)")
    r.add_argument("--recipe", help="of the method's script, whose views the picture shows (default: by data)")
    d = p.add_argument_group(" ".join(DIAGNOSIS))
    d.add_argument("--queries", type=int, nargs="+", help="places of test images to show (default: 8, of all classes)")
    d.add_argument("--top", type=int, default=3, help="nearest neighbours to show")
    d.add_argument("--masks", help="folder with the masks of the TEST images, named like them (default: the set's own)")
    args = p.parse_args()
    try:
        args.penalty = [float(args.penalty)] if args.penalty not in (None, "study") else args.penalty
    except ValueError:
        common.fail(f"--penalty {args.penalty}: a number or 'study' is expected")
    for least, most, names in RANGES:
        for name in names.split():
            given = getattr(args, name)
            for value in given if isinstance(given, list) else [given]:
                if value not in (None, "study") and (value or name not in ("size", "classifier_size")):  # 0: its own
                    common.at_least(least, argparse.Namespace(**{name: value}), name, most=most)
    if args.protocol and (args.trunk_lr or args.head_lr or args.weight_decay):
        common.fail(f"--protocol {args.protocol} has its own --trunk-lr, --head-lr and --weight-decay")
    if args.protocol and not set(args.labels or ()) <= set(PROTOCOLS[args.protocol]):
        common.fail(f"--protocol {args.protocol} has rates for 1 and 10 % of the labels only")
    if args.labels and args.label_list:
        common.fail("--labels and --label-list exclude each other")
    for percent in args.labels or ():
        if not 0 < percent <= 100:
            common.fail(f"--labels {percent:g}: a share is above 0 and at most 100 per cent")
    if args.save and "finetune" not in args.probe:
        common.fail("--save keeps a fine-tuned network: add --probe finetune")
    if args.save and not Path(args.save).absolute().parent.is_dir():
        common.fail(f"--save {args.save}: there is no folder {Path(args.save).absolute().parent}")
    if args.out and not Path(args.out).is_dir():
        common.fail(f"--out {args.out}: there is no such folder")
    if "perceptual" in args.probe and not args.classifier:
        common.fail("--probe perceptual needs a --classifier to judge the recovered images")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        common.fail("evaluate.py runs in one process: start it with python, not torchrun")
    return args


def main():
    args = parse_args()
    _, _, device = common.setup(args.device)
    amp = common.bf16_is_fast(device) if args.amp is None else args.amp
    backbone, preprocess, about, path = open_backbone(args.checkpoint, args.arch, args.size, args.seed)
    name = args.data or about.get("data") or common.fail("say which data with --data")
    what = f"{about['method']}, epoch {about['epoch']}, {about['arch']}" if "method" in about else args.checkpoint
    print(f"{what} on {name} at {preprocess['size']} px")
    backbone.to(device, memory_format=torch.channels_last)
    files = {"schedule", "pictures", "neighbours", "gradients", "swap"} & set(args.probe)
    if files and not os.access(folder := args.out or (path.parent if path else "."), os.W_OK):
        common.fail(f"{folder} is read-only: say with --out where to write what {' and '.join(sorted(files))} make")
    sets = {s: data.load(name, args.root, s, device, args.limit, args.seed) for s in ("train", "test")}
    results, fitted, diagnosis = {}, None, set(args.probe) & set(DIAGNOSIS)
    frozen = set(args.probe) & set(PROBES)
    if more := (diagnosis - {"neighbours"}) | set(args.probe) & {"depth", "schedule"}:
        need_labels(" ".join(p for p in MORE if p in more), sets)
    if diagnosis:
        ready = ready_for_diagnosis(args, sets, preprocess)
    if "depth" in args.probe:
        depths = Depths(backbone, args.layers, preprocess["size"], args.most_features)
    shares = label_shares(args, sets, " ".join(p for p in PROBES if p in frozen)) if frozen else {}
    if diagnosis or frozen or "schedule" in args.probe:
        pairs = [cached(backbone, path, sets[s], s, preprocess, device, args.workers, amp) for s in sets]
    if diagnosis:
        fitted = fit_pairs(*pairs, args.seed)
    if frozen:
        results = run_frozen(args, pairs, shares, fitted, amp)
    if "depth" in args.probe:
        results["depth"] = run_depth(args, depths, sets, preprocess, device, amp)
    if "schedule" in args.probe:
        results["schedule"] = run_schedule(args, pairs, path)
    if diagnosis:
        results |= run_diagnosis(args, backbone, path, sets, pairs, fitted, preprocess, ready, device, amp)
    if "finetune" in args.probe:
        results["finetune"] = run_finetune(args, backbone, about, sets, preprocess, device, amp)
    if {"perceptual", "pictures"} & set(args.probe):
        results |= run_images(args, path, sets["test"], device, amp)
    if path and results:
        writable = os.access(path.parent, os.W_OK)
        print(f"written to {write_json(path.parent, name, results)}" if writable else f"not written: {path.parent} is read-only")


if __name__ == "__main__":
    common.run(main)
