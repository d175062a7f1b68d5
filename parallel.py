"""Several processes: DistributedDataParallel, and BatchNorm over the images of all GPUs. Whoever skips this file still
understands the papers."""

import functools
import inspect

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import all_gather, all_reduce, world_size

SENDING_BUFFERS = "forward_sync_buffers"  # an older torch's name of it: broadcast_buffers
if SENDING_BUFFERS not in inspect.signature(DistributedDataParallel.__init__).parameters:
    SENDING_BUFFERS = "broadcast_buffers"


def wrap(model, device, **settings):
    """`model` in DistributedDataParallel. No buffers are sent before a step: banks and queues are the same on all ranks
    by themselves, and of BatchNorm's averages those of rank 0 count, which evaluate.extract sends."""
    ids = [device.index] if device.type == "cuda" else None
    settings |= {SENDING_BUFFERS: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(model, ids, **settings)


def sync_batch_norm(model):
    """Let all BatchNorms of a model on a GPU take the statistics of all ranks' images. (On a CPU torch cannot.)

    In place of torch's SyncBatchNorm, whose shares may differ in size: it waits for the GPU in every layer to find
    those without an image, where here all have as many."""
    for m in model.modules():
        if type(m) in (nn.BatchNorm1d, nn.BatchNorm2d) and next(model.parameters()).is_cuda:
            m.__class__ = SyncBatchNorm


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, x): ...

    @torch.compiler.disable  # collectives inside
    def forward(self, x):
        if not self.training:
            return super().forward(x)
        averages, momentum = (None, None), self.momentum
        if self.track_running_stats:
            averages = self.running_mean, self.running_var
            self.num_batches_tracked.add_(1)
            if momentum is None:  # the mean over all batches so far
                momentum = 1 / float(self.num_batches_tracked)
        return Normalize.apply(x, self.weight, self.bias, *averages, momentum, self.eps)


@functools.cache
def equal_counts(n, world, device, dtype):
    """`n` for each rank, as both passes of BatchNorm want it."""
    counts = torch.full((world,), n, device=device)
    return counts.to(dtype), counts.int()


class Normalize(torch.autograd.Function):
    """BatchNorm of x [b, C] or [b, C, H, W], b the same on every rank, by the mean and variance of all ranks' x; with
    the kernels of torch's SyncBatchNorm. Gradients of weight and bias are the rank's own, for DDP to add up."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        x = dense(x)
        mean, invstd = torch.batch_norm_stats(x, eps)  # [C], 1 / standard deviation
        means, invstds = all_gather(torch.stack([mean, invstd])).unbind(1)  # [world, C]
        counts, integers = equal_counts(x.numel() // len(mean), world_size(), x.device, mean.dtype)
        averages = running_mean, running_var, momentum, eps, counts
        mean, invstd = torch.batch_norm_gather_stats_with_counts(x, means, invstds, *averages)
        ctx.save_for_backward(x, weight, mean, invstd, integers)
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx, dy):
        (x, weight, mean, invstd, counts), dy = ctx.saved_tensors, dense(dy)
        # sums over the rank's pixels of dy and dy (x - mean); then the gradients of weight and bias
        *sums, dw, db = torch.batch_norm_backward_reduce(dy, x, mean, invstd, weight, *ctx.needs_input_grad[:3])
        sums = all_reduce(torch.stack(sums))
        dx = torch.batch_norm_backward_elemt(dy, x, mean, invstd, weight, *sums, counts)
        return dx, dw, db, None, None, None, None


def dense(x):
    """x as those kernels take it: contiguous or channels_last."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
