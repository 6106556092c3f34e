"""Loads the compiled module ``memnet_fast._native``, or says why it is not there."""

import importlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType

# torch comes first: its wheel brings libgomp.so.1, and the native module must find that one already loaded. Two OpenMP
# runtimes in a process would each start their own threads.
import torch  # noqa: F401

_BUILD_INFO = Path(__file__).with_name("_build_info.json")


def load(name: str) -> tuple[ModuleType | None, ImportError | None]:
    """A compiled module by its full name, or the error of its import."""
    try:
        return importlib.import_module(name), None
    except ImportError as error:
        # A signal that meets the import is reported by pybind11 as a failed one; kept as such, it would switch the module off
        # for the rest of the process.
        if isinstance(error.__cause__, KeyboardInterrupt | SystemExit):
            raise error.__cause__ from None
        return None, error


@cache
def _load() -> tuple[ModuleType | None, ImportError | None]:
    return load(f"{__package__}._native")


def build_info() -> dict[str, object]:
    """What the build left behind: ``native`` (bool), ``reason``, ``log``, ``version``. Empty when nothing was built."""
    try:
        return json.loads(_BUILD_INFO.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def why_missing() -> str | None:
    """None when the native module is loaded, otherwise one sentence with the original reason."""
    return explain("the native module", _load()[1], build_info())


def explain(what: str, error: ImportError | None, info: Mapping[str, object]) -> str | None:
    """Why a compiled module is not there, by the error of its import and what its build left behind; None without an error."""
    if error is None:
        return None
    if info.get("native") is False:
        return f"{what} was not built: {info.get('reason')}"
    if not info:
        return f"{what} was not built or installed ({error})"
    return f"{what} cannot be loaded: {error}"


def module() -> ModuleType:
    """The native module. Raises ImportError with the original reason when it is missing."""
    loaded, error = _load()
    if loaded is None:
        raise ImportError(why_missing()) from error
    return loaded
