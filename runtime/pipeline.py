"""Slide and question in, answer out, from one engine bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from wsi_rt.runtime.asking import Asking, Dialogue, OnText
from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.config import GenerationSettings, SlideSettings
from wsi_rt.runtime.encode import (
    Encoded,
    OnProgress,
    ignored_settings,
    input_kind,
    load_tiles,
    load_tokens,
    other_precisions,
    require_own,
)
from wsi_rt.runtime.encode_slide import choose_tiles
from wsi_rt.runtime.engines.base import Engine
from wsi_rt.runtime.errors import FeatureFileError, InputError
from wsi_rt.runtime.features.compat import refuse_other_encoder, refuse_other_mpp, refuse_other_order
from wsi_rt.runtime.features.coords import TileCoords, read_coords
from wsi_rt.runtime.features.store import FeatureStore
from wsi_rt.runtime.llm.generation import Generation
from wsi_rt.runtime.llm.language_model import ModelSettings, Question
from wsi_rt.runtime.llm.loop import CancelSignal
from wsi_rt.runtime.stored import Task, encode_stored, file_identity, with_tokens
from wsi_rt.runtime.timing import Stopwatch
from wsi_rt.runtime.types import Answer

STAGES = ("open", "tissue", "tiles", "tile_encoder", "slide_encoder", "projector", "prefill", "decode")
PUBLISHED_WIDTH, PUBLISHED_PADDED = 768, 1024  # slide tokens as published files hold them


def _no_progress(stage: str, done: int, total: int) -> None:
    pass


class Pipeline:
    """An open bundle. Context manager; components open when first needed. Not thread-safe.

    >>> with Pipeline.open("engines/") as pipeline:
    ...     slide = pipeline.encode("slide.svs")
    ...     for question in ("What is the grade?", "Is necrosis present?"):
    ...         print(pipeline.ask(slide, question).text)  # the slide is encoded and prefilled once
    """

    def __init__(self, bundle: Bundle, store: FeatureStore | None = None, model: ModelSettings | None = None) -> None:
        self.bundle = bundle
        self.store = store
        self._clock = Stopwatch()
        self._engines: dict[str, Engine] = {}
        self._asking = Asking(bundle, self._engine, model)

    @classmethod
    def open(
        cls,
        engines: str | Path,
        threads: int | None = None,
        store: FeatureStore | None = None,
        model: ModelSettings | None = None,
        target: str | None = None,
    ) -> Pipeline:
        """store: where slides encoded before are looked up, and kept; None: every slide is encoded. model: how the
        language model runs: memory, prefixes on disk. target: which of the bundle's, see Bundle.open.

        Raises InputError (no bundle there), MachineError (no GPU for a target that needs one), EngineMismatchError
        (edited, damaged, another machine's).
        """
        clock = Stopwatch()
        with clock.measure("open"):
            pipeline = cls(Bundle.open(engines, threads, target), store, model)
        pipeline._clock = clock
        return pipeline

    def encode(
        self,
        source: str | Path,
        settings: SlideSettings | None = None,
        *,
        tokens: bool = True,
        features: bool = True,
        coords: str | Path | None = None,
        on_progress: OnProgress = _no_progress,
    ) -> Encoded:
        """A slide, an `.h5` of tile features or a `.pt` of slide tokens -> features and (with `tokens`) tokens.

        features: False says that tokens are enough, so that a stored slide's features are not loaded.
        coords: an `.h5` with the coordinates of a slide's tiles, instead of tissue detection.
        Raises SlideError, FeatureFileError, InputError; see `runtime.encode`.
        """
        path, settings, clock = Path(source), settings or SlideSettings(), Stopwatch()
        kind = input_kind(path)
        task = Task(self.bundle, self._engine, settings.position_tile, tokens, features, clock, on_progress)
        if kind == "slide":
            encoded = self._encode_slide(path, settings, coords, task)
        else:
            encoded = self._load(path, settings, coords)
        require_own(encoded, self.bundle.manifest.components, str(path))
        others = other_precisions(encoded, self.bundle.manifest.components, self.bundle.target)
        acting = settings if coords is None else replace(settings, keep_order=False, patch_size_level0=None)
        notes = (*ignored_settings(kind, acting), *encoded.notes, *others)
        encoded = replace(encoded, notes=notes, settings=settings)
        if tokens and encoded.tokens is None:
            encoded = with_tokens(encoded, task)
        return replace(encoded, timings_ms=clock.ms)

    def _encode_slide(self, path: Path, settings: SlideSettings, coords: str | Path | None, task: Task) -> Encoded:
        """With tokens where there is a store, which keeps them as well."""
        chosen_by: TileCoords | None = None
        if coords is not None:
            if settings.roi is not None:
                raise InputError("--coords and --roi given, expected one of them: the file says which tiles")
            chosen_by = read_coords(coords, sort=not settings.keep_order, patch_size_level0=settings.patch_size_level0)
        before = file_identity(path) if self.store is not None else None
        with choose_tiles(path, settings, self.bundle.threads, task.clock, task.on_progress, chosen_by) as chosen:
            notes = (*chosen.notes, *(chosen_by.notes if chosen_by is not None else ()))
            return encode_stored(replace(chosen, notes=notes), self.store, task, before)

    def _load(self, path: Path, settings: SlideSettings, coords: str | Path | None) -> Encoded:
        """Features or tokens of a file, refused where it says that they are not what this bundle works on."""
        if coords is not None:
            raise InputError(f"--coords given, but {path} is no slide; expected a slide to read the tiles of")
        if not path.is_file():
            what = "not a regular file" if path.exists() else "no such file"
            raise FeatureFileError(f"{path}: {what}, expected a slide, an .h5 of tile features or a .pt of tokens")
        if input_kind(path) == "slide_tokens":
            encoded = load_tokens(path, *self._token_widths())
            if encoded.tokens is not None:
                refuse_other_order(encoded.tokens, settings, str(path))
            return encoded
        encoded = load_tiles(path, settings)
        if encoded.features is None:
            return encoded
        refuse_other_mpp(encoded.features, encoded.file_attributes or {}, settings, str(path))
        own = self.bundle.manifest.components.get("tile_encoder")
        notes = refuse_other_encoder(encoded.features, own.config if own else None, str(path))
        return replace(encoded, notes=(*encoded.notes, *notes))

    def ask(
        self,
        source: str | Path | Encoded,
        question: str | Question,
        settings: GenerationSettings | None = None,
        slide_settings: SlideSettings | None = None,
        *,
        on_text: Callable[[str], None] | None = None,
        on_progress: OnProgress = _no_progress,
        cancel: CancelSignal | None = None,
    ) -> Answer:
        """Answer one question about an input (as `encode` takes it, or what `encode` returned).

        `settings` default to the bundle's; `slide_settings` belong to an input that is yet to be read. Everything
        that can be refused is refused before the slide is read: question, context length. Raises WsiRtError
        subclasses.
        """
        heard = None if on_text is None else lambda _, piece: on_text(piece)
        return self.ask_many(
            source, [question], settings, slide_settings, on_text=heard, on_progress=on_progress, cancel=cancel
        )[0]

    def ask_many(
        self,
        source: str | Path | Encoded,
        questions: Sequence[str | Question],
        settings: GenerationSettings | None = None,
        slide_settings: SlideSettings | None = None,
        *,
        on_text: OnText | None = None,
        on_progress: OnProgress = _no_progress,
        cancel: CancelSignal | None = None,
    ) -> list[Answer]:
        """As `ask`, for several questions on one slide, answered together: each as if it were asked alone, the slide's
        part of the prompt computed once. `on_text(i, piece)`: of question i. The first answer's timings have what was
        done once; prefill and decode are wall time as each question saw it, so they overlap."""
        asked = [q if isinstance(q, Question) else Question(q) for q in questions]
        settings = settings or self.default_generation()
        encoded = self._encoded(source, asked, settings, slide_settings, on_progress)
        clock = Stopwatch()
        generations = self._asking.ask(encoded, asked, settings, clock, on_text, cancel)
        once: dict[str, float] = {**encoded.timings_ms, **clock.ms}
        answers = []
        for generation in generations:
            answers.append(self._answer(encoded, generation, settings, once))
            once = {}
        return answers

    @contextmanager
    def converse(
        self,
        source: str | Path | Encoded,
        settings: GenerationSettings | None = None,
        slide_settings: SlideSettings | None = None,
        *,
        on_progress: OnProgress = _no_progress,
    ) -> Iterator[Dialogue]:
        """Several turns about one input: every question is asked with what was said before.

        >>> with pipeline.converse("slide.svs") as dialogue:
        ...     dialogue.ask("What is the grade?")
        ...     dialogue.ask("Which features support it?")
        """
        settings, clock = settings or self.default_generation(), Stopwatch()
        encoded = self._encoded(source, [], settings, slide_settings, on_progress)
        with self._asking.converse(encoded, settings.template, clock) as conversation:
            once: dict[str, float] = {**encoded.timings_ms, **clock.ms}

            def answer(generation: Generation) -> Answer:
                made = self._answer(encoded, generation, settings, once)
                once.clear()
                return made

            yield Dialogue(conversation, settings, answer)

    def _encoded(
        self,
        source: str | Path | Encoded,
        questions: Sequence[Question],
        settings: GenerationSettings,
        slide_settings: SlideSettings | None,
        on_progress: OnProgress,
    ) -> Encoded:
        """The input with its tokens, once questions are known to be acceptable (none: a conversation's come later)."""
        if isinstance(source, Encoded):
            if slide_settings is not None:
                raise InputError("slide_settings given with an input that is encoded already: give them to encode()")
            require_own(source, self.bundle.manifest.components, "this encoded input")
        self._asking.check(questions, settings, self._clock)
        if isinstance(source, Encoded):
            return replace(source, timings_ms={})
        return self.encode(source, slide_settings, features=False, on_progress=on_progress)

    def _answer(
        self, encoded: Encoded, generation: Generation, settings: GenerationSettings, once: Mapping[str, float]
    ) -> Answer:
        """once: timings of what was done for this answer and others."""
        own = {"prefill": generation.prefill_ms, "decode": generation.decode_ms}
        timings = {**once, **own, "open": once.get("open", 0.0) + self._take_open_ms().get("open", 0.0)}
        notes = (*encoded.notes, *generation.notes, *self._asking.take_notes(), *self._weights_note())
        return Answer(
            text=generation.text,
            token_ids=generation.token_ids,
            stop_reason=generation.stop_reason,
            timings_ms={stage: timings.get(stage, 0.0) for stage in STAGES},
            tiles=encoded.tiles,
            engines={name: c.digest for name, c in self.bundle.manifest.components.items()},
            settings={**settings.to_json(), "slide": self._slide_settings(encoded), **self._machine()},
            notes=notes,
            choices=generation.choices,
        )

    def default_generation(self) -> GenerationSettings:
        """The bundle's recorded defaults."""
        return GenerationSettings.from_json(dict(self.bundle.manifest.generation))

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
        self._asking.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            with self._clock.measure("open"):
                self._engines[name] = self.bundle.engine(name)
        return self._engines[name]

    def _take_open_ms(self) -> dict[str, float]:
        """Opening time since the last answer."""
        ms, self._clock = self._clock.ms, Stopwatch()
        return ms

    def _token_widths(self) -> tuple[int, int | None]:
        """Width the projector takes, and the narrower one that is zero-padded to it (None: refused).

        Tokens that were normed before padding may lack the zeros; a norm as wide as the padding means
        they cannot (SPEC 3). Without a slide encoder in the bundle the published widths apply.
        """
        width = int(self.bundle.component("projector").config["widths"][0])
        encoder = self.bundle.manifest.components.get("slide_encoder")
        if encoder is None:
            return width, PUBLISHED_WIDTH if width == PUBLISHED_PADDED else None
        unpadded, norm = int(encoder.config["width"]), int(encoder.config["norm_width"])
        return width, unpadded if norm == unpadded < width else None

    def _slide_settings(self, encoded: Encoded) -> dict[str, object]:
        """What was asked for, and what the slide or file turned out to be."""
        out: dict[str, object] = dict(encoded.settings.to_json())
        if encoded.slide is not None:
            out |= {"reader": encoded.slide.provenance.maker, "mpp0": encoded.slide.mpp0}
            out |= {"mpp_source": encoded.slide.mpp_source}
        grid = encoded.features.grid if encoded.features is not None else encoded.grid
        if grid is not None:
            out |= {"patch_size_level0": grid.patch_size_level0, "order": grid.order}
        if encoded.tokens is not None:
            out["position_tile"] = encoded.tokens.provenance.settings.get(
                "position_tile", encoded.settings.position_tile
            )
        return out

    def _weights_note(self) -> tuple[str, ...]:
        synthetic = self.bundle.manifest.source["synthetic"]
        return ("these engines hold synthetic weights; the answer has no meaning",) if synthetic else ()

    def _machine(self) -> dict[str, object]:
        target, components = self.bundle.target, self.bundle.manifest.components
        precision = {name: c.targets[target].precision for name, c in components.items() if target in c.targets}
        fast = {"fast": True} if self._asking.fast else {}
        facts = {**{name: engine.facts for name, engine in self._engines.items()}, "llm": self._asking.facts}
        told = {name: dict(of_one) for name, of_one in facts.items() if of_one}  # of what is open
        runs = {"runs": told} if told else {}
        return {"target": target, "precision": precision, "threads": self.bundle.threads, **runs, **fast}
