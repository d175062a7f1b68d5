"""Data: named sets and folders, views of images for training, plain images for the probes.

    python data.py show shapes --method cmc     a PNG of images and of what a method's network sees of them
    python data.py check DIR                    lists the images that do not decode

Two paths, one augmentation code. Small sets live in memory as one uint8 tensor on the training device and a batch is
an index: no workers, no Python per image. Folders are decoded by workers, which also cut the random crops (uint8, at
the output size); everything after the crop runs batched on the device in both paths.

Randomness comes from generators seeded by a key such as (seed, epoch, step, rank): nothing needs saving, a run resumes
exactly at any step, and no two ranks or views see the same numbers. The parameters are drawn on the CPU, one per image,
and copied to the device, so that no step waits for the device to learn how many images an operation concerns.
"""

import argparse
import collections
import contextlib
import difflib
import functools
import glob
import hashlib
import importlib.util
import math
import os
import signal
import stat
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as tvf
from torchvision.utils import make_grid
from tqdm import tqdm

import shapes
from common import at_least, fail, first_rank, print_any_name

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet; every set uses them unless a recipe says not
HALF = (0.5, 0.5, 0.5)  # as mean and std they take [0, 1] to [-1, 1]
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif"}
IN_MEMORY = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}
BY_FILE = {  # name: (class, arguments of the training split, of the test split)
    "imagenet": (datasets.ImageNet, {"split": "train"}, {"split": "val"}),
    "places365": (datasets.Places365, {"split": "train-standard", "small": True}, {"split": "val", "small": True}),
    "food101": (datasets.Food101, {"split": "train"}, {"split": "test"}),
    "flowers102": (datasets.Flowers102, {"split": "train"}, {"split": "test"}),
    "pets": (datasets.OxfordIIITPet, {"split": "trainval"}, {"split": "test"}),
    "dtd": (datasets.DTD, {"split": "train"}, {"split": "test"}),
    "aircraft": (datasets.FGVCAircraft, {"split": "trainval"}, {"split": "test"}),
    "cars": (datasets.StanfordCars, {"split": "train"}, {"split": "test"}),
    "svhn": (datasets.SVHN, {"split": "train"}, {"split": "test"}),
}
BY_SCIPY = ("imagenet", "flowers102", "cars", "svhn")  # torchvision reads their labels with it
NAMES = ["shapes", "shapes-hard", "shapes-natural", *IN_MEMORY, *BY_FILE]
# Pillow refuses an image of more than 178,956,970 pixels by its header; of more than half as many it would only warn.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


LARGE = 200_000  # images from which on a folder gets the recipe of the paper


def recipe_for(name, recipes=("shapes", "cifar10", "imagenet", "folder")):
    """The one of `recipes` whose numbers fit a set: its own, or that of the set most like it, or the first that there is."""
    alike = {"shapes-hard": "shapes", "shapes-natural": "shapes", "cifar100": "cifar10", "svhn": "cifar10",
             "places365": "imagenet"}.get(name, name)  # fmt: skip
    if alike not in ("shapes", "cifar10", "imagenet"):
        alike = "imagenet" if count(name) > LARGE else "folder"
    return alike if alike in recipes else next(iter(recipes))


def count(name):
    """How many training images a folder has, 0 for all else."""
    return len(list_folder(training_part(name))[0]) if name not in NAMES and os.path.isdir(name) else 0


def generator(*key):
    """A CPU generator whose stream depends on every number of `key` and on nothing else."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


# ============ data sets ============
# Both kinds have: len(), name, classes (names, or None), `masks` ([N, H, W] uint8, or None), and key(i), the name of image i:
# its path below the set's folder without the suffix, or its number in the set. Also fingerprint(), a string that changes with
# the data, for the caches of features and masks; and contents(), for resume: the same wherever the set lies.


WARNING, WARNED = "warning", []  # key of `Files.report`; what has been said of it


class Images:
    """A set in memory: images [N, 3, H, W] uint8 on `device`, labels [N] int64 on the CPU (or None)."""

    def __init__(self, name, images, labels=None, classes=None, masks=None, keys=None):
        self.name, self.images, self.labels, self.classes, self.masks = name, images, labels, classes, masks
        self.keys = keys

    def __len__(self):
        return len(self.images)

    def key(self, i):
        return self.keys[i] if self.keys else f"{i:06d}"

    def contents(self):
        """Changes when any pixel or label does."""
        digest = hashlib.sha1(self.images.cpu().contiguous().numpy())
        digest.update(b"" if self.labels is None else self.labels.contiguous().numpy())
        return digest.hexdigest()

    fingerprint = contents


class Files:
    """A set read image by image: `items` is a list of (path, label), all below `base`, or one of torchvision's data sets.

    `read(i)` gives (uint8 [3, H, W], label), with label -1 where there is none, and raises OSError for a file that does
    not decode; in a dictionary `said` it leaves what else there is to say (`report`).
    """

    masks = None

    def __init__(self, name, items, classes=None, base="/"):
        self.name, self.items, self.classes, self.base = name, items, classes, base
        self.bad = set()  # places of those that do not decode, as far as known

    def __len__(self):
        return len(self.items)

    def read(self, i, said=None):
        try:
            item, label = self.items[i]
            if isinstance(item, Image.Image):
                return tvf.pil_to_tensor(item.convert("RGB")), int(label)
            return decode(item, said), label
        except Exception as error:  # torchvision's sets, too, decode, and raise what they like
            raise OSError(f"{self.path(i)}: {error}") from error

    def report(self, said, instead):
        """Say what workers found, {place: why that image does not decode; WARNING: a sentence}: each file that does not decode
        once; the warning, if it is the process's first. Above 1 % of the set, and more than one, stop."""
        if (sentence := said.pop(WARNING, None)) and not WARNED and first_rank():
            WARNED.append(sentence)
            tqdm.write(f"warning: {sentence}")
        for i in sorted(said.keys() - self.bad):
            self.bad.add(i)
            tqdm.write(f"warning: {said[i]}: it does not decode; {instead} ({len(self.bad)} so far)")
        if len(self.bad) > max(1, len(self) // 100):
            fail(f"{len(self.bad)} of {len(self)} images do not decode, more than 1 %: python data.py check lists them")

    def path(self, i):
        return self.items[i][0] if isinstance(self.items, list) else f"image {i} of {self.name}"

    def key(self, i):
        if isinstance(self.items, list):
            return stem(self.items[i][0], self.base)
        return f"{self.items.indices[i] if isinstance(self.items, Subset) else i:06d}"

    def contents(self):
        """Changes when images are added, removed, moved between classes or exchanged (for files of another size: of 10,000 at
        most, evenly spread, as a network disk is slow to tell), and not when the folder is copied to another place."""
        digest = hashlib.sha1(f"{labels_of(self).tolist()} {getattr(self.items, 'indices', '')}".encode())
        if isinstance(self.items, list):
            names = [path.removeprefix(str(self.base)).lstrip(os.sep) for path, _ in self.items]
            sizes = [size_and_time(path)[0] for path, _ in self.items[:: math.ceil(len(self) / 10_000)]]
            digest.update(f"{names} {sizes}".encode())
        return digest.hexdigest()

    def fingerprint(self):
        """Also changes when any file was written."""
        items = self.items if isinstance(self.items, list) else []
        return hashlib.sha1(f"{self.contents()} {[size_and_time(path) for path, _ in items]}".encode()).hexdigest()


def size_and_time(path):
    try:
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns
    except OSError:  # a link that leads nowhere
        return -1, -1


def decode(path, said=None):
    """The image in a file as uint8 [3, H, W]: by torchvision, and by Pillow a PNG and what that one cannot read.

    Of an animation, and of the several pictures of a camera's JPEG, it is the first. OSError with the reason for whatever is
    no image, for more than 178,956,970 pixels, and for what would lose something unseen: a TIFF of several pages, or of more
    than 3 channels (4 with alpha); more than 8 bits a channel, but in a PNG. If the values of a PNG of 16 bits lie within a
    twelfth of the scale (of a camera of 12 bits, say), said[WARNING] tells so.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a FIFO would let us wait for ever
            raise OSError("not a regular file")
        with open(path, "rb") as f, Image.open(f) as image:  # reads the header alone, and refuses decompression bombs by it
            if image.format == "TIFF":
                channels = image.tag_v2.get(277, 1)
                if image.n_frames > 1:
                    raise OSError(f"{image.n_frames} pages, of which only the first would be seen")
                if channels > len(image.getbands()) or image.mode == "RGBX":
                    raise OSError(f"{channels} channels, of which only three would be seen")
            if image.format == "PNG":  # not by torchvision, whose decoder ends the process at one whose data is damaged
                grey = image.mode[0] == "I"  # of 16 bits; of 16 bits and three channels Pillow keeps the upper eight
                x = tvf.pil_to_tensor(image if grey else image.convert("RGB"))
                if grey:
                    x = x.int().expand(3, -1, -1)
                f.seek(24)
                if said is not None and f.read(1) == b"\x10":  # bits a channel
                    low, high = (int(v) * (1 if grey else 257) for v in x.aminmax())
                    if high - low <= 65535 / 12:
                        said[WARNING] = (f"{path}: 16 bits a channel, and all values lie from {low} to {high} of 65535: "
                                         "images that are nearly one grey to a network should be rescaled first")  # fmt: skip
                return (x // 257).byte() if grey else x
            if image.format not in ("GIF", "TIFF"):  # of a GIF torchvision decodes every frame
                f.seek(0)
                with contextlib.suppress(RuntimeError):
                    return decode_image(torch.frombuffer(bytearray(f.read()), dtype=torch.uint8), ImageReadMode.RGB)
            if image.mode[0] in "IF":
                raise OSError("more than 8 bits a channel, which Pillow would clip to white")
            return tvf.pil_to_tensor(image.convert("RGB"))
    except UnidentifiedImageError:
        raise OSError("no image, or none of a kind that Pillow reads, such as a TIFF of more channels") from None
    except Exception as error:  # decoders raise whatever they like (SyntaxError for a broken PNG)
        raise OSError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


@functools.lru_cache(maxsize=8)
def list_folder(folder):
    """All images below `folder` as sorted (path, label) and the class names. Links are followed; each folder counts once.

    The classes are the names of the first folders on the way down; without at least two such folders holding every
    image there are none, and every label is -1.
    """
    paths, known, starts = [], set(), [folder]
    for start in starts:  # first what lies below the folder itself, then what its links lead to
        for base, folders, files in os.walk(start):
            found = os.stat(base)
            if (found.st_dev, found.st_ino) in known:  # by a link that closes a loop, or by a second one
                folders.clear()
                continue
            known.add((found.st_dev, found.st_ino))
            paths += [Path(base, f) for f in files if Path(f).suffix.lower() in SUFFIXES and not f.startswith(".")]
            folders.sort()
            starts += [link for f in folders if os.path.islink(link := os.path.join(base, f))]
    paths.sort()
    tops = [p.relative_to(folder).parts[0] if p.parent != Path(folder) else None for p in paths]
    classes = sorted(set(tops) - {None})
    if None in tops or len(classes) < 2:
        return [(str(p), -1) for p in paths], None
    number = {c: i for i, c in enumerate(classes)}
    return [(str(p), number[t]) for p, t in zip(paths, tops, strict=True)], classes


def stem(path, folder):
    """The name of a file: its path below `folder` without the suffix."""
    return Path(os.path.relpath(path, folder)).with_suffix("").as_posix()


def named(folder):
    """{name: path} of the images below `folder`."""
    if not os.path.isdir(folder):  # which is False, too, for what the system refuses to look at: a name too long, a loop
        fail(f"{folder}: no such folder")
    return {stem(path, folder): path for path, _ in list_folder(folder)[0]}


def keys_of(data):
    """The names of all images of a set, each of them once: files of masks are told apart by them."""
    keys = [data.key(i) for i in range(len(data))]
    if len(set(keys)) < len(keys):
        twice = collections.Counter(keys).most_common(1)[0][0]
        fail(f"two images of {data.name} have the name {twice!r}, so their masks would be one file")
    return keys


def training_part(folder):
    """Where the training images of a folder lie."""
    train = Path(folder, "train")
    return str(train if os.path.isdir(train) else Path(folder))


def load_folder(folder, split, name):
    """A tree of images. `train/` and `val/` or `test/` are used when there. With classes but neither of the last two,
    every tenth image is the probes' test set; it is trained on all the same, without its label."""
    folder = Path(folder)
    if not os.path.isdir(folder):
        near = difflib.get_close_matches(str(folder), NAMES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f". Named sets: {', '.join(NAMES)}"
        fail(f"--data {folder}: neither a named set nor a folder{hint}")
    held_out = next((d for d in ("val", "test") if os.path.isdir(folder / d)), None)
    train = Path(training_part(folder))
    items, classes = list_folder(str(train))
    if not items:
        fail(f"no images in {train} (looked for {' '.join(sorted(SUFFIXES))})")
    if train == folder:  # no split by folder: "val" or "test" could only be a class like any other
        held_out = None
    base = train
    if split == "test" and held_out:
        base = folder / held_out
        items, test_classes = list_folder(str(base))
        if test_classes and test_classes != classes:  # label by the training classes; fewer of them is fine
            if unknown := sorted(set(test_classes) - set(classes or [])):
                fail(f"{base} has a class that {train} lacks: {unknown[0]!r}")
            items = [(path, classes.index(test_classes[label])) for path, label in items]
        if not items:
            fail(f"no images in {base}")
    elif classes and not held_out and split != "pretrain":
        tenth = min(10, len(items))
        items = [item for i, item in enumerate(items) if (i % tenth == tenth - 1) == (split == "test")]
    return Files(name or str(folder), items, classes, base)


def load(name, root="datasets", split="pretrain", device="cpu", limit=0, seed=0, memory=False):
    """The set `name` (one of NAMES, or a folder): split "pretrain" (all that may be trained on), "train" or "test".

    A named set is downloaded into `root` where torchvision can; a folder `root`/`name` with train/ (and test/) in it
    serves instead. `limit` keeps that many training images, chosen by `seed`. `memory`: decode a folder once into one
    tensor (small images of one size). The same set asked for twice is the same object.
    """
    if split == "pretrain" and name in NAMES and name != "stl10":
        split = "train"  # only STL-10 and folders have images to train on that the probes must not see
    return _load(name, str(root), split, str(device), 0 if split == "test" else limit, seed, memory)


def splits(args, device):
    """The sets of a training script: (to train on, labelled training images for the probes, test images)."""
    how = device, args.limit, args.seed, args.in_memory
    return tuple(load(args.data, args.root, split, *how) for split in ("pretrain", "train", "test"))


@functools.lru_cache(maxsize=4)
def _load(name, root, split, device, limit, seed, memory):
    if name.startswith("shapes") and name in NAMES:
        n, list_seed = (2_000, 1) if split == "test" else (10_000, 0)
        images, labels, masks = shapes.draw_shapes(n, 32, list_seed, name == "shapes-hard", name == "shapes-natural")
        return subset(Images(name, images.to(device), labels, shapes.CLASSES, masks), limit, seed)
    own = Path(root, name)
    if name == "imagenet" and not os.path.isdir(own / "train") and glob.glob(f"{glob.escape(root)}/train/n*/"):
        own = Path(root)  # as people have it; its classes in order of their folders are ImageNet's
    if name in NAMES and os.path.isdir(own / "train"):
        files = load_folder(own, split, name)
        return in_memory(files, device, limit, seed) if memory or name in IN_MEMORY else subset(files, limit, seed)
    if name in IN_MEMORY:
        return subset(load_small(name, root, split, device), limit, seed)
    if name in BY_FILE:
        cls, train, test = BY_FILE[name]
        if name in BY_SCIPY and not importlib.util.find_spec("scipy"):
            fail(f"{name} is not in {root} as folders, and torchvision reads its files with scipy, which is not installed: "
                 f"pip install scipy, or {layout(name, root)}")  # fmt: skip
        download = {} if name in ("imagenet", "cars") else {"download": True}
        made = first_rank_first(lambda: cls(root, **(test if split == "test" else train), **download), name, root)
        base = getattr(made, "split_folder", "/")  # of ImageNet, whose items are files
        return subset(Files(name, getattr(made, "samples", made), getattr(made, "classes", []), base), limit, seed)
    files = load_folder(name, split, None)
    return in_memory(files, device, limit, seed) if memory else subset(files, limit, seed)


def layout(name, root):
    """The folders that serve as a named set, in words."""
    if name == "imagenet":
        return f"lay the images out as {root}/train/n*/*.JPEG and {root}/val/n*/*.JPEG"
    return f"lay the images out as {root}/{name}/train/CLASS/* and {root}/{name}/test/CLASS/*"


def load_small(name, root, split, device):
    """CIFAR-10, CIFAR-100 or STL-10 as one tensor. STL-10's 100,000 unlabelled images are for pretraining only."""
    if name == "stl10":
        kwargs = {"split": {"pretrain": "train+unlabeled"}.get(split, split)}
    else:
        kwargs = {"train": split != "test"}
    made = first_rank_first(lambda: IN_MEMORY[name](root, download=True, **kwargs), name, root)
    images = torch.from_numpy(made.data)
    images = images if name == "stl10" else images.permute(0, 3, 1, 2)
    labels = torch.as_tensor(made.labels if name == "stl10" else made.targets).long()
    return Images(name, images.contiguous().to(device), labels, made.classes)


def first_rank_first(make, name, root):
    """Call `make` on local rank 0 first, so that a download happens once a machine; then on the others."""
    try:
        if torch.distributed.is_initialized():
            local = int(os.environ["LOCAL_RANK"])
            made = make() if local == 0 else None
            torch.distributed.barrier()
            return make() if made is None else made
        return make()
    except (RuntimeError, OSError) as error:
        fail(f"{name} is not in {root} and could not be fetched ({str(error).splitlines()[0]}); or {layout(name, root)}")


def in_memory(files, device, limit=0, seed=0):
    """Decode `files`, which must all have one size, into a set in memory. Those that do not decode are left out."""
    files, images, labels, keys, said = subset(files, limit, seed), [], [], [], {}
    for i in range(len(files)):
        try:
            image, label = files.read(i, said)
        except OSError as error:
            said[i] = str(error)
            continue
        images.append(image)
        labels.append(label)
        keys.append(files.key(i))
        if image.shape != images[0].shape:
            fail(f"{files.path(i)} has another size than the first image, so they do not fit one tensor in memory")
    files.report(said, "it is left out")
    if not images:
        fail(f"no image of {files.name} decodes")
    labels = torch.tensor(labels) if files.classes else None
    return Images(files.name, torch.stack(images).to(device), labels, files.classes, keys=keys)


def subset(data, limit, seed):
    """`limit` images of a set (0: all), the same ones for the same seed, in their old order."""
    if limit > len(data):
        fail(f"--limit {limit} is more than the {len(data)} images of {data.name}")
    if not limit:
        return data
    return pick(data, torch.randperm(len(data), generator=generator(seed, "limit"))[:limit].sort().values)


def pick(data, indices):
    """The images of a set at `indices` (int64, on the CPU), in that order, as a set of the same kind."""
    if isinstance(data, Files):
        items, rows = data.items, indices.tolist()
        if isinstance(items, Subset):  # one list of places, however often a set is cut: the fingerprint reads it
            items, rows = items.dataset, [items.indices[i] for i in rows]
        items = [items[i] for i in rows] if isinstance(items, list) else Subset(items, rows)
        return Files(data.name, items, data.classes, data.base)
    parts = [None if t is None else t[indices.to(t.device)] for t in (data.images, data.labels, data.masks)]
    return Images(data.name, parts[0], parts[1], data.classes, parts[2], [data.key(i) for i in indices.tolist()])


def labels_of(data):
    """The labels of a set, int64 [N] on the CPU (-1: none), without decoding an image."""
    if isinstance(data, Images):
        return torch.full((len(data),), -1) if data.labels is None else data.labels
    items = data.items
    if isinstance(items, list):
        return torch.tensor([label for _, label in items], dtype=torch.long)
    if isinstance(items, Subset):
        return labels_of(Files(data.name, items.dataset))[torch.tensor(items.indices)]
    for name in ("targets", "_labels", "labels"):  # torchvision has no common name for them
        if hasattr(items, name):
            return torch.as_tensor(getattr(items, name)).long()
    if hasattr(items, "_samples"):  # Stanford Cars
        return torch.tensor([label for _, label in items._samples])
    fail(f"the labels of {data.name} cannot be read without decoding its images")


def share(labels, percent, seed):
    """Sorted indices of `percent` per cent of the labelled images: of each class, in an order drawn by `seed`, the first
    max(1, round(percent / 100 of them)). So shares are balanced as the set is, and a smaller one lies in a larger."""
    kept = []
    for c in labels[labels >= 0].unique().tolist():
        members = (labels == c).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator(seed, "share", c))
        kept.append(members[order[: max(1, round(percent / 100 * len(members)))]])
    return torch.cat(kept).sort().values if kept else torch.empty(0, dtype=torch.long)


def listed(data, file):
    """Sorted indices of the images that a text file names, one file name (or CLASS/FILE) a line, as the official lists of
    ImageNet do. A name that is not in the set, or that two of its images have, ends the program with exit code 2."""
    try:
        names = Path(file).read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--label-list {file}: {error}")
    names = [name for line in names if (name := line.strip())]
    if not isinstance(data, Files) or not isinstance(data.items, list):
        fail(f"--label-list {file}: the images of {data.name} have no file names; use --labels")
    if not names:
        fail(f"--label-list {file}: it names no image")
    parts = 2 if "/" in names[0] else 1
    keys = ["/".join(Path(path).parts[-parts:]) for path, _ in data.items]
    place = {key: i for i, key in enumerate(keys)}
    if missing := next((name for name in names if name not in place), None):
        fail(f"--label-list {file}: {missing!r} is not among the {len(data)} images of {data.name}")
    if len(place) < len(keys):
        often = collections.Counter(keys)
        if twice := next((name for name in names if often[name] > 1), None):
            fail(f"--label-list {file}: {often[twice]} images of {data.name} are called {twice!r}; list CLASS/FILE")
    return torch.tensor(sorted({place[name] for name in names}))


def read_masks(folder, data, size=64):
    """The masks of a set's images, one a file, FOLDER/KEY.png or of another format: uint8 [N, size, size], 255 where the
    object is. Masks of any size will do: they are resized (and so may be squashed, as a relative place is all they tell).
    Images without a mask are named; up to 1 % of them (files that do not decode have none) get an empty one, more end the
    program."""
    if not os.path.isdir(folder):
        fail(f"--masks {folder}: no such folder")
    files, keys = named(folder), keys_of(data)
    if missing := [key for key in keys if key not in files]:
        sentence = f"{len(missing)} of {len(keys)} images of {data.name} have no mask below {folder}: "
        sentence += ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        if len(missing) > max(1, len(keys) // 100):
            fail(sentence)
        if first_rank():
            print(f"warning: {sentence}", flush=True)

    def read(key):
        if key not in files:
            return torch.zeros(size, size, dtype=torch.uint8)
        try:
            mask = tvf.resize(decode(files[key])[:1], [size, size], antialias=True)
        except OSError as error:
            fail(f"{files[key]} is not a mask that can be read: {error}")
        return mask[0]

    masks = torch.empty(len(keys), size, size, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:  # decoders let go of Python's lock
        for start in tqdm(range(0, len(keys), 1000), "masks, thousands", leave=False, disable=None):
            masks[start : start + 1000] = torch.stack(list(pool.map(read, keys[start : start + 1000])))
    return masks


# ============ geometry: random crops and flips ============


def sample_boxes(n, height, width, scale, ratio, g):
    """`n` crops (top, left, height, width) [n, 4], distributed as torchvision's RandomResizedCrop: area U(scale) of the
    image, log-uniform aspect ratio (None: the image's own, so that the resize squashes it; "square": 1, and the area is a
    share of the largest square's, so that it always fits); of ten tries the first that fits, else the largest central crop
    of allowed ratio."""
    whole = min(height, width) ** 2 if ratio == "square" else height * width
    ratio = (1.0, 1.0) if ratio == "square" else ratio or (width / height, width / height)
    area = whole * (scale[0] + (scale[1] - scale[0]) * torch.rand(n, 10, generator=g))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * torch.rand(n, 10, generator=g))
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)  # the first True
    w, h = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0]
    place = torch.rand(n, 2, generator=g)
    top, left = (place[:, 0] * (height - h + 1)).floor(), (place[:, 1] * (width - w + 1)).floor()
    central_w = width if width / height <= ratio[1] else round(height * ratio[1])
    central_h = height if width / height >= ratio[0] else round(width / ratio[0])
    central = torch.tensor([(height - central_h) // 2, (width - central_w) // 2, central_h, central_w]).float()
    return torch.where(fits.any(1, keepdim=True), torch.stack([top, left, h, w], 1), central)


def resize_weights(start, length, inputs, outputs, interpolation):
    """Weights [B, outputs, inputs] that resize `length` pixels from `start` on to `outputs` pixels, antialiased: the
    kernel is stretched by the reduction and cut off at the crop's edge, as in torchvision's resized_crop."""
    reduction = (length / outputs)[:, None, None]
    centre = start[:, None, None] + (torch.arange(outputs, device=start.device)[:, None] + 0.5) * reduction
    pixel = torch.arange(inputs, device=start.device) + 0.5  # [inputs]
    d = ((pixel - centre) / reduction.clamp(min=1)).abs()  # [B, outputs, inputs]
    q, p = (1 - d).clamp_(min=0), (2 - d).clamp_(min=0)
    # Bicubic with a = -0.5: p^2 (p - 1) / 2 is its outer piece, and the second term what the inner one has on top.
    weight = q if interpolation == "bilinear" else 0.5 * p * p * (p - 1) + q * q * (1 - 2 * q)
    end = (start + length)[:, None, None]
    weight = weight * ((pixel > start[:, None, None]) & (pixel < end))
    return weight / weight.sum(-1, keepdim=True)


def crop_resize(images, boxes, flip, size, interpolation):
    """Crops of a batch in memory: uint8 [B, C, H, W], boxes [B, 4], flip [B] bool -> float [B, C, size, size] in [0, 1].

    A crop and resize is linear and separable, so it is two batched matrix products, exact for reduction and
    enlargement alike; the flip reverses the rows of one matrix and costs nothing.
    """
    (b, c, height, width), device = images.shape, images.device
    boxes, flip = boxes.to(device, non_blocking=True), flip.to(device, non_blocking=True)
    down = resize_weights(boxes[:, 0], boxes[:, 2], height, size, interpolation)  # [B, size, H]
    across = resize_weights(boxes[:, 1], boxes[:, 3], width, size, interpolation)  # [B, size, W]
    across = torch.where(flip[:, None, None], across.flip(1), across) / 255
    x = torch.bmm(images.reshape(b, c * height, width).float(), across.transpose(1, 2)).view(b, c, height, size)
    x = torch.matmul(down[:, None], x)  # [B, C, size, size]
    return x.clamp_(0, 1) if interpolation == "bicubic" else x  # bicubic overshoots at edges


def random_crops(images, view, g):
    """Random crops and flips of a batch in memory, by the numbers of `view`."""
    n, _, height, width = images.shape
    boxes = sample_boxes(n, height, width, view["scale"], view["ratio"], g)
    flip = torch.rand(n, generator=g) < view["flip"]
    return crop_resize(images, boxes, flip, view["size"], view["interpolation"])


def random_crop(image, view, g):
    """The same for one image of a folder, in a worker: uint8 [C, H, W] -> uint8 [C, size, size]."""
    top, left, h, w = sample_boxes(1, *image.shape[1:], view["scale"], view["ratio"], g)[0].int().tolist()
    mode, size = tvf.InterpolationMode(view["interpolation"]), [view["size"], view["size"]]
    crop = tvf.resized_crop(image, top, left, h, w, size, mode, antialias=True)
    return crop.flip(-1) if torch.rand((), generator=g) < view["flip"] else crop


def fit(image, size, interpolation="bilinear"):
    """An image [..., H, W] as a network sees it in evaluation: an image of the right size as it is; others with the
    short side at 256/224 of `size` (below 64 px at `size`) and the centre cut out."""
    if tuple(image.shape[-2:]) == (size, size):
        return image
    short = size if size < 64 else round(size * 256 / 224)
    image = tvf.resize(image, [short], tvf.InterpolationMode(interpolation), antialias=True)
    return tvf.center_crop(image, [size, size])


# ============ colour: operations on batches in [0, 1], one parameter per image ============
# Each equals torchvision's operation of that name on a float image (tests/test_data.py compares them).


def grey(x):
    """[B, 3, H, W] -> luma [B, 1, H, W] (ITU-R 601)."""
    return (0.2989 * x[:, 0:1]).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)


def brightness(x, f):
    return (x * f).clamp_(0, 1)


def contrast(x, f):
    return (x * f).add_((1 - f) * grey(x).mean((1, 2, 3), keepdim=True)).clamp_(0, 1)


def saturation(x, f):
    return (x * f).add_((1 - f) * grey(x)).clamp_(0, 1)


def hue(x, shift):
    """Turn the hue by `shift` (in turns) without going through HSV and back: with V = max, C = max - min and the hue h
    in sixths of a turn, a channel is V - C + C clamp(ramp, 0, 1), the ramps being |h - 3| - 1, 2 - |h - 2| and
    2 - |h - 4| for R, G, B."""
    r, g, b = x.split(1, 1)
    v = x.amax(1, keepdim=True)
    c = v - x.amin(1, keepdim=True)
    # Which channel is largest is a factor of 0 or 1: torch.where takes several times as long on a CPU.
    h = torch.lerp(2 * c + b - r, 4 * c + r - g, (v - g).sign_())
    h = torch.lerp(g - b, h, (v - r).sign_()).div_(c.clamp(min=1e-8))
    h = h.add_(6 * shift).remainder_(6)  # [B, 1, H, W]
    ramp = torch.cat([(h - 3).abs_().sub_(1), 2 - (h - 2).abs_(), 2 - (h - 4).abs_()], 1).clamp_(0, 1)
    return ramp.mul_(c).add_(v - c)


JITTER = (brightness, contrast, saturation, hue)


def jitter(x, factors, order):
    """Colour jitter in place. factors [B, 4]: of brightness, contrast, saturation, hue. order [B, 4], on the CPU: which
    operation an image meets first, second, third, fourth; 4 stands for none."""
    counts = [torch.bincount(order[:, slot], minlength=5).tolist() for slot in range(4)]
    rows = order.argsort(0).to(x.device, non_blocking=True)  # [B, 4]: in each slot the images grouped by operation
    factors = factors.to(x.device, non_blocking=True)
    for slot in range(4):
        for number, group in enumerate(rows[:, slot].split(counts[slot])[:4]):
            if len(group):
                x[group] = JITTER[number](x.index_select(0, group), factors[group, number].view(-1, 1, 1, 1))
    return x


def blur(x, sigma, size):
    """Gaussian blur, sigma [B] in pixels, kernel of `size` pixels, reflected at the border (as torchvision's)."""
    (b, c, h, w), half = x.shape, size // 2
    kernel = torch.exp(-0.5 * (torch.arange(-half, half + 1, device=x.device) / sigma[:, None]) ** 2)  # [B, size]
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)  # [B * 3, size]
    x = F.pad(x.reshape(1, b * c, h, w), (half, half, half, half), mode="reflect")
    x = F.conv2d(x, kernel[:, None, None, :], groups=b * c)
    return F.conv2d(x, kernel[:, None, :, None], groups=b * c).view(b, c, h, w)


def solarize(x):
    return torch.minimum(x, 1 - x)


def normalise(x, mean=MEAN, std=STD):
    mean, std = (torch.tensor(t).to(x.device, non_blocking=True).view(3, 1, 1) for t in (mean, std))
    return (x - mean).div_(std)


def to_lab(rgb):
    """sRGB in [0, 1], [B, 3, ...] -> CIE Lab (D65): L in 0..100, a and b within -108..98."""
    r, g, b = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055).pow(2.4), rgb / 12.92).unbind(1)
    xyz = torch.stack([(0.412453 * r + 0.357580 * g + 0.180423 * b) / 0.95047,
                       0.212671 * r + 0.715160 * g + 0.072169 * b,
                       (0.019334 * r + 0.119193 * g + 0.950227 * b) / 1.08883], 1)  # fmt: skip
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp(min=0.008856).pow(1 / 3), 7.787 * xyz + 16 / 116).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def to_ydbdr(rgb):
    """RGB in [0, 1], [B, 3, ...] -> YDbDr, the colour space of SECAM: Y in 0..1, Db and Dr within -1.333..1.333."""
    r, g, b = rgb.unbind(1)
    return torch.stack([0.299 * r + 0.587 * g + 0.114 * b,
                        -0.450 * r - 0.883 * g + 1.333 * b,
                        -1.333 * r + 1.116 * g + 0.217 * b], 1)  # fmt: skip


def lightness(lab):
    """What a network sees of Lab [B, 3, H, W] if colour is to be predicted: (L - 50) / 50, in [-1, 1], three times over."""
    return ((lab[:, :1] - 50) / 50).expand(-1, 3, -1, -1)


def standardise(x):
    """Each image [B, C, H, W] to mean 0 and standard deviation 1 over all its pixels and channels; the deviation counts as
    1 / sqrt(C H W) at least (TensorFlow's per_image_standardization)."""
    x = x - x.mean((1, 2, 3), keepdim=True)
    return x / x.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=x[0].numel() ** -0.5)


def uniform(n, low, high, g):
    return low + (high - low) * torch.rand(n, generator=g)


def chosen(n, p, g, device):
    """The images, each with probability `p`, that an operation concerns; known to the host without asking the device."""
    return (torch.rand(n, generator=g) < p).nonzero()[:, 0].to(device, non_blocking=True)


def masks_at(alpha, size, cut=None):
    """Masks or saliency maps uint8 [N, h, w] at another `size`; with `cut` (uint8 [N]) hard: 255 where a map reaches its cut,
    else 0. The map is enlarged first, as an edge that is enlarged is a ramp."""
    alpha = tvf.resize(alpha, list(size), antialias=True)
    return alpha if cut is None else (alpha >= cut[:, None, None]).to(torch.uint8) * 255


BLENDS = {"none": 0.0, "gaussian": 1.0, "mix": 0.5}  # how many masks are blurred before the paste


def copy_paste(x, alpha, view, grounds, g):
    """Some objects on other grounds, I <- M I + (1 - M) B (Distilling Localization, sec. 5.2), x [B, 3, S, S] in place.

    alpha [B, 1, S, S] is M in [0, 1]; the others, and images whose M is 1 everywhere, stay as they are. B is a level of
    grey, drawn for each image, or one of `grounds` (uint8 [G, 3, H, W]) in a crop and flip of its own. Image and mask have
    been cut alike before, which costs less than after; with grey it is the same up to the interpolation along the edge.
    """
    rows = chosen(len(x), view["paste"], g, x.device)
    if grounds is None:
        ground = torch.randint(256, (len(rows), 1, 1, 1), generator=g).to(x.device, non_blocking=True) / 255
    else:
        pick = torch.randint(len(grounds), (len(rows),), generator=g).to(grounds.device, non_blocking=True)
        ground = random_crops(grounds[pick], view, g)
    alpha = alpha[rows]
    if BLENDS[view["blend"]]:
        soft = chosen(len(rows), BLENDS[view["blend"]], g, x.device)
        if len(soft):  # 5 taps, sigma 2: the kernel of the cut-and-paste generator that the paper cites (its ref. 14)
            alpha[soft] = blur(alpha[soft], torch.full((len(soft),), 2.0, device=x.device), 5)
    x[rows] = torch.lerp(ground, x[rows], alpha)
    return x


def augment(x, view, g, grounds=None):
    """The part of a view after the crop: float [B, 3, S, S] in [0, 1] (overwritten) -> normalised. With copy-paste the
    fourth of four channels is the object's mask, and `grounds` are what it may be pasted on (None: levels of grey).

    Paste, jitter, grey, blur, solarize, in the order of BYOL's appendix B; an operation of probability 0 costs nothing.
    """
    n, device = len(x), x.device
    if view["paste"]:
        x = copy_paste(x[:, :3].contiguous(), x[:, 3:], view, grounds, g)
    if view["jitter_p"]:
        b, c, s, h = view["jitter"]
        bounds = [(max(0, 1 - b), 1 + b), (max(0, 1 - c), 1 + c), (max(0, 1 - s), 1 + s), (-h, h)]
        factors = torch.stack([uniform(n, low, high, g) for low, high in bounds], 1)
        order = torch.rand(n, 4, generator=g).argsort(1)  # torchvision, too, draws an order for every image
        order[torch.rand(n, generator=g) >= view["jitter_p"]] = 4
        x = jitter(x, factors, order)
    if view["grey"]:
        rows = chosen(n, view["grey"], g, device)
        x[rows] = grey(x[rows]).expand(-1, 3, -1, -1)
    if view["blur"]:
        rows = chosen(n, view["blur"], g, device)
        sigma = uniform(len(rows), *view["sigma"], g).to(device, non_blocking=True)
        if len(rows):
            x[rows] = blur(x[rows], sigma, 2 * int(view["size"] / 20) + 1)  # 23 taps at 224 px, 3 at 32 px
    if view["solarize"]:
        rows = chosen(n, view["solarize"], g, device)
        x[rows] = solarize(x[rows])
    return normalise(x, view["mean"], view["std"])


def view(size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), interpolation="bicubic", flip=0.5, jitter=(0, 0, 0, 0),
         jitter_p=0.0, grey=0.0, blur=0.0, sigma=(0.1, 2.0), solarize=0.0, mean=MEAN, std=STD, paste=0.0,
         blend="none"):  # fmt: skip
    """The numbers of one view; the scripts spell out those that their paper sets.

    size: px. scale, ratio: of the random crop, as torchvision's RandomResizedCrop (ratio None: the image's own; "square": 1,
    with scale as a share of the largest square). jitter: strengths of brightness, contrast, saturation, hue. sigma: range of
    the blur's standard deviation in px. flip, jitter_p, grey, blur, solarize, paste: probabilities. blend: of the pasted
    object's edge, a key of BLENDS.
    """
    return dict(size=size, scale=scale, ratio=ratio, interpolation=interpolation, flip=flip, jitter=jitter,
                jitter_p=jitter_p, grey=grey, blur=blur, sigma=sigma, solarize=solarize, mean=mean, std=std,
                paste=paste, blend=blend)  # fmt: skip


# ============ batches ============


class Loader:
    """Batches of views for training. `epoch(e)` yields (index [b], [view_1, ..., view_V]), each view a normalised float
    [b, 3, S, S] on the device and `index` the images' places in the set, which memory banks key on.

    Every process draws the same permutation of the set per epoch and takes its own slice of each batch; a ragged tail
    is dropped, so that all processes make the same `steps`. Views that paste need `alpha` and `cut`, the objects' masks as
    `masks_at` takes them, and take `grounds` as `augment` does.
    """

    def __init__(self, data, views, batch_size, seed, rank=0, world=1, workers=0, device="cpu", alpha=None, grounds=None,
                 cut=None):  # fmt: skip
        self.data, self.views, self.batch_size, self.seed, self.grounds = data, views, batch_size, seed, grounds
        self.rank, self.world, self.device = rank, world, torch.device(device)
        self.steps = len(data) // (batch_size * world)
        if isinstance(data, Files):
            self.batches = _Batches()
            check_shared_memory(workers, batch_size * sum((3 + (v["paste"] > 0)) * v["size"] ** 2 for v in views))
            self.loader = DataLoader(
                Crops(data, views, seed, alpha, cut), batch_sampler=self.batches, collate_fn=Crops.collate, num_workers=workers,
                persistent_workers=workers > 0, pin_memory=self.device.type == "cuda", worker_init_fn=outlive_signals,
            )  # fmt: skip
        else:
            self.alpha = None
            if alpha is not None:
                self.alpha = masks_at(alpha, data.images.shape[2:], cut)[:, None].to(data.images.device)

    def epoch(self, epoch, start=0):
        """The batches of epoch `epoch` from step `start` on; the same ones whenever they are asked for."""
        order = torch.randperm(len(self.data), generator=generator(self.seed, "order", epoch))
        order = order[: self.steps * self.batch_size * self.world].view(self.steps, self.world, self.batch_size)
        order = order[:, self.rank]  # [steps, b]
        for step, (index, crops) in enumerate(self.crops(order, epoch, start), start):
            g = generator(self.seed, epoch, step, self.rank)
            if crops is None:
                images = self.data.images[index]
                with_masks = None if self.alpha is None else torch.cat([images, self.alpha[index]], 1)
                crops = [random_crops(with_masks if view["paste"] else images, view, g) for view in self.views]
            yield index, [augment(crop, view, g, self.grounds) for crop, view in zip(crops, self.views, strict=True)]

    def crops(self, order, epoch, start):
        if isinstance(self.data, Images):
            yield from ((index, None) for index in order[start:].to(self.device))
            return
        self.batches.keys = [[(epoch, i) for i in batch] for batch in order[start:].tolist()]
        for index, crops, said in self.loader:
            self.data.report(said, "another image takes its place")
            crops = [c.to(self.device, non_blocking=True).float().div_(255) for c in crops]
            yield index.to(self.device, non_blocking=True), crops


def check_shared_memory(workers, batch):
    """Workers hand their batches, of `batch` bytes, over in /dev/shm, two each ahead of the one that is used. Where these do
    not fit torch waits for ever, so that is refused."""
    try:
        found = os.statvfs("/dev/shm")
    except (OSError, AttributeError):  # not on Windows and macOS, which have other ways
        return
    needed = (2 * workers + 1) * batch * int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # as much for each process beside this one
    if workers and needed > found.f_bavail * found.f_frsize:
        fail(f"/dev/shm is too small for the batches of {workers} workers, {needed / 1e6:.1f} MB: lower --workers (0 needs "
             "none), or give it more (docker run --shm-size 8g)")  # fmt: skip


def outlive_signals(_):
    """In workers: a signal to stop may reach every process, but it is for the one that trains, which still needs its next
    batch to finish the step and save. SIGTERM, which is also how Python ends workers at exit, works after five seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):  # not on Windows, where processes are not stopped by signals
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(5))
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class _Batches:
    """A batch sampler that hands out whatever `keys` it holds when an epoch begins, batches of (epoch, index), so that workers
    can live for all epochs. It knows no Loader: in a circle of references workers would outlive it, until Python kills them."""

    def __init__(self):
        self.keys = []

    def __iter__(self):
        return iter(self.keys)

    def __len__(self):
        return len(self.keys)


class Crops(Dataset):
    """What a worker does: decode one image and cut its views. The key (epoch, index) decides all randomness, so it does
    not matter which worker does it."""

    def __init__(self, files, views, seed, alpha=None, cut=None):
        self.files, self.views, self.seed, self.alpha, self.cut = files, views, seed, alpha, cut

    def __len__(self):
        return len(self.files)

    def __getitem__(self, key):
        epoch, index = key
        g, at, said = generator(self.seed, "crop", epoch, index), index, {}
        image = torch.zeros(3, 8, 8, dtype=torch.uint8)  # only if twenty images in a row are broken
        for _ in range(20):
            try:
                image, _ = self.files.read(at, said)
                break
            except OSError as error:
                said[at] = str(error)
                at = int(torch.randint(len(self.files), (), generator=g))
        if self.alpha is not None:
            mask = masks_at(self.alpha[at, None], image.shape[1:], None if self.cut is None else self.cut[at, None])
        crops = [random_crop(torch.cat([image, mask]) if view["paste"] else image, view, g) for view in self.views]
        return index, crops, said

    @staticmethod
    def collate(samples):
        numbers, images, said = zip(*samples, strict=True)
        images = [torch.stack(view) for view in zip(*images, strict=True)]
        return torch.tensor(numbers), images, dict(collections.ChainMap(*said))


class Plain(Dataset):
    """Images of a folder without augmentation, for the probes; a broken one is black, has no label and keeps its place."""

    def __init__(self, files, size, interpolation):
        self.files, self.size, self.interpolation = files, size, interpolation

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        said = {}
        try:
            image, label = self.files.read(index, said)
        except OSError as error:
            said[index] = str(error)
            return -1, [torch.zeros(3, self.size, self.size, dtype=torch.uint8)], said
        return label, [fit(image, self.size, self.interpolation)], said


def batches(data, preprocess, batch_size=512, device="cpu", workers=0, indices=None):
    """Plain images in order: yields (x normalised [b, 3, S, S] on the device, labels [b] on the CPU, -1 for none). Files that do
    not decode are black, are named, and above 1 % end the program, as in training."""
    size, interpolation = preprocess["size"], preprocess["interpolation"]
    indices = torch.arange(len(data)) if indices is None else indices
    if isinstance(data, Images):
        for index in indices.split(batch_size):
            x = fit(data.images[index.to(data.images.device)].to(device), size, interpolation)
            labels = torch.full((len(index),), -1) if data.labels is None else data.labels[index]
            yield normalise(x.float() / 255, preprocess["mean"], preprocess["std"]), labels
        return
    check_shared_memory(workers, min(batch_size, len(indices)) * 3 * size**2)
    plain = Subset(Plain(data, size, interpolation), indices.tolist())
    pin = torch.device(device).type == "cuda"
    loader = DataLoader(
        plain, batch_size, collate_fn=Crops.collate, num_workers=workers, pin_memory=pin, worker_init_fn=outlive_signals
    )
    for labels, (x,), said in loader:
        data.report(said, "a black one without a label takes its place")
        x = x.to(device, non_blocking=True).float().div_(255)
        yield normalise(x, preprocess["mean"], preprocess["std"]), labels


# ============ pictures and checks ============


def picture(batches_, views, n=8):
    """The first `n` images of each batch, one row per batch, normalisation undone: float [3, H, W] in [0, 1]. Views of
    different sizes are enlarged to the largest."""
    size, rows = max(v["size"] for v in views), []
    for x, v in zip(batches_, views, strict=True):
        mean, std = (torch.tensor(v[k], device=x.device).view(3, 1, 1) for k in ("mean", "std"))
        rows.append(F.interpolate(x[:n].float() * std + mean, (size, size), mode="nearest"))
    return make_grid(torch.cat(rows).clamp(0, 1).cpu(), nrow=n, padding=2, pad_value=1)


def tiles(x, n):
    """The k pictures of each of n images, [n * k, 3, s, s], as one square each: [n, 3, S, S]."""
    k = len(x) // n
    return x if k == 1 else torch.stack([make_grid(part, math.ceil(k**0.5), pad_value=1) for part in x.chunk(n)])


def views_of(script, flags):
    """The views that a method's script asks a Loader for."""
    if hasattr(script, "views_of"):
        return script.views_of(flags)
    recipe = script.recipe_of(flags.recipe, flags.v) if hasattr(script, "recipe_of") else script.RECIPES[flags.recipe]
    views = recipe["views"]
    if script.METHOD == "swav":
        views = script.multi_crop(views, flags.small_crops, flags.small_size, flags.min_scale)
    if script.METHOD == "instdisc":
        views = [script.augmented(v, flags.augment) | {"paste": flags.copy_paste, "blend": flags.blend} for v in views]
    views = [view(**{"size": flags.size, **v}) for v in views]
    if script.METHOD == "pirl":
        jigsaw = flags.transform == "jigsaw"
        views[1] = (views[1] | {"size": 3 * script.puzzle_grid(flags.size)[0]} if jigsaw else views[0]) | script.UNCOLOURED
    return views


def seen(script, flags, xs, views, g):
    """What a method's network sees of the batches `xs` of views, {caption: [N, 3, s, s] in [0, 1]}: the views, or what the
    script makes of them."""
    rgb = lambda x, v: x * torch.tensor(v["std"]).view(3, 1, 1) + torch.tensor(v["mean"]).view(3, 1, 1)
    rows, n, x = {f"view {i}": rgb(x, v) for i, (x, v) in enumerate(zip(xs, views, strict=True), 1)}, len(xs[0]), xs[0]
    f = types.SimpleNamespace(dim=1, channels=1)  # in the place of a backbone
    if script.METHOD == "cmc":
        (convert, mean, std), groups = importlib.import_module("backbones").SPLITS[flags.split]
        names = iter(("Y", "Db", "Dr") if flags.split == "ydbdr" else ("L", "a", "b"))
        for j, group in enumerate(normalise(convert(x), mean, std).split(groups, 1), 1):
            rows |= {f"V{j}: {next(names)}": (c / 2 + 0.5).expand(-1, 3, -1, -1) for c in group.split(1, 1)}
    elif script.METHOD == "cpc":
        rows["patches"] = tiles(script.CPC(f, flags).patches(x, (flags.seed,)) / 2 + 0.5, n)
    elif script.METHOD == "pirl":
        head = script.Jigsaw(1, 1, flags.size) if flags.transform == "jigsaw" else script.Rotation(1, 1)
        parts = head.transform(xs[1], *head.draw(n, g)).flatten(0, 1)
        rows = {"I": rows["view 1"], "I^t": tiles(rgb(augment(parts, views[0], g), views[0]), n)}
    elif script.METHOD == "pretext":
        prior = [torch.ones(len(script.ab_bins()))] if flags.task == "colorization" else []
        task = script.TASKS[flags.task](f, flags, *prior)
        x = task.inputs(xs, *task.draw(n, g))
        x = x / (4 if task.sees.get("standardise") else 2) + 0.5  # +- two standard deviations, or [-1, 1]
        rows = {"view": rows["view 1"], flags.task: tiles(x, n)}
    return rows


def show(args, rest):
    folder = Path(__file__).parent
    methods = sorted(path.stem for path in folder.glob("*.py") if "\nRECIPES = " in path.read_text())
    if args.method not in methods:
        fail(f"--method {args.method}: it must be one of {', '.join(methods)}")
    script, pictures, runs = (importlib.import_module(name) for name in (args.method, "analysis.pictures", "runs"))
    flags = script.parse_args(["--data", args.data, *rest])
    at_least(1, args, "n", most=64)
    at_least(8, flags, "size", most=1024)
    dataset, views = load(flags.data, flags.root, limit=flags.limit, seed=flags.seed), views_of(script, flags)
    n = min(args.n, len(dataset))
    masks = script.objects(flags, dataset, "cpu", print) if views[0]["paste"] else ()
    index, xs = next(Loader(dataset, views, n, flags.seed, 0, 1, 0, "cpu", *masks).epoch(0))
    plain, _ = next(batches(dataset, view(flags.size, mean=(0, 0, 0), std=(1, 1, 1)), n, indices=index))
    rows = {"image": plain, **seen(script, flags, xs, views, generator(flags.seed, "show"))}
    if dataset.masks is not None:
        rows["mask"] = tvf.resize(dataset.masks[index][:, None].float(), [flags.size] * 2).expand(-1, 3, -1, -1)
    picture = pictures.draw_rows([(name, 2 * x.clamp(0, 1) - 1, None, None) for name, x in rows.items()])
    runs.write_picture(args.out, picture)
    print(f"{args.out}: {n} images of {dataset.name} and what the network of {args.method}.py sees: {', '.join(rows)}")


def check(args):
    if not os.path.isdir(args.folder):
        fail(f"{args.folder}: no such folder")
    items, _ = list_folder(args.folder)
    if not items:
        fail(f"no images in {args.folder} (looked for {' '.join(sorted(SUFFIXES))})")
    files = Files(args.folder, items)

    def problem(i):
        said = {}
        try:
            files.read(i, said)
        except OSError as error:
            said[i] = str(error)
        return said

    with ThreadPoolExecutor() as pool:  # decoders let go of Python's lock
        found = list(tqdm(pool.map(problem, range(len(files))), "check", len(files), disable=None))
    bad = [sentence for said in found for key, sentence in said.items() if key != WARNING]
    odd = [said[WARNING] for said in found if WARNING in said]
    for sentence in bad + odd:
        print(sentence)
    print(f"{len(files)} images, {len(bad)} do not decode" + (f", {len(odd)} are of 16 bits but flat" if odd else ""))
    return 1 if bad else 0


def main(argv=None):
    print_any_name()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(required=True)
    s = commands.add_parser(
        "show", help="write a PNG of images and of what a network sees of them", allow_abbrev=False,
        epilog="All other flags are the script's: --recipe, --size, --seed, --root; of pretext.py --task, of cmc.py --split, ...",
    )  # fmt: skip
    s.add_argument("data", help=f"a folder, or one of {', '.join(NAMES)}")
    s.add_argument("--method", default="byol", help="the script whose views to show")
    s.add_argument("--n", type=int, default=10, help="how many images")
    s.add_argument("--out", default="show.png", help="the file to write")
    s.set_defaults(run=show)
    c = commands.add_parser(
        "check", help="list the images of a folder that do not decode; exit code 1 if there are any"
    )
    c.add_argument("folder")
    c.set_defaults(run=check)
    args, rest = p.parse_known_args(argv)
    if args.run is show:
        return show(args, rest)
    return check(args) if not rest else p.error(f"unrecognized arguments: {' '.join(rest)}")


if __name__ == "__main__":
    import data  # the scripts import this file, too: its classes must be the same

    raise SystemExit(data.main())
