"""Ranks, signals, exit codes and collectives. Whoever skips this file still understands the papers."""

import argparse
import contextlib
import ctypes
import datetime
import functools
import math
import os
import re
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

STOPPED = 85  # exit code of a run that a signal stopped and that the same command continues; 0: finished, 2: bad input


def fail(sentence):
    """Bad input: one sentence on stderr and exit code 2."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(2)


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """--help with the script's docstring as it stands, and the defaults that the texts do not name."""

    def _get_help_string(self, action):
        named = action.default is None or "default" in (action.help or "")
        return action.help if named else super()._get_help_string(action)


def at_least(least, args, *names, most=math.inf):
    """Refuse flags (by their names in `args`; lists, too) outside [least, most], or infinite. None: not given."""
    for name in names:
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [] if given is None else [given]:
            if not least <= value <= most or value == math.inf:
                most = " and finite" if not math.isfinite(value) else f" and at most {most}" if most < math.inf else ""
                fail(f"--{name.replace('_', '-')} {value}: it must be at least {least}{most}")


def keep_freed_memory():
    """On a CPU, glibc returns blocks above 32 MB to the system when they are freed, and with large batches paging every
    activation in again takes about a quarter of a step."""
    if sys.platform == "linux":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for any size
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep the top of the heap


def local_processes():
    """Processes on this machine, started by torchrun or by srun."""
    by_srun = os.environ.get("SLURM_NTASKS_PER_NODE", 1) if "RANK" in os.environ else 1
    return int(os.environ.get("LOCAL_WORLD_SIZE", by_srun))


def cores():
    """CPU cores for this process, at least one: its share among the processes that torchrun started on the machine."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS lacks it
    return max(1, found // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def default_workers():
    """Loader workers of this process, at most 16: one a core, less one where there are more than four."""
    return min(16, cores() - (cores() > 4))


MEETING = [None]  # the group of `meet`


def setup(wanted=None):
    """(rank, world, device) from torchrun's environment, or (0, 1, device) where that is absent."""
    device = wanted or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if "RANK" in os.environ or "END_WITH_PARENT" in os.environ:
        end_with_parent()
    end_at_signals()
    found = torch.cuda.device_count() if device == "cuda" else int(torch.backends.mps.is_available())
    if device != "cpu" and local >= found:
        fail(f"--device {device}: {found} found, none for local rank {local}; try --device cpu")
    if device == "cuda":
        torch.cuda.set_device(local)
        torch.backends.cudnn.benchmark = True
        device = f"cuda:{local}"
    else:
        keep_freed_memory()
    if "RANK" in os.environ and not dist.is_initialized():
        # gloo beside nccl: flags on the CPU are agreed on without waiting for the GPU. In a step no rank waits long for
        # another, so a hang shows after half an hour; `meet` has a group of its own.
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
        MEETING[0] = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=12))
    return rank, world, torch.device(device)


@functools.cache  # one thread a process
def end_with_parent():
    """From now on this process ends within seconds of its parent and of the process in END_WITH_PARENT: a torchrun that
    is killed by SIGKILL cannot stop its ranks. Not for a process started by hand: its shell may end."""
    parent, starter = os.getppid(), int(os.environ.get("END_WITH_PARENT", 0))

    def watch():
        with contextlib.suppress(ProcessLookupError):
            while os.getppid() == parent:
                time.sleep(1)
                if starter:
                    os.kill(starter, 0)  # sends nothing; raises where there is no such process
        time.sleep(111 if CAUGHT else 1)  # the signal that ended torchrun came here, too: finish the step and save
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run(main):
    """Run a command and exit with the code that `main()` returns (None: 0)."""
    with explained("what was saved before is intact"):
        code = main()
    if dist.is_initialized():
        any_rank(False)  # rank 0 may still be writing, and torchrun ends it when another rank ends
        dist.destroy_process_group()
    sys.exit(code or 0)


LACKS = {  # what torch says where the machine lacks something, and what to do about it
    r"can't allocate|not enough memory|out of memory|MemoryError|calculation overflowed":
        "memory ran out: lower --batch-size or --size, try --accumulate {}, or a smaller --arch",
    r"unable to \w+ shared memory|Bus error":
        "/dev/shm is too small for the loader workers: --workers 0, or docker run --shm-size 8g",
    r"DataLoader worker \(pid": "a loader worker was killed, as happens where memory runs out: lower --workers",
}  # fmt: skip


@contextlib.contextmanager
def explained(advice):
    """A context in which lack of memory or a killed loader worker ends the program with one sentence and `advice`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        passes = re.findall(r"--accumulate[ =](\d+)", " ".join(sys.argv)) or [1]
        for pattern, sentence in LACKS.items():
            if re.search(pattern, f"{type(error).__name__} {error}"):
                said = (str(error) or "MemoryError").splitlines()[0][:200]
                fail(f"{sentence.format(2 * int(passes[-1]))} ({said}); {advice}")
        raise


def bf16_is_fast(device):
    """Whether bf16 autocast pays: GPUs since Ampere, CPUs with bf16 instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def rank():
    """This process's rank, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def meet():
    """Wait for all ranks, also where one of them alone has hours of work. Collective."""
    if dist.is_initialized():
        dist.barrier(MEETING[0])


def in_turn(make):
    """`make()` on rank 0, then on the first rank of every other machine, then on all others: what makes a file if it is
    not there makes it once, whether or not the machines share their disk. Returns the own result. Collective."""
    turn = 0 if rank() == 0 else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    for _ in range(turn):
        meet()
    made = make()
    for _ in range(turn, 3):
        meet()
    return made


def all_gather(x):
    """The tensors of all ranks, of equal shape: [world, *x.shape]. Collective."""
    out = x.new_empty(world_size() * len(x), *x.shape[1:])
    gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # an older torch's name of it
    gather_into(out, x.contiguous())
    return out.view(world_size(), *x.shape)


class Gather(torch.autograd.Function):
    """See `gather`. Backward: the gradients that all ranks have for a row are summed on the rank that made it."""

    @staticmethod
    def forward(ctx, x, dim):
        ctx.dim = dim
        return torch.cat(all_gather(x).unbind(), dim)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(world_size(), ctx.dim)[rank()], None


def gather(x, dim=0):
    """The tensors of all ranks, of equal shape, joined along `dim`; differentiable. Collective."""
    return Gather.apply(x, dim) if dist.is_initialized() else x


def all_reduce(x):
    """The tensor x, in place its sum over all ranks. Collective."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def any_rank(flag):
    """True on every rank if it is true on one. Collective."""
    if not dist.is_initialized():
        return bool(flag)
    flag = torch.tensor(int(bool(flag)))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


CAUGHT = []
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


def catch_signals():
    """The list (one per process) to which signals to stop are added; loops check it between steps. The third signal
    ends the process at once, not the second: torchrun passes Ctrl-C on to ranks that have it from the terminal."""

    def handler(number, frame):
        CAUGHT.append(number)
        if len(CAUGHT) > 2:
            raise KeyboardInterrupt

    for number in SIGNALS:
        signal.signal(number, handler)
    return CAUGHT


def end_at_signals():
    """Where all is saved (before and after training, in probes) a signal ends the process at once."""

    def handler(number, frame):
        for other in SIGNALS:
            signal.signal(other, lambda *_: os._exit(STOPPED))
        print(f"stopped by {signal.Signals(number).name}; the same command goes on from what is saved", file=sys.stderr)
        sys.exit(STOPPED)

    for number in SIGNALS:
        signal.signal(number, handler)
