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
OUT/study.csv has a line per run, OUT/study.png is figure 4 (needs matplotlib).
"""

import csv
import importlib
import io
import itertools
import math
import re
from pathlib import Path

import torch

import backbones
import common
import runs
import sets
from experiments import jobs
from experiments.jobs import mean_std

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
    (arch, column): [number]
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
# What is read of a run: column of study.csv, and where it stands in evaluate.json.
MEASURED = {"pretext_accuracy": "pretext accuracy", "chance": "pretext chance", "knn20": "knn 20 weighted",
            "linear": "linear top1", "lbfgs": "lbfgs top1", "mlp": "mlp top1"}  # fmt: skip
COLUMNS = ("task", "arch", "family", "width", "seed", *MEASURED, "random_knn20", "seconds", "epochs", "command")


def parse_args(argv):
    epilog = "\n".join(f"{name}: --archs {' '.join(a)} --widths {k[0]} {k[1]}" for name, (a, k, _) in GRIDS.items())
    p = jobs.parser("study [--tasks T ...] [--archs A ...] [--widths K ...] [flags of pretext.py]", __doc__, epilog)
    p.add_argument("--tasks", nargs="+", default=list(TASKS), help="columns of the table")
    p.add_argument("--archs", nargs="+", help="rows: backbones without width, as revnet50_minus (default: by recipe)")
    p.add_argument("--widths", type=float, nargs="+", help="widening factors k (default: by recipe)")
    p.add_argument("--metric", choices=tuple(MEASURED)[2:], default="linear", help="in the tables, of --probes")
    p.add_argument("--out", help="folder of all runs (default: runs/study-DATA)")
    own, flags = jobs.parse(p, argv)
    jobs.check_names("--tasks", own.tasks, TASKS)
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
    own.out = Path(own.out or f"runs/study-{Path(args.data).resolve().name}")
    own.flags = [*budget, *(word for word in flags if word != "--fresh")]
    # Checks names and widths. Whether a network fits the image size of a task, only its run can tell.
    with torch.device("meta"):
        for family, width in itertools.product(own.archs, () if own.show else own.widths):
            backbones.build(arch_name(family, width), 224)
    return own, args


# ============ runs ============


def arch_name(family, width):
    """revnet50_minus and 4: revnet50_k4_minus."""
    return f"{family.removesuffix('_minus')}_k{width:g}" + "_minus" * family.endswith("_minus")


def training(own, args, seed, task, family, width):
    """The run of pretext.py for one cell of the table, a Job."""
    arch = arch_name(family, width)
    path = own.out / f"seed{seed}" / f"{task}-{arch}"
    words = ["--task", task, "--arch", arch, *own.flags, "--seed", seed, "--out", path]
    return jobs.Job(path, "pretext", words, lambda: measured(path), own.processes, args.fresh)


def measured(path):
    """What the run in `path` measured on the data that it was trained on; {} unless it is finished."""
    found = jobs.read_json(path / "evaluate.json").values()
    return jobs.lookup(next((each for each in found if "pretext" in each), {}), MEASURED)


def read_cells(out):
    """The runs in the folder `out` in the order of the table, each a line of study.csv, {column: value or None}, and
    why it was "refused"."""
    rows = []
    for file in out.glob("seed*/*.json"):
        path, record = file.with_suffix(""), jobs.read_json(file)
        if parts := re.fullmatch(r"([a-z]+)-(([a-z]+\d\w*)_k([\d.]+)(_minus)?)", path.name):
            task, arch, base, width, minus = parts.groups(default="")
            row = dict.fromkeys(COLUMNS) | {"task": task, "arch": arch, "family": base + minus, "width": float(width)}
            row |= {"seed": int(path.parent.name.removeprefix("seed")), "refused": record.get("refused")}
            if found := measured(path):
                row |= {**found, "random_knn20": jobs.initial_knn(path)}
                row |= {"epochs": max(line.get("epoch", 0) for line in jobs.read_metrics(path))}
                row |= {name: record.get(name) for name in ("seconds", "command")}
            rows.append(row)
    return sorted(rows, key=lambda r: (TASKS.index(r["task"]), family_order(r["family"]), r["width"], r["seed"]))


def family_order(family):
    """Sort key: families of one kind together, in the paper's order, the deeper ones first."""
    kind, *kinds = [re.sub(r"\d+", "", name, count=1) for name in (family, *TABLE_1)]
    depth = [-int(digits) for digits in re.findall(r"\d+", family)]
    return kinds.index(kind) if kind in kinds else len(kinds), depth, family


# ============ table 1, and figure 4: does the pretext accuracy predict the downstream accuracy? ============


def by_family(values, heads, digits=1):
    """A table with a row per family from {(family, column): numbers} and heads {column: its head}."""
    families = sorted({family for family, _ in values}, key=family_order)
    rows = [[f, *(mean_std(values.get((f, column), []), digits) for column in heads)] for f in families]
    return jobs.table([["", *heads.values()], *rows])


def table_1(values):
    """Table 1 from {(family, (task, width)): accuracies of the seeds}."""
    columns, heads, previous = sorted({c for _, c in values}, key=lambda c: (TASKS.index(c[0]), c[1])), {}, None
    for task, width in columns:
        heads[task, width], previous = f"{width:g}x" if task == previous else f"{task} {width:g}x", task
    return by_family(values, heads)


def spearman(pairs):
    """Spearman's rank correlation of (x, y) pairs, ties sharing their mean rank; None for fewer than three, or where
    all x or all y are equal."""
    x = torch.tensor(pairs, dtype=torch.double).T[:, :, None]  # [2, n, 1]
    ranks = (x > x.mT).sum(2) + (x == x.mT).sum(2) / 2
    r = torch.corrcoef(ranks)[0, 1].item() if len(pairs) > 2 else math.nan
    return None if math.isnan(r) else r


def correlations(rows, column):
    """{(family, task): [rank correlation of pretext accuracy and `column`]} over the widths and seeds of a family; with
    "across" for the family: over the families, each with the means of its runs."""
    points = {}
    for row in rows:
        if None not in (pair := (row["pretext_accuracy"], row[column])):
            points.setdefault((row["family"], row["task"]), []).append(pair)
    for task in {task for _, task in points}:
        runs_of = [torch.tensor(p, dtype=torch.double) for (_, t), p in points.items() if t == task]
        points["across", task] = [p.mean(0).tolist() for p in runs_of]
    return {key: [spearman(pairs)] for key, pairs in points.items()}


def draw(rows, column):
    """Figure 4 as a matplotlib Figure: a panel per task, a point per run; its color is the architecture, its area the
    width."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if None not in (row["pretext_accuracy"], row[column])]
    tasks, widths = list(dict.fromkeys(row["task"] for row in rows)), sorted({row["width"] for row in rows})
    families = sorted({row["family"] for row in rows}, key=family_order)
    styles = {f: dict(color=f"C{i}", alpha=0.6, edgecolors="black") for i, f in enumerate(families)}
    area = {k: 200 * k / widths[-1] for k in widths}
    figure = Figure(figsize=(3.4 * len(tasks) + 1.6, 3.4), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for row in rows:
        panel = panels[tasks.index(row["task"])]
        panel.scatter(row["pretext_accuracy"], row[column], area[row["width"]], **styles[row["family"]])
        panel.set(title=f"{row['task']} (chance {row['chance']:.3g} %)", xlabel="pretext accuracy, %")
    for panel in panels:
        panel.margins(0.15)
        panel.grid(color="0.9")
        panel.set_axisbelow(True)
    figure.supylabel(f"{column}, %")
    marks = [panels[0].scatter([], [], 80, label=f, **styles[f]) for f in families]
    marks += [panels[0].scatter([], [], area[k], "white", edgecolors="black", label=f"k = {k:g}") for k in widths]
    figure.legend(handles=marks, loc="outside right upper", frameon=False, labelspacing=1)
    return figure


# ============ the whole ============


def report(own):
    """Print the tables of what is in OUT, and write OUT/study.csv and .png."""
    rows, column, ours = read_cells(own.out), own.metric, {}
    if not rows:
        common.fail(f"--out {own.out}: there are no runs in it")
    for row in rows:
        ours.setdefault((row["family"], (row["task"], row["width"])), []).append(row[column])
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    seeds, epochs = {row["seed"] for row in rows}, sorted({row["epochs"] for row in rows} - {None})
    several = f", mean and standard deviation of {len(seeds)} seeds" * (len(seeds) > 1)
    print(f"\ntable 1: {column}, %{several}; epochs: {', '.join(f'{e:g}' for e in epochs) or '-'}")
    print(*table_1(ours), sep="\n")
    for row in rows:
        if row["refused"]:
            print(f"- {row['task']} {row['arch']} seed {row['seed']}: {row['refused']}")
    if paper := {key: number for key, number in PAPER.items() if key[1][0] in tasks}:
        print("\nthe paper's table 1: ImageNet, L-BFGS. Compare the order of rows and columns, not the values.")
        print(*table_1(paper), sep="\n")
    files, found = "study.csv", correlations(rows, column)
    if found:
        print(f"\nrank correlation (Spearman) of pretext accuracy and {column}: within an architecture over its")
        print("widths and seeds; across the architectures, each with the means of its runs")
        print(*by_family(found, {task: task for task in tasks}, 2), sep="\n")
        try:
            figure = draw(rows, column)
            runs.put(own.out / "study.png", lambda f: figure.savefig(f, format="png", dpi=100))
            files += ", study.png"
        except ImportError:
            print("\nstudy.png needs matplotlib (pip install matplotlib); the tables are written without it")
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    runs.write_text(own.out / "study.csv", text.getvalue())
    print(f"\n{own.out}/{files}")


def main(argv=None):
    own, args = parse_args(argv)
    if own.show:
        return report(own)
    for split in () if own.dry_run else ("train", "test"):  # bad data is reported once; parallel runs need not download
        sets.load(args.data, args.root, split)
    grid = itertools.product(own.seeds, own.tasks, own.archs, own.widths)
    jobs.run([training(own, args, *cell) for cell in grid], own)
    if not own.dry_run:
        report(own)


if __name__ == "__main__":
    main()
