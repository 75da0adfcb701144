"""Writes a checkpoint so that a reader sees all of it or nothing."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from refractor_core.checkpoint.pieces import Holding, Piece, assign, flaw
from refractor_core.parallel.mesh import Axis
from refractor_core.parallel.segments import Saved

FORMAT = 2
MANIFEST = "manifest.json"


def write(directory: Path, step: int, held: Iterable[Saved], state: dict, world: Axis) -> Path:
    """Writes ``directory/step-00000100`` from what the ranks hold; collective over ``world``.

    What several ranks hold is written by one of them, so that each element is stored once; which one, rank 0 decides for all.

    Args:
        directory: the run's ``checkpoints`` folder.
        step: updates done.
        held: this rank's stretches, one for each tensor name.
        state: JSON-able, taken from rank 0.

    Returns: the checkpoint's path, once it is complete, flushed to disk and in place.

    Raises:
        OSError: a rank could not write; every rank raises it, and nothing but the older checkpoints is left.
        RuntimeError: the same, but the stretches are not every element of each tensor exactly once.
    """
    final, held = directory / f"step-{step:08d}", list(held)
    partial = directory / f".partial-{final.name}"
    if world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    told = gather([Holding.of(saved) for saved in held], world)
    chosen = _scatter(assign(told) if told else [], world)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        written = _write_file(partial / f"rank-{world.rank:05d}.safetensors", _by_name([held[place] for place in chosen]))
        written["chosen"] = chosen
    except Exception as error:  # told to every rank below: one that stops alone would leave the others waiting
        written = {"error": _told(error, world)}
    entries, failure = gather(written, world), None
    if world.rank == 0:
        failure = next((entry["error"] for entry in entries if "error" in entry), None)
        try:
            if failure is None:
                _write_manifest(partial, final, step, state, told, entries)
        except Exception as error:
            failure = _told(error, world)
    failure = broadcast(failure, world)
    if failure is not None:
        if world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        reason, of_the_disk = failure
        mend = "free space or mend the disk" if of_the_disk else "this is a defect of REFRACTOR, please report it"
        kind = OSError if of_the_disk else RuntimeError
        raise kind(f"could not write checkpoint {final}: {reason}. Older checkpoints are untouched; {mend}")
    return final


def _by_name(held: list[Saved]) -> dict[str, Tensor]:
    found = {saved.name: saved.tensor.reshape(saved.extent.box_shape if saved.extent.is_box else -1) for saved in held}
    assert len(found) == len(held), "a rank holds two stretches of one name"
    return found


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
    with safe_open(path, framework="pt") as written:
        for name, tensor in held.items():
            if not torch.equal(_bytes(written.get_tensor(name)), _bytes(tensor)):
                raise OSError(f"{path}: tensor {name} reads back other than it was written")
    checksums = {name: tensor_checksum(tensor) for name, tensor in held.items()}
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path), "xxh3": checksums}


def _write_manifest(partial: Path, final: Path, step: int, state: dict, held: list[list[Holding]], entries: list[dict]) -> None:
    files = {entry["file"]: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for entry in entries}
    unseen = [name for name in files if not (partial / name).is_file()]
    if unseen:
        told = f"{unseen[0]} was written by another machine and cannot be seen from here"
        raise OSError(f"{told}; run.dir must be on a file system that all machines share")
    tensors = _described(held, entries)
    body = {"format": FORMAT, "step": step, "state": state, "files": files, "tensors": tensors}
    with (partial / MANIFEST).open("w") as file:
        json.dump({"body": body, "sha256": seal(body)}, file, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    flush_folder(partial)
    if final.exists():  # the same step again after a walk back: the older one was damaged or is replaced by equal bytes
        shutil.rmtree(final)
    partial.rename(final)
    flush_folder(final.parent)


def _described(held: list[list[Holding]], entries: list[dict]) -> dict:
    """The manifest's account of each tensor, from what the ranks say that they have written.

    Raises:
        ValueError: that is not every element of each tensor exactly once, or ranks differ about its shape or dtype.
    """
    pieces: dict[str, list[tuple[Holding, Piece]]] = {name: [] for name in sorted({h.name for holdings in held for h in holdings})}
    for holdings, entry in zip(held, entries, strict=True):
        for holding in (holdings[place] for place in entry["chosen"]):
            piece = Piece(entry["file"], holding.name, entry["xxh3"][holding.name], holding.extent)
            pieces[holding.name].append((holding, piece))
    tensors, flaws = {}, [f"{name}: no rank wrote it" for name, found in pieces.items() if not found]
    for name, found in ((name, found) for name, found in pieces.items() if found):
        dtypes, shapes = {holding.dtype for holding, _ in found}, {holding.extent.global_shape for holding, _ in found}
        if len(dtypes) > 1 or len(shapes) > 1:
            flaws.append(f"{name}: written in shapes {sorted(shapes)} and formats {sorted(dtypes)}")
            continue
        shape = list(shapes.pop())
        wrong = flaw(shape, [piece.extent for _, piece in found])
        flaws += [f"{name}: {wrong}"] if wrong else []
        tensors[name] = {"dtype": dtypes.pop(), "shape": shape, "pieces": [piece.record() for _, piece in found]}
    if flaws:
        raise ValueError(f"what the ranks wrote is not whole: {'; '.join(flaws[:10])}{' …' if len(flaws) > 10 else ''}")
    return tensors


def flush_folder(folder: Path) -> None:
    """Makes renames and new names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def gather(value: object, world: Axis) -> list:
    """Every rank's value, by rank, on rank 0; an empty list on the others."""
    if world.size == 1:
        return [value]
    found: list = [None] * world.size if world.rank == 0 else []
    dist.gather_object(value, found or None, dst=world.ranks[0], group=world.group)
    return found


def broadcast(value: object, world: Axis) -> object:
    """Rank 0's value."""
    if world.size == 1:
        return value
    found = [value]
    dist.broadcast_object_list(found, src=world.ranks[0], group=world.group)
    return found[0]


def _scatter(values: list, world: Axis) -> Any:
    """This rank's value of rank 0's list."""
    if world.size == 1:
        return values[0]
    found: list = [None]
    dist.scatter_object_list(found, values or None, src=world.ranks[0], group=world.group)
    return found[0]
