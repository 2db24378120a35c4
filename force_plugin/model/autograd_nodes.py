"""What the nodes of autograd's graph say of the operations that they belong to.

PyTorch documents ``name()`` and ``next_functions`` of a node, and shows ``_saved_self``
as the way to look at what a node has saved. It promises neither the names of operations
nor those of what is saved: ``derivatives.yaml`` in PyTorch's sources has them.
``tests/model/test_torch_internals.py`` says which has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

_LAYERS = {
    "ConvolutionBackward0": (1, "_saved_input"),
    "AddmmBackward0": (2, "_saved_mat1"),
    "MmBackward0": (1, "_saved_self"),
}
"""Of each layer the index of the operand that is its weight, and the attribute with
the inputs that the weight multiplies."""


@dataclass(frozen=True)
class Product:
    """One operand of an operation that multiplies another operand.

    Attributes:
        node: The operation.
        factor: Index of the operand.
        saved: Name under which autograd saves its values.
        behind: Index of the operand that it multiplies.
        normalises: Whether the operand is the weight of a normalisation.
    """

    node: Node
    factor: int
    saved: str
    behind: int
    normalises: bool = False

    @property
    def values(self) -> Tensor | None:
        """Values of the operand, ``None`` where autograd has not saved them.

        Hooks for saved tensors run, which may compute the values anew.
        """
        found: Tensor | None = getattr(self.node, f"_saved_{self.saved}", None)
        return found


def operation(node: Node) -> str:
    """Return autograd's name of an operation, e.g. ``"MulBackward0"``.

    ``node.name`` would not do, as a user's :class:`torch.autograd.Function` may keep
    another value as ``ctx.name``.
    """
    return type(node).name(node)


def is_layer(node: Node) -> bool:
    """Whether an operation is a convolution or a product of matrices."""
    return operation(node) in _LAYERS


def has_weight(node: Node, operand: Node) -> bool:
    """Whether an operation is a layer, and an operand the weight of this layer."""
    index, _ = _LAYERS.get(operation(node), (None, ""))
    return index is not None and node.next_functions[index][0] is operand


def layer_inputs(node: Node) -> Tensor:
    """Return the inputs of a layer. Hooks for saved tensors run."""
    inputs: Tensor = getattr(node, _LAYERS[operation(node)][1])
    return inputs


def products(node: Node) -> list[Product]:
    """Return the products that an operation is made of; none for other operations."""
    name = operation(node)
    if "Norm" in name:
        return [Product(node, 1, "weight", 0, normalises=True)]
    if name.startswith("MulBackward"):
        return [Product(node, 0, "self", 1), Product(node, 1, "other", 0)]
    if name.startswith("AddcmulBackward"):
        return [Product(node, 1, "tensor1", 2), Product(node, 2, "tensor2", 1)]
    if name.startswith("LerpBackward"):
        return [Product(node, 2, "weight", 1)]
    return []


def sizes_before(node: Node) -> Sequence[int] | None:
    """Return the shape of the tensor that a reshape or an expansion was given."""
    sizes: Sequence[int] | None = getattr(node, "_saved_self_sym_sizes", None)
    return sizes


def shapes_of_results(node: Node) -> list[list[int]] | None:
    """Return the shape of each result of an operation.

    ``None`` for what is no operation of PyTorch's own.
    """
    # The inputs of a node are gradients of the results.
    metadata: Any = getattr(node, "_input_metadata", None)
    return None if metadata is None else [list(one.shape) for one in metadata]


def dimension(node: Node) -> int | None:
    """Return the axis of an operation, negative ones too."""
    saved: int | None = getattr(node, "_saved_dim", None)
    # Autograd stores it without its sign.
    return saved - 2**64 if saved is not None and saved >= 2**63 else saved


@dataclass
class SplitNode:
    """The attributes of a split that torch-pruning reads from its node."""

    _saved_split_sizes: list[int]
    _saved_dim: int = 1
