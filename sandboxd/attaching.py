"""What a running sandbox finds on its loopback: its services and its way out, put there and taken away again.

``attach`` makes true what the record says, and asks nothing of the engine: init hands out listening sockets, and
what comes in on them is served here. It is called when a sandbox is made, claimed, started or found again, and
whenever its record has changed; whatever is in place stays in place.
"""

from __future__ import annotations

import errno
import functools
import logging
import secrets
import socket
from collections.abc import Sequence

import anyio.to_thread
import msgspec
import psutil

from runtimes.errors import RuntimeFailure
from runtimes.init.channel import SocketRefused
from runtimes.init.wire import InitError
from runtimes.model import Network
from runtimes.netns import NetworkView
from sandboxd.background import Background
from sandboxd.commands import format_command_id
from sandboxd.egress_rules import Egress, check_allowed, parse_rules
from sandboxd.failures import CapacityExceeded, Conflict, Failure, InvalidArgument, NotFound
from sandboxd.injections import Injection, parse_injections, secrets_in
from sandboxd.lifecycle import State
from sandboxd.network import culprit
from sandboxd.network.egress import PROXY_PORT, EgressProxy, Ledger
from sandboxd.network.forwards import listen_on_path, listen_on_port, remove_path, serve_forward
from sandboxd.network.injecting import Injector, Reveal
from sandboxd.network.outside import Outside
from sandboxd.network.streams import Door
from sandboxd.protocol import NetworkMode, NetworkSetParams
from sandboxd.records import EgressRecord, ForwardRecord, GrantRecord
from sandboxd.sandbox import Sandbox
from sandboxd.services.room import Serve, ServiceRoom
from sandboxd.uplinks import Uplinks

logger = logging.getLogger(__name__)

FORWARDS_MAX = 64

CONNECTIONS_MAX = 64
"""Of one sandbox to one service, or to its proxy. Each takes two descriptors, and a buffer while bytes are in it."""


class _Offer(msgspec.Struct, frozen=True):
    """What should be at a port."""

    what: EgressRecord | GrantRecord
    serve: Serve


class _Attached:
    """What is in place in one sandbox."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.doors: dict[int, tuple[EgressRecord | GrantRecord, Door]] = {}
        self.problems: dict[int, str] = {}
        self.rules = Egress()
        self.injections: tuple[Injection, ...] = ()
        self.forwards: dict[str, Door] = {}
        self.forward_problems: dict[str, str] = {}
        self.network_problem: str | None = None


class Attachments:
    """Of all sandboxes."""

    def __init__(
        self, background: Background, services: ServiceRoom, outside: Outside, uplinks: Uplinks, reveal: Reveal
    ) -> None:
        self._background = background
        self._services = services
        self._outside = outside
        self._uplinks = uplinks
        self._reveal = reveal
        self._attached: dict[str, _Attached] = {}
        self._ledgers: dict[str, Ledger] = {}

    # --- in place -------------------------------------------------------------------------------------

    async def attach(self, sandbox: Sandbox, *, require_network: bool = False) -> Sequence[str]:
        """Make true what the record says, and return what could not be, and why.

        Idempotent; no engine call, unless its mode is or was ``full``. Called under the sandbox's lock, once its init
        is connected. A sandbox never fails for it, unless its network is required.

        Raises:
            RuntimeFailure, Failure: the network is required, and is not what it should be.
        """
        record = sandbox.record
        trouble = None
        try:
            await self._uplinks.apply(sandbox)
        except (RuntimeFailure, Failure) as error:
            if require_network:
                raise
            logger.warning("sandbox %s: %s", record.id, error)
            trouble = str(error)
        attached = self._attached.get(record.id)
        if attached is None and not (record.egress or record.services or record.forwards or trouble):
            return ()
        attached = self._attach(sandbox)
        attached.network_problem = trouble
        if record.egress is not None:
            attached.rules = rules_of(record.egress)
            attached.injections = parse_injections(record.egress.inject)
        offers = self._offers(sandbox, attached)
        await self._withdraw(attached, offers)
        attached.problems = {}
        for port, offer in offers.items():
            if port not in attached.doors:
                await self._open(sandbox, attached, port, offer)
        for forward in record.forwards:
            if forward.id not in attached.forwards:
                self._open_again(sandbox, attached, forward)
        return _problems_of(attached)

    async def change(self, sandbox: Sandbox, params: NetworkSetParams) -> None:
        """Change what a running sandbox may reach; it counts from its next request on.

        What leads out through the engine's own network is cut before this returns.

        Raises:
            InvalidArgument, NotFound: rules or services that are none.
            Unsupported: a change to or from the engine's own network that cannot be made here.
            Conflict: it does not run.
            RuntimeFailure, Failure: that change failed. What was to be opened is as it was; what was to be closed is
                closed as soon as it can be.
        """
        with anyio.CancelScope(shield=True):
            async with sandbox.lock:
                if sandbox.record.state is not State.RUNNING:
                    raise Conflict(
                        f"cannot change the network of a sandbox that is {sandbox.record.state.value}",
                        hint=f"sandboxctl start {sandbox.record.id}",
                    )
                egress = changed_egress(
                    sandbox,
                    mode=params.mode,
                    allow=params.allow,
                    deny=params.deny,
                    add_allow=params.add_allow,
                    add_deny=params.add_deny,
                    inject=params.inject,
                    add_inject=params.add_inject,
                )
                services = sandbox.record.services
                if params.services is not None:
                    services = self._services.grants(params.services, sandbox_id=sandbox.record.id)
                wanted = _network_after(sandbox, params, egress)
                self._uplinks.require_switchable(sandbox, wanted)
                before = sandbox.record
                now = before.network_now if wanted is before.network_wanted else wanted
                sandbox.put(egress=egress, services=services, network_now=now)
                try:
                    await self.attach(sandbox, require_network=True)
                except (RuntimeFailure, Failure):
                    if wanted is Network.FULL:
                        sandbox.put(egress=before.egress, services=before.services, network_now=before.network_wanted)
                    await self.attach(sandbox)
                    raise

    def _attach(self, sandbox: Sandbox) -> _Attached:
        attached = self._attached.get(sandbox.record.id)
        if attached is None:
            attached = _Attached(self._ledgers.setdefault(sandbox.record.id, Ledger()))
            self._attached[sandbox.record.id] = attached
            sandbox.on_released = lambda: self.detach(sandbox)
        return attached

    def detach(self, sandbox: Sandbox) -> None:
        """Take everything away. Idempotent; never blocks."""
        attached = self._attached.pop(sandbox.record.id, None)
        if attached is not None:
            for _, door in attached.doors.values():
                door.close()
            for forward_id, door in attached.forwards.items():
                _close_forward(sandbox, forward_id, door)

    def forget(self, sandbox: Sandbox) -> None:
        """Remove what was kept for a sandbox that is gone."""
        self.detach(sandbox)
        self._ledgers.pop(sandbox.record.id, None)
        self._background.start(self._services.forget, sandbox.record.id, sandbox.record.services)

    def _offers(self, sandbox: Sandbox, attached: _Attached) -> dict[int, _Offer]:
        offers: dict[int, _Offer] = {}
        record = sandbox.record
        if record.egress is not None:
            proxy = EgressProxy(
                record.name or record.id,
                lambda: attached.rules,
                attached.ledger,
                self._outside,
                functools.partial(_culprit, sandbox),
                Injector(lambda: attached.injections, self._reveal),
            )
            # The rules are asked for each time: a change of them needs no new door.
            offers[PROXY_PORT] = _Offer(EgressRecord(), proxy.serve)
        for grant in record.services:
            try:
                service = self._services.get(grant.service)
                serve = self._services.server(grant, sandbox_id=record.id)
            except Failure as error:
                logger.warning("cannot offer %s to %s: %s", grant.service, record.id, error)
                continue
            offers[service.spec.port_inside] = _Offer(grant, serve)
        return offers

    async def _withdraw(self, attached: _Attached, offers: dict[int, _Offer]) -> None:
        for port, (what, door) in list(attached.doors.items()):
            if port not in offers or offers[port].what != what:
                del attached.doors[port]
                door.close()
                await door.closed.wait()

    async def _open(self, sandbox: Sandbox, attached: _Attached, port: int, offer: _Offer) -> None:
        name = offer.what.service if isinstance(offer.what, GrantRecord) else "the proxy"
        try:
            listening = await sandbox.listen(port)
        except (InitError, Failure) as error:
            taken = isinstance(error, SocketRefused) and error.errno == errno.EADDRINUSE
            why = "something inside has that port" if taken else str(error)
            attached.problems[port] = f"cannot offer {name} at 127.0.0.1:{port} inside: {why}"
            logger.warning("sandbox %s: %s", sandbox.record.id, attached.problems[port])
            return
        if self._attached.get(sandbox.record.id) is not attached:
            listening.close()  # let go of meanwhile
            return
        door = Door(listening, offer.serve, connections_max=CONNECTIONS_MAX)
        attached.doors[port] = (offer.what, door)
        self._background.start(door.run)

    # --- ports ----------------------------------------------------------------------------------------

    def forward(
        self, sandbox: Sandbox, *, port: int, address: str, host_port: int, path: str | None
    ) -> ForwardRecord:
        """Lead a place on the host to a port inside.

        Called under the sandbox's lock, while it runs.

        Raises:
            InvalidArgument: it is no place to listen on.
            Conflict: something is there.
            CapacityExceeded: it has as many as it may.
            Failure: this user may not.
        """
        if len(sandbox.record.forwards) >= FORWARDS_MAX:
            raise CapacityExceeded(
                f"cannot forward more than {FORWARDS_MAX} ports of one sandbox",
                hint=f"sandboxctl forward {sandbox.record.id} --close ID",
            )
        forward_id = secrets.token_hex(4)
        if path is not None:
            listening = listen_on_path(path)
            made = ForwardRecord(id=forward_id, port=port, path=path)
        else:
            listening = listen_on_port(address, host_port)
            chosen: int = listening.getsockname()[1]
            made = ForwardRecord(id=forward_id, port=port, address=address, host_port=chosen)
        try:
            sandbox.put(forwards=(*sandbox.record.forwards, made))
        except Failure:
            listening.close()
            raise
        self._start_forward(sandbox, self._attach(sandbox), made, listening)
        return made

    def close_forward(self, sandbox: Sandbox, forward_id: str) -> None:
        """Close a forward and its connections.

        Raises:
            NotFound: there is none of this id.
        """
        left = tuple(forward for forward in sandbox.record.forwards if forward.id != forward_id)
        if len(left) == len(sandbox.record.forwards):
            raise NotFound(
                f"cannot find the forward {forward_id} of sandbox {sandbox.record.id}",
                hint=f"sandboxctl ports {sandbox.record.id}",
            )
        attached = self._attach(sandbox)
        door = attached.forwards.pop(forward_id, None)
        attached.forward_problems.pop(forward_id, None)
        if door is not None:
            _close_forward(sandbox, forward_id, door)
        sandbox.put(forwards=left)

    def _open_again(self, sandbox: Sandbox, attached: _Attached, forward: ForwardRecord) -> None:
        try:
            listening = (
                listen_on_path(forward.path) if forward.path else listen_on_port(forward.address, forward.host_port)
            )
        except Failure as error:
            attached.forward_problems[forward.id] = str(error)
            logger.warning("sandbox %s: %s", sandbox.record.id, error)
            return
        attached.forward_problems.pop(forward.id, None)
        self._start_forward(sandbox, attached, forward, listening)

    def _start_forward(
        self, sandbox: Sandbox, attached: _Attached, forward: ForwardRecord, listening: socket.socket
    ) -> None:
        async def dial(port: int, ipv6: bool) -> socket.socket:
            return await sandbox.dial(port, ipv6=ipv6)

        serve = functools.partial(serve_forward, dial, forward.port)
        door = Door(listening, serve, connections_max=CONNECTIONS_MAX)
        attached.forwards[forward.id] = door
        self._background.start(door.run)

    def forwards(self, sandbox: Sandbox) -> list[tuple[ForwardRecord, int, str]]:
        """Each forward, its connections, and why it is not open."""
        attached = self._attached.get(sandbox.record.id)
        rows = []
        for forward in sandbox.record.forwards:
            door = None if attached is None else attached.forwards.get(forward.id)
            problem = "" if door is not None else f"the sandbox is {sandbox.record.state.value}"
            if attached is not None:
                problem = attached.forward_problems.get(forward.id, problem)
            rows.append((forward, 0 if door is None else door.connections, problem))
        return rows

    # --- what can be said of it -----------------------------------------------------------------------

    def ledger(self, sandbox: Sandbox) -> Ledger:
        """What a sandbox did with its way out."""
        return self._ledgers.get(sandbox.record.id) or Ledger()

    def connections(self, sandbox: Sandbox) -> int:
        """How many it has open through us."""
        attached = self._attached.get(sandbox.record.id)
        return 0 if attached is None else sum(door.connections for _, door in attached.doors.values())

    def port_problems(self, sandbox: Sandbox) -> dict[int, str]:
        """By port, what could not be put there."""
        attached = self._attached.get(sandbox.record.id)
        return {} if attached is None else dict(attached.problems)

    def problems(self, sandbox: Sandbox) -> list[str]:
        """All that is not as it should be."""
        attached = self._attached.get(sandbox.record.id)
        return [] if attached is None else _problems_of(attached)

    async def evidence(self, sandbox: Sandbox) -> NetworkView | None:
        """What the kernel says of its network; None: it does not run, or the host may not look."""
        try:
            return await self._uplinks.look(sandbox)
        except Failure:
            return None


def _problems_of(attached: _Attached) -> list[str]:
    network = () if attached.network_problem is None else (attached.network_problem,)
    return [*network, *attached.problems.values()]


def rules_of(record: EgressRecord) -> Egress:
    """The rules, understood.

    Raises:
        InvalidArgument: one is none.
    """
    return Egress(parse_rules(record.allow), parse_rules(record.deny))


def egress_of(
    mode: str | None, allow: Sequence[str], deny: Sequence[str], inject: Sequence[str] = ()
) -> EgressRecord | None:
    """What a request for a network comes to, besides what the engine does; None: nothing.

    Raises:
        InvalidArgument: rules that are none, or that no mode obeys.
    """
    if mode in ("none", "full") and (allow or deny or inject):
        raise InvalidArgument(
            f"cannot use rules with the network {mode!r}",
            detail="only 'allow' obeys them",
            hint="leave them out, or take the mode 'allow'",
        )
    if mode != "allow" and not allow and not deny and not inject:
        return None
    record = EgressRecord(allow=tuple(allow), deny=tuple(deny), inject=tuple(inject))
    check_allowed(rules_of(record).allow)
    parse_injections(inject)
    return record


def injected_secrets(record: EgressRecord) -> tuple[str, ...]:
    """The names of the secrets that are added to requests."""
    return secrets_in(parse_injections(record.inject))


def mode_of(sandbox: Sandbox) -> NetworkMode:
    """The mode of a sandbox's network, as callers name it."""
    if sandbox.record.egress is not None:
        return "allow"
    return "full" if sandbox.record.network_wanted is Network.FULL else "none"


def is_as_wanted(sandbox: Sandbox, view: NetworkView) -> bool:
    """Whether the kernel shows what the mode says: a way out for ``full``, and no interface for the others."""
    return view.routed if sandbox.record.network_wanted is Network.FULL else view.closed


def _network_after(sandbox: Sandbox, params: NetworkSetParams, egress: EgressRecord | None) -> Network:
    """What the engine is to give it after a change: nothing where there are rules, for they would be no rules."""
    if egress is not None or params.mode in ("none", "allow"):
        return Network.NONE
    return Network.FULL if params.mode == "full" else sandbox.record.network_wanted


def changed_egress(
    sandbox: Sandbox,
    *,
    mode: str | None,
    allow: Sequence[str] | None,
    deny: Sequence[str] | None,
    add_allow: Sequence[str],
    add_deny: Sequence[str],
    inject: Sequence[str] | None = None,
    add_inject: Sequence[str] = (),
) -> EgressRecord | None:
    """What a sandbox's rules become; the parameters are those of ``network/set``.

    Raises:
        InvalidArgument: rules that are none, or that no mode obeys.
    """
    lists = (allow, deny, inject)
    rules = any(each is not None for each in lists) or bool(add_allow or add_deny or add_inject)
    before = sandbox.record.egress or EgressRecord()
    if mode is None and not rules:
        return sandbox.record.egress
    if mode in ("none", "full") and not rules:
        return None
    allow = [*(before.allow if allow is None else allow), *add_allow]
    deny = [*(before.deny if deny is None else deny), *add_deny]
    inject = [*(before.inject if inject is None else inject), *add_inject]
    return egress_of(mode or "allow", *(list(dict.fromkeys(each)) for each in (allow, deny, inject)))


def _close_forward(sandbox: Sandbox, forward_id: str, door: Door) -> None:
    door.close()
    for forward in sandbox.record.forwards:
        if forward.id == forward_id and forward.path:
            remove_path(forward.path)


async def listening_inside(sandbox: Sandbox) -> culprit.Listed | None:
    """What listens inside; None: the host may not look."""
    if sandbox.pid is None:
        return None
    try:
        return await anyio.to_thread.run_sync(culprit.listening_ports, sandbox.pid)
    except OSError:
        return None


async def _culprit(sandbox: Sandbox, port: int) -> str | None:
    """The command that has this port inside: its id where it is one of ours, and its program."""
    if sandbox.pid is None:
        return None
    seen = await anyio.to_thread.run_sync(_look_for, sandbox.pid, port)
    if seen is None:
        return None
    program, pids = seen
    for command in sandbox.commands.running():
        if command.pid in pids:
            return f"{format_command_id(command.id)} {program}"
    return program


def _look_for(init_pid: int, port: int) -> tuple[str, list[int]] | None:
    try:
        inside = [process.pid for process in psutil.Process(init_pid).children(recursive=True)]
    except psutil.Error:
        return None
    pid = culprit.process_with_port(init_pid, port, inside)
    return None if pid is None else (culprit.program_of(pid), culprit.pids_inside(pid))
