"""The options that the restoring commands share, as flags (those of Real-ESRGAN, where it has them) or in a TOML file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from memnet_fast import __version__

_INPUT_FLAGS = ("-i", "--input")
_NOT_IN_FILES = ("config", "version", "help")


class RestoreCommand(click.Command):
    """-i takes all values up to the next option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread_inputs(args))


def spread_inputs(args: list[str]) -> list[str]:
    """`-i a b c` -> `-i a -i b -i c`. The first value may start with a dash, as for every option."""
    result: list[str] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*result, word, *rest]
        result.append(word)
        if word in _INPUT_FLAGS and rest:
            result.append(rest.pop(0))
        elif not word.startswith("--input="):
            continue
        while rest and not (rest[0].startswith("-") and len(rest[0]) > 1):
            result += ["-i", rest.pop(0)]
    return result


def _is_number(text: str) -> bool:
    """Python converts no more than some thousand digits."""
    return text.isdecimal() and len(text) < 20


class _WordOrNumber(click.ParamType):
    """A whole number of at least `least`, or the word."""

    def __init__(self, word: str, least: int) -> None:
        self.word, self.least = word, least
        self.name = f"{word}|N"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == self.word:
            return self.word
        if not isinstance(value, bool) and _is_number(str(value)) and int(value) >= self.least:
            return int(value)
        self.fail(f"expected {self.word} or a whole number of at least {self.least}, got {value!r}", param, ctx)


class _Tile(_WordOrNumber):
    """Also a list of them, one for each GPU, as long as all are equal."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        sides = str(value).split(",")
        if len(set(sides)) > 1:
            self.fail(f"one tile size serves all GPUs, so that no bit depends on which one computes, got {value!r}", param, ctx)
        return super().convert(sides[0] if len(sides) > 1 else value, param, ctx)


class _Gpus(click.ParamType):
    """Numbers of GPUs -> names of devices; None for "auto"."""

    name = "ID,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...] | None:
        if isinstance(value, tuple):
            return value
        if value == "auto":
            return None
        parts = str(value).split(",")
        if parts == ["-1"]:
            return ("cpu",)
        names = tuple(f"cuda:{int(part)}" for part in parts if _is_number(part))
        if isinstance(value, bool) or len(set(names)) < len(parts):
            self.fail(f"expected -1 for the CPU, or different numbers of GPUs such as 0 or 0,1, got {value!r}", param, ctx)
        return names


def _read_file(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Values of a TOML file become the defaults of this command."""
    if value is None:
        return
    import tomllib

    try:
        with open(value, "rb") as file:
            given = tomllib.load(file)
    except OSError as error:
        raise click.BadParameter(f"cannot read {value}: {error.strerror}", ctx, param) from error
    except (ValueError, RecursionError) as error:  # also bytes that are no text, and numbers of thousands of digits
        raise click.BadParameter(f"{value} is not TOML: {error}", ctx, param) from error
    known = {other.name for other in ctx.command.params if other.name not in _NOT_IN_FILES}
    unknown = sorted(given.keys() - known)
    if unknown:
        raise click.BadParameter(f"{value}: no option is called {', '.join(unknown)}", ctx, param)
    nested = [name for name, v in given.items() if not isinstance(v, str | int | float) and name != "input"]
    if nested:
        raise click.BadParameter(f"{value}: {', '.join(nested)} must be one value", ctx, param)
    # click would fail at a number for a flag, and cut off a fraction.
    flags = {other.name for other in ctx.command.params if isinstance(other, click.Option) and other.is_flag}
    if wrong := [name for name, v in given.items() if name in flags and not isinstance(v, bool | str)]:
        raise click.BadParameter(f"{value}: {', '.join(wrong)} must be true or false", ctx, param)
    if wrong := [name for name, v in given.items() if isinstance(v, float) and not v.is_integer()]:
        raise click.BadParameter(f"{value}: {', '.join(wrong)} must not be a fraction", ctx, param)
    if "input" in given:
        paths = [given["input"]] if isinstance(given["input"], str) else given["input"]
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise click.BadParameter(f"{value}: input must be a path or a list of paths", ctx, param)
        given["input"] = paths
    ctx.default_map = given


_COMMON = (
    click.option("-i", "--input", multiple=True, required=True, metavar="PATH...", help="Files, folders or globs."),
    click.option("-o", "--output", required=True, metavar="PATH", help="A file for one input file, else a folder."),
    click.option("-r", "--recursive", is_flag=True, help="Folders with their subfolders; the tree is mirrored."),
    click.option("-n", "--model", metavar="NAME|FILE", help="A bundled model (memnet models) or a weight file."),
    click.option(
        "-p",
        "--precision",
        default="auto",
        metavar="NAME",
        help="auto, fp32; on some backends tf32, bf16, fp16, fp8 (memnet doctor).",
    ),
    click.option("--backend", default="auto", metavar="NAME", help="auto, or one that memnet doctor lists."),
    click.option("--algorithm", default="auto", metavar="NAME", help="auto, winograd (fast), direct (tiles are bit-equal)."),
    click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N."),
    click.option("-g", "--gpu", type=_Gpus(), metavar="ID,...", help="GPUs by number; -1: the CPU. Several share the job."),
    click.option("-t", "--tile", type=_Tile("auto", 0), default="auto", help="Side of windows; 0: whole image."),
    click.option(
        "--overlap", type=_WordOrNumber("exact", 0), default="exact", help="exact: no seams; 16: as the official scripts."
    ),
    click.option("-b", "--batch", type=_WordOrNumber("auto", 1), default="auto", help="Windows computed at once."),
    click.option("-x", "--tta", is_flag=True, help="Average over 8 flips and rotations; 8 times slower."),
    click.option("--color", type=click.Choice(["y", "rgb", "gray"]), default="y", help="Luma only, each channel, or to gray."),
    click.option(
        "--existing",
        type=click.Choice(["error", "skip", "overwrite"]),
        default="error",
        help="Outputs that are there already. skip: keep what an earlier run wrote for the same input and options.",
    ),
    click.option("--on-error", type=click.Choice(["continue", "stop"]), default="continue", help="After a file that failed."),
    click.option(
        "-f", "--format", type=click.Choice(["same", "png", "jpg", "webp", "tiff"]), default="same", help="Of outputs."
    ),
    click.option("-Q", "--quality", type=click.IntRange(1, 100), default=95, help="Of JPEG and WebP."),
    click.option("--png-level", type=click.IntRange(0, 9), default=6, help="PNG compression."),
    click.option(
        "--pages", type=click.Choice(["single", "all"]), default="single", help="Many pages or frames: refuse, or all."
    ),
    click.option("--max-pixels", type=click.IntRange(1), default=1_000_000_000, help="Larger images are refused unread."),
    click.option("--compare", metavar="FILE", help="Also write input and result side by side; one input only."),
    click.option("-j", "--threads", metavar="LOAD:PROC:SAVE", help="Threads that decode, feed each device, encode."),
    click.option("--isolate", is_flag=True, help="Decode in processes of their own, so that a crash costs one file."),
    click.option("--engine", type=click.Choice(["local", "ray"]), default="local", help="ray: on a Ray cluster."),
    click.option("--address", metavar="ADDRESS", help="Of the Ray cluster; default: the one of this machine, or a new one."),
    click.option("--workers", type=click.IntRange(1), metavar="N", help="Networks at work with Ray; default: one a GPU."),
    click.option("--progress", type=click.Choice(["auto", "bar", "json", "none"]), default="auto", help="On stderr."),
    click.option("--log", metavar="FILE", help="Write options, results, times and rates as JSON."),
    click.option("--dry-run", is_flag=True, help="Print what would be written where, and stop."),
    click.option(
        "--config",
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=_read_file,
        help="Options from a TOML file, by their long names with _ for -; flags win.",
    ),
    click.option("-v", "--verbose", is_flag=True, help="Say more; show tracebacks."),
    click.option("-q", "--quiet", is_flag=True, help="Say errors only."),
    click.version_option(__version__, prog_name="memnet"),
)


def restoring(function: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the common options, in the order above."""
    for option in reversed(_COMMON):
        function = option(function)
    return function
