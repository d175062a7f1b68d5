"""Detection on drawn scenes: the detector's parts, its data, and runs that are stopped and go on."""

import contextlib
import io

import pytest
import torch
import torchvision
from helpers import equal, fork
from torch import nn

import backbones
import common
import data
import runs
import shapes
from downstream import detect

SMALL = ["--limit", "24", "--updates", "4", "--batch-size", "4", "--device", "cpu"]


@pytest.fixture(autouse=True)
def few_test_scenes(monkeypatch):
    monkeypatch.setattr(detect, "TEST_SCENES", 8)


def run(*flags, code=None):
    with contextlib.redirect_stdout(out := io.StringIO()):
        assert detect.main(["random:resnet10_16", *SMALL, *map(str, flags)]) == code
    return out.getvalue()


def test_the_parts_are_those_of_the_backbone():
    """Weights of torchvision's ResNet-50 fill trunk and head, all but the new layers."""
    weights = {k: v for k, v in torchvision.models.resnet50().state_dict().items() if not k.startswith("fc.")}
    net = backbones.build("resnet50", 64)
    model = detect.build(net, {"mean": data.MEAN, "std": data.STD}, 10)
    body, head = model.backbone.state_dict(), model.roi_heads.box_head[0].state_dict()
    own = body | {f"layer4.{k}": v for k, v in head.items()}
    assert own.keys() == weights.keys()
    net.load_state_dict(weights)
    assert torch.equal(model.backbone.layer1[0].conv1.weight, weights["layer1.0.conv1.weight"])
    assert torch.equal(model.roi_heads.box_head[0][0].conv1.weight, weights["layer4.0.conv1.weight"])
    assert isinstance(model.roi_heads.box_head[1], nn.BatchNorm2d)
    assert model.roi_heads.box_predictor.cls_score.out_features == 11


def test_frozen_parts_do_not_move(tmp_path):
    run("--frozen", "--out", tmp_path)
    torch.manual_seed(0)
    start, end = backbones.build("resnet10_16", 32).state_dict(), runs.load(tmp_path / "checkpoint.pt")["model"]
    trunk = {k: v for k, v in start.items() if not k.startswith("layer4.")}
    assert len(trunk) > 20 and all(torch.equal(end[f"backbone.{k}"], v) for k, v in trunk.items())
    assert not torch.equal(end["roi_heads.box_head.0.0.conv1.weight"], start["layer4.0.conv1.weight"])


def test_scenes_keep_their_size():
    model, images = detect.build(backbones.build("resnet10_16", 32), {"mean": data.MEAN, "std": data.STD}, 10), []
    for training in (True, False):
        model.transform.train(training)
        images.append(model.transform([torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))])[0].tensors)
    assert images[0].shape == (1, 3, 64, 64) and torch.allclose(images[0], images[1], atol=1e-6)


def test_norms_do_not_decay():
    model = detect.build(backbones.build("resnet10_16", 32), {"mean": data.MEAN, "std": data.STD}, 10)
    decayed, not_decayed = detect.param_groups(model)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(not_decayed["params"]) == 2 * len(norms) and not_decayed["weight_decay"] == 0
    assert len(decayed["params"]) + 2 * len(norms) == len(list(model.parameters()))


def test_rates_by_hand():
    rates = [detect.rate_at(step, 800, 2.0) for step in (0, 50, 100, 599, 600, 735, 736)]
    assert rates == pytest.approx([0.002, 1.001, 2, 2, 0.2, 0.2, 0.02])


def test_flipping_by_hand():
    image = torch.arange(12).view(1, 2, 6)
    target = {"boxes": torch.tensor([[0.0, 0, 2, 1], [3, 1, 6, 2]]), "labels": torch.tensor([1, 2])}
    mirrored, flipped = detect.flipped(image, target)
    assert mirrored[0, 0].tolist() == [5, 4, 3, 2, 1, 0]
    assert flipped["boxes"].tolist() == [[4, 0, 6, 1], [0, 1, 3, 2]] and flipped["labels"] is target["labels"]
    assert target["boxes"][0].tolist() == [0, 0, 2, 1]  # not overwritten


def test_batches_are_permutations_one_after_the_other():
    rows = torch.cat([detect.rows_at(step, 10, 4, seed=3) for step in range(5)])
    assert sorted(rows[:10].tolist()) == sorted(rows[10:].tolist()) == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()
    assert torch.equal(rows[4:8], detect.rows_at(1, 10, 4, seed=3))


def test_labels_begin_at_one_for_the_detector():
    images, targets, _ = shapes.draw_scenes(6)
    xs, ts = detect.batch(images, targets, torch.tensor([4, 1]), torch.Generator().manual_seed(0), torch.device("cpu"))
    assert [t["labels"].tolist() for t in ts] == [(targets[i]["labels"] + 1).tolist() for i in (4, 1)]
    assert xs[0].max() <= 1 and set(ts[0]) == {"boxes", "labels"}


def test_stopped_and_resumed_a_run_ends_with_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "catch_signals", list)
    whole = run("--out", tmp_path / "whole")
    assert "detect scenes: AP" in whole and (tmp_path / "whole" / "detections.png").exists()
    stop = []
    monkeypatch.setattr(common, "catch_signals", lambda: stop)
    monkeypatch.setattr(common, "any_rank", lambda flag: (stop.append(1) or len(stop) == 2) if flag is stop else flag)
    run("--out", tmp_path / "parts", code=common.STOPPED)
    assert runs.load(tmp_path / "parts" / "checkpoint.pt")["step"] == 2
    monkeypatch.setattr(common, "any_rank", lambda flag: False)
    run("--out", tmp_path / "parts")
    a, b = (runs.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert a["step"] == b["step"] == 4 and equal(a["model"], b["model"])
    assert "is finished" in run("--out", tmp_path / "parts")


def test_two_processes_train_and_test_together(tmp_path):
    words = ["-m", "downstream.detect", "random:resnet10_16", *SMALL, "--out", tmp_path / "two"]
    both = fork(*words, processes=2)
    out, err = both.communicate(timeout=300)
    assert both.returncode == 0 and out.count("detect scenes: AP") == 1, out + err  # rank 0 alone
    assert runs.load(tmp_path / "two" / "checkpoint.pt")["step"] == 4


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["random:vgg11"], "is not a ResNet"),
        (["random:resnet10_16_lab"], "is not a ResNet"),
        (["nowhere"], "no such checkpoint"),
        (["random:resnet10_16", "--updates", "0"], "--updates 0: it must be at least 1"),
        (["random:resnet10_16", "--lr", "nan"], "--lr nan"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence, tmp_path, refused):
    assert sentence in refused(lambda: detect.main([*words, "--device", "cpu", "--out", str(tmp_path / "run")]))
    assert not (tmp_path / "run").exists()
