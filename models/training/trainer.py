"""The loop of every training with torch: a `Trainer` runs it over an `Objective`, which says what is learnt.

Every draw follows from the seed and the step, so a training that was killed and resumed from its checkpoint ends, on a
CPU, with the same weights to the last bit.
"""

import abc
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from diptych.models.errors import ModelError
from diptych.models.training.checkpoint import Checkpoint, Checkpoints, flatten_optimizer, restore_optimizer
from diptych.models.training.data import History, OnProgress, Progress
from diptych.models.training.options import NetworkTraining

_CHECKPOINT_S = 120.0
_MAX_GRADIENT_NORM = 5.0
# Reading a loss makes a GPU wait, so losses there are checked only every so many steps.
_CHECK_STEPS = 20

BatchT = TypeVar("BatchT")

Metrics = Mapping[str, Tensor | float]
"""Scalars by name; tensors are on the device of the training."""


class Diverged(Exception):
    """A training that cannot recover; the message says why."""


class Phase(NamedTuple):
    """A part of a training with an end of its own.

    Attributes:
        epochs: The most epochs of the phase.
        patience: The number of epochs without a better rank that ends the phase early.
    """

    epochs: int
    patience: float = math.inf


class Validation(NamedTuple):
    """The result of validating the averaged weights after an epoch.

    Attributes:
        metrics: The epoch's metrics.
        rank: What weights are compared by, the most important number first; greater is better.
        always_kept: Whether these weights replace the best ones whatever the rank.
    """

    metrics: Mapping[str, float]
    rank: list[float]
    always_kept: bool = False


class Objective(abc.ABC, Generic[BatchT]):
    """Networks and the way they learn.

    Attributes:
        network: The module with all weights that are trained.
        averaged: The part of `network` of which a moving average is kept, validated and saved.
        optimizers: The optimizers by their name in a checkpoint.
        batch_size: The rows of a full batch.
        num_rows: The rows of an epoch.
        num_validation: The rows of the validation split.
        phases: The phases of the training, in order.
        phase: The index of the current phase; the trainer sets it.
    """

    network: nn.Module
    averaged: nn.Module
    optimizers: Mapping[str, torch.optim.Optimizer]
    batch_size: int
    num_rows: int
    num_validation: int
    phases: list[Phase]
    phase: int = 0

    @property
    def num_steps(self) -> int:
        """The number of steps of an epoch."""
        return math.ceil(self.num_rows / self.batch_size)

    @property
    @abc.abstractmethod
    def learning_rates(self) -> Mapping[str, float]:
        """The learning rates of the current phase by the name of their option."""

    @abc.abstractmethod
    def batches(self, epoch: int, first: int) -> Iterator[BatchT]:
        """Yields the batches of an epoch from the ordinal `first` on."""

    @abc.abstractmethod
    def lr_scale(self, step: int) -> float:
        """Returns the factor of the highest learning rates at a step."""

    @abc.abstractmethod
    def step(self, batch: BatchT, step: int) -> Metrics:
        """Learns from a batch; torch's seed decides every draw.

        Args:
            batch: A batch from `batches`.
            step: The ordinal of the step in the whole training.

        Raises:
            Diverged: The training cannot recover.
        """

    @abc.abstractmethod
    def validate(self, epoch: int, on_rows: Callable[[int], None]) -> Validation:
        """Validates the weights in `averaged`.

        Args:
            epoch: The ordinal of the epoch.
            on_rows: Receives the number of rows done so far.
        """

    def loss(self, metrics: Metrics) -> Tensor | float | None:
        """Returns the loss among the metrics of a step, or None."""
        return next((value for name, value in metrics.items() if name.endswith("loss")), None)

    def check(self, history: History) -> None:
        """Checks the epochs so far.

        Raises:
            Diverged: The last of them show that the training cannot recover.
        """

    def set_training(self, training: bool) -> None:
        """Puts the networks into training or evaluation mode."""
        self.network.train(training)


@dataclasses.dataclass
class TrainingState:
    """All that a training resumes from, beside the tensors.

    Attributes:
        step: The number of steps done.
        phase: The index of the current phase.
        phase_start: The epoch in which the phase began.
        sums: The sums of the current epoch's metrics.
        best: The rank of the best weights so far; empty before the first epoch ends.
        best_epoch: The epoch of these weights, from 0.
        seconds: The time spent.
        history: The metrics of the epochs so far.
    """

    step: int = 0
    phase: int = 0
    phase_start: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    best: list[float] = dataclasses.field(default_factory=list)
    best_epoch: int = -1
    seconds: float = 0.0
    history: History = dataclasses.field(default_factory=list)


class Trainer(Generic[BatchT]):
    """Runs a training with checkpoints, a moving average of the weights, and the choice of the best epoch.

    Args:
        objective: The networks and what they learn.
        options: The options that all trainings share.
        device: The device that the networks are on.
        on_progress: Receives the progress.
    """

    def __init__(
        self,
        objective: Objective[BatchT],
        options: NetworkTraining,
        device: torch.device,
        on_progress: OnProgress,
    ) -> None:
        self._objective, self._options, self._device = objective, options, device
        self._on_progress = on_progress
        self._state = TrainingState()
        self._sums: dict[str, Tensor | float] = {}
        self._ema = self._copy_averaged()
        self._best = dict(self._ema)

    def run(self, folder: Path) -> History:
        """Trains to the end, or resumes from the checkpoint in a folder; leaves the best weights in the objective.

        Returns:
            The metrics by epoch.

        Raises:
            ModelError: The training diverged, or the checkpoint cannot be read or written.
        """
        checkpoints = Checkpoints(folder)
        if checkpoint := checkpoints.latest():
            self._restore(checkpoint, folder)
        with _threads(self._options.threads):
            try:
                self._train(checkpoints)
            except Diverged as error:
                raise self._diverged(error) from error
        self._load_averaged(self._best)
        self._objective.set_training(False)
        return self._state.history

    def _train(self, checkpoints: Checkpoints) -> None:
        state, objective = self._state, self._objective
        start = last_saved = time.monotonic() - state.seconds
        while not self._is_over():
            epoch, first = divmod(state.step, objective.num_steps)
            objective.set_training(True)
            for batch in objective.batches(epoch, first):
                self._update(batch)
                self._report_step(epoch)
                if time.monotonic() - last_saved > _CHECKPOINT_S and state.step % objective.num_steps:
                    state.seconds = time.monotonic() - start
                    self._save(checkpoints)
                    last_saved = time.monotonic()
            state.seconds = time.monotonic() - start
            self._validate(epoch)
            self._save(checkpoints)
            last_saved = time.monotonic()

    def _is_over(self) -> bool:
        """Tells whether no step is left; where a phase has ended, begins the next one."""
        state, phases = self._state, self._objective.phases
        epoch, first = divmod(state.step, self._objective.num_steps)
        if first:
            return False
        while True:
            phase = phases[state.phase]
            waited = epoch - 1 - state.best_epoch if epoch else 0
            if epoch < state.phase_start + phase.epochs and waited < phase.patience:
                return False
            if state.phase + 1 == len(phases):
                return True
            self._begin_phase(state.phase + 1, epoch)

    def _begin_phase(self, phase: int, epoch: int) -> None:
        """Continues from the best weights so far, with optimizers that have seen nothing."""
        self._objective.phase = self._state.phase = phase
        self._state.phase_start = epoch
        self._load_averaged(self._best)
        self._ema = {name: value.clone() for name, value in self._best.items()}
        for optimizer in self._objective.optimizers.values():
            optimizer.state.clear()

    def _update(self, batch: BatchT) -> None:
        state, objective = self._state, self._objective
        step = state.step
        torch.manual_seed(self._options.seed * 1_000_003 + step)
        lr_scale = objective.lr_scale(step)
        for optimizer in objective.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("peak", group["lr"]) * lr_scale
        metrics = objective.step(batch, step)
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        state.step += 1
        self._update_ema(step - state.phase_start * objective.num_steps)
        if step % _CHECK_STEPS == 0 or self._device.type == "cpu":
            _check_finite({name: float(value) for name, value in metrics.items() if name.endswith("loss")})

    def _update_ema(self, age: int) -> None:
        """Moves the average towards the weights of now; a young average moves faster."""
        decay = min(self._options.ema, (1 + age) / (10 + age))
        with torch.no_grad():
            for name, value in self._objective.averaged.state_dict().items():
                if value.is_floating_point():
                    self._ema[name].lerp_(value, 1 - decay)
                else:
                    self._ema[name].copy_(value)

    def _validate(self, epoch: int) -> None:
        """Validates the averaged weights, and keeps them where they are the best so far."""
        state, objective = self._state, self._objective
        means = {name: float(value) / objective.num_steps for name, value in self._sums.items()}
        self._sums = {}
        current = self._copy_averaged()
        self._load_averaged(self._ema)
        objective.set_training(False)
        validation = objective.validate(epoch, lambda done: self._report_validation(epoch, done))
        entry = {"epoch": epoch + 1, **means, **validation.metrics, "seconds": round(state.seconds, 1)}
        _check_finite(entry)
        if validation.always_kept or validation.rank > state.best:
            state.best, state.best_epoch = validation.rank, epoch
            self._best = {name: value.clone() for name, value in self._ema.items()}
        state.history.append(entry)
        self._load_averaged(current)
        num_rows = objective.num_validation
        self._on_progress(Progress("validating", epoch, num_rows, num_rows, entry=entry))
        objective.check(state.history)

    def _report_step(self, epoch: int) -> None:
        objective = self._objective
        num_steps = self._state.step - epoch * objective.num_steps
        done = min(num_steps * objective.batch_size, objective.num_rows)
        loss = objective.loss(self._sums)
        if isinstance(loss, Tensor) and self._device.type != "cpu":
            loss = None
        mean = None if loss is None else float(loss) / max(1, num_steps)
        self._on_progress(Progress("training", epoch, done, objective.num_rows, mean))

    def _report_validation(self, epoch: int, done: int) -> None:
        num_rows = self._objective.num_validation
        # The last report is made with the metrics, once there are any.
        if done < num_rows:
            self._on_progress(Progress("validating", epoch, done, num_rows))

    def _diverged(self, error: Diverged) -> ModelError:
        rates = self._objective.learning_rates
        remedy = " or ".join(f"`{name}` (it is {rate})" for name, rate in rates.items())
        return ModelError(
            f"the training diverged: {error} at step {self._state.step}. Lower {remedy}, and start anew with "
            "`overwrite`."
        )

    def _copy_averaged(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self._objective.averaged.state_dict().items()}

    def _load_averaged(self, values: Mapping[str, Tensor]) -> None:
        self._objective.averaged.load_state_dict(values)

    def _save(self, checkpoints: Checkpoints) -> None:
        self._state.sums = {name: float(value) for name, value in self._sums.items()}
        state: dict[str, object] = {"training": dataclasses.asdict(self._state)}
        tensors: dict[str, Tensor] = {}
        for name, optimizer in self._objective.optimizers.items():
            optimizer_tensors, optimizer_state = flatten_optimizer(optimizer, name)
            tensors |= optimizer_tensors
            state |= optimizer_state
        weights = {"now": self._objective.network.state_dict(), "average": self._ema, "best": self._best}
        for prefix, values in weights.items():
            tensors |= {f"{prefix}.{name}": value for name, value in values.items()}
        checkpoints.save(self._state.step, tensors, state)

    def _restore(self, checkpoint: Checkpoint, folder: Path) -> None:
        def values(prefix: str) -> dict[str, Tensor]:
            start = f"{prefix}."
            tensors = {name: value for name, value in checkpoint.tensors.items() if name.startswith(start)}
            return {name.removeprefix(start): value.to(self._device) for name, value in tensors.items()}

        try:
            self._state = TrainingState(**checkpoint.state["training"])
        except (KeyError, TypeError) as error:
            raise ModelError(
                f"the checkpoint in {folder} was written by another version of Diptych. Continue with that version, "
                "or start anew with `overwrite`."
            ) from error
        for name, optimizer in self._objective.optimizers.items():
            restore_optimizer(optimizer, checkpoint.tensors, checkpoint.state, name)
        self._objective.phase = self._state.phase
        self._sums = dict(self._state.sums)
        self._ema, self._best = values("average"), values("best")
        self._objective.network.load_state_dict(values("now"))


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """Lets torch compute with so many CPU threads while the body runs; 0 changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_finite(metrics: Mapping[str, float]) -> None:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise Diverged(f"the {name.replace('_', ' ')} is {value}")


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    """Makes a step down a loss's gradient, whose norm is clipped; returns the norm before."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm: Tensor = torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRADIENT_NORM)
    optimizer.step()
    return norm


def warm_up(step: int, num_steps: int) -> float:
    """Returns a learning-rate scale that rises from nearly 0 to 1 in a number of steps."""
    return min(1.0, (step + 1) / num_steps)


def cosine(step: int, total: int) -> float:
    """Returns a learning-rate scale that falls from 1 to 0 along a cosine (Loshchilov and Hutter 2017)."""
    return 0.5 * (1 + math.cos(math.pi * step / total))
