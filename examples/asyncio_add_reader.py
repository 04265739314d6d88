"""asyncio with `add_reader` and with more sockets than select() takes. On Windows neither of its own loops has both.

Run it: ``python examples/asyncio_add_reader.py 1000``; without a number it makes 100 connections.
"""

from __future__ import annotations

import asyncio
import socket
import sys

import muxio


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(await reader.readline())
    await writer.drain()
    writer.close()


async def talk(count: int) -> None:
    loop = asyncio.get_running_loop()
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    answers: asyncio.Queue[bytes] = asyncio.Queue()

    def ready(sock: socket.socket) -> None:  # called by the loop itself: no stream and no transport between
        loop.remove_reader(sock)
        with sock:
            answers.put_nowait(sock.recv(100))

    for number in range(count):
        sock = socket.socket()
        sock.setblocking(False)
        await loop.sock_connect(sock, server.sockets[0].getsockname())
        loop.add_reader(sock, ready, sock)
        await loop.sock_sendall(sock, b"I am connection %d\n" % number)
    said = {await answers.get() for _ in range(count)}
    print(f"{len(said)} connections were answered")
    server.close()
    await server.wait_closed()


if __name__ == "__main__":
    loop = asyncio.SelectorEventLoop(muxio.Selector())  # the best backend here; on Windows Selector("afd")
    try:
        loop.run_until_complete(talk(int(sys.argv[1]) if len(sys.argv) > 1 else 100))
    finally:
        loop.close()
