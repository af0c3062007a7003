"""A round of rollouts shared out to the processes of a run: each answers its share of the prompts, all hold all answers.

What a prompt is answered with depends on its id, the sample and the round, never on the process, so that any number of
processes makes the same rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from jax.sharding import Mesh

from vlmalign.distributed import own_share, process_count
from vlmalign.exchange import gather_from, local_view
from vlmalign.mesh import MeshSettings, Placement, build_mesh, replicated
from vlmalign.rollout.completions import Completion
from vlmalign.shapes import Array

Prompt = TypeVar("Prompt")


class Answer(NamedTuple):
    """A completion and its text."""

    completion: Completion
    text: str


def share_out(
    prompts: Sequence[Prompt], answer: Callable[[Sequence[Prompt]], Sequence[Sequence[Answer]]]
) -> list[list[Answer]]:
    """The answers to all prompts, in order; `answer` is called with this process's share, unless that is empty.

    Raises:
        ValueError: in all processes, for a mistake that `answer` raises in one.
    """

    def own() -> list[list[list[Any]]]:
        share = own_share(prompts)
        return [[_packed(each) for each in row] for row in (answer(share) if share else ())]

    if process_count() == 1:
        return [list(row) for row in answer(prompts)]
    return [[_unpacked(each) for each in row] for row in gather_from(own)]


def local_mesh() -> Mesh:
    """The devices of this process, over which it cuts the prompts of its share by rows."""
    return build_mesh(MeshSettings(), jax.local_devices())


def local_policy(policy: Mapping[str, Array], mesh: Mesh) -> dict[str, Array]:
    """A whole copy of the policy on every device of `mesh`, which is this process's own (`local_mesh`).

    The policy lives on devices of all processes; what is cut there is gathered, once per rollout, and what has copies
    on these devices already is not copied again.
    """
    everywhere = {name: jax.device_put(value, replicated(value.sharding.mesh)) for name, value in policy.items()}
    return local_view(everywhere, Placement(mesh, {}))


def _packed(answer: Answer) -> list[Any]:
    own = answer.completion
    return [own.tokens, own.logp, own.kept_logp, bool(own.stopped), answer.text]


def _unpacked(record: list[Any]) -> Answer:
    *completion, text = record
    return Answer(Completion(*completion), text)
