"""The run folder: checkpoints that survive anything, resume that refuses what does not fit, and logs.

    checkpoint.pt        all that is needed to go on (checkpoint.prev.pt: the one before it)
    backbone.pt          the representation: what evaluate.py and other programs read
    metrics.jsonl        one JSON object per log line and probe; the same numbers as TensorBoard events beside it

All files of torch.save hold tensors and plain values only and load with weights_only=True.
"""

import contextlib
import json
import math
import os
import pickle
import sys
import time
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import save_image
from tqdm import tqdm

from common import any_rank, fail

try:
    import resource
except ImportError:  # Windows
    resource = None

# What a run writes, and all that a fresh start may delete.
OWN = (
    "checkpoint*.pt*",
    "backbone.pt*",
    "features-backbone-*.pt*",
    "metrics.jsonl",
    "evaluate.json",
    "views.png",
    "schedule.csv",
    "reconstructions.png",
    "events.out.*",
    "projector_config.pbtxt",
)


def reason(error):
    return (str(error) or type(error).__name__).splitlines()[0]


def put(path, fill):
    """Let `fill(f)` write the binary file f, and make it `path`: written aside, then renamed, so that `path` is whole, the old
    one or the new one, whenever the process dies. What cannot be written ends the program with exit code 2."""
    aside = Path(f"{path}.tmp")
    try:
        with open(aside, "wb") as f:
            fill(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch wraps a full disk in a RuntimeError
        with contextlib.suppress(OSError):
            aside.unlink()
        fail(f"could not write {path} ({reason(error)}); what was there before is intact")


def write(path, content):
    put(path, lambda f: torch.save(content, f))


def write_text(path, text):
    put(path, lambda f: f.write(text.encode(errors="surrogateescape")))  # names of files need not be UTF-8


def write_picture(path, picture):
    """A float [3, H, W] in [0, 1] as a PNG."""
    put(path, lambda f: save_image(picture, f, format="png"))


def save(out, content):
    """OUT/checkpoint.pt; the one before it stays as OUT/checkpoint.prev.pt. Rank 0 only."""
    write(Path(out, "checkpoint.new.pt"), content)
    if Path(out, "checkpoint.pt").exists():
        os.replace(Path(out, "checkpoint.pt"), Path(out, "checkpoint.prev.pt"))
    os.replace(Path(out, "checkpoint.new.pt"), Path(out, "checkpoint.pt"))


def load(path):
    """A dict from a file of torch.save, which is read as data and never executed. EOFError if the file is damaged."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        fail(f"{path} is refused, not executed: it holds something other than tensors and plain values")
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise EOFError(f"{path} is damaged: {reason(error)}") from error
    return content if isinstance(content, dict) else fail(f"{path} is not a checkpoint: it holds no dict")


def resume(out, method, settings, fresh=False):
    """The checkpoint to go on from, or None; the previous one if the last is damaged. Refuses a run of other settings."""
    found, damaged = None, []
    for path in () if fresh else (Path(out, "checkpoint.pt"), Path(out, "checkpoint.prev.pt")):
        if found is None and path.exists():
            try:
                found = load(path)
            except EOFError as error:
                damaged.append(str(error))
    if damaged and not found:
        fail(f"{'; '.join(damaged)}; nothing to go on from: choose another --out, or --fresh to start over")
    for error in damaged:
        print(f"warning: {error}; going on from the one before it", file=sys.stderr, flush=True)
    if found and found.get("method") != method:
        fail(f"{out} holds a run of {found.get('method', 'something else')}, not of {method}; choose another --out")
    was = found["settings"] if found else settings
    changed = [
        f"{k} {was.get(k)} -> {settings.get(k)}" for k in sorted({*was, *settings}) if was.get(k) != settings.get(k)
    ]
    if changed:
        fail(
            f"{out} holds a run with other settings ({', '.join(changed)}); choose another --out, or --fresh to start over"
        )
    return found


def stop_unless_finite(finite, what, step, lr, amp):
    """Every process must call it; the last checkpoint stays as it is."""
    if any_rank(not finite):
        sys.exit(
            f"error: the {what} is not finite at step {step} (lr {lr:.3g}, {'bf16' if amp else 'fp32'}); the last good "
            "checkpoint is kept. Try a lower --lr, a longer --warmup-epochs, or --no-amp"
        )


def memory_mb():
    """The most that this process has held at a time: tensors on its GPU, or else all of its memory (0: Windows)."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0
    return peak / (1e6 if sys.platform == "darwin" else 1e3)  # macOS counts bytes, Linux KiB


class Log:
    """metrics.jsonl, TensorBoard and the progress bar of a run. Every process has one; only rank 0 writes.

    On resume the lines of steps that will be made again are dropped, so that curves do not double back; a run that
    starts at step 0 clears what an older one left in the folder.
    """

    def __init__(self, out, name, step, total, batch_size, rank, text):
        self.out, self.rank, self.batch_size = Path(out), rank, batch_size
        self.warned, self.said = False, time.perf_counter()
        self.bar = tqdm(total=total, initial=step, desc=name, unit="step", disable=None if rank == 0 else True)
        self.start_interval(step)
        if rank == 0:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                fail(f"--out {out}: {reason(error)}")
            for old in (p for pattern in OWN if step == 0 for p in self.out.glob(pattern)):
                old.unlink()
            file = self.out / "metrics.jsonl"
            lines = file.read_text().splitlines() if file.exists() else []
            lines = [s for s in lines if s.endswith("}") and self.stays(json.loads(s), step)]
            write_text(file, "".join(s + "\n" for s in lines))
            self.writer = SummaryWriter(out, purge_step=step + 1)
            self.writer.add_text("recipe", text, step)

    @staticmethod
    def stays(line, step):
        """Whether a line of an earlier part of the run stays when it goes on from `step`, beginning with a probe."""
        return line["step"] < step or (line["step"] == step and "loss" in line)

    def start_interval(self, step):
        self.loss, self.step, self.wait, self.clock = 0.0, step, 0.0, time.perf_counter()

    def watch(self, batches):
        """The same batches; the time spent waiting for them is counted."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.wait += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def train(self, step, lr, amp, **numbers):
        """One line on the steps since the last. It reads from the device, which no other part of a step does, and stops
        a run whose loss is no longer finite. Every process must call it."""
        numbers = {k: float(v) for k, v in numbers.items()}
        loss, seconds = float(self.loss) / (step - self.step), time.perf_counter() - self.clock
        stop_unless_finite(math.isfinite(loss), "loss", step, lr, amp)
        rate, wait = self.batch_size * (step - self.step) / seconds, self.wait / seconds
        line = f"loss {loss:.3f}, {rate:.0f} img/s, data wait {wait:.0%}"
        self.bar.set_postfix_str(line)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and time.perf_counter() > self.said + 60:  # not a terminal: a line a minute
            self.said = time.perf_counter()
            self.say(f"step {step} of {self.bar.total}: {line}")
        if numbers.get("feature_std", 1) < 0.05 and not self.warned:
            self.warned = True
            self.say(f"warning: outputs are nearly constant at step {step}, feature std {numbers['feature_std']:.3f} of 1 "
                     "(collapse): try a lower --lr, and check that no gradient reaches the targets")  # fmt: skip
        numbers = {"images_per_second": rate, "data_wait": wait, "memory_mb": memory_mb(), **numbers}
        self.record("train", step, loss=loss, lr=lr, **numbers)
        self.start_interval(step)

    def record(self, kind, step, **numbers):
        """One JSON line, and scalars `kind`/NAME for TensorBoard."""
        if self.rank == 0:
            with open(self.out / "metrics.jsonl", "a") as f:
                f.write(json.dumps({"step": step, **numbers}) + "\n")
            for name, value in numbers.items():
                self.writer.add_scalar(f"{kind}/{name}", value, step)

    def image(self, name, picture, step=0):
        """A float [3, H, W] in [0, 1] for TensorBoard, and as OUT/NAME.png, which the next of that name replaces."""
        if self.rank == 0:
            self.writer.add_image(name, picture, step)
            write_picture(self.out / f"{name}.png", picture)

    def say(self, text):
        """A line on stdout that does not break the progress bar; rank 0 only."""
        if self.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()
