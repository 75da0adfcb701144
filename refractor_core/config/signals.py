"""The catalogue of what is measured of a text: rules name these signals, and the documentation lists them.

A word is a run of characters that are not white space; in scripts without spaces (Chinese, Japanese, Thai, …) every character is one. A
line is one that holds a word, stripped; a paragraph is a run of such lines. Shares lie in 0 … 1 unless told otherwise, and everything is 0
of a text without what it is a share of. Sources: Gopher (Rae et al. 2021, arXiv 2112.11446, appendix A1), FineWeb (Penedo et al. 2024,
arXiv 2406.17557), StarCoder (Li et al. 2023, arXiv 2305.06161) for code.
"""

from typing import Literal

TOP_GRAM = "Characters of the most frequent {n} words in a row (blanks counted) times their occurrences, of all characters; may pass 1."
DUPLICATE_GRAM = "Characters of sequences of {n} words that occurred before (blanks not counted), of all characters."

SIGNALS: dict[str, str] = {
    "bytes": "Length in UTF-8.",
    "characters": "Length in Unicode code points.",
    "words": "Words that are not made of punctuation and symbols alone.",
    "lines": "Lines that hold a word.",
    "paragraphs": "Runs of lines between blank ones.",
    "mean_word_length": "Mean characters of the words counted in `words`.",
    "max_word_length": "Characters of the longest word; long in encoded binary data and minified code.",
    "mean_line_length": "Mean characters of lines.",
    "max_line_length": "Characters of the longest line.",
    "newlines_per_word": "Line ends, blank lines included, per word of any kind; high in lists.",
    "printable_share": "Printable characters and white space, of all characters.",
    "space_share": "White space, of all characters.",
    "alphabetic_share": "Letters and the marks on them, of the characters that are not white space.",
    "alphanumeric_share": "Letters, marks and decimal digits, of the characters that are not white space.",
    "digit_share": "Decimal digits, of the characters that are not white space.",
    "symbol_share": "Punctuation and symbols, of the characters that are not white space.",
    "uppercase_share": "Capital letters, of all letters.",
    "alphabetic_word_share": "Words with at least one letter, of words of any kind.",
    "unique_word_share": "Distinct words, of words of any kind.",
    "word_entropy": "Entropy of the frequencies of words, in bits.",
    "stop_words": "How many of the eight English words the, be, to, of, and, that, have, with occur (case and punctuation aside).",
    "hashes_per_word": "Hash signs per word of any kind.",
    "ellipses_per_word": "Ellipses (three dots or …) per word of any kind.",
    "bullet_line_share": "Lines that begin with • or -, of lines.",
    "ellipsis_line_share": "Lines that end with an ellipsis, of lines.",
    "terminal_line_share": "Lines that end as sentences do (closing quotation marks and brackets aside), of lines.",
    "short_line_share": "Lines of at most 30 characters, of lines.",
    "duplicate_line_share": "Lines that occurred before, of lines.",
    "duplicate_line_character_share": "Characters of lines that occurred before, of all characters.",
    "duplicate_paragraph_share": "Paragraphs that occurred before, of paragraphs.",
    "duplicate_paragraph_character_share": "Characters of paragraphs that occurred before, of all characters.",
    **{f"top_{n}gram_share": TOP_GRAM.format(n=n) for n in (2, 3, 4)},
    **{f"duplicate_{n}gram_share": DUPLICATE_GRAM.format(n=n) for n in (5, 6, 7, 8, 9, 10)},
    "emails": "E-mail addresses.",
    "phones": "Telephone numbers in international form, or of ten digits in groups.",
    "ip_addresses": "Public IPv4 addresses.",
    "ibans": "International bank account numbers whose check digits are right.",
    "credit_cards": "Card numbers of 13 to 19 digits with a known issuer's beginning and a right Luhn digit.",
    "secrets": "Headers of private keys, and access tokens of well-known forms.",
}
"""Every signal and what it is, in the order in which they are measured and stored."""

PII = ("emails", "phones", "ip_addresses", "ibans", "credit_cards", "secrets")
"""The signals that count personal data and secrets."""

SignalName = Literal[*SIGNALS]
PiiName = Literal[*PII]
