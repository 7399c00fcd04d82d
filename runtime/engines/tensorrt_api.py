"""TensorRT and TensorRT-RTX behind one door: two modules with the same classes, imported when a target needs one.

What differs: TensorRT-RTX builds ahead of time for GPUs that are not there, takes no plugins, and compiles its kernels
on the user's machine (a runtime cache keeps those); TensorRT builds on the very GPU, with plugins and a timing cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from wsi_rt.runtime.engines.registry import family_of
from wsi_rt.runtime.errors import InputError, MachineError


@dataclass(frozen=True)
class Family:
    """module: to import. package: what pip installs it from. sms: what it builds for without a GPU; none: only on a
    machine with the GPU."""

    name: str
    module: str
    package: str
    sms: tuple[int, ...]

    @property
    def ahead_of_time(self) -> bool:
        return bool(self.sms)


FAMILIES = {
    "tensorrt": Family("tensorrt", "tensorrt", "tensorrt", ()),
    "tensorrt-rtx": Family("tensorrt-rtx", "tensorrt_rtx", "tensorrt-rtx-cu12", (75, 80, 86, 89, 120, 121)),
}
# Attention, KVCacheUpdate and writing an engine as a stream are in both modules from these versions on.
_NEEDED = ("INetworkDefinition.add_attention", "INetworkDefinition.add_kv_cache_update", "IStreamWriter")


def family(target: str) -> Family:
    """Of `tensorrt-rtx` or `tensorrt-rtx-sm89`. Raises InputError for a target of neither module."""
    name = family_of(target)
    if name not in FAMILIES:
        raise InputError(f"target is {target!r}, expected one of: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def load(of: Family) -> Any:
    """The module. Raises MachineError, naming the pip command, when it is not there or too old."""
    try:
        module = import_module(of.module)
    except ImportError as e:  # tensorrt's stub package raises it, too
        raise MachineError(f"{of.name} needs the module {of.module} ({e}): pip install {of.package}") from e
    for path in _NEEDED:
        owner: Any = module
        for name in path.split("."):
            owner = getattr(owner, name, None)
        if owner is None:
            raise MachineError(
                f"{of.module} {module.__version__} has no {path}, expected a newer one: pip install -U {of.package}"
            )
    return module


class Messages:
    """What a module's logger said. TensorRT keeps the first logger that a process gives it, so there is one for each
    module, and a caller collects what is said meanwhile."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []  # severity, text

    def errors(self) -> list[str]:
        return [" ".join(text.split()) for severity, text in self.lines if severity in ("ERROR", "INTERNAL_ERROR")]

    def why(self) -> str:
        """The first error, in one line; what comes after it follows from it."""
        return next(iter(self.errors()), "it does not say why")


@cache
def logger(module: Any) -> Any:
    class Log(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.to: Messages | None = None

        def log(self, severity: Any, text: str) -> None:
            if self.to is not None:
                self.to.lines.append((str(severity).rpartition(".")[2], text))

    return Log()


@contextmanager
def collected(module: Any) -> Iterator[Messages]:
    """The messages of what runs inside."""
    log, messages = logger(module), Messages()
    before, log.to = log.to, messages
    try:
        yield messages
    finally:
        log.to = before
