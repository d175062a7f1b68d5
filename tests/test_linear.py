"""The linear probe on random crops: all rates at once, stopped and resumed, and each paper's protocol."""

import contextlib
import io
import json

import pytest
import torch
import torch.nn.functional as F
from helpers import command, equal, fork
from torch import nn

import common
import data
import evaluate
import runs
import sets
from downstream import linear

FLAGS = ["--device", "cpu", "--workers", "0", "--no-amp", "--log-every", "1"]


def probe(*words, code=None):
    with contextlib.redirect_stdout(out := io.StringIO()):
        assert linear.main([*map(str, words), *FLAGS]) == code
    return out.getvalue()


def own(out):
    """What a run has written into RUN/evaluate.json."""
    return next(iter(json.loads((out / "evaluate.json").read_text()).values()))["linear_augmented"]


def test_every_rate_is_trained_as_if_it_were_alone(tiny_run, tmp_path):
    """Against torch's own SGD on the features of the loader's crops, rate by rate."""
    flags = tiny_run, "--batch-size", 18, "--epochs", 2, "--protocol", "byol"
    before = (tiny_run / "backbone.pt").read_bytes()
    probe(*flags, "--out", tmp_path / "all")
    assert (tiny_run / "backbone.pt").read_bytes() == before  # MoCo's code asserts it, too
    found = runs.load(tmp_path / "all" / "checkpoint.pt")["model"]
    backbone, _, _, _ = linear.checkpoints.open_backbone(str(tiny_run), None, 0, 0)
    train = sets.load(str(tiny_run.parent / "images"), split="train")
    rows, val = evaluate.held_out(len(train), 0)
    train, y = sets.pick(train, rows), sets.labels_of(train)[rows]
    loader = data.Loader(train, [data.view(size=16, interpolation="bilinear")], 18, 0)
    batches = [batch for epoch in (0, 1) for batch in loader.epoch(epoch)]
    assert len(batches) == 4 and len(val) == 5
    for i, lr in enumerate((0.4, 0.3, 0.2, 0.1, 0.05)):
        head = nn.Linear(backbone.dim, 3)
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
        optimizer = torch.optim.SGD(head.parameters(), lr, momentum=0.9, nesterov=True)
        for step, (index, (x,)) in enumerate(batches):
            optimizer.param_groups[0]["lr"] = lr * 18 / 256 * evaluate.optim.cosine(step, 4, 1.0, 0.0)
            optimizer.zero_grad()
            F.cross_entropy(head(backbone.eval()(x).detach()), y[index]).backward()
            optimizer.step()
        assert torch.allclose(found[f"heads.0.{i}.weight"], head.weight, atol=1e-6)
        assert torch.allclose(found[f"heads.0.{i}.bias"], head.bias, atol=1e-6)


def test_several_backbones_share_the_crops_and_know_nothing_of_each_other(tiny_run, tmp_path):
    flags = "--data", tiny_run.parent / "images", "--batch-size", 18, "--epochs", 1, "--size", 16
    probe(tiny_run, "random:resnet18", *flags, "--out", tmp_path / "two")
    both = runs.load(tmp_path / "two" / "checkpoint.pt")["model"]
    result = next(iter(own(tiny_run).values()))
    for i, name in enumerate((tiny_run, "random:resnet18")):
        probe(name, *flags, "--out", tmp_path / str(i))
        alone = runs.load(tmp_path / str(i) / "checkpoint.pt")["model"]
        assert equal(alone, {k.replace(f"heads.{i}.", "heads.0."): v for k, v in both.items() if f"heads.{i}." in k})
    assert next(iter(own(tiny_run).values())) == result
    (other := tmp_path / "other").mkdir()
    about = runs.load(tiny_run / "backbone.pt")
    runs.write(other / "backbone.pt", about | {"preprocess": about["preprocess"] | {"std": data.HALF}})
    with pytest.raises(SystemExit):
        probe(tiny_run, other, *flags)


def test_it_learns_and_the_rate_is_not_chosen_on_test_images(tmp_path, monkeypatch, few_shapes):
    words = ["random:resnet10_16", "--data", "shapes", "--size", 32, "--batch-size", 16, "--epochs", 3]
    out = probe(*words, "--out", tmp_path / "a")
    seen, load = [], sets.load

    def other_labels(*args):
        images = load(*args)
        if args[2] == "test":
            seen.append(1)
            images = sets.Images("shapes", images.images, images.labels.roll(1), images.classes)
        return images

    monkeypatch.setattr(sets, "load", other_labels)
    again = probe(*words, "--out", tmp_path / "b")
    assert seen
    assert again.split("(lr ")[1] == out.split("(lr ")[1]  # the rate, and below it the scores that it was chosen by
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize(
    ("protocol", "words"),
    [
        ("grid", "crops and flips, SGD, 100 epochs of 49 images, batch 32, cosine, wd 0, lr 1 3 10 30 100 on features"),
        ("byol", "SGD, 80 epochs of 49 images, batch 32, cosine, wd 0, lr 0.05 0.0375 0.025 0.0125 0.00625; the best"),
        ("moco", "SGD, 100 epochs of 54 images, batch 32, x 0.1 at 60 80, wd 0, lr 30\n"),
        ("swav", "SGD, 100 epochs of 54 images, batch 32, cosine, wd 1e-06, lr 0.3\n"),
        ("dilo", "SGD, 100 epochs of 54 images, batch 32, x 0.1 at 30 60 90, wd 0, lr 30\n"),
        ("study", "random crops, SGD, 520 epochs of 54 images, batch 32, x 0.1 at 480 500, wd 0, lr 0.0125\n"),
    ],
)  # fmt: skip
def test_protocols(protocol, words, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(linear.loop.Loop, "begin", lambda *_, **__: False)
    assert words in probe(tiny_run, "--protocol", protocol, "--batch-size", 32)
    sizes = {"byol": 1024, "study": 2048}
    assert linear.parse_args([str(tiny_run), "--protocol", protocol])[0].batch_size == sizes.get(protocol, 256)


def test_crops_of_the_study_are_224_of_256_pixels_without_flips():
    view = data.view(size=224, **linear.CENTRAL)
    boxes = data.sample_boxes(500, 256, 341, view["scale"], view["ratio"], data.generator(0))
    assert (boxes[:, 2:] == 224).all() and view["flip"] == 0
    assert boxes[:, 0].unique().numel() == 33 and boxes[:, 1].max() == 341 - 224


def test_two_processes_train_and_test_together(tiny_run, tmp_path):
    words = [tiny_run, "--batch-size", 18, "--epochs", 2, "--lr", 3, *FLAGS]
    both = fork("-m", "downstream.linear", *words, "--out", tmp_path / "two", processes=2)
    out, err = both.communicate(timeout=300)
    assert both.returncode == 0 and out.count("linear   top-1") == 1, out + err
    two = next(iter(own(tiny_run).values()))
    probe(*words, "--out", tmp_path / "one")
    a, b = (runs.load(tmp_path / name / "checkpoint.pt")["model"] for name in ("one", "two"))
    assert (
        all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)
        and two["top1"] == next(iter(own(tiny_run).values()))["top1"]
    )


def test_a_rate_that_diverges_leaves_the_others_alone(tiny_run, tmp_path):
    words = tiny_run, "--batch-size", 18, "--epochs", 30, "--weight-decay", 1
    probe(*words, "--lr", 0.1, 100, "--out", tmp_path / "both")
    both = runs.load(tmp_path / "both" / "checkpoint.pt")["model"]
    assert both["heads.0.1.weight"].abs().max() == 0 and both["heads.0.0.weight"].abs().max() > 0
    (name,) = own(tiny_run)
    assert name == "grid epochs 30 lr [0.1, 100.0] batch_size 18 weight_decay 1.0" and own(tiny_run)[name]["lr"] == 0.1


def test_a_folder_that_cannot_be_written_to_costs_no_result(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(linear.os, "access", lambda *_: False)
    words = tiny_run, "--batch-size", 18, "--epochs", 1, "--lr", 1, "--out", tmp_path / "probe"
    assert "top-1" in probe(*words) and not (tiny_run / "evaluate.json").exists()
    assert "is finished" in (again := probe(*words)) and "top-1" in again


def test_features_are_divided_by_their_norm_in_the_test_too(tiny_run, tmp_path):
    """The score is that of the trained classifier on the features as it was trained on them."""
    probe(tiny_run, "--batch-size", 18, "--epochs", 40, "--lr", 10, "--out", tmp_path / "probe")
    head = runs.load(tmp_path / "probe" / "checkpoint.pt")["model"]
    backbone, preprocess, _, _ = linear.checkpoints.open_backbone(str(tiny_run), None, 0, 0)
    folder, how = str(tiny_run.parent / "images"), (preprocess, torch.device("cpu"))
    (x, _), (test_x, y) = (evaluate.extract(backbone, sets.load(folder, split=s), *how) for s in ("train", "test"))
    logits = lambda norm: test_x / norm @ head["heads.0.0.weight"].T + head["heads.0.0.bias"]
    (result,) = own(tiny_run).values()
    right = evaluate.accuracy(logits(x.norm(dim=1).mean()), y)[0].item()
    assert result["top1"] == pytest.approx(right)
    args = linear.parse_args([str(tiny_run), *FLAGS])[0]
    test = sets.load(folder, split="test")
    half = linear.Heads([backbone.dim], 3, 1)
    half.heads[0][0].bias.data[1] = 1.0  # against the first feature, ten times too large without the norm
    half.heads[0][0].weight.data[0, 0] = 1.0
    z = evaluate.extract(backbone, test, *how)[0]
    norm = z[:, 0].median()
    expected = evaluate.accuracy(torch.stack([z[:, 0] / norm, torch.ones(len(z)), torch.zeros(len(z))], 1), y)[0].item()
    assert linear.score(half.heads[0], norm, backbone, test, *how, args)[0].item() == pytest.approx(expected)


def test_stopped_and_resumed_a_run_ends_with_the_same_weights(tiny_run, tmp_path, monkeypatch):
    words = tiny_run, "--batch-size", 18, "--epochs", 2
    monkeypatch.setattr(common, "catch_signals", list)
    probe(*words, "--out", tmp_path / "whole")
    stop = []
    monkeypatch.setattr(common, "catch_signals", lambda: stop)
    monkeypatch.setattr(common, "any_rank", lambda flag: (stop.append(1) or len(stop) == 3) if flag is stop else flag)
    probe(*words, "--out", tmp_path / "parts", code=common.STOPPED)
    monkeypatch.setattr(common, "any_rank", lambda flag: False)
    probe(*words, "--out", tmp_path / "parts")
    a, b = (runs.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert a["step"] == b["step"] == 4 and equal(a["model"], b["model"]) and a["result"] == b["result"]
    assert "is finished" in probe(*words, "--out", tmp_path / "parts")


def test_evaluate_hands_over(tiny_run, tmp_path, monkeypatch, capsys):
    words = tiny_run, "--augment", "--batch-size", 18, "--epochs", 1, "--out", tmp_path / "probe"
    command(monkeypatch, "evaluate", *words, "--probe", "linear")
    assert "top-1" in capsys.readouterr().out and next(iter(own(tiny_run).values()))["top1"] >= 0
    assert linear.hand_over(["A", "B", "--augment", "--lr", "1"]) == ["A", "B", "--lr", "1"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--batch-size", "60"], "--batch-size 60"),
        (["--lr", "-1"], "--lr -1"),
        (["--data", "nowhere"], "neither a named set nor a folder"),
        (["--limit", "5"], "too few labels"),
        (["--probe", "knn", "linear"], "--probe linear alone"),
        (["--size", "-5"], "--size -5"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence, tiny_run, tmp_path, refused):
    assert sentence in refused("evaluate", tiny_run, "--augment", *words, "--out", tmp_path / "probe")
    assert not (tmp_path / "probe").exists()
