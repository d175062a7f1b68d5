"""SwAV: Swapping Assignments between multiple Views (Caron et al., 2020, https://arxiv.org/abs/2006.09882).

Each view of an image predicts to which of K prototypes another view of it belongs. The answer, the code q, comes from the
network itself, and every batch is shared out evenly among the prototypes (Sinkhorn-Knopp), so that one answer for all images
is no solution. No negatives, no second network. Only the two large views get codes; small ones are cheap and predict them.

    large view 1 -> f -> g -> z1 --.            .-- Sinkhorn --> q1, q2        (no gradient)
    large view 2 -> f -> g -> z2 --+--> C^T z --|                  |  minimise -q1 log p2, -q2 log p1,
    small views  -> f -> g -> zv --'            '-- softmax --> p1, p2, pv         -q1 log pv, -q2 log pv

    z and the columns of C, the prototypes, are unit vectors

    differences        paper                      official code               here (more in docs/swav.md)
    two large crops    -                          areas from .08              from .14, as with small ones; --min-scale .08 .05
    queue              for small batches          a part a process, in files  all of it in each process, in the checkpoint
    ... is filled      -                          from its epoch on           from the start: full when its epoch comes
    optimiser          LARS                       apex's LARC, adapts and     the same; sgd and adamw decay all tensors, too
                                                  decays all tensors
    warm-up            linear                     from 0.3                    from 0
    blur               -                          Pillow's, any width         torchvision's, a tenth of the view
    BatchNorm          of all GPUs                of groups of 8 GPUs         of all GPUs; on CPUs of each process
    linear probe       100 epochs, crops, flips   the same                    un-augmented frozen features, 100 epochs
    small images       -                          -                           recipes below; 3x3 stem under 64 px
    precision          fp16                       fp16                        bf16 autocast; scores, Sinkhorn and loss in fp32

Measured with this file (k-NN: 20 neighbours; protocols and curves in results/README.md):

    command                              network, epochs  seeds  k-NN       linear     device
    python swav.py                       resnet10_16, 16  0      92.4       95.2       2 CPU cores, 2.7 min, 3980407
    the same                             resnet10_16, 16  0 1    92.5 92.6  95.9 95.7  1 CPU core, 3.5 min of its time
                                         at random        0 1    14.7 13.1  not run
    ... --epochs 6 --lr 0.016            resnet10_16, 6   0      64.7       not run    the same
    ... and without --small-crops (0)    resnet10_16, 6   0      45.6       not run    the same

    python swav.py                                                           shapes, minutes on a laptop
    torchrun --standalone --nproc_per_node=8 swav.py --data imagenet --root DIR
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import backbones
import common
import data
import optim
import sets
import training

METHOD = "swav"

# ============ recipes: one per data regime; every entry but `views` is the default of a flag ============

RECIPES = {
    # Quick on a CPU, so unlike the paper: AdamW at a high rate, a small network, few prototypes, and a lower epsilon, without
    # which the short run stays at ln K (docs/swav.md).
    "shapes": dict(
        arch="resnet10_16", size=32, epochs=16, batch_size=64, optimizer="adamw", lr=3.2e-2, weight_decay=1e-4,
        warmup_epochs=1.0, small_crops=2, small_size=16, prototypes=100, temperature=0.1, epsilon=0.02, freeze_epochs=1.0,
        queue_length=0, queue_epoch=0.0, hidden=256, dim=128, eval_every=2,
        views=[
            *[dict(scale=(0.5, 1.0), interpolation="bilinear", jitter=(0.4, 0.4, 0.4, 0.5), jitter_p=1.0, grey=0.5)] * 2,
            *[dict(size=16, scale=(0.2, 0.5), interpolation="bilinear", jitter=(0.4, 0.4, 0.4, 0.5), jitter_p=1.0, grey=0.5)] * 2,
        ],
    ),
    # lightly's published setting: Adam, 1e-3 x batch / 128, two crops, 512 prototypes, never frozen; but AdamW, a cosine by
    # the step to a thousandth, prototypes without a bias. Not run in full yet.
    "cifar10": dict(
        arch="resnet18", size=32, epochs=200, batch_size=512, optimizer="adamw", lr=2e-3, weight_decay=1e-6,
        warmup_epochs=0.0, small_crops=0, small_size=16, prototypes=512, temperature=0.1, epsilon=0.05, freeze_epochs=0.0,
        queue_length=0, queue_epoch=15.0, hidden=512, dim=128, eval_every=10,
        views=[  # no blur at 32 px
            dict(scale=(0.14, 1.0), interpolation="bilinear", jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grey=0.2)
        ] * 2,
    ),
    # The code's swav_800ep_pretrain.sh. For a batch of 256 (swav_200ep_bs256_pretrain.sh): lr 0.6, no warm-up, a queue of 3840.
    "imagenet": dict(
        arch="resnet50", size=224, epochs=800, batch_size=4096, optimizer="lars", lr=0.3, weight_decay=1e-6,  # script
        warmup_epochs=10, small_crops=6, small_size=96, prototypes=3000, temperature=0.1, epsilon=0.05,  # script
        freeze_epochs=1.0, queue_length=0, queue_epoch=15.0,  # script: 313 iterations are an epoch; main_swav.py
        hidden=2048, dim=128, eval_every=10,  # src/resnet50.py
        views=[  # script, src/multicropdataset.py
            *[dict(scale=(0.14, 1.0), interpolation="bilinear", jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.8, grey=0.2, blur=0.5,
                   std=(0.228, 0.224, 0.225))] * 2,
            *[dict(size=96, scale=(0.05, 0.14), interpolation="bilinear", jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.8, grey=0.2,
                   blur=0.5, std=(0.228, 0.224, 0.225))] * 6,
        ],
    ),
}  # fmt: skip


def parse_args(argv=None):
    p, known = training.flags(METHOD, __doc__, RECIPES, argv)
    # SwAV
    p.add_argument("--small-crops", type=int, help="V, small views besides the two large ones (0: two-crop SwAV)")
    p.add_argument("--small-size", type=int, help="px of the small views")
    p.add_argument("--min-scale", type=float, nargs=2, metavar=("LARGE", "SMALL"),
                   help="least share of the image in a large and in a small view (default: the recipe's)")  # fmt: skip
    p.add_argument(
        "--prototypes", type=int, help="K, columns of C; little depends on it while there are several a class"
    )
    p.add_argument(
        "--temperature", type=float, help="tau, what the cosines are divided by before the softmax; lower is sharper"
    )
    p.add_argument("--epsilon", type=float, help="smoothness of the codes; if the loss stays at ln K, try less")
    p.add_argument("--sinkhorn-iterations", type=int, default=3, help="rounds of rescaling that make a code")
    p.add_argument("--freeze-epochs", type=float, help="in which the prototypes stay as they are drawn")
    p.add_argument("--queue-length", type=int, help="embeddings of earlier images that join in the codes (0: no queue)")
    p.add_argument("--queue-epoch", type=float, help="from which the queue is used, if it is full by then")
    p.add_argument("--hidden", type=int, help="hidden width of the heads")
    p.add_argument("--dim", type=int, help="D, width of the vectors that the loss compares")
    args = training.parse(p, METHOD, RECIPES[known.recipe], argv)
    common.at_least(1, args, "hidden", "dim")
    common.at_least(1, args, "small_size", "prototypes", "sinkhorn_iterations")
    common.at_least(0, args, "small_crops", "freeze_epochs", "queue_length", "queue_epoch")
    for name in ("temperature", "epsilon"):
        if not 0 < getattr(args, name) < math.inf:
            common.fail(f"--{name} {getattr(args, name):g}: it must be above 0 and finite")
    if args.small_crops and args.small_size > args.size:
        common.fail(
            f"--small-size {args.small_size}: small views must not be larger than the large ones, --size {args.size}"
        )
    return args


# ============ the method ============


def multi_crop(views, number, size, least=None):
    """The two large views of a recipe and `number` small ones of `size` px (sec. 3.2). Where the recipe has none, they are
    large ones that show less: from 5 % of the image to what those show at least, as the code's. `least`: the least share of
    the image in a large and in a small view, in place of the recipe's."""
    small = views[2] if len(views) > 2 else {**views[0], "scale": (0.05, views[0]["scale"][0])}
    views = views[:2] + [{**small, "size": size}] * number
    lows = [*least[:1] * 2, *least[1:] * number] if least else [view["scale"][0] for view in views]
    for low, view in zip(lows, views, strict=True):
        if not 0 < low <= view["scale"][1]:
            common.fail(
                f"--min-scale {low:g}: it must be above 0 and at most {view['scale'][1]:g}, the most that the view shows"
            )
    return [{**view, "scale": (low, view["scale"][1])} for low, view in zip(lows, views, strict=True)]


def views_of(args):
    views = multi_crop(RECIPES[args.recipe]["views"], args.small_crops, args.small_size, args.min_scale)
    return [data.view(**{"size": args.size, **v}) for v in views]


@torch.no_grad()
def sinkhorn(S, epsilon, iterations=3):
    """Codes q [..., b, K] of scores S [..., b, K]: exp(S / epsilon), its columns and rows rescaled in turn (eq. 5), so that
    over the samples of all processes each prototype gets nearly the same share and each sample's code sums to 1. The
    factors exp(u) and exp(v) are kept as logarithms: nothing overflows. Every process must call it."""
    S, v = S.float() / epsilon, 0.0
    for _ in range(iterations):
        u = -torch.logsumexp(S + v, -2, keepdim=True)  # [..., 1, K], of this process's samples
        u = -torch.logsumexp(-common.gather(u[None]), 0)  # of all ranks' samples
        v = -torch.logsumexp(S + u, -1, keepdim=True)  # [..., b, 1]
    return (S + u + v).exp()


def swapped_prediction(S, q, temperature):
    """-q_i log p_v (eq. 2), mean over samples and over all pairs of a code i and a view v other than its own (eq. 6).
    S [V + 2, b, K]: scores of all views. q [2, b, K]: codes of the first two; no gradient into them."""
    log_p = F.log_softmax(S.float() / temperature, dim=2)  # [V + 2, b, K]
    losses = -(q.detach().float().flatten(1) @ log_p.flatten(1).T) / S.shape[1]  # [2, V + 2]: all pairs at once
    return (losses.sum() - losses.trace()) / (losses.numel() - len(q))


class SwAV(nn.Module):
    """Backbone f, head g, prototypes C; `forward(views)` is the loss of eq. 6, with the codes of the first two views."""

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
        self.register_buffer("queue", torch.zeros(2, queue_length, dim))  # of each large view, the newest first; fp32

    def forward(self, views, queued=False):
        """`queued`: whether the queue joins in the codes. Every process must call it alike."""
        # Views of one size make one batch, and the head's batch is all views: so BatchNorm sees them in the code, too.
        groups = [torch.cat(list(group)) for _, group in itertools.groupby(views, key=lambda x: x.shape[-1])]
        out = self.g(torch.cat([self.f(x) for x in groups])).unflatten(0, (len(views), -1))  # [V + 2, b, D]
        with torch.autocast(out.device.type, enabled=False):
            with torch.no_grad():  # in place: the gradient is that of the weight, as in the code
                self.C.weight.copy_(F.normalize(self.C.weight, dim=1))
            z = F.normalize(out.float(), dim=2)
            S = self.C(z)  # [V + 2, b, K]
            q = self.codes(S[:2].detach(), queued)
            if self.queue.shape[1]:
                self.seen.append(z[:2].detach())
            self.figures = {
                "feature_std": z[0].detach().std(0).mean() * z.shape[2] ** 0.5,  # 1: spread, 0: collapsed
                # Perplexities: how many prototypes the batch shares, and how many a view. K and K: the codes tell nothing.
                "batch_prototypes": torch.special.entr(q.mean((0, 1))).sum().exp(),
                "view_prototypes": torch.special.entr(q).sum(2).mean().exp(),
            }
            return swapped_prediction(S, q, self.temperature)

    @torch.no_grad()
    def codes(self, S, queued):
        """q [2, b, K] of the large views' scores S. The queue's rows are samples like those of the batch, whose codes are
        then not needed; each process takes its share of them."""
        b = S.shape[1]
        if queued:
            rank, world = common.rank(), common.world_size()
            S = torch.cat([self.C(self.queue.chunk(world, 1)[rank]), S], 1)  # with the prototypes of today
        return sinkhorn(S, self.epsilon, self.iterations)[:, -b:]

    @torch.no_grad()
    def enqueue(self):
        """The large views' embeddings of all processes since the last update go in at the front; the oldest fall out. Every
        process writes the same rows and must call it."""
        z = torch.cat(self.seen, 1)  # [2, n, D]
        self.seen.clear()
        z = common.gather(z, 1)
        self.queue.copy_(torch.cat([z, self.queue], 1)[:, : self.queue.shape[1]])


class LARC(optim.LARS):
    """LARS as the authors use it (NVIDIA's apex, LARC.py, clip=False):  q = eta |w| / (|g| + lambda |w|);
    v <- mu v + q (g + lambda w);  w <- w - lr v. It adapts and decays all tensors, biases and BatchNorm, too. Where |w| or
    |g| is 0 the gradient stays as it is."""

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
            v = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in w]
            torch._foreach_mul_(v, group["momentum"])
            torch._foreach_add_(v, u)
            torch._foreach_add_(w, v, alpha=-group["lr"])


# A folder of photographs, for a laptop or one GPU: the small network's numbers, the paper's views.
LARGE, SMALL = RECIPES["imagenet"]["views"][:2], [RECIPES["imagenet"]["views"][2] | {"size": 48}] * 2
RECIPES["folder"] = RECIPES["shapes"] | training.FOLDER | dict(views=LARGE + SMALL, lr=3.2e-2, small_size=48)
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
        fit = "choose --size and --small-size to fit"
        common.fail(f"--size {args.size}: the views are larger than the images of {args.data}, {px} px; {fit}")
    if args.queue_length % args.batch_size:
        common.fail(f"--queue-length {args.queue_length} is not a multiple of --batch-size {args.batch_size}")
    if args.queue_length > len(train):
        common.fail(
            f"--queue-length {args.queue_length} is larger than the {len(train)} training images of {args.data}"
        )
    loader = data.Loader(train, views, per_pass, args.seed, rank, world, args.workers, device)
    preprocess = {"mean": views[0]["mean"], "std": views[0]["std"], "size": args.size, "interpolation": "bilinear"}

    # ============ model ============
    torch.manual_seed(args.seed)  # the same initial weights in every process
    model = SwAV(
        backbones.build(args.arch, args.size), args.prototypes, args.hidden, args.dim, args.temperature, args.epsilon,
        args.queue_length, args.sinkhorn_iterations,
    ).to(device, memory_format=torch.channels_last)  # fmt: skip
    ddp = model
    if world > 1:
        if device.type == "cuda":  # the paper's BatchNorm sees the global batch; there is no such layer for the CPU
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        # Every process writes the same queue: DDP need not send it before each step.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["queue"])
        ddp = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    if args.compile:
        model.f.compile()  # in place: the names in state_dict() stay

    # ============ optimizer ============
    lr = args.lr * args.batch_size / 256
    # All tensors are decayed and, by LARC, adapted, as in the code: biases and BatchNorm, too.
    group = {"params": list(model.parameters()), "weight_decay": args.weight_decay, "adapt": True}
    optimizer = OPTIMIZERS[args.optimizer]([group], lr=lr)

    # ============ run: print the recipe, go on from a checkpoint ============
    run = training.Run(METHOD, args, model, {"optimizer": optimizer}, loader, views, preprocess, labelled, test, device)
    frozen = round(args.freeze_epochs * run.steps)  # updates without the prototypes
    queue_from = max(round(args.queue_epoch * run.steps), args.queue_length // args.batch_size)  # not before it is full
    crops = f"2 x {args.size} px, {args.small_crops} x {args.small_size} px"
    queue = []
    if args.queue_length:
        size = model.queue.numel() * 4 / 1e6
        queue = [f"queue 2 x {args.queue_length} x {args.dim}, {size:.1f} MB a rank, used from step {queue_from}"]
    even = math.log(args.prototypes)
    spread = 1 / (2 * args.dim * args.temperature**2)  # a cosine of random unit vectors has variance 1 / D
    run.describe(
        f"lr {args.lr:g} x {args.batch_size} / 256 = {lr:.4g}, {run.warmup} steps of warm-up, then to a thousandth",
        f"{args.optimizer}: {optim.count(optimizer)}",
        f"views {crops}; {args.prototypes} prototypes of {args.dim}, which do not move in the first {frozen} steps",
        *queue,
        f"loss of even predictions ln {args.prototypes} = {even:.2f}, of unrelated vectors {even + spread:.2f}",
    )
    if run.resume():
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
                model.C.weight.grad = None  # so no momentum and no decay, either
            optimizer.step()
            optimizer.zero_grad()
            if args.queue_length:
                model.enqueue()  # after the step: the codes of an update are made with the old queue
            run.end_step(lr_now, **model.figures)
        run.save()
    if run.stopped:
        return common.STOPPED
    run.finish()


if __name__ == "__main__":
    common.run(main)
