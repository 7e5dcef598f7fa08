"""`dsv4-ascend softnpu -- COMMAND`, and what torch_npu without CANN does to everybody else."""

import os
import sys
from pathlib import Path

from processes import execute

from dsv4_backend.softnpu import library_folder

PLAIN = {key: value for key, value in os.environ.items() if key not in ("PATH", "TORCH_DEVICE_BACKEND_AUTOLOAD")}
CLI = [str(Path(sys.executable).with_name("dsv4-ascend"))]


def test_runs_a_command_of_this_environment(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\nprint(torch.npu.get_device_name(), (torch.ones(3, device='npu') + 1).sum().item())\n"
    )
    options = ["--soc", "Ascend950PR_9599", "--devices", "2", "--memory", "64M", "--trace", str(tmp_path / "%p.json")]
    code, output = execute([*CLI, "softnpu", *options, "--", "python", str(script)], PLAIN)
    assert code == 0 and "Ascend950PR_9599 6.0" in output, output
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_fault_of_the_command_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import torch\ntorch.ones(3, device='npu') * 2\n")
    options = ["--fail", "aclnnMulsGetWorkspaceSize:1:161002"]
    code, output = execute([*CLI, "softnpu", *options, "--", "python", str(script)], PLAIN)
    assert code == 1 and "injected fault 161002 in aclnnMulsGetWorkspaceSize" in output, output
    code, output = execute([*CLI, "softnpu", "--", "no-such-command"], PLAIN)
    assert code == 3 and "command not found: no-such-command" in output


def test_autoload_trap_is_explained_and_the_cpu_stays_usable():
    code, output = execute(["-c", "import torch"], PLAIN)
    assert code == 1 and "Failed to load the backend extension: torch_npu" in output
    code, output = execute([*CLI, "doctor"], {**PLAIN, "COLUMNS": "300"})
    assert code == 1 and "a plain `import torch` fails here" in output and "dsv4-ascend softnpu" in output, output
    code, output = execute(["-c", "import dsv4_ascend, torch; print(torch.ones(3).sum().item())"], PLAIN)
    assert code == 0 and "3.0" in output, output


def test_doctor_on_the_device():
    code, output = execute([*CLI, "softnpu", "--", "python", *CLI, "doctor"], {**PLAIN, "COLUMNS": "300"})
    assert code == 0 and f"softnpu, the software device, in {library_folder().parent}" in output, output
    assert "ready for CPU and 8 NPU(s)" in output
