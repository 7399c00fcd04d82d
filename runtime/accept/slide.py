"""Our slide tokens against the reference's, and which known difference makes them agree.

A recipe says how tokens come from tile features; a hypothesis changes one thing of it. The next known difference is
one more entry of HYPOTHESES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.accept.agreement import Agreement, TokenGate, compare_tokens
from wsi_rt.runtime.accept.reference import TELLING_TILES, Reference
from wsi_rt.runtime.accept.report import OnProgress
from wsi_rt.runtime.accept.states import SlideStates, bin_edges, pool, standardise
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.positions import grid_positions
from wsi_rt.runtime.types import TILE_PX, TileFeatures

Order = NDArray[np.int64]


@dataclass(frozen=True)
class Recipe:
    """How tokens are made of tile features. order: a key of ORDERS, or "recovered"; divisor: of the position grid."""

    order: str
    divisor: int
    swapped: bool = False
    pooled: str = "tiles"
    norm: str = "checkpoint"


@dataclass(frozen=True)
class Facts:
    """What the hypotheses may look at. features: in the file's order, or as our tiler made them."""

    features: TileFeatures
    from_file: bool
    reference: Reference
    norm_width: int
    padded: int


def _names_order(xy0: NDArray[np.int64]) -> Order:
    """As sorting the file names `<x>_<y>` would: as text, without leading zeros."""
    names = [f"{x}_{y}" for x, y in xy0.tolist()]
    return np.array(sorted(range(len(names)), key=names.__getitem__), np.int64)


ORDERS: dict[str, Callable[[NDArray[np.int64]], Order]] = {
    "row-major": lambda xy0: np.lexsort((xy0[:, 0], xy0[:, 1])),
    "column-major": lambda xy0: np.lexsort((xy0[:, 1], xy0[:, 0])),
    "file": lambda xy0: np.arange(len(xy0)),
    "reversed": lambda xy0: np.lexsort((xy0[:, 0], xy0[:, 1]))[::-1],
    "names": _names_order,
}


@dataclass(frozen=True)
class Hypothesis:
    """One known difference. `says`: the clause of the verdict. `apply` changes a recipe; None: nothing to change."""

    name: str
    says: str
    apply: Callable[[Recipe, Facts], Recipe | None]


def _in_order(name: str) -> Callable[[Recipe, Facts], Recipe | None]:
    def apply(recipe: Recipe, facts: Facts) -> Recipe | None:
        xy0 = facts.features.grid.xy0
        same = name == recipe.order or np.array_equal(ORDERS[name](xy0), ORDERS[recipe.order](xy0))
        return None if same or (name == "file" and not facts.from_file) else replace(recipe, order=name)

    return apply


def _divided_by(divisor: Callable[[Facts], int]) -> Callable[[Recipe, Facts], Recipe | None]:
    def apply(recipe: Recipe, facts: Facts) -> Recipe | None:
        return None if divisor(facts) == recipe.divisor else replace(recipe, divisor=divisor(facts))

    return apply


def _normed(how: str) -> Callable[[Recipe, Facts], Recipe | None]:
    def apply(recipe: Recipe, facts: Facts) -> Recipe | None:
        needs_padding = how in ("pad first", "pad first, fresh")
        possible = facts.norm_width < facts.padded or not needs_padding
        return replace(recipe, norm=how) if possible else None

    return apply


HYPOTHESES = (
    Hypothesis("missing norm", "the reference lacks the norm after pooling", _normed("none")),
    Hypothesis(
        "fresh norm", "the reference's norm has weight 1 and bias 0: the checkpoint's was not loaded", _normed("fresh")
    ),
    Hypothesis(
        "padded before the norm",
        "the reference was padded first and normed over the padded width, with the checkpoint's weight",
        _normed("pad first"),
    ),
    Hypothesis(
        "padded before a fresh norm",
        "the reference was padded first and normed over the padded width by a norm that was not loaded",
        _normed("pad first, fresh"),
    ),
    Hypothesis(
        "CLS pooled", "the reference pooled the CLS token with the tiles", lambda r, _: replace(r, pooled="all")
    ),
    Hypothesis(
        "divisor 256",
        f"the reference's tile positions are coordinates divided by {TILE_PX}: give --position-tile {TILE_PX}",
        _divided_by(lambda _: TILE_PX),
    ),
    Hypothesis(
        "divisor patch_size_level0",
        "the reference's tile positions are coordinates divided by patch_size_level0: leave out --position-tile",
        _divided_by(lambda facts: facts.features.grid.patch_size_level0),
    ),
    Hypothesis(
        "column-major order", "the reference's tiles are in column-major order (x, y)", _in_order("column-major")
    ),
    Hypothesis(
        "row-major order",
        "the reference's tiles are in row-major order: leave out --keep-order",
        _in_order("row-major"),
    ),
    Hypothesis("file order", "the reference's tiles are in the file's order: give --keep-order", _in_order("file")),
    Hypothesis("reversed order", "the reference's tiles are in reversed row-major order", _in_order("reversed")),
    Hypothesis("file-name order", "the reference's tiles are in the order of their file names", _in_order("names")),
    Hypothesis(
        "coordinates (y, x)",
        "the reference took the tile coordinates as (y, x)",
        lambda recipe, _: replace(recipe, swapped=True),
    ),
)


class Trials:
    """Tokens by recipe; the encoder runs once for each order and position grid."""

    def __init__(self, facts: Facts, states: SlideStates) -> None:
        self.facts, self.states = facts, states
        self.recovered: Order | None = None
        self._pooled: dict[tuple[str, int, bool], dict[str, NDArray[np.float64]]] = {}

    def tokens(self, recipe: Recipe) -> NDArray[np.float64]:
        """[576, C]; C is padded only where the norm came after the padding."""
        norm, width = self.states.norm, self.states.padded
        x = self._pools(recipe)[recipe.pooled]
        if recipe.norm.startswith("pad first") or self.states.norm_width == width:
            x = np.pad(x, ((0, 0), (0, width - x.shape[1])))
        if recipe.norm == "none":
            return x
        z = standardise(x, norm.eps)
        if recipe.norm.endswith("fresh"):
            return z
        missing = (0, z.shape[1] - len(norm.weight))
        return z * np.pad(norm.weight, missing) + np.pad(norm.bias, missing)

    def _pools(self, recipe: Recipe) -> dict[str, NDArray[np.float64]]:
        key = (recipe.order, recipe.divisor, recipe.swapped)
        if key not in self._pooled:
            states = self.run(recipe)
            self._pooled[key] = {"tiles": pool(states[1:]), "all": pool(states)}
        return self._pooled[key]

    def run(self, recipe: Recipe) -> NDArray[np.float32]:
        """One run of the encoder -> states [N + 1, C]. Raises InputError for tiles off the position grid."""
        features = self.facts.features
        order = self.recovered if recipe.order == "recovered" else ORDERS[recipe.order](features.grid.xy0)
        positions = grid_positions(features.grid, recipe.divisor)[order]
        return self.states.run(features.x[order], positions[:, ::-1] if recipe.swapped else positions)

    def recover_order(self, recipe: Recipe) -> Recipe | None:
        """Match the reference's tokens with single tiles (at most 288), whatever their order: a recipe in the order
        found, to be run and compared like any other; None when they do not match one to one."""
        tiles = len(self.facts.features.grid)
        if tiles > TELLING_TILES or self.facts.reference.tiles != tiles:
            return None
        order, norm, width = ORDERS[recipe.order](self.facts.features.grid.xy0), self.states.norm, self.states.width
        if len(norm.weight) != width:
            return None
        ours = standardise(self.run(recipe)[1:].astype(np.float64), norm.eps) * norm.weight + norm.bias  # [N, C]
        start, end = bin_edges(tiles)
        alone = np.flatnonzero(end - start == 1)
        row = alone[np.unique(start[alone], return_index=True)[1]]  # [N]: a bin that holds tile i and nothing else
        theirs = self.facts.reference.tokens[row, :width].astype(np.float64)
        unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30) for x in (theirs, ours)]
        nearest = (unit[0] @ unit[1].T).argmax(axis=1)
        if len(np.unique(nearest)) != tiles or np.array_equal(nearest, np.arange(tiles)):
            return None
        self.recovered = order[nearest]
        return replace(recipe, order="recovered")


RECOVERED = Hypothesis(
    "another order",
    "the reference has the same tiles in an order of its own, recovered by matching tokens",
    lambda recipe, _: None,  # Trials.recover_order: it needs the reference's tokens and a run of the encoder
)


IN_FP32 = Hypothesis(
    "slide encoder in fp32",
    "our slide encoder's reduced precision keeps them apart: build with --precision slide_encoder=fp32",
    lambda recipe, _: recipe,
)


@dataclass(frozen=True)
class Plan:
    """in_fp32: our own run was in another precision, so try the same in fp32 first. stop: after the first that agrees
    (not where the tile encoder's reduced precision makes the gate too wide to tell differences apart)."""

    in_fp32: bool = False
    stop: bool = True


@dataclass(frozen=True)
class Tried:
    """One or two hypotheses together, and how close they come."""

    hypotheses: tuple[Hypothesis, ...]
    agreement: Agreement

    @property
    def name(self) -> str:
        return " + ".join(h.name for h in self.hypotheses)


def explain(
    facts: Facts, states: SlideStates, recipe: Recipe, gate: TokenGate, plan: Plan, on_progress: OnProgress
) -> Iterator[Tried]:
    """Try the known differences one at a time, then two at a time, all in fp32 with its `gate`."""
    trials = Trials(facts, states)

    def attempt(hypotheses: tuple[Hypothesis, ...], changed: Recipe) -> Tried | None:
        try:
            return Tried(hypotheses, compare_tokens(trials.tokens(changed), facts.reference.tokens, gate))
        except InputError:  # off the position grid: the reference's code cannot have run it either
            return None

    todo: list[tuple[tuple[Hypothesis, ...], Recipe]] = [((IN_FP32,), recipe)] if plan.in_fp32 else []
    todo += _planned(recipe, facts)
    for done, (hypotheses, changed) in enumerate(todo):
        on_progress("known differences", done, len(todo) + 1)
        tried = attempt(hypotheses, changed)
        if tried is not None:
            yield tried
            if tried.agreement.exact and plan.stop:
                return
    found = trials.recover_order(recipe)
    tried = attempt((RECOVERED,), found) if found is not None else None
    on_progress("known differences", len(todo) + 1, len(todo) + 1)
    if tried is not None:
        yield tried


def _planned(recipe: Recipe, facts: Facts) -> Iterator[tuple[tuple[Hypothesis, ...], Recipe]]:
    """Singles, then pairs that change different things; a recipe that an earlier one makes as well is left out."""
    seen = {recipe}
    single: list[tuple[Hypothesis, Recipe]] = []
    for hypothesis in HYPOTHESES:
        changed = hypothesis.apply(recipe, facts)
        if changed is not None and changed not in seen:
            seen.add(changed)
            single.append((hypothesis, changed))
            yield (hypothesis,), changed
    for (one, first), (two, second) in combinations(single, 2):
        if _changes(recipe, first) & _changes(recipe, second):
            continue
        both = two.apply(first, facts)
        if both is not None and both not in seen:
            seen.add(both)
            yield (one, two), both


def _changes(recipe: Recipe, changed: Recipe) -> set[str]:
    return {f.name for f in fields(Recipe) if getattr(recipe, f.name) != getattr(changed, f.name)}
