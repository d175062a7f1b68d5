"""Named sets and folders of images: what they hold, how a file is decoded, subsets, shares of their labels, masks.

A set is in memory (`Images`, small ones: one uint8 tensor on the training device) or read image by image (`Files`). Both
have: len(), name, classes (names, or None), `masks` ([N, H, W] uint8, or None), and key(i), the name of image i: its path
below the set's folder without the suffix, or its number in the set. Also fingerprint(), a string that changes with the
data, for the caches of features and masks; and contents(), for resume: the same wherever the set lies.
"""

import collections
import contextlib
import difflib
import functools
import glob
import hashlib
import importlib.util
import math
import os
import stat
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Subset
from torchvision import datasets
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as tvf
from tqdm import tqdm

import shapes
from common import fail, first_rank

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

    masks, channels = None, 3  # masks of the set, and channels of what read() gives

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
    """What a script trains on and is probed by, as its flags say: (all images to train on, labelled training images, test)."""
    settings = device, args.limit, args.seed, args.in_memory
    return tuple(load(args.data, args.root, split, *settings) for split in ("pretrain", "train", "test"))


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
