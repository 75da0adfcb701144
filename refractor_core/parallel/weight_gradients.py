"""Weights' gradients that are made later than those of activations: a pipeline schedule fills its bubbles with them.

Where a schedule splits the backward pass, the model's weights have a queue. In the backward pass for the input (I) a layer hands over
what its weights' gradients are made of; when their turn comes (W), they are made and given to autograd, at the parameter itself, whose
hooks then see them like any other. What is cheap does not take part and has its gradient in I: norms, the embedding, the output head,
whose gradient the loss makes along the way. What waits holds a layer's inputs and the gradients of its outputs, no graph.
Source: Qi et al. 2024, arXiv 2401.10241, section 2.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Make = Callable[[], tuple[Tensor, ...]]
"""Makes the gradients of some weights."""
Defer = Callable[[Make], tuple[Tensor | None, ...]]
"""Has them made now, or later: then it returns None for each."""


class WeightGradients:
    """The queue of one rank's weights, and the count of all gradients of a step, so that none is lost.

    Args:
        parameters: of the model; from now on each knows the queue.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self._open: Hashable | None = None
        self._waiting: dict[Hashable, list[tuple[tuple[nn.Parameter, ...], Make]]] = {}
        self._counts: dict[nn.Parameter, int] = {}
        for p in parameters:
            p.weight_gradients = self
            p.register_hook(partial(self._count, p))

    def _count(self, p: nn.Parameter, gradient: Tensor | None) -> None:
        if gradient is not None:
            self._counts[p] = self._counts.get(p, 0) + 1

    @contextmanager
    def deferring(self, key: Hashable) -> Iterator[None]:
        """While the context lasts, weights' gradients go into the queue under ``key``."""
        self._waiting[key], self._open = [], key
        try:
            yield
        finally:
            self._open = None

    def take(self, weights: tuple[nn.Parameter, ...], make: Make) -> tuple[Tensor | None, ...]:
        """A layer's backward pass hands in its weights' gradients; see ``Defer``."""
        if self._open is None:
            return make()
        self._waiting[self._open].append((weights, make))
        return (None,) * len(weights)

    def run(self, key: Hashable) -> None:
        """Makes the gradients that wait under ``key``, in the order they came, and lets go of each layer's inputs at once."""
        waiting = self._waiting.pop(key)[::-1]
        while waiting:
            weights, make = waiting.pop()
            torch.autograd.backward(weights, make())
            del make

    @property
    def deferred(self) -> set[nn.Parameter]:
        """Weights with a gradient in the queue."""
        return {weight for waiting in self._waiting.values() for weights, _ in waiting for weight in weights}

    def finish(self, expected: Mapping[nn.Parameter, int], names: Mapping[nn.Parameter, str]) -> None:
        """Ends a step.

        Args:
            expected: gradients that each parameter must have had.
            names: of the parameters.

        Raises:
            RuntimeError: gradients still wait, or a parameter had fewer or more; every such parameter is named.
        """
        counts, self._counts = self._counts, {}
        waiting, self._waiting = list(self._waiting), {}
        if waiting:
            raise RuntimeError(f"weights' gradients were never made: those of {', '.join(map(str, waiting))} still wait")
        wrong = [f"{names[p]} had {counts.get(p, 0)} instead of {n}" for p, n in expected.items() if counts.get(p, 0) != n]
        if wrong:
            raise RuntimeError(f"gradients of micro batches were lost, or came twice: {'; '.join(wrong)}")


def deferral(*weights: nn.Parameter) -> Defer | None:
    """How a layer hands in the gradients of its weights; None where they are not deferred."""
    queue = getattr(weights[0], "weight_gradients", None)
    return None if queue is None else partial(queue.take, weights)


def linear(x: Tensor, weight: nn.Parameter) -> Tensor:
    """x Wᵀ in the format of x. Shape: […, I] → […, O]; the weight is [O, I]."""
    defer = deferral(weight)
    return F.linear(x, weight.to(x.dtype)) if defer is None else _Linear.apply(x, weight, defer)


def product_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of the weight in ``linear``, [O, I], from the gradient of its result and its input."""
    return grad.flatten(0, -2).T @ x.flatten(0, -2)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, defer: Defer) -> Tensor:
        ctx.weight, ctx.defer = weight, defer
        ctx.save_for_backward(x)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        (x,) = ctx.saved_tensors
        dtype = ctx.weight.dtype
        grad_x = grad @ ctx.weight.to(x.dtype) if ctx.needs_input_grad[0] else None
        (grad_weight,) = ctx.defer(lambda: (product_gradient(grad, x).to(dtype),)) if ctx.needs_input_grad[1] else (None,)
        return grad_x, grad_weight, None
