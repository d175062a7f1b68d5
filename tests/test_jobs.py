"""experiments/jobs.py: processes that end with the program that started them, by any signal, and tables."""

import os
import signal
import sys
import threading
import time
import types

import pytest
from helpers import ROOT, fork

import common
from experiments import jobs


def test_processes_are_torchruns(tmp_path, monkeypatch):
    (tmp_path / "toy.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy", raising=False)
    how = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]  # as in helpers.start
    words, shown = jobs.command("toy", ["--out", tmp_path], 2)
    assert words == [*how, str(tmp_path / "toy.py"), "--out", str(tmp_path)]
    assert shown == f"torchrun --standalone --nproc_per_node=2 toy.py --out {tmp_path}"
    assert jobs.command("toy", [])[0] == [sys.executable, str(tmp_path / "toy.py")]
    words, typed = jobs.command("downstream.finetune", ["RUN"])
    assert (
        words == [sys.executable, "-m", "downstream.finetune", "RUN"] and typed == "python -m downstream.finetune RUN"
    )


def test_names_are_checked_and_the_nearest_is_named(capsys):
    jobs.check_names("--tasks", ["jigsaw"], ["rotation", "jigsaw"])
    for name, hint in (("rotaton", "did you mean 'rotation'?"), ("xyz", "there are rotation, jigsaw")):
        with pytest.raises(SystemExit) as stopped:
            jobs.check_names("--tasks", [name], ["rotation", "jigsaw"])
        assert stopped.value.code == 2 and f"--tasks {name}: {hint}" in capsys.readouterr().err


def test_numbers_are_looked_up_and_stand_in_an_aligned_table():
    columns = {"20-NN": "knn 20", "linear": "linear top1"}
    assert (
        jobs.lookup({"knn": {"20": 50.0}}, columns) == {"20-NN": 50.0, "linear": None}
        and jobs.lookup({}, columns) == {}
    )
    lines = [
        "| row    |   n | linear |",
        "| ------ | --: | -----: |",
        "| a      |  10 |    9.1 |",
        "| longer |   2 |      - |",
    ]
    assert jobs.table([["row", "n", "linear"], ["a", 10, "9.1"], ["longer", 2, "-"]]) == lines


def test_mean_and_standard_deviation():
    assert jobs.mean_std([51.0, None, 53.0]) == "52.0 ± 1.4" and jobs.mean_std([0.12345], 3) == "0.123"
    assert jobs.mean_std([None]) == jobs.mean_std([]) == "-"


SLEEPER = """
import pathlib, signal, sys, time
out, needed = pathlib.Path(sys.argv[1]), int(sys.argv[2])
def ended(*_):
    global needed
    needed -= 1
    if not needed:
        out.write_text("ended")
        sys.exit(85)
signal.signal(signal.SIGTERM, ended)
out.touch()
time.sleep(60)
"""


class Job(types.SimpleNamespace):
    __hash__ = object.__hash__


def job(code, *args, end=lambda code, stopping: f"exit code {code}" if code and not stopping else ""):
    command = [sys.executable, "-S", "-c", code, *map(str, args)]
    return Job(start=lambda: jobs.start(command), end=end, path="job", summary=str)


def asleep(folder, signals=1):
    """Two jobs that sleep until they have had so many SIGTERM, and the files that tell of it."""
    files = [folder / name for name in ("a", "b")]
    return [job(SLEEPER, file, signals) for file in files], files


def wait_for(files):
    while not all(file.exists() for file in files):
        time.sleep(0.01)


@pytest.mark.parametrize(("name", "times"), [("SIGHUP", 1), ("SIGTERM", 1), ("SIGINT", 1), ("SIGTERM", 3)])
def test_signals_end_all_that_was_started(tmp_path, capsys, name, times):
    sleepers, files = asleep(tmp_path, times)

    def interrupt():
        wait_for(files)
        for _ in range(times):
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(0.2)

    threading.Thread(target=interrupt).start()
    with pytest.raises(SystemExit) as stopped:
        jobs.launch([*sleepers, job("pathlib")], 2)
    assert stopped.value.code == 85 and "the same command" in capsys.readouterr().out
    assert [file.read_text() for file in files] == ["ended", "ended"]


@pytest.mark.parametrize(("how", "code"), [("sys.exit(85)", 85), ("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", 137)])
def test_a_run_that_ends_badly_ends_the_others(tmp_path, capsys, how, code):
    sleepers, files = asleep(tmp_path)
    last = job(
        f"import os, sys, time\nwhile not all(map(os.path.exists, sys.argv[1:])): time.sleep(.01)\n{how}", *files
    )
    with pytest.raises(SystemExit) as stopped:
        jobs.launch([*sleepers, last], 3)
    said = capsys.readouterr()
    assert stopped.value.code == code and [file.read_text() for file in files] == ["ended", "ended"]
    assert ("the same command" in said.out) == (code == 85) and ("exit code" in said.err) == (code != 85)


def test_when_this_program_fails_nothing_that_it_started_goes_on(tmp_path):
    def full(code, stopping):
        wait_for(files)
        common.fail("the disk is full")

    sleepers, files = asleep(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        jobs.launch([*sleepers, job("", end=full)], 3)
    assert stopped.value.code == 2 and [file.read_text() for file in files] == ["ended", "ended"]


def test_a_killed_program_takes_its_runs_along(tmp_path):
    """SIGKILL leaves it no time to end them: they see to it themselves (common.setup)."""
    beat = tmp_path / "beat"
    run = f"import sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport common\ncommon.setup('cpu')\n"
    run += f"while True:\n    open({str(beat)!r}, 'a').write('.')\n    time.sleep(0.1)"
    (tmp_path / "parent.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom experiments import jobs\n"
        f"class Job:\n    start = lambda self: jobs.start([sys.executable, '-c', {run!r}])\njobs.launch([Job()])"
    )
    parent, deadline = fork(tmp_path / "parent.py"), time.time() + 60
    while not beat.exists() and parent.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    parent.kill()
    parent.communicate(timeout=10)
    assert beat.exists()
    sizes = [-1, beat.stat().st_size]
    while sizes[-1] != sizes[-2] and len(sizes) < 20:
        time.sleep(1)
        sizes.append(beat.stat().st_size)
    assert len(sizes) < 20, "it is still there"
