"""The base of every section: frozen, closed to unknown keys, documented by the docstring under each field."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the run's document. The docstring under a field is its documentation: ``config schema`` and the specification print it."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False)
