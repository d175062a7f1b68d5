import contextlib
import functools
import importlib
import json
import os
import shutil
import signal
import socket
import struct
import zlib
from types import SimpleNamespace

import pytest
import torch
from conftest import run, write_images
from PIL import Image
from torchvision.io import write_png
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import v2 as T
from torchvision.transforms.v2 import functional as tvf

import byol
import data
import evaluate
import instdisc
import shapes as drawing
from shapes import draw_shapes

REAL = os.environ.get("TEST_DATA")


@pytest.fixture(autouse=True, scope="module")
def few_shapes():
    """500 training images and 100 test images, drawn once: the first of those that users get."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "draw_shapes", functools.cache(lambda n, *rest: draw_shapes(n // 20, *rest)))
        data._load.cache_clear()
        yield
    data._load.cache_clear()


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
    index, (crop,), said = data.Crops(files, [data.view(16, paste=1.0)], 0, alpha)[0, 2]
    assert index == 2 and list(said) == [2] and crop.shape == (4, 16, 16)
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


def test_each_image_of_a_batch_has_its_own_flip(tmp_path):
    x = torch.zeros(64, 3, 8, 8, dtype=torch.uint8)
    x[..., :4] = 200
    view = data.view(8, scale=(1.0, 1.0), ratio=None, mean=(0, 0, 0), std=(1, 1, 1))
    for i in range(64):
        write_png(x[i], str(tmp_path / f"{i}.png"))
    for dataset in (data.Images("x", x), data.load(str(tmp_path))):
        _, (made,) = next(data.Loader(dataset, [view], 64, 0).epoch(0))
        assert 18 < (made[:, 0, 0, 0] < 0.5).sum() < 46  # of 64 fair coins, outside with probability 0.0003


def test_each_image_of_a_batch_has_its_own_blur():
    x = torch.zeros(50, 3, 31, 31)
    x[:, :, 15, 15] = 1
    view = data.view(64, blur=1.0, sigma=(0.5, 2.0), mean=(0, 0, 0), std=(1, 1, 1))  # of 7 taps
    peaks = data.augment(x, view, data.generator(0))[:, 0, 15, 15]
    assert len(peaks.unique()) > 45 and peaks.max() > 3 * peaks.min()


def test_each_image_of_a_batch_has_its_own_order_and_strengths_of_jitter(monkeypatch):
    given = []
    monkeypatch.setattr(data, "jitter", lambda x, factors, order: given.append((factors, order)) or x)
    view = data.view(8, jitter=(0.1, 0.2, 0.3, 0.4), jitter_p=0.9)
    data.augment(torch.zeros(4000, 3, 1, 1), view, data.generator(0))
    ((factors, order),) = given
    orders, count = order[order[:, 0] != 4].unique(dim=0, return_counts=True)
    assert len(orders) == 24 and (count - 150).abs().max() < 60  # of 3,600 images
    assert (orders.sort(1).values == torch.arange(4)).all()
    for column, strength in enumerate((0.1, 0.2, 0.3, 0.4)):
        values = factors[:, column] - int(column < 3)  # three around 1, the hue's shift around 0
        assert -strength <= values.min() < -0.95 * strength and 0.95 * strength < values.max() <= strength
        assert abs((values > 0).float().mean() - 0.5) < 0.04
    assert factors.T.corrcoef().fill_diagonal_(0).abs().max() < 0.1


def test_contrast_and_saturation_are_what_the_view_says():
    x = torch.rand(20, 1, 8, 8, generator=data.generator(0)).expand(-1, 3, -1, -1)  # no colour, so nothing to saturate
    pixels = dict(mean=(0, 0, 0), std=(1, 1, 1), jitter_p=1.0)
    made = [data.augment(x.clone(), data.view(8, jitter=each, **pixels), data.generator(0)) for each in
            ((0, 0.5, 0, 0), (0, 0, 0.5, 0))]  # fmt: skip
    assert (made[0] - x).abs().amax((1, 2, 3)).min() > 1e-3 and torch.allclose(made[1], x, atol=1e-3)


def test_noise_is_another_for_each_step_rank_epoch_and_seed(tmp_path):
    """Of one image many times over whatever differs is noise: of colours in both paths, and of crops in memory."""
    one = torch.randint(0, 256, (3, 12, 12), generator=data.generator(0), dtype=torch.uint8)
    for i in range(16):
        write_png(one, str(tmp_path / f"{i:02d}.png"))
    whole = dict(scale=(1.0, 1.0), ratio=None, flip=0.0)
    colours, crops = data.view(12, jitter=(0.4,) * 4, jitter_p=1.0, **whole), data.view(12)
    memory = data.Images("x", one.expand(16, -1, -1, -1).contiguous())
    for dataset, view in ((memory, colours), (data.load(str(tmp_path)), colours), (memory, crops)):
        def first(seed=0, epoch=0, rank=0, step=0, dataset=dataset, view=view):
            return next(data.Loader(dataset, [view], 4, seed, rank, 2).epoch(epoch, step))[1][0]

        made = torch.stack([first(), first(seed=1), first(epoch=1), first(rank=1), first(step=1)])
        assert torch.equal(made[0], first())
        assert (made.flatten(2)[:, None] - made.flatten(2)).abs().sum((2, 3)).fill_diagonal_(1).min() > 0.1
        assert len(made.flatten(0, 1).flatten(1).unique(dim=0)) == 20  # nor do two images of a batch get the same


def test_the_order_depends_on_the_seed(folder):
    for dataset in both_paths(folder):
        orders = [torch.cat([i for i, _ in loader(dataset, seed=seed).epoch(0)]).tolist() for seed in (0, 1)]
        assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_crops_of_a_folder_follow_scale_epoch_and_seed(tmp_path):
    ramp = torch.arange(64, dtype=torch.uint8)[None, :, None] * 4
    write_png(ramp.expand(3, 64, 64).contiguous(), str(tmp_path / "a.png"))
    files = data.load(str(tmp_path))

    def crop(seed, epoch, **view):
        return data.Crops(files, [data.view(64, ratio=(1.0, 1.0), interpolation="bilinear", **view)], seed)[epoch, 0][1][0]

    for scale, side in ((0.04, 0.2), (0.25, 0.5), (1.0, 1.0)):
        made = [crop(0, epoch, scale=(scale, scale)) for epoch in range(4)]
        for x in made:
            assert abs((int(x.max()) - int(x.min())) / 252 - side) < 0.03  # how much of the ramp is seen
    made = [crop(seed, epoch, scale=(0.1, 0.5)) for seed, epoch in ((0, 0), (0, 1), (0, 2), (1, 0))]
    assert len(torch.stack(made).flatten(1).unique(dim=0)) == 4 and torch.equal(made[0], crop(0, 0, scale=(0.1, 0.5)))


# ============ DiLo's crop of 224 px from a short side of 256 ============


@pytest.mark.parametrize("height_width", [(256, 256), (375, 500), (500, 300), (96, 320)])
def test_a_square_window_of_the_short_side_lies_anywhere(height_width):
    height, width = height_width
    view = instdisc.augmented({"scale": (0.2, 1.0)}, "crop")
    side = round(min(height, width) * 224 / 256)
    boxes = data.sample_boxes(4000, height, width, view["scale"], view["ratio"], data.generator(0))
    assert (boxes[:, 2:] == side).all()
    for free, place in ((height - side, boxes[:, 0]), (width - side, boxes[:, 1])):  # uniform on 0, ..., free
        assert place.min() == 0 and place.max() == free
        assert abs(place.mean() - free / 2) < 0.02 * free + 0.5 and len(place.unique()) == free + 1


def test_other_levels_of_table_1_crop_as_torchvision_does():
    for level, scale, ratio in (("none", (1.0, 1.0), (1.0, 1.0)), ("scale", (0.2, 1.0), (3 / 4, 4 / 3))):
        view = data.view(8, **instdisc.augmented({"scale": (0.2, 1.0)}, level))
        assert (view["scale"], view["ratio"]) == (scale, ratio)
    assert data.sample_boxes(1, 375, 500, (1.0, 1.0), (1.0, 1.0), data.generator(0)).tolist() == [[0, 62, 375, 375]]


def test_the_window_of_the_short_side_in_memory_and_from_folders(tmp_path):
    """Red tells the row and green the column of a pixel: where a crop begins, and how much it holds."""
    height, width, side = 48, 80, 42
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0], image[1] = torch.arange(height)[:, None], torch.arange(width)
    for i in range(32):
        write_png(image, str(tmp_path / f"{i:02d}.png"))
    view = data.view(side, **instdisc.augmented({"interpolation": "bilinear"}, "crop"), mean=(0, 0, 0), std=(1, 1, 1))
    view["flip"] = 0.0
    for dataset in (data.Images("x", image.expand(32, -1, -1, -1).contiguous()), data.load(str(tmp_path))):
        _, (x,) = next(data.Loader(dataset, [view], 32, 0).epoch(0))
        x = (x * 255).round().long()
        assert x.shape[2:] == (side, side)
        assert torch.equal(x[:, 0, -1] - x[:, 0, 0], torch.full((32, side), side - 1))  # not squashed
        assert torch.equal(x[:, 1, :, -1] - x[:, 1, :, 0], torch.full((32, side), side - 1))
        assert x[:, 0, 0, 0].unique().numel() > 4 and x[:, 1, 0, 0].unique().numel() > 15


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
    def background(n, seed):
        images, labels, masks = draw_shapes(n, seed=seed)
        outside = ~masks.bool()[:, None]
        return (images / 255 * outside).sum((2, 3)) / outside.sum((2, 3)) - 0.5, labels

    train, test = background(4000, 0), background(1000, 1)
    assert evaluate.knn(*train, *test, ks=(20,))[20][0] < 15


def test_test_images_of_shapes_are_none_of_the_training_images():
    train, test = (data.load("shapes", split=split).images.flatten(1) for split in ("train", "test"))
    assert len({bytes(x.numpy()) for x in train} & {bytes(x.numpy()) for x in test}) == 0


def test_the_background_of_hard_shapes_wears_the_pattern_of_a_random_class(monkeypatch):
    monkeypatch.setattr(drawing, "pattern", lambda k, x, y, phase: torch.full_like(x, (k - 4.5) / 25))  # a level for each
    (soft, labels, masks), (hard, again, _) = (draw_shapes(1000, hard=hard) for hard in (False, True))
    assert torch.equal(labels, again)
    outside = ~masks.bool()[:, None].expand(-1, 3, -1, -1) & (soft > 60) & (soft < 200)
    level = torch.stack([(h[m] / s[m]).median() for h, s, m in zip(hard.float(), soft.float(), outside, strict=True)])
    kinds = (((level - 0.75) / 0.5 - 0.5) * 13 / 32 * 25 + 4.5).round()  # canvas * 0.75 to canvas * 1.25
    assert set(kinds.tolist()) == set(range(10))
    assert abs((kinds == labels).float().mean() - 0.1) < 0.04


def test_imagenet_as_people_have_it(tmp_path, monkeypatch, capsys):
    """DIR/train/n*/ and DIR/val/n*/, with no scipy, archive of labels or meta.bin."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    names = ["n01440764", "n01443537", "n15075141"]
    for root in (tmp_path / "bare", tmp_path / "below" / "imagenet"):
        for split, each in (("train", 4), ("val", 2)):
            for i in range(3 * each):
                file = root / split / names[i % 3] / f"{i}.JPEG"
                file.parent.mkdir(parents=True, exist_ok=True)
                write_png(torch.full((3, 8, 8), i, dtype=torch.uint8), str(file))
    for root in (tmp_path / "bare", tmp_path / "below"):
        train, test = (data.load("imagenet", root, split) for split in ("pretrain", "test"))
        assert train.name == "imagenet" and train.classes == names == test.classes
        assert data.labels_of(train).tolist() == [0] * 4 + [1] * 4 + [2] * 4 and len(test) == 6
        assert data.labels_of(test).tolist() == [0, 0, 1, 1, 2, 2] and train.key(0) == "n01440764/0"
    (tmp_path / "other" / "train" / "cats").mkdir(parents=True)  # another set's folder
    with pytest.raises(SystemExit) as stop:
        data.load("imagenet", tmp_path / "other")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "scipy" in err and f"{tmp_path}/other/train/n*/*.JPEG" in err


@pytest.mark.parametrize("name", ["flowers102", "cars", "svhn"])
def test_sets_that_torchvision_reads_with_scipy_say_so(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(data.BY_FILE, name, (lambda *_, **__: pytest.fail("it would be downloaded first"), {}, {}))
    with pytest.raises(SystemExit) as stop:
        data.load(name, tmp_path)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1
    assert "pip install scipy" in err and f"{tmp_path}/{name}/train/CLASS/*" in err
    write_images(tmp_path / name / "train", 4), write_images(tmp_path / name / "test", 4)
    assert len(data.load(name, tmp_path)) == 4  # and that does


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
    again = files.fingerprint()
    os.utime(next(folder.rglob("*.jpg")), ns=(1, 1))  # other content may have the same size
    assert files.fingerprint() != again


def read_anew(folder, **kwargs):
    data.list_folder.cache_clear(), data._load.cache_clear()
    return data.load(str(folder), **kwargs)


def test_contents_stay_when_a_folder_is_copied_and_change_with_its_images(folder, tmp_path, monkeypatch):
    before = read_anew(folder).contents()
    shutil.copytree(folder, tmp_path / "elsewhere" / "copy", copy_function=shutil.copyfile)  # other places, other times
    copy = tmp_path / "elsewhere" / "copy"
    assert read_anew(copy).contents() == before == read_anew(f"{copy}/").contents()
    monkeypatch.chdir(copy)
    assert read_anew(".").contents() == read_anew("../copy").contents() == before
    one, two, other = copy / "class0" / "000.jpg", copy / "class0" / "002.jpg", copy / "class1" / "000.jpg"
    swap = tmp_path / "swap"

    def exchange():
        one.rename(swap), two.rename(one), swap.rename(two)

    for change, back in (
        (lambda: shutil.copy(one, copy / "class0" / "more.jpg"), lambda: (copy / "class0" / "more.jpg").unlink()),  # added
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


def test_contents_of_sets_in_memory_and_of_torchvisions(tmp_path):
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
        assert data.Images("x", **parts).contents() != a.contents() == data.Images("x", a.images, a.labels).contents()
    lazy = [data.Files("lazy", Lazy("labels", labels)) for labels in ([3, 1, 4, 1], [3, 1, 4, 1], [3, 1, 1, 4])]
    assert lazy[0].contents() == lazy[1].contents() != lazy[2].contents()
    assert data.pick(lazy[0], torch.tensor([1])).contents() != data.pick(lazy[0], torch.tensor([3])).contents()


def test_contents_look_at_ten_thousand_files_at_most(monkeypatch):
    asked = []
    monkeypatch.setattr(data, "size_and_time", lambda path: (asked.append(path), (1, 2))[1])
    items = [(f"/x/{i}.jpg", 0) for i in range(25_001)]
    before = data.Files("many", items, ["a"], "/x").contents()
    assert 8_000 < len(asked) <= 10_000 and asked[0] == "/x/0.jpg" and "/x/249" in asked[-1]
    items[1] = ("/x/other.jpg", 0)
    assert data.Files("many", items, ["a"], "/x").contents() != before  # names are compared all the same


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


def chunk(kind, content=b""):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def write_bomb(path):
    """30,000 x 30,000 px, black: a PNG of 110 KB that asks for 2.7 GB."""
    rows = zlib.compressobj(9)
    line = bytes(1 + 30_000 // 8)
    packed = b"".join(rows.compress(line * 1000) for _ in range(30)) + rows.flush()
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND"))


def write_socket(path):
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))


ODD = {  # how to make what is no image, and what is said of it
    "fifo": (os.mkfifo, "not a regular file"),
    "socket": (write_socket, "not a regular file"),
    "folder": (lambda path: path.mkdir(), "not a regular file"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "itself": (lambda path: path.symlink_to(path.name), "symbolic links"),
    "zero": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "empty": (lambda path: path.touch(), "no image"),
    "bomb": (write_bomb, "decompression bomb"),
}


@pytest.fixture
def no_wait():
    """An open that waits for a writer ends after ten seconds."""
    def late(*_):
        raise TimeoutError("it waited")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_image_is_refused_without_a_wait(kind, tmp_path, monkeypatch, no_wait):
    make, words = ODD[kind]
    monkeypatch.chdir(tmp_path)  # the name of a socket may have 107 letters
    make(data.Path("odd.png"))
    monkeypatch.setattr(data, "decode_image", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(OSError, match=words):
        data.decode(tmp_path / "odd.png")
    with pytest.raises(OSError, match=words) as error:
        data.Files("x", [(str(tmp_path / "odd.png"), 0)]).read(0)
    assert str(error.value).startswith(str(tmp_path))


def test_odd_files_are_named_and_counted_everywhere(tmp_path, monkeypatch, capsys, no_wait):
    monkeypatch.chdir(tmp_path)
    for i in range(300):
        place = tmp_path / "images" / f"c{i % 2}" / f"{i:03d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        write_png(torch.full((3, 8, 8), i % 200, dtype=torch.uint8), str(place))
    odd = [data.Path("images", "c0", f"{kind}.png") for kind in ("fifo", "bomb", "dangling")]
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
    black = data.normalise(torch.zeros(3, 3, 8, 8))
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
        evaluate.extract(torch.nn.Flatten(), data.load(str(folder)), data.view(8), torch.device("cpu"))
    assert stop.value.code == 2 and "32 of 64 images do not decode" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["fifo", "folder", "bomb", "empty"])
def test_a_mask_that_is_no_image_is_a_sentence(kind, tmp_path, capsys, no_wait):
    write_images(tmp_path / "images", 4)
    dataset = data.load(str(tmp_path / "images"))
    for i in range(4):
        path = tmp_path / "masks" / f"{dataset.key(i)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(torch.full((1, 5, 7), i, dtype=torch.uint8), str(path))
    path.unlink()
    ODD[kind][0](path)
    if kind == "folder":  # is no file of a mask; so one of four lacks
        assert (data.read_masks(tmp_path / "masks", dataset)[3] == 0).all()
        return
    with pytest.raises(SystemExit) as stop:
        data.read_masks(tmp_path / "masks", dataset)
    assert stop.value.code == 2 and f"{path} is not a mask that can be read" in capsys.readouterr().err


def test_each_folder_counts_once_however_many_links_lead_to_it(folder, tmp_path, no_wait):
    write_images(tmp_path / "other", 6, classes=1)
    names = [(data.Path(p).relative_to(folder), label) for p, label in read_anew(folder).items]
    (folder / "class0" / "a").symlink_to(folder, target_is_directory=True)  # one loop, then two
    assert [(data.Path(p).relative_to(folder), label) for p, label in read_anew(folder).items] == names
    (folder / "class1" / "b").symlink_to(folder, target_is_directory=True)
    (folder / "a link before the folder").symlink_to(folder / "class1", target_is_directory=True)
    found = read_anew(folder)
    assert [(data.Path(p).relative_to(folder), label) for p, label in found.items] == names
    (folder / "class2").symlink_to(tmp_path / "other", target_is_directory=True)  # a link out of the folder is followed
    (folder / "class3").symlink_to(tmp_path / "other", target_is_directory=True)  # and once
    found = read_anew(folder)
    assert found.classes == ["class0", "class1", "class2"] and len(found) == 70


def test_names_need_not_be_utf8(tmp_path, capsys):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    for i in range(64):
        path = os.path.join(folder, os.fsdecode(b"\xe9%d" % (i % 2)), f"{i:02d}.png")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as f:  # torchvision's writer takes no such name
            Image.new("RGB", (8, 8), (i, 0, 0)).save(f, "PNG")
    files = read_anew(folder)
    assert len(files.contents()) == len(files.fingerprint()) == 40
    assert len(list(data.Loader(files, [data.view(8)], 16, 0).epoch(0))) == 4
    with open(files.items[0][0], "wb") as f:
        f.write(b"broken")
    assert data.main(["check", folder]) == 1
    assert "caf\\udce9" in capsys.readouterr().out
    data.main(["show", folder, "--n", "2", "--size", "8", "--recipe", "shapes", "--out", f"{folder}/a.png"])
    assert os.path.getsize(f"{folder}/a.png") > 100
    for place in (folder + "none", folder + "/none"):
        with pytest.raises(SystemExit) as stop:
            data.load(place)
        assert stop.value.code == 2 and "neither a named set nor a folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 2500, "itself", "none"])
def test_a_name_that_the_system_refuses_to_look_at_is_a_sentence(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data.Path("itself").symlink_to("itself")
    for call in (
        lambda: data.load(name),
        lambda: data.load("imagenet", name),
        lambda: data.read_masks(name, data.Images("x", torch.zeros(1, 3, 2, 2))),
        lambda: data.named(name),
        lambda: data.main(["check", name]),
        lambda: data.main(["show", "shapes", "--out", f"{name}/a.png", "--n", "1"]),
    ):
        with pytest.raises(SystemExit) as stop:
            call()
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1


# ============ channels and pages ============


def pictures(n):
    return [Image.new("RGB", (9, 7), (40 * i, 50, 60)) for i in range(n)]


def test_pages_and_channels_that_would_be_lost_are_refused(tmp_path):
    first, *more = pictures(12)
    first.save(tmp_path / "pages.tif", save_all=True, append_images=more)
    Image.new("RGBX", (9, 7)).save(tmp_path / "infrared.tif")
    for name, words in (("pages", "12 pages"), ("infrared", "4 channels")):
        with pytest.raises(OSError, match=words):
            data.decode(tmp_path / f"{name}.tif")
    for mode in ("RGB", "RGBA", "L", "LA", "P", "CMYK"):
        Image.new("RGB", (9, 7), (204, 204, 204)).convert(mode).save(tmp_path / "one.tif")
        assert data.decode(tmp_path / "one.tif").float().sub(204).abs().max() <= 1, mode
    Image.new("CMYK", (9, 7)).save(tmp_path / "ink.jpg")  # there are some in ImageNet
    assert (data.decode(tmp_path / "ink.jpg") > 250).all()


def test_of_an_animation_the_first_frame_is_the_image(tmp_path):
    first, *more = pictures(5)
    for name in ("a.gif", "b.webp", "c.png", "d.mpo"):
        first.save(tmp_path / name, save_all=True, append_images=more, lossless=True)
        with Image.open(tmp_path / name) as image:
            assert image.n_frames > 1
        expected = torch.tensor([0, 50, 60], dtype=torch.uint8)[:, None, None].expand(3, 7, 9)
        assert (data.decode(tmp_path / name).int() - expected.int()).abs().max() <= 3, name


def write_deep(path, most):
    Image.fromarray(torch.linspace(0, most, 64).view(8, 8).numpy().astype("uint16")).save(path)


def test_16_bits_of_which_a_twelfth_is_used_are_warned_of_once(tmp_path, monkeypatch, capsys):
    for i in range(24):
        write_deep(tmp_path / f"{i:02d}.png", 4095)  # what a camera of 12 bits writes
    files = read_anew(tmp_path)
    for workers in (0, 2):
        monkeypatch.setattr(data, "WARNED", [])
        for _ in range(2):
            list(data.Loader(files, [data.view(8)], 8, 0, workers=workers).epoch(0))
            list(data.batches(files, data.view(8), 8, workers=workers))
        out = capsys.readouterr().out
        assert out.count("warning") == 1 and "from 0 to 4095 of 65535" in out and "do not decode" not in out
    monkeypatch.setattr(data, "WARNED", [])
    read_anew(tmp_path, memory=True)
    assert capsys.readouterr().out.count("warning") == 1
    assert data.main(["check", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count("from 0 to 4095 of 65535") == 24 and "24 images, 0 do not decode, 24 " in out
    for i in range(24):
        write_deep(tmp_path / f"{i:02d}.png", 6000 if i else 65535)
    assert (data.decode(tmp_path / "00.png")[0, -1, -1], data.decode(tmp_path / "01.png")[0, -1, -1]) == (255, 23)
    data.main(["check", str(tmp_path)])
    assert capsys.readouterr().out == "24 images, 0 do not decode\n"


# ============ show and check ============


def test_check_lists_what_does_not_decode(folder):
    bad = next(folder.rglob("*.jpg"))
    bad.write_bytes(bad.read_bytes()[:20])
    out, _ = run("data.py", "check", folder, code=1)
    assert str(bad) in out and "64 images, 1 do not decode" in out


SEES = {  # rows between "image" and "mask": their names, and how many px the pictures of the last have
    ("byol",): (["view 1", "view 2"], 32),
    ("instdisc", "--augment", "crop", "--copy-paste", "1", "--masks", "exact", "--limit", "64"): (["view 1"], 32),
    ("moco", "--v", "1"): (["view 1", "view 2"], 32),
    ("cmc",): (["view 1", "V1: L", "V2: a", "V2: b"], 32),
    ("cmc", "--split", "ydbdr"): (["view 1", "V1: Y", "V2: Db", "V2: Dr"], 32),
    ("cpc",): (["view 1", "patches"], 5 * (12 + 2) + 2),  # a grid of 5 x 5
    ("pirl",): (["I", "I^t"], 3 * (10 + 2) + 2),
    ("pirl", "--transform", "rotation"): (["I", "I^t"], 32),
    ("pretext",): (["view", "rotation"], 2 * (32 + 2) + 2),
    ("pretext", "--task", "exemplar"): (["view", "exemplar"], 3 * (32 + 2) + 2),
    ("pretext", "--task", "jigsaw", "--permutations", "4"): (["view", "jigsaw"], 3 * (8 + 2) + 2),
    ("pretext", "--task", "relative"): (["view", "relative"], 3 * (8 + 2) + 2),
    ("pretext", "--task", "colorization"): (["view", "colorization"], 32),
    ("sage",): (["view 1", "view 2"], 32),
    ("simclr",): (["view 1", "view 2"], 32),
    ("swav",): ([f"view {i}" for i in (1, 2, 3, 4)], 16),
}


@pytest.mark.parametrize("flags", SEES, ids=" ".join)
def test_show_captions_what_a_network_sees(flags, tmp_path, monkeypatch, capsys):
    rows, draw = [], pictures.draw_rows
    monkeypatch.setattr(pictures, "draw_rows", lambda given: rows.extend(given) or draw(given))
    data.main(["show", "shapes", "--method", *flags, "--n", "3", "--out", str(tmp_path / "a.png")])
    names, side = SEES[flags]
    assert [name for name, *_ in rows] == ["image", *names, "mask"] and ", ".join(names) in capsys.readouterr().out
    assert rows[-2][1].shape == (3, 3, side, side)
    assert all(-1 <= x.min() < x.max() <= 1 and x.std() > 0.05 for _, x, *_ in rows)
    assert data.decode(tmp_path / "a.png").shape[1] > 96 * len(rows)
    if flags[0] == "cmc":  # as the networks of backbones.Split get it
        split = importlib.import_module("backbones").build(f"resnet10_16_{flags[-1] if len(flags) > 1 else 'lab'}", 32)
        channels = torch.cat(split.views((rows[1][1] + 1) / 2), 1)
        made = torch.stack([x[:, 0] for _, x, *_ in rows[2:-1]], 1)
        assert torch.allclose(made, channels.clamp(-1, 1), atol=1e-4)


def test_show_of_a_folder_and_what_it_refuses(folder, tmp_path, capsys):
    out = str(tmp_path / "a.png")
    data.main(["show", str(folder), "--n", "4", "--size", "48", "--recipe", "shapes", "--out", out])
    assert data.decode(out).float().std() > 10 and "view 2" in capsys.readouterr().out
    first = data.decode(out)
    data.main(["show", str(folder), "--n", "4", "--size", "48", "--recipe", "shapes", "--seed", "1", "--out", out])
    assert data.decode(out).shape != first.shape or not torch.equal(data.decode(out), first)
    for words in (
        ["shapes", "--method", "nope"], ["shapes", "--method", "../byol"], ["shapes", "--method", "data"],
        ["shapes", "--method", "tests/conftest"], ["shapes", "--n", "0"], ["shapes", "--n", "1000"],
        ["shapes", "--size", "4"], ["shapes", "--size", "1000000"], [str(folder / "none")],
        ["shapes", "--out", str(tmp_path / "none" / "a.png")],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            data.main(["show", *words])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1, words
    for bad in sorted(folder.rglob("*.jpg"))[::2]:
        bad.write_bytes(b"not an image")
    with pytest.raises(SystemExit) as stop:
        data.main(["show", str(folder), "--out", out])
    assert stop.value.code == 2 and "do not decode" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        data.main(["check", str(folder), "--n", "3"])
    assert stop.value.code == 2


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


def test_workers_whose_batches_do_not_fit_shared_memory_are_refused(folder, monkeypatch, capsys):
    """torch would wait for ever for what its worker could not hand over."""
    files, views = data.load_folder(folder, "train", None), [data.view(32)] * 2
    needed = 5 * 8 * 2 * 3 * 32**2  # two batches of each worker, and the one in use
    for free, ends in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr(os, "statvfs", lambda _, free=free: SimpleNamespace(f_bavail=free, f_frsize=1))
        data.Loader(files, views, 8, seed=0)  # without workers nothing is needed
        with pytest.raises(SystemExit) if ends else contextlib.nullcontext() as stop:
            data.Loader(files, views, 8, seed=0, workers=2)
        assert not ends or (stop.value.code == 2 and "/dev/shm is too small" in capsys.readouterr().err)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=99, f_frsize=1))
    with pytest.raises(SystemExit):
        next(data.batches(files, data.view(32), workers=1))


@pytest.mark.parametrize(("bits", "kind"), [(8, 0), (8, 2), (16, 2)])
def test_a_png_whose_data_ends_early_ends_no_process(bits, kind, tmp_path):
    """All of the file is there, chunks and checksums, but the compressed data is short, of which torchvision's decoder dies."""
    row = b"\0" + bytes(32 * (3 if kind == 2 else 1) * bits // 8)
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, bits, kind, 0, 0, 0))
    whole = zlib.compress(row * 32)
    for body in (whole, zlib.compress(row * 16), whole[:-9], whole[:9]):
        body = head + chunk(b"IDAT", body) + chunk(b"IEND", b"")
        (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
        with contextlib.suppress(OSError):
            assert data.decode(tmp_path / "x.png").shape == (3, 32, 32)
