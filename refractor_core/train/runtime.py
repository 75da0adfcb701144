"""What one rank runs on: its place in the world, its device, its mesh."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from refractor_core.config import ConfigError, Problem, RunConfig
from refractor_core.parallel.layout import Layout
from refractor_core.parallel.mesh import Axis, Mesh
from refractor_core.train.place import Place
from refractor_kernels.gpu import tables


@dataclass(frozen=True)
class Runtime:
    """One rank's device and mesh."""

    place: Place
    device: torch.device
    mesh: Mesh

    @property
    def world(self) -> Axis:
        """All ranks."""
        return self.mesh.axis("world")

    @property
    def is_main(self) -> bool:
        """Whether this rank keeps the records."""
        return self.place.rank == 0

    @classmethod
    @contextmanager
    def joined(cls, config: RunConfig, place: Place) -> Iterator["Runtime"]:
        """Joins the world and leaves it again. The layout is checked before any process group exists.

        Raises:
            ConfigError: the layout does not fit the world, the device is not there, or the kernels' tables do not fit this version.
        """
        layout = Layout.from_config(config.parallel, place.world_size)
        device = _device(config, place)
        torch.set_num_threads(config.run.threads or max(1, (os.cpu_count() or 1) // place.local_world_size))
        if place.rank == 0:
            _adopt_kernel_tables(config)
        if place.world_size > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            tables.share()
        failed = True
        try:
            yield cls(place, device, Mesh.create(layout, place.rank))
            failed = False
        finally:
            # NCCL's orderly shutdown may wait for ranks that stand in a collective. A process that fails just ends; torchrun ends the rest.
            if dist.is_initialized() and not (failed and device.type == "cuda"):
                dist.destroy_process_group()


def check_device(config: RunConfig, local_ranks: int) -> None:
    """Refuses a device that this machine cannot give to each of its ranks.

    Raises:
        ConfigError: there is no CUDA device, or there are fewer than ranks.
    """
    if _on_cpu(config):
        return
    if not torch.cuda.is_available():
        raise ConfigError([Problem("run.device", "cuda", "no CUDA device is visible here; use cpu or auto, or see 'refractor doctor'")])
    devices = torch.cuda.device_count()
    if devices < local_ranks:
        told = f"{local_ranks} ranks on this machine need a CUDA device each, {devices} can be seen; start {devices} ranks, or use cpu"
        raise ConfigError([Problem("run.device", config.run.device, told)])


def _adopt_kernel_tables(config: RunConfig) -> None:
    if config.run.kernel_tables is not None:
        try:
            tables.adopt(Path(config.run.kernel_tables))
        except ValueError as error:
            raise ConfigError([Problem("run.kernel_tables", config.run.kernel_tables, str(error))]) from error


def _on_cpu(config: RunConfig) -> bool:
    return config.run.device == "cpu" or config.run.device == "auto" and not torch.cuda.is_available()


def _device(config: RunConfig, place: Place) -> torch.device:
    check_device(config, place.local_world_size)
    if _on_cpu(config):
        return torch.device("cpu")
    device = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(device)
    return device
