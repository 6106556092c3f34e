"""Reading a pickle without running it.

A pickle is a program. Here it runs on a machine that can do nothing: it builds numbers, text, lists, dictionaries and inert
records, and every name of code stays a name. Nothing is imported, nothing is called, no tensor exists; which tensors to read
is decided afterwards, from the records.

What may be named:
- any class of a third-party module or of the file's own program: an object of it becomes an inert record, so that a network
  that was stored whole, or a configuration beside the weights, does no harm and does not hinder;
- of the standard library only the few data types in _DATA, which real checkpoints hold;
- to be called, only the functions in _CALLS, whose results are known without calling them.
Everything else is CheckpointUnsafe: a file that asks for os.system is an attack, even where the request is harmless here.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from memnet_fast.errors import CheckpointCorrupt, CheckpointTooLarge, CheckpointUnsafe
from memnet_fast.weights.fitting import short

# An M10R10 with the states of Adam needs 150,000 steps and a few megabytes; a step costs under a microsecond.
_MAX_STEPS = 400_000
MAX_PICKLE = 16 << 20
_MAX_NAME = 200
_MAX_LINE = 1 << 16
_MAX_DIMENSIONS = 8


class Global:
    """The name of a class or function. It is never looked up."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __str__(self) -> str:
        return short(f"{self.module}.{self.name}")


class Record:
    """An object of which only the description is kept: its class or the function that would make it, and its state."""

    __slots__ = ("kind", "state")

    def __init__(self, kind: str | Global) -> None:
        self.kind = kind
        self.state: Any = None


class Storage:
    """Where numbers lie: element type ("Float", ...), key in the file, count; first: of a view, its first element."""

    __slots__ = ("count", "first", "key", "type")

    def __init__(self, type: str, key: str, count: int, first: int = 0) -> None:
        self.type, self.key, self.count, self.first = type, key, count, first


class TensorRecord:
    """A dense tensor: a part of a storage."""

    __slots__ = ("offset", "shape", "storage", "stride")

    def __init__(self, storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride


class OddTensor:
    """A tensor that is not dense: only its kind is kept."""

    __slots__ = ("kind",)

    def __init__(self, kind: str) -> None:
        self.kind = kind


class Budget:
    """Steps that may still be made in this file."""

    def __init__(self) -> None:
        self.steps = _MAX_STEPS

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise CheckpointTooLarge(f"a pickle of more than {_MAX_STEPS} steps")


def _unsafe(reason: str) -> NoReturn:
    raise CheckpointUnsafe(f"the file {reason}; it may be an attack, and nothing of it was run")


def _corrupt(reason: str) -> NoReturn:
    raise CheckpointCorrupt(f"not a sound pickle: {reason}")


# Names --------------------------------------------------------------------------------------------------------------------

# Python 2 wrote `__builtin__` and `copy_reg`.
_BUILTINS = ("builtins", "__builtin__")
_COPYREG = ("copyreg", "copy_reg")
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")

# Data of the standard library. Objects of these become records.
_DATA = {
    *((m, n) for m in _BUILTINS for n in ("set", "frozenset", "bytearray", "complex", "slice", "range", "object", "bytes")),
    *((m, n) for m in _BUILTINS for n in ("list", "dict", "tuple", "int", "float", "str", "bool", "long", "unicode")),
    *((m, "_reconstructor") for m in _COPYREG),
    ("_codecs", "encode"),
    ("argparse", "Namespace"),
    ("types", "SimpleNamespace"),
    *(("collections", n) for n in ("OrderedDict", "defaultdict", "Counter", "deque")),
    *(("datetime", n) for n in ("datetime", "date", "time", "timedelta", "timezone")),
    *(("pathlib", n) for n in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")),
    *(("pathlib._local", n) for n in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")),
}
# Python 2's own modules; today's sys.stdlib_module_names does not have them.
_OLD_MODULES = frozenset(
    (
        "__builtin__",
        "commands",
        "copy_reg",
        "cPickle",
        "cStringIO",
        "exceptions",
        "imp",
        "popen2",
        "StringIO",
        "urllib2",
        "UserDict",
    )
)
_CODE_MODULES = sys.stdlib_module_names | _OLD_MODULES


def _tensor(args: tuple[Any, ...]) -> TensorRecord:
    return dense_tensor(*args[:4])


def dense_tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> TensorRecord:
    """Raises CheckpointCorrupt for what is no part of a storage by its types and signs."""
    if type(storage) is not Storage or type(shape) is not tuple or type(stride) is not tuple:
        _corrupt("a tensor without a storage, a shape or a stride")
    if len(shape) != len(stride) or len(shape) > _MAX_DIMENSIONS:
        _corrupt(f"a tensor of {len(shape)} dimensions and {len(stride)} strides")
    if not all(type(v) is int and 0 <= v < 1 << 48 for v in (offset, *shape, *stride)):
        _corrupt("a tensor whose offset, shape or stride are no numbers")
    return TensorRecord(storage, offset, shape, stride)


def _parameter(args: tuple[Any, ...]) -> Any:
    if type(args[0]) not in (TensorRecord, OddTensor):
        _corrupt("a parameter without a tensor")
    return args[0]


def _typed_tensor(args: tuple[Any, ...]) -> Any:
    """torch._tensor._rebuild_from_type_v2(function, type, arguments, state), of a tensor with Python attributes."""
    function, kind, inner = args[:3]
    if type(function) is not Global or type(kind) is not Global or type(inner) is not tuple:
        _corrupt("a tensor with attributes that is none")
    if str(function) not in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
        return OddTensor("a subclass")
    return _tensor(inner)


def _size(args: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(args) != 1 or type(args[0]) not in (tuple, list) or len(args[0]) > _MAX_DIMENSIONS:
        _corrupt("a torch.Size that is none")
    return tuple(args[0])


def _odd(kind: str) -> Callable[[tuple[Any, ...]], OddTensor]:
    return lambda args: OddTensor(kind)


def _inert(kind: str) -> Callable[[tuple[Any, ...]], Record]:
    return lambda args: Record(kind)


# Functions that real checkpoints call, and what stands for their results.
_CALLS: dict[tuple[str, str], Callable[[tuple[Any, ...]], Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _typed_tensor,
    ("torch._utils", "_rebuild_sparse_tensor"): _odd("sparse"),
    ("torch._utils", "_rebuild_sparse_csr_tensor"): _odd("sparse"),
    ("torch._utils", "_rebuild_qtensor"): _odd("quantised"),
    ("torch._utils", "_rebuild_nested_tensor"): _odd("nested"),
    ("torch._utils", "_rebuild_tensor_v3"): _odd("of an unusual dtype"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _odd("on the meta device"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _odd("on another device"),
    ("torch._utils", "_rebuild_wrapper_subclass"): _odd("a subclass"),
    ("torch", "Size"): _size,
    ("torch", "device"): _inert("torch.device"),
    ("torch.serialization", "_get_layout"): _inert("torch.layout"),
    # Whole networks of torch 0.4 and older name their backend.
    ("torch.nn.backends.thnn", "_get_thnn_function_backend"): _inert("backend"),
    ("numpy", "dtype"): _inert("numpy.dtype"),
    **{(m, n): _inert(f"numpy.{n}") for m in _MULTIARRAY for n in ("scalar", "_reconstruct", "_frombuffer")},
    **{name: _inert(".".join(name)) for name in _DATA},
}
# Calls that make a dictionary, which later steps fill.
_DICTIONARIES = {("collections", "OrderedDict"), ("collections", "defaultdict"), *((m, "dict") for m in _BUILTINS)}


def _key(key: Any) -> Any:
    """Dictionary keys: text, bytes, small integers, True, False and None. Others stay apart, by identity: their hashes could
    be made to collide, or to take for ever."""
    kind = type(key)
    if kind is str or kind is bytes or key is None or kind is bool or (kind is int and -(1 << 31) <= key < 1 << 31):
        return key
    return Record("key")


class Machine:
    """Runs one pickle in data, from byte `at`. persistent: makes something of a persistent id (a tuple or text)."""

    def __init__(self, data: bytes | bytearray, at: int, persistent: Callable[[Any], Any], budget: Budget) -> None:
        self.data, self.at, self.persistent, self.budget = data, at, persistent, budget
        self.limit = at + MAX_PICKLE
        self.end = min(len(data), self.limit)
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The object; `at` is then the byte after it. Raises CheckpointCorrupt, CheckpointUnsafe, CheckpointTooLarge."""
        try:
            while True:
                self.budget.spend(1)
                op = self.take(1)[0]
                if op == 0x2E:  # STOP
                    return self.stack.pop()
                step = _STEPS.get(op)
                if step is None:
                    _corrupt(f"unknown step {op:#04x} at byte {self.at - 1}")
                step(self)
        except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
            # An empty stack, a number missing in the memo, text that is no UTF-8: always the file's fault.
            raise CheckpointCorrupt(f"not a sound pickle, at byte {self.at}") from error

    # Bytes ----------------------------------------------------------------------------------------------------------------

    def take(self, count: int) -> bytes | bytearray:
        start = self.at
        if not 0 <= count <= self.end - start:
            if self.end == self.limit:
                raise CheckpointTooLarge(f"a pickle of more than {MAX_PICKLE} bytes")
            _corrupt("it ends too early")
        self.at = start + count
        return self.data[start : self.at]

    def number(self, format: str) -> int:
        return struct.unpack(format, self.take(struct.calcsize(format)))[0]

    def line(self) -> bytes:
        stop = self.data.find(b"\n", self.at, min(self.end, self.at + _MAX_LINE))
        if stop < 0:
            _corrupt(f"a line at byte {self.at} does not end")
        return bytes(self.take(stop + 1 - self.at)[:-1])

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        self.budget.spend(len(items))
        return items

    # Steps ----------------------------------------------------------------------------------------------------------------

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def text_number(self) -> None:
        line = self.line()
        self.push(line == b"01" if line in (b"00", b"01") else int(line.rstrip(b"L")))

    def long(self, count: int) -> None:
        self.push(int.from_bytes(self.take(count), "little", signed=True))

    def old_text(self, data: bytes | bytearray) -> None:
        """Python 2's str: names of tensors, or bytes."""
        try:
            self.push(data.decode())
        except UnicodeDecodeError:
            self.push(bytes(data))

    def old_line(self) -> None:
        self.old_text(self.line().strip()[1:-1])

    def text(self, count: int) -> None:
        self.push(self.take(count).decode("utf-8", "surrogatepass"))

    def store(self, index: int) -> None:
        if not 0 <= index < 1 << 32:
            _corrupt(f"memo number {index}")
        self.memo[index] = self.stack[-1]

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif type(target) is not Record:
            _unsafe(f"appends to a {type(target).__name__}")

    def set_items(self, target: Any, items: list[Any]) -> None:
        if len(items) % 2:
            _corrupt("a key without a value")
        if type(target) is dict:
            for i in range(0, len(items), 2):
                target[_key(items[i])] = items[i + 1]
        elif type(target) is not Record:
            _unsafe(f"sets items of a {type(target).__name__}")

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items(self.stack[-1], [key, value])

    def set_marked_items(self) -> None:
        items = self.pop_mark()
        self.set_items(self.stack[-1], items)

    def dictionary(self, items: list[Any]) -> None:
        made: dict[Any, Any] = {}
        self.set_items(made, items)
        self.push(made)

    def set_made(self) -> None:
        self.pop_mark()
        self.push(Record("set"))

    def global_name(self, module: Any, name: Any) -> None:
        if (
            type(module) is not str
            or type(name) is not str
            or not 0 < len(module) <= _MAX_NAME
            or not 0 < len(name) <= _MAX_NAME
        ):
            _corrupt("a name that is none")
        known = (module, name) in _DATA or (module, name) in _CALLS
        if "." in name or (not known and module.partition(".")[0] in _CODE_MODULES):
            _unsafe(f"names {short(f'{module}.{name}')}")
        self.push(Global(module, name))

    def call(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.push(self.result(function, args))

    def result(self, function: Any, args: Any) -> Any:
        if type(function) is not Global:
            _unsafe(f"calls a {type(function).__name__}")
        if type(args) is not tuple:
            _corrupt("arguments that are none")
        name = (function.module, function.name)
        if name in _DICTIONARIES:
            return self.filled(args)
        if name not in _CALLS:
            _unsafe(f"calls {function}")
        return _CALLS[name](args)

    def filled(self, args: tuple[Any, ...]) -> dict[Any, Any]:
        """OrderedDict([[key, value], ...]), as Python 2 stored it."""
        made: dict[Any, Any] = {}
        pairs = args[-1] if args and type(args[-1]) is list else []
        self.budget.spend(len(pairs))
        for key, value in pairs:
            made[_key(key)] = value
        return made

    def make(self, kind: Any) -> None:
        """An object of a class: a record, whatever the class and its arguments."""
        if type(kind) is not Global:
            _unsafe(f"makes an object of a {type(kind).__name__}")
        self.push({} if (kind.module, kind.name) in _DICTIONARIES else Record(kind))

    def new_object(self) -> None:
        self.stack.pop()
        self.make(self.stack.pop())

    def new_object_with_keywords(self) -> None:
        self.stack.pop()
        self.new_object()

    def instance(self, kind: Any, args: list[Any]) -> None:
        """Python 2's objects of old classes; with arguments it is a call."""
        if args:
            self.push(self.result(kind, tuple(args)))
        else:
            self.make(kind)

    def old_instance(self) -> None:
        self.global_name(self.line().decode(), self.line().decode())
        kind = self.stack.pop()
        self.instance(kind, self.pop_mark())

    def object(self) -> None:
        kind, *args = self.pop_mark()
        self.instance(kind, args)

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Record:
            target.state = state
        elif type(target) is not dict:  # of a dictionary these are attributes beside the items (`_metadata`): not needed
            _unsafe(f"sets the state of a {type(target).__name__}")

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.global_name(module, name)

    def replace(self, count: int) -> None:
        """The last `count` values become a tuple."""
        if count > len(self.stack):
            _corrupt("a tuple of missing values")
        made = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.push(made)

    def by_registry(self) -> None:
        _unsafe("names code by a number of copyreg's registry")

    def out_of_band(self) -> None:
        _corrupt("it asks for buffers that are not in the file")


_STEPS: dict[int, Callable[[Machine], Any]] = {
    0x80: lambda m: m.take(1),  # PROTO: the steps themselves tell what is needed
    0x95: lambda m: m.take(8),  # FRAME
    ord("("): Machine.mark,
    ord("0"): Machine.pop,
    ord("1"): lambda m: m.pop_mark(),
    ord("2"): lambda m: m.push(m.stack[-1]),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("I"): Machine.text_number,
    ord("L"): Machine.text_number,
    ord("J"): lambda m: m.push(m.number("<i")),
    ord("K"): lambda m: m.push(m.number("<B")),
    ord("M"): lambda m: m.push(m.number("<H")),
    0x8A: lambda m: m.long(m.number("<B")),
    0x8B: lambda m: m.long(m.number("<i")),
    ord("F"): lambda m: m.push(float(m.line())),
    ord("G"): lambda m: m.push(m.number(">d")),
    ord("S"): Machine.old_line,
    ord("T"): lambda m: m.old_text(m.take(m.number("<i"))),
    ord("U"): lambda m: m.old_text(m.take(m.number("<B"))),
    ord("B"): lambda m: m.push(bytes(m.take(m.number("<I")))),
    ord("C"): lambda m: m.push(bytes(m.take(m.number("<B")))),
    0x8E: lambda m: m.push(bytes(m.take(m.number("<Q")))),
    0x96: lambda m: m.push(bytes(m.take(m.number("<Q")))),
    ord("V"): lambda m: m.push(m.line().decode("raw-unicode-escape")),
    ord("X"): lambda m: m.text(m.number("<I")),
    0x8C: lambda m: m.text(m.number("<B")),
    0x8D: lambda m: m.text(m.number("<Q")),
    ord("]"): lambda m: m.push([]),
    ord("l"): lambda m: m.push(m.pop_mark()),
    ord("a"): lambda m: m.extend([m.stack.pop()]),
    ord("e"): lambda m: m.extend(m.pop_mark()),
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: m.push(tuple(m.pop_mark())),
    0x85: lambda m: m.replace(1),
    0x86: lambda m: m.replace(2),
    0x87: lambda m: m.replace(3),
    ord("}"): lambda m: m.push({}),
    ord("d"): lambda m: m.dictionary(m.pop_mark()),
    ord("s"): Machine.set_item,
    ord("u"): Machine.set_marked_items,
    0x8F: lambda m: m.push(Record("set")),
    0x90: lambda m: m.extend(m.pop_mark()),
    0x91: Machine.set_made,
    ord("c"): lambda m: m.global_name(m.line().decode(), m.line().decode()),
    0x93: Machine.stack_global,
    ord("R"): Machine.call,
    ord("b"): Machine.build,
    ord("i"): Machine.old_instance,
    ord("o"): Machine.object,
    0x81: Machine.new_object,
    0x92: Machine.new_object_with_keywords,
    ord("P"): lambda m: m.push(m.persistent(m.line().decode())),
    ord("Q"): lambda m: m.push(m.persistent(m.stack.pop())),
    0x82: Machine.by_registry,
    0x83: Machine.by_registry,
    0x84: Machine.by_registry,
    0x97: Machine.out_of_band,
    0x98: Machine.out_of_band,
    ord("p"): lambda m: m.store(int(m.line())),
    ord("q"): lambda m: m.store(m.number("<B")),
    ord("r"): lambda m: m.store(m.number("<I")),
    0x94: lambda m: m.store(len(m.memo)),
    ord("g"): lambda m: m.push(m.memo[int(m.line())]),
    ord("h"): lambda m: m.push(m.memo[m.number("<B")]),
    ord("j"): lambda m: m.push(m.memo[m.number("<I")]),
}
