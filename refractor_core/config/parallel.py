"""How the run is spread over ranks, and what a step is made of."""

from typing import Literal

from pydantic import PositiveInt

from refractor_core.config.section import Section


class DeepSpeedConfig(Section):
    """Read by ``engine: deepspeed``."""

    stage: Literal[1, 2, 3] = 1
    """Of ZeRO: 1 divides optimizer state and masters; 2 also gradients, which are then summed in every micro batch; 3 also the layers'
    weights, which are gathered for each layer's forward and backward pass."""
    offload: Literal["none", "cpu", "disk"] = "none"
    """Where masters and optimizer state are kept, and updates done: beside the weights; in the CPU's memory, with a rank's part of the
    gradients; or the same in files that the CPU works on."""
    offload_folder: str | None = None
    """Of ``offload: disk``: on each machine's own, fast disk. Nothing is left there when a run ends."""
    offload_weights: bool = False
    """Keeps a rank's part of the weights there too: ``stage: 3`` only."""


class ParallelConfig(Section):
    """Degrees of the two grids that fold over the same ranks.

    dense grid: pipeline × data_replicate × data_shard × context × tensor = ranks;
    expert grid: pipeline × expert_data × expert × expert_tensor = ranks.
    """

    tensor: PositiveInt = 1
    """Ranks that share each attention and dense layer's weights."""
    sequence: bool = False
    """Splits the residual stream over the tensor ranks between layers."""
    expert: PositiveInt = 1
    """Ranks that share the experts of a layer."""
    expert_tensor: PositiveInt = 1
    """Ranks that share each expert's weights."""
    pipeline: PositiveInt = 1
    """Stages that the layers are cut into."""
    virtual_pipeline: PositiveInt = 1
    """Stages per pipeline rank."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb_h1", "zbv"] = "1f1b"
    """Order of forwards and backwards on the pipeline ranks; ``refractor plan schedule`` draws it."""
    stage_cuts: tuple[PositiveInt, ...] | None = None
    """First layer of every stage but the first, ascending; null cuts by estimated cost."""
    context: PositiveInt = 1
    """Ranks that share each sequence."""
    context_exchange: Literal["ring", "all_gather"] = "ring"
    """How context ranks see each other's keys and values: passed on block by block behind the attention, or gathered at once."""
    data_shard: PositiveInt | Literal["auto"] = "auto"
    """Data-parallel ranks that share optimizer state; auto takes what is left of the world."""
    data_replicate: PositiveInt = 1
    """Copies of the sharded group."""
    engine: Literal["zero1", "fsdp2", "deepspeed"] = "zero1"
    """What data-parallel ranks divide: ``zero1`` optimizer state, with plain parameters (ours; every schedule); ``fsdp2`` weights and
    gradients too (torch's fully_shard; no pipeline); ``deepspeed`` what its ZeRO stage says (data_shard × tensor only; needs DeepSpeed)."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """ZeRO's stage and offload."""
    reshard_after_forward: bool = True
    """Read by ``fsdp2``: layers' weights are freed between forward and backward (ZeRO-3); false keeps them until the backward pass
    (ZeRO-2): more memory, one gathering less."""


class BatchConfig(Section):
    """One optimizer step's sequences, and how they are cut to fit memory."""

    global_batch_size: PositiveInt
    """Sequences per optimizer step over all ranks."""
    micro_batch_size: PositiveInt
    """Sequences per forward and backward pass on one rank."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Recomputes in the backward pass: nothing; attention and experts' insides; or every layer."""
