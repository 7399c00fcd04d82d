"""The bench of tile readers: the right tiles, pixels compared before the clock, and rows that say what did not run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from wsi_rt.benchmarks.tiles import limit, run
from wsi_rt.benchmarks.tiles.cases import CASES, LIMIT, OURS, REFERENCE, Case, chosen
from wsi_rt.benchmarks.tiles.work import WARM_UP, Work, make_slide, plan_work
from wsi_rt.runtime.errors import InputError, SlideError
from wsi_rt.runtime.slides import open_slide
from wsi_rt.runtime.slides.synth import SlideSpec, write_synth_slide

SPEC = {"width": 4096, "height": 2560, "tissue": 0.9, "levels": (1,)}


@pytest.fixture(scope="session")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synth_slide(tmp_path_factory.mktemp("bench") / "s.svs", **SPEC, tile=240, codec="jpeg-rgb", threads=2)


@pytest.fixture(scope="session")
def work(slide: Path) -> Work:
    return plan_work(slide, most=20, threads=1)


def rows_of(outcome: run.Outcome, provider: str) -> dict[str, object]:
    return {row.metric: row for row in outcome.rows if row.provider == provider}


def test_cases_are_chosen_by_name(tmp_path: Path) -> None:
    assert [case.name for case in chosen((), None)] == [
        "jpeg-aligned", "jpeg-offgrid", "jpeg2000", "dicom", "preprocess",
    ]  # fmt: skip
    assert [case.name for case in chosen(("dicom",), None)] == ["dicom"]
    with pytest.raises(InputError, match="--case nonsense is unknown, expected one of: jpeg-aligned"):
        chosen(("nonsense",), None)
    with pytest.raises(InputError, match="expected either"):
        chosen(("dicom",), tmp_path)
    (own,) = chosen((), tmp_path / "a.svs")
    assert (own.name, own.slide, "pyvips" in own.providers) == ("slide", tmp_path / "a.svs", True)
    assert "wsidicom" in chosen((), tmp_path)[0].providers


def test_the_slides_of_the_cases_are_large_enough() -> None:
    """10,000 tiles of 256 px, but where a tile is resized from twice the edge."""
    for case in CASES:
        spec = SlideSpec(**case.spec(quick=False))
        tiles = spec.width * spec.height * spec.tissue / (256 * 0.5 / spec.mpp) ** 2
        assert tiles > (10_000 if case.name != "preprocess" else case.most)
        SlideSpec(**case.spec(quick=True))


def test_a_slide_is_written_once(tmp_path: Path) -> None:
    case = Case("tiny", (), (("width", 300), ("height", 200)))
    calls = []
    first = make_slide(case, True, tmp_path, 1, lambda *at: calls.append(at))
    written = first.read_bytes()
    assert calls
    first.write_bytes(b"kept")
    assert make_slide(case, True, tmp_path, 1, lambda *at: None).read_bytes() == b"kept"
    other = make_slide(replace(case, changes=(("width", 310),)), True, tmp_path, 1, lambda *at: None)
    assert other != first
    assert other.read_bytes() != written


def test_the_tiles_are_those_of_the_grid_and_lie_inside(work: Work, slide: Path) -> None:
    assert work.timed == 20
    assert len(work.xy0) == WARM_UP + 20
    assert (work.xy0 % 256 == 0).all()
    with open_slide(slide) as reader:
        assert (work.xy0 + 256 <= np.array(reader.size0)).all()
    order = np.lexsort((work.xy0[:, 0], work.xy0[:, 1]))
    assert (order == np.arange(len(order))).all()


def test_too_few_tiles(tmp_path: Path) -> None:
    path = write_synth_slide(tmp_path / "s.svs", width=1500, height=1000, tissue=0.6)
    with pytest.raises(SlideError, match="expected at least 128 to time"):
        plan_work(path, 100, 1)


def test_real_processes_measure_ours_the_reference_and_the_limit(slide: Path, work: Work) -> None:
    case = Case("slide", (OURS, REFERENCE, LIMIT), slide=slide)
    outcome = run.Outcome()
    run.bench_case(case, work, 1, 2, outcome, lambda *at: None)
    assert (outcome.red, outcome.broken) == ([], [])
    for provider in case.providers:
        rows = rows_of(outcome, provider)
        assert set(rows) == {"tiles_per_s", "cpu_ms_per_tile", "peak_rss_bytes"}
        assert [row.n for row in rows.values()] == [2, 2, 2]
        assert 20 < rows["tiles_per_s"].p50 < 100_000
        assert 0.01 < rows["cpu_ms_per_tile"].p50 < 100
        assert 30e6 < rows["peak_rss_bytes"].p50 < 500e6
        assert rows["tiles_per_s"].threads == 1
    assert rows_of(outcome, LIMIT)["tiles_per_s"].note == "the codec alone, each stored tile once"


def test_the_limit_decodes_each_segment_once(work: Work) -> None:
    pytest.importorskip("simplejpeg", reason="the limit decodes with simplejpeg")
    floor = limit.Limit(work, 1)
    decoded: list[int] = []
    plain = floor.decode
    floor.decode = lambda index, out: (decoded.append(index), plain(index, out))  # type: ignore[method-assign]
    assert sum(len(batch) for batch in floor.read(work.xy0)) == len(work.xy0)
    want = {
        row * floor.stored.cols + col
        for x, y in work.xy0.tolist()
        for row in range(y // 240, (y + 255) // 240 + 1)
        for col in range(x // 240, (x + 255) // 240 + 1)
    }
    assert sorted(decoded) == sorted(want)


@pytest.mark.parametrize("codec", ["jpeg", "jpeg-rgb", pytest.param("jpeg2000", marks=pytest.mark.slow)])
def test_the_limit_decodes_the_right_pixels_of_a_dicom(tmp_path: Path, codec: str) -> None:
    pytest.importorskip("pydicom", reason="DICOM needs pydicom")
    import openslide

    path = write_synth_slide(tmp_path / "d", width=3600, height=3400, tissue=0.9, levels=(1,), format="dicom",
                             codec=codec, threads=2)  # fmt: skip
    floor = limit.Limit(plan_work(path, 10, 1), 1)
    out = np.empty((256, 256, 3), np.uint8)
    with openslide.OpenSlide(path / "level-0.dcm") as slide:
        for index in (0, 17, 100):
            row, col = divmod(index, floor.stored.cols)
            floor.decode(index, out)
            want = np.asarray(slide.read_region((col * 256, row * 256), 0, (256, 256)))[..., :3]
            np.testing.assert_array_equal(out, want)


def scripted(
    monkeypatch: pytest.MonkeyPatch, answers: dict[tuple[str, str], dict[str, object]]
) -> list[tuple[str, str]]:
    """Processes replaced by answers, (provider, mode) -> answer; returns the list of what is asked."""
    asked: list[tuple[str, str]] = []
    good = {"check": {"tiles": 96, "differ": 0, "most": 0}, "reference": {},
            "time": {"tiles_per_s": 5.0, "cpu_ms_per_tile": 1.0, "peak_rss_bytes": 1e6}}  # fmt: skip

    def measure(job: dict[str, object]) -> dict[str, object]:
        key = (str(job["provider"]), str(job["mode"]))
        asked.append(key)
        return answers.get(key, good[key[1]])

    monkeypatch.setattr(run, "_measure", measure)
    return asked


def test_rounds_are_interleaved_after_the_check(monkeypatch: pytest.MonkeyPatch, work: Work) -> None:
    asked = scripted(monkeypatch, {})
    run.bench_case(Case("c", ("wsi-rt", "pyvips")), work, 1, 2, run.Outcome(), lambda *at: None)
    assert [mode for _, mode in asked] == ["reference", "check", "check"] + ["time"] * 4
    assert [name for name, mode in asked if mode == "time"] == ["wsi-rt", "pyvips", "wsi-rt", "pyvips"]


def test_wrong_pixels_of_ours_are_red_and_not_timed(monkeypatch: pytest.MonkeyPatch, work: Work) -> None:
    wrong = {"tiles": 96, "differ": 3, "most": 7}
    asked = scripted(monkeypatch, {(OURS, "check"): wrong, ("fastslide", "check"): wrong})
    outcome = run.Outcome()
    run.bench_case(Case("c", (OURS, "fastslide")), work, 1, 2, outcome, lambda *at: None)
    assert outcome.red == ["c: not pixel-exact: 3 of 96 tiles, up to 7"]
    assert (OURS, "time") not in asked
    (ours,) = rows_of(outcome, OURS).values()
    assert ours.skipped == "not pixel-exact: 3 of 96 tiles, up to 7"
    peer = rows_of(outcome, "fastslide")["tiles_per_s"]
    assert (peer.p50, peer.note) == (5.0, "not pixel-exact: 3 of 96 tiles, up to 7")


def test_what_does_not_run_says_why(monkeypatch: pytest.MonkeyPatch, work: Work) -> None:
    scripted(
        monkeypatch, {("pyvips", "check"): {"skipped": "not installed: no pyvips"}, (OURS, "time"): {"skipped": "x"}}
    )
    outcome = run.Outcome()
    run.bench_case(Case("c", (OURS, "pyvips")), work, 1, 2, outcome, lambda *at: None)
    assert [row.skipped for row in outcome.rows] == ["x", "not installed: no pyvips"]
    assert outcome.broken == ["c: x"]


def test_a_missing_peer_and_a_dying_process_are_answers(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyvips.py").write_text("raise ImportError('no pyvips here')")
    (tmp_path / "fastslide.py").write_text("import os\nos._exit(7)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    job = run._job(work, 1, tmp_path)
    assert run._measure({**job, "provider": "pyvips", "mode": "check"}) == {"skipped": "not installed: no pyvips here"}
    assert "exit code 7" in run._measure({**job, "provider": "fastslide", "mode": "time"})["skipped"]


def test_the_command(wsi_rt, monkeypatch: pytest.MonkeyPatch, slide: Path) -> None:
    monkeypatch.setattr(run, "QUICK_ROUNDS", 1)
    monkeypatch.setattr(run, "chosen", lambda names, path: [Case("slide", (OURS, LIMIT), most=30, slide=path)])
    result = wsi_rt("bench", "tiles", slide, "--quick", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert {row["bench"] for row in report["rows"]} == {"tiles"}
    assert {row["provider"] for row in report["rows"]} == {OURS, LIMIT}
    assert "page cache warm" in report["machine"]["conditions"]
    assert "openslide-bin" in report["versions"]
