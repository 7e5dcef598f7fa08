"""Conversions that are killed, meet a full disk, or each other."""

import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conversions import contents, converted
from seeds import seed_of

from dsv4_ascend.checkpoint.folder import open_checkpoint
from dsv4_ascend.checkpoint.foreign import JOURNAL
from dsv4_ascend.convert import job
from dsv4_ascend.convert.job import convert
from dsv4_ascend.convert.targets import TARGETS
from dsv4_backend.errors import CheckpointError

PROGRAM = Path(__file__).parent / "kill_conversions.py"
INT8 = TARGETS["a2a3-int8"]


def killed(source, wanted, target, count):
    seed = str(seed_of(f"{__name__}{target}"))
    done = subprocess.run(
        [sys.executable, PROGRAM, source, wanted, target, seed, str(count)],
        capture_output=True,
        text=True,
        check=False,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_killed_conversions_end_the_same(source, tmp_path):
    before = contents(source)
    wanted = converted(source, tmp_path / "wanted", "a2a3-w4a8")
    assert killed(source, wanted, "a2a3-w4a8", 5) == 5
    assert contents(source) == before


@pytest.mark.long
@pytest.mark.parametrize("target", ["a2a3-int8", "a2a3-w4a8", "a5-mx", "bf16"])
def test_two_hundred_kills(source, tmp_path, target):
    wanted = converted(source, tmp_path / "wanted", target)
    assert killed(source, wanted, target, 200 if target == "a2a3-int8" else 50) >= 50


class Stopped(BaseException):
    """What ends a conversion here, like a Ctrl-C."""


def stopped(source, folder, after=2):
    """A folder with some finished shards."""
    seen = []

    def stop(path):
        seen.append(path)
        if len(seen) == after:
            raise Stopped

    with pytest.raises(Stopped):
        convert(source, folder, INT8, after_shard=stop)
    return folder


def test_an_unfinished_folder_says_so_and_goes_on(source, tmp_path):
    folder = stopped(source, tmp_path / "folder")
    with pytest.raises(CheckpointError, match=r"an unfinished conversion .*convert` again"):
        open_checkpoint(folder)
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("model-*")}
    assert len(kept) == 2
    done = convert(source, folder, INT8)
    assert done.resumed == 2
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(folder) == contents(converted(source, tmp_path / "other", "a2a3-int8"))


def test_it_goes_on_from_the_same_source_to_the_same_target_alone(source, tmp_path):
    folder = stopped(source, tmp_path / "folder")
    with pytest.raises(CheckpointError, match="a conversion of --target a2a3-int8, not a5-mx"):
        convert(source, folder, TARGETS["a5-mx"])
    other = shutil.copytree(source, tmp_path / "other", copy_function=shutil.copy)
    with pytest.raises(CheckpointError, match="another source, or one that has changed"):
        convert(other, folder, INT8)
    assert convert(source, folder, INT8).resumed == 2
    with pytest.raises(CheckpointError, match="a conversion of --target a2a3-int8, not a5-mx"):
        convert(source, folder, TARGETS["a5-mx"])


def test_two_at_once(source, tmp_path):
    """The second says so at once, and the first ends as if it had been alone."""
    folder = tmp_path / "folder"

    def second(path):
        with pytest.raises(CheckpointError, match="another conversion writing here"):
            convert(source, folder, INT8)

    convert(source, folder, INT8, after_shard=second)
    assert contents(folder) == contents(converted(source, tmp_path / "other", "a2a3-int8"))


@pytest.mark.long
def test_many_processes_at_once(source, tmp_path):
    """Whoever comes first writes; the others say so, or find it finished."""
    folder = tmp_path / "folder"
    line = [sys.executable, "-m", "dsv4_ascend", "convert", source, folder, "--target", "a2a3-int8"]
    runs = [subprocess.Popen(line, stderr=subprocess.PIPE, text=True) for _ in range(6)]
    ends = [(run.communicate()[1], run.returncode) for run in runs]
    assert any(code == 0 for _, code in ends)
    for told, code in ends:
        assert code == 0 or "another conversion writing here" in told
    assert contents(folder) == contents(converted(source, tmp_path / "other", "a2a3-int8"))


def test_a_disk_without_room_is_told_before_anything_is_written(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(job.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(
        CheckpointError, match=r"found 0\.00 MB of room on the disk, expected \d+\.\d+ MB"
    ):
        convert(source, tmp_path / "folder", INT8)
    assert not list((tmp_path / "folder").glob("*.safetensors"))


def full(source, folder, limit):
    """A conversion in a process whose files may not grow beyond `limit` bytes."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            convert(source, folder, INT8)
            os._exit(0)
        except CheckpointError as error:
            os._exit(3 if "make room, then run the same command again" in str(error) else 4)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_disk_that_gets_full(source, tmp_path):
    """Writing is refused in the middle of a shard; what is finished stays and the rest follows."""
    folder = tmp_path / "folder"
    sizes = [
        path.stat().st_size for path in converted(source, tmp_path / "o", "a2a3-int8").glob("m*")
    ]
    assert full(source, folder, sorted(sizes)[len(sizes) // 2] + 1) == 3
    assert not list(folder.glob(".*part"))
    assert (folder / JOURNAL).exists()
    convert(source, folder, INT8)
    assert contents(folder) == contents(tmp_path / "o")


@pytest.mark.long
def test_a_full_tmpfs(source, tmp_path):
    mount = tmp_path / "mount"
    mount.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "t", mount], check=False
    ).returncode:
        pytest.skip("may not mount")
    try:
        with pytest.raises(CheckpointError, match="room on the disk"):
            convert(source, mount / "folder", INT8)
        (mount / "folder" / JOURNAL).unlink()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(job, "_check_room", lambda folder, needed: None)
            with pytest.raises(CheckpointError, match=r"No space left on device.*make room"):
                convert(source, mount / "folder", INT8)
        subprocess.run(["mount", "-o", "remount,size=64M", mount], check=True)
        convert(source, mount / "folder", INT8)
        other = converted(source, tmp_path / "other", "a2a3-int8")
        assert contents(mount / "folder") == contents(other)
    finally:
        subprocess.run(["umount", mount], check=False)


def test_a_lock_is_that_of_a_file_that_is_still_there(source, tmp_path):
    """Who waited while another finished does not write into a finished folder."""
    folder = converted(source, tmp_path / "folder", "a2a3-int8")
    before = contents(folder)
    descriptor = os.open(folder / "other", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.close(descriptor)
    (folder / "other").unlink()
    assert convert(source, folder, INT8).written == 0
    assert contents(folder) == before


@pytest.mark.parametrize("lost", ["shard", "cut shard", "config.json", "the index"])
def test_what_is_missing_of_a_finished_folder_is_made_again(source, tmp_path, lost):
    folder = tmp_path / "folder"
    convert(source, folder, INT8)
    whole = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    shard = next(folder.glob("model-*.safetensors"))
    if lost == "cut shard":
        os.truncate(shard, 1000)
    else:
        index = folder / "model.safetensors.index.json"
        ({"shard": shard, "config.json": folder / lost}.get(lost, index)).unlink()
    done = convert(source, folder, "a2a3-int8")
    assert done.written == ("shard" in lost)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == whole


def test_a_shard_that_was_cut_in_an_unfinished_folder_is_made_again(source, tmp_path):
    folder = tmp_path / "folder"
    with pytest.raises(KeyboardInterrupt):
        convert(source, folder, INT8, after_shard=_stop)
    os.truncate(next(folder.glob("model-*.safetensors")), 100)
    assert convert(source, folder, INT8).resumed == 0


def _stop(path):
    raise KeyboardInterrupt
