"""Several processes: DistributedDataParallel, and BatchNorm over the images of all GPUs. Whoever skips this file still
understands the papers."""

import inspect

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import all_gather, all_reduce

SENDING_BUFFERS = "forward_sync_buffers"  # an older torch's name of it: broadcast_buffers
if SENDING_BUFFERS not in inspect.signature(DistributedDataParallel.__init__).parameters:
    SENDING_BUFFERS = "broadcast_buffers"


def wrap(model, device, **settings):
    """`model` in DistributedDataParallel. No buffers are sent before a step: banks and queues are the same on all ranks
    by themselves, and tests begin with `same_buffers`."""
    ids = [device.index] if device.type == "cuda" else None
    settings |= {SENDING_BUFFERS: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(model, ids, **settings)


def same_buffers(module):
    """Rank 0's buffers on all ranks, before a test: BatchNorm's averages differ where it is not synchronized, and those
    of rank 0 are the ones that are saved. Collective."""
    for buffer in module.buffers() if dist.is_initialized() else ():
        dist.broadcast(buffer, 0)


def sync_batch_norm(model):
    """Let all BatchNorms of a model on a GPU take the statistics of all ranks' images. (On a CPU torch cannot.)

    torch's SyncBatchNorm waits for the GPU in every layer, to leave out ranks without an image; here each has some."""
    for m in model.modules():
        if type(m) in (nn.BatchNorm1d, nn.BatchNorm2d) and next(model.parameters()).is_cuda:
            m.__class__ = SyncBatchNorm


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, x): ...

    def forward(self, x):
        return self.normalize(x) if self.training else super().forward(x)

    @torch.compiler.disable  # collectives inside
    def normalize(self, x):
        averages, momentum = (None, None), self.momentum
        if self.track_running_stats:  # not while a RevNet recomputes a stage in backward
            averages = self.running_mean, self.running_var
            self.num_batches_tracked.add_(1)
            if momentum is None:  # the mean over all batches so far
                momentum = 1 / float(self.num_batches_tracked)
        return Normalize.apply(x, self.weight, self.bias, *averages, momentum, self.eps)


class Normalize(torch.autograd.Function):
    """BatchNorm of x [b, C] or [b, C, H, W] by the mean and variance of all ranks' x, with the kernels of torch's
    SyncBatchNorm. Gradients of weight and bias are the rank's own, for DDP to add up."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        x, channels = dense(x), x.shape[1]
        mean, invstd = torch.batch_norm_stats(x, eps)  # [C], 1 / standard deviation
        count = mean.new_full((1,), x.numel() // channels)
        means, invstds, counts = all_gather(torch.cat([mean, invstd, count])).split([channels, channels, 1], 1)
        counts = counts.flatten()  # [world]
        like = mean if running_mean is None else x  # without averages the kernel wants counts of this one's type
        averages = running_mean, running_var, momentum, eps, counts
        mean, invstd = torch.batch_norm_gather_stats_with_counts(like, means, invstds, *averages)
        ctx.save_for_backward(x, weight, mean, invstd, counts.int())
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx, dy):
        (x, weight, mean, invstd, counts), dy, dx = ctx.saved_tensors, dense(dy), None
        # sums over the rank's pixels of dy and dy (x - mean); then the gradients of weight and bias
        *sums, dw, db = torch.batch_norm_backward_reduce(dy, x, mean, invstd, weight, *ctx.needs_input_grad[:3])
        if ctx.needs_input_grad[0]:
            sums = all_reduce(torch.stack(sums))
            dx = torch.batch_norm_backward_elemt(dy, x, mean, invstd, weight, *sums, counts)
        return dx, dw, db, None, None, None, None


def dense(x):
    """x as those kernels take it: contiguous or channels_last."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()
