"""A method of your own, from the class to an engine: tokens at the end of a text must matter more to stay."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from toy import model as toy_model
from toy import texts as toy_texts
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import token_pruning as tp
from token_pruning.checks import number
from token_pruning.pruners import LayerTokens
from token_pruning.pruners.importance import ScoringMode


@dataclass(frozen=True, kw_only=True)
class LeadBias(tp.Pruner):
    """Keep a token if its share of the attention is above ``bar``, times 2 at the end of a text."""

    prune_mode: ClassVar[str] = "lead_bias"  # what config.json calls it

    scoring_mode: ScoringMode = "relative"  # the mean importance is 1
    bar: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        number("bar", self.bar, above=0)

    def keep(self, tokens: LayerTokens) -> Tensor:
        layout = tokens.layout
        rank = torch.arange(layout.total) - layout.cu_seqlens.long()[layout.sequence_ids]
        place = rank / layout.lengths_tensor[layout.sequence_ids]  # 0 at the beginning of what is left
        return tokens.scores >= self.bar * (1 + place)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = toy_model(Path(folder) / "dense", AutoModelForSequenceClassification)
        model = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=False).eval()
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        batch = tokenizer(toy_texts(32), padding=True, return_tensors="pt")

        tp.prune(model, LeadBias(bar=0.5))
        model.save_pretrained(Path(folder) / "pruned")
        model = tp.from_pretrained(Path(folder) / "pruned")  # knows LeadBias, since this module defines it
    with tp.record(model) as trace, torch.no_grad():
        logits = model(**batch).logits
    kept = trace.ffn_lengths.double().mean(1) / trace.input_lengths.double().mean()
    print("tokens kept after each layer:", " ".join(f"{part:.0%}" for part in kept))
    print(f"relative FLOPs {tp.count_flops(model, trace).relative:.2f}")
    difference = (tp.compile(model, dtype="float32")(**batch).logits - logits).abs().max()
    print(f"the engine's logits differ by {difference:.0e}")


if __name__ == "__main__":
    main()
