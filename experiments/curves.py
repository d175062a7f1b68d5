"""k-NN curves of finished runs in one figure.

    python -m experiments.curves BYOL=results/byol-shapes-seed0.jsonl SimCLR=runs/simclr-shapes --out curves.png

Each curve is NAME=RUN, a run folder or its metrics.jsonl. Needs matplotlib (requirements-dev.txt).
"""

import argparse
import json
from pathlib import Path

import common


def read(run):
    """(epochs, 20-NN accuracies in per cent) of a run folder or a metrics.jsonl, from the random init on."""
    path = Path(run, "metrics.jsonl") if Path(run).is_dir() else Path(run)
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        points = [(line["epoch"], line["knn20"]) for line in lines if "knn20" in line]
    except (OSError, ValueError, TypeError, KeyError) as error:
        common.fail(f"{path} cannot be read as the log of a run: {error}")
    return list(zip(*points, strict=True)) or common.fail(f"{path} has no k-NN accuracies (knn20)")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("curves", nargs="+", metavar="NAME=RUN", help="a run folder or its metrics.jsonl, and its name")
    p.add_argument("--out", default="curves.png", help="the figure: .png, .svg or .pdf")
    args = p.parse_args(argv)
    curves = [curve.partition("=") for curve in args.curves]
    if wrong := [name for name, equals, run in curves if not (name and equals and run)]:
        common.fail(f"{wrong[0]}: NAME=RUN is expected")
    points = {name: read(run) for name, _, run in curves}
    try:
        from matplotlib import pyplot
    except ImportError:
        common.fail("the figure needs matplotlib: pip install -r requirements-dev.txt")
    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    shades = pyplot.get_cmap("tab20").colors
    axes.set_prop_cycle(color=shades[::2] + shades[1::2])
    for name, (epochs, accuracy) in points.items():
        axes.plot(epochs, accuracy, label=name, marker=".", linewidth=1.5)
    axes.set(xlabel="epoch", ylabel="20-NN accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(bbox_to_anchor=(1.01, 1), loc="upper left", frameon=False)
    try:
        figure.savefig(args.out, dpi=120)
    except (OSError, ValueError) as error:
        common.fail(f"--out {args.out}: {error}")


if __name__ == "__main__":
    common.run(main)
