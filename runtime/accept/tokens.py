"""The tokens' section of the report: our encoding of a slide beside the published one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wsi_rt.runtime.accept.agreement import ROUNDING, Agreement, TokenGate, compare_tokens, gate_of
from wsi_rt.runtime.accept.reference import TELLING_TILES, Reference
from wsi_rt.runtime.accept.report import Level, OnProgress, Section
from wsi_rt.runtime.accept.slide import IN_FP32, Facts, Plan, Recipe, Tried, explain
from wsi_rt.runtime.accept.states import SlideStates
from wsi_rt.runtime.config import SlideSettings
from wsi_rt.runtime.encode import Encoded, input_kind, load_tiles
from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.pipeline import Pipeline

HALF = "as close as half-precision arithmetic comes and no closer: computed in fp16 or bf16, or a few tiles differ"


@dataclass(frozen=True)
class Comparison:
    """as_run: what `wsi-rt encode` gives with the same flags. tried: the known differences, in the order tried.

    wide: the tile encoder's reduced precision makes the gate wide, so that the closest counts, not the first inside.
    """

    as_run: Agreement
    gate: TokenGate
    tiles: int
    reference: Reference
    tried: Sequence[Tried] = ()
    wide: bool = False

    @property
    def base(self) -> Agreement:
        """Nothing changed, in fp32."""
        return next((t.agreement for t in self.tried if t.hypotheses == (IN_FP32,)), self.as_run)

    @property
    def found(self) -> Tried | None:
        """The difference that makes them agree: inside the gate, or as close as half precision comes; where nothing
        changed does so as well, it has to come twice as close."""
        changed = [t for t in self.tried if t.hypotheses != (IN_FP32,)]
        near = [t for t in changed if t.agreement.exact] or [t for t in changed if t.agreement.half]
        best = min(near, key=lambda t: t.agreement.median_error, default=None)
        rival = (self.base.exact and self.wide) or (not self.base.exact and self.base.half)
        if best is None or (self.base.exact and not self.wide):
            return None
        return None if rival and best.agreement.median_error > self.base.median_error / 2 else best


def compare_slide(
    pipeline: Pipeline,
    states: SlideStates | None,
    path: Path,
    settings: SlideSettings,
    reference: Reference,
    on_progress: OnProgress,
) -> Section:
    """Encode `path` (a slide, or an .h5 of tile features) once and compare; on a difference, explain it.

    Raises what Pipeline.encode raises, and InputError for a file that holds no tile features.
    """
    kind = input_kind(path)
    if kind == "slide_tokens":
        raise InputError(f"--slide is {path}, expected a slide or an .h5 of tile features: two .pt say too little")
    encoded = pipeline.encode(path, settings, on_progress=on_progress)
    if encoded.tokens is None or encoded.features is None:
        raise ValueError("encode() gave no tokens")
    manifests, target = pipeline.bundle.manifest.components, pipeline.bundle.target
    names = ("slide_encoder",) if kind == "tile_features" else ("tile_encoder", "slide_encoder")
    own = [manifests[name] for name in names]
    reduced = {c.name for c in own if c.compiled(target).precision != "fp32"}
    gate = gate_of(own, target, reference.storage)
    as_run = compare_tokens(encoded.tokens.tokens, reference.tokens, gate)
    comparison = Comparison(as_run, gate, len(encoded.features.grid), reference, wide="tile_encoder" in reduced)
    if states is not None and (reduced or not as_run.exact):
        facts = _facts(path, settings, encoded, reference, states)
        recipe = Recipe(
            "file" if settings.keep_order and facts.from_file else "row-major",
            settings.position_tile or facts.features.grid.patch_size_level0,
        )
        plan = Plan(in_fp32="slide_encoder" in reduced, stop="tile_encoder" not in reduced)
        fp32 = gate_of(own, target, reference.storage, fp32=True)
        comparison = replace(comparison, tried=tuple(explain(facts, states, recipe, fp32, plan, on_progress)))
    return _section(comparison, encoded.notes)


def _facts(path: Path, settings: SlideSettings, encoded: Encoded, reference: Reference, states: SlideStates) -> Facts:
    features, from_file = encoded.features, input_kind(path) == "tile_features"
    if from_file:  # once more, in the file's own order
        features = load_tiles(path, replace(settings, keep_order=True)).features
    if features is None:
        raise ValueError("no tile features")
    return Facts(features, from_file, reference, states.norm_width, states.padded)


def _section(c: Comparison, notes: Sequence[str]) -> Section:
    level, difference = _judge(c)
    a = c.as_run
    lines = [
        f"{a.agreeing} of {a.tokens} agree as run; cosine min {a.min_cosine:.6f}, median {a.median_cosine:.6f}; "
        f"relative error {a.max_rel:.1e} (at most {c.gate.max_rel:.0e}); {c.tiles} tiles",
        *(f"note: {n}" for n in notes),
    ]
    if c.reference.storage != "fp32":
        lines.append(f"the reference's {c.reference.storage} storage allows {ROUNDING[c.reference.storage]:.0e} more")
    lines += [
        f"  with {t.name}: {t.agreement.agreeing} agree, cosine min {t.agreement.min_cosine:.6f}, "
        f"relative error {t.agreement.max_rel:.1e}"
        for t in c.tried
        if len(t.hypotheses) == 1 or t.agreement.exact
    ]
    figures = {
        "as_run": a.to_json(),
        "gate": {"max_rel": c.gate.max_rel, "min_cosine": c.gate.min_cosine},
        "tiles": c.tiles,
        "reference_tiles": c.reference.tiles,
        "tried": [{"name": t.name, **t.agreement.to_json()} for t in c.tried],
        "explained_by": [h.name for h in c.found.hypotheses] if c.found else [],
        "notes": list(notes),
    }
    return Section("tokens", level, difference, tuple(lines), figures)


def _judge(c: Comparison) -> tuple[Level, tuple[str, ...]]:
    found = c.found
    if found is not None:
        also = () if found.agreement.exact else (f"the tokens then are {HALF}",)
        return Level.EXPLAINED, (*(h.says for h in found.hypotheses), *also)
    if c.as_run.exact and c.base.exact:
        return Level.AGREES, ()
    if c.base.exact:
        return Level.EXPLAINED, (IN_FP32.says,)
    if c.base.half:
        return Level.EXPLAINED, (f"the tokens are {HALF} (cosine at least {c.base.min_cosine:.5f})",)
    return Level.DIFFERS, (_unexplained(c),)


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
