"""The study: trials shared by any number of processes through one Optuna storage, killed ones continued.

A trial that was killed is known by its heartbeat, which stops. Whoever sees that first marks the trial as failed and
puts its parameters back into the queue, with its folder, so that training goes on from its last checkpoint. Where the
study's database lies in the output folder, no other process runs trials: what is not finished there was killed.
"""

import datetime
import gc
import json
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
import torch
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
from transformers import TrainerCallback

from token_pruning.budget.calibration import FEWEST_EXAMPLES
from token_pruning.budget.examples import as_batch
from token_pruning.budget.fitting import highest_flops, lowest_flops, prunable_layers
from token_pruning.checkpoint import Checkpoint, read_checkpoint
from token_pruning.errors import ConfigError, TokenPruningError
from token_pruning.families import padding_id
from token_pruning.lab.data import TaskData
from token_pruning.lab.files import STAGING_PREFIX
from token_pruning.lab.sweep.methods import METHODS, Space
from token_pruning.lab.sweep.options import SweepOptions
from token_pruning.lab.sweep.report import Row, TaskResults, describe, write_results
from token_pruning.lab.sweep.rules import Point, hopeless
from token_pruning.lab.training.calibrated import calibrate_checkpoint
from token_pruning.lab.training.evaluate import evaluate_checkpoint
from token_pruning.lab.training.features import hold_out
from token_pruning.lab.training.load import load_split
from token_pruning.lab.training.options import CalibrateOptions, TrainOptions
from token_pruning.lab.training.plan import DataSource, training_examples
from token_pruning.lab.training.run_dir import LOCK_FILE, RUN_FILE, RunDir, held
from token_pruning.lab.training.train import train
from token_pruning.pruners import FixedThreshold
from token_pruning.pruners.summary import SUMMARY_TOKENS
from token_pruning.runtime.prune import prunable

HEARTBEAT_SECONDS = 30
GRACE_SECONDS = 120  # without a heartbeat, after which a trial counts as killed
_NEVER_BEGAN = datetime.timedelta(minutes=10)  # the same for one without any; on other machines' clocks
_POLL_SECONDS = 2.0
_FAILURES_IN_A_ROW = 3
_FIRST_TRIALS_PER_METHOD = 4  # before Optuna's sampler learns from what it sees
_ERROR = "error"  # what a trial failed with; one without was killed
_STEPS = (0.7548777, 0.5698403)  # of Roberts's R2 sequence, which fills a square evenly from its first points on
COMPLETE, PRUNED = _FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
_CLAIMED = (*_FINISHED, TrialState.RUNNING, TrialState.WAITING)


def run_sweep(options: SweepOptions, load_data: DataSource) -> Path:
    """Run trials until the study has as many finished ones as are asked for.

    Args:
        options: what to do.
        load_data: gives the task's examples, from the dense checkpoint.

    Returns:
        The path of ``pareto.md``; beside it lie ``pareto.csv``, ``pareto.png`` and ``trials.csv``.

    Raises:
        TokenPruningError: for every mistake of the user, also if several trials in a row fail.
    """
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    checkpoint = read_checkpoint(options.base.restore)
    if checkpoint.thresholds is not None or checkpoint.config.get("thresholds"):
        raise ConfigError(f"--restore {options.base.restore} is pruned already; a sweep starts from a dense checkpoint")
    # As run.json of a trial has it: the same from wherever the command is given again.
    options = replace(options, base=replace(options.base, restore=str(checkpoint.path.resolve())))
    # Processes share a study by its storage; each has an output folder of its own.
    with held(options.output_dir):
        return _run_sweep(options, checkpoint, load_data(checkpoint))


def _run_sweep(options: SweepOptions, checkpoint: Checkpoint, data: TaskData) -> Path:
    training_examples(data)
    if options.validate_on == "train":
        data = validate_on_training_set(data, options.base.seed)
    try:
        _Sweep(options, checkpoint, data, _open_study(options)).run()
    except KeyboardInterrupt as stop:
        stop.__notes__ = ["the same command continues the study"]
        raise
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        reason = str(getattr(error, "orig", None) or error.__cause__ or error).splitlines()[0]
        raise ConfigError(f"the study's database cannot be read or written: {reason}") from None
    return options.output_dir / "pareto.md"


def validate_on_training_set(data: TaskData, seed: int) -> TaskData:
    """The task with its validation set replaced by a slice of the training set, which loses it.

    Args:
        data: with a training set.
        seed: of the choice of min(1000, 20 %) examples.

    Raises:
        ConfigError: for fewer than five training examples.
    """
    examples = training_examples(data)
    count = min(1000, len(examples) // 5)
    if count < 1:
        raise ConfigError(f"there are {len(examples)} training examples; give 5 or more, or --validate-on dev")
    rest, chosen = hold_out(len(examples), count, seed)
    return TaskData(data.task, examples.select(rest), {"held_out": examples.select(chosen)})


class _Superfluous(Exception):
    """Other processes have claimed all trials that are wanted."""


class _Hopeless(Exception):
    """A finished trial costs no more and is better by more than the margin."""


class _StopHopeless(TrainerCallback):  # type: ignore[misc]
    """Ends a run from the middle of its epochs on, as soon as the rule says so; the last evaluation always counts."""

    def __init__(self, metric: str, is_hopeless: Callable[[Point], bool]) -> None:
        self.metric, self.is_hopeless = metric, is_hopeless

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if 2 * state.global_step >= state.max_steps > state.global_step:
            point = (metrics[f"eval_{self.metric}"], metrics["eval_relative_flops"])
            if self.is_hopeless(point):
                raise _Hopeless(point, state.epoch)


class _Sweep:
    """One process's part in a study."""

    def __init__(self, options: SweepOptions, checkpoint: Checkpoint, data: TaskData, study: Any) -> None:
        self.options, self.checkpoint, self.data, self.study = options, checkpoint, data, study
        self.metric = data.task.best_metric
        self.methods = list(dict.fromkeys(options.methods))
        self.failures: list[TokenPruningError] = []
        self.reported: TaskResults | None = None

    def run(self) -> None:
        """Until there are enough finished trials, here or elsewhere."""
        self._same_settings()
        if self.options.storage is None:
            self._continue_killed()
        self.dense = self._dense()
        self.space = self._space()
        self._report()
        waiting = False
        while (trials := Counter(t.state for t in self._trials()))[COMPLETE] + trials[PRUNED] < self.options.trials:
            self._fail_stale()
            if trials[TrialState.WAITING] or sum(trials[state] for state in _CLAIMED) < self.options.trials:
                waiting = False
                self._one_trial()
                continue
            if not waiting:
                print(f"waiting for {trials[TrialState.RUNNING]} trials that run elsewhere; what was killed is "
                      f"continued after {GRACE_SECONDS} s", flush=True)  # fmt: skip
            waiting = True
            time.sleep(_POLL_SECONDS)
        self._report()
        print(f"{self.options.output_dir / 'pareto.md'}: {self._finished()} trials")

    def _one_trial(self) -> None:
        try:
            self.study.optimize(self._objective, n_trials=1, catch=(_Superfluous, TokenPruningError))
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError) as error:
            # This process was suspended for so long that another one has taken the trial over.
            if not isinstance(error, optuna.exceptions.UpdateFinishedTrialError) and "Cannot tell" not in str(error):
                raise
        gc.collect()
        if len(self.failures) == _FAILURES_IN_A_ROW:
            raise self.failures[-1]
        self._report()

    def _objective(self, trial: Any) -> tuple[float, float]:
        method, place = self._claim(trial)
        name = trial.user_attrs.get("folder") or f"{trial.number:04d}-{method}"
        trial.set_user_attr("folder", name)
        # What is chosen depends on the seed, the trial's number and what is known, not on which process chooses.
        self.study.sampler = _Sampler(self.options.base.seed, trial.number, place, len(self.methods))
        run = METHODS[method](trial, self.space)
        began = time.monotonic()
        epoch = None
        try:
            with _log(self.options.output_dir / "trials" / f"{name}.log"):
                metric, flops = self._run(run, self.options.output_dir / "trials" / name)
        except _Hopeless as stopped:
            (metric, flops), epoch = stopped.args
        except KeyboardInterrupt:
            _requeue(self.study, self._frozen(trial))
            raise
        except TokenPruningError as error:
            trial.set_user_attr(_ERROR, str(error))
            self.failures.append(error)
            print(f"trial {trial.number}: {method}, {describe(_parameters(trial))}: failed: {error}", flush=True)
            raise
        self.failures.clear()
        seconds = time.monotonic() - began
        for key, value in (("metric", metric), ("relative_flops", flops), ("seconds", seconds)):
            trial.set_user_attr(key, value)
        stop = "" if epoch is None else f" after {epoch:g} epochs, stopped"
        print(
            f"trial {trial.number} ({self._finished() + 1} of {self.options.trials}): {method}, "
            f"{describe(_parameters(trial))}: {self.metric} {100 * metric:.2f} at {flops:.3f} of the FLOPs{stop}, "
            f"{seconds:.0f} s",
            flush=True,
        )
        if epoch is not None:
            raise optuna.TrialPruned
        return metric, flops

    def _claim(self, trial: Any) -> tuple[str, int]:
        """The trial's method, that of which the trials before it have the fewest, and how many these are.

        Trials are numbered by the storage, one after the other, so all processes agree on who is superfluous.
        """
        for _ in range(50):  # those before it, if they have just begun, say in a moment what they are
            before = [t for t in self._trials() if t.number < trial.number and t.state in _CLAIMED]
            if all("method" in t.user_attrs for t in before):
                break
            time.sleep(0.1)
        if len(before) >= self.options.trials:
            raise _Superfluous
        counts = Counter(t.user_attrs.get("method") for t in before)
        method = trial.user_attrs.get("method")
        if method is None:
            method = min(self.methods, key=lambda name: counts[name])
            trial.set_user_attr("method", method)
        return str(method), counts[method]

    def _run(self, run: TrainOptions | CalibrateOptions, folder: Path) -> Point:
        """Train or calibrate, or go on where a killed trial stopped."""
        if isinstance(run, CalibrateOptions):  # there is nothing to go on with
            base = replace(run.base, output_dir=str(folder), overwrite_output_dir=True)
            calibrate_checkpoint(replace(run, base=base), lambda _: self.data)
        else:
            options, run_dir = replace(run, output_dir=str(folder)), RunDir(folder)
            if not run_dir.finished(options.identity()):
                try:
                    run_dir.check(options.identity(), overwrite=False)
                except ConfigError:  # a trial of another study
                    options = replace(options, overwrite_output_dir=True)
                stop = _StopHopeless(self.metric, self._is_hopeless)
                try:
                    train(options, lambda _: self.data, callbacks=[stop])
                except _Hopeless:
                    _clean(folder, keep_model=False)
                    raise
        point = self._evaluation(folder)
        _clean(folder, keep_model=self.options.keep_checkpoints)
        return point

    def _space(self) -> Space:
        """What bounds the choices: the least that budgets can reach is that of some training examples."""
        examples, base = self.data.train, self.options.base
        assert examples is not None
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(base.seed))
        chosen = examples.select(order[: CalibrateOptions.examples].tolist())
        model, _, features = load_split(self.checkpoint, self.data.task, chosen, base.max_length)
        layers = prunable_layers(model)
        if len(features) < FEWEST_EXAMPLES:
            raise ConfigError(f"there are {len(features)} training examples; a sweep needs {FEWEST_EXAMPLES} or more")
        batch = as_batch(features, padding_id(model.config))
        lowest = {}
        for summary_tokens in SUMMARY_TOKENS:
            pruner = FixedThreshold(final_token_threshold=0, summary_tokens=summary_tokens)  # type: ignore[arg-type]
            with prunable(model, pruner):
                lowest[summary_tokens] = lowest_flops(model, batch)
        with prunable(model):
            highest = highest_flops(model, batch)
        return Space(self.options.base, layers, lowest, highest, self.options.summary_tokens)

    def _dense(self) -> float:
        """The dense model's metric; measured once in a study."""
        if "dense" not in self.study.user_attrs:
            folder = self.options.output_dir / "dense"
            options = replace(self.options.base, masking_mode="none", pruning=None, output_dir=str(folder))
            with _log(folder.with_suffix(".log")):
                evaluate_checkpoint(options, lambda _: self.data)
            self.study.set_user_attr("dense", self._evaluation(folder)[0])
        dense = float(self.study.user_attrs["dense"])
        print(f"dense: {self.metric} {100 * dense:.2f}", flush=True)
        return dense

    def _same_settings(self) -> None:
        """Trials of one study can be compared.

        Raises:
            ConfigError: if the study was begun with other options.
        """
        base, train_set = self.options.base, self.data.train
        assert train_set is not None
        settings = {
            "--task": self.data.task.name,
            "--restore (its sha256)": self.checkpoint.sha256(),
            "--validate-on": self.options.validate_on,
            "--summary-tokens": self.options.summary_tokens,
            "--epoch": base.epochs,
            "--lr": base.lr,
            "--bs": base.batch_size,
            "--max-length": base.max_length,
            "--bf16": base.bf16,
            "--seed": base.seed,
            "number of training examples": len(train_set),
            "number of validation examples": len(next(iter(self.data.validation.values()))),
        }
        found = self.study.user_attrs.get("settings")
        if found is None:
            self.study.set_user_attr("settings", settings)
            return
        for key, value in settings.items():
            if found.get(key) != value:
                raise ConfigError(
                    f"study {self.study.study_name!r} was begun with {key} {found.get(key)!r}, not {value!r}; use the "
                    "same options to continue it, or another --study-name and --output-dir"
                )

    def _is_hopeless(self, point: Point) -> bool:
        finished = [tuple(t.values) for t in self._trials() if t.state == COMPLETE]
        return hopeless(point, finished, self.options.prune_margin / 100)

    def _evaluation(self, folder: Path) -> Point:
        found = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))
        return float(found["metrics"][self.metric]), float(found["relative_flops"])

    def _fail_stale(self) -> None:
        """Fail what was killed; :func:`_requeue` puts it back into the queue."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(self.study)
        for trial in self._trials():  # killed between being numbered and the first heartbeat
            unknown = trial.state == TrialState.RUNNING and "method" not in trial.user_attrs
            if unknown and datetime.datetime.now() - trial.datetime_start > _NEVER_BEGAN:
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _continue_killed(self) -> None:
        """Put what was killed, at whatever moment, back into the queue; no other process is there."""
        for trial in self._trials():
            running = trial.state == TrialState.RUNNING
            if running or (trial.state == TrialState.FAIL and _ERROR not in trial.user_attrs):
                _requeue(self.study, trial)
            if running:
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _trials(self) -> list[Any]:
        return list(self.study.get_trials(deepcopy=False))

    def _frozen(self, trial: Any) -> Any:
        return next(t for t in self._trials() if t.number == trial.number)

    def _finished(self) -> int:
        return sum(trial.state in _FINISHED for trial in self._trials())

    def _report(self) -> None:
        measured = "the validation set" if self.options.validate_on == "dev" else (
            "a slice of the training set that no trial was trained on (but the dense model, unless its own training "
            "left it out)"
        )  # fmt: skip
        trials = [trial for trial in self._trials() if "method" in trial.user_attrs]
        latest = {trial.user_attrs.get("folder"): trial.number for trial in trials}
        rows = [_row(trial, latest[trial.user_attrs.get("folder")]) for trial in trials]
        note = f"{self.metric} in percent on {measured}."
        results = TaskResults(self.options.base.task, self.metric, self.dense, rows, note)
        if results != self.reported:
            write_results(self.options.output_dir, results)
            self.reported = results


_STATES = {COMPLETE: "complete", PRUNED: "pruned", TrialState.FAIL: "failed"}


def _row(trial: Any, latest: int) -> Row:
    """A trial for the report; ``latest`` is the number of the last one in its folder, which went on with it."""
    attributes = trial.user_attrs
    metric, flops = trial.values or (attributes.get("metric"), attributes.get("relative_flops"))
    state = _STATES.get(trial.state, "running")
    if state == "failed" and "folder" in attributes and latest > trial.number:
        state = "continued"
    return Row(trial.number, attributes["method"], state, metric, flops, attributes.get("seconds"), _parameters(trial))


def _parameters(trial: Any) -> dict[str, Any]:
    """By names without the method's."""
    return {name.partition(".")[2]: value for name, value in trial.params.items()}


class _Sampler(optuna.samplers.TPESampler):  # type: ignore[misc]
    """Optuna's for one trial; a method's first trials have their numbers spread evenly instead of at random."""

    def __init__(self, seed: int, number: int, place: int, methods: int) -> None:
        """The trial's number in the study, and its place among those of its method."""
        super().__init__(seed=seed + number, n_startup_trials=_FIRST_TRIALS_PER_METHOD * methods, multivariate=False)
        self.seed, self.place, self.steps = seed, place, iter(_STEPS)

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        """A value for one parameter."""
        first = self.place < _FIRST_TRIALS_PER_METHOD and isinstance(param_distribution, FloatDistribution)
        step = next(self.steps, None) if first else None
        if step is None:
            return super().sample_independent(study, trial, param_name, param_distribution)
        low, high, log = param_distribution.low, param_distribution.high, param_distribution.log
        part = (random.Random(f"{self.seed} {param_name}").random() + self.place * step) % 1
        return low * (high / low) ** part if log else low + part * (high - low)


def _requeue(study: Any, trial: Any) -> None:
    """Put a killed trial back into the queue, once, with its method, its parameters and its folder."""
    kept = {key: trial.user_attrs[key] for key in ("method", "folder") if key in trial.user_attrs}
    trials = study.get_trials(deepcopy=False)
    same = [t.number for t in trials if t.user_attrs.get("folder") == kept.get("folder")]
    if "folder" in kept and max(same) == trial.number:  # else nothing was begun, or another trial goes on with it
        study.add_trial(
            optuna.create_trial(
                state=TrialState.WAITING, params=trial.params, distributions=trial.distributions, user_attrs=kept
            )
        )


def _open_study(options: SweepOptions) -> Any:
    """The study, made if it is not there.

    Raises:
        ConfigError: if the storage cannot be opened.
    """
    url = options.storage
    if url is None:
        file = (options.output_dir / "study.db").resolve()
        url = str(sqlalchemy.URL.create("sqlite", database=str(file))).replace("{", "{{").replace("}", "}}")
    timeout = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    for attempt in range(10):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats
                storage = optuna.storages.RDBStorage(
                    url,
                    engine_kwargs=timeout,
                    heartbeat_interval=HEARTBEAT_SECONDS,
                    grace_period=GRACE_SECONDS,
                    heartbeat_stale_trial_callback=_requeue,
                )
            return optuna.create_study(
                storage=storage,
                sampler=optuna.samplers.RandomSampler(),  # until there is a trial; it has its own
                study_name=options.study_name or options.base.task,
                directions=["maximize", "minimize"],
                load_if_exists=True,
            )
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, ValueError) as error:
            # Two processes that make one new database get in each other's way.
            if attempt == 9 or not any(word in str(error) for word in ("already exists", "locked", "UNIQUE")):
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise ConfigError(
                    f"--storage {_shown(url)} cannot be opened: {reason}; it must be the SQLAlchemy URL of a database "
                    "(sqlite:///FILE, mysql://…, postgresql://…)"
                ) from None
            time.sleep(0.3)
    raise AssertionError


def _shown(url: str) -> str:
    """The URL without its password."""
    try:
        return str(sqlalchemy.make_url(url).render_as_string(hide_password=True))
    except sqlalchemy.exc.ArgumentError:
        return repr(url)


def _clean(folder: Path, *, keep_model: bool) -> None:
    """Leave the figures, and the model if it is wanted."""
    for entry in list(folder.iterdir()):
        scratch = entry.is_dir() and entry.name.startswith(("checkpoint-", "runs", STAGING_PREFIX))
        if entry.name in ("eval_results.json", RUN_FILE, LOCK_FILE) or (keep_model and not scratch):
            continue
        RunDir(folder).remove(entry) if entry.is_dir() else entry.unlink()


@contextmanager
def _log(file: Path) -> Iterator[None]:
    """What is printed goes to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as log, redirect_stdout(log):
        yield
