# SPDX-License-Identifier: BSD-3-Clause
"""The Benchmark environment: it echoes each message and rewards its length.

Part of the minimal OpenEnv Benchmark environment, version 1.0.0: benchmark.py (this
file: the environment), client.py (its clients), server.py (its server).

An OpenEnv environment is a class with ``reset``, ``step`` and ``state``. What goes into
``step`` (the action), what comes out of it (the observation) and the state are
dataclasses; their fields are the whole truth about the types. To make an environment of
your own, copy this file, change the dataclasses and ``step``, and serve it with
``python3 server.py --env my_env:MyEnvironment``. There is no input or output in here;
``python3 benchmark.py`` checks the environment.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Optional
from uuid import uuid4

__version__ = "1.0.0"
__all__ = ["BenchmarkAction", "BenchmarkEnvironment", "BenchmarkObservation"]
__all__ += ["BenchmarkEnv", "BenchmarkEnvWS", "BenchmarkState", "StepResult"]

READY = "Benchmark environment ready!"


@dataclass
class BenchmarkAction:
    """A message to echo."""

    message: str = field(
        metadata={"description": "Message to echo back", "examples": ["Hello, World!"]}
    )
    metadata: dict[str, Any] = field(
        default_factory=dict, metadata={"description": "What the caller wants to note"}
    )


@dataclass
class BenchmarkObservation:
    """The echo of a message, its length in code points, and a tenth of that as reward."""

    # The examples are of a step and of a reset.
    echoed_message: str = field(
        default="", metadata={"examples": ["Hello, World!", READY]}
    )
    message_length: int = field(default=0, metadata={"minimum": 0, "examples": [13, 0]})
    # The types of fields are evaluated at run time: Python 3.9 needs Optional there.
    reward: Optional[float] = field(  # noqa: UP045
        default=None, metadata={"examples": [1.3, 0.0]}
    )
    done: bool = False  # an episode never ends by itself
    metadata: dict[str, Any] = field(
        default_factory=dict, metadata={"description": "The number of this step"}
    )


@dataclass
class BenchmarkState:
    """Where the current episode stands."""

    episode_id: Optional[str] = None  # noqa: UP045
    step_count: int = field(default=0, metadata={"minimum": 0})


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
        name = str(uuid4()) if episode_id is None else episode_id
        self._state = BenchmarkState(episode_id=name)
        return BenchmarkObservation(READY, reward=0.0)

    def step(
        self, action: BenchmarkAction, timeout_s: float | None = None
    ) -> BenchmarkObservation:
        """Echo ``action.message``; an echo takes no time, so ``timeout_s`` changes nothing.

        A fresh environment already has an episode, so ``reset`` need not come first.
        """
        self._state.step_count += 1
        length = len(action.message)
        # Not times 0.1: 3 / 10 is the double nearest to 0.3, and 3 * 0.1 is not.
        reward, metadata = length / 10, {"step": self._state.step_count}
        return BenchmarkObservation(action.message, length, reward, metadata=metadata)

    @property
    def state(self) -> BenchmarkState:
        """The episode's identifier and the number of steps taken in it."""
        return self._state

    def close(self) -> None:
        """Free what the environment holds: here, nothing. Called once, when its session ends."""


if TYPE_CHECKING:  # below what client.py takes; a star that is not found names nothing
    from client import *  # type: ignore[import-not-found,unused-ignore]

    from .client import *  # type: ignore[import-not-found,unused-ignore]


def __getattr__(name: str) -> Any:
    """Load the clients on first use (PEP 562), so that the environment alone needs no network."""
    if name in ("BenchmarkEnv", "BenchmarkEnvWS", "StepResult"):
        module = f"{__package__}.client" if __package__ else "client"
        return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def check() -> int:
    """Check reset, step, state and rewards, a line each; return the exit code."""
    env = BenchmarkEnvironment()
    first, hello = env.reset(episode_id="check"), env.step(BenchmarkAction("Hello"))
    rewards = {"Hi": 0.2, "Hello, World!": 1.3, "": 0.0, "abc": 0.3}
    echoes = [env.step(BenchmarkAction(text)) for text in rewards]
    ready = BenchmarkObservation("Benchmark environment ready!", reward=0.0)
    checks = {
        "reset": first == ready,
        "step": hello == BenchmarkObservation("Hello", 5, 0.5, metadata={"step": 1}),
        "state": env.state == BenchmarkState(episode_id="check", step_count=5),
        "rewards": [echo.reward for echo in echoes] == list(rewards.values()),
    }
    for name, passed in checks.items():
        print(f"{name}: {'ok' if passed else 'FAILED'}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(check())
