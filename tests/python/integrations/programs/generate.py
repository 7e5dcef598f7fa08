"""Texts of the small model from `vllm.LLM`, twice; options, prompts and lengths as JSON."""

import json
import os
import sys

if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    given = json.loads(sys.argv[1])
    llm = LLM(
        max_model_len=2048,
        max_num_batched_tokens=96,
        max_num_seqs=8,
        enforce_eager=True,
        skip_tokenizer_init=True,
        disable_log_stats=False,
        **given["options"],
    )
    sampling = SamplingParams(
        max_tokens=given["new"], temperature=0, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in given["prompts"]]
    turns = [llm.generate(prompts, sampling, use_tqdm=False) for _ in range(2)]
    accepted = [m.value for m in llm.get_metrics() if m.name.endswith("num_accepted_tokens")]
    answer = {
        "texts": [[list(one.outputs[0].token_ids) for one in turn] for turn in turns],
        "hits": [[one.num_cached_tokens for one in turn] for turn in turns],
        "accepted": sum(accepted),
    }
    print(f"\nANSWER {json.dumps(answer)}")
