import contextlib
import importlib
import json
import multiprocessing as mp
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import in_process, run
from PIL import Image
from torchvision.io import write_jpeg, write_png
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import v2 as T
from torchvision.transforms.v2 import functional as tvf

import byol
import common
import data
import instdisc
import sets
from analysis import pictures

pytestmark = pytest.mark.usefixtures("twentieth_of_shapes")
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
        (lambda x, f: data.blend(x, f, 0, 0), tvf.adjust_brightness, [0.0, 0.3, 1.0, 1.8]),
        (lambda x, f: data.blend(x, f, 0, 1 - f), tvf.adjust_contrast, [0.0, 0.3, 1.0, 1.8]),
        (lambda x, f: data.blend(x, f, 1 - f, 0), tvf.adjust_saturation, [0.0, 0.3, 1.0, 1.8]),
        (data.hue, tvf.adjust_hue, [-0.5, -0.1, 0.0, 0.3]),
    ],
)
def test_color_operation_equals_torchvision(ours, theirs, factors):
    x = images(4)
    x[3] = x[3, :1]  # gray: the hue of no color must not divide by zero
    f = torch.tensor(factors).view(-1, 1, 1, 1)
    expected = torch.stack([theirs(image, factor) for image, factor in zip(x, factors, strict=True)])
    assert torch.allclose(ours(x.clone(), f), expected, atol=1e-5)


def test_gray_solarize_normalize_equal_torchvision():
    x = images()
    assert torch.allclose(data.gray(x), tvf.rgb_to_grayscale(x), atol=1e-6)
    assert torch.allclose(data.solarize(x), tvf.solarize(x, 0.5), atol=1e-6)
    assert torch.allclose(data.normalize(x), tvf.normalize(x, list(data.MEAN), list(data.STD)), atol=1e-6)


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
    gray = data.augment(x.clone(), plain | {"gray": 0.2}, g)
    assert abs((gray[:, 0] == gray[:, 1]).all((1, 2)).float().mean() - 0.2) < 0.03
    solarized = data.augment(x.clone(), plain | {"solarize": 0.1}, g)
    assert abs((solarized[:, 0] < 0.5).all((1, 2)).float().mean() - 0.1) < 0.03
    jittered = data.augment(x.clone(), plain | {"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_p": 0.8}, g)
    assert abs((jittered != x).flatten(1).any(1).float().mean() - 0.8) < 0.03
    assert torch.equal(data.augment(x.clone(), plain, g), x)


def test_keys_decide_randomness_and_differ():
    def draw(*key):
        return torch.rand(4, generator=data.generator(*key))

    assert torch.equal(draw(0, 1, 2), draw(0, 1, 2))
    draws = [draw(*key) for key in [(0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 1), (0, "a", 2)]]
    assert len({tuple(d.tolist()) for d in draws}) == 5


def loader(dataset, rank=0, world=1, seed=0, workers=0, batch=8):
    views = [data.view(16, jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray=0.2, blur=0.5, solarize=0.2), data.view(8)]
    return data.Loader(dataset, views, batch, seed, rank, world, workers)


@pytest.fixture(scope="module")
def shapes():
    return sets.load("shapes", limit=40)


def both_paths(folder):
    return [sets.load("shapes", limit=40), sets.load(str(folder), limit=40)]


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
    for dataset in (sets.Images("x", x), sets.load(str(tmp_path))):
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
    x = torch.rand(20, 1, 8, 8, generator=data.generator(0)).expand(-1, 3, -1, -1)  # no color, so nothing to saturate
    pixels = dict(mean=(0, 0, 0), std=(1, 1, 1), jitter_p=1.0)
    made = [data.augment(x.clone(), data.view(8, jitter=each, **pixels), data.generator(0)) for each in
            ((0, 0.5, 0, 0), (0, 0, 0.5, 0))]  # fmt: skip
    assert (made[0] - x).abs().amax((1, 2, 3)).min() > 1e-3 and torch.allclose(made[1], x, atol=1e-3)


def test_noise_is_another_for_each_step_rank_epoch_and_seed(tmp_path):
    """Of one image many times over whatever differs is noise: of colors in both paths, and of crops in memory."""
    one = torch.randint(0, 256, (3, 12, 12), generator=data.generator(0), dtype=torch.uint8)
    for i in range(16):
        write_png(one, str(tmp_path / f"{i:02d}.png"))
    whole = dict(scale=(1.0, 1.0), ratio=None, flip=0.0)
    colors, crops = data.view(12, jitter=(0.4,) * 4, jitter_p=1.0, **whole), data.view(12)
    memory = sets.Images("x", one.expand(16, -1, -1, -1).contiguous())
    for dataset, view in ((memory, colors), (sets.load(str(tmp_path)), colors), (memory, crops)):

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
    files = sets.load(str(tmp_path))

    def crop(seed, epoch, **view):
        view = data.view(64, ratio=(1.0, 1.0), interpolation="bilinear", **view)
        return data.Crops(files, [view], seed)[epoch, 0][1][0]

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
    for dataset in (sets.Images("x", image.expand(32, -1, -1, -1).contiguous()), sets.load(str(tmp_path))):
        _, (x,) = next(data.Loader(dataset, [view], 32, 0).epoch(0))
        x = (x * 255).round().long()
        assert x.shape[2:] == (side, side)
        assert torch.equal(x[:, 0, -1] - x[:, 0, 0], torch.full((32, side), side - 1))  # not squashed
        assert torch.equal(x[:, 1, :, -1] - x[:, 1, :, 0], torch.full((32, side), side - 1))
        assert x[:, 0, 0, 0].unique().numel() > 4 and x[:, 1, 0, 0].unique().numel() > 15


def test_workers_change_nothing(folder):
    dataset = sets.load(str(folder), limit=40)
    for (i, xs), (j, ys) in zip(loader(dataset).epoch(1), loader(dataset, workers=2).epoch(1), strict=True):
        assert torch.equal(i, j) and all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


# ============ waiting for data ============


class Clock:
    """time, as data.py sees it: it goes on only where it is told to."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Slow(sets.Files):
    """A folder whose images take 10 ms each."""

    def __init__(self, folder, clock):
        super().__init__("slow", sets.list_folder(folder)[0])
        self.clock = clock

    def read(self, i):
        self.clock.sleep(0.01)
        return torch.zeros(3, 32, 32, dtype=torch.uint8), 0


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(data, "time", Clock())
    return data.time


def test_the_wait_for_data_is_that_for_the_workers_alone(folder, clock):
    def augment(x, view, g):
        clock.sleep(0.05)
        return x

    for dataset, waited in ((Slow(folder, clock), 3 * 8 * 0.01), (sets.load("shapes", limit=24), 0.0)):
        loader = data.Loader(dataset, [data.view(8)], 8, 0, augment=augment)
        batches, start = loader.epoch(0), clock.now
        for _ in range(3):
            next(batches), clock.sleep(0.03)
        assert loader.waited == pytest.approx(waited) and clock.now - start == pytest.approx(waited + 3 * 0.08)


def test_long_waits_for_files_are_explained_once(folder, clock, capsys):
    def epochs(step, rank=0):
        """What is said before the batches of each epoch, each of which takes 40 ms, and each step `step` seconds."""
        made = data.Loader(Slow(folder, clock), [data.view(8)], 4, 0, rank, 2)
        for epoch in range(4):
            for _ in zip(range(6), made.epoch(epoch), strict=False):  # not to its end, as a run that is stopped
                clock.sleep(step)
            yield capsys.readouterr().out

    assert not any(epochs(0.38)) and not any(epochs(0.02, rank=1))
    before, said, *after = epochs(0.02)
    assert not before and not any(after)
    assert "data wait was 62% of" in said  # after the first batch, for which workers start: 4 x 40 of 4 x 40 + 5 x 20
    assert "data.py shrink" in said and "--workers than 0" in said and "--in-memory" in said


def test_what_the_workers_can_decode_is_measured_on_one_thread(folder, clock, monkeypatch):
    threads = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    for workers, parallel in ((0, 1), (3, 3), (16, 4)):
        made = data.Loader(Slow(folder, clock), [data.view(8)] * 2, 8, 0, 0, 2, workers)
        assert made.decodes() == pytest.approx(100 * parallel * 2)
        assert threads == [1, torch.get_num_threads()] and not threads.clear()
    assert 3 * 64 * 0.01 < clock.now < 3 * 66 * 0.01
    made.data.clock = SimpleNamespace(sleep=lambda _: clock.sleep(0.3))
    start = clock.now
    made.decodes()  # from a disk that is slow
    assert clock.now - start == pytest.approx(1.2)


# ============ smaller copies ============


def shrink(*words, code=0):
    with in_process():
        found = data.main(["shrink", *map(str, words), "--short", "64"])
    assert found == code


def write_kinds(folder):
    """Large images of all kinds, one with an orientation, and small ones."""
    small = torch.rand(1, 3, 15, 20, generator=torch.Generator().manual_seed(0))
    image, exif = tvf.to_pil_image(tvf.resize(small, [150, 200], antialias=True)[0]), Image.Exif()
    exif[sets.ORIENTATION] = 6
    for name in ("a/1.jpg", "a/2.JPEG", "a/deep/3.png", "b/4.webp", "b/5.bmp", "b/6.tif", "b/7.ppm", "b/8.gif"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)
    image.save(folder / "a/turned.jpg", exif=exif)
    image.rotate(90, expand=True).save(folder / "b/turned.tif", exif=exif)  # Pillow turns it back
    odd = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x02A\0\0\0\0\0\0\0"  # an orientation called A
    image.save(folder / "b/odd.jpg", exif=odd)
    image.save(folder / "a/two.mpo.jpg", "MPO", save_all=True, append_images=[image])
    image.convert("P").save(folder / "b/palette.png")
    image.convert("CMYK").save(folder / "b/ink.jpg")
    Image.fromarray(torch.linspace(0, 65535, 150 * 200).view(150, 200).numpy().astype("uint16")).save(
        folder / "b/d.png"
    )
    image.resize((90, 64)).save(folder / "a/small.jpg", quality=50)
    image.resize((30, 20)).save(folder / "b/small.png")
    return folder


def test_copies_are_the_images_at_another_size(tmp_path, capsys):
    source, out = write_kinds(tmp_path / "images"), tmp_path / "out"
    (source / "list.txt").write_text("1.jpg\n")
    shrink(source, out, "--workers", 2)
    assert f"{out}: copies of 17 images, 0 do not decode" in capsys.readouterr().out
    before, after = sets.Files("a", *sets.list_folder(source), source), sets.Files("b", *sets.list_folder(out), out)
    names = [str(Path(path).relative_to(source)) for path, _ in before.items]
    assert names == [str(Path(path).relative_to(out)) for path, _ in after.items] and before.classes == after.classes
    for i, name in enumerate(names):
        image, copy = before.read(i)[0], after.read(i)[0]
        if "small" in name or name.endswith(".gif"):
            assert Path(after.path(i)).read_bytes() == Path(before.path(i)).read_bytes()
            continue
        expected = tvf.resize(image, [64], tvf.InterpolationMode.BICUBIC, antialias=True)
        lossy = name.endswith(("jpg", "JPEG", "webp"))
        assert copy.shape == expected.shape == (3, 64, 85), name
        assert (copy.int() - expected.int()).abs().float().mean() <= 8 * lossy, name
        with Image.open(before.path(i)) as old, Image.open(after.path(i)) as new:
            assert new.format == old.format.replace("MPO", "JPEG")
            assert new.getexif().get(sets.ORIENTATION) == (6 if name == "a/turned.jpg" else None)
    times = [path.stat().st_mtime_ns for path in sorted(out.rglob("*.*"))[1:]]
    (out / "a/1.jpg").write_bytes(b"")  # as a machine may leave it that loses power
    shrink(source, out, "--workers", 0)
    assert sum(path.stat().st_mtime_ns not in times for path in out.rglob("*.*") if path.suffix != ".txt") == 1


def test_a_copy_of_better_quality_is_larger(folder, tmp_path):
    sizes = []
    for quality in (50, 90):
        with in_process():
            data.main(["shrink", str(folder), str(tmp_path / f"{quality}"), "--short", "30", "--quality", f"{quality}"])
        sizes.append(sum(path.stat().st_size for path in (tmp_path / f"{quality}").rglob("*.jpg")))
    assert sizes[1] > 1.3 * sizes[0]


def test_what_does_not_decode_is_named_and_has_no_copy(folder, tmp_path, capsys):
    bad = sorted(folder.rglob("*.jpg"))[:2]
    for path in bad:  # small ones, which need no decoding to be copied
        path.write_bytes(path.read_bytes()[:200])
    for _ in range(2):
        shrink(folder, tmp_path / "out", "--workers", 0, code=1)
        said = capsys.readouterr().out
        assert all(f"{path}: " in said for path in bad) and "copies of 62 images, 2 do not decode" in said
    assert len(list((tmp_path / "out").rglob("*.jpg"))) == 62 and not list((tmp_path / "out").rglob("*.tmp"))


def test_copies_that_a_killed_process_leaves_are_whole(tmp_path, monkeypatch, capsys):
    image = torch.randint(256, (3, 700, 700), dtype=torch.uint8)
    (tmp_path / "images").mkdir()
    for i in range(40):
        write_jpeg(image, str(tmp_path / f"images/{i}.jpg"))
    words, copies = (
        ["shrink", str(tmp_path / "images"), str(tmp_path / "out"), "--workers", "0"],
        lambda: list((tmp_path / "out").rglob("*.jpg")),
    )
    process = mp.get_context("fork").Process(target=data.main, args=(words,))
    process.start()
    while len(copies()) < 5:
        time.sleep(0.001)
    process.kill()
    process.join()
    found = copies()
    assert 5 <= len(found) < 40 and all(sets.decode(path).shape == (3, 256, 256) for path in found)
    reads, decode = [], sets.decode

    def stop_at_third(path):
        reads.append(path)
        if len(reads) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return decode(path)

    monkeypatch.setattr(sets, "decode", stop_at_third)
    for code in (common.STOPPED, 0):
        with in_process(), pytest.raises(SystemExit) if code else contextlib.nullcontext() as stopped:
            data.main(words)
        assert not code or (stopped.value.code == code and "the same command goes on" in capsys.readouterr().err)
    assert len(reads) == 40 - len(found) + 1  # none of those that were there; the one at the signal twice
    assert len(copies()) == 40 and len({path.read_bytes() for path in copies()}) == 1


def test_what_shrink_refuses(folder, tmp_path, refused):
    def refuse(*words, **more):
        return refused(lambda: shrink(*words, **more))

    for out in (folder, folder / "out", tmp_path, tmp_path / "images" / ".." / "images" / "x"):
        assert "neither may lie in the other" in refuse(folder, out)
    (tmp_path / "link").symlink_to(folder)
    assert "neither may lie" in refuse(folder, tmp_path / "link" / "x") and not (folder / "x").exists()
    assert "no such folder" in refuse(tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "no images in" in refuse(tmp_path / "empty", tmp_path / "out")
    for words in (("--quality", 0), ("--quality", 101), ("--workers", -1)):
        assert words[0] in refuse(folder, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    assert "no folder can be made there" in refuse(folder, tmp_path / "file" / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "000.jpg").touch()
    assert "holds other files" in refuse(folder, tmp_path / "out")
    (tmp_path / "out" / "000.jpg").unlink()
    shrink(folder, tmp_path / "out")
    said = refuse(folder, tmp_path / "out", "--quality", 91)
    assert f"holds {folder}, short side 64 px, quality 90: choose another" in said and "px, quality 91" in said
    assert "holds" in refuse(write_kinds(tmp_path / "others"), tmp_path / "out")
    for workers in (0, 1):  # where a copy cannot be written
        shutil.rmtree(tmp_path / "out" / "class1")
        (tmp_path / "out" / "class1").touch()
        said = refuse(folder, tmp_path / "out", "--workers", workers)
        assert "could not write" in said and "class1" in said and "the same command goes on" in said
        (tmp_path / "out" / "class1").unlink()
        (tmp_path / "out" / "class1").mkdir()


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
    assert sets.decode(tmp_path / "a.png").shape[1] > 96 * len(rows)
    if flags[0] == "cmc":  # as the networks of backbones.Split get it
        views_of = importlib.import_module("backbones").channel_views
        channels = torch.cat(views_of((rows[1][1] + 1) / 2, flags[-1] if len(flags) > 1 else "lab"), 1)
        made = torch.stack([x[:, 0] for _, x, *_ in rows[2:-1]], 1)
        assert torch.allclose(made, channels.clamp(-1, 1), atol=1e-4)


def test_show_of_a_folder_and_what_it_refuses(folder, tmp_path, capsys):
    out = str(tmp_path / "a.png")
    data.main(["show", str(folder), "--n", "4", "--size", "48", "--recipe", "shapes", "--out", out])
    assert sets.decode(out).float().std() > 10 and "view 2" in capsys.readouterr().out
    first = sets.decode(out)
    data.main(["show", str(folder), "--n", "4", "--size", "48", "--recipe", "shapes", "--seed", "1", "--out", out])
    assert sets.decode(out).shape != first.shape or not torch.equal(sets.decode(out), first)
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
    seen = torch.cat([i for i, _ in loader(sets.load(str(folder))).epoch(0)])
    assert sorted(seen.tolist()) == list(range(64))
    assert str(bad) in capsys.readouterr().out


def test_many_corrupt_images_stop_the_run(folder):
    for bad in sorted(folder.rglob("*.jpg"))[:5]:
        bad.write_bytes(b"not an image")
    with pytest.raises(SystemExit) as stop:
        list(loader(sets.load(str(folder))).epoch(0))
    assert stop.value.code == 2


def test_recipes_are_plain_and_their_views_known():
    for recipe in byol.RECIPES.values():
        json.dumps(recipe)
        for v in recipe["views"]:
            assert set(data.view(32, **v)) == set(data.view(32))


def test_a_whole_view_equals_torchvisions_compose():
    """On the parameters that our generator draws; no solarize, whose threshold makes of rounding a difference."""
    x = torch.randint(0, 256, (16, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    v = data.view(32, flip=1.0, gray=1.0)
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
    files = sets.load(f"{REAL}/cifar10", limit=64)
    memory = sets.load("cifar10", REAL, limit=64)
    assert len(sets.load(f"{REAL}/cifar10", split="test")) == 10_000
    assert isinstance(files, sets.Files) and isinstance(memory, sets.Images) and len(memory.classes) == 10
    preprocess = {"mean": data.MEAN, "std": data.STD, "size": 32, "interpolation": "bilinear"}
    (x, y), (a, b) = (next(data.batches(d, preprocess)) for d in (memory, files))
    assert torch.equal(x, a) and torch.equal(y, b)
    for dataset in (files, memory):
        _, (v, w) = next(loader(dataset).epoch(0))
        assert v.shape == (8, 3, 16, 16) and w.shape == (8, 3, 8, 8) and v.std() > 0.3


def test_workers_whose_batches_do_not_fit_shared_memory_are_refused(folder, monkeypatch, capsys):
    """torch would wait for ever for what its worker could not hand over."""
    files, views = sets.load_folder(folder, "train", None), [data.view(32)] * 2
    needed = 5 * 8 * 2 * 3 * 32**2  # two batches of each worker, and the one in use
    for free, ends in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr(os, "statvfs", lambda _, free=free: SimpleNamespace(f_bavail=free, f_frsize=1))
        data.Loader(files, views, 8, seed=0)  # without workers nothing is needed
        with pytest.raises(SystemExit) if ends else contextlib.nullcontext() as stop:
            data.Loader(files, views, 8, seed=0, workers=2)
        assert not ends or (stop.value.code == 2 and "/dev/shm is too small" in (said := capsys.readouterr().err))
    assert "of 2 workers, 0.2 MB: --workers 1 at most" in said and "--shm-size 1g" in said
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=3 * 64 * 3 * 32**2, f_frsize=1))
    assert len(list(data.batches(files, data.view(32), workers=8))) == 1  # and one worker, for one batch
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=99, f_frsize=1))
    with pytest.raises(SystemExit):
        next(data.batches(files, data.view(32), workers=1))
