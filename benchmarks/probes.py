"""Probes: k-NN against its bare products and against lightly's, the linear probe against a frozen-backbone loop,
logistic regression for 45 penalties against scikit-learn's, and memory.

    python benchmarks/probes.py                                          about ten minutes on two CPU cores
    python benchmarks/probes.py --size 5000 --epochs 5 --repeats 2       short

Features are synthetic: clusters in 512 dimensions, several to a class, wide enough that neighbors are sometimes wrong;
for logistic regression also after a layer whose outputs have very different scales, as those of networks have.
"""

import argparse
import itertools
import statistics
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import timing

import backbones
import common
import data
import evaluate
import logistic

try:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
except ImportError:
    LogisticRegression = None

try:
    from lightly.utils.benchmarking import knn_predict
except ImportError:
    knn_predict = None

CLASSES, CLUSTERS, DIM, CHUNK, K = 10, 200, 512, 500, max(evaluate.KS)


def features(n, g, centers):
    """`n` points around `centers`, which belong to the classes in turn."""
    cluster = torch.randint(len(centers), (n,), generator=g)
    return centers[cluster] + 4 * torch.randn(n, DIM, generator=g), cluster % CLASSES


def peak_bytes(f, device):
    """The most that tensors take while `f` runs, on top of what they took before: by torch's own count of
    allocations."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        f()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        f()
    steps = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(steps, key=lambda e: e.start_ns())), default=0)


def memory_benchmark(device, n, dim, classes=100):
    """Peaks beside the features themselves, in sizes of these; one epoch of the linear probe, whose memory epochs leave
    alone."""
    g = data.generator("memory")
    x, y = torch.randn(n, dim, generator=g).to(device), torch.randint(classes, (n,), generator=g).to(device)
    settings = {"batch_size": max(256, n // 100), "epochs": 1}  # fewer steps: each leaves its notes in the profiler
    calls = {
        "linear probe": lambda: evaluate.linear_sgd(x, y, x[:1000], y[:1000], **settings),
        "k-NN, 1000 queries": lambda: evaluate.knn(x, y, x[:1000], y[:1000]),
    }
    rows = [[name, f"{1 + peak_bytes(f, device) / x.nbytes:.2f}x"] for name, f in calls.items()]
    title = f"memory at most, of that of the features, {n} x {dim} = {x.nbytes / 1e6:.0f} MB, {classes} classes"
    timing.table(title, ["", "features included"], rows)


def knn_benchmark(args, device, bank, labels, queries, answers):
    unit, accuracy = [F.normalize(t, dim=1) for t in (bank, queries)], {}

    @torch.inference_mode()
    def floor():
        for q in unit[1].split(CHUNK):
            (q @ unit[0].T).topk(K, dim=1)

    def ours():
        scores = evaluate.knn(bank, labels, queries, answers, chunk=CHUNK)
        accuracy["ours, all k"] = " ".join(f"{weighted:.2f}" for weighted, _ in scores.values())

    @torch.inference_mode()
    def lightly():
        bank_t, right = unit[0].T, 0
        for q, y in zip(unit[1].split(256), answers.split(256), strict=True):
            right += (knn_predict(q, bank_t, labels, CLASSES, K, 0.1)[:, 0] == y).sum()
        accuracy[f"lightly, k={K}"] = f"{100 * right.item() / len(queries):.2f}"

    variants = {"ours, all k": ours, "product + topk": floor}
    if knn_predict:
        variants[f"lightly, k={K}"] = lightly
    times = timing.interleaved(variants, device, args.repeats)
    rows = []
    for name, seconds in times.items():
        row = [name, f"{statistics.median(seconds):.3f}", timing.spread(seconds)]
        row += [timing.ratio(times, name, reference) for reference in ("product + topk", f"lightly, k={K}")]
        rows.append([*row, f"{peak_bytes(variants[name], device) / 2**20:.0f}", accuracy.get(name, "-")])
    title = f"k-NN, {len(queries)} queries, bank {len(bank)} x {DIM}, k = {' '.join(map(str, evaluate.KS))}"
    head = ["", "s", "spread", "speed vs product + topk", "vs lightly", "extra MiB", "top-1 % (weighted)"]
    timing.table(title, head, rows)


def linear_benchmark(args, device, x, y, test_x, test_y):
    """The whole grid, all epochs, against one epoch of the loop that runs the frozen backbone on every batch anew."""
    backbone = backbones.build("resnet18", 32).to(device, memory_format=torch.channels_last).eval()
    images = torch.randn(256, 3, 32, 32, device=device)
    results = []

    @torch.no_grad()
    def forward(bf16):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            for _ in range(args.batches):
                backbone(images)

    loops = {"frozen backbone, 1 epoch, bf16": True, "frozen backbone, 1 epoch, fp32": False}
    variants = {name: lambda bf16=bf16: forward(bf16) for name, bf16 in loops.items()}
    times = timing.interleaved(variants, device, args.repeats)
    times = {name: [s * len(x) / 256 / args.batches for s in seconds] for name, seconds in times.items()}

    name = f"ours, {len(evaluate.LRS) * len(evaluate.DECAYS)} heads + the best again, {args.epochs} epochs"
    times[name] = []
    for _ in range(args.repeats):
        start = timing.clock(device)
        results.append(evaluate.linear_sgd(x, y, test_x, test_y, epochs=args.epochs))
        times[name].append(timing.clock(device) - start)
    rows = []
    for n, seconds in times.items():
        how = "measured" if n == name else f"from {args.batches} batches"
        rows.append([n, f"{statistics.median(seconds):.2f}", timing.spread(seconds), how])
    timing.table(f"linear probe, {len(x)} x {x.shape[1]}, {CLASSES} classes", ["", "s", "spread", ""], rows)
    r = results[-1]
    print(f"top-1 {r['top1']:.2f} with lr {r['lr']:g}, wd {r['weight_decay']:g}")
    print("The loop's figures are forward passes only (ResNet-18 at 32 px, eval(), batch 256), a few of them timed and")
    print("multiplied up to an epoch. Augmentation, head and optimizer would come on top, for one head and not a grid.")


def logistic_benchmark(device, n, penalties=45, iterations=(100, 1000)):
    """All penalties of Ericsson et al. 2021, from their strongest on as they do: each fit starts where the last ended.
    100 iterations are theirs. How far the losses are above the lowest ones found is the mean over the penalties."""
    g = data.generator("logistic")
    for kind in ("clusters", "clusters after a layer"):
        x, y = features(n, g, torch.randn(CLUSTERS, DIM, generator=g))
        if "layer" in kind:
            x = (x @ torch.randn(DIM, DIM, generator=g) / DIM**0.5).relu() * torch.logspace(0, -2, DIM)
        grid, fits, seconds = torch.logspace(5, -6, penalties) / n, {}, {}

        def ours(x=x, y=y, grid=grid):
            w, b = logistic.fit(x.to(device), y.to(device), CLASSES, grid)
            return [(w[i].cpu(), b[i].cpu()) for i in range(len(grid))]

        def theirs(most, x=x, y=y, grid=grid):
            model, found = LogisticRegression(max_iter=most, warm_start=True), []
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                for penalty in grid.tolist():
                    model.C = 1 / (penalty * n)
                    model.fit(x.numpy(), y.numpy())
                    found.append((torch.from_numpy(model.coef_.T), torch.from_numpy(model.intercept_)))
            return found

        calls = {"ours": ours}
        if LogisticRegression:
            calls |= {f"scikit-learn, {most} iterations": lambda most=most: theirs(most) for most in iterations}
        for name, call in calls.items():
            start = timing.clock(device)
            fits[name] = call()
            seconds[name] = timing.clock(device) - start
        losses = torch.tensor([
            [F.cross_entropy(x.double() @ w.double() + b, y) + p / 2 * w.double().square().sum()
             for (w, b), p in zip(found, grid, strict=True)] for found in fits.values()
        ])  # fmt: skip
        above = (losses / losses.min(0).values - 1).mean(1).tolist()
        rows = [[k, f"{seconds[k]:.2f}", f"{seconds[k] / seconds['ours']:.1f}x", f"{a:.1e}"]
                for k, a in zip(fits, above, strict=True)]  # fmt: skip
        title = f"logistic regression, {kind}, {n} x {DIM}, {CLASSES} classes, {penalties} penalties"
        timing.table(title, ["", "s", "of ours", "loss above the lowest"], rows)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=3, help="rounds; every variant runs once in each")
    p.add_argument("--size", type=int, default=50_000, help="training features; a fifth as many queries")
    p.add_argument("--epochs", type=int, default=100, help="of the linear probe")
    p.add_argument("--batches", type=int, default=3, help="forward passes of the frozen backbone to time")
    p.add_argument("--threads", type=int, default=2, help="on the CPU")
    args = p.parse_args()
    _, _, device = common.setup()
    torch.set_num_threads(args.threads)
    timing.where(device)
    for name, found in (("lightly", knn_predict), ("scikit-learn", LogisticRegression)):
        if not found:
            print(f"{name} is not installed: left out")
    g = data.generator("probes")
    centers = torch.randn(CLUSTERS, DIM, generator=g)
    pairs = [features(n, g, centers) for n in (args.size, args.size // 5)]
    tensors = [t.to(device) for pair in pairs for t in pair]
    knn_benchmark(args, device, *tensors)
    linear_benchmark(args, device, *tensors)
    logistic_benchmark(device, args.size // 10)
    memory_benchmark(device, 2 * args.size, 4 * DIM)


if __name__ == "__main__":
    main()
