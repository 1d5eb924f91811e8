"""What shrinking cannot know of models for text, by model type or class.

A dotted name is of a configuration within. "default" holds the arguments without which
the class's own defaults do not hold together.
"""

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_MROPE = {**_ROPE, "mrope_section": [2, 1, 1]}
_AXIAL = {"axial_pos_shape": [4, 4], "axial_pos_embds_dim": [16, 16]}

TEXT_MODELS: dict[str, dict[str, Any]] = {
    # Text
    "bamba": {"attn_layer_indices": [1]},
    "blt_global_transformer": {"hidden_size": 32},
    "blt": {"num_hidden_layers": 2, "encoder_hash_byte_group_vocab": 50},
    "canine": {"num_hash_buckets": 64, "local_transformer_stride": 8},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {**_MROPE}},
    },
    "ctrl": {"dff": 48},
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "dory": {"use_cache": False},  # which no sliding window may be shorter than
    "dots1": {
        "num_experts_per_tok": 2,
        "n_group": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
    },
    "esm": {"vocab_size": 128, "pad_token_id": 0, "mask_token_id": 101},
    "esmc": {"num_key_value_heads": 4},
    "fsmt": {"src_vocab_size": 128, "tgt_vocab_size": 128},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.5, 0.0],
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma4_text": {"global_head_dim": 8, "vocab_size_per_layer_input": 128},
    "gemma4_unified_text": {"global_head_dim": 8},
    "gemma4_assistant": {
        "text_config.hidden_size_per_layer_input": 0,
        "text_config.vocab_size_per_layer_input": 0,
        "default": {
            "text_config": {
                "hidden_size_per_layer_input": 0,
                "vocab_size_per_layer_input": 0,
            }
        },
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_moe": {"moe_topk": 2, "num_experts": 4},
    "inkling2_text": {"unpadded_vocab_size": 128, "rel_extent": 16},
    "inkling2_loop_text": {"unpadded_vocab_size": 128, "rel_extent": 16},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "led": {
        "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 64,
        "attention_window": [4, 4],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lxmert": {
        "num_qa_labels": 9,
        "num_object_labels": 9,
        "num_attr_labels": 9,
        "l_layers": 2,
        "x_layers": 1,
        "r_layers": 1,
        "visual_feat_dim": 16,
    },
    "longcat_flash": {"zero_expert_num": 2},
    "longformer": {"attention_window": [4, 4], "sep_token_id": 2},
    "luke": {"entity_vocab_size": 64},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "markuplm": {
        "max_depth": 4,
        "tag_pad_id": 7,
        "subs_pad_id": 7,
        "max_xpath_tag_unit_embeddings": 8,
        "max_xpath_subs_unit_embeddings": 8,
    },
    "reformer": {
        **_AXIAL,
        "attention_head_size": 8,
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "hash_seed": 0,
        "num_buckets": 2,
        "feed_forward_size": 48,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 128,
        "shape_vocab_size": 128,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "zamba": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "bros": {"hidden_size": 64},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "lilt": {"hidden_size": 48},
    "mobilebert": {
        "embedding_size": 16,  # less than hidden_size, or a part of the head is empty
        "initializer_range": 0.02,  # else rounding grows from layer to layer
    },
    "neomme": {"head_dim": 16},
    "nemotron_h": {"n_groups": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "xlstm": {"embedding_dim": 32, "qk_dim_factor": 1.0},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    # By class
    "ReformerModelWithLMHead": {"is_decoder": True},
    "dots3_note_text": {
        "sliding_window": 8,
        "layer_types": ["indexed_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "num_hidden_layers": 2,
    },
}
