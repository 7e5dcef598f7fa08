"""Noticing that another rank has ended, whatever the ranks are waiting for.

Rank 0 holds a connection to every other rank. Systems close the connections of a process that ends,
however it ends, and keepalive finds a host that is gone; a busy or stopped process is not taken for
an ended one. Gloo sees the end of a peer that it talks to; hccl waits for it for half an hour.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch.distributed.distributed_c10d import Store, _get_default_store

from dsv4_ascend.model.parallel import PeerFault
from dsv4_backend.errors import EnvironmentFault

ENDED = 3
"""Exit code of a process whose peer has ended."""
_KEY = "dsv4/watch"
_GOODBYE = b"."
_GREETING = 64
"""Bytes of the first message: the store's token, the rank."""
MEETING = 120.0
"""Seconds for all ranks to come (also to the store: ranks.py)."""
_PATIENCE = 4.0
"""Seconds after which a fault of an exchange may be told without knowing who has ended."""
_KEEPALIVE = {"TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 4}


def _kept_alive(connection: socket.socket) -> socket.socket:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


class _Watch:
    """Connections by rank: of rank 0 to all others, of others to rank 0."""

    def __init__(self, rank: int, world: int) -> None:
        self._rank, self._world, self._left = rank, world, False
        store = _get_default_store()
        self._peers = self._accept(store) if rank == 0 else {0: self._connect(store)}
        threading.Thread(target=self._look, daemon=True, name="dsv4 watch").start()

    def _accept(self, store: Store) -> dict[int, socket.socket]:
        token = secrets.token_bytes(16)
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        peers: dict[int, socket.socket] = {}
        with socket.create_server(
            ("", 0), family=family, backlog=self._world, dualstack_ipv6=both
        ) as server:
            server.settimeout(MEETING)
            port = server.getsockname()[1]
            store.set(_KEY, f"{os.environ['MASTER_ADDR']} {port} {token.hex()}")
            while len(peers) < self._world - 1:
                connection, _ = server.accept()
                connection.settimeout(_PATIENCE)
                with suppress(OSError, ValueError):
                    told = connection.recv(_GREETING, socket.MSG_WAITALL).split()
                    if len(told) == 2 and secrets.compare_digest(told[0], token.hex().encode()):
                        peers[int(told[1])] = _kept_alive(connection)
        return peers

    def _connect(self, store: Store) -> socket.socket:
        host, port, token = store.get(_KEY).decode().split()
        connection = socket.create_connection((host, int(port)), timeout=MEETING)
        connection.sendall(f"{token} {self._rank}".encode().ljust(_GREETING))
        return _kept_alive(connection)

    def _look(self) -> None:
        """Wait for what connections say: a goodbye, the number of a rank that has ended, or their
        end.
        """
        selector = selectors.DefaultSelector()
        for rank, connection in self._peers.items():
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ, rank)
        while selector.get_map():
            for key, _ in selector.select():
                told = b""
                with suppress(OSError):
                    told = key.fileobj.recv(64)  # type: ignore[union-attr]
                if told.endswith(_GOODBYE) or self._left:
                    selector.unregister(key.fileobj)
                elif told:
                    self._end(int(told))
                else:
                    self._end(key.data)

    def _end(self, ended: int) -> None:
        """Tell the other ranks and the user who has ended, and end."""
        for rank, connection in self._peers.items():
            if rank != ended:
                with suppress(OSError):
                    connection.sendall(str(ended).encode())
        line = (
            f"rank {self._rank} of {self._world}: rank {ended} has ended before its work was done"
        )
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        with suppress(OSError):
            os.write(2, f"dsv4-ascend: {line}\n".encode())
        os._exit(ENDED)

    def leave(self, failed: bool) -> None:
        """Say nothing of other ranks any more; and goodbye, unless this rank fails: then its end
        says that.
        """
        self._left = True
        if failed:
            return
        for connection in self._peers.values():
            with suppress(OSError):
                connection.sendall(_GOODBYE)


@contextmanager
def watching(rank: int, world: int) -> Iterator[None]:
    """While inside, the end of another rank ends this process, with a line that names it.

    A fault of an exchange is told only when nobody's end has explained it for a while.
    EnvironmentFault if the ranks do not reach rank 0.
    """
    try:
        watch = _Watch(rank, world)
    except (OSError, RuntimeError) as error:
        raise EnvironmentFault(f"rank {rank} of {world}: no connection: {error}") from error
    try:
        yield
    except PeerFault:
        time.sleep(_PATIENCE)
        raise
    except BaseException:
        watch.leave(failed=True)
        raise
    else:
        watch.leave(failed=False)
