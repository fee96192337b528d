"""Tiny random models, ragged batches, and the pruning rules written out in plain Python.

The rules are a second writing of the paper's, for one sequence at a time: nothing here calls the package's own rules.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers as hf
from torch import Tensor

import token_pruning as tp
from token_pruning.families import shape_of

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")
SPECIAL_ATTENTION = ("albert", "data2vec-text", "deberta", "deberta-v2", "ernie", "mpnet")
ROTARY_AND_PRE_LN = (
    "modernbert", "nomic_bert", "gte", "eurobert", "jina_embeddings_v3", "xlm-roberta-xl", "megatron-bert"
)  # fmt: skip
EVERY_FAMILY = FAMILIES + SPECIAL_ATTENTION + ROTARY_AND_PRE_LN
HEADS = {
    "sequence": hf.AutoModelForSequenceClassification,
    "regression": hf.AutoModelForSequenceClassification,
    "token": hf.AutoModelForTokenClassification,
    "question": hf.AutoModelForQuestionAnswering,
    "masked_lm": hf.AutoModelForMaskedLM,
    "encoder": hf.AutoModel,
}
MORE_HEADS = {**HEADS, "multiple_choice": hf.AutoModelForMultipleChoice}  # this one takes batches of another shape
# What a tiny config of another family needs besides (or instead of) the sizes of `tiny_config`.
SMALL_IDS = {f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos", "cls", "sep", "mask"))}
_RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
SPECIAL: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16, "num_hidden_groups": 2},
    "deberta": {**_RELATIVE, "max_relative_positions": 16, "type_vocab_size": 2},
    "deberta-v2": {
        **_RELATIVE, "position_buckets": 16, "max_relative_positions": 40, "share_att_key": True,
        "norm_rel_ebd": "layer_norm", "position_biased_input": False,
    },
    "deit": {"image_size": 32, "patch_size": 4},
    "ernie": {"use_task_id": True},
    "vit": {"image_size": 32, "patch_size": 4},
    "eurobert": {"num_key_value_heads": 2, "head_dim": 12, **SMALL_IDS},
    "gte": {"type_vocab_size": 2, "initializer_range": 0.2},
    "jina_embeddings_v3": {"type_vocab_size": 2, "initializer_range": 0.2},
    "megatron-bert": {},
    "modernbert": {"local_attention": 16, "global_attn_every_n_layers": 2, **SMALL_IDS},
    "nomic_bert": {"initializer_range": 0.2},
    "xlm-roberta-xl": {"type_vocab_size": 2},
}  # fmt: skip
SEVEN_BITS = ("avx2", "avx512")  # kernel levels whose int8 weights have no eighth
HALF_ROWS = ("avx512_bf16", "amx")  # and those that keep rows in bfloat16 between products
POSITIONS = 80
VOCABULARY = 200


class _OfFamily(dict[str, int]):
    """A number per family, read off its tiny config when it is asked for."""

    def __init__(self, read: Callable[[Any], int]) -> None:
        self.read = read

    def __missing__(self, family: str) -> int:
        return self.setdefault(family, self.read(tiny_config(family)))


LONGEST = _OfFamily(lambda config: shape_of(config).max_positions or POSITIONS)
PAD = _OfFamily(lambda config: getattr(config, "pad_token_id", None) or 0)


def tiny_config(family: str, *, layers: int = 4, **overrides: Any) -> Any:
    """A config so small that a forward pass takes milliseconds; wide weights make its attention peaky."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.3,
        "num_labels": 3,
    }
    if family == "distilbert":
        sizes |= {"dim": 32, "n_layers": layers, "n_heads": 4, "hidden_dim": 64}
    else:
        sizes |= {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 64}
    if family == "electra":
        sizes["embedding_size"] = 16
    return hf.AutoConfig.for_model(family, **{**sizes, **SPECIAL.get(family, {}), **overrides})


def tiny_model(
    family: str = "bert", head: str = "sequence", *, layers: int = 4, seed: int = 0, **overrides: Any
) -> Any:
    """A tiny random model in evaluation mode, always the same for the same arguments."""
    overrides = {**{"regression": {"num_labels": 1}, "question": {"num_labels": 2}}.get(head, {}), **overrides}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MORE_HEADS[head].from_config(tiny_config(family, layers=layers, **overrides)).eval()


@cache
def shared_model(family: str, head: str) -> Any:
    """A tiny model for tests that leave it as they found it; see :func:`pruned`."""
    return tiny_model(family, head)


@contextmanager
def pruned(model: Any, pruner: tp.Pruner, execution: Any = "packed", reads: Any = None) -> Iterator[Any]:
    tp.prune(model, pruner, execution=execution, reads=reads)
    try:
        yield model
    finally:
        tp.unprune(model)


def ragged_batch(
    lengths: Sequence[int], *, family: str = "bert", seed: int = 0, width: int | None = None, left: bool = False
) -> dict[str, Tensor]:
    """Random token ids. A sequence's ids depend on the seed, its place in the batch and its length alone."""
    width = max(lengths) if width is None else width
    ids = torch.full((len(lengths), width), PAD[family])
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        tokens = np.random.default_rng([seed, row, length]).integers(5, VOCABULARY, length)
        where = slice(width - length, width) if left else slice(0, length)
        ids[row, where] = torch.from_numpy(tokens)
        mask[row, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def outputs(output: Any) -> dict[str, Tensor]:
    """The tensors of a model's output, by name."""
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def assert_close(actual: Tensor, expected: Tensor, atol: float = 1e-4, message: str = "") -> None:
    assert actual.shape == expected.shape, f"{message} {actual.shape} {expected.shape}"
    assert not actual.isnan().any(), f"{message} NaN"
    difference = (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0
    assert difference <= atol, f"{message} differs by {difference:.2e}, allowed {atol:.0e}"


def assert_equal(actual: Tensor, expected: Tensor, relative: float = 1e-5, message: str = "") -> None:
    """Equal but for the rounding of another matrix product.

    Which kernel a vendor's library takes depends on the rows and even on where in memory they lie: the same model
    loaded, copied or called again may round otherwise. That is below 1e-6 of the largest number here. Only the
    package's own kernels promise the same bits.
    """
    assert actual.dtype == expected.dtype, message
    finite = expected.double()[expected.isfinite()].abs()
    scale = finite.max().item() if len(finite) else 0.0
    allowed = max(relative, 4 * torch.finfo(expected.dtype).eps) * scale
    torch.testing.assert_close(actual, expected, rtol=0, atol=allowed, msg=lambda found: f"{message} {found}")


def same_survivors(first: tp.Trace, second: tp.Trace) -> bool:
    return [t.tolist() for t in first.survived_layers] == [t.tolist() for t in second.survived_layers]


# The rules, one sequence at a time.


def thresholds_by_the_book(pruner: tp.Pruner, layers: int) -> list[float] | None:
    if not isinstance(pruner, tp.FixedThreshold):  # LearnedThreshold is one too
        return None
    if pruner.thresholds is not None:
        return list(pruner.thresholds)
    return [pruner.final_token_threshold * layer / layers for layer in range(1, layers + 1)]


def topk_count(rate_at_end: float, layer: int, layers: int, tokens: int, keep_all: int = 3) -> int:
    """``round(n · rate)``, half to even; everything in the first layers."""
    if layer <= keep_all:
        return tokens
    rate = rate_at_end + (1 - rate_at_end) * (layers - layer) / (layers - keep_all)
    return max(1, round(tokens * max(0.0, rate)))


def keep_by_the_book(
    pruner: tp.Pruner, layer: int, layers: int, scores: Sequence[float], input_tokens: int
) -> tuple[list[bool], float]:
    """Which tokens of one sequence stay, and how near the nearest decision was to going the other way."""
    if isinstance(pruner, tp.TopK):
        count = topk_count(pruner.token_keep_rate, layer, layers, input_tokens, pruner.keep_all_layers)
        ranked = sorted(range(1, len(scores)), key=lambda i: -scores[i])  # stable: the earlier of equals comes first
        chosen = {0, *ranked[: count - 1]}
        gap = 1.0
        if 0 < count - 1 < len(ranked):
            gap = scores[ranked[count - 2]] - scores[ranked[count - 1]]
        return [i in chosen for i in range(len(scores))], gap
    if isinstance(pruner, tp.FixedThreshold):
        thresholds = thresholds_by_the_book(pruner, layers)
        assert thresholds is not None
        threshold, values = thresholds[layer - 1], list(scores)
    elif isinstance(pruner, tp.RelativeThreshold):
        threshold, values = pruner.token_threshold, [score / max(scores) for score in scores]
    elif isinstance(pruner, tp.RisingThreshold):
        threshold, values = pruner.final_token_threshold * layer / layers, [score / max(scores) for score in scores]
    else:
        raise TypeError(pruner)
    margin = min((abs(value - threshold) for value in values[1:]), default=1.0)
    return [i == 0 or value >= threshold for i, value in enumerate(values)], margin


def divisor_by_the_book(pruner: tp.Pruner, entered: int) -> int:
    return {"mean": pruner.max_seq_length, "mean_norm": entered, "relative": 1}[pruner.scoring_mode]


def decision_margin(trace: tp.Trace, layers: int) -> float:
    """How near the recorded pass came to a decision that rounding could turn around."""
    margin = 1.0
    for done in trace.passes:
        sizes = done.entering.lengths  # what a gate keeps outside is not counted
        for layer, record in done.layers.items():
            if record.scores is None:
                continue
            before = done.layers[layer - 1].summaries if layer > 1 else None
            tokens = torch.ones(record.entering.total, dtype=torch.bool) if before is None else ~before.present
            parts = zip(*(x.split(record.entering.lengths) for x in (record.scores, tokens)), strict=True)
            for size, (scores, proper) in zip(sizes, parts, strict=True):
                scores = scores[proper]
                if len(scores):
                    margin = min(margin, keep_by_the_book(done.pruner, layer, layers, scores.tolist(), size)[1])
    return margin


class BertByTheBook:
    """A BERT encoder that loops over sequences and heads in float64, and decides with plain Python lists.

    In the soft stage nothing is removed and each layer's output is multiplied by the soft mask. The weights require a
    gradient, so that everything here can be differentiated.
    """

    def __init__(self, model: Any, pruner: tp.Pruner, *, soft: bool = False) -> None:
        config = model.config
        base = model.base_model.state_dict()
        self.weights = {name: value.double().requires_grad_() for name, value in base.items()}
        self.pruner, self.soft = pruner, soft
        self.layers, self.heads, self.eps = config.num_hidden_layers, config.num_attention_heads, config.layer_norm_eps
        given = thresholds_by_the_book(pruner, self.layers)
        self.thresholds = None if given is None else torch.tensor(given, dtype=torch.float64, requires_grad=True)
        self.margin = 1.0

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred**2).mean(-1, keepdim=True).add(self.eps).sqrt()
        return centred / scale * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def sequence(self, ids: list[int]) -> tuple[Tensor, list[int], list[Tensor]]:
        """The last hidden state of every token, the layers each survived, and every layer's soft mask."""
        x = (
            self.weights["embeddings.word_embeddings.weight"][ids]
            + self.weights["embeddings.position_embeddings.weight"][: len(ids)]
            + self.weights["embeddings.token_type_embeddings.weight"][0]
        )
        states = list(self.norm("embeddings.LayerNorm", x))
        alive = list(range(len(ids)))
        separator = ids.index(ids[-1])
        segment = [int(self.pruner.summary_tokens == "segment" and i > separator) for i in range(len(ids))]
        summaries: dict[int, tuple[Tensor, Tensor]] = {}  # per segment its state and the weight it has gathered
        survived = [0] * len(ids)
        soft_masks = []
        for layer in range(1, self.layers + 1):
            name = f"encoder.layer.{layer - 1}"
            x = torch.stack([*(states[i] for i in alive), *(state for state, _ in summaries.values())])
            q, k, v = (self.linear(f"{name}.attention.self.{part}", x) for part in ("query", "key", "value"))
            size = x.shape[1] // self.heads
            contexts, scores = [], x.new_zeros(len(x))
            for head in range(self.heads):
                part = slice(head * size, (head + 1) * size)
                attention = (q[:, part] @ k[:, part].T / size**0.5).softmax(-1)
                contexts.append(attention @ v[:, part])
                scores = scores + attention.sum(0)
            received = scores / self.heads
            scores = received[: len(alive)] / divisor_by_the_book(self.pruner, len(x))
            attended = self.norm(
                f"{name}.attention.output.LayerNorm",
                x + self.linear(f"{name}.attention.output.dense", torch.cat(contexts, -1)),
            )
            keep, margin = [True] * len(alive), 1.0
            if not self.soft:
                keep, margin = keep_by_the_book(self.pruner, layer, self.layers, scores.tolist(), len(ids))
            summaries = {
                which: (state, weight)
                for (which, (_, weight)), state in zip(summaries.items(), attended[len(alive) :], strict=True)
            }
            if self.pruner.summary_tokens != "none" and layer < self.layers:
                for row, token in enumerate(alive):
                    if not keep[row]:
                        which = segment[token]
                        state, weight = summaries.get(which, (torch.zeros_like(attended[0]), torch.zeros(())))
                        total = weight + received[row]
                        state = (state * weight + attended[row] * received[row]) / total
                        summaries[which] = (state, total)
            entering = [*attended[: len(alive)], *(state for state, _ in summaries.values())]
            attended = torch.stack(entering)
            inner = torch.nn.functional.gelu(self.linear(f"{name}.intermediate.dense", attended))
            after = self.norm(f"{name}.output.LayerNorm", attended + self.linear(f"{name}.output.dense", inner))
            if self.soft:
                assert isinstance(self.pruner, tp.LearnedThreshold) and self.thresholds is not None
                distance = (scores[1:] - self.thresholds[layer - 1]) / self.pruner.temperature
                soft_masks.append(torch.cat([x.new_ones(1), distance.sigmoid()]))
                after = after * soft_masks[-1][:, None]
            self.margin = min(self.margin, margin)
            summaries = {
                which: (state, weight)
                for (which, (_, weight)), state in zip(summaries.items(), after[len(alive) :], strict=True)
            }
            for row, token in enumerate(alive):
                states[token] = after[row] if keep[row] else attended[row]
                survived[token] += keep[row]
            alive = [token for row, token in enumerate(alive) if keep[row]]
        return torch.stack(states), survived, soft_masks
