"""A protocol of one's own in ten lines: it answers in capitals.

Run it: ``python examples/own_protocol.py``, then ``nc 127.0.0.1 8008``. Ctrl-C stops it.
"""

from __future__ import annotations

import sys

from muxio.server import Protocol, serve


class Upper(Protocol):
    def data_received(self, data: bytes) -> None:
        self.transport.write(data.upper())

    def pause_writing(self) -> None:  # the peer does not read its answers: take no more from it
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


if __name__ == "__main__":
    serve(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 8008), Upper)
