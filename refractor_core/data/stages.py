"""The stages between reading and tokens, in the order in which they run."""

from refractor_core.data.cleaning import Stage
from refractor_core.data.dedup.stage import remove_duplicates

STAGES = (Stage("duplicates", "2", lambda config: True, remove_duplicates),)
