"""Atomic, verified checkpoints."""
