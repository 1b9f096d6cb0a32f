"""A small HTTP/1.1 client on asyncio: one connection that is kept, with little work per request, for load tests."""

from __future__ import annotations

import asyncio
import json


class Connection:
    """One kept connection to a service on loopback."""

    def __init__(self, port: int):
        self._port = port

    async def __aenter__(self) -> Connection:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def post(self, body: bytes, path: str = "/predict") -> tuple[int, bytes]:
        """Send a request; return the status and the body of the answer.

        Raises ConnectionError or asyncio.IncompleteReadError if the connection ends before that.
        """
        self._writer.write(
            b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(body)) + body
        )
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head[9:12])
        if b"transfer-encoding: chunked" in head:
            return status, await self._chunks()
        length = int(head.partition(b"content-length: ")[2].split(b"\r\n", 1)[0])
        return status, await self._reader.readexactly(length)

    async def _chunks(self) -> bytes:
        chunks = []
        while length := int(await self._reader.readline(), 16):
            chunks.append(await self._reader.readexactly(length))
            await self._reader.readline()
        await self._reader.readline()
        return b"".join(chunks)


def predict_body(texts: list[str], ids: list[str] | None = None) -> bytes:
    """Return the body of `POST /predict`."""
    return json.dumps({"texts": texts} | ({} if ids is None else {"ids": ids})).encode()
