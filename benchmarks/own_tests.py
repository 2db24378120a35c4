"""Run other projects' own tests with our classes in place of the projects' classes.

    python benchmarks/own_tests.py --pytorch DIR --lightning DIR --timm DIR
    python benchmarks/own_tests.py --timm DIR --models 'resnet*'  # or '*', for hours

The folders are checkouts of https://github.com/pytorch/pytorch,
https://github.com/Lightning-AI/pytorch-lightning and
https://github.com/huggingface/pytorch-image-models. Their versions should match the
installed packages, because the installed packages are tested. PyTorch's tests need
``pip install expecttest``.

- PyTorch's ``test/nn/test_pruning.py``: our functions and classes replace their
  counterparts in ``torch.nn.utils.prune``.
- Lightning's ``callbacks/test_pruning.py``: ``SaliencyPruning`` replaces
  ``ModelPruning``.
- timm's ``tests/test_models.py``: half of the weights of each model are pruned, and
  pruning is permanent.

``own_tests_plugins/`` makes the replacements. Each test is a line with its outcome:

- *passed* or *failed*,
- *differs by design*, with the reason,
- *fails without ours*: the test also fails when nothing is replaced,
- *skipped* by the project itself.

The exit status is 1 if any test failed.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
DIFFERS = "differs by design"
OUTCOMES = ("passed", "failed", DIFFERS, "fails without ours", "skipped")


@dataclass(frozen=True)
class Suite:
    """A test file of another project.

    Attributes:
        package: Name of the installed package.
        file: Path of the test file within a checkout.
        path: Folder within a checkout where the test file's imports start.
        options: Options for pytest.
        not_ours: Why tests do not use our classes, by pattern of the tests' names.
        differs: Why tests that use our classes fail, by pattern of the tests' names.
    """

    package: str
    file: str
    path: str = "."
    options: Sequence[str] = ()
    not_ours: Mapping[str, str] = field(default_factory=dict)
    differs: Mapping[str, str] = field(default_factory=dict)


SUITES = {
    "pytorch": Suite(
        "torch",
        "test/nn/test_pruning.py",
        options=["--noconftest"],
        not_ours={
            "test_*_structured_pruning*": "structured pruning by rows or columns, "
            "which stays PyTorch's own",
        },
    ),
    "lightning": Suite(
        "lightning",
        "tests/tests_pytorch/callbacks/test_pruning.py",
        path="tests",
        differs={
            "test_pruning_callback*_structured*": "structured pruning by rows or "
            "columns is not a method of ours; the error names those that are",
            "test_pruning_callback*TestPruningMethod*": "a class that takes no scores "
            "is for ModelPruning; the error says what a method is",
            "test_pruning_misconfiguration": "what is no method of ours is a TypeError "
            "or ValueError, as everywhere in this package",
        },
    ),
    "timm": Suite(
        "timm",
        "tests/test_models.py",
        path="tests",  # the folder above would import the checkout's own timm
        not_ours={
            "test_model_inference*": "compares the outputs with those of the dense "
            "weights, which it downloads",
        },
    ),
}


def run_pytest(
    suite: Suite, checkout: Path, *arguments: str, names: Iterable[str] = ()
) -> dict[str, tuple[str, str]]:
    """Run tests of a checkout, and return their outcomes.

    Args:
        suite: The test file.
        checkout: Folder of the project.
        arguments: Further arguments for pytest.
        names: Names of tests to run, as in the result. Default: all tests.

    Returns:
        The outcome and pytest's message, by ``Class::test[parameters]``.

    Raises:
        SystemExit: pytest wrote no report.
    """
    file = checkout.resolve() / suite.file
    paths = [checkout.resolve() / suite.path, HERE]
    environment = {
        "HF_HUB_OFFLINE": "1",  # unless the variable is set
        **os.environ,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join(
            [*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        # Another folder, as the checkout would hide the installed packages.
        report, settings = Path(folder, "report.xml"), Path(folder, "pytest.ini")
        settings.write_text("[pytest]\n")
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "--import-mode=importlib"),
                *("-p", "no:cacheprovider", "-p", "no:randomly"),
                *("-c", str(settings), "--rootdir", str(checkout.resolve())),
                *(f"--junit-xml={report}", "-o", "junit_logging=no"),
                *suite.options,
                *arguments,
                *([f"{file}::{name}" for name in names] or [str(file)]),
            ],
            cwd=folder,
            env=environment,
            stdout=sys.stderr,
        )
        if not report.exists():
            sys.exit(f"{file}: pytest ended with status {done.returncode}")
        return outcomes(report.read_text(), file.stem)


def outcomes(report: str, module: str) -> dict[str, tuple[str, str]]:
    """Return the outcome of each test in a JUnit report; a failure counts most."""
    found: dict[str, tuple[str, str]] = {}
    for case in ET.fromstring(report).iter("testcase"):
        *_, owner = f".{case.get('classname', '')}".split(f".{module}")
        name = "::".join([*filter(None, owner.split(".")), case.get("name", "")])
        outcome, text = "passed", ""
        for child in case:
            if child.tag in ("failure", "error"):
                outcome, text = "failed", child.get("message") or child.text or ""
                break
            if child.tag == "skipped":
                outcome, text = "skipped", child.get("message", "")
        if found.get(name, ("", ""))[0] != "failed":
            found[name] = outcome, " ".join(text.split())
    return found


def reason(name: str, patterns: Mapping[str, str]) -> str | None:
    """Return the reason of the first pattern that fits a test's name, or ``None``."""
    own = re.sub(r"^\w+::", "", name)
    matching = (why for key, why in patterns.items() if fnmatchcase(own, key))
    return next(matching, None)


def judged(
    suite: Suite,
    with_ours: Mapping[str, tuple[str, str]],
    without: Mapping[str, tuple[str, str]],
) -> dict[str, tuple[str, str]]:
    """Return the final outcome of each test, with the reason.

    Args:
        suite: The test file, with reasons.
        with_ours: Outcomes with our classes.
        without: Outcomes of the failed tests when nothing is replaced.
    """
    verdicts = {}
    for name, (outcome, text) in with_ours.items():
        if why := reason(name, suite.not_ours):
            outcome, text = DIFFERS, why
        elif outcome == "failed":
            if without.get(name, ("", ""))[0] == "failed":
                outcome, text = "fails without ours", without[name][1]
            elif why := reason(name, suite.differs):
                outcome, text = DIFFERS, why
        verdicts[name] = outcome, text if outcome != "passed" else ""
    return verdicts


def lines(verdicts: Mapping[str, tuple[str, str]]) -> list[str]:
    """Return a line for each test."""
    return [
        f"{outcome:20}{name}" + (f": {text[:200]}" if text else "")
        for name, (outcome, text) in verdicts.items()
    ]


def sums(found: Mapping[str, Mapping[str, tuple[str, str]]]) -> list[str]:
    """Return the counts of outcomes for each suite, and reasons for differences."""
    width = max(map(len, found))
    rows = [" " * width + "".join(f"{outcome:>20}" for outcome in OUTCOMES)]
    for name, verdicts in found.items():
        counts = Counter(outcome for outcome, _ in verdicts.values())
        rows.append(f"{name:{width}}" + "".join(f"{counts[o]:20}" for o in OUTCOMES))
    rows.append("")
    for name, verdicts in found.items():
        reasons = Counter(why for one, why in verdicts.values() if one == DIFFERS)
        rows += [f"{name}, {count} by design: {why}" for why, count in reasons.items()]
    return rows


def main() -> None:
    """Run the suites whose checkouts are given."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in SUITES:
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help="a checkout")
    parser.add_argument(
        "--models",
        nargs="+",
        default=["test_*"],
        metavar="PATTERN",
        help="names of timm's models, '*' for all (default: its test models)",
    )
    options = vars(parser.parse_args())
    if not any(options[name] for name in SUITES):
        parser.error("no checkout: expected --pytorch, --lightning or --timm")
    for name, suite in SUITES.items():
        if options[name] and not Path(options[name], suite.file).is_file():
            parser.error(f"--{name}: {options[name]} has no {suite.file}")
    packages = [
        f"{s.package} {version(s.package)}" for n, s in SUITES.items() if options[n]
    ]
    print(f"{platform.machine()}, {', '.join(packages)}, {date.today()}")
    found = {}
    for name, suite in SUITES.items():
        checkout = options[name]
        if checkout is None:
            continue
        arguments = ["-p", f"own_tests_plugins.{name}"]
        if name == "timm":
            arguments += [f"--models={pattern}" for pattern in options["models"]]
        with_ours = run_pytest(suite, checkout, *arguments)
        broken = [
            test for test, (outcome, _) in with_ours.items() if outcome == "failed"
        ]
        without = run_pytest(suite, checkout, names=broken) if broken else {}
        found[suite.package] = judged(suite, with_ours, without)
        title = f"{suite.package}, {suite.file}"
        print("", title, "", *lines(found[suite.package]), sep="\n", flush=True)
    print("", "in all", "", *sums(found), sep="\n")
    outcomes_found = (one for of in found.values() for one, _ in of.values())
    sys.exit("failed" in outcomes_found)


if __name__ == "__main__":
    main()
