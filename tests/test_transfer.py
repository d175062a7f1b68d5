"""Transfer to classification sets: their parts and scores, frozen and fine-tuned."""

import contextlib
import io
import json

import pytest
import torch
import torch.nn.functional as F
from helpers import clusters, colors, small_backbone, write_images
from torchvision import datasets
from torchvision.io import write_jpeg

import data
import evaluate
import logistic
import sets
from downstream import annotated, transfer

CPU = torch.device("cpu")
FLAGS = ["--device", "cpu", "--workers", "0", "--no-amp"]


def run(*words):
    with contextlib.redirect_stdout(out := io.StringIO()):
        transfer.main([*map(str, words), *FLAGS])
    return out.getvalue()


def task(n=120, classes=3, metric="top-1", seed=0):
    train, test = colors(n, classes, seed), colors(n // 2, classes, seed + 1)
    return transfer.Task(train, test, train.labels, test.labels, torch.arange(0, n, 5), classes, metric)


# ============ scores ============


def test_top1_and_its_mean_over_classes_by_hand():
    y, guess = torch.tensor([0, 0, 0, 0, 2, 2]), torch.tensor([0, 0, 0, 2, 2, 0])
    logits = F.one_hot(guess, 4).float()
    assert transfer.score(logits, y, "top-1") == pytest.approx(400 / 6)
    assert transfer.score(logits, y, "mean per class") == pytest.approx((75 + 50) / 2)  # classes 1 and 3: no images


def naive_map(logits, y):
    """Mean over the classes of the mean over recalls 0, .1, ..., 1 of the best precision at that recall or above."""
    total = []
    for c in range(y.shape[1]):
        ranked = [int(y[i, c]) for i in sorted(range(len(y)), key=lambda i: -logits[i, c]) if y[i, c] != 0]
        if 1 not in ranked:
            continue
        points = [(ranked[:k].count(1) / ranked.count(1), ranked[:k].count(1) / k) for k in range(1, len(ranked) + 1)]
        best = [max([p for r, p in points if r >= recall / 10 - 1e-12], default=0) for recall in range(11)]
        total.append(sum(best) / 11)
    return 100 * sum(total) / len(total)


def test_mean_ap_equals_a_loop_and_leaves_difficult_objects_out():
    g = data.generator("map")
    y = torch.tensor([1, -1, -1, -1, 0])[torch.randint(5, (90, 6), generator=g)]
    y[:, 5] = -1  # a class without objects does not count
    logits = torch.randn(90, 6, generator=g) + y
    assert transfer.score(logits, y, "11-point mAP") == pytest.approx(naive_map(logits, y))
    one = torch.tensor([[1], [0], [-1], [1]])  # ranked first to last; the second is difficult: precisions 1, 1/2, 2/3
    assert transfer.score(torch.tensor([[4.0], [3.0], [2.0], [1.0]]), one, "11-point mAP") == pytest.approx(
        100 * (6 * 1 + 5 * 2 / 3) / 11
    )


# ============ frozen ============


def test_the_penalty_is_on_the_sum_of_the_losses():
    x, y = clusters(80)
    w, b = transfer.fit_frozen(x, y, 5, [0.1, 10.0])
    mean, bias = logistic.fit(x, y, 5, [0.1 / 80, 10 / 80])
    assert torch.allclose(w, mean, atol=1e-3) and torch.allclose(b[:, 0], bias, atol=1e-3)


def test_several_labels_an_image_are_a_logistic_regression_a_class():
    x, y = clusters(80)
    truth = torch.stack([y == 0, y > 2, y % 2 == 0], 1).long() * 2 - 1
    truth[:7, 1] = 0  # difficult: as absent
    w, b = transfer.fit_frozen(x, truth, 3, [0.3, 3.0])
    assert w.shape == (2, 16, 3) and b.shape == (2, 1, 3)
    for i, penalty in enumerate((0.3, 3.0)):
        at, bias = w[i].clone().requires_grad_(), b[i].clone().requires_grad_()
        target = (truth == 1).float()
        loss = (
            F.binary_cross_entropy_with_logits(x @ at + bias, target, reduction="sum") + penalty / 2 * at.square().sum()
        )
        loss.backward()
        assert at.grad.abs().max() < 0.05 and bias.grad.abs().max() < 0.05  # of sums over 80 images


def test_the_penalty_is_chosen_on_the_validation_part_and_never_on_test_images():
    x, y = clusters(200, spread=2.0)
    test_x, test_y = clusters(100, spread=2.0, seed=1)
    images = sets.Images("x", x, y)
    base = transfer.Task(images, images, y, test_y, torch.arange(150, 200), 5, "top-1")
    r = transfer.frozen(base, (x, y), (test_x, test_y))
    assert len(r["grid"]) == 45 and r["score"] > 40
    other = transfer.frozen(base._replace(test_y=test_y.roll(1)), (x, y), (test_x, test_y))
    assert other["grid"] == r["grid"] and other["chosen"] == r["chosen"] and other["score"] < r["score"]
    noise = base._replace(y=torch.cat([y[:150], y[150:].roll(1)]))
    assert max(transfer.frozen(noise, (x, y), (test_x, test_y))["grid"].values()) < max(r["grid"].values())
    gone = torch.where(torch.arange(200) % 7 == 0, -1, y)  # images that do not decode
    kept = transfer.frozen(base, (x.where(gone[:, None] >= 0, torch.nan), gone), (test_x, test_y))
    some = gone >= 0
    val = torch.isin(torch.arange(200), base.val)[some].nonzero()[:, 0]
    assert kept == transfer.frozen(base._replace(y=y[some], val=val), (x[some], y[some]), (test_x, test_y))


def test_after_the_choice_all_images_are_used(monkeypatch):
    """A class of the validation part alone is known in the end."""
    x, y = clusters(200)
    val = (y == 4).nonzero()[:, 0]
    images = sets.Images("x", x, y)
    r = transfer.frozen(transfer.Task(images, images, y, y, val, 5, "top-1"), (x, y), (x, y))
    assert max(r["grid"].values()) == 0 and r["score"] > 95
    sizes, fit = [], transfer.fit_finetuned
    spy = lambda task, rows, *rest: (sizes.append(len(rows)), fit(task, rows, *rest))[1]
    monkeypatch.setattr(transfer, "fit_finetuned", spy)
    transfer.finetuned(task(), Small(), R | {"lr": [0.1]}, {}, lambda grid: None)
    assert sizes == [96, 96, 120]


def test_a_backbone_sees_images_as_published_and_results_are_those_of_its_settings(tiny_run, monkeypatch):
    flags = transfer.parse_args([str(tiny_run), *FLAGS])[0]
    model = transfer.Model(str(tiny_run), flags, CPU)
    assert model.preprocess["short"] == model.preprocess["size"] == 16
    assert model.preprocess["interpolation"] == "bicubic"
    words, folder, calls, frozen = (tiny_run, "--sets"), tiny_run.parent / "images", [], transfer.frozen
    monkeypatch.setattr(transfer, "frozen", lambda *args: (calls.append(1), frozen(*args))[1])
    first = run(*words, folder)
    assert run(*words, folder) == first and len(calls) == 1  # it is known
    run(*words, folder, "--seed", 1)  # another validation part
    run(*words, folder, "--size", 24)
    (folder / "class0" / "000.jpg").rename(folder / "class1" / "moved.jpg")
    sets.list_folder.cache_clear(), sets._load.cache_clear()
    run(*words, folder)
    assert len(calls) == 4
    kept = json.loads((tiny_run / "evaluate.json").read_text())[str(folder)]["transfer"]["frozen"]
    assert len(kept) == 4  # none replaces another


def test_images_are_cut_as_published():
    """The short side at the size of the network, by bicubic interpolation, not at 256/224 of it."""
    image = torch.randint(0, 255, (3, 90, 120), dtype=torch.uint8, generator=data.generator("cut"))
    whole = data.fit(image, 72, "bicubic", short=72)
    assert torch.equal(
        whole, data.tvf.center_crop(data.tvf.resize(image, [72], data.tvf.InterpolationMode.BICUBIC), [72] * 2)
    )
    assert not torch.equal(whole, data.fit(image, 72, "bicubic"))


# ============ fine-tuned ============


class Small:
    """What fine-tuning needs of a transfer.Model."""

    device, workers, amp, seed = CPU, 0, False, 0

    def __init__(self):
        self.backbone = small_backbone()
        self.preprocess = {"mean": data.MEAN, "std": data.STD, "size": 16, "interpolation": "bicubic", "short": 16}


R = {"updates": 24, "batch_size": 32, "lr": [1e-6, 0.1], "weight_decay": [0.0, 1e-4], "norms": False}


def test_fine_tuning_chooses_on_the_validation_part_and_keeps_what_is_done():
    seen = []
    r = transfer.finetuned(task(), Small(), R, {}, lambda grid: seen.append(dict(grid)))
    assert [len(grid) for grid in seen] == [1, 2, 3, 4] and r["chosen"].startswith("lr 0.1") and r["score"] > 80
    again = transfer.finetuned(task(), Small(), R, seen[2], lambda grid: seen.append(dict(grid)))
    assert again == r and len(seen) == 5  # one pair was left
    other = task()._replace(test_y=task().test_y.roll(1))
    assert transfer.finetuned(other, Small(), R, r["grid"], None)["chosen"] == r["chosen"]


def test_what_diverges_is_not_chosen(refused):
    r = transfer.finetuned(task(), Small(), R | {"lr": [1e30, 0.1], "weight_decay": [0.0]}, {}, lambda grid: None)
    assert r["grid"]["lr 1e+30 wd 0"] == -1 and r["chosen"] == "lr 0.1 wd 0"
    only = R | {"lr": [1e30], "weight_decay": [0.0]}
    assert "diverged" in refused(lambda: transfer.finetuned(task(), Small(), only, {}, None))


def test_the_head_depends_on_the_seed_alone():
    heads = []
    for _ in range(2):
        torch.rand(1)
        net, _ = transfer.fit_finetuned(task(), torch.arange(64), Small(), 1e-9, 0.0, R | {"updates": 1})
        heads.append(net[1].weight)
    assert torch.equal(*heads)


def test_fine_tuning_is_sgd_with_nesterov_and_a_cosine(monkeypatch):
    seen, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: (seen.append(dict(self.param_groups[0])), step(self)))
    net, _ = transfer.fit_finetuned(task(), torch.arange(100), Small(), 0.01, 1e-4, R | {"norms": True})
    assert len(seen) == 24 and all(group["nesterov"] and group["momentum"] == 0.9 for group in seen)
    assert seen[0]["weight_decay"] == pytest.approx(1e-2)  # divided by the rate
    rates = torch.tensor([group["lr"] for group in seen])
    assert torch.allclose(rates, torch.tensor([0.01 * evaluate.optim.cosine(i, 24, 1.0, 0.0) for i in range(24)]))
    assert net[0].bn1.momentum == 0.1  # ten updates, as an epoch has three
    short = R | {"norms": True, "updates": 1, "batch_size": 2}
    net, _ = transfer.fit_finetuned(task(240), torch.arange(240), Small(), 0.01, 1e-4, short)
    assert net[0].bn1.momentum == 10 / 120


def test_several_labels_an_image_are_fine_tuned_with_a_sigmoid_each():
    single = task()
    truth = [F.one_hot(y, 3) * 2 - 1 for y in (single.y, single.test_y)]
    several = single._replace(y=truth[0], test_y=truth[1], metric="11-point mAP")
    r = transfer.finetuned(several, Small(), R | {"lr": [0.1], "weight_decay": [0.0]}, {}, None)
    assert r["score"] > 90 and r["grid"] == {}


# ============ sets ============


def fake_voc(root):
    """VOC 2007 with ten images a part: even ones show a dog, odd ones a cat, every fifth also a difficult bus."""
    g = data.generator("voc")
    for part in ("train", "val", "test"):
        for i in range(10):
            key, folder = f"{part}{i}", root / "VOCdevkit" / "VOC2007"
            for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            write_jpeg(
                torch.randint(0, 255, (3, 32, 40), generator=g, dtype=torch.uint8),
                str(folder / f"JPEGImages/{key}.jpg"),
            )
            objects = [("dog" if i % 2 == 0 else "cat", 0), *[("bus", 1)] * (i % 5 == 0), *[("dog", 1)] * (i == 0)]
            box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>20</xmax><ymax>20</ymax></bndbox>"
            one = "<object><name>{}</name><difficult>{}</difficult>{}</object>"
            body = "".join(one.format(shown, difficult, box) for shown, difficult in objects)
            size = "<size><width>40</width><height>32</height></size>"
            (folder / f"Annotations/{key}.xml").write_text(f"<annotation>{size}{body}</annotation>")
        (folder / f"ImageSets/Main/{part}.txt").write_text("".join(f"{part}{i}\n" for i in range(10)))


FOLDERS = [name for name in transfer.PUBLISHED_SETS if name != "voc2007"]


def test_every_set_of_the_table_from_folders(tmp_path, monkeypatch):
    """Ten images a class; some sets have an official validation part."""
    for name in FOLDERS:
        for part, n in (("train", 20), ("test", 20), *[("val", 10)] * (name in ("dtd", "aircraft", "flowers102"))):
            write_images(tmp_path / name / part, n, size=32, seed=len(part))
        for path in (tmp_path / name).rglob("*.jpg") if name in sets.IN_MEMORY else ():  # of one size
            write_jpeg(sets.decode(path)[:, :32, :32], str(path))
    fake_voc(tmp_path)
    monkeypatch.chdir(tmp_path)
    out = run("random:resnet10_16", "--size", 32, "--root", tmp_path)
    lines = [line for line in out.splitlines() if ", frozen: " in line]
    assert [line.split(" on ")[1].split(",")[0] for line in lines] == list(transfer.PUBLISHED_SETS)
    for name in transfer.PUBLISHED_SETS:
        kept = json.loads((tmp_path / "runs/transfer-random-resnet10_16/evaluate.json").read_text())[name]["transfer"]
        (kept,) = kept["frozen"].values()
        parts = "20 + 10 + 20" if name in ("dtd", "aircraft", "flowers102") else "16 + 4 + 20"
        parts = "10 + 10 + 10" if name == "voc2007" else parts
        assert f"; {parts} images" in kept["protocol"], name
        assert transfer.METRICS.get(name, "top-1") in kept["protocol"]
    head = "| frozen | aircraft | caltech101 | cars |"
    assert head in out and "| BYOL, ResNet-50, published | 53.87 | 91.46 | 56.40 |" in out
    monkeypatch.setattr(transfer, "frozen", None)  # all is done
    again = run("random:resnet10_16", "--size", 32, "--root", tmp_path)
    assert again == out


def test_difficult_objects_are_neither_there_nor_absent(tmp_path):
    fake_voc(tmp_path)
    found = transfer.open_set("voc2007", tmp_path, CPU)
    dog, bus, cat = (found.test_y[:, annotated.VOC.index(name)].tolist() for name in ("dog", "bus", "cat"))
    assert dog == [1, -1] * 5 and cat == [-1, 1] * 5 and bus == [0, -1, -1, -1, -1] * 2
    assert found.val.tolist() == list(range(10, 20)) and found.classes == 20


def test_sun397_is_read_by_its_official_lists(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(datasets, "SUN397", lambda *_, **__: pytest.fail("37 GB would be fetched"))
    sentence = refused(lambda: sets._load.__wrapped__("sun397", str(tmp_path), "train", "cpu", 0, 0, False))
    assert "Training_01.txt" in sentence and "sun397/train/CLASS" in sentence
    (tmp_path / "SUN397").mkdir()
    (tmp_path / "SUN397/Training_01.txt").write_text("/a/abbey/1.jpg\n/a/apartment/outdoor/2.jpg\n/a/abbey/3.jpg\n")
    found = sets.of_sun397(tmp_path, "train")
    assert found.classes == ["a/abbey", "a/apartment/outdoor"] and [label for _, label in found.items] == [0, 1, 0]
    assert found.path(1) == str(tmp_path / "SUN397/a/apartment/outdoor/2.jpg")


def test_caltech101_trains_on_thirty_images_a_class(tmp_path):
    folder = tmp_path / "caltech101" / "101_ObjectCategories"
    for name, n in (("BACKGROUND_Google", 40), ("ant", 33)):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            (folder / name / f"{i}.jpg").touch()
    train, test = (sets.of_caltech101(tmp_path, split) for split in ("train", "test"))
    assert sets.labels_of(train).bincount().tolist() == [30, 30] and sets.labels_of(test).bincount().tolist() == [10, 3]
    assert not {path for path, _ in train.items} & {path for path, _ in test.items}


def test_of_two_training_splits_the_second_is_the_validation_part(monkeypatch):
    class DTD:
        def __init__(self, root, split, download):
            self._image_files = [f"{root}/{split}/{i}.jpg" for i in range({"train": 5, "val": 3, "test": 2}[split])]
            self._labels, self.classes = [0] * len(self._image_files), ["a"]

    monkeypatch.setitem(sets.TORCHVISION, "dtd", (DTD, *sets.TORCHVISION["dtd"][1:]))
    train, test = (sets.from_torchvision("dtd", "R", split, "cpu") for split in ("train", "test"))
    assert len(train) == 8 and train.validation == 3 and train.path(5) == "R/val/0.jpg" and len(test) == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--sets", "nowhere"], "neither a named set nor a folder"),
        (["--sets", "shapes", "--data", "shapes"], "--sets takes the place of --data"),
        (["--sets", "shapes", "--lr", "0"], "--lr 0"),
        (["--sets", "sun397"], "Training_01.txt"),
        (["--sets", "shapes", "--size", "-5"], "--size -5"),
        (["--sets", "shapes", "--batch-size", "1"], "--batch-size 1"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sentence in refused("downstream.transfer", "random:resnet10_16", *words)


def test_images_without_labels_are_refused(tmp_path, refused):
    for i in range(4):
        write_jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8), str(tmp_path / f"{i}.jpg"))
    assert "every image needs a label" in refused(lambda: transfer.open_set(str(tmp_path), tmp_path, CPU))
    few = write_images(tmp_path / "few" / "train", 6), write_images(tmp_path / "few" / "test", 4)
    assert few and "6 training images" in refused(lambda: transfer.open_set(str(tmp_path / "few"), tmp_path, CPU))


def test_it_runs_in_one_process(monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "not torchrun" in refused("downstream.transfer", "random:resnet10_16", "--sets", "shapes")
