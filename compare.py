"""Every method of the project at one small, equal budget: how good, at what cost? One table a data set, in the order of the
report's table 1.

    python compare.py                                        `shapes` and CIFAR-10, into results/methods.md
    python compare.py --data shapes --methods byol simclr    a part of it
    python compare.py --data cifar10 --epochs 100 --limit 0 --jobs 4    what is no flag of compare.py goes to every run
    python compare.py --show                                 the tables of what is there; runs nothing

All runs have the recipe `shapes` of their script (a small network, AdamW, batches of 64; CMC's networks have half the width,
CPC's no BatchNorm; views of its own), and all of them the same images, epochs and seed, on every data set. So they see
the same images equally often, in as many views as the method takes; what that costs is in the table. A run is in
OUT/DATA/METHOD, what it prints in OUT/DATA/METHOD.log. The same command goes on where it was stopped and skips what is
finished.
"""

import argparse
import statistics
import sys
from pathlib import Path

import ablate
import backbones
import common
import runs
import saliency
import study

# Name: script, its flags, how the table calls it, linear top-1 on ImageNet (ResNet-50) in the report's table 1.
METHODS = {
    "supervised": ("instdisc", ["--loss", "supervised"], "with labels", 76.5),
    "pirl": ("pirl", [], "PIRL", 63.6),
    "cpc2": ("cpc", ["--version", 2], "CPC v2", 63.8),
    "cmc": ("cmc", [], "CMC", 66.2),
    "simclr": ("simclr", [], "SimCLR", 69.3),
    "moco2": ("moco", ["--version", 2], "MoCo v2", 71.1),
    "byol": ("byol", [], "BYOL", 74.3),
    "swav": ("swav", [], "SwAV", 75.3),
    # Those that the report's table does not have.
    "instdisc": ("instdisc", [], "InstDisc", None),
    "dilo": ("instdisc", ["--copy-paste", 0.5], "DiLo", None),
    "sage": ("sage", [], "SaGe (evaluator: BYOL above)", None),
    "moco1": ("moco", ["--version", 1], "MoCo v1", None),
    "cpc1": ("cpc", ["--version", 1], "CPC v1", None),
    **{task: ("pretext", ["--task", task], task, None) for task in study.TASKS},
}
BUDGET = {"--recipe": "shapes", "--epochs": 5, "--limit": 10_000, "--eval-every": 0, "--probes": "knn linear"}
COLUMNS = ("method", "20-NN", "at random", "linear", "minutes", "MB", "images/s", "parameters", "report")


def parse_args(argv):
    p = argparse.ArgumentParser(
        usage="python compare.py [--methods M ...] [--data D ...] [flags of every script]", description=__doc__,
        formatter_class=common.Help, allow_abbrev=False,
        epilog="budget: " + " ".join(f"{flag} {value}" for flag, value in BUDGET.items()),
    )  # fmt: skip
    p.add_argument("--methods", nargs="+", default=list(METHODS), help="rows of the table")
    p.add_argument("--data", nargs="+", default=["shapes", "cifar10"], help="a table for each")
    p.add_argument("--processes", type=int, default=1, help="of each run, started by torchrun")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the CPU's threads")
    p.add_argument("--out", default="runs/compare", help="folder of all runs")
    p.add_argument("--table", default="results/methods.md", help="the file to write")
    p.add_argument("--dry-run", action="store_true", help="list the commands and stop")
    p.add_argument("--show", action="store_true", help="run nothing; show what is in --out")
    own, flags = p.parse_known_args(argv)
    study.known("--methods", own.methods, METHODS)
    common.at_least(1, own, "processes", "jobs")
    given = {word.split("=")[0] for word in flags}
    for flag in ("--task", "--v", "--version", "--out", "--fresh"):
        if flag in given:
            common.fail(f"{flag}: compare.py says that itself")
    if len({Path(name).resolve().name for name in own.data}) < len(own.data):
        common.fail("--data: two sets have one name, and so one folder of runs; compare them with two --out")
    own.out, own.methods = Path(own.out), [name for name in METHODS if name in own.methods]  # BYOL before SaGe
    if "sage" in own.methods and "byol" not in own.methods:
        common.fail("--methods sage: its evaluator is the run of byol, so name that, too")
    budget = {flag: value for flag, value in BUDGET.items() if flag not in given}
    own.flags = [word for flag, value in budget.items() for word in (flag, *str(value).split())] + flags
    return own


class Run(study.Cell):
    """One row of one table."""

    fresh = False

    def __init__(self, own, dataset, method):
        script, flags, self.title, self.report = METHODS[method]
        folder = own.out / Path(dataset).resolve().name
        self.path, self.name, self.dataset = folder / method, f"{method} on {dataset}", dataset
        flags = [*flags, "--evaluator", folder / "byol"] if method == "sage" else flags
        words = ["--data", dataset, *flags, *own.flags, "--out", self.path]
        self.words, self.shown = ablate.command(script, words, own.processes)
        self.made_up = (None, None)

    def results(self):
        return ablate.figures(self.path, self.dataset)

    def needs(self):
        finished = self.results() and study.note(self.path).get("command") == self.shown
        return None if finished else (self.words, self.shown)

    def summary(self):
        about = study.note(self.path)
        told = ", ".join(map(str, self.row()[1:5]))
        return f"{self.name}: " + (f"left out, {about['refused']}" if about.get("refused") else told)

    def row(self):
        """What the table says of it, by COLUMNS; "-" for what is not there."""
        found, row = self.results(), dict.fromkeys(COLUMNS, "-")
        row |= {"method": self.title, "report": self.report or "-"}
        if found:
            trained = [line for line in ablate.log_lines(self.path) if "loss" in line]
            about = runs.load(self.path / "backbone.pt")
            f = backbones.build(about["arch"], about.get("built_for", about["preprocess"]["size"]))
            seconds = study.note(self.path).get("seconds")
            row |= {
                "20-NN": figure(ablate.figure(found, "knn 20 weighted")),
                "at random": figure(ablate.figure(ablate.at_random(self.path), "knn 20 weighted")),
                "linear": figure(ablate.figure(found, "linear top1")),
                "minutes": figure(seconds and seconds / 60),
                "MB": f"{max(line['memory_mb'] for line in trained):.0f}",
                "images/s": f"{statistics.median(line['images_per_second'] for line in trained):.0f}",
                "parameters": f"{sum(p.numel() for p in f.parameters()) / 1e6:.2f} M",
            }
        return tuple(row.values())


def figure(number):
    return "-" if number is None else f"{number:.1f}"


def tables(grid):
    """The tables as Markdown, and the commands of their rows."""
    text = [__doc__.split("\n\n", 1)[0].replace("\n", " "), ""]
    for dataset, row_runs in grid.items():
        rows = [COLUMNS, ("---",) * len(COLUMNS), *(run.row() for run in row_runs)]
        text += [f"## {dataset}", "", *(f"| {' | '.join(map(str, row))} |" for row in rows), ""]
        text += ["    " + (study.note(run.path).get("command") or f"{run.shown}   (not run)") for run in row_runs] + [""]
    notes = (
        "20-NN (weighted, T 0.1) and linear: top-1 of the frozen backbone on the test images; at random: 20-NN of the network "
        "before its first step. Minutes: all of the run, probes included. MB: the most that the first process held at a time, "
        "program included (on a GPU: tensors there). Images/s: median while training. Parameters: of the backbone. Report: "
        "linear top-1 of ResNet-50 on ImageNet in the report's table 1, after far longer training (CMC's 66.2 is of two whole "
        "ResNet-50s, 47.0 M). One seed; a short, equal budget favours what learns fast."
    )
    return "\n".join(["# The methods side by side", "", *text, notes, ""])


def main(argv=None):
    own = parse_args(argv)
    stop = common.catch_signals()
    grid = {dataset: [Run(own, dataset, method) for method in own.methods] for dataset in own.data}
    every = [run for row_runs in grid.values() for run in row_runs]
    if own.dry_run:
        print("\n".join(run.shown for run in every))
        return
    if not own.show:
        for late in (False, True):  # SaGe needs BYOL's run
            study.run_all([run for run in every if (run.path.name == "sage") == late], own, stop)
    text = tables(grid)
    saliency.make_folder(Path(own.table).parent)
    runs.write_text(own.table, text)
    print(f"{text}\n{own.table}")


if __name__ == "__main__":
    sys.exit(main())
