"""k-NN curves of runs in one figure: without arguments docs/pictures/curves.png, every method on the drawn sets.

    python -m experiments.curves
    python -m experiments.curves BYOL=runs/byol-shapes SimCLR=runs/simclr-shapes --out curves.png

A run is a folder or its metrics.jsonl. Needs matplotlib (requirements-dev.txt).
"""

import argparse
import json
from pathlib import Path

import common

ROOT = Path(__file__).parent.parent
PANELS = {
    "shapes": {
        "SwAV": "swav-shapes-seed0",
        "SimCLR": "simclr-shapes-seed0",
        "InstDisc": "instdisc-shapes-two-cores",
        "PIRL": "pirl-shapes",
        "MoCo v2": "moco-shapes-seed0",
        "BYOL": "byol-shapes-seed0",
        "SaGe": "sage-shapes-seed0",
        "exemplar": "pretext-shapes-exemplar",
        "CPC v2": "cpc-shapes-v2",
        "CMC": "cmc-shapes",
        "jigsaw": "pretext-shapes-jigsaw",
        "relative location": "pretext-shapes-relative",
    },
    "shapes-natural": {"colorization": "pretext-shapes-colorization", "rotation": "pretext-shapes-rotation"},
}
APART = {"SimCLR": 4, "InstDisc": -4, "jigsaw": 3, "relative location": -3}  # points, for names that would overlap


def curve(run):
    """Epochs and 20-NN accuracies (%) of a run folder or a log, the last of them that of the final probe."""
    path = Path(run, "metrics.jsonl") if Path(run).is_dir() else Path(run)
    if not path.exists():
        common.fail(f"{path}: no such log of a run")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    points = {row["epoch"]: row["knn20"] for row in rows if "knn20" in row}
    if "final_knn" in rows[-1]:
        points[round(max(row.get("epoch", 0) for row in rows))] = rows[-1]["final_knn"]
    return list(points), list(points.values())


def draw(panels):
    """A matplotlib Figure of panels {title: {name of a curve: run}}."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        common.fail("figures need matplotlib: pip install -r requirements-dev.txt")
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    places = figure.subplots(1, len(panels), sharey=True, width_ratios=(2.4, 1)[: len(panels)], squeeze=False)[0]
    for panel, (data, methods) in zip(places, panels.items(), strict=True):
        for i, (method, run) in enumerate(methods.items()):
            epochs, knn = curve(run)
            color, style = f"C{i % 10}", "--" if i >= 10 else "-"
            panel.plot(epochs, knn, style, color=color, marker=".")
            place = dict(xytext=(5, APART.get(method, 0)), textcoords="offset points", va="center", zorder=3)
            text = panel.annotate(method, (epochs[-1], knn[-1]), color=color, **place)
            text.set_bbox(dict(facecolor="white", edgecolor="none", pad=0.5, alpha=0.85))
        panel.axhline(10, color="0.6", linewidth=0.8)
        panel.annotate("chance level", (0, 10), (0, -3), textcoords="offset points", va="top", color="0.5", fontsize=8)
        panel.set(title=data, xlabel="epoch", ylim=(0, 100))
        panel.margins(x=0.03)
        panel.set_xlim(right=panel.get_xlim()[1] * (1.75 if data == "shapes-natural" else 1.15))
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="0.92")
    places[0].set_ylabel("20-NN accuracy of frozen features, %")
    return figure


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("curves", nargs="*", metavar="NAME=RUN", help="a run folder or its metrics.jsonl, and its name")
    p.add_argument("--out", default=str(ROOT / "docs/pictures/curves.png"), help="the figure: .png, .svg or .pdf")
    args = p.parse_args(argv)
    panels = {data: {m: ROOT / f"results/{log}.jsonl" for m, log in logs.items()} for data, logs in PANELS.items()}
    if args.curves:
        panels = {"": dict(curve.split("=", 1) if "=" in curve else (curve, curve) for curve in args.curves)}
    draw(panels).savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
