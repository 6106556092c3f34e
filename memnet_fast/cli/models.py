"""`memnet models`."""

from __future__ import annotations

from typing import Any

import click

from memnet_fast.cli.messages import columns, shown


@click.command()
def models() -> int:
    """Lists the models and what their weights reach."""
    from memnet_fast import weights
    from memnet_fast.config import PRESETS
    from memnet_fast.models import create_model, list_models
    from memnet_fast.reference import MemNet

    files = weights.bundled()
    rows = [("MODEL", "PARAMETERS", "TASK", "PSNR IN DB")]
    for name in list_models():
        if name in files:
            net, task = create_model(name), name.partition(".")[2]
            told = psnr_text(weights.load_info(files[name]).get("psnr"))
        else:
            net = MemNet(PRESETS[name])
            task, told = "-", "no weights: a configuration only"
        rows.append((name, f"{sum(p.numel() for p in net.parameters()):,}", task, shown(told)))
    for line in columns(rows):
        click.echo(line)
    return 0


def psnr_text(psnr: Any) -> str:
    """The table that the author of the weights states: {level: dB}, or {data: {level: dB}}."""
    if not isinstance(psnr, dict) or not psnr:
        return "not stated"
    parts = []
    for key, value in psnr.items():
        if isinstance(value, dict):
            parts.append(f"{key}: {psnr_text(value)}")
        else:
            parts.append(f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}")
    return ("; " if any(isinstance(v, dict) for v in psnr.values()) else ", ").join(parts)
