import io
import json
import math
import sys
import urllib.error
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import write_images
from torch import nn

import backbones
import data
import evaluate
import runs


def clusters(n, classes=5, d=16, spread=1.0, seed=0):
    """Gaussian clusters around fixed centres; `seed` draws the points."""
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=g)
    return centres[y] + spread * torch.randn(n, d, generator=g), y


# ============ k-NN ============


def naive_knn(bank, bank_y, queries, queries_y, k, temperature, weighted):
    right = 0
    for q, y in zip(queries, queries_y, strict=True):
        s = torch.stack([(q @ b) / (q.norm() * b.norm()) for b in bank])
        votes = {}
        for i in s.argsort(descending=True)[:k].tolist():
            c = bank_y[i].item()
            votes[c] = votes.get(c, 0) + ((s[i] / temperature).exp().item() if weighted else 1 + 1e-4 * s[i].item())
        right += max(votes, key=votes.get) == y
    return 100 * right / len(queries)


def test_knn_equals_a_naive_loop_for_every_k():
    bank, queries = clusters(120, spread=3.0), clusters(40, spread=3.0, seed=1)
    scores = evaluate.knn(*bank, *queries, ks=(1, 5, 20), temperature=0.1, chunk=7)
    for k, (weighted, majority) in scores.items():
        assert weighted == pytest.approx(naive_knn(*bank, *queries, k, 0.1, True))
        assert majority == pytest.approx(naive_knn(*bank, *queries, k, 0.1, False))


def test_knn_known_answers_scale_and_few_images():
    x, y = torch.eye(4), torch.arange(4)
    assert evaluate.knn(x, y, 7 * x, y) == {1: (100.0, 100.0)}  # only k = 1 fits four images
    assert evaluate.knn(x, y, x, (y + 1) % 4)[1] == (0.0, 0.0)
    bank, queries = clusters(500), clusters(300, seed=1)
    assert list(evaluate.knn(*bank, *queries)) == [1, 10, 20, 100, 200]
    assert list(evaluate.knn(*bank, *queries, ks=(1000,))) == [500]  # all there is


# ============ linear probes ============


def test_grid_equals_torchs_sgd_one_head_at_a_time():
    x, y = clusters(96)
    lrs, decays = (0.5, 2.0), (0.0, 1e-2)
    w, b = evaluate.fit_sgd(x, y, 5, lrs, decays, epochs=3, batch_size=32, seed=0)
    pairs = [(lr, wd) for lr in lrs for wd in decays]
    for i, (lr, wd) in enumerate(pairs):
        head = nn.Linear(16, 5)
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
        optimizer = torch.optim.SGD(head.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=wd)
        g, step = data.generator(0, "linear"), 0
        for _ in range(3):
            for rows in torch.randperm(96, generator=g).view(3, 32):
                # the learning rate multiplies the momentum buffer from outside, in both
                optimizer.param_groups[0]["lr"] = lr * evaluate.optim.cosine(step, 9, 1.0, 0.0)
                optimizer.zero_grad()
                F.cross_entropy(head(x[rows]), y[rows]).backward()
                optimizer.step()
                step += 1
        assert torch.allclose(w[i], head.weight, atol=1e-4) and torch.allclose(b[i, :, 0], head.bias, atol=1e-4)


@pytest.mark.parametrize("probe", [evaluate.linear_sgd, evaluate.linear_lbfgs])
def test_linear_probes_separate_clusters_and_do_not_see_the_test_set(probe):
    train, test = clusters(600, spread=0.8), clusters(300, spread=0.8, seed=1)
    result = probe(*train, *test)
    assert result["top1"] > 90 and result["top5"] == 100
    shuffled = probe(*train, test[0], test[1].roll(1))
    assert shuffled["grid"] == result["grid"]  # chosen without the test labels
    assert shuffled["top1"] < 40


def test_lbfgs_is_at_the_minimum():
    x, y = clusters(200)
    w, b = evaluate.fit_lbfgs(x, y, 5, penalty=1e-2)
    w.requires_grad_(), b.requires_grad_()
    (F.cross_entropy(x @ w + b, y) + 1e-2 / 2 * w.square().sum()).backward()
    assert w.grad.abs().max() < 1e-3 and b.grad.abs().max() < 1e-3


def test_accuracy_counts_top_five():
    logits = torch.eye(6)[None].repeat(2, 1, 1)
    assert evaluate.accuracy(logits, torch.arange(6))[0].tolist() == [100.0, 100.0]
    top1, top5 = evaluate.accuracy(torch.arange(6.0).repeat(6, 1), torch.arange(6))
    assert top1.item() == pytest.approx(100 / 6) and top5.item() == pytest.approx(500 / 6)


def test_health_knows_spread_from_collapse():
    g = torch.Generator().manual_seed(0)
    spread, flat = torch.randn(500, 32, generator=g), torch.ones(500, 32) + 1e-4 * torch.randn(500, 32, generator=g)
    assert evaluate.health(spread)["feature_std"] == pytest.approx(1, abs=0.05)
    assert evaluate.health(spread)["effective_rank"] > 28
    assert evaluate.health(flat)["feature_std"] < 0.01


# ============ features ============


def test_extraction_leaves_the_backbone_as_it_was():
    backbone = backbones.build("resnet10_16", 32).train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    dataset = data.load("shapes", limit=30)
    preprocess = {"mean": data.MEAN, "std": data.STD, "size": 32, "interpolation": "bilinear"}
    x, y = evaluate.extract(backbone, dataset, preprocess, torch.device("cpu"), batch_size=7)
    assert x.shape == (30, 128) and torch.equal(y, dataset.labels) and backbone.training
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    again, _ = evaluate.extract(backbone, dataset, preprocess, torch.device("cpu"), batch_size=30)
    assert torch.allclose(x, again, atol=1e-5)


CPU = torch.device("cpu")
SMALL = {"mean": data.MEAN, "std": data.STD, "size": 16, "interpolation": "bilinear"}


def small_backbone(seed=0):
    torch.manual_seed(seed)
    return backbones.build("resnet10_16", 16)


def command(monkeypatch, *args):
    """evaluate.py as a user calls it, in this process."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args), "--device", "cpu", "--workers", "0"])
    evaluate.main()


@pytest.fixture
def refused(monkeypatch, capsys):
    """The call, or the command of these words, ends with exit code 2 and one sentence; returns that."""

    def check(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            args[0]() if callable(args[0]) else command(monkeypatch, *args)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and len(err.splitlines()) == 1, err
        return err

    return check


@pytest.fixture
def tiny_run(tmp_path):
    """A run folder with a random backbone, and 60 images that it was "trained" on."""
    folder, out = write_images(tmp_path / "images", 60, classes=3, size=16), tmp_path / "run"
    out.mkdir()
    about = {"method": "byol", "data": str(folder), "epoch": 0, "arch": "resnet10_16", "preprocess": SMALL}
    runs.write(out / "backbone.pt", about | {"state_dict": small_backbone().state_dict()})
    return out


def test_command_probes_caches_and_writes_json(tiny_run, monkeypatch, capsys):
    command(monkeypatch, tiny_run, "--probe", "knn", "linear", "lbfgs")
    first = capsys.readouterr().out
    words = ("weighted", "T 0.07", "majority", "linear   top-1", "lbfgs    top-1", "held-out", "frozen")
    assert all(word in first for word in words)
    files = sorted(tiny_run.glob("features-*.pt"))
    assert len(files) == 2
    stamps = [f.stat().st_mtime_ns for f in files]
    command(monkeypatch, tiny_run, "--probe", "knn")
    second = capsys.readouterr().out
    assert [f.stat().st_mtime_ns for f in files] == stamps  # read, not made again
    votes = lambda out: [line for line in out.splitlines() if line.startswith(("weighted", "T 0.07", "majority"))]
    assert votes(first) == votes(second) and len(votes(first)) == 3
    (results,) = json.loads((tiny_run / "evaluate.json").read_text()).values()
    assert {"knn", "linear", "lbfgs", "health"} <= set(results) and set(results["knn"]["1"]) == {"weighted", "majority", "T 0.07"}


def test_cache_is_made_again_when_data_or_checkpoint_change_or_it_is_broken(tiny_run, monkeypatch):
    made, extract = [], evaluate.extract
    monkeypatch.setattr(evaluate, "extract", lambda *args, **kwargs: made.append(args[1]) or extract(*args, **kwargs))
    extracted = lambda *flags: (made.clear(), command(monkeypatch, tiny_run, "--probe", "knn", *flags), len(made))[-1]
    caches = lambda: {f.name for f in tiny_run.glob("features-*")}
    assert extracted("--limit", 40) == 2
    names = caches()
    assert extracted("--limit", 45) == 1  # the test set is the same
    assert len(names) == len(caches()) == 2 and len(names & caches()) == 1
    about = runs.load(tiny_run / "backbone.pt")
    about["state_dict"]["conv1.weight"] *= 2
    runs.write(tiny_run / "backbone.pt", about)
    names = caches()
    assert extracted("--limit", 45) == 2 and not names & caches()
    train = next(tiny_run.glob("features-*-train-*"))
    whole = runs.load(train)
    for broken in ({}, {"features": 3, "labels": 4}, {"labels": whole["labels"]}, {**whole, "labels": whole["labels"][1:]},
                   {k: v[1:] for k, v in whole.items()}, {**whole, "features": whole["labels"]}):  # fmt: skip
        runs.write(train, broken)
        assert extracted("--limit", 45) == 1 and torch.equal(runs.load(train)["features"], whole["features"])
    train.write_bytes(train.read_bytes()[:200])
    assert extracted("--limit", 45) == 1
    train.unlink(), train.mkdir()
    assert extracted("--limit", 45) == 1 and train.is_dir()  # not ours to delete


def test_other_data_random_baseline_and_few_images(tiny_run, tmp_path, monkeypatch, capsys):
    folder = write_images(tmp_path / "others", 40)
    command(monkeypatch, tiny_run, "--data", folder)
    assert "36 training and 4 test images" in capsys.readouterr().out
    command(monkeypatch, "random:resnet10_16", "--data", "shapes", "--size", 32, "--limit", 200, "--probe", "knn")
    assert "k=200" in capsys.readouterr().out
    flat = write_images(tmp_path / "flat", 8, classes=1)
    command(monkeypatch, tiny_run, "--data", flat)
    out = capsys.readouterr().out
    assert "no labels" in out and "effective_rank" in out


def test_plain_torchvision_state_dict(tmp_path, monkeypatch, capsys, refused):
    file, weights = tmp_path / "resnet18.pth", torchvision.models.resnet18().state_dict()
    torch.save(weights, file)
    folder = write_images(tmp_path / "images", 20)
    command(monkeypatch, file, "--arch", "resnet18", "--data", folder, "--probe", "knn", "--size", 64)
    assert "k=1" in capsys.readouterr().out
    assert "does not fit" in refused(file, "--arch", "resnet50", "--data", folder)
    assert "--arch" in refused(file, "--data", folder)
    for broken in ({5: torch.ones(3)}, {"fc.bias": 5}, {**weights, "bn1.bias": weights["bn1.bias"] / 0}):
        torch.save(broken, file)
        assert "resnet18.pth" in refused(file, "--arch", "resnet18", "--data", folder)
        assert "resnet18.pth" in refused(lambda: evaluate.open_classifier(str(file), "resnet18"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nowhere"], "no such checkpoint"),
        (["random:resnet5O", "--data", "shapes", "--size", "32"], "did you mean 'resnet50'"),
        (["random:resnet10_16", "--size", "32"], "--data"),
        (["random:resnet10_16", "--data", "shapes", "--size", "1"], "at least 2 and at most 4096"),
        (["random:resnet10_16", "--data", "shapes", "--size", "1000000"], "at least 2 and at most 4096"),
        (["random:resnet10_16", "--data", "shapes", "--classifier-size", "1"], "at least 2 and at most 4096"),
        (["random:resnet10_16", "--data", "shapes", "--seed", str(2**63)], "--seed"),
        (["random:resnet10_16", "--data", "shapes", "--seed", str(-(2**63) - 1)], "--seed"),
        (["random:resnet10_16", "--data", "shapes", "--penalty", "1e308"], "--penalty"),
        (["random:resnet10_16", "--data", "shapes", "--penalty", "nan"], "--penalty"),
        (["random:resnet10_16", "--data", "shapes", "--trunk-lr", "0.1", "1e308"], "--trunk-lr"),
        (["random:resnet10_16", "--data", "shapes", "--head-lr", "inf"], "--head-lr"),
        (["random:resnet10_16", "--data", "shapes", "--weight-decay", "1e308"], "--weight-decay"),
        (["random:resnet10_16", "--data", "shapes", "--temperature", "0"], "--temperature"),
        (["random:resnet10_16", "--data", "shapes", "--temperature", "nan"], "--temperature"),
        (["random:resnet10_16", "--data", "shapes", "--protocol", "sage", "--labels", "5"], "1 and 10 %"),
        (["random:resnet10_16", "--data", "shapes", "--protocol", "swav", "--head-lr", "1"], "its own"),
    ],
)
def test_bad_flags_are_one_sentence(args, words, refused):
    assert words in refused(*args)


BROKEN = {  # what is changed in a backbone.pt, and what the sentence names
    "arch": [("arch", None), ("arch", 5), ("arch", ...)],
    "data": [("data", 5)],
    "method": [("method", "/etc/passwd"), ("method", "..byol"), ("method", "tests/conftest"), ("method", 5)],
    "epoch": [("epoch", ...), ("epoch", -5), ("epoch", float("nan"))],
    "built_for": [("built_for", "16"), ("built_for", 10**6)],
    "size": [("preprocess", {}), ("preprocess", []), ("preprocess.size", 0), ("preprocess.size", -1), ("preprocess.size", "16"),
             ("preprocess.size", 10**6), ("preprocess.size", True)],
    "mean": [("preprocess.mean", ...), ("preprocess.mean", (0.5, 0.5)), ("preprocess.mean", (0.5, 0.5, float("nan")))],
    "std": [("preprocess.std", (0.5, 0.5, 0.0)), ("preprocess.std", "abc")],
    "interpolation": [("preprocess.interpolation", "zebra"), ("preprocess.interpolation", ...)],
    "sees": [("preprocess.sees", v) for v in ({"zebra": 1}, [], {"stride": 4}, {"patch": -5, "cell": 5}, {"patch": 5},
                                              {"patch": 5, "cell": "5"}, {"patch": 5, "cell": 10**9}, {"grey": 1})],
    "state dict": [("state_dict", v) for v in ([], None, {5: torch.ones(3)}, {"conv1.weight": 5})],
    "not finite": [("state_dict.conv1.weight", torch.full((16, 3, 3, 3), v)) for v in (float("nan"), float("inf"))],
    "head": [("head", v) for v in (..., [], {"weight": torch.ones(3, 128)}, {"weight": torch.ones(3, 128), "bias": 3},
                                   {"weight": torch.ones(3, 128), "bias": torch.ones(())})],
    "classes": [("classes", 3)],
    "does not fit": [("state_dict.conv1.weight", torch.ones(7)), ("state_dict.zebra", torch.ones(7)),
                     ("head", {"weight": torch.ones(3, 7), "bias": torch.ones(3)})],
}  # fmt: skip


@pytest.mark.parametrize(("key", "value", "word"), [(*change, word) for word, changes in BROKEN.items() for change in changes])
def test_a_backbone_that_is_none_of_ours_is_refused_where_it_is_opened(tiny_run, refused, key, value, word):
    file = tiny_run / "backbone.pt"
    about = runs.load(file)
    if key in ("head", "classes"):
        about |= {"kind": "classifier", "head": {"weight": torch.ones(3, 128), "bias": torch.ones(3)}, "classes": []}
        evaluate.open_backbone(str(file), None, 0, 0)  # in order, so far
    *folder, key = key.split(".")
    inside = about[folder[0]] if folder else about
    if value is ...:
        del inside[key]
    else:
        inside[key] = value
    torch.save(about, file)
    if not (key == "head" and word == "does not fit"):
        err = refused(lambda: evaluate.open_backbone(str(file), None, 0, 0))
        assert word in err and str(file) in err.replace("run ", "run/backbone.pt ")
    if "kind" in about:
        assert word in refused(lambda: evaluate.open_classifier(str(file)))


def test_a_broken_evaluate_json_is_set_aside_and_nothing_of_it_lost(tmp_path, capsys):
    path = tmp_path / "evaluate.json"
    broken_ones = ("", "[1, 2]", '{"shapes": {"knn": {', '{"shapes": []}', '{"shapes": {"labels": {"1": 5}}}', "5")
    for i, broken in enumerate(broken_ones, 1):
        path.write_text(broken)
        evaluate.write_json(tmp_path, "shapes", {"labels": {"1": {"knn": {}}}})
        assert f"evaluate.json.broken{i}" in capsys.readouterr().out
        assert (tmp_path / f"evaluate.json.broken{i}").read_text() == broken
        assert json.loads(path.read_text()) == {"shapes": {"labels": {"1": {"knn": {}}}}}
    evaluate.write_json(tmp_path, "shapes", {"labels": {"1": {"mlp": {}}, "2": {}}, "health": {"a": 1}})
    evaluate.write_json(tmp_path, "other", {"health": {}})
    evaluate.write_json(tmp_path, "shapes", {"health": {"b": 1}})
    known = {"shapes": {"labels": {"1": {"knn": {}, "mlp": {}}, "2": {}}, "health": {"b": 1}}, "other": {"health": {}}}
    assert json.loads(path.read_text()) == known and capsys.readouterr().out == ""


def test_a_folder_that_cannot_be_written_to_costs_no_numbers(tiny_run, monkeypatch, capsys, refused):
    monkeypatch.setattr(evaluate.os, "access", lambda path, mode: str(path) != str(tiny_run))  # root may write anywhere
    command(monkeypatch, tiny_run, "--probe", "knn")
    out = capsys.readouterr().out
    assert "k=1" in out and "not written" in out and {p.name for p in tiny_run.iterdir()} == {"backbone.pt"}
    monkeypatch.setattr(evaluate, "extract", lambda *_, **__: pytest.fail("nothing may be extracted before"))
    assert "--out" in refused(tiny_run, "--probe", "neighbours", "schedule")


def test_a_full_disk_is_one_sentence(tiny_run, monkeypatch, refused):
    def full(number):
        raise OSError(28, "No space left on device")

    command(monkeypatch, tiny_run, "--probe", "neighbours")
    picture = (tiny_run / "neighbours.png").read_bytes()
    monkeypatch.setattr(runs.os, "fsync", full)
    assert "No space left" in refused(tiny_run, "--probe", "neighbours")
    assert (tiny_run / "neighbours.png").read_bytes() == picture


def test_names_need_not_be_utf_8(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    monkeypatch.setattr(data.Files, "fingerprint", lambda self: "of other tests")
    folder = write_images(tmp_path / "cafe", 20).rename(tmp_path / "caf\udce9")
    command(monkeypatch, tiny_run, "--data", folder, "--probe", "knn")
    sys.stdout.flush()
    assert rb"caf\udce9" in sys.stdout.buffer.getvalue()


# ============ the end of a training run ============


def ending(tmp_path, dataset, probes, test=None):
    """What `report` prints, records and returns for raw pixels of a set as features."""
    pairs = [(s.images.flatten(1).float(), s.labels if s.labels is not None else torch.full((len(s),), -1))
             for s in (dataset, test or dataset)]  # fmt: skip
    said, recorded = [], {}
    log = SimpleNamespace(out=tmp_path, rank=0, say=said.append, record=lambda kind, step, **numbers: recorded.update(numbers),
                          writer=SimpleNamespace(add_embedding=lambda *_: None, close=lambda: None))  # fmt: skip
    args = SimpleNamespace(probes=probes, seed=0, amp=False, data="colours", epochs=7, out=tmp_path)
    result = evaluate.report(pairs, test or dataset, SMALL, args, log, "byol", 3)
    return said, recorded, result, pairs


def test_the_last_point_of_a_knn_curve_is_of_the_same_protocol(tmp_path, monkeypatch):
    train, test, knn, calls = colours(240), colours(90, seed=1), evaluate.knn, []
    monkeypatch.setattr(evaluate, "knn", lambda *args, **kwargs: calls.append(len(args[0])) or knn(*args, **kwargs))
    online = lambda: evaluate.online(nn.Flatten(), train, test, SMALL | {"mean": (0,) * 3, "std": (1 / 255,) * 3}, CPU)
    names = ("knn20", "knn200", "feature_std", "effective_rank")
    for probes, bank, computed in ((["knn"], 50_000, [240]), ([], 50_000, [240]), (["knn"], 210, [240, 210])):
        monkeypatch.setattr(evaluate, "BANK", bank)
        calls.clear()
        _, recorded, _, _ = ending(tmp_path, train, probes, test)
        assert calls == computed and recorded["epoch"] == 7  # nothing twice
        curve = online()
        assert {k: recorded[k] for k in names[:2]} == {k: curve[k] for k in names[:2]}
        assert bank == 210 or [recorded[k] for k in names] == pytest.approx([curve[k] for k in names])


def test_a_run_without_labels_ends_with_its_health_and_collapse_is_said(tmp_path):
    images = colours(60).images
    said, _, result, _ = ending(tmp_path, data.Images("no labels", images), ["knn", "linear"])
    assert "feature_std" in result and "effective_rank" in result and not any("collapse): " in line for line in said)
    said, recorded, result, _ = ending(tmp_path, data.Images("flat", images[:1].expand(60, -1, -1, -1)), ["knn"])
    assert recorded["feature_std"] < 0.01 and any(line.startswith("warning") and "collapse" in line for line in said)


# ============ fine-tuning ============

def colours(n=96, classes=3, seed=0):
    """An easy set in memory: each class (modulo 3) brightens a channel of noise."""
    x = torch.randint(0, 120, (n, 3, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    y = torch.arange(n) % classes
    x[torch.arange(n), y % 3] += 100
    return data.Images("colours", x, y, [f"class {c}" for c in range(classes)])


def same(a, b):
    return [torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True)]


def test_fine_tuning_learns_and_moves_trunk_and_head():
    backbone = small_backbone()
    net, r = evaluate.finetune(backbone, colours(), colours(60, seed=1), SMALL, CPU, [(0.02, 0.5)], epochs=6)
    assert r["top1"] > 90 and r["top5"] == 100 and r["images"] == 96 and r["updates"] == 6 * (96 // 32)
    assert not any(same(net[0], backbone)) and all(same(backbone, small_backbone()))  # a copy is tuned
    assert not torch.equal(net[0].bn1.running_mean, backbone.bn1.running_mean)  # BatchNorm in train mode
    assert not net.training and net[1].weight.abs().max() > 0


def test_trunk_and_head_have_rates_of_their_own():
    backbone, args = small_backbone(), (colours(), SMALL, CPU)
    net, _ = evaluate.fit_finetune(backbone, *args, 0.0, 0.5, epochs=2, batch_size=32)
    assert all(same(net[0], backbone)) and net[1].weight.abs().max() > 0
    net, loss = evaluate.fit_finetune(backbone, *args, 0.5, 0.0, epochs=2, batch_size=32)
    assert net[1].weight.abs().max() == 0 and net[1].bias.abs().max() == 0  # as it starts
    assert loss == pytest.approx(math.log(3), abs=1e-5)


def test_fine_tuning_sees_crops(monkeypatch):
    """Of a ramp, whose crops have other slopes: neither the image nor its mirror image."""
    ramp = torch.arange(16).mul(15).byte().expand(32, 3, 16, 16).clone()
    train, seen = data.Images("ramps", ramp, torch.arange(32) % 2), []

    class Spy(nn.Module):
        dim = 1

        def forward(self, x):
            seen.append(x)
            return x.mean((1, 2, 3))[:, None]

    plain = SMALL | {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    evaluate.fit_finetune(Spy(), train, plain, CPU, 0.0, 0.1, epochs=2, batch_size=32)
    steps = torch.cat(seen).diff(dim=3).abs().mean((1, 2, 3)) * 255  # 15 for the image as it is
    assert len(steps) == 64 and (steps < 14).float().mean() > 0.8 and steps.std() > 1
    rising = torch.cat(seen).diff(dim=3).mean((1, 2, 3)) > 0
    assert 0.2 < rising.float().mean() < 0.8  # and flips


def test_published_rates_by_protocol_and_share(tiny_run, monkeypatch, capsys, refused):
    calls = []
    made = {"top1": 1.0, "top5": 1.0, "images": 9, "trunk_lr": 0.1, "head_lr": 1.0, "weight_decay": 0.0, "epochs": 20,
            "batch_size": 256, "updates": 1, "grid": {}}  # fmt: skip
    monkeypatch.setattr(evaluate, "finetune", lambda *args: calls.append((args[5], args[8])) or (None, made))
    monkeypatch.setattr(evaluate, "need_labels", lambda *_: None)  # 60 images, of which 1 % are none
    command(monkeypatch, tiny_run, "--probe", "finetune", "--protocol", "swav")
    assert calls == [([(0.02, 5.0)], 0.0), ([(0.01, 0.2)], 0.0)]
    assert "swav's, published for ImageNet" in capsys.readouterr().out
    calls.clear()
    command(monkeypatch, tiny_run, "--probe", "finetune", "--protocol", "sage", "--labels", 10, 1)
    assert [decay for _, decay in calls] == [1e-4, 5e-4] and len(calls[0][0]) == 9
    assert {round(head / trunk) for trunk, head in calls[0][0]} == {1, 10, 100}
    assert {trunk for trunk, _ in calls[0][0]} == {0.1, 0.01, 0.001}
    for n, decay in ((5, 1e-4), (25, None)):  # of 54: about 10 %
        (tiny_run.parent / "few.txt").write_text("".join(f"{i:03d}.jpg\n" for i in range(n)))
        flags = ("--probe", "finetune", "--protocol", "sage", "--label-list", tiny_run.parent / "few.txt")
        if decay:
            calls.clear(), command(monkeypatch, tiny_run, *flags)
            assert calls == [(evaluate.SAGE_LRS, decay)]
        else:
            assert "few.txt has 46.3 %" in refused(tiny_run, *flags)


def test_rates_drop_at_60_and_80_per_cent(monkeypatch):
    seen, step = [], torch.optim.SGD.step
    record = lambda self: (seen.append([g["lr"] for g in self.param_groups]), step(self))
    monkeypatch.setattr(torch.optim.SGD, "step", record)
    evaluate.fit_finetune(small_backbone(), colours(12), SMALL, CPU, 0.01, 0.1, epochs=10, batch_size=12)
    factors = [1.0] * 6 + [0.2] * 2 + [0.04] * 2
    assert torch.tensor(seen).allclose(torch.tensor([[0.01 * f, 0.1 * f] for f in factors]))


def test_rates_are_chosen_on_a_tenth_of_train_and_never_on_test(monkeypatch):
    sizes, fit = [], evaluate.fit_finetune
    spy = lambda backbone, train, *args: (sizes.append(len(train)), fit(backbone, train, *args))[1]
    monkeypatch.setattr(evaluate, "fit_finetune", spy)
    train, test = colours(), colours(60, seed=1)
    settings = (SMALL, CPU, [(0.0, 1e38), (0.0, 0.0), (0.0, 0.5)])  # one that diverges, one that learns nothing
    net, r = evaluate.finetune(small_backbone(), train, test, *settings, epochs=3)
    assert sizes == [87, 87, 87, 96] and r["head_lr"] == 0.5
    assert r["grid"]["trunk 0 head 1e+38"] == -1 and r["grid"]["trunk 0 head 0.5"] > 60
    test.labels = test.labels.roll(1)
    again, wrong = evaluate.finetune(small_backbone(), train, test, *settings, epochs=3)
    assert wrong["grid"] == r["grid"] and all(same(net, again)) and wrong["top1"] < r["top1"] - 30
    with pytest.raises(SystemExit):
        evaluate.finetune(small_backbone(), train, test, SMALL, CPU, [(0.0, 1e38)], epochs=3)


def test_command_fine_tunes_on_shares_and_keeps_the_results_of_others(tiny_run, monkeypatch, capsys):
    command(monkeypatch, tiny_run, "--probe", "finetune", "--labels", 50, 100, "--finetune-epochs", 2)
    out = capsys.readouterr().out
    assert "a small grid of our own, for small data" in out
    assert "finetune 50 %   top-1" in out and "27 labelled images" in out and "held-out top-1" in out
    (tiny_run.parent / "few.txt").write_text("".join(f"{i:03d}.jpg\n" for i in range(12)))
    flags = ("--label-list", tiny_run.parent / "few.txt", "--finetune-epochs", "1", "--head-lr", "0.1")
    command(monkeypatch, tiny_run, "--probe", "finetune", *flags)
    assert "12 labelled images" in capsys.readouterr().out
    (results,) = json.loads((tiny_run / "evaluate.json").read_text()).values()
    shares = results["finetune"]
    assert set(shares) == {"50", "100", "few"} and set(results) == {"finetune"}
    assert shares["100"]["images"] == 54 and 0 <= shares["50"]["top1"] <= 100 and not list(tiny_run.glob("features-*"))


# ============ classifiers ============


def test_a_saved_classifier_is_the_fine_tuned_network(tiny_run, monkeypatch):
    nets, finetune = [], evaluate.finetune
    monkeypatch.setattr(evaluate, "finetune", lambda *args: nets.append(finetune(*args)) or nets[-1])
    file, flags = tiny_run / "classifier.pt", ("--labels", "50", "100", "--finetune-epochs", "1", "--head-lr", "0.1")
    command(monkeypatch, tiny_run, "--size", 64, "--probe", "finetune", *flags, "--save", file)
    classifier = evaluate.open_classifier(str(file))  # at 64 px, though with the stem for 16
    assert classifier.classes == 3 and not classifier.training
    assert not any(p.requires_grad for p in classifier.parameters())
    x = torch.rand(4, 3, 64, 64)
    with torch.inference_mode():
        expected = nets[-1][0](data.normalise(x))
        assert torch.allclose(classifier(2 * x - 1), expected, atol=1e-5) and expected.std() > 0
        large = torch.rand(4, 3, 100, 100)
        resized = F.interpolate(large, (64, 64), mode="bilinear", antialias=True)
        assert torch.allclose(classifier(2 * large - 1), nets[-1][0](data.normalise(resized)), atol=1e-5)
    command(monkeypatch, file, "--probe", "knn")  # its trunk is a backbone as any other


def test_classifier_from_torchvision_sees_imagenets_normalisation(tmp_path, monkeypatch, capsys):
    net = torchvision.models.resnet18(num_classes=7).eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    classifier = evaluate.open_classifier(str(tmp_path / "net.pth"), "resnet18", 64)
    x = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.allclose(classifier(2 * x - 1), net(data.normalise(x)), atol=1e-5)
    assert classifier.classes == 7 and evaluate.open_classifier(str(tmp_path / "net.pth"), "resnet18").size == 224

    net = torchvision.models.resnet18().eval()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: net.state_dict())
    classifier = evaluate.open_classifier("torchvision:resnet18", size=64)
    with torch.inference_mode():
        assert torch.allclose(classifier(2 * x - 1), net(data.normalise(x)), atol=1e-5)
    assert classifier.classes == 1000

    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(SystemExit):
        evaluate.open_classifier("torchvision:resnet18")
    assert "could not be fetched" in capsys.readouterr().err


def test_what_is_no_classifier_is_refused_in_one_sentence(tiny_run, tmp_path, capsys):
    torch.save(torchvision.models.resnet18(num_classes=7).state_dict(), tmp_path / "net.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    (tmp_path / "broken.pth").write_bytes(b"no torch file")
    for target, arch, words in [
        (tmp_path / "none.pt", None, "no such file"),
        (tmp_path / "broken.pth", None, "broken.pth"),
        (tiny_run / "backbone.pt", None, "--probe finetune --save"),
        (tmp_path / "net.pth", None, "--classifier-arch"),
        (tmp_path / "net.pth", "resnet50", "does not fit"),
        (tmp_path / "net.pth", "resnet5O", "resnet5o"),
        (tmp_path / "empty.pth", "resnet18", "weights by name"),
        ("torchvision:resnet5O", None, "resnet5o"),
    ]:
        with pytest.raises(SystemExit) as stop:
            evaluate.open_classifier(str(target), arch)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and words in err and len(err.splitlines()) == 1


# ============ the perceptual test and pictures ============


class Brightest(nn.Module):
    """Classifies `colours` without a mistake."""

    classes = 3

    def forward(self, x):
        return x.mean((2, 3))


class Ranked(nn.Module):
    """Prefers class 0 to 1 to 2 ..., whatever it sees."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, x):
        return -torch.arange(self.classes).float().expand(len(x), -1)


class Constant(nn.Module):
    def forward(self, x):
        return torch.full_like(x, 0.25)


def test_perceptual_test_of_a_perfect_and_of_a_blind_autoencoder():
    test = colours(60)
    perfect = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3, affine=False, eps=0).eval())  # the identity in eval mode
    r = evaluate.perceptual(perfect, Brightest(), test, 16, CPU, batch_size=7)
    assert r == {"mse": 0.0, "top1": 100.0, "top5": 100.0, "originals_top1": 100.0, "originals_top5": 100.0}
    assert [m.training for m in perfect.modules()] == [True, True, False]  # each as it was
    r = evaluate.perceptual(Constant(), Brightest(), test, 16, CPU, batch_size=7)
    assert r["top1"] == pytest.approx(100 / 3) and r["originals_top1"] == 100 and r["top5"] == 100
    by_hand = (test.images.double() / 127.5 - 1 - 0.25).square().mean().item()
    assert r["mse"] == pytest.approx(by_hand, rel=1e-5)
    assert evaluate.perceptual(Constant(), None, test, 16, CPU) == {"mse": pytest.approx(by_hand, rel=1e-5)}
    twelve = colours(60, classes=12)
    r = evaluate.perceptual(Constant(), Ranked(12), twelve, 16, CPU)
    assert r["top1"] == pytest.approx(100 / 12) and r["top5"] == pytest.approx(500 / 12)
    for classifier, dataset in ((Ranked(4), test), (Ranked(3), data.Images("plain", test.images))):
        with pytest.raises(SystemExit):
            evaluate.perceptual(Constant(), classifier, dataset, 16, CPU)


def test_figure_has_the_promised_size_and_dots():
    images = torch.rand(2, 3, 40, 40) * 2 - 1
    rows = [("image", images, None, None), ("recovered", images, ["0.031", "0.500"], [True, False])]
    picture = evaluate.figure(rows)
    cell, gap, strip = 120, evaluate.GAP, evaluate.STRIP  # 40 px, three times
    assert picture.shape[1] == gap + (cell + gap) + (cell + strip + gap) and picture.min() >= 0 and picture.max() <= 1
    left = picture.shape[2] - 2 * (cell + gap)
    assert 40 < left < 120 and picture[:, :, :left].min() < 0.5  # room for the names, and ink
    large = (images / 2 + 0.5).repeat_interleave(3, 2).repeat_interleave(3, 3)
    for i in range(2):
        at = left + i * (cell + gap)
        for top in (gap, gap + cell + gap):
            assert torch.allclose(picture[:, top : top + cell, at : at + cell], large[i], atol=0.51 / 255)
        dot = picture[:, picture.shape[1] - gap - strip // 2, at + strip // 2 - 1]
        assert dot.tolist() == pytest.approx([c / 255 for c in (evaluate.PASSES, evaluate.FAILS)[i]])
    unmarked = evaluate.figure([("a", images, ["1", "2"], None)])[:, -gap - strip :]
    assert torch.allclose(unmarked[0], unmarked[1], atol=0.01) and torch.allclose(unmarked[0], unmarked[2], atol=0.01)
    assert evaluate.figure([("a", images[:, :, :8, :8], None, None)]).shape[1] == 96 + 2 * gap
    assert evaluate.figure([("a", images, ["1", "2"], [None, True])]).shape[1] == cell + strip + 2 * gap


def rows_of(monkeypatch, *args, **kwargs):
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "figure", lambda rows: rows)
        return evaluate.reconstructions(*args, **kwargs)


def test_reconstructions_show_the_same_images_in_every_row(monkeypatch, tmp_path):
    views = [data.view(16, scale=(0.5, 1.0), mean=evaluate.HALF, std=evaluate.HALF)] * 2
    folder = data.load(str(write_images(tmp_path / "images", 48, classes=3, size=16)))
    for dataset in (colours(), folder):
        rows = rows_of(monkeypatch, {"": nn.Identity()}, dataset, views, CPU, Brightest(), n=6)
        assert [name for name, *_ in rows] == ["image", "recovered", "view 1", "recovered", "view 2", "recovered"]
        order = [Brightest()(x).argmax(1).tolist() for _, x, _, _ in rows]
        assert all(row == order[0] for row in order) and len(set(order[0])) > 1  # not in the loader's order
        for (_, x, captions, marks), (_, recovered, under, judged) in zip(rows[::2], rows[1::2], strict=True):
            assert x.shape == (6, 3, 16, 16) and -1 <= x.min() < -0.5 and 0.5 < x.max() <= 1
            assert torch.equal(x, recovered) and captions is None and marks is None
            assert under == ["0.000"] * 6 and judged == [True] * 6
        again, other = (rows_of(monkeypatch, {"": nn.Identity()}, dataset, views, CPU, n=6, seed=s) for s in (0, 1))
        assert all(torch.equal(a[1], b[1]) for a, b in zip(rows, again, strict=True)) and again[1][3] is None
        assert not torch.equal(rows[0][1], other[0][1]) and not torch.equal(rows[2][1], rows[4][1])


def test_reconstructions_are_judged_by_five_guesses_or_one(monkeypatch):
    views = [data.view(16, mean=evaluate.HALF, std=evaluate.HALF)]
    painters = {"a": nn.Identity(), "b": nn.Sequential(nn.Dropout(0.9), Constant())}
    for classes, guesses in ((3, 1), (10, 1), (12, 5)):
        dataset = colours(classes=classes)
        rows = rows_of(monkeypatch, painters, dataset, views, CPU, Ranked(classes), n=96)
        assert [r[0] for r in rows] == [n for s in ("image", "view 1") for n in (s, "recovered (a)", "recovered (b)")]
        assert sum(rows[1][3]) == (dataset.labels < guesses).sum() and rows[1][3] == rows[2][3]
        assert float(rows[2][2][0]) == pytest.approx((rows[0][1][0] - 0.25).square().mean().item(), abs=6e-4)
    assert painters["b"].training and painters["b"][0].training
    dataset = colours(n=4)
    dataset.labels[:] = -1
    assert rows_of(monkeypatch, {"": Constant()}, dataset, views, CPU, Ranked(3))[1][3] == [None] * 4


def test_command_tests_and_pictures_the_autoencoder_of_a_run(tiny_run, tmp_path, monkeypatch, capsys):
    file, beside = tmp_path / "classifier.pt", tmp_path / "other"
    beside.mkdir()
    (beside / "backbone.pt").write_bytes((tiny_run / "backbone.pt").read_bytes())
    command(monkeypatch, tiny_run, "--probe", "finetune", "--labels", "100", "--finetune-epochs", "1", "--save", file)
    opened = []
    autoencoder = lambda folder: opened.append(folder) or Constant()
    method = SimpleNamespace(autoencoder=autoencoder, RECIPES={"imagenet": {"views": [dict(flip=0.0), dict(grey=1.0)]}})
    monkeypatch.setattr(evaluate, "importlib", SimpleNamespace(import_module=lambda name: method))
    flags = ("--classifier", file, "--beside", beside)
    command(monkeypatch, tiny_run, "--probe", "perceptual", "pictures", *flags)
    out = capsys.readouterr().out
    assert "perceptual top-1" in out and "MSE" in out and opened == [str(tiny_run), str(beside)]
    (results,) = json.loads((tiny_run / "evaluate.json").read_text()).values()
    assert {"top1", "top5", "mse", "originals_top1", "originals_top5"} < set(results["perceptual"])
    assert data.decode(tiny_run / "reconstructions.png").shape[1] == 4 + 3 * 100 + 6 * 116  # with dots
    command(monkeypatch, tiny_run, "--probe", "pictures")
    assert data.decode(tiny_run / "reconstructions.png").shape[1] == 4 + 3 * 100 + 3 * 116


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--probe", "finetune", "--labels", "0"], "--labels 0"),
        (["--probe", "finetune", "--labels", "10", "101"], "--labels 101"),
        (["--probe", "finetune", "--labels", "10", "--label-list", "x"], "exclude"),
        (["--probe", "finetune", "--label-list", "nowhere.txt"], "nowhere.txt"),
        (["--probe", "finetune", "--labels", "1"], "10 labelled training images"),
        (["--probe", "finetune", "--trunk-lr", "-1"], "--trunk-lr"),
        (["--probe", "finetune", "--save", "nowhere/file.pt"], "there is no folder"),
        (["--save", "file.pt"], "--probe finetune"),
        (["--probe", "perceptual"], "--classifier"),
        (["--probe", "perceptual", "--classifier", "nowhere.pt"], "no such file"),
        (["--probe", "pictures"], "byol does not make images"),
    ],
)
def test_bad_input_of_the_other_probes_is_one_sentence(tiny_run, monkeypatch, capsys, args, words):
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, tiny_run, *args)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and len(err.splitlines()) == 1


def test_fine_tuning_without_labels_is_one_sentence(tiny_run, tmp_path, monkeypatch, capsys):
    flat = write_images(tmp_path / "flat", 20, classes=1)
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, tiny_run, "--data", flat, "--probe", "finetune", "--labels", "100")
    assert stop.value.code == 2 and "has 0 for the share 100" in capsys.readouterr().err
