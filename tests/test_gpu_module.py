"""A fused network as a module, on every device: inputs of every layout, weights that change, copies, memory.

Each test runs on the CPU too, so that none is new to a GPU (rows of the project's list are named in the docstrings).
"""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from support import networks
from support.places import CUDA_PLACES, GPU, PLACES, SHALLOW, TRITON_PLACES, Place, workspaces

import memnet_fast as mf
from memnet_fast import engine

GPU_PLACES = CUDA_PLACES + TRITON_PLACES


@pytest.fixture(scope="module", params=PLACES)
def place(request) -> Place:
    return request.param


@pytest.fixture(scope="module")
def fast(place) -> mf.FusedMemNet:
    return place.fuse(networks.build(networks.SMALL))


@pytest.fixture
def own(place) -> mf.FusedMemNet:
    """A network that a test may change."""
    return place.fuse(networks.build(networks.SMALL))


# Input ---------------------------------------------------------------------------------------------------------------


def test_it_is_the_network(place, own):
    x = place.image(3, 33, 29)
    y = own(x)
    assert own.backend == place.backend and own.precision == place.precision
    assert y.device == x.device and y.dtype == x.dtype and y.is_contiguous()
    place.require_close(y, copy.deepcopy(own.reference), x)


def test_t11_empty_batch(place, fast):
    x = place.image(1, 8, 9)[:0]
    y = fast(x)
    assert y.shape == (0, 1, 8, 9) and y.device == x.device
    place.synchronize()
    assert torch.isfinite(fast(place.image(1, 8, 9))).all()


@pytest.mark.parametrize("place", GPU_PLACES, indirect=True)
def test_t18_devices_that_differ(place, fast):
    with pytest.raises(mf.InputError, match="cpu") as caught:
        fast(networks.image(1, 1, 8, 8))
    assert "cuda" in str(caught.value)
    with pytest.raises(mf.InputError, match="cuda") as caught:
        mf.fuse(networks.build(networks.SMALL))(place.image(1, 8, 8))
    assert "cpu" in str(caught.value)


@pytest.mark.parametrize("place", GPU_PLACES, indirect=True)
def test_t19_a_device_that_is_not_the_current_one(place):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    second = torch.device("cuda", 1)
    net = networks.build(networks.SMALL)
    fast = mf.fuse(copy.deepcopy(net).to(second), backend=place.backend, precision=place.precision)
    x = networks.image(2, 1, 17, 40)
    with torch.cuda.device(0):
        y = fast(x.to(second))
        assert torch.cuda.current_device() == 0 and y.device == second
    assert torch.equal(y.cpu(), place.fuse(net)(x.to(GPU)).cpu())


def test_t20_fake_tensors(place, fast):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = fast(mode.from_tensor(place.image(2, 17, 19)))
        assert type(y).__name__ == "FakeTensor" and y.shape == (2, 1, 17, 19) and y.device.type == place.device.type


def _views(place):
    """Equal values at other strides and offsets."""
    x = place.image(3, 24, 34)
    n, _, h, w = x.shape
    wide = place.image(n, 2 * h, 2 * w, seed=9)
    wide[:, :, ::2, ::2] = x
    turned = torch.empty(n, 1, w, h, device=x.device)
    turned.transpose(2, 3).copy_(x)
    yield x, x.contiguous(memory_format=torch.channels_last)  # T22
    yield x, turned.transpose(2, 3)  # T23
    yield x, wide[:, :, ::2, ::2]
    yield x, x.permute(2, 1, 3, 0).contiguous().permute(3, 1, 0, 2)
    yield x[:1].expand(3, -1, -1, -1).contiguous(), x[:1].expand(3, -1, -1, -1)  # T24
    for offset in (1, 3, 7):  # T25: not at a multiple of 16 bytes
        raw = torch.empty(x.numel() + offset, device=x.device)
        moved = raw[offset:].view_as(x)
        moved.copy_(x)
        assert moved.data_ptr() % 16 != 0
        yield x, moved
    yield x, torch._neg_view(-x)  # T28


def test_t22_to_t25_views(place, fast):
    for x, view in _views(place):
        assert torch.equal(x, view)
        before, version = view.clone(), view._version
        y = fast(view)
        assert y.is_contiguous() and torch.equal(y, fast(x))
        assert torch.equal(view, before) and view._version == version  # T31


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images(place, fast, dtype):
    x = place.image(2, 15, 40).to(dtype)
    y = fast(x)
    assert y.dtype == dtype and torch.equal(y, fast(x.float()).to(dtype))


def test_t10_an_image_beyond_the_memory_is_refused(place, fast, monkeypatch):
    """A CPU pretends; a GPU is asked for slots of 2^30 pixels. The next call works."""
    x = place.image(1, 9, 8)
    y = fast(x)
    if place.is_gpu:
        with pytest.raises(mf.DeviceOOM):
            fast(torch.empty(1, 1, 1, 1, device=place.device).expand(1, 1, 2**16, 2**14))
    else:
        fast.release_workspace()
        with monkeypatch.context() as patch:
            patch.setattr(engine.torch, "empty", _out_of_memory)
            with pytest.raises(mf.DeviceOOM):
                fast(x)
    assert torch.equal(fast(x), y)


def _out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 123.00 MiB.")


# Results -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(17, 19), (64, 64), (300, 301)], ids=str)
def test_t32_results_are_the_callers_own(place, fast, size):
    """Repeated calls of one shape, as a cache of graphs would serve them."""
    images = [place.image(1, *size, seed=s) for s in range(3)]
    expected = [fast(x).clone() for x in images]
    for _ in range(4):
        results = [fast(x) for x in images]
        assert len({y.data_ptr() for y in results}) == 3
        results[0].fill_(7)
        assert all(torch.equal(y, e) for y, e in zip(results[1:], expected[1:], strict=True))
    kept = fast(images[0])
    images[0].zero_()
    assert torch.equal(kept, expected[0]), "a result does not follow its input"
    assert not torch.equal(fast(images[0]), kept), "nor is it looked up by address"


def test_t58_repeats_beside_other_work(place, fast):
    """A busy side stream and memory that is handed out and taken back all the time."""
    x = place.image(2, 40, 101)
    first = fast(x)
    for i in range(200 if place.is_gpu else 5):
        with place.stream():
            noise = torch.randn(1 + i % 7, 64, 64, device=place.device)
            noise @ noise.transpose(1, 2)
        if i % 10 == 0:
            fast.release_workspace()
        assert torch.equal(fast(x), first), i


def test_t59_windows_give_the_same_bits(place):
    """Restorer on windows of several sizes against the whole image at once."""
    net = networks.build(SHALLOW)
    fast = place.fuse(net)
    x = networks.image(1, 1, 200, 180)[0, 0].numpy()
    whole = mf.Restorer("denoise", model=fast, tile=0)(x)
    for tile in (64, 96, 128):
        assert (mf.Restorer("denoise", model=fast, tile=tile)(x) == whole).all(), tile


def test_t68_what_lies_in_the_workspace(place, own):
    x = place.image(2, 19, 21)
    clean = own(x)
    for value in (0xFF, 0x00, 0x42):
        kept = workspaces(own)
        assert kept
        for workspace in kept:
            workspace.fill_(value)
        assert torch.equal(own(x), clean), hex(value)
    own(place.image(3, 31, 8, seed=5))
    assert torch.equal(own(x), clean), "the slots of another size"


# Weights and modes ---------------------------------------------------------------------------------------------------


def _scaled(net):
    net.blocks[0].conv_a[0].weight.data.mul_(1.5)  # moves no version counter


def _loaded(net):
    net.load_state_dict(networks.build(net.config, seed=99).state_dict())


def _statistics(net):
    net.blocks[1].gate.bn.running_var.mul_(1.7)


def _replaced(net):
    net.recon.weight = torch.nn.Parameter(net.recon.weight.detach() * 0.5, requires_grad=False)


def _swapped(net):
    for p in net.parameters():
        p.data = p.data.clone().mul_(1.01)


def _stepped(net):
    net.requires_grad_(True).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    net(torch.rand(2, 1, 12, 12, device=net.recon.weight.device)).square().mean().backward()
    optimizer.step()
    net.requires_grad_(False).eval()


@pytest.mark.parametrize(
    "change", [_scaled, _loaded, _statistics, _replaced, _swapped, _stepped], ids=lambda f: f.__name__.strip("_")
)
def test_t63_changed_weights_are_noticed(place, own, change):
    x = place.image(2, 15, 14)
    for _ in range(3):
        before = own(x)
    change(own.reference)
    for _ in range(3):
        after = own(x)
        assert not torch.equal(before, after)
        assert torch.equal(after, place.fuse(own.reference)(x))
    place.require_close(after, copy.deepcopy(own.reference), x)


def _through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def _through_file(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _through_pickle, _through_file], ids=["deepcopy", "pickle", "file"])
def test_t60_copies_live_apart(place, own, duplicate):
    x = place.image(2, 13, 11)
    y = own(x)
    other = duplicate(own)
    assert torch.equal(other(x), y)
    other.reference.recon.weight.data.mul_(2)
    assert not torch.equal(other(x), y) and torch.equal(own(x), y)


def test_t61_training_mode_uses_the_batch(place, own):
    twin = copy.deepcopy(own.reference).train()
    x = place.image(2, 16, 15)
    evaluated = own(x)
    trained = own.train()(x)
    assert torch.allclose(trained, twin(x), rtol=1e-5, atol=1e-6)
    assert not torch.equal(own.eval()(x), evaluated), "the running statistics moved"


def test_t62_conversions(place, own):
    x = place.image(2, 12, 13)
    y = own(x)
    own.to(torch.float64)
    assert torch.equal(own(x), y), "a wider copy of the same numbers"
    own.to(torch.float32)
    assert torch.equal(own.to(memory_format=torch.channels_last)(x), y)
    own.to(torch.float16)
    rounded = own(x)
    assert rounded.dtype == torch.float32
    place.require_close(rounded, copy.deepcopy(own.reference).float(), x)


@pytest.mark.parametrize("place", GPU_PLACES, indirect=True)
def test_t62_to_the_cpu_and_back(place, own):
    """A backend that runs on GPUs only says so on the CPU, and works again afterwards."""
    x = place.image(1, 12, 13)
    y = own(x)
    with pytest.raises(mf.BackendUnavailable):
        own.cpu()(x.cpu())
    assert torch.equal(own.to(place.device)(x), y)


# Settings of the process ---------------------------------------------------------------------------------------------


def test_t65_switches_of_torch_change_nothing(place, fast):
    x = place.image(2, 33, 40)
    y = fast(x)
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    before = cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, torch.get_float32_matmul_precision()
    try:
        for value in (True, False):
            cuda.matmul.allow_tf32 = cudnn.allow_tf32 = cudnn.benchmark = value
            torch.set_float32_matmul_precision("medium" if value else "highest")
            assert torch.equal(fast(x), y)
    finally:
        cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before[:3]
        torch.set_float32_matmul_precision(before[3])


def test_t66_deterministic_algorithms(place, fast):
    x = place.image(2, 18, 17)
    y = fast(x)  # the setting is on in every test, and torch.empty gives NaN
    torch.use_deterministic_algorithms(False)
    try:
        fast.release_workspace()
        assert torch.equal(fast(x), y)
    finally:
        torch.use_deterministic_algorithms(True)


def test_t67_default_dtype_and_device(place, own):
    x = place.image(2, 18, 17)
    y = own(x)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device(place.device if place.is_gpu else "meta")
    try:
        assert torch.equal(own(x), y)
        again = mf.fuse(copy.deepcopy(own.reference), backend=place.backend, precision=place.precision, algorithm="direct")
        assert again(x).dtype == torch.float32 and torch.equal(again(x), y)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def test_t40_compiled_without_a_break(place, own):
    torch._dynamo.reset()
    compiled = torch.compile(own, backend="aot_eager", fullgraph=True)
    x = place.image(2, 17, 19)
    assert torch.equal(compiled(x), own(x))
    own.reference.blocks[0].conv_b[0].weight.data.mul_(1.5)
    assert torch.equal(compiled(x), own(x))


def test_t20_opcheck(place, fast):
    result = torch.library.opcheck(torch.ops.memnet_fast.forward.default, (place.image(2, 9, 10), fast._state(), fast._spec))
    assert set(result.values()) == {"SUCCESS"}


# Memory --------------------------------------------------------------------------------------------------------------


def test_t56_out_of_memory_at_every_allocation(place, own, monkeypatch):
    """One clear error; then the same bits, and no more memory held than before."""
    x = place.image(2, 40, 41)
    y = own(x)
    real = torch.empty
    for k in range(8):
        own.release_workspace()
        left = [k]

        def failing(*args, left=left, **kwargs):
            left[0] -= 1
            if left[0] == -1:
                _out_of_memory()
            return real(*args, **kwargs)

        before = place.allocated()
        with monkeypatch.context() as patch:
            patch.setattr(engine.torch, "empty", failing)
            try:
                got = own(x)
            except mf.DeviceOOM as error:
                assert "memory" in str(error)
            else:
                assert left[0] >= 0 and k > 0, "an allocation failed and nobody said so"
                assert torch.equal(got, y)
                del got
                break
        assert place.allocated() <= before
        assert torch.equal(own(x), y)
    else:
        raise AssertionError("more than eight allocations in one call")


def test_t56_short_memory_makes_smaller_windows_with_the_same_bits(place, monkeypatch):
    """Real shortage on a GPU; on a CPU an allocator that refuses more than some size."""
    fast = place.fuse(networks.build(SHALLOW))
    x = networks.image(1, 1, 512, 480)[0, 0].numpy()
    whole = mf.Restorer("denoise", model=fast, tile=0)(x)
    needed = fast.workspace_bytes(1, 512, 480)
    fast.release_workspace()
    restorer = mf.Restorer("denoise", model=fast, tile=512)
    if place.is_gpu:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(place.device).total_memory
        torch.cuda.set_per_process_memory_fraction((place.allocated() + needed * 3 // 4) / total, place.device)
    else:
        real = torch.empty

        def limited(*args, **kwargs):
            if kwargs.get("dtype") == torch.uint8 and args[0][0] > needed * 3 // 4:
                _out_of_memory()
            return real(*args, **kwargs)

        monkeypatch.setattr(engine.torch, "empty", limited)
    try:
        with pytest.raises(mf.DeviceOOM):
            fast(place.image(1, 512, 480))
        assert (restorer(x) == whole).all()
    finally:
        if place.is_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0, place.device)
    fast.release_workspace()


def test_workspace_bytes_is_what_a_call_takes(place, own):
    """On a GPU by the allocator's own count, beside the images; nothing stays behind."""
    x = place.image(1, 256, 288)  # too large to be kept as a graph
    own(x)  # packs
    own.release_workspace()
    place.synchronize()
    before = place.allocated()
    needed = own.workspace_bytes(1, 256, 288)
    assert needed > 256 * 288 * 3 * 16 * 2
    if place.is_gpu:
        torch.cuda.reset_peak_memory_stats(place.device)
        y = own(x)
        place.synchronize()
        held = torch.cuda.max_memory_allocated(place.device) - before
        # Beside the workspace the result, a copy of the image if one is needed, and what the allocator rounds up.
        assert needed <= held <= needed + y.nbytes + x.nbytes + (4 << 20)
    own.release_workspace()
    assert place.allocated() <= before + (4 << 20)


def test_t53_importing_touches_no_device():
    code = "import memnet_fast, memnet_fast.backends, torch; memnet_fast.list_models(); print(torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[-1:] == ["False"], done.stderr
