"""Ranks as forks of the test's process: they share its imports and models, and cost no start."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def fork_ranks(world: int, work: Callable[[int], Any]) -> list[tuple[Any, Any]]:
    """(process, receiving end of its pipe) of `world` forks that run work(rank) as torchrun's
    processes would.
    """
    fork, port, started = multiprocessing.get_context("fork"), free_port(), []

    def run(rank: int, pipe: Any) -> None:
        torch.set_num_threads(1)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
        try:
            pipe.send((True, work(rank)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
        pipe.close()

    for rank in range(world):
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(target=run, args=(rank, sender), daemon=True)
        process.start()
        sender.close()
        started.append((process, receiver))
    return started


def on_ranks(world: int, work: Callable[[int], Any]) -> list[Any]:
    """What work(rank) gives on each of `world` ranks."""
    started, results = fork_ranks(world, work), []
    for process, receiver in started:
        assert receiver.poll(120), "a rank does not answer"
        good, result = receiver.recv()
        assert good, result
        results.append(result)
        process.join()
    return results
