"""A checkpoint scores texts as its model says, window by window."""

import pytest
import torch

from refractor_core.checkpoint.model import load_model
from refractor_core.config.quality import PerplexityConfig
from refractor_core.data import Dataset
from refractor_core.evaluation import perplexity
from refractor_core.evaluation.perplexity import checkpoint_scorer
from tests.train import tiny


def test_perplexities_are_those_of_the_model(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "WINDOW", 16)
    folder = tiny.prepare(tmp_path)
    run = tiny.config(folder, run__steps=1)
    assert tiny.train(run) == 0
    dataset, model = Dataset.open(run.data.dir), load_model(run.run.dir, torch.float64).eval()
    given = {"backend": "checkpoint", "path": run.run.dir, "tokenizer_path": f"{run.data.dir}/tokenizer.json"}
    texts = ["", "a", "abc def ghi jab cda", "abcdefghij " * 40]
    found = checkpoint_scorer(PerplexityConfig.model_validate(given))(texts)
    assert [value == value for value in found] == [False, False, True, True]
    for text, value in zip(texts[2:], found[2:]):
        (ids,) = dataset.tokenizer.ids([text])
        windows = [ids[first : first + 16] for first in range(0, min(len(ids), 16 * perplexity.WINDOWS), 16)]
        nats = []
        for window in windows:
            with torch.no_grad():
                chances = model(torch.tensor([window])).logits[0].log_softmax(-1)
            nats += [-chances[place, token].item() for place, token in enumerate(window[1:])]
        assert value == pytest.approx(torch.tensor(nats, dtype=torch.float64).mean().exp().item(), rel=1e-4)
    with pytest.raises(ValueError, match=r"data.perplexity.tokenizer_path: .*none.json.*give the model's tokenizer.json"):
        checkpoint_scorer(PerplexityConfig.model_validate({**given, "tokenizer_path": str(tmp_path / "none.json")}))
