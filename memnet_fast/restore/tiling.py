"""Windows over an image: exact tiling, and the choice of a size that memory allows.

Every window has the same size and lies inside the image, so the network sees real neighbours and, at the border of the
image, the same zero padding as in the whole image. Within `halo` pixels of an edge that is not the image's own, a window is
wrong; only the rest, its core, is kept. With halo = receptive radius the cores together are the result of the whole image:
bit by bit with the "direct" algorithm, to rounding with "winograd".

An overlap of 16 cuts images as the official test scripts do instead, whose numbers can be met in no other way: into even
blocks, each computed with 16 pixels around it where the image has them. That is less than the radius, so seams are possible.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memnet_fast.control_groups import free_memory
from memnet_fast.engine import images_per_pass
from memnet_fast.errors import BackendUnavailable, DeviceOOM, InputError, NumericError
from memnet_fast.fused import FusedMemNet, fuse

_log = logging.getLogger("memnet_fast")

# Tile sizes that are chosen here are multiples of this: the Winograd tiles of 4 and the cache blocks then fit evenly.
_STEP = 16
# For each kind of device: the share of its free memory that a workspace may take, and the most. Beyond that little is won: with
# 74 pixels of overlap, 2 GiB compute 1.5 times the pixels of a large image, 16 GiB 1.15 times.
_BUDGET = {"cpu": (0.4, 2 << 30), "cuda": (0.6, 16 << 30)}
# A large image on the CPU leaves this much to the workspace, whatever the result and its encoder take.
_LEAST_BESIDE_RESULT = 1 << 30
# Of the official scripts: pixels around a block, and the tile of each task, from which they find the size of even blocks.
OFFICIAL_OVERLAP = 16
OFFICIAL_TILES = {"denoise": 120, "deblock": 150, "sr": 150}
# For how many sizes of windows the workspace is remembered.
_KEPT_SIZES = 4096

Read = Callable[[int, "Window"], np.ndarray]
Write = Callable[[int, "Window", np.ndarray, np.ndarray], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Span:
    """One axis of a window: [start, stop) is computed, [core_start, core_stop) is kept."""

    start: int
    stop: int
    core_start: int
    core_stop: int


@dataclass(frozen=True)
class Window:
    rows: Span
    cols: Span

    @property
    def whole(self) -> tuple[slice, slice]:
        return slice(self.rows.start, self.rows.stop), slice(self.cols.start, self.cols.stop)

    @property
    def core(self) -> tuple[slice, slice]:
        return slice(self.rows.core_start, self.rows.core_stop), slice(self.cols.core_start, self.cols.core_stop)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.cols.stop - self.cols.start

    @property
    def core_inside(self) -> tuple[slice, slice]:
        """The core in coordinates of the window."""
        r, c = self.rows, self.cols
        return slice(r.core_start - r.start, r.core_stop - r.start), slice(c.core_start - c.start, c.core_stop - c.start)


def spans(length: int, size: int, halo: int) -> list[Span]:
    """Spans of one size, clamped inside [0, length), whose cores cover it once. Raises InputError if size <= 2 halo."""
    if size >= length:
        return [Span(0, length, 0, length)]
    if size <= 2 * halo:
        raise InputError(
            f"a tile of {size} has no core: it must be larger than twice the overlap, {2 * halo}, for an image of {length}"
        )
    result, core_start, start = [], 0, 0
    while core_start < length:
        start = min(start, length - size)
        stop = start + size
        core_stop = length if stop == length else stop - halo
        result.append(Span(start, stop, core_start, core_stop))
        core_start, start = core_stop, core_stop - halo
    return result


def windows(h: int, w: int, size: tuple[int, int], halo: int) -> list[Window]:
    """All windows of an image, row by row."""
    return [Window(r, c) for r in spans(h, size[0], halo) for c in spans(w, size[1], halo)]


def official_spans(length: int, size: int, halo: int) -> list[Span]:
    """Even blocks of at most size + halo, each with up to halo pixels on either side that the image has. One that starts within
    the first halo pixels (of tiles below 16) has none before it, as there."""
    count = -(-length // (size + halo))
    step = -(-length // count)
    cores = [(start, min(start + step, length)) for start in range(0, length, step)]
    return [Span(start - halo if start > halo else start, min(stop + halo, length), start, stop) for start, stop in cores]


def official_windows(h: int, w: int, size: tuple[int, int]) -> list[Window]:
    """The windows of the official scripts, row by row."""
    rows, cols = (official_spans(length, side, OFFICIAL_OVERLAP) for length, side in zip((h, w), size, strict=True))
    return [Window(r, c) for r in rows for c in cols]


def available_bytes(device: torch.device) -> int:
    """Memory that is free for this process now: on the GPU, or what the system and its control groups leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = []
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        try:
            free.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (ValueError, OSError, AttributeError):
            free.append(_BUDGET["cpu"][1])
    if (left := free_memory()) is not None:
        free.append(left)
    return max(0, min(free))


def budget_bytes(device: torch.device) -> int:
    """What a workspace may take when the size of tiles is chosen here: on the CPU 40 % of what is free, at most 2 GiB; on a GPU
    60 %, at most 16 GiB."""
    share, most = _BUDGET[device.type]
    return min(most, int(share * available_bytes(device)))


def smallest_tile(halo: int) -> int:
    return -(-(2 * halo + 1) // _STEP) * _STEP


def auto_size(h: int, w: int, halo: int, fits: Callable[[int, int], bool]) -> tuple[int, int]:
    """The whole image if it fits, else the largest square tile that does (a multiple of 16, at least `smallest_tile`).

    A tile is then made as small as its number of windows allows, because the windows' overlap is computed twice.
    """
    if fits(h, w):
        return h, w
    low, high = smallest_tile(halo) // _STEP, -(-max(h, w) // _STEP)
    while low < high:
        middle = (low + high + 1) // 2
        if fits(min(h, middle * _STEP), min(w, middle * _STEP)):
            low = middle
        else:
            high = middle - 1
    tile = low * _STEP
    return _balanced(h, tile, halo), _balanced(w, tile, halo)


def _balanced(length: int, tile: int, halo: int) -> int:
    if tile >= length:
        return length
    count = len(spans(length, tile, halo))
    even = -(-(length + 2 * halo * (count - 1)) // count)
    return min(tile, max(smallest_tile(halo), -(-even // _STEP) * _STEP))


@dataclass(frozen=True)
class Tiled:
    """How an image was computed. tile: height and width of windows; with the official overlap, what the blocks were found from.
    redone: windows that were not finite at first and were computed again in fp32."""

    tile: tuple[int, int]
    windows: int
    batch: int
    redone: int = 0


@dataclass(frozen=True)
class Tiler:
    """Runs a network over the windows of images.

    net: one channel in, one channel out. tile: "auto", 0 (whole image) or the side of a window. overlap: "exact" or the
    pixels dropped at inner edges; OFFICIAL_OVERLAP cuts as the official scripts do, by default into tiles of official_tile.
    batch: "auto" or planes for each call. tta: average over 8 flips and rotations.
    """

    net: FusedMemNet
    tile: int | str = "auto"
    overlap: int | str = "exact"
    batch: int | str = "auto"
    tta: bool = False
    official_tile: int = OFFICIAL_TILES["denoise"]

    @property
    def official(self) -> bool:
        return self.overlap == OFFICIAL_OVERLAP

    @property
    def halo(self) -> int:
        return self.net.config.receptive_radius if isinstance(self.overlap, str) else self.overlap

    def run(
        self,
        n: int,
        h: int,
        w: int,
        read: Read,
        write: Write,
        device: torch.device,
        progress: Progress | None = None,
        result_bytes: int = 0,
    ) -> Tiled:
        """Computes n images of one size. read(i, window) gives the planes, float32 [K, h_w, w_w], of a window of image i;
        write(i, window, seen, restored) takes the core of what was read and of the result, [K, h_c, w_c] each.
        result_bytes: memory of the caller's result, which comes off the budget of automatic tiles on the CPU.

        When memory runs out, first the batch and then the tile shrinks (not the official one, whose size decides about
        pixels), and the images are computed again from their start.
        A window whose result is not finite is computed again in fp32.
        Raises DeviceOOM when the smallest tile does not fit either, NumericError for a result that is not finite in fp32.
        """
        size = self._first_size(h, w, result_bytes)
        # The engine computes a batch in passes of this size; handing it more at once would only hold more memory.
        per_call = images_per_pass(1 << 16, *size) if isinstance(self.batch, str) else self.batch
        best = 0.0

        def report(done: int, total: int) -> None:
            # After a fresh start the fraction would fall back; it is told again once it has caught up.
            nonlocal best
            if progress is not None and done >= best * total:
                best = done / max(total, 1)
                progress(done, total)

        while True:
            try:
                places = official_windows(h, w, size) if self.official else windows(h, w, size, self.halo)
                return self._run(n, places, size, per_call, read, write, device, report)
            except (DeviceOOM, torch.OutOfMemoryError) as error:
                self.net.release_workspace()
                smaller = max(-(-max(size) // (2 * _STEP)) * _STEP, smallest_tile(self.halo))
                if per_call > 1:
                    per_call = 1
                elif smaller < max(size) and not self.official:
                    size = (min(h, smaller), min(w, smaller))
                else:
                    raise DeviceOOM(f"not enough memory, also with a tile of {max(size)}: {error}") from error

    def _first_size(self, h: int, w: int, result_bytes: int) -> tuple[int, int]:
        if self.tile == "auto" and self.official:
            return min(self.official_tile, h), min(self.official_tile, w)
        if self.tile == "auto":
            budget = self._budget
            if next(self.net.parameters()).device.type == "cpu":
                # The result stands beside the workspace, and soon its file does.
                budget = min(budget, max(_BUDGET["cpu"][1] - 5 * result_bytes // 2, _LEAST_BESIDE_RESULT))
            return auto_size(h, w, self.halo, lambda th, tw: self._workspace(th, tw) <= budget)
        side = int(self.tile)
        return (h, w) if side == 0 else (min(side, h), min(side, w))

    @cached_property
    def _budget(self) -> int:
        # Asked once: the workspace that is kept from one image must not change the tiles, and so the bits, of the next.
        return budget_bytes(next(self.net.parameters()).device)

    @cached_property
    def _workspaces(self) -> dict[tuple[int, int], int]:
        return {}

    def _workspace(self, h: int, w: int) -> int:
        """Bytes for one window, asked once for each size: the answer waits for a look at all of the weights."""
        known = self._workspaces.get((h, w))
        if known is None:
            shapes = [(h, w), (w, h)] if self.tta else [(h, w)]
            known = max(self.net.workspace_bytes(1, *shape) for shape in shapes)
            if len(self._workspaces) >= _KEPT_SIZES:
                self._workspaces.clear()
            self._workspaces[h, w] = known
        return known

    def _run(
        self,
        n: int,
        places: list[Window],
        size: tuple[int, int],
        per_call: int,
        read: Read,
        write: Write,
        device: torch.device,
        report: Progress,
    ) -> Tiled:
        items = [(i, window) for i in range(n) for window in places]
        report(0, len(items))
        done = redone = 0
        while done < len(items):
            first = read(*items[done])
            most = items[done : done + max(1, per_call // first.shape[0])]
            group = list(next(groupby(most, lambda item: item[1].shape))[1])  # the first ones, of one size
            seen = np.stack([first, *(read(*item) for item in group[1:])])  # [G, K, H, W]
            restored = self._forward(self.net, seen.reshape(-1, 1, *seen.shape[2:]), per_call, device).reshape(seen.shape)
            for (i, window), before, after in zip(group, seen, restored, strict=True):
                if not np.isfinite(after).all():
                    after = self._again(before, window, per_call, device)
                    redone += 1
                rows, cols = window.core_inside
                write(i, window, before[:, rows, cols], after[:, rows, cols])
            done += len(group)
            report(done, len(items))
        return Tiled(size, len(items), per_call, redone)

    def _again(self, planes: np.ndarray, window: Window, per_call: int, device: torch.device) -> np.ndarray:
        """planes: [K, H, W] whose result was not finite -> their result in fp32."""
        where = f"in the window at row {window.rows.start}, column {window.cols.start}"
        if self.net.precision != "fp32":
            _log.warning("the result is not finite %s (precision %s): computed again in fp32", where, self.net.precision)
            result = self._forward(self._fp32, planes[:, None], per_call, device)[:, 0]
            if np.isfinite(result).all():
                return result
        raise NumericError(
            f"the result is not finite {where}, also in fp32 (backend {self.net.backend}); the weights or the image hold "
            f"values that are too large"
        )

    @cached_property
    def _fp32(self) -> FusedMemNet:
        """The same network in fp32: on the same backend, or on the best one that computes in fp32."""
        try:
            return fuse(self.net.reference, self.net.backend, "fp32")
        except BackendUnavailable:
            return fuse(self.net.reference, "auto", "fp32")

    @torch.no_grad()
    def _forward(self, net: FusedMemNet, planes: np.ndarray, per_call: int, device: torch.device) -> np.ndarray:
        """planes: float32 [B, 1, H, W] -> the same shape, at most per_call of them at once."""
        out = np.empty_like(planes)
        for i in range(0, len(planes), per_call):
            x = torch.from_numpy(planes[i : i + per_call]).to(device)
            out[i : i + per_call] = (_all_ways(net, x) if self.tta else net(x)).cpu().numpy()
        return out


def _all_ways(net: FusedMemNet, x: Tensor) -> Tensor:
    """x [N, 1, H, W]: mean over the eight ways to turn and flip an image, summed in a fixed order, in the dtype of x."""
    total = torch.zeros_like(x)
    for turns in range(4):
        for flip in (False, True):
            turned = torch.rot90(x.flip(3) if flip else x, turns, (2, 3)).contiguous()
            back = torch.rot90(net(turned), -turns, (2, 3))
            total += back.flip(3) if flip else back
    return total / 8
