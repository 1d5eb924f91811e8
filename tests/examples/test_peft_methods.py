"""Methods of PEFT that train parameters of their own, beside single-example passes."""

import tempfile

import peft
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sketch import ModelSketch
from hf_sketch.examples.sketcher import ExampleSketcher
from tests.helpers.tiers import full

SIZE = 32
TASK = {"task_type": "CAUSAL_LM"}
SOME = {"target_modules": ["q_proj", "v_proj"], **TASK}
LOW_RANK = {"r": 4, **SOME}
VIRTUAL = {"num_virtual_tokens": 3, **TASK}
ENCODED = {"encoder_hidden_size": 16, **VIRTUAL}
SHADOW = {
    "r": 4,
    "shadow_dropout": 0.0,
    "shadow_num_attention_heads": 2,
    "shadow_intermediate_size": 16,
    **TASK,
}


def mixture():
    """Two adapters of LoRA, between which X-LoRA chooses for each token."""
    paths = {}
    for scale in (1.0, 3.0):
        model = tuned(peft.LoraConfig(**LOW_RANK))
        for name, parameter in model.named_parameters():
            parameter.data *= scale if "lora" in name else 1.0
        paths[str(len(paths))] = path = tempfile.mkdtemp()
        model.save_pretrained(path)
    return peft.XLoraConfig(
        hidden_size=16, xlora_depth=1, xlora_dropout_p=0.0, adapters=paths, **TASK
    )


PLAIN = {
    "prompt": lambda: peft.PromptTuningConfig(**VIRTUAL),
    "prefix": lambda: peft.PrefixTuningConfig(**VIRTUAL),
    "dora": lambda: peft.LoraConfig(use_dora=True, **LOW_RANK),
    "target parameters": lambda: peft.LoraConfig(
        r=4, target_modules=[], target_parameters=["q_proj.weight"], **TASK
    ),
    "tokens": lambda: peft.LoraConfig(trainable_token_indices=[3, 5, 7], **LOW_RANK),
    "tokens alone": lambda: peft.TrainableTokensConfig(
        token_indices=[3, 5, 7], target_modules=["embed_tokens"], **TASK
    ),
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
    "vblora": lambda: peft.VBLoRAConfig(
        num_vectors=8, vector_length=4, topk=2, **LOW_RANK
    ),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=10, **SOME),
    "waveft": lambda: peft.WaveFTConfig(n_frequency=10, **SOME),
    "adamss": lambda: peft.AdamssConfig(r=4, num_subspaces=2, subspace_rank=2, **SOME),
    "beft": lambda: peft.BeftConfig(target_modules=["k_proj", "v_proj"], **TASK),
    "frod": lambda: peft.FrodConfig(progressbar=False, **SOME),
    "glora": lambda: peft.GloraConfig(**LOW_RANK),
    "unilora": lambda: peft.UniLoraConfig(r=4, theta_d_length=40, **SOME),
    "hira": lambda: peft.HiraConfig(**LOW_RANK),
    "osf": lambda: peft.OSFConfig(effective_rank=4, **SOME),
    "delora": lambda: peft.DeloraConfig(r=4, delora_lambda=15, **SOME),
    "gralora": lambda: peft.GraloraConfig(r=4, gralora_k=2, **SOME),
    "cartridge": lambda: peft.CartridgeConfig(
        num_virtual_tokens=3, num_frozen_tokens=1, **TASK
    ),
    "tinylora": lambda: peft.TinyLoraConfig(r=2, u=16, **SOME),
    "psoft": lambda: peft.PsoftConfig(r=4, **SOME),
    "peanut": lambda: peft.PeanutConfig(r=4, **SOME),
    "supertuning": lambda: peft.SupertuningConfig(sparsity=0.9, **SOME),
    "deft": lambda: peft.DeftConfig(r=4, **SOME),
    "shadow": lambda: peft.ShadowConfig(auxiliary_loss_weight=0.0, **SHADOW),
    "velora": lambda: peft.LoraConfig(velora_config={}, **LOW_RANK),
    "kasa": lambda: peft.LoraConfig(kasa_config=peft.KasaConfig(), **LOW_RANK),
    "x-lora": mixture,
}
RANDOM = {
    "dropout": lambda: peft.LoraConfig(lora_dropout=0.3, **LOW_RANK),
    "poly": lambda: peft.PolyConfig(n_tasks=2, n_skills=2, **LOW_RANK),
    "pvera": lambda: peft.PveraConfig(**LOW_RANK),
}
OWN_LOSSES = {
    "cpt": lambda: peft.CPTConfig(
        cpt_token_ids=[1, 2, 3, 4],
        cpt_mask=[1] * 4,
        cpt_tokens_type_mask=[1, 2, 3, 4],
        opt_weighted_loss_type="decay",
        opt_loss_decay_factor=0.9,
        **TASK,
    ),
    "shadow with its loss": lambda: peft.ShadowConfig(**SHADOW),
}
METHODS = {**PLAIN, **FULL, **RANDOM, **OWN_LOSSES}


def tuned(config, fresh=False):
    """A model with an adapter that is not zero, unless it is fresh."""
    settings = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 61}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=2, use_cache=False, **settings, **heads)
    )
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not fresh:
                parameter += 0.05 * torch.randn(parameter.shape)
    return model.train()


def batch(name):
    ids = torch.randint(1, 61, (3, 7))
    ids[1, 2], ids[2, 1] = 3, 5  # and none of the tokens that train in the first
    ids[0, ids[0] < 8] += 8
    labels = ids.clone()
    labels[0, :4] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name in ("multitask", "poly"):
        inputs["task_ids"] = torch.tensor([0, 1, 0])
    return {**inputs, "labels": labels}


def gradients_of(loss, parameters):
    tensors = list(parameters.values())
    settings = {"allow_unused": True, "materialize_grads": True}
    got = torch.autograd.grad(loss, tensors, retain_graph=True, **settings)
    return dict(zip(parameters, got, strict=True))


def recorded(model, inputs):
    """The rows of a batch, whose weighted sum is the gradient of its loss."""
    sketch = ModelSketch.from_model(model, SIZE, "grouped")
    with ExampleSketcher(model, sketch) as sketcher:
        model(**inputs).loss.backward()
        got = sketcher.take()
    parameters = sketch.parameters_of(model)
    whole = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    assert_near(got.weights.to(got.rows) @ got.rows, sketch.sketch(whole))
    return got, sketch, parameters


def assert_near(row, wanted):
    assert (row - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.filterwarnings("ignore")  # of PEFT
@pytest.mark.parametrize("name", [*PLAIN, *full(*FULL)])
def test_rows_are_those_of_single_examples(name):
    model, inputs = tuned(METHODS[name]()), batch(name)
    got, sketch, parameters = recorded(model, inputs)
    assert got.complete
    for index in range(3):
        alone = {key: value[index : index + 1] for key, value in inputs.items()}
        loss = model(**alone).loss
        torch.testing.assert_close(got.losses[index], loss.detach())
        assert_near(got.rows[index], sketch.sketch(gradients_of(loss, parameters)))


@pytest.mark.filterwarnings("ignore")  # of PEFT
@pytest.mark.parametrize("name", full(*RANDOM))
@pytest.mark.parametrize("fresh", [False, True], ids=["trained", "fresh"])
def test_rows_have_the_random_numbers_of_their_batch(name, fresh):
    model, inputs = tuned(METHODS[name](), fresh), batch(name)
    state = torch.get_rng_state()
    got, sketch, parameters = recorded(model, inputs)
    torch.set_rng_state(state)
    logits = model(**inputs).logits
    for index in range(3):
        loss = cross_entropy(logits[index, :-1], inputs["labels"][index, 1:])
        wanted = sketch.sketch(gradients_of(loss, parameters))
        assert_near(got.rows[index], wanted)


@pytest.mark.filterwarnings("ignore")  # of PEFT
@pytest.mark.parametrize("name", full(*OWN_LOSSES))
def test_rows_of_losses_that_a_method_adds_to_are_shares(name):
    model, inputs = tuned(METHODS[name]()), batch(name)
    got, sketch, parameters = recorded(model, inputs)
    assert got.losses.isnan().all()
    for index in range(3):
        alone = {key: value[index : index + 1] for key, value in inputs.items()}
        wanted = sketch.sketch(gradients_of(model(**alone).loss, parameters))
        assert torch.cosine_similarity(got.rows[index], wanted, dim=0) > 1 - 1e-5


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # of PEFT
def test_a_router_that_averages_over_the_batch_is_refused():
    config = peft.LilyConfig(r=4, stride_A=1, num_B=2, **SOME)
    with pytest.raises(ValueError, match="other outputs without its batch-mates"):
        recorded(tuned(config, fresh=True), batch("lily"))


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # of PEFT
def test_random_numbers_from_a_list_that_runs_out_are_refused():
    config = peft.LoraConfig(monteclora_config=peft.MontecloraConfig(), **LOW_RANK)
    with pytest.raises(RuntimeError, match="the same outputs when it is run again"):
        recorded(tuned(config), batch("monteclora"))


@pytest.mark.filterwarnings("ignore")  # of PEFT
def test_the_penalty_of_adalora_belongs_to_no_example():
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, tinit=0, tfinal=0, **SOME
    )
    model, inputs = tuned(config), batch("adalora")
    inputs["num_items_in_batch"] = torch.tensor(30)  # as the Trainer gives
    sketch = ModelSketch.from_model(model, SIZE, "grouped")
    with ExampleSketcher(model, sketch) as sketcher:
        model(**inputs).loss.backward()
        got = sketcher.take()
    assert not got.complete
    counts = (inputs["labels"][:, 1:] != -100).sum(1)
    torch.testing.assert_close(got.weights, counts / 30)
    logits, parameters = model(**inputs).logits, sketch.parameters_of(model)
    for index in range(3):
        own = cross_entropy(logits[index, :-1], inputs["labels"][index, 1:])
        torch.testing.assert_close(got.losses[index], own.detach())
        assert_near(got.rows[index], sketch.sketch(gradients_of(own, parameters)))
