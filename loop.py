"""A loop of updates that stops at a signal and goes on where it was: resume, epochs, log, checkpoints. Whoever skips
this file still understands the papers."""

import shlex
import sys
import time

import torch

import common
import runs

# Settings that may differ when a run goes on.
MAY_DIFFER = ("out", "root", "workers", "eval_every", "log_every", "device", "fresh", "dry_run", "probes",
              "classifier", "changed_data", "checkpoint_activations", "given", "why")  # fmt: skip

SAVE_AFTER = 60  # seconds


class Loop:
    """Updates that stop at a signal and go on where they were: resume, epochs, checkpoints, log. The caller owns the
    loss and the optimizers' steps. Methods marked "collective" must be called by every rank.

        method      name of the script
        states      {name in checkpoint.pt: model or optimizer}
        loader      has `data`, `rank`, `world`, `steps`, `epoch(epoch, start)` and `waited`, as data.Loader
        total       updates to make (default: those of --epochs)
        accumulate  batches of the loader per update
    """

    def __init__(self, method, args, states, loader, total=0, accumulate=1):
        self.method, self.args, self.states, self.loader, self.accumulate = method, args, states, loader, accumulate
        self.rank, self.world, self.lr, self.log, self.stopped = loader.rank, loader.world, 0.0, None, False
        self.step, self.steps = 0, loader.steps // accumulate  # updates made; updates per epoch
        self.saved_at = time.monotonic()
        self.total = total or args.epochs * self.steps
        self.command = shlex.join(["python", *sys.argv])

    def say(self, text):
        """Print on rank 0."""
        if self.rank == 0:
            print(text)

    def begin(self, **settings):
        """Load what is in --out, if its `settings` and flags are these. False if nothing is left to do: a finished run,
        or --dry-run. Collective."""
        a, train = self.args, self.loader.data
        if a.dry_run:
            return False
        self.settings = {k: v for k, v in vars(a).items() if k not in MAY_DIFFER} | settings
        self.settings |= {"images": len(train), "contents": train.contents()}
        self.step, result = runs.resume(a.out, self.method, self.settings, self.states, a.fresh, a.changed_data)
        if result:
            self.say(f"{a.out} is finished; --fresh starts over\n{result}")
            return False
        if self.step:
            self.say(f"{a.out}: going on from step {self.step} of {self.total}")
        return True

    def is_training(self):
        """Whether updates are left to be made and no signal has stopped the run. The first call opens the log and saves
        the random init of a new run: from then on the folder is this run's. Collective."""
        if self.log is None:
            if self.step == 0:
                self.save()
            a, text = self.args, f"{self.command}\n\n{self.settings}"
            self.log = runs.Log(a.out, self.method, self.step, self.total, a.batch_size, text)
        if self.stopped:
            self.log.say(f"stopped by a signal at step {self.step}; the same command goes on from here")
        elif self.step < self.total:
            self.caught = common.catch_signals()
            return True
        else:
            common.end_at_signals()  # nothing is left to save
            self.log.bar.close()
        return False

    def epoch(self):
        """The number of each update that is left of this epoch; ends early at a signal."""
        epoch = self.step // self.steps
        self.batches = self.loader.epoch(epoch, self.step % self.steps * self.accumulate)
        self.log.start_interval(self.step)
        self.waited = self.loader.waited
        while self.step < min((epoch + 1) * self.steps, self.total) and not self.stopped:
            yield self.step

    def end_step(self, lr, **numbers):
        """Count the update and log `numbers` every --log-every steps. Collective."""
        self.step, self.lr = self.step + 1, lr
        self.stopped = common.any_rank(self.caught)
        if self.step % self.args.log_every == 0 or self.step % self.steps == 0 or self.stopped:
            waited, self.waited = self.loader.waited - self.waited, self.loader.waited
            self.log.train(self.step, lr, self.args.amp, waited, epoch=self.step / self.steps, **numbers)

    def probe_is_due(self):
        """Whether a probe comes before the next update."""
        return False

    def save(self, result=None):
        """Write the checkpoint: at the start and the end, at a stop, before a probe, and otherwise when a minute has
        passed since the last one, by the clock of rank 0: epochs may take a second. Collective."""
        if self.step == self.total:
            common.meet()  # of the last test rank 0 has its share alone
        due = self.step in (0, self.total) or self.stopped or self.probe_is_due()
        if due or common.any_rank(self.rank == 0 and time.monotonic() > self.saved_at + SAVE_AFTER):
            self.write(result)
            self.saved_at = time.monotonic()

    def write(self, result):
        """checkpoint.pt, unless a weight is not finite. Collective."""
        norms = torch.stack(torch._foreach_norm(list(self.states["model"].parameters())))
        runs.stop_unless_finite(norms.isfinite().all(), "network", self.step, self.lr, self.args.amp)
        if self.rank == 0:
            head = {"method": self.method, "settings": self.settings, "step": self.step, "result": result}
            runs.save(self.args.out, head | {name: state.state_dict() for name, state in self.states.items()})
