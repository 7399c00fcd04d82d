"""Which GPU architectures a build is for."""

from __future__ import annotations

from collections.abc import Mapping

from wsi_rt.runtime.devices import gpus, require_gpu
from wsi_rt.runtime.engines import tensorrt_api
from wsi_rt.runtime.engines.registry import backend
from wsi_rt.runtime.errors import InputError

OLDEST_BF16 = 80  # GPUs before Ampere have no bf16 arithmetic


def check_types(sms: tuple[int, ...], precision: Mapping[str, str]) -> None:
    """Raises InputError where a component (precision: by its name) would be built in what a GPU does not compute."""
    elder, in_bf16 = [sm for sm in sms if sm < OLDEST_BF16], [n for n, p in precision.items() if p == "bf16"]
    if elder and in_bf16:
        raise InputError(
            f"--sm {elder[0]} has no bf16, which {in_bf16[0]} would be built in, expected --precision "
            f"{in_bf16[0]}=fp16 or --sm {OLDEST_BF16} and newer"
        )


def architectures(target: str, asked: tuple[int, ...]) -> tuple[int, ...]:
    """What --sm asks for, else this machine's GPUs; none for a target that runs on any.

    Raises InputError when there is neither, or what the target does not build for; MachineError when what compiles for
    it is not installed.
    """
    if not backend(target).per_sm:
        if asked:
            raise InputError(f"--sm is given, but {target} engines are for no one architecture, expected none")
        return ()
    compiler = tensorrt_api.family(target)
    default = {gpu.sm for gpu in gpus()} if compiler.ahead_of_time else {require_gpu(target).sm}
    sms = tuple(sorted(set(asked) or default))
    if not sms:
        raise InputError(
            f"{target} engines are compiled for a GPU architecture, and this machine has no GPU to take it from: "
            "give --sm, such as --sm 80,89"
        )
    unknown = [sm for sm in sms if compiler.ahead_of_time and sm not in compiler.sms]
    if unknown:
        raise InputError(f"--sm has {unknown[0]}, {target} builds for: {', '.join(map(str, compiler.sms))}")
    if not compiler.ahead_of_time and sms != (here := require_gpu(target).sm,):
        told = ",".join(map(str, sms))
        raise InputError(f"--sm is {told}, {target} builds on the GPU that it builds for, which is sm_{here} here")
    tensorrt_api.load(compiler)
    return sms
