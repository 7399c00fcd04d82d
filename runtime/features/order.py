"""The orders that tiles come in (SPEC 1): the slide encoder acts on the order, so files are told apart by it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


def _names_order(xy0: NDArray[np.int64]) -> NDArray[np.int64]:
    """As sorting the file names `<x>_<y>` would: as text, without leading zeros."""
    names = [f"{x}_{y}" for x, y in xy0.tolist()]
    return np.array(sorted(range(len(names)), key=names.__getitem__), np.int64)


# xy0 [N, 2] -> [N] int64, the rows in that order.
ORDERS: dict[str, Callable[[NDArray[np.int64]], NDArray[np.int64]]] = {
    "row-major": lambda xy0: np.lexsort((xy0[:, 0], xy0[:, 1])),
    "column-major": lambda xy0: np.lexsort((xy0[:, 1], xy0[:, 0])),
    "file": lambda xy0: np.arange(len(xy0)),
    "reversed": lambda xy0: np.lexsort((xy0[:, 0], xy0[:, 1]))[::-1],
    "names": _names_order,
}
SAYS = {
    "row-major": "row-major (y, x)",
    "column-major": "column-major (x, y)",
    "reversed": "reversed row-major",
    "names": "the order of their file names",
}


def order_of(xy0: NDArray[np.int64]) -> str | None:
    """The key of SAYS whose order the tiles are in; None: in no known one. Tiles in one place count as in order."""
    for name in SAYS:
        if np.array_equal(xy0[ORDERS[name](xy0)], xy0):
            return name
    return None


def sorted_rows(xy0: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """(the rows in row-major order, stable; how many of them change place)."""
    order = ORDERS["row-major"](xy0)
    return order, int((order != np.arange(len(order))).sum())
