"""What is leaned on in transformers beneath its public names; read in release 5."""

from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, Trainer
from transformers.quantizers import HfQuantizer

SMALL = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 20, "n_positions": 8}


def test_a_config_says_how_attention_is_computed():
    model = GPT2LMHeadModel(GPT2Config(**SMALL, attn_implementation="eager"))
    assert model.config._attn_implementation == "eager"


def test_a_model_that_is_loaded_for_quantization_says_so(monkeypatch):
    monkeypatch.setattr(HfQuantizer, "__abstractmethods__", frozenset())
    model = GPT2LMHeadModel(GPT2Config(**SMALL))
    config = BitsAndBytesConfig(load_in_8bit=True)
    HfQuantizer(config).preprocess_model(model)
    assert model.is_quantized


def test_layers_that_checkpoint_hold_the_function_that_does():
    model = GPT2LMHeadModel(GPT2Config(**SMALL))
    model.activation_checkpointing_enable({"use_reentrant": True})
    held = [
        vars(module)["_gradient_checkpointing_func"]
        for module in model.modules()
        if "_gradient_checkpointing_func" in vars(module)
    ]
    assert held
    assert all(function.keywords == {"use_reentrant": True} for function in held)


def test_conv1d_is_named_so():
    layer = GPT2LMHeadModel(GPT2Config(**SMALL)).transformer.h[0].attn.c_attn
    assert type(layer).__name__ == "Conv1D"
    assert type(layer).__module__.startswith("transformers.")
    assert layer.weight.shape == (8, 24)  # inputs first


def test_a_trainer_prepares_its_inputs_in_a_method_that_others_override():
    assert callable(vars(Trainer)["_prepare_inputs"])
