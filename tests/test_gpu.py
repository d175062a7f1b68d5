"""benchmarks/gpu.py at its tiny sizes: every piece, what is skipped in a second call, what fails, what is stopped."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import METHODS, ROOT

import byol
import common
import saliency
import swav

sys.path.append(str(ROOT / "benchmarks"))
import gpu

# Stands for byol.py: two calls are needed, and the first waits to be stopped.
RUN = """
import json, signal, sys, time
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
first = not out.exists()
assert first == ("--fresh" in sys.argv)
out.mkdir(exist_ok=True)
with open(out / "metrics.jsonl", "a") as f:
    f.write(json.dumps({"step": 1, "loss": 1.0}) + "\\n")
    f.write(json.dumps({"step": 1, "epoch": 0 if first else 10, "knn200": 30.0 if first else 25.0}) + "\\n")
if first:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No compiler, no TensorBoard, and a process that stands for the long run; the current folder is empty."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr("runs.SummaryWriter", lambda *_, **__: SimpleNamespace(add_text=print, add_scalar=int))
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "byol.py").write_text(RUN)
    monkeypatch.chdir(tmp_path)
