"""`torch`: nothing to lower; its engines read the weights of the portable graphs, on a GPU or the CPU."""

from __future__ import annotations

from collections.abc import Mapping

from wsi_rt.export.targets.base import Lowered, Order


def lower(order: Order) -> Mapping[str, Lowered]:
    return {order.target: Lowered(order.portable, order.component.weights.path.parent, {})}
