"""llama.cpp through llama-cpp-python's low-level functions: Q4_0 weights, its default fp16 keys and values."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterable
from time import perf_counter
from typing import Any

import numpy as np

from wsi_rt.benchmarks.llm.cases import Slide
from wsi_rt.benchmarks.llm.providers import Place
from wsi_rt.benchmarks.llm.providers.base import F32, Answers, CannotError, Ids, Model, choose

# (token, position, sequence, whether its logits are wanted)
Row = tuple[int, int, int, bool]


class LlamaCpp(Model):
    """Prompt caching: a slide's prefix stays in the cache, and what follows it is removed for the next question."""

    note = "Q4_0; token ids stand for the slide's embeddings"

    def __init__(self, place: Place) -> None:
        import llama_cpp

        self._c: Any = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)  # held: the library keeps it
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        gguf = place.path("gguf")
        model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise CannotError(f"llama.cpp does not open {gguf.name}")
        self._context = llama_cpp.llama_init_from_model(model, self._parameters(place))
        if not self._context:
            raise CannotError(f"llama.cpp makes no context of {place.context} x {place.sequences} tokens")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._lengths: list[int] = []
        self._cached = 0
        about = json.loads(gguf.with_suffix(".json").read_text())
        self.weight_bytes, self.kv_bytes_per_token = about["read_bytes"], about["kv_values_per_token"] * 2

    def _parameters(self, place: Place) -> Any:
        p = self._c.llama_context_default_params()
        p.n_ctx = place.context * (1 if place.sequences == 1 else 4)  # a shared prefix is held once
        p.n_seq_max, p.kv_unified = place.sequences, True
        p.n_batch = place.context
        p.n_threads = p.n_threads_batch = place.threads
        return p

    def prefill(self, ids: Ids) -> F32:
        self._forget()
        self._lengths = [len(ids)]
        return self._decode([(t, i, 0, i == len(ids) - 1) for i, t in enumerate(ids.tolist())])[0]

    def step(self, ids: Ids) -> F32:
        return self._step_some(range(len(ids)), ids.tolist())

    def _step_some(self, sequences: Iterable[int], tokens: Iterable[int]) -> F32:
        rows = [(token, self._lengths[i], i, True) for i, token in zip(sequences, tokens, strict=True)]
        for _, _, i, _ in rows:
            self._lengths[i] += 1
        return self._decode(rows)

    def shared(self, prefix: Ids, questions: tuple[Ids, ...]) -> F32:
        self.prefill(prefix)
        for i in range(1, len(questions)):
            self._c.llama_memory_seq_cp(self._memory, 0, i, 0, len(prefix))
        rows: list[Row] = []
        for i, question in enumerate(questions):
            last = len(question) - 1
            rows += [(t, len(prefix) + j, i, j == last) for j, t in enumerate(question.tolist())]
        self._lengths = [len(prefix) + len(q) for q in questions]
        return self._decode(rows)

    def begin(self, prefix: Ids) -> None:
        self.prefill(prefix)
        self._cached = len(prefix)

    def ask(self, question: Ids) -> F32:
        self._c.llama_memory_seq_rm(self._memory, 0, self._cached, -1)
        last, self._lengths = len(question) - 1, [self._cached + len(question)]
        return self._decode([(t, self._cached + j, 0, j == last) for j, t in enumerate(question.tolist())])[0]

    def _forget(self) -> None:
        self._c.llama_memory_clear(self._memory, True)

    def _decode(self, rows: list[Row]) -> F32:
        """-> logits [wanted rows, vocab]."""
        batch = self._c.llama_batch_init(len(rows), 0, 1)
        try:
            batch.n_tokens = len(rows)
            for i, (token, position, sequence, wanted) in enumerate(rows):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            if code := self._c.llama_decode(self._context, batch):
                raise CannotError(f"llama_decode of {len(rows)} tokens gives {code}")
        finally:
            self._c.llama_batch_free(batch)
        wanted_rows = [i for i, row in enumerate(rows) if row[3]]
        found = [self._c.llama_get_logits_ith(self._context, i) for i in wanted_rows]
        return np.stack([np.ctypeslib.as_array(x, (self._vocab,)).copy() for x in found])


class Batched(LlamaCpp):
    """A slide's questions as parallel sequences behind its prefix: what llama.cpp can do, and no published runner of
    its does."""

    note = "Q4_0; all questions as parallel sequences that share the prefix's cells"

    def answer_slide(self, slide: Slide) -> Answers:
        start = perf_counter()
        logits = self.shared(slide.prefix, slide.questions)
        tokens = [[choose(x, slide.options, n)] for x, n in zip(logits, slide.answers, strict=True)]
        first = perf_counter() - start
        for done in range(1, max(slide.answers)):
            running = [i for i, wanted in enumerate(slide.answers) if wanted > done]
            for i, row in zip(running, self._step_some(running, [tokens[i][-1] for i in running]), strict=True):
                tokens[i].append(int(row.argmax()))
        return Answers(tokens, [first] * len(tokens))
