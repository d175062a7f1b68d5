"""Images with boxes, instance masks or a class a pixel: drawn scenes, PASCAL VOC, COCO's JSON, Cityscapes, folders.

A target is a dict of what an image has: "boxes" [k, 4] (x1, y1, x2, y2 in px, x2 and y2 exclusive), "labels" int64 [k]
(from 0), "ignored" bool [k] (VOC: difficult, COCO: crowd), "masks" bool [k, H, W]; or "semantic" uint8 [H, W] (255: not
counted).
"""

import copy
import functools
import hashlib
import json
import math
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as tvf

import common
import data
import runs
import sets
import shapes

SCENES = {"train": (500, 10), "test": (300, 11)}  # how many, and the lists of draw_scenes; pre-training has 0 and 1
SCENE_NAMES = ("scenes", "scenes-hard")
SIZE = 64  # px of a scene
VOC = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
       "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"]  # fmt: skip


# ============ data sets ============


class Annotated:
    """Images with targets. `open_(item)` makes (image uint8 [3, H, W], target) of one of the `items`, pairs of an image
    and its annotations; ValueError or OSError with a sentence where it cannot. `stamp(annotations)` changes with
    them."""

    file = None  # in COCO's format

    def __init__(self, name, classes, items, open_, stamp=str):
        self.name, self.classes, self.items, self.open, self.stamp = name, list(classes), items, open_, stamp

    def __len__(self):
        return len(self.items)

    def read(self, i):
        return self.open(self.items[i])

    def contents(self):
        """Changes when images are added, removed or renamed, and when annotations change; not when a folder moves."""
        digest = hashlib.sha1(repr(self.classes).encode())
        for image, annotations in self.items:
            digest.update(f"{Path(str(image)).name} {self.stamp(annotations)}".encode())
        return digest.hexdigest()

    def holding(self, items):
        """The set with other items."""
        chosen = copy.copy(self)
        chosen.items = items
        return chosen

    def part(self, places):
        return self.holding([self.items[i] for i in places])


def split(load, args, trainable=lambda images: images):
    """(`trainable` training set, test set) of `load("train")` and `load("test")`; if that is None, every tenth image is
    for the test."""
    train = load("train")
    if args.overfit:
        test = train
    elif (test := load("test")) is None:
        places = range(len(train))
        train, test = train.part([i for i in places if i % 10 != 9]), train.part([i for i in places if i % 10 == 9])
    if not len(test):
        common.fail(f"--data {args.data}: no images to test on, as every tenth is taken; --overfit tests on all")
    train = trainable(train)
    if args.limit and args.limit < len(train):
        order = torch.randperm(len(train), generator=sets.generator(args.seed, "limit"))
        train = train.part(sorted(order[: args.limit].tolist()))
    return train, train if args.overfit and args.limit else test


def scenes(name, which, limit=0):
    n, seed = SCENES[which]
    images, targets, semantic = shapes.draw_scenes(limit or n, SIZE, seed, hard=name == "scenes-hard")
    open_ = lambda i: (images[i], targets[i] | {"semantic": semantic[i]})
    items = [(i, f"{name} {seed}") for i in range(len(images))]
    return Annotated(name, shapes.CLASSES, items, lambda item: open_(item[0]))


def fetched(cls, root, name, **kwargs):
    """A set of torchvision in `root`, downloaded if it is not there; by local rank 0, which comes first."""

    def make():
        try:
            return cls(root, **kwargs)
        except (RuntimeError, OSError):  # not there
            return cls(root, download=True, **kwargs)

    return sets.first_rank_first(make, name, f"or unpack its archives in {root}")


# ============ boxes ============


def open_boxes(masks, item):
    """(image, target) of an image file and its annotations, the JSON of `Annotations.record`."""
    path, record = item
    image, found = sets.decode(path), json.loads(record)
    width, height = found["size"]
    if image.shape[1:] != (height, width):
        raise ValueError(f"{path} has {image.shape[2]} x {image.shape[1]} px, its annotations say {width} x {height}")
    target = {"boxes": torch.tensor(found["boxes"]).view(-1, 4), "labels": torch.tensor(found["labels"]).long()}
    target |= {"ignored": torch.tensor(found["ignored"], dtype=torch.bool)}
    if masks:
        drawn = [mask_of(m, width, height) for m in found["masks"]]
        target["masks"] = torch.stack(drawn) if drawn else torch.zeros(0, height, width, dtype=torch.bool)
    return image, target


def mask_of(segmentation, width, height):
    """bool [H, W] of run lengths by columns, or of polygons [[x, y, x, y, ...], ...], whose pixels are those with the
    center inside."""
    if isinstance(segmentation, dict):
        counts = torch.tensor(segmentation["counts"])
        return (torch.arange(len(counts)) % 2).repeat_interleave(counts).view(width, height).T.bool()
    mask, centers = torch.zeros(height, width, dtype=torch.bool), torch.arange(height) + 0.5
    for polygon in segmentation:
        (x, y), toggles = torch.tensor(polygon).view(-1, 2).T, torch.zeros(height, width + 1, dtype=torch.int64)
        x2, y2 = x.roll(-1), y.roll(-1)
        # Where an edge crosses the middle of a row, all pixels to the right go from outside to inside or back.
        edge, row = ((y[:, None] <= centers) != (y2[:, None] <= centers)).nonzero(as_tuple=True)
        at = x[edge] + (centers[row] - y[edge]) * (x2 - x)[edge] / (y2 - y)[edge]
        toggles.index_put_((row, (at - 0.5).ceil().clamp(0, width).long()), torch.ones_like(row), accumulate=True)
        mask |= toggles.cumsum(1)[:, :width] % 2 == 1
    return mask


class Annotations:
    """Checks the annotations of one image after another and counts what it changes."""

    def __init__(self, file):
        self.file, self.outside, self.lost = file, 0, 0

    def record(self, size, objects):
        """JSON of the objects (box, label, ignored, mask) of an image; their boxes are cut off at its edges."""
        width, height = size
        kept = []
        for (x1, y1, x2, y2), *rest in objects:
            inside = [max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)]
            self.outside += inside != [x1, y1, x2, y2]
            if min(inside[2] - inside[0], inside[3] - inside[1]) > 1e-3:  # px; what is less may vanish in float32
                kept.append((inside, *rest))
            else:
                self.lost += 1
        boxes, labels, ignored, masks = zip(*kept, strict=True) if kept else ([],) * 4
        return json.dumps({"size": size, "boxes": boxes, "labels": labels, "ignored": ignored, "masks": masks})

    def report(self):
        if (self.outside or self.lost) and common.rank() == 0:
            print(f"warning: {self.file}: {self.outside} boxes reach over the edge and were cut, {self.lost} have no "
                  "area and were left out")  # fmt: skip


def coco(file, images, masks, name):
    """The set of a file in COCO's format; images lie in the folder `images`."""
    refuse = lambda text: common.fail(f"{file}: {text}")
    try:
        found = json.loads(Path(file).read_text())
        pictures = {p["id"]: (p["file_name"], [p["width"], p["height"]], []) for p in found["images"]}
        categories = sorted((c["id"], c["name"]) for c in found["categories"])
        number = {key: i for i, (key, _) in enumerate(categories)}
        for a in found["annotations"]:
            x, y, w, h = a["bbox"]
            ignored, mask, key = bool(a.get("iscrowd")), a.get("segmentation") if masks else None, a["id"]
            if a["category_id"] not in number:
                refuse(f"annotation {key} has the unknown category {a['category_id']}")
            if a["image_id"] not in pictures:
                refuse(f"annotation {key} belongs to the unknown image {a['image_id']}")
            if masks and not mask:
                refuse(f"annotation {key} has no segmentation, which --mask needs")
            _, size, objects = pictures[a["image_id"]]
            if isinstance(mask, dict):
                if isinstance(mask["counts"], str):
                    refuse(f"annotation {key} has compressed run lengths: lists of counts or polygons are read")
                if mask["size"] != size[::-1] or sum(mask["counts"]) != size[0] * size[1]:
                    refuse(f"the mask of annotation {key} has another size than its image, {size[0]} x {size[1]} px")
                well_formed = all(isinstance(count, int) and count >= 0 for count in mask["counts"])
            else:
                well_formed = all(len(p) % 2 == 0 and math.isfinite(sum(p)) for p in mask or [])
            if not well_formed:
                refuse(f"the mask of annotation {key} is neither polygons nor run lengths")
            objects.append(([x, y, x + w, y + h], number[a["category_id"]], ignored, mask))
        checked = Annotations(file)
        items = [(str(Path(images, path)), checked.record(size, objects)) for path, size, objects in pictures.values()]
    except OSError as error:
        refuse(runs.reason(error))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        refuse(f"not annotations in COCO's format ({type(error).__name__}: {runs.reason(error)})")
    checked.report()
    if not items:
        refuse("no images")
    if not os.path.isfile(items[0][0]):
        refuse(f"its first image is not there: {items[0][0]}")
    result = Annotated(name, [word for _, word in categories], items, functools.partial(open_boxes, masks))
    result.file, result.categories = file, [key for key, _ in categories]
    result.ids = {str(Path(images, path)): key for key, (path, *_) in pictures.items()}
    return result


def coco_folder(folder, which, masks):
    """What is there of the layouts in which COCO's format comes; None if it has no such part."""
    parts = {"train": ("train2017", "train", ""), "test": ("val2017", "val", "test")}[which]
    kinds = ("instances", "") if masks else ("instances", "", "detection")
    for part in parts:
        for kind in kinds:
            file = Path(folder, "annotations", f"{'_'.join(word for word in (kind, part) if word)}.json")
            images = Path(folder, part) if part and Path(folder, part).is_dir() else Path(folder, "images", part)
            if file.is_file():
                return file, images if images.is_dir() else Path(folder, "images")
    return None


def voc(root, year, which, name):
    """PASCAL VOC in `root`."""
    made = fetched(torchvision.datasets.VOCDetection, root, name, year=year, image_set=which)
    checked, items = Annotations(f"{name} {year} {which}"), []
    for path, xml in zip(made.images, made.annotations, strict=True):
        size, objects = voc_objects(xml)
        items.append((path, checked.record(size, objects)))
    checked.report()
    return Annotated(name, VOC, items, functools.partial(open_boxes, False))


def voc_objects(xml):
    """((width, height), [(box, label, difficult, None)]) of a VOC file. Its pixels count from 1 and a box includes its
    last ones: x1 and y1 less 1, as in detectron2. Parts (head, hand) have boxes of their own, which are not read."""
    try:
        root = ElementTree.parse(xml).getroot()
        size, objects = [int(root.find("size").findtext(k)) for k in ("width", "height")], []
        for found in root.iter("object"):
            if (label := found.findtext("name")) not in VOC:
                common.fail(f"{xml}: unknown category {label!r}")
            x1, y1, x2, y2 = (float(found.find("bndbox").findtext(k)) for k in ("xmin", "ymin", "xmax", "ymax"))
            objects.append(([x1 - 1, y1 - 1, x2, y2], VOC.index(label), found.findtext("difficult") == "1", None))
    except (OSError, ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        common.fail(f"{xml}: not annotations of PASCAL VOC ({runs.reason(error)})")
    return size, objects


def with_objects(images):
    """The images that have objects, for training. Crowds are none; VOC's difficult objects are (as in detectron2)."""
    items = []
    for path, record in images.items:
        found = json.loads(record)
        if images.file and any(found["ignored"]):
            kept = [i for i, ignored in enumerate(found["ignored"]) if not ignored]
            found |= {k: [found[k][i] for i in kept] for k in ("boxes", "labels", "ignored", "masks")}
            record = json.dumps(found)
        if found["labels"]:
            items.append((path, record))
    return images.holding(items)


def detection(args, mask):
    """(training set, test set) with boxes, and with instance masks, of the flags."""

    def load(which):
        name, root = args.data, args.root
        if name in SCENE_NAMES:
            return scenes(name, which, args.limit * (which == "train"))
        if name in ("voc07", "voc0712"):
            years = [("2007", "test")] if which == "test" else [("2007", "trainval"), ("2012", "trainval")]
            parts = [voc(root, *part, name) for part in years[: 1 + (name == "voc0712")]]
            return Annotated(name, VOC, [item for part in parts for item in part.items], parts[0].open)
        folder = Path(root, "coco") if name in ("coco", "coco-2x") else Path(name)
        if found := coco_folder(folder, which, mask):
            return coco(*found, mask, name)
        if which == "train":
            common.fail(f"{folder} has no annotations/ in COCO's format (instances.json, instances_train2017.json) "
                        "with its images in images/, train/ or train2017/")  # fmt: skip

    train, test = split(load, args, (lambda images: images) if args.data in SCENE_NAMES else with_objects)
    if not len(train):
        common.fail(f"--data {args.data}: no image has an object to train on")
    if train.classes != test.classes:
        common.fail(f"--data {args.data}: training and test set have other categories")
    return train, test


# ============ a class for every pixel ============


def class_numbers(path):
    """uint8 [H, W] of a PNG. ValueError or OSError with the path."""
    try:
        with Image.open(path) as png:
            numbers = tvf.pil_to_tensor(png)
    except Exception as error:  # decoders raise whatever they like
        raise OSError(f"{path}: {runs.reason(error)}") from error
    if len(numbers) != 1 or numbers.dtype != torch.uint8:
        raise ValueError(f"{path}: a PNG of one byte a pixel (gray or palette) is expected")
    return numbers[0]


def file_size(path):
    return sets.size_and_time(path)[0]


def open_semantic(table, item):
    """(image, target) of an image file and its PNG of class numbers, through the 256 numbers of `table`."""
    image, numbers = sets.decode(item[0]), class_numbers(item[1])
    if numbers.shape != image.shape[1:]:
        size, own = (f"{shape[1]} x {shape[0]} px" for shape in (image.shape[1:], numbers.shape))
        raise ValueError(f"{item[1]} has {own}, its image {size}")
    return image, {"semantic": torch.tensor(table, dtype=torch.uint8)[numbers.long()]}


def voc12(root, which):
    """VOC 2012; trained on the 10,582 images with the masks of SBD where people's SegmentationClassAug and the list
    train_aug.txt are in place, else on the 1,464 of VOC."""
    part = "train" if which == "train" else "val"
    made = fetched(torchvision.datasets.VOCSegmentation, root, "voc12", year="2012", image_set=part)
    pairs, base = list(zip(made.images, made.masks, strict=True)), Path(root, "VOCdevkit", "VOC2012")
    listed = base / "ImageSets" / "Segmentation" / "train_aug.txt"
    if which == "train" and listed.is_file() and (base / "SegmentationClassAug").is_dir():
        names = listed.read_text().split()
        names = [Path(name).stem for name in names if "Class" not in name]  # some lists have pairs of paths
        pairs = [(f"{base}/JPEGImages/{n}.jpg", f"{base}/SegmentationClassAug/{n}.png") for n in names]
    elif which == "train" and common.rank() == 0:
        print(f"voc12: no {listed} with SegmentationClassAug, so there are VOC's {len(pairs)} masks, without SBD's")
    return Annotated("voc12", ["background", *VOC], pairs, functools.partial(open_semantic, range(256)), file_size)


def cityscapes(root, which):
    made = sets.first_rank_first(
        lambda: torchvision.datasets.Cityscapes(Path(root, "cityscapes"), "train" if which == "train" else "val",
                                                target_type="semantic"),
        "cityscapes", f"its leftImg8bit and gtFine belong into {root}/cityscapes")  # fmt: skip
    known = [c for c in made.classes if 0 <= c.train_id < 255]
    table = [255] * 256
    for c in known:
        table[c.id] = c.train_id
    pairs = sorted((str(image), str(mask)) for image, (mask,) in zip(made.images, made.targets, strict=True))
    names = [c.name for c in sorted(known, key=lambda c: c.train_id)]
    return Annotated("cityscapes", names, pairs, functools.partial(open_semantic, table), file_size)


def masks_folder(folder, which):
    """DIR/images and DIR/masks, or the two in DIR/train and DIR/val: files of the same names."""
    parts = [""] if os.path.isdir(Path(folder, "masks")) else ["train"] if which == "train" else ["val", "test"]
    base = next((Path(folder, part) for part in parts if os.path.isdir(Path(folder, part, "masks"))), None)
    if base is None or (which == "test" and parts == [""]):
        return None if which == "test" else common.fail(f"{folder}: no images/ and masks/ in it, nor in its train/")
    images, masks = sets.named(base / "images"), sets.named(base / "masks")
    if lacking := sorted(images.keys() - masks.keys()):
        common.fail(f"{base / 'masks'} has no mask of {len(lacking)} images, for example of {lacking[0]}")
    if not images:
        common.fail(f"{base / 'images'}: no images")
    pairs = [(images[name], masks[name]) for name in sorted(images)]
    return Annotated(str(folder), numbers_in(pairs), pairs, functools.partial(open_semantic, range(256)), file_size)


def numbers_in(pairs):
    """The class names "0", "1", ... up to the largest number in the masks but 255."""
    try:
        found = {int(v) for _, path in pairs for v in class_numbers(path).unique()} - {255}
    except (OSError, ValueError) as error:
        common.fail(f"{error}")
    if max(found, default=0) < 1:
        common.fail(
            f"{Path(pairs[0][1]).parent}: one class at most in the masks (classes count from 0, 255 is not counted)"
        )
    return [str(i) for i in range(1 + max(found))]


def segmentation(args):
    """(training set, test set) with a class for every pixel, of the flags."""
    drawn = lambda which: scenes(args.data, which, args.limit * (which == "train"))
    load = {"scenes": drawn, "scenes-hard": drawn,
            "voc12": lambda which: voc12(args.root, which),
            "cityscapes": lambda which: cityscapes(args.root, which)}  # fmt: skip
    train, test = split(load.get(args.data, lambda which: masks_folder(args.data, which)), args)
    if load.get(args.data) is drawn:
        train.classes = test.classes = ["ground", *shapes.CLASSES]
    if len(train.classes) < len(test.classes):
        common.fail(f"--data {args.data}: the test set has classes that the training set lacks")
    return train, test


# ============ batches ============


class Part(Dataset):
    """What a worker does: read one image; in training `change(image, target, g)` it."""

    def __init__(self, images, seed=0, change=None):
        self.images, self.seed, self.change = images, seed, change

    def __getitem__(self, key):
        epoch, i = key
        try:
            image, target = self.images.read(i)
        except (OSError, ValueError) as error:
            return str(error)
        g = sets.generator(self.seed, "change", epoch, i)
        return self.change(image, target, g) if self.change else (image, target)


def read(images, keys, workers, seed=0, change=None, pin=False):
    """Lists of (image, target) by `keys`, lists of (epoch, place). An image that cannot be read ends the program."""
    workers = workers if isinstance(images.items[0][0], str) else 0  # scenes are in memory
    loader = DataLoader(Part(images, seed, change), batch_sampler=keys, collate_fn=list, num_workers=workers,
                        worker_init_fn=data.outlive_signals, pin_memory=pin)  # fmt: skip
    for batch in loader:
        for found in batch:
            if isinstance(found, str):
                common.fail(found)
        yield batch


class Loader:
    """Batches for training, lists of (image, target): the same permutation on all ranks, as data.Loader makes it."""

    def __init__(self, images, batch_size, seed, workers, change, device="cpu"):
        self.data, self.seed, self.change = images, seed, change
        self.rank, self.world = common.rank(), common.world_size()
        if batch_size % self.world:
            common.fail(f"--batch-size {batch_size} is not a multiple of {self.world} ranks")
        self.batch_size, self.steps = batch_size // self.world, len(images) // batch_size
        if not self.steps:
            common.fail(f"--batch-size {batch_size}: there are {len(images)} images to train on")
        self.workers, self.pin, self.waited = workers, torch.device(device).type == "cuda", 0.0

    def epoch(self, epoch, start=0):
        order = torch.randperm(len(self.data), generator=sets.generator(self.seed, "order", epoch)).tolist()
        keys = []
        for step in range(start, self.steps):
            at = (step * self.world + self.rank) * self.batch_size
            keys.append([(epoch, i) for i in order[at : at + self.batch_size]])
        return data.timed(self, read(self.data, keys, self.workers, self.seed, self.change, self.pin))


def test_batches(images, batch_size, workers):
    """This rank's share of the images in order: (their places, a list of (image, target)) for each batch."""
    share = math.ceil(len(images) / common.world_size())
    own = range(len(images))[common.rank() * share : (common.rank() + 1) * share]
    places = [own[at : at + batch_size] for at in range(0, len(own), batch_size)]
    return zip(places, read(images, [[(0, i) for i in batch] for batch in places], workers), strict=True)
