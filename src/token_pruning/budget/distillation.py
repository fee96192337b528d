"""Distillation: a pruned model learns, from texts without labels, to give what the dense model gives.

For models of sentence-transformers, whose task is a vector or a ranking. Classifiers learn from labels as well:
``token-pruning train``.
"""

import copy
import logging
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import nn

from token_pruning.budget.calibration import FEWEST_EXAMPLES, Calibration, calibrate
from token_pruning.budget.divergence import Kind, divergence_of
from token_pruning.budget.examples import as_batch
from token_pruning.budget.fitting import check_target, outputs_in_parts
from token_pruning.budget.queries import drawn_queries
from token_pruning.checks import number, positive_integer, whole_number
from token_pruning.errors import ConfigError, UnsupportedModelError
from token_pruning.families import padding_id, shape_of
from token_pruning.pruners import FixedThreshold, Pruner
from token_pruning.runtime.adapters import adapter_of
from token_pruning.runtime.flops import count_flops
from token_pruning.runtime.learning import learning
from token_pruning.runtime.prune import attachment_of, hugging_face_model, is_pruned, record, set_budget, unprune

if TYPE_CHECKING:
    from token_pruning.budget.holding import CalibratedHolder

logger = logging.getLogger(__name__)

EPOCHS, BATCH_SIZE, EXAMPLES = 1.0, 16, 1000
LEARNING_RATE, LEARNING_RATE_OF_SCORES = 2e-4, 1e-4
WARM_UP = 0.1  # of the steps
_FAR = 0.03  # from the budget: a gate alone, or one beside few layers that prune, costs what it costs


@dataclass(frozen=True)
class Distilled:
    """What :func:`distill` made of a model, measured on the texts that it kept out of training.

    Attributes:
        calibration: what was found before training; None for a model that was calibrated already.
        relative_flops: what the model costs now.
        divergence_before: how much its outputs differed from the dense model's before training, see
            :mod:`token_pruning.budget.divergence`.
        divergence: how much they do now.
    """

    calibration: Calibration | None
    relative_flops: float
    divergence_before: float
    divergence: float


def distill(
    model: Any,
    texts: Sequence[Any],
    target_flops: float | Sequence[float] | None = None,
    *,
    teacher: Any = None,
    epochs: float = EPOCHS,
    learning_rate: float | None = None,
    batch_size: int = BATCH_SIZE,
    examples: int = EXAMPLES,
    bf16: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> Distilled:
    """Prune a model to a budget and train it, with tokens removed, to give what it gave unpruned. In place.

    It is calibrated on some of the texts (:func:`token_pruning.calibrate`), unless it is already. Then its weights
    learn from the others, without dropout, in the trainer of sentence-transformers: vectors by their cosine to the
    dense vectors and by how the texts of a batch rank each other; a reranker's scores by their squared distance to the
    dense scores, and by how they rank each query's passages, and as many queries' that are drawn out of the passages
    (:mod:`token_pruning.budget.queries`). Meanwhile thresholds are fitted to the budget again and
    again, and probes to what they said of the dense model's states; maps, context and corrections learn like weights.
    Token embeddings, and a vocabulary gate, which says what tokens are worth to the dense model, stay.

    Args:
        model: a ``SentenceTransformer`` or ``CrossEncoder``: dense, or calibrated.
        texts: without labels, at least 64; a reranker's as (query, passage) pairs, several passages for each query, in
            any order.
        target_flops: what the pruned model may cost, relative to the dense one on valid tokens. Of several budgets each
            step takes one at random, from the lowest to 1, so that one set of weights serves them all:
            :func:`token_pruning.set_budget` says which, and the model is left at the lowest. For a calibrated model:
            what it costs now, unless given; one that is calibrated for several budgets is trained for these.
        teacher: the dense model to learn from, of the same class, whose vectors are as long, and of the same size where
            the model has probes; the model itself as it is given, without pruning, unless given.
        epochs: passes over the texts.
        learning_rate: the highest; it rises over a tenth of the steps and falls linearly. 2e-4 unless given, 1e-4 for a
            reranker.
        batch_size: texts or pairs per step.
        examples: how many texts are kept out of training, to calibrate and to measure on; at most half of them.
        bf16: bfloat16 autocast, faster on a CPU that has such products, or a GPU.
        seed: of the choice of those, and of the order of the others. The same seed gives the same weights on the same
            machine with the same number of threads.
        progress: whether to show progress bars; on a terminal unless given.

    Returns:
        What the model costs, and how far it is from the dense one. A warning is logged where training took it further.

    Raises:
        ConfigError: for fewer than 64 texts, pairs where single texts are wanted or the other way round, a dense model
            without ``target_flops``, a budget that cannot be reached, a method that cannot hold one, or a value outside
            its range.
        UnsupportedModelError: for a model of another library, or a reranker with several outputs.
    """
    number("epochs", epochs, above=0)
    if learning_rate is not None:
        number("learning_rate", learning_rate, above=0)
    positive_integer("batch_size", batch_size)
    whole_number("seed", seed, low=0, high=2**32 - 1)
    shows = sys.stderr.isatty() if progress is None else progress
    course = Course(model, texts, target_flops, teacher=teacher, examples=examples, bf16=bf16, seed=seed, shows=shows)
    with TemporaryDirectory(prefix="token-pruning-") as folder:
        trainer = course.trainer(
            output_dir=folder,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            save_strategy="no",
            logging_strategy="no",
        )
        return course.train(trainer)


class Course:
    """One distillation: a calibrated model, its teacher, and what it learns from."""

    def __init__(
        self,
        model: Any,
        texts: Sequence[Any],
        target_flops: float | Sequence[float] | None,
        *,
        teacher: Any,
        examples: int,
        bf16: bool,
        seed: int,
        shows: bool,
    ) -> None:
        """Calibrate the model; arguments and errors as :func:`distill`.

        Args:
            model: see :func:`distill`.
            texts: see :func:`distill`.
            target_flops: see :func:`distill`.
            teacher: see :func:`distill`.
            examples: see :func:`distill`.
            bf16: see :func:`distill`.
            seed: see :func:`distill`.
            shows: whether there are progress bars.
        """
        adapter = adapter_of(model)
        if adapter is None:
            raise UnsupportedModelError(
                f"distill trains a SentenceTransformer or a CrossEncoder; this is a {type(model).__name__}. "
                "Classifiers are trained by token-pruning train"
            )
        adapter.check_distilling(model)
        self.model, self.adapter, self.bf16, self.seed, self.shows = model, adapter, bf16, seed, shows
        pairs = adapter.takes_pairs(model)
        self.texts, held_out = _divided(texts, pairs, examples, seed)
        if pairs:
            self.texts += drawn_queries(self.texts, seed)
        inner = hugging_face_model(model)
        calibrated = is_pruned(inner)
        if target_flops is None and not calibrated:
            raise ConfigError("target_flops is missing; give what the pruned model may cost")
        self.teacher = _teacher(model, teacher)
        if teacher is not None:
            theirs, own = (adapter.outputs(each, held_out[:1]).shape[1] for each in (self.teacher, model))
            if theirs != own:
                raise ConfigError(f"teacher gives vectors of {theirs} numbers; the model's have {own}")
        self.calibration = None
        if calibrated:
            _check_method(target_flops, attachment_of(inner).token_pruner.pruner)
        else:
            assert target_flops is not None
            self.calibration = calibrate(model, held_out, target_flops, seed=seed, progress=shows)
        try:
            self._prepare(held_out, target_flops, pairs)
        except BaseException:
            if not calibrated:
                unprune(inner)
            raise

    def _prepare(self, held_out: list[Any], target_flops: float | Sequence[float] | None, pairs: bool) -> None:
        """What the held-out texts say before training, and what holds the budget."""
        model, adapter, inner = self.model, self.adapter, hugging_face_model(self.model)
        pruner = attachment_of(inner).token_pruner.pruner
        assert isinstance(pruner, FixedThreshold)
        if pruner.probes is not None:
            shapes = [shape_of(hugging_face_model(each).base_model.config) for each in (self.teacher, model)]
            if shapes[0] != shapes[1]:
                raise ConfigError(
                    f"teacher has {shapes[0]}; probes follow its states, so that it must have the model's own sizes, "
                    f"{shapes[1]}"
                )
        whole = pruner.max_tokens is not None
        self.batch = as_batch(adapter.tokenized(model, held_out, whole=whole), padding_id(inner.config))
        if pruner.budgets:
            goal = pruner.budgets[0].relative_flops
            set_budget(inner, goal)
        else:
            goal = float(target_flops) if isinstance(target_flops, (int, float)) else self.cost()
        check_target(inner, self.batch, goal)
        found = divergence_of(inner, self.batch)
        kind: Kind = "embedding" if not pairs else "scores" if found.kind == "ranking" else found.kind
        self._divergence = replace(found, kind=kind)
        self._held_out = held_out
        self._dense = adapter.outputs(self.teacher, held_out)
        self.before = self.differs()
        self.holder = self._holder(goal, several=bool(pruner.budgets))
        self.holder.fit(model)
        if not pruner.budgets and abs((cost := self.cost()) - goal) > _FAR:
            if self.calibration is None:
                raise ConfigError(
                    f"target_flops is {goal}; what this model is pruned by costs {cost:.3f}, whatever its thresholds. "
                    "Leave target_flops out, or give a model that is calibrated to that budget, or not at all"
                )
            logger.warning(
                "target_flops is %g; on the %d texts that are kept out of training the calibrated model costs %.3f. "
                "More texts say better what it costs",
                goal,
                len(held_out),
                cost,
            )

    def _holder(self, goal: float, *, several: bool) -> "CalibratedHolder":
        from token_pruning.budget.elastic_holding import ElasticHolder  # transformers' trainers take long to import
        from token_pruning.budget.holding import CalibratedHolder

        inner, dense = hugging_face_model(self.model), hugging_face_model(self.teacher)
        if several:
            return ElasticHolder(inner, dense, self.batch, self.bf16, self.seed)
        return CalibratedHolder(inner, dense, self.batch, goal, self.bf16)

    def trainer(
        self,
        *,
        output_dir: str,
        epochs: float,
        learning_rate: float | None,
        batch_size: int,
        kind: type | None = None,
        callbacks: Sequence[Any] = (),
        **arguments: Any,
    ) -> Any:
        """The trainer of the model's library, with the teacher's outputs as labels.

        Args:
            output_dir: the trainer's.
            epochs: see :func:`distill`.
            learning_rate: see :func:`distill`.
            batch_size: see :func:`distill`.
            kind: a class to put before the library's trainer.
            callbacks: besides what holds the budget.
            **arguments: for the trainer's arguments.
        """
        from transformers.trainer_callback import PrinterCallback, ProgressCallback

        from token_pruning.budget.holding import Bar

        if learning_rate is None:
            learning_rate = LEARNING_RATE_OF_SCORES if self.adapter.takes_pairs(self.model) else LEARNING_RATE
        cpu = hugging_face_model(self.model).device.type == "cpu"
        given = {
            "output_dir": output_dir,
            "num_train_epochs": epochs,
            "learning_rate": learning_rate,
            "warmup_steps": WARM_UP,
            "bf16": self.bf16,
            "seed": self.seed,
            "use_cpu": cpu,
            "dataloader_pin_memory": not cpu,
            "report_to": "none",
            "disable_tqdm": not self.shows,
            **arguments,
        }
        trainer = self.adapter.distilling(
            self.model,
            self.texts,
            self.teacher,
            batch_size=batch_size,
            arguments=given,
            callbacks=[self.holder, *callbacks],
            kind=kind,
            shows=self.shows,
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        if self.shows and not any(isinstance(callback, ProgressCallback) for callback in callbacks):
            trainer.add_callback(Bar)
        return trainer

    def train(self, trainer: Any, **options: Any) -> Distilled:
        """Train to the end; ``options`` are for the trainer's ``train``."""
        training = self.model.training
        token_pruner = attachment_of(self.model).token_pruner
        with learning(token_pruner), _without_dropout(self.model), _same_embeddings(self.model):
            trainer.train(**options)
        self.model.train(training)
        self.holder.finish(self.model)
        result = Distilled(self.calibration, self.cost(), self.before, self.differs())
        # Of a run that was continued nobody knows here what came before its first step.
        if result.divergence > result.divergence_before and not options.get("resume_from_checkpoint"):
            logger.warning(
                "training took the model further from the dense one: divergence %.4f on texts that were not trained "
                "on, %.4f before. The model as it was calibrated is the better one",
                result.divergence,
                result.divergence_before,
            )
        return result

    def cost(self) -> float:
        """What the model costs on the held-out texts, relative to the dense one."""
        inner, training = hugging_face_model(self.model), self.model.training
        self.model.eval()
        with record(inner) as trace:
            outputs_in_parts(inner, self.batch)
        self.model.train(training)
        return count_flops(inner, trace).relative

    def differs(self) -> float:
        """How far the model is from the dense one on the held-out texts."""
        training = self.model.training
        now = self.adapter.outputs(self.model.eval(), self._held_out)
        self.model.train(training)
        return self._divergence.between(self._dense, now, self._divergence.groups)[0]


def _check_method(target_flops: Any, pruner: Pruner) -> None:
    """See that a model's own method can hold a budget, and that it is trained for what it was calibrated to."""
    if not isinstance(pruner, FixedThreshold) or pruner.learned or not pruner.stores_thresholds:
        raise ConfigError(f"the model is pruned by {pruner!r}; what calibrate leaves can hold a budget")
    if pruner.scoring_mode != "relative":
        raise ConfigError(
            f"the model's thresholds are in scoring mode {pruner.scoring_mode!r}; what calibrate leaves is in "
            "'relative', in which budgets are held"
        )
    several = isinstance(pruner, FixedThreshold) and bool(pruner.budgets)
    if target_flops is not None and (several or not isinstance(target_flops, (int, float))):
        raise ConfigError(
            f"target_flops is {target_flops!r}; this model is pruned for {'several budgets' if several else 'one'} "
            f"already, and is trained for {'these: leave target_flops out' if several else 'one'}"
        )


def _divided(texts: Sequence[Any], pairs: bool, examples: int, seed: int) -> tuple[list[Any], list[Any]]:
    """Texts to train on and texts to fit to, a query's pairs on one side."""
    if isinstance(texts, str) or not hasattr(texts, "__len__"):
        raise ConfigError(f"texts is a {type(texts).__name__}; it must be a list of texts, or of pairs of them")
    wanted = whole_number("examples", examples, low=FEWEST_EXAMPLES, high=10**7)
    if len(texts) < 2 * FEWEST_EXAMPLES:
        raise ConfigError(f"{len(texts)} texts were given; distillation needs at least {2 * FEWEST_EXAMPLES}")
    for place, text in enumerate(texts):
        if not _is_pair(text) if pairs else not isinstance(text, str):
            what = "pairs of a query and a passage" if pairs else "single texts"
            raise ConfigError(f"texts[{place}] is {text!r}; this model takes {what}")
    groups: dict[Any, list[Any]] = {}
    for place, text in enumerate(texts):
        groups.setdefault(text[0] if pairs else place, []).append(tuple(text) if pairs else text)
    names = list(groups)
    if len(names) < 4:
        raise ConfigError(f"all pairs are of {len(names)} queries; distillation needs at least 4")
    random.Random(seed).shuffle(names)
    wanted, chosen = min(wanted, len(texts) // 2), 0
    held_out: list[Any] = []
    while chosen < len(names) - 1 and len(held_out) < wanted:
        held_out += groups[names[chosen]]
        chosen += 1
    return [text for name in names[chosen:] for text in groups[name]], held_out


def _is_pair(text: Any) -> bool:
    return isinstance(text, list | tuple) and len(text) == 2 and all(isinstance(part, str) for part in text)


def _teacher(model: Any, given: Any) -> Any:
    """The dense model that is learned from, in evaluation mode."""
    if given is None:
        found = copy.deepcopy(model)
        if is_pruned(hugging_face_model(found)):
            unprune(found)
        return found.eval()
    if type(given) is not type(model) or is_pruned(hugging_face_model(given)):
        raise ConfigError(
            f"teacher is a {type(given).__name__}; it must be a {type(model).__name__} that is not pruned"
        )
    return given.eval()


@contextmanager
def _same_embeddings(model: Any) -> Iterator[None]:
    """Of a vocabulary few entries are seen often: what these learned would not fit the others."""
    found = [each for each in hugging_face_model(model).get_input_embeddings().parameters() if each.requires_grad]
    for each in found:
        each.requires_grad_(False)
    try:
        yield
    finally:
        for each in found:
            each.requires_grad_(True)


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """A teacher's outputs are better learned without; probabilities come back afterwards."""
    before: list[tuple[Any, str, float]] = []
    for module in model.modules():
        name = "p" if isinstance(module, nn.Dropout) else "attention_dropout"
        if isinstance(value := getattr(module, name, None), float):
            before.append((module, name, value))
            setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
