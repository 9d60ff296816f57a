"""Serves an OpenEnv environment over HTTP and WebSocket.

Part of the minimal OpenEnv Benchmark environment, version 1.0.0: benchmark.py (the
environment), client.py (its clients), server.py (this file: its server).

    python3 server.py                           # the Benchmark environment on port 8000
    python3 server.py --env my_env:MyEnvironment          # an environment of your own
    with create_app(MyEnvironment, MyAction, MyObservation).start() as server:
        print(server.url)                                 # in a test or a notebook

How one ``step`` travels: `Handler` reads the request, or for ``/ws`` does the opening
handshake and reads messages from a `client.WebSocket`; the JSON is checked against the
schema of the action (`validator`) and becomes a dataclass (`client.from_json`); the
`Session`, which owns one environment, calls its ``step`` and makes JSON of what it returns.

The file goes from types to bytes: JSON Schema; sessions and the app that holds them; HTTP
and the opening handshake of RFC 6455; the server and its threads; OpenAPI; the command
line; the two web pages. A thread serves each connection, so an environment may block;
sessions of one that says it never does share a thread, which is faster (`SharedThread`).
Not here: TLS and many machines (put a proxy in front) and environments with MCP tools.
"""

from __future__ import annotations

TYPE_CHECKING = False  # except to type checkers, which know this name

# First: the memory in which it is compiled, 3 MB, is there for all that follows.
if TYPE_CHECKING or not __package__:
    import client
    from benchmark import BenchmarkState, __version__
else:  # the files were copied into a package
    from . import client
    from .benchmark import BenchmarkState, __version__

import base64
import dataclasses
import functools
import inspect
import io
import ipaddress
import itertools
import json
import logging
import operator
import os
import re
import selectors
import socket
import socketserver
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from email.utils import formatdate
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import CoroutineType, SimpleNamespace
from typing import (
    Any,
    Literal,
    Optional,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)
from urllib.parse import unquote, urlsplit

log = logging.getLogger("openenv")

HEADER_SECONDS = (
    10.0  # for a request line and its headers, and for any stall within a body
)
IDLE_SECONDS = 60.0  # for a kept-alive connection to send its next request
LINGER_SECONDS = 2.0  # for a peer to close its end after the server has closed its own
GRACE_SECONDS = 3.5  # for steps in progress when the server is told to stop
LONG_STEP_SECONDS = 0.01  # three such steps in a row do not come from a busy machine
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


# The class that a value of each type has, the fault if it has another, and its words.
_TYPES: dict[str, tuple[type | None, str, str]] = {
    "string": (str, "string_type", "a valid string"),
    "integer": (int, "int_type", "a valid integer"),
    "number": (float, "float_type", "a valid number"),
    "boolean": (bool, "bool_type", "a valid boolean"),
    "null": (type(None), "none_required", "null"),
    "object": (dict, "dict_type", "a valid dictionary"),
    "array": (list, "list_type", "a valid list"),
}
# To JSON 1.0 is the number 1: what else counts as a value of the type.
_NUMBERS: dict[str, Callable[[Any], bool]] = {
    "integer": lambda v: type(v) is float and v.is_integer(),
    "number": lambda v: type(v) is int and abs(v) <= sys.float_info.max,
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
Faults = Sequence[dict[str, Any]]
Validator = Callable[[Any, Loc], Faults]


def _fault(kind: str, msg: str, loc: Loc, value: Any) -> dict[str, Any]:
    return {"type": kind, "loc": list(loc), "msg": msg, "input": value}


def validator(schema: Mapping[str, Any]) -> Validator:
    """Return the function that finds all faults of a value under ``schema``.

    It takes the value and the path to it, and returns OpenEnv's (pydantic's) ``{"type",
    "loc", "msg", "input"}`` for each fault. What `json_schema` emits is understood, no more
    of JSON Schema. The schema is gone through here, once, and not again for each value.
    """
    tests = [_bound_validator(k, schema[k]) for k in _BOUNDS if k in schema]
    if "anyOf" in schema:
        tests.append(_any_validator(schema["anyOf"]))
    if "enum" in schema:
        tests.append(_enum_validator(schema["enum"]))
    kind = schema.get("type", "")
    if kind == "object":
        tests.append(_object_validator(schema))
    if kind == "array":
        tests.append(_array_validator(schema))
    cls, name, words = _TYPES.get(kind, (None, "", ""))
    number = _NUMBERS.get(kind)

    def faults(value: Any, loc: Loc) -> Faults:
        if cls and type(value) is not cls and not (number and number(value)):
            return [_fault(name, f"Input should be {words}", loc, value)]
        found: list[dict[str, Any]] = []
        for test in tests:
            found += test(value, loc)
        return found

    return faults


def _bound_validator(keyword: str, bound: Any) -> Validator:
    kind, comparison, name, words = _BOUNDS[keyword]
    holds = getattr(operator, comparison)

    def faults(value: Any, loc: Loc) -> Faults:
        if kind == "number" and type(value) in (int, float):
            measure = value
        elif kind == type(value).__name__:
            measure = len(value)
        else:
            return ()
        if holds(measure, bound):
            return ()
        return [_fault(name, words.format(bound), loc, value)]

    return faults


def _any_validator(members: Sequence[Mapping[str, Any]]) -> Validator:
    tests = [validator(member) for member in members]
    told = [member != {"type": "null"} for member in members]

    def faults(value: Any, loc: Loc) -> Faults:
        found = [test(value, loc) for test in tests]
        if not all(found):
            return ()
        return [f for tell, group in zip(told, found) if tell for f in group]

    return faults


def _enum_validator(members: Sequence[Any]) -> Validator:
    words = f"Input should be one of {client.encode_json(members)}"

    def faults(value: Any, loc: Loc) -> Faults:
        for member in members:  # True is 1 to Python, not to JSON
            if value == member and isinstance(value, bool) is isinstance(member, bool):
                return ()
        return [_fault("enum", words, loc, value)]

    return faults


def _array_validator(schema: Mapping[str, Any]) -> Validator:
    first = [validator(item) for item in schema.get("prefixItems", ())]
    other = validator(schema.get("items", {}))

    def faults(value: Any, loc: Loc) -> Faults:
        return [
            fault
            for i, item in enumerate(value)
            for fault in (first[i] if i < len(first) else other)(item, (*loc, i))
        ]

    return faults


def _object_validator(schema: Mapping[str, Any]) -> Validator:
    tests = {k: validator(v) for k, v in schema.get("properties", {}).items()}
    required = schema.get("required", ())
    others = schema.get("additionalProperties", True)
    other = validator({} if others is True else others or {})

    def faults(value: Any, loc: Loc) -> Faults:
        found = []
        for name in required:
            if name not in value:
                found.append(_fault("missing", "Field required", (*loc, name), value))
        for name, item in value.items():
            if name in tests or others is not False:
                found += tests.get(name, other)(item, (*loc, name))
            else:
                words = "Extra inputs are not permitted"
                found.append(_fault("extra_forbidden", words, (*loc, name), item))
        return found

    return faults


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


def _invalid(errors: Faults) -> Failure:
    words = "; ".join(
        f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in errors[:10]
    )
    return Failure(422, f"Invalid message: {words}", "VALIDATION_ERROR", errors=errors)


def check(validate: Validator, value: Any, loc: Loc) -> None:
    """Raise a `Failure` that lists every fault of ``value``, if it has any."""
    errors = validate(value, loc)
    if errors:
        raise _invalid(errors)


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:20]} is too large for a float")
    return number


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


_decode_json = json.JSONDecoder(parse_float=_finite, parse_constant=_constant).decode

# json looks at each character of a text by itself. Whether all of a long one (so many
# characters) stand for themselves is found out in a third of the time.
LONG = 20_000
_ESCAPED = [*map(chr, range(32)), '"', "\\", "\x7f"]


def _needs_no_escape(text: str) -> bool:
    blocks = (text[i : i + LONG] for i in range(0, len(text), LONG))  # to fit a cache
    return text.isascii() and not any(c in b for b in blocks for c in _ESCAPED)


def _decode_long(text: str) -> Any:
    """Decode JSON. A long text in its middle is cut out and a NaN, which is no JSON, put in
    its place: where json finds that, it gets the text. If it does not, there was none.
    """
    start = text.rfind('"', 0, len(text) // 2) + 1
    end = text.find('"', start)
    if 0 < start < end - LONG and _needs_no_escape(long := text[start:end]):
        around, found = f"{text[: start - 1]}NaN{text[end + 1 :]}", {"NaN": long}
        decoder = json.JSONDecoder(parse_float=_finite, parse_constant=found.pop)
        with suppress(ValueError, KeyError):
            value = decoder.decode(around)
            if not found and around.count("NaN") == 1:
                return value
    return _decode_json(text)


def _encode_result(observation: Any, plain: Collection[int]) -> str:
    """Return the JSON of a step's result: the observation; beside it reward and done.

    A long text that needs no escapes is not shown to json. ``plain``: see `Session.step`.
    """
    is_dict = isinstance(observation, dict)
    fields = dict(observation) if is_dict else client.to_json(observation)
    reward, done = fields.pop("reward", None), fields.pop("done", False)
    result = {"observation": fields, "reward": reward, "done": done}
    for name, text in fields.items():
        if (type(name) is type(text) is str and len(text) > LONG) and (
            id(text) in plain or _needs_no_escape(text)
        ):
            del fields[name]
            start, key = '{"observation":{', client.encode_json(name)
            rest = client.encode_json(result)[len(start) :]
            return f'{start}{key}:"{text}"{"," if fields else ""}{rest}'
    return client.encode_json(result)


def parse_json(text: str | bytes, loc: Loc) -> Any:
    """Parse JSON strictly: what is accepted can be sent back.

    Raises:
        Failure: INVALID_JSON, if it is none, holds NaN or a number beyond float, or nests
            deeper than `MAX_DEPTH`.
    """
    try:
        decode = _decode_long if len(text) > LONG else _decode_json
        value = decode(text if isinstance(text, str) else text.decode())
        if len(text) > 2 * MAX_DEPTH and _deeper_than(MAX_DEPTH, value):
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
    fault = _fault("json_invalid", message, loc, {})
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


_SESSION_ID: dict[str, Any] = {
    "name": "X-Session-Id",
    "in": "header",
    "required": False,
    "description": "A session with an environment of its own; without it, one is shared",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
}
_OBJECT = {"type": "object"}
RESET_SCHEMA = json_schema(ResetRequest, extra=True)
_validate_session_id = validator(_SESSION_ID["schema"])
_validate_object = validator(_OBJECT)
_validate_reset = validator(RESET_SCHEMA)


def step_schema(action: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a ``/step`` request, given that of the action."""
    schema = json_schema(StepOptions, extra=True)
    properties = {"action": action, **schema["properties"]}
    words = "An action, and options beside it"
    required = {"properties": properties, "required": ["action"]}
    return {**schema, "title": "StepRequest", "description": words, **required}


def message_schemas(action: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the schemas of OpenEnv's WebSocket messages, by their type."""
    data = {
        "reset": RESET_SCHEMA,
        "step": action,
        "state": None,
        "mcp": _OBJECT,
        "close": None,
    }
    return {
        kind: {
            "type": "object",
            "properties": {"type": {}, **({"data": schema} if schema else {})},
            "required": ["type", "data"] if kind in ("step", "mcp") else ["type"],
            "additionalProperties": False,
        }
        for kind, schema in data.items()
    }


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
        except BaseException as error:
            log.exception("the environment could not be created")
            name = getattr(self.app.env, "__name__", type(self.app.env).__name__)
            self.end()
            raise Failure(
                500,
                f"{name}: {_words(error)}",
                "FACTORY_ERROR",
                factory_name=name,
            ) from error
        log.info("session %s opened", self)
        if self.ended:  # the server was stopped meanwhile
            self._close()
            raise Failure(503, "The server is shutting down", "SESSION_ERROR")

    def end(self) -> None:
        """Close the environment and free its place. Only the first call does anything."""
        with self.app.lock:
            if self.ended:
                return
            self.ended = True
        self._close()

    def _close(self) -> None:
        if self._env is not None:
            try:
                if hasattr(self._env, "close"):
                    self._run(self._env.close)
                if self._loop is not None:
                    self._loop.close()
            except BaseException:
                log.exception("closing the environment of session %s failed", self)
            seconds = time.monotonic() - self.opened
            log.info(
                "session %s closed after %d steps in %.1f s", self, self.steps, seconds
            )
        self.app.remove(self)

    def reset(self, data: dict[str, Any], around: tuple[str, str] = ("", "")) -> str:
        """Begin an episode; return the JSON of its first observation, and what goes around."""
        method = getattr(self._env, "reset_async", None) or self._env.reset
        return self._observe(method, _accepted(method, ResetRequest, data), (), around)

    def step(
        self,
        action: Any,
        options: dict[str, Any],
        loc: Loc,
        around: tuple[str, str] = ("", ""),
        plain: Collection[int] = (),
    ) -> str:
        """Act once; return the JSON of the observation, and what goes around it.

        ``loc`` is where the action stood, for faults that only its class finds; ``plain``
        holds the `id` of each text that is known to need no escapes, as it came without.
        """
        try:
            taken = client.from_json(self.app.action_cls, action)
        except (TypeError, ValueError) as error:
            raise _invalid([_fault("value_error", str(error), loc, action)]) from error
        except BaseException as error:  # of the class of the action
            raise _execution(error) from error
        method = getattr(self._env, "step_async", None) or self._env.step
        given = _accepted(method, StepOptions, options) if options else {}
        answer = self._observe(method, given, (taken,), around, plain)
        self.steps += 1
        return answer

    def state(self) -> str:
        """Return the JSON of the environment's state."""
        try:
            return client.encode_json(self._env.state)
        except BaseException as error:
            raise _execution(error) from error

    def answer(self, text: str | bytes) -> str | None:
        """Answer one WebSocket message of OpenEnv; None means that the caller says goodbye.

        Raises:
            Failure: what to tell the caller instead.
        """
        if isinstance(text, bytes):
            raise Failure(
                422, "Invalid JSON: send text messages, not binary", "INVALID_JSON"
            )
        message = parse_json(text, ())
        check(_validate_object, message, ())
        kind, known = message.get("type"), self.app.validate_message
        if not isinstance(kind, str) or kind not in known:
            words = f"Unknown message type: {kind!r}; known are {', '.join(known)}"
            raise Failure(422, words, "UNKNOWN_TYPE")
        check(known[kind], message, ())
        data = message.get("data", {})
        if kind == "step":
            plain: Collection[int] = ()
            if len(text) > LONG and text.isascii() and "\\" not in text:
                plain = set(map(id, data.values()))  # an echo of 1 MB: a tenth faster
            return self.step(data, {}, ("data",), OBSERVATION, plain)
        if kind == "reset":
            return self.reset(data, OBSERVATION)
        if kind == "state":
            return f'{{"type":"state","data":{self.state()}}}'
        if kind == "mcp":
            return client.encode_json({"type": "mcp", "data": mcp_answer(data)})
        return None

    def _observe(
        self,
        method: Callable[..., Any],
        given: dict[str, Any],
        action: tuple[Any, ...],
        around: tuple[str, str],
        plain: Collection[int] = (),
    ) -> str:
        """Call ``reset`` or ``step``, and make JSON of the observation it returns."""
        try:
            observation = self._run(method, *action, **given)
            return f"{around[0]}{_encode_result(observation, plain)}{around[1]}"
        except BaseException as error:
            raise _execution(error) from error

    def _run(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        if not isinstance(result, CoroutineType):
            return result
        if self._loop is None:
            import asyncio  # here, since few environments need it

            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(result)

    def __str__(self) -> str:
        if isinstance(self.key, tuple):
            return "-".join(map(str, self.key))
        return ascii(self.key) if self.key != SHARED else "(shared)"


# What a WebSocket message has around an observation.
OBSERVATION = ('{"type":"observation","data":', "}")


def _words(error: BaseException) -> str:
    """What an environment's exception says, or its name if it says nothing."""
    try:
        return str(error) or type(error).__name__
    except Exception:  # noqa: BLE001  # an exception's own __str__ may raise anything
        return type(error).__name__


def _execution(error: BaseException) -> Failure:
    log.error("the environment failed", exc_info=error)
    return Failure(500, _words(error), "EXECUTION_ERROR")


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
    method: Callable[..., Any], cls: type, data: dict[str, Any]
) -> dict[str, Any]:
    """Of what the caller sent, return what the environment's method takes."""
    names, any_name = _parameters(getattr(method, "__func__", method))
    types = client.field_types(cls)
    return {
        name: client.from_json(types.get(name, Any), value)
        for name, value in data.items()
        if (name in names or any_name) and name not in ("self", "action")
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
        TypeError: an instance instead of a class, or a type that has no JSON Schema.
        ValueError: more than one environment at a time of a class that does not allow it.
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
        if not max_message_mb > 0 or not session_timeout >= 0:
            raise ValueError(
                "max_message_mb must be above 0, session_timeout not below"
            )
        self.max_message_size = int(max_message_mb * (1 << 20))
        self.allow_origins = allow_origins
        try:
            self.schemas = {
                "action": json_schema(action_cls),
                "observation": json_schema(observation_cls),
                "state": _state_schema(env),
            }
        except RecursionError:
            raise TypeError(
                "a dataclass that contains itself has no schema here"
            ) from None
        self.step_schema = step_schema(self.schemas["action"])
        self.validate_step = validator(self.step_schema)
        self.validate_message = {
            kind: validator(schema)
            for kind, schema in message_schemas(self.schemas["action"]).items()
        }
        self.name = env_name or str(getattr(env, "__name__", "environment"))
        # The class itself must say so: a subclass may have changed its step.
        self.never_waits = getattr(env, "__dict__", {}).get("NEVER_WAITS") is True
        self.lock = threading.RLock()  # guards the sessions' comings and goings
        self._sessions: dict[object, Session] = {}

    @property
    def active(self) -> int:
        """The number of sessions that are open."""
        return len(self._sessions)

    @property
    def metadata(self) -> dict[str, Any]:
        """What ``GET /metadata`` answers."""
        module = sys.modules.get(getattr(self.env, "__module__", ""))
        beside = os.path.dirname(getattr(module, "__file__", None) or "")
        path = os.path.join(beside, "README.md")
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                readme = file.read()
        except OSError:
            readme = None  # it was not copied
        return {
            "name": self.name,
            "description": inspect.getdoc(self.env) or "",
            "version": getattr(module, "__version__", __version__),
            "readme_content": readme,
            "author": None,
            "documentation_url": None,
        }

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
            if self.active >= self.max_concurrent_envs:
                raise Failure(
                    503,
                    f"Server at capacity: {self.active} of {self.max_concurrent_envs} sessions are open",
                    "CAPACITY_REACHED",
                    active_sessions=self.active,
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
                session = session or self.open(name)
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
            threading.Thread(
                target=self._expire, args=(session, now), daemon=True
            ).start()

    def _expire(self, session: Session, seen: float) -> None:
        with session.lock:  # it may be slow to close: this is its own thread
            if session.used == seen:  # still nobody has used it
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


create_app = App  # OpenEnv's name for it


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
    return {**json_schema(BenchmarkState, extra=True), "title": "State"}


# ---------------------------------------------------------------------------
# HTTP
# ---------------------------------------------------------------------------

# RFC 9112 sections 3 and 5: the request line, and a field line without folding.
_REQUEST_LINE = re.compile(
    r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([!-~\x80-\xff]+) HTTP/([0-9])\.([0-9])"
)
_FIELD_LINE = re.compile(
    r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\x00-\x08\x0a-\x1f\x7f]*)\r?\n"
)


class Handler(BaseHTTPRequestHandler):
    """One connection: its requests, or after the opening handshake its WebSocket."""

    server: Server
    raw_requestline: bytes
    server_version = f"openenv-benchmark/{__version__}"
    disable_nagle_algorithm = True
    wbufsize = -1  # buffered: head and body leave in one packet

    def setup(self) -> None:
        super().setup()
        self.app = self.server.app
        # When this has passed, `tend` cuts the connection.
        self.deadline = time.monotonic() + HEADER_SECONDS
        self.fields: dict[str, str] = {}  # the header, names in lower case
        self.unread = False  # whether the peer may be sending what nobody will read
        self.websocket: client.WebSocket | None = None
        self.session: Session | None = None  # the WebSocket's
        self.lent = False  # whether the thread of this connection has left it to
        self.shared = False  # the `SharedThread`, and whether that serves it now
        self.long_steps = 0  # in a row
        self.error: Exception | None = None  # what happened there
        self.over = False  # whether the caller has said goodbye
        self.server.note(self, present=True)

    def finish(self) -> None:
        if self.lent:
            return
        try:
            super().finish()
            if self.unread:
                self.deadline = time.monotonic() + LINGER_SECONDS
                client.linger(self.connection, self.deadline, first=True)
        finally:
            self.server.note(self, present=False)

    # -- what other threads call ---------------------------------------------

    def tend(self, now: float) -> None:
        """Drop a peer that stalls, answer its pings, end its session when it idles too long."""
        if now > self.deadline:
            self.cut()
        elif self.websocket is not None:
            if not self.shared:
                self.websocket.tend()
                if self.shared:  # since a moment ago, and the other thread may not know
                    self.server.sharing.resume(self)
            if self.websocket.stalled(HEADER_SECONDS, SLOWEST_RATE):
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
        self.rfile.peek(1)  # type: ignore[attr-defined]  # waits for the first byte
        self.deadline = time.monotonic() + HEADER_SECONDS
        super().handle_one_request()
        if not self.close_connection:
            self.deadline = time.monotonic() + IDLE_SECONDS

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
        fields = self.fields
        self.unread = "content-length" in fields or "transfer-encoding" in fields
        connection = _tokens(fields.get("connection"))
        self.close_connection = "close" in connection or (
            match[4] == "0" and "keep-alive" not in connection
        )
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
            match = _FIELD_LINE.fullmatch(line.decode("latin-1"))
            if match is None:
                self.send_error(400, "a header line is not: Name: value")
                return False
            name, value = match[1].lower(), match[2].strip(" \t")
            joined = f"{self.fields[name]}, {value}" if name in self.fields else value
            self.fields[name] = joined

    def _serve(self) -> None:
        """Answer one request."""
        try:
            self._check_origin()
            self.path = self._decoded_path()
            methods = ROUTES.get(self.path)
            if methods is None:
                raise Failure(404, "Not Found: GET /docs shows what there is")
            if self.command not in methods:
                self._serve_no_method([*methods, "OPTIONS"])
                return
            body = self._read_body()
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

    def _serve_no_method(self, methods: Sequence[str]) -> None:
        allow = {"Allow": ", ".join(methods)}
        if self.command != "OPTIONS":
            raise Failure(
                405, f"Method Not Allowed: use {allow['Allow']}", headers=allow
            )
        self._read_body()
        self._respond(204, b"", headers=allow)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _serve
    do_TRACE = do_CONNECT = _serve

    def _decoded_path(self) -> str:
        if self.path.startswith("/"):
            return unquote(self.path.partition("?")[0])
        try:
            return unquote(urlsplit(self.path).path)  # GET http://host/path
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
        known = not host or host in named or _is_loopback(host)
        if self.server.loopback and not known:
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
        if coding is not None and (length or self.request_version == "HTTP/1.0"):
            raise self._unreadable(
                400, "send either Content-Length or, with HTTP/1.1, Transfer-Encoding"
            )
        if coding is not None and coding.lower() != "chunked":
            raise self._unreadable(501, "the only Transfer-Encoding known is chunked")
        if length is not None and not (
            length.isascii() and length.isdigit() and len(length) <= 18
        ):
            raise self._unreadable(400, "Content-Length must be one number")
        size = int(length or 0)
        self._check_size(size)
        expect = self.fields.get("expect", "").lower()
        if expect not in ("", "100-continue"):
            raise self._unreadable(417, "the only Expect known is 100-continue")
        if coding is None and not size:
            self.unread = False
            return b""
        media, *parameters = (
            part.strip().lower().replace('"', "")
            for part in self.fields.get("content-type", "application/json").split(";")
        )
        other = [
            p for p in parameters if p.startswith("charset=") and p != "charset=utf-8"
        ]
        if self.path != "/mcp" and (media != "application/json" or other):
            raise self._unreadable(
                415,
                "the body must be JSON in UTF-8: with curl, add -H 'Content-Type: application/json'",
            )
        if expect:
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.wfile.flush()
        began = time.monotonic()
        body = self._read_chunks(began) if coding else self._read_exactly(size, began)
        self.unread = False
        return body

    def _check_size(self, size: int) -> None:
        limit = self.app.max_message_size
        if size > limit:
            raise self._unreadable(413, f"the limit is {limit} bytes")

    def _unreadable(self, status: int, message: str) -> Failure:
        self.close_connection = True  # where the next request begins is not known
        return Failure(status, message)

    def _expect_more(self, began: float, received: int) -> None:
        """Give the peer time for more of a body: it may be slow, but not stall."""
        now = time.monotonic()
        slowest = began + HEADER_SECONDS + received / SLOWEST_RATE
        self.deadline = min(now + HEADER_SECONDS, slowest)

    def _read_exactly(self, size: int, began: float, before: int = 0) -> bytes:
        """Read ``size`` bytes of a body, after those ``before``."""
        body = bytearray()
        while len(body) < size:
            self._expect_more(began, before + len(body))
            data = self.rfile.read1(min(size - len(body), 1 << 20))
            if not data:
                raise ConnectionError("the peer went away within a body")
            body += data
        return bytes(body)

    def _read_chunks(self, began: float) -> bytes:
        """Decode ``Transfer-Encoding: chunked`` (RFC 9112 section 7.1)."""
        body = bytearray()
        while True:
            self._expect_more(began, len(body))
            line = self.rfile.readline(MAX_LINE)
            match = re.fullmatch(rb"([0-9A-Fa-f]{1,15})[ \t]*(;[^\r\n]*)?\r?\n", line)
            if match is None:
                raise self._unreadable(400, "a chunk does not begin with its size")
            size = int(match[1], 16)
            self._check_size(len(body) + size)
            if not size:
                break
            body += self._read_exactly(size, began, len(body))
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
        fields = {}
        if status != 204:
            fields["Content-Type"] = content_type
            fields["Content-Length"] = str(len(body))
        fields["X-Content-Type-Options"] = "nosniff"
        fields.update(headers or {})
        if self.close_connection:
            fields["Connection"] = "close"
        elif self.request_version == "HTTP/1.0":
            fields["Connection"] = "keep-alive"
        self._send_head(status, fields)
        if self.command != "HEAD" and status != 204:
            self.wfile.write(body)

    def _send_head(self, status: int, fields: Mapping[str, str]) -> None:
        """Write the status line and the header, in a third of http.server's time."""
        self.log_request(status)
        date = _http_date(int(time.time()))
        head = (
            f"HTTP/1.1 {status} {self.responses[status][0]}\r\n"
            f"Server: {self.server_version}\r\nDate: {date}\r\n"
        )
        for name, value in fields.items():
            head += f"{name}: {value}\r\n"
        self.wfile.write(f"{head}\r\n".encode("latin-1"))

    def send_error(
        self, code: int, message: str | None = None, explain: str | None = None
    ) -> None:
        """Refuse a request that http.server or `parse_request` could not read."""
        self.close_connection = self.unread = True
        self._respond(
            code, Failure(code, message or self.responses[code][0]).as_http().encode()
        )

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Log a request: escaped, so that what a client sends cannot forge a line."""
        step = code == 200 and self.path == "/step"  # of these there are too many
        level = logging.DEBUG if step else logging.INFO
        if log.isEnabledFor(level):
            request = ascii(self.requestline)
            log.log(level, "%s %s %s", self.client_address[0], request, code)

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
        accept = {"Sec-WebSocket-Accept": client.accept_key(key)}
        self._send_head(
            101, {"Upgrade": "websocket", "Connection": "Upgrade", **accept}
        )
        self.wfile.flush()
        self.connection.settimeout(0)
        early = self.rfile.read1(MAX_LINE) or b""
        for file in (self.rfile, self.wfile):  # frees 16 kB a session
            file.close()
        self.rfile = self.wfile = io.BytesIO()  # which http.server may flush and close
        self.fields = {}
        self.close_connection = True  # once the session is over
        # A socket of its own, since socketserver closes the other when this thread ends.
        self.connection = socket.socket(fileno=self.connection.detach())
        self.websocket = client.WebSocket(
            self.connection,
            client=False,
            max_size=self.app.max_message_size,
            early=early,
        )
        self._serve_session(self.websocket)

    def _upgrade_required(self, message: str) -> Failure:
        self.close_connection = True
        headers = {"Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        return Failure(426, message, headers=headers)

    def _serve_session(self, ws: client.WebSocket) -> None:
        """Serve one WebSocket session until its end, or until it is shared."""
        code: int | None = client.NORMAL
        try:
            session = self.session or self.app.open(("ws", next(_numbers)))
            self.session = session
            try:
                session.open()
                code = self._converse(ws, session)
            finally:
                if code is not None:
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
            self._last_words(ws, Failure(500, f"{type(error).__name__}: {error}"))
        if code is None:
            return
        self.deadline = time.monotonic() + LINGER_SECONDS
        reason = "the server is shutting down" if code == client.GOING_AWAY else ""
        ws.close(code, reason, LINGER_SECONDS)

    def _last_words(self, ws: client.WebSocket, failure: Failure) -> None:
        try:
            ws.send(failure.as_message())
        except ConnectionError as error:
            log.debug("%s %s", self.client_address[0], error)

    def _converse(self, ws: client.WebSocket, session: Session) -> int | None:
        """Answer each message with one, in order; return why it is over, None if it is shared."""
        if self.error:
            raise self.error
        ws.flush()
        while not (self.over or self.server.stopping):
            alone = self.app.active == 1
            if not (alone or self.lent) and ws.idle and self.server.sharing.take(self):
                return None
            message = ws.recv(client.EAGER_SECONDS if alone else 0)
            self._exchange(ws, session, message, wait=True)
        return client.NORMAL if self.over else client.GOING_AWAY

    def _exchange(
        self,
        ws: client.WebSocket,
        session: Session,
        message: str | bytes,
        wait: bool,
    ) -> None:
        """Answer a message, or note that the caller says goodbye."""
        with session.lock:  # so that no Close frame comes between the two
            began = time.monotonic()
            try:
                answer = None if ws.closing else session.answer(message)
            except Failure as failure:
                answer = failure.as_message()
            if answer is None:
                self.over = True
                return
            session.used = time.monotonic()
            long = session.used - began > LONG_STEP_SECONDS
            self.long_steps = self.long_steps + 1 if long else 0
            ws.send(answer, wait)

    def serve_arrived(self) -> bool:
        """Answer a message that has arrived, and do not wait; `SharedThread` calls this.

        Return False if the session needs a thread of its own from here on: it ends, a part
        of a message has come, the peer does not take an answer, or steps take long.
        """
        ws, session = self.websocket, self.session
        assert ws and session
        try:
            if ws.tend():
                self._exchange(ws, session, ws.recv(), wait=False)
        except Exception as error:  # noqa: BLE001  # `_converse` raises it again
            self.error = error
        over = self.error or self.over or self.server.stopping
        if over or self.long_steps > 2 or ws.unsent:
            return False
        if ws.kept:  # it is the others' turn first
            self.server.sharing.resume(self)
            return True
        return ws.idle

    def serve_alone(self) -> None:
        """Go on with a session that was shared."""
        assert self.websocket
        try:
            self._serve_session(self.websocket)
        finally:
            self.server.note(self, present=False)

    # -- the answers, by route ---------------------------------------------------

    def _session_name(self) -> str:
        name = self.fields.get("x-session-id")
        if name is not None:
            check(_validate_session_id, name, ("header", "x-session-id"))
        return name or SHARED

    def _body(self, body: bytes, validate: Validator) -> dict[str, Any]:
        data: dict[str, Any] = parse_json(body, ("body",)) if body.strip() else {}
        check(validate, data, ("body",))
        return data

    def post_reset(self, body: bytes) -> None:
        data = self._body(body, _validate_reset)
        with self.app.use(self._session_name(), create=True) as session:
            answer = session.reset(data)
        self._send_json(answer)

    def post_step(self, body: bytes) -> None:
        data, name = self._body(body, self.app.validate_step), self._session_name()
        action = data.pop("action")
        with self.app.use(name, create=name == SHARED) as session:
            answer = session.step(action, data, ("body", "action"))
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
        # Relative: there may be a path prefix.
        headers = {"Location": REDIRECTS[self.path]}
        self._respond(307, b"", "text/plain", headers)

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


@functools.lru_cache(maxsize=1)
def _http_date(second: int) -> str:
    """Return an HTTP date; making one anew for each answer is a tenth of its cost."""
    return formatdate(second, usegmt=True)


def _tokens(value: str | None) -> list[str]:
    """Return the comma-separated tokens of a header field, in lower case."""
    return [token.strip() for token in (value or "").lower().split(",")]


@functools.lru_cache(maxsize=256)
def _authority(text: str) -> str:
    """Return host and port as in a URL, comparable: lower case, no default port."""
    return re.sub(r":(80|443)$", "", text.strip().lower())


@functools.lru_cache(maxsize=256)
def _is_loopback(authority: str) -> bool:
    match = re.fullmatch(
        r"(?:\[([0-9a-f:.]+)\]|([^:/?#@\\\[\]]+))(?::[0-9]+)?", authority
    )
    host = (match[1] or match[2]) if match else ""
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

    request_queue_size = 1024  # connections that wait to be accepted
    allow_reuse_address = os.name == "posix"  # on Windows it would share a busy port

    def __init__(self, app: App, host: str, port: int) -> None:
        self.address_family = socket.getaddrinfo(host, port)[0][0]
        self.app = app
        self.connections: set[Handler] = set()
        self._lock = threading.Lock()  # guards them
        self.stopping = False
        self.loopback = _is_loopback(f"[{host}]" if ":" in host else host)
        hosts = [*app.allow_origins, os.environ.get("SPACE_HOST", "")]
        self.named_hosts = {
            _authority(h.rpartition("://")[2].rstrip("/")) for h in hosts
        } - {""}
        self._next_look = 0.0
        self.sharing = SharedThread(app)
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

    def note(self, connection: Handler, present: bool) -> None:
        """Note that a connection has come or gone."""
        with self._lock:
            (self.connections.add if present else self.connections.discard)(connection)

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
        self._look_after(now)

    def _look_after(self, now: float) -> None:
        """Tend every connection; what goes wrong with one must not stop this for all."""
        for connection in self._all():
            try:
                connection.tend(now)
            except Exception:
                log.exception("looking after %s failed", connection.client_address)
        try:
            self.app.expire(now)
        except RuntimeError:
            log.exception("no thread could be started to close idle sessions")

    def _all(self) -> list[Handler]:
        with self._lock:
            return list(self.connections)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
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
            for connection in self._all():
                connection.say_goodbye("the server is shutting down")
            self._look_after(time.monotonic())
            time.sleep(0.02)
        for connection in self._all():
            connection.cut()
        self.app.end_all()
        self.sharing.stop()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


class SharedThread:
    """One thread that serves the sessions of an environment which never waits, in turn.

    Many threads hand the interpreter lock around, and each time another one must wake up:
    that takes longer than an echo, and this serves twice the steps. Only while they are
    plain, though: a session in which something may take long gets a thread of its own.
    """

    def __init__(self, app: App) -> None:
        # Where nothing can be sent without waiting, as on Windows, there is nothing to share.
        self._usable = app.never_waits and hasattr(socket, "MSG_DONTWAIT")
        self._lock = threading.Lock()  # guards the start and the end
        self._selector: selectors.BaseSelector | None = None
        self._due: deque[Handler] = deque()
        self._stopped = False

    def take(self, handler: Handler) -> bool:
        """Serve the session of ``handler`` from now on; return False if this cannot be."""
        with self._lock:
            if not self._usable or self._stopped:
                return False
            if self._selector is None and not self._start():
                return False
            assert self._selector
            self._selector.register(handler.connection, selectors.EVENT_READ, handler)
            handler.lent = handler.shared = True
        if handler.websocket and not handler.websocket.idle:
            self.resume(handler)  # since the caller looked, `tend` has read something
        return True

    def _start(self) -> bool:
        self._selector = selectors.DefaultSelector()
        try:
            threading.Thread(target=self._run, daemon=True, name="sessions").start()
        except RuntimeError:  # there are too many
            self._selector.close()
            self._selector = None
        return self._selector is not None

    def resume(self, handler: Handler) -> None:
        """Serve a session soon, even if nothing arrives for it."""
        self._due.append(handler)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True

    def _run(self) -> None:
        assert self._selector
        while not self._stopped:
            timeout = 0 if self._due else TICK_SECONDS
            found = [key.data for key, _ in self._selector.select(timeout)]
            while self._due:
                found.append(self._due.popleft())
            for handler in found:
                try:
                    if handler.shared and not handler.serve_arrived():
                        self._give_back(handler)
                except Exception:  # what goes wrong with one must not stop this for all
                    log.exception("serving session %s failed", handler.session)
        for key in list(self._selector.get_map().values()):
            key.data.connection.close()
        self._selector.close()

    def _give_back(self, handler: Handler) -> None:
        assert self._selector
        self._selector.unregister(handler.connection)
        handler.shared = False
        if handler.websocket and handler.websocket.gone:
            handler.serve_alone()  # to its end, which takes no time
            return
        try:
            threading.Thread(target=handler.serve_alone, daemon=True).start()
        except RuntimeError as error:
            log.error("session %s is lost: %s", handler.session, error)
            handler.cut()
            handler.serve_alone()  # to its end, which the cut has brought


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
        return {k: example(v) for k, v in schema.get("properties", {}).items()}
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
    return {
        "openapi": "3.1.0",
        "info": {
            "title": app.name,
            "description": app.metadata["description"],
            "version": __version__,
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "parameters": {"SessionId": _SESSION_ID},
            "responses": {code: _error(code, *row) for code, *row in _rows(_ERRORS)},
        },
    }


def _content(schema: str, given: Any) -> dict[str, Any]:
    examples = {"example": {"summary": "An example", "value": given}}
    ref = {"$ref": f"#/components/schemas/{schema}"}
    return {"application/json": {"schema": ref, "examples": examples}}


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
        fault = _fault("missing", "Field required", ("body", "action"), {})
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
        "StepRequest": app.step_schema,
        "StepResult": _object(
            "An observation, its reward, and whether the episode is over",
            observation=observation,
            reward={"anyOf": [{"type": "number"}, {"type": "null"}]},
            done={"type": "boolean"},
        ),
        "Status": _object("How it stands", status=_STRING),
        "Nothing": {"type": "object", "description": "No key means anything here"},
        "Anything": _OBJECT,
        "Schemas": _object(
            "JSON Schemas", action=_OBJECT, observation=_OBJECT, state=_OBJECT
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
    add("--version", action="version", version=f"%(prog)s {__version__}")
    # One clear line, and no usage text above it.
    parser.error = lambda message: parser.exit(2, f"server.py: {message}\n")  # type: ignore[method-assign]
    options = parser.parse_args(argv)
    if options.reload:
        return _reload(sys.argv[1:] if argv is None else argv, options.env)
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=options.log_level.upper(), handlers=[handler])
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
        server = _Program(app, options.host, options.port)
    except (ImportError, SyntaxError, TypeError, ValueError) as error:
        parser.error(f"--env {options.env}: {error}")
    except (OSError, OverflowError) as error:
        parser.error(f"cannot listen on {options.host} port {options.port}: {error}")
    # What a line of the log does not show need not be found out (logging HOWTO, Optimization).
    logging.logProcesses = logging.logThreads = False
    logging._srcfile = None
    client.raise_file_limit()
    # Made and freed: glibc's malloc takes its measure from it (mallopt(3), M_MMAP_THRESHOLD),
    # and keeps the memory of a message of 1 MB for the next. That saves a quarter of a step.
    bytes(8 << 20)
    _stop_on_signals(server)
    url = server.url
    print(f"{app.name} on {url}: play at {url}/web, API at {url}/docs", flush=True)
    server.serve_forever()
    server.stop()
    logging.shutdown()
    # Not a return: an environment that is stuck in a thread of its own would hold it up.
    os._exit(0)


class _Program(Server):
    """A server that has the interpreter to itself."""

    def _look_after(self, now: float) -> None:
        """Also tune how long a thread runs before others that want to may interrupt it.

        20 ms at least, so that each gets more done per turn. And since all that wait wake
        up once in that time to ask for their turn, longer if they are many.
        """
        super()._look_after(now)
        sys.setswitchinterval(max(0.02, len(self.connections) * 0.0002))


class _Formatter(logging.Formatter):
    """Escapes what could forge a line or steer a terminal; indents all lines but the first."""

    _ESCAPES = {  # noqa: RUF012
        c: f"\\x{c:02x}" for c in [*range(32), *range(127, 160)] if chr(c) not in "\t\n"
    }

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).translate(self._ESCAPES).replace("\n", "\n    ")


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
        module_name = f"{__package__}.benchmark"  # the default, copied into a package
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


def _stop_on_signals(server: Server) -> None:
    """Let SIGINT and SIGTERM end `serve_forever`; after that, SIGINT ends the process."""
    import signal

    def stop(signum: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Not here: the loop to be stopped is what this interrupts.
        threading.Thread(target=server.shutdown, daemon=True).start()

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, stop)


def _reload(argv: Sequence[str], env: str) -> int:
    """Run the server in a child process, and again whenever a source file has changed."""
    import signal
    import subprocess
    from pathlib import Path

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
            child.terminate()
            child.wait()
        first = False


# ---------------------------------------------------------------------------
# The pages
# ---------------------------------------------------------------------------


@functools.cache
def page(path: str) -> tuple[bytes, str]:
    """Return a page and its Content-Security-Policy: nothing but what is in it may run."""
    from hashlib import sha256

    body, script = {"/web": (WEB_BODY, WEB_SCRIPT), "/docs": (DOCS_BODY, DOCS_SCRIPT)}[
        path
    ]
    script = COMMON_SCRIPT + script
    hashes = [
        "sha256-" + base64.b64encode(sha256(text.encode()).digest()).decode()
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


STYLE = r"""
:root {
  color-scheme: light dark;
  --page: #f6f6f3; --card: #ffffff; --inset: #f3f3ef; --line: #dcdcd5; --edge: #85867f;
  --text: #1d1f23; --muted: #5b5e66; --accent: #1b5cc4; --on-accent: #ffffff;
  --second: #a64b00; --good: #14713f; --bad: #b3261e;
  --small: 0.8125rem; --normal: 0.9375rem; --large: 1.125rem; --huge: 1.5rem; --gap: 1.25rem;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121316; --card: #1a1c20; --inset: #131519; --line: #30333a; --edge: #7b7f88;
    --text: #e8e8e5; --muted: #a4a8b1; --accent: #82b1ff; --on-accent: #0c1526;
    --second: #f2a65e; --good: #6fd095; --bad: #ff9188;
  }
}

/* Text */
* { box-sizing: border-box; }
html { scroll-padding-top: 6.25rem; }  /* what Tab or a link brings into sight stays clear of the bar */
[hidden] { display: none !important; }
body { margin: 0; background: var(--page); color: var(--text); }
body, button, input, select, textarea { font: var(--normal)/1.5 system-ui, sans-serif; }
h1, h2, h3, h4, p, dl, dd, ol, ul, pre { margin: 0; padding: 0; }
h1, h2 { font-size: var(--large); line-height: 1.3; }
h3 { margin: var(--gap) 0 0.375rem; font-size: var(--normal); }
h2 + p, h2 + dl, h2 + .fields { margin-top: 0.5rem; }
h4, .muted, .note, dt { color: var(--muted); font-size: var(--small); font-weight: normal; }
a { color: var(--accent); }
pre, code, kbd, .code, .values dd, #history td { font-family: var(--mono); font-size: var(--small); }
pre, .values dd, #history td, .wire code { white-space: pre-wrap; overflow-wrap: anywhere; }
pre { overflow: auto; max-height: 24rem; padding: 0.75rem; border-radius: 6px; background: var(--inset); }
kbd { padding: 0 0.3em; border: 1px solid var(--line); border-radius: 4px; white-space: nowrap; }
summary { border-radius: 4px; cursor: pointer; }
details > pre, .row + pre { margin-top: 0.375rem; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.good { color: var(--good); }
.fault, .field [aria-invalid=true] + .note { color: var(--bad); }
.sr { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }

/* The frame: a bar that stays in sight, then cards */
.bar {
  position: sticky; top: 0; z-index: 1; min-height: 3.75rem; padding: 0.625rem var(--gap);
  display: flex; flex-wrap: wrap; align-items: center; gap: 0.375rem 1rem;
  border-bottom: 1px solid var(--line); background: var(--card);
}
.bar h1 { flex: 1 1 50%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bar nav { display: flex; gap: 1rem; }
main { display: grid; grid-template-columns: minmax(0, 1fr); gap: var(--gap); padding: var(--gap); }
.play { max-width: 120rem; margin: auto; }
/* Nothing is shown before all of it is drawn, so that nothing moves; only a fault is. */
.play:has(#action:empty), .manual:has(#operations:empty) { visibility: hidden; }
#fault { visibility: visible; }
.column { display: contents; }
.quick { order: 1; }
.lead { min-height: 1.5em; color: var(--muted); }
section { padding: var(--gap); border: 1px solid var(--line); border-radius: 10px; background: var(--card); }
.row { display: flex; flex-wrap: wrap; align-items: center; gap: 0.5rem 0.75rem; }
.row > p { flex: 1; }

/* Controls */
button {
  min-height: 2.25rem; padding: 0 0.875rem; border: 1px solid var(--edge); border-radius: 6px;
  background: var(--card); color: inherit; cursor: pointer;
}
button:hover, button[aria-pressed=true] { border-color: var(--accent); color: var(--accent); }
button.primary { border-color: var(--accent); background: var(--accent); color: var(--on-accent); }
button.primary:hover { filter: brightness(1.1); }
button.quiet { min-height: 1.75rem; padding: 0 0.625rem; border-color: var(--line); font-size: var(--small); }
button:disabled { border-color: var(--line); background: var(--inset); color: var(--muted); cursor: default; }
input, select, textarea {
  display: block; width: 100%; min-height: 2.25rem; padding: 0.375rem 0.625rem;
  border: 1px solid var(--edge); border-radius: 6px; background: var(--card); color: inherit;
}
input[type=checkbox] { width: 1.125rem; min-height: 1.125rem; accent-color: var(--accent); }
textarea { min-height: 3.75rem; max-height: 16rem; resize: vertical; field-sizing: content; }
textarea[rows="1"] { min-height: 2.25rem; }
::placeholder { color: var(--muted); opacity: 1; }
form + form { margin-top: var(--gap); padding-top: var(--gap); border-top: 1px solid var(--line); }
.fields { display: grid; gap: 0.5rem 0.75rem; margin-bottom: 0.5rem; }
.pair { grid-template-columns: 1fr 1fr; }
.pair .field { display: grid; grid-row: span 3; grid-template-rows: subgrid; row-gap: 0; }
.pair label { align-content: end; }
.field label { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 0.5rem; margin-bottom: 0.25rem; }
.field:has([type=checkbox]) { display: grid; grid-template-columns: auto 1fr; gap: 0 0.5rem; }
.field:has([type=checkbox]) label { order: 1; }
.field:has([type=checkbox]) .note { order: 2; grid-column: 1 / -1; }
.field [aria-invalid=true] { border-color: var(--bad); }
.note { min-height: 1.5em; margin-top: 0.125rem; overflow-wrap: anywhere; }
#action { min-height: 12rem; margin-top: 0.75rem; align-content: start; }
#action-about { min-height: 1.5em; }

/* The connection */
#status { display: flex; flex: 1 1 30%; align-items: center; gap: 0.5rem; font-size: var(--small); }
#status::before { flex: none; width: 0.625rem; height: 0.625rem; border-radius: 50%; content: ''; }
#status::before { background: var(--muted); }
#status[data-state=open]::before { background: var(--good); }
#status[data-state=closed] { color: var(--bad); }
#status[data-state=closed]::before { background: var(--bad); }
.bar #status { flex-basis: 60%; }
#reconnect { font-size: var(--small); }
#reconnect:disabled { visibility: hidden; }

/* Now */
.figures { display: grid; grid-template-columns: 1fr 1fr; gap: 0.5rem; }
.figures dd { font-size: var(--huge); line-height: 1.3; overflow-wrap: anywhere; }
.figures dd, .number, time, .latency { font-variant-numeric: tabular-nums; }
.values { display: grid; grid-template-columns: minmax(6rem, max-content) minmax(0, 1fr); }
.values { gap: 0.25rem 1rem; align-content: start; min-height: 3rem; }
.values dd { overflow: auto; max-height: 12rem; }
#observation { min-height: 5.5rem; }
#now { transition: opacity 0.2s; }
#now[aria-busy] { opacity: 0.55; transition-delay: 0.3s; }

/* The chart */
#chart { display: block; width: 100%; height: 276px; margin-top: 0.75rem; }
#chart text { fill: var(--muted); font-size: 12px; }
#chart .reward { color: var(--accent); }
#chart .total { color: var(--second); }
#chart .title { fill: currentColor; }
#chart .line { fill: none; stroke: currentColor; stroke-width: 1.5; stroke-linejoin: round; }
#chart .dots { stroke: currentColor; stroke-width: 5; stroke-linecap: round; }
#chart .axis path { stroke: var(--line); }
#chart .axis .zero { stroke: var(--edge); }
#chart .cursor { stroke: var(--muted); stroke-dasharray: 2 3; }
#chart .reading { fill: var(--text); text-anchor: end; }

/* Tables */
.scroll { position: relative; overflow: auto; margin-top: 0.75rem; }
.scroll { border: 1px solid var(--line); border-radius: 6px; }
table { width: 100%; border-collapse: collapse; }
th, td { padding: 0.375rem 0.5rem; font-size: var(--small); text-align: left; vertical-align: top; }
th { position: sticky; top: 0; background: var(--inset); color: var(--muted); }
td { border-top: 1px solid var(--line); }
.play .scroll { height: 22rem; }
.play table { min-width: 30rem; table-layout: fixed; }
.play .number { width: 5rem; text-align: right; }
.play .step { width: 3.5rem; }
#history td { line-break: anywhere; }
#history .muted { white-space: nowrap; }

/* The wire */
.wire { position: relative; overflow: auto; height: 32rem; margin-top: 0.75rem; list-style: none; }
.wire:empty::before { color: var(--muted); content: 'No messages yet'; }
.wire li { border-top: 1px solid var(--line); }
.wire summary { display: flex; flex-wrap: wrap; gap: 0 0.75rem; padding: 0.375rem 0.25rem; }
.wire, .wire summary { font-size: var(--small); }
.wire summary code { flex-basis: 100%; padding-left: 1.6rem; }
.wire .arrow { width: 1em; font-weight: bold; text-align: center; }
.wire .sent .arrow { color: var(--accent); }
.wire .received .arrow { color: var(--good); }
.wire time, .wire .latency { color: var(--muted); }
#quick { white-space: pre; }

/* The API */
.manual { display: grid; grid-template-columns: minmax(0, 1fr); max-width: 84rem; margin: auto; }
.manual p + p { margin-top: 0.5rem; }
.manual .fault:empty { display: none; }
#contents { display: flex; flex-wrap: wrap; gap: 0.75rem 2rem; padding: var(--gap) var(--gap) 0; }
#contents h2, #contents a { font-size: var(--small); }
#contents a { display: block; padding: 0.125rem 0; color: inherit; text-decoration: none; }
#contents a:hover { text-decoration: underline; }
#contents ul, .outline { list-style: none; }
#operations { display: grid; gap: var(--gap); }
#operations > section > details { margin-top: 0.5rem; border-top: 1px solid var(--line); }
#operations > section > details > summary { padding-top: 0.5rem; }
#operations summary > code { margin-right: 0.75rem; font-weight: bold; }
.method { display: inline-block; min-width: 2.75rem; color: var(--good); font: bold 0.6875rem var(--mono); }
.method.post { color: var(--accent); }
.operation { padding: 0.5rem 0 var(--gap) 1rem; }
.operation details { padding: 0.25rem 0; }
.operation form, #console { display: grid; gap: 0.5rem; margin-top: 0.75rem; }
.operation form, #console, .exchange { grid-template-columns: minmax(0, 1fr); }
.outline { padding-left: 1rem; border-left: 2px solid var(--line); font-size: var(--small); }
.outline li { padding: 0.125rem 0; overflow-wrap: anywhere; }
.listing { margin-top: 0.5rem; }
.listing h4 { flex: 1; }
.listing button { border-color: transparent; color: var(--muted); }
.exchange { display: grid; gap: 0 var(--gap); padding-top: 0.5rem; }
.exchange + .exchange { margin-top: var(--gap); }
#console + .wire { height: 20rem; }

@media (min-width: 1000px) {
  .bar { flex-wrap: nowrap; }
  .bar h1 { flex: 0 1 auto; }
  .bar nav { order: 1; margin-left: auto; }
  #name { min-width: 12rem; }
  .bar #status { flex-basis: 18rem; }
}
@media (min-width: 760px) {
  .figures { grid-template-columns: repeat(4, minmax(0, 1fr)); }
  .column { display: grid; grid-template-columns: minmax(0, 1fr); gap: var(--gap); align-content: start; }
  .play { grid-template-columns: minmax(18rem, 5fr) minmax(0, 8fr); }
  .play .lead, .play .column:last-child { grid-column: 1 / -1; }
}
@media (min-width: 960px) {
  .manual { grid-template-columns: 15rem minmax(0, 1fr); }
  #contents { position: sticky; top: 4rem; align-self: start; flex-direction: column; padding-right: 0; }
  .exchange { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .exchange > p { grid-column: 1 / -1; }
}
@media (min-width: 1280px) {
  .play { grid-template-columns: minmax(20rem, 24rem) minmax(0, 1fr) minmax(20rem, 28rem); }
  .play .column:last-child { grid-column: auto; }
  .aside { position: sticky; top: 5rem; }
  .aside .wire { height: calc(100vh - 12rem); min-height: 24rem; }
}
@media (max-width: 599px) {  /* room to say why the connection was lost, so that nothing moves */
  .bar #status { min-height: 3lh; }
  html { scroll-padding-top: 10rem; }
}
@media (prefers-reduced-motion: reduce) { * { transition: none !important; } }
"""

COMMON_SCRIPT = r"""
'use strict';

// ---- Elements ------------------------------------------------------------------------------------------

const $ = id => document.getElementById(id);

/** Makes an element. Children that are strings become text, never HTML: so does all that a server says. */
function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== false) element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.filter(child => child !== undefined));
  return element;
}

const clip = (text, limit) => text.length <= limit ? text : text.slice(0, limit) + '\u2026';

/** Long text as several text nodes: one node of 100,000 mixed characters can take seconds to lay out. */
const pieces = text => text.match(/.{1,2000}/gsu) ?? [];

/** A text when it is short; else its beginning, which opens to the whole. */
function fold(text, limit, whole = text => text) {
  if (text.length <= limit) return el('span', {}, text);
  const size = el('span', {class: 'muted'}, ` ${text.length.toLocaleString('en')} characters`);
  return drawer([clip(text, limit), size], () => el('pre', {tabindex: 0}, ...pieces(whole(text))));
}

/** A <details> whose content is built when it is first opened. */
function drawer(summary, content, attributes = {}) {
  const details = el('details', attributes, el('summary', {}, ...summary));
  details.addEventListener('toggle', () => details.append(content()), {once: true});
  return details;
}

/** Copies the text of `source`: in the old way where the new one is not allowed (over http, in a frame). */
function copyButton(source) {
  const button = el('button', {type: 'button', class: 'quiet'}, 'Copy');
  button.addEventListener('click', async () => {
    const byHand = () => {
      getSelection().selectAllChildren(source);
      if (!document.execCommand('copy')) throw new Error('not allowed');
    };
    try {
      await (navigator.clipboard?.writeText(source.textContent).catch(byHand) ?? byHand());
      button.textContent = 'Copied';
    } catch {
      button.textContent = 'Press Ctrl+C';
    }
    setTimeout(() => { button.textContent = 'Copy'; }, 1500);
  });
  return button;
}

/** A function that has `draw` called at the next frame: once, however often it was asked for. */
function perFrame(draw) {
  let asked = false;
  return () => {
    if (!asked) requestAnimationFrame(() => { asked = false; draw(); });
    asked = true;
  };
}

// ---- Text ----------------------------------------------------------------------------------------------

const CLOCK = new Intl.DateTimeFormat('en-GB', {
  hour: '2-digit', minute: '2-digit', second: '2-digit', fractionalSecondDigits: 3,
});

const duration = ms => ms < 1000 ? `${ms.toFixed(1)} ms` : `${(ms / 1000).toFixed(2)} s`;

/** Indents JSON text without parsing it, so that every number and escape stays as it was on the wire. */
function indent(text) {
  let depth = 0;
  const line = change => '\n' + '  '.repeat(depth += change);
  return text.replace(/"[^"\\]*(?:\\.[^"\\]*)*"|[{[]\s*[}\]]|[{}[\],:]|\s+/g, token => {
    if (token[0] === '"' || token.length > 1 && '{['.includes(token[0])) return token;
    if ('{['.includes(token)) return token + line(1);
    if ('}]'.includes(token)) return line(depth && -1) + token;
    return token === ',' ? ',' + line(0) : token === ':' ? ': ' : '';
  });
}

// ---- The server ----------------------------------------------------------------------------------------

/** Addresses are relative to the page, so it also works behind a path prefix, over TLS and in a frame. */
const address = path => new URL(path, document.baseURI);

async function getJSON(path) {
  const response = await fetch(address(path));
  if (!response.ok) throw new Error(`GET ${path}: ${response.status} ${response.statusText}`);
  return response.json();
}

/** Errors after which the server closes. */
const FATAL = ['CAPACITY_REACHED', 'FACTORY_ERROR', 'SESSION_ERROR'];

/** One WebSocket to `ws`: one connection, one environment, one session. */
class Session {
  /** `log` is a WireLog; `onstate(name, reason)` hears 'connecting', 'open' and 'closed'. */
  constructor(log, onstate) {
    Object.assign(this, {log, onstate, waiting: []});
  }

  connect() {
    const url = address('ws');
    url.protocol = url.protocol.replace('http', 'ws');
    let lastWords = '';
    const socket = this.socket = new WebSocket(url);
    this.onstate('connecting', '');
    socket.onopen = () => {
      this.log.add('note', `open ${url}`);
      this.onstate('open', '');
    };
    socket.onmessage = ({data: text}) => {
      // Every message gets one answer, in order: so this one belongs to the oldest that still waits.
      const request = this.waiting.shift();
      const latency = request && performance.now() - request.sent;
      this.log.add('received', text, latency);
      const message = JSON.parse(text);
      if (FATAL.includes(message.data?.code)) lastWords = message.data.message;
      request?.resolve({...message, latency});
    };
    socket.onclose = ({code, reason, wasClean}) => {
      this.log.add('note', `closed, code ${code}${reason && ': ' + reason}`);
      const why = wasClean ? lastWords || reason || 'closed' : 'connection lost';
      this.onstate('closed', `${why} (code ${code})`);
      for (const {reject} of this.waiting.splice(0)) reject(new Error('Closed before the answer.'));
    };
  }

  /** Sends a text as it is, and promises the answer with its `latency` in ms. */
  send(text, answered = true) {
    return new Promise((resolve, reject) => {
      if (this.socket?.readyState !== WebSocket.OPEN) throw new Error('Not connected.');
      if (answered) this.waiting.push({sent: performance.now(), resolve, reject});
      this.socket.send(text);
      this.log.add('sent', text);
      if (!answered) resolve();
    });
  }
}

/** What went over the wire: the last LIMIT entries, newest first. */
class WireLog {
  static LIMIT = 100;
  static ARROWS = {sent: '\u2192', received: '\u2190', note: '\u00b7'};

  constructor(list, pause, clear) {
    Object.assign(this, {list, pause, paused: false, queue: [], redraw: perFrame(() => this.draw())});
    pause.addEventListener('click', () => {
      this.paused = !this.paused;
      pause.setAttribute('aria-pressed', this.paused);
      this.draw();
    });
    clear.addEventListener('click', () => {
      this.queue = [];
      list.replaceChildren();
      this.draw();
    });
  }

  add(direction, text, latency) {
    this.queue.push({direction, text, latency, time: new Date()});
    if (this.queue.length > WireLog.LIMIT) this.queue.shift();
    this.redraw();
  }

  draw() {
    this.pause.textContent = this.paused ? `Resume (${this.queue.length})` : 'Pause';
    if (this.paused) return;
    this.list.prepend(...this.queue.splice(0).reverse().map(entry => this.entry(entry)));
    while (this.list.childElementCount > WireLog.LIMIT) this.list.lastElementChild.remove();
  }

  entry({direction, text, latency, time}) {
    const summary = [
      el('span', {class: 'arrow', title: direction}, WireLog.ARROWS[direction]),
      el('span', {class: 'sr'}, direction),
      el('time', {}, CLOCK.format(time)),
      el('span', {class: 'latency'}, latency === undefined ? '' : duration(latency)),
      el('code', {}, clip(text, 160)),
    ];
    const whole = () => el('pre', {tabindex: 0}, ...pieces(indent(text)));
    return el('li', {class: direction}, drawer(summary, whole));
  }
}

// ---- JSON Schema ---------------------------------------------------------------------------------------

/** A schema with its `$ref` followed inside `root`, and `anyOf: [X, null]` read as X with `nullable`. */
function resolve(schema, root) {
  if (schema?.$ref) {
    const {$ref, ...rest} = schema;
    const target = $ref.slice(2).split('/').reduce((node, key) => node?.[decodeURIComponent(key)], root);
    return {...resolve(target, root), ...rest};
  }
  const {anyOf, oneOf, type, ...rest} = schema ?? {};
  const options = anyOf ?? oneOf ?? (Array.isArray(type) ? type.map(name => ({type: name})) : undefined);
  if (!options) return {...schema};
  const some = options.filter(option => option.type !== 'null');
  const nullable = some.length < options.length;
  return {...(some.length === 1 ? resolve(some[0], root) : {options: some}), ...rest, nullable};
}

/** Its type in words: "string", "list of integer", "string or null". */
function typeName(schema, root) {
  const {type, options, items, nullable, enum: values, const: only} = resolve(schema, root);
  let name = type ?? 'any';
  if (values) name = values.map(value => JSON.stringify(value)).join(' | ');
  else if (only !== undefined) name = JSON.stringify(only);
  else if (options) name = options.map(option => typeName(option, root)).join(' or ');
  else if (type === 'array' && items) name = `list of ${typeName(items, root)}`;
  return nullable ? `${name} or null` : name;
}

/** A value that fits the schema: its own example if it has one; of an object what is required, or `all`. */
function example(schema, root, all = false) {
  const {type, options, nullable, required, properties, items, ...rest} = resolve(schema, root);
  const {minItems = 0, minLength = 0, maxLength, minimum = 0} = rest;
  const given = [rest.examples?.[0], rest.example, rest.const, rest.default, rest.enum?.[0]];
  const first = given.find(value => value !== undefined);
  if (first !== undefined) return first;
  if (options) return example(options[0], root, all);
  if (nullable) return null;
  if (type === 'object') {
    const wanted = Object.entries(properties ?? {}).filter(([name]) => all || required?.includes(name));
    return Object.fromEntries(wanted.map(([name, property]) => [name, example(property, root, all)]));
  }
  if (type === 'array') return Array.from({length: minItems}, () => example(items, root, all));
  if (type === 'string') return 'Hello, World!'.padEnd(minLength, '!').slice(0, maxLength);
  return {integer: minimum, number: minimum, boolean: false}[type] ?? null;
}

/** Form fields for the properties of an object schema. Each shows its faults in place of its description. */
class Fields {
  constructor(container, schema, root = schema) {
    const {properties = {}, required = []} = resolve(schema, root);
    const names = Object.keys(properties).sort((a, b) => required.includes(b) - required.includes(a));
    this.root = root;
    this.whole = !names.length;  // an action with no properties of its own is written as one JSON value
    this.fields = this.whole
      ? [this.field('JSON', {type: 'object'}, false, container.id)]
      : names.map(name => this.field(name, properties[name], required.includes(name), container.id));
    container.replaceChildren(...this.fields.map(field => field.element));
    container.addEventListener('keydown', event => {
      const {key, shiftKey, isComposing, target} = event;
      if (key !== 'Enter' || shiftKey || isComposing || target.tagName !== 'TEXTAREA') return;
      event.preventDefault();
      container.closest('form')?.requestSubmit();
    });
  }

  field(name, schema, required, prefix) {
    const id = `${prefix}-${name}`;
    const {control, read} = this.control(resolve(schema, this.root), required);
    control.id = id;
    control.setAttribute('aria-describedby', `${id}-note`);
    control.setAttribute('aria-required', required);
    const kind = typeName(schema, this.root) + (required ? ', required' : '');
    const label = el('label', {for: id}, el('b', {}, name), el('span', {class: 'muted'}, kind));
    const help = resolve(schema, this.root).description ?? '';
    const note = el('p', {id: `${id}-note`, class: 'note'}, help);
    const show = fault => {
      const text = fault || help;
      if (note.textContent === text) return;
      control.setAttribute('aria-invalid', Boolean(fault));
      note.textContent = text;
    };
    return {name, read, show, element: el('div', {class: 'field'}, label, control, note)};
  }

  /** The control for one schema, and how to read it; `undefined` leaves the property out. */
  control(schema, required) {
    const {type, default: preset, minimum, maximum, maxLength, nullable} = schema;
    const initial = preset ?? '';
    const choices = schema.enum ?? (type === 'boolean' && nullable ? [true, false] : undefined);
    if (choices) {
      const control = el('select', {}, required || initial !== '' ? undefined : el('option', {value: ''}),
        ...choices.map(value => el('option', {value: JSON.stringify(value)}, String(value))));
      if (initial !== '') control.value = JSON.stringify(initial);
      return {control, read: () => control.value ? JSON.parse(control.value) : undefined};
    }
    if (type === 'boolean') {
      const control = el('input', {type: 'checkbox', checked: preset === true});
      return {control, read: () => control.checked};
    }
    if (type === 'integer' || type === 'number') {
      const step = type === 'integer' ? 1 : 'any';
      const control = el('input', {type: 'number', step, min: minimum, max: maximum, value: initial});
      const read = () => {
        if (control.validity.badInput) throw new Error('Input should be a number');
        return control.value ? Number(control.value) : undefined;
      };
      return {control, read};
    }
    if (type === 'string') {
      const control = el('textarea', {rows: maxLength <= 255 ? 1 : 2, spellcheck: 'false'}, initial);
      return {control, read: () => control.value || required || preset ? control.value : undefined};
    }
    // Anything else is written as JSON; left blank it is its default.
    const text = required ? JSON.stringify(example(schema, this.root)) : '';
    const placeholder = preset === undefined ? 'JSON' : JSON.stringify(preset);
    const control = el('textarea', {rows: 1, spellcheck: 'false', class: 'code', placeholder}, text);
    const read = () => {
      try {
        return control.value.trim() ? JSON.parse(control.value) : undefined;
      } catch (error) {
        throw new Error(`Not JSON: ${error.message}`);
      }
    };
    return {control, read};
  }

  /** The object that the fields hold, or undefined after showing what cannot be sent. */
  read() {
    let sound = true;
    const entries = this.fields.map(({name, read, show}) => {
      try {
        show('');
        return [name, read()];
      } catch (error) {
        show(error.message);
        sound = false;
      }
    });
    if (!sound) return undefined;
    if (this.whole) return entries[0][1] ?? {};
    return Object.fromEntries(entries.filter(([, value]) => value !== undefined));
  }

  /** Shows faults ({loc: ["data", field, ...], msg}) at their fields; returns those that belong to none. */
  showFaults(faults) {
    const path = ({loc}) => loc[0] === 'data' ? loc.slice(1) : loc;
    const words = fault => [...path(fault).slice(1), fault.msg].join(': ');
    const at = name => faults.filter(fault => path(fault)[0] === name);
    for (const {name, show} of this.fields) show(at(name).map(words).join('. '));
    return faults.filter(fault => !this.fields.some(({name}) => name === path(fault)[0]));
  }
}
"""

WEB_BODY = r"""
<header class="bar">
  <h1 id="name">Environment</h1>
  <nav aria-label="Pages"><a href="docs">API</a><a href="health">Health</a></nav>
  <p id="status" role="status" data-state="connecting">Connecting</p>
  <button id="reconnect" class="primary" disabled>Reconnect (new episode)</button>
</header>
<main class="play">
  <p id="about" class="lead"></p>
  <div class="column">
    <section aria-labelledby="action-title">
      <h2 id="action-title">Action</h2>
      <p id="action-about" class="muted"></p>
      <form id="step" novalidate>
        <div id="action" class="fields"></div>
        <div class="row">
          <button class="primary" disabled>Step</button>
          <p class="muted"><kbd>Enter</kbd> steps, <kbd>Shift Enter</kbd> new line</p>
        </div>
        <p id="fault" class="note fault" role="alert"></p>
      </form>
      <form id="reset" novalidate>
        <div id="options" class="fields pair"></div>
        <div class="row">
          <button disabled>Reset</button>
          <button id="ask-state" type="button" disabled>State</button>
        </div>
      </form>
    </section>
    <section class="quick" aria-labelledby="quick-title">
      <div class="row" id="quick-head"><h2 id="quick-title">Quick start</h2><p class="muted">Python</p></div>
      <pre id="quick" tabindex="0"></pre>
    </section>
  </div>
  <div class="column">
    <section id="now" aria-labelledby="now-title">
      <h2 id="now-title">Now</h2>
      <dl class="figures">
        <div><dt>Step</dt><dd id="count">&ndash;</dd></div>
        <div><dt>Reward</dt><dd id="reward">&ndash;</dd></div>
        <div><dt>Total</dt><dd id="total">&ndash;</dd></div>
        <div><dt>Done</dt><dd id="done">&ndash;</dd></div>
      </dl>
      <h3>Observation</h3>
      <dl id="observation" class="values"></dl>
      <h3>State <span id="state-time" class="muted"></span></h3>
      <dl id="state" class="values"></dl>
      <p id="news" class="sr" role="status"></p>
    </section>
    <section aria-labelledby="chart-title">
      <h2 id="chart-title">Reward</h2>
      <svg id="chart" role="img" aria-label="No steps yet"></svg>
    </section>
    <section aria-labelledby="history-title">
      <div class="row">
        <h2 id="history-title">Episode</h2>
        <p id="shown" class="muted"></p>
        <button id="download" class="quiet">Download JSON</button>
      </div>
      <div class="scroll" tabindex="0" role="region" aria-labelledby="history-title">
        <table>
          <thead><tr>
            <th scope="col" class="number step">Step</th>
            <th scope="col">Action</th><th scope="col">Observation</th>
            <th scope="col" class="number">Reward</th><th scope="col" class="number">Latency</th>
          </tr></thead>
          <tbody id="history"></tbody>
        </table>
      </div>
    </section>
  </div>
  <div class="column">
    <section class="aside" aria-labelledby="wire-title">
      <div class="row">
        <h2 id="wire-title">Wire</h2>
        <p class="muted">newest first</p>
        <button id="pause" class="quiet" aria-pressed="false">Pause</button>
        <button id="clear" class="quiet">Clear</button>
      </div>
      <ol id="wire" class="wire" tabindex="0" aria-labelledby="wire-title"></ol>
    </section>
  </div>
</main>
<noscript>This page needs JavaScript. The API itself does not: see openapi.json.</noscript>
"""

WEB_SCRIPT = r"""
// ---- The episode ---------------------------------------------------------------------------------------

const MAX_ROWS = 100;  // in the table; the download has every step
const NONE = '\u2013';

const episodes = [];   // all that this page has played
let episode;           // the current one: {episode_id, seed, reset, steps}
let count = 0;         // the environment's step count, as far as we know
let total = 0;         // of this episode's rewards
let now;               // the data of the last answer to reset or step
let rows = [];         // what the next frame adds to the table
let points = [];       // [step, reward, running total], for the chart

const RESET = {
  properties: {
    seed: {type: 'integer', minimum: 0, description: 'Optional'},
    episode_id: {type: 'string', maxLength: 255, description: 'Optional'},
  },
};

let action;  // the Fields of the form, drawn from the action's schema
const options = new Fields($('options'), RESET);

const session = new Session(new WireLog($('wire'), $('pause'), $('clear')), (state, reason) => {
  const kept = episodes.length ? ' History kept.' : '';
  const words = {connecting: 'Connecting', open: 'Connected', closed: `Disconnected: ${reason}.${kept}`};
  $('status').dataset.state = state;
  $('status').textContent = words[state];
  $('reconnect').disabled = state !== 'closed';
  for (const button of document.querySelectorAll('form button')) button.disabled = state !== 'open';
  if (state === 'open') reset();
});

/** Sends a message and returns its answer; an error it shows, beside the field at fault. */
async function ask(message, fields) {
  try {
    const promise = session.send(JSON.stringify(message));
    $('now').setAttribute('aria-busy', 'true');
    const answer = await promise;
    $('fault').textContent = '';
    if (answer.type !== 'error') return answer;
    const {code, message: text, errors = []} = answer.data;
    const marked = errors.length && fields?.showFaults(errors).length === 0;
    $('fault').textContent = `${code}: ${marked ? 'see the marked fields' : text}`;
  } catch (error) {
    $('fault').textContent = error.message;
  } finally {
    if (!session.waiting.length) $('now').removeAttribute('aria-busy');
  }
}

async function reset() {
  const data = options.read();
  if (!data) return;
  const answer = await ask(Object.keys(data).length ? {type: 'reset', data} : {type: 'reset'}, options);
  if (!answer) return;
  begin({...data, reset: answer.data});
  record('reset', answer);
  await state();
}

function begin(details) {
  episode = {episode_id: null, seed: null, ...details, steps: []};
  episodes.push(episode);
  points = [];
  count = total = 0;
}

async function step() {
  const data = action.read();
  if (!data) return;
  const answer = await ask({type: 'step', data}, action);
  if (!answer) return;
  if (!episode) begin({});
  const {reward} = answer.data;
  count += 1;
  total += Number(reward);
  points.push([count, reward, total]);
  episode.steps.push({step: count, action: data, ...answer.data, latency_ms: answer.latency});
  record(JSON.stringify(data), answer);
}

async function state() {
  const answer = await ask({type: 'state'});
  if (!answer) return;
  if (episode) episode.episode_id = answer.data.episode_id ?? null;
  count = answer.data.step_count ?? count;
  $('state-time').textContent = `at step ${count}`;
  $('state').replaceChildren(...values(answer.data));
  redraw();
}

function record(text, {data, latency}) {
  now = data;
  const observation = JSON.stringify(data.observation);
  rows.push([String(count), text, observation, figure(data.reward), duration(latency)]);
  redraw();
}

// ---- Drawing: once per frame, however fast the answers come --------------------------------------------

const redraw = perFrame(() => {
  drawNow();
  drawRows();
  drawChart();
});

/** Twelve digits, so that a sum of tenths does not end in ...0000004. */
const figure = value => String(typeof value === 'number' ? Number(value.toPrecision(12)) : value ?? NONE);

/** The properties of an object as <dt> and <dd>. */
const values = object => Object.entries(object).flatMap(([name, value]) => [
  el('dt', {}, name),
  el('dd', {}, fold(typeof value === 'string' ? value : JSON.stringify(value), 400)),
]);

function drawNow() {
  $('count').textContent = count;
  $('total').textContent = figure(total);
  if (!now) return;
  $('reward').textContent = figure(now.reward);
  $('done').textContent = now.done ? 'yes' : 'no';
  $('observation').replaceChildren(...values(now.observation));
  $('news').textContent = `Step ${count}, reward ${figure(now.reward)}${now.done ? ', done' : ''}`;
}

function drawRows() {
  const isNumber = [true, false, false, true, true];
  const cell = (text, column) => el('td', {class: isNumber[column] && 'number'}, fold(text, 100, indent));
  const fresh = rows.splice(0).slice(-MAX_ROWS).reverse();
  $('history').prepend(...fresh.map(texts => el('tr', {}, ...texts.map(cell))));
  while ($('history').rows.length > MAX_ROWS) $('history').deleteRow(-1);
  const played = episodes.reduce((sum, {steps}) => sum + 1 + steps.length, 0);
  $('shown').textContent = played > MAX_ROWS ? `last ${MAX_ROWS} rows of ${played}` : 'newest first';
}

$('download').addEventListener('click', () => {
  const text = JSON.stringify({environment: document.title, episodes}, null, 2);
  const link = el('a', {download: 'episodes.json', href: URL.createObjectURL(new Blob([text]))});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});

// ---- The chart: two plots over one axis of steps. A redraw sets path data and the few ticks. -----------

const chart = $('chart');
const LEFT = 52, RIGHT = 20, HEIGHT = 88;
let width = 600;

function svg(tag, attributes, text = '') {
  const element = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

/** A plot of one column of `points`. */
function plot(name, title, top, column) {
  const part = (tag, kind) => chart.appendChild(svg(tag, {class: `${kind} ${name}`}));
  chart.append(svg('text', {class: `title ${name}`, x: 0, y: top - 13}, `\u25a0 ${title}`));
  return {top, column, axis: part('g', 'axis'), line: part('path', 'line'), dots: part('path', 'dots')};
}

const plots = [plot('reward', 'Reward per step', 28, 1), plot('total', 'Running total', 158, 2)];
const steps = chart.appendChild(svg('g', {class: 'axis'}));
const cursor = chart.appendChild(svg('path', {class: 'cursor'}));
const reading = chart.appendChild(svg('text', {class: 'reading', y: 15}));

/** Round numbers that cover low to high, about `wanted` of them. */
function ticks(low, high, wanted) {
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = power * [1, 2, 5, 10].find(multiple => multiple * power >= rough);
  const first = Math.floor(low / size), length = Math.ceil(high / size) - first + 1;
  return Array.from({length}, (_, index) => Number(((first + index) * size).toPrecision(12)));
}

const short = new Intl.NumberFormat('en', {notation: 'compact', maximumFractionDigits: 3});
const lastStep = () => Math.max(10, points.at(-1)?.[0] ?? 0);
const scaleX = step => LEFT + (width - LEFT - RIGHT) * step / lastStep();

function drawChart() {
  for (const {top, column, axis, line, dots} of plots) {
    const known = points.filter(point => Number.isFinite(point[column]));
    let low = 0, high = 0;
    for (const point of known) {
      low = Math.min(low, point[column]);
      high = Math.max(high, point[column]);
    }
    const marks = ticks(low, high > low ? high : low + 1, 3);
    const [bottom, height] = [marks[0], marks.at(-1) - marks[0]];
    const y = value => (top + HEIGHT * (1 - (value - bottom) / height)).toFixed(1);
    const places = known.map(point => `${scaleX(point[0]).toFixed(1)},${y(point[column])}`);
    line.setAttribute('d', places.length ? `M${places.join('L')}` : '');
    dots.setAttribute('d', places.length > 100 ? '' : places.map(place => `M${place}h0`).join(''));
    axis.replaceChildren(...marks.flatMap(mark => [
      svg('path', {d: `M${LEFT},${y(mark)}H${width - RIGHT}`, class: mark ? '' : 'zero'}),
      svg('text', {x: LEFT - 8, y: y(mark), dy: 4, 'text-anchor': 'end'}, short.format(mark)),
    ]));
  }
  const marks = ticks(0, lastStep(), 5).filter(mark => mark <= lastStep());
  steps.replaceChildren(...marks.map(mark =>
    svg('text', {x: scaleX(mark), y: 268, 'text-anchor': 'middle'}, mark ? mark : 'step 0')));
  chart.setAttribute('aria-label', `Rewards of ${points.length} steps, total ${figure(total)}`);
}

new ResizeObserver(([{contentRect}]) => {
  width = contentRect.width;
  redraw();
}).observe(chart);

chart.addEventListener('pointermove', ({offsetX}) => {
  const away = point => Math.abs(scaleX(point[0]) - offsetX);
  const point = points.reduce((best, point) => away(point) < away(best) ? point : best, points[0]);
  if (!point) return;
  cursor.setAttribute('d', `M${scaleX(point[0])},20V250`);
  reading.setAttribute('x', width - RIGHT);
  reading.textContent = `step ${point[0]}: reward ${figure(point[1])}, total ${figure(point[2])}`;
});
chart.addEventListener('pointerleave', () => {
  cursor.setAttribute('d', '');
  reading.textContent = '';
});

// ---- The page ------------------------------------------------------------------------------------------

/** A JSON value as a Python literal. */
function python(value) {
  if (Array.isArray(value)) return `[${value.map(python).join(', ')}]`;
  if (value === null) return 'None';
  if (typeof value === 'boolean') return value ? 'True' : 'False';
  if (typeof value !== 'object') return JSON.stringify(value);
  const items = Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${python(item)}`);
  return `{${items.join(', ')}}`;
}

function quickStart(schema) {
  const url = address('.').href.replace(/\/$/, '');
  const sample = example(schema, schema);
  const [imports, client, call] = schema.title === 'BenchmarkAction'
    ? ['benchmark import BenchmarkAction, BenchmarkEnv', 'BenchmarkEnv',
      `BenchmarkAction(message=${python(sample.message)})`]
    : ['client import WebSocketEnvClient', 'WebSocketEnvClient', python(sample)];
  return `from ${imports}

with ${client}("${url}") as env:
    print(env.reset())
    print(env.step(${call}))`;
}

for (const [id, act] of [['step', step], ['reset', reset]]) {
  $(id).addEventListener('submit', event => {
    event.preventDefault();
    act();
  });
}
$('ask-state').addEventListener('click', state);
$('reconnect').addEventListener('click', () => session.connect());

// A held Enter key steps as fast as the environment answers, and no faster.
$('step').addEventListener('keydown', event => {
  if (!event.repeat || !session.waiting.length) return;
  event.preventDefault();
  event.stopPropagation();
}, {capture: true});

async function main() {
  const [schemas, metadata] = await Promise.all([getJSON('schema'), getJSON('metadata')]);
  const {name, version, description} = metadata;
  const schema = schemas.action;
  document.title = $('name').textContent = name;
  $('about').textContent = [description, version && `Version ${version}`].filter(Boolean).join(' \u00b7 ');
  $('action-title').textContent = schema.title ?? 'Action';
  $('action-about').textContent = schema.description ?? '';
  action = new Fields($('action'), schema);
  $('quick').textContent = quickStart(schema);
  $('quick-head').append(copyButton($('quick')));
  session.connect();
}

main().catch(error => { $('fault').textContent = error.message; });
"""

DOCS_BODY = r"""
<header class="bar">
  <h1 id="title">API</h1>
  <p id="version" class="muted"></p>
  <nav aria-label="Pages"><a href="web">Play</a><a href="openapi.json">openapi.json</a></nav>
</header>
<div class="manual">
  <nav id="contents" aria-label="Contents"></nav>
  <main>
    <div id="about" class="lead"></div>
    <p id="fault" class="note fault" role="alert"></p>
    <section aria-labelledby="headers-title">
      <h2 id="headers-title">Headers for every request below</h2>
      <div id="headers" class="fields"></div>
    </section>
    <div id="operations"></div>
    <section id="websocket" aria-labelledby="websocket-title">
      <h2 id="websocket-title">WebSocket <code>/ws</code></h2>
      <p>One connection is one session with an environment of its own. Both sides send JSON text messages,
        and the server answers each message with exactly one, in order. Closing ends the session.</p>
      <h3>Messages</h3>
      <div id="messages"></div>
      <h3>Errors</h3>
      <p>An error is <code>{"type": "error", "data": {"message": "&hellip;", "code": "&hellip;"}}</code>,
        and the session goes on unless the server then closes.</p>
      <div class="scroll" tabindex="0" role="region" aria-label="Error codes">
        <table>
          <thead>
            <tr><th scope="col">Code</th><th scope="col">When</th><th scope="col">Also in data</th></tr>
          </thead>
          <tbody>
            <tr><td>INVALID_JSON</td><td>The text is not JSON.</td><td></td></tr>
            <tr><td>UNKNOWN_TYPE</td><td>The type is unknown or missing.</td><td></td></tr>
            <tr><td>VALIDATION_ERROR</td><td>The message or the action breaks its schema.</td>
              <td>errors: a list of {type, loc, msg, input}</td></tr>
            <tr><td>EXECUTION_ERROR</td><td>The environment raised an exception.</td><td></td></tr>
            <tr><td>CAPACITY_REACHED</td><td>First message of a full server, which then closes (1013).</td>
              <td>active_sessions, max_sessions</td></tr>
            <tr><td>FACTORY_ERROR</td><td>The environment could not be created; closes (1011).</td>
              <td>factory_name</td></tr>
            <tr><td>SESSION_ERROR</td><td>Anything else that ends the session; closes (1011).</td>
              <td></td></tr>
          </tbody>
        </table>
      </div>
      <h3>Console</h3>
      <div class="row">
        <button id="connect" class="primary">Connect</button>
        <p id="status" role="status" data-state="idle">Not connected</p>
      </div>
      <form id="console" novalidate>
        <div id="presets" class="row" role="group" aria-label="Presets"></div>
        <div class="field">
          <label for="message"><b>Message</b> <span class="muted">JSON, sent as it is</span></label>
          <textarea id="message" class="code" rows="2" spellcheck="false"></textarea>
        </div>
        <div class="row">
          <button id="send" class="primary" disabled>Send</button>
          <p class="muted"><kbd>Ctrl Enter</kbd> sends</p>
          <button id="pause" type="button" class="quiet" aria-pressed="false">Pause</button>
          <button id="clear" type="button" class="quiet">Clear</button>
        </div>
        <p id="console-fault" class="note fault" role="alert"></p>
      </form>
      <ol id="wire" class="wire" tabindex="0" aria-label="Messages, newest first"></ol>
    </section>
  </main>
</div>
<noscript>This page needs JavaScript. The API itself does not: see openapi.json.</noscript>
"""

DOCS_SCRIPT = r"""
let spec;     // openapi.json
let headers;  // the Fields of every header that an operation takes, filled in once for all of them

const pretty = value => JSON.stringify(value, null, 2);
const follow = node => node?.$ref ? resolve(node, spec) : node;

/** Paragraphs of text, with `code` in them. */
const prose = (text = '') => text.split(/\n\s*\n/).filter(Boolean).map(paragraph =>
  el('p', {}, ...paragraph.split('`').map((part, index) => index % 2 ? el('code', {}, part) : part)));

function listing(text, label) {
  const pre = el('pre', {tabindex: 0, 'aria-label': label}, ...pieces(text));
  return el('div', {class: 'listing'}, el('div', {class: 'row'}, el('h4', {}, label), copyButton(pre)), pre);
}

const LIMITS = {
  minimum: '\u2265', exclusiveMinimum: '>', maximum: '\u2264', exclusiveMaximum: '<',
  minLength: 'length \u2265', maxLength: 'length \u2264', pattern: 'like', default: 'default',
};

/** A JSON Schema as a nested list: name, type, limits and description of each property. */
function outline(schema, depth = 0) {
  const {type, items, properties = {}, required = []} = resolve(schema, spec);
  if (type === 'array') return outline(items, depth);
  const list = Object.entries(properties).map(([name, property]) => {
    const plain = resolve(property, spec);
    const facts = [typeName(property, spec), ...required.includes(name) ? ['required'] : []];
    for (const key in LIMITS) if (key in plain) facts.push(`${LIMITS[key]} ${JSON.stringify(plain[key])}`);
    return el('li', {}, el('code', {}, name), el('span', {class: 'muted'}, ` ${facts.join(', ')} `),
      plain.description, outline(property, depth + 1));
  });
  return list.length && depth < 6 ? el('ul', {class: 'outline'}, ...list) : undefined;
}

// ---- Operations ----------------------------------------------------------------------------------------

/** A word for a shell: in single quotes, where only the single quote itself is special. */
const quote = word => `'${word.replaceAll("'", "'\\''")}'`;

function curl(url, {method, headers, body}) {
  const words = [`curl -i -X ${method} ${quote(url.href)}`];
  for (const [name, value] of Object.entries(headers)) words.push(`-H ${quote(`${name}: ${value}`)}`);
  if (body) words.push(`--data-raw ${quote(body)}`);
  return words.join(' \\\n  ');
}

/** What an operation takes, as the properties of a schema: in this API every parameter is a header. */
const parameters = details => Object.fromEntries((details.parameters ?? []).map(follow)
  .map(({name, schema, description}) => [name, {...schema, description}]));

function operation(method, path, details) {
  const summary = [
    el('span', {class: `method ${method}`}, method.toUpperCase()), el('code', {}, path),
    el('span', {class: 'muted'}, details.summary),
  ];
  const taken = outline({properties: parameters(details)});
  return drawer(summary, () => el('div', {class: 'operation'},
    ...prose(details.description),
    ...taken ? [el('h3', {}, 'Headers'), taken] : [],
    trial(method.toUpperCase(), path, details),
    el('h3', {}, 'Responses'),
    ...Object.entries(details.responses).map(([status, response]) => answer(status, follow(response))),
  ), {id: details.operationId});
}

function answer(status, {description, content = {}}) {
  const [[type, {schema, example, examples = {}}] = ['', {}]] = Object.entries(content);
  const sample = example ?? Object.values(examples)[0]?.value;
  const summary = [el('b', {}, status), ` ${description} `, el('span', {class: 'muted'}, type)];
  return drawer(summary, () => el('div', {},
    outline(schema), sample === undefined ? undefined : listing(pretty(sample), 'Example')));
}

/** The request, editable, and what really happens when it is sent. */
function trial(method, path, details) {
  const status = el('p', {role: 'status'});
  const result = el('div', {class: 'result'});
  const form = el('form', {novalidate: true},
    el('div', {class: 'row'}, el('button', {class: 'primary'}, 'Try it'), status), result);
  const [[type, content] = []] = Object.entries(follow(details.requestBody)?.content ?? {});
  const id = `${details.operationId}-body`;
  const body = el('textarea', {id, class: 'code', rows: 3, spellcheck: 'false'});
  if (type) {
    const {schema, examples = {example: {value: content.example ?? example(schema, spec)}}} = content;
    const use = ({value}) => { body.value = pretty(value); };
    const presets = Object.entries(examples).map(([name, sample]) =>
      el('button', {type: 'button', class: 'quiet', onclick: () => use(sample)}, sample.summary ?? name));
    use(Object.values(examples)[0]);
    form.prepend(
      el('h3', {}, 'Request'),
      el('div', {class: 'row'}, el('label', {for: id}, 'Body'), el('p', {class: 'muted'}, type),
        ...presets.length > 1 ? presets : []),
      body, outline(schema) ?? '');
  }
  form.addEventListener('submit', async event => {
    event.preventDefault();
    const taken = Object.entries(headers.read()).filter(([name]) => name in parameters(details));
    const request = {method, headers: Object.fromEntries(taken)};
    if (body.value.trim()) {
      request.body = body.value;
      request.headers['Content-Type'] = type;
    }
    result.replaceChildren(...await attempt(address(`.${path}`), request, status));
  });
  return form;
}

/** Sends a request, says in `status` how it went and returns what there is to show. */
async function attempt(url, request, status) {
  const command = listing(curl(url, request), 'The same with curl');
  const start = performance.now();
  const say = (kind, text) => {
    status.className = kind;
    status.textContent = text;
  };
  try {
    const response = await fetch(url, request);
    const text = await response.text();
    const time = duration(performance.now() - start);
    const target = response.redirected ? `, redirected to ${response.url}` : '';
    say(response.ok ? 'good' : 'fault', `${response.status} ${response.statusText} in ${time}${target}`);
    const lines = [...response.headers].map(header => header.join(': ')).join('\n');
    const isJSON = response.headers.get('Content-Type')?.includes('json');
    return [command, listing(lines, 'Headers'), listing(isJSON ? indent(text) : text, 'Body')];
  } catch (error) {
    say('fault', `No answer: ${error.message}`);
    return [command];
  }
}

// ---- The WebSocket protocol, which OpenAPI cannot describe ---------------------------------------------

/** [type, what it does, message, answer], with examples that fit this environment's schemas. */
function exchanges({action, observation, state}) {
  const {reward, done, ...shown} = example(observation, observation, true);
  const observed = {type: 'observation', data: {observation: shown, reward: reward ?? 0, done: false}};
  const call = {jsonrpc: '2.0', id: 1, method: 'tools/list'};
  const refusal = {code: -32603, message: 'Environment does not support MCP'};
  return [
    ['reset', 'starts a new episode. The data is optional, and so are both of its properties.',
      {type: 'reset', data: {seed: 1, episode_id: 'e1'}}, observed],
    ['step', 'takes one step. The data is the action itself.',
      {type: 'step', data: example(action, action)}, observed],
    ['state', 'asks for the state of the environment and changes nothing.',
      {type: 'state'}, {type: 'state', data: example(state, state, true)}],
    ['mcp', 'carries one JSON-RPC 2.0 request to the tools of the environment, where it has any.',
      {type: 'mcp', data: call}, {type: 'mcp', data: {jsonrpc: '2.0', id: 1, error: refusal}}],
    ['close', 'ends the session. There is no answer: the server closes with code 1000.', {type: 'close'}],
  ];
}

function describeMessages(list) {
  $('messages').append(...list.map(([type, effect, message, reply]) => el('div', {class: 'exchange'},
    el('p', {}, el('code', {}, type), ` ${effect}`),
    listing(pretty(message), 'Send'),
    reply ? listing(pretty(reply), 'Answer') : undefined)));
}

function startConsole(list) {
  const text = $('message');
  const session = new Session(new WireLog($('wire'), $('pause'), $('clear')), (state, reason) => {
    $('status').dataset.state = state;
    $('status').textContent = {connecting: 'Connecting', open: 'Connected', closed: reason}[state];
    $('connect').textContent = state === 'closed' ? 'Connect' : 'Disconnect';
    $('send').disabled = state !== 'open';
  });
  $('connect').addEventListener('click', () => {
    if ($('connect').textContent === 'Connect') session.connect();
    else session.socket.close(1000);
  });
  $('presets').append(...list.map(([type, , message]) => el('button', {
    type: 'button', class: 'quiet', onclick: () => { text.value = pretty(message); },
  }, type)));
  text.value = pretty(list[0][2]);
  text.addEventListener('keydown', event => {
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) $('console').requestSubmit();
  });
  $('console').addEventListener('submit', event => {
    event.preventDefault();
    const say = fault => { $('console-fault').textContent = fault?.message ?? ''; };
    session.send(text.value, !/"type"\s*:\s*"close"/.test(text.value)).then(() => say(), say);
  });
}

// ---- The page ------------------------------------------------------------------------------------------

function contents(tags) {
  const link = (id, ...label) => el('li', {}, el('a', {href: `#${id}`}, ...label));
  $('contents').append(...[...tags].map(([tag, list]) => el('div', {}, el('h2', {}, tag), el('ul', {},
    ...list.map(([method, path, {operationId}]) =>
      link(operationId, el('span', {class: `method ${method}`}, method.toUpperCase()), ` ${path}`))))),
  el('div', {}, el('h2', {}, 'Live'), el('ul', {}, link('websocket', 'WebSocket /ws'))));
}

/** Opens the operation that the address names. */
function openNamed() {
  const target = document.getElementById(location.hash.slice(1));
  if (target?.tagName === 'DETAILS') target.open = true;
  target?.scrollIntoView();
}

async function main() {
  const [api, schemas] = await Promise.all([getJSON('openapi.json'), getJSON('schema')]);
  spec = api;
  document.title = $('title').textContent = spec.info.title;
  $('version').textContent = `Version ${spec.info.version}`;
  $('about').append(...prose(spec.info.description));

  const all = Object.entries(spec.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, details]) => [method, path, details]));
  const properties = Object.assign({}, ...all.map(([, , details]) => parameters(details)));
  $('headers').parentElement.hidden = !Object.keys(properties).length;
  headers = new Fields($('headers'), {properties}, spec);

  const tags = new Map();
  for (const entry of all) {
    const tag = entry[2].tags?.[0] ?? 'Other';
    tags.set(tag, [...tags.get(tag) ?? [], entry]);
  }
  $('operations').append(...[...tags].map(([tag, list]) =>
    el('section', {'aria-label': tag}, el('h2', {}, tag), ...list.map(entry => operation(...entry)))));
  contents(tags);

  const list = exchanges(schemas);
  describeMessages(list);
  startConsole(list);
  addEventListener('hashchange', openNamed);
  openNamed();
}

main().catch(error => { $('fault').textContent = error.message; });
"""


if __name__ == "__main__":
    sys.exit(main())
