"""The slide encoder's states before pooling, which its engine does not give out: from the bundle's portable graph.

Norm, pooling and padding come after these states, so they can be varied without another run of the encoder.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.engines.ort import open_session, plain_failure
from wsi_rt.runtime.types import POOLED_TOKENS

F32 = NDArray[np.float32]
# Values of the portable graph, by the exporter's deterministic names: states [N + 1, C] (CLS first), norm [C].
STATES, WEIGHT, BIAS = "/layer_norm/LayerNormalization:0", "norm.weight", "norm.bias"


@dataclass(frozen=True)
class Norm:
    """The checkpoint's norm: weight and bias [C] f32, epsilon."""

    weight: F32
    bias: F32
    eps: float


class SlideStates:
    """The portable slide encoder (fp32) in a session of its own. Always on the CPU, whatever the bundle's target."""

    def __init__(self, bundle: Bundle) -> None:
        """Raises InputError (no slide encoder), EngineMismatchError (its graph lacks the names above)."""
        manifest = bundle.component("slide_encoder")
        graph = bundle.root / manifest.portable["model"]
        self.width, self.padded = int(manifest.config["width"]), int(manifest.config["padded"])
        self.norm_width = int(manifest.config["norm_width"])
        with bundle.unreplaced(), tempfile.TemporaryDirectory() as folder:
            asking = Path(folder) / "model.onnx"
            asking.write_bytes(graph.read_bytes() + _graph_outputs(STATES, WEIGHT, BIAS))
            self._session = open_session(asking, graph.parent, bundle.threads)
        one = np.zeros((1, int(manifest.config["in_width"])), np.float32)
        weight, bias = self._run([WEIGHT, BIAS], one, np.zeros((1, 2), np.int64))
        self.norm = Norm(weight, bias, float(manifest.config["pool_eps"]))

    def run(self, features: F32, positions: NDArray[np.int64]) -> F32:
        """features [N, D], positions [N, 2] (col, row) -> states [N + 1, C], CLS first."""
        return self._run([STATES], features, positions)[0]

    def _run(self, names: list[str], features: F32, positions: NDArray[np.int64]) -> list[F32]:
        with plain_failure("slide_encoder"):
            feeds = {"features": np.ascontiguousarray(features), "positions": np.ascontiguousarray(positions)}
            return self._session.run(names, feeds)


def _graph_outputs(*names: str) -> bytes:
    """A ModelProto that holds nothing but these graph outputs. Appended to a model it adds them: protobuf merges
    messages that stand one after the other (https://protobuf.dev/programming-guides/encoding/#last-one-wins)."""
    return b"".join(_field(7, _field(12, _field(1, n.encode()))) for n in names)  # graph, output, name


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited protobuf field of at most 127 bytes: one byte says the length."""
    return bytes([number << 3 | 2, len(data)]) + data


def bin_edges(tiles: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Adaptive pooling's bins: first tile and first tile after, both [576] int64 (SPEC 3)."""
    i = np.arange(POOLED_TOKENS, dtype=np.int64)
    return i * tiles // POOLED_TOKENS, -(-(i + 1) * tiles // POOLED_TOKENS)


def pool(states: F32) -> NDArray[np.float64]:
    """[N, C] -> [576, C]: averages of adaptive bins. In float64, a running sum loses nothing that shows in float32."""
    start, end = bin_edges(len(states))
    sums = np.concatenate([np.zeros((1, states.shape[1])), np.cumsum(states, axis=0, dtype=np.float64)])
    return (sums[end] - sums[start]) / (end - start)[:, None]


def standardise(x: NDArray[np.float64], eps: float) -> NDArray[np.float64]:
    """LayerNorm without weight and bias, over the last axis."""
    return (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + eps)
