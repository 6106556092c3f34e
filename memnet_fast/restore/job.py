"""What a job reads and where it writes. Everything that can be said beforehand is said before the first file is touched."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from memnet_fast.errors import InputError
from memnet_fast.files import require_writable
from memnet_fast.restore.images import EXTENSIONS
from memnet_fast.restore.journal import read_lines
from memnet_fast.restore.uris import is_uri, masked

if TYPE_CHECKING:
    from memnet_fast.restore.storage import Storage

EXISTING = ("error", "skip", "overwrite")
FORMATS = {"png": (".png", "PNG"), "jpg": (".jpg", "JPEG"), "webp": (".webp", "WEBP"), "tiff": (".tiff", "TIFF")}


@dataclass(frozen=True)
class Item:
    """One image: where it comes from and where it goes. format: a value of EXTENSIONS, or None for that of the source."""

    source: Path
    target: Path
    format: str | None


@dataclass(frozen=True)
class Job:
    """ignored: what stood in folders and globs and is not restored, and why.

    folder: the one that all outputs stand in, if a journal is to be kept there. alone: no other run may write into it.
    source_storage, target_storage: where the paths are, if they are not those of this machine.
    """

    items: list[Item]
    ignored: list[tuple[Path, str]]
    compare: Path | None = None
    existing: str = "error"
    folder: Path | None = None
    alone: bool = True
    source_storage: Storage | None = None
    target_storage: Storage | None = None


@dataclass
class _Found:
    """Files with the part of their path that a mirrored tree keeps. recorded: folders met -> the outputs in their journals."""

    files: list[tuple[Path, Path]] = field(default_factory=list)
    ignored: list[tuple[Path, str]] = field(default_factory=list)
    recorded: dict[Path, Set[str]] = field(default_factory=dict)

    def take(self, path: Path, relative: Path, root: Path) -> None:
        reason = _why_ignored(path, root)
        if reason is None and self._is_output(root, Path(os.path.normpath(relative))):
            reason = "an output of an earlier run"
        if reason is None:
            self.files.append((path, relative))
        else:
            self.ignored.append((path, reason))

    def _is_output(self, root: Path, relative: Path) -> bool:
        """Whether a journal in a folder below the root lists this file. Who names a folder itself wants what is in it."""
        for place in relative.parents:
            folder = root / place
            if place == Path():
                return False
            if folder not in self.recorded:
                self.recorded[folder] = read_lines(folder).keys()
            if str(relative.relative_to(place)) in self.recorded[folder]:
                return True
        return False


@contextlib.contextmanager
def _looking() -> Iterator[None]:
    """An error of the file system while it is asked what there is -> InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot look at {error.filename}: {error.strerror or error}") from error


@_looking()
def plan_job(
    inputs: Sequence[str],
    output: str,
    *,
    recursive: bool = False,
    format: str = "same",
    existing: str = "error",
    compare: str | None = None,
    log: str | None = None,
) -> Job:
    """Finds the files and names their outputs; writes nothing.

    inputs: files, folders and globs. In folders and globs only files with an image's extension are taken; hidden files and
    links that lead outside are not. output: a file for one input file (a folder if it exists as one or ends with a separator),
    otherwise a folder, in which the tree of a folder (with `recursive`) or of a glob is mirrored.
    format: "same" (by the extension of the output's name, which is the input's) or a key of FORMATS.
    existing: "error", "overwrite", or "skip": keep what an earlier run wrote for the same input, with the same weights and
    options. A journal is kept in the output folder; for a single file only with "skip".
    compare, log: further files that the job will write, held to the same rules.
    What the journals in the folders below one that is searched list as outputs of earlier runs is never taken as input.
    Raises InputError for a URI and an empty path, and if an input does not exist, a path cannot be looked at, two inputs have
    one output, an output is the file of another input, is its own input (unless "overwrite"), or, with "error", exists already;
    OutputError if the output of a single image cannot be written. (With several, that costs only the images it concerns.)
    """
    if format != "same" and format not in FORMATS:
        raise InputError(f"unknown format '{format}'; choose from same, {', '.join(FORMATS)}")
    if existing not in EXISTING:
        raise InputError(f"unknown choice '{existing}' for existing files; choose from {', '.join(EXISTING)}")
    if not all(inputs):
        raise InputError("an input is an empty path")
    if not output:
        raise InputError("the output is an empty path")
    if uris := [masked(text) for text in (*inputs, output) if is_uri(text)]:
        raise InputError(f"{uris[0]} is a URI; those need --engine ray")
    as_file = len(inputs) == 1 and os.path.lexists(inputs[0]) and not os.path.isdir(inputs[0])
    to_folder = not as_file or os.path.isdir(output) or output.endswith((os.sep, os.altsep or os.sep))
    if to_folder and os.path.exists(Path(output)) and not os.path.isdir(output):
        why = f"the {os.sep} at its end asks for" if as_file else "several inputs, a folder or a glob need"
        raise InputError(f"{Path(output)} is a file, but {why} a folder")
    if existing == "skip" and not to_folder and Path(output).suffix.lower() not in EXTENSIONS:
        # The journal would not know the format of what is there.
        raise InputError(f"with --existing skip the name {output} must tell its format; add an extension")
    found = _find(inputs, recursive, Path(output) if to_folder else None)
    items = []
    for source, relative in found.files:
        if to_folder:
            items.append(named(source, Path(output) / relative, format))
        else:
            items.append(_named_exactly(source, Path(output), format))
    if compare is not None and len(items) > 1:
        raise InputError(f"a comparison strip shows one image, but there are {len(items)} inputs")
    if compare is not None and Path(compare).suffix.lower() not in EXTENSIONS:
        raise InputError(f"the strip {compare} needs the extension of an image format, such as .png")
    folder = Path(output) if to_folder else Path(output).parent
    kept = folder if existing == "skip" or not as_file else None
    job = Job(items, found.ignored, None if compare is None else Path(compare), existing, kept, not as_file)
    _check_targets(job, existing, [Path(text) for text in (compare, log) if text is not None])
    if len(items) == 1:  # a large one takes long, and all of that would be lost
        for path in (items[0].target, job.compare):
            if path is not None:
                require_writable(path, makes_folders=True)
    return job


def _find(inputs: Sequence[str], recursive: bool, output: Path | None) -> _Found:
    found = _Found()
    skip = None if output is None else Path(os.path.realpath(output))
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            _find_in_folder(path, recursive, skip, found)
        elif os.path.lexists(text):
            found.files.append((path, Path(path.name)))
        elif glob.has_magic(text):
            _find_by_glob(text, skip, found)
        else:
            raise InputError(f"there is no file or folder {text}")
    # The same file may be named twice, by a folder and by a glob.
    unique = {(_key(path), relative): (path, relative) for path, relative in found.files}
    found.files = list(unique.values())
    return found


def _find_in_folder(folder: Path, recursive: bool, skip: Path | None, found: _Found) -> None:
    for place, names, files in os.walk(folder, onerror=_raise_unreadable):
        here = Path(place)
        real = Path(os.path.realpath(here))
        if skip is not None and here != folder and real == skip:
            found.ignored.append((here, "the output folder"))
            names.clear()
            continue
        for name in sorted(files):
            found.take(here / name, (here / name).relative_to(folder), folder)
        if not recursive:
            found.ignored += [(here / name, "a folder; -r takes those too") for name in sorted(names)]
            break
        found.ignored += [(here / name, "a link to a folder") for name in sorted(names) if (here / name).is_symlink()]
        found.ignored += [(here / name, "a hidden folder") for name in sorted(names) if name.startswith(".")]
        names[:] = sorted(name for name in names if not name.startswith("."))


def _find_by_glob(pattern: str, skip: Path | None, found: _Found) -> None:
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:fixed])
    for text in sorted(glob.glob(pattern, recursive=True)):
        path = Path(text)
        if path.is_dir():
            continue
        if skip is not None and skip != Path(os.path.realpath(root)) and skip in Path(os.path.realpath(path)).parents:
            found.ignored.append((path, "in the output folder"))
        elif os.path.realpath(path.parent) != os.path.normpath(
            os.path.join(os.path.realpath(root), path.parent.relative_to(root))
        ):
            found.ignored.append((path, "below a link to a folder"))
        else:
            found.take(path, path.relative_to(root), root)


def _raise_unreadable(error: OSError) -> None:
    raise InputError(f"cannot list the folder {error.filename}: {error.strerror}") from error


def _why_ignored(path: Path, root: Path) -> str | None:
    if path.name.startswith("."):
        return "a hidden file"
    if path.suffix.lower() not in EXTENSIONS:
        return "not an image by its name"
    if path.is_symlink():
        if not path.exists():
            return "a broken link"
        if Path(os.path.realpath(root)) not in Path(os.path.realpath(path)).parents:
            return "a link that leads outside"
    return None if path.is_file() else "not a file"


def named(source: Path, target: Path, format: str) -> Item:
    """target: with the extension of the source, which a format other than "same" replaces."""
    if format == "same":
        return Item(source, target, EXTENSIONS.get(target.suffix.lower()))
    suffix, name = FORMATS[format]
    if EXTENSIONS.get(target.suffix.lower()) == name:
        return Item(source, target, name)
    stem = target.stem if target.suffix.lower() in EXTENSIONS else target.name
    return Item(source, target.with_name(stem + suffix), name)


def _named_exactly(source: Path, target: Path, format: str) -> Item:
    by_name = EXTENSIONS.get(target.suffix.lower())
    if format == "same":
        if by_name is None:
            raise InputError(f"{target} has no known image extension; add one, name a format, or end it with {os.sep}")
        return Item(source, target, by_name)
    if by_name not in (None, FORMATS[format][1]):
        raise InputError(f"the extension of {target} contradicts the format {format}")
    return Item(source, target, FORMATS[format][1])


def _key(path: Path) -> str:
    """Equal for two names of one place; the place need not exist. A link at the end stands for itself."""
    return os.path.normcase(os.path.join(os.path.realpath(path.parent), path.name))


def _check_targets(job: Job, existing: str, others: Sequence[Path]) -> None:
    sources = {os.path.normcase(os.path.realpath(item.source)): item for item in job.items}
    seen: dict[str, Item] = {}
    for item in job.items:
        key = _key(item.target)
        if key in seen:
            raise InputError(f"{seen[key].source} and {item.source} would both be written to {item.target}")
        seen[key] = item
        owner = sources.get(key)
        if owner is not None and owner is not item:
            raise InputError(f"the output of {item.source} would replace another input, {item.target}")
        if owner is item and existing != "overwrite":
            raise InputError(f"the output {item.target} is the input itself; --existing overwrite replaces it")
        if item.target.is_dir():
            raise InputError(f"the output {item.target} is a folder")
    if len({_key(path) for path in others}) < len(others):
        raise InputError(f"two outputs would be written to {others[0]}")
    for path in others:
        if _key(path) in seen or _key(path) in sources:
            raise InputError(f"{path} would replace an input or another output")
        if path.is_dir():
            raise InputError(f"the output {path} is a folder")
    if existing == "error":
        old = [path for path in (*(item.target for item in job.items), *others) if os.path.lexists(path)]
        if old:
            more = f" (and {len(old) - 1} more outputs)" if len(old) > 1 else ""
            raise InputError(f"{old[0]}{more} exists already; --existing overwrite replaces it")
