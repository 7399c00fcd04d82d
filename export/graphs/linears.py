"""How a Linear layer is stored and computed: the one place where a precision shows in a graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from wsi_rt.export.graphs.builder import ORT_DOMAIN
from wsi_rt.export.quantise import BlockFormat, Blocks, FormatOf, pack, quantise

if TYPE_CHECKING:
    from wsi_rt.export.graphs.layers import Graph


class Linears(ABC):
    @abstractmethod
    def make(self, g: Graph, x: str, name: str, bias: bool) -> str:
        """x [..., in] -> [..., out] with the checkpoint's `<name>.weight` [out, in] and, if told, `<name>.bias`."""


class PlainLinears(Linears):
    """fp32; the weight is stored transposed, as MatMul wants it."""

    def make(self, g: Graph, x: str, name: str, bias: bool) -> str:
        weight = g.b.weight(f"{name}.weight.T", lambda: g.source.get(f"{name}.weight").T)
        return _with_bias(g, g.b.op("MatMul", [x, weight]), name, bias)


class BlockLinears(Linears):
    """Integer blocks, quantised once for all graphs that share the weight file."""

    def __init__(self, format_of: FormatOf) -> None:
        self._format_of = format_of

    def make(self, g: Graph, x: str, name: str, bias: bool) -> str:
        form = self._format_of(name)
        return PlainLinears().make(g, x, name, bias) if form is None else self._make(g, x, name, bias, form)

    @abstractmethod
    def _make(self, g: Graph, x: str, name: str, bias: bool, form: BlockFormat) -> str: ...

    @staticmethod
    def _rows(g: Graph, name: str, form: BlockFormat) -> list[str]:
        """Names of the codes i8 [in, out] and the scales f32 [out] of whole rows."""

        @cache
        def blocks() -> Blocks:
            return quantise(g.source.get(f"{name}.weight"), form)

        kind = form.stored_name(f"{name}.weight")
        columns = g.b.weight(f"{kind}.columns", lambda: blocks().columns())
        return [columns, g.b.weight(f"{kind}.scales", lambda: blocks().scales[:, 0])]

    @staticmethod
    def _weights(g: Graph, name: str, form: BlockFormat, standard: bool) -> list[str]:
        """Names of the codes, the scales f32 [out, blocks] and, where blocks have their own, the zeros.

        As MatMulNBits takes them; or `standard`: the same bytes as ONNX's 4- or 8-bit matrices, codes [out, blocks *
        block] and zeros [out, blocks], the latter in any case.
        """

        @cache
        def blocks() -> Blocks:
            return quantise(g.source.get(f"{name}.weight"), form)

        out, inputs = g.source.shapes()[f"{name}.weight"]
        dims, integers = [out, form.blocks(inputs)], TensorProto.UINT4 if form.bits == 4 else TensorProto.UINT8
        matrix = (integers, [out, dims[1] * form.block]) if standard else None
        kind = form.stored_name(f"{name}.weight")
        names = [
            g.b.weight(f"{kind}.codes", lambda: blocks().packed_codes(), matrix),
            g.b.weight(f"{kind}.scales", lambda: blocks().scales),
        ]
        if form.symmetric and standard:  # one for all layers this big
            same = f"zeros.int{form.bits}.{out}x{dims[1]}"
            middle = np.full(out * dims[1], form.middle, np.uint8)
            names.append(g.b.weight(same, lambda: pack(middle, form), (integers, dims)))
        elif not form.symmetric and standard and form.bits == 4 and dims[1] % 2:  # no row ends inside a byte
            names.append(
                g.b.weight(f"{kind}.zeros.dense", lambda: pack(blocks().zeros.ravel(), form), (integers, dims))
            )
        elif not form.symmetric:
            zeros = g.b.weight(f"{kind}.zeros", lambda: blocks().packed_zeros(), (integers, dims) if standard else None)
            names.append(zeros)
        return names


class FusedLinears(BlockLinears):
    """onnxruntime's own operators.

    Blocks: MatMulNBits. accuracy_level 4: activations in int8 with a scale per row and block, so a row's
    result does not depend on its batch, unlike one scale per call; 5e-3 of the largest output is lost at most (fp32
    activations, level 0, lose 3e-6 but run at 1 to 50 GOP/s for one row instead of 200).

    Whole rows: an integer product, each row of activations in int8 with a scale of its own. Sums of integers are exact,
    so here, too, a row does not depend on its batch. From about eight rows on twice as fast as blocks; a single row
    takes three times as long.
    """

    def _make(self, g: Graph, x: str, name: str, bias: bool, form: BlockFormat) -> str:
        if not form.block:
            return _with_bias(g, self._product(g, x, *self._rows(g, name, form)), name, bias)
        out, inputs = g.source.shapes()[f"{name}.weight"]
        y = g.b.op(
            "MatMulNBits",
            [x, *self._weights(g, name, form, standard=False)],
            domain=ORT_DOMAIN,
            K=inputs,
            N=out,
            bits=form.bits,
            block_size=form.block,
            accuracy_level=4,
        )
        return _with_bias(g, y, name, bias)

    @staticmethod
    def _product(g: Graph, x: str, columns: str, scales: str) -> str:
        """x [..., in]. An activation's code is round(127 x / largest of its row) + 128."""
        b = g.b
        top, bottom = (b.op(f"Reduce{end}", [x, b.constant([-1])], keepdims=1) for end in ("Max", "Min"))
        largest = b.op("Max", [top, b.op("Neg", [bottom])])  # [..., 1]; half the time of Abs, then ReduceMax
        floor, share = (
            b.constant(np.finfo(np.float32).tiny, np.float32, "tiny"),
            b.constant(1 / 127, np.float32, "1/127"),
        )
        step = b.op("Mul", [b.op("Max", [largest, floor]), share])
        steps = b.op("Reshape", [step, b.constant([-1])])  # one for each row
        middle = b.constant(128, np.uint8)
        zeros = b.op("Expand", [middle, b.op("Shape", [steps])])
        flat = b.op("Flatten", [x], axis=-1)  # [rows, in]
        codes = b.op("QuantizeLinear", [flat, steps, zeros], axis=0)
        one = b.constant(1.0, np.float32)
        y = b.op("MatMulIntegerToFloat", [codes, columns, one, scales, middle], domain=ORT_DOMAIN)
        y = b.op("Mul", [y, b.op("Reshape", [steps, b.constant([-1, 1])])])
        lead = b.op("Shape", [x], start=0, end=-1)
        return b.op("Reshape", [y, b.op("Concat", [lead, b.constant([-1])], axis=0)])


class DequantisedLinears(BlockLinears):
    """Standard operators on the same bytes: DequantizeLinear, then MatMul in fp32."""

    def _make(self, g: Graph, x: str, name: str, bias: bool, form: BlockFormat) -> str:
        b = g.b
        if not form.block:
            out = g.source.shapes()[f"{name}.weight"][0]
            zeros = b.weight(
                f"zeros.int8.{out}", lambda: np.zeros(out, np.int8)
            )  # told, or x64quantprecision breaks it
            w = b.op("DequantizeLinear", [*self._rows(g, name, form), zeros], axis=1)
            return _with_bias(g, b.op("MatMul", [x, w]), name, bias)
        inputs = g.source.shapes()[f"{name}.weight"][1]
        w = b.op("DequantizeLinear", self._weights(g, name, form, standard=True), axis=1, block_size=form.block)
        if inputs % form.block:
            w = b.op("Slice", [w, b.constant([0]), b.constant([inputs]), b.constant([1])])
        y = b.op("MatMul", [x, b.op("Transpose", [w], perm=[1, 0])])
        return _with_bias(g, y, name, bias)


def _with_bias(g: Graph, y: str, name: str, bias: bool) -> str:
    return g.b.op("Add", [y, g.tensor(f"{name}.bias")]) if bias else y
