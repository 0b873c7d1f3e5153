"""The fields of a JSON request of untrusted origin, each taken once, within bounds."""

from __future__ import annotations

import json
import re
from typing import Any

_MISSING: Any = object()


class RequestError(Exception):
    """A request that is refused; the text, one line, is shown by the client.

    status  of HTTP
    """

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


class Fields:
    """The fields of a JSON object, each taken by its name; what nobody takes is refused."""

    def __init__(self, held: Any, what: str) -> None:
        if not isinstance(held, dict):
            raise RequestError(f"{what} is no JSON object")
        self._held: dict[str, Any] = {k: v for k, v in held.items() if v is not None}
        self._what = what

    @classmethod
    def of(cls, body: bytes, what: str) -> Fields:
        """Of a request's body; what: its name in messages."""
        try:
            return cls(json.loads(body or b"{}", parse_constant=_refuse_constant), what)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{what} is no JSON") from error

    def _take(self, name: str, default: Any) -> Any:
        found = self._held.pop(name, default)
        if found is _MISSING:
            raise RequestError(f"{self._what} needs {name}")
        return found

    def text(
        self, name: str, pattern: re.Pattern[str] | None = None, default: Any = _MISSING
    ) -> Any:
        """A string that matches as a whole, of 1,000 letters at most."""
        found = self._take(name, default)
        if found is default:
            return found
        if not isinstance(found, str) or len(found) > 1000:
            raise RequestError(f"{name} of {self._what} is no short text")
        if pattern is not None and not pattern.fullmatch(found):
            raise RequestError(f"{name} of {self._what} is not what it can be")
        return found

    def whole(self, name: str, least: int, most: int, default: Any = _MISSING) -> Any:
        """A whole number within these bounds."""
        found = self._take(name, default)
        if found is default:
            return found
        if type(found) is not int or not least <= found <= most:
            raise RequestError(f"{name} of {self._what} is no whole number from {least} to {most}")
        return found

    def number(self, name: str, least: float, most: float, default: Any = _MISSING) -> Any:
        """A finite number within these bounds."""
        found = self._take(name, default)
        if found is default:
            return found
        if type(found) not in (int, float) or not least <= found <= most:
            raise RequestError(f"{name} of {self._what} is no number from {least:g} to {most:g}")
        return float(found)

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        found = self._take(name, default)
        if type(found) is not bool:
            raise RequestError(f"{name} of {self._what} is neither true nor false")
        return found

    def any(self, name: str, default: Any = _MISSING) -> Any:
        """Whatever is there."""
        return self._take(name, default)

    def inner(self, name: str) -> Fields:
        """An object in it."""
        return Fields(self._take(name, _MISSING), name)

    def only(self, name: str, wanted: Any, why: str) -> None:
        """Refuse any other value than this one, or none at all."""
        if self._take(name, wanted) != wanted:
            raise RequestError(f"{self._what}: {why}")

    def end(self, *ignored: str) -> None:
        """Refuse what was not taken and is not ignored."""
        left = sorted(self._held.keys() - {*ignored, "type"})
        if left:
            raise RequestError(f"{self._what}: {left[0][:40]!r} is not supported")


def _refuse_constant(text: str) -> None:
    raise ValueError("NaN and infinities are no JSON")
