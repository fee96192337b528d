"""What can go wrong, one base class and few children.

Every message is one line that names the key or the file, the value found, and what is allowed.
The command line prints it and exits with status 2.
"""


class TokenPruningError(Exception):
    """The base of every error this package raises on purpose."""


class ConfigError(TokenPruningError):
    """A setting, a command-line argument or a key of ``config.json`` has a value that is not allowed."""


class CheckpointError(TokenPruningError):
    """A checkpoint is missing, unreadable, or does not fit the model."""


class UnsupportedModelError(TokenPruningError):
    """The model's architecture has no adapter, or is asked for something packed execution cannot give."""


class DataError(TokenPruningError):
    """A data file is missing, malformed, or has labels the task does not know."""
