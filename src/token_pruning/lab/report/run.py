"""``token-pruning report``: what a folder's pruning costs and saves on some texts, beside truncation, as one page."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from token_pruning.checkpoint.loading import local_folder
from token_pruning.engine.machine import cpu_name
from token_pruning.errors import ConfigError
from token_pruning.families import ModelShape
from token_pruning.lab.files import try_file
from token_pruning.lab.metrics import compute_metrics
from token_pruning.lab.quantities import quantile_groups, spread_over_lengths
from token_pruning.lab.report.agreement import EXPLAINED, agreement
from token_pruning.lab.report.options import ReportOptions
from token_pruning.lab.report.page import load_template, write_report
from token_pruning.lab.report.subject import OfLibrary, OfTransformers, Subject
from token_pruning.lab.report.timing import milliseconds, timed_texts
from token_pruning.lab.training.plan import DataSource
from token_pruning.runtime.adapters import adapter_for
from token_pruning.runtime.explanation import Explanation, explain_tokens
from token_pruning.runtime.flops import layer_flops, relative_flops
from token_pruning.runtime.prune import set_budget

_CUTS = (0.85, 0.7, 0.55, 0.4, 0.25)  # relative FLOPs of the truncated points, besides the pruned model's
_LENGTHS = 4  # groups of texts by length


def report(options: ReportOptions, load_data: DataSource | None, *, command: str) -> Path:
    """Write the page.

    Args:
        options: what to do.
        load_data: gives a labelled task; None for texts without labels.
        command: stands on the page.

    Returns:
        The path of the page.

    Raises:
        TokenPruningError: for every mistake of the user.
    """
    load_template("page.html")  # says what is missing before minutes of work
    folder = local_folder(options.restore)
    output = options.output or folder / "report.html"
    try_file("--output", output)
    adapter = adapter_for(folder)
    subject = OfTransformers(options, folder, load_data) if adapter is None else OfLibrary(options, folder, adapter)
    if options.budget is not None:
        set_budget(subject.model, options.budget)
    if len(subject.texts) < 2:
        raise ConfigError(f"{len(subject.texts)} text is given; a report compares at least 2")
    (subject.texts.note if subject.data is None else subject.data).say()
    results = _measure(subject, options)
    results |= {"title": f"What pruning does to {folder.name}", "command": command}
    write_report(results, output)
    for stage in results["stages"]:
        figures = {**stage["metrics"], "relative FLOPs": stage["relative_flops"], **stage["times"]}
        print(f"{stage['name']}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items() if value))
    print(f"written to {output}")
    return output


def _measure(subject: Subject, options: ReportOptions) -> dict[str, Any]:
    """Everything on the page but its title."""
    threads = options.threads or torch.get_num_threads()
    cut = None if subject.whole else subject.limit
    rows = subject.rows(cut)
    explanations = [explain_tokens(subject.model, row, subject.tokenizer) for row in rows]
    pruned_answers, pruned_flops = subject.pruned_answers(cut)
    pruned_engine = subject.engine(options.dtype, threads)
    label_ids = subject.label_ids()

    subject.make_dense()
    dense_engine = subject.engine(options.dtype, threads)
    dense_rows = subject.rows(subject.limit)
    lengths = [len(row["input_ids"]) for row in dense_rows]
    dense_answers = subject.answers(subject.limit)
    dense_flops = _dense_flops(subject.shape, lengths)

    def stage(name: str, kind: str, answers: Any, flops: float) -> dict[str, Any]:
        compared = agreement(subject.kind, dense_answers, answers, subject.groups)
        metrics = compared
        if subject.data is not None:
            logits = torch.stack(answers).numpy()
            metrics = {**compute_metrics(subject.data.task, logits, np.array(label_ids)), **compared}
        return {
            "name": name,
            "kind": kind,
            "metrics": metrics,
            "gflops_per_example": {"computed": flops / 1e9},
            "relative_flops": flops / dense_flops,
            "times": {},
        }

    dense = stage("dense", "dense", dense_answers, dense_flops)
    pruned = stage("pruned", "pruned", pruned_answers, pruned_flops)
    cuts = _cuts(subject, lengths, [pruned["relative_flops"], *_CUTS])
    truncated = [
        stage(
            _first(each),
            "truncated",
            subject.answers(each),
            _cost(subject, lengths, each) * dense_flops,
        )
        for each in cuts
    ]
    places = timed_texts(lengths)
    variants = {
        dense["name"]: (dense_engine, dense_rows),
        **{each["name"]: (dense_engine, subject.rows(cut)) for each, cut in zip(truncated[:1], cuts, strict=False)},
        pruned["name"]: (pruned_engine, rows),
    }
    times, passes = milliseconds(
        {name: (engine, [own[i] for i in places]) for name, (engine, own) in variants.items()},
        batch_size=options.batch_size,
        pools=subject.pools,
    )
    stages = [dense, *truncated[:1], pruned]
    for each in stages:
        each["times"] = times[each["name"]]
    metric = next(iter(pruned["metrics"])) if subject.data is None else subject.data.task.best_metric
    shown = spread_over_lengths(np.array([len(row["input_ids"]) for row in rows]), options.samples)
    return {
        "summary": _summary(metric, dense, truncated[:1], pruned),
        "environment": {
            "texts": len(subject.texts),
            "CPU": cpu_name(),
            "threads": threads,
            **_engine_lines(pruned_engine),
            "timed": f"{len(places)} tokenized texts, alone and in batches of {options.batch_size} sorted by length; "
            f"the median of {passes} passes, models taking turns",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "metric": metric,
        "note": _note(subject, metric),
        "stages": stages,
        "curve": [
            {
                "label": each["name"],
                "kind": each["kind"],
                "metric": each["metrics"][metric],
                "relative_flops": each["relative_flops"],
                "milliseconds": each["times"].get("ms in batches"),
            }
            for each in (dense, *truncated, pruned)
        ],
        "by_length": _by_length(explanations),
        "samples": [
            {
                "tokens": [asdict(token) for token in explanations[i].tokens],
                "label": None if label_ids is None else _named(subject, label_ids[i]),
                "prediction": _predicted(subject, pruned_answers[i]),
            }
            for i in shown
        ],
        "num_layers": subject.shape.num_layers,
    }


def _first(tokens: int) -> str:
    return f"first {tokens} tokens"


def _dense_flops(shape: ModelShape, lengths: Sequence[int]) -> float:
    """FLOPs per text of the stock model, without padding."""
    counts = torch.tensor(lengths)
    return shape.num_layers * layer_flops(shape, counts, counts).mean().item()


def _cost(subject: Subject, lengths: Sequence[int], cut: int) -> float:
    """Of truncating to so many tokens, relative to the stock model.

    Where the head reads first tokens only, the last layer computes no others, as in the engine.
    """
    counts = torch.tensor(lengths)
    left = counts.clamp(max=cut).expand(subject.shape.num_layers + 1, -1)
    return float(relative_flops(subject.shape, counts, left, first_only=subject.first_only))


def _cuts(subject: Subject, lengths: Sequence[int], costs: Sequence[float]) -> list[int]:
    """The lengths to truncate to that cost as much, each once; none for a cost of nothing cut."""
    possible = range(subject.shortest, max(lengths))
    found = []
    for cost in costs:
        place = bisect_left(possible, cost, key=lambda cut: _cost(subject, lengths, cut))
        near = list(possible[max(0, place - 1) : place + 1])
        if near:
            found.append(min(near, key=lambda cut: abs(_cost(subject, lengths, cut) - cost)))
    return list(dict.fromkeys(found))


def _by_length(explanations: Sequence[Explanation]) -> list[dict[str, Any]]:
    """For texts of each quantile of length, the mean share of their tokens left at the entry and after each layer."""
    lengths = np.array([len(explanation.tokens) for explanation in explanations])
    left = []
    for explanation in explanations:
        layers = range(explanation.num_layers + 1)
        gone = [token.left_after for token in explanation.tokens]
        left.append([sum(each is None or each > layer for each in gone) / len(gone) for layer in layers])
    kept = np.array(left)
    return [
        {
            "shortest": int(lengths[group].min()),
            "longest": int(lengths[group].max()),
            "texts": len(group),
            "kept": kept[group].mean(0).tolist(),
        }
        for group in quantile_groups(lengths, _LENGTHS)
    ]


def _engine_lines(engine: Any) -> dict[str, str]:
    """What the engine says of its kernels, for the reader."""
    lines = dict(line.split(": ", 1) for line in engine.explain().splitlines() if ": " in line)
    return {name: lines[name] for name in ("dtype", "kernels") if name in lines}


def _predicted(subject: Subject, answer: torch.Tensor) -> str | float | None:
    """What the pruned model says of a text, where that is a class or a score."""
    if subject.kind == "classes":
        return _named(subject, int(answer.argmax()))
    return round(float(answer), 4) if subject.kind in ("scores", "ranking") and answer.numel() == 1 else None


def _named(subject: Subject, answer: Any) -> str | float:
    return str(subject.inner.config.id2label[answer]) if subject.kind == "classes" else float(answer)


def _note(subject: Subject, metric: str) -> str:
    parts = []
    if subject.data is not None:
        parts.append(f"{metric} is measured on labels of {subject.data.task.name}.")
    parts.append(f"Agreement with the dense model: {EXPLAINED[subject.kind]}.")
    if subject.whole:
        parts.append(
            f"The dense model sees the first {subject.limit} tokens of a text, the pruned one chooses among all: "
            "where texts are longer they need not agree."
        )
    return " ".join(parts)


def _summary(metric: str, dense: dict[str, Any], truncated: Sequence[dict[str, Any]], pruned: dict[str, Any]) -> str:
    batches, alone = (dense["times"][way] / pruned["times"][way] for way in ("ms in batches", "ms alone"))
    figures = [f"{pruned['metrics'][metric]:.3f} pruned"]
    if dense["metrics"][metric] != 1:  # of agreement with itself nobody needs to read
        figures.append(f"{dense['metrics'][metric]:.3f} dense")
    figures += [
        f"{each['metrics'][metric]:.3f} dense on the {each['name']} of each text, at {each['relative_flops']:.0%}"
        for each in truncated
    ]
    return (
        f"Pruned, the model computes {pruned['relative_flops']:.0%} of what the dense one does. It is {batches:.2f} "
        f"times as fast in batches, {alone:.2f} times one text at a time. {metric[:1].upper()}{metric[1:]}: "
        f"{', '.join(figures)}."
    )
