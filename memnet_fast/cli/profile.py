"""`memnet profile`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memnet_fast.cli.messages import State, is_terminal, say, shown

if TYPE_CHECKING:
    from torch import Tensor

    from memnet_fast.profile.measuring import Profile
    from memnet_fast.profile.memory import Memory
    from memnet_fast.reference import MemNet


# Of a test image. Far below this, the network's own memory ends.
_MOST_PIXELS = 1 << 28


class _Size(click.ParamType):
    """256 or 720x1280 -> (height, width)"""

    name = "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"([1-9]\d{0,5})(?:x([1-9]\d{0,5}))?", value)
        if found is None:
            self.fail(f"expected HEIGHTxWIDTH such as 720x1280, or one number for both, got {value!r}", param, ctx)
        height, width = int(found[1]), int(found[2] or found[1])
        if height * width > _MOST_PIXELS:
            self.fail(f"{value} has more than {_MOST_PIXELS} pixels", param, ctx)
        return height, width


@click.command(short_help="Says where the time and the memory of the network go, operation by operation.")
@click.option("-i", "--input", "image", metavar="IMAGE", help="What the network is given: its luma. Else noise, of --size.")
@click.option("-o", "--output", metavar="TRACE.json", help="Write a trace (ui.perfetto.dev), and beside it TRACE.roofline.png.")
@click.option("-n", "--model", metavar="NAME|FILE", default="memnet_m6r6.denoise", help="A bundled model or a weight file.")
@click.option("--size", type=_Size(), help="The image cut, or repeated as in mirrors, to this size.")
@click.option("--backend", default="auto", metavar="NAME", help="auto, or one that memnet doctor lists.")
@click.option("-p", "--precision", default="auto", metavar="NAME", help="auto, fp32; on some backends others.")
@click.option("--algorithm", default="auto", metavar="NAME", help="auto, winograd (fast), direct.")
@click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=5, help="Timed runs, in turns with ordinary ones.")
@click.option("--best", is_flag=True, help="The least time of each operation, not the median; for a busy machine.")
@click.option("--each", is_flag=True, help="A row for each operation, not for each kind.")
@click.option("--memory", is_flag=True, help="Slots and lifetimes beside the reference's allocations; TRACE.memory.png.")
@click.option("--ncu", is_flag=True, help="Only print the command line for Nsight Compute; needs no GPU.")
@click.option("--json", "json_file", metavar="FILE", help="Also write the numbers as JSON; - for stdout instead of tables.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
@click.pass_context
def profile(ctx: click.Context, **options: Any) -> int:
    """Runs the network under the plan's own instrumentation, on the whole image at once.

    \b
    memnet profile -i photo.png -o trace.json
    memnet profile --size 1080x1920 --memory
    memnet profile --size 1080x1920 --backend cuda --precision fp16 --ncu

    Ceilings of the machine (multiply-adds, matrix product, copy) are measured in the same process. docs/profiling.md says how
    to read the tables.
    """
    ctx.ensure_object(State).verbose = options["verbose"]
    if options["image"] is None and options["size"] is None:
        raise click.UsageError("give an image (-i) or a size (--size)")
    if options["ncu"]:
        click.echo(_ncu(options))
        return 0
    files = _outputs(options)
    if options["output"] is not None:
        from memnet_fast.profile import plots

        plots.require()  # before minutes of work, not after
    from memnet_fast.profile.measuring import measure
    from memnet_fast.restore.restorer import placed

    net = _network(options)
    image = _image(options, net.config.in_channels)
    request = {name: options[name] for name in ("backend", "precision", "algorithm")}
    net = placed(net, **request, device=options["device"], own=True).reference
    image = image.to(net.first.conv.weight.device)
    found = measure(net, image, **request, rounds=options["rounds"], host=options["output"] is not None, best=options["best"])
    memory = None
    if options["memory"]:
        from memnet_fast.profile import memory as memories

        n, _, h, w = found.shape
        memory = memories.memory(found.plan.config, found.steps, found.way, found.workspace_bytes, n, h, w)
    _write(files, found, memory)
    if options["json_file"] == "-":
        click.echo(json.dumps(_values(found, memory), allow_nan=False))
    else:
        _show(found, memory, options["each"])
    return 0


def _outputs(options: dict[str, Any]) -> dict[str, Path]:
    """What is to be written where. Raises OutputError where that is impossible, before anything is computed."""
    from memnet_fast.errors import OutputError
    from memnet_fast.files import require_writable

    files: dict[str, Path] = {}
    if options["output"] is not None:
        path = Path(options["output"])
        if not path.name:
            raise OutputError(f"cannot write {path}: it is a folder")
        files = {"trace": path, "roofline": path.with_suffix(".roofline.png")}
        if options["memory"]:
            files["memory"] = path.with_suffix(".memory.png")
    if options["json_file"] not in (None, "-"):
        files["json"] = Path(options["json_file"])
    for path in files.values():
        require_writable(path)
    if len(set(files.values())) < len(files):
        raise OutputError(f"cannot write {options['json_file']}: another result goes there")
    return files


def _network(options: dict[str, Any]) -> MemNet:
    """On the CPU. A preset without weights gets random ones: they cost the same time."""
    from memnet_fast.errors import InputError
    from memnet_fast.models import create_model, list_models
    from memnet_fast.restore.restorer import may_exist
    from memnet_fast.weights import load_weights

    name = options["model"]
    if name in list_models():
        return create_model(name)
    if not may_exist(name):
        raise InputError(f"there is no model and no file '{name}'; models: {', '.join(list_models())}")
    return load_weights(name)


def _image(options: dict[str, Any], channels: int) -> Tensor:
    """[1, channels, H, W] float32."""
    import numpy as np
    import torch

    from memnet_fast.errors import InputError

    if options["image"] is None:
        return torch.rand(1, channels, *options["size"], generator=torch.Generator().manual_seed(0))
    from memnet_fast.restore.color import planes, to_unit
    from memnet_fast.restore.images import read_image

    found = planes(to_unit(read_image(options["image"]).pixels), "y" if channels == 1 else "rgb")
    if len(found) != channels:
        raise InputError(f"the network takes {channels} channels, {options['image']} has {len(found)}; give --size alone")
    if options["size"] is not None:
        more = [(0, 0), *((0, max(0, want - has)) for want, has in zip(options["size"], found.shape[1:], strict=True))]
        found = np.pad(found, more, "symmetric")[:, : options["size"][0], : options["size"][1]]
    return torch.from_numpy(np.ascontiguousarray(found))[None]


def _ncu(options: dict[str, Any]) -> str:
    from memnet_fast.profile import ncu

    words = []
    for flag, key in (("-i", "image"), ("-n", "model"), ("--algorithm", "algorithm")):
        if options[key] not in (None, "auto"):
            words += [flag, options[key]]
    if options["size"] is not None:
        words += ["--size", "x".join(map(str, options["size"]))]
    return ncu.command(_network(options).config, options["backend"], options["precision"], "memnet", words)


def _values(found: Profile, memory: Memory | None) -> dict[str, Any]:
    from memnet_fast.profile import memory as memories
    from memnet_fast.profile import table

    values = table.values(found)
    return values if memory is None else {**values, "memory": memories.values(memory)}


def _write(files: dict[str, Path], found: Profile, memory: Memory | None) -> None:
    """All files are made before the first one is written."""
    from memnet_fast.files import write_whole
    from memnet_fast.profile import plots, trace

    made: dict[str, bytes] = {}
    for name in files:
        if name == "trace":
            made[name] = trace.encoded(found)
        elif name == "roofline":
            made[name] = plots.roofline(_values(found, memory))
        elif name == "memory" and memory is not None:
            made[name] = plots.memory_chart(memory)
        else:
            made[name] = (json.dumps(_values(found, memory), indent=1, allow_nan=False) + "\n").encode()
    for name, data in made.items():
        write_whole(files[name], data)
        say(f"wrote {shown(files[name])}")


def _show(found: Profile, memory: Memory | None, each: bool) -> None:
    from rich.console import Console

    from memnet_fast.profile import memory as memories
    from memnet_fast.profile import table

    console = Console(file=sys.stdout, width=None if is_terminal(sys.stdout) else 140, highlight=False)
    console.print(table.operations_table(found, each))
    phases = table.phases_table(found)
    if phases is not None:
        console.print(phases)
    lines = table.notes(found)
    if memory is not None:
        console.print(memories.slots_table(memory))
        console.print(memories.concatenations_table(memory))
        lines += memories.summary(memory)
    for line in lines:
        click.echo(line)
