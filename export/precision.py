"""`--precision`: one word for every component that supports it, or `component=precision,...`; and how each precision
stores a component's Linear layers."""

from __future__ import annotations

import math

from wsi_rt.export.arch import LM_HEAD, ComponentConfig, linear_shapes, parameter_count
from wsi_rt.export.quantise import BlockFormat, FormatOf
from wsi_rt.runtime.errors import InputError

# What each component can be built in, its default first.
SUPPORTED: dict[str, tuple[str, ...]] = {
    "tile_encoder": ("fp32", "int8"),
    "slide_encoder": ("fp32", "int8"),
    "projector": ("fp32",),
    "llm": ("fp32", "int8", "int4"),
}

# The encoders run hundreds of rows at a time, where blocks of 128 reach 400 GOP/s and blocks of 32 300 (onnxruntime
# 1.32, two cores); their weights' error is the same. The language model's steps are one row, and blocks of 32 give the
# same bits whatever the batch.
_ENCODER_INT8 = BlockFormat(bits=8, block=128, symmetric=True)
_INT8 = BlockFormat(bits=8, block=32, symmetric=True)
_INT4 = BlockFormat(bits=4, block=32, symmetric=False)

# What `int4` keeps in 8 bits. On SmolLM2 (135 M) in 4 bits alone v_proj costs 5.9 % of perplexity and down_proj 7.1 %,
# gate_proj 2.4 % and the others about 1 % each; all of them 21 %, and 5.8 % with these kept. A 7 B model grows by a
# quarter (5.1 GB, not 4.1).
_SENSITIVE = ("v_proj", "down_proj", LM_HEAD)


def format_of(component: str, precision: str) -> FormatOf:
    """How `component` stores its Linear layers in this precision."""
    if precision == "fp32":
        return lambda _: None
    if component != "llm":
        return lambda _: _ENCODER_INT8
    if precision == "int8":
        return lambda _: _INT8
    return lambda name: _INT8 if name.endswith(_SENSITIVE) else _INT4


def formats(config: ComponentConfig, precision: str) -> dict[str, dict[str, object]]:
    """What the manifest records: format -> its parameters and how many Linear layers have it."""
    found: dict[str, dict[str, object]] = {}
    choose = format_of(config.component, precision)
    for name in linear_shapes(config):
        form = choose(name)
        if form is not None:
            entry = found.setdefault(f"int{form.bits}x{form.block}", {**form.to_json(), "layers": 0})
            entry["layers"] = int(str(entry["layers"])) + 1
    return found


def weight_bytes(config: ComponentConfig, precision: str) -> int:
    """Of a component's weights as one graph stores them; a tied output layer is stored beside the table."""
    choose = format_of(config.component, precision)
    linears = {name: (choose(name), shape) for name, shape in linear_shapes(config).items()}
    own = [shape for name, (_, shape) in linears.items() if f"{name}.weight" in config.tensors()]
    rest = 4 * (parameter_count(config) - sum(math.prod(s) for s in own))
    return rest + sum(4 * math.prod(s) if form is None else form.nbytes(s) for form, s in linears.values())


def parse_precision(text: str | None) -> dict[str, str]:
    """-> precision per component. A bare word applies where it is supported and must be somewhere.

    Raises InputError on an unknown component or precision.
    """
    chosen = {name: choices[0] for name, choices in SUPPORTED.items()}
    if text is None:
        return chosen
    everything = sorted({p for choices in SUPPORTED.values() for p in choices})
    if "=" not in text:
        if text not in everything:
            raise InputError(f"--precision is {text!r}, expected {' or '.join(everything)}, or component=precision,...")
        return {name: text if text in SUPPORTED[name] else chosen[name] for name in chosen}
    for item in text.split(","):
        name, _, precision = item.partition("=")
        if precision not in SUPPORTED.get(name, ()):
            known = "; ".join(f"{n}={'|'.join(c)}" for n, c in SUPPORTED.items())
            raise InputError(f"--precision has {item!r}, expected {known}")
        chosen[name] = precision
    return chosen
