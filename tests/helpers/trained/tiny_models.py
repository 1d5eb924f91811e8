"""One tiny model of each family, with a batch that it takes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTokenClassification,
)

EXAMPLES = 4
LENGTH = 9
VOCABULARY = 64
_TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1}
_TEXT |= {"eos_token_id": 2, "decoder_start_token_id": 1}
_WIDE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
_WIDE |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
_BERT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
_BERT |= {"num_attention_heads": 2, "max_position_embeddings": 20}
_BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2}
_BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
_BART |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
_EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
_EXPERTS |= {"experts_implementation": "eager"}


def _causal(generator):
    ids = torch.randint(3, VOCABULARY, (EXAMPLES, LENGTH), generator=generator)
    lengths = torch.tensor([9, 5, 7, 4])[:, None]
    mask = (torch.arange(LENGTH) < lengths).long()
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def _masked(generator):
    batch = _causal(generator)
    hidden = torch.rand(EXAMPLES, LENGTH, generator=generator) < 0.5
    hidden[:, 0] = True
    batch["labels"] = batch["labels"].masked_fill(~hidden, -100)
    return batch


def _seq2seq(generator):
    batch = _causal(generator)
    labels = torch.randint(3, VOCABULARY, (EXAMPLES, 6), generator=generator)
    labels[1, 4:] = labels[3, 2:] = -100
    return {**batch, "labels": labels}


def _classes(generator):
    labels = torch.randint(0, 3, (EXAMPLES,), generator=generator)
    batch = _causal(generator)
    batch["input_ids"][:, 0] = _TEXT["eos_token_id"]
    return {**batch, "labels": labels}


def _image(generator):
    pixels = torch.randn(EXAMPLES, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (EXAMPLES,), generator=generator)
    return {"pixel_values": pixels, "labels": labels}


def _speech(generator):
    sound = torch.randn(EXAMPLES, 8, 20, generator=generator, dtype=torch.float64)
    return {"input_features": sound, "labels": _seq2seq(generator)["labels"]}


_CAUSAL = (AutoModelForCausalLM, _causal)
_CLASSES = (AutoModelForSequenceClassification, _classes)
_SEQ2SEQ = (AutoModelForSeq2SeqLM, _seq2seq)
FAMILIES = {
    "gpt2": (*_CAUSAL, {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20}),
    "llama": (*_CAUSAL, _WIDE),
    "qwen2": (*_CAUSAL, _WIDE),
    "qwen3": (*_CAUSAL, _WIDE),
    "gemma": (*_CAUSAL, _WIDE),
    "gemma2": (*_CAUSAL, _WIDE),
    "gemma3_text": (*_CAUSAL, _WIDE),
    "mistral": (*_CAUSAL, _WIDE),
    "mixtral": (*_CAUSAL, _WIDE | _EXPERTS),
    "phi3": (*_CAUSAL, _WIDE | {"num_key_value_heads": 2}),
    "gpt_neox": (*_CAUSAL, _WIDE),
    "opt": (
        *_CAUSAL,
        {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2}
        | {"num_attention_heads": 2, "word_embed_proj_dim": 8},
    ),
    "mamba": (
        *_CAUSAL,
        {
            "hidden_size": 16,
            "state_size": 4,
            "num_hidden_layers": 2,
            "time_step_rank": 3,
        },
    ),
    "bert": (*_CLASSES, _BERT),
    "roberta": (*_CLASSES, _BERT | {"type_vocab_size": 1}),
    "distilbert": (
        *_CLASSES,
        {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
    ),
    "albert": (*_CLASSES, _BERT | {"embedding_size": 8, "num_hidden_layers": 3}),
    "bart": (*_SEQ2SEQ, _BART | {"scale_embedding": True}),
    "t5": (
        *_SEQ2SEQ,
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
    ),
    "umt5": (
        *_SEQ2SEQ,
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
    ),
    "vit": (
        AutoModelForImageClassification,
        _image,
        _BERT | {"image_size": 8, "patch_size": 4, "num_labels": 3},
    ),
    "whisper": (
        AutoModelForSpeechSeq2Seq,
        _speech,
        _BART | {"num_mel_bins": 8, "max_source_positions": 10},
    ),
}
TASKS = {
    "bert for masked words": ("bert", AutoModelForMaskedLM, _masked, _BERT),
    "bert for tokens": ("bert", AutoModelForTokenClassification, _masked, _BERT),
    "t5 for classes": (
        "t5",
        AutoModelForSequenceClassification,
        _classes,
        FAMILIES["t5"][2],
    ),
}
NAMES = [*FAMILIES, *TASKS]
# Between them they walk every gradient rule and every branch of the hooks.
FEW = ["gpt2", "gemma3_text", "mixtral", "bert", "t5", "vit"]
MORE = [name for name in NAMES if name not in FEW]


class DoublePrecision(TorchDispatchMode):
    """Makes models that compute some parts in float32 compute them in float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def tiny_model(name, dtype=torch.float64, **config):
    """A model of some thousand parameters, in training mode, with dropout off."""
    kind, auto, make_batch, settings = TASKS.get(name, (name, *FAMILIES.get(name, ())))
    torch.manual_seed(0)
    labels = {"num_labels": VOCABULARY if make_batch is _masked else 3}
    config = AutoConfig.for_model(kind, **{**_TEXT, **labels, **settings, **config})
    return auto.from_config(config).to(dtype).eval()


def tiny_inputs(name, seed=1):
    """A batch of examples of different lengths, padded."""
    make_batch = TASKS[name][2] if name in TASKS else FAMILIES[name][1]
    return make_batch(torch.Generator().manual_seed(seed))
