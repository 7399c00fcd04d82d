"""The decoder in torch: on an NVIDIA GPU with Triton kernels and CUDA graphs, on the CPU the same operators in plain
torch. It has not run on a GPU yet.

It reads the weights of the bundle's portable graphs, whatever target that was built for. Keys and values live in pages
of one pool (torch_pages.py). A step of one token for each sequence has static shapes and is replayed as a CUDA graph,
padded to the next bucket (torch_steps.py); prompts, and what decodes beside them, go operator by operator
(torch_mixed.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from wsi_rt.kernels.shared_prefix_attention.configs import WIDTHS
from wsi_rt.runtime.engines.torch_device import choose_device, compute_dtype, describe
from wsi_rt.runtime.engines.torch_engine import plain_failure
from wsi_rt.runtime.engines.torch_graphs import Capture, Staging, doubling
from wsi_rt.runtime.errors import InputError, MachineError, WsiRtError
from wsi_rt.runtime.llm.decoder import F32, KV, Chunk, Decoder, DecoderSpec, PrefixKV
from wsi_rt.runtime.llm.room import available_bytes
from wsi_rt.runtime.llm.torch_attention import choose_attention
from wsi_rt.runtime.llm.torch_mixed import MixedRows
from wsi_rt.runtime.llm.torch_model import TorchLlama
from wsi_rt.runtime.llm.torch_pages import PAGE, PagePool, TorchKV, TorchPrefix
from wsi_rt.runtime.llm.torch_steps import DecodeSteps
from wsi_rt.runtime.llm.torch_weights import StoredTensors
from wsi_rt.runtime.manifest import Compiled, EngineManifest

BUCKETS = doubling(64)  # rows of the graphs for decoding: 1, 2, 4, ... 64
HOLDERS = 64  # sequences, prefixes and conversations at a time that may each leave a page all but empty


class TorchDecoder(Decoder):
    """Rows of a call share the linear layers, so torch's order of summation depends on how many there are: a token's
    logits are the same to rounding only.

    Activations and KV are fp16 or bf16 where the model was compiled so, else fp32; integer weights stay integers.
    facts: where it runs, in which type, and what it chose to run on. spec.kv_bytes: for HOLDERS sequences and prefixes
    or fewer, however they are cut into pages.

    `embed` reads the table where it is stored, on the host: nothing of it is on the GPU.
    """

    def __init__(
        self,
        manifest: EngineManifest,
        tensors: StoredTensors,
        precision: str,
        device: torch.device,
        kv_bytes: int | None = None,
        buckets: Sequence[int] = BUCKETS,
        capture: Capture | None = None,
    ) -> None:
        c, dtype = manifest.config, compute_dtype(precision)
        self._device, self._table = device, tensors.floats("model.embed_tokens.weight").numpy()  # f32 [vocab, hidden]
        model = TorchLlama(c, tensors, dtype, device)
        per_token = 2 * c["layers"] * c["kv_heads"] * c["head_width"] * dtype.itemsize
        pages = _page_count(per_token, device, kv_bytes)
        self._pool = PagePool(c["layers"], c["kv_heads"], c["head_width"], pages, dtype, device)
        staging, (attention, told) = Staging(device), choose_attention(device, dtype)
        self._mixed: MixedRows | None = MixedRows(model, self._pool, attention, staging, device)
        self._steps: DecodeSteps | None = DecodeSteps(
            model, self._pool, c["context"], staging, device, buckets, capture
        )
        self.facts = {
            "device": describe(device),
            "dtype": str(dtype).removeprefix("torch."),
            "prefill_attention": told,
            "decode": f"CUDA graphs of {buckets[0]} to {buckets[-1]} rows" if device.type == "cuda" else "no graphs",
            "kv": f"{pages} pages of {PAGE} tokens, {pages * PAGE * per_token} bytes",
        }
        self.spec = DecoderSpec(
            vocab_size=c["vocab"],
            hidden_size=c["hidden"],
            context_length=c["context"],
            kv_bytes_per_token=per_token,
            row_exact=False,
            kv_bytes=(pages - HOLDERS) * PAGE * per_token,
        )

    @classmethod
    def open(
        cls,
        root: Path,
        manifest: EngineManifest,
        compiled: Compiled,
        threads: int,
        fast: bool = False,
        device: torch.device | None = None,
        kv_bytes: int | None = None,
    ) -> TorchDecoder:
        """device: another than `choose_device` says. kv_bytes: of all keys and values at a time (None: what half of the
        memory holds that is free once the weights are there).

        Raises InputError for `fast`, and on a GPU for head widths that its kernels do not take; MachineError without
        onnx, which reads the weights, and where they or the pages do not fit; EngineMismatchError when the graphs lack
        a tensor. Sets torch's threads for the whole process.
        """
        if fast:
            raise InputError("the torch decoder has no --fast, expected to be opened without")
        device = device or choose_device()
        width = manifest.config["head_width"]
        if device.type == "cuda" and width not in WIDTHS:
            raise InputError(
                f"heads of {width}, expected {' or '.join(map(str, WIDTHS))} on a GPU; use --target ort-cpu"
            )
        torch.set_num_threads(threads)
        tensors = StoredTensors(root / path for path in manifest.portable.values())
        with plain_failure("llm"), torch.no_grad():
            return cls(manifest, tensors, compiled.precision, device, kv_bytes)

    def close(self) -> None:
        self._mixed = self._steps = None
        self._pool.close()

    def new_kv(self, capacity: int, prefix: PrefixKV | None = None) -> TorchKV:
        self._require_capacity(capacity, prefix)
        if prefix is not None and not (isinstance(prefix, TorchPrefix) and prefix.pages.pool is self._pool):
            raise TypeError(f"prefix is another decoder's {type(prefix).__name__}, expected this one's own TorchPrefix")
        return TorchKV(self._pool, capacity, prefix)

    def freeze(self, kv: KV) -> TorchPrefix:
        kv = self._own(kv)
        self._require_to_share(kv)
        return kv.hand_over()

    def load_prefix(self, layers: Sequence[F32]) -> TorchPrefix:
        c = self._pool
        self._require_layers(layers, c.layers, c.kv_heads, c.head_width)
        with plain_failure("llm"):
            return TorchPrefix.of(self._pool, layers)

    def embed(self, token_ids: NDArray[np.int64]) -> F32:
        self._opened()
        return self._table[token_ids]

    def extend(self, chunks: Sequence[Chunk]) -> list[F32]:
        self._require_fit(chunks)
        mixed, steps = self._opened()
        kvs = [self._own(c.kv) for c in chunks]
        self._pool.reserve([(kv.pages, kv.own_length + len(c.embeds)) for kv, c in zip(kvs, chunks, strict=True)])
        try:
            with plain_failure("llm"), torch.no_grad():
                logits = (steps if steps.take(chunks) else mixed)(chunks, kvs)
                if self._device.type == "cuda":  # else a failure would come after the KVs have grown
                    torch.cuda.current_stream(self._device).synchronize()
        except BaseException:
            for kv in kvs:
                kv.pages.cut(kv.own_length)
            raise
        for kv, c in zip(kvs, chunks, strict=True):
            kv.length += len(c.embeds)
        return logits

    def _opened(self) -> tuple[MixedRows, DecodeSteps]:
        if self._mixed is None or self._steps is None:
            raise WsiRtError("this decoder is closed")
        return self._mixed, self._steps

    def _own(self, kv: KV) -> TorchKV:
        if not (isinstance(kv, TorchKV) and kv.pages.pool is self._pool):
            raise TypeError(f"KV is another decoder's {type(kv).__name__}, expected this one's own TorchKV")
        return kv


def _page_count(bytes_per_token: int, device: torch.device, kv_bytes: int | None) -> int:
    """Pages of the pool, HOLDERS more than the tokens need. Raises MachineError when too little memory is free."""
    page_bytes = PAGE * bytes_per_token
    if kv_bytes is not None:
        return -(-kv_bytes // page_bytes) + HOLDERS
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading the weights left
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = available_bytes()
    pages = free // 2 // page_bytes
    if pages <= HOLDERS:
        raise MachineError(
            f"{free} bytes are free for keys and values on {device}, half of which must hold more than {HOLDERS} pages "
            f"of {page_bytes}; free some, or use a machine with more"
        )
    return pages
