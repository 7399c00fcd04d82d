"""Keys and values of the torch decoder: pages of one pool, handed out and taken back by number.

The pool is one block of memory for as long as its decoder is open, sized when it opens and never moved: CUDA graphs
hold its addresses. On the CPU that is address space; memory is taken as pages are first written. A sequence and a slide
prefix each hold whole pages of their own, so the last one is partly empty; whoever shares a prefix names its pages and
copies nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsi_rt.runtime.errors import MachineError, WsiRtError
from wsi_rt.runtime.llm.decoder import F32, KV, PrefixKV

PAGE = 16  # tokens


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE)


class FreePages:
    """Which pages nobody holds. Those given back last are taken first: on the CPU their memory is there already."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._untouched, self._returned = 0, list[int]()  # pages from `_untouched` on were never taken

    @property
    def held(self) -> int:
        """Pages that someone holds."""
        return self._untouched - len(self._returned)

    def take(self, count: int) -> list[int]:
        """The caller has made sure that there are as many (PagePool.reserve)."""
        again = [self._returned.pop() for _ in range(min(count, len(self._returned)))]
        fresh = range(self._untouched, self._untouched + count - len(again))
        self._untouched = fresh.stop
        return [*again, *fresh]

    def give_back(self, numbers: Sequence[int]) -> None:
        self._returned.extend(numbers)


class PagePool:
    """`count` pages of keys and values: per layer two tensors [count, PAGE, kv_heads, head_width] of one block.

    Flat slot `page * PAGE + offset` is a token's place in them, the same in every layer.
    """

    def __init__(
        self, layers: int, kv_heads: int, head_width: int, count: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Raises MachineError when there is no such memory."""
        self.layers, self.kv_heads, self.head_width, self.free = layers, kv_heads, head_width, FreePages(count)
        self.bytes_per_token = 2 * layers * kv_heads * head_width * dtype.itemsize
        try:
            self._pages: Tensor | None = torch.empty(
                (layers, 2, count, PAGE, kv_heads, head_width), dtype=dtype, device=device
            )
        except RuntimeError as e:  # torch.OutOfMemoryError on a GPU, its base class on the CPU
            raise MachineError(
                f"no memory for {count} pages of keys and values ({count * PAGE * self.bytes_per_token} bytes on "
                f"{device}); free some, or use a machine with more"
            ) from e

    def layer(self, i: int) -> tuple[Tensor, Tensor]:
        """Keys and values of layer i, [pages, PAGE, kv_heads, head_width] each."""
        if self._pages is None:
            raise WsiRtError("this decoder is closed, and with it its keys and values")
        return self._pages[i, 0], self._pages[i, 1]

    def rows(self, i: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of layer i at `slots` [S] int64 -> [S, kv_heads, head_width] each, copied."""
        k, v = (x.flatten(0, 1)[slots] for x in self.layer(i))
        return k, v

    def write(self, i: int, slots: Tensor, both: Tensor) -> None:
        """both: [2, S, kv_heads, head_width], keys and values for `slots` of layer i, in any type and place."""
        for whole, part in zip(self.layer(i), both, strict=True):
            whole.flatten(0, 1)[slots] = part.to(whole.device, whole.dtype)

    def reserve(self, wanted: Sequence[tuple[Pages, int]]) -> None:
        """Pages for so many tokens each, all or none. Raises MachineError when there are too few."""
        missing = [pages_for(tokens) - len(pages.numbers) for pages, tokens in wanted]
        short = sum(max(n, 0) for n in missing) - (self.free.count - self.free.held)
        if short > 0:
            raise MachineError(
                f"{short} pages too few for keys and values: {self.free.held} of {self.free.count} ({PAGE} tokens, "
                f"{PAGE * self.bytes_per_token} bytes each) are held; ask less at a time, or set a lower --kv-bytes"
            )
        for (pages, _), n in zip(wanted, missing, strict=True):
            pages.numbers.extend(self.free.take(max(n, 0)))

    @property
    def device(self) -> torch.device:
        return self.layer(0)[0].device

    def close(self) -> None:
        """Its memory goes, whoever still holds pages of it."""
        self._pages = None


class Pages:
    """The pages of one KV or prefix in the order of its tokens; they go back when nobody refers to it any more."""

    def __init__(self, pool: PagePool) -> None:
        self.pool, self.numbers = pool, list[int]()
        weakref.finalize(self, pool.free.give_back, self.numbers).atexit = False

    def cut(self, tokens: int) -> None:
        """Give back what so many tokens do not need."""
        keep = pages_for(tokens)
        self.pool.free.give_back(self.numbers[keep:])
        del self.numbers[keep:]

    def slots(self, start: int, stop: int) -> NDArray[np.int64]:
        """Flat slots of its tokens start to stop."""
        at = np.arange(start, stop)
        return np.array(self.numbers, np.int64)[at // PAGE] * PAGE + at % PAGE


class TorchPrefix(PrefixKV):
    """The first `length` tokens in `pages`."""

    def __init__(self, pages: Pages, length: int) -> None:
        self.pages, self.length = pages, length

    @classmethod
    def of(cls, pool: PagePool, layers: Sequence[F32]) -> TorchPrefix:
        """Copied into pages, layer by layer; arrays may be read-only. Raises MachineError when there are too few."""
        found = cls(Pages(pool), layers[0].shape[1])
        pool.reserve([(found.pages, found.length)])
        slots = torch.from_numpy(found.pages.slots(0, found.length)).to(pool.device)
        for i, layer in enumerate(layers):
            pool.write(i, slots, torch.tensor(layer))
        return found

    @property
    def nbytes(self) -> int:
        return self.length * self.pages.pool.bytes_per_token

    def layers(self) -> Sequence[F32]:
        """Copied out of the pages, from a GPU to the host, fp16 and bf16 widened."""
        pool = self.pages.pool
        slots = torch.from_numpy(self.pages.slots(0, self.length)).to(pool.device)
        return [torch.stack(pool.rows(i, slots)).float().cpu().numpy() for i in range(pool.layers)]


class TorchKV(KV):
    """Its own tokens, those after the prefix, are in `pages`."""

    prefix: TorchPrefix | None

    def __init__(self, pool: PagePool, capacity: int, prefix: TorchPrefix | None = None) -> None:
        self.prefix, self.capacity, self.pages = prefix, capacity, Pages(pool)
        self.length = self.shared

    @property
    def own_length(self) -> int:
        return self.length - self.shared

    @property
    def nbytes(self) -> int:
        return self.own_length * self.pages.pool.bytes_per_token

    def rewind(self, length: int) -> None:
        super().rewind(length)
        self.pages.cut(self.own_length)

    def hand_over(self) -> TorchPrefix:
        """Its tokens to be shared: the pages go over, and nothing fits it any more."""
        prefix = TorchPrefix(self.pages, self.length)
        self.pages = Pages(prefix.pages.pool)
        self.length = self.capacity = 0
        return prefix


Groups = list[tuple[TorchPrefix | None, list[int]]]


def by_prefix(kvs: Sequence[TorchKV]) -> Groups:
    """Each prefix, or none, and which of `kvs` have it."""
    found: dict[int, tuple[TorchPrefix | None, list[int]]] = {}
    for i, kv in enumerate(kvs):
        found.setdefault(id(kv.prefix), (kv.prefix, []))[1].append(i)
    return list(found.values())
