import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, Maps, clusters, colors, command, write_images
from torch import nn

import backbones
import checkpoints
import common
import data
import evaluate
import logistic
import runs
import sets
from analysis import depth

sys.path.append(str(ROOT / "benchmarks"))
import probes

CPU = torch.device("cpu")
SMALL = {"mean": data.MEAN, "std": data.STD, "size": 16, "interpolation": "bilinear"}
SEEN = {"mean": data.HALF, "std": data.HALF, "size": 24, "interpolation": "bilinear"}


# ============ k-NN ============


def naive_knn(keys, labels, queries, queries_y, k, temperature, weighted):
    right = 0
    for q, y in zip(queries, queries_y, strict=True):
        s = torch.stack([(q @ b) / (q.norm() * b.norm()) for b in keys])
        votes = {}
        for i in s.argsort(descending=True)[:k].tolist():
            c = labels[i].item()
            votes[c] = votes.get(c, 0) + ((s[i] / temperature).exp().item() if weighted else 1 + 1e-4 * s[i].item())
        right += max(votes, key=votes.get) == y
    return 100 * right / len(queries)


def test_nearest_equals_a_naive_loop():
    g = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(50, 6, generator=g) * torch.rand(50, 1, generator=g), torch.randn(7, 6, generator=g)
    for most in (2**26, 6 * 17):  # the keys whole, and in parts of 17
        for q, *found in zip(queries, *evaluate.nearest(keys, queries, 4, chunk=3, most=most), strict=True):
            cosines = [(q @ b / q.norm() / b.norm()).item() for b in keys]
            order = sorted(range(50), key=lambda i: -cosines[i])[:4]
            assert found[1].tolist() == order and found[0].tolist() == pytest.approx([cosines[i] for i in order])
    assert evaluate.nearest(keys[:2], queries, 4)[1].shape == (7, 2)


def test_knn_equals_a_naive_loop_for_every_k():
    labelled, queries = clusters(120, spread=3.0), clusters(40, spread=3.0, seed=1)
    scores = evaluate.knn(*labelled, *queries, ks=(1, 5, 20), temperature=0.1, chunk=7)
    for k, (weighted, majority) in scores.items():
        assert weighted == pytest.approx(naive_knn(*labelled, *queries, k, 0.1, True))
        assert majority == pytest.approx(naive_knn(*labelled, *queries, k, 0.1, False))


def test_knn_known_answers_scale_and_few_images():
    x, y = torch.eye(4), torch.arange(4)
    assert evaluate.knn(x, y, 7 * x, y) == {1: (100.0, 100.0)}  # only k = 1 fits four images
    assert evaluate.knn(x, y, x, (y + 1) % 4)[1] == (0.0, 0.0)
    labelled, queries = clusters(500), clusters(300, seed=1)
    assert list(evaluate.knn(*labelled, *queries)) == [1, 10, 20, 100, 200]
    assert list(evaluate.knn(*labelled, *queries, ks=(1000,))) == [500]  # all there is


# ============ linear probes ============


def test_grid_equals_torchs_sgd_one_head_at_a_time():
    x, y = clusters(96)
    pairs = [(0.5, 0.0), (0.5, 1e-2), (2.0, 0.0), (2.0, 1e-2)]
    w, b = evaluate.fit_sgd(x, y, 5, pairs, epochs=3, batch_size=32, seed=0)
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
    fitted, _ = logistic.fit(x.float(), y, 5, [r["penalty"]])
    assert torch.allclose(fitted[0].double(), w, atol=1e-3) and r["top1"] == pytest.approx(top1.item(), abs=1.01)


def test_a_given_penalty_is_used_on_standardized_features():
    (x, y), (tx, ty) = clusters(200, spread=2.0), clusters(100, spread=2.0, seed=1)
    r = evaluate.linear_lbfgs(5 * x - 2, y, 5 * tx - 2, ty, penalties=[0.03])
    w, b = logistic.fit((x - x.mean(0)) / x.std(0), y, 5, [0.03])
    top1 = 100 * (((tx - x.mean(0)) / x.std(0) @ w[0] + b[0]).argmax(1) == ty).float().mean()
    assert r["penalty"] == 0.03 and r["grid"] == {} and r["top1"] == pytest.approx(top1.item(), abs=1.01)


def test_accuracy_counts_top_five():
    logits = torch.eye(6)[None].repeat(2, 1, 1)
    assert evaluate.accuracy(logits, torch.arange(6))[0].tolist() == [100.0, 100.0]
    ramp = torch.arange(6.0).repeat(6, 1)
    for top1, top5 in (
        evaluate.accuracy(ramp, torch.arange(6)),
        evaluate.accuracy(-ramp, torch.arange(6), torch.neg, 4),
    ):
        assert top1.item() == pytest.approx(100 / 6) and top5.item() == pytest.approx(500 / 6)


def test_health_knows_spread_from_collapse():
    g = torch.Generator().manual_seed(0)
    spread, flat = torch.randn(500, 32, generator=g), torch.ones(500, 32) + 1e-4 * torch.randn(500, 32, generator=g)
    assert evaluate.health(spread)["feature_std"] == pytest.approx(1, abs=0.05)
    assert evaluate.health(spread)["effective_rank"] > 28
    assert evaluate.health(flat)["feature_std"] < 0.01


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
def test_features_are_standardized_by_those_of_training(probe, monkeypatch):
    monkeypatch.setattr(evaluate, "fit_mlp", by_heart)
    (x, y), (tx, ty) = clusters(600, spread=0.8), clusters(300, spread=0.8, seed=1)
    one = ty == 2  # of one class alone the mean is another
    assert probe(x, y, tx[one], ty[one])["top1"] > 90


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
    x, y = clusters(64, spread=0.8)
    together = evaluate.fit_mlp(x, y, 5, [0.0, 1e-3], 1, 16, 32, seed=3)
    (start,) = evaluate.fit_mlp(x, y, 5, [0.0], 1, 16, 32, seed=3)
    assert torch.equal(together[0][0].weight, start[0].weight) and not torch.equal(
        together[1][0].weight, start[0].weight
    )
    assert not together[1].training and isinstance(together[1][2], nn.Dropout) and together[1][2].p == 0.5


# ============ features ============


def test_extraction_leaves_the_backbone_as_it_was():
    backbone = backbones.build("resnet10_16", 32).train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    dataset = sets.load("shapes", limit=30)
    preprocess = {"mean": data.MEAN, "std": data.STD, "size": 32, "interpolation": "bilinear"}
    x, y = evaluate.extract(backbone, dataset, preprocess, torch.device("cpu"), batch_size=7)
    assert x.shape == (30, 128) and torch.equal(y, dataset.labels) and backbone.training
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    again, _ = evaluate.extract(backbone, dataset, preprocess, torch.device("cpu"), batch_size=30)
    assert torch.allclose(x, again, atol=1e-5)


def test_two_processes_extract_what_one_does(monkeypatch):
    images, net = colors(7, size=12), nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 5))
    images.labels[5] = -1
    alone, kept = evaluate.extract(net, images, SEEN, CPU), {}

    def broadcast(tensor, source):  # the processes one after the other: the last finds what the first has sent
        if source == rank:
            kept[source, tensor.dtype] = tensor.clone()
        elif (source, tensor.dtype) in kept:
            tensor.copy_(kept[source, tensor.dtype])

    group = SimpleNamespace(is_initialized=lambda: True, get_world_size=lambda: 2, get_rank=lambda: rank)
    group.broadcast = broadcast
    monkeypatch.setattr(evaluate, "dist", group)
    monkeypatch.setattr(common, "dist", group)
    for rank in (1, 0):  # noqa: B007, `group` reads it
        found = evaluate.extract(net, images, SEEN, CPU, batch_size=3)
    assert torch.allclose(found[0], alone[0], atol=1e-5) and torch.equal(found[1], alone[1])


# ============ memory ============


def test_no_probe_takes_a_copy_of_the_features(monkeypatch):
    """Peaks by torch's own count of allocations, features included: 1.3 x at most, and of k-NN the parts that it
    says."""
    x, y = clusters(20_000, classes=10, d=256, spread=0.8)
    few = x[:500], y[:500]
    peak = lambda f: 1 + probes.peak_bytes(f, CPU) / x.nbytes
    assert peak(lambda: x + 1) == pytest.approx(2)  # the count itself
    assert peak(lambda: evaluate.linear_sgd(x, y, *few, epochs=1)) < 1.3
    monkeypatch.setattr(evaluate.nearest, "__defaults__", (*evaluate.nearest.__defaults__[:-1], 2000 * 256))
    assert (
        peak(lambda: evaluate.knn(x, y, *few)) < 1.6
    )  # a tenth, normalized and as it comes; 500 x 2000 cosines are a fifth
    images = sets.Images("numbers", torch.zeros(20_000, 3, 1, 1, dtype=torch.uint8), y)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(3, 256))
    seen = SEEN | {"size": 1}
    assert peak(lambda: evaluate.extract(wide, images, seen, CPU)) < 1 + 1.3
    taps, most = Maps(), []
    taps.taps = lambda x: {k: torch.zeros(len(x), 256) + x.mean() for k in ("root", "block1", "pre_logits")}
    monkeypatch.setattr(evaluate, "linear_sgd", lambda x, *_, **__: most.append(x.shape[1]) or {})
    test = sets.pick(images, torch.arange(500))
    assert peak(lambda: depth.depth(taps, images, test, seen, CPU)) < 1 + 1.3 and most == [256] * 3  # a layer at a time


def test_every_probe_runs_and_says_its_protocol():
    train, test = colors(300, size=12), colors(150, seed=1, size=12)
    torch.manual_seed(0)
    net, said = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 8)), []
    pairs = [evaluate.extract(net, s, SEEN, CPU) for s in (train, test)]
    found = evaluate.run_probes(*pairs, evaluate.PROBES, say=said.append, amp=True)
    assert all(found[name]["top1"] > 60 for name in ("linear", "lbfgs", "mlp")) and found["knn"]["20"]["weighted"] > 60
    assert sum("features of a bf16 backbone" in line for line in said) == 1
    assert sum("300 training and 150 test images" in line for line in said) == 1


# ============ the command ============


def test_command_probes_caches_and_writes_json(tiny_run, monkeypatch, capsys):
    command(monkeypatch, "evaluate", tiny_run, "--probe", "knn", "linear", "lbfgs")
    first = capsys.readouterr().out
    words = ("weighted", "T 0.07", "majority", "linear   top-1", "lbfgs    top-1", "held-out", "frozen")
    assert all(word in first for word in words)
    files = sorted(tiny_run.glob("features-*.pt"))
    assert len(files) == 2
    stamps = [f.stat().st_mtime_ns for f in files]
    command(monkeypatch, "evaluate", tiny_run, "--probe", "knn")
    second = capsys.readouterr().out
    assert [f.stat().st_mtime_ns for f in files] == stamps  # read, not made again
    votes = lambda out: [line for line in out.splitlines() if line.startswith(("weighted", "T 0.07", "majority"))]
    assert votes(first) == votes(second) and len(votes(first)) == 3
    (results,) = json.loads((tiny_run / "evaluate.json").read_text()).values()
    assert {"knn", "linear", "lbfgs", "health"} <= set(results) and set(results["knn"]["1"]) == {
        "weighted",
        "majority",
        "T 0.07",
    }


def test_cache_is_made_again_when_data_or_checkpoint_change_or_it_is_broken(tiny_run, monkeypatch):
    made, extract = [], evaluate.extract
    monkeypatch.setattr(evaluate, "extract", lambda *args, **kwargs: made.append(args[1]) or extract(*args, **kwargs))
    extracted = lambda *flags: (
        made.clear(),
        command(monkeypatch, "evaluate", tiny_run, "--probe", "knn", *flags),
        len(made),
    )[-1]
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
    train.write_bytes(train.read_bytes()[:200])
    assert extracted("--limit", 45) == 1 and torch.equal(runs.load(train)["features"], whole["features"])


def test_other_data_random_baseline_and_few_images(tiny_run, tmp_path, monkeypatch, capsys):
    folder = write_images(tmp_path / "others", 40)
    command(monkeypatch, "evaluate", tiny_run, "--data", folder)
    assert "36 training and 4 test images" in capsys.readouterr().out
    command(
        monkeypatch,
        "evaluate",
        "random:resnet10_16",
        "--data",
        "shapes",
        "--size",
        32,
        "--limit",
        200,
        "--probe",
        "knn",
    )
    assert "k=200" in capsys.readouterr().out
    flat = write_images(tmp_path / "flat", 8, classes=1)
    command(monkeypatch, "evaluate", tiny_run, "--data", flat)
    out = capsys.readouterr().out
    assert "no labels" in out and "effective_rank" in out


def results(run):
    (found,) = json.loads((run / "evaluate.json").read_text()).values()
    return found


def test_shares_of_the_labels_stand_beside_all_of_them(patches_run, monkeypatch, capsys):
    command(monkeypatch, "evaluate", patches_run, "--probe", "knn", "--labels", 20, 100)
    out = capsys.readouterr().out
    assert "20 % of the labels" in out and "108 training and 12 test" in out and "21 training and 12 test" in out
    command(monkeypatch, "evaluate", patches_run, "--probe", "mlp", "linear", "--labels", 20, 50)
    command(monkeypatch, "evaluate", patches_run, "--probe", "lbfgs", "--penalty", "study")
    assert "100 / (M C)" in capsys.readouterr().out
    found = results(patches_run)
    assert {"knn", "lbfgs", "health", "labels"} == set(found) and found["lbfgs"]["penalty"] == 100 / (128 * 3)
    assert set(found["labels"]) == {"20", "50"} and set(found["labels"]["20"]) == {"knn", "linear", "mlp", "images"}
    assert "knn" not in found["labels"]["50"] and found["labels"]["50"]["images"] == 54
    # The share is what sets.share draws; its probe is the probe of those rows alone.
    net, seen, about, _ = checkpoints.open_backbone(str(patches_run), None, 0, 0)
    assert isinstance(net, checkpoints.InputAdapter) and net.patch == 8
    train, test = (sets.load(about["data"], split=s) for s in ("train", "test"))
    (x, y), (tx, ty) = (evaluate.extract(net, s, seen, CPU) for s in (train, test))
    rows = sets.share(y, 20, 0)
    assert evaluate.linear_sgd(x[rows], y[rows], tx, ty)["grid"] == found["labels"]["20"]["linear"]["grid"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nowhere"], "no such checkpoint"),
        (["random:resnet5O", "--data", "shapes", "--size", "32"], "did you mean 'resnet50'"),
        (["random:resnet10_16", "--size", "32"], "--data"),
        (["random:resnet10_16", "--data", "shapes", "--size", "1"], "at least 2 and at most 4096"),
        (["random:resnet10_16", "--data", "shapes", "--size", "1000000"], "at least 2 and at most 4096"),
        (["random:resnet10_16", "--data", "shapes", "--temperature", "0"], "--temperature"),
        (["random:resnet10_16", "--data", "shapes", "--temperature", "nan"], "--temperature"),
    ],
)
def test_bad_flags_are_one_sentence(args, words, refused):
    assert words in refused("evaluate", *args)


def test_a_broken_evaluate_json_is_renamed_and_nothing_of_it_lost(tmp_path, capsys):
    path = tmp_path / "evaluate.json"
    for broken in ("", '{"shapes": {"knn": {'):
        path.write_text(broken)
        evaluate.write_json(tmp_path, "shapes", {"labels": {"1": {"knn": {}}}})
        assert "evaluate.json.broken" in capsys.readouterr().out
        assert (tmp_path / "evaluate.json.broken").read_text() == broken
        assert json.loads(path.read_text()) == {"shapes": {"labels": {"1": {"knn": {}}}}}
    evaluate.write_json(tmp_path, "shapes", {"labels": {"1": {"mlp": {}}, "2": {}}, "health": {"a": 1}})
    evaluate.write_json(tmp_path, "other", {"health": {}})
    evaluate.write_json(tmp_path, "shapes", {"health": {"b": 1}})
    known = {"shapes": {"labels": {"1": {"knn": {}, "mlp": {}}, "2": {}}, "health": {"b": 1}}, "other": {"health": {}}}
    assert json.loads(path.read_text()) == known and capsys.readouterr().out == ""


def test_a_folder_that_cannot_be_written_to_costs_no_numbers(tiny_run, monkeypatch, capsys, refused):
    monkeypatch.setattr(evaluate.os, "access", lambda path, mode: str(path) != str(tiny_run))  # root may write anywhere
    command(monkeypatch, "evaluate", tiny_run, "--probe", "knn")
    out = capsys.readouterr().out
    assert "k=1" in out and "not written" in out and {p.name for p in tiny_run.iterdir()} == {"backbone.pt"}
    monkeypatch.setattr(evaluate, "extract", lambda *_, **__: pytest.fail("nothing may be extracted before"))
    assert "--out" in refused("analysis.diagnose", tiny_run)


def test_a_full_disk_is_one_sentence(tiny_run, monkeypatch, refused):
    def full(number):
        raise OSError(28, "No space left on device")

    command(monkeypatch, "analysis.diagnose", tiny_run, "--probe", "neighbors")
    picture = (tiny_run / "neighbors.png").read_bytes()
    monkeypatch.setattr(runs.os, "fsync", full)
    assert "No space left" in refused("analysis.diagnose", tiny_run, "--probe", "neighbors")
    assert (tiny_run / "neighbors.png").read_bytes() == picture


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--labels", "5", "--probe", "knn"], "share 5 has 6"),
        (["--labels", "0", "--probe", "knn"], "at most 100"),
        (["--size", "48"], "24 px"),
        (["--probe", "finetune"], "python -m downstream.finetune"),
        (["--probe", "knn", "depth", "--layers", "block1"], "python -m analysis.depth"),
    ],
)
def test_bad_input_is_one_sentence(patches_run, monkeypatch, refused, args, words):
    monkeypatch.setattr(evaluate, "extract", lambda *_, **__: pytest.fail("nothing may be extracted before"))
    assert words in refused("evaluate", patches_run, *args)


def test_every_probe_that_moved_is_a_command(tiny_run):
    for module in evaluate.MOVED.values():
        assert callable(importlib.import_module(module).main)


# ============ the end of a training run ============


def ending(tmp_path, dataset, probes, test=None):
    """What `report` prints, records and returns for raw pixels of a set as features."""
    pairs = [(s.images.flatten(1).float(), s.labels if s.labels is not None else torch.full((len(s),), -1))
             for s in (dataset, test or dataset)]  # fmt: skip
    said, recorded = [], {}
    log = SimpleNamespace(out=tmp_path, rank=0, say=said.append,
                          record=lambda kind, step, **numbers: recorded.update(numbers),
                          writer=SimpleNamespace(add_embedding=lambda *_: None, close=lambda: None))  # fmt: skip
    args = SimpleNamespace(probes=probes, seed=0, amp=False, data="colors", epochs=7, out=tmp_path)
    result = evaluate.report(pairs, test or dataset, SMALL, args, log, "byol", 3)
    return said, recorded, result, pairs


def test_the_last_point_of_a_knn_curve_is_of_the_same_protocol(tmp_path, monkeypatch):
    train, test, knn, calls = colors(240), colors(90, seed=1), evaluate.knn, []
    monkeypatch.setattr(evaluate, "knn", lambda *args, **kwargs: calls.append(len(args[0])) or knn(*args, **kwargs))
    monitor = lambda: evaluate.monitor(
        nn.Flatten(), train, test, SMALL | {"mean": (0,) * 3, "std": (1 / 255,) * 3}, CPU
    )
    names = ("knn20", "knn200", "feature_std", "effective_rank")
    for asked, most, computed in ((["knn"], 50_000, [240, 240]), ([], 50_000, [240]), (["knn"], 210, [240, 210])):
        monkeypatch.setattr(evaluate, "TRAIN_IMAGES", most)
        calls.clear()
        _, recorded, _, _ = ending(tmp_path, train, asked, test)
        assert calls == computed and recorded["epoch"] == 7
        curve = monitor()
        assert {k: recorded[k] for k in names[:2]} == {k: curve[k] for k in names[:2]}
        assert most == 210 or [recorded[k] for k in names] == pytest.approx([curve[k] for k in names])


def test_a_run_without_labels_ends_with_its_health_and_collapse_is_said(tmp_path):
    images = colors(60).images
    said, _, result, _ = ending(tmp_path, sets.Images("no labels", images), ["knn", "linear"])
    assert "feature_std" in result and "effective_rank" in result and not any("collapse): " in line for line in said)
    said, recorded, result, _ = ending(tmp_path, sets.Images("flat", images[:1].expand(60, -1, -1, -1)), ["knn"])
    assert recorded["feature_std"] < 0.01 and any(line.startswith("warning") and "collapse" in line for line in said)
