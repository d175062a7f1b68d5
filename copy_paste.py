"""Copy-and-paste: the salient object of an image on another background, I <- M I + (1 - M) B. Used by instdisc.py.

Distilling Localization (Zhao et al., 2020, https://arxiv.org/abs/2004.06638), sec. 5.2.

    image [3, H, W] --.
                      |--> crop and flip --> paste on a background B --> jitter, gray, ... (data.augment)
    mask M [1, H, W] -'                      B: a gray level, a texture, or the least salient window of another image
"""

import contextlib
import hashlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as tvf
from tqdm import tqdm

import common
import data
import runs
import saliency
import sets

BACKGROUNDS = ("gray", "textures", "images")
BLENDS = {"none": 0.0, "gaussian": 1.0, "mix": 0.5}  # share of the masks that are blurred


def prepare(args, train, device, say):
    """(the training set with masks, the augmentation that begins with the paste) for data.Loader. Collective."""
    maps = open_maps(args, train, device).cpu()
    masks, cut, area, unusable = object_masks(maps, args.soft_masks)
    if unusable.all():
        common.fail(f"--masks {args.masks}: every mask is nearly empty or full: nothing to paste")
    say(f"copy-paste {args.copy_paste:g} by {args.masks} on {args.background}: objects cover "
        f"{100 * area[~unusable].mean():.0f} % of their images; {int(unusable.sum())} of {len(masks)} masks are nearly "
        f"empty or full, their images are not pasted; {masks.numel() / 1e6:.0f} MB a rank")  # fmt: skip
    backgrounds = None
    if args.background == "textures":
        backgrounds = textures(1000, args.size, args.seed).to(device)
    elif args.background == "images":
        backgrounds = quiet_windows(train, maps, ~unusable, 1000, args.size, device)
    how = args.copy_paste, BLENDS[args.blend], backgrounds
    return with_masks(train, masks, cut), lambda x, view, g: data.augment(paste(x, view, g, *how), view, g)


def paste(x, view, g, share, blurred=0.0, backgrounds=None):
    """I <- M I + (1 - M) B for a `share` of x [B, 4, S, S] in [0, 1], whose last channel is M -> [B, 3, S, S].

    B is a gray level for each view, or one of `backgrounds` (uint8 [G, 3, H, W]) in a crop and flip of its own. Where
    M is 1 everywhere the view stays as it is. blurred: share of the masks that are blurred, so that edges are soft.
    """
    x, masks = x[:, :3].contiguous(), x[:, 3:]
    rows = data.chosen(len(x), share, g, x.device)
    if backgrounds is None:
        background = torch.randint(256, (len(rows), 1, 1, 1), generator=g).to(x.device, non_blocking=True) / 255
    else:
        pick = torch.randint(len(backgrounds), (len(rows),), generator=g).to(backgrounds.device, non_blocking=True)
        background = data.random_crops(backgrounds[pick], view, g)
    masks = masks[rows]
    if blurred:
        soft = data.chosen(len(rows), blurred, g, x.device)
        if len(soft):  # 5 taps, sigma 2: the kernel of the cut-and-paste generator that the paper cites (its ref. 14)
            masks[soft] = data.blur(masks[soft], torch.full((len(soft),), 2.0, device=x.device), 5)
    x[rows] = torch.lerp(background, x[rows], masks)
    return x


def open_maps(args, train, device):
    """Saliency maps of all training images, uint8 [N, h, w]: computed for a set in memory and kept in --root, read from
    a folder, or the exact masks of a set that has them. Collective."""
    if args.masks == "exact":
        if train.masks is None:
            common.fail(f"--masks exact: {train.name} has no masks of its own")
        return train.masks * 255
    if args.masks not in saliency.METHODS:
        if not Path(args.masks).is_dir():
            common.fail(f"--masks {args.masks}: neither {', '.join(saliency.METHODS)} or exact, nor a folder")
        return sets.read_masks(args.masks, train)
    if isinstance(train, sets.Files):
        command = f"python saliency.py {args.data} --method {args.masks} --out MASKS"
        common.fail(f"--masks {args.masks}: for a folder make them first ({command}), then --masks MASKS")
    key = hashlib.sha1(train.fingerprint().encode() + Path(saliency.__file__).read_bytes()).hexdigest()[:12]
    file = Path(args.root) / f"saliency-{args.masks}-{Path(train.name).name}-{key}.pt"

    def make():
        if not file.exists():
            saliency.make_folder(file.parent)
            parts = tqdm(train.images.split(256), args.masks, leave=False, disable=None)
            maps = torch.cat([saliency.to_bytes(saliency.maps(x.to(device), args.masks)).cpu() for x in parts])
            runs.write(file, {"maps": maps})

    common.in_turn(make)
    return runs.load(file)["maps"]


def object_masks(maps, soft=False, chunk=1024):
    """(masks uint8 [N, h, w], cut uint8 [N] or None, area [N], unusable bool [N]) of saliency maps uint8 [N, h, w].

    The object is where a map is at least its cut: twice its mean, the usual threshold, but at most half its maximum, as
    large objects would be lost. The masks are the maps as they are; `masks_at` compares them with the cut at the
    image's size. soft: the maps stretched to 0..255, without a cut. area: the object's share of the image. unusable: an
    object below 5 % or above 90 % of the image, or a constant map; its mask is the whole image, so nothing is pasted.
    """
    masks, found = torch.empty_like(maps) if soft else maps, []
    for part, mask in zip(maps.split(chunk), masks.split(chunk), strict=True):
        m = part / 255
        high = m.amax((1, 2))
        cut = torch.minimum(2 * m.mean((1, 2)), high / 2)
        area = (m >= cut[:, None, None]).float().mean((1, 2))
        unusable = (area < 0.05) | (area > 0.9) | (high == m.amin((1, 2)))
        if soft:
            mask.copy_(saliency.to_bytes(saliency.scaled(m))).masked_fill_(unusable[:, None, None], 255)
        cut = torch.searchsorted(torch.arange(256) / 255, cut).byte().masked_fill_(unusable, 0)
        found.append((cut, area, unusable))
    cut, area, unusable = (torch.cat(parts) for parts in zip(*found, strict=True))
    return masks, None if soft else cut, area, unusable


def masks_at(size, masks, cut, rows=slice(None)):
    """The masks `rows` at an image's size, uint8 [n, H, W]; with a cut 255 where they reach it, else 0. They are
    enlarged first, as an edge that is enlarged would be a ramp."""
    enlarged = tvf.resize(masks[rows], list(size), antialias=True)
    return enlarged if cut is None else (enlarged >= cut[rows][:, None, None]).byte() * 255


class MaskedFiles(sets.Files):
    """A folder whose images [4, H, W] have their mask as the last channel."""

    channels = 4

    def __init__(self, files, masks, cut):
        super().__init__(files.name, files.items, files.classes, files.base)
        self.bad, self.masks_and_cut = files.bad, (masks, cut)

    def read(self, i):
        image, label = super().read(i)
        return torch.cat([image, masks_at(image.shape[1:], *self.masks_and_cut, [i])]), label


def with_masks(train, masks, cut):
    """The training set with the masks as the last channel of its images."""
    if isinstance(train, sets.Files):
        return MaskedFiles(train, masks, cut)
    channel = masks_at(train.images.shape[2:], masks, cut)[:, None].to(train.images.device)
    return sets.Images(train.name, torch.cat([train.images, channel], 1), train.labels)


def textures(n, size, seed):
    """Backgrounds uint8 [n, 3, size, size] in place of VisTex's photographs: noise, filtered in the frequency domain by
    a power law (rough to smooth) and a preferred direction (fabric to wood), in a mix of two colors."""
    g = data.generator(seed, "textures")
    u = lambda low, high: low + (high - low) * torch.rand(n, 1, 1, generator=g)
    fy, fx = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None]
    angle, stretch = u(0, math.pi), u(1, 6)
    across, along = angle.cos() * fx + angle.sin() * fy, angle.cos() * fy - angle.sin() * fx  # [n, size, size / 2 + 1]
    gain = ((stretch * along) ** 2 + across**2).add(size**-2).pow(-u(0.3, 1.2))
    t = torch.fft.irfft2(torch.fft.rfft2(torch.randn(n, size, size, generator=g)) * gain, s=(size, size))
    t = ((t - t.mean((1, 2), keepdim=True)) / t.std((1, 2), keepdim=True) / 4 + 0.5).clamp(0, 1)[:, None]
    one, other = torch.rand(2, n, 3, 1, 1, generator=g)
    return (torch.lerp(one, other, t) * 255).to(torch.uint8)


def quiet_windows(train, maps, usable, n, size, device):
    """Backgrounds uint8 [n, 3, size, size]: the least salient window, of half the height and width, of the n images
    among the `usable` (bool [N]) where it is least."""
    height, width = maps.shape[1:]
    h, w = max(1, height // 2), max(1, width // 2)
    least, place = [], []
    for part in maps.split(4096):
        area = F.pad(part.float().cumsum(1).cumsum(2), (1, 0, 1, 0))  # sums of all windows from four corners
        low = (area[:, h:, w:] - area[:, :-h, w:] - area[:, h:, :-w] + area[:, :-h, :-w]).flatten(1).min(1)
        least.append(low.values), place.append(low.indices)
    rows = torch.cat(least).masked_fill(~usable, math.inf).argsort(stable=True)[: min(n, int(usable.sum()))]
    place, columns = torch.cat(place)[rows], width - w + 1
    boxes = torch.stack([place // columns, place % columns, torch.full_like(rows, h), torch.full_like(rows, w)], 1)
    boxes = boxes / torch.tensor([height, width] * 2)  # [n, 4]: top, left, height, width as shares of the sides
    if isinstance(train, sets.Images):
        boxes = boxes * torch.tensor([*train.images.shape[2:]] * 2)
        images = train.images[rows.to(train.images.device)]
        return saliency.to_bytes(data.crop_resize(images, boxes, torch.zeros(len(rows)) > 0, size, "bilinear"))
    crops = []
    for i, box in zip(rows.tolist(), boxes, strict=True):
        with contextlib.suppress(OSError):  # named when training meets it
            image, _ = train.read(i)
            box = (box * torch.tensor([*image.shape[1:]] * 2)).int().clamp(min=torch.tensor([0, 0, 1, 1])).tolist()
            crops.append(tvf.resized_crop(image, *box, [size, size], antialias=True))
    return torch.stack(crops).to(device)
