"""The operator among threads, forks, signals, hooks and little memory: prompt, and its state intact afterwards."""

import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
from peft import get_peft_model
from support.models import random_adapter, tiny_model, tokens

import ktlib
from ktlib.integrations.peft_lora import lora_config
from ktlib.lab.validation import QUANTITIES, evaluate, random_layer
from ktlib.system import threads

SIZES = {"tokens": 600, "experts": 4, "top_k": 2, "hidden": 128, "intermediate": 96, "rank": 4}


@pytest.fixture
def layer():
    return random_layer("trained", **SIZES)


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in QUANTITIES)


# A child process starts with a layer and what it gives.
BEGIN = f"""
import os, resource, torch, ktlib
from ktlib.lab.validation import random_layer
torch.set_num_threads(2)
layer = random_layer("trained", **{SIZES})
want = ktlib.moe_experts(**layer)
"""


# Or with torch's threads in use but no call of the operator so far; what it does in_time must not wait for ever.
FORKS = f"""
import os, signal, torch, ktlib
from ktlib import _kernels
from ktlib.lab.validation import random_layer
torch.set_num_threads(2)
layer = random_layer("trained", **{SIZES})
torch.ones(2**22).sum()
def in_time(function):
    signal.alarm(20)
    function()
    signal.alarm(0)
"""


def in_child(code, timeout=120, begin=BEGIN):
    """Standard output of a Python process of its own."""
    command = [sys.executable, "-c", begin + textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-3000:])
    return done.stdout


def test_a_forked_child_computes_the_same():
    """Its parent's threads do not exist in it, and OpenMP would wait for them."""
    code = """
    x = layer["hidden_states"].clone().requires_grad_()
    child = os.fork()
    if child == 0:
        output = ktlib.moe_experts(**layer | {"hidden_states": x})
        torch.set_num_threads(1)  # else sum() waits, which is torch's own
        output.sum().backward()
        os._exit(0 if torch.equal(output.detach(), want) and x.grad.any() else 9)
    _, status = os.waitpid(child, 0)
    print("child:", os.waitstatus_to_exitcode(status))
    print("parent:", torch.equal(ktlib.moe_experts(**layer), want), torch.get_num_threads())
    """
    assert in_child(code) == "child: 0\nparent: True 2\n"


def test_workers_of_a_data_loader():
    code = """
    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 6
        def __getitem__(self, index):
            return ktlib.moe_experts(**layer)
    loader = torch.utils.data.DataLoader(Data(), batch_size=1, num_workers=2, multiprocessing_context="fork")
    print([torch.equal(batch[0], want) for batch in loader])
    """
    assert in_child(code) == f"{[True] * 6}\n"


def test_a_child_forked_before_the_first_call():
    """The threads that do not exist in it are torch's too."""
    code = """
    source, target = torch.ones(2, 2**20)
    calls = [
        lambda: ktlib.moe_experts(**layer),
        lambda: _kernels.peak_rate("", 2),
        lambda: _kernels.read_rate(2, 2**22),
        lambda: _kernels.copy(2, [[(target.data_ptr(), source.data_ptr(), source.nbytes)]]),
    ]
    for call in calls:
        child = os.fork()
        if child == 0:
            in_time(call)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert in_child(code, begin=FORKS) == "0\n" * 4


def test_workers_with_a_number_of_threads_of_the_operator(monkeypatch):
    """torch works on one thread in a DataLoader's worker; the operator is told to use two."""
    monkeypatch.setenv(threads.VARIABLE, "2")
    code = """
    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 2
        def __getitem__(self, index):
            in_time(lambda: setattr(self, "output", ktlib.moe_experts(**layer)))
            return self.output
    loader = torch.utils.data.DataLoader(Data(), batch_size=1, num_workers=1, multiprocessing_context="fork")
    outputs = [batch[0] for batch in loader]
    print([torch.equal(output, ktlib.moe_experts(**layer)) for output in outputs])
    """
    assert in_child(code, begin=FORKS) == f"{[True] * 2}\n"


def test_two_models_in_one_process():
    """Steps of two models, interleaved and nested, are those of each alone."""
    models = [tiny_model("olmoe", "ktlib", seed=seed, dtype=torch.bfloat16) for seed in (0, 1)]
    models = [random_adapter(get_peft_model(m, lora_config(m, r=rank))) for m, rank in zip(models, (2, 5), strict=True)]

    def gradients(model):
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    wanted = []
    for model in models:
        model(tokens(), labels=tokens()).loss.backward()
        wanted.append(gradients(model))
    losses = [model(tokens(), labels=tokens()).loss for model in models]
    for loss in losses:
        loss.backward()
    for model, want in zip(models, wanted, strict=True):
        got = gradients(model)
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


class Oops(Exception):
    pass


def test_an_exception_between_forward_and_backward(layer):
    """In a hook of the gradient that reaches the operator, and of the one that leaves it."""
    wanted = evaluate(ktlib.moe_experts, layer)

    def oops(gradient):
        raise Oops

    for place in ("output", "input"):
        x = layer["hidden_states"].clone().requires_grad_()
        output = ktlib.moe_experts(**(layer | {"hidden_states": x}))
        (output if place == "output" else x).register_hook(oops)
        with pytest.raises(Oops):
            output.sum().backward()
        assert x.grad is None
    assert same(evaluate(ktlib.moe_experts, layer), wanted)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("isa", ["portable", "amx_emulated"])
def test_ctrl_c_ends_a_long_call_at_once(direction, isa):
    """A call of several seconds, as a process of its own gets SIGINT; nothing is left half done."""
    code = f"""
    import signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background processes
    long = random_layer("trained", tokens=2000, experts=4, top_k=2, hidden=1024, intermediate=1024, rank=4)
    x = long["hidden_states"].requires_grad_()
    output = ktlib.moe_experts(**long, isa="{isa}") if "{direction}" == "backward" else None
    for leaf in (x, *long["down_lora"][:2]):
        leaf.requires_grad_()
    torch.set_flush_denormal(True)  # on this thread; a call has a mode of its own, and ends in this one
    print("begin", flush=True)
    began = time.monotonic()
    try:
        ktlib.moe_experts(**long, isa="{isa}") if output is None else output.sum().backward()
        print("done", time.monotonic() - began)
    except KeyboardInterrupt:
        print("interrupted", time.monotonic())
    assert x.grad is None and torch.tensor(1e-40) * 1 == 0
    output = None
    print(torch.equal(ktlib.moe_experts(**layer), want))
    """
    child = subprocess.Popen([sys.executable, "-c", BEGIN + textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "begin\n"
    time.sleep(0.5)
    sent = time.monotonic()  # the same clock in all processes
    child.send_signal(signal.SIGINT)
    what, when, same = child.communicate(timeout=120)[0].split()
    assert (what, same, child.returncode) == ("interrupted", "True", 0)
    assert float(when) - sent < 0.2


@pytest.mark.parametrize("isa", {"portable", "amx_emulated", ktlib.cpu_info()["isa"]})
def test_a_signal_handler_may_use_the_operator(layer, isa):
    """It runs in the middle of a call, on one of its threads, and that call goes on to the same bits."""
    sizes = (
        {"tokens": 6000, "hidden": 1024, "intermediate": 512} if isa == ktlib.cpu_info()["isa"] else {"tokens": 3000}
    )
    long = random_layer("trained", **SIZES | sizes)
    wanted, want_long, inside = ktlib.moe_experts(**layer), evaluate(ktlib.moe_experts, long, isa=isa), []

    def handler(signum, frame):
        if frame.f_code.co_name in ("_forward", "_backward"):
            inside.append(torch.equal(ktlib.moe_experts(**layer), wanted))

    before = signal.signal(signal.SIGALRM, handler)
    try:
        end = time.monotonic() + 20
        while not inside and time.monotonic() < end:
            signal.setitimer(signal.ITIMER_REAL, 0.001, 0.02)
            got = evaluate(ktlib.moe_experts, long, isa=isa)
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert same(got, want_long)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert inside and all(inside)


def test_signals_in_other_threads(layer):
    """Python runs handlers on its main thread alone; a call on another one is not disturbed."""
    long = random_layer("trained", **SIZES | {"tokens": 3000})
    want, seen, got = ktlib.moe_experts(**long, isa="portable"), [], []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(threading.current_thread()))
    try:
        thread = threading.Thread(target=lambda: got.append(ktlib.moe_experts(**long, isa="portable")))
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        thread.start()
        thread.join()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert torch.equal(got[0], want) and set(seen) == {threading.main_thread()}


def test_too_little_memory_is_an_error_and_no_more():
    code = """
    large = random_layer("trained", tokens=8192, experts=4, top_k=3, hidden=1024, intermediate=64, rank=2)
    torch.set_num_threads(1)
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 40 * 2**20, resource.RLIM_INFINITY))
    try:
        ktlib.moe_experts(**large)
    except MemoryError:
        print("MemoryError")
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(ktlib.moe_experts(**large).isfinite().all().item(), torch.equal(ktlib.moe_experts(**layer), want))
    """
    assert in_child(code) == "MemoryError\nTrue True\n"


def test_memory_kept_between_calls_is_bounded():
    """Scratch of large calls is kept for the next one, up to 512 MiB."""
    code = """
    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
    index, weights = torch.arange(8).expand(3072, 8), torch.ones(3072, 8)
    before = resident()
    for hidden in (16384, 6000, 9000):
        x, experts = torch.ones(3072, hidden).bfloat16(), torch.zeros(8, 2 * 16, hidden).bfloat16()
        ktlib.moe_experts(x, index, weights, experts, experts[:, :16].transpose(1, 2).contiguous())
        del x, experts
    print(int(resident() - before))
    """
    assert int(in_child(code)) < 560
