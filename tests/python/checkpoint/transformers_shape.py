"""A small DeepseekV4 as the configuration of transformers says it."""

TINY_HF = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 16,
    "q_lora_rank": 12,
    "o_groups": 2,
    "o_lora_rank": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 3,
    "n_routed_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "sliding_window": 8,
    "layer_types": [
        f"{name}_attention" for name in ("sliding", "compressed_sparse", "heavily_compressed")
    ],
    "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 16},
    "mlp_layer_types": ["hash_moe", "moe", "moe"],
    "partial_rotary_factor": 0.25,
}
