"""Protocols without any I/O: the transport here only writes down what it is asked for."""

from __future__ import annotations

from typing import Any

import pytest

from muxio.server import BufferedProtocol, EchoProtocol, Protocol


class RecordingTransport:
    """A transport in which every method only notes its call."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.asked.append((name, *arguments))


def connect(protocol: Protocol) -> RecordingTransport:
    transport: Any = RecordingTransport()
    protocol.connection_made(transport)
    return transport  # type: ignore[no-any-return]


def test_echo_writes_what_it_receives_in_order() -> None:
    protocol = EchoProtocol()
    transport = connect(protocol)
    protocol.data_received(b"one")
    protocol.data_received(b"two")
    assert transport.asked == [("write", b"one"), ("write", b"two")]


def test_echo_reads_nothing_while_its_peer_does_not() -> None:
    protocol = EchoProtocol()
    transport = connect(protocol)
    protocol.pause_writing()
    assert transport.asked == [("pause_reading",)]
    protocol.resume_writing()
    assert transport.asked == [("pause_reading",), ("resume_reading",)]


def test_echo_closes_after_eof_by_its_answer() -> None:
    """A false answer closes the transport, which sends what is queued first: nothing is to be done here."""
    protocol = EchoProtocol()
    transport = connect(protocol)
    assert not protocol.eof_received()
    protocol.connection_lost(None)
    assert transport.asked == []


@pytest.mark.parametrize("kind", [Protocol, BufferedProtocol])
def test_a_callback_that_is_not_overridden_does_nothing_but_keep_the_transport(kind: type[Protocol]) -> None:
    protocol = kind()
    transport = connect(protocol)
    assert protocol.transport is transport
    assert not protocol.eof_received()
    protocol.pause_writing()
    protocol.resume_writing()
    protocol.connection_lost(OSError())
    assert transport.asked == []


def test_received_bytes_are_ignored_by_default() -> None:
    protocol = Protocol()
    transport = connect(protocol)
    protocol.data_received(b"x")
    assert transport.asked == []


def test_a_buffered_protocol_has_to_bring_its_buffer() -> None:
    with pytest.raises(NotImplementedError):
        BufferedProtocol().get_buffer(-1)
    with pytest.raises(NotImplementedError):
        BufferedProtocol().buffer_updated(1)
