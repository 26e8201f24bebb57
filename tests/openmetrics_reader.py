"""A strict reader of OpenMetrics text, written from the specification and not from our writer.

https://github.com/prometheus/OpenMetrics/blob/main/specification/OpenMetrics.md (1.0.0). It refuses what the text
format does not allow, so that a monitoring system that is as strict gets what it expects.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"')
NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?Inf|NaN")
TYPES = {"counter", "gauge", "histogram", "info"}
SUFFIXES = {"counter": {"_total"}, "gauge": {""}, "info": {"_info"}, "histogram": {"_bucket", "_sum", "_count"}}

Labels = tuple[tuple[str, str], ...]


@dataclass
class Family:
    name: str
    kind: str
    unit: str = ""
    about: str = ""
    samples: dict[tuple[str, Labels], float] = field(default_factory=dict)

    def value(self, suffix: str = "", **labels: str) -> float:
        """Of the one sample with these labels."""
        return self.samples[suffix, tuple(sorted(labels.items()))]

    def total(self, suffix: str, **labels: str) -> float:
        """Of all samples that have these labels."""
        return sum(
            value
            for (found, series), value in self.samples.items()
            if found == suffix and labels.items() <= dict(series).items()
        )


def read(text: str) -> dict[str, Family]:
    """The families by name. What is no OpenMetrics text is a ``ValueError``."""
    if not text.endswith("# EOF\n"):
        raise ValueError("it does not end with # EOF")
    families: dict[str, Family] = {}
    family: Family | None = None
    for line in text.removesuffix("# EOF\n").split("\n")[:-1]:
        if line.startswith("#"):
            family = _describe(line, family, families)
        elif family is None:
            raise ValueError(f"a sample of nothing: {line}")
        else:
            _add_sample(line, family)
    for found in families.values():
        if found.kind == "histogram":
            _check_histogram(found)
    return families


def _describe(line: str, family: Family | None, families: dict[str, Family]) -> Family:
    words = line.split(" ", 3)
    if len(words) != 4 or words[0] != "#" or not NAME.fullmatch(words[2]):
        raise ValueError(f"no description: {line}")
    _, what, name, rest = words
    if what == "TYPE":
        if name in families or rest not in TYPES:
            raise ValueError(f"a second time, or of no type: {line}")
        families[name] = Family(name, rest)
        return families[name]
    if family is None or name != family.name or family.samples:
        raise ValueError(f"not at the beginning of its family: {line}")
    if what == "UNIT" and not family.unit and name.endswith(f"_{rest}"):
        family.unit = rest
    elif what == "HELP" and not family.about:
        family.about = _unescaped(rest)
    else:
        raise ValueError(f"no description: {line}")
    return family


def _add_sample(line: str, family: Family) -> None:
    matched = NAME.match(line)
    if matched is None:
        raise ValueError(f"no sample: {line}")
    suffix = matched[0].removeprefix(family.name)
    if not matched[0].startswith(family.name) or suffix not in SUFFIXES[family.kind]:
        raise ValueError(f"no sample of {family.name}, a {family.kind}: {line}")
    rest = line[matched.end() :]
    labels: list[tuple[str, str]] = []
    if rest.startswith("{"):
        rest = rest[1:]
        while not rest.startswith("}"):
            label = LABEL.match(rest)
            if label is None:
                raise ValueError(f"no label: {line}")
            labels.append((label[1], _unescaped(label[2])))
            rest = rest[label.end() :].removeprefix(",")
        rest = rest[1:]
    if not rest.startswith(" ") or not NUMBER.fullmatch(rest[1:]):
        raise ValueError(f"no value: {line}")
    key = suffix, tuple(sorted(labels))
    if key in family.samples or len({name for name, _ in labels}) != len(labels):
        raise ValueError(f"a second time: {line}")
    value = float(rest)
    if (family.kind in {"counter", "histogram"} and not value >= 0) or (family.kind == "info" and value != 1):
        raise ValueError(f"no value of a {family.kind}: {line}")
    family.samples[key] = value


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", lambda escape: {"n": "\n"}.get(escape[1], escape[1]), text)


def _check_histogram(family: Family) -> None:
    series: dict[Labels, list[tuple[float, float]]] = {}
    for (suffix, labels), value in family.samples.items():
        if suffix == "_bucket":
            bound = dict(labels)["le"]
            rest = tuple(pair for pair in labels if pair[0] != "le")
            series.setdefault(rest, []).append((float(bound), value))
    for labels, buckets in series.items():
        if buckets != sorted(buckets) or [value for _, value in buckets] != sorted(value for _, value in buckets):
            raise ValueError(f"buckets of {family.name} do not rise")
        if buckets[-1] != (math.inf, family.samples["_count", labels]) or ("_sum", labels) not in family.samples:
            raise ValueError(f"the buckets of {family.name} do not end with its count")
