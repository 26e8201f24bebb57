"""What people type for limits and times, turned into numbers and back.

Strict on purpose: a limit that is misread is worse than one that is refused. Only ASCII digits count,
nothing is trimmed, and every refusal is one line that says what may be given instead. Sizes follow the
engines: ``k``, ``kb`` and ``KiB`` are all 1024 bytes, in either case.

Pure: the host's own bounds are arguments.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from typing import Final

MEMORY_BYTES_MIN: Final = 8 * 1024**2
"""Docker's floor is 6 MiB, for its own runtime; 8 MiB leave room for init and one small command."""

PIDS_MIN: Final = 8
"""Init, the keeper of one command and the command make 3; a shell with a short pipeline needs the rest."""

CPU_MILLIS_MIN: Final = 10
"""A hundredth of a CPU: the kernel takes no quota below 1 ms, and the period is 100 ms."""

DURATION_MS_MAX: Final = 366 * 24 * 3600 * 1000

CPU_NUMBER_MAX: Final = 8191
"""The largest CPU number that a Linux kernel can be built for."""

_TEXT_CHARS_MAX: Final = 64
_CPUSET_CHARS_MAX: Final = 1024
_QUOTED_CHARS_MAX: Final = 32

_DECIMAL: Final = re.compile(r"([0-9]{1,19})(?:\.([0-9]{1,9}))?([A-Za-z]{0,3})")
_WHOLE: Final = re.compile(r"[0-9]{1,10}")
_CPU_RANGE: Final = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")

_SIZE_LETTERS: Final = "kmgt"
_SIZE_UNITS: Final[dict[str, int]] = {"": 1, "b": 1} | {
    letter + tail: 1024**power for power, letter in enumerate(_SIZE_LETTERS, start=1) for tail in ("", "b", "ib")
}
_DURATION_UNITS_MS: Final[dict[str, int]] = {"": 1000, "ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000}


class QuantityError(ValueError):
    """A text that is no such quantity, or one outside its bounds. The message is one printable line."""

    def __init__(self, text: str, option: str, allowed: str) -> None:
        super().__init__(f"cannot use {quote(text)} for {option}: give {allowed}")
        self.text = text
        self.option = option
        self.allowed = allowed


def quote(text: str) -> str:
    """The text in quotes, on one line, in printable ASCII, and not longer than a line bears."""
    if len(text) > _QUOTED_CHARS_MAX:
        return ascii(text[:_QUOTED_CHARS_MAX]) + "..."
    return ascii(text)


def parse_memory(
    text: str,
    *,
    bytes_max: int,
    bytes_min: int = MEMORY_BYTES_MIN,
    option: str = "--memory",
) -> int:
    """Bytes in a size such as ``64m``, ``1.5g``, ``512MiB`` or ``67108864``; a part of a byte is dropped.

    Args:
        text: As typed.
        bytes_max: Largest size to accept: the host's memory.
        bytes_min: Smallest size to accept.
        option: What the text was given for, for the message.

    Raises:
        QuantityError: not a size, or out of bounds.
    """
    allowed = _allowed_sizes(bytes_min, bytes_max)
    return _scaled(text, _SIZE_UNITS, bounds=(bytes_min, bytes_max), option=option, allowed=allowed)


@functools.lru_cache(maxsize=64)
def _allowed_sizes(bytes_min: int, bytes_max: int) -> str:
    low, high = format_bytes_short(bytes_min), format_bytes_short(bytes_max, round_down=True)
    return f"a size from {low} to {high}, such as {_size_examples(bytes_min, bytes_max)}"


def parse_cpus(text: str, *, cpu_count: int, option: str = "--cpus") -> int:
    """Thousandths of a CPU in ``0.5``, ``2`` or ``500m``.

    Raises:
        QuantityError: not a number of CPUs, finer than a thousandth, or more than ``cpu_count``.
    """
    allowed = f"a number from 0.01 to {cpu_count} in steps of 0.001, such as 0.5 or 500m"
    match = _DECIMAL.fullmatch(text) if len(text) <= _TEXT_CHARS_MAX else None
    if match is None:
        raise QuantityError(text, option, allowed)
    whole, fraction, unit = match[1], match[2] or "", match[3]
    thousandths = fraction.rstrip("0")
    if unit not in {"", "m"} or len(thousandths) > (3 if unit == "" else 0):
        raise QuantityError(text, option, allowed)
    millis = int(whole) if unit == "m" else int(whole) * 1000 + int(thousandths.ljust(3, "0"))
    if not CPU_MILLIS_MIN <= millis <= cpu_count * 1000:
        raise QuantityError(text, option, allowed)
    return millis


def parse_count(text: str, *, count_min: int, count_max: int, option: str) -> int:
    """A whole number within bounds, in decimal digits and nothing else.

    Raises:
        QuantityError: not such a number.
    """
    allowed = f"a whole number from {count_min} to {count_max}"
    if _WHOLE.fullmatch(text) is None or not count_min <= int(text) <= count_max:
        raise QuantityError(text, option, allowed)
    return int(text)


def parse_pids(text: str, *, pid_max: int, option: str = "--pids") -> int:
    """How many processes and threads may live at once; ``pid_max`` is the host's ``kernel.pid_max``.

    Raises:
        QuantityError: not a whole number, below ``PIDS_MIN`` or above ``pid_max``.
    """
    return parse_count(text, count_min=PIDS_MIN, count_max=pid_max, option=option)


def parse_cpuset(text: str, *, cpus_online: Sequence[int], option: str = "--cpuset") -> tuple[int, ...]:
    """Ascending CPU numbers in ``0-2,4``.

    Args:
        text: As typed. Overlapping ranges are refused, for they are more likely a slip than meant.
        cpus_online: The host's CPU numbers, in any order.
        option: What the text was given for.

    Raises:
        QuantityError: not a list of CPUs, or one that the host does not have.
    """
    online = format_cpuset(cpus_online)
    allowed = f"numbers and ranges out of the host's CPUs {online}, such as {min(cpus_online)} or {online}"
    cpus = parse_cpu_list(text)
    if cpus is None or not set(cpus) <= set(cpus_online):
        raise QuantityError(text, option, allowed)
    return cpus


@functools.lru_cache(maxsize=256)
def parse_cpu_list(text: str) -> tuple[int, ...] | None:
    """Ascending CPU numbers in the kernel's own list form (``0-2,4``), or None where it is not one."""
    if len(text) > _CPUSET_CHARS_MAX:
        return None
    cpus: set[int] = set()
    for part in text.split(","):
        match = _CPU_RANGE.fullmatch(part)
        if match is None:
            return None
        first = int(match[1])
        last = int(match[2]) if match[2] is not None else first
        numbers = range(first, last + 1)
        if not numbers or last > CPU_NUMBER_MAX or not cpus.isdisjoint(numbers):
            return None
        cpus.update(numbers)
    return tuple(sorted(cpus))


_NO_DURATION: Final = frozenset({"none", "never", "0", "0s", "0.0"})


def parse_duration_ms(text: str, *, ms_max: int = DURATION_MS_MAX, ms_min: int = 1, option: str = "--timeout") -> int:
    """Milliseconds in ``500ms``, ``1s``, ``2m``, ``1.5h`` or a plain number of seconds.

    Raises:
        QuantityError: not a duration, or out of bounds.
    """
    low, high = format_duration_ms(ms_min), format_duration_ms(ms_max)
    allowed = f"a duration from {low} to {high}, such as 500ms, 30s, 2m or 1h"
    units = _DURATION_UNITS_MS
    return _scaled(text, units, bounds=(ms_min, ms_max), option=option, allowed=allowed, fold=False)


def parse_optional_duration_ms(text: str, *, option: str) -> int | None:
    """The same, where ``none`` and zero mean that there is no end: None.

    Raises:
        QuantityError: not a duration, or out of bounds.
    """
    return None if text in _NO_DURATION else parse_duration_ms(text, option=option)


def format_bytes(count_bytes: int) -> str:
    """A size to read: ``512 B``, ``64 MiB``, ``1.5 GiB``. Below 100 one decimal, rounded half up; never parsed."""
    power = 0
    while power < len(_SIZE_LETTERS) and count_bytes >= 1024 ** (power + 1):
        power += 1
    if power == 0:
        return f"{count_bytes} B"
    tenths = (count_bytes * 10 + 1024**power // 2) // 1024**power
    if tenths >= 1000:
        tenths = (count_bytes + 1024**power // 2) // 1024**power * 10
    if tenths >= 10240 and power < len(_SIZE_LETTERS):
        power, tenths = power + 1, 10
    return f"{_in_tenths(tenths)} {_SIZE_LETTERS[power - 1].upper()}iB"


def _in_tenths(tenths: int) -> str:
    return f"{tenths // 10}.{tenths % 10}" if tenths % 10 else str(tenths // 10)


def format_bytes_exact(count_bytes: int) -> str:
    """The shortest whole form that ``parse_memory`` reads back as the same number: ``64m``, ``1536m``, ``1000``."""
    for power in range(len(_SIZE_LETTERS), 0, -1):
        if count_bytes and count_bytes % 1024**power == 0:
            return f"{count_bytes // 1024**power}{_SIZE_LETTERS[power - 1]}"
    return str(count_bytes)


def format_bytes_short(count_bytes: int, *, round_down: bool = False) -> str:
    """A size for a message, such as ``23.5g``: exact where that is short, else with one decimal.

    ``round_down`` never names more than there is, so that what is said to be allowed is allowed.
    """
    exact = format_bytes_exact(count_bytes)
    if len(exact) <= 4:
        return exact
    if not round_down:
        return format_bytes(count_bytes).removesuffix("iB").removesuffix("B").replace(" ", "").lower()
    power = max((p for p in range(1, len(_SIZE_LETTERS) + 1) if count_bytes >= 1024**p), default=0)
    if power == 0:
        return exact
    tenths = count_bytes * 10 // 1024**power
    return f"{_in_tenths(tenths)}{_SIZE_LETTERS[power - 1]}"


def format_cpus(cpu_millis: int) -> str:
    """The shortest form that ``parse_cpus`` reads back: ``0.5``, ``2``, ``1.25``."""
    whole, millis = divmod(cpu_millis, 1000)
    return f"{whole}.{millis:03d}".rstrip("0") if millis else str(whole)


def format_cpuset(cpus: Iterable[int]) -> str:
    """CPU numbers in the kernel's list form: ``0-2,4``."""
    runs: list[tuple[int, int]] = []
    for cpu in sorted(set(cpus)):
        if runs and runs[-1][1] == cpu - 1:
            runs[-1] = (runs[-1][0], cpu)
        else:
            runs.append((cpu, cpu))
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def format_duration_ms(duration_ms: int) -> str:
    """The shortest whole form that ``parse_duration_ms`` reads back: ``500ms``, ``30s``, ``2m``, ``1h``."""
    for unit in ("h", "m", "s"):
        if duration_ms and duration_ms % _DURATION_UNITS_MS[unit] == 0:
            return f"{duration_ms // _DURATION_UNITS_MS[unit]}{unit}"
    return f"{duration_ms}ms"


def _scaled(
    text: str, units: dict[str, int], *, bounds: tuple[int, int], option: str, allowed: str, fold: bool = True
) -> int:
    """Decimal and unit to a whole number of the smallest unit, in whole arithmetic; a remainder is dropped."""
    match = _DECIMAL.fullmatch(text) if len(text) <= _TEXT_CHARS_MAX else None
    unit = units.get(match[3].lower() if fold else match[3]) if match is not None else None
    if match is None or unit is None or (match[2] is not None and unit == 1):
        raise QuantityError(text, option, allowed)
    fraction = match[2] or ""
    count: int = int(match[1] + fraction) * unit // 10 ** len(fraction)
    if not bounds[0] <= count <= bounds[1]:
        raise QuantityError(text, option, allowed)
    return count


def _size_examples(bytes_min: int, bytes_max: int) -> str:
    """Up to two round sizes that lie within the bounds."""
    rounds = (512 * 1024**2, 2 * 1024**3, 64 * 1024**2, 16 * 1024**2)
    fitting = [format_bytes_exact(size) for size in rounds if bytes_min <= size <= bytes_max]
    return " or ".join(fitting[:2]) if fitting else format_bytes_exact(bytes_min)
