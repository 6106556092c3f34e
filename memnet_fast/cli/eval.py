"""`memnet eval`."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memnet_fast import __version__
from memnet_fast.cli.messages import State, is_terminal, say, say_error, shown

if TYPE_CHECKING:
    from memnet_fast.evaluation import Score

_DONE, _SOME_FAILED, _NOTHING = 0, 3, 4
_BASELINES = {"denoise": "noisy", "deblock": "JPEG", "sr": "bicubic"}


@click.command("eval", short_help="Measures PSNR and SSIM of a model on a folder of clean images.")
@click.option("--task", required=True, type=click.Choice(list(_BASELINES)), help="What the images are degraded by.")
@click.option("--level", "levels", required=True, type=float, multiple=True, help="Sigma, JPEG quality or scale; repeatable.")
@click.option("--data", required=True, metavar="FOLDER", help="Clean images, 8-bit gray or RGB.")
@click.option("--protocol", default="paper", metavar="NAME", help="paper, full-y or rgb: the planes that take part.")
@click.option("-n", "--model", metavar="NAME|FILE", help="A bundled model (memnet models) or a weight file of any format.")
@click.option("--backend", default="auto", metavar="NAME", help="auto, or one that memnet doctor lists.")
@click.option(
    "-p",
    "--precision",
    default="auto",
    metavar="NAME",
    help="auto, fp32; on some backends tf32, bf16, fp16, fp8 (memnet doctor).",
)
@click.option("--algorithm", default="auto", metavar="NAME", help="auto, winograd (fast), direct.")
@click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N.")
@click.option("-x", "--tta", is_flag=True, help="Average over 8 flips and rotations (self-ensemble).")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the noise; image i has seed + i.")
@click.option("--json", "json_file", metavar="FILE", help="Also write everything as JSON; - for stdout instead of the table.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
@click.pass_context
def evaluate(ctx: click.Context, **options: Any) -> int:
    """Degrades clean images, restores them, and compares both with the originals.

    \b
    memnet eval --task denoise --level 30 --data Set12
    memnet eval --task sr --level 2 --level 3 --level 4 --data Set14 --protocol paper --json r.json

    \b
    paper   denoise: MATLAB's rgb2gray; deblock, sr: the Y of its rgb2ycbcr; sr without `scale` border pixels, both rounded
    full-y  as paper, on full-range luma (0..255)
    rgb     as paper, on R, G and B (deblock: each plane is a gray JPEG)

    Beside each restored value stands that of what was given: noisy, JPEG or bicubic.
    """
    ctx.ensure_object(State).verbose = options["verbose"]
    from memnet_fast import evaluation
    from memnet_fast.errors import InputError
    from memnet_fast.restore import Restorer
    from memnet_fast.tasks import TASKS

    task = TASKS[options["task"]]
    for level in options["levels"]:
        task.check(level)
    if options["protocol"] not in evaluation.PROTOCOLS:
        raise InputError(f"unknown protocol '{options['protocol']}'; choose from {', '.join(evaluation.PROTOCOLS)}")
    files = evaluation.image_files(options["data"])
    if not files:
        say_error(f"nothing to measure: no image in {options['data']}")
        return _NOTHING
    # What a network sees is already as large as the result, whatever the task: "denoise" enlarges nothing.
    model = options["model"] or f"memnet_m6r6.{task.name}"
    names = ("backend", "precision", "algorithm", "device", "tta")
    restorer = Restorer("denoise", model=model, color="rgb", **{name: options[name] for name in names})
    report: dict[str, Any] = {
        "program": __version__,
        "task": task.name,
        "protocol": options["protocol"],
        "about": evaluation.PROTOCOLS[options["protocol"]],
        "data": str(options["data"]),
        "model": model,
        "backend": restorer.backend,
        "precision": restorer.precision,
        "algorithm": restorer.algorithm,
        "tta": options["tta"],
        "seed": options["seed"],
        "levels": [],
        "failed": [],
    }
    failed: dict[str, str] = {}
    for level in options["levels"]:
        start, scores = time.perf_counter(), []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # strong noise looks like an image in 0..255
            for found in evaluation.evaluate(files, restorer, task, level, options["protocol"], options["seed"]):
                if isinstance(found, tuple):
                    failed[str(found[0])] = str(found[1])
                else:
                    scores.append(found)
        report["levels"].append(_level(task.label(level), scores, time.perf_counter() - start))
    report["failed"] = [{"file": file, "error": error} for file, error in failed.items()]
    for file, error in failed.items():
        say_error(error if file in error else f"{shown(file)}: {error}")
    _show(report, _BASELINES[task.name], options["json_file"])
    return _SOME_FAILED if failed else _DONE


def _level(label: str, scores: list[Score], seconds: float) -> dict[str, Any]:
    import dataclasses

    from memnet_fast.evaluation import mean

    rows = [dataclasses.asdict(s) for s in scores]
    return {"level": label, "images": rows, "mean": dataclasses.asdict(mean(scores)) if scores else None, "seconds": seconds}


def _finite(value: Any) -> Any:
    """JSON has no infinity: the PSNR of equal images becomes null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show(report: dict[str, Any], baseline: str, json_file: str | None) -> None:
    text = json.dumps(_finite(report), indent=1, allow_nan=False) + "\n"
    if json_file == "-":
        click.echo(text, nl=False)
        return
    try:
        _tables(report, baseline)
    finally:  # what was measured must not be lost with a file that cannot be written, nor with a reader of the table that left
        if json_file:
            from memnet_fast.files import write_whole

            write_whole(Path(json_file), text.encode())
            say(f"wrote {shown(json_file)}")


def _tables(report: dict[str, Any], baseline: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, width=None if is_terminal(sys.stdout) else 110, highlight=False)
    for level in report["levels"]:
        if level["mean"] is None:
            continue
        title = f"{report['task']}, {level['level']}, protocol {report['protocol']}"
        table = Table("image", f"PSNR {baseline}", "PSNR restored", f"SSIM {baseline}", "SSIM restored", title=title)
        for row in (*level["images"], level["mean"]):
            if row is level["mean"]:
                table.add_section()
            psnr = (f"{row[k]:.2f}" for k in ("psnr_degraded", "psnr"))
            ssim = ("-" if row[k] is None else f"{row[k]:.4f}" for k in ("ssim_degraded", "ssim"))
            table.add_row(shown(row["name"]), *psnr, *ssim)
        console.print(table)
