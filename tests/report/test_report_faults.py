"""Reports and plots that cannot be: one clear error, and nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from faults import MASK, NAN, NO_MODULE, NO_PATH, Fault, report
from state import unchanged

from force_plugin import LayerReport, SparsityReport, get_masks, sparsity_report

TO_COMPARE = "^compare: expected a mapping of labels to reports, got "


# Plots

A_FOLDER = "^path: expected a file, got the folder "
FORMATS = r"^Format '.*' is not supported \(supported formats: .*pdf.*png.*svg"


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("plot.xyz", ValueError, FORMATS),
        ("plot.safetensors", ValueError, FORMATS),
        (
            "no/plot.png",
            FileNotFoundError,
            "^path: expected a file in an existing fold",
        ),
        ("file/plot.png", FileNotFoundError, "^path: expected .*; create the folder f"),
        ("folder.png", IsADirectoryError, A_FOLDER + "'folder.png'; add the name"),
        # Matplotlib would write folder.png and .png.
        ("folder", IsADirectoryError, A_FOLDER + "'folder'; add the name"),
        ("", IsADirectoryError, A_FOLDER + "''; add the name"),
        (5, TypeError, NO_PATH + "int$"),
        (["plot.png"], TypeError, NO_PATH + "list$"),
    ],
)
def test_a_plot_that_cannot_be_written_leaves_nothing_behind(
    path: Any,
    error: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    if error is IsADirectoryError:
        Path(path).mkdir(exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=message):
        report(3, 6).plot(path)
    assert sorted(tmp_path.rglob("*")) == before


ARGUMENTS: dict[str, Fault] = {
    "a report of more than all": Fault(
        lambda m: LayerReport("fc", (9,), 10, 9),
        ValueError,
        "^fc: expected 0 <= kept <= total and total >= 1, got kept=10 and total=9$",
    ),
    "a report of nan": Fault(
        lambda m: LayerReport("fc", (9,), NAN, 9),
        ValueError,
        "^fc: .* got kept=nan and total=9$",
    ),
    "a report of no layers": Fault(
        lambda m: SparsityReport([]),
        ValueError,
        "^layers: a report needs at least one layer$",
    ),
    "a report of masks": Fault(
        lambda m: sparsity_report(get_masks(m)), TypeError, NO_MODULE + "dict$"
    ),
    "a comparison of other layers": Fault(
        lambda m: report(1, 2).plot(compare={"snip": sparsity_report(m)}),
        ValueError,
        r"^compare\['snip'\]: expected the same layers .* layer 1 is '3\.weight' inst",
    ),
    "a list to compare with": Fault(
        lambda m: report(1).plot(compare=[report(1)]), TypeError, TO_COMPARE + "list$"
    ),
    "a report to compare with": Fault(
        lambda m: report(1).plot(compare=report(1)), TypeError, TO_COMPARE + "Sparsity"
    ),
    "masks to compare with": Fault(
        lambda m: report(1).plot(compare={"snip": MASK}),
        TypeError,
        r"^compare\['snip'\]: expected a SparsityReport, got dict$",
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_wrong_argument_is_one_clear_error_and_changes_nothing(
    name: str,
) -> None:
    fault = ARGUMENTS[name]
    model = fault.model()
    with unchanged(model), pytest.raises(fault.error, match=fault.message):
        fault.call(model)
