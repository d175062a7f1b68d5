"""What every method script does around its method: flags, the run, the recipe line. Scripts call this file; it never
calls a script, computes a loss or steps an optimizer. Whoever skips it still understands the papers."""

import argparse
import contextlib
import os
import sys
from pathlib import Path

import backbones
import common
import data
import evaluate
import loop
import memory
import optim
import runs
import sets


def flags(method, doc, recipes, argv, early=None, dataset=lambda known: "shapes"):
    """(a parser with the flags of every method, the parsed flags that decide defaults of others: --data, --recipe and
    `early`, another flag as (its names, its keywords)). `dataset(known)`: the default of --data."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--data")
    first.add_argument("--recipe", choices=recipes)
    if early:
        first.add_argument(*early[0], **early[1])
    known = first.parse_known_args(argv)[0]
    known.data = known.data or dataset(known)
    known.recipe = known.recipe or sets.recipe_for(known.data, recipes)

    p = argparse.ArgumentParser(
        usage=f"python {method}.py [flags]   (torchrun --standalone --nproc_per_node=N {method}.py [flags])",
        allow_abbrev=False, description=doc, formatter_class=common.Help,
    )  # fmt: skip
    # run and data
    p.add_argument("--data", default=known.data, help=f"a folder of images, or one of {', '.join(sets.NAMES)}")
    p.add_argument("--recipe", default=known.recipe, choices=recipes, help="preset of hyper-parameters, by --data")
    p.add_argument("--root", default="datasets", help="where named sets live; they are downloaded into it")
    p.add_argument("--in-memory", action="store_true", help="decode a folder of equally sized small images once")
    p.add_argument("--limit", type=int, default=0, help="use N training images (0: all)")
    p.add_argument("--workers", type=int, default=common.default_workers(), help="per rank, for folders")
    p.add_argument("--out", help="run folder (default: runs/METHOD-DATA)")
    p.add_argument("--fresh", action="store_true", help="delete the run in --out and start over")
    p.add_argument("--changed-data", action="store_true", help="go on although the training images have changed")
    p.add_argument("--dry-run", action="store_true", help="print the recipe and stop")
    p.add_argument("--seed", type=int, default=0, help="of initial weights, order and augmentation")
    p.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: cuda, else mps, else cpu")
    p.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bf16 autocast (default: where it is fast)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the networks")
    p.add_argument("--log-every", type=int, default=10, help="steps between log lines; each waits for the device")
    p.add_argument("--eval-every", type=int, help="epochs between k-NN probes (0: at start and end alone)")
    p.add_argument("--probes", nargs="*", default=["knn", "linear"], choices=evaluate.PROBES, help="probes at the end")
    # optimization
    p.add_argument("--arch", help=f"backbone f: {', '.join(backbones.NAMES)}")
    p.add_argument("--size", type=int, help="px of the views")
    p.add_argument("--epochs", type=int, help="passes over the data; the cosines stretch with it")
    p.add_argument("--batch-size", type=int, help="TOTAL images per update, over all ranks and --accumulate")
    p.add_argument("--accumulate", type=int, default=1, help="passes per update; BatchNorm sees the smaller batch")
    p.add_argument("--optimizer", choices=optim.OPTIMIZERS, help="each needs a learning rate of its own")
    p.add_argument("--lr", type=float, help="base learning rate; the recipe line shows how it is scaled")
    p.add_argument("--weight-decay", type=float, help="on weights, not on biases and norms, unless the paper differs")
    p.add_argument("--warmup-epochs", type=float, help="of the learning rate, linear from 0")
    return p, known


def name_of(dataset):
    """The name of a set or folder for --out."""
    return os.path.basename(os.path.realpath(dataset))


def parse(p, method, recipe, argv):
    """Parse and check the common flags, with the values of `recipe` as defaults (for a folder: scaled to its size)."""
    p.set_defaults(**{k: v for k, v in recipe.items() if k != "views"})
    args = p.parse_args(argv)
    common.at_least(8, args, "size", most=4096)
    common.at_least(1, args, "epochs", "batch_size", "accumulate", "log_every")
    common.at_least(0, args, "limit", "workers", "eval_every", "warmup_epochs", "lr", "weight_decay")
    common.at_least(0, args, "seed", most=2**62)
    args.out = args.out or f"runs/{method}-{name_of(args.data)}"
    words = sys.argv[1:] if argv is None else argv  # what is given on the command line
    args.given = {word.split("=")[0][2:].replace("-", "_") for word in words if word.startswith("--")}
    args.why = "as asked for" if "recipe" in args.given else "by --data"
    if args.recipe == "folder" and (images := sets.count(args.data)):
        size_folder(args, min(images, args.limit or images))
    return args


# The preset for a folder of photographs, for a laptop or one GPU; scripts add what their method needs.
FOLDER = dict(arch="resnet10_32", size=96, epochs=100, batch_size=64, optimizer="adamw", lr=4e-3, weight_decay=1e-4,
              warmup_epochs=1.0, eval_every=10)  # fmt: skip


def size_folder(args, images):
    """Set epochs, network and batch size for a folder of so many images, except where given on the command line."""
    sized = {"epochs": min(200, max(20, round(200_000 / images)))}  # 200,000 images are seen, each 20 to 200 times
    if images >= 20_000:
        sized |= {"arch": args.arch.replace("resnet10_32", "resnet18"), "batch_size": 256}
    for name in sized.keys() - args.given:
        setattr(args, name, sized[name])
    args.why += f", sized for {images} images; the paper's: --recipe imagenet"


def lower(args, name, most, images):
    """Lower a default that is too large for the number of training `images` to `most`; refuse a value given by hand."""
    if (value := getattr(args, name)) <= most:
        return
    flag = f"--{name.replace('_', '-')}"
    if name in args.given or most < 1:
        common.fail(f"{flag} {value}: with the {images} training images of {args.data} it must be at most {most}")
    setattr(args, name, most)
    if common.rank() == 0:
        print(f"{flag} {most} instead of the recipe's {value}: {args.data} has {images} training images")


def images_per_pass(args, world, images):
    """The images per forward pass and rank: --batch-size / (world x --accumulate)."""
    parts = world * args.accumulate
    lower(args, "batch_size", images // parts * parts, images)
    if args.batch_size % parts:
        common.fail(f"--batch-size {args.batch_size} is not a multiple of {world} ranks x {args.accumulate} passes")
    if args.batch_size // parts < 2:
        common.fail(f"--batch-size {args.batch_size} leaves one image a pass, and BatchNorm needs two")
    return args.batch_size // parts


# ============ a run ============


class Run(loop.Loop):
    """The Loop of a method script, with recipe, views, probes and backbone.pt.

    method           name of the script; with `title` (default: the same) for the recipe and the result line
    optimizers       {name in checkpoint.pt: optimizer}
    labelled, test   the sets that the probes train on and classify
    backbone         what the probes see of the model (default: model.f)
    arch, built_for  name and image size in px that build the exported model.f again (default: --arch, --size)
    """

    def __init__(self, method, args, model, optimizers, loader, views, preprocess, labelled, test, device, *,
                 title=None, backbone=None, arch=None, built_for=None):  # fmt: skip
        super().__init__(method, args, {"model": model, **optimizers}, loader, accumulate=args.accumulate)
        self.title, self.model, self.device = title or method, model, device
        self.backbone, self.arch, self.built_for = backbone or model.f, arch or args.arch, built_for or args.size
        self.views, self.preprocess = views, preprocess
        self.probed = labelled, test, preprocess, device  # what every probe takes
        self.warmup = min(round(args.warmup_epochs * self.steps), self.total // 2)  # at most half of a short run

    def describe(self, *lines, **forward):
        """Print what is going to be trained: what all methods have in common, then the method's own `lines`, then what
        memory it needs; `forward`: how `memory.bytes_kept` calls the model, where views are not all that it takes."""
        a, train, size = self.args, self.loader.data, self.views[0]["size"]
        recipe, precision = f"recipe {a.recipe} ({a.why}), seed {a.seed}", "bf16" if a.amp else "fp32"
        parts = f"{self.world} {self.device.type} x {a.accumulate} x {self.loader.batch_size}"
        self.say(f"{self.title} on {train.name}: {len(train)} images at {size} px, {recipe}")
        self.say(backbones.describe(self.model.f, self.arch))
        self.say(f"batch {a.batch_size} = {parts}; {a.epochs} epochs x {self.steps} steps; {precision}")
        if isinstance(train, sets.Files) and not a.dry_run and self.rank == 0:
            self.say(f"loader: at most {self.loader.decodes():,.0f} images/s with --workers {a.workers}, measured here")
        self.say("\n".join(lines))
        if self.rank == 0 and (a.dry_run or self.device.type == "cuda"):
            memory.check(self, **forward)

    def begin(self):
        """The loop's, which remembers the views, too. Collective."""
        return super().begin(views=self.views)

    def probe_is_due(self):
        """At step 0, where it measures the random init, and every --eval-every epochs."""
        every = self.args.eval_every * self.steps
        return self.step == 0 or (every > 0 and self.step % every == 0)

    def probe(self, head=None, **more):
        """Log k-NN and health of the backbone (and k-NN of `head` on top of it) with the method's own numbers `more`.
        Collective."""
        a, epoch = self.args, self.step // self.steps
        common.end_at_signals()  # the epoch is saved
        numbers = evaluate.monitor(self.backbone, *self.probed, a.workers, a.amp, head) | more
        self.caught = common.catch_signals()
        self.log.record("eval", self.step, epoch=epoch, **numbers)
        self.log.say(f"epoch {epoch:4d}  " + "  ".join(f"{k} {v:.2f}" for k, v in numbers.items()))

    def passes(self, ddp, picture=True):
        """The --accumulate passes of an update: yields (key, index, views). `key` = (step, number of the pass from 1)
        is what a method's random numbers depend on. Gradients are all-reduced in the last pass."""
        last = self.accumulate
        for micro in range(1, last + 1):
            index, xs = next(self.batches)
            if picture and (self.step, micro) == (0, 1):
                self.log.image("views", data.picture(xs, self.views))
            with contextlib.nullcontext() if micro == last or self.world == 1 else ddp.no_sync():
                yield (self.step, micro), index, xs

    def write(self, result):
        """The loop's, and backbone.pt. Collective."""
        super().write(result)
        if self.rank == 0:
            weights = {k: v.cpu() for k, v in self.model.f.state_dict().items()}
            about = {"method": self.method, "data": self.args.data, "command": self.command}
            about |= {"epoch": self.step // self.steps, "arch": self.arch, "built_for": self.built_for}
            about |= {"preprocess": self.preprocess, "state_dict": weights}
            runs.write(Path(self.args.out, "backbone.pt"), about)

    def finish(self, note="", **more):
        """The final probes, with the method's own results `more` for evaluate.json and a `note` on the result line;
        then the last checkpoint. Collective."""
        result = evaluate.final_probes(self.backbone, *self.probed, self.args, self.log, self.title, self.step)
        if self.rank == 0 and more:
            evaluate.write_json(self.log.out, self.args.data, more)
        self.save(result and result + note)
        lines = backbones.loading_lines(self.arch, self.built_for, self.log.out / "backbone.pt", self.preprocess)
        self.say(f"load the backbone:\n{lines}\n{result}{note}")
