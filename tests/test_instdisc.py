import math
import os
import random

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from helpers import TINY, check_accumulation, run
from torchvision.io import write_png

import backbones
import copy_paste
import data
import evaluate
import instdisc
import optim
import sets

SMALL = ["instdisc.py", *TINY, "--limit", "48", "--epochs", "4", "--negatives", "16"]  # 3 steps an epoch, 12 in all


def rows(n, dim=16, seed=0):
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


# ============ the losses ============


def test_losses_equal_naive_loops():
    v, bank, index = rows(5), rows(40, seed=1), torch.tensor([3, 0, 39, 7, 8])
    negatives = torch.tensor([1, 2, 2, 30, 11])
    Z, K, n = 50.0, 5, 40
    P = lambda b, j: math.exp(float(v[b] @ bank[j]) / 0.2) / Z
    full, sampled, contrast = 0.0, 0.0, 0.0
    for b, own in enumerate(index.tolist()):
        full -= math.log(P(b, own) / sum(P(b, j) for j in range(n))) / 5
        sampled -= math.log(P(b, own) / (P(b, own) + sum(P(b, j) for j in negatives.tolist()))) / 5
        contrast -= math.log(P(b, own) / (P(b, own) + K / n)) / 5
        contrast -= sum(math.log((K / n) / (P(b, j) + K / n)) for j in negatives.tolist()) / 5
    assert instdisc.FullSoftmax.apply(v, bank, index, 0.2).item() == pytest.approx(full, rel=1e-5)
    assert instdisc.softmax_nce(v, bank, index, negatives, 0.2).item() == pytest.approx(sampled, rel=1e-5)
    assert instdisc.nce(v, bank, index, negatives, 0.2, torch.tensor(Z)).item() == pytest.approx(contrast, rel=1e-4)


@pytest.mark.parametrize("chunk", [7, 100, 1000])
def test_full_softmax_is_cross_entropy_over_the_bank_with_its_gradient(chunk):
    v, bank, index = rows(6), rows(100, seed=1), torch.arange(6) * 9
    one, two = v.clone().requires_grad_(), v.clone().requires_grad_()
    F.cross_entropy(one @ bank.T / 0.07, index).backward()
    loss = 3 * instdisc.FullSoftmax.apply(two, bank, index, 0.07, chunk)
    loss.backward()
    assert loss.item() / 3 == pytest.approx(F.cross_entropy(v @ bank.T / 0.07, index).item(), rel=1e-5)
    assert torch.allclose(two.grad / 3, one.grad, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "n", "K", "temperature", "value"),
    [
        ("softmax-nce", 100_000, 4096, 0.07, 9.12),
        ("softmax-nce", 100_000, 16_384, 0.07, 10.50),
        ("softmax-nce", 100_000, 65_536, 0.07, 11.89),
        ("softmax", 50_000, 0, 0.1, 11.21),
        ("nce", 100_000, 4096, 0.07, 10.1),  # 10.2 where n = 1.28 M: the code's 1e-7 adds 1e-7 n
    ],
)
def test_the_first_loss_is_what_unrelated_features_give(loss, n, K, temperature, value):
    torch.manual_seed(0)
    model = Plain(n, temperature, loss)
    index, negatives = torch.randperm(n)[:256], torch.randint(n, (K,))
    got = model((rows(256, 128),), index, negatives, first=True).item()
    assert got == pytest.approx(value, rel=0.02)
    assert got == pytest.approx(instdisc.chance(loss, n, K, 128, temperature, 0), rel=0.02)
    assert instdisc.chance("nce", 1_281_167, 4096, 128, 0.07, 0) == pytest.approx(10.2, rel=0.02)


class Plain(instdisc.InstDisc):
    """The method on features given as they are: f and g do nothing."""

    def __init__(self, n, temperature=0.1, loss="softmax-nce", dim=128, momentum=0.5):
        f = torch.nn.Identity()
        f.dim = dim
        super().__init__(f, n, dim, temperature, loss, momentum)
        self.g = torch.nn.Identity()


@pytest.mark.parametrize("loss", ["nce", "softmax-nce"])
def test_a_view_is_not_told_from_its_own_row(loss):
    model, v, index = Plain(50, loss=loss, dim=16), rows(4), torch.tensor([5, 6, 7, 8])
    model.Z.fill_(40.0)
    others = torch.tensor([1, 2, 3])
    with_own = lambda b: torch.cat([others, index[b : b + 1]])
    for b in range(4):
        one = (v[[b, b]],), index[[b, b]]
        if loss == "softmax-nce":
            assert model(*one, with_own(b)).item() == pytest.approx(model(*one, others).item(), rel=1e-6)
        else:  # K / n is larger by one; the extra row itself adds (almost) nothing
            own, s = instdisc.scores(v[b : b + 1], model.bank, index[b : b + 1], with_own(b), 0.1)
            assert s[0, -1] == -math.inf and s[0, :3].isfinite().all()
            expected = -(own.exp() / 40 / (own.exp() / 40 + 4 / 50)).log()
            expected = expected + (1 + s[0, :3].exp() / 40 / 0.08).log().sum()
            assert model(*one, with_own(b)).item() == pytest.approx(expected.item(), rel=1e-4)
    x = v.clone().requires_grad_()
    model((x,), index, index).backward()  # no row but their own: what is left is finite
    assert x.grad.isfinite().all()


def test_Z_is_n_times_the_mean_of_the_first_batch_and_stays():
    model, v, index, negatives = Plain(50, loss="nce", dim=16), rows(4), torch.arange(4), torch.arange(10, 20)
    model((v,), index, negatives, first=True)
    e = [math.exp(float(v[b] @ model.bank[j]) / 0.1) for b in range(4) for j in [b, *range(10, 20)]]
    Z = model.Z.clone()
    assert Z.item() == pytest.approx(50 * sum(e) / len(e), rel=1e-5)
    model.update_bank()
    model((rows(4, seed=3),), index, negatives)
    assert torch.equal(model.Z, Z) and "Z" in model.state_dict()


# ============ the bank ============


def test_bank_rows_are_unit_and_written_after_the_step():
    torch.manual_seed(0)
    model, v, index = Plain(50, dim=16, momentum=0.3), rows(4), torch.tensor([9, 0, 49, 3])
    before = model.bank.clone()
    assert torch.allclose(before.norm(dim=1), torch.ones(50)) and before.mean().abs() < 0.05
    loss = model((v,), index, torch.arange(10, 20))
    assert torch.equal(model.bank, before)
    assert loss.item() == pytest.approx(instdisc.softmax_nce(v, before, index, torch.arange(10, 20), 0.1).item())
    model.update_bank()
    for row, feature in zip(index.tolist(), v, strict=True):
        new = 0.3 * before[row] + 0.7 * feature
        assert torch.allclose(model.bank[row], new / new.norm(), atol=1e-6)
    untouched = [i for i in range(50) if i not in index.tolist()]
    assert torch.equal(model.bank[untouched], before[untouched])
    model((v[:2],), index[:2], torch.arange(10, 20)), model((v[2:],), index[2:], torch.arange(10, 20))
    again = model.bank.clone()
    model.update_bank()  # of both passes
    assert (model.bank[index] != again[index]).any(1).all()


def test_bank_is_fp32_and_no_parameter():
    model = tiny_model()
    assert model.bank.dtype == torch.float32 and not model.bank.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        model(views(8), torch.arange(8), torch.arange(20, 30)).backward()
    model.update_bank()
    assert model.bank.dtype == torch.float32 and torch.allclose(model.bank.norm(dim=1), torch.ones(48), atol=1e-6)


def tiny_model(seed=0, loss="softmax-nce"):
    torch.manual_seed(seed)
    return instdisc.InstDisc(backbones.build("resnet10_16", 16), 48, 8, 0.1, loss)


def views(n, seed=0):
    return [torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize("loss", ["softmax", "nce", "softmax-nce", "supervised"])
def test_the_loss_falls(loss):
    torch.manual_seed(0)
    labels = torch.arange(48) % 5 if loss == "supervised" else None
    model = instdisc.InstDisc(backbones.build("resnet10_16", 16), 48, 16, 0.1, loss, labels=labels)
    optimizer, xs, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), views(32), []
    for step in range(20):
        value = model(xs, torch.arange(32), torch.arange(20, 48), first=step == 0)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        model.update_bank()
        losses.append(value.item())
    assert losses[-1] < 0.7 * losses[0]
    assert ("bank" in model.state_dict()) == (loss != "supervised")


def test_the_bank_probe_ignores_images_without_labels_for_probes(tmp_path):
    model, images = tiny_model(), sets.Images("x", (torch.rand(48, 3, 16, 16) * 255).byte(), torch.arange(48) % 3)
    preprocess = {"size": 16, "interpolation": "bilinear", "mean": data.MEAN, "std": data.STD}
    labels = images.labels.clone()
    how = preprocess, torch.device("cpu"), 0, False
    figures = lambda y, **k: instdisc.probe_bank(model, images, y, images, *how, **k)
    with torch.no_grad():
        x = torch.cat([x for x, _ in data.batches(images, preprocess)])
        model.eval().bank.copy_(F.normalize(model.g(model.f(x)), dim=1))
    found = figures(labels, recompute=True)
    assert {"bank_feature_std", "bank_effective_rank", "bank_knn48", "embedding_knn48"} == set(found)  # not 200
    assert found["bank_knn48"] == pytest.approx(found["embedding_knn48"])
    labels[labels > 0] = -1
    assert figures(labels)["bank_knn16"] == pytest.approx(100 / 3)  # one class is left in the bank


# ============ views, schedule ============


def test_table_1_is_cumulative():
    view = instdisc.RECIPES["imagenet"]["views"][0]
    full = data.view(224, **view)
    got = {name: data.view(224, **instdisc.augmented(view, name)) for name in instdisc.TABLE_1}
    assert got["gray"] == full
    assert [got[n]["gray"] for n in instdisc.TABLE_1] == [0, 0, 0, 0, 0, 0.2]
    assert [got[n]["jitter_p"] for n in instdisc.TABLE_1] == [0, 0, 0, 0, 1, 1]
    assert [got[n]["flip"] for n in instdisc.TABLE_1] == [0, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert got["scale"]["scale"] == (0.2, 1.0) and got["scale"]["ratio"] == (3 / 4, 4 / 3)
    g = torch.Generator().manual_seed(0)
    boxes = data.sample_boxes(100, 256, 256, got["crop"]["scale"], got["crop"]["ratio"], g)
    assert (boxes[:, 2:] == 224).all() and len(boxes[:, 0].unique()) > 20  # places differ, size does not
    boxes = data.sample_boxes(9, 300, 400, got["none"]["scale"], got["none"]["ratio"], g)
    assert (boxes == torch.tensor([0.0, 50, 300, 300])).all()  # the central square


def test_learning_rate_drops_at_120_and_160_of_200_epochs():
    at = lambda epoch: optim.rate(epoch * 10, 2000, 0.03, 0, instdisc.DROPS["steps"])
    assert [at(e) for e in (0, 119, 120, 159, 160, 199)] == pytest.approx([0.03, 0.03, 3e-3, 3e-3, 3e-4, 3e-4])
    assert optim.rate(55, 100, 1.0, 10, instdisc.DROPS["cosine"]) == pytest.approx(0.5)


# ============ whole runs ============


BANKED = ("softmax", "nce", "softmax-nce")


def half(rank, port, out):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    mine = [updated(tiny_model(loss=loss).eval(), slice(rank * 8, rank * 8 + 8)) for loss in BANKED]
    net, images = tiny_model().f, sets.Images("x", (views(8)[0] * 30 + 99).byte())
    net.bn1.running_mean += rank  # as after a step with other images
    plain = {"size": 16, "interpolation": "bilinear", "mean": data.MEAN, "std": data.STD}
    features, _ = evaluate.extract(net, images, plain, torch.device("cpu"))
    torch.save([*mine, features], f"{out}{rank}")
    torch.distributed.destroy_process_group()


def updated(model, rows):
    """The bank and Z after two updates with the images `rows`, and the first gradients of g."""
    for step in range(2):
        xs, index = [v[rows] for v in views(16, step)], torch.arange(16)[rows] * 3
        loss = model(xs, index, torch.arange(20, 30), first=step == 0)
        model.update_bank()
        if step == 0:
            grad = torch.autograd.grad(loss, model.g.weight)[0]
    return model.bank.clone(), model.Z.clone(), grad


def test_two_processes_write_the_bank_and_Z_of_one(tmp_path):
    mp.start_processes(half, (random.randint(20000, 40000), tmp_path / "rank"), 2, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"rank{rank}") for rank in range(2)]
    images = sets.Images("x", (views(8)[0] * 30 + 99).byte())
    plain = {"size": 16, "interpolation": "bilinear", "mean": data.MEAN, "std": data.STD}
    alone, _ = evaluate.extract(tiny_model().f, images, plain, torch.device("cpu"))
    for features in (ranks[0].pop(), ranks[1].pop()):
        assert torch.allclose(features, alone, atol=1e-5)  # of rank 0's averages in both
    for loss, one, two in zip(BANKED, *ranks, strict=True):
        bank, Z, grad = updated(tiny_model(loss=loss).eval(), slice(16))  # eval: BatchNorm aside
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])  # the two agree bit for bit
        assert torch.allclose(one[0], bank, atol=1e-6) and torch.allclose(one[1], Z, rtol=1e-5)
        assert torch.allclose((one[2] + two[2]) / 2, grad, atol=1e-6)


class Stop(Exception):
    pass


def test_what_is_asked_for_reaches_the_loader(tmp_path, monkeypatch):
    calls, real = [], data.Loader

    def loader(*args):
        calls.append(args)
        if len(calls) == 2:  # the first has no masks yet
            raise Stop
        return real(*args)

    monkeypatch.setattr(data, "Loader", loader)
    flags = ["--augment", "flip", "--copy-paste", "0.3", "--masks", "exact", "--background", "textures"]
    with pytest.raises(Stop):
        instdisc.main([*SMALL[1:], *flags, "--blend", "mix", "--soft-masks", "--out", str(tmp_path / "run")])
    masked, (view,), *_, augment = calls[1]
    assert view["scale"] == (1, 1) and view["flip"] == 0.5 and masked.images.shape == (48, 4, 32, 32)
    given = []
    monkeypatch.setattr(copy_paste, "paste", lambda *a: given.append(a) or a[0][:, :3])
    augment(masked.images[:2] / 255, view, data.generator(0))
    share, blurred, backgrounds = given[0][3:]
    assert (share, blurred) == (0.3, 0.5) and backgrounds.shape == (1000, 3, 32, 32)


def test_negatives_are_drawn_anew_and_test_images_have_no_label_in_the_bank(folder, tmp_path, monkeypatch):
    steps, labels, draw, figures = [], [], instdisc.draw_negatives, instdisc.probe_bank
    monkeypatch.setattr(instdisc, "draw_negatives", lambda *a: [steps.append(a[3]), draw(*a)][1])
    monkeypatch.setattr(instdisc, "probe_bank", lambda *a, **k: [labels.append(a[2]), figures(*a, **k)][1])
    flags = ["--data", str(folder), "--workers", "0", "--limit", "40", "--epochs", "2", "--out", str(tmp_path / "run")]
    instdisc.main([*FOLDER[1:-1], *flags])
    assert steps[-4:] == [0, 1, 2, 3]  # before them the estimate of the time
    assert not torch.equal(draw(40, 8, 0, 0, "cpu"), draw(40, 8, 0, 1, "cpu"))
    everything = sets.load(str(folder))
    held_out = {everything.key(i) for i in range(9, 64, 10)}
    used = sets.load(str(folder), limit=40)
    expected = [used.key(i) in held_out for i in range(40)]
    assert sum(expected) > 1 and (labels[-1] == -1).tolist() == expected


def test_supervised_sees_no_label_of_a_test_image(folder, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(data, "Loader", lambda train, *_: [found.append(train), (_ for _ in ()).throw(Stop)][1])
    flags = ["--data", str(folder), "--workers", "0", "--loss", "supervised", "--out", str(tmp_path / "run")]
    with pytest.raises(Stop):
        instdisc.main([*FOLDER[1:-1], *flags])
    everything = sets.load(str(folder))
    keys = {everything.key(i): i for i in range(len(everything))}
    used = [keys[found[0].key(i)] for i in range(len(found[0]))]
    assert sorted(used) == [i for i in range(64) if i % 10 != 9]  # every tenth is a test image


def batch(n):
    return views(n), torch.arange(n), torch.arange(20, 30)


def test_accumulated_gradients_are_those_of_the_mean():
    check_accumulation(tiny_model, batch)


def test_supervised_needs_no_bank(tmp_path):
    out, _ = run(*SMALL, "--loss", "supervised", "--augment", "flip", "--out", tmp_path / "run")
    assert "bank" not in out.splitlines()[0] and "chance-level loss 2.30" in out


def write_masks(folder, masks, size=20):
    """Masks for the folder of images that `write_images` makes: a square in the middle, except those in `masks`."""
    for path in sorted(folder.rglob("*.jpg")):
        mask = torch.zeros(1, size, size, dtype=torch.uint8)
        mask[:, 5:15, 5:15] = 255
        file = folder.parent / "masks" / path.relative_to(folder).with_suffix(".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_png(masks.get(path.stem, mask), str(file))
    return folder.parent / "masks"


FOLDER = ["instdisc.py", *TINY, "--limit", "0", "--recipe", "shapes", "--workers", "1", "--negatives", "8"]
FOLDER += ["--epochs", "1", "--copy-paste"]


def test_a_folder_with_masks_of_another_size(folder):
    empty, full = torch.zeros(1, 9, 9, dtype=torch.uint8), torch.full((1, 9, 30), 255, dtype=torch.uint8)
    masks = write_masks(folder, {"000": empty, "001": full})
    (folder / "class0" / "002.jpg").write_bytes(b"not an image")
    flags = ["--data", folder, "--masks", masks, "--background", "images", "--blend", "gaussian"]
    out, _ = run(*FOLDER, "1", *flags, "--out", folder.parent / "run")
    assert "2 of 64 masks are nearly empty or full" in out
    assert (folder.parent / "run" / "views.png").exists()


@pytest.fixture
def refused(capsys):
    """The sentence with which the script stops, with exit code 2, at these flags."""

    def attempt(*flags):
        with pytest.raises(SystemExit) as stopped:
            instdisc.main([str(flag) for flag in flags])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return attempt


def test_masks_that_do_not_match_are_named(folder, refused):
    masks = write_masks(folder, {})
    (masks / "class0" / "004.png").unlink(), (masks / "class1" / "007.png").unlink()
    err = refused(*FOLDER[1:], "0.5", "--data", folder, "--masks", masks, "--out", folder.parent / "run")
    assert "2 of 64 images" in err and "class0/004, class1/007" in err


def test_folders_need_masks_made_beforehand_and_exact_ones_need_to_exist(folder, refused):
    flags = [*FOLDER[1:], "0.5", "--data", folder, "--out", folder.parent / "run"]
    assert "python saliency.py" in refused(*flags)
    assert "has no masks of its own" in refused(*flags, "--masks", "exact")


def test_masks_that_are_all_useless_stop_the_run(folder, refused):
    masks = write_masks(folder, {f"{i:03d}": torch.zeros(1, 9, 9, dtype=torch.uint8) for i in range(64)})
    flags = [*FOLDER[1:], "0.5", "--data", folder, "--out", folder.parent / "run"]
    assert "nothing to paste" in refused(*flags, "--masks", masks)
