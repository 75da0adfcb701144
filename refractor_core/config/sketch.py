"""A bare model, such as those in ``configs/models``, where a run is asked for: a sketch of a run is put around it."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from refractor_core.config.loading import load_document, load_run
from refractor_core.config.rules import Rule
from refractor_core.config.run import RunConfig

_SKETCH = Path(__file__).with_name("sketch.yaml")


def load_run_or_model(
    path: str | os.PathLike, overrides: Sequence[str] = (), *, of_sketch: Sequence[str] = (), between_keys: Sequence[Rule] | None = None
) -> tuple[RunConfig, bool]:
    """A run, or a bare model with the run of ``sketch.yaml`` around it; and whether it is a sketch.

    Args:
        path: YAML file of a run, or of a model.
        overrides: ``key.path=value``.
        of_sketch: overrides of the sketch alone, which the others win over.
        between_keys: see ``load_run``.

    Raises:
        ConfigError: the config is neither; with every mistake.
    """
    if "vocab_size" not in load_document(path).plain():
        return load_run(path, overrides, between_keys=between_keys), False
    model = f"model={{extends: {json.dumps(str(Path(path).absolute()))}}}"
    return load_run(_SKETCH, [model, *of_sketch, *overrides], between_keys=between_keys), True
