"""`memnet denoise`, `memnet deblock` and `memnet sr`."""

from __future__ import annotations

import json
import logging
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memnet_fast import __version__
from memnet_fast.cli.messages import State, log_on_stderr, say, say_error, shown
from memnet_fast.cli.options import RestoreCommand, restoring
from memnet_fast.cli.progress import Reporter, reporter
from memnet_fast.errors import OutputError
from memnet_fast.restore.uris import is_uri, masked

if TYPE_CHECKING:
    from memnet_fast.restore import Restorer
    from memnet_fast.restore.job import Job
    from memnet_fast.restore.report import FileResult, JobReport

_DONE, _SOME_FAILED, _NOTHING = 0, 3, 4
_LOCAL_ONLY = ("gpu", "threads", "isolate", "compare")
_RAY_ONLY = ("address", "workers")


@click.command(cls=RestoreCommand, short_help="Removes Gaussian noise of unknown strength.")
@restoring
@click.pass_context
def denoise(ctx: click.Context, **options: Any) -> int:
    """Removes Gaussian noise of unknown strength.

    \b
    memnet denoise -i noisy.png -o clean.png
    memnet denoise -i photos -r -o restored
    """
    return _run(ctx, "denoise", options)


@click.command(cls=RestoreCommand, short_help="Removes the blocks and ringing of JPEG.")
@restoring
@click.pass_context
def deblock(ctx: click.Context, **options: Any) -> int:
    """Removes the blocks and ringing of JPEG, whatever its quality (-v shows an estimate of it).

    \b
    memnet deblock -i photo.jpg -o photo.png
    memnet deblock -i 'a/**/*.jpg' -o out -f png
    """
    return _run(ctx, "deblock", options)


@click.command(cls=RestoreCommand, short_help="Enlarges 2, 3 or 4 times.")
@click.option("-s", "--scale", type=click.Choice([2, 3, 4]), default=4, help="How many times larger.")
@restoring
@click.pass_context
def sr(ctx: click.Context, **options: Any) -> int:
    """Enlarges images 2, 3 or 4 times (super-resolution).

    \b
    memnet sr -i photo.png -o big.png -s 4
    """
    return _run(ctx, "sr", options)


def _run(ctx: click.Context, task: str, options: dict[str, Any]) -> int:
    ctx.ensure_object(State).verbose = options["verbose"]
    _check(ctx, options)
    ctx.with_resource(log_on_stderr(logging.INFO if options["verbose"] else logging.WARNING))
    job = _plan(options)
    if options["verbose"]:
        for path, reason in job.ignored:
            say(f"ignored {path}: {reason}")
    if not job.items:
        say_error(f"nothing to restore: no image in {', '.join(map(masked, options['input']))}{_ignored(job)}")
        return _NOTHING
    if options["dry_run"]:
        return _dry_run(job, task, options)
    return _restore(ctx, job, task, options)


def _plan(options: dict[str, Any]) -> Job:
    names = ["recursive", "format", "existing"]
    if options["engine"] == "ray" and any(is_uri(path) for path in (*options["input"], options["output"])):
        from memnet_fast.restore.storage import plan_uris

        return plan_uris(options["input"], options["output"], **{name: options[name] for name in names})
    from memnet_fast.restore.job import plan_job

    names += ["compare", "log"]
    return plan_job(options["input"], options["output"], **{name: options[name] for name in names})


def _check(ctx: click.Context, options: dict[str, Any]) -> None:
    """Options that exclude each other."""
    if options["verbose"] and options["quiet"]:
        raise click.UsageError("-v and -q contradict each other")
    if options["gpu"] is not None and options["device"] != "auto":
        raise click.UsageError("-g and --device are two ways to say the same; give one")
    wrong = _LOCAL_ONLY if options["engine"] == "ray" else _RAY_ONLY
    given = [name for name in wrong if options[name]]
    if given:
        engine = "local" if options["engine"] == "ray" else "ray"
        raise click.UsageError(f"--{given[0]} is for --engine {engine}")


def _ignored(job: Job) -> str:
    return f"; {len(job.ignored)} ignored" if job.ignored else ""


def restorer_options(task: str, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of Restorer."""
    names = ("model", "backend", "precision", "device", "algorithm", "tile", "overlap", "batch", "tta", "color")
    scale = {"scale": options["scale"]} if task == "sr" else {}
    return {"task": task, **scale, **{name: options[name] for name in names}}


def _restorers(task: str, options: dict[str, Any]) -> list[Restorer]:
    from memnet_fast.restore import Restorer

    arguments = restorer_options(task, options)
    devices = options["gpu"] or (arguments["device"],)
    return [Restorer(**{**arguments, "device": device}) for device in devices]


def _dry_run(job: Job, task: str, options: dict[str, Any]) -> int:
    """What would be done with each file; with "skip", after a look at what is there."""
    check = None
    if options["existing"] == "skip" and job.folder is not None and job.target_storage is None:
        from memnet_fast.restore.images import Encoding
        from memnet_fast.restore.journal import Journal, key_of
        from memnet_fast.restore.pipeline import settings_of

        settings = settings_of(_restorers(task, options)[0], Encoding(options["quality"], options["png_level"]))
        check = Journal(job.folder, key_of(settings))
    for item in job.items:
        note = "" if check is None else f"  ({check.verdict(item.source, item.target)})"
        click.echo(f"{shown(item.source)} -> {shown(item.target)}{shown(note)}")
    return _DONE


def _restore(ctx: click.Context, job: Job, task: str, options: dict[str, Any]) -> int:
    from memnet_fast.restore.report import JobReport

    report = JobReport()
    quiet = options["quiet"]
    kind = "none" if quiet and options["progress"] == "auto" else options["progress"]
    state = "not finished"
    try:
        with reporter(kind) as told:
            _run_engine(job, task, options, report, told, ctx.ensure_object(State))
            failed, left = report.count("failed"), len(job.items) - len(report.results)
            state = "stopped" if left else "done"
            counts = {status: report.count(status) for status in ("restored", "skipped", "failed")}
            told.event("end", **counts, left=left, seconds=round(report.seconds, 3), stages=_stages(report))
    finally:
        if options["log"] is not None:
            try:
                _write_log(Path(options["log"]), job, report, options, task, state)
            except OutputError as error:
                if state != "not finished":
                    raise
                say_error(error)  # the exception under way says why the job ended
    if not quiet:
        say(_summary(job, report))
        if len(job.items) > 1:
            say(_limits(report))
    return _SOME_FAILED if failed else _DONE


def _run_engine(job: Job, task: str, options: dict[str, Any], report: JobReport, told: Reporter, state: State) -> None:
    from memnet_fast.restore.images import Encoding
    from memnet_fast.restore.isolation import Reading

    def finished(result: FileResult) -> None:
        _tell(result, told, options["verbose"])

    def progress(index: int, done: int, total: int, fraction: float) -> None:
        state.end_if_asked()
        told.windows(str(job.items[index].source), index, len(job.items), done, total, fraction)

    common: dict[str, Any] = {
        "encoding": Encoding(options["quality"], options["png_level"]),
        "reading": Reading(options["max_pixels"], options["pages"]),
        "stop_on_error": options["on_error"] == "stop",
        "on_result": finished,
        "progress": progress,
        "report": report,
    }
    if options["engine"] == "ray":
        from memnet_fast.restore.distributed import run_on_ray

        run_on_ray(job, restorer_options(task, options), address=options["address"], workers=options["workers"], **common)
        return
    from memnet_fast.restore.pipeline import run_job
    from memnet_fast.restore.report import Threads

    restorers = _restorers(task, options)
    state.end_if_asked()
    threads = None if options["threads"] is None else Threads.parse(options["threads"])
    run_job(job, restorers, threads=threads, isolate=options["isolate"], **common)


def _tell(result: FileResult, told: Reporter, verbose: bool) -> None:
    from memnet_fast.restore.report import describe

    source, target = str(result.item.source), str(result.item.target)
    seconds = round(sum(result.seconds.values()), 3)
    if result.error is None:
        told.event("file", input=source, output=target, status=result.status, seconds=seconds)
        if verbose and result.status == "skipped":
            say(f"{source} -> {target}: skipped, it is there already")
        elif verbose and result.size is not None:
            say(f"{source} -> {target}: {_how(result)}, {seconds:.2f} s")
        return
    message = describe(result.error)
    told.event("file", input=source, output=target, status="failed", error=message, seconds=seconds)
    say_error(message if source in message else f"{source}: {message}")
    if verbose:
        traceback.print_exception(result.error)


def _how(result: FileResult) -> str:
    parts = ["{} x {}".format(*(result.size or (0, 0)))]
    if result.frames > 1:
        parts.append(f"{result.frames} frames")
    if result.jpeg_quality is not None:
        parts.append(f"JPEG of quality {result.jpeg_quality}")
    tiled = result.tiled
    if tiled is not None:
        several = tiled.windows > 1
        parts.append(f"{tiled.windows} windows of {tiled.tile[1]} x {tiled.tile[0]}" if several else "in one piece")
        if tiled.redone:
            parts.append(f"{tiled.redone} of them again in fp32" if several else "again in fp32")
    return ", ".join(parts)


def _summary(job: Job, report: JobReport) -> str:
    left = len(job.items) - len(report.results)
    text = f"{report.count('restored')} restored, {report.count('failed')} failed"
    if skipped := report.count("skipped"):
        text += f", {skipped} skipped"
    if left:
        text += f", {left} not tried"
    pixels = sum(r.size[0] * r.size[1] * r.frames for r in report.results if r.size is not None)
    speed = pixels / report.seconds / 1e6 if report.seconds > 0 else 0.0
    how = ", ".join(str(report.settings.get(name, "?")) for name in ("backend", "precision", "algorithm"))
    return f"{text}{_ignored(job)}; {report.seconds:.2f} s, {speed:.3g} megapixels/s ({how})"


def _limits(report: JobReport) -> str:
    parts = []
    for name, stage in report.stages.items():
        rate = stage.rate()
        speed = "nothing to do" if not rate else f"{rate:.3g} megapixels/s"
        parts.append(f"{name} {speed} ({stage.busy(report.seconds):.0%} busy)")
    limit = report.limit()
    return "; ".join(parts) + ("" if limit is None else f"; limited by {limit}")


def _stages(report: JobReport) -> dict[str, Any]:
    return {
        name: {
            "threads": stage.threads,
            "images": stage.images,
            "megapixels": round(stage.pixels / 1e6, 6),
            "seconds": round(stage.seconds, 3),
            "busy": round(stage.busy(report.seconds), 4),
        }
        for name, stage in report.stages.items()
    }


def _write_log(path: Path, job: Job, report: JobReport, options: dict[str, Any], task: str, state: str) -> None:
    from memnet_fast.files import make_folder, write_whole

    results = sorted(report.results, key=lambda r: r.index)
    tried = {result.index for result in results}
    files = [_record(result) for result in results]
    files += [
        {"input": shown(item.source), "output": shown(item.target), "status": "not tried"}
        for index, item in enumerate(job.items)
        if index not in tried
    ]
    log = {
        "memnet_fast": __version__,
        "state": state,
        "task": task,
        "options": {name: _masked(value) for name, value in options.items()},
        "settings": report.settings,
        "seconds": round(report.seconds, 3),
        **{status: report.count(status) for status in ("restored", "skipped", "failed")},
        "stages": _stages(report),
        "limited_by": report.limit(),
        "ignored": [{"path": shown(path), "reason": reason} for path, reason in job.ignored],
        "files": files,
    }
    make_folder(path.parent)
    write_whole(path, (json.dumps(log, indent=2) + "\n").encode())


def _masked(value: Any) -> Any:
    """The value of an option, for a file that others will read."""
    if isinstance(value, (list, tuple)):
        return [_masked(part) for part in value]
    return masked(value) if isinstance(value, str) else value


def _record(result: FileResult) -> dict[str, Any]:
    from memnet_fast.restore.report import describe

    record: dict[str, Any] = {"input": shown(result.item.source), "output": shown(result.item.target), "status": result.status}
    record["seconds"] = {name: round(value, 4) for name, value in result.seconds.items()}
    if result.error is not None:
        return {**record, "error_type": type(result.error).__name__, "error": describe(result.error)}
    if result.size is not None:
        record |= {"size": result.size, "channels": result.channels, "dtype": result.dtype, "frames": result.frames}
    if result.jpeg_quality is not None:
        record["jpeg_quality"] = result.jpeg_quality
    if result.tiled is not None:
        record |= {"tile": result.tiled.tile[::-1], "windows": result.tiled.windows, "batch": result.tiled.batch}
        record["redone"] = result.tiled.redone
    return record
