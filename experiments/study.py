"""Which backbone suits which pretext task? The study of Revisiting Self-Supervised Visual Representation Learning
(Kolesnikov, Zhai, Beyer 2019, https://arxiv.org/abs/1901.09005) as one command.

    python -m experiments.study                             five tasks, four backbones, two widths, `shapes-natural`
    python -m experiments.study --tasks rotation jigsaw --seeds 0 1 2     a part of it
    python -m experiments.study --data cifar10 --jobs 4     four runs at a time share the GPU, and the CPU's threads
    python -m experiments.study --data imagenet --root DIR --processes 8  the paper's networks, each run on eight GPUs
    python -m experiments.study --out DIR --show            the tables and the figure of what is there; runs nothing

Other flags go to every run of pretext.py, one for each cell of the table: OUT/seedN/TASK-ARCH, its output in
OUT/seedN/TASK-ARCH.log. The same command goes on where it was stopped and skips what is finished; another grid in the
same OUT adds to the table. A network that a task cannot use (its size, its patches) is a "-" with the reason. At the
end it prints table 1, ours and the paper's, and how well the pretext accuracy predicts the downstream accuracy.
OUT/study.csv has a line per run, OUT/study.png is figure 4 (needs matplotlib), OUT/study.json has everything.
"""

import csv
import importlib
import io
import itertools
import json
import math
import re
import statistics
from pathlib import Path

import torch

import backbones
import common
import evaluate
import runs
import sets
from experiments import jobs
from experiments.jobs import lookup, mean_std

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

# ============ the default grid ============

GRIDS = {  # by recipe: architectures, widths, and flags of every run that differ from the recipe
    "shapes": (("revnet14", "resnet14v2", "resnet14v1", "vgg11"), (0.5, 1),
               {"--epochs": 4, "--limit": 5000, "--batch-size": 32, "--copies": 4, "--eval-every": 0}),
    "cifar10": (("revnet26", "resnet26v2", "resnet26v1", "vgg11"), (1, 2), {}),
    "imagenet": (tuple(TABLE_1), (4, 8), {}),
}  # fmt: skip
# Downstream metrics: where each stands in evaluate.json, its column of study.csv, how the tables call it.
METRICS = {"knn": ("knn 20 weighted", "knn20", "20-NN, %"), "linear": ("linear top1", "linear", "linear probe, %"),
           "lbfgs": ("lbfgs top1", "lbfgs", "linear (L-BFGS), %"), "mlp": ("mlp top1", "mlp", "MLP, %")}  # fmt: skip
COLUMNS = ("task", "arch", "family", "width", "seed", "pretext_accuracy", "chance", "knn20", "linear", "lbfgs", "mlp",
           "random_knn20", "seconds", "epochs", "command")  # fmt: skip


def parse_args(argv):
    epilog = "\n".join(f"{name}: --archs {' '.join(a)} --widths {k[0]} {k[1]}" for name, (a, k, _) in GRIDS.items())
    p = jobs.parser("study [--tasks T ...] [--archs A ...] [--widths K ...] [flags of pretext.py]", __doc__, epilog)
    p.add_argument("--tasks", nargs="+", default=list(TASKS), help="columns of the table")
    p.add_argument("--archs", nargs="+", help="rows: backbones without width, as revnet50_minus (default: by recipe)")
    p.add_argument("--widths", type=float, nargs="+", help="widening factors k (default: by recipe)")
    p.add_argument("--metric", default="linear", help=f"what stands in the table: {', '.join(METRICS)}")
    p.add_argument("--out", help="folder of all runs (default: runs/study-DATA)")
    own, flags = jobs.parse(p, argv)
    jobs.check_names("--tasks", own.tasks, TASKS)
    jobs.check_names("--metric", [own.metric], METRICS)
    for flag in {"--task", "--arch"} & own.given:
        common.fail(f"{flag}: say {flag}s, one or more")
    if "--data" not in own.given:  # one set for all tasks, upright so that rotation can be predicted
        flags = ["--data", "shapes-natural", *flags]
    parse = importlib.import_module("pretext").parse_args
    recipe = parse(["--task", own.tasks[0], *flags]).recipe
    archs, widths, budget = GRIDS[recipe if recipe in GRIDS else "cifar10"]
    budget = [str(word) for pair in budget.items() if pair[0] not in own.given for word in pair]
    args = parse(["--task", own.tasks[0], *budget, *flags])
    own.archs, own.widths = own.archs or archs, own.widths or widths
    for name in ("tasks", "archs", "widths"):  # each once
        setattr(own, name, list(dict.fromkeys(getattr(own, name))))
    own.out = Path(own.out or f"runs/study-{Path(args.data).resolve().name}")
    for family in own.archs:
        if found := re.search(r"_k([\d.]+)", family):
            common.fail(f"--archs {family}: say {family.replace(found[0], '')}, and --widths {found[1]}")
    # Checks names and widths. Whether a network fits the image size of a task, only its run can tell.
    with torch.device("meta"):
        for family, width in itertools.product(own.archs, () if own.show else own.widths):
            backbones.build(arch_name(family, width), 224)
    own.flags = [*budget, *(word for word in flags if word != "--fresh")]
    if own.metric not in (*args.probes, "lbfgs"):  # L-BFGS with the study's penalty is evaluate.py's alone
        own.flags += ["--probes", *args.probes, own.metric]
    return own, args


# ============ cells ============


def arch_name(family, width):
    """revnet50_minus and 4: revnet50_k4_minus."""
    return f"{family.removesuffix('_minus')}_k{width:g}" + "_minus" * family.endswith("_minus")


def read_metrics(path):
    """What the run in `path` measured on the data that it was trained on; {} unless it is finished."""
    return next((each for each in jobs.read_json(path / "evaluate.json").values() if "pretext" in each), {})


def read_cell(path):
    """The cell in `path` as one row of study.csv, with None for what is missing; {} if its name is not a cell's."""
    name = rf"seed(-?\d+)/({'|'.join(TASKS)})-(([a-z]+\d\w*)_k([\d.]+)((?:_minus)?))"
    parts = re.fullmatch(name, f"{path.parent.name}/{path.name}")
    if not parts:
        return {}
    seed, task, arch, base, width, minus = parts.groups()
    metrics, record = read_metrics(path), jobs.record(path)
    log = jobs.read_log(path) if metrics else []
    row = {"task": task, "arch": arch, "family": base + minus, "width": float(width), "seed": int(seed)}
    row |= {column: lookup(metrics, keys) for keys, column, _ in METRICS.values()}
    row |= {"pretext_accuracy": lookup(metrics, "pretext accuracy"), "chance": lookup(metrics, "pretext chance")}
    row |= {"random_knn20": jobs.initial_knn(path) if log else None}
    row |= {"epochs": max((line.get("epoch", 0) for line in log), default=0) or None}
    row |= {k: record.get(k) if metrics else None for k in ("seconds", "command")}
    return row | {"refused": None if metrics else record.get("refused")}


def family_order(family):
    """Sort key: families of one kind together, in the paper's order, the deeper ones first."""
    kind = lambda name: re.sub(r"(?<=[a-z])\d+", "", name, count=1)
    kinds = [kind(name) for name in TABLE_1]
    depth = int(re.search(r"\d+", family)[0])
    return kinds.index(kind(family)) if kind(family) in kinds else len(kinds), -depth, family


def read_cells(out, asked=()):
    """The rows of all cells that are in the folder `out`, and of those asked for, in the order of the table."""
    paths = [p.parent for p in out.glob("seed*/*/evaluate.json")]
    paths += [p.with_name(p.name.removesuffix(".json")) for p in out.glob("seed*/*.json")]
    rows = filter(None, (read_cell(path) for path in {*paths, *asked}))
    return sorted(rows, key=lambda r: (TASKS.index(r["task"]), family_order(r["family"]), r["width"], r["seed"]))


class Cell(jobs.Job):
    """One run of pretext.py, and evaluate.py for a metric that it ended without."""

    def __init__(self, own, args, seed, task, family, width):
        arch = arch_name(family, width)
        path, words = own.out / f"seed{seed}" / f"{task}-{arch}", ["--task", task, "--arch", arch, *own.flags]
        super().__init__(path, f"{task} {arch} seed {seed}", "pretext", words, seed, own.processes, args.fresh)
        words = [path, "--data", args.data, "--probe", own.metric, *jobs.evaluation_flags(args), "--seed", seed]
        self.probe = jobs.command("evaluate", words + ["--penalty", "study"] * (own.metric == "lbfgs"))
        self.metric = own.metric

    def metrics(self):
        return read_metrics(self.path)

    def needs(self):
        metrics = self.metrics()
        labels = any(probe in metrics for probe in evaluate.PROBES)
        # A run that ends with L-BFGS chooses its penalty from a grid; the study's is fixed.
        missing = self.metric not in metrics or (self.metric == "lbfgs" and metrics["lbfgs"].get("grid"))
        return super().needs() or (self.probe if labels and missing and self.running != self.probe[1] else None)

    def summary(self):
        row = read_cell(self.path)
        numbers = ("pretext_accuracy", "chance", "knn20", "linear", "lbfgs", "mlp", "seconds")
        return ", ".join(f"{name} {row[name]:.1f}" for name in numbers if row[name] is not None)


# ============ table 1 ============


def by_cell(rows, column):
    """{(family, task, width): values of its seeds}, with an empty list for a cell that has none."""
    cells = {}
    for row in rows:
        values = cells.setdefault((row["family"], row["task"], row["width"]), [])
        values += [row[column]] if row[column] is not None else []
    return cells


def table(cells):
    """Lines of table 1. A star marks the best architecture of a column, an underscore the best task of a row (for this
    architecture); neither where there is nothing to compare with."""
    columns = sorted({key[1:] for key in cells}, key=lambda c: (TASKS.index(c[0]), c[1]))
    families = sorted({key[0] for key in cells}, key=family_order)
    mean = {key: statistics.mean(values) for key, values in cells.items() if values}
    starts = ["" if a == b else b for a, b in itertools.pairwise(["", *(task for task, _ in columns)])]
    lines = [["", *starts], ["", *(f"{k:g}x  " for _, k in columns)]]
    for family in families:
        in_row = [(task, m) for (f, task, _), m in mean.items() if f == family]
        words = [family]
        for column in columns:
            in_column, m = [m for (_, *c), m in mean.items() if tuple(c) == column], mean.get((family, *column))
            best = m is not None and len(in_column) > 1 and m == max(in_column)
            suits = m is not None and len({task for task, _ in in_row}) > 1 and m == max(m for _, m in in_row)
            words.append(mean_std(cells.get((family, *column), [])) + ("*" * best + "_" * suits).ljust(2))
        lines.append(words)
    return jobs.aligned(lines)


# ============ figure 4: does the pretext accuracy predict the downstream accuracy? ============


def spearman(pairs):
    """Spearman's rank correlation of (x, y) pairs, ties sharing their mean rank; None for fewer than three, or where
    all x or all y are equal."""
    ranks = [[sum(b < a for b in v) + sum(b == a for b in v) / 2 for a in v] for v in zip(*pairs, strict=True)]
    if len(pairs) < 3 or any(len(set(r)) == 1 for r in ranks):
        return None
    return statistics.correlation(*ranks)


def correlations(rows, column):
    """{task: {architecture: (correlation or None, number of points)}}: within an architecture over its widths and
    seeds; under "across" over the architectures, each with the means of its runs."""
    points = {}
    for row in rows:
        if None not in (pair := (row["pretext_accuracy"], row[column])):
            points.setdefault(row["task"], {}).setdefault(row["family"], []).append(pair)
    found = {}
    for task, families in points.items():
        found[task] = {family: (spearman(pairs), len(pairs)) for family, pairs in families.items()}
        means = [tuple(map(statistics.mean, zip(*pairs, strict=True))) for pairs in families.values()]
        found[task]["across"] = spearman(means), len(means)
    return found


def correlation_table(found):
    families = [*sorted({f for each in found.values() for f in each} - {"across"}, key=family_order), "across"]
    lines = [["", *found]]
    for family in families:
        both = [found[task].get(family, (None, 0)) for task in found]
        lines.append([family, *("-" if not n else f"- ({n})" if r is None else f"{r:.2f} ({n})" for r, n in both)])
    return jobs.aligned(lines)


def draw(rows, metric):
    """Figure 4 as a matplotlib Figure: a panel per task, a point per run; its color is the architecture, its area the
    width."""
    from matplotlib.figure import Figure

    _, column, label = METRICS[metric]
    rows = [row for row in rows if None not in (row["pretext_accuracy"], row[column])]
    tasks, widths = list(dict.fromkeys(row["task"] for row in rows)), sorted({row["width"] for row in rows})
    families = sorted({row["family"] for row in rows}, key=family_order)
    dashed, styles = [], {f: dict(color=f"C{i}", alpha=0.6, edgecolors="black") for i, f in enumerate(families)}
    area, columns = {k: 200 * k / widths[-1] for k in widths}, min(3, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(3.4 * columns + 1.6, 3 * lines + 0.4), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flat
    for panel, task in itertools.zip_longest(panels, tasks):
        cells = [row for row in rows if row["task"] == task]
        if not cells:
            panel.remove()
            continue
        for row in cells:
            panel.scatter(row["pretext_accuracy"], row[column], area[row["width"]], **styles[row["family"]])
        random = [row["random_knn20"] for row in cells if row["random_knn20"] is not None]
        if metric == "knn" and random:
            dashed = [panel.axhline(statistics.mean(random), color="gray", linestyle="--", label="random init")]
        chance = cells[0]["chance"]
        panel.set(title=task if chance is None else f"{task} (chance {chance:.3g} %)", xlabel="pretext accuracy, %")
        panel.margins(0.15)
        panel.grid(color="0.9")
        panel.set_axisbelow(True)
    figure.supylabel(label)
    marks = [figure.axes[0].scatter([], [], 80, label=f, **styles[f]) for f in families]
    marks += [figure.axes[0].scatter([], [], area[k], "white", edgecolors="black", label=f"k = {k:g}") for k in widths]
    figure.legend(handles=marks + dashed, loc="outside right upper", frameon=False, labelspacing=1)
    return figure


# ============ the whole ============


def report(own, asked=()):
    """Print the tables of what is in OUT and of the cells asked for, and write OUT/study.csv, .png and .json."""
    rows, (_, column, label) = read_cells(own.out, asked), METRICS[own.metric]
    if not rows:
        common.fail(f"--out {own.out}: there are no cells in it")
    seeds, epochs = {row["seed"] for row in rows}, sorted({row["epochs"] for row in rows} - {None})
    several = f"; mean and standard deviation of {len(seeds)} seeds" if len(seeds) > 1 else ""
    print(f"\ntable 1: {label}{several}; epochs: {', '.join(f'{e:g}' for e in epochs) or '-'}")
    ours = by_cell(rows, column)
    print("\n".join(table(ours)))
    print("* the best architecture of a column   _ the best task of a row")
    for row in rows:
        if row["refused"]:
            print(f"- {row['task']} {row['arch']} seed {row['seed']}: {row['refused']}")
    tasks = {task for _, task, _ in ours}
    if any(task in tasks for task in WIDTHS):
        print("\nthe paper's table 1: ImageNet, L-BFGS. Compare the order of rows and columns, not the values.")
        print("\n".join(table({key: number for key, number in PAPER.items() if key[1] in tasks})))
    found, files = correlations(rows, column), "study.csv, study.json"
    if found:
        print(f"\nrank correlation (Spearman) of pretext accuracy and {label} (number of points): within an")
        print("architecture over its widths and seeds; across the architectures, each with the means of its runs")
        print("\n".join(correlation_table(found)))
        try:
            figure = draw(rows, own.metric)
            runs.put(own.out / "study.png", lambda f: figure.savefig(f, format="png", dpi=100))
            files += ", study.png"
        except ImportError:
            print("\nstudy.png needs matplotlib (pip install matplotlib); the tables are written without it")
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    runs.write_text(own.out / "study.csv", text.getvalue())
    everything = {"metric": own.metric, "cells": rows, "correlations": found}
    everything["table"] = [{"family": f, "task": t, "width": k, "values": v} for (f, t, k), v in ours.items()]
    runs.write_text(own.out / "study.json", json.dumps(everything, indent=1) + "\n")
    print(f"\n{own.out}/{files}")


def main(argv=None):
    own, args = parse_args(argv)
    if own.show:
        return report(own)
    cells = [Cell(own, args, *key) for key in itertools.product(own.seeds, own.tasks, own.archs, own.widths)]
    if own.dry_run:
        print("\n".join(cell.typed + " --fresh" * args.fresh for cell in cells))
        return
    for split in ("train", "test"):  # so that bad data is reported once, and parallel runs do not all download it
        sets.load(args.data, args.root, split)
    jobs.run_unfinished(cells, own, common.catch_signals())
    report(own, [cell.path for cell in cells])
    if all(jobs.record(cell.path).get("refused") for cell in cells):
        common.fail("none of the cells could be run; the reasons are below the table")


if __name__ == "__main__":
    main()
