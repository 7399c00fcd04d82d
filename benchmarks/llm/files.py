"""What providers open, made once in a cache folder: engine bundle, GGUF, onnxruntime-genai's folder, reference logits.

All of them from one checkpoint, `synthetic:<preset>?seed=0`. Each is made in a process of its own, which gives its
memory back.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wsi_rt.benchmarks.llm.cases import GATE_PROMPT, GATE_STEPS, token_ids
from wsi_rt.runtime.errors import EngineMismatchError, InputError, WsiRtError

if TYPE_CHECKING:
    from wsi_rt.export.arch import LlamaConfig
    from wsi_rt.export.sources.weights import WeightSource

PRECISION = "int4"
GENAI_MOST_PARAMETERS = 2e9  # its builder wants the whole checkpoint on disk and in memory
_BYTES = {"reference": 0.01, "gguf": 0.65, "genai": 6.0}  # on disk, per parameter


@dataclass(frozen=True)
class Files:
    """Where the files of one preset stand. engines: a bundle that is there already, else one is built."""

    preset: str
    cache: Path
    engines: Path | None = None
    threads: int | None = None

    @property
    def word(self) -> str:
        """The checkpoint."""
        return f"synthetic:{self.preset}?seed=0"

    @property
    def folder(self) -> Path:
        return self.cache / self.preset

    def get(self, kind: str) -> str:
        """The path of a file of this kind (providers.NEEDS), made when it is not there. Raises WsiRtError when it
        cannot be made."""
        if kind == "source":
            return self.word
        self.folder.mkdir(parents=True, exist_ok=True)
        if kind == "bundle":
            return str(self.engines or self._bundle())
        suffix = {"gguf": ".gguf", "genai": "-genai", "reference": ".npy"}[kind]
        path = self.folder / f"{kind}{suffix}"
        if not path.exists():
            _run(
                [sys.executable, "-m", "wsi_rt.benchmarks.llm.files", kind, self.word, str(path)], f"making the {kind}"
            )
        return str(path)

    def _bundle(self) -> Path:
        out = self.folder / f"bundle-{PRECISION}"
        command = [sys.executable, "-m", "wsi_rt.runtime.cli", "build-engines", "--checkpoint", self.word]
        command += ["--components", "llm", "--precision", PRECISION, "--fast", "--out", str(out)]
        command += ["--threads", str(self.threads)] if self.threads else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode in (InputError.exit_code, EngineMismatchError.exit_code) and out.is_dir():
            # Of other code, or of an older schema: what stands there is ours.
            done = subprocess.run([*command, "--force"], capture_output=True, text=True, check=False)
        _require(done, "building the bundle")
        return out


def source_of(word: str) -> tuple[LlamaConfig, WeightSource]:
    """The language model of a synthetic checkpoint."""
    from wsi_rt.export.arch import LlamaConfig
    from wsi_rt.export.sources.checkpoint import Sources, resolve

    part = resolve(Sources(checkpoint=word)).parts["llm"]
    if not isinstance(part.config, LlamaConfig):
        raise TypeError(f"llm is a {type(part.config).__name__}")
    return part.config, part.source


def make(kind: str, word: str, path: Path) -> None:
    """Write one file, aside first: it is whole or not there."""
    from wsi_rt.export.arch import parameter_count
    from wsi_rt.runtime.staging import require_room

    c, source = source_of(word)
    require_room(path, int(_BYTES[kind] * parameter_count(c)), f"the {kind} file of {word} needs about")
    aside = path.with_name(f"making-{path.name}")
    if kind == "reference":
        with aside.open("wb") as f:
            np.save(f, reference_logits(c, source))
    elif kind == "gguf":
        from wsi_rt.benchmarks.llm.gguf_file import write_gguf

        _write_about(path.with_suffix(".json"), c, write_gguf(c, source, aside))
    else:
        _make_genai(c, source, aside)
    aside.replace(path)


def gate_tokens(vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """The prompt and the tokens given after it, on which logits are held against the reference."""
    return token_ids("gate.prompt", GATE_PROMPT, vocab), token_ids("gate.steps", GATE_STEPS, vocab)


def reference_logits(c: LlamaConfig, source: WeightSource) -> np.ndarray:
    """f32 [GATE_STEPS + 1, vocab] of the fp32 model with the checkpoint's own weights."""
    from wsi_rt.export.arch import EMBED_TOKENS
    from wsi_rt.export.parity import reference_outputs

    prompt, steps = gate_tokens(c.vocab)
    embeds = source.get(f"{EMBED_TOKENS}.weight")[prompt]
    return reference_outputs(c, source, {"embeds": embeds, "token_ids": steps}).outputs["logits"]


def _make_genai(c: LlamaConfig, source: WeightSource, folder: Path) -> None:
    """onnxruntime-genai's model builder on the checkpoint in Hugging Face's layout, which is removed again."""
    from wsi_rt.export.arch import parameter_count
    from wsi_rt.export.layouts.configs import llama_json
    from wsi_rt.export.layouts.writers import Piece
    from wsi_rt.export.tokenizer import synthetic_tokenizer

    if parameter_count(c) > GENAI_MOST_PARAMETERS:
        raise InputError(f"its builder takes small shapes only here: {parameter_count(c) / 1e9:.1f} B parameters")
    import torch

    checkpoint = folder.with_name("genai-checkpoint")
    for stale in (checkpoint, folder):
        shutil.rmtree(stale, ignore_errors=True)
    checkpoint.mkdir()
    synthetic_tokenizer(checkpoint, c.vocab)
    (checkpoint / "config.json").write_text(json.dumps(llama_json(c)))
    Piece("model.safetensors", source).write(checkpoint, torch.float32)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(folder)]
    _run([*command, "-p", PRECISION, "-e", "cpu", "-c", str(folder / "cache")], "onnxruntime-genai's builder")
    shutil.rmtree(checkpoint)
    data = sum(p.stat().st_size for p in folder.glob("*.data"))
    _write_about(folder / "about.json", c, data - 4 * c.vocab * c.hidden)


def _write_about(path: Path, c: LlamaConfig, read_bytes: int) -> None:
    values = 2 * c.layers * c.kv_heads * c.head_width
    path.write_text(json.dumps({"read_bytes": read_bytes, "kv_values_per_token": values}))


def _run(command: list[str], what: str) -> None:
    _require(subprocess.run(command, capture_output=True, text=True, check=False), what)


def _require(done: subprocess.CompletedProcess[str], what: str) -> None:
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise WsiRtError(f"{what} failed: {lines[-1][:200]}")


if __name__ == "__main__":
    make(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
