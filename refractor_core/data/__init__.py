"""Documents to batches: sources, filters, deduplication, tokens, order."""
