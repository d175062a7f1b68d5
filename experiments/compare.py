"""Every method of the project at one small, equal budget: accuracy and cost, one table per data set.

    python -m experiments.compare                                     `shapes` and CIFAR-10, into OUT/methods.md
    python -m experiments.compare --data shapes --methods byol simclr --seeds 0 1 2     a part of it, mean and spread
    python -m experiments.compare --data cifar10 --epochs 100 --limit 0 --jobs 4    other flags go to every run
    python -m experiments.compare --show                              the tables of what is there; runs nothing

All runs have the recipe `shapes` of their script (a small network, AdamW, batches of 64; CMC's networks have half the
width, CPC's no BatchNorm; views of its own), and the same images, epochs and seeds. So they see the same images equally
often, in as many views as the method takes; what that costs is in the table. A run is in OUT/DATA/seedN/METHOD, its
output in OUT/DATA/seedN/METHOD.log. The same command goes on where it was stopped and skips what is finished.
"""

import statistics
from pathlib import Path

import backbones
import common
import runs
from experiments import jobs, study

# Name: script, its flags, how the table calls it, published linear top-1 on ImageNet (ResNet-50), in rising order.
METHODS = {
    "supervised": ("instdisc", ["--loss", "supervised"], "with labels", 76.5),
    "pirl": ("pirl", [], "PIRL", 63.6),
    "cpc2": ("cpc", ["--version", 2], "CPC v2", 63.8),
    "cmc": ("cmc", [], "CMC", 66.2),
    "simclr": ("simclr", [], "SimCLR", 69.3),
    "moco2": ("moco", ["--version", 2], "MoCo v2", 71.1),
    "byol": ("byol", [], "BYOL", 74.3),
    "swav": ("swav", [], "SwAV", 75.3),
    # Without a published figure of ResNet-50 under that protocol here.
    "instdisc": ("instdisc", [], "InstDisc", None),
    "dilo": ("instdisc", ["--copy-paste", 0.5], "DiLo", None),
    "sage": ("sage", [], "SaGe (evaluator: BYOL above)", None),
    "moco1": ("moco", ["--version", 1], "MoCo v1", None),
    "cpc1": ("cpc", ["--version", 1], "CPC v1", None),
    **{task: ("pretext", ["--task", task], task, None) for task in study.TASKS},
}
BUDGET = {"--recipe": "shapes", "--epochs": 5, "--limit": 10_000, "--eval-every": 0, "--probes": "knn linear"}
ACCURACIES = {"20-NN": "knn 20 weighted", "linear": "linear top1"}  # where they stand in evaluate.json
DIGITS = {"20-NN": 1, "random init": 1, "linear": 1, "minutes": 1, "MB": 0, "images/s": 0, "parameters": 2}  # columns
NOTES = """\
20-NN (weighted, T 0.1) and linear: top-1 of the frozen backbone on the test images; random init: 20-NN of the network
before its first step. Minutes: all of the run, probes included. MB: the most that rank 0 held at a time, program
included (on a GPU: tensors there). Images/s: median while training. Parameters: of the backbone, in millions. Several
seeds: mean ± standard deviation. Published: linear top-1 of ResNet-50 on ImageNet, after far
longer training (CMC's 66.2 is of two whole ResNet-50s, 47.0 M). A short, equal budget favors what learns fast."""


def parse_args(argv):
    budget = "budget: " + " ".join(f"{flag} {value}" for flag, value in BUDGET.items())
    p = jobs.parser("compare [--methods M ...] [--data D ...] [--seeds N ...] [flags of every script]", __doc__, budget)
    p.add_argument("--methods", nargs="+", default=list(METHODS), help="rows of the table")
    p.add_argument("--data", nargs="+", default=["shapes", "cifar10"], help="a table for each")
    p.add_argument("--out", default="runs/compare", help="folder of all runs")
    p.add_argument("--table", help="the file to write (default: OUT/methods.md)")
    own, flags = jobs.parse(p, argv)
    jobs.check_names("--methods", own.methods, METHODS)
    for flag in {"--task", "--v", "--version", "--fresh"} & own.given:
        common.fail(f"{flag}: compare.py sets it itself")
    own.out, own.methods = Path(own.out), [name for name in METHODS if name in own.methods]  # BYOL before SaGe
    if "sage" in own.methods and "byol" not in own.methods:
        common.fail("--methods sage: its evaluator is the run of byol, so name that, too")
    budget = [(flag, value) for flag, value in BUDGET.items() if flag not in own.given]
    own.flags = [word for flag, value in budget for word in (flag, *str(value).split())] + flags
    return own


def training(own, dataset, method, seed):
    """The run of one method with one seed, a Job."""
    script, flags, *_ = METHODS[method]
    folder = own.out / Path(dataset).resolve().name / f"seed{seed}"
    evaluator = ["--evaluator", folder / "byol"] * (method == "sage")
    words = ["--data", dataset, *flags, *evaluator, *own.flags, "--seed", seed, "--out", folder / method]
    return jobs.Job(folder / method, script, words, lambda: measured(folder / method, dataset), own.processes)


def measured(path, dataset):
    """The columns of the run in `path`, {} before its end."""
    found = jobs.lookup(jobs.read_results(path, dataset), ACCURACIES)
    if found:
        log = [line for line in jobs.read_metrics(path) if "loss" in line]
        about, seconds = runs.load(path / "backbone.pt"), jobs.record(path).get("seconds")
        f = backbones.build(about["arch"], about.get("built_for", about["preprocess"]["size"]))
        found |= {"random init": jobs.initial_knn(path), "minutes": seconds and seconds / 60}
        found |= {"MB": max(line["memory_mb"] for line in log)}
        found |= {"images/s": statistics.median(line["images_per_second"] for line in log)}
        found |= {"parameters": sum(p.numel() for p in f.parameters()) / 1e6}
    return found


def row(method, seeds):
    """The row of a method from its runs."""
    *_, title, published = METHODS[method]
    found = [numbers for run in seeds if (numbers := run.measured())]
    cells = [jobs.mean_std([numbers[name] for numbers in found], digits) for name, digits in DIGITS.items()]
    return [title, len(found) or "-", *cells, published or "-"]


def page(own, grid):
    """The tables as Markdown, and the commands of their rows."""
    text = ["# The methods side by side", "", __doc__.split("\n\n", 1)[0], ""]
    for dataset, methods in grid.items():
        rows = [row(method, seeds) for method, seeds in methods.items()]
        text += [f"## {dataset}", "", *jobs.table([["method", "seeds", *DIGITS, "published"], *rows]), ""]
        every = [run for seeds in methods.values() for run in seeds]
        text += [f"    {jobs.record(run.path).get('command') or f'{run.typed}   (not run)'}" for run in every] + [""]
    return "\n".join([*text, f"Seeds: {' '.join(map(str, own.seeds))}. {NOTES}", ""])


def main(argv=None):
    own = parse_args(argv)
    grid = {d: {m: [training(own, d, m, seed) for seed in own.seeds] for m in own.methods} for d in own.data}
    every = [run for methods in grid.values() for seeds in methods.values() for run in seeds]
    if not own.show:
        jobs.run([run for run in every if run.path.name != "sage"], own)
        jobs.run([run for run in every if run.path.name == "sage"], own)  # its evaluator is BYOL's run
    if not own.dry_run:
        table = Path(own.table or Path(own.out, "methods.md"))
        table.parent.mkdir(parents=True, exist_ok=True)
        runs.write_text(table, text := page(own, grid))
        print(f"{text}\n{table}")


if __name__ == "__main__":
    main()
