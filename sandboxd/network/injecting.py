"""Adding to the requests of one sandbox what it must not know: values are looked up for a request, and forgotten."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from sandboxd.failures import Failure
from sandboxd.injections import Injection, secrets_in
from sandboxd.network.http import Headers

Reveal = Callable[[str], Awaitable[bytes]]
"""The value of a secret; raises a Failure."""

REFLECTING = frozenset({"TRACE", "TRACK"})
"""Methods that are answered with the request itself."""


class CannotInject(Exception):
    """Something that is to be added cannot be had. Names secrets, and repeats none."""


class Injector:
    """What is added to the requests of one sandbox.

    Args:
        rules: Asked for each request: they change while connections live.
        reveal: Tells the value of a secret.
    """

    def __init__(self, rules: Callable[[], Sequence[Injection]], reveal: Reveal) -> None:
        self._rules = rules
        self._reveal = reveal

    def fitting(self, host: str, port: int) -> list[Injection]:
        """The rules that speak of a request; all of them lead to the same place."""
        return [rule for rule in self._rules() if rule.fits(host, port)]

    async def added(self, rules: Sequence[Injection]) -> Headers:
        """The headers that they come to.

        Raises:
            CannotInject: a secret cannot be had, or is not fit for a header.
        """
        try:
            values = {name: (await self._reveal(name)).rstrip(b"\r\n") for name in secrets_in(rules)}
            return [(rule.header.encode("ascii"), rule.filled(values)) for rule in rules]
        except (Failure, ValueError) as error:
            # Not chained: nobody who prints it shall have more than this.
            raise CannotInject(str(error)) from None


def without_replaced(headers: Headers, rules: Sequence[Injection]) -> Headers:
    """The sandbox's own headers, but for those that it is not to say itself."""
    return [(name, value) for name, value in headers if not any(rule.replaces(name) for rule in rules)]
