"""A stand-in for a GPU, since that is what these tests cannot have, and a tile encoder in torch on the CPU.

The stand-in's streams are threads that wait before every operation, so that what may overlap does; and it keeps vector
clocks, so that an access that nothing orders after an earlier one is found whatever the timing was.
"""

from __future__ import annotations

import gc
import queue
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
from torch import Tensor  # noqa: E402

from wsi_rt.kernels.tile_normalize import tile_normalize  # noqa: E402
from wsi_rt.runtime.slides.device.device import STREAMS, DeviceTileEngine, TileDevice  # noqa: E402
from wsi_rt.runtime.slides.device.resample import Resampling, take_tiles  # noqa: E402

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POISON = 0xAB
Clock = dict[str, int]


class StandInEvent:
    def __init__(self, device: StandInDevice, clock: Clock) -> None:
        self._device, self.clock, self.flag = device, clock, threading.Event()

    def done(self) -> bool:
        self._device.called("event.done")
        if self.flag.is_set():
            self._device.host_after(self.clock)
        return self.flag.is_set()

    def wait(self) -> None:
        self.flag.wait()
        self._device.host_after(self.clock)
        self._device.called("event.wait")
        self._device.raise_what_failed()


class StandInDevice(TileDevice):
    """issued: (kind, stream, rows of the batch) as queued. done: indices of `issued` in the order they were done.
    races: accesses that no event orders. `memory`: what is allocated. interrupt(kind, call): called before
    every operation, may raise."""

    name = "stand-in"

    def __init__(self, seed: int = 0, delay_s: float = 0.002) -> None:
        self._random, self._delay_s = random.Random(seed), delay_s
        self._lock = threading.RLock()
        self._clocks: dict[str, Clock] = {actor: {} for actor in ("host", *STREAMS)}
        self._writes: dict[int, Clock] = {}
        self._reads: dict[int, Clock] = {}
        self._queues: dict[str, queue.SimpleQueue] = {name: queue.SimpleQueue() for name in STREAMS}
        self._failed: BaseException | None = None
        self.issued: list[tuple[str, str, int]] = []
        self.done: list[int] = []
        self.races: list[str] = []
        self.memory: dict[int, tuple[str, int]] = {}  # address -> (kind, bytes)
        self.peak = {"device": 0, "pinned": 0}
        self.allocated = 0
        self.calls = 0
        self.interrupt: Callable[[str, int], None] = lambda kind, call: None
        self._threads = [threading.Thread(target=self._work, args=(q,), name="stand-in") for q in self._queues.values()]
        for thread in self._threads:
            thread.start()

    # what a TileDevice is

    def empty(self, shape: Sequence[int], dtype: Any) -> Tensor:
        return self._allocate("device", shape, dtype)

    def empty_pinned(self, shape: Sequence[int], dtype: Any) -> Tensor:
        return self._allocate("pinned", shape, dtype)

    def copy(self, stream: str, source: Tensor, out: Tensor) -> None:
        self._issue("copy", stream, lambda: out.copy_(source), reads=[source], writes=[out])

    def take(self, batch: Any, out: Tensor, how: Resampling | None) -> None:
        squares = torch.from_numpy(np.asarray(batch))  # cuCIM's own memory
        self._issue("take", "decode", lambda: take_tiles(squares, out, how), reads=[], writes=[out])

    def normalise(self, tiles: Tensor, mean: Sequence[float], std: Sequence[float], out: Tensor) -> None:
        def normalise() -> None:
            out.copy_(tile_normalize(tiles, mean, std, out.shape[-1], dtype=out.dtype))

        self._issue("normalise", "encode", normalise, reads=[tiles], writes=[out])

    def encode(self, engine: DeviceTileEngine, batch: Tensor, out: Tensor) -> None:
        with torch.no_grad():
            self._issue("encode", "encode", lambda: out.copy_(engine.run_device(batch)), reads=[batch], writes=[out])

    def record(self, stream: str) -> StandInEvent:
        self.called("record")
        with self._lock:
            self._join(self._clocks[stream], self._clocks["host"])
            event = StandInEvent(self, dict(self._clocks[stream]))
            self._queues[stream].put(event.flag.set)
        return event

    def wait_for(self, stream: str, event: StandInEvent) -> None:
        self.called("wait_for")
        with self._lock:
            self._join(self._clocks[stream], event.clock)
            self._queues[stream].put(event.flag.wait)

    def synchronize(self) -> None:
        for stream in STREAMS:
            with self._lock:
                event = StandInEvent(self, dict(self._clocks[stream]))
                self._queues[stream].put(event.flag.set)
            event.flag.wait()
            self.host_after(event.clock)
        self.called("synchronize")
        self.raise_what_failed()

    def close(self) -> None:
        self.queued = sum(q.qsize() for q in self._queues.values())
        for q in self._queues.values():
            q.put(None)
        for thread in self._threads:
            thread.join()

    # what tests ask

    def called(self, kind: str) -> None:
        with self._lock:
            self.calls += 1
            call = self.calls
        self.interrupt(kind, call)

    def host_access(self, address: int) -> None:
        """The host writes here."""
        with self._lock:
            base = next((a for a, (_, size) in self.memory.items() if a <= address < a + size), None)
            if base is not None:
                self._access("host", "a reading thread's write", [], [base])

    def host_after(self, clock: Clock) -> None:
        with self._lock:
            self._join(self._clocks["host"], clock)

    def raise_what_failed(self) -> None:
        if self._failed is not None:
            raise RuntimeError(f"the device failed: {self._failed}")

    def order(self, kind: str) -> list[int]:
        """Places in `done` of the operations of a kind, as they were issued."""
        at = {index: place for place, index in enumerate(self.done)}
        return [at[index] for index, (what, _, _) in enumerate(self.issued) if what == kind]

    def require_clean(self) -> None:
        """Nothing raced, nothing is allocated, and nothing was queued when it was closed."""
        if self.memory:
            gc.collect()  # slow: only where something is left
        assert self.races == []
        assert self.memory == {}
        assert self.queued == 0
        assert not any(thread.is_alive() for thread in self._threads)

    # how it is made

    def _allocate(self, kind: str, shape: Sequence[int], dtype: Any) -> Tensor:
        self.called("empty")
        size = int(np.prod(shape)) * dtype.itemsize
        memory = np.full(size, POISON, np.uint8)
        address = memory.ctypes.data
        with self._lock:
            self.memory[address] = (kind, size)
            self.allocated += 1
            for name in self.peak:
                self.peak[name] = max(self.peak[name], sum(n for k, n in self.memory.values() if k == name))
            # Memory that is let go may be given to the next: its accesses are then the old ones' successors.
            self._writes.pop(address, None)
            self._reads.pop(address, None)
        weakref.finalize(memory, self.memory.pop, address).atexit = False
        return torch.from_numpy(memory).view(dtype).view(tuple(shape))

    def _issue(
        self, kind: str, stream: str, do: Callable[[], Any], reads: Sequence[Tensor], writes: Sequence[Tensor]
    ) -> None:
        self.called(kind)
        with self._lock:
            self._join(self._clocks[stream], self._clocks["host"])
            self._access(stream, kind, *([x.untyped_storage().data_ptr() for x in xs] for xs in (reads, writes)))
            number, delay_s = len(self.issued), self._random.uniform(0, self._delay_s)
            self.issued.append((kind, stream, len((*writes, *reads)[0])))

            def work() -> None:
                time.sleep(delay_s)
                try:
                    if self._failed is None:
                        do()
                except BaseException as error:
                    self._failed = error
                self.done.append(number)

            self._queues[stream].put(work)

    def _access(self, actor: str, what: str, reads: list[int], writes: list[int]) -> None:
        clock = self._clocks[actor]
        tick = clock[actor] = clock.get(actor, 0) + 1
        for address in (*reads, *writes):
            before = [self._writes.get(address, {})] + ([self._reads.get(address, {})] if address in writes else [])
            for other, at in ((o, t) for past in before for o, t in past.items()):
                if clock.get(other, 0) < at:
                    self.races.append(f"{what} on {actor} is not ordered after access {at} of {other}")
        for past, addresses in ((self._reads, reads), (self._writes, writes)):
            for address in addresses:
                past.setdefault(address, {})[actor] = tick

    @staticmethod
    def _join(clock: Clock, other: Clock) -> None:
        for actor, tick in other.items():
            clock[actor] = max(clock.get(actor, 0), tick)

    @staticmethod
    def _work(work: queue.SimpleQueue) -> None:
        while (do := work.get()) is not None:
            do()
            del do  # it holds memory


class TorchCpuEngine:
    """A tile encoder that takes normalised tiles, [b, 3, px, px] -> [b, C]. Like a CUDA graph it gives its own memory,
    which the next call overwrites. started and ended: when each batch was encoded."""

    precision = "fp32"

    def __init__(self, encode: Callable[[Tensor], Tensor], width: int, dtype: Any = None, image_px: int = 224) -> None:
        config = {"image_px": image_px, "mean": MEAN, "std": STD}
        self.manifest: Any = SimpleNamespace(
            name="tile_encoder", config=config, weights="w", outputs=[SimpleNamespace(dims=("batch", width))]
        )
        self.device, self.dtype = torch.device("cpu"), dtype or torch.float32
        self._encode, self._own = encode, torch.empty(256, width)
        self.prepared: list[int] = []
        self.started: list[float] = []
        self.ended: list[float] = []

    def prepare_device(self, rows: Sequence[int]) -> None:
        self.prepared += rows

    def run_device(self, batch: Tensor) -> Tensor:
        assert batch.dtype == self.dtype
        self.started.append(time.perf_counter())
        self._own.fill_(float("nan"))
        with torch.no_grad():
            self._own[: len(batch)] = self._encode(batch)
        self.ended.append(time.perf_counter())
        return self._own[: len(batch)]


def bands(x: Tensor) -> Tensor:
    """[b, 3, px, px] -> [b, 24]: means of eight bands of rows of each channel, each of its own columns."""
    return (
        x.float()
        .unflatten(2, (8, -1))
        .mean(dim=3)
        .unflatten(3, (8, -1))
        .mean(dim=4)
        .diagonal(dim1=2, dim2=3)
        .flatten(1)
    )


@pytest.fixture
def bands_engine() -> Callable[..., TorchCpuEngine]:
    return lambda **options: TorchCpuEngine(bands, 24, **options)


@pytest.fixture
def stand_in() -> Iterator[Callable[..., StandInDevice]]:
    """stand_in(seed=..., delay_s=...) -> a device; closed at the end at the latest."""
    made: list[StandInDevice] = []

    def make(**options: Any) -> StandInDevice:
        made.append(StandInDevice(**options))
        return made[-1]

    yield make
    for device in made:
        if any(thread.is_alive() for thread in device._threads):
            device.close()
