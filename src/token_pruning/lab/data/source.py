"""Which examples a command works on: a GLUE task, or a user's own files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from token_pruning.errors import ConfigError
from token_pruning.lab.data.files import load_files
from token_pruning.lab.data.glue import load_glue_folder, load_glue_hub
from token_pruning.lab.data.tasks import TaskData, glue_task
from token_pruning.lab.heads import refuse_several_answers
from token_pruning.lab.options import option


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Either a GLUE task or files of one's own.

    Raises:
        ConfigError: for both, for ``data_dir`` with files, or for an unknown task.
    """

    task: str | None = option(None, help="RTE, MRPC, STSB, SST2, QNLI, QQP or MNLI", group="data")
    data_dir: Path | None = option(
        None, help="folder in the official GLUE layout (default: the hub's GLUE)", group="data"
    )
    train_file: Path | None = option(
        None, help="your own CSV, TSV, JSON, JSONL or Parquet, one or two text columns, label", group="data"
    )
    validation_file: Path | None = option(None, help="the same, to evaluate on", group="data")

    def __post_init__(self) -> None:
        """Check everything that needs no file."""
        if self.task and self.own_file:
            raise ConfigError("give either --task (a GLUE task) or --train-file and --validation-file")
        if self.data_dir and self.own_file:
            raise ConfigError(f"--data-dir is {self.data_dir}; it applies to --task, not to --validation-file")
        if self.task:
            glue_task(self.task)

    @property
    def own_file(self) -> Path | None:
        """One of the user's files, None without."""
        return self.train_file or self.validation_file

    def name(self) -> str:
        """The task's name, or the file's.

        Raises:
            ConfigError: if there is neither.
        """
        if self.task:
            return glue_task(self.task).name
        if self.own_file is None:
            raise ConfigError("give either --task (a GLUE task) or --train-file and --validation-file")
        return self.own_file.stem

    def load(self, checkpoint: Any, *, train: bool, own_labels: bool = False) -> TaskData:
        """The examples.

        Args:
            checkpoint: whose labels files are read by.
            train: whether training examples are needed.
            own_labels: read files by the labels found in them: the model gets a head for these.

        Raises:
            TokenPruningError: for a file that is missing or malformed, or a checkpoint with several answers per text.
        """
        if not own_labels:
            refuse_several_answers(checkpoint)
        if self.task:
            task = glue_task(self.task)
            if self.data_dir:
                return load_glue_folder(task, self.data_dir, need_train=train)
            return load_glue_hub(task)
        if self.validation_file is None:
            raise ConfigError("--validation-file is missing; --train-file needs it")
        if train and self.train_file is None:
            raise ConfigError("--train-file is missing; training on your own data needs it and --validation-file")
        labels = None if own_labels else checkpoint.label_names()
        return load_files(self.train_file if train else None, self.validation_file, labels=labels)
