"""A batch, from its forward pass until its rows are taken."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from hf_sketch.examples.attempt import OUT_OF_MEMORY, is_held
from hf_sketch.examples.calls import ModelCall
from hf_sketch.examples.losses import ExampleLosses
from hf_sketch.examples.named_sums import Sums
from hf_sketch.examples.replay import Replay
from hf_sketch.examples.rules.base import Rule
from hf_sketch.examples.rules.shared_inputs import SharedInputs
from hf_sketch.examples.split import ExampleSplit
from hf_sketch.model.accumulator import Accumulator
from hf_sketch.model.gradient_hooks import read_last
from hf_sketch.model.state import RandomState
from hf_sketch.sketches.transforms.precision import without_autocast


@dataclass(frozen=True)
class ExampleBatch:
    """A batch, with the sketched gradients of its examples.

    If the model was called several times for one backward pass, the rows of all calls
    follow one another.

    Args:
        calls: the model's calls, with their inputs and how these divide into examples.
        rows: (b, row_size), row i the sketch of the gradient of losses[i].
        losses: (b,), each example's own loss; NaN where the loss is computed outside of
            the model, and a row is b times the gradient of the example's share of it.
        weights: (b,), the weight with which each example entered the gradient: the sum
            of weights[i] * rows[i] is the sketch of the batch's gradient.
        unowned: whether the loss has a term that no example owns, as the balance of a
            router's experts.
    """

    calls: tuple[ModelCall, ...]
    rows: Tensor
    losses: Tensor
    weights: Tensor
    unowned: bool = False

    @property
    def complete(self) -> bool:
        """Whether it is so: not if a loss has such a term, or may have, being unknown.

        To ask waits for the losses.
        """
        parts = self.losses.split([call.split.size for call in self.calls])
        return not self.unowned and not any(bool(x.isnan().all()) for x in parts)

    @property
    def examples(self) -> ExampleSplit:
        """How the first call's batch divides into examples."""
        return self.calls[0].split

    @property
    def inputs(self) -> Mapping[str, Any]:
        """What the model was called with first."""
        return self.calls[0].inputs


@dataclass(eq=False)
class Batch:
    """All that is known of a call's batch between its forward pass and `take`.

    Args:
        call: the call.
        sums: where contributions go.
        copies_parameters: as they are when their module runs. Later they are in shards
            (FSDP2), or an optimizer has stepped.
        outputs: collects the tensors that are watched; None if nobody wants them.
        phase: how far the batch has come. One that is left in "forward" or "backward"
            was interrupted by an error.
        follows: it is not the first call before its backward pass.
        log_probs: the model's, and where their tokens count: of a loss outside it.
        answers: the model's, if a loss of several calls is to be checked.
        on_gradient: called with the batch as a gradient of its tensors arrives.
        muted: nothing is read of a backward pass that is not training's.
        losses: each example's own loss; None if the model computes no loss.
        scale: the gradient with which the loss entered the backward pass; with a number
            per example where the losses are of `log_probs`.
        failure: what went wrong in a hook, in words: the error itself would keep the
            graph alive. Nothing more is read then, and training goes on.
        called: paths of the modules whose calls gave something that trains.
        seen: paths of all modules with trainable parameters that were called.
        reached: parameters that the backward pass came to.
        random_states: random states before the last call of modules that run again.
        replays: calls to be run again, with the gradients of their outputs.
        unclear: rules of calls whose outputs do not divide into the examples.
        expanded: rules of calls whose output was given to each example.
        blamed: rules that failed, and how; None to raise their errors.
        ends: the nodes of autograd at which the model's outputs were made.
        numbers: outputs that are one number each, as a loss.
        penalised: the loss has a penalty on weights.
        apart: gradients were read in a backward pass of the examples' losses alone.
        shared: finds layers that take the same input.
        rescued: parameters whose gradients come from running the model again.
    """

    call: ModelCall
    sums: Sums
    copies_parameters: bool = False
    outputs: list[Tensor] | None = None
    phase: Literal["new", "forward", "loss", "backward", "done"] = "new"
    follows: bool = False
    log_probs: tuple[Tensor, Tensor] | None = None
    answers: list[Tensor] = field(default_factory=list[Tensor])
    on_gradient: Callable[["Batch"], None] | None = None
    muted: bool = False
    losses: ExampleLosses | None = None
    scale: Tensor | None = None
    failure: str | None = None
    called: set[str] = field(default_factory=set[str])
    seen: set[str] = field(default_factory=set[str])
    reached: set[str] = field(default_factory=set[str])
    random_states: dict[str, RandomState] = field(default_factory=dict)
    replays: list[Replay] = field(default_factory=list[Replay])
    unclear: list[Rule] = field(default_factory=list[Rule])
    expanded: list[Rule] = field(default_factory=list[Rule])
    blamed: dict[Rule, str] | None = None
    ends: list[Any] = field(default_factory=list[Any])
    numbers: list[Tensor] = field(default_factory=list[Tensor])
    penalised: bool = False
    apart: bool = False
    shared: SharedInputs | None = None
    rescued: frozenset[str] = frozenset()

    @property
    def inputs(self) -> Mapping[str, Any]:
        """What the model was called with."""
        return self.call.inputs

    @property
    def split(self) -> ExampleSplit:
        """The examples."""
        return self.call.split

    @property
    def has_own_losses(self) -> bool:
        """Whether the loss is one of the examples' own, which the model computed."""
        return self.losses is not None and self.scale is not None

    @property
    def is_known(self) -> Tensor | None:
        """Whether these are right, (), if only the device knows."""
        return None if self.losses is None else self.losses.known

    @property
    def is_complete(self) -> bool:
        """Whether its forward and backward pass have run."""
        if self.phase == "loss":  # nothing that is watched got a gradient
            return self.losses is None or self.scale is not None
        return self.phase == "done" and (self.scale is not None or not self.apart)

    def watch(
        self, tensor: Tensor, read: Callable[[Tensor], None], rule: Rule | None = None
    ) -> None:
        """Call `read` with the tensor's gradient, once, and let go of it then."""
        readers = [read]

        def hook(gradient: Tensor | None) -> None:
            if gradient is None:  # which DDP passes on to outputs that nobody uses
                return
            self.begin_backward()
            while readers and not self.muted:
                reader = readers.pop()
                with Holding(self, rule), torch.no_grad(), without_autocast():
                    if self.failure is None:
                        reader(gradient)

        if tensor.dim() or tensor.grad_fn is None:
            tensor.register_hook(hook)
        else:  # a loss
            read_last(tensor, hook)
        if self.outputs is not None:
            self.outputs.append(tensor)

    def take_losses(self, losses: Tensor) -> Tensor:
        """Take losses that are the examples' own, and return their sum."""
        ones = torch.ones_like(losses)
        self.losses = ExampleLosses(losses.detach(), ones)
        self.scale = ones.sum() / ones.sum()
        return losses.sum()

    def watch_outputs(self, outputs: Sequence[Tensor], loss: Tensor | None) -> None:
        """Note that gradients arrive at a model's outputs, and with which factor."""

        def arrive(_: Tensor) -> None:
            self.begin_backward()

        self.phase, self.ends = "loss", [output.grad_fn for output in outputs]
        self.numbers = [output for output in outputs if not output.dim()]
        for output in outputs:
            if output.requires_grad:
                output.register_hook(arrive)
        if loss is not None and loss.requires_grad:
            self._watch_scale(loss)

    def _watch_scale(self, loss: Tensor) -> None:
        """Note with which factor the loss enters the backward pass."""

        def keep_scale(gradient: Tensor | None) -> None:
            if not self.muted and gradient is not None:
                self.begin_backward()
                self.scale = gradient.detach().clone()

        read_last(loss, keep_scale)

    def begin_backward(self) -> None:
        """Note that the backward pass runs, and when it ends without an error."""
        if self.muted:
            return
        if self.on_gradient is not None:
            self.on_gradient(self)
        if self.phase == "loss":
            self.phase = "backward"
            # All of which would keep the graph.
            self.ends, self.numbers, self.log_probs = [], [], None
            # There is no public hook for the end of a backward pass.
            variable: Any = torch.autograd.Variable
            variable._execution_engine.queue_callback(self._end_backward)

    def gradients(self) -> Tensor:
        """Return sketches of the gradients that the backward pass has brought.

        Shapes:
            returns (b, row_size)

        Raises:
            MemoryError: memory ran out in a hook.
        """
        if self.failure is not None:
            raise MemoryError(
                "the gradients of the examples did not fit into memory "
                f"({self.failure}): pass layout='grouped', a smaller out_size or "
                "per_device_train_batch_size, or per_example=False."
            )
        assert isinstance(self.sums, Accumulator)
        self.run_again()
        return self.sums.result()

    def read_apart(self, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        """Read the gradients of a part of the loss, before the backward pass."""
        self.phase = "loss"
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        self.apart = True

    def run_again(self) -> None:
        """Add the gradients of the calls that are run again."""
        while self.replays:
            replay = self.replays.pop(0)
            with Holding(self, replay.rule):
                for index, gradients in enumerate(replay.gradients(self.split)):
                    for name, gradient in gradients:
                        if name not in self.rescued or replay.rescues:
                            self.sums.add_example(name, index, gradient)

    def _end_backward(self) -> None:
        self.phase = "done"


class Holding:
    """Notes it if memory runs out within, or a rule fails that is being tried.

    Not a generator, since each hook enters it.

    Args:
        batch: batch whose hook runs.
        rule: the rule, if there is one.
    """

    def __init__(self, batch: Batch, rule: Rule | None = None) -> None:
        self._batch, self._rule = batch, rule

    def __enter__(self) -> None:
        """Change nothing."""

    def __exit__(
        self, _: object, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Note the error; False raises it again."""
        batch, rule = self._batch, self._rule
        if isinstance(error, OUT_OF_MEMORY):
            batch.failure = str(error)
            return True
        if rule is None or batch.blamed is None or not is_held(error):
            return False
        batch.blamed[rule] = f"{type(error).__name__}: {error}"
        return True
