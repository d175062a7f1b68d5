import itertools
import math
import os
import random

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from helpers import TINY, check_accumulation, check_two_processes
from torch import nn

import backbones
import common
import data
import optim
import swav

SMALL = ["swav.py", *TINY, "--limit", "48", "--epochs", "4"]  # 3 steps an epoch, 12 in all


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosines(*shape, seed=0):
    return normal(*shape, seed=seed).mul(0.3).tanh()


# ============ the codes ============


def exponentials(S, epsilon, iterations=3):
    """The authors' form, in double: Q = exp(S^T / epsilon), rows to 1 / K, columns to 1 / B, at the end columns to
    1."""
    Q = (S.double() / epsilon).exp().T
    K, B = Q.shape
    Q = Q / Q.sum()
    for _ in range(iterations):
        Q = Q / Q.sum(1, keepdim=True) / K
        Q = Q / Q.sum(0, keepdim=True) / B
    return (Q * B).T


@pytest.mark.parametrize(("b", "K", "epsilon"), [(16, 5, 0.05), (7, 40, 0.05), (16, 5, 0.003), (12, 12, 1.0)])
def test_sinkhorn_equals_the_form_with_exponentials(b, K, epsilon):
    S = cosines(b, K)
    q = swav.sinkhorn(S, epsilon)
    assert q.dtype == torch.float32 and torch.allclose(q.double(), exponentials(S, epsilon), atol=5e-7 / epsilon)
    assert torch.allclose(q.sum(1), torch.ones(b), atol=1e-5)  # columns last: exactly one
    one = swav.sinkhorn(S, epsilon, 1)
    assert not torch.allclose(one, q, atol=1e-3)


def test_sinkhorn_ends_with_even_shares_and_does_not_overflow():
    S = cosines(64, 10) + torch.arange(10) * 0.1  # prototypes of which some are nearer to all
    off = lambda q: (q.sum(0) - 6.4).abs().max()
    assert (
        off((S / 0.05).softmax(1)) > 10 and off(swav.sinkhorn(S, 0.05)) < 4 and off(swav.sinkhorn(S, 0.05, 50)) < 0.01
    )
    assert not (S / 0.001).exp().isfinite().all()
    for epsilon in (0.001, 1e-6):
        q = swav.sinkhorn(S, epsilon)
        assert q.isfinite().all() and torch.allclose(q.sum(1), torch.ones(64), atol=1e-3)
    q = swav.sinkhorn(S, 1e4)
    assert torch.allclose(q, torch.full((64, 10), 0.1), atol=1e-4)


def test_sinkhorn_takes_several_views_and_half_precision_and_no_gradient():
    S = cosines(2, 9, 6).requires_grad_()
    q = swav.sinkhorn(S, 0.05)
    assert torch.allclose(q, torch.stack([swav.sinkhorn(s, 0.05) for s in S]), atol=1e-6) and not q.requires_grad
    assert swav.sinkhorn(S.bfloat16(), 0.05).dtype == torch.float32


def test_the_model_does_as_many_rounds_as_it_is_told():
    S, model = cosines(2, 9, 6), swav.SwAV(backbones.build("resnet10_16", 16), 6, 32, 8, iterations=1)
    assert torch.equal(model.codes(S, False), swav.sinkhorn(S, 0.05, 1))
    assert not torch.allclose(swav.sinkhorn(S, 0.05, 1), swav.sinkhorn(S, 0.05), atol=1e-3)


# ============ the loss ============


def test_loss_equals_naive_loops():
    S, q = cosines(5, 7, 11), normal(2, 7, 11, seed=1).softmax(2)
    expected = 0.0
    for i in range(2):
        for v in range(5):
            if v != i:
                for b in range(7):
                    p = (S[v, b] / 0.2).exp() / (S[v, b] / 0.2).exp().sum()
                    expected -= sum(float(q[i, b, k]) * math.log(p[k]) for k in range(11)) / (2 * 4 * 7)
    assert swav.swapped_prediction(S, q, 0.2).item() == pytest.approx(expected, rel=1e-5)
    assert swav.swapped_prediction(S.bfloat16(), q, 0.2).dtype == torch.float32


def test_loss_has_known_values():
    hard = F.one_hot(torch.arange(6), 6).float()
    for V in (2, 5):
        assert swav.swapped_prediction(torch.zeros(V, 6, 6), hard.expand(2, -1, -1), 0.1).item() == pytest.approx(
            math.log(6)
        )
        right, wrong = hard.expand(V, -1, -1), hard.roll(1, 1).expand(V, -1, -1)
        assert swav.swapped_prediction(right, right[:2], 0.1).item() == pytest.approx(
            math.log(1 + 5 * math.exp(-10)), abs=1e-6
        )
        assert swav.swapped_prediction(right, wrong[:2], 0.1).item() == pytest.approx(10, abs=1e-3)


def test_gradient_is_prediction_less_code_and_none_goes_into_the_codes():
    S = cosines(3, 7, 11).requires_grad_()
    q = normal(2, 7, 11, seed=1).softmax(2).requires_grad_()
    swav.swapped_prediction(S, q, 0.2).backward()
    assert q.grad is None
    p = (S.detach() / 0.2).softmax(2)
    pairs = {0: [1], 1: [0], 2: [0, 1]}  # view: the codes that it predicts
    for v, codes in pairs.items():
        expected = sum(p[v] - q[i].detach() for i in codes) / (4 * 7 * 0.2)
        assert torch.allclose(S.grad[v], expected, atol=1e-6)


# ============ the network ============


def tiny_model(seed=0, queue_length=24):
    torch.manual_seed(seed)
    model = swav.SwAV(backbones.build("resnet10_16", 16), 20, 32, 8, queue_length=queue_length)
    model.queue.copy_(F.normalize(normal(*model.queue.shape, seed=9), dim=2))
    return model


def views(n, seed=0, small=2):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, size, size, generator=g) for size in [16, 16] + [8] * small]


def batch(n):
    return views(n), True


def test_forward_is_the_loss_with_a_batchnorm_per_size_in_f_and_one_in_g():
    model, (v1, v2, v3, v4) = tiny_model(), views(8)
    loss = model([v1, v2, v3, v4])
    f, g = model.f, model.g
    z = F.normalize(g(torch.cat([f(torch.cat([v1, v2])), f(torch.cat([v3, v4]))])), dim=1)
    C = F.normalize(model.C.weight, dim=1)
    S = torch.stack((z @ C.T).split(8))
    expected = 0.0
    for i in range(2):
        q = swav.sinkhorn(S[i].detach(), 0.05)
        others = [-(q * (S[v] / 0.1).log_softmax(1)).sum(1).mean() for v in range(4) if v != i]
        expected = expected + sum(others) / 3 / 2
    assert torch.allclose(loss, expected, atol=1e-5)
    assert not torch.allclose(f(torch.cat([v1, v2])), torch.cat([f(v1), f(v2)]), atol=1e-3)


def test_prototypes_are_unit_vectors_at_every_forward():
    model = tiny_model()
    with torch.no_grad():
        model.C.weight.mul_(normal(20, 1, seed=3).exp())
    direction = F.normalize(model.C.weight.detach(), dim=1)
    model(views(8)).backward()
    assert torch.allclose(model.C.weight, direction, atol=1e-6)
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_first_loss_is_that_of_unrelated_vectors():
    torch.manual_seed(0)
    model = swav.SwAV(backbones.build("resnet10_16", 32), 1000, 128, 128)
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(64, 3, size, size, generator=g) for size in (32, 32, 16)]
    assert model(xs).item() == pytest.approx(math.log(1000) + 1 / (2 * 128 * 0.1**2), rel=0.01)


def test_the_loss_falls_and_figures_tell_what_codes_say():
    model, xs = tiny_model(), views(32)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(xs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert 0 < model.figures["feature_std"] <= 1.1
    assert 1 <= model.figures["view_prototypes"] <= model.figures["batch_prototypes"] <= 20.01
    with torch.no_grad():
        model.g[3].weight.zero_()  # all outputs alike
    model(xs)
    assert model.figures["feature_std"] < 1e-5 and model.figures["view_prototypes"] == pytest.approx(20, rel=1e-3)


def test_scores_and_codes_are_fp32_under_autocast(monkeypatch):
    model, seen = tiny_model(), []
    real = swav.sinkhorn
    monkeypatch.setattr(swav, "sinkhorn", lambda S, *a: [seen.append(S.dtype), real(S, *a)][1])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(views(8), True)
    loss.backward()
    assert loss.dtype == torch.float32 and seen == [torch.float32]
    model.enqueue()
    assert model.queue.dtype == torch.float32


# ============ the queue ============


def test_queue_joins_in_the_codes_with_the_prototypes_of_today():
    model, xs = tiny_model().eval(), views(8)
    seen = {}
    model.g.register_forward_hook(lambda module, x, out: seen.update(z=F.normalize(out, dim=1)))
    without, with_queue = model(xs).item(), model(xs, True).item()
    z, C = seen["z"].detach().split(8), model.C.weight.detach()
    q = [swav.sinkhorn(torch.cat([model.queue[i] @ C.T, z[i] @ C.T]), 0.05)[-8:] for i in range(2)]
    S = torch.stack([v @ C.T for v in z])
    assert with_queue == pytest.approx(swav.swapped_prediction(S, torch.stack(q), 0.1).item(), rel=1e-5)
    assert abs(with_queue - without) > 1e-3


def test_queue_takes_the_newest_at_the_front_and_lets_the_oldest_go():
    model = tiny_model().eval()
    before, places = model.queue.clone(), []
    model.g.register_forward_hook(lambda module, x, out: places.append(F.normalize(out, dim=1).detach()))
    model(views(8))
    assert torch.equal(model.queue, before)
    model.enqueue()
    assert torch.equal(model.queue[:, 8:], before[:, :16])
    for i in range(2):
        assert torch.equal(model.queue[i, :8], places[0][i * 8 : i * 8 + 8])
    model(views(4, 1)), model(views(4, 2))  # two passes of one update
    model.enqueue()
    assert torch.equal(model.queue[1, :4], places[1][4:8]) and torch.equal(model.queue[1, 4:8], places[2][4:8])
    assert torch.equal(model.queue[:, 16:], before[:, :8]) and not model.seen
    assert "queue" in model.state_dict() and not model.queue.requires_grad


# ============ one process with 2N images, two with N ============


@pytest.mark.parametrize("sync", [False, True])
def test_two_processes_give_the_loss_and_gradients_of_one(sync, tmp_path):
    check_two_processes(tiny_model, batch, tmp_path, sync=sync)


def updated(model, rows):
    """The codes' sums, the queue and the prototypes after two updates with the images `rows`."""
    optimizer, sums = swav.LARC(model.parameters(), lr=10.0), []
    for step in range(2):
        S = model.C(F.normalize(normal(2, 16, 8, seed=step), dim=2)[:, rows]).detach()
        sums.append(model.codes(S, True))
        model([v[rows] for v in views(16, step)], True).backward()
        if torch.distributed.is_initialized():
            for p in model.parameters():
                torch.distributed.all_reduce(p.grad)
                p.grad /= 2
        optimizer.step()
        optimizer.zero_grad()
        model.enqueue()
    return torch.stack(sums), model.queue.clone(), model.C.weight.detach().clone()


def half(rank, port, out):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(updated(tiny_model().eval(), slice(rank * 8, rank * 8 + 8)), f"{out}{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_codes_queue_and_prototypes_of_one(tmp_path):
    mp.start_processes(half, (random.randint(20000, 40000), tmp_path / "rank"), 2, start_method="forkserver")
    (q1, queue1, C1), (q2, queue2, C2) = (torch.load(tmp_path / f"rank{rank}") for rank in range(2))
    assert torch.equal(queue1, queue2) and torch.equal(C1, C2)  # bit for bit
    q, queue, C = updated(tiny_model().eval(), slice(16))  # eval: BatchNorm aside
    assert torch.allclose(torch.cat([q1, q2], 2), q, atol=1e-4) and torch.allclose(C1, C, atol=1e-4)
    assert torch.allclose(queue1, queue, atol=1e-4) and not torch.allclose(queue, tiny_model().queue)


def test_accumulated_gradients_are_those_of_the_mean_but_for_the_codes(monkeypatch):
    monkeypatch.setattr(swav, "sinkhorn", lambda S, epsilon, *_: (S / epsilon).softmax(-1))  # each sample by itself
    check_accumulation(tiny_model, batch)


# ============ the optimizer ============


def test_larc_equals_a_loop_and_leaves_the_gradient_where_a_norm_is_0():
    w = [normal(4, 3), normal(5, seed=1), torch.zeros(5), normal(6, seed=2), normal(2, 2, seed=3)]
    params = [nn.Parameter(t.clone()) for t in w]
    lr, decay, momentum = 0.7, 0.3, [torch.zeros_like(t) for t in w]
    optimizer = swav.LARC([{"params": params, "weight_decay": decay, "adapt": True}], lr=lr)
    for step in range(3):
        grads = [normal(*t.shape, seed=10 + i + step) for i, t in enumerate(w)]
        grads[3] = torch.zeros(6)  # no gradient: nothing happens, no decay either
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            p.grad = None if i == 4 else g.clone()  # frozen
            if i < 4:
                a, b = w[i].norm(), g.norm()
                u = 1e-3 * a / (b + decay * a + 1e-8) * (g + decay * w[i]) if a > 0 and b > 0 else g
                momentum[i] = 0.9 * momentum[i] + u
                w[i] = w[i] - lr * momentum[i]
        optimizer.step()
    for p, expected in zip(params, w, strict=True):
        assert torch.allclose(p, expected, atol=1e-6)
    assert optim.count(optimizer) == "5 tensors, 5 decayed, 5 adapted"


# ============ views and recipes ============


def test_recipes_are_the_papers():
    recipe = swav.RECIPES["imagenet"]
    assert recipe["lr"] * 4096 / 256 == pytest.approx(4.8) and recipe["prototypes"] == 3000
    assert [v.get("size", 224) for v in recipe["views"]] == [224] * 2 + [96] * 6
    assert [v["scale"] for v in recipe["views"]] == [(0.14, 1.0)] * 2 + [(0.05, 0.14)] * 6
    for recipe in swav.RECIPES.values():
        assert swav.multi_crop(recipe["views"], recipe["small_crops"], recipe["small_size"]) == recipe["views"]


def test_any_recipe_takes_small_views():
    large = swav.RECIPES["cifar10"]["views"]
    assert len(large) == 2
    views = swav.multi_crop(large, 4, 20)
    assert views[:2] == large and views[2:] == [{**large[0], "size": 20, "scale": (0.05, 0.14)}] * 4
    views = swav.RECIPES["imagenet"]["views"]
    assert swav.multi_crop(views, 0, 96) == views[:2] and swav.multi_crop(views, 1, 64)[2]["size"] == 64


class Stop(Exception):
    pass


def test_shares_and_rounds_are_those_of_the_flags(tmp_path, monkeypatch):
    views, rounds, loader = [], [], data.Loader
    monkeypatch.setattr(common, "catch_signals", list)
    monkeypatch.setattr(data, "Loader", lambda *a: [views.extend(a[1]), loader(*a)][1])
    monkeypatch.setattr(swav, "sinkhorn", lambda S, *a: [rounds.append(a[1]), (_ for _ in ()).throw(Stop)][1])
    flags = [
        "--min-scale",
        "0.3",
        "0.1",
        "--small-crops",
        "1",
        "--sinkhorn-iterations",
        "7",
        "--out",
        str(tmp_path / "run"),
    ]
    with pytest.raises(Stop):
        swav.main([*SMALL[1:], *flags])
    assert [v["scale"] for v in views] == [(0.3, 1.0)] * 2 + [(0.1, 0.5)] and rounds == [7]
    assert swav.parse_args([]).sinkhorn_iterations == 3  # the code's


def test_show_has_views_of_both_sizes(tmp_path, capsys):
    data.main(["show", "shapes", "--method", "swav", "--n", "2", "--out", str(tmp_path / "a.png")])
    count = len(swav.RECIPES["shapes"]["views"])
    assert f"view {count}, mask" in capsys.readouterr().out and count > 2


# ============ whole runs ============

QUEUED = [
    "--queue-length",
    "32",
    "--queue-epoch",
    "2",
    "--freeze-epochs",
    "1.3",
    "--prototypes",
    "20",
    "--eval-every",
    "0",
]


def test_prototypes_rest_at_first_and_the_queue_waits_for_its_epoch_and_until_it_is_full(tmp_path, monkeypatch):
    calls, real = [], swav.SwAV.forward

    def forward(self, views, queued):
        loss = real(self, views, queued)
        calls.append((queued, bool((self.queue != 0).any(2).all()), self.C.weight.detach().clone()))
        return loss

    monkeypatch.setattr(swav.SwAV, "forward", forward)
    flags = [*SMALL[1:], "--size", "16", "--small-crops", "0", "--optimizer", "lars", "--lr", "30"]
    swav.main([*flags, *QUEUED, "--out", str(tmp_path / "late")])
    queued, full, C = zip(*calls, strict=True)
    assert queued == (False,) * 6 + (True,) * 6  # 2 epochs of 3 steps
    still = [torch.allclose(a, b, atol=1e-6) for a, b in itertools.pairwise(C)]
    assert still == [True] * 4 + [False] * 7  # 1.3 epochs: 4 updates
    calls.clear()
    swav.main(
        [
            *flags,
            *QUEUED,
            "--queue-length",
            "48",
            "--queue-epoch",
            "0",
            "--epochs",
            "2",
            "--out",
            str(tmp_path / "early"),
        ]
    )
    queued, full, _ = zip(*calls, strict=True)
    assert queued == full == (False,) * 3 + (True,) * 3  # 48 = 3 batches


@pytest.fixture
def start(capsys):
    """What the script prints, stopping with exit code 2 (on stderr) or before it writes anything (on stdout)."""

    def attempt(*flags, code=2):
        if code:
            with pytest.raises(SystemExit) as stopped:
                swav.main([str(flag) for flag in flags])
            assert stopped.value.code == code
            return capsys.readouterr().err
        swav.main([str(flag) for flag in flags])
        return capsys.readouterr().out

    return attempt


def test_dry_run_prints_the_recipe_and_leaves_no_folder(tmp_path, start):
    out = start("--device", "cpu", "--dry-run", "--out", tmp_path / "run", code=0)
    recipe = swav.RECIPES["shapes"]
    assert "x 64 / 256 =" in out and f"ln {recipe['prototypes']} = {math.log(recipe['prototypes']):.2f}" in out
    assert "43 tensors, 43 decayed, 0 adapted" in out
    assert not (tmp_path / "run").exists()
