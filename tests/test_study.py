"""experiments/study.py with a pretext.py that takes no time, and over folders of runs that never ran."""

import contextlib
import csv
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import signal
import statistics
import sys
import threading
import time
from pathlib import Path

import pytest
from torchvision.io import decode_image

from experiments import study

TOY = """
import argparse, json, os, pathlib, signal, sys, time

def parse_args(argv=None):
    p = argparse.ArgumentParser(allow_abbrev=False)
    for name, default in dict(task="rotation", data="shapes", root="datasets", device=None, recipe="shapes", arch="net",
                              out=None, fail=None, refuse=None, wait=None).items():
        p.add_argument(f"--{name}", default=default)
    for name in ("limit", "workers", "seed", "epochs", "batch-size", "copies", "eval-every"):
        p.add_argument(f"--{name}", type=int, default=0)
    p.add_argument("--seconds", type=float, default=0)
    p.add_argument("--probes", nargs="*", default=["knn", "linear"])
    p.add_argument("--fresh", action="store_true")
    p.add_argument("--amp", action=argparse.BooleanOptionalAction)
    return p.parse_args(argv)

def stopped(*_):
    (out / "stopped").write_text("")
    sys.exit(85)

if __name__ == "__main__":
    args = parse_args()
    out = pathlib.Path(args.out)
    print("the recipe")
    if args.arch == args.refuse:
        print(f"error: {args.arch} needs a larger patch", file=sys.stderr)
        sys.exit(2 if args.task == "rotation" else 1)  # what torchrun makes of it
    signal.signal(signal.SIGTERM, stopped)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "evaluate.json"
    with open(out / "starts", "a") as f:
        f.write(f"{os.environ.get('OMP_NUM_THREADS')} {time.time()}\\n")
    if args.fresh:
        file.unlink(missing_ok=True)
    if file.exists():
        sys.exit()
    if args.arch == args.fail:
        while args.wait and not list(out.parent.glob(f"*{args.wait}/waits")):
            time.sleep(0.01)
        print("last words")
        sys.exit(3)
    if args.arch == args.wait and not (out / "stopped").exists():
        (out / "waits").write_text("")
        time.sleep(60)
    time.sleep(args.seconds)
    log = [{"step": 0, "epoch": 0, "knn20": 13.0}, {"step": 9, "epoch": args.epochs, "knn20": 40.0}]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in log))
    found = {"knn": {"20": {"weighted": 40.0 + args.seed}}, "linear": {"top1": 50.0 + args.seed}}
    found = {"pretext": {"accuracy": 70.0, "chance": 25.0}, **{k: found[k] for k in args.probes}}
    file.write_text(json.dumps({args.data: found}))
    with open(out / "ends", "a") as f:
        f.write(f"{time.time()}\\n")
"""
GRID = ["--tasks", "rotation", "jigsaw", "--archs", "revnet14", "vgg11", "--widths", "1"]


@pytest.fixture
def toy(tmp_path, monkeypatch, few_shapes):
    (tmp_path / "pretext.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pretext", raising=False)
    yield tmp_path / "out"
    sys.modules.pop("pretext", None)


def record(path):
    return Path(f"{path}.json")


def lines(file):
    return file.read_text().splitlines()


def cells(line):
    return [word.strip() for word in line.split("|")[1:-1]]


def study_commands(capfd, out, *flags):
    study.main([*flags, "--dry-run", "--out", str(out)])
    return capfd.readouterr().out.splitlines()


def write_run(path, pretext, linear, knn=30.0, chance=25.0, **about):
    path.mkdir(parents=True)
    found = {
        "pretext": {"accuracy": pretext, "chance": chance},
        "linear": {"top1": linear},
        "knn": {"20": {"weighted": knn}},
    }
    (path / "evaluate.json").write_text(json.dumps({"other": {"linear": {"top1": 1.0}}, "shapes": found}))
    log = [
        {"step": 0, "epoch": 0, "knn20": 13.5},
        {"step": 8, "epoch": 4, "loss": 1.0},
        {"step": 8, "epoch": 4, "knn20": knn},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    record(path).write_text(json.dumps(about))


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A study of two seeds that lacks one cell and could not run another, and what --show prints of it."""
    out = tmp_path_factory.mktemp("study")
    for seed, task, (family, linear), k in itertools.product(
        (0, 1), ("rotation", "jigsaw"), (("revnet14", 40), ("vgg11", 20), ("resnet14v2_minus", 30)), (1, 2)
    ):
        path = out / f"seed{seed}" / f"{task}-{study.arch_name(family, k)}"
        if (task, family, k) == ("jigsaw", "vgg11", 1):
            path.parent.mkdir(parents=True, exist_ok=True)
            record(path).write_text(json.dumps({"refused": "too small a patch", "seconds": 4.0}))
        elif (task, family, k) != ("jigsaw", "vgg11", 2):
            # Within a family both rise with the width; across families one falls as the other rises.
            pretext = 100 - linear + 4 * k + seed - 9 * (task == "jigsaw")
            write_run(
                path, pretext, linear + 5 * k + seed - 3 * (task == "jigsaw"), command="python pretext.py", seconds=12.5
            )
    (out / "seed0" / "something-else").mkdir()  # and what is no cell stays out
    (out / "seed0" / "something-else" / "evaluate.json").write_text("{}")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        study.main(["--out", str(out), "--show"])
    return out, printed.getvalue().splitlines()


# ============ table 1 ============


def test_the_papers_table():
    paper = {(family, *column): number for (family, column), number in study.PAPER.items()}
    assert len(paper) == 66 and paper["revnet50", "rotation", 16] == [53.7]
    assert paper["resnet50v1", "relative", 8] == [50.5] and paper["vgg19", "jigsaw", 8] == [21.1]
    assert paper["resnet50v2_minus", "exemplar", 12] == [38.2]
    head, _, *rows = map(cells, study.table_1(study.PAPER))
    assert head[:6] == ["", "rotation 4x", "8x", "12x", "16x", "exemplar 4x"]
    assert [row[0] for row in rows] == [*study.TABLE_1]
    assert rows[-1] == ["vgg19", *map(str, study.TABLE_1["vgg19"])]


def test_empty_cells():
    found = {("a1", ("rotation", 1)): [10.0, 20.0], ("b1", ("rotation", 1)): [15.0]}
    found |= {("a1", ("jigsaw", 2)): [9.0], ("b1", ("jigsaw", 2)): []}
    head, _, a, b = map(cells, study.table_1(found))
    assert head == ["", "rotation 1x", "jigsaw 2x"] and a == ["a1", "15.0 ± 7.1", "9.0"] and b == ["b1", "15.0", "-"]


def test_rows_are_in_the_papers_order():
    families = ["vgg11", "resnet14v1", "revnet14", "revnet50", "resnet50v2_minus", "revnet50_minus", "resnet14v2"]
    assert sorted(families, key=study.family_order) == [
        "revnet50", "revnet14", "resnet14v2", "resnet14v1", "revnet50_minus", "resnet50v2_minus", "vgg11",
    ]  # fmt: skip
    assert (
        study.arch_name("revnet50_minus", 4.0) == "revnet50_k4_minus" and study.arch_name("vgg11", 0.5) == "vgg11_k0.5"
    )


def test_what_is_there_is_printed(shown):
    _, printed = shown
    table = [cells(line) for line in printed if line.startswith("| ")]
    assert next(row for row in table if row[0] == "revnet14")[1:] == [
        "45.5 ± 0.7",
        "50.5 ± 0.7",
        "42.5 ± 0.7",
        "47.5 ± 0.7",
    ]
    assert next(row for row in table if row[0] == "vgg11")[-2:] == ["-", "-"]
    assert "- jigsaw vgg11_k1 seed 1: too small a patch" in printed
    assert not any(line.startswith("- jigsaw vgg11_k2") for line in printed)  # not run is no reason
    paper = printed.index(
        "the paper's table 1: ImageNet, L-BFGS. Compare the order of rows and columns, not the values."
    )
    assert cells(printed[paper + 1])[1::4] == ["rotation 4x", "jigsaw 4x"] and len(cells(printed[paper + 3])) == 7
    assert "mean and standard deviation of 2 seeds; epochs: 4" in "\n".join(printed)


def test_csv_has_a_line_a_run(shown):
    out, _ = shown
    with open(out / "study.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert ",".join(rows[0]) == (
        "task,arch,family,width,seed,pretext_accuracy,chance,knn20,linear,lbfgs,mlp,random_knn20,seconds,epochs,command"
    )
    assert len(rows) == 2 * (2 * 3 * 2 - 1)  # with those that could not run, without those that nobody asked for
    by_name = {(row["task"], row["arch"], row["seed"]): row for row in rows}
    row = by_name["rotation", "resnet14v2_k2_minus", "1"]
    assert row["family"] == "resnet14v2_minus" and float(row["width"]) == 2 and float(row["linear"]) == 41
    assert [row[k] for k in ("pretext_accuracy", "chance", "knn20", "lbfgs", "mlp")] == ["79", "25.0", "30.0", "", ""]
    assert [row[k] for k in ("random_knn20", "seconds", "epochs", "command")] == [
        "13.5",
        "12.5",
        "4",
        "python pretext.py",
    ]
    assert set(list(by_name["jigsaw", "vgg11_k1", "0"].values())[5:]) == {""}


# ============ correlations ============


def test_spearman():
    assert study.spearman([(1, 5), (2, 7), (30, 8)]) == pytest.approx(1)
    assert study.spearman([(1, 5), (2, 3), (3, 2), (9, 1)]) == pytest.approx(-1)
    assert study.spearman([(1, 1), (2, 3), (2, 2), (3, 4)]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))  # a tie
    assert study.spearman([(1, 5), (2, 7)]) is None and study.spearman([(1, 5), (1, 7), (1, 8)]) is None
    y = random.Random(0).sample(range(9), 9)  # without ties: 1 - 6 sum d^2 / (n (n^2 - 1))
    expected = 1 - 6 * sum((i - v) ** 2 for i, v in enumerate(y)) / (9 * 80)
    assert study.spearman([(i / 7, v**3) for i, v in enumerate(y)]) == pytest.approx(expected)


def test_correlations_within_and_across(shown):
    out, printed = shown
    found = study.correlations(study.read_cells(out), "linear")
    assert found["revnet14", "rotation"] == [pytest.approx(1)] and found["across", "rotation"] == [pytest.approx(-1)]
    assert found["across", "jigsaw"] == [None] and ("vgg11", "jigsaw") not in found
    at = printed.index(next(line for line in printed if line.startswith("widths and seeds; across")))
    rows = {name: numbers for name, *numbers in map(cells, printed[at + 1 : at + 7])}
    assert list(rows)[-1] == "across" and rows["across"] == ["-1.00", "-"] and rows["vgg11"] == ["1.00", "-"]


# ============ figure 4 ============


def test_points_are_runs():
    pytest.importorskip("matplotlib")
    families, points = ("revnet14", "resnet14v1", "vgg11"), ((40.0, 30.0, 1), (60.0, 50.0, 4), (75.0, 35.0, 2))
    rows = [
        {
            "task": "rotation",
            "family": f,
            "width": k,
            "pretext_accuracy": x,
            "linear": y,
            "chance": 25.0,
            "random_knn20": None,
        }
        for f, (x, y, k) in zip(families, points, strict=True)
    ]
    figure = study.draw([*rows, {**rows[0], "linear": None}], "linear")
    (panel,) = figure.axes
    drawn = panel.collections[:3]
    assert [tuple(d.get_offsets()[0]) for d in drawn] == [(x, y) for x, y, _ in points]
    assert [len(d.get_offsets()) for d in drawn] == [1, 1, 1] and len({tuple(d.get_facecolor()[0]) for d in drawn}) == 3
    areas = [d.get_sizes()[0] for d in drawn]
    assert areas[1] == pytest.approx(2 * areas[2]) == pytest.approx(4 * areas[0])  # the area is the width
    assert panel.get_title() == "rotation (chance 25 %)" and figure.get_supylabel() == "linear, %"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*families, "k = 1", "k = 2", "k = 4"]


def test_the_figure_of_several_tasks(shown):
    pytest.importorskip("matplotlib")
    out, printed = shown
    assert decode_image(str(out / "study.png")).shape[0] in (3, 4) and printed[-1].endswith("study.png")
    rows = study.read_cells(out)
    points = lambda figure: {
        p.get_title().split()[0]: sum(len(c.get_offsets()) for c in p.collections) for p in figure.axes
    }
    assert points(study.draw(rows, "knn20")) == {"rotation": 12, "jigsaw": 8}
    figure = study.draw([{**row, "task": task} for row in rows for task in study.TASKS], "linear")
    assert list(points(figure)) == list(study.TASKS) and len(figure.axes) == 5


def test_without_matplotlib_the_tables_are_written(toy, monkeypatch, capfd):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    write_run(toy / "seed0" / "rotation-vgg11_k1", 40.0, 50.0)
    study.main(["--out", str(toy), "--show"])
    assert "study.png needs matplotlib" in capfd.readouterr().out
    assert (toy / "study.csv").exists() and not (toy / "study.png").exists()


# ============ running it ============


def test_runs_and_then_skips_what_is_finished(toy, capfd):
    grid = ["--tasks", "rotation", "jigsaw", "--archs", "vgg11", "--widths", "1", "--seeds", "0", "2"]
    command = [*grid, "--out", str(toy), "--epochs", "3"]
    study.main(command)
    printed = capfd.readouterr().out
    assert "4 runs, 0 of them finished" in printed and "(4 of 4; 0 min left)" in printed
    assert (
        "51.0 ± 1.4" in printed and "seed2/jigsaw-vgg11_k1: pretext_accuracy 70.0, chance 25.0, knn20 42.0" in printed
    )
    path = toy / "seed2" / "rotation-vgg11_k1"
    about = json.loads((toy / "seed2" / "rotation-vgg11_k1.json").read_text())
    assert about["command"].startswith("python pretext.py --task rotation --arch vgg11_k1 ") and about["seconds"] > 0
    assert (
        about["command"].endswith(f"--epochs 3 --seed 2 --out {path}") and "--data shapes-natural" in about["command"]
    )
    assert about["command"].count("--epochs") == 1
    assert lines(toy / "seed2" / "rotation-vgg11_k1.log") == [about["command"], "the recipe"]

    study.main(command)  # again: nothing is started
    again = capfd.readouterr().out
    assert "4 runs, 4 of them finished" in again and len(lines(path / "starts")) == 1
    assert again.split("table 1")[1] == printed.split("table 1")[1]

    study.main([*command, "--workers", "1"])  # other words: the runs themselves say that they are finished
    assert len(lines(path / "starts")) == 2
    kept = json.loads((toy / "seed2" / "rotation-vgg11_k1.json").read_text())
    assert kept["seconds"] == about["seconds"] and "--workers 1" in kept["command"]

    study.main([*command, "--workers", "1", "--fresh"])
    assert len(lines(path / "ends")) == 2
    study.main([*command, "--workers", "1"])
    assert len(lines(path / "starts")) == 3

    capfd.readouterr()
    study.main(["--tasks", "relative", "--archs", "revnet14", "--widths", "0.5", "--out", str(toy)])  # the table grows
    table = capfd.readouterr().out.split("table 1")[1].splitlines()
    assert cells(table[1]) == ["", "rotation 1x", "relative 0.5x", "jigsaw 1x"]
    assert (toy / "seed0" / "relative-revnet14_k0.5" / "evaluate.json").exists()


def test_jobs_run_at_once_with_their_share_of_the_threads(toy, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    study.main([*GRID, "--jobs", "2", "--seconds", "0.5", "--out", str(toy)])
    starts = sorted(float(lines(path)[0].split()[1]) for path in toy.glob("seed0/*/starts"))
    ends = sorted(float(lines(path)[0]) for path in toy.glob("seed0/*/ends"))
    assert len(starts) == 4 and starts[1] < ends[0] <= starts[2] and starts[3] < ends[2]  # two, never three
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert {lines(path)[0].split()[0] for path in toy.glob("seed0/*/starts")} == {str(max(1, cores // 2))}


def test_a_cell_that_cannot_be_is_left_out_with_its_reason(toy, capfd):
    command = [*GRID, "--out", str(toy)]
    study.main([*command, "--refuse", "vgg11_k1"])
    printed = capfd.readouterr().out
    assert "- jigsaw vgg11_k1 seed 0: vgg11_k1 needs a larger patch" in printed
    assert ["vgg11", "-", "-"] in [cells(line) for line in printed.splitlines()]
    study.main(command)  # it may be now
    assert "needs a larger patch" not in capfd.readouterr().out and (toy / "seed0/jigsaw-vgg11_k1/ends").exists()
    assert "refused" not in json.loads((toy / "seed0/jigsaw-vgg11_k1.json").read_text())
    with pytest.raises(SystemExit) as stopped:  # refused though it has a folder: other settings, say
        study.main([*command, "--tasks", "rotation", "--refuse", "vgg11_k1"])
    assert stopped.value.code == 2 and "vgg11_k1 needs a larger patch" in capfd.readouterr().err


def test_all_cells_refused_is_bad_input(toy, capfd):
    with pytest.raises(SystemExit) as stopped:
        study.main(
            ["--tasks", "jigsaw", "--archs", "vgg11", "--widths", "1", "--refuse", "vgg11_k1", "--out", str(toy)]
        )
    assert stopped.value.code == 2 and "none of the runs could start: vgg11_k1 needs" in capfd.readouterr().err


def test_a_failure_stops_the_others_and_is_the_studys(toy, capfd):
    tasks = ["--tasks", "jigsaw", "--archs", "revnet14", "vgg11", "resnet14v1", "--widths", "1"]
    flags = ["--wait", "revnet14_k1", "--fail", "vgg11_k1", "--jobs", "2", "--out", str(toy)]
    with pytest.raises(SystemExit) as stopped:
        study.main([*tasks, *flags])
    err = capfd.readouterr().err
    assert stopped.value.code == 3 and "last words" in err
    assert "exit code 3 from python pretext.py --task jigsaw --arch vgg11_k1" in err
    assert (toy / "seed0/jigsaw-revnet14_k1/stopped").exists()
    assert not (toy / "seed0/jigsaw-resnet14v1_k1").exists() and not (toy / "study.csv").exists()


def test_a_signal_reaches_all_runs_and_the_same_command_goes_on(toy, capfd):
    flags = ["--tasks", "rotation", "jigsaw", "--archs", "vgg11", "--widths", "1", "2"]
    command = [*flags, "--wait", "vgg11_k1", "--jobs", "3", "--seconds", "0.1", "--out", str(toy)]
    waiting = [toy / f"seed0/{task}-vgg11_k1" for task in ("rotation", "jigsaw")]

    def interrupt():
        while not all((path / "waits").exists() for path in waiting):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(SystemExit) as stopped:
        study.main(command)
    assert stopped.value.code == 85 and "the same command" in capfd.readouterr().out
    assert all((path / "stopped").exists() for path in waiting) and not (toy / "study.csv").exists()
    part = json.loads(record(waiting[0]).read_text())
    assert part["seconds"] > 0 and "command" not in part
    study.main(command)
    assert all(len(lines(path / "starts")) == 2 for path in waiting) and (toy / "study.csv").exists()
    whole = json.loads(record(waiting[0]).read_text())
    assert whole["seconds"] >= part["seconds"] + 0.1 and "command" in whole  # both parts


def test_a_run_that_was_stopped_by_others_is_no_cell(toy, capfd):
    (toy / "seed0/rotation-revnet14_k1").mkdir(parents=True)
    (toy / "seed0/rotation-revnet14_k1/evaluate.json").write_text(
        '{"shapes": {"linear": {"top1": 1.0}}}'
    )  # not finished
    with pytest.raises(SystemExit) as stopped:
        study.main([*GRID, "--out", str(toy)])
    assert stopped.value.code == 1 and "has not come to its end" in capfd.readouterr().err


def test_commands_have_the_budget_and_processes_are_torchruns(toy, capfd):
    assert f"--epochs {study.GRIDS['shapes'][2]['--epochs']} " in study_commands(capfd, toy)[0]
    printed = study_commands(capfd, toy, *GRID, "--processes", "2")
    first = "torchrun --standalone --nproc_per_node=2 pretext.py --task rotation --arch revnet14_k1 --epochs "
    assert len(printed) == 4 and printed[0].startswith(first) and not toy.exists()


def test_a_column_of_another_probe_may_stand_in_the_table(toy, capfd):
    study.main(["--tasks", "rotation", "--archs", "vgg11", "--widths", "1", "--metric", "knn20", "--out", str(toy)])
    assert ["vgg11", "40.0"] in [cells(line) for line in capfd.readouterr().out.splitlines()]


def test_what_cannot_be_written_is_a_sentence(tmp_path, capfd):
    write_run(tmp_path / "seed0" / "rotation-vgg11_k1", 40.0, 50.0)
    (tmp_path / "study.csv.tmp").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as stopped:
        study.main(["--out", str(tmp_path), "--show"])
    assert stopped.value.code == 2 and f"could not write {tmp_path}/study.csv" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--tasks", "rotaton"], "--tasks rotaton: did you mean 'rotation'"),
        (["--metric", "xyz"], "argument --metric: invalid choice: 'xyz'"),
        (["--archs", "revnt50"], "did you mean 'revnet50"),
        (["--archs", "revnet50_k4_minus"], "unknown architecture 'revnet50_k4_k"),
        (["--archs", "resnet50v1_minus"], "_minus"),
        (["--widths", "0.3"], "0.3"),
        (["--task", "jigsaw"], "--task: say --tasks"),
        (["--arch=vgg11_k1"], "--arch: say --archs"),
        (["--seed", "3"], "--seed: say --seeds"),
        (["--jobs", "0"], "--jobs"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--data", "shaps"], "did you mean 'shapes'"),
        (["--show"], "there are no runs in it"),
    ],
)
def test_bad_input(toy, capfd, words, sentence):
    with pytest.raises(SystemExit) as stopped:
        study.main([*words, "--out", str(toy)])
    assert stopped.value.code == 2 and sentence in capfd.readouterr().err and not toy.exists()


def test_torchrun_is_for_the_runs(toy, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stopped:
        study.main([])
    assert stopped.value.code == 2 and "--processes" in capfd.readouterr().err


# ============ the real thing ============


@pytest.mark.parametrize("recipe", study.GRIDS)
def test_default_grids_are_commands_that_parse(recipe, tmp_path, capfd):
    pretext = importlib.import_module("pretext")
    study.main(["--dry-run", "--out", str(tmp_path / "out"), *(["--data", recipe] if recipe != "shapes" else [])])
    commands = [line.split()[2:] for line in capfd.readouterr().out.splitlines()]
    archs, widths, _ = study.GRIDS[recipe]
    assert len(commands) == len(study.TASKS) * len(archs) * len(widths) and not (tmp_path / "out").exists()
    refused = [words for words in commands if "colorization" in words and any(word.startswith("vgg") for word in words)]
    assert len(refused) == len(widths)  # the only cells that pretext.py refuses; the table has a "-" for them
    commands = [words for words in commands if words not in refused]
    settings = [pretext.parse_args(words) for words in commands]
    assert {(a.task, a.recipe) for a in settings} == {(task, recipe) for task in study.TASKS}
    assert len({(a.task, a.arch) for a in settings}) == len(commands) and len({a.data for a in settings}) == 1
    assert all(re.fullmatch(r".*/seed0/\w+-[\w.]+", a.out) for a in settings)
    assert statistics.mean("linear" in a.probes for a in settings) == 1


def test_help_says_what_is_run(capfd):
    with pytest.raises(SystemExit):
        study.main(["--help"])
    assert "shapes: --archs revnet14" in capfd.readouterr().out
