"""The bench: what runs is checked, then timed; what does not run says why; the roofline is a prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wsi_rt.benchmarks.kernels.cases import LIMIT, OURS, Case, chosen, gpu_name
from wsi_rt.benchmarks.report import Outcome, Row, percentiles
from wsi_rt.kernels.aot_case import SHIPPED_SM
from wsi_rt.runtime.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from wsi_rt.benchmarks.kernels.operator import Inputs, Run

NOT_RUN = "not run on a GPU yet"
REPEATS, QUICK_REPEATS = 50, 20
SHOWN_SM = (90,)  # whose roofline is shown where there is no GPU and no --sm

Timer = Callable[[Callable[[], object], int], Sequence[float]]


def bench_kernels(
    names: Sequence[str] = (),
    sms: Sequence[int] | None = None,
    quick: bool = False,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Every chosen case on the GPU, or a row that says that there is none; then its roofline on `sms`.

    sms: default that of the GPU, else sm_90. `on_done(n, total)` after the n-th case. Raises InputError on an unknown
    case or architecture.
    """
    if strange := [sm for sm in sms or () if sm not in SHIPPED_SM]:
        listed, known = (", ".join(map(str, x)) for x in (strange, SHIPPED_SM))
        raise InputError(f"--sm {listed} is no shipped architecture, expected some of {known}")
    cases = chosen(names, quick)
    device, why_not = _gpu()
    outcome = Outcome()
    for n, case in enumerate(cases, 1):
        if device is None:
            outcome.rows += [_row(case, provider, skipped=why_not) for provider in case.providers]
        else:
            from wsi_rt.benchmarks.timing import cuda_seconds

            run_case(case, device, cuda_seconds, QUICK_REPEATS if quick else REPEATS, outcome)
            _give_back()
        outcome.rows += [limit_row(case, sm) for sm in sms or _own_sm(device)]
        on_done(n, len(cases))
    return outcome


def _gpu() -> tuple[torch.device | None, str]:
    """The GPU that is measured, or why none is."""
    try:
        import torch
    except ImportError:
        return None, f"{NOT_RUN}: torch is not installed"
    if not torch.cuda.is_available():
        return None, NOT_RUN
    return torch.device("cuda", torch.cuda.current_device()), ""


def _give_back() -> None:
    """Cached GPU memory of the last case: the next may need all of it."""
    import torch

    torch.cuda.empty_cache()


def _name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _own_sm(device: torch.device | None) -> Sequence[int]:
    if device is None:
        return SHOWN_SM
    import torch

    from wsi_rt.kernels.checks import shipped_sm

    return (shipped_sm(torch.empty(0, device=device)),)


def run_case(case: Case, device: torch.device, timer: Timer, repeats: int, outcome: Outcome) -> None:
    """Rows of every provider of one case, timed by `timer(function, repeats)`; none on a red gate."""
    from wsi_rt.benchmarks.kernels.gate import allowed_error
    from wsi_rt.benchmarks.kernels.operator import DTYPES
    from wsi_rt.benchmarks.kernels.operators import OPERATORS

    operator, dtype = OPERATORS[case.op], DTYPES[case.dtype]
    where = _name(device)
    inputs = operator.inputs(case.size, dtype, device)
    exact, scale = operator.exact(inputs), operator.scale(inputs)
    eager = _attempt(operator.providers[operator.eager], inputs, exact)
    allowed = allowed_error(dtype, scale, eager.error)
    for provider in case.providers:
        tried = eager if provider == operator.eager else _attempt(operator.providers[provider], inputs, exact)
        red = tried.error is not None and not tried.error <= allowed
        why_not = f"parity: largest error {tried.error:.3g}, allowed {allowed:.3g}" if red else tried.why_not
        if tried.run is not None and not red:
            outcome.rows += _timed_rows(case, provider, where, timer(tried.run, repeats))
            continue
        outcome.rows.append(_row(case, provider, device=where, skipped=why_not))
        if provider == OURS:
            (outcome.red if red else outcome.broken).append(f"{case.name}: {why_not}")


@dataclass(frozen=True)
class _Attempt:
    """One run before the clock: its largest error, or why there is none."""

    run: Run | None
    error: float | None
    why_not: str


def _attempt(make: Callable[[Inputs], Run], inputs: Inputs, exact: Tensor) -> _Attempt:
    import torch

    from wsi_rt.benchmarks.kernels.branches import UnavailableError
    from wsi_rt.benchmarks.kernels.gate import largest_error

    try:
        run = make(inputs)
        return _Attempt(run, largest_error(run(), exact), "")
    except UnavailableError as e:
        return _Attempt(None, None, str(e))
    except torch.cuda.OutOfMemoryError:
        return _Attempt(None, None, "out of GPU memory")
    except Exception as e:  # a compiler, a driver, a peer's own checks: the row says it, the others still run
        return _Attempt(None, None, f"{type(e).__name__}: {' '.join(str(e).split())[:200]}")


def _timed_rows(case: Case, provider: str, where: str, seconds: Sequence[float]) -> list[Row]:
    """Seconds, and the rate of what the roofline says the case is bound by on most GPUs."""
    work, compute = case.cost, case.metric == "gflops"
    amount, metric, unit = (work.flops, "gflops", "GFLOP/s") if compute else (work.bytes, "gbytes_per_s", "GB/s")
    rates = [amount / s / 1e9 for s in seconds]
    return [
        _row(case, provider, device=where, **percentiles(seconds)),
        _row(case, provider, metric=metric, unit=unit, device=where, **percentiles(rates)),
    ]


def limit_row(case: Case, sm: int) -> Row:
    """The roofline of one architecture: nothing measured."""
    seconds, bound = case.limit(sm)
    return _row(case, LIMIT, device=gpu_name(sm), p50=seconds, note=f"predicted: roofline, bound by {bound}")


def _row(case: Case, provider: str, metric: str = "seconds", unit: str = "s", **rest: Any) -> Row:
    return Row("kernels", case.name, provider, metric, unit, **rest)
