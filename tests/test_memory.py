"""What a step keeps in memory: the estimate against a count, batches that do not fit, the table of the page."""

import importlib

import pytest
import torch
from helpers import METHODS, ROOT, equal, fork
from pretend import pretended
from torch import nn

import backbones
import byol
import memory
import moco
import simclr

GIB, VIEWS = 2**30, [{"size": 32}] * 2


def tiny(model, *args):
    torch.manual_seed(0)
    return model(backbones.build("resnet10_16", 32), *args).to(memory_format=torch.channels_last)


def counted(model, images, amp):
    """Bytes that a pass over real tensors keeps, counted by the addresses of the storages."""
    views, found = [torch.rand(images, 3, 32, 32).contiguous(memory_format=torch.channels_last) for _ in VIEWS], {}
    keep = lambda t: found.update({t.untyped_storage().data_ptr(): t}) or t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", enabled=amp):
        loss = model(views)
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), *views]}
    assert loss.requires_grad
    return sum(t.untyped_storage().nbytes() for address, t in found.items() if address not in known)


# ============ the estimate ============


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("model", [byol.BYOL, simclr.SimCLR])
def test_the_estimate_is_the_count(model, amp):
    """But for the mean and deviation of each channel, which BatchNorm keeps in training."""
    model, passes = tiny(model, 64, 32), 2 if model is byol.BYOL else 1
    norms = [m for name, m in model.named_modules() if "BatchNorm" in type(m).__name__ and "target" not in name]
    estimate = memory.bytes_kept(model, VIEWS, 16, amp)
    assert counted(model, 16, amp) - estimate == passes * sum(8 * m.num_features for m in norms)


def test_nothing_of_the_model_changes():
    model = tiny(moco.MoCo, 64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert memory.bytes_kept(model, VIEWS, 8, True) > 0
    assert equal(before, model.state_dict()) and not model.seen and not model.figures


def test_a_large_batch_costs_no_more_than_a_small_one():
    """It has no values; 10^5 images of 32 px would take 16 GiB."""
    small, large = (memory.bytes_kept(tiny(byol.BYOL, 64, 32), VIEWS, n, True) for n in (1000, 100_000))
    assert large > 15 * GIB and large / small == pytest.approx(100, rel=0.01)


def test_what_is_held_besides():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False).requires_grad_(False))
    model.register_buffer("bank", torch.zeros(50))
    sgd, adam = (make([model[0].weight], lr=0.1) for make in (torch.optim.SGD, torch.optim.AdamW))
    assert memory.bytes_held(model, [sgd]) == 4 * (200 + 50 + 100 + 100)
    assert memory.bytes_held(model, [adam]) == 4 * (200 + 50 + 100 + 200)


# ============ the recipe line ============

FLAGS = {"sage": ["--evaluator", "random:resnet10_16"], "pretext": ["--task", "jigsaw", "--arch", "revnet14_k4"]}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_what_it_needs(method, few_shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sage.Evaluator.calibrate", None)  # at 224 px gigabytes and minutes on a CPU
    flags = ["--device", "cuda", "--dry-run", "--limit", "64", "--data", "shapes", "--out", str(tmp_path / "run")]
    with pretended(8) as seen:
        importlib.import_module(method).main([*flags, *FLAGS.get(method, [])])
    assert not any("memory.py" in wait for wait in seen.steps[0][0])
    assert "memory: about 0." in (out := capsys.readouterr().out) and "0.0 MiB an image" not in out


def test_a_cpu_says_it_before_a_run_on_gpus_only(few_shapes, tmp_path, capsys):
    flags = ["--device", "cpu", "--limit", "32", "--batch-size", "16", "--epochs", "1", "--probes", "--out"]
    byol.main([*flags, str(tmp_path), "--dry-run", "--no-amp"])
    full = capsys.readouterr().out.split("memory: ")[1]
    byol.main([*flags, str(tmp_path), "--dry-run"])
    half = capsys.readouterr().out.split("memory: ")[1]
    each = lambda line: float(line.split(", ")[1].split()[0])
    assert each(half) < each(full)  # GPUs have bf16, whatever this CPU has
    byol.main([*flags, str(tmp_path)])
    assert "memory" not in capsys.readouterr().out


def test_a_network_that_needs_values_trains_without_an_estimate(few_shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(byol.BYOL, "forward", lambda self, views: views[0][views[0] > 0].sum())
    byol.main(["--device", "cpu", "--dry-run", "--out", str(tmp_path), "--limit", "64"])
    assert "memory: not known (" in capsys.readouterr().out


# ============ what does not fit ============


@pytest.mark.parametrize(("gib", "flags", "advice"), [
    (79, "", None), (100, "--compile", None), (100, "", "--accumulate 2 fits"), (200, "", "--accumulate 4 fits"),
    (600, "", "--accumulate 8 fits"), (641, "", "lower --size"), (100, "--accumulate 4", "--accumulate 8 fits"),
])  # fmt: skip
def test_a_batch_that_does_not_fit_is_refused(gib, flags, advice, few_shapes, tmp_path, monkeypatch, refused, capsys):
    """Of 16 images: 3 passes do not divide them, 16 leave BatchNorm one image."""
    monkeypatch.setattr(memory, "bytes_kept", lambda *_, **__: gib * GIB)
    words = f"--device cuda --dry-run --limit 32 --batch-size 16 {flags} --out {tmp_path / 'run'}".split()
    with pretended(memory=80 * GIB):
        if not advice:
            assert byol.main(words) is None and f"{gib}.0 of it kept" in capsys.readouterr().out
            return
        err = refused(lambda: byol.main(words))
    assert advice in err and f"{gib}.0 GiB do not fit this GPU's 80.0" in err and not (tmp_path / "run").exists()


# ============ the table ============


def test_the_table_of_the_page_is_what_the_command_prints():
    """One row: all take minutes."""
    process = fork("benchmarks/memory.py", "--methods", "moco")
    out, err = process.communicate(timeout=120)
    row = out.splitlines()[-1]
    assert process.returncode == 0 and row.startswith("| `moco.py` | 32 | "), err
    page = (ROOT / "docs/scale.md").read_text()
    assert row in page and out.splitlines()[0] in page
    assert all(f"| `{method}.py` |" in page for method in METHODS)


def test_other_methods_ranks_and_flags():
    words = ["--methods", "simclr", "cpc", "--recipe", "shapes", "--gpus", 4, "--flags=--accumulate=2"]
    out, err = fork("benchmarks/memory.py", *words).communicate(timeout=120)
    assert [line.split(" | ")[:2] for line in out.splitlines()[2:]] == [
        ["| `simclr.py`", "2 x 8"], ["| `cpc.py`", "2 x 8"]
    ], err  # fmt: skip
