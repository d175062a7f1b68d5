"""copy_paste.py: the paste, masks in memory and in folders, backgrounds."""

import os

import pytest
import torch
from torchvision.io import write_png
from torchvision.transforms.v2 import functional as tvf

import copy_paste
import data
import instdisc
import sets


def images(n=6, size=32, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def pasted(x, masks, view, seed=0, share=1.0, **how):
    return copy_paste.paste(torch.cat([x, masks], 1), view, torch.Generator().manual_seed(seed), share, **how)


def options(*flags):
    return instdisc.parse_args(["--device", "cpu", *flags])


# ============ the paste ============


def test_paste_is_the_papers_formula_for_the_chosen_and_nothing_for_the_rest():
    x, masks = images(400, 8), images(400, 8, seed=1)[:, :1]
    masks[::2] = masks[::2].round()  # hard masks and soft ones
    out = pasted(x, masks, data.view(8), share=0.5)
    changed = (out != x).flatten(1).any(1)
    assert 150 < changed.sum() < 250
    background = ((out - masks * x) / (1 - masks))[changed]  # I' = M I + (1 - M) B
    away = (masks[changed] < 0.9).expand_as(background)
    level = torch.stack([b[m].median() for b, m in zip(background, away, strict=True)])
    assert (background - level.view(-1, 1, 1, 1))[away].abs().max() < 1e-4  # one gray an image
    assert level.min() < 0.1 and level.max() > 0.9 and ((level * 255) - (level * 255).round()).abs().max() < 1e-2
    assert torch.equal(pasted(x, torch.ones_like(masks), data.view(8)), x)


def test_backgrounds_are_crops_of_those_given():
    given = torch.arange(1, 4, dtype=torch.uint8)[:, None, None, None].expand(3, 3, 20, 20) * 50
    out = pasted(images(60, 8), torch.zeros(60, 1, 8, 8), data.view(8), backgrounds=given) * 255
    assert torch.allclose(out, out[:, :1, :1, :1].expand_as(out), atol=1e-3)
    assert set(out[:, 0, 0, 0].round().tolist()) == {50.0, 100.0, 150.0}


def test_blending_blurs_all_masks_or_half_of_them():
    x, masks = torch.ones(200, 3, 16, 16), torch.zeros(200, 1, 16, 16)
    masks[:, :, :, :8] = 1
    black, soft = torch.zeros(1, 3, 16, 16, dtype=torch.uint8), {}
    for blend, blurred in copy_paste.BLENDS.items():
        out = pasted(x, masks, data.view(16), blurred=blurred, backgrounds=black)
        between = (out > 0.01) & (out < 0.99)
        soft[blend] = between.flatten(1).any(1).float().mean().item()
        assert not between[:, :, :, :6].any() and not between[:, :, :, 10:].any()  # 5 taps reach two pixels
    assert soft["none"] == 0 and soft["gaussian"] == 1 and 0.35 < soft["mix"] < 0.65
    for seed in range(40):  # also where none of a small batch is pasted or blurred
        pasted(x[:2], masks[:2], data.view(16), seed, share=0.3, blurred=0.5)


# ============ masks ============


def test_masks_are_where_the_images_are():
    train = sets.Images("x", torch.zeros(6, 3, 8, 8, dtype=torch.uint8, device="meta"))
    made = copy_paste.with_masks(train, torch.zeros(6, 4, 4, dtype=torch.uint8), None)
    assert made.images.device.type == "meta" and made.images.shape == (6, 4, 8, 8)


def test_an_image_that_takes_anothers_place_brings_its_own_mask(folder):
    files = sets.load(str(folder))
    with open(files.items[2][0], "wb") as f:
        f.write(b"broken")
    masks = torch.arange(64, dtype=torch.uint8)[:, None, None].expand(64, 4, 4).contiguous()
    files = copy_paste.with_masks(files, masks, None)
    index, (crop,), said = data.Crops(files, [data.view(16)], 0)[0, 2]
    assert index == 2 and list(said) == [2] and crop.shape == (4, 16, 16)
    assert (crop[3] == crop[3, 0, 0]).all() and crop[3, 0, 0] != 2


@pytest.mark.parametrize("memory", [True, False])
def test_masks_are_cut_as_their_images(folder, memory):
    """The mask of each image is made its own first channel: after any crop and flip the two must still agree."""
    dataset = sets.load(str(folder), memory=False)
    pixels = torch.stack([tvf.resize(dataset.read(i)[0], [40, 40], antialias=True) for i in range(len(dataset))])
    for i in range(len(pixels)):
        pixels[i, 0] = tvf.resize(pixels[i, :1], [8, 8]).repeat_interleave(5, 1).repeat_interleave(5, 2)[0]
    if memory:
        dataset = sets.Images("x", pixels)
    else:
        for i, (path, _) in enumerate(dataset.items):
            write_png(pixels[i], path.replace(".jpg", ".png"))
            os.unlink(path)
        sets.list_folder.cache_clear(), sets._load.cache_clear()
        dataset = sets.load(str(folder))
    black = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    view = data.view(24, interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1))
    masked = copy_paste.with_masks(dataset, pixels[:, 0], None)
    on_black = lambda x, view, g: data.augment(copy_paste.paste(x, view, g, 1.0, backgrounds=black), view, g)
    made = data.Loader(masked, [view], 8, 0, augment=on_black)
    plain = data.Loader(dataset, [view], 8, 0)
    for (index, (x,)), (same, (y,)) in zip(made.epoch(0), plain.epoch(0), strict=True):
        assert torch.equal(index, same)
        assert torch.allclose(x, y * y[:, :1], atol=0.012)  # M I on black, with M the first channel


def hard(m, **flags):
    """(what a paste by float maps takes, bool; which of them are unusable)"""
    masks, cut, area, unusable = copy_paste.object_masks((m * 255).round().to(torch.uint8), **flags)
    at = copy_paste.masks_at(m.shape[1:], masks, cut)
    assert set(at.unique().tolist()) <= {0, 255}
    assert torch.allclose(area[~unusable], at[~unusable].float().mean((1, 2)) / 255)
    return at == 255, unusable


def test_object_masks():
    m = torch.zeros(6, 10, 10)
    m[0, 2:6, 2:6] = 0.5  # 16 % of the image
    m[1] = 0.4  # one value
    m[2, 0, 0] = 1.0  # 1 %
    m[3] = 1.0
    m[3, 0, 0] = 0.0  # 99 %, above twice the mean only because the threshold stays within the map
    m[4, :5] = 0.3
    m[4, :2] = 1.0  # mean .29: only the two brightest rows
    large = torch.full((1, 10, 10), 0.8)
    large[0, :3], large[0, 9, 9] = 0.0, 1.0  # mean .56: the whole object, not the one pixel that reaches twice that
    assert hard(large)[0].equal(large > 0)
    objects, unusable = hard(m, chunk=2)
    assert unusable.tolist() == [False, True, True, True, False, True]
    assert objects[unusable].all() and objects[0].equal(m[0] > 0) and objects[4].equal(m[4] == 1)
    soft, cut, _, unusable = copy_paste.object_masks((m * 255).round().to(torch.uint8), soft=True)
    assert cut is None and unusable.tolist() == [False, True, True, True, False, True] and (soft[unusable] == 255).all()
    assert soft[0].max() == 255 and soft[4, 3, 0] == round(0.3 * 255)


def test_a_map_of_its_images_size_is_thresholded_at_twice_its_mean():
    m = torch.rand(200, 12, 12, generator=torch.Generator().manual_seed(0)).pow(3).mul(255).round()
    cut = torch.minimum(2 * m.mean((1, 2)), m.amax((1, 2)) / 2)
    objects, unusable = hard(m / 255)
    assert objects[~unusable].equal((m >= cut[:, None, None])[~unusable]) and not unusable.any()


@pytest.mark.parametrize("soft", [False, True])
def test_hard_masks_of_larger_images_have_an_edge_of_one_pixel(tmp_path, soft):
    """A map of 64 x 64 is enlarged, then thresholded: what a worker cuts has no ramp, and what it keeps stays small."""
    y, x = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij")
    maps = (255 * (1.3 - (x.square() + y.square()).sqrt() / 16).clamp(0, 1)).to(torch.uint8)[None]  # soft at its border
    masks, cut, *_ = copy_paste.object_masks(maps, soft=soft)
    assert masks.shape == (1, 64, 64) and masks.dtype == torch.uint8 and (cut is None or cut.dtype == torch.uint8)
    write_png(torch.zeros(3, 320, 320, dtype=torch.uint8), str(tmp_path / "0.png"))
    files = copy_paste.with_masks(sets.load(str(tmp_path)), masks, cut)
    for size, scale in ((320, (1.0, 1.0)), (224, (1.0, 1.0)), (224, (0.3, 0.3))):  # as it is, reduced, enlarged
        view = data.view(size, scale=scale, ratio=(1, 1), interpolation="bilinear", flip=0)
        _, (crop,), _ = data.Crops(files, [view], 0)[0, 0]
        mask = crop[3]
        assert (mask == 255).any() and (mask == 0).any()
        inside = mask > 127
        edges = (inside[1:] != inside[:-1]).sum() + (inside[:, 1:] != inside[:, :-1]).sum()
        between = ((mask > 0) & (mask < 255)).sum()
        assert between > 4 * edges if soft else between <= (0 if size == 320 else 2 * edges)


def test_maps_of_a_set_in_memory_are_made_once(tmp_path, monkeypatch):
    train, calls = sets.load("shapes", limit=20), []

    def maps(images, method):
        calls.append(method)
        return torch.zeros(len(images), 32, 32)

    monkeypatch.setattr(copy_paste.saliency, "maps", maps)
    args = options("--masks", "gs", "--root", str(tmp_path / "new"))
    for _ in range(2):
        assert copy_paste.open_maps(args, train, torch.device("cpu")).shape == (20, 32, 32)
    assert calls == ["gs"]
    exact = copy_paste.open_maps(options("--masks", "exact"), train, torch.device("cpu"))
    assert torch.equal(exact > 0, train.masks > 0) and exact.max() == 255


def test_images_whose_mask_is_empty_or_full_are_counted_and_not_pasted(capsys):
    train = sets.load("shapes", limit=6)
    train.masks[0], train.masks[1] = 0, 1
    args = options("--masks", "exact", "--copy-paste", "1")
    masked, augment = instdisc.prepare(args, train, torch.device("cpu"), print)
    assert "2 of 6 masks are nearly empty or full" in capsys.readouterr().out
    view = data.view(32, scale=(1, 1), ratio=(1, 1), flip=0)
    index, (x,) = next(data.Loader(masked, [view], 6, 0, augment=augment).epoch(0))
    _, (plain,) = next(data.Loader(train, [view], 6, 0).epoch(0))
    for row, image in enumerate(index.tolist()):
        background = (train.masks[image] == 0) & (image != 1)
        assert torch.allclose(x[row], plain[row], atol=1e-5) == (image < 2)
        if image > 1:
            outside = x[row][:, background] * torch.tensor(data.STD)[:, None] + torch.tensor(data.MEAN)[:, None]
            assert outside.std() < 1e-3  # one gray
            inside = train.masks[image] == 1
            assert torch.allclose(x[row][:, inside], plain[row][:, inside], atol=1e-5)


# ============ backgrounds ============


def test_textures_are_many_and_the_same_for_a_seed():
    a = copy_paste.textures(20, 32, 0)
    assert a.shape == (20, 3, 32, 32) and a.dtype == torch.uint8
    assert torch.equal(a, copy_paste.textures(20, 32, 0)) and not torch.equal(a, copy_paste.textures(20, 32, 1))
    assert (a.float().std((2, 3)).amax(1) > 5).all()  # none is plain
    assert torch.corrcoef(a.float().mean(1).flatten(1)).fill_diagonal_(0).abs().max() < 0.9


@pytest.mark.parametrize("in_memory", [True, False])
def test_quiet_windows_come_from_where_nothing_is_salient(tmp_path, in_memory):
    images = torch.full((12, 3, 32, 32), 50, dtype=torch.uint8)
    images[:, :, 16:, 16:] = 200  # the only quarter without response
    maps = torch.full((12, 16, 16), 90, dtype=torch.uint8)
    maps[:, 8:, 8:] = 0
    maps[5:] += 20  # what is taken first is where the response is least
    if in_memory:
        train = sets.Images("x", images)
    else:
        for i, image in enumerate(images):
            write_png(image, str(tmp_path / f"{i:02d}.png"))
        train = sets.load(str(tmp_path))
    usable = torch.ones(12, dtype=torch.bool)
    got = copy_paste.quiet_windows(train, maps, usable, 5, 8, "cpu")
    assert got.shape == (5, 3, 8, 8) and (got == 200).all()
    maps[7], usable[7] = 0, False  # an image without a mask is no background
    assert (copy_paste.quiet_windows(train, maps, usable, 12, 8, "cpu") == 200).all()
    assert len(copy_paste.quiet_windows(train, maps, usable, 12, 8, "cpu")) == 11
    odd = torch.zeros(12, 5, 5, dtype=torch.uint8)
    odd[:, :3, :] = odd[:, :, :3] = 90
    assert (copy_paste.quiet_windows(train, odd, usable, 5, 8, "cpu") == 200).all()
