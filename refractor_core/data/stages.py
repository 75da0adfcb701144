"""The stages between reading and tokens, in the order in which they run. ``duplicates`` comes before any that changes texts."""

from refractor_core.data.cleaning import Stage
from refractor_core.data.dedup import paragraphs_stage
from refractor_core.data.dedup.stage import remove_duplicates

STAGES = (
    Stage("duplicates", "2", lambda config: True, remove_duplicates),
    Stage("paragraph", "1", paragraphs_stage.wanted, paragraphs_stage.remove_paragraphs),
)
