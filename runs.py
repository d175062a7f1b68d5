"""The run folder: checkpoints that survive anything, resume that refuses what does not fit, and logs.

    checkpoint.pt        all that is needed to go on (checkpoint.prev.pt: the one before it)
    backbone.pt          the representation: what evaluate.py and other programs read
    metrics.jsonl        one JSON object per log line and probe; the same numbers as TensorBoard events beside it
    run.lock             held by the process that trains

All files of torch.save hold tensors and plain values only and load with weights_only=True. A run never touches files that it did
not write: checkpoint.pt is the first one, and only --fresh deletes, by exact name, what runs write.
"""

import contextlib
import json
import math
import os
import pickle
import re
import sys
import time
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import save_image
from tqdm import tqdm

from common import any_rank, fail, first_rank, same_everywhere

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None

# The names of the files that a run and its evaluation write, and of nothing else (not checkpoint.new.pt: see `save`).
OWN = re.compile(
    r"(checkpoint(\.prev)?\.pt|backbone\.pt|features-backbone-.+-(train|test)-[0-9a-f]{16}\.pt|metrics\.jsonl|"
    r"evaluate\.json|(views|reconstructions|neighbours|gradients|swap)\.png|schedule\.csv|events\.out\.tfevents\..+\.run|"
    r"projector_config\.pbtxt)(\.tmp)?|\d{5,}"  # the last: TensorBoard's folder of the embedding, by its step
)


def reason(error):
    return (str(error) or type(error).__name__).splitlines()[0]


def put(path, write_to, sync=True):
    """Let `write_to(f)` write a binary file beside `path`, then rename it: `path` is the whole old or the whole new file
    whenever the process dies (with `sync`: or the machine). A failure to write ends the program with exit code 2."""
    aside = Path(f"{path}.tmp")
    try:
        with open(aside, "wb") as f:
            write_to(f)
            f.flush()
            if sync:
                os.fsync(f.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        if not isinstance(error, OSError) and "inline_container" not in str(error):
            raise
        why = reason(error) if isinstance(error, OSError) else "no space left, it seems"  # torch hides the reason
        fail(f"could not write {path} ({why}); what was there before is intact")


def write(path, content):
    put(path, lambda f: torch.save(content, f))


def write_text(path, text):
    put(path, lambda f: f.write(text.encode(errors="surrogateescape")))  # names of files need not be UTF-8


def write_picture(path, picture):
    """A float [3, H, W] in [0, 1] as a PNG."""
    put(path, lambda f: save_image(picture, f, format="png"))


def save(out, content):
    """OUT/checkpoint.pt; the one before it stays as OUT/checkpoint.prev.pt. Rank 0 only."""
    new, last = Path(out, "checkpoint.new.pt"), Path(out, "checkpoint.pt")
    write(new, content)
    try:
        if last.exists():
            os.replace(last, Path(out, "checkpoint.prev.pt"))
        os.replace(new, last)
    except OSError as error:
        fail(f"could not rename {new} to {last} ({reason(error)}); it is whole, rename it by hand")


def load(path):
    """A dict from a file of torch.save, read as data, never executed. EOFError if the file is damaged."""
    try:
        if not Path(path).is_file():  # a pipe would wait for a writer
            raise OSError("it is not a file")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        fail(f"{path} is refused, not executed: it holds something other than tensors and plain values")
    except Exception as error:  # a flipped bit makes the reader raise whatever it likes
        raise EOFError(f"{path} is damaged: {reason(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        fail(f"{path} is not a checkpoint: it holds no dict of names")
    return content


def load_checkpoint(path, *states):
    """`load` for a checkpoint.pt; checks that all entries and the state dicts named `states` are there."""
    found = load(path)
    kinds = {"method": str, "settings": dict, "step": int, "result": (str, type(None)), **dict.fromkeys(states, dict)}
    wrong = [name for name, kind in kinds.items() if name not in found or not isinstance(found[name], kind)]
    wrong += [name for name in ("settings", *states) if name not in wrong and not all(isinstance(k, str) for k in found[name])]
    if wrong or found["step"] < 0:
        fail(f"{path} is not a checkpoint of this code: {' '.join(wrong) or 'step'} is missing or not what it should be")
    return found


def resume(out, method, settings, states, fresh=False, changed_data=False):
    """Load the run in the folder `out` into `states`, {name: model or optimizer}; returns (updates made, result or None),
    (0, None) for a new run. Collective.

    If the last checkpoint is damaged, the one before it is used. A folder in use by another process, files of another
    origin, other settings, other training images (unless `changed_data`) and states that do not fit end the program
    before anything is changed.
    """
    if first_rank():
        lock(out)
    found, damaged = None, []
    for path in () if fresh else (Path(out, "checkpoint.pt"), Path(out, "checkpoint.prev.pt")):
        if found is None and os.path.lexists(path):
            try:
                found = load_checkpoint(path, *states)
                found_in = path
            except EOFError as error:
                damaged.append(str(error))
    if damaged and not found:
        fail(f"{'; '.join(damaged)}; nothing to go on from: choose another --out, or --fresh to start over")
    for error in damaged:
        print(f"warning: {error}; going on from the one before it", file=sys.stderr, flush=True)
    if found:
        check_same(out, found, method, settings, changed_data)
        for name, state in states.items():
            load_state(state, found[name], f"{found_in} does not fit this command: {name}")
    elif first_rank():
        clear(out, fresh)
    step, result = (found["step"], found["result"]) if found else (0, None)
    for value in (bool(found), step, bool(result)):
        same_everywhere(value, f"the ranks found different checkpoints in {out}, which all machines must share")
    return step, result


LOCKS = []  # open files, as long as the process lives


def lock(out):
    """Make the folder and lock it, or refuse it while another process trains in it. fcntl.lockf, unlike flock, is not
    inherited by forked data workers: the lock ends with this process, however that ends."""
    try:
        str(out).encode()  # TensorBoard's names are UTF-8
        Path(out).mkdir(parents=True, exist_ok=True)
        if os.path.lexists(file := Path(out, "run.lock")) and not file.is_file():
            raise OSError(f"{file} is not a file")  # a pipe would wait for a reader
        LOCKS.append(open(file, "a"))  # noqa: SIM115
    except (OSError, ValueError) as error:
        fail(f"--out {out}: {reason(error)}")
    if fcntl:
        try:
            fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            fail(f"another process trains in {out}: wait for its end, or choose another --out")
        except OSError as error:  # a file system without locks
            print(f"warning: {out} cannot be locked ({reason(error)}); start no second run in it", file=sys.stderr)
    else:
        print(f"warning: {out} cannot be locked on this system; start no second run in it", file=sys.stderr)


def clear(out, fresh):
    """Before a run begins: `fresh` deletes what an older one wrote; otherwise such files are refused."""
    own = [path for path in sorted(Path(out).iterdir()) if OWN.fullmatch(path.name)]
    if own and not fresh:
        names = ", ".join(path.name for path in own[:5]) + (", ..." if len(own) > 5 else "")
        fail(f"{out} holds {names} but no checkpoint to go on from: choose another --out, or --fresh to delete them")
    for path in own:
        try:
            if path.is_dir() and path.name.isdigit():
                for name in ("tensors.tsv", "metadata.tsv", "sprite.png"):
                    (path / "default" / name).unlink(missing_ok=True)
                (path / "default").rmdir()
                path.rmdir()
            else:
                path.unlink()
        except OSError as error:
            fail(f"--fresh: {path} cannot be deleted ({reason(error)})")


SIZED = {"epochs", "arch", "batch_size", "queue", "negatives"}  # what may follow from the number of images


def check_same(out, found, method, settings, changed_data):
    """Refuse to go on with a run of another method, of other settings, or of other training images."""
    if found["method"] != method:
        fail(f"{out} holds a run of {found['method']}, not of {method}; choose another --out")
    was, ways = found["settings"], "choose another --out, or --fresh to start over"
    changed = {k for k in {*was, *settings} if repr(was.get(k)) != repr(settings.get(k))}
    data_changed = changed & {"images", "contents"}
    others = sorted(changed - data_changed - (SIZED if data_changed else set()))
    if others:
        why = "; a run cannot be made longer, as its rates follow from --epochs" if "epochs" in others else ""
        listed = ", ".join(f"{k} {was.get(k)} -> {settings.get(k)}" for k in others)
        fail(f"{out} holds a run with other settings ({listed}){why}; {ways}")
    if data_changed and not changed_data:
        what = "files or labels are others"
        if "images" in changed:
            what = f"{was.get('images')} -> {settings.get('images')} images"
        fail(f"the training images have changed since {out} began ({what}): --changed-data goes on with them; or {ways}")


def load_state(state, found, sentence):
    """state.load_state_dict(found) for a model or an optimizer; what does not fit or is not finite ends the program."""
    try:
        optimizer = isinstance(state, torch.optim.Optimizer)
        if optimizer and [set(g) for g in state.param_groups] != [set(g) for g in found["param_groups"]]:
            raise ValueError("its groups have other settings")
        state.load_state_dict(found)
        if optimizer:
            tensors = [(p.shape, t) for p, kept in state.state.items() for t in kept.values() if torch.is_tensor(t) and t.ndim]
            if any(t.shape != shape or not t.isfinite().all() for shape, t in tensors):
                raise ValueError("its tensors have other shapes than the weights, or are not finite")
        elif not all(t.isfinite().all() for t in state.state_dict().values() if t.is_floating_point()):
            raise ValueError("its weights are not finite")
    except Exception as error:  # torch raises whatever the first wrong value leads to
        fail(f"{sentence}: {' '.join(str(error).split())[:300]}")


def stop_unless_finite(finite, what, step, lr, amp):
    """Stop all ranks if `what` is not finite on one; the last checkpoint stays as it is. Collective."""
    if any_rank(not finite):
        sys.exit(
            f"error: the {what} is not finite at step {step} (lr {lr:.3g}, {'bf16' if amp else 'fp32'}); the last good "
            "checkpoint is kept. Try a lower --lr, a longer --warmup-epochs, or --no-amp"
        )


def memory_mb():
    """Peak memory of this process in MB: tensors on its GPU, or else its resident set (0 on Windows)."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0
    return peak / (1e6 if sys.platform == "darwin" else 1e3)  # macOS counts bytes, Linux KiB


class Log:
    """metrics.jsonl, TensorBoard and the progress bar of a run. Every rank has one; only rank 0 writes. On resume, lines
    of steps that will be repeated are dropped."""

    def __init__(self, out, name, step, total, batch_size, rank, text):
        self.out, self.rank, self.batch_size = Path(out), rank, batch_size
        self.warned, self.last_line = False, time.perf_counter()
        self.bar = tqdm(total=total, initial=step, desc=name, unit="step", disable=None if rank == 0 else True)
        self.start_interval(step)
        if rank == 0:
            file = self.out / "metrics.jsonl"
            try:
                lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
            except OSError as error:
                fail(f"{file} cannot be read: {reason(error)}")
            write_text(file, "".join(line + "\n" for line in lines if self.stays(line, step)))
            try:
                self.writer = SummaryWriter(out, purge_step=step + 1, filename_suffix=".run")
            except OSError as error:
                fail(f"could not write TensorBoard's events in {out}: {reason(error)}")
            self.writer.add_text("recipe", text.encode(errors="backslashreplace").decode(), step)

    @staticmethod
    def stays(line, step):
        """Whether a logged line is kept when the run goes on from `step`, which begins with a probe. Torn lines are not."""
        try:
            line = json.loads(line)
            return line["step"] < step or (line["step"] == step and "loss" in line)
        except (ValueError, TypeError, KeyError):
            return False

    def start_interval(self, step):
        self.loss, self.step, self.wait, self.clock = 0.0, step, 0.0, time.perf_counter()

    def watch(self, batches):
        """Yields from `batches` and counts the time spent waiting for them."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.wait += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def train(self, step, lr, amp, **numbers):
        """Log the steps since the last call; stops a run whose loss is not finite. The only synchronization with the device
        in a step. Collective."""
        numbers = {k: float(v) for k, v in numbers.items()}
        loss, seconds = float(self.loss) / (step - self.step), time.perf_counter() - self.clock
        stop_unless_finite(math.isfinite(loss), "loss", step, lr, amp)
        rate, wait = self.batch_size * (step - self.step) / seconds, self.wait / seconds
        line = f"loss {loss:.3f}, {rate:.0f} img/s, data wait {wait:.0%}"
        self.bar.set_postfix_str(line)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and time.perf_counter() > self.last_line + 60:  # not a terminal: a line a minute
            self.last_line = time.perf_counter()
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
            try:
                with open(self.out / "metrics.jsonl", "a") as f:
                    f.write(json.dumps({"step": step, **numbers}) + "\n")
            except OSError as error:
                fail(f"could not write {self.out / 'metrics.jsonl'} ({reason(error)}); the last checkpoint is intact")
            for name, value in numbers.items():
                self.writer.add_scalar(f"{kind}/{name}", value, step)

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
