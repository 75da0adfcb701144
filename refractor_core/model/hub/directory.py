"""Reading and writing of Hugging Face directories: config.json and safetensors, in one file or several with an index."""

import json
import math
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refractor_core.config.model import ModelConfig
from refractor_core.model.decoder import Decoder
from refractor_core.model.hub import deepseek_v3, mixtral, olmoe, qwen3_moe
from refractor_core.model.hub.family import Family, HubConfig
from refractor_core.model.hub.names import Piece, pieces, state

_FAMILIES = {module.FAMILY.name: module.FAMILY for module in (mixtral, qwen3_moe, olmoe, deepseek_v3)}
_INDEX = "model.safetensors.index.json"


def config_from_hub(values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The model that a ``config.json`` describes.

    Args:
        values: its content.
        where: what errors call it.

    Raises:
        ValueError: another ``model_type``; a key with a value that is not supported, or missing.
    """
    return _family(values, where).from_hub(HubConfig(dict(values), where))


def _family(values: Mapping[str, Any], where: str) -> Family:
    kind = values.get("model_type")
    if kind not in _FAMILIES:
        raise ValueError(f"{where}: model_type = {kind!r} is not supported; supported: {', '.join(_FAMILIES)}")
    return _FAMILIES[kind]


class HubWeights:
    """The tensors of a Hugging Face directory under our names, read one at a time.

    Args:
        path: a directory of Mixtral, Qwen3-MoE, OLMoE or DeepSeek-V3.

    Attributes:
        config: of the model.

    Raises:
        ValueError: a model that is not supported; a tensor that is missing or superfluous.
    """

    def __init__(self, path: Path):
        values = _read_json(path / "config.json")
        self.config, family = config_from_hub(values, str(path / "config.json")), _family(values, str(path / "config.json"))
        self._path, self._reader = path, _Reader(path)
        self._pieces: dict[str, list[Piece]] = {}
        for piece in pieces(self.config, family):
            self._pieces.setdefault(piece.ours, []).append(piece)
        wanted = {piece.theirs for found in self._pieces.values() for piece in found}
        _superfluous(path, set(self._reader.files) - wanted, self.config)

    def __contains__(self, name: str) -> bool:
        return name in self._pieces

    @property
    def dtype(self) -> torch.dtype:
        """Format that the embedding is stored in."""
        return self._reader.dtype("model.embed_tokens.weight")

    @torch.no_grad()
    def read_into(self, name: str, target: Tensor) -> None:
        """Fills one of our tensors, whole; its dtype wins.

        Raises:
            ValueError: a part of it is missing or of another shape.
        """
        for piece in self._pieces[name]:
            view, tensor = piece.view(target), self._reader.tensor(piece.theirs)
            if tensor.shape != view.shape:
                told = f"{piece.theirs} has shape {tuple(tensor.shape)}, expected {tuple(view.shape)}"
                raise ValueError(f"{self._path}: {told} by config.json")
            view.copy_(tensor)


def import_hub(path: str | Path, dtype: torch.dtype | None = torch.float32, *, kernels: str = "auto") -> Decoder:
    """The decoder in a Hugging Face directory of Mixtral, Qwen3-MoE, OLMoE or DeepSeek-V3.

    Args:
        dtype: of the weights; None: as they are stored.

    Raises:
        ValueError: a model that is not supported; a tensor that is missing, superfluous or of another shape.
    """
    weights = HubWeights(Path(path))
    model = Decoder(weights.config, kernels=kernels, dtype=weights.dtype if dtype is None else dtype)
    for name, target in state(model).items():
        if name in weights:
            weights.read_into(name, target)
    return model


def _superfluous(path: Path, names: set[str], config: ModelConfig) -> None:
    """Weights of layers behind the last (multi-token prediction) are left out with a warning; others would be lost without a word."""
    beyond = {name for name in names if name.startswith("model.layers.") and int(name.split(".")[2]) >= config.num_layers}
    harmless = {name for name in names if name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == "lm_head.weight")}
    if beyond:
        warnings.warn(f"{path}: left out {len(beyond)} tensors of multi-token prediction, such as {min(beyond)}", stacklevel=3)
    lost = names - beyond - harmless
    if lost:
        raise ValueError(f"{path}: {len(lost)} tensors have no place in this model, such as {min(lost)}; is config.json its own?")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: not there; expected a Hugging Face directory with config.json and safetensors") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); copy it again from its source") from None


class _Reader:
    """Tensors by name over all files of a directory, opened once, mapped into memory."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        self.path = path
        names = sorted(set(_read_json(path / _INDEX)["weight_map"].values())) if (path / _INDEX).is_file() else ["model.safetensors"]
        self.files: dict[str, Any] = {}
        for name in names:
            if not (path / name).is_file():
                raise ValueError(f"{path / name}: not there; the directory's weights are incomplete")
            try:
                file = safe_open(path / name, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path / name}: damaged ({error}); copy it again from its source") from None
            self.files |= dict.fromkeys(file.keys(), file)

    def tensor(self, name: str) -> Tensor:
        """
        Raises:
            ValueError: there is none of that name.
        """
        if name not in self.files:
            raise ValueError(f"{self.path}: {name} is in none of its files; the weights are incomplete or not of this model")
        return self.files[name].get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """Format of one tensor."""
        return self.tensor(name).dtype


@torch.no_grad()
def export_hub(
    model: Decoder, path: str | Path, family: str | None = None, *, max_positions: int | None = None, shard_bytes: int = 5 * 10**9
) -> None:
    """Writes config.json and safetensors that Transformers loads; every tensor bit for bit.

    Args:
        family: Mixtral's, Qwen3-MoE's, OLMoE's or DeepSeek-V3's ``model_type``; None: the first that can express the model.
        max_positions: ``max_position_embeddings``; None: the stretched context, or 4096.
        shard_bytes: largest size of one file.

    Raises:
        ValueError: no family, or not the one asked for, can express the model: each key that stands in the way is named; or ``path``
            holds something.
        OSError: it could not be written; nothing is left.
    """
    path, config = Path(path), model.config
    chosen, values = _express(config, family)
    if config.moe.capacity_factor is not None:
        told = f"model.moe.capacity_factor = {config.moe.capacity_factor} has no place in config.json: Transformers runs the model dropless"
        warnings.warn(told, stacklevel=2)
    scaling = config.rope.scaling
    stretched = round(scaling.factor * scaling.original_context) if scaling else 4096
    held = state(model)
    values |= {
        "model_type": chosen.name,
        "max_position_embeddings": stretched if max_positions is None else max_positions,
        "dtype": str(held["embedding.weight"].dtype).removeprefix("torch."),
    }
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: is there already and not empty; give a new directory")
    draft = path.with_name(f".partial-{path.name}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        _write_weights(draft, list(pieces(config, chosen)), held, shard_bytes)
        (draft / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        draft.rename(path)  # takes the place of an empty directory too
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _express(config: ModelConfig, name: str | None) -> tuple[Family, dict[str, Any]]:
    if name is not None and name not in _FAMILIES:
        raise ValueError(f"family = {name!r} is not one of {', '.join(_FAMILIES)}")
    if config.moe is None:
        raise ValueError("model.moe = null: all families that can be exported have experts")
    reasons = []
    for family in [_FAMILIES[name]] if name else _FAMILIES.values():
        try:
            differing = _inexpressible(config, family)
        except ValueError as error:  # what would be written is not of this family at all
            reasons.append(f"{family.name} cannot express it ({error})")
            continue
        if not differing:
            return family, family.to_hub(config)
        reasons.append(f"{family.name} cannot express " + ", ".join(differing))
    raise ValueError("this model cannot be exported:\n  " + "\n  ".join(reasons))


def _inexpressible(config: ModelConfig, family: Family) -> list[str]:
    """Keys that do not survive the way to config.json and back. Training's own keys, a capacity's drops among them, do not count."""
    back = config_from_hub({**family.to_hub(config), "model_type": family.name, "max_position_embeddings": 4096})
    mine, theirs = (_flat(_resolved(c).model_dump()) for c in (config, back))
    return [f"model.{key} = {mine.get(key)!r}" for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]


def _resolved(config: ModelConfig) -> ModelConfig:
    """Defaults filled in, settings that the model does not read put to one value."""
    latent = config.attention.kind == "mla"
    attention = config.attention.model_copy(update={} if latent else {"latent": None})
    rate = None if config.moe.bias_update_rate is None else 0.0
    groups = {"num_groups": 1, "top_groups": 1} if config.moe.num_groups == config.moe.top_groups else {}
    moe = config.moe.model_copy(update={"capacity_factor": None, "bias_update_rate": rate, **groups})
    rope, scaling = config.rope, config.rope.scaling
    if scaling is not None:
        unread = scaling.kind == "linear" or not (scaling.mscale and scaling.mscale_all_dim)
        temperatures = {"mscale": 0.0} if unread else {}
        betas = {"beta_fast": 0.0, "beta_slow": 0.0, "mscale_all_dim": 0.0} if scaling.kind == "linear" else {}
        rope = rope.model_copy(update={"scaling": scaling.model_copy(update=temperatures | betas)})
    dense = config.dense_width if config.moe_layers().start else None
    sizes = {"num_kv_heads": config.kv_heads, "head_dim": None if latent else config.head_width, "dense_hidden_size": dense}
    return config.model_copy(update={"attention": attention, "moe": moe, "rope": rope, **sizes})


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def _write_weights(path: Path, written: list[Piece], held: dict[str, Tensor], shard_bytes: int) -> None:
    from safetensors.torch import save_file

    shards: list[list[Piece]] = [[]]
    filled = 0
    for piece in written:
        view = piece.view(held[piece.ours])
        size = math.prod(view.shape) * view.element_size()
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(piece)
        filled += size
    single = len(shards) == 1
    names = ["model.safetensors"] if single else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        tensors = {piece.theirs: piece.view(held[piece.ours]).cpu().clone(memory_format=torch.contiguous_format) for piece in shard}
        save_file(tensors, path / f"{name}.partial", metadata={"format": "pt"})
        os.replace(path / f"{name}.partial", path / name)
    if not single:
        index = {"metadata": {}, "weight_map": {p.theirs: name for name, shard in zip(names, shards, strict=True) for p in shard}}
        (path / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
