"""What a rank keeps under DeepSpeed's ZeRO: its part of weights, masters, AdamW's moments and gradients, as ``Segment``s and by name.

DeepSpeed flattens each parameter group. At stages 1 and 2 ranks divide the flat group; at stage 3 they divide each parameter, and a rank's
flat group is made of its pieces. Written for DeepSpeed 0.19, where none of this has a public name: this file is all that knows it.
"""

import os
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from refractor_core.parallel.collectives import start_gather_in_place
from refractor_core.parallel.mesh import Axis
from refractor_core.parallel.segments import Segment

SLOTS = ("exp_avg", "exp_avg_sq")
"""What AdamW remembers of each element."""


class Partition:
    """This rank's part of one flat group.

    Args:
        zero: the optimizer that DeepSpeed made.
        index: of the group.
        axis: the ranks that divide it.
        master: float32, flat.
        weights: in the weights' format, flat; the same tensor as ``master`` where DeepSpeed needs no other.
        gradient: float32, flat, as long as ``master``.
        folder: masters and moments are kept in files there; None: in memory.
    """

    def __init__(self, zero: Any, index: int, axis: Axis, master: Tensor, weights: Tensor, gradient: Tensor, folder: str | None):
        self._zero, self._index, self._axis = zero, index, axis
        self._master, self._weights, self._gradient = master, weights, gradient
        self._offloaded = master.grad is not None
        self._places: dict[str, slice] = {}
        state = {slot: torch.zeros_like(master, requires_grad=False) for slot in SLOTS}
        if folder is not None:
            master.data = on_disk(master.detach(), folder)
            state = {slot: on_disk(tensor, folder) for slot, tensor in state.items()}
        zero.optimizer.state[master] = state | {"step": torch.zeros((), device=master.device)}

    def segments(self, named: dict[str, nn.Parameter]) -> dict[nn.Parameter, Segment]:
        """What this rank owns of each of the group's parameters; some are empty."""
        raise NotImplementedError

    def master_of(self, name: str) -> Tensor:
        return self._master.detach()[self._places[name]]

    def slot_of(self, name: str, slot: str) -> Tensor:
        return self._zero.optimizer.state[self._master][slot][self._places[name]]

    def forget(self) -> None:
        """A step that was skipped leaves its gradients with DeepSpeed."""
        raise NotImplementedError

    def take_gradients(self) -> None:
        """The sums over ranks, into the segments' gradients."""
        raise NotImplementedError

    def give_gradients(self) -> None:
        """The segments' gradients are those to update with."""
        if not self._offloaded:
            self._zero.averaged_gradients[self._index] = [self._gradient]

    def resume(self, count: int) -> None:
        """Master and moments were overwritten, as they are after ``count`` updates; collective."""
        self._zero.optimizer.state[self._master]["step"].fill_(count)


class FlatPartition(Partition):
    """Of a group that the ranks divide as one row, in order of rank (stages 1 and 2)."""

    def __init__(self, zero: Any, index: int, axis: Axis, folder: str | None):
        master = zero.single_partition_of_fp32_groups[index]
        gradient = torch.zeros_like(master, requires_grad=False) if master.grad is None else master.grad  # DeepSpeed lays them there
        if folder is not None:
            for p in zero.bit16_groups[index]:
                p._hp_mapping = None  # views for DeepSpeed's own checkpoints, which would keep the master in memory
        super().__init__(zero, index, axis, master, zero.bit16_groups_flat[index], gradient, folder)

    def segments(self, named: dict[str, nn.Parameter]) -> dict[nn.Parameter, Segment]:
        """See ``Partition``."""
        size, found = self._master.numel(), {}
        low = self._axis.rank * size
        members = set(self._zero.bit16_groups[self._index])
        for name, p in named.items():
            if p not in members:
                continue
            at = (p.data_ptr() - self._weights.data_ptr()) // p.element_size()  # its data is a view of the flat weights
            first, last = (min(max(edge - at, 0), p.numel()) for edge in (low, low + size))
            place = slice(at + first - low, at + last - low) if first < last else slice(0, 0)
            self._places[name] = place
            weight = self._weights[at + first : at + last]
            found[p] = Segment(name, p, first, last, self._gradient[place], weight, self._axis)
        return found

    def forget(self) -> None:
        """See ``Partition``."""
        self._zero.zero_grad()
        self._zero.micro_step_id = -1
        self._zero.averaged_gradients[self._index] = self._zero.all_grad_tensors[self._index] = None

    def take_gradients(self) -> None:
        """See ``Partition``."""
        if not self._offloaded:
            parts = [part.reshape(-1) for part in self._zero.averaged_gradients[self._index]]
            torch.cat(parts, out=self._gradient)

    def resume(self, count: int) -> None:
        """See ``Partition``."""
        super().resume(count)
        size = self._master.numel()
        self._weights[self._axis.rank * size : (self._axis.rank + 1) * size].copy_(self._master)
        work = start_gather_in_place(self._weights, self._axis)
        if work is not None:
            work.wait()


class SplitPartition(Partition):
    """Of a group whose every parameter the ranks divide, in pieces of equal size, the last ones padded (stage 3)."""

    def __init__(self, zero: Any, index: int, axis: Axis, folder: str | None, weights_folder: str | None):
        before = sum(zero.fp16_partitioned_groups_flat_numel[:index])
        gradient = zero.grad_partitions_flat_buffer.narrow(0, before, zero.fp16_partitioned_groups_flat_numel[index])
        master, weights = zero.fp32_partitioned_groups_flat[index], zero.fp16_partitioned_groups_flat[index]
        super().__init__(zero, index, axis, master, weights, gradient, folder)
        if self._offloaded:
            master.grad = gradient  # in place of a second buffer to which DeepSpeed would copy
        if weights_folder is not None:
            self._weights = zero.fp16_partitioned_groups_flat[index] = on_disk(weights.detach(), weights_folder)
            zero._unflatten_partitioned_parameters(index)

    def segments(self, named: dict[str, nn.Parameter]) -> dict[nn.Parameter, Segment]:
        """See ``Partition``."""
        names, found, at = {p: name for name, p in named.items()}, {}, 0
        for p in self._zero.fp16_groups[self._index]:
            size = p.partition_numel()
            first, last = (min(rank * size, p.ds_numel) for rank in (self._axis.rank, self._axis.rank + 1))
            place = self._places[names[p]] = slice(at, at + last - first)
            found[p] = Segment(names[p], p, first, last, self._gradient[place], self._weights[place], self._axis)
            at += size
        return found

    def forget(self) -> None:
        """See ``Partition``."""
        self._zero.zero_grad()
        self._gradient.zero_()  # what no micro batch uses would keep that of an earlier step

    def take_gradients(self) -> None:
        """See ``Partition``."""
        self._gradient.mul_(self._axis.size)  # this stage averages, whatever it is told

    def resume(self, count: int) -> None:
        """See ``Partition``."""
        super().resume(count)
        whole = [p for p in self._zero.fp16_groups[self._index] if p.ds_persist]
        for p in whole:
            p.partition()
        self._weights.detach().copy_(self._master.detach())
        if whole:
            whole[0].all_gather(whole)


def on_disk(tensor: Tensor, folder: str) -> Tensor:
    """A copy in a file that is mapped into memory: the system keeps of it in memory what it has room for, and writes back what it changes.

    The file has no name, so that it goes with the process, however that ends.

    Raises:
        ValueError: the folder cannot be written to, or its disk is full.
    """
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return tensor
    try:
        os.makedirs(folder, exist_ok=True)
        file, path = tempfile.mkstemp(suffix=".offload", dir=folder)
        try:
            os.posix_fallocate(file, 0, size)  # a disk that is full later would kill the process
            mapped = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        finally:
            os.close(file)
            os.unlink(path)
    except OSError as error:
        raise ValueError(f"parallel.deepspeed.offload_folder = {folder}: no place for {size} bytes: {error.strerror}") from None
    return mapped.copy_(tensor)
