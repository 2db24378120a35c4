"""The report: its numbers, its table, its exports and its plot."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from force_plugin.report.sparsity import LayerReport, SparsityReport
from force_plugin.report.text import numbered_names, shorten_names

NAMES = ("conv1.weight", "conv2.weight", "conv3.weight", "fc.weight")


def make_report(
    kept: Sequence[int] = (50, 0, 25, 25),
    *,
    total: int = 1000,
    names: Sequence[str] = NAMES,
    method: str | None = "force",
    warnings: Sequence[str] = (),
) -> SparsityReport:
    """A network whose layers have the same size, by default at 97.5 % sparsity."""
    layers = tuple(
        LayerReport(name, (10, total // 10), count, total)
        for name, count in zip(names, kept, strict=True)
    )
    return SparsityReport(layers, tuple(warnings), method)


# Numbers


def test_a_layer_counts_what_is_removed_and_what_is_kept() -> None:
    layer = LayerReport("fc.weight", (10, 10), kept=1, total=100)
    assert layer.sparsity == 0.99
    assert layer.density == 0.01
    assert not layer.empty
    assert dataclasses.replace(layer, kept=0).empty


def test_large_layers_weigh_more_than_small_ones() -> None:
    report = SparsityReport(
        (LayerReport("a", (10,), 10, 10), LayerReport("b", (990,), 0, 990))
    )
    assert (report.kept, report.total) == (10, 1000)
    assert report.sparsity == 0.99
    assert report.density == 0.01
    assert [layer.name for layer in report.empty_layers] == ["b"]


def test_any_sequence_is_stored_as_a_tuple_so_that_reports_compare_and_hash() -> None:
    layer = LayerReport("fc.weight", [10, 10], 5, 100)  # type: ignore[arg-type]
    report = SparsityReport([layer], ["A sentence."])  # type: ignore[arg-type]
    same = SparsityReport(
        (LayerReport("fc.weight", (10, 10), 5, 100),), ("A sentence.",)
    )
    assert report == same
    assert hash(report) == hash(same)


def test_a_report_survives_pickling() -> None:
    report = make_report(warnings=["A sentence."])
    assert pickle.loads(pickle.dumps(report)) == report


def test_a_report_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="a report needs at least one layer"):
        SparsityReport(())


@pytest.mark.parametrize(("kept", "total"), [(-1, 10), (11, 10), (0, 0)])
def test_impossible_counts_are_refused(kept: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"^fc.weight.*kept={kept} and total={total}$"):
        LayerReport("fc.weight", (10,), kept, total)


# Table


def test_the_table_is_aligned_and_no_wider_than_its_contents() -> None:
    report = SparsityReport(
        (
            LayerReport("conv1.weight", (64, 3, 7, 7), 1_234, 9_408),
            LayerReport("conv2.weight", (64, 64, 3, 3), 0, 36_864),
            LayerReport("fc.weight", (10, 64), 640, 640),
        ),
        warnings=("conv2 is empty.",),
    )
    assert str(report).splitlines() == [
        "layer         shape        kept / total  sparsity",
        "-------------------------------------------------",
        "conv1.weight  64x3x7x7   1,234 /  9,408   86.88 %",
        "conv2.weight  64x64x3x3      0 / 36,864  100.00 %  empty",
        "fc.weight     10x64        640 /    640    0.00 %",
        "-------------------------------------------------",
        "total                    1,874 / 46,912   96.01 %",
        "",
        "empty layers: 1 of 3",
        "warning: conv2 is empty.",
    ]


def test_a_notebook_shows_the_table() -> None:
    assert repr(make_report()) == str(make_report())


def test_no_line_exceeds_80_columns() -> None:
    rng = random.Random(0)
    letters = "abcdefghij_.0123456789"
    for _ in range(300):
        layers = []
        for _ in range(rng.randint(1, 6)):
            name = "".join(rng.choices(letters, k=rng.choice([1, 8, 20, 33, 60, 300])))
            shape = tuple(rng.choices([1, 3, 64, 2048], k=rng.randint(1, 7)))
            total = 10 ** rng.randint(0, 12)
            layers.append(LayerReport(name, shape, rng.choice([0, total // 3]), total))
        warning = " ".join("".join(rng.choices(letters, k=17)) for _ in range(20))
        report = SparsityReport(tuple(layers), (warning, "x" * 200))
        lines = str(report).splitlines()
        assert max(map(len, lines)) <= 80, str(report)
        assert len(lines) >= len(layers) + 6


def test_a_name_that_is_too_long_keeps_its_stage_and_its_layer() -> None:
    name = "stages.2.downsample" + 60 * "x" + ".5.mlp.fc1.weight"
    line = str(make_report([1], names=[name])).splitlines()[2]
    shown = line.split()[0]
    assert shown.startswith("stages.2")
    assert "…" in shown
    assert shown.endswith(".5.mlp.fc1.weight")


def test_a_name_that_fits_is_not_shortened() -> None:
    name = "layer1.0.a_rather_long_name.conv1.weight"
    assert f"{name}  " in str(make_report([1], names=[name]))


def rows_of(text: str) -> list[str]:
    """What stands for each layer between the rules of a table."""
    lines = text.splitlines()
    start, end = (i for i, line in enumerate(lines) if line.startswith("---"))
    return [line.split()[0] for line in lines[start + 1 : end] if line[0] != " "]


def bert(layers: int) -> list[str]:
    parts = ("attention.self.query", "attention.output.dense", "output.dense")
    names = [f"bert.encoder.layer.{i}.{m}.weight" for i in range(layers) for m in parts]
    return [*names, "bert.pooler.dense.weight", "classifier.weight"]


def unet() -> list[str]:
    inner = ("attn1.to_q", "attn1.to_out.0", "ff.net.2")
    return [
        f"{side}_blocks.{i}.{m}.weight"
        for side in ("down", "up")
        for i in range(4)
        for m in (
            "resnets.0.conv1",
            "resnets.1.conv_shortcut",
            *(f"attentions.1.transformer_blocks.0.{k}" for k in inner),
        )
    ]


x, y, z = "x" * 220, "y" * 90, "z" * 30
ALIKE: dict[str, list[str]] = {
    "BERT": bert(12),
    "a hundred layers": bert(100),
    "UNet": unet(),
    "last character": [f"{x}{i}.weight" for i in range(3)],
    "first character": [f"{i}{x}.weight" for i in range(3)],
    "middle": [f"{x}{i}{x}.weight" for i in range(3)],
    "middle part": [f"{y}.{i}.{y}" for i in range(12)],
    "one in the other": [z + z, z + z + z, z + z + "1", f"{z}.{z}", f"{z}.{z}.{z}"],
    "no dots": [f"{z}_{i}_{z}_{j}_{z}" for i in range(3) for j in range(3)],
    "many parts": [".".join("0" * i + "1" + "0" * (60 - i)) for i in range(60)],
    "long and short": ["a", "b.weight", f"{z}.{z}.weight", f"{z}.{z}.bias", f"a.{z}.b"],
    "the same twice": [f"{z}.{z}", f"{z}.{z}", "a"],
    "dots": [f"..{z}..{z}", f".{z}.{z}.", f".{z}.{z}..", "."],
}


@pytest.mark.parametrize("names", ALIKE.values(), ids=ALIKE)
@pytest.mark.parametrize("size", [(64, 64), (1280, 1280, 3, 3), (10**9, 768)])
def test_no_two_rows_look_alike(names: list[str], size: tuple[int, ...]) -> None:
    total = math.prod(size)
    layers = [
        LayerReport(n, size, total // (i + 1), total) for i, n in enumerate(names)
    ]
    text = str(SparsityReport(tuple(layers)))
    rows = rows_of(text)
    assert len(rows) == len(names) and len({*rows}) == len({*names})
    assert max(map(len, text.splitlines())) <= 80
    # The same layer has the same row in each report.
    assert rows_of(str(make_report([0] * len(names), names=names)))
    for name, row in zip(names, rows, strict=True):
        # What is shown of a name is in it, in that order.
        places = re.split("…|#", row)
        assert re.search(".*".join(map(re.escape, places[: 1 + row.count("…")])), name)


parts = st.text("ab1_", min_size=1, max_size=40)


@given(
    names=st.lists(
        st.lists(parts, min_size=1, max_size=9).map(".".join),
        min_size=1,
        max_size=12,
        unique=True,
    ),
    more=st.lists(st.sampled_from(["a", "1", "weight", z]), max_size=4).map(".".join),
    total=st.integers(1, 10**12),
    size=st.integers(0, 7),
    empty=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_any_distinct_names_have_distinct_rows(
    names: list[str], more: str, total: int, size: int, empty: bool
) -> None:
    names = [f"{more}.{name}.{more}" for name in names]
    kept = 0 if empty else total
    layers = [LayerReport(name, (2048,) * size, kept, total) for name in names]
    text = str(SparsityReport(tuple(layers)))
    rows = rows_of(text)
    assert len({*rows}) == len(rows) == len(names)
    assert max(map(len, text.splitlines())) <= 80
    for width in (4, 11, 20):
        labels = numbered_names(names, width)
        assert len({*labels}) == len(names) and max(map(len, labels)) <= width


BIAS = "layers.0.blocks.0.attn.relative_position_bias_table"


@pytest.mark.parametrize(
    ("names", "width", "expected"),
    [
        # The beginning, the end, both, long parts, long parts after that.
        (bert(12), 35, "….0.attention.self.query.weight"),
        ([f"stages.2.blocks.{i}.dw.weight" for i in (1, 1000)], 30, None),
        ([f"a.blocks.{i}.linear.weight" for i in (1, 1000)], 22, "a.blocks.1.…"),
        ([f"a.stages.blocks.{i}.dw.weight" for i in (1, 1000)], 15, "….1.…"),
        ([BIAS, "head.weight"], 37, "layers.0.blocks.0.attn.relative_posi…"),
        (unet()[:2], 28, "….0.conv1.weight"),
        (unet(), 31, "down_….0.resne….0.conv1.weight"),
        (["classifier.weight", *bert(1)[:1]], 48, None),
    ],
)
def test_what_names_share_is_shortened_first(
    names: list[str], width: int, expected: str | None
) -> None:
    labels = shorten_names(names, width)
    assert labels[names[0]] == (expected or names[0])
    assert max(map(len, labels.values())) <= width


def test_a_label_is_explained_below_the_table() -> None:
    total = 768 * 3072
    layers = [LayerReport(name, (768, 3072), 9, total) for name in bert(12)]
    lines = str(SparsityReport(tuple(layers))).splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("total"))
    assert lines[place + 1 : place + 4] == [
        "….0.attention.self.query.weight is",
        "  bert.encoder.layer.0.attention.self.query.weight",
        "",
    ]
    assert " is " not in str(make_report())


def test_a_name_that_cannot_be_shortened_has_a_line_of_its_own() -> None:
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    layers = [LayerReport(n, (1280, 1280), 10**9, 10**10) for n in (name, "conv_in")]
    lines = str(SparsityReport(tuple(layers))).splitlines()
    row = lines.index(name)
    assert lines[row + 1].endswith("1,000,000,000 / 10,000,000,000   90.00 %")
    assert lines[row + 2].startswith("conv_in ")
    assert lines[row + 1].index("1280") == lines[row + 2].index("1280")


def test_ticks_of_layers_with_long_names_differ() -> None:
    names = [f"{y}.{i}.{y}.weight" for i in range(12)] + ["a.weight", "a"]
    axes = make_report([1] * 14, names=names).plot().axes[-1]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert len({*labels}) == 14 and max(map(len, labels)) <= 20


def test_exactly_the_empty_layers_are_marked() -> None:
    lines = str(make_report([50, 0, 1, 0])).splitlines()
    marked = [line.split()[0] for line in lines if line.endswith("  empty")]
    assert marked == ["conv2.weight", "fc.weight"]
    assert "empty layers: 2 of 4" in lines


@pytest.mark.parametrize(
    ("kept", "total", "shown"),
    [
        (0, 10**9, "100.00 %"),
        (1, 10**9, ">99.99 %"),
        (5, 10**5, ">99.99 %"),
        (6, 10**5, "99.99 %"),
        (10**5 - 6, 10**5, "0.01 %"),
        (10**9 - 1, 10**9, "<0.01 %"),
        (10**9, 10**9, "0.00 %"),
    ],
)
def test_100_and_0_percent_are_never_the_result_of_rounding(
    kept: int, total: int, shown: str
) -> None:
    layer_line, total_line = (
        line
        for line in str(make_report([kept], total=total, names=["w"])).splitlines()
        if line.startswith(("w ", "total "))
    )
    for line in (layer_line, total_line):
        assert line.removesuffix("  empty").endswith(f" {shown}")


def test_warnings_are_wrapped_and_complete() -> None:
    sentence = "Three layers are empty, " * 8 + "so nothing behind them learns."
    lines = str(make_report(warnings=["Short.", sentence])).splitlines()
    start = lines.index("warning: Short.")
    rest = lines[start + 1 :]
    assert len(rest) > 1
    assert " ".join(line.strip() for line in rest) == f"warning: {sentence}"


# Exports


def test_the_dictionary_survives_json() -> None:
    report = make_report(warnings=["A sentence."])
    exported = report.to_dict()
    assert json.loads(json.dumps(exported)) == exported
    assert exported["layers"][0] == {
        "name": "conv1.weight",
        "shape": [10, 100],
        "kept": 50,
        "total": 1000,
        "sparsity": 0.95,
    }
    del exported["layers"]
    assert exported == {
        "method": "force",
        "sparsity": 0.975,
        "density": 0.025,
        "kept": 100,
        "total": 4000,
        "coverage": 1.0,
        "passed_over": {},
        "warnings": ["A sentence."],
    }


def test_the_data_frame_has_a_row_a_layer() -> None:
    frame = make_report().to_dataframe()
    assert list(frame.columns) == ["name", "shape", "kept", "total", "sparsity"]
    assert tuple(frame["name"]) == NAMES
    assert list(frame["kept"]) == [50, 0, 25, 25]
    assert list(frame["sparsity"]) == [0.95, 1.0, 0.975, 0.975]
    # Shapes must be hashable for this.
    assert frame.groupby("shape")["kept"].sum().to_dict() == {(10, 100): 100}


@pytest.mark.parametrize(
    ("package", "call"), [("pandas", "to_dataframe"), ("matplotlib.figure", "plot")]
)
def test_a_missing_package_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, package: str, call: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "force_plugin.report.plot", raising=False)
    name = package.partition(".")[0]
    with pytest.raises(ImportError, match=rf"{call}\(\) needs .*pip install {name}"):
        getattr(make_report(), call)()


# Plot


def coordinates(line: Line2D) -> tuple[list[float], list[float]]:
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize(
    ("suffix", "signature"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")]
)
def test_the_suffix_chooses_the_format(
    tmp_path: Path, suffix: str, signature: bytes
) -> None:
    path = tmp_path / f"report.{suffix}"
    make_report().plot(path)
    assert path.read_bytes().startswith(signature)
    assert path.stat().st_size > 5000


def test_a_missing_folder_is_reported_with_the_path(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "report.png"
    with pytest.raises(FileNotFoundError, match=r"create the folder first") as caught:
        make_report().plot(path)
    assert str(path) in str(caught.value)


def test_each_curve_shows_the_density_of_its_layers_in_percent() -> None:
    figure = make_report().plot(compare={"snip": make_report([10, 20, 30, 40])})
    force, snip = figure.axes[0].get_lines()[:2]
    assert coordinates(snip)[1] == pytest.approx([1, 2, 3, 4])
    assert coordinates(force)[1] == pytest.approx(
        [5, float("nan"), 2.5, 2.5], nan_ok=True
    )
    assert figure.axes[0].get_yscale() == "log"
    assert force.get_color() != snip.get_color()
    assert force.get_marker() != snip.get_marker()


def test_empty_layers_lie_in_a_strip_of_their_own_a_row_a_method() -> None:
    figure = make_report([50, 0, 25, 0]).plot(
        compare={"snip": make_report([0, 0, 1, 1]), "random": make_report([1, 1, 1, 1])}
    )
    _, strip = figure.axes
    columns, rows = zip(*map(coordinates, strip.get_lines()), strict=True)
    assert columns == ([1, 3], [0, 1], [])
    assert set(rows[0]).isdisjoint(rows[1])
    low, high = sorted(strip.get_ylim())
    assert all(low < row < high for row in rows[0] + rows[1])
    assert [label.get_text() for label in strip.get_yticklabels()] == ["empty"]


def test_there_is_no_strip_where_no_layer_is_empty() -> None:
    assert len(make_report([1, 2, 3, 4]).plot().axes) == 1


def test_a_network_without_any_weight_can_be_plotted(tmp_path: Path) -> None:
    figure = make_report([0, 0, 0, 0]).plot(tmp_path / "empty.png")
    assert legend(figure) == ["force (100.00 % sparse)"]


@pytest.mark.parametrize("kept", [1, 1000])
def test_every_point_lies_inside_the_axes(kept: int) -> None:
    main = make_report([kept, 10, 10, 10]).plot().axes[0]
    low, high = main.get_ylim()
    assert low < kept / 10 < high


def test_the_legend_names_each_method_and_its_sparsity() -> None:
    figure = make_report(method=None).plot(
        compare={"snip": make_report([10, 10, 10, 10])}
    )
    assert legend(figure) == ["pruned (97.50 % sparse)", "snip (99.00 % sparse)"]


def test_the_density_of_the_network_is_drawn_where_all_methods_share_it() -> None:
    shared = make_report().plot(compare={"snip": make_report([25, 25, 25, 25])})
    line = shared.axes[0].get_lines()[-1]
    assert line.get_label() == "whole network"
    assert coordinates(line)[1] == [2.5, 2.5]

    different = make_report().plot(compare={"snip": make_report([1, 1, 1, 1])})
    labels = [line.get_label() for line in different.axes[0].get_lines()]
    assert "whole network" not in labels


def test_a_report_can_be_compared_with_one_of_the_same_label() -> None:
    figure = make_report().plot(compare={"force": make_report([10, 10, 10, 10])})
    assert legend(figure) == ["force (97.50 % sparse)", "force (99.00 % sparse)"]


def test_another_layer_name_is_an_error_that_shows_both() -> None:
    other = make_report(names=["conv1.weight", "stem.weight", *NAMES[2:]])
    message = r"compare\['snip'\].*layer 1 is 'stem.weight' instead of 'conv2.weight'"
    with pytest.raises(ValueError, match=message):
        make_report().plot(compare={"snip": other})


def test_another_number_of_layers_is_an_error_that_shows_both() -> None:
    other = make_report([1, 1, 1], names=NAMES[:3])
    with pytest.raises(ValueError, match=r"compare\['snip'\].*same 4 layers, got 3"):
        make_report().plot(compare={"snip": other})


def test_few_layers_are_named() -> None:
    axes = make_report().plot().axes[-1]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["conv1", "conv2", "conv3", "fc"]


@pytest.mark.parametrize(
    ("names", "stages"),
    [
        (
            [f"layer{i // 10}.{i % 10}.conv.weight" for i in range(30)],
            ["layer0", "layer1", "layer2"],
        ),
        (
            [f"stages.{i // 10}.blocks.{i % 10}.weight" for i in range(30)],
            ["stages.0", "stages.1", "stages.2"],
        ),
        # A stage a layer would be clutter.
        ([f"features.{i}.weight" for i in range(30)], []),
    ],
)
def test_many_layers_are_numbered_and_grouped_by_stage(
    names: list[str], stages: list[str]
) -> None:
    main = make_report([10] * 30, names=names).plot().axes[0]
    assert [text.get_text() for text in main.texts] == stages
    columns = [coordinates(line)[0] for line in main.get_lines()]
    boundaries = [start for start, *rest in columns if rest == [start]]
    assert boundaries == [9.5, 19.5][: len(stages)]
    assert main.get_xlabel() == "layer, by depth"


def test_there_is_no_title_unless_one_is_given() -> None:
    titles = [
        make_report().plot(title=title).legends[0].get_title().get_text()
        for title in (None, "ResNet-50")
    ]
    assert titles == ["", "ResNet-50"]


def test_a_notebook_shows_the_figure() -> None:
    figure: Any = make_report().plot()
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert len(figure._repr_png_()) > 5000


def test_pyplot_does_not_know_of_the_figure(tmp_path: Path) -> None:
    from matplotlib import pyplot, rcParams

    open_figures, settings = pyplot.get_fignums(), dict(rcParams)
    make_report().plot(tmp_path / "report.png")
    assert pyplot.get_fignums() == open_figures
    assert dict(rcParams) == settings
