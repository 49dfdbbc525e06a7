"""A load generator that costs little: one thread, non-blocking sockets, prepared bytes."""

from __future__ import annotations

import json
import re
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles

LENGTH = re.compile(rb"content-length: *(\d+)", re.I)
CHUNK = 1 << 16

# Makes the next request of a connection from its last answer (None at first): (kind, bytes).
Script = Iterator[tuple[str, bytes]]


@dataclass
class Result:
    """Requests per second and latencies in ms, by kind of request."""

    seconds: float = 0.0
    latencies: dict[str, list[float]] = field(default_factory=dict)
    failures: int = 0

    def rate(self, kind: str) -> float:
        return len(self.latencies.get(kind, ())) / self.seconds

    def percentile(self, kind: str, percent: int) -> float:
        values = self.latencies[kind]
        return quantiles(values, n=100, method="inclusive")[percent - 1] if values[1:] else 0.0


def request(path: str, token: str, body: dict[str, object]) -> bytes:
    data = json.dumps(body).encode()
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    ).encode() + data


class Connection:
    def __init__(self, port: int, script: Callable[[Connection], Script]) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.answer = b""
        self.script = script(self)
        self.received = b""
        self.kind = ""
        self.sent_at = 0.0

    def send_next(self) -> None:
        self.kind, data = next(self.script)
        self.received = b""
        self.sent_at = time.perf_counter()
        self.socket.sendall(data)

    def receive(self) -> bool:
        """Read what there is; True when the answer is complete."""
        data = self.socket.recv(CHUNK)
        if not data:
            raise ConnectionError("the server closed the connection")
        self.received += data
        head, separator, body = self.received.partition(b"\r\n\r\n")
        if not separator:
            return False
        length = LENGTH.search(head)
        if length is None or len(body) < int(length[1]):
            return False
        self.answer = body
        return True

    @property
    def succeeded(self) -> bool:
        return self.received[9:10] == b"2"


def run(port: int, clients: int, seconds: float, script: Callable[[Connection], Script]) -> Result:
    """Keep ``clients`` connections busy for ``seconds``."""
    result = Result()
    selector = selectors.DefaultSelector()
    connections = [Connection(port, script) for _ in range(clients)]
    for connection in connections:
        selector.register(connection.socket, selectors.EVENT_READ, connection)
        connection.send_next()
    begin = time.perf_counter()
    end = begin + seconds
    while time.perf_counter() < end:
        for key, _ in selector.select(0.2):
            connection = key.data
            if not connection.receive():
                continue
            took = (time.perf_counter() - connection.sent_at) * 1000
            if connection.succeeded:
                result.latencies.setdefault(connection.kind, []).append(took)
            else:
                result.failures += 1
            connection.send_next()
    result.seconds = time.perf_counter() - begin
    for connection in connections:
        connection.socket.close()
    return result


def run_once(port: int, script: Callable[[Connection], Script]) -> None:
    """Send what a script has, one request after the other; each must succeed."""
    connection = Connection(port, lambda _: iter(()))
    connection.script = script(connection)
    with connection.socket:
        while True:
            try:
                connection.send_next()
            except StopIteration:
                return
            while not connection.receive():
                pass
            if not connection.succeeded:
                raise RuntimeError(connection.answer[:300].decode())


def cpu_seconds(pids: list[int]) -> float:
    """User and system CPU time of the processes so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / 100


def descendants(pid: int) -> list[int]:
    """The process and all below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += descendants(int(child))
    return found
