"""What evaluate.py offers beside the usual probes: trunks that see what they were trained on, shares of the labels, every
depth, a hidden layer, the study's L-BFGS, and late decays."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, write_images
from torch import nn

import backbones
import data
import evaluate
import runs

sys.path.append(str(ROOT / "benchmarks"))
import probes

CPU = torch.device("cpu")
SEEN = {"mean": evaluate.HALF, "std": evaluate.HALF, "size": 24, "interpolation": "bilinear"}


def clusters(n, classes=5, d=16, spread=0.8, seed=0):
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=g)
    return centres[y] + spread * torch.randn(n, d, generator=g), y


class Net(nn.Module):
    """A backbone with two maps and a vector; only `useful` tells the brightest channel, which `colours` are about."""

    dim = 4

    def __init__(self, useful="block1"):
        super().__init__()
        self.useful, self.scale = useful, nn.Parameter(torch.ones(()))

    def taps(self, x):
        told, noise = x * self.scale, x.flip(2)[:, :1] - x[:, :1]  # of noise a mean over an image says nothing
        maps = {"root": noise.expand(-1, 5, -1, -1), "block1": noise, "pre_logits": noise.mean((2, 3)).expand(-1, 4)}
        return maps | {self.useful: told if self.useful != "pre_logits" else F.pad(told.mean((2, 3)), (0, 1))}

    def forward(self, x):
        return self.taps(x)["pre_logits"]


def colours(n=96, classes=3, seed=0, size=12):
    """An easy set in memory: each class brightens a channel of noise."""
    x = torch.randint(0, 120, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    y = torch.arange(n) % classes
    x[torch.arange(n), y % 3] += 100
    return data.Images("colours", x, y, [f"class {c}" for c in range(classes)])


def refused(capsys, call, *words):
    """The call ends the program with exit code 2 and one sentence that has these words."""
    with pytest.raises(SystemExit) as stop:
        call()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and all(word in err for word in words), err


# ============ what a network was trained to see ============


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize(("size", "patch", "cell"), [(24, 8, 8), (37, 8, 11), (36, 7, 12)])
def test_patches_equal_a_loop(standardise, size, patch, cell):
    torch.manual_seed(0)
    f, x = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.rand(2, 3, size, size)
    f.dim = 5
    border, inside = round((size - 3 * cell) / 2), (cell - patch) // 2
    expected = torch.zeros(2, 5)
    for b in range(2):
        for i in range(3):
            for j in range(3):
                top, left = (border + cell * k + inside for k in (i, j))
                p = x[b, :, top : top + patch, left : left + patch]
                p = (p - p.mean()) / p.std(correction=0) if standardise else p
                expected[b] += f(p[None])[0] / 9
    trunk = evaluate.Trunk(f, standardise=standardise, patch=patch, cell=cell)
    assert trunk.dim == 5 and torch.allclose(trunk(x), expected, atol=1e-5)


def test_whole_images_are_standardised_and_lightness_is_that_of_lab():
    f = nn.Flatten()
    f.dim = 3 * 16
    x = torch.rand(4, 3, 4, 4) * 2 - 1
    seen = evaluate.Trunk(f, standardise=True)(x)
    assert seen.mean(1).abs().max() < 1e-5 and torch.allclose(seen.std(1, correction=0), torch.ones(4), atol=1e-5)
    seen = evaluate.Trunk(f, lightness=True)(x).view(4, 3, 4, 4)
    linear = (((x / 2 + 0.5).double() + 0.055) / 1.055).pow(2.4).where(x / 2 + 0.5 > 0.04045, (x / 2 + 0.5) / 12.92)
    y = (linear * torch.tensor([0.2126, 0.7152, 0.0722]).view(3, 1, 1)).sum(1)
    lightness = 116 * torch.where(y > 216 / 24389, y.pow(1 / 3), (24389 / 27 * y + 16) / 116) - 16
    for channel in range(3):
        assert torch.allclose(seen[:, channel].double(), (lightness - 50) / 50, atol=1e-3)
    white = evaluate.Trunk(f, lightness=True)(torch.ones(1, 3, 4, 4))
    assert torch.allclose(white, torch.ones(1, 48), atol=1e-4)


def test_a_trunk_comes_from_what_a_checkpoint_says(capsys):
    f, patches = Net(), {"patch": 8, "cell": 8, "standardise": True}
    assert evaluate.as_trained(f, SEEN) is f and evaluate.as_trained(f, SEEN | {"sees": {}}) is f
    trunk = evaluate.as_trained(f, SEEN | {"sees": patches})
    assert trunk.f is f and (trunk.patch, trunk.cell, trunk.standardise, trunk.lightness) == (8, 8, True, False)
    assert evaluate.as_trained(f, SEEN | {"sees": {"lightness": True}}, 48).lightness  # any size
    refused(capsys, lambda: evaluate.as_trained(f, SEEN | {"sees": patches}, 48), "48 px", "24 px")
    refused(capsys, lambda: evaluate.as_trained(f, SEEN | {"size": 23, "sees": patches}), "8 px", "23 px")
    refused(capsys, lambda: evaluate.as_trained(f, SEEN | {"sees": {"patch": 8, "cell": 7}}), "7 px")


@pytest.mark.parametrize(
    ("arch", "sees", "words"),
    [
        ("resnet18", {}, "RGB images, 32 px (bilinear), (x / 255 - mean) / std: mean (0.485, 0.456, 0.406)"),
        ("resnet10_16", {"patch": 8, "cell": 11, "standardise": True}, "patches of 8 px of them, from 3 x 3 cells of 11 px"),
        ("resnet10_16", {"patch": 8, "cell": 11, "standardise": True}, "each patch to mean 0, deviation 1"),
        ("resnet10_16_ln", {"patch": 8, "stride": 4, "grey": True}, "in grey; the network takes patches of 8 px"),
        ("resnet10_16", {"standardise": True}, "each image to mean 0, deviation 1"),
        ("resnet10_16", {"lightness": True}, "in lightness alone"),
        ("resnet10_16_lab", {}, "makes lab channels of them"),
    ],
)
def test_the_third_printed_line_says_what_images_must_look_like(tmp_path, arch, sees, words):
    size, seen = sees.get("patch", 32), {"mean": data.MEAN, "std": data.STD, "size": 32, "interpolation": "bilinear"}
    net, path = backbones.build(arch, size).eval(), tmp_path / "backbone.pt"
    torch.save({"state_dict": net.state_dict()}, path)
    lines, scope = backbones.loading_lines(arch, size, path, seen | {"sees": sees}), {}
    assert len(lines.splitlines()) == 3 and words in lines.splitlines()[2]
    assert ("patches" in lines) == ("patch" in sees)
    exec(lines, scope)
    x = torch.rand(2, 3, size, size)
    assert torch.allclose(scope["net"].eval()(x), net(x), atol=1e-5)


# ============ memory ============


def test_no_probe_takes_a_copy_of_the_features(monkeypatch):
    """Peaks by torch's own count of allocations, features included: 1.3 x at most, and of k-NN the parts that it says."""
    x, y = clusters(20_000, classes=10, d=256)
    few = x[:500], y[:500]
    peak = lambda f: 1 + probes.peak_bytes(f, CPU) / x.nbytes
    assert peak(lambda: x + 1) == pytest.approx(2)  # the count itself
    assert peak(lambda: evaluate.linear_sgd(x, y, *few, epochs=1)) < 1.3
    monkeypatch.setattr(evaluate.nearest, "__defaults__", (*evaluate.nearest.__defaults__[:-1], 2000 * 256))
    assert peak(lambda: evaluate.knn(x, y, *few)) < 1.6  # a tenth, normalised and as it comes; 500 x 2000 cosines are a fifth
    images = data.Images("numbers", torch.zeros(20_000, 3, 1, 1, dtype=torch.uint8), y)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(3, 256))
    seen = SEEN | {"size": 1}
    assert peak(lambda: evaluate.extract(wide, images, seen, CPU)) < 1 + 1.3
    whole, most = 4 * 3 * 256, []  # three layers, and room for one of them
    taps = Net()
    taps.taps = lambda x: {k: torch.zeros(len(x), 256) + x.mean() for k in ("root", "block1", "pre_logits")}
    depths = evaluate.Depths(taps, [], 1)
    monkeypatch.setattr(evaluate, "linear_sgd", lambda x, *_, **__: most.append(x.shape[1]) or {})
    monkeypatch.setattr(evaluate, "room", lambda device: (len(x) + 500) * whole - 1)
    test = data.pick(images, torch.arange(500))
    assert peak(lambda: evaluate.depth(depths, images, test, seen, CPU)) < 1 + 1.3 and most == [256] * 3
    monkeypatch.setattr(evaluate, "room", lambda device: (len(x) + 500) * whole)
    assert peak(lambda: evaluate.depth(depths, images, test, seen, CPU)) > 1 + 3 and len(depths.shapes) == 3


def test_features_go_where_there_is_room(monkeypatch):
    gpu, n = torch.device("cuda", 0), 1000
    rooms = {"cuda": 0, "cpu": 0}
    monkeypatch.setattr(evaluate, "room", lambda device: rooms[device.type])
    for on_gpu, on_cpu, where in [(4 * n, 0, (gpu, 32)), (4 * n - 1, 9 * n, (gpu, 16)), (2 * n, 9 * n, (gpu, 16)),
                                  (2 * n - 1, 4 * n, (CPU, 32)), (0, 4 * n - 1, (CPU, 16)), (0, 0, (CPU, 16))]:  # fmt: skip
        rooms |= {"cuda": on_gpu, "cpu": on_cpu}
        found = evaluate.storage(n, gpu)
        assert (found["device"], found["dtype"].itemsize * 8) == where


def test_half_of_the_free_memory_of_the_poorest_process_counts(monkeypatch):
    memory = {"mem_get_info": (600, 1000), "memory_reserved": 300, "memory_allocated": 100}
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert evaluate.room(torch.device("cuda")) == (600 + 300 - 100) / 2
    poor = lambda tensor, op: tensor.fill_(7)
    group = SimpleNamespace(is_initialized=lambda: True, all_reduce=poor, ReduceOp=SimpleNamespace(MIN=None))
    monkeypatch.setattr(evaluate, "dist", group)
    assert evaluate.room(CPU) == 7


def test_probes_of_fp16_features_say_so_and_find_nearly_the_same(monkeypatch):
    train, test = colours(300), colours(150, seed=1)
    torch.manual_seed(0)
    net, said = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 8)), []
    every = ("knn", "linear", "lbfgs")
    pairs = [evaluate.extract(net, s, SEEN, CPU) for s in (train, test)]
    full = evaluate.probe(*pairs, every, say=said.append)
    monkeypatch.setattr(evaluate, "room", lambda device: 0)
    halves = [evaluate.extract(net, s, SEEN, CPU) for s in (train, test)]
    assert halves[0][0].dtype == torch.float16 and torch.allclose(halves[0][0].float(), pairs[0][0], atol=1e-3)
    half = evaluate.probe(*halves, every, say=said.append, amp=True)
    for name in ("linear", "lbfgs"):
        assert half[name]["top1"] == pytest.approx(full[name]["top1"], abs=5) and full[name]["top1"] > 60
    assert evaluate.mlp_probe(*halves[0], *halves[1], hidden=16, passes=3)["top1"] > 60
    assert half["knn"]["20"]["weighted"] == pytest.approx(full["knn"]["20"]["weighted"], abs=3)
    assert sum("of a fp32 backbone, kept in fp32 on cpu" in line for line in said) == 3  # under each probe
    assert sum("of a bf16 backbone, kept in fp16 on cpu" in line for line in said) == 3
    curves = [evaluate.late_decays(*a, *b, (2,)) for a, b in (pairs, halves)]
    assert curves[0][2] == pytest.approx(curves[1][2], abs=5)
    huge = nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 4), nn.Hardtanh(1e6, 2e6))
    assert evaluate.extract(huge, test, SEEN, CPU)[0].isfinite().all()


def test_two_processes_extract_what_one_does(monkeypatch):
    images, net = colours(7), nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 5))
    images.labels[5] = -1
    alone, kept = evaluate.extract(net, images, SEEN, CPU), {}

    def broadcast(tensor, source):  # the processes one after the other: the last finds what the first has sent
        if source == rank:
            kept[source, tensor.dtype] = tensor.clone()
        elif (source, tensor.dtype) in kept:
            tensor.copy_(kept[source, tensor.dtype])

    group = SimpleNamespace(is_initialized=lambda: True, get_world_size=lambda: 2, get_rank=lambda: rank, broadcast=broadcast,
                            all_reduce=lambda *_: None, ReduceOp=SimpleNamespace(MIN=None))  # fmt: skip
    monkeypatch.setattr(evaluate, "dist", group)
    for rank in (1, 0):  # noqa: B007, `group` reads it
        found = evaluate.extract(net, images, SEEN, CPU, batch_size=3)
    assert torch.allclose(found[0], alone[0], atol=1e-5) and torch.equal(found[1], alone[1])


# ============ settings are chosen on images that training does not see ============


def by_heart(x, y, classes, lrs, *_):
    """In the place of `fit_mlp`: networks that know what they have seen, and guess the nearest of it."""
    return [lambda z: F.one_hot(y[torch.cdist(z, x).argmin(1)], classes).float() for _ in lrs]


@pytest.mark.parametrize("probe", [evaluate.linear_sgd, evaluate.linear_lbfgs, evaluate.mlp_probe])
def test_the_grid_is_judged_on_images_that_it_did_not_train_on(probe, monkeypatch):
    monkeypatch.setattr(evaluate, "fit_mlp", by_heart)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 400, generator=g), torch.randint(4, (200,), generator=g)  # nothing but learning by heart
    r = probe(x, y, x, y)
    assert r["top1"] > 90 and max(r["grid"].values()) < 60  # 25 by chance, on 20 images


@pytest.mark.parametrize("probe", [evaluate.linear_lbfgs, evaluate.mlp_probe])
def test_features_are_standardised_by_those_of_training(probe, monkeypatch):
    monkeypatch.setattr(evaluate, "fit_mlp", by_heart)
    (x, y), (tx, ty) = clusters(600), clusters(300, seed=1)
    one = ty == 2  # of one class alone the mean is another
    assert probe(x, y, tx[one], ty[one])["top1"] > 90


# ============ every depth ============


def test_maps_are_pooled_to_the_sizes_of_the_study():
    maps = {(64, 56): 11, (256, 56): 5, (512, 28): 4, (1024, 14): 2, (2048, 7): 1, (128, 8): 8}
    for (channels, side), pooled in maps.items():
        x = torch.randn(1, channels, side, side)
        small = evaluate.shrink(x, 9000)
        assert small.shape == (1, channels, pooled, pooled)
        k = 1 if pooled == side else math.ceil(math.sqrt(channels * side * side / 9000))
        assert small[0, 3, pooled - 1, 0] == x[0, 3, (pooled - 1) * k : pooled * k, :k].max()
    vector = torch.randn(2, 9999)
    assert evaluate.shrink(vector, 9000) is vector
    assert evaluate.shrink(torch.randn(2, 64, 2, 2), 16).shape == (2, 64, 1, 1)  # the window stays inside the map


def test_taps_of_patches_are_averaged_after_pooling():
    x, net = torch.rand(2, 3, 24, 24), Net("root")
    taps = evaluate.Trunk(net, patch=8, cell=8).taps(x, most=50)
    patches = [x[:, :, i : i + 8, j : j + 8] for i in (0, 8, 16) for j in (0, 8, 16)]
    expected = torch.stack([F.max_pool2d(p, 2) for p in patches]).mean(0)  # 3 x 8 x 8 = 192 features: windows of 2
    assert list(taps) == ["root", "block1", "pre_logits"] and torch.allclose(taps["root"], expected, atol=1e-6)
    assert taps["block1"].shape == (2, 1, 4, 4) and taps["pre_logits"].shape == (2, 4)


def by_hand(net, name, most, train, test):
    """The linear probe of one layer alone."""
    features = []
    for s in (train, test):
        with torch.no_grad():
            features.append(evaluate.shrink(net.taps(data.normalise(s.images / 255, evaluate.HALF, evaluate.HALF))[name], most))
    (x, tx), y, ty = (f.flatten(1) for f in features), train.labels, test.labels
    return evaluate.linear_sgd(x, y, tx, ty, decays=(0.0,))


@pytest.mark.parametrize("useful", ["block1", "pre_logits"])
def test_the_layer_that_tells_the_class_is_found(useful):
    train, test, net, seen = colours(), colours(60, seed=1), Net(useful), SEEN | {"size": 12}
    depths = evaluate.Depths(net, [], 12, most=100)
    assert list(depths.shapes) == ["root", "block1", "pre_logits"] and depths.shapes["pre_logits"] == (4,)
    results = evaluate.depth(depths, train, test, seen, CPU)
    assert max(results, key=lambda name: results[name]["top1"]) == useful and results[useful]["top1"] > 95
    for name, r in results.items():
        alone = by_hand(net, name, 100, train, test)
        assert r["features"] == math.prod(r["shape"]) <= 100
        assert r["grid"] == pytest.approx(alone["grid"]) and r["top1"] == pytest.approx(alone["top1"])


def test_only_layers_that_exist_and_were_asked_for(capsys):
    depths = evaluate.Depths(Net(), ["pre_logits", "root"], 12)
    assert list(depths.shapes) == ["root", "pre_logits"]  # in order of depth
    assert depths(torch.rand(2, 3, 12, 12)).shape == (2, 5 * 144 + 4)
    refused(capsys, lambda: evaluate.Depths(Net(), ["blok1"], 12), "'block1'", "root, block1, pre_logits")
    plain = nn.Linear(2, 2)
    plain.dim = 2
    refused(capsys, lambda: evaluate.Depths(plain, [], 12), "taps")


# ============ a hidden layer ============


def test_a_hidden_layer_learns_what_no_linear_probe_can():
    def xor(n, seed):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(n, 6, generator=g)
        return x, (x[:, 0] * x[:, 1] > 0).long()

    train, test = xor(1000, 0), xor(500, 1)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    r = evaluate.mlp_probe(*train, *test, hidden=64)
    assert torch.equal(torch.get_rng_state(), before)  # the program's own random numbers go on as they were
    assert r["top1"] > 88 and evaluate.linear_sgd(*train, *test)["top1"] < 62
    torch.rand(5)
    assert evaluate.mlp_probe(*train, *test, hidden=64) == r
    wrong = evaluate.mlp_probe(*train, test[0], 1 - test[1], hidden=64)
    assert wrong["grid"] == r["grid"] and wrong["lr"] == r["lr"]  # chosen without the test set
    assert wrong["top1"] == pytest.approx(100 - r["top1"], abs=1e-3)


def test_the_hidden_layers_of_several_rates_do_not_mix():
    x, y = clusters(64)
    together = evaluate.fit_mlp(x, y, 5, [0.0, 1e-3], 1, 16, 32, seed=3)
    (start,) = evaluate.fit_mlp(x, y, 5, [0.0], 1, 16, 32, seed=3)
    assert torch.equal(together[0][0].weight, start[0].weight) and not torch.equal(together[1][0].weight, start[0].weight)
    assert not together[1].training and isinstance(together[1][2], nn.Dropout) and together[1][2].p == 0.5


# ============ L-BFGS as in the study ============


def test_the_studys_penalty_is_100_by_features_and_classes():
    (x, y), (tx, ty) = clusters(200, spread=1.5), clusters(100, spread=1.5, seed=1)
    x, tx = 2 * x, 2 * tx  # as they are: the scale counts
    r = evaluate.linear_lbfgs(x, y, tx, ty, penalties="study")
    assert r["penalty"] == pytest.approx(100 / (16 * 5)) and r["grid"] == {}
    w, b = torch.zeros(16, 5, dtype=torch.double), torch.zeros(5, dtype=torch.double)
    x, tx, target = x.double(), tx.double(), F.one_hot(y, 5)
    for _ in range(3000):  # plain gradient descent
        error = ((x @ w + b).softmax(1) - target) / len(x)
        w, b = w - 0.05 * (x.T @ error + 1.25 * w), b - 0.05 * error.sum(0)
    top1 = 100 * ((tx @ w + b).argmax(1) == ty).double().mean()
    fitted, _ = evaluate.fit_lbfgs(x.float(), y, 5, r["penalty"], iterations=800)
    assert torch.allclose(fitted.double(), w, atol=1e-3) and r["top1"] == pytest.approx(top1.item(), abs=1.01)


def test_a_given_penalty_is_used_on_standardised_features():
    (x, y), (tx, ty) = clusters(200, spread=2.0), clusters(100, spread=2.0, seed=1)
    r = evaluate.linear_lbfgs(5 * x - 2, y, 5 * tx - 2, ty, penalties=[0.03])
    w, b = evaluate.fit_lbfgs((x - x.mean(0)) / x.std(0), y, 5, 0.03)
    top1 = 100 * (((tx - x.mean(0)) / x.std(0) @ w + b).argmax(1) == ty).float().mean()
    assert r["penalty"] == 0.03 and r["grid"] == {} and r["top1"] == pytest.approx(top1.item(), abs=1.01)


# ============ late decays ============


def test_a_branch_equals_a_run_from_scratch_and_torchs_sgd():
    (x, y), (tx, ty) = clusters(100, spread=3.0), clusters(4000, spread=3.0, seed=1)
    curves = evaluate.late_decays(x, y, tx, ty, (3, 1, 3), batch_size=32)
    assert list(curves) == [1, 3] and [len(c) for c in curves.values()] == [41, 43]
    assert evaluate.late_decays(x, y, tx, ty, (3,), batch_size=32)[3] == curves[3]
    assert curves[1][0] == curves[3][0] and curves[1] != curves[3][:41]
    head = nn.Linear(16, 5)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1 * 32 / 256, momentum=0.9)
    schedule, curve = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 23], 0.1), []
    for epoch in range(43):
        for rows in torch.randperm(100, generator=data.generator(0, "late decays", epoch))[:96].view(3, 32):
            optimizer.zero_grad()
            F.cross_entropy(head(x[rows]), y[rows]).backward()
            optimizer.step()
        schedule.step()
        curve.append(100 * (head(tx).argmax(1) == ty).float().mean().item())
    assert curves[3] == pytest.approx(curve, abs=0.051)  # two images of 4000 with all but equal scores


# ============ the command ============


def command(monkeypatch, *args):
    """evaluate.py as a user calls it, in this process."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args), "--device", "cpu", "--workers", "0", "--no-amp"])
    evaluate.main()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a random network that sees patches, and 120 images that it was "trained" on."""
    out = tmp_path_factory.mktemp("probes") / "run"
    folder = write_images(out.parent / "images", 120, classes=3, size=24)
    out.mkdir()
    torch.manual_seed(0)
    sees = {"patch": 8, "cell": 8, "standardise": False}
    about = {"method": "pretext", "data": str(folder), "epoch": 0, "arch": "resnet10_16", "built_for": 8}
    state = backbones.build("resnet10_16", 8).state_dict()
    runs.write(out / "backbone.pt", about | {"preprocess": SEEN | {"sees": sees}, "state_dict": state})
    return out


def results(run):
    (found,) = json.loads((run / "evaluate.json").read_text()).values()
    return found


def test_shares_of_the_labels_stand_beside_all_of_them(run, monkeypatch, capsys):
    command(monkeypatch, run, "--probe", "knn", "--labels", 20, 100)
    out = capsys.readouterr().out
    assert "20 % of the labels" in out and "108 training and 12 test" in out and "21 training and 12 test" in out
    command(monkeypatch, run, "--probe", "mlp", "linear", "--labels", 20, 50)
    command(monkeypatch, run, "--probe", "lbfgs", "--penalty", "study")
    assert "100 / (M C)" in capsys.readouterr().out
    found = results(run)
    assert {"knn", "lbfgs", "health", "labels"} == set(found) and found["lbfgs"]["penalty"] == 100 / (128 * 3)
    assert set(found["labels"]) == {"20", "50"} and set(found["labels"]["20"]) == {"knn", "linear", "mlp", "images"}
    assert "knn" not in found["labels"]["50"] and found["labels"]["50"]["images"] == 54
    # The share is what data.share draws; its probe is the probe of those rows alone.
    net, seen, about, _ = evaluate.open_backbone(str(run), None, 0, 0)
    assert isinstance(net, evaluate.Trunk) and net.patch == 8
    train, test = (data.load(about["data"], split=s) for s in ("train", "test"))
    (x, y), (tx, ty) = (evaluate.extract(net, s, seen, CPU) for s in (train, test))
    rows = data.share(y, 20, 0)
    assert evaluate.linear_sgd(x[rows], y[rows], tx, ty)["grid"] == found["labels"]["20"]["linear"]["grid"]


def test_depth_and_late_decays_from_the_command(run, monkeypatch, capsys):
    command(monkeypatch, run, "--probe", "depth", "--layers", "pre_logits", "--most-features", 60)
    command(monkeypatch, run, "--probe", "depth", "schedule", "--layers", "block1", "--most-features", 60, "--decay-at", 2, 5)
    out = capsys.readouterr().out
    assert "block1" in out and "best" in out and "first decay at 5" in out
    found = results(run)
    depth = found["depth"]
    assert set(depth) == {"pre_logits", "block1"} and depth["block1"]["features"] <= 60  # of two calls
    assert depth["pre_logits"]["shape"] == [128] and 0 <= depth["block1"]["top1"] <= 100
    schedule = found["schedule"]
    assert [len(schedule[d]["curve"]) for d in ("2", "5")] == [42, 45] and schedule["5"]["curve"][-1] == schedule["5"]["final"]
    lines = (run / "schedule.csv").read_text().splitlines()
    assert lines[0] == "epoch,decay at 2,decay at 5" and len(lines) == 46 and lines[-1].startswith("45,,")
    assert float(lines[42].split(",")[1]) == pytest.approx(schedule["2"]["final"], abs=0.01)


def test_a_fine_tuned_trunk_is_kept_as_it_sees(run, tmp_path, monkeypatch):
    nets, finetune = [], evaluate.finetune
    monkeypatch.setattr(evaluate, "finetune", lambda *args: nets.append(finetune(*args)) or nets[-1])
    flags = ("--labels", 50, "--finetune-epochs", 1, "--head-lr", 0.1, "--trunk-lr", 0.01)
    command(monkeypatch, run, "--probe", "finetune", *flags, "--save", tmp_path / "c.pt")
    classifier, x = evaluate.open_classifier(str(tmp_path / "c.pt")), torch.rand(4, 3, 24, 24) * 2 - 1
    with torch.inference_mode():
        assert torch.allclose(classifier(x), nets[0][0](x), atol=1e-5) and classifier(x).std() > 0
    assert evaluate.open_backbone(str(tmp_path / "c.pt"), None, 0, 0)[0].patch == 8


def test_random_networks_take_all_of_it(tmp_path, monkeypatch, capsys):
    folder = write_images(tmp_path / "images", 60, classes=3, size=24)
    flags = ("--data", folder, "--size", 24, "--labels", 50, "--most-features", 40, "--decay-at", 1, "--out", tmp_path)
    command(monkeypatch, "random:resnet10_16", "--probe", "knn", "depth", "schedule", *flags)
    out = capsys.readouterr().out
    assert "27 training" in out and "pre_logits" in out and (tmp_path / "schedule.csv").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--labels", "5", "--probe", "knn"], "has 6 for the share 5"),
        (["--labels", "0", "--probe", "knn"], "above 0"),
        (["--probe", "depth", "--layers", "block9"], "network has root, block1"),
        (["--probe", "depth", "--most-features", "0"], "at least 1"),
        (["--probe", "schedule", "--decay-at", "0"], "--decay-at 0"),
        (["--probe", "schedule", "--data", "FLAT"], "too few labels"),
        (["--probe", "lbfgs", "--penalty", "strong"], "'study'"),
        (["--probe", "lbfgs", "--penalty", "-1"], "at least 0"),
        (["--size", "48"], "24 px"),
    ],
)
def test_bad_input_is_one_sentence(run, tmp_path, monkeypatch, capsys, args, words):
    flat = write_images(tmp_path / "flat", 12, classes=1) if "FLAT" in args else ""
    monkeypatch.setattr(evaluate, "extract", lambda *_, **__: pytest.fail("nothing may be extracted before"))
    refused(capsys, lambda: command(monkeypatch, run, *(flat if a == "FLAT" else a for a in args)), words)
