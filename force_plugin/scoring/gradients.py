"""Gradients and Hessian–gradient products, summed over the batches of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from force_plugin.errors import NoGradientError
from force_plugin.model.module_names import name_some
from force_plugin.parallel.shards import Shards
from force_plugin.scoring.feed import Feed
from force_plugin.scoring.stand_ins import StandIns

LossOf = Callable[[Any, float], Tensor]
"""Returns the loss of a microbatch; the second argument is a temperature that divides
the outputs."""


class Sums(dict[str, Tensor]):
    """Gradients summed over batches, by parameter name; 16-bit gradients as float32.

    Args:
        leaves: The leaves that get gradients, by parameter name.
    """

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:  # noqa: D107
        super().__init__()
        self._leaves = leaves

    def add_gradients(
        self,
        outputs: Tensor | Sequence[Tensor],
        vectors: Sequence[Tensor] | None = None,
    ) -> None:
        """Add the gradients that :func:`torch.autograd.backward` computes.

        Args:
            outputs: Tensors to differentiate.
            vectors: Their gradients; default: 1, for scalars.
        """
        # The results of torch.autograd.grad can share memory: two weights that are
        # added to each other get a single gradient. A score would overwrite it twice.
        torch.autograd.backward(outputs, vectors, inputs=list(self._leaves.values()))
        for name, leaf in self._leaves.items():
            gradient = leaf.grad
            if gradient is None or gradient is self.get(name):
                continue
            dense = gradient.to_dense()  # an embedding may have a sparse gradient
            if dense is gradient and dense.itemsize >= 4:
                self[name] = dense  # the next backward pass adds its gradient to this
                continue
            leaf.grad = None
            self.add(name, dense)

    def add(self, name: str, gradient: Tensor) -> None:
        """Add a gradient. The first gradient of a name is kept without a copy."""
        wide = gradient.float() if gradient.itemsize < 4 else gradient
        if name in self:
            self[name].add_(wide)
        else:
            self[name] = wide

    def average(self, shards: Shards) -> None:
        """Average over ranks. A gradient that a rank does not have counts as 0."""
        for leaf in self._leaves.values():
            leaf.grad = None  # otherwise the next sum would begin with this gradient
        rows = shards.ranks.gather(*(name in self for name in self._leaves))
        for (name, leaf), *held in zip(self._leaves.items(), *rows, strict=True):
            if any(held) and name not in self:
                dtype = torch.promote_types(leaf.dtype, torch.float32)
                self[name] = torch.zeros_like(leaf, dtype=dtype, requires_grad=False)
        shards.average(self)

    def complete(
        self,
        shards: Shards,
        step: int,
        problem: str = "the loss does not use it, or behind a detach or no_grad only",
        advice: str = "leave it out with parameters=, or pass a forward= that uses it",
    ) -> dict[str, Tensor]:
        """Return the sums averaged over the ranks, in the order of the leaves.

        Args:
            shards: The division of parameters among the ranks.
            step: Number of the step, for a message.
            problem: Cause of a missing gradient, for a message.
            advice: What to do about it, for a message.

        Raises:
            NoGradientError: A leaf got no gradient.
        """
        self.average(shards)
        missing = [name for name in self._leaves if name not in self]
        if missing:
            raise NoGradientError(
                f"no gradient reached {name_some(missing)} at step {step}: {problem}",
                advice,
                missing,
            )
        return {name: self[name] for name in self._leaves}


class Gradients:
    """Derivatives of the loss with respect to the scored weights of a network.

    Args:
        stand_ins: The stand-ins of the scored weights, with respect to which the loss
            is differentiated.
        feed: Reads the batches.
        loss_of: Returns the loss of a microbatch.
        shards: The division of parameters among the ranks. Derivatives are averaged
            over the ranks.

    Attributes:
        loss: Mean loss of the last step; NaN before the first step.
    """

    def __init__(  # noqa: D107 (the class has it)
        self, stand_ins: StandIns, feed: Feed, loss_of: LossOf, shards: Shards
    ) -> None:
        self.loss = math.nan
        self._stand_ins = stand_ins
        self._feed = feed
        self._loss_of = loss_of
        self._shards = shards

    def mean(self, step: int) -> dict[str, Tensor]:
        """Return the mean of the gradients over the batches of a step.

        Raises:
            NoGradientError: A weight got no gradient from any batch.
        """
        total, number, totals = 0.0, 0, Sums(self._stand_ins.scored)
        for leaf in self._stand_ins.scored.values():
            leaf.grad = None  # of a measurement that has failed
        for number, batch in enumerate(self._feed.batches(step), start=1):  # noqa: B007
            for microbatch, share in self._feed.split(batch):
                loss = self._loss_of(microbatch, 1.0) * share
                totals.add_gradients(loss)
                total += loss.item()
        gradients = totals.complete(self._shards, step)
        count = self._note_loss(total, number)
        if count != 1:
            for gradient in gradients.values():
                gradient.div_(count)
        return gradients

    def hessian_products(self, step: int, temperature: float) -> dict[str, Tensor]:
        """Return Hg, with g held constant; both are summed over the batches of a step.

        Each microbatch passes through the network twice: for its part of g, and for the
        gradient of ⟨g, ∇L_b⟩. The last microbatch needs a single pass for both.

        Raises:
            TypeError, ValueError: The temperature is no positive number.
            NoGradientError: A weight got no gradient from any batch, or a second
                derivative is missing.
        """
        if isinstance(temperature, bool) or not isinstance(temperature, Real):
            raise TypeError(
                f"temperature: expected a number, got {type(temperature).__name__}"
            )
        if not 0 < temperature < math.inf:
            raise ValueError(
                f"temperature: expected a positive number, got {temperature}"
            )
        batches = list(self._feed.batches(step))
        pieces = [piece for batch in batches for piece in self._feed.split(batch)]
        *earlier, last = pieces
        scored = self._stand_ins.scored
        g = Sums(scored)
        for microbatch, share in earlier:
            g.add_gradients(self._loss_of(microbatch, temperature) * share)
        total, totals = 0.0, Sums(scored)
        # Fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            for piece in (last, *earlier):
                microbatch, share = piece
                loss = self._loss_of(microbatch, temperature) * share
                slopes = torch.autograd.grad(
                    loss, [*scored.values()], allow_unused=True, create_graph=True
                )
                pairs = dict(zip(scored, slopes, strict=True))
                slope = {n: s.to_dense() for n, s in pairs.items() if s is not None}
                if piece is last:
                    for name, gradient in slope.items():
                        g.add(name, gradient.detach())
                    g.complete(self._shards, step)
                _add_products(totals, slope, g)
                total += loss.item()
        self._note_loss(total, len(batches))
        totals.average(self._shards)
        weights = self._stand_ins.weights
        return {n: totals.get(n, torch.zeros_like(w)) for n, w in weights.items()}

    def _note_loss(self, total: float, batches: int) -> float:
        """Note the mean loss over all ranks, and return the batches per rank."""
        rows = self._shards.ranks.gather(total, batches)
        count = sum(row[1] for row in rows)
        self.loss = sum(row[0] for row in rows) / count
        return count / len(rows)


def _add_products(
    totals: Sums, slope: Mapping[str, Tensor], g: Mapping[str, Tensor]
) -> None:
    """Add the gradients of ⟨g, ∇L_b⟩ to ``totals``."""
    # A weight whose gradient depends on no weight has no curvature.
    curved = [name for name, s in slope.items() if s.requires_grad]
    if not curved:
        return
    # The backward pass of the gradients with these vectors gives the gradient of
    # ⟨g, ∇L_b⟩. The value of the product is not needed.
    vectors = [g[n].to(slope[n].dtype) for n in curved]
    try:
        totals.add_gradients([slope[n] for n in curved], vectors)
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        raise NoGradientError(
            f"GraSP needs second derivatives, and PyTorch lacks one: {error}",
            "take another activation or another method",
        ) from error


def refuse_recomputation(output: Tensor) -> None:
    """Raise NoGradientError if a graph has a part under reentrant checkpointing.

    The backward pass computes this part again. Only :func:`torch.autograd.backward`
    without ``inputs`` reaches the weights in this part.
    """
    ahead: list[Node | None] = [output.grad_fn]
    seen = set()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__ == "CheckpointFunctionBackward":
            raise NoGradientError(
                "the model recomputes activations by torch.utils.checkpoint with "
                "use_reentrant=True, which hides weights from the gradients that "
                "scoring takes",
                "pass use_reentrant=False there, as transformers' "
                'gradient_checkpointing_enable({"use_reentrant": False}) does, or turn '
                "it off until the model is pruned",
            )
        seen.add(node)
        ahead += [following for following, _ in node.next_functions]
