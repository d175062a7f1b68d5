"""BatchNorm over several processes, and what they make one after the other."""

import os
import random
from datetime import timedelta

import pretend
import pytest
import torch
import torch.multiprocessing as mp
from helpers import synchronized
from torch import nn
from torch.nn.modules import _functions

import common
import moco
import parallel

SHAPES = [(6, 5), (6, 5, 4, 3)]


def join(rank, port, world):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60))


def example(shape, affine):
    """(BatchNorm, x, the gradient of its output), in double precision."""
    torch.manual_seed(0)
    norm = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(shape[1], affine=affine).double()
    for p in norm.parameters():
        nn.init.normal_(p)
    x, dy = torch.randn(2, *shape).double() + torch.arange(shape[1]).view(-1, *[1] * (len(shape) - 2))
    if len(shape) == 4:
        x, dy = x.contiguous(memory_format=torch.channels_last), dy.contiguous()
    return norm, x.requires_grad_(), dy


def passes(norm, x, dy):
    y = norm(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in norm.parameters()), *norm.buffers()]


def half(rank, port, folder):
    join(rank, port, 2)
    found = []
    for shape in SHAPES:
        for affine in (True, False):
            norm, x, dy = example(shape, affine)
            x, dy = (t.detach().split([4, 2])[rank] for t in (x, dy))  # shares of two sizes
            ours = passes(synchronized(norm), x.clone().requires_grad_(), dy)
            norm, _, _ = example(shape, affine)
            given = norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, norm.momentum
            theirs = _functions.SyncBatchNorm.apply(x, *given, torch.distributed.group.WORLD, 2)
            assert torch.equal(ours[0], theirs) and torch.equal(ours[-3], norm.running_mean)
            found.append(ours)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_normalize_as_one(tmp_path):
    mp.start_processes(half, (random.randint(20000, 40000), tmp_path), 2, start_method="forkserver")
    halves = iter(zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)), strict=True))
    for shape in SHAPES:
        for affine in (True, False):
            y, dx, *rest = passes(*example(shape, affine))
            (y0, dx0, *rest0), (y1, dx1, *rest1) = next(halves)
            assert torch.allclose(torch.cat([y0, y1]), y) and torch.allclose(torch.cat([dx0, dx1]), dx, atol=1e-12)
            parameters = 2 * affine
            for one, first, second in zip(rest[:parameters], rest0, rest1, strict=False):  # their gradients add up
                assert torch.allclose(first + second, one)
            for one, first, second in zip(rest[parameters:], rest0[parameters:], rest1[parameters:], strict=True):
                assert torch.equal(first, second) and torch.allclose(first, one)


@pytest.mark.parametrize("averages", [True, False])
def test_mixed_precision(averages, monkeypatch):
    """bf16 images, fp32 weights, and no averages where a RevNet recomputes; all as in fp32 but for bf16's digits."""
    monkeypatch.setattr(parallel, "all_gather", lambda x: x[None])
    norm, x, dy = example((64, 5, 4, 3), True)
    norm, x, dy = norm.float(), x.detach().float(), dy.float()
    norm.track_running_stats = averages
    expected = passes(norm, x.clone().requires_grad_(), dy)
    norm.zero_grad()
    norm.reset_running_stats()
    found = passes(synchronized(norm), x.bfloat16().requires_grad_(), dy.bfloat16())
    assert found[0].dtype == found[1].dtype == torch.bfloat16 and found[2].dtype == torch.float32
    for ours, theirs in zip(found[:4], expected, strict=False):
        assert (ours.float() - theirs).norm() < 0.03 * theirs.norm()
    assert norm.num_batches_tracked == averages


def test_no_gradient_for_an_input_that_wants_none(monkeypatch):
    monkeypatch.setattr(parallel, "all_gather", lambda x: x[None])
    norm, x, dy = example(SHAPES[0], True)
    expected = passes(norm, x, dy)[2:4]
    norm.zero_grad()
    assert all(map(torch.allclose, passes(synchronized(norm), x.detach(), dy)[2:4], expected))


def test_batchnorms_of_a_gpu_are_synchronized_and_no_others():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), moco.SplitBatchNorm(4, 2), nn.Flatten(), nn.BatchNorm1d(4)
    )
    names = [type(m) for m in net]
    parallel.sync_batch_norm(net)
    assert [type(m) for m in net] == names  # on a CPU
    with pretend.pretended(8):
        parallel.sync_batch_norm(net.to("cuda"))
        assert [type(m) for m in net] == [*names[:1], parallel.SyncBatchNorm, *names[2:4], parallel.SyncBatchNorm]
        x = torch.randn(4, 3, 1, 1, device="cuda")
        assert torch.isfinite(net(x).cpu()).all() and net[1].num_batches_tracked.cpu() == 1
        net.eval()
        net(x)
        assert net[1].num_batches_tracked.cpu() == 1


def machine(rank, port, folder):
    """One of four processes on two machines, which share `folder` or have one each."""
    os.environ["LOCAL_RANK"] = str(rank % 2)
    join(rank, port, 4)
    for name, own in (("shared", ""), ("each", rank // 2)):
        file = folder / f"{name}{own}"

        def make(file=file):
            if not file.exists():
                with open(f"{file}.log", "a") as f:
                    f.write(f"{rank} ")
                file.write_text("made")
            return file.read_text()

        assert common.in_turn(make) == "made"
    torch.distributed.destroy_process_group()


def test_a_file_is_made_once_on_each_disk(tmp_path):
    mp.start_processes(machine, (random.randint(20000, 40000), tmp_path), 4, start_method="forkserver")
    made = {path.name: path.read_text() for path in tmp_path.glob("*.log")}
    assert made == {"shared.log": "0 ", "each0.log": "0 ", "each1.log": "2 "}
