import json
import os
import pickle
import resource
import signal

import pytest
import torch
from conftest import run
from torch import nn

import common
import runs


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


# ============ LARS and schedules ============


def test_lars_equals_a_hand_calculation():
    w = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    b = nn.Parameter(torch.tensor([1.0]))
    groups = [{"params": [w], "weight_decay": 0.5}, {"params": [b], "weight_decay": 0.0, "adapt": False}]
    optimizer = common.LARS(groups, lr=2.0, momentum=0.9, eta=0.1)
    v = torch.zeros(1, 2)
    expected_w, expected_b, vb = w.detach().clone(), b.detach().clone(), 0.0
    for g, gb in ((torch.tensor([[1.0, 0.0]]), 0.5), (torch.tensor([[0.0, 2.0]]), -1.0)):
        w.grad, b.grad = g.clone(), torch.tensor([gb])
        optimizer.step()
        u = g + 0.5 * expected_w
        v = 0.9 * v + 0.1 * expected_w.norm() / u.norm() * u
        expected_w = expected_w - 2.0 * v
        vb = 0.9 * vb + gb
        expected_b = expected_b - 2.0 * vb
    assert torch.allclose(w, expected_w, atol=1e-6) and torch.allclose(b, expected_b, atol=1e-6)


def test_lars_with_the_rate_inside_the_buffer_equals_a_hand_calculation():
    """SimCLR's form; the rate changes, or both forms would be one."""
    w, u, v = torch.tensor([[3.0, 4.0]], requires_grad=True), torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2)
    optimizer, expected = common.LARS([w], lr=0.0, eta=0.1, inside=True), w.detach().clone()
    for lr in (2.0, 1.0, 0.0):
        optimizer.param_groups[0]["lr"], w.grad = lr, u.clone()
        optimizer.step()
        v = 0.9 * v + lr * 0.1 * expected.norm() / u.norm() * u
        expected = expected - v
    assert torch.allclose(w, expected, atol=1e-6)


def test_lars_keeps_its_hands_off_zero_norms():
    w = nn.Parameter(torch.zeros(2, 2))
    w.grad = torch.ones(2, 2)
    common.LARS([w], lr=0.1).step()
    assert torch.allclose(w, torch.full((2, 2), -0.1))  # q = 1, or a zero tensor could never move


def test_lars_without_adaptation_is_torchs_sgd():
    ours, theirs = small(), small()
    a = common.LARS([{"params": list(ours.parameters()), "adapt": False}], lr=0.1, weight_decay=0.01)
    b = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(5):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_param_groups_exclude_by_dimension():
    weights, rest = common.param_groups(small(), 0.1, lr_factor=3.0)
    assert [tuple(p.shape) for p in weights["params"]] == [(3, 4), (2, 3)]
    assert len(rest["params"]) == 4 and rest["weight_decay"] == 0 and not rest["adapt"]
    assert weights["weight_decay"] == 0.1 and weights["lr_factor"] == rest["lr_factor"] == 3.0


def test_cosine_at_known_steps():
    lr = [common.cosine(k, 110, 4.8, 0.0, 10) for k in (0, 5, 10, 60, 110)]
    assert lr == pytest.approx([0.0, 2.4, 4.8, 2.4, 0.0])
    tau = [common.cosine(k, 100, 0.99, 1.0) for k in (0, 50, 100)]  # 1 - (1 - tau_0) (cos(pi k / K) + 1) / 2
    assert tau == pytest.approx([0.99, 0.995, 1.0])


def test_three_signals_end_a_run_at_once():
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        caught = common.catch_signals()
        assert not caught
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(caught) == 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ============ checkpoints ============


def checkpoint(step, **settings):
    return {"method": "m", "settings": settings, "step": step, "weights": torch.ones(3)}


def test_save_keeps_the_one_before(tmp_path):
    runs.save(tmp_path, checkpoint(1))
    runs.save(tmp_path, checkpoint(2))
    assert runs.load(tmp_path / "checkpoint.pt")["step"] == 2
    assert runs.load(tmp_path / "checkpoint.prev.pt")["step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.prev.pt", "checkpoint.pt"]


def test_truncated_checkpoint_falls_back(tmp_path, capsys):
    runs.save(tmp_path, checkpoint(1))
    runs.save(tmp_path, checkpoint(2))
    path = tmp_path / "checkpoint.pt"
    for keep in (0, 10, path.stat().st_size // 2):
        path.write_bytes(path.read_bytes()[:keep])
        assert runs.resume(tmp_path, "m", {})["step"] == 1
        assert "damaged" in capsys.readouterr().err
    path.unlink()  # killed between the two renames of save
    assert runs.resume(tmp_path, "m", {})["step"] == 1


class Trap:
    def __reduce__(self):
        return os.system, ("touch trapped",)


def test_a_pickle_is_refused_and_never_executed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for write in (lambda f: pickle.dump(Trap(), f), lambda f: torch.save({"method": "m", "x": Trap()}, f)):
        with open("checkpoint.pt", "wb") as f:
            write(f)
        with pytest.raises(SystemExit) as stop:
            runs.resume(".", "m", {})
        assert stop.value.code == 2 and "refused" in capsys.readouterr().err
        assert not os.path.exists("trapped")


def test_other_settings_and_other_methods_are_refused(tmp_path, capsys):
    runs.save(tmp_path, checkpoint(1, lr=0.1, seed=0))
    assert runs.resume(tmp_path, "m", {"lr": 0.1, "seed": 0})["step"] == 1
    for method, settings, words in (
        ("m", {"lr": 0.2, "seed": 0}, "lr 0.1 -> 0.2"),
        ("n", {"lr": 0.1, "seed": 0}, "run of m"),
    ):
        with pytest.raises(SystemExit) as stop:
            runs.resume(tmp_path, method, settings)
        assert stop.value.code == 2 and words in capsys.readouterr().err
    assert runs.resume(tmp_path, "n", {}, fresh=True) is None


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, capsys):
    runs.save(tmp_path, checkpoint(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # writes beyond it fail, as on a full disk
    try:
        with pytest.raises(SystemExit) as stop:
            runs.save(tmp_path, checkpoint(2) | {"weights": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stop.value.code == 2 and "could not write" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert runs.load(tmp_path / "checkpoint.pt")["step"] == 1


def test_a_log_that_goes_on_drops_what_will_be_made_again(tmp_path):
    lines = [json.dumps({"step": s, "loss": 1.0}) for s in (0, 10, 20, 30)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 40, "lo')  # the last one torn by a kill
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('\n{"step": 20, "knn20": 50.0}\n')  # the probe at step 20 will be made again
    runs.Log(tmp_path, "m", 20, 100, 8, 0, "text").record("train", 25, loss=0.5)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 10, 20, 25]


def test_two_damaged_checkpoints_are_not_a_fresh_start(tmp_path, capsys):
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        (tmp_path / name).write_bytes(b"PK\3\4 torn")
    with pytest.raises(SystemExit) as stop:
        runs.resume(tmp_path, "m", {})
    assert stop.value.code == 2 and "--fresh" in capsys.readouterr().err


def test_a_fresh_start_deletes_only_what_a_run_writes(tmp_path):
    for name in ("checkpoint.pt", "checkpoint.prev.pt", "metrics.jsonl", "mine.pt", "notes.txt"):
        (tmp_path / name).write_text("")
    runs.Log(tmp_path, "m", 0, 100, 8, 0, "text")
    left = {p.name for p in tmp_path.iterdir() if not p.name.startswith("events.")}
    assert left == {"metrics.jsonl", "mine.pt", "notes.txt"}


def test_a_missing_gpu_is_one_sentence():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    _, err = run("byol.py", "--device", "cuda", code=2)
    assert err.startswith("error: ") and len(err.splitlines()) == 1
