"""A model from disk: a REFRACTOR checkpoint, a run, or a Hugging Face directory."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from refractor_core.checkpoint.reader import Checkpoint
from refractor_core.checkpoint.writer import write
from refractor_core.config.model import ModelConfig
from refractor_core.model.decoder import Decoder
from refractor_core.model.hub import HubWeights, import_hub
from refractor_core.parallel.extent import Extent, copy_overlap
from refractor_core.parallel.mesh import Axis
from refractor_core.parallel.segments import Saved


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at ``path``, or the newest sound one of the run at ``path``.

    Raises:
        ValueError: there is none.
    """
    if (path / "manifest.json").is_file():
        return Checkpoint(path)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    checkpoint, damages = Checkpoint.newest_sound(folder)
    if checkpoint is None:
        told = "".join(f"\n  {damage}" for damage in damages)
        raise ValueError(f"{path}: expected a checkpoint, a run directory with one, or a Hugging Face directory{told}")
    return checkpoint


class Weights:
    """A model's weights on disk, read one tensor at a time, wherever they lie and whatever layout saved them.

    Args:
        path: a REFRACTOR checkpoint or run directory, or a Hugging Face directory (Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3).
        kind: live weights, from the masters where there are any, or their moving average.

    Attributes:
        config: of the model.

    Raises:
        DamagedCheckpoint: a manifest is not as written.
        ValueError: nothing that can be read is there, or no average was kept.
    """

    def __init__(self, path: Path, kind: Literal["live", "ema"] = "live"):
        self.path, self._kind = path, kind
        self._source: HubWeights | Checkpoint = HubWeights(path) if (path / "config.json").is_file() else find_checkpoint(path)
        if isinstance(self._source, HubWeights):
            self.config = self._source.config
            if kind == "ema":
                raise ValueError(f"{path}: a Hugging Face directory holds no moving average; ask for weights='live'")
            return
        self.config = ModelConfig.model_validate(self._source.state["model"])
        if kind == "ema" and not self._source.names("ema."):
            mend = "set checkpoint.ema_decay in the run, or ask for live weights"
            raise ValueError(f"{self._source.path}: keeps no moving average; {mend}")

    def _stored(self, name: str) -> str:
        """Under which name the source holds a parameter or a buffer."""
        if isinstance(self._source, HubWeights):
            return name
        families = ("ema." if self._kind == "ema" else "master.", "model.", "buffer.")  # model.: imported, so it has no master
        return next((family + name for family in families if family + name in self._source), name)

    def __contains__(self, name: str) -> bool:
        return self._stored(name) in self._source

    def misfits(self, config: ModelConfig) -> list[str]:
        """Everything that keeps the weights from being those of a model of this config."""
        mine, wanted = shapes(self.config), shapes(config)
        mistakes = [f"lacks {name}" for name in wanted if name not in mine or name not in self]
        mistakes += [f"has {name} besides" for name in mine if name not in wanted]
        return mistakes + [
            f"{name} has shape {list(mine[name])} instead of {list(shape)}"
            for name, shape in wanted.items()
            if name in mine and mine[name] != shape
        ]

    def read_into(self, name: str, target: Tensor, extent: Extent | None = None) -> None:
        """Fills a stretch of a parameter or buffer; the target's dtype wins. Of more than that, one tensor is in memory at a time.

        Args:
            target: contiguous, ``extent.numel`` elements, on any device.
            extent: where they lie in the whole tensor; None: the target is the whole tensor.

        Raises:
            DamagedCheckpoint: it is not as written.
            ValueError: it is not there, or has another shape.
        """
        extent = extent or Extent.whole(tuple(target.shape))
        if isinstance(self._source, Checkpoint):
            self._source.read_into(self._stored(name), target, extent)
            return
        whole = torch.empty(extent.global_shape, dtype=target.dtype)
        self._source.read_into(name, whole)
        stretch = torch.empty(target.shape, dtype=target.dtype)
        copy_overlap(stretch, extent, whole, Extent.whole(extent.global_shape))
        with torch.no_grad():
            target.copy_(stretch)


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's whole parameters."""
    return {name: tuple(p.shape) for name, p in Decoder(config, device="meta").named_parameters()}


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    device: torch.device | str = "cpu",
    weights: Literal["live", "ema"] = "live",
    kernels: str = "auto",
) -> Decoder:
    """A decoder with the weights at ``path``; ``model(tokens_BS).logits`` is [B, S, V].

    Args:
        path: a REFRACTOR checkpoint or run directory, or a Hugging Face directory (Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3).
        dtype: format of the weights.
        weights: live ones, from the float32 masters where the checkpoint has them, or their moving average.

    Raises:
        DamagedCheckpoint: a tensor is not as written.
        ValueError: nothing that can be loaded is there, or no average was kept.
    """
    source = Weights(Path(path), weights)
    model = Decoder(source.config, kernels=kernels, dtype=dtype, device=device)
    for name, target in [*model.named_parameters(), *model.named_buffers()]:
        if name in source or isinstance(target, torch.nn.Parameter):
            source.read_into(name, target)
    return model


def import_checkpoint(source: Path, target: Path) -> Path:
    """Turns a Hugging Face directory into the checkpoint ``target/step-00000000``, weights in the format they come in.

    Raises:
        ValueError: ``target`` already holds checkpoints, or the model is not one that can be read.
    """
    if Checkpoint.listed(target):
        raise ValueError(f"{target}: already holds checkpoints; give a new directory")
    model = import_hub(source, dtype=None)
    held = [Saved.whole(f"model.{name}", p.detach()) for name, p in model.named_parameters()]
    held += [Saved.whole(f"buffer.{name}", b) for name, b in model.named_buffers() if name in model.state_dict()]
    state = {"step": 0, "tokens": 0, "model": model.config.model_dump(mode="json")}
    return write(target, 0, held, state, Axis("world"))
