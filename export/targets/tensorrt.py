"""`tensorrt` and `tensorrt-rtx`: an engine for each GPU architecture, from the same ONNX files in half precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from wsi_rt.export import tensorrt
from wsi_rt.export.graphs.write import DECODER, MODEL
from wsi_rt.export.parity import Arrays
from wsi_rt.export.targets.base import Lowered, Order
from wsi_rt.export.tensorrt.check import outputs
from wsi_rt.export.tensorrt.sources import Sources


def lower(order: Order) -> Mapping[str, Lowered]:
    made = {f"{order.target}-sm{sm}": sm for sm in order.sms}
    lowered = {
        name: tensorrt.lower(order.component, order.folder(name), order.threads, order.target, (sm,), order.precision)
        for name, sm in made.items()
    }
    config, sources = order.component.config, _compiled_from(order)

    def answer(inputs: Arrays) -> Arrays:
        return outputs(config, sources, inputs, order.threads)

    return {name: replace(one, outputs=answer) for name, one in lowered.items()}


def _compiled_from(order: Order) -> Sources:
    """The files that `tensorrt.lower` wrote for all architectures."""
    role = DECODER if DECODER in order.portable else MODEL
    compiled = order.component.weights.path.parent / f"{order.target}-onnx" / f"{role}.onnx"
    runnable = compiled.with_name(f"{role}-cpu.onnx")
    return Sources(role, compiled, runnable if runnable.exists() else compiled)
