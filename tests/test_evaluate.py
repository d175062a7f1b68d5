import json

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import run, write_images
from torch import nn

import backbones
import data
import evaluate


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
                optimizer.param_groups[0]["lr"] = lr * evaluate.common.cosine(step, 9, 1.0, 0.0)
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "byol"
    run("byol.py", "--limit", 200, "--epochs", 1, "--probes", "knn", "--device", "cpu", "--out", out)
    return out


def test_command_probes_caches_and_writes_json(trained):
    first, _ = run("evaluate.py", trained, "--limit", 200, "--probe", "knn", "linear", "lbfgs")
    assert all(
        word in first for word in ("weighted", "majority", "linear   top-1", "lbfgs    top-1", "held-out", "frozen")
    )
    files = sorted(trained.glob("features-*.pt"))
    assert len(files) == 2
    stamps = [f.stat().st_mtime_ns for f in files]
    second, _ = run("evaluate.py", trained, "--limit", 200, "--probe", "knn")
    assert [f.stat().st_mtime_ns for f in files] == stamps  # read, not made again
    assert [s for s in first.splitlines() if s.startswith("weighted")] == [
        s for s in second.splitlines() if s.startswith("weighted")
    ]
    results = json.loads((trained / "evaluate.json").read_text())["shapes"]
    assert {"knn", "linear", "lbfgs", "health"} <= set(results) and results["knn"]["1"]["weighted"] > 0


def test_cache_is_made_again_when_data_or_checkpoint_change(trained):
    run("evaluate.py", trained, "--limit", 100, "--probe", "knn")
    names = {f.name for f in trained.glob("features-*")}
    run("evaluate.py", trained, "--limit", 120, "--probe", "knn")
    other = {f.name for f in trained.glob("features-*")}
    assert len(names) == len(other) == 2 and len(names & other) == 1  # the test set is the same
    about = torch.load(trained / "backbone.pt", weights_only=True)
    about["state_dict"]["conv1.weight"] *= 2
    torch.save(about, trained / "backbone.pt")
    run("evaluate.py", trained, "--limit", 120, "--probe", "knn")
    assert not other & {f.name for f in trained.glob("features-*")}


def test_other_data_random_baseline_and_few_images(trained, tmp_path):
    folder = write_images(tmp_path / "images", 40)
    out, _ = run("evaluate.py", trained, "--data", folder)
    assert "36 training and 4 test images" in out
    out, _ = run(
        "evaluate.py", "random:resnet10_16", "--data", "shapes", "--size", 32, "--limit", 200, "--probe", "knn"
    )
    assert "k=200" in out
    flat = write_images(tmp_path / "flat", 8, classes=1)
    out, _ = run("evaluate.py", trained, "--data", flat)
    assert "no labels" in out and "effective_rank" in out


def test_plain_torchvision_state_dict(tmp_path):
    net = torchvision.models.resnet18()
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    folder = write_images(tmp_path / "images", 20)
    out, _ = run(
        "evaluate.py", tmp_path / "resnet18.pth", "--arch", "resnet18", "--data", folder, "--probe", "knn", "--size", 64
    )
    assert "k=1" in out
    _, err = run("evaluate.py", tmp_path / "resnet18.pth", "--arch", "resnet50", "--data", folder, code=2)
    assert "does not fit" in err
    _, err = run("evaluate.py", tmp_path / "resnet18.pth", "--data", folder, code=2)
    assert "--arch" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nowhere"], "no such checkpoint"),
        (["random:resnet5O", "--data", "shapes", "--size", "32"], "did you mean 'resnet50'"),
        (["random:resnet10_16", "--size", "32"], "--data"),
    ],
)
def test_bad_input_is_one_sentence(args, words):
    _, err = run("evaluate.py", *args, code=2)
    assert words in err and len(err.splitlines()) == 1
