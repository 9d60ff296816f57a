"""The Benchmark environment: it echoes each message and rewards its length.

Part of the minimal OpenEnv Benchmark environment, version 1.0.0: benchmark.py (this
file: the environment), client.py (its clients), server.py (its server).

An OpenEnv environment is a class with ``reset``, ``step`` and ``state``. What goes into
``step`` (the action), what comes out of it (the observation) and the state are
dataclasses; their fields are the whole truth about the types, and server.py derives the
JSON Schema, the validation and the web pages from them. To make an environment of your
own, copy this file, change the dataclasses and ``step``, and serve it with
``python3 server.py --env my_env:MyEnvironment``.

There is no input or output in here. ``python3 benchmark.py`` checks the environment.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Optional
from uuid import uuid4

if TYPE_CHECKING:
    from client import BenchmarkEnv, BenchmarkEnvWS, StepResult

__version__ = "1.0.0"
__all__ = [
    "BenchmarkAction",
    "BenchmarkEnv",
    "BenchmarkEnvWS",
    "BenchmarkEnvironment",
    "BenchmarkObservation",
    "BenchmarkState",
    "StepResult",
]


# The types of fields are evaluated when the program runs: Python 3.9 needs Optional there.


@dataclass
class BenchmarkAction:
    """A message to echo."""

    message: str = field(
        metadata={"description": "Message to echo back", "examples": ["Hello, World!"]}
    )
    metadata: dict[str, Any] = field(
        default_factory=dict,
        metadata={"description": "Anything the caller wants to note"},
    )


@dataclass
class BenchmarkObservation:
    """The echo of a message, and the reward for it."""

    echoed_message: str = field(
        default="", metadata={"description": "The echoed message"}
    )
    message_length: int = field(
        default=0,
        metadata={"description": "Length of the message in code points", "minimum": 0},
    )
    reward: Optional[float] = field(  # noqa: UP045
        default=None,
        metadata={"description": "Length of the message times 0.1", "examples": [1.3]},
    )
    done: bool = field(
        default=False,
        metadata={"description": "Whether the episode is over: here, never"},
    )
    metadata: dict[str, Any] = field(
        default_factory=dict,
        metadata={"description": "More about this step: its number"},
    )


@dataclass
class BenchmarkState:
    """Where the current episode stands."""

    episode_id: Optional[str] = field(  # noqa: UP045
        default=None, metadata={"description": "Identifier of the current episode"}
    )
    step_count: int = field(
        default=0, metadata={"description": "Steps taken in this episode", "minimum": 0}
    )


class BenchmarkEnvironment:
    """Echoes each message and rewards its length: all there is to test is the protocol."""

    # OpenEnv: instances share nothing, so one server may hold many of them at a time.
    SUPPORTS_CONCURRENT_SESSIONS = True
    # server.py: calls are quick, wait for nothing and may come from any thread, so that one
    # thread can serve many sessions. Remove this if that does not hold for yours.
    NEVER_WAITS = True

    def __init__(self) -> None:
        self._state = BenchmarkState(episode_id=str(uuid4()))

    def reset(
        self, seed: int | None = None, episode_id: str | None = None
    ) -> BenchmarkObservation:
        """Begin a new episode and return its first observation, with reward 0.0.

        ``seed`` is taken because every OpenEnv environment takes it; an echo has nothing
        to draw at random. Without an ``episode_id`` the episode gets a fresh UUID4.
        """
        self._state = BenchmarkState(
            episode_id=str(uuid4()) if episode_id is None else episode_id
        )
        return BenchmarkObservation(
            echoed_message="Benchmark environment ready!", reward=0.0
        )

    def step(
        self, action: BenchmarkAction, timeout_s: float | None = None
    ) -> BenchmarkObservation:
        """Echo ``action.message``; an echo takes no time, so ``timeout_s`` changes nothing.

        A fresh environment already has an episode, so ``reset`` need not come first.
        """
        self._state.step_count += 1
        length = len(action.message)
        return BenchmarkObservation(
            echoed_message=action.message,
            message_length=length,
            reward=length
            / 10,  # the double nearest to the reward; 3 * 0.1 would be off
            metadata={"step": self._state.step_count},
        )

    @property
    def state(self) -> BenchmarkState:
        """The episode's identifier and the number of steps taken in it."""
        return self._state

    def close(self) -> None:
        """Free what the environment holds: here, nothing. Called once, when its session ends."""


def __getattr__(name: str) -> Any:
    """Load the clients on first use (PEP 562), so that the environment alone needs no network."""
    if name in ("BenchmarkEnv", "BenchmarkEnvWS", "StepResult"):
        client = importlib.import_module(
            f"{__package__}.client" if __package__ else "client"
        )
        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _check() -> int:
    """Check reset, step, state and rewards, a line each; return the exit code."""
    env = BenchmarkEnvironment()
    first = env.reset(episode_id="check")
    hello = env.step(BenchmarkAction("Hello"))
    rewards = [
        env.step(BenchmarkAction(text)).reward
        for text in ("Hi", "Hello, World!", "", "abc")
    ]
    checks = {
        "reset": (first.echoed_message, first.reward, first.done)
        == ("Benchmark environment ready!", 0.0, False),
        "step": (hello.echoed_message, hello.message_length, hello.metadata)
        == ("Hello", 5, {"step": 1}),
        "state": env.state == BenchmarkState(episode_id="check", step_count=5),
        "rewards": rewards == [0.2, 1.3, 0.0, 0.3],
    }
    for name, passed in checks.items():
        print(f"{name}: {'ok' if passed else 'FAILED'}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(_check())
