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
import http.client
import io
import json
import logging
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional
from unittest import mock
from urllib.parse import urlsplit

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

HERE = Path(__file__).resolve().parent
PATIENCE = 20.0  # seconds, for what happens at once unless it is broken


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


class RawPeer:
    """A socket to a server, and RFC 6455 by hand: it can break every rule."""

    def __init__(self, running: server.Server) -> None:
        self.sock = socket.create_connection(running.server_address[:2], PATIENCE)
        self.port = running.server_port
        self.data = b""

    def __enter__(self) -> RawPeer:
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
        connection = http.client.HTTPConnection(
            "127.0.0.1", (running or self.running).server_port, timeout=PATIENCE
        )
        data = (
            body if body is None or isinstance(body, (bytes, str)) else json.dumps(body)
        )
        given = {"Content-Type": "application/json", **(headers or {})}
        connection.request(method, path, data, given)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, json.loads(content) if content else None


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
            [sys.executable, "-S", "-c", code], cwd=HERE, capture_output=True, text=True
        )
        self.assertEqual((done.stdout, done.stderr), ("False\n", ""))
        with self.assertRaises(AttributeError):
            benchmark.Nothing  # noqa: B018

    def test_self_check(self) -> None:
        done = subprocess.run(
            [sys.executable, "benchmark.py"], cwd=HERE, capture_output=True, text=True
        )
        self.assertEqual(done.returncode, 0)
        names = [line.partition(":")[0] for line in done.stdout.splitlines()]
        self.assertEqual(names, ["reset", "step", "state", "rewards"])
        with mock.patch.object(
            BenchmarkEnvironment, "step", lambda *_: BenchmarkObservation()
        ):
            with contextlib.redirect_stdout(io.StringIO()) as output:
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
        found = server.validate(schema, {**self.GOOD, **changes}, ("body",))
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
        self.assertEqual(server.validate(schema, server.example(schema), ()), [])
        everything = server.json_schema(Everything)
        self.assertEqual(
            server.validate(everything, server.example(everything), ()), []
        )

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
        self.assertEqual(
            self.status("Host: evil.example", "Origin: http://evil.example"), 403
        )
        for name in (
            "localhost",
            "LOCALHOST:80",
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
                for message in ("raise", "exit", "none", "nan", "set"):
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
