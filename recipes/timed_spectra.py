"""How long the spectra of a training run take."""

import time
import warnings
from collections.abc import Callable
from typing import Any

from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_sketch.callbacks import HessianSpectrumCallback

# What the callback warns of: here it is not training that must go on.
_FAILURES = "No Hessian spectra|The Hessian's spectrum of step"


class TimedSpectra(TrainerCallback):
    """A HessianSpectrumCallback whose spectra are timed, and the first one needed.

    `seconds` has the time of every step, next to none where no spectrum was due.

    Args:
        callback: takes the spectra.

    Raises:
        UserWarning: at the start of training, the callback cannot take any.
    """

    def __init__(self, callback: HessianSpectrumCallback) -> None:
        self.callback = callback
        self.seconds: dict[int, float] = {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", _FAILURES)
            self._time(self.callback.on_train_begin, args, state, control, **kwargs)
        if state.global_step:  # resumed: that step's spectrum was taken before
            self.seconds.clear()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._time(self.callback.on_step_end, args, state, control, **kwargs)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.callback.on_train_end(args, state, control, **kwargs)

    def _time(
        self,
        event: Callable[..., None],
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        start = time.perf_counter()
        event(args, state, control, **kwargs)
        self.seconds[state.global_step] = time.perf_counter() - start
