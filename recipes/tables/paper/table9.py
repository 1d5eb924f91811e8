"""Table 9: what a sketched Hessian-vector product costs, by operator and mode."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser

from hf_sketch import HessianOperator, Sketch
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.measure import milliseconds, operator_costs
from hf_sketch.recipes.tables.models.hessians import FlatHessian, random_tokens
from hf_sketch.recipes.tables.paper.table8 import Product, operators_of

# Milliseconds and peak GB on a V100, then on a TPUv2 (Schioppa 2024, Table 9).
PUBLISHED = {
    ("affd", "explicit", "hadamard"): (397, 2.8, 158, 2.7),
    ("affd", "explicit", "kronecker"): (183, 2.8, 158, 2.7),
    ("affd", "explicit", "fft"): (111, 3.3, 158, 2.7),
    ("affd", "implicit", "hadamard"): (627, 3.1, 268, 3.6),
    ("affd", "implicit", "kronecker"): (238, 3.1, 267, 3.6),
    ("affd", "implicit", "fft"): (137, 3.7, 268, 3.6),
    ("afjl", "explicit", "hadamard"): (230, 2.7, 108, 2.6),
    ("afjl", "explicit", "kronecker"): (121, 2.7, 108, 2.6),
    ("afjl", "explicit", "fft"): (92, 3.3, 108, 2.6),
    ("afjl", "implicit", "hadamard"): (345, 3.0, 191, 3.5),
    ("afjl", "implicit", "kronecker"): (150, 3.0, 190, 3.5),
    ("afjl", "implicit", "fft"): (111, 3.8, 191, 3.5),
    ("qk", "explicit", "kronecker"): (118, 1.6, 82, 1.3),
    ("qk", "implicit", "kronecker"): (146, 1.9, 161, 1.7),
}


@dataclass
class Table9Arguments(ReportArguments):
    """Time and extra memory of sketched Hessian-vector products of a small GPT-2.

    The parameters are one vector, as in the paper. Explicit is S H(S.T v), by autograd
    and by finite differences; implicit the Hessian-vector product of L(theta + S.T w)
    in w.
    """

    layers: int = field(default=4, metadata={"help": "Layers of the model."})
    width: int = field(default=256, metadata={"help": "Its hidden size."})
    tokens: int = field(default=64, metadata={"help": "Tokens of its one example."})
    bits: int = field(default=12, metadata={"help": "log2 of the sketch size."})
    rounds: int = field(default=5, metadata={"help": "Rounds, after one not counted."})
    tiny: bool = field(
        default=False, metadata={"help": "A small model and one round, as a check."}
    )


def small_gpt2(layers: int, width: int) -> nn.Module:
    """With random weights and without dropout, and attention that differentiates."""
    torch.manual_seed(0)
    names = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    shape = {"n_layer": layers, "n_embd": width, "n_head": 2, "vocab_size": 8192}
    shape |= {"bos_token_id": 0, "eos_token_id": 0, "n_positions": 256}
    config = AutoConfig.for_model("gpt2", **shape, **dict.fromkeys(names, 0.0))
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def explicit(operator: Sketch, hessian: FlatHessian, vector: Tensor) -> Tensor:
    """S H(S.T v)."""
    return operator @ (hessian @ (operator.T @ vector))


def implicit(
    operator: Sketch, hessian: FlatHessian, inputs: Any, vector: Tensor
) -> Tensor:
    """The Hessian-vector product of L(theta + S.T w) in w, at 0, by autograd."""
    model = hessian.hessian.mean_loss.model
    omega = torch.zeros(operator.shape[0], requires_grad=True)
    lifted = hessian.named(Product.apply(omega, operator.T))
    moved = {n: p.detach() + lifted[n] for n, p in hessian.hessian.parameters.items()}
    loss = functional_call(model, moved, (), dict(inputs)).loss
    (gradient,) = torch.autograd.grad(loss, omega, create_graph=True)
    return torch.autograd.grad(gradient, omega, vector)[0]


def cases_of(
    arguments: Table9Arguments,
) -> dict[str, tuple[Sketch, Callable[[Sketch], Tensor]]]:
    """Each operator with each way to take the product."""
    model = small_gpt2(arguments.layers, arguments.width)
    batches = random_tokens(model, 1, arguments.tokens)
    exact, finite = (
        FlatHessian(HessianOperator(model, batches, mode=mode, self_check=False))
        for mode in ("autograd", "finite_difference")
    )
    vector = torch.randn(2**arguments.bits)
    ways: dict[str, Callable[[Sketch], Tensor]] = {
        "explicit": partial(explicit, hessian=exact, vector=vector),
        "explicit, finite differences": partial(
            explicit, hessian=finite, vector=vector
        ),
        "implicit": partial(implicit, hessian=exact, inputs=batches[0], vector=vector),
    }
    operators = operators_of(exact.size, 2**arguments.bits)
    return {
        f"{algorithm}/{way}/{mix}": (operator, use)
        for (algorithm, mix), operator in operators.items()
        if algorithm not in ("fjl", "ffd")  # as in the paper
        for way, use in ways.items()
    }


def run_table9(arguments: Table9Arguments) -> dict[str, dict[str, float]]:
    """Measure, print beside the paper's figures, and save."""
    if arguments.tiny:
        arguments = dataclasses.replace(
            arguments, layers=1, width=16, tokens=8, bits=6, rounds=1
        )
    cases = cases_of(arguments)
    costs = operator_costs(cases, arguments.rounds)
    size = next(iter(cases.values()))[0].shape[1]
    print(
        f"{size:,} elements, sketches of 2^{arguments.bits}; ours: ms, median "
        "(least..greatest), and MiB beyond the model\nthe paper's: ms and GB in all, "
        "of a GPT-2 on one V100 | on a TPUv2: compare rows within a column"
    )
    for name, cost in costs.items():
        algorithm, way, mix = name.split("/")
        published = PUBLISHED.get((algorithm, way, mix))
        paper = "{} ms {} GB | {} ms {} GB".format(*published) if published else "-"
        ours = f"{milliseconds(cost)} ms {cost['extra_peak_bytes'] / 2**20:.0f} MiB"
        print(f"  {algorithm:14s} {mix:10s} {way:29s} {ours:38s} paper {paper}")
    print("saved", save_report(arguments.output_dir, "table9", arguments, costs))
    return costs


if __name__ == "__main__":
    run_table9(*HfArgumentParser(Table9Arguments).parse_args_into_dataclasses())
