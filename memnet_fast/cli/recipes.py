"""`memnet recipes`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from memnet_fast.cli.messages import say, shown
from memnet_fast.errors import InputError


@click.group(invoke_without_command=True, short_help="Lists and copies the bundled training recipes.")
@click.pass_context
def recipes(ctx: click.Context) -> int:
    """The recipes that `memnet train` knows by name: `ls` lists them, `cp` copies one to be changed."""
    return ctx.invoke(ls) if ctx.invoked_subcommand is None else 0


@recipes.command("ls")
def ls() -> int:
    """Names and first lines."""
    from memnet_fast.training.recipe import bundled

    for name, path in bundled().items():
        click.echo(f"{name:16}{path.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}")
    return 0


@recipes.command("cp")
@click.argument("name")
@click.argument("target", required=False, type=click.Path(path_type=Path))
def cp(name: str, target: Path | None) -> int:
    """Copies the recipe NAME to TARGET (NAME.toml here). An existing file is not replaced."""
    from memnet_fast.files import write_whole
    from memnet_fast.training.recipe import bundled

    found = bundled()
    if name not in found:
        raise InputError(f"there is no recipe '{name}'; choose from {', '.join(found)}")
    target = target or Path(f"{name}.toml")
    target = target / f"{name}.toml" if os.path.isdir(target) else target
    if os.path.lexists(target):
        raise InputError(f"{target} exists already")
    write_whole(target, found[name].read_bytes())
    say(f"wrote {shown(target)}")
    return 0
