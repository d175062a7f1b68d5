import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.models.vgg import cfgs, make_layers

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
    with torch.device("meta"):
        ours, theirs = backbones.build(name, 224), getattr(torchvision.models, name)()
    theirs.classifier = torch.nn.Identity()
    shapes = lambda net: [(k, v.shape) for k, v in net.state_dict().items()]
    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize("name", [n for n in backbones.PLAIN if "101" not in n and "152" not in n])
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


# ============ the networks of "Revisiting Self-Supervised Visual Representation Learning" ============

SMALLEST = ["resnet14v1_k0.5", "resnet14v2_k0.5", "revnet14_k0.5", "vgg11_k0.5"]  # one of each family
LIKE_IT = [*SMALLEST, "resnet10_16", "alexnet_bn"]  # and the classes that were there


@pytest.mark.parametrize(
    ("family", "millions"),
    [  # without the head
        ("resnet50v1", (23.5, 93.9, 211.2, 375.4)),
        ("resnet50v2", (23.5, 93.9, 211.2, 375.4)),
        ("revnet50", (5.4, 21.5, 48.3, 85.8)),
        ("vgg19", (34.9, 139.6, 314.0, 558.3)),
    ],
)
def test_parameters_of_the_studys_networks(family, millions):
    with torch.device("meta"):
        nets = [backbones.build(f"{family}_k{k}", 224) for k in (4, 8, 12, 16)]
    assert [sum(p.numel() for p in net.parameters()) / 1e6 for net in nets] == pytest.approx(millions, abs=0.06)
    assert [net.dim for net in nets] == [2048, 4096, 6144, 8192]


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
        if name == "alexnet_bn":
            pytest.skip("it needs 32 px")
        name += "_s2"
    net, x = backbones.build(name, size).eval(), torch.randn(2, 3, size, size)
    with torch.no_grad():
        vector, maps, taps = net(x), net.stages(x), net.taps(x)
    assert vector.shape == (2, net.dim) and maps[-1].shape[1] == net.channels
    assert all(a.shape[-1] >= b.shape[-1] for a, b in itertools.pairwise(maps))
    names = [f"block{i + 1}" for i in range(len(maps))]
    if "vgg" in name:
        names.append("fc6")
    elif name != "alexnet_bn":
        names.insert(0, "root")
    assert list(taps) == [*names, "pre_logits"]
    assert torch.equal(taps["pre_logits"], vector)
    assert all(torch.equal(taps[f"block{i + 1}"], m) for i, m in enumerate(maps))
    if "vgg" not in name:
        assert net.dim == net.channels and torch.equal(vector, maps[-1].mean((2, 3)))
    (described,) = backbones.describe(net, name, size).splitlines()
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
    assert f"{kernel}x{kernel} root" in backbones.describe(net, name, size)


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
        ("revnet50_k0.0625", 64, "0.5 channels; K must be a multiple of 1/8"),
        ("resnet50v1_k0", 64, "0 channels"),
        ("vgg11_k0.01", 64, "0.08 channels"),
        ("resnet50v1_k4_minus", 64, "_minus"),
        ("vgg19_k8_minus", 64, "_minus"),
        ("revnet14_k1_s3", 64, "not one of 2, 4, 8, 16, 32"),
        ("vgg11_bn_s8", 64, "_s8 is for"),
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
    """At the first BatchNorm of a stage, whose bias starts at 0: with rounding in place of zeros its gradient is noise."""
    torch.manual_seed(0)
    net = backbones.build("revnet26_k1", 32)
    net(torch.randn(8, 3, 32, 32)).square().sum().backward()
    for i in (2, 3, 4):
        bias = getattr(net, f"layer{i}")[0][0].bias.grad
        assert not bias[len(bias) // 2 :].any() and bias[: len(bias) // 2].all()


def test_a_deep_stage_is_inverted():
    torch.manual_seed(0)
    stage = backbones.build("revnet50_k4_s8", 32).layer3.train()
    x = torch.randn(4, 1024, 4, 4)
    with torch.no_grad():
        y = stage(x)
        assert torch.equal(y[:, :512], stage[:5](x)[:, 512:])  # y2 is what the last unit did not touch
        assert (stage.inverse(y) - x).norm() < 1e-4 * x.norm()
        assert (stage.eval().inverse(stage(x)) - x).norm() < 1e-4 * x.norm()


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


def test_synchronised_batchnorm():
    net, plain = pair("revnet14_k1", 16)
    net, x = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net), torch.randn(4, 3, 16, 16).double()
    for n in (net, plain):
        (n(x).square().sum() + n(2 * x).square().sum()).backward()  # two views through the same weights
    assert isinstance(net.layer1[0][0], torch.nn.SyncBatchNorm) and same_buffers(net, plain)
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
