import contextlib
import json
import os
import runpy
import shutil
import struct
import sys
import types
import warnings
import zlib
from pathlib import Path

import pytest
import torch
from helpers import write_images
from PIL import Image, ImageOps, ImageSequence
from torchvision import io
from torchvision.io import write_jpeg, write_png
from torchvision.transforms.v2 import functional as tvf

import data
import evaluate
import sets
import shapes as drawing
from shapes import draw_shapes

pytestmark = pytest.mark.usefixtures("twentieth_of_shapes")


@pytest.fixture(scope="module")
def shapes():
    return sets.load("shapes", limit=40)


def test_keys_name_images_below_their_folder_through_picks(tmp_path):
    for part in ("train", "val"):
        write_images(tmp_path / part, 12, seed=int(part == "val"))
    train, test = (sets.load(str(tmp_path), split=s) for s in ("pretrain", "test"))
    assert train.key(0) == "class0/000" and test.key(11) == "class1/011"
    some = torch.tensor([3, 1])
    assert [sets.pick(train, some).key(i) for i in range(2)] == [train.key(3), train.key(1)]
    memory = sets.Images("x", torch.zeros(9, 3, 2, 2, dtype=torch.uint8))
    assert memory.key(7) == "000007" and sets.pick(memory, torch.tensor([4, 7])).key(1) == "000007"
    write_images(tmp_path / "small", 4, size=12)
    for path in (tmp_path / "small").rglob("*.jpg"):  # of one size
        write_png(torch.zeros(3, 12, 12, dtype=torch.uint8), str(path.with_suffix(".png"))), path.unlink()
    assert sets.load(str(tmp_path / "small"), memory=True).key(1) == "class0/002"


def test_masks_of_a_folder_are_read_in_the_sets_order(folder, tmp_path, capsys):
    dataset = sets.load(str(folder))
    for i in range(len(dataset)):
        path = tmp_path / "masks" / f"{dataset.key(i)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(torch.full((1, 5 + i % 3, 7), i, dtype=torch.uint8), str(path))
    masks = sets.read_masks(tmp_path / "masks", dataset, 16)
    assert masks.shape == (64, 16, 16) and masks.dtype == torch.uint8
    assert all((masks[i] == i).all() for i in range(64))
    file = lambda i: tmp_path / "masks" / f"{dataset.key(i)}.png"
    file(7).unlink()
    sets.list_folder.cache_clear()
    assert (sets.read_masks(tmp_path / "masks", dataset)[7] == 0).all()  # one may lack, as a broken image has none
    out = capsys.readouterr().out
    assert f"1 of 64 images of {folder} have no mask below {tmp_path}/masks: {dataset.key(7)}" in out
    for change, words in (
        (lambda: file(8).unlink(), f"2 of 64 images of {folder} have no mask"),
        (lambda: [file(i).write_text("no") for i in (7, 8)], f"not a mask that can be read: {tmp_path}/masks"),
    ):
        change()
        sets.list_folder.cache_clear()
        with pytest.raises(SystemExit) as stopped:
            sets.read_masks(tmp_path / "masks", dataset)
        assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_folder_in_memory_gives_the_same_images(tmp_path):
    folder = tmp_path / "same"
    for i in range(6):
        image = torch.randint(0, 255, (3, 24, 24), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        (folder / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
        write_png(image, str(folder / f"c{i % 2}" / f"{i}.png"))
    memory, files = sets.load(str(folder), memory=True), sets.load(str(folder))
    preprocess = {"mean": data.MEAN, "std": data.STD, "size": 24, "interpolation": "bilinear"}
    (x, y), (a, b) = (next(data.batches(d, preprocess)) for d in (memory, files))
    assert torch.equal(x, a) and torch.equal(y, b) and memory.labels.tolist() == y.tolist()


# ============ sets ============


def test_shapes_are_deterministic_balanced_and_masked():
    images, labels, masks = draw_shapes(500)
    again = draw_shapes(500)
    assert all(torch.equal(a, b) for a, b in zip((images, labels, masks), again, strict=True))
    other = draw_shapes(500, seed=1)[0]
    assert not torch.equal(images, other)
    assert images.dtype == torch.uint8 and images.shape == (500, 3, 32, 32) and masks.shape == (500, 32, 32)
    assert torch.bincount(labels, minlength=10).min() > 20
    share = masks.float().mean((1, 2))
    assert share.min() > 0.03 and share.max() < 0.95
    assert torch.equal(draw_shapes(20)[0], images[:20])  # an image depends on its place in the list, not on n
    assert draw_shapes(20, size=64)[0].shape == (20, 3, 64, 64)


def test_the_background_of_shapes_does_not_tell_the_class():
    """Mean color outside the mask, classified by 20-NN: chance is 10 %."""

    def background(n, seed):
        images, labels, masks = draw_shapes(n, seed=seed)
        outside = ~masks.bool()[:, None]
        return (images / 255 * outside).sum((2, 3)) / outside.sum((2, 3)) - 0.5, labels

    train, test = background(4000, 0), background(1000, 1)
    assert evaluate.knn(*train, *test, ks=(20,))[20][0] < 15


def test_test_images_of_shapes_are_none_of_the_training_images():
    train, test = (sets.load("shapes", split=split).images.flatten(1) for split in ("train", "test"))
    assert len({bytes(x.numpy()) for x in train} & {bytes(x.numpy()) for x in test}) == 0


def test_the_background_of_hard_shapes_wears_the_pattern_of_a_random_class(monkeypatch):
    a_level_each = lambda k, x, y, phase: torch.full_like(x, (k - 4.5) / 25)
    monkeypatch.setattr(drawing, "pattern", a_level_each)
    (soft, labels, masks), (hard, again, _) = (draw_shapes(1000, hard=hard) for hard in (False, True))
    assert torch.equal(labels, again)
    outside = ~masks.bool()[:, None].expand(-1, 3, -1, -1) & (soft > 60) & (soft < 200)
    level = torch.stack([(h[m] / s[m]).median() for h, s, m in zip(hard.float(), soft.float(), outside, strict=True)])
    kinds = (((level - 0.75) / 0.5 - 0.5) * 13 / 32 * 25 + 4.5).round()  # canvas * 0.75 to canvas * 1.25
    assert set(kinds.tolist()) == set(range(10))
    assert abs((kinds == labels).float().mean() - 0.1) < 0.04


def test_imagenet_as_people_have_it(tmp_path, capsys):
    """DIR/train/n*/ and DIR/val/n*/, without archives or meta.bin."""
    names = ["n01440764", "n01443537", "n15075141"]
    for root in (tmp_path / "bare", tmp_path / "below" / "imagenet"):
        for split, each in (("train", 4), ("val", 2)):
            for i in range(3 * each):
                file = root / split / names[i % 3] / f"{i}.JPEG"
                file.parent.mkdir(parents=True, exist_ok=True)
                write_png(torch.full((3, 8, 8), i, dtype=torch.uint8), str(file))
    for root in (tmp_path / "bare", tmp_path / "below"):
        train, test = (sets.load("imagenet", root, split) for split in ("pretrain", "test"))
        assert train.name == "imagenet" and train.classes == names == test.classes
        assert sets.labels_of(train).tolist() == [0] * 4 + [1] * 4 + [2] * 4 and len(test) == 6
        assert sets.labels_of(test).tolist() == [0, 0, 1, 1, 2, 2] and train.key(0) == "n01440764/0"
    (tmp_path / "other" / "train" / "cats").mkdir(parents=True)  # another set's folder
    with pytest.raises(SystemExit) as stop:
        sets.load("imagenet", tmp_path / "other")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "imagenet could not be loaded" in err
    assert f"{tmp_path}/other/imagenet/train/CLASS/*" in err


@pytest.mark.parametrize("error", [RuntimeError("Dataset not found"), ModuleNotFoundError("No module named 'scipy'")])
def test_what_torchvision_cannot_load_is_a_sentence_that_names_folders(error, tmp_path, monkeypatch, capsys):
    def load(*_, **__):
        raise error

    monkeypatch.setitem(sets.TORCHVISION, "cars", (load, {}, {}))
    with pytest.raises(SystemExit) as stop:
        sets.load("cars", tmp_path)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1
    assert str(error) in err and f"{tmp_path}/cars/train/CLASS/*" in err
    write_images(tmp_path / "cars" / "train", 4), write_images(tmp_path / "cars" / "val", 6)
    assert [len(sets.load("cars", tmp_path, split)) for split in ("train", "test")] == [4, 6]


def test_a_set_of_files_of_torchvision(tmp_path):
    base = tmp_path / "food-101"
    for i in range(4):
        file = base / "images" / f"c{i % 2}" / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(file)
    (base / "meta").mkdir()
    for split, names in (("train", {"c0": ["c0/0", "c0/2"], "c1": ["c1/1"]}), ("test", {"c0": [], "c1": ["c1/3"]})):
        (base / "meta" / f"{split}.json").write_text(json.dumps(names))
    train, test = (sets.load("food101", tmp_path, split) for split in ("train", "test"))
    assert sets.labels_of(train).tolist() == [0, 0, 1] and sets.labels_of(test).tolist() == [1]
    assert train.key(1) == "food-101/images/c0/2" and train.classes == ["c0", "c1"]
    image, label = test.read(0)
    assert label == 1 and (image[0].int() - 180).abs().max() < 4 and (image[1:] < 4).all()


class Stub:
    """What a data set of torchvision has."""

    def __init__(self, **found):
        vars(self).update(found)


PAIRS = [("/x/3.jpg", 3), ("/x/1.jpg", 1)]


@pytest.mark.parametrize("found", [
    {"samples": PAIRS, "split_folder": "/x"},  # ImageNet
    {"imgs": PAIRS},  # Places365
    {"_samples": PAIRS},  # Stanford Cars
    {"_image_files": [Path("/x/3.jpg"), Path("/x/1.jpg")], "_labels": [3, 1]},
    {"_images": [Path("/x/3.jpg"), Path("/x/1.jpg")], "_labels": [3, 1]},  # pets
])  # fmt: skip
def test_paths_and_labels_of_torchvisions_sets(found, monkeypatch):
    monkeypatch.setitem(sets.TORCHVISION, "dtd", (lambda root, download: Stub(**found), {}, {}))
    files = sets.from_torchvision("dtd", "/x", "train", "cpu")
    assert files.items == PAIRS and files.key(0) == "3" and sets.labels_of(files).tolist() == [3, 1]


@pytest.mark.parametrize(("shape", "labels"), [((4, 8, 8, 3), "targets"), ((4, 3, 8, 8), "labels")])
def test_small_sets_of_torchvision_are_in_memory(shape, labels, monkeypatch):
    pixels = torch.arange(4 * 3 * 64).view(4, 3, 8, 8).remainder(251).byte()
    array = (pixels.permute(0, 2, 3, 1) if shape[-1] == 3 else pixels).contiguous().numpy()
    stub = Stub(data=array, **{labels: [3, 1, 0, 2]})
    monkeypatch.setitem(sets.TORCHVISION, "svhn", (lambda root, download: stub, {}, {}))
    found = sets.from_torchvision("svhn", "nowhere", "test", "cpu")
    assert torch.equal(found.images, pixels) and found.labels.tolist() == [3, 1, 0, 2] and found.images.is_contiguous()


def test_of_train_val_and_test_the_probes_train_on_two(tmp_path):
    for part, n in (("train", 20), ("val", 6), ("test", 8)):
        write_images(tmp_path / "a" / part, n, size=24)
    load = lambda folder, split, **how: sets.load(str(folder), split=split, **how)
    whole, train, test = (load(tmp_path / "a", split) for split in ("pretrain", "train", "test"))
    assert [len(s) for s in (whole, train, test)] == [20, 26, 8] and train.validation == 6 and whole.validation == 0
    keys = [[s.key(i) for i in range(len(s))] for s in (whole, train)]
    assert keys[1][:20] == keys[0] and len(set(keys[1])) == 26  # by its key a memory bank finds the label of an image
    assert test.path(0).startswith(str(tmp_path / "a" / "test"))
    assert sets.labels_of(train)[-6:].sort().values.tolist() == [0, 0, 0, 1, 1, 1]
    before = train.contents()
    (tmp_path / "a").rename(tmp_path / "b")
    assert load(tmp_path / "b", "train").contents() == before
    for path in (tmp_path / "b").rglob("*.jpg"):  # of one size, and one that does not decode
        write_jpeg(sets.decode(path)[:, :24, :24], str(path))
    next((tmp_path / "b" / "val").rglob("*.jpg")).write_bytes(b"no image")
    assert load(tmp_path / "b", "train", memory=True).validation == 5


def test_a_part_with_one_class_of_several_has_its_label(tmp_path):
    write_images(tmp_path / "train", 6, classes=3), write_images(tmp_path / "test", 2, classes=1)
    (tmp_path / "test" / "class0").rename(tmp_path / "test" / "class2")
    assert sets.labels_of(sets.load(str(tmp_path), split="test")).tolist() == [2, 2]


def test_train_val_folders_and_held_out_tenth(tmp_path):
    write_images(tmp_path / "a" / "train", 20)
    write_images(tmp_path / "a" / "val", 10)
    assert [len(sets.load(str(tmp_path / "a"), split=s)) for s in ("pretrain", "train", "test")] == [20, 20, 10]
    write_images(tmp_path / "b", 40)
    assert [len(sets.load(str(tmp_path / "b"), split=s)) for s in ("pretrain", "train", "test")] == [40, 36, 4]
    flat = tmp_path / "flat"
    for i, path in enumerate(sorted((tmp_path / "b").rglob("*.jpg"))):
        flat.mkdir(exist_ok=True)
        path.rename(flat / f"{i}.jpg")
    assert sets.load(str(flat)).classes is None


def test_a_folder_under_root_serves_as_a_named_set(tmp_path):
    for split, n in (("train", 20), ("test", 8)):
        for i in range(n):
            place = tmp_path / "cifar10" / split / f"c{i % 2}"
            place.mkdir(parents=True, exist_ok=True)
            write_png(torch.full((3, 32, 32), i, dtype=torch.uint8), str(place / f"{i}.png"))
    train, test = (sets.load("cifar10", tmp_path, split) for split in ("train", "test"))
    assert isinstance(train, sets.Images) and train.images.shape == (20, 3, 32, 32) and len(test) == 8


def test_fingerprints_change_with_the_data(folder):
    a, b = sets.load("shapes", limit=30), sets.load("shapes", limit=31)
    assert a.fingerprint() == sets.subset(sets.load("shapes"), 30, 0).fingerprint() != b.fingerprint()
    files = sets.load(str(folder))
    before = files.fingerprint()
    next(folder.rglob("*.jpg")).write_bytes(b"changed")
    assert files.fingerprint() != before
    again = files.fingerprint()
    os.utime(next(folder.rglob("*.jpg")), ns=(1, 1))  # other content may have the same size
    assert files.fingerprint() != again


def read_anew(folder, **kwargs):
    sets.list_folder.cache_clear(), sets._load.cache_clear()
    return sets.load(str(folder), **kwargs)


def test_contents_stay_when_a_folder_is_copied_and_change_with_its_images(folder, tmp_path, monkeypatch):
    before = read_anew(folder).contents()
    shutil.copytree(folder, tmp_path / "elsewhere" / "copy", copy_function=shutil.copyfile)  # other places, other times
    copy = tmp_path / "elsewhere" / "copy"
    assert read_anew(copy).contents() == before == read_anew(f"{copy}/").contents()
    monkeypatch.chdir(copy)
    assert read_anew(".").contents() == read_anew("../copy").contents() == before
    one, two, other = copy / "class0" / "000.jpg", copy / "class0" / "002.jpg", copy / "class1" / "000.jpg"
    swap, more = tmp_path / "swap", copy / "class0" / "more.jpg"

    def exchange():
        one.rename(swap), two.rename(one), swap.rename(two)

    for change, back in (
        (lambda: shutil.copy(one, more), more.unlink),  # added
        (lambda: one.rename(swap), lambda: swap.rename(one)),  # removed
        (lambda: one.rename(other), lambda: other.rename(one)),  # moved to another class
        (exchange, exchange),
        (lambda: (shutil.copy(one, swap), one.write_bytes(b"x")), lambda: shutil.move(swap, one)),  # replaced
        (lambda: one.rename(one.with_name("renamed.jpg")), lambda: one.with_name("renamed.jpg").rename(one)),
    ):
        change()
        assert read_anew(copy).contents() != before
        back()
        assert read_anew(copy).contents() == before
    assert read_anew(copy, limit=40).contents() != read_anew(copy, limit=40, seed=1).contents()


def test_contents_of_sets_in_memory(tmp_path):
    for i in range(8):
        for place in ("a", "b"):
            (tmp_path / place / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
            write_png(torch.full((3, 4, 4), i, dtype=torch.uint8), str(tmp_path / place / f"c{i % 2}" / f"{i}.png"))
    a, b = (read_anew(tmp_path / place, memory=True) for place in ("a", "b"))
    assert a.contents() == b.contents()
    (tmp_path / "b" / "c0" / "0.png").rename(tmp_path / "b" / "c1" / "0.png")
    assert read_anew(tmp_path / "b", memory=True).contents() != a.contents()
    for change in ("images", "labels"):
        parts = {"images": a.images.clone(), "labels": a.labels.clone()}
        parts[change].view(-1)[-1] += 1
        assert sets.Images("x", **parts).contents() != a.contents() == sets.Images("x", a.images, a.labels).contents()


def test_contents_look_at_ten_thousand_files_at_most(monkeypatch):
    asked = []
    monkeypatch.setattr(sets, "size_and_time", lambda path: (asked.append(path), (1, 2))[1])
    items = [(f"/x/{i}.jpg", 0) for i in range(25_001)]
    before = sets.Files("many", items, ["a"], "/x").contents()
    assert 8_000 < len(asked) <= 10_000 and asked[0] == "/x/0.jpg" and "/x/249" in asked[-1]
    items[1] = ("/x/other.jpg", 0)
    assert sets.Files("many", items, ["a"], "/x").contents() != before  # names are compared all the same


# ============ shares of the labels ============


def test_shares_are_nested_balanced_and_seeded():
    labels = torch.tensor([0] * 300 + [1] * 200 + [2] * 30 + [-1] * 50)
    labels = labels[torch.randperm(580, generator=data.generator(0))]
    one, ten, all_ = (sets.share(labels, percent, 0) for percent in (1, 10, 100))
    assert set(one.tolist()) < set(ten.tolist()) < set(all_.tolist())
    assert torch.bincount(labels[one]).tolist() == [3, 2, 1]  # at least one of each class
    assert torch.bincount(labels[ten]).tolist() == [30, 20, 3]
    assert torch.equal(all_, (labels >= 0).nonzero()[:, 0])  # sorted, and never an image without a label
    assert torch.equal(ten, sets.share(labels, 10, 0)) and not torch.equal(ten, sets.share(labels, 10, 1))
    assert len(sets.share(torch.full((5,), -1), 10, 0)) == 0


def test_picks_and_labels_of_lists_and_of_sets_in_memory(shapes):
    files = sets.Files("list", [(f"{i}.jpg", i % 3) for i in range(6)], ["a", "b", "c"])
    some = sets.pick(files, torch.tensor([5, 1]))
    assert some.items == [("5.jpg", 2), ("1.jpg", 1)] and some.classes == files.classes
    assert sets.labels_of(some).tolist() == [2, 1]
    some = sets.pick(shapes, torch.tensor([5, 1]))
    assert torch.equal(some.images, shapes.images[[5, 1]]) and torch.equal(sets.labels_of(some), shapes.labels[[5, 1]])
    assert torch.equal(some.masks, shapes.masks[[5, 1]])
    assert sets.labels_of(sets.Images("plain", shapes.images)).tolist() == [-1] * 40


def test_official_lists_name_images_of_a_folder(tmp_path, capsys, shapes):
    items = [(f"/x/n{c}/{name}", c) for c in (0, 1) for name in (f"n{c}_1.JPEG", f"n{c}_2.JPEG", "same.JPEG")]
    files, names = sets.Files("folder", items), tmp_path / "list.txt"
    names.write_text("n1_2.JPEG\nn0_1.JPEG\n\n")
    assert sets.listed(files, names).tolist() == [0, 4]
    names.write_text("n1/same.JPEG\nn0/n0_2.JPEG\n")
    assert sets.listed(files, names).tolist() == [1, 5]
    for text, dataset, words in [
        ("n0_1.JPEG\nn7_1.JPEG\nn8_1.JPEG\n", files, "0 images of folder are called 'n7_1.JPEG'"),  # the first
        ("same.JPEG\n", files, "2 images of folder are called 'same.JPEG'"),
        ("\n", files, "names no image"),
        ("n0_1.JPEG\n", shapes, "no file names"),
        (None, files, "No such file"),
    ]:
        names.unlink(missing_ok=True) if text is None else names.write_text(text)
        with pytest.raises(SystemExit) as stop:
            sets.listed(dataset, names)
        assert stop.value.code == 2 and words in capsys.readouterr().err


# ============ commands and bad input ============


def chunk(kind, content=b""):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def write_bomb(path):
    """30,000 x 30,000 px, black: a PNG of 110 KB that asks for 2.7 GB."""
    rows = zlib.compressobj(9)
    line = bytes(1 + 30_000 // 8)
    packed = b"".join(rows.compress(line * 1000) for _ in range(30)) + rows.flush()
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND"))


ODD = {  # how to make what is no image, and what is said of it
    "folder": (lambda path: path.mkdir(), "Is a directory"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "empty": (lambda path: path.touch(), "no image"),
    "bomb": (write_bomb, "decompression bomb"),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_image_is_refused(kind, tmp_path, monkeypatch):
    make, words = ODD[kind]
    make(tmp_path / "odd.png")
    monkeypatch.setattr(sets, "decode_image", lambda *_, **__: pytest.fail("it was decoded"))
    with pytest.raises(OSError, match=words):
        sets.decode(tmp_path / "odd.png")
    with pytest.raises(OSError, match=words) as error:
        sets.Files("x", [(str(tmp_path / "odd.png"), 0)]).read(0)
    assert str(error.value).startswith(str(tmp_path))


def test_odd_files_are_named_and_counted_everywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i in range(300):
        place = tmp_path / "images" / f"c{i % 2}" / f"{i:03d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        write_png(torch.full((3, 8, 8), i % 200, dtype=torch.uint8), str(place))
    odd = [Path("images", "c0", f"{kind}.png") for kind in ("empty", "bomb", "dangling")]
    for path in odd:
        ODD[path.stem][0](path)
    (tmp_path / "images" / "c1" / "folder.png").mkdir()
    files = read_anew("images")
    files.contents(), files.fingerprint()
    assert len(files) == 303
    preprocess = data.view(8)
    for _ in range(2):
        seen = torch.cat([index for index, _ in data.Loader(files, [data.view(8)], 101, 0).epoch(0)])
        assert sorted(seen.tolist()) == list(range(303))
        found = list(data.batches(files, preprocess, 100))
    out = capsys.readouterr().out  # training names each once, and the probes' reader need not say it again
    assert all(out.count(f"warning: {path}") == 1 for path in odd) and "(3 so far)" in out
    x, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    bad = [i for i in range(303) if files.path(i) in map(str, odd)]
    assert (labels == -1).nonzero()[:, 0].tolist() == bad
    black = data.normalize(torch.zeros(3, 3, 8, 8))
    assert torch.equal(x[bad], black)
    memory = read_anew("images", memory=True)
    out = capsys.readouterr().out
    assert len(memory) == 300 and all(out.count(str(path)) == 1 for path in odd) and "left out" in out
    assert data.main(["check", "images"]) == 1
    out = capsys.readouterr().out
    assert "303 images, 3 do not decode" in out and all(str(path) in out for path in odd)
    for _ in data.batches(read_anew("images"), preprocess, 100):  # evaluate.py, by itself
        pass
    out = capsys.readouterr().out
    assert all(out.count(f"warning: {path}") == 1 for path in odd)


def test_a_folder_of_which_half_does_not_decode_ends_a_probe(folder, capsys):
    for bad in sorted(folder.rglob("*.jpg"))[::2]:
        bad.write_bytes(b"not an image")
    with pytest.raises(SystemExit) as stop:
        evaluate.extract(torch.nn.Flatten(), sets.load(str(folder)), data.view(8), torch.device("cpu"))
    assert stop.value.code == 2 and "32 of 64 images do not decode" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["folder", "bomb", "empty"])
def test_a_mask_that_is_no_image_is_a_sentence(kind, tmp_path, capsys):
    write_images(tmp_path / "images", 4)
    dataset = sets.load(str(tmp_path / "images"))
    for i in range(4):
        path = tmp_path / "masks" / f"{dataset.key(i)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(torch.full((1, 5, 7), i, dtype=torch.uint8), str(path))
    path.unlink()
    ODD[kind][0](path)
    if kind == "folder":  # is no file of a mask; so one of four lacks
        assert (sets.read_masks(tmp_path / "masks", dataset)[3] == 0).all()
        return
    with pytest.raises(SystemExit) as stop:
        sets.read_masks(tmp_path / "masks", dataset)
    assert stop.value.code == 2 and f"not a mask that can be read: {path}" in capsys.readouterr().err


def test_links_are_followed(folder, tmp_path):
    write_images(tmp_path / "other", 6, classes=1)
    (folder / "class2").symlink_to(tmp_path / "other", target_is_directory=True)
    found = read_anew(folder)
    assert found.classes == ["class0", "class1", "class2"] and len(found) == 70


def test_a_missing_folder_is_a_sentence(tmp_path, capsys):
    missing = str(tmp_path / "none")
    for call in (
        lambda: sets.load(missing),
        lambda: sets.load("imagenet", missing),
        lambda: sets.read_masks(missing, sets.Images("x", torch.zeros(1, 3, 2, 2))),
        lambda: sets.named(missing),
        lambda: data.main(["check", missing]),
        lambda: data.main(["show", "shapes", "--out", f"{missing}/a.png", "--n", "1"]),
    ):
        with pytest.raises(SystemExit) as stop:
            call()
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("error: ") and missing in err and len(err.splitlines()) == 1


# ============ decoders ============


def photograph(height=60, width=100):
    small = torch.rand(1, 3, height // 6, width // 6, generator=torch.Generator().manual_seed(0))
    return tvf.to_pil_image(tvf.resize(small, [height, width], antialias=True)[0])


def write_photographs(folder):
    """Files of every kind that goes by the fast decoder; turned.jpg is to be turned by 90 degrees."""
    image, exif = photograph(), Image.Exif()
    exif[sets.ORIENTATION] = 6
    for mode in ("L", "CMYK", "RGB"):
        image.convert(mode).save(folder / f"{mode}.jpg", quality=90)
    image.save(folder / "progressive.jpg", progressive=True, subsampling=0)
    image.save(folder / "turned.jpg", exif=exif)
    image.save(folder / "turned.webp", exif=exif, lossless=True)
    image.save(folder / "moving.webp", save_all=True, append_images=[image.rotate(180)], lossless=True)
    return sorted(folder.iterdir())


def of_torchcodec(path, mode):
    """What matters of torchcodec's decode_image: images turned by EXIF, all frames [N, 3, H, W] of an animation."""
    assert mode == "RGB"
    with Image.open(path) as image:
        frames = [tvf.pil_to_tensor(ImageOps.exif_transpose(f).convert("RGB")) for f in ImageSequence.Iterator(image)]
    return frames[0] if len(frames) == 1 else torch.stack(frames)


@pytest.mark.parametrize("decoder", ["torchvision", "torchcodec", "its imitation"])
def test_decoders_give_the_image_that_pillow_gives(decoder, tmp_path, monkeypatch):
    if decoder != "torchvision":
        real = lambda: pytest.importorskip("torchcodec.decoders").decode_image
        monkeypatch.setattr(sets, "decode_image", of_torchcodec if decoder == "its imitation" else real())
        monkeypatch.setattr(sets, "TURNS", True)
    paths = write_photographs(tmp_path)
    assert len(paths) == 7
    fast = [sets.decode(path) for path in paths]
    monkeypatch.setattr(sets, "decode_image", None)
    for path, image in zip(paths, fast, strict=True):
        plain = sets.decode(path)
        assert image.shape == plain.shape == (3, 60, 100) and image.dtype == plain.dtype == torch.uint8, path
        assert (image.int() - plain.int()).abs().max() <= 2, path  # of IDCTs and of the colors of coarse chroma


def test_the_fast_decoder_is_torchvisions_else_torchcodecs_else_none(monkeypatch):
    made = lambda: runpy.run_path(sets.__file__)
    assert made()["decode_image"] is io.decode_image and not made()["TURNS"]
    monkeypatch.delattr(io, "decode_image")
    module = types.SimpleNamespace(decode_image=of_torchcodec)
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)
    assert made()["decode_image"] is of_torchcodec and made()["TURNS"]
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", types.SimpleNamespace())  # an old one
    assert made()["decode_image"] is None and not made()["TURNS"]
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)  # as if it were not installed
    assert made()["decode_image"] is None


def test_no_word_of_deprecation_reaches_the_user(tmp_path):
    path = write_photographs(tmp_path)[2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as python -W error: a warning in a decoder would count as a broken image
        assert runpy.run_path(sets.__file__)["decode"](path).shape == (3, 60, 100)


# ============ channels and pages ============


def pictures(n):
    return [Image.new("RGB", (9, 7), (40 * i, 50, 60)) for i in range(n)]


def test_pages_and_channels_that_would_be_lost_are_refused(tmp_path):
    first, *more = pictures(12)
    first.save(tmp_path / "pages.tif", save_all=True, append_images=more)
    Image.new("RGBX", (9, 7)).save(tmp_path / "infrared.tif")
    for name, words in (("pages", "12 pages"), ("infrared", "4 channels")):
        with pytest.raises(OSError, match=words):
            sets.decode(tmp_path / f"{name}.tif")
    for mode in ("RGB", "RGBA", "L", "LA", "P", "CMYK"):
        Image.new("RGB", (9, 7), (204, 204, 204)).convert(mode).save(tmp_path / "one.tif")
        assert sets.decode(tmp_path / "one.tif").float().sub(204).abs().max() <= 1, mode
    Image.new("CMYK", (9, 7)).save(tmp_path / "ink.jpg")  # there are some in ImageNet
    assert (sets.decode(tmp_path / "ink.jpg") > 250).all()


def test_of_an_animation_the_first_frame_is_the_image(tmp_path):
    first, *more = pictures(5)
    for name in ("a.gif", "b.webp", "c.png", "d.mpo"):
        first.save(tmp_path / name, save_all=True, append_images=more, lossless=True)
        with Image.open(tmp_path / name) as image:
            assert image.n_frames > 1
        expected = torch.tensor([0, 50, 60], dtype=torch.uint8)[:, None, None].expand(3, 7, 9)
        assert (sets.decode(tmp_path / name).int() - expected.int()).abs().max() <= 3, name


def write_deep(path, most):
    Image.fromarray(torch.linspace(0, most, 64).view(8, 8).numpy().astype("uint16")).save(path)


def test_16_bits_of_a_png_become_8(tmp_path):
    for most, expected in ((65535, 255), (6000, 23)):
        write_deep(tmp_path / "deep.png", most)
        image = sets.decode(tmp_path / "deep.png")
        assert image.shape == (3, 8, 8) and image[:, 0, 0].tolist() == [0, 0, 0]
        assert image[:, -1, -1].tolist() == [expected] * 3
    write_deep(tmp_path / "deep.tif", 65535)
    with pytest.raises(OSError, match="more than 8 bits"):
        sets.decode(tmp_path / "deep.tif")


@pytest.mark.parametrize(("bits", "kind"), [(8, 0), (8, 2), (16, 2)])
def test_a_png_whose_data_ends_early_ends_no_process(bits, kind, tmp_path):
    """Chunks and checksums are whole, but the compressed data is short, of which torchvision's decoder dies."""
    row = b"\0" + bytes(32 * (3 if kind == 2 else 1) * bits // 8)
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, bits, kind, 0, 0, 0))
    whole = zlib.compress(row * 32)
    for body in (whole, zlib.compress(row * 16), whole[:-9], whole[:9]):
        body = head + chunk(b"IDAT", body) + chunk(b"IEND", b"")
        (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
        with contextlib.suppress(OSError):
            assert sets.decode(tmp_path / "x.png").shape == (3, 32, 32)
