import itertools

import pytest
import torch
import torchvision

import backbones


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_resnets_are_torchvisions(name):
    ours, theirs = backbones.build(name, 224), getattr(torchvision.models, name)()
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(ours.state_dict())  # strict
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-5)


@pytest.mark.parametrize("name", ["vgg11_bn", "vgg19_bn"])
def test_vggs_are_torchvisions(name):
    ours, theirs = backbones.build(name, 224), getattr(torchvision.models, name)()
    theirs.classifier = torch.nn.Identity()
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("name", [n for n in backbones.NAMES if "101" not in n and "152" not in n])
@pytest.mark.parametrize("size", [32, 64])
def test_every_backbone_keeps_the_contract(name, size):
    net, x = backbones.build(name, size), torch.randn(2, 3, size, size)
    assert net.eval()(x).shape == (2, net.dim)
    maps = net.stages(x)
    assert maps[-1].shape[1] == net.dim and all(a.shape[-1] >= b.shape[-1] for a, b in itertools.pairwise(maps))


def test_small_images_keep_their_resolution():
    assert [m.shape[-1] for m in backbones.build("resnet18", 32).stages(torch.zeros(1, 3, 32, 32))] == [32, 16, 8, 4]
    assert [m.shape[-1] for m in backbones.build("resnet18", 224).stages(torch.zeros(1, 3, 224, 224))] == [
        56,
        28,
        14,
        7,
    ]
    assert "3x3 stem" in backbones.describe(backbones.build("resnet18", 32), "resnet18", 32)


def test_width_two_doubles_every_layer():
    one, two = backbones.build("resnet18", 32), backbones.build("resnet18_w2", 32)
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert q.shape[0] == 2 * p.shape[0], name


def test_unknown_name_offers_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        backbones.build("resnet5O")
    assert stop.value.code == 2 and "did you mean 'resnet50'" in capsys.readouterr().err


@pytest.mark.parametrize(("arch", "size"), [("resnet18", 224), ("resnet18", 32), ("vgg11_bn", 32), ("resnet10_16", 32)])
def test_the_two_printed_lines_load_the_export(arch, size, tmp_path):
    path, net = tmp_path / "backbone.pt", backbones.build(arch, size)
    torch.save({"state_dict": net.state_dict()}, path)
    lines = backbones.loading_lines(arch, size, path)
    assert len(lines.splitlines()) == 2
    scope = {}
    exec(lines, scope)
    x = torch.randn(2, 3, size, size)
    assert torch.allclose(scope["net"].eval()(x).flatten(1)[:, : net.dim], net.eval()(x), atol=1e-5) or "vgg" in arch
