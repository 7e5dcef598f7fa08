"""`dsv4-ascend softnpu -- COMMAND`, and what torch_npu without CANN does to everybody else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import execute, long

from softnpu import environment, library_folder
from softnpu import settings as settings_module
from softnpu.command import call
from softnpu.errors import ArgumentError, EnvironmentFault
from softnpu.settings import settings

PLAIN = {
    key: value
    for key, value in os.environ.items()
    if key not in ("PATH", "TORCH_DEVICE_BACKEND_AUTOLOAD")
}
CLI = [str(Path(sys.executable).with_name("dsv4-ascend"))]


def test_runs_a_command_of_this_environment(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "print(torch.npu.get_device_name(), (torch.ones(3, device='npu') + 1).sum().item())\n"
    )
    options = [
        "--soc",
        "Ascend950PR_9599",
        "--devices",
        "2",
        "--memory",
        "64M",
        "--trace",
        str(tmp_path / "%p.json"),
    ]
    code, output = execute([*CLI, "softnpu", *options, "--", "python", str(script)], PLAIN)
    assert code == 0 and "Ascend950PR_9599 6.0" in output, output
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_variables_hold_where_no_option_is_given():
    program = [
        "python",
        "-c",
        "import torch; print(torch.npu.get_device_name(), torch.npu.device_count())",
    ]
    variables = {**PLAIN, "SOFTNPU_SOC": "Ascend950PR_9599", "SOFTNPU_DEVICES": "3"}
    code, output = execute([*CLI, "softnpu", "--devices", "2", "--", *program], variables)
    assert code == 0 and "Ascend950PR_9599 2" in output, output
    code, output = execute([*CLI, "softnpu", "--", *program], {**PLAIN, "SOFTNPU_SOC": "Bogus"})
    assert code == 1 and "SOFTNPU_SOC=Bogus: expected Ascend910B*" in output, output


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
    assert (
        code == 1
        and "a plain `import torch` fails here" in output
        and "dsv4-ascend softnpu" in output
    ), output
    code, output = execute(
        ["-c", "import dsv4_ascend, torch; print(torch.ones(3).sum().item())"], PLAIN
    )
    assert code == 0 and "3.0" in output, output


def test_doctor_on_the_device():
    code, output = execute(
        [*CLI, "softnpu", "--", "python", *CLI, "doctor"], {**PLAIN, "COLUMNS": "300"}
    )
    assert code == 0 and f"softnpu, the software device, in {library_folder().parent}" in output, (
        output
    )
    assert "8 software device(s) of softnpu, no hardware: Ascend910B3, CANN 9.1.0" in output
    assert (
        "on npu 64 with native kernels" in output
        and "ready for CPU and 8 software NPU(s)" in output
    ), output


def test_doctor_tells_the_chosen_chip_in_json_alone():
    options = ["--soc", "Ascend950PR_9599", "--cann", "9.1.0", "--devices", "2"]
    command = [*CLI, "softnpu", *options, "--", "python", *CLI, "doctor", "--json"]
    done = subprocess.run(
        command, env=PLAIN, capture_output=True, text=True, check=True, timeout=120
    )
    probes = json.loads(done.stdout)["probes"]
    found = [probes[name] for name in ("npus", "npu_name", "npu_cann", "npu_is_software")]
    assert found == [2, "Ascend950PR_9599", "9.1.0", True], found


def test_torch_npu_is_found_beside_the_environment(tmp_path, monkeypatch):
    """As installed, else beside it; a user's own Python path stays behind it; nowhere is said."""
    monkeypatch.setenv("PYTHONPATH", "/mine")
    monkeypatch.setattr(settings_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert settings_module.torch_npu_path() is None and environment()["PYTHONPATH"] == "/mine"
    (tmp_path / "npu" / "torch_npu").mkdir(parents=True)
    assert environment()["PYTHONPATH"] == f"{tmp_path}/npu{os.pathsep}/mine"
    monkeypatch.delenv("PYTHONPATH")
    assert environment()["PYTHONPATH"] == f"{tmp_path}/npu"
    monkeypatch.setattr(settings_module.importlib.util, "find_spec", lambda name: object())
    assert "PYTHONPATH" not in environment()


def test_a_missing_torch_npu_is_said_with_what_to_do(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(settings_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="command not found: no-such-command"):
        call(["no-such-command"])
    wanted = f"pip install --no-deps --target {tmp_path}/npu torch-npu==2.13.0"
    assert "torch_npu is not installed here" in (err := capfd.readouterr().err) and wanted in err


def on_device(program, **variables):
    """Run Python text with SOFTNPU_* as they are, unchecked by `settings`."""
    given = {f"SOFTNPU_{name}": value for name, value in variables.items()}
    return execute(["-c", program], {**environment(given), "TASK_QUEUE_ENABLE": "0"})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(
            ("memory", value)
            for value in (
                "64Mfoo",
                "nan",
                "inf",
                "1e30G",
                "-1G",
                "0",
                "",
                "64MM",
                "257G",
                " 1G",
                "iB",
            )
        ),
        *(("devices", value) for value in ("2x", "0", "33", "1.5")),
        *(("chaos", value) for value in ("abc", "-1", str(1 << 64))),
        *(("cann", value) for value in ("foo", "8", "8.", "-8.5", "8.5.0 ", "8.-5")),
        ("soc", "Ascend310P3"),
        *(
            ("fail", value)
            for value in ("bad", "aclrtMalloc:0:5", "aclrtMalloc:1:0", "aclrtMalloc:1:4294967296")
        ),
        *(
            ("fail", value)
            for value in ("aclrtMalloc:1:5x", "aclrtMalloc@core:1:5", ":1:5", "aclrtMalloc:-1:5")
        ),
    ],
)
def test_bad_settings_are_refused_by_both_sides(option, value):
    with pytest.raises(ArgumentError, match=f"softnpu: {option}: found "):
        settings(
            **{
                option: int(value)
                if option in ("devices", "chaos") and value.lstrip("-").isdigit()
                else value
            }
        )
    if not value:
        return  # an empty variable is an unset one
    program = (
        "import ctypes\nruntime = ctypes.CDLL('libascendcl.so')\n"
        "print('code', runtime.aclInit(None), runtime.aclInit(None))"
    )
    code, output = on_device(program, **{option.upper(): value})
    if option == "fail":
        assert code == 2 and "softnpu: SOFTNPU_FAIL: fault '" in output and "code" not in output, (
            output
        )
    else:
        assert "code 100000 100000" in output, output
        assert output.count(f"softnpu: SOFTNPU_{option.upper()}={value}: expected ") == 1, output


@pytest.mark.parametrize(
    "good",
    [
        {"memory": "64MiB"},
        {"memory": "1.5g"},
        {"cann": "8.3.RC1"},
        {"chaos": 7},
        {"fail": "a@idle:1:-1,b:2:3"},
    ],
)
def test_good_settings_are_taken_by_both_sides(good):
    program = "import ctypes\nprint('code', ctypes.CDLL('libascendcl.so').aclInit(None))"
    code, output = execute(["-c", program], environment(settings(**good)))
    assert code == 0 and "code 0" in output, output


@pytest.mark.parametrize(
    "options",
    [
        ["--memory", "64Mfoo"],
        ["--chaos", "abc"],
        ["--chaos", "-1"],
        ["--devices", "2x"],
        ["--fail", "bad"],
    ],
)
def test_bad_options_are_usage_errors(options):
    code, output = execute([*CLI, "softnpu", *options, "--", "python", "-c", "print('ran')"], PLAIN)
    assert code == 2 and options[0].strip("-") in output and "ran" not in output, output


def test_commands_that_cannot_run(tmp_path):
    plain_file = tmp_path / "plain"
    plain_file.write_text("text")
    for command in (str(plain_file), str(tmp_path)):
        code, output = execute([*CLI, "softnpu", "--", command], PLAIN)
        assert code == 3 and f"cannot execute {command}: Permission denied" in output, output


def test_refused_settings_reach_the_user_through_torch_npu():
    code, output = on_device("import torch\ntorch.ones(1, device='npu')", DEVICES="0")
    assert (
        code == 1
        and "SOFTNPU_DEVICES=0: expected 1 to 32" in output
        and "UnicodeDecodeError" not in output
    ), output


def test_error_text_keeps_its_address_until_it_is_asked_for_again():
    program = (
        "import ctypes\nruntime = ctypes.CDLL('libascendcl.so')\ntext = "
        "runtime.aclGetRecentErrMsg\n"
        "text.restype = ctypes.c_void_p\nruntime.aclInit(None)\nruntime.aclrtSetDevice(91)\nfirst "
        "= text()\nruntime.aclrtSetDevice(92)\n"
        "assert ctypes.string_at(first) == b'softnpu: device 91 of 8'\n"
        "assert text() == first and ctypes.string_at(first) == b'softnpu: device 92 of 8'\n"
    )
    code, output = on_device(program)
    assert code == 0, output


def test_faults_that_never_fired_are_named_once():
    faults = "aclnnNoSuch:1:5,aclrtNoSuch:1:5,aclnnMuls:1:161002"
    program = (
        "import torch\ntry:\n    torch.ones(1, device='npu') * 2\n"
        "except RuntimeError:\n    print('raised')\n"
    )
    code, output = on_device(program, FAIL=faults)
    assert code == 0 and "raised" in output, output
    assert "softnpu: planned fault aclrtNoSuch:1:5: there is no function aclrtNoSuch" in output
    assert (
        output.count("never fired") == 2 and "planned fault aclnnNoSuch:1:5 never fired" in output
    ), output
    code, output = on_device(
        "import ctypes\nctypes.CDLL('libascendcl.so').aclrtSetDevice(0)", FAIL="aclnnAdd:2:5"
    )
    # Without aclFinalize.
    assert code == 0 and output.count("planned fault aclnnAdd:2:5 never fired") == 1, output


def test_trace_lists_every_argument(tmp_path):
    program = (
        "import torch\nx = torch.ones(2, 3, device='npu')\n"
        "(x * 0.1).sum(dim=[0, 1])\ntorch.npu.synchronize()\n"
    )
    path = tmp_path / "%p-%p.json"
    code, output = on_device(program, TRACE=str(path), SOC="Ascend950PR_9599")
    assert code == 0, output
    (written,) = tmp_path.iterdir()
    first, second = written.stem.split("-")
    assert first == second and first.isdigit()
    events = json.loads(written.read_text())["traceEvents"]
    arguments = {event["name"]: event["args"]["arguments"] for event in events}
    assert "FLOAT[2,3], 0.1, FLOAT[2,3]" in arguments["aclnnMuls"], arguments
    assert "FLOAT[2,3], [0,1], false, FLOAT, FLOAT[]" in arguments["aclnnReduceSum"], arguments


@long
def test_traces_of_several_processes_keep_their_files(tmp_path):
    path = tmp_path / "a.b" / "trace.json"
    path.parent.mkdir()
    program = "import torch\n(torch.ones(1, device='npu') * 2).cpu()"
    for _ in range(2):
        code, output = on_device(program, TRACE=str(path))
        assert code == 0, output
    files = sorted(path.parent.iterdir())
    assert (
        len(files) == 2
        and path in files
        and f"softnpu: {path} exists: this process writes its trace to " in output
    )
    assert all(json.loads(file.read_text())["summary"] for file in files)


def test_trace_that_cannot_be_written_is_said_at_the_start_and_at_the_end(tmp_path):
    program = (
        "import torch\ntorch.ones(1, device='npu').cpu()\nimport "
        "sys\nprint('half-way', file=sys.stderr, flush=True)"
    )
    code, output = on_device(program, TRACE=str(tmp_path / "missing" / "x.json"))
    start, end = output.split("half-way")
    for part in (start, end):
        assert "softnpu: cannot write trace " in part and "No such file or directory" in part, (
            output
        )
    assert code == 0


def test_start_again_with_other_options():
    program = (
        "import os\nos.environ.pop('SOFTNPU_SOC', None)\nimport softnpu\n"
        "from softnpu.errors import EnvironmentFault\nfirst = softnpu.start(memory='64M')\n"
        "assert softnpu.start() is first\n"
        "assert softnpu.start(memory='64M', soc='Ascend910B3') is first\n"
        "try:\n    softnpu.start(memory='64M', devices=2)\n"
        "except EnvironmentFault as fault:\n    print(fault)\n"
    )
    code, output = execute(["-c", program], {**PLAIN, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    assert code == 0 and "SOFTNPU_DEVICES is 8, 2 was asked for" in output, output
