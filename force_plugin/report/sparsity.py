"""Report the weights left in each layer: a table, dictionary, data frame or plot."""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from force_plugin.errors import NothingToPruneError
from force_plugin.files import write_whole
from force_plugin.model.coverage import Coverage, passed_over
from force_plugin.model.weights import (
    Weight,
    named_parameters,
    whole_of,
)
from force_plugin.report.text import COLUMNS, percent, shorten, table_rows

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped, unused-ignore]
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LayerReport:
    """The number of weights that one layer has left.

    Attributes:
        name: Name of the parameter, e.g. ``"layer1.0.conv1.weight"``.
        shape: Shape of the parameter. Any sequence of integers is stored as a tuple.
        kept: Number of weights that the mask keeps.
        total: Number of weights of the dense layer.

    Raises:
        ValueError: Not 0 ≤ kept ≤ total, or total is 0.
    """

    name: str
    shape: tuple[int, ...]
    kept: int
    total: int

    def __post_init__(self) -> None:
        """Check the counts."""
        # A torch.Size is a tuple too, but prints and pickles as a torch.Size.
        object.__setattr__(self, "shape", tuple(self.shape))
        if not 0 <= self.kept <= self.total or self.total == 0:
            raise ValueError(
                f"{self.name}: expected 0 <= kept <= total and total >= 1, "
                f"got kept={self.kept} and total={self.total}"
            )

    @property
    def sparsity(self) -> float:
        """The fraction of the weights removed, in [0, 1]."""
        return (self.total - self.kept) / self.total

    @property
    def density(self) -> float:
        """The fraction of the weights kept, in [0, 1]."""
        return self.kept / self.total

    @property
    def empty(self) -> bool:
        """Whether the layer has no weight left."""
        return self.kept == 0


@dataclass(frozen=True, repr=False)
class SparsityReport:
    """The number of weights that a pruned network has left, layer by layer.

    ``print(report)`` shows a table of at most 80 columns.

    Attributes:
        layers: The pruned layers in the order of the network, at least one. Any
            sequence is stored as a tuple.
        warnings: Sentences that the user of this network should know. Default: none.
        method: The method that pruned the network, e.g. ``"force"``. Default: ``None``,
            unknown.
        passed_over: Numbers of weights in the matrices and kernels that were not to be
            pruned, by type of module. The parameter's name is added if it is not
            ``weight``. Matrices and kernels are floating-point parameters with at least
            two dimensions longer than 1, embeddings included. Parameters that are added
            to activations (biases, positions, tokens) do not count. Default: empty.

    Raises:
        ValueError: There is no layer.
    """

    layers: tuple[LayerReport, ...]
    warnings: tuple[str, ...] = ()
    method: str | None = None
    passed_over: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Store tuples, and check that there is at least one layer."""
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "warnings", tuple(self.warnings))
        if not self.layers:
            raise ValueError("layers: a report needs at least one layer")

    @property
    def total(self) -> int:
        """The number of prunable weights of the dense network."""
        return sum(layer.total for layer in self.layers)

    @property
    def kept(self) -> int:
        """The number of weights left."""
        return sum(layer.kept for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """The fraction of all prunable weights that are removed, in [0, 1]."""
        return (self.total - self.kept) / self.total

    @property
    def density(self) -> float:
        """The fraction of all prunable weights that are kept, in [0, 1]."""
        return self.kept / self.total

    @property
    def coverage(self) -> float:
        """The share of matrix and kernel weights that is prunable, in [0, 1].

        The sparsity refers to the prunable share only; ``passed_over`` counts the rest.
        """
        return Coverage(self.total, self.passed_over).share

    @property
    def empty_layers(self) -> tuple[LayerReport, ...]:
        """The layers that have no weight left, in the order of the network."""
        return tuple(layer for layer in self.layers if layer.empty)

    def __str__(self) -> str:
        """Return a table of layers with the total, the coverage and the warnings."""
        lines = _table(self)
        lines += ["", f"empty layers: {len(self.empty_layers)} of {len(self.layers)}"]
        if self.passed_over:
            lines += textwrap.wrap(
                f"prunable: {Coverage(self.total, self.passed_over)}",
                COLUMNS,
                subsequent_indent="  ",
            )
        for warning in self.warnings:
            lines += textwrap.wrap(
                f"warning: {warning}", COLUMNS, subsequent_indent="  "
            )
        return "\n".join(lines)

    # A notebook shows the value of a cell by repr.
    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain types that :func:`json.dumps` takes.

        Returns:
            A dictionary with ``method``, ``sparsity``, ``density``, ``kept``,
            ``total``, ``coverage``, ``passed_over``, ``warnings`` (a list of strings)
            and ``layers``. Each layer is a dictionary with ``name``, ``shape`` (a
            list), ``kept``, ``total`` and ``sparsity``.
        """
        return {
            "method": self.method,
            "sparsity": self.sparsity,
            "density": self.density,
            "kept": self.kept,
            "total": self.total,
            "coverage": self.coverage,
            "passed_over": dict(self.passed_over),
            "warnings": [str(warning) for warning in self.warnings],
            "layers": [
                {
                    "name": layer.name,
                    "shape": list(layer.shape),
                    "kept": layer.kept,
                    "total": layer.total,
                    "sparsity": layer.sparsity,
                }
                for layer in self.layers
            ],
        }

    def to_dataframe(self) -> pandas.DataFrame:
        """Return the layers as a data frame.

        Returns:
            A row for each layer in the order of the network, with the columns ``name``,
            ``shape`` (tuples), ``kept``, ``total`` and ``sparsity`` (a fraction).

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "to_dataframe() needs pandas: pip install pandas"
            ) from error
        frame = pandas.DataFrame(self.to_dict()["layers"])
        # Tuples, because a data frame cannot group by lists.
        return frame.assign(shape=[layer.shape for layer in self.layers])

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        compare: Mapping[str, SparsityReport] | None = None,
        title: str | None = None,
    ) -> Figure:
        """Draw the share of weights kept in each layer, by depth.

        The vertical axis is logarithmic, so 99 % and 99.9 % sparsity are far apart. An
        empty layer has no place on a logarithmic axis. The curve is interrupted at the
        empty layer, and a marker lies in the strip "empty" below. Each method has its
        own row in the strip. A dashed line marks the density of the whole network, if
        all methods have an equal density.

        Args:
            path: File to write, in the format of its suffix (``.png``, ``.pdf``,
                ``.svg``), 200 dots per inch. Default: ``None``, no file.
            compare: Reports of other methods on the layers of this report, by their
                label in the legend. Default: ``None``, this report alone.
            title: Title above the legend. Default: ``None``, no title.

        Returns:
            The figure, 7 inches wide, which a notebook shows. pyplot does not know the
            figure: no window opens and nothing has to be closed.

        Raises:
            ImportError: matplotlib is not installed.
            FileNotFoundError: The folder of ``path`` does not exist.
            IsADirectoryError: ``path`` is a folder.
            TypeError: ``compare`` is no mapping to reports.
            ValueError: A report in ``compare`` has other layers or another order, or
                the suffix of ``path`` is no format that matplotlib writes.
        """
        try:
            from force_plugin.report.plot import ShownFigure, draw
        except ImportError as error:
            raise ImportError(
                "plot() needs matplotlib: pip install matplotlib"
            ) from error
        if path is not None and Path(path).is_dir():
            raise IsADirectoryError(
                f"path: expected a file, got the folder {os.fspath(path)!r}; add the "
                "name of a file"
            )
        if path is not None and not Path(path).parent.is_dir():
            raise FileNotFoundError(
                "path: expected a file in an existing folder, got "
                f"{os.fspath(path)!r}; create the folder first"
            )
        if not isinstance(compare, Mapping | None):
            raise TypeError(
                "compare: expected a mapping of labels to reports, got "
                f"{type(compare).__name__}"
            )
        # A list, because two reports may have equal labels.
        curves = [(self.method or "pruned", self), *(compare or {}).items()]
        for label, other in curves[1:]:
            _check_same_layers(self, other, label)

        figure = ShownFigure(figsize=(7, 3.5), layout="constrained")
        draw(figure, curves)
        # The legend holds the title: matplotlib would lay a suptitle over the legend.
        figure.legend(
            loc="outside upper center",
            ncols=4,
            frameon=False,
            fontsize="small",
            columnspacing=1.2,
            title=title,
            title_fontsize="large",
        )
        if path is not None:
            # A path without a suffix gets matplotlib's default suffix.
            suffix = Path(path).suffix or f".{figure.canvas.get_default_filetype()}"
            drawing = io.BytesIO()
            figure.savefig(drawing, format=suffix[1:], dpi=200, bbox_inches="tight")
            write_whole(Path(path).with_suffix(suffix), drawing.getvalue())
        return figure


def _table(report: SparsityReport) -> list[str]:
    """Return the lines of the table, and a note that explains a shortened name."""
    kept_width, total_width = len(f"{report.kept:,}"), len(f"{report.total:,}")

    def cells(
        shape: Sequence[int], counts: LayerReport | SparsityReport
    ) -> tuple[str, ...]:
        return (
            shorten("x".join(map(str, shape)), 18),
            f"{counts.kept:>{kept_width},} / {counts.total:>{total_width},}",
            percent(counts),
            "" if counts.kept else "  empty",
        )

    rows = [
        ("shape", "kept / total", "sparsity", ""),
        *(cells(layer.shape, layer) for layer in report.layers),
        cells((), report),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    header, *layers, total = (
        f"{shape:<{widths[0]}}  {counts:>{widths[1]}}  {percent:>{widths[2]}}{mark}"
        for shape, counts, percent, mark in rows
    )
    names = [layer.name for layer in report.layers]
    room = COLUMNS - 3 * 2 - sum(widths)
    width = max(len("total"), min(max(map(len, names)), room))
    lines, note = table_rows(names, layers, width)
    rule = "-" * (width + 3 * 2 + sum(widths[:3]))
    return [
        f"{'layer':<{width}}  {header}",
        rule,
        *lines,
        rule,
        f"{'total':<{width}}  {total}",
        *note,
    ]


def sparsity_report(model: nn.Module) -> SparsityReport:
    """Return a report on the sparsity of a model, layer by layer.

    The report counts the weights of convolutions, linear layers and modules that behave
    like linear layers. It also counts every parameter that is pruned with
    :mod:`torch.nn.utils.prune`. Weights that the mask keeps count as kept. Without a
    mask, weights that are not 0 count as kept. So the report does not change when
    pruning is made permanent (:func:`torch.nn.utils.prune.remove`).

    Args:
        model: Any module, pruned or not.

    Returns:
        The report, without warnings and with ``method`` ``None``.

    Raises:
        TypeError: ``model`` is no module.
        NothingToPruneError: The model has no weight to report on.
    """
    parameters = named_parameters(model)
    weights = [
        weight
        for weight in parameters.values()
        if (weight.prunable or weight.mask is not None) and weight.dense.numel()
    ]
    if not weights:
        problem = "model: it has no convolution or linear weight to report on"
        if passed := passed_over(model, parameters, ()):
            problem += f"; passed over: {', '.join(passed)}"
        raise NothingToPruneError(problem)
    return report_of(model, parameters, weights)


def report_of(
    model: nn.Module,
    parameters: Mapping[str, Weight],
    weights: Iterable[Weight],
    kept: Mapping[str, int] | None = None,
    warnings: Sequence[str] = (),
    method: str | None = None,
) -> SparsityReport:
    """Return a report on given weights of a model.

    Args:
        model: The network.
        parameters: Its parameters by name.
        weights: Some weights of the network, in the network's order.
        kept: Number of weights left, by parameter name. Default: the number of True in
            a weight's mask, or the number of values that are not 0 without a mask.
        warnings: Sentences for the report.
        method: Name of the method.
    """
    layers = []
    for weight in weights:
        left = weight.dense.detach() if weight.mask is None else weight.mask
        count = (
            int(whole_of(left).count_nonzero()) if kept is None else kept[weight.name]
        )
        layers.append(LayerReport(weight.name, tuple(left.shape), count, left.numel()))
    rest = passed_over(model, parameters, [layer.name for layer in layers])
    return SparsityReport(tuple(layers), tuple(warnings), method, rest)


def _check_same_layers(
    report: SparsityReport, other: SparsityReport, label: str
) -> None:
    """Raise unless two reports have equal layer names in equal order."""
    if not isinstance(other, SparsityReport):
        raise TypeError(
            f"compare[{label!r}]: expected a SparsityReport, got {type(other).__name__}"
        )
    ours = [layer.name for layer in report.layers]
    theirs = [layer.name for layer in other.layers]
    for index, (our, their) in enumerate(zip(ours, theirs, strict=False)):
        if our != their:
            raise ValueError(
                f"compare[{label!r}]: expected the same layers in the same order, but "
                f"layer {index} is {their!r} instead of {our!r} "
                f"({len(theirs)} layers instead of {len(ours)})"
            )
    if len(ours) != len(theirs):
        raise ValueError(
            f"compare[{label!r}]: expected the same {len(ours)} layers, "
            f"got {len(theirs)}"
        )
