"""Tar archives as a stream: headers to bytes, and bytes of anybody's making to headers.

Pure, and light enough for the command line: no imports at all. Names are bytes, as the kernel has them.

What is written is ustar, with POSIX extended headers ("pax") where a name is too long or a number too large for it,
or a time has more than seconds. What is read is that, old tar, and GNU's long names and large numbers. Sparse entries
are told as such and not understood.

An archive is untrusted. Every header is bounded before it is read, a number that is none is an error, and names come
out as they are: ``steps_of`` says where one leads.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK_BYTES = 512
END = bytes(2 * BLOCK_BYTES)
"""What an archive ends with."""

EXTENSION_BYTES_MAX = 1024 * 1024
"""Of one extended header: two paths take 8 KiB, extended attributes, which nobody reads, 64 KiB each."""

EXTENSIONS_MAX = 8
"""Extended headers before one entry; honest archives have one or two, and a global one at the start."""

SIZE_BYTES_MAX = 2**63 - 1
PATH_BYTES_MAX = 4095
NAME_BYTES_MAX = 255

FILE, DIRECTORY, SYMLINK, HARDLINK, OTHER = "file", "dir", "symlink", "link", "other"

_KINDS = {b"0": FILE, b"\0": FILE, b"7": FILE, b"1": HARDLINK, b"2": SYMLINK, b"5": DIRECTORY}
_FLAGS = {FILE: b"0", HARDLINK: b"1", SYMLINK: b"2", DIRECTORY: b"5"}
_OTHERS = {b"3": "a character device", b"4": "a block device", b"6": "a FIFO", b"S": "a sparse file"}
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
_DAMAGED = "it is no tar archive, or it is damaged: the checksum of a header is wrong"
_NO_NUMBER = "the archive has a header with a number that is none"
_POSIX_MAGIC = b"ustar\0"
_NANOSECONDS = 10**9
_TIME_SECONDS_MAX = 2**63 // _NANOSECONDS - 1
_DIGITS_MAX = 20
_CHECKSUM_OF_BLANKS = 8 * 0x20
"""The checksum's own field counts as blanks."""
_OCTAL_11 = 0o77777777777


class TarError(Exception):
    """This is no archive, or it ends where it should not."""


class Member:
    """One entry of an archive.

    ``target`` is where a symlink leads, or the name of the entry that a hard link is another name of. ``what`` says
    what an entry of the kind ``other`` is. Its data, ``size`` bytes and then ``padding_of(size)``, follow the header.
    """

    __slots__ = ("kind", "mode", "mtime_ns", "name", "size", "target", "what")

    def __init__(
        self, name: bytes, kind: str, *, mode: int, mtime_ns: int, size: int = 0, target: bytes = b"", what: str = ""
    ) -> None:
        self.name = name
        self.kind = kind
        self.mode = mode
        self.mtime_ns = mtime_ns
        self.size = size
        self.target = target
        self.what = what

    def __repr__(self) -> str:
        fields = ", ".join(f"{slot}={getattr(self, slot)!r}" for slot in self.__slots__)
        return f"Member({fields})"


def padding_of(size: int) -> int:
    """How many bytes fill the last block of so much data."""
    return -size % BLOCK_BYTES


def steps_of(name: bytes) -> list[bytes] | None:
    """The names that lead from where an archive is unpacked to an entry; None when they lead elsewhere, or nowhere.

    A leading slash means nothing. Empty: the entry is the place itself.
    """
    if b"\0" in name or len(name) > PATH_BYTES_MAX:
        return None
    steps = [step for step in name.split(b"/") if step not in (b"", b".")]
    if any(step == b".." or len(step) > NAME_BYTES_MAX for step in steps):
        return None
    return steps


# --- writing


def header_of(member: Member) -> bytes:
    """The header of one entry: whole blocks. Its data are the caller's to send."""
    name = member.name + b"/" if member.kind == DIRECTORY and not member.name.endswith(b"/") else member.name
    seconds, nanoseconds = divmod(member.mtime_ns, _NANOSECONDS)
    records = b""
    prefix, short = _split(name)
    if not short:
        records += _record(b"path", name)
        short = name[:100]
    if len(member.target) > 100:
        records += _record(b"linkpath", member.target)
    if member.size > _OCTAL_11:
        records += _record(b"size", b"%d" % member.size)
    if nanoseconds or not 0 <= seconds <= _OCTAL_11:
        records += _record(b"mtime", _decimal(member.mtime_ns))
    block = _block(
        _FLAGS[member.kind],
        prefix,
        short,
        member.mode,
        member.size if member.size <= _OCTAL_11 else 0,
        min(max(seconds, 0), _OCTAL_11),
        member.target[:100],
    )
    if not records:
        return block
    if not _is_utf8(name) or not _is_utf8(member.target):
        records = _record(b"hdrcharset", b"BINARY") + records
    head = _block(b"x", b"", b"PaxHeaders/" + short[-80:].strip(b"/"), 0o644, len(records), 0, b"")
    return head + records + bytes(padding_of(len(records))) + block


def _block(flag: bytes, prefix: bytes, name: bytes, mode: int, size: int, seconds: int, target: bytes) -> bytes:
    before = b"%s%07o\0%07o\0%07o\0%011o\0%011o\0" % (name.ljust(100, b"\0"), mode, 0, 0, size, seconds)
    after = b"%s%sustar\x0000%s%07o\0%07o\0%s" % (
        flag,
        target.ljust(100, b"\0"),
        bytes(64),
        0,
        0,
        prefix.ljust(167, b"\0"),
    )
    return b"%s%06o\0 %s" % (before, sum(before) + sum(after) + _CHECKSUM_OF_BLANKS, after)


def _split(name: bytes) -> tuple[bytes, bytes]:
    """The two parts of a name that the header has room for; the second is empty when it has not."""
    if len(name) <= 100:
        return b"", name
    at = name.rfind(b"/", 1, min(156, len(name) - 1))
    if at < 0 or len(name) - at - 1 > 100:
        return b"", b""
    return name[:at], name[at + 1 :]


def _record(key: bytes, value: bytes) -> bytes:
    """A record is preceded by its length, which counts the digits of that length too."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) > len(str(rest)):
        length += 1
    return b"%d %s=%s\n" % (length, key, value)


def _decimal(nanoseconds: int) -> bytes:
    sign = b"-" if nanoseconds < 0 else b""
    seconds, rest = divmod(abs(nanoseconds), _NANOSECONDS)
    return b"%s%d.%09d" % (sign, seconds, rest)


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


# --- reading


def next_member(take: Callable[[int], bytes]) -> Member | None:
    """The next entry of an archive, or None at its end.

    Args:
        take: Returns exactly so many bytes of the stream, or raises. It is asked for a block, or for an extended
            header of at most ``EXTENSION_BYTES_MAX`` with what fills its last block.

    Raises:
        TarError: It is no archive, or one with headers that nobody writes.
    """
    extended: dict[bytes, bytes] = {}
    for _ in range(EXTENSIONS_MAX + 1):
        block = take(BLOCK_BYTES)
        if not block.strip(b"\0"):
            if extended or take(BLOCK_BYTES).strip(b"\0"):
                raise TarError("the archive has an end in its middle")
            return None
        flag = _checked(block)
        if flag in (b"x", b"X"):
            _add_records(extended, _extension(block, take))
        elif flag == b"g":
            _extension(block, take)
        elif flag in (b"L", b"K"):
            extended[b"path" if flag == b"L" else b"linkpath"] = _until_nul(_extension(block, take))
        else:
            return _member(block, flag, extended)
    raise TarError(f"the archive has more than {EXTENSIONS_MAX} extended headers for one entry")


def _checked(block: bytes) -> bytes:
    """The type of a header whose checksum is right."""
    said = _number(block[148:156], _DAMAGED)
    around = block[:148] + block[156:]
    summed = sum(around) + _CHECKSUM_OF_BLANKS
    # Old tars took bytes for signed.
    if said != summed and said != summed - 256 * sum(byte >= 0x80 for byte in around):
        raise TarError(_DAMAGED)
    return block[156:157]


def _extension(block: bytes, take: Callable[[int], bytes]) -> bytes:
    size = _number(block[124:136])
    if not 0 <= size <= EXTENSION_BYTES_MAX:
        raise TarError(f"the archive has an extended header of {size} bytes, and {EXTENSION_BYTES_MAX} are the most")
    return take(size + padding_of(size))[:size]


def _member(block: bytes, flag: bytes, extended: dict[bytes, bytes]) -> Member:
    name = _until_nul(block[:100])
    if block[257:263] == _POSIX_MAGIC and (prefix := _until_nul(block[345:500])):
        name = prefix + b"/" + name
    name = extended.get(b"path", name)
    size = _decimal_number(extended[b"size"]) if b"size" in extended else _number(block[124:136])
    mtime_ns = _time(extended[b"mtime"]) if b"mtime" in extended else _number(block[136:148]) * _NANOSECONDS
    if flag in _WITHOUT_DATA:
        size = 0
    if not 0 <= size <= SIZE_BYTES_MAX:
        raise TarError(f"the archive has an entry of {size} bytes")
    kind = _KINDS.get(flag, OTHER)
    what = "" if kind != OTHER else _OTHERS.get(flag, f"an entry of type {flag.decode('latin-1')!r}")
    if flag == b"\0" and name.endswith(b"/"):
        kind = DIRECTORY
    if b"GNU.sparse" in extended:
        kind, what = OTHER, "a sparse file"
    if flag == b"S":
        raise TarError("the archive has sparse files in GNU's old format: make it with tar --format=pax, without -S")
    return Member(
        name,
        kind,
        mode=_number(block[100:108]) & 0o7777,
        mtime_ns=_bounded_time(mtime_ns),
        size=size,
        target=extended.get(b"linkpath", _until_nul(block[157:257])),
        what=what,
    )


def _add_records(extended: dict[bytes, bytes], data: bytes) -> None:
    """Take from a pax header what is of use."""
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + _DIGITS_MAX)
        length = _decimal_number(data[at:space]) if space > 0 else 0
        end = at + length
        equals = data.find(b"=", space, end)
        if length <= space + 1 - at or end > len(data) or equals < 0 or data[end - 1 : end] != b"\n":
            raise TarError("the archive has an extended header that cannot be read")
        key = data[space + 1 : equals]
        if key.startswith(b"GNU.sparse."):
            extended[b"GNU.sparse"] = b""
        elif key in (b"path", b"linkpath", b"size", b"mtime"):
            extended[key] = data[equals + 1 : end - 1]
        at = end


def _until_nul(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _number(field: bytes, complaint: str = _NO_NUMBER) -> int:
    """A number as tar has them: octal digits, or, where the first byte says so, big-endian binary."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big", signed=False) - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    digits = _until_nul(field).strip(b" ")
    if digits.strip(b"01234567"):
        raise TarError(complaint)
    return int(digits, 8) if digits else 0


def _decimal_number(text: bytes) -> int:
    if not text.isdigit() or len(text) > _DIGITS_MAX:
        raise TarError("the archive has an extended header with a number that is none")
    return int(text)


def _time(text: bytes) -> int:
    """Nanoseconds in ``-1.5`` and the like; what is finer is cut off."""
    whole, _, fraction = text.lstrip(b"-").partition(b".")
    if text.count(b"-") > 1 or (b"-" in text and not text.startswith(b"-")) or (fraction and not fraction.isdigit()):
        raise TarError("the archive has a time that is none")
    nanoseconds = _decimal_number(whole) * _NANOSECONDS + int(fraction[:9].ljust(9, b"0"))
    return -nanoseconds if text.startswith(b"-") else nanoseconds


def _bounded_time(nanoseconds: int) -> int:
    """Into what 64 bits hold."""
    most = _TIME_SECONDS_MAX * _NANOSECONDS
    return min(max(nanoseconds, -most), most)
