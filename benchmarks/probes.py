"""Probes: k-NN against its bare products and against lightly's, the linear probe against a frozen-backbone loop, and
memory.

    python benchmarks/probes.py                                          about ten minutes on two CPU cores
    python benchmarks/probes.py --size 5000 --epochs 5 --repeats 2       short

Features are synthetic: clusters in 512 dimensions, several to a class, wide enough that neighbors are sometimes wrong.
"""

import argparse
import itertools
import statistics
import sys
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
    if not knn_predict:
        print("lightly is not installed: left out")
    g = data.generator("probes")
    centers = torch.randn(CLUSTERS, DIM, generator=g)
    pairs = [features(n, g, centers) for n in (args.size, args.size // 5)]
    tensors = [t.to(device) for pair in pairs for t in pair]
    knn_benchmark(args, device, *tensors)
    linear_benchmark(args, device, *tensors)
    memory_benchmark(device, 2 * args.size, 4 * DIM)


if __name__ == "__main__":
    main()
