"""The fields of the configuration files as data: names, constants,
and which unknown ones may be ignored.
"""

from __future__ import annotations

from typing import Any

from dsv4_ascend.checkpoint.config import LayerKind

OFFICIAL_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "head_dim": "head_dim",
    "qk_rope_head_dim": "rope_head_dim",
    "q_lora_rank": "q_lora_rank",
    "o_groups": "o_groups",
    "o_lora_rank": "o_lora_rank",
    "sliding_window": "window_size",
    "index_n_heads": "index_n_heads",
    "index_head_dim": "index_head_dim",
    "index_topk": "index_topk",
    "n_routed_experts": "n_routed_experts",
    "num_experts_per_tok": "n_activated_experts",
    "moe_intermediate_size": "moe_inter_dim",
    "num_hash_layers": "n_hash_layers",
    "routed_scaling_factor": "route_scale",
    "swiglu_limit": "swiglu_limit",
    "rope_theta": "rope_theta",
    "compress_rope_theta": "compress_rope_theta",
    "hc_mult": "hc_mult",
    "hc_sinkhorn_iters": "hc_sinkhorn_iters",
    "hc_eps": "hc_eps",
    "rms_norm_eps": "norm_eps",
    "num_nextn_predict_layers": "n_mtp_layers",
}
"""Our field (= hub name) -> name in the official inference/config.json."""

DEFAULTS: dict[str, Any] = {
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
}
"""Equal in every release and in the official ModelArgs; anything else must be written."""

KINDS: dict[str, LayerKind] = {
    "sliding_attention": "swa",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}
LAYER_TYPES = {kind: name for name, kind in KINDS.items()}

CONSTANTS: dict[str, tuple[object, ...]] = {
    "model_type": ("deepseek_v4",),
    "num_key_value_heads": (1,),
    "n_shared_experts": (1,),
    "scoring_func": ("sqrtsoftplus",),
    "score_func": ("sqrtsoftplus",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "n_group": (1, None),
    "topk_group": (1, None),
    "first_k_dense_replace": (0, None),
    "moe_layer_freq": (1, None),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, None),
    "scale_fmt": ("ue8m0",),
    "scale_dtype": ("fp8", "fp32"),
}
"""Fields with one meaning in V4; another value is a model that this code is not."""

WRITTEN_CONSTANTS = (
    "num_key_value_heads", "n_shared_experts", "scoring_func", "topk_method", "norm_topk_prob",
    "hidden_act", "tie_word_embeddings", "attention_bias",
)  # fmt: skip

FLOAT_EXPERTS = ("bf16", "bfloat16", "fp16", "float16", "fp32", "float32")
"""What converters write as `expert_dtype` of experts that are not quantised."""

QUANTISATION: dict[str, tuple[object, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3",),
    "scale_fmt": ("ue8m0", "float", None),
    "activation_scheme": ("dynamic",),
    "weight_block_size": ([128, 128],),
}

SILENT = frozenset((
    "architectures", "torch_dtype", "dtype", "transformers_version", "use_cache",
    "initializer_range", "attention_dropout", "output_router_logits", "router_aux_loss_coef",
    "router_jitter_noise", "pad_token_id", "_name_or_path", "max_batch_size", "max_seq_len",
    "auto_map", "ep_size", "pretraining_tp", "aux_loss_alpha", "seq_aux",
    "quantization_config.modules_to_not_convert", "quantization_config.modules_to_convert",
    "quantization_config.dequantize", "quantization_config.ignored_layers",
))  # fmt: skip
"""In every release or of every writer,
and without effect here (`auto_map` names remote code, which is never run).
"""

INFORMATIVE = frozenset((
    # transformers' base class, version 4 and 5
    "return_dict", "output_hidden_states", "output_attentions", "id2label", "label2id",
    "problem_type", "num_labels", "chunk_size_feed_forward", "is_decoder", "finetuning_task",
    "task_specific_params", "torchscript", "use_bfloat16", "tf_legacy_loss", "tokenizer_class",
    "prefix", "bad_words_ids", "sep_token_id", "decoder_start_token_id",
    "cross_attention_hidden_size", "tie_encoder_decoder", "attn_implementation",
    "generation_config", "remove_invalid_values", "exponential_decay_length_penalty",
    "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id",
    "encoder_no_repeat_ngram_size",
    # sampling defaults that version 4 wrote into config.json
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "max_new_tokens",
    # tools: who made the folder and how
    "reap_pruning", "pruning_config", "merge_method", "merged_from", "base_model", "model_name",
    "license", "library_name", "tags", "language", "author", "description", "created_at",
    "converted_by", "quantized_by", "conversion_info", "export_info", "transformers.js_config",
    "use_mtp", "model_max_length", "chat_template", "name_or_path", "use_return_dict",
    "transformers_weights", "trust_remote_code",
))  # fmt: skip
"""Describe the folder, its training head or its sampling,
never the layers: one note names those that were found.
"""

INFORMATIVE_START = (
    "_", "unsloth", "mergekit", "axolotl", "llamafactory", "vision_", "image_", "aligner_",
    "dspark_", "gradient_checkpointing",
)  # fmt: skip
INFORMATIVE_END = (
    "_pruning", "_dropout", "_git_hash", "_commit", "_url", "_loss_coef", "_loss_weight",
    "_loss_alpha", "_loss_scaling_factor",
)  # fmt: skip
"""Private attributes; fields that begin with a tool's name; those of parts that a text-only main
model does not run; training only; and provenance. Any other name may belong to a part of the model,
and stops the load."""

ROPE_SILENT = frozenset(("type", "rope_type", "rope_theta", "partial_rotary_factor"))
ROPE_FIXED: dict[str, tuple[object, ...]] = {
    "mscale": (1, None), "mscale_all_dim": (1, 0, None), "attention_factor": (1, None)
}  # fmt: skip
"""V4 scales no magnitudes; `mscale_all_dim` 0 is YaRN's own default."""

DSPARK_NAMES = {
    "markov_rank": "dspark_markov_rank",
    "target_layer_ids": "dspark_target_layer_ids",
    "block_size": "dspark_block_size",
    "noise_token_id": "dspark_noise_token_id",
}
"""Field of DSpark -> name in both files."""


def is_informative(name: str) -> bool:
    """Whether a field of this name cannot change the forward pass."""
    return (
        name in INFORMATIVE or name.startswith(INFORMATIVE_START) or name.endswith(INFORMATIVE_END)
    )
