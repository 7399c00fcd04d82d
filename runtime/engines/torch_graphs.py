"""Calls of some rows at a time as CUDA graphs: one for each bucket of rows, replayed with the rest of it padded.

What the CPU does is the same but for the graphs: the function is called on the rows as they are. No CUDA graph has been
captured yet: tests drive the buckets with a stand-in, and on a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Fn = Callable[..., Tensor]
Capture = Callable[[Fn, dict[str, Tensor], Any], tuple[Callable[[], None], Tensor]]
WARM_UP = 2  # runs before a capture: kernels are compiled and libraries make their handles, which a capture cannot


class GraphedCall:
    """`fn(**inputs)` -> one tensor [rows, ...].

    On a GPU fn is captured once for each bucket when a call first needs it, on rows of padding alone, and from then on
    replayed: it must wait for nothing on the host, take its shapes from its inputs' shapes only, and write nothing
    (keys and values, say) for a row of padding. Static inputs and outputs, and what lies between, belong to the graphs.

    rows: name of each input with one entry per row in its first dimension -> what rows of padding hold. All other
    inputs have one size for good. Tensors may lie on the host (pinned: the copy then waits for nothing) or the device.
    capture: how a graph is made; by default CUDA's on a GPU and none on the CPU, where fn is called directly.
    """

    def __init__(
        self,
        fn: Fn,
        buckets: Sequence[int],
        device: torch.device,
        rows: Mapping[str, float],
        capture: Capture | None = None,
    ) -> None:
        if not buckets or min(buckets) < 1 or not rows:
            raise ValueError(f"buckets {list(buckets)}, inputs by row {sorted(rows)}: expected one or more of each")
        self._fn, self.buckets, self.device, self._rows = fn, tuple(sorted(set(buckets))), device, dict(rows)
        self._capture = capture or (capture_cuda if device.type == "cuda" else None)
        self._pool = torch.cuda.graph_pool_handle() if self._capture is capture_cuda else None
        self._graphs: dict[int, _Graph] = {}

    @property
    def largest(self) -> int:
        """Rows of a call at most."""
        return self.buckets[-1]

    def __call__(self, **inputs: Tensor) -> Tensor:
        """-> [rows, ...] on the device; on a GPU a view of the graph's own output, whole until the next call.

        Raises ValueError for more rows than the largest bucket, none, or as many as another input has not.
        """
        count = self._count(inputs)
        with torch.no_grad():
            if self._capture is None:
                return self._fn(**{name: x.to(self.device) for name, x in inputs.items()})
            bucket = bucket_for(count, self.buckets)
            if bucket not in self._graphs:
                self._graphs[bucket] = self._graph(bucket, inputs, self._capture)
            return self._graphs[bucket].replay(inputs, count)

    def prepare(self, counts: Sequence[int], **inputs: Tensor) -> None:
        """Captures what calls of so many rows will need, the largest first, so that its memory serves all, and waits
        for it. inputs: as of a call, of any rows. Raises ValueError as a call does."""
        self._count(inputs)
        buckets = {bucket_for(count, self.buckets) for count in counts}
        if self._capture is None:
            return
        with torch.no_grad():
            for bucket in sorted(buckets - self._graphs.keys(), reverse=True):
                self._graphs[bucket] = self._graph(bucket, inputs, self._capture)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _count(self, inputs: Mapping[str, Tensor]) -> int:
        counts = {name: inputs[name].shape[0] if name in inputs else 0 for name in self._rows}
        count = max(counts.values())
        if set(counts.values()) != {count} or not 1 <= count <= self.largest:
            raise ValueError(f"rows are {counts}, expected as many of each, from 1 to {self.largest}")
        return count

    def _graph(self, bucket: int, inputs: Mapping[str, Tensor], capture: Capture) -> _Graph:
        static = {}
        for name, x in inputs.items():
            if name in self._rows:
                static[name] = x.new_full((bucket, *x.shape[1:]), self._rows[name], device=self.device)
            else:
                static[name] = x.to(self.device, copy=True)
        return _Graph(static, self._rows, *capture(self._fn, static, self._pool))


class _Graph:
    """One bucket's: its static inputs, what replays it, and its static output."""

    def __init__(
        self, static: dict[str, Tensor], rows: Mapping[str, float], replay: Callable[[], None], output: Tensor
    ) -> None:
        self._static, self._rows, self._replay, self._output = static, rows, replay, output

    def replay(self, inputs: Mapping[str, Tensor], count: int) -> Tensor:
        if set(inputs) != set(self._static):
            raise ValueError(f"inputs are {sorted(inputs)}, expected those of the first call: {sorted(self._static)}")
        for name, x in inputs.items():
            static = self._static[name]
            part = static[:count] if name in self._rows else static
            if x.shape != part.shape or x.dtype != part.dtype:
                raise ValueError(
                    f"{name} is {x.dtype} {list(x.shape)}, expected {part.dtype} {list(part.shape)}, as first given"
                )
            part.copy_(x, non_blocking=True)
            if name in self._rows:
                static[count:].fill_(self._rows[name])
        self._replay()
        return self._output[:count]


def capture_cuda(fn: Fn, static: dict[str, Tensor], pool: Any) -> tuple[Callable[[], None], Tensor]:
    """-> what replays `fn(**static)` as a CUDA graph, and the output that it writes. pool: memory shared with others
    that never run at the same time."""
    device = next(iter(static.values())).device
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                fn(**static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other threads may use the GPU
            output = fn(**static)
    return graph.replay, output


def bucket_for(count: int, buckets: Sequence[int]) -> int:
    """The smallest of `buckets`, which rise, that holds `count` rows. Raises ValueError when none does."""
    fits = next((b for b in buckets if b >= count), None)
    if fits is None or count < 1:
        raise ValueError(f"{count} rows, expected from 1 to {buckets[-1]}")
    return fits


def doubling(largest: int) -> tuple[int, ...]:
    """1, 2, 4, ... and `largest`: at most half of a bucket is padding."""
    if largest < 1:
        raise ValueError(f"{largest} rows at most, expected 1 or more")
    return (*(1 << i for i in range((largest - 1).bit_length())), largest)


class Staging:
    """Host memory that copies to and from a GPU need not wait for: pinned, one block to a name, grown to the largest
    array so far. For the CPU plain memory, allocated anew."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._blocks = device, dict[str, Tensor]()

    def empty(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Not initialised; whole until the next call for this name."""
        if self._device.type != "cuda":
            return torch.empty(tuple(shape), dtype=dtype)
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if name not in self._blocks or self._blocks[name].numel() < nbytes:
            self._blocks[name] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        return self._blocks[name][:nbytes].view(dtype).view(tuple(shape))
