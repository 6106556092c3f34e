"""Tiling: windows, equality with the whole image, memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.restoring import picture, small_net

from memnet_fast import resize
from memnet_fast.errors import DeviceOOM, InputError, NumericError
from memnet_fast.fused import FusedMemNet, fuse
from memnet_fast.restore import Restorer, tiling

RADIUS = 10
# Measured: 1.7e-6 with this network; the bound that the documentation states.
WINOGRAD_BOUND = 1e-5


@settings(max_examples=300, deadline=None)
@given(length=st.integers(1, 400), halo=st.integers(0, 30), extra=st.integers(1, 60))
def test_cores_cover_an_axis_once_and_keep_their_distance(length, halo, extra):
    size = 2 * halo + extra
    spans = tiling.spans(length, size, halo)
    covered = [i for s in spans for i in range(s.core_start, s.core_stop)]
    assert covered == list(range(length))
    assert len({s.stop - s.start for s in spans}) == 1
    for s in spans:
        assert 0 <= s.start < s.stop <= length
        assert s.start == 0 or s.core_start - s.start >= halo
        assert s.stop == length or s.stop - s.core_stop >= halo


def test_a_tile_without_a_core_is_refused_only_where_it_is_needed():
    assert len(tiling.spans(20, 20, 10)) == 1
    with pytest.raises(InputError, match="larger than twice the overlap, 20"):
        tiling.spans(21, 20, 10)


@settings(max_examples=200, deadline=None)
@given(h=st.integers(1, 3000), w=st.integers(1, 3000), halo=st.integers(0, 80), pixels=st.integers(1, 4_000_000))
def test_the_automatic_size_is_the_largest_that_fits_made_even(h, w, halo, pixels):
    def fits(th, tw):
        return th * tw <= pixels

    th, tw = tiling.auto_size(h, w, halo, fits)
    least = tiling.smallest_tile(halo)
    if fits(h, w):
        assert (th, tw) == (h, w)
        return
    assert th <= h and tw <= w and (th == h or th % 16 == 0) and (tw == w or tw % 16 == 0)
    square = max(least, 16)
    while fits(min(h, square + 16), min(w, square + 16)) and square < max(h, w):
        square += 16
    assert fits(th, tw) or max(th, tw) <= least
    for length, side in ((h, th), (w, tw)):
        # Evened out, but never at the price of one more window.
        assert len(tiling.spans(length, side, halo)) == len(tiling.spans(length, min(length, square), halo))


@pytest.mark.parametrize("tile", [21, 22, 33, 48, 64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (70, 1), (65, 23), (57, 90)])
def test_tiles_equal_the_whole_image(shape, tile):
    net = small_net()
    image = torch.rand(shape)
    direct = Restorer(model=net, algorithm="direct", tile=0)(image)
    assert torch.equal(Restorer(model=net, algorithm="direct", tile=tile)(image), direct)
    torch.testing.assert_close(direct, net(image[None, None])[0, 0].detach(), atol=1e-5, rtol=0)
    fast = Restorer(model=net, algorithm="winograd", tile=0)(image)
    assert (Restorer(model=net, algorithm="winograd", tile=tile)(image) - fast).abs().max() <= WINOGRAD_BOUND


@pytest.mark.parametrize("batch", [1, 2, 5, "auto"])
@pytest.mark.parametrize("color", ["y", "rgb", "gray"])
def test_batches_and_colours_tile_exactly(batch, color):
    net, image = small_net(), torch.rand(2, 3, 61, 45)
    whole = Restorer(model=net, algorithm="direct", tile=0, color=color)(image)
    tiled = Restorer(model=net, algorithm="direct", tile=32, batch=batch, color=color)(image)
    assert torch.equal(tiled, whole)


def test_an_overlap_below_the_radius_leaves_traces_and_the_exact_one_is_needed():
    net, image = small_net(), torch.rand(90, 90)
    whole = Restorer(model=net, algorithm="direct", tile=0)(image)
    near = Restorer(model=net, algorithm="direct", tile=40, overlap=4)(image)
    assert not torch.equal(near, whole)
    assert (near - whole).abs().max() < 0.1
    assert torch.equal(Restorer(model=net, algorithm="direct", tile=40, overlap=RADIUS)(image), whole)


class _SeesItsWindow(FusedMemNet):
    """A result that tells in every pixel what the window was, and where."""

    def forward(self, x):
        h, w = x.shape[2:]
        rows, cols = torch.arange(h)[:, None] + 1.0, torch.arange(w)[None] + 1.0
        return x + 1e-3 * torch.stack([(image * rows * cols).mean() for image in x])[:, None, None, None] + 1e-6 * rows * cols


def _as_the_official_scripts(image, net, threshold, border=16):
    """Their loops, counted from 1 as they count; every patch overwrites what an earlier one wrote in its place."""
    height, width = image.shape
    out = torch.full_like(image, float("nan"))

    def axis(length):
        step = math.ceil(length / math.ceil(length / (threshold + border)))
        for first in range(1, length + 1, step):
            before = border if first - border > 1 else 0
            begin = first - before
            if first + step + border - 1 <= length:
                yield begin, first + step + border - 1, first, first + step - 1
            else:
                yield begin, length, first, length

    for top, bottom, first_row, last_row in axis(height):
        for left, right, first_col, last_col in axis(width):
            patch = net(image[top - 1 : bottom, left - 1 : right][None, None].contiguous())[0, 0]
            kept = patch[first_row - top : last_row - top + 1, first_col - left : last_col - left + 1]
            out[first_row - 1 : last_row, first_col - 1 : last_col] = kept
    return out


@pytest.mark.parametrize("batch", ["auto", 1, 3])
@pytest.mark.parametrize(("task", "threshold"), [("denoise", 120), ("deblock", 150)])
@pytest.mark.parametrize("shape", [(1, 1), (120, 136), (137, 166), (167, 140), (300, 411), (20, 545)])
def test_an_overlap_of_16_cuts_as_the_official_scripts_do(shape, task, threshold, batch):
    image = torch.rand(shape)
    net = _SeesItsWindow(small_net())
    done = Restorer(task, model=net, overlap=16, batch=batch).restore(image)
    expected = _as_the_official_scripts(image, net, threshold)
    assert torch.equal(done.image, expected)
    if done.tiled.windows > 1:
        assert not torch.equal(net(image[None, None])[0, 0], expected)
        other = Restorer(task, model=net, overlap=16, tile=threshold + 40)(image)
        assert torch.equal(other, _as_the_official_scripts(image, net, threshold + 40))
    assert torch.equal(Restorer(task, model=net, overlap=16, tile=0)(image), net(image[None, None])[0, 0])


@pytest.mark.parametrize("tile", [1, 8, 15, 16])
def test_small_official_tiles_have_no_border_before_the_second_block(tile):
    image = torch.rand(tile + 17, 2 * tile + 35)  # two blocks, the second one at or below row 17
    net = _SeesItsWindow(small_net())
    assert torch.equal(Restorer(model=net, overlap=16, tile=tile)(image), _as_the_official_scripts(image, net, tile))


def test_super_resolution_is_cut_as_officially_after_the_enlargement():
    net, image = _SeesItsWindow(small_net()), torch.rand(61, 47)
    restored = Restorer("sr", scale=4, model=net, overlap=16)(image)
    larger = resize.imresize(image[None].double(), 4)[0].float()
    expected = _as_the_official_scripts(larger, net, 150)
    torch.testing.assert_close(restored, expected, rtol=0, atol=1e-5)
    assert (net(larger[None, None])[0, 0] - expected).abs().max() > 1e-3


def test_short_memory_does_not_change_how_the_official_scripts_cut():
    net = _starved(100 * 100)
    with pytest.raises(DeviceOOM, match="also with a tile of 120"):
        Restorer(model=net, overlap=16)(torch.rand(150, 130))


def test_the_workspace_is_asked_for_once_for_each_size(monkeypatch):
    asked = []
    original = FusedMemNet.workspace_bytes
    monkeypatch.setattr(FusedMemNet, "workspace_bytes", lambda self, *shape: (asked.append(shape), original(self, *shape))[1])
    monkeypatch.setattr(tiling, "_KEPT_SIZES", 2)
    restorer = Restorer(model=small_net())
    for shape in ((9, 8), (9, 8), (8, 9), (9, 8), (7, 7), (7, 7)):
        restorer(torch.rand(shape))
    assert asked == [(1, 9, 8), (1, 8, 9), (1, 7, 7)]


def test_a_big_image_is_tiled_by_the_budget_with_equal_pixels(monkeypatch):
    net, image = small_net(), torch.rand(100, 140)
    whole = Restorer(model=net, algorithm="direct", tile=0)(image)
    restorer = Restorer(model=net, algorithm="direct")
    budget = restorer.net.workspace_bytes(1, 64, 64)
    monkeypatch.setattr(tiling, "budget_bytes", lambda device: budget)
    done = restorer.restore(image)
    assert done.tiled.windows > 1 and restorer.net.workspace_bytes(1, *done.tiled.tile) <= budget
    assert torch.equal(done.image, whole)
    monkeypatch.setattr(tiling, "budget_bytes", lambda device: 1 << 40)
    assert restorer.restore(image).tiled == done.tiled, "tiles must not depend on what was restored before"


def test_the_budget_is_a_share_of_what_is_free(monkeypatch):
    monkeypatch.setattr(tiling, "available_bytes", lambda device: 1000)
    assert tiling.budget_bytes(torch.device("cpu")) == 400
    monkeypatch.setattr(tiling, "available_bytes", lambda device: 1 << 50)
    assert tiling.budget_bytes(torch.device("cpu")) == 2 << 30
    monkeypatch.undo()
    assert 1 << 20 < tiling.available_bytes(torch.device("cpu")) < 1 << 50


def test_the_control_group_may_leave_less_than_the_machine(monkeypatch, tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 1000 kB\n")
    monkeypatch.setattr(tiling, "Path", lambda text: tmp_path / text.lstrip("/"))
    for left, available in ((1540, 1540), (1 << 40, 1000 << 10), (None, 1000 << 10), (-5, 0)):
        monkeypatch.setattr(tiling, "free_memory", lambda left=left: left)
        assert tiling.available_bytes(torch.device("cpu")) == available


class _Starved(FusedMemNet):
    """Runs out of memory for windows above a number of pixels."""

    limit = 0

    def forward(self, x):
        self.sides.append(max(x.shape[2:]))
        if x.shape[0] * x.shape[2] * x.shape[3] > self.limit:
            raise DeviceOOM("injected")
        return super().forward(x)


def _starved(limit):
    net = _Starved(small_net(), algorithm="direct")
    net.limit, net.sides = limit, []
    return net


@pytest.mark.parametrize("tile", ["auto", 0, 96])
def test_out_of_memory_halves_the_tile_and_keeps_the_pixels(tile):
    image = torch.rand(150, 130)
    expected = Restorer(model=small_net(), algorithm="direct", tile=0)(image)
    net, told = _starved(50 * 50), []
    done = Restorer(model=net, tile=tile).restore(image, lambda d, t: told.append((d, t)))
    assert torch.equal(done.image, expected)
    assert max(done.tiled.tile) ** 2 <= net.limit
    assert net.sides == sorted(net.sides, reverse=True) and len(set(net.sides)) > 1
    fractions = [d / t for d, t in told]
    assert fractions == sorted(fractions) and fractions[-1] == 1


def test_out_of_memory_in_the_middle_starts_again_with_equal_pixels():
    class _OnceStarved(FusedMemNet):
        def forward(self, x):
            self.calls += 1
            if self.calls == 3:
                raise DeviceOOM("injected")
            return super().forward(x)

    image = torch.rand(150, 130)
    net = _OnceStarved(small_net(), algorithm="direct")
    net.calls, told = 0, []
    result = Restorer(model=net, tile=64, batch=1)(image, lambda d, t: told.append(d / t))
    assert torch.equal(result, Restorer(model=small_net(), algorithm="direct", tile=0)(image))
    assert told == sorted(told) and told[-1] == 1


def test_out_of_memory_with_the_smallest_tile_is_reported():
    with pytest.raises(DeviceOOM, match="also with a tile of 32"):
        Restorer(model=_starved(10))(torch.rand(150, 130))


def test_a_result_that_is_not_finite_is_an_error_and_never_a_black_image():
    net = small_net()
    with torch.no_grad():
        net.recon.bias.fill_(float("inf"))
    with pytest.raises(NumericError, match="not finite in the window at row 0, column 0"):
        Restorer(model=net)(picture((30, 30)))


def test_tta_is_the_mean_over_eight_ways_and_tiles_exactly():
    net, image = small_net(), torch.rand(41, 67)
    fast, ways = fuse(net, algorithm="direct"), []
    for k in range(4):
        for flip in (False, True):
            x = torch.rot90(image.flip(1) if flip else image, k, (0, 1))
            y = torch.rot90(fast(x[None, None])[0, 0], -k, (0, 1))
            ways.append(y.flip(1) if flip else y)
    expected = torch.stack(ways).mean(0)
    whole = Restorer(model=fast, tta=True, tile=0)(image)
    torch.testing.assert_close(whole, expected, atol=1e-6, rtol=0)
    assert len({w.numpy().tobytes() for w in ways}) == 8
    assert torch.equal(Restorer(model=fast, tta=True, tile=32)(image), whole)


def test_a_whole_image_is_one_window():
    done = Restorer(model=small_net(), tile=0).restore(np.zeros((5, 9), np.uint8))
    assert done.tiled == tiling.Tiled((5, 9), 1, done.tiled.batch)


def _overflowing(seed: int = 0):
    """A network whose features leave the range of float16 and not that of float32, and whose result is an image."""
    net = small_net(seed)
    with torch.no_grad():
        net.first.conv.weight.mul_(1e6)
        net.first.conv.bias.mul_(1e6)
        net.recon.weight.mul_(1e-6)
    return net


@pytest.mark.parametrize("tta", [False, True])
def test_a_window_that_is_not_finite_is_computed_again_in_fp32(tta, caplog):
    image = picture((60, 70, 3))
    half = Restorer(model=_overflowing(), backend="torch", precision="fp16", tile=40, tta=tta)
    assert not torch.isfinite(half.net(torch.rand(1, 1, 8, 8))).all(), "this network must overflow"
    done = half.restore(image)
    assert done.tiled.redone == done.tiled.windows > 1 and "computed again in fp32" in caplog.text
    expected = Restorer(model=_overflowing(), backend="torch", precision="fp32", tile=40, tta=tta).restore(image)
    assert expected.tiled.redone == 0 and np.array_equal(done.image, expected.image)
    assert done.image.std() > 1, "not one flat colour"


def test_only_the_windows_that_need_it_are_computed_again():
    class _OnceInfinite(FusedMemNet):
        calls = 0

        def forward(self, x):
            type(self).calls += 1
            y = super().forward(x)
            return torch.full_like(y, float("nan")) if self.calls == 2 else y

    image = picture((60, 70))
    net = _OnceInfinite(small_net(), backend="torch", precision="bf16")
    done = Restorer(model=net, tile=40, batch=1).restore(image)
    assert done.tiled.redone == 1
    plain = Restorer(model=small_net(), backend="torch", precision="bf16", tile=40, batch=1)(image)
    assert 0 < (done.image != plain).mean() < 0.5


def test_a_large_result_leaves_less_to_the_workspace(monkeypatch):
    tiler = Restorer(model=small_net())._tiler
    monkeypatch.setattr(tiling, "available_bytes", lambda device: 1 << 50)
    sides = [max(tiler._first_size(20_000, 20_000, result)) for result in (0, 400 << 20, 1 << 40)]
    assert sides[0] > sides[1] >= sides[2]
    bytes_ = [tiler.net.workspace_bytes(1, side, side) for side in sides]
    assert bytes_[0] > (1 << 30) and bytes_[1] <= (2 << 30) - 1000 * (1 << 20) * 99 // 100 and bytes_[2] <= 1 << 30


def test_the_workspace_of_a_large_image_makes_room_for_its_file(monkeypatch):
    monkeypatch.setattr("memnet_fast.restore.restorer._LARGE_RESULT", 1000)
    restorer, released = Restorer(model=small_net()), []
    monkeypatch.setattr(type(restorer.net), "release_workspace", lambda self: released.append(self))
    restorer(picture((20, 20)))
    assert released == []
    restorer(picture((40, 40)))
    assert released == [restorer.net]
