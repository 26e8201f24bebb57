"""The writer of the audit log: takes notes from the daemon's loop, and never makes it wait for a disk.

A thread of its own writes what is queued, a burst at a time. The queue is bounded: when the disk takes nothing, it
fills, and what does not fit is lost and counted. The count itself is a note, at the place where the lost ones would
have been, so that the log says what it does not have. Nothing is lost by a disk that is slow, or full for a moment.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator

from sandboxd.audit.chain import Head
from sandboxd.audit.files import AuditFiles, Note, OpenFile
from sandboxd.timings import now_ms

logger = logging.getLogger(__name__)

QUEUED_MAX = 4096
"""Notes that wait for the disk: a few MiB."""

BATCH_MAX = 64

LINGER_S = 0.03
"""How long the writer waits for more of a burst: to be woken for each note would cost the requests more."""

SYNC_S = 1.0
"""How often the disk is made to keep what was written, while something is."""

RETRY_S = 1.0
"""Between two tries to write what could not be written."""

UNDERWAY_S = 1.0
"""A request that lasts longer is noted before it has ended: nothing that a killed daemon was at is unknown."""

CLOSE_S_MAX = 5.0


class Lasting:
    """A request that has not ended."""

    __slots__ = ("ended", "note", "started_s")

    def __init__(self, note: Note) -> None:
        self.note = note
        self.started_s = time.monotonic()
        self.ended = False


class Trail:
    """The audit log of one daemon.

    Args:
        files: Where it is written. Used by the writer alone, but for snapshots.
        queued_max: How many notes may wait.
    """

    def __init__(self, files: AuditFiles, *, queued_max: int = QUEUED_MAX) -> None:
        self._files = files
        self._queued_max = queued_max
        self._queue: deque[Note] = deque()
        self._lasting: deque[Lasting] = deque()
        self._changed = threading.Condition()
        self._files_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._idle = False
        self._hurry = False
        self._closing = False
        self._unsynced = True
        """Whether the disk is to be made to keep something."""
        self._untold = 0
        """Lost notes that the log does not say yet."""
        self._untold_since_ms = 0
        self.lost = 0
        """Notes that were lost since the daemon began."""
        self.written = 0
        self.failing = ""
        """Why nothing can be written now; empty: it can."""

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    # --- from the loop

    def take(self, note: Note) -> None:
        """Have a note written soon. Waits for nothing; what does not fit is counted."""
        with self._changed:
            self._put(note)
            if self._idle or len(self._queue) == BATCH_MAX:
                self._idle = False
                self._changed.notify_all()

    def _put(self, note: Note) -> None:
        if len(self._queue) >= self._queued_max:
            self._lose(1, note.at_ms)
            return
        self._tell_losses()
        self._queue.append(note)

    def _lose(self, count: int, since_ms: int) -> None:
        if not self._untold:
            self._untold_since_ms = since_ms
        self._untold += count
        self.lost += count

    def _tell_losses(self) -> None:
        if self._untold:
            data = {"lost": self._untold, "since_ms": self._untold_since_ms, "until_ms": now_ms()}
            self._queue.append(Note(kind="gap", fields={"data": data}))
            self._untold = 0

    def lasting(self, note: Note) -> Lasting:
        """Have a note written if what it tells of lasts. The caller marks it as ended."""
        begun = Lasting(note)
        with self._changed:
            while self._lasting and self._lasting[0].ended:
                self._lasting.popleft()
            if len(self._lasting) < self._queued_max:
                # Else the writer hangs, and what would be noted now is noted at its end, if there is room then.
                self._lasting.append(begun)
            if self._idle:
                self._idle = False
                self._changed.notify_all()
        return begun

    # --- from a worker thread

    def flush(self, *, timeout_s: float) -> bool:
        """Wait until all that was taken is written; whether it is."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            return self._changed.wait_for(
                lambda: bool(self.failing) or not (self._queue or self._untold), timeout_s
            ) and not (self._queue or self._untold)

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[tuple[list[OpenFile], Head | None]]:
        """The files as they are now, and their last line; None: nobody knows it, for nothing could be opened.

        Raises:
            OSError: they cannot be read.
        """
        with contextlib.ExitStack() as held:
            with self._files_lock:
                self._files.open()
                found = held.enter_context(self._files.snapshot())
                head = self._files.head
            yield found, head

    def close(self) -> None:
        """Write what is queued, as far as that goes in a bounded time, and end."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(CLOSE_S_MAX)
        if self._thread.is_alive():
            logger.error("the audit log is not closed: its disk does not answer")
            return
        if self._queue or self._untold:
            logger.error("the audit log lacks %d lines at its end: %s", len(self._queue) + self._untold, self.failing)

    # --- the writer

    def _run(self) -> None:
        synced_s = time.monotonic()
        while True:
            batch = self._wait()
            taken = self._write(batch)
            with self._changed:
                for _ in range(taken):
                    self._queue.popleft()
                if not self._queue and not self.failing:
                    self._tell_losses()
                over = self._closing and (bool(self.failing) or not self._queue)
                self._hurry = self._hurry and bool(self._queue)
                self._changed.notify_all()
            if over or time.monotonic() - synced_s >= SYNC_S:
                synced_s = time.monotonic()
                self._sync()
            if over:
                with self._files_lock:
                    self._files.close()
                return
            if self.failing:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, RETRY_S)

    def _wait(self) -> list[Note]:
        """Wait for something to write; nothing, once it is time to look at what lasts, or at the disk."""
        with self._changed:
            if not (self._queue or self._closing or self._hurry):
                self._idle = True
                look_again_s = SYNC_S if self._lasting or self._unsynced or self.failing else None
                self._changed.wait_for(lambda: not self._idle or self._closing or self._hurry, look_again_s)
                self._idle = False
            if not (self._closing or self._hurry):
                # A batch that is full waits for nobody: more requests than one per lingering come in for minutes.
                self._changed.wait_for(self._has_enough, LINGER_S)
            self._note_lasting()
            return list(itertools.islice(self._queue, BATCH_MAX))

    def _has_enough(self) -> bool:
        return self._closing or self._hurry or len(self._queue) >= BATCH_MAX

    def _note_lasting(self) -> None:
        noted_s = time.monotonic() - UNDERWAY_S
        while self._lasting and (self._lasting[0].ended or self._lasting[0].started_s <= noted_s):
            begun = self._lasting.popleft()
            if not begun.ended:
                self._put(begun.note)

    def _write(self, batch: list[Note]) -> int:
        """Try to write; returns how many notes are done with."""
        try:
            with self._files_lock:
                taken = self._files.write(batch) if batch or self.failing else 0
        except OSError as error:
            if not self.failing:
                logger.error("cannot write the audit log: %s", error)  # noqa: TRY400 - no defect, so no traceback
            self.failing = error.strerror or str(error)
            return 0
        except Exception:
            # A defect of ours must not end the log: what cannot be written is lost, and said to be.
            logger.exception("cannot write %d lines of the audit log", len(batch))
            with self._changed:
                self._lose(len(batch), batch[0].at_ms if batch else now_ms())
            return len(batch)
        if self.failing:
            logger.info("the audit log is written again")
            self.failing = ""
        self.written += taken
        self._unsynced = self._unsynced or taken > 0
        return taken

    def _sync(self) -> None:
        try:
            with self._files_lock:
                self._files.sync()
        except OSError as error:
            # The head stays behind: the log is not worse for it, only what is cut off its end is harder to see.
            logger.debug("cannot make the disk keep the audit log: %s", error)
        self._unsynced = False
