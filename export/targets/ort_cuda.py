"""`ort-cuda`: the portable graphs as they are; onnxruntime optimises them for its GPU provider when it opens them."""

from __future__ import annotations

from collections.abc import Mapping

from wsi_rt.export.targets.base import Lowered, Order


def lower(order: Order) -> Mapping[str, Lowered]:
    shared = order.component.weights.path.parent
    return {order.target: Lowered(order.portable, shared, {}, source=order.portable)}
