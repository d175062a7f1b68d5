import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import Maps, command, write_images
from torch import nn

import backbones
import checkpoints
import data
import runs
from analysis import reconstruct

SEEN = {"mean": data.HALF, "std": data.HALF, "size": 24, "interpolation": "bilinear"}


# ============ what a network was trained to see ============


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize(("size", "patch", "cell"), [(24, 8, 8), (37, 8, 11), (36, 7, 12)])
def test_patches_equal_a_loop(standardize, size, patch, cell):
    torch.manual_seed(0)
    f, x = (
        nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        torch.rand(2, 3, size, size),
    )
    f.dim = 5
    border, inside = round((size - 3 * cell) / 2), (cell - patch) // 2
    expected = torch.zeros(2, 5)
    for b in range(2):
        for i in range(3):
            for j in range(3):
                top, left = (border + cell * k + inside for k in (i, j))
                p = x[b, :, top : top + patch, left : left + patch]
                p = (p - p.mean()) / p.std(correction=0) if standardize else p
                expected[b] += f(p[None])[0] / 9
    trunk = checkpoints.InputAdapter(f, standardize=standardize, patch=patch, cell=cell)
    assert trunk.dim == 5 and torch.allclose(trunk(x), expected, atol=1e-5)


def test_whole_images_are_standardized_and_lightness_is_that_of_lab():
    f = nn.Flatten()
    f.dim = 3 * 16
    x = torch.rand(4, 3, 4, 4) * 2 - 1
    seen = checkpoints.InputAdapter(f, standardize=True)(x)
    assert seen.mean(1).abs().max() < 1e-5 and torch.allclose(seen.std(1, correction=0), torch.ones(4), atol=1e-5)
    seen = checkpoints.InputAdapter(f, lightness=True)(x).view(4, 3, 4, 4)
    linear = (((x / 2 + 0.5).double() + 0.055) / 1.055).pow(2.4).where(x / 2 + 0.5 > 0.04045, (x / 2 + 0.5) / 12.92)
    y = (linear * torch.tensor([0.2126, 0.7152, 0.0722]).view(3, 1, 1)).sum(1)
    lightness = 116 * torch.where(y > 216 / 24389, y.pow(1 / 3), (24389 / 27 * y + 16) / 116) - 16
    for channel in range(3):
        assert torch.allclose(seen[:, channel].double(), (lightness - 50) / 50, atol=1e-3)
    white = checkpoints.InputAdapter(f, lightness=True)(torch.ones(1, 3, 4, 4))
    assert torch.allclose(white, torch.ones(1, 48), atol=1e-4)


def test_a_trunk_comes_from_what_a_checkpoint_says(refused):
    f, patches = Maps(), {"patch": 8, "cell": 8, "standardize": True}
    assert checkpoints.as_trained(f, SEEN) is f and checkpoints.as_trained(f, SEEN | {"sees": {}}) is f
    trunk = checkpoints.as_trained(f, SEEN | {"sees": patches})
    assert trunk.f is f and (trunk.patch, trunk.cell, trunk.standardize, trunk.lightness) == (8, 8, True, False)
    assert checkpoints.as_trained(f, SEEN | {"sees": {"lightness": True}}, 48).lightness  # any size
    err = refused(lambda: checkpoints.as_trained(f, SEEN | {"sees": patches}, 48))
    assert "48 px" in err and "24 px" in err


@pytest.mark.parametrize(
    ("arch", "sees", "words"),
    [
        ("resnet18", {}, "RGB images, 32 px (bilinear), (x / 255 - mean) / std: mean (0.485, 0.456, 0.406)"),
        (
            "resnet10_16",
            {"patch": 8, "cell": 11, "standardize": True},
            "InputAdapter(net, patch=8, cell=11, standardize=True)",
        ),
        ("resnet10_16_ln", {"patch": 8, "stride": 4, "gray": True}, "InputAdapter(net, patch=8, stride=4, gray=True)"),
        ("resnet10_16", {"standardize": True}, "InputAdapter(net, standardize=True)"),
        ("resnet10_16", {"lightness": True}, "InputAdapter(net, lightness=True)"),
        ("resnet10_16_lab", {}, "makes lab channels of them"),
    ],
)
def test_the_third_printed_line_says_what_images_must_look_like(tmp_path, arch, sees, words):
    size, seen = sees.get("patch", 32), {"mean": data.MEAN, "std": data.STD, "size": 32, "interpolation": "bilinear"}
    net, path = backbones.build(arch, size).eval(), tmp_path / "backbone.pt"
    torch.save({"state_dict": net.state_dict()}, path)
    lines, scope = backbones.loading_lines(arch, size, path, seen | {"sees": sees}), {}
    assert len(lines.splitlines()) == 3 and words in lines.splitlines()[2]
    assert ("InputAdapter" in lines) == bool(sees)
    exec(lines, scope)
    x = torch.rand(2, 3, size, size)
    assert torch.allclose(scope["net"].eval()(x), net(x), atol=1e-5)


def test_maps_are_pooled_to_the_sizes_of_the_study():
    maps = {(64, 56): 11, (256, 56): 5, (512, 28): 4, (1024, 14): 2, (2048, 7): 1, (128, 8): 8}
    for (channels, side), pooled in maps.items():
        x = torch.randn(1, channels, side, side)
        small = checkpoints.shrink(x, 9000)
        assert small.shape == (1, channels, pooled, pooled)
        k = 1 if pooled == side else math.ceil(math.sqrt(channels * side * side / 9000))
        assert small[0, 3, pooled - 1, 0] == x[0, 3, (pooled - 1) * k : pooled * k, :k].max()
    vector = torch.randn(2, 9999)
    assert checkpoints.shrink(vector, 9000) is vector
    assert checkpoints.shrink(torch.randn(2, 64, 2, 2), 16).shape == (2, 64, 1, 1)  # the window stays inside the map


def test_taps_of_patches_are_averaged_after_pooling():
    x, net = torch.rand(2, 3, 24, 24), Maps("root")
    taps = checkpoints.InputAdapter(net, patch=8, cell=8).taps(x, most=50)
    patches = [x[:, :, i : i + 8, j : j + 8] for i in (0, 8, 16) for j in (0, 8, 16)]
    expected = torch.stack([F.max_pool2d(p, 2) for p in patches]).mean(0)  # 3 x 8 x 8 = 192 features: windows of 2
    assert list(taps) == ["root", "block1", "pre_logits"] and torch.allclose(taps["root"], expected, atol=1e-6)
    assert taps["block1"].shape == (2, 1, 4, 4) and taps["pre_logits"].shape == (2, 4)


# ============ opening it ============


def test_plain_torchvision_state_dict(tmp_path, monkeypatch, capsys, refused):
    file, weights = tmp_path / "resnet18.pth", torchvision.models.resnet18().state_dict()
    torch.save(weights, file)
    folder = write_images(tmp_path / "images", 20)
    command(monkeypatch, "evaluate", file, "--arch", "resnet18", "--data", folder, "--probe", "knn", "--size", 64)
    assert "k=1" in capsys.readouterr().out
    assert "does not fit" in refused("evaluate", file, "--arch", "resnet50", "--data", folder)
    assert "--arch" in refused("evaluate", file, "--data", folder)
    for broken in ({5: torch.ones(3)}, {"fc.bias": 5}, {**weights, "bn1.bias": weights["bn1.bias"] / 0}):
        torch.save(broken, file)
        assert "resnet18.pth" in refused("evaluate", file, "--arch", "resnet18", "--data", folder)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("state_dict", [], "not a state dict"),
        ("conv1.weight", 5, "not a state dict"),
        ("conv1.weight", torch.full((16, 3, 3, 3), float("nan")), "not finite"),
        ("conv1.weight", torch.ones(7), "does not fit"),
        ("zebra", torch.ones(7), "does not fit"),
        ("arch", "resnet5O", "did you mean"),
        ("head", {"weight": torch.ones(3, 7), "bias": torch.ones(3)}, "does not fit"),
    ],
)
def test_a_backbone_that_does_not_fit_is_refused_where_it_is_opened(tiny_run, refused, key, value, words):
    file = tiny_run / "backbone.pt"
    about = runs.load(file) | {"kind": "classifier", "head": {"weight": torch.ones(3, 128), "bias": torch.ones(3)}}
    checkpoints.open_backbone(str(file), None, 0, 0)
    (about if key in about else about["state_dict"])[key] = value
    torch.save(about, file)
    if key != "head":
        assert words in refused(lambda: checkpoints.open_backbone(str(file), None, 0, 0))
    assert words in refused(lambda: reconstruct.open_classifier(str(file)))
