"""Slide encoder for onnxruntime's CPU provider (SPEC 3): what is computed row by row goes through the cache a chunk of
rows at a time, and attention is onnxruntime's own operator (`dilated_attention_cpu`).

Memory, in floats a token at the published width: the features take 1,536; x, q and k 768 each, v 896; the branch of
ratio 1 gathers 2,432 from them, which the operator transposes into as many, and gives 896, twice. That is 11,400 floats
or 46 KB a token beside the weights, 0.5 GB for 10,000 tiles and 2.3 GB for 50,000 (measured, weights of one layer and
all of Python included: 0.64 and 2.85 GB). A chunk takes 12 MB for each copy of its 3,072 hidden values, however long
the slide is.
"""

from __future__ import annotations

from pathlib import Path

from wsi_rt.export.arch import LongNetConfig
from wsi_rt.export.graphs.builder import Dims, WeightFile
from wsi_rt.export.graphs.dilated_attention_cpu import dilated_attention_cpu
from wsi_rt.export.graphs.dilated_tables import Heads, Tables, make_tables
from wsi_rt.export.graphs.layers import Style, reshape
from wsi_rt.export.graphs.slide_encoder import SlideEncoderGraph
from wsi_rt.export.sources.weights import WeightSource

# At most, of one pass through a layer's row-wise part: 12 MB of hidden values, which stay in a last-level cache. Two
# int8 layers on 10,000 tiles take 5.8 s of CPU time with 256 rows, 5.4 with 512 and 5.1 with 1,024.
CHUNK_ROWS = 1024


def build(
    c: LongNetConfig,
    source: WeightSource,
    weights: WeightFile,
    path: Path,
    style: Style,
    *,
    expose_encoder_out: bool = False,
) -> None:
    """Writes `path`; inputs and outputs as `slide_encoder.build`. Heads that the ratios do not divide evenly (no
    published encoder has such) are attended to as the portable graph does it."""
    graph = SlideEncoderCpuGraph if all(c.heads % r == 0 for r in c.dilated_ratios) else SlideEncoderGraph
    graph(c, source, weights, style).build(path, expose_encoder_out)


class SlideEncoderCpuGraph(SlideEncoderGraph):
    """Between the layers x is [chunks, rows, C]: L tokens, then rows that hold the appended keys of attention."""

    def __init__(self, c: LongNetConfig, source: WeightSource, weights: WeightFile, style: Style) -> None:
        super().__init__(c, source, weights, style)
        self.heads = Heads(c.heads, c.width // c.heads)

    def _layers(self, x: str) -> str:
        b, c = self.b, self.c
        with b.scope("tables"):
            tables = make_tables(b, x, c.segment_lengths, c.dilated_ratios, self.heads, CHUNK_ROWS)
        with b.scope("chunks"):
            x = self._chunked(
                b.op("Pad", [x, b.op("Concat", [b.constant([0, 0]), tables.filling, b.constant([0])], axis=0)]), tables
            )
        self._boundary(x, tables)
        for i in range(c.depth):
            with b.scope(f"layers.{i}"):
                x = self._cpu_layer(x, f"encoder.layers.{i}", tables)
                self._boundary(x, tables)
        return self._tokens(x, tables)

    def _cpu_layer(self, x: str, p: str, tables: Tables) -> str:
        b, width = self.b, self.c.width
        row: Dims = ("rows", width)
        with b.scope("project"):
            given = {"x": row, "real": ("rows", 1), "sums": ("rows", 1, self.heads.extra)}
            with b.body(given) as project:
                q, k, v = self._project(project.inputs["x"], p)
                k, v = (b.op("Mul", [y, project.inputs["real"]]) for y in (k, v))
                v = self._with_sums(v, project.inputs["sums"])
                project.results += [(q, row), (k, row), (v, ("rows", self.heads.value_row))]
            qkv = b.op("Scan", [x, tables.real, tables.sums], outputs=3, body=project.graph, num_scan_inputs=3)
        with b.scope("attn"):
            widths = (width, width, self.heads.value_row)
            q, k, v = (reshape(b, y, [-1, n]) for y, n in zip(qkv, widths, strict=True))
            y = self._chunked(dilated_attention_cpu(b, q, k, v, tables, self.heads), tables)
        with b.scope("rest"):
            with b.body({"x": row, "y": row}) as rest:
                rest.results.append((self._rest(rest.inputs["x"], rest.inputs["y"], p), row))
            return str(b.op("Scan", [x, y], body=rest.graph, num_scan_inputs=2))

    def _with_sums(self, v: str, sums: str) -> str:
        """v [rows, C], sums [rows, 1, extra] -> [rows, H * value_width]."""
        b, h = self.b, self.heads
        every = b.op("Expand", [sums, b.constant([1, h.count, 1])])
        both = b.op("Concat", [reshape(b, v, [-1, h.count, h.width]), every], axis=2)
        return reshape(b, both, [-1, h.value_row])

    def _chunked(self, x: str, tables: Tables) -> str:
        """[chunks * rows, C] -> [chunks, rows, C]."""
        dims = self.b.op("Concat", [tables.chunks, self.b.constant([-1, self.c.width])], axis=0)
        return str(self.b.op("Reshape", [x, dims]))

    def _tokens(self, x: str, tables: Tables) -> str:
        """[chunks, rows, C] -> [L, C]."""
        b = self.b
        x = reshape(b, x, [-1, self.c.width])
        return str(b.op("Slice", [x, b.constant([0]), tables.end, b.constant([0])]))

    def _boundary(self, x: str, tables: Tables) -> None:
        if self.style.probe:
            self.layer_boundary(self._tokens(x, tables), ["tokens", self.c.width])
