import json
from pathlib import Path

import pytest
import torch
from helpers import METHODS, TINY, fork

import backbones
import runs
from experiments import compare, jobs

SMALL = " ".join(TINY).replace("--epochs 2", "--epochs 1").split()


def finished(out, dataset, method, knn=50.0, seed=0):
    """A run of `method` as it lies there when it has ended."""
    own = compare.parse_args(["--out", str(out)])
    run = compare.training(own, dataset, method, seed)
    run.path.mkdir(parents=True)
    found = {dataset: {"knn": {"20": {"weighted": knn, "majority": 1.0}}, "linear": {"top1": 61.25}}}
    (run.path / "evaluate.json").write_text(json.dumps(found))
    lines = [{"step": 0, "knn20": 14.5}]
    lines += [{"step": s, "loss": 1.0, "images_per_second": 100.0 * s, "memory_mb": 500.0 + s} for s in (1, 2, 6)]
    lines += [{"step": 6, "knn20": 49.0}, {"step": 6, "final_knn": knn, "knn20": 51.0}]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    about = {"arch": "resnet10_16", "preprocess": {"size": 32}}
    torch.save(about | {"state_dict": backbones.build("resnet10_16", 32).state_dict()}, run.path / "backbone.pt")
    runs.write_text(f"{run.path}.json", json.dumps({"command": run.typed, "seconds": 90.0}))
    return run


def test_a_row_is_what_the_run_left(tmp_path):
    run = finished(tmp_path, "shapes", "byol")
    parameters = sum(p.numel() for p in backbones.build("resnet10_16", 32).parameters()) / 1e6
    row = compare.row("byol", [run])
    assert row == ["BYOL", 1, "50.0", "14.5", "61.2", "1.5", "506", "200", f"{parameters:.2f}", 74.3]
    Path(f"{run.path}.json").unlink()  # a run made by hand has none
    assert compare.row("byol", [run])[5] == "-"


def test_accuracies_have_their_mean_and_spread_over_the_seeds_that_are_finished(tmp_path):
    own = compare.parse_args(
        ["--out", str(tmp_path), "--seeds", "0", "1", "2", "--methods", "byol", "--data", "shapes"]
    )
    finished(tmp_path, "shapes", "byol", knn=50.0)
    finished(tmp_path, "shapes", "byol", knn=54.0, seed=2)
    seeds = [compare.training(own, "shapes", "byol", seed) for seed in own.seeds]
    row = compare.row("byol", seeds)
    assert row[:3] == ["BYOL", 2, "52.0 ± 2.8"] and row[4] == "61.2 ± 0.0" and row[6] == "506 ± 0"
    text = compare.page(own, {"shapes": {"byol": seeds}})
    assert "Seeds: 0 1 2." in text and text.count("(not run)") == 1 and "--seed 1 --out" in text


def test_rows_stand_in_the_order_of_the_report_whatever_order_they_are_asked_in():
    own = compare.parse_args(["--methods", "instdisc", "swav", "simclr", "pirl"])
    assert own.methods == ["pirl", "simclr", "swav", "instdisc"]
    report = [number for *_, number in compare.METHODS.values() if number]
    assert report[0] == 76.5 and report[1:] == sorted(report[1:]) and len(report) == 8


def test_every_script_of_the_project_is_there():
    scripts = {script for script, *_ in compare.METHODS.values()}
    assert scripts == set(METHODS)


def test_the_budget_is_equal_and_what_is_given_overrides_it(tmp_path):
    own = compare.parse_args(["--out", str(tmp_path), "--epochs", "3", "--methods", "byol", "sage"])
    typed = [compare.training(own, "cifar10", method, 2).typed for method in own.methods]
    for line in typed:
        assert (
            "--recipe shapes" in line and "--epochs 3" in line and "--epochs 5" not in line and "--data cifar10" in line
        )
    assert f"--evaluator {tmp_path}/cifar10/seed2/byol" in typed[1] and "--seed 2" in typed[1]


def test_finished_rows_are_not_run_again_and_the_table_is_written(tmp_path, capsys):
    for method in ("byol", "swav"):
        assert finished(tmp_path / "runs", "shapes", method).finished()
    table = tmp_path / "results" / "methods.md"
    flags = [
        "--out",
        tmp_path / "runs",
        "--methods",
        "byol",
        "swav",
        "moco2",
        "--data",
        "shapes",
        "--table",
        table,
        "--show",
    ]
    compare.main([str(flag) for flag in flags])
    text = table.read_text()
    assert text in capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == ["method", "-------", "MoCo v2", "BYOL", "SwAV"]
    assert [word.strip() for word in rows[2].split("|")].count("-") == 8 and "71.1" in rows[2] and "(not run)" in text
    other = compare.parse_args(["--out", str(tmp_path / "runs"), "--epochs", "9"])
    assert not compare.training(other, "shapes", "byol", 0).finished()


def test_a_run_from_end_to_end(tmp_path, monkeypatch, capsys):
    table, out = tmp_path / "methods.md", tmp_path / "runs"
    monkeypatch.setattr(jobs, "start", lambda words, **_: fork(*words[1:]))
    command = ["--methods", "byol", "--data", "shapes", "--out", str(out), "--table", str(table), *SMALL]
    compare.main(command)
    assert "1 runs, 0 of them finished" in capsys.readouterr().out
    head, _, *rows = [line for line in table.read_text().splitlines() if line.startswith("| ")]
    row = dict(zip(*([word.strip() for word in line.split("|")] for line in (head, rows[0])), strict=True))
    log = [json.loads(line) for line in (out / "shapes/seed0/byol/metrics.jsonl").read_text().splitlines()]
    found = json.loads((out / "shapes/seed0/byol/evaluate.json").read_text())["shapes"]
    assert row["20-NN"] == f"{found['knn']['20']['weighted']:.1f}" and row["random init"] == f"{log[0]['knn20']:.1f}"
    assert row["linear"] == "-" and float(row["MB"]) > 100 and row["parameters"] == "0.31"
    compare.main(command)
    assert "1 runs, 1 of them finished" in (again := capsys.readouterr().out) and table.read_text() in again


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--methods", "moco"], "did you mean 'moco"),
        (["--methods", "sage"], "name that, too"),
        (["--jobs", "0"], "--jobs"),
        (["--task", "jigsaw"], "--task"),
        (["--seed", "3"], "--seed: say --seeds"),
    ],
)
def test_bad_flags(flags, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare.parse_args(flags)
    assert stopped.value.code == 2 and words in capsys.readouterr().err
