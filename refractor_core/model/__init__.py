"""The REFRACTOR decoder, and import and export of Hugging Face checkpoints."""
