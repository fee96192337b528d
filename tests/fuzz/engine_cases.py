"""Random models, pruners and batches: model and engine against the reference that masks, or one clear error from all.

    python -m tests.fuzz.engine_cases --seconds 600 --seed 0       # says how many cases there were, and which failed
    python -m tests.fuzz.engine_cases --seed 0 --group 17          # one group again, with its traceback

A group is one model with a few pruners; a case is one batch through one engine.
"""

import argparse
import os
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

import token_pruning as tp
from tests.tiny import (
    EVERY_FAMILY,
    FAMILIES,
    HALF_ROWS,
    HEADS,
    SEVEN_BITS,
    decision_margin,
    outputs,
    pruned,
    same_survivors,
    tiny_config,
)
from token_pruning.engine.library import KERNELS_VARIABLE, levels_here, load_library
from token_pruning.families import Reads, shape_of
from token_pruning.runtime.prune import reads_of

VOCABULARY, POSITIONS = 60, 48
PRUNERS, BATCHES = 4, 5  # of a group, and of each of its pruners
EXACT, ROUNDED = 2e-4, 0.5  # of the largest number: float32 beside the reference, lower precisions beside each other
NEAR = 2e-5  # a decision nearer than this may fall either way


class Hashed(tp.Pruner, registered=False):
    """Decides by nothing that rounding could change."""

    prune_mode = "hashed"

    def keep(self, tokens: Any) -> Tensor:
        columns = tokens.layout.indices % tokens.layout.width
        return (columns * 2654435761 + tokens.layer * 40503) % 97 >= 35


@dataclass
class Tally:
    """What happened to the cases."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    where: str = ""


def random_model(rng: random.Random) -> tuple[str, str, Any]:
    """A family, a head, and a model of them with random sizes, weights, biases and norms."""
    family = rng.choice(FAMILIES if rng.random() < 0.5 else EVERY_FAMILY)
    heads_there = [head for head in HEADS if type(tiny_config(family)) in HEADS[head]._model_mapping]
    head = rng.choice([*heads_there, *["encoder"] * 4])  # what can be read of it differs
    heads = rng.choice([1, 2, 4])
    head_dim = rng.choice([8, 12, 16, 32]) if family not in ("nomic_bert", "gte") else rng.choice([8, 16])
    names = {"dim": "hidden_size", "n_heads": "num_attention_heads", "hidden_dim": "intermediate_size"}
    sizes = {
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "intermediate_size": rng.choice([16, 33, 64]),
    }
    if family in ("nomic_bert", "gte", "eurobert", "jina_embeddings_v3", "modernbert"):
        sizes["intermediate_size"] = 32
    if family == "eurobert":
        sizes |= {"num_key_value_heads": rng.choice([1, heads]), "head_dim": head_dim}
    if family == "distilbert":
        sizes = {new: sizes[old] for new, old in names.items()}
    if family == "modernbert":
        sizes["local_attention"] = rng.choice([4, 10])
    sizes["num_labels"] = {"regression": 1, "question": 2}.get(head, 3)
    settings = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "initializer_range": 0.3}
    config = tiny_config(family, layers=rng.randint(1, 3), **sizes, **settings)
    torch.manual_seed(rng.getrandbits(31))
    model = HEADS[head].from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            elif rng.random() < 0.1:
                parameter *= rng.choice([0.0, 0.5, 1.5])
    return family, head, model


def random_reads(rng: random.Random, model: Any) -> Reads:
    """What is used of the last hidden states: what the head reads, or anything without one."""
    return rng.choice([*get_args(Reads)]) if model is model.base_model else reads_of(model)


def random_pruner(rng: random.Random, model: Any, reads: Reads) -> tp.Pruner:
    """Any method with settings that drop nothing, something or nearly all."""
    layers = trace_layers(model)
    gate = tp.VocabularyGate(torch.arange(VOCABULARY) / VOCABULARY, rng.choice([0.0, 0.1, 0.4, 0.9]))
    common: dict[str, Any] = {
        "summary_tokens": rng.choice(["none", "none", "shared", "segment"]),
        "prune_layers": rng.choice([None, None, [1], list(range(1, layers + 1, 2))]),
        "vocabulary": rng.choice([None, None, gate]),
        "scoring_mode": rng.choice(["mean", "mean_norm", "relative"]),
        "max_seq_length": rng.choice([16, 128]),
        "protect": rng.choice([[], [], ["separators"], ["first_segment"], ["separators", "first_segment"]]),
        "received_from": rng.choice(["all", "all", "first_segment", "first"]),
        **random_fitted(rng, layers, shape_of(model.config).hidden_size, reads),
        "context": random_context(rng, model),
    }
    if reads != "all" and rng.random() < 0.4:
        common |= {"max_tokens": rng.choice([16, 24]), "chunks": reads == "mean" and rng.random() < 0.5}
    if rng.random() < 0.6:
        common.pop("probes")
    else:
        common["summary_tokens"] = "none"
    if common["context"] is not None:
        common["summary_tokens"] = "none"
    softly = common | {"summary_tokens": "none"}
    unit = {"mean": 1 / common["max_seq_length"], "mean_norm": 0.1, "relative": 1.0}[common["scoring_mode"]]
    thresholds = [rng.choice([0.0, 0.5, 1.0, 1.5]) * unit for _ in range(layers)]
    return rng.choice(
        [
            lambda: tp.FixedThreshold(final_token_threshold=rng.uniform(0, 2) * unit, **common),
            lambda: tp.FixedThreshold(thresholds=thresholds, **common),
            lambda: tp.LearnedThreshold(final_token_threshold=rng.uniform(0, 2) * unit, **softly),
            lambda: tp.TopK(token_keep_rate=rng.uniform(-0.5, 1), keep_all_layers=rng.randint(1, 2), **common),
            lambda: tp.RelativeThreshold(token_threshold=rng.uniform(0, 1), **common),
            lambda: tp.RisingThreshold(final_token_threshold=rng.uniform(0, 1), **common),
            lambda: Hashed(**common),
            lambda: tp.Unpruned(),
        ]
    )()


def random_fitted(rng: random.Random, layers: int, hidden: int, reads: Reads) -> dict[str, Any]:
    """Probes in some layers, maps for wherever tokens can leave, and a correction where one vector is read."""
    generator = torch.Generator().manual_seed(rng.getrandbits(31))

    def affine(*shape: int) -> Tensor:
        return torch.randn(*shape, hidden + 1, generator=generator) / hidden**0.5

    probed = sorted(rng.sample(range(1, layers + 1), rng.randint(1, layers)))
    departed = rng.choice(["state", "survivors", "map"])
    corrected = reads != "all" and rng.random() < 0.3
    return {
        "probes": rng.choice([None, tp.Probes(probed, affine(len(probed)))]),
        "departed": departed,
        "maps": tp.DepartureMaps(range(layers + 1), affine(layers + 1, hidden)) if departed == "map" else None,
        "correction": tp.Correction(affine(hidden)) if corrected else None,
    }


def random_context(rng: random.Random, model: Any) -> tp.LinearContext | None:
    """Of any rank and some cuts, often of what a gate keeps outside; None in half of the cases."""
    shape = shape_of(model.config)
    generator = torch.Generator().manual_seed(rng.getrandbits(31))
    cuts = sorted(rng.sample(range(shape.num_layers + 1), rng.randint(1, shape.num_layers + 1)))
    rank = rng.choice([1, rng.randint(1, shape.hidden_size), shape.hidden_size])
    if rng.random() < 0.5:
        return None
    down = torch.randn(len(cuts), rank, shape.hidden_size + 1, generator=generator) / shape.hidden_size**0.5
    up = torch.randn(shape.num_layers, 2 * shape.key_size, rank + 1, generator=generator) / rank**0.5
    return tp.LinearContext(cuts, down, up)


def random_batch(rng: random.Random, config: Any, max_tokens: int | None) -> dict[str, Tensor]:
    """Padding on either side or within, sequences of nothing, or no mask; token types and positions, or none."""
    longest = min(POSITIONS, shape_of(config).max_positions or POSITIONS) * (1 if max_tokens is None else 2)
    rows, width = rng.randint(1, 5), rng.choice([1, 2, 7, 16, 17, 33, longest])
    generator = torch.Generator().manual_seed(rng.getrandbits(31))
    ids = torch.randint(4, VOCABULARY, (rows, width), generator=generator)
    mask = torch.ones_like(ids)
    kind = rng.choice(["right", "right", "left", "holes", "none"])
    for row in mask if kind != "none" else ():
        valid = rng.choice([0, 1, width, rng.randint(1, width)])
        if kind == "left":
            row[: width - valid] = 0
        else:
            row[valid:] = 0
        if kind == "holes":
            row &= torch.rand(width, generator=generator) < 0.7
    if rng.random() < 0.5:  # pairs
        ids[:, [*rng.sample(range(width), min(2, width)), -1]] = 3
    ids[mask == 0] = getattr(config, "pad_token_id", None) or 0
    batch = {"input_ids": ids.to(rng.choice([torch.int64, torch.int64, torch.int32]))}
    if kind != "none":
        batch["attention_mask"] = mask.to(rng.choice([torch.int64, torch.bool, torch.float32]))
    if getattr(config, "type_vocab_size", 0) > 1 and rng.random() < 0.5:
        batch["token_type_ids"] = (torch.arange(width) > width // 2).long().expand(rows, width)
    if rng.random() < 0.15 and max_tokens is None:
        batch["position_ids"] = torch.randint(2, longest, (rows, width), generator=generator)
    return batch


def spoilt(rng: random.Random, batch: dict[str, Tensor]) -> dict[str, Any]:
    """The batch with one thing wrong."""
    ids, spoilt = batch["input_ids"], dict[str, Any](batch)
    name, value = rng.choice(
        [
            ("input_ids", ids.clone().fill_(rng.choice([-1, VOCABULARY, 2**31 - 1]))),
            ("input_ids", ids.float()),
            ("input_ids", ids[0]),
            ("input_ids", ids[:, :0]),
            ("input_ids", ids.tolist()),
            ("attention_mask", torch.ones(ids.shape[0], ids.shape[1] + 1)),
            ("attention_mask", torch.full(ids.shape, rng.choice([2.0, -1.0, torch.nan, -torch.inf, 0.5]))),
            ("attention_mask", torch.ones(ids.shape)[:, None, None]),
            ("position_ids", ids.float()),
            ("position_ids", torch.zeros(ids.shape[0] + 1, ids.shape[1], dtype=torch.long)),
        ]
    )
    spoilt[name] = value
    if name == "input_ids":
        spoilt.pop("attention_mask", None)
    return spoilt


def check_batch(
    batch: dict[str, Any], model: Any, pruner: tp.Pruner, reads: Reads, engines: dict[str, Any], row: int
) -> Counter[str]:
    """The same batch through the model and every engine: a case each.

    Returns:
        How many cases were of what kind.

    Raises:
        AssertionError: where results differ.
    """
    with pruned(model, pruner, "masked", reads), tp.record(model) as reference:
        expected = outputs(model(**batch))
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    sure = isinstance(pruner, Hashed | tp.Unpruned) or decision_margin(reference, trace_layers(model)) >= NEAR
    with pruned(model, pruner, reads=reads), tp.record(model) as trace:
        found = outputs(model(**batch))
    if sure:
        assert same_survivors(trace, reference), "the model keeps other tokens than the reference"
        compare("the model", found, expected, mask, EXACT)
        assert tp.count_flops(model, trace) == tp.count_flops(model, reference), "the model counts other FLOPs"
    plain: dict[str, tuple[dict[str, Tensor], tp.Trace]] = {}
    for name, engine in engines.items():
        with tp.record(engine) as trace:
            found = outputs(engine(**batch))
        if engine.is_native:
            check_bits(name, engine, batch, found, row)
        dtype = name.partition(", ")[2]
        if sure and dtype == "float32":
            assert same_survivors(trace, reference), f"{name} keeps other tokens than the reference"
            compare(name, found, expected, mask, EXACT)
            assert tp.count_flops(engine, trace) == tp.count_flops(model, reference), f"{name} counts other FLOPs"
        elif dtype != "float32":
            # Tiny models make much of rounding. Levels that round the same numbers agree, but for some at the edge.
            beside, other = plain.setdefault(rounding_of(name.partition(",")[0], dtype), (found, trace))
            if same_survivors(trace, other):
                compare(name, found, beside, mask, ROUNDED)
        for key, value in found.items():  # a head that takes the mean of no tokens gives NaN, pruned or not
            assert torch.equal(value.isfinite(), expected[key].isfinite()), f"{name}: {key} is not finite"
    return Counter({"equal" if sure else "near a tie": len(engines)})


def compare(name: str, found: dict[str, Tensor], expected: dict[str, Tensor], mask: Tensor, allowed: float) -> None:
    """Equal at valid tokens, up to a fraction of the largest number."""
    assert found.keys() == expected.keys(), f"{name} returns {sorted(found)}, not {sorted(expected)}"
    for key, value in expected.items():
        actual = found[key]
        assert actual.shape == value.shape, f"{name}: {key} is {list(actual.shape)}, not {list(value.shape)}"
        if value.shape[:2] == mask.shape:
            value, actual = value[mask], actual[mask]
        if not value.numel():
            continue
        value, actual = value.nan_to_num(), actual.nan_to_num()
        difference, scale = (actual - value).abs().max().item(), max(1.0, value.abs().max().item())
        assert difference <= allowed * scale, f"{name}: {key} differs by {difference:.1e} of {scale:.1e}"


def check_bits(name: str, engine: Any, batch: dict[str, Any], found: dict[str, Tensor], row: int) -> None:
    """Native results are the same to the last bit again, unrecorded, and for a sequence alone."""
    again = outputs(engine(**batch))
    alone = outputs(engine(**{key: x[row : row + 1] for key, x in batch.items()}))
    for key, value in found.items():
        assert equal(value, again[key]), f"{name}: {key} is another when repeated"
        if value.dim() and len(value) == len(batch["input_ids"]):
            assert equal(alone[key][0], value[row]), f"{name}: {key} of sequence {row} depends on its batch"


def equal(first: Tensor, second: Tensor) -> bool:
    """To the last bit, NaN included."""
    return torch.equal(first.nan_to_num(1e30), second.nan_to_num(1e30))


def trace_layers(model: Any) -> int:
    return shape_of(model.config).num_layers


def run_group(seed: int, group: int, tally: Tally) -> None:
    """All cases of a group; a failure ends it."""
    rng = random.Random(f"{seed}:{group}")
    family, head, model = random_model(rng)
    for _ in range(PRUNERS):
        reads = random_reads(rng, model)
        pruner = random_pruner(rng, model, reads)
        engines = engines_of(model, pruner, reads, rng)
        for case in range(BATCHES):
            tally.where = f"--seed {seed} --group {group}: {family}, {head}, reads {reads}, {pruner}, batch {case}"
            batch = random_batch(rng, model.config, pruner.max_tokens)
            if rng.random() < 0.1:
                check_refused(spoilt(rng, batch), model, pruner, reads, engines)
                tally.counts["refused"] += len(engines)
            else:
                tally.counts += check_batch(
                    batch, model, pruner, reads, engines, rng.randrange(len(batch["input_ids"]))
                )


def rounding_of(level: str, dtype: str) -> str:
    """What a level rounds in this precision, in words."""
    if level in SEVEN_BITS and dtype == "int8":
        return "int8, weights of 7 bits"
    return f"{dtype}, bfloat16 rows" if level in HALF_ROWS else dtype


def engines_of(model: Any, pruner: tp.Pruner, reads: Reads, rng: random.Random) -> dict[str, Any]:
    """One for every kernel level, one on PyTorch, and some in lower precision; those that the family has."""
    levels = levels_here(load_library())
    asked = [(level, "float32") for level in (*levels, "torch")]
    for dtype in ("bfloat16", "int8"):
        for rounding in sorted({rounding_of(level, dtype) for level in levels}):
            alike = [level for level in levels if rounding_of(level, dtype) == rounding]
            asked += [(level, dtype) for level in rng.sample(alike, min(2, len(alike)))]
    engines = {}
    with pruned(model, pruner, reads=reads):
        for level, dtype in asked:
            os.environ[KERNELS_VARIABLE] = level
            native = not engines or any(engine.is_native for engine in engines.values())
            if native or level == "torch":  # without native layers every level would be PyTorch
                engines[f"{level}, {dtype}"] = tp.compile(model, dtype, threads=rng.choice([1, 1, 1, 2]))
    return engines


def check_refused(batch: dict[str, Any], model: Any, pruner: tp.Pruner, reads: Reads, engines: dict[str, Any]) -> None:
    """One clear error of the package from all."""
    with pruned(model, pruner, "masked", reads):
        _must_refuse("the reference", model, batch)
    with pruned(model, pruner, reads=reads):
        _must_refuse("the model", model, batch)
    for name, engine in engines.items():
        _must_refuse(name, engine, batch)


def _must_refuse(name: str, call: Any, batch: dict[str, Any]) -> None:
    try:
        call(**batch)
    except tp.TokenPruningError as error:
        assert "\n" not in str(error)
    else:
        raise AssertionError(f"{name} accepted what is wrong")


def run(seconds: float, seed: int, groups: range | None = None) -> Tally:
    """Groups, until the time is over or they are done."""
    tally, until, group = Tally(), time.monotonic() + seconds, 0
    before = os.environ.get(KERNELS_VARIABLE)
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for group in groups if groups is not None else range(10**9):
                if time.monotonic() > until:
                    break
                tally.where = f"--seed {seed} --group {group}, before its first batch"
                try:
                    run_group(seed, group, tally)
                except Exception as error:
                    tally.failures.append(f"{tally.where}: {type(error).__name__}: {error}")
                    if groups is not None and len(groups) == 1:
                        traceback.print_exc()
    finally:
        if before is None:
            os.environ.pop(KERNELS_VARIABLE, None)
        else:
            os.environ[KERNELS_VARIABLE] = before
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--group", type=int, help="this one alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    groups = None if arguments.group is None else range(arguments.group, arguments.group + 1)
    tally = run(arguments.seconds, arguments.seed, groups)
    for failure in tally.failures:
        print(failure)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(tally.counts.items()))
    print(f"engine: {sum(tally.counts.values())} cases ({kinds}), {len(tally.failures)} failures")
    return bool(tally.failures)


if __name__ == "__main__":
    sys.exit(main())
