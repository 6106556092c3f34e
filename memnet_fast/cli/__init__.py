"""The command line. Exit codes: 0 done, 2 bad options, 3 some files failed, 4 nothing matched, 5 the asked device or backend
cannot run, 130 interrupted, 143 ended by SIGTERM, 1 an error that nobody foresaw. Results go to stdout, everything said to
people to stderr.

Command modules import nothing but click at their top: `memnet --help` must not wait for torch.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType

import click

from memnet_fast import __version__
from memnet_fast.cli.bench import bench
from memnet_fast.cli.convert import convert
from memnet_fast.cli.demo import demo
from memnet_fast.cli.doctor import doctor
from memnet_fast.cli.eval import evaluate
from memnet_fast.cli.messages import State, say_error
from memnet_fast.cli.models import models
from memnet_fast.cli.profile import profile
from memnet_fast.cli.recipes import recipes
from memnet_fast.cli.restore import deblock, denoise, sr
from memnet_fast.cli.train import train
from memnet_fast.errors import MemNetError

_INTERRUPTED = 130


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True},
)
@click.version_option(__version__, prog_name="memnet")
def memnet() -> None:
    """Restores images with MemNet, fused."""


for _command in (denoise, deblock, sr, evaluate, train, recipes, convert, bench, profile, models, doctor, demo):
    memnet.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and leaves the process with its exit code (SystemExit)."""
    sys.exit(_run(list(sys.argv[1:] if arguments is None else arguments)))


def _run(arguments: list[str]) -> int:
    state = State()
    _end_politely(state)
    try:
        return memnet.main(arguments, prog_name="memnet", standalone_mode=False, obj=state) or 0
    except click.Abort:
        say_error("interrupted")
        return _INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help(), err=True)
        return error.exit_code
    except click.ClickException as error:
        say_error(error.format_message())
        return error.exit_code
    except MemNetError as error:
        _trace(state)
        say_error(str(error))
        return error.exit_code
    except Exception as error:
        _trace(state)
        say_error(f"unexpected {type(error).__name__}: {error}" + (" (-v shows where)" if state.verbose is False else ""))
        return 1


def _trace(state: State) -> None:
    if state.verbose:
        traceback.print_exc()


def _end_politely(state: State) -> None:
    """Signals unwind the stack, so that temporary files are removed."""

    def leave(number: int, frame: FrameType | None) -> None:
        state.ended_by = number
        state.end_if_asked()

    with contextlib.suppress(ValueError):  # not in the main thread: the host decides about signals
        signal.signal(signal.SIGTERM, leave)
        # A shell's background jobs ignore ctrl-C, and that is to stay so.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, leave)
