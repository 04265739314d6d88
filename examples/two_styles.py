"""One job in two styles: an echo server with a thread per connection, and one with an event loop.

Run it: ``python examples/two_styles.py``. It serves ten clients with each, and shows that they cannot tell.
"""

from __future__ import annotations

import socket
import threading

from muxio.server import Protocol, Server, ThreadedServer
from muxio.server.threaded import Connection


# Style one. Each connection has a thread, which waits inside recv() and sendall(). What happens next is the next line.
def echo(connection: Connection) -> None:
    while data := connection.recv():
        connection.sendall(data)


# Style two. One thread waits for all connections at once and calls back. Nothing here may wait, so what sendall() did
# by itself, to stop taking from a peer that does not take back, has to be said.
class Echo(Protocol):
    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


def talk(server: Server | ThreadedServer, clients: int = 10) -> list[bytes]:
    """What clients hear that are all connected at the same time."""
    sockets = [socket.create_connection(server.server_address) for _ in range(clients)]
    for number, sock in enumerate(sockets):
        sock.sendall(b"I am client %d" % number)
        sock.shutdown(socket.SHUT_WR)
    answers = []
    for sock in sockets:
        with sock, sock.makefile("rb") as stream:
            answers.append(stream.read())
    return answers


def serve_and_talk(server: Server | ThreadedServer) -> list[bytes]:
    with server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            return talk(server)
        finally:
            server.shutdown()
            thread.join()


def main() -> None:
    threads = serve_and_talk(ThreadedServer(("127.0.0.1", 0), echo))
    events = serve_and_talk(Server(("127.0.0.1", 0), Echo))
    print(f"threads:     {threads[0].decode()} ... {threads[-1].decode()}")
    print(f"event loop:  {events[0].decode()} ... {events[-1].decode()}")
    print("the same" if threads == events else "different!")


if __name__ == "__main__":
    main()
