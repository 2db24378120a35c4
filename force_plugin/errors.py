"""What goes wrong, by kind: one class for each that a caller may want to catch.

Each class is also the built-in error that a caller would expect, so that ``except
ValueError`` and ``except RuntimeError`` catch it too. An argument of the wrong type is
a plain :class:`TypeError`.
"""

from __future__ import annotations

from collections.abc import Sequence


def _text(problem: str, advice: str) -> str:
    return "; ".join(filter(None, (problem, advice)))


class PruningError(Exception):
    """Base class of all errors of this package that have a kind.

    Args:
        problem: What was expected and what came.
        advice: What to do about it. Default: nothing more to say.

    Attributes:
        problem: As given. The command line prints it with advice of its own.
        advice: As given.
    """

    def __init__(self, problem: str, advice: str = "") -> None:  # noqa: D107
        super().__init__(problem, advice)
        self.problem = problem
        self.advice = advice

    def __str__(self) -> str:
        """Problem and advice in one sentence."""
        return _text(self.problem, self.advice)


class NothingToPruneError(PruningError, ValueError):
    """The model has no weight that is to be pruned."""


class NotPrunedError(PruningError, ValueError):
    """The model or state dict was expected to be pruned, and is not."""


class MaskMismatchError(PruningError, ValueError):
    """Masks do not fit the model: their names, their shapes, or their values."""


class BatchError(PruningError, ValueError):
    """The loader, a batch or the loss of a batch is not as expected."""


class CollapseError(PruningError, RuntimeError):
    """The mask disconnects the network, or there is nothing to rank by."""


class NoGradientError(PruningError, RuntimeError):
    """The loss does not use some of the weights.

    Args:
        problem: As in :class:`PruningError`.
        advice: As in :class:`PruningError`.
        names: Parameter names of these weights.

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
    """A method of one's own does not do what a method has to."""


class CompactionError(PruningError, RuntimeError):
    """Channels cannot be taken out of the model."""


class FileFormatError(PruningError, ValueError):
    """A file is not what it should be, or is cut short."""


class RankError(PruningError, RuntimeError):
    """A process of a distributed job has failed, or the processes do not agree."""


class Remark(str):
    """A sentence of a report: a problem, and what to do about it.

    Args:
        problem: What the user should know.
        advice: What to do about it, in Python. Default: nothing more to say.

    Attributes:
        problem: As given. The command line prints it alone.
        advice: As given.
    """

    problem: str
    advice: str

    def __new__(cls, problem: str, advice: str = "") -> Remark:
        """Problem and advice in one sentence."""
        remark = super().__new__(cls, _text(problem, advice))
        remark.problem = problem
        remark.advice = advice
        return remark
