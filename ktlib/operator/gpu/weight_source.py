"""Expert weights on their way to a GPU, sent by a thread that works ahead."""

import contextlib
import functools
import queue
from concurrent.futures import ThreadPoolExecutor, wait

import torch

from ktlib import _kernels
from ktlib.operator.gpu.transfer import sending_and_other_threads

THERE = 2  # buffers on the GPU, of one group of experts each
# Pinned buffers and their size in bytes: so small together that a cache may hold them. Then memory is read once and not
# written (16-CPU Xeon, H100: 47 GB/s arrived on the GPU, 38 with stores past the caches).
PIECES, PIECE = 4, 2**23
SENDING = 2  # pieces on their way at once: the bus goes on while the sender waits for its turn in Python


@contextlib.contextmanager
def weights_on(weights, groups, device):
    """For each group of experts ``[w[group] for w in weights]`` on the device, valid until the next is asked for.

    While work on one group is queued and computed, the next one is on its way: a thread sends weights in pinned memory
    from where they are, others through pinned buffers, which it fills with three quarters of the operator's threads.

    Args:
        weights: contiguous CPU tensors whose first dimension is the expert.
        groups: lists of expert ids.
        device: a CUDA device, or the CPU for tests.
    """
    if device.type == "cpu":
        yield ([w[group] for w in weights] for group in groups)
        return
    compute, copies, size = torch.cuda.current_stream(device), _copy_stream(device), max(map(len, groups))
    there = [[torch.empty((size, *w.shape[1:]), dtype=w.dtype, device=device) for w in weights] for _ in range(THERE)]
    sent, used = ([torch.cuda.Event() for _ in range(THERE)] for _ in range(2))
    free, full = queue.SimpleQueue(), queue.SimpleQueue()
    for n in range(THERE):
        free.put(n)
    threads = sending_and_other_threads()[0]  # of this thread; the sender has a number of its own
    copies.wait_stream(compute)  # until now the buffers on the device may have been something else's

    def begin():
        """The next group's buffers on the device, when they are free."""
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
                    _from_where_they_are(weights, groups, there, begin, finish)
                else:
                    _in_pieces(threads, weights, groups, there, begin, finish, copies)
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
            yield [buffer[: len(group)] for buffer in there[n]]
            used[n].record(compute)
            free.put(n)

    sender = _sender().submit(send)
    try:
        yield receive()
    finally:
        free.put(None)
        interrupted = None
        while not sender.done():  # also when a signal's handler raises: until then the sender writes to the buffers
            try:
                wait([sender])
            except BaseException as error:
                interrupted = error
        compute.wait_stream(copies)  # before the buffers become something else's
        if interrupted is not None:
            raise interrupted


class _Stopped(Exception):
    """Nobody waits for weights any more."""


def _from_where_they_are(weights, groups, there, begin, finish):
    for group in groups:
        n = begin()
        for targets, w in zip(there[n], weights, strict=True):
            for target, expert in zip(targets, group, strict=False):
                target.copy_(w[expert], non_blocking=True)
        finish(n)


def _in_pieces(threads, weights, groups, there, begin, finish, copies):
    """Through a ring of pinned buffers, which threads fill while others are on their way."""
    there = [[buffer.view(-1).view(torch.uint8) for buffer in buffers] for buffers in there]
    ring = [torch.empty(PIECE, dtype=torch.uint8, device="cpu", pin_memory=True) for _ in range(PIECES)]
    read = [torch.cuda.Event() for _ in range(PIECES)]
    plan, pieces = [], []  # of each piece: number of the weight, bytes of the group, whether it ends; what is in it
    for group in groups:
        for number, w in enumerate(weights):
            one = w[0].nbytes
            for first in range(0, len(group) * one, PIECE):
                last = min(first + PIECE, len(group) * one)
                buffer = ring[len(plan) % PIECES].data_ptr()
                parts = []
                for i in range(first // one, -(-last // one)):
                    begin_at, end_at = max(first, i * one), min(last, (i + 1) * one)
                    source = w.data_ptr() + group[i] * one + begin_at - i * one
                    parts.append((buffer + begin_at - first, source, end_at - begin_at))
                plan.append((number, first, last, number + 1 == len(weights) and last == len(group) * one))
                pieces.append(parts)
    at = None

    def ready(i):
        nonlocal at
        number, first, last, ends = plan[i]
        if number == first == 0:
            at = begin()
        there[at][number][first:last].copy_(ring[i % PIECES][: last - first], non_blocking=True)
        read[i % PIECES].record(copies)
        if ends:
            finish(at)
        if i >= SENDING:
            read[(i - SENDING) % PIECES].synchronize()

    _kernels.copy(threads, pieces, PIECES - SENDING + 1, ready)


@functools.cache
def _sender():
    """One thread for all calls, one after the other: OpenMP keeps a team for each thread that wants one."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="ktlib-weights")


@functools.cache
def _copy_stream(device):
    return torch.cuda.Stream(device)
