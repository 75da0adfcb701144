"""Writes a checkpoint so that a reader sees all of it or nothing."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from refractor_core.parallel.mesh import Axis

FORMAT = 1
MANIFEST = "manifest.json"


def write(directory: Path, step: int, tensors: Mapping[str, Tensor], state: dict, world: Axis) -> Path:
    """Writes ``directory/step-00000100`` from every rank's tensors; collective over ``world``.

    Args:
        directory: the run's ``checkpoints`` folder.
        step: updates done.
        tensors: what this rank contributes, by unique name; names of different ranks must not meet.
        state: JSON-able, taken from rank 0.

    Returns: the checkpoint's path, once it is complete, flushed to disk and in place.

    Raises:
        OSError: a rank could not write; every rank raises it, and nothing but the older checkpoints is left.
    """
    final = directory / f"step-{step:08d}"
    partial = directory / f".partial-{final.name}"
    if world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    _barrier(world)
    mine: dict = {}
    try:
        partial.mkdir(parents=True, exist_ok=True)
        mine = _write_file(partial / f"rank-{world.rank:05d}.safetensors", tensors)
    except Exception as error:  # told to every rank below: one that stops alone would leave the others waiting
        mine = {"error": _told(error, world)}
    entries = _gather(mine, world)
    failure = next((entry["error"] for entry in entries if "error" in entry), None)
    if failure is None and world.rank == 0:
        try:
            _write_manifest(partial, final, step, state, entries)
        except Exception as error:
            failure = _told(error, world)
    failure = _gather(failure, world)[0]
    if failure is not None:
        if world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        told, of_the_disk = failure
        mend = "free space or mend the disk" if of_the_disk else "this is a defect of REFRACTOR, please report it"
        kind = OSError if of_the_disk else RuntimeError
        raise kind(f"could not write checkpoint {final}: {told}. Older checkpoints are untouched; {mend}")
    return final


def _told(error: Exception, world: Axis) -> tuple[str, bool]:
    """What went wrong on this rank, and whether the disk is to blame: safetensors wraps the system's errors in its own."""
    from safetensors import SafetensorError

    return f"rank {world.rank}: {error}", isinstance(error, OSError | SafetensorError)


def seal(body: dict) -> str:
    """Checksum of a manifest's body."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def tensor_checksum(tensor: Tensor) -> str:
    """xxh3-128 of a CPU tensor's bytes."""
    return xxhash.xxh3_128_hexdigest(_bytes(tensor).numpy().data)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_file(path: Path, tensors: Mapping[str, Tensor]) -> dict:
    from safetensors import safe_open
    from safetensors.torch import save_file

    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(held, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    described = {}
    with safe_open(path, framework="pt") as written:
        for name, tensor in held.items():
            if not torch.equal(_bytes(written.get_tensor(name)), _bytes(tensor)):
                raise OSError(f"{path}: tensor {name} reads back other than it was written")
    for name, tensor in held.items():
        described[name] = {
            "file": path.name,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "xxh3": tensor_checksum(tensor),
        }
    return {"file": {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}}, "tensors": described}


def _write_manifest(partial: Path, final: Path, step: int, state: dict, entries: list[dict]) -> None:
    files: dict = {}
    tensors: dict = {}
    for entry in entries:
        files |= entry["file"]
        twice = tensors.keys() & entry["tensors"].keys()
        assert not twice, f"written by two ranks: {sorted(twice)[:3]}"
        tensors |= entry["tensors"]
    body = {"format": FORMAT, "step": step, "state": state, "files": files, "tensors": tensors}
    with (partial / MANIFEST).open("w") as file:
        json.dump({"body": body, "sha256": seal(body)}, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    flush_folder(partial)
    if final.exists():  # the same step again after a walk back: the older one was damaged or is replaced by equal bytes
        shutil.rmtree(final)
    partial.rename(final)
    flush_folder(final.parent)


def flush_folder(folder: Path) -> None:
    """Makes renames and new names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _gather(value: object, world: Axis) -> list:
    if world.size == 1:
        return [value]
    found: list = [None] * world.size
    dist.all_gather_object(found, value, group=world.group)
    return found


def _barrier(world: Axis) -> None:
    if world.size > 1:
        dist.barrier(group=world.group)
