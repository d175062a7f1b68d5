"""Which backbone suits which pretext task? The study of "Revisiting Self-Supervised Visual Representation Learning" as one
command: Kolesnikov, Zhai, Beyer 2019, https://arxiv.org/abs/1901.09005.

    python pretext.py --study                                five tasks, four backbones, two widths, `shapes-natural`
    python study.py                                          the same
    python study.py --tasks rotation jigsaw --seeds 0 1 2    a part of it; what is no flag of study.py goes to every run
    python study.py --data cifar10 --jobs 4                  four runs at a time share the GPU, and the CPU's threads
    python study.py --data imagenet --root DIR --processes 8 the paper's networks, each run on eight GPUs
    python study.py --out DIR --show                         the tables and the figure of what is there; runs nothing

A cell of the table is a run of pretext.py in OUT/seedN/TASK-ARCH; what it prints is in OUT/seedN/TASK-ARCH.log. The same
command goes on where it was stopped and skips what is finished; another grid in the same OUT adds to the table. A network
that cannot be (its size, its patches) is a "-" with the reason. At the end it prints table 1, ours and the paper's, and how
far the pretext accuracy tells the downstream one; OUT/study.csv has a line a run, OUT/study.png is figure 4, OUT/study.json
has everything.
"""

import argparse
import csv
import difflib
import importlib
import io
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageColor, ImageDraw

import ablate
import backbones
import common
import data
import evaluate
import runs

# ============ the paper ============
# Table 1: top-1 in per cent on its own validation images, by logistic regression (L-BFGS) on the pre-logits.

TASKS = ("rotation", "exemplar", "relative", "jigsaw", "colorization")  # in the paper's order; it lacks the last
WIDTHS = {"rotation": (4, 8, 12, 16), "exemplar": (4, 8, 12), "relative": (4, 8), "jigsaw": (4, 8)}
TABLE_1 = {
    "revnet50":         (47.3, 50.4, 53.1, 53.7,   42.4, 45.6, 46.4,   40.6, 45.0,   40.1, 43.7),
    "resnet50v2":       (43.8, 47.5, 47.2, 47.6,   43.0, 45.7, 46.6,   42.2, 46.7,   38.4, 41.3),
    "resnet50v1":       (41.7, 43.4, 43.3, 43.2,   42.8, 46.9, 47.7,   46.8, 50.5,   42.2, 45.4),
    "revnet50_minus":   (45.2, 51.0, 52.8, 53.7,   38.0, 42.6, 44.3,   33.8, 43.5,   36.1, 41.5),
    "resnet50v2_minus": (38.6, 44.5, 47.3, 48.2,   33.7, 36.7, 38.2,   38.6, 43.4,   32.5, 34.4),
    "vgg19":            (16.8, 14.6, 16.6, 22.7,   26.4, 28.3, 29.0,   28.5, 29.4,   19.8, 21.1),
}  # fmt: skip
PAPER = {
    (arch, *column): [number]
    for arch, row in TABLE_1.items()
    for column, number in zip([(t, k) for t, ks in WIDTHS.items() for k in ks], row, strict=True)
}

# ============ what is run unless it is said otherwise ============

GRIDS = {  # by recipe: architectures, widths, and flags of every run that differ from the recipe
    "shapes": (("revnet14", "resnet14v2", "resnet14v1", "vgg11"), (0.5, 1),
               {"--epochs": 4, "--limit": 5000, "--batch-size": 32, "--copies": 4, "--eval-every": 0}),
    "cifar10": (("revnet26", "resnet26v2", "resnet26v1", "vgg11"), (1, 2), {}),
    "imagenet": (tuple(TABLE_1), (4, 8), {}),
}
FIGURES = {"knn": "knn 20 weighted", "linear": "linear top1", "lbfgs": "lbfgs top1", "mlp": "mlp top1"}  # in evaluate.json
NAMES = {"knn20": "20-NN, %", "linear": "linear, %", "lbfgs": "linear (L-BFGS), %", "mlp": "MLP, %"}
COLUMNS = ("task", "arch", "family", "width", "seed", "pretext_accuracy", "chance", "knn20", "linear", "lbfgs", "mlp",
           "random_knn20", "seconds", "epochs", "command")  # fmt: skip


def known(flag, names, there):
    for name in names:
        if name not in there:
            near = difflib.get_close_matches(name, there, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(there)}"
            common.fail(f"{flag} {name}: {hint}")


def parse_args(argv):
    p = argparse.ArgumentParser(
        usage="python pretext.py --study [--tasks T ...] [--archs A ...] [--widths K ...] [--seeds N ...] [flags of pretext.py]",
        description=__doc__, formatter_class=common.Help, allow_abbrev=False,
        epilog="\n".join(" ".join(map(str, (f"{name}: --archs", *archs, "--widths", *widths, *itertools.chain(*budget.items()))))
                         for name, (archs, widths, budget) in GRIDS.items()),
    )  # fmt: skip
    p.add_argument("--tasks", nargs="+", default=list(TASKS), help="columns of the table")
    p.add_argument("--archs", nargs="+", help="rows: backbones without their width, as revnet50_minus (default: by recipe)")
    p.add_argument("--widths", type=float, nargs="+", help="widening factors k (default: by recipe)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="every cell with each of them")
    p.add_argument("--figure", default="linear", help=f"what stands in the table: {', '.join(FIGURES)}")
    p.add_argument("--processes", type=int, default=1, help="of each run, started by torchrun")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the CPU's threads")
    p.add_argument("--out", help="folder of all runs (default: runs/study-DATA)")
    p.add_argument("--dry-run", action="store_true", help="list the commands and stop")
    p.add_argument("--show", action="store_true", help="run nothing; show what is in --out")
    own, flags = p.parse_known_args(argv)
    known("--tasks", own.tasks, TASKS)
    known("--figure", [own.figure], FIGURES)
    common.at_least(1, own, "processes", "jobs")
    given = {word.split("=")[0] for word in flags}
    for flag in ("--task", "--arch", "--seed"):
        if flag in given:
            common.fail(f"{flag}: say {flag}s, one or more")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        common.fail("study.py starts the processes itself: say --processes N, and python instead of torchrun")
    if "--data" not in given:  # one set for all tasks, and one that has an answer to rotation's question
        flags = ["--data", "shapes-natural", *flags]
    parse = importlib.import_module("pretext").parse_args
    recipe = parse(["--task", own.tasks[0], *flags]).recipe
    archs, widths, budget = GRIDS[recipe if recipe in GRIDS else "cifar10"]
    budget = [str(word) for pair in budget.items() if pair[0] not in given for word in pair]
    args = parse(["--task", own.tasks[0], *budget, *flags])
    own.archs, own.widths = own.archs or archs, own.widths or widths
    for name in ("tasks", "archs", "widths", "seeds"):  # each once
        setattr(own, name, list(dict.fromkeys(getattr(own, name))))
    own.out = Path(own.out or f"runs/study-{Path(args.data).resolve().name}")
    for family in own.archs:
        if found := re.search(r"_k([\d.]+)", family):
            common.fail(f"--archs {family}: say {family.replace(found[0], '')}, and --widths {found[1]}")
    # Whether the names and widths are right. Whether one fits the px that a task gives it, only its run knows.
    with torch.device("meta"):
        for family, width in itertools.product(own.archs, () if own.show else own.widths):
            backbones.build(arch_name(family, width), 224)
    own.flags = [*budget, *(word for word in flags if word != "--fresh")]
    if own.figure not in (*args.probes, "lbfgs"):  # that, with the study's own penalty, only evaluate.py fits
        own.flags += ["--probes", *args.probes, own.figure]
    return own, args


# ============ cells ============
# A cell is OUT/seedN/TASK-ARCH, the folder of its run. Beside it lie TASK-ARCH.log and TASK-ARCH.json, which has what the
# run does not know: {"command" (once it has ended well), "seconds" (all parts of it), "refused" (why it cannot be)}.


def arch_name(family, width):
    """revnet50_minus and 4: revnet50_k4_minus."""
    return f"{family.removesuffix('_minus')}_k{width:g}" + "_minus" * family.endswith("_minus")


def beside(path, suffix):
    return Path(f"{path}.{suffix}")  # not with_suffix: k may have a point


def note(path):
    return ablate.read_json(beside(path, "json"))


def results(path):
    """What the run in `path` measured on the data that it was trained on; {} unless it is finished."""
    return next((each for each in ablate.read_json(path / "evaluate.json").values() if "pretext" in each), {})


def read(path):
    """The cell in `path` as one row of OUT/study.csv, with None for what is not there; {} if its name is not a cell's."""
    name = rf"seed(-?\d+)/({'|'.join(TASKS)})-(([a-z]+\d\w*)_k([\d.]+)((?:_minus)?))"
    parts = re.fullmatch(name, f"{path.parent.name}/{path.name}")
    if not parts:
        return {}
    seed, task, arch, base, width, minus = parts.groups()
    found, about = results(path), note(path)
    lines = ablate.log_lines(path) if found else []
    row = {"task": task, "arch": arch, "family": base + minus, "width": float(width), "seed": int(seed)}
    row |= {f"{name}20" if name == "knn" else name: ablate.figure(found, where) for name, where in FIGURES.items()}
    row |= {"pretext_accuracy": ablate.figure(found, "pretext accuracy"), "chance": ablate.figure(found, "pretext chance")}
    row |= {"random_knn20": ablate.figure(ablate.at_random(path) if lines else {}, "knn 20 weighted")}
    row |= {"epochs": max((line.get("epoch", 0) for line in lines), default=0) or None}
    row |= {k: about.get(k) if found else None for k in ("seconds", "command")}
    return row | {"refused": None if found else about.get("refused")}


def rank_of_family(family):
    """Families of one kind together, in the paper's order, the deeper ones first."""
    kind = lambda name: re.sub(r"(?<=[a-z])\d+", "", name, count=1)
    kinds = [kind(name) for name in TABLE_1]
    depth = int(re.search(r"\d+", family)[0])
    return kinds.index(kind(family)) if kind(family) in kinds else len(kinds), -depth, family


def gather(out, asked=()):
    """The rows of all cells that are in the folder `out`, and of those asked for, in the order of the table."""
    there = [p.parent for p in out.glob("seed*/*/evaluate.json")]
    there += [p.with_name(p.name.removesuffix(".json")) for p in out.glob("seed*/*.json")]
    rows = filter(None, (read(path) for path in {*there, *asked}))
    order = lambda r: (TASKS.index(r["task"]), rank_of_family(r["family"]), r["width"], r["seed"])
    return sorted(rows, key=order)


# ============ running them ============


class Cell:
    """One run: what it still needs, and the process that does it."""

    env = ()

    def __init__(self, own, args, seed, task, family, width):
        arch = arch_name(family, width)
        self.path, self.name = own.out / f"seed{seed}" / f"{task}-{arch}", f"{task} {arch} seed {seed}"
        words = ["--task", task, "--arch", arch, *own.flags, "--seed", seed, "--out", self.path]
        self.words, self.shown = ablate.command("pretext", words, own.processes)
        # The figure of a run that is finished and ended without it.
        same = ["--root", args.root, "--limit", args.limit, "--workers", args.workers, "--seed", seed]
        same += ["--device", args.device] * bool(args.device) + ["--amp" if args.amp else "--no-amp"] * (args.amp is not None)
        same += ["--penalty", "study"] * (own.figure == "lbfgs")
        self.made_up = ablate.command("evaluate", [self.path, "--data", args.data, "--probe", own.figure, *same])
        self.figure, self.fresh, self.tried = own.figure, args.fresh, False

    def results(self):
        return results(self.path)

    def needs(self):
        """(words, as they are typed) of its next process, or None."""
        found = self.results()
        if self.fresh or not found or note(self.path).get("command") != self.shown:
            return [*self.words, *["--fresh"] * self.fresh], self.shown + " --fresh" * self.fresh
        labels = any(probe in found for probe in evaluate.PROBES)
        # A run that ends with L-BFGS chooses its penalty from a grid; the study's has none.
        lacks = self.figure not in found or (self.figure == "lbfgs" and found["lbfgs"].get("grid"))
        return self.made_up if labels and lacks and not self.tried else None

    def start(self):
        words, self.running = self.needs()
        self.seconds = 0.0 if self.fresh else note(self.path).get("seconds", 0.0)
        self.was_finished, self.began = bool(self.results()) and not self.fresh, time.monotonic()
        print(self.running, flush=True)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(beside(self.path, "log"), "a", errors="surrogateescape") as log:
                log.write(f"{self.running}\n")
                log.flush()
                return ablate.start(words, stdout=log, stderr=subprocess.STDOUT, env=os.environ | dict(self.env))
        except OSError as error:
            common.fail(f"could not write {beside(self.path, 'log')} ({runs.reason(error)})")

    def end(self, code, stopping):
        """Its process has ended: write down what there is to know, and return a sentence if the study ends with it, too."""
        about = note(self.path)
        if not self.was_finished:
            about["seconds"] = round(self.seconds + time.monotonic() - self.began, 1)
        about.pop("refused", None)
        said = beside(self.path, "log").read_text(errors="replace").rpartition(f"{self.running}\n")[2]
        error, failure = re.search(r"^(?:\S+: )?error: (.*)", said, re.MULTILINE), None
        if self.running == self.made_up[1]:
            self.tried = True
        elif not code and self.results():
            about["command"], self.fresh = self.shown, False
        if code and error and not self.path.exists():
            about["refused"] = error[1]  # before it made anything: bad input, which may be this cell's alone
        elif code and not stopping:
            last = error[0] if code == 2 and error else "\n".join(said.splitlines()[-10:])
            failure = f"{last}\nerror: exit code {code} from {self.running}"
        elif not self.results() and not stopping:
            failure = f"error: {self.path} has not come to its end; the same command goes on from there"
        runs.write_text(beside(self.path, "json"), json.dumps(about, indent=1) + "\n")
        return failure

    def summary(self):
        row = read(self.path)
        numbers = ("pretext_accuracy", "chance", "knn20", "linear", "lbfgs", "mlp", "seconds")
        told = ", ".join(f"{name} {row[name]:.1f}" for name in numbers if row[name] is not None)
        return f"{self.name}: " + (f"left out, {row['refused']}" if row["refused"] else told)

    def done(self):
        return self.summary() if note(self.path).get("refused") or not self.needs() else None


def run_all(cells, own, stop):
    """Run what is not finished, own.jobs at a time."""
    todo = [cell for cell in cells if cell.needs()]
    print(f"{len(cells)} cells, {len(cells) - len(todo)} of them finished", flush=True)
    if own.jobs > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = max(1, cores // (own.jobs * own.processes))
        print(f"{own.jobs} runs at a time, {threads} CPU threads each", flush=True)
        for cell in todo:
            cell.env = {"OMP_NUM_THREADS": str(threads)}
    ablate.run_all(todo, stop, own.jobs)


# ============ table 1 ============


def by_cell(rows, column):
    """{(family, task, width): figures of its seeds}, with an empty list for a cell that has none."""
    cells = {}
    for row in rows:
        cells.setdefault((row["family"], row["task"], row["width"]), []).extend([row[column]] * (row[column] is not None))
    return cells


def table(cells):
    """Lines of table 1. A star: the best architecture of a column; an underscore: the best figure of a row, whose task suits
    this architecture best. Neither where there is nothing to be better than."""
    columns = sorted({key[1:] for key in cells}, key=lambda c: (TASKS.index(c[0]), c[1]))
    families = sorted({key[0] for key in cells}, key=rank_of_family)
    mean = {key: statistics.mean(figures) for key, figures in cells.items() if figures}
    words = {}
    for family, column in itertools.product(families, columns):
        key = (family, *column)
        rivals = [m for (f, *c), m in mean.items() if tuple(c) == column]
        tasks = {t: m for (f, t, _), m in sorted(mean.items(), key=lambda item: item[1]) if f == family}  # best of each
        best = key in mean and len(rivals) > 1 and mean[key] == max(rivals)
        suits = key in mean and len(tasks) > 1 and mean[key] == max(tasks.values())
        words[key] = ablate.cell("", cells.get(key, [])) + ("*" * best + "_" * suits).ljust(2)  # figures in line
    first, wide = max(map(len, families)) + 2, max(map(len, words.values())) + 2
    wide = max(wide, *(math.ceil((len(t) + 2) / sum(c[0] == t for c in columns)) for t, _ in columns))
    heads = [f"{task:^{wide * len(list(group))}}" for task, group in itertools.groupby(c[0] for c in columns)]
    lines = ["".join(heads), "".join(f"{f'{k:g}x  ':>{wide}}" for _, k in columns)]
    lines += ["".join(f"{words[f, t, k]:>{wide}}" for t, k in columns) for f in families]
    return [f"{name:{first}}{line}".rstrip() for name, line in zip(["", "", *families], lines, strict=True)]


# ============ figure 4: does the pretext accuracy tell the downstream one? ============


def spearman(pairs):
    """Spearman's rank correlation of (x, y) pairs, ties sharing their mean rank; None for fewer than three, or where all x
    or all y are one."""
    ranks = [[sum(b < a for b in v) + sum(b == a for b in v) / 2 for a in v] for v in zip(*pairs, strict=True)]
    if len(pairs) < 3 or any(len(set(r)) == 1 for r in ranks):
        return None
    return statistics.correlation(*ranks)


def correlations(rows, column):
    """{task: {architecture: (correlation or None, how many points)}}: within an architecture over its widths and seeds;
    under "across" over the architectures, each with the means of its runs."""
    points = {}
    for row in rows:
        if None not in (row["pretext_accuracy"], row[column]):
            points.setdefault(row["task"], {}).setdefault(row["family"], []).append((row["pretext_accuracy"], row[column]))
    found = {}
    for task, families in points.items():
        found[task] = {family: (spearman(pairs), len(pairs)) for family, pairs in families.items()}
        means = [tuple(map(statistics.mean, zip(*pairs, strict=True))) for pairs in families.values()]
        found[task]["across"] = spearman(means), len(means)
    return found


def correlation_table(found):
    families = sorted({f for each in found.values() for f in each} - {"across"}, key=rank_of_family)
    first = max(map(len, [*families, "across"])) + 2
    lines = [" " * first + "".join(f"{task:>14}" for task in found)]
    for family in [*families, "across"]:
        both = [found[task].get(family, (None, 0)) for task in found]
        words = ["-" if not n else f"- ({n})" if r is None else f"{r:.2f} ({n})" for r, n in both]
        lines.append(f"{family:{first}}" + "".join(f"{word:>14}" for word in words))
    return lines


WIDE, HIGH, TITLE = 600, 480, 44  # px of a panel, and of the strip above all
LEFT, TOP, RIGHT, BOTTOM = 72, 44, 20, 66  # of its frame
LARGEST = 17  # px, radius of the widest network's circle
FINE = 2  # drawn so much larger and reduced: Pillow does not smooth edges
INK, GRID, GREY = (40, 40, 40), (225, 225, 225), (130, 130, 130)


def ticks(values):
    """Round numbers, four to eight of them and evenly spaced, that enclose the values and some room for their circles."""
    low, high = min(values), max(values)
    room = max(0.12 * (high - low), 0.5)
    low, high = max(0.0, low - room), min(100.0, high + room)
    steps = (m * 10.0**e for e in range(-1, 3) for m in (1, 2, 2.5, 5))
    step = next(s for s in steps if high - low <= 6 * s)
    return [step * i for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


class Pen:
    """ImageDraw in px of the final picture; colours may be transparent."""

    def __init__(self, image):
        self.draw = ImageDraw.Draw(image, "RGBA")

    def text(self, x, y, words, anchor="mm", size=15, fill=INK):
        self.draw.text((x * FINE, y * FINE), words, fill=fill, anchor=anchor, font_size=size * FINE)

    def line(self, x0, y0, x1, y1, fill, width=1):
        self.draw.line((x0 * FINE, y0 * FINE, x1 * FINE, y1 * FINE), fill=fill, width=width * FINE)

    def circle(self, x, y, radius, colour):
        box = [(x - radius) * FINE, (y - radius) * FINE, (x + radius) * FINE, (y + radius) * FINE]
        self.draw.ellipse(box, fill=(*colour, 110), outline=(*colour, 255), width=2 * FINE)


def radius(width, widest):
    return max(4.0, LARGEST * math.sqrt(width / widest))  # the area is the width


def palette(families):
    return {f: ImageColor.getrgb(f"hsl({360 * i / len(families):.0f}, 75%, 40%)") for i, f in enumerate(families)}


def panel(pen, at, title, points, colours, widest, names, lines=()):
    """One task: its frame with ticks and numbers, and a circle a point (x, y, family, width), the large ones first. at: its
    upper left corner in px. names: of the axes. lines: (y, words), dashed. Returns {point: centre of its circle in px}."""
    left, top, right, bottom = at[0] + LEFT, at[1] + TOP, at[0] + WIDE - RIGHT, at[1] + HIGH - BOTTOM
    pen.text((left + right) / 2, top - 16, title, size=18)
    xs, ys = ticks([p[0] for p in points]), ticks([p[1] for p in points] + [y for y, _ in lines])
    across = lambda x: left + (right - left) * (x - xs[0]) / (xs[-1] - xs[0])
    up = lambda y: bottom - (bottom - top) * (y - ys[0]) / (ys[-1] - ys[0])
    for x in xs:
        pen.line(across(x), top, across(x), bottom, GRID)
        pen.text(across(x), bottom + 14, f"{x:g}")
    for y in ys:
        pen.line(left, up(y), right, up(y), GRID)
        pen.text(left - 8, up(y), f"{y:g}", "rm")
    for x0, y0, x1, y1 in ((left, top, left, bottom), (left, bottom, right, bottom)):
        pen.line(x0, y0, x1, y1, INK, 2)
    pen.text((left + right) / 2, bottom + 40, names[0])
    pen.text(at[0] + 8, top - 16, names[1], "lm")
    for y, words in lines:
        for x in range(left, right, 12):
            pen.line(x, up(y), min(x + 7, right), up(y), INK)
        pen.text(right - 4, up(y) - 10, words, "rm", 13)
    places = {point: (across(point[0]), up(point[1])) for point in points}
    for point in sorted(points, key=lambda p: -p[3]):
        pen.circle(*places[point], radius(point[3], widest), colours[point[2]])
    return places


def legend(pen, at, colours, widths):
    x, y = at[0] + LEFT, at[1] + TOP
    for family, colour in colours.items():
        pen.circle(x + LARGEST, y, 9, colour)
        pen.text(x + 3 * LARGEST, y, family, "lm")
        y += 28
    y += 16
    for width in widths:
        pen.circle(x + LARGEST, y, radius(width, max(widths)), GREY)
        pen.text(x + 3 * LARGEST, y, f"{width:g}x as wide", "lm")
        y += 2 * LARGEST + 6


def draw(rows, column):
    """Figure 4 as a PIL image, a panel a task, and where its circles are: {task: {(x, y, family, width): centre in px}}."""
    points, chance, random = {}, {}, {}
    for row in rows:
        if None not in (row["pretext_accuracy"], row[column]):
            point = row["pretext_accuracy"], row[column], row["family"], row["width"]
            points.setdefault(row["task"], []).append(point)
            chance[row["task"]] = row["chance"]
            if column == "knn20" and row["random_knn20"] is not None:
                random.setdefault(row["task"], []).append(row["random_knn20"])
    shown = [p for each in points.values() for p in each]
    widths, families = sorted({p[3] for p in shown}), sorted({p[2] for p in shown}, key=rank_of_family)
    colours, columns = palette(families), min(3, len(points) + 1)
    size = WIDE * columns, TITLE + HIGH * math.ceil((len(points) + 1) / columns)
    image = Image.new("RGB", [FINE * side for side in size], "white")
    pen, places = Pen(image), {}
    pen.text(24, TITLE / 2 + 4, "Does the accuracy of the pretext task tell how good the representation is?", "lm", 20)
    corner = lambda i: (i % columns * WIDE, TITLE + i // columns * HIGH)
    for i, (task, each) in enumerate(points.items()):
        title = task if chance[task] is None else f"{task} (chance {chance[task]:.3g})"
        lines = [(statistics.mean(random[task]), "random network")] if task in random else []
        names = "pretext accuracy, %", NAMES[column]
        places[task] = panel(pen, corner(i), title, each, colours, widths[-1], names, lines)
    legend(pen, corner(len(points)), colours, widths)
    return image.reduce(FINE), places


# ============ the whole ============


def show(own, asked=()):
    """Print the tables of what is in OUT and of the cells asked for, and write OUT/study.csv, .png and .json."""
    rows, column = gather(own.out, asked), "knn20" if own.figure == "knn" else own.figure
    if not rows:
        common.fail(f"--out {own.out}: there are no cells in it")
    seeds, epochs = {row["seed"] for row in rows}, sorted({row["epochs"] for row in rows} - {None})
    several = f"; mean and standard deviation of {len(seeds)} seeds" if len(seeds) > 1 else ""
    print(f"\ntable 1: {NAMES[column]}{several}; epochs: {', '.join(f'{e:g}' for e in epochs) or '-'}")
    ours = by_cell(rows, column)
    print("\n".join(table(ours)))
    print("* the best architecture of a column   _ the best figure of a row: the task that suits it best")
    for row in rows:
        if row["refused"]:
            print(f"- {row['task']} {row['arch']} seed {row['seed']}: {row['refused']}")
    tasks = {task for _, task, _ in ours}
    if any(task in tasks for task in WIDTHS):
        print("\nthe paper's table 1: ImageNet, L-BFGS. Compare the order of rows and columns, not the heights.")
        print("\n".join(table({key: number for key, number in PAPER.items() if key[1] in tasks})))
    found = correlations(rows, column)
    if found:
        print(f"\nrank correlation (Spearman) of pretext accuracy and {NAMES[column]}, in brackets of how many points: within an")
        print("architecture over its widths and seeds; across the architectures, each with the means of its runs")
        print("\n".join(correlation_table(found)))
        runs.put(own.out / "study.png", lambda f: draw(rows, column)[0].save(f, "PNG"))
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    runs.write_text(own.out / "study.csv", text.getvalue())
    everything = {"figure": own.figure, "cells": rows, "correlations": found}
    everything["table"] = [{"family": f, "task": t, "width": k, "figures": n} for (f, t, k), n in ours.items()]
    runs.write_text(own.out / "study.json", json.dumps(everything, indent=1) + "\n")
    print(f"\n{own.out}/study.csv, study.json" + ", study.png" * bool(found))


def main(argv=None):
    own, args = parse_args(sys.argv[1:] if argv is None else argv)
    if own.show:
        return show(own)
    grid = itertools.product(own.seeds, own.tasks, own.archs, own.widths)
    cells = [Cell(own, args, *settings) for settings in grid]
    if own.dry_run:
        print("\n".join(cell.shown + " --fresh" * args.fresh for cell in cells))
        return
    for split in ("train", "test"):  # so that what is no data is said once, and several runs do not download it at once
        data.load(args.data, args.root, split)
    run_all(cells, own, common.catch_signals())
    show(own, [cell.path for cell in cells])
    if all(note(cell.path).get("refused") for cell in cells):
        common.fail("none of the cells could be run; the reasons are below the table")


if __name__ == "__main__":
    main()
