# SPDX-License-Identifier: MIT OR Apache-2.0
"""A stand-in for the server that the benchmarks measure: it answers as it is told to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

__all__ = ["Reply", "StandIn", "running_stand_in"]

MODEL = "stand-in"


@dataclass(frozen=True)
class Reply:
    """How one request is answered."""

    status: int = 200
    tokens: int | None = 7
    hang_up: bool = False
    """Close the connection and say nothing."""
    last: bool = False
    """Close the connection after the answer, and say so."""
    length: bool = True
    """Say how long the body is."""
    pieces: int = 1
    """Send the answer in so many parts."""


@dataclass
class StandIn:
    """Where it listens, what arrived when (``time.perf_counter``), and which bodies."""

    url: str = ""
    arrivals: list[float] = field(default_factory=list)
    bodies: list[dict] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    connections: set[tuple] = field(default_factory=set)
    metrics: str = ""


@contextmanager
def running_stand_in(
    reply: Callable[[int], Reply] = lambda number: Reply(), *, seconds: float = 0
) -> Iterator[StandIn]:
    """Answer request ``number`` with ``reply(number)``, one at a time, each after ``seconds``."""
    stand_in = StandIn()
    one_at_a_time = threading.Lock()
    noted = threading.Lock()

    class Answering(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self.answer(Reply(), json.dumps({"data": [{"id": MODEL}]}).encode())
            else:
                self.answer(Reply(200 if stand_in.metrics else 404), stand_in.metrics.encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with noted:
                number = len(stand_in.arrivals)
                stand_in.arrivals.append(time.perf_counter())
                stand_in.bodies.append(body)
                stand_in.keys.add(self.headers["Authorization"])
                stand_in.connections.add(self.client_address)
            if seconds:
                with one_at_a_time:
                    time.sleep(seconds)
            how = reply(number)
            if how.hang_up:
                self.close_connection = True
                return
            answer: dict[str, object] = {"data": [{"embedding": [0.5] * 1000}], "model": MODEL}
            if how.status != 200:
                answer = {"error": {"message": "not today"}}
            elif how.tokens is not None:
                answer["usage"] = {"prompt_tokens": how.tokens, "total_tokens": how.tokens}
            self.answer(how, json.dumps(answer).encode())

        def answer(self, how: Reply, body: bytes) -> None:
            head = f"HTTP/1.1 {how.status} Whatever\r\nContent-Type: application/json\r\n"
            if how.length:
                head += f"CONTENT-LENGTH: {len(body)}\r\n"
            if how.last or not how.length:
                head += "Connection: close\r\n"
                self.close_connection = True
            whole = head.encode() + b"\r\n" + body
            step = -(-len(whole) // how.pieces)
            for start in range(0, len(whole), step):
                self.wfile.write(whole[start : start + step])
                self.wfile.flush()
                if how.pieces > 1:
                    time.sleep(0.002)

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Answering) as server:
        stand_in.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield stand_in
        finally:
            server.shutdown()
            thread.join()
