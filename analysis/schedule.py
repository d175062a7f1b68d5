"""How late should the learning rate of a linear probe decay? (Kolesnikov et al. 2019, Figure 8)

    python -m analysis.schedule RUN --decay-at 30 120 480      SGD's accuracy over epochs by when its rate first decays

Every accuracy stands in RUN/schedule.csv and in RUN/evaluate.json.
"""

import math
from itertools import zip_longest

import torch
from tqdm import tqdm

import common
import data
import evaluate
import runs


@torch.inference_mode()
def late_decays(x, y, test_x, test_y, decay_at=(30, 120, 480), batch_size=2048, seed=0):
    """Softmax regression by SGD on features as they are: momentum 0.9, no weight decay, lr 0.1 * batch / 256, x 0.1
    after D and D + 20 epochs of D + 40. Returns {D: test top-1 in per cent after each epoch}. Until its first decay
    every D trains alike: one run at the full rate serves all."""
    batch_size = min(batch_size, len(x))
    steps, lr, columns = len(x) // batch_size, 0.1 * batch_size / 256, torch.arange(batch_size, device=y.device)

    def train(w, v, first, last, lr):
        """Epochs `first` to `last`, not included, of weights and momentum [C, 1 + d], in place: top-1 after each. The
        first column is the bias: a column of ones in the features would need a copy of them all."""
        curve = []
        for epoch in tqdm(range(first, last), f"lr {lr:g}", unit="epoch", leave=False, disable=None):
            order = torch.randperm(len(x), generator=data.generator(seed, "late decays", epoch))
            for rows in order[: steps * batch_size].view(steps, batch_size):
                xb = x.index_select(0, rows.to(x.device)).to(y.device, torch.float32)
                p = (w[:, 1:] @ xb.T).add_(w[:, :1]).softmax(0)  # [C, b]
                p[y[rows.to(y.device)], columns] -= 1  # the gradient of the cross-entropy, as in `evaluate.fit_sgd`
                gradient = torch.cat([p.sum(1, keepdim=True), p @ xb], 1)
                w.sub_(v.mul_(0.9).add_(gradient, alpha=1 / batch_size), alpha=lr)
            curve.append(evaluate.accuracy_of(lambda z: z @ w[:, 1:].T + w[:, 0], test_x, test_y)[0])
        return curve

    w = torch.zeros(int(max(y.max(), test_y.max())) + 1, 1 + x.shape[1], device=y.device)
    v, start, full, curves = torch.zeros_like(w), 0, [], {}
    for d in sorted(set(decay_at)):
        full += train(w, v, start, d, lr)
        branch = w.clone(), v.clone()
        tail = train(*branch, d, d + 20, 0.1 * lr) + train(*branch, d + 20, d + 40, 0.01 * lr)
        start, curves[d] = d, torch.stack(full + tail).tolist()
    return curves


def main():
    p = evaluate.flags(__doc__)
    p.add_argument("--decay-at", type=int, nargs="+", default=[30, 120, 480], help="epochs until the first decay")
    p.add_argument("--out", help="folder for schedule.csv (default: the checkpoint's; for random:ARCH the current one)")
    args = p.parse_args()
    evaluate.within(1, math.inf, args, "decay_at")
    subject = evaluate.Subject(args)
    file = subject.folder(args.out, "schedule.csv") / "schedule.csv"
    subject.need_labels("schedule")
    (x, y), (test_x, test_y) = (evaluate.with_labels(*pair) for pair in subject.features())
    curves = late_decays(x, y, test_x, test_y, args.decay_at, seed=args.seed)
    for d, curve in curves.items():
        some = ", ".join(f"{curve[e - 1]:.2f} after {e}" for e in (1, d, d + 20))
        print(f"schedule first decay at {d}: top-1 {curve[-1]:.2f} after {d + 40} epochs   ({some})")
    print(f"         SGD 0.9, no weight decay, batch {min(2048, len(x))}, lr 0.1 * batch / 256, x 0.1 at D and D + 20")
    print(
        f"         {len(x)} training and {len(test_x)} test images, no augmentation; {x.shape[1]} features as they are"
    )
    rows = [",".join("" if a is None else f"{a:.2f}" for a in row) for row in zip_longest(*curves.values())]
    table = ["epoch," + ",".join(f"decay at {d}" for d in curves), *(f"{e},{row}" for e, row in enumerate(rows, 1))]
    runs.write_text(file, "\n".join(table) + "\n")
    print(f"{file}: top-1 after every epoch")
    subject.write({"schedule": {f"{d}": {"final": curve[-1], "curve": curve} for d, curve in curves.items()}})


if __name__ == "__main__":
    common.run(main)
