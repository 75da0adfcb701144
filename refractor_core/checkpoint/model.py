"""A model from disk: a REFRACTOR checkpoint, a run, or a Hugging Face directory."""

from pathlib import Path
from typing import Literal

import torch

from refractor_core.checkpoint.reader import Checkpoint
from refractor_core.checkpoint.writer import write
from refractor_core.config.model import ModelConfig
from refractor_core.model.decoder import Decoder
from refractor_core.model.hub import import_hub
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
    path = Path(path)
    if (path / "config.json").is_file():
        if weights == "ema":
            raise ValueError(f"{path}: a Hugging Face directory holds no moving average; ask for weights='live'")
        return import_hub(path, dtype).to(device)
    checkpoint = find_checkpoint(path)
    if weights == "ema" and not checkpoint.names("ema."):
        raise ValueError(f"{checkpoint.path}: keeps no moving average; set checkpoint.ema_decay in the run, or ask for live weights")
    model = Decoder(ModelConfig.model_validate(checkpoint.state["model"]), kernels=kernels, dtype=dtype, device=device)
    for name, target in model.named_parameters():
        checkpoint.read_into(f"ema.{name}" if weights == "ema" else stored_weight(checkpoint, name), target)
    for name, target in model.named_buffers():
        if f"buffer.{name}" in checkpoint:
            checkpoint.read_into(f"buffer.{name}", target)
    return model


def stored_weight(checkpoint: Checkpoint, name: str) -> str:
    """Under which name a checkpoint holds a parameter: its master, or, where it was imported or never trained, the weight itself."""
    return f"master.{name}" if f"master.{name}" in checkpoint else f"model.{name}"


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
