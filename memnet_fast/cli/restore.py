"""`memnet denoise`."""

from __future__ import annotations

import json
import logging
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memnet_fast import __version__
from memnet_fast.cli.messages import State, say, say_error, shown
from memnet_fast.cli.progress import Reporter, reporter

if TYPE_CHECKING:
    from memnet_fast.restore import Restorer
    from memnet_fast.restore.job import FileResult, Job

_DONE, _SOME_FAILED, _NOTHING = 0, 3, 4
_INPUT_FLAGS = ("-i", "--input")


class _Command(click.Command):
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


class _WordOrNumber(click.ParamType):
    """A whole number of at least `least`, or the word."""

    def __init__(self, word: str, least: int) -> None:
        self.word, self.least = word, least
        self.name = f"{word}|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == self.word or isinstance(value, int):
            return value
        if str(value).isdecimal() and int(value) >= self.least:
            return int(value)
        self.fail(f"expected {self.word} or a whole number of at least {self.least}, got {value!r}", param, ctx)


@click.command(cls=_Command)
@click.option("-i", "--input", "inputs", multiple=True, required=True, metavar="PATH...", help="Files, folders or globs.")
@click.option("-o", "--output", required=True, metavar="PATH", help="A file for one input file, else a folder.")
@click.option("-r", "--recursive", is_flag=True, help="Folders with their subfolders; the tree is mirrored.")
@click.option("-n", "--model", metavar="NAME|FILE", help="A bundled model (memnet models) or a weight file.")
@click.option("-p", "--precision", default="auto", metavar="NAME", help="auto, fp32; with triton or torch tf32, bf16, fp16.")
@click.option("--backend", default="auto", metavar="NAME", help="auto, or one that memnet doctor lists.")
@click.option("--algorithm", default="auto", metavar="NAME", help="auto, winograd (fast), direct (tiles are bit-equal).")
@click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N.")
@click.option(
    "-t",
    "--tile",
    type=_WordOrNumber("auto", 0),
    default="auto",
    metavar="auto|N",
    help="Side of windows in pixels; 0: whole image.",
)
@click.option(
    "--overlap",
    type=_WordOrNumber("exact", 0),
    default="exact",
    metavar="exact|N",
    help="exact: no trace of tiles; 16: approximation.",
)
@click.option(
    "-b", "--batch", type=_WordOrNumber("auto", 1), default="auto", metavar="auto|N", help="Windows computed at once."
)
@click.option("-x", "--tta", is_flag=True, help="Average over 8 flips and rotations; 8 times slower.")
@click.option("--color", type=click.Choice(["y", "rgb", "gray"]), default="y", help="Luma only, each channel, or to gray.")
@click.option("--existing", type=click.Choice(["error", "overwrite"]), default="error", help="Outputs that exist already.")
@click.option("--on-error", type=click.Choice(["continue", "stop"]), default="continue", help="After a file that failed.")
@click.option(
    "-f", "--format", "format_", type=click.Choice(["same", "png", "jpg", "webp", "tiff"]), default="same", help="Of outputs."
)
@click.option("-Q", "--quality", type=click.IntRange(1, 100), default=95, help="Of JPEG and WebP.")
@click.option("--png-level", type=click.IntRange(0, 9), default=6, help="PNG compression.")
@click.option("--max-pixels", type=click.IntRange(1), default=1_000_000_000, help="Larger images are refused unread.")
@click.option("--compare", metavar="FILE", help="Also write input and result side by side; one input only.")
@click.option("--progress", type=click.Choice(["auto", "bar", "json", "none"]), default="auto", help="On stderr.")
@click.option("--log", metavar="FILE", help="Write options, results and times as JSON.")
@click.option("--dry-run", is_flag=True, help="Print what would be written where, and stop.")
@click.option("-v", "--verbose", is_flag=True, help="Say more; show tracebacks.")
@click.option("-q", "--quiet", is_flag=True, help="Say errors only.")
@click.version_option(__version__, prog_name="memnet")
@click.pass_context
def denoise(ctx: click.Context, **options: Any) -> int:
    """Removes Gaussian noise of unknown strength.

    \b
    memnet denoise -i noisy.png -o clean.png
    memnet denoise -i photos -r -o restored
    """
    from memnet_fast.restore.job import plan_job

    ctx.ensure_object(State).verbose = options["verbose"]
    if options["verbose"] and options["quiet"]:
        raise click.UsageError("-v and -q contradict each other")
    _set_up_log(options["verbose"])
    names = ("recursive", "existing", "compare", "log")
    job = plan_job(options["inputs"], options["output"], format=options["format_"], **{name: options[name] for name in names})
    if options["verbose"]:
        for path, reason in job.ignored:
            say(f"ignored {path}: {reason}")
    if not job.items:
        say_error(f"nothing to restore: no image in {', '.join(options['inputs'])}{_ignored(job)}")
        return _NOTHING
    if options["dry_run"]:
        for item in job.items:
            click.echo(f"{shown(item.source)} -> {shown(item.target)}")
        return _DONE
    return _restore(job, options)


def _set_up_log(verbose: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("memnet: %(message)s"))
    logging.getLogger("memnet_fast").handlers = [handler]
    logging.getLogger("memnet_fast").setLevel(logging.INFO if verbose else logging.WARNING)


def _ignored(job: Job) -> str:
    return f"; {len(job.ignored)} ignored" if job.ignored else ""


def _restore(job: Job, options: dict[str, Any]) -> int:
    from memnet_fast.restore import Restorer
    from memnet_fast.restore.images import Encoding
    from memnet_fast.restore.job import run_job

    names = ("model", "backend", "precision", "device", "algorithm", "tile", "overlap", "batch", "tta", "color")
    restorer = Restorer("denoise", **{name: options[name] for name in names})
    quiet = options["quiet"]
    results: list[FileResult] = []
    kind = "none" if quiet and options["progress"] == "auto" else options["progress"]
    start, state, code = time.perf_counter(), "not finished", _DONE
    try:
        with reporter(kind) as told:

            def finished(result: FileResult) -> None:
                results.append(result)
                _tell(result, told, options["verbose"])

            run_job(
                job,
                restorer,
                encoding=Encoding(options["quality"], options["png_level"]),
                max_pixels=options["max_pixels"],
                stop_on_error=options["on_error"] == "stop",
                progress=lambda i, done, total: told.windows(str(job.items[i].source), i, len(job.items), done, total),
                on_result=finished,
            )
            seconds = time.perf_counter() - start
            failed = [r for r in results if r.error is not None]
            code = _SOME_FAILED if failed else _DONE
            state = "done" if len(results) == len(job.items) else "stopped"
            left = len(job.items) - len(results)
            told.event("end", restored=len(results) - len(failed), failed=len(failed), left=left, seconds=round(seconds, 3))
    finally:
        if options["log"] is not None:
            _write_log(Path(options["log"]), job, results, restorer, options, state, time.perf_counter() - start)
    if not quiet:
        say(_summary(job, results, restorer, seconds))
    return code


def _tell(result: FileResult, told: Reporter, verbose: bool) -> None:
    from memnet_fast.restore.job import describe

    source, target = str(result.item.source), str(result.item.target)
    if result.error is None:
        told.event("file", input=source, output=target, status="restored", seconds=round(result.seconds, 3))
        if verbose and result.size is not None and result.tiled is not None:
            (w, h), tiled = result.size, result.tiled
            tile = f"{tiled.windows} windows of {tiled.tile[1]} x {tiled.tile[0]}" if tiled.windows > 1 else "in one piece"
            say(f"{source} -> {target}: {w} x {h}, {tile}, {result.seconds:.2f} s")
        return
    message = describe(result.error)
    told.event("file", input=source, output=target, status="failed", error=message, seconds=round(result.seconds, 3))
    say_error(message if source in message else f"{source}: {message}")
    if verbose:
        traceback.print_exception(result.error)


def _summary(job: Job, results: list[FileResult], restorer: Restorer, seconds: float) -> str:
    good = [r for r in results if r.size is not None]
    pixels = sum(r.size[0] * r.size[1] for r in good if r.size is not None)
    failed, left = len(results) - len(good), len(job.items) - len(results)
    text = f"{len(good)} restored, {failed} failed{_ignored(job)}"
    if left:
        text += f", {left} not tried"
    how = f"{restorer.backend}, {restorer.precision}, {restorer.algorithm}"
    return f"{text}; {seconds:.2f} s, {pixels / seconds / 1e6:.2f} megapixels/s ({how})"


def _write_log(
    path: Path,
    job: Job,
    results: list[FileResult],
    restorer: Restorer,
    options: dict[str, Any],
    state: str,
    seconds: float,
) -> None:
    from memnet_fast.files import write_whole

    files = [_record(result) for result in results]
    files += [
        {"input": shown(item.source), "output": shown(item.target), "status": "not tried"} for item in job.items[len(results) :]
    ]
    names = {"format_": "format", "inputs": "input"}
    log = {
        "memnet_fast": __version__,
        "state": state,
        "options": {names.get(k, k): v for k, v in options.items()},
        "model": restorer.model_name,
        "backend": restorer.backend,
        "precision": restorer.precision,
        "algorithm": restorer.algorithm,
        "device": str(restorer.device),
        "seconds": round(seconds, 3),
        "restored": sum(r.error is None for r in results),
        "failed": sum(r.error is not None for r in results),
        "ignored": [{"path": shown(path), "reason": reason} for path, reason in job.ignored],
        "files": files,
    }
    write_whole(path, (json.dumps(log, indent=2) + "\n").encode())


def _record(result: FileResult) -> dict[str, Any]:
    from memnet_fast.restore.job import describe

    record: dict[str, Any] = {"input": shown(result.item.source), "output": shown(result.item.target)}
    record["seconds"] = round(result.seconds, 3)
    if result.error is not None:
        return {**record, "status": "failed", "error_type": type(result.error).__name__, "error": describe(result.error)}
    record |= {"status": "restored", "size": result.size, "mode": result.mode}
    if result.tiled is not None:
        record |= {"tile": result.tiled.tile[::-1], "windows": result.tiled.windows, "batch": result.tiled.batch}
    return record
