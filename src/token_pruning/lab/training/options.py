"""What a user can ask of a training run, checked."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from token_pruning.checks import choice, number, positive_integer
from token_pruning.errors import ConfigError

MASKING_MODES = ("none", "soft", "hard", "mixed")
DISTILLATION_WEIGHT = 0.5
DISTILLATION_TEMPERATURE = 2.0
_SOFT_ONLY = ("regularization", "temperature", "lr_threshold", "weight_decay_threshold")
_FLAG = {"regularization": "--lambda", "batch_size": "--bs", "epochs": "--epoch", "save_steps": "--save-step"}

# The start of --masking-mode none without --restore, and the folder name, by --arch.
ARCHITECTURES = {
    f"{family}-{size}": (f"FacebookAI/roberta-{size}", size)
    for family in ("pibert", "ltp", "roberta")
    for size in ("base", "large")
}


def flag(name: str) -> str:
    """The command-line spelling of an option."""
    return _FLAG.get(name, "--" + name.replace("_", "-"))


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """One training run.

    Args:
        restore: the checkpoint to start from; a folder, or a model's name on the hub.
        masking_mode: ``none`` (dense), ``soft`` (thresholds and weights are learned), ``hard`` (tokens are removed by
            fixed rules), or ``mixed`` (half the steps soft, then hard).
        task: for the output folder's name.
        arch: for the output folder's name, ``base`` or ``large``.
        lr: learning rate of the weights.
        epochs: passes over the training data.
        batch_size: examples per step, over all processes.
        weight_decay: of the weights.
        regularization: λ, soft stage only; not with a budget.
        temperature: T, soft stage only.
        lr_threshold: learning rate of the thresholds, soft stage only; the weights' unless given.
        weight_decay_threshold: of the thresholds, soft stage only; 0 unless given.
        target_flops: the budget: relative FLOPs on valid tokens, held by a controller in the soft stage and by
            fitting thresholds to held-out training examples in the hard stage. Thresholds, their temperature and
            learning rate are then in units of scoring mode ``"relative"``.
        budget_input: with a budget: a file of unlabelled texts as the model will meet them, whose cost counts; else
            that of held-out training examples does, which may be shorter or longer.
        vocabulary_keep_rate: the part of the training examples' tokens that enters the first layer; the others' entries
            are the vocabulary's least important (:mod:`token_pruning.budget.vocabulary`). With a budget it follows from
            that, unless given; 1 for all tokens.
        schedule: with a budget in masking mode hard: where tokens leave, by a name of
            :func:`token_pruning.budget.schedules.schedules`; as the checkpoint's learned thresholds do, or ``"drain"``,
            unless given.
        teacher: a dense checkpoint whose outputs are learned too; a folder, or a model's name on the hub. With a budget
            the dense checkpoint that training started from, unless given.
        no_teacher: with a budget: learn from the labels alone.
        distillation_weight: α, the teacher's share of the loss, only with a teacher; ``DISTILLATION_WEIGHT`` unless
            given.
        distillation_temperature: τ of the teacher's and the model's probabilities, only with a teacher and not for a
            regression; ``DISTILLATION_TEMPERATURE`` unless given.
        save_steps: steps between evaluations, log lines and checkpoints; every epoch unless given.
        load_best: finish with the best evaluated model rather than the last.
        save_all: keep every checkpoint rather than three.
        max_length: tokens per example, longer ones are truncated.
        train_length_quantile: train only on examples that are at most as long as this quantile of all lengths.
        seed: of everything random.
        bf16: bfloat16 autocast.
        output_dir: instead of the paper's folder.
        overwrite_output_dir: replace a finished run.
        pruning: keys that replace those of ``config.json``.

    Raises:
        ConfigError: for a value that is not allowed, or an option that the masking mode would ignore.
    """

    restore: str
    masking_mode: str
    task: str
    arch: str = "pibert-base"
    lr: float = 2e-5
    epochs: float = 10
    batch_size: int = 32
    weight_decay: float = 0.0
    regularization: float | None = None
    temperature: float | None = None
    lr_threshold: float | None = None
    weight_decay_threshold: float | None = None
    target_flops: float | None = None
    budget_input: str | None = None
    vocabulary_keep_rate: float | None = None
    schedule: str | None = None
    teacher: str | None = None
    no_teacher: bool = False
    distillation_weight: float | None = None
    distillation_temperature: float | None = None
    save_steps: int | None = None
    load_best: bool = True
    save_all: bool = False
    max_length: int = 128
    train_length_quantile: float | None = None
    seed: int = 42
    bf16: bool = False
    output_dir: str | None = None
    overwrite_output_dir: bool = False
    pruning: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check everything that needs no file."""
        choice(flag("masking_mode"), self.masking_mode, MASKING_MODES)
        choice(flag("arch"), self.arch, ARCHITECTURES)
        for name in ("lr", "epochs", "regularization", "temperature", "lr_threshold", "distillation_temperature"):
            if (value := getattr(self, name)) is not None:
                number(flag(name), value, above=0)
        if self.vocabulary_keep_rate is not None:
            number(flag("vocabulary_keep_rate"), self.vocabulary_keep_rate, above=0, high=1)
            if self.masking_mode == "none":
                raise ConfigError(f"{flag('vocabulary_keep_rate')} applies to pruning, not to masking mode 'none'")
            if self.pruning and self.pruning.get("vocabulary_threshold") is not None:
                raise ConfigError("give either --vocabulary-keep-rate or --vocabulary-threshold")
        if self.distillation_weight is not None:
            number(flag("distillation_weight"), self.distillation_weight, above=0, high=1)
        for name in ("weight_decay", "weight_decay_threshold"):
            if (value := getattr(self, name)) is not None:
                number(flag(name), value, low=0)
        if self.train_length_quantile is not None:
            number(flag("train_length_quantile"), self.train_length_quantile, above=0, high=1)
        for name in ("batch_size", "max_length", "save_steps"):
            if (value := getattr(self, name)) is not None:
                positive_integer(flag(name), value)
        self._check_budget()
        if self.teacher is None and (self.target_flops is None or self.no_teacher):
            for name in ("distillation_weight", "distillation_temperature"):
                if (value := getattr(self, name)) is not None:
                    raise ConfigError(f"{flag(name)} is {value!r}; it applies to training with --teacher")
        if self.pruning and self.masking_mode == "none":
            raise ConfigError(f"{flag(next(iter(self.pruning)))} applies to pruning, not to masking mode 'none'")
        if self.soft:
            if self.regularization is None and self.target_flops is None:
                raise ConfigError(
                    f"--lambda is missing; masking mode {self.masking_mode!r} needs it (0.01 to 0.2 is usual), "
                    "or a budget, --target-flops"
                )
        else:
            for name in _SOFT_ONLY:
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{flag(name)} is {getattr(self, name)!r}; it applies to masking modes soft and mixed, "
                        f"not to {self.masking_mode!r}"
                    )

    def _check_budget(self) -> None:
        if self.target_flops is None:
            for name, value in (
                ("schedule", self.schedule),
                ("no_teacher", self.no_teacher),
                ("budget_input", self.budget_input),
            ):
                if value:
                    raise ConfigError(f"{flag(name)} applies to training with a budget, --target-flops")
            return
        number(flag("target_flops"), self.target_flops, above=0, high=1)
        if self.masking_mode == "none":
            raise ConfigError(f"{flag('target_flops')} applies to pruning, not to masking mode 'none'")
        if self.regularization is not None:
            raise ConfigError("give either --lambda or --target-flops")
        if self.schedule is not None and self.masking_mode != "hard":
            raise ConfigError(f"--schedule applies to masking mode hard; {self.masking_mode!r} learns a schedule")
        if self.teacher is not None and self.no_teacher:
            raise ConfigError("give either --teacher or --no-teacher")

    @property
    def soft(self) -> bool:
        """Whether thresholds are trained."""
        return self.masking_mode in ("soft", "mixed")

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
            method = f"flops_{self.target_flops}"
        return Path(self.restore) / method / f"lr_{self.lr}"
