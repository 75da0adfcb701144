"""The update rule, on master weights in float32 at least.

The rules are PyTorch's. This file decides what they run on: a parameter in float32 or float64 is its own master, one in a lower precision
gets a float32 master, and gradients are the ``main_grad`` views of ``parallel.gradients``, which are read where they lie.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from refractor_core.config.training import OptimizerConfig
from refractor_core.parallel.gradients import main_dtype

ADAFACTOR_EPSILONS = (1e-15, 1e-3)
"""PyTorch squares the first before it bounds the second moment, so this is the paper's ε₁ = 1e-30. PyTorch's own default in float32,
1.2e-7, also bounds the mean square of a whole matrix from below; clipped gradients of large models lie under it and would be scaled
wrongly. The second is the paper's ε₂."""


class Optimizer:
    """AdamW (arXiv 1711.05101) or Adafactor (arXiv 1804.04235).

    Args:
        named_parameters: name and parameter, as a module gives them; those without ``requires_grad`` are left alone. At ``step`` each has
            ``main_grad`` in its shape and its master's dtype.
        config: section ``optimizer``. Weight decay applies to parameters of two dimensions and more, so not to norms and biases.

    Attributes:
        masters: name → master weights; the parameter itself where it is float32 or float64. The tensors stay the same for good.

    Adafactor's step is learning rate · RMS of the parameter (at least 1e-3), with the rate at most 1/√t; PyTorch takes the rate where the
    paper has 0.01. Its RMS, row and column means are of the tensor it is given, so a sharded parameter would get other updates.

    Raises:
        ValueError: no parameter requires a gradient, or two share a name.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig):
        self._parameters: dict[str, nn.Parameter] = {}
        for name, parameter in named_parameters:
            if name in self._parameters:
                raise ValueError(f"two parameters are named {name}; give each its own name")
            if parameter.requires_grad:
                self._parameters[name] = parameter
        if not self._parameters:
            raise ValueError("no parameter requires a gradient, so there is nothing to optimise; unfreeze some")
        self.masters: dict[str, Tensor] = {name: _master(p) for name, p in self._parameters.items()}
        lowered = [name for name, p in self._parameters.items() if self.masters[name] is not p]
        self._low = [self._parameters[name].detach() for name in lowered]
        self._low_masters = [self.masters[name] for name in lowered]
        self._rule = _rule(list(self.masters.values()), config)
        for master in self.masters.values():
            # Before the first step, so that a checkpoint holds the same names at every step.
            self._rule.state[master] = _empty_state(master, self._rule)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Updates masters and parameters from ``main_grad``. A skipped step is one where this is not called: step counts stay.

        Raises:
            ValueError: a parameter has no ``main_grad``, or one of another shape or dtype.
        """
        for group in self._rule.param_groups:
            group["lr"] = learning_rate
        try:
            for name, master in self.masters.items():
                master.grad = _checked_gradient(name, self._parameters[name], master)
            self._rule.step()
        finally:
            for master in self.masters.values():
                master.grad = None  # autograd would otherwise add the next micro batch into it
        self._write_back()

    def _write_back(self) -> None:
        if self._low:
            torch._foreach_copy_(self._low, self._low_masters)

    def state_tensors(self) -> dict[str, Tensor]:
        """``master.<parameter>`` and ``optimizer.<parameter>.<slot>``, step counts included: the tensors themselves, not copies."""
        found = {f"master.{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            found |= {f"optimizer.{name}.{slot}": tensor for slot, tensor in self._rule.state[master].items()}
        return found

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the state back, bit for bit, and writes the masters into the parameters. Changes nothing if it raises.

        Raises:
            ValueError: a name is missing or too many, or a shape or dtype differs; every mistake is named.
        """
        copy_exactly(self.state_tensors(), tensors, "optimizer state")
        self._write_back()


def _master(parameter: nn.Parameter) -> Tensor:
    dtype = main_dtype(parameter.dtype)
    return parameter if parameter.dtype == dtype else parameter.detach().to(dtype)


def _rule(masters: list[Tensor], config: OptimizerConfig) -> torch.optim.Optimizer:
    groups = [
        {"params": [m for m in masters if m.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [m for m in masters if m.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.kind == "adafactor":
        eps, decay, clip = ADAFACTOR_EPSILONS, config.beta2_decay, config.update_clip
        return torch.optim.Adafactor(groups, lr=config.learning_rate, beta2_decay=decay, eps=eps, d=clip)
    fused = all(m.device.type in ("cpu", "cuda") for m in masters)
    how = {"fused": True} if fused else {"foreach": True}
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon, **how)


def _empty_state(master: Tensor, rule: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the rule itself makes at its first step; a test holds the two together."""
    like = master.detach()
    if isinstance(rule, torch.optim.AdamW):
        step_device = master.device if rule.defaults["fused"] else "cpu"
        step = torch.zeros((), dtype=torch.float32, device=step_device)
        return {"step": step, "exp_avg": torch.zeros_like(like), "exp_avg_sq": torch.zeros_like(like)}
    step = torch.zeros((), dtype=torch.float32)
    if master.ndim < 2:
        return {"step": step, "variance": torch.zeros_like(like)}
    *batch, rows, columns = master.shape
    return {"step": step, "row_var": like.new_zeros(*batch, rows, 1), "col_var": like.new_zeros(*batch, 1, columns)}


def _checked_gradient(name: str, parameter: nn.Parameter, master: Tensor) -> Tensor:
    gradient = getattr(parameter, "main_grad", None)
    if gradient is None:
        raise ValueError(f"parameter {name} has no main_grad; make its gradient buffer before the first step")
    if gradient.shape != master.shape or gradient.dtype != master.dtype:
        told = f"{gradient.dtype} {tuple(gradient.shape)}"
        raise ValueError(f"main_grad of {name} is {told}; its master needs {master.dtype} {tuple(master.shape)}")
    return gradient


def copy_exactly(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor], what: str) -> None:
    """Copies tensors of the same names, shapes and dtypes; checks all before it copies one.

    Raises:
        ValueError: listing every name that is missing or too many or differs in shape or dtype.
    """
    mistakes = [f"{name} is missing" for name in targets if name not in sources]
    mistakes += [f"{name} is unknown" for name in sources if name not in targets]
    for name, target in targets.items():
        source = sources.get(name, target)
        if source.shape != target.shape or source.dtype != target.dtype:
            told = f"{source.dtype} {tuple(source.shape)}"
            mistakes.append(f"{name} is {told}, expected {target.dtype} {tuple(target.shape)}")
    if mistakes:
        raise ValueError(f"{what} does not fit this run (same model, optimizer and precision?): " + "; ".join(mistakes))
    for name, target in targets.items():
        target.copy_(sources[name])
