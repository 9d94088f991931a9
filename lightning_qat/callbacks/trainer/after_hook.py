"""Doing something behind a hook of the module: Lightning calls those of callbacks first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class AfterHook:
    """Runs a function once, behind the next call of a method of one object.

    Args:
        owner: the object, such as a LightningModule.
        name: the method.
        then: what to run.
    """

    def __init__(self, owner: Any, name: str, then: Callable[[], None]) -> None:
        self._owner, self._name = owner, name
        self._before = vars(owner).get(name)

        def hook(*args: Any, **kwargs: Any) -> Any:
            self.cancel()
            result = getattr(owner, name)(*args, **kwargs)
            then()
            return result

        self._hook = vars(owner)[name] = hook

    def cancel(self) -> None:
        """Run nothing; the object has its method, or its class, as before."""
        own = vars(self._owner)
        if own.get(self._name) is not self._hook:
            return
        if self._before is None:
            del own[self._name]
        else:
            own[self._name] = self._before
