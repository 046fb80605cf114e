"""Events of a training run: one for each logged step and for each validation."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from finetune_assets.reporting.errors import StepFailed
from finetune_assets.reporting.events import Progress, StepProgress, Validation

if TYPE_CHECKING:
    from transformers import TrainerCallback


class Log:
    """Log of a training run: turns the trainer's entries into events, and keeps them for training_log.jsonl.

    Args:
        progress: is called with each event.
        total_tokens: tokens that the whole run will read, prompts included; 0 if a number of steps ends it.
    """

    def __init__(self, progress: Progress, total_tokens: int):
        self.progress = progress
        self.total_tokens = total_tokens
        # without times: two runs of the same inputs must write the same file
        self.entries: list[StepProgress | Validation] = []
        self.losses: list[tuple[int, float]] = []  # (step, loss)
        self.validation_losses: list[tuple[int, float]] = []
        self.tokens = 0
        self.seconds = 0.0
        self._began = time.monotonic()

    def begin(self) -> None:
        """Start the clock."""
        self._began = time.monotonic()

    def step(self, step: int, steps: int, epoch: float, logs: dict[str, Any]) -> None:
        """Log an optimiser step.

        Raises:
            StepFailed: the loss is not finite.
        """
        loss = float(logs["loss"])
        self.tokens, self.seconds = int(logs["num_tokens"]), time.monotonic() - self._began
        if not math.isfinite(loss):
            raise StepFailed(
                f"the loss became {loss} at step {step} of {steps}: the training has diverged",
                "lower train.learning_rate, add train.warmup_steps, or set train.bf16: true instead of fp16",
            )
        entry = StepProgress(
            step=step,
            steps=steps,
            epoch=round(epoch, 4),
            loss=loss,
            learning_rate=float(logs["learning_rate"]),
            tokens=self.tokens,
        )
        if "grad_norm" in logs:
            entry = entry.model_copy(update={"grad_norm": float(logs["grad_norm"])})
        self.entries.append(entry)
        self.losses.append((step, loss))
        done = self.tokens / self.total_tokens if self.total_tokens else step / steps
        left = self.seconds * max(0.0, 1 / done - 1) if done else None
        speed = self.tokens / self.seconds if self.seconds else None
        self.progress(entry.model_copy(update={"tokens_per_second": speed, "seconds_left": left}))

    def validation(self, step: int, epoch: float, loss: float) -> None:
        """Log a validation loss, in nats per learnt token."""
        entry = Validation(step=step, epoch=round(epoch, 4), loss=loss)
        self.entries.append(entry)
        self.validation_losses.append((step, loss))
        self.progress(entry)


def callback(log: Log) -> TrainerCallback:
    """Return a trainer callback that fills `log`."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            log.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= state.max_steps:
                control.should_log = True  # log the last step even if logging_steps skips it

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                log.step(state.global_step, state.max_steps, state.epoch, logs)
            elif logs and "eval_loss" in logs:
                log.validation(state.global_step, state.epoch, float(logs["eval_loss"]))

    return Watch()
