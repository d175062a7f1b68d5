import math
import os
import random

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from helpers import TINY, check_accumulation, check_two_processes, equal, run

import backbones
import checkpoints
import cmc
import data
import evaluate
import runs
import sets

SMALL = ["cmc.py", *TINY, "--limit", "48", "--epochs", "4", "--negatives", "16"]  # 3 steps an epoch, 12 in all


def rows(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def images(n, size=16, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


# ============ colors ============

COLOURS = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0.5]])
IN_LAB = [(100, 0, 0), (0, 0, 0), (53.24, 80.09, 67.20), (87.73, -86.18, 83.18), (32.30, 79.19, -107.86), (53.39, 0, 0)]


def lab(rgb):
    """One color by CIE's definitions, in double precision; the white point is where R = G = B = 1 lies."""
    to_xyz = torch.tensor([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                           [0.0193339, 0.1191920, 0.9503041]]).double()  # fmt: skip
    linear = [((c + 0.055) / 1.055) ** 2.4 if c > 0.04045 else c / 12.92 for c in rgb]
    ratios = ((to_xyz @ torch.tensor(linear).double()) / to_xyz.sum(1)).tolist()
    x, y, z = (t ** (1 / 3) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29 for t in ratios)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def test_views_of_lab_are_known_colors_normalized():
    rgb = torch.cat([COLOURS, images(1, 5)[0].flatten(1).T])
    one, two = (v[:, :, 0, 0] for v in backbones.channel_views(rgb[:, :, None, None], "lab"))
    got = torch.cat([one * 50 + 50, two * torch.tensor([92.208, 101.168]) + torch.tensor([6.025, -6.690])], 1)
    assert torch.allclose(got[:6], torch.tensor(IN_LAB), atol=0.05)
    assert torch.allclose(got, torch.tensor([lab(c) for c in rgb.double().tolist()]), atol=0.05)
    assert max(one.abs().max(), two.abs().max()) < 1.01  # the primaries are as far as it goes
    three = backbones.channel_views(rgb[:, :, None, None], "lab3")
    assert [v.shape[1] for v in three] == [1, 1, 1]
    assert torch.equal(torch.cat(three, 1)[:, :, 0, 0], torch.cat([one, two], 1))


def test_views_of_ydbdr_are_secams():
    rgb = torch.cat([COLOURS, images(1, 5)[0].flatten(1).T])
    y = 0.299 * rgb[:, 0] + 0.587 * rgb[:, 1] + 0.114 * rgb[:, 2]
    db, dr = 1.505 * (rgb[:, 2] - y), -1.902 * (rgb[:, 0] - y)  # its definition by differences of color
    assert torch.allclose(backbones.to_ydbdr(rgb), torch.stack([y, db, dr], 1), atol=1e-3)
    one, two = backbones.channel_views(rgb[:, :, None, None], "ydbdr")
    assert torch.allclose(one[:, 0, 0, 0], (y - 0.457) / 0.5, atol=1e-3)
    assert torch.allclose(two[:, 0, 0, 0], (db + 0.082) / 1.331, atol=2e-3)
    assert torch.allclose(two[:, 1, 0, 0], (dr + 0.052) / 1.333, atol=2e-3)


def test_colors_are_converted_in_fp32():
    x = images(2).bfloat16()
    pairs = zip(*(backbones.channel_views(images, "lab") for images in (x, x.float())), strict=True)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in pairs)


# ============ the split backbone ============


@pytest.mark.parametrize("name", ["resnet10_16_lab", "resnet10_16_lab3", "resnet10_16_s4_ydbdr", "resnet18_lab"])
def test_a_split_backbone_keeps_the_contract(name):
    torch.manual_seed(0)
    net, x = backbones.build(name, 32).eval(), images(2, 32)
    with torch.no_grad():
        features, maps, taps = net(x), net.stages(x), net.taps(x)
    assert features.shape == (2, net.dim) and net.dim == sum(net.widths)
    views, parts = backbones.channel_views(x, net.split), features.split(net.widths, 1)
    assert torch.allclose(taps["pre_logits"], features, atol=1e-6)
    assert maps[-1].shape[1] == net.channels and torch.allclose(maps[-1].mean((2, 3)), features, atol=1e-6)
    whole = backbones.build(name.removesuffix(f"_{net.split}"), 32)
    for a, b in zip(maps, whole.stages(x), strict=True):  # the same maps in size; half the channels for each view
        assert a.shape[2:] == b.shape[2:] and a.shape[1] == b.shape[1] * len(parts) / 2
    assert list(taps) == list(whole.taps(x))
    for f, v, own in zip(net.networks, views, parts, strict=True):
        assert f.conv1.in_channels == v.shape[1] and f.conv1.out_channels == whole.conv1.out_channels // 2
        assert torch.equal(f(v), own)
    assert not torch.equal(net.networks[0].layer1[0].conv1.weight, net.networks[1].layer1[0].conv1.weight)


def test_resnet50_for_a_view_has_half_the_width():
    with torch.device("meta"):
        net = backbones.build("resnet50_lab", 224)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(11.8, abs=0.05)  # the code's v1: 12
    assert net.dim == 2048 and "11.78 M" in backbones.describe(net, "resnet50_lab")


@pytest.mark.parametrize("split", backbones.SPLITS)
def test_each_network_sees_its_channels_only(split, monkeypatch):
    net, x = backbones.build(f"resnet10_16_{split}", 16).eval(), images(3).requires_grad_()
    same = lambda rgb: rgb, (0.0,) * 3, (1.0,) * 3
    monkeypatch.setitem(backbones.SPLITS, split, (same, backbones.SPLITS[split][1]))
    seen = [[0], [1], [2]] if split == "lab3" else [[0], [1, 2]]
    for number, channels in enumerate(seen):
        grad = torch.autograd.grad(net(x).split(net.widths, 1)[number].sum(), x)[0].abs().sum((0, 2, 3))
        assert [c for c in range(3) if grad[c] > 0] == channels


def test_luma_is_all_that_the_first_network_knows():
    net, x = backbones.build("resnet10_16_ydbdr", 16).eval(), 0.4 + 0.2 * images(3)
    to_rgb = torch.linalg.inv(backbones.to_ydbdr(torch.eye(3)).T)  # columns: what a step of Y, Db, Dr is in RGB
    other_colors = x + torch.einsum(
        "rc,bchw->brhw", to_rgb, F.pad(0.2 * images(3, seed=1)[:, 1:] - 0.1, (0, 0, 0, 0, 1, 0))
    )
    brighter = x + 0.1
    (luma, color), (luma_of_colors, colors), (bright, same) = (
        net(v).split(net.widths, 1) for v in (x, other_colors, brighter)
    )
    assert torch.allclose(luma, luma_of_colors, atol=1e-4) and not torch.allclose(color, colors, atol=1e-3)
    assert torch.allclose(color, same, atol=1e-4) and not torch.allclose(luma, bright, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet18_labb", "did you mean 'resnet18_lab'"),
        ("resnet10_61_ydbdr", "did you mean 'resnet10_16_ydbdr'"),
        ("vgg11_bn_lab", "unknown architecture"),
        ("resnet50v1_k4_lab3", "unknown architecture"),
    ],
)
def test_names_that_cannot_be_split(name, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        backbones.build(name, 64)
    assert stopped.value.code == 2 and words in capsys.readouterr().err


# ============ the loss ============


class Given(torch.nn.Module):
    """A backbone whose features, of M views side by side, are what it is given."""

    def __init__(self, views, dim):
        super().__init__()
        self.widths, self.dim = [dim] * views, views * dim

    def forward(self, x):
        return x


def plain(n, views=2, dim=16, temperature=0.2, contrast="nce", graph="full", momentum=0.5):
    """The method on given features: f and g do nothing."""
    torch.manual_seed(0)
    model = cmc.CMC(Given(views, dim), n, dim, temperature, contrast, momentum, graph)
    model.g = torch.nn.ModuleList(torch.nn.Identity() for _ in range(views))
    model.Z.copy_(40.0 + torch.arange(len(model.Z)))
    return model


PAIRS = {
    ("core", 2): [(0, 1)],
    ("full", 2): [(0, 1)],
    ("core", 3): [(0, 1), (0, 2)],
    ("full", 3): [(0, 1), (0, 2), (1, 2)],
}


@pytest.mark.parametrize(("graph", "views"), PAIRS)
def test_losses_equal_naive_loops(graph, views):
    index, negatives = torch.tensor([3, 0, 39, 7, 8]), torch.tensor([1, 2, 2, 30, 7])
    z, n, K, B = rows(views, 5, 16), 40, 5, 5
    ways = [way for i, j in PAIRS[graph, views] for way in ((i, j), (j, i))]  # with L(V1, V2) both ways
    x = z.transpose(0, 1).flatten(1)  # [B, M * D]
    for form in cmc.CONTRASTS:
        model, expected = plain(n, views, contrast=form, graph=graph), 0.0
        assert len(model.Z) == len(ways)
        for (i, j), Z in zip(ways, model.Z.tolist(), strict=True):
            e = (z[i] @ model.bank[j].T / 0.2).double().exp().tolist()  # [B][n]
            for b, own in enumerate(index.tolist()):
                others = [row for row in negatives.tolist() if row != own]  # its own row is no negative of image 7
                if form == "softmax-nce":
                    expected -= math.log(e[b][own] / (e[b][own] + sum(e[b][row] for row in others))) / B
                else:
                    expected -= math.log(e[b][own] / Z / (e[b][own] / Z + K / n)) / B
                    expected -= sum(math.log((K / n) / (e[b][row] / Z + K / n)) for row in others) / B
        assert model((7 * x,), index, negatives).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("form", "views", "K", "temperature", "value"),
    [
        ("softmax-nce", 2, 4096, 0.07, 2 * 9.12),
        ("softmax-nce", 2, 16_384, 0.07, 2 * 10.50),
        ("nce", 2, 4096, 0.07, 2 * 10.1),
        ("nce", 3, 4096, 0.1, 6 * 9.71),
    ],
)
def test_the_first_loss_is_what_unrelated_features_give(form, views, K, temperature, value):
    n = 30_000
    model = plain(n, views, 128, temperature, form)
    index, negatives = torch.randperm(n)[:256], torch.randint(n, (K,))
    got = model((rows(256, views, 128).flatten(1),), index, negatives, first=True).item()
    assert got == pytest.approx(value, rel=0.02)
    assert got == pytest.approx(len(model.directions) * cmc.chance_level(form, n, K, 128, temperature), rel=0.02)


def test_Z_is_n_times_the_mean_of_the_first_batch_for_each_direction_and_stays():
    model, z, index, negatives = plain(50), rows(2, 4, 16), torch.arange(4), torch.arange(10, 20)
    model((z.transpose(0, 1).flatten(1),), index, negatives, first=True)
    Z = model.Z.clone()
    for found, (i, j) in zip(Z.tolist(), [(0, 1), (1, 0)], strict=True):
        e = [math.exp(float(z[i, b] @ model.bank[j, row]) / 0.2) for b in range(4) for row in [b, *range(10, 20)]]
        assert found == pytest.approx(50 * sum(e) / len(e), rel=1e-5)
    assert Z[0] != Z[1]
    model.update_bank()
    model((rows(4, 32, seed=3),), index, negatives)
    assert torch.equal(model.Z, Z) and {"Z", "bank"} <= set(model.state_dict())


# ============ the banks ============


def test_rows_are_unit_and_each_view_writes_its_own_bank_after_the_step():
    model, z, index = plain(50, 3, momentum=0.3), rows(3, 4, 16), torch.tensor([9, 0, 49, 3])
    before = model.bank.clone()
    assert before.shape == (3, 50, 16) and torch.allclose(before.norm(dim=2), torch.ones(3, 50))
    assert before.mean().abs() < 0.05 and not torch.equal(before[0], before[1])
    model((z.transpose(0, 1).flatten(1),), index, torch.arange(10, 20))
    assert torch.equal(model.bank, before)
    model.update_bank()
    for view in range(3):
        for b, row in enumerate(index.tolist()):
            new = 0.3 * before[view, row] + 0.7 * z[view, b]
            assert torch.allclose(model.bank[view, row], new / new.norm(), atol=1e-6)
    untouched = [i for i in range(50) if i not in index.tolist()]
    assert torch.equal(model.bank[:, untouched], before[:, untouched]) and not model.seen


def test_draws_are_one_set_for_all_and_new_at_every_step():
    draw = lambda step, seed=0: cmc.draw_negatives(40, 8, seed, step, "cpu")
    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4)) and not torch.equal(draw(3), draw(3, 1))


# ============ the model ============


def build(contrast="nce", split="lab3", graph="full", n=48):
    torch.manual_seed(0)
    model = cmc.CMC(backbones.build(f"resnet10_16_{split}", 16), n, 8, 0.1, contrast, graph=graph)
    model.Z.fill_(60.0)
    return model


def batch(n):
    return [images(n)], torch.arange(n), torch.arange(20, 30)


def test_a_direction_trains_its_own_view_and_no_bank():
    model = build("softmax-nce", "lab")
    model(*batch(8)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert not model.bank.requires_grad and not model.Z.requires_grad
    model.zero_grad()
    model.directions, model.Z = [(0, 1)], model.Z[:1]  # z1 among the rows of bank 2
    model(*batch(8)).backward()
    reached = lambda k: sum(p.grad.abs().sum() for p in [*model.f.networks[k].parameters(), *model.g[k].parameters()])
    assert reached(0) > 0 and reached(1) == 0


@pytest.mark.parametrize("contrast", cmc.CONTRASTS)
def test_the_loss_falls_and_banks_stay_fp32(contrast):
    model, losses = build(contrast, "lab"), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(20):
        with torch.autocast("cpu", torch.bfloat16, enabled=step == 0):
            value = model([images(32)], torch.arange(32), torch.arange(20, 48), first=step == 0)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        model.update_bank()
        losses.append(value.item())
    assert losses[-1] < 0.7 * losses[0]
    assert model.bank.dtype == torch.float32 and torch.allclose(model.bank.norm(dim=2), torch.ones(2, 48), atol=1e-6)
    assert model.figures["own_cosine"] > 0.3 and set(model.figures) == {"feature_std", "own_cosine", "view_cosine"}


def test_two_processes_see_the_loss_and_gradients_of_one(tmp_path):
    check_two_processes(build, batch, tmp_path)


def test_accumulated_gradients_are_those_of_the_mean():
    check_accumulation(build, batch)


def half(rank, port, out):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(updated(slice(rank * 8, rank * 8 + 8)), f"{out}{rank}")
    torch.distributed.destroy_process_group()


def updated(rows):
    """Banks and Z after two updates with the images `rows`."""
    model = build().eval()  # BatchNorm aside
    for step in range(2):
        model([images(16, seed=step)[rows]], torch.arange(16)[rows] * 3, torch.arange(20, 30), first=step == 0)
        model.update_bank()
    return model.bank, model.Z


def test_two_processes_write_the_banks_and_Z_of_one(tmp_path):
    mp.start_processes(half, (random.randint(20000, 40000), tmp_path / "rank"), 2, start_method="forkserver")
    (one, two), (bank, Z) = (torch.load(tmp_path / f"rank{rank}") for rank in range(2)), updated(slice(16))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])  # the two agree bit for bit
    assert torch.allclose(one[0], bank, atol=1e-6) and torch.allclose(one[1], Z, rtol=1e-5)
    assert (bank != build().bank).any(2).sum() == 3 * 16


# ============ whole runs ============

UNBROKEN = [*SMALL, "--epochs", "1", "--split", "lab3", "--graph", "full"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    return out, run(*UNBROKEN, "--out", out)[0]


def test_the_export_evaluates_as_joined_features_of_all_networks(unbroken):
    out, printed = unbroken
    net, preprocess, about, _ = checkpoints.open_backbone(str(out), None, 0, 0)
    assert about["arch"] == "resnet10_16_lab3" and preprocess["mean"] == (0, 0, 0) and preprocess["std"] == (1, 1, 1)
    some = sets.load("shapes", split="test", limit=0)
    some = sets.pick(some, torch.arange(20))
    features, _ = evaluate.extract(net, some, preprocess, torch.device("cpu"))
    model = cmc.CMC(backbones.build("resnet10_16_lab3", 32), 48, graph="full")
    model.load_state_dict(runs.load(out / "checkpoint.pt")["model"])
    with torch.no_grad():
        channels = (backbones.to_lab(some.images / 255) - torch.tensor([50, 6.025, -6.69])[:, None, None]).split(1, 1)
        stds = 50, 92.208, 101.168
        expected = [f(c / s) for f, c, s in zip(model.eval().f.networks, channels, stds, strict=True)]
    assert features.shape == (20, 192) and torch.allclose(features, torch.cat(expected, 1), atol=1e-4)
    lines = [line for line in printed.splitlines() if "load_state_dict" in line or line.startswith("import torch")]
    scope = {}
    exec("\n".join(lines), scope)
    assert equal(dict(scope["net"].state_dict()), dict(net.state_dict()))


def test_the_random_network_beside_it_sees_images_as_it_does():
    net, preprocess, _, _ = checkpoints.open_backbone("random:resnet10_16_lab", None, 32, 0)
    assert preprocess == {"mean": (0, 0, 0), "std": (1, 1, 1), "size": 32, "interpolation": "bilinear"}
    assert checkpoints.open_backbone("random:resnet10_16", None, 32, 0)[1]["mean"] == data.MEAN and net.dim == 128


@pytest.fixture
def main(capsys):
    """What the script prints at these flags (stdout, stderr), with this exit code."""

    def attempt(*flags, code=2):
        if code:
            with pytest.raises(SystemExit) as stopped:
                cmc.main([*TINY, "--negatives", "16", *map(str, flags)])
            assert stopped.value.code == code
        else:
            cmc.main([*TINY, "--negatives", "16", *map(str, flags)])
        return capsys.readouterr()

    return attempt


def test_dry_run(main, tmp_path):
    out = main("--dry-run", "--arch", "resnet10_16_lab", "--out", tmp_path / "run", code=0).out
    assert "resnet10_16_lab, 0." in out and "128-d" in out and "2 banks 64 x 128, 0.1 MB" in out
    expected = 2 * math.log(1 + 16 * math.exp(1 / (2 * 128 * 0.1**2)))
    assert f"chance-level loss {expected:.2f}" in out and not (tmp_path / "run").exists()


def test_networks_get_images_in_0_to_1_as_they_are():
    for recipe in cmc.RECIPES.values():
        views = [data.view(16, **v) for v in recipe["views"]]
        _, xs = next(data.Loader(sets.load("shapes", limit=8), views, 8, 0).epoch(0))
        assert len(xs) == 1 and xs[0].min() >= 0 and xs[0].max() <= 1 and xs[0].std() > 0.05
