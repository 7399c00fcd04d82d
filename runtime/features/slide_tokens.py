"""Slide tokens: the 576 pooled and normed tokens of a slide in a torch file, as WSI-LLaVA publishes them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_rt.runtime.errors import FeatureFileError
from wsi_rt.runtime.features.stamp import STAMP, dump_stamp, load_stamp
from wsi_rt.runtime.features.torch_file import parse_tensor, read_bounded, write_tensor
from wsi_rt.runtime.types import POOLED_TOKENS, Provenance, SlideTokens

MAX_TOKENS_BYTES = 1 << 28  # [576, 1024] f32 takes 2.4 MB; the rest is room for a view into a larger storage
_ENTRY = f"{STAMP}.json"


def read_slide_tokens(path: str | os.PathLike[str], widths: Collection[int] | None = None) -> SlideTokens:
    """Slide tokens of a `.pt` file: one tensor [576, C] or [1, 576, C], fp32, fp16 or bf16 -> [576, C] f32.

    widths: the C that the caller can use (768: unpadded, 1024: padded, in the published model); None takes any.
    `provenance.digest` is the SHA-256 of the file. `distinct` is known for files that wsi-rt wrote.

    Raises: FeatureFileError for an unsafe or malformed file (torch_file.py), another shape, width or dtype, and
    values that are not finite. Source: SPEC 6.
    """
    data = read_bounded(path, MAX_TOKENS_BYTES)
    array, stamp = parse_tensor(data, str(path), max_bytes=MAX_TOKENS_BYTES, extra=_ENTRY)
    tokens = _checked(array, str(path), widths)
    provenance, facts = stamped(data, stamp)
    distinct = facts.get("distinct")
    known = isinstance(distinct, int) and not isinstance(distinct, bool) and 1 <= distinct <= POOLED_TOKENS
    return SlideTokens(tokens, provenance, distinct if known else None)


def stamped(data: bytes, entry: bytes | None) -> tuple[Provenance, dict[str, Any]]:
    """(provenance, the stamp's other facts) of a torch file's bytes and its entry of ours."""
    return load_stamp(entry, digest=hashlib.sha256(data).hexdigest(), otherwise="external slide tokens")


def _checked(array: NDArray[Any], where: str, widths: Collection[int] | None) -> NDArray[np.float32]:
    shape = array.shape[1:] if array.ndim == 3 and array.shape[0] == 1 else array.shape
    fits = len(shape) == 2 and shape[0] == POOLED_TOKENS and shape[1] > 0
    if not fits or (widths is not None and shape[1] not in widths):
        accepted = " or ".join(f"[{POOLED_TOKENS}, {w}]" for w in sorted(widths or ())) or f"[{POOLED_TOKENS}, C]"
        raise FeatureFileError(
            f"{where} holds a tensor {list(array.shape)}, expected slide tokens {accepted} (a leading 1 is fine): "
            "make them with `wsi-rt encode SLIDE --engines DIR --out tokens.pt`"
        )
    if array.dtype.kind != "f":
        raise FeatureFileError(f"{where} holds {array.dtype}, expected slide tokens in float32, float16 or bfloat16")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf and is refused below
        tokens = np.ascontiguousarray(array.reshape(shape), dtype=np.float32)
    bad = int(tokens.size - np.isfinite(tokens).sum())
    if bad:
        row = int(np.flatnonzero(~np.isfinite(tokens).all(axis=1))[0])
        raise FeatureFileError(
            f"{where} holds {bad} values of {tokens.size} that are not finite (first in token {row}), "
            "expected finite numbers: encode the slide again, in bf16 or fp32"
        )
    return tokens


def write_slide_tokens(path: str | os.PathLike[str], tokens: SlideTokens) -> None:
    """Write `tokens.tokens` [576, C] f32 as a file that `torch.load(weights_only=True)` and WSI-LLaVA read.

    Provenance and `distinct` travel in an entry that torch ignores. Atomic; same tokens, same bytes.

    Raises: FeatureFileError (shape, dtype, values that are not finite), MachineError, InputError (disk).
    """
    array = _checked(tokens.tokens, f"what would be written to {path}", None)
    write_tensor(path, array, extra={_ENTRY: dump_stamp(tokens.provenance, distinct=tokens.distinct)})
