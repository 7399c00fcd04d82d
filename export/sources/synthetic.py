"""Deterministic synthetic weights: `synthetic:<preset>?seed=N`.

Bits: Philox4x32-10 (Salmon et al., SC'11), counter = block index, key = the first 8 bytes of
SHA-256("<seed>:<tensor name>"). Uniform: u = ((bits >> 8) + 0.5) * 2^-24, value = lo + (hi - lo) * u in
fp32. The ranges below keep activations of order one through the depth and make parity gates bite:
LayerScale about U(0.1, 1), residual branches scaled by depth, and a few outlier channels in every
projection that writes to the residual stream.
"""

from __future__ import annotations

import hashlib
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wsi_rt.export.arch import ComponentConfig, Shapes
from wsi_rt.export.sources.weights import F32, WeightSource
from wsi_rt.runtime.errors import CheckpointError

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_CHUNK_BLOCKS = 1 << 15  # 4 x 64-bit lanes of this many blocks stay in the L2 cache

OUTLIER_EVERY, OUTLIER_AT, OUTLIER_GAIN = 61, 7, 6.0


def philox4x32(start: int, blocks: int, key: tuple[int, int]) -> NDArray[np.uint32]:
    """Blocks `start` ... `start + blocks - 1` of Philox4x32-10 -> [blocks, 4] uint32."""
    index = np.arange(start, start + blocks, dtype=np.uint64)
    c0, c1 = index & _LOW, index >> _SHIFT
    c2, c3 = np.zeros_like(index), np.zeros_like(index)
    for i in range(10):
        k0, k1 = np.uint64((key[0] + i * _W0) & 0xFFFFFFFF), np.uint64((key[1] + i * _W1) & 0xFFFFFFFF)
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniform(seed: int, name: str, size: int, lo: float, hi: float) -> F32:
    """`size` fp32 values of U(lo, hi), fixed by (seed, name)."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
    out = np.empty(-(-size // 4) * 4, np.float32)
    blocks, scale = out.size // 4, np.float32(hi - lo)

    def fill(start: int) -> None:
        n = min(_CHUNK_BLOCKS, blocks - start)
        bits = philox4x32(start, n, key).reshape(-1) >> np.uint32(8)
        u = (bits.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-24)
        out[4 * start : 4 * (start + n)] = np.float32(lo) + scale * u

    starts = range(0, blocks, _CHUNK_BLOCKS)
    if len(starts) < 4:
        for start in starts:
            fill(start)
    else:
        with ThreadPoolExecutor() as pool:  # numpy releases the GIL; the result does not depend on it
            list(pool.map(fill, starts))
    return out[:size]


@dataclass(frozen=True)
class Rule:
    """How one tensor is drawn: U(lo, hi), and whether output channels carry outliers."""

    lo: float
    hi: float
    outliers: bool = False


# Projections that write to the residual stream, in any of the four components.
_RESIDUAL = (
    "attn.proj.weight",
    "mlp.fc2.weight",
    "out_proj.weight",
    "ffn.fc2.weight",
    "o_proj.weight",
    "down_proj.weight",
)


def rule_for(name: str, shape: tuple[int, ...], depth: int) -> Rule:
    """The range of a tensor, from its published name."""
    if name.endswith(".gamma"):
        return Rule(0.1, 1.0)
    if len(shape) == 1:
        return Rule(-0.1, 0.1) if name.endswith(".bias") else Rule(0.7, 1.3)  # biases; norm weights
    if name.endswith(("cls_token", "reg_token", "pos_embed")):
        return Rule(-0.5, 0.5)
    if name.endswith("embed_tokens.weight"):
        return Rule(-1.7, 1.7)
    gain, outliers = 1.0, name.endswith(_RESIDUAL)
    if outliers:
        gain = 1.0 / math.sqrt(2 * depth) * 2.0
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        gain = 1.6  # scores of a few units: attention that is neither flat nor one-hot
    if name == "lm_head.weight":
        gain = 3.0
    a = gain * math.sqrt(3.0 / math.prod(shape[1:]))
    return Rule(-a, a, outliers)


class SyntheticSource(WeightSource):
    """Every tensor of one component configuration, generated when asked for."""

    def __init__(self, config: ComponentConfig, preset: str, seed: int) -> None:
        self.label = f"synthetic:{preset}?seed={seed}"
        self._shapes = config.tensors()
        self._depth = max(getattr(config, "depth", 0), getattr(config, "layers", 0), 1)
        self._seed = seed
        self._id = repr(config)

    def shapes(self) -> Shapes:
        return dict(self._shapes)

    def get(self, name: str) -> F32:
        if name not in self._shapes:
            raise CheckpointError(f"{self.label}: no tensor named {name}")
        shape = self._shapes[name]
        rule = rule_for(name, shape, self._depth)
        x = uniform(self._seed, name, math.prod(shape), rule.lo, rule.hi).reshape(shape)
        if rule.outliers:
            x[OUTLIER_AT::OUTLIER_EVERY] *= np.float32(OUTLIER_GAIN)
        return x

    def digest(self) -> str:
        """Of the recipe, not the bytes: the bytes follow from it (a test pins them per preset)."""
        return hashlib.sha256(f"wsi-rt synthetic 1|{self._seed}|{self._id}".encode()).hexdigest()


def content_digest(sources: list[WeightSource], depth: int | None = None) -> str:
    """SHA-256 over every tensor's name, shape and bytes, in name order; `depth`: of the first so many layers only."""
    h = hashlib.sha256()
    for source in sources:
        for name, shape in sorted(source.shapes().items()):
            layer = re.search(r"(?:blocks|layers)\.(\d+)\.", name)
            if depth is not None and layer and int(layer[1]) >= depth:
                continue
            h.update(f"{name}{list(shape)}".encode())
            h.update(source.get(name).astype("<f4").tobytes())
    return h.hexdigest()
