"""Which share of a model is pruned, and what is passed over."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from force_plugin.errors import Remark
from force_plugin.model.module_names import named_modules
from force_plugin.model.weights import Weight


@dataclass(frozen=True)
class Coverage:
    """How much of a model's matrices and kernels some of its weights are.

    Attributes:
        covered: Number of values of these weights.
        passed_over: Number of values of the others, by the type of their module.
    """

    covered: int
    passed_over: Mapping[str, int]

    @property
    def total(self) -> int:
        """Number of values of all of them."""
        return self.covered + sum(self.passed_over.values())

    @property
    def share(self) -> float:
        """The covered part of them, in [0, 1]."""
        return self.covered / self.total

    def __str__(self) -> str:
        """How much is covered, and what was passed over."""
        return (
            f"{100 * self.share:.1f} % of the model's matrix and kernel weights "
            f"({self.covered:,} of {self.total:,})"
        ) + (f"; passed over: {listed(self.passed_over)}" if self.passed_over else "")

    def doubts(self) -> list[Remark]:
        """What a user has to know who has not chosen the weights."""
        if self.share >= 0.5:
            return []
        return [
            Remark(
                f"the sparsity is that of only {self}",
                'to prune more, name all of it with parameters=[(module, "weight"), '
                "...]",
            )
        ]


def passed_over(
    model: nn.Module, parameters: Mapping[str, Weight], names: Collection[str]
) -> dict[str, int]:
    """Count the matrices and kernels of a model that have none of these names.

    Args:
        model: Any module.
        parameters: Its parameters by name.
        names: Names of parameters.

    Returns:
        Number of values by type of module, the largest first; with the name of the
        parameter where that is not ``weight`` and the only one.
    """
    passed: dict[str, dict[str, int]] = {}
    modules = dict(named_modules(model))
    for name, weight in parameters.items():
        if name not in names and weight.weighs:
            kinds, tensor = _kind_of(weight, modules)
            counts = passed.setdefault(kinds, {})
            counts[tensor] = counts.get(tensor, 0) + weight.dense.numel()
    labels = {}
    for kind, counts in passed.items():
        first, *others = counts
        alone = not others and first != "weight"
        labels[f"{kind}.{first}" if alone else kind] = sum(counts.values())
    return dict(sorted(labels.items(), key=lambda item: -item[1]))


def _kind_of(weight: Weight, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    """The types of the modules that have a weight, and its name in the first."""
    path, _, computed = weight.name.partition(".parametrizations.")
    if computed:
        return type(modules[path]).__name__, "weight"
    kinds = dict.fromkeys(type(module).__name__ for module, _ in weight.owners)
    return " tied to ".join(kinds), weight.owners[0][1]


def listed(counts: Mapping[str, int]) -> str:
    """The largest of some counts, and how many more there are."""
    said = [f"{name} {count:,}" for name, count in counts.items()]
    more = f" and {len(said) - 5} more types" if len(said) > 5 else ""
    return ", ".join(said[:5]) + more
