"""Who has to give up what belongs to the parent process, in a child made by fork()."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Owner(Protocol):
    def disown(self) -> None:
        """Called in the child, before anything else runs there."""


_owners: weakref.WeakSet[Owner] = weakref.WeakSet()


def disown_after_fork(owner: Owner) -> None:
    """Call the owner's `disown` in every child from now on, for as long as somebody else refers to the owner.

    A hook, not a look at os.getpid() in every call: os.register_at_fork() runs it in the child alone.
    """
    _owners.add(owner)


def _disown_all() -> None:
    for owner in list(_owners):
        owner.disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)
