"""The run as one typed document: schema, loading, overrides, errors."""

from refractor_core.config.errors import ConfigError, Problem
from refractor_core.config.run import RunConfig

__all__ = ["ConfigError", "Problem", "RunConfig"]
