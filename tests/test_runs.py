"""What every script's `main` does, compared with the loop of its paper written out here, in one process and in two;
what a run leaves; runs that are stopped and killed and go on."""

import argparse
import contextlib
import datetime
import functools
import importlib
import io
import itertools
import json
import math
import os
import random
import signal
import time
import traceback
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from helpers import METHODS, equal, fork, in_process, run, start
from torch.optim.optimizer import register_optimizer_step_post_hook
from torchvision.io import write_png

import backbones
import common
import data
import loop
import optim
import runs
import sets
import shapes
import training

STEPS, PASSES, BATCH = 3, 2, 16  # updates an epoch, passes an update, images an update
N = STEPS * BATCH
COMMON = ["--in-memory", "--recipe", "shapes", "--arch", "resnet10_16", "--size", 16, "--batch-size", BATCH]
COMMON += ["--accumulate", PASSES, "--warmup-epochs", 0.34, "--optimizer", "sgd", "--lr", 1.6, "--weight-decay", 0.01]
COMMON += ["--eval-every", 0, "--log-every", 1, "--workers", 0, "--device", "cpu", "--no-amp", "--probes", "knn"]
OWN = {  # numbers unlike the defaults, so that a flag that is ignored shows
    "byol": ["--tau", 0.7, "--predictor-lr", 3, "--hidden", 32, "--dim", 16],
    "cmc": ["--contrast", "nce", "--split", "lab3", "--graph", "full", "--negatives", 8, "--bank-momentum", 0.3,
            "--dim", 16, "--drop-at", 0.4, 0.8],
    "cpc": ["--arch", "resnet10_16_ln", "--patch", 4, "--stride", 3, "--steps", 2, "--context-width", 16,
            "--clip", 0.25],
    "instdisc": ["--loss", "nce", "--negatives", 8, "--bank-momentum", 0.3, "--dim", 16, "--schedule", "steps",
                 "--copy-paste", 0.5, "--masks", "gs"],
    "moco": ["--momentum", 0.7, "--queue", 32, "--dim", 16, "--bn-splits", 2],
    "pirl": ["--size", 32, "--negatives", 8, "--bank-momentum", 0.3, "--dim", 16, "--lambda", 0.3],
    "pretext": ["--size", 32, "--task", "jigsaw", "--permutations", 20, "--embedding", 16, "--head", 32],
    "sage": ["--evaluator-epochs", 1, "--tau", 0.7, "--predictor-lr", 3, "--hidden", 32, "--dim", 16,
             "--bottleneck", 16, "--width", 32, "--decoder-lr", 0.1],
    "simclr": ["--hidden", 32, "--dim", 16, "--scaling", "sqrt", "--optimizer", "lars", "--lr", 2],
    "swav": ["--small-size", 8, "--prototypes", 20, "--hidden", 32, "--dim", 16, "--queue-length", 32,
             "--queue-epoch", 0.67, "--freeze-epochs", 0.34, "--optimizer", "lars", "--lr", 80],
}  # fmt: skip


def flags(method, pictures, out, epochs=2):
    words = ["--data", pictures, *COMMON, *OWN[method], "--epochs", epochs, "--root", out.parent / "root", "--out", out]
    return [str(word) for word in words]


def write_pictures(folder):
    """48 training images and 16 test images of 32 px, in two classes."""
    images, _, _ = shapes.draw_shapes(N + 16)
    for i, image in enumerate(images):
        path = folder / ("train" if i < N else "test") / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(image, str(path))
    return folder


# ============ the loops ============
# In the order of the papers and of the authors' codes: for each update the rates, `before`, the passes, each of whose
# losses is divided by their number, the step, `after`.


def half_cosine(share):
    """From 1 to 0."""
    return (1 + math.cos(math.pi * share)) / 2


def groups(module, factor=1.0):
    """Weights with decay (and LARS); biases and the parameters of BatchNorm without."""
    params = [p for p in module.parameters() if p.requires_grad]
    weights, rest = [p for p in params if p.ndim > 1], [p for p in params if p.ndim < 2]
    decayed = {"params": weights, "weight_decay": 0.01, "adapt": True, "factor": factor}
    return [decayed, {"params": rest, "weight_decay": 0.0, "adapt": False, "factor": factor}]


def one_group(model):
    """All with decay."""
    return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": 0.01, "factor": 1.0}]


def everyone(x, dim=0):
    """The rows of all processes, in the order of their ranks."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim)


class Loop:
    """BYOL's, SimCLR's, ... The model and its views are the script's own; when what happens is written here."""

    end = 0.0  # what is left of the learning rate after the last update, as a share

    def __init__(self, script, args, train, rank, world):
        self.script, self.args, self.train, self.rank, self.world = script, args, train, rank, world
        self.n, self.total = BATCH // PASSES // world, args.epochs * STEPS
        self.views = [data.view(**{"size": args.size, **v}) for v in script.RECIPES["shapes"]["views"]]
        self.lr = args.lr * BATCH / 256
        self.prepare()
        torch.manual_seed(args.seed)
        self.model = self.build(backbones.build(args.arch, args.size)).to(memory_format=torch.channels_last)

    def prepare(self):
        pass

    def optimizers(self):
        return [torch.optim.SGD(self.groups(), lr=1.0, momentum=0.9)]

    def groups(self):
        return groups(self.model)

    def schedule(self, step, share):
        return self.end + (1 - self.end) * half_cosine(share)

    def before(self, step):
        pass

    def loss(self, index, xs, step, micro):
        return self.model(xs)

    def clip(self):
        pass

    def after(self, step):
        pass

    def seen(self, *dims):
        """What the passes of an update left: each of its kinds, of all passes and then of all processes."""
        kinds = [torch.cat(parts, d) for parts, d in zip(zip(*self.model.seen, strict=True), dims, strict=True)]
        self.model.seen.clear()
        return [everyone(kind, d) for kind, d in zip(kinds, dims, strict=True)]

    def inputs(self):
        return self.train, data.augment

    def run(self, optimizers):
        train, augment = self.inputs()
        loader = data.Loader(train, self.views, self.n, self.args.seed, self.rank, self.world, 0, "cpu", augment)
        self.losses = torch.zeros(self.total)
        for step in range(self.total):
            if step % STEPS == 0:
                batches = loader.epoch(step // STEPS)
            rate = self.schedule(step, (step - 1) / (self.total - 1)) if step else 0.0  # one update of warm-up
            for group in optimizers[0].param_groups:
                group["lr"] = self.lr * rate * group["factor"]
            self.before(step)
            for micro in range(1, PASSES + 1):
                loss = self.loss(*next(batches), step, micro) / PASSES
                loss.backward()
                self.losses[step] += loss.detach()
            for p in self.model.parameters():
                if p.grad is not None and self.world > 1:
                    dist.all_reduce(p.grad)
                    p.grad /= self.world
            self.clip()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                self.after(step)


class BYOL(Loop):
    def build(self, f):
        return self.script.BYOL(f, self.args.hidden, self.args.dim)

    def groups(self):
        return [*groups(torch.nn.ModuleList([self.model.f, self.model.g])), *groups(self.model.q, factor=3.0)]

    def after(self, step):  # with the new weights; tau rises from 0.7 to 1
        online = [*self.model.f.parameters(), *self.model.g.parameters()]
        for xi, theta in zip(self.model.target.parameters(), online, strict=True):
            xi.lerp_(theta, 0.3 * half_cosine(step / self.total))


class SaGe(BYOL):
    def prepare(self):
        stage_1 = Path(self.args.out).parent / f"byol-{Path(self.args.data).name}-1"
        self.h, _ = self.script.open_evaluator(self.args, str(stage_1))

    def build(self, f):
        a = self.args
        painter = self.script.build_decoder(f, a.size, a.bottleneck, a.width, a.pool)
        weights = {k: getattr(a, f"weight_{k}") for k in ("d", "pixel", "maps", "semantic")}
        return self.script.SaGe(f, a.hidden, a.dim, weights, *painter, evaluator=self.h)

    def optimizers(self):
        painter = [*self.model.bottleneck.parameters(), *self.model.decoder.parameters()]
        self.adam = torch.optim.Adam(painter, lr=0.1 * BATCH / 256)
        return [*super().optimizers(), self.adam]

    def before(self, step):  # constant but for the warm-up
        self.adam.param_groups[0]["lr"] = 0.1 * BATCH / 256 * min(step, 1)


class SimCLR(Loop):
    def build(self, f):
        self.lr, a = self.args.lr * BATCH**0.5, self.args
        return self.script.SimCLR(f, a.hidden, a.dim, a.layers, a.temperature)

    def optimizers(self):
        return [optim.LARS(self.groups(), inside=True)]


class MoCo(Loop):
    def build(self, f):
        a = self.args
        return self.script.MoCo(f, a.queue, a.dim, a.temperature, a.mlp, a.bn_splits)

    def groups(self):
        return one_group(self.model)

    def schedule(self, step, share):  # between epochs
        return half_cosine(step // STEPS / self.args.epochs)

    def before(self, step):  # with the weights of the last update
        with torch.no_grad():
            theta_q = [*self.model.f.parameters(), *self.model.g.parameters()]
            for theta_k, theta in zip(self.model.key.parameters(), theta_q, strict=True):
                theta_k.lerp_(theta, 0.3)

    def loss(self, index, xs, step, micro):  # each pass shuffles the keys anew
        return self.model(xs, (self.args.seed, step, micro))

    def after(self, step):
        keys, start = torch.cat(self.model.seen), BATCH * step % 32
        self.model.seen.clear()
        self.model.queue[start : start + BATCH] = keys
        self.model.pointer.fill_((start + BATCH) % 32)


class SwAV(Loop):
    end = 1e-3

    def prepare(self):
        self.views[2:] = [self.views[2] | {"size": 8}] * 2

    def build(self, f):
        a = self.args
        return self.script.SwAV(f, a.prototypes, a.hidden, a.dim, a.temperature, a.epsilon, a.queue_length)

    def optimizers(self):
        return [self.script.LARC(one_group(self.model))]

    def loss(self, index, xs, step, micro):
        self.frozen = step < 1
        return self.model(xs, step >= 2)

    def clip(self):
        if self.frozen:  # neither momentum nor decay
            self.model.C.weight.grad = None

    def after(self, step):  # the newest in front
        z = everyone(torch.cat(self.model.seen, 1), 1)
        self.model.seen.clear()
        self.model.queue.copy_(torch.cat([z, self.model.queue], 1)[:, :32])


class InstDisc(Loop):
    def inputs(self):
        return self.script.prepare(self.args, self.train, torch.device("cpu"), print)

    def build(self, f):
        a = self.args
        return self.script.InstDisc(f, N, a.dim, a.temperature, a.loss, a.bank_momentum)

    def schedule(self, step, share):
        return 0.1 ** ((step >= 0.6 * self.total) + (step >= 0.8 * self.total))

    def negatives(self, step):  # one set an update
        return torch.randint(N, (8,), generator=data.generator(self.args.seed, "negatives", step))

    def loss(self, index, xs, step, micro):  # Z is that of the first pass
        return self.model(xs, index, self.negatives(step), first=(step, micro) == (0, 1))

    def after(self, step):  # after the step, of all passes and processes
        index, v = self.seen(0, 0)
        self.model.bank[index] = F.normalize(torch.lerp(v, self.model.bank[index], 0.3), dim=1)


class CMC(InstDisc):
    inputs = Loop.inputs

    def prepare(self):
        self.args.arch = "resnet10_16_lab3"

    def build(self, f):
        a = self.args
        return self.script.CMC(f, N, a.dim, a.temperature, a.contrast, a.bank_momentum, a.graph)

    def schedule(self, step, share):
        return 0.1 ** ((step >= 0.4 * self.total) + (step >= 0.8 * self.total))

    def after(self, step):
        index, z = self.seen(0, 1)
        self.model.bank[:, index] = F.normalize(torch.lerp(z, self.model.bank[:, index], 0.3), dim=2)


class PIRL(InstDisc):
    end = 1e-3

    def prepare(self):
        image, crop = self.script.RECIPES["shapes"]["views"]
        self.views = [data.view(32, **image), data.view(36, **crop) | self.script.NO_COLOR]

    def build(self, f):
        a, g = self.args, self.script.Jigsaw(f.dim, self.args.dim, 32)
        return self.script.PIRL(f, g, N, a.dim, a.temperature, a.lam, a.bank_momentum, a.nce)

    inputs, schedule = Loop.inputs, Loop.schedule

    def loss(self, index, xs, step, micro):
        key = step, micro
        numbers = self.model.head_g.draw(self.world * self.n, data.generator(self.args.seed, "jigsaw", *key))
        parts = self.model.head_g.transform(xs[1], *(t.chunk(self.world)[self.rank] for t in numbers))
        colors = data.generator(self.args.seed, "colours", *key, self.rank)
        parts = data.augment(parts.flatten(0, 1), self.views[0], colors).unflatten(0, (self.n, 9))
        return self.model(xs[:1], parts, index, self.negatives(step))


class CPC(Loop):
    def prepare(self):
        self.args.arch, self.size = "resnet10_16_ln", self.args.patch

    def build(self, f):
        torch.manual_seed(self.args.seed)
        return self.script.CPC(backbones.build(self.args.arch, self.args.patch), self.args)

    def loss(self, index, xs, step, micro):  # patches are changed by numbers of the pass
        return self.model(xs, (self.args.seed, step, micro))

    def clip(self):
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.stack([g.norm() for g in grads]).norm()  # below 0.25 from the third update on
        for g in grads:
            g *= min(1, 0.25 / (norm + 1e-6))


class Pretext(Loop):
    def prepare(self):
        self.views = self.script.views_of(self.args)

    def build(self, f):
        torch.manual_seed(self.args.seed)
        f = backbones.build(self.script.trunk_name(self.args), 8)
        return self.script.Pretext(f, self.script.Jigsaw(f, self.args))

    def loss(self, index, xs, step, micro):
        seed, whole = self.args.seed, self.world * self.n
        numbers = self.model.task.draw(whole, data.generator(seed, "jigsaw", step, micro))
        numbers = [t.chunk(self.world)[self.rank] if len(t) == whole else t for t in numbers]
        torch.manual_seed(data.generator(seed, "dropout", step, micro, self.rank).initial_seed())
        return self.model(xs, *numbers)


LOOPS = {"byol": BYOL, "cmc": CMC, "cpc": CPC, "instdisc": InstDisc, "moco": MoCo, "pirl": PIRL, "pretext": Pretext,
         "sage": SaGe, "simclr": SimCLR, "swav": SwAV}  # fmt: skip


def difference(method, out, argv, rank=0, world=1):
    """The largest difference between a run and the loop written out, of the losses in its metrics and, in its
    checkpoint, of weights, buffers, queues, banks and momenta."""
    script, found = importlib.import_module(method), runs.load(out / "checkpoint.pt")
    args = script.parse_args(argv)
    loop = LOOPS[method](script, args, sets.load(args.data, memory=True), rank, world)
    optimizers = loop.optimizers()
    loop.run(optimizers)
    states = {"model": loop.model.state_dict()}
    states |= {k: o.state_dict()["state"] for k, o in zip(("optimizer", "decoder_optimizer"), optimizers, strict=False)}
    assert found["step"] == loop.total
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    logged = torch.tensor([line["loss"] for line in lines if "loss" in line])

    def compare(a, b):
        if isinstance(b, dict):
            assert a.keys() == b.keys()
            return max(compare(a[k], b[k]) for k in b)
        return ((a.double() - b.double()).abs() / (1 + b.double().abs())).nan_to_num(math.inf).max().item()

    pairs = [(found["model"], states.pop("model")), (logged, loop.losses)]
    pairs += [(found[k]["state"], b) for k, b in states.items()]
    return max(itertools.starmap(compare, pairs))


def weights(out):
    found = runs.load(out / "checkpoint.pt")
    return {k: found[k] for k in ("step", "model")} | {k: found[k]["state"] for k in found if "optimizer" in k}


# ============ runs ============


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def main(method, argv, at=0, happens=lambda optimizer: os.kill(os.getpid(), signal.SIGTERM), code=None):
    """What the script's main prints; it must return `code`. In update `at` something happens, by default a signal."""
    updates, kinds = itertools.count(1), (torch.optim.SGD, optim.LARS)  # no Adam: an update is counted once
    hook = register_optimizer_step_post_hook(
        lambda optimizer, *_: happens(optimizer) if isinstance(optimizer, kinds) and next(updates) == at else None
    )
    try:
        with in_process(), contextlib.redirect_stdout(io.StringIO()) as printed:
            assert importlib.import_module(method).main(argv) == code
    finally:
        hook.remove()
    return printed.getvalue()


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    """(run folder, what was printed) of a method, which is run once."""
    folder = tmp_path_factory.mktemp("finished")
    return functools.cache(lambda method: (folder / method, main(method, flags(method, pictures, folder / method))))


@pytest.mark.parametrize("method", METHODS)
def test_main_is_the_loop_of_its_paper(method, finished, pictures):
    out, _ = finished(method)
    with in_process():
        assert difference(method, out, flags(method, pictures, out)) < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_a_run_writes_what_it_promises(method, finished, pictures):
    out, printed = finished(method)
    files = {"checkpoint.pt", "checkpoint.prev.pt", "backbone.pt", "metrics.jsonl", "evaluate.json", "views.png"}
    assert files <= set(os.listdir(out)) and any(name.startswith("events.out") for name in os.listdir(out))
    *_, one, two, images, last = printed.splitlines()
    assert images.startswith("# RGB images, ")
    assert last.startswith(method) and f" {pictures}: knn " in last and f"({out})" in last
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    made = [line for line in lines if "loss" in line]
    assert [line["step"] for line in made] == list(range(1, 7)) and made[0]["lr"] == 0
    assert {"epoch", "images_per_second", "data_wait", "memory_mb"} <= set(made[0])
    assert not any(line["data_wait"] for line in made) and "loader: about" not in printed  # in memory
    assert "knn20" in lines[0] and lines[0]["step"] == 0  # the random network
    for file in out.glob("*.pt"):
        torch.load(file, weights_only=True)
    about = torch.load(out / "backbone.pt", weights_only=True)
    assert {"arch", "state_dict", "preprocess", "method", "data", "command"} <= set(about) and about["epoch"] == 2
    exec(f"{one}\n{two}", scope := {})
    assert equal(dict(scope["net"].state_dict()), about["state_dict"])
    views = importlib.import_module(method).RECIPES["shapes"]["views"]
    assert method == "cpc" or about["preprocess"]["mean"] == data.view(**{"size": 1, **views[0]})["mean"]
    trained = {k[2:]: v for k, v in runs.load(out / "checkpoint.pt")["model"].items() if k.startswith("f.")}
    assert equal(trained, about["state_dict"])
    before = (out / "checkpoint.pt").read_bytes()
    again = main(method, flags(method, pictures, out))
    assert "is finished" in again and again.splitlines()[-1] == last and (out / "checkpoint.pt").read_bytes() == before


def test_data_wait_is_the_loaders_in_the_steps_of_a_line(tmp_path, monkeypatch):
    """Steps of one second; every other one waits for half of it. A line every third step and at the end of an epoch."""
    clock = types.SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(runs, "time", clock)
    images = sets.Images("x", torch.zeros(4, 3, 2, 2, dtype=torch.uint8))
    loader = types.SimpleNamespace(data=images, rank=0, world=1, steps=4, waited=7.0, epoch=lambda *_: None)
    args = argparse.Namespace(out=tmp_path, epochs=2, batch_size=1, log_every=3, amp=False, dry_run=False, fresh=False,
                              changed_data=False)  # fmt: skip
    made = loop.Loop("toy", args, {"model": torch.nn.Linear(1, 1)}, loader)
    assert made.begin()
    while made.is_training():
        for step in made.epoch():
            clock.now, loader.waited = clock.now + 1, loader.waited + step % 2 / 2
            made.end_step(0.1)
        clock.now, loader.waited = clock.now + 9, loader.waited + 9  # a probe, say
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], round(line["data_wait"], 3)) for line in lines] == [
        (3, round(0.5 / 3, 3)), (4, 0.5), (6, 0.25), (8, 0.25),
    ]  # fmt: skip


def test_tensorboard_has_scalars_text_views_and_projector(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished("byol")[0]))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/feature_std", "eval/knn20", "eval/final_knn"} <= set(tags["scalars"])
    assert tags["images"] == ["views"] and "recipe/text_summary" in tags["tensors"]
    assert (finished("byol")[0] / "projector_config.pbtxt").exists()


def test_other_settings_are_refused(finished, pictures):
    _, err = run("byol.py", *flags("byol", pictures, finished("byol")[0]), "--lr", "0.123", code=2)
    assert "lr 1.6 -> 0.123" in err and "--fresh" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("update", "words"), [(4, "loss is not finite at step 5"), (6, "network is not finite at step 6")]
)
def test_what_is_not_finite_stops_the_run_and_the_last_good_checkpoint_stays(
    update, words, pictures, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "SAVE_AFTER", -1)
    spoil = lambda optimizer: optimizer.param_groups[0]["params"][0].data.fill_(math.nan)
    with pytest.raises(SystemExit) as stopped:
        main("byol", flags("byol", pictures, tmp_path / "byol"), update, spoil)
    assert words in stopped.value.code and "lower --lr" in stopped.value.code
    assert "--no-amp" not in stopped.value.code  # it is fp32
    kept = runs.load(tmp_path / "byol" / "checkpoint.pt")
    assert kept["step"] == 3 and all(v.isfinite().all() for v in kept["model"].values())
    with pytest.raises(SystemExit) as stopped:
        runs.stop_unless_finite(False, "loss", 5, 0.1, amp=True)
    assert "try --no-amp" in stopped.value.code


@pytest.mark.parametrize(("after", "every", "saved"), [
    (60, 0, [0, 6, 6]), (2.5, 0, [0, 9, 18, 18]), (60, 2, [0, 6, 12, 18, 18]), (-1, 0, [0, 3, 6, 6]),
])  # fmt: skip
def test_checkpoints_are_a_minute_or_an_epoch_apart(after, every, saved, pictures, tmp_path, monkeypatch):
    """An epoch of three updates takes a second, by the clock of rank 0."""
    steps, written = [], runs.save
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: len(epochs)))
    epochs, epoch = [], training.Run.epoch
    monkeypatch.setattr(training.Run, "epoch", lambda run: (epochs.append(run), epoch(run))[1])
    monkeypatch.setattr(loop, "SAVE_AFTER", after)
    monkeypatch.setattr(runs, "save", lambda out, content: (steps.append(content["step"]), written(out, content)))
    main("byol", [*flags("byol", pictures, tmp_path), "--epochs", str(saved[-1] // 3), "--eval-every", str(every)])
    assert steps == saved and torch.load(tmp_path / "backbone.pt")["epoch"] == saved[-1] // 3


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_stopped_in_an_epoch_goes_on_exactly(method, finished, pictures, tmp_path):
    argv = flags(method, pictures, tmp_path / method)
    assert "stopped by a signal at step 4" in main(method, argv, at=4, code=common.STOPPED)
    assert runs.load(tmp_path / method / "checkpoint.pt")["step"] == 4
    assert "going on from step 4 of 6" in main(method, argv)
    assert equal(weights(tmp_path / method), weights(finished(method)[0]))


@pytest.mark.parametrize("method", ["byol", "instdisc", "moco", "sage"])  # which keep different things
def test_a_run_that_is_killed_goes_on_exactly(method, finished, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_AFTER", -1)  # after each epoch
    out, chance = tmp_path / method, random.Random(method)
    command, log = [f"{method}.py", *flags(method, pictures, out)], out / "metrics.jsonl"
    process, lines = fork(*command), chance.randrange(1, 7)
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= lines):
        time.sleep(0.002)
    time.sleep(chance.uniform(0, 0.05))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    run(*command)
    assert equal(weights(out), weights(finished(method)[0]))


# ============ two processes ============


def half(rank, port, pictures, out):
    """All methods, one after the other: a run of three updates that a signal to one of two processes stops after the
    second and that goes on; OUT/METHOD.json says how far it is from the loop written out."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=300))
    for method in METHODS:
        argv, found = flags(method, pictures, out / method, epochs=1), {}
        try:
            found["first"], found["second"] = main(method, argv, at=2 * rank, code=common.STOPPED), main(method, argv)
            with in_process():
                found["difference"] = difference(method, out / method, argv, rank, 2)
        except BaseException:
            found["error"] = traceback.format_exc()
            raise
        finally:
            (out / f"{method}{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def pair(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("pair")
    with contextlib.suppress(mp.ProcessRaisedException, mp.ProcessExitedException):  # each method's test has its own
        mp.start_processes(half, (random.randint(20000, 40000), pictures, out), 2, start_method="forkserver")
    return out


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_are_the_loop_with_gradients_of_both(method, pair):
    one, two = (json.loads((pair / f"{method}{rank}.json").read_text()) for rank in range(2))
    assert "error" not in one and "error" not in two, one.get("error", "") + two.get("error", "")
    assert "= 2 cpu x 2 x 4" in one["first"] and "stopped by a signal at step 2" in one["first"]
    assert "going on from step 2 of 3" in one["second"] and not two["second"]
    assert one["difference"] < 1e-4


def test_torchrun_stops_its_processes_and_they_go_on_exactly(pair, pictures, tmp_path):
    command = ["byol.py", *flags("byol", pictures, tmp_path / "byol", epochs=1)]
    process, log = start(*command, processes=2), tmp_path / "byol" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and '"step": 1,' in log.read_text()):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    printed, err = process.communicate(timeout=120)
    assert "stopped by a signal" in printed and runs.load(tmp_path / "byol" / "checkpoint.pt")["step"] < 3, err
    run(*command, processes=2)
    assert equal(weights(tmp_path / "byol"), weights(pair / "byol"))
