"""Work for a client that has gone is cancelled."""

from __future__ import annotations

import asyncio
from typing import Any


class Disconnects:
    """ASGI: cancels the app where the client disconnects before the answer is complete; servers only stop sending."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages: asyncio.Queue[Any] = asyncio.Queue()
        complete = False

        async def watch() -> None:
            message: Any = {}
            while message.get("type") != "http.disconnect":
                message = await receive()
                messages.put_nowait(message)
            if not complete:
                work.cancel()

        async def send_on(message: Any) -> None:
            nonlocal complete
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        work = asyncio.ensure_future(self.app(scope, messages.get, send_on))
        watching = asyncio.ensure_future(watch())
        try:
            await asyncio.wait({work})
        finally:
            work.cancel()
            watching.cancel()
        if not work.cancelled():
            work.result()
