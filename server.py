"""Serves an OpenEnv environment over HTTP and WebSocket.

Part of the minimal OpenEnv Benchmark environment, version 1.0.0: benchmark.py (the
environment), client.py (its clients), server.py (this file: its server).

    python3 server.py                           # the Benchmark environment on port 8000
    python3 server.py --env my_env:MyEnvironment          # an environment of your own
    with create_app(MyEnvironment, MyAction, MyObservation).start() as server:
        print(server.url)                                 # in a test or a notebook

How one ``step`` travels: `Handler` reads the request, or for ``/ws`` does the opening
handshake and reads messages from a `client.WebSocket`; the JSON is checked against the
schema of the action (`validate`) and becomes a dataclass (`client.from_json`); the
`Session`, which owns one environment, calls its ``step`` and makes JSON of what it returns.

The file goes from types to bytes: JSON Schema; sessions and the app that holds them; HTTP
and the opening handshake of RFC 6455; the server and its threads; OpenAPI; the command
line; the two web pages. A thread serves each connection, so an environment may block.
Not here: TLS and many machines (put a proxy in front) and environments with MCP tools.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import inspect
import ipaddress
import itertools
import json
import logging
import operator
import os
import re
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    Optional,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING or not __package__:
    import benchmark
    import client
else:  # the files were copied into a package
    from . import benchmark, client

if TYPE_CHECKING:
    from typing import Self

log = logging.getLogger("openenv")

HEADER_SECONDS = (
    10.0  # for a request line and its headers, and for any stall within a body
)
IDLE_SECONDS = 60.0  # for a kept-alive connection to send its next request
LINGER_SECONDS = 2.0  # for a peer to close its end after the server has closed its own
GRACE_SECONDS = 4.0  # for steps in progress when the server is told to stop
TICK_SECONDS = 0.2  # between two looks at all connections
SLOWEST_RATE = 50_000  # bytes per second below which a peer is taken to be stalling
MAX_LINE, MAX_HEADERS = 65536, 100  # bytes of a request's head, and lines in it
MAX_DEPTH = 100  # of nested JSON

# ---------------------------------------------------------------------------
# JSON Schema: from a dataclass, and against what arrives
# ---------------------------------------------------------------------------

_PLAIN = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
}


def json_schema(cls: type, extra: bool = False) -> dict[str, Any]:
    """Return the JSON Schema of a dataclass.

    ``field(metadata={...})`` adds any JSON Schema keyword to a field: ``description``,
    ``examples``, ``minimum``, ``maxLength`` and so on. ``extra``: allow other keys too.

    Raises:
        TypeError: ``cls`` is no dataclass, or a field has a type without a schema.
    """
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise TypeError(
            f"{cls!r} is no dataclass: actions, observations and states must be"
        )
    types = client.field_types(cls)
    fields = [f for f in dataclasses.fields(cls) if f.init]
    schema: dict[str, Any] = {"title": cls.__name__, "type": "object"}
    if cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}("):  # not made up
        schema["description"] = inspect.cleandoc(cls.__doc__)
    schema["properties"] = {f.name: _field_schema(f, types[f.name]) for f in fields}
    schema["required"] = [f.name for f in fields if _default(f) is dataclasses.MISSING]
    schema["additionalProperties"] = extra
    return schema


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _field_schema(field: dataclasses.Field[Any], kind: Any) -> dict[str, Any]:
    schema = {**_type_schema(kind), **field.metadata}
    default = _default(field)
    if default is not dataclasses.MISSING:
        schema["default"] = json.loads(client.encode_json(default))
    return schema


def _type_schema(kind: Any) -> dict[str, Any]:
    if kind is Any:
        return {}
    if kind in _PLAIN:
        return {"type": _PLAIN[kind]}
    if dataclasses.is_dataclass(kind):
        return json_schema(kind)  # type: ignore[arg-type]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {"title": kind.__name__, "enum": [member.value for member in kind]}
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is Union or type(kind).__name__ == "UnionType":
        return {"anyOf": [_type_schema(member) for member in arguments]}
    if origin is dict:
        values = _type_schema(arguments[1]) if arguments else {}
        return {"type": "object", "additionalProperties": values or True}
    if origin is tuple and arguments and arguments[-1] is not ...:
        first, size = [_type_schema(a) for a in arguments], len(arguments)
        return {
            "type": "array",
            "prefixItems": first,
            "minItems": size,
            "maxItems": size,
        }
    if origin in (list, tuple, set, frozenset):
        items = _type_schema(arguments[0]) if arguments else {}
        return {"type": "array", "items": items}
    raise TypeError(
        f"{kind!r} has no JSON Schema here: use plain types, enums, dataclasses"
    )


def _rows(table: str) -> Iterator[list[str]]:
    for line in table.strip().splitlines():
        yield [cell.strip() for cell in line.split("|")]


def _is_integer(value: Any) -> bool:  # to JSON, 1.0 is the number 1
    return type(value) is int or (type(value) is float and value.is_integer())


def _is_number(value: Any) -> bool:
    return type(value) is float or (
        type(value) is int and abs(value) <= sys.float_info.max
    )


# What must hold for each type, and the fault if it does not.
_TYPES: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "string": (lambda v: isinstance(v, str), "string_type", "a valid string"),
    "integer": (_is_integer, "int_type", "a valid integer"),
    "number": (_is_number, "float_type", "a valid number"),
    "boolean": (lambda v: isinstance(v, bool), "bool_type", "a valid boolean"),
    "null": (lambda v: v is None, "none_required", "null"),
    "object": (lambda v: isinstance(v, dict), "dict_type", "a valid dictionary"),
    "array": (lambda v: isinstance(v, list), "list_type", "a valid list"),
}
# Keyword | what is compared with its value | how | the fault | its message
_BOUNDS = {
    keyword: row
    for keyword, *row in _rows("""
minimum          | number | ge | greater_than_equal | Input should be greater than or equal to {}
exclusiveMinimum | number | gt | greater_than       | Input should be greater than {}
maximum          | number | le | less_than_equal    | Input should be less than or equal to {}
exclusiveMaximum | number | lt | less_than          | Input should be less than {}
minLength        | str    | ge | string_too_short   | String should have at least {} characters
maxLength        | str    | le | string_too_long    | String should have at most {} characters
minItems         | list   | ge | too_short          | List should have at least {} items
maxItems         | list   | le | too_long           | List should have at most {} items
""")
}

Loc = tuple[Any, ...]  # of str and int: the path to a value


def _fault(kind: str, msg: str, loc: Loc, value: Any) -> dict[str, Any]:
    return {"type": kind, "loc": list(loc), "msg": msg, "input": value}


def validate(schema: Mapping[str, Any], value: Any, loc: Loc) -> list[dict[str, Any]]:
    """Return every fault of ``value`` under ``schema``, in OpenEnv's (pydantic's) words.

    A fault is ``{"type", "loc", "msg", "input"}``; ``loc`` is the path to it. What
    `json_schema` emits is understood, no more of JSON Schema.
    """
    kind = schema.get("type")
    if kind is not None:
        holds, name, words = _TYPES[kind]
        if not holds(value):
            return [_fault(name, f"Input should be {words}", loc, value)]
    found = []
    for keyword in schema:
        if keyword in _BOUNDS:
            found += _out_of_bounds(keyword, schema[keyword], value, loc)
    if "anyOf" in schema:
        tries = [validate(member, value, loc) for member in schema["anyOf"]]
        if all(tries):
            members = zip(schema["anyOf"], tries)
            return [f for m, faults in members if m != {"type": "null"} for f in faults]
    if "enum" in schema and not any(
        value == member and isinstance(value, bool) is isinstance(member, bool)
        for member in schema["enum"]
    ):
        words = f"Input should be one of {client.encode_json(schema['enum'])}"
        return [_fault("enum", words, loc, value)]
    if kind == "object":
        found += _validate_object(schema, value, loc)
    if kind == "array":
        first, others = schema.get("prefixItems", []), schema.get("items", {})
        for i, item in enumerate(value):
            found += validate(first[i] if i < len(first) else others, item, (*loc, i))
    return found


def _out_of_bounds(
    keyword: str, bound: Any, value: Any, loc: Loc
) -> list[dict[str, Any]]:
    kind, comparison, name, words = _BOUNDS[keyword]
    if kind == "number" and type(value) in (int, float):
        measure = value
    elif kind == type(value).__name__:
        measure = len(value)
    else:
        return []
    if getattr(operator, comparison)(measure, bound):
        return []
    return [_fault(name, words.format(bound), loc, value)]


def _validate_object(
    schema: Mapping[str, Any], value: dict[str, Any], loc: Loc
) -> list[dict[str, Any]]:
    properties = schema.get("properties", {})
    others = schema.get("additionalProperties", True)
    found = []
    for name in schema.get("required", ()):
        if name not in value:
            found.append(_fault("missing", "Field required", (*loc, name), value))
    for name, item in value.items():
        if name in properties:
            found += validate(properties[name], item, (*loc, name))
        elif others is False:
            words = "Extra inputs are not permitted"
            found.append(_fault("extra_forbidden", words, (*loc, name), item))
        elif others is not True:
            found += validate(others, item, (*loc, name))
    return found


class Failure(Exception):
    """What a caller is told went wrong: an error message, or an HTTP status with a body.

    ``code`` is OpenEnv's error code, if it has one for this; ``extra`` goes beside it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str = "",
        headers: Mapping[str, str] | None = None,
        **extra: Any,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers, self.extra = headers or {}, extra

    def as_http(self) -> str:
        if "errors" in self.extra:
            return client.encode_json({"detail": self.extra["errors"]})
        code = {"code": self.code} if self.code else {}
        return client.encode_json({"detail": self.message, **code, **self.extra})

    def as_message(self) -> str:
        data = {
            "message": self.message,
            "code": self.code or "SESSION_ERROR",
            **self.extra,
        }
        return client.encode_json({"type": "error", "data": data})


def _invalid(errors: list[dict[str, Any]]) -> Failure:
    words = "; ".join(
        f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in errors[:10]
    )
    return Failure(422, f"Invalid message: {words}", "VALIDATION_ERROR", errors=errors)


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:20]} is too large for a float")
    return number


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


_decode_json = json.JSONDecoder(parse_float=_finite, parse_constant=_constant).decode


def parse_json(text: str | bytes, loc: Loc) -> Any:
    """Parse JSON strictly: what is accepted can be sent back.

    Raises:
        Failure: INVALID_JSON, if it is none, holds NaN or a number beyond float, or nests
            deeper than `MAX_DEPTH`.
    """
    try:
        value = _decode_json(text if isinstance(text, str) else text.decode())
        if len(text) > 2 * MAX_DEPTH and _deeper_than(MAX_DEPTH, value):
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        return value
    except RecursionError:
        reason = f"it is nested deeper than {MAX_DEPTH} levels"
    except UnicodeDecodeError:
        reason = "it is not valid UTF-8"
    except ValueError as error:
        reason = str(error)
    message = f"Invalid JSON: {reason}"
    fault = {"type": "json_invalid", "loc": list(loc), "msg": message, "input": {}}
    raise Failure(422, message, "INVALID_JSON", errors=[fault])


def _deeper_than(limit: int, value: Any) -> bool:
    level = [value]
    for _ in range(limit):
        containers = [v for v in level if isinstance(v, (dict, list))]
        level = [
            v for c in containers for v in (c.values() if isinstance(c, dict) else c)
        ]
        if not level:
            return False
    return any(isinstance(v, (dict, list)) for v in level)


# ---------------------------------------------------------------------------
# Sessions, and the app that holds them
# ---------------------------------------------------------------------------


@dataclasses.dataclass
class ResetRequest:
    """How to begin an episode. Other keys are passed on, if the environment takes them."""

    seed: Optional[int] = dataclasses.field(  # noqa: UP045
        default=None,
        metadata={"description": "Seed for a reproducible episode", "minimum": 0},
    )
    episode_id: Optional[str] = dataclasses.field(  # noqa: UP045
        default=None,
        metadata={"description": "Name for the episode", "maxLength": 255},
    )


@dataclasses.dataclass
class StepOptions:
    """What may stand beside the action. Other keys are passed on, like those of a reset."""

    timeout_s: Optional[float] = dataclasses.field(  # noqa: UP045
        default=None,
        metadata={"description": "Seconds the step may take", "exclusiveMinimum": 0},
    )
    request_id: Optional[str] = dataclasses.field(  # noqa: UP045
        default=None,
        metadata={"description": "Name for the request", "maxLength": 255},
    )


RESET_SCHEMA = json_schema(ResetRequest, extra=True)
STEP_OPTIONS_SCHEMA = json_schema(StepOptions, extra=True)
_numbers = itertools.count(1)  # of WebSocket sessions, for the log
SHARED = ""  # the name of the session of all HTTP requests that name none


class Session:
    """One environment, for one caller at a time: who uses it holds ``lock``."""

    def __init__(self, app: App, key: object) -> None:
        self.app = app
        self.key = key
        self.lock = threading.Lock()
        self.opened = self.used = time.monotonic()
        self.steps = 0
        self.ended = False
        self._env: Any = None
        self._loop: Any = None  # an event loop, if the environment is asynchronous

    def open(self) -> None:
        """Create the environment, unless that was done.

        Raises:
            Failure: FACTORY_ERROR; the session is over.
        """
        if self._env is not None:
            return
        try:
            self._env = self.app.env()
        except (Exception, SystemExit) as error:
            log.exception("the environment could not be created")
            name = getattr(self.app.env, "__name__", type(self.app.env).__name__)
            self.end()
            raise Failure(
                500,
                f"{name}: {error or type(error).__name__}",
                "FACTORY_ERROR",
                factory_name=name,
            ) from error
        log.info("session %s opened", self)

    def end(self) -> None:
        """Close the environment and free its place. Only the first call does anything."""
        with self.app.lock:
            if self.ended:
                return
            self.ended = True
        try:
            if self._env is not None and hasattr(self._env, "close"):
                self._run(self._env.close)
            if self._loop is not None:
                self._loop.close()
        except (Exception, SystemExit):
            log.exception("closing the environment of session %s failed", self)
        finally:
            self.app.remove(self)
        if self._env is not None:
            seconds = time.monotonic() - self.opened
            log.info(
                "session %s closed after %d steps in %.1f s", self, self.steps, seconds
            )

    def reset(self, data: dict[str, Any], loc: Loc) -> str:
        """Begin an episode; return the JSON of OpenEnv's observation answer."""
        self._check(RESET_SCHEMA, data, loc)
        method = getattr(self._env, "reset_async", None) or self._env.reset
        return self._observe(
            method, _accepted(method, client.from_json(ResetRequest, data), data)
        )

    def step(
        self, action: Any, loc: Loc, options: dict[str, Any], options_loc: Loc
    ) -> str:
        """Act once; return the JSON of OpenEnv's observation answer."""
        errors = validate(self.app.action_schema, action, loc)
        if options:
            errors += validate(STEP_OPTIONS_SCHEMA, options, options_loc)
        if errors:
            raise _invalid(errors)
        method = getattr(self._env, "step_async", None) or self._env.step
        given = (
            _accepted(method, client.from_json(StepOptions, options), options)
            if options
            else {}
        )
        try:
            taken = client.from_json(self.app.action_cls, action)
        except (TypeError, ValueError) as error:  # the class has checks of its own
            fault = {
                "type": "value_error",
                "loc": list(loc),
                "msg": str(error),
                "input": action,
            }
            raise _invalid([fault]) from error
        answer = self._observe(method, given, taken)
        self.steps += 1
        return answer

    def state(self) -> str:
        """Return the JSON of the environment's state."""
        try:
            return client.encode_json(self._env.state)
        except (Exception, SystemExit) as error:
            raise _execution(error) from error

    def answer(self, text: str | bytes) -> str | None:
        """Answer one WebSocket message of OpenEnv; None means that the caller says goodbye."""
        try:
            return self._answer(text)
        except Failure as failure:
            return failure.as_message()

    def _answer(self, text: str | bytes) -> str | None:
        if isinstance(text, bytes):
            raise Failure(
                422, "Invalid JSON: send text messages, not binary", "INVALID_JSON"
            )
        message = parse_json(text, ())
        self._check({"type": "object"}, message, ())
        kind = message.get("type")
        schema = MESSAGES.get(kind) if isinstance(kind, str) else None
        if schema is None:
            raise Failure(
                422,
                f"Unknown message type: {kind!r}; known are {', '.join(MESSAGES)}",
                "UNKNOWN_TYPE",
            )
        self._check(schema, message, ())
        if kind == "step":
            return f'{{"type":"observation","data":{self.step(message["data"], ("data",), {}, ())}}}'
        if kind == "reset":
            return f'{{"type":"observation","data":{self.reset(message.get("data", {}), ("data",))}}}'
        if kind == "state":
            return f'{{"type":"state","data":{self.state()}}}'
        if kind == "mcp":
            return client.encode_json(
                {"type": "mcp", "data": mcp_answer(message["data"])}
            )
        return None

    def _check(self, schema: Mapping[str, Any], value: Any, loc: Loc) -> None:
        errors = validate(schema, value, loc)
        if errors:
            raise _invalid(errors)

    def _observe(
        self, method: Callable[..., Any], given: dict[str, Any], *action: Any
    ) -> str:
        """Call ``reset`` or ``step``, and make JSON of the observation it returns."""
        try:
            observation = self._run(method, *action, **given)
            fields = dict(
                observation
                if isinstance(observation, dict)
                else client.to_json(observation)
            )
            reward, done = fields.pop("reward", None), fields.pop("done", False)
            return client.encode_json(
                {"observation": fields, "reward": reward, "done": done}
            )
        except (Exception, SystemExit) as error:
            raise _execution(error) from error

    def _run(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        if not inspect.iscoroutine(result):
            return result
        if self._loop is None:
            import asyncio  # here, since few environments need it

            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(result)

    def __str__(self) -> str:
        if isinstance(self.key, tuple):
            return "-".join(map(str, self.key))
        return ascii(self.key) if self.key != SHARED else "(shared)"


def _execution(error: BaseException) -> Failure:
    log.error("the environment failed", exc_info=error)
    return Failure(500, str(error) or type(error).__name__, "EXECUTION_ERROR")


@functools.lru_cache(maxsize=64)
def _parameters(function: Callable[..., Any]) -> tuple[frozenset[str], bool]:
    """Return the names a function takes, and whether it takes any other."""
    parameters = inspect.signature(function).parameters.values()
    names = frozenset(
        p.name
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    )
    return names, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _accepted(
    method: Callable[..., Any], request: Any, data: dict[str, Any]
) -> dict[str, Any]:
    """Of what the caller sent, return what the environment's method takes."""
    names, any_name = _parameters(getattr(method, "__func__", method))
    given = {**data, **{k: v for k, v in vars(request).items() if k in data}}
    return {
        k: v
        for k, v in given.items()
        if (k in names or any_name) and k not in ("self", "action")
    }


_OBJECT = {"type": "object"}
MESSAGES = {
    kind: {
        "type": "object",
        "properties": {
            "type": {"type": "string"},
            **({"data": _OBJECT} if data else {}),
        },
        "required": ["type", "data"] if data == "required" else ["type"],
        "additionalProperties": False,
    }
    for kind, data in {
        "reset": "optional",
        "step": "required",
        "state": "",
        "mcp": "required",
        "close": "",
    }.items()
}


def mcp_answer(request: Any) -> dict[str, Any]:
    """Answer a JSON-RPC 2.0 request of MCP, for an environment that has no tools."""
    fields = request if isinstance(request, dict) else {}
    method, id_ = fields.get("method"), fields.get("id")
    if isinstance(id_, bool) or not isinstance(id_, (str, int, float, type(None))):
        id_, method = None, None
    params = fields.get("params", {})
    if (
        fields.get("jsonrpc") != "2.0"
        or not isinstance(method, str)
        or not isinstance(params, (dict, list))
    ):
        code, message = -32600, "Invalid Request"
    elif method in ("tools/list", "tools/call"):
        code, message = -32603, "Environment does not support MCP"
    else:
        code, message = -32601, f"Method not found: {method}"
    return {"jsonrpc": "2.0", "id": id_, "error": {"code": code, "message": message}}


class App:
    """An environment class, made servable: its schemas, and the sessions that are open.

    See `create_app` for the arguments. `serve` or `start` puts it on a port.
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
        if not callable(env) or (hasattr(env, "step") and not isinstance(env, type)):
            name = type(env).__name__
            raise TypeError(
                f"pass the class {name} itself, not an instance: each session makes its own"
            )
        concurrent = getattr(env, "SUPPORTS_CONCURRENT_SESSIONS", False)
        if max_concurrent_envs is None:
            max_concurrent_envs = 1000 if concurrent else 1
        if max_concurrent_envs < 1:
            raise ValueError("max_concurrent_envs must be at least 1")
        if max_concurrent_envs > 1 and not concurrent:
            raise ValueError(
                "max_concurrent_envs > 1 needs an environment whose instances share nothing: "
                "set SUPPORTS_CONCURRENT_SESSIONS = True on the class if that holds"
            )
        self.env = env
        self.action_cls = action_cls
        self.max_concurrent_envs = max_concurrent_envs
        self.session_timeout = session_timeout or float("inf")
        self.max_message_size = int(max_message_mb * (1 << 20))
        self.allow_origins = allow_origins
        self.action_schema = json_schema(action_cls)
        self.schemas = {
            "action": self.action_schema,
            "observation": json_schema(observation_cls),
            "state": _state_schema(env),
        }
        self.metadata = _metadata(env, env_name)
        self.lock = threading.Lock()  # guards the sessions' comings and goings
        self._sessions: dict[object, Session] = {}

    def serve(self, host: str = "127.0.0.1", port: int = 8000) -> None:
        """Serve until interrupted. Raises OSError if the port is taken."""
        server = Server(self, host, port)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            server.stop()

    def start(self, host: str = "127.0.0.1", port: int = 0) -> Server:
        """Serve in the background, by default on a free port: ``with app.start() as server``."""
        server = Server(self, host, port)
        threading.Thread(
            target=server.serve_forever, daemon=True, name="server"
        ).start()
        return server

    def open(self, key: object) -> Session:
        """Make a new session; its environment is not made yet.

        Raises:
            Failure: CAPACITY_REACHED.
        """
        with self.lock:
            return self._open(key)

    def _open(self, key: object) -> Session:
        active = len(self._sessions)
        if active >= self.max_concurrent_envs:
            raise Failure(
                503,
                f"Server at capacity: {active} of {self.max_concurrent_envs} sessions are open",
                "CAPACITY_REACHED",
                active_sessions=active,
                max_sessions=self.max_concurrent_envs,
            )
        session = self._sessions[key] = Session(self, key)
        return session

    def remove(self, session: Session) -> None:
        with self.lock:
            self._sessions.pop(session.key, None)

    @contextmanager
    def use(self, name: str, create: bool) -> Iterator[Session]:
        """Lend the HTTP session of that name, to nobody else meanwhile.

        Raises:
            Failure: there is none, and ``create`` is false; or CAPACITY_REACHED.
        """
        while True:
            with self.lock:
                session = self._sessions.get(name)
                if session is None and not create:
                    raise Failure(
                        404,
                        "Unknown X-Session-Id: POST /reset opens the session",
                        "SESSION_ERROR",
                    )
                session = session or self._open(name)
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
        with self.lock:
            idle = [
                session
                for session in self._sessions.values()
                if now - session.used > self.session_timeout
                and isinstance(session.key, str)
                and not session.lock.locked()
            ]
        for session in idle:
            session.used = now  # so that this happens once
            threading.Thread(target=self._expire, args=(session,), daemon=True).start()

    def _expire(self, session: Session) -> None:
        with (
            session.lock
        ):  # an environment may be slow to close, and this is its own thread
            session.end()

    def end_all(self) -> None:
        """Close every environment, also one that is stuck in a step, in bounded time."""
        with self.lock:
            sessions = list(self._sessions.values())
        threads = [threading.Thread(target=s.end, daemon=True) for s in sessions]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 0.5
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))


def create_app(
    env: Callable[[], Any],
    action_cls: type,
    observation_cls: type,
    env_name: str | None = None,
    max_concurrent_envs: int | None = None,
    **options: Any,
) -> App:
    """Make an environment servable; OpenEnv's name and signature.

    Args:
        env: the environment class, or anything that makes an environment when called.
        action_cls, observation_cls: its dataclasses.
        env_name: what ``/metadata`` calls it; default: the name of the class.
        max_concurrent_envs: environments at a time; default: 1000 if the class says
            ``SUPPORTS_CONCURRENT_SESSIONS = True``, else 1.
        options: ``session_timeout`` (seconds, 3600; 0: never), ``max_message_mb`` (MiB, 100),
            ``allow_origins`` (hosts whose pages may call).

    Raises:
        TypeError: an instance instead of a class, or a type that has no JSON Schema.
        ValueError: more than one environment at a time of a class that does not allow it.
    """
    return App(
        env, action_cls, observation_cls, env_name, max_concurrent_envs, **options
    )


def _annotation(function: Any, name: str) -> Any:
    """Return the type that a function's annotation names; None if there is none."""
    hint = getattr(function, "__annotations__", {}).get(name)
    only = SimpleNamespace(__annotations__={name: hint})  # leave the others unevaluated
    return get_type_hints(only, function.__globals__)[name] if hint else None


def _state_schema(env: Any) -> dict[str, Any]:
    getter = getattr(getattr(env, "state", None), "fget", None)
    cls = _annotation(getter, "return") if getter else None
    if dataclasses.is_dataclass(cls):
        return json_schema(cls)  # type: ignore[arg-type]
    return {**json_schema(benchmark.BenchmarkState, extra=True), "title": "State"}


def _metadata(env: Any, name: str | None) -> dict[str, Any]:
    module = sys.modules.get(getattr(env, "__module__", ""))
    readme = Path(getattr(module, "__file__", None) or ".").with_name("README.md")
    return {
        "name": name or getattr(env, "__name__", "environment"),
        "description": inspect.getdoc(env) or "",
        "version": getattr(module, "__version__", benchmark.__version__),
        "readme_content": readme.read_text("utf-8") if readme.is_file() else None,
        "author": None,
        "documentation_url": None,
    }


# ---------------------------------------------------------------------------
# HTTP
# ---------------------------------------------------------------------------

# RFC 9112 sections 3 and 5: the request line, and a field line without folding.
_REQUEST_LINE = re.compile(
    r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~\x80-\xff]+) HTTP/([0-9])\.([0-9])"
)
_FIELD_LINE = re.compile(
    r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*?)[ \t]*"
)


class Handler(BaseHTTPRequestHandler):
    """One connection: its requests, or after the opening handshake its WebSocket."""

    server: Server
    raw_requestline: bytes
    protocol_version = "HTTP/1.1"
    server_version = f"openenv-benchmark/{benchmark.__version__}"
    disable_nagle_algorithm = True
    wbufsize = -1  # buffered: head and body leave in one packet

    def setup(self) -> None:
        super().setup()
        self.app = self.server.app
        self.deadline = (
            time.monotonic() + HEADER_SECONDS
        )  # then `tend` cuts the connection
        self.first = True
        self.fields: dict[str, str] = {}  # the header, names in lower case
        self.unread = False  # whether the peer may be sending what nobody will read
        self.websocket: client.WebSocket | None = None
        self.session: Session | None = None  # the WebSocket's
        self.server.connections.add(self)

    def finish(self) -> None:
        try:
            super().finish()
            if self.unread:
                self.deadline = time.monotonic() + LINGER_SECONDS
                client.linger(self.connection, self.deadline, first=True)
        finally:
            self.server.connections.discard(self)

    # -- what other threads call ---------------------------------------------

    def tend(self, now: float) -> None:
        """Drop a peer that stalls, answer its pings, end its session when it idles too long."""
        if now > self.deadline:
            self.cut()
        elif self.websocket is not None:
            self.websocket.tend()
            if self.websocket.stalled(HEADER_SECONDS):
                self.cut()
            elif self.session and now - self.session.used > self.app.session_timeout:
                self.say_goodbye(
                    f"the session was idle for {self.app.session_timeout:g} s"
                )

    def say_goodbye(self, reason: str) -> None:
        """Begin to close, unless a request is being served: its answer comes first."""
        if self.websocket is None:
            try:
                self.connection.shutdown(socket.SHUT_RD)  # ends the wait for a request
            except OSError:
                pass  # the peer has gone by itself
        elif self.session is None or self.session.lock.acquire(blocking=False):
            try:
                if not self.websocket.closing:
                    self.websocket.begin_close(client.GOING_AWAY, reason)
                    self.deadline = time.monotonic() + LINGER_SECONDS
            finally:
                if self.session:
                    self.session.lock.release()

    def cut(self) -> None:
        """Wake the thread that waits for this peer, which finds the connection ended."""
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended already

    # -- requests in -----------------------------------------------------------

    def handle_one_request(self) -> None:
        self.deadline = time.monotonic() + (
            HEADER_SECONDS if self.first else IDLE_SECONDS
        )
        self.first = False
        if not self.rfile.peek(1):  # type: ignore[attr-defined]
            self.close_connection = True
            return
        self.deadline = time.monotonic() + HEADER_SECONDS
        super().handle_one_request()

    def parse_request(self) -> bool:
        """Parse the request's head. Stricter than http.server, and several times as fast:
        no email parser, a dict of fields, those that repeat joined (RFC 9110 section 5.3).
        """
        self.command, self.request_version, self.close_connection = "", "HTTP/1.1", True
        self.unread = True
        self.requestline = self.raw_requestline.decode("latin-1").rstrip("\r\n")
        if not self.requestline:  # one empty line is forgiven (RFC 9112 section 2.2)
            self.requestline = (
                self.rfile.readline(MAX_LINE).decode("latin-1").rstrip("\r\n")
            )
        match = _REQUEST_LINE.fullmatch(self.requestline)
        if match is None:
            self.send_error(400, "the request line is not: METHOD target HTTP/1.1")
            return False
        self.command, self.path = match[1], match[2]
        if match[3] != "1":
            self.send_error(505, "this server speaks HTTP/1.1")
            return False
        self.request_version = f"HTTP/1.{match[4]}"
        if not self._parse_fields():
            return False
        connection = _tokens(self.fields.get("connection"))
        keep = "close" not in connection and (
            match[4] != "0" or "keep-alive" in connection
        )
        self.close_connection = not keep
        return True

    def _parse_fields(self) -> bool:
        """Read field lines up to the empty one; False if that did not work out."""
        self.fields, size = {}, 0
        while True:
            line = self.rfile.readline(MAX_LINE + 1)
            size += len(line)
            if size > MAX_LINE or len(self.fields) > MAX_HEADERS:
                self.send_error(
                    431, f"the header is over {MAX_LINE} bytes or {MAX_HEADERS} fields"
                )
                return False
            if line in (b"\r\n", b"\n"):
                return True
            if not line.endswith(b"\n"):
                return False  # the peer went away
            match = _FIELD_LINE.fullmatch(line.decode("latin-1").rstrip("\r\n"))
            if match is None:
                self.send_error(400, "a header line is not: Name: value")
                return False
            name, value = match[1].lower(), match[2]
            self.fields[name] = (
                f"{self.fields[name]}, {value}" if name in self.fields else value
            )

    def _serve(self) -> None:
        """Answer one request."""
        try:
            self._check_origin()
            self.path = self._decoded_path()
            methods = ROUTES.get(self.path)
            if methods is None:
                raise Failure(404, "Not Found: GET /docs shows what there is")
            allow = {"Allow": ", ".join([*methods, "OPTIONS"])}
            if self.command != "OPTIONS" and self.command not in methods:
                raise Failure(
                    405, f"Method Not Allowed: use {allow['Allow']}", headers=allow
                )
            body = self._read_body()
            if self.command == "OPTIONS":
                self._respond(204, b"", headers=allow)
                return
            self.deadline = float("inf")  # the environment takes as long as it takes
            methods[self.command](self, body)
        except Failure as failure:
            self._respond(
                failure.status, failure.as_http().encode(), headers=failure.headers
            )
        except (ConnectionError, TimeoutError):
            raise  # the peer went away; `Server.handle_error` notes it
        except Exception as error:
            log.exception("%s failed", ascii(self.requestline))
            self._respond(
                500, Failure(500, f"{type(error).__name__}: {error}").as_http().encode()
            )

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _serve
    do_TRACE = do_CONNECT = _serve

    def _decoded_path(self) -> str:
        try:
            return unquote(urlsplit(self.path).path)
        except ValueError:
            raise Failure(400, "the request target is no path") from None

    def _check_origin(self) -> None:
        """Keep the pages of other sites out; programs send no Origin and are let in.

        A browser sends ``Origin`` with every WebSocket handshake and cross-site POST, and
        under DNS rebinding a ``Host`` that is not this machine's name.
        """
        host = _authority(self.fields.get("host", ""))
        if not host and self.request_version != "HTTP/1.0" or "," in host:
            raise Failure(400, "one Host header is needed (RFC 9112 section 3.2)")
        named = self.server.named_hosts
        if (
            self.server.loopback
            and host
            and not _is_loopback(host)
            and host not in named
        ):
            raise Failure(
                403, f"Host {host} is not this machine: name it with --allow-origin"
            )
        origin = self.fields.get("origin")
        if origin is None:
            return
        forwarded = [
            _authority(name) for name in _tokens(self.fields.get("x-forwarded-host"))
        ]
        allowed = {host, *named, *forwarded} - {""}
        if _authority(origin.partition("://")[2]) not in allowed:
            raise Failure(
                403, f"Origin {origin} may not call: name it with --allow-origin"
            )

    def _read_body(self) -> bytes:
        """Read the request's body (RFC 9112 section 6), if it has one and may have it.

        Raises:
            Failure: its size is unclear or too large, its type is not JSON.
        """
        length, coding = (
            self.fields.get("content-length"),
            self.fields.get("transfer-encoding"),
        )
        if length is not None and coding is not None:
            raise self._unreadable(
                400, "send Content-Length or Transfer-Encoding, not both"
            )
        if coding is not None and coding.lower() != "chunked":
            raise self._unreadable(501, "the only Transfer-Encoding known is chunked")
        if length is not None and not re.fullmatch("[0-9]{1,18}", length):
            raise self._unreadable(400, "Content-Length must be one number")
        if int(length or 0) > self.app.max_message_size:
            raise self._unreadable(
                413, f"the limit is {self.app.max_message_size} bytes"
            )
        expect = self.fields.get("expect", "").lower()
        if expect not in ("", "100-continue"):
            raise self._unreadable(417, "the only Expect known is 100-continue")
        if coding is None and not int(length or 0):
            self.unread = False
            return b""
        media, _, parameters = self.fields.get(
            "content-type", "application/json"
        ).partition(";")
        charset = parameters.lower().replace('"', "").replace(" ", "")
        if (
            self.command == "POST"
            and self.path != "/mcp"
            and (
                media.strip().lower() != "application/json"
                or charset not in ("", "charset=utf-8")
            )
        ):
            raise self._unreadable(
                415,
                "the body must be JSON in UTF-8: with curl, add -H 'Content-Type: application/json'",
            )
        if expect:
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.wfile.flush()
        body = self._read_chunks() if coding else self._read_exactly(int(length or 0))
        self.unread = False
        return body

    def _unreadable(self, status: int, message: str) -> Failure:
        self.close_connection = True  # where the next request begins is not known
        return Failure(status, message)

    def _read_exactly(self, size: int) -> bytes:
        """Read ``size`` bytes from a peer that may be slow, but not stall."""
        body = bytearray()
        last = time.monotonic() + HEADER_SECONDS + size / SLOWEST_RATE
        while len(body) < size:
            self.deadline = min(time.monotonic() + HEADER_SECONDS, last)
            data = self.rfile.read1(min(size - len(body), 1 << 20))
            if not data:
                raise ConnectionError("the peer went away within a body")
            body += data
        return bytes(body)

    def _read_chunks(self) -> bytes:
        """Decode ``Transfer-Encoding: chunked`` (RFC 9112 section 7.1)."""
        body = bytearray()
        while True:
            self.deadline = time.monotonic() + HEADER_SECONDS
            line = self.rfile.readline(MAX_LINE)
            match = re.fullmatch(rb"([0-9A-Fa-f]{1,15})[ \t]*(;[^\r\n]*)?\r?\n", line)
            if match is None:
                raise self._unreadable(400, "a chunk does not begin with its size")
            size = int(match[1], 16)
            if len(body) + size > self.app.max_message_size:
                raise self._unreadable(
                    413, f"the limit is {self.app.max_message_size} bytes"
                )
            if not size:
                break
            body += self._read_exactly(size)
            if self.rfile.readline(3).rstrip(b"\r\n"):
                raise self._unreadable(400, "a chunk is longer than its size")
        fields = self.fields
        if not self._parse_fields():  # trailers, which must not count as fields
            raise ConnectionError("the peer went away within a body")
        self.fields = fields
        return bytes(body)

    # -- answers out -----------------------------------------------------------

    def _respond(
        self,
        status: int,
        body: bytes,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.deadline = time.monotonic() + HEADER_SECONDS + len(body) / SLOWEST_RATE
        if self.unread or self.server.stopping:
            self.close_connection = True
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        elif self.request_version == "HTTP/1.0":
            self.send_header("Connection", "keep-alive")
        self.end_headers()
        if self.command != "HEAD" and status != 204:
            self.wfile.write(body)

    def send_error(
        self, code: int, message: str | None = None, explain: str | None = None
    ) -> None:
        """Refuse a request that http.server or `parse_request` could not read."""
        self.close_connection = self.unread = True
        self._respond(
            code, Failure(code, message or HTTPStatus(code).phrase).as_http().encode()
        )

    def version_string(self) -> str:
        return self.server_version

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Log a request: escaped, so that what a client sends cannot forge a line."""
        if log.isEnabledFor(logging.INFO):
            status = code.value if isinstance(code, HTTPStatus) else code
            log.info(
                "%s %s %s", self.client_address[0], ascii(self.requestline), status
            )

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("%s %s", self.client_address[0], ascii(format % args))

    # -- WebSocket -------------------------------------------------------------

    def get_ws(self, body: bytes) -> None:
        """Do the opening handshake, server side (RFC 6455 section 4.2), then serve a session."""
        fields = self.fields
        if "upgrade" not in _tokens(
            fields.get("connection")
        ) or "websocket" not in _tokens(fields.get("upgrade")):
            raise self._upgrade_required(
                "this is a WebSocket endpoint, and no WebSocket handshake"
            )
        if fields.get("sec-websocket-version") != "13":
            raise self._upgrade_required("the only Sec-WebSocket-Version known is 13")
        key = fields.get("sec-websocket-key", "")
        if self.request_version == "HTTP/1.0" or not re.fullmatch(
            "[A-Za-z0-9+/]{21}[AQgw]==", key
        ):
            raise self._unreadable(
                400, "it takes HTTP/1.1 and a Sec-WebSocket-Key of 16 bytes in base64"
            )
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", client.accept_key(key))
        self.end_headers()
        self.wfile.flush()
        self.connection.settimeout(0)
        early = self.rfile.read1(MAX_LINE) or b""
        self.rfile.close()
        self.close_connection = True  # once the session is over
        size = self.app.max_message_size
        self.websocket = client.WebSocket(
            self.connection, client=False, max_size=size, early=early
        )
        self._serve_session(self.websocket)

    def _upgrade_required(self, message: str) -> Failure:
        self.close_connection = True
        headers = {"Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        return Failure(426, message, headers=headers)

    def _serve_session(self, ws: client.WebSocket) -> None:
        """Serve one WebSocket session from its environment's creation to its end."""
        code, reason = client.NORMAL, ""
        try:
            session = self.session = self.app.open(("ws", next(_numbers)))
            try:
                session.open()
                code, reason = self._converse(ws, session)
            finally:
                session.end()
        except Failure as failure:
            full = failure.code == "CAPACITY_REACHED"
            code = client.TRY_AGAIN_LATER if full else client.INTERNAL_ERROR
            self._last_words(ws, failure)
        except (ConnectionError, TimeoutError) as error:
            log.debug("%s %s", self.client_address[0], error)
        except Exception as error:
            log.exception("session %s failed", self.session)
            code = client.INTERNAL_ERROR
            self._last_words(
                ws, Failure(500, f"{type(error).__name__}: {error}", "SESSION_ERROR")
            )
        self.deadline = time.monotonic() + LINGER_SECONDS
        ws.close(code, reason, LINGER_SECONDS)

    def _last_words(self, ws: client.WebSocket, failure: Failure) -> None:
        try:
            ws.send(failure.as_message())
        except ConnectionError as error:
            log.debug("%s %s", self.client_address[0], error)

    def _converse(self, ws: client.WebSocket, session: Session) -> tuple[int, str]:
        """Answer each message with one, in order; return why it is over."""
        while not self.server.stopping:
            message = ws.recv()
            with (
                session.lock
            ):  # so that no Close frame comes between a message and its answer
                if ws.closing:
                    break
                answer = session.answer(message)
                if answer is None:
                    return client.NORMAL, ""
                ws.send(answer)
                session.used = time.monotonic()
        return client.GOING_AWAY, "the server is shutting down"

    # -- the answers, by route ---------------------------------------------------

    def _session_name(self) -> str:
        name = self.fields.get("x-session-id")
        if name is not None and not 0 < len(name) <= 255:
            loc: Loc = ("header", "x-session-id")
            raise _invalid(
                validate(
                    {"type": "string", "minLength": 1, "maxLength": 255}, name, loc
                )
            )
        return name or SHARED

    def _body(self, body: bytes) -> dict[str, Any]:
        value = parse_json(body, ("body",)) if body.strip() else {}
        if not isinstance(value, dict):
            raise _invalid(validate(_OBJECT, value, ("body",)))
        return value

    def post_reset(self, body: bytes) -> None:
        data = self._body(body)
        with self.app.use(self._session_name(), create=True) as session:
            answer = session.reset(data, ("body",))
        self._send_json(answer)

    def post_step(self, body: bytes) -> None:
        data, name = self._body(body), self._session_name()
        if "action" not in data:
            raise _invalid(
                validate({"type": "object", "required": ["action"]}, data, ("body",))
            )
        action = data.pop("action")
        with self.app.use(name, create=name == SHARED) as session:
            answer = session.step(action, ("body", "action"), data, ("body",))
        self._send_json(answer)

    def get_state(self, body: bytes) -> None:
        name = self._session_name()
        with self.app.use(name, create=name == SHARED) as session:
            answer = session.state()
        self._send_json(answer)

    def post_close(self, body: bytes) -> None:
        with self.app.use(self._session_name(), create=False) as session:
            session.end()
        self._send_json('{"status":"closed"}')

    def post_mcp(self, body: bytes) -> None:
        try:
            answer = mcp_answer(parse_json(body, ("body",)))
        except Failure as failure:
            error = {"code": -32700, "message": failure.message}
            answer = {"jsonrpc": "2.0", "id": None, "error": error}
        self._send_json(client.encode_json(answer))

    def get_health(self, body: bytes) -> None:
        self._send_json('{"status":"healthy"}')

    def get_schema(self, body: bytes) -> None:
        self._send_json(client.encode_json(self.app.schemas))

    def get_metadata(self, body: bytes) -> None:
        self._send_json(client.encode_json(self.app.metadata))

    def get_openapi(self, body: bytes) -> None:
        self._send_json(client.encode_json(openapi(self.app)))

    def get_page(self, body: bytes) -> None:
        text, policy = page(self.path)
        headers = {"Content-Security-Policy": policy}
        self._respond(200, text, "text/html; charset=utf-8", headers)

    def get_redirect(self, body: bytes) -> None:
        headers = {
            "Location": REDIRECTS[self.path]
        }  # relative: there may be a path prefix
        self._respond(307, b"", headers=headers)

    def _send_json(self, text: str) -> None:
        self._respond(200, text.encode())


REDIRECTS = {"/": "web", "/web/": "../web", "/docs/": "../docs", "/redoc": "docs"}
ROUTES: dict[str, dict[str, Callable[[Handler, bytes], None]]] = {
    "/reset": {"POST": Handler.post_reset},
    "/step": {"POST": Handler.post_step},
    "/state": {"GET": Handler.get_state},
    "/close": {"POST": Handler.post_close},
    "/ws": {"GET": Handler.get_ws},
    "/schema": {"GET": Handler.get_schema},
    "/metadata": {"GET": Handler.get_metadata},
    "/health": {"GET": Handler.get_health},
    "/openapi.json": {"GET": Handler.get_openapi},
    "/mcp": {"POST": Handler.post_mcp},
    "/web": {"GET": Handler.get_page},
    "/docs": {"GET": Handler.get_page},
    **{path: {"GET": Handler.get_redirect} for path in REDIRECTS},
    "*": {},  # OPTIONS only
}
for _path, _methods in ROUTES.items():
    if "GET" in _methods and _path != "/ws":
        _methods["HEAD"] = _methods["GET"]


def _tokens(value: str | None) -> list[str]:
    """Return the comma-separated tokens of a header field, in lower case."""
    return [token.strip() for token in (value or "").lower().split(",")]


def _authority(text: str) -> str:
    """Return host and port as in a URL, comparable: lower case, no default port."""
    return re.sub(r":(80|443)$", "", text.strip().lower())


def _is_loopback(authority: str) -> bool:
    host = (
        (urlsplit(f"//{authority}").hostname or "") if authority.count("]") < 2 else ""
    )
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# ---------------------------------------------------------------------------
# The server and its threads
# ---------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """An app on a port: a thread for each connection, and one that looks after them all.

    Raises:
        OSError: the address cannot be had.
    """

    daemon_threads = True
    request_queue_size = 1024  # connections that wait to be accepted
    allow_reuse_address = os.name == "posix"  # on Windows it would share a busy port

    def __init__(self, app: App, host: str, port: int) -> None:
        self.address_family = socket.getaddrinfo(host, port)[0][0]
        self.app = app
        self.connections: set[Handler] = set()
        self.stopping = False
        self.loopback = _is_loopback(f"[{host}]" if ":" in host else host)
        hosts = [*app.allow_origins, os.environ.get("SPACE_HOST", "")]
        self.named_hosts = {
            _authority(h.rpartition("://")[2].rstrip("/")) for h in hosts
        } - {""}
        self._next_look = 0.0
        super().__init__((host, port), Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's looks up a name, slowly
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    @property
    def url(self) -> str:
        """Where a client on this machine reaches the server."""
        host, port = self.server_address[:2]
        name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(host), str(host))
        return f"http://{f'[{name}]' if ':' in name else name}:{port}"

    def serve_forever(self, poll_interval: float = TICK_SECONDS) -> None:
        super().serve_forever(poll_interval)

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            sock, address = super().get_request()
        except OSError:
            time.sleep(0.05)  # out of file descriptors, perhaps: do not spin
            raise
        # A peer that vanished without a word is found out after two minutes.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", 60),
            ("TCP_KEEPINTVL", 15),
            ("TCP_KEEPCNT", 4),
        ):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        return sock, address

    def service_actions(self) -> None:
        """Look after connections and sessions; socketserver calls this between accepts."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + TICK_SECONDS
        for connection in tuple(self.connections):
            connection.tend(now)
        self.app.expire(now)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, (ConnectionError, TimeoutError, OSError)):
            log.debug("%s went away: %s", client_address[0], error)
        else:
            log.exception("a request from %s failed", client_address[0])

    def stop(self) -> None:
        """Stop within 5 seconds: let steps in progress be answered, close all else.

        WebSocket sessions are closed with 1001, and every environment is closed.
        """
        if self.stopping:
            return
        self.stopping = True
        self.shutdown()
        self.server_close()
        deadline = time.monotonic() + GRACE_SECONDS
        while self.connections and time.monotonic() < deadline:
            for connection in tuple(self.connections):
                connection.say_goodbye("the server is shutting down")
                connection.tend(time.monotonic())
            time.sleep(0.02)
        for connection in tuple(self.connections):
            connection.cut()
        self.app.end_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


# ---------------------------------------------------------------------------
# OpenAPI 3.1
# ---------------------------------------------------------------------------


def example(schema: Mapping[str, Any]) -> Any:
    """Return a value that fits a schema of `json_schema`."""
    if "examples" in schema:
        return schema["examples"][0]
    if "default" in schema:
        return schema["default"]
    if "anyOf" in schema:
        return example(schema["anyOf"][0])
    if "enum" in schema or "const" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    kind = schema.get("type")
    if kind == "object":
        properties = schema.get("properties", {})
        return {name: example(properties[name]) for name in properties}
    if kind == "array":
        items = schema.get(
            "prefixItems", [schema.get("items", {})] * schema.get("minItems", 0)
        )
        return [example(item) for item in items]
    if kind == "string":
        return "text"[: schema.get("maxLength", 4)].ljust(
            schema.get("minLength", 0), "."
        )
    low = schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1)
    return {"boolean": False, "null": None}.get(
        str(kind), min(low, schema.get("maximum", low))
    )


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(words: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "description": words,
        "properties": properties,
        "required": list(properties),
    }


_STRING = {"type": "string"}
_FAULT = _object(
    "A fault in a request", type=_STRING, loc={"type": "array"}, msg=_STRING, input={}
)
# Status | what it means | the ``detail`` of an example. All but 422 have the schema Error.
_ERRORS = """
400 | The request is not HTTP as it should be | Content-Length must be one number
403 | Another site's page may not call | Origin a.example may not call: name it with --allow-origin
404 | There is no such session | Unknown X-Session-Id: POST /reset opens the session
405 | Another method is needed | Method Not Allowed: use POST, OPTIONS
413 | The body is too large | the limit is 104857600 bytes
415 | The body is not JSON | the body must be JSON in UTF-8: with curl, add -H 'Content-Type: application/json'
417 | What is expected is not known | the only Expect known is 100-continue
422 | The request breaks its schema: every fault is listed |
426 | A WebSocket handshake is needed | the only Sec-WebSocket-Version known is 13
431 | The header is too large | the header is over 65536 bytes or 100 fields
500 | The environment failed, and lives on | division by zero
501 | The transfer coding is not known | the only Transfer-Encoding known is chunked
503 | The server is full | Server at capacity: 1 of 1 sessions are open
"""
_ANY, _POST = " 400 403 405 431", " 400 403 405 413 415 417 431 501"
# Path | tag | summary | description | schema of the answer | of the request | errors
_OPERATIONS = f"""
/reset | Environment | Begin a new episode | Opens the session, if there is none. | StepResult | ResetRequest | 422 500 503 {_POST}
/step | Environment | Act once | Without X-Session-Id in the environment that all such requests share. | StepResult | StepRequest | 404 422 500 503 {_POST}
/state | Environment | Where the episode stands | The state of the session's environment. | State | | 404 422 500 503 {_ANY}
/close | Environment | End the session | Closes its environment and frees its place. | Status | Nothing | 404 422 500 {_POST}
/ws | Environment | A session over WebSocket | One connection, one environment: see the WebSocket protocol. | | | 426 {_ANY}
/schema | Information | The JSON Schemas | Of action, observation and state. | Schemas | | {_ANY}
/metadata | Information | About the environment | Its name, description, version and README. | Metadata | | {_ANY}
/health | Information | Whether the server runs | For load balancers and containers. | Status | | {_ANY}
/openapi.json | Information | This description | OpenAPI 3.1. | Anything | | {_ANY}
/mcp | Tools | JSON-RPC of the Model Context Protocol | This environment has no tools, and says so. | JsonRpcResponse | JsonRpcRequest | {_POST}
/web | Pages | Play an episode | An interactive page. | | | {_ANY}
/docs | Pages | Explore the API | An interactive page. | | | {_ANY}
/ | Pages | To the page | Redirects to /web. | | | {_ANY}
"""


def openapi(app: App) -> dict[str, Any]:
    """Describe the HTTP API of an app: every operation, every answer, examples that hold."""
    schemas = _components(app)
    examples = {name: example(schema) for name, schema in schemas.items()}
    examples["StepRequest"] = {"action": examples["Action"]}
    examples["StepResult"]["observation"] = example(
        schemas["StepResult"]["properties"]["observation"]
    )
    paths = {}
    for path, tag, summary, description, answer, request, errors in _rows(_OPERATIONS):
        method = "post" if request else "get"
        operation: dict[str, Any] = {
            "operationId": f"{method}_{path.strip('/').replace('.', '_') or 'root'}",
            "tags": [tag],
            "summary": summary,
            "description": description,
            "responses": _success(path, answer, examples),
        }
        for code in sorted(errors.split()):
            operation["responses"][code] = {"$ref": f"#/components/responses/{code}"}
        if "404" in errors or path == "/reset":
            operation["parameters"] = [{"$ref": "#/components/parameters/SessionId"}]
        if request:
            content = _content(request, examples[request])
            operation["requestBody"] = {"required": path == "/step", "content": content}
        paths[path] = {method: operation}
    info = {k: app.metadata[k] for k in ("name", "description")}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": info["name"],
            "description": info["description"],
            "version": benchmark.__version__,
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "parameters": {"SessionId": _SESSION_ID},
            "responses": {code: _error(code, *row) for code, *row in _rows(_ERRORS)},
        },
    }


_SESSION_ID = {
    "name": "X-Session-Id",
    "in": "header",
    "required": False,
    "description": "A session with an environment of its own; without it, one is shared",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
}


def _content(schema: str, given: Any) -> dict[str, Any]:
    examples = {"example": {"summary": "An example", "value": given}}
    return {"application/json": {"schema": _ref(schema), "examples": examples}}


def _success(path: str, schema: str, examples: Mapping[str, Any]) -> dict[str, Any]:
    if path == "/ws":
        return {"101": {"description": "From here on it is a WebSocket"}}
    if path == "/":
        return {"307": {"description": "The page is elsewhere"}}
    content = {"text/html": {"schema": _STRING}}
    if schema:
        content = _content(schema, examples[schema])
    return {"200": {"description": "As asked", "content": content}}


def _error(code: str, meaning: str, detail: str) -> dict[str, Any]:
    content = _content("Error", {"detail": detail})
    if code == "422":
        fault = {
            "type": "missing",
            "loc": ["body", "action"],
            "msg": "Field required",
            "input": {},
        }
        content = _content("Faults", {"detail": [fault]})
    return {"description": meaning, "content": content}


def _components(app: App) -> dict[str, Any]:
    """The schemas that operations refer to by name."""
    observation = {**app.schemas["observation"]}
    beside = ("reward", "done")  # on the wire these stand beside the observation
    observation["properties"] = {
        k: v for k, v in observation["properties"].items() if k not in beside
    }
    observation["required"] = [k for k in observation["required"] if k not in beside]
    options = STEP_OPTIONS_SCHEMA["properties"]
    step = _object("An action, and options beside it", action=_ref("Action"))
    step["properties"].update(options)
    rpc = _object(
        "A JSON-RPC 2.0 request",
        jsonrpc={"const": "2.0"},
        method={**_STRING, "examples": ["tools/list"]},
    )
    rpc["properties"]["id"] = {"examples": [1]}
    code, nullable = {"type": "integer"}, {"anyOf": [_STRING, {"type": "null"}]}
    return {
        "Action": app.schemas["action"],
        "Observation": app.schemas["observation"],
        "State": app.schemas["state"],
        "ResetRequest": RESET_SCHEMA,
        "StepRequest": step,
        "StepResult": _object(
            "An observation, its reward, and whether the episode is over",
            observation=observation,
            reward={"anyOf": [{"type": "number"}, {"type": "null"}]},
            done={"type": "boolean"},
        ),
        "Status": _object("How it stands", status=_STRING),
        "Nothing": {"type": "object", "description": "No key means anything here"},
        "Anything": {"type": "object"},
        "Schemas": _object(
            "JSON Schemas",
            action={"type": "object"},
            observation={"type": "object"},
            state={"type": "object"},
        ),
        "Metadata": _object(
            "About the environment",
            name=_STRING,
            description=_STRING,
            version=_STRING,
            readme_content=nullable,
            author=nullable,
            documentation_url=nullable,
        ),
        "JsonRpcRequest": rpc,
        "JsonRpcResponse": _object(
            "A JSON-RPC 2.0 response",
            jsonrpc={"const": "2.0"},
            id={"examples": [1]},
            error=_object("What is wrong", code=code, message=_STRING),
        ),
        "Error": {
            **_object("What is wrong, and what to do", detail=_STRING),
            "additionalProperties": True,
        },
        "Faults": _object("Every fault", detail={"type": "array", "items": _FAULT}),
    }


# ---------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Serve an environment until told to stop; return the exit code."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="server.py",
        description="Serve an OpenEnv environment over HTTP and WebSocket.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    port = os.environ.get("PORT", "8000")
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 is all of IPv4",
    )
    add(
        "--port",
        type=int,
        default=port,
        help="port; 0 picks a free one; else $PORT or 8000",
    )
    add("--env", default="benchmark:BenchmarkEnvironment", help="module:Class to serve")
    add(
        "--max-concurrent-envs",
        type=int,
        metavar="N",
        help="sessions at a time; 1000 if the class supports it, else 1",
    )
    add(
        "--session-timeout",
        type=float,
        default=3600,
        metavar="S",
        help="seconds until an idle session ends; 0: never",
    )
    add(
        "--max-message-mb",
        type=float,
        default=100,
        metavar="MB",
        help="largest request body or message, in MiB",
    )
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="HOST",
        help="a host whose pages may call (repeatable)",
    )
    add(
        "--reload",
        action="store_true",
        help="restart when a source file changes, for development",
    )
    add(
        "--log-level",
        default="info",
        choices=["debug", "info", "warning", "error"],
        help="what to log",
    )
    add("--version", action="version", version=f"%(prog)s {benchmark.__version__}")
    # One clear line, and no usage text above it.
    parser.error = lambda message: parser.exit(2, f"server.py: {message}\n")  # type: ignore[method-assign]
    options = parser.parse_args(argv)
    if options.reload:
        return _reload(sys.argv[1:] if argv is None else argv, options.env)
    logging.basicConfig(
        level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s"
    )
    try:
        env, action_cls, observation_cls = load_environment(options.env)
        app = create_app(
            env,
            action_cls,
            observation_cls,
            max_concurrent_envs=options.max_concurrent_envs,
            session_timeout=options.session_timeout,
            max_message_mb=options.max_message_mb,
            allow_origins=options.allow_origin,
        )
        server = Server(app, options.host, options.port)
    except (ImportError, SyntaxError, TypeError, ValueError) as error:
        parser.error(f"--env {options.env}: {error}")
    except (OSError, OverflowError) as error:
        parser.error(f"cannot listen on {options.host} port {options.port}: {error}")
    client.raise_file_limit()
    sys.setswitchinterval(0.02)  # of many busy threads each gets more done per turn
    url = server.url
    print(
        f"{app.metadata['name']} on {url}: play at {url}/web, API at {url}/docs",
        flush=True,
    )
    _serve_until_signal(server)
    return 0


def load_environment(name: str) -> tuple[Callable[[], Any], type, type]:
    """Return the class that ``"module:Class"`` names, and its action and observation types.

    Raises:
        ImportError, ValueError, TypeError: there is none, or its ``step`` has no type hints.
    """
    import importlib

    module_name, _, class_name = name.partition(":")
    if not module_name or not class_name:
        raise ValueError("write it as module:Class")
    sys.path[:0] = [os.getcwd()]
    if __package__ and module_name == "benchmark":
        module_name = benchmark.__name__  # the default, copied into a package
    env = getattr(importlib.import_module(module_name), class_name, None)
    if not isinstance(env, type):
        raise TypeError(f"there is no class {class_name} in {module_name}")
    step = getattr(env, "step", None) or getattr(env, "step_async", None)
    names = [n for n in getattr(step, "__annotations__", {}) if n != "return"]
    action_cls = _annotation(step, names[0]) if names else None
    observation_cls = _annotation(step, "return")
    if action_cls is None or observation_cls is None:
        hints = "def step(self, action: MyAction) -> MyObservation"
        raise ValueError(f"its step needs type hints: {hints}")
    return env, action_cls, observation_cls


def _serve_until_signal(server: Server) -> None:
    """Serve until SIGINT or SIGTERM; a second one ends the process at once."""
    import signal

    def stop(signum: int, frame: Any) -> None:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_DFL)
        # Not here: the loop to be stopped is what this interrupts.
        threading.Thread(target=server.shutdown, daemon=True).start()

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, stop)
    server.serve_forever()
    server.stop()


def _reload(argv: Sequence[str], env: str) -> int:
    """Run the server in a child process, and again whenever a source file has changed."""
    import signal
    import subprocess

    command = [sys.executable, __file__]
    if __package__:
        command = [sys.executable, "-m", f"{__package__}.server"]
    command += [argument for argument in argv if argument != "--reload"]
    package = Path(env.partition(":")[0].partition(".")[0])

    def stamps() -> dict[Path, float]:
        found = [
            *Path(__file__).parent.glob("*.py"),
            *Path().glob("*.py"),
            *package.rglob("*.py"),
        ]
        return {path: path.stat().st_mtime for path in found if path.exists()}

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    first = True
    while True:
        before = stamps()
        child = subprocess.Popen(command)
        try:
            while stamps() == before:
                time.sleep(0.2)
                if first and child.poll() is not None:
                    return child.returncode  # it never worked
        except KeyboardInterrupt:
            child.wait()  # it was told, too
            return 0
        finally:
            if child.poll() is None:
                child.terminate()
            child.wait()
        first = False


# ---------------------------------------------------------------------------
# The pages
# ---------------------------------------------------------------------------


@functools.cache
def page(path: str) -> tuple[bytes, str]:
    """Return a page and its Content-Security-Policy: nothing but what is in it may run."""
    body, script = {"/web": (WEB_BODY, WEB_SCRIPT), "/docs": (DOCS_BODY, DOCS_SCRIPT)}[
        path
    ]
    script = COMMON_SCRIPT + script
    hashes = [
        "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (script, STYLE)
    ]
    policy = (
        f"default-src 'none'; script-src '{hashes[0]}'; style-src '{hashes[1]}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<title>OpenEnv</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}<script>{script}</script>\n</body>\n</html>\n"
    )
    return text.encode(), policy


# PAGES
STYLE = WEB_BODY = WEB_SCRIPT = DOCS_BODY = DOCS_SCRIPT = COMMON_SCRIPT = ""

if __name__ == "__main__":
    sys.exit(main())
