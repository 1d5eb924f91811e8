"""Every method of PEFT, at its smallest, and models that train by it."""

import tempfile

import peft
import torch
from peft.tuners.lora.arrow import create_arrow_model
from peft.tuners.lora.config import BdLoraConfig, CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.lora.loraga import preprocess_loraga
from transformers import LlamaConfig, LlamaForCausalLM

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


def llama():
    settings = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 61}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=2, use_cache=False, **settings, **heads)
    )


def moved(model):
    """The model with an adapter that is not zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape)
    return model.train()


def tuned(config, fresh=False):
    """A model with an adapter that is not zero, unless it is fresh."""
    model = peft.get_peft_model(llama(), config)
    return model.train() if fresh else moved(model)


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
REFUSED = {
    "lily": lambda: peft.LilyConfig(r=4, stride_A=1, num_B=2, **SOME),
    "monteclora": lambda: peft.LoraConfig(
        monteclora_config=peft.MontecloraConfig(), **LOW_RANK
    ),
}
ADALORA = {
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, tinit=0, tfinal=0, **SOME
    ),
}
METHODS = {**PLAIN, **FULL, **RANDOM, **OWN_LOSSES, **REFUSED, **ADALORA}


def sentences(count=4):
    ids = torch.randint(1, 61, (count, 8))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def by_eva():
    config = peft.LoraConfig(
        init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0), **LOW_RANK
    )
    model = peft.get_peft_model(llama(), config)
    batches = [sentences() for _ in range(4)]
    peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    return model


def by_corda():
    model = llama()
    config = peft.LoraConfig(
        init_lora_weights="corda",
        corda_config=CordaConfig(),
        **LOW_RANK,
    )
    preprocess_corda(model, config, lambda: [model(**sentences(1)) for _ in range(8)])
    return peft.get_peft_model(model, config)


def by_lora_ga():
    model = llama()
    config = peft.LoraConfig(
        init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig(), **LOW_RANK
    )
    preprocess_loraga(model, config, lambda: model(**sentences()).loss.backward())
    return peft.get_peft_model(model, config)


def by_arrow():
    """Three adapters, between which each token's nearest are chosen."""
    paths = [tempfile.mkdtemp() for _ in range(3)]
    for path in paths:
        tuned(peft.LoraConfig(**LOW_RANK)).save_pretrained(path)
    model = create_arrow_model(llama(), paths, peft.ArrowConfig(top_k=2, rng_seed=1))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def of_quantized_groups():
    """QA-LoRA, which PEFT offers for layers of GPTQ alone."""
    model = llama().requires_grad_(False)
    config = peft.LoraConfig(use_qalora=True, qalora_group_size=4, **LOW_RANK)
    for layer in model.model.layers:
        own = GPTQLoraLinear(layer.self_attn.q_proj, "default", config=config, r=4)
        layer.self_attn.q_proj = own
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def of_two_kinds():
    """Adapters of LoRA and of LoHa in one layer."""
    model = peft.get_peft_model(llama(), peft.LoraConfig(**LOW_RANK), "one", mixed=True)
    model.add_adapter("other", peft.LoHaConfig(**LOW_RANK))
    model.set_adapter(["one", "other"])
    return model


def two_of_a_kind():
    model = peft.get_peft_model(llama(), peft.LoraConfig(**LOW_RANK), "one")
    model.add_adapter("other", peft.LoraConfig(**LOW_RANK))
    model.base_model.set_adapter(["one", "other"])
    return model


def lora(**settings):
    return lambda: peft.get_peft_model(
        llama(), peft.LoraConfig(**{**LOW_RANK, **settings})
    )


VARIANTS = {
    "gaussian": lora(init_lora_weights="gaussian"),
    "olora": lora(init_lora_weights="olora"),
    "pissa": lora(init_lora_weights="pissa"),
    "fast pissa": lora(init_lora_weights="pissa_niter_4"),
    "orthogonal": lora(init_lora_weights="orthogonal"),
    "mica": lora(init_lora_weights="mica"),
    "eva": by_eva,
    "corda": by_corda,
    "lora-ga": by_lora_ga,
    "arrow": by_arrow,
    "qa-lora": of_quantized_groups,
    "activated": lora(alora_invocation_tokens=[9, 10]),
    "in blocks": lora(
        use_bdlora=BdLoraConfig(target_modules_bd_a=["q_proj", "v_proj"], nblocks=2)
    ),
    "replicated layers": lora(layer_replication=[(0, 2), (1, 2)]),
    "ranks by layer": lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
    "everywhere": lora(target_modules="all-linear"),
    "head": lora(target_modules=["lm_head", "q_proj"]),
    "saved embeddings": lora(modules_to_save=["lm_head", "embed_tokens"]),
    "saved norm": lora(modules_to_save=["norm"]),
    "all biases": lora(bias="all", lora_bias=True),
    "dora and rslora": lora(use_dora=True, use_rslora=True),
    "dora of embeddings": lora(
        use_dora=True, target_modules=["embed_tokens", "v_proj"]
    ),
    "of two kinds": of_two_kinds,
    "two of a kind": two_of_a_kind,
}
