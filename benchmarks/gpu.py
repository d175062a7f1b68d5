"""Everything that is to be measured on a GPU, by one command that is repeated until nothing is left.

    python benchmarks/gpu.py                     all pieces in turn for eight minutes; again: what is left
    python benchmarks/gpu.py facts saliency      these pieces
    python benchmarks/gpu.py --minutes 0         only lists what is done and what is left
    python benchmarks/gpu.py --tiny              on a CPU, to see that it works: the numbers mean nothing

Each measurement is kept in results/gpu-NAME.json as soon as it is made, NAME being the device's; results/gpu-NAME.md
shows all beside their goals. The exit code is 85 while something is left, then 0. Only the project's packages are
needed, and for the piece `cifar10` that set in --root.
"""

import argparse
import collections
import contextlib
import gc
import importlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torchvision
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import step
import timing

import byol
import common
import data
import evaluate
import runs
import saliency
import sets
import shapes

ROOT = Path(__file__).resolve().parents[1]

METHODS = ("byol", "simclr", "sage", "moco", "swav", "instdisc", "cmc", "pirl", "cpc", "pretext")
COMPILED = ("byol", "simclr", "sage")  # timed with --compile as well
PROFILED = 5  # updates whose kernels are counted
# sets: {data: (images, their px, the most per batch)}; updates: of a run, of which the first `skip` are not timed;
# features: (images, dimensions, classes, epochs of the linear probe); queries: of k-NN; copy: bytes; product: rows.
FULL = SimpleNamespace(
    sets={"cifar10": (50_000, 32, 4096), "imagenet": (5120, 256, 256)}, updates=80, skip=30,
    flags=["--log-every", "10"], features=[(50_000, 512, 10, 100), (1_281_167, 2048, 1000, 1)], queries=5000,
    copy=2**30, product=8192, maps=512, pairs=512, recipe="cifar10", repeats=5, seconds=0.3,
    cifar10=["--data", "cifar10"],
)  # fmt: skip
TINY = SimpleNamespace(
    sets={"cifar10": (16, 32, 4), "imagenet": (16, 40, 4)}, updates=4, skip=2,
    flags=["--log-every", "1", "--recipe", "shapes", "--size", "32"],
    features=[(60, 16, 3, 2), (80, 32, 4, 1)], queries=10, copy=2**16, product=64, maps=1, pairs=2,
    recipe="shapes", repeats=1, seconds=0.0,
    cifar10=["--data", "shapes", "--limit", "64", "--batch-size", "16", "--epochs", "2"],
)  # fmt: skip

STEPS = "network, px, batch, ms/step, images/s, spread %, views ms, views %, peak GiB"
RUNS = ("The scripts as they are, on images of noise in the device's memory, by their own log lines, so with all that "
        "a run does. Peak: without the images. Views: the loader alone, and in % of the step.")  # fmt: skip
PIECES = {  # name: (title, columns, note)
    "facts": ("The machine", "memory GiB, driver, CUDA, cuDNN, CPU cores, copy GB/s, bf16 product TFLOP/s",
              "Copy: of 1 GiB, read and written. Product: of square matrices with 8192 rows."),
    "cifar10": ("BYOL on CIFAR-10", "minutes, calls, epoch, 200-NN, highest, 200-NN by epoch",
                "`python byol.py --data cifar10`, in so many calls; minutes with starts and probes."),
    "peers": ("BYOL's step beside lightly's, ms", "batch, ours bf16, ours fp32, ours bf16 --compile, lightly as "
              "shipped, lightly bf16", "ResNet-18 at 32 px: the steps of `step.py`, in turns, on views made already."),
    "steps32": ("Training steps, `--data cifar10`", STEPS, RUNS),
    "steps224": ("Training steps, `--data imagenet`", STEPS, f"{RUNS} The batch is the recipe's, at most 256, halved "
                 "until it fits; queues and banks are those of 5,120 images; the GPU makes the crops, not workers."),
    "knn": ("k-NN, fp32", "images, s, queries/s", "`evaluate.knn`, every k from one pass."),
    "linear": ("Linear probe", "images, epochs, s", "`evaluate.linear_sgd`: the whole grid, and the best of it again."),
    "saliency": ("Saliency maps", "images, images/s", "`saliency.maps`, 224 px."),
    "launches": ("Launches in a training step, `--data cifar10`", "batch, kernels, graphs", "Counted by the profiler."),
}  # fmt: skip
GOALS = {
    "steps32": "views at most 15 %", "steps224": "views at most 15 %", "saliency rbd": "3,000 images/s",
    "cifar10": "86.8 in 12 minutes (lightly: 86.8 at best, 108 minutes on an A6000)",
}  # fmt: skip


class Bench:
    """Results so far, in files, and what measurements need: sizes, the device, the time at which to stop."""

    def __init__(self, args, device):
        self.args, self.device, self.sizes = args, device, TINY if args.tiny else FULL
        self.end, self.name = time.monotonic() + 60 * args.minutes, timing.device_name(device)
        name = re.sub(r"[^a-z0-9]+", "-", f"gpu-{self.name.lower()}{' tiny' * args.tiny}").strip("-")
        self.runs, self.json = Path(args.runs, name), Path(args.out, f"{name}.json")
        self.results = json.loads(self.json.read_text()) if self.json.exists() else {}
        self.where = f"commit {args.commit}, torch {torch.__version__}, torchvision {torchvision.__version__}"
        methods = sorted([*METHODS, *(f"{method} --compile" for method in COMPILED)])
        probes = {f"{n:,} x {d}, {c} classes": (n, d, c, epochs) for n, d, c, epochs in self.sizes.features}
        self.rows = {  # {piece: {row: (function, its arguments after the bench)}}
            "facts": {self.name: (facts,)},
            "cifar10": {"byol": (cifar10,)},
            "peers": {"byol": (peers,)},
            "steps32": {row: (steps, "cifar10", *row.split()) for row in methods},
            "steps224": {row: (steps, "imagenet", *row.split()) for row in methods},
            "knn": {row: (probe, "knn", *sizes) for row, sizes in probes.items()},
            "linear": {row: (probe, "linear", *sizes) for row, sizes in probes.items()},
            "saliency": {method: (masks, method) for method in saliency.METHODS},
            "launches": {row: (launches, *row.split()) for row in methods},  # last: profiling may slow the rest
        }

    def put(self, piece, row, result):
        self.results.setdefault(piece, {})[row] = result | {"where": self.where}
        self.json.parent.mkdir(parents=True, exist_ok=True)
        runs.write_text(self.json, json.dumps(self.results, indent=1) + "\n")
        runs.put(self.json.with_suffix(".md"), lambda f: f.write(page(self).encode()), sync=False)

    def left(self, piece):
        """The rows of a piece that are still to be measured."""
        known, again = self.results.get(piece, {}), {"unfinished", *["error"] * self.args.retry}
        return [row for row in self.rows[piece] if row not in known or again & known[row].keys()]

    def measure(self, piece, row):
        (f, *args), started = self.rows[piece][row], time.monotonic()
        if f is not cifar10:  # which keeps books of its own
            self.put(piece, row, {"error": "the process ended within it"})
        try:
            result = f(self, *args)
        except Exception as error:
            result = {"error": runs.reason(error)}
        said = f"failed: {result['error']}" if "error" in result else f"{time.monotonic() - started:.0f} s"
        print(f"{piece:<10}{row}: {said}", flush=True)
        self.put(piece, row, result)
        if "CUDA error" in said:  # nothing works in this process any more
            sys.exit(common.STOPPED)
        free()


def free():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def halved(measure, size):
    """measure(size), or of a half of it, a quarter, ..., the first that the GPU has memory for."""
    while True:
        try:
            return measure(size)
        except torch.OutOfMemoryError:
            if size < 4:
                raise
        size //= 2
        free()


def seconds(bench, f):
    """Median seconds of a call."""
    return statistics.median(timing.interleaved({"": f}, bench.device, bench.sizes.repeats, bench.sizes.seconds)[""])


# ============ the machine, probes, masks ============


def facts(bench):
    device, n = bench.device, bench.sizes.product
    x, m = torch.ones(bench.sizes.copy // 4, device=device), torch.randn(n, n, device=device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    result = {"CUDA": torch.version.cuda or "-", "cuDNN": str(torch.backends.cudnn.version())}
    result |= {"CPU cores": common.cores(), "copy GB/s": 2e-9 * x.nbytes / seconds(bench, lambda: y.copy_(x))}
    result |= {"bf16 product TFLOP/s": 2e-12 * n**3 / seconds(bench, lambda: m @ m)}
    if device.type == "cuda":
        result["memory GiB"] = torch.cuda.get_device_properties(device).total_memory / 2**30
        with contextlib.suppress(OSError, IndexError):
            words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            result["driver"] = subprocess.run(words, capture_output=True, text=True).stdout.split()[0]
    return result


def probe(bench, kind, n, dim, classes, epochs):
    """k-NN or the linear probe of random features, as evaluate.py has them."""
    device, queries = bench.device, bench.sizes.queries

    def measure(n):
        (x, y), (test_x, test_y) = (
            (torch.randn(k, dim, device=device), torch.arange(k, device=device) % classes) for k in (n, queries)
        )
        if kind == "knn":
            s = seconds(bench, lambda: evaluate.knn(x, y, test_x, test_y))
            return {"images": n, "s": s, "queries/s": queries / s}
        evaluate.linear_sgd(x, y, test_x, test_y, epochs=1)  # first allocations
        start = timing.clock(device)
        evaluate.linear_sgd(x, y, test_x, test_y, epochs=epochs)
        return {"images": n, "epochs": epochs, "s": timing.clock(device) - start}

    return halved(measure, n)


def masks(bench, method):
    images = shapes.draw_shapes(bench.sizes.maps, saliency.SIDE)[0].to(bench.device)
    s = seconds(bench, lambda: saliency.maps(images, method, size=64))
    return {"images": len(images), "images/s": len(images) / s}


# ============ training steps ============


def noise(bench, dataset):
    """What sets.splits gives a script: images of noise in the device's memory, as many and as large as the set's."""
    n, px, _ = bench.sizes.sets[dataset]
    g, found = torch.Generator(bench.device).manual_seed(0), []
    for count in (n, min(n, 256)):
        x = torch.randint(256, (count, 3, px, px), dtype=torch.uint8, device=bench.device, generator=g)
        found.append(sets.Images(dataset, x, torch.arange(count) % 10, list("0123456789")))
    return found[0], *found


def command(bench, dataset, method, *flags):
    """(script, words without --batch-size, batch to try)"""
    script = importlib.import_module(method)
    words = ["--data", dataset, "--eval-every", "0", *bench.sizes.flags, *flags]
    args = script.parse_args(words)
    words += ["--evaluator", f"random:{args.arch}"] if method == "sage" else []
    return script, words, min(args.batch_size, bench.sizes.sets[dataset][2])


def train(bench, script, words, updates, out, at=()):
    """A script's main with a user's words, but on `noise`, and stopped by SIGTERM after so many updates. `at` is called
    at batches, {number: function}. Returns the log lines of training, the loader and the bytes of the images."""
    splits, epoch, used, said = noise(bench, script.parse_args(words).data), data.Loader.epoch, [], io.StringIO()
    words = [*words, "--workers", "0", "--device", bench.device.type, "--out", str(out)]
    at = dict(at) | {updates: lambda: os.kill(os.getpid(), signal.SIGTERM)}  # it finishes this update and saves

    def counted(loader, *where):
        for batch in epoch(loader, *where):
            if loader.data is splits[0]:
                used.append(loader)
                at.get(len(used), int)()
            yield batch

    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if "--compile" in words:
        torch.compiler.reset()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            with mock.patch.object(sets, "splits", lambda *_: splits), mock.patch.object(data.Loader, "epoch", counted):
                script.main(words)
    except SystemExit as stopped:
        if stopped.code != common.STOPPED:  # bad input, by common.fail, or a loss that is not finite
            text = f"exit code {stopped.code}\n{said.getvalue()}" if isinstance(stopped.code, int) else stopped.code
            kind = torch.OutOfMemoryError if "do not fit this GPU" in text else RuntimeError  # by memory.check
            raise kind(text.strip().splitlines()[-1]) from None
    finally:
        common.CAUGHT.clear()
        common.end_at_signals()
    if len(used) < updates:
        sys.exit(common.STOPPED)  # it was the user's signal
    lines = map(json.loads, Path(out, "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line], used[-1], sum(s.images.nbytes for s in splits[1:])


def steps(bench, dataset, method, *flags):
    script, words, most = command(bench, dataset, method, *flags)

    def measure(batch):
        args = script.parse_args(full := [*words, "--batch-size", str(batch)])
        with tempfile.TemporaryDirectory() as out:
            lines, loader, held = train(bench, script, full, bench.sizes.updates, out)
        whole = [x for x in lines if x["step"] > bench.sizes.skip and x["step"] % args.log_every == 0]
        times, count = [1000 * batch / x["images_per_second"] for x in whole], min(20, loader.steps)
        look = lambda: collections.deque(itertools.islice(loader.epoch(0), count), maxlen=0)
        ms, views = statistics.median(times), 1000 * seconds(bench, look) / count
        result = {"network": args.arch, "px": args.size, "batch": batch, "ms/step": ms, "images/s": 1000 * batch / ms}
        result |= {"spread %": 100 * (max(times) - min(times)) / ms, "views ms": views, "views %": 100 * views / ms}
        if bench.device.type == "cuda":
            result["peak GiB"] = (1e6 * lines[-1]["memory_mb"] - held) / 2**30
        return result | {"command": f"{method}.py {' '.join(full)}"}

    return halved(measure, most)


def launches(bench, method, *flags):
    """Calls of CUDA that launch kernels, or graphs of them."""
    if bench.device.type != "cuda":
        return {}
    script, words, batch = command(bench, "cifar10", method, *flags)
    first, profiler = bench.sizes.skip, profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    at = {first: profiler.start, first + PROFILED: profiler.stop}
    with tempfile.TemporaryDirectory() as out:
        train(bench, script, [*words, "--batch-size", str(batch)], first + PROFILED + 1, out, at)
    calls = profiler.key_averages()
    count = lambda name: sum(call.count for call in calls if name in call.key) / PROFILED
    if not count("Launch"):
        raise RuntimeError("the profiler sees no launches on this machine")
    return {"batch": batch, "kernels": count("LaunchKernel"), "graphs": count("GraphLaunch")}


def peers(bench):
    n, device, recipe = bench.sizes.pairs, bench.device, byol.RECIPES[bench.sizes.recipe]
    xs = [torch.randn(n, 3, step.SIZE, step.SIZE, device=device) for _ in range(2)]
    kinds = {"ours bf16": (True,), "ours fp32": (False,), "ours bf16 --compile": (True, True)}
    made = {name: step.Ours(device, *how, recipe=recipe) for name, how in kinds.items()}
    theirs = {"lightly as shipped": False, "lightly bf16": True}
    if step.NegativeCosineSimilarity:
        made |= {name: step.Lightly(device, amp) for name, amp in theirs.items()}
    calls = {name: lambda run=run: run.step(xs) for name, run in made.items()}
    times = timing.interleaved(calls, device, bench.sizes.repeats, bench.sizes.seconds)
    ms = {name: 1000 * statistics.median(t) for name, t in times.items()}
    return {"batch": n} | dict.fromkeys(theirs, "not installed") | ms


# ============ runs ============


def cifar10(bench):
    """A process of its own, stopped when time is over; the next call goes on. A call that is killed counts as if it had
    lasted until then."""
    was, limit = bench.results.get("cifar10", {}).get("byol", {}), max(1, bench.end - time.monotonic())
    folder, log = (bench.runs / "cifar10").resolve(), bench.runs / "cifar10.txt"
    was = was if (folder / "metrics.jsonl").exists() else {}  # without its run: from the start
    calls, spent, started = was.get("calls", 0), was.get("minutes", 0.0), time.monotonic()
    result = {"unfinished": True, "calls": calls + 1, "command": f"byol.py {' '.join(bench.sizes.cifar10)}"}
    bench.put("cifar10", "byol", result | {"minutes": spent + limit / 60})
    bench.runs.mkdir(parents=True, exist_ok=True)
    words = [*bench.sizes.cifar10, "--root", str(Path(bench.args.root).resolve()), "--device", bench.device.type]
    words += ["--out", str(folder)]
    if calls == 0:  # an older measurement's
        shutil.rmtree(folder, ignore_errors=True)
    env = os.environ | {"END_WITH_PARENT": str(os.getpid())}
    with open(log, "a") as f:
        process = subprocess.Popen([sys.executable, "byol.py", *words], stdout=f, stderr=f, cwd=ROOT, env=env)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.terminate()
            code = process.wait()
    if code not in (0, common.STOPPED, -signal.SIGTERM):  # the last: it was still importing
        raise RuntimeError([f"exit code {code}", *log.read_text().splitlines()][-1])
    if code == 0:
        del result["unfinished"]
    result["minutes"], file = spent + (time.monotonic() - started) / 60, folder / "metrics.jsonl"
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else []
    if curve := {round(line["epoch"]): line["knn200"] for line in lines if "knn200" in line}:
        result |= {"epoch": max(curve), "200-NN": curve[max(curve)], "highest": max(curve.values())}
        result["200-NN by epoch"] = ", ".join(f"{epoch}: {score:.1f}" for epoch, score in curve.items())
    return result


# ============ all of it ============


def cell(value):
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/")


def page(bench):
    """All results as Markdown."""
    wheres = sorted({result["where"] for known in bench.results.values() for result in known.values()})
    lines = [f"# {bench.name}", "", f"`python benchmarks/gpu.py`, {'; '.join(wheres)}", ""]
    lines += ["Tiny sizes, to see that the command works: the numbers mean nothing.", ""] * bench.args.tiny
    for name, (title, columns, note) in PIECES.items():
        columns = columns.split(", ")
        lines += [f"## {title}", "", note, "", f"| | {' | '.join(columns)} | goal |", "|---" * (len(columns) + 2) + "|"]
        for row in bench.rows[name]:
            result = bench.results.get(name, {}).get(row, dict.fromkeys(columns, "not run"))
            cells = [cell(result.get(column, "-")) for column in columns]
            cells[0] = f"failed: {cell(result['error'])}" if "error" in result else cells[0]
            cells[0] += " so far" * ("unfinished" in result)
            lines.append(f"| {' | '.join([row, *cells, GOALS.get(f'{name} {row}', GOALS.get(name, ''))])} |")
        lines.append("")
    return "\n".join(lines)


def here():
    """The commit of this code, where there is git."""
    words = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError):
        return subprocess.run(words, capture_output=True, text=True, cwd=ROOT).stdout.strip() or "unknown"
    return "unknown"


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("pieces", nargs="*", metavar="PIECE", help=f"{', '.join(PIECES)} (default: all)")
    p.add_argument("--minutes", type=float, default=8, help="start no measurement after so many (default: 8)")
    p.add_argument("--retry", action="store_true", help="measure again what failed")
    p.add_argument("--root", default="datasets", help="where CIFAR-10 lies")
    p.add_argument("--out", default="results", help="folder for the results")
    p.add_argument("--runs", default="runs", help="folder for the run of `cifar10`")
    p.add_argument("--commit", default=here(), help="shown in the results, for a copy without git")
    p.add_argument("--tiny", action="store_true", help="small sizes, on any device")
    args = p.parse_args(argv)
    if unknown := set(args.pieces) - PIECES.keys():
        common.fail(f"{', '.join(sorted(unknown))}: the pieces are {', '.join(PIECES)}")
    _, _, device = common.setup()
    if device.type != "cuda" and not args.tiny:
        common.fail("no GPU of CUDA's; --tiny runs everything at sizes for a CPU")
    bench, wanted = Bench(args, device), [name for name in PIECES if name in (args.pieces or PIECES)]
    timing.where(device)
    for name in wanted:
        for row in bench.left(name):
            if time.monotonic() < bench.end:
                bench.measure(name, row)
    for name in wanted:
        left, failed = len(bench.left(name)), sum("error" in x for x in bench.results.get(name, {}).values())
        print(f"{name:<10}{len(bench.rows[name]) - left} done ({failed} failed), {left} left")
    return common.STOPPED if any(map(bench.left, wanted)) else 0


if __name__ == "__main__":
    common.run(main)
