"""The run folder: checkpoints, resume that refuses what does not fit, and logs.

    checkpoint.pt        all that is needed to go on (checkpoint.prev.pt: the one before it)
    backbone.pt          the representation: what evaluate.py and other programs read
    metrics.jsonl        one JSON object per log line and probe; the same numbers as TensorBoard events beside it
    run.lock             held by the process that trains

All files of torch.save hold tensors and plain values only and load with weights_only=True. A run replaces only files of
its own; only --fresh deletes, by their names (`OWN`), and nothing else in the folder.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import pickle
import re
import resource
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import save_image
from tqdm import tqdm

from common import any_rank, fail, rank, world_size

# What a run and its evaluation write; the last line is TensorBoard's projector.
OWN = re.compile(
    r"(checkpoint(\.prev)?\.pt|backbone\.pt|features-backbone-.+-(train|test)-[0-9a-f]{16}\.pt|metrics\.jsonl|"
    r"evaluate\.json|(views|reconstructions|neighbors|gradients|swap|detections|segmentation)\.png|schedule\.csv|"
    r"events\.out\.tfevents\..+\.run|projector_config\.pbtxt)(\.tmp)?|"
    r"\d{5,}(/default(/(tensors\.tsv|metadata\.tsv|sprite\.png))?)?"
)


def reason(error):
    """The first line of what an exception says."""
    return (str(error) or type(error).__name__).splitlines()[0]


def replace(path, write_to, sync=True):
    """Let `write_to(f)` write a binary file beside `path`, then rename it: `path` is the whole old or the whole new
    file whenever the process dies (with `sync`: or the machine). OSError for a full disk, say."""
    aside = Path(f"{path}.tmp")
    try:
        with open(aside, "wb") as f:
            write_to(f)
            f.flush()
            if sync:
                os.fsync(f.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save fails once more at its end
        if not isinstance(cause, OSError):
            raise
        with contextlib.suppress(OSError):
            aside.unlink()
        raise cause from None


def put(path, write_to, sync=True):
    """`replace`; where that fails the program ends with exit code 2."""
    try:
        replace(path, write_to, sync)
    except OSError as error:
        fail(f"could not write {path} ({reason(error)}); what was there before is intact")


def write(path, content):
    """A file of torch.save."""
    put(path, lambda f: torch.save(content, f))


def write_text(path, text):
    """A text file in UTF-8."""
    put(path, lambda f: f.write(text.encode()))


def write_picture(path, picture):
    """A float [3, H, W] in [0, 1] as a PNG."""
    put(path, lambda f: save_image(picture, f, format="png"))


def save(out, content):
    """OUT/checkpoint.pt; the one before it stays as OUT/checkpoint.prev.pt. Rank 0 only."""
    new, last = Path(out, "checkpoint.new.pt"), Path(out, "checkpoint.pt")  # new is not in OWN: see `clear`
    write(new, content)
    if last.exists():
        os.replace(last, Path(out, "checkpoint.prev.pt"))
    os.replace(new, last)


def load(path, *names):
    """A dict with all `names` from a file of torch.save, read as data, never executed. EOFError if it is damaged."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise EOFError(f"{path} is damaged, or holds other things than tensors and plain values") from error
    except Exception as error:  # a flipped bit makes the reader raise whatever it likes
        raise EOFError(f"{path} is damaged: {reason(error)}") from error
    if not isinstance(content, dict):
        fail(f"{path} is not a checkpoint: it holds no dict")
    if missing := sorted(set(names) - content.keys()):
        fail(f"{path} is not a checkpoint of this code: it has no {', '.join(missing)}")
    return content


def resume(out, method, settings, states, fresh=False, changed_data=False):
    """Load the run in the folder `out` into `states`, {name: model or optimizer}: (updates made, result or None), or
    (0, None) for a new run. Collective.

    If the last checkpoint is damaged, the one before it is used. A folder in use by another process, files of another
    origin, other settings, other training images (unless `changed_data`) and states that do not fit end the program.
    """
    if rank() == 0:
        lock(out)
    found, damaged = None, []
    for path in () if fresh else (Path(out, "checkpoint.pt"), Path(out, "checkpoint.prev.pt")):
        if not found and path.exists():
            try:
                found, origin = load(path, "method", "settings", "step", "result", *states), path
            except EOFError as error:
                damaged.append(str(error))
    if damaged and not found:
        fail(f"{'; '.join(damaged)}; choose another --out, or --fresh to start over")
    for error in damaged:
        print(f"warning: {error}; going on from the one before it", file=sys.stderr, flush=True)
    if found:
        check_same(out, found, method, settings, changed_data)
        for name, state in states.items():
            try:
                state.load_state_dict(found[name])
            except (RuntimeError, ValueError, KeyError) as error:  # the code of the method has changed
                fail(f"{origin} does not fit this command: {name}: {' '.join(str(error).split())[:300]}")
    elif rank() == 0:
        clear(out, fresh)
    step, result = (found["step"], found["result"]) if found else (0, None)
    if dist.is_initialized():
        dist.all_gather_object(everywhere := [None] * world_size(), (bool(found), step, result))
        if len(set(everywhere)) > 1:
            fail(f"the ranks found different checkpoints in {out}, which all machines must share")
    return step, result


LOCKS = []  # open files, as long as the process lives


def lock(out):
    """Make the folder and lock it, or refuse it while another process trains in it. fcntl.lockf, unlike flock, is not
    inherited by forked loader workers: the lock ends with this process, however that ends."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        LOCKS.append(open(Path(out, "run.lock"), "a"))  # noqa: SIM115
        fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process trains in {out}: wait for its end, or choose another --out")
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            fail(f"--out {out}: {reason(error)}")
        print(f"warning: {out} cannot be locked ({reason(error)}); start no second run in it", file=sys.stderr)


def clear(out, fresh):
    """Before a run begins: `fresh` deletes what an older one wrote; otherwise such files are refused (but for
    checkpoint.new.pt, all that a run leaves which is killed in its first save)."""
    found = [path.relative_to(out) for depth in ("*", "*/*", "*/*/*") for path in Path(out).glob(depth)]
    own = [path for path in found if OWN.fullmatch(path.as_posix())]
    if own and not fresh:
        fail(f"{out} holds {', '.join(map(str, own))} but no checkpoint: another --out, or --fresh to delete them")
    for path in reversed(own):  # what is in a folder before the folder
        try:
            Path(out, path).rmdir() if Path(out, path).is_dir() else Path(out, path).unlink()
        except OSError as error:
            fail(f"--fresh: {path} cannot be deleted ({reason(error)})")


SIZED = {"epochs", "arch", "batch_size", "queue", "negatives"}  # what may follow from the number of images


def check_same(out, found, method, settings, changed_data):
    """Refuse to go on with a run of another method, of other settings, or of other training images."""
    if found["method"] != method:
        fail(f"{out} holds a run of {found['method']}, not of {method}; choose another --out")
    was, ways = found["settings"], "choose another --out, or --fresh to start over"
    changed = {k: f"{k} {was.get(k)} -> {settings.get(k)}" for k in sorted({*was, *settings})
               if repr(was.get(k)) != repr(settings.get(k))}  # fmt: skip
    data_changed = changed.keys() & {"images", "contents"}
    if others := changed.keys() - data_changed - (SIZED if data_changed else set()):
        listed = ", ".join(changed[k] for k in sorted(others))
        why = "; a run cannot be made longer, as its rates follow from --epochs" if "epochs" in others else ""
        fail(f"{out} holds a run with other settings ({listed}){why}; {ways}")
    if data_changed and not changed_data:
        what = changed.get("images", "files or labels are others")
        fail(f"the training images of {out} have changed ({what}): --changed-data goes on with them; or {ways}")


def stop_unless_finite(finite, what, step, lr, amp):
    """Stop all ranks if `what` is not finite on one; the last checkpoint stays as it is. Collective."""
    if any_rank(not finite):
        where = f"the {what} is not finite at step {step} (lr {lr:.3g}, {'bf16' if amp else 'fp32'})"
        sys.exit(f"error: {where}; the last good checkpoint stays: lower --lr, warm up longer{', try --no-amp' * amp}")


class Log:
    """metrics.jsonl, TensorBoard and the progress bar of a run. Every rank has one; only rank 0 writes. On resume,
    lines of steps that will be repeated are dropped."""

    def __init__(self, out, name, step, total, batch_size, text):
        self.out, self.rank, self.batch_size = Path(out), rank(), batch_size
        self.warned, self.last_line = False, time.perf_counter()
        self.bar = tqdm(total=total, initial=step, desc=name, unit="step", disable=None if self.rank == 0 else True)
        self.start_interval(step)
        if self.rank == 0:
            file = self.out / "metrics.jsonl"
            lines = file.read_text(errors="replace").splitlines() if file.exists() else []
            write_text(file, "".join(line + "\n" for line in lines if self.stays(line, step)))
            self.writer = SummaryWriter(out, purge_step=step + 1, filename_suffix=".run")
            self.writer.add_text("recipe", text, step)

    @staticmethod
    def stays(line, step):
        """Whether a logged line is kept when the run goes on from `step`, which begins with a probe; not a torn one."""
        try:
            line = json.loads(line)
        except ValueError:
            return False
        return line["step"] < step or (line["step"] == step and "loss" in line)

    def start_interval(self, step):
        """What `train` logs is summed up, and timed, from here on."""
        self.loss, self.step, self.clock = 0.0, step, time.perf_counter()

    def train(self, step, lr, amp, waited, **numbers):
        """Log the steps since the last call, which waited so many seconds for data; stops a run whose loss is not
        finite. The only synchronization with the device in a step. Collective."""
        numbers = {k: float(v) for k, v in numbers.items()}
        loss, seconds = float(self.loss) / (step - self.step), time.perf_counter() - self.clock
        stop_unless_finite(math.isfinite(loss), "loss", step, lr, amp)
        rate, wait = self.batch_size * (step - self.step) / seconds, waited / seconds
        line = f"loss {loss:.3f}, {rate:.0f} img/s, data wait {wait:.0%}"
        self.bar.set_postfix_str(line)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and time.perf_counter() > self.last_line + 60:  # not a terminal: a line a minute
            self.last_line = time.perf_counter()
            self.say(f"step {step} of {self.bar.total}: {line}")
        if numbers.get("feature_std", 1) < 0.05 and not self.warned:
            self.warned, std = True, f"feature std {numbers['feature_std']:.3f} of 1 at step {step}"
            self.say(f"warning: collapse, {std}: try a lower --lr, and check that no gradient reaches the targets")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
        memory = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_initialized() else peak
        numbers = {"images_per_second": rate, "data_wait": wait, "memory_mb": memory, **numbers}
        self.record("train", step, loss=loss, lr=lr, **numbers)
        self.start_interval(step)

    def record(self, kind, step, **numbers):
        """One JSON line, and scalars `kind`/NAME for TensorBoard."""
        if self.rank == 0:
            try:
                with open(self.out / "metrics.jsonl", "a") as f:
                    f.write(json.dumps({"step": step, **numbers}) + "\n")
            except OSError as error:
                fail(f"could not write {self.out / 'metrics.jsonl'} ({reason(error)}); the last checkpoint is intact")
            for name in numbers.keys() - {"epoch"}:
                self.writer.add_scalar(f"{kind}/{name}", numbers[name], step)

    def image(self, name, picture, step=0):
        """A float [3, H, W] in [0, 1] for TensorBoard, and as OUT/NAME.png, which the next of that name replaces."""
        if self.rank == 0:
            self.writer.add_image(name, picture, step)
            write_picture(self.out / f"{name}.png", picture)

    def say(self, text):
        """Print a line without breaking the progress bar; rank 0 only."""
        if self.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()
