"""Expert weights on their way to a GPU, sent by a thread that works ahead of the computation."""

import contextlib
import functools
import queue
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

import torch

from ktlib import _kernels
from ktlib.operator.gpu.transfer import sending_and_other_threads

DEVICE_BUFFERS = 2  # on the GPU; each holds the weights of one group of experts
# Pinned buffers, of one chunk each. Together they are small enough for the caches, so that memory is read once and not
# written (16-CPU Xeon, H100: 47 GB/s arrived on the GPU; with stores that bypass the caches, 38 GB/s).
PINNED_BUFFERS, CHUNK_BYTES = 4, 2**23
CHUNKS_IN_FLIGHT = 2  # copies to the GPU queued at once, so that the bus is busy while the sender waits for the GIL


@contextlib.contextmanager
def weights_on(weights, groups, device):
    """For each group of experts ``[w[group] for w in weights]`` on the device, valid until the next one is asked for.

    While the work on one group is queued and computed, a thread sends the next group. It sends pinned weights directly.
    Other weights it copies through pinned buffers, which three quarters of the operator's threads fill.

    Args:
        weights: contiguous CPU tensors whose first dimension is the expert.
        groups: lists of expert ids.
        device: a CUDA device, or the CPU for tests.
    """
    if device.type == "cpu":
        yield ([w[group] for w in weights] for group in groups)
        return
    compute, copies, size = torch.cuda.current_stream(device), _copy_stream(device), max(map(len, groups))
    buffers = [
        [torch.empty((size, *w.shape[1:]), dtype=w.dtype, device=device) for w in weights]
        for _ in range(DEVICE_BUFFERS)
    ]
    sent, used = ([torch.cuda.Event() for _ in range(DEVICE_BUFFERS)] for _ in range(2))
    free, full = queue.SimpleQueue(), queue.SimpleQueue()  # indices of buffers
    for n in range(DEVICE_BUFFERS):
        free.put(n)
    threads = sending_and_other_threads()[0]  # asked here: the number is set for each Python thread
    copies.wait_stream(compute)  # earlier work on the current stream may still use the buffers' memory

    def begin():
        """Index of the buffer for the next group, once the buffer is free."""
        if (n := free.get()) is None:
            raise _Stopped
        copies.wait_event(used[n])
        return n

    def finish(n):
        sent[n].record(copies)
        full.put(n)

    def send():
        try:
            with torch.cuda.stream(copies):
                if all(w.is_pinned() for w in weights):
                    _send_pinned(weights, groups, buffers, begin, finish)
                else:
                    _send_in_chunks(threads, weights, groups, buffers, begin, finish, copies)
        except _Stopped:
            pass
        except BaseException as error:
            full.put(error)

    def receive():
        for group in groups:
            n = full.get()
            if isinstance(n, BaseException):
                raise n
            compute.wait_event(sent[n])
            yield [buffer[: len(group)] for buffer in buffers[n]]
            used[n].record(compute)
            free.put(n)

    sender = _sender().submit(send)
    try:
        yield receive()
    finally:
        free.put(None)
        interrupted = None
        while not sender.done():  # even if a signal's handler raises: until then the sender writes to the buffers
            try:
                wait([sender])
            except BaseException as error:
                interrupted = error
        compute.wait_stream(copies)  # before the buffers' memory is used for something else
        if interrupted is not None:
            raise interrupted


class _Stopped(Exception):
    """The receiver needs no more weights."""


def _send_pinned(weights, groups, buffers, begin, finish):
    for group in groups:
        n = begin()
        for targets, w in zip(buffers[n], weights, strict=True):
            for target, expert in zip(targets, group, strict=False):
                target.copy_(w[expert], non_blocking=True)
        finish(n)


class _Chunk(NamedTuple):
    """At most CHUNK_BYTES of one weight of one group of experts."""

    weight: int  # index in ``weights``
    first: int  # byte of the group's weight where the chunk begins
    last: int  # byte before which it ends
    ends_group: bool
    copies: list  # (target address in a pinned buffer, source address, bytes) for each expert in the chunk


def _chunks(weights, groups, pinned):
    """The chunks of all groups in the order in which they are sent; chunk i goes through pinned buffer i % count."""
    chunks = []
    for group in groups:
        for weight, w in enumerate(weights):
            expert_bytes = w[0].nbytes
            group_bytes = len(group) * expert_bytes
            for first in range(0, group_bytes, CHUNK_BYTES):
                last = min(first + CHUNK_BYTES, group_bytes)
                target = pinned[len(chunks) % PINNED_BUFFERS].data_ptr()
                copies = []
                for i in range(first // expert_bytes, -(-last // expert_bytes)):
                    begin, end = max(first, i * expert_bytes), min(last, (i + 1) * expert_bytes)
                    source = w.data_ptr() + group[i] * expert_bytes + begin - i * expert_bytes
                    copies.append((target + begin - first, source, end - begin))
                ends_group = weight + 1 == len(weights) and last == group_bytes
                chunks.append(_Chunk(weight, first, last, ends_group, copies))
    return chunks


def _send_in_chunks(threads, weights, groups, buffers, begin, finish, copies):
    """Send through a ring of pinned buffers: while some are copied to the GPU, threads fill the others."""
    buffers = [[tensor.view(-1).view(torch.uint8) for tensor in buffer] for buffer in buffers]
    pinned = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True) for _ in range(PINNED_BUFFERS)]
    read = [torch.cuda.Event() for _ in range(PINNED_BUFFERS)]
    chunks = _chunks(weights, groups, pinned)
    n = None

    def filled(i):
        """Queue the copy of chunk ``i``, which now lies in its pinned buffer, to the GPU."""
        nonlocal n
        chunk = chunks[i]
        if chunk.weight == chunk.first == 0:
            n = begin()
        source = pinned[i % PINNED_BUFFERS][: chunk.last - chunk.first]
        buffers[n][chunk.weight][chunk.first : chunk.last].copy_(source, non_blocking=True)
        read[i % PINNED_BUFFERS].record(copies)
        if chunk.ends_group:
            finish(n)
        if i >= CHUNKS_IN_FLIGHT:
            read[(i - CHUNKS_IN_FLIGHT) % PINNED_BUFFERS].synchronize()

    _kernels.copy(threads, [chunk.copies for chunk in chunks], PINNED_BUFFERS - CHUNKS_IN_FLIGHT + 1, filled)


@functools.cache
def _sender():
    """One thread for all calls, one after the other, because OpenMP keeps a team for each thread that calls it."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="ktlib-weights")


@functools.cache
def _copy_stream(device):
    return torch.cuda.Stream(device)
