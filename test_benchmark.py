# SPDX-License-Identifier: BSD-3-Clause
"""Tests of the Benchmark environment, its server and its clients: ``python3 -m unittest``.

They go through what people use: a socket, a URL, a command, a browser. Every server gets
a free port; conditions are waited for, not times. Raw sockets here speak WebSocket by
code of their own (`RawPeer`), so that client.py is not judged by itself.

``python3 test_benchmark.py --bench 5`` measures a server instead (``--bench 1 --help``).

What is promised, and the class that tests it (each role of RFC 6455 from one table):

    the environment: reset, step, rewards        EnvironmentTest
    RFC 6455: frames, masks, closes, UTF-8       ProtocolTest, ClientProtocolTest
    a WebSocket on a socket: waits, ends         WebSocketTest, ClientWebSocketTest
    the opening handshake, either side           HandshakeTest, UpgradeTest
    JSON read as dataclasses; JSON Schema        ReadJsonTest, SchemaTest
    the clients, their errors and timeouts       ClientTest
    HTTP to the letter; OpenAPI                  HTTPTest
    the pages of other sites are kept out        OriginTest
    OpenEnv's messages; what fails in them       MessageTest, FailureTest
    quick environments, and those that wait      ServingTest, OwnThreadTest
    what is said when an app is made             AppTest
    sessions, capacity, slow peers, the end      SessionTest
    the command lines and their mistakes         CommandLineTest
    the web page, in Chromium                    PageTest
    README.md: commands, transcripts, bytes      ReadmeExamplesTest, ReadmeWebSocketTest
    making an environment; copying the files     OwnEnvironmentTest, CopiesTest
    Dockerfile, openenv.yaml, options; nginx     ProjectFilesTest, NginxTest
    openenv's clients, tools and server          InteroperationTest
"""

# ruff: noqa: UP007  # Python 3.9 needs Union where types are values

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import dataclasses
import enum
import functools
import http.client
import io
import itertools
import json
import logging
import os
import pickle
import random
import re
import selectors
import shlex
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import typing
import unittest
import zipfile
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Optional, Union
from unittest import mock

import benchmark
import client
import server
from benchmark import (
    BenchmarkAction,
    BenchmarkEnv,
    BenchmarkEnvironment,
    BenchmarkEnvWS,
    BenchmarkObservation,
    BenchmarkState,
    StepResult,
)

if TYPE_CHECKING:
    from typing import Self

HERE = Path(__file__).resolve().parent
PATIENCE = 20.0  # seconds, for what happens at once unless it is broken
# How long a server may take to see that it is to stop: a hundred are stopped in here.
server.Server.serve_forever.__defaults__ = (0.02,)


class Result(unittest.TextTestResult):
    """Says at the end what was skipped and why, also without -v."""

    def printErrors(self) -> None:
        super().printErrors()
        for reason, count in Counter(reason for _, reason in self.skipped).items():
            self.stream.writeln(f"Skipped {count}: {reason}")


unittest.TextTestRunner.resultclass = Result  # type: ignore[assignment]


def wait_until(condition: Callable[[], Any], what: str = "the condition") -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true")
        time.sleep(0.005)


def serve(
    env: Callable[[], Any] = BenchmarkEnvironment, **options: Any
) -> server.Server:
    app = server.create_app(env, BenchmarkAction, BenchmarkObservation, **options)
    return app.start()


@contextlib.contextmanager
def constants(**values: float) -> Iterator[None]:
    """Shorten the server's times."""
    with contextlib.ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(mock.patch.object(server, name, value))
        yield


def exchange(
    url: str,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, Any]:
    """Send one HTTP request; return the status and the JSON of the answer."""
    connection = http.client.HTTPConnection(url.partition("//")[2], timeout=10)
    try:
        given = {"Content-Type": "application/json", **(headers or {})}
        raw = body is None or isinstance(body, (bytes, str))
        data = body if raw else json.dumps(body)
        connection.request(method, path, data, given)
        answer = connection.getresponse()
        text = answer.read().decode()
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, text
    finally:
        connection.close()


class RawPeer:
    """A socket to a server, and RFC 6455 by hand: it can break every rule."""

    def __init__(self, running: server.Server | Command) -> None:
        self.sock = socket.create_connection(
            ("127.0.0.1", running.server_port), PATIENCE
        )
        self.port = running.server_port
        self.data = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def read(self, size: int) -> bytes:
        while len(self.data) < size:
            data = self.sock.recv(65536)
            if not data:
                raise EOFError(self.data)
            self.data += data
        found, self.data = self.data[:size], self.data[size:]
        return found

    def read_head(self) -> str:
        while b"\r\n\r\n" not in self.data:
            data = self.sock.recv(65536)
            if not data:
                raise EOFError(self.data)
            self.data += data
        head, self.data = self.data.split(b"\r\n\r\n", 1)
        return head.decode("latin-1")

    def request(self, text: str, body: bytes = b"") -> None:
        head = text.replace("\n", "\r\n").replace(
            "HOST", f"Host: 127.0.0.1:{self.port}"
        )
        self.send(f"{head}\r\n\r\n".encode("latin-1") + body)

    def response(self) -> tuple[int, dict[str, str], bytes]:
        status, *lines = self.read_head().split("\r\n")
        fields = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
        return (
            int(status.split()[1]),
            fields,
            self.read(int(fields.get("content-length", 0))),
        )

    def ask(self, text: str, body: bytes = b"") -> tuple[int, dict[str, str], Any]:
        self.request(text, body)
        status, fields, answer = self.response()
        return status, fields, json.loads(answer) if answer else None

    def at_end(self) -> bool:
        """Wait for the server to close the connection."""
        try:
            while data := self.sock.recv(65536):
                self.data += data
        except ConnectionResetError:
            pass
        return not self.data

    def upgrade(self, extra: str = "") -> RawPeer:
        self.request(
            "GET /ws HTTP/1.1\nHOST\nUpgrade: websocket\nConnection: Upgrade\n"
            f"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\nSec-WebSocket-Version: 13{extra}"
        )
        head = self.read_head()
        if not head.startswith("HTTP/1.1 101"):
            raise AssertionError(head)
        return self

    def read_frame(self) -> tuple[int, bytes]:
        first, second = self.read(2)
        size = second & 0x7F
        if size > 125:
            size = int.from_bytes(self.read(2 if size == 126 else 8), "big")
        return first, self.read(size)

    def message(self) -> Any:
        first, payload = self.read_frame()
        if first != 0x81:
            raise AssertionError(f"{first:#x} {payload!r}")
        return json.loads(payload)

    def close_code(self) -> int:
        """Wait for the server's Close frame, then for the end of the connection."""
        while True:
            first, payload = self.read_frame()
            if first == 0x88:
                break
        with contextlib.suppress(OSError):
            self.send(frame(8, payload))
        if not self.at_end():
            raise AssertionError(f"after Close: {self.data!r}")
        return int.from_bytes(payload[:2], "big")


def frame(
    opcode: int,
    payload: bytes = b"",
    fin: bool = True,
    masked: bool = True,
    bits: int = 0,
    form: int = 0,
) -> bytes:
    """Make a frame, also a wrong one: ``form`` forces the 2- or 8-byte length."""
    size = len(payload)
    form = form or (0 if size < 126 else 2 if size < 65536 else 8)
    head = bytes([fin << 7 | bits << 4 | opcode])
    head += bytes([masked << 7 | {0: size, 2: 126, 8: 127}[form]])
    head += size.to_bytes(form, "big") if form else b""
    if not masked:
        return head + payload
    key = b"\x12\x34\x56\x78"
    return head + key + bytes(b ^ key[i % 4] for i, b in enumerate(payload))


def text_frame(message: Any) -> bytes:
    return frame(1, json.dumps(message).encode())


class ServerCase(unittest.TestCase):
    """Tests against one server that runs for the whole class."""

    running: server.Server
    options: dict[str, Any] = {}  # noqa: RUF012

    @classmethod
    def setUpClass(cls) -> None:
        logging.disable(logging.CRITICAL)
        cls.running = serve(**cls.options)

    @classmethod
    def tearDownClass(cls) -> None:
        cls.running.stop()
        logging.disable(logging.NOTSET)

    def peer(self, running: server.Server | None = None) -> RawPeer:
        peer = RawPeer(running or self.running)
        self.addCleanup(peer.sock.close)
        return peer

    def http(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        running: server.Server | None = None,
    ) -> tuple[int, Any]:
        return exchange((running or self.running).url, method, path, body, headers)


# ---------------------------------------------------------------------------
# The environment
# ---------------------------------------------------------------------------


class EnvironmentTest(unittest.TestCase):
    def test_reset_begins_an_episode(self) -> None:
        env = BenchmarkEnvironment()
        first = env.reset()
        self.assertEqual(
            first,
            BenchmarkObservation("Benchmark environment ready!", 0, 0.0, False, {}),
        )
        episode = env.state.episode_id
        env.step(BenchmarkAction("x"))
        env.reset(seed=1, episode_id="named")
        self.assertEqual(env.state, BenchmarkState("named", 0))
        self.assertRegex(str(episode), r"^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f-]+$")

    def test_step_echoes_and_rewards(self) -> None:
        env = BenchmarkEnvironment()  # a fresh one already has an episode
        rewards = {"": 0.0, "Hi": 0.2, "abc": 0.3, "Hello, World!": 1.3, "𝄞𝄞𝄞": 0.3}
        for step, (message, reward) in enumerate(rewards.items(), 1):
            observation = env.step(BenchmarkAction(message), timeout_s=1)
            self.assertEqual(observation.echoed_message, message)
            self.assertEqual(observation.message_length, len(message))
            self.assertEqual(observation.reward, reward)
            self.assertEqual(observation.metadata["step"], step)
            self.assertIs(observation.done, False)

    def test_environment_loads_no_network_code(self) -> None:
        code = "import benchmark, sys; print('socket' in sys.modules); benchmark.BenchmarkEnv"
        done = run("-S", "-c", code)
        self.assertEqual((done.stdout, done.stderr), ("False\n", ""))
        with self.assertRaises(AttributeError):
            benchmark.Nothing  # noqa: B018

    def test_self_check(self) -> None:
        done = run("benchmark.py")
        self.assertEqual(done.returncode, 0)
        names = [line.partition(":")[0] for line in done.stdout.splitlines()]
        self.assertEqual(names, ["reset", "step", "state", "rewards"])

        def nothing(*_: Any) -> BenchmarkObservation:
            return BenchmarkObservation()

        broken = mock.patch.object(BenchmarkEnvironment, "step", nothing)
        with broken, contextlib.redirect_stdout(io.StringIO()) as output:
            self.assertEqual(benchmark.check(), 1)
        self.assertIn("rewards: FAILED", output.getvalue())


# ---------------------------------------------------------------------------
# RFC 6455: the WebSocket protocol, without I/O and on a socket, in both roles
# ---------------------------------------------------------------------------

BOTH: tuple[Any, ...] = (BenchmarkEnvWS, BenchmarkEnv)
GENERIC: tuple[Any, ...] = (client.WebSocketEnvClient, client.HTTPEnvClient)
Make = Callable[..., bytes]  # `frame`, masked if the sender is a client
FULL = b"x" * (1 << 17)  # the largest message that is taken


def closing(code: int, reason: str = "") -> Callable[[Make], bytes]:
    return lambda f: f(8, close_body(code, reason))


def close_body(code: int, reason: str = "") -> bytes:
    return struct.pack("!H", code) + reason.encode()


def xor(data: bytes, key: bytes) -> bytes:
    return bytes(b ^ key[i % 4] for i, b in enumerate(data))


# Section | what comes | its bytes | the messages in it | the frames that answer, or the
# status code of the Close frame that answers a fault
RULES: list[tuple[str, str, Callable[[Make], bytes], list[str | bytes], Any]] = [
    ("5.6", "text", lambda f: f(1, "aé𝄞\uffff".encode()), ["aé𝄞\uffff"], []),
    ("5.6", "nothing", lambda f: f(1) + f(2) + f(0x0A), ["", b""], []),
    ("5.6", "any bytes", lambda f: f(2, b"\xff\0\xed\xa0"), [b"\xff\0\xed\xa0"], []),
    ("5.2", "three at once", lambda f: f(1, b"a") * 3, ["a", "a", "a"], []),
    ("5.2", "7 bits", lambda f: f(2, b"x" * 125), [b"x" * 125], []),
    ("5.2", "16 bits", lambda f: f(1, b"x" * 126), ["x" * 126], []),
    ("5.2", "all 16", lambda f: f(2, b"x" * 65535), [b"x" * 65535], []),
    ("5.2", "64 bits", lambda f: f(1, b"x" * 65536), ["x" * 65536], []),
    ("5.2", "the limit", lambda f: f(2, FULL), [FULL], []),
    ("5.2", "reserved bits", lambda f: f(1, bits=4), [], 1002),
    ("5.2", "reserved data opcode", lambda f: f(3), [], 1002),
    ("5.2", "reserved control opcode", lambda f: f(11), [], 1002),
    ("5.2", "long form, 16 bits", lambda f: f(1, b"x", form=2), [], 1002),
    ("5.2", "long form, 64 bits", lambda f: f(1, b"x" * 200, form=8), [], 1002),
    ("5.2", "top bit", lambda f: f(2, form=8)[:2] + b"\xff" * 12, [], 1002),
    ("5.4", "parts", lambda f: f(2, b"a", fin=False) + f(0, b"b"), [b"ab"], []),
    ("5.4", "no part", lambda f: f(1, fin=False) + f(0, fin=False) + f(0), [""], []),
    ("5.4", "nothing to continue", lambda f: f(0, b"x"), [], 1002),
    ("5.4", "nothing left", lambda f: f(1, b"x") + f(0, b"y"), ["x"], 1002),
    ("5.4", "text in a text", lambda f: f(1, b"a", fin=False) + f(1), [], 1002),
    ("5.4", "binary in it", lambda f: f(1, b"a", fin=False) + f(2), [], 1002),
    ("5.4", "cut é", lambda f: f(1, b"\xc3", fin=False) + f(0, b"\xa9"), ["é"], []),
    ("5.4", "ping between", lambda f: f(1, fin=False) + f(9) + f(0), [""], [(10, b"")]),
    ("5.4", "pong between", lambda f: f(1, fin=False) + f(10) + f(0), [""], []),
    ("5.5", "long ping", lambda f: f(9, b"x" * 126), [], 1002),
    ("5.5", "long close", lambda f: f(8, close_body(1000, "x" * 124)), [], 1002),
    ("5.5", "ping in parts", lambda f: f(9, fin=False), [], 1002),
    ("5.5.1", "close", lambda f: f(8), [], [(8, b"")]),
    ("5.5.1", "close of one byte", lambda f: f(8, b"\x03"), [], 1002),
    ("5.5.1", "after it", lambda f: f(8) + f(1, b"x") + f(9), [], [(8, b"")]),
    ("5.5.1", "in a message", lambda f: f(1, b"a", fin=False) + f(8), [], [(8, b"")]),
    ("5.5.1", "behind one", lambda f: f(1, b"a") + f(8), ["a"], [(8, b"")]),
    ("5.5.2", "ping", lambda f: f(9), [], [(10, b"")]),
    ("5.5.2", "full", lambda f: f(9, b"\xff" * 125), [], [(10, b"\xff" * 125)]),
    ("5.5.3", "pong", lambda f: f(10, b"unasked"), [], []),
    ("7.1.7", "fault behind messages", lambda f: f(1, b"a") + f(3), ["a"], 1002),
    ("7.1.7", "and before", lambda f: f(3) + f(1, b"a") + f(9), [], 1002),
    ("7.4", "reason", closing(1000, "grüße" * 17), [], [(8, close_body(1000))]),
    ("8.1", "invalid byte", lambda f: f(1, b"\xff"), [], 1007),
    ("8.1", "in an unfinished frame", lambda f: f(1, b"\xff" * 99)[:9], [], 1007),
    ("8.1", "unfinished part", lambda f: f(1, b"a\xc0\xaf", fin=False), [], 1007),
    ("8.1", "unfinished surrogate", lambda f: f(1, b"\xed\xa0 ")[:-1], [], 1007),
    ("8.1", "unfinished beyond", lambda f: f(1, b"\xf4\x90 ")[:-1], [], 1007),
    ("8.1", "half a code point", lambda f: f(1, b"\xe2\x82"), [], 1007),
    ("8.1", "half in parts", lambda f: f(1, b"\xe2", fin=False) + f(0), [], 1007),
    ("8.1", "in a reason", lambda f: f(8, b"\x03\xe8\xff"), [], 1007),
    ("8.1", "binary is no text", lambda f: f(2, b"\xff", fin=False), [], []),
    ("10.4", "too big", lambda f: f(2, FULL + b"x"), [], 1009),
    ("10.4", "as its header says", lambda f: f(1, FULL + b"x")[:14], [], 1009),
    ("10.4", "in parts", lambda f: f(2, FULL, fin=False) + f(0, b"x"), [], 1009),
]
for _code in (0, 999, 1004, 1005, 1006, 1015, 1016, 2000, 2999, 5000, 65535):
    RULES.append(("7.4.1", f"close code {_code}", closing(_code), [], 1002))
for _code in (1000, 1001, 1002, 1003, 1007, 1011, 1012, 1013, 1014, 3000, 4999):
    answer = [(8, close_body(_code))]
    RULES.append(("7.4.1", f"close code {_code}", closing(_code, "ü"), [], answer))


def take_frame(read: Callable[[int], bytes]) -> tuple[int, bool, bytes]:
    """Read a frame: its first byte, whether it is masked, its payload."""
    first, second = read(2)
    size = second & 0x7F
    if size > 125:
        size = int.from_bytes(read(2 if size == 126 else 8), "big")
    key = read(4) if second & 0x80 else bytes(4)
    return first, bool(second & 0x80), xor(read(size), key)


class ProtocolTest(unittest.TestCase):
    """What is received and sent, byte by byte: no socket, no thread, no waiting."""

    is_client = False

    def pair(self) -> tuple[client.Protocol, Make]:
        """Return one end, and what makes the frames of the other."""
        make = functools.partial(frame, masked=not self.is_client)
        return client.Protocol(self.is_client, len(FULL)), make

    def sent(self, protocol: client.Protocol) -> list[tuple[int, bytes]]:
        data, frames = io.BytesIO(protocol.outbox), []
        while data.tell() < len(protocol.outbox):
            first, masked, payload = take_frame(data.read)
            self.assertEqual((first & 0xF0, masked), (0x80, self.is_client))
            frames.append((first & 0x0F, payload))
        protocol.outbox.clear()
        return frames

    def play(self, protocol: client.Protocol, parts: Iterable[bytes]) -> list[Any]:
        """Let bytes come, and take every message at once; return the messages."""
        found: list[str | bytes] = []
        for part in parts:
            protocol.receive(part)
            while protocol.inbox:
                found.append(protocol.inbox.popleft())
            protocol.settle()
        return found

    def cuts(self, data: bytes) -> Iterator[list[bytes]]:
        yield [data]
        if len(data) < 1000:
            yield [data[i : i + 1] for i in range(len(data))]
            yield from ([data[:i], data[i:]] for i in range(len(data)))
        chance, size = random.Random(2), len(data)
        for _ in range(3):
            at = sorted(chance.choices(range(size + 1), k=5))
            yield [data[i:j] for i, j in zip([0, *at], [*at, size])]

    def test_receive_follows_every_rule(self) -> None:
        for section, name, data, inbox, outbox in RULES:
            for parts in self.cuts(data(self.pair()[1])):
                with self.subTest(section, what=name, cut=[len(p) for p in parts]):
                    protocol, _ = self.pair()
                    self.assertEqual(self.play(protocol, parts), inbox)
                    self.check_outbox(protocol, outbox)

    def check_outbox(self, protocol: client.Protocol, expected: Any) -> None:
        expected = [expected] if isinstance(expected, int) else expected
        answers: list[Any] = self.sent(protocol)
        code = None
        if answers and answers[-1][0] == 8:
            body = answers[-1][1]
            code = int.from_bytes(body[:2], "big") if body else 1005
            if code in expected:  # a fault: the reason is left to this end
                answers[-1] = code
        self.assertEqual(answers, expected)
        self.assertEqual(protocol.closed and protocol.closed.code, code)
        if code is not None:
            self.check_over(protocol)

    def check_over(self, protocol: client.Protocol) -> None:
        """After the end nothing is sent and nothing kept."""
        make = functools.partial(frame, masked=not protocol.client)
        protocol.receive(make(1, b"late") + make(9) + make(8))
        protocol.close(1001)
        protocol.receive_eof()
        with self.assertRaises(client.ConnectionClosed) as caught:
            protocol.send("late")
        assert protocol.closed
        self.assertEqual(caught.exception.code, protocol.closed.code)
        self.assertFalse(protocol.inbox or protocol.outbox)

    def test_receive_wants_masks_from_clients_only(self) -> None:
        protocol, make = self.pair()
        protocol.receive(make(1, b"x", masked=protocol.client))
        self.check_outbox(protocol, 1002)

    def test_receive_says_when_a_part_is_missing(self) -> None:
        protocol, make = self.pair()
        for data in (make(1, b"abc"), make(9, b"abc"), make(1, b"a", fin=False)):
            self.assertFalse(protocol.unfinished)
            protocol.receive(data[:-1])
            self.assertTrue(protocol.unfinished)
            protocol.receive(data[-1:])
        self.assertTrue(protocol.unfinished)  # the message, not the frame

    def test_receive_survives_random_bytes(self) -> None:
        chance = random.Random(6455)
        for number in range(2000):
            make = self.pair()[1]
            opcodes = chance.choices((0, 1, 2, 8, 9, 10), k=4)
            some = [make(op, b"\x03\xe8x" * op, fin=op != 1) for op in opcodes]
            data = bytearray(make(1, "é".encode() * 90) + b"".join(some))
            if number % 4 == 0:
                data = bytearray(chance.choices(range(256), k=60))
            for _ in range(chance.randrange(5)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            protocol = client.Protocol(self.is_client, 300)
            at = chance.randrange(len(data))
            messages = self.play(protocol, [bytes(data[:at]), bytes(data[at:])])
            self.assertLessEqual(max(map(len, messages), default=0), 300)
            opcodes = [opcode for opcode, _ in self.sent(protocol)]
            self.assertLessEqual(set(opcodes), {8, 10})
            self.assertEqual(opcodes.count(8), protocol.closed is not None)
            self.assertEqual(opcodes.count(8), protocol.close_sent)
            protocol.receive_eof()
            code = protocol.closed.code if protocol.closed else 0
            self.assertEqual(8 in opcodes[-1:], code != 1006)
            self.check_over(protocol)

    def test_send_makes_frames_of_both_kinds_and_all_lengths(self) -> None:
        protocol, _ = self.pair()
        for size, head in ((0, 2), (125, 2), (126, 4), (65535, 4), (65536, 10)):
            protocol.send("x" * size)
            protocol.send(b"\xff" * size)
            whole = head + 4 * self.is_client + size  # the length in its shortest form
            self.assertEqual(len(protocol.outbox), 2 * whole)
            frames = [(1, b"x" * size), (2, b"\xff" * size)]
            self.assertEqual(self.sent(protocol), frames)

    def test_mask_is_fresh_and_its_own_inverse(self) -> None:
        protocol = client.Protocol(True, len(FULL))
        for _ in range(20):
            protocol.send("")
        keys = {bytes(protocol.outbox[i + 2 : i + 6]) for i in range(0, 120, 6)}
        self.assertEqual(len(keys), 20)
        key = b"\0\x7f\x80\xff"
        for size in (0, 1, 3, 4, 5, 1022, 1023, 1024, 1025, 5000):
            data = random.Random(size).choices(range(256), k=size)
            masked = client.apply_mask(bytes(data), key)
            self.assertEqual(masked, xor(bytes(data), key))
            self.assertEqual(client.apply_mask(masked, key), bytes(data))

    def test_accept_key_is_that_of_section_1_3(self) -> None:
        accept = client.accept_key("dGhlIHNhbXBsZSBub25jZQ==")
        self.assertEqual(accept, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")

    def test_close_is_sent_once_and_ends_what_is_taken(self) -> None:
        cases: list[tuple[tuple[Any, ...], bytes]] = [
            ((), close_body(1000)),
            ((1001, "ü" * 100), close_body(1001, "ü" * 61)),  # 123 bytes at most
            ((1011, "x" * 200), close_body(1011, "x" * 123)),
            ((1005, "x"), b""),
        ]
        for arguments, body in cases:
            protocol, make = self.pair()
            protocol.receive(make(1, b"not taken"))
            protocol.close(*arguments)
            protocol.close(1002, "again")
            protocol.receive(make(1, b"late") + make(9) + make(1, b"x", fin=False))
            self.assertFalse(protocol.inbox)
            with self.assertRaises(client.ConnectionClosed):
                protocol.send("x")
            self.assertIsNone(protocol.closed)  # the peer's Close is still to come
            protocol.receive(make(8, close_body(4000, "bye")))
            assert protocol.closed
            self.assertEqual(protocol.closed.args, (4000, "bye"))
            self.assertEqual(self.sent(protocol), [(8, body)])
            self.check_over(protocol)

    def test_close_counts_once_the_messages_before_it_are_taken(self) -> None:
        for opcode, body, code in ((8, close_body(1001), 1001), (3, b"", 1002)):
            protocol, make = self.pair()
            protocol.receive(
                make(1, b"one") + make(1, b"two") + make(opcode, body) + make(9)
            )
            protocol.settle()
            self.assertIsNone(protocol.closed)
            protocol.send("an answer")
            self.assertEqual(self.sent(protocol), [(1, b"an answer")])
            self.assertEqual(list(protocol.inbox), ["one", "two"])
            protocol.inbox.clear()
            protocol.send("the last")
            self.assertEqual([op for op, _ in self.sent(protocol)], [1, 8])
            self.assertEqual(protocol.closed and protocol.closed.code, code)

    def test_eof_is_an_end_without_a_close(self) -> None:
        protocol, make = self.pair()
        protocol.receive(make(1, b"one") + make(1, b"half")[:-1])
        protocol.receive_eof()
        self.assertIsNone(protocol.closed)
        self.assertEqual(protocol.inbox.popleft(), "one")
        protocol.settle()
        self.assertEqual(protocol.closed and protocol.closed.code, 1006)
        self.assertFalse(protocol.outbox)
        self.check_over(protocol)


class ClientProtocolTest(ProtocolTest):
    """The same, at the other end."""

    is_client = True


class SocketPeer(RawPeer):
    """A socket that is there already, and RFC 6455 by hand, as either end."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.data = sock, b""
        sock.settimeout(PATIENCE)

    def read_frame(self) -> tuple[int, bytes]:
        first, _, payload = take_frame(self.read)
        return first, payload


class WebSocketTest(unittest.TestCase):
    """A `Protocol` on a socket, in both roles; the peer is played by hand."""

    is_client = False

    def pair(
        self, timeout: float = PATIENCE, trace: client.Trace | None = None
    ) -> tuple[SocketPeer, client.WebSocket, Make]:
        """Return the peer, the socket under test, and what makes the peer's frames."""
        ours, theirs = socket.socketpair()
        protocol = client.Protocol(self.is_client, 1 << 22, trace)
        ws = client.WebSocket(ours, protocol, timeout)
        for sock in (ours, theirs):
            self.addCleanup(sock.close)
        make = functools.partial(frame, masked=not self.is_client)
        return SocketPeer(theirs), ws, make

    def ended(self, ws: client.WebSocket) -> int:
        with self.assertRaises(client.ConnectionClosed) as caught:
            ws.recv()
        return caught.exception.code

    def test_messages_both_ways(self) -> None:
        peer, ws, make = self.pair()
        for message in ("", "aé𝄞", "x" * 126, b"", b"\xff" * 900):
            ws.send(message)
            data = message.encode() if isinstance(message, str) else message
            opcode = 1 if isinstance(message, str) else 2
            self.assertEqual(peer.read_frame(), (0x80 | opcode, data))
            peer.send(make(opcode, data[:5], fin=False) + make(9, b"?"))
            peer.send(make(0, data[5:]))
            self.assertEqual(ws.recv(), message)
            self.assertEqual(peer.read_frame(), (0x8A, b"?"))

    def test_threads_that_send_never_mix_frames(self) -> None:
        peer, ws, make = self.pair()
        texts = ["a" * 10, "b" * 70_000, "c" * 300_000]

        def send(text: str) -> None:
            for _ in range(20):
                ws.send(text)

        with ThreadPoolExecutor(4) as pool:
            sending = [pool.submit(send, text) for text in texts]
            receiving = pool.submit(ws.recv)
            peer.send(make(1, b"y" * 1_000_000))  # before it takes anything
            self.assertEqual(receiving.result(PATIENCE), "y" * 1_000_000)
            counts = Counter(peer.read_frame() for _ in range(60))
            for sender in sending:
                sender.result(PATIENCE)
        frames = [(0x81, text.encode()) for text in texts]
        self.assertEqual(counts, dict.fromkeys(frames, 20))

    def test_timeout_then_what_came_then_the_end(self) -> None:
        peer, ws, make = self.pair(timeout=0.05)
        with self.assertRaises(TimeoutError):
            ws.recv()
        peer.send(make(1, b"one") + make(1, b"two")[:-1])
        self.assertEqual(ws.recv(), "one")
        with self.assertRaises(TimeoutError):  # half of one is none
            ws.recv()
        peer.sock.close()
        self.assertEqual([self.ended(ws), self.ended(ws)], [1006, 1006])
        with self.assertRaises(client.ConnectionClosed):
            ws.send("x")

    def test_tend_answers_pings_and_keeps_messages(self) -> None:
        peer, ws, make = self.pair()
        self.assertIsNone(ws.take())
        peer.send(make(1, b"one") + make(9, b"1") + make(1, b"two") + make(9, b"2"))
        ws.tend()
        answers = [peer.read_frame() for _ in range(2)]
        self.assertEqual(answers, [(0x8A, b"1"), (0x8A, b"2")])
        self.assertEqual((ws.take(), ws.recv(), ws.take()), ("one", "two", None))

    def test_tend_leaves_alone_who_receives(self) -> None:
        peer, ws, make = self.pair()
        with ThreadPoolExecutor(1) as pool:
            receiving = pool.submit(lambda: [ws.recv() for _ in range(500)])
            for i in range(500):
                peer.send(make(1, b"%d" % i))
                ws.tend()
            self.assertEqual(receiving.result(PATIENCE), list(map(str, range(500))))

    def test_tend_holds_a_bounded_amount(self) -> None:
        for size in (0, 500_000):
            peer, ws, make = self.pair()
            with ThreadPoolExecutor(1) as pool:
                message, times = make(1, b"x" * size), 20_000 if size == 0 else 10
                flooding = pool.submit(peer.send, message * times)
                deadline = time.monotonic() + PATIENCE
                while not ws.full and time.monotonic() < deadline:
                    ws.tend()
                for _ in range(100):
                    ws.tend()
                self.assertLess(sum(map(len, ws.protocol.inbox)), 2_000_000)
                self.assertLess(len(ws.protocol.inbox), 10_000)
                for _ in range(times):
                    self.assertEqual(len(ws.recv()), size)
                flooding.result(PATIENCE)

    def test_peer_that_reads_nothing_is_not_waited_for(self) -> None:
        peer, ws, make = self.pair(timeout=0.05)
        pings = make(9, b"x" * 125) * 100
        peer.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                peer.sock.send(pings)
                ws.tend()
        for _ in range(100):
            ws.tend()
        self.assertTrue(0 < len(ws.protocol.outbox) < 50_000)
        self.assertIsNone(ws.take())  # an answer to it would only pile up
        with self.assertRaises(TimeoutError):
            ws.send("x")
        self.assertEqual(self.ended(ws), 1006)

    def test_close_from_this_end(self) -> None:
        peer, ws, make = self.pair()
        with ThreadPoolExecutor(1) as pool:
            closing = pool.submit(ws.close, 1001, "bye")
            self.assertEqual(peer.read_frame(), (0x88, close_body(1001, "bye")))
            peer.send(make(1, b"late") + make(8, close_body(1001)))
            if ws.protocol.client:  # it waits for the server to end the connection
                peer.sock.shutdown(socket.SHUT_WR)
            self.assertTrue(peer.at_end())
            peer.sock.close()
            closing.result(PATIENCE)
        ws.close()  # twice is fine
        self.assertEqual(self.ended(ws), 1001)

    def test_close_from_the_other_end(self) -> None:
        peer, ws, make = self.pair()
        peer.send(make(1, b"last words") + make(8, close_body(4000, "done")))
        self.assertEqual(ws.recv(), "last words")
        self.assertEqual(self.ended(ws), 4000)
        self.assertEqual(peer.read_frame(), (0x88, close_body(4000)))
        with self.assertRaises(client.ConnectionClosed):
            ws.send("x")
        peer.sock.close()
        ws.close()

    def test_close_does_not_wait_for_ever(self) -> None:
        peer, ws, _ = self.pair()
        ws.close(timeout=0.05)
        self.assertEqual(peer.read_frame(), (0x88, close_body(1000)))
        self.assertTrue(peer.at_end())

    def test_drop_ends_who_waits(self) -> None:
        peer, ws, _ = self.pair()
        with ThreadPoolExecutor(1) as pool:
            receiving = pool.submit(self.ended, ws)
            time.sleep(0.02)  # most likely it waits by then
            ws.drop()
            self.assertEqual(receiving.result(PATIENCE), 1006)
        self.assertTrue(peer.at_end())

    def test_trace_that_raises_ends_the_connection(self) -> None:
        def trace(line: str) -> None:
            if "ping" in line:
                raise MemoryError

        peer, ws, make = self.pair(trace=trace)
        peer.send(make(1, b"a", fin=False) + make(9) + make(0, b"b"))
        with self.assertRaises(MemoryError):
            ws.tend()
        self.assertEqual(self.ended(ws), 1006)  # and no message with a hole


class ClientWebSocketTest(WebSocketTest):
    """The same, at the other end."""

    is_client = True


Play = Callable[[SocketPeer], object]


@contextlib.contextmanager
def played(play: Play) -> Iterator[str]:
    """A server of one connection after the other, played by hand; yield host:port."""

    class Playing(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError, EOFError):
                play(SocketPeer(self.request))

    with socketserver.TCPServer(("127.0.0.1", 0), Playing) as playing:
        threading.Thread(target=playing.serve_forever, args=(0.02,)).start()
        try:
            yield f"127.0.0.1:{playing.server_address[1]}"
        finally:
            playing.shutdown()


def shake_hands(
    peer: SocketPeer, change: Callable[[str], str] = str, early: bytes = b""
) -> str:
    """Answer an opening handshake as a server; return the request."""
    request = peer.read_head()
    key = request.partition("Sec-WebSocket-Key: ")[2].partition("\r\n")[0]
    good = (
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: WebSocket\r\nconnection: foo, "
        f"upgrade\r\nSec-WebSocket-Accept: {client.accept_key(key)}\r\n\r\n"
    )
    peer.send(change(good).encode() + early)
    return request


class HandshakeTest(unittest.TestCase):
    """The client's opening handshake, also with servers that get it wrong."""

    def test_agreement_keeps_what_follows(self) -> None:
        requests = []

        def play(peer: SocketPeer) -> None:
            requests.append(shake_hands(peer, early=frame(1, b"early", masked=False)))
            peer.at_end()

        with played(play) as host:
            ws = client.WebSocket.connect(
                f"ws://{host}/some/path", {"Authorization": "Bearer x"}
            )
            self.assertEqual(ws.recv(), "early")
            ws.drop()
        self.assertIn("GET /some/path HTTP/1.1\r\n", requests[0])
        self.assertIn("\r\nAuthorization: Bearer x", requests[0])
        key = re.search("Sec-WebSocket-Key: (.+)\r\n", requests[0])
        self.assertEqual(len(b64decode(key[1] if key else "")), 16)

    def test_no_agreement_is_an_error_that_says_why(self) -> None:
        def adding(line: str) -> Callable[[str], str]:
            return lambda s: s.replace("\r\n\r\n", f"\r\n{line}\r\n\r\n")

        refusal = 'HTTP/1.1 503 Busy\r\nContent-Length: 17\r\n\r\n{"detail":"full"}'
        changes: list[tuple[str, Callable[[str], str]]] = [
            ("HTTP/1.1 200", lambda s: s.replace("101 Switching Protocols", "200 OK")),
            ("refused: HTTP/1.1 503 Busy: full", lambda s: refusal),
            ("upgrade", lambda s: s.replace("Upgrade: WebSocket", "Upgrade: h2c")),
            ("Connection", lambda s: s.replace("upgrade\r", "close\r")),
            ("Accept", lambda s: s.replace("=\r\n\r\n", "A=\r\n\r\n")),
            ("extension", adding("Sec-WebSocket-Extensions: x")),
            ("subprotocol", adding("Sec-WebSocket-Protocol: x")),
            ("no HTTP", lambda s: "x" * 70_000),
        ]
        for words, change in changes:
            says = self.assertRaisesRegex(ConnectionError, f"(?i){words}")
            play = functools.partial(shake_hands, change=change)
            with self.subTest(words), played(play) as host, says:
                client.WebSocket.connect(f"ws://{host}/ws")

    def test_headers_cannot_be_forged_and_values_are_not_told(self) -> None:
        headers = {"Authorization": "Bearer secret\r\nHost: x"}
        clients: list[Callable[[], object]] = [
            lambda: client.WebSocket.connect("ws://127.0.0.1:1/ws", headers),
            lambda: BenchmarkEnv("127.0.0.1:1", headers=headers),
            lambda: BenchmarkEnvWS("127.0.0.1:1", default_headers=headers),
        ]
        for connect in clients:
            with self.assertRaisesRegex(ValueError, "Authorization") as caught:
                connect()
            self.assertNotIn("secret", str(caught.exception))

    def test_urls(self) -> None:
        cases = {
            "localhost:8000": (False, "localhost", 8000, ""),
            "http://a.example/": (False, "a.example", 80, ""),
            "wss://a.example/some/path/": (True, "a.example", 443, "/some/path"),
            "https://[::1]:9/x y": (True, "::1", 9, "/x%20y"),
            "http://bücher.example": (False, "xn--bcher-kva.example", 80, ""),
            "http://0.0.0.0:8000": (False, "127.0.0.1", 8000, ""),
            "ws://[::]:8000/": (False, "::1", 8000, ""),
        }
        for url, expected in cases.items():
            self.assertEqual(client.split_url(url), expected)
        refused = {
            "": "no URL",
            "ftp://x": "no URL",
            "http://": "no URL",
            "http://x:99999": "(?i)port",
            "http://user:password@x": "headers=",
            "http://x/?a=b": "no query",
            "http://x/#a": "no fragment",
        }
        for url, words in refused.items():
            for use in (client.split_url, *BOTH):
                refusal = self.assertRaisesRegex(ValueError, words)
                with self.subTest(url), refusal as caught:
                    use(url)
                self.assertNotIn("password@x", str(caught.exception))


# ---------------------------------------------------------------------------
# JSON and dataclasses
# ---------------------------------------------------------------------------


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Point:
    """Where."""

    x: int
    y: float = 0.0


@dataclass
class Everything:
    number: int = field(metadata={"minimum": 1, "maximum": 9})
    color: Color
    point: Point
    points: list[Point]
    pair: tuple[int, str]
    size: Literal["s", "m"]
    either: Optional[Point] = None  # noqa: UP045
    names: dict[str, int] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)
    text: str = field(default="ab", metadata={"minLength": 2, "maxLength": 3})
    rates: tuple[float, ...] = field(default=(), metadata={"maxItems": 2})
    anything: Any = None
    late: int = field(default=0, init=False)


@dataclass
class Move:
    kind: Literal["move"]
    x: int = 0


@dataclass
class Say:
    kind: Literal["say"]
    text: str = ""


@dataclass
class Small:
    x: int = 0


@dataclass
class Large:
    x: int = 0
    y: int = 0


class Array:
    """What numpy's arrays and numbers are to JSON, without numpy."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def tolist(self) -> Any:
        return self.value

    def __bool__(self) -> bool:
        return bool(self.value)


SPOKEN = {"kind": "say", "text": "hi"}


class ReadJsonTest(unittest.TestCase):
    GOOD: dict[str, Any] = {  # noqa: RUF012
        "number": 3,
        "color": "red",
        "point": {"x": 1, "y": 2},
        "points": [{"x": 1}],
        "pair": [1, "a"],
        "size": "m",
        "either": {"x": 5},
        "names": {"a": 1},
        "tags": ["t"],
        "rates": [1, 2.5],
        "anything": [1, {"b": None}],
        "late": 7,
    }

    def test_value_survives_the_way_there_and_back(self) -> None:
        value = client.read_json(Everything, self.GOOD)
        self.assertEqual(value.color, Color.RED)
        self.assertEqual((value.either, value.points), (Point(5), [Point(1)]))
        self.assertEqual((value.pair, value.tags), ((1, "a"), {"t"}))
        self.assertEqual((value.rates, value.late), ((1.0, 2.5), 7))
        self.assertIsInstance(value.point.y, float)
        again = client.read_json(Everything, json.loads(client.encode_json(value)))
        self.assertEqual(again, value)

    def test_every_fault_is_listed(self) -> None:
        cases: list[tuple[dict[str, Any], str]] = [
            ({}, ""),
            ({"number": "3"}, "int_type number"),
            ({"number": True}, "int_type number"),
            ({"number": 1.5}, "int_type number"),
            ({"number": 2.0}, ""),
            ({"number": 0}, "greater_than_equal number"),
            ({"number": 10}, "less_than_equal number"),
            ({"color": "green"}, "enum color"),
            ({"size": 1}, "enum size"),
            ({"point": {}}, "missing point.x"),
            ({"point": {"x": 1, "y": "a"}}, "float_type point.y"),
            ({"point": {"x": 1, "z": 1}}, "extra_forbidden point.z"),
            ({"points": [{"x": 1}, 2]}, "dict_type points.1"),
            ({"pair": [1]}, "too_short pair"),
            ({"pair": [1, "a", 2]}, "too_long pair"),
            ({"pair": ["a", "b"]}, "int_type pair.0"),
            ({"either": 5}, "dict_type either"),
            ({"either": None}, ""),
            ({"names": {"a": "b"}}, "int_type names.a"),
            ({"tags": "t"}, "list_type tags"),
            ({"text": "a"}, "string_too_short text"),
            ({"text": "abcd"}, "string_too_long text"),
            ({"rates": [1, 2, 3]}, "too_long rates"),
            ({"late": "x", "size": 1}, "enum size, int_type late"),
            ({"point": {"y": "a"}}, "missing point.x, float_type point.y"),
        ]
        for changes, expected in cases:
            with self.subTest(changes=changes):
                found = []
                try:
                    value = {**self.GOOD, **changes}
                    client.read_json(Everything, value, ("body",))
                except client.Invalid as invalid:
                    for fault in invalid.faults:
                        self.assertEqual(set(fault), {"type", "loc", "msg", "input"})
                        body, *loc = fault["loc"]
                        self.assertEqual(body, "body")
                        found.append(f"{fault['type']} {'.'.join(map(str, loc))}")
                self.assertEqual(", ".join(found), expected)

    def test_union_is_read_as_the_member_that_fits(self) -> None:
        said = Say("say", "hi")
        cases: list[tuple[Any, Any, Any]] = [
            (Union[Move, Say], SPOKEN, said),
            (Union[Say, Move], SPOKEN, said),
            (Union[Move, Say, None], SPOKEN, said),
            (list[Union[Move, Say]], [SPOKEN, {"kind": "move"}], [said, Move("move")]),
            (dict[str, Union[Move, Say]], {"a": SPOKEN}, {"a": said}),
            (tuple[Union[Move, Say], ...], [SPOKEN], (said,)),
            (Union[list[Move], list[Say]], [SPOKEN], [said]),
            (Union[Literal["x"], Point], {"x": 1}, Point(1)),
            (Union[Point, Literal["x"]], "x", "x"),
            (Union[tuple[int], tuple[int, int]], [1, 2], (1, 2)),
            (Union[tuple[int, int], tuple[int, ...]], [1], (1,)),
            (Union[Small, Large], {"x": 1, "y": 2}, Large(1, 2)),  # untagged
            (Union[Small, Large], {"x": 1}, Small(1)),  # both fit: the first
            (Union[Large, Small], {"x": 1}, Large(1)),
            (Union[int, str, None], None, None),
            (Union[float, int], 1, 1),
            (Union[int, float], 1.5, 1.5),
            (Union[int, bool], True, True),
            (Union[Color, str], "red", Color.RED),
            (Union[str, Color], "red", "red"),
        ]
        for kind, value, expected in cases:
            with self.subTest(kind=kind):
                found = client.read_json(kind, value)
                self.assertEqual((type(found), found), (type(expected), expected))
        with self.assertRaises(client.Invalid):
            client.read_json(Union[Move, Say], {"kind": "sing"})

    def test_extra_keys_are_dropped_and_never_fit_better(self) -> None:
        value = {"x": 1, "y": 2, "z": 3}
        with self.assertRaises(client.Invalid):
            client.read_json(Union[Small, Large], value)
        for kind in (Union[Small, Large], Union[Large, Small]):
            self.assertEqual(client.read_json(kind, value, extra=True), Large(1, 2))
            found = client.read_json(kind, {"x": 1, "z": 3}, extra=True)
            self.assertIs(type(found), typing.get_args(kind)[0])

    def test_containers_without_arguments_are_of_anything(self) -> None:
        objects = {"type": "object", "additionalProperties": True}
        arrays = {"type": "array", "items": {}}
        for kinds, value, schema in (
            ((list, typing.List), [1, "a"], arrays),  # noqa: UP006
            ((tuple, typing.Tuple), (1, "a"), arrays),  # noqa: UP006
            ((dict, typing.Dict), {"a": 1}, objects),  # noqa: UP006
        ):
            for kind in kinds:
                form = json.loads(json.dumps(value))
                self.assertEqual(client.read_json(kind, form), value)
                with self.assertRaises(client.Invalid):
                    client.read_json(kind, "text")
                made = dataclasses.make_dataclass("Made", [("a", kind)])
                self.assertEqual(server.json_schema(made)["properties"]["a"], schema)

    def test_to_json_takes_arrays_enums_and_sets(self) -> None:
        value = {"a": Array([1, [2]]), "b": Color.RED, "c": {1}, "d": Point(1)}
        expected = '{"a":[1,[2]],"b":"red","c":[1],"d":{"x":1,"y":0.0}}'
        self.assertEqual(client.encode_json(value), expected)
        with self.assertRaisesRegex(TypeError, "complex"):
            client.encode_json(1j)
        with self.assertRaises(ValueError):
            client.encode_json(float("nan"))


class SchemaTest(unittest.TestCase):
    def test_schema_has_the_parts_openenv_names(self) -> None:
        schema = server.json_schema(BenchmarkAction)
        parts = "title description properties required additionalProperties"
        self.assertLessEqual(set(parts.split()), set(schema))
        self.assertEqual(schema["required"], ["message"])
        self.assertIs(schema["additionalProperties"], False)

    def test_example_fits(self) -> None:
        for cls in (BenchmarkAction, Everything, Move):
            client.read_json(cls, server.example(server.json_schema(cls)))

    def test_field_that_is_no_argument_is_in_the_schema(self) -> None:
        schema = server.json_schema(Everything)
        late = {"type": "integer", "readOnly": True, "default": 0}
        self.assertEqual(schema["properties"]["late"], late)
        self.assertNotIn("late", schema["required"])

    def test_default_that_differs_each_time_is_not_told(self) -> None:
        @dataclass
        class Named:
            name: str = field(default_factory=lambda: os.urandom(4).hex())
            more: dict[str, int] = field(default_factory=dict)

        found = server.json_schema(Named)
        self.assertEqual(found["properties"]["name"], {"type": "string"})
        self.assertEqual(found["properties"]["more"]["default"], {})
        self.assertEqual(found["required"], [])

    def test_what_cannot_work_is_refused_by_class_and_field(self) -> None:
        for cls in (int, BenchmarkAction("x")):
            with self.assertRaisesRegex(TypeError, "no dataclass"):
                server.json_schema(cls)
        cases: list[tuple[Any, dict[str, Any], str]] = [
            (complex, {}, "Odd.a: .*complex"),
            (bytes, {}, "Odd.a: .*bytes"),
            (dict[int, str], {}, "Odd.a: .*keys"),
            (list[dict[int, str]], {}, "Odd.a: .*keys"),
            (int, {"metadata": {"minimum": "one"}}, "Odd.a: .*minimum"),
            (str, {"metadata": {"maxLength": 1.5}}, "Odd.a: .*maxLength"),
            (Any, {"default": 1j}, "Odd.a: .*complex"),
            ("Nowhere", {}, "Odd.a .*Nowhere"),
        ]
        for kind, options, words in cases:
            odd = dataclasses.make_dataclass("Odd", [("a", kind, field(**options))])
            with self.subTest(words), self.assertRaisesRegex(TypeError, words):
                server.json_schema(odd)


# ---------------------------------------------------------------------------
# The clients
# ---------------------------------------------------------------------------


class Waiting(BenchmarkEnvironment):
    """Waits for the gate if it is told to; what it gives is numpy's."""

    gate = threading.Event()

    def reset(self, seed: Any = None, episode_id: Any = None) -> BenchmarkObservation:
        observation = super().reset(seed, episode_id)
        observation.metadata = {"seed": Array([seed, type(seed).__name__])}
        return observation

    def step(self, action: BenchmarkAction, timeout_s: float | None = None) -> Any:
        if action.message == "wait":
            self.gate.wait(PATIENCE)
        observation = super().step(action)
        reward, done = Array(1), Array(0)
        return dataclasses.replace(observation, reward=reward, done=done)  # type: ignore[arg-type]


def told(*answers: str) -> Play:
    """A WebSocket server that gives these answers, whatever it is asked."""

    def play(peer: SocketPeer) -> None:
        shake_hands(peer)
        for answer in answers:
            peer.read_frame()
            peer.send(frame(1, answer.encode(), masked=False))

    return play


def replied(answer: str, requests: list[str] | None = None) -> Play:
    """An HTTP server that gives this answer, whatever it is asked."""

    def play(peer: SocketPeer) -> None:
        head = peer.read_head()  # what is left unread would reset the connection
        size = re.search(r"(?i)content-length: (\d+)", head)
        peer.read(int(size[1]) if size else 0)
        if requests is not None:
            requests.append(head)
        peer.send(f"HTTP/1.1 {answer}".encode())

    return play


def dripped(head: str) -> Play:
    """A server whose answer takes for ever, though there is always some more of it."""

    def play(peer: SocketPeer) -> None:
        peer.read_head()
        peer.send(head.encode())
        while True:
            peer.send(b"x")
            time.sleep(0.02)

    return play


class ClientTest(ServerCase):
    def test_both_clients(self) -> None:
        host = self.running.url.partition("//")[2]
        urls = [f"http://{host}", f"{host}/", f"ws://{host}"]
        urls.append(f"http://0.0.0.0:{self.running.server_port}")
        for cls, url in itertools.product(BOTH, urls):
            with self.subTest(cls=cls, url=url), cls(url) as env:
                self.assertEqual(env.base_url, url.rstrip("/"))
                first = env.reset(seed=1, episode_id="e")
                self.assertIsInstance(first, StepResult)
                self.assertIsNone(first.metadata)
                said = first.observation.echoed_message
                self.assertEqual(said, "Benchmark environment ready!")
                long = ("y" * 65_537, 'a"b\\c\n\x7fü' * 9_999, "\x1f" * 65_537)
                messages = ("", "x" * 127, "𝄞 ünï", "\ud800", *long)
                for number, message in enumerate(messages, 1):
                    result = env.step(BenchmarkAction(message), timeout_s=3)
                    self.assertEqual(result.observation.echoed_message, message)
                    reward = len(message) / 10
                    self.assertEqual((result.reward, result.done), (reward, False))
                    self.assertEqual(result.metadata, {"step": number})
                self.assertEqual(env.state(), BenchmarkState("e", 7))
                env.close()
                env.close()
        self.assertEqual(self.http("GET", "/health")[0], 200)

    def test_generic_clients_take_and_give_dicts(self) -> None:
        for cls in GENERIC:
            with cls(self.running.url) as env:
                env.reset()
                result = env.step({"message": "Hi"})
                self.assertEqual(result.observation["echoed_message"], "Hi")
                self.assertEqual(result.metadata, {"step": 1})
                with self.assertRaises(RuntimeError) as caught:
                    env.step({"mesage": "Hi"})
                error: Any = caught.exception
                self.assertEqual(error.code, "VALIDATION_ERROR")
                says = r"^Server error: .*\(code: VALIDATION_ERROR\)$"
                self.assertRegex(str(error), says)
                faults = [fault["type"] for fault in error.errors]
                self.assertEqual(faults, ["missing", "extra_forbidden"])
                self.assertEqual(env.state()["step_count"], 1)

    def test_step_says_what_it_takes(self) -> None:
        cases = [(cls, "a BenchmarkAction or a dict") for cls in BOTH]
        cases += [(cls, "a dict or a dataclass") for cls in GENERIC]
        for cls, words in cases:
            says = f"^step takes {words}, not (str|type)$"
            for action in ("Hello", BenchmarkAction):
                with self.assertRaisesRegex(TypeError, says):
                    cls(self.running.url).step(action)

    def test_arrays_of_others_are_numbers_and_lists(self) -> None:
        with serve(Waiting) as running:
            for cls in BOTH:
                with cls(running.url) as env:
                    first = env.reset(seed=Array(7))
                    self.assertEqual(first.metadata, {"seed": [7, "int"]})
                    action = BenchmarkAction("Hi", {"array": Array([1, 2])})
                    result = env.step(action)
                    found = (result.reward, result.done, result.observation.reward)
                    self.assertEqual(list(map(repr, found)), ["1.0", "False", "1.0"])

    def test_reward_of_a_peer_is_a_float(self) -> None:
        for given, reward in (("true", 1.0), ("1", 1.0), ("0", 0.0), ("null", None)):
            data = f'{{"observation":{{}},"reward":{given}}}'
            answer = f'{{"type":"observation","data":{data}}}'
            for cls, play in zip(BOTH, (told(answer), replied(f"200 X\r\n\r\n{data}"))):
                with played(play) as host, cls(host) as env:
                    result = env.reset()
                    found = (result.reward, result.observation.reward)
                    self.assertEqual(repr(found), repr((reward, reward)))

    def test_http_client_has_a_session_of_its_own(self) -> None:
        with (
            BenchmarkEnv(self.running.url) as one,
            BenchmarkEnv(self.running.url) as two,
        ):
            with self.assertRaisesRegex(client.ServerError, "reset"):
                one.step(BenchmarkAction("too early"))
            one.reset()
            two.reset()
            one.step(BenchmarkAction("x"))
            self.assertEqual((one.state().step_count, two.state().step_count), (1, 0))
        self.assertEqual(self.running.app.active, 0)

    def test_lost_connection_is_said_and_not_repaired(self) -> None:
        running = serve()
        env = BenchmarkEnvWS(running.url).connect()
        env.reset()
        running.stop()
        for _ in range(3):
            with self.assertRaises(ConnectionError):
                env.step(BenchmarkAction("x"))
        with running.app.start(port=running.server_port):
            says = "connect\\(\\) begins a new session"
            with self.assertRaisesRegex(ConnectionError, says):
                env.reset()
            env.connect()
            env.reset()
            env.disconnect()
            with self.assertRaisesRegex(ConnectionError, says):
                env.state()
            env.close()

    def test_connect_opens_a_new_connection_if_the_server_has_closed_it(self) -> None:
        running = serve()
        with BenchmarkEnvWS(running.url) as env:
            env.reset(episode_id="old")
            running.stop()
            with running.app.start(port=running.server_port):
                self.assertNotEqual(env.connect().state().episode_id, "old")

    def test_connect_to_a_full_server_may_be_tried_again(self) -> None:
        with serve(max_concurrent_envs=1) as running:
            one, two = (BenchmarkEnvWS(running.url) for _ in range(2))
            one.reset()
            for _ in range(20):
                with self.assertRaisesRegex(client.ServerError, "CAPACITY_REACHED"):
                    two.connect()
                    two.reset()
            one.close()
            wait_until(lambda: not running.app.active)
            self.assertEqual(two.connect().reset().reward, 0.0)
            two.close()

    def test_late_answer_is_never_taken_for_the_next(self) -> None:
        Waiting.gate.clear()
        with serve(Waiting) as running:
            env = BenchmarkEnvWS(running.url, message_timeout_s=0.1)
            env.reset()
            with self.assertRaises(TimeoutError):
                env.step(BenchmarkAction("wait"))
            Waiting.gate.set()
            with self.assertRaises(ConnectionError):
                env.step(BenchmarkAction("next"))
            slow = BenchmarkEnv(running.url, request_timeout_s=0.1)
            slow.reset()
            Waiting.gate.clear()
            with self.assertRaisesRegex(TimeoutError, "within 0.1 s"):
                slow.step(BenchmarkAction("wait"))
            Waiting.gate.set()

    def test_timeouts_bound_an_answer_that_drips_in(self) -> None:
        length = "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"
        for cls, head, error in (
            (BenchmarkEnv, "", TimeoutError),
            (BenchmarkEnv, "HTTP/1.1 200 OK\r\nX: ", TimeoutError),
            (BenchmarkEnv, length, TimeoutError),
            (BenchmarkEnvWS, "", ConnectionError),
            (BenchmarkEnvWS, "HTTP/1.1 101 X\r\nX: ", ConnectionError),
        ):
            began = time.monotonic()
            late = self.assertRaisesRegex(error, "within 0.2 s")
            with self.subTest(head), played(dripped(head)) as host, late:
                cls(host, 0.2).reset()
            self.assertLess(time.monotonic() - began, PATIENCE / 2)

    def test_answers_that_make_no_sense(self) -> None:
        said = (
            "nonsense",
            "[]",
            '{"type":"state","data":{}}',
            '{"type":"observation","data":5}',
            '{"type":"observation","data":{}}',
            '{"type":"observation","data":{"observation":{},"reward":NaN}}',
            '{"type":"observation","data":{"observation":{"echoed_message":5}}}',
        )
        answers = (
            ("500 X\r\nContent-Length: 100\r\n\r\nabc", ConnectionError),
            ('422 X\r\n\r\n{"detail":["x"]}', client.ServerError),
            ('422 X\r\n\r\n{"detail":[{"a":1}]}', client.ServerError),
            ("503 X\r\n\r\n<html>", client.ServerError),
            ("302 X\r\nLocation: http://127.0.0.1:1/\r\n\r\n", client.ServerError),
            ("200 X\r\n\r\n" + "[" * 100_000, ConnectionError),
            ("200 X\r\n\r\nnonsense", ConnectionError),
            ('200 X\r\n\r\n{"observation":{},"reward":"high"}', ConnectionError),
            ('200 X\r\n\r\n{"observation":{},"done":"no"}', ConnectionError),
            ('200 X\r\n\r\n{"observation":{"message_length":"x"}}', ConnectionError),
            ('200 X\r\n\r\n{"observation":{},"reward":NaN}', ConnectionError),
        )
        cases: list[Any] = [(BenchmarkEnvWS, told(s), s, ConnectionError) for s in said]
        cases += [(BenchmarkEnv, replied(a), a, error) for a, error in answers]
        for cls, play, answer, error in cases:
            with self.subTest(answer[:60]), played(play) as host:
                env = cls(host)
                with self.assertRaises(error):
                    env.reset()
                env.close()

    def test_idle_client_answers_pings(self) -> None:
        answer = frame(1, b'{"type":"state","data":{}}', masked=False)
        pongs: list[Any] = []

        def play(peer: SocketPeer) -> None:
            shake_hands(peer)
            peer.read_frame()
            # One ping comes in the packet of the answer, one a little later.
            peer.send(answer + frame(9, b"a", masked=False))
            pongs.append(peer.read_frame())
            peer.send(frame(9, b"bc", masked=False))
            pongs.append(peer.read_frame())
            peer.send(answer)  # which nobody asked for
            pongs.append(None)
            peer.at_end()

        with played(play) as host, BenchmarkEnvWS(host) as env:
            env.state()
            wait_until(lambda: len(pongs) == 3, "the pongs")
            self.assertEqual(pongs[:2], [(0x8A, b"a"), (0x8A, b"bc")])
            with self.assertRaises(ConnectionError):  # it is not taken for the next
                env.state()

    def test_threads_may_share_a_client(self) -> None:
        for cls in BOTH:
            with cls(self.running.url) as env, ThreadPoolExecutor(8) as pool:
                env.reset()

                def step(number: int, env: Any = env) -> bool:
                    result = env.step(BenchmarkAction(str(number)))
                    return bool(result.observation.echoed_message == str(number))

                self.assertTrue(all(pool.map(step, range(100))))
                self.assertEqual(env.state().step_count, 100)

    @unittest.skipUnless(hasattr(os, "fork"), "this system has no fork")
    def test_client_does_not_survive_a_fork(self) -> None:
        code = textwrap.dedent(f"""
            import os, warnings
            from benchmark import *
            warnings.simplefilter("ignore")
            envs = [BenchmarkEnvWS("{self.running.url}").connect(), BenchmarkEnv("{self.running.url}")]
            for env in envs:
                env.reset()
            if os.fork() == 0:
                for env in envs:
                    for use in (env.state, getattr(env, "connect", env.reset)):
                        try:
                            use()
                        except ConnectionError as error:
                            print("fork" in str(error), flush=True)
                    env.close()
                with BenchmarkEnvWS("{self.running.url}") as env:
                    print(env.reset().reward, flush=True)
                os._exit(0)
            os.wait()
            print([env.state().step_count for env in envs])
            for env in envs:
                env.close()
        """)
        done = run("-c", code)
        self.assertEqual(done.stdout, "True\n" * 4 + "0.0\n[0, 0]\n", done.stderr)

    def test_headers_are_sent_and_no_proxy_is_asked(self) -> None:
        requests: list[str] = []
        given: dict[str, Any] = {
            "default_headers": {"Authorization": "Bearer secret"},
            "headers": {"X-More": "ü"},
        }
        nobody = "http://127.0.0.1:9"
        with mock.patch.dict(os.environ, http_proxy=nobody, all_proxy=nobody):
            with played(replied("200 X\r\n\r\n{}", requests)) as host:
                BenchmarkEnv(host, **given).state()
                BenchmarkEnv(host.replace("127.0.0.1", "0.0.0.0"), **given).state()
            with played(lambda peer: requests.append(shake_hands(peer))) as host:
                BenchmarkEnvWS(host, **given).connect().close()
        self.assertEqual(len(requests), 3)
        for request in requests:
            self.assertIn("\r\nAuthorization: Bearer secret\r\n", f"{request}\r\n")
            self.assertIn("\r\nX-More: ü", f"{request}\r\n".replace("x-more", "X-More"))

    def test_unreachable_server(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"127.0.0.1:{listener.getsockname()[1]}"
            with self.assertRaisesRegex(ConnectionError, "within 0.05 s"):
                BenchmarkEnvWS(url, connect_timeout_s=0.05).connect()
        for cls in BOTH:
            with self.assertRaises(ConnectionError):
                cls(url).reset()

    def test_trace(self) -> None:
        lines: list[str] = []
        with BenchmarkEnvWS(self.running.url, trace=lines.append) as ws:
            ws.reset()
            ws.step(BenchmarkAction("x" * 1000))
        for line in (
            "-> GET /ws HTTP/1.1",
            "<- HTTP/1.1 101 Switching Protocols",
            '-> FIN=1 opcode=0x1 (text) MASK=1 length=26  {"type":"reset","data":{}}',
            "<- FIN=1 opcode=0x8 (close) MASK=0 length=2  1000",
        ):
            self.assertIn(line, lines)
        self.assertLess(max(map(len, lines)), 300)
        lines.clear()
        with BenchmarkEnv(self.running.url, trace=lines.append) as over_http:
            over_http.reset()
        self.assertIn("-> POST /reset HTTP/1.1", lines)
        self.assertIn("<- HTTP/1.1 200 OK", lines)

    def test_exceptions_travel(self) -> None:
        errors: list[Exception] = [
            client.ConnectionClosed(1001, "bye"),
            client.ServerError("full", "CAPACITY_REACHED"),
            client.ServerError("bad", "VALIDATION_ERROR", [{"type": "missing"}]),
            client.Invalid([client.describe_fault("missing", "Required", ("a",), {})]),
            server.Failure(503, "full", "CODE", {"max_sessions": 1}, {"Allow": "GET"}),
        ]
        for error in errors:
            for again in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
                self.assertIs(type(again), type(error))
                self.assertEqual((str(again), vars(again)), (str(error), vars(error)))

    def test_from_env_names_the_image_of_a_space(self) -> None:
        calls: list[Any] = []

        class Provider:
            def start_container(_, image: str, **kwargs: Any) -> str:
                calls.append((image, kwargs))
                return self.running.url

            def wait_for_ready(_, base_url: str) -> None:
                calls.append(base_url)

            def stop_container(_) -> None:
                calls.append("stopped")

        image, url = "registry.hf.space/my-org-echo-env-v2", self.running.url
        for cls in BOTH:
            for start in (cls.from_env, cls.from_hub):
                for tag in ({}, {"tag": "v1"}):
                    with start("My-Org/Echo_Env.v2", Provider(), port=1, **tag) as env:
                        self.assertEqual(env.reset().reward, 0.0)
                    name = f"{image}:{tag.get('tag', 'latest')}"
                    self.assertEqual(calls, [(name, {"port": 1}), url, "stopped"])
                    calls.clear()
            with self.assertRaisesRegex(ValueError, "use_docker"):
                cls.from_env("a/b", Provider(), use_docker=False)

    def test_python_without_ssl_serves_and_calls(self) -> None:
        code = textwrap.dedent("""
            import sys
            sys.modules["ssl"] = sys.modules["_ssl"] = None
            from benchmark import *
            import server
            app = server.create_app(BenchmarkEnvironment, BenchmarkAction, BenchmarkObservation)
            with app.start() as running:
                for cls in (BenchmarkEnv, BenchmarkEnvWS):
                    with cls(running.url) as env:
                        env.reset()
                        print(env.step(BenchmarkAction("Hi")).reward)
                    try:
                        cls("https://127.0.0.1:1").reset()
                    except ValueError as error:
                        print("no ssl" in str(error))
        """)
        done = run("-c", code)
        self.assertEqual((done.stdout, done.stderr), ("0.2\nTrue\n" * 2, ""))

    def test_file_is_found_through_a_link_and_in_an_archive(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            link, archive = Path(directory, "link.py"), Path(directory, "all.zip")
            commands = [[str(archive)]]
            with contextlib.suppress(OSError, NotImplementedError):  # not on Windows
                link.symlink_to(HERE / "client.py")
                commands.append([str(link)])
            with zipfile.ZipFile(archive, "w") as file:
                for name in ("benchmark.py", "client.py", "server.py"):
                    file.write(HERE / name, name)
                main = "import sys, client; sys.exit(client.main())"
                file.writestr("__main__.py", main)
            for command in commands:
                done = run(*command, "Hi", cwd=Path(directory))
                self.assertEqual(done.stdout, "'Hi' length 2 reward 0.2\n", done.stderr)

    def test_file_says_what_is_missing_beside_it(self) -> None:
        done = run("-I", "client.py", "Hi")
        self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1))
        self.assertRegex(done.stderr, "^client.py: benchmark.*-I")
        with tempfile.TemporaryDirectory() as directory:
            for name in ("benchmark.py", "client.py"):
                shutil.copy(HERE / name, directory)
            done = run("client.py", "Hi", cwd=Path(directory))
            self.assertEqual((done.returncode, done.stderr.count("\n")), (2, 1))
            self.assertIn("server.py is not beside client.py", done.stderr)
            Path(directory, "server.py").write_text("import no_such_module\n")
            done = run("client.py", "Hi", cwd=Path(directory))
            self.assertIn("No module named 'no_such_module'", done.stderr)
            self.assertNotIn("not beside", done.stderr)


# ---------------------------------------------------------------------------
# HTTP
# ---------------------------------------------------------------------------

HEALTH = "GET /health HTTP/1.1\nHOST"
STEP = "POST /step HTTP/1.1\nHOST\nContent-Type: application/json\n"
CHUNKED = f"{STEP}Transfer-Encoding: chunked"
STEP_BODY = b'{"action":{"message":"x"}}'  # of 26 bytes
FAULT_KEYS = {"type", "loc", "msg", "input"}


def result(message: str, length: int, reward: float, **metadata: Any) -> Any:
    """What reset and step answer: metadata stands beside the observation, too, if any."""
    seen = {"echoed_message": message, "message_length": length, "metadata": metadata}
    beside = {"metadata": metadata} if metadata else {}
    return {"observation": seen, "reward": reward, "done": False, **beside}


READY = result("Benchmark environment ready!", 0, 0.0)


class HTTPTest(ServerCase):
    def test_head_and_body_have_their_status(self) -> None:
        # What two programs read in two ways can smuggle a request past one of them.
        old, text = (
            STEP.replace("1.1", "1.0"),
            STEP.replace("application/json", "text/plain"),
        )
        many, long = "".join(f"\nA{i}: b" for i in range(200)), "x" * 70000
        sized, body = f"{STEP}Content-Length: 26", STEP_BODY
        heads = {
            200: ["GET /health HTTP/1.0", f"{HEALTH}\nA: b"],
            400: [
                "GET /health HTTP/1.1", f"{HEALTH}\nHOST", "GET  /health HTTP/1.1\nHOST", "GET /health",
                "GET /health HTTP/1.1\r\nHOST", "GET http://[/ HTTP/1.1\nHOST", f"{HEALTH}\nbad header",
                f"{HEALTH}\nA : b", f"{HEALTH}\nA: b\n folded", f"{HEALTH}\nA: b\0c",
                *(f"{STEP}Content-Length: {size}" for size in ("-1", "2 6", "+26")),
                f"{old}Transfer-Encoding: chunked",
            ],
            413: [f"{STEP}Content-Length: 999999999999"],
            414: [f"GET /{long} HTTP/1.1\nHOST"],
            417: [f"{sized}\nExpect: magic"],
            431: [f"{HEALTH}\nA: {long}", f"{HEALTH}{many}"],
            501: ["BREW /pot HTTP/1.1\nHOST", f"{STEP}Transfer-Encoding: gzip"],
            505: ["GET /health HTTP/2.0\nHOST"],
        }  # fmt: skip
        # Lines and data end in CR LF and nothing else (RFC 9112 section 7.1).
        chunks = {
            200: [b"5;a=b\r\n%b\r\n15\r\n%b\r\n0\r\nHost: x\r\n\r\n" % (body[:5], body[5:])],
            400: [
                b"x\r\n", b"1\r\nabc\r\n", b"1a\n%b\r\n0\r\n\r\n" % body, b"1a\r\r\n%b\r\n0\r\n\r\n" % body,
                *(b"1a\r\n%b%b0\r\n\r\n" % (body, end) for end in (b"\n", b"\r\r\n", b"\r\n\n")),
                b"1a\r\n%b\r\n0\n\r\n" % body,
            ],
            413: [b"fffffffff\r\n"],
        }  # fmt: skip
        cases = [
            (200, sized, body),
            (200, f"{old}Content-Length: 26\nExpect: magic", body),
            (400, f"{sized}\nContent-Length: 26", body),
            (400, f"{sized}\nTransfer-Encoding: chunked", body),
            (415, f"{text}Content-Length: 26", body),
            *((status, head, b"") for status in heads for head in heads[status]),
            *((status, CHUNKED, data) for status in chunks for data in chunks[status]),
        ]
        for expected, head, data in cases:
            with self.subTest(head=head[:80], data=data), self.peer() as peer:
                status, _, answer = peer.ask(head, data)
                self.assertEqual(status, expected, answer)
                self.assertTrue(status == 200 or isinstance(answer["detail"], str))

    def test_head_with_many_spaces_takes_no_time(self) -> None:
        began = time.monotonic()
        for value, expected in ((" " * 60_000 + "\1", 400), (f"x{' ' * 60_000}x", 200)):
            with self.peer() as peer:
                self.assertEqual(peer.ask(f"{HEALTH}\nA:{value}")[0], expected)
        self.assertLess(time.monotonic() - began, 2)

    def test_connection_is_kept_and_may_be_ahead(self) -> None:
        with self.peer() as peer:
            for _ in range(50):
                peer.request(HEALTH)
            for _ in range(50):
                self.assertNotIn("connection", peer.response()[1])
            old = "GET /health HTTP/1.0"
            for field, kept in (
                ("\nConnection: keep-alive", "keep-alive"),
                ("", "close"),
            ):
                self.assertEqual(peer.ask(old + field)[1]["connection"], kept)
            self.assertTrue(peer.at_end())

    def test_expect_is_answered_before_the_body(self) -> None:
        head = f"{STEP}Content-Length: 26\nExpect: 100-continue"
        with self.peer() as peer:
            peer.request(head)
            self.assertEqual(peer.read_head(), "HTTP/1.1 100 Continue")
            peer.send(STEP_BODY)
            self.assertEqual(peer.response()[0], 200)
            # HTTP/1.0 does not know it (RFC 9110 section 10.1.1).
            self.assertEqual(peer.ask(head.replace("1.1", "1.0"), STEP_BODY)[0], 200)

    def test_path_and_method_must_be_known(self) -> None:
        self.assertEqual(self.http("GET", "/nowhere")[0], 404)
        with self.peer() as peer:
            for method in ("PUT", "DELETE", "GET", "PATCH", "TRACE"):
                status, fields, answer = peer.ask(f"{method} /step HTTP/1.1\nHOST")
                self.assertEqual((status, fields["allow"]), (405, "POST, OPTIONS"))
                self.assertIn("detail", answer)
            status, fields, _ = peer.ask("OPTIONS /state HTTP/1.1\nHOST")
            self.assertEqual((status, fields["allow"]), (204, "GET, HEAD, OPTIONS"))
            status, fields, _ = peer.ask("GET / HTTP/1.1\nHOST")
            self.assertEqual((status, fields["location"]), (307, "web"))
            peer.request("HEAD /health HTTP/1.1\nHOST\nConnection: close")
            self.assertIn("Content-Length: 20", peer.read_head())
            self.assertTrue(peer.at_end())

    def test_body_that_breaks_its_schema_is_told_every_fault(self) -> None:
        wrong = {"action": {"m": 1, "metadata": 2}, "timeout_s": 0}
        every = "missing action.message, extra_forbidden action.m, dict_type action.metadata"
        long = {"action": {"message": ""}, "request_id": "x" * 256}
        ids = {"seed": -1, "episode_id": 5}
        cases: list[tuple[str, Any, str]] = [
            ("/step", {}, "missing action"),
            ("/step", [], "dict_type "),
            ("/step", {"action": 5}, "dict_type action"),
            ("/step", {"action": {"message": 5}}, "string_type action.message"),
            ("/step", wrong, f"{every}, greater_than timeout_s"),
            ("/step", long, "string_too_long request_id"),
            ("/reset", ids, "greater_than_equal seed, string_type episode_id"),
            ("/reset", {"seed": True}, "int_type seed"),
        ]
        for path, body, expected in cases:
            with self.subTest(path=path, body=body):
                status, answer = self.http("POST", path, body)
                faults = answer["detail"]
                found = [f"{f['type']} {'.'.join(f['loc'][1:])}" for f in faults]
                self.assertEqual((status, ", ".join(found)), (422, expected))
                self.assertEqual(
                    (set(faults[0]), faults[0]["loc"][0]), (FAULT_KEYS, "body")
                )

    def test_body_that_is_odd_json_is_refused_or_echoed(self) -> None:
        def step(value: str) -> str:
            return f'{{"action":{{"message":"","metadata":{{"v":{value}}}}}}}'

        deep = "[" * 100_000, "[" * 500 + "]" * 500
        values = *deep, "1" * 100_000, "NaN", "-Infinity", "1e999"
        for body in ("{", b"\xff", b"\xef\xbb\xbf{}", *map(step, values)):
            with self.subTest(body=body[:40]):
                status, answer = self.http("POST", "/step", body)
                self.assertEqual(status, 422)
                self.assertEqual(answer["detail"][0]["type"], "json_invalid")
        self.assertEqual(self.http("POST", "/step", step("[" * 90 + "]" * 90))[0], 200)
        for text, echo in (("\\ud800", "\ud800"), ('a","message":"b', "b")):
            answer = self.http("POST", "/step", f'{{"action":{{"message":"{text}"}}}}')
            self.assertEqual(answer[1]["observation"]["echoed_message"], echo)

    def test_routes_of_a_session(self) -> None:
        step = {
            "action": {"message": "Hi"},
            "timeout_s": 5,
            "request_id": "r",
            "other": 1,
        }
        state = {"episode_id": "e1", "step_count": 1}
        for method, path, body, expected in (
            ("POST", "/reset", {"seed": 3.0, "episode_id": "e1"}, READY),
            ("POST", "/step", step, result("Hi", 2, 0.2, step=1)),
            ("GET", "/state?x=1", None, state),
            ("GET", "/%73tate", None, state),
            ("POST", "/close", None, {"status": "closed"}),
        ):
            answer = self.http(method, path, body, {"X-Session-Id": "routes"})
            self.assertEqual(answer, (200, expected))

    def test_routes_for_information(self) -> None:
        self.assertEqual(self.http("GET", "/health"), (200, {"status": "healthy"}))
        parts = "action", "observation", "state"
        self.assertEqual(tuple(self.http("GET", "/schema")[1]), parts)
        metadata = {
            "name": "BenchmarkEnvironment",
            "description": BenchmarkEnvironment.__doc__,
            "version": benchmark.__version__,
            "readme_content": (HERE / "README.md").read_text("utf-8"),
            "author": None,
            "documentation_url": None,
        }
        self.assertEqual(self.http("GET", "/metadata")[1], metadata)

    def test_mcp_answers_json_rpc(self) -> None:
        call = {"jsonrpc": "2.0", "id": "a"}
        cases: list[tuple[Any, Any, int]] = [
            ("{", None, -32700),
            ({}, None, -32600),
            ([], None, -32600),
            ({**call, "method": 5}, "a", -32600),
            ({**call, "method": "other"}, "a", -32601),
            ({**call, "method": "tools/list"}, "a", -32603),
            ({**call, "method": "tools/call", "params": {}}, "a", -32603),
        ]
        for body, name, code in cases:
            status, answer = self.http("POST", "/mcp", body)
            self.assertEqual((status, answer["jsonrpc"]), (200, "2.0"))
            self.assertEqual((answer["id"], answer["error"]["code"]), (name, code))

    def test_openapi_describes_every_route_and_its_examples_hold(self) -> None:
        document = self.http("GET", "/openapi.json")[1]
        self.assertRegex(document["openapi"], r"^3\.1\.")
        self.assertEqual(document["info"]["version"], benchmark.__version__)
        paths = set(server.METHODS) - {"*"} - set(server.REDIRECTS) | {"/"}
        self.assertEqual(set(document["paths"]), paths)
        for path, methods in document["paths"].items():
            ((method, operation),) = methods.items()
            self.assertIn(method.upper(), server.METHODS[path])
            names = {"operationId", "summary", "tags", "responses"}
            self.assertLessEqual(names, set(operation))
            body = operation.get("requestBody", {}).get("content")
            given = shown(body)[1] if body else None
            status, answer = self.http(method.upper(), path, given)
            expected = operation["responses"][str(status)].get("content", {})
            if "application/json" in expected:
                schema, example = shown(expected)
                self.assertTrue(fits(answer, schema, document), answer)
            if path == "/reset":
                self.assertEqual((set(example), example["reward"]), (set(answer), 0.0))

    def test_openapi_of_any_environment_has_examples_that_fit(self) -> None:
        types = Everything, BenchmarkObservation
        with server.create_app(BenchmarkEnvironment, *types).start() as running:
            document = self.http("GET", "/openapi.json", running=running)[1]
            step = document["paths"]["/step"]["post"]["requestBody"]["content"]
            answer = self.http("POST", "/step", shown(step)[1], running=running)
            self.assertEqual(answer[0], 500)  # it fits, but this echo echoes messages
        nodes, examples = [document], 0
        while nodes:
            node = nodes.pop()
            nodes += [child for child in node.values() if isinstance(child, dict)]
            nodes += node["anyOf"] if isinstance(node.get("anyOf"), list) else []
            self.assertIsInstance(follow(node, document), dict)
            if "schema" in node and "examples" in node:
                schema, example = shown({"": node})
                self.assertTrue(fits(example, schema, document), node)
                examples += 1
        self.assertGreater(examples, 20)


def shown(content: Any) -> tuple[Any, Any]:
    """The schema and the first example of a body in OpenAPI."""
    (media,) = content.values()
    return media["schema"], next(iter(media["examples"].values()))["value"]


def follow(schema: Any, root: Any) -> Any:
    for part in schema["$ref"].split("/")[1:] if "$ref" in schema else ():
        schema = root = root[part]
    return schema


def fits(value: Any, schema: Any, root: Any) -> bool:
    """Whether a value is made as a JSON Schema says; bounds are the server's to check."""
    schema = follow(schema, root)
    if "anyOf" in schema:
        return any(fits(value, member, root) for member in schema["anyOf"])
    names, items = schema.get("properties", {}), schema.get("items", {})
    if schema.get("type") == "object" and isinstance(value, dict):
        more = schema.get("additionalProperties", True) or set(value) <= set(names)
        members = [(value[name], names[name]) for name in names if name in value]
        whole = set(schema.get("required", ())) <= set(value)
        return more and whole and all(fits(v, s, root) for v, s in members)
    if schema.get("type") == "array" and isinstance(value, list):
        pairs = zip(value, schema.get("prefixItems", [items] * len(value)))
        return all(fits(v, s, root) for v, s in pairs)
    kinds: dict[Any, Any] = {"null": [type(None)], "boolean": [bool], "string": [str]}
    numbers = {"integer": [int], "number": [int, float]}
    known = {**kinds, **numbers, None: [type(value)]}
    same = value in schema.get("enum", [schema.get("const", value)])
    named = schema.get("type")
    names = named if isinstance(named, list) else [named]
    return same and any(type(value) in known.get(name, []) for name in names)


class OriginTest(ServerCase):
    """What the pages of other sites may not do: a browser sends Host and Origin."""

    def check(self, running: server.Server, cases: dict[int, list[str]]) -> None:
        for expected, lines in [(e, lines) for e in cases for lines in cases[e]]:
            text = lines.replace("PORT", str(running.server_port))
            text = text if "GET" in text else f"GET /health HTTP/1.1\n{text}"
            with self.subTest(lines), self.peer(running) as peer:
                self.assertEqual(peer.ask(text)[0], expected)

    def test_host_and_origin_must_be_this_machine(self) -> None:
        evil = "evil.example"
        foreign = ("[::1", "[x]", "a@localhost", "localhost/evil", "localhost?evil")
        here = ("localhost", "LocalHost:80", "127.1.2.3", "[::1]:99", "a.localhost")
        good = [
            "HOST\nOrigin: http://127.0.0.1:PORT",
            "HOST\nOrigin: https://a.example\nX-Forwarded-Host: a.example",
            *(f"Host: {name}" for name in (*here, "0.0.0.0:PORT", "[::]:PORT")),
            "Host: [::]:PORT\nOrigin: http://[::]:PORT",
            # Of an absolute target the host counts (RFC 9112 section 3.2.2).
            f"GET http://127.0.0.1:PORT/health HTTP/1.1\nHost: {evil}",
        ]
        bad = [
            *(f"HOST\nOrigin: {o}" for o in ("http://127.0.0.1:1", f"http://{evil}", "null")),
            *(f"Host: {name}" for name in (evil, *foreign, "127.0.0.1:PORT:80")),
            *(f"Host: {h}\nOrigin: http://{evil}" for h in (evil, "0.0.0.0:PORT", "[::]:PORT")),
            f"GET http://{evil}/health HTTP/1.1\nHOST",
        ]  # fmt: skip
        self.check(self.running, {200: good, 403: bad})

    def test_hosts_may_be_named(self) -> None:
        with mock.patch.dict(os.environ, {"SPACE_HOST": "me-env.hf.space"}):
            running = serve(allow_origins=["https://lab.example:8443", "b.example"])
        self.addCleanup(running.stop)
        named = "me-env.hf.space", "lab.example:8443", "b.example"
        good = [
            f"{line}{name}"
            for line in ("Host: ", "HOST\nOrigin: https://")
            for name in named
        ]
        self.check(running, {200: good, 403: ["HOST\nOrigin: https://c.example"]})

    def test_handshake_of_a_websocket_is_guarded_too(self) -> None:
        with self.assertRaisesRegex(ConnectionError, "403.*may not call"):
            origin = {"Origin": "http://evil.example"}
            client.WebSocket.connect(f"{self.running.url}/ws", origin)


# ---------------------------------------------------------------------------
# WebSocket: OpenEnv's messages
# ---------------------------------------------------------------------------


class MessageTest(ServerCase):
    def ask(self, *messages: Any) -> list[Any]:
        """What is answered to messages that are sent all at once."""
        with self.peer().upgrade() as peer:
            for message in messages:
                raw = isinstance(message, bytes)
                peer.send(message if raw else text_frame(message))
            return [peer.message() for _ in messages]

    def test_message_of_every_type_is_answered(self) -> None:
        call = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
        first, second, state, mcp, again = self.ask(
            {"type": "reset", "data": {"seed": 1, "episode_id": "e1"}},
            {"type": "step", "data": {"message": "Hi"}},
            {"type": "state"},
            {"type": "mcp", "data": call},
            {"type": "reset"},
        )
        step = result("Hi", 2, 0.2, step=1)
        self.assertEqual([first, again], [{"type": "observation", "data": READY}] * 2)
        self.assertEqual(second, {"type": "observation", "data": step})
        data = {"episode_id": "e1", "step_count": 1}
        self.assertEqual(state, {"type": "state", "data": data})
        self.assertEqual((mcp["type"], mcp["data"]["error"]["code"]), ("mcp", -32603))

    def test_error_leaves_the_session_alive(self) -> None:
        cases = {
            "INVALID_JSON": ["{", '{"type":NaN}', "[" * 5000],
            "UNKNOWN_TYPE": ['{"type":"jump"}', '{"type":5}', "{}"],
            "VALIDATION_ERROR": [
                "[]", '"text"', '{"type":"step"}', '{"type":"mcp"}', '{"type":"step","data":{}}',
                '{"type":"state","data":{}}', '{"type":"reset","data":[]}', '{"type":"reset","data":{"seed":-1}}',
            ],
        }  # fmt: skip
        pairs = [(code, frame(1, t.encode())) for code in cases for t in cases[code]]
        pairs.append(("INVALID_JSON", frame(2, b'{"type":"state"}')))  # it is binary
        *answers, last = self.ask(*(data for _, data in pairs), {"type": "state"})
        for (code, data), answer in zip(pairs, answers):
            with self.subTest(data=data):
                said = answer["data"]
                self.assertEqual((answer["type"], said["code"]), ("error", code))
                self.assertTrue(said["message"])
                if code == "VALIDATION_ERROR":
                    self.assertEqual(set(said["errors"][0]), FAULT_KEYS)
        self.assertEqual(last["data"]["step_count"], 0)


class Broken(BenchmarkEnvironment):
    """Gives reward and done as its messages say, or fails."""

    results: dict[str, tuple[Any, Any]] = {  # noqa: RUF012
        "flags": (True, 1),
        "integers": (3, 0),
        "arrays": (Array(0.5), Array(True)),
        "nothing": (None, None),
        "a word": ("high", False),
        "a list": ([1.0], False),
        "not finite": (float("nan"), False),
        "huge": (10**400, False),
    }
    errors: dict[str, BaseException] = {  # noqa: RUF012
        "raise": ValueError("a\nb"),
        "exit": SystemExit(3),
        "cancel": asyncio.CancelledError(),
    }

    def step(self, action: BenchmarkAction, timeout_s: float | None = None) -> Any:
        if action.message in self.errors:
            raise self.errors[action.message]
        if action.message in self.results:
            return BenchmarkObservation("", 0, *self.results[action.message])
        keys: dict[Any, int] = {True: 1, None: 2, 1.5: 3}
        others = {"none": None, "set": {"reward": 1, "value": object()}, "keys": keys}
        return (
            others[action.message] if action.message in others else super().step(action)
        )


class FailureTest(ServerCase):
    """What an environment does oddly or wrong, over both transports."""

    options = {"env": Broken}  # noqa: RUF012

    def setUp(self) -> None:
        self.ws = self.peer().upgrade()

    def step(self, message: str) -> Any:
        """What a step answers, the same over WebSocket and HTTP."""
        self.ws.send(text_frame({"type": "step", "data": {"message": message}}))
        answer = self.ws.message()["data"]
        _, over_http = self.http("POST", "/step", {"action": {"message": message}})
        over_http = {k.replace("detail", "message"): v for k, v in over_http.items()}
        self.assertEqual(repr(over_http), repr(answer))
        return answer

    def test_reward_and_done_have_one_type_on_the_wire(self) -> None:
        rewards = {
            "flags": "1.0",
            "integers": "3.0",
            "arrays": "0.5",
            "nothing": "None",
        }
        for message, reward in rewards.items():
            answer, done = self.step(message), message in ("flags", "arrays")
            self.assertEqual((repr(answer["reward"]), answer["done"]), (reward, done))

    def test_keys_that_are_no_texts_become_texts(self) -> None:
        keys = {"true": 1, "null": 2, "1.5": 3}
        self.assertEqual(self.step("keys")["observation"], keys)

    def test_step_that_fails_hurts_nobody(self) -> None:
        wrong = "none", "set", "a word", "a list", "not finite", "huge"
        for message in (*Broken.errors, *wrong):
            with self.subTest(message):
                answer = self.step(message)
                self.assertEqual(answer["code"], "EXECUTION_ERROR")
                self.assertTrue(answer["message"])
        self.assertEqual(self.step("raise")["message"], "a\nb")
        self.assertEqual(
            self.http("POST", "/step", {"action": {"message": "raise"}})[0], 500
        )
        self.assertEqual(self.step("fine")["reward"], 0.4)

    def test_environment_that_cannot_be_created(self) -> None:
        def factory() -> Any:
            raise OSError("no display")

        failure = {"code": "FACTORY_ERROR", "factory_name": "factory"}
        with serve(factory) as running:
            with self.peer(running).upgrade() as peer:
                self.assertLessEqual(failure.items(), peer.message()["data"].items())
                self.assertEqual(peer.close_code(), 1011)
            answer = self.http("POST", "/reset", {}, running=running)
            words = "factory: no display"
            self.assertEqual(answer, (500, {"detail": words, **failure}))
            self.assertEqual(self.http("GET", "/health", running=running)[0], 200)


# ---------------------------------------------------------------------------
# WebSocket: the server's handshake, and the two kinds of serving
# ---------------------------------------------------------------------------

HELLO = text_frame({"type": "step", "data": {"message": "hello"}})


class UpgradeTest(ServerCase):
    """Real connections, from the opening handshake on."""

    options = {"max_message_mb": 1}  # noqa: RUF012

    def test_frame_right_behind_the_handshake(self) -> None:
        for size in (len(HELLO), 9):
            with self.peer() as peer, constants(TICK_SECONDS=0.01):
                peer.request(
                    "GET /ws HTTP/1.1\nHOST\nUpgrade: h2c, WebSocket\nConnection: keep-alive, UPGRADE\n"
                    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\nSec-WebSocket-Version: 13\n"
                    "Sec-WebSocket-Extensions: permessage-deflate\nSec-WebSocket-Protocol: chat",
                    HELLO[:size],
                )
                head = peer.read_head().lower()
                self.assertIn("-accept: icx+yqv66kxgm0fcwalwlflwtai=", head)
                self.assertNotIn("extensions", head)
                self.assertNotIn("protocol:", head)
                time.sleep(0.3)  # half a frame is no stall yet
                peer.send(HELLO[size:])
                self.assertEqual(peer.message()["type"], "observation")

    def test_bad_handshakes(self) -> None:
        good = {
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
            "Sec-WebSocket-Version": "13",
        }
        cases = [
            ({"Upgrade": "h2c"}, "GET", 426),
            ({"Connection": "close"}, "GET", 426),
            ({"Sec-WebSocket-Version": "8"}, "GET", 426),
            ({"Sec-WebSocket-Key": "AAAA"}, "GET", 400),
            ({"Sec-WebSocket-Key": "A" * 24}, "GET", 400),
            ({}, "POST", 405),
            ({}, "HEAD", 405),
        ]
        for changes, method, expected in cases:
            fields = "\n".join(f"{k}: {v}" for k, v in {**good, **changes}.items())
            with self.subTest(changes=changes, method=method), self.peer() as peer:
                peer.request(f"{method} /ws HTTP/1.1\nHOST\n{fields}")
                head = peer.read_head()
                self.assertTrue(head.startswith(f"HTTP/1.1 {expected}"), head)
                if expected == 426:
                    self.assertIn("Sec-WebSocket-Version: 13", head)

    def test_faults_have_their_codes(self) -> None:
        header = bytes([0x81, 0xFF]) + ((1 << 20) + 1).to_bytes(8, "big") + b"mask"
        for data, code in (
            (frame(3), 1002),
            (frame(1, b"{}", masked=False), 1002),
            (frame(1, b"\xff", fin=False), 1007),
            (header, 1009),  # before it is sent
            (frame(8, close_body(4000, "bye")) + HELLO, 4000),
        ):
            with self.subTest(code=code), self.peer().upgrade() as peer:
                peer.send(data)
                self.assertEqual(peer.close_code(), code)

    def test_random_bytes_never_hurt_the_server(self) -> None:
        other = self.peer().upgrade()
        chance = random.Random(6455)
        for _ in range(60):
            with self.peer().upgrade() as peer:
                data = bytearray(HELLO * chance.randrange(1, 9))
                for _ in range(chance.randrange(1, 5)):
                    data[chance.randrange(len(data))] = chance.randrange(256)
                peer.send(bytes(data[: chance.randrange(len(data))]))
                peer.sock.shutdown(socket.SHUT_WR)
                peer.at_end()
        other.send(HELLO)
        self.assertEqual(other.message()["type"], "observation")
        wait_until(lambda: self.running.app.active == 1, "the end of the others")


class Quick(BenchmarkEnvironment):
    """Notes in which threads it is made, called and closed."""

    NEVER_WAITS = True
    lives: list[list[str]] = []  # noqa: RUF012
    gate = threading.Event()
    big_steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.threads = [threading.current_thread().name]

    def step(
        self, action: BenchmarkAction, timeout_s: float | None = None
    ) -> BenchmarkObservation:
        self.threads.append(threading.current_thread().name)
        if action.message == "wait":
            self.gate.wait(PATIENCE)
        if action.message == "big":
            type(self).big_steps += 1
            return BenchmarkObservation("x" * (1 << 23))
        if action.message == "break":
            raise ValueError("it breaks")
        return super().step(action)

    def close(self) -> None:
        self.lives.append([*self.threads, threading.current_thread().name])


class Slow(Quick):
    """Does not say itself that it never waits."""


class ServingTest(ServerCase):
    """An environment that never waits: the thread that reads calls it."""

    kind: type[Quick] = Quick

    def setUp(self) -> None:
        Quick.lives.clear()
        Quick.gate.clear()
        self.addCleanup(Quick.gate.set)
        self.own = serve(self.kind)
        self.addCleanup(self.own.stop)
        self.first, self.second = (self.peer(self.own).upgrade() for _ in range(2))

    def ask(self, peer: RawPeer, message: str) -> None:
        peer.send(text_frame({"type": "step", "data": {"message": message}}))

    def step(self, peer: RawPeer, message: str = "hello") -> Any:
        self.ask(peer, message)
        data = peer.message()["data"]
        return data.get("observation", data).get("echoed_message", data)

    def test_thread_is_always_the_same(self) -> None:
        peers = [self.first, self.second, self.peer(self.own).upgrade()]
        for message in ("hello", "break", "big", "hello"):
            for peer in peers:
                self.step(peer, message)
        for peer in peers:
            peer.sock.close()
        wait_until(lambda: len(Quick.lives) == 3)
        self.check_lives(Quick.lives)

    def check_lives(self, lives: list[list[str]]) -> None:
        for _, *steps, _ in lives:
            self.assertEqual(steps, ["reader"] * 4)

    def test_half_a_message_holds_nobody_up(self) -> None:
        self.first.send(HELLO[:9])
        for _ in range(3):
            self.step(self.second)
        self.first.send(HELLO[9:])
        self.assertIn("observation", self.first.message()["data"])

    def test_answer_that_is_not_taken_holds_nobody_up(self) -> None:
        self.kind.big_steps = 0
        for _ in range(3):
            self.ask(self.first, "big")
        wait_until(lambda: self.kind.big_steps)
        for _ in range(3):
            self.step(self.second)
        self.assertEqual(self.kind.big_steps, 1)  # else the answers would pile up
        for _ in range(3):
            observation = self.first.message()["data"]["observation"]
            self.assertEqual(len(observation["echoed_message"]), 1 << 23)

    def test_many_messages_at_once_take_turns_with_others(self) -> None:
        self.first.send(HELLO * 2000)
        self.step(self.second)
        with self.assertRaises(BlockingIOError):  # the other is still at it
            self.first.sock.setblocking(False)
            while len(self.first.data) < 200_000:
                self.first.data += self.first.sock.recv(65536)
        self.first.sock.settimeout(PATIENCE)
        for step in range(1, 2001):  # all are answered, in order
            metadata = self.first.message()["data"]["metadata"]
            self.assertEqual(metadata, {"step": step})

    def test_errors_and_ends(self) -> None:
        self.assertEqual(self.step(self.first, "break")["code"], "EXECUTION_ERROR")
        self.step(self.first)
        self.first.send(text_frame({"type": "close"}))
        self.assertEqual(self.first.close_code(), 1000)
        self.second.sock.close()
        wait_until(lambda: not self.own.connections)
        self.assertEqual(self.own.app.active, 0)

    def test_stop_says_goodbye(self) -> None:
        with ThreadPoolExecutor(1) as pool:
            stopping = pool.submit(self.own.stop)
            for peer in (self.first, self.second):
                self.assertEqual(peer.close_code(), 1001)
            self.assertFalse(stopping.result(PATIENCE))

    def test_stop_says_goodbye_to_who_always_sends(self) -> None:
        def flood() -> None:
            with contextlib.suppress(OSError):
                while True:
                    self.first.send(block)

        block = text_frame({"type": "state"}) * 2000
        with ThreadPoolExecutor(2) as pool:
            pool.submit(flood)
            self.first.message()
            stopping = pool.submit(self.own.stop)
            last = b""
            with contextlib.suppress(ConnectionResetError):
                while data := self.first.sock.recv(1 << 20):
                    last = (last + data)[-40:]
            self.assertIn(b"\x88\x1d" + close_body(1001), last)
            stopping.result(PATIENCE)
            self.first.sock.close()


class OwnThreadTest(ServingTest):
    """An environment that may wait: each session has a thread of its own."""

    kind = Slow

    def check_lives(self, lives: list[list[str]]) -> None:
        for life in lives:
            self.assertEqual(len(set(life)), 1, life)
        self.assertEqual(len({life[0] for life in lives} - {"reader"}), 3)

    def test_ping_and_close_are_answered_during_a_step(self) -> None:
        for peer in (self.first, self.second):
            self.ask(peer, "wait")
            peer.send(frame(9, b"still there?"))
            self.assertEqual(peer.read_frame(), (0x8A, b"still there?"))
        self.first.send(frame(8, close_body(1000)))
        self.assertEqual(self.first.close_code(), 1000)  # and no answer to the step
        Quick.gate.set()
        self.assertIn("observation", self.second.message()["data"])

    def test_session_that_gets_no_thread_is_refused_and_no_other(self) -> None:
        start = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if thread.name.startswith("session"):
                raise RuntimeError("can't start new thread")
            start(thread)

        for peer in (self.first, self.second):
            self.step(peer)
        with mock.patch.object(threading.Thread, "start", refuse):
            peer = self.peer(self.own).upgrade()
            error = peer.message()["data"]
            self.assertEqual(error["code"], "SESSION_ERROR")
            self.assertIn("can't start new thread", error["message"])
            self.assertEqual(peer.close_code(), 1011)
            self.step(self.second)
        self.assertEqual(self.own.app.active, 2)


# ---------------------------------------------------------------------------
# Apps, sessions, load and the end
# ---------------------------------------------------------------------------

UPGRADE = (
    "GET /ws HTTP/1.1\nHOST\nUpgrade: websocket\nConnection: Upgrade\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\nSec-WebSocket-Version: 13"
)
WAIT = text_frame({"type": "step", "data": {"message": "wait"}})
RESETTING = socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)


def wire(head: str) -> bytes:
    """The bytes of a request's head."""
    return (
        f"{head}\n\n".replace("HOST", "Host: localhost").replace("\n", "\r\n").encode()
    )


class Counted(BenchmarkEnvironment):
    """Counts its instances; a step that is told to waits for the gate."""

    made = closed = waiting = 0
    gate = threading.Event()

    def __init__(self) -> None:
        super().__init__()
        type(self).made += 1

    def step(
        self, action: BenchmarkAction, timeout_s: float | None = None
    ) -> BenchmarkObservation:
        if action.message == "wait":
            type(self).waiting += 1
            self.gate.wait(PATIENCE)
            type(self).waiting -= 1
        return super().step(action)

    def close(self) -> None:
        type(self).closed += 1
        if self.state.episode_id == "close raises":
            raise OSError("cannot close")


class Single(BenchmarkEnvironment):
    SUPPORTS_CONCURRENT_SESSIONS = False


class AppTest(unittest.TestCase):
    def app(self, env: Any, action: type = BenchmarkAction, **options: Any) -> Any:
        return server.create_app(env, action, BenchmarkObservation, **options)

    def test_environment_that_cannot_work_is_refused_in_one_line(self) -> None:
        def own(name: str, **members: Any) -> Any:
            return type(name, (BenchmarkEnvironment,), members)

        def without(name: str) -> Any:
            names = {"__init__", "reset", "step", "state"} - {name}
            return type(
                "Lacking", (), {n: vars(BenchmarkEnvironment)[n] for n in names}
            )

        echo = BenchmarkAction
        odd = dataclasses.make_dataclass("Odd", [("a", "Nowhere")])
        cases: list[tuple[Any, type, str]] = [
            (BenchmarkEnvironment(), echo, "pass the class BenchmarkEnvironment itself"),
            (own("Own", state=lambda self: 0), echo, "^Own.state is a method: put @property"),
            (own("Own", __init__=lambda self, path: None), echo, r"^Own\(\): .*path"),
            (without("reset"), echo, "^Lacking has no method reset$"),
            (without("step"), echo, "^Lacking has no method step$"),
            (without("state"), echo, "^Lacking has no property state$"),
            (BenchmarkEnvironment, odd, "Odd.a .*Nowhere"),
            (BenchmarkEnvironment, int, "^int is no dataclass"),
        ]  # fmt: skip
        for env, action, words in cases:
            with self.subTest(words):
                with self.assertRaisesRegex(TypeError, words) as caught:
                    self.app(env, action)
                self.assertNotIn("\n", str(caught.exception))

    def test_number_of_environments_is_what_the_class_allows(self) -> None:
        def factory(cls: Any = BenchmarkEnvironment) -> Any:
            return cls()

        partial = functools.partial
        many = partial(BenchmarkEnvironment), partial(factory, BenchmarkEnvironment)
        for env in (BenchmarkEnvironment, factory, *many):
            app = self.app(env, max_concurrent_envs=64)
            self.assertEqual(app.max_concurrent_envs, 64)
        for env in (Single, partial(Single), partial(factory, Single)):
            self.assertEqual(self.app(env).max_concurrent_envs, 1)
            with self.assertRaisesRegex(ValueError, "SUPPORTS_CONCURRENT_SESSIONS"):
                self.app(env, max_concurrent_envs=2)
        self.assertEqual(self.app(BenchmarkEnvironment).max_concurrent_envs, 1000)
        with self.assertRaisesRegex(ValueError, "max_concurrent_envs"):
            self.app(BenchmarkEnvironment, max_concurrent_envs=0)
        with self.assertRaisesRegex(ValueError, "max_message_mb"):
            self.app(BenchmarkEnvironment, max_message_mb=0)

    def test_servers_in_one_process_are_independent(self) -> None:
        with serve(Single) as one, serve(env_name="two") as two:
            told = [exchange(each.url, "GET", "/metadata")[1] for each in (one, two)]
            self.assertEqual([metadata["name"] for metadata in told], ["Single", "two"])
            with BenchmarkEnvWS(two.url) as env:
                env.reset()
                self.assertFalse(one.stop())
                self.assertEqual(env.step(BenchmarkAction("x")).reward, 0.1)

    def test_environment_may_be_asynchronous(self) -> None:
        class Async(BenchmarkEnvironment):
            async def reset_async(self, **kwargs: Any) -> BenchmarkObservation:
                self.lock = asyncio.Lock()
                self.given = kwargs
                return self.reset(episode_id=kwargs.get("episode_id"))

            async def step_async(self, action: BenchmarkAction) -> BenchmarkObservation:
                async with self.lock:
                    await asyncio.sleep(0)
                observation = self.step(action)
                observation.metadata.update(self.given)
                return observation

        with serve(Async) as running:
            for cls in (BenchmarkEnvWS, BenchmarkEnv):
                with cls(running.url) as env:
                    env.reset(seed=5, level="hard")
                    metadata = env.step(BenchmarkAction("x")).observation.metadata
                    given = {"step": 1, "seed": 5, "level": "hard"}
                    self.assertEqual(metadata, given)

    def test_action_that_fails_by_itself_hurts_nobody(self) -> None:
        @dataclass
        class Fussy(BenchmarkAction):
            def __post_init__(self) -> None:
                if self.message == "no":
                    sys.exit("no")

        app = self.app(BenchmarkEnvironment, Fussy)
        with app.start() as running, BenchmarkEnvWS(running.url) as env:
            failure = self.assertRaisesRegex(RuntimeError, "no .code: EXECUTION_ERROR")
            with self.assertLogs("openenv", "ERROR"), failure:
                env.step(BenchmarkAction("no"))
            self.assertEqual(env.step(BenchmarkAction("yes")).reward, 0.3)


class SessionTest(ServerCase):
    def setUp(self) -> None:
        Counted.made = Counted.closed = Counted.waiting = 0
        Counted.gate = threading.Event()
        self.small = serve(Counted, max_concurrent_envs=2)
        self.addCleanup(self.small.stop)

    def ask(self, method: str, path: str, session: str | None = None) -> Any:
        """Ask the small server in that session; return status and answer."""
        headers = {} if session is None else {"X-Session-Id": session}
        action = {"action": {"message": "x"}}
        body = {"/step": action, "/reset": {}}.get(path)
        return self.http(method, path, body, headers, self.small)

    def test_session_of_http_is_opened_by_reset(self) -> None:
        for method, path in (("POST", "/step"), ("GET", "/state"), ("POST", "/close")):
            status, answer = self.ask(method, path, "a")
            self.assertEqual(status, 404)
            self.assertIn("reset first", answer["detail"])
        for name in ("a", "b" * 255):
            self.ask("POST", "/reset", name)
        for _ in range(3):
            self.ask("POST", "/step", "a")
        found = [self.ask("GET", "/state", name)[1] for name in ("a", "b" * 255)]
        self.assertEqual([state["step_count"] for state in found], [3, 0])
        for name in ("x" * 256, ""):
            self.assertEqual(self.ask("GET", "/state", name)[0], 422)
        self.assertEqual(Counted.made, 2)

    def test_session_is_shared_by_requests_without_a_name(self) -> None:
        status, answer = self.ask("POST", "/close")
        self.assertEqual(status, 404)
        self.assertIn("send the X-Session-Id", answer["detail"])
        for steps in range(3):
            self.assertEqual(self.ask("GET", "/state")[1]["step_count"], steps)
            self.ask("POST", "/step")
        self.assertEqual(self.ask("POST", "/close")[0], 200)
        self.assertEqual((Counted.made, Counted.closed), (1, 1))

    def test_capacity_counts_both_transports(self) -> None:
        first = self.peer(self.small).upgrade()
        first.send(HELLO)
        first.message()
        self.ask("POST", "/reset", "s")
        full = {"code": "CAPACITY_REACHED", "active_sessions": 2, "max_sessions": 2}
        with self.peer(self.small).upgrade() as peer:
            answer = peer.message()
            self.assertEqual(answer["type"], "error")
            self.assertLessEqual(full.items(), answer["data"].items())
            self.assertEqual(peer.close_code(), 1013)
        status, answer = self.ask("POST", "/reset", "t")
        self.assertEqual(status, 503)
        self.assertLessEqual(full.items(), answer.items())

    def test_place_is_free_when_the_connection_ends(self) -> None:
        class Lasting(Counted):
            def close(self) -> None:
                time.sleep(0.1)

        with serve(Lasting, max_concurrent_envs=1) as running:
            for _ in range(3):
                with self.peer(running).upgrade() as peer:
                    peer.send(HELLO)
                    self.assertEqual(peer.message()["type"], "observation")
                    peer.send(frame(8))
                    self.assertEqual(peer.close_code(), 0)

    def test_idle_sessions_end(self) -> None:
        short = constants(TICK_SECONDS=0.02)
        with short, serve(Counted, session_timeout=0.2) as running:
            ws = self.peer(running).upgrade()
            session = {"X-Session-Id": "s"}
            self.http("POST", "/reset", {}, session, running)
            self.assertEqual(ws.close_code(), 1001)
            wait_until(lambda: Counted.closed == 2, "the end of both sessions")
            self.assertEqual(self.http("GET", "/state", None, session, running)[0], 404)

    def test_environments_are_closed_exactly_once(self) -> None:
        many = serve(Counted, max_concurrent_envs=100)
        self.addCleanup(many.stop)
        failing = {"type": "reset", "data": {"episode_id": "close raises"}}
        ends: list[Callable[[RawPeer], Any]] = [
            lambda p: p.send(frame(8)),
            lambda p: p.send(text_frame({"type": "close"})),
            lambda p: p.send(text_frame(failing)),
            lambda p: p.send(b"\xff\xff"),
            lambda p: p.sock.close(),
            lambda p: p.sock.setsockopt(*RESETTING),
        ]
        for end in ends * 3:
            with self.peer(many).upgrade() as peer:
                peer.send(HELLO)
                peer.message()
                end(peer)
        for name in "012":
            self.http("POST", "/reset", {}, {"X-Session-Id": name}, many)
        self.http("POST", "/close", {}, {"X-Session-Id": "0"}, many)
        wait_until(lambda: many.app.active == 2, "the end of the others")
        many.stop()
        self.assertEqual((Counted.made, Counted.closed), (21, 21))

    def test_connections_cut_anywhere_leave_nothing(self) -> None:
        chance = random.Random(3)
        upgrade, step = wire(UPGRADE), wire(f"{STEP}Content-Length: 26") + STEP_BODY
        streams = upgrade + HELLO * 3 + frame(8), step * 2
        with serve(Counted, max_concurrent_envs=1000) as running:
            before = threading.active_count()
            for i in range(300):
                peer, stream = RawPeer(running), streams[i % 2]
                peer.send(stream[: chance.randrange(len(stream))])
                if i % 3 == 0:
                    peer.sock.setsockopt(*RESETTING)
                peer.sock.close()
            wait_until(lambda: not running.connections, "the end of all connections")
            most = before + 1  # the reader's thread may not have been there yet
            wait_until(lambda: threading.active_count() <= most, "their threads' end")
            self.assertLessEqual(Counted.made - Counted.closed, 1)  # the shared one

    def test_fault_that_nobody_foresaw_ends_one_connection_only(self) -> None:
        def failing(cls: Any, name: str, when: Callable[..., bool]) -> Any:
            function = getattr(cls, name)

            def call(*args: Any) -> Any:
                if when(*args):
                    raise MemoryError
                return function(*args)

            return mock.patch.object(cls, name, call)

        boom = text_frame({"type": "boom"})
        own = serve(Counted)
        self.addCleanup(own.stop)
        with (
            failing(client.Protocol, "receive", lambda _, data: len(data) > 5000),
            failing(server.Session, "answer", lambda _, text: "boom" in text),
            failing(server.App, "use", lambda *_: True),
            failing(server.Handler, "tick", lambda *_: True),
        ):
            for running in (self.running, own):
                other = self.peer(running).upgrade()
                for data in (b"x" * 6000, boom * 3):
                    peer = self.peer(running).upgrade()
                    peer.send(data)
                    self.assertTrue(peer.at_end())
                peer = self.peer(running)
                peer.request(UPGRADE, b"x" * 6000)
                peer.read_head()
                self.assertTrue(peer.at_end())
                peer = self.peer(running)
                self.assertEqual(peer.ask("GET /state HTTP/1.1\nHOST")[0], 500)
                other.send(HELLO)
                self.assertEqual(other.message()["type"], "observation")
                wait_until(lambda r=running: r.app.active == 1, "the others' end")  # type: ignore[misc]

    def test_close_behind_messages_ends_a_step_at_once(self) -> None:
        with self.peer(self.small).upgrade() as peer:
            peer.send(WAIT)
            wait_until(lambda: Counted.waiting)
            peer.send(HELLO + frame(8, b"\x03\xe8"))
            self.assertEqual(peer.close_code(), 1000)
            Counted.gate.set()
            wait_until(lambda: not self.small.app.active)

    def test_flood_during_a_step_holds_nobody_up(self) -> None:
        def send(peer: RawPeer, flood: bytes) -> None:
            with contextlib.suppress(OSError):
                while True:
                    peer.send(flood)

        for opcode in (9, 1):
            with ThreadPoolExecutor(2) as pool, self.peer(self.small).upgrade() as peer:
                peer.send(WAIT)
                pool.submit(send, peer, frame(opcode) * 5000)
                pool.submit(peer.at_end)
                for _ in range(5):
                    began = time.monotonic()
                    self.assertEqual(self.ask("GET", "/health")[0], 200)
                    self.assertLess(time.monotonic() - began, 3)
                peer.sock.shutdown(socket.SHUT_RDWR)
                Counted.gate.set()

    def test_peer_that_is_slow_is_dropped(self) -> None:
        chunked, part = wire(CHUNKED), frame(1, b"x", fin=False)
        kept = wire("GET /health HTTP/1.0\nConnection: keep-alive")
        # What comes at first, and what goes on to come.
        over_http = [
            (b"", b""),
            (b"GET / HT", b""),
            (chunked + b"1a\r\n{", b""),
            (kept, b""),
            (b"GET /health HTTP/1.1\r\nA: ", b"x"),
            (chunked, b"1\r\n \r\n"),
        ]
        over_ws = [
            (HELLO[:5], b""),
            (frame(1, b"x" * 10_000)[:10], b"x"),
            (part, frame(0, b"x", fin=False)),
            (part, frame(9)),
        ]
        short = constants(HEADER_SECONDS=0.3, IDLE_SECONDS=0.5, TICK_SECONDS=0.05)
        with short, serve() as running:
            peers = [(self.peer(running), *case) for case in over_http]
            peers += [(self.peer(running).upgrade(), *case) for case in over_ws]
            for peer, first, _ in peers:
                peer.send(first)

            def drip() -> bool:
                for peer, _, more in peers:
                    with contextlib.suppress(OSError):
                        peer.send(more)
                return not running.connections

            wait_until(drip, "the end of all connections")
            for peer, *_ in peers:
                peer.at_end()

    def test_peer_that_takes_no_answer_is_dropped(self) -> None:
        big = json.dumps({"action": {"message": "x" * 10_000_000}}).encode()
        step = {"type": "step", "data": {"message": "x" * 1000}}
        steps = text_frame(step) * 200
        for env in (BenchmarkEnvironment, Counted):
            short = constants(HEADER_SECONDS=0.5, TICK_SECONDS=0.05)
            with short, serve(env) as running:
                over_http, over_ws = self.peer(running), self.peer(running).upgrade()
                over_http.request(f"{STEP}Content-Length: {len(big)}", big)
                with self.assertRaises(OSError):
                    while True:
                        over_ws.send(steps)
                wait_until(lambda r=running: not r.connections)  # type: ignore[misc]
                wait_until(lambda r=running: r.app.active == 1)  # type: ignore[misc]
                over_http.at_end()
                self.assertLess(len(over_http.data), 10_000_000)

    def test_message_that_began_with_the_handshake_is_no_stall(self) -> None:
        short = constants(TICK_SECONDS=0.001)
        with short, serve() as running, self.peer(running) as peer:
            peer.request(UPGRADE, frame(1, b'{"type":', fin=False))
            peer.read_head()
            for _ in range(20):  # in which the server looks at all connections
                peer.send(frame(9))
                self.assertEqual(peer.read_frame(), (0x8A, b""))
                time.sleep(0.001)
            peer.send(frame(0, b'"state"}'))
            self.assertEqual(peer.message()["type"], "state")

    def test_threads_of_callers_do_not_mix(self) -> None:
        def play(number: int) -> list[Any]:
            with (BenchmarkEnvWS if number % 2 else BenchmarkEnv)(
                self.running.url
            ) as env:
                env.reset(episode_id=f"e{number}")
                found: list[Any] = []
                for step in range(1, 16):
                    seen = env.step(BenchmarkAction(f"{number}:{step}")).observation
                    found.append((seen.echoed_message, seen.metadata["step"]))
                state = env.state()
                return [*found, state.episode_id, state.step_count]

        with ThreadPoolExecutor(24) as pool:
            for number, found in enumerate(pool.map(play, range(48))):
                expected = [(f"{number}:{step}", step) for step in range(1, 16)]
                self.assertEqual(found, [*expected, f"e{number}", 15])

    def test_stop_answers_steps_in_progress(self) -> None:
        idle, busy = (self.peer(self.small).upgrade() for _ in range(2))
        kept = self.peer(self.small)
        self.assertEqual(kept.ask(HEALTH)[0], 200)
        busy.send(WAIT)
        wait_until(lambda: Counted.waiting and Counted.made == 2)
        with ThreadPoolExecutor(1) as pool:
            stopping = pool.submit(self.small.stop)
            self.assertEqual(idle.close_code(), 1001)
            self.assertTrue(kept.at_end())
            Counted.gate.set()
            self.assertEqual(busy.message()["data"]["metadata"], {"step": 1})
            self.assertEqual(busy.close_code(), 1001)
            self.assertFalse(stopping.result(PATIENCE))
        self.assertEqual((Counted.made, Counted.closed), (2, 2))
        with self.assertRaises(OSError):
            socket.create_connection(("127.0.0.1", self.small.server_port), 1)

    def test_stop_does_not_wait_for_a_stuck_step(self) -> None:
        with constants(GRACE_SECONDS=0.2):
            self.peer(self.small).upgrade().send(WAIT)
            wait_until(lambda: Counted.waiting)
            began = time.monotonic()
            self.assertTrue(self.small.stop())  # it says so
            self.assertLess(time.monotonic() - began, 3)
            self.assertEqual(Counted.closed, 1)
            Counted.gate.set()

    def test_stop_closes_an_environment_that_was_being_made(self) -> None:
        class Slow(Counted):
            def __init__(self) -> None:
                Counted.waiting += 1
                self.gate.wait(PATIENCE)
                super().__init__()

        with constants(GRACE_SECONDS=0.1):
            running = serve(Slow)
            self.peer(running).upgrade()
            wait_until(lambda: Counted.waiting)
            running.stop()
            Counted.gate.set()
            wait_until(lambda: Slow.closed == 1 == Slow.made)


# ---------------------------------------------------------------------------
# The command lines
# ---------------------------------------------------------------------------


def environment(**extra: str) -> dict[str, str]:
    """What a command of ours needs of this process's environment."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PORT", "SPACE_HOST")}
    return {**kept, "PYTHONUNBUFFERED": "1", **extra}


def run(
    *arguments: str | Path, cwd: Path = HERE, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments to its end."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


class Command:
    """A server in a process of its own, as ``python3 server.py`` starts it.

    ``lines`` are the rest of its output, once it has ended, and ``errors`` what it logged.
    """

    def __init__(self, *arguments: str, cwd: Path = HERE, **env: str) -> None:
        command = [sys.executable, str(HERE / "server.py"), "--port", "0", *arguments]
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment(**env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        self.url = self.next_url()

    @property
    def server_port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def next_line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().rstrip("\n")

    def next_url(self) -> str:
        self.line = self.next_line()
        found = re.search(r"http://\S+?:\d+", self.line)
        return found[0] if found else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.terminate()
        output, self.errors = self.process.communicate(timeout=PATIENCE)
        self.lines = output.splitlines()


OWN = """\
{before}
from benchmark import *
class Own(BenchmarkEnvironment):
    SUPPORTS_CONCURRENT_SESSIONS = NEVER_WAITS = False
    def step(self, action: BenchmarkAction) -> BenchmarkObservation:
        {step}
        return super().step(action)
"""


class CommandLineTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, "utf-8")

    def own(self, step: str = "pass", before: str = "", *options: str) -> Command:
        """A server of an environment whose step begins with these statements."""
        self.write("own.py", OWN.format(step=step, before=before))
        options = "--env", "own:Own", *options
        return Command(*options, cwd=self.folder, PYTHONUNBUFFERED="")

    def test_imports_leave_out_what_may_not_be_needed(self) -> None:
        unused = "{'argparse', 'asyncio', 'urllib.request'}"
        code = f"import server, sys; print({unused} & set(sys.modules))"
        self.assertEqual(run("-S", "-c", code).stdout, "set()\n")

    def test_imports_do_without_ssl(self) -> None:
        code = """if True:
            import sys
            sys.modules["ssl"] = sys.modules["_ssl"] = None
            import server
            from benchmark import *
            types = BenchmarkAction, BenchmarkObservation
            with server.create_app(BenchmarkEnvironment, *types).start() as running:
                for cls in BenchmarkEnv, BenchmarkEnvWS:
                    with cls(running.url) as env:
                        env.reset()
                        print(env.step(BenchmarkAction("Hi")).reward)
        """
        done = run("-c", code)
        self.assertEqual((done.stdout, done.stderr), ("0.2\n0.2\n", ""))

    def test_imports_that_python_hides_are_named(self) -> None:
        others = {"server.py": "client.py", "client.py": "benchmark.py"}
        for program, other in others.items():
            done = run("-I", program)
            self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1))
            self.assertIn(f"{other} is not beside it, or Python's -I", done.stderr)

    def test_help_and_version(self) -> None:
        for program in ("server.py", "client.py"):
            done = run(program, "--version")
            self.assertEqual(done.stdout, f"{program} {benchmark.__version__}\n")
            shown = run(program, "--help").stdout
            self.assertIn("--", shown)
            self.assertNotRegex(shown, r"None|\[\]")

    def test_server_says_where_it_is(self) -> None:
        with Command("--log-level", "INFO") as command:
            self.assertIn(f"{command.url}/web", command.line)
            self.assertIn(f"{command.url}/docs", command.line)
            with BenchmarkEnvWS(command.url) as env:
                self.assertEqual(env.reset().reward, 0.0)
        self.assertEqual(command.process.returncode, 0)
        life = r"session ws-1 opened\n.*session ws-1 closed after 0 steps"
        self.assertRegex(command.errors, life)

    def test_mistake_is_one_line_and_code_2(self) -> None:
        odd = "import dataclasses\n@dataclasses.dataclass\nclass Odd:\n    a: complex\n"
        self.write("own.py", OWN.format(before=odd, step="pass"))
        text = "from own import *\nclass Wrong(Own):\n    def state(self): pass\n"
        text += "class Untyped(Own):\n    def step(self, action): pass\n"
        text += "class Strange(Own):\n    def step(self, a: Odd) -> Odd: pass\n"
        self.write("wrong.py", text)
        full = {"PYTHONPATH": str(HERE)}
        here = "192.0.2.1"  # nobody has this address
        with socket.create_server(("127.0.0.1", 0)) as busy:
            port = busy.getsockname()[1]
            cases: list[tuple[str, dict[str, str], str]] = [
                (f"server.py --port {port}", {}, f"--port {port}: .*in use"),
                ("server.py --port x", {}, "--port: invalid int"),
                ("server.py --port 99999", {}, "--port 99999"),
                ("server.py", {"PORT": "x"}, r"\$PORT .*'x'"),
                ("server.py", {"PORT": "99999"}, r"\$PORT .*'99999'"),
                (f"server.py --host {here}", {"PORT": ""}, f"{here} --port 8000"),
                (f"server.py --host {here}", {"PORT": "1"}, f"{here} --port 1:"),
                ("server.py --host no.such.host.invalid", {}, "cannot listen on --host"),
                ("server.py --env nothing:Here", {}, "--env nothing:Here: .*nothing"),
                ("server.py --env benchmark", {}, "--env benchmark: .*module:Class"),
                ("server.py --env benchmark:Missing", {}, "no class Missing"),
                ("server.py --env benchmark.x:Missing", {}, "--env .*benchmark"),
                ("server.py --env wrong:Untyped", full, "--env wrong:Untyped: .*hints"),
                ("server.py --env wrong:Wrong", full, "--env .*Wrong.state is a method"),
                ("server.py --env wrong:Strange", full, "--env .*Odd.a: .*complex"),
                ("server.py --max-concurrent-envs 0", {}, "--max-concurrent-envs must"),
                ("server.py --env own:Own --max-concurrent-envs 2", full, "--max-concurrent-envs > 1 .*SUPPORTS"),
                ("server.py --max-message-mb 0", {}, "--max-message-mb must"),
                ("server.py --session-timeout -1", {}, "--session-timeout"),
                ("server.py --nonsense", {}, "--nonsense"),
                ("server.py --log-level loud", {}, "loud"),
                ("client.py", {}, "messages"),
                ("client.py --url 127.0.0.1:1 x", {}, "cannot connect"),
            ]  # fmt: skip

            def mistake(case: tuple[str, dict[str, str], str]) -> Any:
                program, *arguments = case[0].split()
                return run(HERE / program, *arguments, cwd=self.folder, **case[1])

            with ThreadPoolExecutor(4) as pool:
                ends = list(pool.map(mistake, cases))
        for (command, env, words), done in zip(cases, ends):
            with self.subTest(command, env=env):
                self.assertEqual((done.returncode, done.stdout), (2, ""), done.stderr)
                self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
                self.assertRegex(done.stderr, words)

    def test_mistake_in_the_module_shows_its_traceback(self) -> None:
        for line in (
            "import not_there",
            "open('/not/there')",
            "from own import x",
            "1 / 0",
        ):
            self.write("own.py", f"{line}\n")
            done = run(HERE / "server.py", "--env", "own:Own", cwd=self.folder)
            with self.subTest(line):
                self.assertEqual((done.returncode, done.stdout), (1, ""))
                self.assertRegex(done.stderr, "(?s)^Traceback.*own.py., line 1, in")
                self.assertIn(line, done.stderr)

    def test_client_shows_the_whole_thing(self) -> None:
        expected = "'Hello' length 5 reward 0.5\n'World' length 5 reward 0.5\n"
        for options in ((), ("--http",)):
            done = run("client.py", "Hello", "World", *options)
            ended = done.returncode, done.stdout, done.stderr
            self.assertEqual(ended, (0, expected, ""))
        done = run("client.py", "--trace", "Hello")
        self.assertIn("-> GET /ws HTTP/1.1", done.stderr)

    def test_output_shows_what_its_encoding_cannot(self) -> None:
        done = run("client.py", "日", PYTHONIOENCODING="cp1252")
        self.assertEqual(done.stdout, "'\\u65e5' length 1 reward 0.1\n")
        named = "from benchmark import *\nclass 日(BenchmarkEnvironment): pass\n"
        self.write("own.py", named)
        options = "--env", "own:日"
        with Command(*options, cwd=self.folder, PYTHONIOENCODING="cp1252") as command:
            self.assertIn("\\u65e5 on http://", command.line)

    @unittest.skipUnless(os.path.exists("/dev/full"), "there is no /dev/full")
    def test_output_that_is_full_or_closed_is_no_traceback(self) -> None:
        def start(program: str, redirect: str) -> Any:
            line = f"exec {shlex.quote(sys.executable)} {program} {redirect}"
            shell, pipe = ["sh", "-c", line], subprocess.PIPE
            return subprocess.Popen(shell, cwd=HERE, stderr=pipe, encoding="utf-8")

        full = "client.py: [Errno 28] No space left on device\n"
        for redirect, code, words in ((">/dev/full", 2, full), (">&-", 0, "")):
            with self.subTest(redirect):
                process = start("client.py Hi", redirect)
                errors = process.communicate(timeout=PATIENCE)[1]
                self.assertEqual((process.returncode, errors), (code, words))
                port = free_port()
                process = start(f"server.py --port {port}", redirect)
                url = f"http://127.0.0.1:{port}"
                wait_until(lambda: self.reaches(url), "the start")  # noqa: B023
                process.terminate()
                errors = process.communicate(timeout=PATIENCE)[1]
                self.assertEqual(process.returncode, 0)
                self.assertNotIn("Traceback", errors)

    def reaches(self, url: str) -> bool:
        try:
            return exchange(url, "GET", "/health")[0] == 200
        except OSError:
            return False

    def test_bench_measures_a_server(self) -> None:
        for options in (
            (),
            ("--sessions", "3"),
            ("--http", "--sessions", "2", "--size", "70000"),
        ):
            done = run("test_benchmark.py", "--bench", "0.2", "--json", *options)
            result = json.loads(done.stdout)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertEqual(result["errors"], 0)
            self.assertGreater(result["steps_per_second"], 0)
            self.assertLessEqual(result["p50_ms"], result["p99_ms"])
        with Command("--port", "0") as own:
            done = run("test_benchmark.py", "--bench", "0.1", "--url", own.url)
        self.assertRegex(done.stdout, r"(?m)^steps_per_second  [\d,.]+$")
        for wrong in ("0", "1 --sessions 0", "1 --url 127.0.0.1:1"):
            done = run("test_benchmark.py", "--bench", *wrong.split())
            self.assertEqual((done.returncode, done.stderr.count("\n")), (2, 1))

    def test_environment_of_ones_own(self) -> None:
        future = "from __future__ import annotations\n"
        tools = "import functools\ndef noted(step):\n    @functools.wraps(step)\n"
        tools += "    def call(*args: Any, **kwargs: Any) -> Any:\n"
        tools += "        print('noted')\n        return step(*args, **kwargs)\n"
        noted = "class Noted(Own):\n    step = tools.noted(Own.step)\n"
        self.write("tools.py", f"{future}{tools}    return call\n")
        self.write("own.py", OWN.format(before=future, step="pass"))
        self.write("noted.py", f"{future}import tools\nfrom own import *\n{noted}")
        with Command("--env", "noted:Noted", cwd=self.folder) as command:
            with BenchmarkEnvWS(command.url) as env:
                self.assertEqual(env.step(BenchmarkAction("x")).reward, 0.1)
                second = BenchmarkEnv(command.url)
                with second, self.assertRaisesRegex(RuntimeError, "CAPACITY_REACHED"):
                    second.reset()
            with BenchmarkEnv(command.url) as env:
                env.reset()
                self.assertEqual(env.step(BenchmarkAction("x")).reward, 0.1)
        self.assertEqual(command.lines, ["noted", "noted"])

    def test_log_cannot_be_forged(self) -> None:
        forged = "x\\n2026-01-01 INFO forged\\x1b[31m\\x9b"
        with self.own(f"raise ValueError('{forged}')") as command:
            for path in ("/reset", "/close", "/%0aINFO\x80\x9b", "/\x1b[31m"):
                head = f"POST {path} HTTP/1.1\nHOST\nX-Session-Id: a\x9b[31m\xff"
                with RawPeer(command) as peer:
                    self.assertIn(peer.ask(head)[0], (200, 400, 404))
            with BenchmarkEnv(command.url) as env:
                env.reset()
                with self.assertRaises(client.ServerError):
                    env.step(BenchmarkAction("x"))
        self.assertIn("\n    2026-01-01 INFO forged\\x1b[31m\\x9b\n", command.errors)
        for line in command.errors.splitlines():
            self.assertRegex(line, r"^(\d{4}-\d\d-\d\d [\d:,]+ (INFO|ERROR) |    )")
            self.assertTrue(line.isascii() and line.isprintable(), line)

    @unittest.skipIf(os.name == "nt", "Windows has no such signals")
    def test_signal_ends_the_server(self) -> None:
        with Command() as command:
            command.process.terminate()  # as soon as it said where it is
        self.assertEqual(command.process.returncode, 0)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            with Command() as command, BenchmarkEnvWS(command.url) as env:
                env.reset()
                command.process.send_signal(number)
                self.assertEqual(command.process.wait(PATIENCE), 0)
                with self.assertRaisesRegex(ConnectionError, "1001|broke|refused"):
                    env.step(BenchmarkAction("x"))
            self.assertNotIn("Traceback", command.errors)

    @unittest.skipIf(os.name == "nt", "Windows has no such signals")
    def test_signal_ends_a_stuck_step_by_force(self) -> None:
        def stop(signals: int) -> tuple[int, float, list[str]]:
            with self.own(stuck, "import time") as command:
                ws = client.WebSocket.connect(f"{command.url}/ws")
                ws.send('{"type":"step","data":{"message":""}}')
                self.assertEqual(command.next_line(), "stuck")
                began = time.monotonic()
                for _ in range(signals):
                    command.process.send_signal(signal.SIGINT)
                    time.sleep(0.5)  # two at once would count as one
                code = command.process.wait(PATIENCE)
                ws.drop()
                seconds = time.monotonic() - began
            return code, seconds, command.lines

        stuck = "print('stuck', flush=True); print('kept'); time.sleep(60)"
        with ThreadPoolExecutor(2) as pool:
            (once, seconds, kept), (twice, less, _) = pool.map(stop, (1, 2))
        self.assertEqual((once, twice), (0, -signal.SIGINT))
        self.assertEqual(kept, ["kept"])
        self.assertLess(seconds, 5.5)
        self.assertLess(less, seconds)

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork")
    def test_exit_is_a_normal_one(self) -> None:
        before = "import atexit, multiprocessing, time\n"
        before += "fork = multiprocessing.get_context('fork').Process"
        step = (
            "child = fork(target=time.sleep, args=(60,), daemon=True); child.start(); "
        )
        step += "atexit.register(print, 'at exit'); print(child.pid)"
        with self.own(step, before) as command, BenchmarkEnvWS(command.url) as env:
            env.step(BenchmarkAction("x"))
        child, *rest = command.lines
        self.assertEqual((command.process.returncode, rest), (0, ["at exit"]))
        with self.assertRaises(ProcessLookupError):
            os.kill(int(child), 0)

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork")
    def test_child_of_an_environment_holds_no_socket(self) -> None:
        step = "child = os.fork()\n        if not child: time.sleep(60); os._exit(0)\n"
        step += "        print(child, flush=True)"
        with self.own(step, "import os, time") as command, RawPeer(command) as peer:
            peer.upgrade().send(HELLO)
            child = int(command.next_line())
            try:
                self.assertEqual(peer.message()["type"], "observation")
                peer.send(frame(8))
                self.assertEqual(peer.close_code(), 0)  # and the connection's end
                command.process.terminate()
                self.assertEqual(command.process.wait(PATIENCE), 0)
                address = "127.0.0.1", command.server_port
                with self.assertRaises(OSError):
                    socket.create_connection(address, 1)
                socket.create_server(address).close()
            finally:
                os.kill(child, signal.SIGKILL)  # it lived all the time

    @unittest.skipIf(os.name == "nt", "Windows has no such signals")
    def test_reload_starts_anew_and_ends_both(self) -> None:
        def change(step: str, newer: int) -> None:
            self.write("own.py", OWN.format(before="", step=step))
            later = time.time() + newer  # surely another
            os.utime(self.folder / "own.py", (later, later))

        def echo() -> str:
            with BenchmarkEnvWS(command.url) as env:
                return env.step(BenchmarkAction("x")).observation.echoed_message

        with self.own("pass", "", "--reload") as command:
            self.assertEqual(echo(), "x")
            change("return 'broken", 1)
            assert command.process.stderr
            while "SyntaxError" not in (line := command.process.stderr.readline()):
                self.assertNotEqual(line, "")
            change("action.message *= 3", 2)
            command.url = command.next_url()
            self.assertEqual(echo(), "xxx")
            command.process.send_signal(signal.SIGINT)  # to the parent alone
            self.assertEqual(command.process.wait(PATIENCE), 0)
            self.assertFalse(self.reaches(command.url))
        with self.own("pass", "", "--reload") as command:
            pass
        self.assertEqual(command.process.returncode, 0)


# ---------------------------------------------------------------------------
# The page, in a browser
# ---------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
CHROMIUM_FLAGS = """
--headless=new --no-sandbox --disable-gpu --disable-quic --disable-sync --no-first-run
--disable-background-networking --disable-component-update --disable-dev-shm-usage
--disable-crash-reporter --disable-breakpad --disable-extensions --remote-debugging-port=0
--disable-site-isolation-trials --renderer-process-limit=1
"""
ONLY_HERE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "ArrowDown": (40, "")}
SHIFT = 8
SAID = r"Log\.entryAdded|Runtime\.(exceptionThrown|consoleAPICalled)"
CONTROLS = ("button", "checkbox", "combobox", "link", "spinbutton", "textbox")
MARKUP = "<img src=x onerror=window.hacked=1>"

# Run in every document before its own scripts: short names for the tests; violations of
# the policy, said aloud; and how much of the page has moved by itself.
PREPARE = """
const one = selector => document.querySelector(selector);
const all = selector => [...document.querySelectorAll(selector)];
addEventListener('securitypolicyviolation', event => console.error('CSP', event.blockedURI));
let moved = 0;
new PerformanceObserver(list => {
  for (const entry of list.getEntries()) if (!entry.hadRecentInput) moved += entry.value;
}).observe({type: 'layout-shift', buffered: true});
"""
# As before JSON.rawJSON and the third argument of a reviver.
OLDER = """{
  const parse = JSON.parse;
  JSON.parse = (text, revive) => parse(text, revive && ((key, value) => revive(key, value)));
  delete JSON.rawJSON;
}"""
# Every visible text with less than the contrast that WCAG AA asks for.
FAINT = r"""
all('body *').filter(element => {
  const parts = color => color.match(/[\d.]+/g).map(Number);
  const light = color => parts(color).slice(0, 3).map(part => part / 255)
    .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0.05);
  const paper = element => {
    const color = getComputedStyle(element).backgroundColor;
    return parts(color)[3] === 0 ? paper(element.parentElement) : color;
  };
  const hasText = [...element.childNodes].some(node => node.data?.trim());
  if (!hasText || !element.checkVisibility() || element.matches(':disabled')) return false;
  const ink = light(getComputedStyle(element).color), behind = light(paper(element));
  return Math.max(ink, behind) < 4.5 * Math.min(ink, behind);
}).map(element => element.outerHTML.slice(0, 100))
"""
# What is wider than its place and cannot be scrolled to, and a page wider than the screen.
CUT = """
all('td, dd, pre, textarea, summary, button, html').filter(element =>
  element.checkVisibility() && element.scrollWidth > element.clientWidth + 1
).map(element => element.outerHTML.slice(0, 100))
"""
# All that Tab is to reach; and what is wrong with where it has come to.
WANTED = """
document.activeElement.blur();
window.wanted = new Set(all('a, button:enabled, select, textarea, summary, [tabindex="0"]')
  .filter(element => element.checkVisibility({visibilityProperty: true})));
wanted.size
"""
FOCUSED = """(() => {
  const element = document.activeElement;
  if (element === document.body) return '';  // once around
  wanted.delete(element);
  const {x, y, width, height} = element.getBoundingClientRect();
  const top = document.elementFromPoint(x + Math.min(width, 40) / 2, y + Math.min(height, 20) / 2);
  if (!element.contains(top)) return `${top?.outerHTML} covers ${element.outerHTML}`;
  return getComputedStyle(element).outlineStyle === 'none' ? `no ring: ${element.outerHTML}` : '';
})()"""


class Browser:
    """A headless Chromium, spoken to over the DevTools protocol by our own WebSocket."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp())  # which it fills, and `close` removes
        self.numbers, self.events = itertools.count(1), list[dict[str, Any]]()
        flags = [*CHROMIUM_FLAGS.split(), ONLY_HERE, f"--user-data-dir={self.home}"]
        command, null = [str(CHROMIUM), *flags], subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, stdin=null, stdout=null, stderr=null, start_new_session=True
        )

    @functools.cached_property
    def socket(self) -> client.WebSocket:
        note = self.home / "DevToolsActivePort"
        wait_until(lambda: note.is_file() and "/" in note.read_text(), "Chromium")
        port, path = note.read_text().split()
        url = f"ws://127.0.0.1:{port}{path}"
        return client.WebSocket.connect(url, timeout=PATIENCE)

    def send(self, method: str, **command: Any) -> Any:
        """Send a command and return its result; what happens meanwhile goes to `events`."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, **command}))
        while (answer := json.loads(self.socket.recv())).get("id") != number:
            self.events.append(answer)
        if "error" in answer:
            raise AssertionError(f"{method}: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """End every process of it, and remove what they wrote."""
        with contextlib.suppress(Exception):  # it may have crashed, or hang
            self.send("Browser.close")
            self.process.wait(PATIENCE)
            self.socket.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        wait_until(self.removed, "the end of Chromium")

    def removed(self) -> bool:
        shutil.rmtree(self.home, ignore_errors=True)  # while a process may still write
        return not self.home.exists()


class Proxy(socketserver.ThreadingTCPServer):
    """Serves under /some/env what another port serves under /."""

    daemon_threads = True

    def __init__(self, behind: int) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.behind = behind

    def finish_request(self, request: Any, client_address: Any) -> None:
        with socket.create_connection(("127.0.0.1", self.behind)) as onward:
            threading.Thread(target=self.pipe, args=(onward, request)).start()
            self.pipe(request, onward)

    def pipe(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data.replace(b" /some/env/", b" /", 1))
            target.shutdown(socket.SHUT_WR)


class Pick(enum.Enum):
    PLAIN = "plain"
    MARKUP = MARKUP


@dataclass
class FormAction:
    count: int = field(metadata={"minimum": 1, "description": MARKUP})
    words: list[str]
    pick: Pick = Pick.PLAIN
    exact: bool = False
    pace: Optional[float] = None  # noqa: UP045
    note: str = MARKUP


class FormEnvironment(BenchmarkEnvironment):
    """Echoes every field: <img src=x onerror=window.hacked=1>. Some counts are special."""

    SUPPORTS_CONCURRENT_SESSIONS = False  # so one session fills the server
    proceed = threading.Event()

    def step(self, action: Any, timeout_s: float | None = None) -> BenchmarkObservation:
        if action.count == 7:
            self.proceed.wait(PATIENCE)
        if action.count == 8:
            raise ValueError(MARKUP)
        result = super().step(BenchmarkAction(client.encode_json(action)))
        result.metadata = {}  # so that only the state knows the number of the step
        result.done = action.count == 9
        return result


@unittest.skipUnless(CHROMIUM, f"there is no browser: none of {', '.join(BROWSERS)}")
class PageTest(unittest.TestCase):
    """Real input to the page at /web and /docs, and what a person then sees."""

    browser: Browser
    running: server.Server
    form: server.Server

    @classmethod
    def setUpClass(cls) -> None:
        logging.disable(logging.CRITICAL)
        cls.addClassCleanup(logging.disable, logging.NOTSET)
        cls.browser = Browser()
        cls.addClassCleanup(cls.browser.close)
        cls.running = serve()
        cls.addClassCleanup(cls.running.stop)
        types = FormAction, BenchmarkObservation
        cls.form = server.create_app(FormEnvironment, *types, env_name=MARKUP).start()
        cls.addClassCleanup(cls.form.stop)

    def setUp(self) -> None:
        self.hosts: list[str] = []  # of the pages that were opened
        self.allowed = "nothing"  # a pattern of the faults that belong to the test
        self.session = None
        self.target = self.send("Target.createTarget", url="about:blank")
        self.addCleanup(self.browser.send, "Target.closeTarget", params=self.target)
        attached = self.send("Target.attachToTarget", **self.target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Page.addScriptToEvaluateOnNewDocument", source=PREPARE)
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)

    def tearDown(self) -> None:
        """No text became HTML, the console shows nothing, no other host was asked."""
        markup = self.evaluate("window.hacked ?? all('img, [onerror]').length")
        self.assertEqual(markup, 0)
        events = [e for e in self.browser.events if e.get("sessionId") == self.session]
        faults = [json.dumps(e) for e in events if re.match(SAID, e["method"])]
        asked = re.findall(r'"url": "\w+://([^/"]*)', json.dumps(events))
        self.assertEqual(set(asked) - set(self.hosts), set())
        self.assertEqual([f for f in faults if not re.search(self.allowed, f)], [])

    # -- What a person does, and sees ---------------------------------------------

    def send(self, method: str, **params: Any) -> Any:
        where = {"sessionId": self.session} if self.session else {}
        return self.browser.send(method, params=params, **where)

    def visit(self, url: str, ready: str = "true") -> None:
        self.hosts.append(url.split("/")[2])
        self.send("Page.navigate", url=url)
        self.wait_for(f"document.readyState === 'complete' && {ready}")

    def open(self, path: str, running: server.Server | None = None) -> None:
        if running is self.form:
            wait_until(lambda: not self.form.app.active, "a free place")
        drawn = "$('count').textContent" if path == "web" else "!$('main').hidden"
        self.visit(f"{(running or self.running).url}/{path}", drawn)

    def evaluate(self, script: str) -> Any:
        how = {"awaitPromise": True, "returnByValue": True}
        answer = self.send("Runtime.evaluate", expression=script, **how)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait_for(self, script: str) -> None:
        def holds() -> bool:
            with contextlib.suppress(AssertionError):  # it may not even make sense yet
                return bool(self.evaluate(f"Boolean({script})"))
            return False

        wait_until(holds, script)

    def shows(self, **texts: str) -> None:
        for name, text in texts.items():
            self.wait_for(f"$('{name}').textContent.includes({json.dumps(text)})")

    def texts(self, selector: str) -> list[str]:
        script = f"all(`{selector}`).map(e => e.value ?? e.textContent)"
        found: list[str] = self.evaluate(script)
        return found

    def press(self, key: str, modifiers: int = 0) -> None:
        number, text = KEYS[key]
        code = {"key": key, "windowsVirtualKeyCode": number, "modifiers": modifiers}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **code)
        self.send("Input.dispatchKeyEvent", type="keyUp", **code)

    def click(self, selector: str) -> None:
        self.wait_for(f"one(`{selector}`).disabled !== true")
        place = self.evaluate(f"""(() => {{
          one(`{selector}`).scrollIntoView({{block: 'center'}});
          const {{x, y, width, height}} = one(`{selector}`).getBoundingClientRect();
          return {{x: x + width / 2, y: y + height / 2, button: 'left', clickCount: 1}};
        }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, **place)

    def write(self, selector: str, text: str) -> None:
        self.evaluate(f"one(`{selector}`).focus(); one(`{selector}`).select()")
        self.send("Input.insertText", text=text)

    def fill(self, **texts: str) -> None:
        for name, text in texts.items():
            self.write(f"[name='data.{name}']", text)

    def step(self, **texts: str) -> list[str]:
        """Take a step (or reset, if that is what is filled); return its row in the table."""
        known = self.evaluate("$('rows').childElementCount")
        self.fill(**texts)
        self.press("Enter")
        self.wait_for(f"$('rows').childElementCount > {known}")
        return self.texts("#rows tr:first-child td")

    def attempt(self, name: str) -> str:
        """Press Try it; return what came."""
        self.evaluate(f"$('{name}').open = true")
        self.evaluate(f"all('#{name} [role=status]').forEach(e => e.replaceChildren())")
        self.click(f"#{name} > button")
        self.wait_for(f"one('#{name} [role=status] pre')")
        return self.texts(f"#{name} pre")[0]

    def download(self) -> Any:
        behavior = {"behavior": "allow", "downloadPath": str(self.browser.home)}
        self.browser.send("Browser.setDownloadBehavior", params=behavior)
        file = self.browser.home / "episodes.json"
        file.unlink(missing_ok=True)
        self.click("#download")
        wait_until(file.is_file, "the download")
        return json.loads(file.read_text("utf-8"))

    # -- Play ---------------------------------------------------------------------

    def test_play_an_episode(self) -> None:
        self.open("web")
        self.step(message="Hi")
        self.fill(message="caf\u00e9")
        self.press("Enter", SHIFT)
        self.send("Input.insertText", text="\U0001d11e")
        self.click("#step button")
        self.shows(count="2", reward="0.6", total="0.8", done="no", low="0", high="0.6")
        points = self.evaluate("$('line').getAttribute('points').split(' ')")
        self.assertEqual(len(points), 3)  # the last one twice
        echo, length, _ = self.texts("#observation dd")
        self.assertEqual((echo, length), ("caf\u00e9\n\U0001d11e", "6"))
        for column, cells in enumerate((["2", "1", "0"], ["0.6", "0.2", "0.0"]), 1):
            self.assertEqual(self.texts(f"#rows td:nth-child({column})"), cells)
        self.assertRegex(self.texts("#rows td:nth-child(3)")[0], r"^[\d.]+ m?s$")
        self.assertIn('"echoed_message":"Hi"', self.texts("#rows td:last-child")[1])
        self.step(seed="7", episode_id="named")
        self.shows(count="0", total="0")
        self.click("#ask")
        self.shows(observation="named")
        last = self.download()[-1]
        found = last["type"], last["step"], last["failed"]
        self.assertEqual(found, ("reset", 0, False))
        self.assertEqual(last["data"], {"seed": 7, "episode_id": "named"})

    def test_play_draws_a_form(self) -> None:
        self.open("web", self.form)
        kinds = self.evaluate("all('#step [name]').map(e => e.localName)")
        text, choice = "textarea", "select"
        self.assertEqual(kinds, [text, text, choice, choice, text, text])
        for name in ("exact", "pick"):
            self.evaluate(f"one(`[name='data.{name}']`).focus()")
            self.press("ArrowDown")
        self.step(count="3", words='["\u00e9"]')
        given = {"count": 3, "words": ["\u00e9"], "pick": MARKUP, "exact": True}
        echoed = json.loads(self.texts("#observation dd")[0])
        self.assertEqual(echoed, {**given, "pace": None, "note": MARKUP})
        self.assertEqual(self.texts("#name"), [MARKUP])

    def test_play_marks_what_is_invalid(self) -> None:
        self.open("web", self.form)
        marked = "all(':is(select, textarea):invalid').map(e => e.name)"
        for form, given, wrong in (
            ("step", {"count": "0", "words": '["a", 1]'}, "data.count,data.words"),
            ("step", {"count": "1", "words": "["}, "data.words"),  # not even sent
            ("reset", {"words": "[]", "seed": "-1"}, "data.seed"),
        ):
            self.fill(**given)
            unsent = ["data.words"] if given["words"] == "[" else []
            self.assertEqual(self.evaluate(marked), unsent)  # marks go with a change
            self.click(f"#{form} button")
            self.wait_for(f"String({marked}) === '{wrong}'")
            focused = self.evaluate("document.activeElement.name")
            self.assertEqual(focused, wrong.split(",")[0])
            self.assertIn("VALIDATION_ERROR", self.texts(f"#{form} [role=alert]")[0])
        self.assertEqual(len(self.texts("#rows tr")), 1)  # none of them was a step

    def test_play_takes_step_numbers_from_the_environment(self) -> None:
        self.open("web", self.form)
        self.assertEqual(self.step(count="1", words="[]")[0], "1")
        failed = self.step(count="8")
        self.assertEqual(failed[:2], ["1", "failed"])
        self.assertIn(MARKUP, failed[-1])
        self.assertEqual(self.step(count="2")[0], "2")
        failures = [entry["failed"] for entry in self.download()]
        self.assertEqual(failures, [False, False, True, False])

    def test_play_says_that_a_step_runs_and_that_an_episode_is_done(self) -> None:
        self.open("web", self.form)
        FormEnvironment.proceed.clear()
        self.addCleanup(FormEnvironment.proceed.set)
        self.fill(count="7", words="[]")
        self.press("Enter")
        self.wait_for("/^Running for [0-9.]+ m?s$/.test($('clock').textContent)")
        FormEnvironment.proceed.set()
        self.shows(count="1", done="no")
        self.step(count="9")
        self.shows(done="yes", clock="Took ", reset="Reset begins a new episode")

    def test_numbers_lose_no_digit(self) -> None:
        self.open("web", self.form)
        digits = "123456789012345678901"
        self.assertIn(digits, self.step(count=digits, words="[]", pace="2.0")[-1])
        self.click("#log details:nth-of-type(4) summary")  # the step, as it was sent
        self.wait_for("one('#log pre')")
        for tag in ("code", "pre"):
            sent = self.texts(f"#log details:nth-of-type(4) {tag}")[0]
            self.assertRegex(sent, rf'"count": {digits},(?s:.*)"pace": 2\.0')
        self.assertEqual(self.download()[-1]["data"]["count"], int(digits))

    def test_older_browsers_play_too(self) -> None:
        self.send("Page.addScriptToEvaluateOnNewDocument", source=OLDER)
        self.open("web")
        self.assertEqual(self.step(message="Hi")[:2], ["1", "0.2"])
        self.assertEqual(self.download()[-1]["answer"]["reward"], 0.2)

    def test_long_and_hostile_text_stays_text(self) -> None:
        self.open("web")
        self.step(message=MARKUP)
        long = "\u00e9<b>\U0001f600" * 20_000  # 100,000 code points
        self.evaluate(f"one('#step textarea').value = {json.dumps(long)}")
        self.click("#step button")
        self.shows(reward="10000.0")
        self.click("#log summary")
        self.wait_for(f"one('#log pre').textContent.includes({json.dumps(long)})")

    def test_many_steps_stay_quick(self) -> None:
        self.open("web")
        self.evaluate("for (let i = 0; i < 300; i++) $('step').requestSubmit()")
        self.shows(count="300")
        self.assertEqual(len(self.texts("#rows > *")), 100)
        self.assertEqual(len(self.texts("#log > *")), 100)
        self.assertEqual(len(self.download()), 301)

    def test_leaving_asks_while_there_is_an_episode_to_lose(self) -> None:
        self.open("web")
        leave = "dispatchEvent(new Event('beforeunload', {cancelable: true}))"
        self.assertTrue(self.evaluate(leave))
        self.step(message="x")
        self.assertFalse(self.evaluate(leave))
        self.click("#reset button")
        self.shows(count="0")
        self.assertTrue(self.evaluate(leave))

    # -- Messages -----------------------------------------------------------------

    def test_messages_show_the_wire_and_send_by_hand(self) -> None:
        self.open("web")
        self.step(message="Hi")
        self.assertEqual(self.texts("#log b")[:2], ["← received", "→ sent"])
        self.click("#log summary")
        self.wait_for("one('#log pre')")
        self.assertEqual(json.loads(self.texts("#log pre")[0])["data"]["reward"], 0.2)
        answers = "ready!", "Hello", "step_count", "-32603"
        for number, answer in enumerate(answers, 1):
            self.click(f"#presets :nth-child({number})")
            self.evaluate("$('log').replaceChildren()")
            self.click("#hand textarea + p button")
            self.wait_for(f"/received.*{answer}/s.test($('log').textContent)")
        self.shows(count="1", reward="1.3")  # by hand too
        close = '{"type": "close"}'
        for text, said in ((f'{{"{MARKUP}"', "INVALID_JSON"), (close, "CLOSED")):
            self.write("#message", text)
            self.press("Enter")
            self.shows(hand=said)
        self.shows(status="code 1000")

    def test_connection_lost_and_made_again(self) -> None:
        types = BenchmarkEnvironment, BenchmarkAction, BenchmarkObservation
        with server.create_app(*types).start() as first:
            self.open("web", first)
            self.step(message="one")
        self.shows(status="code 1001")
        self.assertTrue(self.evaluate("one('#step button').disabled"))
        self.allowed = "ERR_CONNECTION_REFUSED"
        self.click("#connect")
        self.shows(status="code 1006")
        with server.create_app(*types).start(port=first.server_port):
            self.click("#connect")
            self.shows(count="0")
            self.step(message="two")
            self.assertEqual(self.texts("#rows td:first-child"), ["1", "0", "1", "0"])

    def test_full_server_says_what_to_do(self) -> None:
        self.open("docs", self.form)
        self.assertIn("200 ", self.attempt("post_reset"))
        self.click("#connect")
        self.wait_for("!$('full').hidden")
        self.shows(reset="CAPACITY_REACHED", full="--max-concurrent-envs")
        self.assertEqual(self.texts("#rows tr"), [])  # nothing was reset
        self.click("#full a")
        self.assertIn("200 ", self.attempt("post_close"))
        self.click("#connect")
        self.shows(count="0")
        self.click("#connect")
        self.shows(status="Disconnected")

    # -- The API ------------------------------------------------------------------

    def test_api_shows_and_tries_every_operation(self) -> None:
        self.open("docs")
        self.assertLess(self.evaluate("$('api').getBoundingClientRect().top"), 200)
        self.assertEqual(self.texts("#status"), [""])  # no session is taken
        api = exchange(self.running.url, "GET", "/openapi.json")[1]
        for path, methods in api["paths"].items():
            [(method, details)] = methods.items()
            name, success = details["operationId"], details["responses"].get("200", {})
            summary = f"{method.upper()} {path} {details['summary']}"
            self.assertEqual(self.texts(f"#{name} > summary"), [summary])
            answers = "\n" + self.texts(f"#{name} pre")[-1]
            for status in details["responses"]:
                self.assertIn(f"\n{status} ", answers)
            if "application/json" not in success.get("content", {}):
                self.assertEqual(self.texts(f"#{name} > button"), [])
                continue
            example = success["content"]["application/json"]["examples"]["example"]
            shown = answers.partition("\n400 ")[0].partition("{")
            self.assertEqual(json.loads("".join(shown[1:])), example["value"])
            self.assertRegex(self.attempt(name), r"^200 OK\n\{")

    def test_api_tries_in_a_session(self) -> None:
        self.open("docs#post_step")
        self.wait_for("$('post_step').open && scrollY > 0")
        self.write("#session", "it's")
        self.allowed = " 404 .*/step"
        self.assertIn("404 ", self.attempt("post_step"))
        self.assertIn("200 ", self.attempt("post_reset"))
        self.write("#post_step textarea", '{"action": {"message": "\u00e9\'"}}')
        self.assertIn('"echoed_message": "\u00e9\'"', self.attempt("post_step"))
        self.assertIn('"step_count": 1', self.attempt("get_state"))
        if shutil.which("curl"):
            command = self.texts("#post_step textarea:read-only")[0]
            command = command.replace("curl", "curl -s --noproxy '*'", 1)
            done = subprocess.run(command, shell=True, capture_output=True, check=True)
            self.assertIn('"step":2', done.stdout.decode())

    # -- Everywhere ---------------------------------------------------------------

    def prepare(self) -> None:
        """Bring the page into a state in which it shows all kinds of things."""
        self.open("web")
        for message in ("Hello, World!", "x" * 200, MARKUP):
            self.step(message=message)
        self.click("#log summary")
        self.write("#session", "s" * 200)
        self.attempt("post_reset")
        self.attempt("post_step")

    def test_it_looks_right(self) -> None:
        self.prepare()
        self.assertLess(self.evaluate("moved"), 0.1)
        folder = Path(os.environ.get("SCREENSHOTS") or self.browser.home)
        looks = itertools.product(("light", "dark"), (320, 360, 768, 1280, 1920))
        background = "getComputedStyle(document.body).backgroundColor"
        papers = set()
        for scheme, width in looks:
            with self.subTest(scheme=scheme, width=width):
                features = [{"name": "prefers-color-scheme", "value": scheme}]
                self.send("Emulation.setEmulatedMedia", features=features)
                size = {"width": width, "height": 800, "deviceScaleFactor": 1}
                mobile = width < 600
                self.send("Emulation.setDeviceMetricsOverride", **size, mobile=mobile)
                self.evaluate("scrollTo(0, 0)")
                image = self.send("Page.captureScreenshot", captureBeyondViewport=True)
                file = folder / f"web-{scheme}-{width}.png"
                file.write_bytes(b64decode(image["data"]))
                self.assertEqual(self.evaluate(FAINT), [])
                self.assertEqual(self.evaluate(CUT), [])
                beside = (
                    "$('wire').offsetTop < $('step').offsetTop"  # Messages, the form
                )
                self.assertEqual(self.evaluate(beside), width > 600)
                papers.add(self.evaluate(background))
        self.assertEqual(len(papers), 2)

    def test_it_is_used_by_keyboard_alone(self) -> None:
        """Tab reaches all that can be used, in sight; each control has a name."""
        self.prepare()
        for node in self.send("Accessibility.getFullAXTree")["nodes"]:
            if node.get("role", {}).get("value") in CONTROLS:
                self.assertTrue(node["name"]["value"], node)
        for _ in range(self.evaluate(WANTED) + 2):
            self.press("Tab")
            self.assertEqual(self.evaluate(FOCUSED), "")
        self.assertEqual(self.evaluate("[...wanted].map(e => e.outerHTML)"), [])

    def test_it_works_behind_a_prefix_and_in_a_frame(self) -> None:
        with Proxy(self.running.server_port) as proxy:
            threading.Thread(target=proxy.serve_forever, daemon=True).start()
            self.addCleanup(proxy.shutdown)
            url = f"http://127.0.0.1:{proxy.server_address[1]}/some/env"
            self.allowed = "/favicon.ico"  # of /health, which is no page
            self.visit(f"{url}/health")
            self.evaluate("document.body.innerHTML = '<iframe src=web></iframe>'")
            self.wait_for("frames[0].document.getElementById('count').textContent")
            for path, target in {"": "web", "redoc": "docs"}.items():
                self.visit(f"{url}/{path}", "!$('main').hidden")
                self.assertEqual(self.evaluate("location.href"), f"{url}/{target}")
            self.assertIn("200 ", self.attempt("get_health"))

    def test_without_javascript_it_says_so_first(self) -> None:
        self.send("Emulation.setScriptExecutionDisabled", value=True)
        self.visit(f"{self.running.url}/web")
        first = "document.body.innerText.trim().split('\\n')[0]"
        self.assertIn("needs JavaScript", self.evaluate(first))


# ---------------------------------------------------------------------------
# README.md: what it shows is run, and must come out as shown
# ---------------------------------------------------------------------------

README_URL = "http://localhost:8000"  # of the server in README.md's examples
POSIX = os.name == "posix"

# A `docker` for LocalDockerProvider: its containers are processes, and what it would know
# of them is in files in $DOCKER_STATE. `images` has a command for each image.
DOCKER = r"""#!{python}
import json, os, signal, subprocess, sys, time
from pathlib import Path

os.chdir(os.environ["DOCKER_STATE"])
kind, *arguments = sys.argv[1:]
with open("calls", "a") as calls:
    print(json.dumps(sys.argv[1:]), file=calls)
name = next(a for a in arguments if a.startswith("openenv-"))
pid, alive, log = (Path(f"{{name}}{{end}}") for end in ("", ".alive", ".log"))
if kind == "run":
    command = {images}.get(arguments[-1]) or sys.exit("Unable to find image")
    script = f'trap : TERM; "$@"; rm {{alive}}'
    alive.touch()
    child = subprocess.Popen(["sh", "-c", script, "", *command], stdin=-3, stdout=log.open("w"), stderr=-2, start_new_session=True)
    pid.write_text(str(child.pid))
elif not pid.exists():
    sys.exit(f"Error: No such container: {{name}}")
elif kind == "port":
    while alive.exists() and "on http://" not in log.read_text():
        time.sleep(0.02)
    print("127.0.0.1:" + log.read_text().split("on http://")[1].split(":")[1])
elif kind == "inspect":
    print(str(alive.exists()).lower())
elif kind == "logs":
    print(log.read_text(), end="")
elif kind == "stop" and alive.exists():
    os.killpg(int(pid.read_text()), signal.SIGTERM)
    while alive.exists():
        time.sleep(0.02)
elif kind == "rm":
    pid.unlink()
"""


class Block(NamedTuple):
    """A fenced block of README.md, and the ``text`` block right behind it, if there is one."""

    language: str
    text: str
    output: str


README = (HERE / "README.md").read_text("utf-8")
BLOCKS = [
    Block(language, text, output)
    for language, text, output in re.findall(
        r"(?ms)^```(\w+)\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", README
    )
]


def select(language: str, pattern: str = "") -> list[Block]:
    found = (block for block in BLOCKS if block.language == language)
    return [block for block in found if re.search(pattern, block.text)]


def one(language: str, pattern: str = "") -> Block:
    (found,) = select(language, pattern)
    return found


def copy_files(target: Path, *names: str) -> None:
    target.mkdir(exist_ok=True)
    for name in names or ("benchmark.py", "client.py", "server.py"):
        shutil.copy(HERE / name, target)


def normalize(text: str) -> str:
    """Make equal what differs from run to run: dates, ports, UUIDs, keys, versions."""
    for pattern, name in (
        (r"^((?:<- )?Date:) .*", r"\1 now"),
        (r"(localhost|127\.0\.0\.1):\d+", "localhost:8000"),
        (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "uuid"),
        (r"(Sec-WebSocket-(?:Key|Accept):) \S+", r"\1 key"),
        (r"openenv-benchmark/[0-9.]+", "openenv-benchmark"),
        (r"[ \r]+$", ""),
    ):
        text = re.sub(pattern, name, text, flags=re.MULTILINE)
    return text.strip()


def output_of(arguments: Sequence[str | Path], cwd: Path = HERE, **env: str) -> str:
    """Run a command; return what it prints, on standard error too, in order."""
    done = subprocess.run(
        [str(a) for a in arguments],
        cwd=cwd,
        env=environment(**env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    if done.returncode:
        raise AssertionError(f"{arguments} ended with {done.returncode}: {done.stdout}")
    return done.stdout


@contextlib.contextmanager
def serving(*arguments: str, cwd: Path = HERE) -> Iterator[tuple[str, Any, Path]]:
    """Run a server command, after ``python3``, on a free port; yield its URL, its process
    and the file of what it prints.
    """
    with tempfile.TemporaryDirectory() as directory:
        shown, command = (
            Path(directory, "shown"),
            [sys.executable, *arguments, "--port=0"],
        )
        with shown.open("w") as out:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=environment(),
                stdout=out,
                stderr=out,
            )
        try:
            wait_until(
                lambda: process.poll() is not None or "/docs" in shown.read_text()
            )
            url = re.search(r"http://[^:/]+:\d+", shown.read_text())
            if url is None:
                raise AssertionError(shown.read_text())
            yield url[0], process, shown
        finally:
            process.terminate()
            process.wait(10)


class ReadmeExamplesTest(unittest.TestCase):
    """Every Python block, every command, and every output."""

    maxDiff = None
    # Commands of other programs; and this one.
    OTHERS = ("docker", "openenv", "python -m uvicorn", "python3 -m unittest")

    def run_python(self, block: Block, url: str = "", **env: str) -> None:
        code = block.text.replace(README_URL, url)
        output = output_of([sys.executable, "-c", code], HERE, **env)
        self.assertEqual(normalize(output), normalize(block.output), block.text)

    def test_python_blocks(self) -> None:
        """Those of the own environment are files, and have a test of their own."""
        first, program = select("python", r"\A(?!# my_)(?![^$]*from_docker_image)")
        over_websocket = re.sub(r"\bBenchmarkEnv\b", "BenchmarkEnvWS", first.text)
        with serve() as running:
            self.run_python(first, running.url)
            self.run_python(first._replace(text=over_websocket), running.url)
        self.run_python(program)

    @unittest.skipUnless(POSIX, "the stand-in for docker is a script with #!")
    def test_docker_block(self) -> None:
        cmd = re.findall(r"(?m)^CMD (.*)$", (HERE / "Dockerfile").read_text())[0]
        own = [sys.executable, str(HERE / "server.py"), *json.loads(cmd)[2:-1], "0"]
        words = "print('last words on http://x:1', flush=True); import time; time.sleep"
        dies, sick = ([sys.executable, "-c", f"{words}({s})"] for s in (0, 60))
        images = {"benchmark-env:latest": own, "dies": dies, "sick": sick}
        with tempfile.TemporaryDirectory() as directory:
            docker = Path(directory, "docker")
            docker.write_text(DOCKER.format(python=sys.executable, images=images))
            docker.chmod(0o755)
            path = os.pathsep.join([directory, os.environ.get("PATH", "")])
            env = {"PATH": path, "DOCKER_STATE": directory}
            self.run_python(one("python", "from_docker_image"), **env)
            lines = Path(directory, "calls").read_text().splitlines()
            calls = [json.loads(line) for line in lines]
            self.assertEqual(calls[0][:2], ["run", "--detach"])
            self.assertIn("127.0.0.1::8000", calls[0])
            self.assertEqual([call[0] for call in calls[-2:]], ["stop", "rm"])
            with mock.patch.dict(os.environ, env):
                self.check_docker_failures()
            left = {p.name for p in Path(directory).iterdir() if p.suffix != ".log"}
            self.assertEqual(left, {"docker", "calls"})  # and no container
            nowhere = mock.patch.dict(os.environ, PATH=directory + "/none")
            with nowhere, self.assertRaisesRegex(RuntimeError, "no docker"):
                BenchmarkEnv.from_docker_image("benchmark-env:latest")

    def check_docker_failures(self) -> None:
        with self.assertRaisesRegex(RuntimeError, "Unable to find image"):
            BenchmarkEnv.from_docker_image("no-such-image")
        with self.assertRaisesRegex(RuntimeError, "ended\nlast words"):
            BenchmarkEnvWS.from_docker_image("dies")
        provider = client.LocalDockerProvider()
        url = provider.start_container("sick", env_vars={"A": "b"}, memory="2g")
        with self.assertRaisesRegex(TimeoutError, "not healthy.*\nlast words"):
            provider.wait_for_ready(url, timeout_s=0.1)

    @unittest.skipUnless(POSIX, "needs a POSIX shell")
    def test_commands(self) -> None:
        """In blocks and in sentences, in a directory with what they need: servers serve,
        the others end well, with the output that is shown.
        """
        shown = [part for b in select("console") for part in b.text.split("$ ")[1:]]
        shown += [line for b in select("sh") for line in b.text.splitlines()]
        shown += re.findall(r"`(python3? [^`]*)`", README)
        with tempfile.TemporaryDirectory() as directory, serve() as running:
            here = Path(directory)
            copy_files(here, *(p.name for p in HERE.glob("*.*") if p.is_file()))
            copy_files(here / "vendored")
            (here / "games").mkdir()
            for path in (here / "my_env.py", here / "games" / "guess.py"):
                path.write_text(one("python", "# my_env.py").text)
            for part in dict.fromkeys(shown):
                line, _, expected = part.partition("\n")
                command = re.sub(" +#.*", "", line)
                with self.subTest(command=command):
                    if not command.startswith(self.OTHERS):
                        self.check(command, expected, here, running.url)

    def check(self, command: str, expected: str, here: Path, url: str) -> None:
        if re.search(r"^python3.*\bserver\b", command):
            with serving(*shlex.split(command)[1:], cwd=here) as (own, _, _):
                self.assertEqual(exchange(own, "GET", "/health")[0], 200)
            return
        if command.startswith("curl ") and not shutil.which("curl"):
            self.skipTest("there is no curl")
        for pattern, ours in (
            ("^python3 ", f"{shlex.quote(sys.executable)} "),
            ("^curl ", "curl -sS --noproxy '*' "),
            ("http://(localhost|127.0.0.1):8000", url),
            ("--bench 2", "--bench 0.1"),
        ):
            command = re.sub(pattern, ours, command)
        output = output_of(["sh", "-c", command], here)
        if expected:
            self.assertEqual(normalize(output), normalize(expected))

    def test_languages(self) -> None:
        """Whatever is fenced is one of the languages that a test knows."""
        known = {"sh", "console", "python", "text", "nginx"}
        self.assertEqual({block.language for block in BLOCKS} - known, set())

    def test_links(self) -> None:
        titles = re.findall(r"^##+ (.*)$", README, re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
        for target in re.findall(r"\]\(#([^)]*)\)", README):
            self.assertIn(target, anchors)


class ReadmeWebSocketTest(unittest.TestCase):
    """The WebSocket transcript and the bytes in the protocol chapter."""

    KEY = bytes.fromhex("37fa213d")
    maxDiff = None

    def setUp(self) -> None:
        self.lines = one("text", "-> GET /ws").text.splitlines()
        dumps = [b.text for b in select("text", r"\A[0-9a-f]{2} ")]
        self.shown = dict(zip(["-> state", "<- state"], map(self.bytes_of, dumps)))
        frames = re.findall(r"`(88(?: [0-9a-f]{2})+)`", README)
        closing = zip(["<- close 1000", "-> close 1000"], map(bytes.fromhex, frames))
        self.shown.update(closing)

    def bytes_of(self, text: str) -> bytes:
        """Return the bytes of a hex listing: those before the first run of spaces."""
        columns = [re.split(r"\s{2,}", line) for line in text.splitlines()]
        return bytes.fromhex("".join(column[0] for column in columns))

    def client_frame(self, text: str) -> bytes:
        """What client.py makes of a line of the transcript with the README's key."""
        protocol = client.Protocol(True, 1 << 20)
        with mock.patch("os.urandom", lambda size: self.KEY[:size]):
            if text == "close 1000":
                protocol.close(1000)
            else:
                protocol.send(text)
        return bytes(protocol.outbox)

    def test_meaning_beside_the_bytes(self) -> None:
        """That the bytes are right is seen where the transcript is played."""
        request, answer = self.shown["-> state"], self.shown["<- state"]
        text = client.apply_mask(request[6:], request[2:6])
        self.assertEqual(text, b'{"type":"state"}')
        block = one("text", "22 3a 31 7d 7d")
        words = [re.split(r"\s{2,}", line)[1] for line in block.text.splitlines()[2:]]
        self.assertEqual("".join(words).encode(), answer[2:])

    def test_transcript(self) -> None:
        """Play it over a plain socket, with the bytes of the chapter where it gives them."""
        begin, end = self.lines.index("->"), self.lines.index("<-")
        with serve() as running, RawPeer(running) as peer:
            head = "\n".join(line[3:] for line in self.lines[:begin])
            peer.request(head.replace("Host: localhost:8000", "HOST"))
            shown = "\n".join(line[3:] for line in self.lines[begin + 1 : end])
            self.assertEqual(normalize(peer.read_head()), normalize(shown))
            for line in self.lines[end + 1 :]:
                self.play(line[:2], line[3:], peer)
            self.assertTrue(peer.at_end())  # the server closes

    def play(self, arrow: str, text: str, peer: RawPeer) -> None:
        kind = "state" if '"type":"state"' in text else text
        if arrow == "->":
            data = self.client_frame(text)
            peer.send(data)
        else:
            opcode, payload = 1, text.encode()
            if text == "close 1000":
                opcode, payload = 8, b"\x03\xe8"
            data = frame(opcode, payload, masked=False)
            self.assertEqual(peer.read(len(data)), data)
        self.assertEqual(data, self.shown.get(f"{arrow} {kind}", data))

    def test_trace(self) -> None:
        """`client.py --trace` shows the transcript's handshake, and each frame after it."""
        (command,) = re.findall(r"`python3 (client\.py --trace .*?)`", README)
        shown = normalize(output_of([sys.executable, *shlex.split(command)]))
        head = [line for line in self.lines[: self.lines.index("<-")] if line[2:]]
        self.assertTrue(shown.startswith(normalize("\n".join(head))))
        self.assertEqual(shown.count(" FIN=1 opcode=0x1 (text) MASK="), 4)
        for answer in [line[3:] for line in self.lines if '"type":"obs' in line]:
            line = f"<- FIN=1 opcode=0x1 (text) MASK=0 length={len(answer)}  {answer}"
            self.assertIn(f"\n{line}\n", shown)
        self.assertTrue(
            shown.endswith("<- FIN=1 opcode=0x8 (close) MASK=0 length=2  1000")
        )

    def test_close_codes(self) -> None:
        """Provoke each code of the table."""
        cases: list[tuple[int, bytes, dict[str, Any]]] = [
            (1000, self.client_frame('{"type":"close"}'), {}),
            (1001, b"", {"session_timeout": 0.1}),
            (1002, b"\x81\x00", {}),  # not masked
            (1007, frame(1, b"\xff"), {}),
            (1009, frame(1, b" " * 70000), {"max_message_mb": 0.01}),
            (1011, b"", {"env": broken_factory}),
            (1013, b"", {"max_concurrent_envs": 1}),
        ]
        table = re.findall(r"^\| (1\d{3}) \|", README, re.MULTILINE)
        self.assertEqual(table, [str(code) for code, _, _ in cases])
        logging.disable(logging.CRITICAL)
        self.addCleanup(logging.disable, logging.NOTSET)
        for code, data, options in cases:
            with self.subTest(code=code), serve(**options) as running:
                first = peer = RawPeer(running).upgrade()
                if code == 1013:
                    first.send(text_frame({"type": "state"}))
                    first.message()  # it has the place, which the handshake does not say
                    peer = RawPeer(running).upgrade()
                peer.send(data)
                self.assertEqual(peer.close_code(), code)
                first.sock.close()
                peer.sock.close()


def broken_factory() -> Any:
    raise RuntimeError("out of order")


class OwnEnvironmentTest(unittest.TestCase):
    """Do what the chapter "Make your own environment" says."""

    def test_as_the_chapter_says(self) -> None:
        game, own_client, _ = select("python", "^# my_")
        command = one("sh", "--env").text.splitlines()[0].split()
        with tempfile.TemporaryDirectory() as directory:
            here = Path(directory)
            copy_files(here)
            (here / "my_env.py").write_text(game.text, "utf-8")
            with serving(*command[1:], cwd=here) as (url, _, _):
                for base in ("WebSocketEnvClient", "HTTPEnvClient"):
                    text = own_client.text.replace(README_URL, url)
                    text = text.replace("WebSocketEnvClient", base)
                    (here / "my_client.py").write_text(text, "utf-8")
                    output = output_of([sys.executable, "my_client.py"], here)
                    self.assertEqual(output, own_client.output)
                self.check_http(url)

    def check_http(self, url: str) -> None:
        """Play a game to its end in plain JSON, and past it."""
        for path, body, text, reward in (
            ("/reset", {"seed": 7, "highest": 1}, "from 1 to 1", 0.0),
            ("/step", {"action": {"number": 0}}, "higher", -0.1),
            ("/step", {"action": {"number": 1}}, "correct", 1.0),
            ("/step", {"action": {"number": 2}}, "lower", -0.1),
        ):
            answer: Any = {"observation": {"text": text}, "reward": reward}
            answer["done"] = reward > 0
            self.assertEqual(exchange(url, "POST", path, body), (200, answer))
        state = exchange(url, "GET", "/schema")[1]["state"]["properties"]
        self.assertEqual(list(state), ["episode_id", "step_count"])
        status, failure = exchange(url, "POST", "/reset", {"highest": 0})
        self.assertEqual((status, failure["code"]), (500, "EXECUTION_ERROR"))
        self.assertEqual(exchange(url, "GET", "/state")[1]["step_count"], 3)

    def test_types_of_fields(self) -> None:
        text = one("python", "# my_types.py").text
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "my_types.py").write_text(text)
            with mock.patch.object(sys, "path", [directory, *sys.path]):
                move = __import__("my_types").Move
        app = server.create_app(BenchmarkEnvironment, move, BenchmarkObservation)
        schema = app.schemas["action"]
        self.assertEqual(schema["required"], ["number"])
        choices = [{"enum": ["slow", "fast"]}, {"type": "null"}]
        inner = {"type": "object", "additionalProperties": {"type": "integer"}}
        for name, expected in {
            "number": {"type": "integer", "description": "From 1 up", "minimum": 1},
            "confidence": {
                "type": "number",
                "minimum": 0,
                "maximum": 1,
                "default": 0.5,
            },
            "pace": {"anyOf": choices, "default": None},
            "limits": {"type": "object", "additionalProperties": inner, "default": {}},
        }.items():
            self.assertEqual(schema["properties"][name], expected)
        body = {"action": {"number": 0, "confidence": "x", "notes": list(range(10))}}
        with app.start() as running:
            status, answer = exchange(running.url, "POST", "/step", body)
        kinds = [fault["type"] for fault in answer["detail"]]
        self.assertEqual(kinds, ["greater_than_equal", "float_type", "too_long"])
        self.assertEqual(status, 422)


MYPY = os.environ.get("MYPY") or shutil.which("mypy")  # the path of a mypy


class CopiesTest(unittest.TestCase):
    """The files in the table of what to copy, at the top level and inside a package."""

    def copies(self, *names: str) -> Iterator[tuple[Path, str]]:
        """Yield, for both, a directory and what to put before a module's name."""
        for package in ("", "vendored"):
            directory = tempfile.TemporaryDirectory()
            with directory, self.subTest(names=names, package=package):
                here = Path(directory.name)
                copy_files(here / package, *names)
                if package:
                    (here / package / "__init__.py").touch()
                yield here, f"{package}." if package else ""

    def test_subsets(self) -> None:
        table = README.partition("| to | copy |")[2].partition("\nThe other")[0]
        rows = [re.findall(r"`(\w+\.py)`", line) for line in table.splitlines()[2:]]
        self.assertEqual([len(row) for row in rows], [1, 2, 3])
        with serve() as running:
            for row in rows:
                for here, prefix in self.copies(*row):
                    code = self.CLIENTS if "client.py" in row else ""
                    code = f"{self.ENVIRONMENT}{code}".replace("DOT.", prefix)
                    code = code.replace("URL", repr(running.url))
                    output_of([sys.executable, "-c", code], here)
                    if "server.py" in row:
                        self.check_commands(here, prefix)

    ENVIRONMENT = """
import sys
from DOT.benchmark import BenchmarkAction, BenchmarkEnvironment
assert 'DOT.client' not in sys.modules
assert BenchmarkEnvironment().step(BenchmarkAction('Hi')).reward == 0.2
"""
    CLIENTS = """
from DOT.client import BenchmarkEnv, BenchmarkEnvWS
from DOT.benchmark import BenchmarkEnvWS as lazy
assert lazy is BenchmarkEnvWS
for cls in BenchmarkEnv, BenchmarkEnvWS:
    with cls(URL) as env:
        env.reset()
        assert env.step(BenchmarkAction('Hi')).reward == 0.2
"""

    def check_commands(self, here: Path, prefix: str) -> None:
        shown = output_of([sys.executable, "-m", f"{prefix}client", "Hi"], here)
        self.assertIn("length 2 reward 0.2", shown)
        with serving("-m", f"{prefix}server", cwd=here) as (url, _, _):
            self.assertEqual(exchange(url, "GET", "/health")[1], {"status": "healthy"})

    @unittest.skipUnless(MYPY, "set MYPY to the path of a mypy")
    def test_types(self) -> None:
        """What a type checker sees of them."""
        for here, prefix in self.copies():
            code = self.TYPES.replace("DOT.", prefix)
            (here / "training.py").write_text(code)
            shown = output_of([str(MYPY), "--strict", "--cache-dir=cache", "."], here)
            found = re.findall(r'Revealed type is "(.*?)"', shown)
            self.assertIn("Success: no issues found", shown)
            self.assertEqual(found, [f"{prefix}benchmark.BenchmarkObservation"] * 6)

    TYPES = """
import DOT.client
from DOT.benchmark import BenchmarkAction, BenchmarkEnvironment
from DOT.benchmark import BenchmarkEnv, BenchmarkEnvWS, StepResult

action = BenchmarkAction("Hi")
reveal_type(BenchmarkEnvironment().step(action))
with BenchmarkEnv("localhost:8000") as over_http:
    reveal_type(over_http.step(action).observation)
with BenchmarkEnvWS("localhost:8000") as env:
    reveal_type(env.step(action).observation)
reveal_type(StepResult(env.reset().observation).observation)
with DOT.client.BenchmarkEnv("localhost:8000") as over_http:
    reveal_type(over_http.step(action).observation)
with DOT.client.BenchmarkEnvWS("localhost:8000") as env:
    reveal_type(env.step(action).observation)
"""


class ProjectFilesTest(unittest.TestCase):
    """Facts that several files state, and that must agree."""

    def test_versions(self) -> None:
        for name in ("benchmark.py", "client.py", "server.py"):
            head = (HERE / name).read_text("utf-8").partition("from __future__")[0]
            self.assertIn(f"version {benchmark.__version__}", head.replace("\n", " "))
        for program in ("client.py", "server.py"):
            shown = output_of([sys.executable, HERE / program, "--version"])
            self.assertEqual(shown.split()[-1], benchmark.__version__)

    def test_licence(self) -> None:
        for path in (*HERE.glob("*.py"), HERE / "Dockerfile"):
            first = path.read_text("utf-8").partition("\n")[0]
            self.assertEqual(first, "# SPDX-License-Identifier: BSD-3-Clause", path)
        text = README.partition("\n## Licence\n")[2]
        self.assertTrue(text.strip().startswith("BSD-3-Clause. Copyright 2026"))
        self.assertEqual(len(re.findall(r"(?m)^\d\. ", text)), 3)
        self.assertTrue(text.endswith("POSSIBILITY OF SUCH DAMAGE.\n"))

    def test_port(self) -> None:
        text = (HERE / "openenv.yaml").read_text()
        manifest = dict(re.findall(r"(?m)^(\w+): (.+)$", text))
        self.assertEqual(manifest["spec_version"], "1")
        self.assertEqual((manifest["name"], manifest["type"]), ("benchmark", "space"))
        self.assertEqual(manifest["port"], "8000")
        module, _, name = manifest["app"].partition(":")
        self.assertTrue(callable(getattr(sys.modules[module], name)))
        head = f"\n{README.split('---')[1]}\n"
        facts = "app_port: 8000|base_path: /web|tags:\n  - openenv|pinned: false|"
        facts += "title: Benchmark Environment Server|sdk: docker|emoji: 📏|"
        for fact in f"{facts}colorFrom: red|colorTo: red".split("|"):
            self.assertIn(f"\n{fact}\n", head)

    def dockerfile(self) -> dict[str, str]:
        lines = (HERE / "Dockerfile").read_text().splitlines()
        return dict(line.split(" ", 1) for line in lines if line and line[0] != "#")

    def test_dockerfile(self) -> None:
        steps = self.dockerfile()
        self.assertRegex(steps["FROM"], r"^python:3\.\d+-slim$")
        self.assertIn(f"`{steps['FROM']}`", README)
        self.assertEqual((steps["USER"], steps["EXPOSE"]), ("1000", "8000"))
        options = ["--host", "0.0.0.0", "--port", "8000"]
        self.assertEqual(json.loads(steps["CMD"]), ["python", "server.py", *options])
        self.assertNotIn("RUN", steps)
        for name in steps["COPY"].split()[:-1]:
            self.assertTrue((HERE / name).is_file())

    @unittest.skipUnless((HERE / ".dockerignore").exists(), "there is no .dockerignore")
    def test_dockerignore(self) -> None:
        ignored = (HERE / ".dockerignore").read_text().splitlines()
        copied = self.dockerfile()["COPY"].split()[:-1]
        self.assertEqual([line[1:] for line in ignored if line[0] == "!"], copied)

    def test_healthcheck(self) -> None:
        """Its command exits 0 for a healthy server, and with an error where there is none."""
        text = (HERE / "Dockerfile").read_text()
        command = json.loads(re.findall(r"(?m)^HEALTHCHECK .*? CMD (.*)$", text)[0])
        with serve() as running:
            port = running.url.rpartition(":")[2]
            arguments = [command[1], command[2].replace("8000", port)]
            output_of([sys.executable, *arguments])
        with self.assertRaises(AssertionError):
            output_of([sys.executable, *arguments])

    def test_options(self) -> None:
        """README.md lists the options that server.py has."""
        table = README.partition("\n## Run it")[2].partition("\n## ")[0]
        rows = re.findall(r"^\| (`--.*?`) \|", table, re.MULTILINE)
        listed = {name for row in rows for name in re.findall(r"--[a-z-]+", row)}
        shown = output_of([sys.executable, HERE / "server.py", "--help"])
        options = set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", shown, re.MULTILINE))
        self.assertEqual(listed, options)

    def test_kubernetes(self) -> None:
        """As far as that can be seen without a cluster: port, probes, grace."""
        text = README.partition("**Kubernetes.**")[2].partition("\n")[0]
        self.assertEqual(set(re.findall(r"[pP]ort:? (\d+)", text)), {"8000"})
        self.assertIn("`/health` on port 8000", text)
        self.assertIn("`sessionAffinity: ClientIP`", text)
        grace = re.findall(r"terminationGracePeriodSeconds: (\d+)", text)[0]
        self.assertGreater(int(grace), server.GRACE_SECONDS + 0.5)


NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@unittest.skipUnless(NGINX, "there is no nginx")
class NginxTest(unittest.TestCase):
    """README.md's nginx configuration in front of two server processes."""

    HOST = "env.example.com"
    backends: list[tuple[str, Any, Path]]
    url: str

    @classmethod
    def setUpClass(cls) -> None:
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        (command,) = re.findall(r"`python3 (server\.py .*--allow-origin .*?)`", README)
        backends = (serving(*command.split()) for _ in range(2))
        cls.backends = [stack.enter_context(backend) for backend in backends]
        port = free_port()
        cls.url = f"http://127.0.0.1:{port}"
        config = one("nginx").text
        config = config.replace("listen 80;", f"listen 127.0.0.1:{port};")
        for shown, (url, _, _) in zip((8001, 8002), cls.backends):
            config = config.replace(f":{shown};", f":{url.rpartition(':')[2]};")
        here = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        here.chmod(0o755)
        temporary = "".join(
            f"{name}_temp_path {here}/{name};\n"
            for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (here / "nginx.conf").write_text(f"""
            daemon off; pid {here}/pid; error_log stderr error;
            events {{ worker_connections 4096; }}
            http {{ access_log off; {temporary} {config} }}
        """)
        process = subprocess.Popen(
            [str(NGINX), "-p", str(here), "-c", str(here / "nginx.conf")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        stack.callback(process.communicate, timeout=10)
        stack.callback(process.terminate)
        wait_until(lambda: process.poll() is not None or cls.answers(), "nginx")
        if process.poll() is not None:
            raise AssertionError(process.communicate()[1])

    @classmethod
    def answers(cls) -> bool:
        try:
            return exchange(cls.url, "GET", "/health")[0] == 200
        except OSError:
            return False

    def test_sessions(self) -> None:
        """200 sessions keep their step counts; a server that stops loses its own only."""
        envs: list[Any] = [BenchmarkEnv(self.url) for _ in range(100)]
        envs += [BenchmarkEnvWS(self.url) for _ in range(100)]

        def step(number: int) -> Any:
            try:
                result = envs[number].step(BenchmarkAction(f"{number}"))
            except (client.ServerError, ConnectionError) as error:
                return str(error)
            self.assertEqual(result.observation.echoed_message, f"{number}")
            return result.metadata["step"]

        def steps() -> dict[Any, int]:
            return dict(Counter(pool.map(step, range(200))))

        with ThreadPoolExecutor(20) as pool:
            _, process, log = self.backends[0]
            before = len(log.read_text("utf-8"))
            list(pool.map(lambda env: env.reset(), envs))
            for number in (1, 2, 3):
                self.assertEqual(steps(), {number: 200})
            process.terminate()
            process.wait(10)
            opened = log.read_text("utf-8")[before:]
            lost_ws = len(re.findall(r"session ws-\d+ opened", opened))
            lost_http = len(re.findall(r"session '[0-9a-f-]{36}' opened", opened))
            self.assertTrue(lost_ws and lost_http)
            unknown = "No session has this X-Session-Id: reset first, to open it"
            unknown = f"Server error: {unknown} (code: SESSION_ERROR)"
            closed = "WebSocket connection closed: 1001 the server is shutting down"
            left = {4: 200 - lost_ws - lost_http, unknown: lost_http, closed: lost_ws}
            self.assertEqual(steps(), left)
            for env in envs[100:]:
                env.connect()  # a new session, if the old one was lost
            list(pool.map(lambda env: env.reset(), envs))
            self.assertEqual(steps(), {1: 200})
            list(pool.map(lambda env: env.close(), envs))

    def test_no_session(self) -> None:
        """Requests that name no session go to the servers in turn."""
        for url, _, _ in self.backends:
            status, _ = exchange(url, "POST", "/reset", {"episode_id": url})
            self.assertEqual(status, 200)
        seen = {exchange(self.url, "GET", "/state")[1]["episode_id"] for _ in range(4)}
        self.assertEqual(seen, {url for url, _, _ in self.backends})

    def test_pages(self) -> None:
        """A page of the site may call, over both transports; one of another site may not."""
        headers = {"Host": self.HOST, "Origin": f"http://{self.HOST}"}
        self.assertEqual(exchange(self.url, "GET", "/web", None, headers)[0], 200)
        self.assertEqual(exchange(self.url, "POST", "/reset", {}, headers)[0], 200)
        ws = client.WebSocket.connect(f"{self.url}/ws", headers, timeout=10)
        ws.send('{"type":"state"}')
        self.assertIn('"step_count":0', str(ws.recv()))
        ws.close()
        for name in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
            other = {**headers, **name}
            self.assertEqual(exchange(self.url, "POST", "/reset", {}, other)[0], 403)
            with self.assertRaisesRegex(ConnectionError, "403"):
                client.WebSocket.connect(f"{self.url}/ws", other)


# ---------------------------------------------------------------------------
# The other implementation
# ---------------------------------------------------------------------------

OPENENV = os.environ.get("OPENENV_PYTHON", "")  # a Python that has openenv 0.10.0

# Runs one script after another, in one namespace: openenv takes five seconds to import.
OPENENV_LOOP = """
import json, sys, traceback
answers, sys.stdout, names = sys.stdout, sys.stderr, {}
for line in sys.stdin:
    try:
        error = exec(json.loads(line), names)
    except BaseException:
        error = traceback.format_exc()
    print(json.dumps(error), file=answers, flush=True)
"""
OPENENV_NAMES = """
import asyncio, math, re, time
from concurrent.futures import ThreadPoolExecutor
from openenv import AutoEnv, GenericEnvClient
from openenv.cli.__main__ import app
from typer.testing import CliRunner

def error_code(call, *arguments):
    try:
        call(*arguments)
    except RuntimeError as error:
        return re.search(r"^Server error: .*\\(code: (\\w+)\\)$", str(error), re.DOTALL)[1]

def refusal(url):
    with GenericEnvClient(base_url=url).sync() as env:
        return error_code(env.reset)

def openenv(*arguments):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done.output

def long_step(url):
    with GenericEnvClient(base_url=url).sync() as env:
        env.reset()
        began = time.monotonic()
        assert env.step({"message": "45"}).reward == 0.2
        assert time.monotonic() - began >= 45
        assert env.state()["step_count"] == 1
"""


class Sleepy(BenchmarkEnvironment):
    """Its steps take as many seconds as their message says, and fail if it says none."""

    NEVER_WAITS = False

    def step(
        self, action: BenchmarkAction, timeout_s: float | None = None
    ) -> BenchmarkObservation:
        time.sleep(float(action.message))
        return super().step(action)


@unittest.skipUnless(OPENENV, "set OPENENV_PYTHON to a Python with openenv 0.10.0")
class InteroperationTest(ServerCase):
    """openenv's clients and tools against this server, this project's clients against its.

    A step of 45 seconds begins before the first test, and the last one sees how it went.
    """

    folder: Path  # where openenv's Python runs; `openenv init` makes a package in it
    process: subprocess.Popen[str]
    sleepy: server.Server
    its_url: str
    idle: BenchmarkEnvWS

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = Path(folder.name)
        cls.sleepy = serve(Sleepy)
        cls.addClassCleanup(cls.sleepy.stop)
        cls.process = cls.start("-c", OPENENV_LOOP)
        cls.play(OPENENV_NAMES)
        cls.play(
            "waiting = ThreadPoolExecutor().submit(long_step, url)", cls.sleepy.url
        )
        cls.play("openenv('init', 'benchmark')")

        app = cls.folder / "benchmark" / "server" / "app.py"
        text = app.read_text()
        app.write_text(text.replace("max_concurrent_envs=1", "max_concurrent_envs=2"))
        port = free_port()
        pings = ("--ws-ping-interval", "5", "--ws-ping-timeout", "5")
        cls.start("-m", "uvicorn", "benchmark.server.app:app", f"--port={port}", *pings)
        cls.its_url = f"http://127.0.0.1:{port}"
        wait_until(cls.is_healthy, "the health of openenv's server")
        cls.idle = BenchmarkEnvWS(cls.its_url)
        cls.addClassCleanup(cls.idle.close)
        cls.idle.reset()

    @classmethod
    def is_healthy(cls) -> bool:
        with contextlib.suppress(OSError):
            return exchange(cls.its_url, "GET", "/health")[0] == 200
        return False

    @classmethod
    def start(cls, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [OPENENV, *arguments],
            cwd=cls.folder,
            env=environment(XDG_CACHE_HOME=str(cls.folder), NO_PROXY="*"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        cls.addClassCleanup(process.communicate)
        cls.addClassCleanup(process.kill)
        return process

    @classmethod
    def play(cls, script: str, url: str = "") -> None:
        """Run a script of openenv's Python, which fails if an assertion in it does."""
        assert cls.process.stdin
        assert cls.process.stdout
        url = url or cls.running.url
        code = f"url = {url!r}\n{textwrap.dedent(script)}"
        print(json.dumps(code), file=cls.process.stdin, flush=True)
        error = json.loads(cls.process.stdout.readline() or '"its Python has ended"')
        if error:
            raise AssertionError(error)

    # Its clients and tools, and this server

    def test_addresses_of_its_guides(self) -> None:
        script = """
            for env in (
                GenericEnvClient(base_url=url),
                GenericEnvClient(base_url=url.replace("http:", "ws:") + "/"),
                AutoEnv.from_env("benchmark", base_url=url, skip_install=True),
            ):
                with env.sync() as env:
                    assert env.reset().reward == 0.0
        """
        for host in ("localhost", "0.0.0.0"):
            with self.subTest(host):
                self.play(script, f"http://{host}:{self.running.server_port}")

    def test_auto_env_finds_its_installed_client(self) -> None:
        installed = self.folder / "openenv_benchmark-0.1.0.dist-info"
        installed.mkdir()
        (installed / "METADATA").write_text("Name: openenv-benchmark\nVersion: 0.1.0\n")
        self.play("""
            with AutoEnv.from_env("benchmark", base_url=url).sync() as env:
                assert type(env.reset().observation).__name__ == "BenchmarkObservation"
        """)

    def test_capacity_and_sessions(self) -> None:
        script = """
            with GenericEnvClient(base_url=url).sync() as parent:
                child = parent.new_session()
                parent.reset(episode_id="parent")
                child.reset(episode_id="child")
                child.step({"message": "Hi"})
                assert parent.state() == {"episode_id": "parent", "step_count": 0}
                assert child.state() == {"episode_id": "child", "step_count": 1}
                assert refusal(url) == "CAPACITY_REACHED"
            deadline = time.monotonic() + 20  # the server's end may come a little later
            while refusal(url):
                assert time.monotonic() < deadline
        """
        with serve(max_concurrent_envs=2) as running:
            self.play(script, running.url)

    def test_clients_asynchronous(self) -> None:
        self.play("""
            from benchmark.client import BenchmarkAction, BenchmarkEnv

            async def play():
                async with BenchmarkEnv(base_url=url) as env:
                    first = await env.reset(seed=1, episode_id="e1")
                    assert (first.reward, first.done) == (0.0, False), first
                    for message in ("Hi", "", "x" * 200_000, "𝄞"):
                        result = await env.step(BenchmarkAction(message=message))
                        assert result.observation.echoed_message == message
                        assert result.observation.message_length == len(message)
                        assert result.reward == len(message) / 10
                    assert first.metadata is None, first
                    assert result.metadata == {"step": 4}, result
                    state = await env.state()
                    assert (state.episode_id, state.step_count) == ("e1", 4), state
                async with GenericEnvClient(base_url=url) as env:
                    await env.reset()
                    other = await env.new_session()
                    result = await other.step({"message": "Hi"})
                    assert result.observation["message_length"] == 2, result
                    assert (await env.state())["step_count"] == 0

            asyncio.run(play())
        """)

    def test_clients_synchronous(self) -> None:
        self.play("""
            for start in (lambda env: env.sync(), lambda env: env):  # or a plain `with`
                with start(GenericEnvClient(base_url=url)) as env:
                    env.reset(episode_id="e1")
                    result = env.step({"message": "Hi", "metadata": {"turn": 1}})
                    assert result.observation["echoed_message"] == "Hi", result
                    assert (result.reward, result.done) == (0.2, False), result
                    assert result.metadata == {"step": 1}, result
                    assert env.state() == {"episode_id": "e1", "step_count": 1}
        """)

    def test_close_during_a_step_is_answered_at_once(self) -> None:
        """Its client waits for that answer before it connects again after a timeout."""
        script = """
            with GenericEnvClient(base_url=url, message_timeout_s=1).sync() as env:
                env.reset()
                try:
                    env.step({"message": "9"})
                except asyncio.TimeoutError:
                    began = time.monotonic()
                env._async._message_timeout = 60
                env.reset(episode_id="next")
                assert time.monotonic() - began < 5, time.monotonic() - began
                assert env.state() == {"episode_id": "next", "step_count": 0}
        """
        self.play(script, self.sleepy.url)

    def test_error_codes(self) -> None:
        def factory() -> Any:
            raise OSError("no display")

        script = """
            with GenericEnvClient(base_url=url).sync() as env:
                for code, call, argument in (
                    ("INVALID_JSON", env.step, {"message": math.nan}),
                    ("UNKNOWN_TYPE", env._send_and_receive, {"type": "jump"}),
                    ("VALIDATION_ERROR", env.step, {"mesage": "0"}),
                    ("EXECUTION_ERROR", env.step, {"message": "no number"}),
                ):
                    assert error_code(call, argument) == code, code
                assert env.step({"message": "0"}).reward == 0.1  # the session goes on
        """
        self.play(script, self.sleepy.url)
        with serve(factory) as broken:
            self.play('assert refusal(url) == "FACTORY_ERROR"', broken.url)

    def test_validate(self) -> None:
        files = self.folder / "files"
        files.mkdir()
        for pattern in ("*.py", "Dockerfile", "openenv.yaml", "README.md"):
            for path in HERE.glob(pattern):
                shutil.copy(path, files)
        self.play("""
            report = openenv("validate", "files", "--level", "static", "--skip-build")
            assert "Verdict: PASS" in report, report
            report = openenv("validate", "--url", url)
            assert "mode: simulation" in report and "FAIL" not in report, report
        """)

    def test_waits_of_45_seconds(self) -> None:
        """A step under its client's pings; and, idle, this client under its server's."""
        self.play("waiting.result()")
        self.assertEqual(self.idle.step(BenchmarkAction("Hi")).reward, 0.2)
        self.assertEqual(self.idle.state().step_count, 1)

    # Its server, and these clients

    def test_these_clients_over_http(self) -> None:
        with BenchmarkEnv(self.its_url) as env:  # an environment for each request
            first, result = env.reset(), env.step(BenchmarkAction("x" * 99))
            self.assertEqual((first.reward, result.reward), (0.0, 1.0))
            self.assertEqual(env.state().step_count, 0)
            with self.assertRaisesRegex(RuntimeError, "VALIDATION_ERROR"):
                env.step({"mesage": "x"})  # type: ignore[arg-type]
        self.check_metadata(first, result, step=1)

    def test_these_clients_over_websocket(self) -> None:
        with BenchmarkEnvWS(self.its_url) as env:
            first = env.reset(episode_id="e1")
            for message in ("Hi", "", "𝄞" * 70_000):
                result = env.step(BenchmarkAction(message))
                self.assertEqual(result.observation.echoed_message, message)
                self.assertEqual(result.observation.message_length, len(message))
                self.assertEqual(result.reward, min(len(message) * 0.1, 1.0))
            self.assertEqual(env.state(), BenchmarkState("e1", 3))
            with self.assertRaisesRegex(RuntimeError, "VALIDATION_ERROR"):
                env.step({"mesage": "x"})  # type: ignore[arg-type]
            with (  # `idle` has the other of its two places
                self.assertRaisesRegex(RuntimeError, "CAPACITY_REACHED"),
                BenchmarkEnvWS(self.its_url) as third,
            ):
                third.reset()
        self.check_metadata(first, result, step=3)

    def check_metadata(self, first: Any, result: Any, step: int) -> None:
        self.assertEqual(result.observation.metadata["step"], step)
        self.assertEqual(result.metadata, result.observation.metadata)
        self.assertIsNone(first.metadata)  # over HTTP its server says null


# ---------------------------------------------------------------------------
# The load benchmark: python3 test_benchmark.py --bench SECONDS
# ---------------------------------------------------------------------------


class Lane:
    """One session of the benchmark: it sends the same request again and again.

    Requests are made once, and of an answer only the beginning is looked at, so that the
    server is what is measured.
    """

    scratch = bytearray(1 << 20)  # what was received, overwritten each time

    def __init__(
        self, sock: socket.socket, requests: Iterable[bytes], http: bool
    ) -> None:
        self.sock, self.http = sock, http
        self.reset, self.step = requests
        self.head, self.got = b"", 0  # of the answer that is due
        self.sent_at = 0.0
        sock.settimeout(60)

    @classmethod
    def over_websocket(cls, url: str, message: str) -> Self:
        requests = (
            {"type": "reset", "data": {}},
            {"type": "step", "data": {"message": message}},
        )
        ws = client.WebSocket.connect(f"{url}/ws")
        return cls(ws.sock, map(text_frame, requests), http=False)

    @classmethod
    def over_http(cls, url: str, message: str) -> Self:
        _, host, port, path = client.split_url(url)
        sock = socket.create_connection((host, port), 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = f"Host: {host}:{port}\r\nX-Session-Id: {os.urandom(8).hex()}\r\n"
        requests = [
            f"POST {path}{name} HTTP/1.1\r\n{head}Content-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            for name, body in (
                ("/reset", "{}"),
                ("/step", json.dumps({"action": {"message": message}})),
            )
        ]
        return cls(sock, requests, http=True)

    def send(self, request: bytes) -> None:
        self.sent_at = time.perf_counter()
        self.sock.sendall(request)

    def receive(self) -> bytes | None:
        """Receive what there is; return the answer's beginning once all of it has come."""
        size = self.sock.recv_into(self.scratch)
        if not size:
            raise ConnectionError("the server closed the connection")
        self.got += size
        if len(self.head) < 4096:
            self.head += self.scratch[: min(size, 4096)]
        due = self.http_size() if self.http else self.frame_size()
        if due is None or self.got < due:
            return None
        answer, self.head, self.got = self.head, self.head[due:], self.got - due
        if self.http or answer[0] != 0x89:
            return answer
        self.sock.sendall(frame(10, answer[2:due]))
        return None

    def frame_size(self) -> int | None:
        extended = {126: 2, 127: 8}.get(self.head[1], 0) if len(self.head) > 1 else 8
        if len(self.head) < 2 + extended:
            return None
        size = self.head[2 : 2 + extended] or self.head[1:2]
        return 2 + extended + int.from_bytes(size, "big")

    def http_size(self) -> int | None:
        head, end, _ = self.head.lower().partition(b"\r\n\r\n")
        length = head.partition(b"\r\ncontent-length:")[2].split(b"\r\n")[0]
        return len(head) + 4 + int(length or 0) if end else None


def bench(url: str, options: Any, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure a server: on each session, one step after the other for so many seconds.

    Returns: steps per second, latencies and times of connecting and resetting in
    milliseconds, and the number of answers that were no observation.
    """
    if client.split_url(url)[0]:
        raise ValueError("http:// and ws:// only: else TLS would be measured")
    connect = Lane.over_http if options.http else Lane.over_websocket
    began = time.perf_counter()
    lanes = [connect(url, "x" * options.size) for _ in range(options.sessions)]
    connected = time.perf_counter()
    selector = selectors.DefaultSelector()
    for lane in lanes:
        selector.register(lane.sock, selectors.EVENT_READ, lane)
    errors = 0

    def answers() -> Iterator[tuple[Lane, float]]:
        nonlocal errors
        ready = lanes  # a single session is simply waited for
        if len(lanes) > 1:
            ready = [key.data for key, _ in selector.select(1)]
        for lane in ready:
            answer = lane.receive()
            if answer is not None:
                errors += b'"observation"' not in answer
                yield lane, time.perf_counter() - lane.sent_at

    resets: list[float] = []
    for lane in lanes:
        lane.send(lane.reset)
    while len(resets) < len(lanes):
        resets += [latency for _, latency in answers()]
    latencies: list[float] = []
    now = start = time.perf_counter()
    tell = start + 1
    for lane in lanes:
        lane.send(lane.step)
    while now < start + options.bench:
        for lane, latency in answers():
            latencies.append(latency)
            lane.send(lane.step)
        now = time.perf_counter()
        if now > tell:
            tell = now + 1
            progress(f"{len(latencies) / (now - start):,.0f} steps/s")
    for lane in lanes:
        lane.sock.close()
    latencies.sort()
    resets.sort()

    def milliseconds(times: list[float], part: float) -> float:
        at = min(int(len(times) * part), len(times) - 1)
        return round(times[at] * 1000, 3) if times else 0.0

    return {
        "transport": "http" if options.http else "websocket",
        "sessions": options.sessions,
        "message_bytes": options.size,
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


def show_bench(options: Any) -> None:
    """Measure, if need be a server of its own, and print what was found."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # as far as one may
        import resource  # which Windows lacks; a thousand sockets need room

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    def progress(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{text} ", end="", file=sys.stderr, flush=True)

    with contextlib.ExitStack() as stack:
        if options.url is None:
            limit = ("--max-concurrent-envs", str(options.sessions))
            own = Command("--port", "0", "--log-level", "warning", *limit)
            options.url = stack.enter_context(own).url
        result = bench(options.url, options, progress)
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:>16}  {value if isinstance(value, str) else format(value, ',')}")


def main() -> None:
    """Run the tests; with ``--bench`` the benchmark."""
    if not any(argument.startswith("--bench") for argument in sys.argv):
        unittest.main()
    parser = argparse.ArgumentParser(
        description="Measure a server; without --url one of its own.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--bench", type=float, metavar="SECONDS", help="measure for so long")
    add("--sessions", type=int, default=1, metavar="N", help="at a time (1)")
    add("--http", action="store_true", help="use HTTP; default: WebSocket")
    add("--size", type=int, default=10, metavar="BYTES", help="of the messages (10)")
    add("--url", help="base URL of a running server")
    add("--json", action="store_true", help="print the result as JSON")
    # One clear line, and no usage text above it.
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # type: ignore[method-assign]
    options = parser.parse_args()
    if not (options.bench > 0 and options.sessions > 0 and options.size >= 0):
        parser.error("--bench and --sessions take numbers above 0, --size 0 or more")
    try:
        show_bench(options)
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
