"""The script that runs other projects' tests with our classes."""

from __future__ import annotations

import re
import runpy
from collections import Counter
from pathlib import Path

from interpreter import python

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "own_tests.py"

TESTS = """
import unittest

import torch.nn.utils.prune as prune

from force_plugin import Magnitude


def test_passes():
    assert prune.L1Unstructured is Magnitude


def test_fails():
    assert prune.L1Unstructured is not Magnitude


def test_fails_with_theirs_too():
    raise ValueError("whatever is in place")


def test_ln_structured_pruning():
    pass


class TestParts(unittest.TestCase):
    @unittest.skip("for a reason")
    def test_skips(self):
        pass

    def test_fails_in_part(self):
        for number in range(3):
            with self.subTest(number=number):
                assert number != 1 or prune.L1Unstructured is not Magnitude
"""


def test_each_test_has_a_line_and_a_failure_is_the_exit_status(tmp_path: Path) -> None:
    file = tmp_path / "test" / "nn" / "test_pruning.py"
    file.parent.mkdir(parents=True)
    file.write_text(TESTS)
    done = python(SCRIPT, "--pytorch", tmp_path)
    row = r"^(\w[\w ]+?) {2,}([Tt]est[\w:]+)(?:: (.*))?$"
    rows = re.findall(row, done.stdout, re.MULTILINE)
    found = {name: outcome for outcome, name, _ in rows}
    assert done.returncode == 1, done.stderr
    assert found == {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_fails_with_theirs_too": "fails without ours",
        "test_ln_structured_pruning": "differs by design",
        "TestParts::test_skips": "skipped",
        "TestParts::test_fails_in_part": "failed",
    }
    reasons = {name: reason for _, name, reason in rows if reason}
    assert "for a reason" in reasons["TestParts::test_skips"]
    assert "whatever is in place" in reasons["test_fails_with_theirs_too"]
    assert "rows or columns" in reasons["test_ln_structured_pruning"]
    assert re.search(r"^torch +1 +2 +1 +1 +1$", done.stdout, re.MULTILINE)


def test_a_reason_is_for_a_test_that_fails_with_ours_alone() -> None:
    script = runpy.run_path(str(SCRIPT))
    differs = {"test_a*": "one", "test_b": "other"}
    suite = script["Suite"]("torch", "test_x.py", differs=differs)
    failed = "failed", "what pytest says"
    with_ours = {"X::test_a[1-b]": failed, "X::test_b": failed, "test_bc": failed}
    without = {"X::test_a[1-b]": ("passed", ""), "X::test_b": failed}
    assert script["judged"](suite, with_ours, without) == {
        "X::test_a[1-b]": ("differs by design", "one"),
        "X::test_b": ("fails without ours", "what pytest says"),
        "test_bc": failed,
    }


def test_the_results_of_the_docs_add_up_and_none_has_failed() -> None:
    text = (ROOT / "docs" / "own-tests-results.txt").read_text()
    single, sums = text.split("\nin all\n")
    script = runpy.run_path(str(SCRIPT))
    for suite in script["SUITES"].values():
        _, _, part = single.partition(f"\n{suite.package}, {suite.file}\n\n")
        rows = part.split("\n\n")[0].splitlines()
        counts = Counter(row[:20].strip() for row in rows)
        assert not counts["failed"]
        numbers = "".join(f"{counts[outcome]:20}" for outcome in script["OUTCOMES"])
        assert re.search(rf"^{suite.package} *{numbers}$", sums, re.MULTILINE)
