"""The share of a model that is pruned, and the parts that are passed over."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from force_plugin.errors import Remark
from force_plugin.model.module_names import named_modules
from force_plugin.model.weights import Weight


@dataclass(frozen=True)
class Coverage:
    """The share of a model's matrices and kernels that chosen weights cover.

    Attributes:
        covered: Number of values of the chosen weights.
        passed_over: Number of values of all other matrices and kernels, by the type of
            their module.
    """

    covered: int
    passed_over: Mapping[str, int]

    @property
    def total(self) -> int:
        """The number of values of all matrices and kernels."""
        return self.covered + sum(self.passed_over.values())

    @property
    def share(self) -> float:
        """The share of these values that is covered, in [0, 1]."""
        return self.covered / self.total

    def __str__(self) -> str:
        """Return the covered share and the types that were passed over, in words."""
        return (
            f"{100 * self.share:.1f} % of the model's matrix and kernel weights "
            f"({self.covered:,} of {self.total:,})"
        ) + (f"; passed over: {listed(self.passed_over)}" if self.passed_over else "")

    def doubts(self) -> list[Remark]:
        """Return a remark if less than half is covered, else an empty list."""
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
    """Count the values of a model's matrices and kernels, without the named parameters.

    Args:
        model: Any module.
        parameters: Its parameters by name.
        names: Names of the parameters to leave out.

    Returns:
        Number of values by type of module, the largest number first. If a single
        parameter of a type was counted and its name is not ``weight``, the name follows
        the type.
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
    """Return the types of a weight's owners, and its name in the first owner."""
    path, _, computed = weight.name.partition(".parametrizations.")
    if computed:
        return type(modules[path]).__name__, "weight"
    kinds = dict.fromkeys(type(module).__name__ for module, _ in weight.owners)
    return " tied to ".join(kinds), weight.owners[0][1]


def listed(counts: Mapping[str, int]) -> str:
    """Return the first five counts in words, and the number of further types."""
    said = [f"{name} {count:,}" for name, count in counts.items()]
    more = f" and {len(said) - 5} more types" if len(said) > 5 else ""
    return ", ".join(said[:5]) + more
