"""The study: it runs, resumes and draws."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import Done, python
from scipy.stats import ttest_rel

from force_plugin import diagnose
from force_plugin.pruning.advice import advise

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


def run(script: str, *words: object) -> Done:
    done = python(BENCHMARKS / script, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture
def plots(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return runpy.run_path(str(BENCHMARKS / "evidence_plots.py"))


def test_a_question_is_answered_and_drawn_once(
    tmp_path: Path, plots: dict[str, Any]
) -> None:
    out = tmp_path / "runs.jsonl"
    words = ["--preset", "digits", "--questions", "batches", "--methods", "snip"]
    words += ["--seeds", "0", "--out", str(out)]
    assert "6 of 6 runs to do" in run("evidence.py", *words).stderr
    total = sum(plots["layers_of"]("resnet_small").values())
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(row["run"]["batches"] for row in rows) == [1, 3, 10, 30, 60, 200]
    for row in rows:
        assert row["run"]["sparsity"] == 0.99 and row["accuracy"] > 0.3
        assert 0 < row["live"] <= sum(row["kept"]) == int(0.01 * total)
    assert len({tuple(row["kept"]) for row in rows}) == 6  # six masks
    assert "0 of 6 runs to do" in run("evidence.py", *words).stderr

    run("evidence_plots.py", "--results", out, "--preset", "digits", "--to", tmp_path)
    for row in rows:
        assert f"{100 * row['accuracy']:.2f}" in (tmp_path / "batches.txt").read_text()
    assert (tmp_path / "batches.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("one", "other", "star"),
    [
        ([90.0, 91.0, 92.5], [80.0, 81.5, 82.0], " *"),
        ([80.0, 81.5, 82.0], [90.0, 91.0, 92.5], " *"),
        ([80.0, 91.0, 85.0], [82.0, 88.0, 86.0], ""),
    ],
)
def test_intervals_are_those_of_students_t(
    one: list[float], other: list[float], star: str, plots: dict[str, Any]
) -> None:
    bounds = ttest_rel(one, other).confidence_interval(0.95)
    text = plots["interval"]([a - b for a, b in zip(one, other, strict=True)])
    assert text.endswith(f"({bounds.low:+.2f} to {bounds.high:+.2f}){star}")


def test_the_tables_of_the_docs_are_those_of_the_stored_results(
    tmp_path: Path,
) -> None:
    run("evidence_plots.py", "--to", tmp_path)
    tables = sorted(path.name for path in tmp_path.glob("*.txt"))
    assert len(tables) == 10
    for name in tables:
        shown = (ROOT / "docs" / "evidence" / name).read_text(encoding="utf-8")
        assert shown == (tmp_path / name).read_text(encoding="utf-8"), name


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["evidence_steady.py"], "steady-accuracy-table.md"),
        (["steady_force.py", "--table"], "steady-force-table.md"),
        (["steady_families.py", "--table"], "steady-families-table.md"),
    ],
)
def test_the_tables_of_steady_force_are_those_of_the_stored_results(
    words: list[str], name: str, tmp_path: Path
) -> None:
    run(*words, tmp_path / name)
    shown = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert shown == (tmp_path / name).read_text(encoding="utf-8")


def table_of(name: str) -> list[list[str]]:
    """Return the rows of a table of the docs."""
    text = (ROOT / "docs" / "evidence" / name).read_text(encoding="utf-8")
    return [re.split(r"  +", line) for line in text.split("\n\n")[1].splitlines()]


def test_the_figures_of_the_readme_are_those_of_the_docs() -> None:
    (_, _, *sparsities), *rows = table_of("methods.txt")
    shown = {
        (network, name, sparsity): cell
        for network, name, *cells in rows
        for sparsity, cell in zip(sparsities, cells, strict=True)
    }
    names = ("force", "iter_snip", "steady_force", "snip", "grasp", "synflow", "random")
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    found = [line for line in lines if re.match(r"\| (ResNet|VGG), ", line)]
    assert len(found) == 8
    for line in found:
        label, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        network, sparsity = label.split(", ")
        for name, cell in zip(names, cells, strict=True):
            assert cell == shown[f"{network.lower()}_small", name, sparsity], label


def test_the_page_on_methods_advises_what_diagnose_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from evidence_networks import make

    page = (ROOT / "docs" / "howto" / "which-method.md").read_text(encoding="utf-8")
    batch = torch.randn(64, 1, 28, 28), torch.arange(64) % 10
    found = diagnose(make("resnet_small", 0), [batch], sparsity=0.99)
    assert str(found.advice) in page
    rows = re.findall(r'\| (\d+ and more|\d+ to \d+|less than \d+) \| `"(\w+)"`', page)
    assert [method for _, method in rows] == ["snip", "steady_force", "steady_force"]
    for (label, method), kept in zip(rows, (16, 10, 1), strict=True):
        first = int(re.findall(r"\d+", label)[0])
        for weights in {kept, first - label.startswith("less")}:
            advice = advise(0.9, 100 * weights, 100, 0, 5, 0.0)
            assert advice.method == method, (label, weights)


def test_where_a_single_step_is_advised_it_is_within_half_a_point(
    tmp_path: Path,
) -> None:
    table = (ROOT / "docs" / "evidence" / "advice.txt").read_text(encoding="utf-8")
    titles, *rows = (
        re.split(r"  +", line) for line in table.split("\n\n")[1].splitlines()
    )
    for row in rows:
        cells = dict(zip(titles, row, strict=True))
        weights = round(10 * float(cells["a channel"]))
        advice = advise(0.9, weights, 10, 0, 5, 0.0)
        most = 0.5 if advice.method == "snip" else 1.5
        assert float(cells[advice.method]) <= most, row
