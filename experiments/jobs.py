"""What the experiments share: common flags, runs of the scripts as processes, and what those runs measured."""

import argparse
import difflib
import functools
import importlib
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import common
import runs

# ============ flags ============


def parser(usage, doc, epilog, parallel=True):
    p = argparse.ArgumentParser(usage=f"python -m experiments.{usage}", description=doc, formatter_class=common.Help,
                                allow_abbrev=False, epilog=epilog)  # fmt: skip
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="every run with each of them")
    p.add_argument("--processes", type=int, default=1, help="of each run, started by torchrun")
    p.add_argument("--dry-run", action="store_true", help="list the commands and stop")
    if parallel:
        p.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the CPU's threads")
        p.add_argument("--show", action="store_true", help="run nothing; print what is in --out")
    return p


def parse(p, argv):
    """(the experiment's own flags, the others as a list: they go to every run)."""
    own, flags = p.parse_known_args(argv)
    common.at_least(1, own, *{"processes", "jobs"} & set(vars(own)))
    own.seeds = list(dict.fromkeys(own.seeds))
    own.given = {word.split("=")[0] for word in flags if word.startswith("--")}
    if "--seed" in own.given:
        common.fail("--seed: say --seeds, one or more")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        common.fail("torchrun is started from here, for each run: say --processes N, and python instead of torchrun")
    return own, flags


def check_names(what, names, known):
    """Refuse a name that is not among the known ones, with the nearest one."""
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(known)}"
            common.fail(f"{what} {name}: {hint}")


# ============ processes ============


def command(script, words, processes=1):
    """(the words that start it, the same as a user types it). script: "sage", or a module: "package.module"."""
    words, launcher, typed = [str(word) for word in words], [], "python"
    if processes > 1:
        how = ["--standalone", f"--nproc_per_node={processes}"]
        launcher, typed = ["-m", "torch.distributed.run", *how], f"torchrun {' '.join(how)}"
    packaged = "." in script
    target = ["-m", script] if packaged else [importlib.import_module(script).__file__]
    name = f"-m {script}" if packaged else f"{script}.py"
    return [sys.executable, *launcher, *target, *words], f"{typed} {name} {shlex.join(words)}"


def evaluation_flags(args):
    """How evaluate.py is to read the data of a run with these args."""
    words = ["--root", args.root, "--limit", args.limit, "--workers", args.workers]
    words += ["--device", args.device] * bool(args.device)
    return words + ["--amp" if args.amp else "--no-amp"] * (args.amp is not None)


def start(words, **kwargs):
    """A process that ends when this one does, even by SIGKILL: END_WITH_PARENT tells it whom to watch (common.setup).
    It has a session of its own, so that a Ctrl-C reaches it only from here, as a signal that torchrun passes on."""
    env = {**kwargs.pop("env", os.environ), "END_WITH_PARENT": str(os.getpid())}
    return subprocess.Popen(words, env=env, start_new_session=True, **kwargs)


def run_all(todo, stop, at_once=1):
    """Run jobs, `at_once` at a time. `job.start()` gives a process; at its end `job.end(exit code, whether all is to
    stop)` gives an error message or nothing, and `job.done()` a line to print, or None if it needs another process.

    A signal (in `stop`) is passed on to all that run and ends this program once they have ended, with exit code 85; so
    does one that stopped a single run. An error stops the others in the same way and becomes this program's.
    """
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored under nohup
        signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))
    running, passed_on, failure, total, began = [], 0, None, len(todo), time.monotonic()
    try:
        while running or (todo and not stop and not failure):
            while todo and len(running) < at_once and not stop and not failure:
                running.append((todo[0], todo.pop(0).start()))
            if passed_on < len(stop) + bool(failure):
                passed_on += 1
                for _, child in running:
                    child.terminate()
            for job, child in [pair for pair in running if pair[1].poll() is not None]:
                running.remove((job, child))
                stop += [common.STOPPED] * (child.returncode == common.STOPPED and not stop)
                if error := job.end(child.returncode, bool(stop or failure)):
                    code = child.returncode or 1
                    failure = failure or (code if code > 0 else 128 - code, error)
                elif (line := job.done()) is None:
                    todo.insert(0, job)
                elif line:
                    ended = total - len(todo) - len(running)
                    left = (time.monotonic() - began) / 60 / ended * (total - ended)
                    print(f"{line} ({ended} of {total}; about {left:.0f} min left)", flush=True)
            time.sleep(0.05)
    except KeyboardInterrupt:  # the third signal (common.catch_signals)
        pass
    finally:  # also where this program fails, on a full disk for example: no process outlives it
        for _, child in running:
            child.terminate()
        for _, child in running:
            child.wait()
    if failure:
        print(failure[1], file=sys.stderr)
        sys.exit(failure[0])
    if stop:
        print("stopped by a signal; the same command, but for --fresh, goes on from here")
        sys.exit(common.STOPPED)


def run(script, words, stop, processes=1, dry_run=False):
    """Run one command to its end, with its output on the terminal, and return it as a user types it."""
    words, typed = command(script, words, processes)
    print(typed, flush=True)
    if not dry_run:
        end = lambda code, stopping: f"error: exit code {code} from {typed}" if code and not stopping else ""
        run_all([types.SimpleNamespace(start=lambda: start(words), end=end, done=str)], stop)
    return typed


class Job:
    """A run of a script in the folder `path`, with its output in PATH.log. PATH.json is its record: {"command" (once it
    has finished), "seconds" (over all parts of a run that was stopped), "refused" (why it cannot run)}. A subclass has
    `metrics()`, what the run measured ({} before its end), and `summary()`, a line about it."""

    def __init__(self, path, name, script, words, seed, processes=1, fresh=False):
        self.path, self.name, self.fresh = path, name, fresh
        self.words, self.typed = command(script, [*words, "--seed", seed, "--out", path], processes)
        self.running, self.env = None, {}  # the command of its latest process

    def needs(self):
        """(words, as a user types it) of its next process; None if it is finished."""
        if self.fresh or not self.metrics() or record(self.path).get("command") != self.typed:
            return [*self.words, *["--fresh"] * self.fresh], self.typed + " --fresh" * self.fresh
        return None

    def start(self):
        words, self.running = self.needs()
        self.seconds = 0.0 if self.fresh else record(self.path).get("seconds", 0.0)
        self.was_finished, self.began = bool(self.metrics()) and not self.fresh, time.monotonic()
        print(self.running, flush=True)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{self.path}.log", "a", errors="surrogateescape") as log:
                log.write(f"{self.running}\n")
                log.flush()
                return start(words, stdout=log, stderr=subprocess.STDOUT, env=os.environ | self.env)
        except OSError as error:
            common.fail(f"could not write {self.path}.log ({runs.reason(error)})")

    def end(self, code, stopping):
        """Its process has ended: update the record; an error message if the whole experiment fails with it."""
        found, failure = record(self.path), None
        if not self.was_finished:
            found["seconds"] = round(self.seconds + time.monotonic() - self.began, 1)
        found.pop("refused", None)
        printed = Path(f"{self.path}.log").read_text(errors="replace").rpartition(f"{self.running}\n")[2]
        error = re.search(r"^(?:\S+: )?error: (.*)", printed, re.MULTILINE)
        if self.running.removesuffix(" --fresh") == self.typed and not code and self.metrics():
            found["command"], self.fresh = self.typed, False
        if code and error and not self.path.exists():  # bad input, maybe of this run alone
            found["refused"] = error[1]
        elif code and not stopping:
            last = error[0] if code == 2 and error else "\n".join(printed.splitlines()[-10:])
            failure = f"{last}\nerror: exit code {code} from {self.running}"
        elif not self.metrics() and not stopping:
            failure = f"error: {self.path} has not come to its end; the same command goes on from there"
        runs.write_text(f"{self.path}.json", json.dumps(found, indent=1) + "\n")
        return failure

    def done(self):
        refused = record(self.path).get("refused")
        if not refused and self.needs():
            return None
        return f"{self.name}: " + (f"left out, {refused}" if refused else self.summary())


def run_unfinished(jobs, own, stop):
    """Run those that are not finished, own.jobs at a time."""
    todo = [job for job in jobs if job.needs()]
    print(f"{len(jobs)} runs, {len(jobs) - len(todo)} of them finished", flush=True)
    if own.jobs > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = max(1, cores // (own.jobs * own.processes))
        print(f"{own.jobs} runs at a time, {threads} CPU threads each", flush=True)
        for job in todo:
            job.env = {"OMP_NUM_THREADS": str(threads)}
    run_all(todo, stop, own.jobs)


# ============ what runs measured ============


def read_json(file):
    """The dict in a JSON file; {} if there is none."""
    try:
        found = json.loads(file.read_text()) if file.exists() else {}
        return found if isinstance(found, dict) else common.fail(f"{file} holds no JSON object: move it away")
    except (OSError, ValueError) as error:
        common.fail(f"{file} cannot be read ({runs.reason(error)}): move it away")


def record(path):
    return read_json(Path(f"{path}.json"))  # not with_suffix: names may have a point


def read_metrics(folder, data_name):
    return read_json(folder / "evaluate.json").get(data_name, {})


def read_log(folder):
    """The lines of a run's log, each a dict; none where there is no log."""
    file = folder / "metrics.jsonl"
    try:
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    except (OSError, ValueError) as error:
        common.fail(f"{file} cannot be read ({runs.reason(error)})")


def lookup(metrics, keys):
    """lookup({"knn": {"20": 50.0}}, "knn 20") is 50.0; None for what is not there."""
    return functools.reduce(lambda found, key: (found or {}).get(key), keys.split(), metrics)


def initial_knn(folder):
    """20-NN of the random initialization, with which every run begins its log."""
    return next((line.get("knn20") for line in read_log(folder) if line["step"] == 0), None)


def mean_std(values, digits=1):
    """Mean and, of several, standard deviation, as a table prints them; None counts as missing."""
    values = [v for v in values if v is not None]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}" if values else "-"


def aligned(rows):
    """Lines of a table of words: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
    return [line.rstrip() for line in lines]
