"""What every method script does around its method. Scripts call this file; it calls no script, computes no loss and steps no
optimiser. Whoever skips it still understands the paper."""

import os
import sys

import common
import data

# Of the settings of a run those that may differ when it goes on.
SAME_RESULT = ("out", "root", "workers", "eval_every", "log_every", "device", "fresh", "dry_run", "probes", "study", "classifier",
               "changed_data", "given", "why")  # fmt: skip


def parse(p, method, argv):
    """The arguments of `p`; a folder's recipe is sized by its images. Bad values of the common flags end the program."""
    args = p.parse_args(argv)
    common.at_least(8, args, "size", most=4096)
    common.at_least(1, args, "epochs", "batch_size", "accumulate", "log_every")
    common.at_least(0, args, "limit", "workers", "eval_every", "lr", "weight_decay", "warmup_epochs")
    common.at_least(0, args, "seed", most=2**62)
    # os.path and not Path: a link that leads to itself is no error here, and a name need not be UTF-8.
    name = os.path.basename(os.path.realpath(args.data)).encode(errors="backslashreplace").decode()
    args.out = args.out or f"runs/{method}-{name}"
    words = sys.argv[1:] if argv is None else argv
    args.given = {word.split("=")[0][2:].replace("-", "_") for word in words if word.startswith("--")}  # by hand
    if "workers" not in args.given:
        args.workers = min(args.workers, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    args.why = "as asked for" if "recipe" in args.given else "by --data"
    if args.recipe == "folder" and (images := data.count(args.data)):
        size_folder(args, images)
    return args


# The recipe of a folder of photographs, for a laptop or one GPU; scripts add what their method needs. Sized by `size_folder`.
FOLDER = dict(arch="resnet10_32", size=96, epochs=100, batch_size=64, optimizer="adamw", lr=4e-3, weight_decay=1e-4,
              warmup_epochs=1.0, eval_every=10)  # fmt: skip
SEEN, LARGE = 200_000, 20_000  # images to see in a run, at least 20 times each; how many are for a larger network and batch


def size_folder(args, images):
    """What was not given by hand is set for the number of images: epochs, and of LARGE images ResNet-18 and a batch of 256."""
    sized = {"epochs": min(200, max(20, round(SEEN / images)))}
    if images >= LARGE:
        sized |= {"arch": args.arch.replace("resnet10_32", "resnet18"), "batch_size": 256}
    for name in sized.keys() - args.given:
        setattr(args, name, sized[name])
    args.why += f", sized for {images} images; the paper's: --recipe imagenet"


def lower(args, name, most, images):
    """A default that is more than the training `images` allow becomes `most`; a number given by hand is refused."""
    if (value := getattr(args, name)) <= most:
        return
    flag = f"--{name.replace('_', '-')}"
    if name in args.given or most < 1:
        common.fail(f"{flag} {value}: with the {images} training images of {args.data} it must be at most {most}")
    setattr(args, name, most)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{flag} {most} instead of the recipe's {value}: {args.data} has {images} training images")


def images_per_pass(args, world, images):
    """The share of --batch-size that one process sees at a time."""
    parts = world * args.accumulate
    lower(args, "batch_size", images // parts * parts, images)
    if args.batch_size % parts:
        common.fail(f"--batch-size {args.batch_size} is not a multiple of {world} processes x --accumulate {args.accumulate}")
    if args.batch_size // parts < 2:
        common.fail(f"--batch-size {args.batch_size} leaves one image a pass, and BatchNorm needs two")
    return args.batch_size // parts


