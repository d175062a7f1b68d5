"""What does a network look at, the object or its background? (Distilling Localization, Zhao et al. 2021, sec. 3)

    python -m analysis.diagnose RUN --beside random:resnet10_16       RUN/neighbours.png, RUN/gradients.png
    python -m analysis.diagnose RUN --probe localisation swap         the same as numbers, where objects have masks
    python -m analysis.diagnose resnet50.pth --arch resnet50 --data DIR --probe localisation --masks DIR2

neighbours: the nearest training images of some test images. gradients: of the true class, pixel by pixel. localisation:
how much of the gradients lies on the object. swap: what happens to k-NN and linear probe with another image's
background.
"""

import math
import re
import typing

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as tvf

import checkpoints
import common
import data
import evaluate
import runs
import saliency
import sets
from analysis import pictures

PROBES = ("neighbours", "gradients", "localisation", "swap")
PICTURES = {"neighbours", "gradients"}  # those that show other checkpoints, too


def fit_head(train, test, seed):
    """(the linear probe of (features, labels) pairs as an nn.Linear from features as they are to logits, how it was
    chosen), for all classes that either has; (None, "") where there are too few labels."""
    (x, y), (_, test_y) = evaluate.with_labels(*train), evaluate.with_labels(*test)
    if len(x) < evaluate.FEWEST or not len(test_y):
        return None, ""
    scale, w, b, chosen = evaluate.fit_linear(x, y, int(max(y.max(), test_y.max())) + 1, seed=seed)
    head = nn.Linear(w.shape[2], w.shape[1], device=w.device)
    head.load_state_dict({"weight": w[0] / scale, "bias": b[0, :, 0]})
    return head, f"; lr {chosen['lr']:g}, wd {chosen['weight_decay']:g}"


class Model(typing.NamedTuple):
    """What the pictures need of a backbone: `net` is it with a linear head on top (None without labels), `keys` and
    `queries` are its features of the training and of the test images, [N, d]."""

    name: str
    net: nn.Sequential | None
    preprocess: dict
    keys: torch.Tensor
    queries: torch.Tensor


def choose(labels, n, seed):
    """Places of `n` labelled images, drawn by `seed`, as evenly of all classes as can be, sorted by class."""
    g = data.generator(seed, "queries")
    order = torch.randperm(len(labels), generator=g)
    order = order[labels[order] >= 0]
    order = order[labels[order].argsort(stable=True)]
    y = labels[order]
    turn = torch.arange(len(y)) - torch.searchsorted(y, y)  # 0: the first image of a class, 1: the second, ...
    return order[(turn + torch.rand(len(y), generator=g)).argsort()[:n].sort().values]


def title(dataset, label):
    """The name of a class, without the WordNet number that folders of ImageNet's classes may begin with."""
    name = "" if label < 0 else str(dataset.classes[label] if dataset.classes else label)
    return re.sub(r"^n\d{8}_", "", name)


def images_at(model, dataset, rows, device, size):
    """The images at `rows` as the model sees them, [B, 3, size, size] in [-1, 1] for `pictures.draw_rows`."""
    x, _ = next(
        data.batches(dataset, model.preprocess | {"mean": data.HALF, "std": data.HALF}, len(rows), device, 0, rows)
    )
    return F.interpolate(x, (size, size))


def attention(model, dataset, rows, device, size):
    """The same in grey under black-red-yellow-white heat: the class gradients of each image for its true label. The
    hottest hundredth of an image's pixels is white, so that one of them does not leave all others dark."""
    maps = saliency.class_gradients(
        model.net, *next(data.batches(dataset, model.preprocess, len(rows), device, 0, rows))
    )
    heat = (maps / maps.flatten(1).quantile(0.99, 1).clamp(min=1e-30)[:, None, None]).clamp(0, 1)[:, None]
    heat = F.interpolate(heat, (size, size))
    hot = (3 * heat - torch.arange(3, device=device).view(3, 1, 1)).clamp(0, 1)
    return 2 * torch.lerp(0.6 * data.grey(images_at(model, dataset, rows, device, size) / 2 + 0.5), hot, heat) - 1


def neighbours(models, train, test, rows, device, k=3):
    """A row of pictures for each test image of `rows`: for every model the class gradients and the k nearest training
    images by cosine, framed green if they are of the image's class and red if not (Figures 2 and 7 to 13). Without
    labels no gradients (a model's `net` is None), no frames and no captions."""
    size, labels, y = max(m.preprocess["size"] for m in models), sets.labels_of(train), sets.labels_of(test)[rows]
    none = [None] * len(rows)
    columns = [(images_at(models[0], test, rows, device, size), [f"# {i}" for i in rows.tolist()], none)]
    headings = {0: "query"}
    for m in models:
        headings[len(columns)] = m.name
        if m.net is not None:
            columns.append((attention(m, test, rows, device, size), ["gradient"] * len(rows), none))
        for places in evaluate.nearest(m.keys, m.queries[rows.to(m.queries.device)], k, device)[1].T.cpu():
            theirs = labels[places].tolist()
            marks = [None if a < 0 else a == b for a, b in zip(theirs, y.tolist(), strict=True)]
            columns.append((images_at(m, train, places, device, size), [title(train, a) for a in theirs], marks))
    table = []
    for i, label in enumerate(y.tolist()):
        images, captions, marks = zip(*([part[i] for part in column] for column in columns), strict=True)
        table.append((title(test, label), torch.stack(images), captions, marks))
    return pictures.draw_rows(table, headings, frames=True)


def gradients(models, test, rows, device):
    """Rows of pictures: the test images at `rows` and, for every model, their class gradients for the true label; below
    them the class that the model's linear classifier names, and whether it is right."""
    size, y = max(m.preprocess["size"] for m in models), sets.labels_of(test)[rows].tolist()
    table = [("image", images_at(models[0], test, rows, device, size), [title(test, label) for label in y], None)]
    for m in models:
        best = m.net[1](m.queries[rows.to(m.queries.device)].to(device, torch.float32)).argmax(1).tolist()
        marks = [a == b for a, b in zip(best, y, strict=True)]
        table.append((m.name, attention(m, test, rows, device, size), [title(test, label) for label in best], marks))
    return pictures.draw_rows(table)


def object_masks(dataset, size, folder=None):
    """Where the objects are, bool [N, H, W], from `folder` or the set's own: of a set in memory on its images as they
    are, of a folder on the images as a network of `size` px sees them. No masks: exit code 2."""
    if folder is None:
        if dataset.masks is None:
            common.fail(f"{dataset.name} has no masks of its objects: name a folder of masks with --masks")
        return dataset.masks > 0
    if isinstance(dataset, sets.Images):
        return sets.read_masks(folder, dataset, dataset.images.shape[-1]) > 128

    def shape(i):
        try:
            if isinstance(dataset.items, list):
                with Image.open(dataset.path(i)) as image:  # reads no pixel
                    return image.size[::-1]
            return dataset.read(i)[0].shape[1:]
        except OSError:
            return size, size  # without a label from `data.batches`, and so left out

    masks = sets.read_masks(
        folder, dataset, size
    )  # squashed to a square: back to each image's shape, then cut as it is
    whole = (tvf.resize(mask[None], list(shape(i))) for i, mask in enumerate(masks))
    return torch.cat([data.fit(mask, size, "nearest-exact") for mask in whole]) > 128


def with_object(dataset, masks):
    """Places of the labelled images with an object in their mask."""
    return ((sets.labels_of(dataset) >= 0) & masks.flatten(1).any(1).cpu()).nonzero()[:, 0]


def partners(n, seed):
    """A random image for each of n, int64 [n]: a permutation in which none keeps its place."""
    order = torch.randperm(n, generator=data.generator(seed, "swap"))
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def localisation(backbone, head, dataset, masks, preprocess, device, batch_size=64, workers=0, seed=0):
    """How much of the gradients for the true labels lies on the objects, where masks [N, H, W] are True. Per cent:

    energy: the share of their squares, summed over channels, that lies inside the object, mean over the images.
    pointing: the images whose map (`saliency.class_gradients`) has its maximum inside (Zhang et al. 2016).
    area: the share of pixels that are inside, mean over the images: the energy of a uniform map.
    energy_other, pointing_other: with the object of another image: the score of a bias to places.
    Returns these and the number of "images"; images without a label or an object are left out.
    """
    rows, net, found = with_object(dataset, masks), nn.Sequential(backbone, head), []
    if len(rows) < 2:
        common.fail(f"localisation needs 2 test images with labels and objects; {dataset.name} has {len(rows)}")
    pairs = rows.split(batch_size), rows[partners(len(rows), seed)].split(batch_size)
    plain = data.batches(dataset, preprocess, batch_size, device, workers, rows)
    for (x, y), *places in zip(plain, *pairs, strict=True):
        m = masks[torch.cat(places).to(masks.device)].byte()
        m = data.fit(m, preprocess["size"], "nearest-exact").to(device).flatten(1).view(2, len(x), -1) > 0  # own, other
        keep = ((y >= 0).to(device) & m[0].any(1)).nonzero()[:, 0]  # an image that does not decode has no label
        m, g = (
            m[:, keep],
            saliency.pixel_gradients(net, x[keep], y[keep.cpu()]).flatten(2),
        )  # [2, b, S * S], [b, 3, S * S]
        g = g / g.abs().amax((1, 2), keepdim=True).clamp(min=1e-30)  # squares of small numbers would vanish
        energy, top = g.square().sum(1), g.abs().amax(1).argmax(1)
        share = (energy * m).sum(2) / energy.sum(1).clamp(min=1e-30)  # [2, b]
        hit = m[:, torch.arange(len(keep), device=device), top]  # [2, b]
        found.append(torch.cat([share, hit, m[:1].float().mean(2)]).cpu().double())
    means = (100 * torch.cat(found, 1).mean(1)).tolist()
    names = ("energy", "energy_other", "pointing", "pointing_other", "area")
    return dict(zip(names, means, strict=True)) | {"images": sum(f.shape[1] for f in found)}


def fill(images, masks):
    """Images [B, C, H, W] in which what masks [B, H, W] cover (True) is made up from the pixels around it.

    A normalised convolution, the mean of x (1 - m) over the mean of 1 - m, as wide as each hole needs: an image of half
    the size is filled first, and gives the start for some steps of diffusion, in which a slope keeps its slope. Other
    pixels stay as they are; an image that is covered whole becomes 0.5.
    """
    hole, known = masks[:, None], (~masks[:, None]).to(images.dtype)
    guess = torch.full_like(images, 0.5)
    if max(images.shape[2:]) > 1:
        weight = F.avg_pool2d(known, 2, ceil_mode=True)
        half = F.avg_pool2d(images * known, 2, ceil_mode=True) / weight.clamp(min=1e-6)
        guess = F.interpolate(fill(half, weight[:, 0] == 0), scale_factor=2, mode="bilinear")
        guess = guess[:, :, : images.shape[2], : images.shape[3]]
    x = torch.where(hole, guess, images)
    for _ in range(10):
        x = torch.where(hole, F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1), x)
    return x


def composites(dataset, masks, preprocess, device, rows, seed=0, batch_size=250, workers=0):
    """Yields ({version: uint8 [b, 3, S, S]}, labels [b]) of the images at `rows`: the "original"; "swapped", the object
    on the ground of its partner, whose own object is filled in; "removed", its own ground without it; "grey", the
    object on mid-grey. All are made at the size of the data (of a folder: at the network's) and then cut as any image
    is."""
    size = preprocess["size"]
    side = dataset.images.shape[-1] if isinstance(dataset, sets.Images) else size
    pixels = preprocess | {"size": side, "mean": (0, 0, 0), "std": (1, 1, 1)}
    # Edges are soft, so an object colours pixels outside its mask: what is filled in is wider by a margin.
    masks, margin = data.fit(masks.byte(), side, "nearest-exact"), max(1, side // 16)
    pairs = rows, partners(len(dataset), seed)[rows]
    streams = [data.batches(dataset, pixels, batch_size, device, workers, part) for part in pairs]
    for (x, y), (other, _), *places in zip(*streams, *(part.split(batch_size) for part in pairs), strict=True):
        m = masks[torch.cat(places).to(masks.device)].to(device)
        wide = F.max_pool2d(m[:, None].float(), 2 * margin + 1, 1, margin)[:, 0] > 0
        own, ground = fill(torch.cat([x, other]), wide).chunk(2)
        m = m[: len(x), None] > 0
        made = {"original": x, "swapped": x.where(m, ground), "removed": own, "grey": x.where(m, 0.5)}
        cut = lambda v: data.fit((255 * v).round().byte(), size, preprocess["interpolation"])
        yield {name: cut(v) for name, v in made.items()}, y


@torch.inference_mode()
def swap(backbone, head, keys, labels, dataset, masks, preprocess, device, k=20, temperature=0.1, seed=0, workers=0,
         amp=False):  # fmt: skip
    """Top-1 in per cent of weighted k-NN and of `head` on the `composites` of a set, both made with ordinary training
    images: `keys` [N, d] with `labels`, and a linear layer fitted on them. {version: {"knn", "linear"}}, the number of
    "images", and "object": of the swapped images, the share in per cent whose feature is nearer (cosine) to the image
    that the object is from than to the one that the ground is from. Where grounds tell nothing about the class,
    accuracies stay as they are, and only this figure shows how much of the ground a feature holds."""
    rows = with_object(dataset, masks)
    if len(dataset) < 2 or not len(rows):
        common.fail(
            f"swap needs 2 test images with labels and objects; {dataset.name} has {len(rows)} of {len(dataset)}"
        )
    features, answers = {}, []
    with evaluate.in_eval(backbone), torch.autocast(device.type, torch.bfloat16, enabled=amp):
        for made, y in composites(dataset, masks, preprocess, device, rows, seed, workers=workers):
            answers.append(y)
            for name, v in made.items():
                x = data.normalise(v.float() / 255, preprocess["mean"], preprocess["std"])
                features.setdefault(name, []).append(backbone(x).float())
    result = {}
    for name, parts in features.items():
        x, y = evaluate.with_labels(torch.cat(parts), torch.cat(answers))
        (votes,) = evaluate.knn(keys, labels, x, y, (k,), temperature).values()
        result[name] = {"knn": votes[0], "linear": evaluate.accuracy(head(x), y)[0].item()}
    place = torch.full((len(dataset),), -1).scatter_(0, rows, torch.arange(len(rows)))
    partner = place[partners(len(dataset), seed)[rows]]
    kept = (partner >= 0).nonzero()[:, 0]  # whose partner is among the images, too
    plain, swapped = (F.normalize(torch.cat(features[v]), dim=1) for v in ("original", "swapped"))
    object_, ground = ((swapped[kept] * plain[other]).sum(1) for other in (kept, partner[kept]))
    return result | {"images": len(y), "object": 100 * (object_ > ground).float().mean().item()}


@torch.inference_mode()
def swap_picture(net, dataset, masks, preprocess, device, rows, seed=0):
    """Rows of pictures: the composites of the images at `rows`, with what `net` takes each for."""
    made, y = next(composites(dataset, masks, preprocess, device, rows, seed, len(rows)))
    table = []
    with evaluate.in_eval(net):
        for name, v in made.items():
            best = net(data.normalise(v.float() / 255, preprocess["mean"], preprocess["std"])).argmax(1).tolist()
            marks = [a == b for a, b in zip(best, y.tolist(), strict=True)]
            table.append((name, v.float() / 127.5 - 1, [title(dataset, label) for label in best], marks))
    return pictures.draw_rows(table)


# ============ the command ============


def open_models(s, args, beside, head, pairs):
    """The Model of the checkpoint and those of `beside`, which are opened backbones, each with a head of its own."""
    names = pictures.names_of([s.path or args.checkpoint, *args.beside])
    models = [Model(names[0], head and nn.Sequential(s.backbone, head), s.preprocess, pairs[0][0], pairs[1][0])]
    for name, (net, its, _, file) in zip(names[1:], beside, strict=True):
        net.to(s.device, memory_format=torch.channels_last)
        both = [
            evaluate.cached(net, file, images, split, its, s.device, s.workers, s.amp)
            for split, images in s.sets.items()
        ]
        net = head and nn.Sequential(net, fit_head(*both, args.seed)[0])
        models.append(Model(name, net, its, both[0][0], both[1][0]))
    return models


def parse_args():
    p = evaluate.flags(__doc__)
    p.add_argument("--probe", nargs="+", choices=PROBES, default=["neighbours", "gradients"], help="what to look at")
    p.add_argument("--beside", nargs="+", default=[], help="other checkpoints that neighbours and gradients show, too")
    p.add_argument("--queries", type=int, nargs="+", help="places of test images to show (default: 8, of all classes)")
    p.add_argument("--top", type=int, default=3, help="nearest neighbours to show")
    p.add_argument("--masks", help="folder with the masks of the TEST images, named like them (default: the set's own)")
    p.add_argument("--temperature", type=float, default=0.1, help="T of swap's weighted k-NN vote")
    p.add_argument("--out", help="folder for pictures (default: the checkpoint's; for random:ARCH the current one)")
    args = p.parse_args()
    evaluate.within(1, math.inf, args, "top")
    evaluate.within(1e-4, 1e4, args, "temperature")
    return args


def main():
    args = parse_args()
    s, asked, results, beside, masks = evaluate.Subject(args), set(args.probe), {}, [], None
    test, size = s.sets["test"], s.preprocess["size"]
    folder = s.folder(args.out, " and ".join(sorted(asked)) + " make") if asked != {"localisation"} else None
    if numbers := [probe for probe in PROBES[1:] if probe in asked]:
        s.need_labels(" ".join(numbers))
    labels = sets.labels_of(test)
    labels = labels if (labels >= 0).any() else torch.zeros_like(labels)  # neighbours are shown without, too
    for i in args.queries or []:
        if not 0 <= i < len(test) or labels[i] < 0:
            common.fail(f"--queries {i}: the test images of {test.name} with a label are among 0 to {len(test) - 1}")
    rows = torch.tensor(args.queries) if args.queries else choose(labels, 8, args.seed)
    if asked - PICTURES:
        masks = object_masks(test, size, args.masks)
    if "swap" in asked and len(test) < 2:
        common.fail(f"swap needs another image's background: {test.name} has {len(test)} test image")
    for target in args.beside if asked & PICTURES else ():
        px = args.size or (size if target.startswith("random:") else 0)
        beside.append(checkpoints.open_backbone(target, args.arch, px, args.seed))

    pairs = s.features()
    head, chosen = fit_head(*pairs, args.seed)
    how = f"linear classifier on frozen features (that of the linear probe{chosen})"
    if asked & PICTURES:
        models = open_models(s, args, beside, head, pairs)
    if "neighbours" in asked:
        runs.write_picture(
            folder / "neighbours.png", neighbours(models, s.sets["train"], test, rows, s.device, args.top)
        )
        print(f"{folder / 'neighbours.png'}: test images, {args.top} nearest training images by cosine")
        print(
            "         class gradients; green frame: the image's class, red: another"
            + "; no labels: left out" * (not head)
        )
    if "gradients" in asked:
        runs.write_picture(folder / "gradients.png", gradients(models, test, rows, s.device))
        print(f"{folder / 'gradients.png'}: |d score / d pixel| for the TRUE label, through a {how}")
        print("         below: the class that it names; green: right, red: wrong")
    if "localisation" in asked:
        r = localisation(s.backbone, head, test, masks, s.preprocess, s.device, workers=s.workers, seed=args.seed)
        results["localisation"] = r
        energy, other, area = r["energy"], r["energy_other"], r["area"]
        print(f"localisation   energy {energy:.2f}  pointing {r['pointing']:.2f}   (a uniform map: {area:.2f})")
        print(f"  other image  energy {other:.2f}  pointing {r['pointing_other']:.2f}   (a bias to places scores this)")
        print(f"         gradient of the TRUE label's score, {r['images']} un-augmented test images at {size} px")
        print("         energy: per cent of its squares inside the object; pointing: of images with its maximum inside")
        print("         other image: the same with the object of another image")
        print(f"         {how}")
    if "swap" in asked:
        how_knn = 20, args.temperature, args.seed, s.workers, s.amp
        labelled = evaluate.with_labels(*pairs[0])
        r = swap(s.backbone, head, *labelled, test, masks, s.preprocess, s.device, *how_knn)
        results["swap"] = r
        versions = [v for v in r if isinstance(r[v], dict)]
        print("swap     " + "".join(f"{v:>10}" for v in versions))
        for name in ("knn", "linear"):
            print(f"{name:<9}" + "".join(f"{r[v][name]:10.2f}" for v in versions))
        print(
            f"         top-1 of {r['images']} test images: as they are; the object on another's ground, whose object is"
        )
        print("         filled in; the ground alone, the object filled in; the object on mid-grey")
        print(f"         20-NN, cosine, weight exp(s / {args.temperature:g}); {how}")
        print("         both made with ordinary training images")
        print(
            f"object   {r['object']:.2f} % of the swapped images are nearer to the object's image than to the ground's"
        )
        picture = swap_picture(nn.Sequential(s.backbone, head), test, masks, s.preprocess, s.device, rows, args.seed)
        runs.write_picture(folder / "swap.png", picture)
        print(f"{folder / 'swap.png'}: some of them, with what the linear classifier takes them for")
    s.write(results)


if __name__ == "__main__":
    common.run(main)
