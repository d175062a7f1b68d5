"""What memory a training step needs of a GPU, counted before it is made. Whoever skips this file still understands the
papers."""

import copy

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import common
import runs

GIB = 2**30


def bytes_kept(model, views, images, amp, forward=lambda model, xs: model(xs)):
    """Bytes that `forward(model, xs)`, with xs one [images, 3, size, size] for each of `views`, keeps for the backward
    pass: each storage once, without parameters, buffers and xs. On fake tensors, which have no values, so nothing is
    computed or changed; with `amp` in bf16 what is bf16 on a GPU."""
    mode, like = FakeTensorMode(allow_non_fake_inputs=True), {}
    fake = lambda t: FakeTensor(mode, torch.empty_like(t, device="meta"), torch.device("cpu"))
    for t in [*model.parameters(), *model.buffers()]:
        like[id(t)] = nn.Parameter(fake(t), t.requires_grad) if isinstance(t, nn.Parameter) else fake(t)
    twin = copy.deepcopy(model, like.copy())  # with these in place of its tensors
    for m in twin.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eval()  # keeps the same, is traced faster, and needs no other rank
        elif amp and isinstance(m, (nn.GroupNorm, nn.LayerNorm)):  # of fp32 in CUDA's autocast, not in the CPU's
            m.register_forward_pre_hook(lambda _, x: x[0].float())
    shapes = [torch.empty(images, 3, v["size"], v["size"], device="meta") for v in views]
    xs = [fake(x.contiguous(memory_format=torch.channels_last)) for x in shapes]
    known, kept = {t.untyped_storage()._cdata for t in [*like.values(), *xs]}, {}

    def keep(t):  # holds t, so that no other storage gets its address
        if (address := t.untyped_storage()._cdata) not in known:
            kept[address] = t
        return t

    collectives = common.all_gather, common.all_reduce
    common.all_gather = lambda x: x.new_empty(common.world_size(), *x.shape)  # there are no values to send
    common.all_reduce = lambda x: x
    try:
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=amp):
            forward(twin, xs)
    finally:
        common.all_gather, common.all_reduce = collectives
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def bytes_held(model, optimizers):
    """Bytes of parameters and buffers, of gradients, and of what optimizers remember of each parameter."""
    total = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
    gradients = total(p for p in model.parameters() if p.requires_grad)
    states = [total(p for group in o.param_groups for p in group["params"])
              * (2 if isinstance(o, (torch.optim.Adam, torch.optim.AdamW)) else 1) for o in optimizers]  # fmt: skip
    return total([*model.parameters(), *model.buffers()]) + gradients + sum(states)


def check(run, **forward):
    """Print the memory that a training.Run needs of a GPU; refuse a batch that this one cannot hold, with the
    --accumulate that fits. Rank 0 only."""
    a, images = run.args, run.loader.batch_size
    optimizers = [state for name, state in run.states.items() if name != "model"]
    held = bytes_held(run.model, optimizers)
    amp = a.amp if run.device.type == "cuda" else "no_amp" not in a.given  # for a GPU, whatever this CPU has
    try:
        kept = bytes_kept(run.model, run.views, images, amp, **forward)
    except Exception as error:  # your own network may need values: it trains without an estimate
        return run.say(f"memory: not known ({runs.reason(error)})")
    per_pass = kept + 12 * images * sum(v["size"] ** 2 for v in run.views)
    run.say(f"memory: about {(held + per_pass) / GIB:.1f} GiB a GPU; {kept / GIB:.1f} of it kept for backward, "
             f"{kept / images / 2**20:.1f} MiB an image")  # fmt: skip
    if run.device.type != "cuda" or a.compile:  # compiled networks keep less
        return
    has = torch.cuda.get_device_properties(run.device).total_memory
    most = a.batch_size // run.world // 2  # BatchNorm needs two images
    fits = (n for n in range(a.accumulate, most + 1)
            if a.batch_size % (run.world * n) == 0 and held + per_pass * a.accumulate / n <= has)  # fmt: skip
    if (n := next(fits, None)) != a.accumulate:
        way = f"--accumulate {n} fits" if n else "lower --size, or choose a smaller --arch"
        common.fail(f"{(held + per_pass) / GIB:.1f} GiB do not fit this GPU's {has / GIB:.1f}: {way}")
