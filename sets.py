"""Named sets and folders of images: what they hold, how a file is decoded, subsets, shares of their labels, masks.

A set is in memory (`Images`: small ones, as one uint8 tensor on the training device) or read image by image (`Files`).
Both have len(), name, classes (names, or None), masks ([N, H, W] uint8, or None), and key(i), the name of image i: its
path below the set's folder without the suffix, or its number. contents() is a hash for resume, the same wherever the
set lies; fingerprint(), for caches of features and masks, also changes when a file is written.
"""

import collections
import contextlib
import difflib
import functools
import hashlib
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torchvision import datasets
from torchvision.transforms.v2 import functional as tvf
from tqdm import tqdm

import shapes
from common import fail, in_turn, rank

TURNS = False  # whether decode_image turns images by their EXIF orientation, as nothing else here does
try:
    from torchvision.io import decode_image
except ImportError:  # torchvision will lose it to torchcodec
    try:
        from torchcodec.decoders import decode_image

        TURNS = True
    except (ImportError, OSError, RuntimeError):  # the last two: of its shared libraries
        decode_image = None

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif"}
# name: (class, arguments of the training split, of the test split, of all that may be trained on). Of two training
# splits the second is the official validation part.
TORCHVISION = {
    "cifar10": (datasets.CIFAR10, {"train": True}, {"train": False}),
    "cifar100": (datasets.CIFAR100, {"train": True}, {"train": False}),
    "stl10": (datasets.STL10, {"split": "train"}, {"split": "test"}, {"split": "train+unlabeled"}),
    "imagenet": (datasets.ImageNet, {"split": "train"}, {"split": "val"}),
    "places365": (datasets.Places365, {"split": "train-standard", "small": True}, {"split": "val", "small": True}),
    "food101": (datasets.Food101, {"split": "train"}, {"split": "test"}),
    "flowers102": (datasets.Flowers102, [{"split": "train"}, {"split": "val"}], {"split": "test"}),
    "pets": (datasets.OxfordIIITPet, {"split": "trainval"}, {"split": "test"}),
    "dtd": (datasets.DTD, [{"split": "train"}, {"split": "val"}], {"split": "test"}),
    "aircraft": (datasets.FGVCAircraft, [{"split": "train"}, {"split": "val"}], {"split": "test"}),
    "cars": (datasets.StanfordCars, {"split": "train"}, {"split": "test"}),
    "svhn": (datasets.SVHN, {"split": "train"}, {"split": "test"}),
    "sun397": (datasets.SUN397, {}, {}),  # see `of_sun397`, `of_caltech101`
    "caltech101": (datasets.Caltech101, {}, {}),
}
IN_MEMORY = ("cifar10", "cifar100", "stl10", "svhn")
DRAWN = ("shapes", "shapes-hard", "shapes-natural")
NAMES = [*DRAWN, *TORCHVISION]
LIKE = dict(cifar10="cifar10", cifar100="cifar10", svhn="cifar10", imagenet="imagenet", places365="imagenet")
LIKE |= dict.fromkeys(DRAWN, "shapes")
LARGE = 200_000  # images from which on a folder gets the recipe of the paper
ORIENTATION = 274  # the tag of EXIF
# Pillow refuses an image of more than 178,956,970 pixels by its header; of more than half as many it would only warn.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", "The image decoding and encoding", DeprecationWarning)  # torchvision's, of each image


def recipe_for(name, recipes):
    """The one of `recipes` whose numbers fit a set: that of the set most like it, or the first that there is."""
    alike = LIKE.get(name) or ("imagenet" if count(name) > LARGE else "folder")
    return alike if alike in recipes else next(iter(recipes))


def count(name):
    """How many training images a folder has, 0 for all else."""
    return len(list_folder(training_part(name))[0]) if name not in NAMES and os.path.isdir(name) else 0


def generator(*key):
    """A CPU generator whose stream depends on every number of `key` and on nothing else."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


# ============ data sets ============


class Images:
    """A set in memory: images [N, 3, H, W] uint8 on `device`, labels [N] int64 on the CPU (or None)."""

    validation = 0  # as in Files

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
    """A set read image by image: `items` is a list of (path, label), all below the folder `base`; label -1: none. The
    last `validation` of a training set are the part on which published protocols choose."""

    masks, channels, validation = None, 3, 0  # masks of the set, and channels of what read() gives

    def __init__(self, name, items, classes=None, base="/"):
        self.name, self.items, self.classes, self.base = name, items, classes, base
        self.bad = set()  # places of the images that are known not to decode

    def __len__(self):
        return len(self.items)

    def path(self, i):
        return self.items[i][0]

    def key(self, i):
        return stem(self.path(i), self.base)

    def read(self, i):
        """(uint8 [3, H, W], label) of image i. OSError if it does not decode."""
        path, label = self.items[i]
        return decode(path), label

    def report(self, broken, instead):
        """Print a warning for each image of `broken`, {place: why it does not decode}, that is new, with what is done
        `instead`. More than 1 % of the set, and more than one image, end the program."""
        for i in sorted(broken.keys() - self.bad):
            self.bad.add(i)
            tqdm.write(f"warning: {broken[i]}: it does not decode; {instead} ({len(self.bad)} so far)")
        if len(self.bad) > max(1, len(self) // 100):
            fail(f"{len(self.bad)} of {len(self)} images do not decode, more than 1 %: python data.py check lists them")

    def contents(self):
        """Changes when images are added, removed, renamed, moved between classes or replaced by files of another size
        (at most 10,000 are looked at, as a network disk is slow to tell), not when the folder is moved."""
        base, above = str(self.base), str(Path(self.base).parent)  # a validation part lies beside the base
        names = [path.removeprefix(base).removeprefix(above).lstrip(os.sep) for path, _ in self.items]
        sizes = [size_and_time(path)[0] for path, _ in self.items[:: math.ceil(len(self) / 10_000)]]
        return hashlib.sha1(f"{labels_of(self).tolist()} {names} {sizes}".encode()).hexdigest()

    def fingerprint(self):
        """Changes when contents() does, and when any file is written."""
        times = [size_and_time(path) for path, _ in self.items]
        return hashlib.sha1(f"{self.contents()} {times}".encode()).hexdigest()


def size_and_time(path):
    try:
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns
    except OSError:  # a link that leads nowhere, which counts as an image that does not decode
        return -1, -1


def orientation(image):
    """The EXIF orientation of a Pillow image, 2 to 8, or 0 for one that is upright or damaged."""
    with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
        if (found := image.getexif().get(ORIENTATION)) in range(2, 9):
            return int(found)
    return 0


def decode(path):
    """The image in a file as uint8 [3, H, W], as stored: not turned by EXIF; of an animation the first frame.

    OSError with path and reason for what is no image, has more than 178,956,970 pixels, or would lose something unseen:
    a TIFF of several pages or of more than 3 channels (4 with alpha), more than 8 bits a channel except in a PNG.
    """
    try:
        with Image.open(path) as image:  # reads the header alone
            if image.format == "TIFF":
                pages, channels = image.n_frames, image.tag_v2.get(277, 1)
                if pages > 1 or channels > len(image.getbands()) or image.mode == "RGBX":
                    raise OSError(f"{pages} pages of {channels} channels: only three of the first page would be seen")
            if image.format == "PNG" and image.mode[0] == "I":  # 16 bits, which convert() would clip to white
                return (tvf.pil_to_tensor(image).int() // 257).byte().repeat(3, 1, 1)
            if image.mode[0] in "IF":
                raise OSError("more than 8 bits a channel")
            # By torchvision or torchcodec where they are faster. Not a PNG: torchvision's ends the process at damage.
            fast = decode_image and image.format in ("JPEG", "MPO", "WEBP")
            if fast and not (TURNS and orientation(image)):
                with contextlib.suppress(RuntimeError):  # torchvision's, for an animation
                    if (found := decode_image(str(path), mode="RGB")).ndim == 3:  # torchcodec gives all frames
                        return found
            return tvf.pil_to_tensor(image.convert("RGB"))
    except UnidentifiedImageError:
        raise OSError(f"{path}: no image of a kind that Pillow reads") from None
    except Exception as error:  # decoders raise whatever they like (SyntaxError for a broken PNG)
        raise OSError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def labels_of(data):
    """The labels of a set, int64 [N] on the CPU (-1: none)."""
    if isinstance(data, Files):
        return torch.tensor([label for _, label in data.items], dtype=torch.long)
    return torch.full((len(data),), -1) if data.labels is None else data.labels


# ============ folders ============


@functools.lru_cache(maxsize=8)
def list_folder(folder):
    """All images below `folder`, links followed, as sorted (path, label), and the class names.

    The classes are the first folders on the way down; without at least two of them that hold every image there are none
    (None), and every label is -1.
    """
    folder, paths = str(Path(folder)), []  # of a million files objects of pathlib take minutes
    for base, _, names in os.walk(folder, followlinks=True):
        wanted = (n for n in names if os.path.splitext(n)[1].lower() in SUFFIXES and not n.startswith("."))
        paths += [os.path.join(base, name).removeprefix("./") for name in wanted]
    parts = sorted(path.split(os.sep) for path in paths)
    paths, depth = [os.sep.join(p) for p in parts], len(Path(folder).parts)
    tops = [p[depth] if len(p) > depth + 1 else None for p in parts]
    classes = sorted(set(tops) - {None})
    if None in tops or len(classes) < 2:
        return [(path, -1) for path in paths], None
    number = {c: i for i, c in enumerate(classes)}
    return [(path, number[t]) for path, t in zip(paths, tops, strict=True)], classes


def stem(path, folder):
    """The name of a file: its path below `folder` without the suffix."""
    return Path(os.path.relpath(path, folder)).with_suffix("").as_posix()


def named(folder):
    """{name: path} of the images below `folder`."""
    if not os.path.isdir(folder):
        fail(f"{folder}: no such folder")
    return {stem(path, folder): path for path, _ in list_folder(folder)[0]}


def keys_of(data):
    """The names of all images of a set, each of which must be there once: their masks are files of these names."""
    keys = [data.key(i) for i in range(len(data))]
    key, times = collections.Counter(keys).most_common(1)[0]
    if times > 1:
        fail(f"{times} images of {data.name} have the name {key!r}, so their masks would be one file")
    return keys


def training_part(folder):
    """Where the training images of a folder lie."""
    return Path(folder, "train") if os.path.isdir(Path(folder, "train")) else Path(folder)


def load_folder(folder, split, name):
    """A tree of images as `Files`. `train/` and `test/` or `val/` are used when there; with both, the probes train on
    `val/`, too. With classes but neither, every tenth image is the probes' test set; it is trained on all the same,
    without its label."""
    folder = Path(folder)
    if not os.path.isdir(folder):
        near = difflib.get_close_matches(str(folder), NAMES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"named sets: {', '.join(NAMES)}"
        fail(f"--data {folder}: neither a named set nor a folder; {hint}")
    base = training_part(folder)
    items, classes = list_folder(base)
    held_out = [folder / d for d in ("test", "val") if base != folder and os.path.isdir(folder / d)]
    validation = []
    if split == "test" and held_out:
        base = held_out[0]
        items = of_classes(base, classes)
    elif split == "train" and len(held_out) == 2:
        validation = of_classes(held_out[1], classes)
        items = items + validation
    elif classes and not held_out and split != "pretrain":
        tenth = min(10, len(items))
        items = [item for i, item in enumerate(items) if (i % tenth == tenth - 1) == (split == "test")]
    if not items:
        fail(f"no images in {base} (looked for {' '.join(sorted(SUFFIXES))})")
    files = Files(name or str(folder), items, classes, base)
    files.validation = len(validation)
    return files


def of_classes(folder, classes):
    """The images of a test or validation folder, with the numbers of the training `classes`."""
    (items, own), number = list_folder(folder), {c: i for i, c in enumerate(classes or [])}
    if unknown := sorted(set(own or []) - set(number)):
        fail(f"{folder} has a class that {folder.parent / 'train'} lacks: {unknown[0]!r}")
    return [(path, number.get(stem(path, folder).split("/")[0], -1)) for path, _ in items]


# ============ loading ============


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
    """(all images to train on, labelled training images, test images), as the flags of a script say."""
    settings = device, args.limit, args.seed, args.in_memory
    return tuple(load(args.data, args.root, split, *settings) for split in ("pretrain", "train", "test"))


@functools.lru_cache(maxsize=4)
def _load(name, root, split, device, limit, seed, memory):
    folder = Path(root, name) if name in NAMES else Path(name)
    if name == "imagenet" and not os.path.isdir(folder / "train") and any(Path(root, "train").glob("n*")):
        folder = Path(root)  # as people have it; its classes in order of their folders are ImageNet's
    if name in DRAWN:
        n, list_seed = (2_000, 1) if split == "test" else (10_000, 0)
        images, labels, masks = shapes.draw_shapes(n, 32, list_seed, name == "shapes-hard", name == "shapes-natural")
        data = Images(name, images.to(device), labels, shapes.CLASSES, masks)
    elif name in NAMES and not os.path.isdir(folder / "train"):
        data = from_torchvision(name, root, split, device)
    else:
        data = load_folder(folder, split, name if name in NAMES else None)
    data = subset(data, limit, seed)
    return in_memory(data, device) if isinstance(data, Files) and (memory or name in IN_MEMORY) else data


def first_rank_first(make, name, otherwise):
    """`make()` on rank 0, which may download, then on the others. Collective."""

    def tried():
        try:
            return make()
        except (RuntimeError, OSError, ImportError) as error:  # the last: some labels need scipy
            fail(f"{name} could not be loaded ({str(error).splitlines()[0]}); {otherwise}")

    return in_turn(tried)


def of_sun397(root, split):
    """Split 1 of SUN397, by its official lists."""
    folder, file = Path(root, "SUN397"), {"train": "Training_01.txt", "test": "Testing_01.txt"}[split]
    if not (folder / file).is_file():
        fail(f"sun397: {folder / file} is not there: torchvision's download lacks the official lists (Partitions.zip); "
             f"or lay its images out as {root}/sun397/train/CLASS/* and {root}/sun397/test/CLASS/*")  # fmt: skip
    names = [line.strip().lstrip("/") for line in (folder / file).read_text().splitlines() if line.strip()]
    classes = sorted({name.rpartition("/")[0] for name in names})
    return Files("sun397", [(str(folder / n), classes.index(n.rpartition("/")[0])) for n in names], classes, folder)


def of_caltech101(root, split):
    """Caltech-101: 30 images a class to train on, drawn at random as in the papers, whose lists are not published; the
    background counts as a class (102 in all)."""
    folder = Path(root, "caltech101", "101_ObjectCategories")
    items, classes = list_folder(folder)
    labels = torch.tensor([label for _, label in items])
    order = torch.randperm(len(items), generator=generator("caltech101"))
    train = torch.cat([order[labels[order] == c][:30] for c in range(len(classes))]).tolist()
    rows = sorted(train) if split == "train" else sorted(set(range(len(items))) - set(train))
    return Files("caltech101", [items[i] for i in rows], classes, folder)


def from_torchvision(name, root, split, device):
    """A named set as torchvision reads it."""
    cls, *kwargs = TORCHVISION[name]
    kwargs = kwargs[("train", "test", "pretrain").index(split)]
    if isinstance(kwargs, list):
        parts = [read_torchvision(cls, name, root, part, device) for part in kwargs]
        files = Files(name, [item for part in parts for item in part.items], parts[0].classes, parts[0].base)
        files.validation = len(parts[1])
        return files
    return read_torchvision(cls, name, root, kwargs, device, split)


def read_torchvision(cls, name, root, kwargs, device, split=None):
    """What an object of torchvision's class `cls` holds, downloaded where it can be."""
    if name == "sun397":
        of_sun397(root, split)  # the lists, before 37 GB are fetched
    if name not in ("imagenet", "cars"):  # whose files torchvision cannot fetch
        kwargs = kwargs | {"download": True}
    folders = f"{root}/{name}/train/CLASS/* and {root}/{name}/val/CLASS/*"
    made = first_rank_first(lambda: cls(root, **kwargs), name, f"or lay its images out as {folders}")
    if name in ("sun397", "caltech101"):  # of which torchvision has no splits
        return (of_sun397 if name == "sun397" else of_caltech101)(root, split)
    found = vars(made)  # torchvision has no common names for paths and labels
    classes = found.get("classes", [])
    if name in IN_MEMORY:
        images = torch.from_numpy(made.data)  # of CIFAR [N, H, W, 3]
        images = images.permute(0, 3, 1, 2) if images.shape[-1] == 3 else images
        labels = torch.as_tensor(found.get("targets", found.get("labels"))).long()
        return Images(name, images.contiguous().to(device), labels, classes)
    pairs = found.get("samples") or found.get("imgs") or found.get("_samples")
    pairs = pairs or zip(found.get("_image_files") or found["_images"], found["_labels"], strict=True)
    items = [(str(path), int(label)) for path, label in pairs]
    return Files(name, items, classes, getattr(made, "split_folder", root))


def in_memory(files, device):
    """Decode `files`, which must all have one size, into a set in memory. Those that do not decode are left out."""
    found, broken = {}, {}
    for i in range(len(files)):
        try:
            found[i] = files.read(i)
        except OSError as error:
            broken[i] = str(error)
            continue
        if found[i][0].shape != next(iter(found.values()))[0].shape:
            fail(f"{files.path(i)} has another size than the first image, so they do not fit one tensor in memory")
    files.report(broken, "it is left out")
    images, labels = zip(*found.values(), strict=True)
    labels = torch.tensor(labels) if files.classes else None
    keys = [files.key(i) for i in found]
    made = Images(files.name, torch.stack(images).to(device), labels, files.classes, keys=keys)
    made.validation = sum(i >= len(files) - files.validation for i in found)
    return made


# ============ parts of a set ============


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
        return Files(data.name, [data.items[i] for i in indices.tolist()], data.classes, data.base)
    parts = [None if t is None else t[indices.to(t.device)] for t in (data.images, data.labels, data.masks)]
    return Images(data.name, parts[0], parts[1], data.classes, parts[2], [data.key(i) for i in indices.tolist()])


def share(labels, percent, seed):
    """Sorted indices of `percent` % of the labelled images: of each class, in an order drawn by `seed`, the first
    max(1, round(percent / 100 of them)). So shares are balanced as the set is, and a smaller one lies in a larger."""
    kept = []
    for c in labels[labels >= 0].unique().tolist():
        members = (labels == c).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator(seed, "share", c))
        kept.append(members[order[: max(1, round(percent / 100 * len(members)))]])
    return torch.cat(kept).sort().values if kept else torch.empty(0, dtype=torch.long)


def listed(data, file):
    """Sorted indices of the images that a text file names, one FILE or CLASS/FILE a line, as the official lists of
    ImageNet do. A name that the set lacks or has twice ends the program with exit code 2."""
    if not isinstance(data, Files):
        fail(f"--label-list {file}: the images of {data.name} have no file names; use --labels")
    try:
        names = [line.strip() for line in Path(file).read_text().splitlines() if line.strip()]
    except OSError as error:
        fail(f"--label-list {file}: {error}")
    if not names:
        fail(f"--label-list {file}: it names no image")
    parts = 2 if "/" in names[0] else 1
    keys = ["/".join(Path(path).parts[-parts:]) for path, _ in data.items]
    times = collections.Counter(keys)
    if wrong := next((name for name in names if times[name] != 1), None):
        fail(f"--label-list {file}: {times[wrong]} images of {data.name} are called {wrong!r} (FILE or CLASS/FILE)")
    wanted = set(names)
    return torch.tensor([i for i, key in enumerate(keys) if key in wanted])


def read_masks(folder, data, size=64):
    """The masks of a set's images, FOLDER/KEY.png or another format, resized: uint8 [N, size, size], 255 is the object.
    Up to 1 % of the images may lack one (those that do not decode do): theirs is empty. More end the program."""
    files, keys = named(folder), keys_of(data)
    if missing := [key for key in keys if key not in files]:
        few = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        sentence = f"{len(missing)} of {len(keys)} images of {data.name} have no mask below {folder}: {few}"
        if len(missing) > max(1, len(keys) // 100):
            fail(sentence)
        if rank() == 0:
            print(f"warning: {sentence}", flush=True)
    masks = torch.zeros(len(keys), size, size, dtype=torch.uint8)

    def read(i):
        if keys[i] in files:
            masks[i] = tvf.resize(decode(files[keys[i]])[:1], [size, size], antialias=True)[0]

    try:
        with ThreadPoolExecutor() as pool:  # decoders release Python's lock
            list(tqdm(pool.map(read, range(len(keys))), "masks", len(keys), leave=False, disable=None))
    except OSError as error:
        fail(f"not a mask that can be read: {error}")
    return masks
