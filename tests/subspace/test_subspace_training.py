import copy

import pytest
import torch
from peft import get_peft_model
from transformers import TrainerCallback

from hf_sketch import SubspaceConfig, grow_subspace
from tests.helpers.trained.training import (
    Interrupt,
    tiny_bert,
    tiny_dataset,
    tiny_trainer,
)

STEPS = 6


class Record(TrainerCallback):
    """Keeps omega after each step."""

    def __init__(self):
        self.omegas = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.omegas.append(model.base_model.omega.detach().clone())


def undropped_bert():
    return tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def subspace_trainer(
    directory, *callbacks, model=None, dim=32, eval_dataset=None, **arguments
):
    model = get_peft_model(
        undropped_bert() if model is None else model,
        SubspaceConfig(dim=dim, max_dim=128, seed=5),
    )
    settings = {"max_steps": STEPS, "learning_rate": 1e-2, **arguments}
    return tiny_trainer(
        directory, *callbacks, model=model, eval_dataset=eval_dataset, **settings
    )


def test_the_trainer_moves_omega_as_adam_does_with_sketched_gradients(tmp_path):
    """The oracle: full gradients of a plain model, sketched, clipped, to Adam."""
    record = Record()
    trainer = subspace_trainer(tmp_path, record, lr_scheduler_type="constant")
    plain, batches = undropped_bert(), []
    inner = trainer.model.get_base_model()
    inner.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(dict(kwargs)), with_kwargs=True
    )
    trainer.train()
    tuner = trainer.model.base_model
    start = {n: p.detach().clone() for n, p in plain.named_parameters()}
    omega = torch.nn.Parameter(torch.zeros(32))
    adam = torch.optim.AdamW([omega], lr=1e-2, weight_decay=0.0)
    for expected in record.omegas:
        window, batches = batches[:2], batches[2:]
        # Transformers leaves it to the model to divide by num_items_in_batch.
        gradient = sum(_sketched(plain, batch, tuner) for batch in window)
        omega.grad = gradient * min(1.0, 0.5 / float(gradient.norm()))
        adam.step()
        torch.testing.assert_close(omega.detach(), expected, rtol=2e-3, atol=2e-5)
        vector = torch.nn.functional.pad(omega.detach(), (0, 96))
        lift = tuner.model_sketch.adjoint(vector)
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.copy_(start[name] + lift[name])
    assert len(record.omegas) == STEPS


def _sketched(model, batch, tuner):
    model.zero_grad()
    batch = {name: value for name, value in batch.items() if torch.is_tensor(value)}
    batch.pop("num_items_in_batch", None)
    model(**batch).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return tuner.model_sketch.sketch(gradients)[:32]


def test_checkpoints_hold_omega_alone_and_resume_bit_for_bit(tmp_path):
    whole, first, second = Record(), Record(), Record()
    base = tiny_bert()
    subspace_trainer(tmp_path / "a", whole, model=copy.deepcopy(base)).train()
    stopped = subspace_trainer(
        tmp_path / "b", first, Interrupt(4), model=copy.deepcopy(base)
    )
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = subspace_trainer(tmp_path / "b", second, model=copy.deepcopy(base))
    resumed.train(resume_from_checkpoint=True)
    ours = first.omegas[: STEPS - len(second.omegas)] + second.omegas
    assert len(second.omegas) in (2, 4)
    assert all(torch.equal(x, y) for x, y in zip(ours, whole.omegas, strict=True))
    files = {path.name for path in (tmp_path / "b" / "checkpoint-6").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    record = Record()
    trainer = subspace_trainer(
        tmp_path,
        record,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        learning_rate=0.5,
        eval_dataset=tiny_dataset(8),
    )
    trainer.train()
    best = int(trainer.state.best_model_checkpoint.rsplit("-", 1)[1])
    omega = trainer.model.base_model.omega
    assert torch.equal(omega, record.omegas[best - 1])


@pytest.mark.parametrize(
    "arguments",
    [
        {"bf16": True},
        {"activation_checkpointing": True},
        {"optim": "sgd"},
        {"optim": "adafactor"},
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    ],
    ids=str,
)
def test_training_goes_down_under(arguments, tmp_path):
    settings = {"max_steps": 20, "learning_rate": 3e-2, "save_strategy": "no"}
    if arguments.get("optim") == "sgd":
        settings["learning_rate"] = 1e-1
    trainer = subspace_trainer(tmp_path, dim=128, **settings, **arguments)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_growing_keeps_the_function_and_the_optimizer():
    torch.manual_seed(0)
    base = undropped_bert()
    model = get_peft_model(base, SubspaceConfig(dim=16, max_dim=64))
    tuner, batch = model.base_model, _batch()
    adam = torch.optim.AdamW([tuner.omega], lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        model(**batch).loss.backward()
        adam.step()
        adam.zero_grad()
    before, moments = tuner.omega.detach().clone(), adam.state[tuner.omega]
    moments = {name: value.clone() for name, value in moments.items()}
    logits = model(**batch).logits
    grow_subspace(model, 64, adam)
    torch.testing.assert_close(model(**batch).logits, logits, rtol=0, atol=1e-5)
    assert adam.param_groups[0]["params"][0] is tuner.omega
    state = adam.state[tuner.omega]
    assert len(adam.state) == 1
    assert torch.equal(tuner.omega[:16], before)
    assert not tuner.omega[16:].any()
    assert torch.equal(state["exp_avg"][:16], moments["exp_avg"])
    assert not state["exp_avg"][16:].any()
    squares = moments["exp_avg_sq"]
    assert torch.equal(state["exp_avg_sq"][:16], squares)
    torch.testing.assert_close(
        state["exp_avg_sq"][16:], squares.mean().expand(48), rtol=1e-5, atol=0
    )
    omega = tuner.omega.detach().clone()
    model(**batch).loss.backward()
    adam.step()
    steps = (tuner.omega.detach() - omega).abs()
    assert steps[16:].max() < 1e-2
    assert steps[16:].max() > 0


def test_old_coordinates_step_as_if_nothing_had_grown():
    batch, steps = _batch(), []
    for dim in (16, 64):
        model, adam = _after_two_steps(batch)
        grow_subspace(model, dim, adam)
        before = model.base_model.omega.detach().clone()
        model(**batch).loss.backward()
        adam.step()
        steps.append((model.base_model.omega.detach() - before)[:16])
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-3, atol=1e-6)


def _after_two_steps(batch):
    model = get_peft_model(undropped_bert(), SubspaceConfig(dim=16, max_dim=64))
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        model(**batch).loss.backward()
        adam.step()
        adam.zero_grad()
    return model, adam


def _batch():
    dataset = tiny_dataset(4).rename_column("label", "labels")
    return dataset.remove_columns("text").with_format("torch")[:]


def test_growing_is_refused_out_of_range():
    model = get_peft_model(undropped_bert(), SubspaceConfig(dim=16, max_dim=64))
    for dim in (8, 128):
        with pytest.raises(ValueError, match=rf"in \[16, max_dim=64\], got {dim}"):
            grow_subspace(model, dim)


def test_growing_refuses_unknown_optimizer_states():
    model = get_peft_model(undropped_bert(), SubspaceConfig(dim=16, max_dim=64))
    optimizer = torch.optim.Adadelta(model.parameters())
    model(**_batch()).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"got .*acc_delta.*adamw_torch"):
        grow_subspace(model, 32, optimizer)


def test_growing_needs_a_subspace_adapter():
    with pytest.raises(TypeError, match="must have a subspace adapter, got"):
        grow_subspace(tiny_bert(), 32)


def test_growing_refuses_an_optimizer_of_other_parameters():
    model = get_peft_model(undropped_bert(), SubspaceConfig(dim=16, max_dim=64))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(16))], lr=0.1)
    with pytest.raises(ValueError, match="one that does not hold them: make it from"):
        grow_subspace(model, 32, optimizer)


def test_as_many_dimensions_as_parameters_are_accepted():
    model = undropped_bert()
    elements = sum(p.numel() for p in model.parameters())
    model = get_peft_model(model, SubspaceConfig(dim=elements))
    model(**_batch()).loss.backward()
    assert model.base_model.omega.grad.norm() > 0
    with pytest.raises(ValueError, match=f"at most {elements}"):
        get_peft_model(undropped_bert(), SubspaceConfig(dim=elements + 1))


@pytest.mark.full
@pytest.mark.parametrize("operator", ["affd", "afjl"])
def test_growth_to_a_million_dimensions_keeps_the_loss(operator):
    base = undropped_bert_of_a_million()
    config = SubspaceConfig(dim=2**4, max_dim=2**20, operator=operator)
    model = get_peft_model(base, config)
    adam = torch.optim.AdamW([model.base_model.omega], lr=1e-3)
    batch = _batch()
    for bits in range(5, 21):
        model(**batch).loss.backward()
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            before = model(**batch).loss
            grow_subspace(model, 2**bits, adam)
            assert abs(model(**batch).loss - before) < 1e-5
    assert len(model.base_model.omega) == 2**20


def undropped_bert_of_a_million():
    settings = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6}
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = tiny_bert(**settings)
    assert sum(p.numel() for p in model.parameters()) > 2**20
    return model
