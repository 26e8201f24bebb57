"""Tables, sizes and ages as text for people, on a terminal of any width. Pure.

Unknown values are a dash: never a zero, never an empty column.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

UNKNOWN = "-"
GAP = "   "
CUT = "..."
CELL_LENGTH_MIN = 12
"""Of a cell that is cut: less says nothing."""


_SIZES = ("B", "KiB", "MiB", "GiB", "TiB")
_AGES = ((86_400, "d"), (3_600, "h"), (60, "m"), (1, "s"))


PROSE_LENGTH_MIN = 24
"""Of a line of prose beside a table: in less nobody can read it."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    return table_of([header, *rows])


def table_of(lines: Sequence[Sequence[str]]) -> str:
    """The same, with the header as its first line, or without one."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "".join(
        GAP.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n"
        for line in lines
    )


def size(count: int | None) -> str:
    """Bytes, in the largest unit that fits, as the daemon's messages tell them: one decimal below 100."""
    if count is None:
        return UNKNOWN
    power = max(count.bit_length() - 1, 0) // 10
    if (count + 1024**power // 2) // 1024**power == 1024:
        power += 1
    power = min(power, len(_SIZES) - 1)
    unit = 1024**power
    tenths = (count * 10 + unit // 2) // unit
    if tenths >= 1000:
        return f"{(count + unit // 2) // unit} {_SIZES[power]}"
    return f"{tenths // 10}.{tenths % 10}".removesuffix(".0") + f" {_SIZES[power]}"


def age(since_ms: int | None, now_ms: int) -> str:
    """How long ago, in the largest unit that fits."""
    if since_ms is None:
        return UNKNOWN
    seconds = max(now_ms - since_ms, 0) // 1000
    for unit, name in _AGES:
        if seconds >= unit:
            return f"{seconds // unit}{name}"
    return "now"


def ago(at_ms: int, now_ms: int) -> str:
    """When something was, in words."""
    text = age(at_ms, now_ms)
    return text if text == "now" else f"{text} ago"


def until(at_ms: int | None, now_ms: int) -> str:
    """How long until then, to the nearest second, in the largest unit that fits."""
    return UNKNOWN if at_ms is None else age(now_ms, max(at_ms, now_ms) + 500)


def duration(milliseconds: int | None) -> str:
    """A duration as it is written on the command line."""
    if milliseconds is None:
        return "none"
    for unit_s, name in _AGES:
        if milliseconds % (unit_s * 1000) == 0:
            return f"{milliseconds // (unit_s * 1000)}{name}"
    return f"{milliseconds / 1000:g}s"


def shown(text: str) -> str:
    """Text from inside a sandbox: quoted where a terminal would make something else of it."""
    return text if text and text.isprintable() else repr(text)


def one_line(text: str) -> str:
    """A name that a sandbox chose, without what moves a terminal's cursor."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def harmless(text: str) -> str:
    """Text that a sandbox wrote, line by line and with its tabs, without what moves a terminal's cursor."""
    return "\n".join("\t".join(one_line(cell) for cell in line.split("\t")) for line in text.split("\n"))


def yes_no(flag: bool) -> str:
    """A flag in words."""
    return "yes" if flag else "no"


def known(value: object) -> str:
    """As text; a dash where nothing is known."""
    return UNKNOWN if value is None or value == "" else str(value)


def facts(pairs: Sequence[tuple[str, str]], columns: int | None = None) -> str:
    """A line for each thing that is known; on a terminal what is long goes on below itself."""
    names = max(len(name) for name, _ in pairs)
    rows = [(name.ljust(names), value) for name, value in pairs]
    return table_of(rows) if columns is None else _wrapped(rows, columns)


def fitted(text: str, columns: int | None) -> str:
    """The text with lines no longer than a terminal's; None: as it is."""
    return text if columns is None else "".join(f"{_cut(line, columns)}\n" for line in text.splitlines())


def on_screen(
    header: Sequence[str], rows: Sequence[Sequence[str]], columns: int | None, yielding: Sequence[str] = ()
) -> str:
    """A table; on a terminal no wider than that, and without columns of which nothing is known.

    Args:
        header: Of the columns.
        rows: Their cells.
        columns: The terminal's width; None: there is none.
        yielding: Headers of columns that are cut short, and then left out, where it is too narrow: the first first.
    """
    if columns is None or not rows:
        return table(header, rows)
    return fitted(table_of(_narrowed(_without_empty([header, *rows]), columns, yielding)), columns)


def with_prose(
    header: Sequence[str], rows: Sequence[Sequence[str]], columns: int | None, yielding: Sequence[str] = ()
) -> str:
    """The same, with sentences as the last column: on a terminal they go on below themselves."""
    if columns is None or not rows:
        return table(header, rows)
    cells = _without_empty([line[:-1] for line in (header, *rows)])
    prose = [header[-1], *(row[-1] for row in rows)]
    room = min(max(len(text) for text in prose), PROSE_LENGTH_MIN)
    cells = _narrowed(cells, columns - room - len(GAP), yielding)
    return _wrapped([(*line, text) for line, text in zip(cells, prose, strict=True)], columns)


def has_room(header: Sequence[str], rows: Sequence[Sequence[str]], columns: int | None) -> bool:
    """Whether a table has room for sentences beside its columns, of which the last are those sentences."""
    return columns is None or _width([line[:-1] for line in (header, *rows)]) + len(GAP) + PROSE_LENGTH_MIN <= columns


def _wrapped(lines: Sequence[Sequence[str]], columns: int) -> str:
    if _width(lines) <= columns:
        return table_of(lines)
    import textwrap

    room = max(columns - _width([line[:-1] for line in lines]) - len(GAP), CELL_LENGTH_MIN)
    # What is one word, such as a path, is left whole: it may be wanted.
    wrapper = textwrap.TextWrapper(room, break_long_words=False, break_on_hyphens=False)
    wrapped = []
    for *cells, prose in lines:
        first, *more = wrapper.wrap(prose) or [""]
        wrapped += [(*cells, first), *((*("" for _ in cells), text) for text in more)]
    return table_of(wrapped)


def _without_empty(text_of: Sequence[Sequence[str]]) -> list[list[str]]:
    """The table without columns of which nothing is known; the header is its first row."""
    told = [any(row[column] not in (UNKNOWN, "") for row in text_of[1:]) for column in range(len(text_of[0]))]
    return [[cell for cell, keep in zip(row, told, strict=True) if keep] for row in text_of]


def _narrowed(text_of: list[list[str]], columns: int, yielding: Sequence[str]) -> list[list[str]]:
    """The table, its header first, made to fit: cells of some columns keep their end only, or else those columns go.

    Args:
        text_of: Header and rows.
        columns: How wide it may be.
        yielding: Headers of those columns, the first to yield first.
    """
    for name in yielding:
        over = _width(text_of) - columns
        if over > 0 and name in text_of[0]:
            place = text_of[0].index(name)
            room = max(max(len(row[place]) for row in text_of) - over, CELL_LENGTH_MIN)
            text_of = [[*row[:place], _tail(row[place], room), *row[place + 1 :]] for row in text_of]
    for name in yielding:
        if _width(text_of) > columns and name in text_of[0]:
            place = text_of[0].index(name)
            text_of = [[*row[:place], *row[place + 1 :]] for row in text_of]
    return text_of


def _width(text_of: Sequence[Sequence[str]]) -> int:
    widths = [max(len(row[place]) for row in text_of) for place in range(len(text_of[0]))]
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _tail(text: str, length: int) -> str:
    return text if len(text) <= length else f"...{text[3 - length :]}"


def short_image(image: str) -> str:
    """As people write it, and as the daemon's hints do."""
    for registry in ("localhost/", "docker.io/library/", "docker.io/"):
        image = image.removeprefix(registry)
    return image.removesuffix(":latest")


def _cut(line: str, columns: int) -> str:
    return line if len(line) <= columns else f"{line[: max(columns - len(CUT), 0)]}{CUT}"
