"""Weights as a component's weight file holds them, and the output layer that tied embeddings leave out."""

from __future__ import annotations

import numpy as np

from wsi_rt.export.arch import EMBED_TOKENS, LM_HEAD, ComponentConfig, LlamaConfig, Shapes
from wsi_rt.export.graphs.builder import WeightFile
from wsi_rt.export.quantise import U8, BlockFormat, Blocks, FormatOf, unpack
from wsi_rt.export.sources.weights import F32, Derived, WeightSource

HEAD, TABLE = f"{LM_HEAD}.weight", f"{EMBED_TOKENS}.weight"


class TiedHead(Derived):
    """A language model whose output layer is its embedding table, with both under their names."""

    def shapes(self) -> Shapes:
        shapes = self._source.shapes()
        return {**shapes, HEAD: shapes[TABLE]}

    def get(self, name: str) -> F32:
        return self._source.get(TABLE if name == HEAD else name)


def with_head(config: ComponentConfig, source: WeightSource) -> WeightSource:
    """`source`, in which the component's every Linear has a tensor of its own name."""
    tied = isinstance(config, LlamaConfig) and config.tied_embeddings and HEAD not in source.shapes()
    return TiedHead(source) if tied else source


class Stored(Derived):
    """`source`, but Linear layers in integer blocks are read back from `file`, where a target's graph put them."""

    def __init__(self, source: WeightSource, file: WeightFile, format_of: FormatOf) -> None:
        super().__init__(source)
        self._file, self._format_of = file, format_of

    def form(self, name: str) -> BlockFormat | None:
        """The format of a tensor that is a Linear's matrix in blocks; None for any other."""
        prefix, _, leaf = name.rpartition(".")
        matrix = leaf == "weight" and len(self.shapes()[name]) == 2 and name != TABLE
        return self._format_of(prefix) if matrix else None

    def get(self, name: str) -> F32:
        form = self.form(name)
        if form is None:
            return self._source.get(name)
        out, inputs = self.shapes()[name]
        kind = form.stored_name(name)
        dims = (out, form.blocks(inputs))
        if not form.block:
            columns = self._file.read(f"{kind}.columns").view(np.int8).reshape(inputs, out)
            return np.ascontiguousarray(columns.T * self._file.read(f"{kind}.scales").view(np.float32)[:, None])
        scales = self._file.read(f"{kind}.scales").view(np.float32).reshape(dims)
        codes = unpack(self._file.read(f"{kind}.codes").reshape(*dims, -1), form)
        zeros = np.full(dims, form.middle, np.uint8)
        if not form.symmetric:
            zeros = self._zeros(kind, form, dims)
        return Blocks(form, codes, scales, zeros).dequantised(inputs)

    def _zeros(self, kind: str, form: BlockFormat, dims: tuple[int, int]) -> U8:
        """[out, blocks]; rows of an odd number of 4-bit zeros are dense where only standard graphs were written."""
        if self._file.holds(f"{kind}.zeros"):
            return unpack(self._file.read(f"{kind}.zeros").reshape(dims[0], -1), form)[:, : dims[1]]
        return unpack(self._file.read(f"{kind}.zeros.dense"), form)[: dims[0] * dims[1]].reshape(dims)


class Compared(Derived):
    """A checkpoint that notes, of every tensor asked for, how far the stored one is from it: the norm of the difference
    over the norm. `errors`: those of Linear layers in blocks."""

    def __init__(self, source: WeightSource, stored: Stored) -> None:
        super().__init__(source)
        self._stored = stored
        self.errors: dict[str, float] = {}

    def get(self, name: str) -> F32:
        x = self._source.get(name)
        if self._stored.form(name) is not None:
            size = max(float(np.linalg.norm(x)), 1e-30)
            self.errors[name] = float(np.linalg.norm(self._stored.get(name) - x)) / size
        return x
