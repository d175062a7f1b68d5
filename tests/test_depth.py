"""A linear probe at every depth."""

import json
import math

import pytest
import torch
from helpers import Maps, colours, command, write_images
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
            features.append(checkpoints.shrink(net.taps(data.normalise(s.images / 255, data.HALF, data.HALF))[name], most))
    (x, tx), y, ty = (f.flatten(1) for f in features), train.labels, test.labels
    return evaluate.linear_sgd(x, y, tx, ty, decays=(0.0,))


@pytest.mark.parametrize("useful", ["block1", "pre_logits"])
def test_the_layer_that_tells_the_class_is_found(useful):
    train, test, net, seen = colours(size=12), colours(60, seed=1, size=12), Maps(useful), SEEN
    depths = depth.Depths(net, [], 12, most=100)
    assert list(depths.shapes) == ["root", "block1", "pre_logits"] and depths.shapes["pre_logits"] == (4,)
    results = depth.depth(depths, train, test, seen, CPU)
    assert max(results, key=lambda name: results[name]["top1"]) == useful and results[useful]["top1"] > 95
    for name, r in results.items():
        alone = by_hand(net, name, 100, train, test)
        assert r["features"] == math.prod(r["shape"]) <= 100
        assert r["grid"] == pytest.approx(alone["grid"]) and r["top1"] == pytest.approx(alone["top1"])


def test_only_layers_that_exist_and_were_asked_for(refused):
    depths = depth.Depths(Maps(), ["pre_logits", "root"], 12)
    assert list(depths.shapes) == ["root", "pre_logits"]  # in order of depth
    assert depths(torch.rand(2, 3, 12, 12)).shape == (2, 5 * 144 + 4)
    err = refused(lambda: depth.Depths(Maps(), ["blok1"], 12))
    assert "'block1'" in err and "root, block1, pre_logits" in err
    plain = nn.Linear(2, 2)
    plain.dim = 2
    assert "taps" in refused(lambda: depth.Depths(plain, [], 12))


# ============ the command ============


def test_command_keeps_the_layers_of_other_calls(patches_run, monkeypatch, capsys):
    for layer in ("pre_logits", "block1"):
        command(monkeypatch, "analysis.depth", patches_run, "--layers", layer, "--most-features", 60)
    out = capsys.readouterr().out
    assert "block1" in out and "best" in out
    found = json.loads((patches_run / "evaluate.json").read_text()).popitem()[1]["depth"]
    assert set(found) == {"pre_logits", "block1"} and found["block1"]["features"] <= 60  # of two calls
    assert found["pre_logits"]["shape"] == [128] and 0 <= found["block1"]["top1"] <= 100


def test_command_on_a_random_network(tmp_path, monkeypatch, capsys):
    folder = write_images(tmp_path / "images", 60, classes=3, size=24)
    command(monkeypatch, "analysis.depth", "random:resnet10_16", "--data", folder, "--size", 24, "--most-features", 40)
    assert "pre_logits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--layers", "block9"], "network has root, block1"),
        (["--most-features", "0"], "at least 1"),
    ],
)
def test_bad_input_is_one_sentence(patches_run, monkeypatch, refused, args, words):
    monkeypatch.setattr(evaluate, "extract", lambda *_, **__: pytest.fail("nothing may be extracted before"))
    assert words in refused("analysis.depth", patches_run, *args)
