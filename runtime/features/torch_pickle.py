"""The pickle inside a torch file, read by a machine that can build tensors and nothing else.

Python's unpickler calls what a file names. This one has no calls to make: a dozen passive opcodes build plain values,
a global is a name compared with a list, and REDUCE recognises three known patterns as data. What is not listed here
is refused by name, so a file with code in it is an error and nothing ever runs.

Format: pickle protocol 2 as `torch.save` writes it (torch/serialization.py, torch/_utils.py `_rebuild_tensor_v2`).
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from wsi_rt.runtime.errors import FeatureFileError

MAX_PICKLE_BYTES = 1 << 20  # one tensor takes about 160 bytes
MAX_OPCODES = 1 << 16  # about 30 per tensor
MAX_DIMS = 8
_INT64 = 1 << 63

# torch storage class -> (numpy dtype code, bytes per element). "bf16" has no numpy dtype.
STORAGES = {
    "DoubleStorage": ("f8", 8),
    "FloatStorage": ("f4", 4),
    "HalfStorage": ("f2", 2),
    "BFloat16Storage": ("bf16", 2),
    "LongStorage": ("i8", 8),
    "IntStorage": ("i4", 4),
    "ShortStorage": ("i2", 2),
    "CharStorage": ("i1", 1),
    "ByteStorage": ("u1", 1),
    "BoolStorage": ("b1", 1),
}
_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = ("torch._utils", "_rebuild_parameter")
_ORDERED_DICT = ("collections", "OrderedDict")
_ALLOWED = {_TENSOR, _PARAMETER, _ORDERED_DICT} | {("torch", name) for name in STORAGES}
# Warning: pickletools warns of odd escapes in protocol 0 strings, which is an exception under `python -W error`.
_MALFORMED = (
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    AttributeError,
    RecursionError,
    MemoryError,
    Warning,
)
RESAVE = "re-save it with `torch.save(tensor.detach().cpu(), path)`"


@dataclass(frozen=True)
class StorageRef:
    """Elements in the archive entry `data/<key>`: `numel` of them, of dtype code `code`."""

    code: str
    itemsize: int
    key: str
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """A view of a storage, in elements: checked to stay inside it."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class _Global:
    module: str
    name: str


@dataclass(frozen=True)
class _Mapping:
    items: dict[Any, Any] = field(default_factory=dict)


def shown(value: object, limit: int = 80) -> str:
    """`value` for an error message: one printable line, shortened before it is formatted (it may be hostile: a
    tuple can hold itself twice, sixty levels deep)."""
    if isinstance(value, (str, bytes)):
        text = ascii(value[:limit])
    elif _is_flat(value):
        text = ascii(value)
    else:
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _is_flat(value: object) -> bool:
    if isinstance(value, tuple):
        return len(value) <= MAX_DIMS and all(isinstance(v, int) for v in value)
    return isinstance(value, (int, float, type(None)))


def _plain(text: str) -> str:
    return shown(text)[1:-1]


def read_tensor_ref(data: bytes, where: str) -> TensorRef:
    """Which view of which storage the pickle `data` describes. `where` names the file in errors.

    Raises: FeatureFileError when it is malformed, larger than the limits above, names anything but the parts of a
    plain tensor, or holds something else than one tensor (a dict is refused with its keys listed).
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise FeatureFileError(
            f"{where}: data.pkl has {len(data)} bytes, expected the pickle of one tensor (at most {MAX_PICKLE_BYTES}); "
            + RESAVE
        )
    value = _Machine(where).run(data)
    if isinstance(value, TensorRef):
        return value
    if isinstance(value, _Mapping):
        keys = list(value.items)
        more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
        raise FeatureFileError(
            f"{where} holds a dict with keys {[_plain(str(k)) for k in keys[:8]]}{more}, expected one tensor: "
            "save the tensor itself with `torch.save(d[key], path)`"
        )
    kind = f"a {type(value).__name__} of {len(value)}" if isinstance(value, (list, tuple)) else shown(value)
    raise FeatureFileError(f"{where} holds {kind}, expected one tensor: {RESAVE}")


class _Machine:
    """A pickle stack machine over passive values. MARK sets the stack aside, so no opcode reaches below its mark."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.steps: dict[str, Callable[[Any], None]] = {
            **dict.fromkeys(("PROTO", "FRAME"), lambda _: None),
            **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), self._push),
            **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"), self._push),
            **dict.fromkeys(("BINPUT", "LONG_BINPUT"), self._put),
            **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda i: self._push(self.memo[i])),
            "MEMOIZE": lambda _: self._put(len(self.memo)),
            "NONE": lambda _: self._push(None),
            "NEWTRUE": lambda _: self._push(True),
            "NEWFALSE": lambda _: self._push(False),
            "MARK": self._mark,
            "EMPTY_TUPLE": lambda _: self._push(()),
            "EMPTY_LIST": lambda _: self._push([]),
            "EMPTY_DICT": lambda _: self._push(_Mapping()),
            "TUPLE": lambda _: self._push(tuple(self._since_mark())),
            "TUPLE1": lambda _: self._push(self._pop(1)),
            "TUPLE2": lambda _: self._push(self._pop(2)),
            "TUPLE3": lambda _: self._push(self._pop(3)),
            "APPEND": lambda _: self._extend(list(self._pop(1))),
            "APPENDS": lambda _: self._extend(self._since_mark()),
            "SETITEM": lambda _: self._update(list(self._pop(2))),
            "SETITEMS": lambda _: self._update(self._since_mark()),
            "GLOBAL": lambda arg: self._global(*arg.split(" ", 1)),
            "STACK_GLOBAL": lambda _: self._global(*self._pop(2)),
            "BINPERSID": lambda _: self._push(self._storage(*self._pop(1))),
            "REDUCE": lambda _: self._push(self._reduce(*self._pop(2))),
            "BUILD": lambda _: self._build(),
        }

    def run(self, data: bytes) -> Any:
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
                if opcode.name == "STOP":
                    return self._pop(1)[0]
                if count >= MAX_OPCODES:
                    self._fail(f"has more than {MAX_OPCODES} opcodes")
                step = self.steps.get(opcode.name)
                if opcode.name == "INST":  # protocol 0's way to name a class
                    self._global(*str(argument).split(" ", 1))
                if step is None:
                    self._fail(f"uses the opcode {opcode.name}, which no plain tensor needs")
                step(argument)
        except _MALFORMED as error:
            raise FeatureFileError(f"{self.where}: its pickle is malformed ({_plain(str(error))}): {RESAVE}") from error
        return self._fail("has no end")

    def _fail(self, what: str) -> NoReturn:
        raise FeatureFileError(f"{self.where}: its pickle {what}; nothing was executed; expected one tensor: {RESAVE}")

    # --- the stack
    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _pop(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) < count:
            raise IndexError("pop from an empty stack")
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        return values

    def _put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def _mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def _since_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.below.pop()
        return values

    def _extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            self._fail("appends to something that is no list")
        self.stack[-1].extend(values)

    def _update(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, _Mapping) or len(pairs) % 2:
            self._fail("sets items of something that is no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, (str, int, float, bytes, type(None))):
                self._fail("has a dict key that is no string or number")
            target.items[key] = value

    # --- the names and patterns of a plain tensor
    def _global(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            self._fail("has a global without a name")
        if (module, name) in _ALLOWED:
            return self._push(_Global(module, name))
        full = _plain(f"{module}.{name}")
        if module.startswith("numpy"):
            what, fix = "a numpy object, not a tensor", "save it with `torch.save(torch.from_numpy(array), path)`"
        elif module.split(".")[0] == "torch":
            what, fix = "something else than a plain tensor", RESAVE
        else:
            what, fix = "code, not only tensors", RESAVE
        raise FeatureFileError(f"{self.where} holds {what}: it asks for {full}; nothing was executed; {fix}")

    def _storage(self, pid: Any) -> StorageRef:
        """('storage', torch.<Type>Storage, key, location, numel); the location (cpu, cuda:0) does not matter here."""
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            self._fail("has a persistent id that is no storage")
        _, kind, key, location, numel = pid
        if not (isinstance(kind, _Global) and kind.module == "torch"):
            self._fail("has a storage of no known type")
        if not (isinstance(key, str) and isinstance(location, str) and _is_size(numel)):
            self._fail(f"has a storage of {shown(numel)} elements under key {shown(key)}")
        code, itemsize = STORAGES[kind.name]
        return StorageRef(code, itemsize, key, numel)

    def _reduce(self, function: Any, args: Any) -> Any:
        if isinstance(function, _Global) and isinstance(args, tuple):
            name = (function.module, function.name)
            if name == _ORDERED_DICT and not args:
                return _Mapping()
            if name == _TENSOR:
                return self._tensor(args)
            if name == _PARAMETER and len(args) == 3 and isinstance(args[0], TensorRef):
                self._check_hooks(*args[1:])
                return args[0]
        return self._fail("calls something that is no plain tensor")

    def _build(self) -> None:
        """A state dict carries `_metadata` this way: dropped, since a dict is refused anyway."""
        target, _ = self._pop(2)
        if not isinstance(target, _Mapping):
            self._fail("sets the state of an object")
        self._push(target)

    def _check_hooks(self, requires_grad: Any, hooks: Any) -> None:
        if not isinstance(requires_grad, bool) or not isinstance(hooks, _Mapping) or hooks.items:
            self._fail("has a tensor with hooks")

    def _tensor(self, args: tuple[Any, ...]) -> TensorRef:
        if len(args) not in (6, 7) or (len(args) == 7 and args[6] not in (None, _Mapping())):
            self._fail(f"rebuilds a tensor from {len(args)} values")
        storage, offset, shape, strides = args[:4]
        self._check_hooks(*args[4:6])
        known = isinstance(storage, StorageRef) and isinstance(shape, tuple) and isinstance(strides, tuple)
        if not known or len(shape) != len(strides) or len(shape) > MAX_DIMS:
            self._fail(f"has a tensor of shape {shown(shape)} and strides {shown(strides)}")
        if not all(_is_size(v) for v in (offset, *shape, *strides)):
            self._fail(f"has a tensor of shape {shown(shape)}, strides {shown(strides)}, offset {shown(offset)}")
        tensor = TensorRef(storage, offset, shape, strides)
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if tensor.numel and last >= storage.numel:
            self._fail(
                f"has a view of shape {shown(shape)}, strides {shown(strides)}, offset {offset} "
                f"outside its storage of {storage.numel} elements"
            )
        return tensor


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _INT64
