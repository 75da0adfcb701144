"""Quality: signals, personal data, rules, language, perplexity."""
