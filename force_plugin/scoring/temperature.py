"""Division of a network's outputs by a temperature, when a user's code calls it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from force_plugin.data.containers import describe, mapped, tensors


def divide(outputs: Any, temperature: float) -> tuple[Any, list[Tensor]]:
    """Divide the outputs of a network, except a loss among them.

    Args:
        outputs: Tensors, in tuples, lists and mappings.
        temperature: Divides the tensors that depend on weights.

    Returns:
        All outputs, and a list of the divided tensors.
    """
    divided: list[Tensor] = []

    def change(tensor: Tensor) -> Tensor:
        loss = tensor.dim() < 2 and tensor.numel() == 1
        if loss or not tensor.requires_grad:
            return tensor
        divided.append(tensor / temperature)
        return divided[-1]

    return mapped(change, outputs), divided


class Dividing:
    """Context manager that divides the outputs of modules.

    Only outermost calls count, that is calls that none of these modules makes.

    Args:
        modules: The network, or modules inside the network.
        temperature: Divides the outputs of the modules.

    Attributes:
        calls: Number of outermost calls.
    """

    def __init__(  # noqa: D107 (the class has it)
        self, modules: Sequence[nn.Module], temperature: float
    ) -> None:
        self.calls = 0
        self._modules = modules
        self._temperature = temperature
        self._handles: list[RemovableHandle] = []
        self._depth = 0
        self._divided: list[Tensor] = []
        self._failure = ""

    def __enter__(self) -> Dividing:
        for module in self._modules:
            self._handles += (
                module.register_forward_pre_hook(self._begin, with_kwargs=True),
                module.register_forward_hook(self._end, always_call=True),
            )
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def failure(self, loss: object) -> str:
        """Return why a loss comes from no divided output, or ``""`` if it does."""
        if not self.calls:
            return "forward= calls no module of the model"
        if len(self._modules) > 1 and self.calls > 1:
            return "forward= calls several modules of the model, and not the model"
        if self._failure or not isinstance(loss, Tensor):
            return self._failure
        if not _depends([loss], self._divided):
            return "the loss that forward= returns comes from within the model"
        return ""

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._depth += 1
        if self._depth == 1:
            self.calls += 1
            if self._divided and _depends(tensors((args, kwargs)), self._divided):
                self._failure = "outputs of the model are inputs of it again"

    def _end(self, module: nn.Module, args: Any, outputs: Any) -> Any:
        self._depth -= 1
        if self._depth:
            return None
        changed, divided = divide(outputs, self._temperature)
        if not divided and not list(tensors(outputs)):
            self._failure = f"the outputs of the model are {describe(outputs)}"
        self._divided += divided
        return changed if divided else None


def _depends(results: Iterable[Tensor], tensors: Sequence[Tensor]) -> bool:
    """Whether a result is one of these tensors, or was computed from them."""
    results = list(results)
    memory = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    if any(result.untyped_storage().data_ptr() in memory for result in results):
        return True
    sought = {tensor.grad_fn for tensor in tensors}
    stack: list[Node | None] = [result.grad_fn for result in results]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if node in sought:
            return True
        seen.add(node)
        stack += [operand for operand, _ in node.next_functions]
    return False
