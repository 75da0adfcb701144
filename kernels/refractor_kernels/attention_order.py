"""Which backend ``attention`` tries first for whole rows without a window: shipped in ``attention_order.json``, measured by
``python -m refractor_kernels.tune``. Neither waits for a device; all ranks must have the same, see ``gpu.tables.share``.

By architecture a list of entries, of which the first that holds the sizes counts: ``{"to": {size: largest value}, "order": [backends],
"source"}``, sizes being ``length`` and ``width``. ``torch`` is in every order, for it takes everything, and what comes after it is never
reached; so a backend that is wrong need only stand nowhere. The package flash_attn goes by its generation.
"""

import json
from pathlib import Path

import torch

TABLE = "attention_order"
"""Its name in a file of tuning tables."""
NAMES = ("flash_attn 3", "flash_attn 2", "cudnn", "triton", "torch")

_ORDER: dict[str, list[dict]] = json.loads((Path(__file__).parent / "attention_order.json").read_text())


def architecture(device: torch.device) -> str:
    """``sm90`` and the like; ``other`` where there is no CUDA."""
    if device.type != "cuda":
        return "other"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def entries() -> dict[str, list[dict]]:
    """By architecture."""
    return dict(_ORDER)


def put(found: dict[str, list[dict]]) -> None:
    """These count from now on; architectures that are not named keep what they have."""
    _ORDER.update(found)


def find(architecture: str, *, length: int, width: int, generation: int | None) -> tuple[list[str], str]:
    """Backends in the order to try them, and where that is from. Unlisted architectures keep to PyTorch's own choice.

    Args:
        generation: of the flash_attn that is installed; None: there is none.
    """
    sizes = {"length": length, "width": width}
    for entry in _ORDER.get(architecture, _ORDER["other"]):
        if all(sizes[name] <= bound for name, bound in entry["to"].items()):
            names = [name.split()[0] for name in entry["order"] if not name.startswith("flash_attn") or name == f"flash_attn {generation}"]
            return names, entry["source"]
    raise AssertionError(f"the last entry of {architecture} must have no bounds")


def checked(found: object) -> dict[str, list[dict]]:
    """What a file holds under ``TABLE``.

    Raises:
        ValueError: it is no such table.
    """
    if not isinstance(found, dict) or not all(isinstance(own, list) and own for own in found.values()):
        raise ValueError(f"{TABLE} is no list of entries by architecture")
    for own in found.values():
        for entry in own:
            fits = isinstance(entry, dict) and set(entry) == {"to", "order", "source"} and isinstance(entry["to"], dict)
            if not fits or not set(entry["to"]) <= {"length", "width"} or "torch" not in entry["order"] or set(entry["order"]) - set(NAMES):
                raise ValueError(f"{TABLE} has the entry {entry}; expected to, order (of {', '.join(NAMES)}, with torch) and source")
        if own[-1]["to"]:
            raise ValueError(f"{TABLE}: the last entry of an architecture must have no bounds")
    return found
