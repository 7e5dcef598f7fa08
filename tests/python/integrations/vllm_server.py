"""An OpenAI server of vLLM over the small model, in a process group of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import vllm_tier

from dsv4_ascend.tiny.release import SHIPPED

MODEL = "small"


class Server:
    """Requests to it; `tokens` gives the ids of a greedy completion of ids."""

    def __init__(self, port: int, process: subprocess.Popen[bytes]) -> None:
        self.port, self.process = port, process

    def open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """An open answer."""
        data = None if body is None else json.dumps({"model": MODEL, **body}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=300)

    def post(self, path: str, **body: Any) -> Any:
        """The answer to a JSON body."""
        with self.open(path, body) as answer:
            return json.load(answer)

    def events(self, path: str, **body: Any) -> Iterator[Any]:
        """Parts of a streamed answer; closing the iterator hangs up."""
        with self.open(path, {**body, "stream": True}) as answer:
            for line in answer:
                text = line.decode().strip().removeprefix("data: ")
                if text and text != "[DONE]":
                    yield json.loads(text)

    def tokens(self, ids: list[int], new: int) -> list[int]:
        """New ids, greedy."""
        answer = self.post(
            "/v1/completions",
            **{"prompt": ids, "max_tokens": new, "temperature": 0},
            **{"ignore_eos": True, "return_token_ids": True},
        )
        return answer["choices"][0]["token_ids"]

    def metric(self, name: str) -> float:
        """The sum of a metric's values."""
        with self.open("/metrics") as answer:
            found = re.findall(rf"^vllm:{name}\{{.*\}} (.+)$", answer.read().decode(), re.M)
        return sum(map(float, found))

    def resident(self) -> int:
        """Bytes of memory of all its processes, without mapped files."""
        group = os.getpgid(self.process.pid)
        total = 0
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                if os.getpgid(int(status.parent.name)) == group:
                    total += int(re.search(r"RssAnon:\s+(\d+)", status.read_text())[1]) << 10
            except (OSError, TypeError):
                continue
        return total


@contextmanager
def serving(log: Path, *options: str) -> Iterator[Server]:
    """A server that is ready; ended with all its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(vllm_tier.python(), "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"),
        *("--model", str(SHIPPED), "--served-model-name", MODEL, "--port", str(port)),
        *("--host", "127.0.0.1", "--max-model-len", "2048", "--tool-call-parser", "deepseek_v4"),
        *("--enable-auto-tool-choice", "--reasoning-parser", "deepseek_v4", *options),
    ]
    environ = {**os.environ, **vllm_tier.ENVIRON}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=environ, stdout=file, stderr=file, start_new_session=True
        )
    server = Server(port, process)
    try:
        deadline = time.monotonic() + 400
        while True:
            try:
                server.open("/health").close()
                break
            except (urllib.error.URLError, ConnectionError):
                ended = process.poll() is not None or time.monotonic() > deadline
                assert not ended, log.read_text()[-6000:]
                time.sleep(0.5)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
