"""Fixtures of several files; the functions that tests call are in helpers.py."""

import functools

import pytest
import torch
from helpers import command, put_back, small_backbone, write_images  # first: it puts the repository on the path

import backbones
import data
import runs
import sets


@pytest.fixture(autouse=True)
def alone():
    """No test leaves signals or the state of the random numbers to the next."""
    torch.manual_seed(0)
    yield
    put_back()


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images", 64)


@pytest.fixture(scope="module")
def twentieth_of_shapes():
    """500 training images and 100 test images, drawn once: the first of those that users get."""
    draw = sets.shapes.draw_shapes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sets.shapes, "draw_shapes", functools.cache(lambda n, *rest: draw(n // 20, *rest)))
        sets._load.cache_clear()
        yield
    sets._load.cache_clear()


@pytest.fixture
def few_shapes(monkeypatch):
    """Sets of 64 drawn images: 12,000 take seconds."""
    draw = sets.shapes.draw_shapes
    monkeypatch.setattr(sets.shapes, "draw_shapes", lambda n, *flags: draw(64, *flags))
    sets._load.cache_clear()
    yield
    sets._load.cache_clear()


@pytest.fixture
def refused(monkeypatch, capsys):
    """The call, or the command of a module and its words, ends with exit code 2 and one sentence; returns that."""

    def check(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            args[0]() if callable(args[0]) else command(monkeypatch, *args)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and len(err.splitlines()) == 1, err
        return err

    return check


@pytest.fixture
def tiny_run(tmp_path):
    """A run folder with a random backbone, and 60 images that it was "trained" on."""
    folder, out = write_images(tmp_path / "images", 60, classes=3, size=16), tmp_path / "run"
    out.mkdir()
    preprocess = {"mean": data.MEAN, "std": data.STD, "size": 16, "interpolation": "bilinear"}
    about = {"method": "byol", "data": str(folder), "epoch": 0, "arch": "resnet10_16", "preprocess": preprocess}
    runs.write(out / "backbone.pt", about | {"state_dict": small_backbone().state_dict()})
    return out


@pytest.fixture(scope="module")
def patches_run(tmp_path_factory):
    """A run folder with a random network that sees patches, and 120 images that it was "trained" on."""
    out = tmp_path_factory.mktemp("probes") / "run"
    folder = write_images(out.parent / "images", 120, classes=3, size=24)
    out.mkdir()
    torch.manual_seed(0)
    seen = {"mean": data.HALF, "std": data.HALF, "size": 24, "interpolation": "bilinear"}
    sees = {"patch": 8, "cell": 8, "standardize": False}
    about = {"method": "pretext", "data": str(folder), "epoch": 0, "arch": "resnet10_16", "built_for": 8}
    state = backbones.build("resnet10_16", 8).state_dict()
    runs.write(out / "backbone.pt", about | {"preprocess": seen | {"sees": sees}, "state_dict": state})
    return out
