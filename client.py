"""Clients of an OpenEnv environment, over WebSocket and over HTTP.

Part of the minimal OpenEnv Benchmark environment, version 1.0.0: benchmark.py (the
environment), client.py (this file: its clients), server.py (its server).

How one ``step`` travels: the caller's action, a dataclass, becomes plain JSON
(`to_json`); the JSON becomes the payload of one WebSocket frame (`WebSocket.send`) or the
body of one HTTP request; the server's answer comes back the same way (`WebSocket.recv`)
and becomes the observation, a dataclass again (`from_json`).

The file goes from the bytes up: RFC 6455, the WebSocket protocol (either end of it: the
server uses the same class); JSON and dataclasses; the environment clients; the Docker
provider; the command line. Not here: WebSocket extensions (so no compression),
subprotocols, and HTTP proxies for WebSocket connections.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import os
import socket
import ssl
import struct
import sys
import threading
import time
import uuid
import weakref
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import cache, lru_cache, partial
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)
from urllib.parse import quote, urlsplit

if TYPE_CHECKING or not __package__:
    import benchmark
else:  # the files were copied into a package
    from . import benchmark

if TYPE_CHECKING:
    from typing import Self

Trace = Callable[[str], None]  # is given what crosses the wire, line by line

# ---------------------------------------------------------------------------
# RFC 6455: the WebSocket protocol
# ---------------------------------------------------------------------------

# Opcodes (section 5.2). Those from 8 up are control frames.
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
OPCODE_NAMES = {
    0: "continuation",
    1: "text",
    2: "binary",
    8: "close",
    9: "ping",
    10: "pong",
}

# Status codes of a Close frame (section 7.4.1). NO_STATUS and ABNORMAL never travel: they
# stand for a Close frame without a code, and for a connection that ended without one.
NORMAL, GOING_AWAY, PROTOCOL_ERROR, NO_STATUS, ABNORMAL = 1000, 1001, 1002, 1005, 1006
INVALID_DATA, MESSAGE_TOO_BIG, INTERNAL_ERROR, TRY_AGAIN_LATER = 1007, 1009, 1011, 1013

# Sizes in bytes: of a read when no large frame is expected (a thread that waits holds so
# much, so it is small); of any other at most; of a write; of what `WebSocket.tend` may hold
# for the next `recv`; of the head of an opening handshake.
_RECV_SIZE, _LARGE_RECV_SIZE, _BLOCK_SIZE = 1 << 11, 1 << 20, 1 << 18
_HELD_LIMIT, _HEAD_LIMIT = 1 << 20, 1 << 16
# Seconds for which the only connection of a process is polled before its thread sleeps.
EAGER_SECONDS = 0.0001
# A kept message costs more than its bytes; and a flood must not hold `tend` up (seconds).
_MESSAGE_COST, _TEND_SECONDS = 100, 0.002


class ConnectionClosed(ConnectionError):
    """The connection is over. ``code`` and ``reason`` are those of section 7.4."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(f"WebSocket connection closed: {code} {reason}".rstrip())
        self.code = code
        self.reason = reason


class _Fault(Exception):
    """The peer broke the protocol: fail the connection with this status code."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class _Frame:
    """The header of a frame whose payload is being read."""

    __slots__ = ("at", "fin", "key", "left", "opcode", "size")

    def __init__(self, fin: bool, opcode: int, key: bytes, size: int) -> None:
        self.fin, self.opcode, self.key, self.size = fin, opcode, key, size
        self.left = size  # bytes of the payload that are still to come
        self.at = time.monotonic()


def accept_key(key: str) -> str:
    """Return the ``Sec-WebSocket-Accept`` that answers a ``Sec-WebSocket-Key`` (4.2.2)."""
    from hashlib import sha1  # here: it brings 1 MB of OpenSSL into memory

    guid = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    return b64encode(sha1((key + guid).encode("latin-1")).digest()).decode()


def apply_mask(data: bytes | bytearray, key: bytes | bytearray) -> bytes | bytearray:
    """XOR ``data`` with the 4-byte ``key``, repeated (section 5.3). Its own inverse.

    A large bytearray is masked where it is; all else is left alone.
    """
    size = len(data)
    if size < 1024:
        pad = (key * (size // 4 + 1))[:size]
        return (int.from_bytes(data, "big") ^ int.from_bytes(pad, "big")).to_bytes(
            size, "big"
        )
    # A table look-up for each of the four strided slices: on 1 MB three times as fast.
    masked = data if isinstance(data, bytearray) else bytearray(data)
    for i in range(4):
        masked[i::4] = masked[i::4].translate(_xor_table(key[i]))
    return masked


@lru_cache(maxsize=256)
def _xor_table(key: int) -> bytes:
    return bytes(key ^ byte for byte in range(256))


class WebSocket:
    """One end of a WebSocket connection (RFC 6455) over a connected socket.

    ``client`` says which end: a client masks what it sends, a server must not. ``early``
    are bytes that arrived behind the opening handshake. ``max_size`` is the largest
    message, in bytes, that is taken. ``timeout`` (seconds) bounds each wait for the peer;
    without it the owner waits as long as the connection lives. ``trace``, if given, is
    called with a description of every frame.

    One thread at a time may `recv`, any may `send`. While nobody is in `recv`, someone
    should call `tend` now and then, so that pings are answered.
    """

    def __init__(
        self,
        sock: socket.socket,
        client: bool,
        max_size: int,
        early: bytes = b"",
        timeout: float | None = None,
        trace: Trace | None = None,
    ) -> None:
        self._sock = sock
        self._client = client
        self._max_size = max_size
        self._timeout = timeout
        self._trace = trace
        self._receiving = threading.Lock()  # guards all that parsing changes
        self._sending = threading.RLock()  # a pong may be sent while parsing, in `tend`
        self._buffer = bytearray(early)  # bytes that are not parsed yet
        self._frame: _Frame | None = None  # the frame whose payload is next
        self._opcode = 0  # of the message that is being put together; 0: none is
        self._size = 0  # the bytes that its frames so far announced
        self._message = bytearray()  # and themselves, if it comes in parts
        self._traced = bytearray()  # of a frame, if it is traced
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._inbox: deque[str | bytes] = deque()  # whole messages that `tend` found
        self._held = 0  # bytes in the inbox
        self._tending = 0.0  # until then `tend` is at work, and nothing sent may block
        self._unsent: bytes | memoryview = b""  # what did not fit into the socket
        self._nowait = 0 if isinstance(sock, ssl.SSLSocket) else _MSG_DONTWAIT
        self._close_sent = self._close_received = False
        self._closed: ConnectionClosed | None = None  # why nothing more will come
        self._received_at = time.monotonic()  # when the last bytes came
        self._sending_since: float | None = None  # when the last bytes could be sent
        _set_timeout(sock, timeout)

    @classmethod
    def connect(
        cls,
        url: str,
        headers: Mapping[str, str] | None = None,
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
        key = b64encode(os.urandom(16)).decode()
        request = _handshake_request(secure, host, port, path, key, headers or {})
        deadline = time.monotonic() + connect_timeout
        sock: socket.socket | None = None
        try:
            sock = socket.create_connection((host, port), connect_timeout)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if secure:
                context = ssl.create_default_context()
                sock = context.wrap_socket(sock, server_hostname=host)
            if trace:
                _trace_text(trace, "->", request)
            sock.sendall(request)
            early = _read_handshake(sock, key, deadline, trace)
            return cls(sock, True, max_size, early, timeout, trace)
        except OSError as error:
            if sock:
                sock.close()
            late = isinstance(error, socket.timeout)
            reason = f"no answer within {connect_timeout:g} s" if late else error
            raise ConnectionError(f"cannot connect to {url}: {reason}") from error

    # -- messages -----------------------------------------------------------

    def send(self, message: str | bytes, wait: bool = True) -> None:
        """Send one whole message: str as a text frame, bytes as a binary frame.

        Without ``wait`` this does not block, and what the peer does not take at once is kept
        for `flush`.

        Raises:
            ConnectionClosed: the connection is over; nothing was sent.
            TimeoutError: the peer did not take it in time: the connection is of no more use.
        """
        if isinstance(message, str):
            self._send_frame(TEXT, message.encode(), wait)
        else:
            self._send_frame(BINARY, message, wait)

    def flush(self) -> None:
        """Send what an earlier `send` did not wait for. Raises what `send` raises."""
        with self._sending:
            self._transmit(b"", wait=True)

    def recv(self, eager: float = 0.0) -> str | bytes:
        """Wait for one whole message: str if it is text, bytes if it is binary.

        For ``eager`` seconds the socket is polled before the thread goes to sleep: to wake
        it takes longer than a short step, and its processor has then forgotten all.

        Raises:
            ConnectionClosed: the connection is over, by a Close frame (its code and reason),
                by a fault (the code that was sent to the peer) or without a word (1006).
            TimeoutError: nothing whole came within the timeout.
        """
        with self._receiving:
            if self._inbox:
                message = self._inbox.popleft()
                self._held -= len(message) + _MESSAGE_COST
                return message
            self._received_at = time.monotonic()
            deadline = self._received_at + (self._timeout or float("inf"))
            while True:
                found = self._parse() if self._buffer or self._frame else None
                if found is not None:
                    if self._close_sent:  # it came too late
                        continue
                    return found
                if self._received_at > deadline:  # bytes came, but nothing whole
                    raise TimeoutError(f"no message within {self._timeout} s")
                if not (eager and self._filled_within(eager)):
                    self._fill()
                eager = 0.0

    @property
    def kept(self) -> bool:
        """Whether `tend` has kept a message: `recv` will not block."""
        return bool(self._inbox)

    @property
    def unsent(self) -> bool:
        """Whether the peer has not taken all that was sent: `flush` would wait for it."""
        return bool(self._unsent)

    @property
    def idle(self) -> bool:
        """Whether nothing has begun or waits: no message, no closing, in no direction."""
        coming = self._inbox or self._buffer or self._frame or self._opcode
        return not (coming or self._unsent or self._closed or self._close_sent)

    @property
    def ended(self) -> bool:
        """Whether nothing more will come from the peer."""
        return self._closed is not None

    @property
    def gone(self) -> bool:
        """Whether the peer went away without a word, so that `close` waits for nothing."""
        code = self._closed.code if self._closed else NORMAL
        return code == ABNORMAL and not self._unsent

    @property
    def closing(self) -> bool:
        """Whether a Close frame was sent, after which nothing else may be."""
        return self._close_sent

    def stalled(self, seconds: float, rate: float) -> bool:
        """Whether the peer does not go on with what it has begun.

        That is: for so many seconds not a byte of an unfinished message was sent or taken,
        or a frame comes more slowly than ``rate`` bytes per second.
        """
        now, frame, since = time.monotonic(), self._frame, self._sending_since
        if since is not None:
            return now - since > seconds
        if not self._receiving.locked() or not (self._buffer or frame or self._opcode):
            return False
        if frame and now - frame.at > seconds + frame.size / rate:
            return True
        return now - self._received_at > seconds

    def tend(self, wait: bool = False) -> bool:
        """Answer the control frames that have arrived, without blocking on the peer.

        For the time in which the owner does something else than `recv`: data messages are
        kept for it, and the result says whether there are any. While another thread
        receives or sends, this does nothing, or with ``wait`` waits for that to end.
        """
        if not self._receiving.acquire(blocking=wait):
            return False
        try:
            if self._sending.acquire(blocking=wait):
                try:
                    self._tend()
                finally:
                    self._sending.release()
            return bool(self._inbox)
        finally:
            self._receiving.release()

    def _tend(self) -> None:
        if self._closed:
            return
        self._tending = time.monotonic() + _TEND_SECONDS
        try:
            if not self._nowait:
                self._sock.settimeout(0)
            if self._unsent:
                self._transmit(b"", wait=False)
            more = True
            while not (self._held > _HELD_LIMIT or self._must_wait):
                message = self._parse() if self._buffer or self._frame else None
                if message is None:
                    late = time.monotonic() > self._tending
                    if late or not more or self._must_wait:
                        break
                    more = self._fill(self._nowait)
                else:
                    self._inbox.append(message)
                    self._held += len(message) + _MESSAGE_COST
        except (ConnectionClosed, TimeoutError):
            pass  # nothing more has arrived; or the next send or recv will say what ended
        finally:
            if not self._nowait and not self._closed:
                self._sock.settimeout(self._timeout)
            self._tending = 0.0

    @property
    def _must_wait(self) -> bool:
        """Whether `tend` can do no more for now."""
        return bool(self._unsent) or self._close_can_wait

    @property
    def _close_can_wait(self) -> bool:
        """Whether a Close frame is next that a server busy with a step does not obey yet:
        what was asked before it is answered first (section 5.5.1).
        """
        frame = self._frame
        return bool(
            self._tending and not self._client and frame and frame.opcode == CLOSE
        )

    # -- frames in ----------------------------------------------------------

    def _fill(self, flags: int = 0) -> bool:
        """Receive what there is, at least a byte, into the buffer; return if there may be more."""
        if self._closed:
            raise self._ended()
        expected = self._frame.left if self._frame else 0
        size = min(max(expected, _RECV_SIZE), _LARGE_RECV_SIZE)
        try:
            data = self._sock.recv(size, flags)
        except _WOULD_BLOCK:
            raise TimeoutError(f"no message within {self._timeout} s") from None
        except OSError as error:
            raise self._end(ABNORMAL, f"the connection broke: {error}") from error
        if not data:
            raise self._end(ABNORMAL, "the peer went away without a Close frame")
        self._received_at = time.monotonic()
        self._buffer += data
        return len(data) == size or not self._nowait  # TLS hands out record by record

    def _filled_within(self, seconds: float) -> bool:
        """Poll for bytes for so long; return whether any came."""
        until = time.monotonic() + seconds
        while self._nowait and time.monotonic() < until:
            try:
                self._fill(self._nowait)
                return True
            except TimeoutError:
                pass  # not yet
        return False

    def _parse(self) -> str | bytes | None:
        """Take the next whole message out of the buffer; answer control frames on the way."""
        try:
            text = self._parse_plain_text()
            return self._parse_frames() if text is None else text
        except _Fault as fault:
            self.begin_close(fault.code, str(fault))
            raise self._end(fault.code, str(fault)) from None

    def _parse_plain_text(self) -> str | None:
        """Take the message if the buffer holds one whole text frame and nothing else.

        It mostly does. `_parse_frames` would read that too, but in three times the time;
        it reads all else, and says what is wrong.
        """
        buffer = self._buffer
        if len(buffer) < 6 or self._frame or self._opcode or self._trace:
            return None
        # What a client sends is masked: that bit must be set, and the key is there.
        length, start = (buffer[1], 2) if self._client else (buffer[1] ^ 0x80, 6)
        shortest = length < 126
        if length == 126:
            length, start = int.from_bytes(buffer[2:4], "big"), start + 2
            shortest = length >= 126
        plain = buffer[0] == 0x80 | TEXT and shortest and length <= self._max_size
        if not plain or len(buffer) != start + length:
            return None
        data: bytes | bytearray = buffer[start:]
        try:
            if not self._client:
                data = apply_mask(data, buffer[start - 4 : start])
            text = data.decode()
        except UnicodeDecodeError:
            return None
        buffer.clear()
        return text

    def _parse_frames(self) -> str | bytes | None:
        while not self._closed:
            frame = self._frame or self._parse_header()
            if frame is None:
                return None
            self._frame = frame
            if frame.opcode >= CLOSE:
                if len(self._buffer) < frame.left or self._close_can_wait:
                    return None
                self._frame = None
                self._control(frame, bytes(self._take(frame, frame.left)))
                if self._unsent or self._tending and time.monotonic() > self._tending:
                    return None  # another call of `tend` goes on
                continue
            data = self._take(frame, min(frame.left, len(self._buffer)))
            whole = frame.fin and not frame.left
            if self._opcode == TEXT:
                self._check_text(data, whole)
            if self._message or not isinstance(data, bytearray):
                self._message += data
            else:  # of a large message the first part is not copied
                self._message = data
            if frame.left:
                return None
            self._frame = None
            if whole:
                data, self._message = self._message, bytearray()
                message = data.decode() if self._opcode == TEXT else bytes(data)
                self._opcode = self._size = 0
                return message
        return None

    def _parse_header(self) -> _Frame | None:
        """Take a frame header off the buffer, if it is there whole (section 5.2).

        bit  0    1-3   4-7     8     9-15
           +----+-----+--------+------+---------+------------------+-----------------+
           |FIN | RSV | opcode | MASK | length  | extended length  | masking key     |
           |    |     |        |      | (7 bit) | (16 or 64 bit, if| (32 bit,        |
           |    |     |        |      |         | length is 126,127| if MASK is set) |
           +----+-----+--------+------+---------+------------------+-----------------+
        """
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        fin, opcode = bool(buffer[0] & 0x80), buffer[0] & 0x0F
        masked, length = bool(buffer[1] & 0x80), buffer[1] & 0x7F
        if buffer[0] & 0x70:
            raise _Fault(
                PROTOCOL_ERROR, "a reserved bit is set, and no extension was agreed on"
            )
        if opcode not in OPCODE_NAMES:
            raise _Fault(PROTOCOL_ERROR, f"reserved opcode {opcode:#x}")
        if masked == self._client:
            raise _Fault(
                PROTOCOL_ERROR, "frames are masked from client to server, only then"
            )
        if opcode >= CLOSE and (length > 125 or not fin):
            raise _Fault(
                PROTOCOL_ERROR, "a control frame has one part and up to 125 bytes"
            )
        if opcode == CONTINUATION and not self._opcode:
            raise _Fault(
                PROTOCOL_ERROR, "a continuation frame, but no message to continue"
            )
        if opcode in (TEXT, BINARY) and self._opcode:
            raise _Fault(PROTOCOL_ERROR, "a new message inside an unfinished one")
        extended = {126: 2, 127: 8}.get(length, 0)
        end = 2 + extended + (4 if masked else 0)
        if len(buffer) < end:
            return None
        if extended:
            length = int.from_bytes(buffer[2 : 2 + extended], "big")
            if length < (126 if extended == 2 else 1 << 16) or length >> 63:
                raise _Fault(PROTOCOL_ERROR, "the length is not in its shortest form")
        if opcode < CLOSE:
            self._size += length
            if self._size > self._max_size:
                raise _Fault(
                    MESSAGE_TOO_BIG, f"the limit is {self._max_size} bytes a message"
                )
            self._opcode = opcode or self._opcode
        key = bytes(buffer[end - 4 : end]) if masked else b""
        del buffer[:end]
        return _Frame(fin, opcode, key, length)

    def _take(self, frame: _Frame, size: int) -> bytes | bytearray:
        """Take ``size`` payload bytes of ``frame`` off the buffer, unmasked."""
        data: bytes | bytearray = self._buffer
        if size < len(data):
            data = data[:size]
            del self._buffer[:size]
        else:  # of a large frame there is mostly nothing else: it need not be copied
            self._buffer = bytearray()
        frame.left -= size
        if frame.key:
            data = apply_mask(data, frame.key)
            turn = size % 4  # the next byte of the payload meets this byte of the key
            frame.key = frame.key[turn:] + frame.key[:turn]
        if self._trace:
            self._traced += data
            if not frame.left:
                masked, shown = bool(frame.key), bytes(self._traced)
                self._traced.clear()
                _trace_frame(self._trace, "<-", frame.fin, frame.opcode, masked, shown)
        return data

    def _check_text(self, data: bytes | bytearray, final: bool) -> None:
        """Find invalid UTF-8 at its first byte, not at the message's end (section 8.1)."""
        if data.isascii() and not self._decoder.getstate()[0]:
            return
        try:
            self._decoder.decode(data, final)
        except UnicodeDecodeError:
            raise _Fault(INVALID_DATA, "the text is not valid UTF-8") from None
        pending = b"" if final else self._decoder.getstate()[0]
        if pending[:1] == b"\xed" and pending[1:] >= b"\xa0":
            # Half a surrogate: no third byte makes it valid, but the codec waits for it.
            raise _Fault(INVALID_DATA, "the text is not valid UTF-8")

    def _control(self, frame: _Frame, payload: bytes) -> None:
        """Obey a control frame (section 5.5). A Pong asks for nothing."""
        if frame.opcode == PING and not self._close_sent:
            self._send_frame(PONG, payload)
        elif frame.opcode == CLOSE:
            code, reason = _parse_close(payload)
            self._close_received = True
            self.begin_close(code)
            raise self._end(code, reason)

    def _end(self, code: int, reason: str) -> ConnectionClosed:
        self._closed = self._closed or ConnectionClosed(code, reason)
        self._buffer.clear()
        return self._ended()

    def _ended(self) -> ConnectionClosed:
        """A fresh exception for each caller, since raising one writes into it."""
        if self._closed is None:
            return ConnectionClosed(ABNORMAL, "this end has begun to close it")
        return ConnectionClosed(self._closed.code, self._closed.reason)

    # -- frames out ---------------------------------------------------------

    def frame(self, opcode: int, payload: bytes) -> bytes:
        """Return the bytes of one final frame; see `_parse_header` for the layout."""
        return b"".join(self._frame_parts(opcode, payload))

    def _frame_parts(
        self, opcode: int, payload: bytes
    ) -> tuple[bytes, bytes | bytearray]:
        """Return the head of a frame and its payload, masked if this is a client."""
        size = len(payload)
        mask = 0x80 if self._client else 0
        if size < 126:
            head = struct.pack("!BB", 0x80 | opcode, mask | size)
        elif size < 1 << 16:
            head = struct.pack("!BBH", 0x80 | opcode, mask | 126, size)
        else:
            head = struct.pack("!BBQ", 0x80 | opcode, mask | 127, size)
        if not self._client:
            return head, payload
        key = os.urandom(4)  # unpredictable, to protect proxies (section 10.3)
        return head + key, apply_mask(payload, key)

    def _send_frame(self, opcode: int, payload: bytes, wait: bool = True) -> None:
        head, data = self._frame_parts(opcode, payload)
        with self._sending:
            if self._closed or self._close_sent:
                raise self._ended()
            self._close_sent = opcode == CLOSE  # the last frame of all (section 5.5.1)
            if self._trace:
                _trace_frame(self._trace, "->", True, opcode, self._client, payload)
            wait = wait and not self._tending and opcode != CLOSE
            if len(data) > _BLOCK_SIZE:  # not copied, and the head wakes the peer
                self._transmit(head, wait)
                self._transmit(memoryview(data), wait)
            else:  # in one packet
                self._transmit(head + data, wait)

    def _transmit(self, frame: bytes | memoryview, wait: bool) -> None:
        """Hand a frame to the kernel, in one call if it is not a huge one."""
        if self._unsent:
            frame, self._unsent = b"".join((self._unsent, frame)), b""
        try:
            if not wait:
                self._unsent = frame
                self._unsent = frame[self._sock.send(frame, self._nowait) :]
                return
            for start in range(0, len(frame), _BLOCK_SIZE):
                self._sending_since = time.monotonic()
                self._sock.sendall(frame[start : start + _BLOCK_SIZE])
            self._sending_since = None
        except _WOULD_BLOCK:
            if wait:  # part of a frame is out, and nothing may follow it but the rest
                self._end(ABNORMAL, "the peer took no more")
                raise TimeoutError(f"nothing was taken for {self._timeout} s") from None
        except OSError as error:
            raise self._end(ABNORMAL, f"the connection broke: {error}") from error

    # -- the end ------------------------------------------------------------

    def begin_close(self, code: int = NORMAL, reason: str = "") -> None:
        """Send a Close frame, unless one was sent, and do not wait for the peer's."""
        body = b""  # what NO_STATUS stands for
        if code not in (NO_STATUS, ABNORMAL):
            text = reason.encode()[:123].decode(errors="ignore")
            body = struct.pack("!H", code) + text.encode()
        if not self._sending.acquire(blocking=False):
            return  # a peer that does not take what is being sent would not take this
        try:
            self._send_frame(CLOSE, body)
        except ConnectionClosed:
            pass  # there is nothing left to close
        finally:
            self._sending.release()

    def close(self, code: int = NORMAL, reason: str = "", timeout: float = 2.0) -> None:
        """Do the closing handshake (section 7.1.2), then close the TCP connection.

        The server closes it first (section 7.1.1); what the peer still sends is read and
        dropped, since a socket that is closed with unread bytes in it resets the
        connection, and the peer might lose the Close frame. All this takes at most
        ``timeout`` seconds. Closing twice is fine.
        """
        self.begin_close(code, reason)
        deadline = time.monotonic() + timeout
        with self._receiving:
            self.begin_close(code, reason)  # if `tend` was in the way of the other
            try:
                while time.monotonic() < deadline:  # until the peer's Close frame
                    while self._parse() is not None:
                        pass  # it came too late
                    self._sock.settimeout(max(deadline - time.monotonic(), 0.001))
                    self._fill()
            except OSError:
                pass  # it came, or never will
            if self._close_received and not self._client:
                self._sock.close()  # the peer sends nothing more, so there is none to lose
            else:
                linger(self._sock, deadline, first=not self._client)
            self._end(ABNORMAL, "this end has closed it")

    def detach(self) -> socket.socket:
        """Give the socket away, for a caller that frames by himself."""
        return self._sock

    def drop(self) -> None:
        """Close the socket at once, without a word."""
        self._end(ABNORMAL, "this end has dropped it")
        self._sock.close()


# Windows has no such flag; there, a peer that takes nothing can delay a Close frame.
_MSG_DONTWAIT: int = getattr(socket, "MSG_DONTWAIT", 0)
_WOULD_BLOCK = (
    BlockingIOError,
    socket.timeout,
    ssl.SSLWantReadError,
    ssl.SSLWantWriteError,
)


def linger(sock: socket.socket, deadline: float, first: bool) -> None:
    """Close ``sock`` so that the peer gets all that was sent, by ``deadline`` at the latest.

    With ``first`` this end closes first. Then the peer's bytes are dropped until it closes.
    """
    try:
        if first:
            sock.shutdown(socket.SHUT_WR)
        while time.monotonic() < deadline:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            if not sock.recv(_BLOCK_SIZE):
                break
    except OSError:
        pass  # the peer is gone, or in no hurry
    sock.close()


def _set_timeout(sock: socket.socket, seconds: float | None) -> None:
    """Bound each wait for the peer.

    The kernel's own timeout costs nothing; `socket.settimeout` costs a system call for
    each send and recv, but works with TLS and on Windows too.
    """
    if seconds is None or isinstance(sock, ssl.SSLSocket) or sys.platform == "win32":
        sock.settimeout(seconds)
        return
    sock.settimeout(None)
    timeval = struct.pack("@ll", int(seconds), int(seconds % 1 * 1_000_000) or 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)


def _parse_close(payload: bytes) -> tuple[int, str]:
    """Return the code and reason in the payload of a Close frame (sections 5.5.1, 7.4)."""
    if not payload:
        return NO_STATUS, ""
    if len(payload) == 1:
        raise _Fault(PROTOCOL_ERROR, "a Close frame has no body or at least two bytes")
    code = int.from_bytes(payload[:2], "big")
    if not (1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999):
        raise _Fault(PROTOCOL_ERROR, f"{code} is not a status code that may be sent")
    try:
        return code, payload[2:].decode()
    except UnicodeDecodeError:
        raise _Fault(
            INVALID_DATA, "the reason for closing is not valid UTF-8"
        ) from None


# -- the opening handshake, client side (the server's is in server.py) --------


def split_url(url: str) -> tuple[bool, str, int, str]:
    """Split a base URL into (secure, host, port, path), the path without a trailing slash.

    Takes ``http://``, ``https://``, ``ws://``, ``wss://`` and bare ``host:port``.

    Raises:
        ValueError: it is no such URL.
    """
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https", "ws", "wss") or not parts.hostname:
        raise ValueError(
            f"{url!r} is no URL of a server: use http://host:port or ws://host:port"
        )
    secure = parts.scheme in ("https", "wss")
    path = quote(parts.path.rstrip("/"), safe="/%:@!$&'()*+,;=~")
    return secure, parts.hostname, parts.port or (443 if secure else 80), path


def _handshake_request(
    secure: bool, host: str, port: int, path: str, key: str, headers: Mapping[str, str]
) -> bytes:
    name = f"[{host}]" if ":" in host else host
    authority = name if port == (443 if secure else 80) else f"{name}:{port}"
    ours = {
        "Host": authority,
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": key,
        "Sec-WebSocket-Version": "13",
    }
    given = {name.lower() for name in headers}
    fields = {k: v for k, v in ours.items() if k.lower() not in given}
    fields.update(headers)
    _refuse_control_characters(fields)
    lines = [f"GET {path or '/'} HTTP/1.1", *(f"{k}: {v}" for k, v in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _refuse_control_characters(headers: Mapping[str, str]) -> None:
    for name, value in headers.items():
        if not f"{name}{value}".isprintable():
            raise ValueError(
                f"the header {name!r} holds a control character: {value!r}"
            )


def _read_handshake(
    sock: socket.socket, key: str, deadline: float, trace: Trace | None
) -> bytes:
    """Check the server's answer (section 4.1) and return the bytes that followed it."""
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = _recv_until(sock, deadline) if len(data) <= _HEAD_LIMIT else b""
        if not chunk:
            raise ConnectionError("the answer is no HTTP: is this a WebSocket server?")
        data += chunk
    head, early = data.split(b"\r\n\r\n", 1)
    if trace:
        _trace_text(trace, "<-", head)
    status, *lines = head.decode("latin-1").split("\r\n")
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        name = name.lower()
        fields[name] = (
            f"{fields[name]}, {value.strip()}" if name in fields else value.strip()
        )
    if status.split(" ")[:2] != ["HTTP/1.1", "101"]:
        raise ConnectionError(
            f"the server refused: {status}{_refusal(sock, early, deadline)}"
        )
    if fields.get("upgrade", "").lower() != "websocket":
        raise ConnectionError("the answer has no 'Upgrade: websocket'")
    if "upgrade" not in [
        token.strip() for token in fields.get("connection", "").lower().split(",")
    ]:
        raise ConnectionError("the answer has no 'Connection: Upgrade'")
    if fields.get("sec-websocket-accept") != accept_key(key):
        raise ConnectionError("the answer has a wrong Sec-WebSocket-Accept")
    if "sec-websocket-extensions" in fields or "sec-websocket-protocol" in fields:
        raise ConnectionError(
            "the answer accepts an extension or subprotocol nobody offered"
        )
    return early


def _recv_until(sock: socket.socket, deadline: float) -> bytes:
    sock.settimeout(max(deadline - time.monotonic(), 0.001))
    return sock.recv(_RECV_SIZE)


def _refusal(sock: socket.socket, body: bytes, deadline: float) -> str:
    """The sentence in the JSON body of a refused handshake, or nothing."""
    try:
        while len(body) < _HEAD_LIMIT:
            try:
                return f": {json.loads(body)['detail']}"
            except ValueError:
                chunk = _recv_until(sock, min(deadline, time.monotonic() + 1))
            if not chunk:
                break
            body += chunk
    except (OSError, KeyError, TypeError, RecursionError):
        pass  # it has no such sentence
    return ""


# -- what a trace shows --------------------------------------------------------


def _shorten(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:160]}... ({len(text)} in all)"


def _trace_text(trace: Trace, arrow: str, head: bytes) -> None:
    for line in head.decode("latin-1").rstrip("\r\n").split("\r\n"):
        trace(f"{arrow} {line}")


def _trace_frame(
    trace: Trace, arrow: str, fin: bool, opcode: int, masked: bool, payload: bytes
) -> None:
    if opcode == CLOSE and len(payload) >= 2:
        code = int.from_bytes(payload[:2], "big")
        text = f"{code} {payload[2:].decode(errors='replace')}".rstrip()
    elif opcode in (TEXT, CONTINUATION):
        text = payload.decode(errors="replace")
    else:
        text = payload.hex(" ")
    bits = f"FIN={fin:d} opcode={opcode:#x} ({OPCODE_NAMES[opcode]}) MASK={masked:d}"
    trace(f"{arrow} {bits} length={len(payload)}  {_shorten(text)}".rstrip())


# ---------------------------------------------------------------------------
# JSON and dataclasses
# ---------------------------------------------------------------------------


def to_json(value: Any) -> Any:
    """Turn what json does not know into what it does: a dataclass into a dict of its fields.

    Raises:
        TypeError: it has no JSON form.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: getattr(value, name) for name in _field_names(type(value))}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return list(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


# NaN and infinity are not JSON, and lone surrogates are not UTF-8: the first are an error,
# the second are escaped.
encode_json = json.JSONEncoder(
    allow_nan=False, separators=(",", ":"), default=to_json
).encode


def _no_json(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


_decode_json = json.JSONDecoder(parse_constant=_no_json).decode


@cache
def _field_names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Return the type of each field of a dataclass, by name."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def from_json(kind: Any, value: Any) -> Any:
    """Turn plain JSON into a value of the type ``kind``: what `to_json` did, undone.

    Of a union the first member that fits is taken. Keys that are no field of a dataclass
    are dropped, so that a newer peer may send more.

    Raises:
        TypeError, ValueError: the value does not fit.
    """
    return _reader(kind)(value)


@cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """Return the function that reads a type: its annotation is looked at once only."""
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass_reader(kind)  # type: ignore[arg-type]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind
    if kind is float:
        return lambda value: _a(float, float(value) if type(value) is int else value)
    if kind is int:  # to JSON, 1 and 1.0 are one number
        return lambda value: _a(
            int, int(value) if type(value) is float and value.is_integer() else value
        )
    if kind in (str, bool, type(None), dict, list):
        return partial(_a, kind)
    items = [_reader(argument) for argument in arguments if argument is not ...]
    if origin is dict:
        return lambda value: {k: items[1](v) for k, v in _a(dict, value).items()}
    if origin is tuple and ... not in arguments:
        return lambda value: tuple(read(v) for read, v in zip(items, _a(list, value)))
    if origin in (list, tuple, set, frozenset):
        return lambda value: origin(items[0](v) for v in _a(list, value))
    if origin is Union or type(kind).__name__ == "UnionType":
        return lambda value: _read_union(arguments, value)
    return lambda value: value  # Any, Literal, and what cannot be told apart


def _dataclass_reader(cls: type) -> Callable[[Any], Any]:
    readers = {name: _reader(kind) for name, kind in field_types(cls).items()}

    def read(value: Any) -> Any:
        fields = {}
        for name, item in _a(dict, value).items():
            if name in readers:
                fields[name] = readers[name](item)
        return cls(**fields)

    return read


def _a(kind: type, value: Any) -> Any:
    """Return ``value`` if it is of the type, precisely."""
    if type(value) is not kind:
        raise TypeError(f"{_shorten(repr(value))} is no {kind.__name__}")
    return value


def _read_union(members: tuple[Any, ...], value: Any) -> Any:
    if type(value) in members:
        return value
    for member in members:
        try:
            return from_json(member, value)
        except (TypeError, ValueError):
            continue
    raise TypeError(f"{_shorten(repr(value))} is none of {members}")


# ---------------------------------------------------------------------------
# Environment clients
# ---------------------------------------------------------------------------

T = TypeVar("T")
ActT = TypeVar("ActT")
ObsT = TypeVar("ObsT")
StateT = TypeVar("StateT")


@dataclasses.dataclass
class StepResult(Generic[ObsT]):
    """What ``reset`` and ``step`` return: observation, reward (or None), and episode over."""

    observation: ObsT
    reward: float | None = None
    done: bool = False


class ServerError(RuntimeError):
    """The server answered with an error (OpenEnv's ``error`` message, or an HTTP status).

    ``code`` is OpenEnv's error code or ``"HTTP_<status>"``; ``errors`` lists the faults of
    a message that broke its schema: ``type``, ``loc`` (path), ``msg`` and ``input`` of each.
    """

    def __init__(
        self, message: str, code: str, errors: list[Any] | None = None
    ) -> None:
        super().__init__(f"Server error: {message} (code: {code})")
        self.message = message
        self.code = code
        self.errors = errors or []


class EnvClient(Generic[ActT, ObsT, StateT]):
    """What both clients share: typed ``reset``, ``step`` and ``state`` over some transport.

    A client of your own environment names its types, and that is all:

        class MyEnv(WebSocketEnvClient[MyAction, MyObservation, MyState]):
            observation_type = MyObservation
            state_type = MyState

    Without types, dicts go in and dicts come out. Threads may share a client: their calls
    take turns. A client does not survive a fork: the child must make one of its own.
    """

    observation_type: Any = dict
    state_type: Any = dict

    def __init__(
        self,
        base_url: str,
        provider: Any | None = None,
        trace: Trace | None = None,
    ) -> None:
        self._secure, self._host, port, path = split_url(base_url)
        name = f"[{self._host}]" if ":" in self._host else self._host
        self._address = f"{name}:{port}{path}"
        self._provider = provider
        self._trace = trace
        self._lock = threading.RLock()
        self._pid = os.getpid()

    def reset(self, **kwargs: Any) -> StepResult[ObsT]:
        """Begin a new episode. ``seed`` and ``episode_id`` are OpenEnv's; others depend on
        the environment.

        Raises:
            ServerError: the server refused, or the environment failed. It lives on.
            ConnectionError: the server cannot be reached, or went away.
            TimeoutError: no answer in time.
        """
        return self._read(self._parse_result, self._call("reset", kwargs, {}))

    def step(self, action: ActT, **kwargs: Any) -> StepResult[ObsT]:
        """Act once. Raises what `reset` raises.

        Over HTTP ``kwargs`` (``timeout_s``, ``request_id``, ...) are sent beside the action;
        OpenEnv's WebSocket message has no place for them, so there they are dropped.
        """
        answer = self._call("step", self._step_payload(action), kwargs)
        return self._read(self._parse_result, answer)

    def state(self) -> StateT:
        """Ask where the episode stands. Raises what `reset` raises."""
        return self._read(self._parse_state, self._call("state", {}, {}))

    def close(self) -> None:
        """End the session, and stop the container if this client started one.

        A server that was there before goes on running. Closing twice is fine.
        """
        if os.getpid() != self._pid:
            return  # the session belongs to the parent process
        with self._lock:
            try:
                self._disconnect()
            finally:
                provider, self._provider = self._provider, None
                if provider is not None:
                    provider.stop_container()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @classmethod
    def from_docker_image(
        cls, image: str, provider: Any | None = None, **kwargs: Any
    ) -> Self:
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
    def from_hub(
        cls,
        repo_id: str,
        provider: Any | None = None,
        tag: str = "latest",
        **kwargs: Any,
    ) -> Self:
        """Start the container of a Hugging Face Space, ``"owner/name"``, on this machine."""
        image = f"registry.hf.space/{repo_id.replace('/', '-')}:{tag}"
        return cls.from_docker_image(image, provider, **kwargs)

    # The names below are openenv-core's: a client written for it may override them.

    def _step_payload(self, action: ActT) -> dict[str, Any]:
        return action if isinstance(action, dict) else to_json(action)

    def _parse_result(self, payload: dict[str, Any]) -> StepResult[ObsT]:
        reward = payload.get("reward")
        if reward is not None:
            reward = from_json(float, reward)
        done = from_json(bool, payload.get("done", False))
        fields = from_json(dict, payload["observation"])
        if self.observation_type is not dict:
            fields = {**fields, "reward": reward, "done": done}
        return StepResult(from_json(self.observation_type, fields), reward, done)

    def _parse_state(self, payload: dict[str, Any]) -> StateT:
        state: StateT = from_json(self.state_type, payload)
        return state

    def _call(
        self, kind: str, data: dict[str, Any], extra: dict[str, Any]
    ) -> dict[str, Any]:
        """Exchange one request for one answer, one caller at a time."""
        self._refuse_fork()
        with self._lock:
            return self._exchange(kind, data, extra)

    def _refuse_fork(self) -> None:
        if os.getpid() != self._pid:
            raise ConnectionError(
                "this client was made before a fork: make one in this process"
            )

    def _read(self, parse: Callable[[dict[str, Any]], T], answer: dict[str, Any]) -> T:
        try:
            return parse(answer)
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise ConnectionError(
                f"the answer is not as it should be: {error}"
            ) from error

    def _exchange(
        self, kind: str, data: dict[str, Any], extra: dict[str, Any]
    ) -> dict[str, Any]:
        raise NotImplementedError

    def _disconnect(self) -> None:
        raise NotImplementedError


class WebSocketEnvClient(EnvClient[ActT, ObsT, StateT]):
    """A client over WebSocket: one connection, one environment of its own, one session.

    The first call connects, if `connect` or ``with`` has not. After a timeout, a broken
    connection or an answer that makes no sense the episode is lost, and every call says so
    until `connect` opens a new session: an answer is never taken for that of another call.
    Between calls, pings are answered in the background.

    Args:
        base_url: ``http(s)://`` or ``ws(s)://`` or ``host:port``, maybe with a path prefix.
        connect_timeout_s: seconds until connected.
        message_timeout_s: seconds that an answer may take.
        max_message_size_mb: the largest answer taken, in MiB.
        provider: a container provider to stop on `close`.
        default_headers: HTTP headers for the opening handshake, such as Authorization.
        trace: is called with a line of text for all that crosses the wire: try ``print``.
    """

    def __init__(
        self,
        base_url: str,
        connect_timeout_s: float = 10.0,
        message_timeout_s: float = 60.0,
        max_message_size_mb: float = 100.0,
        provider: Any | None = None,
        default_headers: Mapping[str, str] | None = None,
        trace: Trace | None = None,
    ) -> None:
        super().__init__(base_url, provider, trace)
        self._url = f"{'wss' if self._secure else 'ws'}://{self._address}/ws"
        self._headers = dict(default_headers or {})
        self._connect_timeout = connect_timeout_s
        self._timeout = message_timeout_s
        self._max_size = int(max_message_size_mb * (1 << 20))
        self._ws: WebSocket | None = None
        self._lost = ""  # why there is no connection any more

    def connect(self) -> Self:
        """Open the connection, and with it a new session; does nothing if it is open.

        Raises:
            ConnectionError: the server cannot be reached, or refused.
        """
        self._refuse_fork()
        with self._lock:
            if self._ws is None:
                self._ws = WebSocket.connect(
                    self._url,
                    self._headers,
                    self._connect_timeout,
                    self._timeout,
                    self._max_size,
                    self._trace,
                )
                _keeper.watch(self._ws)
                self._lost = ""
            return self

    def disconnect(self) -> None:
        """End the session and close the connection. `connect` opens a new one."""
        if os.getpid() == self._pid:
            with self._lock:
                self._disconnect()

    def __enter__(self) -> Self:
        return self.connect()

    def _disconnect(self) -> None:
        ws, self._ws = self._ws, None
        if ws is not None:
            self._lost = "the client was closed"
            ws.close()

    def _exchange(
        self, kind: str, data: dict[str, Any], extra: dict[str, Any]
    ) -> dict[str, Any]:
        request: dict[str, Any] = {"type": kind}
        if kind != "state":
            request["data"] = data
        text = encode_json(
            request
        )  # what cannot be sent is the caller's fault: nothing is lost
        if self._ws is None:
            if self._lost:
                raise ConnectionError(f"{self._lost}; connect() begins a new session")
            self.connect()
        assert self._ws is not None
        try:
            return self._ask(self._ws, kind, text)
        except ServerError:
            raise
        except BaseException as error:  # Ctrl-C too: the answer is still on its way
            self._lost = f"the session was lost ({error or type(error).__name__})"
            ws, self._ws = self._ws, None
            ws.begin_close()
            ws.drop()
            raise

    def _ask(self, ws: WebSocket, kind: str, text: str) -> dict[str, Any]:
        """Send one message and return the ``data`` of the answer to it."""
        if ws.tend(wait=True):  # a server speaks unasked only to say that it is full
            _answer_data(ws.recv(), "error")
        if self._trace:
            self._trace(f"   {_meaning(kind)}")
        ws.send(text)
        answer = ws.recv(EAGER_SECONDS if _keeper.watches_one else 0)
        data = _answer_data(answer, "state" if kind == "state" else "observation")
        if self._trace and kind != "state":
            self._trace(
                f"   OpenEnv: reward {data.get('reward')}, done {data.get('done')}"
            )
        return data


def _answer_data(answer: str | bytes, expected: str) -> dict[str, Any]:
    try:
        message = _decode_json(answer if isinstance(answer, str) else "")
        kind, data = message["type"], message["data"]
        if kind == "error":
            raise ServerError(
                data.get("message", "unknown"),
                data.get("code", "UNKNOWN"),
                data.get("errors"),
            )
        if kind != expected or not isinstance(data, dict):
            raise ValueError
        return data
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConnectionError(
            f"the server sent {_shorten(repr(answer))} where a message of type "
            f"{expected!r} was due"
        ) from None


def _meaning(kind: str) -> str:
    return "OpenEnv: " + {
        "reset": "reset, begin a new episode",
        "step": "step, the agent acts once",
        "state": "state, where does the episode stand?",
    }.get(kind, kind)


class _Keeper:
    """Answers the pings of connections whose owners are busy: one thread for the process.

    Servers (uvicorn, for one) drop a client that leaves a ping unanswered for 20 seconds,
    and a model may think for longer than that between two steps.
    """

    def __init__(self) -> None:
        self._watched: weakref.WeakSet[WebSocket] = weakref.WeakSet()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def watch(self, ws: WebSocket) -> None:
        with self._lock:
            self._watched.add(ws)
            if self._thread is None:
                thread = threading.Thread(target=self._run, daemon=True, name="pings")
                thread.start()
                self._thread = thread

    @property
    def watches_one(self) -> bool:
        """Whether the process has just one connection, and threads need not share it."""
        return len(self._watched) == 1

    def _run(self) -> None:
        while True:
            time.sleep(0.25)
            with self._lock:
                watched = [ws for ws in self._watched if not ws.ended]
                if not watched:
                    self._thread = None
                    return
            for ws in watched:
                try:
                    ws.tend()
                except Exception:  # noqa: BLE001  # whatever a trace raises ends but its own
                    ws.drop()
            del ws, watched  # else a forgotten client would live on in here


_keeper = _Keeper()
if hasattr(
    os, "register_at_fork"
):  # the thread stays behind, and so must the connections
    os.register_at_fork(after_in_child=_keeper.__init__)  # type: ignore[misc]


class HTTPEnvClient(EnvClient[ActT, ObsT, StateT]):
    """A client over HTTP: every call is a request of its own.

    It names a session of its own in the header ``X-Session-Id``. Servers that know the
    header (server.py does) keep one environment for it; openenv-core 0.3.0 does not.

    Args:
        base_url: ``http(s)://`` or ``ws(s)://`` or ``host:port``, maybe with a path prefix.
        request_timeout_s: seconds that an answer may take.
        default_headers: HTTP headers for every request, such as Authorization.
        provider: a container provider to stop on `close`.
        trace: is called with a line of text for all that crosses the wire: try ``print``.
    """

    def __init__(
        self,
        base_url: str,
        request_timeout_s: float = 15.0,
        default_headers: Mapping[str, str] | None = None,
        provider: Any | None = None,
        trace: Trace | None = None,
    ) -> None:
        super().__init__(base_url, provider, trace)
        self._url = f"{'https' if self._secure else 'http'}://{self._address}"
        self._headers = {"X-Session-Id": str(uuid.uuid4()), **(default_headers or {})}
        self._timeout = float(request_timeout_s)
        self._open = False  # whether there may be a session to close
        self._opener = _http_opener(self._host, trace)
        _refuse_control_characters(self._headers)

    def _exchange(
        self, kind: str, data: dict[str, Any], extra: dict[str, Any]
    ) -> dict[str, Any]:
        if self._trace:
            self._trace(f"   {_meaning(kind)}")
        if kind == "state":
            return self._request("GET", "/state", None)
        self._open = True
        return self._request(
            "POST", f"/{kind}", {"action": data, **extra} if kind == "step" else data
        )

    def _request(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> dict[str, Any]:
        import urllib.request  # here, since a WebSocket client does not need it
        from http.client import HTTPException

        url, headers = self._url + path, dict(self._headers)
        data = None if body is None else encode_json(body).encode()
        if data is not None:
            headers["Content-Type"] = "application/json"
        request = urllib.request.Request(url, data, headers, method=method)
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                status, text = response.status, response.read()
        except (OSError, HTTPException) as error:
            cause = getattr(error, "reason", error)
            if isinstance(cause, socket.timeout):
                late = f"no answer from {url} within {self._timeout:g} s"
                raise TimeoutError(late) from None
            raise ConnectionError(f"no answer from {url}: {cause!r}") from error
        if self._trace:
            _trace_response(self._trace, response, text)
        if status != 200:
            raise _server_error(status, text)
        try:
            answer = _decode_json(text.decode())
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise ConnectionError(
                f"{url} answered {_shorten(repr(text))}, no JSON object"
            )
        return answer

    def _disconnect(self) -> None:
        if self._open:
            self._open = False
            try:
                self._request("POST", "/close", {})
            except (ServerError, ConnectionError, TimeoutError):
                pass  # the server does not know sessions, or is gone, and so is the session


def _http_opener(host: str, trace: Trace | None = None) -> Any:
    """urllib without redirects, which an API does not need and which leak headers."""
    from http.client import HTTPConnection, HTTPSConnection
    from urllib import request

    loopback = host == "localhost" or host.startswith("127.") or host == "::1"
    http, https = request.HTTPHandler(), request.HTTPSHandler()
    if trace:
        plain, secure = (_traced(c, trace) for c in (HTTPConnection, HTTPSConnection))
        http.http_open = lambda req: http.do_open(plain, req)  # type: ignore[method-assign]
        https.https_open = lambda req: https.do_open(secure, req)  # type: ignore[method-assign]
    opener = request.OpenerDirector()
    for handler in (request.ProxyHandler({} if loopback else None), http, https):
        opener.add_handler(handler)
    return opener


def _traced(connection: Any, trace: Trace) -> Any:
    """A class of connections that shows what it sends."""

    def send(self: Any, data: bytes) -> None:
        head, _, body = data.partition(b"\r\n\r\n")
        _trace_text(trace, "->", head)
        if body:
            trace(f"-> {_shorten(body.decode(errors='replace'))}")
        connection.send(self, data)

    return type("TracedConnection", (connection,), {"send": send})


def _server_error(status: int, text: bytes) -> ServerError:
    """Make of an HTTP error what a WebSocket error message would have been."""
    try:
        body = json.loads(text)
        detail, code = body["detail"], body.get("code")
        if isinstance(detail, list):
            words = [f"{'.'.join(map(str, d['loc']))}: {d['msg']}" for d in detail]
            return ServerError("; ".join(words), code or "VALIDATION_ERROR", detail)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        detail, code = _shorten(text.decode(errors="replace")), None
    return ServerError(str(detail), code or f"HTTP_{status}")


def _trace_response(trace: Trace, response: Any, text: bytes) -> None:
    trace(f"<- HTTP/1.1 {response.status} {response.reason}")
    for name, value in response.headers.items():
        trace(f"<- {name}: {value}")
    trace(f"<- {_shorten(text.decode(errors='replace'))}")


class BenchmarkEnv(
    HTTPEnvClient[
        benchmark.BenchmarkAction,
        benchmark.BenchmarkObservation,
        benchmark.BenchmarkState,
    ]
):
    """The Benchmark environment over HTTP."""

    observation_type = benchmark.BenchmarkObservation
    state_type = benchmark.BenchmarkState


class BenchmarkEnvWS(
    WebSocketEnvClient[
        benchmark.BenchmarkAction,
        benchmark.BenchmarkObservation,
        benchmark.BenchmarkState,
    ]
):
    """The Benchmark environment over WebSocket."""

    observation_type = benchmark.BenchmarkObservation
    state_type = benchmark.BenchmarkState


# ---------------------------------------------------------------------------
# Docker
# ---------------------------------------------------------------------------


class LocalDockerProvider:
    """Runs one container of an environment on this machine, by the ``docker`` command."""

    def __init__(self) -> None:
        self._name = ""

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
        options = [f"--{k.replace('_', '-')}={v}" for k, v in kwargs.items()]
        for key, value in (env_vars or {}).items():
            options += ["--env", f"{key}={value}"]
        try:
            self._docker(
                "run",
                "--detach",
                "--name",
                self._name,
                "--publish",
                f"127.0.0.1:{port or ''}:8000",
                *options,
                image,
            )
            address = self._docker("port", self._name, "8000/tcp").splitlines()[0]
        except (RuntimeError, IndexError) as error:
            raise self._failure(
                f"{image} does not start: {error}", RuntimeError
            ) from None
        return f"http://{address}"

    def wait_for_ready(self, base_url: str, timeout_s: float = 30.0) -> None:
        """Wait until ``/health`` answers 200.

        Raises:
            TimeoutError: it did not within ``timeout_s`` seconds; RuntimeError: the container
                has ended. Both say its last log lines, and the container is removed.
        """
        from http.client import HTTPException

        opener = _http_opener(split_url(base_url)[1])
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                with opener.open(f"{base_url.rstrip('/')}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
                    last = f"HTTP Error {answer.status}: {answer.reason}"
            except (OSError, HTTPException) as error:  # not there yet
                last = str(error)
            if (
                self._name
                and self._docker("inspect", "-f", "{{.State.Running}}", self._name)
                != "true"
            ):
                raise self._failure("the container has ended", RuntimeError)
            if time.monotonic() > deadline:
                raise self._failure(
                    f"not healthy within {timeout_s:g} s: {last}", TimeoutError
                )
            time.sleep(0.05)

    def stop_container(self) -> None:
        """Stop and remove the container. Does nothing if there is none."""
        name, self._name = self._name, ""
        if name:
            try:
                self._docker("stop", "--time", "5", name)
            except RuntimeError:
                pass  # it has ended by itself, or never started; removing it is what counts
            self._docker("rm", "--force", name)

    def _failure(self, message: str, kind: type[Exception]) -> Exception:
        """Remove the container, and make an exception of ``message`` and its last words."""
        try:
            logs = self._docker("logs", "--tail", "20", self._name)
        except RuntimeError:
            logs = ""
        try:
            self.stop_container()
        except RuntimeError:
            pass  # it was never made
        return kind(f"{message}\n{logs}".rstrip())

    def _docker(self, *arguments: str) -> str:
        import subprocess

        try:
            done = subprocess.run(
                ["docker", *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT if arguments[0] == "logs" else subprocess.PIPE,
                text=True,
                check=True,
            )
        except FileNotFoundError:
            raise RuntimeError("there is no docker command: install Docker") from None
        except subprocess.CalledProcessError as error:
            raise RuntimeError(
                (error.stderr or error.stdout or str(error)).strip()
            ) from None
        return done.stdout.strip()


# ---------------------------------------------------------------------------
# The benchmark
# ---------------------------------------------------------------------------


class _Lane:
    """One session of the benchmark: sends the same request again and again.

    Requests are made once, and of an answer only the beginning is looked at, so that the
    server is what is measured.
    """

    scratch = bytearray(1 << 20)  # what was received, overwritten each time

    def __init__(
        self, sock: socket.socket, reset: bytes, step: bytes, http: bool
    ) -> None:
        self.sock, self.reset, self.step, self.http = sock, reset, step, http
        self.head, self.got = b"", 0  # of the answer that is due
        self.sent_at = 0.0

    def send(self, request: bytes) -> None:
        self.sent_at = time.perf_counter()
        self.sock.sendall(request)

    def receive(self) -> bytes | None:
        """Receive what there is; return the answer's beginning once all of it has come.

        Raises:
            ConnectionError: the server closed the connection.
        """
        size = self.sock.recv_into(self.scratch)
        if not size:
            raise ConnectionError("the server closed the connection")
        self.got += size
        if len(self.head) < 4096:
            self.head += self.scratch[: min(size, 4096)]
        due = self._http_size() if self.http else self._frame_size()
        if due is None or self.got < due:
            return None
        answer, self.head, self.got = self.head, self.head[due:], self.got - due
        if self.http or answer[0] & 0x0F != PING:
            return answer
        pong = bytes((0x80 | PONG, 0x80 | answer[1])) + bytes(4) + answer[2:due]
        self.sock.sendall(pong)
        return None

    def _frame_size(self) -> int | None:
        head = self.head
        extended = {126: 2, 127: 8}.get(head[1], 0) if len(head) > 1 else 8
        if len(head) < 2 + extended:
            return None
        length = int.from_bytes(head[2 : 2 + extended], "big") if extended else head[1]
        return 2 + extended + length

    def _http_size(self) -> int | None:
        end = self.head.find(b"\r\n\r\n")
        if end < 0:
            return None
        fields = self.head[:end].lower().partition(b"\r\ncontent-length:")[2]
        return end + 4 + int(fields.split(b"\r\n")[0] or 0)


def _open_lanes(url: str, sessions: int, message: str, http: bool) -> list[_Lane]:
    secure, host, port, path = split_url(url)
    if secure:
        raise ValueError(
            "the benchmark speaks http:// and ws:// only: TLS would be measured"
        )
    lanes = []
    for _ in range(sessions):
        if http:
            sock = socket.create_connection((host, port), 10)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            head = (
                f"HTTP/1.1\r\nHost: {host}:{port}\r\nX-Session-Id: {uuid.uuid4()}\r\n"
            )
            reset, step = (
                f"POST {path}{name} {head}Content-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
                for name, body in (
                    ("/reset", "{}"),
                    ("/step", encode_json({"action": {"message": message}})),
                )
            )
        else:
            ws = WebSocket.connect(f"ws://{host}:{port}{path}/ws")
            sock = ws.detach()
            reset, step = (
                ws.frame(TEXT, encode_json(request).encode())
                for request in (
                    {"type": "reset", "data": {}},
                    {"type": "step", "data": {"message": message}},
                )
            )
        sock.settimeout(60)
        lanes.append(_Lane(sock, reset, step, http))
    return lanes


def bench(
    url: str,
    seconds: float,
    sessions: int = 1,
    size: int = 10,
    http: bool = False,
    progress: Trace | None = None,
) -> dict[str, Any]:
    """Measure a server: on each session, one step after the other for so many seconds.

    Returns: steps per second, latencies and times of connecting and resetting in
    milliseconds, and the number of answers that were no observation.
    """
    import selectors

    began = time.perf_counter()
    lanes = _open_lanes(url, sessions, "x" * size, http)
    connected = time.perf_counter()
    selector = selectors.DefaultSelector()
    for lane in lanes:
        selector.register(lane.sock, selectors.EVENT_READ, lane)

    def wait() -> list[_Lane]:  # a single session is simply waited for
        return lanes if sessions == 1 else [key.data for key, _ in selector.select(1)]

    errors = 0
    resets: list[float] = []
    for lane in lanes:
        lane.send(lane.reset)
    while len(resets) < sessions:
        for lane in wait():
            answer = lane.receive()
            if answer is not None:
                errors += b'"observation"' not in answer
                resets.append(time.perf_counter() - lane.sent_at)
    latencies: list[float] = []
    start = time.perf_counter()
    end, tell = start + seconds, start + 1
    for lane in lanes:
        lane.send(lane.step)
    now = start
    while now < end:
        for lane in wait():
            answer = lane.receive()
            if answer is None:
                continue
            now = time.perf_counter()
            latencies.append(now - lane.sent_at)
            errors += b'"observation"' not in answer
            lane.send(lane.step)
        if progress and now > tell:
            tell = now + 1
            progress(f"{len(latencies) / (now - start):,.0f} steps/s")
    for lane in lanes:
        lane.sock.close()
    latencies.sort()
    resets.sort()

    def milliseconds(times: list[float], part: float) -> float:
        return round(times[min(int(len(times) * part), len(times) - 1)] * 1000, 3)

    return {
        "transport": "http" if http else "websocket",
        "sessions": sessions,
        "message_bytes": size,
        "steps": len(latencies),
        "steps_per_second": round(len(latencies) / (now - start), 1),
        "p50_ms": milliseconds(latencies, 0.5),
        "p90_ms": milliseconds(latencies, 0.9),
        "p99_ms": milliseconds(latencies, 0.99),
        "max_ms": milliseconds(latencies, 1),
        "connect_ms": round((connected - began) * 1000, 3),
        "reset_p50_ms": milliseconds(resets, 0.5),
        "errors": errors,
    }


# ---------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Step the messages given, or run the benchmark; return the exit code."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="client.py",
        description="Step messages through the Benchmark environment, or measure a server. "
        "Without --url it starts a server of its own.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("messages", nargs="*", metavar="MESSAGE", help="what to step")
    add("--url", help="base URL of a running server")
    add("--http", action="store_true", help="use HTTP; default: WebSocket")
    add("--trace", action="store_true", help="show on stderr all that crosses the wire")
    add("--bench", type=float, metavar="SECONDS", help="measure instead, for so long")
    add("--sessions", type=int, default=1, metavar="N", help="of the benchmark (1)")
    add("--size", type=int, default=10, metavar="BYTES", help="of its messages (10)")
    add("--json", action="store_true", help="print its result as JSON")
    add("--version", action="version", version=f"%(prog)s {benchmark.__version__}")
    # One clear line, and no usage text above it.
    parser.error = lambda message: parser.exit(2, f"client.py: {message}\n")  # type: ignore[method-assign]
    options = parser.parse_args(argv)
    if not options.messages and options.bench is None:
        parser.error(
            'give messages to step, as in: client.py "Hello" "World"; or --bench 5'
        )
    if options.bench is not None and (
        options.bench <= 0 or options.sessions < 1 or options.size < 0
    ):
        parser.error("--bench and --sessions take numbers above 0, --size 0 or more")
    try:
        if options.bench is not None:
            _run_bench(options)
        else:
            _run_messages(options)
    except ImportError:
        parser.error("server.py is not beside client.py: give --url")
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))
    return 0


def _run_messages(options: Any) -> None:
    from contextlib import ExitStack

    trace = (lambda line: print(line, file=sys.stderr)) if options.trace else None
    with ExitStack() as stack:
        url = options.url
        if url is None:
            if TYPE_CHECKING or not __package__:
                import server
            else:
                from . import server
            app = server.create_app(
                benchmark.BenchmarkEnvironment,
                benchmark.BenchmarkAction,
                benchmark.BenchmarkObservation,
            )
            url = stack.enter_context(app.start()).url
        client_cls = BenchmarkEnv if options.http else BenchmarkEnvWS
        env = stack.enter_context(client_cls(url, trace=trace))
        env.reset()
        for message in options.messages:
            result = env.step(benchmark.BenchmarkAction(message=message))
            observation = result.observation
            print(
                f"{observation.echoed_message!r} length {observation.message_length} reward {result.reward}"
            )


def _run_bench(options: Any) -> None:
    import subprocess

    server = None
    if options.url is None:
        command = [sys.executable, os.path.join(os.path.dirname(__file__), "server.py")]
        if __package__:
            command = [sys.executable, "-m", f"{__package__}.server"]
        command += ["--port", "0", "--log-level", "warning"]
        command += ["--max-concurrent-envs", str(options.sessions)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout
        line = server.stdout.readline()
        if not line:
            raise ImportError
        options.url = line.partition(" on ")[2].partition(": ")[0]
    on_terminal = sys.stderr.isatty()
    raise_file_limit()
    try:
        result = bench(
            options.url,
            options.bench,
            options.sessions,
            options.size,
            options.http,
            (lambda text: print(f"\r{text} ", end="", file=sys.stderr, flush=True))
            if on_terminal
            else None,
        )
    finally:
        if server:
            server.terminate()
            server.communicate()
    if on_terminal:
        print("\r", end="", file=sys.stderr)
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(
            f"{name:>16}  {value:,}"
            if isinstance(value, (int, float))
            else f"{name:>16}  {value}"
        )


def raise_file_limit() -> None:
    """Make room for a thousand sockets, as far as the system lets us."""
    try:
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (ImportError, ValueError, OSError):
        pass  # Windows has no such limit; elsewhere the old one stays


if __name__ == "__main__":
    sys.exit(main())
