"""Peak memory of a conversion: that of one tensor's rows, whatever the size of the folder.

Shown on the recorded release of 0731 (160 experts, 46 shards, 110 GB) as sparse files: all its
headers are read and all its shards planned; those with its largest tensors and of each kind of
layer are converted, into files that are taken away when they are finished. What a shard needs does
not depend on the others: after several the peak is that of the first ones.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DATA = Path(__file__).parents[4] / "shared" / "data"
PROGRAM = """
import json, resource, sys, time
from pathlib import Path
from dsv4_ascend.checkpoint.folder import open_checkpoint
from dsv4_ascend.convert.shards import shards_of, write_shard
from dsv4_ascend.convert.targets import TARGETS
source, folder, target = Path(sys.argv[1]), Path(sys.argv[2]), TARGETS[sys.argv[3]]
checkpoint = open_checkpoint(source)
shards = shards_of(checkpoint, target)
folder.mkdir(exist_ok=True)
wanted = "embed.weight", "head.weight", "layers.2.attn_norm.weight", "layers.3.attn_norm.weight"
chosen = [s for s in shards if any(item.name in wanted for item in s.items)]
peaks, start = [], time.monotonic()
for shard in chosen:
    write_shard(folder, shard, checkpoint, target)
    assert (folder / shard.file).stat().st_size > shard.nbytes
    (folder / shard.file).unlink()
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    told = shard.file, shard.nbytes, peaks[-1], time.monotonic() - start
    print(*told, file=sys.stderr, flush=True)
print(json.dumps({"peaks": peaks, "bytes": sum(s.nbytes for s in shards), "shards": len(shards)}))
"""


@pytest.mark.long
@pytest.mark.timeout(2000)
@pytest.mark.parametrize("target", ["a2a3-int8", "a2a3-w4a8", "a5-mx", "bf16"])
def test_peak_memory_of_a_release(tmp_path, target):
    script = DATA / "make_sparse.py"
    if not script.exists():
        pytest.skip(f"no record at {DATA}")
    source = tmp_path / "source"
    subprocess.run([sys.executable, script, source], check=True)
    line = [sys.executable, "-c", PROGRAM, source, tmp_path / "folder", target]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["shards"] == len(list(source.glob("*.safetensors")))
    assert found["bytes"] > 80e9
    assert max(found["peaks"]) < 4e9
    assert len(found["peaks"]) >= 3
