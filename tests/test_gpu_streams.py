"""Streams, threads, captured graphs and processes around a fused network, on every device (rows T46 to T53 of the list).

On the CPU a stream is the caller's own thread and a captured graph is the call made again into the same tensor
(support/places.py), which keeps every test's own code exercised there.
"""

from __future__ import annotations

import multiprocessing
import threading
import traceback

import pytest
import torch
from support import networks
from support.places import CUDA_PLACES, PLACES, TRITON_PLACES, Place
from support.threads import together

import memnet_fast as mf

GPU_PLACES = CUDA_PLACES + TRITON_PLACES
SIZES = [(1, 9, 9), (2, 17, 5), (3, 8, 21), (1, 30, 30), (2, 3, 3), (1, 1, 40), (4, 12, 6), (1, 125, 140)]


@pytest.fixture(scope="module", params=PLACES)
def place(request) -> Place:
    return request.param


@pytest.fixture
def fast(place) -> mf.FusedMemNet:
    return place.fuse(networks.build(networks.SMALL))


def _images(place):
    return [place.image(n, h, w, seed=i) for i, (n, h, w) in enumerate(SIZES)]


# Streams -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 40, 101), (1, 512, 512)], ids=str)
def test_t46_two_streams_at_once(place, fast, size):
    """500 calls on each of two streams with nothing between them that waits; every result is looked at, at the end."""
    count = 500 if place.is_gpu else 6
    if not place.is_gpu:
        size = (1, 24, 25)
    inputs = [place.image(*size, seed=s) for s in range(2)]
    expected = [fast(x) for x in inputs]
    place.synchronize()
    wrong = [torch.zeros((), dtype=torch.int64, device=place.device) for _ in inputs]
    streams = [torch.cuda.Stream(place.device) for _ in inputs] if place.is_gpu else [None, None]
    for _ in range(count):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                wrong[i] += (fast(inputs[i]) != expected[i]).sum()
    place.synchronize()
    assert [int(w) for w in wrong] == [0, 0]


def test_the_callers_stream_is_used(place, fast):
    """The result is right though the input is still being made when the call is: only order on one stream can do that."""
    x = place.image(1, 60, 61)
    expected = fast(x)
    place.synchronize()
    for _ in range(20):
        with place.stream():
            late = torch.zeros_like(x)
            if place.is_gpu:
                torch.cuda._sleep(3_000_000)  # a millisecond or two
            late.copy_(x)
            got = fast(late)
            same = (got == expected).all()
        place.synchronize()
        assert bool(same)


def test_t49_results_used_on_another_stream(place, fast):
    """Tensors are freed at once while the memory is asked for again; record_stream is the caller's part, as in PyTorch."""
    x = place.image(2, 64, 65)
    expected = fast(x)
    place.synchronize()
    wrong = torch.zeros((), dtype=torch.int64, device=place.device)
    for i in range(100 if place.is_gpu else 4):
        image = x.clone()
        y = fast(image)
        del image  # the call has it still in its queue
        with place.stream():
            if place.is_gpu:
                y.record_stream(torch.cuda.current_stream(place.device))
            wrong += (y != expected).sum()
        del y
        torch.full((2, 1, 64, 65 + i % 3), 9.0, device=place.device)
    place.synchronize()
    assert int(wrong) == 0


# Threads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_streams", [False, True])
def test_t47_eight_threads_one_module(place, fast, own_streams):
    images = _images(place)
    expected = [fast(x) for x in images]
    place.synchronize()

    def worker(i):
        def run():
            stream = torch.cuda.Stream(place.device) if place.is_gpu and own_streams else None
            with torch.cuda.stream(stream):
                for k in range(24):
                    j = (i + k) % len(images)
                    assert torch.equal(fast(images[j]), expected[j]), (i, k)

        return run

    together([worker(i) for i in range(8)])


def test_t48_weights_loaded_during_calls(place):
    """Every call sees all of the old weights or all of the new ones."""
    one, two = networks.build(networks.SMALL, 1), networks.build(networks.SMALL, 2)
    fast = place.fuse(one)
    x = place.image(1, 11, 12)
    states = [{k: v.clone() for k, v in place.fuse(n).state_dict().items()} for n in (one, two)]
    allowed = [place.fuse(n)(x) for n in (one, two)]
    assert not torch.equal(*allowed)
    place.synchronize()
    stop, seen = threading.Event(), set()

    def load():
        try:
            for k in range(40):
                fast.load_state_dict(states[(k + 1) % 2])
        finally:
            stop.set()

    def run():
        while not stop.is_set():
            y = fast(x)
            match = [torch.equal(y, a) for a in allowed]
            assert any(match), "weights of two networks were mixed"
            seen.add(match.index(True))

    together([load, run, run])
    fast.load_state_dict(states[0])
    assert torch.equal(fast(x), allowed[0])
    assert seen


# Graphs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 24, 25), (1, 200, 333)], ids=str)
def test_t50_captured_by_the_caller(place, fast, size):
    """A hundred replays, each with other pixels; the network is also used beside the graph and its workspaces are released."""
    static = place.image(*size)
    fast(static)
    place.synchronize()
    replay, y = place.capture(lambda: fast(static))
    for seed in range(100 if place.is_gpu else 4):
        x = place.image(*size, seed=seed + 1)
        static.copy_(x)
        replay()
        expected = fast(x)
        assert torch.equal(y, expected), seed
        if seed == 2:
            fast.release_workspace()
            del expected
            [torch.full((1 << 18,), 5.0, device=place.device) for _ in range(8)]  # lands where a freed workspace was


def test_t51_captured_on_the_first_call(place, fast):
    """It works, or one error says what to do; then everything still works."""
    x = place.image(1, 24, 25)
    try:
        replay, y = place.capture(lambda: fast(x))
    except mf.MemNetError as error:
        assert place.backend != "cuda", "the CUDA backend packs on the device and can be captured at once"
        assert "capture" in str(error)
    else:
        replay()
        assert torch.equal(y, place.fuse(fast.reference)(x))
    place.synchronize()
    assert torch.equal(fast(x), place.fuse(fast.reference)(x))


@pytest.mark.parametrize("place", [p for p in PLACES if not p.id.startswith("triton")], indirect=True)
def test_t52_replay_after_weights_changed(place, fast):
    """The CUDA backend packs inside the graph, from where the parameters lie: a replay follows them without a new capture."""
    x = place.image(1, 24, 25)
    fast(x)
    replay, y = place.capture(lambda: fast(x))
    replay()
    before = y.clone()
    fast.reference.blocks[0].conv_a[0].weight.data.mul_(1.5)
    fast.reference.blocks[1].gate.bn.running_var.mul_(1.7)
    replay()
    assert not torch.equal(y, before)
    assert torch.equal(y, place.fuse(fast.reference)(x))
    assert torch.equal(y, fast(x))


@pytest.mark.parametrize("place", TRITON_PLACES, indirect=True)
def test_t52_replay_of_weights_packed_before(place, fast):
    """The Triton backend packs outside: a graph keeps the weights of its capture, a plain call sees the new ones."""
    x = place.image(1, 24, 25)
    before = fast(x).clone()
    replay, y = place.capture(lambda: fast(x))
    fast.reference.recon.weight.data.mul_(2)
    replay()
    assert torch.equal(y, before)
    assert torch.equal(fast(x), place.fuse(fast.reference)(x)) and not torch.equal(fast(x), before)


@pytest.mark.parametrize("place", GPU_PLACES, indirect=True)
def test_t50_two_graphs_share_nothing(place, fast):
    """Two captured calls replayed on two streams at once."""
    inputs = [place.image(1, 70, 90, seed=s) for s in range(2)]
    expected = [fast(x) for x in inputs]
    graphs = [place.capture(lambda x=x: fast(x)) for x in inputs]
    place.synchronize()
    streams = [torch.cuda.Stream(place.device) for _ in inputs]
    for _ in range(100):
        for (replay, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                replay()
    place.synchronize()
    assert all(torch.equal(y, e) for (_, y), e in zip(graphs, expected, strict=True))


def test_many_shapes_keep_memory_bounded(place, fast):
    """Calls of 60 different small shapes: what is kept for the next call must not grow with every one."""
    for k in range(60):
        fast(place.image(1, 8 + k, 9))
        if k == 20:
            place.synchronize()
            early = place.allocated()
    place.synchronize()
    assert place.allocated() <= 2 * early + (8 << 20)
    fast.release_workspace()


# Processes -----------------------------------------------------------------------------------------------------------


def _child(place, fast, answers):
    try:
        fast = fast or place.fuse(networks.build(networks.SMALL))
        answers.put(("result", fast(place.image(1, 12, 13)).cpu().numpy().tobytes()))
    except Exception as error:
        answers.put(("error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


def _in_child(method, place, fast):
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    process = context.Process(target=_child, args=(place, fast, answers))
    process.start()
    try:
        return answers.get(timeout=60)
    finally:
        process.join(20)
        if process.is_alive():
            process.kill()


def test_t53_spawned_processes_work(place, fast):
    kind, value = _in_child("spawn", place, None)
    assert kind == "result", value
    assert value == fast(place.image(1, 12, 13)).cpu().numpy().tobytes()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_t53_forked_processes_work_or_say_why(place, fast):
    """CUDA does not survive a fork; PyTorch says so, and nothing hangs."""
    expected = fast(place.image(1, 12, 13)).cpu().numpy().tobytes()
    kind, value = _in_child("fork", place, fast)
    if place.is_gpu:
        assert kind == "error" and "fork" in value
    else:
        assert (kind, value) == ("result", expected)
    assert fast(place.image(1, 12, 13)).cpu().numpy().tobytes() == expected
