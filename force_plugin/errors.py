"""The errors of this package: a class for each kind that a caller may want to catch.

Each class also inherits from a built-in error, so ``except ValueError`` or ``except
RuntimeError`` catches it too. An argument of the wrong type raises a plain
:class:`TypeError`.
"""

from __future__ import annotations

from collections.abc import Sequence


def _text(problem: str, advice: str) -> str:
    return "; ".join(filter(None, (problem, advice)))


class PruningError(Exception):
    """The base class of all error classes of this package.

    Args:
        problem: What was expected, and what was received.
        advice: How to solve the problem. Default: no advice.

    Attributes:
        problem: As given. The command line prints the problem with its own advice.
        advice: As given.
    """

    def __init__(self, problem: str, advice: str = "") -> None:  # noqa: D107
        super().__init__(problem, advice)
        self.problem = problem
        self.advice = advice

    def __str__(self) -> str:
        """Return problem and advice in one sentence."""
        return _text(self.problem, self.advice)


class NothingToPruneError(PruningError, ValueError):
    """The model has no weight to prune."""


class NotPrunedError(PruningError, ValueError):
    """The model or state dict is not pruned, but should be."""


class MaskMismatchError(PruningError, ValueError):
    """Masks do not fit the model: their names, their shapes, or their values."""


class BatchError(PruningError, ValueError):
    """The loader, a batch or the loss of a batch is invalid."""


class CollapseError(PruningError, RuntimeError):
    """The mask disconnects the network, or the scores give no ranking."""


class NoGradientError(PruningError, RuntimeError):
    """The loss does not use some of the weights.

    Args:
        problem: As in :class:`PruningError`.
        advice: As in :class:`PruningError`.
        names: Parameter names of the unused weights.

    Attributes:
        names: As given, a tuple.
    """

    def __init__(  # noqa: D107
        self, problem: str, advice: str = "", names: Sequence[str] = ()
    ) -> None:
        super().__init__(problem, advice)
        self.args = (problem, advice, tuple(names))
        self.names = tuple(names)


class NotFiniteError(PruningError, RuntimeError):
    """A loss, a gradient or a score is NaN or infinite."""


class MethodError(PruningError, ValueError):
    """A user's own saliency method breaks a rule for methods."""


class CompactionError(PruningError, RuntimeError):
    """Channels cannot be removed from the model."""


class FileFormatError(PruningError, ValueError):
    """A file has the wrong format, or is cut short."""


class RankError(PruningError, RuntimeError):
    """A process of a distributed job has failed, or the processes do not agree."""


class Remark(str):
    """A sentence of a report: a problem and advice.

    Args:
        problem: What the user should know.
        advice: How to solve the problem in Python. Default: no advice.

    Attributes:
        problem: As given. The command line prints the problem alone.
        advice: As given.
    """

    problem: str
    advice: str

    def __new__(cls, problem: str, advice: str = "") -> Remark:
        """Make the sentence from problem and advice."""
        remark = super().__new__(cls, _text(problem, advice))
        remark.problem = problem
        remark.advice = advice
        return remark
