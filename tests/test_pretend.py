"""Every command on a pretended GPU, alone and as one of eight ranks: nothing that CUDA refuses, no wait of the host
within a training step, and no more kernels than today."""

import importlib
import sys
from unittest import mock

import pytest
import torch
from helpers import METHODS, clusters, write_images
from pretend import Refused, pretended
from torch.nn.parallel import DistributedDataParallel

import evaluate
import logistic
import saliency
import sets

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")
# Kernels of a quiet step of a command, alone and, if there is a second number, as one of eight ranks. Lower a number
# when you make a step cheaper; raise one for a reason alone.
LAUNCHES = {
    "byol --optimizer lars": (799, 1125), "byol --amp": (846,), "byol --data images --recipe shapes": (670,),
    "simclr": (462, 562), "moco --queue 16": (524, 526), "moco --v 1 --queue 16": (516,),
    "swav --queue-length 16 --queue-epoch 0": (945, 1127), "sage --evaluator random:resnet10_16": (1074, 1470),
    "swav --optimizer sgd --freeze-epochs 0.6": (1027, 1205), "byol --arch revnet14_k1 --amp": (1057, 1545),
    "instdisc --loss softmax": (315,), "instdisc --negatives 8 --copy-paste 0.5 --masks exact": (319, 321),
    "pirl --negatives 8": (648, 650), "cmc --negatives 8": (482, 484),
    "cpc --v 1": (432, 434), "cpc --v 2": (537, 539), "pretext --task rotation": (268, 268),
    "pretext --task exemplar --copies 2": (487, 489), "pretext --task jigsaw --permutations 2": (207, 207),
    "pretext --task relative": (212, 212), "pretext --task colorization": (236, 236),
    "downstream.detect --head c4": (417, 508), "downstream.detect --head fpn": (648, 788),
    "downstream.segment": (129, 227), "downstream.linear": (157, 156),
    "downstream.linear --protocol swav --lr 0.3": (113,),
    "downstream.finetune --labels 100": (159,), "downstream.transfer --how frozen finetuned": (176,),
}  # fmt: skip
METHOD = "--data shapes --epochs 1 --eval-every 0 --log-every 1000 --workers 0 --no-amp --probes"
DENSE = "random:resnet10_16 --updates 2 --log-every 1000"
PROBE = "random:resnet10_16 --size 32 --batch-size 8 --workers 0 --no-amp"
FLAGS = dict.fromkeys(METHODS, METHOD) | dict.fromkeys(["downstream.detect", "downstream.segment"], DENSE) | {
    "downstream.linear": f"{PROBE} --data shapes --epochs 1 --log-every 1000",
    "downstream.finetune": f"{PROBE} --data shapes --epochs 1 --trunk-lr 0.1 --head-lr 0.1",
    "downstream.transfer": f"{PROBE} --sets shapes --updates 4 --lr 0.1 --weight-decay 0",
}  # fmt: skip
# In these files torchvision's detector reads numbers, draws samples and copies settings, also in training.
DETECTOR = ("detection/generalized_rcnn.py", "detection/rpn.py", "detection/roi_heads.py", "detection/transform.py",
            "detection/_utils.py", "ops/boxes.py", "ops/poolers.py")  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Few images, no pictures, few iterations; the current folder is for what commands write."""
    draw, minimize, mlp = sets.shapes.draw_shapes, logistic.minimize, evaluate.fit_mlp
    monkeypatch.setattr(sets.shapes, "draw_shapes", lambda n, *flags: draw(32, *flags))
    monkeypatch.setattr(logistic, "minimize", lambda problems, iterations, *more: minimize(problems, 4, *more))
    monkeypatch.setattr(evaluate, "fit_mlp", lambda x, y, classes, lrs, n, *more: mlp(x, y, classes, lrs, 0.1, *more))
    monkeypatch.setattr("downstream.annotated.SCENES", {"train": (16, 10), "test": (2, 11)})
    monkeypatch.setattr("runs.SummaryWriter", mock.MagicMock())
    monkeypatch.setattr("runs.write_picture", lambda *_: None)
    monkeypatch.setattr("memory.bytes_kept", lambda *_, **__: 0)  # test_memory.py
    monkeypatch.chdir(tmp_path)
    state = lambda: (torch.cuda.is_available(), torch.distributed.get_rank, DistributedDataParallel.__init__,
                     torch.backends.cudnn.benchmark, torch.get_rng_state().tolist())  # fmt: skip
    before = state()
    yield
    assert state() == before  # nothing is left of the pretended GPU


def check(steps, most, allowed=()):
    """No wait in any of the steps, (waits, launches), but in the files `allowed`, and at most so many kernels."""
    waits = {wait for waits, _ in steps for wait in waits if not wait.split(", ")[1].endswith(allowed)}
    count, lines = max((launches.total(), launches.most_common(20)) for _, launches in steps)
    assert not waits and count <= most, f"{count} kernels in a step, {lines}; waits {waits}"


@pytest.mark.parametrize(("command", "place"), [(c, i) for c, most in LAUNCHES.items() for i in range(len(most))])
def test_steps_of_commands(command, place, monkeypatch):
    most, world = LAUNCHES[command][place], (1, 8)[place]
    if "--data images" in command:
        write_images("images", 24)
    name = command.split()[0]
    if FLAGS[name] in (METHOD, DENSE):  # two updates
        images = 2 * max(4, world) if name in METHODS else world
        command += f" --batch-size {images} --limit {2 * images}"
    monkeypatch.setattr(sys, "argv", f"{name} {FLAGS[name]} {command[len(name) :]} --device cuda".split())
    with pretended(world) as seen:
        assert importlib.import_module(name).main() is None
    check(seen.steps[1:-1], most, DETECTOR if "detect" in command else ())


# A probe's fit: whose calls end a step (None: the optimizer's), kernels, files that may wait for the GPU.
FITS = {
    "linear": ((evaluate.optim, "cosine"), 12, (), lambda x, y: evaluate.fit_sgd(x, y, 10, [(1.0, 0.0)] * 3, 1, 8, 0)),
    "lbfgs": ((logistic.Problems, "loss"), 96, ("logistic.py",), lambda x, y: logistic.fit(x, y, 10, [0.1, 0.001])),
    "mlp": (None, 45, (), lambda x, y: evaluate.fit_mlp(x, y, 10, [1e-3, 1e-2], 0.1, 16, 8, 0)),
}


@pytest.mark.parametrize("probe", FITS)
def test_steps_of_probes(probe, monkeypatch):
    last, most, allowed, fit = FITS[probe]
    with pretended() as seen:
        x, y = (t.to("cuda") for t in clusters(32, 10))
        evaluate.run_probes((x, y), (x, y), ["knn", probe], say=str)
        if last:
            do = getattr(*last)
            monkeypatch.setattr(*last, lambda *args: (seen.end_step(), do(*args))[1])
        seen.restart()
        fit(x, y)
    check(seen.steps[1:-1], most, allowed)


@pytest.mark.parametrize("method", saliency.METHODS)
def test_saliency_never_waits(method):
    with pretended() as seen:
        maps = saliency.maps((images := sets.load("shapes").images[:4]).to("cuda", non_blocking=True), method)
        assert not seen.steps[0][0] and torch.allclose(maps.cpu(), saliency.maps(images, method), atol=1e-4)


def train(mistake):
    """The quiet steps of a loop with a mistake, which gets the images x [8, 4] and the loss."""
    with pretended() as seen:
        x, net = torch.randn(8, 4).to("cuda"), torch.nn.Linear(4, 4).to("cuda")
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for _ in range(3):
            loss = net(x).square().mean()
            mistake(x, loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return seen.steps[1:-1]


@pytest.mark.parametrize("mistake", [
    lambda x, loss: x + torch.ones(8, 4), lambda x, loss: torch.ones(8, 4) + x,
    lambda x, loss: torch.cat([x, torch.ones(8, 4)]), lambda x, loss: torch.ones(()).add_(loss.detach()),
    lambda x, loss: torch.ones(8)[(x[:, 0] > 0).long()], lambda x, loss: torch.ones(8)[x[:, 0] > 0],
    lambda x, loss: x.index_select(0, torch.tensor([1])), lambda x, loss: x.normal_(generator=torch.Generator()),
    lambda x, loss: torch.rand(3, device=x.device, generator=torch.Generator()),
    lambda x, loss: torch.nn.functional.cross_entropy(x, torch.zeros(8, dtype=torch.long)),
    lambda x, loss: loss.register_hook(lambda grad: grad * torch.ones(1)),
])  # fmt: skip
def test_what_cuda_refuses_is_refused(mistake):
    with pytest.raises(Refused):
        train(mistake)


@pytest.mark.parametrize("mistake", [
    lambda x, loss: loss.item(), lambda x, loss: float(loss.detach()), lambda x, loss: bool(loss > 0),
    lambda x, loss: x.cpu(), lambda x, loss: x.tolist(), lambda x, loss: torch.ones(8, 4).copy_(x),
    lambda x, loss: x.nonzero(), lambda x, loss: x[x > 0], lambda x, loss: x[torch.tensor([0, 1])],
    lambda x, loss: torch.ones(3).to("cuda"), lambda x, loss: torch.tensor([1.0], device=x.device),
    lambda x, loss: torch.cuda.synchronize(), lambda x, loss: loss.register_hook(lambda grad: grad * int(grad)),
])  # fmt: skip
def test_what_waits_in_a_step_is_found(mistake):
    with pytest.raises(AssertionError, match=r"tests/test_pretend\.py:"):
        check(train(mistake), 10**6)


def test_only_waits_are_found_and_every_kernel():
    fine = lambda x, loss: x[torch.ones(2).long().to("cuda", non_blocking=True)] * torch.tensor(2.0)
    most = 2 + train(lambda x, loss: None)[-1][1].total()
    check(train(fine), most)
    with pytest.raises(AssertionError, match="kernels in a step"):
        check(train(fine), most - 1)
