"""What the benchmarks share: interleaved timing, one kind of table, and a line that says where it was measured."""

import math
import statistics
import time
from collections import defaultdict

import torch


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:  # Linux
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return device.type


def where(device):
    print(f"{device_name(device)}; torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)


def wait(device):
    """Kernels on a GPU are only queued when a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(device):
    wait(device)
    return time.perf_counter()


def interleaved(variants, device, repeats, seconds=0.0):
    """{name: [seconds per call] * repeats} for {name: function}, in the order A B A B ..., so that a busy moment of the
    machine meets every variant. One untimed round comes first; it also says how often a fast function is called to fill
    `seconds`."""
    calls, times = {}, defaultdict(list)
    for name, f in variants.items():
        f()  # compilation, first allocations
        start = clock(device)
        f()
        calls[name] = max(1, math.ceil(seconds / (clock(device) - start)))
    for _ in range(repeats):
        for name, f in variants.items():
            start = clock(device)
            for _ in range(calls[name]):
                f()
            times[name].append((clock(device) - start) / calls[name])
    return dict(times)


def spread(values):
    return f"{100 * (max(values) - min(values)) / statistics.median(values):.0f} %"


def ratio(times, name, reference):
    """How many times as fast as `reference`: the median over the rounds, in each of which the two ran side by side."""
    if name not in times or reference not in times:
        return "-"
    return f"{statistics.median(r / t for t, r in zip(times[name], times[reference], strict=True)):.2f}x"


def table(title, head, rows):
    """An aligned table; the first column to the left, the others to the right."""
    rows = [head, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"\n{title}\n")
    for row in rows:
        print(
            "  ".join(
                cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )
    print(flush=True)
