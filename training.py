"""What every method script does around its method. Scripts call this file; it calls no script, computes no loss and steps no
optimiser. Whoever skips it still understands the paper."""

import argparse
import os
import sys

import backbones
import common
import data
import evaluate
import runs

# Of the settings of a run those that may differ when it goes on.
SAME_RESULT = ("out", "root", "workers", "eval_every", "log_every", "device", "fresh", "dry_run", "probes", "study", "classifier",
               "changed_data", "given", "why")  # fmt: skip


def flags(method, doc, recipes, argv, *early, dataset=lambda known: "shapes", **how):
    """(a parser with the flags that every method has, and those that decide the defaults of others: data, recipe and `early`,
    a flag by its names and, in `how`, what argparse needs of it). `dataset`: the default of --data."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--data")
    first.add_argument("--recipe", choices=recipes)
    if early:
        first.add_argument(*early, **how)
    known = first.parse_known_args(argv)[0]
    known.data = known.data or dataset(known)
    known.recipe = known.recipe or data.recipe_for(known.data, recipes)

    p = argparse.ArgumentParser(
        usage=f"python {method}.py [flags]   (torchrun --standalone --nproc_per_node=N {method}.py [flags])", allow_abbrev=False,
        description=doc, formatter_class=common.Help,
    )  # fmt: skip
    # run and data
    p.add_argument("--data", default=known.data, help=f"a folder of images, or one of {', '.join(data.NAMES)}")
    p.add_argument("--recipe", default=known.recipe, choices=recipes, help="preset of hyper-parameters (default: by --data)")
    p.add_argument("--root", default="datasets", help="where named sets live; they are downloaded into it")
    p.add_argument("--in-memory", action="store_true", help="decode a folder of equally sized small images once")
    p.add_argument("--limit", type=int, default=0, help="use N training images (0: all)")
    p.add_argument("--workers", type=int, default=4, help="decoding processes per process, for folders")
    p.add_argument("--out", help="run folder (default: runs/METHOD-DATA)")
    p.add_argument("--fresh", action="store_true", help="delete the run in --out and start over")
    p.add_argument("--changed-data", action="store_true", help="go on though the training images are not those of the start")
    p.add_argument("--dry-run", action="store_true", help="print the recipe and stop")
    p.add_argument("--seed", type=int, default=0, help="of initial weights, order and augmentation")
    p.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: cuda, else mps, else cpu")
    p.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bf16 autocast (default: where it is fast)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the networks")
    p.add_argument("--log-every", type=int, default=10, help="steps between log lines; each waits for the device")
    p.add_argument("--eval-every", type=int, help="epochs between k-NN probes (0: only at the end)")
    p.add_argument("--probes", nargs="*", default=["knn", "linear"], choices=evaluate.PROBES, help="probes at the end")
    # optimisation
    p.add_argument("--arch", help=f"backbone f: {', '.join(backbones.NAMES)}")
    p.add_argument("--size", type=int, help="px of the views")
    p.add_argument("--epochs", type=int, help="passes over the data; the cosines stretch with it")
    p.add_argument("--batch-size", type=int, help="TOTAL images per update, over all processes and --accumulate")
    p.add_argument("--accumulate", type=int, default=1, help="backward passes per update; BatchNorm sees the smaller batch")
    p.add_argument("--optimizer", choices=("lars", "sgd", "adamw"), help="each needs a learning rate of its own")
    p.add_argument("--lr", type=float, help="base learning rate; the recipe line shows how it is scaled")
    p.add_argument("--weight-decay", type=float, help="the recipe line counts the tensors that it is on")
    p.add_argument("--warmup-epochs", type=float, help="of the learning rate, linear from 0")
    return p, known


def name_of(dataset):
    """Of a set, or of a folder: by os.path, for which a link that leads to itself is no error; a name need not be UTF-8."""
    return os.path.basename(os.path.realpath(dataset)).encode(errors="backslashreplace").decode()


def parse(p, method, recipe, argv):
    """The arguments of `p` with the values of `recipe` as defaults; a folder's are sized by its images. Bad values of the
    common flags end the program."""
    p.set_defaults(**{k: v for k, v in recipe.items() if k != "views"})
    args = p.parse_args(argv)
    common.at_least(8, args, "size", most=4096)
    common.at_least(1, args, "epochs", "batch_size", "accumulate", "log_every")
    common.at_least(0, args, "limit", "workers", "eval_every", "warmup_epochs")
    common.at_least(0, args, "lr", "weight_decay", most=1e30)  # more is no fp32 number
    common.at_least(0, args, "seed", most=2**62)
    args.out = args.out or f"runs/{method}-{name_of(args.data)}"
    words = sys.argv[1:] if argv is None else argv
    args.given = {word.split("=")[0][2:].replace("-", "_") for word in words if word.startswith("--")}  # by hand
    if "workers" not in args.given:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        args.workers = min(args.workers, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    args.why = "as asked for" if "recipe" in args.given else "by --data"
    if args.recipe == "folder" and (images := data.count(args.data)):
        size_folder(args, min(images, args.limit or images))
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
    if common.first_rank():
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




def resume(args, method, views, train, states, total):
    """Load the run in --out into `states`, as `runs.resume` does, and say so: (the settings that it must agree with, the updates
    made, whether it is finished). Every process must call it."""
    settings = {k: v for k, v in vars(args).items() if k not in SAME_RESULT} | {"views": views}
    settings |= {"images": len(train), "contents": train.contents()}
    step, result = runs.resume(args.out, method, settings, states, args.fresh, args.changed_data)
    if common.first_rank() and result:
        print(f"{args.out} is finished; --fresh starts over\n{result}")
    elif common.first_rank() and step:
        print(f"{args.out}: going on from step {step} of {total}")
    return settings, step, bool(result)
