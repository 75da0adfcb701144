"""The run as one typed document: schema, loading, overrides, errors."""

from refractor_core.config.errors import ConfigError, Problem
from refractor_core.config.loading import config_sha, dump, load_document, load_run
from refractor_core.config.run import RunConfig

__all__ = ["ConfigError", "Problem", "RunConfig", "config_sha", "dump", "load_document", "load_run"]
