"""`memnet doctor`."""

from __future__ import annotations

import json
from typing import Any

import click

from memnet_fast.cli.messages import columns, shown


@click.command(short_help="Says what works on this machine, and why the rest does not.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def doctor(as_json: bool) -> int:
    """Says what works on this machine, and why the rest does not. Exit code 0: images can be restored here; 5: they cannot."""
    from memnet_fast.health import doctor as examine

    report = examine()
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        for line in columns(_rows(report)):
            click.echo(line)
    return 0 if report["restore"]["ok"] else 5


def _rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    cpu, native, restore = report["cpu"], report["native"], report["restore"]
    packages = ", ".join(f"{name} {version or 'missing'}" for name, version in report["packages"].items())
    rows = [
        ("memnet_fast", "", f"{report['memnet_fast']} on Python {report['python']}, {report['platform']}"),
        ("packages", "", packages),
        ("cpu", "", f"{cpu['model']}, {cpu['logical_cores']} logical cores, {cpu['backend_threads']} threads used"),
        _row("native module", native, f"{', '.join(native['isas'])}; bf16: {native['why_no_bf16'] or 'yes'}"),
        _row("cuda", report["cuda"], ", ".join(report["cuda"]["devices"])),
        _row("cuda module", report["native_cuda"], _cuda_module(report["native_cuda"])),
        _row("triton", report["triton"], str(report["triton"]["version"])),
        _row("nvcc", report["nvcc"], str(report["nvcc"]["version"])),
    ]
    for row in report["backends"]:
        detail = f"on {row['device']}: {', '.join(row['precisions'])}"
        rows.append(_row(f"backend {row['backend']}", {"ok": row["can_run"], "reason": row["reason"]}, detail))
    rows += [_row(f"weights {row['name']}", row, f"sha256 {row['sha256']}") for row in report["weights"]]
    if not report["weights"]:
        rows.append(("weights", "no", "none are bundled with this installation"))
    if restore["ok"]:
        how = f"{restore['backend']}, {restore['precision']}, {restore['algorithm']}"
        rows.append(("restoring", "ok", f"{how}; a test image differs from the reference by {restore['difference']:.1e}"))
    else:
        rows.append(("restoring", "no", restore["reason"]))
    return [tuple(shown(cell) for cell in row) for row in rows]


def _cuda_module(part: dict[str, Any]) -> str:
    return f"built by {part['compiler']} for {', '.join(part['archs'])}; the driver supports CUDA {part['driver']}"


def _row(name: str, part: dict[str, Any], detail: str) -> tuple[str, ...]:
    return name, "ok" if part["ok"] else "no", detail if part["ok"] else part["reason"]
