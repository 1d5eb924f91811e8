"""The size of every configuration field that makes a model large, by name."""

VOCABULARY = 128
IMAGE = 16
_NAMES_BY_SIZE: dict[int, str] = {
    1: """
        first_k_dense_replace moe_layer_start_index moe_num_shared_experts
        n_shared_experts num_dense_layers num_mem_blocks
        num_nextn_predict_layers num_shared_experts pretraining_tp
        topk_group
    """,
    2: """
        conf_num_hidden_layers decoder_layers decoder_num_hidden_layers
        decoder_num_layers depth encoder_layers encoder_num_hidden_layers
        layers linear_num_key_heads moe_k moe_topk n_group n_layer n_layers
        num_blocks num_decoder_layers num_encoder_layers num_experts_per_tok
        num_global_layers num_hidden_layers num_key_value_groups
        num_key_value_heads num_layers num_lstm_layers
        num_timestamp_prediction_layers resampler_depth
        speech_encoder_layers swa_num_key_value_heads t2u_decoder_layers
        t2u_encoder_layers
    """,
    4: """
        attention_heads conf_num_attention_heads cross_num_attention_heads
        cross_num_key_value_heads decoder_attention_heads
        decoder_num_attention_heads decoder_num_heads
        encoder_attention_heads encoder_num_attention_heads index_n_heads
        latent_query_num linear_num_heads linear_num_value_heads
        moe_num_experts n_head n_heads n_routed_experts num_attention_heads
        num_conv_pos_embedding_groups num_experts num_heads num_image_tokens
        num_local_experts num_query_tokens num_sliding_attention_heads
        patch_size resampler_heads resampler_n_heads resampler_n_latents
        speech_encoder_attention_heads swa_num_attention_heads
        t2u_decoder_attention_heads t2u_encoder_attention_heads
    """,
    8: """
        attention_chunk_size attention_head_dim
        cross_head_dim d_head d_kv d_rel dim_head
        feature_size hc_lowrank head_dim index_head_dim kv_channels
        linear_head_dim linear_key_head_dim linear_value_head_dim
        local_attention mamba_d_head mamba_d_state mamba_head_dim mamba_n_heads
        mamba_num_heads n_mel_bins num_mel_bins qk_nope_head_dim
        qk_rope_head_dim resampler_dim_head resampler_head_dim rotary_dim
        sliding_window sliding_window_size
        ssm_state_size state_size swa_head_dim v_head_dim
    """,
    16: """
        block_size chunk_size codevector_dim
        downsample_hidden_size embedding_dim hidden_size_per_layer_input
        index_topk kv_lora_rank laurel_rank mamba_chunk_size
        mamba_dt_rank num_conv_pos_embeddings num_filters o_lora_rank
        output_channels q_lora_rank
        time_step_rank xvector_output_dim
    """,
    24: """
        expert_ffn_hidden_size moe_intermediate_size
        moe_shared_expert_intermediate_size router_hidden_size
        share_expert_dim shared_expert_intermediate_size
        shared_experts_intermediate_size shared_intermediate_size
    """,
    32: """
        adapter_out_dim attention_hidden_size audio_hidden_size
        backbone_hidden_size classifier_proj_size cross_hidden_size
        d_latents d_model decoder_dim decoder_hidden_size dim emb_dim
        embed_dim embedding_size encoder_hidden_size entity_emb_size
        hidden_dim hidden_size hidden_size_global image_text_hidden_size
        image_token_embed_dim lru_width mamba_d_ssm n_embd out_hidden_size
        output_dim output_hidden_size patch_embed_hidden_size projection_dim
        projection_hidden_dim projection_size projector_hidden_size
        projector_input_dim projector_output_dim subsampling_conv_channels
        text_hidden_size vision_hidden_size vision_output_dim
        word_embed_proj_dim
    """,
    48: """
        alignment_intermediate_size d_ff d_inner decoder_ffn_dim
        decoder_intermediate_size dense_intermediate_size dim_ff
        encoder_ffn_dim ffn_dim ffn_hidden_size intermediate_size
        intermediate_size_mlp mlp_dim projection_intermediate_size
        speech_encoder_intermediate_size t2u_decoder_ffn_dim
        t2u_encoder_ffn_dim
    """,
    64: """
        context_length max_2d_position_embeddings max_length max_pos_emb
        max_position_embeddings max_seq_len max_source_positions
        max_target_positions n_ctx n_positions
        original_max_position_embeddings
    """,
}
SIZES = {name: size for size, names in _NAMES_BY_SIZE.items() for name in names.split()}
SIZES |= {"image_size": IMAGE, "vocab_size": VOCABULARY}
SIZES |= {"vocab_size_per_layer_input": VOCABULARY}
