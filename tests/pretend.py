"""A pretended GPU: what is written for CUDA runs on a machine without it, and what CUDA would mind is found.

What a program puts on "cuda" becomes a `Pretend`, a tensor that holds an ordinary one. All is computed on the CPU, so
values, gradients and random numbers are real and whole scripts run to their end, but each operation is

    refused   where CUDA would refuse it: tensors of the host among those of the GPU (but for numbers in pointwise
              operations, and indices), indices of the GPU for a tensor of the host, a generator of the host
    a wait    where the host would wait for the GPU: to read a result, as its values decide on a shape, for a copy
    a launch  of a kernel, unless it makes a view or empty memory; about what CUDA needs

Of several ranks this process is the first, and the others do as it does: gathers repeat, sums multiply. Not seen: time,
memory (pinned, too), streams, workers, torch.compile, and values that CUDA's own kernels would give.
"""

import contextlib
import functools
import os
import sys
import types
from collections import Counter
from unittest import mock

import torch
from helpers import ROOT, in_process
from torch.optim import optimizer

import common

OWN, PROJECT = (__file__, torch._ops.__file__), f"{ROOT}{os.sep}"


class Refused(RuntimeError): ...


class Record:
    """`steps`, each (waits, launches): Counters of "why, Python's file, the project's line", and of the project's
    lines. A step ends when the first optimizer has made its update; the last one goes on."""

    def restart(self):
        self.steps, self.first = [(Counter(), Counter())], None

    def end_step(self, by=None, *_):
        self.first = self.first or by
        if by is self.first:
            self.steps.append((Counter(), Counter()))

    def wait(self, why):
        self.steps[-1][0]["{}, {}, {}".format(why, *place())] += 1

    def launch(self):
        self.steps[-1][1][place()[1]] += 1


record = Record()


def place():
    """(the innermost file of Python outside of this one, the innermost line of the project)"""
    frame, inner = sys._getframe(1), ""
    while frame:
        name = frame.f_code.co_filename
        if name not in OWN:
            inner = inner or name
            if name.startswith(PROJECT):
                return inner, f"{name[len(PROJECT) :]}:{frame.f_lineno}"
        frame = frame.f_back
    return inner, inner


class Pretend(torch.Tensor):
    """A tensor of the GPU with the values of the tensor `held`."""

    @staticmethod
    def __new__(cls, held, requires_grad=False):
        about = dict(strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=held.device)
        new = torch.Tensor._make_wrapper_subclass(cls, held.size(), requires_grad=requires_grad, **about)
        new.held = held
        return new

    __torch_function__ = torch._C._disabled_torch_function_impl
    __torch_dispatch__ = classmethod(lambda cls, func, types_, args=(), kwargs=None: dispatch(func, args, kwargs or {}))
    __repr__ = lambda self, **_: f"Pretend({self.held})"
    device, is_cuda = property(lambda _: torch.device("cuda:0")), property(lambda _: True)

    def __reduce_ex__(self, protocol):  # for torch.save
        record.wait("copy without non_blocking")
        return self.held.detach().__reduce_ex__(protocol)


each = lambda f, x: type(x)([each(f, y) for y in x]) if isinstance(x, (list, tuple)) else f(x)
inner = lambda xs: each(lambda x: x.held if isinstance(x, Pretend) else x, xs)
outer = lambda xs: each(lambda x: Pretend(x) if isinstance(x, torch.Tensor) else x, xs)

INDEXING = {"index", "_unsafe_index", "index_put_", "_index_put_impl_"}
READING = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "histc", "equal", "_unique2", "unique_dim",
           "unique_consecutive", "_linalg_svd", "_linalg_eigh", "_linalg_check_errors", "nms"}  # fmt: skip
NO_KERNEL = {"_unsafe_view", "set_", "resize_", "_local_scalar_dense", "empty", "empty_like", "empty_strided",
             "new_empty", "new_empty_strided", "is_same_size"}  # fmt: skip


@functools.cache
def about(func):
    """(name, whether it launches a kernel, the place and the name of an argument that it writes and returns)"""
    name, results, alias = func.overloadpacket.__name__, func._schema.returns, lambda x: x.alias_info
    views = results and all(alias(x) and not alias(x).is_write for x in results)
    written = [(i, x.name) for i, x in enumerate(func._schema.arguments) if alias(x) and alias(x).is_write]
    return name, not views and name not in NO_KERNEL, written[0] if written and len(results) == 1 else None


def dispatch(func, args, kwargs):
    """Do an operation of which at least one tensor is of the GPU."""
    (name, launches, written), seen = about(func), []
    each(seen.append, [*args, *kwargs.values()])
    host = [x for x in seen if isinstance(x, (torch.Tensor, torch.Generator)) and not isinstance(x, Pretend)]
    if host and not mixes(func, name, args, host):
        raise Refused(f"{func} of the GPU with {[getattr(x, 'shape', x) for x in host]} of the host, {place()[1]}")
    if name in READING:
        record.wait(name)
    for index in args[1] if name in INDEXING else ():
        if index is not None and (index.dtype in (torch.bool, torch.uint8) or not isinstance(index, Pretend)):
            record.wait("index that is boolean or of the host")
    if name == "copy_" and host and not (isinstance(args[0], Pretend) and any(args[2:])):
        record.wait("copy without non_blocking")
    elif launches:
        record.launch()
    if name == "as_strided_" and tuple(args[1]) == tuple(args[0].shape):
        return args[0]  # pooling to 1x1 gives its output the strides of channels_last: of one pixel all are alike
    out = func(*inner(args), **{k: inner(v) for k, v in kwargs.items()})
    if not written:
        return outer(out)
    return kwargs[written[1]] if written[1] in kwargs else args[written[0]]


def mixes(func, name, args, host):
    """Whether CUDA takes what is of the host among tensors of its own."""
    if name in ("copy_", "index_fill", "index_put", "scatter"):  # all but the first: of torch, in backward passes
        return True
    if name in INDEXING:
        return isinstance(args[0], Pretend) and not any(x.ndim for x in host if any(x is value for value in args[2:]))
    if any(isinstance(x, torch.Generator) or x.ndim for x in host) or (name.endswith("_") and args[0] is host[0]):
        return False
    one_by_one = torch.Tag.pointwise in func.tags or name.startswith(("_foreach", "_fused"))
    return one_by_one or name in ("where", "masked_fill", "fill_")


class Asked(torch.overrides.TorchFunctionMode):  # what names a device, and what C++ would read from memory
    def __torch_function__(self, func, types_, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.tolist):
            out = moved(*args, **kwargs) if func is torch.Tensor.to else moved(args[0], "cpu")
            return out.tolist() if func is torch.Tensor.tolist else out
        if (device := kwargs.get("device")) is None or torch.device(device).type != "cuda":
            return func(*args, **kwargs) if device is None else inner(func(*args, **kwargs))
        if kwargs.get("generator") is not None:
            raise Refused(f"{func.__name__} on the GPU with a generator of the host, {place()[1]}")
        out = func(*args, **kwargs | {"device": "cpu"})
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Pretend):
            record.wait("copy without non_blocking")
        elif func.__name__ not in NO_KERNEL:
            record.launch()
        return Pretend(inner(out).detach(), out.requires_grad)


def moved(x, *args, copy=False, **kwargs):
    """x.to(...)"""
    if args and isinstance(args[0], torch.Tensor):
        args = args[0].device, args[0].dtype, *args[1:]
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    how = dict(dtype=dtype or x.dtype, memory_format=memory_format or torch.preserve_format)
    if device is None or (device.type == "cuda") == isinstance(x, Pretend):
        return torch.Tensor.to(x, copy=copy, **how)
    if isinstance(x, Pretend) or not non_blocking:  # what is copied to the host is read there
        record.wait("copy without non_blocking")
    out = inner(x).detach().to(copy=True, **how)
    return out if isinstance(x, Pretend) else Pretend(out)


def collectives(world):
    """What the project uses of torch.distributed, for tensors of the GPU (by NCCL) and of the host (by gloo)."""

    def all_gather(out, x):
        if not x.is_contiguous() or type(out) is not type(x):
            raise Refused(f"all_gather of tensors that are not contiguous or of two devices, {place()[1]}")
        inner(out).view(world, *x.shape).copy_(inner(x).detach())

    all_gather_object = lambda parts, mine: parts.__setitem__(slice(None), [mine] * world)
    add = lambda x, op=None: inner(x).detach().mul_(1 if op else world)  # an op of its own: the maximum
    broadcast = lambda x, src: inner(x).zero_() if src else x  # what is another rank's is 0
    name = "all_gather_single" if hasattr(torch.distributed, "all_gather_single") else "all_gather_into_tensor"
    return {name: all_gather} | dict(
        all_reduce=add, broadcast=broadcast, all_gather_object=all_gather_object, barrier=lambda _: None,
        is_initialized=lambda: True, get_rank=lambda *_: 0, get_world_size=lambda *_: world,
    )  # fmt: skip


def parallel(self, module, device_ids, **_):  # the __init__ of DistributedDataParallel
    torch.nn.Module.__init__(self)
    self.module = module
    if device_ids != [0] or not all(isinstance(p, Pretend) for p in module.parameters()):
        raise Refused("DistributedDataParallel of parameters that are not on this rank's GPU")


# The kernels of SyncBatchNorm, which torch has for CUDA alone: x [b, C, ...], over all but C.
others = lambda x: [d for d in range(x.ndim) if d != 1]
along = lambda t, x: t.view(-1, *[1] * (x.ndim - 2))


def batch_norm_stats(x, eps):
    var, mean = torch.var_mean(x.float() if x.dtype == torch.bfloat16 else x, others(x), correction=0)
    return mean, (var + eps).rsqrt()


def batch_norm_gather_stats_with_counts(x, means, invstds, running_mean, running_var, momentum, eps, counts):
    if counts.dtype != (x if running_mean is None else running_mean).dtype:
        raise Refused(f"counts of {counts.dtype}")
    n, share = counts.sum(), (counts / counts.sum())[:, None]
    mean = (share * means).sum(0)
    var = (share * (invstds**-2 - eps + (means - mean) ** 2)).sum(0)
    if running_mean is not None:
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * n / (n - 1), momentum)
    return mean, (var + eps).rsqrt()


def batch_norm_elemt(x, weight, bias, mean, invstd, eps):
    y = (x - along(mean, x)) * along(invstd, x)
    return (y if weight is None else y * along(weight, x) + along(bias, x)).to(x.dtype)


def batch_norm_backward_reduce(dy, x, mean, invstd, weight, *wanted):
    sum_dy, sum_dy_xmu = dy.sum(others(x), dtype=mean.dtype), (dy * (x - along(mean, x))).sum(others(x))
    dw, db = sum_dy_xmu * invstd if wanted[1] else None, sum_dy.clone() if wanted[2] else None
    return (sum_dy, sum_dy_xmu, dw, db) if wanted[0] else (None, None, dw, db)


def batch_norm_backward_elemt(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts):
    n, inv = counts.sum(), along(invstd, x)
    dx = dy - along(sum_dy, x) / n - (x - along(mean, x)) * inv**2 * along(sum_dy_xmu, x) / n
    return (dx * inv * (1 if weight is None else along(weight, x))).to(x.dtype)


KERNELS = torch.library.Library("aten", "IMPL", "CPU")
for kernel in (batch_norm_stats, batch_norm_gather_stats_with_counts, batch_norm_elemt, batch_norm_backward_reduce,
               batch_norm_backward_elemt):  # fmt: skip
    KERNELS.impl(kernel.__name__, kernel)


@contextlib.contextmanager
def pretended(world=1, memory=80 * 2**30):
    """One GPU with so many bytes for each of `world` ranks, of which this process is the first; yields the Record. All
    is put back."""
    backward, autocast = torch.autograd._engine_run_backward, torch.autocast

    def run_backward(*args, **kwargs):
        with Asked():  # a mode is off in what it handles, as .backward() is
            return backward(*args, **kwargs)

    with contextlib.ExitStack() as stack, in_process(), torch.backends.cudnn.flags():  # which common.setup changes
        replace = lambda owner, **new: stack.enter_context(mock.patch.multiple(owner, **new))
        replace(
            torch.cuda, is_available=lambda: True, device_count=lambda: world, set_device=lambda _: None,
            is_bf16_supported=lambda **_: True, synchronize=lambda *_: record.wait("synchronize"),
            get_rng_state=lambda _: None, set_rng_state=lambda *_: None, is_current_stream_capturing=lambda: False,
            get_device_properties=lambda _: types.SimpleNamespace(total_memory=memory),
        )  # fmt: skip
        replace(torch.accelerator, is_available=lambda: False)  # it would start a driver
        replace(torch, autocast=lambda device, *args, **kwargs: autocast("cpu", *args, **kwargs))
        replace(torch._C, _InferenceMode=lambda on: torch.no_grad() if on else contextlib.nullcontext())
        replace(torch.autograd, _engine_run_backward=run_backward)
        replace(optimizer, _foreach_supported_types=[torch.nn.Parameter, Pretend])
        replace(torch.__future__, _overwrite_module_params_on_conversion=True)
        stack.callback(optimizer.register_optimizer_step_post_hook(record.end_step).remove)
        if world > 1:
            os.environ.update(RANK="0", WORLD_SIZE=str(world), LOCAL_RANK="0")
            replace(common, end_with_parent=lambda: None)
            replace(torch.distributed, **collectives(world))
            how = dict(forward=lambda ddp, *xs, **k: ddp.module(*xs, **k), no_sync=lambda _: contextlib.nullcontext())
            replace(torch.nn.parallel.DistributedDataParallel, __init__=parallel, **how)
        stack.enter_context(Asked())
        record.restart()
        yield record
