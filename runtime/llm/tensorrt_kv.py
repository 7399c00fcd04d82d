"""Keys and values of the TensorRT decoder: a slot for each sequence, in tensors that the engine updates in place.

A batch of an engine is consecutive slots of one tensor per layer and part, [slots, kv_heads, capacity, D], so a
sequence's slot is as long as the context, and a slide's prefix is copied into every slot that begins with it (320 MB of
a 7 B model's 611 tokens; the torch decoder, whose kernels read a prefix in place, shares it instead).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wsi_rt.runtime.engines.tensorrt_device import Buffer, Device, from_half, to_half
from wsi_rt.runtime.llm.decoder import F32, KV, PrefixKV

_ITEM = 2  # bytes of float16 and bfloat16


@dataclass(frozen=True)
class CacheShape:
    """dtype: "float16" or "bfloat16". capacity: tokens of a slot."""

    layers: int
    kv_heads: int
    capacity: int
    head_width: int
    dtype: str

    @property
    def head_bytes(self) -> int:
        """Of one head of a slot."""
        return self.capacity * self.token_bytes

    @property
    def token_bytes(self) -> int:
        """Of one token of one head."""
        return self.head_width * _ITEM

    @property
    def slot_bytes(self) -> int:
        """Of one layer's keys, or values."""
        return self.kv_heads * self.head_bytes

    @property
    def parts(self) -> int:
        """Tensors: keys and values of every layer."""
        return 2 * self.layers

    def tokens_bytes(self, tokens: int) -> int:
        """Of so many tokens in all layers."""
        return self.parts * self.kv_heads * tokens * self.token_bytes


class Slots:
    """The tensors, in the order layer 0 keys, layer 0 values, layer 1 keys, ... They are made for one sequence, and
    grow by doubling: one tensor after the other is copied to a larger one."""

    def __init__(self, device: Device, shape: CacheShape) -> None:
        self.device, self.shape = device, shape
        self.count = 0
        self._tensors: list[Buffer] = []
        self._held: dict[int, weakref.ref[TensorRtKV]] = {}

    def take(self, kv: TensorRtKV) -> int:
        """The lowest free slot, so that those in use lie close together."""
        slot = next((i for i in range(self.count) if i not in self._held), self.count)
        if slot == self.count:
            self._grow(max(1, 2 * self.count))
        self._held[slot] = weakref.ref(kv)
        return slot

    def give(self, slot: int) -> None:
        self._held.pop(slot, None)

    def holder(self, slot: int) -> TensorRtKV | None:
        found = self._held.get(slot)
        return found() if found is not None else None

    def pointer(self, part: int, slot: int) -> int:
        return self._tensors[part].pointer + slot * self.shape.slot_bytes

    def load(self, slot: int, prefix: TensorRtPrefix) -> None:
        """A prefix to the beginning of a slot."""
        s, row = self.shape, prefix.length * self.shape.token_bytes
        for part in range(s.parts):
            self.device.copy_rows(self.pointer(part, slot), s.head_bytes, prefix.pointer(part), row, row, s.kv_heads)

    def save(self, slot: int, length: int) -> TensorRtPrefix:
        """The beginning of a slot as a prefix."""
        s, prefix = self.shape, TensorRtPrefix(self.device, self.shape, length)
        row = length * s.token_bytes
        for part in range(s.parts):
            self.device.copy_rows(prefix.pointer(part), row, self.pointer(part, slot), s.head_bytes, row, s.kv_heads)
        return prefix

    def close(self) -> None:
        for tensor in self._tensors:
            tensor.free()
        self._tensors.clear()
        self._held.clear()
        self.count = 0

    def _grow(self, count: int) -> None:
        nbytes = count * self.shape.slot_bytes
        for part in range(self.shape.parts):
            larger = self.device.alloc(nbytes)
            self.device.clear(larger.pointer, nbytes)  # a hidden key's weight is 0, and 0 times garbage may be NaN
            if part < len(self._tensors):
                held = self._tensors[part]
                self.device.copy(larger.pointer, held.pointer, held.nbytes)
                self.device.wait()
                held.free()
                self._tensors[part] = larger
            else:
                self._tensors.append(larger)
        self.count = count


class TensorRtPrefix(PrefixKV):
    """On the device, [layers, 2, kv_heads, length, D]."""

    def __init__(self, device: Device, shape: CacheShape, length: int) -> None:
        self.length, self._device, self._shape = length, device, shape
        self._memory = device.alloc(shape.tokens_bytes(length))

    @classmethod
    def of(cls, device: Device, shape: CacheShape, layers: Sequence[F32]) -> TensorRtPrefix:
        """layers: f32 [2, length, kv_heads, D] each."""
        prefix = cls(device, shape, layers[0].shape[1])
        for i, layer in enumerate(layers):
            bits = to_half(np.asarray(layer).transpose(0, 2, 1, 3), shape.dtype)
            device.write(prefix.pointer(2 * i), bits)
        return prefix

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def pointer(self, part: int) -> int:
        return self._memory.pointer + part * self.nbytes // self._shape.parts

    def layers(self) -> Sequence[F32]:
        s = self._shape
        bits = np.empty((s.layers, 2, s.kv_heads, self.length, s.head_width), np.uint16)
        self._device.read(bits, self.pointer(0))
        self._device.wait()
        return [np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in from_half(bits, s.dtype)]


class TensorRtKV(KV):
    """A slot, given back with the object; its prefix is copied to its beginning."""

    def __init__(self, slots: Slots, capacity: int, prefix: TensorRtPrefix | None = None) -> None:
        self.prefix, self.capacity = prefix, capacity
        self.length = self.shared
        self._shape = slots.shape
        self.slot = slots.take(self)
        weakref.finalize(self, slots.give, self.slot)
        if prefix is not None:
            slots.load(self.slot, prefix)

    @property
    def nbytes(self) -> int:
        return self._shape.tokens_bytes(self.length - self.shared)
