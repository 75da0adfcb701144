"""The REFRACTOR decoder and the exchange of its weights with Hugging Face's formats.

``decoder.Decoder`` is built from ``config.ModelConfig`` alone; ``hub.import_hub`` and ``hub.export_hub`` read and write directories.
"""
