import re

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, check_accumulation, check_two_processes, run, write_images
from torch import nn

import backbones
import byol

SMALL = ["byol.py", *TINY, "--limit", "48", "--epochs", "4"]  # 3 steps an epoch, 12 in all


# ============ the loss and the method ============


def test_loss_equals_a_naive_loop_and_known_values():
    g = torch.Generator().manual_seed(0)
    p, z = torch.randn(7, 5, generator=g), torch.randn(7, 5, generator=g)
    naive = sum(((a / a.norm() - b / b.norm()) ** 2).sum() for a, b in zip(p, z, strict=True)) / 7  # eq. 2
    assert torch.allclose(byol.regression_loss(p, z), naive, atol=1e-6)
    x = torch.eye(4)
    for other, value in ((x, 0.0), (3 * x, 0.0), (-x, 4.0), (x.roll(1, 0), 2.0)):
        assert byol.regression_loss(x, other).item() == pytest.approx(value, abs=1e-6)
    assert byol.regression_loss(p.bfloat16(), z).dtype == torch.float32


def test_no_gradient_reaches_the_targets():
    z = torch.randn(4, 3, requires_grad=True)
    p = torch.randn(4, 3, requires_grad=True)
    byol.regression_loss(p, z).backward()
    assert z.grad is None and p.grad.abs().sum() > 0
    model = tiny_model()
    model(views(8)).backward()
    assert all(q.grad is None for q in model.target.parameters())
    assert all(q.grad is not None for q in [*model.f.parameters(), *model.g.parameters(), *model.q.parameters()])


def tiny_model(seed=0):
    torch.manual_seed(seed)
    return byol.BYOL(backbones.build("resnet10_16", 16), hidden=32, dim=8)


def views(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, 16, 16, generator=g) for _ in range(2)]


def test_forward_is_the_symmetrised_loss_with_batchnorm_per_view():
    model, (v1, v2) = tiny_model(), views(8)
    loss = model([v1, v2])
    f, g, q = model.f, model.g, model.q  # the target is a copy, so the online network gives its values too
    p1, p2, z1, z2 = q(g(f(v1))), q(g(f(v2))), g(f(v1)), g(f(v2))
    expected = (F.normalize(p1) - F.normalize(z2)).square().sum(1) + (F.normalize(p2) - F.normalize(z1)).square().sum(1)
    assert torch.allclose(loss, expected.mean(), atol=1e-5)
    assert 0 <= loss.item() <= 8


def test_target_moves_as_eq_1_and_keeps_its_own_batchnorm():
    model, other = tiny_model(0), tiny_model(1)
    before = [p.clone() for p in model.target.parameters()]
    model.f.load_state_dict(other.f.state_dict())
    model(views(8))
    running = model.target["f"].bn1.running_mean.clone()
    assert running.abs().sum() > 0  # its forward ran in train mode
    model.update_target(0.9)
    online = [*model.f.parameters(), *model.g.parameters()]
    for xi, was, theta in zip(model.target.parameters(), before, online, strict=True):
        assert torch.allclose(xi, 0.9 * was + 0.1 * theta, atol=1e-6)
    assert torch.equal(model.target["f"].bn1.running_mean, running)


def test_the_loss_falls():
    model, xs = tiny_model(), views(32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(xs)
        loss.backward()
        optimizer.step()
        model.update_target(0.9)
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_heads_are_the_papers():
    model = byol.BYOL(backbones.build("resnet50", 224))
    assert [tuple(m.weight.shape) for m in model.g if isinstance(m, nn.Linear)] == [(4096, 2048), (256, 4096)]
    assert [tuple(m.weight.shape) for m in model.q if isinstance(m, nn.Linear)] == [(4096, 256), (256, 4096)]
    assert model.g[0].bias is not None and model.g[3].bias is None
    recipe = byol.RECIPES["imagenet"]
    assert recipe["lr"] * 4096 / 256 == pytest.approx(4.8) and recipe["tau"] == 0.99
    assert [v.get("blur", 0) for v in recipe["views"]] == [1.0, 0.1]
    assert [v.get("solarize", 0) for v in recipe["views"]] == [0.0, 0.2]


# ============ one process with 2N images, two with N ============


def batch(n):
    return (views(n),)


@pytest.mark.parametrize("sync", [False, True])
def test_two_processes_give_the_loss_and_gradients_of_one(sync, tmp_path):
    check_two_processes(tiny_model, batch, tmp_path, sync=sync)


def test_accumulated_gradients_are_those_of_the_mean():
    check_accumulation(tiny_model, batch)


def test_folder_with_a_corrupt_image_and_workers(tmp_path):
    folder = write_images(tmp_path / "images", 64)
    bad = sorted(folder.rglob("*.jpg"))[3]
    bad.write_bytes(b"no image")
    flags = ["--data", folder, "--recipe", "shapes", "--workers", "2", "--eval-every", "1", "--out", tmp_path / "run"]
    printed, _ = run("byol.py", *TINY, "--limit", "0", *flags)
    assert str(bad) in printed and "knn" in printed.splitlines()[-1]
    assert re.search(r"^loader: at most [\d,]+ images/s with --workers 2, measured here$", printed, re.MULTILINE)
    assert "loader: about" not in run("byol.py", *flags, "--dry-run")[0]  # which may run on another machine


def test_folder_without_labels_trains_and_says_so(tmp_path):
    folder = write_images(tmp_path / "images", 32, classes=1)
    flags = ["--data", folder, "--recipe", "shapes", "--workers", "0", "--limit", "0", "--out", tmp_path / "run"]
    printed, _ = run("byol.py", *TINY, *flags)
    assert "no labels" in printed and "effective_rank" in printed


# ============ runs (what all scripts have in common: test_runs.py) ============


def test_lars_runs_and_moves_every_tensor(tmp_path):
    out, _ = run(*SMALL, "--epochs", "1", "--optimizer", "lars", "--out", tmp_path / "run")
    assert "lars: 46 tensors" in out and "knn" in out.splitlines()[-1]


def test_dry_run_prints_the_recipe_and_leaves_no_folder(tmp_path):
    out, _ = run("byol.py", "--dry-run", "--out", tmp_path / "run")
    assert "x 64 / 256 =" in out and "46 tensors, 16 decayed" in out and "(by --data)" in out
    assert not (tmp_path / "run").exists()
