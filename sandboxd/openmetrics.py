"""Figures as OpenMetrics text (version 1.0.0). Pure: counts and times in, text out.

Labels are for what there are a few of, known beforehand: an engine, a state, a template of the configuration. Never
an id, a name or a path, for each value of a label is a series that a monitoring system keeps for ever.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence

CONTENT_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"

QUICK_S = (0.001, 0.002, 0.003, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
"""Bounds of what takes milliseconds: claims, commands."""

SLOW_S = (0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Bounds of what an engine takes part in."""

Labels = tuple[str, ...]
Samples = Iterable[tuple[Labels, float]]

_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n"}


class Counter:
    """Something that only grows, per combination of labels. Its name is told with ``_total`` behind it.

    Args:
        name: Without that.
        about: A sentence.
        labels: Their names.
    """

    def __init__(self, name: str, about: str, labels: Labels = ()) -> None:
        self.name = name
        self.about = about
        self.labels = labels
        self._counts: dict[Labels, float] = {} if labels else {(): 0.0}

    def add(self, *values: str, by: float = 1.0) -> None:
        """Count."""
        self._counts[values] = self._counts.get(values, 0.0) + by

    def lines(self) -> Iterator[str]:
        """The family."""
        return counted(self.name, self.about, self._counts.items(), self.labels)


class Histogram:
    """How long something took, per combination of labels. Its name ends with ``_seconds``.

    Args:
        name: With that.
        about: A sentence.
        bounds_s: Of the buckets, rising.
        labels: Their names.
    """

    def __init__(self, name: str, about: str, bounds_s: Sequence[float], labels: Labels = ()) -> None:
        self.name = name
        self.about = about
        self.labels = labels
        self._bounds_s = bounds_s
        self._series: dict[Labels, tuple[list[int], list[float]]] = {}

    def observe(self, seconds: float, *values: str) -> None:
        """Book one."""
        counts, total = self._series.setdefault(values, ([0] * (len(self._bounds_s) + 1), [0.0]))
        counts[bisect_left(self._bounds_s, seconds)] += 1
        total[0] += seconds

    def lines(self) -> Iterator[str]:
        """The family."""
        yield from _head(self.name, "histogram", self.about, "seconds")
        for values, (counts, total) in self._series.items():
            below = 0
            for bound, count in zip((*(number(bound) for bound in self._bounds_s), "+Inf"), counts, strict=True):
                below += count
                yield f"{self.name}_bucket{_labelled((*self.labels, 'le'), (*values, bound))} {below}"
            yield f"{self.name}_sum{_labelled(self.labels, values)} {number(total[0])}"
            yield f"{self.name}_count{_labelled(self.labels, values)} {below}"


def counted(name: str, about: str, samples: Samples, labels: Labels = (), *, unit: str = "") -> Iterator[str]:
    """A family of counters whose counts are kept elsewhere."""
    yield from _head(name, "counter", about, unit)
    for values, value in samples:
        yield f"{name}_total{_labelled(labels, values)} {number(value)}"


def measured(name: str, about: str, samples: Samples, labels: Labels = (), *, unit: str = "") -> Iterator[str]:
    """A family of gauges: what rises and falls. With a unit the name ends with it."""
    yield from _head(name, "gauge", about, unit)
    for values, value in samples:
        yield f"{name}{_labelled(labels, values)} {number(value)}"


def described(name: str, about: str, labels: Mapping[str, str]) -> Iterator[str]:
    """A family that says something in words, with one sample."""
    yield from _head(name, "info", about, "")
    yield f"{name}_info{_labelled(tuple(labels), tuple(labels.values()))} 1"


def exposition(families: Iterable[Iterable[str]]) -> str:
    """All families as one text, with its end."""
    return "".join(f"{line}\n" for family in families for line in family) + "# EOF\n"


def _head(name: str, kind: str, about: str, unit: str) -> Iterator[str]:
    yield f"# TYPE {name} {kind}"
    if unit:
        yield f"# UNIT {name} {unit}"
    yield f"# HELP {name} {_escaped(about)}"


def _labelled(names: Labels, values: Labels) -> str:
    if not names:
        return ""
    pairs = (f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True))
    return "{" + ",".join(pairs) + "}"


def _escaped(text: str) -> str:
    return "".join(_ESCAPES.get(character, character) for character in text)


def number(value: float) -> str:
    """As the format writes it."""
    return str(value) if isinstance(value, int) else repr(value)
