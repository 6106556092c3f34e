"""Recipes: TOML files that say how a network is trained. `Recipe` is one of them, read, completed and checked.

    task = "denoise"                  # denoise, deblock, sr
    data = "~/images/train"           # folder of images, or of several sets below it
    validation = "~/images/val"       # optional
    output = "runs/denoise"
    init = "earlier/result"           # optional: a result, a weight file or the name of a bundled model to start from

    [levels]                          # low and high, or only = [...]; see samples.Levels
    [network]                         # preset, and any field of MemNetConfig but num_recursions
    [training]                        # fields of Stage that all stages share
    [[stages]]                        # one after the other; at least one

A value on the command line replaces one of the file: data=DIR, training.lr=1e-3 (of every stage), stages.0.steps=100.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from memnet_fast.config import PRESETS, MemNetConfig
from memnet_fast.errors import InputError
from memnet_fast.training.losses import DISTANCES
from memnet_fast.training.samples import Levels

# What may differ when a training is continued: where things lie, and how often they are looked at.
_FREE = ("data", "validation", "output", "init", "save_minutes", "log_every", "validate_every")
_CHOICES = {
    "optimizer": ("adamw", "muon", "sgd"),
    "schedule": ("cosine", "step", "constant"),
    "loss": tuple(DISTANCES),
    "precision": ("fp32", "bf16"),
    "memory": ("lean", "plain"),
    "kernels": ("auto", "native", "torch"),
    "jpeg": ("auto", "file", "device"),
    "statistics": ("batch", "fixed"),
}


@dataclass(frozen=True)
class Stage:
    """One stage of a training. A stage starts from the result of the one before, grown to its recursions; its optimiser is new.

    recursions: R of the network. steps: of the optimiser. minutes: of training (without interruptions) after which the stage
    ends even if it has had fewer steps, 0 for none; two such trainings are never the same to the bit. batch: patches for each
    backward pass, over all processes. patch: their side in pixels. accumulate: backward passes for each step.
    optimizer: "adamw" (betas 0.9 and 0.99; no decay of vectors and scalars), "muon" (see training.muon; for convolutions
    between several channels, "adamw" for the rest) or "sgd" (momentum 0.9). bias_rate: learning rate of the convolutions'
    biases as a multiple of lr. lr, schedule: "cosine" (to 1 % of lr, over the steps or the minutes, whichever end sooner),
    "step" (a tenth after every `decay_every` steps) or "constant", each after a linear `warmup` of that many steps.
    clip: greatest norm of the gradient, 0 for none; clip_by_lr: divided by the learning rate (the paper's clipping).
    ema: decay of the average of the weights, which becomes the result; 0: the last weights do.
    statistics: what batch normalisations normalise by. "batch": the mean and variance of each batch, as usual; the result has
    those of `settle` batches together (0: the running ones). "fixed": those of the network that the stage starts from, which
    stay as they are, so that what is trained is the function that will be used. Statistics of a few patches tell a network
    how strong their noise is, and those of one image are not what it was trained with: it matters where levels differ much.
    loss: "charbonnier" or "square" (see training.losses). alpha: the output's share of the loss, up to 1; the outputs of the
    memory blocks share the rest. 0 for 1 / (M + 1), the paper's. precision: "fp32" (by PyTorch's default, CUDA's convolutions
    round to TF32) or "bf16" for autocast. memory: "lean" (see training.lean) or "plain".
    kernels: "native" (training.units: on CPUs, in float32 whatever the precision), "torch", or "auto", native where that can be
    (on a CPU, "lean", without compile) and else torch.
    channels_last, compile: the memory format, and torch.compile (of what lies between the convolutions where memory is
    "lean", of the network where it is "plain"). jpeg: "file" compresses samples with Pillow, on the CPU; "device" by the same
    arithmetic on the device, equal but for rare roundings; "auto" is "device" on a GPU and "file" on the CPU.
    sync_batchnorm: statistics over all processes (CUDA; plain).
    """

    recursions: int
    steps: int
    batch: int = 16
    patch: int = 64
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    bias_rate: float = 1.0
    schedule: str = "cosine"
    decay_every: int = 0
    warmup: int = 100
    clip: float = 1.0
    clip_by_lr: bool = False
    ema: float = 0.998
    settle: int = 32
    statistics: str = "batch"
    loss: str = "charbonnier"
    alpha: float = 0.0
    precision: str = "bf16"
    memory: str = "lean"
    kernels: str = "auto"
    channels_last: bool = True
    compile: bool = False
    jpeg: str = "auto"
    minutes: float = 0.0
    sync_batchnorm: bool = False

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("recursions", "steps", "batch", "patch", "accumulate"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "settle", "decay_every", "weight_decay", "bias_rate", "clip", "lr", "minutes"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}")
        if math.isinf(self.minutes):
            raise InputError("minutes must be finite; 0 is for none")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, got '{getattr(self, name)}'")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema must be at least 0 and below 1, got {self.ema}")
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha must be between 0 and 1, got {self.alpha}")
        if self.schedule == "step" and self.decay_every == 0:
            raise InputError("the schedule 'step' needs decay_every")
        if self.clip_by_lr and self.lr == 0:
            raise InputError("clip_by_lr divides by lr, which must not be 0")
        if self.statistics == "fixed" and self.sync_batchnorm:
            raise InputError("sync_batchnorm is about statistics of batches, and statistics = 'fixed' takes none")
        if self.memory == "lean" and self.sync_batchnorm:
            raise InputError("sync_batchnorm needs memory = 'plain': the lean path takes the statistics of one process")
        if self.kernels == "native" and (self.memory != "lean" or self.compile):
            raise InputError("kernels = 'native' needs memory = 'lean' and compile = false")

    def rate(self, step: int, seconds: float = 0.0) -> float:
        """The learning rate of a step, counted from 0. seconds: of training before it; they count where there are `minutes`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "step":
            return self.lr * 0.1 ** (step // self.decay_every)
        if self.schedule == "cosine":
            done = (step - self.warmup) / max(1, self.steps - self.warmup)
            if self.minutes:
                done = min(1.0, max(done, seconds / (60 * self.minutes)))
            return self.lr * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * done)))
        return self.lr


@dataclass(frozen=True)
class Recipe:
    """data, validation, output, init: paths, "" for none. seed: of everything random. head_start: the value at which all w_m
    of a new network start; 0 for 1 / M. identity_start: whether the reconstruction of a new network starts at zero, so that
    the network begins as the identity, rather than with random weights. first_shift: the shift (bias) at which the
    normalisation of the image starts in a new network. At 0, as is usual, the ReLU behind it hides the darker half of the
    image until training has moved it, in a thousand steps and more; at 3.5 it hides next to nothing. validate_every: steps
    between validations, 0 for one at the end of each stage. save_minutes: between checkpoints. log_every: steps between lines
    of the log."""

    task: str
    levels: Levels
    network: MemNetConfig
    stages: tuple[Stage, ...]
    data: str = ""
    validation: str = ""
    output: str = ""
    init: str = ""
    seed: int = 0
    head_start: float = 0.0
    identity_start: bool = False
    first_shift: float = 0.0
    validate_every: int = 0
    save_minutes: float = 5.0
    log_every: int = 50
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        _check_types(self)
        if not self.stages:
            raise InputError("a recipe has at least one stage ([[stages]])")
        if self.log_every < 1 or self.validate_every < 0 or not self.save_minutes >= 0 or self.seed < 0:
            raise InputError("seed, log_every, validate_every and save_minutes must not be negative, nor log_every 0")
        if math.isinf(self.first_shift) or math.isinf(self.head_start):
            raise InputError("first_shift and head_start must be finite")
        if (self.network.in_channels, self.network.out_channels) != (1, 1):
            raise InputError("networks are trained on gray images: in_channels and out_channels are 1")
        recursions = [stage.recursions for stage in self.stages]
        if recursions != sorted(recursions) or (self.network.sharing != "conv" and recursions[0] != recursions[-1]):
            said = ", ".join(map(str, recursions))
            raise InputError(f"recursions of {said}: stages only grow, and only networks with sharing = 'conv' do")
        for number, stage in enumerate(self.stages, 1):
            before = recursions[number - 2] if number > 1 else recursions[0] if self.init else 0
            if stage.statistics == "fixed" and before != stage.recursions:
                raise InputError(
                    f"stage {number} has statistics = 'fixed'; it needs a stage before it, or an init, "
                    f"of its own {stage.recursions} recursions that has taken them"
                )
        if any(stage.kernels == "native" for stage in self.stages) and self.network.channels % 16:
            raise InputError(f"kernels = 'native' needs a multiple of 16 channels, not {self.network.channels}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def bundled() -> dict[str, Path]:
    """Names of the recipes that come with the package, and their files."""
    folder = Path(str(resources.files("memnet_fast.training") / "recipes"))
    return {p.stem: p for p in sorted(folder.glob("*.toml"))}


def load_recipe(source: str | os.PathLike[str], overrides: tuple[str, ...] = ()) -> Recipe:
    """source: the name of a bundled recipe or a TOML file. overrides: "key=value", keys with dots, values as in TOML (a value
    that is no TOML is a string). Raises InputError for whatever is wrong with them."""
    path = bundled().get(os.fspath(source)) or Path(source)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        names = ", ".join(bundled())
        raise InputError(f"there is no recipe and no file '{source}'; bundled recipes: {names}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a TOML file: {error}") from error
    for override in overrides:
        _override(values, override)
    try:
        return _recipe(values, path.stem)
    except InputError as error:
        raise InputError(f"recipe {path.name}: {error}") from error


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What a training would change that is continued with another recipe: lines "key: old -> new"."""
    if "stages" in old:  # what an older program did not know was as it is by default
        old = {**_defaults(Recipe), **old, "stages": [{**_defaults(Stage), **stage} for stage in old["stages"]]}
    before, after = _flat(_plain(old)), _flat(_plain(new))
    keys = [k for k in (*before, *(k for k in after if k not in before)) if k.split(".")[0] not in (*_FREE, "name")]
    shown = [(k, before.get(k, "nothing"), after.get(k, "nothing")) for k in keys]
    return [f"{k}: {a} -> {b}" for k, a, b in shown if a != b]


def _defaults(kind: type) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}


def _plain(value: Any) -> Any:
    """Tuples become lists, as they do in JSON."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    flat: dict[str, Any] = {}
    for key, item in items:
        nested = isinstance(item, dict) or (isinstance(item, list) and any(isinstance(i, dict) for i in item))
        flat |= _flat(item, f"{prefix}{key}.") if nested else {f"{prefix}{key}": item}
    return flat


def _override(values: dict[str, Any], text: str) -> None:
    key, equals, word = text.partition("=")
    if not equals or not key:
        raise InputError(f"expected KEY=VALUE, got '{text}'")
    try:
        value = tomllib.loads(f"x = {word}")["x"]
    except tomllib.TOMLDecodeError:
        value = word
    place: Any = values
    *path, last = key.split(".")
    try:
        for part in path:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        if isinstance(place, list):
            place[int(last)] = value
        else:
            place[last] = value
    except (IndexError, ValueError, AttributeError, TypeError):
        raise InputError(f"'{key}' names nothing in the recipe") from None
    if path == ["training"] and isinstance(values.get("stages"), list):
        for stage in values["stages"]:  # or a stage of the file that has its own would go on without a word
            stage.pop(last, None)


def _recipe(values: dict[str, Any], name: str) -> Recipe:
    values = dict(values)
    shared, stages = values.pop("training", {}), values.pop("stages", [])
    levels, network = values.pop("levels", {}), dict(values.pop("network", {}))
    for key, table, kind in (("training", shared, dict), ("stages", stages, list), ("levels", levels, dict)):
        if not isinstance(table, kind):
            raise InputError(f"'{key}' must be a {'table' if kind is dict else 'list of tables'}")
    task = values.pop("task", None)
    if not isinstance(task, str):
        raise InputError("it names no task (task = denoise, deblock or sr)")
    _known(values, Recipe, ("task", "levels", "network", "stages", "name"), "")
    _known(levels, Levels, ("task",), "levels.")
    if "only" in levels:
        levels = {**levels, "only": tuple(levels["only"]) if isinstance(levels["only"], list) else levels["only"]}
    _check_types(Levels, {"task": task, **levels})
    preset = network.pop("preset", "memnet_m6r6")
    if preset not in PRESETS:
        raise InputError(f"unknown preset '{preset}'; choose from {', '.join(PRESETS)}")
    if "num_recursions" in network:
        raise InputError("the recursions of the network are those of its stages (recursions = N in [[stages]])")
    made = []
    for i, stage in enumerate(stages):
        if not isinstance(stage, dict):
            raise InputError("'stages' must be a list of tables")
        merged = {**shared, **stage}
        _known(merged, Stage, (), f"stages.{i}.")
        missing = [k for k in ("recursions", "steps") if k not in merged]
        if missing:
            raise InputError(f"stage {i} does not say {' and '.join(missing)}")
        made.append(Stage(**merged))
    if not made:
        raise InputError("it has no stage ([[stages]])")
    last = made[-1].recursions
    config = MemNetConfig.from_dict({**dataclasses.asdict(PRESETS[preset]), **network, "num_recursions": last})
    return Recipe(task=task, levels=Levels(task, **levels), network=config, stages=tuple(made), name=name, **values)


def _known(values: dict[str, Any], kind: type, hidden: tuple[str, ...], prefix: str) -> None:
    known = [f.name for f in dataclasses.fields(kind) if f.name not in hidden]
    unknown = [f"{prefix}{k}" for k in values if k not in known]
    if unknown:
        raise InputError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")


_TYPES: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
    bool: ((bool,), "true or false"),
    tuple[float, ...]: ((tuple,), "a list of numbers"),
}


def _check_types(value: Any, given: dict[str, Any] | None = None) -> None:
    """TOML is typed, but what it says must be what a field takes; a bool is no number."""
    items = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)} if given is None else given
    for name, kind in get_type_hints(value if given is not None else type(value)).items():
        if name not in items or kind not in _TYPES:
            continue
        allowed, words = _TYPES[kind]
        parts = items[name] if isinstance(items[name], tuple) else (items[name],)
        fits = isinstance(items[name], allowed) and (kind is bool or not isinstance(items[name], bool))
        if allowed == (tuple,):
            fits = fits and all(isinstance(p, int | float) and not isinstance(p, bool) for p in parts)
        if not fits or any(isinstance(p, float) and p != p for p in parts):
            raise InputError(f"{name} must be {words}, got {items[name]!r}")
