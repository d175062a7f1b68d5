"""Detection and segmentation of several backbones, fine-tuned and frozen, side by side.

    python -m experiments.dense runs/byol-shapes runs/instdisc-shapes random:resnet10_16 --seeds 0 1 2
    python -m experiments.dense "runs/byol-{seed}" "runs/sage-{seed}" --seeds 0 1 2     by seed
    python -m experiments.dense RUN --tasks detect --data DIR --jobs 2                  other flags go to every run
    python -m experiments.dense ... --show                         the tables of what is there; runs nothing

A run is in OUT/seedN/TASK-NAME[-frozen], its output beside it. The same command goes on where it was stopped.
"""

from pathlib import Path

import common
import runs
from experiments import jobs

COLUMNS = {  # task: {column: where it stands in evaluate.json}
    "detect": {"AP": "detection AP", "AP50": "detection AP50", "AP75": "detection AP75"},
    "segment": {"mIoU": "segmentation mIoU", "mIoU objects": "segmentation mIoU_objects"},
}


def parse_args(argv):
    p = jobs.parser("dense CHECKPOINT ... [--seeds N ...] [flags of detect and segment]", __doc__, "")
    p.add_argument("checkpoints", nargs="+", help="of downstream.detect; {seed} is replaced by the seed")
    p.add_argument("--tasks", nargs="+", default=list(COLUMNS), help="detect, segment")
    p.add_argument("--data", default="scenes", help="of both commands")
    p.add_argument("--out", default="runs/dense", help="folder of all runs")
    own, flags = jobs.parse(p, argv)
    jobs.check_names("--tasks", own.tasks, COLUMNS)
    own.out, own.flags = Path(own.out), flags
    return own


def job(own, task, target, frozen, seed):
    target = target.replace("{seed}", str(seed))
    path = own.out / f"seed{seed}" / f"{task}-{Path(target).name.replace(':', '-')}{'-frozen' * frozen}"
    words = [target, "--data", own.data, *["--frozen"] * frozen, *own.flags, "--seed", seed, "--out", path]
    measured = lambda: jobs.lookup(jobs.read_results(path, own.data), COLUMNS[task])
    return jobs.Job(path, f"downstream.{task}", words, measured, own.processes)


def jobs_of(own):
    """{(task, checkpoint, frozen): a Job for each seed}"""
    keys = [(task, target, frozen) for target in own.checkpoints for task in own.tasks for frozen in (False, True)]
    found = {key: [job(own, *key, seed) for seed in own.seeds] for key in keys}
    if len({run.path for seeds in found.values() for run in seeds}) < len(keys) * len(own.seeds):
        common.fail("two checkpoints have the same name, so their runs would have one folder")
    return found


def page(own, grid):
    text = []
    for task in own.tasks:
        heads = [f"{how}: {name}" for how in ("fine-tuned", "frozen") for name in COLUMNS[task]]
        rows = [["backbone", "seeds", *heads]]
        for target in own.checkpoints:
            cells, counts = [], []
            for frozen in (False, True):
                found = [numbers for run in grid[task, target, frozen] if (numbers := run.measured())]
                cells += [jobs.mean_std([numbers[name] for numbers in found]) for name in COLUMNS[task]]
                counts.append(len(found))
            rows.append([target, min(counts), *cells])
        text += [f"## {task}, {own.data}", "", *jobs.table(rows), ""]
    return "\n".join([*text, f"Seeds: {' '.join(map(str, own.seeds))}; mean ± standard deviation.", ""])


def main(argv=None):
    own = parse_args(argv)
    grid = jobs_of(own)
    if not own.show:
        by_seed = zip(*grid.values(), strict=True)  # all runs of a seed, then those of the next
        jobs.run([run for seed in by_seed for run in seed], own)
    if not own.dry_run:
        own.out.mkdir(parents=True, exist_ok=True)
        runs.write_text(own.out / "dense.md", text := page(own, grid))
        print(f"{text}\n{own.out / 'dense.md'}")


if __name__ == "__main__":
    main()
