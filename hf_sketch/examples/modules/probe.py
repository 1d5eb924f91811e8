"""Finding out, before rows are recorded, how the gradients of each module are read."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_sketch.examples.calls import ModelCall
from hf_sketch.examples.losses import knows_loss
from hf_sketch.examples.modules.loss_forms import EXAMPLES, loss_weights
from hf_sketch.examples.modules.passes import Passes, answers_in
from hf_sketch.examples.named_sums import NamedSums
from hf_sketch.examples.rounding import agree, autocast_dtype, tolerance
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.sketches.operator import accumulation_dtype

_SMALL = 1e-3  # of the largest norm: less has no direction to compare


@dataclass(frozen=True)
class Reference:
    """A few examples' gradients of a fixed function of the model's answers.

    Args:
        call: the call.
        answers: the model's, detached.
        probes: the function is their product with the answers.
        gradients: gradients of each reached parameter, by name, one row per example, or
            its sketch.
        called: paths of the modules that were called.
        examples: number of examples.
        dtype: the precision in which the model computes.
        knows_loss: whether the model's loss is of a known form.
    """

    call: ModelCall
    answers: list[Tensor]
    probes: list[Tensor]
    gradients: NamedSums
    called: frozenset[str]
    examples: int
    dtype: torch.dtype
    knows_loss: bool

    @property
    def is_of_loss(self) -> bool:
        """Whether the model answers with nothing but a loss."""
        return not self.answers[0].dim()

    def nonzero(self) -> dict[str, bool]:
        """Return of which parameters any example has a gradient that is not zero."""
        gradients = self.gradients
        return {name: bool(gradients.of(name).any()) for name in gradients.names}

    def differing(self, sums: NamedSums) -> dict[str, float]:
        """Return by how much parameters' gradients differ, where it is too much."""
        norms: dict[str, Tensor] = {}
        distances: dict[str, Tensor] = {}
        for name in self.gradients.names | sums.names:
            expected = self.gradients.of(name)[: self.examples]
            got = sums.of(name)[: self.examples]
            norms[name] = torch.linalg.vector_norm(expected, dim=1)
            distances[name] = torch.linalg.vector_norm(got - expected, dim=1)
        largest = torch.stack(list(norms.values())).max(dim=0).values
        errors = {
            name: float(_relative(distances[name], norm, largest).max())
            for name, norm in norms.items()
        }
        largest_error = tolerance(self.dtype, "row")
        return {n: e for n, e in errors.items() if not e <= largest_error}


def _relative(distance: Tensor, norm: Tensor, largest: Tensor) -> Tensor:
    """Return distances in parts of a norm, or of a part of the largest one."""
    # An example without a gradient, as one without the tokens that train, fits.
    return (distance / norm.clamp(min=_SMALL * largest)).where(distance > 0, 0.0)


def reference_of(
    passes: Passes, call: ModelCall, model_sketch: ModelSketch
) -> Reference | None:
    """Compute the gradients, with a backward pass per example.

    Returns:
        None if the model answers with nothing that divides into the examples.

    Raises:
        ValueError: it answers with a loss alone, which is no sum over the examples.
    """
    called: set[str] = set()
    first = next(iter(passes.parameters.values()))
    computed: list[torch.dtype] = []
    with ExitStack() as hooks:
        for path, module in passes.model.named_modules():
            note = partial(_note, called, path, computed, first.device)
            hooks.callback(module.register_forward_pre_hook(note).remove)
        output = passes.forward(call)
    answers = answers_in(output, call.split)
    if not answers:
        return None
    if not answers[0].dim() and call.split.size > EXAMPLES:
        few = call.part(0, EXAMPLES)
        return reference_of(passes, few, model_sketch)
    like = torch.empty(
        call.split.size,
        0,
        dtype=accumulation_dtype(first.dtype),
        device=first.device,
    )
    sums = NamedSums(model_sketch, like)
    probes = [_probe_of(answer) for answer in answers]
    # Where rows are of other examples than it seems, only some may show it.
    uneven, size = call.split.is_uneven, call.split.size
    examples = size if uneven else min(EXAMPLES, size)
    kept = [answer.detach() for answer in answers]
    dtype = next(iter(computed), passes.dtype)
    known = knows_loss(passes.model, output, call)
    reference = Reference(
        call, kept, probes, sums, frozenset(called), examples, dtype, known
    )
    weights = torch.ones(call.split.size)
    if reference.is_of_loss:
        weights = loss_weights(passes, call, model_sketch, dtype)
    _read_examples(passes, reference, answers, weights)
    return reference


def _read_examples(
    passes: Passes, reference: Reference, answers: list[Tensor], weights: Tensor
) -> None:
    """Add the gradients of each example."""
    call, sums = reference.call, reference.gradients
    for index in range(reference.examples):

        def add(name: str, gradient: Tensor, index: int = index) -> None:
            sums.add_example(name, index, float(weights[index]) * gradient)

        if reference.is_of_loss:
            passes.of_loss(call.part(index, 1), add)
            continue
        if index and passes.graphs_serve_once:
            answers = answers_in(passes.forward(call), call.split)
        masked = [call.split.mask(probe, index) for probe in reference.probes]
        passes.backward(answers, add, masked)


def same_answers(
    got: list[Tensor], expected: list[Tensor], of: Literal["rule", "output"] = "output"
) -> bool:
    """Return whether answers are equal up to rounding; see `agree`."""
    return len(got) == len(expected) and all(
        agree(a, b, of) for a, b in zip(got, expected, strict=True)
    )


def _probe_of(answer: Tensor) -> Tensor:
    """Return fixed numbers of the answer's shape that differ for each example."""
    count = torch.arange(answer.numel(), device=answer.device, dtype=torch.float32)
    if not answer.dim():
        return torch.ones_like(answer)
    probe = (1.7 * count).cos().view(answer.shape)
    return (probe / max(1, answer[0].numel()) ** 0.5).to(answer.dtype)


def _note(
    called: set[str],
    path: str,
    computed: list[torch.dtype],
    device: torch.device,
    module: nn.Module,
    args: Any,
) -> None:
    """Note that a module is called, and the precision in which it computes."""
    called.add(path)
    if (dtype := autocast_dtype(device)) is not None:
        computed[:] = [dtype]
