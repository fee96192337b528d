"""Parsing and dispatch. A user's mistake is one line on standard error and exit status 2."""

import _thread
import argparse
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

import transformers
from tqdm import tqdm

from token_pruning.errors import TokenPruningError
from token_pruning.lab.cli.commands import (
    add_analyze,
    add_calibrate,
    add_demo,
    add_eval,
    add_export,
    add_predict,
    add_report,
    add_sweep,
    add_train,
)

_PROGRAM = "token-pruning"
_SEVERAL = "--target-flops"


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any) -> None:  # an option is written out, or it is a mistake
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """``token-pruning …``.

    Args:
        argv: the arguments, without the program's name; the process's by default.

    Returns:
        The exit status: 0, 2 for a user's mistake, 130 if interrupted, 143 if terminated, 141 if nobody reads standard
        output any more.
    """
    try:
        _mend_streams()
        with _termination_as_exception(), _no_interrupt_lost():
            try:
                return _carry_out(sys.argv[1:] if argv is None else argv)
            finally:
                if sys.exc_info()[0] in (None, SystemExit):
                    sys.stdout.flush()  # here, where what goes wrong can still be said
    except KeyboardInterrupt as stop:
        status, said = (143, "terminated") if isinstance(stop, _Terminated) else (130, "interrupted")
        notes = "".join(f"; {note}" for note in getattr(stop, "__notes__", ()))
        return _leave(status, f"{said}{notes}")
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        try:
            sys.stdout.flush()
        except OSError as problem:
            _drop_standard_output()
            if isinstance(problem, BrokenPipeError):  # whoever read it has enough
                return _leave(141)
            where = "standard output: "
        return _leave(2, f"{_PROGRAM}: error: {where}{error.strerror or error}")


def paper_main(argv: Sequence[str]) -> int:
    """``python run.py …``: training, or evaluation with ``--eval``. Arguments and result as for :func:`main`."""
    command = "eval" if "--eval" in argv else "train"
    return main([command, *(argument for argument in argv if argument != "--eval")])


def _carry_out(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(_model_first([_dashed(argument) for argument in argv]))
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    transformers.logging.disable_progress_bar()  # the bars of loading and writing weights, not those of training
    try:
        arguments.run(arguments)
    except TokenPruningError as error:
        return _leave(2, f"{_PROGRAM}: error: {error}")
    except ModuleNotFoundError as error:
        extra = "sweep" if error.name == "optuna" else "demo"
        return _leave(2, f"{_PROGRAM}: error: {error.name} is missing; pip install 'token-pruning[{extra}]'")
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM: whatever cleans up after Ctrl-C does so after this."""


@contextmanager
def _termination_as_exception() -> Iterator[None]:
    """Within, SIGTERM ends a command as Ctrl-C does.

    Not where several processes train together: one that waits for another in C would not hear it.
    """

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise _Terminated

    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 and threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _no_interrupt_lost() -> Iterator[None]:
    """Ctrl-C may come while Python calls back from where no exception can rise, such as a weak reference's end.

    There it would be printed and forgotten. It is sent again as soon as that is over.
    """
    before, timers = sys.unraisablehook, []

    def send(number: signal.Signals) -> None:
        if hasattr(signal, "pthread_kill"):  # ends a wait, too
            signal.pthread_kill(threading.main_thread().ident or 0, number)
        else:
            _thread.interrupt_main(number)

    def again(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            before(unraisable)
            return
        number = signal.SIGTERM if issubclass(unraisable.exc_type, _Terminated) else signal.SIGINT
        timer = threading.Timer(0.01, send, [number])
        timer.daemon = True
        timers.append(timer)
        timer.start()

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in timers:
            timer.cancel()


def _mend_streams() -> None:
    """Letters that the terminal cannot show become escapes, and streams that are closed swallow everything."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - for the whole process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop_standard_output() -> None:
    """What is still to be written there would fail again when the process ends."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=_PROGRAM, description="Train, evaluate and use encoders that drop the tokens they do not need."
    )
    commands = parser.add_subparsers(
        required=True,
        metavar="train | calibrate | eval | export | predict | report | analyze | sweep | demo",
        parser_class=_Parser,
    )
    for add in (
        add_train,
        add_calibrate,
        add_eval,
        add_export,
        add_predict,
        add_report,
        add_analyze,
        add_sweep,
        add_demo,
    ):
        add(commands)
    return parser


def _leave(status: int, message: str | None = None) -> int:
    """Say why, on one line. One process of several must not wait for the others, nor they for it."""
    if message is not None:
        with suppress(OSError):
            for bar in list(getattr(tqdm, "_instances", ())):  # else the message stands at the end of a bar
                bar.close()
            print(" ".join(message.split()), file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(status)
    return status


def _model_first(argv: list[str]) -> list[str]:
    """MODEL may stand behind the values of ``--target-flops``, which would take it for one more of them."""
    if _SEVERAL in argv:
        first = place = argv.index(_SEVERAL) + 1
        while place < len(argv) and _is_number(argv[place]):
            place += 1
        if first < place < len(argv) and not argv[place].startswith("-"):
            argv.insert(1, argv.pop(place))
    return argv


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _dashed(argument: str) -> str:
    """The paper's commands write ``--masking_mode``; both spellings mean the same."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument
