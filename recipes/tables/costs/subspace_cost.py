"""What a step in a subspace costs beside one of full fine-tuning."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import HfArgumentParser, PreTrainedModel

from hf_sketch import SubspaceConfig
from hf_sketch.recipes.placement import device
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.measure import peak_extra_bytes, spread, timed
from hf_sketch.recipes.tables.models.language_model import random_language_model

Step = Callable[[], Any]


@dataclass
class SubspaceCostArguments(ReportArguments):
    """Seconds and memory of a step with AdamW: all parameters, or a subspace's."""

    model_type: str = field(
        default="gpt2", metadata={"help": "Default configuration with random weights."}
    )
    operators: str = field(
        default="affd,srht,grouped,afjl,qk",
        metadata={"help": "Comma-separated; grouped is srht in this layout."},
    )
    dim: int = field(default=2**13, metadata={"help": "Dimensions of the subspace."})
    batch_size: int = field(default=8, metadata={"help": "Sequences in a batch."})
    length: int = field(default=128, metadata={"help": "Tokens in each."})
    rounds: int = field(default=5, metadata={"help": "Rounds, after one not counted."})
    tiny: bool = field(
        default=False, metadata={"help": "A small model and one round, as a check."}
    )


def step_of(model: torch.nn.Module, ids: Tensor) -> tuple[Step, int]:
    """A training step, and the bytes that are held between steps."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=True)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()  # theta0 is copied in the second one
    held = [*model.parameters(), *model.buffers()]
    held += [t for s in optimizer.state.values() for t in s.values()]
    return step, sum(tensor.nbytes for tensor in held if torch.is_tensor(tensor))


def activation_bytes(model: PreTrainedModel, ids: Tensor) -> int:
    """The peak of a step that leaves out the gradients of parameters.

    What the forward pass keeps for them is there, and all gradients of activations.
    """
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()

    def step() -> None:
        loss = model(inputs_embeds=inputs, labels=ids).loss
        torch.autograd.grad(loss, inputs)

    return peak_extra_bytes(step)


def ratios_of(ours: Sequence[float], full: Sequence[float]) -> dict[str, float]:
    """Our seconds in those of full fine-tuning, round by round."""
    ratios = [a / b for a, b in zip(ours, full, strict=True)]
    return {
        "ratio_to_full": median(ratios),
        "least_ratio": min(ratios),
        "greatest_ratio": max(ratios),
    }


def measure(arguments: SubspaceCostArguments) -> dict[str, dict[str, float]]:
    """Measure all ways to train, each beside full fine-tuning, and save each."""
    sizes = (2, 16) if arguments.tiny else (arguments.batch_size, arguments.length)
    dim = 64 if arguments.tiny else arguments.dim
    base = random_language_model(arguments.model_type, arguments.tiny).train()
    size = sum(p.nbytes for p in base.parameters())
    ids = torch.randint(0, base.config.vocab_size, sizes).to(device())
    kept = activation_bytes(base, ids)
    results: dict[str, dict[str, float]] = {}
    report = arguments.output_dir, "subspace_cost", arguments, results
    for name in arguments.operators.split(","):
        for on_disk in (False, True):
            config = SubspaceConfig(
                dim=dim,
                operator="srht" if name == "grouped" else name,
                layout="grouped" if name == "grouped" else "blocked",
                base_on_disk=on_disk,
            )
            full = random_language_model(arguments.model_type, arguments.tiny).train()
            model = get_peft_model(
                random_language_model(arguments.model_type, arguments.tiny), config
            ).train()
            full_step, full_held = step_of(full, ids)
            step, held = step_of(model, ids)
            held += 0 if on_disk else size
            rounds = 1 if arguments.tiny else arguments.rounds
            seconds = timed({"full": full_step, "ours": step}, rounds)
            results[name + (" on disk" if on_disk else "")] = {
                **spread(seconds["ours"]),
                **ratios_of(seconds["ours"], seconds["full"]),
                "peak_bytes": held + peak_extra_bytes(step),
                "full_peak_bytes": full_held + peak_extra_bytes(full_step),
                "full_median_seconds": median(seconds["full"]),
                "model_bytes": size,
                "activation_bytes": kept,
            }
            print("saved", save_report(*report))
            del full, model, full_step, step
            gc.collect()
    return results


def run_subspace_cost(arguments: SubspaceCostArguments) -> dict[str, dict[str, float]]:
    """Measure and save, then print."""
    results = measure(arguments)
    print(
        "ratio to full fine-tuning: median (least..greatest); peak MiB; beside full "
        "fine-tuning's; beyond activations, in sizes of the model"
    )
    for name, cost in results.items():
        beyond = cost["peak_bytes"] - cost["activation_bytes"]
        print(
            f"  {name:14s} {cost['ratio_to_full']:.2f} ({cost['least_ratio']:.2f}.."
            f"{cost['greatest_ratio']:.2f})  {cost['peak_bytes'] / 2**20:7.0f}  "
            f"{cost['peak_bytes'] / cost['full_peak_bytes']:.2f}  "
            f"{beyond / cost['model_bytes']:.2f}"
        )
    return results


if __name__ == "__main__":
    parser = HfArgumentParser(SubspaceCostArguments)
    run_subspace_cost(*parser.parse_args_into_dataclasses())
