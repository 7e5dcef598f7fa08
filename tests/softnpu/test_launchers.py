"""Our launchers on the software device: arithmetic, signatures, order, capture, failures."""

import re

import pytest
from processes import execute, long, run

from dsv4_backend import OPERATORS
from softnpu import SOCS, environment
from softnpu.settings import settings

QUEUES = ["0", "1", "2"]
NORM = "aclnnRmsNorm"


def launchers(part, *arguments, soc=SOCS[0], **options):
    code, output = run("launchers.py", part, *arguments, soc=soc, cann="9.1.0", **options)
    assert code == 0, output
    return output


EVERYWHERE = {
    *("embed_streams", "hc_head_hf32", "hc_post", "hc_pre_hf32", "lm_head", "rms_norm", "rope"),
    *("apply_rope", "bf16_moe", "compress_pool", "indexer_prolog", "linear_pair", "qkv_norm_rope"),
    *("gate_hash", "gate_topk", "moe_combine", "moe_dispatch", "swiglu", "write_cache"),
    *("grouped_gemm", "grouped_output_projection", "int8_gemm", "int8_grouped_sum"),
    *("hadamard", "hc_head", "head_rms_norm", "markov_bias", "mtp_combine", "sample"),
    *("int8_grouped_gemm", "int8_token_quant", "lightning_indexer", "sparse_attention_p512"),
    *("linear", "write_cache_indexer_int8", "write_caches"),
}
ON_A3_AND_A5 = {"compress"}
ON_A5 = {
    *("act_quant", "fp8_gemm", "fp8_grouped_gemm", "fp8_token_quant", "hc_pre"),
    *("mx_swiglu_quant", "mxfp4_tiled_grouped_gemm", "mxfp8_gemm", "mxfp8_grouped_gemm"),
    *("fp4_grouped_gemm", "lightning_indexer_fp8", "mxfp4_grouped_gemm", "pack_mxfp4"),
    *("sparse_attention_fp8", "write_cache_indexer_token_fp8", "write_cache_kv_epilog"),
    *("indexer_prolog_fp8", "mx_moe", "mx_output_projection", "rms_norm_mx"),
}
ON_A2_AND_A3 = {
    *("int8_moe", "int8_swiglu_quant", "lightning_indexer_int8"),
    *("gate_hash_folded", "gate_topk_folded", "indexer_prolog_int8", "rms_norm_int8"),
}


@pytest.mark.parametrize("soc", SOCS)
def test_every_case_that_a_launcher_takes_fits(soc):
    counts = re.findall(
        r"^(\w+): (\d+) of (\d+) cases launched", launchers("parity", soc=soc), re.MULTILINE
    )
    launched = {name for name, taken, _ in counts if int(taken)}
    own = ON_A5 if "950" in soc else ON_A2_AND_A3
    assert launched == EVERYWHERE | own | (set() if "910B" in soc else ON_A3_AND_A5)
    assert all(
        int(cases) == len(list(OPERATORS[name].iterate_cases())) for name, _, cases in counts
    )


@pytest.mark.parametrize("soc", SOCS[:2])
def test_every_case_that_the_gate_of_vllm_ascend_takes_fits(soc):
    gates = "gate_topk", "gate_hash"
    output = launchers("parity", *gates, soc=soc, vendor="vllm-ascend")
    for gate in gates:
        by_vendor = re.search(rf"^{gate}/aclnnMoeGatingTopKHash: (\d+) res", output, re.MULTILINE)
        assert by_vendor and int(by_vendor[1]) > 5, output


def test_signatures_are_those_of_the_device():
    assert "signatures agree" in launchers("signatures", vendor="vllm-ascend")


@pytest.mark.parametrize("soc", [SOCS[1], pytest.param(SOCS[2], marks=long)])
def test_a_fused_candidate_is_one_launch(soc):
    said = dict(
        re.findall(r"^(\S+) is (fused|composite)$", launchers("kinds", soc=soc), re.MULTILINE)
    )
    assert said["rms_norm/aclnnRmsNorm"] == "fused"
    assert said["sample/aclnnArgMax"] == "composite"
    assert len(said) > 20


@pytest.mark.parametrize("queue", QUEUES)
def test_launches_keep_the_order_of_the_stream(queue):
    assert "0 of 40 rounds wrong" in launchers("order", variables={"TASK_QUEUE_ENABLE": queue})


@pytest.mark.parametrize("queue", ["0", "1"])
def test_a_captured_launch_replays(queue):
    assert "3 replays right" in launchers("graph", variables={"TASK_QUEUE_ENABLE": queue})


@pytest.mark.parametrize("queue", QUEUES)
def test_a_refusal_of_phase_1_is_an_error_of_the_call(queue):
    planned = f"{NORM}GetWorkspaceSize:1:561002"
    assert "refused, then right" in launchers(
        "refused", fail=planned, variables={"TASK_QUEUE_ENABLE": queue}
    )


def test_a_failing_launch_is_an_error_of_the_call():
    planned = f"{NORM}:1:361001"
    assert "failed, then right" in launchers(
        "failed", fail=planned, variables={"TASK_QUEUE_ENABLE": "0"}
    )


def test_other_machines_can_be_asked_about():
    assert "answer for other machines" in launchers("candidates")


@pytest.mark.parametrize("soc", [SOCS[2], pytest.param(SOCS[0], marks=long)])
def test_parity_on_the_device_holds_and_says_what_it_leaves_out(soc):
    program = "from dsv4_ascend.cli.main import main; main()"
    command = ["-c", program, "parity", "--device", "npu", "-k", "hc_head"]
    code, output = execute(command, environment(settings(soc=soc)))
    assert code == 0 and " 0 failed, 1 left out" in output, output
    assert "left out: hc_head/ideal/fp64 streams: not on npu: fp64 arguments" in output, output
