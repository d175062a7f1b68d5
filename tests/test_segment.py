"""Segmentation on drawn scenes: the network's parts, crops, and runs that are stopped and go on."""

import contextlib
import io
import json

import pytest
import torch
import torchvision
from helpers import check_two_processes, equal, fork
from torch import nn

import backbones
import common
import data
import runs
from downstream import annotated, segment

SMALL = ["--limit", "24", "--updates", "4", "--batch-size", "4", "--device", "cpu"]
PREPROCESS = {"mean": data.MEAN, "std": data.STD}


@pytest.fixture(autouse=True)
def few_test_scenes(monkeypatch):
    monkeypatch.setitem(annotated.SCENES, "test", (8, 11))


def run(*flags, code=None):
    with contextlib.redirect_stdout(out := io.StringIO()):
        assert segment.main(["random:resnet10_16", *SMALL, *map(str, flags)]) == code
    return out.getvalue()


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_the_last_stage_is_dilated_and_keeps_its_weights(arch):
    weights = {k: v for k, v in getattr(torchvision.models, arch)().state_dict().items() if not k.startswith("fc.")}
    net = backbones.build(arch, 224)
    model = segment.FCN(net, PREPROCESS, 5, 32, 6).eval()
    net.load_state_dict(weights)
    assert net.stages(torch.rand(1, 3, 64, 96))[-1].shape[2:] == (4, 6)  # stride 16
    assert model(torch.rand(2, 3, 64, 96)).shape == (2, 5, 64, 96)
    if arch == "resnet50":  # torchvision dilates bottlenecks, all but the first; MoCo all
        other = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True]).eval()
        other.load_state_dict(weights, strict=False)
        other.layer4[0].conv2.dilation = other.layer4[0].conv2.padding = (2, 2)
        x = data.normalize(torch.rand(1, 3, 64, 64))
        trunk = nn.Sequential(*list(other.children())[:-2])
        assert torch.allclose(trunk(x), net.stages(x)[-1], atol=1e-4)


def test_crops_of_image_and_classes_are_the_same_place():
    place = torch.arange(30 * 40).view(30, 40)
    image, g = (place % 251).byte().expand(3, -1, -1), torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(20):
        part, target = segment.crop(image, {"semantic": image[0].clone()}, g, 16, (1.0, 1.0))
        assert part.shape == (3, 16, 16) and torch.equal(part[0], target["semantic"])
        seen.add((int(part[0, 0, 0]), bool(part[0, 0, 1] > part[0, 0, 0])))
    assert len(seen) > 10 and len({mirrored for _, mirrored in seen}) == 2


def test_beyond_the_image_nothing_counts():
    image, target = torch.full((3, 10, 12), 7, dtype=torch.uint8), {"semantic": torch.ones(10, 12, dtype=torch.uint8)}
    part, cropped = segment.crop(image, target, torch.Generator().manual_seed(0), 16, (1.0, 1.0))
    assert (cropped["semantic"] == 1).sum() == 120 and (cropped["semantic"] == 255).sum() == 16 * 16 - 120
    assert torch.equal(part[0] == 7, cropped["semantic"] == 1)
    sizes = [
        segment.crop(image, target, torch.Generator().manual_seed(i), 32, (0.5, 2.0))[1]["semantic"] for i in range(40)
    ]
    shares = torch.tensor([(s == 1).sum().item() / 120 for s in sizes]).sqrt()
    assert 0.4 < shares.min() < 0.7 and 1.7 < shares.max() < 2.1


def test_a_frozen_backbone_stays_and_the_rest_learns(tmp_path):
    run("--frozen", "--out", tmp_path)
    torch.manual_seed(0)
    start, end = backbones.build("resnet10_16", 32).state_dict(), runs.load(tmp_path / "checkpoint.pt")["model"]
    assert all(torch.equal(end[f"f.{k}"], v) for k, v in start.items())
    found = json.loads((tmp_path / "evaluate.json").read_text())["scenes"]["segmentation"]
    assert 0 < found["mIoU"] < 100 and 0 <= found["mIoU_objects"] < 100 and found["frozen"]
    assert (tmp_path / "segmentation.png").exists()


def test_it_learns_scenes(tmp_path):
    """Better than the best answer without looking: ground everywhere has 8 to 9 mIoU."""
    text = run("--updates", 60, "--batch-size", 8, "--overfit", "--out", tmp_path)
    assert json.loads((tmp_path / "evaluate.json").read_text())["scenes"]["segmentation"]["mIoU"] > 14, text


def test_the_loss_is_the_mean_over_pixels_that_count():
    logits, classes = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4), dtype=torch.uint8)
    classes[0, :2], classes[1, 3] = 255, 255
    counted = (classes != 255).nonzero().tolist()
    loss = [-logits[b, :, y, x].log_softmax(0)[int(classes[b, y, x])] for b, y, x in counted]
    assert len(loss) == 20 and torch.allclose(segment.pixel_loss(logits, classes), torch.stack(loss).mean())
    assert segment.pixel_loss(logits, torch.full_like(classes, 255)) == 0


class WithLoss(segment.FCN):
    def forward(self, x, classes):
        return segment.pixel_loss(super().forward(x), classes)


def build():
    torch.manual_seed(0)
    return WithLoss(backbones.build("resnet10_16", 32), PREPROCESS, 11, 16, 2)


def batch(n):
    scenes = annotated.scenes("scenes", "train", n)
    images, targets = zip(*[scenes.read(i) for i in range(n)], strict=True)
    return torch.stack(images) / 255, torch.stack([t["semantic"] for t in targets])


def test_two_processes_have_the_gradients_of_one(tmp_path):
    check_two_processes(build, batch, tmp_path)


def test_stopped_and_resumed_a_run_ends_with_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "catch_signals", list)
    run("--out", tmp_path / "whole")
    stop = []
    monkeypatch.setattr(common, "catch_signals", lambda: stop)
    monkeypatch.setattr(common, "any_rank", lambda flag: (stop.append(1) or len(stop) == 2) if flag is stop else flag)
    run("--out", tmp_path / "parts", code=common.STOPPED)
    monkeypatch.setattr(common, "any_rank", lambda flag: False)
    run("--out", tmp_path / "parts")
    a, b = (runs.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert (
        a["step"] == b["step"] == 4
        and equal(a["model"], b["model"])
        and a["result"].replace("whole", "parts") == b["result"]
    )
    assert "is finished" in run("--out", tmp_path / "parts")


def test_two_processes_test_all_images_together(tmp_path):
    words = ["-m", "downstream.segment", "random:resnet10_16", *SMALL, "--out", tmp_path / "two"]
    both = fork(*words, processes=2)
    out, err = both.communicate(timeout=300)
    assert both.returncode == 0 and out.count("segment scenes: mIoU") == 1, out + err
    found, end = runs.load(tmp_path / "two" / "checkpoint.pt"), backbones.build("resnet10_16", 32)
    model = segment.FCN(end, PREPROCESS, 11, 64, 2)
    model.load_state_dict(found["model"])
    scenes = annotated.scenes("scenes", "test", 300)
    matrix, _ = segment.test_model(model, scenes, 11, 0, torch.device("cpu"))
    mean = segment.metrics.mean_iou(matrix)[0]
    assert f"mIoU {mean:.1f}" in found["result"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["random:vgg11"], "is not a ResNet"),
        (["nowhere"], "no such checkpoint"),
        (["random:resnet10_16", "--data", "nowhere"], "no images/ and masks/ in it"),
        (["random:resnet10_16", "--limit", "9"], "there are 9 images to train on"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence, tmp_path, refused):
    assert sentence in refused(lambda: segment.main([*words, "--device", "cpu", "--out", str(tmp_path / "run")]))
    assert not (tmp_path / "run").exists()
