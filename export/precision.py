"""`--precision`: one word for every component that supports it, or `component=precision,...`."""

from __future__ import annotations

from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.manifest import COMPONENTS

# What each component can be built in, its default first.
SUPPORTED: dict[str, tuple[str, ...]] = dict.fromkeys(COMPONENTS, ("fp32",))


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
