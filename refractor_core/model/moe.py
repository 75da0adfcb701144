"""The mixture-of-experts layer, and the balancing of its router by bias.

Legend: B batch, S sequence (s: this rank's slice of it), T = B·s, M arrived rows, D model, F expert width, E experts, K experts per token,
L layers with experts.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from refractor_core.config.model import ModelConfig
from refractor_core.model.dispatch import Dispatch
from refractor_core.model.layers import SwiGLU
from refractor_core.model.output import RouterStatistics
from refractor_core.model.router import Router
from refractor_core.parallel.context import ContextSplit
from refractor_core.parallel.mesh import Mesh
from refractor_core.parallel.sharding import parameter
from refractor_core.parallel.tensor import TensorSplit
from refractor_core.parallel.weight_gradients import deferral
from refractor_kernels import experts


class Experts(nn.Module):
    """E SwiGLUs in two tensors, gate rows before up rows. The ``expert`` ranks share the experts, the ``expert_tensor`` ranks each
    expert's width.

    Attributes:
        assumed_load: rows that a dry run takes to arrive here, over an even share; real counts take no notice of it.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        *,
        residual_std: float,
        recompute: bool,
        kernels: str,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        super().__init__()
        count, width, hidden = config.moe.num_experts, config.hidden_size, config.moe.expert_hidden_size
        self.count, self.axes = count, (mesh.axis("expert"), mesh.axis("expert_tensor"))
        which, inside = ((axis,) for axis in self.axes)
        make = partial(parameter, expert=True, dtype=dtype, device=device)
        shape, blocks = (count, 2 * hidden, width), {1: (hidden, hidden)}
        self.gate_up_EFD = make(shape, std=config.init_std, splits={0: which, 1: inside}, blocks=blocks)
        self.down_EDF = make((count, width, hidden), std=residual_std, splits={0: which, 2: inside})
        self.op, self.recompute, self.assumed_load = partial(experts, backend=kernels), recompute, 1.0

    def dispatch(self, x_TD: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Dispatch:
        """Sends tokens on their way to their experts; other work may be done before they arrive."""
        return Dispatch(x_TD, indices_TK, weights_TK, self.count, *self.axes, self.assumed_load)

    def forward(self, x_MD: Tensor, indices_MK: Tensor, weights_MK: Tensor) -> Tensor:
        """[M, D]: the weighted sum of each arrived row's experts."""
        arguments = (x_MD, self.gate_up_EFD, self.down_EDF, indices_MK, weights_MK)
        op = partial(self.op, defer=deferral(self.gate_up_EFD, self.down_EDF))
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(op, *arguments, use_reentrant=False, preserve_rng_state=False)
        return op(*arguments)


class MixtureOfExperts(nn.Module):
    """Routed experts plus, if any, shared experts that every token visits, computed while routed tokens are under way.

    Tensor ranks first divide a context rank's tokens among them, so that none is routed twice.

    Shape: residual stream → (residual stream, the router's statistics).
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        mesh: Mesh,
        *,
        residual_std: float,
        recompute: bool,
        kernels: str,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        super().__init__()
        common = {"kernels": kernels, "dtype": dtype, "device": device}
        self.split = split = TensorSplit.of(mesh)
        self.router = Router(config.hidden_size, config.moe, layer, std=config.init_std, split=ContextSplit.with_tensor(mesh), **common)
        self.experts = Experts(config, mesh, residual_std=residual_std, recompute=recompute, **common)
        shared, stds = config.moe.num_shared_experts * config.moe.expert_hidden_size, {"std": config.init_std, "residual_std": residual_std}
        self.shared = SwiGLU(config.hidden_size, shared, split=split, **stds, **common) if shared else None

    def forward(self, x: Tensor) -> tuple[Tensor, RouterStatistics]:
        x_BsD = self.split.own_tokens(x)
        weights_TK, indices_TK, statistics = self.router(x_BsD)
        tokens = self.experts.dispatch(x_BsD.flatten(0, 1), indices_TK, weights_TK)
        shared = None if self.shared is None else self.shared(x)
        y_TD = tokens.back(self.experts(*tokens.arrive()))
        y = self.split.all_tokens(y_TD.view_as(x_BsD))
        return (y if shared is None else y + shared), statistics


def routers(model: nn.Module) -> list[Router]:
    """The routers of a model, in order of layers."""
    return sorted((module for module in model.modules() if isinstance(module, Router)), key=lambda router: router.layer)


@torch.no_grad()
def update_router_bias(model: nn.Module, counts_LE: Tensor) -> None:
    """b_e += rate · sign(mean(c) − c_e): experts that were chosen too often become less attractive (arXiv 2408.15664, algorithm 1).

    Args:
        counts_LE: choices of the whole global batch before any drop, a row per layer with experts.

    Raises:
        ValueError: another number of layers or experts; a router without a bias.
    """
    found = routers(model)
    if counts_LE.shape[0] != len(found):
        raise ValueError(f"counts_LE has {counts_LE.shape[0]} rows, expected one for each of the {len(found)} layers with experts")
    for router, count_E in zip(found, counts_LE.double(), strict=True):
        bias_E = router.expert_bias_E
        if bias_E is None:
            raise ValueError(f"layer {router.layer} has no selection bias: set model.moe.bias_update_rate")
        if count_E.shape != bias_E.shape:
            raise ValueError(f"counts_LE has {len(count_E)} experts, expected {len(bias_E)}")
        bias_E += router.config.bias_update_rate * (count_E.mean() - count_E).sign().to(bias_E)
