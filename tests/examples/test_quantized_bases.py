"""LoRA on bases of 4 and 8 bits, beside single-example passes."""

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sketch import ExampleSketcher, ModelSketch

CONFIG = LlamaConfig(
    num_hidden_layers=2,
    hidden_size=64,
    intermediate_size=64,
    vocab_size=61,
    num_attention_heads=2,
    num_key_value_heads=2,
    use_cache=False,
)


def four_bits(model):
    quantized = pytest.importorskip("bitsandbytes").nn

    def layer(linear):
        sizes = linear.in_features, linear.out_features
        settings = {"compute_dtype": torch.float32, "quant_type": "nf4"}
        return quantized.Linear4bit(*sizes, bias=False, **settings)

    replace_layers(model, layer)
    model.is_loaded_in_4bit = True


def eight_bits(model):
    quantized = pytest.importorskip("bitsandbytes").nn

    def layer(linear):
        sizes = linear.in_features, linear.out_features
        return quantized.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)

    replace_layers(model, layer)
    model.is_loaded_in_8bit = True


def eight_bits_of_torchao(model):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


def replace_layers(model, layer):
    for path, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            around, _, name = path.rpartition(".")
            quantized = layer(module)
            quantized.load_state_dict(module.state_dict())
            setattr(model.model.get_submodule(around), name, quantized.to("cpu"))


@pytest.mark.filterwarnings("ignore")  # of the packages
@pytest.mark.parametrize("quantize", [four_bits, eight_bits, eight_bits_of_torchao])
def test_rows_are_those_of_single_examples(quantize):
    torch.manual_seed(0)
    base = LlamaForCausalLM(CONFIG).requires_grad_(False)
    quantize(base)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    ids = torch.randint(1, 61, (3, 7))
    sketch = ModelSketch.from_model(model, 40)
    with ExampleSketcher(model, sketch) as sketcher:
        model(input_ids=ids, labels=ids).loss.backward()
        got = sketcher.take()
        assert sketcher.unverified is None
    assert not sketcher.coverage.run_again
    parameters = sketch.parameters_of(model)
    for index in range(3):
        model.zero_grad()
        own = model(input_ids=ids[index : index + 1], labels=ids[index : index + 1])
        own.loss.backward()
        wanted = sketch.sketch({name: p.grad for name, p in parameters.items()})
        # 8-bit products round their inputs to 16 bits, row by row.
        assert (got.rows[index] - wanted).norm() < 1e-3 * wanted.norm()
