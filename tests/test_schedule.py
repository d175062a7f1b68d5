"""Late decays of the learning rate."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers import clusters, command, write_images
from torch import nn

import data
import evaluate
from analysis import schedule


def test_late_decays_equal_torchs_sgd():
    (x, y), (tx, ty) = clusters(100, spread=3.0), clusters(4000, spread=3.0, seed=1)
    curves = schedule.late_decays(x, y, tx, ty, (3, 1, 3), batch_size=32)
    assert list(curves) == [1, 3] and [len(c) for c in curves.values()] == [41, 43]
    assert schedule.late_decays(x, y, tx, ty, (3,), batch_size=32)[3] == curves[3]
    assert curves[1][0] == curves[3][0] and curves[1] != curves[3][:41]
    head = nn.Linear(16, 5)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1 * 32 / 256, momentum=0.9)
    scheduler, curve = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 23], 0.1), []
    for epoch in range(43):
        for rows in torch.randperm(100, generator=data.generator(0, "late decays", epoch))[:96].view(3, 32):
            optimizer.zero_grad()
            F.cross_entropy(head(x[rows]), y[rows]).backward()
            optimizer.step()
        scheduler.step()
        curve.append(100 * (head(tx).argmax(1) == ty).float().mean().item())
    assert curves[3] == pytest.approx(curve, abs=0.051)  # two images of 4000 with all but equal scores


# ============ the command ============


def test_command_writes_every_accuracy(patches_run, monkeypatch, capsys):
    command(monkeypatch, "analysis.schedule", patches_run, "--decay-at", 2, 5)
    assert "first decay at 5" in capsys.readouterr().out
    found = json.loads((patches_run / "evaluate.json").read_text()).popitem()[1]["schedule"]
    assert [len(found[d]["curve"]) for d in ("2", "5")] == [42, 45] and found["5"]["curve"][-1] == found["5"]["final"]
    assert found["2"]["curve"][:2] == found["5"]["curve"][:2]


def test_command_on_a_random_network(tmp_path, monkeypatch, capsys):
    flags = ("--data", write_images(tmp_path / "images", 60, classes=3, size=24), "--size", 24, "--decay-at", 1)
    command(monkeypatch, "analysis.schedule", "random:resnet10_16", *flags)
    assert "first decay at 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--decay-at", "0"], "--decay-at 0"),
        (["--data", "FLAT"], "too few labels"),
    ],
)
def test_bad_input_is_one_sentence(patches_run, tmp_path, monkeypatch, refused, args, words):
    flat = write_images(tmp_path / "flat", 12, classes=1) if "FLAT" in args else ""
    monkeypatch.setattr(evaluate, "extract", lambda *_, **__: pytest.fail("nothing may be extracted before"))
    assert words in refused("analysis.schedule", patches_run, *(flat if a == "FLAT" else a for a in args))
