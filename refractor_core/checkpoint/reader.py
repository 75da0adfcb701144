"""Reads checkpoints, and says exactly what is wrong with one."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from refractor_core.checkpoint.writer import FORMAT, MANIFEST, file_sha256, seal, tensor_checksum

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
    def newest_sound(cls, directory: Path) -> tuple["Checkpoint | None", list[Damage]]:
        """The newest checkpoint that verifies, and the damage found in newer ones on the way back to it."""
        damages: list[Damage] = []
        for checkpoint in reversed(cls.listed(directory)):
            found = checkpoint.verify()
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
        if body["format"] != FORMAT:
            raise DamagedCheckpoint([Damage(path, f"is of format {body['format']}, this version reads {FORMAT}")])
        outside = {told["file"] for told in body["tensors"].values()} - body["files"].keys()
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

    def verify(self) -> list[Damage]:
        """Reads every byte. Empty if all is as written; otherwise names each damaged tensor, or the file where no tensor is hit."""
        try:
            manifest = self.manifest
        except DamagedCheckpoint as error:
            return error.damages
        damages: list[Damage] = []
        for name, told in manifest["files"].items():
            path = self.path / name
            if not path.is_file():
                damages.append(Damage(path, "is missing"))
            elif path.stat().st_size != told["bytes"]:
                damages.append(Damage(path, f"has {path.stat().st_size} bytes instead of {told['bytes']}"))
            elif file_sha256(path) != told["sha256"]:
                damages += list(self._damaged_tensors(name)) or [Damage(path, "its checksum does not match; no tensor's bytes are hit")]
        known = {MANIFEST, *manifest["files"]}
        damages += [Damage(p, "does not belong to this checkpoint") for p in sorted(self.path.iterdir()) if p.name not in known]
        return damages

    def _damaged_tensors(self, file: str) -> Iterator[Damage]:
        path = self.path / file
        try:
            for name, tensor in self._read(file):
                if tensor_checksum(tensor) != self.manifest["tensors"][name]["xxh3"]:
                    yield Damage(path, "its bytes are not the ones written", name)
        except Exception as error:  # a flipped bit in the file's own header can break the parser anywhere
            yield Damage(path, f"cannot be read ({error})")

    def _read(self, file: str) -> Iterator[tuple[str, Tensor]]:
        from safetensors import safe_open

        with safe_open(self.path / file, framework="pt") as opened:
            for name, told in self.manifest["tensors"].items():
                if told["file"] == file:
                    yield name, opened.get_tensor(name)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Tensors whose names begin with ``prefix``, without it, on the CPU; each checked against its checksum.

        Raises:
            DamagedCheckpoint: naming every tensor that is not as written.
        """
        found: dict[str, Tensor] = {}
        damages: list[Damage] = []
        for file in sorted({told["file"] for name, told in self.manifest["tensors"].items() if name.startswith(prefix)}):
            try:
                for name, tensor in self._read(file):
                    if not name.startswith(prefix):
                        continue
                    if tensor_checksum(tensor) != self.manifest["tensors"][name]["xxh3"]:
                        damages.append(Damage(self.path / file, "its bytes are not the ones written", name))
                    found[name[len(prefix) :]] = tensor
            except Exception as error:
                damages.append(Damage(self.path / file, f"cannot be read ({error})"))
        if damages:
            raise DamagedCheckpoint(damages)
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
