"""How good a text is, in numbers: signals, language, perplexity, and the rules that drop texts by them."""
