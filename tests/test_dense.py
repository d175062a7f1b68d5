"""The table of several backbones in detection and segmentation."""

import json

from experiments import dense


def write(path, results):
    path.mkdir(parents=True)
    (path / "evaluate.json").write_text(json.dumps({"scenes": results}))


def test_commands_and_seeds(capsys, tmp_path):
    dense.main(
        [
            "a/byol-{seed}",
            "random:resnet10_16",
            "--seeds",
            "0",
            "1",
            "--out",
            str(tmp_path),
            "--updates",
            "9",
            "--dry-run",
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 16
    assert lines[0] == (
        f"python -m downstream.detect a/byol-0 --data scenes --updates 9 --seed 0 --out {tmp_path}/seed0/detect-byol-0"
    )
    assert lines[11].endswith(
        f"a/byol-1 --data scenes --frozen --updates 9 --seed 1 --out {tmp_path}/seed1/segment-byol-1-frozen"
    )


def test_two_checkpoints_of_one_name_are_refused(tmp_path, refused):
    words = ["a/run", "b/run", "--out", str(tmp_path), "--dry-run"]
    assert "two checkpoints have the same name" in refused(lambda: dense.main(words))


def test_the_table_has_mean_and_spread(tmp_path):
    for seed, ap in ((0, 20.0), (1, 30.0)):
        found = {"AP": ap, "AP50": 2 * ap, "AP75": ap / 2}
        write(tmp_path / f"seed{seed}" / f"detect-byol-{seed}", {"detection": found})
    dense.main(["byol-{seed}", "--tasks", "detect", "--seeds", "0", "1", "--out", str(tmp_path), "--show"])
    [row] = [line for line in (tmp_path / "dense.md").read_text().splitlines() if line.startswith("| byol")]
    assert "25.0 ± 7.1" in row and "50.0 ± 14.1" in row and row.count(" - ") == 3
