"""Every method of the project at one small, equal budget: accuracy and cost. One table per data set, in the order of
the report's table 1.

    python -m experiments.compare                                     `shapes` and CIFAR-10, into results/methods.md
    python -m experiments.compare --data shapes --methods byol simclr --seeds 0 1 2     a part of it, mean and spread
    python -m experiments.compare --data cifar10 --epochs 100 --limit 0 --jobs 4    other flags go to every run
    python -m experiments.compare --show                              the tables of what is there; runs nothing

All runs have the recipe `shapes` of their script (a small network, AdamW, batches of 64; CMC's networks have half the
width, CPC's no BatchNorm; views of its own), and the same images, epochs and seeds. So they see the same images equally
often, in as many views as the method takes; what that costs is in the table. A run is in OUT/DATA/seedN/METHOD, its
output in OUT/DATA/seedN/METHOD.log. The same command goes on where it was stopped and skips what is finished.
"""

import statistics
import sys
from pathlib import Path

import backbones
import common
import runs
import saliency
from experiments import jobs, study
from experiments.jobs import lookup, mean_std

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
COST = {"minutes": ".1f", "MB": ".0f", "images/s": ".0f", "parameters": ".2f"}
COLUMNS = ("method", "seeds", "20-NN", "random init", "linear", *COST, "report")


def parse_args(argv):
    budget = "budget: " + " ".join(f"{flag} {value}" for flag, value in BUDGET.items())
    p = jobs.parser("compare [--methods M ...] [--data D ...] [--seeds N ...] [flags of every script]", __doc__, budget)
    p.add_argument("--methods", nargs="+", default=list(METHODS), help="rows of the table")
    p.add_argument("--data", nargs="+", default=["shapes", "cifar10"], help="a table for each")
    p.add_argument("--out", default="runs/compare", help="folder of all runs")
    p.add_argument("--table", default="results/methods.md", help="the file to write")
    own, flags = jobs.parse(p, argv)
    jobs.check_names("--methods", own.methods, METHODS)
    for flag in {"--task", "--v", "--version", "--fresh"} & own.given:
        common.fail(f"{flag}: compare.py sets it itself")
    if len({Path(name).resolve().name for name in own.data}) < len(own.data):
        common.fail("--data: two sets have one name, and so one folder of runs; compare them with two --out")
    own.out, own.methods = Path(own.out), [name for name in METHODS if name in own.methods]  # BYOL before SaGe
    if "sage" in own.methods and "byol" not in own.methods:
        common.fail("--methods sage: its evaluator is the run of byol, so name that, too")
    budget = {flag: value for flag, value in BUDGET.items() if flag not in own.given}
    own.flags = [word for flag, value in budget.items() for word in (flag, *str(value).split())] + flags
    return own


class Run(jobs.Job):
    """One method with one seed."""

    def __init__(self, own, dataset, method, seed):
        script, flags, *_ = METHODS[method]
        self.dataset, folder = dataset, own.out / Path(dataset).resolve().name / f"seed{seed}"
        evaluator = ["--evaluator", folder / "byol"] * (method == "sage")
        words = ["--data", dataset, *flags, *evaluator, *own.flags]
        super().__init__(folder / method, f"{method} on {dataset}, seed {seed}", script, words, seed, own.processes)

    def metrics(self):
        return jobs.read_metrics(self.path, self.dataset)

    def summary(self):
        return ", ".join(f"{name} {value:.1f}" for name, value in self.measured().items() if value is not None)

    def measured(self):
        """Its numbers by COLUMNS; {} before its end."""
        metrics = self.metrics()
        if not metrics:
            return {}
        log = [line for line in jobs.read_log(self.path) if "loss" in line]
        about, seconds = runs.load(self.path / "backbone.pt"), jobs.record(self.path).get("seconds")
        f = backbones.build(about["arch"], about.get("built_for", about["preprocess"]["size"]))
        return {
            "20-NN": lookup(metrics, "knn 20 weighted"),
            "random init": jobs.initial_knn(self.path),
            "linear": lookup(metrics, "linear top1"),
            "minutes": seconds and seconds / 60,
            "MB": max(line["memory_mb"] for line in log),
            "images/s": statistics.median(line["images_per_second"] for line in log),
            "parameters": sum(p.numel() for p in f.parameters()) / 1e6,
        }


def table_row(method, seeds):
    """The cells of a method, by COLUMNS, from its runs: accuracies with their spread over the seeds, costs as means."""
    *_, title, report = METHODS[method]
    found = [measured for run in seeds if (measured := run.measured())]
    values = {name: [v for each in found if (v := each[name]) is not None] for name in COLUMNS[2:-1] if found}
    row = dict.fromkeys(COLUMNS, "-") | {"method": title, "seeds": len(found) or "-", "report": report or "-"}
    row |= {name: mean_std(values[name]) for name in values if name not in COST}
    row |= {name: f"{statistics.mean(values[name]):{COST[name]}}" for name in values if name in COST and values[name]}
    return tuple(row.values())


def tables(own, grid):
    """The tables as Markdown, and the commands of their rows."""
    text = ["# The methods side by side", "", __doc__.split("\n\n", 1)[0].replace("\n", " "), ""]
    for dataset, methods in grid.items():
        rows = [COLUMNS, ("---",) * len(COLUMNS), *(table_row(method, seeds) for method, seeds in methods.items())]
        text += [f"## {dataset}", "", *(f"| {' | '.join(map(str, row))} |" for row in rows), ""]
        every = [run for seeds in methods.values() for run in seeds]
        text += [f"    {jobs.record(run.path).get('command') or f'{run.typed}   (not run)'}" for run in every] + [""]
    names = f"seed{'s' * (len(own.seeds) > 1)} {' '.join(map(str, own.seeds))}"
    spread = ", mean ± standard deviation over the seeds that are finished" * (len(own.seeds) > 1)
    notes = (
        f"Asked for: {names}. 20-NN (weighted, T 0.1) and linear: top-1 of the frozen backbone on the test "
        f"images{spread}; random init: 20-NN of the network before its first step. Minutes: all of the run, probes "
        "included. MB: the most that rank 0 held at a time, program included (on a GPU: tensors there). Images/s: "
        "median while training. Parameters: of the backbone, in millions. Report: linear top-1 of ResNet-50 on ImageNet "
        "in the report's table 1, after far longer training (CMC's 66.2 is of two whole ResNet-50s, 47.0 M). A short, equal "
        "budget favors what learns fast."
    )
    return "\n".join([*text, notes, ""])


def main(argv=None):
    own = parse_args(argv)
    grid = {d: {m: [Run(own, d, m, seed) for seed in own.seeds] for m in own.methods} for d in own.data}
    every = [run for methods in grid.values() for seeds in methods.values() for run in seeds]
    if own.dry_run:
        print("\n".join(run.typed for run in every))
        return
    if not own.show:
        stop = common.catch_signals()
        for late in (False, True):  # SaGe needs BYOL's run
            jobs.run_unfinished([run for run in every if (run.path.name == "sage") == late], own, stop)
    text = tables(own, grid)
    saliency.make_folder(Path(own.table).parent)
    runs.write_text(own.table, text)
    print(f"{text}\n{own.table}")


if __name__ == "__main__":
    sys.exit(main())
