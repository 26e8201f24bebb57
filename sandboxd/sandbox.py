"""One sandbox while the daemon runs: its record, its init, its control group, its commands.

The host's side of a sandbox is one directory, private to the daemon:

    init.sock     where its init listens, once it was moved out of the sandbox's reach
    claim         what it is, if it was a slot: see ``rebuilding``; ``claim.new`` until then, and empty
    io/           what the container sees as /.sandboxd/run while it starts; gone afterwards
    stages/       where the project is staged while the container starts; gone afterwards
    slot/         of a slot, on kernels before 5.12: what is mounted on it is seen inside; gone once it is claimed

init binds its socket in ``io``. As soon as it is connected and known to be the container's PID 1, the socket is
renamed into the private directory and ``io`` is removed: nothing inside can reach the socket, and a removed
directory takes no new files, so the sandbox has no writable place on the host that is not its workspace.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from hashlib import sha256

import anyio
import msgspec

from runtimes import mounts
from runtimes.cgroup.fs import CgroupHandle, read_fixed_limits
from runtimes.cgroup.readings import SHM_TARGET, EffectiveLimits, Usage
from runtimes.cgroup.verify import LimitProof, verify
from runtimes.engine import Engine
from runtimes.errors import CgroupUnreadable, Unsupported
from runtimes.init.channel import InitChannel, RequestRefused, TerminalRefused
from runtimes.init.files import FilesChannel
from runtimes.init.peer import is_container_init, is_namespace_init, kill_process, open_process
from runtimes.init.wire import CommandEntry, CommandState, Exited, Gone, InitError
from runtimes.model import CPU_MILLIS_PER_CPU, Limits
from runtimes.mountinfo import deviations
from runtimes.propagation import SlotDirectory
from sandboxd import expiry, note
from sandboxd.background import Background
from sandboxd.commands import Command, CommandTable, format_command_id, remaining_s
from sandboxd.events import kind_of
from sandboxd.failures import Conflict, NotFound, SandboxGone
from sandboxd.journal import Journal
from sandboxd.kept_inputs import KeptInputs
from sandboxd.lifecycle import Event, State, next_state
from sandboxd.outlet import Outlet, reopened
from sandboxd.protocol import CommandEnd
from sandboxd.rebuilding import CLAIM_NAME
from sandboxd.records import CommandRecord, SandboxRecord
from sandboxd.spool import SpoolDirectory
from sandboxd.spool_plan import Stream
from sandboxd.streams import write_all
from sandboxd.timings import now_ms
from sandboxd.workspace import TARGET, Stage

logger = logging.getLogger(__name__)

INIT_DEADLINE_S = 10.0
"""From the engine's word that the container runs to init's answer. A loaded host schedules it late."""

SAMPLE_AGE_S_MIN = 0.2
"""A CPU share over a shorter time says little."""

SOCKET_NAME = "init.sock"
RESOLVER_NAME = "resolv.conf"
CLAIM_SPARE_NAME = f"{CLAIM_NAME}.new"

STAGES = "stages"
SLOT_NAME = "slot"
STAGE_NAME_CHARS = 16

DEVIATIONS_SHOWN_MAX = 3

UNKNOWN_COMMAND = "(a command whose record was lost)"

INSIDE_BIN = "/.sandboxd/bin"
"""Where sandbox-init and sandbox-provoke are seen inside, read-only."""

INSIDE_RESOLVER = "/etc/resolv.conf"

INSIDE_RUN = "/.sandboxd/run"
"""Where init binds its socket."""

OURS = (INSIDE_BIN, INSIDE_RUN, TARGET)
"""What we have the engine mount."""

HOME = "/home/sandbox"

TMPFS_TARGETS = ("/tmp", HOME)  # noqa: S108  (inside the sandbox)
"""What is writable inside, besides the workspace: sized by ``tmp``."""


PROVEN_TMPFS = (*TMPFS_TARGETS, SHM_TARGET)
"""Whose sizes are limits, and proven."""

Tell = Callable[[str, str, str | None, dict[str, str | int | None]], None]
"""Told of an event: its kind, the sandbox's id and name, and what else there is to say."""


class Sandbox:
    """One sandbox. Its lifecycle methods are called under ``lock``."""

    def __init__(
        self,
        record: SandboxRecord,
        *,
        directory: str,
        journal: Journal,
        background: Background,
        spools: SpoolDirectory,
        on_init_lost: Callable[[Sandbox], None],
        kept_inputs: KeptInputs,
    ) -> None:
        self.record = record
        self._kept_inputs = kept_inputs
        self.directory = directory
        self.lock = anyio.Lock(fast_acquire=True)
        self.gone = anyio.Event()
        """Set once nothing of it is left."""
        self.proofs: tuple[LimitProof, ...] = ()
        self.commands = CommandTable(
            background, self.oom_kills, self.unthrottled, self._end_command, self._forget_command
        )
        self.commands.on_told = self._tell_of_command
        self.spools = spools
        self.background = background
        self.on_told: Tell = nobody_listens
        self.on_changed: Callable[[], None] = _nothing
        """Called whenever its record has changed."""
        self.on_forgotten: Callable[[], None] = _nothing
        """Called once nothing of it is left."""
        self.on_released: Callable[[], None] = _nothing
        """Called whenever it is let go of: what was opened through its init must be closed."""
        self.pid: int | None = None
        self._journal = journal
        self._on_init_lost = on_init_lost
        self._channel: InitChannel | None = None
        self._files: FilesChannel | None = None
        self._files_lock = anyio.Lock()
        self._cgroup: CgroupHandle | None = None
        self._pidfd: int | None = None
        self.commands_lost = False
        """What was written down of its commands may be lost: one that is not known is not one that nobody wants."""
        self._sample: tuple[float, int] | None = None
        self._unthrottled = 0
        self.forks_refused: int | None = None
        """For the pids limit, as of the last start or end of a command; None: unknown."""

    # --- the record -----------------------------------------------------------------------------------

    def change(
        self,
        event: Event,
        *,
        reason: str = "",
        why: str = "",
        container_id: str | None = None,
        took_us: int | None = None,
    ) -> None:
        """Write down what happened.

        Args:
            event: What it was.
            reason: Of the state that it is in now; kept, and told.
            why: It was done. Told, and not kept: of what runs as it should there is nothing to explain.
            container_id: What it has by now.
            took_us: How long whoever asked for it has waited; told of what is new.

        Raises:
            Conflict: it cannot happen in this state.
        """
        before = self.record.state
        self.put(
            state=next_state(before, event),
            state_reason=reason,
            lifetime=expiry.after(self.record.lifetime, before, event, now_ms()),
            **({} if container_id is None else {"container_id": container_id}),
        )
        kind = kind_of(before, event)
        if kind == "created":
            launch, miss_reason = self.record.launch, self.record.miss_reason
            self.tell(kind, reason=reason or why, launch=launch, miss_reason=miss_reason, ready_us=took_us)
        elif kind is not None:
            self.tell(kind, reason=reason or why)

    def tell(self, kind: str, **data: str | int | None) -> None:
        """Have whoever listens told what happened to it; slots are nobody's business."""
        if not self.record.slot:
            self.on_told(kind, self.record.id, self.record.name, data)

    def _tell_of_command(self, kind: str, command: Command) -> None:
        data: dict[str, str | int | None] = {"command_id": format_command_id(command.id)}
        if kind == "command_started":
            self.tell(kind, **data, argv=" ".join(command.argv))
        elif command.end is not None:
            end = command.end
            self.tell(kind, **data, status=end.status, exit_code=end.exit_code, oom_kills=end.oom_kills)
            if end.oom_kills:
                self.tell("oom", **data, oom_kills=end.oom_kills)

    def claim(self, record: SandboxRecord) -> None:
        """Become the sandbox of a caller: all that the record says, but what belongs to the container.

        Raises:
            Conflict: it is no slot any more.
            JournalUnusable: that cannot be written down.
        """
        slot = self.record
        record = msgspec.structs.replace(
            record,
            id=slot.id,
            container_id=slot.container_id,
            bin_dir=slot.bin_dir,
            image_id=slot.image_id,
            state=next_state(slot.state, Event.RESERVE),
            launch="warm",
        )
        self._journal.put(record)
        self.record = record
        self._leave_note()

    def _leave_note(self) -> None:
        """Say beside its socket what it is now: its container says what the slot was, and that for good."""
        spare = os.path.join(self.directory, CLAIM_SPARE_NAME)
        try:
            with _spare(spare) as descriptor:
                write_all(descriptor, note.written(self.record).encode())
            os.rename(spare, os.path.join(self.directory, CLAIM_NAME))
        except OSError as error:
            logger.warning("cannot leave a note for %s: %s", self.record.id, error)

    def prepare_claim(self) -> None:
        """Have at hand what a claim of this slot needs: what limits are read from, and a file for its note.

        A disk takes four times as long to make a file as to write into one and rename it. What a claim that was cut
        short has left in it would follow a shorter note.
        """
        if self._cgroup is not None:
            self._cgroup.keep_open()
        with contextlib.suppress(OSError), _spare(os.path.join(self.directory, CLAIM_SPARE_NAME)) as descriptor:
            os.truncate(descriptor, 0)

    def put(self, **changes: object) -> None:
        """Change fields of the record, and write it down; as soon as that can be done."""
        record = msgspec.structs.replace(self.record, **changes)
        self._journal.keep(record)
        self.record = record
        self.on_changed()

    # --- the host's side ------------------------------------------------------------------------------

    @property
    def io_dir(self) -> str:
        """What the container sees as /.sandboxd/run while it starts."""
        return os.path.join(self.directory, "io")

    def stage_path(self, target: str) -> str:
        """Where what is seen at ``target`` is staged while the container starts; the same at every start."""
        name = "workspace" if target == TARGET else sha256(target.encode()).hexdigest()[:STAGE_NAME_CHARS]
        return os.path.join(self.directory, STAGES, name)

    @property
    def slot_path(self) -> str:
        """Where a container that runs is given its project, on kernels without a better way."""
        return os.path.join(self.directory, SLOT_NAME)

    def clear_stages(self) -> None:
        """Take off what a start that was cut short has left. Idempotent."""
        clear_stages(self.directory)

    def prepare(self) -> None:
        """Make the directory ready for a container to start. Idempotent.

        ``io`` may be written by any uid, for nobody but the container can get there: its parent is ours alone.
        """
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        self._remove_io()
        self.write_resolver("")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.directory, SOCKET_NAME))
        os.mkdir(self.io_dir)
        os.chmod(self.io_dir, 0o777)  # noqa: S103  (its parent is ours alone)

    @property
    def resolver_path(self) -> str:
        """What is seen as /etc/resolv.conf inside, where the engine makes none."""
        return os.path.join(self.directory, RESOLVER_NAME)

    def write_resolver(self, text: str) -> None:
        """Say which name servers it has. Into the file that is there: it is mounted."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self.resolver_path, flags, 0o644)
        try:
            os.fchmod(descriptor, 0o644)  # whatever our mask says: another user reads it
            write_all(descriptor, text.encode())
        finally:
            os.close(descriptor)

    def erase(self) -> None:
        """Remove the host's side: exactly what is known to be there, so that nothing else can be lost. Idempotent.

        Raises:
            OSError: there is something else, or the stage is not clear.
        """
        erase_box(self.directory)

    def _remove_io(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            mounts.remove_tree(self.io_dir)

    @property
    def leaving(self) -> bool:
        """It is being removed, and nothing has come in the way of that: as good as gone to all but its remover."""
        return self.record.state is State.REMOVING and not self.record.state_reason

    @property
    def connected(self) -> bool:
        """Init answers, as far as is known."""
        return self._channel is not None

    async def ended(self) -> None:
        """Wait until init has ended, by the kernel's word; where that cannot be had, it is what is known here."""
        if self._pidfd is None:
            if self.connected:
                await anyio.sleep_forever()
            return
        # Our own: whoever lets go of the sandbox meanwhile closes the other.
        pidfd = os.dup(self._pidfd)
        try:
            await anyio.wait_readable(pidfd)
        finally:
            os.close(pidfd)

    # --- init and the control group -------------------------------------------------------------------

    async def connect(self, container_id: str, engine: Engine, sources: Mapping[str, str]) -> None:
        """Connect to init, make sure that it is ours and the container's PID 1, and take its socket out of reach.

        The kernel says so where the container has a control group of its own; else the engine is asked.

        Args:
            container_id: Whose init.
            engine: Whom to ask.
            sources: Target inside to path on the host: what must be mounted there, and nothing over it.

        Raises:
            SandboxGone: nobody answers, or somebody else does.
            RuntimeFailure: the engine had to be asked, and did not say.
        """
        if self.connected:
            self.disconnect()
        hidden = os.path.join(self.directory, SOCKET_NAME)
        if not os.path.lexists(hidden) and not os.path.isdir(self.io_dir):
            # Init has bound its socket, or will, in a directory that was removed: nobody will ever listen here.
            raise SandboxGone(
                f"cannot reach the init of sandbox {self.record.id}",
                detail="its socket is gone: somebody has cleared the runtime directory",
                hint=f"sandboxctl stop {self.record.id} && sandboxctl start {self.record.id}",
            )
        channel: InitChannel | None = None

        def lost(error: Exception | None) -> None:
            # A channel that we closed ourselves, or that was replaced, is no news.
            if error is not None and self._channel is channel:
                self._lose_init()

        try:
            channel = await InitChannel.connect(
                hidden if os.path.lexists(hidden) else os.path.join(self.io_dir, SOCKET_NAME),
                timeout_s=INIT_DEADLINE_S,
                on_event=self.commands.on_event,
                on_closed=lost,
            )
        except InitError as error:
            if isinstance(error, RequestRefused) and error.errno == errno.EPROTONOSUPPORT:
                raise Unsupported(
                    f"cannot speak with the init of sandbox {self.record.id}",
                    detail="it was made by a version of sandboxd that this one has no words in common with",
                    hint=f"sandboxctl rm {self.record.id}, or the version of sandboxd that made it",
                ) from error
            raise SandboxGone(
                f"cannot reach the init of sandbox {self.record.id}", detail=str(error), hint="sandboxctl doctor"
            ) from error
        # Before it is looked at: whoever is trusted below is the one that this descriptor means.
        pidfd = open_process(channel.peer.pid)
        try:
            await self._trust(channel.peer.pid, container_id, engine, sources)
            self._take_out_of_reach(hidden)
        except BaseException:
            if pidfd is not None:
                os.close(pidfd)
            channel.close()
            raise
        self._pidfd = pidfd
        self._channel = channel
        self.pid = channel.peer.pid
        self.commands.attach(channel)
        with contextlib.suppress(CgroupUnreadable):
            self._cgroup = CgroupHandle.open(channel.peer.pid, container_id)

    async def _trust(self, pid: int, container_id: str, engine: Engine, sources: Mapping[str, str]) -> None:
        if not await _is_init_of(pid, container_id, engine):
            raise SandboxGone(
                f"cannot trust the init of sandbox {self.record.id}",
                detail=f"process {pid} listens, which is not PID 1 of its container",
            )
        targets = [mount.target for mount in self.record.mounts]
        _check_mounts(pid, sources, ours=(*OURS, *targets), read_only=self._read_only_targets())

    def _read_only_targets(self) -> set[str]:
        """What must not be writable inside, whatever the engine made of it."""
        workspace = self.record.workspace
        return {
            INSIDE_BIN,
            *(mount.target for mount in self.record.mounts if mount.read_only),
            *((TARGET,) if workspace is not None and workspace.read_only else ()),
        }

    def _take_out_of_reach(self, hidden: str) -> None:
        """Move init's socket to ``hidden``, unless it is there, and remove the directory that the container shares.

        Both also when adopting: a former daemon may have been killed between the two.
        """
        try:
            if not os.path.lexists(hidden):
                os.rename(os.path.join(self.io_dir, SOCKET_NAME), hidden)
        except OSError as error:
            raise SandboxGone(
                f"cannot take over the init of sandbox {self.record.id}", detail=error.strerror or ""
            ) from error
        try:
            self._remove_io()
        except OSError as error:
            raise SandboxGone(
                f"cannot trust the init of sandbox {self.record.id}", detail=f"it left files behind: {error.strerror}"
            ) from error

    def disconnect(self, *, killed: bool = False) -> None:
        """Let go of init and of the control group. Whoever waits for a command is told that it is lost, or killed."""
        # First, while the counters can still be read: init itself may have been killed for memory.
        self.commands.on_channel_lost(killed=killed)
        self.release()

    def release(self) -> None:
        """Let go of init and of the control group, because the daemon ends; what runs goes on."""
        self.commands.detach()
        self.on_released()
        files, self._files = self._files, None
        if files is not None:
            files.close()
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
        if self._cgroup is not None:
            self._cgroup.close()
            self._cgroup = None
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        self.pid = None
        self._sample = None
        self.proofs = ()

    def _lose_init(self) -> None:
        self.disconnect()
        self._on_init_lost(self)

    async def files(self) -> FilesChannel:
        """Access to its files, by a worker inside that is asked for when it is first needed.

        Raises:
            Conflict: its init does not answer.
            InitError: there is no worker to be had.
        """
        channel = self._channel_to_files()
        async with self._files_lock:
            if self._files is None:
                self._files = await channel.open_files(self.files_base)
            return self._files

    @property
    def files_base(self) -> bytes:
        """Where relative paths start."""
        return TARGET.encode()

    async def take_file_worker(self) -> socket.socket:
        """A file worker for the caller alone, who closes it: see ``InitChannel.take_file_worker``.

        Raises:
            Conflict: its init does not answer.
            InitError: there is no worker to be had.
        """
        return await self._channel_to_files().take_file_worker()

    def _channel_to_files(self) -> InitChannel:
        paused = self.record.state is State.PAUSED
        if self._channel is None or paused:
            raise Conflict(
                f"cannot reach the files of sandbox {self.record.id}",
                detail=f"it is {self.record.state}",
                hint=f"sandboxctl {'resume' if paused else 'inspect'} {self.record.id}",
            )
        return self._channel

    @contextlib.asynccontextmanager
    async def files_for_a_moment(self) -> AsyncIterator[FilesChannel]:
        """The same, by the worker that is there, or by one that goes again: a look must leave nothing running.

        Raises:
            Conflict: its init does not answer.
            InitError: there is no worker to be had.
        """
        if self._files is not None or self._channel is None:
            yield await self.files()
            return
        files = await self._channel.open_files(b"/")
        try:
            yield files
        finally:
            files.close()

    async def listen(self, port: int) -> socket.socket:
        """A socket that listens on the loopback inside; see ``InitChannel.listen``.

        Raises:
            Conflict: its init does not answer.
            InitError: there is no such socket to be had.
        """
        return await self._reachable("listen in").listen(port)

    async def dial(self, port: int, *, ipv6: bool = False) -> socket.socket:
        """A connection to a port of the loopback inside; see ``InitChannel.dial``.

        Raises:
            Conflict: its init does not answer.
            InitError: nobody listens there.
        """
        return await self._reachable("connect to").dial(port, ipv6=ipv6)

    def _reachable(self, what: str) -> InitChannel:
        if self._channel is None:
            raise Conflict(
                f"cannot {what} sandbox {self.record.id}",
                detail=f"it is {self.record.state}",
                hint=f"sandboxctl inspect {self.record.id}",
            )
        return self._channel

    async def adopt_commands(self) -> None:
        """Take over the background commands of a former daemon, and end what nobody waits for any more.

        Where init cannot answer, because it is frozen or out of reach, what had not ended goes on as far as is known,
        until it is called again. Idempotent.
        """
        channel = self._channel
        known = {record.id: record for record in self._journal.commands(self.record.id)}
        for entry in [] if channel is None else await channel.list_commands():
            record = known.pop(entry.command_id, None)
            if record is None and self.commands_lost and entry.state is not CommandState.GONE:
                record = self._rebuild_command(entry.command_id)
            if record is not None and channel is not None:
                self._adopt_command(record, entry, await self._kept_terminal(channel, record, entry))
            elif channel is not None and entry.state is CommandState.GONE:
                await channel.forget(entry.command_id)
            elif channel is not None:
                await channel.kill(entry.command_id)
        may_run = channel is None and self.record.state not in (State.STOPPED, State.LOST)
        for record in known.values():
            if may_run:
                self._await_command(record)
            else:
                self._adopt_command(record, None, None)
        self.commands_lost = self.commands_lost and channel is None

    def _rebuild_command(self, command_id: int) -> CommandRecord:
        """A record for a command that only init knows; its timeout and its words are gone."""
        record = CommandRecord(
            id=command_id,
            argv=(UNKNOWN_COMMAND,),
            started_at_ms=now_ms(),
            deadline_at_ms=None,
            grace_s=0.0,
            streams=tuple(stream.value for number, stream in self.spools.list() if number == command_id),
        )
        self._journal.keep_command(self.record.id, record)
        return record

    @staticmethod
    async def _kept_terminal(channel: InitChannel, record: CommandRecord, entry: CommandEntry) -> int | None:
        """The master of a command's terminal, where init keeps it and there is somebody to copy from it to."""
        if not entry.terminal_kept or not record.streams or record.end is not None:
            return None
        try:
            return await channel.take_terminal(record.id)
        except TerminalRefused:
            return None

    def _adopt_command(self, record: CommandRecord, entry: CommandEntry | None, master: int | None) -> None:
        """Know a command again; tell the table what init says of it, and that it is gone if init knows nothing.

        Args:
            record: What was written down of it.
            entry: What init says.
            master: Of its terminal; this is its owner from now on.
        """
        command = self._await_command(record, master)
        if command is None:
            return
        left_s = remaining_s(record.deadline_at_ms)
        self.commands.adopt(
            command, pid=0 if entry is None else entry.pid, remaining_s=left_s, grace_s=record.grace_s
        )
        if entry is not None and entry.state in (CommandState.EXITED, CommandState.GONE):
            self.commands.on_event(Exited(record.id, entry.wait_status, entry.usage))
        if entry is None or entry.state is CommandState.GONE:
            self.commands.on_event(Gone(record.id, keeper_lost=False))

    def _await_command(self, record: CommandRecord, master: int | None = None) -> Command | None:
        """Know a command again, unless it is known, before anything is heard of it; None: it has ended.

        Args:
            record: What was written down of it.
            master: Of its terminal; this is its owner from now on.
        """
        command = self.commands.awaited(record.id)
        if command is None:
            ended = anyio.Event()
            outlet = self._reopened(record, ended)
            if record.end is not None:
                ended.set()
                self.commands.restore(record, outlet)
                return None
            command = self.commands.expect(record, ended=ended, outlet=outlet)
        if master is not None:
            self._take_terminal(command, master)
        return command

    def _take_terminal(self, command: Command, master: int) -> None:
        """Have what comes out of a terminal copied; where nothing of it is kept any more, it is hung up."""
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, master)
            if command.outlet is None:
                return
            with contextlib.suppress(NotFound):
                command.outlet.take_terminal(master, self.spools.append(command.id, Stream.BOTH), self.background)
                undo.pop_all()

    def _reopened(self, record: CommandRecord, ended: anyio.Event) -> Outlet | None:
        if not record.streams:
            return None
        try:
            outlet = reopened(self.spools, record.id, record.streams, ended)
        except NotFound:
            return None
        if (descriptor := self._kept_inputs.take(self.record.id, record.id)) is not None:
            outlet.take_input(descriptor)
        return outlet

    def note_command(self, record: CommandRecord) -> None:
        """Write a background command down, before it is started.

        Raises:
            JournalUnusable: that cannot be done.
        """
        self._journal.put_command(self.record.id, record)

    def drop_command(self, command_id: int) -> None:
        """Forget a command that did not start."""
        self._forget_command(command_id)

    def _end_command(self, command_id: int, end: CommandEnd) -> None:
        record = self._journal.command(self.record.id, command_id)
        if record is not None:
            self._journal.keep_command(self.record.id, msgspec.structs.replace(record, end=end))

    def _forget_command(self, command_id: int) -> None:
        self._journal.delete_command(self.record.id, command_id)
        self.background.persist(self.spools.remove, command_id)

    # --- limits and usage -----------------------------------------------------------------------------

    def prove(
        self,
        *,
        swap_bytes: int,
        reported: Limits | None = None,
        ahead: EffectiveLimits | None = None,
        tmpfs_bytes: Mapping[str, int] | None = None,
    ) -> tuple[LimitProof, ...]:
        """Read the limits from the control group and compare them with what was requested; kept in ``proofs``.

        Args:
            swap_bytes: Of the host.
            reported: What the engine says.
            ahead: What ``read_ahead`` has just read.
            tmpfs_bytes: What the kernel has said since of the sizes of its tmpfs. Where not all of them are among it,
                everything is read.
        """
        if ahead is not None and tmpfs_bytes is not None and tmpfs_bytes.keys() >= set(PROVEN_TMPFS):
            effective = ahead.with_tmpfs(tmpfs_bytes)
        else:
            effective = self._effective_or_unknown()
        tmpfs = dict.fromkeys(TMPFS_TARGETS, self.record.tmp_bytes_max)
        self.proofs = verify(self.record.limits, reported, effective, tmpfs=tmpfs, swap_total_bytes=swap_bytes)
        if self.pid is None:
            why = f"it is {self.record.state}"
            self.proofs = tuple(msgspec.structs.replace(proof, verified=False, reason=why) for proof in self.proofs)
        return self.proofs

    def read_ahead(self) -> EffectiveLimits:
        """Read all limits but the sizes of its tmpfs, while those are still being changed."""
        return self._effective_or_unknown(tmpfs=False)

    def _effective_or_unknown(self, *, tmpfs: bool = True) -> EffectiveLimits:
        try:
            if self._cgroup is not None:
                return self._cgroup.read_limits(tmpfs=tmpfs)
            if self.pid is not None:
                return read_fixed_limits(self.pid)
        except CgroupUnreadable as error:
            logger.warning("cannot read the limits of %s: %s", self.record.id, error)
        return EffectiveLimits()

    def effective_limits(self) -> EffectiveLimits:
        """Read what the kernel holds the sandbox to.

        Raises:
            CgroupUnreadable: its control group cannot be found or read.
        """
        return self._readable_cgroup().read_limits()

    def write_limits(self, limits: Limits) -> None:
        """Write limits straight into the control group.

        Raises:
            CgroupUnreadable: there is none, or the kernel says no.
        """
        self._readable_cgroup().write_limits(limits)

    def let_limits_go(self) -> None:
        """Close what limits are read from: a sandbox has it for a long time, and is looked at now and then."""
        if self._cgroup is not None:
            self._cgroup.let_go()

    @contextlib.contextmanager
    def unthrottled(self) -> Iterator[None]:
        """Give it all CPUs while something in it is to end: a storm under a tiny quota would take for ever to die."""
        self._unthrottled += 1
        self.unthrottle()
        try:
            yield
        finally:
            self._unthrottled -= 1
            with contextlib.suppress(CgroupUnreadable):
                self.write_limits(Limits(cpu_millis=self.record.limits.cpu_millis))

    @property
    def is_unthrottled(self) -> bool:
        """Its CPU quota is lifted on purpose."""
        return self._unthrottled > 0

    def unthrottle(self) -> None:
        """Give it all CPUs, because it is to end."""
        with contextlib.suppress(CgroupUnreadable):
            self.write_limits(Limits(cpu_millis=(os.cpu_count() or 1) * CPU_MILLIS_PER_CPU))

    def kill_everything(self) -> bool:
        """Kill all that runs in it, past its init and its engine, without waiting.

        Returns:
            Whether it is done; False where its processes are not ours to signal, and only the engine can.
        """
        by_group = self._cgroup is not None and self._cgroup.kill()
        by_init = self._pidfd is not None and kill_process(self._pidfd)
        return by_group or by_init

    def usage(self) -> Usage:
        """Read what the sandbox uses.

        Raises:
            CgroupUnreadable: its control group cannot be found or read.
        """
        return self._readable_cgroup().read_usage()

    def _readable_cgroup(self) -> CgroupHandle:
        if self._cgroup is None:
            raise CgroupUnreadable("cannot find the sandbox's control group", detail=f"it is {self.record.state}")
        return self._cgroup

    def cpu_us(self) -> int | None:
        """The CPU time that it has used; None when it cannot be read."""
        if self._cgroup is None:
            return None
        try:
            return self._cgroup.read_usage(pressure=False).cpu_us
        except CgroupUnreadable:
            return None

    def oom_kills(self) -> int | None:
        """The control group's counter; None when it cannot be read. Keeps ``forks_refused`` of the same reading."""
        if self._cgroup is None:
            return None
        try:
            refusals = self._cgroup.read_refusals()
        except CgroupUnreadable:
            return None
        self.forks_refused = refusals.pids_refused
        return refusals.oom_kills

    def cpu_percent(self, cpu_us: int | None) -> float | None:
        """The share of one CPU since the last sample that is old enough, else since the sandbox was made."""
        if cpu_us is None:
            return None
        now_s = time.monotonic()
        if self._sample is None:
            since_s = max(time.time() - self.record.created_at_ms / 1000, SAMPLE_AGE_S_MIN)
            self._sample = (now_s, cpu_us)
            return round(cpu_us / since_s / 10_000, 2)
        sampled_s, sampled_us = self._sample
        age_s = max(now_s - sampled_s, 1e-6)
        if age_s >= SAMPLE_AGE_S_MIN:
            self._sample = (now_s, cpu_us)
        return round((cpu_us - sampled_us) / age_s / 10_000, 2)


async def _is_init_of(pid: int, container_id: str, engine: Engine) -> bool:
    if is_container_init(pid, container_id):
        return True
    return is_namespace_init(pid) and (await engine.inspect(container_id)).pid == pid


def _check_mounts(pid: int, sources: Mapping[str, str], ours: Collection[str], read_only: Collection[str]) -> None:
    """Refuse an image that puts something in the way of our mounts, or volumes beside them."""
    found = deviations(mounts.mounts_of(pid), mounts.mounts_of("self"), sources, ours=ours, read_only=read_only)
    if found:
        raise Unsupported(
            "cannot use this image",
            detail="; ".join(found[:DEVIATIONS_SHOWN_MAX]),
            hint="use an image without volumes, and without links where the sandbox mounts",
        )


def clear_stages(directory: str) -> None:
    """Take every mount off the stages of a box, and remove them. Never walks into one. Idempotent."""
    stages = os.path.join(directory, STAGES)
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(stages):
            Stage(os.path.join(stages, name)).clear()
        os.rmdir(stages)


def erase_box(directory: str) -> None:
    """Remove the host's side of a sandbox: its stages, its socket, what its init may have left. Idempotent.

    Never walks into a stage: a project may be mounted there. Nor through a symlink: what it leads to is not ours.

    Raises:
        OSError: something else is there.
    """
    if os.path.islink(directory):
        os.unlink(directory)
        return
    clear_stages(directory)
    SlotDirectory(os.path.join(directory, SLOT_NAME)).clear()
    for name in (SOCKET_NAME, RESOLVER_NAME, CLAIM_NAME, CLAIM_SPARE_NAME):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, name))
    with contextlib.suppress(FileNotFoundError):
        mounts.remove_tree(os.path.join(directory, "io"))
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(directory)


@contextlib.contextmanager
def _spare(path: str) -> Iterator[int]:
    """The file that a note is written into, open; made if it is not there."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def nobody_listens(kind: str, sandbox: str, name: str | None, data: dict[str, str | int | None]) -> None:
    """Nobody wants to know."""


def _nothing() -> None:
    """Nobody wants to know."""


def container_id_of(sandbox: Sandbox) -> str:
    """The id of a sandbox's container.

    Raises:
        Conflict: it has none, for it was never made, or is being removed.
    """
    if sandbox.record.container_id is None:
        raise Conflict(
            f"cannot use sandbox {sandbox.record.id}",
            detail=sandbox.record.state_reason or "it has no container",
            hint=f"sandboxctl rm {sandbox.record.id}",
        )
    return sandbox.record.container_id
