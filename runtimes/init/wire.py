r"""The messages between the daemon and `sandbox-init`, as bytes and as structs.

One `SOCK_SEQPACKET` datagram is one message. All numbers are little endian. A message starts with

| bytes | field      | meaning                                                        |
|-------|------------|----------------------------------------------------------------|
| 2     | magic      | 0x4253                                                         |
| 2     | type       | below                                                          |
| 4     | request_id | chosen by the asker, echoed in the reply; 0 in events          |

A string is `u32 length, bytes, NUL`: the NUL is outside of the length, and may not be inside of the bytes.

| type   | message       | body                                                                            |
|--------|---------------|---------------------------------------------------------------------------------|
| 0x0001 | HELLO         | u16 lowest, u16 highest version spoken; the highest that both speak is used     |
| 0x8001 | reply         | u16 version, u16 0, 16 nonce, u32 commands, u32 capacity, string program        |
| 0x0002 | SPAWN         | u64 command_id, u32 flags (1 pty, 2 inherit env: init's own variables that are   |
|        |               | not given are added; 4 keep pty, from version 2 on: init keeps a copy of        |
|        |               | the master, if it has room), u16 rows, u16 cols, u16 rlimits, u16 argc,         |
|        |               | u16 envc, u16 0, rlimits x (u32 resource, u32 0, u64 soft, u64 hard), string    |
|        |               | cwd, argc x string, envc x string; three descriptors, with a pty none           |
| 0x8002 | reply         | u32 pid, u32 flags (1 pty); with a pty one descriptor, its master               |
| 0x0003 | SIGNAL        | u64 command_id, u32 signal, u32 scope (0 main, 1 group, 2 tree)                 |
| 0x0004 | KILL          | u64 command_id                                                                  |
| 0x0005 | LIST          | u32 slot to start from                                                          |
| 0x8005 | reply         | u32 slot to go on from (0xffffffff: that was all), u32 count, count x (u64      |
|        |               | command_id, u32 pid, u32 state, u32 flags, u32 status, usage)                   |
| 0x0006 | FORGET        | u64 command_id                                                                  |
| 0x0007 | TERMINAL      | u64 command_id; from version 2 on                                               |
| 0x8007 | reply         | nothing; one descriptor, the master of its terminal                             |
| 0x0010 | FILES         | u32 flags, 0                                                                    |
| 0x8010 | reply         | u32 pid, u32 version of the protocol in `files_wire.py`; one descriptor, a      |
|        |               | socket with a file worker at its other end, which lives until it is closed      |
| 0x0011 | LISTEN        | u32 flags (1 ::1 and not 127.0.0.1), u16 port, u16 0                            |
| 0x8011 | reply         | nothing; one descriptor, a TCP socket that listens on the sandbox's loopback    |
| 0x0012 | DIAL          | like LISTEN                                                                     |
| 0x8012 | reply         | nothing; one descriptor, a non-blocking TCP socket that connects to that port,  |
|        |               | or has: it is writable once it has, or has failed                               |
| 0x8003 | reply         | nothing; 0x8004 and 0x8006 likewise                                             |
| 0xffff | ERROR         | u32 errno, u32 stage                                                            |
| 0x4001 | event EXITED  | u64 command_id, u32 status, u32 flags, usage                                    |
| 0x4002 | event GONE    | u64 command_id, u32 flags                                                       |

usage is u64 utime_us, u64 stime_us, u64 maxrss_kib, u64 wall_us. Flags of a command: 1 its keeper was lost, 2 its
wait status is not known, from version 2 on 4 its terminal is kept. state: 0 free (never sent), 1 starting, 2 running,
3 exited, 4 gone. 0x0013 to 0x00ff are kept for requests to come; a type that init does not know is answered with
ERROR EOPNOTSUPP.

Versions: 1 had neither TERMINAL nor the flags about kept terminals. A sandbox keeps the init that it was made with;
old ones are met as long as old sandboxes live, and HELLO settles on the highest version that both know.

Bounds: a message to init has at most 192 KiB, one from init at most 16 KiB; argv and env have at most 4096
entries each; at most 16 rlimits; a command_id has 63 bits.

Errors of SPAWN that tell something: EEXIST (stage admit) the id is in use; ENOSPC (admit) the table is full, forget
ended commands; ESHUTDOWN (admit) init is stopping; ECANCELED (keeper) the command's keeper was killed meanwhile.
ENOTTY to TERMINAL: none is kept. ENOSPC to FILES: as many workers as there may be, 8, are there. ENOENT: no such
command. EBUSY to FORGET: not gone yet. ESRCH to SIGNAL: nobody there to signal. To LISTEN and DIAL at stage socket
what the kernel says: EADDRINUSE, EACCES, ECONNREFUSED, EADDRNOTAVAIL (no IPv6 there).

Everything that init sends is untrusted: decoding accepts exactly this and raises `WireError` for anything else.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence

import msgspec

PROTOCOL_VERSION = 2
"""The highest that is spoken here. Each sandbox keeps the init that it was made with, so that of older inits stay."""
PROTOCOL_VERSION_LOWEST = 1
TERMINALS_VERSION = 2
"""From which on init keeps terminals."""
MAGIC = 0x4253

# Below the kernel's default wmem_max of 208 KiB, so that a message always fits into an empty socket.
REQUEST_BYTES_MAX = 192 * 1024
REPLY_BYTES_MAX = 16 * 1024
STRINGS_MAX = 4096
RLIMITS_MAX = 16
LIST_PAGE_MAX = 256
COMMAND_ID_MAX = 2**63 - 1
LIST_END = 0xFFFFFFFF
PROGRAM_BYTES_MAX = 64
RLIM_INFINITY = 2**64 - 1

_HEADER = struct.Struct("<HHI")
_HELLO = struct.Struct("<HH")
_HELLO_REPLY = struct.Struct("<HH16sII")
_SPAWN = struct.Struct("<QIHHHHHH")
_RLIMIT = struct.Struct("<IIQQ")
_SPAWNED = struct.Struct("<II")
_FILES = struct.Struct("<I")
_FILES_REPLY = struct.Struct("<II")
_SOCKET = struct.Struct("<IHH")
_SIGNAL = struct.Struct("<QII")
_COMMAND_ID = struct.Struct("<Q")
_LIST = struct.Struct("<I")
_LIST_REPLY = struct.Struct("<II")
_ENTRY = struct.Struct("<QIIIIQQQQ")
_ERROR = struct.Struct("<II")
_EXITED = struct.Struct("<QIIQQQQ")
_GONE = struct.Struct("<QI")
_LENGTH = struct.Struct("<I")

_FLAG_PTY = 1
_FLAG_INHERIT_ENV = 2
_FLAG_KEEP_PTY = 4
_FLAG_KEEPER_LOST = 1
_FLAG_STATUS_UNKNOWN = 2
_FLAG_PTY_KEPT = 4
_FLAG_IPV6 = 1
_REPLY = 0x8000
PORT_MAX = 0xFFFF
_PID_MAX = 4 * 1024 * 1024
_ERRNO_MAX = 4095
_WAIT_STATUS_MAX = 0xFFFF


class InitError(Exception):
    """Whatever can go wrong between the daemon and a sandbox's init."""


class WireError(InitError):
    """These bytes are no message of this protocol."""


class InvalidPort(InitError, ValueError):
    """No TCP port."""


class InvalidSpawn(InitError, ValueError):
    """A request that cannot be put on the wire: a NUL inside a string, an id out of range."""


class SpawnTooLarge(InitError):
    """argv and env together exceed what one message holds."""


class MessageType(enum.IntEnum):
    """The type field. A reply's type is its request's with the top bit set."""

    HELLO = 0x0001
    SPAWN = 0x0002
    SIGNAL = 0x0003
    KILL = 0x0004
    LIST = 0x0005
    FORGET = 0x0006
    TERMINAL = 0x0007
    FILES = 0x0010
    LISTEN = 0x0011
    DIAL = 0x0012
    EXITED = 0x4001
    GONE = 0x4002
    HELLO_REPLY = 0x8001
    SPAWN_REPLY = 0x8002
    SIGNAL_REPLY = 0x8003
    KILL_REPLY = 0x8004
    LIST_REPLY = 0x8005
    FORGET_REPLY = 0x8006
    TERMINAL_REPLY = 0x8007
    FILES_REPLY = 0x8010
    LISTEN_REPLY = 0x8011
    DIAL_REPLY = 0x8012
    ERROR = 0xFFFF


class Stage(enum.IntEnum):
    """How far a request came before it failed."""

    REQUEST = 0
    ADMIT = 1
    DESCRIPTORS = 2
    PTY = 3
    FORK = 4
    SESSION = 5
    RLIMIT = 6
    CHDIR = 7
    EXEC = 8
    KEEPER = 9
    SOCKET = 10


class Scope(enum.IntEnum):
    """Whom a signal reaches."""

    MAIN = 0
    GROUP = 1
    TREE = 2


class CommandState(enum.IntEnum):
    """What is true of a command in init's table."""

    STARTING = 1
    RUNNING = 2
    EXITED = 3
    GONE = 4


class Rlimit(msgspec.Struct, frozen=True):
    """One resource limit, numbers as in `resource` of the sandbox's architecture; `RLIM_INFINITY` for none."""

    resource: int
    soft: int
    hard: int


class PtySize(msgspec.Struct, frozen=True):
    """A terminal's size in characters."""

    rows: int
    cols: int


class SpawnRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A command to start. With `pty` no descriptors are passed.

    `env` is the whole environment, or with `inherit_env` what is set on top of init's own: the image's. With
    `keep_pty` init keeps the terminal for who comes later; an init that speaks version 1 cannot.
    """

    command_id: int
    argv: Sequence[bytes]
    env: Sequence[bytes]
    cwd: bytes
    rlimits: Sequence[Rlimit] = ()
    pty: PtySize | None = None
    inherit_env: bool = False
    keep_pty: bool = False


class Usage(msgspec.Struct, frozen=True):
    """What a command's main process, and those it waited for, used."""

    utime_us: int
    stime_us: int
    maxrss_kib: int
    wall_us: int


class HelloReply(msgspec.Struct, frozen=True):
    """Who answers: the nonce is drawn when init starts, so another nonce is another life of the sandbox."""

    version: int
    nonce: bytes
    commands: int
    commands_max: int
    program: str


class SpawnReply(msgspec.Struct, frozen=True):
    """The command runs; `pid` is its number inside of the sandbox."""

    pid: int
    pty: bool


class FilesReply(msgspec.Struct, frozen=True):
    """A file worker runs; `version` is that of its protocol."""

    pid: int
    version: int


class DescriptorReply(msgspec.Struct, frozen=True):
    """A descriptor comes with this: a socket that listens, one that was dialled, or a terminal's master."""

    request: MessageType


class CommandEntry(msgspec.Struct, frozen=True):
    """One command of init's table. `wait_status` is as from wait(2); None: not ended, or not known."""

    command_id: int
    pid: int
    state: CommandState
    wait_status: int | None
    keeper_lost: bool
    usage: Usage
    terminal_kept: bool = False


class ListPage(msgspec.Struct, frozen=True):
    """Part of the table; `next_slot` is None on the last page."""

    entries: tuple[CommandEntry, ...]
    next_slot: int | None


class Acknowledged(msgspec.Struct, frozen=True):
    """SIGNAL, KILL or FORGET was done."""

    request: MessageType


class Refused(msgspec.Struct, frozen=True):
    """A request was not done."""

    errno: int
    stage: Stage


class Exited(msgspec.Struct, frozen=True):
    """The main process ended; descendants may live. `wait_status` None: its keeper was killed, nobody knows."""

    command_id: int
    wait_status: int | None
    usage: Usage


class Gone(msgspec.Struct, frozen=True):
    """Nothing of the command is left. `keeper_lost`: something in the sandbox killed its keeper."""

    command_id: int
    keeper_lost: bool


Reply = HelloReply | SpawnReply | FilesReply | DescriptorReply | ListPage | Acknowledged | Refused
Event = Exited | Gone


# ---- to init


def _string(text: bytes) -> bytes:
    if b"\0" in text:
        raise InvalidSpawn(f"cannot pass a string with a NUL inside: {text[:80]!r}")
    return _LENGTH.pack(len(text)) + text + b"\0"


def _check_range(name: str, value: int, largest: int) -> None:
    if not 0 <= value <= largest:
        raise InvalidSpawn(f"cannot send {name} {value}: it must be between 0 and {largest}")


def encode_hello(request_id: int, lowest: int = PROTOCOL_VERSION_LOWEST, highest: int = PROTOCOL_VERSION) -> bytes:
    """HELLO: must be first; from then on the connection gets events."""
    return _HEADER.pack(MAGIC, MessageType.HELLO, request_id) + _HELLO.pack(lowest, highest)


def encode_spawn(request_id: int, request: SpawnRequest) -> bytes:
    """SPAWN.

    Raises:
        InvalidSpawn: an empty argv, a NUL inside a string, a number out of range.
        SpawnTooLarge: more than `REQUEST_BYTES_MAX`, or than `STRINGS_MAX` entries.
    """
    if not request.argv:
        raise InvalidSpawn("cannot spawn an empty argv")
    _check_range("command_id", request.command_id, COMMAND_ID_MAX)
    _check_range("a number of rlimits", len(request.rlimits), RLIMITS_MAX)
    if len(request.argv) > STRINGS_MAX or len(request.env) > STRINGS_MAX:
        raise SpawnTooLarge(
            f"cannot spawn {len(request.argv)} arguments with {len(request.env)} variables: "
            f"at most {STRINGS_MAX} of each"
        )
    rows, cols = (0, 0) if request.pty is None else (request.pty.rows, request.pty.cols)
    _check_range("rows", rows, 0xFFFF)
    _check_range("cols", cols, 0xFFFF)
    parts = [
        _HEADER.pack(MAGIC, MessageType.SPAWN, request_id),
        _SPAWN.pack(
            request.command_id,
            _spawn_flags(request),
            rows,
            cols,
            len(request.rlimits),
            len(request.argv),
            len(request.env),
            0,
        ),
    ]
    parts += [_encode_rlimit(rlimit) for rlimit in request.rlimits]
    parts.append(_string(request.cwd))
    parts += [_string(text) for text in request.argv]
    parts += [_string(text) for text in request.env]
    message = b"".join(parts)
    if len(message) > REQUEST_BYTES_MAX:
        raise SpawnTooLarge(f"cannot spawn with {len(message)} bytes of argv and env: at most {REQUEST_BYTES_MAX}")
    return message


def _spawn_flags(request: SpawnRequest) -> int:
    flags = _FLAG_INHERIT_ENV if request.inherit_env else 0
    if request.pty is not None:
        flags |= _FLAG_PTY | (_FLAG_KEEP_PTY if request.keep_pty else 0)
    return flags


def _encode_rlimit(rlimit: Rlimit) -> bytes:
    _check_range("a resource", rlimit.resource, 0x7FFFFFFF)
    _check_range("a soft limit", rlimit.soft, RLIM_INFINITY)
    _check_range("a hard limit", rlimit.hard, RLIM_INFINITY)
    return _RLIMIT.pack(rlimit.resource, 0, rlimit.soft, rlimit.hard)


def encode_signal(request_id: int, command_id: int, signal_number: int, scope: Scope) -> bytes:
    """SIGNAL."""
    _check_range("command_id", command_id, COMMAND_ID_MAX)
    _check_range("a signal", signal_number, 0xFFFF)
    return _HEADER.pack(MAGIC, MessageType.SIGNAL, request_id) + _SIGNAL.pack(command_id, signal_number, scope)


def _encode_command_id(kind: MessageType, request_id: int, command_id: int) -> bytes:
    _check_range("command_id", command_id, COMMAND_ID_MAX)
    return _HEADER.pack(MAGIC, kind, request_id) + _COMMAND_ID.pack(command_id)


def encode_kill(request_id: int, command_id: int) -> bytes:
    """KILL: SIGKILL to the whole tree until nothing is left; GONE follows."""
    return _encode_command_id(MessageType.KILL, request_id, command_id)


def encode_forget(request_id: int, command_id: int) -> bytes:
    """FORGET: frees the table entry of a command that is gone."""
    return _encode_command_id(MessageType.FORGET, request_id, command_id)


def encode_terminal(request_id: int, command_id: int) -> bytes:
    """TERMINAL: the master of the terminal that was kept."""
    return _encode_command_id(MessageType.TERMINAL, request_id, command_id)


def encode_list(request_id: int, slot: int = 0) -> bytes:
    """LIST: one page of the table, from `slot` on."""
    return _HEADER.pack(MAGIC, MessageType.LIST, request_id) + _LIST.pack(slot)


def encode_files(request_id: int) -> bytes:
    """FILES: a new file worker."""
    return _HEADER.pack(MAGIC, MessageType.FILES, request_id) + _FILES.pack(0)


def _encode_socket(kind: MessageType, request_id: int, port: int, *, ipv6: bool) -> bytes:
    if not 1 <= port <= PORT_MAX:
        raise InvalidPort(f"cannot use port {port}: it must be between 1 and {PORT_MAX}")
    return _HEADER.pack(MAGIC, kind, request_id) + _SOCKET.pack(_FLAG_IPV6 if ipv6 else 0, port, 0)


def encode_listen(request_id: int, port: int, *, ipv6: bool = False) -> bytes:
    """LISTEN: a socket that listens on a port of the sandbox's loopback."""
    return _encode_socket(MessageType.LISTEN, request_id, port, ipv6=ipv6)


def encode_dial(request_id: int, port: int, *, ipv6: bool = False) -> bytes:
    """DIAL: a socket that connects to a port of the sandbox's loopback."""
    return _encode_socket(MessageType.DIAL, request_id, port, ipv6=ipv6)


# ---- from init


def _unpack(shape: struct.Struct, body: bytes) -> tuple[int, ...]:
    if len(body) != shape.size:
        raise WireError(f"init sent a body of {len(body)} bytes where {shape.size} belong")
    return shape.unpack(body)


def _bounded(name: str, value: int, largest: int) -> int:
    if value > largest:
        raise WireError(f"init sent {name} {value}, above {largest}")
    return value


def _wait_status(status: int, *, known: bool) -> int | None:
    """A wait status that wait(2) can return for a process that has ended, nothing else."""
    if not known:
        return None
    stopped_or_continued = status & 0x7F == 0x7F
    if status > _WAIT_STATUS_MAX or stopped_or_continued or (status & 0x7F and status >> 8):
        raise WireError(f"init sent a wait status {status:#x} that no ended process has")
    return status


def _flags(value: int, allowed: int) -> int:
    if value & ~allowed:
        raise WireError(f"init sent unknown flags {value:#x}")
    return value


def _decode_hello(body: bytes) -> HelloReply:
    if len(body) < _HELLO_REPLY.size + _LENGTH.size + 1:
        raise WireError("init sent a HELLO that is too short")
    version, zero, nonce, commands, commands_max = _HELLO_REPLY.unpack_from(body)
    (length,) = _LENGTH.unpack_from(body, _HELLO_REPLY.size)
    text = body[_HELLO_REPLY.size + _LENGTH.size :]
    if (
        not PROTOCOL_VERSION_LOWEST <= version <= PROTOCOL_VERSION
        or zero
        or length > PROGRAM_BYTES_MAX
        or len(text) != length + 1
    ):
        raise WireError("init sent a HELLO that is not one")
    program = text[:-1]
    if text[-1] != 0 or not program.isascii() or not program.decode("ascii").isprintable():
        raise WireError("init sent a program version that is not printable")
    if commands > commands_max:
        raise WireError(f"init claims {commands} commands of {commands_max}")
    return HelloReply(version, nonce, commands, commands_max, program.decode("ascii"))


def _decode_spawned(body: bytes) -> SpawnReply:
    pid, flags = _unpack(_SPAWNED, body)
    return SpawnReply(_bounded("a pid", pid, _PID_MAX), bool(_flags(flags, _FLAG_PTY)))


def _decode_files(body: bytes) -> FilesReply:
    pid, version = _unpack(_FILES_REPLY, body)
    return FilesReply(_bounded("a pid", pid, _PID_MAX), version)


def _decode_entry(fields: tuple[int, ...]) -> CommandEntry:
    command_id, pid, state, flags, status, utime, stime, maxrss, wall = fields
    _bounded("a command_id", command_id, COMMAND_ID_MAX)
    _bounded("a pid", pid, _PID_MAX)
    _flags(flags, _FLAG_KEEPER_LOST | _FLAG_STATUS_UNKNOWN | _FLAG_PTY_KEPT)
    try:
        known_state = CommandState(state)
    except ValueError:
        raise WireError(f"init sent a command in state {state}") from None
    ended = known_state in (CommandState.EXITED, CommandState.GONE)
    return CommandEntry(
        command_id,
        pid,
        known_state,
        _wait_status(status, known=ended and not flags & _FLAG_STATUS_UNKNOWN),
        bool(flags & _FLAG_KEEPER_LOST),
        Usage(utime, stime, maxrss, wall),
        bool(flags & _FLAG_PTY_KEPT),
    )


def _decode_page(body: bytes) -> ListPage:
    if len(body) < _LIST_REPLY.size:
        raise WireError("init sent a LIST that is too short")
    next_slot, count = _LIST_REPLY.unpack_from(body)
    entries = body[_LIST_REPLY.size :]
    if count > LIST_PAGE_MAX or len(entries) != count * _ENTRY.size:
        raise WireError(f"init sent a LIST of {count} entries in {len(entries)} bytes")
    return ListPage(
        tuple(_decode_entry(fields) for fields in _ENTRY.iter_unpack(entries)),
        None if next_slot == LIST_END else next_slot,
    )


def _decode_error(body: bytes) -> Refused:
    errno, stage = _unpack(_ERROR, body)
    try:
        known_stage = Stage(stage)
    except ValueError:
        raise WireError(f"init sent a failure at stage {stage}") from None
    if errno == 0:
        raise WireError("init sent a failure without errno")
    return Refused(_bounded("an errno", errno, _ERRNO_MAX), known_stage)


def _decode_exited(body: bytes) -> Exited:
    command_id, status, flags, utime, stime, maxrss, wall = _unpack(_EXITED, body)
    _flags(flags, _FLAG_STATUS_UNKNOWN)
    return Exited(
        _bounded("a command_id", command_id, COMMAND_ID_MAX),
        _wait_status(status, known=not flags),
        Usage(utime, stime, maxrss, wall),
    )


def _decode_gone(body: bytes) -> Gone:
    command_id, flags = _unpack(_GONE, body)
    _flags(flags, _FLAG_KEEPER_LOST)
    return Gone(_bounded("a command_id", command_id, COMMAND_ID_MAX), bool(flags))


_ACKNOWLEDGED = {
    MessageType.SIGNAL_REPLY: Acknowledged(MessageType.SIGNAL),
    MessageType.KILL_REPLY: Acknowledged(MessageType.KILL),
    MessageType.FORGET_REPLY: Acknowledged(MessageType.FORGET),
}


def _decode_reply(kind: int, body: bytes) -> Reply:
    match kind:
        case MessageType.HELLO_REPLY:
            return _decode_hello(body)
        case MessageType.SPAWN_REPLY:
            return _decode_spawned(body)
        case MessageType.LIST_REPLY:
            return _decode_page(body)
        case MessageType.FILES_REPLY:
            return _decode_files(body)
        case MessageType.LISTEN_REPLY | MessageType.DIAL_REPLY | MessageType.TERMINAL_REPLY:
            if body:
                raise WireError("init sent a descriptor with a body")
            return DescriptorReply(MessageType(kind & ~_REPLY))
        case MessageType.ERROR:
            return _decode_error(body)
        case MessageType.SIGNAL_REPLY | MessageType.KILL_REPLY | MessageType.FORGET_REPLY:
            if body:
                raise WireError("init sent an acknowledgement with a body")
            return _ACKNOWLEDGED[MessageType(kind)]
        case _:
            raise WireError(f"init sent a message of type {kind:#06x}")


def decode_message(message: bytes) -> tuple[int, Reply | Event]:
    """What init said: the request it answers (0 for an event), and the message.

    Raises:
        WireError: anything that init, as documented above, does not send.
    """
    if len(message) < _HEADER.size or len(message) > REPLY_BYTES_MAX:
        raise WireError(f"init sent a message of {len(message)} bytes")
    magic, kind, request_id = _HEADER.unpack_from(message)
    if magic != MAGIC:
        raise WireError(f"init sent a message that starts with {magic:#06x}")
    body = message[_HEADER.size :]
    if kind not in (MessageType.EXITED, MessageType.GONE):
        return request_id, _decode_reply(kind, body)
    if request_id != 0:
        raise WireError("init sent an event with a request id")
    return 0, _decode_exited(body) if kind == MessageType.EXITED else _decode_gone(body)
