# SPDX-License-Identifier: BSD-3-Clause
"""Tests of the Benchmark environment, its server and its clients: ``python3 -m unittest``.

They go through what people use: a socket, a URL, a command, a browser. Every server gets
a free port; conditions are waited for, not times. Raw sockets here speak WebSocket by
code of their own (`RawPeer`), so that client.py is not judged by itself.

``python3 test_benchmark.py --bench 5`` measures a server instead (``--bench 1 --help``).

What is promised, and the class that tests it, in the order of the source:

    the environment: reset, step, rewards        EnvironmentTest
    RFC 6455: frames, masks, closes, UTF-8       ProtocolTest, ClientProtocolTest
    a WebSocket on a socket: waits, ends         WebSocketTest, ClientWebSocketTest
    the opening handshake, either side           HandshakeTest, UpgradeTest
    JSON read as dataclasses; JSON Schema        ReadJsonTest, SchemaTest
    the clients, their errors and timeouts       ClientTest
    containers                                   DockerTest
    what is said when an app is made             AppTest
    sessions, their number and end; the stop     SessionTest
    HTTP to the letter; OpenAPI                  HTTPTest
    the pages of other sites are kept out        OriginTest
    OpenEnv's messages; what fails in them       MessageTest, FailureTest
    quick environments, and those that wait      ServingTest, OwnThreadTest
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
import threading
import time
import typing
import unittest
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional, Union
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


# ---------------------------------------------------------------------------
# What the tests share: servers, peers that speak RFC 6455 by hand, commands, files
# ---------------------------------------------------------------------------


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


def serve(env: Any = BenchmarkEnvironment, **options: Any) -> server.Server:
    app = server.create_app(env, BenchmarkAction, BenchmarkObservation, **options)
    return app.start()


def constants(**values: Any) -> Any:
    """Shorten the server's times."""
    return mock.patch.multiple(server, **values)


def exchange(
    url: str, method: str, path: str, body: Any = None, headers: Any = None
) -> tuple[int, Any]:
    """Send one HTTP request; return the status and the JSON of the answer."""
    connection = http.client.HTTPConnection(url.partition("//")[2], timeout=10)
    with contextlib.closing(connection):
        given = {"Content-Type": "application/json", **(headers or {})}
        raw = body is None or isinstance(body, (bytes, str))
        connection.request(method, path, body if raw else json.dumps(body), given)
        answer = connection.getresponse()
        text = answer.read().decode()
    try:
        return answer.status, json.loads(text)
    except ValueError:
        return answer.status, text


def is_healthy(url: str) -> bool:
    with contextlib.suppress(OSError):
        return exchange(url, "GET", "/health")[0] == 200
    return False


class ServerCase(unittest.TestCase):
    """Tests against one server that runs for the whole class."""

    running: server.Server
    options: dict[str, Any] = {}  # noqa: RUF012

    @classmethod
    def setUpClass(cls) -> None:
        logging.disable(logging.CRITICAL)
        cls.addClassCleanup(logging.disable, logging.NOTSET)
        cls.running = serve(**cls.options)
        cls.addClassCleanup(cls.running.stop)

    def peer(self, running: server.Server | None = None) -> RawPeer:
        peer = RawPeer(running or self.running)
        self.addCleanup(peer.sock.close)
        return peer

    def http(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Any = None,
        running: server.Server | None = None,
    ) -> tuple[int, Any]:
        return exchange((running or self.running).url, method, path, body, headers)


def xor(data: bytes, key: bytes) -> bytes:
    return bytes(byte ^ key[i % 4] for i, byte in enumerate(data))


def frame(
    op: int, payload: bytes = b"", fin: bool = True, masked: bool = True, form: int = 0
) -> bytes:
    """Make a frame, also a wrong one: ``form`` forces the 2- or 8-byte length."""
    size = len(payload)
    form = form or (0 if size < 126 else 2 if size < 65536 else 8)
    head = bytes([fin << 7 | op, masked << 7 | {0: size, 2: 126, 8: 127}[form]])
    head += size.to_bytes(form, "big") if form else b""
    key = b"\x12\x34\x56\x78"
    return head + key + xor(payload, key) if masked else head + payload


def text_frame(message: Any) -> bytes:
    return frame(1, json.dumps(message).encode())


def take_frame(read: Callable[[int], bytes]) -> tuple[int, bool, bytes]:
    """Read a frame: its first byte, whether it is masked, its payload."""
    first, second = read(2)
    size = second & 0x7F
    if size > 125:
        size = int.from_bytes(read(2 if size == 126 else 8), "big")
    key = read(4) if second & 0x80 else bytes(4)
    return first, bool(second & 0x80), xor(read(size), key)


UPGRADE = (
    "GET /ws HTTP/1.1\nHost: localhost\nUpgrade: h2c, WebSocket\n"
    "Connection: keep-alive, UPGRADE\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\nSec-WebSocket-Version: 13"
)


class RawPeer:
    """A socket to a server, and RFC 6455 by hand: it can break every rule."""

    masked = False  # whether what comes must be masked: never what a server sends

    def __init__(self, running: server.Server | Command) -> None:
        self.port, self.data = running.server_port, b""
        self.sock = socket.create_connection(("127.0.0.1", self.port), PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            raise EOFError(self.data)
        self.data += data

    def read(self, size: int) -> bytes:
        while len(self.data) < size:
            self.receive()
        found, self.data = self.data[:size], self.data[size:]
        return found

    def read_head(self) -> str:
        while b"\r\n\r\n" not in self.data:
            self.receive()
        head, self.data = self.data.split(b"\r\n\r\n", 1)
        return head.decode("latin-1")

    def request(self, text: str, body: bytes = b"") -> None:
        head = f"{text}\n\n".replace("HOST", f"Host: 127.0.0.1:{self.port}")
        self.send(head.replace("\n", "\r\n").encode("latin-1") + body)

    def response(self) -> tuple[int, dict[str, str], bytes]:
        status, *lines = self.read_head().split("\r\n")
        fields = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
        body = self.read(int(fields.get("content-length", 0)))
        return int(status.split()[1]), fields, body

    def ask(self, text: str, body: bytes = b"") -> tuple[int, dict[str, str], Any]:
        self.request(text, body)
        status, fields, answer = self.response()
        return status, fields, json.loads(answer) if answer else None

    def at_end(self) -> bool:
        """Wait for the server to close the connection."""
        with contextlib.suppress(ConnectionResetError, EOFError):
            while True:
                self.receive()
        return not self.data

    def upgrade(self) -> Self:
        self.request(UPGRADE)
        head = self.read_head()
        assert head.startswith("HTTP/1.1 101"), head
        return self

    def read_frame(self) -> tuple[int, bytes]:
        first, masked, payload = take_frame(self.read)
        assert masked == self.masked, (hex(first), payload)
        return first, payload

    def message(self) -> Any:
        first, payload = self.read_frame()
        assert first == 0x81, (hex(first), payload)
        return json.loads(payload)

    def close_code(self) -> int:
        """Wait for the server's Close frame, then for the end of the connection."""
        first, payload = self.read_frame()
        while first != 0x88:
            first, payload = self.read_frame()
        with contextlib.suppress(OSError):
            self.send(frame(8, payload))
        assert self.at_end(), f"after Close: {self.data!r}"
        return int.from_bytes(payload[:2], "big")


class SocketPeer(RawPeer):
    """A socket that is there already, and RFC 6455 by hand, as either end."""

    def __init__(self, sock: socket.socket, masked: bool = True) -> None:
        self.sock, self.data, self.masked = sock, b"", masked
        sock.settimeout(PATIENCE)


Play = Callable[[SocketPeer], object]


@contextlib.contextmanager
def played(play: Play) -> Iterator[str]:
    """A server of one connection after the other, played by hand; yield host:port."""

    def handle(sock: Any, *_: Any) -> Any:
        with contextlib.suppress(OSError, EOFError):
            play(SocketPeer(sock))

    with socketserver.TCPServer(("127.0.0.1", 0), handle) as playing:
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


SERVER = str(HERE / "server.py")
PIPES: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
Done = subprocess.CompletedProcess


def environment(**extra: str) -> dict[str, str]:
    """What a command of ours needs of this process's environment."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PORT", "SPACE_HOST")}
    return {**kept, "PYTHONUNBUFFERED": "1", **extra}


def run(*arguments: str | Path, cwd: Path = HERE, **env: str) -> Done[str]:
    """Run Python with these arguments to its end."""
    command = [sys.executable, *map(str, arguments)]
    options = {"cwd": cwd, "env": environment(**env), "timeout": 60, **PIPES}
    return subprocess.run(command, check=False, **options)


def output_of(*command: str | Path, cwd: Path = HERE) -> str:
    """Run a command; return what it prints, on standard error too, in order."""
    pipes: Any = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    options: Any = {"env": environment(), "encoding": "utf-8", "timeout": 60, **pipes}
    try:
        return str(subprocess.check_output([*map(str, command)], cwd=cwd, **options))
    except subprocess.CalledProcessError as error:
        raise AssertionError(f"{error}: {error.output}") from None


class Command:
    """A server in a process of its own, as ``python3 server.py`` starts it.

    ``lines`` are the rest of its output, once it has ended, and ``errors`` what it logged.
    """

    url, server_port = "", 0

    def __init__(
        self, *arguments: str, program: Any = (SERVER,), cwd: Path = HERE, **env: str
    ) -> None:
        command = [sys.executable, *program, "--port=0", *arguments]
        options = {"cwd": cwd, "env": environment(**env), **PIPES}
        self.process: Any = subprocess.Popen(command, **options)
        self.line = self.next_line()

    def next_line(self) -> str:
        """Return its next line; a URL in it is where the server is from now on."""
        line: str = self.process.stdout.readline().rstrip("\n")
        if found := re.search(r"http://\S+?:(\d+)", line):
            self.url, self.server_port = found[0], int(found[1])
        return line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.terminate()
        output, self.errors = self.process.communicate(timeout=PATIENCE)
        self.lines = output.splitlines()


def read(name: str) -> str:
    return (HERE / name).read_text("utf-8")


README = read("README.md")


def copy_files(target: Path, *names: str) -> None:
    target.mkdir(exist_ok=True)
    for name in names or ("benchmark.py", "client.py", "server.py"):
        shutil.copy(HERE / name, target)


# ---------------------------------------------------------------------------
# The environment
# ---------------------------------------------------------------------------


class EnvironmentTest(unittest.TestCase):
    def test_reset_begins_an_episode(self) -> None:
        env = BenchmarkEnvironment()
        ready = BenchmarkObservation("Benchmark environment ready!", 0, 0.0, False, {})
        self.assertEqual(env.reset(), ready)
        episode = str(env.state.episode_id)
        self.assertRegex(episode, r"^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f-]+$")
        env.step(BenchmarkAction("x"))
        env.reset(seed=1, episode_id="named")
        self.assertEqual(env.state, BenchmarkState("named", 0))

    def test_step_echoes_and_rewards(self) -> None:
        env = BenchmarkEnvironment()  # a fresh one already has an episode
        rewards = {"": 0.0, "Hi": 0.2, "abc": 0.3, "Hello, World!": 1.3, "𝄞𝄞𝄞": 0.3}
        for step, (text, reward) in enumerate(rewards.items(), 1):
            found = env.step(BenchmarkAction(text), timeout_s=1)
            due = BenchmarkObservation(text, len(text), reward, False, {"step": step})
            self.assertEqual(repr(found), repr(due))  # which tells 0 from 0.0 and False

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
        wrong = BenchmarkObservation()
        broken = mock.patch.object(BenchmarkEnvironment, "step", return_value=wrong)
        with broken, contextlib.redirect_stdout(io.StringIO()) as output:
            self.assertEqual(benchmark.check(), 1)
        self.assertIn("rewards: FAILED", output.getvalue())


# ---------------------------------------------------------------------------
# RFC 6455: the protocol, without I/O, in both roles
# ---------------------------------------------------------------------------

FULL = b"x" * (1 << 17)  # the largest message that is taken


def close_body(code: int, reason: str = "") -> bytes:
    return struct.pack("!H", code) + reason.encode()


def rules(f: Callable[..., bytes]) -> list[Any]:
    """Section and what comes | its bytes, as ``f`` makes frames, and other ways to do it |
    the messages in it | the frames that answer, or the code of the Close after a fault.
    """
    part, long, full = functools.partial(f, fin=False), b"x" * 126, b"\xff" * 125
    pong, end, big = [(10, b"")], [(8, b"")], FULL + b"x"
    bad = b"a\xc0\xaf", b"\xff", b"\xed\xa0", b"\xf4\x90"  # the last: beyond Unicode
    reason = ("ü" * 61).encode()
    sizes = 125, 126, 65535, 65536, len(FULL)
    codes = 1000, 1001, 1002, 1003, 1007, 1011, 1012, 1013, 1014, 3000, 4999
    no_codes = 0, 999, 1004, 1005, 1006, 1015, 1016, 2000, 2999, 5000, 65535
    closes = [(code, close_body(code)) for code in codes]
    return [
        ("5.1 a mask, or none", [bytes([0x81, f(1)[1] ^ 0x80])], [], 1002),
        ("5.6 text", [f(1, "aé𝄞\uffff".encode())], ["aé𝄞\uffff"], []),
        ("5.6 nothing", [f(1) + f(2) + f(10)], ["", b""], []),
        ("5.6 any bytes", [f(2, b"\xff\0\xed\xa0")], [b"\xff\0\xed\xa0"], []),
        ("5.2 three at once", [f(1, b"a") * 3], ["a", "a", "a"], []),
        *((f"5.2 {n} of text", [f(1, b"x" * n)], ["x" * n], []) for n in sizes),
        *((f"5.2 {n} bytes", [f(2, b"x" * n)], [b"x" * n], []) for n in sizes),
        ("5.2 reserved", [f(n) for n in (0x11, 0x21, 0x41, 3, 11)], [], 1002),
        ("5.2 long forms", [f(1, b"x", form=2), f(1, long, form=8)], [], 1002),
        ("5.2 top bit of a length", [f(2, form=8)[:2] + b"\xff" * 12], [], 1002),
        ("5.4 parts", [part(2, b"a") + f(0, b"b")], [b"ab"], []),
        ("5.4 empty parts", [part(1) + part(0) + f(0)], [""], []),
        ("5.4 an é in parts", [part(1, b"\xc3") + f(0, b"\xa9")], ["é"], []),
        ("5.4 ping between parts", [part(1) + f(9) + f(0)], [""], pong),
        ("5.4 pong between parts", [part(1) + f(10) + f(0)], [""], []),
        ("5.4 nothing to continue", [f(0, b"x")], [], 1002),
        ("5.4 nothing left", [f(1, b"x") + f(0, b"y")], ["x"], 1002),
        ("5.4 one in another", [part(1, b"a") + f(n) for n in (1, 2)], [], 1002),
        ("5.5 too long", [f(9, long), f(8, close_body(1000) + long[:124])], [], 1002),
        ("5.5 in parts", [part(9)], [], 1002),
        ("5.5.1 close", [f(8), f(8) + f(1) + f(9), part(1, b"a") + f(8)], [], end),
        ("5.5.1 close behind one", [f(1, b"a") + f(8)], ["a"], end),
        ("5.5.1 close of one byte", [f(8, b"\x03")], [], 1002),
        ("5.5.2 ping", [f(9)], [], pong),
        ("5.5.2 full ping", [f(9, full)], [], [(10, full)]),
        ("5.5.3 pong", [f(10, b"unasked")], [], []),
        ("7.1.7 fault behind a message", [f(1, b"a") + f(3)], ["a"], 1002),
        ("7.1.7 fault before one", [f(3) + f(1, b"a") + f(9)], [], 1002),
        *((f"7.4.1 {c}", [f(8, b + reason)], [], [(8, b)]) for c, b in closes),
        ("7.4.1 no code", [f(8, close_body(code)) for code in no_codes], [], 1002),
        ("8.1 invalid text", [f(1, text) for text in bad], [], 1007),
        ("8.1 before its end", [f(1, text + b" ")[:-1] for text in bad], [], 1007),
        ("8.1 in parts", [part(1, bad[0]), part(1, b"\xe2") + f(0)], [], 1007),
        ("8.1 half of a €", [f(1, b"\xe2\x82")], [], 1007),
        ("8.1 reason", [f(8, close_body(1000) + b"\xff")], [], 1007),
        ("8.1 binary is no text", [part(2, b"\xff")], [], []),
        ("10.4 big", [f(2, big), f(1, big)[:14], part(2, FULL) + f(0, b"x")], [], 1009),
    ]


class RoleCase(unittest.TestCase):
    """Tests of one end of a connection, a server's or a client's; they play the other."""

    is_client = False

    def make(self, op: int, payload: bytes = b"", **options: Any) -> bytes:
        """A `frame` of the other end."""
        return frame(op, payload, masked=not self.is_client, **options)


class ProtocolTest(RoleCase):
    """What is received and sent, byte by byte: no socket, no thread, no waiting."""

    def fresh(self, max_size: int = len(FULL)) -> client.Protocol:
        return client.Protocol(self.is_client, max_size)

    def sent(self, protocol: client.Protocol) -> list[tuple[int, bytes]]:
        """Take the frames out of the outbox."""
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
            found += protocol.inbox
            protocol.inbox.clear()
            protocol.settle()
        return found

    def cuts(self, data: bytes) -> Iterator[list[bytes]]:
        size, chance = len(data), random.Random(2)
        yield [data]
        if size < 1000:
            yield [data[i : i + 1] for i in range(size)]
            yield from ([data[:i], data[i:]] for i in range(size))
        for _ in range(3):
            at = sorted(chance.choices(range(size + 1), k=5))
            yield [data[i:j] for i, j in zip([0, *at], [*at, size])]

    def test_receive_follows_every_rule(self) -> None:
        for name, streams, inbox, outbox in rules(self.make):
            for parts in itertools.chain.from_iterable(map(self.cuts, streams)):
                with self.subTest(name, cut=list(map(len, parts)), first=parts[0][:9]):
                    protocol = self.fresh()
                    self.assertEqual(self.play(protocol, parts), inbox)
                    self.check_sent(protocol, outbox)

    def check_sent(self, protocol: client.Protocol, expected: Any) -> None:
        """These frames were sent, or a Close with this code; if a Close, it is over."""
        frames = self.sent(protocol)
        if isinstance(expected, int):  # a fault: the reason is left to this end
            frames = [(opcode, body[:2]) for opcode, body in frames]
            expected = [(8, close_body(expected))]
        self.assertEqual(frames, expected)
        if frames and frames[-1][0] == 8:
            code = int.from_bytes(frames[-1][1][:2], "big") or 1005
            self.check_over(protocol, code)
        else:
            self.assertIsNone(protocol.closed)

    def check_over(self, protocol: client.Protocol, code: int) -> None:
        """It has ended with this code: nothing more is sent, and nothing kept."""
        self.assertEqual(protocol.closed and protocol.closed.code, code)
        protocol.receive(self.make(1, b"late") + self.make(9) + self.make(8))
        protocol.close(1001)
        protocol.receive_eof()
        with self.assertRaises(client.ConnectionClosed) as caught:
            protocol.send("late")
        self.assertEqual(caught.exception.code, code)
        self.assertFalse(protocol.inbox or protocol.outbox)

    def test_receive_says_when_a_part_is_missing(self) -> None:
        protocol, make = self.fresh(), self.make
        for data in (make(1, b"abc"), make(9, b"abc"), make(1, b"a", fin=False)):
            self.assertFalse(protocol.unfinished)
            protocol.receive(data[:-1])
            self.assertTrue(protocol.unfinished)
            protocol.receive(data[-1:])
        self.assertTrue(protocol.unfinished)  # the message, not the frame

    def test_receive_survives_random_bytes(self) -> None:
        chance = random.Random(6455)
        for number in range(2000):
            opcodes = chance.choices((0, 1, 2, 8, 9, 10), k=4)
            frames = [self.make(n, b"\x03\xe8x" * n, fin=n != 1) for n in opcodes]
            data = bytearray(self.make(1, "é".encode() * 90) + b"".join(frames))
            if number % 4 == 0:
                data = bytearray(chance.choices(range(256), k=60))
            for _ in range(chance.randrange(5)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            protocol, at = self.fresh(max_size=300), chance.randrange(len(data))
            messages = self.play(protocol, [bytes(data[:at]), bytes(data[at:])])
            self.assertLessEqual(max(map(len, messages), default=0), 300)
            sent, over = self.sent(protocol), protocol.closed is not None
            pongs = [10] * (len(sent) - over)
            self.assertEqual([opcode for opcode, _ in sent], pongs + [8] * over)
            self.assertEqual(protocol.close_sent, over)
            protocol.receive_eof()
            code = protocol.closed.code if protocol.closed else 0
            self.assertEqual(code != 1006, over)
            self.check_over(protocol, code)

    def test_send_makes_frames_of_both_kinds_and_all_lengths(self) -> None:
        protocol, chance = self.fresh(), random.Random(7)
        sizes = 0, 1, 3, 4, 5, 125, 126, 1022, 1023, 1024, 1025, 5000, 65535, 65536
        for size in sizes:
            data = bytes(chance.choices(range(256), k=size))
            protocol.send("x" * size)
            protocol.send(data)
            head = 2 if size < 126 else 4 if size < 65536 else 10  # the shortest form
            whole = head + 4 * self.is_client + size
            self.assertEqual(len(protocol.outbox), 2 * whole)
            self.assertEqual(self.sent(protocol), [(1, b"x" * size), (2, data)])
        for _ in range(20 * self.is_client):
            protocol.send("")
        keys = {bytes(protocol.outbox[i + 2 : i + 6]) for i in range(0, 120, 6)}
        self.assertEqual(len(keys), 20 if self.is_client else 1)  # all new


class ClientProtocolTest(ProtocolTest):
    """The same, at the other end."""

    is_client = True


# ---------------------------------------------------------------------------
# A WebSocket: the protocol on a socket, in both roles; the client's handshake
# ---------------------------------------------------------------------------


class WebSocketTest(RoleCase):
    """A `Protocol` on a socket, in both roles; the peer is played by hand."""

    def pair(
        self, timeout: float = PATIENCE, trace: Any = None
    ) -> tuple[SocketPeer, client.WebSocket]:
        """Return the peer, and the socket under test."""
        ours, theirs = socket.socketpair()
        for sock in (ours, theirs):
            self.addCleanup(sock.close)
        protocol = client.Protocol(self.is_client, 1 << 22, trace)
        ws = client.WebSocket(ours, protocol, timeout)
        return SocketPeer(theirs, masked=self.is_client), ws

    def check_over(self, ws: client.WebSocket, code: int) -> None:
        for use in (ws.recv, ws.recv, functools.partial(ws.send, "late")):
            with self.assertRaises(client.ConnectionClosed) as caught:
                use()
            self.assertEqual(caught.exception.code, code)

    def test_threads_that_send_never_mix_frames(self) -> None:
        peer, ws = self.pair()
        messages = "a" * 10, "b" * 70_000, b"c" * 300_000
        frames = [(0x81, b"a" * 10), (0x81, b"b" * 70_000), (0x82, b"c" * 300_000)]

        def send(message: str | bytes) -> None:
            for _ in range(20):
                ws.send(message)

        with ThreadPoolExecutor(4) as pool:
            sending = pool.map(send, messages)
            receiving = pool.submit(ws.recv)  # answers the ping
            peer.send(self.make(9, b"?") + self.make(2, b"y" * 1_000_000))  # first
            self.assertEqual(receiving.result(PATIENCE), b"y" * 1_000_000)
            counts = Counter(peer.read_frame() for _ in range(61))
            self.assertEqual(list(sending), [None] * 3)
        self.assertEqual(counts, {**dict.fromkeys(frames, 20), (0x8A, b"?"): 1})

    def test_timeout_then_what_came_then_the_end(self) -> None:
        peer, ws = self.pair(timeout=0.05)
        with self.assertRaises(TimeoutError):
            ws.recv()
        two, three = self.make(1, b"two"), self.make(1, b"three")
        peer.send(self.make(1, b"one") + two[:-1])
        ws.tend()
        self.assertEqual(ws.recv(), "one")
        with self.assertRaises(TimeoutError):  # half of one is none
            ws.recv()
        peer.send(two[-1:] + three[:-1])
        peer.sock.shutdown(socket.SHUT_WR)
        ws.tend()
        ws.tend()
        self.assertEqual((ws.at_end, ws.protocol.closed), (True, None))
        self.assertEqual(ws.recv(), "two")
        self.check_over(ws, 1006)
        ws.drop()
        self.assertTrue(peer.at_end())  # and no Close was sent

    def test_tend_leaves_alone_who_receives(self) -> None:
        peer, ws = self.pair()
        with ThreadPoolExecutor(1) as pool:
            receiving = pool.submit(lambda: [ws.recv() for _ in range(500)])
            for i in range(500):
                peer.send(self.make(1, b"%d" % i))
                ws.tend()
            self.assertEqual(receiving.result(PATIENCE), list(map(str, range(500))))

    def test_tend_holds_a_bounded_amount(self) -> None:
        peer, ws = self.pair()
        for size, times in ((0, 20_000), (500_000, 10)):
            with ThreadPoolExecutor(1) as pool:
                flooding = pool.submit(peer.send, self.make(1, b"x" * size) * times)
                while not (ws.full or flooding.done()):
                    ws.tend()
                for _ in range(100):
                    ws.tend()
                self.assertLess(sum(map(len, ws.protocol.inbox)), 2_000_000)
                self.assertLess(len(ws.protocol.inbox), 10_000)
                found = Counter(len(ws.recv()) for _ in range(times))
                self.assertEqual(found, {size: times})
                flooding.result(PATIENCE)

    def test_peer_that_reads_nothing_is_not_waited_for(self) -> None:
        peer, ws = self.pair(timeout=0.05)
        pings = self.make(9, b"x" * 125) * 100 + self.make(1, b"not taken")
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
        self.check_over(ws, 1006)

    def test_close_from_this_end(self) -> None:
        make = self.make
        cases: dict[tuple[Any, ...], bytes] = {
            (): close_body(1000),
            (1001, "ü" * 100): close_body(1001, "ü" * 61),  # 123 bytes at most
            (1011, "x" * 200): close_body(1011, "x" * 123),
            (1005, "x"): b"",
        }
        for arguments, body in cases.items():
            peer, ws = self.pair()
            peer.send(make(1, b"not taken"))
            ws.tend()
            ws.start_closing(*arguments)
            ws.start_closing(1002, "again")
            peer.send(make(1, b"late") + make(9) + make(1, b"x", fin=False))
            ws.tend()
            self.assertFalse(ws.protocol.inbox)
            self.assertIsNone(ws.protocol.closed)  # the peer's Close is still to come
            with self.assertRaises(client.ConnectionClosed):
                ws.send("x")
            with ThreadPoolExecutor(1) as pool:
                closing = pool.submit(ws.close, timeout=PATIENCE)
                peer.send(make(8, close_body(4000, "bye")))
                self.assertEqual(peer.read_frame(), (0x88, body))
                if self.is_client:  # it waits for the server to end the connection
                    peer.sock.shutdown(socket.SHUT_WR)
                self.assertTrue(peer.at_end())
                peer.sock.close()
                closing.result(PATIENCE)
            ws.close()  # twice is fine
            self.assertEqual(ws.protocol.closed and ws.protocol.closed.reason, "bye")
            self.check_over(ws, 4000)

    def test_close_from_the_other_end_counts_behind_the_messages(self) -> None:
        close = self.make(8, close_body(4000, "done"))
        for end, code in ((close, 4000), (self.make(3), 1002)):
            for answered_by in ("recv", "send"):
                peer, ws = self.pair(timeout=0)  # all is there: nothing waits
                peer.send(self.make(1, b"one") + self.make(1, b"two") + end)
                peer.sock.shutdown(socket.SHUT_WR)
                ws.tend()
                ws.tend()
                ws.send("an answer")
                self.assertEqual(peer.read_frame(), (0x81, b"an answer"))
                self.assertEqual([ws.recv(), ws.recv()], ["one", "two"])
                if answered_by == "recv":
                    self.check_over(ws, code)
                else:
                    ws.send("the last")
                    self.assertEqual(peer.read_frame(), (0x81, b"the last"))
                first, payload = peer.read_frame()
                self.assertEqual((first, payload[:2]), (0x88, close_body(code)))
                self.check_over(ws, code)
                peer.sock.close()
                ws.close()

    def test_close_does_not_wait_for_ever(self) -> None:
        options: list[Any] = [{}, {"code": 1001, "reason": "bye"}]
        for given in options:
            peer, ws = self.pair()
            ws.close(**given, timeout=0.05)
            body = close_body(**{"code": 1000, **given})
            self.assertEqual(peer.read_frame(), (0x88, body))
            self.assertTrue(peer.at_end())

    def test_drop_ends_who_waits(self) -> None:
        peer, ws = self.pair()
        with ThreadPoolExecutor(1) as pool:
            checking = pool.submit(self.check_over, ws, 1006)
            time.sleep(0.02)  # most likely it waits by then
            ws.drop()
            checking.result(PATIENCE)
        self.assertTrue(peer.at_end())

    def test_trace_that_raises_ends_the_connection(self) -> None:
        peer, ws = self.pair(trace=mock.Mock(side_effect=[None, MemoryError]))
        peer.send(self.make(1, b"a", fin=False) + self.make(9) + self.make(0, b"b"))
        with self.assertRaises(MemoryError):
            ws.tend()
        self.check_over(ws, 1006)  # and no message with a hole


class ClientWebSocketTest(WebSocketTest):
    """The same, at the other end."""

    is_client = True


class HandshakeTest(unittest.TestCase):
    """The client's opening handshake, also with servers that get it wrong."""

    def test_agreement_keeps_what_follows(self) -> None:
        requests = []

        def play(peer: SocketPeer) -> None:
            requests.append(shake_hands(peer, early=frame(1, b"early", masked=False)))
            peer.at_end()

        with played(play) as host:
            ws = client.WebSocket.connect(f"ws://{host}/some/path")
            self.assertEqual(ws.recv(), "early")
            ws.drop()
        key = r"Sec-WebSocket-Key: [\w+/]{22}=="  # of 16 bytes
        self.assertRegex(requests[0], rf"(?s)^GET /some/path HTTP/1.1\r\n.*\n{key}\r\n")

    def test_no_agreement_is_an_error_that_says_why(self) -> None:
        refusal = 'HTTP/1.1 503 Busy\r\nContent-Length: 17\r\n\r\n{"detail":"full"}'
        end, all_of_it = "\r\n\r\n", "(?s).+"
        for words, pattern, wrong in (
            ("HTTP/1.1 200", "101 Switching Protocols", "200 OK"),
            ("refused: HTTP/1.1 503 Busy: full", all_of_it, refusal),
            (
                "HTTP/1.1 302 X$",
                all_of_it,
                "HTTP/1.1 302 X\r\nContent-Length: 0\r\n\r\n",
            ),
            ("upgrade", "Upgrade: WebSocket", "Upgrade: h2c"),
            ("Connection", "upgrade\r", "close\r"),
            ("Accept", f"={end}", f"A={end}"),
            ("extension", end, f"\r\nSec-WebSocket-Extensions: x{end}"),
            ("subprotocol", end, f"\r\nSec-WebSocket-Protocol: x{end}"),
            ("no HTTP", all_of_it, "x" * 70_000),
        ):
            says = self.assertRaisesRegex(ConnectionError, f"(?i){words}")
            change = functools.partial(re.sub, pattern, wrong)
            play = functools.partial(shake_hands, change=change)
            with self.subTest(words), played(play) as host, says:
                client.WebSocket.connect(f"ws://{host}/ws")

    def test_trace_that_raises_leaves_no_connection(self) -> None:
        ends: list[bool] = []

        def play(peer: SocketPeer) -> None:
            shake_hands(peer)
            ends.append(peer.at_end())

        trace = mock.Mock(side_effect=lambda line: 1 / ("HTTP/1.1 101" not in line))
        with played(play) as host, self.assertRaises(ZeroDivisionError) as caught:
            client.WebSocket.connect(f"ws://{host}/ws", trace=trace)
        self.assertEqual(ends, [True], caught)  # which holds its frames

    def test_headers_cannot_be_forged_and_values_are_not_told(self) -> None:
        headers = {"Authorization": "Bearer secret\r\nHost: x"}
        for connect in (
            functools.partial(client.WebSocket.connect, headers=headers),
            functools.partial(BenchmarkEnv, headers=headers),
            functools.partial(BenchmarkEnvWS, default_headers=headers),
        ):
            with self.assertRaisesRegex(ValueError, "Authorization") as caught:
                connect("ws://127.0.0.1:1")
            self.assertNotIn("secret", str(caught.exception))

    def test_urls(self) -> None:
        for url, expected in {
            "localhost:8000": (False, "localhost", 8000, ""),
            "http://a.example/": (False, "a.example", 80, ""),
            "wss://a.example/some/path/": (True, "a.example", 443, "/some/path"),
            "https://[::1]:9/x y": (True, "::1", 9, "/x%20y"),
            "http://bücher.example": (False, "xn--bcher-kva.example", 80, ""),
            "http://0.0.0.0:8000": (False, "127.0.0.1", 8000, ""),
            "ws://[::]:8000/": (False, "::1", 8000, ""),
        }.items():
            self.assertEqual(client.split_url(url), expected)
        no_url = dict.fromkeys(("", "ftp://x", "http://"), "no URL")
        wrong = {"http://x:99999": "(?i)port", "http://user:password@x": "headers="}
        parts = {"http://x/?a=b": "no query", "http://x/#a": "no fragment"}
        for url, words in {**no_url, **wrong, **parts}.items():
            for use in (client.split_url, *BOTH):
                refusal = self.assertRaisesRegex(ValueError, words)
                with self.subTest(url), refusal as caught:
                    use(url)
                self.assertNotIn("password@x", str(caught.exception))


# ---------------------------------------------------------------------------
# Types: JSON and dataclasses
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
    token: str = field(default_factory=lambda: os.urandom(4).hex())
    late: int = field(default=0, init=False)


GOOD: dict[str, Any] = {"number": 3, "color": "red", "point": {"x": 1, "y": 2}}
GOOD |= {"points": [{"x": 1}], "pair": [1, "a"], "size": "m", "either": {"x": 5}}
GOOD |= {"names": {"a": 1}, "tags": ["t"], "rates": [1, 2.5], "late": 7}
GOOD |= {"anything": [1, {"b": None}]}


@dataclass
class Move:
    kind: Literal["move"] = "move"
    x: int = 0


@dataclass
class Say:
    kind: Literal["say"] = "say"
    text: str = ""


class Array:
    """What numpy's arrays and numbers are to JSON, without numpy."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def tolist(self) -> Any:
        return self.value

    def __bool__(self) -> bool:
        return bool(self.value)


SPOKEN = {"kind": "say", "text": "hi"}
FAULT_KEYS = {"type", "loc", "msg", "input"}


def listed(faults: list[Any]) -> str:
    """The type and the path of each fault in a body."""
    for fault in faults:
        assert set(fault) == FAULT_KEYS and fault["loc"][0] == "body", fault
    return ", ".join(f"{f['type']} {'.'.join(map(str, f['loc'][1:]))}" for f in faults)


class ReadJsonTest(unittest.TestCase):
    def test_value_survives_the_way_there_and_back(self) -> None:
        value = client.read_json(Everything, GOOD)
        self.assertEqual(value.color, Color.RED)
        self.assertEqual((value.either, value.points), (Point(5), [Point(1)]))
        self.assertEqual((value.pair, value.tags), ((1, "a"), {"t"}))
        self.assertEqual((value.rates, value.late), ((1.0, 2.5), 7))
        self.assertIsInstance(value.point.y, float)
        again = client.read_json(Everything, json.loads(client.encode_json(value)))
        self.assertEqual(again, value)

    def test_every_fault_is_listed(self) -> None:
        cases = {  # what is changed in a value without faults: what is said of it
            '{"number": 2.0, "either": null}': "",
            '{"number": "3", "color": "green", "size": 1, "point": {}}':
                "int_type number, enum color, missing point.x, enum size",
            '{"number": true, "points": [{"x": 1}, 2], "pair": [1], "either": 5}':
                "int_type number, dict_type points.1, too_short pair, dict_type either",
            '{"number": 1.5, "pair": [1, "a", 2], "names": {"a": "b"}, "tags": "t"}':
                "int_type number, too_long pair, int_type names.a, list_type tags",
            '{"number": 0, "point": {"x": 1, "y": "a"}, "text": "a"}':
                "greater_than_equal number, float_type point.y, string_too_short text",
            '{"number": 10, "point": {"x": 1, "z": 1}, "text": "abcd"}':
                "less_than_equal number, extra_forbidden point.z, string_too_long text",
            '{"point": {"y": "a"}, "late": "x"}':
                "missing point.x, float_type point.y, int_type late",
            '{"pair": ["a", "b"], "rates": [1, 2, 3]}':
                "int_type pair.0, too_long rates",
        }  # fmt: skip
        for changes, expected in cases.items():
            with self.subTest(changes):
                found = ""
                try:
                    value = {**GOOD, **json.loads(changes)}
                    client.read_json(Everything, value, ("body",))
                except client.Invalid as invalid:
                    found = listed(invalid.faults)
                self.assertEqual(found, expected)

    def test_faults_are_listed_up_to_a_hundred(self) -> None:
        for kind in (list[int], list[Union[int, None]], list[Union[int, list[int]]]):
            with self.assertRaises(client.Invalid) as caught:
                client.read_json(kind, ["x"] * 1000)
            self.assertEqual(len(caught.exception.faults), 100)

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
            (Union[Move, Point], {"x": 1, "y": 0.5}, Point(1, 0.5)),  # untagged
            (Union[Move, Point], {"x": 1}, Move(x=1)),  # both fit: the first
            (Union[Point, Move], {"x": 1}, Point(1)),
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
        value = {"x": 1, "y": 0.5, "z": 3}
        with self.assertRaises(client.Invalid):
            client.read_json(Union[Move, Point], value)
        for kind, first in ((Union[Move, Point], Move), (Union[Point, Move], Point)):
            self.assertEqual(client.read_json(kind, value, extra=True), Point(1, 0.5))
            found = client.read_json(kind, {"x": 1, "z": 3}, extra=True)
            self.assertIs(type(found), first)

    def test_containers_without_arguments_are_of_anything(self) -> None:
        arrays = {"type": "array", "items": {}}
        objects = {"type": "object", "additionalProperties": True}
        kinds: Any = [list, tuple, dict]
        kinds += [typing.List, typing.Tuple, typing.Dict]  # noqa: UP006
        for kind in kinds:
            origin = typing.get_origin(kind) or kind
            form: Any = {"a": 1} if origin is dict else [1, "a"]
            self.assertEqual(client.read_json(kind, form), origin(form))
            with self.assertRaises(client.Invalid):
                client.read_json(kind, "text")
            made = dataclasses.make_dataclass("Made", [("a", kind)])
            schema = server.json_schema(made)["properties"]["a"]
            self.assertEqual(schema, objects if origin is dict else arrays)

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
        fields = {"x": {"type": "integer"}, "y": {"type": "number", "default": 0.0}}
        expected: Any = {"title": "Point", "description": "Where.", "type": "object"}
        expected |= {"properties": fields, "required": ["x"]}
        expected["additionalProperties"] = False
        self.assertEqual(server.json_schema(Point), expected)

    def test_schema_of_fields_with_a_default(self) -> None:
        schema = server.json_schema(Everything)
        required = "number color point points pair size"
        self.assertEqual(" ".join(schema["required"]), required)
        late, token = (schema["properties"][name] for name in ("late", "token"))
        self.assertEqual(late, {"type": "integer", "readOnly": True, "default": 0})
        self.assertEqual(token, {"type": "string"})  # its default differs each time

    def test_what_cannot_work_is_refused_by_field(self) -> None:
        cases: list[tuple[Any, dict[str, Any], str]] = [
            (complex, {}, "complex"),
            (bytes, {}, "bytes"),
            (dict[int, str], {}, "keys"),
            (list[dict[int, str]], {}, "keys"),
            (int, {"metadata": {"minimum": "one"}}, "minimum"),
            (str, {"metadata": {"maxLength": 1.5}}, "maxLength"),
            (Any, {"default": 1j}, "complex"),
        ]
        for kind, options, words in cases:
            odd = dataclasses.make_dataclass("Odd", [("a", kind, field(**options))])
            refused = self.assertRaisesRegex(TypeError, f"Odd.a: .*{words}")
            with self.subTest(words), refused:
                server.json_schema(odd)
        with self.assertRaisesRegex(TypeError, "no dataclass"):
            server.json_schema(BenchmarkAction("x"))


# ---------------------------------------------------------------------------
# The clients
# ---------------------------------------------------------------------------

BOTH: tuple[Any, ...] = (BenchmarkEnvWS, BenchmarkEnv)
GENERIC: tuple[Any, ...] = (client.WebSocketEnvClient, client.HTTPEnvClient)


def told(*messages: str, http: str = "", drips: bool = False) -> Play:
    """A server that gives these answers over WebSocket, or this one over HTTP; if it
    ``drips``, there is always some more of it.
    """

    def play(peer: SocketPeer) -> None:
        shake_hands(peer, lambda agreed: http or agreed)
        for message in messages:
            peer.read_frame()
            peer.send(frame(1, message.encode(), masked=False) if message else b"")
        while drips:
            peer.send(b"x")
            time.sleep(0.02)
        peer.sock.shutdown(socket.SHUT_WR)
        peer.at_end()  # what is left unread would reset the connection

    return play


def answered(data: str) -> list[tuple[Any, Play]]:
    """Both clients, and for each a server that answers `reset` with these data."""
    over_ws = told(f'{{"type":"observation","data":{data}}}')
    return [(BenchmarkEnvWS, over_ws), (BenchmarkEnv, told(http=f"{OK}\r\n{data}"))]


OK = "HTTP/1.1 200 OK\r\n"


class ClientTest(ServerCase):
    def test_both_clients(self) -> None:
        host = self.running.url.partition("//")[2]
        urls = [f"http://{host}", f"{host}/", f"ws://{host}"]
        urls.append(f"http://0.0.0.0:{self.running.server_port}")
        long = ("y" * 65_537, 'a"b\\c\n\x7fü' * 9_999, "\x1f" * 65_537)
        messages = ("", "x" * 127, "𝄞 ünï", "\ud800", *long)
        for cls, url in itertools.product(BOTH, urls):
            with self.subTest(cls=cls, url=url), cls(url) as env:
                self.assertEqual(env.base_url, url.rstrip("/"))
                with self.assertRaises(AttributeError):
                    env.base_url = ""
                if cls is BenchmarkEnv:  # which has a session of its own, too
                    with self.assertRaisesRegex(client.ServerError, "reset"):
                        env.step(BenchmarkAction("too early"))
                ready = BenchmarkObservation("Benchmark environment ready!", 0, 0.0)
                first = env.reset(seed=1, episode_id="e")
                self.assertEqual(first, StepResult(ready, 0.0))
                for number, message in enumerate(messages, 1):
                    result = env.step(BenchmarkAction(message), timeout_s=3)
                    self.assertEqual(result.observation.echoed_message, message)
                    reward = len(message) / 10
                    self.assertEqual((result.reward, result.done), (reward, False))
                    self.assertEqual(result.metadata, {"step": number})
                self.assertEqual(env.state(), BenchmarkState("e", 7))
                env.close()
                env.close()
                wait_until(lambda: not self.running.app.active, "the session's end")
        self.assertEqual(self.http("GET", "/health")[0], 200)

    def test_generic_clients_take_and_give_dicts(self) -> None:
        for cls in GENERIC:
            with cls(self.running.url) as env:
                env.reset()
                expected = StepResult(**result("Hi", 2, 0.2, step=1))
                self.assertEqual(env.step({"message": "Hi"}), expected)
                says = r"^Server error: .*\(code: VALIDATION_ERROR\)$"
                with self.assertRaisesRegex(RuntimeError, says) as caught:
                    env.step({"mesage": "Hi"})
                error: Any = caught.exception
                self.assertEqual(error.code, "VALIDATION_ERROR")
                faults = [fault["type"] for fault in error.errors]
                self.assertEqual(faults, ["missing", "extra_forbidden"])
                self.assertEqual(env.state()["step_count"], 1)

    def test_step_says_what_it_takes(self) -> None:
        cases = [(cls, "a BenchmarkAction or a dict") for cls in BOTH]
        cases += [(cls, "a dict or a dataclass") for cls in GENERIC]
        for (cls, words), action in itertools.product(cases, ("Hi", BenchmarkAction)):
            says = f"^step takes {words}, not {type(action).__name__}$"
            with self.assertRaisesRegex(TypeError, says):
                cls(self.running.url).step(action)

    def test_arrays_of_others_are_numbers_and_lists(self) -> None:
        class Arrays(BenchmarkEnvironment):
            def reset(self, seed: Any = None, episode_id: Any = None) -> Any:
                given = {"seed": Array([seed, type(seed).__name__])}
                made: Any = {"reward": Array(1), "done": Array(0), "metadata": given}
                return BenchmarkObservation(**made)

        with serve(Arrays) as running:
            for cls in BOTH:
                with cls(running.url) as env:
                    first = env.reset(seed=Array(7))
                    self.assertEqual(first.metadata, {"seed": [7, "int"]})
                    self.assertEqual(repr((first.reward, first.done)), "(1.0, False)")
                    env.step(BenchmarkAction("Hi", {"array": Array([1, 2])}))

    def test_reward_of_a_peer_is_a_float(self) -> None:
        for given, reward in (("true", 1.0), ("1", 1.0), ("0", 0.0), ("null", None)):
            for cls, play in answered(f'{{"observation":{{}},"reward":{given}}}'):
                with played(play) as host, cls(host) as env:
                    result = env.reset()
                    found = (result.reward, result.observation.reward)
                    self.assertEqual(repr(found), repr((reward, reward)))

    def test_lost_connection_is_said_until_connect_begins_anew(self) -> None:
        running = serve()
        env, other = (BenchmarkEnvWS(running.url).connect() for _ in range(2))
        other.reset(episode_id="old")
        running.stop()
        for _ in range(3):
            with self.assertRaises(ConnectionError):
                env.reset()
        says = r"connect\(\) begins a new session"
        with running.app.start(port=running.server_port):
            with self.assertRaisesRegex(ConnectionError, says):
                env.reset()
            env.connect().reset()
            env.disconnect()
            with self.assertRaisesRegex(ConnectionError, says):
                env.state()
            # The other has not noticed yet that the server was gone.
            self.assertNotEqual(other.connect().state().episode_id, "old")
            other.close()

    def test_connect_to_a_full_server_may_be_tried_again(self) -> None:
        with serve(max_concurrent_envs=1) as running:
            one, two = (BenchmarkEnvWS(running.url) for _ in range(2))
            one.reset()
            for _ in range(20):
                with self.assertRaisesRegex(client.ServerError, "CAPACITY_REACHED"):
                    two.connect().reset()
            one.close()
            wait_until(lambda: not running.app.active)
            self.assertEqual(two.connect().reset().reward, 0.0)
            two.close()

    def test_timeouts_bound_an_answer_however_it_comes(self) -> None:
        for cls, play, error in (
            (BenchmarkEnv, SocketPeer.at_end, TimeoutError),  # nothing comes
            (BenchmarkEnv, told(http="H", drips=True), TimeoutError),
            (BenchmarkEnv, told(http=f"{OK}X: ", drips=True), TimeoutError),
            (BenchmarkEnv, told(http=f"{OK}\r\n", drips=True), TimeoutError),
            (BenchmarkEnvWS, SocketPeer.at_end, ConnectionError),
            (BenchmarkEnvWS, told(http="H", drips=True), ConnectionError),
            (BenchmarkEnvWS, told(http=f"{OK}X: ", drips=True), ConnectionError),
        ):
            began = time.monotonic()
            late = self.assertRaisesRegex(error, "within 0.2 s")
            with self.subTest(cls=cls), played(play) as host, late:
                cls(host, 0.2).reset()
            self.assertLess(time.monotonic() - began, PATIENCE / 2)

    def test_late_answer_is_never_taken_for_the_next(self) -> None:
        # The first answer comes when the second was asked for.
        answers = "", '{"type":"observation","data":{"observation":{}}}'
        with played(told(*answers)) as host:
            env = BenchmarkEnvWS(host, message_timeout_s=0.1)
            with self.assertRaises(TimeoutError):
                env.reset()
            with self.assertRaises(ConnectionError):
                env.reset()

    def test_interrupt_while_it_waits_is_told_afterwards(self) -> None:
        def interrupt(line: str) -> None:
            if line.startswith("-> FIN=1 opcode=0x1"):
                raise KeyboardInterrupt

        env = BenchmarkEnvWS(self.running.url, trace=interrupt)
        with self.assertRaises(KeyboardInterrupt):
            env.reset()
        with self.assertRaisesRegex(ConnectionError, r"lost \(KeyboardInterrupt\)"):
            env.reset()

    def test_answers_that_make_no_sense(self) -> None:
        half = told(http=f"{OK}Content-Length: 9\r\n\r\nabc")
        plays = [(BenchmarkEnv, half), *answered("nonsense"), *answered("[" * 100_000)]
        for message in ("nonsense", "[]", '{"type":"state","data":{}}'):
            plays.append((BenchmarkEnvWS, told(message)))
        plays += [*answered("5"), *answered('{"observation":{},"reward":NaN}')]
        cases: list[Any] = [(cls, play, ConnectionError, "") for cls, play in plays]
        for where, data in (
            ("reward", '{"observation":{},"reward":"high"}'),
            ("done", '{"observation":{},"done":"no"}'),
            ("metadata", '{"observation":{},"metadata":5}'),
            ("observation", "{}"),
            ("message_length", '{"observation":{"message_length":"x"}}'),
        ):
            words = f"makes no sense: {where}: Input should"
            cases += [(*each, ConnectionError, words) for each in answered(data)]
        for answer in (
            '422 X\r\n\r\n{"detail":["x"]}',
            '422 X\r\n\r\n{"detail":[{"a":1}]}',
            "503 X\r\n\r\n<html>",
            "302 X\r\nLocation: http://127.0.0.1:1/\r\n\r\n",
        ):
            play = told(http=f"HTTP/1.1 {answer}")
            cases.append((BenchmarkEnv, play, client.ServerError, ""))
        for number, (cls, play, error, words) in enumerate(cases):
            with self.subTest(number), played(play) as host:
                env = cls(host)
                with self.assertRaisesRegex(error, words):
                    env.reset()
                env.close()

    def test_idle_client_answers_pings(self) -> None:
        answer = frame(1, b'{"type":"state","data":{}}', masked=False)
        pongs: list[Any] = []

        def play(peer: SocketPeer) -> None:
            shake_hands(peer)
            peer.read_frame()
            # One ping comes in the packet of the answer, one a little later.
            for before, ping in ((answer, b"a"), (b"", b"bc")):
                peer.send(before + frame(9, ping, masked=False))
                pongs.append(peer.read_frame())
            peer.send(answer)  # which nobody asked for
            pongs.append("sent")
            peer.at_end()

        with played(play) as host, BenchmarkEnvWS(host) as env:
            env.state()
            expected = [(0x8A, b"a"), (0x8A, b"bc"), "sent"]
            wait_until(lambda: pongs == expected, "the pongs")
            with self.assertRaises(ConnectionError):  # it is not taken for the next
                env.state()

    def test_threads_may_share_a_client(self) -> None:
        actions = [BenchmarkAction(str(number)) for number in range(100)]
        for cls in BOTH:
            with cls(self.running.url) as env, ThreadPoolExecutor(8) as pool:
                env.reset()
                for action, result in zip(actions, pool.map(env.step, actions)):
                    self.assertEqual(result.observation.echoed_message, action.message)
                self.assertEqual(env.state().step_count, 100)

    @unittest.skipUnless(hasattr(os, "fork"), "this system has no fork")
    def test_client_does_not_survive_a_fork(self) -> None:
        code = """if True:
            import os, sys, unittest, warnings
            from benchmark import *
            warnings.simplefilter("ignore")
            url, says = sys.argv[1], unittest.TestCase().assertRaisesRegex
            with BenchmarkEnvWS(url) as ws, BenchmarkEnv(url) as over_http:
                ws.reset()
                over_http.reset()
                if os.fork() == 0:
                    for use in (ws.state, ws.connect, over_http.state, over_http.reset):
                        with says(ConnectionError, "fork"):
                            use()
                    ws.close()
                    over_http.close()
                    with BenchmarkEnvWS(url) as own:
                        os._exit(own.reset().reward != 0.0)
                print(os.wait()[1], ws.state().step_count, over_http.state().step_count)
        """
        done = run("-c", code, self.running.url)
        self.assertEqual(done.stdout, "0 0 0\n", done.stderr)

    def test_unreachable_server(self) -> None:
        for cls in BOTH:
            with self.assertRaises(ConnectionError):
                cls("127.0.0.1:1").reset()

    def test_trace_shows_headers_which_are_sent_past_a_proxy(self) -> None:
        lines: list[str] = []
        given: Any = {"default_headers": {"Authorization": "Bearer secret"}}
        given |= {"headers": {"X-More": "ü"}, "trace": lines.append}
        urls = self.running.url, f"http://0.0.0.0:{self.running.server_port}"
        nobody = "http://127.0.0.1:9"
        proxy = mock.patch.dict(os.environ, http_proxy=nobody, all_proxy=nobody)
        reset = 'opcode=0x1 (text) MASK=1 length=26  {"type":"reset","data":{}}'
        over_ws = {f"-> FIN=1 {reset}"}
        headers = {"-> Authorization: Bearer secret", "-> X-More: ü"}
        over_http = {"-> POST /reset HTTP/1.1", "<- HTTP/1.1 200 OK"}
        for cls, url in itertools.product(BOTH, urls):
            lines.clear()
            with self.subTest(cls=cls, url=url), proxy, cls(url, **given) as env:
                env.reset()
                env.step(BenchmarkAction("x" * 1000))
                shown = over_http if cls is BenchmarkEnv else over_ws
                self.assertLessEqual(shown | headers, set(lines))
                self.assertLess(max(map(len, lines)), 300)

    def test_exceptions_travel(self) -> None:
        for error in (
            client.ConnectionClosed(1001, "bye"),
            client.ServerError("full", "CAPACITY_REACHED"),
            client.ServerError("bad", "VALIDATION_ERROR", [{"type": "missing"}]),
            client.ServerError(code="HTTP_502", message="Bad Gateway"),
            client.Invalid([client.describe_fault("missing", "Required", ("a",), {})]),
            server.Failure(503, "full", "CODE", {"max_sessions": 1}, {"Allow": "GET"}),
        ):
            for again in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
                self.assertIs(type(again), type(error))
                self.assertEqual((str(again), vars(again)), (str(error), vars(error)))

    def test_python_without_ssl_serves_and_calls(self) -> None:
        code = "import sys\nsys.modules['ssl'] = sys.modules['_ssl'] = None\n"
        code += "import client\nclient.main()\n"
        for options in ((), ("--http",)):
            done = run("-c", code, "Hi", *options)
            said = (done.stdout, done.stderr)
            self.assertEqual(said, ("'Hi' length 2 reward 0.2\n", ""))
            done = run("-c", code, "Hi", "--url", "https://127.0.0.1:1", *options)
            self.assertRegex(done.stderr, "^client.py: .*no ssl")

    def test_file_is_found_through_a_link_and_in_an_archive(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            link, archive = Path(folder, "link.py"), Path(folder, "all.zip")
            with contextlib.suppress(OSError, NotImplementedError):  # not on Windows
                link.symlink_to(HERE / "client.py")
            with zipfile.ZipFile(archive, "w") as file:
                for name in ("benchmark.py", "client.py", "server.py"):
                    file.write(HERE / name, name)
                file.writestr("__main__.py", "import client\nclient.main()\n")
            for program in filter(Path.exists, (link, archive)):
                done = run(program, "Hi", cwd=Path(folder))
                self.assertEqual(done.stdout, "'Hi' length 2 reward 0.2\n", done.stderr)

    def test_file_says_what_is_missing_beside_it(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            here = Path(folder)
            copy_files(here, "benchmark.py", "client.py")
            done = run("client.py", "Hi", cwd=here)
            says = "client.py: server.py is not beside client.py: give --url\n"
            self.assertEqual((done.returncode, done.stderr), (2, says))
            (here / "server.py").write_text("import no_such_module\n")
            done = run("client.py", "Hi", cwd=here)
            self.assertIn("No module named 'no_such_module'", done.stderr)
            self.assertNotIn("not beside", done.stderr)


# ---------------------------------------------------------------------------
# Docker
# ---------------------------------------------------------------------------

# A `docker` for LocalDockerProvider, in a directory with a shell script for each image:
# a container is a process, with a file of its process id, while it runs, and a log.
DOCKER = r"""#!/bin/sh
cd "$DOCKER_STATE" && echo "$@" >> calls
for last; do case $last in openenv-*) name=$last; esac; done
case $1 in
run)
    [ -e "$last" ] || { echo "Unable to find image" >&2; exit 1; }
    touch "$name" "$name.log"
    { sh -c "echo \$\$ > $name; . ./$last"; rm "$name"; } > "$name.log" 2>&1 & ;;
port)
    while [ -e "$name" ] && ! grep -q "on http://" "$name.log"; do sleep 0.1; done
    sed -n 's,.*on http://[^:]*:\([0-9]*\).*,127.0.0.1:\1,p' "$name.log" ;;
inspect) [ -e "$name" ] && echo true || echo false ;;
logs) cat "$name.log" ;;
stop) kill "$(cat "$name")" && while [ -e "$name" ]; do sleep 0.1; done ;;
rm) rm "$name.log" ;;
esac
"""


def in_dockerfile(name: str) -> str:
    (found,) = re.findall(rf"(?m)^{name} (.+)$", read("Dockerfile"))
    return str(found)


needs_sh = unittest.skipUnless(os.name == "posix", "needs a POSIX shell")


class DockerTest(ServerCase):
    """The first container is that of README.md's block."""

    def test_from_env_names_the_image_of_a_space(self) -> None:
        url, space = self.running.url, "registry.hf.space/my-org-echo-env-v2"
        for cls, tag in itertools.product(BOTH, ({}, {"tag": "v1"})):
            for start in (cls.from_env, cls.from_hub):
                provider = mock.Mock()
                provider.start_container.return_value = url
                with start("My-Org/Echo_Env.v2", provider, port=1, **tag) as env:
                    self.assertEqual(env.reset().reward, 0.0)
                image = f"{space}:{tag.get('tag', 'latest')}"
                calls = [mock.call.start_container(image, port=1)]
                calls += [mock.call.wait_for_ready(url), mock.call.stop_container()]
                self.assertEqual(provider.mock_calls, calls)
            with self.assertRaisesRegex(ValueError, "use_docker"):
                cls.from_env("a/b", provider, use_docker=False)

    @needs_sh
    def test_image_runs_in_a_container(self) -> None:
        _, script, *options, _ = json.loads(in_dockerfile("CMD"))
        own = shlex.join([sys.executable, str(HERE / script), *options, "0"])
        last = "echo last words on http://x:1"
        with tempfile.TemporaryDirectory() as directory:
            here = Path(directory)
            (here / "docker").write_text(DOCKER)
            (here / "docker").chmod(0o755)
            (here / "benchmark-env:latest").write_text(f"exec {own}")
            (here / "dies").write_text(last)
            (here / "sick").write_text(f"{last}; exec sleep 60")
            path = os.pathsep.join([directory, os.environ.get("PATH", "")])
            with mock.patch.dict(os.environ, PATH=path, DOCKER_STATE=directory):
                text, shown = select("python", "from_docker_image")[0]
                said = output_of(sys.executable, "-c", text)
                self.assertEqual(normalize(said), normalize(shown))
                first, *_, stop, rm = (here / "calls").read_text().splitlines()
                self.assertRegex(first, r"^run --detach .*127\.0\.0\.1::8000 ")
                self.assertEqual((stop.split()[0], rm.split()[0]), ("stop", "rm"))
                with self.assertRaisesRegex(RuntimeError, "Unable to find image"):
                    BenchmarkEnv.from_docker_image("no-such-image")
                with self.assertRaisesRegex(RuntimeError, "ended\nlast words"):
                    BenchmarkEnvWS.from_docker_image("dies")
                provider = client.LocalDockerProvider()
                url = provider.start_container("sick", env_vars={"A": "b"}, memory="2g")
                with self.assertRaisesRegex(TimeoutError, "not healthy.*\nlast words"):
                    provider.wait_for_ready(url, timeout_s=0.1)
                self.assertEqual(list(here.glob("openenv-*")), [])  # no container
                os.environ["PATH"] = f"{directory}/none"
                with self.assertRaisesRegex(RuntimeError, "no docker"):
                    BenchmarkEnv.from_docker_image("benchmark-env:latest")


# ---------------------------------------------------------------------------
# Sessions
# ---------------------------------------------------------------------------

RESETTING = socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)


def step_frame(message: str) -> bytes:
    return text_frame({"type": "step", "data": {"message": message}})


HELLO, WAIT = step_frame("hello"), step_frame("wait")


class Told(BenchmarkEnvironment):
    """Does as its messages say. Does not say itself that it never waits."""

    calls: list[str]  # of all of them
    lives: list[list[str]]  # of each, the threads that made, called and closed it
    gate: threading.Event  # which "wait" waits for
    gives: dict[str, Any]  # what other messages than "wait" give, or raise

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[str] = []
        self.lives.append(self.threads)
        self.note("made")

    def note(self, call: str) -> None:
        self.threads.append(threading.current_thread().name)
        self.calls.append(call)

    def step(self, action: BenchmarkAction, timeout_s: float | None = None) -> Any:
        self.note(action.message)
        if action.message == "wait":
            self.gate.wait(PATIENCE)
        given = self.gives.get(action.message, super().step(action))
        if isinstance(given, BaseException):
            raise given
        return given

    def close(self) -> None:
        self.note("closed")
        if self.state.episode_id == "close raises":
            raise OSError("cannot close")


class Quick(Told):
    NEVER_WAITS = True


class AppTest(unittest.TestCase):
    def app(self, env: Any, action: type = BenchmarkAction, **options: Any) -> Any:
        return server.create_app(env, action, BenchmarkObservation, **options)

    def own(self, **members: Any) -> Any:
        return type("Own", (BenchmarkEnvironment,), members)

    def test_environment_that_cannot_work_is_refused_in_one_line(self) -> None:
        def lacking(name: str) -> Any:
            names = {"__init__", "reset", "step", "state"} - {name}
            return type("Own", (), {n: vars(BenchmarkEnvironment)[n] for n in names})

        own, act = self.own, BenchmarkAction
        odd = dataclasses.make_dataclass("Odd", [("a", "Nowhere")])
        cases: list[tuple[str, Any, type]] = [
            ("pass the class BenchmarkEnvironment itself", BenchmarkEnvironment(), act),
            ("^Own.state is a method: put @property", own(state=lambda _: 0), act),
            (r"^Own\(\): .*path", own(__init__=lambda self, path: None), act),
            ("^Own has no method reset$", lacking("reset"), act),
            ("^Own has no method step$", lacking("step"), act),
            ("^Own has no property state$", lacking("state"), act),
            ("Odd.a .*Nowhere", BenchmarkEnvironment, odd),
            ("^int is no dataclass", BenchmarkEnvironment, int),
        ]
        for words, env, action in cases:
            refusal = self.assertRaisesRegex(TypeError, words)
            with self.subTest(words), refusal as caught:
                self.app(env, action)
            self.assertNotIn("\n", str(caught.exception))

    def test_number_of_environments_is_what_the_class_allows(self) -> None:
        def factory(cls: Any = BenchmarkEnvironment) -> Any:
            return cls()

        of, many = functools.partial, BenchmarkEnvironment
        single = self.own(SUPPORTS_CONCURRENT_SESSIONS=False)
        self.assertEqual(self.app(many).max_concurrent_envs, 1000)
        for env in (many, factory, of(many), of(factory, many)):
            app = self.app(env, max_concurrent_envs=64)
            self.assertEqual(app.max_concurrent_envs, 64)
        for env in (single, of(single), of(factory, single)):
            self.assertEqual(self.app(env).max_concurrent_envs, 1)
            with self.assertRaisesRegex(ValueError, "SUPPORTS_CONCURRENT_SESSIONS"):
                self.app(env, max_concurrent_envs=2)

    def test_name_is_that_of_the_class_or_the_one_given(self) -> None:
        self.assertEqual(self.app(self.own()).metadata["name"], "Own")
        self.assertEqual(self.app(self.own(), env_name="x").metadata["name"], "x")

    def test_environment_may_be_asynchronous(self) -> None:
        class Async(BenchmarkEnvironment):
            async def reset_async(self, **given: Any) -> BenchmarkObservation:
                self.lock, self.given = asyncio.Lock(), given
                return self.reset()

            async def step_async(self, action: BenchmarkAction) -> BenchmarkObservation:
                async with self.lock:
                    await asyncio.sleep(0)
                observation = self.step(action)
                observation.metadata.update(self.given)
                return observation

        with serve(Async) as running:
            for cls in BOTH:
                with cls(running.url) as env:
                    env.reset(seed=5, level="hard")
                    metadata = env.step(BenchmarkAction("x")).observation.metadata
                    self.assertEqual(metadata, {"step": 1, "seed": 5, "level": "hard"})

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


class ToldCase(ServerCase):
    """A server for each test, and two sessions, of environments that do as told."""

    kind: type[Told] = Told

    def setUp(self) -> None:
        Told.calls, Told.lives, Told.gate = [], [], threading.Event()
        Told.gives = {"big": BenchmarkObservation("x" * (1 << 23))}
        # In the end each was closed, and once.
        self.addCleanup(wait_until, lambda: self.closed() == len(Told.lives))
        self.running = self.start(self.kind, **self.options)
        self.addCleanup(Told.gate.set)
        self.first, self.second = (self.peer().upgrade() for _ in range(2))
        wait_until(lambda: Told.calls == ["made", "made"], "two sessions")

    def start(self, env: Any, **options: Any) -> server.Server:
        running = serve(env, **options)
        self.addCleanup(running.stop)
        return running

    def step(self, peer: RawPeer, message: str = "hello") -> Any:
        peer.send(step_frame(message))
        return peer.message()["data"]

    def closed(self) -> int:
        return Told.calls.count("closed")


class SessionTest(ToldCase):
    options = {"max_concurrent_envs": 3}  # noqa: RUF012

    def test_session_of_http_has_a_name_and_a_place(self) -> None:
        full = "'code': 'CAPACITY_REACHED', 'active_sessions': 3, 'max_sessions': 3"
        long = "b" * 255
        for path, session, status, words in (
            ("/step", "a", 404, "reset first"),
            ("/state", "a", 404, "reset first"),
            ("/close", "a", 404, "reset first"),
            ("/state", "", 422, "1 to 255"),
            ("/state", "x" * 256, 422, "1 to 255"),
            ("/reset", long, 200, "ready"),
            ("/state", long, 200, "'step_count': 0"),
            ("/reset", "a", 503, full),
            ("/state", None, 503, full),
            ("/close", long, 200, "closed"),
            ("/close", None, 404, "send the X-Session-Id"),
            ("/state", None, 200, "'step_count': 0"),
            ("/step", None, 200, "'step': 1"),
            ("/step", None, 200, "'step': 2"),
            ("/state", None, 200, "'step_count': 2"),
        ):
            method = "GET" if path == "/state" else "POST"
            body = STEP_BODY if path == "/step" else None
            headers = {} if session is None else {"X-Session-Id": session}
            with self.subTest(path, session=session):
                answer = self.http(method, path, body, headers)
                self.assertEqual(answer[0], status)
                self.assertIn(words, str(answer[1]))
        peer = self.peer().upgrade()
        answer = peer.message()
        self.assertEqual(answer["type"], "error")
        self.assertIn(full, str(answer["data"]))
        self.assertEqual(peer.close_code(), 1013)
        self.assertEqual(self.http("POST", "/close")[0], 200)
        self.assertEqual(self.closed(), 2)

    def test_place_is_free_when_the_connection_ends(self) -> None:
        class Lasting(BenchmarkEnvironment):
            def close(self) -> None:
                time.sleep(0.1)

        running = self.start(Lasting, max_concurrent_envs=1)
        for _ in range(3):
            peer = self.peer(running).upgrade()
            self.assertIn("observation", self.step(peer))
            peer.send(frame(8))
            self.assertEqual(peer.close_code(), 0)

    def test_idle_sessions_end(self) -> None:
        self.running.app.session_timeout = 0.2
        self.assertEqual(self.http("POST", "/reset")[0], 200)
        for peer in (self.first, self.second):
            self.assertEqual(peer.close_code(), 1001)
        wait_until(lambda: self.closed() == 3)
        self.assertEqual(self.http("POST", "/close")[0], 404)

    def test_stop_answers_steps_in_progress(self) -> None:
        other = self.peer(self.start(BenchmarkEnvironment)).upgrade()
        kept = self.peer()
        self.assertEqual(kept.ask(HEALTH)[0], 200)
        self.first.send(WAIT)
        wait_until(lambda: Counter(Told.calls) == {"made": 2, "wait": 1})
        with ThreadPoolExecutor(1) as pool:
            stopping = pool.submit(self.running.stop)
            self.assertEqual(self.second.close_code(), 1001)
            self.assertTrue(kept.at_end())
            Told.gate.set()
            self.assertEqual(self.first.message()["data"]["metadata"], {"step": 1})
            self.assertEqual(self.first.close_code(), 1001)
            self.assertFalse(stopping.result(PATIENCE))
        self.assertEqual(self.closed(), 2)
        with self.assertRaises(OSError):
            self.peer()
        self.assertIn("observation", self.step(other))

    def test_stop_does_not_wait_for_what_is_stuck(self) -> None:
        def factory() -> Told:
            Told.calls.append("making")
            Told.gate.wait(PATIENCE)
            return Told()

        self.first.send(WAIT)
        making = self.start(factory)
        self.peer(making).upgrade()
        wait_until(lambda: sorted(Told.calls) == ["made", "made", "making", "wait"])
        with constants(GRACE_SECONDS=0.1):
            began = time.monotonic()
            self.assertTrue(self.running.stop())  # it says so
            making.stop()
            self.assertLess(time.monotonic() - began, 3)
            self.assertEqual(self.closed(), 2)
            Told.gate.set()
            wait_until(lambda: self.closed() == 3)


# ---------------------------------------------------------------------------
# HTTP
# ---------------------------------------------------------------------------

HEALTH = "GET /health HTTP/1.1\nHOST"
STEP = "POST /step HTTP/1.1\nHOST\nContent-Type: application/json\n"
CHUNKED = f"{STEP}Transfer-Encoding: chunked"
STEP_BODY = b'{"action":{"message":"x"}}'  # of 26 bytes
SIZED = f"{STEP}Content-Length: 26"


def result(message: str, length: int, reward: float, **metadata: Any) -> Any:
    """What reset and step answer: metadata is beside the observation, too, if any."""
    seen = {"echoed_message": message, "message_length": length, "metadata": metadata}
    beside = {"metadata": metadata} if metadata else {}
    return {"observation": seen, "reward": reward, "done": False, **beside}


READY = result("Benchmark environment ready!", 0, 0.0)


class HTTPTest(ServerCase):
    def test_head_and_body_have_their_status(self) -> None:
        # What two programs read in two ways can smuggle a request past one of them.
        old, long = STEP.replace("1.1", "1.0"), "x" * 70_000
        more = "\nA: b"  # a hundred lines are taken
        lines = ("HOST", "bad header", "A : b", "A: b\n folded", "A: b\0c")
        wrong = ("PUT", "DELETE", "GET", "PATCH", "TRACE")
        heads = {
            200: ["GET /health HTTP/1.0", f"{HEALTH}{more * 99}"],
            204: ["OPTIONS /state HTTP/1.1\nHOST"],
            307: ["GET / HTTP/1.1\nHOST"],
            400: [
                "GET /health HTTP/1.1", "GET /health HTTP/1.1\r\nHOST", "GET /health",
                "GET  /health HTTP/1.1\nHOST", "GET http://[/ HTTP/1.1\nHOST",
                *(f"{HEALTH}\n{line}" for line in lines),
                *(f"{STEP}Content-Length: {size}" for size in ("-1", "2 6", "+26")),
                f"{old}Transfer-Encoding: chunked",
            ],
            404: ["GET /nowhere HTTP/1.1\nHOST"],
            405: [f"{method} /step HTTP/1.1\nHOST" for method in wrong],
            413: [f"{STEP}Content-Length: 999999999999"],
            414: [f"GET /{long} HTTP/1.1\nHOST"],
            417: [f"{SIZED}\nExpect: magic"],
            431: [f"{HEALTH}\nA: {long}", f"{HEALTH}{more * 100}"],
            501: ["BREW /pot HTTP/1.1\nHOST", f"{STEP}Transfer-Encoding: gzip"],
            505: ["GET /health HTTP/2.0\nHOST"],
        }  # fmt: skip
        body, halves = STEP_BODY, (STEP_BODY[:5], STEP_BODY[5:])
        cases = [
            (200, SIZED, body),
            (200, f"{old}Content-Length: 26\nExpect: magic", body),
            # HTTP/1.0 does not know it (RFC 9110 section 10.1.1).
            (200, f"{old}Content-Length: 26\nExpect: 100-continue", body),
            (400, f"{SIZED}\nContent-Length: 26", body),
            (400, f"{SIZED}\nTransfer-Encoding: chunked", body),
            (415, SIZED.replace("application/json", "text/plain"), body),
            (200, CHUNKED, b"5;a=b\r\n%b\r\n15\r\n%b\r\n0\r\nHost: x\r\n\r\n" % halves),
            (413, CHUNKED, b"fffffffff\r\n"),
            (400, CHUNKED, b"x\r\n"),
            (400, CHUNKED, b"1\r\nabc\r\n"),
            # Lines and data end in CR LF and nothing else (RFC 9112 section 7.1).
            (400, CHUNKED, b"1a\n%b\r\n0\r\n\r\n" % body),
            (400, CHUNKED, b"1a\r\r\n%b\r\n0\r\n\r\n" % body),
            (400, CHUNKED, b"1a\r\n%b\n0\r\n\r\n" % body),
            (400, CHUNKED, b"1a\r\n%b\r\r\n0\r\n\r\n" % body),
            (400, CHUNKED, b"1a\r\n%b\r\n\n0\r\n\r\n" % body),
            (400, CHUNKED, b"1a\r\n%b\r\n0\n\r\n" % body),
            *((status, head, b"") for status in heads for head in heads[status]),
        ]
        said = {204: ("allow", "GET, HEAD, OPTIONS"), 307: ("location", "web")}
        said[405] = ("allow", "POST, OPTIONS")
        for expected, head, data in cases:
            with self.subTest(head=head[:80], data=data), self.peer() as peer:
                status, fields, answer = peer.ask(head, data)
                self.assertEqual(status, expected, answer)
                self.assertTrue(status < 400 or isinstance(answer["detail"], str))
                name, value = said.get(status, ("", None))
                self.assertEqual(fields.get(name), value)

    def test_head_with_many_spaces_takes_no_time(self) -> None:
        began = time.monotonic()
        for value, expected in ((" " * 60_000 + "\1", 400), (f"x{' ' * 60_000}x", 200)):
            self.assertEqual(self.peer().ask(f"{HEALTH}\nA:{value}")[0], expected)
        self.assertLess(time.monotonic() - began, 2)

    def test_connection_is_kept_and_may_be_ahead(self) -> None:
        with self.peer() as peer:
            for _ in range(50):
                peer.request(HEALTH)
            for _ in range(50):
                self.assertNotIn("connection", peer.response()[1])
            for _ in range(2):
                self.assertEqual(peer.ask("PUT /step HTTP/1.1\nHOST")[0], 405)
            kept = "GET /health HTTP/1.0\nConnection: keep-alive"
            self.assertEqual(peer.ask(kept)[1]["connection"], "keep-alive")
            self.assertEqual(peer.ask("GET /health HTTP/1.0")[1]["connection"], "close")
            self.assertTrue(peer.at_end())
        with self.peer() as peer:
            peer.request("HEAD /health HTTP/1.1\nHOST\nConnection: close")
            self.assertIn("Content-Length: 20", peer.read_head())
            self.assertTrue(peer.at_end())

    def test_expect_is_answered_before_the_body(self) -> None:
        with self.peer() as peer:
            peer.request(f"{SIZED}\nExpect: 100-continue")
            self.assertEqual(peer.read_head(), "HTTP/1.1 100 Continue")
            peer.send(STEP_BODY)
            self.assertEqual(peer.response()[0], 200)

    def test_body_that_breaks_its_schema_is_told_every_fault(self) -> None:
        wrong = {"action": {"m": 1, "metadata": 2}, "timeout_s": 0}
        faults = "missing action.message, extra_forbidden action.m, "
        faults += "dict_type action.metadata, greater_than timeout_s"
        long = {"action": 5, "request_id": "x" * 256}
        ids = {"seed": -1, "episode_id": 5}
        cases: list[tuple[str, Any, str]] = [
            ("/step", {}, "missing action"),
            ("/step", [], "dict_type "),
            ("/step", {"action": {"message": 5}}, "string_type action.message"),
            ("/step", wrong, faults),
            ("/step", long, "dict_type action, string_too_long request_id"),
            ("/reset", ids, "greater_than_equal seed, string_type episode_id"),
            ("/reset", {"seed": True}, "int_type seed"),
        ]
        for path, body, expected in cases:
            with self.subTest(path=path, body=body):
                status, answer = self.http("POST", path, body)
                self.assertEqual((status, listed(answer["detail"])), (422, expected))

    def test_body_that_is_odd_json_is_refused_or_echoed(self) -> None:
        step = '{"action":{"message":"","metadata":{"v":VALUE}}}'
        deep = "[" * 100_000, "[" * 500 + "]" * 500
        values = *deep, "1" * 100_000, "NaN", "-Infinity", "1e999"
        bodies: list[Any] = ["{", b"\xff", b"\xef\xbb\xbf{}"]
        for body in bodies + [step.replace("VALUE", value) for value in values]:
            with self.subTest(body=body[:40]):
                status, answer = self.http("POST", "/step", body)
                found = (status, answer["detail"][0]["type"])
                self.assertEqual(found, (422, "json_invalid"))
        nested = step.replace("VALUE", "[" * 90 + "]" * 90)
        self.assertEqual(self.http("POST", "/step", nested)[0], 200)
        for text, echo in (("\\ud800", "\ud800"), ('a","message":"b', "b")):
            answer = self.http("POST", "/step", f'{{"action":{{"message":"{text}"}}}}')
            self.assertEqual(answer[1]["observation"]["echoed_message"], echo)

    def test_routes_answer(self) -> None:
        step: dict[str, Any] = {"action": {"message": "Hi"}, "timeout_s": 5}
        step |= {"request_id": "r", "other": 1}
        state = {"episode_id": "e1", "step_count": 1}
        metadata = {"name": "BenchmarkEnvironment", "version": benchmark.__version__}
        metadata["description"] = str(BenchmarkEnvironment.__doc__)
        metadata["readme_content"] = README
        nothing = {"author": None, "documentation_url": None}
        for method, path, body, expected in (
            ("POST", "/reset", {"seed": 3.0, "episode_id": "e1"}, READY),
            ("POST", "/step", step, result("Hi", 2, 0.2, step=1)),
            ("GET", "/state?x=1", None, state),
            ("GET", "/%73tate", None, state),
            ("POST", "/close", None, {"status": "closed"}),
            ("GET", "/health", None, {"status": "healthy"}),
            ("GET", "/metadata", None, {**metadata, **nothing}),
        ):
            answer = self.http(method, path, body, {"X-Session-Id": "routes"})
            self.assertEqual(answer, (200, expected))
        schemas = self.http("GET", "/schema")[1]
        self.assertEqual(list(schemas), ["action", "observation", "state"])

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
        def note(node: Any) -> Any:
            nodes.append(node)
            return node

        for action in (BenchmarkAction, Everything):
            nodes: list[Any] = []
            types = action, BenchmarkObservation
            with server.create_app(BenchmarkEnvironment, *types).start() as running:
                document = self.http("GET", "/openapi.json", running=running)[1]
                self.check_routes(document, running, action)
            json.loads(json.dumps(document), object_hook=note)
            for node in nodes:
                self.assertIsInstance(follow(node, document), dict)
            given = [node for node in nodes if {"schema", "examples"} <= set(node)]
            self.assertGreater(len(given), 20)
            for node in given:
                schema, example = shown({"": node})
                self.assertTrue(fits(example, schema, document), node)
        self.assertRegex(document["openapi"], r"^3\.1\.")
        self.assertEqual(document["info"]["version"], benchmark.__version__)

    def check_routes(self, document: Any, running: server.Server, action: type) -> None:
        """Send the example of every operation, and compare the answers."""
        paths = set(server.METHODS) - {"*"} - set(server.REDIRECTS) | {"/"}
        self.assertEqual(set(document["paths"]), paths)
        for path, methods in document["paths"].items():
            ((method, operation),) = methods.items()
            self.assertIn(method.upper(), server.METHODS[path])
            self.assertLessEqual({"operationId", "summary", "tags"}, set(operation))
            body = operation.get("requestBody", {}).get("content")
            given = shown(body)[1] if body else None
            status, answer = self.http(method.upper(), path, given, running=running)
            failed = path == "/step" and action is Everything  # it has no message
            self.assertEqual(status == 500, failed)
            expected = follow(operation["responses"][str(status)], document)["content"]
            if "application/json" in expected:
                schema, example = shown(expected)
                self.assertTrue(fits(answer, schema, document), answer)
            if path in ("/reset", "/step") and not failed:
                self.assertEqual(example, answer)


def shown(content: Any) -> tuple[Any, Any]:
    """The schema and the first example of a body in OpenAPI."""
    (media,) = content.values()
    return media["schema"], next(iter(media["examples"].values()))["value"]


def follow(schema: Any, root: Any) -> Any:
    for part in schema["$ref"].split("/")[1:] if "$ref" in schema else ():
        schema = root = root[part]
    return schema


KINDS: dict[str, Any] = {"null": [type(None)], "boolean": [bool], "string": [str]}
KINDS |= {"integer": [int], "number": [int, float], "object": [dict], "array": [list]}


def fits(value: Any, schema: Any, root: Any) -> bool:
    """Whether a value is as a JSON Schema says; bounds are the server's to check."""
    schema = follow(schema, root)
    if "anyOf" in schema:
        return any(fits(value, member, root) for member in schema["anyOf"])
    named = schema.get("type", list(KINDS))
    kinds = [KINDS[name] for name in (named if isinstance(named, list) else [named])]
    if not any(type(value) in kind for kind in kinds):
        return False
    if isinstance(value, dict):
        fields = schema.get("properties", {})
        more = schema.get("additionalProperties", True) or set(value) <= set(fields)
        known = [fits(value[k], fields[k], root) for k in fields if k in value]
        return more and set(schema.get("required", ())) <= set(value) and all(known)
    if isinstance(value, list):
        items = schema.get("prefixItems", [schema.get("items", {})] * len(value))
        return all(fits(v, item, root) for v, item in zip(value, items))
    return value in schema.get("enum", [schema.get("const", value)])


class OriginTest(ServerCase):
    """What the pages of other sites may not do: a browser sends Host and Origin."""

    def check(self, running: server.Server, expected: int, *lines: str) -> None:
        for line in lines:
            text = line.replace("PORT", str(running.server_port))
            text = text if "GET" in text else f"GET /health HTTP/1.1\n{text}"
            with self.subTest(line), self.peer(running) as peer:
                self.assertEqual(peer.ask(text)[0], expected)

    def test_host_and_origin_must_be_this_machine(self) -> None:
        evil, every = "evil.example", ("0.0.0.0:PORT", "[::]:PORT")
        here = ("localhost", "LocalHost:80", "127.1.2.3", "[::1]:99", "a.localhost")
        foreign = ("[::1", "[x]", "a@localhost", "localhost/evil", "localhost?evil")
        good = [
            "HOST\nOrigin: http://127.0.0.1:PORT",
            "HOST\nOrigin: https://a.example\nX-Forwarded-Host: a.example",
            *(f"Host: {name}" for name in (*here, *every)),
            "Host: [::]:PORT\nOrigin: http://[::]:PORT",
            # Of an absolute target the host counts (RFC 9112 section 3.2.2).
            f"GET http://127.0.0.1:PORT/health HTTP/1.1\nHost: {evil}",
        ]
        bad = [f"GET http://{evil}/health HTTP/1.1\nHOST"]
        bad.append(f"{UPGRADE}\nOrigin: http://{evil}")
        for origin in ("http://127.0.0.1:1", f"http://{evil}", "null"):
            bad.append(f"HOST\nOrigin: {origin}")
        bad += [f"Host: {name}" for name in (evil, *foreign, "127.0.0.1:PORT:80")]
        bad += [f"Host: {name}\nOrigin: http://{evil}" for name in (evil, *every)]
        self.check(self.running, 200, *good)
        self.check(self.running, 403, *bad)

    def test_hosts_may_be_named(self) -> None:
        with mock.patch.dict(os.environ, {"SPACE_HOST": "me-env.hf.space"}):
            running = serve(allow_origins=["https://lab.example:8443", "b.example"])
        with running:
            for name in ("me-env.hf.space", "lab.example:8443", "b.example"):
                origin = f"HOST\nOrigin: https://{name}"
                self.check(running, 200, f"Host: {name}", origin)
            self.check(running, 403, "HOST\nOrigin: https://c.example")


# ---------------------------------------------------------------------------
# The server's WebSockets
# ---------------------------------------------------------------------------


class MessageTest(ServerCase):
    def test_message_of_every_type_is_answered(self) -> None:
        call = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
        step = result("Hi", 2, 0.2, step=1)
        pairs = [
            ({"type": "reset", "data": {"episode_id": "e1"}}, "observation", READY),
            ({"type": "step", "data": {"message": "Hi"}}, "observation", step),
            ({"type": "state"}, "state", {"episode_id": "e1", "step_count": 1}),
            ({"type": "reset", "data": {"seed": 1}}, "observation", READY),
            ({"type": "reset"}, "observation", READY),
            ({"type": "mcp", "data": call}, "mcp", server.mcp_answer(call)),
        ]
        peer = self.peer().upgrade()
        peer.send(b"".join(text_frame(message) for message, _, _ in pairs))
        for _, kind, data in pairs:
            self.assertEqual(peer.message(), {"type": kind, "data": data})

    def test_error_leaves_the_session_alive(self) -> None:
        invalid = ["[]", '"text"', '{"type":"step"}', '{"type":"mcp"}']
        invalid += ['{"type":"step","data":{}}', '{"type":"state","data":{}}']
        invalid += ['{"type":"reset","data":[]}', '{"type":"reset","data":{"seed":-1}}']
        cases = {
            "INVALID_JSON": ["{", '{"type":NaN}', "[" * 5000],
            "UNKNOWN_TYPE": ['{"type":"jump"}', '{"type":5}', "{}"],
            "VALIDATION_ERROR": invalid,
        }
        peer = self.peer().upgrade()
        for code, text in [(c, text) for c in cases for text in cases[c]]:
            with self.subTest(text):
                peer.send(frame(1, text.encode()))
                answer = peer.message()
                said = answer["data"]
                self.assertEqual((answer["type"], said["code"]), ("error", code))
                self.assertTrue(said["message"])
                if code == "VALIDATION_ERROR":
                    self.assertEqual(set(said["errors"][0]), FAULT_KEYS)
        peer.send(frame(2, b'{"type":"state"}') + text_frame({"type": "state"}))
        self.assertEqual(peer.message()["data"]["code"], "INVALID_JSON")  # as binary
        self.assertEqual(peer.message()["data"]["step_count"], 0)


class FailureTest(ToldCase):
    """What an environment does oddly or wrong, over both transports."""

    def give(self, given: Any) -> Any:
        """What a step answers that gives this, the same over WebSocket and HTTP."""
        Told.gives["x"] = given
        answer = self.step(self.first, "x")
        status, over_http = self.http("POST", "/step", STEP_BODY)
        self.assertEqual(status, 500 if "code" in answer else 200)
        over_http = {k.replace("detail", "message"): v for k, v in over_http.items()}
        self.assertEqual(repr(over_http), repr(answer))
        return answer

    def test_step_that_gives_something_odd(self) -> None:
        seen: Callable[..., BenchmarkObservation] = BenchmarkObservation
        cases: list[tuple[Any, str]] = [
            (seen("", 0, True, 1), "'reward': 1.0, 'done': True"),
            (seen("", 0, 3, 0), "'reward': 3.0, 'done': False"),
            (seen("", 0, Array(0.5), Array(True)), "'reward': 0.5, 'done': True"),
            (seen("", 0, None, None), "'reward': None, 'done': False"),
            ({True: 1, None: 2, 1.5: 3}, "{'true': 1, 'null': 2, '1.5': 3}"),
        ]
        for given, words in cases:
            self.assertIn(words, repr(self.give(given)))

    def test_step_that_fails_hurts_nobody(self) -> None:
        class Unsayable(Exception):
            def __str__(self) -> str:
                raise SystemExit(3)

        errors = (
            ValueError("a\nb"),
            SystemExit(3),
            asyncio.CancelledError(),
            Unsayable(),
        )
        rewards: tuple[Any, ...] = "high", [1.0], float("nan"), 10**400
        wrong = [BenchmarkObservation("", 0, reward) for reward in rewards]
        for given in (*errors, None, {"reward": 1, "value": object()}, *wrong):
            with self.subTest(given):
                answer = self.give(given)
                self.assertEqual(answer["code"], "EXECUTION_ERROR")
                self.assertTrue(answer["message"])
        self.assertEqual(self.give(errors[0])["message"], "a\nb")
        self.assertEqual(self.give(BenchmarkObservation("", 0, 0.4))["reward"], 0.4)

    def test_environment_that_cannot_be_created(self) -> None:
        def factory() -> Any:
            raise OSError("no display")

        failure = {"code": "FACTORY_ERROR", "factory_name": "factory"}
        self.running = self.start(factory)
        peer = self.peer().upgrade()
        self.assertLessEqual(failure.items(), peer.message()["data"].items())
        self.assertEqual(peer.close_code(), 1011)
        told = {"detail": "factory: no display", **failure}
        self.assertEqual(self.http("POST", "/reset"), (500, told))
        self.assertEqual(self.http("GET", "/health")[0], 200)


class UpgradeTest(ServerCase):
    """The opening handshake."""

    def test_frame_right_behind_the_handshake(self) -> None:
        extra = "Extensions: permessage-deflate\nSec-WebSocket-Protocol: chat"
        begin, end = frame(1, b'{"type":', fin=False), frame(0, b'"reset"}')
        for early, rest in ((HELLO, b""), (HELLO[:9], HELLO[9:]), (begin, end)):
            with self.subTest(early), constants(TICK_SECONDS=0.001):
                peer = self.peer()
                peer.request(f"{UPGRADE}\nSec-WebSocket-{extra}", early)
                head = peer.read_head().lower()
                self.assertNotIn("extensions", head)
                self.assertNotIn("protocol:", head)
                time.sleep(0.1)  # in which the server looks often: it is no stall yet
                peer.send(rest)
                self.assertEqual(peer.message()["type"], "observation")

    def test_handshake_that_is_wrong_is_refused(self) -> None:
        for right, wrong, status in (
            ("h2c, WebSocket", "h2c", 426),
            ("keep-alive, UPGRADE", "close", 426),
            ("13", "8", 426),
            ("A" * 22 + "==", "AAAA", 400),
            ("==", "AA", 400),
            ("GET", "POST", 405),
            ("GET", "HEAD", 405),
        ):
            with self.subTest(wrong), self.peer() as peer:
                peer.request(UPGRADE.replace(right, wrong))
                head = peer.read_head()
                self.assertEqual(head.split()[1], str(status))
                self.assertEqual("Sec-WebSocket-Version: 13" in head, status == 426)


class ServingTest(ToldCase):
    """An environment that never waits: the thread that reads calls it."""

    kind: type[Told] = Quick

    def test_thread_is_always_the_same(self) -> None:
        Told.gives["bad"] = ValueError("it breaks")
        peers = [self.first, self.second, self.peer().upgrade()]
        for message in ("hello", "bad", "big", "hello"):
            for peer in peers:
                code = self.step(peer, message).get("code")
                self.assertEqual(code, "EXECUTION_ERROR" if message == "bad" else None)
        for peer in peers:
            peer.sock.close()
        wait_until(lambda: self.closed() == 3)
        self.check_threads(Told.lives)

    def check_threads(self, lives: list[list[str]]) -> None:
        self.assertEqual([life[1:-1] for life in lives], [["reader"] * 4] * 3)

    def test_half_a_message_or_answer_holds_nobody_up(self) -> None:
        frames = step_frame("big") * 3
        self.first.send(frames[:9])
        self.step(self.second)
        self.first.send(frames[9:])
        wait_until(lambda: "big" in Told.calls)
        for _ in range(3):
            self.step(self.second)
        self.assertEqual(Told.calls.count("big"), 1)  # else the answers would pile up
        for _ in range(3):
            observation = self.first.message()["data"]["observation"]
            self.assertEqual(len(observation["echoed_message"]), 1 << 23)

    def test_many_messages_at_once_take_turns_with_others(self) -> None:
        self.first.send(WAIT + HELLO * 1000)
        wait_until(lambda: "wait" in Told.calls)
        self.second.send(step_frame("turn"))
        if self.kind is not Quick:  # nobody waits for the first
            wait_until(lambda: "turn" in Told.calls)
        Told.gate.set()
        self.assertIn("observation", self.second.message()["data"])
        self.assertLess(Told.calls.index("turn"), 100)
        answers = [self.first.message()["data"] for _ in range(1001)]
        steps = [answer["metadata"]["step"] for answer in answers]
        self.assertEqual(steps, list(range(1, 1002)))  # all are answered, in order

    def test_slow_message_and_slowly_taken_answer_stay_whole(self) -> None:
        """Neither idleness nor a Close behind them may cut them."""
        half = self.peer().upgrade()
        Told.gives["huge"] = BenchmarkObservation("x" * (1 << 24))
        with constants(LINGER_SECONDS=0.2, TICK_SECONDS=0.05):
            self.first.send(step_frame("huge"))
            self.second.send(step_frame("huge") + text_frame({"type": "close"}))
            half.send(HELLO[:-1])
            wait_until(lambda: Told.calls.count("huge") == 2)
            self.running.app.session_timeout = 0.2
            time.sleep(1)
            half.send(HELLO[-1:])
            self.assertIn("observation", half.message()["data"])
            for peer, code in ((self.first, 1001), (self.second, 1000)):
                observation = peer.message()["data"]["observation"]
                self.assertEqual(len(observation["echoed_message"]), 1 << 24)
                self.assertEqual(peer.close_code(), code)

    def test_end_behind_messages_waits_for_their_answers(self) -> None:
        """A fault, or the end of the peer's direction; a Close does not wait."""
        for end, code in ((frame(3), 1002), (b"", 0)):
            Told.gate.clear()
            peer = self.peer().upgrade()
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(peer.message)
                peer.send(WAIT + end)
                peer.sock.shutdown(socket.SHUT_WR)
                wait_until(lambda: "wait" in Told.calls)
                time.sleep(0.05)  # most likely the end has been read by then
                Told.gate.set()
                self.assertIn("observation", waiting.result(PATIENCE)["data"])
            if code:
                self.assertEqual(peer.close_code(), code)
            self.assertTrue(peer.at_end())
            Told.calls.remove("wait")

    def test_threads_of_callers_do_not_mix(self) -> None:
        def play(number: int) -> None:
            with BOTH[number % 2](self.running.url) as env:
                env.reset(episode_id=f"e{number}")
                for step in range(1, 16):
                    seen = env.step(BenchmarkAction(f"{number}:{step}")).observation
                    self.assertEqual(seen.echoed_message, f"{number}:{step}")
                    self.assertEqual(seen.metadata, {"step": step})
                self.assertEqual(env.state(), BenchmarkState(f"e{number}", 15))

        with ThreadPoolExecutor(24) as pool:
            list(pool.map(play, range(48)))  # raises what they raised

    def test_peer_that_is_slow_is_dropped(self) -> None:
        part = frame(1, b"x", fin=False)
        cases = [  # a head if it is whole, what follows, and what goes on to come
            ("", b"", b""),
            ("", b"GET / HT", b""),
            ("", b"GET /health HTTP/1.1\r\nA: ", b"x"),
            ("GET /health HTTP/1.0\nConnection: keep-alive", b"", b""),
            (CHUNKED, b"1a\r\n{", b""),
            (CHUNKED, b"", b"1\r\n \r\n"),
            (UPGRADE, HELLO[:5], b""),
            (UPGRADE, frame(1, b"x" * 10_000)[:10], b"x"),
            (UPGRADE, part, frame(0, b"x", fin=False)),
            (UPGRADE, part, frame(9)),
        ]
        with constants(HEADER_SECONDS=0.3, IDLE_SECONDS=0.5, TICK_SECONDS=0.05):
            peers = [(self.peer(), *case) for case in cases]
            for peer, head, first, _ in peers:
                if head:
                    peer.request(head)
                if head == UPGRADE:
                    peer.read_head()
                peer.send(first)

            def drip() -> bool:
                for peer, *_, more in peers:
                    with contextlib.suppress(OSError):
                        peer.send(more)
                return len(self.running.connections) == 2

            wait_until(drip, "the end of these connections")
            for peer, *_ in peers:
                peer.at_end()

    def test_peer_that_takes_no_answer_is_dropped(self) -> None:
        big = json.dumps({"action": {"message": "x" * 10_000_000}}).encode()
        steps, over_http = step_frame("x" * 1000) * 200, self.peer()
        with constants(HEADER_SECONDS=0.5, TICK_SECONDS=0.05):
            over_http.request(f"{STEP}Content-Length: {len(big)}", big)
            with self.assertRaises(OSError):
                while True:
                    self.first.send(steps)
            wait_until(lambda: len(self.running.connections) == 1)
            wait_until(lambda: self.running.app.active == 2)  # the second, the shared
            over_http.at_end()
            self.assertLess(len(over_http.data), 10_000_000)

    def test_end_of_any_kind_leaves_nothing(self) -> None:
        chance, before = random.Random(6455), threading.active_count()
        heads = UPGRADE, "POST /step HTTP/1.1\nHost: localhost\nContent-Length: 26"
        upgrade, step = (f"{h}\n\n".replace("\n", "\r\n").encode() for h in heads)
        failing = text_frame({"type": "reset", "data": {"episode_id": "close raises"}})
        streams = [  # whether the session is open before, and what comes
            (False, upgrade + HELLO * 4),
            (False, (step + STEP_BODY) * 4),
            (True, HELLO + failing + HELLO),
            (True, HELLO + frame(8)),
            (True, HELLO + text_frame({"type": "close"})),
        ]
        for i, (is_open, stream) in zip(range(400), itertools.cycle(streams)):
            data, peer = bytearray(stream), self.peer()
            for _ in range(chance.choice((0, 0, 1, 4))):
                data[chance.randrange(len(data))] = chance.randrange(256)
            if is_open:
                self.step(peer.upgrade())
            peer.send(bytes(data[: chance.choice((chance.randrange(len(data)), None))]))
            if i % 3 == 0:
                peer.sock.setsockopt(*RESETTING)
            if i % 3 == 1:
                peer.sock.shutdown(socket.SHUT_WR)
                peer.at_end()
            peer.sock.close()
        wait_until(lambda: len(self.running.connections) == 2, "the others' end")
        wait_until(lambda: threading.active_count() <= before, "their threads' end")
        wait_until(lambda: self.running.app.active == 3)  # one is shared by HTTP
        self.assertIn("observation", self.step(self.first))
        self.first.sock.close()
        self.second.sock.close()
        self.assertFalse(self.running.stop())
        self.assertGreater(self.closed(), 100)

    def test_fault_that_nobody_foresaw_ends_one_connection_only(self) -> None:
        def failing(cls: type, name: str) -> Any:
            return mock.patch.object(cls, name, side_effect=MemoryError)

        for cls, name in ((client.Protocol, "receive"), (server.Session, "answer")):
            peer = self.peer().upgrade()
            self.step(peer)
            with failing(cls, name):
                peer.send(HELLO)
                self.assertTrue(peer.at_end())
        with failing(client.Protocol, "receive"):  # of what is behind the handshake
            self.assertTrue(self.peer().upgrade().at_end())
        with failing(server.App, "use"):
            self.assertEqual(self.http("GET", "/state")[0], 500)
        with failing(server.Handler, "tick") as tick, self.peer():
            wait_until(lambda: tick.called)
        self.assertIn("observation", self.step(self.first))
        wait_until(lambda: self.running.app.active == 2, "the others' end")

    def flood(self, peer: RawPeer, block: bytes) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer.send(block)

    def test_stop_says_goodbye_to_who_always_sends(self) -> None:
        with ThreadPoolExecutor(2) as pool:
            pool.submit(self.flood, self.first, text_frame({"type": "state"}) * 2000)
            self.first.message()
            stopping = pool.submit(self.running.stop)
            last = b""
            with contextlib.suppress(ConnectionResetError):
                while data := self.first.sock.recv(1 << 20):
                    last = (last + data)[-40:]
            self.assertIn(b"\x88\x1d" + close_body(1001), last)
            self.assertEqual(self.second.close_code(), 1001)
            stopping.result(PATIENCE)
            self.first.sock.close()


class OwnThreadTest(ServingTest):
    """An environment that may wait: each session has a thread of its own."""

    kind = Told

    def check_threads(self, lives: list[list[str]]) -> None:
        self.assertEqual([len(set(life)) for life in lives], [1, 1, 1])
        self.assertEqual(len({life[0] for life in lives} - {"reader"}), 3)

    def test_ping_and_close_are_answered_during_a_step(self) -> None:
        third = self.peer().upgrade()
        for peer in (self.first, self.second, third):
            peer.send(WAIT)
        wait_until(lambda: Told.calls.count("wait") == 3)
        for peer, before in ((self.first, b""), (self.second, HELLO)):
            peer.send(frame(9, b"still there?"))
            self.assertEqual(peer.read_frame(), (0x8A, b"still there?"))
            peer.send(before + frame(8, close_body(1000)))
            self.assertEqual(peer.close_code(), 1000)  # and no answer to the step
        Told.gate.set()
        self.assertIn("observation", third.message()["data"])
        wait_until(lambda: self.running.app.active == 1)

    def test_flood_during_a_step_holds_nobody_up(self) -> None:
        for peer, opcode in ((self.first, 9), (self.second, 1)):
            peer.send(WAIT)
            with ThreadPoolExecutor(2) as pool:
                pool.submit(self.flood, peer, frame(opcode) * 5000)
                pool.submit(peer.at_end)
                for _ in range(5):
                    began = time.monotonic()
                    self.assertEqual(self.http("GET", "/health")[0], 200)
                    self.assertLess(time.monotonic() - began, 3)
                peer.sock.shutdown(socket.SHUT_RDWR)

    def test_session_that_gets_no_thread_is_refused_and_no_other(self) -> None:
        peer, failure = self.peer(), RuntimeError("can't start new thread")
        peer.ask(HEALTH)  # this connection has its thread
        with mock.patch.object(threading.Thread, "start", side_effect=failure):
            error = peer.upgrade().message()["data"]
            self.assertEqual(error["code"], "SESSION_ERROR")
            self.assertIn(str(failure), error["message"])
            self.assertEqual(peer.close_code(), 1011)
            self.step(self.second)
        self.assertEqual(self.running.app.active, 2)


# ---------------------------------------------------------------------------
# The command lines
# ---------------------------------------------------------------------------

OWN = """\
from __future__ import annotations
import atexit, multiprocessing, os, time
from benchmark import *
class Own(BenchmarkEnvironment):
    SUPPORTS_CONCURRENT_SESSIONS = NEVER_WAITS = False
    def step(self, action: BenchmarkAction) -> BenchmarkObservation:
        {}
        return super().step(action)
"""
# The type hints of a step that is decorated elsewhere; and two that cannot be served.
MORE = """\
import contextlib
from own import *
@contextlib.contextmanager
def noted():
    yield print('noted')
class 日(Own):
    step = noted()(Own.step)
class Untyped(Own):
    def step(self, action): pass
class Wrong(Own):
    def state(self): pass
"""


class CommandLineTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        (self.folder / "more.py").write_text(MORE, "utf-8")
        self.write_own("pass")

    def write_own(self, *step: str) -> None:
        """Write an environment whose step begins with these statements."""
        (self.folder / "own.py").write_text(OWN.format("\n        ".join(step)))

    def own(self, *options: str, **env: str) -> Command:
        """A server of that environment."""
        options = "--env", "own:Own", *options
        return Command(*options, cwd=self.folder, PYTHONUNBUFFERED="", **env)

    def run_line(self, line: str) -> Done[str]:
        """Run a program of ours; ``NAME=value`` is for its environment."""
        words = line.split()
        env = dict(word.split("=") for word in words if "=" in word)
        words = [str(HERE / w) if ".py" in w else w for w in words if "=" not in w]
        return run(*words, cwd=self.folder, **env)

    def test_imports_leave_out_what_may_not_be_needed(self) -> None:
        unused = "{'argparse', 'asyncio', 'urllib.request'}"
        code = f"import server, sys; print({unused} & set(sys.modules))"
        self.assertEqual(run("-S", "-c", code).stdout, "set()\n")

    def test_programs_say_what_they_should(self) -> None:
        hello = "'Hello' length 5 reward 0.5\n'World' length 5 reward 0.5\n"
        version = f"{benchmark.__version__}\n"
        escaped = "'\\u65e5' length 1 reward 0.1\n"
        for line, output, errors in (
            ("server.py --version", f"server.py {version}", ""),
            ("client.py --version", f"client.py {version}", ""),
            ("client.py Hello World", hello, ""),
            ("client.py Hello World --http", hello, ""),
            ("client.py Hello World --trace", hello, "-> GET /ws HTTP/1.1"),
            ("PYTHONIOENCODING=cp1252 client.py 日", escaped, ""),
        ):
            done = self.run_line(line)
            with self.subTest(line):
                self.assertEqual((done.returncode, done.stdout), (0, output))
                self.assertEqual(done.stderr.partition("\n")[0], errors)
        for program in ("server.py", "client.py"):
            shown = run(program, "--help").stdout
            self.assertIn("--", shown)
            self.assertNotRegex(shown, r"None|\[\]")

    def test_mistake_is_one_line_and_code_2(self) -> None:
        busy = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(busy.close)
        port = busy.getsockname()[1]
        away = "--host 192.0.2.1"  # nobody has this address
        cases = {
            f"server.py --port {port}": f"--port {port}: .*in use",
            "server.py --port x": "--port: invalid int",
            "server.py --port 99999": "--port 99999",
            "PORT=x server.py": r"\$PORT .*'x'",
            "PORT=99999 server.py": r"\$PORT .*'99999'",
            f"PORT= server.py {away}": f"{away} --port 8000",
            f"PORT=1 server.py {away}": f"{away} --port 1:",
            "server.py --host no.such.host.invalid": "cannot listen on --host",
            "server.py --env nothing:Here": "--env nothing:Here: .*nothing",
            "server.py --env benchmark": "--env benchmark: .*module:Class",
            "server.py --env benchmark:Missing": "no class Missing",
            "server.py --env benchmark.x:Missing": "--env .*benchmark",
            "server.py --env more:Untyped": "--env more:Untyped: .*hints",
            "server.py --env more:Wrong": "--env .*Wrong.state is a method",
            "server.py --env own:Own --max-concurrent-envs 2": "-envs > 1 .*SUPPORTS",
            "server.py --max-concurrent-envs 0": "--max-concurrent-envs must",
            "server.py --max-message-mb 0": "--max-message-mb must",
            "server.py --session-timeout -1": "--session-timeout",
            "server.py --nonsense": "--nonsense",
            "server.py --log-level loud": "loud",
            "client.py": "messages",
            "client.py --url 127.0.0.1:1 x": "cannot connect",
            "test_benchmark.py --bench 0": "--bench .* above 0",
            "test_benchmark.py --bench 1 --sessions 0": "--sessions .* above 0",
            "test_benchmark.py --bench 1 --url 127.0.0.1:1": "cannot connect",
            "-I server.py": "client.py is not beside it, or Python's -I",
            "-I client.py": "benchmark.py is not beside it, or Python's -I",
        }
        with ThreadPoolExecutor(4) as pool:
            ends = list(pool.map(self.run_line, cases))
        for (line, words), done in zip(cases.items(), ends):
            with self.subTest(line):
                code = 1 if line.startswith("-I ") else 2
                self.assertEqual((done.returncode, done.stdout), (code, ""))
                self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
                self.assertRegex(done.stderr, words)

    def test_mistake_in_the_module_shows_its_traceback(self) -> None:
        for line in ("import not_there", "open('/no')", "from own import x", "1 / 0"):
            (self.folder / "own.py").write_text(f"{line}\n")
            done = self.run_line("server.py --env own:Own")
            with self.subTest(line):
                self.assertEqual((done.returncode, done.stdout), (1, ""))
                self.assertRegex(done.stderr, "(?s)^Traceback.*own.py., line 1, in")
                self.assertIn(line, done.stderr)

    @unittest.skipUnless(os.path.exists("/dev/full"), "there is no /dev/full")
    def test_output_that_is_full_or_closed_is_no_traceback(self) -> None:
        port = free_port()
        own = f"server.py --log-level warning --port {port}"
        full = "client.py: [Errno 28] No space left on device\n"
        for program, redirect, code, words in (
            ("client.py Hi", ">/dev/full", 2, full),
            ("client.py Hi", ">&-", 0, ""),
            (own, ">/dev/full", 0, ""),
            (own, ">&-", 0, ""),
        ):
            with self.subTest(program, redirect=redirect):
                line = f"exec {shlex.quote(sys.executable)} {program} {redirect}"
                process = subprocess.Popen(["sh", "-c", line], cwd=HERE, **PIPES)
                self.addCleanup(process.kill)
                if program == own:
                    wait_until(lambda: is_healthy(f"http://127.0.0.1:{port}"))
                    process.terminate()
                errors = process.communicate(timeout=PATIENCE)[1]
                self.assertEqual((process.returncode, errors), (code, words))

    def test_bench_measures_a_server(self) -> None:
        for options in "", "--sessions 3", "--http --sessions 2 --size 70000":
            done = self.run_line(f"test_benchmark.py --bench 0.2 --json {options}")
            found = json.loads(done.stdout)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertEqual(found["errors"], 0)
            self.assertGreater(found["steps_per_second"], 0)
            self.assertLessEqual(found["p50_ms"], found["p99_ms"])
        done = self.run_line("test_benchmark.py --bench 0.1")
        self.assertRegex(done.stdout, r"(?m)^steps_per_second  [\d,.]+$")

    def test_environment_of_ones_own(self) -> None:
        with self.own("--env", "more:日", PYTHONIOENCODING="cp1252") as command:
            play = f"play at {command.url}/web, API at {command.url}/docs"
            self.assertEqual(command.line, f"\\u65e5 on {command.url}: {play}")
            for cls in BOTH:
                with cls(command.url) as env:
                    env.reset()
                    self.assertEqual(env.step(BenchmarkAction("x")).reward, 0.1)
        self.assertEqual(command.process.returncode, 0)
        self.assertEqual(command.lines, ["noted", "noted"])
        life = r"session ws-1 opened\n.*session ws-1 closed after 1 step"
        self.assertRegex(command.errors, life)

    def test_log_cannot_be_forged(self) -> None:
        forged = "2026-01-01 INFO forged\\x1b[31m\\x9b"
        self.write_own(f"raise ValueError('x\\n{forged}')")
        with self.own() as command:
            for path in ("/reset", "/close", "/%0aINFO\x80\x9b", "/\x1b[31m"):
                head = f"POST {path} HTTP/1.1\nHOST\nX-Session-Id: a\x9b[31m\xff"
                with RawPeer(command) as peer:
                    self.assertIn(peer.ask(head)[0], (200, 400, 404))
            with BenchmarkEnv(command.url) as env:
                env.reset()
                with self.assertRaises(client.ServerError):
                    env.step(BenchmarkAction("x"))
        self.assertIn(f"\n    {forged}\n", command.errors)
        for line in command.errors.splitlines():
            self.assertRegex(line, r"^(\d{4}-\d\d-\d\d [\d:,]+ (INFO|ERROR) |    )")
            self.assertTrue(line.isascii() and line.isprintable(), line)

    @unittest.skipIf(os.name == "nt", "Windows has no such signals")
    def test_signal_ends_the_server(self) -> None:
        for options in ((), ("--reload",)):
            with Command(*options) as command:
                pass  # it is terminated as soon as it said where it is
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
        self.write_own("print('stuck', flush=True)", "print('kept')", "time.sleep(60)")
        times = []
        for signals, code, kept in ((1, 0, ["kept"]), (2, -signal.SIGINT, [])):
            with self.own() as command, RawPeer(command) as peer:
                peer.upgrade().send(HELLO)
                self.assertEqual(command.next_line(), "stuck")
                began = time.monotonic()
                for _ in range(signals):
                    command.process.send_signal(signal.SIGINT)
                    wait_until(lambda: not is_healthy(command.url))
                self.assertEqual(command.process.wait(PATIENCE), code)
                times.append(time.monotonic() - began)
            self.assertEqual(command.lines, kept)
        self.assertLess(times[0], 5.5)
        self.assertLess(times[1], times[0])

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork")
    def test_exit_is_a_normal_one_and_no_child_holds_a_socket(self) -> None:
        process = "multiprocessing.get_context('fork').Process"
        self.write_own(
            f"daemon = {process}(target=time.sleep, args=(60,), daemon=True)",
            "daemon.start()",
            "child = os.fork() or time.sleep(60) or os._exit(0)",
            "print(daemon.pid, child, flush=True)",
            "atexit.register(print, 'at exit')",
        )
        with self.own() as command, RawPeer(command) as peer:
            peer.upgrade().send(HELLO)
            daemon, child = map(int, command.next_line().split())
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
        self.assertEqual(command.lines, ["at exit"])
        with self.assertRaises(ProcessLookupError):
            os.kill(daemon, 0)

    @unittest.skipIf(os.name == "nt", "Windows has no such signals")
    def test_reload_starts_anew_and_ends_both(self) -> None:
        def echo() -> str:
            with BenchmarkEnvWS(command.url) as env:
                return env.step(BenchmarkAction("x")).observation.echoed_message

        with self.own("--reload") as command:
            self.assertEqual(echo(), "x")
            self.write_own("return 'broken")
            while "SyntaxError" not in (line := command.process.stderr.readline()):
                self.assertNotEqual(line, "")
            self.write_own("action.message *= 3")
            command.next_line()
            self.assertEqual(echo(), "xxx")
            command.process.send_signal(signal.SIGINT)  # to the parent alone
            self.assertEqual(command.process.wait(PATIENCE), 0)
            self.assertFalse(is_healthy(command.url))


# ---------------------------------------------------------------------------
# The page, in a browser
# ---------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
CHROMIUM_FLAGS = """
--headless=new --no-sandbox --disable-gpu --no-first-run --disable-dev-shm-usage
--disable-background-networking --disable-crash-reporter --disable-breakpad
--disable-site-isolation-trials --renderer-process-limit=1 --remote-debugging-port=0
"""
ONLY_HERE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "ArrowDown": (40, "")}
SAID = r"Log\.entryAdded|Runtime\.(exceptionThrown|consoleAPICalled)"
CONTROLS = ("button", "checkbox", "combobox", "link", "spinbutton", "textbox")
MARKUP = "<img src=x onerror=window.hacked=1>"
# Run in every document before its own scripts: short names for the tests, and where one
# letter stands; violations of the policy, said aloud; how much has moved by itself.
PREPARE = """
const one = selector => document.querySelector(selector);
const all = selector => [...document.querySelectorAll(selector)];
const texts = selector => all(selector).map(e => e.value ?? e.textContent);
const faulty = (selector, test) => all(selector)
  .filter(e => e.checkVisibility() && test(e)).map(e => e.outerHTML.slice(0, 100));
const letter = (text, index) => {
  const range = new Range();
  range.setStart(text, index);
  range.setEnd(text, index + 1);
  return range.getBoundingClientRect();
};
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
# Visible text with less than the contrast that WCAG AA asks for; what is wider than its
# place and cannot be scrolled to, or a page wider than the screen; a word or a number in
# two lines.
LOOKS = (
    r"""faulty('body, body *', element => {
      const light = color => color.match(/\d+/g).slice(0, 3).map(part => part / 255)
        .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
        .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0.05);
      const {color, backgroundColor} = getComputedStyle(element);
      if (!/, 0\)/.test(backgroundColor)) element.paper = light(backgroundColor);
      else element.paper = element.parentElement.paper;  // which came before
      const isText = [...element.childNodes].some(node => node.data?.trim());
      const shades = [light(color), element.paper];
      return isText && !element.disabled && Math.max(...shades) < 4.5 * Math.min(...shades);
    })""",
    """faulty('td, dd, pre, textarea, summary, button, html',
      element => element.scrollWidth > element.clientWidth + 1)""",
    r"""faulty('#figures dd, #api td, #rows td:not(:last-child), button', element => {
      const text = element.firstChild, bottom = index => letter(text, index).bottom;
      return [...text.data.matchAll(/[^\s\xad-](?=[^\s\xad])/g)]
        .some(({index}) => bottom(index) < bottom(index + 1) - 9);
    })""",
)
# All that Tab is to reach; and whether where it has come to is covered, or has no ring.
WANTED = """
document.activeElement.blur();
window.wanted = new Set(all('a, button:enabled, select, textarea, summary, [tabindex="0"]')
  .filter(element => element.checkVisibility({visibilityProperty: true})));
wanted.size
"""
FOCUSED = """faulty(':focus', element => {
  wanted.delete(element);
  const {x, y, width, height} = element.getBoundingClientRect();
  const top = document.elementFromPoint(x + Math.min(width, 40) / 2, y + Math.min(height, 20) / 2);
  return !element.contains(top) || getComputedStyle(element).outlineStyle === 'none';
})"""
# Whether the last letter of a text stands on the right of its place.
RIGHT = """['#observation dd', '#log pre'].map(selector => {
  const {left, width} = one(selector).getBoundingClientRect();
  const text = (one(`${selector} span`) ?? one(selector)).firstChild;
  return letter(text, text.data.lastIndexOf('\u05e9')).left > left + width / 2;
})"""


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
        note = self.home / "DevToolsActivePort"
        wait_until(lambda: note.is_file() and "/" in note.read_text(), "Chromium")
        port, path = note.read_text().split()
        url = f"ws://127.0.0.1:{port}{path}"
        self.socket = client.WebSocket.connect(url, timeout=PATIENCE)

    def send(self, method: str, session: Any = None, **params: Any) -> Any:
        """Send a command and return its result; what happens meanwhile goes to `events`."""
        command = {"id": next(self.numbers), "method": method, "params": params}
        where = {"sessionId": session} if session else {}
        self.socket.send(json.dumps({**command, **where}))
        while (answer := json.loads(self.socket.recv())).get("id") != command["id"]:
            self.events.append(answer)
        if "error" in answer:
            raise AssertionError(f"{method}: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """End every process of it, and remove what they wrote."""
        with contextlib.suppress(Exception):  # it may have crashed, or hang
            self.send("Browser.close")
            self.process.wait(PATIENCE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.socket.drop("Chromium has ended")
        wait_until(self.removed, "the end of Chromium")

    def removed(self) -> bool:
        shutil.rmtree(self.home, ignore_errors=True)  # while a process may still write
        return not self.home.exists()


class Proxy(socketserver.BaseRequestHandler):
    """Serves under /some/env what the port `behind` serves under /."""

    behind = 0

    def handle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.behind)) as onward:
            threading.Thread(target=self.pipe, args=(onward, self.request)).start()
            self.pipe(self.request, onward)

    def pipe(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if re.match(rb"(GET|POST) /(?!some/env/)", data):
                    break  # there is nothing else
                target.sendall(data.replace(b" /some/env/", b" /", 1))
            target.shutdown(socket.SHUT_WR)


@dataclass
class FormAction:
    count: int = field(metadata={"minimum": 1, "description": MARKUP})
    words: list[str]
    pick: Literal["plain", "<img src=x onerror=window.hacked=1>"] = "plain"
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
        if action.count == 9:
            result.done, result.reward = True, None
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
        target = self.browser.send("Target.createTarget", url="about:blank")
        self.addCleanup(self.browser.send, "Target.closeTarget", **target)
        attached = self.browser.send("Target.attachToTarget", **target, flatten=True)
        self.session = attached["sessionId"]
        self.send = functools.partial(self.browser.send, session=self.session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Page.addScriptToEvaluateOnNewDocument", source=PREPARE)
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)

    def tearDown(self) -> None:
        """No text became HTML, the console shows nothing, no other host was asked."""
        self.assertEqual(self.evaluate("window.hacked ?? all('img, [onerror]')"), [])
        events = [e for e in self.browser.events if e.get("sessionId") == self.session]
        faults = [json.dumps(e) for e in events if re.match(SAID, e["method"])]
        asked = re.findall(r'"url": "\w+://([^/"]*)', json.dumps(events))
        self.assertEqual(set(asked) - set(self.hosts), set())
        self.assertEqual([f for f in faults if not re.search(self.allowed, f)], [])

    # -- What a person does, and sees ---------------------------------------------

    def visit(self, url: str, ready: str = "true") -> None:
        self.hosts.append(url.split("/")[2])
        self.send("Page.navigate", url=url)
        self.wait_for(f"document.readyState === 'complete' && {ready}")

    def open(self, path: str, running: server.Server | None = None) -> None:
        if running is self.form:
            wait_until(lambda: not self.form.app.active, "a free place")
        drawn = "$('count').textContent" if path == "web" else "!$('main').hidden"
        self.visit(f"{(running or self.running).url}/{path}", drawn)

    def resize(self, width: int) -> None:
        size = {"width": width, "height": 720, "deviceScaleFactor": 1}
        self.send("Emulation.setDeviceMetricsOverride", **size, mobile=width < 600)

    def evaluate(self, script: str) -> Any:
        how = {"awaitPromise": True, "returnByValue": True}
        answer = self.send("Runtime.evaluate", expression=script, **how)
        self.assertNotIn("exceptionDetails", answer, script)
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
        return list(self.evaluate(f"texts(`{selector}`)"))

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

    def look_at(self, number: int) -> str:
        """Open a message, the newest being number 1; return the whole of it."""
        self.click(f"#log details:nth-of-type({number}) summary")
        self.wait_for("one('#log pre')")
        return self.texts("#log pre")[0]

    def attempt(self, name: str) -> str:
        """Press Try it; return what came."""
        result = f"one('#{name} [role=status]')"
        self.evaluate(f"$('{name}').open = true; {result}.replaceChildren()")
        self.click(f"#{name} > button")
        self.wait_for(f"{result}.querySelector('pre')")
        return self.texts(f"#{name} pre")[0]

    def download(self) -> Any:
        folder = {"behavior": "allow", "downloadPath": str(self.browser.home)}
        self.browser.send("Browser.setDownloadBehavior", **folder)
        file = self.browser.home / "episodes.json"
        file.unlink(missing_ok=True)
        self.click("#download")
        wait_until(lambda: file.is_file() and file.stat().st_size, "the download")
        return json.loads(file.read_text("utf-8"))

    def leaving_asks(self) -> bool:
        leave = "dispatchEvent(new Event('beforeunload', {cancelable: true}))"
        return not self.evaluate(leave)

    # -- Play ---------------------------------------------------------------------

    def test_play_an_episode(self) -> None:
        self.open("web")
        self.step(message="Hi")
        self.fill(message="caf\u00e9")
        self.press("Enter", modifiers=8)  # Shift
        self.send("Input.insertText", text="\U0001d11e")
        self.click("#step button")
        self.shows(count="2", reward="0.6", total="0.8", done="no", low="0", high="0.6")
        points = self.evaluate("$('line').getAttribute('points').split(' ')")
        self.assertEqual(len(points), 3)  # the last one twice
        echoed = self.texts("#observation dd")[:2]
        self.assertEqual(echoed, ["caf\u00e9\n\U0001d11e", "6"])
        cells, took = self.texts("#rows td:not(:last-child)"), r"[\d.]+ m?s"
        rows = rf"2 0\.6 {took} 1 0\.2 {took} 0 0\.0 {took}"
        self.assertRegex(" ".join(cells), f"^{rows}$")
        self.assertIn('"echoed_message":"Hi"', self.texts("#rows td:last-child")[1])
        self.step(seed="7", episode_id="named")
        self.shows(count="0")
        self.assertEqual(self.texts("#total"), ["0"])
        self.click("#ask")
        self.shows(observation="named")
        reset = {"type": "reset", "data": {"seed": 7, "episode_id": "named"}}
        last = self.download()[-1]
        self.assertEqual(last, {**last, **reset, "step": 0, "failed": False})

    def test_play_draws_a_form(self) -> None:
        self.resize(1920)
        self.open("web", self.form)
        kinds = self.evaluate("all('#step [name]').map(e => e.localName).join(' ')")
        self.assertEqual(kinds, "textarea textarea select select textarea textarea")
        for name in ("exact", "pick"):
            self.evaluate(f"one(`[name='data.{name}']`).focus()")
            self.press("ArrowDown")
        self.step(count="3", words='["\u00e9"]')
        given = {"count": 3, "words": ["\u00e9"], "pick": MARKUP, "exact": True}
        echoed = json.loads(self.texts("#observation dd")[0])
        self.assertEqual(echoed, {**given, "pace": None, "note": MARKUP})
        self.assertEqual(self.texts("#name"), [MARKUP])
        self.click("#step button")  # scrolls to it: what it does must be in sight
        self.assertGreater(self.evaluate("$('clock').getBoundingClientRect().top"), 0)
        small = "one('svg').clientHeight < 400 && $('observation').clientHeight > 100"
        self.assertTrue(self.evaluate(small))

    def test_play_marks_what_is_invalid(self) -> None:
        self.open("web", self.form)
        marked = "all(':is(select, textarea):invalid').map(e => e.name)"
        for form, given, wrong in (
            ("step", {"count": "0", "words": '["a", 1]'}, ["data.count", "data.words"]),
            ("step", {"count": "1", "words": "["}, ["data.words"]),  # not even sent
            ("reset", {"words": "[]", "seed": "-1"}, ["data.seed"]),
        ):
            self.fill(**given)
            unsent = ["data.words"] if given["words"] == "[" else []
            self.assertEqual(self.evaluate(marked), unsent)  # marks go with a change
            self.click(f"#{form} button")
            self.wait_for(f"String({marked}) === '{','.join(wrong)}'")
            self.assertEqual(self.evaluate("document.activeElement.name"), wrong[0])
            self.assertIn("VALIDATION_ERROR", self.texts(f"#{form} [role=alert]")[0])
        self.assertEqual(len(self.texts("#rows tr")), 1)  # none of them was a step

    def test_play_takes_step_numbers_from_the_environment(self) -> None:
        self.open("web", self.form)
        self.assertEqual(self.step(count="1", words="[]")[0], "1")
        *failed, text = self.step(count="8")
        self.assertEqual(failed[:2], ["1", "failed"])
        self.assertIn(MARKUP, text)
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
        self.assertTrue(self.leaving_asks())
        FormEnvironment.proceed.set()
        self.shows(count="1", done="no")
        took = self.texts("#rows td:nth-child(3)")[0]  # and the state was asked since
        self.assertEqual(self.texts("#clock"), [f"Took {took}"])
        place = "Math.round($('result').getBoundingClientRect().top + scrollY)"
        before = self.evaluate(place)
        self.step(count="9")
        self.shows(done="yes", clock="Took ", reset="Reset begins a new episode")
        self.assertEqual(self.evaluate(place), before)

    def test_numbers_lose_no_digit(self) -> None:
        self.open("web", self.form)
        digits = "123456789012345678901"
        self.assertIn(digits, self.step(count=digits, words="[]", pace="2.0")[-1])
        whole = self.look_at(4)  # the step, as it was sent
        for sent in (whole, self.texts("#log details:nth-of-type(4) code")[0]):
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
        self.assertIn(long, self.look_at(1))

    def test_right_to_left_text_reads_right(self) -> None:
        """In a field and in what came from the right; in JSON, all from the left."""
        self.open("web")
        hebrew = "\u05e9\u05dc\u05d5\u05dd!"
        self.step(message=hebrew, metadata=json.dumps({"all": [hebrew]}))
        self.look_at(2)
        self.assertEqual(self.evaluate(RIGHT), [True, False])
        style = "getComputedStyle(one('#step textarea'))"
        self.assertEqual(self.evaluate(f"{style}.direction"), "rtl")
        # To order a long text takes Firefox minutes, so none is ordered.
        long = (
            f"Object.assign(one('#step textarea'), {{value: '{hebrew}'.repeat(2e4)}})"
        )
        self.evaluate(f"{long}.dispatchEvent(new Event('input', {{bubbles: true}}))")
        self.assertEqual(self.evaluate(f"{style}.unicodeBidi"), "bidi-override")

    def test_many_steps_stay_quick(self) -> None:
        self.open("web")
        self.evaluate("for (let i = 0; i < 300; i++) $('step').requestSubmit()")
        self.shows(count="300")
        counts = self.evaluate("['rows', 'log'].map(id => $(id).childElementCount)")
        self.assertEqual(counts, [100, 100])
        self.assertEqual(len(self.download()), 301)

    def test_leaving_asks_while_there_is_an_episode_to_lose(self) -> None:
        for running, given in (
            (self.running, {"message": "x"}),
            (self.form, {"count": "9", "words": "[]"}),  # it has no reward
        ):
            self.open("web", running)
            self.assertFalse(self.leaving_asks())
            self.step(**given)
            self.assertTrue(self.leaving_asks())
            self.click("#reset button")
            self.shows(count="0")
            self.assertFalse(self.leaving_asks())

    # -- Messages -----------------------------------------------------------------

    def test_messages_show_the_wire_and_send_by_hand(self) -> None:
        self.open("web")
        self.step(message="Hi")
        self.assertEqual(self.texts("#log b")[:2], ["← received", "→ sent"])
        self.assertEqual(json.loads(self.look_at(1))["data"]["reward"], 0.2)
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
        self.click("#evict")  # closes that session, and connects
        self.shows(count="0", post_close="200 OK")
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
        self.look_at(1)
        self.write("#session", "s" * 200)
        self.attempt("post_reset")
        self.attempt("post_step")

    def test_it_looks_right(self) -> None:
        self.prepare()
        self.assertLess(self.evaluate("moved"), 0.1)
        self.evaluate(
            "all('#figures dd').map(e => e.textContent = '-0.000123456789012345678')"
        )
        widths = 305, 360, 740, 768, 1060, 1280, 1920  # the first is 400 % of 1280
        papers = set()
        for scheme, width in itertools.product(("light", "dark"), widths):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            self.send("Emulation.setEmulatedMedia", features=features)
            self.resize(width)
            self.evaluate("scrollTo(0, 0)")
            papers.add(self.evaluate("getComputedStyle(document.body).backgroundColor"))
            beside = "$('wire').offsetTop < $('step').offsetTop"  # Messages, the form
            with self.subTest(scheme=scheme, width=width):
                self.assertEqual([self.evaluate(fault) for fault in LOOKS], [[]] * 3)
                self.assertEqual(self.evaluate(beside), width > 600)
        self.assertEqual(len(papers), 2)

    def test_it_is_used_by_keyboard_alone(self) -> None:
        """Tab reaches all that can be used, in sight; each control has a name."""
        self.prepare()
        for node in self.send("Accessibility.getFullAXTree")["nodes"]:
            if node.get("role", {}).get("value") in CONTROLS:
                self.assertTrue(node["name"]["value"], node)
        for _ in range(self.evaluate(WANTED) + 2):
            self.press("Tab")
            self.assertEqual(self.evaluate(FOCUSED), [])
        self.assertEqual(self.evaluate("[...wanted].map(e => e.outerHTML)"), [])

    def test_it_works_behind_a_prefix_and_in_a_frame(self) -> None:
        Proxy.behind = self.running.server_port
        with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Proxy) as proxy:
            proxy.daemon_threads = True
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
# A block: its language, its text, and that of a block ``text`` right behind it.
FENCED = r"(?ms)^```(\w+)\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?"


def select(language: str, pattern: str = "") -> list[tuple[str, str]]:
    blocks = re.findall(FENCED, README)
    return [b[1:] for b in blocks if b[0] == language and re.search(pattern, b[1])]


def one(language: str, pattern: str = "") -> str:
    ((text, _),) = select(language, pattern)
    return text


def normalize(text: str) -> str:
    """Make equal what differs from run to run: dates, ports, UUIDs, keys."""
    for pattern, name in (
        (r"^((?:<- )?Date:) .*", r"\1 now"),
        (r"(localhost|127\.0\.0\.1):\d+", "localhost:8000"),
        (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "uuid"),
        (r"(Sec-WebSocket-(?:Key|Accept):) \S+", r"\1 key"),
        (r"[ \r]+$", ""),
    ):
        text = re.sub(pattern, name, text, flags=re.MULTILINE)
    return text.strip()


class ReadmeExamplesTest(unittest.TestCase):
    """Every Python block, every command, and every output."""

    maxDiff = None
    # Commands of other programs; and this one.
    OTHERS = ("docker", "openenv", "python -m uvicorn", "python3 -m unittest")

    def test_python_blocks(self) -> None:
        """The first is run in CopiesTest, those of the own environment as files."""
        _, (text, due) = select("python", r"\A(?!# my_)(?![^$]*from_docker_image)")
        shown = output_of(sys.executable, "-c", text)
        self.assertEqual(normalize(shown), normalize(due), text)

    @needs_sh
    def test_commands(self) -> None:
        """In a directory with what they need: servers serve, others end well, with the
        output that is shown.
        """
        shown = re.findall(r"`(python3? [^`]*)`", README)
        for text, _ in select("console"):
            shown += text.split("$ ")[1:]
        for text, _ in select("sh"):
            shown += text.splitlines()
        with tempfile.TemporaryDirectory() as directory, serve() as running:
            here = Path(directory)
            copy_files(here, *(p.name for p in HERE.glob("*.*") if p.is_file()))
            copy_files(here / "vendored")
            (here / "games").mkdir()
            for name in ("my_env.py", "games/guess.py"):
                (here / name).write_text(one("python", "# my_env.py"))
            for part in dict.fromkeys(shown):
                line, _, expected = part.partition("\n")
                command = re.sub(" +#.*", "", line)
                with self.subTest(command):
                    if not command.startswith(self.OTHERS):
                        self.check(command, expected, here, running.url)

    def check(self, command: str, expected: str, here: Path, url: str) -> None:
        if re.search(r"^python3.*\bserver\b", command):
            with Command(program=shlex.split(command)[1:], cwd=here) as own:
                name = command.partition("--allow-origin ")[2] or "localhost"
                answer = exchange(own.url, "GET", "/health", headers={"Host": name})
                self.assertEqual(answer, (200, {"status": "healthy"}))
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
        output = output_of("sh", "-c", command, cwd=here)
        if expected:
            self.assertEqual(normalize(output), normalize(expected))

    def test_languages_and_links(self) -> None:
        """Whatever is fenced is for a test; whatever is linked is there."""
        known = {"sh", "console", "python", "text", "nginx"}
        self.assertLessEqual(set(re.findall(r"(?m)^```(\w+)", README)), known)
        titles = re.findall(r"(?m)^##+ (.*)$", README)
        anchors = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
        self.assertLessEqual(set(re.findall(r"\]\(#([^)]*)\)", README)), anchors)


class ReadmeWebSocketTest(ServerCase):
    """The WebSocket transcript and the bytes in the protocol chapter."""

    def setUp(self) -> None:
        transcript = one("text", "-> GET /ws")
        self.request, self.answer, session = re.split(r"(?m)^(?:->|<-)\n", transcript)
        self.session = [(line[:2], line[3:]) for line in session.splitlines()]
        self.frames = [self.frame_of(*line) for line in self.session]

    def frame_of(self, arrow: str, text: str) -> bytes:
        """The frame of a line: the client's is client.py's, with README.md's key."""
        if arrow == "<-":
            content = (8, b"\x03\xe8") if text == "close 1000" else (1, text.encode())
            return frame(*content, masked=False)
        protocol, key = client.Protocol(True, 1 << 20), bytes.fromhex("37fa213d")
        with mock.patch("os.urandom", lambda size: key[:size]):
            if text == "close 1000":
                protocol.close(1000)
            else:
                protocol.send(text)
        return bytes(protocol.outbox)

    def test_transcript(self) -> None:
        """Play it over a plain socket."""
        peer, head = self.peer(), re.sub("(?m)^-> ", "", self.request.strip())
        peer.request(head.replace("Host: localhost:8000", "HOST"))
        answer = normalize(re.sub("(?m)^<- ", "", self.answer))
        self.assertEqual(normalize(peer.read_head()), answer)
        for (arrow, _), data in zip(self.session, self.frames):
            if arrow == "->":
                peer.send(data)
            else:
                self.assertEqual(peer.read(len(data)), data)
        self.assertTrue(peer.at_end())  # the server closes

    def test_bytes(self) -> None:
        """They are the transcript's, and what stands beside them is what they say."""
        dumps = []
        for text, _ in select("text", r"\A[0-9a-f]{2} "):
            rows = [re.split(r"\s{2,}", row) for row in text.splitlines()]
            dumps.append(bytes.fromhex("".join(row[0] for row in rows)))
        meaning = "".join(row[1] for row in rows[2:])  # beside the last, the answer
        self.assertEqual(meaning.encode(), dumps[-1][2:])
        dumps += map(bytes.fromhex, re.findall(r"`(88(?: [0-9a-f]{2})+)`", README))
        self.assertEqual(self.session[-5], ("->", '{"type":"state"}'))
        self.assertEqual(dumps, self.frames[-5:-3] + self.frames[-2:])

    def test_trace(self) -> None:
        """`client.py --trace` shows the transcript's handshake, and then each frame."""
        (command,) = re.findall(r"`python3 (client\.py --trace .*?)`", README)
        shown = normalize(output_of(sys.executable, *shlex.split(command)))
        self.assertTrue(shown.startswith(normalize(self.request + self.answer)))
        self.assertEqual(shown.count(" FIN=1 opcode=0x1 (text) MASK="), 4)
        for answer in [text for _, text in self.session if '"type":"obs' in text]:
            line = f"<- FIN=1 opcode=0x1 (text) MASK=0 length={len(answer)}  {answer}"
            self.assertIn(f"\n{line}\n", shown)
        end = "<- FIN=1 opcode=0x8 (close) MASK=0 length=2  1000"
        self.assertTrue(shown.endswith(end), shown)

    def test_close_codes(self) -> None:
        """Provoke each code of the table."""
        cases: dict[str, tuple[bytes, dict[str, Any]]] = {
            "1000": (text_frame({"type": "close"}), {}),
            "1001": (b"", {"session_timeout": 0.1}),
            "1002": (frame(1, masked=False), {}),
            "1007": (frame(1, b"\xff"), {}),
            "1009": (frame(1, b" " * 70000), {"max_message_mb": 0.01}),
            "1011": (b"", {"env": [].pop}),  # which fails
            "1013": (b"", {"max_concurrent_envs": 1}),
        }
        self.assertEqual(re.findall(r"(?m)^\| (1\d{3}) \|", README), list(cases))
        for code, (data, options) in cases.items():
            with self.subTest(code), serve(**options) as running:
                first = peer = self.peer(running).upgrade()
                if code == "1013":
                    first.send(text_frame({"type": "state"}))
                    first.message()  # has the place, which the handshake does not say
                    peer = self.peer(running).upgrade()
                peer.send(data)
                self.assertEqual(peer.close_code(), int(code))
                first.sock.close()


class OwnEnvironmentTest(unittest.TestCase):
    """Do what the chapter "Make your own environment" says."""

    def test_as_the_chapter_says(self) -> None:
        (game, _), (own_client, expected), _ = select("python", "^# my_")
        command = one("sh", "--env").splitlines()[0].split()
        with tempfile.TemporaryDirectory() as directory:
            here = Path(directory)
            copy_files(here)
            (here / "my_env.py").write_text(game, "utf-8")
            with Command(program=command[1:], cwd=here) as running:
                url = running.url
                for base in ("WebSocketEnvClient", "HTTPEnvClient"):
                    text = own_client.replace(README_URL, url)
                    text = text.replace("WebSocketEnvClient", base)
                    shown = output_of(sys.executable, "-c", text, cwd=here)
                    self.assertEqual(shown, expected)
                # Now in plain JSON, to its end and past it.
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
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "my_types.py").write_text(one("python", "# my_types.py"))
            with mock.patch.object(sys, "path", [directory, *sys.path]):
                move = __import__("my_types").Move
        schema = server.json_schema(move)
        self.assertEqual(schema["required"], ["number"])
        choices = [{"enum": ["slow", "fast"]}, {"type": "null"}]
        inner = {"type": "object", "additionalProperties": {"type": "integer"}}
        unit = {"minimum": 0, "maximum": 1, "default": 0.5}
        for name, expected in {
            "number": {"type": "integer", "description": "From 1 up", "minimum": 1},
            "confidence": {"type": "number", **unit},
            "pace": {"anyOf": choices, "default": None},
            "limits": {"type": "object", "additionalProperties": inner, "default": {}},
        }.items():
            self.assertEqual(schema["properties"][name], expected)
        wrong = {"number": 0, "confidence": "x", "notes": list(range(10))}
        with self.assertRaises(client.Invalid) as caught:
            client.read_json(move, wrong)
        kinds = [fault["type"] for fault in caught.exception.faults]
        self.assertEqual(kinds, ["greater_than_equal", "float_type", "too_long"])


# ---------------------------------------------------------------------------
# Deployment: copies of the files, the image, nginx
# ---------------------------------------------------------------------------

MYPY = os.environ.get("MYPY") or shutil.which("mypy")  # the path of a mypy


class CopiesTest(unittest.TestCase):
    """The files in the table of what to copy, at the top level and inside a package."""

    TYPES = """
import DOT.client
from DOT.benchmark import BenchmarkAction, BenchmarkEnvironment
from DOT.benchmark import BenchmarkEnv, BenchmarkEnvWS, StepResult

action = BenchmarkAction("Hi")
reveal_type(BenchmarkEnvironment().step(action))
with BenchmarkEnv("") as over_http, BenchmarkEnvWS("") as over_websocket:
    reveal_type(over_http.step(action).observation)
    reveal_type(over_websocket.step(action).observation)
reveal_type(StepResult(BenchmarkEnv("").reset().observation).observation)
with DOT.client.BenchmarkEnv("") as over_http:
    reveal_type(over_http.step(action).observation)
with DOT.client.BenchmarkEnvWS("") as over_websocket:
    reveal_type(over_websocket.step(action).observation)
"""

    def copies(self, *names: str) -> Iterator[tuple[Path, str]]:
        """Yield, for both, a directory and what to put before a module's name."""
        for package in ("", "vendored"):
            with tempfile.TemporaryDirectory() as directory:
                copy_files(Path(directory, package), *names)
                if package:
                    Path(directory, package, "__init__.py").touch()
                yield Path(directory), package and f"{package}."

    def test_subsets(self) -> None:
        table = README.partition("| to | copy |")[2].partition("\nThe other")[0]
        rows = [re.findall(r"`(\w+\.py)`", line) for line in table.splitlines()[2:]]
        self.assertEqual([len(row) for row in rows], [1, 2, 3])
        over_http, output = select("python")[0]
        over_websocket = re.sub(r"\bBenchmarkEnv\b", "BenchmarkEnvWS", over_http)
        checks = "reset: ok\nstep: ok\nstate: ok\nrewards: ok\n"
        with serve() as running:
            for row, (here, prefix) in ((r, c) for r in rows for c in self.copies(*r)):
                steps = [(["-m", f"{prefix}benchmark"], checks)]
                if "client.py" in row:
                    for text in (over_http, over_websocket):
                        text = text.replace(README_URL, running.url)
                        text = text.replace("from ", f"from {prefix}")
                        steps.append((["-c", text], output))
                if "server.py" in row:
                    step = "'Hi' length 2 reward 0.2\n"
                    steps.append((["-m", f"{prefix}client", "Hi"], step))
                for command, expected in steps:
                    shown = output_of(sys.executable, *command, cwd=here)
                    self.assertEqual(shown, expected)

    @unittest.skipUnless(MYPY, "set MYPY to the path of a mypy")
    def test_types(self) -> None:
        """What a type checker sees of them."""
        for here, prefix in self.copies():
            (here / "training.py").write_text(self.TYPES.replace("DOT.", prefix))
            shown = output_of(str(MYPY), "--strict", "--cache-dir=cache", ".", cwd=here)
            found = re.findall(r'Revealed type is "(.*?)"', shown)
            self.assertIn("Success: no issues found", shown)
            self.assertEqual(found, [f"{prefix}benchmark.BenchmarkObservation"] * 6)


class ProjectFilesTest(unittest.TestCase):
    """Facts that several files state, and that must agree."""

    def test_heads(self) -> None:
        """The version, in files that may be copied alone; the licence everywhere."""
        for path in (*HERE.glob("*.py"), HERE / "Dockerfile"):
            first, _, text = path.read_text("utf-8").partition("\n")
            self.assertEqual(first, "# SPDX-License-Identifier: BSD-3-Clause", path)
            if path.name in ("benchmark.py", "client.py", "server.py"):
                head = text.partition("from __future__")[0].replace("\n", " ")
                self.assertIn(f"version {benchmark.__version__}", head)
        text = README.partition("\n## Licence\n")[2]
        self.assertTrue(text.startswith("\nBSD-3-Clause. Copyright 2026"))
        self.assertEqual(len(re.findall(r"(?m)^\d\. ", text)), 3)
        self.assertTrue(text.endswith("POSSIBILITY OF SUCH DAMAGE.\n"))

    def test_facts(self) -> None:
        """Port 8000, and what else Spaces, openenv, Docker and Kubernetes are told."""
        space = "title: Benchmark Environment Server|sdk: docker|emoji: 📏|"
        space += "app_port: 8000|base_path: /web|pinned: false|tags:\n  - openenv|"
        space += "colorFrom: red|colorTo: red"
        app = "spec_version: 1|name: benchmark|type: space|port: 8000|app: server:main"
        command = '["python", "server.py", "--host", "0.0.0.0", "--port", "8000"]'
        for text, facts in (
            (README.split("---")[1], space),
            (read("openenv.yaml"), app),
            (read("Dockerfile"), f"USER 1000|EXPOSE 8000|CMD {command}"),
        ):
            for fact in facts.split("|"):
                self.assertIn(f"\n{fact}\n", f"\n{text}")
        self.assertTrue(callable(server.main))
        pods = README.partition("**Kubernetes.**")[2].partition("\n")[0]
        self.assertEqual(set(re.findall(r"[pP]ort:? (\d+)", pods)), {"8000"})
        for words in ("`/health` on port 8000", "`sessionAffinity: ClientIP`"):
            self.assertIn(words, pods)
        grace = re.findall(r"terminationGracePeriodSeconds: (\d+)", pods)[0]
        self.assertGreater(int(grace), server.GRACE_SECONDS + 0.5)

    def test_image(self) -> None:
        base, (*copied, _) = in_dockerfile("FROM"), in_dockerfile("COPY").split()
        self.assertRegex(base, r"^python:3\.\d+-slim$")
        self.assertIn(f"`{base}`", README)
        self.assertNotIn("\nRUN", read("Dockerfile"))
        self.assertTrue(all((HERE / name).is_file() for name in copied))
        if (HERE / ".dockerignore").exists():
            kept = re.findall(r"(?m)^!(.*)$", read(".dockerignore"))
            self.assertEqual(kept, copied)

    def test_healthcheck(self) -> None:
        """It exits 0 for a healthy server, and with an error where there is none."""
        _, option, code = json.loads(in_dockerfile("HEALTHCHECK .* CMD"))
        with serve() as running:
            code = code.replace("8000", str(running.server_port))
            output_of(sys.executable, option, code)
        with self.assertRaises(AssertionError):
            output_of(sys.executable, option, code)

    def test_options(self) -> None:
        """README.md lists the options that server.py has."""
        table = README.partition("\n## Run it")[2].partition("\n## ")[0]
        rows = " ".join(re.findall(r"(?m)^\| (`--.*?`) \|", table))
        shown = output_of(sys.executable, HERE / "server.py", "--help")
        options = re.findall(r"(?m)^  (?:-h, )?(--[a-z-]+)", shown)
        self.assertEqual(set(re.findall(r"--[a-z-]+", rows)), set(options))


NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@unittest.skipUnless(NGINX, "there is no nginx")
class NginxTest(unittest.TestCase):
    """README.md's nginx configuration in front of two servers."""

    HOST = "env.example.com"
    servers: list[server.Server]
    url: str

    @classmethod
    def setUpClass(cls) -> None:
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        both = serve(allow_origins=[cls.HOST]), serve(allow_origins=[cls.HOST])
        cls.servers = [stack.enter_context(running) for running in both]
        here = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        here.chmod(0o755)
        address = f"127.0.0.1:{free_port()}"
        cls.url = f"http://{address}"
        config = one("nginx").replace("listen 80;", f"listen {address};")
        for port, running in zip((8001, 8002), both):
            config = config.replace(f":{port};", f":{running.server_port};")
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):
            config += f"{name}_temp_path {here}/{name};\n"
        (here / "nginx.conf").write_text(
            f"daemon off; pid {here}/pid; error_log {here}/log;\n"
            f"events {{ worker_connections 4096; }} http {{ access_log off; {config} }}"
        )
        command = [str(NGINX), "-c", f"{here}/nginx.conf"]
        process = stack.enter_context(subprocess.Popen(command))
        stack.callback(process.terminate)
        wait_until(lambda: is_healthy(cls.url), "nginx")

    def test_sessions(self) -> None:
        """200 sessions keep their steps; a server that stops loses its own only."""
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
            return Counter(pool.map(step, range(200)))

        with ThreadPoolExecutor(20) as pool:
            first = self.servers[0]
            exchange(first.url, "POST", "/close")  # the session that other tests share
            list(pool.map(lambda env: env.reset(), envs))
            for number in (1, 2, 3):
                self.assertEqual(steps(), {number: 200})
            lost_ws = sum(isinstance(c, server.Connection) for c in first.all())
            lost_http = first.app.active - lost_ws
            first.stop()
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
        names = {running.url for running in self.servers}
        for url in names:
            exchange(url, "POST", "/reset", {"episode_id": url})
        seen = {exchange(self.url, "GET", "/state")[1]["episode_id"] for _ in range(4)}
        self.assertEqual(seen, names)

    def test_pages(self) -> None:
        """A page of the site may call, over both transports; another site's may not."""
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
# What it runs: tests against three servers of this project, and a server of its own.
OPENENV_TESTS = """
import asyncio, math, pathlib, socket, sys, threading, time, unittest, uvicorn
from openenv import AutoEnv, GenericEnvClient
from openenv.cli.__main__ import app as cli
from typer.testing import CliRunner

_, URL, TWO_PLACES, SLEEPY, BROKEN = sys.argv

def openenv(*arguments):
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    return done.output

class OpenEnvTest(unittest.TestCase):
    def test_capacity_and_sessions(self):
        with GenericEnvClient(base_url=TWO_PLACES).sync() as parent:
            child = parent.new_session()
            parent.reset(episode_id="parent")
            child.reset(episode_id="child")
            child.step({"message": "Hi"})
            self.assertEqual(parent.state(), {"episode_id": "parent", "step_count": 0})
            self.assertEqual(child.state(), {"episode_id": "child", "step_count": 1})
            error = r"^Server error: .* \\(code: CAPACITY_REACHED\\)$"
            with GenericEnvClient(base_url=TWO_PLACES).sync() as third:
                with self.assertRaisesRegex(RuntimeError, error):
                    third.reset()

    def test_clients(self):
        for host in "localhost", "0.0.0.0":  # the addresses of its guides
            url = URL.replace("127.0.0.1", host)
            for client in (
                GenericEnvClient(base_url=url).sync(),
                GenericEnvClient(base_url=url),  # a plain `with`
                GenericEnvClient(base_url=url.replace("http:", "ws:") + "/").sync(),
                AutoEnv.from_env("benchmark", base_url=url, skip_install=True).sync(),
            ):
                with client as env:
                    self.assertEqual(env.reset(episode_id="e1").reward, 0.0)
                    result = env.step({"message": "Hi", "metadata": {"turn": 1}})
                    self.assertEqual(result.observation["echoed_message"], "Hi")
                    self.assertEqual((result.reward, result.done), (0.2, False))
                    self.assertEqual(result.metadata, {"step": 1})
                    self.assertEqual(env.state(), {"episode_id": "e1", "step_count": 1})

    def test_clients_asynchronous(self):  # the first that of an installed package
        async def play():
            async with AutoEnv.from_env("benchmark", base_url=URL) as env:
                first = await env.reset(seed=1, episode_id="e1")
                name = type(first.observation).__name__
                self.assertEqual(name, "BenchmarkObservation")
                self.assertEqual((first.reward, first.done), (0.0, False))
                self.assertIsNone(first.metadata)
                for message in "Hi", "", "x" * 200_000, "𝄞":
                    result = await env.step(BenchmarkAction(message=message))
                    self.assertEqual(result.observation.echoed_message, message)
                    self.assertEqual(result.observation.message_length, len(message))
                    self.assertEqual(result.reward, len(message) / 10)
                self.assertEqual(result.metadata, {"step": 4})
                state = await env.state()
                self.assertEqual((state.episode_id, state.step_count), ("e1", 4))

            async with GenericEnvClient(base_url=URL) as env:
                self.assertEqual((await env.reset()).reward, 0.0)
                result = await env.step({"message": "Hi"})
                self.assertEqual(result.observation["echoed_message"], "Hi")

        from benchmark.client import BenchmarkAction
        asyncio.run(play())

    def test_close_during_a_step_is_answered_at_once(self):
        # Its client waits for that before it connects again after a timeout.
        with GenericEnvClient(base_url=SLEEPY, message_timeout_s=1).sync() as env:
            env.reset()
            with self.assertRaises(asyncio.TimeoutError):
                env.step({"message": "9"})
            began = time.monotonic()
            env._async._message_timeout = 60
            env.reset(episode_id="next")
            self.assertLess(time.monotonic() - began, 5)
            self.assertEqual(env.state(), {"episode_id": "next", "step_count": 0})

    def test_error_codes(self):
        with (
            GenericEnvClient(base_url=SLEEPY).sync() as env,
            GenericEnvClient(base_url=BROKEN).sync() as broken,
        ):
            for code, call, *argument in (
                ("INVALID_JSON", env.step, {"message": math.nan}),
                ("UNKNOWN_TYPE", env._send_and_receive, {"type": "jump"}),
                ("VALIDATION_ERROR", env.step, {"mesage": "0"}),
                ("EXECUTION_ERROR", env.step, {"message": "no number"}),
                ("FACTORY_ERROR", broken.reset),
            ):
                error = rf"(?s)^Server error: .* \\(code: {code}\\)$"
                with self.assertRaisesRegex(RuntimeError, error):
                    call(*argument)
            self.assertEqual(env.step({"message": "0"}).reward, 0.1)  # it goes on

    def test_step_of_45_seconds(self):
        with GenericEnvClient(base_url=SLEEPY).sync() as env:
            env.reset()
            began = time.monotonic()
            self.assertEqual(env.step({"message": "45"}).reward, 0.2)
            self.assertGreaterEqual(time.monotonic() - began, 45)
            self.assertEqual(env.state()["step_count"], 1)

    def test_validate(self):
        report = openenv("validate", "files", "--level", "static", "--skip-build")
        self.assertIn("Verdict: PASS", report)
        report = openenv("validate", "--url", URL)
        self.assertIn("mode: simulation", report)
        self.assertNotIn("FAIL", report)

openenv("init", "benchmark")
file = pathlib.Path("benchmark", "server", "app.py")
text = file.read_text()
file.write_text(text.replace("max_concurrent_envs=1", "max_concurrent_envs=2"))
from benchmark.server.app import app
its = uvicorn.Server(uvicorn.Config(app, ws_ping_interval=5, ws_ping_timeout=5))
listener = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=its.run, args=[[listener]], daemon=True).start()
print("its port is", listener.getsockname()[1])
print("ready", flush=True)
unittest.main(argv=["openenv"], exit=False)
print("end", flush=True)
sys.stdin.read()  # its server runs on
"""


class Sleepy(BenchmarkEnvironment):
    """Its steps take as many seconds as their message says, and fail if it says none."""

    NEVER_WAITS = False

    def step(self, action: BenchmarkAction, timeout_s: Any = None) -> Any:
        time.sleep(float(action.message))
        return super().step(action)


@unittest.skipUnless(OPENENV, "set OPENENV_PYTHON to a Python with openenv 0.10.0")
class InteroperationTest(ServerCase):
    """openenv's clients and tools with this server, this project's clients with its."""

    process: Any
    its_url: str
    idle: BenchmarkEnvWS

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        here = Path(folder.name)  # `openenv init` makes a package in it
        copy_files(here / "files")
        copy_files(here / "files", "Dockerfile", "README.md", "openenv.yaml")
        installed = here / "openenv_benchmark-0.1.0.dist-info"
        installed.mkdir()
        (installed / "METADATA").write_text("Name: openenv-benchmark\nVersion: 0.1.0\n")
        ours = serve(max_concurrent_envs=2), serve(Sleepy), serve([].pop)  # which fails
        servers = cls.running, *ours
        for other in ours:
            cls.addClassCleanup(other.stop)
        command = [OPENENV, "-c", OPENENV_TESTS, *(each.url for each in servers)]
        env = environment(XDG_CACHE_HOME=folder.name, NO_PROXY="*")
        pipes = {**PIPES, "stdin": subprocess.PIPE, "stderr": subprocess.STDOUT}
        cls.process = subprocess.Popen(command, cwd=here, env=env, **pipes)
        cls.addClassCleanup(cls.process.communicate)
        cls.addClassCleanup(cls.process.kill)
        said = cls.read_until("ready")
        found = re.search(r"its port is (\d+)", said)
        assert found, said
        cls.its_url = f"http://127.0.0.1:{found[1]}"
        wait_until(lambda: is_healthy(cls.its_url), "the health of openenv's server")
        cls.idle = BenchmarkEnvWS(cls.its_url)
        cls.addClassCleanup(cls.idle.close)
        cls.idle.reset()

    @classmethod
    def read_until(cls, last: str) -> str:
        return "".join(itertools.takewhile(f"{last}\n".__ne__, cls.process.stdout))

    def test_its_clients_and_tools(self) -> None:
        said = self.read_until("end")
        self.assertTrue("\nOK\n" in said, said)
        # And for as long this client was idle, under the pings of its server.
        self.assertEqual(self.idle.step(BenchmarkAction("Hi")).reward, 0.2)
        self.assertEqual(self.idle.state().step_count, 1)

    def test_these_clients(self) -> None:
        """Over HTTP its server makes an environment for each request."""
        for cls, last, state in ((BenchmarkEnv, 1, 0), (BenchmarkEnvWS, 3, 3)):
            with self.subTest(cls), cls(self.its_url) as env:
                first = env.reset(episode_id="e1")
                self.assertEqual((first.reward, first.metadata), (0.0, None))
                for message in ("Hi", "", "𝄞" * 70_000):
                    result = env.step(BenchmarkAction(message))
                    self.assertEqual(result.observation.echoed_message, message)
                    self.assertEqual(result.observation.message_length, len(message))
                    self.assertEqual(result.reward, min(len(message) * 0.1, 1.0))
                self.assertEqual(result.observation.metadata["step"], last)
                self.assertEqual(result.metadata, result.observation.metadata)
                self.assertEqual(env.state().step_count, state)
                self.assertEqual(env.state().episode_id == "e1", bool(state))
                with self.assertRaisesRegex(RuntimeError, "VALIDATION_ERROR"):
                    env.step({"mesage": "x"})  # type: ignore[arg-type]

    def test_these_clients_say_that_its_server_is_full(self) -> None:
        with BenchmarkEnvWS(self.its_url) as second:
            second.reset()  # `idle` has the other of its two places
            third = BenchmarkEnvWS(self.its_url)
            with third, self.assertRaisesRegex(RuntimeError, "CAPACITY_REACHED"):
                third.reset()


# ---------------------------------------------------------------------------
# The load benchmark: python3 test_benchmark.py --bench SECONDS
# ---------------------------------------------------------------------------


class Lane:
    """One session of the benchmark: it sends the same request again and again.

    Requests are made once, and answers are not parsed: the server is what is measured.
    """

    def __init__(self, url: str, message: str, http: bool) -> None:
        self.http, step = http, {"message": message}
        requests: dict[str, bytes] = {}
        if http:
            _, host, port, path = client.split_url(url)
            self.sock = socket.create_connection((host, port), 10)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            head = f"Host: {host}:{port}\r\nX-Session-Id: {os.urandom(8).hex()}\r\n"
            head += "Content-Type: application/json\r\nContent-Length: "
            for name, body in ("reset", "{}"), ("step", json.dumps({"action": step})):
                text = f"{path}/{name} HTTP/1.1\r\n{head}{len(body)}\r\n\r\n{body}"
                requests[name] = f"POST {text}".encode()
        else:
            self.sock = client.WebSocket.connect(f"{url}/ws").sock
            requests["reset"] = text_frame({"type": "reset", "data": {}})
            requests["step"] = text_frame({"type": "step", "data": step})
        self.requests = requests
        self.sock.settimeout(60)
        self.file = self.sock.makefile("rb")

    def send(self, name: str) -> None:
        self.sent_at = time.perf_counter()
        self.sock.sendall(self.requests[name])

    def receive(self) -> bytes:
        """Receive an answer, in JSON."""
        lines = itertools.takewhile(bytes.strip, self.file)  # up to the empty one
        head = b"".join(lines) if self.http else self.file.read(2)
        if len(head) < 2:
            raise ConnectionError("the server closed the connection")
        if self.http:
            found = re.search(rb"(?i)\ncontent-length: *(\d+)", head)
            return self.file.read(int(found[1]) if found else 0)
        size = head[1]
        if size > 125:
            size = int.from_bytes(self.file.read(2 if size == 126 else 8), "big")
        data = self.file.read(size)
        if head[0] != 0x89:
            return data
        self.sock.sendall(frame(10, data))
        return self.receive()


def bench(url: str, options: Any) -> dict[str, Any]:
    """Measure a server: on each session, one step after the other for so many seconds.

    Returns: steps per second, latencies and times of connecting and resetting in
    milliseconds, and the number of answers that were no observation.
    """
    if client.split_url(url)[0]:
        raise ValueError("http:// and ws:// only: else TLS would be measured")
    errors, message = 0, "x" * options.size
    began = time.perf_counter()
    lanes = [Lane(url, message, options.http) for _ in range(options.sessions)]
    connecting = time.perf_counter() - began
    selector = selectors.DefaultSelector()
    for lane in lanes:
        selector.register(lane.sock, selectors.EVENT_READ, lane)

    def measure(name: str, seconds: float) -> tuple[list[float], float]:
        """Send this on each session, again and again for so long; return how long each
        answer took, and all of it.
        """
        nonlocal errors
        times: list[float] = []
        began = now = time.perf_counter()
        tell = began + 1 if sys.stderr.isatty() else float("inf")
        for lane in lanes:
            lane.send(name)
        waiting = len(lanes)
        while waiting:
            ready = lanes  # a single session is simply waited for
            if len(lanes) > 1:
                ready = [key.data for key, _ in selector.select(60)]
            if not ready:
                raise TimeoutError("no session was answered within 60 s")
            for lane in ready:
                errors += b'"observation"' not in lane.receive()
                now = time.perf_counter()
                times.append(now - lane.sent_at)
                if now < began + seconds:
                    lane.send(name)
                else:
                    waiting -= 1
            if now > tell:
                tell = now + 1
                rate = f"{len(times) / (now - began):,.0f} steps/s"
                print(f"{rate} ", end="\r", file=sys.stderr, flush=True)
        return sorted(times), now - began

    def milliseconds(times: list[float], part: float) -> float:
        return round(times[min(int(len(times) * part), len(times) - 1)] * 1000, 3)

    parts = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99, "max_ms": 1}
    resets, _ = measure("reset", 0)
    steps, seconds = measure("step", options.bench)
    for lane in lanes:
        lane.sock.close()
    return {
        "transport": "http" if options.http else "websocket",
        "sessions": options.sessions,
        "message_bytes": options.size,
        "steps": len(steps),
        "steps_per_second": round(len(steps) / seconds, 1),
        **{name: milliseconds(steps, part) for name, part in parts.items()},
        "connect_ms": round(connecting * 1000, 3),
        "reset_p50_ms": milliseconds(resets, 0.5),
        "errors": errors,
    }


def main() -> None:
    """Run the tests; with ``--bench`` the benchmark."""
    if not any(argument.startswith("--bench") for argument in sys.argv):
        unittest.main()
    about = "Measure a server; without --url one of its own."
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
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
    server.raise_file_limit()  # a thousand sockets need room
    try:
        if options.url:
            result = bench(options.url, options)
        else:
            limit = "--max-concurrent-envs", str(options.sessions)
            with Command("--log-level", "warning", *limit) as own:
                result = bench(own.url, options)
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:>16}  {value if isinstance(value, str) else format(value, ',')}")


if __name__ == "__main__":
    main()
