import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, check_accumulation, check_two_processes, run

import backbones
import common
import data
import evaluate
import pirl
import runs

SMALL = ["pirl.py", *TINY, "--limit", "48", "--epochs", "4", "--negatives", "24"]  # 3 steps an epoch, 12 in all
FORMS = list(pirl.FORMS)


def rows(n, dim=16, seed=0):
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def tiny_model(seed=0, transform="jigsaw", **changed):
    torch.manual_seed(seed)
    f = backbones.build("resnet10_16", 32)
    head_g = pirl.Jigsaw(f.dim, 8, 32) if transform == "jigsaw" else pirl.Rotation(f.dim, 8)
    return pirl.PIRL(f, head_g, 48, **{"dim": 8, "temperature": 0.1, "lam": 0.3, **changed})


def rotation_model():
    return tiny_model(transform="rotation")


def batch(n, seed=0, parts=9, size=10):
    """What the model takes for n images: views, parts, index, negatives."""
    g = torch.Generator().manual_seed(seed)
    x, xt = torch.randn(n, 3, 24, 24, generator=g), torch.randn(n, parts, 3, size, size, generator=g)
    return [x], xt, torch.arange(n), torch.randint(48, (21,), generator=g)


def rotation_batch(n):
    return batch(n, parts=1, size=24)


def nce_model():
    return tiny_model(nce="constant-z")


def first_batch(n):
    return *batch(n), True


# ============ the loss ============


def test_both_forms_equal_naive_loops():
    v, bank, index = torch.stack([rows(5), rows(5, seed=2)], 1), rows(40, seed=1), torch.tensor([3, 0, 39, 7, 8])
    negatives = torch.randint(40, (6,), generator=torch.Generator().manual_seed(1))
    negatives[..., 2] = 7  # once the own row
    own, others = pirl.against_bank(v, bank, index, negatives, 0.2)
    assert own.shape == (5, 2) and others.shape == (5, 2, 6)
    e = lambda u, j: math.exp(float(u @ bank[j]) / 0.2)
    for b, i in enumerate(index.tolist()):
        drawn = [j for j in negatives.tolist() if j != i]
        for which in range(2):
            u = v[b, which]
            total = e(u, i) + sum(e(u, j) for j in drawn)
            h = lambda j, u=u, total=total: e(u, j) / total  # eq. 3
            expected = -math.log(h(i))
            assert pirl.cross_entropy(own, others)[b, which].item() == pytest.approx(expected, rel=1e-5)
            expected -= sum(math.log(1 - h(j)) for j in drawn)  # eq. 4
            assert pirl.paper_form(own, others)[b, which].item() == pytest.approx(expected, rel=1e-5)


def test_nce_with_a_constant_Z_equals_loops():
    v, bank, index = torch.stack([rows(5), rows(5, seed=2)], 1), rows(40, seed=1), torch.tensor([3, 0, 39, 7, 8])
    negatives = torch.randint(40, (6,), generator=torch.Generator().manual_seed(1))
    negatives[..., 2] = 7  # once the own row
    own, others = pirl.against_bank(v, bank, index, negatives, 0.2)
    e = lambda b, which, j: math.exp(float(v[b, which] @ bank[j]) / 0.2)
    drawn = [[j for j in negatives.tolist() if j != i] for b, i in enumerate(index.tolist())]
    all_e = [e(b, 0, j) for b, i in enumerate(index.tolist()) for j in [i, *drawn[b]]]  # of the transformed images
    Z = 40 * sum(all_e) / len(all_e)
    assert len(all_e) < 5 * 7
    assert pirl.PIRL.estimate_Z(SimpleNamespace(bank=bank), own, others).item() == pytest.approx(Z, rel=1e-5)
    got = pirl.constant_z(own, others, 40, Z)
    for b, i in enumerate(index.tolist()):
        for which in range(2):
            P = e(b, which, i) / Z
            expected = -math.log(P / (P + 6 / 40))
            for j in drawn[b]:
                P = e(b, which, j) / Z
                expected -= math.log(6 / 40 / (P + 6 / 40))
            assert got[b, which].item() == pytest.approx(expected, rel=1e-5)
    others.requires_grad_()
    pirl.constant_z(own, others, 40, Z).sum().backward()
    assert others.grad.isfinite().all() and torch.equal(others.grad == 0, others.detach().isinf())  # own rows


def test_nce_has_the_epsilon_of_the_code():
    """In the denominators, beside N P_n: over all of ImageNet's 32,000 negatives it adds up to 0.15."""
    n, K, eps, Z = 1_281_167, 32_000, 2.0**-23, 2.84e6
    own, others = torch.tensor(2.0), torch.linspace(-3, 3, K)
    P, Pk = math.exp(2) / Z, others.double().exp() / Z
    expected = -math.log(P / (P + K / n + eps)) - (K / n / (Pk + K / n + eps)).log().sum().item()
    assert pirl.constant_z(own, others, n, Z).item() == pytest.approx(expected, abs=2e-3)


def test_Z_is_that_of_the_first_pass_alone(tmp_path, monkeypatch):
    seen, forward = [], pirl.PIRL.forward
    monkeypatch.setattr(common, "catch_signals", list)
    monkeypatch.setattr(evaluate, "monitor", lambda *_: {})
    monkeypatch.setattr(evaluate, "final_probes", lambda *_: "done")
    monkeypatch.setattr(pirl.PIRL, "forward", lambda m, *a, **k: [forward(m, *a, **k), seen.append(m.Z.item())][0])
    flags = [
        "--nce",
        "constant-z",
        "--accumulate",
        "2",
        "--epochs",
        "1",
        "--eval-every",
        "0",
        "--out",
        str(tmp_path / "run"),
    ]
    pirl.main([*SMALL[1:], *flags])
    assert len(seen) == 6 and len({*seen}) == 1 and 48 / math.e < seen[0] < 480  # 0 if it were never set
    assert runs.load(tmp_path / "run" / "checkpoint.pt")["model"]["Z"] == seen[0]


def test_paper_form_holds_and_has_its_gradient_where_h_is_nearly_1():
    """In fp32 1 - h would be 0 here: logits of 30, -30 and, of all others, -40."""
    s = torch.tensor([[-30.0, 30.0, *[-40.0] * 50], [1.0, 2.0, *[0.5] * 50], [30.0, -30.0, *[-40.0] * 50]])
    x, y = s.clone().requires_grad_(), s.double().requires_grad_()
    got = pirl.paper_form(x[:, 0], x[:, 1:])
    h = y.softmax(1)
    without = torch.stack([h[:, [j for j in range(52) if j != k]].sum(1) for k in range(1, 52)], 1)  # 1 - h, in fp64
    expected = -h[:, 0].log() - without.log().sum(1)
    assert torch.allclose(got.double(), expected, rtol=1e-5)
    got.sum().backward(), expected.sum().backward()
    assert torch.allclose(x.grad.double(), y.grad, atol=1e-5)


@pytest.mark.parametrize("form", ["paper", "cross-entropy"])
def test_a_row_left_out_counts_as_nothing(form):
    own, others = torch.tensor([0.3]), torch.tensor([[0.1, -0.2, 0.4]])
    masked = torch.cat([others, torch.tensor([[-math.inf]])], 1).requires_grad_()
    loss = pirl.FORMS[form](own, masked)
    assert loss.item() == pytest.approx(pirl.FORMS[form](own, others).item(), rel=1e-6)
    loss.sum().backward()
    assert masked.grad.isfinite().all() and masked.grad[0, 3] == 0
    alone = torch.full((1, 3), -math.inf, requires_grad=True)
    assert pirl.FORMS[form](own, alone).item() == 0  # nothing but the own row


@pytest.mark.parametrize(
    ("form", "K", "temperature", "value"),
    [
        ("cross-entropy", 4096, 0.07, 9.12),
        ("paper", 4096, 0.07, 10.12),
        ("paper", 32_000, 0.07, 12.17),
        ("paper", 4096, 0.1, 9.71),
        ("constant-z", 4096, 0.07, 10.12),
    ],
)
def test_the_first_loss_is_what_unrelated_features_give(form, K, temperature, value):
    n = 40_000
    v, bank = rows(256, 128).view(128, 2, 128), rows(n, 128, seed=1)
    negatives = torch.randint(n, (K,), generator=torch.Generator().manual_seed(3))
    own, others = pirl.against_bank(v, bank, torch.arange(128), negatives, temperature)
    Z = n * math.exp(1 / (2 * 128 * temperature**2))
    assert pirl.FORMS[form](own, others, n, Z).mean().item() == pytest.approx(value, abs=0.15)
    assert pirl.chance_loss(form, K, n, 128, temperature) == pytest.approx(value, abs=0.01)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_lambda_weighs_the_two_terms(lam):
    model = tiny_model(lam=lam).eval()
    views, parts, index, negatives = batch(4)
    loss = model(views, parts, index, negatives)
    f, z = model.head_f(model.f(views[0])), model.head_g.each(model.f(parts.flatten(0, 1))).view(4, 72)
    terms = []
    for v in (model.head_g.joined(z), f):
        own, others = pirl.against_bank(F.normalize(v, dim=1)[:, None], model.bank, index, negatives, 0.1)
        terms.append(pirl.paper_form(own, others).mean())
    assert loss.item() == pytest.approx((lam * terms[0] + (1 - lam) * terms[1]).item(), rel=1e-5)
    loss.backward()
    used = [p.grad.abs().sum() > 0 for p in (model.head_f.weight, model.head_g.joined.weight, model.head_g.each.weight)]
    assert used == [lam < 1, lam > 0, lam > 0]


# ============ the transformations ============


@pytest.mark.parametrize(
    ("size", "cell", "patch"), [(224, 85, 64), (96, 36, 28), (64, 24, 18), (32, 12, 10), (31, 12, 10)]
)
def test_the_grid_keeps_the_proportions_of_the_code(size, cell, patch):
    assert pirl.puzzle_grid(size) == (cell, patch)


def test_pieces_are_where_their_numbers_say():
    """Of an image whose values are its own coordinates."""
    cell, patch, n = 12, 10, 20
    y, x = torch.meshgrid(torch.arange(36.0), torch.arange(36.0), indexing="ij")
    image = torch.stack([y, x, torch.zeros(36, 36)]).expand(n, -1, -1, -1) + torch.arange(n).view(n, 1, 1, 1) * 100
    head = pirl.Jigsaw(4, 4, 32)
    where, order = head.draw(n, torch.Generator().manual_seed(0))
    assert where.min() == 0 and where.max() == cell - patch
    got = head.transform(image, where, order)
    assert got.shape == (n, 9, 3, patch, patch)
    for b in range(n):
        assert sorted(order[b].tolist()) == list(range(9))
        for j in range(9):
            row, column = divmod(int(order[b, j]), 3)
            top, left = row * cell + int(where[b, j, 0]), column * cell + int(where[b, j, 1])
            assert torch.equal(got[b, j], image[b, :, top : top + patch, left : left + patch])
    assert len({tuple(o) for o in order.tolist()}) == n  # of 362,880


def test_orders_are_any_and_all_alike_often():
    _, order = pirl.Jigsaw(4, 4, 32).draw(20_000, torch.Generator().manual_seed(0))
    share = F.one_hot(order, 9).float().mean(0)  # [place, cell]
    assert (share - 1 / 9).abs().max() < 0.012
    pairs = F.one_hot(order[:, 0] * 9 + order[:, 1], 81).float().mean(0).view(9, 9)
    assert pairs.diagonal().sum() == 0 and (pairs[~torch.eye(9, dtype=torch.bool)] - 1 / 72).abs().max() < 0.005


def test_patches_in_another_order_are_features_in_another_order():
    model, x = tiny_model().eval(), torch.rand(4, 3, 36, 36)
    where, order = model.head_g.draw(4, torch.Generator().manual_seed(0))
    asis = torch.arange(9).expand(4, 9)
    places = torch.empty_like(where).scatter_(1, order[..., None].expand(-1, -1, 2), where)  # by cell
    features = lambda *drawn: model.f(model.head_g.transform(x, *drawn).flatten(0, 1)).view(4, 9, -1)
    z = features(places, asis).gather(1, order[..., None].expand(-1, -1, model.f.dim))
    assert torch.allclose(features(where, order), z, atol=1e-5)
    g = model.head_g(z.flatten(0, 1))
    by_hand = torch.cat([model.head_g.each(z[:, j]) for j in range(9)], 1)
    assert torch.allclose(g, model.head_g.joined(by_hand), atol=1e-5)
    assert not torch.allclose(
        g, model.head_g(features(places, asis).flatten(0, 1)), atol=1e-3
    )  # the order matters to g


def test_rotation_turns_each_image_by_its_own_number():
    head, x = pirl.Rotation(4, 4), torch.rand(40, 3, 9, 9)
    (turns,) = head.draw(40, torch.Generator().manual_seed(0))
    assert set(turns.flatten().tolist()) == {0, 1, 2, 3}
    got = head.transform(x, turns)
    assert got.shape == (40, 1, 3, 9, 9)
    for image, turned, k in zip(x, got, turns.flatten().tolist(), strict=True):
        assert torch.equal(turned[0], image.rot90(k, (1, 2)))


def test_what_is_drawn_is_the_share_of_one_draw_for_all():
    head = pirl.Jigsaw(4, 4, 32)
    draw = lambda n, rank, world, step=3: pirl.draw_share(head, n, rank, world, "cpu", 0, "jigsaw", step, 1)
    whole, halves = draw(8, 0, 1), [draw(4, rank, 2) for rank in range(2)]
    for k, t in enumerate(whole):
        assert torch.equal(t, torch.cat([part[k] for part in halves]))
    assert not torch.equal(whole[1], draw(8, 0, 1, step=4)[1])


# ============ the bank ============


def test_the_bank_takes_f_of_the_image_alone_and_after_the_step():
    model = tiny_model(momentum=0.3).eval()
    views, parts, _, negatives = batch(4)
    index, before = torch.tensor([9, 0, 47, 3]), model.bank.clone()
    assert torch.allclose(before.norm(dim=1), torch.ones(48)) and before.mean().abs() < 0.1
    model(views, parts, index, negatives).backward()
    assert torch.equal(model.bank, before) and not model.bank.requires_grad and model.bank.grad is None
    model.update_bank()
    f = F.normalize(model.head_f(model.f(views[0])), dim=1).detach()
    for row, feature in zip(index.tolist(), f, strict=True):
        new = 0.3 * before[row] + 0.7 * feature
        assert torch.allclose(model.bank[row], new / new.norm(), atol=1e-6)
    others = [i for i in range(48) if i not in index.tolist()]
    assert torch.equal(model.bank[others], before[others])


def test_the_bank_is_fp32_in_the_checkpoint_and_no_parameter():
    model = tiny_model()
    assert "bank" in model.state_dict() and "bank" not in dict(model.named_parameters())
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*batch(8))
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad is not None for p in model.parameters())
    model.update_bank()
    assert model.bank.dtype == torch.float32 and torch.allclose(model.bank.norm(dim=1), torch.ones(48), atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_falls_and_image_and_transformed_image_meet(form):
    model, given, losses, invariance = tiny_model(nce=form, lam=0.5), batch(16), [], []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(25):
        loss = model(*given, first=not losses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_bank()
        losses.append(loss.item()), invariance.append(model.figures["invariance"].item())
    assert losses[-1] < 0.5 * losses[0] and invariance[-1] > 0.7


# ============ one process and two ============


@pytest.mark.parametrize(
    ("build", "given"), [(tiny_model, batch), (nce_model, first_batch), (rotation_model, rotation_batch)]
)
def test_two_processes_give_the_loss_and_gradients_of_one(build, given, tmp_path):
    check_two_processes(build, given, tmp_path, n=8)


def test_accumulated_gradients_are_those_of_the_mean():
    check_accumulation(tiny_model, batch, n=8)


# ============ whole runs ============


def heads(transform):
    torch.manual_seed(0)
    f = backbones.build("resnet10_16", 32)
    return f, pirl.Rotation(f.dim, 128) if transform == "rotation" else pirl.Jigsaw(f.dim, 128, 32)


class Stop(Exception):
    pass


@pytest.mark.parametrize("transform", ["jigsaw", "rotation"])
def test_parts_have_colors_of_their_own_and_come_from_the_second_crop(transform, tmp_path, monkeypatch):
    views, seen = [], []
    augment, loader = data.augment, data.Loader
    monkeypatch.setattr(data, "Loader", lambda *a: [views.append(a[1]), loader(*a, augment=data.augment)][1])
    monkeypatch.setattr(data, "augment", lambda x, view, *a: [seen.append((x.clone(), view)), augment(x, view, *a)][1])
    monkeypatch.setattr(pirl.PIRL, "forward", lambda *_, **__: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        pirl.main([*SMALL[1:], "--transform", transform, "--eval-every", "0", "--out", str(tmp_path / "run")])
    (image, crop), side = views[0], 36 if transform == "jigsaw" else 32
    assert image["size"] == 32 and image["jitter_p"] == 1 and image["gray"] == 0.5
    assert crop["size"] == side and crop["scale"] == ((0.6, 1.0) if transform == "jigsaw" else (0.5, 1.0))
    (_, one), (second, two), (parts, three) = seen  # the image, the crop, and what is made of it
    assert one == image and two == crop and crop["jitter_p"] == crop["gray"] == 0 and three == image
    assert parts.shape == ((144, 3, 10, 10) if transform == "jigsaw" else (16, 3, 32, 32))
    numbers = pirl.draw_share(heads(transform)[1], 16, 0, 1, "cpu", 0, transform, 0, 1)
    assert torch.allclose(heads(transform)[1].transform(second, *numbers).flatten(0, 1), parts, atol=1e-6)
    assert parts.min() >= 0 and parts.max() <= 1  # not normalized yet


def test_rotation_needs_no_grid_and_dry_run_writes_nothing(tmp_path):
    flags = ["--transform", "rotation", "--size", "16", "--lambda", "0.25", "--dry-run", "--out", tmp_path / "run"]
    printed, _ = run(*SMALL, *flags)
    value = pirl.chance_loss("paper", 24, 48, 128, 0.1)
    assert f"lambda 0.25; chance-level loss {value:.2f}" in printed and not (tmp_path / "run").exists()
