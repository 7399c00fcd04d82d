"""Rows, percentiles, the table and the JSON object that every bench shares; the machine and the commit."""

from __future__ import annotations

import json
import subprocess

import pytest

from wsi_rt.benchmarks import machine
from wsi_rt.benchmarks.report import Report, Row, percentiles, table


def row(**changes):
    return Row(**{"bench": "kernels", "case": "c", "provider": "wsi-rt", "metric": "seconds", "unit": "s", **changes})


def test_percentiles_are_linear_between_samples():
    found = percentiles([5.0, 1.0, 2.0, 4.0, 3.0])
    assert found == pytest.approx({"p50": 3.0, "p20": 1.8, "p80": 4.2, "p90": 4.6, "p99": 4.96, "n": 5})
    assert percentiles([7.0])["p99"] == 7.0


def test_a_row_is_the_contract_in_json():
    measured = row(threads=2, **percentiles([0.5])).as_json()
    assert list(measured) == [
        "bench", "case", "provider", "metric", "unit", "threads", "p50", "p20", "p80", "p90", "p99", "n",
    ]  # fmt: skip
    assert "skipped" not in measured
    skipped = row(skipped="no GPU").as_json()
    assert (skipped["skipped"], skipped["p50"], skipped["n"]) == ("no GPU", None, 0)


def test_a_report_is_one_json_object():
    made = Report({"cpus": 2}, {"wsi-rt": "0.1"}, "abc", [row(**percentiles([1.0]))])
    read = json.loads(json.dumps(made.as_json()))
    assert list(read) == ["machine", "versions", "commit", "rows"]
    assert read["rows"] == [row(**percentiles([1.0])).as_json()]


def test_the_table_shows_units_and_reasons():
    lines = table(
        [
            row(case="a-long-case", **percentiles([2e-6, 2e-6])),
            row(metric="gflops", unit="GFLOP/s", **percentiles([1234.5])),
            row(provider="limit", p50=0.25, note="predicted"),
            row(provider="peer", skipped="not installed"),
        ]
    ).splitlines()
    assert "2 us" in lines[1]
    assert lines[1].split()[-1] == "2"
    assert "1234 GFLOP/s" in lines[2] or "1235 GFLOP/s" in lines[2]
    assert "250 ms" in lines[3]
    assert lines[3].endswith("predicted")
    assert lines[4].endswith("not installed")
    assert len({line.find("seconds") for line in (lines[1], lines[3], lines[4])}) == 1


def test_this_machine_and_its_versions():
    made = machine.report([])
    assert made.machine["usable_cpus"] >= 1
    assert isinstance(made.machine["gpus"], list)
    assert {"wsi-rt", "python", "numpy"} <= set(made.versions)
    assert all(made.versions.values())
    assert made.table().splitlines()[0].startswith(", ".join(made.machine["gpus"]) or "no GPU")


def test_the_commit_says_when_files_differ(tmp_path):
    assert machine.commit(tmp_path) is None

    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    clean = machine.commit(tmp_path)
    assert clean
    assert len(clean) == 12
    (tmp_path / "file").write_text("2")
    assert machine.commit(tmp_path) == f"{clean}-dirty"
