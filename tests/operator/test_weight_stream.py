"""The thread that sends weights to a GPU: who waits for whom, and failures. The simulated CUDA copies at once."""

import _thread
import contextlib
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from ktlib.operator.gpu import weight_source
from ktlib.operator.gpu.weight_source import weights_on

GPU = SimpleNamespace(type="cuda")


class Event:
    """Knows whether it was waited for since it was recorded."""

    waited = True

    def record(self, stream=None):
        self.waited = False

    def synchronize(self):
        self.waited = True


class Stream:
    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        pass


def empty(shape, dtype, device, pin_memory=False):
    assert device == "cpu" if pin_memory else device is GPU
    return torch.empty(shape, dtype=dtype)


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    """Replaces ``torch`` in weight_source.py."""
    cuda = SimpleNamespace(
        current_stream=lambda device: Stream(),
        stream=lambda stream: contextlib.nullcontext(),
        Event=Event,
        Stream=Event,
    )
    monkeypatch.setattr(weight_source, "torch", SimpleNamespace(empty=empty, uint8=torch.uint8, cuda=cuda))
    monkeypatch.setattr(weight_source, "_copy_stream", lambda device: Stream())


def weights(experts=11, pinned=False):
    made = [torch.randn(experts, 6, 10).bfloat16(), torch.randn(experts, 10, 3).bfloat16()]
    for w in made:
        w.is_pinned = lambda: pinned
    return made


GROUPS = [[3, 0, 7], [1, 2, 10], [9, 8, 4], [5]]


def received(made, groups, wait=0.0):
    """The groups received, after comparing them; during ``wait`` the sender could overwrite a buffer too early."""
    groups_received = []
    with weights_on(made, groups, GPU) as stream:
        for group, matrices in zip(groups, stream, strict=True):
            time.sleep(wait)
            assert all(torch.equal(matrix, w[group]) for matrix, w in zip(matrices, made, strict=True)), group
            groups_received.append(group)
    return groups_received


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("chunk_bytes", [2, 34, 120, 2**20])
@pytest.mark.parametrize("wait", [0.0, 0.01])
def test_every_group_arrives_whole_and_in_order(pinned, chunk_bytes, wait, monkeypatch):
    monkeypatch.setattr(weight_source, "CHUNK_BYTES", chunk_bytes)
    assert received(weights(pinned=pinned), GROUPS, wait) == GROUPS


def test_one_group_and_many():
    assert received(weights(), [[2]]) == [[2]]
    many = [[i % 11] for i in range(300)]
    assert received(weights(), many) == many


def test_calls_at_the_same_time():
    failed = []

    def call():
        try:
            assert received(weights(), GROUPS, 0.002) == GROUPS
        except BaseException as error:
            failed.append(error)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(20)
    assert not failed and not any(caller.is_alive() for caller in callers)


@pytest.mark.parametrize("buffers, in_flight", [(2, 1), (3, 2), (4, 1), (4, 2), (4, 3)])
def test_no_buffer_is_filled_before_it_was_read(buffers, in_flight, monkeypatch):
    """After each call of ``ready``, this ``copy`` fills at once every buffer that a real one may begin to fill."""
    monkeypatch.setattr(weight_source, "CHUNK_BYTES", 50)
    monkeypatch.setattr(weight_source, "PINNED_BUFFERS", buffers)
    monkeypatch.setattr(weight_source, "CHUNKS_IN_FLIGHT", in_flight)
    reads, begun = [], []
    made = weight_source.torch.cuda.Event

    class Read(made):
        def __init__(self):
            reads.append(self)

    def copy(threads, copies, ahead=2, ready=None):
        def begin(until):
            for i in range(len(begun), min(until, len(copies))):
                begun.append(i)
                assert reads[-buffers:][i % buffers].waited, (i, "overwrites a chunk that is still being sent")
                kernels.copy(1, [copies[i]])

        begin(ahead)
        for i in range(len(copies)):
            ready(i)
            begin(i + ahead)

    kernels = weight_source._kernels
    monkeypatch.setattr(weight_source, "_kernels", SimpleNamespace(copy=copy))
    monkeypatch.setattr(weight_source.torch.cuda, "Event", Read)
    assert received(weights(), GROUPS) == GROUPS
    assert len(begun) > 20


def failing(copy, at, error):
    """``_kernels`` whose ``copy`` fails at chunk ``at``."""

    def fails(threads, chunks, ahead=2, ready=None):
        def sometimes(i):
            if i == at:
                raise error
            ready(i)

        copy(threads, chunks, ahead, ready and sometimes)

    return SimpleNamespace(copy=fails)


@pytest.mark.parametrize("at", [0, 1, 8, 30])
def test_an_error_in_the_sender_is_raised_by_the_consumer(at, monkeypatch):
    monkeypatch.setattr(weight_source, "CHUNK_BYTES", 50)
    with monkeypatch.context() as patch:
        patch.setattr(weight_source, "_kernels", failing(weight_source._kernels.copy, at, RuntimeError("no memory")))
        with pytest.raises(RuntimeError, match="no memory"):
            received(weights(), GROUPS)
    assert received(weights(), GROUPS) == GROUPS


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_consumer_that_stops_leaves_no_work_behind(after):
    with pytest.raises(KeyboardInterrupt), weights_on(weights(), GROUPS, GPU) as stream:
        for _ in range(after):
            next(stream)
        raise KeyboardInterrupt
    assert weight_source._sender().submit(lambda: "idle").result(timeout=5) == "idle"
    assert received(weights(), GROUPS) == GROUPS


def test_an_interruption_waits_for_the_sender_too(monkeypatch, request):
    """Ctrl-C twice: the buffers are released only when the sender can no longer write to them."""
    sending, waiting, release, order = threading.Event(), threading.Event(), threading.Event(), []
    wait = weight_source.wait

    class Compute(Stream):
        def wait_stream(self, other):
            order.append("waited")

    def copy(*arguments):
        sending.set()
        release.wait(10)
        order.append("sent")

    def watched(futures):
        waiting.set()
        wait(futures)

    def interrupt():
        waiting.wait(10)
        for _ in range(2):
            _thread.interrupt_main()
            time.sleep(0.05)
        release.set()

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background processes
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    with monkeypatch.context() as patch:
        patch.setattr(weight_source.torch.cuda, "current_stream", lambda device: Compute())
        patch.setattr(weight_source, "_kernels", SimpleNamespace(copy=copy))
        patch.setattr(weight_source, "wait", watched)
        interrupter = threading.Thread(target=interrupt)
        interrupter.start()
        with pytest.raises(KeyboardInterrupt), weights_on(weights(), GROUPS, GPU):
            assert sending.wait(10)
        assert order == ["sent", "waited"]
        interrupter.join()
    assert received(weights(), GROUPS) == GROUPS
