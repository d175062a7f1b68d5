"""SwAV: Swapping Assignments between multiple Views (Caron et al., 2020, https://arxiv.org/abs/2006.09882).

Each view of an image predicts the cluster assignment of another view. This assignment, the code q, is soft over K
prototypes; Sinkhorn-Knopp computes it so that a batch is spread evenly over all prototypes, which prevents collapse.
There are no negatives and no second network. Only the two large views get codes; cheap small views predict them, too.

    large view 1 -> f -> g -> z1 --.            .-- Sinkhorn --> q1, q2        (no gradient)
    large view 2 -> f -> g -> z2 --+--> C^T z --|                  |  minimize -q1 log p2, -q2 log p1,
    small views  -> f -> g -> zv --'            '-- softmax --> p1, p2, pv         -q1 log pv, -q2 log pv
    z and the columns of C, the prototypes, are unit vectors

    differences        paper                      official code               here (more in docs/swav.md)
    two-crop SwAV      -                          areas from .08              from .14, as with small crops; --min-scale
    queue              for small batches          filled from its epoch on    filled from the start, used from then on
    optimizer          LARS                       apex's LARC on all tensors  LARC; sgd and adamw decay all tensors, too
    warm-up            linear                     from 0.3                    from 0
    blur               -                          Pillow's, any width         torchvision's, kernel a tenth of the view
    linear probe       100 epochs, crops, flips   the same                    un-augmented frozen features, 100 epochs
    small images       -                          -                           recipes below; 3x3 stem under 64 px
    precision          fp16                       fp16                        bf16 autocast; Sinkhorn and loss in fp32

Measured with this file (k-NN: 20 neighbors; protocols and curves in results/README.md):

    command                              network, epochs  seeds  k-NN       linear     device, commit
    python swav.py                       resnet10_16, 16  0      92.4       95.2       2 cores, 2.7 min, 3980407
    the same                             resnet10_16, 16  0 1    92.5 92.6  95.9 95.7  1 core, 3.5 min
                                         random init      0 1    14.7 13.1  not run

    python swav.py                                                           shapes, minutes on a laptop
    torchrun --standalone --nproc_per_node=8 swav.py --data imagenet --root DIR
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

import backbones
import common
import data
import optim
import parallel
import sets
import training

METHOD = "swav"

# ============ recipes: one per data regime; every entry but `views` is the default of a flag ============

RECIPES = {
    # Minutes on a CPU, so unlike the paper: AdamW at a high rate, a small network, few prototypes, and a lower epsilon,
    # without which a short run stays at the chance level, ln K (docs/swav.md).
    "shapes": dict(
        arch="resnet10_16", size=32, epochs=16, batch_size=64, optimizer="adamw", lr=3.2e-2, weight_decay=1e-4,
        warmup_epochs=1.0, small_crops=2, small_size=16, prototypes=100, temperature=0.1, epsilon=0.02,
        freeze_epochs=1.0, queue_length=0, queue_epoch=0.0, hidden=256, dim=128, eval_every=2,
        views=[
            *[dict(scale=(0.5, 1.0), interpolation="bilinear", jitter=(0.4, 0.4, 0.4, 0.5), jitter_p=1.0,
                   gray=0.5)] * 2,
            *[dict(scale=(0.2, 0.5), interpolation="bilinear", jitter=(0.4, 0.4, 0.4, 0.5), jitter_p=1.0,
                   gray=0.5, size=16)] * 2,
        ],
    ),
    # lightly's published setting (Adam, 1e-3 x batch / 128, two crops, 512 prototypes, never frozen), but with AdamW, a
    # cosine per step to a thousandth and prototypes without bias. Not run in full yet.
    "cifar10": dict(
        arch="resnet18", size=32, epochs=200, batch_size=512, optimizer="adamw", lr=2e-3, weight_decay=1e-6,
        warmup_epochs=0.0, small_crops=0, small_size=16, prototypes=512, temperature=0.1, epsilon=0.05,
        freeze_epochs=0.0, queue_length=0, queue_epoch=15.0, hidden=512, dim=128, eval_every=10,
        views=[  # no blur at 32 px
            dict(scale=(0.14, 1.0), interpolation="bilinear", jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray=0.2)
        ] * 2,
    ),
    # The code's swav_800ep_pretrain.sh. Its setting for a batch of 256: docs/swav.md.
    "imagenet": dict(
        arch="resnet50", size=224, epochs=800, batch_size=4096, optimizer="lars", lr=0.3, weight_decay=1e-6,  # script
        warmup_epochs=10, small_crops=6, small_size=96, prototypes=3000, temperature=0.1, epsilon=0.05,  # script
        freeze_epochs=1.0, queue_length=0, queue_epoch=15.0,  # script: 313 iterations are an epoch; main_swav.py
        hidden=2048, dim=128, eval_every=10,  # src/resnet50.py
        views=[  # script, src/multicropdataset.py
            *[dict(scale=(0.14, 1.0), interpolation="bilinear", jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.8,
                   gray=0.2, blur=0.5, std=(0.228, 0.224, 0.225))] * 2,
            *[dict(scale=(0.05, 0.14), interpolation="bilinear", jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.8,
                   gray=0.2, blur=0.5, std=(0.228, 0.224, 0.225), size=96)] * 6,
        ],
    ),
}  # fmt: skip
# A folder of photographs, for a laptop or one GPU: hyper-parameters of `shapes`, the paper's views.
LARGE, SMALL = RECIPES["imagenet"]["views"][:2], [RECIPES["imagenet"]["views"][2] | {"size": 48}] * 2
RECIPES["folder"] = RECIPES["shapes"] | training.FOLDER | dict(views=LARGE + SMALL, lr=3.2e-2, small_size=48)


def parse_args(argv=None):
    p, known = training.flags(METHOD, __doc__, RECIPES, argv)
    # SwAV
    p.add_argument("--small-crops", type=int, help="V, small views besides the two large ones")
    p.add_argument("--small-size", type=int, help="px of the small views")
    p.add_argument("--min-scale", type=float, nargs=2, metavar=("LARGE", "SMALL"), help="minimum relative areas")
    p.add_argument("--prototypes", type=int, help="K, columns of C; several per class are enough")
    p.add_argument("--temperature", type=float, help="tau of the softmax over cosines; lower is sharper")
    p.add_argument("--epsilon", type=float, help="smoothness of the codes; lower it if the loss stays at ln K")
    p.add_argument("--sinkhorn-iterations", type=int, default=3, help="rounds of Sinkhorn-Knopp")
    p.add_argument("--freeze-epochs", type=float, help="epochs without updates of the prototypes")
    p.add_argument("--queue-length", type=int, help="embeddings of earlier batches used in Sinkhorn (0: no queue)")
    p.add_argument("--queue-epoch", type=float, help="first epoch that uses the queue")
    p.add_argument("--hidden", type=int, help="hidden width of the heads")
    p.add_argument("--dim", type=int, help="D, width of the vectors that the loss compares")
    args = training.parse(p, METHOD, RECIPES[known.recipe], argv)
    common.at_least(1, args, "hidden", "dim", "small_size", "prototypes", "sinkhorn_iterations")
    common.at_least(0, args, "small_crops", "freeze_epochs", "queue_length", "queue_epoch")
    for name in ("temperature", "epsilon"):
        if not 0 < getattr(args, name) < math.inf:
            common.fail(f"--{name} {getattr(args, name):g}: it must be above 0 and finite")
    if args.small_crops and args.small_size > args.size:
        common.fail(f"--small-size {args.small_size}: it must be at most --size {args.size}")
    return args


# ============ the method ============


def multi_crop(views, number, size, least=None):
    """The large views of a recipe and `number` small ones of `size` px (sec. 3.2): as its small view or, without one,
    from 5 % up to the minimum area of a large view, as in the code. `least`: other minimum areas (large, small)."""
    small = views[2] if len(views) > 2 else {**views[0], "scale": (0.05, views[0]["scale"][0])}
    views = views[:2] + [{**small, "size": size}] * number
    lows = [*least[:1] * 2, *least[1:] * number] if least else [view["scale"][0] for view in views]
    for low, view in zip(lows, views, strict=True):
        if not 0 < low <= view["scale"][1]:
            common.fail(f"--min-scale {low:g}: it must be above 0 and at most {view['scale'][1]:g}")
    return [{**view, "scale": (low, view["scale"][1])} for low, view in zip(lows, views, strict=True)]


def views_of(args):
    views = multi_crop(RECIPES[args.recipe]["views"], args.small_crops, args.small_size, args.min_scale)
    return [data.view(**{"size": args.size, **v}) for v in views]


@torch.no_grad()
def sinkhorn(S, epsilon, iterations=3):
    """Codes q [..., b, K] from scores S [..., b, K]: exp(S / epsilon), columns and rows normalized in turn (eq. 5).
    A code sums to 1; over the samples of all ranks, each prototype gets nearly the same share. The factors exp(u) and
    exp(v) are kept as logarithms to avoid overflow. Collective."""
    S, v = S.float() / epsilon, 0.0
    for _ in range(iterations):
        u = -torch.logsumexp(S + v, -2, keepdim=True)  # [..., 1, K], over the samples of this rank
        u = -torch.logsumexp(-common.gather(u[None]), 0)  # over those of all ranks
        v = -torch.logsumexp(S + u, -1, keepdim=True)  # [..., b, 1]
    return (S + u + v).exp()


def swapped_prediction(S, q, temperature):
    """-q_i log p_v (eq. 2), mean over samples and over all pairs of a code i and a view v other than its own (eq. 6).
    S [V + 2, b, K]: scores of all views. q [2, b, K]: codes of the two large ones; no gradient into them."""
    log_p = F.log_softmax(S.float() / temperature, dim=2)  # [V + 2, b, K]
    losses = -(q.detach().float().flatten(1) @ log_p.flatten(1).T) / S.shape[1]  # [2, V + 2]: all pairs at once
    return (losses.sum() - losses.trace()) / (losses.numel() - len(q))


class SwAV(nn.Module):
    """Backbone f, head g, prototypes C; `forward(views)` is the loss of eq. 6, large views first. Collective."""

    def __init__(self, backbone, prototypes=3000, hidden=2048, dim=128, temperature=0.1, epsilon=0.05, queue_length=0,
                 iterations=3):  # fmt: skip
        super().__init__()
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations
        self.seen, self.figures = [], {}
        self.f = backbone
        self.g = nn.Sequential(
            nn.Linear(backbone.dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim)
        )  # code, src/resnet50.py
        self.C = nn.Linear(dim, prototypes, bias=False)  # its weight is C^T, [K, D]
        self.register_buffer("queue", torch.zeros(2, queue_length, dim))  # newest row first; fp32

    def forward(self, views, queued=False):
        """`queued`: whether Sinkhorn uses the queue; the same on all ranks."""
        # BatchNorm statistics as in the code: in f over all views of one size, in g over all views.
        groups = [torch.cat(list(group)) for _, group in itertools.groupby(views, key=lambda x: x.shape[-1])]
        out = self.g(torch.cat([self.f(x) for x in groups])).unflatten(0, (len(views), -1))  # [V + 2, b, D]
        with torch.autocast(out.device.type, enabled=False):
            with torch.no_grad():  # not part of the graph, as in the code
                self.C.weight.copy_(F.normalize(self.C.weight, dim=1))
            z = F.normalize(out.float(), dim=2)
            S = self.C(z)  # [V + 2, b, K]
            q = self.codes(S[:2].detach(), queued)
            if self.queue.shape[1]:
                self.seen.append(z[:2].detach())
            self.figures = {
                "feature_std": z[0].detach().std(0).mean() * z.shape[2] ** 0.5,  # 1: spread, 0: collapsed
                # Perplexities: the number of prototypes used by the batch and by a view. Both K: the codes are uniform.
                "batch_prototypes": torch.special.entr(q.mean((0, 1))).sum().exp(),
                "view_prototypes": torch.special.entr(q).sum(2).mean().exp(),
            }
            return swapped_prediction(S, q, self.temperature)

    @torch.no_grad()
    def codes(self, S, queued):
        """Codes q [2, b, K] of the large views, from their scores S. Queue rows are additional samples for Sinkhorn;
        their codes are dropped. Each rank takes an equal part of them."""
        b = S.shape[1]
        if queued:
            rank, world = common.rank(), common.world_size()
            S = torch.cat([self.C(self.queue.chunk(world, 1)[rank]), S], 1)  # current prototypes
        return sinkhorn(S, self.epsilon, self.iterations)[:, -b:]

    @torch.no_grad()
    def enqueue(self):
        """Adds the large views' embeddings of all ranks since the last call; the oldest drop out. Collective."""
        z = torch.cat(self.seen, 1)  # [2, n, D]
        self.seen.clear()
        z = common.gather(z, 1)
        self.queue.copy_(torch.cat([z, self.queue], 1)[:, : self.queue.shape[1]])


class LARC(optim.LARS):
    """LARS as the authors use it (NVIDIA's apex, LARC.py, clip=False):  q = eta |w| / (|g| + lambda |w| + 1e-8);
    v <- mu v + q (g + lambda w);  w <- w - lr v. It adapts and decays all tensors, also biases and BatchNorm; where |w|
    or |g| is 0, v <- mu v + g."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            w = [p for p in group["params"] if p.grad is not None]
            g, decay = [p.grad for p in w], group["weight_decay"]
            w_norm, g_norm = torch.stack(torch._foreach_norm(w)), torch.stack(torch._foreach_norm(g))
            both = (w_norm > 0) & (g_norm > 0)
            q = torch.where(both, group["eta"] * w_norm / (g_norm + decay * w_norm + 1e-8), 1.0)
            u = torch._foreach_mul(g, list(q.unbind()))
            torch._foreach_add_(u, torch._foreach_mul(w, list((q * decay * both).unbind())))
            v = [s["momentum"] if (s := self.state[p]) else s.setdefault("momentum", torch.zeros_like(p)) for p in w]
            torch._foreach_mul_(v, group["momentum"])
            torch._foreach_add_(v, u)
            torch._foreach_add_(w, v, alpha=-group["lr"])


OPTIMIZERS = optim.OPTIMIZERS | {"lars": LARC}


# ============ the run ============


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = common.setup(args.device)
    args.amp = common.bf16_is_fast(device) if args.amp is None else args.amp

    # ============ data ============
    views = views_of(args)
    train, labelled, test = sets.splits(args, device)
    per_pass = training.images_per_pass(args, world, len(train))
    if isinstance(train, sets.Images) and args.size > min(train.images.shape[2:]):
        px = "x".join(map(str, train.images.shape[2:]))
        common.fail(f"--size {args.size}: the images of {args.data} have {px} px; lower --size and --small-size")
    if args.queue_length % args.batch_size:
        common.fail(f"--queue-length {args.queue_length} is not a multiple of --batch-size {args.batch_size}")
    if args.queue_length > len(train):
        common.fail(f"--queue-length {args.queue_length}: {args.data} has only {len(train)} training images")
    loader = data.Loader(train, views, per_pass, args.seed, rank, world, args.workers, device)
    preprocess = {"mean": views[0]["mean"], "std": views[0]["std"], "size": args.size, "interpolation": "bilinear"}

    # ============ model ============
    torch.manual_seed(args.seed)  # the same initial weights on every rank
    f, codes = backbones.build(args.arch, args.size), (args.epsilon, args.queue_length, args.sinkhorn_iterations)
    model = SwAV(f, args.prototypes, args.hidden, args.dim, args.temperature, *codes)
    model = model.to(device, memory_format=torch.channels_last)
    ddp = model
    if world > 1:
        parallel.sync_batch_norm(model)  # statistics of the global batch, as in the paper
        ddp = parallel.wrap(model, device)
    if args.compile:
        model.f.compile()  # in place: keeps the names in state_dict()

    # ============ optimizer ============
    lr = args.lr * args.batch_size / 256
    # As in the code, all tensors are decayed and adapted by LARC, also biases and BatchNorm.
    group = {"params": list(model.parameters()), "weight_decay": args.weight_decay, "adapt": True}
    optimizer = OPTIMIZERS[args.optimizer]([group], lr=lr)

    # ============ run: print the recipe, go on from a checkpoint ============
    run = training.Run(METHOD, args, model, {"optimizer": optimizer}, loader, views, preprocess, labelled, test, device)
    frozen = round(args.freeze_epochs * run.steps)  # updates that leave the prototypes unchanged
    queue_from = max(round(args.queue_epoch * run.steps), args.queue_length // args.batch_size)  # when it is full
    crops = f"2 x {args.size} px, {args.small_crops} x {args.small_size} px"
    queue = f"queue 2 x {args.queue_length} x {args.dim}, {model.queue.numel() * 4 / 1e6:.1f} MB a rank"
    uniform = math.log(args.prototypes)
    random = uniform + 1 / (2 * args.dim * args.temperature**2)  # a cosine of random unit vectors has variance 1 / D
    run.describe(
        f"lr {args.lr:g} x {args.batch_size} / 256 = {lr:.4g}, {run.warmup} steps of warm-up, then to a thousandth",
        f"{args.optimizer}: {optim.count(optimizer)}",
        f"views {crops}; {args.prototypes} prototypes of {args.dim}, frozen for {frozen} steps",
        f"{queue}, used from step {queue_from}" if args.queue_length else "no queue",
        f"chance-level loss ln {args.prototypes} = {uniform:.2f}, of random vectors {random:.2f}",
    )
    if not run.begin():
        return

    # ============ training ============
    while run.is_training():
        if run.probe_is_due():
            run.probe()
        for step in run.epoch():
            lr_now = optim.cosine(step, run.total, lr, lr / 1000, run.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr_now
            queued = args.queue_length > 0 and step >= queue_from
            for _, _, xs in run.passes(ddp):
                with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                    loss = ddp(xs, queued) / args.accumulate
                loss.backward()
                run.log.loss += loss.detach()
            if step < frozen:
                model.C.weight.grad = None  # excludes them from momentum and decay, too
            optimizer.step()
            optimizer.zero_grad()
            if args.queue_length:
                model.enqueue()  # after the update: its codes use the old queue
            run.end_step(lr_now, **model.figures)
        run.save()
    if run.stopped:
        return common.STOPPED
    run.finish()


if __name__ == "__main__":
    common.run(main)
