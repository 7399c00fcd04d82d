"""The process behind `worker.WorkerReader`: opens one slide and answers requests, one line of JSON each.

Started with two descriptors: requests come on stdin, answers go to the stdout it was given; pixels go to
shared memory. It ends when stdin does, also in the middle of a hung read, so that nothing outlives its parent.
"""

from __future__ import annotations

import json
import mmap
import os
import queue
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime import errors
from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.slides.reader import SlideReader

Message = dict[str, Any]


def main(memory_fd: int, limit_bytes: int) -> None:
    """Serve until stdin ends. memory_fd: the shared memory.  limit_bytes: of private memory, for the whole process."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints is no answer
    limit_memory(limit_bytes)
    requests: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(requests,), daemon=True).start()
    reader = _open(requests.get(), answers)
    if reader is None:
        os._exit(0)  # a plain exit would wait for the thread that waits for stdin
    pixels = np.empty(0, np.uint8)
    while True:
        request = requests.get()
        if len(pixels) != request["bytes"]:
            pixels = np.frombuffer(mmap.mmap(memory_fd, request["bytes"]), np.uint8)
        if "associated" in request:
            _answer(answers, _associated(reader, request["associated"], pixels))
        else:
            for answer in _tiles(reader, request, pixels):
                _answer(answers, answer)


def limit_memory(limit_bytes: int) -> None:
    """Private memory of this process, where the system can limit it (Linux; macOS ignores it)."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _receive(requests: queue.SimpleQueue[Message]) -> None:
    for line in sys.stdin.buffer:
        requests.put(json.loads(line))
    os._exit(0)


def _answer(answers: BinaryIO, message: Message) -> None:
    answers.write(json.dumps(message).encode() + b"\n")


def _failure(error: Exception, path: Path) -> Message:
    """A refusal as the parent raises it again: the class by name. Memory is a matter of this slide too."""
    if isinstance(error, MemoryError):
        return {"error": "SlideError", "message": f"{path}: reading it takes more memory than its process may use"}
    return {"error": type(error).__name__, "message": str(error)}


def _open(request: Message, answers: BinaryIO) -> SlideReader | None:
    module, _, name = request["function"].partition(":")
    path = Path(request["path"])
    try:
        reader = getattr(import_module(module), name)(path, SlideSettings(**request["settings"]))
    except (errors.WsiRtError, MemoryError) as error:
        _answer(answers, _failure(error, path))
        return None
    _answer(answers, {"unknown": True} if reader is None else describe(reader))
    return reader  # type: ignore[no-any-return]


def describe(reader: SlideReader) -> Message:
    """What the parent's reader says of itself."""
    return {
        "name": reader.name,
        "levels": [(level.width, level.height, level.downsample) for level in reader.levels],
        "declared_mpp": (reader.declared_mpp.x, reader.declared_mpp.y, reader.declared_mpp.source),
        "notes": reader.notes,
        "background": reader.background,
        "icc": reader.icc,
        "associated": dict(reader.associated),
        "bounds0": reader.bounds0,
        "files": [str(path) for path in reader.files],
    }


def _tiles(reader: SlideReader, request: Message, pixels: NDArray[np.uint8]) -> Any:
    """One answer per tile, as it is there: the parent's clock runs per tile."""
    level, (width, height) = request["level"], request["size"]
    count = width * height * 3
    for row, xy0 in enumerate(request["xy0s"]):
        out = pixels[row * count : (row + 1) * count].reshape(1, height, width, 3)  # [1, h, w, 3]
        try:
            failures = reader.read_tiles(np.array([xy0], np.int64), level, (width, height), out)
        except (errors.WsiRtError, MemoryError) as error:
            yield _failure(error, reader.path)
            continue
        yield _failure(failures[0][1], reader.path) if failures else {"rereads": reader.rereads}


def _associated(reader: SlideReader, name: str, pixels: NDArray[np.uint8]) -> Message:
    try:
        image = reader.read_associated(name)
    except (errors.WsiRtError, MemoryError) as error:
        return _failure(error, reader.path)
    pixels[: image.size] = image.reshape(-1)
    return {"shape": image.shape}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
