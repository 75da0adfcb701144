"""Reads checkpoints, and says exactly what is wrong with one."""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refractor_core.checkpoint.pieces import Piece, flaw, upgraded
from refractor_core.checkpoint.writer import FORMAT, MANIFEST, broadcast, file_sha256, gather, seal, tensor_checksum
from refractor_core.parallel.extent import Extent, common, copy_overlap
from refractor_core.parallel.mesh import Axis

ALONE = Axis("world")
"""One process reads for itself."""
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Damage:
    """Something in a checkpoint that is not what was written."""

    path: Path
    reason: str
    tensor: str | None = None

    def __str__(self) -> str:
        return f"{self.path}: {f'tensor {self.tensor}: ' if self.tensor else ''}{self.reason}"


class DamagedCheckpoint(ValueError):
    """A checkpoint that does not hold what was written."""

    def __init__(self, damages: list[Damage]):
        self.damages = damages
        super().__init__("\n".join(str(damage) for damage in damages))


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint on disk."""

    path: Path

    @classmethod
    def listed(cls, directory: Path) -> list["Checkpoint"]:
        """Checkpoints of a run, oldest first; folders under way or of other names are not among them.

        Raises:
            ValueError: ``directory`` is there, but is no folder.
        """
        if not directory.is_dir():
            if directory.exists():
                raise ValueError(f"{directory}: is a file where a folder of checkpoints is expected; move it away")
            return []
        steps = {int(match[1]): path for path in directory.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()}
        return [cls(steps[step]) for step in sorted(steps)]

    @classmethod
    def newest_sound(cls, directory: Path, world: Axis = ALONE) -> tuple["Checkpoint | None", list[Damage]]:
        """The newest checkpoint that verifies, and the damage found in newer ones on the way back to it.

        Collective over ``world``, whose ranks share the reading; which checkpoints there are, rank 0 sees for all.
        """
        damages: list[Damage] = []
        for checkpoint in broadcast(cls.listed(directory)[::-1] if world.rank == 0 else [], world):
            parts = gather(checkpoint.verify(world.rank, world.size), world)
            found = broadcast([damage for part in parts for damage in part], world)
            if not found:
                return checkpoint, damages
            damages += found
        return None, damages

    @cached_property
    def manifest(self) -> dict:
        """The manifest's body.

        Raises:
            DamagedCheckpoint: it is missing, cannot be read, or its own checksum fails.
        """
        path = self.path / MANIFEST
        try:
            outer = json.loads(path.read_text())
            body, checksum = outer["body"], outer["sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpoint([Damage(path, f"cannot be read ({error})")]) from error
        if seal(body) != checksum:
            raise DamagedCheckpoint([Damage(path, "its checksum does not match its content")])
        if body["format"] not in (1, FORMAT):
            raise DamagedCheckpoint([Damage(path, f"is of format {body['format']}, this version reads 1 and {FORMAT}")])
        body = upgraded(body) if body["format"] == 1 else body
        outside = {piece["file"] for told in body["tensors"].values() for piece in told["pieces"]} - body["files"].keys()
        outside |= {name for name in body["files"] if Path(name).name != name}
        if outside:  # a checkpoint from somewhere else must not have files read that are not its own
            raise DamagedCheckpoint([Damage(path, f"names files that are not the checkpoint's own: {', '.join(sorted(outside))}")])
        return body

    @property
    def step(self) -> int:
        """Updates done."""
        return self.manifest["step"]

    @property
    def state(self) -> dict:
        """What rank 0 saved beside the tensors."""
        return self.manifest["state"]

    def __reduce__(self) -> tuple:
        return Checkpoint, (self.path,)  # without open files; another process reads the manifest itself

    def __contains__(self, name: str) -> bool:
        return name in self.manifest["tensors"]

    def names(self, prefix: str = "") -> list[str]:
        """Names of the tensors that begin with ``prefix``."""
        return [name for name in self.manifest["tensors"] if name.startswith(prefix)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self.manifest["tensors"][name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return getattr(torch, self.manifest["tensors"][name]["dtype"])

    def pieces(self, name: str) -> list[Piece]:
        """What a tensor is stored as."""
        if name not in self._pieces:
            told = self.manifest["tensors"][name]
            self._pieces[name] = [Piece.from_record(record, told["shape"]) for record in told["pieces"]]
        return self._pieces[name]

    def summary(self) -> str:
        """Such as ``12.3 MiB in 4 files, 103 tensors in 127 pieces, saved with tensor=2, data_shard=2 on 4 ranks``."""
        files, names, layout = self.manifest["files"], self.names(), self.state.get("layout")
        size, pieces = sum(told["bytes"] for told in files.values()) / 2**20, sum(len(self.pieces(name)) for name in names)
        told = f"{size:.1f} MiB in {len(files)} file{'s' * (len(files) > 1)}, {len(names)} tensors in {pieces} pieces"
        if layout is None:  # imported, or of the first format
            return told
        split = [f"{name}={value}" for name, value in layout.items() if type(value) is int and value > 1 and name != "world_size"]
        split += ["sequence"] if layout["sequence"] else []
        world = layout["world_size"]
        return f"{told}, saved with {', '.join(split)} on {world} ranks" if world > 1 else f"{told}, saved by one process"

    def verify(self, part: int = 0, parts: int = 1) -> list[Damage]:
        """Reads every byte. Empty if all is as written; otherwise names each damaged tensor, or the file where no tensor is hit.

        Args:
            part, parts: to read the ``part``-th of ``parts`` shares of the files; what is not in the files the first part looks at.
        """
        try:
            manifest = self.manifest
        except DamagedCheckpoint as error:
            return error.damages if part == 0 else []
        damages = [damage for name in sorted(manifest["files"])[part::parts] for damage in self._verify_file(name)]
        if part == 0:
            for name, told in manifest["tensors"].items():
                wrong = flaw(told["shape"], [piece.extent for piece in self.pieces(name)])
                damages += [Damage(self.path / MANIFEST, wrong, name)] if wrong else []
            known = {MANIFEST, *manifest["files"]}
            damages += [Damage(p, "does not belong to this checkpoint") for p in sorted(self.path.iterdir()) if p.name not in known]
        return damages

    def _verify_file(self, name: str) -> list[Damage]:
        path, told = self.path / name, self.manifest["files"][name]
        if not path.is_file():
            return [Damage(path, "is missing")]
        if path.stat().st_size != told["bytes"]:
            return [Damage(path, f"has {path.stat().st_size} bytes instead of {told['bytes']}")]
        try:
            if file_sha256(path) == told["sha256"]:
                return []
        except OSError as error:
            return [Damage(path, f"cannot be read ({error})")]
        hit = list(dict.fromkeys(self._damaged_tensors(name)))
        return hit or [Damage(path, "its checksum does not match; no tensor's bytes are hit")]

    def _damaged_tensors(self, file: str) -> Iterator[Damage]:
        for name in self.names():
            for piece in self.pieces(name):
                if piece.file == file:
                    try:
                        self._read(name, piece)
                    except DamagedCheckpoint as error:
                        yield from error.damages

    def _read(self, name: str, piece: Piece) -> Tensor:
        """A piece as it is in its file, checked against its checksum the first time."""
        path = self.path / piece.file
        try:
            file = self._file(piece.file)
        except Exception as error:
            raise DamagedCheckpoint([Damage(path, f"cannot be read ({error})")]) from error
        try:
            tensor = file.get_tensor(piece.key)
        except Exception as error:  # a flipped bit in the file's header can break the parser anywhere
            raise DamagedCheckpoint([Damage(path, f"cannot be read ({error})", name)]) from error
        if (piece.file, piece.key) not in self._sound:
            if tensor.dtype != self.dtype(name) or tensor.numel() != piece.extent.numel or tensor_checksum(tensor) != piece.xxh3:
                raise DamagedCheckpoint([Damage(path, "its bytes are not the ones written", name)])
            self._sound.add((piece.file, piece.key))
        return tensor

    def _file(self, name: str) -> Any:
        from safetensors import safe_open

        if name not in self._files:
            self._files[name] = safe_open(self.path / name, framework="pt")
        return self._files[name]

    @cached_property
    def _files(self) -> dict[str, Any]:
        return {}

    @cached_property
    def _pieces(self) -> dict[str, list[Piece]]:
        return {}

    @cached_property
    def _sound(self) -> set[tuple[str, str]]:
        return set()

    @torch.no_grad()
    def read_into(self, name: str, target: Tensor, extent: Extent | None = None) -> None:
        """Fills a stretch of a tensor from the pieces that have part of it; other pieces are not read. The target's dtype wins.

        Args:
            target: contiguous, ``extent.numel`` elements, on any device.
            extent: where they lie in the whole tensor; None: the target is the whole tensor.

        Raises:
            DamagedCheckpoint: a piece is not as written, or the pieces do not hold every element once.
            ValueError: there is no tensor of that name, or it has another shape.
        """
        extent = extent or Extent.whole(tuple(target.shape))
        if mistakes := self.misfits([(name, extent.global_shape, None)]):
            raise ValueError(f"{self.path}: {mistakes[0]}")
        stretch = target if target.device.type == "cpu" else torch.empty(extent.numel, dtype=self.dtype(name))
        copied = 0
        for piece in self.pieces(name):
            if next(common(extent, piece.extent), None) is not None:
                copied += copy_overlap(stretch, extent, self._read(name, piece), piece.extent)
        if copied != extent.numel:
            told = f"its pieces hold {copied} elements of a stretch of {extent.numel}"
            raise DamagedCheckpoint([Damage(self.path / MANIFEST, told, name)])
        if stretch is not target:
            target.copy_(stretch.view(target.shape))

    def misfits(self, wanted: Iterable[tuple[str, tuple[int, ...], torch.dtype | None]], families: tuple[str, ...] = ()) -> list[str]:
        """Everything that keeps the checkpoint from filling tensors of these names, shapes and dtypes (None: any).

        Args:
            families: beginnings of names; a tensor of such a name that is not wanted is a mistake too.
        """
        mistakes, known = [], set()
        for name, shape, dtype in wanted:
            known.add(name)
            if name not in self:
                mistakes.append(f"lacks {name}")
            elif self.shape(name) != tuple(shape):
                mistakes.append(f"{name} has shape {list(self.shape(name))} instead of {list(shape)}")
            elif dtype not in (None, self.dtype(name)):
                mistakes.append(f"{name} is {self.dtype(name)} instead of {dtype}")
        besides = [name for family in families for name in self.names(family) if name not in known]
        return mistakes + [f"has {name} besides" for name in besides]

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Tensors whose names begin with ``prefix``, without it, whole and on the CPU; each piece is checked against its checksum.

        Raises:
            DamagedCheckpoint: naming every tensor that is not as written.
        """
        found: dict[str, Tensor] = {}
        damages: list[Damage] = []
        for name in self.names(prefix):
            tensor = found[name[len(prefix) :]] = torch.empty(self.shape(name), dtype=self.dtype(name))
            try:
                self.read_into(name, tensor)
            except DamagedCheckpoint as error:
                damages += error.damages
        if damages:
            raise DamagedCheckpoint(list(dict.fromkeys(damages)))
        return found

    @staticmethod
    def prune(directory: Path, keep: int) -> list[Path]:
        """Removes all but the newest ``keep`` checkpoints and leftovers of interrupted writes; returns what went."""
        listed = Checkpoint.listed(directory)
        gone = [checkpoint.path for checkpoint in listed[: max(0, len(listed) - keep)]]
        gone += sorted(directory.glob(".partial-*"))
        for path in gone:
            shutil.rmtree(path, ignore_errors=True)
        return gone
