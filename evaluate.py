"""Probes of frozen features, for any checkpoint of this repository, plain torchvision weights, or a random network.

    python evaluate.py runs/byol-shapes                               k-NN and linear probes on the data it was trained on
    python evaluate.py runs/byol-cifar10 --data cifar100 --probe knn linear lbfgs
    python evaluate.py resnet50.pth --arch resnet50 --data DIR        a plain torchvision state dict
    python evaluate.py random:resnet18 --data cifar10 --size 32       the baseline that every number stands beside

Features come from the backbone in eval() and inference mode, once, and are cached beside the checkpoint: whatever the
probes do, the backbone is frozen by construction. Every number is printed with its protocol, and RUN/evaluate.json
keeps them. The training scripts call the same functions.
"""

import argparse
import hashlib
import json
import math
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import backbones
import common
import data
import runs

KS = (1, 10, 20, 100, 200)
FEWEST = 10  # labelled images that a linear probe needs
PROBES = ("knn", "linear", "lbfgs")


# ============ features ============


def extract(backbone, dataset, preprocess, device, batch_size=512, workers=0, amp=False, progress=False):
    """Features [N, d] fp32 on `device` and labels [N] on the CPU (-1: none) of the un-augmented images, in order.

    Under torchrun every process does its share and all get the whole: every process must call it.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = math.ceil(len(dataset) / world)
    mine = torch.arange(rank, share * world, world) % len(dataset)  # the last share is filled up from the front
    was_training, features, labels = backbone.training, [], []
    backbone.eval()
    plain = data.batches(dataset, preprocess, batch_size, device, workers, mine)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
        for x, y in tqdm(plain, "features", math.ceil(share / batch_size), leave=False, disable=not progress or None):
            features.append(backbone(x).float())
            labels.append(y)
    backbone.train(was_training)
    features, labels = torch.cat(features), torch.cat(labels)
    if world > 1:
        parts = [torch.empty_like(features) for _ in range(world)]
        dist.all_gather(parts, features)
        features = torch.stack(parts, 1).flatten(0, 1)[: len(dataset)]
        parts = [torch.empty_like(labels) for _ in range(world)]
        dist.all_gather(parts, labels)
        labels = torch.stack(parts, 1).flatten()[: len(dataset)]
    return features, labels


def labelled(features, labels):
    keep = labels >= 0
    if not keep.all():
        features, labels = features[keep.to(features.device)], labels[keep]
    return features, labels.to(features.device)


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


@torch.inference_mode()
def knn(bank, bank_labels, queries, query_labels, ks=KS, temperature=0.1, chunk=500):
    """Top-1 in per cent of the k-NN classifier with cosine similarity: {k: (weighted, majority)}.

    bank [N, d], queries [M, d], any scale; labels int64, all >= 0. One top-k of the largest k, sorted, serves every k.
    Weighted: each neighbour votes exp(s / T) (Wu et al. 2018, sec. 3.4); majority: each votes 1, the nearer class wins
    a tie. A k beyond the bank is left out; of a bank smaller than every k, all is used. Memory is bounded by `chunk` x N
    similarities, in fp32: in bf16 the neighbours of a random or half collapsed network, all of them close, blur.
    """
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    ks = [k for k in ks if k <= len(bank)] or [len(bank)]
    bank, queries = F.normalize(bank.float(), dim=1).T, F.normalize(queries.float(), dim=1)
    right = torch.zeros(len(ks), 2, device=bank.device)
    for q, y in zip(queries.split(chunk), query_labels.split(chunk), strict=True):
        s, neighbour = (q @ bank).topk(max(ks), dim=1)  # [c, k], nearest first
        votes = bank_labels[neighbour]
        ballots = torch.stack([torch.exp((s - 1) / temperature), 1 + s * 1e-4])  # [2, c, k]
        for i, k in enumerate(ks):
            box = torch.zeros(2, len(q), classes, device=s.device)
            box.scatter_add_(2, votes[:, :k].expand(2, -1, -1), ballots[:, :, :k])
            right[i] += (box.argmax(2) == y).sum(1)
    percent = (100 * right / len(queries)).tolist()
    return {k: tuple(row) for k, row in zip(ks, percent, strict=True)}


# ============ linear probes ============

LRS, DECAYS = (1.0, 3.0, 10.0, 30.0, 100.0), (0.0, 1e-6, 1e-5)  # for features of mean norm 1


def fit_sgd(x, y, classes, lrs, decays, epochs, batch_size, seed):
    """Softmax regressions for every pair (lr, weight decay) at once: weights [G, C, d] and biases [G, C].

    The G heads are one matrix of G * C rows, trained on the same batches by SGD with Nesterov momentum 0.9 and a cosine
    to 0; the gradient of the cross-entropy is written out, (softmax - one-hot)^T x, so a step is two products.
    """
    grid = torch.tensor([(lr, wd) for lr in lrs for wd in decays], device=x.device).repeat_interleave(classes, 0)
    lr, decay = grid[:, :1], grid[:, 1:]  # [G * C, 1]
    w = torch.zeros(len(grid), x.shape[1] + 1, device=x.device)  # the last column is the bias
    v, target = torch.zeros_like(w), F.one_hot(y, classes).to(x.dtype)
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    batch_size = min(batch_size, len(x))
    steps, g = len(x) // batch_size, data.generator(seed, "linear")
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=g)[: steps * batch_size].to(x.device)
        for step, rows in enumerate(order.view(steps, batch_size), epoch * steps):
            xb = x.index_select(0, rows)
            # The batch as last dimension: a softmax over the last one is slow where there are few classes.
            p = (w @ xb.T).view(-1, classes, batch_size).softmax(1).sub_(target[rows].T)  # [G, C, b]
            u = (p.flatten(0, 1) @ xb).div_(batch_size).addcmul_(w, decay)
            v.mul_(0.9).add_(u)
            w.addcmul_(lr, u.add_(v, alpha=0.9), value=-common.cosine(step, epochs * steps, 1.0, 0.0))
    return w.view(-1, classes, x.shape[1]).split([x.shape[1] - 1, 1], 2)


def accuracy(logits, y):
    """(top-1, top-5) in per cent for logits [..., N, C] and labels [N]."""
    right = logits.topk(min(5, logits.shape[-1]), -1).indices == y[:, None]
    return 100 * right[..., 0].float().mean(-1), 100 * right.any(-1).float().mean(-1)


def held_out(n, seed):
    """A tenth of the TRAINING set (at most 10,000 images), on which settings are chosen; the test set chooses nothing."""
    order = torch.randperm(n, generator=data.generator(seed, "held out"))
    size = min(10_000, max(1, n // 10))
    return order[size:], order[:size]


@torch.inference_mode()
def linear_sgd(x, y, test_x, test_y, epochs=100, batch_size=256, lrs=LRS, decays=DECAYS, seed=0):
    """Linear probe: the whole grid on nine tenths of the training features, the best pair on the last tenth, then that
    pair on all of them (BYOL's procedure). Features are divided by their mean norm, one number, so that one grid fits
    every method. Returns {"top1", "top5", "lr", "weight_decay", "grid"}; `grid` has the held-out top-1 of each pair."""
    scale, classes = x.norm(dim=1).mean(), int(max(y.max(), test_y.max())) + 1
    x, test_x = x / scale, test_x / scale
    train, val = held_out(len(x), seed)
    w, b = fit_sgd(x[train], y[train], classes, lrs, decays, epochs, batch_size, seed)
    scores = accuracy(x[val] @ w.mT + b.mT, y[val])[0]  # [G]
    pairs = [(lr, wd) for lr in lrs for wd in decays]
    lr, wd = pairs[int(scores.argmax())]
    w, b = fit_sgd(x, y, classes, [lr], [wd], epochs, batch_size, seed)
    top1, top5 = accuracy((test_x @ w.mT + b.mT)[0], test_y)
    grid = {f"lr {a:g} wd {c:g}": round(s, 2) for (a, c), s in zip(pairs, scores.tolist(), strict=True)}
    return {"top1": top1.item(), "top5": top5.item(), "lr": lr, "weight_decay": wd, "grid": grid}


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


def linear_lbfgs(x, y, test_x, test_y, penalties=(1e-1, 1e-2, 1e-3, 1e-4, 1e-5), seed=0):
    """Multinomial logistic regression on standardised features; no learning rate, the penalty chosen on the held-out
    tenth of the training set. Returns {"top1", "top5", "penalty", "grid"}."""
    classes, mean, std = int(max(y.max(), test_y.max())) + 1, x.mean(0), x.std(0).clamp(min=1e-6)
    x, test_x = (x - mean) / std, (test_x - mean) / std
    train, val = held_out(len(x), seed)
    head, scores = None, []
    for penalty in penalties:  # from strong to weak, each starting where the last ended
        head = fit_lbfgs(x[train], y[train], classes, penalty, head)
        scores.append(accuracy(x[val] @ head[0] + head[1], y[val])[0].item())
    best = penalties[scores.index(max(scores))]
    w, b = fit_lbfgs(x, y, classes, best)
    top1, top5 = accuracy(test_x @ w + b, test_y)
    grid = {f"penalty {p:g}": round(s, 2) for p, s in zip(penalties, scores, strict=True)}
    return {"top1": top1.item(), "top5": top5.item(), "penalty": best, "grid": grid}


# ============ all of it for one backbone ============


def online(backbone, bank, test, preprocess, device, workers=0, amp=False):
    """What a training script logs between epochs: 20-NN and 200-NN (weighted, T 0.1) where there are labels, and the
    label-free health figures. Every process must call it; at most 50,000 bank and 10,000 test images are used."""
    x, y = extract(backbone, first(bank, 50_000), preprocess, device, workers=workers, amp=amp)
    numbers = health(x)
    x, y = labelled(x, y)
    if not len(x):  # on every process alike; the test images would tell nothing
        return numbers
    test_x, test_y = labelled(*extract(backbone, first(test, 10_000), preprocess, device, workers=workers, amp=amp))
    if len(test_x):
        scores = knn(x, y, test_x, test_y, (20, 200))
        numbers |= {f"knn{k}": weighted for k, (weighted, _) in scores.items()}
    return numbers


def first(dataset, n):
    return data.subset(dataset, n, 0) if len(dataset) > n else dataset


def probe(train, test, probes, temperature=0.1, seed=0, say=print):
    """Run `probes` on (features, labels) pairs; prints each result with its protocol and returns them as a dict."""
    results = {"health": health(train[0])}
    say("health   " + "  ".join(f"{k} {v:.3g}" for k, v in results["health"].items()))
    say(
        "         of training features, no labels used; feature_std is 1 where features are spread evenly, 0 at collapse"
    )
    (x, y), (test_x, test_y) = labelled(*train), labelled(*test)
    if not len(x) or not len(test_x):
        say("no labels: k-NN and linear probes left out")
        return results
    sizes = f"{len(x)} training and {len(test_x)} test images, no augmentation, frozen pooled {x.shape[1]}-d features"
    if "knn" in probes:
        scores = knn(x, y, test_x, test_y, temperature=temperature)
        results["knn"] = {f"{k}": {"weighted": w, "majority": m} for k, (w, m) in scores.items()}
        say("k-NN     " + "".join(f"{f'k={k}':>8}" for k in scores))
        say("weighted " + "".join(f"{w:8.2f}" for w, _ in scores.values()))
        say("majority " + "".join(f"{m:8.2f}" for _, m in scores.values()))
        say(f"         cosine similarity, weight exp(s / {temperature:g}); {sizes}")
    if len(x) < FEWEST:
        say(f"fewer than {FEWEST} labelled images: linear probes left out")
        return results
    if "linear" in probes:
        r = results["linear"] = linear_sgd(x, y, test_x, test_y, seed=seed)
        say(
            f"linear   top-1 {r['top1']:.2f}  top-5 {r['top5']:.2f}   (frozen; lr {r['lr']:g}, wd {r['weight_decay']:g})"
        )
        say(
            "         SGD 100 epochs, batch 256, cosine; lr and wd chosen on a tenth of TRAIN, then all of it; " + sizes
        )
        say("         held-out top-1: " + ", ".join(f"{k}: {v}" for k, v in r["grid"].items()))
    if "lbfgs" in probes:
        r = results["lbfgs"] = linear_lbfgs(x, y, test_x, test_y, seed=seed)
        say(f"lbfgs    top-1 {r['top1']:.2f}  top-5 {r['top5']:.2f}   (frozen; penalty {r['penalty']:g})")
        say("         logistic regression, standardised features, penalty chosen on a tenth of TRAIN; " + sizes)
    return results


def finish(backbone, bank, test, preprocess, device, args, log, method, step):
    """The end of a training run: the probes, OUT/evaluate.json, TensorBoard's embedding projector, and the result line.
    Every process must call it."""
    pairs = [extract(backbone, s, preprocess, device, workers=args.workers, amp=args.amp) for s in (bank, test)]
    result = report(pairs, test, preprocess, device, args, log, method, step) if log.rank == 0 else None
    common.any_rank(False)  # the others wait here: none leaves while one still works
    return result


def report(pairs, test, preprocess, device, args, log, method, step):
    results, figures = probe(*pairs, args.probes, seed=args.seed, say=log.say), {}
    write_json(log.out, args.data, results)
    if "knn" in results:
        figures["knn"] = results["knn"]["20" if "20" in results["knn"] else "1"]["weighted"]
    figures |= {k: results[k]["top1"] for k in ("linear", "lbfgs") if k in results}
    log.record("eval", step, **{f"final_{k}": v for k, v in figures.items()}, **results["health"])
    some = torch.randperm(len(test), generator=data.generator("projector"))[:1000]
    x, _ = next(data.batches(test, preprocess | {"mean": (0, 0, 0), "std": (1, 1, 1)}, len(some), "cpu", 0, some))
    names = [str(test.classes[i]) if test.classes and i >= 0 else "?" for i in pairs[1][1][some].tolist()]
    log.writer.add_embedding(pairs[1][0][some.to(device)].cpu(), names, x, step)
    log.writer.close()
    return f"{method} {args.data}: {' '.join(f'{k} {v:.1f}' for k, v in figures.items())} ({args.out})"


def write_json(out, name, results):
    path = Path(out, "evaluate.json")
    known = json.loads(path.read_text()) if path.exists() else {}
    known.setdefault(str(name), {}).update(results)
    runs.write_text(path, json.dumps(known, indent=1) + "\n")
    return path


def open_backbone(target, arch, size, seed):
    """(backbone, preprocess, what the file says of itself, path or None) for a run folder, a file, or random:ARCH."""
    preprocess = {"mean": data.MEAN, "std": data.STD, "size": size or 224, "interpolation": "bilinear"}
    try:
        if target.startswith("random:"):
            torch.manual_seed(seed)
            return backbones.build(target.removeprefix("random:"), preprocess["size"]), preprocess, {}, None
        path = Path(target, "backbone.pt") if Path(target).is_dir() else Path(target)
        if not path.is_file():
            common.fail(f"{path}: no such checkpoint (a run folder, a .pt file, or random:ARCH is expected)")
        found = runs.load(path)
        if "state_dict" in found and "preprocess" in found:
            preprocess = found["preprocess"] | ({"size": size} if size else {})
            backbone = backbones.build(found["arch"], found["preprocess"]["size"])
            backbone.load_state_dict(found["state_dict"])
            return backbone, preprocess, found, path
        if "model" in found:
            common.fail(f"{path} is a training checkpoint; the backbone is in backbone.pt beside it")
        if not arch:
            common.fail(f"{path} holds a plain state dict: say of which network with --arch")
        backbone = backbones.build(arch, preprocess["size"])
        heads = ("fc.", "classifier.")
        backbone.load_state_dict({k: v for k, v in found.items() if not k.startswith(heads)})
        return backbone, preprocess, {}, path
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
    if file.exists():
        try:
            found = runs.load(file)
            return found["features"].to(device), found["labels"]
        except EOFError:
            pass  # a damaged cache is made again
    features, labels = extract(backbone, dataset, preprocess, device, workers=workers, amp=amp, progress=True)
    for old in path.parent.glob(f"{name}*.pt"):
        old.unlink()
    runs.write(file, {"features": features.cpu(), "labels": labels})
    return features, labels


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help)
    p.add_argument("checkpoint", help="a run folder, its backbone.pt, a torchvision state dict, or random:ARCH")
    p.add_argument("--data", help="named set or folder (default: what the checkpoint was trained on)")
    p.add_argument("--root", default="datasets", help="where named sets live")
    p.add_argument("--probe", nargs="+", choices=PROBES, default=["knn", "linear"], help="which probes")
    p.add_argument("--arch", help="the architecture of a plain state dict")
    p.add_argument("--size", type=int, default=0, help="image size in px (default: the checkpoint's, else 224)")
    p.add_argument("--limit", type=int, default=0, help="use N training images (0: all)")
    p.add_argument("--temperature", type=float, default=0.1, help="T of the weighted k-NN vote; DINO uses 0.07")
    p.add_argument("--workers", type=int, default=2, help="decoding processes, for folders")
    p.add_argument("--seed", type=int, default=0, help="of the held-out slice, the batches and random:ARCH")
    p.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: cuda, else mps, else cpu")
    p.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bf16 (default: where the device has it)")
    args = p.parse_args()
    if args.temperature <= 0:
        common.fail(f"--temperature {args.temperature}: it must be above 0")
    common.at_least(0, args, "limit", "size", "workers")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        common.fail("evaluate.py runs in one process: start it with python, not torchrun")

    _, _, device = common.setup(args.device)
    amp = common.bf16_is_fast(device) if args.amp is None else args.amp
    backbone, preprocess, about, path = open_backbone(args.checkpoint, args.arch, args.size, args.seed)
    name = args.data or about.get("data") or common.fail("say which data with --data")
    what = f"{about['method']}, epoch {about['epoch']}, {about['arch']}" if about else args.checkpoint
    print(f"{what} on {name} at {preprocess['size']} px")
    backbone.to(device, memory_format=torch.channels_last)
    sets = {s: data.load(name, args.root, s, device, args.limit, args.seed) for s in ("train", "test")}
    pairs = [cached(backbone, path, sets[s], s, preprocess, device, args.workers, amp) for s in sets]
    results = probe(*pairs, args.probe, args.temperature, args.seed)
    if path:
        print(f"written to {write_json(path.parent, name, results)}")


if __name__ == "__main__":
    main()
