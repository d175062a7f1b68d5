import math

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, check_two_processes
from torch import nn

import backbones
import data
import optim
import sets
import simclr

SMALL = ["simclr.py", *TINY, "--limit", "48", "--epochs", "4"]  # 3 steps an epoch, 12 in all


def units(n, dim=16, seed=0, dtype=torch.float32):
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=1)


def loss_of(z, temperature=0.5):
    return simclr.nt_xent(z, z, 0, temperature)


# ============ the loss ============


def naive(z, every, offset, temperature):
    """Eq. 1 anchor by anchor, with the mask 1[k != i] spelled out."""
    b, total = len(z) // 2, 0.0
    for a in range(2 * b):
        i, j = offset + a, offset + (a + b if a < b else a - b)
        mask = torch.tensor([k != i for k in range(len(every))])
        e = ((z[a] * every).sum(1) / temperature).exp()
        total = total - (e[j] / e[mask].sum()).log()
    return total / (2 * b)


@pytest.mark.parametrize(("world", "rank"), [(1, 0), (3, 0), (3, 1), (3, 2)])
def test_loss_and_gradients_equal_a_naive_loop(world, rank):
    every = units(8 * world, dtype=torch.float64)
    z = every[8 * rank : 8 * rank + 8].clone()
    one, two = ([t.clone().requires_grad_() for t in (z, every)] for _ in range(2))
    expected, got = naive(*one, 8 * rank, 0.3), simclr.nt_xent(*two, 8 * rank, 0.3)
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    (3 * expected).backward(), (3 * got).backward()
    for a, b in zip(one, two, strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-12) and a.grad.abs().sum() > 0


def test_known_values():
    same, pairs = torch.ones(12, 3) / 3**0.5, torch.eye(6).repeat(2, 1)  # two views of six images
    assert loss_of(same, 0.1).item() == pytest.approx(math.log(11), rel=1e-5)
    assert loss_of(pairs, 0.5).item() == pytest.approx(math.log(math.exp(2) + 10) - 2, rel=1e-5)
    unrelated = torch.eye(12)  # every cosine is 0: chance
    assert loss_of(unrelated, 0.1).item() == pytest.approx(math.log(11), rel=1e-5)
    shuffled = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    z = units(12)
    assert loss_of(z[torch.cat([shuffled, 6 + shuffled])]).item() == pytest.approx(loss_of(z).item(), rel=1e-6)


def test_a_small_temperature_stays_finite():
    z = units(64).requires_grad_()
    loss = loss_of(z, 0.001)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


# ============ the method ============


def tiny_model(seed=0, temperature=0.5, layers=2):
    torch.manual_seed(seed)
    return simclr.SimCLR(backbones.build("resnet10_16", 16), 32, 8, layers, temperature)


def views(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, 16, 16, generator=g) for _ in range(2)]


def test_forward_is_the_loss_of_both_views_as_one_batch():
    model, (v1, v2) = tiny_model(), views(8)
    loss = model([v1, v2])
    z = F.normalize(tiny_model().g(tiny_model().f(torch.cat([v1, v2]))), dim=1)
    assert loss.item() == pytest.approx(naive(z, z, 0, 0.5).item(), rel=1e-5)
    assert model.figures["positive_cosine"].item() == pytest.approx((z[:8] * z[8:]).sum(1).mean().item(), abs=1e-6)
    assert model.f.bn1.num_batches_tracked == model.g[1].num_batches_tracked == 1
    apart = torch.cat([tiny_model().g(tiny_model().f(v)) for v in (v1, v2)])  # BatchNorm per view is another method
    assert not torch.allclose(F.normalize(apart, dim=1), z, atol=1e-3)


def test_gradients_reach_both_views_and_all_but_the_frozen_bias():
    model, xs = tiny_model(), [v.requires_grad_() for v in views(8)]
    model(xs).backward()
    assert all(x.grad.abs().sum() > 0 for x in xs)
    frozen = [name for name, p in model.named_parameters() if p.grad is None]
    assert frozen == ["g.4.bias"] and not any(v.requires_grad for v in model.figures.values())


def test_loss_is_fp32_under_autocast():
    model, seen = tiny_model(), []
    model.g.register_forward_hook(lambda *a: seen.append(a[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(views(8))
    loss.backward()
    assert loss.dtype == torch.float32 and len(seen) == 1
    assert loss.item() == pytest.approx(tiny_model()(views(8)).item(), rel=0.02)


def test_projector_is_the_codes():
    for layers, widths in ((2, [(2048, 2048), (128, 2048)]), (3, [(2048, 2048), (2048, 2048), (128, 2048)])):
        g = simclr.projector(2048, 2048, 128, layers)
        linear = [m for m in g if isinstance(m, nn.Linear)]
        assert [tuple(m.weight.shape) for m in linear] == widths
        assert all(m.bias is None and m.weight.std().item() == pytest.approx(0.01, rel=0.02) for m in linear)
        assert (
            sum(isinstance(m, nn.BatchNorm1d) for m in g) == layers
            and sum(isinstance(m, nn.ReLU) for m in g) == layers - 1
        )
        assert isinstance(g[-1], nn.BatchNorm1d) and not g[-1].bias.any() and not g[-1].bias.requires_grad
        assert all(m.bias.requires_grad for m in g[:-1] if isinstance(m, nn.BatchNorm1d))


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
def test_the_loss_falls_and_the_last_bias_stays_zero(optimizer):
    model, xs, losses = tiny_model(), views(32), []
    groups = optim.param_groups(model, 1e-4)
    step = simclr.OPTIMIZERS[optimizer](groups, lr={"lars": 1.0, "sgd": 0.1, "adamw": 3e-3}[optimizer])
    for _ in range(15):
        step.zero_grad()
        loss = model(xs)
        loss.backward()
        step.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0] and not model.g[-1].bias.any()
    assert getattr(step, "inside", optimizer == "lars") == (optimizer == "lars")


def test_an_untrained_network_starts_at_chance():
    train = sets.load("shapes", limit=256)
    recipe = simclr.RECIPES["shapes"]
    vs = [data.view(32, **v) for v in recipe["views"]]
    _, xs = next(data.Loader(train, vs, 256, 0).epoch(0))
    torch.manual_seed(0)
    model = simclr.SimCLR(backbones.build("resnet10_16", 32), recipe["hidden"], recipe["dim"], recipe["layers"], 0.5)
    assert model(xs).item() == pytest.approx(math.log(511), rel=0.05)


# ============ one process with 2N images, two with N ============


def seen_model():
    """With running averages as after a batch, so that BatchNorm passes vectors of ordinary size on in eval mode,
    too."""
    model = tiny_model()
    with torch.no_grad():
        for _ in range(20):
            model(views(16, seed=1))
    return model


def batch(n):
    return (views(n),)


@pytest.mark.parametrize("sync", [False, True])
def test_two_processes_give_the_loss_and_gradients_of_one(sync, tmp_path):
    check_two_processes(seen_model, batch, tmp_path, sync=sync)


# ============ recipes ============


def printed(capsys, *flags):
    simclr.main(["--device", "cpu", "--dry-run", *map(str, flags)])
    return capsys.readouterr().out


def test_dry_run_prints_the_recipe_and_leaves_no_folder(tmp_path, capsys):
    out = printed(capsys, "--out", tmp_path / "run")
    assert "lr 0.004 x 64 / 256 = 0.001, 156 steps of warm-up" in out
    assert "adamw: 41 tensors, 14 decayed, 0 adapted" in out
    assert "126 negatives per view, B = 64" in out and "chance-level loss ln(2B - 1) = 4.84" in out
    assert not (tmp_path / "run").exists()
    small = ["--recipe", "cifar10", "--arch", "resnet10_16", "--limit", "1024", "--batch-size", "1024"]
    out = printed(capsys, *small, "--scaling", "sqrt", "--lr", "0.075", "--accumulate", "4")
    assert "lr 0.075 x sqrt(1024) = 2.4" in out and "lars: 44 tensors, 15 decayed, 15 adapted" in out
    assert "510 negatives per view, B = 256" in out and "= 6.24" in out  # of one pass


def test_recipes_are_those_of_the_codes_commands():
    imagenet, cifar = simclr.RECIPES["imagenet"], simclr.RECIPES["cifar10"]
    assert imagenet["lr"] * imagenet["batch_size"] ** 0.5 == pytest.approx(4.8) == 0.3 * 4096 / 256
    assert cifar["lr"] * cifar["batch_size"] / 256 == 2.0 and (imagenet["scaling"], cifar["scaling"]) == (
        "sqrt",
        "linear",
    )
    for recipe, strength, blur in ((imagenet, 1.0, 0.5), (cifar, 0.5, 0.0)):
        for view in (data.view(recipe["size"], **v) for v in recipe["views"]):
            assert view["jitter"] == pytest.approx([0.8 * strength] * 3 + [0.2 * strength]) and view["jitter_p"] == 0.8
            assert (view["gray"], view["blur"], view["scale"], view["interpolation"]) == (
                0.2,
                blur,
                (0.08, 1.0),
                "bicubic",
            )
            x = torch.rand(2, 3, 4, 4)
            assert torch.equal(data.normalize(x, view["mean"], view["std"]), x)
