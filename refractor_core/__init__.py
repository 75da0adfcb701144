"""REFRACTOR: a training stack for mixture-of-experts language models."""
