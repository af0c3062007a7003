"""Who scores completions together: one process, or several that each score a share and tell each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Crew(Protocol):
    """Processes that score the same completions together; the module `vlmalign.exchange` is one."""

    def is_writer(self) -> bool:
        """True in the process that keeps the file."""
        ...

    def own_share(self, items: Sequence[Any]) -> Sequence[Any]:
        """This process's contiguous part of `items`."""
        ...

    def gather_from(self, make: Callable[[], Sequence[Any]]) -> list[Any]:
        """What `make` returns in each process (JSON), in their order; what it raises in one is raised in all."""
        ...

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` returns in the writer (JSON), in all."""
        ...


class Alone:
    """The crew of one process."""

    def is_writer(self) -> bool:
        return True

    def own_share(self, items: Sequence[Any]) -> Sequence[Any]:
        return items

    def gather_from(self, make: Callable[[], Sequence[Any]]) -> list[Any]:
        return list(make())

    def from_first(self, make: Callable[[], Any]) -> Any:
        return make()


ALONE = Alone()
