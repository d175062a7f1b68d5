"""How late should the learning rate of a linear probe decay? (Kolesnikov et al. 2019, Figure 8)

    python -m analysis.schedule RUN --decay-at 30 120 480

RUN/evaluate.json has the accuracy after every epoch.
"""

import torch
from tqdm import tqdm

import common
import data
import evaluate


@torch.inference_mode()
def late_decays(x, y, test_x, test_y, decay_at=(30, 120, 480), batch_size=2048, seed=0):
    """Softmax regression by SGD on features as they are: momentum 0.9, no weight decay, lr 0.1 * batch / 256, x 0.1
    after D and D + 20 epochs of D + 40. Returns {D: test top-1 in per cent after each epoch}."""
    batch_size, curves = min(batch_size, len(x)), {}
    steps, columns = len(x) // batch_size, torch.arange(batch_size, device=y.device)
    for d in sorted(set(decay_at)):
        # The bias is the first column: a column of ones in the features would need a copy of them all.
        w = torch.zeros(int(max(y.max(), test_y.max())) + 1, 1 + x.shape[1], device=y.device)
        v, curve = torch.zeros_like(w), []
        for epoch in tqdm(range(d + 40), f"decay at {d}", unit="epoch", leave=False, disable=None):
            lr = 0.1 * batch_size / 256 * (1, 0.1, 0.01)[(epoch >= d) + (epoch >= d + 20)]
            order = torch.randperm(len(x), generator=data.generator(seed, "late decays", epoch))
            for rows in order[: steps * batch_size].view(steps, batch_size):
                xb = x.index_select(0, rows.to(x.device)).to(y.device, torch.float32)
                p = (w[:, 1:] @ xb.T).add_(w[:, :1]).softmax(0)  # [C, b]
                p[y[rows.to(y.device)], columns] -= 1  # the gradient of the cross-entropy, as in `evaluate.fit_sgd`
                gradient = torch.cat([p.sum(1, keepdim=True), p @ xb], 1)
                w.sub_(v.mul_(0.9).add_(gradient, alpha=1 / batch_size), alpha=lr)
            curve.append(evaluate.accuracy(test_x, test_y, lambda z: z @ w[:, 1:].T + w[:, 0])[0])  # noqa: B023
        curves[d] = torch.stack(curve).tolist()
    return curves


def main():
    p = evaluate.flags(__doc__)
    p.add_argument("--decay-at", type=int, nargs="+", default=[30, 120, 480], help="epochs until the first decay")
    args = p.parse_args()
    common.at_least(1, args, "decay_at")
    s = evaluate.Subject(args)
    s.need_labels("schedule")
    (x, y), (test_x, test_y) = (evaluate.with_labels(*pair) for pair in s.features())
    curves = late_decays(x, y, test_x, test_y, args.decay_at, seed=args.seed)
    for d, curve in curves.items():
        some = ", ".join(f"{curve[e - 1]:.2f} after {e}" for e in (1, d, d + 20))
        print(f"schedule first decay at {d}: top-1 {curve[-1]:.2f} after {d + 40} epochs   ({some})")
    print(f"         SGD 0.9, no weight decay, batch {min(2048, len(x))}, lr 0.1 * batch / 256, x 0.1 at D and D + 20")
    print(f"         {len(x)} training and {len(test_x)} test images, no augmentation, {x.shape[1]}-d features")
    s.write({"schedule": {f"{d}": {"final": curve[-1], "curve": curve} for d, curve in curves.items()}})


if __name__ == "__main__":
    common.run(main)
