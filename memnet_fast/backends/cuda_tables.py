"""What the CUDA runtime needs to know of a network: its operations, and how each packed weight follows from the parameters.

The recipes are those of the lowering (`memnet_fast.plan`), the places those of `memnet_fast.layouts`; nothing about either is
said here again. The device computes in float64 and rounds to float32, then to 16 bit where an operand needs it, as the torch
backend does. Structures mirror csrc/cuda/pack.h and runner.h.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from memnet_fast import layouts
from memnet_fast.layouts import CHANNELS
from memnet_fast.plan import (
    Constant,
    FirstConv,
    Gate,
    NormRange,
    NormScale,
    NormShift,
    Op,
    Recipe,
    Reconstruct,
    ResidualBlock,
    State,
    Total,
    Vector,
)

OP = np.dtype(
    [
        *((name, np.int32) for name in ("kind", "src", "dst", "num_src", "kernel", "clamp")),
        *((name, np.int64) for name in ("scale", "shift", "weight_a", "bias_a", "weight_b", "bias_b", "head", "skip")),
        *((name, np.int64) for name in ("gain_a", "gain_b")),
    ],
    align=True,
)
FOLD_JOB = np.dtype([("kind", np.int32), ("count", np.int32), ("out", np.int64), ("value", np.float64)], align=True)
QUANTISE_JOB = np.dtype(
    [*((name, np.int64) for name in ("out", "step", "scale")), ("rows", np.int32), ("inner", np.int32)], align=True
)
PACK_JOB = np.dtype(
    [
        *((name, np.int64) for name in ("out", "map", "base", "scale", "shift", "multiply", "divide")),
        *((name, np.int32) for name in ("count", "inner", "type", "reserved")),
    ],
    align=True,
)
KIND = {FirstConv: 0, ResidualBlock: 1, Gate: 2, Reconstruct: 3}
FOLD_NORM, FOLD_TOTAL, FOLD_CONSTANT, FOLD_NORM_STEP, FOLD_STEP = range(5)
PACKED_TYPE = {"fp32": 0, "fp16": 1, "bf16": 2, "byte": 3}
_PACKED_SIZE = {"fp32": 4, "fp16": 2, "bf16": 2, "byte": 1}
# Sources of pack jobs that are no parameters.
FOLD, BYTES = -1, -2
_PART = 256  # bytes: every packed array begins at a multiple
_NORM_PARTS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True, eq=False)
class Tables:
    """As `Plan` of csrc/cuda/bindings.cpp takes them. fold_sources [F, 4], quantise_sources [Q] and pack_sources
    [P]: indices into the parameters."""

    ops: np.ndarray
    fold_jobs: np.ndarray
    fold_sources: np.ndarray
    quantise_jobs: np.ndarray
    quantise_sources: np.ndarray
    pack_jobs: np.ndarray
    pack_sources: np.ndarray
    maps: np.ndarray
    packed_bytes: int
    fold_count: int


def build(
    ops: Sequence[Op],
    recipes: Mapping[str, Recipe],
    parameters: Sequence[str],
    eps: Mapping[str, float],
    precision: str,
    hopper: bool,
    clamp: bool,
) -> Tables:
    """parameters: names of the tensors of the state_dict, in the order in which calls bring them.

    precision: "fp16", "bf16", "fp8". hopper: the residual blocks run on the kernels for sm_90a. clamp: the result is clamped
    to [0, 1]. Raises ValueError for operations that the kernels do not do.
    """
    builder = _Builder(recipes, {name: i for i, name in enumerate(parameters)}, eps, precision, hopper, clamp)
    records = np.zeros(len(ops), OP)
    for record, op in zip(records, ops, strict=True):
        builder.fill(record, op)
    return builder.finish(records)


@dataclass
class _Builder:
    recipes: Mapping[str, Recipe]
    parameters: Mapping[str, int]
    eps: Mapping[str, float]
    precision: str
    hopper: bool
    clamp: bool
    _fold_jobs: list[tuple[int, int, int, float]] = field(default_factory=list)
    _fold_sources: list[list[int]] = field(default_factory=list)
    _folded: dict[Vector, int] = field(default_factory=dict)
    _fold_count: int = 0
    _quantise_jobs: list[tuple[int, ...]] = field(default_factory=list)
    _quantise_sources: list[int] = field(default_factory=list)
    _pack_jobs: list[tuple[int, ...]] = field(default_factory=list)
    _pack_sources: list[int] = field(default_factory=list)
    _packed: dict[tuple[str, ...], int] = field(default_factory=dict)
    _quantised: dict[str, tuple[int, int]] = field(default_factory=dict)
    _steps: dict[str, int] = field(default_factory=dict)
    _packed_bytes: int = 0
    _maps: list[np.ndarray] = field(default_factory=list)
    _map_at: dict[bytes, int] = field(default_factory=dict)
    _map_count: int = 0

    def fill(self, record: np.void, op: Op) -> None:
        record["kind"] = KIND[type(op)]
        match op:
            case FirstConv():
                planes = self.recipes[op.scale].shape[0]
                record["dst"] = op.dst
                record["scale"] = self._array(op.scale, "fp32", layouts.rows(planes), (planes,))
                record["shift"] = self._array(op.shift, "fp32", layouts.rows(planes), (planes,))
                record["weight_a"] = self._array(op.weight, "fp32", layouts.first_conv(planes), (CHANNELS, planes, 3, 3))
                record["bias_a"] = self._channels(op.bias)
            case ResidualBlock() if self.precision == "fp8":
                self._fp8(record, op)
            case ResidualBlock():
                record["src"], record["dst"] = op.src, op.dst
                for key in ("scale", "shift", "bias_a", "bias_b"):
                    record[key] = self._channels(getattr(op, key))
                for key in ("weight_a", "weight_b"):
                    record[key] = self._array(getattr(op, key), self._operand, self._conv3x3(), (CHANNELS, CHANNELS, 3, 3))
            case Gate():
                count = len(op.srcs)
                if op.srcs != tuple(range(count)):
                    raise ValueError(f"the gate reads the slots 0 to {count - 1} in order, not {op.srcs}")
                record["num_src"], record["dst"] = count, op.dst
                record["scale"], record["shift"] = self._channels(op.scale, count), self._channels(op.shift, count)
                from memnet_fast.layouts import mma

                record["weight_a"] = self._array(op.weight, self._operand, mma.gate(count), (CHANNELS, count, CHANNELS))
                record["bias_a"] = self._channels(op.bias)
            case Reconstruct():
                count, shape = len(op.srcs), self.recipes[op.weight].shape
                if op.srcs != tuple(range(op.srcs[0], op.srcs[0] + count)):
                    raise ValueError(f"the reconstruction reads consecutive slots, not {op.srcs}")
                planes, kernel = shape[0], shape[-1]
                record["src"], record["num_src"] = op.srcs[0], count
                record["kernel"], record["clamp"] = kernel, self.clamp
                record["scale"], record["shift"] = self._channels(op.scale, count), self._channels(op.shift, count)
                record["weight_a"] = self._array(
                    op.weight, "fp32", layouts.reconstruct(planes, kernel), (planes, CHANNELS, kernel, kernel)
                )
                record["bias_a"] = self._array(op.bias, "fp32", layouts.rows(planes), (planes,))
                record["head"] = self._array(op.head, "fp32", layouts.rows(count), (count,))
                record["skip"] = self._array(op.skip, "fp32", layouts.rows(1), (1,))

    def finish(self, ops: np.ndarray) -> Tables:
        return Tables(
            ops,
            np.array(self._fold_jobs, FOLD_JOB),
            np.array(self._fold_sources, np.int32).reshape(-1, len(_NORM_PARTS)),
            np.array(self._quantise_jobs, QUANTISE_JOB),
            np.array(self._quantise_sources, np.int32),
            np.array(self._pack_jobs, PACK_JOB),
            np.array(self._pack_sources, np.int32),
            np.concatenate(self._maps) if self._maps else np.zeros(0, np.int32),
            self._packed_bytes,
            self._fold_count,
        )

    @property
    def _operand(self) -> str:
        return "fp16" if self.precision == "fp8" else self.precision

    def _fp8(self, record: np.void, op: ResidualBlock) -> None:
        """`fp8_block` of the torch backend, expression by expression."""
        from memnet_fast.layouts import wgmma

        step_a, step_b = self._step(op.range_a), self._step(op.range_b)
        record["src"], record["dst"] = op.src, op.dst
        record["scale"], record["shift"] = (self._channels(name, divide=step_a) for name in (op.scale, op.shift))
        record["bias_a"], record["bias_b"] = self._channels(op.bias_a, divide=step_b), self._channels(op.bias_b)
        record["weight_a"], rows_a = self._e4m3(op.weight_a, wgmma.conv3x3_fp8_a())
        record["weight_b"], rows_b = self._e4m3(op.weight_b, wgmma.conv3x3_fp8_b())
        count = self.recipes[op.bias_a].shape[0]
        record["gain_a"] = self._gain(op.weight_a, op.range_a, op.range_b, rows_a, count, step_a, step_b)
        record["gain_b"] = self._gain(op.weight_b, op.range_b, "", rows_b, count, step_b, -1)

    def _step(self, name: str) -> int:
        """Where in fold the step of an operand stands, the largest value to expect of it being the weight `name`."""
        if name not in self._steps:
            self._steps[name] = self._fold_count
            match self.recipes[name].sources:
                case (NormRange(norm),):
                    job = FOLD_NORM_STEP, self._count(norm), self._fold_count, 0.0
                    sources = [self.parameters[f"{norm}.{part}"] for part in _NORM_PARTS]
                case (State(parameter),):
                    job, sources = (FOLD_STEP, 1, self._fold_count, 0.0), [self.parameters[parameter], -1, -1, -1]
                case other:
                    raise ValueError(f"the device does not compute {other}")
            self._fold_jobs.append(job)
            self._fold_sources.append(sources)
            self._fold_count += 1
        return self._steps[name]

    def _count(self, norm: str) -> int:
        """Channels of a batch normalisation, from a weight that is its scale, or that it scales."""
        wanted = NormScale(norm)
        return next(r.shape[0] for r in self.recipes.values() if r.sources == (wanted,) or r.scale == wanted)

    def _e4m3(self, name: str, layout: np.ndarray) -> tuple[int, int]:
        """Offset of a convolution in e4m3, and where in fold the steps of its output channels stand."""
        if name not in self._quantised:
            recipe = self.recipes[name]
            source, _, places = self._source(recipe)
            if source < 0 or places is not None or recipe.shift is not None:
                raise ValueError(f"{name}: not a convolution as it is")
            rows, inner = recipe.shape[0], math.prod(recipe.shape[1:])
            scale = -1 if recipe.scale is None else self._fold(recipe.scale, rows)
            bytes_at, steps_at = self._reserve(rows * inner), self._fold_count
            self._fold_count += rows
            self._quantise_jobs.append((bytes_at, steps_at, scale, rows, inner))
            self._quantise_sources.append(source)
            index = layouts.into(layout, (CHANNELS, CHANNELS, 3, 3), recipe.shape).reshape(-1)
            self._quantised[name] = self._job(index, "byte", BYTES, bytes_at), steps_at
        return self._quantised[name]

    def _gain(self, weight: str, multiplier: str, divisor: str, rows: int, count: int, multiply: int, divide: int) -> int:
        """[64] of fold[rows ...] * fold[multiply] / fold[divide]."""
        key = (weight, multiplier, divisor)
        if key not in self._packed:
            index = layouts.into(layouts.rows(CHANNELS), (CHANNELS,), (count,))
            self._packed[key] = self._job(index, "fp32", FOLD, rows, multiply=multiply, divide=divide)
        return self._packed[key]

    def _conv3x3(self) -> np.ndarray:
        from memnet_fast.layouts import mma, wgmma

        return wgmma.conv3x3() if self.hopper else mma.conv3x3()

    def _channels(self, name: str, *leading: int, divide: int = -1) -> int:
        """A vector [leading, C], padded to 64 channels. divide: where in fold its divisor stands."""
        padded = (*leading, CHANNELS)
        return self._array(name, "fp32", layouts.rows(*padded), padded, divide)

    def _array(self, name: str, kind: str, layout: np.ndarray, padded: tuple[int, ...], divide: int = -1) -> int:
        """Offset of the packed weight; operations that share a weight share its packed copy."""
        if (name, kind) in self._packed:
            return self._packed[name, kind]
        recipe = self.recipes[name]
        index = layouts.into(layout, padded, recipe.shape).reshape(-1)
        source, base, places = self._source(recipe)
        if places is not None:
            index = np.where(index < 0, np.int32(-1), places.astype(np.int32)[index])
        rows = recipe.shape[0]
        scale, shift = (-1 if v is None else self._fold(v, rows) for v in (recipe.scale, recipe.shift))
        if (scale >= 0 or shift >= 0) and places is not None:
            raise ValueError(f"{name}: rows are both permuted and scaled")
        at = self._job(index, kind, source, base, scale, shift, math.prod(recipe.shape[1:]), divide=divide)
        self._packed[name, kind] = at
        return at

    def _job(
        self,
        index: np.ndarray,
        kind: str,
        source: int,
        base: int,
        scale: int = -1,
        shift: int = -1,
        inner: int = 1,
        multiply: int = -1,
        divide: int = -1,
    ) -> int:
        at = self._reserve(index.size * _PACKED_SIZE[kind])
        fields = at, self._map(index), base, scale, shift, multiply, divide, index.size, inner, PACKED_TYPE[kind], 0
        self._pack_jobs.append(fields)
        self._pack_sources.append(source)
        return at

    def _reserve(self, size: int) -> int:
        at = self._packed_bytes
        self._packed_bytes = -(-(at + size) // _PART) * _PART
        return at

    def _source(self, recipe: Recipe) -> tuple[int, int, np.ndarray | None]:
        """Which parameter (-1: fold), from which element on, and where in it each element of the weight lies (None: in
        order)."""
        first = recipe.sources[0]
        if isinstance(first, State):
            if len(recipe.sources) > 1:
                raise ValueError(f"a weight of several parameters: {recipe.sources}")
            return self.parameters[first.name], 0, recipe.index
        count = math.prod(recipe.shape) // len(recipe.sources)
        starts = [self._fold(source, count) for source in recipe.sources]
        if len(starts) == 1:
            return FOLD, starts[0], recipe.index
        places = np.concatenate([start + np.arange(count) for start in starts])
        return FOLD, 0, places if recipe.index is None else places[recipe.index]

    def _fold(self, vector: Vector, count: int) -> int:
        """Where in fold a vector of `count` values stands."""
        if vector in self._folded:
            return self._folded[vector]
        at, missing = self._fold_count, [-1] * len(_NORM_PARTS)
        match vector:
            case NormScale(norm) | NormShift(norm):
                self._folded[NormScale(norm)], self._folded[NormShift(norm)] = at, at + count
                self._fold_jobs.append((FOLD_NORM, count, at, self.eps[norm]))
                self._fold_sources.append([self.parameters[f"{norm}.{part}"] for part in _NORM_PARTS])
                self._fold_count += 2 * count
            case Total(name):
                self._folded[vector] = at
                self._fold_jobs.append((FOLD_TOTAL, self._size(name), at, 0.0))
                self._fold_sources.append([self.parameters[name], *missing[1:]])
                self._fold_count += 1
            case Constant(value, count):
                self._folded[vector] = at
                self._fold_jobs.append((FOLD_CONSTANT, count, at, value))
                self._fold_sources.append(missing)
                self._fold_count += count
            case _:
                raise ValueError(f"the device does not compute {vector}")
        return self._folded[vector]

    def _size(self, name: str) -> int:
        """Elements of a parameter, from the weight that is this parameter."""
        return next(math.prod(r.shape) for r in self.recipes.values() if r.sources == (State(name),))

    def _map(self, index: np.ndarray) -> int:
        key = index.tobytes()
        if key not in self._map_at:
            self._map_at[key] = self._map_count
            self._maps.append(index.astype(np.int32))
            self._map_count += index.size
        return self._map_at[key]
