"""Hugging Face directories: Mixtral, Qwen3-MoE, OLMoE and DeepSeek-V3, read and written bit for bit.

A family is a file with the model's config in both directions and a table of tensor names; ``directory`` reads and writes the files.
"""

from refractor_core.model.hub.directory import HubWeights, config_from_hub, export_hub, import_hub

__all__ = ["HubWeights", "config_from_hub", "export_hub", "import_hub"]
