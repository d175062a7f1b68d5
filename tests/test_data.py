import json
import os

import pytest
import torch
from conftest import forked, run, write_images
from torchvision.io import write_png
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import v2 as T
from torchvision.transforms.v2 import functional as tvf

import byol
import data
from shapes import draw_shapes

REAL = os.environ.get("TEST_DATA")


def images(n=6, size=32, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


# ============ every operation against torchvision's on the same parameters ============


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (48, 30, 32), (96, 64, 18)])
def test_crop_resize_equals_resized_crop(mode, height, width, size):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (12, 3, height, width), generator=g, dtype=torch.uint8)
    boxes = data.sample_boxes(12, height, width, (0.08, 1.0), (3 / 4, 4 / 3), g)
    flip = torch.arange(12) % 2 == 1
    ours = data.crop_resize(x, boxes, flip, size, mode)
    for i, (top, left, h, w) in enumerate(boxes.int().tolist()):
        image = x[i].float() / 255
        theirs = tvf.resized_crop(image, top, left, h, w, [size, size], tvf.InterpolationMode(mode), antialias=True)
        theirs = (theirs.flip(-1) if flip[i] else theirs).clamp(0, 1)
        assert torch.allclose(ours[i], theirs, atol=2e-5), (i, (ours[i] - theirs).abs().max())


@pytest.mark.parametrize(
    ("ours", "theirs", "factors"),
    [
        (data.brightness, tvf.adjust_brightness, [0.0, 0.3, 1.0, 1.8]),
        (data.contrast, tvf.adjust_contrast, [0.0, 0.3, 1.0, 1.8]),
        (data.saturation, tvf.adjust_saturation, [0.0, 0.3, 1.0, 1.8]),
        (data.hue, tvf.adjust_hue, [-0.5, -0.1, 0.0, 0.3]),
    ],
)
def test_colour_operation_equals_torchvision(ours, theirs, factors):
    x = images(4)
    x[3] = x[3, :1]  # grey: the hue of no colour must not divide by zero
    f = torch.tensor(factors).view(-1, 1, 1, 1)
    expected = torch.stack([theirs(image, factor) for image, factor in zip(x, factors, strict=True)])
    assert torch.allclose(ours(x.clone(), f), expected, atol=1e-5)


def test_grey_solarize_normalise_equal_torchvision():
    x = images()
    assert torch.allclose(data.grey(x), tvf.rgb_to_grayscale(x), atol=1e-6)
    assert torch.allclose(data.solarize(x), tvf.solarize(x, 0.5), atol=1e-6)
    assert torch.allclose(data.normalise(x), tvf.normalize(x, list(data.MEAN), list(data.STD)), atol=1e-6)


@pytest.mark.parametrize("size", [3, 23])
def test_blur_equals_torchvision(size):
    x, sigma = images(5), torch.tensor([0.1, 0.5, 1.0, 1.5, 2.0])
    expected = torch.stack(
        [tvf.gaussian_blur(i, [size, size], [s] * 2) for i, s in zip(x, sigma.tolist(), strict=True)]
    )
    assert torch.allclose(data.blur(x, sigma, size), expected, atol=1e-5)


def test_jitter_applies_each_image_its_own_order():
    theirs = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)
    g, x = torch.Generator().manual_seed(3), images(30)
    factors = torch.cat([0.4 + torch.rand(30, 3, generator=g), torch.rand(30, 1, generator=g) - 0.5], 1)
    order = torch.rand(30, 4, generator=g).argsort(1)
    order[::5] = 4  # these are left alone
    ours = data.jitter(x.clone(), factors, order)
    for i in range(30):
        image = x[i]
        for op in order[i].tolist() if i % 5 else []:
            image = theirs[op](image, factors[i, op].item())
        assert torch.allclose(ours[i], image, atol=2e-5), i


# ============ distributions and randomness ============


def test_crops_are_distributed_as_torchvisions():
    n, scale, ratio = 4000, (0.08, 1.0), (3 / 4, 4 / 3)
    torch.manual_seed(0)
    image = torch.empty(3, 60, 90)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(n)]).float()
    ours = data.sample_boxes(n, 60, 90, scale, ratio, torch.Generator().manual_seed(1))
    assert (ours[:, 0] + ours[:, 2] <= 60).all() and (ours[:, 1] + ours[:, 3] <= 90).all() and (ours >= 0).all()
    for q in (0.1, 0.25, 0.5, 0.75, 0.9):  # quantiles of top, left, height and width
        assert ((ours.quantile(q, 0) - theirs.quantile(q, 0)).abs() <= 2.5).all(), q


@pytest.mark.parametrize("height_width", [(20, 200), (200, 20), (50, 50)])
def test_fallback_crop_is_torchvisions(height_width):
    height, width = height_width
    torch.manual_seed(0)
    # an area above 1 never fits
    theirs = RandomResizedCrop.get_params(torch.empty(3, height, width), (1.5, 1.6), (3 / 4, 4 / 3))
    ours = data.sample_boxes(2, height, width, (1.5, 1.6), (3 / 4, 4 / 3), torch.Generator())
    assert ours[0].tolist() == list(theirs)


def test_operations_happen_as_often_as_asked():
    x = torch.full((2000, 3, 8, 8), 0.25)
    x[:, 0] = 0.75
    plain = data.view(8, mean=(0, 0, 0), std=(1, 1, 1))
    g = torch.Generator().manual_seed(0)
    grey = data.augment(x.clone(), plain | {"grey": 0.2}, g)
    assert abs((grey[:, 0] == grey[:, 1]).all((1, 2)).float().mean() - 0.2) < 0.03
    solarized = data.augment(x.clone(), plain | {"solarize": 0.1}, g)
    assert abs((solarized[:, 0] < 0.5).all((1, 2)).float().mean() - 0.1) < 0.03
    jittered = data.augment(x.clone(), plain | {"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_p": 0.8}, g)
    assert abs((jittered != x).flatten(1).any(1).float().mean() - 0.8) < 0.03
    assert torch.equal(data.augment(x.clone(), plain, g), x)


# ============ copy-and-paste, and masks ============


def test_paste_is_the_papers_formula_for_the_chosen_and_nothing_for_the_rest():
    x, alpha = images(400, 8), images(400, 8, seed=1)[:, :1]
    alpha[::2] = alpha[::2].round()  # hard masks and soft ones
    view, g = data.view(8, paste=0.5), torch.Generator().manual_seed(0)
    out = data.copy_paste(x.clone(), alpha, view, None, g)
    pasted = (out != x).flatten(1).any(1)
    assert 150 < pasted.sum() < 250
    ground = ((out - alpha * x) / (1 - alpha))[pasted]  # I' = M I + (1 - M) B
    away = (alpha[pasted] < 0.9).expand_as(ground)
    level = torch.stack([b[m].median() for b, m in zip(ground, away, strict=True)])
    assert (ground - level.view(-1, 1, 1, 1))[away].abs().max() < 1e-4  # one grey an image, the same in every channel
    assert level.min() < 0.1 and level.max() > 0.9 and ((level * 255) - (level * 255).round()).abs().max() < 1e-2
    whole = torch.ones_like(alpha)
    assert torch.equal(data.copy_paste(x.clone(), whole, data.view(8, paste=1.0), None, g), x)


def test_grounds_are_crops_of_those_given():
    grounds = torch.arange(1, 4, dtype=torch.uint8)[:, None, None, None].expand(3, 3, 20, 20) * 50
    x, alpha = images(60, 8), torch.zeros(60, 1, 8, 8)
    out = data.copy_paste(x, alpha, data.view(8, paste=1.0), grounds, torch.Generator().manual_seed(0)) * 255
    assert torch.allclose(out, out[:, :1, :1, :1].expand_as(out), atol=1e-3)
    assert set(out[:, 0, 0, 0].round().tolist()) == {50.0, 100.0, 150.0}


def test_blending_blurs_all_masks_or_half_of_them():
    x, alpha = torch.ones(200, 3, 16, 16), torch.zeros(200, 1, 16, 16)
    alpha[:, :, :, :8] = 1
    soft = {}
    for blend in data.BLENDS:
        black = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
        out = data.copy_paste(x.clone(), alpha, data.view(16, paste=1.0, blend=blend), black, torch.Generator().manual_seed(0))
        between = (out > 0.01) & (out < 0.99)
        soft[blend] = between.flatten(1).any(1).float().mean().item()
        assert not between[:, :, :, :6].any() and not between[:, :, :, 10:].any()  # 5 taps reach two pixels
    assert soft["none"] == 0 and soft["gaussian"] == 1 and 0.35 < soft["mix"] < 0.65
    for seed in range(40):  # also where none of a small batch is pasted or blurred
        g = torch.Generator().manual_seed(seed)
        data.copy_paste(x[:2].clone(), alpha[:2], data.view(16, paste=0.3, blend="mix"), None, g)


def test_masks_are_where_the_images_are():
    images = data.Images("x", torch.zeros(6, 3, 8, 8, dtype=torch.uint8, device="meta"))
    made = data.Loader(images, [data.view(8, paste=1.0)], 2, 0, alpha=torch.zeros(6, 4, 4, dtype=torch.uint8))
    assert made.alpha.device.type == "meta" and made.alpha.shape == (6, 1, 8, 8)


def test_an_image_that_takes_anothers_place_brings_its_own_mask(folder):
    files = data.load(str(folder))
    with open(files.items[2][0], "wb") as f:
        f.write(b"broken")
    alpha = torch.arange(64, dtype=torch.uint8)[:, None, None].expand(64, 4, 4).contiguous()
    index, (crop,), bad = data.Crops(files, [data.view(16, paste=1.0)], 0, alpha)[0, 2]
    assert index == 2 and bad == [2] and crop.shape == (4, 16, 16)
    assert (crop[3] == crop[3, 0, 0]).all() and crop[3, 0, 0] != 2


@pytest.mark.parametrize("memory", [True, False])
def test_masks_are_cut_as_their_images(folder, memory):
    """The mask of each image is made its own first channel: after any crop and flip the two must still agree."""
    dataset = data.load(str(folder), memory=False)
    pixels = torch.stack([tvf.resize(dataset.read(i)[0], [40, 40], antialias=True) for i in range(len(dataset))])
    for i in range(len(pixels)):
        pixels[i, 0] = tvf.resize(pixels[i, :1], [8, 8]).repeat_interleave(5, 1).repeat_interleave(5, 2)[0]
    if memory:
        dataset = data.Images("x", pixels)
    else:
        for i, (path, _) in enumerate(dataset.items):
            write_png(pixels[i], path.replace(".jpg", ".png"))
            os.unlink(path)
        data.list_folder.cache_clear(), data._load.cache_clear()
        dataset = data.load(str(folder))
    black = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    view = data.view(24, interpolation="bilinear", paste=1.0, mean=(0, 0, 0), std=(1, 1, 1))
    made = data.Loader(dataset, [view], 8, 0, workers=0, alpha=pixels[:, 0], grounds=black)
    plain = data.Loader(dataset, [view | {"paste": 0.0}], 8, 0, workers=0)
    for (index, (x,)), (same, (y,)) in zip(made.epoch(0), plain.epoch(0), strict=True):
        assert torch.equal(index, same)
        assert torch.allclose(x, y * y[:, :1], atol=0.012)  # M I on black, with M the first channel


def test_views_without_a_paste_are_what_they_were_beside_one_that_pastes(shapes):
    alpha = shapes.masks * 255
    plain, paste = data.view(32, jitter=(0.4,) * 4, jitter_p=1.0), data.view(32, paste=1.0)
    _, (alone, _) = next(data.Loader(shapes, [plain, plain], 8, 0).epoch(0))
    _, (beside, _) = next(data.Loader(shapes, [plain, paste], 8, 0, alpha=alpha).epoch(0))
    assert torch.equal(alone, beside)


def test_keys_name_images_below_their_folder_through_picks(tmp_path):
    for part in ("train", "val"):
        write_images(tmp_path / part, 12, seed=int(part == "val"))
    train, test = (data.load(str(tmp_path), split=s) for s in ("pretrain", "test"))
    assert train.key(0) == "class0/000" and test.key(11) == "class1/011"
    some = torch.tensor([3, 1])
    assert [data.pick(train, some).key(i) for i in range(2)] == [train.key(3), train.key(1)]
    memory = data.Images("x", torch.zeros(9, 3, 2, 2, dtype=torch.uint8))
    assert memory.key(7) == "000007" and data.pick(memory, torch.tensor([4, 7])).key(1) == "000007"
    write_images(tmp_path / "small", 4, size=12)
    for path in (tmp_path / "small").rglob("*.jpg"):  # of one size
        write_png(torch.zeros(3, 12, 12, dtype=torch.uint8), str(path.with_suffix(".png"))), path.unlink()
    assert data.load(str(tmp_path / "small"), memory=True).key(1) == "class0/002"


def test_masks_of_a_folder_are_read_in_the_sets_order(folder, tmp_path, capsys):
    dataset = data.load(str(folder))
    for i in range(len(dataset)):
        path = tmp_path / "masks" / f"{dataset.key(i)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(torch.full((1, 5 + i % 3, 7), i, dtype=torch.uint8), str(path))
    masks = data.read_masks(tmp_path / "masks", dataset, 16)
    assert masks.shape == (64, 16, 16) and masks.dtype == torch.uint8
    assert all((masks[i] == i).all() for i in range(64))
    file = lambda i: tmp_path / "masks" / f"{dataset.key(i)}.png"
    file(7).unlink()
    data.list_folder.cache_clear()
    assert (data.read_masks(tmp_path / "masks", dataset)[7] == 0).all()  # one may lack, as a broken image has none
    assert f"1 of 64 images of {folder} have no mask below {tmp_path}/masks: {dataset.key(7)}" in capsys.readouterr().out
    for change, words in (
        (lambda: file(8).unlink(), f"2 of 64 images of {folder} have no mask"),
        (lambda: [file(i).write_text("no") for i in (7, 8)], "not a mask that can be read"),
    ):
        change()
        data.list_folder.cache_clear()
        with pytest.raises(SystemExit) as stopped:
            data.read_masks(tmp_path / "masks", dataset)
        assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_keys_decide_randomness_and_differ():
    def draw(*key):
        return torch.rand(4, generator=data.generator(*key))

    assert torch.equal(draw(0, 1, 2), draw(0, 1, 2))
    draws = [draw(*key) for key in [(0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 1), (0, "a", 2)]]
    assert len({tuple(d.tolist()) for d in draws}) == 5


def loader(dataset, rank=0, world=1, seed=0, workers=0, batch=8):
    views = [data.view(16, jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, grey=0.2, blur=0.5, solarize=0.2), data.view(8)]
    return data.Loader(dataset, views, batch, seed, rank, world, workers)


@pytest.fixture(scope="module")
def shapes():
    return data.load("shapes", limit=40)


def both_paths(folder):
    return [data.load("shapes", limit=40), data.load(str(folder), limit=40)]


def test_batches_repeat_and_resume_exactly(folder):
    for dataset in both_paths(folder):
        whole = list(loader(dataset).epoch(3))
        again = list(loader(dataset).epoch(3, start=2))
        assert len(whole) == 5 and len(again) == 3
        for (i, xs), (j, ys) in zip(whole[2:], again, strict=True):
            assert torch.equal(i, j) and all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))
        assert xs[0].shape == (8, 3, 16, 16) and xs[1].shape == (8, 3, 8, 8)


def test_views_ranks_steps_and_epochs_differ(folder):
    for dataset in both_paths(folder):
        two = [data.view(16)] * 2
        (_, (a, b)) = next(data.Loader(dataset, two, 8, 0).epoch(0))
        assert not torch.equal(a, b)
        seen = [next(loader(dataset, rank, 2).epoch(epoch))[0].tolist() for rank in (0, 1) for epoch in (0, 1)]
        assert len({tuple(s) for s in seen}) == 4
        assert not set(seen[0]) & set(seen[2])  # two ranks, one epoch


def test_an_epoch_visits_every_image_once_over_all_ranks(shapes):
    index = torch.cat([i for rank in (0, 1) for i, _ in loader(shapes, rank, 2, batch=4).epoch(0)])
    assert sorted(index.tolist()) == list(range(40))


def test_workers_change_nothing(folder):
    dataset = data.load(str(folder), limit=40)
    for (i, xs), (j, ys) in zip(loader(dataset).epoch(1), loader(dataset, workers=2).epoch(1), strict=True):
        assert torch.equal(i, j) and all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def test_folder_in_memory_gives_the_same_images(tmp_path):
    folder = tmp_path / "same"
    for i in range(6):
        image = torch.randint(0, 255, (3, 24, 24), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        (folder / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
        write_png(image, str(folder / f"c{i % 2}" / f"{i}.png"))
    memory, files = data.load(str(folder), memory=True), data.load(str(folder))
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
    """Mean colour outside the mask, classified by 20-NN: chance is 10 %."""
    import evaluate

    def background(n, seed):
        images, labels, masks = draw_shapes(n, seed=seed)
        outside = ~masks.bool()[:, None]
        return (images / 255 * outside).sum((2, 3)) / outside.sum((2, 3)) - 0.5, labels

    train, test = background(4000, 0), background(1000, 1)
    assert evaluate.knn(*train, *test, ks=(20,))[20][0] < 15


def test_train_val_folders_and_held_out_tenth(tmp_path):
    write_images(tmp_path / "a" / "train", 20)
    write_images(tmp_path / "a" / "val", 10)
    assert [len(data.load(str(tmp_path / "a"), split=s)) for s in ("pretrain", "train", "test")] == [20, 20, 10]
    write_images(tmp_path / "b", 40)
    assert [len(data.load(str(tmp_path / "b"), split=s)) for s in ("pretrain", "train", "test")] == [40, 36, 4]
    flat = tmp_path / "flat"
    for i, path in enumerate(sorted((tmp_path / "b").rglob("*.jpg"))):
        flat.mkdir(exist_ok=True)
        path.rename(flat / f"{i}.jpg")
    assert data.load(str(flat)).classes is None


def test_a_folder_under_root_serves_as_a_named_set(tmp_path):
    for split, n in (("train", 20), ("test", 8)):
        for i in range(n):
            place = tmp_path / "cifar10" / split / f"c{i % 2}"
            place.mkdir(parents=True, exist_ok=True)
            write_png(torch.full((3, 32, 32), i, dtype=torch.uint8), str(place / f"{i}.png"))
    train, test = (data.load("cifar10", tmp_path, split) for split in ("train", "test"))
    assert isinstance(train, data.Images) and train.images.shape == (20, 3, 32, 32) and len(test) == 8


def test_fingerprints_change_with_the_data(folder):
    a, b = data.load("shapes", limit=30), data.load("shapes", limit=31)
    assert a.fingerprint() == data.subset(data.load("shapes"), 30, 0).fingerprint() != b.fingerprint()
    files = data.load(str(folder))
    before = files.fingerprint()
    next(folder.rglob("*.jpg")).write_bytes(b"changed")
    assert files.fingerprint() != before


# ============ shares of the labels ============


def test_shares_are_nested_balanced_and_seeded():
    labels = torch.tensor([0] * 300 + [1] * 200 + [2] * 30 + [-1] * 50)
    labels = labels[torch.randperm(580, generator=data.generator(0))]
    one, ten, all_ = (data.share(labels, percent, 0) for percent in (1, 10, 100))
    assert set(one.tolist()) < set(ten.tolist()) < set(all_.tolist())
    assert torch.bincount(labels[one]).tolist() == [3, 2, 1]  # at least one of each class
    assert torch.bincount(labels[ten]).tolist() == [30, 20, 3]
    assert torch.equal(all_, (labels >= 0).nonzero()[:, 0])  # sorted, and never an image without a label
    assert torch.equal(ten, data.share(labels, 10, 0)) and not torch.equal(ten, data.share(labels, 10, 1))
    assert len(data.share(torch.full((5,), -1), 10, 0)) == 0


class Lazy:
    """What a data set of torchvision looks like; an image is never to be read."""

    def __init__(self, name, labels):
        setattr(self, name, labels)

    def __len__(self):
        return 4


@pytest.mark.parametrize("name", ["targets", "_labels", "labels", "_samples"])
def test_labels_are_read_without_decoding_and_follow_picks(name):
    labels = [("nowhere.jpg", i) for i in (3, 1, 4, 1)] if name == "_samples" else [3, 1, 4, 1]
    files = data.Files("lazy", Lazy(name, labels))
    assert data.labels_of(files).tolist() == [3, 1, 4, 1] and data.labels_of(files).dtype == torch.int64
    some = data.pick(data.pick(files, torch.tensor([3, 2, 0])), torch.tensor([2, 1]))
    assert data.labels_of(some).tolist() == [3, 4] and some.items.indices == [0, 2]


def test_picks_and_labels_of_lists_and_of_sets_in_memory(shapes):
    files = data.Files("list", [(f"{i}.jpg", i % 3) for i in range(6)], ["a", "b", "c"])
    some = data.pick(files, torch.tensor([5, 1]))
    assert some.items == [("5.jpg", 2), ("1.jpg", 1)] and some.classes == files.classes
    assert data.labels_of(some).tolist() == [2, 1]
    some = data.pick(shapes, torch.tensor([5, 1]))
    assert torch.equal(some.images, shapes.images[[5, 1]]) and torch.equal(data.labels_of(some), shapes.labels[[5, 1]])
    assert torch.equal(some.masks, shapes.masks[[5, 1]])
    assert data.labels_of(data.Images("plain", shapes.images)).tolist() == [-1] * 40
    with pytest.raises(SystemExit):
        data.labels_of(data.Files("lazy", Lazy("other", [])))


def test_official_lists_name_images_of_a_folder(tmp_path, capsys, shapes):
    items = [(f"/x/n{c}/{name}", c) for c in (0, 1) for name in (f"n{c}_1.JPEG", f"n{c}_2.JPEG", "same.JPEG")]
    files, names = data.Files("folder", items), tmp_path / "list.txt"
    names.write_text("n1_2.JPEG\nn0_1.JPEG\n\n")
    assert data.listed(files, names).tolist() == [0, 4]
    names.write_text("n1/same.JPEG\nn0/n0_2.JPEG\n")
    assert data.listed(files, names).tolist() == [1, 5]
    for text, dataset, words in [
        ("n0_1.JPEG\nn7_1.JPEG\nn8_1.JPEG\n", files, "'n7_1.JPEG'"),  # the first that is missing
        ("same.JPEG\n", files, "2 images"),
        ("\n", files, "names no image"),
        ("n0_1.JPEG\n", shapes, "no file names"),
        (None, files, "No such file"),
    ]:
        names.unlink(missing_ok=True) if text is None else names.write_text(text)
        with pytest.raises(SystemExit) as stop:
            data.listed(dataset, names)
        assert stop.value.code == 2 and words in capsys.readouterr().err


# ============ commands and bad input ============


def test_check_lists_what_does_not_decode(folder):
    bad = next(folder.rglob("*.jpg"))
    bad.write_bytes(bad.read_bytes()[:20])
    out, _ = run("data.py", "check", folder, code=1)
    assert str(bad) in out and "64 images, 1 do not decode" in out
    _, err = forked("data.py", "check", folder / "none", code=2)
    assert err.startswith("error: ") and len(err.splitlines()) == 1


def test_show_writes_a_picture(folder, tmp_path):
    for what, size in (("shapes", 32), (folder, 48)):
        out, _ = forked("data.py", "show", what, "--n", 4, "--size", size, "--out", tmp_path / "show.png")
        picture = data.decode(tmp_path / "show.png")
        assert picture.float().std() > 10 and "view 2" in out


def test_one_corrupt_image_is_replaced_under_its_own_index(folder, capsys):
    bad = sorted(folder.rglob("*.jpg"))[5]
    bad.write_bytes(b"not an image")
    seen = torch.cat([i for i, _ in loader(data.load(str(folder))).epoch(0)])
    assert sorted(seen.tolist()) == list(range(64))
    assert str(bad) in capsys.readouterr().out


def test_many_corrupt_images_stop_the_run(folder):
    for bad in sorted(folder.rglob("*.jpg"))[:5]:
        bad.write_bytes(b"not an image")
    with pytest.raises(SystemExit) as stop:
        list(loader(data.load(str(folder))).epoch(0))
    assert stop.value.code == 2


def test_recipes_are_plain_and_their_views_known():
    for recipe in byol.RECIPES.values():
        json.dumps(recipe)
        for v in recipe["views"]:
            assert set(data.view(32, **v)) == set(data.view(32))


def test_a_whole_view_equals_torchvisions_compose():
    """On the parameters that our generator draws; no solarize, whose threshold makes of rounding a difference."""
    x = torch.randint(0, 256, (16, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    v = data.view(32, flip=1.0, grey=1.0)
    boxes = data.sample_boxes(16, 32, 32, v["scale"], v["ratio"], data.generator("o"))
    g = data.generator("o")
    ours = data.augment(data.random_crops(x, v, g), v, g)
    after = T.Compose([T.RandomHorizontalFlip(1), T.Grayscale(3), T.Normalize(data.MEAN, data.STD)])
    for i, (top, left, h, w) in enumerate(boxes.int().tolist()):
        crop = tvf.resized_crop(x[i] / 255, top, left, h, w, [32, 32], tvf.InterpolationMode.BICUBIC, antialias=True)
        assert torch.allclose(ours[i], after(crop.clamp(0, 1)), atol=1e-4)


# ============ real images, where there are any ============


@pytest.mark.skipif(
    not REAL, reason="set TEST_DATA to a folder that holds cifar10/train/CLASS/*.jpg and cifar10/test/..."
)
def test_real_images_through_both_paths():
    files = data.load(f"{REAL}/cifar10", limit=64)
    memory = data.load("cifar10", REAL, limit=64)
    assert len(data.load(f"{REAL}/cifar10", split="test")) == 10_000
    assert isinstance(files, data.Files) and isinstance(memory, data.Images) and len(memory.classes) == 10
    preprocess = {"mean": data.MEAN, "std": data.STD, "size": 32, "interpolation": "bilinear"}
    (x, y), (a, b) = (next(data.batches(d, preprocess)) for d in (memory, files))
    assert torch.equal(x, a) and torch.equal(y, b)
    for dataset in (files, memory):
        _, (v, w) = next(loader(dataset).epoch(0))
        assert v.shape == (8, 3, 16, 16) and w.shape == (8, 3, 8, 8) and v.std() > 0.3
