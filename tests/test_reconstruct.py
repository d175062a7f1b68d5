"""Classifiers, the perceptual test and pictures of recovered images."""

import json
import urllib.error
from types import SimpleNamespace

import pytest
import torch
import torchvision
from helpers import colors, command, write_images
from torch import nn

import data
import sets
from analysis import pictures, reconstruct

CPU = torch.device("cpu")


# ============ classifiers ============


def test_classifier_from_torchvision_sees_imagenets_normalization(monkeypatch, capsys):
    net, x = torchvision.models.resnet18().eval(), torch.rand(2, 3, 64, 64)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: net.state_dict())
    classifier = reconstruct.open_classifier("torchvision:resnet18")
    with torch.inference_mode():
        seen = nn.functional.interpolate(data.normalize(x), (224, 224), mode="bilinear", antialias=True)
        assert torch.allclose(classifier(2 * x - 1), net(seen), atol=1e-5)
    assert classifier.classes == 1000

    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(SystemExit):
        reconstruct.open_classifier("torchvision:resnet18")
    assert "could not be fetched" in capsys.readouterr().err


def test_what_is_no_classifier_is_refused_in_one_sentence(tiny_run, tmp_path, capsys):
    torch.save(torchvision.models.resnet18(num_classes=7).state_dict(), tmp_path / "net.pth")
    (tmp_path / "broken.pth").write_bytes(b"no torch file")
    for target, words in [
        (tmp_path / "none.pt", "no such checkpoint"),
        (tmp_path / "broken.pth", "broken.pth"),
        (tiny_run / "backbone.pt", "downstream.finetune RUN --save"),
        ("random:resnet10_16", "downstream.finetune RUN --save"),
        (tmp_path / "net.pth", "plain state dict"),
        ("torchvision:resnet5O", "resnet5o"),
    ]:
        with pytest.raises(SystemExit) as stop:
            reconstruct.open_classifier(str(target))
        err = capsys.readouterr().err
        assert stop.value.code == 2 and words in err and len(err.splitlines()) == 1


# ============ the perceptual test and pictures ============


class Brightest(nn.Module):
    """Classifies `colors` without a mistake."""

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
    test = colors(60)
    perfect = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3, affine=False, eps=0).eval())  # the identity in eval mode
    r = reconstruct.perceptual(perfect, Brightest(), test, 16, CPU, batch_size=7)
    assert r == {"mse": 0.0, "top1": 100.0, "top5": 100.0, "originals_top1": 100.0, "originals_top5": 100.0}
    assert [m.training for m in perfect.modules()] == [True, True, False]  # each as it was
    r = reconstruct.perceptual(Constant(), Brightest(), test, 16, CPU, batch_size=7)
    assert r["top1"] == pytest.approx(100 / 3) and r["originals_top1"] == 100 and r["top5"] == 100
    by_hand = (test.images.double() / 127.5 - 1 - 0.25).square().mean().item()
    assert r["mse"] == pytest.approx(by_hand, rel=1e-5)
    twelve = colors(60, classes=12)
    r = reconstruct.perceptual(Constant(), Ranked(12), twelve, 16, CPU)
    assert r["top1"] == pytest.approx(100 / 12) and r["top5"] == pytest.approx(500 / 12)
    for classifier, dataset in ((Ranked(4), test), (Ranked(3), sets.Images("plain", test.images))):
        with pytest.raises(SystemExit):
            reconstruct.check_classifier(classifier, dataset)


def rows_of(monkeypatch, *args, **kwargs):
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "draw_rows", lambda rows: rows)
        return reconstruct.draw_recoveries(*args, **kwargs)


def test_reconstructions_show_the_same_images_in_every_row(monkeypatch, tmp_path):
    views = [data.view(16, scale=(0.5, 1.0), mean=data.HALF, std=data.HALF)] * 2
    folder = sets.load(str(write_images(tmp_path / "images", 48, classes=3, size=16)))
    for dataset in (colors(), folder):
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
    views = [data.view(16, mean=data.HALF, std=data.HALF)]
    painters = {"a": nn.Identity(), "b": nn.Sequential(nn.Dropout(0.9), Constant())}
    for classes, guesses in ((3, 1), (10, 1), (12, 5)):
        dataset = colors(classes=classes)
        rows = rows_of(monkeypatch, painters, dataset, views, CPU, Ranked(classes), n=96)
        assert [r[0] for r in rows] == [n for s in ("image", "view 1") for n in (s, "recovered (a)", "recovered (b)")]
        assert sum(rows[1][3]) == (dataset.labels < guesses).sum() and rows[1][3] == rows[2][3]
        assert float(rows[2][2][0]) == pytest.approx((rows[0][1][0] - 0.25).square().mean().item(), abs=6e-4)
    assert painters["b"].training and painters["b"][0].training
    dataset = colors(n=4)
    dataset.labels[:] = -1
    assert rows_of(monkeypatch, {"": Constant()}, dataset, views, CPU, Ranked(3))[1][3] == [None] * 4


def test_command_tests_and_pictures_the_autoencoder_of_a_run(tiny_run, tmp_path, monkeypatch, capsys):
    file, beside = tmp_path / "classifier.pt", tmp_path / "other"
    beside.mkdir()
    (beside / "backbone.pt").write_bytes((tiny_run / "backbone.pt").read_bytes())
    command(monkeypatch, "downstream.finetune", tiny_run, "--labels", "100", "--epochs", "1", "--save", file)
    opened = []
    autoencoder = lambda folder: opened.append(folder) or Constant()
    method = SimpleNamespace(autoencoder=autoencoder, RECIPES={"imagenet": {"views": [dict(flip=0.0), dict(gray=1.0)]}})
    monkeypatch.setattr(reconstruct, "importlib", SimpleNamespace(import_module=lambda name: method))
    flags = ("--classifier", file, "--beside", beside)
    command(monkeypatch, "analysis.reconstruct", tiny_run, *flags)
    out = capsys.readouterr().out
    assert "perceptual top-1" in out and "MSE" in out and opened == [str(tiny_run), str(beside)]
    (results,) = json.loads((tiny_run / "evaluate.json").read_text()).values()
    assert {"top1", "top5", "mse", "originals_top1", "originals_top5"} < set(results["perceptual"])
    assert sets.decode(tiny_run / "reconstructions.png").shape[1] == 4 + 3 * 100 + 6 * 116  # with dots
    command(monkeypatch, "analysis.reconstruct", tiny_run)
    assert sets.decode(tiny_run / "reconstructions.png").shape[1] == 4 + 3 * 100 + 3 * 116


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--classifier", "nowhere.pt"], "no such checkpoint"),
        ([], "byol does not make images"),
    ],
)
def test_bad_input_is_one_sentence(tiny_run, refused, args, words):
    assert words in refused("analysis.reconstruct", tiny_run, *args)
