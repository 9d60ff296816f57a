"""Tests of the Benchmark environment, its server and its clients: ``python3 -m unittest``.

They go through what people use: a socket, a URL, a command, a browser. Every server gets
a free port; conditions are waited for, not times. Raw sockets here speak WebSocket by
code of their own (`RawPeer`), so that client.py is not judged by itself.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import enum
import functools
import http.client
import io
import itertools
import json
import logging
import os
import random
import re
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
import unittest
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Optional
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

    def __init__(self, running: server.Server) -> None:
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
        done = subprocess.run(
            [sys.executable, "-S", "-c", code],
            cwd=HERE,
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertEqual((done.stdout, done.stderr), ("False\n", ""))
        with self.assertRaises(AttributeError):
            benchmark.Nothing  # noqa: B018

    def test_self_check(self) -> None:
        done = subprocess.run(
            [sys.executable, "benchmark.py"],
            cwd=HERE,
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertEqual(done.returncode, 0)
        names = [line.partition(":")[0] for line in done.stdout.splitlines()]
        self.assertEqual(names, ["reset", "step", "state", "rewards"])

        def nothing(*_: Any) -> BenchmarkObservation:
            return BenchmarkObservation()

        broken = mock.patch.object(BenchmarkEnvironment, "step", nothing)
        with broken, contextlib.redirect_stdout(io.StringIO()) as output:
            self.assertEqual(benchmark._check(), 1)
        self.assertIn("rewards: FAILED", output.getvalue())


# ---------------------------------------------------------------------------
# JSON Schema, validation, and dataclasses
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
    anything: Any = None


class SchemaTest(unittest.TestCase):
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
        "anything": [1, {"b": None}],
    }

    def faults(self, **changes: Any) -> list[tuple[str, list[Any]]]:
        schema = server.json_schema(Everything)
        found = server.validator(schema)({**self.GOOD, **changes}, ("body",))
        return [(fault["type"], fault["loc"][1:]) for fault in found]

    def test_value_survives_the_way_there_and_back(self) -> None:
        self.assertEqual(self.faults(), [])
        value = client.from_json(Everything, self.GOOD)
        self.assertEqual(value.color, Color.RED)
        self.assertEqual(value.either, Point(5))
        self.assertEqual(value.points, [Point(1)])
        self.assertEqual((value.pair, value.tags), ((1, "a"), {"t"}))
        self.assertIsInstance(value.point.y, float)
        again = client.from_json(Everything, json.loads(client.encode_json(value)))
        self.assertEqual(again, value)

    def test_every_fault_is_listed(self) -> None:
        cases: list[tuple[dict[str, Any], list[tuple[str, list[Any]]]]] = [
            ({"number": "3"}, [("int_type", ["number"])]),
            ({"number": True}, [("int_type", ["number"])]),
            ({"number": 1.5}, [("int_type", ["number"])]),
            ({"number": 2.0}, []),
            ({"number": 0}, [("greater_than_equal", ["number"])]),
            ({"number": 10}, [("less_than_equal", ["number"])]),
            ({"color": "green"}, [("enum", ["color"])]),
            (
                {"point": {"y": "a", "z": 1}},
                [
                    ("missing", ["point", "x"]),
                    ("float_type", ["point", "y"]),
                    ("extra_forbidden", ["point", "z"]),
                ],
            ),
            ({"points": [{"x": 1}, 2]}, [("dict_type", ["points", 1])]),
            ({"pair": [1]}, [("too_short", ["pair"])]),
            ({"pair": ["a", "b"]}, [("int_type", ["pair", 0])]),
            ({"either": 5}, [("dict_type", ["either"])]),
            ({"either": None}, []),
            ({"names": {"a": "b"}}, [("int_type", ["names", "a"])]),
            ({"tags": "t"}, [("list_type", ["tags"])]),
            ({"size": 1}, [("enum", ["size"])]),
        ]
        for changes, expected in cases:
            with self.subTest(changes=changes):
                self.assertEqual(self.faults(**changes), expected)

    def test_schema_has_the_parts_openenv_names(self) -> None:
        schema = server.json_schema(BenchmarkAction)
        self.assertLessEqual(
            {"title", "description", "properties", "required", "additionalProperties"},
            set(schema),
        )
        self.assertEqual(schema["required"], ["message"])
        self.assertFalse(server.validator(schema)(server.example(schema), ()))
        everything = server.json_schema(Everything)
        self.assertFalse(server.validator(everything)(server.example(everything), ()))

    def test_types_without_a_schema_are_refused(self) -> None:
        @dataclass
        class Odd:
            when: complex

        for cls in (Odd, int, BenchmarkAction("x")):
            with self.assertRaises(TypeError):
                server.json_schema(cls)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------
# HTTP
# ---------------------------------------------------------------------------


class HTTPTest(ServerCase):
    def test_environment_endpoints(self) -> None:
        session = {"X-Session-Id": "endpoints"}
        status, answer = self.http(
            "POST", "/reset", {"seed": 3, "episode_id": "e1"}, session
        )
        self.assertEqual(status, 200)
        self.assertEqual(
            answer,
            {
                "observation": {
                    "echoed_message": "Benchmark environment ready!",
                    "message_length": 0,
                    "metadata": {},
                },
                "reward": 0.0,
                "done": False,
            },
        )
        body = {
            "action": {"message": "Hi"},
            "timeout_s": 5,
            "request_id": "r",
            "other": 1,
        }
        status, answer = self.http("POST", "/step", body, session)
        self.assertEqual(
            (status, answer["observation"]["echoed_message"], answer["reward"]),
            (200, "Hi", 0.2),
        )
        self.assertEqual(
            self.http("GET", "/state?x=1", headers=session),
            (200, {"episode_id": "e1", "step_count": 1}),
        )
        self.assertEqual(self.http("GET", "/%73tate", headers=session)[0], 200)
        self.assertEqual(self.http("POST", "/close", headers=session)[0], 200)
        self.assertEqual(self.http("GET", "/state", headers=session)[0], 404)

    def test_information_endpoints(self) -> None:
        self.assertEqual(self.http("GET", "/health"), (200, {"status": "healthy"}))
        self.assertEqual(
            set(self.http("GET", "/schema")[1]), {"action", "observation", "state"}
        )
        metadata = self.http("GET", "/metadata")[1]
        self.assertEqual(metadata["name"], "BenchmarkEnvironment")
        self.assertEqual(metadata["version"], benchmark.__version__)
        self.assertEqual(
            set(metadata),
            {
                "name",
                "description",
                "version",
                "readme_content",
                "author",
                "documentation_url",
            },
        )
        with self.peer() as peer:
            peer.request("GET / HTTP/1.1\nHOST")
            status, fields, _ = peer.response()
            self.assertEqual((status, fields["location"]), (307, "web"))

    def test_mcp_answers_json_rpc(self) -> None:
        cases: list[tuple[Any, int]] = [
            ("{", -32700),
            ({}, -32600),
            ([], -32600),
            ({"jsonrpc": "2.0", "method": 5, "id": 1}, -32600),
            ({"jsonrpc": "2.0", "method": "tools/list", "id": 1}, -32603),
            (
                {"jsonrpc": "2.0", "method": "tools/call", "id": "a", "params": {}},
                -32603,
            ),
            ({"jsonrpc": "2.0", "method": "other", "id": 1}, -32601),
        ]
        for body, code in cases:
            status, answer = self.http("POST", "/mcp", body)
            self.assertEqual(
                (status, answer["jsonrpc"], answer["error"]["code"]), (200, "2.0", code)
            )
            if isinstance(body, dict) and code != -32600:
                self.assertEqual(answer["id"], body["id"])

    def test_bad_requests_name_every_fault(self) -> None:
        cases: list[tuple[str, Any, list[tuple[str, list[Any]]]]] = [
            ("/step", {}, [("missing", ["body", "action"])]),
            ("/step", [], [("dict_type", ["body"])]),
            ("/step", {"action": 5}, [("dict_type", ["body", "action"])]),
            (
                "/step",
                {"action": {"message": 5}},
                [("string_type", ["body", "action", "message"])],
            ),
            (
                "/step",
                {"action": {"m": 1, "metadata": 2}, "timeout_s": 0},
                [
                    ("missing", ["body", "action", "message"]),
                    ("extra_forbidden", ["body", "action", "m"]),
                    ("dict_type", ["body", "action", "metadata"]),
                    ("greater_than", ["body", "timeout_s"]),
                ],
            ),
            (
                "/step",
                {"action": {"message": ""}, "request_id": "x" * 256},
                [
                    ("string_too_long", ["body", "request_id"]),
                ],
            ),
            (
                "/reset",
                {"seed": -1, "episode_id": 5},
                [
                    ("greater_than_equal", ["body", "seed"]),
                    ("string_type", ["body", "episode_id"]),
                ],
            ),
        ]
        for path, body, expected in cases:
            with self.subTest(path=path, body=body):
                status, answer = self.http("POST", path, body)
                self.assertEqual(status, 422)
                self.assertEqual(
                    [(f["type"], f["loc"]) for f in answer["detail"]], expected
                )
                self.assertEqual(
                    set(answer["detail"][0]), {"type", "loc", "msg", "input"}
                )

    def test_odd_json_is_refused_or_echoed(self) -> None:
        def step(value: str) -> str:
            return f'{{"action":{{"message":"","metadata":{{"v":{value}}}}}}}'

        refused = [
            b"{",
            b"\xff",
            b"\xef\xbb\xbf{}",
            step("[" * 100_000).encode(),
            step("[" * 500 + "]" * 500).encode(),
            step("1" * 100_000).encode(),
            step("NaN").encode(),
            step("-Infinity").encode(),
            step("1e999").encode(),
        ]
        for body in refused:
            with self.subTest(body=body[:40]):
                status, answer = self.http("POST", "/step", body)
                self.assertEqual(
                    (status, answer["detail"][0]["type"]), (422, "json_invalid")
                )
        status, answer = self.http("POST", "/step", rb'{"action":{"message":"\ud800"}}')
        self.assertEqual(
            (status, answer["observation"]["echoed_message"]), (200, "\ud800")
        )
        status, answer = self.http(
            "POST", "/step", '{"action":{"message":"a","message":"b"}}'
        )
        self.assertEqual((status, answer["observation"]["echoed_message"]), (200, "b"))
        deep = {
            "action": {
                "message": "",
                "metadata": {},
                "x": json.loads("[" * 90 + "]" * 90),
            }
        }
        self.assertEqual(self.http("POST", "/step", deep)[0], 422)

    def test_unknown_path_and_wrong_method(self) -> None:
        self.assertEqual(self.http("GET", "/nowhere")[0], 404)
        for method in ("PUT", "DELETE", "GET", "PATCH", "TRACE"):
            with self.peer() as peer:
                status, fields, answer = peer.ask(f"{method} /step HTTP/1.1\nHOST")
                self.assertEqual((status, fields["allow"]), (405, "POST, OPTIONS"))
                self.assertIn("detail", answer)
        with self.peer() as peer:
            status, fields, _ = peer.ask("OPTIONS /state HTTP/1.1\nHOST")
            self.assertEqual((status, fields["allow"]), (204, "GET, HEAD, OPTIONS"))
            peer.request("HEAD /health HTTP/1.1\nHOST\nConnection: close")
            self.assertIn("Content-Length: 20", peer.read_head())
            self.assertTrue(peer.at_end())

    def test_heads_and_bodies(self) -> None:
        post = "POST /step HTTP/1.1\nHOST\nContent-Type: application/json\n"
        body = b'{"action":{"message":"x"}}'
        cases = [
            (f"{post}Content-Length: 26", body, 200),
            (f"{post}Content-Length: 26\nContent-Length: 26", body, 400),
            (f"{post}Content-Length: -1", b"", 400),
            (f"{post}Content-Length: 2 6", b"", 400),
            (f"{post}Content-Length: +26", b"", 400),
            (f"{post}Content-Length: 26\nTransfer-Encoding: chunked", body, 400),
            (f"{post}Transfer-Encoding: gzip", b"", 501),
            (f"{post}Transfer-Encoding: chunked", b"5;a=b\r\n" + body[:5] + b"\r\n15\r\n" + body[5:] + b"\r\n0\r\nHost: x\r\n\r\n", 200),
            (f"{post}Transfer-Encoding: chunked", b"x\r\n", 400),
            (f"{post}Transfer-Encoding: chunked", b"1\r\nabc\r\n", 400),
            (f"{post}Content-Length: 999999999999", b"", 413),
            (f"{post}Transfer-Encoding: chunked", b"fffffffff\r\n", 413),
            (f"{post}Content-Length: 26\nExpect: magic", b"", 417),
            ("POST /step HTTP/1.1\nHOST\nContent-Type: text/plain\nContent-Length: 26", body, 415),
            ("GET /health HTTP/1.1", b"", 400),
            ("GET /health HTTP/1.1\nHOST\nHOST", b"", 400),
            ("GET /health HTTP/1.0", b"", 200),
            ("GET  /health HTTP/1.1\nHOST", b"", 400),
            ("GET /health", b"", 400),
            ("GET /health HTTP/2.0\nHOST", b"", 505),
            ("GET /health HTTP/1.1\nHOST\nbad header", b"", 400),
            ("GET /health HTTP/1.1\nHOST\nA : b", b"", 400),
            ("GET /health HTTP/1.1\nHOST\nA: b\n folded", b"", 400),
            ("GET /health HTTP/1.1\nHOST\nA: b\0c", b"", 400),
            (f"GET /{'x' * 70000} HTTP/1.1\nHOST", b"", 414),
            (f"GET /health HTTP/1.1\nHOST\nA: {'x' * 70000}", b"", 431),
            ("GET /health HTTP/1.1\nHOST" + "".join(f"\nA{i}: b" for i in range(200)), b"", 431),
            ("BREW /pot HTTP/1.1\nHOST", b"", 501),
            ("GET http://[/ HTTP/1.1\nHOST", b"", 400),
        ]  # fmt: skip
        for text, content, expected in cases:
            with self.subTest(text=text[:80]), self.peer() as peer:
                status, _, answer = peer.ask(text, content)
                self.assertEqual(status, expected, answer)
                if status != 200:
                    self.assertIsInstance(answer["detail"], str)

    def test_odd_headers_take_no_time(self) -> None:
        began = time.monotonic()
        for value in (b" " * 60_000 + b"\x01", b"x" + b" " * 60_000 + b"x"):
            with self.peer() as peer:
                peer.send(
                    b"GET /health HTTP/1.1\r\nHost: localhost\r\nA:"
                    + value
                    + b"\r\n\r\n"
                )
                self.assertEqual(
                    peer.response()[0], 400 if value.endswith(b"\x01") else 200
                )
        self.assertLess(time.monotonic() - began, 2)

    def test_requests_may_be_pipelined(self) -> None:
        with self.peer() as peer:
            for _ in range(50):
                peer.request("GET /health HTTP/1.1\nHOST")
            peer.request("GET /health HTTP/1.1\nHOST\nConnection: close")
            for _ in range(51):
                self.assertEqual(peer.response()[0], 200)
            self.assertTrue(peer.at_end())

    def test_expect_continue(self) -> None:
        with self.peer() as peer:
            peer.request(
                "POST /step HTTP/1.1\nHOST\nContent-Type: application/json\n"
                "Content-Length: 26\nExpect: 100-continue"
            )
            self.assertEqual(peer.read_head(), "HTTP/1.1 100 Continue")
            peer.send(b'{"action":{"message":"x"}}')
            self.assertEqual(peer.response()[0], 200)

    def test_keep_alive_of_http_1_0(self) -> None:
        with self.peer() as peer:
            peer.request("GET /health HTTP/1.0\nConnection: keep-alive")
            self.assertEqual(peer.response()[1]["connection"], "keep-alive")
            peer.request("GET /health HTTP/1.0")
            self.assertEqual(peer.response()[1]["connection"], "close")
            self.assertTrue(peer.at_end())

    def test_openapi_describes_every_route(self) -> None:
        document = self.http("GET", "/openapi.json")[1]
        self.assertRegex(document["openapi"], r"^3\.1\.")
        self.assertEqual(document["info"]["version"], benchmark.__version__)
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                self.assertIn(method.upper(), server.ROUTES[path])
                self.assertLessEqual(
                    {"operationId", "summary", "tags", "responses"}, set(operation)
                )
        documented = set(document["paths"])
        self.assertEqual(
            documented, set(server.ROUTES) - {"*"} - set(server.REDIRECTS) | {"/"}
        )
        text = json.dumps(document)
        for ref in set(re.findall(r'"\$ref": "#/([^"]+)"', text)):
            node = document
            for part in ref.split("/"):
                node = node[part]


class OriginTest(ServerCase):
    def status(self, *lines: str, running: server.Server | None = None) -> int:
        with self.peer(running) as peer:
            return peer.ask("\n".join(["GET /health HTTP/1.1", *lines]))[0]

    def test_pages_of_other_sites_are_kept_out(self) -> None:
        port = self.running.server_port
        self.assertEqual(self.status("HOST", f"Origin: http://127.0.0.1:{port}"), 200)
        self.assertEqual(self.status("HOST", "Origin: http://evil.example"), 403)
        self.assertEqual(self.status("HOST", "Origin: http://127.0.0.1:1"), 403)
        self.assertEqual(self.status("HOST", "Origin: null"), 403)
        self.assertEqual(
            self.status(
                "HOST", "Origin: https://a.example", "X-Forwarded-Host: a.example"
            ),
            200,
        )
        self.assertEqual(self.status("Host: evil.example"), 403)  # DNS rebinding
        for name in ("[::1", "[x]", "a@localhost", "localhost/evil", "localhost?evil"):
            self.assertEqual(self.status(f"Host: {name}"), 403, name)
        self.assertEqual(
            self.status("Host: evil.example", "Origin: http://evil.example"), 403
        )
        for name in (
            "localhost",
            "LocalHost:80",
            "127.1.2.3",
            "[::1]:99",
            "a.localhost",
        ):
            self.assertEqual(self.status(f"Host: {name}"), 200, name)

    def test_hosts_may_be_named(self) -> None:
        with mock.patch.dict(os.environ, {"SPACE_HOST": "me-env.hf.space"}):
            running = serve(allow_origins=["https://lab.example:8443", "b.example"])
        self.addCleanup(running.stop)
        for origin in (
            "https://me-env.hf.space",
            "https://lab.example:8443",
            "http://b.example",
        ):
            host = origin.partition("://")[2]
            self.assertEqual(
                self.status("HOST", f"Origin: {origin}", running=running), 200
            )
            self.assertEqual(self.status(f"Host: {host}", running=running), 200)
        self.assertEqual(
            self.status("HOST", "Origin: https://c.example", running=running), 403
        )

    def test_websocket_handshake_is_guarded_too(self) -> None:
        with self.assertRaisesRegex(ConnectionError, "403.*may not call"):
            client.WebSocket.connect(
                f"{self.running.url}/ws", {"Origin": "http://evil.example"}
            )


# ---------------------------------------------------------------------------
# WebSocket: OpenEnv's messages
# ---------------------------------------------------------------------------


class MessageTest(ServerCase):
    def ask(self, *messages: Any) -> list[Any]:
        with self.peer().upgrade() as peer:
            for message in messages:
                peer.send(
                    frame(1, message)
                    if isinstance(message, bytes)
                    else text_frame(message)
                )
            return [peer.message() for _ in messages]

    def test_every_message(self) -> None:
        answers = self.ask(
            {"type": "reset", "data": {"seed": 1, "episode_id": "e1"}},
            {"type": "step", "data": {"message": "Hi"}},
            {"type": "state"},
            {
                "type": "mcp",
                "data": {"jsonrpc": "2.0", "id": 1, "method": "tools/list"},
            },
            {"type": "reset"},
        )
        self.assertEqual(
            [a["type"] for a in answers],
            ["observation"] * 2 + ["state", "mcp", "observation"],
        )
        self.assertEqual(answers[1]["data"]["reward"], 0.2)
        self.assertEqual(answers[2]["data"], {"episode_id": "e1", "step_count": 1})
        self.assertEqual(answers[3]["data"]["error"]["code"], -32603)

    def test_close_message(self) -> None:
        with self.peer().upgrade() as peer:
            peer.send(text_frame({"type": "close"}))
            self.assertEqual(peer.close_code(), 1000)

    def test_every_error_leaves_the_session_alive(self) -> None:
        cases: list[tuple[Any, str]] = [
            (b"{", "INVALID_JSON"),
            (b'{"type":NaN}', "INVALID_JSON"),
            (b"[" * 5000, "INVALID_JSON"),
            ({"type": "jump"}, "UNKNOWN_TYPE"),
            ({"type": 5}, "UNKNOWN_TYPE"),
            ({}, "UNKNOWN_TYPE"),
            ([], "VALIDATION_ERROR"),
            (b'"text"', "VALIDATION_ERROR"),
            ({"type": "step"}, "VALIDATION_ERROR"),
            ({"type": "step", "data": {}}, "VALIDATION_ERROR"),
            ({"type": "state", "data": {}}, "VALIDATION_ERROR"),
            ({"type": "reset", "data": []}, "VALIDATION_ERROR"),
            ({"type": "reset", "data": {"seed": -1}}, "VALIDATION_ERROR"),
            ({"type": "mcp"}, "VALIDATION_ERROR"),
            ({"type": "step", "data": {"message": "alive"}}, ""),
        ]
        answers = self.ask(*(message for message, _ in cases))
        for (message, code), answer in zip(cases, answers):
            with self.subTest(message=message):
                self.assertEqual(answer["data"].get("code", ""), code)
                if code:
                    self.assertEqual(answer["type"], "error")
                    self.assertTrue(answer["data"]["message"])
                if code == "VALIDATION_ERROR":
                    self.assertEqual(
                        set(answer["data"]["errors"][0]),
                        {"type", "loc", "msg", "input"},
                    )
        self.assertEqual(answers[-1]["data"]["observation"]["metadata"]["step"], 1)

    def test_long_text_is_read_as_json_reads_it(self) -> None:
        long, gap, ones = "x" * 50_000, " " * 50_000, "1," * 25_000 + "1"
        values = [
            f'"{long}"',
            f'"{long}","metadata":{{"a":"NaN"}}',
            f'"{long}","metadata":{{"a":NaN}}',
            f'"{long}","metadata":{{"a":Infinity}}',
            f'"{long}","message":"the last one counts"',
            f'"the last one counts","message":"{long}"',
            *(
                f'"{long}{end}"'
                for end in ("NaN", '\\"', "\\\\", "\\u12", "\n", "\x7f", "ü")
            ),
            *(f'"{start}{long}"' for start in ('\\"', "\\\\", "\\", "\0", "\x1f", "𝄞")),
            *(f'"{long}{end}' for end in ("", '"}', '"]', '"1', "\\")),
            f"{long}",
            f'"a"{gap},"metadata":{{"b":1}}',
            f'"a","metadata":{{"b":{gap}1,"c":2}}',
            f'"a","metadata":{{"b":NaN,"c":{gap}1,"d":2}}',
            f'"a","metadata":{gap}{{}},"message":"b"',
            f'"a","metadata":{{"{long}":"b"}}',
            f'"a","metadata":{{"b":["c",{ones},"d"]}}',
        ]
        with self.peer().upgrade() as peer:
            for value in values:
                text = f'{{"type":"step","data":{{"message":{value}}}}}'
                peer.send(frame(1, text.encode()))
                answer = peer.message()["data"]
                with self.subTest(text=f"{text[:60]} ... {text[-60:]}"):
                    try:
                        data = json.loads(text, parse_constant=lambda _: 1 / 0)["data"]
                    except (ValueError, ZeroDivisionError):
                        self.assertEqual(answer["code"], "INVALID_JSON")
                    else:
                        echo = answer["observation"]["echoed_message"]
                        self.assertEqual(echo, data["message"])

    def test_binary_message_is_refused(self) -> None:
        with self.peer().upgrade() as peer:
            peer.send(frame(2, b'{"type":"state"}') + text_frame({"type": "state"}))
            self.assertEqual(peer.message()["data"]["code"], "INVALID_JSON")
            self.assertEqual(peer.message()["type"], "state")


class Broken(BenchmarkEnvironment):
    """Fails at what its messages say."""

    def step(self, action: BenchmarkAction, timeout_s: float | None = None) -> Any:
        if action.message == "raise":
            raise ValueError("a\nb")
        if action.message == "exit":
            sys.exit(3)
        if action.message == "cancel":
            raise asyncio.CancelledError
        if action.message == "none":
            return None
        if action.message == "nan":
            return BenchmarkObservation(reward=float("nan"))
        if action.message == "set":
            return {"reward": 1, "value": object()}
        return super().step(action)


class FailureTest(ServerCase):
    options = {"env": Broken}  # noqa: RUF012

    def test_environment_that_raises_hurts_nobody(self) -> None:
        with (
            BenchmarkEnvWS(self.running.url) as ws,
            BenchmarkEnv(self.running.url) as over_http,
        ):
            for env in (ws, over_http):
                env.reset()
                for message in ("raise", "exit", "cancel", "none", "nan", "set"):
                    with self.subTest(env=env, message=message):
                        with self.assertRaises(client.ServerError) as caught:
                            env.step(BenchmarkAction(message))
                        self.assertEqual(caught.exception.code, "EXECUTION_ERROR")
                self.assertEqual(env.step(BenchmarkAction("fine")).reward, 0.4)
        session = {"X-Session-Id": "f"}
        self.http("POST", "/reset", {}, session)
        status, answer = self.http(
            "POST", "/step", {"action": {"message": "raise"}}, session
        )
        self.assertEqual(
            (status, answer), (500, {"detail": "a\nb", "code": "EXECUTION_ERROR"})
        )

    def test_environment_that_cannot_be_created(self) -> None:
        def factory() -> Any:
            raise OSError("no display")

        with serve(factory) as running:
            with self.peer(running).upgrade() as peer:
                answer = peer.message()["data"]
                self.assertEqual(
                    (answer["code"], answer["factory_name"]),
                    ("FACTORY_ERROR", "factory"),
                )
                self.assertEqual(peer.close_code(), 1011)
            status, answer = self.http("POST", "/reset", {}, running=running)
            self.assertEqual((status, answer["code"]), (500, "FACTORY_ERROR"))
            self.assertEqual(self.http("GET", "/health", running=running)[0], 200)


# ---------------------------------------------------------------------------
# WebSocket: RFC 6455, both ends
# ---------------------------------------------------------------------------

HELLO = text_frame({"type": "step", "data": {"message": "hello"}})
BIG = json.dumps({"type": "step", "data": {"message": "x" * 70_000}}).encode()
# What a peer sends, and the status code it must be closed with. (Masked: for a server.)
FAULTS: list[tuple[str, list[tuple[int, bytes, dict[str, Any]]], int]] = [
    ("reserved bits", [(1, b"", {"bits": 4})], 1002),
    ("reserved data opcode", [(3, b"", {})], 1002),
    ("reserved control opcode", [(11, b"", {})], 1002),
    ("long ping", [(9, b"x" * 126, {})], 1002),
    ("fragmented ping", [(9, b"", {"fin": False})], 1002),
    ("orphan continuation", [(0, b"x", {})], 1002),
    ("message in a message", [(1, b"a", {"fin": False}), (1, b"b", {})], 1002),
    ("binary in a message", [(1, b"a", {"fin": False}), (2, b"b", {})], 1002),
    ("length not minimal (16)", [(1, b"x", {"form": 2})], 1002),
    ("length not minimal (64)", [(1, b"x" * 200, {"form": 8})], 1002),
    ("invalid UTF-8", [(1, b"\xff", {})], 1007),
    ("invalid first fragment", [(1, b"abc\xc0\xaf", {"fin": False})], 1007),
    ("surrogate", [(1, b"\xed\xa0", {"fin": False})], 1007),
    ("beyond Unicode", [(1, b"\xf4\x90", {"fin": False})], 1007),
    ("half a code point at the end", [(1, b"\xe2\x82", {})], 1007),
    (
        "half at the end of fragments",
        [(1, b"\xe2", {"fin": False}), (0, b"\x82", {})],
        1007,
    ),
    ("close of one byte", [(8, b"\x03", {})], 1002),
    ("close reason not UTF-8", [(8, b"\x03\xe8\xff", {})], 1007),
    ("close frame over 125", [(8, b"\x03\xe8" + b"x" * 124, {})], 1002),
]
for _code in (0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535):
    FAULTS.append((f"close code {_code}", [(8, struct.pack("!H", _code), {})], 1002))


class ServerProtocolTest(ServerCase):
    options = {"max_message_mb": 1}  # noqa: RUF012
    mine = 1  # connections that a test has from the start

    def setUp(self) -> None:
        self.ws = self.peer().upgrade()

    def echo(self, message: bytes = HELLO) -> Any:
        self.ws.send(message)
        return self.ws.message()["data"]["observation"]["echoed_message"]

    def test_faults_have_their_codes(self) -> None:
        for name, frames, code in FAULTS:
            with self.subTest(name), self.peer().upgrade() as peer:
                peer.send(b"".join(frame(op, data, **how) for op, data, how in frames))
                self.assertEqual(peer.close_code(), code)

    def test_frames_of_a_client_must_be_masked(self) -> None:
        self.ws.send(frame(1, b"{}", masked=False))
        self.assertEqual(self.ws.close_code(), 1002)

    def test_valid_closes_are_echoed(self) -> None:
        for code in (1000, 1001, 1003, 1007, 1011, 1012, 1013, 1014, 3000, 4999):
            with self.peer().upgrade() as peer:
                peer.send(frame(8, struct.pack("!H", code) + "grüße".encode()) + HELLO)
                self.assertEqual(peer.close_code(), code)
        self.ws.send(frame(8))
        self.assertEqual(self.ws.read_frame(), (0x88, b""))
        self.assertTrue(self.ws.at_end())

    def test_all_three_lengths(self) -> None:
        for size in (0, 1, 83, 84, 125, 126, 65_000, 65_535, 65_536, 200_000):
            message = text_frame({"type": "step", "data": {"message": "y" * size}})
            self.assertEqual(self.echo(message), "y" * size)

    def test_fragments_with_control_frames_between(self) -> None:
        payload = json.dumps(
            {"type": "step", "data": {"message": "aé𝄞"}}, ensure_ascii=False
        ).encode()
        parts = [payload[i : i + 1] for i in range(len(payload))]
        self.ws.send(frame(1, b"", fin=False))
        for i, part in enumerate(parts):
            self.ws.send(
                frame(9, bytes([i])) + frame(10, b"unasked") + frame(0, part, fin=False)
            )
            self.assertEqual(self.ws.read_frame(), (0x8A, bytes([i])))
        self.ws.send(frame(0, b""))
        self.assertEqual(
            self.ws.message()["data"]["observation"]["echoed_message"], "aé𝄞"
        )

    def test_bytes_one_at_a_time_and_all_at_once(self) -> None:
        ping = frame(9, b"p")
        for byte in (
            frame(1, BIG[:10], fin=False) + ping + frame(0, BIG[10:40], fin=False)
        ):
            self.ws.send(bytes([byte]))
        self.assertEqual(self.ws.read_frame(), (0x8A, b"p"))
        self.ws.send(frame(0, BIG[40:]) + ping + HELLO * 20 + ping)
        self.assertEqual(
            len(self.ws.message()["data"]["observation"]["echoed_message"]), 70_000
        )
        found = [self.ws.read_frame()[0] for _ in range(22)]
        self.assertEqual((found.count(0x81), found.count(0x8A)), (20, 2))

    def test_frame_right_behind_the_handshake(self) -> None:
        with self.peer() as peer:
            peer.request(
                "GET /ws HTTP/1.1\nHOST\nUpgrade: h2c, WebSocket\nConnection: keep-alive, UPGRADE\n"
                "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\nSec-WebSocket-Version: 13\n"
                "Sec-WebSocket-Extensions: permessage-deflate\nSec-WebSocket-Protocol: chat",
                HELLO,
            )
            head = peer.read_head().lower()
            self.assertIn("sec-websocket-accept: icx+yqv66kxgm0fcwalwlflwtai=", head)
            self.assertNotIn("extensions", head)
            self.assertNotIn("protocol:", head)
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

    def test_too_big_is_refused_before_it_is_sent(self) -> None:
        limit = 1 << 20
        self.ws.send(bytes([0x81, 0xFF]) + (limit + 1).to_bytes(8, "big") + b"mask")
        self.assertEqual(self.ws.close_code(), 1009)
        with self.peer().upgrade() as peer:  # over all fragments together
            peer.send(frame(1, b" " * limit, fin=False) + frame(0, b" "))
            self.assertEqual(peer.close_code(), 1009)
        with self.peer().upgrade() as peer:  # the top bit of a length is no size
            peer.send(bytes([0x81, 0xFF]) + b"\xff" * 8 + b"mask")
            self.assertIn(peer.close_code(), (1002, 1009))

    def test_random_bytes_never_hurt_the_server(self) -> None:
        chance = random.Random(6455)
        for _ in range(60):
            with self.peer().upgrade() as peer:
                good = text_frame(
                    {"type": "step", "data": {"message": "x" * chance.randrange(300)}}
                )
                data = bytearray(good * chance.randrange(1, 4))
                for _ in range(chance.randrange(1, 5)):
                    data[chance.randrange(len(data))] = chance.randrange(256)
                peer.send(bytes(data[: chance.randrange(len(data))]))
                peer.sock.shutdown(socket.SHUT_WR)
                peer.at_end()
        self.assertEqual(self.echo(), "hello")
        wait_until(
            lambda: len(self.running.connections) == self.mine, "the end of the others"
        )
        self.assertEqual(self.running.app.active, self.mine)


class SharedServerProtocolTest(ServerProtocolTest):
    """The same for sessions that share a thread."""

    mine = 2

    def setUp(self) -> None:
        self.ws = self.peer().upgrade()
        self.echo()  # so that the next is not the only session
        super().setUp()


class Quick(BenchmarkEnvironment):
    """Says which thread it runs in; it lies about never waiting."""

    NEVER_WAITS = True
    big_steps = 0

    def step(
        self, action: BenchmarkAction, timeout_s: float | None = None
    ) -> BenchmarkObservation:
        if action.message == "long":
            time.sleep(0.02)
        if action.message == "big":
            type(self).big_steps += 1
            return BenchmarkObservation("x" * (1 << 23))
        if action.message == "break":
            raise ValueError("it breaks")
        return BenchmarkObservation(threading.current_thread().name)


class Slow(Quick):
    """Does not say that it never waits."""


@unittest.skipUnless(hasattr(socket, "MSG_DONTWAIT"), "no thread is shared here")
class SharedThreadTest(ServerCase):
    def setUp(self) -> None:
        self.quick = serve(Quick)
        self.addCleanup(self.quick.stop)
        self.first, self.second = (self.peer(self.quick).upgrade() for _ in range(2))
        for peer in (self.first, self.second, self.first, self.second):
            self.step(peer, "hello")  # the first may come too early to be shared

    def step(self, peer: RawPeer, message: str) -> Any:
        peer.send(text_frame({"type": "step", "data": {"message": message}}))
        data = peer.message()["data"]
        return data.get("observation", data).get("echoed_message", data)

    def test_sessions_share_a_thread(self) -> None:
        for peer in (self.first, self.second):
            self.assertEqual(self.step(peer, "hello"), "sessions")
        peer = self.peer(self.quick).upgrade()
        self.step(peer, "hello")
        self.assertEqual(self.step(peer, "hello"), "sessions")

    def test_only_if_the_class_itself_says_that_it_never_waits(self) -> None:
        with serve(Slow) as running:
            peers = [self.peer(running).upgrade() for _ in range(3)]
            first = [self.step(peer, "hello") for peer in peers]
            self.assertEqual(len(set(first) - {"sessions"}), 3)
            self.assertEqual([self.step(peer, "hello") for peer in peers], first)

    def test_long_steps_get_a_thread_of_their_own(self) -> None:
        names = [self.step(self.first, "long") for _ in range(4)]
        self.assertEqual(names[:3], ["sessions"] * 3)
        self.assertNotEqual(names[3], "sessions")
        self.assertNotEqual(self.step(self.first, "hello"), "sessions")
        self.assertEqual(self.step(self.second, "hello"), "sessions")

    def test_half_a_message_holds_nobody_up(self) -> None:
        message = text_frame({"type": "step", "data": {"message": "hello"}})
        self.first.send(message[:9])
        for _ in range(3):
            self.assertEqual(self.step(self.second, "hello"), "sessions")
        self.first.send(message[9:])
        self.assertIn("observation", self.first.message()["data"])

    def test_an_answer_that_is_not_taken_holds_nobody_up(self) -> None:
        Quick.big_steps = 0
        big = text_frame({"type": "step", "data": {"message": "big"}})
        self.first.send(big * 3)
        for _ in range(3):
            self.assertEqual(self.step(self.second, "hello"), "sessions")
        self.assertEqual(Quick.big_steps, 1)  # else the answers would pile up
        for _ in range(3):
            observation = self.first.message()["data"]["observation"]
            self.assertEqual(len(observation["echoed_message"]), 1 << 23)
        self.assertNotEqual(self.step(self.first, "hello"), "sessions")

    def test_many_messages_at_once_take_turns_with_others(self) -> None:
        hello = text_frame({"type": "step", "data": {"message": "hello"}})
        self.first.send(hello * 2000)
        self.assertEqual(self.step(self.second, "hello"), "sessions")
        with self.assertRaises(BlockingIOError):  # the other is still at it
            self.first.sock.setblocking(False)
            while len(self.first.data) < 200_000:
                self.first.data += self.first.sock.recv(65536)
        self.first.sock.settimeout(PATIENCE)
        for _ in range(2000):
            self.assertEqual(
                self.first.message()["data"]["observation"]["echoed_message"],
                "sessions",
            )

    def test_a_message_that_came_while_the_thread_changed_is_answered(self) -> None:
        selector = self.quick.sharing._selector
        assert selector
        register = selector.register

        def after_tend(sock: socket.socket, events: int, handler: Any) -> Any:
            sock.recv(1, socket.MSG_PEEK)  # waits for the message
            handler.websocket.tend()  # the thread that looks after all was quicker
            return register(sock, events, handler)

        with mock.patch.object(selector, "register", after_tend):
            peer = self.peer(self.quick).upgrade()
            self.step(peer, "hello")
            self.assertEqual(self.step(peer, "hello"), "sessions")

    def test_errors_and_ends(self) -> None:
        self.assertEqual(self.step(self.first, "break")["code"], "EXECUTION_ERROR")
        self.assertEqual(self.step(self.first, "hello"), "sessions")
        self.first.send(text_frame({"type": "close"}))
        self.assertEqual(self.first.close_code(), 1000)
        self.second.sock.close()
        wait_until(lambda: not self.quick.connections)
        self.assertEqual(self.quick.app.active, 0)

    def test_if_the_thread_cannot_start_none_is_shared(self) -> None:
        with serve(Quick) as running:
            start = threading.Thread.start

            def refuse(thread: threading.Thread) -> None:
                if thread.name == "sessions":
                    raise RuntimeError("can't start new thread")
                start(thread)

            with mock.patch.object(threading.Thread, "start", refuse):
                peers = [self.peer(running).upgrade() for _ in range(2)]
                for peer in peers * 2:
                    self.assertNotEqual(self.step(peer, "hello"), "sessions")
            for peer in peers:
                self.step(peer, "hello")
                self.assertEqual(self.step(peer, "hello"), "sessions")

    def test_if_no_thread_can_start_one_session_is_lost(self) -> None:
        error = RuntimeError("can't start new thread")
        for_ever = mock.patch.object(server, "HEADER_SECONDS", 2 * PATIENCE)
        with for_ever, mock.patch.object(threading.Thread, "start", side_effect=error):
            self.first.send(text_frame({"type": "state"})[:9])
            self.assertTrue(self.first.at_end())
            self.assertEqual(self.step(self.second, "hello"), "sessions")
        wait_until(lambda: self.quick.app.active == 1)

    def test_stop_says_goodbye(self) -> None:
        stopping = threading.Thread(target=self.quick.stop)
        stopping.start()
        for peer in (self.first, self.second):
            self.assertEqual(peer.close_code(), 1001)
        stopping.join()

    def test_stop_says_goodbye_to_who_always_sends(self) -> None:
        def flood() -> None:
            with contextlib.suppress(OSError):
                while True:
                    self.first.send(block)

        block = text_frame({"type": "state"}) * 2000
        flooding = threading.Thread(target=flood)
        flooding.start()
        self.first.message()
        stopping = threading.Thread(target=self.quick.stop)
        stopping.start()
        last = b""
        with contextlib.suppress(ConnectionResetError):
            while data := self.first.sock.recv(1 << 20):
                last = (last + data)[-40:]
        self.assertIn(b"\x88\x1d\x03\xe9", last)  # Close, 1001
        stopping.join()
        self.first.sock.close()
        flooding.join()


class ClientProtocolTest(unittest.TestCase):
    """The other role of the class, against a hand-made server on a socket pair."""

    def setUp(self) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(PATIENCE)
        self.addCleanup(self.sock.close)
        self.ws = client.WebSocket(theirs, client=True, max_size=1000, timeout=PATIENCE)
        self.addCleanup(self.ws.drop)

    def read_frame(self) -> tuple[int, bytes]:
        with self.sock.makefile("rb", 0) as file:

            def read(size: int) -> bytes:
                data = b""
                while len(data) < size:
                    data += file.read(size - len(data)) or b""
                return data

            first, second = read(2)
            self.assertTrue(second & 0x80, "a client masks")
            size = second & 0x7F
            if size > 125:
                size = int.from_bytes(read(2 if size == 126 else 8), "big")
            key = read(4)
            return first, bytes(b ^ key[i % 4] for i, b in enumerate(read(size)))

    def test_faults_have_their_codes(self) -> None:
        for name, frames, code in FAULTS:
            with self.subTest(name):
                self.setUp()
                for op, data, how in frames:
                    self.sock.sendall(frame(op, data, masked=False, **how))
                with self.assertRaises(client.ConnectionClosed) as caught:
                    self.ws.recv()
                self.assertEqual(caught.exception.code, code)
                first, payload = self.read_frame()
                self.assertEqual((first, payload[:2]), (0x88, struct.pack("!H", code)))
                with self.assertRaises(client.ConnectionClosed):
                    self.ws.send("after the end")

    def test_frames_of_a_server_must_not_be_masked(self) -> None:
        self.sock.sendall(frame(1, b"x"))
        with self.assertRaises(client.ConnectionClosed) as caught:
            self.ws.recv()
        self.assertEqual(caught.exception.code, 1002)

    def test_messages_of_both_kinds(self) -> None:
        for message in ("", "aé𝄞", "x" * 126, b"", b"\xff" * 900):
            self.ws.send(message)
            first, payload = self.read_frame()
            data = message.encode() if isinstance(message, str) else message
            self.assertEqual(
                (first & 0x0F, payload), (1 if isinstance(message, str) else 2, data)
            )
            op = first & 0x0F
            self.sock.sendall(frame(op, data[:5], fin=False, masked=False))
            self.sock.sendall(
                frame(0, b"", fin=False, masked=False) + frame(9, b"?", masked=False)
            )
            self.sock.sendall(frame(0, data[5:], masked=False))
            self.assertEqual(self.ws.recv(), message)
            self.assertEqual(self.read_frame(), (0x8A, b"?"))

    def test_masking_is_its_own_inverse(self) -> None:
        chance = random.Random(1)
        for size in (0, 1, 3, 4, 5, 1022, 1023, 1024, 1025, 5000):
            data, key = (
                bytes(chance.randrange(256) for _ in range(size)),
                b"\0\x7f\x80\xff",
            )
            masked = client.apply_mask(data, key)
            self.assertEqual(masked, bytes(b ^ key[i % 4] for i, b in enumerate(data)))
            self.assertEqual(client.apply_mask(masked, key), data)

    def test_every_way_to_cut_a_stream(self) -> None:
        stream = frame(1, "é𝄞".encode() * 40, fin=False, masked=False)
        stream += frame(9, b"ping", masked=False) + frame(0, b"end", masked=False)
        chance = random.Random(2)
        for _ in range(100):
            at = 0
            while at < len(stream):
                size = chance.choice((1, 2, 3, 7, 100))
                self.sock.sendall(stream[at : at + size])
                at += size
                self.ws.tend()
            self.assertEqual(self.ws.recv(), "é𝄞" * 40 + "end")
            self.assertEqual(self.read_frame(), (0x8A, b"ping"))

    def test_tend_answers_pings_and_keeps_messages(self) -> None:
        self.sock.sendall(frame(1, b"one", masked=False) + frame(9, b"1", masked=False))
        self.sock.sendall(frame(1, b"two", masked=False) + frame(9, b"2", masked=False))
        while len(self.ws._inbox) < 2:
            self.ws.tend()
        self.assertEqual(
            [self.read_frame() for _ in range(2)], [(0x8A, b"1"), (0x8A, b"2")]
        )
        self.assertEqual([self.ws.recv(), self.ws.recv()], ["one", "two"])

    def test_tend_holds_a_bounded_amount(self) -> None:
        self.ws._max_size = 1 << 22
        flood = frame(1, b"x" * 500_000, masked=False)
        sender = threading.Thread(
            target=self.sock.sendall, args=(flood * 10,), daemon=True
        )
        sender.start()
        for _ in range(300):
            self.ws.tend()
        self.assertLess(self.ws._held, 2_000_000)
        for _ in range(10):
            self.assertEqual(len(self.ws.recv()), 500_000)
        sender.join(PATIENCE)

    def test_tend_never_blocks_on_a_peer_that_reads_nothing(self) -> None:
        ping = frame(9, b"x" * 125, masked=False)
        sent = 0
        self.sock.setblocking(False)
        deadline = time.monotonic() + PATIENCE
        while sent < 5_000 and time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                sent += self.sock.send(ping) > 0
            self.ws.tend()
            if self.ws._unsent:
                break
        self.assertLessEqual(len(self.ws._unsent), 200)
        self.sock.settimeout(PATIENCE)

    def test_timeout_and_end(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ws = client.WebSocket(theirs, client=True, max_size=10, timeout=0.05)
            with self.assertRaises(TimeoutError):
                ws.recv()
            ours.sendall(b"\x81")  # bytes that never become a message
            with self.assertRaises(TimeoutError):
                ws.recv()
            ours.close()
            with self.assertRaises(client.ConnectionClosed) as caught:
                ws.recv()
            self.assertEqual(caught.exception.code, 1006)

    def test_closing_handshake_from_this_end(self) -> None:
        closing = threading.Thread(target=self.ws.close, args=(1001, "ü" * 100))
        closing.start()
        first, payload = self.read_frame()
        self.assertEqual((first, payload[:2]), (0x88, struct.pack("!H", 1001)))
        self.assertEqual(payload[2:].decode(), "ü" * 61)  # cut between code points
        self.sock.sendall(
            frame(1, b"late", masked=False) + frame(8, payload[:2], masked=False)
        )
        self.sock.shutdown(socket.SHUT_WR)
        closing.join(PATIENCE)
        self.ws.close()  # twice is fine
        with self.assertRaises(client.ConnectionClosed):
            self.ws.recv()

    def test_what_comes_after_this_end_has_closed_is_dropped(self) -> None:
        self.ws.begin_close()
        self.sock.sendall(
            frame(1, b"late", masked=False) + frame(8, b"\x03\xe8", masked=False)
        )
        with self.assertRaises(client.ConnectionClosed) as caught:
            self.ws.recv()
        self.assertEqual(caught.exception.code, 1000)

    def test_closing_while_tended(self) -> None:
        begun = threading.Event()

        def tend() -> None:
            begun.set()
            time.sleep(0.1)

        with mock.patch.object(self.ws, "_tend", tend):
            tending = threading.Thread(target=self.ws.tend)
            tending.start()
            begun.wait(PATIENCE)
            closing = threading.Thread(target=self.ws.close)
            closing.start()
            self.assertEqual(self.read_frame()[0], 0x88)
            tending.join()
        self.sock.close()
        closing.join()


class HandshakeTest(unittest.TestCase):
    """The client's opening handshake against servers that get it wrong."""

    def answer(
        self, change: Callable[[str], str], early: bytes = b""
    ) -> client.WebSocket:
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def serve_one() -> None:
                sock, _ = listener.accept()
                with sock:
                    head = sock.recv(65536).decode()
                    self.request = head
                    key = re.search("Sec-WebSocket-Key: (.+)\r\n", head)
                    assert key
                    good = (
                        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: WebSocket\r\nconnection: "
                        f"foo, upgrade\r\nSec-WebSocket-Accept: {client.accept_key(key[1])}\r\n\r\n"
                    )
                    sock.sendall(change(good).encode() + early)
                    sock.settimeout(PATIENCE)
                    with contextlib.suppress(OSError):
                        sock.recv(1)

            thread = threading.Thread(target=serve_one)
            thread.start()
            try:
                url = f"ws://127.0.0.1:{listener.getsockname()[1]}/some/path/ws"
                ws = client.WebSocket.connect(
                    url, {"Authorization": "Bearer x"}, PATIENCE, PATIENCE
                )
                self.addCleanup(ws.drop)
                if early:
                    self.assertEqual(ws.recv(), "early")
                ws.drop()
                return ws
            finally:
                thread.join(PATIENCE)

    def test_accepts_a_good_one_and_keeps_what_follows(self) -> None:
        self.answer(lambda good: good, frame(1, b"early", masked=False))
        self.assertIn("GET /some/path/ws HTTP/1.1\r\n", self.request)
        self.assertIn("\r\nAuthorization: Bearer x\r\n", self.request)
        key = re.search("Sec-WebSocket-Key: (.+)\r\n", self.request)
        self.assertEqual(len(base64.b64decode(key[1] if key else "")), 16)

    def test_refuses_what_is_no_agreement(self) -> None:
        changes: list[tuple[str, Callable[[str], str]]] = [
            ("HTTP/1.1 200", lambda s: s.replace("101 Switching Protocols", "200 OK")),
            ("upgrade", lambda s: s.replace("Upgrade: WebSocket", "Upgrade: h2c")),
            ("Connection", lambda s: s.replace("upgrade\r", "close\r")),
            ("Accept", lambda s: s.replace("=\r\n\r\n", "A=\r\n\r\n")),
            (
                "extension",
                lambda s: s.replace(
                    "\r\n\r\n", "\r\nSec-WebSocket-Extensions: x\r\n\r\n"
                ),
            ),
            (
                "subprotocol",
                lambda s: s.replace(
                    "\r\n\r\n", "\r\nSec-WebSocket-Protocol: x\r\n\r\n"
                ),
            ),
            ("no HTTP", lambda s: "x" * 70_000),
        ]
        for name, change in changes:
            with (
                self.subTest(name),
                self.assertRaisesRegex(ConnectionError, f"(?i){name}"),
            ):
                self.answer(change)

    def test_headers_cannot_be_forged(self) -> None:
        with self.assertRaises(ValueError):
            client.WebSocket.connect("ws://127.0.0.1:1/ws", {"A": "b\r\nC: d"})

    def test_urls(self) -> None:
        cases = {
            "localhost:8000": (False, "localhost", 8000, ""),
            "http://a.example/": (False, "a.example", 80, ""),
            "wss://a.example/some/path/": (True, "a.example", 443, "/some/path"),
            "https://[::1]:9/x y": (True, "::1", 9, "/x%20y"),
        }
        for url, expected in cases.items():
            self.assertEqual(client.split_url(url), expected)
        for url in ("", "ftp://x", "http://", "http://x:99999"):
            with self.assertRaises(ValueError):
                client.split_url(url)


# ---------------------------------------------------------------------------
# Sessions, load and the end
# ---------------------------------------------------------------------------


class Counted(BenchmarkEnvironment):
    """Counts its instances; steps for as long as its messages say."""

    made = closed = 0
    gate = threading.Event()

    def __init__(self) -> None:
        super().__init__()
        type(self).made += 1

    def step(
        self, action: BenchmarkAction, timeout_s: float | None = None
    ) -> BenchmarkObservation:
        if action.message == "wait":
            self.gate.wait(PATIENCE)
        return super().step(action)

    def close(self) -> None:
        type(self).closed += 1
        if self.state.episode_id == "close raises":
            raise OSError("cannot close")


class SessionTest(ServerCase):
    def setUp(self) -> None:
        Counted.made = Counted.closed = 0
        Counted.gate = threading.Event()
        self.small = serve(Counted, max_concurrent_envs=2)
        self.addCleanup(self.small.stop)

    def test_http_sessions(self) -> None:
        a, b = {"X-Session-Id": "a"}, {"X-Session-Id": "b" * 255}
        status, answer = self.http(
            "POST", "/step", {"action": {"message": ""}}, a, self.small
        )
        self.assertEqual((status, "reset" in answer["detail"]), (404, True))
        for session in (a, b):
            self.http("POST", "/reset", {}, session, self.small)
        for _ in range(3):
            self.http("POST", "/step", {"action": {"message": ""}}, a, self.small)
        steps = [
            self.http("GET", "/state", None, s, self.small)[1]["step_count"]
            for s in (a, b)
        ]
        self.assertEqual(steps, [3, 0])
        for name in ("x" * 256, ""):
            self.assertEqual(
                self.http("GET", "/state", None, {"X-Session-Id": name}, self.small)[0],
                422,
            )
        self.assertEqual(Counted.made, 2)

    def test_requests_without_a_name_share_one_environment(self) -> None:
        self.assertEqual(
            self.http("GET", "/state", running=self.small)[1]["step_count"], 0
        )
        for step in (1, 2):
            self.http("POST", "/step", {"action": {"message": "x"}}, running=self.small)
            self.assertEqual(
                self.http("GET", "/state", running=self.small)[1]["step_count"], step
            )
        self.assertEqual(self.http("POST", "/close", running=self.small)[0], 200)
        self.assertEqual((Counted.made, Counted.closed), (1, 1))

    def test_capacity_counts_both_transports(self) -> None:
        first = self.peer(self.small).upgrade()
        first.send(HELLO)
        first.message()
        self.http("POST", "/reset", {}, {"X-Session-Id": "s"}, self.small)
        full = {"code": "CAPACITY_REACHED", "active_sessions": 2, "max_sessions": 2}
        with self.peer(self.small).upgrade() as peer:
            answer = peer.message()
            self.assertEqual(answer["type"], "error")
            self.assertLessEqual(full.items(), answer["data"].items())
            self.assertEqual(peer.close_code(), 1013)
        status, answer = self.http(
            "POST", "/reset", {}, {"X-Session-Id": "t"}, self.small
        )
        self.assertEqual(status, 503)
        self.assertLessEqual(full.items(), answer.items())
        with (
            BenchmarkEnvWS(self.small.url) as env,
            self.assertRaises(client.ServerError) as caught,
        ):
            env.reset()
        self.assertEqual(caught.exception.code, "CAPACITY_REACHED")
        first.send(frame(8))
        first.read_frame()
        self.assertTrue(first.at_end())  # and by then its place is free
        with BenchmarkEnvWS(self.small.url) as env:
            env.reset()

    def test_idle_sessions_end(self) -> None:
        short = constants(TICK_SECONDS=0.02)
        with short, serve(Counted, session_timeout=0.2) as running:
            ws = self.peer(running).upgrade()
            session = {"X-Session-Id": "s"}
            self.http("POST", "/reset", {}, session, running)
            self.assertEqual(ws.close_code(), 1001)
            wait_until(lambda: Counted.closed == 2, "the end of both sessions")
            self.assertEqual(self.http("GET", "/state", None, session, running)[0], 404)

    def test_pings_are_answered_during_a_step(self) -> None:
        with self.peer(self.small).upgrade() as peer:
            peer.send(text_frame({"type": "step", "data": {"message": "wait"}}) + HELLO)
            for payload in (b"1", b"2"):
                peer.send(frame(9, payload))
                self.assertEqual(peer.read_frame(), (0x8A, payload))
            Counted.gate.set()
            echoes = [
                peer.message()["data"]["observation"]["echoed_message"]
                for _ in range(2)
            ]
            self.assertEqual(echoes, ["wait", "hello"])

    def test_close_during_a_step_waits_for_the_answers(self) -> None:
        self.close_during_a_step(half_close=False)

    def test_so_does_a_close_with_the_end_behind_it(self) -> None:
        self.close_during_a_step(half_close=True)

    def close_during_a_step(self, half_close: bool) -> None:
        with self.peer(self.small).upgrade() as peer:
            wait = text_frame({"type": "step", "data": {"message": "wait"}})
            peer.send(wait + HELLO + frame(8, b"\x03\xe8"))
            if half_close:
                peer.sock.shutdown(socket.SHUT_WR)
            time.sleep(0.5)  # for the server to look at what has come
            Counted.gate.set()
            echoes = [
                peer.message()["data"]["observation"]["echoed_message"]
                for _ in range(2)
            ]
            self.assertEqual(echoes, ["wait", "hello"])
            self.assertEqual(peer.close_code(), 1000)

    def test_flood_during_a_step_holds_nobody_up(self) -> None:
        for opcode in (9, 1):
            with self.peer(self.small).upgrade() as peer:
                peer.send(text_frame({"type": "step", "data": {"message": "wait"}}))
                flood = frame(opcode) * 5000
                done = threading.Event()

                def send(
                    peer: RawPeer = peer, flood: bytes = flood, done: Any = done
                ) -> None:
                    with contextlib.suppress(OSError):
                        while not done.is_set():
                            peer.send(flood)

                def drain(peer: RawPeer = peer) -> None:
                    with contextlib.suppress(OSError):
                        while peer.sock.recv(1 << 20):
                            pass

                threads = [
                    threading.Thread(target=f, daemon=True) for f in (send, drain)
                ]
                for thread in threads:
                    thread.start()
                for _ in range(5):
                    began = time.monotonic()
                    self.assertEqual(
                        self.http("GET", "/health", running=self.small)[0], 200
                    )
                    self.assertLess(time.monotonic() - began, 3)
                done.set()
                peer.sock.shutdown(socket.SHUT_RDWR)
                for thread in threads:
                    thread.join(PATIENCE)
                Counted.gate.set()

    def test_environment_made_while_stopping_is_closed(self) -> None:
        made = threading.Event()

        class Slow(Counted):
            def __init__(self) -> None:
                made.set()
                self.gate.wait(PATIENCE)
                super().__init__()

        with constants(GRACE_SECONDS=0.1):
            running = serve(Slow)
            self.peer(running).upgrade()
            made.wait(PATIENCE)
            running.stop()
            Counted.gate.set()
            wait_until(lambda: Slow.closed == 1 == Slow.made)

    def test_what_goes_wrong_with_one_connection_ends_no_other(self) -> None:
        peer = self.peer().upgrade()
        wait_until(lambda: self.running.connections)
        with mock.patch.object(server.Handler, "tend", side_effect=MemoryError) as tend:
            wait_until(lambda: tend.called)
        peer.send(HELLO)
        self.assertEqual(peer.message()["type"], "observation")
        self.assertEqual(self.http("GET", "/health")[0], 200)

    def test_environments_are_closed_exactly_once(self) -> None:
        many = serve(Counted, max_concurrent_envs=100)
        ends: list[Callable[[RawPeer], Any]] = [
            lambda p: p.send(frame(8)),
            lambda p: p.send(text_frame({"type": "close"})),
            lambda p: p.send(b"\xff\xff"),
            lambda p: p.sock.close(),
            lambda p: p.sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            ),
            lambda p: p.send(
                text_frame({"type": "reset", "data": {"episode_id": "close raises"}})
            ),
        ]
        for end in ends * 3:
            with self.peer(many).upgrade() as peer:
                peer.send(HELLO)
                peer.message()
                end(peer)
        for i in range(3):
            self.http("POST", "/reset", {}, {"X-Session-Id": str(i)}, many)
        self.http("POST", "/close", {}, {"X-Session-Id": "0"}, many)
        wait_until(lambda: len(many.app._sessions) == 2, "the end of the others")
        many.stop()
        self.assertEqual((Counted.made, Counted.closed), (21, 21))

    def test_connections_cut_anywhere_leave_nothing(self) -> None:
        chance = random.Random(3)
        with serve(Counted, max_concurrent_envs=1000) as running:
            handshake = (
                f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{running.server_port}\r\nUpgrade: websocket\r\n"
                "Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
                "Sec-WebSocket-Version: 13\r\n\r\n"
            ).encode()
            post = (
                b"POST /step HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b'Content-Length: 26\r\n\r\n{"action":{"message":"x"}}'
            )
            before = threading.active_count()
            for i in range(300):
                peer = RawPeer(running)
                stream = handshake + HELLO * 3 + frame(8) if i % 2 else post * 2
                peer.send(stream[: chance.randrange(len(stream))])
                if i % 3 == 0:
                    reset = struct.pack("ii", 1, 0)
                    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                peer.sock.close()
            wait_until(lambda: not running.connections, "the end of all connections")
            wait_until(
                lambda: threading.active_count() <= before, "the end of their threads"
            )
            self.assertLessEqual(Counted.made - Counted.closed, 1)  # the shared one

    def test_slow_peers_are_dropped(self) -> None:
        post = "POST /step HTTP/1.1\nHOST\nContent-Type: application/json\nContent-Length: 26"
        with (
            constants(HEADER_SECONDS=0.3, IDLE_SECONDS=0.5, TICK_SECONDS=0.05),
            serve() as running,
        ):
            silent, half, stalled, idle, ws = (self.peer(running) for _ in range(5))
            half.send(b"GET / HT")
            stalled.request(post, b'{"act')
            idle.request("GET /health HTTP/1.1\nHOST")
            ws.upgrade().send(HELLO[:5])
            self.assertEqual(idle.response()[0], 200)
            for peer in (silent, half, stalled, idle, ws):
                self.assertTrue(peer.at_end())
            wait_until(lambda: not running.connections)

    def test_drip_of_a_body_is_dropped(self) -> None:
        head = b"POST /step HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        short = constants(HEADER_SECONDS=0.3, TICK_SECONDS=0.05)
        with short, serve() as running:
            chunked, framed = self.peer(running), self.peer(running).upgrade()
            chunked.send(head)
            framed.send(frame(1, b"x" * 10_000)[:10])
            with self.assertRaises(OSError):
                for _ in range(1000):
                    chunked.send(b"1\r\n \r\n")
                    time.sleep(0.01)
            with self.assertRaises(OSError):
                for _ in range(1000):
                    framed.send(b"x")
                    time.sleep(0.01)

    def test_drip_of_bytes_does_not_hold_a_connection(self) -> None:
        short = constants(HEADER_SECONDS=0.3, TICK_SECONDS=0.05)
        with short, serve() as running, self.peer(running) as peer:
            peer.send(b"GET /health HTTP/1.1\r\nA: ")
            with self.assertRaises(OSError):
                for _ in range(1000):
                    peer.send(b"x")
                    time.sleep(0.01)

    def test_peer_that_reads_nothing_is_dropped(self) -> None:
        with (
            constants(HEADER_SECONDS=0.3, TICK_SECONDS=0.05),
            serve(Counted) as running,
        ):
            peer = self.peer(running).upgrade()
            peer.sock.settimeout(5)
            step = text_frame({"type": "step", "data": {"message": "x" * 1_000_000}})
            with self.assertRaises(OSError):
                for _ in range(100):
                    peer.send(step)
            wait_until(lambda: Counted.closed == Counted.made == 1)

    def test_stop_answers_steps_in_progress(self) -> None:
        idle = self.peer(self.small).upgrade()
        busy = self.peer(self.small).upgrade()
        busy.send(text_frame({"type": "step", "data": {"message": "wait"}}))
        kept = self.peer(self.small)
        self.assertEqual(kept.ask("GET /health HTTP/1.1\nHOST")[0], 200)
        wait_until(lambda: Counted.made == 2)
        stopping = threading.Thread(target=self.small.stop)
        stopping.start()
        self.assertEqual(idle.close_code(), 1001)
        self.assertTrue(kept.at_end())
        Counted.gate.set()
        self.assertEqual(
            busy.message()["data"]["observation"]["echoed_message"], "wait"
        )
        busy_frame = busy.read_frame()
        self.assertEqual(busy_frame[1][:2], struct.pack("!H", 1001))
        busy.send(frame(8, busy_frame[1]))
        stopping.join(PATIENCE)
        self.assertEqual((Counted.made, Counted.closed), (2, 2))
        with self.assertRaises(OSError):
            socket.create_connection(("127.0.0.1", self.small.server_port), 1)

    def test_stop_does_not_wait_for_a_stuck_step(self) -> None:
        with constants(GRACE_SECONDS=0.2):
            stuck = self.peer(self.small).upgrade()
            stuck.send(text_frame({"type": "step", "data": {"message": "wait"}}))
            wait_until(lambda: Counted.made == 1)
            began = time.monotonic()
            self.small.stop()
            self.assertLess(time.monotonic() - began, 3)
            self.assertEqual(Counted.closed, 1)
            Counted.gate.set()

    def test_many_threads_on_both_transports(self) -> None:
        def play(number: int) -> list[Any]:
            client_cls = BenchmarkEnvWS if number % 2 else BenchmarkEnv
            with client_cls(self.running.url) as env:
                env.reset(episode_id=f"e{number}")
                found = []
                for step in range(1, 16):
                    result = env.step(BenchmarkAction(f"{number}:{step}"))
                    found.append(
                        (
                            result.observation.echoed_message,
                            result.observation.metadata["step"],
                        )
                    )
                state = env.state()
                return [*found, state.episode_id, state.step_count]

        with ThreadPoolExecutor(24) as pool:
            for number, found in enumerate(pool.map(play, range(48))):
                expected = [(f"{number}:{step}", step) for step in range(1, 16)]
                self.assertEqual(found, [*expected, f"e{number}", 15])

    def test_log_cannot_be_forged(self) -> None:
        logging.disable(logging.NOTSET)
        with self.assertLogs("openenv", "INFO") as logs:
            self.http("POST", "/reset", {}, {"X-Session-Id": "a\x9b[31m\xff"})
            with self.peer() as peer:
                peer.ask("GET /\x80%0aINFO\x9b HTTP/1.1\nHOST")
        logging.disable(logging.CRITICAL)
        self.assertEqual(len(logs.output), 3)
        for line in logs.output:
            self.assertTrue(line.isascii() and line.isprintable(), line)


class LogTest(unittest.TestCase):
    def test_formatter_escapes_and_indents(self) -> None:
        formatter = server._Formatter("%(levelname)s %(message)s")
        try:
            raise ValueError("x\n2026-01-01 INFO forged\x1b[31m\x9b")
        except ValueError:
            record = logging.LogRecord(
                "", logging.ERROR, "", 0, "failed", (), sys.exc_info()
            )
        lines = formatter.format(record).split("\n")
        self.assertEqual(lines[0], "ERROR failed")
        self.assertTrue(all(line.startswith("    ") for line in lines[1:]))
        self.assertIn("    2026-01-01 INFO forged\\x1b[31m\\x9b", lines)


class AppTest(unittest.TestCase):
    def test_instance_is_refused(self) -> None:
        with self.assertRaisesRegex(TypeError, "pass the class"):
            serve(BenchmarkEnvironment())  # type: ignore[arg-type]

    def test_unsafe_concurrency_is_refused(self) -> None:
        class Single(BenchmarkEnvironment):
            SUPPORTS_CONCURRENT_SESSIONS = False

        with self.assertRaisesRegex(ValueError, "SUPPORTS_CONCURRENT_SESSIONS"):
            serve(Single, max_concurrent_envs=2)
        with self.assertRaises(ValueError):
            serve(max_concurrent_envs=0)
        app = server.create_app(Single, BenchmarkAction, BenchmarkObservation)
        self.assertEqual(app.max_concurrent_envs, 1)
        app = server.create_app(
            BenchmarkEnvironment, BenchmarkAction, BenchmarkObservation, "name"
        )
        self.assertEqual(
            (app.max_concurrent_envs, app.metadata["name"]), (1000, "name")
        )

    def test_asynchronous_environment(self) -> None:
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
                    result = env.step(BenchmarkAction("x"))
                    self.assertEqual(
                        result.observation.metadata,
                        {"step": 1, "seed": 5, "level": "hard"},
                    )

    def test_keys_that_are_no_texts_become_texts(self) -> None:
        keys: dict[Any, Any] = {True: 1, None: 2, 1.5: 3}

        class Keyed(BenchmarkEnvironment):
            def step(
                self, action: BenchmarkAction, timeout_s: float | None = None
            ) -> BenchmarkObservation:
                return BenchmarkObservation(action.message, metadata=keys)

        with serve(Keyed) as running, BenchmarkEnvWS(running.url) as env:
            for size in (1, 100_000):
                metadata = env.step(BenchmarkAction("x" * size)).observation.metadata
                self.assertEqual(metadata, {"true": 1, "null": 2, "1.5": 3})

    def test_an_action_that_fails_by_itself(self) -> None:
        @dataclass
        class Fussy(BenchmarkAction):
            def __post_init__(self) -> None:
                if self.message == "no":
                    sys.exit("no")

        app = server.create_app(BenchmarkEnvironment, Fussy, BenchmarkObservation)
        with app.start() as running, BenchmarkEnvWS(running.url) as env:
            failure = self.assertRaisesRegex(RuntimeError, "no .code: EXECUTION_ERROR")
            with self.assertLogs("openenv", "ERROR"), failure:
                env.step(BenchmarkAction("no"))
            self.assertEqual(env.step(BenchmarkAction("yes")).reward, 0.3)


# ---------------------------------------------------------------------------
# The clients
# ---------------------------------------------------------------------------


class ClientTest(ServerCase):
    def test_both_clients(self) -> None:
        for cls in (BenchmarkEnvWS, BenchmarkEnv):
            for url in (
                self.running.url,
                self.running.url[7:] + "/",
                self.running.url.replace("http", "ws"),
            ):
                with self.subTest(cls=cls, url=url), cls(url) as env:
                    first = env.reset(seed=1, episode_id="e")
                    self.assertIsInstance(first, StepResult)
                    self.assertEqual(
                        first.observation.echoed_message, "Benchmark environment ready!"
                    )
                    long = ("y" * 65_537, 'a"b\\c\n\x7fü' * 9_999, "\x1f" * 65_537)
                    for message in ("", "x" * 127, "𝄞 ünï", "\ud800", *long):
                        result = env.step(BenchmarkAction(message), timeout_s=3)
                        self.assertEqual(result.observation.echoed_message, message)
                        self.assertEqual(
                            (result.reward, result.done), (len(message) / 10, False)
                        )
                    self.assertEqual(env.state(), BenchmarkState("e", 7))
                    env.close()
                    env.close()
        self.assertEqual(self.http("GET", "/health")[0], 200)

    def test_generic_clients_take_and_give_dicts(self) -> None:
        clients: list[type[client.EnvClient[Any, Any, Any]]]
        clients = [client.HTTPEnvClient, client.WebSocketEnvClient]
        for cls in clients:
            with cls(self.running.url) as env:
                env.reset()
                result = env.step({"message": "Hi"})
                self.assertEqual(result.observation["echoed_message"], "Hi")
                self.assertEqual(env.state()["step_count"], 1)
                with self.assertRaises(RuntimeError) as caught:
                    env.step({"mesage": "Hi"})
                error = caught.exception
                assert isinstance(error, client.ServerError)
                self.assertEqual(error.code, "VALIDATION_ERROR")
                self.assertRegex(
                    str(error), r"^Server error: .*\(code: VALIDATION_ERROR\)$"
                )
                self.assertEqual(
                    [f["type"] for f in error.errors], ["missing", "extra_forbidden"]
                )
                self.assertEqual(env.state()["step_count"], 1)

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
        wait_until(lambda: not self.running.app._sessions)

    def test_lost_connection_is_said_and_not_repaired(self) -> None:
        running = serve()
        env = BenchmarkEnvWS(running.url).connect()
        env.reset()
        running.stop()
        for _ in range(3):
            with self.assertRaises(ConnectionError):
                env.step(BenchmarkAction("x"))
        with serve() as second:
            env._url = f"ws{second.url[4:]}/ws"
            with self.assertRaisesRegex(
                ConnectionError, "connect\\(\\) begins a new session"
            ):
                env.reset()
            env.connect()
            env.reset()
            env.disconnect()
            with self.assertRaises(ConnectionError):
                env.state()
            env.close()

    def test_late_answer_is_never_taken_for_the_next(self) -> None:
        Counted.gate = threading.Event()
        with serve(Counted) as running:
            env = BenchmarkEnvWS(running.url, message_timeout_s=0.1)
            env.reset()
            with self.assertRaises(TimeoutError):
                env.step(BenchmarkAction("wait"))
            Counted.gate.set()
            with self.assertRaises(ConnectionError):
                env.step(BenchmarkAction("next"))
            slow = BenchmarkEnv(running.url, request_timeout_s=0.1)
            slow.reset()
            Counted.gate.clear()
            with self.assertRaises(TimeoutError):
                slow.step(BenchmarkAction("wait"))
            Counted.gate.set()

    def test_answers_that_make_no_sense(self) -> None:
        class Answers(server.Session):
            said = ""

            def answer(self, text: str | bytes) -> str | None:
                return self.said

        for said in (
            "nonsense",
            "[]",
            '{"type":"state","data":{}}',
            '{"type":"observation","data":5}',
            '{"type":"observation","data":{}}',
            '{"type":"observation","data":{"observation":{},"reward":NaN}}',
            '{"type":"observation","data":{"observation":{"echoed_message":5}}}',
        ):
            with mock.patch.object(server, "Session", Answers), self.subTest(said):
                Answers.said = said
                env = BenchmarkEnvWS(self.running.url)
                with self.assertRaises(ConnectionError):
                    env.reset()
                env.close()

    def test_http_answers_that_make_no_sense(self) -> None:
        cases: list[tuple[str, type[Exception]]] = [
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
        ]
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            ThreadPoolExecutor(1) as pool,
        ):
            env = BenchmarkEnv(f"127.0.0.1:{listener.getsockname()[1]}")
            for answer, expected in cases:

                def serve_one(answer: str = answer) -> None:
                    sock, _ = listener.accept()
                    with sock:
                        request = b""  # what is left unread would reset the connection
                        while not request.endswith(b"{}"):
                            request += sock.recv(65536)
                        sock.sendall(f"HTTP/1.1 {answer}".encode())

                serving_one = pool.submit(serve_one)
                with self.subTest(answer=answer[:60]), self.assertRaises(expected):
                    env.reset()
                serving_one.result(PATIENCE)
        with self.assertRaises(ValueError):
            BenchmarkEnv("localhost", default_headers={"A": "b\r\nC: d"})

    def test_idle_client_answers_pings(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            env = BenchmarkEnvWS(f"127.0.0.1:{listener.getsockname()[1]}")
            pool = ThreadPoolExecutor(1)
            connecting = pool.submit(env.connect)
            sock, _ = listener.accept()
            sock.settimeout(PATIENCE)
            key = re.search("Key: (.+)\r\n", sock.recv(65536).decode())
            sock.sendall(
                b"HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: upgrade\r\n"
                + f"Sec-WebSocket-Accept: {client.accept_key(key[1] if key else '')}\r\n\r\n".encode()
            )
            connecting.result(PATIENCE)
            answering = pool.submit(env.state)
            sock.recv(65536)
            # One ping comes in the packet of the answer, one a little later.
            sock.sendall(
                frame(1, b'{"type":"state","data":{}}', masked=False)
                + frame(9, b"a", masked=False)
            )
            answering.result(PATIENCE)
            self.assertEqual(sock.recv(65536)[:2], b"\x8a\x81")
            sock.sendall(frame(9, b"bc", masked=False))
            self.assertEqual(sock.recv(65536)[:2], b"\x8a\x82")
            # An answer nobody asked for is not taken for the next one.
            sock.sendall(
                frame(1, b'{"type":"state","data":{"step_count":9}}', masked=False)
            )
            wait_until(lambda: env._ws and env._ws._inbox)
            with self.assertRaises(ConnectionError):
                env.state()
            sock.close()
            env.close()
            pool.shutdown()

    def test_threads_may_share_a_client(self) -> None:
        for cls in (BenchmarkEnvWS, BenchmarkEnv):
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

    def test_default_headers_and_proxies(self) -> None:
        seen: list[str] = []
        handler = server.Handler._check_origin

        def spy(self: server.Handler) -> None:
            seen.append(self.fields.get("authorization", ""))
            handler(self)

        proxies = {
            "http_proxy": "http://127.0.0.1:9",
            "all_proxy": "http://127.0.0.1:9",
        }
        with (
            mock.patch.object(server.Handler, "_check_origin", spy),
            mock.patch.dict(os.environ, proxies),
        ):
            headers = {"Authorization": "Bearer secret"}
            with BenchmarkEnv(self.running.url, default_headers=headers) as over_http:
                over_http.reset()
            with BenchmarkEnvWS(self.running.url, default_headers=headers) as ws:
                ws.reset()
        self.assertEqual(seen, ["Bearer secret"] * 3)

    def test_unreachable_server(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"127.0.0.1:{listener.getsockname()[1]}"
            with self.assertRaisesRegex(ConnectionError, "within 0.05 s"):
                BenchmarkEnvWS(url, connect_timeout_s=0.05).connect()
        for cls in (BenchmarkEnvWS, BenchmarkEnv):
            with self.assertRaises(ConnectionError):
                cls(url).reset()

    def test_trace(self) -> None:
        lines: list[str] = []
        with BenchmarkEnvWS(self.running.url, trace=lines.append) as ws:
            ws.reset()
            ws.step(BenchmarkAction("x" * 1000))
        text = "\n".join(lines)
        self.assertIn("-> GET /ws HTTP/1.1", text)
        self.assertIn("<- HTTP/1.1 101 Switching Protocols", text)
        self.assertIn("-> FIN=1 opcode=0x1 (text) MASK=1 length=26  ", text)
        self.assertIn("<- FIN=1 opcode=0x8 (close) MASK=0 length=2  1000", text)
        self.assertLess(max(map(len, lines)), 300)
        lines.clear()
        with BenchmarkEnv(self.running.url, trace=lines.append) as over_http:
            over_http.reset()
        self.assertIn("-> POST /reset HTTP/1.1", lines)
        self.assertIn("<- HTTP/1.1 200 OK", lines)


# ---------------------------------------------------------------------------
# The command lines
# ---------------------------------------------------------------------------


def environment(**extra: str) -> dict[str, str]:
    """What a command of ours needs of this process's environment."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PORT", "SPACE_HOST")}
    return {**kept, "PYTHONUNBUFFERED": "1", **extra}


def run(*arguments: str, cwd: Path = HERE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


class Command:
    """A server in a process of its own, as ``python3 server.py`` starts it."""

    def __init__(self, *arguments: str, cwd: Path = HERE, **env: str) -> None:
        command = [sys.executable, str(HERE / "server.py"), *arguments]
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment(**env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.url = self.next_url()

    def next_url(self) -> str:
        assert self.process.stdout
        self.line = self.process.stdout.readline()
        found = re.search(r"http://\S+?:\d+", self.line)
        return found[0] if found else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.terminate()
        self.errors = self.process.communicate(timeout=PATIENCE)[1]


class CommandLineTest(unittest.TestCase):
    def test_server_loads_nothing_that_it_may_not_need(self) -> None:
        unused = "{'argparse', 'asyncio', 'hashlib', 'urllib.request'}"
        code = f"import server, sys; print({unused} & set(sys.modules))"
        self.assertEqual(output_of([sys.executable, "-S", "-c", code]), "set()\n")

    def test_server_says_where_it_is(self) -> None:
        with Command("--port", "0") as command:
            self.assertIn(f"{command.url}/web", command.line)
            self.assertIn(f"{command.url}/docs", command.line)
            with BenchmarkEnvWS(command.url) as env:
                self.assertEqual(env.reset().reward, 0.0)
        self.assertEqual(command.process.returncode, 0)
        self.assertRegex(
            command.errors, r"session ws-1 opened\n.*session ws-1 closed after 0 steps"
        )
        with Command(PORT="0") as command:
            self.assertTrue(command.url)

    def test_mistakes_are_one_line_and_code_2(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as busy:
            cases = [
                (("server.py", "--port", str(busy.getsockname()[1])), "in use"),
                (("server.py", "--port", "x"), "invalid int"),
                (("server.py", "--port", "99999"), "port"),
                (("server.py", "--host", "no.such.host.invalid"), "cannot listen"),
                (("server.py", "--env", "nothing:Here"), "nothing"),
                (("server.py", "--env", "benchmark"), "module:Class"),
                (("server.py", "--env", "benchmark:Missing"), "no class Missing"),
                (("server.py", "--env", "benchmark:BenchmarkAction"), "type hints"),
                (("server.py", "--max-concurrent-envs", "0"), "at least 1"),
                (("server.py", "--nonsense"), "--nonsense"),
                (("server.py", "--log-level", "loud"), "loud"),
                (("client.py",), "messages"),
                (("client.py", "--url", "127.0.0.1:1", "x"), "cannot connect"),
                (("client.py", "--bench", "0"), "above 0"),
            ]
            with ThreadPoolExecutor(4) as pool:
                ends = list(pool.map(lambda case: run(*case[0]), cases))
        for (arguments, words), done in zip(cases, ends):
            with self.subTest(arguments=arguments):
                self.assertEqual((done.returncode, done.stdout), (2, ""))
                self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
                self.assertIn(words, done.stderr)

    def test_help_and_version(self) -> None:
        for program in ("server.py", "client.py"):
            self.assertEqual(
                run(program, "--version").stdout, f"{program} {benchmark.__version__}\n"
            )
            self.assertIn("--", run(program, "--help").stdout)

    def test_client_shows_the_whole_thing(self) -> None:
        expected = "'Hello' length 5 reward 0.5\n'World' length 5 reward 0.5\n"
        for options in ((), ("--http",)):
            done = run("client.py", "Hello", "World", *options)
            self.assertEqual(
                (done.returncode, done.stdout, done.stderr), (0, expected, "")
            )
        done = run("client.py", "--trace", "Hello")
        self.assertIn("-> GET /ws HTTP/1.1", done.stderr)

    def test_benchmark(self) -> None:
        for options in (
            (),
            ("--sessions", "3"),
            ("--http", "--sessions", "2", "--size", "70000"),
        ):
            done = run("client.py", "--bench", "0.2", "--json", *options)
            result = json.loads(done.stdout)
            self.assertEqual((done.returncode, result["errors"]), (0, 0))
            self.assertGreater(result["steps_per_second"], 0)
            self.assertLessEqual(result["p50_ms"], result["p99_ms"])
        self.assertIn("steps_per_second", run("client.py", "--bench", "0.1").stdout)

    def test_environment_of_ones_own(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "my_env.py").write_text(
                "from benchmark import *\nclass Mine(BenchmarkEnvironment):\n"
                "    SUPPORTS_CONCURRENT_SESSIONS = False\n"
                "    def step(self, action: BenchmarkAction) -> BenchmarkObservation:\n"
                "        return BenchmarkObservation(echoed_message='mine')\n"
            )
            with (
                Command(
                    "--port", "0", "--env", "my_env:Mine", cwd=Path(folder)
                ) as command,
                BenchmarkEnvWS(command.url) as env,
            ):
                self.assertEqual(
                    env.step(BenchmarkAction("x")).observation.echoed_message,
                    "mine",
                )
                with (
                    BenchmarkEnv(command.url) as second,
                    self.assertRaises(client.ServerError),
                ):
                    second.reset()

    @unittest.skipIf(os.name == "nt", "Windows has no such signals")
    def test_signals(self) -> None:
        with Command("--port", "0") as command:
            command.process.terminate()  # as soon as it said where it is
        self.assertEqual(command.process.returncode, 0)
        for number in (signal.SIGTERM, signal.SIGINT):
            with Command("--port", "0") as command, BenchmarkEnvWS(command.url) as env:
                env.reset()
                command.process.send_signal(number)
                self.assertEqual(command.process.wait(PATIENCE), 0)
                with self.assertRaisesRegex(ConnectionError, "1001|broke|refused"):
                    env.step(BenchmarkAction("x"))
            self.assertNotIn("Traceback", command.errors)

    @unittest.skipIf(os.name == "nt", "Windows has no such signals")
    def test_second_interrupt_exits_at_once(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "stuck.py").write_text(
                "import time\nfrom benchmark import *\nclass Stuck(BenchmarkEnvironment):\n"
                "    def step(self, action: BenchmarkAction) -> BenchmarkObservation:\n"
                "        print('stuck', flush=True)\n        time.sleep(60)\n        return 0\n"
            )

            def stop(signals: int) -> tuple[int, float]:
                options = ("--port", "0", "--env", "stuck:Stuck")
                with Command(*options, cwd=Path(folder)) as command:
                    ws = client.WebSocket.connect(f"{command.url}/ws")
                    ws.send('{"type":"step","data":{"message":""}}')
                    assert command.process.stdout
                    command.process.stdout.readline()
                    began = time.monotonic()
                    for _ in range(signals):
                        command.process.send_signal(signal.SIGINT)
                        time.sleep(0.5)  # two at once would count as one
                    code = command.process.wait(PATIENCE)
                    ws.drop()
                    return code, time.monotonic() - began

            with ThreadPoolExecutor(2) as pool:
                (once, seconds), (twice, less) = pool.map(stop, (1, 2))
            self.assertEqual((once, twice), (0, -signal.SIGINT))
            self.assertLess(seconds, 5.5)
            self.assertLess(less, seconds)

    def test_reload(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "fresh.py")

            def write(word: str) -> None:
                source.write_text(
                    "from benchmark import *\nclass Fresh(BenchmarkEnvironment):\n"
                    "    def step(self, action: BenchmarkAction) -> BenchmarkObservation:\n"
                    f"        return BenchmarkObservation(echoed_message={word})\n"
                )
                os.utime(
                    source, (time.time(), time.time() + len(word))
                )  # surely another

            def echo() -> str:
                with BenchmarkEnvWS(command.url) as env:
                    return env.step(BenchmarkAction("x")).observation.echoed_message

            write("'one'")
            with Command(
                "--port", "0", "--env", "fresh:Fresh", "--reload", cwd=Path(folder)
            ) as command:
                self.assertEqual(echo(), "one")
                write("'broken")
                assert command.process.stderr
                while "--env fresh" not in (line := command.process.stderr.readline()):
                    self.assertNotEqual(line, "")
                write("'threefold'")
                command.url = command.next_url()
                self.assertEqual(echo(), "threefold")
            self.assertEqual(command.process.returncode, 0)


# ---------------------------------------------------------------------------
# The pages, in a browser
# ---------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
CHROMIUM_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --disable-sync",
    "--no-first-run --disable-background-networking --disable-component-update",
    "--disable-dev-shm-usage --disable-crash-reporter --disable-breakpad",
    "--disable-extensions --disable-site-isolation-trials --renderer-process-limit=1",
    "--remote-debugging-port=0",
)
ONLY_HERE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "ArrowDown": (40, ""), " ": (32, " ")}
CONTROL, SHIFT = 2, 8
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

# Every visible text with less than the contrast that WCAG AA asks for.
FAINT = r"""
(() => {
  const parse = color => color.match(/[\d.]+/g).map(Number);
  const linear = part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) =>
    0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = element => {
    const color = element ? parse(getComputedStyle(element).backgroundColor) : [255, 255, 255];
    return color[3] === 0 ? behind(element.parentElement) : color;
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (texts.nextNode()) {
    const {data, parentElement: element} = texts.currentNode, style = getComputedStyle(element);
    if (!data.trim() || !element.checkVisibility() || element.closest(':disabled')) continue;
    const ink = light(parse(element.closest('svg') ? style.fill : style.color));
    const paper = light(behind(element));
    const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)}: ${data.slice(0, 40)}`);
  }
  return found;
})()
"""

# All that Tab is to reach; and what is wrong with where it has come to.
WANTED = """
document.activeElement.blur();
window.wanted = new Set(
  all('a, button:enabled, input, select, textarea, summary, [tabindex="0"]')
    .filter(element => element.checkVisibility({visibilityProperty: true})));
wanted.size
"""
FOCUSED = """
(() => {
  const element = document.activeElement;
  if (element === document.body) return '';  // once around
  wanted.delete(element);
  const {x, y, width, height} = element.getBoundingClientRect();
  const top = document.elementFromPoint(x + Math.min(width, 40) / 2, y + Math.min(height, 20) / 2);
  if (!element.contains(top)) return `${top?.outerHTML} covers ${element.outerHTML}`;
  const {outlineStyle, outlineWidth} = getComputedStyle(element);
  return `${outlineStyle} ${outlineWidth}` === 'solid 2px' ? '' : `no ring: ${element.outerHTML}`;
})()
"""


class Browser:
    """A headless Chromium, spoken to over the DevTools protocol by our own WebSocket."""

    def __init__(self, home: Path) -> None:
        self.home = home  # which it fills, and `close` removes
        self.process = subprocess.Popen(
            [
                str(CHROMIUM),
                *" ".join(CHROMIUM_FLAGS).split(),
                ONLY_HERE,
                f"--user-data-dir={home}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.socket: client.WebSocket | None = None
        self.numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []

    def connect(self) -> None:
        note = self.home / "DevToolsActivePort"
        wait_until(lambda: note.is_file() and "/" in note.read_text(), "Chromium")
        port, path = note.read_text().split()
        url = f"ws://127.0.0.1:{port}{path}"
        self.socket = client.WebSocket.connect(url, timeout=PATIENCE)

    def send(self, method: str, session: str | None = None, **params: Any) -> Any:
        """Send a command and return its result; what happens meanwhile goes to `events`."""
        assert self.socket
        command = {"id": next(self.numbers), "method": method, "params": params}
        if session:
            command["sessionId"] = session
        self.socket.send(json.dumps(command))
        while True:
            answer = json.loads(self.socket.recv())
            if "method" in answer:
                self.events.append(answer)
            elif answer["id"] == command["id"]:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                return answer["result"]

    def close(self) -> None:
        """End every process of it, and remove what they wrote."""
        with contextlib.suppress(OSError, AssertionError, subprocess.TimeoutExpired):
            self.send("Browser.close")
            self.process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.socket:
            self.socket.close()
        wait_until(self.removed, "the end of Chromium")

    def removed(self) -> bool:
        shutil.rmtree(self.home, ignore_errors=True)  # while a process may still write
        return not self.home.exists()


class Page:
    """A tab: what a person does to it, and what there is to see."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        attached = browser.send(
            "Target.attachToTarget", targetId=self.target, flatten=True
        )
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Page.addScriptToEvaluateOnNewDocument", source=PREPARE)
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)

    def send(self, method: str, **params: Any) -> Any:
        return self.browser.send(method, self.session, **params)

    def close(self) -> None:
        self.browser.send("Target.closeTarget", targetId=self.target)

    def open(self, url: str, ready: str = "true") -> None:
        self.send("Page.navigate", url=url)
        self.wait_for(f"document.readyState === 'complete' && {ready}")

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

    def text(self, selector: str) -> str:
        return self.texts(selector)[0]

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.evaluate(f"all(`{selector}`).map(e => e.textContent)")
        return found

    def press(self, key: str, modifiers: int = 0) -> None:
        number, text = KEYS[key]
        for kind in ("keyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                text=text if kind == "keyDown" else "",
                windowsVirtualKeyCode=number,
                modifiers=modifiers,
            )

    def click(self, selector: str) -> None:
        self.wait_for(f"one(`{selector}`)?.disabled !== true")
        script = f"""(() => {{
          one(`{selector}`).scrollIntoView({{block: 'center'}});
          const {{x, y, width, height}} = one(`{selector}`).getBoundingClientRect();
          return {{x: x + width / 2, y: y + height / 2, button: 'left', clickCount: 1}};
        }})()"""
        place = self.evaluate(script)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, **place)

    def fill(self, selector: str, text: str) -> None:
        """Type a text in place of what the field holds."""
        self.evaluate(f"one(`{selector}`).focus(); one(`{selector}`).select()")
        self.send("Input.insertText", text=text)

    def look(self, scheme: str, width: int) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", features=features)
        size = {"width": width, "height": 800, "deviceScaleFactor": 1}
        self.send("Emulation.setDeviceMetricsOverride", **size, mobile=width < 600)

    def screenshot(self, path: Path) -> None:
        self.evaluate("scrollTo(0, 0)")
        how = {"captureBeyondViewport": True, "optimizeForSpeed": True}
        image = self.send("Page.captureScreenshot", **how)
        path.write_bytes(b64decode(image["data"]))

    def faults(self, hosts: list[str]) -> list[str]:
        """Return what the console shows, and requests to any other host."""
        found = []
        for event in self.browser.events:
            kind, params = event["method"], event["params"]
            if event.get("sessionId") != self.session:
                continue
            if kind == "Log.entryAdded":
                found.append(f"{params['entry']['text']} {params['entry'].get('url')}")
            elif kind == "Runtime.exceptionThrown":
                found.append(json.dumps(params["exceptionDetails"]))
            elif kind == "Runtime.consoleAPICalled":
                found.append(json.dumps(params["args"]))
            elif kind in ("Network.requestWillBeSent", "Network.webSocketCreated"):
                url = params.get("url") or params["request"]["url"]
                scheme, _, rest = url.partition(":")
                host = rest.strip("/").partition("/")[0]
                if scheme not in ("data", "blob") and host not in hosts:
                    found.append(url)
        return found


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
    count: int = field(metadata={"minimum": 1, "maximum": 9, "description": MARKUP})
    words: list[str]
    pick: Pick = Pick.PLAIN
    exact: bool = False
    pace: Optional[float] = None  # noqa: UP045
    note: str = MARKUP


class FormEnvironment(BenchmarkEnvironment):
    """Echoes every field: <img src=x onerror=window.hacked=1>. Fails at a count of 9."""

    def step(self, action: Any, timeout_s: float | None = None) -> BenchmarkObservation:
        if action.count == 9:
            raise ValueError(MARKUP)
        return super().step(BenchmarkAction(client.encode_json(action)))


@unittest.skipUnless(CHROMIUM, f"there is no browser: none of {', '.join(BROWSERS)}")
class PageTest(unittest.TestCase):
    """Real input to /web and /docs, and what a person then sees."""

    here: Path  # where the browser and the tests write
    browser: Browser
    running: server.Server
    form: server.Server

    @classmethod
    def setUpClass(cls) -> None:
        logging.disable(logging.CRITICAL)
        cls.addClassCleanup(logging.disable, logging.NOTSET)
        cls.here = Path(tempfile.mkdtemp())
        cls.browser = Browser(cls.here)
        cls.addClassCleanup(cls.browser.close)
        cls.running = serve()
        cls.addClassCleanup(cls.running.stop)
        types = FormAction, BenchmarkObservation
        cls.form = server.create_app(FormEnvironment, *types, env_name=MARKUP).start()
        cls.addClassCleanup(cls.form.stop)
        cls.browser.connect()

    def setUp(self) -> None:
        self.page = Page(self.browser)
        self.addCleanup(self.page.close)
        self.hosts: list[str] = []  # of the pages that were opened
        self.allowed = "nothing"  # a pattern of the faults that belong to the test

    def tearDown(self) -> None:
        faults = self.page.faults(self.hosts)
        self.assertEqual([f for f in faults if not re.search(self.allowed, f)], [])

    def open(self, path: str, running: server.Server | None = None) -> None:
        url = (running or self.running).url
        self.hosts.append(url.partition("//")[2])
        drawn = {"web": "one('#state dd')", "docs": "one('#presets button')"}
        self.page.open(f"{url}/{path}", drawn[path])
        self.assertLess(self.page.evaluate("moved"), 0.1)

    def step(self, message: str, count: int) -> None:
        self.page.fill("#action-message", message)
        self.page.press("Enter")
        self.page.wait_for(f"$('count').textContent === '{count}'")

    def history(self) -> list[list[str]]:
        cells = "[...row.cells].map(cell => cell.textContent)"
        rows: list[list[str]] = self.page.evaluate(
            f"all('#history tr').map(row => {cells})"
        )
        return rows

    def line(self, plot: str) -> int:
        """Return the number of points that a line of the chart joins."""
        return int(
            self.page.evaluate(
                f"one('.line.{plot}').getAttribute('d').split(',').length - 1"
            )
        )

    def assert_only_text(self) -> None:
        script = "window.hacked ?? all('img, [onerror]').length"
        self.assertEqual(self.page.evaluate(script), 0)

    def assert_named(self) -> None:
        """Check that every control has a name, for those who cannot see where it stands."""
        for node in self.page.send("Accessibility.getFullAXTree")["nodes"]:
            if node.get("role", {}).get("value") in CONTROLS:
                self.assertTrue(node["name"]["value"], node)

    # -- /web ---------------------------------------------------------------------

    def test_web_plays_an_episode(self) -> None:
        page = self.page
        self.open("web")
        self.assertEqual(page.text("#status"), "Connected")
        self.step("Hi", 1)
        self.assertEqual((page.text("#reward"), self.line("reward")), ("0.2", 1))
        page.fill("#action-message", "caf\u00e9")
        page.press("Enter", SHIFT)
        page.send("Input.insertText", text="\U0001d11e")
        page.click("#step button")
        page.wait_for("$('count').textContent === '2'")
        self.assertEqual(
            page.texts("#observation dd")[:2], ["caf\u00e9\n\U0001d11e", "6"]
        )
        self.assertEqual(page.texts(".figures dd"), ["2", "0.6", "0.8", "no"])
        self.assertEqual(page.text("#news"), "Step 2, reward 0.6")
        self.assertEqual((self.line("reward"), self.line("total")), (2, 2))
        steps, actions, observations, rewards, latencies = zip(*self.history())
        self.assertEqual(steps, ("2", "1", "0"))
        self.assertEqual(actions[1:], ('{"message":"Hi"}', "reset"))
        self.assertEqual(json.loads(observations[1])["echoed_message"], "Hi")
        self.assertEqual(rewards, ("0.6", "0.2", "0"))
        self.assertRegex(latencies[0], r"^[\d.]+ m?s$")

        page.click("#options-seed")
        page.fill("#options-seed", "7")
        page.fill("#options-episode_id", "named")
        page.press("Enter")
        page.wait_for("$('state').textContent.includes('named')")
        page.wait_for("$('count').textContent === '0'")
        self.assertEqual(page.texts(".figures dd"), ["0", "0", "0", "no"])
        self.step("x", 1)
        page.click("#ask-state")
        page.wait_for("$('state-time').textContent === 'at step 1'")
        downloads = {"behavior": "allow", "downloadPath": str(self.here)}
        self.browser.send("Browser.setDownloadBehavior", **downloads)
        page.click("#download")
        file = self.here / "episodes.json"
        wait_until(file.is_file, "the download")
        first, second = json.loads(file.read_text("utf-8"))["episodes"]
        self.assertEqual([step["reward"] for step in first["steps"]], [0.2, 0.6])
        self.assertEqual((second["seed"], second["episode_id"]), (7, "named"))
        self.assertEqual(second["steps"][0]["action"], {"message": "x"})

    def test_web_logs_the_wire(self) -> None:
        page = self.page
        self.open("web")
        self.step("Hi", 1)
        kinds = page.evaluate("all('#wire > li').map(entry => entry.className)")
        self.assertEqual(kinds, ["received", "sent"] * 3 + ["note"])
        page.evaluate("all('#wire summary').forEach(summary => summary.click())")
        page.wait_for("all('#wire pre').length === 7")
        messages = [json.loads(text) for text in page.texts("#wire pre")[:6]]
        self.assertEqual(messages[1], {"type": "step", "data": {"message": "Hi"}})
        self.assertEqual(messages[0]["data"]["reward"], 0.2)
        kinds = [message["type"] for message in messages[2:]]
        self.assertEqual(kinds, ["state", "state", "observation", "reset"])
        self.assertRegex(page.text("#wire .received .latency"), r"^[\d.]+ m?s$")
        page.click("#pause")
        self.step("", 2)
        page.wait_for("$('pause').textContent === 'Resume (2)'")
        page.evaluate("for (let i = 0; i < 60; i++) $('step').requestSubmit()")
        page.wait_for("$('count').textContent === '62'")
        self.assertEqual(page.evaluate("$('wire').childElementCount"), 7)
        self.assertEqual(page.text("#pause"), "Resume (100)")
        page.click("#pause")
        page.wait_for("$('wire').childElementCount === 100")
        page.click("#clear")
        page.wait_for("$('wire').childElementCount === 0")

    def test_web_draws_a_form(self) -> None:
        page = self.page
        self.open("web", self.form)
        fields = "input[type=number]#action-count, input[type=number]#action-pace, "
        fields += "input[type=checkbox]#action-exact, select#action-pick, "
        fields += "textarea#action-words, textarea#action-note"
        self.assertEqual(page.evaluate(f"all('{fields}').length"), 6)
        self.assert_named()

        def submit(place: str, words: str) -> None:
            page.click("#step button")
            page.wait_for(f"$('{place}').textContent.includes('{words}')")

        page.fill("#action-count", "0")
        submit("action-count-note", "greater than or equal to 1")
        self.assertEqual(page.text("#fault"), "VALIDATION_ERROR: see the marked fields")
        self.assertTrue(page.evaluate("$('action-count').ariaInvalid === 'true'"))
        page.fill("#action-count", "2.5")
        page.fill("#action-words", '["a", 1]')
        submit("action-words-note", "1: Input should be a valid string")
        self.assertIn("valid integer", page.text("#action-count-note"))
        page.fill("#action-words", "[")
        submit("action-words-note", "Not JSON")
        page.fill("#action-count", "1e")
        submit("action-count-note", "should be a number")
        page.fill("#action-words", '["\u00e9"]')
        page.fill("#action-count", "9")
        submit("fault", f"EXECUTION_ERROR: {MARKUP}")
        page.fill("#action-count", "3")
        page.evaluate("$('action-exact').focus()")
        page.press(" ")
        page.evaluate("$('action-pick').focus()")
        page.press("ArrowDown")
        submit("count", "1")
        self.assertEqual(page.text("#fault") + page.text("#action-words-note"), "")
        echoed = json.loads(page.text("#observation dd"))
        given = {"count": 3, "words": ["\u00e9"], "pick": MARKUP, "exact": True}
        self.assertEqual(echoed, {**given, "pace": None, "note": MARKUP})
        self.assertEqual(page.texts("#name, #action-count-note"), [MARKUP, MARKUP])
        self.assert_only_text()

    def test_web_shows_text_as_text(self) -> None:
        page = self.page
        self.open("web")
        self.step(MARKUP, 1)
        page.click("#wire summary")
        page.wait_for("one('#wire pre')")
        for place in ("#observation", "#history tr", "#wire summary", "#wire pre"):
            self.assertIn("<img", page.text(place))
        long = "\u00e9<b>\U0001f600" * 20_000  # 100,000 code points
        page.evaluate(f"$('action-message').value = {json.dumps(long)}")
        page.click("#step button")
        page.wait_for("$('reward').textContent === '10000'")
        for place in ("#observation", "#history td + td", "#wire .sent"):
            page.evaluate(f"one('{place} summary').click()")
            page.wait_for(f"one('{place} pre')?.textContent.length >= 120000")
        self.assertEqual(page.text("#observation pre"), long)
        self.assert_only_text()

    def test_web_stays_smooth_for_a_thousand_steps(self) -> None:
        page = self.page
        self.open("web")
        page.fill("#action-message", "0123456789")
        page.evaluate("for (let i = 0; i < 1000; i++) $('step').requestSubmit()")
        page.wait_for("$('count').textContent === '1000'")
        self.assertEqual(
            page.texts("#total, #shown"), ["1000", "last 100 rows of 1001"]
        )
        self.assertEqual((self.line("reward"), self.line("total")), (1000, 1000))
        sizes = page.evaluate(
            "['#history tr', '#wire li', '*'].map(s => all(s).length)"
        )
        self.assertEqual(sizes[:2], [100, 100])
        self.assertLess(sizes[2], 4000)
        script = """new Promise(resolve => {
          const start = performance.now();
          const look = () => $('count').textContent === '1001'
            ? resolve(performance.now() - start) : requestAnimationFrame(look);
          $('step').requestSubmit();
          look();
        })"""
        self.assertLess(page.evaluate(script), 1000)  # milliseconds

    def test_web_reconnects(self) -> None:
        page = self.page
        types = BenchmarkEnvironment, BenchmarkAction, BenchmarkObservation
        with server.create_app(*types).start() as first:
            self.open("web", first)
            self.step("one", 1)
        page.wait_for("$('status').dataset.state === 'closed'")
        said = "Disconnected: the server is shutting down (code 1001). History kept."
        self.assertEqual(page.text("#status"), said)
        self.assertTrue(page.evaluate("one('#step button').disabled"))
        self.allowed = "ERR_CONNECTION_REFUSED"
        page.click("#reconnect")
        page.wait_for("$('status').textContent.includes('connection lost (code 1006)')")
        with server.create_app(*types).start(port=first.server_port):
            page.click("#reconnect")
            page.wait_for("$('count').textContent === '0'")
            self.step("two", 1)
            self.assertEqual([row[0] for row in self.history()], ["1", "0", "1", "0"])

    def test_web_has_a_quick_start(self) -> None:
        for running in (self.running, self.form):
            self.open("web", running)
            self.assertIn(f'("{running.url}")', self.page.text("#quick"))
            done = run("-c", self.page.text("#quick"))
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertEqual(len(done.stdout.splitlines()), 2)
            self.browser.send(
                "Browser.grantPermissions", permissions=["clipboardReadWrite"]
            )
            self.page.click("#quick-head button")
            self.page.wait_for("one('#quick-head button').textContent === 'Copied'")
            copied = self.page.evaluate("navigator.clipboard.readText()")
            self.assertEqual(copied, self.page.text("#quick"))

    def test_web_behind_a_prefix_and_in_a_frame(self) -> None:
        page = self.page
        with Proxy(self.running.server_port) as proxy:
            threading.Thread(target=proxy.serve_forever, daemon=True).start()
            self.addCleanup(proxy.shutdown)
            self.hosts.append(f"127.0.0.1:{proxy.server_address[1]}")
            url = f"http://{self.hosts[0]}/some/env"
            self.allowed = "/favicon.ico$"  # of /health, which is no page
            page.open(f"{url}/health")
            page.evaluate("document.body.innerHTML = '<iframe src=web></iframe>'")
            page.wait_for("frames[0].document.getElementById('state').children.length")
            quick = page.evaluate(
                "frames[0].document.getElementById('quick').textContent"
            )
            self.assertIn(f'("{url}")', quick)
            for path, target in {"": "web", "redoc": "docs"}.items():
                page.open(f"{url}/{path}")
                self.assertEqual(page.evaluate("location.href"), f"{url}/{target}")

    # -- /docs --------------------------------------------------------------------

    def operation(self, name: str) -> None:
        self.page.click(f"#{name} > summary")
        self.page.wait_for(f"one('#{name} form')")

    def attempt(self, name: str) -> dict[str, str]:
        """Press Try it; return the status line and the listings by their titles."""
        self.page.evaluate(f"one('#{name} .result').replaceChildren()")
        self.page.click(f"#{name} form button.primary")
        self.page.wait_for(f"one('#{name} .result pre')")
        titles, texts = (
            self.page.texts(f"#{name} .result {tag}") for tag in ("h4", "pre")
        )
        status = self.page.text(f"#{name} [role=status]")
        return {"Status": status, **dict(zip(titles, texts))}

    def test_docs_shows_and_tries_every_operation(self) -> None:
        page = self.page
        self.open("docs", self.form)
        self.assertEqual(page.text("#title"), MARKUP)
        self.allowed = "Failed to load resource.*(422|426|404)"
        paths = exchange(self.form.url, "GET", "/openapi.json")[1]["paths"]
        for path, methods in paths.items():
            for method, details in methods.items():
                name = details["operationId"]
                self.assertIn(path, page.text(f"#contents [href='#{name}']"))
                words = page.texts(f"#{name} > summary > *")
                self.assertEqual(words, [method.upper(), path, details["summary"]])
                self.operation(name)
                responses = page.texts(f"#{name} .operation > details > summary > b")
                self.assertEqual(responses, list(details["responses"]))
                status = self.attempt(name)["Status"]
                self.assertRegex(status, r"^\d{3} [\w ]+ in [\d.]+ m?s")
                self.assertIn(status[:3], ["200", *responses])  # after a redirect: 200
        self.assert_only_text()

    def test_docs_tries_in_a_session(self) -> None:
        page = self.page
        self.open("docs")
        page.fill("#headers-X-Session-Id", "it's")
        for name in ("post_reset", "post_step", "get_state"):
            self.operation(name)
        self.allowed = "Failed to load resource.* 404 .*/step$"
        self.assertEqual(self.attempt("post_step")["Status"][:4], "404 ")
        self.assertEqual(self.attempt("post_reset")["Status"][:4], "200 ")
        page.fill("#post_step-body", '{"action": {"message": "\u00e9\\u003c\'"}}')
        shown = self.attempt("post_step")
        observation = json.loads(shown["Body"])["observation"]
        self.assertEqual(observation["echoed_message"], "\u00e9<'")
        self.assertIn("content-type: application/json", shown["Headers"])
        self.assertEqual(json.loads(self.attempt("get_state")["Body"])["step_count"], 1)
        if shutil.which("curl"):
            command = shown["The same with curl"].replace(
                "curl", "curl -s --noproxy '*'", 1
            )
            done = subprocess.run(command, shell=True, capture_output=True, check=True)
            head, _, body = done.stdout.decode().partition("\r\n\r\n")
            self.assertIn(" 200 OK", head)
            observation["metadata"]["step"] += 1
            self.assertEqual(json.loads(body)["observation"], observation)

    def test_docs_has_a_console(self) -> None:
        page = self.page
        self.open("docs")
        page.click("#connect")
        page.wait_for("$('status').dataset.state === 'open'")
        sent = {'{"type": "state"}': "step_count", f'{{"{MARKUP}"': "INVALID_JSON"}
        for message, answer in sent.items():
            page.fill("#message", message)
            page.press("Enter", CONTROL)
            page.wait_for(f"one('#wire .received')?.textContent.includes('{answer}')")
        page.fill("#message", '{"type": "close"}')
        page.click("#send")
        page.wait_for("$('status').textContent.includes('code 1000')")
        self.assert_only_text()

    # -- both ---------------------------------------------------------------------

    def prepare(self, path: str) -> None:
        """Bring a page into a state in which it shows all kinds of things."""
        self.open(path)
        if path == "web":
            for count, message in enumerate(("Hello, World!", "x" * 200, MARKUP), 1):
                self.step(message, count)
            self.page.click("#wire summary")
        else:
            self.operation("post_step")
            self.attempt("post_step")
            self.page.click("#post_step .operation > details > summary")

    def test_both_look_right(self) -> None:
        page = self.page
        folder = Path(os.environ.get("SCREENSHOTS") or self.here)
        for path in ("web", "docs"):
            self.prepare(path)
            papers = set()
            for scheme, width in itertools.product(("light", "dark"), (360, 1440)):
                with self.subTest(path, scheme=scheme, width=width):
                    page.look(scheme, width)
                    page.screenshot(folder / f"{path}-{scheme}-{width}.png")
                    self.assertEqual(page.evaluate(FAINT), [])
                    wide = page.evaluate("document.documentElement.scrollWidth")
                    self.assertLessEqual(wide, width)
                    paper = "getComputedStyle(document.body).backgroundColor"
                    papers.add(page.evaluate(paper))
            self.assertEqual(len(papers), 2)

    def test_both_by_keyboard_alone(self) -> None:
        """Tab reaches all that can be used, in sight and with a ring around it."""
        page = self.page
        for path in ("web", "docs"):
            self.prepare(path)
            self.assert_named()
            for _ in range(page.evaluate(WANTED) + 2):
                page.press("Tab")
                self.assertEqual(page.evaluate(FOCUSED), "")
            missed = page.evaluate("[...wanted].map(element => element.outerHTML)")
            self.assertEqual(missed, [])


# ---------------------------------------------------------------------------
# README.md: what it shows is run, and must come out as shown
# ---------------------------------------------------------------------------

README_URL = "http://localhost:8000"  # of the server in README.md's examples
POSIX = os.name == "posix"

# A `docker` for LocalDockerProvider: its containers are processes that run the Dockerfile's
# CMD, but on a free port; what `docker` would know is in files in $DOCKER_STATE.
DOCKER = r"""#!{python}
import json, os, re, signal, subprocess, sys, time
from pathlib import Path

PROJECT, STATE = Path({project!r}), Path(os.environ["DOCKER_STATE"])


def running(pid):
    try:
        if Path("/proc").is_dir():
            return Path(f"/proc/{{pid}}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        os.kill(pid, 0)
        return True
    except OSError:
        return False


def wait(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def run(name, image):
    command = json.loads(re.findall(r"^CMD (.*)$", (PROJECT / "Dockerfile").read_text(), re.M)[0])
    command[command.index("python")] = sys.executable
    command[command.index("--port") + 1] = "0"
    if image != "benchmark-env:latest":
        text = "import time; print('last words on http://x:1', flush=True); time.sleep({{}})"
        command = [sys.executable, "-c", text.format(60 if image == "sick" else 0)]
    with open(STATE / f"{{name}}.log", "w") as log:
        child = subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=log,
                                 stderr=log, start_new_session=True)
    (STATE / name).write_text(str(child.pid))


command, *arguments = sys.argv[1:]
with open(STATE / "calls", "a") as calls:
    print(json.dumps(sys.argv[1:]), file=calls)
if command == "run":
    image, name = arguments[-1], arguments[arguments.index("--name") + 1]
    if image not in ("benchmark-env:latest", "dies", "sick"):
        sys.exit(f"Unable to find image {{image!r}} locally")
    run(name, image)
    sys.exit()
name = next(a for a in arguments if a.startswith("openenv-"))
if not (STATE / name).exists():
    sys.exit(f"Error: No such container: {{name}}")
log, pid = STATE / f"{{name}}.log", int((STATE / name).read_text())
if command == "port":
    wait(lambda: " on http://" in log.read_text() or not running(pid))
    print("127.0.0.1:" + re.findall(r" on http://[^:]+:(\d+)", log.read_text())[0])
elif command == "inspect":
    print(str(running(pid)).lower())
elif command == "logs":
    print(log.read_text(), end="")
elif command in ("stop", "rm"):
    if running(pid):
        os.kill(pid, signal.SIGTERM if command == "stop" else signal.SIGKILL)
    wait(lambda: not running(pid))
    if command == "rm":
        (STATE / name).unlink()
else:
    sys.exit(f"the stand-in has no {{command}}")
"""


class Block(NamedTuple):
    """A fenced block of README.md, and the ``text`` block right behind it, if there is one."""

    section: str
    language: str
    text: str
    output: Optional[str]  # noqa: UP045


@functools.cache
def readme() -> str:
    return (HERE / "README.md").read_text("utf-8")


@functools.cache
def blocks() -> tuple[Block, ...]:
    found: list[Block] = []
    section, end = "", 0
    pattern = re.compile(
        r"^## ([^\n]*)$|^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL
    )
    for match in pattern.finditer(readme()):
        if match[1]:
            section = match[1]
            continue
        behind = found and not readme()[end : match.start()].strip()
        if behind and match[2] == "text" and found[-1].language == "python":
            found[-1] = found[-1]._replace(output=match[3])
        else:
            found.append(Block(section, match[2], match[3], None))
        end = match.end()
    return tuple(found)


def select(language: str, section: str = "", holding: str = "") -> list[Block]:
    return [
        b
        for b in blocks()
        if b.language == language and section in b.section and holding in b.text
    ]


def one(language: str, section: str = "", holding: str = "") -> Block:
    (found,) = select(language, section, holding)
    return found


def commands(block: Block) -> list[tuple[str, str]]:
    """Return each command of a console block with its output."""
    parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]
    return [(command, rest) for command, _, rest in (p.partition("\n") for p in parts)]


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


def output_of(
    arguments: Sequence[str | Path],
    cwd: Path = HERE,
    env: Mapping[str, str] | None = None,
) -> str:
    """Run a command; return what it prints, on standard error too, in order."""
    done = subprocess.run(
        [str(a) for a in arguments],
        cwd=cwd,
        env=environment(**(env or {})),
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
def serving(
    *options: str, cwd: Path = HERE, module: str = "server.py"
) -> Iterator[tuple[str, subprocess.Popen[str], Path]]:
    """Run server.py on a free port; yield its URL, its process and the file of its log."""
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory, "log")
        with open(log, "w", encoding="utf-8") as stderr:
            process = subprocess.Popen(
                [sys.executable, *module.split(), "--port", "0", *options],
                cwd=cwd,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=stderr,
                encoding="utf-8",
            )
        assert process.stdout
        try:
            found = re.search(r"http://[^:/]+:\d+", process.stdout.readline())
            if not found:
                raise AssertionError(f"it does not start: {log.read_text('utf-8')}")
            yield found[0], process, log
        finally:
            process.terminate()
            process.communicate(timeout=10)


class ReadmeExamplesTest(unittest.TestCase):
    """Every Python block and every command with its output."""

    maxDiff = None

    def run_python(
        self, block: Block, url: str, env: Mapping[str, str] | None = None
    ) -> None:
        code = block.text.replace(README_URL, url)
        output = output_of([sys.executable, "-c", code], env=env)
        self.assertEqual(normalize(output), normalize(block.output or ""), block.text)

    def test_python_blocks(self) -> None:
        """Those of the own environment are files, and have a test of their own."""
        found = [
            b
            for b in select("python")
            if not b.text.startswith("# my_") and "from_docker_image" not in b.text
        ]
        self.assertGreaterEqual(len(found), 5)
        with serve() as running:
            for block in found:
                with self.subTest(block=block.text):
                    self.run_python(block, running.url)

    @unittest.skipUnless(POSIX, "the stand-in for docker is a script with #!")
    def test_docker_block(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            docker = Path(directory, "docker")
            docker.write_text(DOCKER.format(python=sys.executable, project=str(HERE)))
            docker.chmod(0o755)
            path = os.pathsep.join([directory, os.environ.get("PATH", "")])
            env = {"PATH": path, "DOCKER_STATE": directory}
            self.run_python(one("python", "Docker image"), "", env)
            lines = Path(directory, "calls").read_text().splitlines()
            calls = [json.loads(line) for line in lines]
            self.assertEqual(calls[0][:2], ["run", "--detach"])
            self.assertIn("127.0.0.1::8000", calls[0])
            self.assertEqual([call[0] for call in calls[-2:]], ["stop", "rm"])
            left = {path.name for path in Path(directory).iterdir()}
            containers = {name for name in left if not name.endswith(".log")}
            self.assertEqual(containers, {"docker", "calls"})
            missing = self.assertRaisesRegex(RuntimeError, "Unable to find image")
            with mock.patch.dict(os.environ, env), missing:
                client.BenchmarkEnv.from_docker_image("no-such-image")
            with mock.patch.dict(os.environ, env):
                with self.assertRaisesRegex(RuntimeError, "ended\nlast words"):
                    BenchmarkEnvWS.from_docker_image("dies")
                provider = client.LocalDockerProvider()
                url = provider.start_container("sick", env_vars={"A": "b"}, memory="2g")
                with self.assertRaisesRegex(TimeoutError, "not healthy.*\nlast words"):
                    provider.wait_for_ready(url, timeout_s=0.1)
            left = {path.name for path in Path(directory).iterdir()}
            containers = {name for name in left if not name.endswith(".log")}
            self.assertEqual(containers, {"docker", "calls"})
            nowhere = mock.patch.dict(os.environ, PATH=directory + "/none")
            with nowhere, self.assertRaisesRegex(RuntimeError, "no docker"):
                BenchmarkEnv.from_docker_image("benchmark-env:latest")

    def check_console(self, block: Block, url: str) -> None:
        for command, expected in commands(block):
            line = re.sub(
                "^python3 ", f"{shlex.quote(sys.executable)} ", command
            ).replace(README_URL, url)
            if line.startswith("curl "):
                line = f"curl -sS --noproxy '*' {line[5:]}"
            with self.subTest(command=command):
                output = output_of(["sh", "-c", line])
                self.assertEqual(normalize(output), normalize(expected))

    @unittest.skipUnless(POSIX, "needs a POSIX shell")
    def test_commands(self) -> None:
        found = [b for b in select("console") if "$ curl" not in b.text]
        self.assertGreaterEqual(len(found), 3)
        for block in found:
            self.check_console(block, README_URL)

    @unittest.skipUnless(POSIX and shutil.which("curl"), "there is no curl")
    def test_curl_sessions(self) -> None:
        found = select("console", "The protocol", "$ curl")
        self.assertGreaterEqual(len(found), 3)
        with serve() as running:
            for block in found:
                self.check_console(block, running.url)

    def test_languages(self) -> None:
        """Whatever is fenced is one of the languages that a test knows."""
        known = {"sh", "console", "python", "text", "nginx", "yaml"}
        self.assertEqual({block.language for block in blocks()} - known, set())

    def test_links(self) -> None:
        titles = re.findall(r"^##+ (.*)$", readme(), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
        for target in re.findall(r"\]\(#([^)]*)\)", readme()):
            self.assertIn(target, anchors)


def dump(text: str) -> bytes:
    """Return the bytes of a hex listing: those before the first run of spaces."""
    return bytes.fromhex(
        "".join(re.split(r"\s{2,}", line)[0] for line in text.splitlines())
    )


class ReadmeWebSocketTest(unittest.TestCase):
    """The WebSocket transcript and the bytes in the protocol chapter."""

    KEY = bytes.fromhex("37fa213d")
    maxDiff = None

    def setUp(self) -> None:
        self.dumps = [
            dump(b.text)
            for b in select("text", "The protocol")
            if re.match("[0-9a-f]{2} ", b.text)
        ]

    def client_frame(self, opcode: int, payload: bytes) -> bytes:
        """What client.WebSocket makes of it with the README's key."""
        here, there = socket.socketpair()
        with here, there, mock.patch("os.urandom", lambda size: self.KEY[:size]):
            return client.WebSocket(here, True, 1 << 20).frame(opcode, payload)

    def test_bytes(self) -> None:
        request, answer, closing, closed = self.dumps
        self.assertEqual(request, self.client_frame(1, b'{"type":"state"}'))
        self.assertEqual(
            client.apply_mask(request[6:], request[2:6]), b'{"type":"state"}'
        )
        self.assertEqual(answer[:2], bytes([0x81, len(answer) - 2]))
        self.assertEqual(closing, b"\x88\x02\x03\xe8")
        self.assertEqual(closed, self.client_frame(8, b"\x03\xe8"))
        # The meaning beside the payload's bytes is the payload.
        block = one("text", "The protocol", "22 3a 31 7d 7d")
        words = [re.split(r"\s{2,}", line)[1] for line in block.text.splitlines()[2:]]
        self.assertEqual("".join(words).encode(), answer[2:])

    def test_transcript(self) -> None:
        """Play it over a plain socket, with the bytes of the chapter where it gives them."""
        lines = one("text", "The protocol", "-> GET /ws").text.splitlines()
        shown = dict(zip(["-> state", "<- state", "<- close", "-> close"], self.dumps))
        with serve() as running:
            address = running.url.rpartition("/")[2]
            host, _, port = address.partition(":")
            with socket.create_connection((host, int(port)), 10) as sock:
                stream = sock.makefile("rb")
                for line in lines[: lines.index("->") + 1]:
                    text = line[3:].replace("localhost:8000", address)
                    sock.sendall(f"{text}\r\n".encode())
                for line in lines[lines.index("->") + 1 :]:
                    self.play(line, sock, stream, shown)
                self.assertEqual(stream.read(1), b"")  # the server closes
                stream.close()

    def play(self, line: str, sock: Any, stream: Any, shown: dict[str, bytes]) -> None:
        arrow, text = line[:2], line[3:]
        kind = f"{arrow} state" if '"type":"state"' in text else f"{arrow} close"
        if arrow == "->":
            code = text == "close 1000"
            frame = self.client_frame(
                8 if code else 1, b"\x03\xe8" if code else text.encode()
            )
            if kind.endswith("state") or code:
                self.assertEqual(frame, shown[kind])
            sock.sendall(frame)
        elif text.startswith("{"):
            head = stream.read(2)
            size = head[1] if head[1] < 126 else int.from_bytes(stream.read(2), "big")
            payload = stream.read(size)
            self.assertEqual((head[0], payload.decode()), (0x81, text))
            if kind.endswith("state"):
                self.assertEqual(head + payload, shown[kind])
        elif text == "close 1000":
            self.assertEqual(stream.read(4), shown[kind])
        else:
            got = stream.readline().decode()
            self.assertEqual(normalize(f"<- {got}"), normalize(line))

    def test_close_codes(self) -> None:
        """Provoke each code of the table."""
        codes = re.findall(r"^\| (1\d{3}) \|", readme(), re.MULTILINE)
        self.assertEqual(
            codes, ["1000", "1001", "1002", "1007", "1009", "1011", "1013"]
        )
        frame = self.client_frame
        frames = {
            1000: frame(1, b'{"type":"close"}'),
            1002: b"\x81\x00",  # not masked
            1007: frame(1, b"\xff"),
            1009: frame(1, b" " * 70000),
        }
        for code, data in frames.items():
            with self.subTest(code=code), serve(max_message_mb=0.01) as s:
                self.assertEqual(self.close_code(s.url, data), code)
        with serve(session_timeout=0.1) as running:
            self.assertEqual(self.close_code(running.url, b""), 1001)
        full = serve(max_concurrent_envs=1)
        with full as running, client.BenchmarkEnvWS(running.url) as first:
            first.reset()
            self.assertEqual(self.close_code(running.url, b""), 1013)
        app = server.create_app(
            broken_factory, benchmark.BenchmarkAction, benchmark.BenchmarkObservation
        )
        with self.assertLogs("openenv", "ERROR"), app.start() as running:
            self.assertEqual(self.close_code(running.url, b""), 1011)

    def close_code(self, url: str, data: bytes) -> int:
        ws = client.WebSocket.connect(f"{url}/ws", timeout=10)
        try:
            ws.detach().sendall(data)
            while True:
                ws.recv()
        except client.ConnectionClosed as closed:
            return closed.code
        finally:
            ws.close()


def broken_factory() -> Any:
    raise RuntimeError("out of order")


class OwnEnvironmentTest(unittest.TestCase):
    """Do what the chapter "Make it your own environment" says."""

    def test_as_the_chapter_says(self) -> None:
        chapter = "Make it your own"
        with tempfile.TemporaryDirectory() as directory:
            here = Path(directory)
            for name in ("benchmark.py", "client.py", "server.py"):
                shutil.copy(HERE / name, here)
            files = select("python", chapter, "# my_")
            command = one("sh", chapter).text.split()
            self.assertEqual(command[:2], ["python3", "server.py"])
            (here / "my_env.py").write_text(files[0].text, "utf-8")
            with serving(*command[2:], "--log-level", "error", cwd=here) as (url, _, _):
                text = files[1].text.replace(README_URL, url)
                (here / "my_client.py").write_text(text, "utf-8")
                output = output_of([sys.executable, "my_client.py"], here)
                self.assertEqual(output, files[1].output)
                text = text.replace("WebSocketEnvClient", "HTTPEnvClient")
                (here / "my_client.py").write_text(text, "utf-8")
                output = output_of([sys.executable, "my_client.py"], here)
                self.assertEqual(output, files[1].output)
                self.check_schema(url)
                self.check_http(url)

    def check_schema(self, url: str) -> None:
        status, schemas = exchange(url, "GET", "/schema")
        self.assertEqual(status, 200)
        action, observation, state = (
            schemas[name]["properties"] for name in ("action", "observation", "state")
        )
        self.assertEqual(action["number"]["type"], "integer")
        self.assertEqual(action["number"]["minimum"], 1)
        self.assertEqual(action["confidence"]["type"], "number")
        self.assertEqual(action["confidence"]["default"], 0.5)
        self.assertEqual(schemas["action"]["required"], ["number"])
        hint = observation["hint"]["anyOf"]
        self.assertEqual(hint[0]["enum"], ["lower", "higher", "correct"])
        self.assertEqual(hint[1], {"type": "null"})
        limits = observation["limits"]["additionalProperties"]["additionalProperties"]
        self.assertEqual(limits, {"type": "integer"})
        self.assertEqual(list(state), ["episode_id", "step_count"])

    def check_http(self, url: str) -> None:
        """Play a game to its end in plain JSON, and past it."""
        status, answer = exchange(url, "POST", "/reset", {"seed": 7, "highest": 3})
        self.assertEqual(status, 200)
        self.assertIsNone(answer["observation"]["hint"])
        hints = []
        for number in (1, 2, 3):
            body = {"action": {"number": number, "confidence": 1}}
            status, answer = exchange(url, "POST", "/step", body)
            self.assertEqual(status, 200)
            hints.append(answer["observation"]["hint"])
            if answer["done"]:
                break
        self.assertEqual((hints[-1], answer["reward"]), ("correct", 1.0))
        self.assertEqual(set(hints[:-1]) - {"higher"}, set())
        status, answer = exchange(url, "POST", "/step", body)
        self.assertEqual((status, answer["code"]), (500, "EXECUTION_ERROR"))
        status, answer = exchange(
            url, "POST", "/step", {"action": {"number": 0, "confidence": "x"}}
        )
        self.assertEqual(status, 422)
        kinds = [fault["type"] for fault in answer["detail"]]
        self.assertEqual(kinds, ["greater_than_equal", "float_type"])


class CopiesTest(unittest.TestCase):
    """Each row of "Which files to copy", at the top level and inside a package."""

    def setUp(self) -> None:
        table = readme().partition("## Which files to copy")[2].partition("\nThey")[0]
        rows = [re.findall(r"`(\w+\.py)`", line) for line in table.splitlines()]
        self.subsets = [row for row in rows if row]
        self.assertEqual([len(subset) for subset in self.subsets], [2, 3, 1])

    def test_subsets(self) -> None:
        with serve() as running:
            for subset in self.subsets:
                for package in ("", "vendored"):
                    with self.subTest(subset=subset, package=package):
                        self.check(subset, package, running.url)

    def check(self, subset: list[str], package: str, url: str) -> None:
        with tempfile.TemporaryDirectory() as directory:
            here, target = Path(directory), Path(directory, package)
            target.mkdir(exist_ok=True)
            if package:
                (target / "__init__.py").touch()
            for name in subset:
                shutil.copy(HERE / name, target)
            if "server.py" in subset:
                self.check_commands(here, package)
                return
            code = self.ENVIRONMENT + (self.CLIENTS if "client.py" in subset else "")
            code = code.replace("DOT.", f"{package}." if package else "")
            output_of([sys.executable, "-c", code.replace("URL", repr(url))], here)

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

    def check_commands(self, here: Path, package: str) -> None:
        prefix = [sys.executable, "-m", f"{package}.client"]
        if not package:
            prefix = [sys.executable, "client.py"]
        self.assertIn("length 2 reward 0.2", output_of([*prefix, "Hi"], here))
        module = f"-m {package}.server" if package else "server.py"
        with serving(cwd=here, module=module) as (url, _, _):
            self.assertEqual(exchange(url, "GET", "/health")[1], {"status": "healthy"})


class ProjectFilesTest(unittest.TestCase):
    """Facts that several files state, and that must agree."""

    def test_versions(self) -> None:
        for name in ("benchmark.py", "client.py", "server.py"):
            head = (HERE / name).read_text("utf-8").partition("from __future__")[0]
            self.assertIn(f"version {benchmark.__version__}", head.replace("\n", " "))
        for program in ("client.py", "server.py"):
            shown = output_of([sys.executable, HERE / program, "--version"])
            self.assertEqual(shown.split()[-1], benchmark.__version__)

    def test_port(self) -> None:
        manifest = dict(
            line.split(": ")
            for line in (HERE / "openenv.yaml").read_text().splitlines()
            if line
        )
        self.assertEqual(manifest["spec_version"], "1")
        self.assertEqual((manifest["name"], manifest["type"]), ("benchmark", "space"))
        self.assertEqual(manifest["port"], "8000")
        module, _, name = manifest["app"].partition(":")
        self.assertTrue(callable(getattr(sys.modules[module], name)))
        head = readme().split("---\n")[1]
        for line in (
            "title: Benchmark Environment Server",
            "colorFrom: red",
            "colorTo: red",
            "sdk: docker",
            "pinned: false",
            "app_port: 8000",
            "base_path: /web",
            "tags:\n  - openenv",
        ):
            self.assertIn(f"\n{line}\n", f"\n{head}")
        self.assertRegex(head, r"(?m)^emoji: \S+$")

    def test_dockerfile(self) -> None:
        lines = (HERE / "Dockerfile").read_text().splitlines()
        steps = dict(line.split(" ", 1) for line in lines if line and line[0] != "#")
        self.assertRegex(steps["FROM"], r"^python:3\.\d+-slim$")
        self.assertEqual((steps["USER"], steps["EXPOSE"]), ("1000", "8000"))
        options = ["--host", "0.0.0.0", "--port", "8000"]
        self.assertEqual(json.loads(steps["CMD"]), ["python", "server.py", *options])
        self.assertNotIn("RUN", steps)
        copied = steps["COPY"].split()[:-1]
        ignored = (HERE / ".dockerignore").read_text().splitlines()
        self.assertEqual([line[1:] for line in ignored if line[0] == "!"], copied)
        for name in copied:
            self.assertTrue((HERE / name).is_file())

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
        table = readme().partition("## Running it locally")[2].partition("\n## ")[0]
        rows = re.findall(r"^\| (`--.*?`) \|", table, re.MULTILINE)
        listed = {name for row in rows for name in re.findall(r"--[a-z-]+", row)}
        shown = output_of([sys.executable, HERE / "server.py", "--help"])
        options = set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", shown, re.MULTILINE))
        self.assertEqual(listed, options)

    def test_kubernetes(self) -> None:
        """As far as that can be seen without a cluster: ports, labels, probes, grace."""
        text = one("yaml", "Scaling out").text
        self.assertEqual(set(re.findall(r"[pP]ort: (\d+)", text)), {"8000"})
        self.assertEqual(text.count("{app: benchmark-env}"), 3)
        self.assertEqual(text.count("path: /health"), 2)
        self.assertIn("sessionAffinity: ClientIP", text)
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
    """README.md's nginx configuration in front of four server processes."""

    HOST = "env.example.com"
    backends: list[tuple[str, subprocess.Popen[str], Path]]
    url: str

    @classmethod
    def setUpClass(cls) -> None:
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        options = one("sh", "Scaling out").text.partition("$port ")[2].split(" &")[0]
        cls.backends = [
            stack.enter_context(serving(*options.split())) for _ in range(4)
        ]
        port = free_port()
        cls.url = f"http://127.0.0.1:{port}"
        config = one("nginx", "Scaling out").text
        config = config.replace("listen 80;", f"listen 127.0.0.1:{port};")
        for shown, (url, _, _) in zip((8001, 8002, 8003, 8004), cls.backends):
            config = config.replace(f":{shown};", f":{url.rpartition(':')[2]};")
        here = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        here.chmod(0o755)
        temporary = "".join(
            f"{name}_temp_path {here}/{name};\n"
            for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        text = f"""
            daemon off; pid {here}/pid; error_log stderr error;
            events {{ worker_connections 4096; }}
            http {{ access_log off; {temporary} {config} }}
        """
        (here / "nginx.conf").write_text(text)
        arguments = [str(NGINX), "-p", str(here), "-c", str(here / "nginx.conf")]
        process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        stack.callback(process.communicate, timeout=10)
        stack.callback(process.terminate)
        cls.wait_until_ready(process)

    @classmethod
    def wait_until_ready(cls, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise AssertionError(process.communicate()[1])
            with contextlib.suppress(OSError):
                if exchange(cls.url, "GET", "/health")[0] == 200:
                    return
            time.sleep(0.02)
        raise AssertionError("nginx does not answer")

    def test_sessions(self) -> None:
        """200 sessions keep their step counts; a server that stops loses its own only."""
        envs: list[Any] = [client.BenchmarkEnv(self.url) for _ in range(100)]
        envs += [client.BenchmarkEnvWS(self.url) for _ in range(100)]
        pool = ThreadPoolExecutor(20)
        self.addCleanup(pool.shutdown)
        self.addCleanup(lambda: list(pool.map(lambda env: env.close(), envs)))
        _, process, log = self.backends[0]
        before = len(log.read_text("utf-8"))

        def play(number: int) -> tuple[str, int]:
            env = envs[number]
            env.reset(episode_id=f"e{number}")
            for step in range(number % 5):
                observation = env.step(
                    benchmark.BenchmarkAction(f"{number}")
                ).observation
                self.assertEqual(observation.echoed_message, f"{number}")
                self.assertEqual(observation.metadata, {"step": step + 1})
            state = env.state()
            return state.episode_id, state.step_count

        expected = [(f"e{number}", number % 5) for number in range(200)]
        self.assertEqual(list(pool.map(play, range(200))), expected)

        process.terminate()
        process.wait(10)
        opened = log.read_text("utf-8")[before:]
        lost_ws = len(re.findall(r"session ws-\d+ opened", opened))
        lost_http = len(re.findall(r"session '[0-9a-f-]{36}' opened", opened))

        def go_on(number: int) -> str:
            env = envs[number]
            try:
                result = env.step(benchmark.BenchmarkAction("on"))
            except client.ServerError as error:
                env.reset()
                return str(error)
            except ConnectionError as error:
                env.connect().reset()
                return str(error)
            self.assertEqual(result.observation.metadata, {"step": number % 5 + 1})
            return "kept"

        outcomes = Counter(pool.map(go_on, range(200)))
        unknown = "Server error: Unknown X-Session-Id: POST /reset opens the session"
        closed = "WebSocket connection closed: 1001 the server is shutting down"
        self.assertEqual(
            outcomes,
            {
                "kept": 200 - lost_ws - lost_http,
                f"{unknown} (code: SESSION_ERROR)": lost_http,
                closed: lost_ws,
            },
        )
        self.assertTrue(lost_ws and lost_http)

    def test_no_session(self) -> None:
        """Requests that name no session go to the servers in turn."""
        for url, _, _ in self.backends:
            self.assertEqual(
                exchange(url, "POST", "/reset", {"episode_id": url})[0], 200
            )
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

OPENENV = os.environ.get("OPENENV_PYTHON", "")  # a Python that has openenv-core 0.3.0


@unittest.skipUnless(OPENENV, "set OPENENV_PYTHON to a Python with openenv-core 0.3.0")
class InteroperationTest(unittest.TestCase):
    """openenv-core's clients against this server, this project's clients against its."""

    folder: Path

    @classmethod
    def setUpClass(cls) -> None:
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = Path(folder.name)
        cls.openenv(
            "-m",
            "openenv.cli",
            "init",
            "benchmark",
            "--output-dir",
            str(cls.folder / "peer"),
        )

    @classmethod
    def openenv(cls, *arguments: str) -> str:
        done: subprocess.CompletedProcess[str] = subprocess.run(
            [OPENENV, *arguments],
            cwd=cls.folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            raise AssertionError(done.stderr + done.stdout)
        return done.stdout

    def test_its_clients_against_this_server(self) -> None:
        code = textwrap.dedent("""
            import asyncio, sys
            sys.path.insert(0, "peer")
            from benchmark.client import BenchmarkEnv
            from benchmark.models import BenchmarkAction
            from openenv.core.generic_client import GenericEnvClient
            async def play():
                async with BenchmarkEnv(base_url=sys.argv[1]) as env:
                    await env.reset(seed=1, episode_id="e1")
                    for message in ("Hi", "", "x" * 200_000, "𝄞"):
                        result = await env.step(BenchmarkAction(message=message))
                        assert result.observation.echoed_message == message
                        assert result.reward == len(message) / 10
                    state = await env.state()
                    assert (state.episode_id, state.step_count) == ("e1", 4), state
            asyncio.run(play())
            with GenericEnvClient(base_url=sys.argv[1]).sync() as env:
                env.reset()
                assert env.step({"message": "Hi"}).observation["message_length"] == 2
                try:
                    env.step({"mesage": "Hi"})
                except RuntimeError as error:
                    assert "(code: VALIDATION_ERROR)" in str(error), error
            print("played")
        """)
        with serve() as running:
            self.assertEqual(self.openenv("-c", code, running.url), "played\n")
            report = json.loads(
                self.openenv("-m", "openenv.cli", "validate", "--url", running.url)
            )
        self.assertTrue(report["passed"], report)
        self.assertEqual(report["summary"]["failed_criteria"], [])

    def test_these_clients_against_its_server(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [
            OPENENV,
            "-m",
            "uvicorn",
            "benchmark.server.app:app",
            "--port",
            str(port),
        ]
        process = subprocess.Popen(
            command,
            cwd=self.folder / "peer",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.addCleanup(process.wait)
        self.addCleanup(process.terminate)
        url = f"127.0.0.1:{port}"

        def healthy() -> bool:
            connection = http.client.HTTPConnection(url, timeout=PATIENCE)
            with contextlib.closing(connection), contextlib.suppress(OSError):
                connection.request("GET", "/health")
                return True
            return False

        wait_until(healthy, "the health of openenv-core's server")
        with BenchmarkEnvWS(url) as ws:
            ws.reset()
            for message in ("Hi", "", "𝄞" * 70_000):
                result = ws.step(BenchmarkAction(message))
                self.assertEqual(result.observation.echoed_message, message)
                self.assertAlmostEqual(result.reward or 0.0, len(message) / 10)
            self.assertEqual(ws.state().step_count, 3)
            with self.assertRaisesRegex(RuntimeError, "VALIDATION_ERROR"):
                ws.step({"mesage": "x"})  # type: ignore[arg-type]
        with BenchmarkEnv(
            url
        ) as over_http:  # which makes an environment for each request
            self.assertEqual(over_http.reset().reward, 0.0)
            self.assertEqual(over_http.step(BenchmarkAction("Hi")).reward, 0.2)
            self.assertEqual(over_http.state().step_count, 0)
            with self.assertRaisesRegex(RuntimeError, "VALIDATION_ERROR"):
                over_http.step({"mesage": "x"})  # type: ignore[arg-type]


if __name__ == "__main__":
    unittest.main()
