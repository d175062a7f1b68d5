"""A linear probe at every depth."""

import json
import math

import pytest
import torch
from helpers import Maps, colors, command, write_images
from torch import nn

import checkpoints
import data
import evaluate
from analysis import depth

CPU = torch.device("cpu")
SEEN = {"mean": data.HALF, "std": data.HALF, "size": 12, "interpolation": "bilinear"}


def by_hand(net, name, most, train, test):
    """The linear probe of one layer alone."""
    features = []
    for s in (train, test):
        with torch.no_grad():
            taps = net.taps(data.normalize(s.images / 255, data.HALF, data.HALF))
            features.append(checkpoints.shrink(taps[name], most))
    (x, tx), y, ty = (f.flatten(1) for f in features), train.labels, test.labels
    return evaluate.linear_sgd(x, y, tx, ty, decays=(0.0,))


@pytest.mark.parametrize("useful", ["block1", "pre_logits"])
def test_the_layer_that_tells_the_class_is_found(useful):
    train, test, net, seen = colors(size=12), colors(60, seed=1, size=12), Maps(useful), SEEN
    results = depth.depth(net, train, test, seen, CPU, most=100)
    assert list(results) == ["root", "block1", "pre_logits"] and results["pre_logits"]["shape"] == [4]
    assert max(results, key=lambda name: results[name]["top1"]) == useful and results[useful]["top1"] > 95
    for name, r in results.items():
        alone = by_hand(net, name, 100, train, test)
        assert r["features"] == math.prod(r["shape"]) <= 100
        assert r["grid"] == pytest.approx(alone["grid"]) and r["top1"] == pytest.approx(alone["top1"])


def test_a_backbone_without_layers_by_name_is_refused(refused):
    plain = nn.Linear(2, 2)
    plain.dim = 2
    assert "taps" in refused(lambda: depth.depth(plain, colors(size=12), colors(60, size=12), SEEN, CPU))


# ============ the command ============


def test_command_probes_every_layer(patches_run, monkeypatch, capsys):
    command(monkeypatch, "analysis.depth", patches_run, "--most-features", 60)
    out = capsys.readouterr().out
    assert "block1" in out and "best" in out
    found = json.loads((patches_run / "evaluate.json").read_text()).popitem()[1]["depth"]
    assert {"root", "block1", "pre_logits"} <= set(found) and found["block1"]["features"] <= 60
    assert found["pre_logits"]["shape"] == [128] and 0 <= found["block1"]["top1"] <= 100


def test_command_on_a_random_network(tmp_path, monkeypatch, capsys):
    folder = write_images(tmp_path / "images", 60, classes=3, size=24)
    command(monkeypatch, "analysis.depth", "random:resnet10_16", "--data", folder, "--size", 24, "--most-features", 40)
    assert "pre_logits" in capsys.readouterr().out


def test_bad_input_is_one_sentence(patches_run, monkeypatch, refused):
    monkeypatch.setattr(evaluate, "extract", lambda *_, **__: pytest.fail("nothing may be extracted before"))
    assert "at least 1" in refused("analysis.depth", patches_run, "--most-features", "0")
