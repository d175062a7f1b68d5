"""Detection on drawn scenes: the detector's parts, its data, and runs that are stopped and go on."""

import contextlib
import io
import json

import pytest
import torch
import torchvision
from helpers import equal, fork
from test_annotated import write_coco
from torch import nn

import backbones
import common
import data
import runs
from downstream import annotated, detect

SMALL = ["--limit", "24", "--updates", "4", "--batch-size", "4", "--device", "cpu"]


@pytest.fixture(autouse=True)
def few_test_scenes(monkeypatch):
    monkeypatch.setitem(annotated.SCENES, "test", (8, 11))


PREPROCESS = {"mean": data.MEAN, "std": data.STD}


def detector(arch="resnet10_16", head="c4", mask=False, classes=10, recipe="scenes"):
    torch.manual_seed(0)
    net = backbones.build(arch, detect.RECIPES[recipe]["built_for"])
    return net, detect.build(net, PREPROCESS, classes, head, mask, detect.RECIPES[recipe])


def run(*flags, code=None):
    with contextlib.redirect_stdout(out := io.StringIO()):
        assert detect.main(["random:resnet10_16", *SMALL, *map(str, flags)]) == code
    return out.getvalue()


@pytest.mark.parametrize("head", ["c4", "fpn"])
def test_the_parts_are_those_of_the_backbone(head):
    """Weights of torchvision's ResNet-50 fill trunk and head, all but the new layers."""
    weights = {k: v for k, v in torchvision.models.resnet50().state_dict().items() if not k.startswith("fc.")}
    net, model = detector("resnet50", head, recipe="voc0712")
    own = (model.backbone if head == "c4" else model.backbone.body).state_dict()
    if head == "c4":
        own |= {f"layer4.{k}": v for k, v in model.roi_heads.box_head[0].state_dict().items()}
        assert isinstance(model.roi_heads.box_head[1], nn.BatchNorm2d)
    assert own.keys() == weights.keys()
    net.load_state_dict(weights)  # one object, not a copy
    last = model.roi_heads.box_head[0] if head == "c4" else model.backbone.body.layer4
    assert torch.equal(last[2].conv3.weight, weights["layer4.2.conv3.weight"])
    assert model.roi_heads.box_predictor.cls_score.out_features == 11


def test_losses_and_roi_align_are_those_of_detectron2():
    detect.like_detectron2()
    logits, boxes = torch.zeros(2, 3), torch.tensor([[0.0] * 12, [0] * 4 + [0.1, -0.3, 0, 2] + [9] * 4])
    _, loss = detect.roi_heads.fastrcnn_loss(logits, boxes, [torch.tensor([0, 1])], [torch.zeros(2, 4)])
    assert loss.item() == pytest.approx(2.4 / 2)  # smooth L1 has less for 0.1: 0.045
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)  # a pixel's value is its place
    pool = detect.MultiScaleRoIAlign(["0"], 1, 2)
    [[[[value]]]] = pool({"0": ramp}, [torch.tensor([[4.0, 4, 8, 8]])], [(16, 16)])
    assert value.item() == pytest.approx(5.5)  # the middle of pixels 4, 5, 6, 7; torchvision: 6


@pytest.mark.parametrize(("head", "mask"), [("c4", False), ("fpn", False), ("fpn", True)])
def test_every_parameter_learns(head, mask):
    net, model = detector(head=head, mask=mask)
    scenes = annotated.scenes("scenes", "train", 4)
    detect.train_mode(model, net, False)
    losses = model(*detect.prepared([scenes.read(i) for i in range(4)], mask, torch.device("cpu")))
    sum(losses.values()).backward()
    assert ("loss_mask" in losses) == mask
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert sum(p.grad.abs().sum() > 0 for p in net.parameters()) == len(list(net.parameters()))


def test_norms_are_recomputed_over_the_batches():
    net, model = detector()
    scenes = annotated.scenes("scenes", "train", 8)
    batches = [detect.prepared([scenes.read(i) for i in rows], False, torch.device("cpu")) for rows in ((0, 1), (2, 3))]
    detect.train_mode(model, net, True)
    before = {k: v.clone() for k, v in net.state_dict().items() if not k.startswith("layer4")}
    seen, norm = [], model.roi_heads.box_head[1]
    norm.register_forward_hook(lambda m, inputs, _: seen.append(inputs[0].mean((0, 2, 3))))
    detect.recompute_norms(model, batches)
    assert torch.allclose(norm.running_mean, torch.stack(seen).mean(0), atol=1e-5) and norm.momentum == 0.1
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())  # frozen ones stay


def test_frozen_parts_do_not_move(tmp_path):
    run("--frozen", "--out", tmp_path)
    torch.manual_seed(0)
    start, end = backbones.build("resnet10_16", 32).state_dict(), runs.load(tmp_path / "checkpoint.pt")["model"]
    trunk = {k: v for k, v in start.items() if not k.startswith("layer4.")}
    assert len(trunk) > 20 and all(torch.equal(end[f"backbone.{k}"], v) for k, v in trunk.items())
    assert not torch.equal(end["roi_heads.box_head.0.0.conv1.weight"], start["layer4.0.conv1.weight"])


def test_scenes_keep_their_size():
    model, images = detector()[1], []
    for training in (True, False):
        model.transform.train(training)
        images.append(model.transform([torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))])[0].tensors)
    assert images[0].shape == (1, 3, 64, 64) and torch.allclose(images[0], images[1], atol=1e-6)


def test_norms_do_not_decay():
    model = detector()[1]
    decayed, not_decayed = detect.param_groups(model)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(not_decayed["params"]) == 2 * len(norms) and not_decayed["weight_decay"] == 0
    assert len(decayed["params"]) + 2 * len(norms) == len(list(model.parameters()))


def test_flipping_by_hand():
    image = torch.arange(12).view(1, 2, 6)
    masks = image[:, :, :].repeat(2, 1, 1) > torch.tensor([4, 7])[:, None, None]
    target = {"boxes": torch.tensor([[0.0, 0, 2, 1], [3, 1, 6, 2]]), "labels": torch.tensor([1, 2]), "masks": masks}
    mirrored, flipped = detect.flipped(image, target)
    assert flipped["masks"][0].tolist() == [[True, False, False, False, False, False], [True] * 6]
    assert mirrored[0, 0].tolist() == [5, 4, 3, 2, 1, 0]
    assert flipped["boxes"].tolist() == [[4, 0, 6, 1], [0, 1, 3, 2]] and flipped["labels"] is target["labels"]
    assert target["boxes"][0].tolist() == [0, 0, 2, 1]  # not overwritten


def test_labels_begin_at_one_for_the_detector():
    scenes = annotated.scenes("scenes", "train", 6)
    xs, ts = detect.prepared([scenes.read(4), scenes.read(1)], False, torch.device("cpu"))
    assert [t["labels"].tolist() for t in ts] == [(scenes.read(i)[1]["labels"] + 1).tolist() for i in (4, 1)]
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


@pytest.mark.parametrize("official", [True, False])
def test_a_folder_with_masks_from_end_to_end(official, tmp_path, monkeypatch, capsys):
    if official:
        pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
    else:
        monkeypatch.setattr(detect.metrics, "has_official", lambda: False)
    write_coco(tmp_path / "set", n=6)
    words = ["--data", tmp_path / "set", "--recipe", "scenes", "--head", "fpn", "--mask", "--overfit"]
    detect.main(list(map(str, ["random:resnet10_16", *words, *SMALL, "--workers", 1, "--out", tmp_path / "run"])))
    text = capsys.readouterr().out
    assert "boxes AP" in text and "masks AP" in text and ("COCO's own code, masks" in text) == official
    found = json.loads((tmp_path / "run" / "evaluate.json").read_text())[str(tmp_path / "set")]
    assert {"detection", "instances"} <= found.keys() and found["instances"]["AP50"] >= found["instances"]["AP"]
    if official:
        assert found["detection"]["official"]["AP"] == pytest.approx(found["detection"]["AP"], abs=1e-4)
        assert found["instances"]["official"]["AP"] == pytest.approx(found["instances"]["AP"], abs=1e-4)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["random:vgg11"], "is not a ResNet"),
        (["random:resnet10_16_lab"], "is not a ResNet"),
        (["nowhere"], "no such checkpoint"),
        (["random:resnet10_16", "--updates", "0"], "--updates 0: it must be at least 1"),
        (["random:resnet10_16", "--lr", "nan"], "--lr nan"),
        (["random:resnet10_16", "--mask"], "--mask needs --head fpn"),
        (["random:resnet10_16", "--limit", "9"], "--batch-size 16: there are 9 images to train on"),
        (["random:resnet10_16", "--data", "nowhere"], "nowhere has no annotations/"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence, tmp_path, refused):
    assert sentence in refused(lambda: detect.main([*words, "--device", "cpu", "--out", str(tmp_path / "run")]))
    assert not (tmp_path / "run").exists()
