"""`memnet train`."""

from __future__ import annotations

import logging
import sys

import click

from memnet_fast.cli.messages import State, is_terminal, log_on_stderr


@click.command(short_help="Trains a network by a recipe.")
@click.argument("recipe", metavar="RECIPE")
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--resume", type=click.Choice(["auto"]), help="Go on from the checkpoint in the output folder, if there is one.")
@click.option("--override", is_flag=True, help="Go on although the recipe or the data changed.")
@click.option("--max-minutes", type=float, metavar="N", help="Stop after N minutes, with a checkpoint.")
@click.option("--accelerator", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="What to train on.")
@click.option("--devices", type=click.IntRange(1), default=1, help="How many of them, on each machine.")
@click.option("--nodes", type=click.IntRange(1), default=1, help="How many machines.")
@click.option("--progress", type=click.Choice(["auto", "bar", "none"]), default="auto", help="On stderr; auto: on a terminal.")
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
@click.option("-q", "--quiet", is_flag=True, help="Say errors only.")
@click.pass_context
def train(
    ctx: click.Context,
    recipe: str,
    overrides: tuple[str, ...],
    resume: str | None,
    override: bool,
    max_minutes: float | None,
    accelerator: str,
    devices: int,
    nodes: int,
    progress: str,
    verbose: bool,
    quiet: bool,
) -> int:
    """Trains a network by RECIPE, a TOML file or the name of a bundled one (memnet recipes).

    \b
    memnet train denoise data=images/train validation=images/val
    memnet train my.toml training.lr=2e-4 stages.0.steps=1000 --resume auto --max-minutes 10

    KEY=VALUE replaces a value of the recipe. SIGTERM and Ctrl-C end the training after the step at hand, with a checkpoint;
    --resume auto goes on; on CPUs, stages that end by steps have the same bits as without the interruption. Several devices
    share each batch.
    """
    ctx.ensure_object(State).verbose = verbose
    from memnet_fast.training.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    ctx.with_resource(log_on_stderr(logging.WARNING if quiet else logging.INFO))
    from memnet_fast.training.run import Hardware, train

    bar = progress == "bar" or (progress == "auto" and is_terminal(sys.stderr) and not quiet)
    hardware = Hardware(accelerator, devices, nodes, bar)
    outcome = train(loaded, resume=bool(resume), override=override, max_minutes=max_minutes, hardware=hardware)
    return 128 + outcome.signal if outcome.signal else 0
