"""Which layers run how, and how long they take."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from force_plugin.report.text import COLUMNS, table_rows

if TYPE_CHECKING:
    from force_plugin.sparse.plan import Plan, Unsupported
    from force_plugin.sparse.training import TrainingPlan


@dataclass(frozen=True)
class LayerExecution:
    """How a layer runs.

    Attributes:
        name: Name of the layer.
        kept: Number of non-zeros among its weights.
        total: Number of its weights.
        runs: ``"sparse"``: its non-zeros alone; ``"dense"``: all weights, with the
            scales that follow.
        why: Reason in words.
        sparse_ms: Milliseconds of the layer by its non-zeros, ``None`` if not measured.
        dense_ms: Milliseconds of the layer as PyTorch computes it, or ``None``.
    """

    name: str
    kept: int
    total: int
    runs: str
    why: str
    sparse_ms: float | None = None
    dense_ms: float | None = None


@dataclass(frozen=True)
class ExecutionReport:
    """How the layers of a sparsified model run.

    Attributes:
        layers: The convolutions and linear layers that the plan knows, in the order in
            which they run. Layers that are called in other ways run as before.
        why_dense: Reason why the model as a whole runs its dense forward pass, ``""``
            if it does not.
        sparse_ms: Milliseconds of the whole model by its plan, ``None`` if not
            measured.
        dense_ms: Milliseconds of the model as it was, or ``None``.
    """

    layers: tuple[LayerExecution, ...]
    why_dense: str = ""
    sparse_ms: float | None = None
    dense_ms: float | None = None

    @classmethod
    def of(cls, plan: Plan | TrainingPlan | Unsupported | None) -> ExecutionReport:
        """Return the report of a plan, or of the reason why there is none."""
        if plan is None:
            return cls((), "there is no plan yet: call the model")
        return plan.report

    @property
    def plan(self) -> dict[str, str]:
        """The choice of each layer, to pass to ``sparsify`` as ``plan=``."""
        return {layer.name: layer.runs for layer in self.layers}

    def __str__(self) -> str:
        """Return a table of at most 80 columns: each layer, then sums."""
        rows = [("kept", "sparse ms", "dense ms", "runs")]
        rows += [
            (
                f"{100 * one.kept / max(one.total, 1):.2f} %",
                _milliseconds(one.sparse_ms),
                _milliseconds(one.dense_ms),
                one.runs,
            )
            for one in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        header, *rests = (
            "  ".join(f"{text:>{size}}" for text, size in zip(row, widths, strict=True))
            for row in rows
        )
        names = [layer.name for layer in self.layers]
        longest = max(map(len, ["layer", *names]))
        width = min(longest, COLUMNS - 2 - len(header))
        lines, note = table_rows(names, rests, width)
        rule = "-" * (width + 2 + len(header))
        return "\n".join(
            [f"{'layer':<{width}}  {header}", rule, *lines, rule, *self._sums(), *note]
        )

    def _sums(self) -> list[str]:
        if self.why_dense:
            return textwrap.wrap(f"the model runs dense: {self.why_dense}", COLUMNS)
        count = Counter(layer.runs for layer in self.layers)
        sums = [f"{count['sparse']} layers run sparse, {count['dense']} dense"]
        if self.sparse_ms and self.dense_ms:
            sums.append(
                f"the model takes {self.sparse_ms:.2f} ms, as before "
                f"{self.dense_ms:.2f} ms: {self.dense_ms / self.sparse_ms:.2f} times "
                "as fast"
            )
        return sums

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain lists and numbers, for JSON."""
        return asdict(self)


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
