"""`memnet bench`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memnet_fast.cli.messages import State, is_terminal, say, shown

if TYPE_CHECKING:
    from memnet_fast.bench.peers import Variant
    from memnet_fast.reference import MemNet

_DONE, _SOME_FAILED = 0, 3
# With fewer, a round of all engines at 256x256 takes so long that two minutes hold three of them.
_MANY_THREADS = 8


@click.command(short_help="Times this package beside other engines on this machine.")
@click.option(
    "--sizes",
    metavar="LIST",
    help="256, 480x640, 16x64x64, 1080p, 4k; default: 256, on fewer than 8 threads 128, on a GPU 256,1080p.",
)
@click.option("--backends", default="auto", metavar="LIST", help="auto, all, or names: cpu, cuda, triton, torch.")
@click.option(
    "--peers",
    default="fast",
    metavar="LIST",
    help="fast (each engine at its best, unless that starts slowly), all, none, or parts of names.",
)
@click.option("-p", "--precision", default="auto", metavar="LIST", help="auto: fp32, on a GPU also fp16; all; or names.")
@click.option("-n", "--model", default="memnet_m6r6.denoise", metavar="NAME|FILE", help="A bundled model or a weight file.")
@click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N.")
@click.option("--threads", type=int, metavar="N", help="Of every engine; default: the CPUs of this process.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=105.0,
    help="For everything, about; what finds no time is skipped.",
)
@click.option("--json", "json_file", metavar="FILE", help="Also write everything as JSON; - for stdout instead of the table.")
@click.option("-q", "--quiet", is_flag=True, help="Do not say what is being done.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
@click.pass_context
def bench(ctx: click.Context, json_file: str | None, quiet: bool, verbose: bool, **options: Any) -> int:
    """Times this package beside other engines on this machine, with one network, the same weights and the same threads.

    \b
    memnet bench
    memnet bench --sizes 256,1080p --backends all --peers all --seconds 900 --json r.json

    Every engine runs in a process of its own, each time between two runs of this package, which gives ratios that hold also
    where the machine's speed drifts. Before anything is timed its result is held against float64; what is wrong gets no time.
    Rounds go on until the ratio is settled (its median is known within 2.5 %), or the time is spent: then the table says "not
    settled", and two such runs may differ by more than 5 %. Exit code 3: something was wrong or failed, or FILE cannot be
    written.
    """
    ctx.ensure_object(State).verbose = verbose
    start = time.monotonic()
    from memnet_fast.bench import facts, measure
    from memnet_fast.bench.sizes import parse_sizes
    from memnet_fast.files import require_writable, write_whole

    if json_file and json_file != "-":
        require_writable(Path(json_file))
    device = facts.checked_device(options["device"])
    threads = facts.threads(options["threads"])
    sizes = parse_sizes(options["sizes"] or _default_sizes(device, threads))
    net = _network(options["model"])
    variants = _chosen(net, device, options["backends"], options["peers"], options["precision"])
    about = {**facts.about(device), "model": options["model"], "threads": threads, "device": device}

    def tell(text: str) -> None:
        ctx.ensure_object(State).end_if_asked()
        if not quiet:
            say(text)

    rows: list[dict[str, Any]] = []
    with measure.session(net, variants, threads=threads, device=device, tell=tell) as session:
        for i, (size, shape) in enumerate(sizes.items()):
            now = time.monotonic()
            # What is left, shared by the sizes that are left.
            until = now + max(0.0, start + options["seconds"] - now) / (len(sizes) - i)
            rows += measure.forward(session, size, shape, 0.0, until=until)
            if json_file and json_file != "-":  # whoever ends this later keeps the sizes that are done
                write_whole(Path(json_file), _encoded(about, rows).encode())
    if json_file == "-":
        click.echo(_encoded(about, rows), nl=False)
    else:
        _show(about, rows)
        if json_file:
            say(f"wrote {shown(json_file)}")
    return _SOME_FAILED if any(row["status"] in ("refused", "failed") for row in rows) else _DONE


def _encoded(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    return json.dumps({"about": about, "rows": rows}, indent=1, allow_nan=False) + "\n"


def _default_sizes(device: str, threads: int) -> str:
    """What two minutes are enough for."""
    if device != "cpu":
        return "256,1080p"
    return "128" if threads < _MANY_THREADS else "256"


def _network(model: str) -> MemNet:
    from memnet_fast.models import create_model, list_models

    return create_model(model) if model in list_models(pretrained=True) else create_model(checkpoint=model)


def _chosen(net: MemNet, device: str, backends: str, peers: str, precision: str) -> list[Variant]:
    """The subject first. Raises InputError for names that mean nothing, BackendUnavailable where nothing of ours runs."""
    import torch

    from memnet_fast.backends import LADDER, PRECISIONS
    from memnet_fast.bench.peers import own_variants, peer_variants, select
    from memnet_fast.errors import BackendUnavailable

    wanted = _names("precision", precision, PRECISIONS, all_of=PRECISIONS)
    wanted = wanted or (("fp32",) if device == "cpu" else ("fp16", "fp32"))
    asked = _names("backend", backends, tuple(LADDER), all_of=tuple(LADDER))
    own = [v for v in own_variants(net, device) if v.precision in wanted and v.own is not None]
    for name in asked if backends != "all" else ():
        if all(v.own is None or v.own[0] != name for v in own):
            best = LADDER[name].PRECISIONS[0] if precision == "auto" else wanted[0]
            reason = LADDER[name].why_not(net.config, torch.device(device), best, LADDER[name].ALGORITHMS[0])
            raise BackendUnavailable(name, reason or f"not in {', '.join(wanted)}")
    if asked:
        own = [v for v in own if v.own is not None and v.own[0] in asked]
    else:  # the first of each precision: what runs best here
        own = [next(v for v in own if v.precision == p) for p in wanted if any(v.precision == p for v in own)]
    if not own:
        raise BackendUnavailable(backends, f"nothing runs on {device} in {', '.join(wanted)}")
    return own + select([v for v in peer_variants(device) if v.precision in wanted], peers)


def _names(what: str, text: str, known: tuple[str, ...], all_of: tuple[str, ...]) -> tuple[str, ...]:
    """The names in a list; none for auto."""
    from memnet_fast.errors import InputError

    if text in ("auto", "all"):
        return all_of if text == "all" else ()
    parts = tuple(dict.fromkeys(p.strip() for p in text.split(",")))
    if unknown := [p for p in parts if p not in known]:
        raise InputError(f"unknown {what} '{unknown[0]}'; choose auto, all, {', '.join(known)}")
    return parts


def _show(about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, width=None if is_terminal(sys.stdout) else 120, highlight=False)
    name = about["gpu"]["name"] if about["device"] != "cpu" else about["cpu"]["model"]
    for size in dict.fromkeys(row["size"] for row in rows):
        own = [row for row in rows if row["size"] == size]
        title = f"{size} on {name}, {about['threads']} threads"
        table = Table("", "ms", "ratio", "within", "rounds", "memory timed, MiB", "error / residual", title=shown(title))
        for column in table.columns[1:]:
            column.justify = "right"
        for row in own:
            table.add_row(row["variant"], *_cells(row))
        console.print(table)
    timed = [row for row in rows if "ms" in row]
    if timed:
        console.print(
            f"ratio: time in comparison with {timed[0]['subject']}, more is slower; within: its median (99.5 %); "
            "memory timed: of the process, in which engines of others keep freed pages because that makes them faster."
        )
    if short := sum(not row["enough"] for row in timed):
        console.print(
            f"Not settled: the time was spent before {short} of {len(timed)} ratios were known within 2.5 %; "
            "--seconds N, or a quieter machine"
        )
    busy = [row["others"] for row in timed if row.get("others") is not None]
    if busy and max(busy) > 0.05:
        console.print(f"Other programs used up to {max(busy):.0%} of the CPUs meanwhile.".replace("%", " %"))
    for row in {row["variant"]: row for row in rows}.values():
        if row["status"] == "missing":
            console.print(f"Missing: {row['variant']} ({row['reason']}). {row['install']}", markup=False)
        elif row["status"] != "ok":
            console.print(f"{row['status'].capitalize()}: {row['variant']}: {row['reason']}", markup=False)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    nsr = row["errors"]["nsr"] if "errors" in row else None
    errors = "-" if nsr is None else f"{nsr:.1e}"
    if "ms" not in row:
        return row["status"], "-", "-", "-", "-", errors
    interval = row["ratio_interval"]
    within = "-" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"
    within += "" if row["enough"] else ", not settled"
    memory = row.get("device_peak_mib", row["peak_mib"])
    times = f"{row['ms']:.1f}", f"{row['ratio']:.2f}", within, str(row["rounds"])
    return *times, "-" if memory is None else f"{memory:.0f}", errors
