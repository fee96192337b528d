"""``config.json`` as it stands on disk: read strictly, and every key that anything is built from checked by name.

What is only transformers' is checked by transformers, when it builds its config; :func:`foreign_errors` makes one line
of whatever it raises.
"""

import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

import transformers
from transformers.activations import ACT2FN

from token_pruning.checks import choice, one_line, whole_number
from token_pruning.errors import CheckpointError, ConfigError, TokenPruningError, UnsupportedModelError
from token_pruning.families import Reads
from token_pruning.pruners import method_keys

Check = Callable[[str, Any], object]

# Sizes are bounded so that a typing error does not make a model that fills the memory before a weight is compared.
_LAYERS = partial(whole_number, low=1, high=1000)
_SIZE = partial(whole_number, low=1, high=10**6)
_COUNT = partial(whole_number, low=0, high=10**7)
_FLOATS = ("float32", "float16", "bfloat16", "float64")
_PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model")
_CLOSE = 0.88  # of two spellings without case and separators: "token_keep_rates", "final_token_treshold", "scoringmode"


@contextmanager
def foreign_errors(message: str, kind: type[TokenPruningError] = CheckpointError) -> Iterator[None]:
    """Around calls of other libraries that read a user's files: whatever these raise is about the files.

    Only such calls may stand inside, so that a mistake of this package stays a traceback. The original exception is
    the new one's cause.

    Args:
        message: what is wrong; a colon and the exception's own words follow.
        kind: what is raised.
    """
    try:
        yield
    except TokenPruningError:
        raise
    except BaseException as error:
        # A panic of Rust's, as tokenizers has them for some files, is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{message}: {type(error).__name__}: {one_line(error)}") from error


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Around checks that know the keys and not where they stand: messages begin with the file."""
    try:
        yield
    except TokenPruningError as error:
        raise type(error)(f"{file}: {error}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own words: what they would say of a checkpoint is an error here, or about thresholds."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def check_has_tokenizer(folder: Path) -> None:
    """Raises CheckpointError for a folder without a vocabulary: of it transformers would make an empty one."""
    if not any((folder / name).exists() for name in _VOCABULARIES):
        raise CheckpointError(f"{folder} has no tokenizer: none of {', '.join(_VOCABULARIES)}")


def read_json_object(file: Path) -> dict[str, Any]:
    """A file's JSON object, without anything that JSON does not have or that cannot be meant.

    Raises:
        CheckpointError: if it is not there or not text.
        ConfigError: if it is no JSON object, gives a key twice, or has a number that is not finite.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ConfigError(f"{file}: {key} is given twice; it must be given once")
            found[key] = value
        return found

    try:
        value = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist; a checkpoint is a folder with {file.name}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ConfigError(f"{file} is nested too deeply; it must be a JSON object with plain values") from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"{file} is not JSON that can be read: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{file} holds a {type(value).__name__}; it must be a JSON object")
    for path, leaf in _leaves(value):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise ConfigError(f"{file}: {path} is {leaf}; it must be a finite number")
        if isinstance(leaf, int) and abs(leaf) >= 2**63:
            raise ConfigError(f"{file}: {path} is a number of {len(str(leaf))} digits; it must be below 2**63")
        if isinstance(leaf, str) and not leaf.isprintable() and any("\ud800" <= sign <= "\udfff" for sign in leaf):
            raise ConfigError(f"{file}: {path} is {leaf!a}; half a surrogate pair is no text")
    return value


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is neither an object nor a list, with the way to it; keys count as values too."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"a key of {path or 'the object'}", key
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{number}]")
    else:
        yield path, value


def check_config(config: Mapping[str, Any], file: Path) -> None:
    """Check the keys that this package reads, but for the values of a pruning method, which the method checks.

    Args:
        config: the file's object.
        file: for messages.

    Raises:
        ConfigError: for a value that is not allowed, or a key that looks like a misspelt one of a pruning method.
        UnsupportedModelError: for quantised weights.
    """
    with naming(file):
        for key, check in _CHECKS.items():
            if config.get(key) is not None or (key in config and key in _NEVER_NULL):
                check(key, config[key])
        for key, value in config.items():
            if key.endswith(("_act", "activation")) and value is not None:
                choice(key, value, sorted(ACT2FN))
        _check_outputs(config)
        _check_spelling(config)


def _architectures(name: str, value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ConfigError(f"{name} is {value!r}; it must be a list of class names")


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; it must be true or false")


def _id2label(name: str, value: Any) -> None:
    wanted = 'it must be an object with a text for each output, whose keys are "0", "1" and so on'
    if not isinstance(value, dict) or not value:
        raise ConfigError(f"{name} is {value!r}; {wanted}")
    for number in range(len(value)):
        if str(number) not in value:
            raise ConfigError(f"{name} has the keys {', '.join(value)}; {wanted}: {number} is missing")
    for key, label in value.items():
        if not isinstance(label, str):
            raise ConfigError(f"{name}[{key}] is {label!r}; {wanted}")


def _label2id(name: str, value: Any) -> None:
    if not isinstance(value, dict) or not all(type(number) is int for number in value.values()):
        raise ConfigError(f"{name} is {value!r}; it must be an object with a whole number for each label")


def _no_quantisation(name: str, value: Any) -> None:
    raise UnsupportedModelError(f"{name} is given; quantised weights are not supported, only floating-point ones")


def _no_kernel(name: str, value: Any) -> None:
    """Say no to the name of a repository of kernels, which transformers would download and run."""
    if not isinstance(value, str) or "/" in value:
        raise ConfigError(
            f"{name} is {value!r}; it must be one of transformers' own, such as sdpa: no code is run because a "
            "checkpoint names it"
        )


def _nothing_else(name: str, value: Any) -> None:
    raise ConfigError(f"{name} is {value!r}; it must be left out: weights are read from the folder's *.safetensors")


def _not_chunked(name: str, value: Any) -> None:
    if value != 0 or isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; it must be 0 or left out: packed rows are not cut into chunks")


def _not_as_tuple(name: str, value: Any) -> None:
    if value is not True:
        raise ConfigError(f"{name} is {value!r}; it must be true or left out")


_NEVER_NULL = {
    "chunk_size_feed_forward",
    "return_dict",
    "use_return_dict",
}  # transformers checks others, or takes null for their default
_CHECKS: dict[str, Check] = {
    "architectures": _architectures,
    **dict.fromkeys(("num_hidden_layers", "n_layers"), _LAYERS),
    **dict.fromkeys(
        (
            "hidden_size", "dim", "num_attention_heads", "n_heads", "intermediate_size", "hidden_dim", "embedding_size",
            "num_key_value_heads", "head_dim", "num_hidden_groups", "inner_group_num", "num_labels",
        ),
        _SIZE,
    ),
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), partial(whole_number, low=1, high=10**7)),
    **dict.fromkeys(("type_vocab_size", "pad_token_id"), _COUNT),
    "id2label": _id2label,
    "label2id": _label2id,
    "problem_type": partial(choice, allowed=_PROBLEMS),
    **dict.fromkeys(("dtype", "torch_dtype"), partial(choice, allowed=_FLOATS)),
    **dict.fromkeys(("quant_mode", "is_decoder", "output_attentions", "output_hidden_states"), _boolean),
    "chunk_size_feed_forward": _not_chunked,
    # BERT's relative_key models are gone from transformers, which would take them for absolute ones.
    "position_embedding_type": partial(choice, allowed=("absolute", "rope", "rotary")),
    **dict.fromkeys(("return_dict", "use_return_dict"), _not_as_tuple),
    "reads": partial(choice, allowed=get_args(Reads)),
    "quantization_config": _no_quantisation,
    **dict.fromkeys(("attn_implementation", "_attn_implementation"), _no_kernel),
    "transformers_weights": _nothing_else,
}  # fmt: skip


def _check_outputs(config: Mapping[str, Any]) -> None:
    names, count, pad = (config.get(key) for key in ("id2label", "num_labels", "pad_token_id"))
    if names is not None and count is not None and len(names) != count:
        raise ConfigError(f"num_labels is {count}; id2label names {len(names)} outputs: they must agree")
    vocabulary = config.get("vocab_size")
    if pad is not None and vocabulary is not None and pad >= vocabulary:
        raise ConfigError(f"pad_token_id is {pad}; it must be below vocab_size, {vocabulary}")


def _check_spelling(config: Mapping[str, Any]) -> None:
    """A misspelt key of a pruning method would be ignored, and something else computed than was asked for."""
    own = {_plain(key): key for key in sorted({"reads", *method_keys()})}
    for key in config:
        if key in own.values() or key in _CHECKS:
            continue
        if close := difflib.get_close_matches(_plain(key), own, n=1, cutoff=_CLOSE):
            raise ConfigError(f"{key} is no key that means anything; did you mean {own[close[0]]}?")


def _plain(key: str) -> str:
    return key.lower().replace("_", "").replace("-", "")
