"""Perplexities of texts by a checkpoint, for the bands that ``refractor data build`` may cut by them."""

from collections.abc import Callable, Sequence

import torch
from tokenizers import Tokenizer

from refractor_core.checkpoint.model import load_model
from refractor_core.config.quality import PerplexityConfig

WINDOW = 1024
"""Tokens that the model sees at a time; what follows begins anew."""
WINDOWS = 8
"""Windows scored of a text."""


def checkpoint_scorer(config: PerplexityConfig) -> Callable[[Sequence[str]], list[float]]:
    """A function from texts to perplexities per token, over the first WINDOWS windows of WINDOW tokens of each; NaN below two tokens.

    Raises:
        ValueError: nothing that can be loaded is at ``path`` or ``tokenizer_path``.
    """
    assert config.path is not None and config.tokenizer_path is not None, "a rule of the configuration"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(config.path, device=device).eval()
    try:
        tokenizer = Tokenizer.from_file(config.tokenizer_path)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"data.perplexity.tokenizer_path: {config.tokenizer_path}: {error}; give the model's tokenizer.json") from error

    def score(texts: Sequence[str]) -> list[float]:
        return [_perplexity(model, encoding.ids[: WINDOW * WINDOWS], device) for encoding in tokenizer.encode_batch_fast(list(texts))]

    return score


@torch.no_grad()
def _perplexity(model: torch.nn.Module, ids: Sequence[int], device: str) -> float:
    surprise, count = 0.0, 0
    for first in range(0, len(ids), WINDOW):
        tokens_BS = torch.tensor([ids[first : first + WINDOW]], device=device)
        if tokens_BS.shape[1] > 1:
            logits_SV = model(tokens_BS).logits[0, :-1].float()
            surprise += torch.nn.functional.cross_entropy(logits_SV, tokens_BS[0, 1:], reduction="sum").item()
            count += tokens_BS.shape[1] - 1
    return torch.tensor(surprise / count).exp().item() if count else float("nan")
