import copy
import itertools
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import TINY, command, synchronized, write_images
from torchvision.models.vgg import cfgs, make_layers

import backbones
import byol
import checkpoints
import cmc
import common
import cpc
import evaluate
import instdisc
import moco
import optim
import parallel
import pirl
import pretext
import runs
import sage
import simclr
import swav


@pytest.fixture
def undrawn(monkeypatch):
    """Where only shapes count, networks are on the meta device, whose random numbers, though none are made, take
    long."""
    for name in ("normal_", "uniform_"):
        original = getattr(torch.Tensor, name)
        draw = lambda self, *args, original=original, **given: self if self.is_meta else original(self, *args, **given)
        monkeypatch.setattr(torch.Tensor, name, draw)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnets_are_torchvisions(name):
    ours, theirs = backbones.build(name, 224), getattr(torchvision.models, name)()
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(ours.state_dict())  # strict
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-5)


@pytest.mark.parametrize("name", ["resnet34", "resnet101", "resnet152"])
def test_deeper_resnets_are_torchvisions(name, undrawn):
    with torch.device("meta"):
        ours, theirs = backbones.build(name, 224), getattr(torchvision.models, name)()
        theirs.fc = torch.nn.Identity()
        theirs.load_state_dict(ours.state_dict())  # strict
        assert [type(m) for m in ours.modules()][1:] == [
            type(m) for m in theirs.modules() if not hasattr(m, "output_size")
        ][1:-1]


@pytest.mark.parametrize("name", [n for n in backbones.PLAIN if "101" not in n and "152" not in n])
@pytest.mark.parametrize("size", [32, 64])
def test_every_resnet_keeps_the_contract(name, size, undrawn):
    with torch.device("meta"):
        net, x = backbones.build(name, size), torch.randn(2, 3, size, size)
        assert net.eval()(x).shape == (2, net.dim)
        maps = net.stages(x)
    assert maps[-1].shape[1] == net.dim and all(a.shape[-1] >= b.shape[-1] for a, b in itertools.pairwise(maps))


# ============ torchvision's other networks ============

FAMILIES = {  # one of each: (px, dim, channels and px of the last map, maps)
    "alexnet": (224, 4096, (256, 6), 4),
    "convnext_tiny": (32, 768, (768, 1), 4),
    "densenet121": (32, 1024, (1024, 1), 5),
    "efficientnet_b0": (32, 1280, (1280, 1), 5),
    "googlenet": (64, 1024, (1024, 2), 5),
    "inception_v3": (96, 2048, (2048, 1), 7),
    "maxvit_t": (224, 512, (512, 7), 5),
    "mnasnet0_5": (64, 1280, (1280, 2), 5),
    "mobilenet_v3_small": (64, 576, (576, 2), 5),
    "regnet_x_400mf": (32, 400, (400, 1), 5),
    "shufflenet_v2_x0_5": (32, 1024, (1024, 1), 5),
    "squeezenet1_1": (64, 512, (512, 3), 4),
    "swin_t": (64, 768, (768, 2), 1),
    "vgg11_bn": (64, 4096, (512, 2), 6),
    "vit_b_16": (32, 768, None, 0),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_torchvisions_networks_lose_their_head(name, tmp_path, request, capsys):
    """The contract, the printed lines, and what distributed training needs: a gradient for every weight."""
    (size, dim, last, count), real = FAMILIES[name], name.startswith(("regnet", "mobilenet", "squeezenet"))
    if not real:
        request.getfixturevalue("undrawn")
    with torch.device("cpu" if real else "meta"):
        net, x = backbones.build(name, size), torch.randn(2, 3, size, size)
        torch.save({"state_dict": net.state_dict()}, tmp_path / "backbone.pt")
        scope, lines = {}, backbones.loading_lines(name, size, tmp_path / "backbone.pt")
        exec(lines, scope)  # strict
        assert net.training and "backbones" not in lines
        *maps, (end, vector) = net.eval().taps(x).items()
        theirs = scope["net"].eval()(x)
        assert end == "pre_logits" and vector.shape == theirs.shape == (2, dim) and net.dim == dim
        assert vector.is_meta or torch.allclose(theirs, vector, atol=1e-5)
        assert [label for label, _ in maps] == [f"block{i}" for i in range(1, count + 1)]
        sides = [m.shape[2] for _, m in maps]
        assert sides == sorted(set(sides), reverse=True) and all(m.shape[2] == m.shape[3] for _, m in maps)
        if last:
            assert net.channels == last[0] and maps[-1][1].shape == (2, *last, last[1])
            if real:
                assert all(torch.equal(a, b) for a, (_, b) in zip(net.stages(x), maps, strict=True))
                assert torch.allclose(maps[-1][1].mean((2, 3)), vector, atol=1e-5)
        else:
            with pytest.raises(SystemExit):
                net.stages(x)
            assert f"{name} has no feature maps" in capsys.readouterr().err
        vector.sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert f" M parameters, {dim}-d, " in backbones.describe(net, name)


def test_a_copy_reads_its_own_maps_and_nothing_is_drawn():
    net, x = backbones.build("efficientnet_b0", 32), torch.randn(4, 3, 32, 32)
    other, first = copy.deepcopy(net), net.taps(x)["block1"]
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert not other.taps(x)["block1"].any() and torch.equal(net.taps(x)["block1"], first)
    assert torch.equal(net(x), net(x))  # in training: dropout and stochastic depth are off


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_networks_of_distilling_localization_are_read_at_the_penultimate_layer(undrawn):
    with torch.device("meta"):
        alexnet, vgg, x = (
            backbones.build("alexnet_bn", 224),
            backbones.build("vgg16_bn", 224),
            torch.randn(1, 3, 224, 224),
        )
        theirs = torchvision.models.alexnet(), torchvision.models.vgg16_bn()
        vector, maps = alexnet(x), alexnet.stages(x)
    fc8 = 4097 * 1000
    assert count(alexnet) == count(theirs[0]) - fc8 + 2 * (64 + 192 + 384 + 256 + 256) == 57_006_144
    assert count(vgg) == count(theirs[1]) - fc8 == 134_268_992
    assert vector.shape == (1, 4096) and maps[-1].shape == (1, 256, 6, 6)
    kinds = [type(m).__name__ for m in alexnet.features]
    assert kinds.count("BatchNorm2d") == 5
    assert all(kinds[i : i + 3] == ["Conv2d", "BatchNorm2d", "ReLU"] for i, k in enumerate(kinds) if k == "Conv2d")
    assert [type(m).__name__ for m in vgg.classifier] == ["Linear", "ReLU", "Dropout"] * 2


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("vit_b_16", 40, "vit_b_16 does not take them (Input shape indivisible by patch size!)"),
        ("inception_v3", 64, "inception_v3 does not take them (Calculated padded input size"),
        ("mobilenet_v3_small", 31, "needs 32 px or more"),
        ("mobilenet_v3_smal", 64, "did you mean 'mobilenet_v3_small'"),
        ("mobilenet_v3_small_s8", 64, "unknown architecture"),
        ("vgg19_s8", 64, "unknown architecture"),
    ],
)
def test_sizes_and_names_that_torchvision_does_not_have(name, size, words, capsys, undrawn):
    with pytest.raises(SystemExit) as stop, torch.device("meta"):
        backbones.build(name, size)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


def tiny_vit(name, weights, image_size):
    return torchvision.models.VisionTransformer(image_size, 16, 2, 2, 32, 64)


def quick(script, tmp_path, monkeypatch, *flags):
    """A method's main in this process, two updates on sixteen images; returns the run folder."""
    monkeypatch.setattr(common, "catch_signals", list)
    data = [
        "--data",
        str(write_images(tmp_path / "images", 32)),
        "--recipe",
        "shapes",
        "--workers",
        "0",
        "--limit",
        "16",
    ]
    script.main([*TINY, *data, "--batch-size", "8", "--epochs", "1", *flags, "--out", str(tmp_path / "run")])
    return tmp_path / "run"


def look(monkeypatch, *words):
    """evaluate.py in this process."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words), "--device", "cpu", "--workers", "0", "--no-amp"])
    evaluate.main()


def test_byol_and_every_depth_of_a_mobilenet(tmp_path, monkeypatch, capsys):
    out = quick(byol, tmp_path, monkeypatch, "--arch", "mobilenet_v3_small", "--hidden", "16", "--dim", "8")
    printed = capsys.readouterr().out
    assert "mobilenet_v3_small, 0.93 M parameters, 576-d, 3x3 stem\n" in printed
    assert "net = torchvision.models.mobilenet_v3_small(); net.classifier = torch.nn.Identity()" in printed
    torch.manual_seed(0)
    start, found = backbones.build("mobilenet_v3_small", 32).state_dict(), runs.load(out / "backbone.pt")["state_dict"]
    assert list(found) == list(start) and not torch.equal(found["features.0.0.weight"], start["features.0.0.weight"])
    command(monkeypatch, "analysis.depth", out)
    shapes = dict(
        line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.startswith(("block", "pre_"))
    )
    assert shapes == {"block1": "16x16x16", "block2": "8x8x16", "block3": "4x4x24", "block4": "2x2x48",
                      "block5": "1x1x576", "pre_logits": "576"}  # fmt: skip


def test_sage_recovers_images_from_a_mobilenets_maps(tmp_path, monkeypatch):
    arch = [
        "--arch",
        "mobilenet_v3_small",
        "--evaluator",
        "random:mobilenet_v3_small",
        "--width",
        "16",
        "--bottleneck",
        "16",
    ]
    found = runs.load(quick(sage, tmp_path, monkeypatch, *arch, "--hidden", "16", "--probes") / "checkpoint.pt")
    assert found["step"] == 2 and found["model"]["bottleneck.weight"].shape == (16, 576, 1, 1)


def test_sage_refuses_a_network_whose_vector_is_not_its_last_maps_mean(capsys):
    with pytest.raises(SystemExit) as stop:
        sage.build_decoder(backbones.build("vgg11_k0.5", 32), 32, 16, 16, pool=False)
    assert stop.value.code == 2 and "its vector has 256 numbers, its last map 32 channels" in capsys.readouterr().err


def test_simclr_trains_a_vision_transformer_that_takes_one_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torchvision.models, "get_model", tiny_vit)
    out = quick(simclr, tmp_path, monkeypatch, "--arch", "vit_b_16", "--hidden", "16", "--dim", "8")
    found = runs.load(out / "checkpoint.pt")
    assert found["step"] == 2 and found["model"]["f.encoder.pos_embedding"].shape == (1, 5, 32)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        look(monkeypatch, out, "--size", "64")
    assert stop.value.code == 2 and "vit_b_16 was built for 32 px and takes no other size" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small"])
def test_torchvisions_own_files_are_read_without_their_head(name, tmp_path):
    net = getattr(torchvision.models, name)()
    torch.save(net.state_dict(), tmp_path / "theirs.pth")
    found, *_ = checkpoints.open_backbone(str(tmp_path / "theirs.pth"), name, 32, 0)
    assert all(torch.equal(p, net.state_dict()[key]) for key, p in found.state_dict().items())


# ============ your own ============


class Mine(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.dim, self.layer = 8, torch.nn.Conv2d(3, 8, 3, 2)

    def forward(self, x):
        return self.layer(x).mean((2, 3))


def test_a_network_of_your_own_takes_two_lines(tmp_path, monkeypatch, capsys):
    text, first = Path(backbones.__file__).read_text(), "    n = parts(name)\n    kind"
    assert text.count(first) == 1
    copied = ModuleType("copied")
    text = text.replace(
        first,
        f"""    if name == "mine":
        return Mine()
{first}""",
    )
    exec(compile(text, "backbones.py", "exec"), vars(copied))
    copied.Mine = Mine
    for module in (byol, checkpoints):
        monkeypatch.setattr(module, "backbones", copied)
    monkeypatch.setitem(sys.modules, "backbones", copied)
    out = quick(byol, tmp_path, monkeypatch, "--arch", "mine", "--hidden", "16")
    printed = capsys.readouterr().out
    assert "mine, 0.00 M parameters, 8-d, 3x3 stem\n" in printed
    lines = printed.split("load the backbone:\n")[1].splitlines()[:2]
    exec("\n".join(lines), scope := {})
    found = runs.load(out / "checkpoint.pt")
    assert found["step"] == 2 and torch.equal(scope["net"].layer.weight, found["model"]["f.layer.weight"])
    look(monkeypatch, out, "--probe", "knn")


# ============ what is decayed ============


def test_every_network_that_was_there_is_decayed_as_before(undrawn):
    """By dimension alone, which was the rule: runs and checkpoints stay as they are. With every method's heads."""
    names = [*backbones.PLAIN, "resnet18_ln", "resnet18_nobn", "resnet18_lab3", "resnet18_s8"]
    names += [f"{family}_k1" for family in backbones.STUDY if "26" not in family]
    names += ["resnet14v2_k1_ln", "resnet14v2_k1_nobn", "revnet14_k1_minus"]
    with torch.device("meta"):
        modules = [backbones.build(name, 64) for name in names]
        f = backbones.build("resnet10_16", 32)
        modules += [byol.BYOL(f, 8, 8), simclr.SimCLR(f, 8, 8, 3, 0.5), swav.SwAV(f, 8, 8, 8), moco.MoCo(f, 8, 8)]
        modules += [instdisc.InstDisc(f, 8, 8, 0.1, "softmax"), cmc.CMC(backbones.build("resnet10_16_lab", 32), 8)]
        modules += [pirl.Jigsaw(f.dim, 8, 32), pirl.Rotation(f.dim, 8), *sage.build_decoder(f, 32, 8, 8, False)]
    for recipe in cpc.RECIPES:
        args = cpc.parse_args(["--recipe", recipe])
        with torch.device("meta"):
            modules.append(cpc.CPC(backbones.build("resnet10_16_ln", args.patch), args))
    for task in pretext.TASKS:
        args = pretext.parse_args(["--task", task, "--data", "shapes", "--permutations", "2"])
        given = [torch.full((313,), 1 / 313)] if task == "colorization" else []
        modules.append(pretext.TASKS[task](f, args, *given))
    for module in modules:
        weights, rest = optim.param_groups(module, 0.1)
        params = [p for p in module.parameters() if p.requires_grad]
        assert list(map(id, weights["params"])) == [id(p) for p in params if p.ndim >= 2]
        assert list(map(id, rest["params"])) == [id(p) for p in params if p.ndim < 2]


@pytest.mark.parametrize(
    ("name", "spared"),
    [
        ("vit_b_16", {"class_token", "pos_embedding"}),
        ("swin_t", {"relative_position_bias_table"}),
        ("swin_v2_t", {"logit_scale"}),
        ("convnext_tiny", {"layer_scale"}),
        ("mobilenet_v3_small", set()),
    ],
)
def test_tokens_positions_and_scales_are_not_decayed(name, spared, undrawn):
    with torch.device("meta"):
        net = backbones.build(name, 32)
    weights, rest = optim.param_groups(net, 0.1)
    names = {id(p): key for key, p in net.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in rest["params"] if p.ndim >= 2} == spared
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.MultiheadAttention)
    owners = {id(p) for m in net.modules() if isinstance(m, kinds) for p in m.parameters(recurse=False) if p.ndim >= 2}
    assert {id(p) for p in weights["params"]} == owners and weights["weight_decay"] == 0.1 and rest["weight_decay"] == 0


def test_small_images_keep_their_resolution():
    assert [m.shape[-1] for m in backbones.build("resnet18", 32).stages(torch.zeros(1, 3, 32, 32))] == [32, 16, 8, 4]
    assert [m.shape[-1] for m in backbones.build("resnet18", 224).stages(torch.zeros(1, 3, 224, 224))] == [
        56,
        28,
        14,
        7,
    ]
    assert "3x3 stem" in backbones.describe(backbones.build("resnet18", 32), "resnet18")


def test_width_two_doubles_every_layer():
    one, two = backbones.build("resnet18", 32), backbones.build("resnet18_w2", 32)
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert q.shape[0] == 2 * p.shape[0], name


def test_unknown_name_offers_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        backbones.build("resnet5O")
    assert stop.value.code == 2 and "did you mean 'resnet50'" in capsys.readouterr().err


@pytest.mark.parametrize(("arch", "size"), [("resnet18", 224), ("resnet18", 32), ("resnet50", 32), ("resnet10_16", 32)])
def test_the_two_printed_lines_load_the_export(arch, size, tmp_path):
    path, net = tmp_path / "backbone.pt", backbones.build(arch, size).eval()
    torch.save({"state_dict": net.state_dict()}, path)
    lines, scope = backbones.loading_lines(arch, size, path), {}
    assert len(lines.splitlines()) == 2 and ("torchvision" in lines) == (arch != "resnet10_16")
    exec(lines, scope)
    with torch.no_grad():
        x = torch.randn(2, 3, min(size, 64), min(size, 64))
        assert torch.allclose(scope["net"].eval()(x), net(x), atol=1e-5)


# ============ the networks of "Revisiting Self-Supervised Visual Representation Learning" ============

SMALLEST = ["resnet14v1_k0.5", "resnet14v2_k0.5", "revnet14_k0.5", "vgg11_k0.5"]  # one of each family
LIKE_IT = [*SMALLEST, "resnet10_16"]  # and the class that was there


@pytest.mark.parametrize(
    ("family", "millions"),
    [  # without the head
        ("resnet50v1", (23.5, 93.9, 211.2, 375.4)),
        ("resnet50v2", (23.5, 93.9, 211.2, 375.4)),
        ("revnet50", (5.4, 21.5, 48.3, 85.8)),
        ("vgg19", (34.9, 139.6, 314.0, 558.3)),
    ],
)
def test_parameters_of_the_studys_networks(family, millions, undrawn):
    with torch.device("meta"):
        nets = [backbones.build(f"{family}_k{k}", 224) for k in (4, 8, 12, 16)]
    assert [sum(p.numel() for p in net.parameters()) / 1e6 for net in nets] == pytest.approx(millions, abs=0.06)
    assert [net.dim for net in nets] == [2048, 4096, 6144, 8192]


@pytest.mark.parametrize("task", pretext.PATCHES)
def test_a_vgg_keeps_all_its_poolings_in_the_patch_tasks(task, undrawn):
    """The authors change the strides of ResNets and RevNets only: 45.2 M parameters for k = 8, not 171 M."""
    args = pretext.parse_args(["--data", "imagenet", "--task", task, "--arch", "vgg19_k8"])
    with torch.device("meta"):
        net = backbones.build(pretext.trunk_name(args), pretext.geometry(args.size)[1])
    assert count(net) / 1e6 == pytest.approx(45.2, abs=0.05)


@pytest.mark.parametrize(
    ("task", "size", "arch", "wanted"),
    [
        ("jigsaw", 224, "vgg19_k8_s8", "vgg19_k8_s8"),
        ("jigsaw", 32, "vgg11_k1", "vgg11_k1_s4"),  # patches of 8 px have no room for five
        ("relative", 224, "resnet50v1_k8", "resnet50v1_k8_s8"),
        ("relative", 64, "revnet14_k1_minus", "revnet14_k1_minus_s4"),
        ("jigsaw", 224, "vgg16_bn", "vgg16_bn"),
        ("jigsaw", 224, "mobilenet_v3_small", "mobilenet_v3_small"),
        ("rotation", 224, "vgg19_k8", "vgg19_k8"),
        ("colorization", 224, "resnet50v1_k4", "resnet50v1_k4_s8"),
    ],
)
def test_strides_that_the_tasks_ask_for(task, size, arch, wanted):
    args = pretext.parse_args(["--data", "imagenet", "--task", task, "--size", str(size), "--arch", arch])
    assert pretext.trunk_name(args) == wanted


def test_v1_of_width_four_is_torchvisions_resnet50():
    torch.manual_seed(0)
    ours = backbones.build("resnet50v1_k4", 224)
    torch.manual_seed(0)
    usual = backbones.build("resnet50", 224)  # compared with torchvision's above
    assert list(ours.state_dict()) == list(usual.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), usual.state_dict().values(), strict=True))
    strides = lambda net: [m.stride for m in net.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.MaxPool2d))]
    assert strides(ours) == strides(usual)


def norm(x, w, name, training=True):
    """BatchNorm by its formula, from a state dict."""
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    if not training:
        mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
    scale = w[f"{name}.weight"] / (var + 1e-5).sqrt()
    return (x - mean[:, None, None]) * scale[:, None, None] + w[f"{name}.bias"][:, None, None]


def zero_padded_pool(x):
    x, side = F.pad(x, (1, 1, 1, 1)), (x.shape[-1] + 1) // 2
    return torch.stack(
        [x[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].amax((2, 3)) for i in range(side) for j in range(side)], 2
    ).unflatten(2, (side, side))


def perturbed(name, size):
    """In float64, with BatchNorms that do something, after one batch."""
    torch.manual_seed(0)
    net = backbones.build(name, size).double()
    for p in net.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, 0.5, 0.5)
    net(torch.randn(4, 3, size, size).double())
    return net


def test_resnet_v2_is_its_formula():
    net = perturbed("resnet26v2_k0.5_s32", 64)
    w, x = net.state_dict(), torch.randn(3, 3, 64, 64).double()
    with torch.no_grad():
        maps = [*net.stages(x), net(x)]
    h = zero_padded_pool(F.conv2d(x, w["root.0.weight"], stride=2, padding=3))
    assert h.min() < 0  # so that the padding matters
    for i in range(1, 5):
        for j in range(2):
            u, stride = f"layer{i}.{j}", 2 if i > 1 and j == 0 else 1
            a = norm(h, w, f"{u}.activation.0").relu()
            r = F.conv2d(a, w[f"{u}.residual.0.weight"])
            r = F.conv2d(norm(r, w, f"{u}.residual.1").relu(), w[f"{u}.residual.3.weight"], stride=stride, padding=1)
            r = F.conv2d(norm(r, w, f"{u}.residual.4").relu(), w[f"{u}.residual.6.weight"])
            h = r + (F.conv2d(a, w[f"{u}.downsample.weight"], stride=stride) if j == 0 else h)
        if i == 4:
            h = norm(h, w, "last.0").relu()
        assert torch.allclose(maps[i - 1], h)
    assert torch.allclose(maps[4], h.mean((2, 3)))


@pytest.mark.parametrize("recompute", [True, False])
def test_revnet_is_its_formula(recompute):
    net = perturbed("revnet26_k0.5_s32", 64)
    net.recompute = recompute
    w, x = net.state_dict(), torch.randn(3, 3, 64, 64).double()
    maps = [*net.stages(x), net(x)]
    h = zero_padded_pool(F.conv2d(x, w["root.0.weight"], stride=2, padding=3))
    for i in range(1, 5):
        if i > 1:  # means of 2x2, between zeros
            h = (h[:, :, ::2, ::2] + h[:, :, 1::2, ::2] + h[:, :, ::2, 1::2] + h[:, :, 1::2, 1::2]) / 4
            zeros = torch.zeros_like(h[:, ::2])
            h = torch.cat([zeros, h, zeros], 1)
        for j in range(2):
            half, u = h.shape[1] // 2, f"layer{i}.{j}"
            x1, x2 = h[:, :half], h[:, half:]
            r = F.conv2d(norm(x2, w, f"{u}.0").relu(), w[f"{u}.2.weight"])
            r = F.conv2d(norm(r, w, f"{u}.3").relu(), w[f"{u}.5.weight"], padding=1)
            r = F.conv2d(norm(r, w, f"{u}.6").relu(), w[f"{u}.8.weight"])
            h = torch.cat([x2, x1 + r], 1)  # [y2, y1]
        if i == 4:
            h = norm(h, w, "last.0").relu()
        assert torch.allclose(maps[i - 1], h)
    assert torch.allclose(maps[4], h.mean((2, 3)))


def test_vgg_is_torchvisions_without_biases_then_two_dense_layers():
    net = perturbed("vgg11_k8_s32", 64)
    theirs = make_layers(cfgs["A"], batch_norm=True).double()
    trunk = (p for i in range(1, 6) for p in getattr(net, f"layer{i}").parameters())
    with torch.no_grad():
        for m in theirs:
            if isinstance(m, torch.nn.Conv2d):
                m.weight.copy_(next(trunk))
                m.bias.zero_()
            elif isinstance(m, torch.nn.BatchNorm2d):
                m.weight.copy_(next(trunk))
                m.bias.copy_(next(trunk))
        x = torch.randn(3, 3, 64, 64).double()
        taps, last = net.taps(x), theirs(x)
        w = net.state_dict()
        fc6 = norm(torch.einsum("bchw,dchw->bd", last, w["fc6.0.weight"])[:, :, None, None], w, "fc6.1").relu()
        fc7 = norm(torch.einsum("bcij,dcij->bdij", fc6, w["fc7.0.weight"]), w, "fc7.1").relu()
    assert last.shape == (3, net.channels, 2, 2) and torch.allclose(taps["block5"], last)
    assert torch.allclose(taps["fc6"], fc6) and torch.allclose(taps["pre_logits"], fc7[:, :, 0, 0])


@pytest.mark.parametrize("name", LIKE_IT)
@pytest.mark.parametrize("size", [8, 32, 64])
def test_one_of_each_kind_keeps_the_contract(name, size):
    if size == 8:
        name += "_s2"
    net, x = backbones.build(name, size).eval(), torch.randn(2, 3, size, size)
    with torch.no_grad():
        vector, maps, taps = net(x), net.stages(x), net.taps(x)
    assert vector.shape == (2, net.dim) and maps[-1].shape[1] == net.channels
    assert all(a.shape[-1] >= b.shape[-1] for a, b in itertools.pairwise(maps))
    names = [f"block{i + 1}" for i in range(len(maps))]
    if "vgg" in name:
        names.append("fc6")
    else:
        names.insert(0, "root")
    assert list(taps) == [*names, "pre_logits"]
    assert torch.equal(taps["pre_logits"], vector)
    assert all(torch.equal(taps[f"block{i + 1}"], m) for i, m in enumerate(maps))
    if "vgg" not in name:
        assert net.dim == net.channels and torch.equal(vector, maps[-1].mean((2, 3)))
    (described,) = backbones.describe(net, name).splitlines()
    assert f"{net.dim}-d" in described


@pytest.mark.parametrize("name", ["resnet10_16", "resnet14v1_k0.5", "resnet14v2_k0.5", "revnet14_k0.5", "vgg11_k0.5"])
@pytest.mark.parametrize(
    ("stride", "maps"),  # of 64 px: after the root, then by stage
    [
        (32, (16, 16, 8, 4, 2)),
        (16, (32, 32, 16, 8, 4)),
        (8, (32, 32, 16, 8, 8)),
        (4, (32, 32, 16, 16, 16)),
        (2, (32,) * 5),
    ],
)
def test_total_stride(name, stride, maps):
    net = backbones.build(f"{name}_s{stride}", 64).eval()
    with torch.no_grad():
        taps = net.taps(torch.zeros(1, 3, 64, 64))
    sides = [m.shape[-1] for n, m in taps.items() if n == "root" or n.startswith("block")]
    if "vgg" in name:
        assert sides == [64 // min(2**i, stride) for i in range(1, 6)] and taps["fc6"].shape[2:] == (1, 1)
    else:
        assert tuple(sides) == maps


@pytest.mark.parametrize(
    ("name", "size", "kernel", "side"),
    [
        ("resnet14v1_k1", 112, 7, 4),  # 32
        ("revnet14_k1", 64, 7, 4),  # 16
        ("revnet14_k1", 63, 3, 8),  # 8
        ("resnet14v2_k1", 32, 3, 4),
        ("revnet14_k1", 31, 3, 8),  # 4; ceil(31 / 2 / 2)
        ("resnet14v2_k1", 8, 3, 4),  # 2
        ("resnet18_s4", 32, 3, 8),
        ("resnet18_s8", 64, 7, 8),
        ("resnet10_16_s4", 32, 3, 8),
        ("resnet18_w2_s16", 32, 3, 2),
    ],
)
def test_stride_and_root_follow_the_size(name, size, kernel, side):
    net = backbones.build(name, size).eval()
    with torch.no_grad():
        assert net.stages(torch.zeros(1, 3, size, size))[-1].shape[-1] == side
    assert next(m for m in net.modules() if isinstance(m, torch.nn.Conv2d)).kernel_size == (kernel, kernel)
    assert f"{kernel}x{kernel} stem" in backbones.describe(net, name)


@pytest.mark.parametrize("family", ["resnet14v2", "revnet14"])
def test_minus_leaves_the_last_relu_out(family):
    torch.manual_seed(0)
    full, minus = (backbones.build(f"{family}_k0.5{m}", 16) for m in ("", "_minus"))
    minus.load_state_dict(full.state_dict())
    with torch.no_grad():
        maps, bare = full.stages(x := torch.randn(4, 3, 16, 16)), minus.stages(x)
        assert bare[-1].min() < 0 and torch.equal(bare[-1].relu(), maps[-1])
        assert all(torch.equal(a, b) for a, b in zip(maps[:-1], bare[:-1], strict=True))
        assert torch.equal(minus(x), bare[-1].mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("revnet5O_k4", 64, "did you mean 'revnet50_k4'"),
        ("resnet50v3_k8_s8", 64, "did you mean 'resnet50v"),
        ("resnet50v2", 64, "did you mean 'resnet50"),
        ("resnet18_k4", 64, "unknown architecture"),
        ("resnet18_minus", 64, "unknown architecture"),
        ("revnet50_k-4", 64, "unknown architecture"),
        ("revnet50_k0.3", 64, "2.4 channels"),
        ("revnet50_k0.0625", 64, "0.5 channels"),
        ("resnet50v1_k0", 64, "0 channels"),
        ("vgg11_k0.01", 64, "0.08 channels"),
        ("resnet50v1_k4_minus", 64, "unknown architecture"),
        ("vgg19_k8_minus", 64, "unknown architecture"),
        ("revnet14_k1_s3", 64, "total stride 2 4 8 16 32"),
        ("vgg11_bn_s8", 64, "did you mean 'vgg11_bn'"),
        ("resnet18_s16", 15, "smaller than the total stride 16"),
        ("vgg11_k1_s32", 31, "smaller than the total stride 32"),
        ("revnet14_k1", 1, "smaller than the total stride 2"),
    ],
)
def test_bad_names_and_sizes_get_one_sentence(name, size, words, capsys):
    with pytest.raises(SystemExit) as stop:
        backbones.build(name, size)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


def test_widths_that_are_whole_are_built():
    assert backbones.build("resnet14v1_k0.0625", 16).dim == 32 and backbones.build("revnet14_k0.125", 16).dim == 64


@pytest.mark.parametrize(("arch", "size"), [("revnet14_k0.5_minus_s4", 32), ("vgg11_k0.5", 16), ("resnet50v1_k4", 224)])
def test_the_printed_lines_load_the_studys_networks(arch, size, tmp_path):
    path, net = tmp_path / "backbone.pt", backbones.build(arch, size).eval()
    torch.save({"state_dict": net.state_dict()}, path)
    lines, scope = backbones.loading_lines(arch, size, path), {}
    exec(lines, scope)
    assert ("torchvision" in lines) == (arch == "resnet50v1_k4")
    with torch.no_grad():
        x = torch.randn(2, 3, min(size, 64), min(size, 64))
        assert torch.allclose(scope["net"].eval()(x).flatten(1), net(x), atol=1e-5)


# ============ RevNet: a backward pass that keeps the stages' outputs only ============


def pair(name="revnet26_k1", size=32, dtype=torch.float64):
    """The same network twice, after one batch: with recomputation and with the plain graph."""
    torch.manual_seed(0)
    net = backbones.build(name, size).to(dtype)
    with torch.no_grad():
        net(torch.randn(8, 3, size, size, dtype=dtype))
    plain = copy.deepcopy(net)
    plain.recompute = False
    return net, plain


def gradients(net, x, w):
    """[pixels' gradient, *parameters' gradients] of a function of vectors and maps."""
    x = x.clone().requires_grad_()
    taps = net.taps(x)
    loss = (taps["pre_logits"] * w).sum() + taps["block2"].square().mean() + taps["root"].square().mean()
    return torch.autograd.grad(loss, [x, *(p for p in net.parameters() if p.requires_grad)])


def error(ours, theirs):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


def same_buffers(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.buffers(), b.buffers(), strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "size"), [("revnet50_k1", 32), ("revnet14_k1_minus", 16), ("revnet26_k0.5_s8", 27)])
def test_gradients_are_the_plain_graphs(name, size, training):
    net, plain = pair(name, size)
    net.train(training), plain.train(training)
    before = copy.deepcopy(net)
    x, w = torch.randn(3, 3, size, size).double(), torch.randn(3, net.dim).double()
    assert error(gradients(net, x, w), gradients(plain, x, w)) < 1e-5
    assert same_buffers(net, plain) and same_buffers(net, before) == (not training)  # averages moved once, or never
    assert all(m.track_running_stats for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_in_single_precision(layout):
    net, plain = (n.to(memory_format=layout) for n in pair("revnet50_k1", 32, torch.float32))
    x, w = torch.randn(8, 3, 32, 32).contiguous(memory_format=layout), torch.randn(8, net.dim)
    assert error(gradients(net, x, w), gradients(plain, x, w)) < 0.02  # a ReLU may switch on either side of zero
    assert net.stages(x)[1].is_contiguous(memory_format=layout)


def test_padding_comes_back_as_exact_zeros():
    """At the first BatchNorm of a stage, whose bias starts at 0: with rounding in place of zeros its gradient is
    noise."""
    torch.manual_seed(0)
    net = backbones.build("revnet26_k1", 32)
    net(torch.randn(8, 3, 32, 32)).square().sum().backward()
    for i in (2, 3, 4):
        bias = getattr(net, f"layer{i}")[0][0].bias.grad
        assert not bias[len(bias) // 2 :].any() and bias[: len(bias) // 2].all()


def inverse(stage, y):
    """x2 = y2, x1 = y1 - F(x2). In training mode F uses the statistics of the batch, as the forward pass did."""
    y2, y1 = y.chunk(2, 1)
    for f in reversed(stage):
        y2, y1 = y1 - f(y2), y2
    return torch.cat([y2, y1], 1)


def test_a_deep_stage_is_inverted():
    torch.manual_seed(0)
    stage = backbones.build("revnet50_k4_s8", 32).layer3.train()
    x = torch.randn(4, 1024, 4, 4)
    with torch.no_grad():
        y = stage(x)
        assert torch.equal(y[:, :512], stage[:5](x)[:, 512:])  # y2 is what the last unit did not touch
        assert (inverse(stage, y) - x).norm() < 1e-4 * x.norm()
        assert (inverse(stage.eval(), stage(x)) - x).norm() < 1e-4 * x.norm()


def saved_bytes(net, x):
    """What autograd keeps for the backward pass, parameters aside: each storage once."""
    own, kept = {p.untyped_storage().data_ptr() for p in net.parameters()}, {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        net(x)
    return sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in own)


def test_memory_does_not_grow_with_depth():
    x, found = torch.randn(2, 3, 32, 32), {}
    for units in (14, 50):
        net = backbones.build(f"revnet{units}_k1", 32)
        found[units, True] = saved_bytes(net, x)
        stages = sum(m.numel() * 4 for m in net.stages(x))
        net.recompute = False
        found[units, False] = saved_bytes(net, x)
        # the stages' outputs, the last one also after its ReLU, and a few statistics
        assert stages <= found[units, True] < 1.5 * stages
    assert found[50, True] == found[14, True]
    assert found[50, False] > 1.5 * found[14, False] and found[50, False] > 5 * found[50, True]


def test_nothing_is_kept_without_gradients():
    net, plain = pair("revnet14_k1", 16)
    x, kept = torch.randn(2, 3, 16, 16).double(), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        with torch.no_grad():
            a = net(x)
        with torch.inference_mode():
            b = net.eval()(x)
    assert not kept and a.grad_fn is None and b.is_inference()
    with torch.no_grad():
        assert torch.equal(a, plain(x)) and torch.equal(b, plain.eval()(x))


def test_frozen_stages_get_no_gradients():
    net, plain = pair("revnet14_k1", 16)
    for n in (net, plain):
        n.layer2.requires_grad_(False)
        n.layer3[0][2].weight.requires_grad_(False)
    x, w = torch.randn(3, 3, 16, 16).double(), torch.randn(3, net.dim).double()
    assert error(gradients(net, x, w), gradients(plain, x, w)) < 1e-5


def test_the_mode_of_the_forward_pass_counts():
    net, plain = pair("revnet14_k1", 16)
    x = torch.randn(3, 3, 16, 16).double()
    losses = [n(x).square().sum() for n in (net, plain)]
    net.eval(), plain.eval()
    ours, theirs = (
        torch.autograd.grad(loss, list(n.parameters())) for n, loss in zip((net, plain), losses, strict=True)
    )
    assert error(ours, theirs) < 1e-5 and not net.layer1[0][0].training


def test_weights_changed_before_the_backward_pass_are_noticed():
    net, _ = pair("revnet14_k1", 16)
    loss = net(torch.randn(3, 3, 16, 16).double()).sum()
    with torch.no_grad():
        net.layer1[0][2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside):
    """Residual sums stay in fp32, weights get gradients, also where the backward pass is inside of autocast."""
    net, plain = pair("revnet14_k1", 16, torch.float32)
    net.train(), plain.train()
    x, w, found = torch.randn(16, 3, 16, 16), torch.randn(16, net.dim), []
    for n in (net, plain):
        with torch.autocast("cpu", torch.bfloat16):
            assert {m.dtype for m in n.stages(x)} == {torch.float32}
            loss = (n(x) * w).sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append([p.grad for p in n.parameters()])
    assert error(*found) < 0.2  # bf16 resolves 0.4 %, which the ReLUs behind it enlarge


def test_synchronised_batchnorm(monkeypatch):
    monkeypatch.setattr(parallel, "all_gather", lambda x: x[None])
    net, plain = pair("revnet14_k1", 16)
    net, x = synchronized(net), torch.randn(4, 3, 16, 16).double()
    for n in (net, plain):
        (n(x).square().sum() + n(2 * x).square().sum()).backward()  # two views through the same weights
    assert isinstance(net.layer1[0][0], parallel.SyncBatchNorm)
    assert error(*([b.double() for b in n.buffers()] for n in (net, plain))) < 1e-5
    assert error([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()]) < 1e-5


def test_gradients_reach_the_hooks_of_distributed_training():
    net, plain = pair("revnet14_k1", 16)
    seen, x = [], torch.randn(4, 3, 16, 16).double()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        ddp = torch.nn.parallel.DistributedDataParallel(net)

        def exchange(_, bucket):
            seen.extend(bucket.parameters())
            (future := torch.futures.Future()).set_result(3 * bucket.buffer())
            return future

        ddp.register_comm_hook(None, exchange)
        for n in (ddp, plain):
            n(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert {id(p) for p in seen} == {id(p) for p in net.parameters()}
    assert error([p.grad for p in net.parameters()], [3 * p.grad for p in plain.parameters()]) < 1e-5
