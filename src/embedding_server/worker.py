"""A process of ``--workers``: serves, and does what its supervisor says.

Run as ``python -m embedding_server.worker LISTENER CONTROL``, two file descriptors: the listening
socket, and a socket to the supervisor. The settings come by standard input, pickled. By the
control socket comes a command a line: ``drain``, ``reload``, and ``siblings`` with what readiness
should say of them, as JSON; back go ``ready``, or ``failed`` with a message. Its end means that
the supervisor has gone.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import socket
import sys

from embedding_server.errors import EmbeddingServerError
from embedding_server.logs import set_up_logging
from embedding_server.service import Service
from embedding_server.settings import Settings

__all__ = ["main"]


def main(listener_descriptor: int, control_descriptor: int) -> int:
    """Serve until told to stop; the exit code."""
    listener = socket.socket(fileno=listener_descriptor)
    control = socket.socket(fileno=control_descriptor)
    settings = Settings.model_construct(**pickle.load(sys.stdin.buffer))  # noqa: S301 - our parent's
    set_up_logging(settings.log_format, settings.log_level)

    def tell(line: str) -> None:
        control.send(line.encode() + b"\n")

    async def obey() -> None:
        reader, writer = await asyncio.open_connection(sock=control.dup())
        async for line in reader:
            command, _, argument = line.decode().strip().partition(" ")
            match command:
                case "drain":
                    service.drain()
                case "reload":
                    service.reload()
                case "siblings":
                    service.app.state.siblings = json.loads(argument)
        writer.close()
        service.drain()

    tasks: list[asyncio.Task[None]] = []
    try:
        service = Service(
            settings,
            on_start=lambda: tasks.append(asyncio.ensure_future(obey())),
            on_loaded=lambda: tell("ready"),
        )
        with listener:
            return service.run(listener)
    except EmbeddingServerError as error:
        tell(f"failed {json.dumps(str(error))}")
        return 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
