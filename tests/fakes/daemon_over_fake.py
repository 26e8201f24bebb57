"""A whole daemon over the fake engine, in a process of its own: ``Daemon(launcher=...)`` begins its command with it.

It finds two sandboxes that a former daemon left: one that is stopped, and one that is paused.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

import anyio

from runtimes.model import ContainerSpec, EngineInfo
from sandboxd import composition, daemon, sandbox
from sandboxd.journal import Journal
from sandboxd.lifecycle import State
from tests.engine.daemons import IMAGE
from tests.fakes.fake_engine import FakeEngine
from tests.unit.records import record

STOPPED, PAUSED = "sb-stopped222", "sb-paused3333"


async def populate(engine: FakeEngine, state_dir: str) -> None:
    os.makedirs(state_dir, mode=0o700, exist_ok=True)
    journal = Journal.open(os.path.join(state_dir, "journal.sqlite3"))
    try:
        for sandbox_id, state in ((STOPPED, State.STOPPED), (PAUSED, State.PAUSED)):
            spec = ContainerSpec(
                sandbox_id=sandbox_id,
                owner=journal.owner(),
                image=IMAGE,
                command=("/init",),
                user=record().user,
                seccomp_profile="/seccomp.json",
            )
            container_id = await engine.create(spec)
            if state is State.PAUSED:
                await engine.pause(container_id)
            else:
                engine.end(container_id)
            journal.put(record(id=sandbox_id, name=state.value, state=state, container_id=container_id))
    finally:
        journal.close()


def main() -> int:
    engine = FakeEngine(images=(IMAGE,))
    anyio.run(populate, engine, os.environ["SANDBOXD_STATE_DIR"])

    async def detect_all(_env: Mapping[str, str]) -> Sequence[EngineInfo]:
        return [engine.info]

    # Its containers have no init, and nobody is to wait for one.
    sandbox.INIT_DEADLINE_S = 0.02
    daemon.detect.detect_all = detect_all
    composition._build_engine = lambda *_, **__: engine
    return daemon.main(sys.argv[sys.argv.index("sandboxd.daemon") + 1 :])


if __name__ == "__main__":
    raise SystemExit(main())
