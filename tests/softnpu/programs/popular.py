"""Popular models of transformers, tiny, on npu and on the CPU: loss,
gradients, greedy tokens with a cache.

Usage: popular.py [NAME...]
"""

import copy
import sys

import torch
import torch_npu  # noqa: F401
import transformers as hf
from seeds import seed

torch.set_num_threads(1)
small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
words = dict(small, vocab_size=97, max_position_embeddings=128)
grouped = dict(words, num_key_value_heads=2)
sight = dict(small, image_size=16, patch_size=8)
ids = torch.randint(5, 97, (2, 9), generator=torch.Generator().manual_seed(seed()))
padding = torch.ones_like(ids)
padding[0, :3] = 0  # left padded, as generation wants it
image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed()))
text = dict(input_ids=ids, attention_mask=padding, labels=ids)
CAUSAL = {
    "Llama": grouped,
    "Qwen2": grouped,
    "Qwen3": dict(grouped, head_dim=8),
    "Mistral": dict(grouped, sliding_window=4),
    "Mixtral": dict(grouped, num_local_experts=4, num_experts_per_tok=2),
    # torch_npu drops the tanh form of gelu on A2 and A3.
    "Gemma2": dict(grouped, head_dim=8, sliding_window=4, hidden_activation="gelu"),
    "Phi3": dict(grouped, pad_token_id=0),
    "GPTNeoX": words,
    "Falcon": dict(words, new_decoder_architecture=False),
    "GPT2": dict(vocab_size=97, n_positions=128, n_embd=32, n_layer=2, n_head=4),
    "OPT": dict(words, ffn_dim=48, word_embed_proj_dim=32),
    "Bloom": dict(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
    "Mamba": dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=8),
}
EAGER_ONLY = ("Gemma2", "Bloom", "Mamba")  # transformers refuses sdpa for them
OTHERS = {
    "BertForSequenceClassification": ("BertConfig", words, dict(text, labels=torch.tensor([0, 1]))),
    "T5ForConditionalGeneration": (
        "T5Config",
        dict(
            vocab_size=97,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        text,
    ),
    "ViTForImageClassification": (
        "ViTConfig",
        sight,
        dict(pixel_values=image, labels=torch.tensor([0, 1])),
    ),
    "CLIPModel": (
        "CLIPConfig",
        dict(text_config=words, vision_config=sight, projection_dim=16),
        dict(input_ids=ids, pixel_values=image, return_loss=True),
    ),
}


def cases():
    for name, keywords in CAUSAL.items():
        for dtype in (torch.float32, torch.bfloat16):
            for attention in ("eager", "sdpa")[: 1 if name in EAGER_ONLY else 2]:
                yield (
                    f"{name} {attention} {dtype}",
                    getattr(hf, f"{name}Config"),
                    keywords,
                    getattr(hf, f"{name}ForCausalLM", getattr(hf, f"{name}LMHeadModel", None)),
                    text,
                    dtype,
                    attention,
                    True,
                )
    for name, (config, keywords, inputs) in OTHERS.items():
        for attention in ("eager", "sdpa"):
            yield (
                f"{name} {attention}",
                getattr(hf, config),
                keywords,
                getattr(hf, name),
                inputs,
                torch.float32,
                attention,
                name.startswith("T5"),
            )


def distance(want, got):
    """Of the loss or of all gradients together,
    by their norms: in bf16 a rounding flips a ReLU here and there.
    """

    def of(pairs):
        pairs = [(a.detach().double(), b.detach().cpu().double()) for a, b in pairs]
        return (
            (
                sum((a - b).square().sum() for a, b in pairs)
                / sum(a.square().sum() for a, _ in pairs)
            )
            .sqrt()
            .item()
        )

    pairs = list(zip(want, got, strict=True))
    return max(of(pairs[:1]), of(pairs[1:]))


def learn(model, inputs):
    """Loss and gradients."""
    device = next(model.parameters()).device
    loss = model(
        **{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    ).loss
    loss.backward()
    return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]


def run(config, keywords, model, inputs, dtype, attention, generates):
    """(distance from the CPU, or in bf16 from fp32; its limit)"""
    torch.manual_seed(seed())
    dropouts = {
        k: 0.0 for k, v in config().to_dict().items() if "drop" in k and isinstance(v, float)
    }
    host = model._from_config(
        config(**keywords, **dropouts), attn_implementation=attention, dtype=dtype
    ).train()
    npu = copy.deepcopy(host).to("npu")
    if dtype == torch.bfloat16:
        # Each device rounds in other places: the NPU may be as far from fp32 as twice the CPU.
        exact = learn(copy.deepcopy(host).float(), inputs)
        return distance(exact, learn(npu, inputs)), 2 * distance(exact, learn(host, inputs))
    worst = distance(learn(host, inputs), learn(npu, inputs))
    if generates:
        prompt = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
        options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
        tokens = host.eval().generate(**prompt, **options)
        found = npu.eval().generate(**{k: v.npu() for k, v in prompt.items()}, **options).cpu()
        assert torch.equal(tokens, found), f"tokens {found.tolist()}, expected {tokens.tolist()}"
    return worst, 1e-6


failures, count = [], 0
for name, *case in cases():
    if sys.argv[1:] and not any(word in name for word in sys.argv[1:]):
        continue
    count += 1
    try:
        worst, limit = run(*case)
        if not worst <= limit:
            failures.append(f"{name}: {worst:.2g}, limit {limit:.2g}")
        print(name, f"{worst:.2g}, limit {limit:.2g}")
    except (RuntimeError, AssertionError, ValueError, TypeError, AttributeError) as error:
        failures.append(f"{name}: {type(error).__name__}: {str(error)[:400]}")
for failure in failures:
    print("PROBLEM", failure)
print(f"popular: {count} models, {len(failures)} problems")
sys.exit(bool(failures))
