import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import colors, command, small_backbone, write_images
from torch import nn

import checkpoints
import data
import evaluate
import sets
from analysis import reconstruct
from downstream import finetune as tuning

CPU = torch.device("cpu")
SMALL = {"mean": data.MEAN, "std": data.STD, "size": 16, "interpolation": "bilinear"}


def same(a, b):
    return [torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True)]


def test_fine_tuning_learns_and_moves_trunk_and_head():
    backbone = small_backbone()
    net, r = tuning.finetune(backbone, colors(), colors(60, seed=1), SMALL, CPU, [(0.02, 0.5)], epochs=6)
    assert r["top1"] > 90 and r["top5"] == 100 and r["images"] == 96 and r["updates"] == 6 * (96 // 32)
    assert not any(same(net[0], backbone)) and all(same(backbone, small_backbone()))  # a copy is tuned
    assert not torch.equal(net[0].bn1.running_mean, backbone.bn1.running_mean)  # BatchNorm in train mode
    assert not net.training and net[1].weight.abs().max() > 0


def test_trunk_and_head_have_rates_of_their_own():
    backbone, args = small_backbone(), (colors(), SMALL, CPU)
    net, _ = tuning.fit_finetune(backbone, *args, 0.0, 0.5, epochs=2, batch_size=32)
    assert all(same(net[0], backbone)) and net[1].weight.abs().max() > 0
    net, loss = tuning.fit_finetune(backbone, *args, 0.5, 0.0, epochs=2, batch_size=32)
    assert net[1].weight.abs().max() == 0 and net[1].bias.abs().max() == 0  # as it starts
    assert loss == pytest.approx(math.log(3), abs=1e-5)


def test_fine_tuning_sees_crops(monkeypatch):
    """Of a ramp, whose crops have other slopes: neither the image nor its mirror image."""
    ramp = torch.arange(16).mul(15).byte().expand(32, 3, 16, 16).clone()
    train, seen = sets.Images("ramps", ramp, torch.arange(32) % 2), []

    class Spy(nn.Module):
        dim = 1

        def forward(self, x):
            seen.append(x)
            return x.mean((1, 2, 3))[:, None]

    plain = SMALL | {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    tuning.fit_finetune(Spy(), train, plain, CPU, 0.0, 0.1, epochs=2, batch_size=32)
    steps = torch.cat(seen).diff(dim=3).abs().mean((1, 2, 3)) * 255  # 15 for the image as it is
    assert len(steps) == 64 and (steps < 14).float().mean() > 0.8 and steps.std() > 1
    rising = torch.cat(seen).diff(dim=3).mean((1, 2, 3)) > 0
    assert 0.2 < rising.float().mean() < 0.8  # and flips


def test_published_rates_by_protocol_and_share(tiny_run, monkeypatch, capsys, refused):
    calls = []
    made = {"top1": 1.0, "top5": 1.0, "images": 9, "trunk_lr": 0.1, "head_lr": 1.0, "weight_decay": 0.0, "epochs": 20,
            "batch_size": 256, "updates": 1, "grid": {}}  # fmt: skip
    monkeypatch.setattr(tuning, "finetune", lambda *args: calls.append((args[5], args[8])) or (None, made))
    monkeypatch.setattr(evaluate.Subject, "need_labels", lambda *_: None)  # 60 images, of which 1 % are none
    command(monkeypatch, "downstream.finetune", tiny_run, "--protocol", "swav")
    assert calls == [([(0.02, 5.0)], 0.0), ([(0.01, 0.2)], 0.0)]
    assert "swav's, published for ImageNet" in capsys.readouterr().out
    calls.clear()
    command(monkeypatch, "downstream.finetune", tiny_run, "--protocol", "sage", "--labels", 10, 1)
    assert [decay for _, decay in calls] == [1e-4, 5e-4] and len(calls[0][0]) == 9
    assert {round(head / trunk) for trunk, head in calls[0][0]} == {1, 10, 100}
    assert {trunk for trunk, _ in calls[0][0]} == {0.1, 0.01, 0.001}
    for n, decay in ((5, 1e-4), (25, None)):  # of 54: about 10 %
        (tiny_run.parent / "few.txt").write_text("".join(f"{i:03d}.jpg\n" for i in range(n)))
        flags = ("--protocol", "sage", "--label-list", tiny_run.parent / "few.txt")
        if decay:
            calls.clear(), command(monkeypatch, "downstream.finetune", tiny_run, *flags)
            assert calls == [(tuning.SAGE_LRS, decay)]
        else:
            assert "not for 46.3 %" in refused("downstream.finetune", tiny_run, *flags)


def test_rates_drop_at_60_and_80_per_cent(monkeypatch):
    seen, step = [], torch.optim.SGD.step
    record = lambda self: (seen.append([g["lr"] for g in self.param_groups]), step(self))
    monkeypatch.setattr(torch.optim.SGD, "step", record)
    tuning.fit_finetune(small_backbone(), colors(12), SMALL, CPU, 0.01, 0.1, epochs=10, batch_size=12)
    factors = [1.0] * 6 + [0.2] * 2 + [0.04] * 2
    assert torch.tensor(seen).allclose(torch.tensor([[0.01 * f, 0.1 * f] for f in factors]))


def test_rates_are_chosen_on_a_tenth_of_train_and_never_on_test(monkeypatch):
    sizes, fit = [], tuning.fit_finetune
    spy = lambda backbone, train, *args: (sizes.append(len(train)), fit(backbone, train, *args))[1]
    monkeypatch.setattr(tuning, "fit_finetune", spy)
    train, test = colors(), colors(60, seed=1)
    settings = (SMALL, CPU, [(0.0, 1e38), (0.0, 0.0), (0.0, 0.5)])  # one that diverges, one that learns nothing
    net, r = tuning.finetune(small_backbone(), train, test, *settings, epochs=3)
    assert sizes == [87, 87, 87, 96] and r["head_lr"] == 0.5
    assert r["grid"]["trunk 0 head 1e+38"] == -1 and r["grid"]["trunk 0 head 0.5"] > 60
    test.labels = test.labels.roll(1)
    again, wrong = tuning.finetune(small_backbone(), train, test, *settings, epochs=3)
    assert wrong["grid"] == r["grid"] and all(same(net, again)) and wrong["top1"] < r["top1"] - 30
    with pytest.raises(SystemExit):
        tuning.finetune(small_backbone(), train, test, SMALL, CPU, [(0.0, 1e38)], epochs=3)


def test_command_fine_tunes_on_shares_and_keeps_the_results_of_others(tiny_run, monkeypatch, capsys):
    command(monkeypatch, "downstream.finetune", tiny_run, "--labels", 50, 100, "--epochs", 2)
    out = capsys.readouterr().out
    assert "a small grid of our own, for small data" in out
    assert "finetune 50 %   top-1" in out and "27 labelled images" in out and "held-out top-1" in out
    (tiny_run.parent / "few.txt").write_text("".join(f"{i:03d}.jpg\n" for i in range(12)))
    flags = ("--label-list", tiny_run.parent / "few.txt", "--epochs", "1", "--head-lr", "0.1")
    command(monkeypatch, "downstream.finetune", tiny_run, *flags)
    assert "12 labelled images" in capsys.readouterr().out
    (results,) = json.loads((tiny_run / "evaluate.json").read_text()).values()
    shares = results["finetune"]
    assert set(shares) == {"50", "100", "few"} and set(results) == {"finetune"}
    assert shares["100"]["images"] == 54 and 0 <= shares["50"]["top1"] <= 100 and not list(tiny_run.glob("features-*"))


# ============ the saved classifier ============


def test_a_saved_classifier_is_the_fine_tuned_network(tiny_run, monkeypatch):
    nets, finetune = [], tuning.finetune
    monkeypatch.setattr(tuning, "finetune", lambda *args: nets.append(finetune(*args)) or nets[-1])
    file, flags = tiny_run / "classifier.pt", ("--labels", "50", "100", "--epochs", "1", "--head-lr", "0.1")
    command(monkeypatch, "downstream.finetune", tiny_run, "--size", 64, *flags, "--save", file)
    classifier = reconstruct.open_classifier(str(file))  # at 64 px, though with the stem for 16
    assert classifier.classes == 3 and not classifier.training
    assert not any(p.requires_grad for p in classifier.parameters())
    x = torch.rand(4, 3, 64, 64)
    with torch.inference_mode():
        expected = nets[-1][0](data.normalize(x))
        assert torch.allclose(classifier(2 * x - 1), expected, atol=1e-5) and expected.std() > 0
        large = torch.rand(4, 3, 100, 100)
        resized = F.interpolate(large, (64, 64), mode="bilinear", antialias=True)
        assert torch.allclose(classifier(2 * large - 1), nets[-1][0](data.normalize(resized)), atol=1e-5)
    command(monkeypatch, "evaluate", file, "--probe", "knn")  # its trunk is a backbone as any other


def test_a_fine_tuned_trunk_is_kept_as_it_sees(patches_run, tmp_path, monkeypatch):
    nets, finetune = [], tuning.finetune
    monkeypatch.setattr(tuning, "finetune", lambda *args: nets.append(finetune(*args)) or nets[-1])
    flags = ("--labels", 50, "--epochs", 1, "--head-lr", 0.1, "--trunk-lr", 0.01)
    command(monkeypatch, "downstream.finetune", patches_run, *flags, "--save", tmp_path / "c.pt")
    classifier, x = reconstruct.open_classifier(str(tmp_path / "c.pt")), torch.rand(4, 3, 24, 24) * 2 - 1
    with torch.inference_mode():
        assert torch.allclose(classifier(x), nets[0][0](x), atol=1e-5) and classifier(x).std() > 0
    assert checkpoints.open_backbone(str(tmp_path / "c.pt"), None, 0, 0)[0].patch == 8


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--labels", "0"], "--labels 0"),
        (["--labels", "10", "101"], "--labels 101"),
        (["--labels", "10", "--label-list", "x"], "exclude"),
        (["--label-list", "nowhere.txt"], "nowhere.txt"),
        (["--labels", "1"], "10 labelled training images"),
        (["--labels", "100", "--data", "FLAT"], "share 100 has 0"),
        (["--trunk-lr", "-1"], "--trunk-lr"),
        (["--trunk-lr", "0.1", "1e308"], "--trunk-lr"),
        (["--head-lr", "inf"], "--head-lr"),
        (["--weight-decay", "1e308"], "--weight-decay"),
        (["--protocol", "sage", "--labels", "50"], "1 and 10 %"),
        (["--protocol", "swav", "--head-lr", "1"], "its own"),
        (["--save", "nowhere/file.pt"], "there is no folder"),
    ],
)
def test_bad_input_is_one_sentence(tiny_run, tmp_path, refused, args, words):
    flat = write_images(tmp_path / "flat", 20, classes=1) if "FLAT" in args else ""
    assert words in refused("downstream.finetune", tiny_run, *(flat if a == "FLAT" else a for a in args))
