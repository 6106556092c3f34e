"""The operator `torch.ops.memnet_fast.forward`: a whole network as one node for torch.compile, torch.export and vmap."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memnet_fast.engine import engine
from memnet_fast.errors import InputError

# Not torch.library.custom_op: its first call imports torch's compiler, which takes seconds and 150 MB.
_library = torch.library.Library("memnet_fast", "DEF")
_library.define("forward(Tensor x, Tensor[] state, str spec) -> Tensor")


def _forward(x: Tensor, state: list[Tensor], spec: str) -> Tensor:
    return engine(spec).run(x, state)


_library.impl("forward", _forward, "CompositeExplicitAutograd")


def forward(x: Tensor, state: Sequence[Tensor], spec: str) -> Tensor:
    """x [N, C_in, H, W] -> [N, C_out, H, W], contiguous; state: the tensors of `engine.state_names`; spec: `engine.make_spec`.

    Inference only: it has no derivative.
    """
    return torch.ops.memnet_fast.forward(x, state, spec)


def _no_derivative(context: Any, gradient: Tensor) -> None:
    raise RuntimeError("a fused network is for inference and has no derivative; call the MemNet it was made from")


torch.library.register_autograd("memnet_fast::forward", _no_derivative, lib=_library)


@torch.library.register_fake("memnet_fast::forward", lib=_library)
def _(x: Tensor, state: list[Tensor], spec: str) -> Tensor:
    channels = json.loads(spec)["config"]["out_channels"]
    return x.new_empty((x.shape[0], channels, x.shape[2], x.shape[3]))


def _batched(info: Any, in_dims: Any, x: Tensor, state: list[Tensor], spec: str) -> tuple[Tensor, int]:
    x_dim, state_dims, _ = in_dims
    if x_dim is None or any(d is not None for d in state_dims or ()):
        raise InputError("vmap over the weights of a fused network is not possible; only over its input")
    folded = x.movedim(x_dim, 0)
    y = forward(folded.flatten(0, 1), state, spec)
    return y.unflatten(0, folded.shape[:2]), 0


torch.library.register_vmap("memnet_fast::forward", _batched, lib=_library)
