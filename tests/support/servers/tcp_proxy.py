"""A TCP proxy that stands before an HTTP server and spoils what passes, by rule."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass
class Fault:
    """What happens to requests whose first line begins with `request`.

    Args:
        delay: seconds before the request is passed on.
        answer: a status line and a body, given in the server's place when the request has come in whole.
        after: bytes of the body that are passed on before `then` is called and, if `cut`, the connection is reset.
        times: how many requests it spoils.
    """

    request: str
    delay: float = 0.0
    answer: tuple[str, str] | None = None
    after: int | None = None
    then: Callable[[], object] = lambda: None
    cut: bool = True
    times: int = 1_000_000


class Proxy:
    """Takes one request from each connection. `seen` holds their first lines."""

    def __init__(self, target: str):
        address, port = target.removeprefix("http://").split(":")
        self.target = (address, int(port))
        self.faults: list[Fault] = []
        self.seen: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    @contextlib.contextmanager
    def spoiling(self, *faults: Fault) -> Iterator[None]:
        self.faults = list(faults)
        try:
            yield
        finally:
            self.faults = []

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._guarded, args=[connection], daemon=True).start()

    def _guarded(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            try:
                self._pass(client)
            finally:
                client.shutdown(socket.SHUT_RDWR)  # closing is not enough while a thread is waiting for its words

    def _pass(self, client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            if not (data := client.recv(65536)):
                return
            head += data
        head, _, body = head.partition(b"\r\n\r\n")
        line = head.split(b"\r\n")[0].decode()
        self.seen.append(line)
        fault = next((one for one in self.faults if line.startswith(one.request) and one.times > 0), Fault("", times=0))
        fault.times -= 1
        time.sleep(fault.delay)
        if fault.answer is not None:
            length = next((int(x[15:]) for x in head.lower().split(b"\r\n") if x.startswith(b"content-length:")), 0)
            while len(body) < length and (data := client.recv(1 << 20)):
                body += data
            status, text = fault.answer
            reply = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n"
            client.sendall(f"{reply}Connection: close\r\n\r\n{text}".encode())
            return
        with socket.create_connection(self.target) as server:
            server.sendall(head + b"\r\nConnection: close\r\n\r\n" + body)
            threading.Thread(target=self._up, args=[client, server, fault, len(body)], daemon=True).start()
            with contextlib.suppress(OSError):
                while data := server.recv(65536):
                    client.sendall(data)

    def _up(self, client: socket.socket, server: socket.socket, fault: Fault, passed: int) -> None:
        """The rest of the request's body, as far as it may go."""
        with contextlib.suppress(OSError):
            while True:
                if fault.after is not None and passed >= fault.after:
                    fault.then()
                    if fault.cut:
                        _reset(client, server)
                        return
                    fault.after = None
                if not (data := client.recv(65536)):
                    return
                server.sendall(data)
                passed += len(data)


def _reset(*sockets: Any) -> None:
    for one in sockets:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.shutdown(socket.SHUT_RDWR)
