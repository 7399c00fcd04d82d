"""The calls of `wsi_rt::DilatedAttention` in a graph -> the plugin, in an ONNX file that TensorRT's parser takes.

The parser looks for a plugin by the node's type, its namespace and version, and reads the other attributes as the
plugin's: https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md ("Custom plugins").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx
from onnx import TensorProto, helper

from wsi_rt.export.arch import LongNetConfig
from wsi_rt.export.graphs.builder import OUR_DOMAIN
from wsi_rt.export.plugins.dilated_attention import DilatedAttention
from wsi_rt.kernels.dilated_attention.programs import FIELDS, branch_table, program_table

NAME, VERSION = "dilated_attention", "1"
PROGRAMS = "programs"  # an input of the network more, and its symbolic dimension


@dataclass(frozen=True)
class PluginCall:
    """The plugin as one slide encoder calls it."""

    plugin: DilatedAttention
    segment_lengths: tuple[int, ...]
    dilated_ratios: tuple[int, ...]

    @classmethod
    def of(cls, c: LongNetConfig, dtype: str, sm: int) -> PluginCall:
        """Raises KernelInputError on a head width or architecture that the kernel is not shipped for."""
        plugin = DilatedAttention.of(sm, dtype, c.heads, c.width // c.heads, c.segment_lengths, c.dilated_ratios)
        return cls(plugin, c.segment_lengths, c.dilated_ratios)

    def table(self) -> dict[str, Any]:
        """What the runtime makes the `programs` of a slide from (`kernels.dilated_attention.programs`), as JSON."""
        return {
            "kind": "dilated_programs",
            "segment_lengths": list(self.segment_lengths),
            "dilated_ratios": list(self.dilated_ratios),
            "heads": self.plugin.heads,
            "block_m": self.plugin.block_m,
        }

    def programs(self, tiles: Sequence[int]) -> tuple[int, ...]:
        """Rows of that table for slides of so many tiles, CLS added: a profile's bounds."""
        lists = self.segment_lengths, self.dilated_ratios, self.plugin.heads, self.plugin.block_m
        return tuple(len(program_table((n + 1,), *lists)) for n in tiles)


def call_plugin(model: onnx.ModelProto, call: PluginCall) -> None:
    """Every call becomes one of the plugin, on q, k and v side by side; `programs` i32 [programs, 5] is an input more.
    Raises ValueError when the graph has no such call."""
    graph = model.graph
    found = [n for n in graph.node if (n.domain, n.op_type) == (OUR_DOMAIN, "DilatedAttention")]
    if not found:
        raise ValueError("the graph calls no wsi_rt::DilatedAttention")
    graph.input.append(helper.make_tensor_value_info(PROGRAMS, TensorProto.INT32, [PROGRAMS, FIELDS]))
    table = branch_table(call.segment_lengths, call.dilated_ratios)
    graph.initializer.append(onnx.numpy_helper.from_array(table, "dilated_attention.branches"))
    graph.initializer.append(helper.make_tensor("dilated_attention.axis", TensorProto.INT64, [1], [1]))
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes += _plugin_nodes(node, call) if node in found else [node]
    for node in found:  # nothing infers a plugin's type
        dims: list[int | str] = ["tokens", call.plugin.heads, call.plugin.width]
        graph.value_info.append(helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, dims))
    copies = [_copied(n) for n in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    kept = [f for f in model.functions if not f.name.startswith(("DilatedAttention", "DilatedBranch"))]
    del model.functions[:]
    model.functions.extend(kept)


def _plugin_nodes(node: onnx.NodeProto, call: PluginCall) -> list[onnx.NodeProto]:
    qkv = f"{node.name}/qkv"
    parts = [f"{qkv}/{x}" for x in "qkv"]
    made = [
        helper.make_node("Unsqueeze", [x, "dilated_attention.axis"], [part], name=part)
        for x, part in zip(node.input, parts, strict=True)
    ]
    made.append(helper.make_node("Concat", parts, [qkv], name=qkv, axis=1))
    told: Mapping[str, Any] = {"plugin_namespace": OUR_DOMAIN, "plugin_version": VERSION, **asdict(call.plugin)}
    inputs = [qkv, PROGRAMS, "dilated_attention.branches"]
    made.append(helper.make_node(NAME, inputs, list(node.output), name=node.name, domain=OUR_DOMAIN, **told))
    return made


def _copied(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy
