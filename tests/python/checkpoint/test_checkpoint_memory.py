"""Loading 2 GB costs the file's pages,
and copies only of what no view can have: 1.15 N + 300 MB.
"""

import json
import os
import random
import subprocess
import sys
from math import prod

import pytest
from seeds import seed_of
from tiny_checkpoints import tiny_config

from dsv4_ascend.checkpoint.config_file import config_to_dict
from dsv4_ascend.checkpoint.layout import FLOAT, FP8, layout

BIG = {
    "vocab_size": 20_000, "hidden_size": 2048, "moe_intermediate_size": 2048,
    "n_routed_experts": 64, "num_attention_heads": 16, "head_dim": 128, "qk_rope_head_dim": 32,
    "q_lora_rank": 512, "o_groups": 4, "o_lora_rank": 256, "index_n_heads": 16,
    "index_head_dim": 64,
}  # fmt: skip

LOAD = """
import sys, torch, dsv4_ascend
from dsv4_ascend.model.weights import official_tensors

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))

before = status("RssAnon")
model = dsv4_ascend.load(sys.argv[1])
held = 0
for _, tensor in official_tensors(model.network):
    held += tensor.nbytes
    tensor.view(torch.uint8).reshape(-1)[::4096].sum()
print(held, status("VmHWM"), status("RssAnon") - before)
"""


ORDERS = {
    "by number": list,
    "by name": lambda stored: sorted(stored, key=lambda entry: (-entry[3], entry[0])),
    "shuffled": lambda stored: random.Random(seed_of(__name__)).sample(stored, len(stored)),
}


def write_sparse(folder, config, order) -> int:
    """A checkpoint whose data is one hole in the file: 2 GB for the reader, a few kB on disk.
    Returns its bytes.
    """
    header, position, stored = {}, 0, []
    for name, entry in layout(config).items():
        dtype = "I8" if ".ffn.experts." in name else FP8 if entry.scale_name else entry.dtypes[0]
        width = {"BF16": 2, "I64": 8}.get(dtype, 1)
        stored.append((name, dtype, entry.stored_shape(dtype), width))
        if dtype not in FLOAT and entry.scale_name:
            stored.append((entry.scale_name, "F8_E8M0", entry.scale_shape(dtype), 1))
    for key, kind, shape, size in order(stored):
        end = position + prod(shape) * size
        header[key] = {"dtype": kind, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + position)
    (folder / "config.json").write_text(json.dumps(config_to_dict(config)))
    return position


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc (Linux)"
)
@pytest.mark.parametrize("order", ORDERS)
def test_loading_two_gigabytes(tmp_path, order):
    size = write_sparse(tmp_path, tiny_config((0, 4, 128, 4, 0), **BIG), ORDERS[order])
    assert size > 2e9
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    loaded, peak, copied = map(int, done.stdout.split())
    # The few BF16 tensors that operators need in fp32 are widened.
    assert size <= loaded < 1.001 * size
    assert peak < 1.15 * size + 300e6
    assert (copied < 64e6) == (order != "shuffled")
