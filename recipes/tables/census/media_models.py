"""What shrinking cannot know of models for images and sounds, by type or class.

A dotted name is of a configuration within. "default" holds the arguments without which
the class's own defaults do not hold together.
"""

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_MROPE = {**_ROPE, "mrope_section": [2, 1, 1]}
_CONVOLUTIONS: dict[str, Any] = {
    "conv_dim": [16, 16],
    "conv_stride": [4, 2],
    "conv_kernel": [8, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
_TWO_STAGES: dict[str, Any] = {
    "embed_dim": 16,
    "depths": [2, 1],
    "num_heads": [2, 4],
    "window_size": 2,
    "image_size": 32,
}
_FOUR_STAGES: dict[str, Any] = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 16, 16, 32],
    "num_attention_heads": [1, 2, 2, 4],
    "image_size": 32,
}

MEDIA_MODELS: dict[str, dict[str, Any]] = {
    # Images
    "bit": {
        "embedding_size": 16,
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "num_groups": 4,
    },
    "convnext": {**_FOUR_STAGES},
    "convnextv2": {**_FOUR_STAGES},
    "cvt": {
        "embed_dim": [8, 16, 32],
        "num_heads": [1, 2, 4],
        "depth": [1, 2, 3],
        "drop_path_rate": [0.0] * 3,
        "cls_token": [False, False, True],
    },
    "donut-swin": _TWO_STAGES,
    "efficientnet": {
        "width_coefficient": 0.25,
        "depth_coefficient": 0.5,
        "hidden_dim": 320,
        "image_size": 32,
        "drop_connect_rate": 0.0,
    },
    "focalnet": {
        "embed_dim": 16,
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "focal_levels": [2, 2],
        "focal_windows": [3, 3],
        "image_size": 32,
    },
    "hgnet_v2": {
        "embedding_size": 16,
        "stem_channels": [3, 8, 8],
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "stage_in_channels": [8, 16],
        "stage_mid_channels": [8, 8],
        "stage_out_channels": [16, 32],
        "stage_num_blocks": [1, 1],
        "stage_downsample": [False, True],
        "stage_downsample_strides": [2, 2],
        "stage_light_block": [False, True],
        "stage_kernel_size": [3, 5],
        "stage_numb_of_layers": [2, 2],
    },
    "hiera": {
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "image_size": [32, 32],
        "num_query_pool": 1,
        "masked_unit_size": [4, 4],
        "masked_unit_attention": [True, False],
    },
    "imagegpt": {"n_embd": 32, "vocab_size": 129},
    "levit": {
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [2, 3, 4],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
        "image_size": 64,
        "patch_size": 16,
    },
    "mobilenet_v1": {"depth_multiplier": 0.125, "image_size": 64, "min_depth": 4},
    "mobilenet_v2": {
        "depth_multiplier": 0.125,
        "image_size": 64,
        "min_depth": 4,
        "depth_divisible_by": 4,
        "finegrained_output": False,
    },
    "mobilevit": {
        "hidden_sizes": [16, 16, 16],
        "image_size": 64,
        "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32],
    },
    "mobilevitv2": {
        "width_multiplier": 0.125,
        "image_size": 64,
        "n_attn_blocks": [1, 1, 1],
        "base_attn_unit_dims": [128, 128, 128],
    },
    "perceiver": {
        "num_latents": 8,
        "d_latents": 16,
        "d_model": 32,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 1,
        "image_size": 16,
        "qk_channels": 16,
        "v_channels": 16,
        "output_num_channels": 16,
        "max_position_embeddings": 16,
    },
    "poolformer": {**_FOUR_STAGES},
    "pp_lcnet": {"scale": 0.25, "class_expand": 32},
    "pvt": {**_FOUR_STAGES},
    "pvt_v2": {**_FOUR_STAGES},
    "regnet": {
        "embedding_size": 8,
        "hidden_sizes": [16, 16],
        "depths": [1, 1],
        "groups_width": 8,
    },
    "resnet": {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]},
    "segformer": {**_FOUR_STAGES, "decoder_hidden_size": 16},
    "swiftformer": {
        "depths": [1, 1, 1, 1],
        "embed_dims": [8, 8, 16, 16],
        "image_size": 64,
    },
    "swin": _TWO_STAGES,
    "swinv2": {**_TWO_STAGES, "pretrained_window_sizes": [0, 0]},
    "textnet": {
        "stem_out_channels": 8,
        "hidden_sizes": [8, 8, 16, 16, 16],
        "image_size": [64, 64],
    },
    # Images and text
    "fun_asr_nano": {"adaptor_config.intermediate_size": 8},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "speecht5": {**_CONVOLUTIONS},
    "deepseek_ocr2_text": {
        "mlp_layer_types": ["dense", "sparse"],
        "num_experts_per_tok": 2,
    },
    "granite4_vision": {"deepstack_layer_map": [], "spatial_target_layers": []},
    "deepseek_ocr2_sam_vision_model": {
        "downsample_channels": [16, 32],
        "window_size": 2,
        "global_attn_indexes": [1],
    },
    "hunyuan_vl_text": {"rope_parameters": _MROPE},
    "omniasr_ctc": {"blank_token_id": 0, "vocab_size": 32},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "kosmos_2_5_vision_model": {"patch_embed_hidden_size": 48},
    "llava_next": {"image_grid_pinpoints": [[16, 16]]},
    "llava_next_video": {"image_grid_pinpoints": [[16, 16]]},
    "llava_onevision": {"image_grid_pinpoints": [[16, 16]]},
    "qwen3_asr_encoder": {"n_window": 16, "n_window_infer": 64},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    **{
        name: {"rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}}
        for name in (
            "glm4v_moe_text",
            "glm4v_text",
            "glm_ocr_text",
            "paddleocr_vl_text",
            "qwen2_5_omni_text",
            "qwen2_5_vl_text",
            "qwen2_vl_text",
        )
    },
    **{
        name: {"vision_start_token_id": 90}
        for name in ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
    },
    "blip-2": {"image_token_index": 100},
    "instructblip": {"image_token_index": 100},
    "instructblipvideo": {"video_token_index": 100},
    "chameleon": {"vocabulary_map": {"<image>": 100}},
    "emu3": {"vocabulary_map": {"<image>": 100}},
    "hunyuan_vl_vision": {"max_image_size": 16},
    "hy_v4_vl_vision": {"max_image_size": 16},
    "internvl_vision": {"image_size": [16, 16], "patch_size": [4, 4]},
    "qianfan_ocr_vision": {"image_size": [16, 16], "patch_size": [4, 4]},
    "pix2struct_vision_model": {"patch_embed_hidden_size": 48, "seq_len": 16},
    "pix2struct_text_model": {"d_kv": 8},
    "step3p5": {"sliding_window": 8},
    "vision-encoder-decoder": {
        "default": {
            "encoder": {"model_type": "vit"},
            "decoder": {
                "model_type": "bert",
                "is_decoder": True,
                "add_cross_attention": True,
            },
        },
    },
    "pp_formulanet_vision": {
        "post_conv_in_channels": 16,
        "post_conv_mid_channels": 16,
        "post_conv_out_channels": 16,
        "window_size": 2,
        "global_attn_indexes": [1],
    },
    "unlimited_ocr_sam_vision_model": {
        "downsample_channels": [16, 32],
        "window_size": 2,
        "global_attn_indexes": [1],
    },
    "llama4_vision_model": {"intermediate_size": 128},
    "phi4_multimodal_audio": {
        "nemo_conv_channels": 16,
        "ext_pw_out_channel": 32,
        "depthwise_separable_out_channel": 32,
        "input_size": 16,
    },
    "janus_vqgan": {
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "latent_channels": 32,
        "num_embeddings": 16,
    },
    "florence_vision": {
        "depths": [1, 1],
        "embed_dim": [16, 32],
        "num_heads": [2, 4],
        "num_groups": [2, 4],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "window_size": 4,
    },
    "got_ocr2_vision": {"window_size": 2, "global_attn_indexes": [1]},
    # Speech
    **{
        name: {**_CONVOLUTIONS, "vocab_size": 32}
        for name in (
            "data2vec-audio",
            "hubert",
            "sew",
            "sew-d",
            "unispeech",
            "unispeech-sat",
            "wav2vec2",
            "wav2vec2-conformer",
            "wavlm",
        )
    },
    "granite_speech5_encoder": {"context_size": 8},
    "voxtral_encoder": {"intermediate_size": 128, "num_mel_bins": 128},
    "glmasr_encoder": {"intermediate_size": 128},
    "omniasr_audio": {**_CONVOLUTIONS},
    "granite_speech_encoder": {"context_size": 8, "max_pos_emb": 16},
    "granite_speech_plus_encoder": {"context_size": 8, "max_pos_emb": 16},
    "speech_to_text": {"conv_channels": 16, "input_feat_per_channel": 8},
    "wav2vec2-bert": {"vocab_size": 32, "feature_projection_input_dim": 16},
}
