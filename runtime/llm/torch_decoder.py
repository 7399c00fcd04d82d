"""The decoder in plain torch, in fp32 on the CPU: the base of a GPU target.

It reads the weights of the bundle's portable graphs, whatever target that was built for. Every operation is a torch
one on tensors of the sizes of a call; fixed sizes, graphs and fused kernels belong to a GPU target and are not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsi_rt.runtime.errors import InputError, WsiRtError
from wsi_rt.runtime.llm.decoder import F32, KV, Chunk, Decoder, DecoderSpec, PrefixKV
from wsi_rt.runtime.llm.torch_kv import TorchKV, TorchPrefix, attend, join
from wsi_rt.runtime.llm.torch_weights import StoredTensors
from wsi_rt.runtime.manifest import Compiled, EngineManifest


class TorchDecoder(Decoder):
    """Rows of a call share the linear layers, so torch's order of summation depends on how many there are: a token's
    logits are the same to rounding only."""

    def __init__(self, manifest: EngineManifest, tensors: StoredTensors) -> None:
        c = manifest.config
        self._config = c
        self._model: TorchLlama | None = TorchLlama(c, tensors)
        self.spec = DecoderSpec(
            vocab_size=c["vocab"],
            hidden_size=c["hidden"],
            context_length=c["context"],
            kv_bytes_per_token=2 * 4 * c["layers"] * c["kv_heads"] * c["head_width"],
            row_exact=False,
        )

    @classmethod
    def open(
        cls, root: Path, manifest: EngineManifest, compiled: Compiled | None, threads: int, fast: bool = False
    ) -> TorchDecoder:
        """compiled: not read, the portable graphs are. Raises InputError for `fast`, MachineError without onnx, which
        reads them, and EngineMismatchError when they lack a tensor. Sets torch's threads for the whole process."""
        if fast:
            raise InputError("the torch decoder has no --fast, expected to be opened without")
        torch.set_num_threads(threads)
        return cls(manifest, StoredTensors(root / path for path in manifest.portable.values()))

    def close(self) -> None:
        self._model = None

    def new_kv(self, capacity: int, prefix: PrefixKV | None = None) -> TorchKV:
        self._require_capacity(capacity, prefix)
        if prefix is not None and not isinstance(prefix, TorchPrefix):
            raise TypeError(f"prefix is a {type(prefix).__name__}, expected this decoder's own TorchPrefix")
        c = self._config
        return TorchKV(c["layers"], c["kv_heads"], c["head_width"], capacity, prefix)

    def freeze(self, kv: KV) -> TorchPrefix:
        kv = _own(kv)
        self._require_to_share(kv)
        return TorchPrefix([slab[:, : kv.length] for slab in kv.slabs])

    def load_prefix(self, layers: Sequence[F32]) -> TorchPrefix:
        c = self._config
        self._require_layers(layers, c["layers"], c["kv_heads"], c["head_width"])
        return TorchPrefix.of(layers)

    def embed(self, token_ids: NDArray[np.int64]) -> F32:
        with torch.no_grad():
            return self._opened().table[torch.from_numpy(np.asarray(token_ids, np.int64))].numpy()

    def extend(self, chunks: Sequence[Chunk]) -> list[F32]:
        self._require_fit(chunks)
        model = self._opened()
        for c in chunks:
            _own(c.kv).reserve(len(c.embeds))
        with torch.no_grad():
            logits = model(Rows(chunks)).numpy()
        for c in chunks:
            c.kv.length += len(c.embeds)
        return np.split(logits, np.cumsum([c.logits for c in chunks])[:-1])

    def _opened(self) -> TorchLlama:
        if self._model is None:
            raise WsiRtError("this decoder is closed")
        return self._model


class Rows:
    """The new tokens of a call as rows of one matrix. spans: those of each chunk; position: [rows]; groups: for every
    prefix, the rows of the sequences that have it; wanted: the rows whose logits are."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        lengths = [len(c.embeds) for c in chunks]
        ends = np.cumsum(lengths).tolist()
        self.spans = [slice(end - n, end) for n, end in zip(lengths, ends, strict=True)]
        self.kvs = [_own(c.kv) for c in chunks]
        self.x = torch.cat([torch.tensor(c.embeds, dtype=torch.float32) for c in chunks])
        self.position = torch.cat(
            [torch.arange(kv.length, kv.length + n) for kv, n in zip(self.kvs, lengths, strict=True)]
        )
        ranges = [torch.arange(s.start, s.stop) for s in self.spans]
        self.wanted = torch.cat([r[len(r) - c.logits :] for r, c in zip(ranges, chunks, strict=True)])
        members: dict[int, list[int]] = {}
        for i, kv in enumerate(self.kvs):
            if kv.prefix is not None:
                members.setdefault(id(kv.prefix), []).append(i)
        self.groups = [(_prefix(self.kvs[m[0]]), torch.cat([ranges[i] for i in m])) for m in members.values()]


class TorchLlama:
    """A Llama (SPEC 5) on stored tensors: RMSNorm, rotate-half positions, grouped KV heads, SiLU-gated MLP.

    table: f32 [vocab, hidden], the token embeddings.
    """

    def __init__(self, c: Mapping[str, Any], tensors: StoredTensors) -> None:
        self._eps, self._widths = c["rms_eps"], {"q": c["heads"], "k": c["kv_heads"], "v": c["kv_heads"]}
        self.table = tensors.floats("model.embed_tokens.weight")
        self._cos, self._sin = (tensors.floats(f"rope.{x}")[:, None] for x in ("cos", "sin"))  # [context, 1, D / 2]
        names = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
        layers = [f"model.layers.{i}" for i in range(c["layers"])]
        self._linears = [{n: tensors.linear(f"{layer}.{n}") for n in names} for layer in layers]
        norms = ("input_layernorm", "post_attention_layernorm")
        self._norms = [[tensors.floats(f"{layer}.{n}.weight") for n in norms] for layer in layers]
        self._last_norm, self._head = tensors.floats("model.norm.weight"), tensors.linear("lm_head")

    def __call__(self, rows: Rows) -> Tensor:
        """-> logits [wanted rows, vocab]; the KVs are written behind their lengths, which stay."""
        x = rows.x
        for i, (linears, (before, after)) in enumerate(zip(self._linears, self._norms, strict=True)):
            h = self._norm(x, before)
            q, k, v = (linears[f"self_attn.{n}_proj"](h).unflatten(-1, (m, -1)) for n, m in self._widths.items())
            q, k = (self._rotated(part, rows.position) for part in (q, k))
            x = x + linears["self_attn.o_proj"](_attention(i, q, k, v, rows).flatten(1))
            h = self._norm(x, after)
            gated = torch.nn.functional.silu(linears["mlp.gate_proj"](h)) * linears["mlp.up_proj"](h)
            x = x + linears["mlp.down_proj"](gated)
        return self._head(self._norm(x[rows.wanted], self._last_norm))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, self._eps)

    def _rotated(self, x: Tensor, position: Tensor) -> Tensor:
        """x [rows, heads, D]: (a, b) -> (a cos - b sin, b cos + a sin)."""
        cos, sin = self._cos[position], self._sin[position]
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _attention(layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """q [rows, heads, D], k and v [rows, kv_heads, D] -> [rows, heads, D]: each prefix once for all rows that have it,
    the own tokens sequence by sequence."""
    from_prefix = (torch.zeros_like(q), q.new_full((*q.shape[:2], 1), -torch.inf))
    for prefix, members in rows.groups:
        for whole, part in zip(from_prefix, attend(q[members], prefix.slabs[layer], causal=False), strict=True):
            whole[members] = part
    own = [attend(q[s], kv.append(layer, k[s], v[s]), causal=True) for kv, s in zip(rows.kvs, rows.spans, strict=True)]
    return join(from_prefix, (torch.cat([out for out, _ in own]), torch.cat([lse for _, lse in own])))


def _own(kv: KV) -> TorchKV:
    if not isinstance(kv, TorchKV):
        raise TypeError(f"KV is a {type(kv).__name__}, expected this decoder's own TorchKV")
    return kv


def _prefix(kv: TorchKV) -> TorchPrefix:
    if not isinstance(kv.prefix, TorchPrefix):
        raise TypeError(f"prefix is a {type(kv.prefix).__name__}, expected this decoder's own TorchPrefix")
    return kv.prefix
