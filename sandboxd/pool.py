"""Warm slots: carries out what ``planner`` decides, and hands each slot to exactly one caller.

A slot is a container of a template that is nobody's yet. It is made as any sandbox is, with the same security, and
counts as warm only after its init has answered and its limits were read back. Slots of one ``Recipe`` are in one
bucket. ``take`` never waits and never gives a slot twice: everything here happens on the event loop.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence

import anyio
import anyio.lowlevel
import msgspec

from runtimes.errors import RuntimeFailure
from sandboxd import planner
from sandboxd.background import Background
from sandboxd.failures import Failure, NotFound, PoolExhausted
from sandboxd.planner import PoolSettings, PoolView, Room, SlotView
from sandboxd.recipe import Recipe
from sandboxd.sandbox import Sandbox

logger = logging.getLogger(__name__)

ASKED_MAX = 512
"""How many claims of a bucket are remembered; more within its memory make no difference to what is planned."""

BUCKETS_MAX = 64
"""Recipes with slots at once: every owner of projects, and every project where mounts cannot be late, has one."""

SETTLE_S = 0.005

ROUND_S_MAX = 15.0
"""How long nothing is looked at when nothing happens."""


class Slots:
    """One bucket: the slots of one recipe, and who asked for them."""

    def __init__(self, recipe: Recipe, settings: PoolSettings) -> None:
        self.recipe = recipe
        self.settings = settings
        self.warm: deque[Sandbox] = deque()
        self.made_s: dict[str, float] = {}
        self.image_ids: dict[str, str | None] = {}
        self.current_image: str | None = None
        self.image_seen_s = 0.0
        self.filling = 0
        self.waiters: deque[_Waiter] = deque()
        self.asked_s: deque[float] = deque(maxlen=ASKED_MAX)
        self.hits = 0
        self.misses: Counter[str] = Counter()
        self.made = 0
        self.lost = 0
        self.refill_s: float | None = None
        self.failures = 0
        self.failed_s = 0.0
        self.failure = ""
        self.drained = False
        self.outdated = False
        """Its template has changed: no claim will ask for it again."""
        self.target = 0

    @property
    def idle(self) -> bool:
        """There is nothing in it, and nobody wants anything of it."""
        return not (self.warm or self.filling or self.waiters or self.target or self.settings.slots_min)

    def view(self) -> PoolView:
        """What the planner looks at."""
        return PoolView(
            settings=self.settings,
            warm=[
                SlotView(
                    slot_id=slot.record.id,
                    made_s=self.made_s[slot.record.id],
                    current=self.current_image in (None, self.image_ids[slot.record.id]),
                )
                for slot in self.warm
            ],
            filling=self.filling,
            waiting=len(self.waiters),
            asked_s=list(self.asked_s),
            refill_s=planner.REFILL_S_FIRST if self.refill_s is None else self.refill_s,
            failures=self.failures,
            failed_s=self.failed_s,
            drained=self.drained,
        )


class _Waiter:
    def __init__(self) -> None:
        self.served = anyio.Event()
        self.slot: Sandbox | None = None


class Pools:
    """All slots of one daemon.

    Args:
        background: Where slots are made and unmade.
        settings_of: What the pool of a template is told, by its name; for a recipe that is only a variant of the
            template's own, ``slots_min`` is 0.
        fill: Makes a slot, checked and warm.
        discard: Unmakes one; returns at once.
        image_id: What the recipe's image is now; None: it is not there, or the engine does not answer.
        spare_slots: How many more slots the host has memory for.
        fills_max: Slots made at once.
        image_look_s: How often a template's image is looked at, while there are slots of it.
    """

    def __init__(
        self,
        background: Background,
        *,
        settings_of: Callable[[Recipe], PoolSettings],
        fill: Callable[[Recipe], Awaitable[Sandbox]],
        discard: Callable[[Sandbox], None],
        image_id: Callable[[Recipe], Awaitable[str | None]],
        spare_slots: Callable[[], int],
        fills_max: int,
        image_look_s: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._background = background
        self._settings_of = settings_of
        self._fill = fill
        self._discard = discard
        self._image_id = image_id
        self._spare_slots = spare_slots
        self._fills_max = fills_max
        self._image_look_s = image_look_s
        self._clock = clock
        self.on_ready: Callable[[Recipe, float], None] = _nobody_listens
        """Called with how many seconds it took until a slot was warm."""
        self._buckets: dict[Recipe, Slots] = {}
        self._changed = anyio.Event()
        self._urgent = anyio.Event()
        self._closed = False
        self._claims = 0
        self._claiming_since_s: float | None = None
        self._held_back = False
        """A round was made while claims were carried out: one more, when they are done."""

    # --- claiming -------------------------------------------------------------------------------------

    def take(self, recipe: Recipe) -> Sandbox | None:
        """A warm slot, which is the caller's from now on; None when there is none. Counted as demand."""
        bucket = self._asked(recipe)
        slot = self._pop(bucket) if bucket is not None else None
        if bucket is not None:
            if slot is None:
                bucket.misses["empty"] += 1
            self._wake(urgent=not bucket.warm)
        return slot

    @contextlib.contextmanager
    def claiming(self) -> Iterator[None]:
        """For as long as it is entered, a slot that was taken is made a caller's: no slots are made beside that."""
        self._claims += 1
        if self._claims == 1:
            self._claiming_since_s = self._clock()
        try:
            yield
        finally:
            self._claims -= 1
            if self._claims == 0:
                self._claiming_since_s = None
                if self._held_back:
                    self._wake()

    async def wait(self, recipe: Recipe, *, deadline_s: float) -> Sandbox:
        """A warm slot, as soon as it is this caller's turn: first come, first served.

        Raises:
            PoolExhausted: it was not within the time, or this template keeps no slots.
        """
        bucket = self._asked(recipe)
        if bucket is None:
            raise _exhausted(recipe, "its template keeps no slots")
        if not bucket.waiters:
            slot = self._pop(bucket)
            self._wake(urgent=not bucket.warm)
            if slot is not None:
                return slot
        ends_s = self._clock() + deadline_s
        waiter = _Waiter()
        bucket.waiters.append(waiter)
        self._wake()
        try:
            with anyio.move_on_after(deadline_s):
                await waiter.served.wait()
        except BaseException:
            if waiter.slot is not None:
                self._put(bucket, waiter.slot)
            raise
        finally:
            with contextlib.suppress(ValueError):
                bucket.waiters.remove(waiter)
        if waiter.slot is None:
            bucket.misses["empty"] += 1
            raise _exhausted(recipe, bucket.failure or f"no slot was ready within {deadline_s:g} s")
        if not waiter.slot.connected:
            # It has died since it was handed over, and its place in the line with it.
            return await self.wait(recipe, deadline_s=max(0.0, ends_s - self._clock()))
        bucket.hits += 1
        return waiter.slot

    def give_back(self, recipe: Recipe, slot: Sandbox) -> None:
        """Take a slot back that was taken and not touched."""
        bucket = self._buckets.get(recipe)
        if bucket is None or self._closed:
            self._discard(slot)
        else:
            bucket.hits -= 1
            self._put(bucket, slot)
            self._wake()

    def spoiled(self, recipe: Recipe) -> None:
        """Count a slot that was taken and could not be made into a sandbox: it was no hit."""
        bucket = self._buckets.get(recipe)
        if bucket is not None:
            bucket.hits -= 1
            bucket.lost += 1

    def miss(self, recipe: Recipe, reason: str) -> None:
        """Count a claim that no slot of this recipe would have done for; more slots would not help."""
        bucket = self._buckets.get(recipe)
        if bucket is not None:
            bucket.misses[reason] += 1

    def _asked(self, recipe: Recipe) -> Slots | None:
        bucket = self._bucket(recipe)
        if bucket is not None:
            bucket.asked_s.append(self._clock())
        return bucket

    def _bucket(self, recipe: Recipe) -> Slots | None:
        bucket = self._buckets.get(recipe)
        if bucket is None:
            settings = self._settings_of(recipe)
            if settings.slots_max == 0 or len(self._buckets) >= BUCKETS_MAX:
                return None
            bucket = self._buckets[recipe] = Slots(recipe, settings)
        return bucket

    def _pop(self, bucket: Slots) -> Sandbox | None:
        while bucket.warm:
            slot = bucket.warm.popleft()
            image = self._forget(bucket, slot)
            if slot.connected and bucket.current_image in (None, image):
                bucket.hits += 1
                return slot
            bucket.lost += 1
            self._discard(slot)
        return None

    @staticmethod
    def _forget(bucket: Slots, slot: Sandbox) -> str | None:
        bucket.made_s.pop(slot.record.id, None)
        return bucket.image_ids.pop(slot.record.id, None)

    # --- slots that come and go -----------------------------------------------------------------------

    def adopt(self, recipe: Recipe, slot: Sandbox, *, age_s: float) -> None:
        """Have a slot that a former daemon made."""
        bucket = self._bucket(recipe)
        if bucket is None:
            self._discard(slot)
            return
        self._keep(bucket, slot, self._clock() - age_s)
        self._wake()

    def lost(self, slot: Sandbox) -> None:
        """A slot has died: it is replaced."""
        for bucket in self._buckets.values():
            if slot.record.id in bucket.made_s:
                bucket.warm.remove(slot)
                self._forget(bucket, slot)
                bucket.lost += 1
                logger.warning("slot %s of %s has died", slot.record.id, bucket.recipe.template)
        self._discard(slot)
        self._wake()

    def _put(self, bucket: Slots, slot: Sandbox) -> None:
        """Hand a slot to who waits longest, else keep it; one that died meanwhile is replaced."""
        if not slot.connected:
            bucket.lost += 1
            self._discard(slot)
            return
        while bucket.waiters:
            waiter = bucket.waiters.popleft()
            if not waiter.served.is_set():
                waiter.slot = slot
                waiter.served.set()
                return
        self._keep(bucket, slot, self._clock())

    @staticmethod
    def _keep(bucket: Slots, slot: Sandbox, made_s: float) -> None:
        bucket.warm.append(slot)
        bucket.made_s[slot.record.id] = made_s
        bucket.image_ids[slot.record.id] = slot.record.image_id

    # --- what users say -------------------------------------------------------------------------------

    def buckets(self) -> Sequence[Slots]:
        """All of them."""
        return list(self._buckets.values())

    def keep(self, recipe: Recipe) -> None:
        """Have a bucket for a template, asked for or not: for what it is to hold at least."""
        self._bucket(recipe)
        self._wake()

    def resized(self, template: str, *, ends_drain: bool = True) -> None:
        """Read the bounds of a template's pool again.

        Raises:
            NotFound: it has none.
        """
        for bucket in self._of(template):
            bucket.settings = self._settings_of(bucket.recipe)
            bucket.drained = bucket.drained and not ends_drain
        self._wake()

    def drain(self, template: str) -> int:
        """Let all slots of a template go, and make no more until it is resized or warmed. Returns how many went."""
        count = 0
        for bucket in self._of(template):
            bucket.drained = True
            for slot in list(bucket.warm):
                self._drop(bucket, slot)
                count += 1
        self._wake()
        return count

    async def filled(self, template: str, *, deadline_s: float) -> None:
        """Wait until no slot of a template is being made; of one that is drained, what was made is let go, too."""
        with anyio.move_on_after(deadline_s):
            while any(bucket.filling for bucket in self._of(template)):
                await self._changed_soon()

    async def warm(self, template: str, count: int, *, deadline_s: float) -> int:
        """Make slots now, as if ``count`` claims had just come; wait for them. Returns how many are warm.

        Raises:
            PoolExhausted: they cannot be made; the detail says why.
        """
        buckets = self._of(template)
        own = buckets[0]
        wanted = min(count, own.settings.slots_max)
        own.drained = False
        own.failures = 0
        own.asked_s.extend([self._clock()] * max(0, wanted - 1))
        if not own.asked_s:
            own.asked_s.append(self._clock())
        self._wake()
        with anyio.move_on_after(deadline_s):
            while len(own.warm) < wanted and not own.failures:
                await self._changed_soon()
        if len(own.warm) < wanted and own.failure:
            raise _exhausted(own.recipe, own.failure)
        return sum(len(bucket.warm) for bucket in buckets)

    async def _changed_soon(self) -> None:
        changed = self._changed
        with anyio.move_on_after(planner.WINDOW_S_MIN):
            await changed.wait()
        await anyio.lowlevel.checkpoint()

    def _of(self, template: str) -> list[Slots]:
        found = [bucket for bucket in self._buckets.values() if bucket.recipe.template == template]
        if not found:
            raise NotFound(f"cannot find a pool of template {template!r}", hint="sandboxctl pool list")
        return found

    # --- keeping the numbers right --------------------------------------------------------------------

    async def run(self) -> None:
        """Carry out the plan whenever something has changed, or when it is time to look again."""
        while True:
            self._changed, self._urgent = anyio.Event(), anyio.Event()
            wait_s = self._settle()
            for bucket in list(self._buckets.values()):
                await self._look_at_image(bucket)
            with anyio.move_on_after(wait_s):
                await self._changed.wait()
                # Claims come in bursts: one round for all of them, and none before it could do anything.
                with anyio.move_on_after(planner.YIELD_S):
                    await self._urgent.wait()
                    await anyio.sleep(SETTLE_S)

    def close(self) -> None:
        """Make no more slots. Those that are warm go on, and are adopted by the next daemon."""
        self._closed = True

    def _wake(self, *, urgent: bool = True) -> None:
        self._changed.set()
        if urgent:
            self._urgent.set()

    def _settle(self) -> float:
        """One round over all buckets; returns how long nothing has to be done if nothing happens."""
        now_s = self._clock()
        self._held_back = self._claims > 0
        wait_s = min(ROUND_S_MAX, self._image_look_s)
        spare: int | None = None
        for recipe, bucket in list(self._buckets.items()):
            filling = sum(each.filling for each in self._buckets.values())
            others = sum(
                len(each.warm) + each.filling
                for each in self._buckets.values()
                if each is not bucket and each.recipe.template == recipe.template
            )
            room = Room(
                fills=0 if self._closed else max(0, self._fills_max - filling),
                slots=max(0, bucket.settings.slots_max - others - len(bucket.warm) - bucket.filling),
                claiming_since_s=self._claiming_since_s,
            )
            view = bucket.view()
            # Memory, and the place of another's slot, are asked for only by who would make one of it.
            plan = planner.plan(view, msgspec.structs.replace(room, slots=max(room.slots, 1)), now_s)
            if plan.start:
                spare = self._spare_slots() if spare is None else spare
                slots = room.slots or (1 if spare > 0 and self._made_room(bucket) else 0)
                plan = planner.plan(view, msgspec.structs.replace(room, slots=min(slots, spare)), now_s)
                spare -= plan.start
            bucket.target = plan.target
            for slot_id in plan.retire:
                self._retire(bucket, slot_id)
            for _ in range(plan.start):
                bucket.filling += 1
                self._background.start(self._fill_one, bucket)
            if plan.look_again_s is not None:
                wait_s = min(wait_s, plan.look_again_s - now_s)
            if bucket.idle:
                self._let_go(recipe, bucket, now_s)
        return wait_s

    def _made_room(self, bucket: Slots) -> bool:
        """Let a slot of another variant of the template go: one asked for longer ago, or any for who waits."""
        others = [
            each
            for each in self._buckets.values()
            if each is not bucket
            and each.recipe.template == bucket.recipe.template
            and each.warm
            and not each.waiters
            and (
                bucket.waiters
                or (len(each.warm) > each.settings.slots_min and _last_asked_s(each) < _last_asked_s(bucket))
            )
        ]
        if bucket.filling or not others:
            return False
        idlest = min(others, key=_last_asked_s)
        self._drop(idlest, idlest.warm[0])
        return True

    def _let_go(self, recipe: Recipe, bucket: Slots, now_s: float) -> None:
        """Forget a variant that nobody has asked for lately; a template's own stays for its figures."""
        recently = any(now_s - asked_s <= bucket.settings.idle_s for asked_s in bucket.asked_s)
        if bucket.outdated or (not recently and recipe.prebound is not None):
            del self._buckets[recipe]

    def outdate(self, successor_of: Callable[[Recipe], Recipe | None]) -> None:
        """Let slots go that no claim can use any more, for their template has changed.

        Args:
            successor_of: What is claimed instead of a recipe: itself, where that is as it was, or none. It inherits
                the demand, and so has as many slots made.
        """
        for recipe, bucket in list(self._buckets.items()):
            successor = successor_of(recipe)
            if successor == recipe or bucket.waiters:
                continue
            bucket.outdated = bucket.drained = True
            for slot in list(bucket.warm):
                self._drop(bucket, slot)
            heir = None if successor is None else self._bucket(successor)
            if heir is not None:
                heir.asked_s = deque(sorted((*heir.asked_s, *bucket.asked_s)), maxlen=ASKED_MAX)
            bucket.asked_s.clear()
        self._wake()

    def _retire(self, bucket: Slots, slot_id: str) -> None:
        for slot in [each for each in bucket.warm if each.record.id == slot_id]:
            self._drop(bucket, slot)

    def _drop(self, bucket: Slots, slot: Sandbox) -> None:
        """Let a warm slot go."""
        bucket.warm.remove(slot)
        self._forget(bucket, slot)
        self._discard(slot)

    async def _fill_one(self, bucket: Slots) -> None:
        started_s = self._clock()
        with self._filling(bucket):
            try:
                slot = await self._fill(bucket.recipe)
            except Exception as error:
                # Whatever it is, the next try comes after a pause.
                bucket.failures += 1
                bucket.failed_s = self._clock()
                bucket.failure = str(error)
                unknown = not isinstance(error, (RuntimeFailure, Failure))
                logger.warning("cannot make a slot of %s: %s", bucket.recipe.template, error, exc_info=unknown)
                return
            bucket.failures = 0
            bucket.failure = ""
            bucket.made += 1
            took_s = self._clock() - started_s
            bucket.refill_s = planner.next_refill_s(bucket.refill_s, took_s)
            self.on_ready(bucket.recipe, took_s)
            bucket.current_image = slot.record.image_id or bucket.current_image
            bucket.image_seen_s = self._clock()
            if self._closed or bucket.drained:
                self._discard(slot)
            else:
                self._put(bucket, slot)

    @contextlib.contextmanager
    def _filling(self, bucket: Slots) -> Iterator[None]:
        try:
            yield
        finally:
            bucket.filling -= 1
            self._wake()

    async def _look_at_image(self, bucket: Slots) -> None:
        """Slots of an image that has been replaced are of no use: the next round lets them go."""
        now_s = self._clock()
        if not bucket.warm or now_s - bucket.image_seen_s < self._image_look_s:
            return
        bucket.image_seen_s = now_s
        with contextlib.suppress(RuntimeFailure):
            current = await self._image_id(bucket.recipe)
            if current is not None and current != bucket.current_image:
                bucket.current_image = current
                self._wake()


def _nobody_listens(recipe: Recipe, took_s: float) -> None:
    """Nobody wants to know."""


def _last_asked_s(bucket: Slots) -> float:
    return bucket.asked_s[-1] if bucket.asked_s else 0.0


def _exhausted(recipe: Recipe, why: str) -> PoolExhausted:
    return PoolExhausted(
        f"cannot claim a sandbox of template {recipe.template!r}",
        detail=why,
        hint="sandboxctl pool list, or take a cold one: --launch auto",
    )
