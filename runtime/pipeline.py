"""Slide and question in, answer out, from one engine bundle."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.config import GenerationSettings, SlideSettings
from wsi_rt.runtime.encode import (
    Encoded,
    OnProgress,
    encode_tiles,
    encode_tokens,
    ignored_settings,
    input_kind,
    load_tiles,
    load_tokens,
    other_precisions,
    require_own,
)
from wsi_rt.runtime.engines.base import Engine
from wsi_rt.runtime.errors import FeatureFileError, InputError
from wsi_rt.runtime.llm.decoder import Decoder
from wsi_rt.runtime.llm.loop import CancelSignal, generate
from wsi_rt.runtime.llm.prefix import SlidePrefix, prefill_prefix
from wsi_rt.runtime.llm.prompt import PromptTokens, encode_prompt
from wsi_rt.runtime.llm.scheduler import Request
from wsi_rt.runtime.llm.tokenizer import Tokenizer
from wsi_rt.runtime.timing import Stopwatch
from wsi_rt.runtime.types import POOLED_TOKENS, Answer

STAGES = ("open", "tissue", "tiles", "tile_encoder", "slide_encoder", "projector", "prefill", "decode")
QUESTION_ROOM = 256  # tokens; a slide's KV has room for questions up to a multiple of this, so that they share it
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

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._clock = Stopwatch()
        self._engines: dict[str, Engine] = {}
        self._decoder: Decoder | None = None
        self._tokenizer: Tokenizer | None = None
        self._prefix: SlidePrefix | None = None

    @classmethod
    def open(cls, engines: str | Path, threads: int | None = None) -> Pipeline:
        """Raises InputError (no bundle there), EngineMismatchError (edited, damaged, another machine's)."""
        clock = Stopwatch()
        with clock.measure("open"):
            pipeline = cls(Bundle.open(engines, threads))
        pipeline._clock = clock
        return pipeline

    def encode(
        self,
        source: str | Path,
        settings: SlideSettings | None = None,
        *,
        tokens: bool = True,
        on_progress: OnProgress = _no_progress,
    ) -> Encoded:
        """A slide, an `.h5` of tile features or a `.pt` of slide tokens -> features and (with `tokens`) tokens.

        Raises SlideError, FeatureFileError, InputError; see `runtime.encode`.
        """
        path, settings, clock = Path(source), settings or SlideSettings(), Stopwatch()
        kind = input_kind(path)
        if kind != "slide" and not path.is_file():
            what = "not a regular file" if path.exists() else "no such file"
            raise FeatureFileError(f"{path}: {what}, expected a slide, an .h5 of tile features or a .pt of tokens")
        if kind == "slide_tokens":
            encoded = load_tokens(path, *self._token_widths())
        elif kind == "tile_features":
            encoded = load_tiles(path, settings)
        else:
            encoder = self._engine("tile_encoder")
            encoded = encode_tiles(path, settings, encoder, self.bundle.threads, clock, on_progress)
        require_own(encoded, self.bundle.manifest.components, str(path))
        others = other_precisions(encoded, self.bundle.manifest.components, self.bundle.target)
        notes = (*ignored_settings(kind, settings), *encoded.notes, *others)
        encoded = replace(encoded, notes=notes, settings=settings)
        if tokens and encoded.tokens is None:
            on_progress("slide encoder", 0, 1)
            encoded = encode_tokens(encoded, settings.position_tile, self._engine("slide_encoder"), clock)
            on_progress("slide encoder", 1, 1)
        return replace(encoded, timings_ms=clock.ms)

    def ask(
        self,
        source: str | Path | Encoded,
        question: str,
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
        if isinstance(source, Encoded):
            if slide_settings is not None:
                raise InputError("slide_settings given with an input that is encoded already: give them to encode()")
            require_own(source, self.bundle.manifest.components, "this encoded input")
        settings = settings or self.default_generation()
        prompt = encode_prompt(self._open_tokenizer(), settings.template, question)
        self._require_room(prompt)
        if isinstance(source, Encoded):
            encoded = replace(source, timings_ms={})
        else:
            encoded = self.encode(source, slide_settings, on_progress=on_progress)
        clock = Stopwatch()
        prefix = self._slide_prefix(encoded, prompt, settings, clock)
        decoder = self._open_decoder()
        request = Request(
            embeds=decoder.embed(np.array(prompt.after, np.int64)),
            settings=settings,
            kv=prefix.kv,
            slide_tokens=prefix.slide_tokens,
        )
        generation = generate(decoder, self._open_tokenizer(), request, on_text, cancel)
        clock.add("prefill", generation.prefill_ms)
        clock.add("decode", generation.decode_ms)
        timings = {**encoded.timings_ms, **clock.ms, **self._take_open_ms()}
        return Answer(
            text=generation.text,
            token_ids=generation.token_ids,
            stop_reason=generation.stop_reason,
            timings_ms={stage: timings.get(stage, 0.0) for stage in STAGES},
            tiles=encoded.tiles,
            engines={name: c.digest for name, c in self.bundle.manifest.components.items()},
            settings={**settings.to_json(), "slide": self._slide_settings(encoded), **self._machine()},
            notes=(*encoded.notes, *generation.notes, *self._weights_note()),
        )

    def default_generation(self) -> GenerationSettings:
        """The bundle's recorded defaults."""
        return GenerationSettings.from_json(dict(self.bundle.manifest.generation))

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
        if self._decoder is not None:
            self._decoder.close()
        self._decoder = self._prefix = None

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            with self._clock.measure("open"):
                self._engines[name] = self.bundle.engine(name)
        return self._engines[name]

    def _open_decoder(self) -> Decoder:
        if self._decoder is None:
            with self._clock.measure("open"):
                self._decoder = self.bundle.decoder()
        return self._decoder

    def _open_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            with self._clock.measure("open"):
                self.bundle.component("llm")
                self._tokenizer = self.bundle.tokenizer()
        return self._tokenizer

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

    def _require_room(self, prompt: PromptTokens) -> None:
        context = int(self.bundle.component("llm").config["context"])
        total = prompt.text_tokens + POOLED_TOKENS
        if total >= context:
            raise InputError(
                f"the question makes a prompt of {total} tokens ({len(prompt.after)} of the question, {POOLED_TOKENS} "
                f"of the slide), expected fewer than the context of {context}; shorten the question"
            )

    def _slide_prefix(
        self, encoded: Encoded, prompt: PromptTokens, settings: GenerationSettings, clock: Stopwatch
    ) -> SlidePrefix:
        """The slide's prefix, from the question before when it is the same slide and there is room."""
        if encoded.tokens is None:
            raise InputError("this input was encoded without slide tokens; encode it with tokens=True")
        decoder, tokens = self._open_decoder(), encoded.tokens.tokens
        fixed = len(prompt.before) + POOLED_TOKENS
        question = -(-len(prompt.after) // QUESTION_ROOM) * QUESTION_ROOM
        needed = min(fixed + question + settings.max_new_tokens, decoder.spec.context_length)
        key = hashlib.sha256(tokens.tobytes() + repr(prompt.before).encode()).hexdigest()
        prefix = self._prefix
        if prefix is not None and prefix.key == key and prefix.kv.capacity >= needed:
            prefix.kv.rewind(prefix.length)
            return prefix
        self._prefix = None  # free its KV before the next one is made
        projector = self._engine("projector")
        with clock.measure("projector"):
            projected = projector.run({"tokens": tokens})["embeds"]
        with clock.measure("prefill"):
            self._prefix = prefill_prefix(decoder, prompt.before, projected, needed, key)
        return self._prefix

    def _slide_settings(self, encoded: Encoded) -> dict[str, object]:
        """What was asked for, and what the slide or file turned out to be."""
        out: dict[str, object] = dict(encoded.settings.to_json())
        if encoded.slide is not None:
            out |= {"reader": encoded.slide.provenance.maker, "mpp0": encoded.slide.mpp0}
            out |= {"mpp_source": encoded.slide.mpp_source}
        if encoded.features is not None:
            out |= {"patch_size_level0": encoded.features.grid.patch_size_level0, "order": encoded.features.grid.order}
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
        return {"target": target, "precision": precision, "threads": self.bundle.threads}
