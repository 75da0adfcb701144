"""Where this process stands among the ranks; read before anything heavy is imported."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where torchrun put this process, on a Slurm cluster too; one process alone where nobody did."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    under_torchrun: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Place":
        """Reads torchrun's variables.

        Raises:
            ValueError: srun started several processes without torchrun; each would take itself for the only one.
        """
        if "RANK" not in environment:
            if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
                raise ValueError("srun started several processes, but no torchrun tells them their ranks; use launch/multinode.sh")
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return cls(*(int(environment[name]) for name in names), under_torchrun=True)
