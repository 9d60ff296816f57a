# SPDX-License-Identifier: BSD-3-Clause
"""Clients of an OpenEnv environment, over WebSocket and over HTTP.

Part of the minimal OpenEnv Benchmark environment, version 1.0.0: benchmark.py (the
environment), client.py (this file: its clients), server.py (its server).

How one ``step`` travels: the caller's action, a dataclass, becomes JSON (`to_json`); the
JSON becomes a frame (`Protocol.send`) whose bytes go out (`WebSocket.send`), or the body of
an HTTP request; the server's answer comes back the same way (`WebSocket.recv`) and becomes
the observation, a dataclass again (`read_json`).

The file goes from the bytes up: RFC 6455, the WebSocket protocol (either end of it: the
server uses the same classes); JSON and dataclasses; the environment clients; the Docker
provider; the command line. Not here: WebSocket extensions (so no compression),
subprotocols, and HTTP proxies for WebSocket connections.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import functools
import http.client
import importlib
import io
import json
import operator
import os
import re
import select
import socket
import struct
import sys
import threading
import time
import types
import typing
import uuid
import weakref
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from enum import Enum
from hashlib import sha1
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, Union
from urllib.parse import quote, urlsplit

if TYPE_CHECKING:  # a star that is not found names nothing
    from typing import Self

    from benchmark import *  # type: ignore[import-not-found,unused-ignore]

if __name__ == "__main__" and not (__package__ or find_spec("benchmark")):
    sys.exit("client.py: benchmark.py is not beside it, or Python's -I or -P hides it")
if TYPE_CHECKING or __package__:  # the files were copied into a package
    from .benchmark import BenchmarkAction, BenchmarkObservation, BenchmarkState  # type: ignore[import-not-found,no-redef,unused-ignore]
else:
    from benchmark import BenchmarkAction, BenchmarkObservation, BenchmarkState

# What server.py takes from here, and who has the files in a package.
__all__: list[str] = [
    "BOUNDS", "EAGER_SECONDS", "GOING_AWAY", "INTERNAL_ERROR", "NORMAL", "TRY_AGAIN_LATER",
    "VERSION", "BenchmarkEnv", "BenchmarkEnvWS", "ConnectionClosed",
    "EnvClient", "HTTPEnvClient", "Invalid", "LocalDockerProvider", "Protocol", "ServerError",
    "StepResult", "WebSocket", "WebSocketEnvClient", "accept_key", "decode_json",
    "describe_fault", "encode_json", "fields_of", "read_fields", "read_json", "say",
    "split_type", "to_json",
]  # fmt: skip

VERSION: str = sys.modules[BenchmarkState.__module__].__version__
Trace = Callable[[str], None]  # is given what crosses the wire, line by line
Headers = Mapping[str, str]
JSON = dict[str, Any]
Header = tuple[bool, int, bytes, int]  # of a frame: FIN, opcode, masking key, length

# ---------------------------------------------------------------------------
# RFC 6455: the WebSocket protocol
# ---------------------------------------------------------------------------

# Opcodes (section 5.2). Those from 8 up are control frames.
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
OPCODES = {0: "continuation", 1: "text", 2: "binary", 8: "close", 9: "ping", 10: "pong"}

# Status codes of a Close frame (section 7.4.1). NO_STATUS and ABNORMAL never travel: they
# stand for a Close frame without a code, and for a connection that ended without one.
NORMAL, GOING_AWAY, PROTOCOL_ERROR, NO_STATUS, ABNORMAL = 1000, 1001, 1002, 1005, 1006
INVALID_DATA, MESSAGE_TOO_BIG, INTERNAL_ERROR, TRY_AGAIN_LATER = 1007, 1009, 1011, 1013


class ConnectionClosed(ConnectionError):
    """The connection is over. ``code`` and ``reason`` are those of section 7.4."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(code, reason)
        self.code, self.reason = code, reason

    def __str__(self) -> str:
        return f"WebSocket connection closed: {self.code} {self.reason}".rstrip()


def accept_key(key: str) -> str:
    """Return the ``Sec-WebSocket-Accept`` that answers a ``Sec-WebSocket-Key`` (4.2.2)."""
    guid = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    return b64encode(sha1((key + guid).encode("latin-1")).digest()).decode()


def apply_mask(data: bytes | bytearray, key: bytes) -> bytes | bytearray:
    """XOR ``data`` with the 4-byte ``key``, repeated (section 5.3). Its own inverse."""
    size = len(data)
    if size < 1024:
        pad = (key * (size // 4 + 1))[:size]
        number = int.from_bytes(data, "big") ^ int.from_bytes(pad, "big")
        return number.to_bytes(size, "big")
    # A table look-up for each of the four strided slices: on 1 MB five times as fast.
    masked = bytearray(data)
    for i in range(4):
        masked[i::4] = masked[i::4].translate(_xor_table(key[i]))
    return masked


@functools.lru_cache(maxsize=256)
def _xor_table(key: int) -> bytes:
    return bytes(key ^ byte for byte in range(256))


class Protocol:
    """One end of a WebSocket connection without I/O: no socket, no lock, no clock.

    Bytes go in by `receive`; whole messages come out in ``inbox``, str if text and bytes
    if binary; bytes to send wait in ``outbox``: what `send` and `close` put there, and by
    itself the pongs and the Close frame that answer the peer. Events keep their order: a
    Close, or a fault, counts once the messages before it were taken from the inbox.

    Args:
        client: which end this is; a client masks what it sends, a server must not.
        max_size: the largest message that is taken, in bytes.
        trace: is called with a description of every frame.
    """

    def __init__(self, client: bool, max_size: int, trace: Trace | None = None) -> None:
        self.client, self.max_size, self._trace = client, max_size, trace
        self.inbox: deque[str | bytes] = deque()
        self.outbox = bytearray()
        self.close_sent = self.close_received = False  # after which nothing may come
        self.ending: ConnectionClosed | None = None  # why no more bytes are taken
        self.closed: ConnectionClosed | None = None  # the same, once all is answered
        self.answering = False  # whether a fault waits until `send` answers a message
        self.expected = 0  # bytes that the current frame still lacks
        self._buffer = bytearray()  # bytes that are not parsed yet
        self._kind = CONTINUATION  # the opcode of the message that is being read
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._parser = self._parse()

    @property
    def unfinished(self) -> bool:
        """Whether a part of a message or of a control frame has come, and not the rest."""
        return bool(self._buffer or self._kind or self.expected)

    def receive(self, data: bytes) -> None:
        """Take bytes from the peer; those after the end of the connection are dropped."""
        if self.ending is None:
            self._buffer += data
            try:
                next(self._parser, None)
            except UnicodeDecodeError:
                self.ending = ConnectionClosed(INVALID_DATA, "invalid UTF-8")
            except ConnectionClosed as fault:
                self.ending = fault
        self.settle()

    def receive_eof(self, reason: str = "the peer went away without Close") -> None:
        """Note that the TCP connection has ended."""
        self.ending = self.ending or ConnectionClosed(ABNORMAL, reason)
        self.settle()

    def settle(self) -> None:
        """Answer the peer's Close if all messages before it were taken, and a fault or the
        end of the connection once they were answered, too.
        """
        waits = self.inbox or self.answering and not self.close_received
        if self.ending and not waits and not self.closed:
            words = "" if self.close_received else self.ending.reason
            self.close(self.ending.code, words)
            self.closed = self.ending
            self._buffer.clear()
            self._parser.close()

    def _parse(self) -> Generator[None, None, None]:
        """Take frames off the buffer, one after the other; yield while bytes are missing."""
        message = bytearray()
        while not self.ending:
            fin, opcode, key, size = yield from self._parse_header(len(message))
            text = self._kind == TEXT and opcode < CLOSE
            frame = bytearray()
            while True:
                part: bytes | bytearray = self._buffer[: size - len(frame)]
                del self._buffer[: len(part)]
                if key:
                    turn = len(frame) % 4
                    part = apply_mask(part, key[turn:] + key[:turn])
                frame += part
                self.expected = size - len(frame)
                if text:
                    self._check_text(part, fin and not self.expected)
                if not self.expected:
                    break
                yield
            if self._trace:
                self._trace(f"<- {_describe(fin, opcode, bool(key), frame)}")
            if opcode >= CLOSE:
                self._obey(opcode, bytes(frame))
                continue
            message += frame
            if fin:
                if not self.close_sent:  # else it came too late
                    self.inbox.append(message.decode() if text else bytes(message))
                self._kind = CONTINUATION
                message = frame = part = bytearray()  # an idle session holds no message

    def _parse_header(self, before: int) -> Generator[None, None, Header]:
        """Take the header of a frame (section 5.2) off the buffer: FIN, opcode, masking key
        and length. ``before`` is the size of the same message's earlier frames.

        bit  0    1-3   4-7     8     9-15
           +----+-----+--------+------+---------+------------------+-----------------+
           |FIN | RSV | opcode | MASK | length  | extended length  | masking key     |
           |    |     |        |      | (7 bit) | (16 or 64 bit, if| (32 bit,        |
           |    |     |        |      |         | length is 126,127| if MASK is set) |
           +----+-----+--------+------+---------+------------------+-----------------+
        """
        buffer = self._buffer
        while len(buffer) < 2:
            yield
        fin, opcode = bool(buffer[0] & 0x80), buffer[0] & 0x0F
        masked, size = bool(buffer[1] & 0x80), buffer[1] & 0x7F
        if buffer[0] & 0x70:
            raise _fault("a reserved bit is set, and no extension was agreed on")
        if opcode not in OPCODES:
            raise _fault(f"reserved opcode {opcode:#x}")
        if masked == self.client:
            raise _fault("frames are masked from client to server, only then")
        if opcode >= CLOSE and (size > 125 or not fin):
            raise _fault("a control frame has one part and up to 125 bytes")
        if opcode == CONTINUATION and not self._kind:
            raise _fault("a continuation frame, but no message to continue")
        if opcode in (TEXT, BINARY) and self._kind:
            raise _fault("a new message inside an unfinished one")
        extended = {126: 2, 127: 8}.get(size, 0)
        end = 2 + extended + 4 * masked
        while len(buffer) < end:
            yield
        if extended:
            size = int.from_bytes(buffer[2 : 2 + extended], "big")
            if size < (126 if extended == 2 else 1 << 16) or size >> 63:
                raise _fault("the length is not in its shortest form")
        if opcode < CLOSE:
            self._kind = opcode or self._kind
            if before + size > self.max_size:
                raise ConnectionClosed(MESSAGE_TOO_BIG, f"over {self.max_size} bytes")
        key = bytes(buffer[end - 4 : end]) if masked else b""
        del buffer[:end]
        return fin, opcode, key, size

    def _check_text(self, data: bytes | bytearray, final: bool) -> None:
        """Find invalid UTF-8 at its first byte, not at the message's end (section 8.1)."""
        if data.isascii() and not self._decoder.getstate()[0]:
            return
        self._decoder.decode(data, final)
        # Of a surrogate the codec waits for the third byte, though none makes it valid.
        if b"\xed\xa0" <= self._decoder.getstate()[0] < b"\xee":
            raise ConnectionClosed(INVALID_DATA, "half a surrogate in a text")

    def _obey(self, opcode: int, payload: bytes) -> None:
        """Obey a control frame (section 5.5). A Pong asks for nothing."""
        if opcode == PING and not self.close_sent:
            self._put(PONG, payload)
        elif opcode == CLOSE:  # its payload is a code and a reason, or nothing (5.5.1)
            code = int.from_bytes(payload[:2], "big") if payload else NO_STATUS
            valid = 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999
            if payload and not valid:
                raise _fault("a Close frame without a valid status code")
            self.ending = ConnectionClosed(code, payload[2:].decode())
            self.close_received = True

    def send(self, message: str | bytes) -> None:
        """Put a whole message into the outbox: text if it is str, binary if bytes.

        Raises:
            ConnectionClosed: nothing can be sent any more.
        """
        if self.closed:
            raise ConnectionClosed(*self.closed.args)
        if self.close_sent:
            raise ConnectionClosed(ABNORMAL, "this end has begun to close it")
        if isinstance(message, str):
            self._put(TEXT, message.encode())
        else:
            self._put(BINARY, message)
        self.answering = False
        self.settle()

    def close(self, code: int = NORMAL, reason: str = "") -> None:
        """Put a Close frame (section 5.5.1) into the outbox, unless one was put there, and
        drop the messages that nobody has taken, and those that still come.
        """
        if self.close_sent or self.closed or code == ABNORMAL:
            return
        text = reason.encode()[:123].decode(errors="ignore")  # 125 bytes with the code
        body = struct.pack("!H", code) + text.encode()
        self._put(CLOSE, b"" if code == NO_STATUS else body)
        self.close_sent, self.answering = True, False
        self.inbox.clear()

    def _put(self, opcode: int, payload: bytes | bytearray) -> None:
        """Append a final frame to the outbox; see `_parse_header` for the layout."""
        size, mask = len(payload), 0x80 if self.client else 0
        if size < 126:
            head = struct.pack("!BB", 0x80 | opcode, mask | size)
        elif size < 1 << 16:
            head = struct.pack("!BBH", 0x80 | opcode, mask | 126, size)
        else:
            head = struct.pack("!BBQ", 0x80 | opcode, mask | 127, size)
        if self._trace:
            self._trace(f"-> {_describe(True, opcode, self.client, payload)}")
        self.outbox += head
        if self.client:
            key = os.urandom(4)  # unpredictable, to protect proxies (section 10.3)
            self.outbox += key
            payload = apply_mask(payload, key)
        self.outbox += payload


def _fault(reason: str) -> ConnectionClosed:
    return ConnectionClosed(PROTOCOL_ERROR, reason)


def _describe(fin: bool, opcode: int, masked: bool, payload: bytes | bytearray) -> str:
    """Describe a frame, for a trace."""
    text = payload.hex(" ")
    if opcode in (TEXT, CONTINUATION):
        text = payload.decode(errors="replace")
    elif opcode == CLOSE and len(payload) >= 2:
        code = int.from_bytes(payload[:2], "big")
        text = f"{code} {payload[2:].decode(errors='replace')}"
    bits = f"FIN={fin:d} opcode={opcode:#x} ({OPCODES[opcode]}) MASK={masked:d}"
    return f"{bits} length={len(payload)}  {_shorten(text)}".rstrip()


def _shorten(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:160]}... ({len(text)} in all)"


# -- a protocol on a socket ----------------------------------------------------

# Bytes of a read (a whole record of TLS: of what stays behind no event would tell), and of
# one within a large frame. Messages, and bytes of them, in a full inbox.
_READ, _LARGE_READ, _HELD_MESSAGES, _HELD_BYTES = 1 << 14, 1 << 20, 100, 1 << 20
# Speed: the only connection of a process polls for so many seconds before it sleeps. To be
# woken takes longer than a short step: a lone session makes 1.6 times the steps.
EAGER_SECONDS = 0.0001
_WOULD_BLOCK: tuple[type[OSError], ...] = (BlockingIOError,)
with contextlib.suppress(ImportError):  # a Python may lack it
    import ssl

    _WOULD_BLOCK += (ssl.SSLWantReadError, ssl.SSLWantWriteError)


class WebSocket:
    """One end of a WebSocket connection: a `Protocol` on a connected socket.

    The socket is non-blocking. `tend` and `take` never wait, and any thread may call them;
    `recv`, `send` and `close` wait, for up to ``timeout`` seconds if there is one, and one
    thread at a time may `recv`. The lock is held while bytes are moved, and never while
    anyone waits for the peer. While nobody is in `recv`, someone should `tend` it.
    """

    def __init__(
        self, sock: socket.socket, protocol: Protocol, timeout: float | None = None
    ) -> None:
        sock.setblocking(False)
        self.sock, self.protocol, self.timeout = sock, protocol, timeout
        self.at_end = False  # whether nothing more can be read from the socket
        # Reentrant: a signal's handler may close what it interrupts.
        self._lock = threading.RLock()
        self._receiving = False  # whether the owner is in `recv`, and reads by himself
        self.sent = self.received = 0  # bytes, for who watches the peer's pace

    @classmethod
    def connect(
        cls,
        url: str,
        headers: Headers | None = None,
        connect_timeout: float = 10.0,
        timeout: float | None = None,
        max_size: int = 100 << 20,
        trace: Trace | None = None,
    ) -> WebSocket:
        """Open a connection as a client: the opening handshake of section 4.1.

        Raises:
            ConnectionError: the server cannot be reached, or did not agree.
            ValueError: ``url`` or ``headers`` cannot be sent.
        """
        secure, host, port, path = split_url(url)
        headers = _check_headers(headers or {})
        kind = _bounded("https" if secure else "http", trace, buffered=False)
        connection = kind(host, port, timeout=connect_timeout)
        try:
            _shake_hands(connection, path or "/", headers)
        except BaseException as error:
            connection.close()
            reason = str(error)
            if isinstance(error, socket.timeout):
                reason = f"no connection within {connect_timeout:g} s"
            elif isinstance(error, http.client.HTTPException):
                reason = "the answer is no HTTP: is this a WebSocket server?"
            elif not isinstance(error, OSError):  # of a trace, or Ctrl-C
                raise
            raise ConnectionError(f"cannot connect to {url}: {reason}") from error
        return cls(connection.sock, Protocol(True, max_size, trace), timeout)

    @property
    def full(self) -> bool:
        """Whether no more is read for now: what came has to be taken first, on either end."""
        inbox = self.protocol.inbox
        many = len(inbox) > _HELD_MESSAGES or sum(map(len, inbox)) > _HELD_BYTES
        # Who receives reads on while this end sends: else both ends might wait for the other.
        return many or len(self.protocol.outbox) > _HELD_BYTES * self._receiving

    def tend(self) -> None:
        """Send what waits, receive what has come, and so answer pings; never wait."""
        with self._lock:
            self._move(not self._receiving)

    def take(self) -> str | bytes | None:
        """Return a message to be answered by `send`, and a fault behind it only then; None
        until one has come and all that was sent is taken.
        """
        with self._lock:
            if self.protocol.outbox or not self.protocol.inbox:
                return None
            self.protocol.answering = True
            return self.protocol.inbox.popleft()

    def recv(self, eager: float = 0.0) -> str | bytes:
        """Wait for one whole message: str if it is text, bytes if it is binary.

        Raises:
            ConnectionClosed: the connection is over, by a Close frame (its code and reason),
                by a fault (the code that was sent to the peer) or without a word (1006).
            TimeoutError: nothing whole came within the timeout.
        """
        deadline, read = _deadline(self.timeout), False
        self._receiving = True  # `tend` leaves it alone: it would take the wake-up
        try:
            while True:
                with self._lock:
                    if not self.protocol.inbox:
                        self._move(read)
                    if self.protocol.inbox:
                        return self.protocol.inbox.popleft()
                    if self.protocol.closed:
                        raise ConnectionClosed(*self.protocol.closed.args)
                read = self._wait(deadline, eager)
                if not read:
                    raise TimeoutError(f"no message within {self.timeout} s")
        finally:
            self._receiving = False

    def send(self, message: str | bytes, wait: bool = True) -> None:
        """Send one whole message, and by default wait until the kernel has taken it.

        Raises:
            ConnectionClosed: the connection is over, or this end has begun to close it.
            TimeoutError: it was not taken within the timeout; the connection is lost.
        """
        deadline = _deadline(self.timeout)
        with self._lock:
            self.protocol.send(message)
            self._transmit()
        while wait and self.protocol.outbox:
            if not self._wait(deadline):
                self.drop("the peer took no more")
                raise TimeoutError(f"nothing was taken for {self.timeout} s")
            self.tend()

    def start_closing(self, code: int = NORMAL, reason: str = "") -> None:
        """Send a Close frame, unless one was sent, and do not wait for the peer's."""
        with self._lock:
            self.protocol.close(code, reason)
            self._move(False)

    def close(self, code: int = NORMAL, reason: str = "", timeout: float = 2.0) -> None:
        """Do the closing handshake (section 7.1.2), then close the TCP connection, which
        the server does first (7.1.1), within ``timeout`` seconds. Closing twice is fine.

        What the peer still sends is read and dropped: to close a socket with unread bytes
        resets the connection, and the peer might lose the Close frame.
        """
        deadline = _deadline(timeout)
        self.start_closing(code, reason)
        while not self.at_end:
            if self.protocol.closed and not self.protocol.client:
                self.end()
            if not self._wait(deadline):
                break
            self.tend()
        self.drop("this end has closed it")

    def end(self) -> None:
        """End this direction, once all is sent: also if a forked child holds the socket."""
        if not self.protocol.outbox:
            with contextlib.suppress(OSError):  # the peer is gone
                self.sock.shutdown(socket.SHUT_WR)

    def drop(self, reason: str = "this end has dropped it") -> None:
        """Close the socket at once, without a word; what came and nobody took is lost."""
        with self._lock:
            self.protocol.inbox.clear()
            self._lose(reason)
            with contextlib.suppress(OSError):  # it is over already
                self.sock.shutdown(socket.SHUT_RDWR)
            self.sock.close()

    def _lose(self, reason: str) -> None:
        self.at_end, self.protocol.answering = True, False
        self.protocol.outbox.clear()
        self.protocol.receive_eof(reason)

    def _move(self, read: bool) -> None:
        """Receive once, and send what waits and what answers that; with the lock."""
        try:
            if read and not self.at_end and not self.full:
                self._receive()
            self.protocol.settle()
            self._transmit()
        except BaseException:  # of a trace, or for want of memory: bytes may be missing
            self._lose("this end has failed")
            raise

    def _transmit(self) -> None:
        """Give the kernel as much of the outbox as it takes."""
        outbox = self.protocol.outbox
        if not outbox:
            return
        try:
            sent = self.sock.send(outbox)
            self.sent += sent
            del outbox[:sent]
        except _WOULD_BLOCK:
            pass
        except OSError:  # what the peer sent before it went is still to be read
            outbox.clear()

    def _receive(self) -> None:
        """Give the protocol what has come, one read of it."""
        protocol = self.protocol
        try:
            data = self.sock.recv(max(_READ, min(protocol.expected, _LARGE_READ)))
        except _WOULD_BLOCK:
            return
        except OSError as error:
            if not protocol.client:
                protocol.inbox.clear()  # no answer can reach the peer
            return self._lose(f"the connection broke: {error}")
        if not data:
            self.at_end = True
            return protocol.receive_eof()
        self.received += len(data)
        protocol.receive(data)

    def _wait(self, deadline: float, eager: float = 0.0) -> bool:
        """Wait until bytes can be moved; return False if that takes too long."""
        sock, write, now = self.sock, bool(self.protocol.outbox), time.monotonic()
        read = not (write and (self.full or self.at_end))
        if now >= deadline:
            return False
        if self.at_end and not write:
            return True  # there is nothing to wait for
        left = min(deadline - now, 60.0)
        if not hasattr(select, "poll"):  # Windows
            select.select([sock] if read else [], [sock] if write else [], [], left)
            return True
        poll = select.poll()
        poll.register(sock, select.POLLIN * read | select.POLLOUT * write)
        while time.monotonic() < now + eager:
            if poll.poll(0):
                return True
        poll.poll(left * 1000)
        return True


def _deadline(seconds: float | None) -> float:
    return time.monotonic() + (float("inf") if seconds is None else seconds)


# -- the opening handshake, client side (the server's is in server.py) --------


def split_url(url: str) -> tuple[bool, str, int, str]:
    """Split a base URL into (secure, host, port, path), the path without a trailing slash.

    Takes ``http://``, ``https://``, ``ws://``, ``wss://`` and bare ``host:port``. An address
    that a server listens on, such as 0.0.0.0, means this machine.

    Raises:
        ValueError: it is no such URL.
    """
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https", "ws", "wss") or not parts.hostname:
        raise ValueError(f"{url!r} is no URL like http://host:port or ws://host:port")
    if "@" in parts.netloc:
        raise ValueError("no user:password@ in a URL: use headers={'Authorization': …}")
    if parts.query or parts.fragment:
        raise ValueError(f"a base URL has no query and no fragment: {url!r}")
    secure = parts.scheme in ("https", "wss")
    if secure and not hasattr(http.client, "HTTPSConnection"):
        raise ValueError(f"this Python has no ssl module, which {url!r} needs")
    path = quote(parts.path.rstrip("/"), safe="/%:@!$&'()*+,;=~")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(parts.hostname, parts.hostname)
    if not host.isascii():
        host = host.encode("idna").decode()  # bücher.example: xn--bcher-kva.example
    return secure, host, parts.port or (443 if secure else 80), path


def _check_headers(headers: Headers) -> Headers:
    """Raise ValueError if one cannot be sent; its value may be a secret."""
    for name, value in headers.items():
        if re.search(r"[^ -~\xa1-\xac\xae-\xff]", f"{name}{value}"):
            raise ValueError(f"header {name!r} holds a character that headers cannot")
    return headers


def _shake_hands(connection: Any, path: str, headers: Headers) -> None:
    """Send the request and check the answer (section 4.1); raise if they do not agree."""
    key = b64encode(os.urandom(16)).decode()
    ours = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": key}
    no_host = "host" in {name.lower() for name in headers}  # for there is one already
    connection.putrequest("GET", path, no_host, skip_accept_encoding=True)
    for name, value in {**ours, "Sec-WebSocket-Version": "13", **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()
    with connection.getresponse() as answer:
        header = answer.getheader
        tokens = re.split(r"[\s,]+", header("connection", "").lower())
        upgrade = header("upgrade", "").lower()
        if answer.status != 101:
            words = f"the server refused: HTTP/1.1 {answer.status} {answer.reason}"
            answer.fp = io.BufferedReader(answer.fp)
            with contextlib.suppress(OSError, http.client.HTTPException):
                words += f": {_server_error(answer.status, answer.read()).message}"
            raise ConnectionError(words.rstrip(": "))
        if upgrade != "websocket" or "upgrade" not in tokens or answer.will_close:
            raise ConnectionError("no 'Upgrade: websocket' and 'Connection: Upgrade'")
        if header("sec-websocket-accept") != accept_key(key):
            raise ConnectionError("the answer has a wrong Sec-WebSocket-Accept")
        if any(header(f"sec-websocket-{name}") for name in ("extensions", "protocol")):
            raise ConnectionError("it takes an extension or subprotocol nobody offered")


# ---------------------------------------------------------------------------
# JSON and dataclasses
# ---------------------------------------------------------------------------


def to_json(value: Any) -> Any:
    """Turn what json does not know into what it does: a dataclass into a dict of its fields,
    and an array or number of numpy, or whatever has ``tolist()``, into what that returns.

    Raises:
        TypeError: it has no JSON form.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: getattr(value, name) for name in fields_of(type(value))}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return list(value)
    tolist = getattr(value, "tolist", None)
    if tolist is not None:
        return tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _finite(text: str) -> float:
    if abs(float(text)) < float("inf"):
        return float(text)
    words = "is too large for a float" if text[-1].isdigit() else "is not JSON"
    raise ValueError(f"{text[:20]} {words}")


# NaN and infinity are not JSON, and lone surrogates are not UTF-8: the first are an error,
# the second are escaped. What is decoded can be encoded again.
_encoder = json.JSONEncoder(allow_nan=False, separators=(",", ":"), default=to_json)
encode_json = _encoder.encode
decode_json = json.JSONDecoder(parse_float=_finite, parse_constant=_finite).decode

Loc = tuple[Any, ...]  # of str and int: the path to a value
MOST_FAULTS = 100  # that are listed: each repeats its input


def describe_fault(kind: str, msg: str, loc: Loc, value: Any) -> JSON:
    """Describe what is wrong with a value, as pydantic and OpenEnv do."""
    return {"type": kind, "loc": list(loc), "msg": msg, "input": value}


class Invalid(ValueError):
    """A value does not fit its type. ``faults`` lists ``type, loc, msg, input`` of each, up
    to `MOST_FAULTS`.
    """

    def __init__(self, faults: list[JSON]) -> None:
        super().__init__(faults)
        self.faults = faults

    def __str__(self) -> str:
        words = [f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in self.faults]
        return "; ".join(words[:10])


# The keywords of JSON Schema that are checked | what is measured | how | fault | message.
BOUNDS = {
    "minimum": ("number", "ge", "greater_than_equal", "greater than or equal to {}"),
    "exclusiveMinimum": ("number", "gt", "greater_than", "greater than {}"),
    "maximum": ("number", "le", "less_than_equal", "less than or equal to {}"),
    "exclusiveMaximum": ("number", "lt", "less_than", "less than {}"),
    "minLength": ("str", "ge", "string_too_short", "at least {} characters long"),
    "maxLength": ("str", "le", "string_too_long", "at most {} characters long"),
    "minItems": ("list", "ge", "too_short", "a list of at least {} items"),
    "maxItems": ("list", "le", "too_long", "a list of at most {} items"),
}
# The types that JSON has: the fault of a value of another type, and its message.
_PLAIN = {
    str: ("string_type", "a valid string"),
    int: ("int_type", "a valid integer"),
    float: ("float_type", "a valid number"),
    bool: ("bool_type", "a valid boolean"),
    type(None): ("none_required", "null"),
    dict: ("dict_type", "a valid dictionary"),
    list: ("list_type", "a valid list"),
}


class Field(typing.NamedTuple):
    """What is to be known of a field of a dataclass."""

    type: Any
    init: bool  # whether it is an argument of the constructor
    required: bool
    bounds: JSON  # the keywords of JSON Schema that are to be checked


@functools.cache
def fields_of(cls: type) -> dict[str, Field]:
    """Return the fields of a dataclass by name.

    Raises:
        TypeError: the type of one cannot be found.
    """
    fields = dataclasses.fields(cls)
    try:
        hints = typing.get_type_hints(cls)
    except Exception as error:
        name = re.search(r"'(\w+)'", str(error))
        at = (f".{f.name}" for f in fields if name and name[1] in str(f.type))
        words = f"the type of {cls.__name__}{next(at, '')} cannot be found: {error}"
        raise TypeError(words) from error
    known = {}
    for f in fields:
        bare = f.default is f.default_factory is dataclasses.MISSING
        bounds = {k: bound for k, bound in f.metadata.items() if k in BOUNDS}
        known[f.name] = Field(hints[f.name], f.init, f.init and bare, bounds)
    return known


def split_type(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return the origin and the arguments of a type; of a union the origin is Union."""
    origin = typing.get_origin(kind) or kind
    if origin is getattr(types, "UnionType", Union):
        origin = Union
    return origin, typing.get_args(kind)


def read_json(kind: Any, value: Any, loc: Loc = (), extra: bool = False) -> Any:
    """Turn JSON into a value of the type ``kind``: what `to_json` did, undone.

    The one walk over a type: what is checked is what is built. ``loc`` is the path to the
    value. With ``extra`` the keys that are no field of a dataclass are dropped, so that a
    newer peer may send more; else they are faults.

    Raises:
        Invalid: the value does not fit; the first faults are listed.
    """
    walk = _Walk(extra)
    return walk.checked(walk.read(kind, value, loc))


def read_fields(cls: type, value: Any, loc: Loc = ()) -> JSON:
    """Read those fields of a dataclass that a JSON object has, and leave its other keys.

    Raises:
        Invalid: a field does not fit; the first faults are listed.
    """
    walk = _Walk(extra=False)
    read = walk.checked(walk.read_fields(cls, value, loc, extra=True))
    return {**value, **read}


class _Walk:
    """A walk over a type and a JSON value; once there are ``faults`` the result is void."""

    def __init__(self, extra: bool) -> None:
        self.faults: list[JSON] = []  # the first of them
        self.failed = 0  # the number of all
        self.loose = 0  # keys dropped and numbers converted: how badly the value fits
        self._extra = extra

    def checked(self, read: T) -> T:
        if self.failed:
            raise Invalid(self.faults)
        return read

    def read(self, kind: Any, value: Any, loc: Loc) -> Any:
        if kind is Any or type(value) is kind:
            return value
        if kind in _PLAIN:
            return self._read_plain(kind, value, loc)
        if dataclasses.is_dataclass(kind):
            return self._read_dataclass(kind, value, loc)
        if isinstance(kind, type) and issubclass(kind, Enum):
            return self._read_choice([*kind], value, loc)
        origin, arguments = split_type(kind)
        if origin is Literal:
            return self._read_choice([*arguments], value, loc)
        if origin is Union:
            return self._read_union(arguments, value, loc)
        if origin is dict:
            items = arguments[1] if arguments else Any
            found = self.read(dict, value, loc) or {}
            return {k: self.read(items, v, (*loc, k)) for k, v in found.items()}
        if origin in (list, tuple, set, frozenset):
            return self._read_items(origin, arguments, value, loc)
        return value  # a type that has no JSON Schema: servers refuse it

    def _fail(self, kind: str, words: str, loc: Loc, value: Any) -> None:
        self._add_faults([describe_fault(kind, words, loc, value)])

    def _add_faults(self, faults: list[JSON]) -> None:
        self.failed += len(faults)
        self.faults += faults[: MOST_FAULTS - len(self.faults)]

    def _read_plain(self, kind: type, value: Any, loc: Loc) -> Any:
        """Read a value of another type than ``kind``: to JSON 1 and 1.0 are one number."""
        if {kind, type(value)} == {int, float}:
            whole = kind is float or value.is_integer()
            if whole and abs(value) <= sys.float_info.max:
                self.loose += 1
                return kind(value)
        name, words = _PLAIN[kind]
        return self._fail(name, f"Input should be {words}", loc, value)

    def _read_choice(self, choices: list[Any], value: Any, loc: Loc) -> Any:
        for choice in choices:
            form = choice.value if isinstance(choice, Enum) else choice
            # True is 1 to Python, not to JSON.
            if form == value and isinstance(form, bool) is isinstance(value, bool):
                self.loose += type(form) is not type(value)
                return choice
        self._fail("enum", f"Input should be one of {encode_json(choices)}", loc, value)

    def _read_union(self, members: Sequence[Any], value: Any, loc: Loc) -> Any:
        """Read the member that fits exactly; else the one that fits best, or the first."""
        members = [m for m in members if m is not type(None) or value is None]
        if len(members) == 1:
            return self.read(members[0], value, loc)
        walks = [_Walk(self._extra) for _ in members]
        reads = [w.read(m, value, loc) for w, m in zip(walks, members)]
        best = min(walks, key=lambda walk: (walk.failed, walk.loose))
        if not best.failed:
            self.loose += best.loose
            return reads[walks.index(best)]
        for walk in walks:
            self._add_faults(walk.faults)

    def _read_items(self, origin: Any, kinds: Loc, value: Any, loc: Loc) -> Any:
        if type(value) is not list:
            return self._read_plain(list, value, loc)
        if origin is not tuple or not kinds or kinds[-1] is ...:  # any number of a kind
            kinds = (*kinds, Any)[:1] * len(value)
        if len(value) != len(kinds):
            name = "too_short" if len(value) < len(kinds) else "too_long"
            words = f"Input should be a list of {len(kinds)} items"
            self._fail(name, words, loc, value)
        pairs = enumerate(zip(kinds, value))
        items = [self.read(kind, item, (*loc, i)) for i, (kind, item) in pairs]
        try:
            return origin(items)
        except TypeError as error:  # a set of what cannot be in one
            self._fail("value_error", str(error), loc, value)

    def _read_dataclass(self, cls: Any, value: Any, loc: Loc) -> Any:
        before = self.failed
        read = self.read_fields(cls, value, loc, self._extra)
        if self.failed > before:
            return None
        known = fields_of(cls)
        late = {name: read.pop(name) for name in [*read] if not known[name].init}
        try:
            built = cls(**read)
        except (TypeError, ValueError) as error:  # of its own __post_init__
            return self._fail("value_error", str(error), loc, value)
        for name, item in late.items():
            object.__setattr__(built, name, item)
        return built

    def read_fields(self, cls: type, value: Any, loc: Loc, extra: bool) -> JSON:
        """Read those fields of a dataclass that a JSON object has."""
        if type(value) is not dict:
            self._read_plain(dict, value, loc)
            return {}
        read, fields = {}, fields_of(cls)
        for name, field in fields.items():
            if field.required and name not in value:
                self._fail("missing", "Field required", (*loc, name), value)
        for name, item in value.items():
            at = (*loc, name)
            if name in fields:
                before = self.failed
                read[name] = self.read(fields[name].type, item, at)
                if fields[name].bounds and self.failed == before:
                    self._check_bounds(fields[name].bounds, item, at)
            elif extra:
                self.loose += 1
            else:
                words = "Extra inputs are not permitted"
                self._fail("extra_forbidden", words, at, item)
        return read

    def _check_bounds(self, bounds: JSON, value: Any, loc: Loc) -> None:
        number = type(value) in (int, float)
        measured = "number" if number else type(value).__name__
        for keyword, bound in bounds.items():
            kind, holds, name, words = BOUNDS[keyword]
            if kind == measured:
                measure = value if number else len(value)
                if not getattr(operator, holds)(measure, bound):
                    words = f"Input should be {words.format(bound)}"
                    self._fail(name, words, loc, value)


# ---------------------------------------------------------------------------
# Environment clients
# ---------------------------------------------------------------------------

T = TypeVar("T")
ActT = TypeVar("ActT")
ObsT = TypeVar("ObsT")
StateT = TypeVar("StateT")
# Codes of errors after which the server ends the session and closes the connection.
ENDINGS = "CAPACITY_REACHED", "FACTORY_ERROR", "SESSION_ERROR"


@dataclasses.dataclass
class StepResult(Generic[ObsT]):
    """What ``reset`` and ``step`` return; ``metadata`` is what the server says besides."""

    observation: ObsT
    reward: float | None = None
    done: bool = False  # whether the episode is over
    metadata: JSON | None = None


class ServerError(RuntimeError):
    """The server answered with an error (OpenEnv's ``error`` message, or an HTTP status).

    ``code`` is OpenEnv's error code or ``"HTTP_<status>"``; ``errors`` lists the faults of
    a message that broke its schema: ``type``, ``loc`` (path), ``msg`` and ``input`` of each.
    """

    def __init__(
        self, message: str, code: str, errors: list[Any] | None = None
    ) -> None:
        super().__init__(message, code, errors)
        self.message, self.code, self.errors = message, code, errors or []

    def __str__(self) -> str:
        return f"Server error: {self.message} (code: {self.code})"


class EnvClient(Generic[ActT, ObsT, StateT]):
    """What both clients share: typed ``reset``, ``step`` and ``state`` over some transport.

    A client of your own environment names its types, and that is all:

        class MyEnv(WebSocketEnvClient[MyAction, MyObservation, MyState]):
            observation_type = MyObservation
            state_type = MyState

    Without types, dicts go in and dicts come out. Threads may share a client: their calls
    take turns. A client does not survive a fork: the child must make one of its own.

    Args:
        base_url: ``http(s)://`` or ``ws(s)://`` or ``host:port``, maybe with a path prefix.
        provider: a container provider to stop on `close`.
        default_headers, headers: for every request, such as Authorization.
        trace: is called with a line of text for all that crosses the wire: try ``print``.
    """

    observation_type: Any = dict
    state_type: Any = dict

    def __init__(
        self,
        base_url: str,
        provider: Any = None,
        default_headers: Headers | None = None,
        headers: Headers | None = None,
        trace: Trace | None = None,
    ) -> None:
        self._base_url = base_url.rstrip("/")
        secure, host, port, path = split_url(base_url)
        host = f"[{host}]" if ":" in host else host
        self._address = f"{'s' if secure else ''}://{host}:{port}{path}"  # no scheme
        self._headers = _check_headers({**(default_headers or {}), **(headers or {})})
        self._provider, self._trace = provider, trace
        self._lock = threading.RLock()
        self._pid = os.getpid()

    @property
    def base_url(self) -> str:
        """The URL that this client was made with, without a slash at its end."""
        return self._base_url

    def reset(self, **kwargs: Any) -> StepResult[ObsT]:
        """Begin a new episode. ``seed`` and ``episode_id`` are OpenEnv's; the environment
        may take others.

        Raises:
            ServerError: the server refused, or the environment failed. It lives on.
            ConnectionError: the server cannot be reached, or went away.
            TimeoutError: no answer in time.
        """
        return self._call("reset", "begin a new episode", self._parse_result, kwargs)

    def step(self, action: ActT, **kwargs: Any) -> StepResult[ObsT]:
        """Act once. Raises what `reset` raises, and TypeError for what is no action.

        Over HTTP ``kwargs`` (``timeout_s``, ``request_id``, ...) are sent beside the action;
        OpenEnv's WebSocket message has no place for them, so there they are dropped.
        """
        data = {"action": self._step_payload(action), **kwargs}
        return self._call("step", "the agent acts once", self._parse_result, data)

    def state(self) -> StateT:
        """Ask where the episode stands. Raises what `reset` raises."""
        return self._call(
            "state", "where does the episode stand?", self._parse_state, None
        )

    def close(self) -> None:
        """End the session, and stop the container if this client started one.

        A server that was there before goes on running. Closing twice is fine.
        """
        try:
            self.disconnect()
        finally:
            provider, self._provider = self._provider, None
            if provider is not None and os.getpid() == self._pid:
                provider.stop_container()

    def disconnect(self) -> None:
        """End the session. The next one begins with `reset` over HTTP, else with `connect`."""
        if os.getpid() == self._pid:  # else the session belongs to the parent process
            with self._lock:
                self._disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @classmethod
    def from_docker_image(cls, image: str, provider: Any = None, **kwargs: Any) -> Self:
        """Start a container from ``image``, wait until it is healthy, and connect to it.

        ``kwargs`` (``port``, ``env_vars``, ...) go to the provider's ``start_container``;
        `close` stops and removes the container.

        Raises:
            RuntimeError: it does not start. TimeoutError: it does not become healthy.
        """
        provider = LocalDockerProvider() if provider is None else provider
        base_url = provider.start_container(image, **kwargs)
        try:
            provider.wait_for_ready(base_url)
            return cls(base_url, provider=provider).__enter__()
        except BaseException:
            provider.stop_container()
            raise

    @classmethod
    def from_env(
        cls,
        repo_id: str,
        provider: Any = None,
        tag: str = "latest",
        use_docker: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Start the container of a Hugging Face Space, ``"owner/name"``, on this machine."""
        if not use_docker:
            raise ValueError("a Space runs in Docker here: use_docker must be True")
        name = re.sub("[^a-z0-9]", "-", repo_id.lower())
        image = f"registry.hf.space/{name}:{tag}"
        return cls.from_docker_image(image, provider, **kwargs)

    from_hub = from_env  # its name until December 2025

    # The names below are openenv's: a client written for it may override them.

    def _step_payload(self, action: ActT) -> JSON:
        if isinstance(action, dict):
            return action
        if not dataclasses.is_dataclass(action) or isinstance(action, type):
            bases = getattr(type(self), "__orig_bases__", ())
            named = [a for base in bases for a in typing.get_args(base)]
            wanted = "a dict or a dataclass"
            if named and isinstance(named[0], type):
                wanted = f"a {named[0].__name__} or a dict"
            raise TypeError(f"step takes {wanted}, not {type(action).__name__}")
        return typing.cast(JSON, to_json(action))

    def _parse_result(self, payload: JSON) -> StepResult[ObsT]:
        reward = payload.get("reward")
        if reward is not None:  # OpenEnv lets it be true or false
            number = int(reward) if isinstance(reward, bool) else reward
            reward = read_json(float, number, ("reward",))
        done = read_json(bool, payload.get("done", False), ("done",))
        fields = read_json(dict, payload.get("observation"), ("observation",))
        if self.observation_type is not dict:
            fields = {**fields, "reward": reward, "done": done}
        observation = read_json(self.observation_type, fields, extra=True)
        metadata = payload.get("metadata")
        if metadata is not None:
            metadata = read_json(dict, metadata, ("metadata",))
        return StepResult(observation, reward, done, metadata)

    def _parse_state(self, payload: JSON) -> StateT:
        return typing.cast(StateT, read_json(self.state_type, payload, extra=True))

    def _call(
        self, kind: str, words: str, parse: Callable[[JSON], T], data: JSON | None
    ) -> T:
        """Exchange one request for one answer, one caller at a time."""
        self._refuse_fork()
        with self._lock:
            if self._trace:
                self._trace(f"   OpenEnv: {kind}, {words}")
            answer = self._exchange(kind, data)
            if self._trace and kind != "state":
                told = f"reward {answer.get('reward')}, done {answer.get('done')}"
                self._trace(f"   OpenEnv: {told}")
        try:
            return parse(answer)
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise ConnectionError(f"the answer makes no sense: {error}") from error

    def _refuse_fork(self) -> None:
        if os.getpid() != self._pid:
            raise ConnectionError("this client was made before a fork: make a new one")

    def _exchange(self, kind: str, data: JSON | None) -> JSON:
        raise NotImplementedError

    def _disconnect(self) -> None:
        raise NotImplementedError


class WebSocketEnvClient(EnvClient[ActT, ObsT, StateT]):
    """A client over WebSocket: one connection, one environment of its own, one session.

    The first call connects, if `connect` or ``with`` has not. After a timeout, a broken
    connection or a message that is no answer the episode is lost, and every call says so
    until `connect` opens a new session: an answer is never taken for that of another call.
    Between calls, pings are answered in the background.

    Args, beside those of `EnvClient`:
        connect_timeout_s: seconds until connected.
        message_timeout_s: seconds that an answer may take.
        max_message_size_mb: the largest answer taken, in MiB.
    """

    def __init__(
        self,
        base_url: str,
        connect_timeout_s: float = 10.0,
        message_timeout_s: float = 60.0,
        max_message_size_mb: float = 100.0,
        provider: Any = None,
        default_headers: Headers | None = None,
        headers: Headers | None = None,
        trace: Trace | None = None,
    ) -> None:
        super().__init__(base_url, provider, default_headers, headers, trace)
        self._url = f"ws{self._address}/ws"
        size = int(max_message_size_mb * (1 << 20))
        self._options = connect_timeout_s, message_timeout_s, size, trace
        self._ws: WebSocket | None = None
        self._lost = ""  # why there is no connection any more

    def connect(self) -> Self:
        """Open the connection, and with it a new session; does nothing if it is open.

        Raises:
            ConnectionError: the server cannot be reached, or refused.
        """
        self._refuse_fork()
        with self._lock:
            if self._ws is not None:
                self._ws.tend()
                if not (self._ws.at_end or self._ws.protocol.closed):
                    return self
                self._ws.drop()
                self._ws = None
            self._ws = WebSocket.connect(self._url, self._headers, *self._options)
            _keeper.watch(self._ws)
            self._lost = ""
            return self

    def __enter__(self) -> Self:
        return self.connect()

    def _disconnect(self) -> None:
        ws, self._ws = self._ws, None
        if ws is not None:
            self._lost = "the client was closed"
            ws.close()

    def _exchange(self, kind: str, data: JSON | None) -> JSON:
        request: JSON = {"type": kind}
        if data is not None:
            request["data"] = data["action"] if kind == "step" else data
        text = encode_json(request)  # its error is the caller's fault: nothing is lost
        if self._ws is None and self._lost:
            raise ConnectionError(f"{self._lost}; connect() begins a new session")
        ws: Any = self._ws or self.connect()._ws
        try:
            ws.tend()
            answer = ws.take()
            if answer is not None:  # a server speaks first only to say that it is full
                return _read_answer(answer, "error")
            ws.send(text)
            answer = ws.recv(EAGER_SECONDS if len(_keeper.watched) == 1 else 0)
            return _read_answer(answer, "state" if kind == "state" else "observation")
        except BaseException as error:  # Ctrl-C too: the answer is still on its way
            if isinstance(error, ServerError) and error.code not in ENDINGS:
                raise
            self._lost = f"the session was lost ({str(error) or type(error).__name__})"
            self._ws = None
            ws.start_closing()
            ws.drop()
            raise


def _read_answer(answer: str | bytes, expected: str) -> JSON:
    """Return the ``data`` of a message of the type expected; raise what an error says."""
    try:
        message = decode_json(answer if isinstance(answer, str) else "")
        kind, data = message["type"], message["data"]
        if kind == "error":
            words, code = data.get("message", "unknown"), data.get("code", "UNKNOWN")
            raise ServerError(words, code, data.get("errors"))
        if kind != expected or not isinstance(data, dict):
            raise ValueError
        return data
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        words = f"the server sent {_shorten(repr(answer))}, where {expected!r} was due"
        raise ConnectionError(words) from None


class _Keeper:
    """Tends the connections of owners who are busy: one thread for the process.

    Servers (uvicorn, for one) drop a client that leaves a ping unanswered for 20 seconds,
    and a model may think for longer than that between two steps.
    """

    def __init__(self) -> None:
        self.watched: list[Any] = []  # weakly; while it is empty no thread runs
        self._lock = threading.Lock()

    def watch(self, ws: WebSocket) -> None:
        with self._lock:
            if not self.watched:
                threading.Thread(target=self._run, daemon=True, name="pings").start()
            self.watched.append(weakref.ref(ws))

    def _run(self) -> None:
        while True:
            time.sleep(0.25)
            for ref in list(self.watched):
                with contextlib.suppress(Exception):  # it is forgotten; its trace fails
                    ref().tend()
            with self._lock:
                over = [getattr(ref(), "at_end", True) for ref in self.watched]
                self.watched = [r for r, end in zip(self.watched, over) if not end]
                if not self.watched:
                    return


_keeper = _Keeper()
if hasattr(os, "register_at_fork"):  # a child has neither the thread nor connections
    os.register_at_fork(after_in_child=_keeper.__init__)  # type: ignore[misc]


class HTTPEnvClient(EnvClient[ActT, ObsT, StateT]):
    """A client over HTTP: every call is a request of its own.

    It names a session of its own in the header ``X-Session-Id``. Servers that know the
    header (server.py does) keep one environment for it; openenv's do not. An answer may
    take ``request_timeout_s`` seconds.
    """

    def __init__(
        self,
        base_url: str,
        request_timeout_s: float = 15.0,
        default_headers: Headers | None = None,
        provider: Any = None,
        headers: Headers | None = None,
        trace: Trace | None = None,
    ) -> None:
        super().__init__(base_url, provider, default_headers, headers, trace)
        self._headers = {"X-Session-Id": str(uuid.uuid4()), **self._headers}
        self._timeout = float(request_timeout_s)
        self._open = False  # whether there may be a session to close
        self._opener = _http_opener(base_url, trace)

    def _exchange(self, kind: str, data: JSON | None) -> JSON:
        import urllib.request  # here, since a WebSocket client does not need it

        url, headers, body = f"http{self._address}/{kind}", self._headers, None
        if data is not None:
            body, self._open = encode_json(data).encode(), True
            headers = {**headers, "Content-Type": "application/json"}
        request = urllib.request.Request(url, body, headers)  # POST if there is a body
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                status, text = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)
            if isinstance(cause, socket.timeout):
                late = f"no answer from {url} within {self._timeout:g} s"
                raise TimeoutError(late) from None
            raise ConnectionError(f"no answer from {url}: {cause!r}") from error
        if self._trace:
            self._trace(f"<- {_shorten(text.decode(errors='replace'))}")
        if status != 200:
            raise _server_error(status, text)
        with contextlib.suppress(ValueError, RecursionError):
            answer = decode_json(text.decode())
            if isinstance(answer, dict):
                return answer
        raise ConnectionError(f"{url} answered {_shorten(repr(text))}, no JSON object")

    def _disconnect(self) -> None:
        if self._open:
            # The server may know no sessions, or be gone, and with it the session.
            with contextlib.suppress(ServerError, ConnectionError, TimeoutError):
                self._exchange("close", {})
            self._open = False


def _bounded(scheme: str, trace: Trace | None, buffered: bool = True) -> Any:
    """HTTP connections with a trace, and a timeout for all of an answer, not each packet.
    Unless ``buffered``, what follows the head of an answer stays in the socket.
    """
    base: Any = getattr(http.client, f"{scheme.upper()}Connection")

    class Connection(base):  # type: ignore[misc]
        def connect(self) -> None:
            self.deadline = _deadline(self.timeout)
            super().connect()

        def send(self, data: bytes) -> None:
            if trace:
                for line in data.decode("latin-1").rstrip().split("\r\n"):
                    trace(f"-> {_shorten(line)}")
            super().send(data)

        def response_class(self, sock: Any, **kwargs: Any) -> Any:
            def readinto(buffer: Any) -> Any:
                sock.settimeout(max(self.deadline - time.monotonic(), 0.001))
                return sock.recv_into(buffer)

            answer: Any = http.client.HTTPResponse(sock, **kwargs)
            raw = answer.fp.detach()
            raw.readinto = readinto
            answer.fp = io.BufferedReader(raw) if buffered else raw
            return answer

        def getresponse(self) -> Any:
            answer = super().getresponse()
            if trace:
                trace(f"<- HTTP/1.1 {answer.status} {answer.reason}")
                for name, value in answer.headers.items():
                    trace(f"<- {name}: {value}")
            return answer

    return Connection


def _http_opener(url: str, trace: Trace | None = None) -> Any:
    """urllib without redirects, which an API does not need and which leak headers."""
    from urllib import request  # here, since a WebSocket client does not need it

    host = split_url(url)[1]
    local = host in ("localhost", "::1") or host.startswith("127.")
    opener = request.OpenerDirector()
    opener.add_handler(request.ProxyHandler({} if local else None))
    for scheme in ("http", "https"):
        kind = getattr(request, f"{scheme.upper()}Handler", None)
        if kind:  # a Python may lack ssl
            handler = kind()
            connect = functools.partial(handler.do_open, _bounded(scheme, trace))
            setattr(handler, f"{scheme}_open", connect)
            opener.add_handler(handler)
    return opener


def _server_error(status: int, text: bytes) -> ServerError:
    """Make of an HTTP error what a WebSocket error message would have been."""
    try:
        body = json.loads(text)
        detail, code = body["detail"], body.get("code")
        if isinstance(detail, list):
            return ServerError(str(Invalid(detail)), code or "VALIDATION_ERROR", detail)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        detail, code = _shorten(text.decode(errors="replace")), None
    return ServerError(str(detail), code or f"HTTP_{status}")


class BenchmarkEnv(
    HTTPEnvClient[BenchmarkAction, BenchmarkObservation, BenchmarkState]
):
    """The Benchmark environment over HTTP."""

    observation_type, state_type = BenchmarkObservation, BenchmarkState


class BenchmarkEnvWS(
    WebSocketEnvClient[BenchmarkAction, BenchmarkObservation, BenchmarkState]
):
    """The Benchmark environment over WebSocket."""

    observation_type, state_type = BenchmarkObservation, BenchmarkState


# ---------------------------------------------------------------------------
# Docker
# ---------------------------------------------------------------------------


class LocalDockerProvider:
    """Runs one container of an environment on this machine, by the ``docker`` command."""

    _name = ""  # of the container that runs

    def start_container(
        self,
        image: str,
        port: int | None = None,
        env_vars: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> str:
        """Start ``image``, whose server listens on port 8000, and return its base URL.

        Without a ``port`` Docker chooses a free one on 127.0.0.1. ``kwargs`` are further
        options of ``docker run``: ``memory="2g"`` becomes ``--memory=2g``.

        Raises:
            RuntimeError: there is no ``docker``, or the container does not start.
        """
        if self._name:
            raise RuntimeError("this provider already runs a container: stop it first")
        self._name = f"openenv-{uuid.uuid4().hex[:12]}"
        options = ["--detach", "--name", self._name]
        options += ["--publish", f"127.0.0.1:{port or ''}:8000"]
        options += [f"--{k.replace('_', '-')}={v}" for k, v in kwargs.items()]
        options += [f"--env={k}={v}" for k, v in (env_vars or {}).items()]
        try:
            self._docker("run", *options, image)
            address = self._docker("port", self._name, "8000/tcp").splitlines()[0]
        except (RuntimeError, IndexError) as error:
            raise self._failure(f"cannot run {image}: {error}", RuntimeError) from None
        return f"http://{address}"

    def wait_for_ready(self, base_url: str, timeout_s: float = 30.0) -> None:
        """Wait until ``/health`` answers 200.

        Raises:
            TimeoutError: it did not within ``timeout_s`` seconds; RuntimeError: the container
                has ended. Both say its last log lines, and the container is removed.
        """
        opener, url = _http_opener(base_url), f"{base_url.rstrip('/')}/health"
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                with opener.open(url, timeout=2) as answer:
                    if answer.status == 200:
                        return
                    last = f"HTTP Error {answer.status}: {answer.reason}"
            except (OSError, http.client.HTTPException) as error:  # not there yet
                last = str(error)
            running = ("inspect", "-f", "{{.State.Running}}", self._name)
            if self._name and self._docker(*running) != "true":
                raise self._failure("the container has ended", RuntimeError)
            if time.monotonic() > deadline:
                late = f"not healthy within {timeout_s:g} s: {last}"
                raise self._failure(late, TimeoutError)
            time.sleep(0.05)

    def stop_container(self) -> None:
        """Stop and remove the container. Does nothing if there is none."""
        name, self._name = self._name, ""
        if name:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                self._docker("stop", "--time", "5", name)
            self._docker("rm", "--force", name)

    def _failure(self, message: str, kind: type[Exception]) -> Exception:
        """Remove the container, and make an exception of ``message`` and its last words."""
        logs = ""
        with contextlib.suppress(RuntimeError):  # it was never made
            logs = self._docker("logs", "--tail", "20", self._name)
        with contextlib.suppress(RuntimeError):
            self.stop_container()
        return kind(f"{message}\n{logs}".rstrip())

    def _docker(self, *arguments: str) -> str:
        """Run ``docker``; return what it prints, or raise RuntimeError with what it says."""
        from subprocess import PIPE, STDOUT, run

        command, error = ["docker", *arguments], STDOUT if "logs" in arguments else PIPE
        try:
            done = run(command, check=False, stdout=PIPE, stderr=error, text=True)
        except FileNotFoundError:
            raise RuntimeError("there is no docker command: install Docker") from None
        if done.returncode:
            words = done.stderr or done.stdout or f"docker exits with {done.returncode}"
            raise RuntimeError(words.strip())
        return done.stdout.strip()


# ---------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Step the messages given; return the exit code."""
    import argparse

    about = "Step messages through the Benchmark environment."
    parser = argparse.ArgumentParser("client.py", description=about, allow_abbrev=False)
    add = parser.add_argument
    add("messages", nargs="*", metavar="MESSAGE", help="what to step")
    add("--url", help="base URL of a running server; default: one of its own")
    add("--http", action="store_true", help="use HTTP; default: WebSocket")
    add("--trace", action="store_true", help="show on stderr all that crosses the wire")
    add("--version", action="version", version=f"%(prog)s {VERSION}")
    # One clear line, and no usage text above it.
    parser.error = lambda message: parser.exit(2, f"client.py: {message}\n")  # type: ignore[method-assign]
    options = parser.parse_args(argv)
    if not options.messages:
        parser.error('give messages to step, as in: client.py "Hello" "World"')
    try:
        _play(options)
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))
    return 0


def _embedded_server() -> Any:
    name = f"{__package__}.server" if __package__ else "server"
    if not find_spec(name):
        raise RuntimeError("server.py is not beside client.py: give --url")
    server = importlib.import_module(name)
    made_by = sys.modules[BenchmarkAction.__module__].BenchmarkEnvironment
    return server.create_app(made_by, BenchmarkAction, BenchmarkObservation).start()


def _play(options: Any) -> None:
    trace = (lambda line: print(line, file=sys.stderr)) if options.trace else None
    kind = BenchmarkEnv if options.http else BenchmarkEnvWS
    with contextlib.ExitStack() as stack:
        url = options.url or stack.enter_context(_embedded_server()).url
        env = stack.enter_context(kind(url, trace=trace))
        env.reset()
        for message in options.messages:
            result = env.step(BenchmarkAction(message=message))
            seen, reward = result.observation, result.reward
            echo, length = seen.echoed_message, seen.message_length
            say(f"{echo!r} length {length} reward {reward}")


def say(line: str) -> None:
    """Print a line; what standard output cannot show is escaped.

    Raises:
        OSError: it is full or closed. Nothing more is written to it.
    """
    if sys.stdout is None:
        return
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


if __name__ == "__main__":
    sys.exit(main())
