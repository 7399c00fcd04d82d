"""Times on a GPU. Needs torch."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Twice the largest last-level cache of the shipped architectures (B200: 126 MB): a run finds none of its data there,
# as a layer of the model does not.
FLUSHED_BYTES = 256 * 2**20
WARM_UP = 5  # compiles, fills the allocator's cache and makes the tables


def cuda_seconds(function: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls between two events on the current stream, the L2 cache flushed before each.

    The flush hides launches that take the host less than it takes itself (80 us at 3,350 GB/s, 34 us at 8,000); an
    operator that waits for the GPU, or a slower host, shows in the figures. What launches many kernels is timed with
    the gaps between them, as it runs.
    """
    flush = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(WARM_UP):
        function()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        flush.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]
