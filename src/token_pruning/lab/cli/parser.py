"""A command's arguments from the dataclasses that declare its options, and these from what was given."""

import argparse
import shlex
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from token_pruning.errors import ConfigError
from token_pruning.lab.options import flag_of, options_of, spelling
from token_pruning.lab.training.options import TrainOptions
from token_pruning.pruners import Pruner, methods

OptionsT = TypeVar("OptionsT")
_KEYS_GROUP = "instead of config.json's keys"
_READ_AS = (int, float, str)
# What --help says of the keys of the methods that come with the package; of another method's it says whose they are.
_KEY_HELP = {
    "final_token_threshold": "threshold of the last layer",
    "thresholds": "one threshold for each layer instead",
    "token_keep_rate": "top-k: keep rate of the last layer",
    "keep_all_layers": "top-k: first layers that keep everything (default 3)",
    "token_threshold": "threshold mode: relative to the largest score",
    "scoring_mode": "mean, mean_norm or relative",
    "max_seq_length": "what scores are divided by in scoring mode mean, in tokens (default 128)",
    "summary_tokens": "none, shared or segment: what is dropped lives on as summary tokens",
    "prune_layers": "the layers, the first is 1, at which tokens may leave (default: all)",
    "received_from": "whose attention counts: all, first_segment (the first text of a pair) or first",
    "departed": "what tokens that left count as where all are read: state, or survivors for nothing",
    "max_tokens": "of longer texts only so many tokens enter, evenly spaced; nothing is truncated then",
    "vocabulary_threshold": "tokens whose vocabulary entry's score is lower never enter the first layer; 0 for none",
}


def add_options(
    parser: argparse.ArgumentParser, cls: type, only: Iterable[str] | None = None, **changes: Mapping[str, Any]
) -> None:
    """Add a dataclass's options to a command.

    Args:
        parser: the command's.
        cls: declares them with :func:`token_pruning.lab.options.option`.
        only: names of those that this command has; all of them unless given.
        changes: by name, what argparse is told otherwise for this command.
    """
    hints = get_type_hints(cls)
    groups: dict[str | None, Any] = {None: parser}
    for found in options_of(cls):
        if only is not None and found.name not in only:
            continue
        title = found.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        changed = changes.get(found.name, {})
        _add(groups[title], cls, found.name, hints[found.name], found.default, found.metadata, changed)


def _add(
    group: Any,
    cls: type,
    name: str,
    kind: Any,
    default: Any,
    declared: Mapping[str, Any],
    changes: Mapping[str, Any],
) -> None:
    """Only what is given gets into the namespace, under the names of what declares it and of the option."""
    shown = f"{default:g}" if isinstance(default, float) else default
    arguments: dict[str, Any] = {
        "dest": f"{cls.__name__}.{name}",
        "default": argparse.SUPPRESS,
        "help": declared["help"].format(default=shown),
    }
    if kind is bool:
        arguments["action"] = "store_false" if default is True else "store_true"
    else:
        metavar = declared.get("metavar") or name.upper()
        arguments |= {"required": default is MISSING, "metavar": metavar, **_reading(kind)}
    group.add_argument(*(declared.get("flags") or [spelling(name)]), **arguments | dict(changes))


def _reading(kind: Any) -> dict[str, Any]:
    """How a type is read: ``int | None`` as one number, ``Sequence[int]`` as several, ``int | list[int]`` as either."""
    if get_origin(kind) in (Union, types.UnionType):
        kind, *others = (part for part in get_args(kind) if part is not types.NoneType)
        if any(get_origin(part) is list for part in others):
            return {"type": kind, "nargs": "+", "action": _OneOrSeveral}
    if get_origin(kind) in (list, Sequence):
        return {"type": get_args(kind)[0], "nargs": "+"}
    return {"type": {Path: _path}.get(kind, str if get_origin(kind) is Literal else kind)}


class _OneOrSeveral(argparse.Action):
    """Of one value that value, of several a list."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, values if len(values) > 1 else values[0])


def _path(text: str) -> Path:
    """Not the current folder for no text at all."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is empty; it must be a path")
    return Path(text)


def add_alias(parser: argparse.ArgumentParser, alias: str, cls: type, name: str, **settings: Any) -> None:
    """Another spelling of an option, a word without a flag included; see :func:`settle_aliases`."""
    shown = {} if alias.startswith("-") else {"metavar": alias, "nargs": "?"}
    dest = f"{alias}={cls.__name__}.{name}"
    reading = {"default": argparse.SUPPRESS, **_reading(get_type_hints(cls)[name]), **shown, **settings}
    if alias.startswith("-"):
        parser.add_argument(alias, dest=dest, **reading)
    else:
        parser.add_argument(dest, **reading)


def settle_aliases(arguments: argparse.Namespace) -> None:
    """Put what was given by another spelling where it belongs.

    Raises:
        ConfigError: for an option that was given by both.
    """
    for name, value in list(vars(arguments).items()):
        alias, equals, place = name.partition("=")
        if not equals:
            continue
        if hasattr(arguments, place):
            raise ConfigError(f"give either {alias} or {spelling(place.partition('.')[2])}")
        delattr(arguments, name)
        setattr(arguments, place, value)


def given(arguments: argparse.Namespace, cls: type) -> dict[str, Any]:
    """What the command line gave of a dataclass's options, by name."""
    owner = cls.__name__ + "."
    return {name.removeprefix(owner): value for name, value in vars(arguments).items() if name.startswith(owner)}


def build(arguments: argparse.Namespace, cls: type[OptionsT], **others: Any) -> OptionsT:
    """A dataclass from what was given.

    Raises:
        ConfigError: for a value that is not allowed.
    """
    return cls(**others, **given(arguments, cls))


def command_line(name: str, *options: Any) -> str:
    """The command that gives these options, with what is None or off left out."""
    words = ["token-pruning", name]
    for owner in options:
        for found in options_of(type(owner)):
            value = getattr(owner, found.name)
            if value is None or value is False:
                continue
            words.append(flag_of(type(owner), found.name))
            if value is not True:
                words += map(str, value) if isinstance(value, list) else [str(value)]
    return shlex.join(words)


def add_keys(parser: argparse.ArgumentParser, only: Iterable[str] | None = None) -> None:
    """Add the fields of every pruning method, which are keys of ``config.json``; see :func:`given_keys`."""
    group = parser if only else parser.add_argument_group(_KEYS_GROUP)
    for name, (kind, help) in _keys().items():
        if only is None or name in only:
            _add(group, Pruner, name, kind, None, {"help": help}, {})


def given_keys(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keys that were given."""
    return given(arguments, Pruner)


def _keys() -> dict[str, tuple[Any, str]]:
    """Type and help of each key: those of all registered methods, but for what is an option of training."""
    *modes, last = methods()
    keys: dict[str, tuple[Any, str]] = {
        "prune_mode": (str, f"{', '.join(modes)} or {last}"),
        "vocabulary_threshold": (float, _KEY_HELP["vocabulary_threshold"]),  # the gate's scores are with the weights
    }
    own = {found.name for found in options_of(TrainOptions)}
    for method in methods().values():
        hints = get_type_hints(method)
        for found in fields(method):
            if found.name not in own and _reading(hints[found.name])["type"] in _READ_AS:
                keys.setdefault(
                    found.name,
                    (hints[found.name], _KEY_HELP.get(found.name, f"a key of prune_mode {method.prune_mode}")),
                )
    return keys
