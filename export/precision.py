"""`--precision`: one word for every component that supports it, or `component=precision,...`; and how each precision
stores a component's Linear layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from wsi_rt.export.arch import LM_HEAD, ComponentConfig, linear_shapes, parameter_count
from wsi_rt.export.quantise import BlockFormat, FormatOf
from wsi_rt.runtime.errors import InputError

# What each component can be built in for `ort-cpu`, its default first.
SUPPORTED: dict[str, tuple[str, ...]] = {
    "tile_encoder": ("fp32", "int8"),
    "slide_encoder": ("fp32", "int8"),
    "projector": ("fp32",),
    "llm": ("fp32", "int8", "int4"),
}
# Where a target has no fp32, fp16 is the default: it has three more bits than bf16 and loses an eighth as much
# (`runtime.parity.GATES`). Not of the slide encoder, whose sums of exponentials leave fp16's range (65,504) at the
# published width with synthetic weights; nor of anything that a build refuses for its range.
_HALF = ("fp16", "bf16")
_COMPILED = {name: _HALF[::-1] if name == "slide_encoder" else _HALF for name in SUPPORTED}
_BY_TARGET: dict[str, Mapping[str, tuple[str, ...]]] = {
    "torch": {name: (*choices, *_HALF) for name, choices in SUPPORTED.items()},
    "ort-cuda": dict.fromkeys(SUPPORTED, ("fp32",)),
    "tensorrt": _COMPILED,
    "tensorrt-rtx": _COMPILED,
}


def supported(target: str) -> Mapping[str, tuple[str, ...]]:
    """Of a target, as SUPPORTED is of `ort-cpu`."""
    return _BY_TARGET.get(target, SUPPORTED)


# Short blocks have a scale of their own for activations, too: a channel 30 times the others spoils its block, not the
# whole row. And one row gives the same bits whatever the batch: true in onnxruntime 1.32 for 8 bits in blocks of 32 and
# 64, for 4 bits only of 32; blocks of 128 would run hundreds of rows at 400 GOP/s instead of 300. Of 64 rather than 32,
# 8 bits are read 11 % faster from memory by one row, and computed a fifth faster by hundreds.
_INT8 = BlockFormat(bits=8, block=64, symmetric=True)
_INT4 = BlockFormat(bits=4, block=32, symmetric=False)

# What `int4` keeps in 8 bits. On SmolLM2 (135 M) in 4 bits alone v_proj costs 5.9 % of perplexity, down_proj 7.1,
# gate_proj 2.4, up_proj 1.4, o_proj 0.8, q_proj 0.7 and k_proj 0.5; all of them 21 %. Without the first two 8.4 % is
# left, rounded activations included; o_proj is the cheapest next step. A 7 B model takes 5.9 GB instead of 4.7.
_SENSITIVE = ("v_proj", "o_proj", "down_proj", LM_HEAD)

# Encoders run hundreds of rows at a time: whole rows are one integer product, 387 GOP/s a core instead of 147 in blocks
# of 32 (onnxruntime 1.32 with VNNI). Layers that lose too much by it are found at build time (`sensitive`).
_ROWS = BlockFormat(bits=8, block=0, symmetric=True)
_BY_ROWS = ("tile_encoder", "slide_encoder")
# What such a layer gets, the first that does: 200 GOP/s a core in blocks of 128, 147 in blocks of 32, 105 in fp32.
_INT8_LONG = BlockFormat(bits=8, block=128, symmetric=True)
WIDER: tuple[BlockFormat | None, ...] = (_INT8_LONG, BlockFormat(bits=8, block=32, symmetric=True), None)

# What `--fast` stores a second time, for calls of many rows. Perplexity of SmolLM2, 22.8 in fp32: beside int4 (24.3)
# whole rows are more exact (23.7; 23.5 with down_proj, whose inputs stand out most, in blocks of 128); beside int8
# (22.9) they would cost 3 %, and blocks of 128 (23.0) are still a third faster than those of 32.
_WIDE_IN_BLOCKS = {"int4": ("down_proj",), "int8": ("",)}  # the others in whole rows


def format_of(precision: str, component: str = "llm") -> FormatOf:
    """How a component's Linear layers are stored in this precision."""
    if precision in ("fp32", *_HALF):
        return lambda _: None
    if precision == "int8":
        return lambda _: _ROWS if component in _BY_ROWS else _INT8
    return lambda name: _INT8 if name.endswith(_SENSITIVE) else _INT4


def formats(config: ComponentConfig, precision: str, choose: FormatOf | None = None) -> dict[str, dict[str, object]]:
    """What the manifest records: format -> its parameters and how many Linear layers have it. choose: where it is not
    the precision alone that says which."""
    found: dict[str, dict[str, object]] = {}
    choose = choose or format_of(precision, config.component)
    for name in linear_shapes(config):
        form = choose(name)
        if form is not None:
            entry = found.setdefault(form.name, {**form.to_json(), "layers": 0})
            entry["layers"] = int(str(entry["layers"])) + 1
    return found


def wide_format_of(precision: str) -> Callable[[str], BlockFormat]:
    """How `--fast` also stores a language model's Linear layers, for calls of many rows, beside this precision."""
    in_blocks = _WIDE_IN_BLOCKS[precision]
    return lambda name: _INT8_LONG if name.endswith(in_blocks) else _ROWS


def wide_formats(config: ComponentConfig, precision: str) -> dict[str, dict[str, object]]:
    """What the manifest records of that."""
    found = formats(config, precision, wide_format_of(precision))
    return {f"{name}, wide": entry for name, entry in found.items()}


def wide_bytes(config: ComponentConfig, precision: str) -> int:
    choose = wide_format_of(precision)
    return sum(choose(name).nbytes(shape) for name, shape in linear_shapes(config).items())


def weight_bytes(config: ComponentConfig, precision: str) -> int:
    """Of a component's weights as one graph stores them; a tied output layer is stored beside the table."""
    choose = format_of(precision, config.component)
    linears = {name: (choose(name), shape) for name, shape in linear_shapes(config).items()}
    own = [shape for name, (_, shape) in linears.items() if f"{name}.weight" in config.tensors()]
    rest = 4 * (parameter_count(config) - sum(math.prod(s) for s in own))
    return rest + sum(4 * math.prod(s) if form is None else form.nbytes(s) for form, s in linears.values())


def parse_precision(text: str | None, components: Sequence[str], target: str = "ort-cpu") -> dict[str, str]:
    """-> precision of each of `components`. A bare word applies where it is supported and must be somewhere.

    Raises InputError on an unknown component or precision, one that none of `components` supports for the target, and
    repeats.
    """
    all_of_them = supported(target)
    choices_of = {name: all_of_them[name] for name in components}
    chosen = {name: choices[0] for name, choices in choices_of.items()}
    if text is None:
        return chosen
    known = "; ".join(f"{n}={'|'.join(c)}" for n, c in choices_of.items())
    if target != "ort-cpu":
        known += f" for {target}"
    if "=" not in text:
        if not any(text in choices for choices in choices_of.values()):
            words = " or ".join(sorted({p for choices in choices_of.values() for p in choices}))
            raise InputError(f"--precision is {text!r}, expected {words}, or component=precision,... with {known}")
        return {name: text if text in choices else chosen[name] for name, choices in choices_of.items()}
    items = [item.partition("=")[::2] for item in text.split(",")]
    for name, precision in items:
        if precision not in all_of_them.get(name, ()):
            raise InputError(f"--precision has {f'{name}={precision}'!r}, expected {known}")
        if name not in choices_of:
            raise InputError(f"--precision names {name}, which is not built here, expected {known}")
        if sum(other == name for other, _ in items) > 1:
            raise InputError(f"--precision names {name} twice, expected each component once")
    return chosen | dict(items)
