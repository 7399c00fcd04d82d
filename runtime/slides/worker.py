"""A reader in a process of its own, for libraries that can take their process down with them.

A damaged slide may crash a C library, keep it busy for ever or make it ask for all memory. Here that
ends a worker, and the caller gets a SlideError naming the slide. One worker per thread that reads at
the same time, each with its own handle; pixels come through shared memory.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime import errors
from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.errors import MachineError, SlideError
from wsi_rt.runtime.slides.reader import DeclaredMpp, Level, SlideReader

SECONDS = 30.0  # that one tile, or opening, may take; OpenSlide needs milliseconds, a cold network disk a second
MEMORY_BYTES = 2 << 30  # private memory of a worker; OpenSlide reading 4 Mpx blocks takes 0.3 GB
CHUNK_BYTES = 64 << 20  # shared memory asked for at once, unless one region is larger
MAX_DEATHS = 20  # workers that one slide may cost: a start takes about 0.3 s


class WorkerDied(Exception):  # noqa: N818 (not an error of the caller: becomes a SlideError with the place)
    """The worker is gone, or was ended because it hung. str(): how."""


def open_in_worker(function: str, path: Path, settings: SlideSettings) -> WorkerReader | None:
    """Open `path` with "module:function" (path, settings -> SlideReader | None) in a worker.

    None where the function gives None. Raises what it raises (SlideError, MachineError), and SlideError
    where the worker dies of it.
    """
    request = {"function": function, "path": str(path), "settings": _as_json(settings)}
    worker = Worker(request)
    try:
        facts = worker.receive_facts()
        _raise_failure(facts)
        if "unknown" in facts:
            worker.close()
            return None
        return WorkerReader(path, settings, worker, request, facts)
    except WorkerDied as death:
        worker.close()
        raise SlideError(f"{path}: cannot be opened ({death}), expected an intact slide; download it again") from death
    except BaseException:
        worker.close()
        raise


def _as_json(settings: SlideSettings) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in settings.to_json().items()}


def _raise_failure(answer: Mapping[str, Any]) -> None:
    if "error" in answer:
        raise getattr(errors, answer["error"], SlideError)(answer["message"])


class Worker:
    """One process with one open slide. Used by one thread at a time."""

    def __init__(self, opening: Mapping[str, Any]) -> None:
        """Start it and send the request to open; `receive` gives its answer. Raises MachineError."""
        self._memory_fd = _shared_memory()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self.pixels: NDArray[np.uint8] = np.empty(0, np.uint8)
        # -P: nothing from the current folder, where a copy.py beside a user's slides would run instead of Python's
        command = [sys.executable, "-P", "-m", f"{__name__}_main", str(self._memory_fd), str(MEMORY_BYTES)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, bufsize=0,
                pass_fds=(self._memory_fd,), env={**os.environ, "OMP_NUM_THREADS": "1"},
                process_group=0,  # Ctrl-C is for the parent, who closes stdin
            )  # fmt: skip
        except OSError as error:
            os.close(self._memory_fd)
            self._stderr.close()
            raise MachineError(f"no process for a slide reader can be started ({error.strerror})") from error
        self._buffer = b""
        self.opened = False
        self.rereads = 0
        self.send(opening)

    def receive_facts(self) -> dict[str, Any]:
        """The answer to the request to open. Raises WorkerDied."""
        facts = self.receive()
        self.opened = True
        return facts

    def request(self, message: Mapping[str, Any], size: int) -> None:
        """Send a request whose pixels take `size` bytes of `pixels`."""
        if size > len(self.pixels):
            os.ftruncate(self._memory_fd, size)
            self.pixels = np.frombuffer(mmap.mmap(self._memory_fd, size), np.uint8)
        self.send({**message, "bytes": len(self.pixels)})

    def send(self, message: Mapping[str, Any]) -> None:
        """Raises WorkerDied."""
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")  # type: ignore[union-attr]
        except OSError:
            raise WorkerDied(self._death()) from None

    def receive(self) -> dict[str, Any]:
        """The next answer. Raises WorkerDied when there is none within SECONDS."""
        deadline = time.monotonic() + SECONDS
        stdout = self._process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise WorkerDied(f"its reader hung for {SECONDS:g} s")
                data = os.read(stdout.fileno(), 1 << 16)  # type: ignore[union-attr]
                if not data:
                    raise WorkerDied(self._death())
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return dict(json.loads(line))

    def _death(self) -> str:
        code = self._process.wait(SECONDS)
        self._stderr.seek(0)
        said = self._stderr.read()[-2000:].decode(errors="replace").split("\n")
        last = " ".join(next((line for line in reversed(said) if line.strip()), "").split())[:150]
        how = f"crashed with {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"its reader {how}{': ' if last else ''}{last}"

    def close(self) -> None:
        """End it, at once if it is busy. Twice is harmless."""
        process = self._process
        if process.stdin is None or process.stdin.closed:
            return
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        self._stderr.close()
        os.close(self._memory_fd)
        self.pixels = np.empty(0, np.uint8)


def _shared_memory() -> int:
    """A descriptor of memory that two processes can map: a file that only Linux keeps off the disk for sure."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("wsi-rt-pixels")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class WorkerReader(SlideReader):
    """The reader of a slide that a worker has open; everything it says and paints is what that reader does.

    Each thread that reads while others do costs a worker more (about 40 MB and the reader's own cache).
    A region at which a worker dies or hangs is a SlideError, not tried again; the next one gets a new worker.
    """

    def __init__(
        self,
        path: Path,
        settings: SlideSettings,
        worker: Worker,
        opening: Mapping[str, Any],
        facts: Mapping[str, Any],
    ) -> None:
        super().__init__(
            path,
            settings,
            name=facts["name"],
            levels=tuple(Level(*level) for level in facts["levels"]),
            declared_mpp=DeclaredMpp(*facts["declared_mpp"]),
            background=_tuple(facts["background"]),
            icc=facts["icc"],
            associated={name: (w, h) for name, (w, h) in facts["associated"].items()},
            bounds0=_tuple(facts["bounds0"]),
            files=tuple(Path(file) for file in facts["files"]),
        )
        self.notes = tuple(facts["notes"])
        self._opening = opening
        self._idle = [worker]
        self._deaths = 0

    def _read(self, xy0: tuple[int, int], level: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        out = np.empty((1, size[1], size[0], 3), np.uint8)  # [1, h, w, 3]
        for _, error in self._read_tiles(np.array([xy0], np.int64), level, size, out):
            raise error
        return out[0]

    def _read_tiles(
        self, xy0s: NDArray[np.int64], level: int, size: tuple[int, int], out: NDArray[np.uint8]
    ) -> list[tuple[int, SlideError]]:
        failures: list[tuple[int, SlideError]] = []
        most = max(1, CHUNK_BYTES // (size[0] * size[1] * 3))
        first = 0
        while first < len(xy0s):
            chunk = slice(first, first + most)
            done, errors_by_row = self._read_chunk(xy0s[chunk], level, size, out[chunk])
            for row, error in errors_by_row:
                out[first + row] = 255
                failures.append((first + row, error))
            first += done
        return failures

    def _read_chunk(
        self, xy0s: NDArray[np.int64], level: int, size: tuple[int, int], out: NDArray[np.uint8]
    ) -> tuple[int, list[tuple[int, SlideError]]]:
        """(rows done, failures): all of them, or up to the one that the worker died of."""
        failures: list[tuple[int, SlideError]] = []
        done = 0
        try:
            with self._worker() as worker:
                request = {"level": level, "size": size, "xy0s": xy0s.tolist()}
                worker.request(request, out.nbytes)
                for row in range(len(xy0s)):
                    answer = worker.receive()
                    if "error" in answer:
                        failures.append((row, SlideError(answer["message"])))
                    else:
                        out[row] = worker.pixels[row * out[0].nbytes : (row + 1) * out[0].nbytes].reshape(out[0].shape)
                        self._note_rereads(worker, answer["rereads"])
                    done += 1
        except WorkerDied as death:
            place = f"{size[0]} x {size[1]} px at level {level}, level-0 position {tuple(xy0s[done].tolist())}"
            failures.append((done, self._lost(death, place)))
            done += 1
        return done, failures

    def _note_rereads(self, worker: Worker, rereads: int) -> None:
        with self._lock:
            self.rereads += rereads - worker.rereads
        worker.rereads = rereads

    def _read_associated(self, name: str) -> NDArray[np.uint8]:
        width, height = self.associated[name]
        try:
            with self._worker() as worker:
                worker.request({"associated": name}, width * height * 3)
                answer = worker.receive()
                _raise_failure(answer)
                shape = answer["shape"]
                return worker.pixels[: shape[0] * shape[1] * 3].reshape(shape).copy()
        except WorkerDied as death:
            raise self._lost(death, f"its {name} image") from death

    def _lost(self, death: WorkerDied, place: str) -> SlideError:
        with self._lock:
            self._deaths += 1
        return SlideError(f"{self.path}: {place} cannot be read ({death}), expected an intact slide; download it again")

    @contextlib.contextmanager
    def _worker(self) -> Iterator[Worker]:
        """An idle worker, else a new one. Whatever interrupts its work ends it: answers would still be on their way."""
        with self._lock:
            worker = self._idle.pop() if self._idle else None
            if worker is None and self._deaths >= MAX_DEATHS:
                raise WorkerDied(f"{self._deaths} readers died of this slide before")
        if worker is None:
            worker = Worker(self._opening)
        try:
            if not worker.opened:
                _raise_failure(worker.receive_facts())
            yield worker
        except SlideError:
            self._put_back(worker)
            raise
        except BaseException:
            worker.close()
            raise
        self._put_back(worker)

    def _put_back(self, worker: Worker) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(worker)
                return
        worker.close()

    def _close(self) -> None:
        while self._idle:
            self._idle.pop().close()


def _tuple(values: Any) -> Any:
    return None if values is None else tuple(values)
