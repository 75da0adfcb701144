"""The stages between reading and tokens, in the order in which they run. ``duplicates`` comes before any that changes texts."""

from refractor_core.data.cleaning import Stage
from refractor_core.data.decontamination.stage import remove_contaminated
from refractor_core.data.dedup import paragraphs_stage
from refractor_core.data.dedup.stage import remove_duplicates
from refractor_core.data.quality.perplexity import score_documents

STAGES = (
    Stage("duplicates", "4", lambda config: True, remove_duplicates),
    Stage("paragraph", "1", paragraphs_stage.wanted, paragraphs_stage.remove_paragraphs),
    Stage("perplexity", "1", lambda config: config.perplexity.backend != "none", score_documents),
    Stage("decontamination", "1", lambda config: bool(config.decontamination.sets), remove_contaminated),
)
