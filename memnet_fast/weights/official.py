"""The layers of the official prototxts: their names, the parts of our network that they are, and what the names tell of it.

The .caffemodel and what others have converted from it share these names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from memnet_fast.config import MemNetConfig
from memnet_fast.errors import CheckpointMismatch, InputError
from memnet_fast.weights.fitting import tensor_shapes

_INDEX = r"0*(\d{1,4})"
# (bn_|scale_)? is the part of the unit; then the unit, with the numbers of block and recursion.
_LAYER = re.compile(rf"(bn_|scale_|)conv(1|{_INDEX}_{_INDEX}_([ab])|_transition_{_INDEX}|_end_{_INDEX})")
_HEAD_WEIGHT = re.compile(rf"weight_output_end_{_INDEX}")
_PARTS = {"bn_": "bn", "scale_": "scale", "": "conv"}

# A unit is ("first",), ("a" or "b", block, recursion), ("gate", block) or ("end", block); blocks and recursions from 1.
Unit = tuple[str | int, ...]
# The part of a unit ("bn", "scale", "conv", or "weight" of an end) and the unit.
Key = tuple[str, Unit]


def parse(name: str) -> Key | None:
    """None for a name that is none of an official layer."""
    head = _HEAD_WEIGHT.fullmatch(name)
    if head:
        return "weight", ("end", int(head[1]))
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    part, unit, m, r, x, gate, end = match.groups()
    if m:
        return _PARTS[part], (x, int(m), int(r))
    if gate:
        return _PARTS[part], ("gate", int(gate))
    return _PARTS[part], (("end", int(end)) if unit != "1" else ("first",))


def layer_name(part: str, unit: Unit) -> str:
    """The official name."""
    if part == "weight":
        return f"weight_output_end_{unit[1]:02d}"
    start = {"bn": "bn_", "scale": "scale_", "conv": ""}[part]
    match unit:
        case ("first",):
            return f"{start}conv1"
        case ("gate", m):
            return f"{start}conv_transition_{m:02d}"
        case ("end", m):
            return f"{start}conv_end_{m:02d}"
        case (x, m, r):
            return f"{start}conv{m:02d}_{r:02d}_{x}"
    raise AssertionError(unit)


def units(config: MemNetConfig) -> Iterator[tuple[Unit, str, str]]:
    """Every unit, and the stems of its batch normalisation and of its convolution in our network. The convolutions of the
    recursions of a block, and those of the ends, are one each."""
    yield ("first",), "first.bn", "first.conv"
    for m in range(1, config.num_memory_blocks + 1):
        block = f"blocks.{m - 1}"
        for x in "ab":
            for r in range(1, config.num_recursions + 1):
                yield (x, m, r), f"{block}.bn_{x}.{r - 1}", f"{block}.conv_{x}.0"
        yield ("gate", m), f"{block}.gate.bn", f"{block}.gate.conv"
        yield ("end", m), f"recon_bn.{m - 1}", "recon"


def infer_config(found: Iterable[Unit], convs: Mapping[Unit, tuple[int, ...]], bias: bool) -> MemNetConfig:
    """found: all units of the file; convs: shapes of the weights of convolutions; bias: a convolution has one.

    Raises CheckpointMismatch for what makes no network, also for absurd numbers of blocks and recursions.
    """
    counted = list(found)
    first, width = (
        convs.get(("first",), ()),
        [shape[0] for unit, shape in convs.items() if unit[0] in ("a", "b", "gate") and shape],
    )
    end = [shape for unit, shape in convs.items() if unit[0] == "end" and len(shape) == 4]
    try:
        config = MemNetConfig(
            in_channels=first[1] if len(first) == 4 else 1,
            out_channels=end[0][0] if end else 1,
            channels=first[0] if len(first) == 4 else width[0] if width else 64,
            num_memory_blocks=max((int(unit[1]) for unit in counted if len(unit) > 1), default=1),
            num_recursions=max((int(unit[2]) for unit in counted if len(unit) == 3), default=1),
            bias=bias,
        )
    except InputError as error:
        raise CheckpointMismatch(f"its layers make no MemNet: {error}") from error
    tensor_shapes(config)
    return config
