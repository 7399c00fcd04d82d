"""The tokens' section of the report: our encoding of a slide beside the published one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wsi_rt.runtime.accept.reference import (
    Agreement,
    Allowance,
    Closeness,
    Reference,
    allowance,
    compare_tokens,
)
from wsi_rt.runtime.accept.report import Level, OnProgress, Section
from wsi_rt.runtime.accept.token_hypotheses import Facts, Recipe, Tried, explain
from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.encode import Encoded, input_kind, load_tiles
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.features.pooled import TELLING_TILES
from wsi_rt.runtime.features.rounding import ROUNDING
from wsi_rt.runtime.pipeline import Pipeline

HALF = "as close as half-precision arithmetic comes and no closer: computed in fp16 or bf16, or a few tiles differ"


@dataclass(frozen=True)
class Comparison:
    """as_run: what `wsi-rt encode` gives with the same flags. tried: the known differences, in the order tried."""

    as_run: Agreement
    allowed: Allowance
    tiles: int
    reference: Reference
    tried: Sequence[Tried] = ()

    @property
    def found(self) -> Tried | None:
        """The difference that makes them agree. Where nothing changed comes near as well, it has to come twice as
        close: reduced precision makes the gate too wide to tell differences apart by it alone."""
        if self.as_run.closeness == Closeness.EXACT:
            return None
        near = [t for t in self.tried if t.agreement.closeness < Closeness.FAR]
        best = min(near, key=lambda t: (t.agreement.closeness, t.agreement.median_error), default=None)
        rival = self.as_run.closeness < Closeness.FAR
        if best is None or (rival and best.agreement.median_error > self.as_run.median_error / 2):
            return None
        return best


def compare_slide(
    pipeline: Pipeline, path: Path, settings: SlideSettings, reference: Reference, on_progress: OnProgress
) -> Section:
    """Encode `path` (a slide, or an .h5 of tile features) once and compare; on a difference, explain it.

    Raises what Pipeline.encode raises, and InputError for a file that holds no tile features.
    """
    if input_kind(path) == "slide_tokens":
        raise InputError(f"--slide is {path}, expected a slide or an .h5 of tile features: two .pt say too little")
    encoded = pipeline.encode(path, settings, on_progress=on_progress)
    if encoded.tokens is None or encoded.features is None:
        raise ValueError("encode() gave no tokens")
    bundle, features = pipeline.bundle, encoded.features
    allowed = allowance(bundle.manifest, bundle.target, features, reference.storage)
    as_run = compare_tokens(encoded.tokens.tokens, reference.tokens, allowed)
    comparison = Comparison(as_run, allowed, len(features.grid), reference)
    if as_run.closeness > Closeness.EXACT:
        norm_width = int(bundle.component("slide_encoder").config["norm_width"])
        facts = _facts(path, settings, encoded, reference, norm_width)
        recipe = Recipe(
            "file" if settings.keep_order and facts.from_file else "row-major",
            settings.position_tile or features.grid.patch_size_level0,
        )
        with bundle.engine("slide_encoder") as encoder:
            comparison = replace(comparison, tried=tuple(explain(facts, encoder, recipe, allowed, on_progress)))
    return _section(comparison, encoded.notes)


def _facts(path: Path, settings: SlideSettings, encoded: Encoded, reference: Reference, norm_width: int) -> Facts:
    features, from_file = encoded.features, input_kind(path) == "tile_features"
    if from_file:  # once more, in the file's own order
        features = load_tiles(path, replace(settings, keep_order=True)).features
    if features is None:
        raise ValueError("no tile features")
    return Facts(features, from_file, reference, norm_width)


def _section(c: Comparison, notes: Sequence[str]) -> Section:
    level, difference = _judge(c)
    a, gate, found = c.as_run, c.allowed.gate, c.found
    lines = [
        f"{a.agreeing} of {a.tokens} agree as run; cosine min {a.min_cosine:.6f}, median {a.median_cosine:.6f}; "
        f"relative error {a.max_rel:.1e} (at most {gate.max_rel:.0e}); {c.tiles} tiles",
        *(f"note: {n}" for n in notes),
        *(f"the {name} that made ours is {p}, which the gate allows for" for name, p in c.allowed.reduced.items()),
    ]
    if c.reference.storage != "fp32":
        lines.append(f"the reference's {c.reference.storage} storage allows {ROUNDING[c.reference.storage]:.0e} more")
    lines += [
        f"  with {t.name}: {t.agreement.agreeing} agree, cosine min {t.agreement.min_cosine:.6f}, "
        f"relative error {t.agreement.max_rel:.1e}"
        for t in c.tried
        if len(t.hypotheses) == 1 or t.agreement.closeness < Closeness.FAR
    ]
    figures = {
        "as_run": a.to_json(),
        "gate": {"max_rel": gate.max_rel, "min_cosine": gate.min_cosine},
        "reduced_precision": dict(c.allowed.reduced),
        "tiles": c.tiles,
        "reference_tiles": c.reference.tiles,
        "tried": [{"name": t.name, **t.agreement.to_json()} for t in c.tried],
        "explained_by": [h.name for h in found.hypotheses] if found else [],
        "notes": list(notes),
    }
    return Section("tokens", level, difference, tuple(lines), figures)


def _judge(c: Comparison) -> tuple[Level, tuple[str, ...]]:
    found = c.found
    agreement = found.agreement if found else c.as_run
    if agreement.closeness == Closeness.FAR:
        return Level.DIFFERS, (_unexplained(c),)
    told = [h.says for h in found.hypotheses] if found else []
    told += [f"the tokens are {HALF} (cosine at least {agreement.min_cosine:.5f})"] * (
        agreement.closeness == Closeness.HALF
    )
    if agreement.closeness > Closeness.EXACT:
        told += [_rounded(name, precision) for name, precision in c.allowed.reduced.items()]
    return (Level.EXPLAINED if told else Level.AGREES), tuple(told)


def _rounded(name: str, precision: str) -> str:
    return (
        f"the {precision} {name.replace('_', ' ')} that made ours rounds its weights and activations, which may be all "
        f"of the difference: one built with --precision {name}=fp32 would tell"
    )


def _unexplained(c: Comparison) -> str:
    """No known difference makes them agree: what the tokens themselves still tell, and what would tell more."""
    supply = "give the reference's tile coordinates with its features (an .h5, and --keep-order) as --slide"
    few, theirs = c.tiles <= TELLING_TILES, c.reference.tiles
    if theirs is not None and theirs != c.tiles:
        ratio = (theirs / c.tiles) ** 0.5  # along each side
        more = f"{ratio:.2g} times as many" if ratio > 1 else f"{1 / ratio:.2g} times fewer"
        scale = "" if 0.7 < ratio < 1.4 else f" ({more} along each side, as another --target-mpp would give)"
        made = f"the reference was made of {theirs} tiles, ours of {c.tiles}{scale}"
        return f"{made}: another mpp, tissue or tile set; {supply}"
    if theirs is None and few:
        return (
            f"the reference's tokens do not repeat as those of {c.tiles} tiles do: it was made of more than "
            f"{TELLING_TILES} tiles (another mpp, tissue or tile set), or by another pooling; {supply}"
        )
    return (
        f"no known difference makes the tokens agree (cosine median {c.as_run.median_cosine:.4f}): another tile set, "
        f"tile encoder or checkpoint, which tokens alone cannot tell apart; {supply}"
    )
