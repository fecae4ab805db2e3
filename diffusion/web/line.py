"""Who is served next: users in turn, each one's requests in their order."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from diffusion.errors import PromptError

Item = TypeVar("Item")


class FairLine(Generic[Item]):
    """A bounded waiting line. A user with many requests does not hold up one with a single request."""

    def __init__(self, max_waiting: int, max_waiting_per_user: int) -> None:
        self._max, self._max_per_user = max_waiting, max_waiting_per_user
        self._waiting: OrderedDict[str, deque[Item]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(items) for items in self._waiting.values())

    def add(self, user: str, item: Item) -> None:
        """Raises PromptError when the line, or this user's share of it, is full."""
        if len(self) >= self._max:
            raise PromptError(f"all {self._max} places in the queue are taken; try again in a moment")
        mine = self._waiting.get(user, deque())
        if len(mine) >= self._max_per_user:
            raise PromptError(f"{len(mine)} of your requests are waiting already; wait for one of them, or cancel it")
        mine.append(item)
        self._waiting[user] = mine

    def pop(self) -> Item | None:
        """The next item; its user goes to the end. None = nobody waits."""
        if not self._waiting:
            return None
        user, items = self._waiting.popitem(last=False)
        item = items.popleft()
        if items:
            self._waiting[user] = items
        return item

    def remove(self, item: Item) -> bool:
        """Take an item out of the line; whether it was there."""
        for user, items in self._waiting.items():
            if item in items:
                items.remove(item)
                if not items:
                    del self._waiting[user]
                return True
        return False

    def in_order(self) -> Iterator[Item]:
        """All that wait, the next first."""
        rounds = max((len(items) for items in self._waiting.values()), default=0)
        for number in range(rounds):
            for items in self._waiting.values():
                if number < len(items):
                    yield items[number]
