"""Methods of PEFT that train parameters of their own, beside single-example passes."""

import peft
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sketch import ModelSketch
from hf_sketch.examples.sketcher import ExampleSketcher
from tests.helpers.tiers import full

SIZE = 40
TASK = {"task_type": "CAUSAL_LM"}
SOME = {"target_modules": ["q_proj", "v_proj"], **TASK}
LOW_RANK = {"r": 4, **SOME}
VIRTUAL = {"num_virtual_tokens": 3, **TASK}
ENCODED = {"encoder_hidden_size": 16, **VIRTUAL}
PLAIN = {
    "prompt": lambda: peft.PromptTuningConfig(**VIRTUAL),
    "prefix": lambda: peft.PrefixTuningConfig(**VIRTUAL),
    "dora": lambda: peft.LoraConfig(use_dora=True, **LOW_RANK),
    "target parameters": lambda: peft.LoraConfig(
        r=4, target_modules=[], target_parameters=["q_proj.weight"], **TASK
    ),
    "tokens": lambda: peft.LoraConfig(trainable_token_indices=[3, 5, 7], **LOW_RANK),
}
FULL = {
    "projected prefix": lambda: peft.PrefixTuningConfig(
        prefix_projection=True, **ENCODED
    ),
    "p-tuning": lambda: peft.PromptEncoderConfig(**ENCODED),
    "p-tuning by lstm": lambda: peft.PromptEncoderConfig(
        encoder_reparameterization_type="LSTM", **ENCODED
    ),
    "multitask": lambda: peft.MultitaskPromptTuningConfig(
        num_tasks=2, num_ranks=2, **VIRTUAL
    ),
    "adaption": lambda: peft.AdaptionPromptConfig(
        adapter_len=4, adapter_layers=2, **TASK
    ),
    "lora": lambda: peft.LoraConfig(**LOW_RANK),
    "rslora": lambda: peft.LoraConfig(use_rslora=True, **LOW_RANK),
    "lora with biases": lambda: peft.LoraConfig(
        bias="lora_only", lora_bias=True, **LOW_RANK
    ),
    "lora of embeddings": lambda: peft.LoraConfig(
        r=4, target_modules=["embed_tokens", "q_proj"], **TASK
    ),
    "saved modules": lambda: peft.LoraConfig(modules_to_save=["lm_head"], **LOW_RANK),
    "ia3": lambda: peft.IA3Config(
        target_modules=["q_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        **TASK,
    ),
    "vera": lambda: peft.VeraConfig(**LOW_RANK),
    "randlora": lambda: peft.RandLoraConfig(**LOW_RANK),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, **SOME),
    "boft": lambda: peft.BOFTConfig(
        boft_block_size=4, boft_n_butterfly_factor=1, **SOME
    ),
    "lokr": lambda: peft.LoKrConfig(**LOW_RANK),
    "loha": lambda: peft.LoHaConfig(**LOW_RANK),
    "hra": lambda: peft.HRAConfig(**LOW_RANK),
    "miss": lambda: peft.MissConfig(**LOW_RANK),
    "norms": lambda: peft.LNTuningConfig(**TASK),
    "c3a": lambda: peft.C3AConfig(block_size=4, **SOME),
    "shira": lambda: peft.ShiraConfig(**LOW_RANK),
    "road": lambda: peft.RoadConfig(group_size=8, **SOME),
}
METHODS = {**PLAIN, **FULL}


def tuned(config):
    """A model with an adapter that is not zero."""
    settings = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 61}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **settings, **heads))
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape)
    return model.train()


def batch(name):
    ids = torch.randint(1, 61, (3, 7))
    labels = ids.clone()
    labels[0, :4] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "multitask":
        inputs["task_ids"] = torch.tensor([0, 1, 0])
    return {**inputs, "labels": labels}


def gradients_of(loss, parameters):
    tensors = list(parameters.values())
    got = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, got, strict=True))


@pytest.mark.filterwarnings("ignore")  # of PEFT
@pytest.mark.parametrize("name", [*PLAIN, *full(*FULL)])
def test_rows_are_those_of_single_examples(name):
    model = tuned(METHODS[name]())
    inputs = batch(name)
    sketch = ModelSketch.from_model(model, SIZE, "grouped")
    with ExampleSketcher(model, sketch) as sketcher:
        model(**inputs).loss.backward()
        got = sketcher.take()
    assert got.complete
    parameters = sketch.parameters_of(model)
    for index in range(3):
        alone = {key: value[index : index + 1] for key, value in inputs.items()}
        loss = model(**alone).loss
        torch.testing.assert_close(got.losses[index], loss.detach())
        wanted = sketch.sketch(gradients_of(loss, parameters))
        distance = (got.rows[index] - wanted).norm() / wanted.norm()
        assert distance < 1e-4


@pytest.mark.filterwarnings("ignore")  # of PEFT
def test_the_penalty_of_adalora_belongs_to_no_example():
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, tinit=0, tfinal=0, **SOME
    )
    model, inputs = tuned(config), batch("adalora")
    sketch = ModelSketch.from_model(model, SIZE, "grouped")
    with ExampleSketcher(model, sketch) as sketcher:
        model(**inputs).loss.backward()
        got = sketcher.take()
    assert not got.complete
    logits = model(**inputs).logits[:, :-1].flatten(0, 1)
    own = cross_entropy(logits, inputs["labels"][:, 1:].flatten())
    wanted = sketch.sketch(gradients_of(own, sketch.parameters_of(model)))
    total = got.weights.to(got.rows) @ got.rows
    assert (total - wanted).norm() < 1e-4 * wanted.norm()
