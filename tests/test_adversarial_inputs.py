"""Hostile and odd tensors (rows T01 to T39, T57, T59, T69 of the project's list): the right result, or an error that helps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from support import checks, layers, networks
from torch import Tensor

import memnet_fast as mf
from memnet_fast import native
from memnet_fast.config import MemNetConfig

U = checks.UNIT["fp32"]
LIMIT = U * layers.NSR_LIMIT_WINOGRAD
NATIVE = pytest.mark.skipif(native.why_missing() is not None, reason=f"no native module: {native.why_missing()}")


@pytest.fixture(scope="module")
def net():
    return networks.build(networks.SMALL)


@pytest.fixture(scope="module", params=["torch", pytest.param("direct", marks=NATIVE), pytest.param("winograd", marks=NATIVE)])
def fast(request, net):
    """Every backend and algorithm; the tests of this file hold for each."""
    if request.param == "torch":
        return mf.fuse(net, backend="torch")
    return mf.fuse(net, backend="cpu", algorithm=request.param)


@pytest.fixture(scope="module")
def x():
    return networks.image(2, 1, 17, 19)


def _agrees(fast, x: Tensor) -> None:
    y = fast(x)
    checks.require_nsr(y, networks.oracle(fast.reference, x), x, LIMIT)


# Shapes --------------------------------------------------------------------------------------------------------------


def test_t01_one_pixel(fast):
    _agrees(fast, networks.image(1, 1, 1, 1))


@pytest.mark.parametrize("size", [(1, 7), (7, 1), (1, 4096), (4096, 1)], ids=str)
def test_t02_lines(fast, size):
    _agrees(fast, networks.image(1, 1, *size))


@pytest.mark.parametrize("size", [(2, 2), (3, 3), (4, 5), (5, 4), (2, 9)], ids=str)
def test_t03_smaller_than_a_tile(fast, size):
    _agrees(fast, networks.image(3, 1, *size))


@pytest.mark.parametrize("h", [15, 16, 17, 31, 32, 33, 63, 64, 65])
def test_t04_around_a_tile(fast, h):
    for w in (15, 16, 17, 31, 33, 65):
        _agrees(fast, networks.image(1, 1, h, w, seed=w))


@pytest.mark.parametrize("size", [(127, 128), (128, 129), (129, 127)], ids=str)
def test_t04_around_a_large_tile(fast, size):
    _agrees(fast, networks.image(1, 1, *size))


@pytest.mark.parametrize("size", [(33, 29), (127, 257), (239, 241)], ids=str)
def test_t05_prime_sizes(fast, size):
    _agrees(fast, networks.image(1, 1, *size))


def test_t11_empty_batch(fast):
    x = torch.empty(0, 1, 8, 8)
    assert fast(x).shape == (0, 1, 8, 8)
    x.requires_grad_(True)
    fast(x).sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("shape", [(1, 1, 0, 8), (1, 1, 8, 0), (2, 1, 0, 0)])
def test_t12_no_pixels(fast, x, shape):
    with pytest.raises(mf.InputError, match=str(list(shape)).replace("[", r"\[").replace("]", r"\]")):
        fast(torch.empty(shape))
    _agrees(fast, x)


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (1, 1, 1, 8, 8), (), (0,)])
def test_t13_rank(fast, shape):
    with pytest.raises(mf.InputError) as caught:
        fast(torch.zeros(shape))
    assert "4-D" in str(caught.value) and str(list(shape)) in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("channels", [0, 2, 3, 64])
def test_t14_channels(fast, channels):
    with pytest.raises(mf.InputError, match=f"expected 1 channels, got {channels}"):
        fast(torch.zeros(1, channels, 8, 8))


# Types ---------------------------------------------------------------------------------------------------------------


def test_t15_float64(fast, x):
    with pytest.raises(mf.InputError, match="float32.*float64"):
        fast(x.double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_t16_half_precision_input(fast, x, dtype):
    """The contract takes 16-bit images and gives them back: the float32 result for those values, rounded once."""
    y = fast(x.to(dtype))
    assert y.dtype == dtype
    assert torch.equal(y, fast(x.to(dtype).float()).to(dtype))


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn],
    ids=lambda d: str(d).removeprefix("torch."),
)
def test_t17_other_types(fast, x, dtype):
    with pytest.raises(mf.InputError, match="float32, float16, bfloat16"):
        fast(x.to(dtype))


def test_t18_devices_are_named(x):
    fast = mf.fuse(networks.build(networks.SMALL)).to("meta")
    with pytest.raises(mf.InputError, match="cpu.*meta"):
        fast(x)


@pytest.mark.gpu
def test_t18_no_hidden_copy_from_cuda(net, x):
    with pytest.raises(mf.InputError, match="cuda.*cpu"):
        mf.fuse(net)(x.cuda())


def test_t20_meta_tensors(fast, x):
    y = fast(x.to("meta"))
    assert y.device.type == "meta" and y.shape == x.shape and y.dtype == x.dtype and y.is_contiguous()


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.to_sparse(),
        lambda x: x.to_mkldnn(),
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
        lambda x: torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged),
        lambda x: x.numpy(),
        lambda x: None,
        lambda x: [x],
    ],
    ids=["sparse", "mkldnn", "quantized", "nested", "numpy", "None", "list"],
)
def test_t21_layouts_and_strangers(fast, x, change):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces what it will remove
        value = change(x)
    with pytest.raises(mf.InputError, match=r"expected a (dense tensor|torch\.Tensor)"):
        fast(value)


# Strides -------------------------------------------------------------------------------------------------------------


def test_t22_channels_last():
    """Values and output strides do not depend on the strides of the input."""
    for backend in ("torch", "auto"):
        fast = mf.fuse(networks.build(networks.VARIANTS["colour"]), backend=backend)
        x = networks.image(2, 3, 11, 13)
        y = fast(x)
        z = fast(x.to(memory_format=torch.channels_last))
        assert torch.equal(y, z) and z.is_contiguous() and y.stride() == z.stride()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(2, 3),
        lambda x: x[:, :, ::2, ::2],
        lambda x: x.permute(1, 0, 3, 2)[:, :1].permute(1, 0, 2, 3),
        lambda x: x.flip(2, 3),
        lambda x: x[:1].expand(4, -1, -1, -1),
        lambda x: x[..., :1].expand(-1, -1, -1, 9),
        lambda x: torch.as_strided(x, (2, 1, 5, 6), (1, 1, 2, 3)),
        lambda x: x.reshape(-1)[1 : 1 + 16 * 17].view(1, 1, 16, 17),
        lambda x: x.reshape(-1)[3 : 3 + 16 * 17].view(1, 1, 16, 17),
        lambda x: x.reshape(-1)[7 : 7 + 16 * 17].view(1, 1, 16, 17),
        lambda x: torch._neg_view(-x),
        lambda x: torch.complex(x, x).conj().real,
        lambda x: torch.complex(x, -x).conj().imag,
    ],
    ids=[
        "T23 transposed",
        "T23 sliced",
        "T23 permuted",
        "T23 flipped",
        "T24 expanded batch",
        "T24 expanded column",
        "T26 overlapping",
        "T25 offset 1",
        "T25 offset 3",
        "T25 offset 7",
        "T28 negative bit",
        "T28 real part of a conjugate",
        "T28 imaginary part of a conjugate",
    ],
)
def test_views_equal_their_copies(fast, x, view):
    given = view(x)
    before = x._version
    assert torch.equal(fast(given), fast(given.clone(memory_format=torch.contiguous_format).resolve_neg().resolve_conj()))
    assert x._version == before


def test_t27_numpy_memory(fast):
    """What torch.from_numpy can wrap works: read-only memory too, which is never written."""
    import warnings

    array = np.random.default_rng(0).random((1, 1, 9, 8), np.float32)
    array.setflags(write=False)
    before = array.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = torch.from_numpy(array)
    assert torch.equal(fast(wrapped), fast(torch.from_numpy(before)))
    assert np.array_equal(array, before)


def test_t31_input_is_left_alone(fast, x):
    before, version = x.clone(), x._version
    y = fast(x)
    assert torch.equal(x, before) and x._version == version
    y.fill_(7)
    assert torch.equal(x, before)


def test_t32_outputs_are_the_callers_own(fast, x):
    first = fast(x)
    second = fast(x)
    assert first.data_ptr() != second.data_ptr()
    first.fill_(7)
    assert torch.equal(second, fast(x))


# Values --------------------------------------------------------------------------------------------------------------


def test_t33_t34_infinities_stay_inside_their_footprint(fast):
    """An infinite pixel: not finite only where the reference is not, and the same there; the rest as without it."""
    x = networks.image(2, 1, 31, 33)
    clean = fast(x)
    for value, at in itertools.product((float("inf"), float("-inf")), ((15, 16), (0, 0))):
        bad = x.clone()
        bad[1, 0, at[0], at[1]] = value
        y, reference = fast(bad), fast.reference(bad)
        inside = checks.footprint(y.shape, 1, *at, fast.config.receptive_radius)
        assert torch.equal(torch.isfinite(y), torch.isfinite(reference)), "the reference decides what is finite"
        assert bool(torch.isfinite(y[~inside]).all())
        assert torch.equal(y[0], clean[0])
        if fast.algorithm == "direct":
            assert torch.equal(y[~inside], clean[~inside])


@pytest.mark.parametrize("value", [65504.0, 1e30, -1e30, 1e38])
def test_t35_huge_values(fast, value):
    """Finite where the reference is finite, and equal to it there."""
    x = torch.full((1, 1, 9, 10), value)
    x[0, 0, 4, 4] = value / 2
    y, reference = fast(x), fast.reference(x)
    finite = torch.isfinite(reference)
    assert bool(torch.isfinite(y)[finite].all())
    if finite.all():
        checks.require_nsr(y, networks.oracle(fast.reference, x), x, LIMIT)


def test_t36_denormals_and_negative_zero(fast):
    """A denormal counts as itself or as zero; both are far below the rounding of the result."""
    tiny = torch.full((1, 1, 9, 9), 1e-42)
    zero = torch.zeros(1, 1, 9, 9)
    truth = networks.oracle(fast.reference, zero)
    for x in (tiny, zero, -zero, -tiny):
        checks.require_nsr(fast(x), truth, zero, LIMIT)
    assert torch.equal(fast(-zero), fast(zero))


def _checkerboard(h: int, w: int) -> Tensor:
    return ((torch.arange(h)[:, None] + torch.arange(w)) % 2).float()[None, None]


def _impulse(h: int, w: int) -> Tensor:
    x = torch.zeros(1, 1, h, w)
    x[0, 0, h // 2, w // 3] = 1
    return x


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(1, 1, 20, 21),
        torch.ones(1, 1, 20, 21),
        _checkerboard(20, 21),
        _impulse(20, 21),
        networks.image(1, 1, 20, 21) * 255,
    ],
    ids=["zeros", "ones", "checkerboard", "impulse", "T37 0..255"],
)
def test_t38_structured_images(fast, x):
    _agrees(fast, x)


class _Marked(Tensor):
    pass


def test_t39_subclasses(fast, x):
    """As the reference: a subclass comes back, a Parameter does not."""
    y = fast(x)
    marked = fast(x.as_subclass(_Marked))
    assert type(marked) is type(fast.reference(x.as_subclass(_Marked))) is _Marked
    assert torch.equal(marked.as_subclass(Tensor), y)
    assert torch.equal(fast(torch.nn.Parameter(x, requires_grad=False)), y)


# Batches, crops ------------------------------------------------------------------------------------------------------


def test_t57_batch_invariance(fast):
    x = networks.image(64, 1, 12, 11)
    alone = torch.cat([fast(x[i : i + 1]) for i in range(64)])
    for n in (2, 3, 7, 16, 64):
        assert torch.equal(fast(x[:n]), alone[:n]), n
    for place in range(5):
        moved = x[1:6].clone()
        moved[place] = x[0]
        assert torch.equal(fast(moved)[place], alone[0])


@NATIVE
@pytest.mark.parametrize("core", [8, 13, 32])
def test_t59_tiles_with_an_exact_halo_are_bit_equal(net, core):
    """Direct: whatever the size and origin of the tiles. Without the whole halo they are not, or the test would see nothing."""
    fast = mf.fuse(net, algorithm="direct")
    x = networks.image(1, 1, 61, 47)
    whole, halo = fast(x), net.config.receptive_radius

    def tiled(halo: int, origin: int) -> Tensor:
        out = torch.full_like(whole, float("nan"))
        for top, left in itertools.product(range(-origin, 61, core), range(-origin, 47, core)):
            y0, y1, x0, x1 = max(top, 0), min(top + core, 61), max(left, 0), min(left + core, 47)
            if y1 <= y0 or x1 <= x0:
                continue
            a, b = max(y0 - halo, 0), max(x0 - halo, 0)
            tile = fast(x[:, :, a : y1 + halo, b : x1 + halo])
            out[:, :, y0:y1, x0:x1] = tile[:, :, y0 - a : y1 - a, x0 - b : x1 - b]
        return out

    for origin in (0, 3, 5):
        assert torch.equal(tiled(halo, origin), whole)
    assert not torch.equal(tiled(halo - 1, 0), whole)


@NATIVE
def test_t59_winograd_tiles_are_equal_to_rounding(net):
    fast = mf.fuse(net, algorithm="winograd")
    x = networks.image(1, 1, 40, 47)
    whole, halo = fast(x), net.config.receptive_radius
    tile = fast(x[:, :, 5:, 6:])
    inner = (slice(None), slice(None), slice(5 + halo, None), slice(6 + halo, None))
    error = tile[:, :, halo:, halo:].double() - whole[inner].double()
    assert checks.rms(error) <= 2 * LIMIT * checks.rms(whole[inner].double() - x[inner].double())


# Batch normalisation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["zero", "tiny", "gamma", "ratio"])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_t69_extreme_statistics(case, backend):
    net = networks.build(MemNetConfig(channels=16, num_memory_blocks=2, num_recursions=2), seed=3)
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d) and name != "first.bn":
            if case == "zero":
                module.running_var[:2] = 0.0
                module.weight[:2] *= 3e-3
            elif case == "tiny":
                module.running_var[:2] = 1e-12
                module.weight[:2] *= 3e-3
            elif case == "gamma":
                module.weight[:2] = 0.0
            else:  # mean / standard deviation of 1e4: most digits cancel, in the reference too
                module.running_mean[:1] = 1e4 * module.running_var[:1].sqrt()
    x = networks.image(1, 1, 14, 15)
    truth = networks.oracle(net, x)
    fast = mf.fuse(net, backend=backend)
    allowed = max(LIMIT, 4 * checks.nsr(net(x), truth, x)) if case == "ratio" else LIMIT
    checks.require_nsr(fast(x), truth, x, allowed)


def test_t69_negative_variance_gives_what_the_reference_gives():
    net = networks.build(networks.SMALL)
    net.blocks[0].bn_a[0].running_var[0] = -1.0
    x = networks.image(1, 1, 6, 6)
    assert torch.isnan(net(x)).all() and torch.isnan(mf.fuse(net)(x)).all()
