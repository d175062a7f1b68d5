"""What tests share: commands as a user starts them, small sets of images, and what every method must keep to."""

import contextlib
import functools
import importlib
import io
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import torch
import torch.multiprocessing as mp
from torchvision.io import write_jpeg

METHODS = [
    "byol",
    "cmc",
    "cpc",
    "instdisc",
    "moco",
    "pirl",
    "pretext",
    "sage",
    "simclr",
    "swav",
]  # by name: a fork is none
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import backbones  # noqa: E402
import common  # noqa: E402
import data  # noqa: E402
import parallel  # noqa: E402
import sets  # noqa: E402
import shapes  # noqa: E402

# Small tensors gain nothing by a second thread, and on a machine that does something else, too, threads wait for each
# other.
torch.set_num_threads(1)

TINY = ["--limit", "64", "--batch-size", "16", "--epochs", "2", "--probes", "knn", "--log-every", "1",
        "--device", "cpu"]  # fmt: skip


def start(*args, processes=1, **kwargs):
    """The command as a user types it, started in the repository root; returns the Popen."""
    launcher = [sys.executable]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)
    return subprocess.Popen([*launcher, *map(str, args)], **pipes, **kwargs)


# ============ the same, without the wait for imports ============
# A command that `start` starts imports torch and torchvision for three to four seconds first. A server of
# multiprocessing has them imported already and forks a process for each command. It is a process like any other, with
# signals, an exit code and output of its own, and it reads the project's files anew: none of them is in the server.

SERVER = mp.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "torch", "torchvision", "torch.utils.tensorboard", "tqdm"])
OUTPUT = ("stdout", "stderr")


def script(words, folder, env):
    """What a process of the server does: `python WORDS`, with its stdout and stderr in files of the folder."""
    for number, name in enumerate(OUTPUT, 1):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_APPEND), number)
    os.chdir(ROOT)
    os.environ.update(env)
    torch.set_num_threads(1)
    mp.set_start_method(None, force=True)  # its workers start as they do anywhere, not by the server
    sys.argv = words
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, str(ROOT))
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


class fork:
    """`start` by the server; what it returns does what the tests ask of a Popen. With `processes`, each has the
    variables that torchrun sets, but there is no torchrun: a signal goes to each, and one that fails does not end the
    others."""

    def __init__(self, *args, processes=1):
        self.folder = tempfile.TemporaryDirectory()
        for name in OUTPUT:
            Path(self.folder.name, name).touch()
        together = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": random.randint(20000, 30000)}
        ranks = [{"RANK": rank, "LOCAL_RANK": rank, **together} for rank in range(processes)] if processes > 1 else [{}]
        given = [str(arg) for arg in args], self.folder.name
        envs = [{name: str(value) for name, value in rank.items()} for rank in ranks]
        self.processes = [SERVER.Process(target=script, args=(*given, env)) for env in envs]
        for process in self.processes:
            process.start()

    def poll(self):
        """The exit code, None before the end; of several processes, that of one that failed, if one did."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next(filter(None, codes), 0)

    returncode = property(poll)

    def send_signal(self, number):
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout=None):
        for process in self.processes:
            process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("fork", timeout)

    def communicate(self, timeout=None):
        with self.folder as folder:
            try:
                self.wait(timeout)
            finally:
                self.kill()  # at its end pytest would wait for what hangs
            return tuple(Path(folder, name).read_text() for name in OUTPUT)


# ============ the same in this process ============

HANDLERS = {number: signal.getsignal(number) for number in signal.valid_signals()}
# Drawing the ten thousand images of `shapes` takes longer than most tests.
sets.shapes = types.SimpleNamespace(**vars(shapes) | {"draw_shapes": functools.cache(shapes.draw_shapes)})


def put_back():
    """What a script does to signals is undone: pytest is to end at Ctrl-C."""
    common.CAUGHT.clear()
    for number, handler in HANDLERS.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@contextlib.contextmanager
def in_process():
    """As in a new process nothing is cached or caught; environment, folder, numbers and signals stay."""
    env, folder = dict(os.environ), os.getcwd()
    for cached in (f for f in vars(data).values() if hasattr(f, "cache_clear")):
        cached.cache_clear()
    put_back()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        os.environ.clear()
        os.environ.update(env)
        os.chdir(folder)
        put_back()


def run(*args, code=0, processes=1):
    """`python ARGS`, from start to end: checks the exit code and returns (stdout, stderr). In this process, which costs
    no start, or in several forked ones."""
    if processes > 1:
        forks = fork(*args, processes=processes)
        out, err = forks.communicate(timeout=300)
        assert forks.returncode == code, f"exit code {forks.returncode}\n{out}\n{err}"
        return out, err
    words, out, err, found = [str(arg) for arg in args], io.StringIO(), io.StringIO(), 0
    with (
        in_process(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", words),
    ):
        os.chdir(ROOT)
        try:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except SystemExit as stopped:
            found = stopped.code or 0
    if isinstance(found, str):  # as Python itself does
        err.write(f"{found}\n")
        found = 1
    assert found == code, f"exit code {found}\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue(), err.getvalue()


def write_images(folder, n, classes=2, size=40, seed=0):
    """A folder of `n` JPEG files in `classes` class folders, each class a color."""
    g = torch.Generator().manual_seed(seed)
    for i in range(n):
        path = Path(folder, f"class{i % classes}", f"{i:03d}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        image = torch.randint(0, 120, (3, size, size + i % 7), generator=g, dtype=torch.uint8)
        image[i % classes % 3] += 100
        write_jpeg(image, str(path), 90)
    return Path(folder)


def equal(a, b):
    """Bit for bit, for tensors, plain values, and dicts of them."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


# ============ a batch in parts ============
# `build()` gives the model, the same at every call; `batch(n)` what its forward takes for n images, as a tuple. Of
# that, tensors with n rows (views, also in lists, or the images' places) are cut; all else (negatives, say) goes whole
# to every part.


def part(x, k, n):
    """The k-th half of what belongs to n images."""
    if torch.is_tensor(x):
        return x[k * n // 2 : (k + 1) * n // 2] if x.ndim and len(x) == n else x
    if not isinstance(x, (list, tuple)):
        return x
    return type(x)(part(v, k, n) for v in x)


def synchronized(model):
    """The model in train mode, with BatchNorm over all processes as on GPUs."""
    importlib.import_module("pretend")  # the kernels for it
    for m in model.modules():
        if type(m) in (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d):
            m.__class__ = parallel.SyncBatchNorm
    return model.train()


def half(rank, port, out, build, batch, n, sync):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    ddp = parallel.wrap(synchronized(build()) if sync else build().eval(), torch.device("cpu"))
    loss = ddp(*part(batch(n), rank, n))
    loss.backward()
    torch.distributed.all_reduce(loss := loss.detach())
    if rank == 0:
        torch.save({"loss": loss / 2, "grads": [p.grad for p in ddp.module.parameters() if p.requires_grad]}, out)
    del ddp  # before the group that it uses: torch 2.11 can hang otherwise
    torch.distributed.destroy_process_group()


def check_two_processes(build, batch, tmp_path, atol=1e-6, rtol=1e-5, n=16, sync=False):
    """Two processes with n / 2 images give the loss and the gradients of one with n: with BatchNorm over both (`sync`),
    or in eval mode, where the forward of an image does not depend on the others. `build` and `batch` must be functions
    of a module."""
    whole = build().train(sync)
    loss = whole(*batch(n))
    loss.backward()
    given = (random.randint(20000, 40000), tmp_path / "two.pt", build, batch, n, sync)
    mp.start_processes(half, given, 2, start_method="forkserver")
    two = torch.load(tmp_path / "two.pt")
    assert torch.allclose(two["loss"], loss, atol=atol)
    grads = [p.grad for p in whole.parameters() if p.requires_grad]
    assert sum(g.abs().sum() for g in grads) > 0
    for g, expected in zip(two["grads"], grads, strict=True):
        assert (g - expected).norm() <= atol + rtol * expected.norm()


def check_accumulation(build, batch, atol=1e-6, rtol=1e-5, n=16):
    """Two passes over n / 2 images, each loss halved, add up to the gradients of one pass over n. BatchNorm aside."""
    xs, one, two = batch(n), build().eval(), build().eval()
    one(*xs).backward()
    for k in range(2):
        (two(*part(xs, k, n)) / 2).backward()
    assert sum(p.grad.abs().sum() for p in one.parameters() if p.grad is not None) > 0
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert p.grad is None or torch.allclose(p.grad, q.grad, atol=atol, rtol=rtol)


# ============ commands on a checkpoint ============


def clusters(n, classes=5, d=16, spread=1.0, seed=0):
    """Features [n, d] in Gaussian clusters around fixed centers, and their labels; `seed` draws the points."""
    centers = torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=g)
    return centers[y] + spread * torch.randn(n, d, generator=g), y


def colors(n=96, classes=3, seed=0, size=16):
    """An easy set in memory: each class (modulo 3) brightens a channel of noise."""
    x = torch.randint(0, 120, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    y = torch.arange(n) % classes
    x[torch.arange(n), y % 3] += 100
    return sets.Images("colors", x, y, [f"class {c}" for c in range(classes)])


class Maps(torch.nn.Module):
    """A backbone with two maps and a vector; only `useful` tells the brightest channel, which `colors` are about."""

    dim = 4

    def __init__(self, useful="block1"):
        super().__init__()
        self.useful, self.scale = useful, torch.nn.Parameter(torch.ones(()))

    def taps(self, x):
        bright, noise = x * self.scale, x.flip(2)[:, :1] - x[:, :1]  # of noise a mean over an image says nothing
        maps = {"root": noise.expand(-1, 5, -1, -1), "block1": noise, "pre_logits": noise.mean((2, 3)).expand(-1, 4)}
        pooled = torch.nn.functional.pad(bright.mean((2, 3)), (0, 1))
        return maps | {self.useful: bright if self.useful != "pre_logits" else pooled}

    def forward(self, x):
        return self.taps(x)["pre_logits"]


def small_backbone(seed=0):
    torch.manual_seed(seed)
    return backbones.build("resnet10_16", 16)


def command(monkeypatch, module, *args):
    """`python -m MODULE ARGS` on the CPU, in this process."""
    monkeypatch.setattr(sys, "argv", [module, *map(str, args), "--device", "cpu", "--workers", "0", "--no-amp"])
    importlib.import_module(module).main()
