"""Loads the compiled module ``memnet_fast._native``, or says why it is not there."""

import json
from functools import cache
from pathlib import Path
from types import ModuleType

# torch comes first: its wheel brings libgomp.so.1, and the native module must find that one already loaded. Two OpenMP
# runtimes in a process would each start their own threads.
import torch  # noqa: F401

_BUILD_INFO = Path(__file__).with_name("_build_info.json")


@cache
def _load() -> tuple[ModuleType | None, ImportError | None]:
    try:
        from . import _native  # type: ignore[attr-defined, unused-ignore]
    except ImportError as error:
        # A signal that meets the import is reported by pybind11 as a failed one; kept as such, it would switch the module off
        # for the rest of the process.
        if isinstance(error.__cause__, KeyboardInterrupt | SystemExit):
            raise error.__cause__ from None
        return None, error
    return _native, None


def build_info() -> dict[str, object]:
    """What the build left behind: ``native`` (bool), ``reason``, ``log``, ``version``. Empty when nothing was built."""
    try:
        return json.loads(_BUILD_INFO.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def why_missing() -> str | None:
    """None when the native module is loaded, otherwise one sentence with the original reason."""
    _, error = _load()
    if error is None:
        return None
    info = build_info()
    if info.get("native") is False:
        return f"the native module was not built: {info.get('reason')}"
    if not info:
        return f"the native module was not built or installed ({error})"
    return f"the native module cannot be loaded: {error}"


def module() -> ModuleType:
    """The native module. Raises ImportError with the original reason when it is missing."""
    loaded, error = _load()
    if loaded is None:
        raise ImportError(why_missing()) from error
    return loaded
