# SPDX-License-Identifier: BSD-3-Clause
"""Serves an OpenEnv environment over HTTP and WebSocket.

Part of the minimal OpenEnv Benchmark environment, version 1.0.0: benchmark.py (the
environment), client.py (its clients), server.py (this file: its server).

    python3 server.py                           # the Benchmark environment on port 8000
    python3 server.py --env my_env:MyEnvironment          # an environment of your own
    with create_app(MyEnvironment, MyAction, MyObservation).start() as server:
        print(server.url)                                 # in a test or a notebook

How one ``step`` travels: `Handler` does the opening handshake of ``/ws``, once, and hands
the connection over. `Reader`, one thread, reads every WebSocket (`WebSocket.tend`) and has
each message answered: there and then, or by the session's own thread if the environment
may wait. `Session.answer` reads the JSON as the action's dataclass (`read_json`), calls the
environment's ``step``, and makes JSON of the observation, which goes into the outbox.

The file goes from types to bytes: JSON Schema; sessions and the app that holds them; HTTP
and the opening handshake of RFC 6455; the reader and the server; OpenAPI; the command line;
the web page. Not here: TLS and many machines (put a proxy in front) and MCP tools.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import importlib.util
import inspect
import ipaddress
import itertools
import logging
import os
import re
import selectors
import signal
import socket
import socketserver
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from email.utils import formatdate
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import CoroutineType, SimpleNamespace
from typing import Any, Literal, NamedTuple, NoReturn, Optional, Union, get_type_hints
from urllib.parse import unquote, urlsplit

if __name__ == "__main__" and not (__package__ or importlib.util.find_spec("client")):
    sys.exit("server.py: client.py is not beside it, or Python's -I or -P hides it")
if __package__:  # the files were copied into a package; these are all the names below
    from .client import *  # type: ignore[import-not-found,unused-ignore]
else:
    # isort: off
    from client import (  # type: ignore[import-not-found,no-redef,unused-ignore]
        BOUNDS, EAGER_SECONDS, GOING_AWAY, INTERNAL_ERROR, TRY_AGAIN_LATER, VERSION,
        BenchmarkEnv, ConnectionClosed, Invalid, Protocol, WebSocket, accept_key,
        decode_json, describe_fault, encode_json, fields_of, read_fields, read_json,
        say, split_type, to_json,
    )  # fmt: skip

log = logging.getLogger("openenv")

HEADER_SECONDS = 10.0  # for a request's head, and for any stall after that
IDLE_SECONDS = 60.0  # for a kept-alive connection to send its next request
LINGER_SECONDS = 2.0  # for a peer to close its end after the server has closed its own
GRACE_SECONDS = 3.5  # for steps in progress when the server is told to stop
TICK_SECONDS = 0.2  # between two looks at all connections
SLOWEST_RATE = 50_000  # bytes per second below which a peer is taken to be stalling
MAX_LINE, MAX_HEADERS = 65536, 100  # bytes of a request's head, and lines in it
MAX_DEPTH = 100  # of nested JSON
TURN = 10  # messages of one session that are answered before it is the others' turn

# ---------------------------------------------------------------------------
# JSON Schema of a dataclass
# ---------------------------------------------------------------------------

_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean"}
_NAMES[type(None)] = "null"


def json_schema(cls: Any, extra: bool = False) -> dict[str, Any]:
    """Return the JSON Schema of a dataclass; what it says is what `read_json` checks.

    ``field(metadata={...})`` adds any JSON Schema keyword to a field: ``description``,
    ``examples``, ``minimum``, ``maxLength`` and so on. ``extra``: allow other keys too.
    Raises TypeError if it is no dataclass or a field has no schema; it says which.
    """
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        words = "no dataclass: actions, observations and states must be"
        raise TypeError(f"{getattr(cls, '__name__', cls)} is {words}")
    known = fields_of(cls)
    schema: dict[str, Any] = {"title": cls.__name__, "type": "object"}
    if cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}("):  # not made up
        schema["description"] = inspect.cleandoc(cls.__doc__)
    schema["properties"] = properties = {}
    for field in dataclasses.fields(cls):
        try:
            properties[field.name] = _field_schema(field, known[field.name].type)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{cls.__name__}.{field.name}: {error}") from error
    schema["required"] = [name for name, field in known.items() if field.required]
    schema["additionalProperties"] = extra
    return schema


def _field_schema(field: dataclasses.Field[Any], kind: Any) -> Any:
    schema = {**_type_schema(kind), **field.metadata}
    for keyword, (measured, *_) in BOUNDS.items():
        numbers, bound = (int, float), schema.get(keyword, 0)
        if type(bound) not in (numbers if measured == "number" else numbers[:1]):
            raise TypeError(f"the keyword {keyword} takes a number, not {bound!r}")
    if not field.init:
        schema["readOnly"] = True
    if field.default is not dataclasses.MISSING:
        schema["default"] = field.default
    elif field.default_factory in (dict, list, set, tuple):  # others may differ
        schema["default"] = field.default_factory()
    return decode_json(encode_json(schema))


def _type_schema(kind: Any) -> dict[str, Any]:
    if kind is Any:
        return {}
    if kind in _NAMES:
        return {"type": _NAMES[kind]}
    if dataclasses.is_dataclass(kind):
        return json_schema(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {"title": kind.__name__, "enum": [member.value for member in kind]}
    origin, arguments = split_type(kind)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is Union:
        return {"anyOf": [_type_schema(member) for member in arguments]}
    if origin is dict:
        key, value = arguments or (str, Any)
        if key not in (str, Any):
            raise TypeError(f"the keys of {kind} must be str, as in JSON")
        return {"type": "object", "additionalProperties": _type_schema(value) or True}
    if origin is tuple and arguments and arguments[-1] is not ...:
        size = {"minItems": len(arguments), "maxItems": len(arguments)}
        return {"type": "array", "prefixItems": [*map(_type_schema, arguments)], **size}
    if origin in (list, tuple, set, frozenset):
        items = _type_schema(arguments[0] if arguments else Any)
        return {"type": "array", "items": items}
    raise TypeError(f"{kind!r} has no JSON Schema: use plain types, enums, dataclasses")


def example(schema: Mapping[str, Any], which: int = 0) -> Any:
    """Return a value that fits a schema of `json_schema`: of several examples one."""
    if "examples" in schema:
        return schema["examples"][which]
    if "enum" in schema:
        return schema["enum"][0]
    if "anyOf" in schema:
        return example(schema["anyOf"][0], which)
    if "default" in schema:
        return schema["default"]
    kind = schema.get("type")
    if kind == "object":
        return {k: example(v, which) for k, v in schema.get("properties", {}).items()}
    if kind == "array":
        alike = [schema.get("items", {})] * schema.get("minItems", 0)
        return [example(item, which) for item in schema.get("prefixItems", alike)]
    if kind == "string":
        text = "text"[: schema.get("maxLength", 4)]
        return text.ljust(schema.get("minLength", 0), ".")
    if kind in ("integer", "number"):
        low = schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1)
        return min(low, schema.get("maximum", low))
    return False if kind == "boolean" else None


# ---------------------------------------------------------------------------
# Sessions, and the app that holds them
# ---------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Failure(Exception):
    """What a caller is told went wrong: an error message, or an HTTP status with a body.

    ``code`` is OpenEnv's error code, if it has one for this; ``extra`` goes beside it.
    """

    status: int
    message: str
    code: str = ""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def as_http(self) -> str:
        if "errors" in self.extra:
            return encode_json({"detail": self.extra["errors"]})
        code = {"code": self.code} if self.code else {}
        return encode_json({"detail": self.message, **code, **self.extra})

    def as_message(self) -> str:
        code = self.code or "SESSION_ERROR"
        data = {"message": self.message, "code": code, **self.extra}
        return encode_json({"type": "error", "data": data})


def parse_json(text: str | bytes, loc: tuple[Any, ...]) -> Any:
    """Parse JSON strictly: what is accepted can be sent back. Raises Failure: INVALID_JSON,
    if it is none, holds NaN or a number beyond float, or nests deeper than `MAX_DEPTH`.
    """
    try:
        value = decode_json(text if isinstance(text, str) else text.decode())
        if len(text) > 2 * MAX_DEPTH and _depth([value]) > MAX_DEPTH + 1:
            raise RecursionError
        return value
    except RecursionError:
        reason = f"it is nested deeper than {MAX_DEPTH} levels"
    except UnicodeDecodeError:
        reason = "it is not valid UTF-8"
    except ValueError as error:
        digits = "integer string conversion" in str(error)  # of Python, for Python
        reason = "a number has too many digits" if digits else str(error)
    message = f"Invalid JSON: {reason}"
    errors = [describe_fault("json_invalid", message, loc, {})]
    raise Failure(422, message, "INVALID_JSON", {"errors": errors})


def _depth(value: Any) -> int:
    """Return how deep a list or an object nests others."""
    items = value.values() if isinstance(value, dict) else value
    inner = [_depth(item) for item in items if isinstance(item, (dict, list))]
    return 1 + max(inner, default=0)


def _option(description: str, **limit: float) -> Any:
    metadata = {"description": description, **limit}
    return dataclasses.field(default=None, metadata=metadata)


@dataclasses.dataclass
class ResetRequest:
    """How to begin an episode. Other keys are passed on, if the environment takes them."""

    seed: Optional[int] = _option("Seed for a reproducible episode", minimum=0)  # noqa: UP045
    episode_id: Optional[str] = _option("Name for the episode", maxLength=255)  # noqa: UP045


@dataclasses.dataclass
class StepRequest:
    """An action, and options beside it. Other keys are passed on, too."""

    action: Any
    timeout_s: Optional[float] = _option("Seconds it may take", exclusiveMinimum=0)  # noqa: UP045
    request_id: Optional[str] = _option("Name for the request", maxLength=255)  # noqa: UP045


def message_types(action_cls: type) -> dict[str, type]:
    """Return a dataclass for each of OpenEnv's WebSocket messages, by its type."""
    fields: dict[str, Any] = {
        "reset": [("data", dict, dataclasses.field(default_factory=dict))],
        "step": [("data", action_cls)],
        "state": [],
        "mcp": [("data", dict)],
        "close": [],
    }
    make = dataclasses.make_dataclass
    return {kind: make(kind, [("type", str), *data]) for kind, data in fields.items()}


def read(kind: Any, value: Any, loc: tuple[Any, ...], fields: bool = False) -> Any:
    """Read JSON as a type, or as the ``fields`` of one with other keys beside them.
    Raises Failure: VALIDATION_ERROR, or EXECUTION_ERROR if the type itself failed.
    """
    try:
        return read_fields(kind, value, loc) if fields else read_json(kind, value, loc)
    except Invalid as invalid:
        words, errors = f"Invalid message: {invalid}", {"errors": invalid.faults}
        raise Failure(422, words, "VALIDATION_ERROR", errors) from invalid
    except BaseException as error:
        raise _failure(error) from error


def mcp_answer(request: Any) -> dict[str, Any]:
    """Answer a JSON-RPC 2.0 request of MCP, for an environment that has no tools."""
    fields = request if isinstance(request, dict) else {}
    method, id_ = fields.get("method"), fields.get("id")
    if isinstance(id_, bool) or not isinstance(id_, (str, int, float, type(None))):
        id_, method = None, None
    params = isinstance(fields.get("params", {}), (dict, list))
    if fields.get("jsonrpc") != "2.0" or not isinstance(method, str) or not params:
        code, message = -32600, "Invalid Request"
    elif method in ("tools/list", "tools/call"):
        code, message = -32603, "Environment does not support MCP"
    else:
        code, message = -32601, f"Method not found: {method}"
    return {"jsonrpc": "2.0", "id": id_, "error": {"code": code, "message": message}}


_numbers = itertools.count(1)  # of WebSocket sessions, for the log
SHARED = ""  # the name of the session of all HTTP requests that name none


class Session:
    """One environment, for one caller at a time: who uses it holds ``lock``."""

    def __init__(self, app: App, key: object) -> None:
        self.app, self.key = app, key
        self.lock = threading.Lock()
        self.opened = self.used = time.monotonic()
        self.steps = 0
        self.ended = False  # no more calls
        self.closed = False  # the environment is closed, too, and its place is free
        self._env: Any = None
        self._loop: Any = None  # an event loop, if the environment is asynchronous

    def __str__(self) -> str:
        if isinstance(self.key, tuple):
            return "-".join(map(str, self.key))
        return ascii(self.key) if self.key != SHARED else "(shared)"

    def open(self) -> None:
        """Create the environment, unless that was done. Raises Failure: FACTORY_ERROR."""
        if self._env is not None:
            return
        try:
            self._env = self.app.env()
        except BaseException as error:
            self.end()
            name = getattr(self.app.env, "__name__", type(self.app.env).__name__)
            raise _failure(error, "FACTORY_ERROR", factory_name=name) from error
        log.info("session %s opened", self)
        if self.ended:  # the server was stopped meanwhile
            self.end()
            raise Failure(503, "The server is shutting down", "SESSION_ERROR")

    def end(self) -> None:
        """Close the environment, if there is one, and free its place. Twice is fine."""
        self.ended = True
        with self.app.lock:
            env, self._env = self._env, None
        if env is not None:
            try:
                if hasattr(env, "close"):
                    self._run(env.close)
                if self._loop is not None:
                    self._loop.close()
            except BaseException:
                log.exception("closing the environment of session %s failed", self)
            age = time.monotonic() - self.opened
            log.info("session %s closed after %d steps, %.1f s", self, self.steps, age)
        with self.app.lock:
            if self.app.sessions.get(self.key) is self:
                del self.app.sessions[self.key]
        self.closed = True

    def answer(self, text: str | bytes) -> str | None:
        """Answer a WebSocket message of OpenEnv; None is a goodbye. Raises Failure."""
        if isinstance(text, bytes):
            raise Failure(422, "Invalid JSON: send text, not binary", "INVALID_JSON")
        types, given = self.app.messages, parse_json(text, ())
        kind = given.get("type") if isinstance(given, dict) else "step"
        if not isinstance(kind, str) or kind not in types:
            words = f"Unknown message type: {kind!r}; known are {', '.join(types)}"
            raise Failure(422, words, "UNKNOWN_TYPE")
        message = read(types[kind], given, ())
        if kind == "close":
            return None
        if kind == "mcp":
            return encode_json({"type": "mcp", "data": mcp_answer(message.data)})
        if kind == "state":
            return f'{{"type":"state","data":{self.state()}}}'
        if kind == "step":
            result = self.act("step", {}, message.data)
        else:
            options = read(ResetRequest, message.data, ("data",), fields=True)
            result = self.act("reset", options)
        return f'{{"type":"observation","data":{result}}}'

    def state(self) -> str:
        """Return the JSON of the environment's state."""
        try:
            return encode_json(self._env.state)
        except BaseException as error:
            raise _failure(error) from error

    def act(self, name: str, options: dict[str, Any], *action: Any) -> str:
        """Call ``reset`` or ``step``. Return the JSON of the result: the observation, and
        beside it reward, done and any metadata. Raises Failure: EXECUTION_ERROR.
        """
        env = self._env
        try:
            method = getattr(env, f"{name}_async", None) or getattr(env, name)
            seen = self._run(method, *action, **_accepted(method, options))
            fields = dict(seen) if isinstance(seen, dict) else to_json(seen)
            reward, done = fields.pop("reward", None), fields.pop("done", False)
            reward = reward.tolist() if hasattr(reward, "tolist") else reward
            if reward is not None and not isinstance(reward, (int, float)):
                raise TypeError(f"the reward is no number: {reward!r}")
            reward = None if reward is None else float(reward)
            result = {"observation": fields, "reward": reward, "done": bool(done)}
            if fields.get("metadata") and isinstance(fields["metadata"], dict):
                result["metadata"] = fields["metadata"]
            answer = encode_json(result)
        except BaseException as error:
            raise _failure(error) from error
        self.steps += len(action)
        return answer

    def _run(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        if not isinstance(result, CoroutineType):
            return result
        if self._loop is None:
            import asyncio  # here, since few environments need it

            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(result)


def _failure(error: Any, code: str = "EXECUTION_ERROR", **extra: str) -> Failure:
    """Log what an environment raised; return what its caller is told of it."""
    log.error("the environment failed (%s)", code, exc_info=error)
    words = type(error).__name__
    with suppress(BaseException):  # an exception's own __str__ may raise anything
        words = str(error) or words
    return Failure(500, ": ".join((*extra.values(), words)), code, extra)


def _accepted(method: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Of what the caller sent, return what the environment's method takes."""
    if not options:
        return options
    parameters = inspect.signature(method).parameters.values()
    names = {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        names = set(options)
    return {n: options[n] for n in options if n in names - {"self", "action"}}


class App:
    """An environment class, made servable: its schemas, and the sessions that are open.

    OpenEnv calls it ``create_app``. `serve` or `start` puts it on a port.

    Args:
        env: the environment class, or anything that makes an environment when called.
        action_cls, observation_cls: its dataclasses.
        env_name: what ``/metadata`` calls it; default: the name of the class.
        max_concurrent_envs: environments at a time; default: 1000 if the class says
            ``SUPPORTS_CONCURRENT_SESSIONS = True``, else 1.
        session_timeout: seconds until an idle session ends; 0: never.
        max_message_mb: largest request body or message, in MiB.
        allow_origins: hosts whose pages may call.

    Raises:
        TypeError: something cannot work: it says what, and of which class and field.
        ValueError: a number is out of its range, or more than one environment at a time is
            asked of a class that does not allow it. It begins with the argument's name.
    """

    def __init__(
        self,
        env: Callable[[], Any],
        action_cls: type,
        observation_cls: type,
        env_name: str | None = None,
        max_concurrent_envs: int | None = None,
        session_timeout: float = 3600.0,
        max_message_mb: float = 100.0,
        allow_origins: Sequence[str] = (),
    ) -> None:
        cls = _environment_class(env, probe=(max_concurrent_envs or 1) > 1)
        concurrent = getattr(cls, "SUPPORTS_CONCURRENT_SESSIONS", False)
        if max_concurrent_envs is None:
            max_concurrent_envs = 1000 if concurrent else 1
        if not max_concurrent_envs >= 1:
            raise ValueError("max_concurrent_envs must be at least 1")
        if not session_timeout >= 0:
            raise ValueError("session_timeout must be at least 0")
        if not 0 < max_message_mb < float("inf"):
            raise ValueError("max_message_mb must be above 0, and finite")
        if max_concurrent_envs > 1 and not concurrent:
            words = "set SUPPORTS_CONCURRENT_SESSIONS = True on the class if that holds"
            more = "max_concurrent_envs > 1 needs instances that share nothing"
            raise ValueError(f"{more}: {words}")
        self.env = env
        self.name = env_name or str(getattr(cls, "__name__", "environment"))
        self.max_concurrent_envs = max_concurrent_envs
        self.session_timeout = session_timeout or float("inf")
        self.max_message_size = int(max_message_mb * (1 << 20))
        self.allow_origins = allow_origins
        try:
            self.schemas = {
                "action": json_schema(action_cls),
                "observation": json_schema(observation_cls),
                "state": _state_schema(cls),
            }
        except RecursionError:
            raise TypeError("a dataclass that contains itself has no schema") from None
        self.messages = message_types(action_cls)
        make, fields = dataclasses.make_dataclass, [("action", action_cls)]
        self.step_request = make("StepRequest", fields, bases=(StepRequest,))
        self.step_request.__doc__ = StepRequest.__doc__
        # The class itself must say so: a subclass may have changed its step.
        self.never_waits = getattr(cls, "__dict__", {}).get("NEVER_WAITS") is True
        self._class = cls
        self.lock = threading.RLock()  # guards the sessions' comings and goings
        self.sessions: dict[object, Session] = {}

    @property
    def active(self) -> int:
        """The number of sessions that are open."""
        return len(self.sessions)

    @property
    def metadata(self) -> dict[str, Any]:
        """What ``GET /metadata`` answers."""
        module = sys.modules.get(getattr(self._class, "__module__", ""))
        beside = os.path.dirname(getattr(module, "__file__", None) or "")
        path, readme = os.path.join(beside, "README.md"), None
        with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
            readme = file.read()
        return {
            "name": self.name,
            "description": inspect.getdoc(self._class) or "",
            "version": getattr(module, "__version__", VERSION),
            "readme_content": readme,
            "author": None,
            "documentation_url": None,
        }

    def serve(self, host: str = "127.0.0.1", port: int = 8000) -> None:
        """Serve until interrupted. Raises OSError if the port is taken."""
        with Server(self, host, port) as server, suppress(KeyboardInterrupt):
            server.serve_forever()

    def start(self, host: str = "127.0.0.1", port: int = 0) -> Server:
        """Serve in the background, by default on a free port: ``with app.start() as server``."""
        server = Server(self, host, port)
        threading.Thread(target=server.serve_forever, daemon=True, name="http").start()
        return server

    def open(self, session: Session) -> Session:
        """Give a new session its place. Raises Failure: CAPACITY_REACHED."""
        with self.lock:
            active, most = self.active, self.max_concurrent_envs
            if active >= most:
                full = f"Server at capacity: {active} of {most} sessions are open"
                words = f"{full}: close one, or start it with --max-concurrent-envs"
                counts = {"active_sessions": active, "max_sessions": most}
                raise Failure(503, words, "CAPACITY_REACHED", counts)
            self.sessions[session.key] = session
            return session

    @contextmanager
    def use(self, name: str, create: bool) -> Iterator[Session]:
        """Lend the HTTP session of that name, to nobody else meanwhile. Raises Failure if
        there is none and ``create`` is false, or if there is no room for it.
        """
        while True:
            with self.lock:
                session = self.sessions.get(name)
                if session is None and not create:
                    words = "No session has this X-Session-Id: reset first, to open it"
                    if name == SHARED:
                        words = "The session without a name is not open"
                        words += ": send the X-Session-Id of the one you mean"
                    raise Failure(404, words, "SESSION_ERROR")
                session = session or self.open(Session(self, name))
            with session.lock:
                if session.ended:  # while this waited for the lock
                    continue
                session.open()
                try:
                    yield session
                finally:
                    session.used = time.monotonic()
                return

    def expire(self, now: float) -> None:
        """End the HTTP sessions that nobody has used for `session_timeout`."""
        for session in self.sessions.copy().values():
            idle = now - session.used > self.session_timeout
            if idle and isinstance(session.key, str) and not session.lock.locked():
                args = session, now
                threading.Thread(target=self._expire, args=args, daemon=True).start()

    def _expire(self, session: Session, now: float) -> None:
        with session.lock:  # it may be slow to close: this is its own thread
            if now - session.used > self.session_timeout:  # still nobody has used it
                session.end()

    def end_all(self) -> bool:
        """Close every environment in bounded time; return whether a call of one is stuck."""
        sessions = self.sessions.copy().values()
        stuck = any(session.lock.locked() for session in sessions)
        threads = [threading.Thread(target=s.end, daemon=True) for s in sessions]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 0.5
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))
        return stuck


create_app = App  # OpenEnv's name for it


def _hints(function: Any, *names: str) -> dict[str, Any]:
    """Return the types of some annotations of a function, also if it is decorated."""
    function = inspect.unwrap(function)
    given = getattr(function, "__annotations__", {})
    # The others are not evaluated: Python 3.9 cannot evaluate ``float | None``.
    wanted = SimpleNamespace(__annotations__={n: given[n] for n in names if n in given})
    try:
        return get_type_hints(wanted, getattr(function, "__globals__", {}))
    except Exception as error:
        name = getattr(function, "__qualname__", function)
        raise TypeError(f"a type hint of {name} cannot be found: {error}") from error


def _environment_class(env: Any, probe: bool) -> Any:
    """Return the class of the environments that ``env`` makes, or None if that is not to
    be seen; with ``probe``, make one to see it. Raises TypeError if they cannot work.
    """
    cls = env
    while isinstance(cls, functools.partial):
        cls = cls.func
    if not isinstance(cls, type):
        if not callable(cls) or hasattr(cls, "step"):
            words = "itself, not an instance: each session makes its own"
            raise TypeError(f"pass the class {type(cls).__name__} {words}")
        cls = _hints(cls, "return").get("return", object)
        if not hasattr(cls, "reset"):  # it says nothing, or too little
            if not probe:
                return None
            first = env()
            cls = type(first)
            getattr(first, "close", lambda: None)()
    name, state = cls.__name__, inspect.getattr_static(cls, "state", None)
    for method in ("reset", "step"):
        if not (hasattr(cls, method) or hasattr(cls, f"{method}_async")):
            raise TypeError(f"{name} has no method {method}")
    if inspect.isfunction(state):
        raise TypeError(f"{name}.state is a method: put @property above it")
    init = vars(cls).get("__init__")
    set_inside = getattr(getattr(init, "__code__", None), "co_names", ())
    if state is None and "state" not in set_inside:
        raise TypeError(f"{name} has no property state")
    if env is cls:
        try:
            inspect.signature(cls).bind()
        except TypeError as error:
            words = "it must be made without arguments, or by a factory"
            raise TypeError(f"{name}(): {error}: {words}") from None
        except ValueError:
            pass  # it has no signature to see
    return cls


def _state_schema(cls: Any) -> dict[str, Any]:
    getter = getattr(getattr(cls, "state", None), "fget", None)
    state = _hints(getter, "return").get("return") if getter else None
    if dataclasses.is_dataclass(state):
        return json_schema(state)
    return {**json_schema(BenchmarkEnv.state_type, extra=True), "title": "State"}


# ---------------------------------------------------------------------------
# HTTP
# ---------------------------------------------------------------------------

# RFC 9112 sections 3 and 5: the request line, and a field line without folding.
_TOKEN = r"([!#$%&'*+.^_`|~0-9A-Za-z-]+)"
_REQUEST_LINE = re.compile(_TOKEN + r" ([!-~\x80-\xff]+) HTTP/([0-9])\.([0-9])\r?\n")
_FIELD_LINE = re.compile(_TOKEN + r":([^\x00-\x08\x0a-\x1f\x7f]*)\r?\n")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(;[^\r\n]*)?\r\n")
_AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:/?#@\\\[\],\s]+))(?::([0-9]+))?")
_METHOD = re.compile("GET|HEAD|POST|PUT|DELETE|PATCH|OPTIONS|TRACE|CONNECT")
_http_date = functools.lru_cache(maxsize=1)(formatdate)


class Handler(BaseHTTPRequestHandler):
    """One connection and its requests. ``/ws`` is one, and its connection is handed on."""

    server: Server  # type: ignore[assignment,unused-ignore]  # more than the base's
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.app = self.server.app
        self.deadline = time.monotonic() + HEADER_SECONDS  # `tick` cuts it then
        self.unread = False  # whether the peer may be sending what nobody will read
        self.upgraded = False  # whether it becomes a WebSocket, which says goodbye
        self.server.connections.add(self)

    def finish(self) -> None:
        try:
            super().finish()
            if self.unread:
                self._linger()
        finally:
            self.server.connections.discard(self)

    def _linger(self) -> None:
        """Drop what still comes: unread, it resets the connection, answer and all."""
        self.deadline = time.monotonic() + LINGER_SECONDS
        with suppress(OSError):  # the peer is gone, or in no hurry
            self.connection.settimeout(LINGER_SECONDS)
            self.connection.shutdown(socket.SHUT_WR)
            while time.monotonic() < self.deadline and self.connection.recv(MAX_LINE):
                pass

    def tick(self, now: float) -> None:
        """Cut a peer that stalls; the reader's thread calls this."""
        with suppress(OSError):  # the peer has gone by itself
            if now > self.deadline:
                self.connection.shutdown(socket.SHUT_RDWR)
            elif self.server.stopping and not self.upgraded:
                self.connection.shutdown(socket.SHUT_RD)  # ends the wait for a request

    # -- requests in -----------------------------------------------------------

    def handle_one_request(self) -> None:
        """Wait for a request, and answer it."""
        self.close_connection = not self.rfile.peek(1)  # type: ignore[attr-defined]
        if self.close_connection:
            return  # the peer went away
        self.deadline = time.monotonic() + HEADER_SECONDS
        self.requestline = self.command = self.path = ""
        self.request_version = "HTTP/1.1"
        self.unread = True  # until it is known that there is no body, or it was read
        try:
            self._read_head()
            answer = self._call_route()
            if answer is not None:
                self._respond(200, answer)
        except Failure as failure:
            self._respond(failure.status, failure.as_http(), failure.headers)
        except (ConnectionError, TimeoutError):
            raise  # the peer went away; `Server.handle_error` notes it
        except Exception as error:
            log.exception("%a failed", self.requestline)
            self._respond(500, Failure(500, repr(error)).as_http())
        if not self.close_connection:
            self.deadline = time.monotonic() + IDLE_SECONDS

    def _read_head(self) -> None:
        """Read the request line and the header. Stricter than http.server: what two
        programs read in two ways can smuggle a request past one of them.
        """
        line = self.rfile.readline(MAX_LINE + 1)
        if line in (b"\r\n", b"\n"):  # is forgiven (RFC 9112 section 2.2)
            line = self.rfile.readline(MAX_LINE + 1)
        if len(line) > MAX_LINE:
            raise Failure(414, f"the request line is over {MAX_LINE} bytes")
        self.requestline = line.decode("latin-1").rstrip("\r\n")
        match = _REQUEST_LINE.fullmatch(line.decode("latin-1"))
        if match is None:
            raise Failure(400, "the request line is not: METHOD target HTTP/1.1")
        self.command, self.path = match[1], match[2]
        if match[3] != "1":
            raise Failure(505, "this server speaks HTTP/1.1")
        if not _METHOD.fullmatch(self.command):
            raise Failure(501, f"Unsupported method ({self.command!r})")
        self.request_version = f"HTTP/1.{match[4]}"
        self.fields = fields = self._read_fields()
        self.unread = "content-length" in fields or "transfer-encoding" in fields
        tokens = self._tokens("connection")
        old = match[4] == "0" and "keep-alive" not in tokens
        self.close_connection = old or "close" in tokens

    def _read_fields(self) -> dict[str, str]:
        """Read field lines up to the empty one; names in lower case, repeated ones joined."""
        fields: dict[str, str] = {}
        size = 0
        for _ in range(MAX_HEADERS + 1):
            line = self.rfile.readline(MAX_LINE + 1)
            size += len(line)
            if size > MAX_LINE:
                break
            if line in (b"\r\n", b"\n"):
                return fields
            if not line.endswith(b"\n"):
                raise ConnectionError("the peer went away within a header")
            match = _FIELD_LINE.fullmatch(line.decode("latin-1"))
            if match is None:
                raise Failure(400, "a header line is not: Name: value")
            name, value = match[1].lower(), match[2].strip(" \t")
            fields[name] = f"{fields[name]}, {value}" if name in fields else value
        limits = f"{MAX_LINE} bytes or {MAX_HEADERS} lines"
        raise Failure(431, f"the header is over {limits}")

    def _tokens(self, name: str) -> list[str]:
        """Return the comma-separated tokens of a header field, in lower case."""
        return [t.strip() for t in self.fields.get(name, "").lower().split(",")]

    def _call_route(self) -> str | None:
        """Read the body, and return the JSON that answers; None if the route has answered."""
        host, self.path = self._split_target()
        self._check_origin(host)
        methods = METHODS.get(self.path)
        if methods is None:
            raise Failure(404, "Not Found: GET /docs shows what there is")
        if self.command not in methods:
            allow = ", ".join(methods)
            words = f"Method Not Allowed: use {allow}"
            raise Failure(405, words, headers={"Allow": allow})
        body = self._read_body()
        self.deadline = float("inf")  # the environment takes as long as it takes
        return methods[self.command](self, body)

    def _split_target(self) -> tuple[str, str]:
        """Return host and path of the request (RFC 9112 sections 3.2 and 3.3)."""
        host = self.fields.get("host", "")
        if not host and self.request_version != "HTTP/1.0" or "," in host:
            raise Failure(400, "one Host header is needed (RFC 9112 section 3.2)")
        if self.path.startswith("/"):
            return host, unquote(self.path.partition("?")[0])
        try:
            parts = urlsplit(self.path)  # GET http://host/path, whose host counts
        except ValueError:
            raise Failure(400, "the request target is no path") from None
        return parts.netloc or host, unquote(parts.path)

    def _check_origin(self, host: str) -> None:
        """Keep the pages of other sites out; programs send no Origin and are let in.

        A browser sends ``Origin`` with every WebSocket handshake and cross-site POST, and
        under DNS rebinding a ``Host`` that is not this machine's name.
        """
        host, named = _authority(host), self.server.named_hosts
        known = not host or host in named or _is_local(host, listening=True)
        if self.server.loopback and not known:
            raise Failure(403, f"Host {host} is not local: name it with --allow-origin")
        origin = self.fields.get("origin")
        forwarded = map(_authority, self._tokens("x-forwarded-host"))
        allowed = {host, *named, *forwarded} - {""}
        if origin is None or _authority(origin.partition("://")[2]) in allowed:
            return
        raise Failure(403, f"Origin {origin} may not call: name it with --allow-origin")

    def _read_body(self) -> bytes:
        """Read the request's body (RFC 9112 section 6), if it has one. Raises Failure if its
        size is unclear or too large, or its type is not JSON.
        """
        fields, new = self.fields, self.request_version != "HTTP/1.0"
        length, coding = fields.get("content-length"), fields.get("transfer-encoding")
        if coding is not None and (length is not None or not new):
            words = "send either Content-Length or, with HTTP/1.1, Transfer-Encoding"
            raise Failure(400, words)
        if coding is not None and coding.lower() != "chunked":
            raise Failure(501, "the only Transfer-Encoding known is chunked")
        if length is not None and not re.fullmatch("[0-9]{1,18}", length):
            raise Failure(400, "Content-Length must be one number")
        size = int(length or 0)
        self._check_size(size)
        expect = fields.get("expect", "").lower() if new else ""  # RFC 9110 10.1.1
        if expect not in ("", "100-continue"):
            raise Failure(417, "the only Expect known is 100-continue")
        body = bytearray()
        if coding is not None or size:
            self._check_type()
            if expect:
                self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._began = time.monotonic()
            if coding:
                self._read_chunks(body)
            else:
                self._read_more(body, size)
        self.unread = False
        return bytes(body)

    def _check_size(self, size: int) -> None:
        if size > self.app.max_message_size:
            raise Failure(413, f"the limit is {self.app.max_message_size} bytes")

    def _check_type(self) -> None:
        media = self.fields.get("content-type", "application/json").replace('"', "")
        kind, *parameters = (part.strip() for part in media.lower().split(";"))
        charsets = {p for p in parameters if p.startswith("charset=")}
        right = kind == "application/json" and charsets <= {"charset=utf-8"}
        if not right and self.path != "/mcp":  # that answers in JSON-RPC
            words = "with curl, add -H 'Content-Type: application/json'"
            raise Failure(415, f"the body must be JSON in UTF-8: {words}")

    def _expect_more(self, moved: int) -> None:
        """Give the peer time for more than these bytes: it may be slow, but not stall."""
        began, now = self._began + moved / SLOWEST_RATE, time.monotonic()
        self.deadline = min(now, began) + HEADER_SECONDS

    def _read_more(self, body: bytearray, size: int) -> None:
        """Read ``size`` more bytes of a body."""
        size += len(body)
        while len(body) < size:
            self._expect_more(len(body))
            data = self.rfile.read1(min(size - len(body), 1 << 20))
            if not data:
                raise ConnectionError("the peer went away within a body")
            body += data

    def _read_chunks(self, body: bytearray) -> None:
        """Decode ``Transfer-Encoding: chunked`` (RFC 9112 section 7.1)."""
        size = -1
        while size:
            self._expect_more(len(body))
            match = _CHUNK_LINE.fullmatch(self.rfile.readline(MAX_LINE))
            if match is None:
                raise Failure(400, "a chunk does not begin with its size")
            size = int(match[1], 16)
            self._check_size(len(body) + size)
            self._read_more(body, size)
            if size and self.rfile.readline(2) != b"\r\n":
                raise Failure(400, "a chunk is longer than its size")
        self._read_fields()  # trailers, which must not count as fields

    # -- answers out -----------------------------------------------------------

    def _respond(
        self, status: int, body: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Send an answer, and log the request: escaped, so that it cannot forge a line."""
        if self.unread or self.server.stopping:
            self.close_connection = True
        step = status == 200 and self.path == "/step"  # of these there are too many
        level, peer = logging.DEBUG if step else logging.INFO, self.client_address[0]
        log.log(level, "%s %a %s", peer, self.requestline, status)
        data = body.encode()
        date = _http_date(int(time.time()), usegmt=True)
        fields = {"Server": f"openenv-benchmark/{VERSION}", "Date": date}
        fields["X-Content-Type-Options"] = "nosniff"
        if status not in (101, 204):
            fields["Content-Type"] = "application/json"
            fields["Content-Length"] = str(len(data))
        if self.close_connection:
            fields["Connection"] = "close"
        elif self.request_version == "HTTP/1.0":
            fields["Connection"] = "keep-alive"
        fields.update(headers or {})
        lines = [f"{name}: {value}\r\n" for name, value in fields.items()]
        head = f"HTTP/1.1 {status} {self.responses[status][0]}\r\n{''.join(lines)}\r\n"
        if self.command == "HEAD":
            data = b""
        whole = memoryview(head.encode("latin-1") + data)
        self._began, size = time.monotonic(), 1 << 16
        for start in range(0, len(whole), size):
            self._expect_more(start)
            self.connection.sendall(whole[start : start + size])

    # -- the answers, by route: OpenAPI has the docstring's first sentence as summary --

    def get_ws(self, body: bytes) -> None:
        """A session over WebSocket. One connection, one environment, one session."""
        self.close_connection = True  # whatever comes next, it is no HTTP
        fields, upgrade = self.fields, {"Upgrade": "websocket"}  # RFC 6455 section 4.2
        wanted = "websocket" in self._tokens("upgrade")
        wanted = wanted and "upgrade" in self._tokens("connection")
        if not wanted or fields.get("sec-websocket-version") != "13":
            words = "this is a WebSocket endpoint, for handshakes of version 13"
            headers = {**upgrade, "Sec-WebSocket-Version": "13"}
            raise Failure(426, words, headers=headers)
        key = fields.get("sec-websocket-key", "")
        valid = re.fullmatch("[A-Za-z0-9+/]{21}[AQgw]==", key)
        if self.request_version == "HTTP/1.0" or not valid:
            words = "it takes HTTP/1.1 and a Sec-WebSocket-Key of 16 bytes in base64"
            raise Failure(400, words)
        self.upgraded = True
        if self.server.stopping:  # else `tick` leaves the connection alone from here on
            raise Failure(503, "The server is shutting down", "SESSION_ERROR")
        accept = {"Connection": "Upgrade", "Sec-WebSocket-Accept": accept_key(key)}
        self._respond(101, headers={**upgrade, **accept})
        self.connection.setblocking(False)
        early = self.rfile.read1(MAX_LINE) or b""  # what came behind the handshake
        # A socket of its own, since socketserver closes the other.
        sock = socket.socket(fileno=self.connection.detach())
        self.server.reader.add(sock, early, self.client_address[0])

    def _session_name(self) -> str:
        name = self.fields.get("x-session-id")
        if name is not None and not 1 <= len(name) <= 255:
            kind = "string_too_long" if name else "string_too_short"
            words = "Input should be 1 to 255 characters long"
            fault = describe_fault(kind, words, ("header", "x-session-id"), name)
            raise Failure(422, words, "VALIDATION_ERROR", {"errors": [fault]})
        return name or SHARED

    def _options(self, body: bytes, kind: type) -> Any:
        data = parse_json(body, ("body",)) if body.strip() else {}
        return read(kind, data, ("body",), fields=True)

    def post_reset(self, body: bytes) -> str:
        """Begin a new episode. Opens the session, if there is none."""
        options, name = self._options(body, ResetRequest), self._session_name()
        with self.app.use(name, create=True) as session:
            return session.act("reset", options)

    def post_step(self, body: bytes) -> str:
        """Act once. Without X-Session-Id in the environment that all such requests share."""
        options, name = self._options(body, self.app.step_request), self._session_name()
        action = options.pop("action")
        with self.app.use(name, create=name == SHARED) as session:
            return session.act("step", options, action)

    def get_state(self, body: bytes) -> str:
        """Where the episode stands. The state of the session's environment."""
        name = self._session_name()
        with self.app.use(name, create=name == SHARED) as session:
            return session.state()

    def post_close(self, body: bytes) -> str:
        """End the session. Closes its environment and frees its place."""
        with self.app.use(self._session_name(), create=False) as session:
            session.end()
        return '{"status":"closed"}'

    def post_mcp(self, body: bytes) -> str:
        """JSON-RPC of the Model Context Protocol. This environment has no tools, and says so."""
        try:
            answer = mcp_answer(parse_json(body, ("body",)))
        except Failure as failure:
            error = {"code": -32700, "message": failure.message}
            answer = {"jsonrpc": "2.0", "id": None, "error": error}
        return encode_json(answer)

    def get_health(self, body: bytes) -> str:
        """Whether the server runs. For load balancers and containers."""
        return '{"status":"healthy"}'

    def get_schema(self, body: bytes) -> str:
        """The JSON Schemas. Of action, observation and state."""
        return encode_json(self.app.schemas)

    def get_metadata(self, body: bytes) -> str:
        """About the environment. Its name, description, version and README."""
        return encode_json(self.app.metadata)

    def get_openapi(self, body: bytes) -> str:
        """This description. OpenAPI 3.1."""
        return encode_json(openapi(self.app))

    def get_page(self, body: bytes) -> None:
        """Play an episode, explore the API. An interactive page."""
        text, policy = page()
        html = {"Content-Type": "text/html; charset=utf-8"}
        self._respond(200, text.decode(), {**html, "Content-Security-Policy": policy})

    def get_redirect(self, body: bytes) -> None:
        """To the page. Redirects to /web."""
        # Relative: there may be a path prefix.
        where = {"Location": REDIRECTS[self.path], "Content-Type": "text/plain"}
        self._respond(307, headers=where)

    def options(self, body: bytes) -> None:
        self._respond(204, headers={"Allow": ", ".join(METHODS[self.path])})


class Route(NamedTuple):
    """A path, and what OpenAPI says of it: the names of schemas, and statuses."""

    method: str
    path: str
    answer: Callable[[Handler, bytes], str | None]
    returns: str = ""
    takes: str = ""
    errors: str = ""


REDIRECTS = {"/": "web", "/web/": "../web", "/docs/": "../docs", "/redoc": "docs"}
_CALL, _ASK = "422 500 503", "404 422 500 503"
ROUTES = {  # by OpenAPI's tag
    "Environment": [
        Route("POST", "/reset", Handler.post_reset, "Result", "ResetRequest", _CALL),
        Route("POST", "/step", Handler.post_step, "Result", "StepRequest", _ASK),
        Route("GET", "/state", Handler.get_state, "State", "", _ASK),
        Route("POST", "/close", Handler.post_close, "Closed", "", "404 422 500"),
        Route("GET", "/ws", Handler.get_ws, "", "", "426"),
    ],
    "Information": [
        Route("GET", "/schema", Handler.get_schema, "Schemas"),
        Route("GET", "/metadata", Handler.get_metadata, "Metadata"),
        Route("GET", "/health", Handler.get_health, "Health"),
        Route("GET", "/openapi.json", Handler.get_openapi, "OpenAPI"),
    ],
    "Tools": [Route("POST", "/mcp", Handler.post_mcp, "RpcAnswer", "RpcRequest")],
    "Pages": [
        Route("GET", "/web", Handler.get_page),
        Route("GET", "/docs", Handler.get_page),
        Route("GET", "/", Handler.get_redirect),
    ],
}
METHODS: dict[str, dict[str, Callable[[Handler, bytes], str | None]]] = {"*": {}}
for _route in itertools.chain(*ROUTES.values()):
    METHODS[_route.path] = {_route.method: _route.answer}
    if _route.method == "GET" and _route.path != "/ws":
        METHODS[_route.path]["HEAD"] = _route.answer
METHODS.update((path, METHODS["/"]) for path in REDIRECTS)
for _methods in METHODS.values():
    _methods["OPTIONS"] = Handler.options


def _authority(text: str) -> str:
    """Return host and port as in a URL, comparable: lower case, no default port."""
    text = text.strip().lower()
    match = _AUTHORITY.fullmatch(text)
    default = match is not None and match[3] in ("80", "443")
    return text.rpartition(":")[0] if default else text


def _is_local(authority: str, listening: bool = False) -> bool:
    """Whether it is this machine by a loopback name, or one that servers listen on."""
    match = _AUTHORITY.fullmatch(authority)
    host = (match[1] or match[2]) if match else ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
        return address.is_loopback or listening and address.is_unspecified
    except ValueError:
        return False


# ---------------------------------------------------------------------------
# WebSockets: one thread reads them all
# ---------------------------------------------------------------------------


class Connection:
    """A WebSocket and its session: who calls the environment is all that differs.

    The reader's thread calls `turn`. An environment that never waits is called there and
    then; any other is made, called and closed by a thread of the session's own (`_work`).
    """

    def __init__(self, server: Server, sock: socket.socket, address: str) -> None:
        self.server, self.app, self.address = server, server.app, address
        self.ws = WebSocket(sock, Protocol(False, self.app.max_message_size))
        self.session = Session(self.app, ("ws", next(_numbers)))
        self.events = 0  # what the reader's selector waits for
        self.deadline = float("inf")  # for the end: the socket is closed then
        self._arrived = threading.Event()  # tells the session's own thread to look
        # When the peer last moved bytes, and what had moved by then; when it began the
        # message that it is sending, less the time for all before at the slowest rate.
        self._moved_at = self._began_at = time.monotonic()
        self._moved = ("in", 0)

    def begin(self, early: bytes) -> None:
        """Open the session, and take what came behind the opening handshake."""
        self.ws.protocol.receive(early)
        try:
            self.app.open(self.session)
            if self.app.never_waits:
                self.session.open()
            else:
                name = f"session {self.session}"
                threading.Thread(target=self._work, daemon=True, name=name).start()
        except Failure as failure:
            self._refuse(failure)
        except RuntimeError as error:  # too many threads
            log.error("session %s is lost: %s", self.session, error)
            self._refuse(Failure(503, f"{error}: try again later"))

    def turn(self, now: float) -> bool:
        """Move bytes, and have what arrived answered; return whether to come again soon."""
        self.ws.tend()
        session, protocol, again = self.session, self.ws.protocol, False
        if self.app.never_waits:
            again = all(self._answer() for _ in range(TURN))
            if protocol.closed:
                session.end()
        elif protocol.inbox or protocol.closed:
            if protocol.close_received and protocol.ending and session.lock.locked():
                self.ws.start_closing(protocol.ending.code)  # not after the step
            self._arrived.set()
        if (protocol.close_sent or protocol.closed) and not protocol.outbox:
            self.deadline = min(self.deadline, now + LINGER_SECONDS)
        # The peer may count on its place from then on, unless the environment takes long.
        slow = now > self.deadline - LINGER_SECONDS + TICK_SECONDS
        if protocol.closed and (session.closed or slow):
            self.ws.end()
            if self.ws.at_end or protocol.close_received and not protocol.outbox:
                self.deadline = now  # nothing more can come
        return again

    def tick(self, now: float) -> bool:
        """Begin to end what is stalled, idle or to stop; return whether to take a turn."""
        ws, protocol, timeout = self.ws, self.ws.protocol, self.app.session_timeout
        # In this order: a message that is taken meanwhile shows as busy, its end as used.
        waiting, busy = bool(protocol.inbox), self.session.lock.locked()
        if protocol.outbox or protocol.unfinished:
            self.session.used = now  # the peer is taking an answer, or sending
        if self._stalled(now):
            log.debug("%s has stalled", self.address)
            self.deadline = now
        elif self.server.stopping and not busy:
            ws.start_closing(GOING_AWAY, "the server is shutting down")
        elif not (waiting or busy) and now - self.session.used > timeout:
            ws.start_closing(GOING_AWAY, f"the session was idle for {timeout:g} s")
        ending = protocol.close_sent or protocol.closed or now >= self.deadline
        return bool(ending) or self.events != selectors.EVENT_READ

    def _stalled(self, now: float) -> bool:
        """Whether the peer takes nothing, or is too slow with a message it has begun."""
        ws, protocol = self.ws, self.ws.protocol
        moved = ("out", ws.sent) if protocol.outbox else ("in", ws.received)
        unfinished = protocol.unfinished and not ws.full
        if moved != self._moved or not (unfinished or protocol.outbox):
            self._moved, self._moved_at = moved, now
        came = ws.received / SLOWEST_RATE
        if not unfinished:
            self._began_at = now - came
        return now > min(self._moved_at, self._began_at + came) + HEADER_SECONDS

    def _work(self) -> None:
        """Make, call and close an environment that may wait, in this thread."""
        try:
            self.session.open()
            while not self.ws.protocol.closed:
                self._arrived.wait()
                self._arrived.clear()
                while self._answer():
                    pass
        except Failure as failure:
            self._refuse(failure)
        except BaseException:
            log.exception("session %s failed", self.session)
            self.deadline = 0.0  # the reader cuts it
        self.session.end()
        self.server.reader.wake(self)

    def _answer(self) -> bool:
        """Answer one message that has arrived; return whether there was one."""
        # What waits when the server stops is not begun.
        if not self.ws.protocol.inbox or self.server.stopping:
            return False
        with self.session.lock:
            message = self.ws.take()
            if message is None:
                return False
            self._began_at = time.monotonic() - self.ws.received / SLOWEST_RATE
            if self.events == 0 or self.ws.protocol.ending:
                self.server.reader.wake(self)  # there is room, or a Close to answer
            try:
                answer = self.session.answer(message)
            except Failure as failure:
                answer = failure.as_message()
            self.session.used = time.monotonic()
            self._send(answer)
            return True

    def _send(self, answer: str | None) -> None:
        """Send an answer, or say goodbye if it is None; the reader goes on if it must."""
        try:
            if answer is None:
                self.ws.start_closing()
            else:
                self.ws.send(answer, wait=False)
        except ConnectionClosed as closed:  # nobody waits for it any more
            log.debug("%s %s", self.address, closed)
        if self.ws.protocol.outbox:
            self.server.reader.wake(self)

    def _refuse(self, failure: Failure) -> None:
        full = failure.code == "CAPACITY_REACHED"
        self._send(failure.as_message())
        self.ws.start_closing(TRY_AGAIN_LATER if full else INTERNAL_ERROR)
        self.session.end()


class Reader:
    """The one thread that reads all WebSockets, and ends what is idle or stalled."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._selector = selectors.DefaultSelector()
        self._bell, self._rung = socket.socketpair()  # wakes the thread
        self._bell.setblocking(False)
        self._rung.setblocking(False)
        self._selector.register(self._rung, selectors.EVENT_READ)
        self._due: deque[Connection] = deque()  # whose turn it is, though nothing came
        self.stopped = False

    def add(self, sock: socket.socket, early: bytes, address: str) -> None:
        """Serve a WebSocket whose opening handshake is done; any thread may call this."""
        connection = Connection(self._server, sock, address)
        try:
            connection.begin(early)
        except Exception:
            log.exception("serving %s failed", address)
            connection.deadline = 0.0
        self._server.connections.add(connection)
        self.wake(connection)

    def wake(self, connection: Connection) -> None:
        """Give a connection its turn soon; any thread may call this."""
        self._due.append(connection)
        with suppress(OSError):  # it is full of bytes that do the same
            self._bell.send(b"!")

    def run(self) -> None:
        """Serve until `stopped`, then cut all connections."""
        next_tick = 0.0
        while not self.stopped:
            tick = 0.02 if self._server.stopping else TICK_SECONDS
            for ready in self._wait(tick):
                self._turn(ready)
            now = time.monotonic()
            if now >= next_tick:
                next_tick = now + tick
                self._tick(now)
        for connection in self._server.all():
            if isinstance(connection, Handler):
                connection.tick(float("inf"))
            else:
                self._remove(connection)
        for end in (self._selector, self._bell, self._rung):
            end.close()

    def _wait(self, timeout: float) -> list[Connection]:
        """Return the connections whose turn it is, by and by."""
        lone = len(self._selector.get_map()) == 2  # with the bell
        until, ready = time.monotonic() + EAGER_SECONDS * lone, self._selector.select(0)
        while not (ready or self._due) and time.monotonic() < until:
            ready = self._selector.select(0)
        if not (ready or self._due):
            ready = self._selector.select(timeout)
        found = [key.data for key, _ in ready if key.data]
        if len(found) < len(ready):
            with suppress(BlockingIOError):
                self._rung.recv(4096)
        found += [self._due.popleft() for _ in range(len(self._due))]
        return found

    def _turn(self, connection: Connection) -> None:
        """Give a connection its turn. What goes wrong with it ends it, and no other."""
        ws, now, again = connection.ws, time.monotonic(), False
        try:
            again = connection.turn(now)
            events = 0 if ws.full or ws.at_end else selectors.EVENT_READ
            if ws.protocol.outbox:
                events = selectors.EVENT_WRITE
            if events != connection.events and now < connection.deadline:
                self._watch(connection, events)
        except BaseException:
            log.exception("serving %s failed", connection.address)
            connection.deadline = now
        if now >= connection.deadline:
            self._remove(connection)
        elif again:
            self._due.append(connection)

    def _watch(self, connection: Connection, events: int) -> None:
        if connection.events:
            self._selector.unregister(connection.ws.sock)
        if events:
            self._selector.register(connection.ws.sock, events, connection)
        connection.events = events

    def _remove(self, connection: Connection) -> None:
        self._watch(connection, 0)
        connection.ws.drop("the connection is over")
        connection.turn(0.0)  # it is closed: the session ends
        self._server.connections.discard(connection)

    def _tick(self, now: float) -> None:
        for connection in self._server.all():
            try:
                if isinstance(connection, Handler):
                    connection.tick(now)
                elif connection.tick(now):
                    self._turn(connection)
            except Exception:  # what goes wrong with one must not stop this for all
                log.exception("looking at %s failed", connection)
        try:
            self._server.app.expire(now)
        except RuntimeError:
            log.exception("no thread could be started to close idle sessions")


class Server(ThreadingHTTPServer):
    """An app on a port. Raises OSError if the address cannot be had."""

    request_queue_size = 1024  # connections that wait to be accepted
    allow_reuse_address = os.name == "posix"  # on Windows it would share a busy port

    def __init__(self, app: App, host: str, port: int) -> None:
        self.address_family = socket.getaddrinfo(host, port)[0][0]
        self.app = app
        self.connections: set[Handler | Connection] = set()
        self.stopping = False
        self.loopback = _is_local(f"[{host}]" if ":" in host else host)
        hosts = [*app.allow_origins, os.environ.get("SPACE_HOST", "")]
        bare = (host.rpartition("://")[2].rstrip("/") for host in hosts)
        self.named_hosts = {_authority(host) for host in bare if host}
        super().__init__((host, port), Handler)
        self.reader = Reader(self)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's looks up a name, slowly
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    @property
    def url(self) -> str:
        """Where a client on this machine reaches the server."""
        host, port = self.server_address[:2]
        name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(host), str(host))
        return f"http://{f'[{name}]' if ':' in name else name}:{port}"

    def all(self) -> set[Handler | Connection]:
        """Return the connections as they are now: atomic, as add and discard are."""
        return self.connections.copy()

    def serve_forever(self, poll_interval: float = TICK_SECONDS) -> None:
        threading.Thread(target=self.reader.run, daemon=True, name="reader").start()
        super().serve_forever(poll_interval)

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            sock, address = super().get_request()
        except OSError:
            time.sleep(0.05)  # out of file descriptors, perhaps: do not spin
            raise
        # A peer that vanished without a word is found out after two minutes.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("IDLE", 60), ("INTVL", 15), ("CNT", 4)):
            option = getattr(socket, f"TCP_KEEP{name}", None)
            if option is not None:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
        return sock, address

    def server_close(self) -> None:
        with suppress(OSError):  # so that no child holds the port, made by a fork
            self.socket.shutdown(socket.SHUT_RDWR)
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            log.debug("%s went away: %s", client_address[0], error)
        else:
            log.exception("a request from %s failed", client_address[0])

    def stop(self) -> bool:
        """Stop within 5 seconds: steps in progress are answered, WebSockets closed with
        1001, and every environment is closed. Return whether a call of one is stuck.
        """
        if self.stopping:
            return False
        self.stopping = True
        self.shutdown()
        self.server_close()
        deadline = time.monotonic() + GRACE_SECONDS
        while self.connections and time.monotonic() < deadline:
            time.sleep(0.02)
        self.reader.stopped = True
        return self.app.end_all()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


# ---------------------------------------------------------------------------
# OpenAPI 3.1, made from the routes
# ---------------------------------------------------------------------------


_CODES = {  # status: what it means, and the ``detail`` of an example
    "400": ("It is not HTTP as it should be", "Content-Length must be one number"),
    "403": ("Another site's page may not call", "Origin a.example may not call"),
    "404": ("There is no such session", "No session has this X-Session-Id"),
    "405": ("Another method is needed", "Method Not Allowed: use POST, OPTIONS"),
    "413": ("The body is too large", "the limit is 104857600 bytes"),
    "415": ("The body is not JSON", "the body must be JSON in UTF-8"),
    "417": ("What is expected is not known", "the only Expect known is 100-continue"),
    "422": ("The request breaks its schema: every fault is listed", ""),
    "426": ("A WebSocket handshake is needed", "this is a WebSocket endpoint"),
    "431": ("The header is too large", "the header is over 65536 bytes or 100 lines"),
    "500": ("The environment failed, and lives on", "division by zero"),
    "501": ("The coding is not known", "the only Transfer-Encoding known is chunked"),
    "503": ("The server is full", "Server at capacity: 1 of 1 sessions are open"),
}


def openapi(app: App) -> dict[str, Any]:
    """Describe the HTTP API of an app: every operation, every answer, examples that hold."""
    schemas = _schemas(app)
    responses = {}
    for code, (meaning, detail) in _CODES.items():
        name, given = ("Error", {"detail": detail}) if detail else ("Faults", None)
        body = _json(schemas, name, given)
        responses[code] = {"description": meaning, "content": body}
    session = {
        "name": "X-Session-Id",
        "in": "header",
        "description": "A session with an environment of its own; without it, one is shared",
        "schema": {"type": "string", "minLength": 1, "maxLength": 255},
    }
    parts = {"schemas": schemas, "responses": responses}
    about = app.metadata["description"]
    return {
        "openapi": "3.1.0",
        "info": {"title": app.name, "description": about, "version": VERSION},
        "paths": {
            route.path: {route.method.lower(): _operation(tag, route, schemas)}
            for tag, routes in ROUTES.items()
            for route in routes
        },
        "components": {**parts, "parameters": {"SessionId": session}},
    }


def _schemas(app: App) -> dict[str, Any]:
    """Return the schemas that operations refer to, by name."""
    step = json_schema(app.step_request, extra=True)
    step["examples"] = [{"action": example(app.schemas["action"])}]
    fault = describe_fault("missing", "Field required", ("body", "action"), {})
    call = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    request, answer = _like(call), _like(mcp_answer(call))
    request["required"].remove("id")
    request["properties"]["id"] = answer["properties"]["id"] = {"examples": [1]}
    return {
        "ResetRequest": json_schema(ResetRequest, extra=True),
        "StepRequest": step,
        "Result": _result_schema(app.schemas["observation"]),
        "State": app.schemas["state"],
        "Closed": _like({"status": "closed"}),
        "Health": _like({"status": "healthy"}),
        "Schemas": _like({name: {} for name in app.schemas}),
        "Metadata": _like({**app.metadata, "readme_content": None}),
        "OpenAPI": _like({"openapi": "3.1.0"}),
        "RpcRequest": request,
        "RpcAnswer": answer,
        "Error": _like({"detail": "what is wrong"}),
        "Faults": _like({"detail": [fault]}),
    }


def _like(value: Any) -> dict[str, Any]:
    """Return a schema that is made from an example of what it describes."""
    if isinstance(value, dict):
        properties = {name: _like(item) for name, item in value.items()}
        return {"type": "object", "properties": properties, "required": list(value)}
    kind = {**_NAMES, list: "array", type(None): ["string", "null"]}[type(value)]
    return {"type": kind, "examples": [value]}


def _result_schema(observation: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of what step and reset answer, and an example of each."""
    seen = {**observation, "properties": {**observation["properties"]}}
    given, _ = (seen["properties"].pop(name, {}) for name in ("reward", "done"))
    seen["required"] = [name for name in seen["required"] if name in seen["properties"]]
    reset = {"observation": example(seen, which=-1), "reward": 0.0, "done": False}
    reward = given.get("examples", [given.get("default")])[0]
    number = float(reward) if isinstance(reward, (int, float)) else 1.0
    step = {**reset, "observation": example(seen), "reward": number}
    noted = {"metadata": {"step": 1}}
    anything = seen["properties"].get("metadata", {}).get("additionalProperties")
    if anything is True and not step["observation"]["metadata"]:
        step |= {**noted, "observation": {**step["observation"], **noted}}
    result = _like(reset)
    result["properties"]["observation"] = seen
    result["properties"]["reward"] = {"anyOf": [{"type": "number"}, {"type": "null"}]}
    result["properties"]["metadata"] = {"type": "object"}
    return {**result, "examples": [step, reset]}


def _operation(tag: str, route: Route, schemas: Mapping[str, Any]) -> dict[str, Any]:
    summary, _, description = (route.answer.__doc__ or "").partition(". ")
    name = route.path.strip("/").replace(".", "_") or "root"
    status, words = "200", "As asked"
    content: dict[str, Any] = {"text/html": {}}
    if route.path == "/ws":
        status, words, content = "101", "From here on it is a WebSocket", {}
    elif route.path == "/":
        status, words, content = "307", "The page is elsewhere", {}
    elif route.returns:
        given = schemas["Result"]["examples"][1] if route.path == "/reset" else None
        content = _json(schemas, route.returns, given)
    codes = f"{route.errors} 400 403 405 431"
    if route.method == "POST":
        codes += " 413 415 417 501"
    refs = {c: {"$ref": f"#/components/responses/{c}"} for c in sorted(codes.split())}
    operation: dict[str, Any] = {
        "operationId": f"{route.method.lower()}_{name}",
        "tags": [tag],
        "summary": summary,
        "description": description,
        "responses": {status: {"description": words, "content": content}, **refs},
    }
    if "422" in codes:
        operation["parameters"] = [{"$ref": "#/components/parameters/SessionId"}]
    if route.takes:
        content, required = _json(schemas, route.takes), route.takes == "StepRequest"
        operation["requestBody"] = {"required": required, "content": content}
    return operation


def _json(schemas: Mapping[str, Any], name: str, given: Any = None) -> dict[str, Any]:
    """Return the content of a body: which schema it has, and an example of it."""
    value = example(schemas[name]) if given is None else given
    examples = {"example": {"summary": "An example", "value": value}}
    ref = {"$ref": f"#/components/schemas/{name}"}
    return {"application/json": {"schema": ref, "examples": examples}}


# ---------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------


def _refuse(words: str) -> NoReturn:
    """End the program with one clear line, and no usage text above it."""
    sys.stderr.write(f"server.py: {words}\n")
    sys.exit(2)


def _parse_options(argv: Sequence[str] | None) -> Any:
    import argparse

    about = "Serve an OpenEnv environment over HTTP and WebSocket."
    parser = argparse.ArgumentParser("server.py", description=about, allow_abbrev=False)
    parser.error = _refuse  # type: ignore[assignment, method-assign]
    add = parser.add_argument
    words = "address to listen on (%(default)s); 0.0.0.0 is all of IPv4"
    add("--host", default="127.0.0.1", help=words)
    add("--port", type=int, help="port ($PORT or 8000); 0 picks a free one")
    env, words = "benchmark:BenchmarkEnvironment", "module:Class to serve (%(default)s)"
    add("--env", default=env, metavar="MODULE:CLASS", help=words)
    words = "sessions at a time (1000 if the class supports it, else 1)"
    add("--max-concurrent-envs", type=int, metavar="N", help=words)
    words = "seconds until an idle session ends (%(default)g); 0: never"
    add("--session-timeout", type=float, default=3600.0, metavar="S", help=words)
    words = "largest request body or message, in MiB (%(default)g)"
    add("--max-message-mb", type=float, default=100.0, metavar="MB", help=words)
    pages: Any = {"metavar": "HOST", "help": "a host whose pages may call (repeatable)"}
    add("--allow-origin", dest="allow_origins", action="append", default=[], **pages)
    add("--reload", action="store_true", help="restart when a source file changes")
    known, words = ("debug", "info", "warning", "error"), "what to log (%(default)s)"
    add("--log-level", default="info", type=str.lower, choices=known, help=words)
    add("--version", action="version", version=f"%(prog)s {VERSION}")
    options = parser.parse_args(argv)
    if options.port is None:
        port = os.environ.get("PORT") or "8000"
        if not (port.isdecimal() and int(port) < 1 << 16):
            _refuse(f"$PORT is no port: {port!r}")
        options.port = int(port)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Serve an environment until told to stop; return the exit code."""
    options = _parse_options(argv)
    if options.reload:
        return _reload(sys.argv[1:] if argv is None else argv, options.env)
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=options.log_level.upper(), handlers=[handler])
    classes = load_environment(options.env)
    names = "max_concurrent_envs", "session_timeout", "max_message_mb", "allow_origins"
    try:
        app = create_app(*classes, **{name: getattr(options, name) for name in names})
    except TypeError as error:
        _refuse(f"--env {options.env}: {error}")
    except ValueError as error:  # it begins with the name of an option
        name, _, words = str(error).partition(" ")
        _refuse(f"--{name.replace('_', '-')} {words}")
    try:
        server = Server(app, options.host, options.port)
    except (OSError, OverflowError, UnicodeError) as error:
        address = f"--host {options.host} --port {options.port}"
        _refuse(f"cannot listen on {address}: {error}")
    raise_file_limit()
    # Speed: made and freed. glibc's malloc takes its measure from it (mallopt(3),
    # M_MMAP_THRESHOLD), and keeps the memory of a large message for the next: 1.5 at 1 MB.
    bytes(8 << 20)
    _stop_on_signals(server)
    url = server.url
    with suppress(OSError):  # standard output is full or closed: serve all the same
        say(f"{app.name} on {url}: play at {url}/web, API at {url}/docs")
    server.serve_forever()
    if server.stop():  # a call is stuck, which may hold up a normal exit
        logging.shutdown()  # it flushes stderr
        with suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()
        os._exit(0)
    return 0


_ESCAPES = {c: f"\\x{c:02x}" for c in (*range(9), *range(11, 32), *range(127, 160))}


class _Formatter(logging.Formatter):
    """Escapes what could forge a line or steer a terminal; indents all lines but the first."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).translate(_ESCAPES).replace("\n", "\n    ")


def load_environment(name: str) -> tuple[Any, Any, Any]:
    """Return the class that ``"module:Class"`` names, and its action and observation types.

    If there is none, or it does not say them, the program ends with a line about it.
    What the module itself raises is not caught: its traceback says more.
    """
    module_name, _, class_name = name.partition(":")
    if not module_name or not class_name:
        _refuse(f"--env {name}: write it as module:Class")
    sys.path[:0] = [os.getcwd()]
    if __package__ and module_name == "benchmark":
        module_name = f"{__package__}.benchmark"  # the default, copied into a package
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        if not f"{module_name}.".startswith(f"{missing.name}."):
            raise  # the module is there, and something that it imports is not
        _refuse(f"--env {name}: {missing}")
    env = getattr(module, class_name, None)
    if not isinstance(env, type):
        _refuse(f"--env {name}: there is no class {class_name} in {module_name}")
    step = getattr(env, "step_async", None) or getattr(env, "step", None)
    if step is None:
        _refuse(f"--env {name}: {class_name} has no method step")
    try:
        _, action, *_ = inspect.signature(inspect.unwrap(step)).parameters
        hints = _hints(step, action, "return")
        return env, hints[action], hints["return"]
    except TypeError as unknown:
        _refuse(f"--env {name}: {unknown}")
    except (LookupError, ValueError):
        wanted = "def step(self, action: MyAction) -> MyObservation"
        _refuse(f"--env {name}: its step needs type hints: {wanted}")


def raise_file_limit() -> None:
    """Make room for a thousand sockets, as far as the system lets us."""
    with suppress(ImportError, ValueError, OSError):  # on Windows there is no limit
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _stop_on_signals(server: Server) -> None:
    """Let a signal end `serve_forever`; after that, Ctrl-C ends the process."""
    pid = os.getpid()

    def stop(signum: int, frame: Any) -> None:
        if os.getpid() != pid:  # a child that an environment forked: it just ends
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Not here: the loop to be stopped is what this interrupts.
        threading.Thread(target=server.shutdown, daemon=True).start()

    _on_signals(stop)


def _on_signals(handler: Callable[[int, Any], Any]) -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handler)


def _reload(argv: Sequence[str], env: str) -> int:
    """Run the server in a child process, and again whenever a source file has changed."""
    import subprocess
    from pathlib import Path

    program = ["-m", f"{__package__}.server"] if __package__ else [__file__]
    options = [argument for argument in argv if argument != "--reload"]
    package = Path(env.partition(":")[0].partition(".")[0])

    def stamps() -> dict[Path, float]:
        here = (Path(__file__).parent.glob("*.py"), Path().glob("*.py"))
        found = {}
        for path in itertools.chain(*here, package.rglob("*.py")):
            with suppress(OSError):  # it was there a moment ago
                found[path] = path.stat().st_mtime
        return found

    _on_signals(lambda *_: sys.exit(0))
    first = True
    while True:
        before = stamps()
        child = subprocess.Popen([sys.executable, *program, *options])
        try:
            while stamps() == before:
                time.sleep(0.2)
                if first and child.poll() is not None:
                    return child.returncode  # it never worked
        finally:
            child.terminate()
            child.wait()
        first = False


# ---------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------


@functools.cache
def page() -> tuple[bytes, str]:
    """Return the page and its Content-Security-Policy: nothing but what is in it may run."""
    from hashlib import sha256

    policy = "default-src 'none'; connect-src 'self'; img-src data:; form-action 'none'"
    policy += "; base-uri 'none'"
    for tag in ("script", "style"):
        text = PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = base64.b64encode(sha256(text.encode()).digest()).decode()
        policy += f"; {tag}-src 'sha256-{digest}'"
    return PAGE.encode(), policy


PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>OpenEnv</title><link rel="icon" href="data:,">
<style>
:root {
  color-scheme: light dark; font: 94%/1.5 system-ui, sans-serif;
  --page: #f6f6f3; --muted: #5b5e66; --accent: #1b5cc4; --fault: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root { --page: #080809; --muted: #a4a8b1; --accent: #82b1ff; --fault: #ff9188; }
}
* { box-sizing: border-box; min-width: 0; margin: 0; overflow-wrap: anywhere; }
body { padding: 1rem; background: var(--page); }
h1, h2, h3 { font-size: 1.1rem; }
small, dt, th, #about { color: var(--muted); font-size: 0.875rem; font-weight: normal; }
h2 small, b + small { margin-left: 0.5rem; }
a, summary b { display: inline-block; min-width: 3.5rem; color: var(--accent); }
a, summary { padding: 0.25rem 0; }
header, section, button, select, textarea { border-radius: 8px; background: Canvas; }
header, section { padding: 1.25rem; border: 1px solid #8884; }
section, form, form > div, #result { display: flex; flex-direction: column; gap: 0.75rem; }
header, form p, #figures { display: flex; flex-wrap: wrap; align-items: center; gap: 0.5rem 1rem; }
#status { flex: 1 1 7rem; }
label { flex: 1; }
#about, #full, #step span, #reset span { flex: 1 1 100%; min-height: 1.5em; }
main, main > * + * { margin-top: 1rem; }
#reset { padding-top: 1rem; }
#reset > div { flex-direction: row; }
button, select, textarea { padding: 0.3rem 0.7rem; border: 1px solid var(--muted); font: inherit; }
select, textarea { display: block; width: 100%; margin: 0.25rem 0; }
textarea { field-sizing: content; max-height: 20rem; unicode-bidi: isolate; }
pre, code, dd, textarea { font: 0.875rem/1.5 Menlo, Consolas, monospace; white-space: pre-wrap; }
dd { unicode-bidi: plaintext; }
pre { overflow: auto; max-height: 24rem; padding: 0.75rem; background: var(--page); }
pre * + * { display: inline-block; content-visibility: auto; contain-intrinsic-height: 30em; }
.primary:not(:disabled) { background: var(--accent); color: Canvas; }
[role=alert], :invalid:not(form) { border-color: currentcolor; color: var(--fault); }
dl { display: grid; gap: 0.25rem 1rem; grid-template-columns: fit-content(50%) 1fr; }
#figures { container-type: inline-size; }
#figures div { min-width: 3.5rem; }
#figures dd { font-size: min(1.5rem, 6.8cqi); }
#figures dd, #high, #low { min-height: 1.5em; }
#result { position: sticky; top: 1rem; flex: 1; max-height: 36rem; }
#observation { align-content: start; overflow: auto; height: 8rem; }
svg { flex: 1 0 5rem; min-height: 0; overflow: visible; border-bottom: 1px solid #8884; }
#line { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linecap: round; }
#line { vector-effect: non-scaling-stroke; }
#scroll, #log { flex: 1 1 20rem; overflow: auto; }
table { width: 100%; border-collapse: collapse; font-size: 0.875rem; }
#scroll, td:first-child { white-space: nowrap; }
th, td { padding: 0.25rem 0.75rem 0.25rem 0; text-align: left; vertical-align: top; }
#rows td:last-child { width: 99%; min-width: 20rem; }
tr, details, #reset { border-top: 1px solid #8884; }
details > * + * { margin-top: 0.5rem; }
details div div { padding: 0.5rem 0 0 1rem; }
#log code, #rows code { display: block; }
#log [open] code { display: none; }
#api td { overflow-wrap: normal; }
#play { display: grid; gap: 1rem; }
@media (min-width: 46rem) {
  #play { grid-template-columns: 1fr 1fr; }
  #wire { position: sticky; top: 1rem; grid-area: 1 / -2 / span 3; }
  #wire { height: calc(100vh - 9rem); min-height: 32rem; }
}
@media (min-width: 66rem) {
  #play { grid-template-columns: 1fr 1fr 1fr; }
  #wire { grid-row: 1 / span 2; }
  #episode { grid-column: 1 / 3; }
}
</style>
<body><p id="old">This page needs JavaScript of 2022 or later; the API does not.
<header>
<h1 id="name">OpenEnv</h1>
<p id="status" role="status"></p>
<nav><a href="#play">Play</a><a href="#api">API</a></nav>
<button id="connect">Connect</button>
<p id="about" dir="auto"></p>
<p id="full" role="alert" hidden>The server is full.
  <button id="evict">Close the session of Try it</button> or another tab, let its step end,
  or raise --max-concurrent-envs.
</header>
<main id="main" spellcheck="false" hidden>
<div id="play">
<section><h2>Action <small>Enter steps; Shift+Enter: new line</small></h2>
<form id="step"><div></div>
  <p><button class="primary">Step</button><span role="alert"></span>
</form>
<form id="reset"><div></div>
  <p><button>Reset</button><button type="button" id="ask">State</button>
    <span role="alert"></span>
</form></section>
<section><div id="result"><h2>Result <small id="clock"></small></h2>
<dl id="figures" aria-live="polite">
  <div><dt>Step<dd id="count"></div><div><dt>Reward<dd id="reward"></div>
  <div><dt>Total<dd id="total"></div><div><dt>Done<dd id="done"></div>
</dl>
<h3>Observation, or state</h3><dl id="observation" tabindex="0"></dl>
<h3>Reward of each step</h3><small id="high"></small>
<svg viewBox="0 0 100 40" preserveAspectRatio="none"><polyline id="line"/></svg>
<small id="low"></small>
</div></section>
<section id="wire"><h2>Messages</h2>
<form id="hand">
  <p id="presets"></p>
  <textarea id="message" aria-label="Message">{"type": "state"}</textarea>
  <p><button>Send</button><span role="alert"></span>
</form>
<div id="log" tabindex="0" role="region" aria-label="Messages"></div>
</section>
<section id="episode"><h2>Episode <small>the last 100</small></h2>
<div id="scroll" tabindex="0" role="region" aria-label="Steps"><table>
  <thead><tr><th>Step<th>Reward<th>Latency<th>Action, observation<tbody id="rows">
</table></div>
<p><button id="download">Download all</button>
</section>
</div>
<section id="api"><h2>API</h2>
<label><b>X-Session-Id</b><textarea id="session"></textarea>
  <small>a session of your own, 1 to 255 characters: for /reset, /step, /state, /close</small></label>
<div id="operations"></div>
<h3>WebSocket /ws: a connection is a session</h3>
<table>
<tr><th>Send<th>Its data<th>Answer
<tr><td>reset<td>seed, episode_id, or none<td>observation
<tr><td>step<td>the action<td>observation
<tr><td>state<td>none<td>state
<tr><td>mcp<td>a JSON-RPC 2.0 request<td>mcp
<tr><td>close<td>none<td>none; closes (1000)
</table><table>
<tr><th>Error code<th>When
<tr><td>INVALID_JSON<td>the text is not JSON
<tr><td>UNKNOWN_TYPE<td>the type is unknown or missing
<tr><td>VALIDATION_ERROR<td>the message breaks its schema
<tr><td>EXECUTION_ERROR<td>the environ&shy;ment raised
<tr><td>CAPACITY_REACHED<td>the server is full; closes (1013)
<tr><td>FACTORY_ERROR<td>making the environ&shy;ment failed; closes (1011)
<tr><td>SESSION_ERROR<td>anything else; closes (1011)
</table></section></main>
<script>
const $ = id => document.getElementById(id);
const say = (id, text) => { $(id).textContent = text; };
$('old').remove();

// `content`: a text, or a list of texts and elements. Text never becomes HTML.
function el(tag, content, properties) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...[content].flat());
  return element;
}

// In pieces, laid out when in sight: a long text of mixed scripts is slow.
const block = text => el('pre',
  (text.match(/.{1,4000}/gsu) ?? []).map(piece => el('span', piece)), {tabIndex: 0});
const clip = text => text.length > 400 ? `${text.slice(0, 400)}… see Messages` : text;

const duration = ms =>
  ms < 1000 ? `${+ms.toPrecision(2)} ms` : `${(ms / 1000).toFixed(1)} s`;

// A number that reads as it was written; an old browser keeps 17 digits.
class Numeral extends Number {
  constructor(text) { super(text); this.text = text; }
  toString() { return this.text; }
  toJSON() { return JSON.rawJSON?.(this.text) ?? +this; }
}
const revive = (key, value, context) =>
  typeof value === 'number' ? new Numeral(context?.source ?? `${value}`) : value;
const parse = text => { try { return JSON.parse(text, revive); } catch {} };
const write = (value, indent) => JSON.stringify(value, null, indent) ?? '';
const words = value => typeof value === 'string' ? value : write(value);
const indented = text => write(parse(text), 2) || text;

// ---- The session
const STATE = '{"type": "state"}';
let api, socket, waiting, last = Promise.resolve();

function connect() {
  socket = new WebSocket('ws');  // relative: there may be a path prefix
  show('Connecting');
  socket.onopen = () => { show('● Connected'); $('reset').requestSubmit(); };
  socket.onmessage = ({data: text}) => {
    const answer = parse(text), latency = waiting && performance.now() - waiting.start;
    log('← received', text, waiting && duration(latency));
    waiting = waiting?.resolve({...answer, latency});
  };
  socket.onclose = ({code, reason}) => {
    show(`✕ Disconnected ${reason} (code ${code}). This ends an episode.`, code);
    waiting = waiting?.resolve({type: 'error', data: {code: 'CLOSED', message: 'no answer'}});
  };
}

function show(text, code) {
  say('status', text);
  say('connect', socket.readyState > 1 ? 'Connect' : 'Disconnect');
  $('full').hidden = code !== 1013;
  for (const button of document.querySelectorAll('form button'))
    button.disabled = socket.readyState !== 1;
  log('·', text);
}

// Says in `place` for how long we wait for a promise.
function timed(place, promise) {
  const start = performance.now();
  const tick = text => { place.textContent = `${text} ${duration(performance.now() - start)}`; };
  const timer = setInterval(tick, 100, 'Running for');
  return promise.finally(() => { clearInterval(timer); tick('Took'); });
}

async function ask(text) {
  if (socket?.readyState !== 1) throw Error('Not connected');
  socket.send(text);
  log('→ sent', text);
  return timed($('clock'), new Promise(resolve => {
    waiting = {resolve, start: performance.now()};
  }));
}

function play(form, text = form.text()) {
  last = last.then(() => take(text, form)).catch(({message}) => complain(form, message));
}

function complain(form, text, errors = []) {
  form.querySelector('[role=alert]').textContent = text;
  for (const {loc: [, name], msg} of errors)
    form.elements.namedItem(`data.${name}`)?.setCustomValidity(msg);
  form.reportValidity();  // the first one gets the focus
}

const played = [];  // each reset and step since the page was opened
let rewards = [], stepped;  // in this episode

async function take(text, form) {
  const sent = parse(text);
  stepped ||= sent?.type === 'step';  // also while it runs
  const {type, data: answer, latency} = await ask(text);
  const failed = type === 'error';
  complain(form, failed ? `${answer.code}: ${answer.message}` : '', answer.errors);
  if (type === 'state') observe(answer);
  const refused = answer.errors || /CAPACITY|FACTORY/.test(answer.code);
  if (refused || !/^(reset|step)$/.test(sent?.type)) return;
  // Only the environment knows whether a step that failed counts.
  const step = answer.metadata?.step
    ?? (await ask(STATE).catch(() => ({}))).data?.step_count ?? '?';
  const {reward, done, observation = {error: answer.message}} = answer;
  played.push({...sent, step, failed, answer, latency_ms: latency});
  if (sent.type === 'reset' && !failed) [rewards, stepped] = [[], false];
  if (sent.type === 'step' && reward instanceof Number) rewards.push(+reward);
  const result = failed ? 'failed' : reward ?? 'none';
  const total = +rewards.reduce((sum, more) => sum + more, 0).toPrecision(15);  // without ...0004
  const figures = {count: step, reward: result, total, done: done ? 'yes' : 'no'};
  for (const id in figures) say(id, figures[id]);
  say('clock', `Took ${duration(latency)}`);  // not the state
  $('done').className = done ? 'primary' : '';
  if (done) complain($('reset'), 'Done: Reset begins a new episode.');
  observe(observation);
  drawRewards();
  const texts = [`${sent.type} ${write(sent.data)}`, write(observation)].map(clip);
  const cells = [step, result, duration(latency), el('code', texts.join('\n'))];
  prepend($('rows'), el('tr', cells.map(cell => el('td', cell))));
}

function drawRewards() {
  const low = Math.min(0, ...rewards), high = Math.max(0, ...rewards);
  say('low', low); say('high', high);
  const points = rewards.map((reward, index) =>
    [100 * index / (rewards.length - 1 || 1), 40 * (high - reward) / (high - low || 1)]);
  $('line').setAttribute('points', [...points, points.at(-1)].join(' '));  // a dot
}

function observe(object) {
  $('observation').replaceChildren(...Object.entries(object).flatMap(([name, value]) =>
    [el('dt', name), el('dd', clip(words(value)))]));
}

function prepend(list, item) {
  list.prepend(item);
  if (list.childElementCount > 100) list.lastElementChild.remove();
}

function log(kind, text, took = '') {
  const time = `${new Date().toLocaleTimeString()} ${took}`;
  const entry = el('details',
    el('summary', [el('b', kind), el('small', time), el('code', text.slice(0, 160))]));
  entry.addEventListener('toggle', () => entry.append(block(indented(text))), {once: true});
  prepend($('log'), entry);
}

// ---- The form
// Follows a $ref, and reads "X or null" as X with `nullable`.
function plain(schema) {
  const path = schema.$ref?.slice(2).split('/');
  const {anyOf = [], ...rest} = path?.reduce((node, key) => node[key], api) ?? schema;
  const [some, ...more] = anyOf.filter(({type}) => type !== 'null');
  if (!some) return rest;
  return more.length ? {anyOf, ...rest} : {...plain(some), nullable: true, ...rest};
}

// The properties of an object, each with a control if there is `make`.
function outline(schema, make) {
  const {properties = {}, required = []} = plain(schema);
  return Object.entries(properties).map(([name, property]) => {
    const {type = 'any', nullable, description = '', title, examples, additionalProperties,
      properties, required: names, ...rest} = plain(property);
    const isRequired = required.includes(name);
    let hint = `${type}${nullable ? ' or null' : ''}${isRequired ? ', required' : ''}`;
    for (const key in rest) if (rest[key] !== null) hint += `, ${key} ${words(rest[key])}`;
    const label = el('b', name), note = el('small', `${hint}. ${description}`);
    return make ? el('label', [label, make(name, property, isRequired), note])
      : el('div', [label, note, ...outline(property)]);
  });
}

function drawForm(form, schema, sample) {
  const members = [];  // each returns a member of the action, or nothing
  form.firstElementChild.append(...outline(schema, (name, property, isRequired) => {
    const {type, default: preset, enum: some} = plain(property);
    const choices = some ?? (type === 'boolean' && [false, true]);
    const isText = type === 'string' && !choices;
    const options = choices ? [undefined, ...choices] : [];
    const control = el(choices ? 'select' : 'textarea',
      options.map(value => el('option', words(value), {value: write(value)})),
      {name: `data.${name}`, dir: isText ? 'auto' : 'ltr'});  // no name that a form has itself
    control.value = isText ? preset ?? ''
      : write(preset ?? (isRequired ? sample[name] : undefined));
    control.oninput = () => control.setCustomValidity(isText || !control.value
      || parse(control.value) !== undefined ? '' : 'Write JSON, as 1.5');
    members.push(() => {
      const {value} = control;  // JSON goes out as it was written
      if (!value && !isRequired && !(isText && preset)) return [];
      return `${write(name)}: ${isText ? write(value) : value || 'null'}`;
    });
    return control;
  }));
  form.text = () =>
    `{"type": "${form.id}", "data": {${members.flatMap(member => member()).join(', ')}}}`;
}

// ---- The API
// What an operation takes or answers: its schema, and an example.
function bodyOf(part) {
  const {schema, examples} = part?.content?.['application/json'] ?? {};
  return {schema, example: examples?.example.value};
}

function curl(path, method, headers, body) {
  const quote = word => `'${word.replaceAll("'", "'\\''")}'`;
  return [`curl -i -X ${method} ${quote(new URL(`.${path}`, location).href)}`,
    ...headers.map(pair => `-H ${quote(pair.join(': '))}`),
    ...body ? [`--data-raw ${quote(body)}`] : []].join(' \\\n  ');
}

function operation(path, method, {parameters, requestBody, responses, ...details}) {
  const {schema, example} = bodyOf(requestBody);
  const box = schema && el('textarea', write(example, 2));
  const result = el('div', '', {role: 'status'});
  const onclick = async () => {
    const body = box?.value, id = parameters && $('session').value, headers = [];
    if (body) headers.push(['Content-Type', 'application/json']);
    if (id) headers.push(['X-Session-Id', id]);
    const response = await timed(result, fetch(`.${path}`, {method, headers, body}))
      .catch(error => error);
    const {status = '', statusText = response.message} = response;
    const answer = status && indented(await response.text());
    const command = curl(path, method, headers, body);
    result.replaceChildren(block(`${status} ${statusText}\n${answer}`),
      el('label', ['The same with curl', el('textarea', command, {readOnly: true})]));
  };
  const answers = Object.entries(responses).map(([status, response]) => {
    const {example} = bodyOf(plain(response));
    return `${status} ${plain(response).description}\n${write(example, status < 400 ? 2 : 0)}`;
  });
  return el('details', [
    el('summary', [el('b', method), ` ${path} `, el('small', details.summary)]),
    el('p', details.description),
    ...box ? [el('label', ['Body', box]), ...outline(schema)] : [],
    ...bodyOf(responses[200]).schema ? [el('button', 'Try it', {onclick}), result] : [],
    'Answers', block(answers.join('\n')),
  ], {id: details.operationId});
}

// ---- The page
function openNamed() {
  const target = $(location.hash.slice(1));
  if (target) { target.open = true; target.scrollIntoView(); }
}

async function main() {
  api = parse(await (await fetch('openapi.json')).text());
  say('name', document.title = api.info.title);
  say('about', api.info.description);
  for (const [path, methods] of Object.entries(api.paths))
    for (const method in methods)
      $('operations').append(operation(path, method.toUpperCase(), methods[method]));
  const [reset, step, mcp] = ['/reset', '/step', '/mcp'].map(path =>
    bodyOf(api.paths[path].post.requestBody));
  const {action} = step.example;
  drawForm($('step'), plain(step.schema).properties.action, action);
  drawForm($('reset'), reset.schema, {});
  $('hand').text = () => $('message').value;
  const presets = [
    ['reset', reset.example], ['step', action], ['state'], ['mcp', mcp.example], ['close']];
  $('presets').append(...presets.map(([type, data]) => el('button', type, {
    type: 'button', onclick() { $('message').value = write({type, data}); }})));
  $('ask').onclick = () => play($('reset'), STATE);
  $('evict').onclick = () => $('post_close').querySelector('button').onclick().then(connect);
  $('connect').onclick = () => socket?.readyState < 3 ? socket.close(1000) : connect();
  $('download').onclick = () => {
    const href = URL.createObjectURL(new Blob([write(played, 2)]));
    el('a', '', {download: 'episodes.json', href}).click();
  };
  onsubmit = ({target}) => { play(target); return false; };
  onkeydown = event => {
    const {key, shiftKey, isComposing, target} = event;
    if (key !== 'Enter' || shiftKey || isComposing || !target.matches('form textarea')) return;
    event.preventDefault();
    if (!waiting) target.form.requestSubmit();  // held, it steps as fast as the environment answers
  };
  onbeforeunload = event => { if (stepped) event.preventDefault(); };
  oninput = ({target: {style, value}}) => {  // Firefox takes minutes to order a long text
    style.unicodeBidi = value.length > 1e4 ? 'bidi-override' : '';
  };
  onhashchange = openNamed;
  $('main').hidden = false;
  if (location.pathname.endsWith('/docs')) $('main').prepend($('api'));
  else connect();
  openNamed();
}
main().catch(({message}) => say('status', message));
</script>
"""


if __name__ == "__main__":
    sys.exit(main())
