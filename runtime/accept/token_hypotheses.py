"""Known differences between the published slide tokens and ours, tried one at a time.

A recipe says how tokens come from tile features; a hypothesis changes one thing of it. All run in the bundle's own
slide encoder, in its precision. The next known difference is one more entry of HYPOTHESES.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.accept.reference import Agreement, Allowance, Closeness, Reference, compare_tokens
from wsi_rt.runtime.accept.report import OnProgress
from wsi_rt.runtime.encode import Encoded, encode_tokens
from wsi_rt.runtime.engines.base import Engine
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.features.order import ORDERS
from wsi_rt.runtime.timing import Stopwatch
from wsi_rt.runtime.types import TILE_PX, TileFeatures

FITTED_TILES = 16  # a column's weight and bias are two numbers: this many tokens leave enough to be told by
_NORMED = 5e-3  # of a row after a norm without weights: mean off 0, mean square off 1; fp16 storage stays below


@dataclass(frozen=True)
class Recipe:
    """How tokens are made of tile features. order: a key of ORDERS; divisor: of the position grid; refit: the
    reference is standardised, and a norm's weight and bias fitted to it, before it is compared."""

    order: str
    divisor: int
    swapped: bool = False
    refit: bool = False


@dataclass(frozen=True)
class Facts:
    """What the hypotheses may look at. features: in the file's order, or as our tiler made them; norm_width: columns
    that the checkpoint's norm is over."""

    features: TileFeatures
    from_file: bool
    reference: Reference
    norm_width: int


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


def _norm_was(how: str) -> Callable[[Recipe, Facts], Recipe | None]:
    def apply(recipe: Recipe, facts: Facts) -> Recipe | None:
        fits = len(facts.features.grid) >= FITTED_TILES and how == norm_reading(facts.reference, facts.norm_width)
        return replace(recipe, refit=True) if fits else None

    return apply


DIVISORS = (
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
)
IN_ORDER = tuple(
    Hypothesis(f"{name} order", f"the reference's tiles are in {says}", _in_order(order))
    for name, order, says in (
        ("column-major", "column-major", "column-major order (x, y)"),
        ("row-major", "row-major", "row-major order: leave out --keep-order"),
        ("file", "file", "the file's order: give --keep-order"),
        ("reversed", "reversed", "reversed row-major order"),
        ("file-name", "names", "the order of their file names"),
    )
)
HYPOTHESES = (
    *(
        Hypothesis(name, says, _norm_was(name))
        for name, says in (
            ("missing norm", "the reference lacks the norm after pooling"),
            ("fresh norm", "the reference's norm has weight 1 and bias 0: the checkpoint's was not loaded"),
            (
                "padded before a fresh norm",
                "the reference was padded first and normed over the padded width by a norm that was not loaded",
            ),
        )
    ),
    *DIVISORS,
    *IN_ORDER,
    Hypothesis(
        "coordinates (y, x)",
        "the reference took the tile coordinates as (y, x)",
        lambda recipe, _: replace(recipe, swapped=True),
    ),
)


@dataclass(frozen=True)
class Tried:
    """One hypothesis, or a divisor and an order together, and how close they come."""

    hypotheses: tuple[Hypothesis, ...]
    agreement: Agreement

    @property
    def name(self) -> str:
        return " + ".join(h.name for h in self.hypotheses)


def explain(
    facts: Facts, encoder: Engine, recipe: Recipe, allowed: Allowance, on_progress: OnProgress
) -> Iterator[Tried]:
    """Try the known differences one at a time, then a divisor with an order, until one agrees exactly."""
    todo = list(_planned(recipe, facts))
    for done, (hypotheses, changed) in enumerate(todo):
        on_progress("known differences", done, len(todo))
        try:
            ours: NDArray[Any] = tokens_by(changed, facts.features, encoder)
        except InputError:  # off the position grid: the reference's code cannot have run it either
            continue
        theirs: NDArray[Any] = facts.reference.tokens
        if changed.refit:
            ours, theirs = refitted(theirs, ours, facts.norm_width)
        tried = Tried(hypotheses, compare_tokens(ours, theirs, allowed))
        yield tried
        if tried.agreement.closeness == Closeness.EXACT:
            break
    on_progress("known differences", len(todo), len(todo))


def _planned(recipe: Recipe, facts: Facts) -> Iterator[tuple[tuple[Hypothesis, ...], Recipe]]:
    """A recipe that an earlier hypothesis makes as well is left out."""
    pairs = ((divisor, order) for divisor in DIVISORS for order in IN_ORDER)
    seen = {recipe}
    for hypotheses in (*((h,) for h in HYPOTHESES), *pairs):
        changed: Recipe | None = recipe
        for hypothesis in hypotheses:
            changed = hypothesis.apply(changed, facts) if changed is not None else None
        if changed is not None and changed not in seen:
            seen.add(changed)
            yield hypotheses, changed


def tokens_by(recipe: Recipe, features: TileFeatures, encoder: Engine) -> NDArray[np.float32]:
    """One run of the slide encoder -> tokens [576, C]. Raises InputError for tiles off the position grid."""
    order = ORDERS[recipe.order](features.grid.xy0)
    xy0 = features.grid.xy0[order]
    grid = replace(features.grid, xy0=xy0[:, ::-1] if recipe.swapped else xy0)
    encoded = encode_tokens(
        Encoded(None, replace(features, x=features.x[order], grid=grid), {}), recipe.divisor, encoder, Stopwatch()
    )
    if encoded.tokens is None:
        raise ValueError("encode_tokens() gave no tokens")
    return encoded.tokens.tokens


def norm_reading(reference: Reference, norm_width: int) -> str:
    """What the rows say of a norm other than the checkpoint's, as the name of a hypothesis."""
    if reference.padding.any() and _plainly_normed(reference.tokens):
        return "padded before a fresh norm"
    return "fresh norm" if _plainly_normed(reference.tokens[:, :norm_width]) else "missing norm"


def _plainly_normed(x: NDArray[np.float32]) -> bool:
    """Every row has mean 0, and half of them mean square 1 (a row that hardly varied stays below)."""
    mean, square = x.mean(axis=1, dtype=np.float64), np.square(x, dtype=np.float64).mean(axis=1)
    return bool(np.abs(mean).max() <= _NORMED and abs(np.median(square) - 1) <= _NORMED)


def refitted(reference: NDArray[np.float32], ours: NDArray[np.float32], width: int) -> tuple[NDArray[np.float64], ...]:
    """(our tokens, the reference once standardised and fitted to ours), [576, width], less our mean token.

    After another norm than the checkpoint's, or none, each column lies on a line over ours: two numbers for 576 tokens.
    Without the mean, what is alike in all tokens of a slide cannot pass for agreement.
    """
    x, y = (
        np.pad(a, ((0, 0), (0, max(0, width - a.shape[1]))))[:, :width].astype(np.float64) for a in (reference, ours)
    )
    z = (x - x.mean(axis=1, keepdims=True)) / np.maximum(x.std(axis=1, keepdims=True), 1e-30)
    z, y = z - z.mean(axis=0), y - y.mean(axis=0)
    return y, z * ((z * y).sum(axis=0) / np.maximum((z * z).sum(axis=0), 1e-30))
