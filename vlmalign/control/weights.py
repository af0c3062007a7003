"""Weights of capabilities under feedback: what succeeds least weighs most (BalancedBio, eq. 10).

    S_k <- decay S_k + (1 - decay) mean reward of k, rescaled to [0, 1]        success rate
    e_k  = mean(S) - S_k                                                       error

    position (ours)     I_k <- I_k + e_k        w_k = exp(kp e_k + ki I_k + kd (e_k - e_k before))
    printed (eq. 10)    I_k <- I_k + e_k        w_k <- w_k exp(kp e_k + ki I_k)

The printed form integrates twice: with success rates that stand still its weights grow without end (at .3, .5, .9 with
kp = .05 and ki = .01 to 1e24 in 200 updates). The position form is clamped to [low, high]; the integral of a weight that is
clamped stands still while its error would drive it further out (anti-windup), and the others' errors are then taken less
their mean. So the integrals add up to 0, as the errors do, and the weights' product is 1 while none is clamped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: what a checkpoint holds: JSON
State = dict[str, Any]

FORMS = ("position", "printed")


@dataclass(frozen=True)
class WeightController:
    """`init() -> state`, `update(rewards, state) -> state`; the weights are state["weights"].

    Raises ValueError for settings out of range.
    """

    names: tuple[str, ...]  #: of the capabilities
    kp: float = 1.0
    ki: float = 0.05
    kd: float = 0.0
    decay: float = 0.9  #: of the success rates, per update
    low: float = 0.2  #: least weight
    high: float = 5.0  #: largest weight
    form: str = "position"  #: of FORMS

    def __post_init__(self) -> None:
        if len(self.names) < 2 or len(set(self.names)) < len(self.names):
            raise ValueError(f"a controller balances at least two capabilities, each named once; found {self.names}")
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, found {self.form!r}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), found {self.decay}")
        if not 0 < self.low <= 1 <= self.high < math.inf:
            raise ValueError(f"low and high must hold 1 between them, and low be > 0; found {self.low} and {self.high}")
        for name in ("kp", "ki", "kd"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, found {getattr(self, name)}")

    def init(self) -> State:
        """All weights 1, nothing known of any success."""
        return {
            "weights": dict.fromkeys(self.names, 1.0),
            "success": dict.fromkeys(self.names),
            "integral": dict.fromkeys(self.names, 0.0),
            "error": dict.fromkeys(self.names, 0.0),
            "updates": 0,
            "clamped": dict.fromkeys(self.names, 0),  # updates after which the weight stood at a limit
            "seen": {name: [None, None] for name in self.names},  # least and largest mean reward
        }

    def update(self, rewards: Mapping[str, float | None], state: State) -> State:
        """The state after an update whose mean rewards, in [0, 1], were these; a capability that had none (None, or missing)
        keeps its success rate. Capabilities of which nothing is known yet take no part.

        Raises:
            ValueError: for a reward outside [0, 1]; and when a weight of the printed form is no longer finite.
        """
        found = {key: dict(value) if isinstance(value, Mapping) else value for key, value in state.items()}
        for name in self.names:
            if (reward := rewards.get(name)) is not None:
                self._see(name, float(reward), found)
        known = {name: value for name, value in found["success"].items() if value is not None}
        mean = sum(known.values()) / len(known) if known else 0.0
        before, error = state["error"], {name: mean - known[name] if name in known else 0.0 for name in self.names}
        found |= {"error": error, "updates": state["updates"] + 1}
        return self._printed(found) if self.form == "printed" else self._position(found, before)

    def _see(self, name: str, reward: float, found: State) -> None:
        if not 0 <= reward <= 1:
            raise ValueError(
                f"the mean reward of capability {name!r} must lie in [0, 1], found {reward}; give its range, from which it is "
                "rescaled"
            )
        rate = found["success"][name]
        found["success"][name] = reward if rate is None else self.decay * rate + (1 - self.decay) * reward
        least, largest = found["seen"][name]
        found["seen"][name] = [
            min(reward, reward if least is None else least),
            max(reward, reward if largest is None else largest),
        ]

    def _position(self, found: State, before: Mapping[str, float]) -> State:
        error, old = found["error"], found["weights"]
        stuck = {
            name for name in self.names
            if (old[name] >= self.high and error[name] > 0) or (old[name] <= self.low and error[name] < 0)
        }  # fmt: skip
        free = [name for name in self.names if name not in stuck]
        level = sum(error[name] for name in free) / len(free) if free else 0.0
        for name in free:
            found["integral"][name] += error[name] - level
        for name in self.names:
            drive = self.kp * error[name] + self.ki * found["integral"][name] + self.kd * (error[name] - before[name])
            weight = math.exp(min(max(drive, math.log(self.low)), math.log(self.high)))
            found["weights"][name] = min(max(weight, self.low), self.high)
            found["clamped"][name] += found["weights"][name] in (self.low, self.high) and self.low < self.high
        return found

    def _printed(self, found: State) -> State:
        for name in self.names:
            found["integral"][name] += found["error"][name]
            step = self.kp * found["error"][name] + self.ki * found["integral"][name]
            try:
                found["weights"][name] *= math.exp(step)
            except OverflowError:
                found["weights"][name] = math.inf
            if not math.isfinite(found["weights"][name]):
                raise ValueError(
                    f"the weight of capability {name!r} is no longer a number after {found['updates']} updates: the printed form "
                    "integrates twice and has no limit; use form: position, or smaller kp and ki"
                )
        return found

    def notes(self, state: State) -> list[str]:
        """What a person should know of a run: capabilities whose reward never moved, or was never there, and weights that
        stood at a limit."""
        found = []
        for name in self.names:
            least, largest = state["seen"][name]
            if least is None:
                found.append(f"capability {name} never had a reward; its weight says nothing")
            elif least == largest and state["updates"] > 1:
                found.append(f"the reward of capability {name} was always {least:g}: its success rate says nothing")
            if clamped := state["clamped"][name]:
                found.append(
                    f"the weight of capability {name} stood at a limit after {clamped} of {state['updates']} updates"
                )
        return found
