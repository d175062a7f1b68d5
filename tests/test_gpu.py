"""benchmarks/gpu.py at its tiny sizes: every piece, a second call, what fails, what is stopped, what does not fit."""

import json
import os
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import METHODS, ROOT
from torch.optim import optimizer

import common
import saliency
import simclr

sys.path.append(str(ROOT / "benchmarks"))
import gpu

ARGS = Namespace(tiny=True, minutes=1, retry=False, root="datasets", out="out", runs="runs", commit="abc")
WORDS = ["--tiny", "--out", "out", "--runs", "runs", "--commit", "abc"]
# Stands for byol.py. With WAIT its first call goes on until it is stopped.
RUN = """
import json, signal, sys, time
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
first = not out.exists()
assert sys.argv[sys.argv.index("--data") + 1] == "shapes"
out.mkdir(exist_ok=True)
with open(out / "metrics.jsonl", "a") as f:
    f.write(json.dumps({"step": 1, "loss": 1.0, "epoch": 1.0}) + "\\n")
    f.write(json.dumps({"step": 1, "epoch": 0 if first else 10, "knn200": 30.0 if first else 25.0}) + "\\n")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
time.sleep(WAIT if first else 0)
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No compiler, TensorBoard or garbage collection (slow where so much is imported), a program that stands for the
    long run; the current folder is a temporary one."""
    monkeypatch.setattr(gpu, "free", lambda: None)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    monkeypatch.setattr("runs.SummaryWriter", mock.MagicMock())
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    Path(tmp_path, "byol.py").write_text(RUN.replace("WAIT", "0"))
    monkeypatch.chdir(tmp_path)


def bench():
    return gpu.Bench(ARGS, torch.device("cpu"))


def found():
    (file,) = Path("out").glob("gpu-*-tiny.json")
    return json.loads(file.read_text()), file.with_suffix(".md").read_text()


def table(text, title):
    """{row: cells} of a section of the page."""
    section = next(part for part in text.split("\n## ") if part.startswith(f"{title}\n"))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line[:1] == "|"]
    return {row: dict(zip(rows[0][1:], cells, strict=True)) for row, *cells in rows[2:]}


def test_all_pieces_then_nothing_then_what_failed(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "METHODS", ("byol", "simclr"))
    monkeypatch.setattr(gpu, "COMPILED", ("byol",))
    maps = saliency.maps
    with monkeypatch.context() as patch:
        patch.setattr(saliency, "maps", lambda x, m, **how: [1 / 0, None] if m == "mc" else maps(x, m, **how))
        patch.setattr(simclr, "main", lambda argv: common.fail("no | such thing"))
        assert gpu.main(WORDS) == 0
    results, text = found()
    failed = {(piece, row): x["error"] for piece, rows in results.items() for row, x in rows.items() if "error" in x}
    bad = dict.fromkeys([("steps32", "simclr"), ("steps224", "simclr")], "error: no | such thing")
    assert failed == {("saliency", "mc"): "division by zero"} | bad
    assert "failed: error: no / such thing" in text and "failed: division by zero" in text and "commit abc" in text
    for name, rows in bench().rows.items():
        columns = gpu.PIECES[name][1].split(", ")
        shown = table(text, gpu.PIECES[name][0])
        assert list(shown) == list(rows) == list(results[name]) and "not run" not in str(shown)
        assert all(list(cells) == [*columns, "goal"] for cells in shown.values())
        for result in results[name].values():
            assert "error" in result or result.keys() & {*columns} or name == "launches"
            assert result.keys() <= {*columns, "where", "command", "error"}
    assert table(text, "Saliency maps")["rbd"]["goal"] == "3,000 images/s"
    step = results["steps32"]["byol --compile"]
    assert step["ms/step"] * step["images/s"] == pytest.approx(4000) and 0 < step["views ms"] < step["ms/step"]
    assert step["command"].startswith("byol.py --data cifar10 ") and "--compile" in step["command"]
    assert results["cifar10"]["byol"]["calls"] == 1

    with monkeypatch.context() as patch:
        patch.setattr(gpu.Bench, "put", None)
        assert gpu.main(WORDS) == 0 and found() == (results, text)
    capsys.readouterr()
    assert gpu.main([*WORDS, "--retry", "saliency"]) == 0
    assert "saliency  mc: " in (said := capsys.readouterr().out) and "rbd:" not in said and "3 done (0 failed)" in said
    results["saliency"]["mc"] = found()[0]["saliency"]["mc"]
    assert found()[0] == results and "error" not in results["saliency"]["mc"]


@pytest.mark.parametrize("method", METHODS)
def test_steps_of_every_method(method):
    assert set(gpu.METHODS) == set(METHODS)
    result = gpu.steps(bench(), "imagenet" if method == "swav" else "cifar10", method)
    assert result["batch"] == 4 and result["px"] == 32 and result["network"].startswith("resnet10_16")
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL and not common.CAUGHT


def test_a_run_has_so_many_updates():
    script, words, batch = gpu.command(bench(), "cifar10", "byol")
    assert words[:2] == ["--data", "cifar10"] and batch == 4
    made, marks = [], []
    at = dict.fromkeys([2, 5], lambda: marks.append(len(made)))
    hook = optimizer.register_optimizer_step_post_hook(lambda *_: made.append(1))
    lines, loader, held = gpu.train(bench(), script, [*words, "--batch-size", "4"], 6, "run", at)
    hook.remove()
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and loader.steps == 4 and held == 2 * 16 * 3 * 32 * 32
    assert marks == [1, 4] and len(made) == 6


def test_a_signal_of_the_user_ends_it_and_is_no_result():
    script, words, _ = gpu.command(bench(), "cifar10", "byol")
    early = {1: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    with pytest.raises(SystemExit) as stopped:
        gpu.train(bench(), script, [*words, "--batch-size", "4"], 3, "run", early)
    assert stopped.value.code == common.STOPPED and not Path("out").exists()


def test_the_long_run_goes_on_in_the_next_call(tmp_path):
    b = bench()
    b.end = time.monotonic()  # a second is left
    Path(tmp_path, "byol.py").write_text("import time; time.sleep(60)")  # still importing
    b.measure("cifar10", "byol")
    assert found()[0]["cifar10"]["byol"].keys() == {"unfinished", "calls", "command", "minutes", "where"}
    b.results = {}
    Path(tmp_path, "byol.py").write_text(RUN.replace("WAIT", "60"))
    b.measure("cifar10", "byol")
    results, text = found()
    was = results["cifar10"]["byol"]
    assert was["unfinished"] and was["calls"] == 1 and 0.9 / 60 < was["minutes"] < 0.5 and was["200-NN"] == 30
    assert table(text, "BYOL on CIFAR-10")["byol"]["minutes"].endswith(" so far") and b.left("cifar10") == ["byol"]
    assert table(text, "k-NN, fp32")["60 x 16, 3 classes"]["images"] == "not run"
    assert gpu.main([*WORDS, "cifar10"]) == 0
    now = found()[0]["cifar10"]["byol"]
    assert now["calls"] == 2 and now["minutes"] > was["minutes"] and "unfinished" not in now
    assert (now["epoch"], now["200-NN"], now["highest"], now["200-NN by epoch"]) == (10, 25, 30, "0: 30.0, 10: 25.0")


def test_a_long_run_that_fails_begins_anew(tmp_path):
    Path(tmp_path, "byol.py").write_text("raise SystemExit('error: no CIFAR-10')")
    bench().measure("cifar10", "byol")
    assert found()[0]["cifar10"]["byol"]["error"] == "error: no CIFAR-10"
    Path(tmp_path, "byol.py").write_text(RUN.replace("WAIT", "0"))
    assert gpu.main([*WORDS, "cifar10"]) == 0 and "error" in found()[0]["cifar10"]["byol"]
    assert gpu.main([*WORDS, "cifar10", "--retry"]) == 0 and found()[0]["cifar10"]["byol"]["calls"] == 1


def test_what_does_not_fit_is_halved():
    def measure(size):
        tried.append(size)
        if size > limit:
            raise torch.OutOfMemoryError
        return size

    tried, limit = [], 70
    assert gpu.halved(measure, 256) == 64 and tried == [256, 128, 64]
    limit = 1
    with pytest.raises(torch.OutOfMemoryError):
        gpu.halved(measure, 8)


def test_time_is_over(capsys):
    assert gpu.main([*WORDS, "--minutes", "0", "knn", "facts"]) == common.STOPPED
    said = capsys.readouterr().out.splitlines()[1:]
    assert said == ["facts     0 done (0 failed), 1 left", "knn       0 done (0 failed), 2 left"]
    assert not Path("out").exists()


@pytest.mark.parametrize("words, sentence", [([], "--tiny"), (["--tiny", "speed"], "speed: the pieces are facts, ")])
def test_refused(words, sentence, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sentence in refused(lambda: gpu.main(words))
