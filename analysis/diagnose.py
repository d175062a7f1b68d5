"""What does a network look at, the object or its background? (Distilling Localization, Zhao et al. 2021, sec. 3)

    python -m analysis.diagnose RUN --beside random:resnet10_16       RUN/neighbors.png, RUN/gradients.png
    python -m analysis.diagnose RUN --probe localization swap         the same as numbers, where objects have masks
    python -m analysis.diagnose resnet50.pth --arch resnet50 --data DIR --probe localization --masks DIR2

neighbors: test images and their nearest training images. gradients: of the true class's score, pixel by pixel.
localization: how much of these gradients lies on the object. swap: k-NN and linear probe on objects that are pasted
onto other images' backgrounds.
"""

import contextlib
import copy

import torch
import torch.nn.functional as F
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

PROBES = ("neighbors", "gradients", "localization", "swap")


class Model:
    """The frozen backbone of an `evaluate.Subject`: `train` and `test` are its (features, labels), `net` is it with the
    linear probe on top, for all classes that either set has (None without labels), `protocol` how that was fitted."""

    def __init__(self, name, subject, seed):
        self.name, self.preprocess, self.net, self.protocol = name, subject.preprocess, None, ""
        self.train, self.test = subject.features()
        (x, y), (_, test_y) = evaluate.with_labels(*self.train), evaluate.with_labels(*self.test)
        if len(x) >= evaluate.FEWEST and len(test_y):
            scale, w, b, fit = evaluate.fit_linear(x, y, int(max(y.max(), test_y.max())) + 1, seed=seed)
            head = nn.Linear(w.shape[2], w.shape[1], device=w.device)
            head.load_state_dict({"weight": w[0] / scale, "bias": b[0, :, 0]})  # on features as they are
            self.net = nn.Sequential(subject.backbone, head)
            self.protocol = f"linear probe of frozen features, lr {fit['lr']:g}, wd {fit['weight_decay']:g}"


# ============ pictures ============


def choose_queries(labels, n, seed):
    """Indices of `n` labelled images (of a set without labels: of any), drawn by `seed`, evenly of all classes, sorted
    by class."""
    labels = labels if (labels >= 0).any() else torch.zeros_like(labels)
    g = data.generator(seed, "queries")
    order = torch.randperm(len(labels), generator=g)
    order = order[labels[order] >= 0]
    order = order[labels[order].argsort(stable=True)]
    y = labels[order]
    turn = torch.arange(len(y)) - torch.searchsorted(y, y)  # 0: the first image of a class, 1: the second, ...
    return order[(turn + torch.rand(len(y), generator=g)).argsort()[:n].sort().values]


def title(dataset, label):
    return "" if label < 0 else str(dataset.classes[label] if dataset.classes else label)


def predictions(logits, dataset, labels):
    """Captions and marks for `pictures.draw_rows`: the class with the largest logit, and whether it is the label."""
    best = logits.argmax(1).tolist()
    return [title(dataset, i) for i in best], [i == label for i, label in zip(best, labels, strict=True)]


def images_at(rows, dataset, model, device, size, heat=False):
    """The images at `rows` as the model sees them, [B, 3, size, size] in [-1, 1]. With `heat` in gray, under the class
    gradients for the true label from black over red and yellow to white, which an image's largest hundredth is."""
    x, y = next(data.batches(dataset, model.preprocess, len(rows), device, 0, rows))
    images = data.pixels(x, model.preprocess)
    if heat:
        maps = saliency.class_gradients(model.net, x, y)[:, None]
        maps = (maps / maps.flatten(1).quantile(0.99, 1).clamp(min=1e-30)[:, None, None, None]).clamp(0, 1)
        hot = (3 * maps - torch.arange(3, device=device).view(3, 1, 1)).clamp(0, 1)
        images = torch.lerp(0.6 * data.gray(images), hot, maps)
    return 2 * F.interpolate(images, (size, size)) - 1


def neighbors(models, train, test, rows, device, k=3):
    """A row of pictures for each test image of `rows`: for every model the class gradients and the k nearest training
    images by cosine, framed green if they are of the image's class and red if not (Figures 2 and 7 to 13). Without
    labels there are no gradients, frames or captions."""
    labels, y, none = sets.labels_of(train), sets.labels_of(test)[rows].tolist(), [None] * len(rows)
    size, headings = max(m.preprocess["size"] for m in models), {0: "query"}
    columns = [(images_at(rows, test, models[0], device, size), [f"# {i}" for i in rows.tolist()], none)]
    for m in models:
        headings[len(columns)] = m.name
        if m.net:
            columns.append((images_at(rows, test, m, device, size, heat=True), ["gradient"] * len(rows), none))
        queries = m.test[0][rows.to(m.test[0].device)]
        for found in evaluate.nearest(m.train[0], queries, k)[1].T.cpu():
            theirs = labels[found].tolist()
            marks = [None if a < 0 else a == b for a, b in zip(theirs, y, strict=True)]
            columns.append((images_at(found, train, m, device, size), [title(train, a) for a in theirs], marks))
    images, captions, marks = zip(*columns, strict=True)
    names = [title(test, label) for label in y]
    table = list(zip(names, torch.stack(images, 1), zip(*captions, strict=True), zip(*marks, strict=True), strict=True))
    return pictures.draw_rows(table, headings, frames=True)


def gradients(models, test, rows, device):
    """Rows of pictures: the test images at `rows` and, for every model, their class gradients for the true label; below
    them the class that the model's head predicts, and whether it is right."""
    size, y = max(m.preprocess["size"] for m in models), sets.labels_of(test)[rows].tolist()
    table = [("image", images_at(rows, test, models[0], device, size), [title(test, label) for label in y], None)]
    for m in models:
        logits = m.net[1](m.test[0][rows.to(m.test[0].device)].to(device, torch.float32))
        table.append((m.name, images_at(rows, test, m, device, size, heat=True), *predictions(logits, test, y)))
    return pictures.draw_rows(table)


# ============ localization ============


def object_masks(dataset, size, folder=None):
    """Where the objects are, bool [N, H, W], from `folder` or the set's own: of a set in memory on its images as they
    are, of a folder on the images as a network of `size` px sees them. No masks: exit code 2."""
    if folder is None:
        if dataset.masks is None:
            common.fail(f"{dataset.name} has no masks of its objects: name a folder of masks with --masks")
        return dataset.masks > 0
    if isinstance(dataset, sets.Images):
        return sets.read_masks(folder, dataset, dataset.images.shape[-1]) > 128
    masks = sets.read_masks(folder, dataset, size)[:, None]  # squashed to squares
    for i, mask in enumerate(masks):
        with contextlib.suppress(OSError):  # an image that does not decode is left out later
            masks[i] = data.fit(tvf.resize(mask, list(dataset.read(i)[0].shape[1:])), size, "nearest-exact")
    return masks[:, 0] > 128


def with_object(dataset, masks):
    """Indices of the labelled images with an object in their mask. Fewer than two: exit code 2."""
    rows = ((sets.labels_of(dataset) >= 0) & masks.flatten(1).any(1).cpu()).nonzero()[:, 0]
    if len(rows) < 2:
        common.fail(f"2 test images with labels and objects are needed; {dataset.name} has {len(rows)}")
    return rows


def partners(n, seed):
    """A random other image for each of n, int64 [n]: a permutation without fixed points."""
    order = torch.randperm(n, generator=data.generator(seed, "swap"))
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def localization(model, dataset, masks, device, batch_size=64, workers=0, seed=0):
    """How much of the gradients for the true labels lies on the objects, where masks [N, H, W] are True. Per cent:

    energy: the share of their squares, summed over channels, that lies inside the object, mean over the images.
    pointing: the images whose map (`saliency.class_gradients`) has its maximum inside (Zhang et al. 2016).
    area: the share of pixels that are inside, mean over the images: the energy of a uniform map.
    energy_other, pointing_other: with another image's object, which a preference for places in the image scores, too.
    """
    rows, found = with_object(dataset, masks), []
    pairs = rows.split(batch_size), rows[partners(len(rows), seed)].split(batch_size)
    plain = data.batches(dataset, model.preprocess, batch_size, device, workers, rows)
    for (x, y), *both in zip(plain, *pairs, strict=True):
        m = data.fit(masks[torch.cat(both).to(masks.device)].byte(), x.shape[-1], "nearest-exact").to(device)
        m = m.reshape(2, len(x), -1) > 0  # [2, b, S * S]: of the image's own object and of the other image's
        keep = ((y >= 0).to(device) & m[0].any(1)).nonzero()[:, 0]  # an image that does not decode has no label
        m, g = m[:, keep], saliency.pixel_gradients(model.net, x[keep], y[keep.cpu()]).flatten(2)  # g: [b, 3, S * S]
        g = g / g.abs().amax((1, 2), keepdim=True).clamp(min=1e-30)  # squares of small numbers would vanish
        energy, top = g.square().sum(1), g.abs().amax(1).argmax(1)
        share = (energy * m).sum(2) / energy.sum(1).clamp(min=1e-30)  # [2, b]
        hit = m[:, torch.arange(len(keep), device=device), top]  # [2, b]
        found.append(torch.cat([share, hit, m[:1].float().mean(2)]).cpu().double())
    found, names = torch.cat(found, 1), ("energy", "energy_other", "pointing", "pointing_other", "area")
    return dict(zip(names, (100 * found.mean(1)).tolist(), strict=True)) | {"images": found.shape[1]}


# ============ swap ============


def inpaint(images, masks):
    """Images [B, C, H, W] with what masks [B, H, W] cover (True) filled in from the pixels around it.

    The image at half the size, of the means of known pixels, is inpainted first. Enlarged it is the start of some steps
    of diffusion, in which a slope keeps its slope. An image that is covered whole becomes 0.5.
    """
    hole, known = masks[:, None], (~masks[:, None]).to(images.dtype)
    guess = torch.full_like(images, 0.5)
    if max(images.shape[2:]) > 1:
        weight = F.avg_pool2d(known, 2, ceil_mode=True)
        half = F.avg_pool2d(images * known, 2, ceil_mode=True) / weight.clamp(min=1e-6)
        guess = F.interpolate(inpaint(half, weight[:, 0] == 0), scale_factor=2, mode="bilinear")
        guess = guess[:, :, : images.shape[2], : images.shape[3]]
    x = torch.where(hole, guess, images)
    for _ in range(10):
        x = torch.where(hole, F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1), x)
    return x


def composites(dataset, masks, preprocess, device, rows, seed=0, batch_size=250, workers=0):
    """Yields ({version: images as the network gets them [b, 3, S, S]}, labels [b]) of the images at `rows`: "original";
    "swapped", the object on the background of its partner, whose own object is inpainted; "removed", the background
    alone; "gray", the object on mid-gray. They are made at the size of the masks, in 8 bits, and then cut."""
    side, view = masks.shape[-1], (preprocess["size"], preprocess["interpolation"])
    pixels = preprocess | {"size": side, "mean": (0, 0, 0), "std": (1, 1, 1)}
    margin = max(1, side // 16)  # edges are soft, so an object colors pixels outside its mask
    pairs = rows, partners(len(dataset), seed)[rows]
    streams = [data.batches(dataset, pixels, batch_size, device, workers, part) for part in pairs]
    for (x, y), (other, _), *both in zip(*streams, *(part.split(batch_size) for part in pairs), strict=True):
        m = masks[torch.cat(both).to(masks.device)].to(device)
        wide = F.max_pool2d(m[:, None].float(), 2 * margin + 1, 1, margin)[:, 0] > 0
        own, ground = inpaint(torch.cat([x, other]), wide).chunk(2)
        m = m[: len(x), None]
        made = {"original": x, "swapped": x.where(m, ground), "removed": own, "gray": x.where(m, 0.5)}
        cut = lambda v: data.fit((255 * v).round().byte(), *view).float() / 255
        yield {name: data.normalize(cut(v), preprocess["mean"], preprocess["std"]) for name, v in made.items()}, y


@torch.inference_mode()
def swap(model, dataset, masks, device, seed=0, workers=0, amp=False):
    """Top-1 in per cent of 20-NN (weighted, T 0.1) and of the head, both made with ordinary training images, on the
    `composites` of a set: {version: {"knn", "linear"}}; the number of "images"; and "object", the share of the swapped
    images whose feature is nearer (cosine) to the image of the object than to that of the background. Where backgrounds
    say nothing about the class, accuracies do not fall, and "object" alone shows how much of them a feature holds."""
    rows, (backbone, head), result = with_object(dataset, masks), model.net, {}
    stream = composites(dataset, masks, model.preprocess, device, rows, seed, workers=workers)
    with evaluate.in_eval(backbone), torch.autocast(device.type, torch.bfloat16, enabled=amp):
        batches = [({name: backbone(x).float() for name, x in made.items()}, y) for made, y in stream]
    features = {name: torch.cat([z[name] for z, _ in batches]) for name in batches[0][0]}
    for name, z in features.items():
        z, y = evaluate.with_labels(z, torch.cat([y for _, y in batches]))
        (votes,) = evaluate.knn(*evaluate.with_labels(*model.train), z, y, (20,)).values()
        result[name] = {"knn": votes[0], "linear": evaluate.accuracy(head(z), y)[0].item()}
    place = torch.full((len(dataset),), -1).scatter_(0, rows, torch.arange(len(rows)))
    partner = place[partners(len(dataset), seed)[rows]]
    kept = (partner >= 0).nonzero()[:, 0]  # whose partner is among the images, too
    plain, swapped = (F.normalize(features[v], dim=1) for v in ("original", "swapped"))
    near_object, near_ground = ((swapped[kept] * plain[other]).sum(1) for other in (kept, partner[kept]))
    return result | {"images": len(y), "object": 100 * (near_object > near_ground).float().mean().item()}


@torch.inference_mode()
def swap_picture(model, dataset, masks, device, rows, seed=0):
    """Rows of pictures: the composites of the images at `rows`, with what `model` predicts for each."""
    made, y = next(composites(dataset, masks, model.preprocess, device, rows, seed, len(rows)))
    table = []
    with evaluate.in_eval(model.net):
        for name, x in made.items():
            answers = predictions(model.net(x), dataset, y.tolist())
            table.append((name, 2 * data.pixels(x, model.preprocess) - 1, *answers))
    return pictures.draw_rows(table)


# ============ the command ============


def main():
    p = evaluate.flags(__doc__)
    p.add_argument("--probe", nargs="+", choices=PROBES, default=["neighbors", "gradients"], help="what to look at")
    p.add_argument("--beside", nargs="+", default=[], help="other checkpoints that neighbors and gradients show, too")
    p.add_argument("--masks", help="folder with the masks of the TEST images, named like them (default: the set's own)")
    p.add_argument("--out", help="folder for pictures (default: the checkpoint's; for random:ARCH the current one)")
    args = p.parse_args()
    s, asked, results = evaluate.Subject(args), set(args.probe), {}
    test, size, device = s.sets["test"], s.preprocess["size"], s.device
    folder = s.folder(args.out) if asked != {"localization"} else None
    if asked != {"neighbors"}:  # which are shown without labels, too
        s.need_labels(" ".join(args.probe))
    masks = object_masks(test, size, args.masks) if asked & {"localization", "swap"} else None
    rows = choose_queries(sets.labels_of(test), 8, args.seed)
    subjects = [s]
    for target in args.beside:
        other, px = copy.copy(s), args.size or (size if target.startswith("random:") else 0)
        other.backbone, other.preprocess, _, other.path = checkpoints.open_backbone(target, args.arch, px, args.seed)
        other.backbone.to(device, memory_format=torch.channels_last)
        subjects.append(other)
    names = pictures.names_of([s.path or args.checkpoint, *args.beside])
    models = [Model(name, subject, args.seed) for name, subject in zip(names, subjects, strict=True)]
    model = models[0]

    if "neighbors" in asked:
        runs.write_picture(folder / "neighbors.png", neighbors(models, s.sets["train"], test, rows, device))
        print(f"{folder / 'neighbors.png'}: test images, class gradients, 3 nearest training images by cosine")
        print("         green frame: the image's class, red: another" + "; no labels: left out" * (not model.net))
    if "gradients" in asked:
        runs.write_picture(folder / "gradients.png", gradients(models, test, rows, device))
        print(f"{folder / 'gradients.png'}: |d score / d pixel| for the TRUE label; {model.protocol}")
        print("         below: the class that it predicts; green: right, red: wrong")
    if "localization" in asked:
        r = results["localization"] = localization(model, test, masks, device, workers=s.workers, seed=args.seed)
        print(f"localization   energy {r['energy']:.2f}  pointing {r['pointing']:.2f}   (uniform map: {r['area']:.2f})")
        print(f"  other image  energy {r['energy_other']:.2f}  pointing {r['pointing_other']:.2f}   (with its object)")
        print("         energy: per cent of the squared gradient of the TRUE label's score that lies inside the object")
        print("         pointing: per cent of the images with the gradient's maximum inside the object")
        print(f"         {r['images']} un-augmented test images at {size} px; {model.protocol}")
    if "swap" in asked:
        r = results["swap"] = swap(model, test, masks, device, args.seed, s.workers, s.amp)
        versions = [v for v in r if isinstance(r[v], dict)]
        print("swap     " + "".join(f"{v:>10}" for v in versions))
        for name in ("knn", "linear"):
            print(f"{name:<9}" + "".join(f"{r[v][name]:10.2f}" for v in versions))
        print(
            f"         top-1 of {r['images']} test images: as they are, swapped to the background of another, removed"
        )
        print(f"         from their own, on mid-gray; 20-NN, cosine, weight exp(s / 0.1); {model.protocol}")
        print(f"object   {r['object']:.2f} % of the swapped images are nearer to the object's image than to the other")
        runs.write_picture(folder / "swap.png", swap_picture(model, test, masks, device, rows, args.seed))
        print(f"{folder / 'swap.png'}: some of them, with the predicted class below")
    s.write(results)


if __name__ == "__main__":
    common.run(main)
