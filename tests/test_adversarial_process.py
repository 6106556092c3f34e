"""Threads, forks and machines (rows T47, T48, T53 to T55 of the project's list)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from support import networks
from support.threads import together

import memnet_fast as mf
from memnet_fast import native
from memnet_fast.config import MemNetConfig

NATIVE = pytest.mark.skipif(native.why_missing() is not None, reason=f"no native module: {native.why_missing()}")
BACKENDS = ["torch", pytest.param("cpu", marks=NATIVE)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_t47_eight_threads_one_module(backend):
    fast = mf.fuse(networks.build(networks.SMALL), backend=backend)
    sizes = [(1, 9, 9), (2, 17, 5), (3, 8, 21), (1, 30, 30), (2, 3, 3), (1, 1, 40), (4, 12, 6), (1, 25, 14)]
    images = [networks.image(n, 1, h, w, seed=i) for i, (n, h, w) in enumerate(sizes)]
    expected = [fast(x) for x in images]

    def work(i):
        def run():
            for k in range(12):
                j = (i + k) % len(images)
                assert torch.equal(fast(images[j]), expected[j])

        return run

    together([work(i) for i in range(8)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_t48_weights_loaded_during_calls(backend):
    """Every call sees all of the old weights or all of the new ones."""
    one, two = networks.build(networks.SMALL, 1), networks.build(networks.SMALL, 2)
    x = networks.image(1, 1, 11, 12)
    fast = mf.fuse(networks.build(networks.SMALL, 1), backend=backend)
    states = [mf.fuse(n).state_dict() for n in (one, two)]
    allowed = [mf.fuse(n, backend=backend)(x) for n in (one, two)]
    assert not torch.equal(*allowed)
    stop, seen = threading.Event(), set()

    def load():
        try:
            for k in range(30):
                fast.load_state_dict(states[(k + 1) % 2])
                time.sleep(0.002)
        finally:
            stop.set()

    def run():
        while not stop.is_set():
            y = fast(x)
            matches = [torch.equal(y, a) for a in allowed]
            assert any(matches), "a mix of two sets of weights"
            seen.add(matches.index(True))

    together([load, run, run])
    assert seen == {0, 1}, "the test ran past the changes"


@pytest.mark.parametrize("backend", BACKENDS)
def test_t48_conversion_during_calls(backend):
    fast = mf.fuse(networks.build(networks.SMALL), backend=backend)
    x = networks.image(1, 1, 11, 12)
    expected = fast(x)
    stop = threading.Event()

    def convert():
        try:
            for k in range(20):
                fast.to(torch.float64 if k % 2 == 0 else torch.float32)
                time.sleep(0.002)
        finally:
            stop.set()

    def run():
        while not stop.is_set():
            # float64 parameters hold the same values and are packed to the same numbers.
            assert torch.equal(fast(x), expected)

    together([convert, run, run])


def _in_child(function) -> str:
    """Forks; returns what the function returned in the child, or "hangs"."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        answer = "died"
        try:
            answer = function()
        finally:
            os.write(write, answer.encode())
            os._exit(0)
    os.close(write)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if os.waitpid(pid, os.WNOHANG)[0]:
            with os.fdopen(read, "rb") as pipe:
                return pipe.read().decode()
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(read)
    return "hangs"


@pytest.mark.parametrize("backend", BACKENDS)
def test_t53_fork_after_use(backend):
    """A thread pool does not survive fork. The network is large enough for torch to use several threads on its weights."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fast = mf.fuse(networks.build(MemNetConfig(channels=64, num_memory_blocks=3, num_recursions=2)), backend=backend)
        x = networks.image(2, 1, 24, 25)
        y = fast(x)
        assert _in_child(lambda: "same" if torch.equal(fast(x), y) else "different") == "same"
        assert torch.equal(fast(x), y), "the parent goes on"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_t53_fuse_in_a_forked_process():
    """fp8 looks at the weights and computes when it is asked for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        net = mf.create_model("memnet_m6r6.denoise")
        mf.fuse(net, backend="torch")(networks.image(1, 1, 24, 25))
        assert _in_child(lambda: mf.fuse(net, backend="torch", precision="fp8").precision) == "fp8"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def _spawned(fast, x, queue):
    queue.put(fast(x).numpy())


@NATIVE
def test_t53_spawn():
    fast = mf.fuse(networks.build(networks.SMALL))
    x = networks.image(1, 1, 8, 9)
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_spawned, args=(fast, x, queue))
    process.start()
    result = queue.get()
    process.join(60)
    assert process.exitcode == 0
    assert torch.equal(torch.from_numpy(result), fast(x))


class _Restored(torch.utils.data.Dataset):
    def __init__(self, fast):
        self.fast = fast

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return self.fast(networks.image(1, 1, 10, 11, seed=i))[0]


def test_t53_data_loader_workers():
    data = _Restored(mf.fuse(networks.build(networks.SMALL)))
    expected = torch.stack([data[i] for i in range(4)])
    loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=1, multiprocessing_context="fork", timeout=60)
    assert torch.equal(next(iter(loader)), expected)


def _python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_t53_t54_import_touches_no_gpu():
    """No context at import; without a visible GPU everything runs on the CPU."""
    code = (
        "import torch, memnet_fast as mf\n"
        "assert not torch.cuda.is_initialized()\n"
        "net = mf.MemNet(mf.MemNetConfig(channels=4, num_memory_blocks=1, num_recursions=1)).eval()\n"
        "fast = mf.fuse(net)\n"
        "print(fast(torch.zeros(1, 1, 3, 3)).shape[-1], fast.backend)\n"
    )
    assert _python(code, CUDA_VISIBLE_DEVICES="").startswith("3 ")


def test_t55_missing_extension_in_a_fresh_process():
    """The import works, the call works, and the explicit wish carries the original reason."""
    code = (
        "import sys\n"
        "sys.modules['memnet_fast._native'] = None\n"
        "import torch, memnet_fast as mf\n"
        "net = mf.MemNet(mf.MemNetConfig(channels=4, num_memory_blocks=1, num_recursions=1)).eval()\n"
        "assert mf.fuse(net).backend == 'torch'\n"
        "mf.fuse(net)(torch.zeros(1, 1, 3, 3))\n"
        "try:\n"
        "    mf.fuse(net, backend='cpu')\n"
        "except mf.BackendUnavailable as error:\n"
        "    print(error.exit_code, error.reason)\n"
    )
    answer = _python(code)
    assert answer.startswith("5 ") and "_native" in answer
