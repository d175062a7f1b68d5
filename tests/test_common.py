import contextlib
import errno
import importlib
import multiprocessing as mp
import os
import pickle
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import METHODS, ROOT, equal
from torch import nn

import common
import evaluate
import optim
import runs
from downstream import dense


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


# ============ workers ============


@pytest.mark.parametrize(("cores", "processes", "workers"), [
    (1, 1, 1), (2, 1, 2), (4, 1, 4), (5, 1, 4), (8, 1, 7), (64, 1, 16), (2, 8, 1), (96, 8, 11), (192, 8, 16),
])  # fmt: skip
def test_loader_workers_leave_a_core_where_there_are_many(cores, processes, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert common.default_workers() == workers
    parsed = [importlib.import_module("byol").parse_args([]), evaluate.flags("").parse_args(["x"]),
              dense.flags("", {}).parse_args(["x"])]  # fmt: skip
    assert [args.workers for args in parsed] == [workers] * 3


# ============ LARS and schedules ============


def test_lars_equals_a_hand_calculation():
    w = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    b = nn.Parameter(torch.tensor([1.0]))
    groups = [{"params": [w], "weight_decay": 0.5}, {"params": [b], "weight_decay": 0.0, "adapt": False}]
    optimizer = optim.LARS(groups, lr=2.0, momentum=0.9, eta=0.1)
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
    optimizer, expected = optim.LARS([w], lr=0.0, eta=0.1, inside=True), w.detach().clone()
    for lr in (2.0, 1.0, 0.0):
        optimizer.param_groups[0]["lr"], w.grad = lr, u.clone()
        optimizer.step()
        v = 0.9 * v + lr * 0.1 * expected.norm() / u.norm() * u
        expected = expected - v
    assert torch.allclose(w, expected, atol=1e-6)


def test_lars_keeps_its_hands_off_zero_norms():
    w = nn.Parameter(torch.zeros(2, 2))
    w.grad = torch.ones(2, 2)
    optim.LARS([w], lr=0.1).step()
    assert torch.allclose(w, torch.full((2, 2), -0.1))  # q = 1, or a zero tensor could never move


def test_lars_without_adaptation_is_torchs_sgd():
    ours, theirs = small(), small()
    a = optim.LARS([{"params": list(ours.parameters()), "adapt": False}], lr=0.1, weight_decay=0.01)
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
    weights, rest = optim.param_groups(small(), 0.1, lr_factor=3.0)
    assert [tuple(p.shape) for p in weights["params"]] == [(3, 4), (2, 3)]
    assert len(rest["params"]) == 4 and rest["weight_decay"] == 0 and not rest["adapt"]
    assert weights["weight_decay"] == 0.1 and weights["lr_factor"] == rest["lr_factor"] == 3.0


def test_cosine_at_known_steps():
    lr = [optim.cosine(k, 110, 4.8, 0.0, 10) for k in (0, 5, 10, 60, 110)]
    assert lr == pytest.approx([0.0, 2.4, 4.8, 2.4, 0.0])
    tau = [optim.cosine(k, 100, 0.99, 1.0) for k in (0, 50, 100)]  # 1 - (1 - tau_0) (cos(pi k / K) + 1) / 2
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
        common.CAUGHT.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


# ============ a signal, a parent's end, a lack of memory ============


def test_before_training_a_signal_ends_the_process_at_once(capsys):
    before = {s: signal.getsignal(s) for s in common.SIGNALS}
    try:
        common.setup("cpu")
        for number in common.SIGNALS:
            common.end_at_signals()
            with pytest.raises(SystemExit) as stop:
                os.kill(os.getpid(), number)
            assert stop.value.code == common.STOPPED == 85
            assert capsys.readouterr().err.startswith(f"stopped by {number.name}; the same command")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def alive(pid):
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def forked(first, *args):
    """(process, pid): `first(*args)` in a process that then forks one, as loader workers are, and `then` in that."""
    fork = mp.get_context("fork")
    receive, send = fork.Pipe(False)
    process = fork.Process(target=first, args=(send, *args))
    process.start()
    assert receive.poll(60)
    return process, receive.recv()


def fork_and_wait(send, then=lambda: None):
    if not (pid := os.fork()):
        then()
        time.sleep(60)
        os._exit(0)
    send.send(pid)
    time.sleep(60)


def watched():
    common.end_with_parent.cache_clear()
    common.end_with_parent()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked at in /proc")
@pytest.mark.parametrize("then", [watched, lambda: None])
def test_a_process_ends_with_the_one_that_started_it(then):
    process, pid = forked(fork_and_wait, then)
    process.kill()
    process.join()
    ends = time.monotonic() + (10 if then is watched else 2)
    while alive(pid) and time.monotonic() < ends:
        time.sleep(0.1)
    survived = alive(pid)
    if survived:
        os.kill(pid, signal.SIGKILL)
    assert survived == (then is not watched)


@pytest.mark.parametrize(("name", "watches"), [("RANK", True), ("END_WITH_PARENT", True), ("HOME", False)])
def test_processes_of_torchrun_and_of_programs_that_start_runs_are_watched(name, watches, monkeypatch):
    """Those of a person are not: the parent is a shell, which may go."""
    calls = []
    monkeypatch.setattr(common, "end_with_parent", lambda: calls.append(1))
    for started in ("init_process_group", "new_group"):
        monkeypatch.setattr(common.dist, started, lambda *_, **__: None)
    monkeypatch.setattr(common, "end_at_signals", lambda: None)
    for variable in ("RANK", "END_WITH_PARENT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, "0")
    common.setup("cpu")
    assert len(calls) == watches


class Killed(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        os.kill(os.getpid(), signal.SIGKILL)


def no_shared_memory():
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def python_memory():
    raise MemoryError


@pytest.mark.parametrize(("lack", "words"), [
    (lambda: torch.empty(2**50), "memory ran out: lower --batch-size"),
    (lambda: nn.Conv2d(2**20, 2**20, 3), "memory ran out"),
    (python_memory, "memory ran out"),
    (lambda: list(torch.utils.data.DataLoader(Killed(), num_workers=1)), "lower --workers"),
    (no_shared_memory, "/dev/shm is too small for the loader workers: --workers 0"),
])  # fmt: skip
def test_what_the_machine_lacks_is_one_sentence(lack, words, capsys):
    with pytest.raises(SystemExit) as stop:
        common.run(lack)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and len(err.splitlines()) == 1 and err.startswith("error: ")


@pytest.mark.parametrize(("flags", "advice"), [
    ("", "--accumulate 2,"), ("--accumulate 2", "--accumulate 4,"), ("--accumulate=8 --lr 1", "--accumulate 16,"),
])  # fmt: skip
def test_lack_of_memory_names_twice_the_passes(flags, advice, monkeypatch, capsys):
    def lack():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(sys, "argv", ["byol.py", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        common.run(lack)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and advice in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("words", [
    "mat1 and mat2 shapes cannot be multiplied",
    "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback ... shapes cannot be multiplied",
    "out of resource: shared memory, Required: 233472",
])  # fmt: skip
def test_other_errors_stay_what_they_are(words, tmp_path):
    def mistake(*_):
        raise RuntimeError(words)

    with pytest.raises(RuntimeError):
        common.run(mistake)
    with pytest.raises(RuntimeError):  # and are no full disk
        runs.put(tmp_path / "file", mistake)


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (85, 85)])
def test_what_main_returns_is_the_exit_code(returned, code):
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: returned)
    assert stop.value.code == code


def test_a_missing_accelerator_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "mps"):
        with pytest.raises(SystemExit) as stop:
            common.setup(device)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith(f"error: --device {device}") and len(err.splitlines()) == 1


# ============ what is written ============

WRITERS = {
    "write": lambda path, n: runs.write(path, {"x": torch.full((n,), 1.0)}),
    "write_text": lambda path, n: runs.write_text(path, "x" * 4 * n),
    "write_picture": lambda path, n: runs.write_picture(path, torch.rand(3, n // 100, 100)),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=list(WRITERS))
def test_a_full_disk_leaves_the_old_file(writer, tmp_path, capsys):
    path = tmp_path / "file"
    writer(path, 1000)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 1000, hard))  # writes beyond it fail, as on a full disk
    try:
        with pytest.raises(SystemExit) as stop:
            writer(path, 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stop.value.code == 2 and "could not write" in capsys.readouterr().err
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["file"]


def test_a_death_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    runs.write_text(path, "old")

    def half(f):
        f.write(b"ne")
        f.flush()
        raise KeyboardInterrupt  # like a kill: nothing of what follows happens

    with pytest.raises(KeyboardInterrupt):
        runs.put(path, half)
    assert path.read_text() == "old"
    runs.write_text(path, "new")  # what was left aside is no obstacle
    assert path.read_text() == "new"


def test_what_cannot_be_written_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        runs.write_text(tmp_path / "no" / "such" / "folder", "text")
    assert stop.value.code == 2 and "could not write" in capsys.readouterr().err


@pytest.mark.parametrize("script", [*METHODS, "training", "loop", "downstream/detect", "downstream/segment"])
def test_scripts_write_only_what_is_renamed(script):
    text = (ROOT / f"{script}.py").read_text()
    assert "torch.save" not in text and "write_bytes" not in text and "save_image" not in text
    assert ('runs.write(Path(self.args.out, "backbone.pt"), ' in text) == (script == "training")


# ============ checkpoints ============


def small_states():
    model = small()
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}


def checkpoint(step, states=None, **settings):
    states = {name: state.state_dict() for name, state in (states or small_states()).items()}
    return {"method": "m", "settings": settings, "step": step, "result": None, **states}


def trained():
    """Small states after a step, so that the optimizer has averages."""
    states = small_states()
    states["model"](torch.ones(4, 4)).sum().backward()
    states["optimizer"].step()
    return states


def resume(out, method="m", settings=None, states=None, **flags):
    return runs.resume(out, method, settings or {}, states or small_states(), **flags)


def refused(capsys, *words):
    """A context in which the program must end with exit code 2 and one sentence with these words."""

    @contextlib.contextmanager
    def context():
        with pytest.raises(SystemExit) as stop:
            yield
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1, err
        assert all(word in err for word in words), err

    return context()


def test_save_keeps_the_one_before(tmp_path):
    runs.save(tmp_path, checkpoint(1))
    runs.save(tmp_path, checkpoint(2))
    assert runs.load(tmp_path / "checkpoint.pt")["step"] == 2
    assert runs.load(tmp_path / "checkpoint.prev.pt")["step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.prev.pt", "checkpoint.pt"]


def test_resume_fills_the_states(tmp_path):
    states, others = trained(), small_states()
    runs.save(tmp_path, checkpoint(7, states))
    assert resume(tmp_path, states=others) == (7, None)
    assert equal(others["model"].state_dict(), states["model"].state_dict())
    assert equal(others["optimizer"].state_dict()["state"], states["optimizer"].state_dict()["state"])


def test_truncated_checkpoint_falls_back(tmp_path, capsys):
    runs.save(tmp_path, checkpoint(1))
    runs.save(tmp_path, checkpoint(2))
    path = tmp_path / "checkpoint.pt"
    for keep in (0, 10, path.stat().st_size // 2):
        path.write_bytes(path.read_bytes()[:keep])
        assert resume(tmp_path) == (1, None)
        assert "damaged" in capsys.readouterr().err
    path.unlink()  # killed between the two renames of save
    assert resume(tmp_path) == (1, None)
    path.write_bytes(bytes(1000))  # as after a power failure
    assert resume(tmp_path) == (1, None) and "damaged" in capsys.readouterr().err


class Trap:
    def __reduce__(self):
        return os.system, ("touch trapped",)


def test_a_pickle_is_refused_and_never_executed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for write in (lambda f: pickle.dump(Trap(), f), lambda f: torch.save({"method": "m", "x": Trap()}, f)):
        with open("checkpoint.pt", "wb") as f:
            write(f)
        with refused(capsys, "other things than tensors"):
            resume(".")
        assert not os.path.exists("trapped")


def test_other_settings_and_other_methods_are_refused(tmp_path, capsys):
    runs.save(tmp_path, checkpoint(1, lr=0.1, seed=0))
    assert resume(tmp_path, settings={"lr": 0.1, "seed": 0}) == (1, None)
    with refused(capsys, "lr 0.1 -> 0.2", "--out", "--fresh"):
        resume(tmp_path, settings={"lr": 0.2, "seed": 0})
    with refused(capsys, "epochs None -> 6", "cannot be made longer"):
        resume(tmp_path, settings={"lr": 0.1, "seed": 0, "epochs": 6})
    with refused(capsys, "run of m"):
        resume(tmp_path, "n", {"lr": 0.2, "seed": 0})
    assert resume(tmp_path, "n", fresh=True) == (0, None)


def test_other_training_images_are_refused_unless_asked_for(tmp_path, capsys):
    runs.save(tmp_path, checkpoint(1, images=10, contents="a"))
    for images, contents, words in ((12, "b", "images 10 -> 12"), (10, "b", "files or labels are others")):
        settings = {"images": images, "contents": contents}
        with refused(capsys, words, "--changed-data"):
            resume(tmp_path, settings=settings)
        assert resume(tmp_path, settings=settings, changed_data=True) == (1, None)
        sized = settings | {"epochs": 95, "batch_size": 10}  # as they follow from the number of images
        with refused(capsys, words, "--changed-data"):
            resume(tmp_path, settings=sized)
        assert resume(tmp_path, settings=sized, changed_data=True) == (1, None)
        with refused(capsys, "other settings", "lr"):
            resume(tmp_path, settings=sized | {"lr": 1}, changed_data=True)


MALFORMED = {
    **{f"no {k}": lambda c, k=k: c.pop(k) for k in ("method", "settings", "step", "result", "model", "optimizer")},
    "model of other shapes": lambda c: c["model"].update({"0.weight": torch.ones(7)}),
    "model empty": lambda c: c.update(model={}),
    "model with more": lambda c: c["model"].update(zebra=torch.ones(1)),
    "optimizer empty": lambda c: c.update(optimizer={}),
    "optimizer of other groups": lambda c: c["optimizer"].update(param_groups=[]),
}


@pytest.mark.parametrize("spoil", MALFORMED.values(), ids=list(MALFORMED))
def test_a_checkpoint_of_other_code_is_one_sentence(spoil, tmp_path, capsys):
    content = checkpoint(2, trained())
    spoil(content)
    runs.write(tmp_path / "checkpoint.pt", content)
    with refused(capsys, "checkpoint.pt"):
        resume(tmp_path)


def test_flipped_bits_raise_one_kind_of_error(tmp_path):
    path = tmp_path / "checkpoint.pt"
    runs.write(path, checkpoint(1))
    whole, wrong = path.read_bytes(), 0
    start = whole.index(b"data.pkl")
    for i in range(start, start + 600, 3):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :])
        try:
            runs.load(path)
        except EOFError:
            wrong += 1
    assert wrong > 20


def test_two_damaged_checkpoints_are_not_a_fresh_start(tmp_path, capsys):
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        (tmp_path / name).write_bytes(b"PK\3\4 torn")
    with refused(capsys, "--fresh"):
        resume(tmp_path)


# ============ the folder ============

OWN = ["checkpoint.prev.pt", "backbone.pt", "backbone.pt.tmp", "features-backbone-shapes-train-0123456789abcdef.pt",
       "views.png", "metrics.jsonl", "evaluate.json", "reconstructions.png", "neighbors.png", "gradients.png",
       "swap.png", "schedule.csv",
       "events.out.tfevents.1700000000.host.123.0.run", "projector_config.pbtxt"]  # fmt: skip
FOREIGN = ["checkpoint_0199.pth.tar", "checkpoint-best.pt", "checkpoints.pt.zip", "events.out.tfevents.1.other",
           "events.out.d", "features-backbone-mine.pt", "backbone.pth", "mine.pt", "notes.txt",
           "myviews.png"]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in OWN if name != "checkpoint.prev.pt"])
def test_a_first_start_touches_no_file_of_others(name, tmp_path, capsys):
    (tmp_path / name).write_text("precious")
    with refused(capsys, name, "--out", "--fresh"):
        resume(tmp_path)
    assert (tmp_path / name).read_text() == "precious"


def test_other_names_are_nobodys_business(tmp_path):
    for name in [*FOREIGN, "checkpoint.new.pt", "checkpoint.new.pt.tmp"]:  # the last two: killed in the first `save`
        (tmp_path / name).write_text("precious")
    assert resume(tmp_path) == (0, None)
    runs.save(tmp_path, checkpoint(0))
    assert all((tmp_path / name).read_text() == "precious" for name in FOREIGN)


def test_a_fresh_start_deletes_exactly_what_runs_write(tmp_path):
    for name in ["checkpoint.pt", *OWN, *FOREIGN]:
        (tmp_path / name).write_text("precious")
    assert resume(tmp_path, fresh=True) == (0, None)
    assert sorted(os.listdir(tmp_path)) == sorted([*FOREIGN, "run.lock"])


def test_what_a_run_writes_is_what_fresh_deletes(tmp_path):
    """From the names that a run really leaves: `OWN` lacks none of them."""
    argv = ["--limit", "32", "--batch-size", "16", "--epochs", "1", "--device", "cpu", "--no-amp", "--probes", "knn"]
    importlib.import_module("byol").main([*argv, "--out", str(tmp_path)])
    written = {p.name for p in tmp_path.iterdir() if p.is_file()} - {"run.lock"}
    wanted = {"checkpoint.pt", "checkpoint.prev.pt", "backbone.pt", "metrics.jsonl", "evaluate.json", "views.png"}
    assert wanted <= written
    assert all(runs.OWN.fullmatch(name) for name in written)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with refused(capsys, "--out"):
        resume(tmp_path / "file" / "run")


def test_the_embeddings_folder_is_refused_and_only_what_is_ours_in_it_goes(tmp_path, capsys):
    place = tmp_path / "00003" / "default"
    place.mkdir(parents=True)
    (place / "tensors.tsv").write_text("precious")
    with refused(capsys, "00003", "--fresh"):
        resume(tmp_path)
    assert (place / "tensors.tsv").read_text() == "precious"
    assert resume(tmp_path, fresh=True) == (0, None) and not place.parent.exists()
    place.mkdir(parents=True)
    (place / "mine").write_text("precious")
    with refused(capsys, "00003"):
        resume(tmp_path, fresh=True)
    assert (place / "mine").read_text() == "precious"


def hold(send, out):
    runs.lock(out)
    fork_and_wait(send)


def test_a_second_process_is_refused_and_the_lock_dies_with_the_first(tmp_path, capsys):
    process, worker = forked(hold, tmp_path)
    with refused(capsys, "another process trains in"):
        resume(tmp_path)
    process.kill()
    process.join()
    assert resume(tmp_path) == (0, None)  # though what was forked from it still lives
    os.kill(worker, signal.SIGKILL)


def test_a_file_system_without_locks_is_warned_of(tmp_path, capsys, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runs.fcntl, "lockf", no_locks)
    assert resume(tmp_path) == (0, None)
    assert f"warning: {tmp_path} cannot be locked" in capsys.readouterr().err
