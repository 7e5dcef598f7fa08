"""The small model in vLLM: every text is that of our own engine (long tier; vllm_tier.py)."""

import random

import pytest
import torch
import vllm_tier
from seeds import seed_of

import dsv4_ascend
from dsv4_ascend.model.profile import PROFILES
from dsv4_ascend.tiny.release import SHIPPED

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
NEW = 24
LENGTHS = 3, 290, 6, 330, 700


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(seed_of(__name__))
    return [[rng.randrange(2, 2000) for _ in range(n)] for n in LENGTHS]


def own(prompts, **options):
    return dsv4_ascend.load(SHIPPED, **options).generate(prompts, max_new_tokens=NEW, stop_ids=[])


def served(prompts, dtype, drafts=0, **options):
    if drafts:
        options["speculative_config"] = {"method": "mtp", "num_speculative_tokens": drafts}
    options |= {"model": str(SHIPPED), "dtype": dtype}
    return vllm_tier.run("generate", {"options": options, "prompts": prompts, "new": NEW})


@pytest.mark.parametrize(
    ("dtype", "drafts"),
    [("float32", 0), ("float32", 2), ("bfloat16", 0), ("bfloat16", 1), ("bfloat16", 3)],
)
def test_texts_are_our_own(prompts, dtype, drafts):
    """All at once, in chunks of 96, the second time from cached prefixes."""
    want = own(prompts, dtype=getattr(torch, dtype))
    answer = served(prompts, dtype, drafts)
    assert answer["texts"] == [want, want]
    # With drafts vLLM gives up the last block of what it found, then rounds down to 256.
    assert answer["hits"][1] == ([0, 0, 0, 0, 256] if drafts else [0, 256, 0, 256, 512])
    assert (answer["accepted"] > 0) == (drafts > 0)


@pytest.mark.parametrize(("experts", "drafts"), [(False, 0), (True, 2)])
def test_two_ranks(prompts, experts, drafts):
    answer = served(
        prompts, "float32", drafts, tensor_parallel_size=2, enable_expert_parallel=experts
    )
    want = own(prompts, dtype=torch.float32)
    assert answer["texts"] == [want, want]


@pytest.mark.parametrize(("profile", "drafts"), [("a2a3-int8", 1), ("a5-mx", 0), ("bf16", 0)])
def test_profiles_and_their_byte_caches(prompts, profile, drafts):
    options = {"additional_config": {"dsv4": {"profile": profile}}}
    want = own(prompts, profile=profile)
    answer = served(prompts, "bfloat16", drafts, **options)
    assert answer["texts"] == [want, want]


def test_our_own_name_of_the_architecture(prompts):
    overrides = {"architectures": ["Dsv4ForCausalLM"]}
    answer = served(prompts[:1], "bfloat16", hf_overrides=overrides)
    assert answer["texts"][0] == own(prompts[:1])


def test_no_memory_is_lost_and_prefixes_are_found_every_256_tokens():
    found = vllm_tier.run("grouping", list(PROFILES))
    for by_profile in found.values():
        for group in by_profile.values():
            assert group["used"] == group["needed"]
            assert group["layers"] == group["parts"]
            assert (group["entry_groups"], group["hits"]) == (1, 256)


REFUSED = {
    "--kv-cache-dtype: found fp8": {"kv_cache_dtype": "fp8"},
    "--enable-lora: found LoRA": {"enable_lora": True},
    "--load-format: found dummy": {"load_format": "dummy"},
    "--hf-overrides: found index_topk": {"hf_overrides": {"index_topk": 8}},
    "profile: found 'a6'": {"additional_config": {"dsv4": {"profile": "a6"}}},
    "'dsv4': 'a5-mx', expected": {"additional_config": {"dsv4": "a5-mx"}},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_not_done_is_refused_by_name(prompts, said):
    with pytest.raises(AssertionError) as error:
        served(prompts[:1], "bfloat16", **REFUSED[said])
    assert said in str(error.value)
