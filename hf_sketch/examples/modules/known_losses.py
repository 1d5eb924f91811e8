"""Kinds of batches whose loss is known, so that no step waits to know it again."""

from collections import deque

import torch
from torch import Tensor

from hf_sketch.examples.calls import ModelCall
from hf_sketch.sketches.transforms.lazy import reads_freely


class KnownLosses:
    """Kinds of batches of which one has shown how their loss adds up over examples.

    On a CPU each batch shows it. On an accelerator Python would wait for that, so the
    device compares later batches of a kind by itself, and what it found is looked at
    once it has arrived. If a loss was another one, the next batch of its kind is waited
    for again.
    """

    def __init__(self) -> None:
        self._kinds: set[object] = set()
        self._awaited: deque[tuple[object, _Arrival]] = deque()

    def has(self, call: ModelCall, loss: Tensor) -> bool:
        """Return whether the device alone may compare the loss of a call."""
        while self._awaited and self._awaited[0][1].is_here:
            kind, arrival = self._awaited.popleft()
            if not arrival.value:
                self._kinds.discard(kind)
        return call.situation in self._kinds and not reads_freely(loss)

    def add(self, call: ModelCall) -> None:
        """Note that the loss of a call is known."""
        self._kinds.add(call.situation)

    def check_later(self, call: ModelCall, known: Tensor) -> None:
        """Look at what the device finds, a truth value (), once it is here."""
        self._awaited.append((call.situation, _Arrival(known)))


class _Arrival:
    """A number on its way from a device to the CPU."""

    def __init__(self, number: Tensor) -> None:
        self._number = number.to("cpu", non_blocking=number.is_cuda)  # to pinned memory
        self._done = torch.cuda.Event() if number.is_cuda else None
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(number.device))

    @property
    def is_here(self) -> bool:
        """Whether Python reads it without waiting."""
        return self._done is None or self._done.query()

    @property
    def value(self) -> bool:
        """What it is."""
        return bool(self._number)
