"""What a user can ask of a training run or a calibration, checked."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from token_pruning.budget.calibration import FEWEST_EXAMPLES
from token_pruning.budget.distillation import EXAMPLES
from token_pruning.checks import choice, number, positive_integer, whole_number
from token_pruning.errors import ConfigError
from token_pruning.lab.options import (
    ENGINE_DTYPES,
    MODEL,
    TEXTS_HELP,
    InferenceOptions,
    check_options,
    flag_of,
    option,
    options_of,
    output_folder,
)
from token_pruning.pruners import check_keys
from token_pruning.pruners.summary import SummaryTokens

MASKING_MODES = ("none", "soft", "hard", "mixed")
DISTILLATION_WEIGHT = 0.5
DISTILLATION_TEMPERATURE = 2.0
_TRAINING = "training"
_BUDGET = "budget (masking modes soft, mixed and hard)"
_SOFT = "soft stage (masking modes soft and mixed)"
_TEACHER = "distillation (any masking mode)"
_above_0 = partial(number, above=0)
_not_negative = partial(number, low=0)
_fraction = partial(number, above=0, high=1)


def _budgets(flag: str, value: float | list[float]) -> None:
    for budget in value if isinstance(value, list) else [value]:
        _fraction(flag, budget)


# The start of --masking-mode none without --restore, and the folder name, by --arch.
ARCHITECTURES = {
    f"{family}-{size}": (f"FacebookAI/roberta-{size}", size)
    for family in ("pibert", "ltp", "roberta")
    for size in ("base", "large")
}


@dataclass(frozen=True, kw_only=True)
class TrainOptions(InferenceOptions):
    """One training run; what each option is stands beside it.

    A budget, ``target_flops``, is held by a controller in the soft stage and by fitting thresholds to held-out training
    examples, or to the texts of ``budget_input``, in the hard stage; of several, each step is pruned to one between the
    lowest and 1. Thresholds, their temperature and their learning rate are then in units of scoring mode
    ``"relative"``, and the dense checkpoint that training started from teaches, unless told otherwise.

    Args:
        task: for the output folder's name.
        pruning: keys that replace those of ``config.json``.

    Raises:
        ConfigError: for a value that is not allowed, or an option that the masking mode would ignore.
    """

    task: str
    pruning: dict[str, Any] | None = None

    restore: str = option(
        help="checkpoint folder, or a hub name (default with --masking-mode none: the hub's RoBERTa of --arch)",
        flags=("--restore", "--restore-file"), group=MODEL, metavar="CKPT",
    )  # fmt: skip
    arch: str = option(
        "pibert-base", help=f"{', '.join(ARCHITECTURES)}: names the output folder (default {{default}})", group=MODEL,
        check=partial(choice, allowed=ARCHITECTURES),
    )  # fmt: skip
    masking_mode: str = option(
        "hard", help=f"{', '.join(MASKING_MODES)} (default {{default}}); none is dense", group=MODEL,
        check=partial(choice, allowed=MASKING_MODES),
    )  # fmt: skip
    batch_size: int = option(
        32, help="examples per step over all processes (default {default})", flags=("--bs", "--batch-size"),
        group=MODEL, check=positive_integer,
    )  # fmt: skip
    output_dir: str | None = option(
        None, help="default: the paper's folder, checkpoints/base/TASK/… or CKPT/hard/lr_…", group=MODEL,
        check=output_folder,
    )  # fmt: skip

    lr: float = option(
        2e-5, help="learning rate of the weights (default 4e-5; MRPC 2e-5)", group=_TRAINING, check=_above_0
    )
    epochs: float = option(
        10.0,
        help="epochs (default {default})",
        flags=("--epoch", "--epochs"),
        group=_TRAINING,
        check=partial(number, above=0, high=10**6),
    )
    train_length_quantile: float | None = option(
        None, help="train only on examples no longer, in tokens, than the Q-quantile of the training set (default: "
        "all)", group=_TRAINING, metavar="Q", check=_fraction,
    )  # fmt: skip
    weight_decay: float = option(0.0, help="weight decay (default {default})", group=_TRAINING, check=_not_negative)
    seed: int = option(
        42, help="seed of everything random (default {default})", group=_TRAINING,
        check=partial(whole_number, low=0, high=2**32 - 1),
    )  # fmt: skip
    save_steps: int | None = option(
        None, help="evaluate, log and save every N steps (default: every epoch)", flags=("--save-step", "--save-steps"),
        group=_TRAINING, metavar="N", check=positive_integer,
    )  # fmt: skip
    save_all: bool = option(False, help="keep every checkpoint (default: three)", group=_TRAINING)
    load_best: bool = option(
        True, help="finish with the last model instead of the best evaluated one",
        flags=("--no-load", "--no-load-best"), group=_TRAINING,
    )  # fmt: skip
    overwrite_output_dir: bool = option(False, help="replace a finished run", group=_TRAINING)
    vocabulary_keep_rate: float | None = option(
        None, help="let this part of the tokens into the first layer: those whose vocabulary entries receive most "
        "attention in the checkpoint's upper layers (default: what suits the budget; else 1)",
        group=_TRAINING, metavar="R", check=_fraction,
    )  # fmt: skip

    target_flops: float | list[float] | None = option(
        None, help="what the pruned model may cost, relative to the dense one on valid tokens, instead of --lambda; "
        "thresholds, --temperature and --lr-threshold are then for scoring mode relative. There may be several, "
        "for one checkpoint that holds them all",
        group=_BUDGET, metavar="F", check=_budgets,
    )  # fmt: skip
    schedule: str | None = option(
        None, help="masking mode hard: where tokens leave: step-K (all after layer K), linear, geometric, late, or the "
        "parts that leave after each layer, as 0.6,0.4; drain: all of them, as late as the budget allows "
        "(default: as the checkpoint's learned thresholds do, or drain)", group=_BUDGET,
    )  # fmt: skip
    budget_input: str | None = option(
        None, help="unlabelled texts as the model will meet them, whose cost is held to the budget (default: held-out "
        "training examples, which may be shorter or longer)", group=_BUDGET, metavar="FILE",
    )  # fmt: skip
    context: bool = option(
        False, help="masking mode hard: tokens that left are attended to still, by keys and values that are guessed "
        "from where they left, a twentieth of what a token costs that stays", group=_BUDGET,
    )  # fmt: skip
    no_teacher: bool = option(False, help="learn from labels alone", group=_BUDGET)

    regularization: float | None = option(
        None, help="weight of the regularizer: higher prunes more (0.01 to 0.2 is usual)",
        flags=("--lambda", "--lambda-threshold"), group=_SOFT, metavar="λ", check=_above_0,
    )  # fmt: skip
    temperature: float | None = option(
        None, help="temperature of the soft mask (default 1e-3)", group=_SOFT, metavar="T", check=_above_0
    )
    lr_threshold: float | None = option(
        None, help="learning rate of the thresholds (default: --lr)", group=_SOFT, check=_above_0
    )
    weight_decay_threshold: float | None = option(
        None, help="weight decay of the thresholds (default 0)", group=_SOFT, check=_not_negative
    )

    teacher: str | None = option(
        None, help="dense checkpoint, folder or hub name, whose outputs are learned beside the labels",
        group=_TEACHER, metavar="CKPT",
    )  # fmt: skip
    distillation_weight: float | None = option(
        None, help=f"the teacher's share of the loss, up to 1 (default {DISTILLATION_WEIGHT:g})",
        group=_TEACHER, metavar="α", check=_fraction,
    )  # fmt: skip
    distillation_temperature: float | None = option(
        None, help=f"temperature of both models' probabilities (default {DISTILLATION_TEMPERATURE:g}); not for a "
        "regression", group=_TEACHER, metavar="τ", check=_above_0,
    )  # fmt: skip
    teacher_states: float | None = option(
        None, help="masking mode hard: learn the teacher's hidden states of the tokens that stay, too, with this "
        "weight (1 is usual; a step takes twice as long)", group=_TEACHER, metavar="W", check=_above_0,
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Check everything that needs no file."""
        super().__post_init__()
        check_keys(self.pruning or {})
        if self.masking_mode == "none":
            self._check_dense()
        if self.vocabulary_keep_rate is not None and (self.pruning or {}).get("vocabulary_threshold") is not None:
            raise ConfigError("give either --vocabulary-keep-rate or --vocabulary-threshold")
        self._check_budget()
        if self.teacher is None and (self.target_flops is None or self.no_teacher):
            for name in ("distillation_weight", "distillation_temperature", "teacher_states"):
                if (value := getattr(self, name)) is not None:
                    raise ConfigError(f"{flag(name)} is {value!r}; it applies to training with --teacher")
        if self.teacher_states is not None and self.masking_mode != "hard":
            raise ConfigError(f"--teacher-states applies to masking mode hard, not to {self.masking_mode!r}")
        if not self.soft:
            self._check_not_soft()
        elif self.regularization is None and self.target_flops is None:
            raise ConfigError(
                f"--lambda is missing; masking mode {self.masking_mode!r} needs it (0.01 to 0.2 is usual), "
                "or a budget, --target-flops"
            )

    def _check_dense(self) -> None:
        ignored = [name for name in ("vocabulary_keep_rate", "target_flops") if getattr(self, name) is not None]
        for name in [*ignored, *(self.pruning or {})]:
            raise ConfigError(f"{flag(name)} applies to pruning, not to masking mode 'none'")

    def _check_budget(self) -> None:
        if self.target_flops is None:
            for name in ("schedule", "context", "no_teacher", "budget_input"):
                if getattr(self, name):
                    raise ConfigError(f"{flag(name)} applies to training with a budget, --target-flops")
            return
        if self.regularization is not None:
            raise ConfigError("give either --lambda or --target-flops")
        for name in ("thresholds", "final_token_threshold"):
            if (value := (self.pruning or {}).get(name)) is not None:
                raise ConfigError(
                    f"{flag(name)} is {value}; a budget, --target-flops, sets the thresholds: leave it out"
                )
        if self.schedule is not None and self.masking_mode != "hard":
            raise ConfigError(f"--schedule applies to masking mode hard; {self.masking_mode!r} learns a schedule")
        if self.context and self.masking_mode != "hard":
            raise ConfigError(f"--context applies to masking mode hard; in {self.masking_mode!r} tokens only fade")
        if self.elastic:
            self._check_elastic()
        if self.teacher is not None and self.no_teacher:
            raise ConfigError("give either --teacher or --no-teacher")

    def _check_elastic(self) -> None:
        several = f"with several budgets, --target-flops {' '.join(map(str, self.budgets))}"
        if self.soft:
            raise ConfigError(f"--masking-mode is {self.masking_mode!r}; {several}, it must be hard")
        if self.vocabulary_keep_rate not in (None, 1):
            raise ConfigError(
                f"--vocabulary-keep-rate is {self.vocabulary_keep_rate}; {several}, each has its own: leave it out, or "
                "give 1 to let all tokens in"
            )
        if (threshold := (self.pruning or {}).get("vocabulary_threshold")) is not None:
            raise ConfigError(f"--vocabulary-threshold is {threshold}; {several}, each has its own: leave it out")

    def _check_not_soft(self) -> None:
        for name in (found.name for found in options_of(TrainOptions) if found.metadata["group"] == _SOFT):
            if (value := getattr(self, name)) is not None:
                raise ConfigError(
                    f"{flag(name)} is {value!r}; it applies to masking modes soft and mixed, not to "
                    f"{self.masking_mode!r}"
                )

    @property
    def soft(self) -> bool:
        """Whether thresholds are trained."""
        return self.masking_mode in ("soft", "mixed")

    @property
    def budgets(self) -> list[float]:
        """Those to hold, the lowest first; none without a budget."""
        if self.target_flops is None:
            return []
        return sorted(self.target_flops) if isinstance(self.target_flops, list) else [self.target_flops]

    @property
    def budget(self) -> float | None:
        """The lowest budget, which the model is left at."""
        return min(self.budgets, default=None)

    @property
    def elastic(self) -> bool:
        """Whether several budgets are asked for."""
        return isinstance(self.target_flops, list)

    def identity(self) -> dict[str, Any]:
        """What must be the same for one run to continue another."""
        return {k: v for k, v in asdict(self).items() if k not in ("output_dir", "overwrite_output_dir")}

    def default_output_dir(self, config: dict[str, Any]) -> Path:
        """The paper's folder for this run.

        Args:
            config: the starting checkpoint's ``config.json``, with the keys that name the method.
        """
        root: Path = Path("checkpoints") / ARCHITECTURES[self.arch][1] / self.task
        if self.masking_mode == "none":
            return root / "dense" / f"lr_{self.lr}"
        mode = str(config["prune_mode"])
        if self.soft:
            folder = root / mode / f"rate_{config.get('final_token_threshold')}"
            temperature = 1e-3 if self.temperature is None else self.temperature
            strength = f"lambda_{self.regularization}" if self.target_flops is None else f"flops_{self.target_flops}"
            folder = folder / f"temperature_{temperature}" / strength / f"lr_{self.lr}"
            return folder / "mixed" if self.masking_mode == "mixed" else folder
        method = "hard" if mode == "absolute_threshold" else mode
        if self.target_flops is not None:
            method = f"flops_{'_'.join(map(str, self.budgets))}"
        return Path(self.restore) / method / f"lr_{self.lr}"


def flag(name: str) -> str:
    """The command-line spelling of one of :class:`TrainOptions`' fields, or of a key of ``config.json``."""
    return flag_of(TrainOptions, name)


@dataclass(frozen=True, kw_only=True)
class TextsOptions:
    """What a model of which there are no labels is fitted to."""

    input: Path | None = option(None, help=TEXTS_HELP, metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class DistillOptions(TextsOptions):
    """One distillation of a model of sentence-transformers; what each option is stands beside it.

    Args:
        base: the model, the budget, how to train and where to write; masking mode hard.
        learning_rate: in place of the base's; what suits the model unless given.

    Raises:
        ConfigError: for a value that is not allowed, or missing texts.
    """

    base: TrainOptions
    learning_rate: float | None = None

    examples: int = option(
        EXAMPLES,
        help=f"with --texts: how many are kept out of training, to calibrate on (default {{default}}, at least "
        f"{FEWEST_EXAMPLES})",
        check=partial(whole_number, low=FEWEST_EXAMPLES, high=10**7),
    )

    def __post_init__(self) -> None:
        """Check everything that needs no file."""
        check_options(self)
        if self.input is None:
            raise ConfigError(f"{self.base.restore} learns from texts without labels; give --texts, not a task")

    def identity(self) -> dict[str, Any]:
        """What must be the same for one run to continue another."""
        return {**self.base.identity(), "examples": self.examples, "texts": str(self.input)}


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(TextsOptions):
    """One calibration: thresholds for a budget, or for a bound on the loss, without training.

    Args:
        base: the checkpoint, the budget and where to write; masking mode hard.
        summary_tokens: see :class:`token_pruning.Pruner`.
        prune_layers: see :class:`token_pruning.Pruner`.
        max_tokens: see :class:`token_pruning.Pruner`.

    Raises:
        ConfigError: for a value that is not allowed, both budgets, or neither of them and no ``max_drop``.
    """

    base: TrainOptions
    summary_tokens: SummaryTokens = "none"
    prune_layers: list[int] | None = None
    max_tokens: int | None = None

    target_ms: float | None = option(
        None, help="instead: milliseconds that one text, or as many as --engine-batch-size, may take in the engine on "
        "this machine", metavar="MS", check=_above_0,
    )  # fmt: skip
    engine_batch_size: int | None = option(
        None, help="with --target-ms: texts in a call (default 1)", check=positive_integer
    )
    engine_threads: int | None = option(
        None, help="with --target-ms: threads of a call (default: as many as PyTorch takes)", check=positive_integer
    )
    engine_dtype: str | None = option(
        None, help=f"with --target-ms: {', '.join(ENGINE_DTYPES)} (default {ENGINE_DTYPES[0]})",
        check=partial(choice, allowed=ENGINE_DTYPES),
    )  # fmt: skip
    max_drop: float | None = option(
        None, help="how much the metric may fall, such as 1.0", metavar="POINTS", check=_above_0
    )
    examples: int = option(
        400,
        help=f"how many are used (default {{default}}, at least {FEWEST_EXAMPLES})",
        check=partial(whole_number, low=FEWEST_EXAMPLES, high=10**7),
    )
    vocabulary: bool = option(True, help="let every token into the first layer", flags=("--no-vocabulary",))
    chunks: bool = option(False, help="longer texts enter whole, in windows of --max-tokens")

    def __post_init__(self) -> None:
        """Check everything that needs no file."""
        check_options(self)
        keys = {name: getattr(self, name) for name in ("summary_tokens", "prune_layers", "max_tokens")}
        check_keys(keys)
        if self.chunks and self.max_tokens is None:
            raise ConfigError("--chunks needs --max-tokens, the size of a window")
        if self.base.target_flops is not None and self.target_ms is not None:
            raise ConfigError("give --target-flops or --target-ms, not both")
        if (self.base.target_flops, self.target_ms, self.max_drop) == (None, None, None):
            raise ConfigError("give --target-flops, --target-ms or --max-drop")
        if self.target_ms is None:
            for name in ("engine_batch_size", "engine_threads", "engine_dtype"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{flag_of(CalibrateOptions, name)} needs --target-ms")
        if self.max_drop is not None and self.input is not None:
            raise ConfigError(f"--max-drop needs labelled examples; {self.input} has none")

    def identity(self) -> dict[str, Any]:
        """What must be the same for one calibration to replace an unfinished one."""
        own = {
            "max_drop": self.max_drop, "target_ms": self.target_ms, "engine_batch_size": self.engine_batch_size,
            "engine_threads": self.engine_threads, "engine_dtype": self.engine_dtype, "examples": self.examples,
            "summary_tokens": self.summary_tokens, "prune_layers": self.prune_layers, "vocabulary": self.vocabulary,
            "max_tokens": self.max_tokens, "chunks": self.chunks,
            "texts": None if self.input is None else str(self.input),
        }  # fmt: skip
        return {**self.base.identity(), **own}
