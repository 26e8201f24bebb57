"""The composition root: all that serves, put together. Only here are concrete engines named.

Order of a start: take the socket (and so the lock), open the journal, look at the engines, reconcile, serve. A
client that connects meanwhile waits in the backlog. Order of an end: refuse new requests, let those in flight
finish, let go of the sandboxes; they and their background commands go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import gc
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping

import anyio
import anyio.abc
import psutil

from runtimes import clients, seccomp
from runtimes.argv import events_filter_argument, owner_label_argument
from runtimes.cli_engine import OnCall
from runtimes.docker import DockerEngine
from runtimes.engine import Engine
from runtimes.inotify import Inotify
from runtimes.model import EngineInfo, EngineName, User
from runtimes.mounter.binary import mounter_binary_path
from runtimes.mounter.mounter import Mounter
from runtimes.mounts import late_mounts_exist
from runtimes.podman import PodmanEngine
from runtimes.quantities import parse_memory
from runtimes.usernet import UserNetworks
from runtimes.userns import open_swapped_userns
from sandboxd import __version__, logs
from sandboxd.activation import HANDOVER_NAME, Activation
from sandboxd.attaching import Attachments
from sandboxd.audit.auditor import Auditor
from sandboxd.audit.files import AuditFiles
from sandboxd.audit.trail import Trail
from sandboxd.background import Background
from sandboxd.capacity import Capacity
from sandboxd.config import SIZE_BYTES_MAX, Config, metrics_address
from sandboxd.engine_events import EngineEvents
from sandboxd.engines import Detect, EngineRoom
from sandboxd.events import EventLog
from sandboxd.failures import Conflict, Failure, Unauthorized
from sandboxd.handlers.audit import AuditHandlers
from sandboxd.handlers.commands import CommandHandlers
from sandboxd.handlers.daemon import DaemonHandlers
from sandboxd.handlers.dispatch import Dispatcher
from sandboxd.handlers.events import EventHandlers
from sandboxd.handlers.files import FileHandlers
from sandboxd.handlers.metrics import MetricsHandlers
from sandboxd.handlers.network import NetworkHandlers
from sandboxd.handlers.pools import PoolHandlers
from sandboxd.handlers.sandboxes import SandboxHandlers
from sandboxd.handlers.secrets import SecretHandlers
from sandboxd.handlers.services import ServiceHandlers
from sandboxd.handlers.shells import ShellHandlers
from sandboxd.handlers.workspaces import WorkspaceHandlers
from sandboxd.image_builder import ImageBuilder
from sandboxd.journal import Journal
from sandboxd.launching import Launcher
from sandboxd.lifecycle import State
from sandboxd.lifetimes import Lifetimes
from sandboxd.limits import Host
from sandboxd.listener import Listener
from sandboxd.manager import Caller, Manager, Places
from sandboxd.measuring import Measures, Metrics
from sandboxd.network.metrics_door import MetricsDoor
from sandboxd.network.outside import Outside
from sandboxd.openmetrics import CONTENT_TYPE
from sandboxd.paths import is_private, state_dir
from sandboxd.programs import install_programs
from sandboxd.protocol import PROTOCOL_VERSION, DaemonConfig, DaemonInfo
from sandboxd.recovery import Recovery
from sandboxd.sandbox import Tell
from sandboxd.secret_store import SecretStore
from sandboxd.server import serve
from sandboxd.service_boxes import ServiceBoxes
from sandboxd.services.room import ServiceRoom
from sandboxd.settings import Settings, home_dir, load_settings
from sandboxd.supervision import Supervision, status_text
from sandboxd.survey import Survey
from sandboxd.timings import now_ms
from sandboxd.uplinks import Uplinks
from sandboxd.workspace import SANDBOX_USER, idmap_works

logger = logging.getLogger(__name__)

DRAIN_DEADLINE_S = 15.0
"""A create takes an engine a second; a loaded one takes ten."""

REMOVALS_DEADLINE_S = 10.0
"""What is being removed is killed already; the next start removes what an engine does not in this time."""

BOXES_NAME_CHARS = 12

LOCK_BYTES_MAX = 4096

LEFT_CLIENTS_DEADLINE_S = 15.0
"""How long engine clients that a killed daemon left behind may take to come to their end."""


async def run(
    listener: Listener,
    env: Mapping[str, str],
    *,
    activation: Activation,
    tell: Callable[[str], None],
    detect: Detect,
) -> None:
    """Serve on ``listener`` until told to stop.

    Args:
        listener: Ours, and open.
        env: The environment.
        activation: What a service manager gave us.
        tell: Tells whoever started us: ``ready``, once it serves.
        detect: Looks at the engines.

    Raises:
        Failure: it cannot begin: the settings, the journal, the state directory, sandbox-init.
    """
    state = state_dir(env)
    config, entries = load_settings(env)
    logs.set_level(config.daemon.log_level)
    with contextlib.ExitStack() as held:
        held.callback(activation.kept.close)
        ground = _prepare(listener, env, state, config, held, detect)
        stop = anyio.Event()
        async with anyio.create_task_group() as tasks:
            background = Background(tasks)
            boxes = ServiceBoxes(lambda: manager, lambda: launcher)
            services = ServiceRoom(
                config,
                os.path.join(state, "services"),
                lambda: [sandbox.record.id for sandbox in manager.all()],
                boxes,
            )
            uplinks = Uplinks(background, ground.engines, UserNetworks(ground.owner, env))
            secrets = SecretStore(os.path.join(state, "secrets"), env.get("CREDENTIALS_DIRECTORY"), env)
            attachments = Attachments(background, services, Outside(), uplinks, secrets.reveal)
            manager = ground.manager(
                background, kept_inputs=activation.kept, attachments=attachments, secrets=secrets
            )
            launcher = ground.launcher(
                manager, background, services=services, attachments=attachments, secrets=secrets
            )
            capacity = Capacity(manager, config, ground.host)
            supervision = Supervision(
                activation, listener.path, functools.partial(_describe, manager, ground.engines)
            )
            manager.watchers.append(lambda _: supervision.note())
            settings = Settings(
                env,
                config,
                entries,
                (manager.reconfigure, launcher.reconfigure, capacity.reconfigure),
                supervision,
            )
            services.start(background)
            lifetimes = Lifetimes(manager, background)
            recovery = ground.recovery(manager)
            auditor = Auditor(
                ground.trail,
                reads=config.audit.reads,
                required=config.audit.required,
                id_of=manager.id_of,
                hides=secrets.holds,
            )
            launcher.pools.on_ready = ground.measures.slot_ready
            metrics = Metrics(
                ground.measures,
                manager=manager,
                pools=launcher.pools,
                capacity=capacity,
                events=ground.events,
                audit=lambda: auditor.state,
            )
            door = _metrics_door(config, metrics)
            survey = Survey(
                engines=ground.engines,
                image=config.defaults.image,
                socket=listener.path,
                state_dir=state,
                maps_ids=ground.userns_fd is not None if os.geteuid() == 0 else None,
                mounts_late=_may_mount_late(),
                journal=ground.journal,
                metrics_problem=lambda: "" if door is None else door.problem,
                supervised=activation.listens,
                audit=lambda: auditor.state,
                exposed_services=services.exposed,
            )
            daemon = DaemonHandlers(
                manager=manager,
                engines=ground.engines,
                images=ImageBuilder(ground.engines, reference=config.defaults.image, scratch_dir=state),
                examine=survey.examine,
                repair=recovery.repair,
                collect=recovery.collect,
                daemon=_daemon_info(listener, state),
                config=lambda: DaemonConfig(entries=list(settings.entries)),
                reload=settings.reload,
                shut_down=stop.set,
                hand_over=functools.partial(_hand_over, listener, manager),
            )
            families = (
                SandboxHandlers(manager, launcher, lifetimes, capacity, attachments),
                EventHandlers(ground.events, manager),
                CommandHandlers(manager, ground.engines),
                FileHandlers(manager),
                ShellHandlers(manager),
                NetworkHandlers(manager, services, attachments, secrets),
                ServiceHandlers(manager, services),
                WorkspaceHandlers(manager),
                PoolHandlers(launcher),
                SecretHandlers(manager, secrets),
                AuditHandlers(ground.trail, manager),
                MetricsHandlers(metrics),
                daemon,
            )
            dispatcher = Dispatcher(
                (family.table() for family in families),
                lifetimes.used_by,
                secrets.refuse,
                observers=(logs.observe, auditor.observe, ground.measures.observe),
            )
            logs.resolve_by(manager.id_of)
            auditor.tell("begun", pid=os.getpid(), version=__version__)
            tasks.start_soon(_watch_signals, stop, settings)
            async with supervision.busy("", "starting: looking at engines and sandboxes"):
                async with anyio.create_task_group() as looking:
                    looking.start_soon(ground.engines.refresh)
                    looking.start_soon(_wait_for_left_clients, ground.owner)
                await recovery.recover()
                activation.kept.close_others([sandbox.record.id for sandbox in manager.all()])
                for name in activation.kept.names:
                    activation.unstore(name)
                boxes.allow()
                await uplinks.sweep({each.record.id: each.pid for each in manager.all() if each.pid is not None})
            launcher.keep_pools()
            # All that was loaded stays: to look for garbage in it, now and then, takes 8 ms from who is served.
            gc.freeze()
            gc.enable()
            async with _serving(listener, dispatcher, auditor) as accepting:
                tasks.start_soon(recovery.sweep_periodically)
                tasks.start_soon(lifetimes.run)
                tasks.start_soon(launcher.pools.run)
                tasks.start_soon(manager.engine_records.run)
                tasks.start_soon(ground.journal.keep_durable)
                if door is not None:
                    tasks.start_soon(door.run)
                logger.info("listening on %s", listener.path)
                supervision.ready(tasks)
                tell("ready")
                clients.end_followers(events_filter_argument(ground.owner))
                tasks.start_soon(EngineEvents(manager, ground.engines, background, recovery.try_sweep).run)
                await stop.wait()
                logger.info("stopping")
                launcher.pools.close()
                if listener.stays:
                    accepting.cancel()
                async with supervision.busy("STOPPING=1", "stopping: requests that were taken are finished"):
                    await dispatcher.drain(deadline_s=DRAIN_DEADLINE_S)
            async with supervision.busy("", "stopping: what is being removed is waited for"):
                await manager.finish_removals(deadline_s=REMOVALS_DEADLINE_S)
            for name, descriptor in manager.inputs():
                activation.store(name, descriptor)
            manager.disconnect_all()
            auditor.tell("ended", pid=os.getpid())
            tasks.cancel_scope.cancel()


def _describe(manager: Manager, engines: EngineRoom) -> str:
    return status_text(
        [sandbox.record.state.value for sandbox in manager.present()],
        sum(sandbox.record.state is State.WARM for sandbox in manager.all()),
        [engine.name.value for engine in engines.usable()],
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ground:
    """What stands before any task runs: whatever is missing here is said plainly, and not from a task group."""

    owner: str
    journal: Journal
    engines: EngineRoom
    events: EventLog
    measures: Measures
    host: Host
    userns_fd: int | None
    trail: Trail | None
    manager: Callable[..., Manager]
    launcher: Callable[..., Launcher]
    recovery: Callable[[Manager], Recovery]


def _prepare(
    listener: Listener,
    env: Mapping[str, str],
    state: str,
    config: Config,
    held: contextlib.ExitStack,
    detect: Detect,
) -> _Ground:
    os.makedirs(state, mode=0o700, exist_ok=True)
    if not is_private(state, os.geteuid()):
        raise Unauthorized(
            f"cannot use the state directory {state}",
            detail="it must be ours, and nobody else may write to it: programs in it are run in every sandbox",
            hint=f"ls -ld {state}, or set SANDBOXD_STATE_DIR",
        )
    try:
        held.callback(os.close, _lock_state(state, listener.path))
    except OSError as error:
        raise Failure(
            f"cannot use the state directory {state}",
            detail=error.strerror or "",
            hint=f"df -h {state}; ls -ld {state}; or set SANDBOXD_STATE_DIR",
        ) from error
    journal = Journal.open(os.path.join(state, "journal.sqlite3"))
    held.callback(journal.close)
    # Per owner: another daemon with its socket in the same directory must not take our boxes for leftovers.
    boxes_dir = os.path.join(os.path.dirname(listener.path), "boxes", journal.owner()[:BOXES_NAME_CHARS])
    # It is where sockets are, which a boot, or a user's last logout, clears.
    went_down = not os.path.isdir(boxes_dir)
    os.makedirs(boxes_dir, mode=0o700, exist_ok=True)
    userns_fd = _open_userns(boxes_dir)
    if userns_fd is not None:
        held.callback(os.close, userns_fd)
    measures = Measures()
    engines = EngineRoom(
        detect,
        functools.partial(_build_engine, env=env, on_call=measures.engine_called),
        config.daemon.engine_calls_max,
    )
    host = _host()
    caller = _caller(env)
    events = EventLog(journal.reserve_event_numbers)
    places = Places(
        boxes_dir=boxes_dir,
        bin_dir=install_programs(state),
        seccomp_profile=seccomp.profile_path(),
        spools_dir=os.path.join(state, "spools"),
        layers_dir=os.path.join(state, "layers"),
        private_dirs=tuple(os.path.realpath(path) for path in (state, os.path.dirname(listener.path))),
    )
    return _Ground(
        owner=journal.owner(),
        journal=journal,
        engines=engines,
        events=events,
        measures=measures,
        host=host,
        userns_fd=userns_fd,
        trail=_trail(config, state, held),
        manager=functools.partial(
            Manager,
            config=config,
            host=host,
            caller=caller,
            places=places,
            journal=journal,
            engines=engines,
            userns_fd=userns_fd,
            inotify=held.enter_context(Inotify()),
            tell=_both(events.publish, measures.tell),
            mounter=held.enter_context(contextlib.closing(Mounter(mounter_binary_path())))
            if _may_mount_late()
            else None,
            late_calls=late_mounts_exist(),
        ),
        launcher=functools.partial(
            Launcher,
            config=config,
            host=host,
            caller=caller,
            bin_dir=places.bin_dir,
            journal=journal,
            engines=engines,
            idmap_works=userns_fd is not None,
            memory_available=_memory_available,
        ),
        recovery=functools.partial(Recovery, engines=engines, journal=journal, places=places, went_down=went_down),
    )


def _trail(config: Config, state: str, held: contextlib.ExitStack) -> Trail | None:
    """The writer of the audit log; what it cannot do now, it tries again and tells of."""
    if not config.audit.enabled:
        return None
    size = parse_memory(config.audit.size, bytes_max=SIZE_BYTES_MAX)
    trail = Trail(AuditFiles(os.path.join(state, "audit"), bytes_max=size, files_max=config.audit.files))
    trail.start()
    held.callback(trail.close)
    return trail


def _daemon_info(listener: Listener, state: str) -> DaemonInfo:
    return DaemonInfo(
        pid=os.getpid(),
        version=__version__,
        protocol_version=PROTOCOL_VERSION,
        socket=listener.path,
        state_dir=state,
        started_at_ms=now_ms(),
        engines=[],
        sandboxes=0,
        rss_bytes=0,
    )


async def _wait_for_left_clients(owner: str) -> None:
    await clients.wait_for_clients(owner_label_argument(owner), deadline_s=LEFT_CLIENTS_DEADLINE_S)


@contextlib.asynccontextmanager
async def _serving(listener: Listener, dispatcher: Dispatcher, auditor: Auditor) -> AsyncIterator[anyio.CancelScope]:
    """Serve; what is yielded is cancelled to let in nobody else."""
    accepting = anyio.CancelScope()
    async with anyio.create_task_group() as serving:
        serving.start_soon(
            functools.partial(serve, listener.socket, dispatcher, accepting=accepting, on_refused=auditor.refused)
        )
        yield accepting
        serving.cancel_scope.cancel()


def _hand_over(listener: Listener, manager: Manager) -> list[tuple[str, int]]:
    """See ``DaemonHandlers``."""
    if listener.stays:
        return []
    listener.leave_open()
    left = [(HANDOVER_NAME, listener.socket.fileno()), *manager.inputs()]
    return [(name, os.dup(descriptor)) for name, descriptor in left]


async def _watch_signals(stop: anyio.Event, settings: Settings) -> None:
    # In the foreground of a terminal a hangup is the end of that, and of us.
    reloads = not os.isatty(sys.stderr.fileno())
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async for number in signals:
            if number != signal.SIGHUP or not reloads:
                stop.set()
                continue
            try:
                settings.reload()
            except Failure as error:
                logger.error("cannot read settings again, those before stay in force: %s", error)  # noqa: TRY400


def _lock_state(state: str, socket: str) -> int:
    """Hold the state directory: two daemons with different sockets must not share a journal."""
    lock = os.open(os.path.join(state, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, LOCK_BYTES_MAX, 0).decode(errors="replace")
        os.close(lock)
        raise Conflict(
            f"cannot use the state directory {state}",
            detail=f"another daemon does, which listens on {holder}",
            hint=f"export SANDBOXD_SOCKET={holder}",
        ) from None
    # For messages only: a full disk must not keep the daemon from those who want to free it.
    with contextlib.suppress(OSError):
        os.ftruncate(lock, 0)
        os.pwrite(lock, socket.encode(errors="surrogateescape")[:LOCK_BYTES_MAX], 0)
    return lock


def _caller(env: Mapping[str, str]) -> Caller:
    return Caller(user=User(uid=os.geteuid(), gid=os.getegid()), home=os.path.realpath(home_dir(env)))


def _may_mount_late() -> bool:
    """Whether containers that run can be given mounts: by the kernel's calls for that, or as root without them."""
    return late_mounts_exist() or os.geteuid() == 0


def _memory_available() -> int:
    available: int = psutil.virtual_memory().available
    return available


def _host() -> Host:
    kernel = {}
    for name in ("kernel/pid_max", "fs/nr_open"):
        with open(f"/proc/sys/{name}", encoding="ascii") as file:
            kernel[name] = int(file.read())
    return Host(
        cpus_online=tuple(sorted(os.sched_getaffinity(0))),
        memory_bytes=psutil.virtual_memory().total,
        swap_bytes=psutil.swap_memory().total,
        pid_max=kernel["kernel/pid_max"],
        nr_open=kernel["fs/nr_open"],
    )


def _open_userns(boxes_dir: str) -> int | None:
    """A namespace that swaps root and the sandbox's user, where the daemon is root and the kernel maps mounts."""
    if os.geteuid() != 0:
        return None
    try:
        userns_fd = open_swapped_userns(outside=0, inside=SANDBOX_USER.uid)
    except OSError as error:
        logger.warning("cannot make a user namespace: %s", error)
        return None
    if not idmap_works(boxes_dir, userns_fd):
        os.close(userns_fd)
        return None
    return userns_fd


def _both(first: Tell, second: Tell) -> Tell:
    def tell(kind: str, sandbox: str, name: str | None, data: dict[str, str | int | None]) -> None:
        first(kind, sandbox, name, data)
        second(kind, sandbox, name, data)

    return tell


def _metrics_door(config: Config, metrics: Metrics) -> MetricsDoor | None:
    where = metrics_address(config.metrics.listen)
    return None if where is None else MetricsDoor(where, metrics.text, content_type=CONTENT_TYPE)


def _build_engine(info: EngineInfo, limiter: anyio.Semaphore, *, env: Mapping[str, str], on_call: OnCall) -> Engine:
    match info.name:
        case EngineName.DOCKER:
            return DockerEngine(info, env=env, limiter=limiter, on_call=on_call)
        case EngineName.PODMAN:
            return PodmanEngine(info, env=env, limiter=limiter, on_call=on_call)
