"""The three containers torch.save has used: zip archives, streams of pickles, and tar archives.

Each becomes the object of its main pickle (inert, see pickles.py) and the places of its storages in the file. Nothing is
inflated and nothing extracted.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from typing import Any, NoReturn

from memnet_fast.errors import CheckpointCorrupt, CheckpointMismatch, CheckpointTooLarge, CheckpointUnsafe
from memnet_fast.weights.fitting import MAX_TENSORS, short
from memnet_fast.weights.pickles import MAX_PICKLE, Budget, Global, Machine, Storage, dense_tensor

# Element types by the names of their storages: bytes for each, and NumPy's name where it is a float that is read.
ITEM_SIZES = {
    **{"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1},
    **{"ComplexDouble": 16, "ComplexFloat": 8, "QInt8": 1, "QUInt8": 1, "QInt32": 4, "Untyped": 1},
}
_MAGIC = 0x1950A86A20F9469CFC6C
# Optimiser states and a model beside them have a storage for each tensor.
_MAX_STORAGES = 8 * MAX_TENSORS


@dataclass
class Archive:
    """root: the object; places: begin and end in the file, by storage key; big_endian: of the numbers."""

    data: bytearray
    root: Any = None
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    big_endian: bool = False


def _corrupt(reason: str) -> NoReturn:
    raise CheckpointCorrupt(f"not a sound PyTorch file: {reason}")


def _persistent_storage(saved: Any) -> Storage:
    """("storage", type, key, location, count), and in old files where a view of it lies: (key, first, count)."""
    if type(saved) is not tuple or len(saved) not in (5, 6) or saved[0] != "storage":
        _corrupt("a persistent object that is no storage")
    kind, key, _, count = saved[1:5]
    if type(kind) is not Global or type(key) is not str or type(count) is not int or not 0 <= count < 1 << 48:
        _corrupt("a storage without type, key or size")
    if kind.module.partition(".")[0] != "torch" or not kind.name.endswith("Storage"):
        _corrupt(f"{kind} is no storage")
    storage = Storage(kind.name.removesuffix("Storage"), key, count)
    view = saved[5] if len(saved) == 6 else None
    if view is not None:
        if type(view) is not tuple or len(view) != 3 or not all(type(v) is int and 0 <= v <= count for v in view[1:]):
            _corrupt("a view of a storage that is none")
        storage.first = view[1]
    return storage


# Zip ----------------------------------------------------------------------------------------------------------------------

_END, _END64, _LOCATOR64, _ENTRY, _LOCAL = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x01\x02", b"PK\x03\x04"
_ENTRY_FIELDS = struct.Struct("<4s6H3I5H2I")


@dataclass(frozen=True)
class _Member:
    crc: int
    begin: int
    end: int


def read_zip(data: bytearray) -> Archive:
    """Stored entries only: what is compressed could be of any size, and torch.save compresses nothing.

    Raises CheckpointCorrupt (also for a wrong CRC-32), CheckpointUnsafe, CheckpointTooLarge.
    """
    members = _members(data)
    folders = [n.removesuffix("data.pkl") for n in members if n == "data.pkl" or n.endswith("/data.pkl")]
    if len(folders) != 1 or folders[0].count("/") > 1:
        _corrupt(f"the archive has {len(folders) or 'no'} data.pkl where one is needed")
    folder = folders[0]
    if f"{folder}constants.pkl" in members or any(n.startswith(f"{folder}code/") for n in members):
        raise CheckpointUnsafe("a TorchScript archive holds code to run; store the state_dict() of the network instead")
    checked: set[str] = set()

    def place(name: str) -> tuple[int, int]:
        member = members.get(folder + name)
        if member is None:
            _corrupt(f"the archive has no {name[:200]!r}")
        if name not in checked:
            checked.add(name)
            with memoryview(data) as view:
                if zlib.crc32(view[member.begin : member.end]) != member.crc:
                    _corrupt(f"the CRC-32 of {name[:200]!r} is wrong")
        return member.begin, member.end

    archive = Archive(data)
    if f"{folder}byteorder" in members:
        begin, end = place("byteorder")
        order = bytes(data[begin : min(end, begin + 10)])
        if order not in (b"little", b"big"):
            _corrupt("an unknown byte order")
        archive.big_endian = order == b"big"

    def persistent(saved: Any) -> Storage:
        storage = _persistent_storage(saved)
        if storage.key not in archive.places:
            archive.places[storage.key] = place(f"data/{storage.key}")
        begin, end = archive.places[storage.key]
        if storage.count * ITEM_SIZES.get(storage.type, 1) > end - begin:
            _corrupt(f"storage {short(storage.key)} declares {storage.count} elements and has {end - begin} bytes")
        return storage

    begin, end = place("data.pkl")
    if end - begin > MAX_PICKLE:
        raise CheckpointTooLarge(f"a pickle of {end - begin} bytes, more than {MAX_PICKLE}")
    archive.root = Machine(data[begin:end], 0, persistent, Budget()).run()
    return archive


def _members(data: bytearray) -> dict[str, _Member]:
    at, count = _directory(data)
    if count > _MAX_STORAGES:
        raise CheckpointTooLarge(f"an archive of {count} entries, more than {_MAX_STORAGES}")
    members: dict[str, _Member] = {}
    for _ in range(count):
        if at + _ENTRY_FIELDS.size > len(data):
            _corrupt("its list of entries is cut off")
        fields = _ENTRY_FIELDS.unpack_from(data, at)
        signature, flags, method, crc = fields[0], fields[3], fields[4], fields[7]
        size, inflated, name_length, extra_length, comment_length, local = *fields[8:13], fields[16]
        if signature != _ENTRY:
            _corrupt("its list of entries is damaged")
        at += _ENTRY_FIELDS.size
        name = data[at : at + name_length].decode("utf-8", "replace")
        extra = data[at + name_length : at + name_length + extra_length]
        at += name_length + extra_length + comment_length
        inflated, size, local = _wide(extra, inflated, size, local)
        if flags & 1 or method != 0 or size != inflated:
            _corrupt(f"entry {name[:200]!r} is compressed or encrypted; only stored entries are read")
        begin = _content(data, local)
        if begin + size > len(data):
            _corrupt(f"entry {name[:200]!r} is longer than the file")
        if name in members:
            _corrupt(f"entry {name[:200]!r} appears twice")
        members[name] = _Member(crc, begin, begin + size)
    at = 0
    for member in sorted(members.values(), key=lambda m: (m.begin, m.end)):
        if member.begin < at:
            _corrupt("entries overlap")
        at = member.end
    return members


def _directory(data: bytearray) -> tuple[int, int]:
    """Offset of the list of entries, and how many they are."""
    end = data.rfind(_END, max(0, len(data) - 22 - 0xFFFF))
    if end < 0 or end + 22 > len(data):
        _corrupt("the archive is cut off: it has no list of entries")
    count, at = struct.unpack_from("<10xH4xI", data, end)
    if end >= 20 and data[end - 20 : end - 16] == _LOCATOR64:
        (end64,) = struct.unpack_from("<8xQ", data, end - 20)
        if end64 + 56 > len(data) or data[end64 : end64 + 4] != _END64:
            _corrupt("its list of entries is damaged")
        count, at = struct.unpack_from("<32xQ8xQ", data, end64)
    return at, count


def _wide(extra: bytearray, inflated: int, size: int, local: int) -> tuple[int, int, int]:
    """Sizes and offset, those that are all ones replaced by their 64-bit values."""
    at, values = 0, [inflated, size, local]
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, at)
        if tag == 1:
            inner, where = extra[at + 4 : at + 4 + length], 0
            for i, value in enumerate(values):
                if value == 0xFFFFFFFF and where + 8 <= len(inner):
                    (values[i],) = struct.unpack_from("<Q", inner, where)
                    where += 8
        at += 4 + length
    return values[0], values[1], values[2]


def _content(data: bytearray, local: int) -> int:
    """Where the content of an entry begins, after its local header."""
    if local + 30 > len(data) or data[local : local + 4] != _LOCAL:
        _corrupt("an entry has no header of its own")
    name_length, extra_length = struct.unpack_from("<26xHH", data, local)
    return local + 30 + name_length + extra_length


# Streams of pickles (before PyTorch 1.6) ----------------------------------------------------------------------------------


def _no_persistent(saved: Any) -> NoReturn:
    _corrupt("a storage where none can be")


class _Stream:
    """Pickles and numbers one after the other."""

    def __init__(self, data: bytearray, at: int, end: int, budget: Budget) -> None:
        self.data, self.at, self.end, self.budget = data, at, end, budget

    def pickle(self, persistent: Any = _no_persistent) -> Any:
        machine = Machine(self.data, self.at, persistent, self.budget)
        machine.end = min(machine.end, self.end)
        result = machine.run()
        self.at = machine.at
        return result

    def numbers(self, format: str) -> tuple[int, ...]:
        size = struct.calcsize(format)
        if self.at + size > self.end:
            _corrupt("it ends too early")
        self.at += size
        return struct.unpack_from(format, self.data, self.at - size)

    def content(self, kind: str) -> tuple[int, int]:
        """Begin and end of a storage: its number of elements, then the elements."""
        (count,) = self.numbers("<q")
        size = count * ITEM_SIZES.get(kind, 1)
        if count < 0 or size > self.end - self.at:
            _corrupt(f"a storage of {count} elements, where {self.end - self.at} bytes are left")
        begin = self.at
        self.at += size
        return begin, self.at


def _many(value: Any, what: str) -> Any:
    """value: a number or a list of storages or tensors."""
    count = len(value) if type(value) is list else value
    if type(count) is not int or count < 0:
        _corrupt(f"no list of {what}")
    if count > _MAX_STORAGES:
        raise CheckpointTooLarge(f"{count} {what}, more than {_MAX_STORAGES}")
    return value


def read_legacy(data: bytearray) -> Archive:
    """Raises CheckpointCorrupt, CheckpointMismatch, CheckpointUnsafe, CheckpointTooLarge."""
    stream = _Stream(data, 0, len(data), Budget())
    if stream.pickle() != _MAGIC:
        raise CheckpointMismatch("a pickle, but not one of torch.save")
    if stream.pickle() != 1001:
        _corrupt("an unknown version of the format")
    system = stream.pickle()
    if type(system) is not dict or type(system.get("little_endian")) is not bool:
        _corrupt("no description of the machine that wrote it")
    storages: dict[str, Storage] = {}

    def persistent(saved: Any) -> Any:
        if type(saved) is tuple and len(saved) == 4 and saved[0] == "module":  # a class, and its source text
            return saved[1] if type(saved[1]) is Global else _no_persistent(saved)
        storage = _persistent_storage(saved)
        first = storages.setdefault(storage.key, storage)
        if (first.type, first.count) != (storage.type, storage.count):
            _corrupt(f"storage {short(storage.key)} is described in two ways")
        return storage

    archive = Archive(data, big_endian=not system["little_endian"])
    archive.root = stream.pickle(persistent)
    keys = stream.pickle()
    if type(keys) is not list:
        _corrupt("no list of storages")
    for key in _many(keys, "storages"):
        if type(key) is not str or key not in storages or key in archive.places:
            _corrupt("a storage that no tensor uses, or twice the same")
        begin, end = archive.places[key] = stream.content(storages[key].type)
        if end - begin != storages[key].count * ITEM_SIZES.get(storages[key].type, 1):
            _corrupt(f"storage {short(key)} declares {storages[key].count} elements and has {end - begin} bytes")
    if len(archive.places) != len(storages):
        _corrupt("a storage is missing")
    return archive


# Tar archives (before PyTorch 0.2) ----------------------------------------------------------------------------------------


def read_tar(data: bytearray) -> Archive:
    """Members storages, tensors and pickle. Raises as read_legacy."""
    members, budget = _tar_members(data), Budget()
    archive = Archive(data)
    storages, tensors = _tar_storages(archive, _Stream(data, *members["storages"], budget)), {}
    stream = _Stream(data, *members["tensors"], budget)
    for _ in range(_count(stream, "tensors")):
        entry = stream.pickle()
        if type(entry) is not tuple or len(entry) != 3 or type(entry[0]) is not int:
            _corrupt("a tensor without key and storage")
        dimensions, _ = stream.numbers("<ii")
        if not 0 <= dimensions <= 8:
            _corrupt(f"a tensor of {dimensions} dimensions")
        shape, stride = stream.numbers(f"<{dimensions}q"), stream.numbers(f"<{dimensions}q")
        (offset,) = stream.numbers("<q")
        storage = storages.get(entry[1]) if type(entry[1]) is int else None
        tensors[entry[0]] = dense_tensor(storage, offset, shape, stride)

    def persistent(saved: Any) -> Any:
        if type(saved) is tuple and saved and type(saved[0]) is Global:  # a class, and its source text
            return saved[0]
        key = int(saved) if type(saved) is int or (type(saved) is str and len(saved) <= 20) else -1
        if key not in tensors and key not in storages:
            _corrupt("a tensor that is not in the file")
        return tensors.get(key) or storages[key]

    archive.root = _Stream(data, *members["pickle"], budget).pickle(persistent)
    return archive


def _count(stream: _Stream, what: str) -> int:
    count = _many(stream.pickle(), what)
    if type(count) is not int:
        _corrupt(f"no number of {what}")
    return count


def _tar_storages(archive: Archive, stream: _Stream) -> dict[int, Storage]:
    storages: dict[int, Storage] = {}
    for _ in range(_count(stream, "storages")):
        entry = stream.pickle()
        if type(entry) is not tuple or len(entry) != 3 or type(entry[0]) is not int or type(entry[2]) is not Global:
            _corrupt("a storage without key and type")
        kind = entry[2].name.removesuffix("Storage")
        if kind not in ITEM_SIZES or entry[0] in storages:
            _corrupt("a storage of an unknown type, or twice the same")
        begin, end = archive.places[str(entry[0])] = stream.content(kind)
        storages[entry[0]] = Storage(kind, str(entry[0]), (end - begin) // ITEM_SIZES[kind])
    views = stream.pickle()
    if type(views) is not list:
        _corrupt("no list of views")
    for view in _many(views, "views"):
        if type(view) is not tuple or len(view) != 4 or not all(type(v) is int for v in view) or view[1] not in storages:
            _corrupt("a view of no storage")
        root = storages[view[1]]
        if not 0 <= view[2] <= root.count or not 0 <= view[3] <= root.count - view[2]:
            _corrupt("a view beyond its storage")
        storages[view[0]] = Storage(root.type, root.key, root.count, root.first + view[2])
    return storages


def _tar_members(data: bytearray) -> dict[str, tuple[int, int]]:
    """Begin and end of the three regular files; extended headers (times, owners) are stepped over."""
    members: dict[str, tuple[int, int]] = {}
    at = 0
    for _ in range(1000):
        header = bytes(data[at : at + 512])
        if len(header) < 512 or not any(header):
            break
        try:
            size, total = int(header[124:136].strip(b"\0 "), 8), int(header[148:156].strip(b"\0 "), 8)
        except ValueError:
            _corrupt("a damaged header in the tar archive")
        if size < 0 or total != sum(header[:148]) + 8 * 32 + sum(header[156:]) or at + 512 + size > len(data):
            _corrupt("a damaged header in the tar archive")
        name = header[:100].rstrip(b"\0").decode("utf-8", "replace").removeprefix("./")
        if header[156:157] in (b"0", b"\0") and name in ("storages", "tensors", "pickle"):
            if name in members:
                _corrupt(f"{name} appears twice in the tar archive")
            members[name] = (at + 512, at + 512 + size)
        at += 512 + (size + 511) // 512 * 512
    if len(members) != 3:
        _corrupt("the tar archive lacks storages, tensors or pickle")
    return members
