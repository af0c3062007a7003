"""The application behind a real server in this process, with every byte that it receives and sends kept."""

import socket
import threading
import time
from contextlib import contextmanager

import uvicorn


class Recorded:
    """An ASGI application that keeps what goes through it."""

    def __init__(self, app):
        self.app, self.sent, self.asked = app, [], []

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        self.asked.append(f"{scope['method']} {scope['path']}")

        async def keep(message):
            self.sent.append(
                b"".join(b"%b: %b\n" % pair for pair in message.get("headers", ())) + message.get("body", b"")
            )
            await send(message)

        return await self.app(scope, receive, keep)


@contextmanager
def served(app):
    """(address, what was recorded) of the application at a free port."""
    recorded = Recorded(app)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        free.listen(64)
        server = uvicorn.Server(uvicorn.Config(recorded, log_level="error", server_header=False, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [free]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{free.getsockname()[1]}", recorded
        server.should_exit = True
        thread.join(10)
