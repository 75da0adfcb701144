"""Launch parameters of every kernel by architecture and shape bucket, read from ``sm90.json``.

The file maps a kernel's name to its buckets, smallest first:
``{"to": {size: largest value}, "constants": {constexpr: value}, "num_warps", "num_stages", "grid": {…}}``.
The first bucket that holds all sizes of a call is the one launched; a last bucket without bounds takes the rest. ``grid`` holds what the
launch needs beside the kernel, such as a number of programs. The ahead-of-time check compiles every bucket of every kernel.

A machine's own tables, made by ``python -m refractor_kernels.tune``, are adopted at the start of a process, before the first launch. Sums
are cut as the tables say, so all ranks must have the same: ``share`` gives them rank 0's.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch.distributed as dist

from refractor_kernels import attention_order

ARCHITECTURE = "sm90"
TUNABLE = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP", "ROWS", "TOKENS", "HEADS")
"""Constants that are a matter of speed. The others are sizes that a bucket's calls must fit into."""


@dataclass(frozen=True)
class Bucket:
    """One launch configuration and the largest sizes it is for."""

    to: dict[str, int]
    constants: dict[str, int]
    num_warps: int
    num_stages: int
    grid: dict[str, int] = field(default_factory=dict)

    @property
    def shape(self) -> tuple:
        """All that tuning leaves as it is."""
        return self.to, {name: value for name, value in self.constants.items() if name not in TUNABLE}, set(self.constants), set(self.grid)

    @property
    def launch(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages}

    def __str__(self) -> str:
        bounds = " ".join(f"{name}≤{bound}" for name, bound in self.to.items())
        constants = " ".join(f"{name}={value}" for name, value in (self.constants | self.grid).items())
        return f"{bounds or 'any'}: {constants} warps={self.num_warps} stages={self.num_stages}"


def _parsed(text: str) -> tuple[dict[str, tuple[Bucket, ...]], dict[str, list[dict]]]:
    """The kernels' buckets, and the order of attention's backends."""
    found = json.loads(text)
    order = attention_order.checked(found.pop(attention_order.TABLE, {}))
    return {kernel: tuple(Bucket(**entry) for entry in entries) for kernel, entries in found.items()}, order


_BUCKETS, _ = _parsed((Path(__file__).parent / f"{ARCHITECTURE}.json").read_text())


def put(kernel: str, found: tuple[Bucket, ...]) -> None:
    """Launches of the kernel take these buckets from now on."""
    _BUCKETS[kernel] = found


def written(kernels: list[str] | None = None) -> str:
    """The tables, all or some, as a file holds them: a bucket a line."""
    names = kernels or [*_BUCKETS, attention_order.TABLE]
    rows = {kernel: [json.dumps(asdict(bucket)) for bucket in _BUCKETS[kernel]] for kernel in names if kernel != attention_order.TABLE}
    told = [f'  "{kernel}": [\n    ' + ",\n    ".join(lines) + "\n  ]" for kernel, lines in rows.items()]
    if attention_order.TABLE in names:
        told.append(f'  "{attention_order.TABLE}": ' + json.dumps(attention_order.entries(), indent=1, ensure_ascii=False))
    return "{\n" + ",\n".join(told) + "\n}\n"


def adopt(path: Path) -> None:
    """Takes a file of ``written`` for the kernels that it names, and its order of attention's backends; the others keep what is shipped.

    Raises:
        ValueError: it is no such file, names a kernel that there is not, or differs from what is shipped in more than ``TUNABLE``.
    """
    try:
        found, order = _parsed(path.read_text())
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no tuning tables: {error}; python -m refractor_kernels.tune makes them") from error
    for kernel, own in found.items():
        if kernel not in _BUCKETS:
            raise ValueError(f"{path}: there is no kernel {kernel}; there are {', '.join(_BUCKETS)}")
        if [bucket.shape for bucket in own] != [bucket.shape for bucket in _BUCKETS[kernel]]:
            raise ValueError(f"{path}: the buckets of {kernel} are not those of this version; tune it anew")
    _BUCKETS.update(found)
    attention_order.put(order)


def share(group: "dist.ProcessGroup | None" = None) -> None:
    """Every rank of the group takes rank 0's tables; collective."""
    told = [written() if dist.get_rank(group) == 0 else None]
    dist.broadcast_object_list(told, group_src=0, group=group)
    found, order = _parsed(told[0])
    _BUCKETS.update(found)
    attention_order.put(order)


def buckets(kernel: str) -> tuple[Bucket, ...]:
    """All of a kernel's buckets, in the order they are tried."""
    return _BUCKETS[kernel]


def _find(kernel: str, sizes: dict[str, int]) -> Bucket | None:
    for bucket in _BUCKETS[kernel]:
        if all(sizes[name] <= bound for name, bound in bucket.to.items()):
            return bucket
    return None


def choose(kernel: str, **sizes: int) -> Bucket:
    """The bucket to launch; the caller has asked ``misfit`` before."""
    bucket = _find(kernel, sizes)
    assert bucket is not None, (kernel, sizes)
    return bucket


def misfit(kernel: str, **sizes: int) -> str | None:
    """Why no bucket holds these sizes, or None."""
    if _find(kernel, sizes) is not None:
        return None
    asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
    largest = ", ".join(f"{name} {bound}" for name, bound in buckets(kernel)[-1].to.items())
    return f"{asked}, and the tuning table of {kernel} ends at {largest}"
