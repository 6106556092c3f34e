"""Small images on a GPU: the launches of a network are replayed as one CUDA graph.

A network is about fifty kernels, each about 2.5 us of work for the host. On an image of 256 x 256 the kernels last 5 to 15 us
each; below that the GPU would wait for the host. A graph is one launch, and leaves shorter gaps between the kernels.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memnet_fast import native_cuda
from memnet_fast.backends.cuda import Bound
from memnet_fast.errors import DeviceOOM
from memnet_fast.memory import empty_to_keep

_log = logging.getLogger("memnet_fast")

# Pixels of a call, up to which it is replayed. At 512 x 512 a residual block lasts 50 us by the model of csrc/cuda/README.md:
# the microsecond between two kernels is 2 % there, and not worth the 450 MB of workspace that a graph holds.
LIMIT = 1 << 16
# Graphs kept by one network; those of one stream share a workspace of 110 MB at most (M6R6).
CAPACITY = 8


def capturing(device: torch.device) -> bool:
    """Whether what is enqueued on the current stream of the device becomes part of a graph instead of running."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class _Entry:
    parameters: bytes  # their addresses and types
    graph: Any
    image: Tensor
    out: Tensor
    workspace: Tensor  # held, because the graph holds only its address


class Replays:
    """Graphs of one network by device, stream and shape, the most recently used ones.

    The first call of a shape is not replayed, the second one is captured: a folder of images of different sizes never pays
    for a capture. A graph packs the weights from the parameters like any other call, so their values may change; it is
    captured again when they have moved. Callers hold the lock of the engine, so that the copy into the graph's image, its
    launch and the copy of its result are enqueued together; results are copies and belong to the caller.

    limit: pixels; 0 turns replaying off. captures, replays: how often each happened.
    """

    def __init__(self) -> None:
        self.limit = LIMIT
        self.captures = 0
        self.replays = 0
        self._entries: OrderedDict[tuple[Any, ...], _Entry] = OrderedDict()
        self._met: OrderedDict[tuple[Any, ...], bytes] = OrderedDict()
        self._workspaces: dict[tuple[torch.device, int], Tensor] = {}

    def run(self, bound: Bound, x: Tensor, planes: int) -> Tensor | None:
        """x [N, C_in, H, W] on the device of `bound` -> [N, planes, H, W] of the dtype of x; None: run it the ordinary way."""
        n, _, h, w = x.shape
        if n * h * w > self.limit or not bound.parameters.in_place or capturing(x.device):
            return None
        stream = torch.cuda.current_stream(x.device).cuda_stream
        key = (x.device, stream, n, h, w)
        parameters = bound.parameters.addresses.tobytes() + bound.types.tobytes()
        entry = self._entries.get(key)
        if entry is None or entry.parameters != parameters:
            self._entries.pop(key, None)
            if self._met.pop(key, None) != parameters:
                self._met[key] = parameters
                self._shrink(self._met, 8 * CAPACITY)
                return None
            try:
                entry = self._capture(bound, x, planes, stream, parameters)
            except (DeviceOOM, native_cuda.module().CudaError) as error:
                # Short memory, or another thread synchronised the device, which breaks a capture. The call goes on without a
                # graph, and a fault of the device comes up there.
                _log.warning("not replayed as a graph: %s", error)
                self.clear()
                return None
            self._entries[key] = entry
            self._shrink(self._entries, CAPACITY)
        self._entries.move_to_end(key)
        entry.image.copy_(x.resolve_neg())  # copy_ to another dtype forgets the negative bit
        entry.graph.launch(stream)
        self.replays += 1
        return entry.out.to(x.dtype, copy=True)

    def clear(self) -> None:
        self._entries.clear()
        self._met.clear()
        self._workspaces.clear()

    def _capture(self, bound: Bound, x: Tensor, planes: int, stream: int, parameters: bytes) -> _Entry:
        n, _, h, w = x.shape
        size = bound.workspace_bytes(n, h, w)
        workspace = self._workspaces.get((x.device, stream))
        if workspace is None or workspace.numel() < size:
            # Graphs on one stream run one after the other; those captured before keep the smaller one.
            workspace = empty_to_keep((size,), torch.uint8, x.device, "workspace")
            self._workspaces[x.device, stream] = workspace
        image = empty_to_keep(tuple(x.shape), torch.float32, x.device, "image")
        out = empty_to_keep((n, planes, h, w), torch.float32, x.device, "output")
        graph = bound.capture(image, out, workspace)
        self.captures += 1
        return _Entry(parameters, graph, image, out, workspace)

    @staticmethod
    def _shrink(mapping: OrderedDict[tuple[Any, ...], Any], size: int) -> None:
        while len(mapping) > size:
            mapping.popitem(last=False)
