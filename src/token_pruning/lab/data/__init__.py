"""Tasks and their examples: GLUE, a user's own files, docstrings of the standard library, and a small encoder."""

from token_pruning.lab.data.docstrings import load_docstrings
from token_pruning.lab.data.files import load_files, load_unlabelled
from token_pruning.lab.data.glue import load_glue_folder, load_glue_hub
from token_pruning.lab.data.minilm import find_minilm
from token_pruning.lab.data.mpnet import find_mpnet
from token_pruning.lab.data.tasks import GLUE_TASKS, Task, TaskData, TextExamples, glue_task

__all__ = [
    "GLUE_TASKS",
    "Task",
    "TaskData",
    "TextExamples",
    "find_minilm",
    "find_mpnet",
    "glue_task",
    "load_docstrings",
    "load_files",
    "load_glue_folder",
    "load_glue_hub",
    "load_unlabelled",
]
