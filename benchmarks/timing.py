"""What the benchmarks share: interleaved timing, peak memory, one kind of table, and a line that says where it ran."""

import math
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

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


def peak_memory(build, device, words):
    """MB that three calls of the function that `build()` returns need at most, less what was held before. On a CPU,
    which keeps freed memory, it is measured in a process of its own: `python WORDS`, which is to call
    `print_peak(build)`."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call_three_times(build)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def print_peak(build):
    Path("/proc/self/clear_refs").write_text("5")  # the peak of importing torch is not of interest
    before = resident("VmRSS")
    call_three_times(build)
    print(resident("VmHWM") - before)


def call_three_times(build):
    step = build()
    for _ in range(3):
        step()


def resident(which):
    """VmRSS, the memory held now, or VmHWM, the most since the last reset, in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


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
