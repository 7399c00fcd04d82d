"""Which GPU architectures a build is for."""

from __future__ import annotations

from wsi_rt.runtime.devices import gpus, require_gpu
from wsi_rt.runtime.engines import tensorrt_api
from wsi_rt.runtime.engines.registry import backend
from wsi_rt.runtime.errors import InputError


def architectures(target: str, asked: tuple[int, ...]) -> tuple[int, ...]:
    """What --sm asks for, else this machine's GPUs; none for a target that runs on any.

    Raises InputError when there is neither, or what the target does not build for; MachineError when what compiles for
    it is not installed.
    """
    if not backend(target).per_sm:
        if asked:
            raise InputError(f"--sm is given, but {target} engines are for no one architecture, expected none")
        return ()
    sms = tuple(sorted(set(asked) or {gpu.sm for gpu in gpus()}))
    if not sms:
        raise InputError(
            f"{target} engines are compiled for a GPU architecture, and this machine has no GPU to take it from: "
            "give --sm, such as --sm 80,89"
        )
    compiler = tensorrt_api.family(target)
    unknown = [sm for sm in sms if compiler.ahead_of_time and sm not in compiler.sms]
    if unknown:
        raise InputError(f"--sm has {unknown[0]}, {target} builds for: {', '.join(map(str, compiler.sms))}")
    if not compiler.ahead_of_time and sms != (here := require_gpu(target).sm,):
        told = ",".join(map(str, sms))
        raise InputError(f"--sm is {told}, {target} builds on the GPU that it builds for, which is sm_{here} here")
    tensorrt_api.load(compiler)
    return sms
