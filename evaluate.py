"""k-NN, linear and MLP probes of frozen features: of a run, of torchvision weights, or of a random init.

    python evaluate.py runs/byol-shapes                              k-NN and linear probes on the data of the run
    python evaluate.py runs/byol-cifar10 --data cifar100 --probe knn linear lbfgs mlp      mlp: one hidden layer
    python evaluate.py resnet50.pth --arch resnet50 --data DIR       a plain torchvision state dict
    python evaluate.py random:resnet18 --data cifar10 --size 32      the baseline of every number
    python evaluate.py RUN --probe linear mlp --labels 1 10 100      on shares of the labels
    python evaluate.py RUN --probe lbfgs --penalty study             the regularizer of Kolesnikov et al. 2019

Features are extracted once, in eval mode and without gradients, and cached beside the checkpoint: the backbone is
frozen by construction. Every number is printed with its protocol and kept in RUN/evaluate.json. Training scripts and
the commands in downstream/ and analysis/ call the same functions.
"""

import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import checkpoints
import common
import data
import logistic
import optim
import parallel
import runs
import sets

KS = (1, 10, 20, 100, 200)
FEWEST = 10  # labelled training images that a linear probe needs
PROBES = ("knn", "linear", "lbfgs", "mlp")
MOVED = {  # probes that are separate commands
    "finetune": "downstream.finetune", "depth": "analysis.depth", "schedule": "analysis.schedule",
    "perceptual": "analysis.reconstruct", "pictures": "analysis.reconstruct",
    **dict.fromkeys(("neighbors", "gradients", "localization", "swap"), "analysis.diagnose"),
}  # fmt: skip


# ============ features ============


@contextlib.contextmanager
def in_eval(*modules):
    """Eval mode inside; afterwards every submodule is back in the mode that it was in."""
    modes = [(m, m.training) for module in modules for m in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def extract(backbone, dataset, preprocess, device, batch_size=512, workers=0, amp=False, progress=False):
    """Features [N, d] in fp32 and labels [N] (-1: none) of the un-augmented images, in order, on `device`.

    Collective: each rank extracts a share, and all get the whole. Peak memory: what it returns and one batch.
    """
    wanted = getattr(backbone, "preprocess", {})
    if any(tuple(preprocess[k]) != tuple(v) for k, v in wanted.items()):
        common.fail("networks of color channels take images in [0, 1], not normalized ones: cmc.py trains them")
    rank, world = common.rank(), common.world_size()
    parallel.same_buffers(backbone)
    share, start = math.ceil(len(dataset) / world), 0
    mine = torch.arange(rank * share, (rank + 1) * share) % len(dataset)  # the last share is filled up from the front
    features, labels = None, torch.empty(world, share, dtype=torch.int64, device=device)
    batches = data.batches(dataset, preprocess, batch_size, device, workers, mine)
    with in_eval(backbone), torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
        for x, y in tqdm(batches, "features", math.ceil(share / batch_size), leave=False, disable=not progress or None):
            z = backbone(x).float()
            if features is None:
                features = torch.empty(world, share, z.shape[1], device=device)
            features[rank, start : start + len(z)], labels[rank, start : start + len(z)] = z, y
            start += len(z)
    if world > 1:
        for r in range(world):  # in place: no rank holds anything twice
            dist.broadcast(features[r], r)
            dist.broadcast(labels[r], r)
    return features.flatten(0, 1)[: len(dataset)], labels.flatten()[: len(dataset)]


def with_labels(features, labels):
    """The features and labels of the images that have a label; a copy only where some have none."""
    labels = labels.to(features.device)
    keep = labels >= 0
    return (features, labels) if keep.all() else (features[keep], labels[keep])


def health(features):
    """Label-free numbers of features [N, d]: feature_std, the standard deviation per dimension of the L2-normalized
    features times sqrt(d) (1: spread over the sphere, 0: collapsed), and the effective rank (Roy and Vetterli 2007) of
    2,000 of them."""
    some = torch.linspace(0, len(features) - 1, min(2000, len(features)), device=features.device).long()
    z = F.normalize(features[some].float(), dim=1)  # evenly from the set, which may be sorted by class
    s = torch.linalg.svdvals(z - z.mean(0))
    p = s / s.sum().clamp(min=1e-12)
    rank = torch.exp(-(p * p.clamp(min=1e-12).log()).sum())
    return {"feature_std": (z.std(0).mean() * z.shape[1] ** 0.5).item(), "effective_rank": rank.item()}


# ============ k nearest neighbors ============


def nearest(keys, queries, k, chunk=500, most=2**26):
    """Cosines and indices [Q, k] of the k of `keys` [N, d] most similar to each of `queries` [Q, d], nearest first.

    In fp32: bf16 cannot tell the neighbors of a random or half collapsed network apart, which are all close. `most`
    numbers of the keys are normalized at a time (256 MB).
    """
    size, best = max(1, most // keys.shape[1]), None
    for start in range(0, len(keys), size):
        part = F.normalize(keys[start : start + size].float(), dim=1).T
        found = [(F.normalize(q.float(), dim=1) @ part).topk(min(k, part.shape[1]), 1) for q in queries.split(chunk)]
        s, at = (torch.cat(t) for t in zip(*found, strict=True))
        at += start
        if best is not None:
            s, order = torch.cat([best[0], s], 1).topk(min(k, best[0].shape[1] + s.shape[1]), 1)
            at = torch.cat([best[1], at], 1).gather(1, order)
        best = s, at  # [Q, k] each
    return best


@torch.inference_mode()
def knn(keys, key_labels, queries, query_labels, ks=KS, temperature=0.1, chunk=500, also=()):
    """Top-1 in per cent of the k-NN classifier with cosine similarity: {k: (weighted, majority, *also)}.

    keys [N, d], queries [M, d], any scale; labels int64, all >= 0. Weighted: each neighbor votes exp(s / T) (Wu et al.
    2018, sec. 3.4); majority: each votes 1, the nearer class wins a tie; `also`: weighted with these T. A k above N is
    left out; if all are, k is N.
    """
    classes = int(max(key_labels.max(), query_labels.max())) + 1
    ks = [k for k in ks if k <= len(keys)] or [len(keys)]
    right = torch.zeros(len(ks), 2 + len(also), device=keys.device)
    found = (t.split(chunk) for t in (*nearest(keys, queries, max(ks), chunk), query_labels))
    for s, neighbor, y in zip(*found, strict=True):
        weighted, *others = (torch.exp((s - 1) / t) for t in (temperature, *also))
        votes = torch.stack([weighted, 1 + s * 1e-4, *others])  # [2 + len(also), c, k]
        for i, k in enumerate(ks):
            sums = torch.zeros(len(votes), len(y), classes, device=keys.device)
            sums.scatter_add_(2, key_labels[neighbor[:, :k]].expand(len(votes), -1, -1), votes[:, :, :k])
            right[i] += (sums.argmax(2) == y).sum(1)
    percent = (100 * right / len(queries)).tolist()
    return {k: tuple(row) for k, row in zip(ks, percent, strict=True)}


# ============ linear probes ============

LRS, DECAYS = (1.0, 3.0, 10.0, 30.0, 100.0), (0.0, 1e-6, 1e-5)  # for features of mean norm 1
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # for standardized features, from strong to weak


def fit_sgd(x, y, classes, pairs, epochs, batch_size, seed, scale=1.0, rows=None):
    """Softmax regressions for all G `pairs` (lr, weight decay) at once, on x / scale or its `rows`: weights [G, C, d]
    and biases [G, C, 1].

    One matrix of G * C rows, trained on the same batches by SGD with Nesterov momentum 0.9 and a cosine to 0. The
    gradient of the cross-entropy is written out, (softmax - one-hot)^T x, so a step is two products. Only a batch of
    the features is ever copied.
    """
    rows = torch.arange(len(x)) if rows is None else rows
    batch_size = min(batch_size, len(rows))
    lr, decay = torch.tensor(pairs, device=x.device).repeat_interleave(classes, 0).split(1, 1)  # [G * C, 1]
    w = torch.zeros(len(lr), x.shape[1] + 1, device=x.device)  # the last column is the bias
    v, xb, minus = torch.zeros_like(w), w.new_ones(batch_size, w.shape[1]), w.new_full((len(pairs), batch_size), -1)
    steps, g = len(rows) // batch_size, data.generator(seed, "linear")
    for epoch in range(epochs):
        order = rows[torch.randperm(len(rows), generator=g)[: steps * batch_size]].view(steps, batch_size).to(x.device)
        true = y[order] * batch_size + torch.arange(batch_size, device=x.device)  # places in [C, b]
        for step, (some, right) in enumerate(zip(order, true, strict=True), epoch * steps):
            torch.div(x[some], scale, out=xb[:, :-1])
            # The batch is the last dimension: a softmax over the last one is slow where there are few classes.
            p = (w @ xb.T).view(-1, classes, batch_size).softmax(1)  # [G, C, b]
            p.view(len(minus), -1).scatter_add_(1, right.expand(len(minus), -1), minus)
            u = (p.flatten(0, 1) @ xb).div_(batch_size).addcmul_(w, decay)
            v.mul_(0.9).add_(u)
            w.addcmul_(lr, u.add_(v, alpha=0.9), value=-optim.cosine(step, epochs * steps, 1.0, 0.0))
    return w.view(-1, classes, x.shape[1] + 1).split([x.shape[1], 1], 2)


def accuracy(x, y, net=None, chunk=1024):
    """(top-1, top-5) in per cent of logits x [..., N, C], or of those that `net` makes of features x [N, d], for labels
    y [N]. In chunks: the logits of a whole grid would fill the memory."""
    hits = []
    for part, labels in zip(x.split(chunk, -2), y.split(chunk), strict=True):
        logits = net(part) if net else part
        hits.append(logits.topk(min(5, logits.shape[-1]), -1).indices == labels[:, None])  # [..., n, 5]
    hits = torch.cat(hits, -2)
    return 100 * hits[..., 0].float().mean(-1), 100 * hits.any(-1).float().mean(-1)


def held_out(n, seed, most=10_000):
    """Indices of a TRAINING set of n: (nine tenths to train on, a tenth, at most `most`, to choose settings on)."""
    order = torch.randperm(n, generator=data.generator(seed, "held out"))
    size = min(most, max(1, n // 10))
    return order[size:], order[:size]


@torch.no_grad()
def fit_linear(x, y, classes, epochs=100, batch_size=256, lrs=LRS, decays=DECAYS, seed=0):
    """A softmax regression. All pairs of the grid are trained on nine tenths of the training features; the one that is
    best on the last tenth is trained again on all (BYOL's authors do not train again). Features are divided by their
    mean norm, so that one grid fits every method.

    Returns the mean norm, w [1, C, d], b [1, C, 1] and {"lr", "weight_decay", "grid": {pair: held-out top-1}}.
    """
    scale = torch.cat([part.norm(dim=1) for part in x.split(8192)]).mean()
    train, val = held_out(len(x), seed)
    pairs = [(lr, wd) for lr in lrs for wd in decays]
    w, b = fit_sgd(x, y, classes, pairs, epochs, batch_size, seed, scale, train)
    scores = accuracy(x[val], y[val], lambda z: z / scale @ w.mT + b.mT)[0]  # [G]
    grid = {f"lr {lr:g} wd {wd:g}": round(s, 2) for (lr, wd), s in zip(pairs, scores.tolist(), strict=True)}
    best = lr, wd = pairs[int(scores.argmax())]
    w, b = fit_sgd(x, y, classes, [best], epochs, batch_size, seed, scale)
    return scale, w, b, {"lr": lr, "weight_decay": wd, "grid": grid}


@torch.inference_mode()
def linear_sgd(x, y, test_x, test_y, **settings):
    """`fit_linear` and its accuracy on the test features: {"top1", "top5", "lr", "weight_decay", "grid"}."""
    scale, w, b, chosen = fit_linear(x, y, int(max(y.max(), test_y.max())) + 1, **settings)
    top1, top5 = accuracy(test_x, test_y, lambda z: (z / scale @ w.mT + b.mT)[0])
    return {"top1": top1.item(), "top5": top5.item(), **chosen}


def standardize(x, test_x):
    """Both sets of features, each dimension to mean 0 and deviation 1 over the training set `x`."""
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    return (x - mean) / std, (test_x - mean) / std


def linear_lbfgs(x, y, test_x, test_y, penalties=PENALTIES, seed=0):
    """Multinomial logistic regression on standardized features; of several penalties the best is chosen on the held-out
    tenth of the training set. Returns {"top1", "top5", "penalty", "grid"}.

    penalties = "study": that of Kolesnikov et al. 2019, 100 / (M C) for M features and C classes, on features as they
    are. It is per image here, as the cross-entropy is a mean; they do not say whether theirs is.
    """
    classes, grid = int(max(y.max(), test_y.max())) + 1, {}
    if penalties == "study":
        penalties = [100 / (x.shape[1] * classes)]
    else:
        x, test_x = standardize(x, test_x)
    if len(penalties) > 1:
        train, val = held_out(len(x), seed)
        w, b = logistic.fit(x[train], y[train], classes, penalties)
        scores = accuracy(x[val], y[val], lambda z: z @ w + b[:, None])[0].tolist()  # [P]
        grid = {p: round(s, 2) for p, s in zip(penalties, scores, strict=True)}
    best = max(penalties, key=lambda p: grid.get(p, 0.0))  # the first of the best
    w, b = logistic.fit(x, y, classes, [best])
    top1, top5 = accuracy(test_x, test_y, lambda z: (z @ w + b[:, None])[0])
    grid = {f"penalty {p:g}": s for p, s in grid.items()}
    return {"top1": top1.item(), "top5": top5.item(), "penalty": best, "grid": grid}


# ============ a probe with a hidden layer ============


def fit_mlp(x, y, classes, lrs, passes, hidden, batch_size, seed):
    """A network for each learning rate, with one hidden layer, ReLU and dropout 0.5, all from one init and on the same
    batches: Adam and a cosine to 0 for `passes` over x, or more, until there are 30 updates a pass."""
    device, batch_size = x.device, min(batch_size, len(x))
    steps = len(x) // batch_size
    epochs, g = math.ceil(passes * max(1, 30 / steps)), data.generator(seed, "mlp")
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(seed)  # for weights and dropout
        layers = nn.Linear(x.shape[1], hidden), nn.ReLU(), nn.Dropout(0.5), nn.Linear(hidden, classes)
        nets = [copy.deepcopy(nn.Sequential(*layers)).to(device) for _ in lrs]
        groups = [{"params": net.parameters(), "lr": lr} for net, lr in zip(nets, lrs, strict=True)]
        optimizer = torch.optim.Adam(groups, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
        for _ in range(epochs):
            order = torch.randperm(len(x), generator=g)[: steps * batch_size]
            for rows in order.view(steps, batch_size).to(device):
                loss = sum(F.cross_entropy(net(x[rows]), y[rows]) for net in nets)  # they share no weight
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return [net.eval() for net in nets]


@torch.no_grad()
def mlp_probe(x, y, test_x, test_y, lrs=(3e-4, 1e-3, 3e-3), passes=10, hidden=1000, batch_size=256, seed=0):
    """A network with one hidden layer on standardized features (Kolesnikov et al. 2019, Figure 3): the rate is chosen
    on the held-out tenth by runs of `passes` // 3, then all images are used. The paper has SGD with momentum 0.9
    and lr 0.1 * batch / 256 on features of random crops. Returns {"top1", "top5", "lr", "grid"}."""
    classes, (x, test_x) = int(max(y.max(), test_y.max())) + 1, standardize(x, test_x)
    train, val = held_out(len(x), seed)
    nets = fit_mlp(x[train], y[train], classes, lrs, passes // 3, hidden, batch_size, seed)
    scores = [accuracy(x[val], y[val], net)[0].item() for net in nets]
    lr = lrs[scores.index(max(scores))]
    (net,) = fit_mlp(x, y, classes, [lr], passes, hidden, batch_size, seed)
    top1, top5 = accuracy(test_x, test_y, net)
    grid = {f"lr {a:g}": round(s, 2) for a, s in zip(lrs, scores, strict=True)}
    return {"top1": top1.item(), "top5": top5.item(), "lr": lr, "grid": grid}


# ============ the probes together, during and after training ============

TRAIN_IMAGES, TEST_IMAGES = 50_000, 10_000  # at most so many make a point of the k-NN curves


def first(dataset, n):
    """At most n images of a set, always the same ones."""
    return sets.subset(dataset, n, 0) if len(dataset) > n else dataset


def knn_curves(train, test, ks=(20, 200), name="knn"):
    """{"knn20", "knn200"}, weighted k-NN (T 0.1) on (features, labels) pairs; {} where either has no labels."""
    (x, y), (test_x, test_y) = with_labels(*train), with_labels(*test)
    scores = knn(x, y, test_x, test_y, ks) if len(x) and len(test_x) else {}
    return {f"{name}{k}": weighted for k, (weighted, _) in scores.items()}


def monitor(backbone, train, test, preprocess, device, workers=0, amp=False, head=None):
    """What a training script logs between epochs: `health`, and where there are labels `knn_curves`; with a `head`, the
    200-NN of its outputs as well (embedding_knn200). Collective."""
    some = first(train, TRAIN_IMAGES), first(test, TEST_IMAGES)
    pairs = [extract(backbone, images, preprocess, device, workers=workers, amp=amp) for images in some]
    numbers = health(pairs[0][0]) | knn_curves(*pairs)
    if head is not None:
        with in_eval(head), torch.no_grad():
            outputs = [(head(x), y) for x, y in (with_labels(*pair) for pair in pairs)]
        numbers |= knn_curves(*outputs, (200,), "embedding_knn")
    return numbers


def tops(r):
    return f"top-1 {r['top1']:.2f}  top-5 {r['top5']:.2f}"


def run_probes(train, test, probes, temperature=0.1, seed=0, say=print, penalties=None, amp=False, share=False):
    """Run `probes` on (features, labels) pairs; prints each result with its protocol and returns them as a dict, with
    `health` unless the pairs are a `share` of others. penalties: of `linear_lbfgs`, if not its own. amp: whether the
    backbone ran in bf16, for the protocol."""
    results = {}
    if not share:
        results["health"] = h = health(train[0])
        say("health   " + "  ".join(f"{k} {v:.3g}" for k, v in h.items()))
        say("         of training features, without labels; feature_std: 1 if they are spread evenly, 0 at collapse")
        if h["feature_std"] < 0.05:
            say("warning: the features are nearly constant (collapse)")
    (x, y), (test_x, test_y) = with_labels(*train), with_labels(*test)
    if not len(x) or not len(test_x):
        say("no labels: k-NN and linear probes left out")
        return results
    say(f"frozen   {x.shape[1]}-d pooled features of a {'bf16' if amp else 'fp32'} backbone in eval mode")
    say(f"         {len(x)} training and {len(test_x)} test images, no augmentation")
    if "knn" in probes:
        also = (0.07,) if temperature != 0.07 else ()  # that of published 20-NN accuracies, in DINO's code
        scores = knn(x, y, test_x, test_y, temperature=temperature, also=also)
        names = ["weighted", "majority", *(f"T {t:g}" for t in also)]
        results["knn"] = {f"{k}": dict(zip(names, row, strict=True)) for k, row in scores.items()}
        say("k-NN     " + "".join(f"{f'k={k}':>8}" for k in scores))
        for name, row in zip(names, zip(*scores.values(), strict=True), strict=True):
            say(f"{name:<9}" + "".join(f"{v:8.2f}" for v in row))
        say(f"         cosine similarity, weight exp(s / {temperature:g})" + "; T 0.07: as in DINO" * len(also))
    if len(x) < FEWEST:
        say(f"fewer than {FEWEST} labelled images: linear probes left out")
        return results
    if "linear" in probes:
        r = results["linear"] = linear_sgd(x, y, test_x, test_y, seed=seed)
        say(f"linear   {tops(r)}   (lr {r['lr']:g}, wd {r['weight_decay']:g})")
        say("         SGD 100 epochs, batch 256, cosine; lr and wd chosen on a tenth of TRAIN, then all of it")
        say("         held-out top-1: " + ", ".join(f"{k}: {v}" for k, v in r["grid"].items()))
    if "lbfgs" in probes:
        r = results["lbfgs"] = linear_lbfgs(x, y, test_x, test_y, penalties or PENALTIES, seed)
        how = f"standardized, penalty {'chosen on a tenth of TRAIN' if r['grid'] else 'given'}"
        how = "as they are, penalty 100 / (M C)" if penalties == "study" else how
        say(f"lbfgs    {tops(r)}   (penalty {r['penalty']:g})")
        say(f"         logistic regression, features {how}")
    if "mlp" in probes:
        r = results["mlp"] = mlp_probe(x, y, test_x, test_y, seed=seed)
        say(f"mlp      {tops(r)}   (lr {r['lr']:g})")
        say("         one hidden layer of 1000, ReLU, dropout 0.5; standardized features; Adam, batch 256, cosine")
        say("         10 passes, 300 updates at least; lr chosen on a tenth of TRAIN, then all of it")
    return results


def final_probes(backbone, train, test, preprocess, device, args, log, method, step):
    """The end of a training run: what `report` does and returns, on rank 0; None on the others. Collective."""
    with common.explained(f"the run is safe: python evaluate.py {args.out} --device cpu repeats its probes"):
        pairs = [extract(backbone, s, preprocess, device, workers=args.workers, amp=args.amp) for s in (train, test)]
        return report(pairs, test, preprocess, args, log, method, step) if log.rank == 0 else None


def report(pairs, test, preprocess, args, log, method, step):
    """Probes of the (features, labels) pairs of training and test images, OUT/evaluate.json, the last point of the
    curves, TensorBoard's embedding projector. Returns the result line of the run."""
    results = run_probes(*pairs, args.probes, seed=args.seed, say=log.say, amp=args.amp)
    write_json(log.out, args.data, results)
    scores = {k: results[k]["top1"] for k in ("linear", "lbfgs", "mlp") if k in results}
    if "knn" in results:
        scores = {"knn": results["knn"]["20" if "20" in results["knn"] else "1"]["weighted"], **scores}
    # The last point of the curves, of the images that `monitor` uses; sets.Images serves for features, too.
    few = [first(sets.Images("", *pair), n) for pair, n in zip(pairs, (TRAIN_IMAGES, TEST_IMAGES), strict=True)]
    numbers = {f"final_{k}": v for k, v in scores.items()} | knn_curves(*((f.images, f.labels) for f in few))
    log.record("eval", step, epoch=args.epochs, **numbers, **results["health"])
    some = torch.randperm(len(test), generator=data.generator("projector"))[:1000]
    x, _ = next(data.batches(test, preprocess | {"mean": (0, 0, 0), "std": (1, 1, 1)}, len(some), "cpu", 0, some))
    features, labels = (t.cpu()[some] for t in pairs[1])
    names = [str(test.classes[i]) if test.classes and i >= 0 else "?" for i in labels.tolist()]
    log.writer.add_embedding(features, names, x, step)
    log.writer.close()
    found = [f"{k} {v:.1f}" for k, v in scores.items()] or [f"{k} {v:.2f}" for k, v in results["health"].items()]
    return f"{method} {args.data}: {' '.join(found)} ({args.out})"


# ============ evaluate.json ============

# Levels at which results of other calls are kept.
MERGED = {"finetune": 1, "depth": 1, "schedule": 1, "linear_augmented": 1, "transfer": 2, "labels": 2}


def merged(old, new, levels):
    return old | {k: merged(old.get(k, {}), v, levels - 1) for k, v in new.items()} if levels else new


def read_json(out):
    """What is in OUT/evaluate.json, {data: results}. A file that is not JSON is renamed, not lost."""
    path = Path(out, "evaluate.json")
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        os.replace(path, f"{path}.broken")
        print(f"warning: {path} is not JSON; renamed to {path.name}.broken", flush=True)
        return {}


def write_json(out, name, results):
    """Add `results` for the data `name` to OUT/evaluate.json."""
    known = read_json(out)
    own = known.get(name, {})
    known[name] = own | {key: merged(own.get(key, {}), r, MERGED.get(key, 0)) for key, r in results.items()}
    runs.write_text(path := Path(out, "evaluate.json"), json.dumps(known, indent=1) + "\n")
    return path


# ============ what the commands on a checkpoint share ============


def cached(backbone, path, dataset, split, preprocess, device, workers, amp):
    """`extract`, with a file beside the checkpoint `path`, named by a hash of checkpoint, data and preprocessing. A new
    file replaces the old one of the same split."""
    make = lambda: extract(backbone, dataset, preprocess, device, workers=workers, amp=amp, progress=True)
    if path is None or not os.access(path.parent, os.W_OK):
        return make()
    key = hashlib.sha1(path.read_bytes())
    key.update(f"{dataset.fingerprint()} {sorted(preprocess.items())} {amp}".encode())
    name = f"features-{path.stem}-{Path(dataset.name).name}-{split}-"
    file = path.parent / f"{name}{key.hexdigest()[:16]}.pt"
    if file.is_file():
        with contextlib.suppress(EOFError):  # damaged: made again
            found = runs.load(file)
            return found["features"].to(device, torch.float32), found["labels"].to(device)
    features, labels = make()
    for old in path.parent.glob(f"{name}*.pt"):
        old.unlink()
    runs.write(file, {"features": features.cpu(), "labels": labels.cpu()})
    return features, labels


def flags(doc, several=False):
    """A parser with the flags that every command on a checkpoint, or on `several`, has."""
    p = argparse.ArgumentParser(description=doc, formatter_class=common.Help, allow_abbrev=False)
    p.add_argument(
        "checkpoint",
        nargs="+" if several else None,
        help="a run folder, its backbone.pt, a torchvision state dict, or random:ARCH",
    )
    p.add_argument("--data", help="named set or folder (default: what the checkpoint was trained on)")
    p.add_argument("--root", default="datasets", help="where named sets live")
    p.add_argument("--arch", help="the architecture of a plain state dict")
    p.add_argument("--size", type=int, default=0, help="image size in px (default: the checkpoint's, else 224)")
    p.add_argument("--limit", type=int, default=0, help="use N training images (0: all)")
    p.add_argument("--workers", type=int, default=common.default_workers(), help="loader workers, for folders")
    p.add_argument("--seed", type=int, default=0, help="of held-out tenth, shares, batches, pictures, random:ARCH")
    p.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: cuda, else mps, else cpu")
    p.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bf16 (default: where it is fast)")
    return p


def label_flags(p, default):
    p.add_argument("--labels", type=float, nargs="+", help=f"per cent of the labels, one or more (default: {default})")
    p.add_argument("--label-list", help="instead: a file that names the labelled images, one a line (folders only)")


def check_flags(args):
    """Refuse values of `flags` that no command can use."""
    common.at_least(0, args, "limit", "workers", "seed")
    common.at_least(checkpoints.SIZES[0] if args.size else 0, args, "size", most=checkpoints.SIZES[1])


def one_process():
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        common.fail("this command runs in one process: start it with python, not torchrun")


class Subject:
    """What a command works on, from the flags of `flags`: `backbone` on its `device`, its `preprocess`, `about` (what
    the file says about it), `path` (that file; None for random:ARCH), and `sets`, {"train", "test"}, of the data
    `name`."""

    def __init__(self, args):
        one_process()
        check_flags(args)
        self.device, self.workers = common.setup(args.device)[2], args.workers
        self.amp = common.bf16_is_fast(self.device) if args.amp is None else args.amp
        opened = checkpoints.open_backbone(args.checkpoint, args.arch, args.size, args.seed)
        self.backbone, self.preprocess, self.about, self.path = opened
        self.name = args.data or self.about.get("data") or common.fail("say which data with --data")
        run = "{method}, epoch {epoch}, {arch}".format(**self.about) if "method" in self.about else args.checkpoint
        print(f"{run} on {self.name} at {self.preprocess['size']} px")
        self.backbone.to(self.device, memory_format=torch.channels_last)
        how = self.device, args.limit, args.seed
        self.sets = {split: sets.load(self.name, args.root, split, *how) for split in ("train", "test")}

    def features(self):
        """The (features, labels) pairs of the training and of the test images."""
        how = self.preprocess, self.device, self.workers, self.amp
        return [cached(self.backbone, self.path, images, split, *how) for split, images in self.sets.items()]

    def need_labels(self, what, share="", rows=slice(None)):
        """Exit code 2 unless there are labels in the test set and in the training set or the `rows` of it."""
        train, test = (sets.labels_of(images) >= 0 for images in self.sets.values())
        if (n := int(train[rows].sum())) < FEWEST or not test.any():
            need = f"{FEWEST} labelled training images and a labelled test set are needed"
            common.fail(f"{what}: too few labels: {need}; {f'share {share}' if share else self.name} has {n}")

    def label_shares(self, args, what, default=()):
        """{name: places of the labelled training images} for --labels (or the `default`, per cent) or --label-list."""
        labels = sets.labels_of(self.sets["train"])
        common.at_least(1e-6, args, "labels", most=100)
        if args.labels and args.label_list:
            common.fail("--labels and --label-list exclude each other")
        if args.label_list:
            rows = sets.listed(self.sets["train"], args.label_list)
            shares = {Path(args.label_list).stem: rows[labels[rows] >= 0]}
        else:
            shares = {f"{p:g}": sets.share(labels, p, args.seed) for p in args.labels or default}
        for name, rows in shares.items():
            self.need_labels(what, name, rows)
        return shares

    def folder(self, out):
        """Where pictures and tables go: the folder `out`, else the checkpoint's, else the current one."""
        folder = Path(out or (self.path.parent if self.path else "."))
        if not os.access(folder, os.W_OK):
            common.fail(f"--out {folder}: there is no folder that can be written to")
        return folder

    def write(self, results):
        """RUN/evaluate.json, if that folder can be written to."""
        if self.path and results and os.access(self.path.parent, os.W_OK):
            print(f"written to {write_json(self.path.parent, self.name, results)}")
        elif self.path and results:
            print(f"not written: {self.path.parent} is read-only")


def classes_of(dataset):
    """The number of classes of a set: its names, or where it has none, its largest label + 1."""
    return len(dataset.classes) if dataset.classes else int(sets.labels_of(dataset).max()) + 1


# ============ the command ============


def probe_name(name):
    """The type of --probe."""
    if name in MOVED:
        common.fail(f"--probe {name} is a command of its own: python -m {MOVED[name]} RUN")
    return name


def penalties(word):
    """The type of --penalty."""
    if word != "study" and not 0 < float(word) < math.inf:
        common.fail(f"--penalty {word}: it must be above 0 and finite")
    return word if word == "study" else [float(word)]


def main():
    if "--augment" in sys.argv:  # a command of its own, with a run folder and several processes
        from downstream import linear

        return linear.main(linear.hand_over(sys.argv[1:]))
    p = flags(__doc__)
    p.add_argument("--probe", nargs="+", type=probe_name, choices=PROBES, default=["knn", "linear"], help="one or more")
    label_flags(p, 100)
    p.add_argument("--augment", action="store_true", help="linear on random crops, as published: downstream.linear")
    p.add_argument("--temperature", type=float, default=0.1, help="T of the weighted k-NN vote; DINO uses 0.07")
    p.add_argument("--penalty", type=penalties, metavar="NUMBER|study",
                   help="lbfgs: study is 100 / (features * classes) (default: chosen on TRAIN)")  # fmt: skip
    args = p.parse_args()
    common.at_least(1e-4, args, "temperature")
    subject, results = Subject(args), {}
    shares = subject.label_shares(args, " ".join(args.probe))
    train, test = subject.features()
    settings = dict(temperature=args.temperature, seed=args.seed, penalties=args.penalty, amp=subject.amp)
    if not shares or 100 in (args.labels or ()):
        results = run_probes(train, test, args.probe, **settings)
    for name, rows in shares.items():
        if args.label_list or name != "100":  # all of the labels stands above
            print(f"{name}{'' if args.label_list else ' %'} of the labels")
            found = run_probes((train[0][rows], train[1][rows]), test, args.probe, share=True, **settings)
            results["labels"] = results.get("labels", {}) | {name: found | {"images": len(rows)}}
    subject.write(results)


if __name__ == "__main__":
    common.run(main)
