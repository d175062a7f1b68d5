"""What the experiments share: their flags, a launcher, and tables.

An experiment lists its commands as `Job`s; `run` starts those that are not finished. What they measured is read from
their folders, and `table` prints it. Commands that need the results of others are a second list.
"""

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
    p.add_argument("--show", action="store_true", help="run nothing; print what is in --out")
    p.set_defaults(jobs=1)
    if parallel:
        p.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the CPU's threads")
    return p


def parse(p, argv):
    """(the experiment's own flags, the other words: they go to every run)."""
    own, flags = p.parse_known_args(argv)
    common.at_least(1, own, "processes", "jobs")
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


# ============ the launcher ============


def command(script, words, processes=1):
    """(the words that start it, the same as a user types it). script: "sage", or a module: "package.module"."""
    words, launcher, typed = [str(word) for word in words], [], "python"
    if processes > 1:
        how = ["--standalone", f"--nproc_per_node={processes}"]
        launcher, typed = ["-m", "torch.distributed.run", *how], f"torchrun {' '.join(how)}"
    target, name = ["-m", script], f"-m {script}"
    if "." not in script:
        target, name = [importlib.import_module(script).__file__], f"{script}.py"
    return [sys.executable, *launcher, *target, *words], f"{typed} {name} {shlex.join(words)}"


def start(words, **kwargs):
    """A process that ends when this one does, even by SIGKILL: END_WITH_PARENT names the parent (common.setup). It has
    a session of its own, so that a Ctrl-C reaches it only from here, as a signal that torchrun passes on."""
    env = {**os.environ, "END_WITH_PARENT": str(os.getpid())}
    return subprocess.Popen(words, env=env, start_new_session=True, **kwargs)


class Job:
    """One command, with its output in PATH.log. PATH.json is its record: {"command" (once it has finished), "seconds"
    (over all parts of a run that was stopped), "refused" (why it cannot run)}.

    path       what it writes, the folder of a run for example; of a probe a name for log and record
    measured   a function without arguments: {name: number} of what it measured, empty before its end (default: path)
    fresh      run it with --fresh, finished or not
    """

    def __init__(self, path, script, words, measured=None, processes=1, fresh=False):
        self.path, self.fresh = path, fresh
        self.measured = measured or (lambda: {"path": path} if path.exists() else {})
        self.words, self.typed = command(script, words, processes)
        self.shown = self.typed + " --fresh" * fresh

    def finished(self):
        return not self.fresh and bool(self.measured()) and record(self.path).get("command") == self.typed

    def start(self):
        print(self.shown, flush=True)
        self.began = time.monotonic()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{self.path}.log", "a") as log:
                print(self.shown, file=log, flush=True)
                return start([*self.words, *["--fresh"] * self.fresh], stdout=log, stderr=subprocess.STDOUT)
        except OSError as error:
            common.fail(f"could not write {self.path}.log ({runs.reason(error)})")

    def end(self, code, stopping):
        """Its process has ended: update the record. Returns a message if the whole experiment fails with it."""
        known, failure = {} if self.fresh else record(self.path), None
        if "command" not in known:  # a finished run only repeats its result
            known["seconds"] = round(known.get("seconds", 0) + time.monotonic() - self.began, 1)
        known.pop("refused", None)
        printed = Path(f"{self.path}.log").read_text(errors="replace").rpartition(f"{self.shown}\n")[2]
        error = re.search(r"^(?:\S+: )?error: (.*)", printed, re.MULTILINE)
        if not code and self.measured():
            known["command"] = self.typed
        elif code and error and not self.path.exists():  # bad input, maybe of this run alone
            known["refused"] = error[1]
        elif not stopping:
            last = "\n".join(printed.splitlines()[-10:])
            failure = f"{last}\nerror: {self.path} has not come to its end: exit code {code} from {self.shown}"
        runs.write_text(f"{self.path}.json", json.dumps(known, indent=1) + "\n")
        return failure

    def summary(self):
        if refused := record(self.path).get("refused"):
            return f"left out, {refused}"
        return ", ".join(f"{name} {x:.1f}" for name, x in self.measured().items() if isinstance(x, float))


def launch(jobs, at_once=1):
    """Start the jobs, `at_once` at a time, and wait for them.

    A signal, to this program or to one of its runs, stops all runs; then the program exits with 85. A run that fails
    stops the others in the same way, and its exit code is this program's.
    """
    waiting, running, exit_code, began = list(jobs), {}, 0, time.monotonic()  # running: {job: process}

    def stop(code):
        nonlocal exit_code
        exit_code = exit_code or code
        for process in running.values():
            process.terminate()

    for number in {*common.SIGNALS, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        if signal.getsignal(number) != signal.SIG_IGN:  # SIGHUP is ignored under nohup
            signal.signal(number, lambda *_: stop(common.STOPPED))
    try:
        while running or (waiting and not exit_code):
            while waiting and len(running) < at_once and not exit_code:
                job = waiting.pop(0)
                running[job] = job.start()
                if exit_code:  # a signal came before the process was among those that run
                    running[job].terminate()
            for job in [job for job, process in running.items() if process.poll() is not None]:
                code = running.pop(job).returncode
                if code == common.STOPPED:
                    stop(code)
                if error := job.end(code, bool(exit_code)):
                    print(error, file=sys.stderr)
                    stop(128 - code if code < 0 else code or 1)
                elif not exit_code:
                    ended = len(jobs) - len(waiting) - len(running)
                    left = (time.monotonic() - began) / 60 / ended * (len(jobs) - ended)
                    print(f"{job.path}: {job.summary()} ({ended} of {len(jobs)}; {left:.0f} min left)", flush=True)
            time.sleep(0.05)
    finally:  # also where this program fails, on a full disk for example: no process outlives it
        stop(0)
        for process in running.values():
            process.wait()
    if exit_code == common.STOPPED:
        print("stopped by a signal; the same command, but for --fresh, goes on from here")
    if exit_code:
        sys.exit(exit_code)


def run(jobs, own):
    """Run the jobs that are not finished, own.jobs at a time; with --dry-run print their commands. Jobs with the
    same path are run once. Jobs that need results of others go into a later call."""
    unique = {}
    for job in jobs:
        unique.setdefault(job.path, job)
    todo = [job for job in unique.values() if own.dry_run or not job.finished()]
    if own.dry_run or not unique:
        print("".join(f"{job.shown}\n" for job in todo), end="")
        return
    print(f"{len(unique)} runs, {len(unique) - len(todo)} of them finished", flush=True)
    if own.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, common.cores() // (own.jobs * own.processes)))
        print(f"{own.jobs} runs at a time, {os.environ['OMP_NUM_THREADS']} CPU threads each", flush=True)
    launch(todo, own.jobs)
    refused = [record(path).get("refused") for path in unique]
    if all(refused):
        common.fail(f"none of the runs could start: {refused[0]}")


# ============ what runs measured ============


def read_json(file):
    return json.loads(file.read_text()) if file.exists() else {}


def read_metrics(folder):
    """The lines of a run's log, each a dict."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def record(path):
    return read_json(Path(f"{path}.json"))  # not with_suffix: names may have a point


def read_results(folder, data_name):
    return read_json(folder / "evaluate.json").get(data_name, {})


def lookup(metrics, columns):
    """{name: number or None} of columns {name: keys}: "knn 20" is 50.0 in {"knn": {"20": 50.0}}; {} without metrics."""
    find = lambda keys: functools.reduce(lambda found, key: (found or {}).get(key), keys.split(), metrics)
    return {name: find(keys) for name, keys in columns.items()} if metrics else {}


def initial_knn(folder):
    """20-NN of the random init, with which every run begins its log."""
    return next((line.get("knn20") for line in read_metrics(folder) if line["step"] == 0), None)


def mean_std(values, digits=1):
    """Mean and, of several, standard deviation, as a table prints them; None counts as missing."""
    values = [v for v in values if v is not None]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}" if values else "-"


def table(rows):
    """The lines of a Markdown table, aligned; its heads are the first row."""
    rows = [[str(word) for word in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return [f"| {' | '.join(words)} |" for words in lines]
