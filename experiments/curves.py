"""Draws docs/pictures/curves.png, the k-NN accuracy of every method over its epochs, from the logs in results/.

    python -m experiments.curves          (needs matplotlib)

A panel per drawn data set, a line per method, seed 0, the default recipe of its script.
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

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


def curve(name):
    """Epochs and 20-NN accuracies (%) of a log, the last of them that of the final probe."""
    rows = [json.loads(line) for line in (ROOT / f"results/{name}.jsonl").read_text().splitlines()]
    points = {row["epoch"]: row["knn20"] for row in rows if "knn20" in row}
    points[round(max(row.get("epoch", 0) for row in rows))] = rows[-1]["final_knn"]
    return list(points), list(points.values())


def draw():
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, width_ratios=(2.4, 1))
    for panel, (data, methods) in zip(panels, PANELS.items(), strict=True):
        for i, (method, name) in enumerate(methods.items()):
            epochs, knn = curve(name)
            color, style = f"C{i % 10}", "--" if i >= 10 else "-"
            panel.plot(epochs, knn, style, color=color, marker=".")
            place = dict(xytext=(5, APART.get(method, 0)), textcoords="offset points", va="center", zorder=3)
            text = panel.annotate(method, (epochs[-1], knn[-1]), color=color, **place)
            text.set_bbox(dict(facecolor="white", edgecolor="none", pad=0.5, alpha=0.85))
        panel.axhline(10, color="0.6", linewidth=0.8)
        panel.annotate("chance level", (0, 10), (0, -3), textcoords="offset points", va="top", color="0.5", fontsize=8)
        panel.set(title=data, xlabel="epoch", ylim=(0, 100))
        panel.margins(x=0.03)
        panel.set_xlim(right=panel.get_xlim()[1] * (1.15 if data == "shapes" else 1.75))
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="0.92")
    panels[0].set_ylabel("20-NN accuracy of frozen features, %")
    return figure


if __name__ == "__main__":
    draw().savefig(ROOT / "docs/pictures/curves.png", dpi=110)
