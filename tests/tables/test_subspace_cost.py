import pytest
import torch

from hf_sketch.recipes.tables.costs.subspace_cost import (
    SubspaceCostArguments,
    activation_bytes,
    run_subspace_cost,
    step_of,
)
from hf_sketch.recipes.tables.models.language_model import random_language_model


def test_the_bytes_between_steps_are_those_of_parameters_and_moments():
    model = random_language_model("gpt2", tiny=True)
    size = sum(parameter.nbytes for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    _, held = step_of(model, torch.zeros(1, 4, dtype=torch.long))
    steps = 4 * len(list(model.parameters()))  # Adam counts them for each parameter
    assert held == 3 * size + buffers + steps


def test_longer_texts_leave_more_for_the_backward_pass():
    model = random_language_model("gpt2", tiny=True)
    short, long = (torch.zeros(1, n, dtype=torch.long) for n in (8, 16))
    assert activation_bytes(model, long) > activation_bytes(model, short) > 0


@pytest.mark.full
def test_the_tiny_run_compares_memory_and_disk(tmp_path):
    arguments = SubspaceCostArguments(str(tmp_path), operators="affd", tiny=True)
    results = run_subspace_cost(arguments)
    memory, disk = results["affd"], results["affd on disk"]
    assert memory["ratio_to_full"] > 0
    difference = memory["peak_bytes"] - disk["peak_bytes"]
    assert abs(difference - memory["model_bytes"]) < 0.2 * memory["model_bytes"]
