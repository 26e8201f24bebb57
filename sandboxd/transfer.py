"""Trees and files into sandboxes and out of them, over a descriptor that the caller passed.

A transfer is one thread with a file worker of its own, so that it neither waits for others nor holds them up. The
caller's descriptor is a pipe, a socket or a regular file; from there to the sandbox's file and back, bytes are moved
by the kernel where it can. A transfer ends when the caller goes, when it says so, and when nothing moves for too
long.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from functools import partial

import anyio
import anyio.to_thread
import msgspec

from runtimes.init import files_wire as wire
from runtimes.init.file_pipeline import FilePipeline, taken_file
from runtimes.init.file_worker import FileRefused
from runtimes.init.files_wire import CommitReply, FileRefusal, Flag, OpenReply, TempReply
from sandboxd.connection import Context
from sandboxd.failures import CapacityExceeded, Conflict, Failure, InvalidArgument, Timeout
from sandboxd.files import NEW_FILE_MODE, path_of
from sandboxd.packing import Packing
from sandboxd.protocol import FileDownloadParams, FileTransfer, FileUploadParams, SkippedEntry
from sandboxd.running import require_running, seconds
from sandboxd.sandbox import Sandbox
from sandboxd.streams import (
    EndedEarly,
    Incoming,
    NotAStream,
    Outgoing,
    Patience,
    Skips,
    Stalled,
    Stopped,
    Tally,
    copy_file,
)
from sandboxd.tarstream import TarError
from sandboxd.timings import Timings
from sandboxd.unpacking import Bounds, Unpacking, check_bytes, directory_refusal

TRANSFERS_MAX = 16
"""At a time, in the whole daemon: each is a thread. The next one waits."""

PROGRESS_S = 0.25

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Job(msgspec.Struct, frozen=True):
    """What the thread of one transfer works with. The caller's descriptor belongs to the stream made of it."""

    pipeline: FilePipeline
    base: bytes
    patience: Patience
    tally: Tally
    bounds: Bounds
    timings: Timings


class Transfers:
    """All transfers of a daemon."""

    def __init__(self) -> None:
        self._limiter = anyio.CapacityLimiter(TRANSFERS_MAX)

    async def upload(self, sandbox: Sandbox, params: FileUploadParams, context: Context) -> FileTransfer:
        """Unpack what comes from the descriptor, or write it to one file.

        Raises:
            InvalidArgument: no archive, an archive that ends early, a descriptor that is no stream.
            CapacityExceeded: more than it may be, or no room.
            Timeout: nothing came for too long.
            FileRefused: the sandbox has something else in the way.
        """
        work = _upload_tree if params.form == "tar" else _upload_file
        return await self._run(sandbox, params, context, partial(work, params))

    async def download(self, sandbox: Sandbox, params: FileDownloadParams, context: Context) -> FileTransfer:
        """Pack what is at a path into the descriptor, or write one file there.

        Raises:
            Conflict: nobody reads any more.
            CapacityExceeded: more than it may be, or no room.
            Timeout: nothing was read for too long.
            FileRefused: there is nothing there, or nothing that can be sent.
        """
        work = _download_tree if params.form == "tar" else _download_file
        return await self._run(sandbox, params, context, partial(work, params))

    async def _run(
        self,
        sandbox: Sandbox,
        params: FileUploadParams | FileDownloadParams,
        context: Context,
        work: Callable[[int, Job], Skips],
    ) -> FileTransfer:
        require_running(sandbox)
        idle_s = seconds(params.idle_timeout, option="idle_timeout")
        bounds = Bounds(params.bytes_max, params.entries_max)
        timings, tally = Timings(), Tally()
        (descriptor,) = context.take_descriptors()
        try:
            worker = await sandbox.take_file_worker()
        except BaseException:
            os.close(descriptor)
            raise
        timings.mark("worker")
        patience = Patience(idle_s)
        pipeline = FilePipeline(worker, patience.wait_for)
        job = Job(pipeline, sandbox.files_base, patience, tally, bounds, timings)
        outcome: Skips | Exception
        begun = False

        def in_thread() -> Skips | Exception:
            nonlocal begun
            begun = True
            return _outcome(work, descriptor, job)

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_tell_progress, context, tally, patience)
                outcome = await anyio.to_thread.run_sync(in_thread, limiter=self._limiter)
                tasks.cancel_scope.cancel()
        finally:
            if not begun:
                os.close(descriptor)
            pipeline.close()
            patience.close()
        timings.mark("transfer")
        if isinstance(outcome, Exception):
            raise outcome
        return FileTransfer(
            entries=tally.entries,
            bytes=tally.bytes,
            skipped=[_skipped(path, reason) for path, reason in outcome.listed],
            skipped_count=outcome.count,
            timings_ms=timings.as_dict(),
        )


async def _tell_progress(context: Context, tally: Tally, patience: Patience) -> None:
    """Until it is cancelled, which ends the transfer too."""
    told = (0, 0)
    try:
        while True:
            await anyio.sleep(PROGRESS_S)
            now = (tally.bytes, tally.entries)
            if now != told:
                context.progress("", done=now[0], entries=now[1])
                told = now
    finally:
        patience.stop()


def _outcome(work: Callable[[int, Job], Skips], descriptor: int, job: Job) -> Skips | Exception:
    """What the thread did, or what ended it: a failure, or an error of ``runtimes``."""
    try:
        with job.pipeline:
            return work(descriptor, job)
    except (Stopped, Stalled, EndedEarly, NotAStream, TarError, OSError) as error:
        return _failure_of(error)
    except Exception as error:  # noqa: BLE001 - raised where it can be answered
        return error


_FOR_ONE_FILE = "a tar archive is taken here; for one file: sandboxctl files write SANDBOX PATH"


def _failure_of(error: Exception) -> Failure:
    match error:
        case Stopped():
            return Conflict("cannot finish the transfer", detail="it was cancelled")
        case Stalled():
            return Timeout(
                "cannot finish the transfer", detail=str(error), hint="keep it flowing, or raise --idle-timeout"
            )
        case EndedEarly():
            return InvalidArgument(
                "cannot finish the transfer", detail="the stream ended before all had come", hint=_FOR_ONE_FILE
            )
        case NotAStream():
            return InvalidArgument("cannot use this descriptor", detail=str(error), hint="pass a pipe, or a file")
        case TarError():
            return InvalidArgument("cannot unpack this", detail=str(error), hint=_FOR_ONE_FILE)
        case BrokenPipeError() | ConnectionError():
            return Conflict("cannot finish the transfer", detail="the other end of the stream was closed")
        case OSError():
            failure = CapacityExceeded if error.errno in _FULL else Conflict
            return failure("cannot finish the transfer", detail=error.strerror or str(error))
    raise AssertionError(error)


def _skipped(path: bytes, reason: str) -> SkippedEntry:
    text = path.decode(errors="backslashreplace")
    return SkippedEntry(path=text, path_bytes=None if text.encode() == path else path, reason=reason)


# --- in the thread


def _upload_tree(params: FileUploadParams, descriptor: int, job: Job) -> Skips:
    with contextlib.closing(Incoming(descriptor, job.patience, job.tally)) as incoming:
        root = path_of(params) or b"."
        refusal = directory_refusal(job.pipeline, job.base, root, make_parents=params.make_parents)
        if refusal is not None:
            raise FileRefused(refusal.errno, refusal.type, root)
        unpacking = Unpacking(
            job.pipeline,
            base=job.base,
            root=root,
            keep_times=params.keep_times,
            bounds=job.bounds,
            tally=job.tally,
            patience=job.patience,
        )
        unpacking.run(incoming)
        return unpacking.skips


def _upload_file(params: FileUploadParams, descriptor: int, job: Job) -> Skips:
    path = path_of(params)
    flags = Flag.FOLLOW | (Flag.PARENTS if params.make_parents else Flag.NONE)
    if params.mode is None:
        flags |= Flag.KEEP_MODE
    mode = NEW_FILE_MODE if params.mode is None else params.mode
    with contextlib.closing(Incoming(descriptor, job.patience, job.tally)) as incoming:
        reply, received = job.pipeline.ask(
            partial(wire.encode_temp, flags=flags, base=job.base, mode=mode, path=path)
        )
        if not isinstance(reply, TempReply):
            raise _refused(reply, path)
        target = taken_file(received, write=True)
        timed = params.mtime_ns is None
        try:
            _fill(incoming, target, params.size_bytes, job)
            if params.mtime_ns is not None:
                # Not ours to do where the file belongs to another user.
                with contextlib.suppress(OSError):
                    os.utime(target, ns=(params.mtime_ns, params.mtime_ns))
                    timed = True
        finally:
            os.close(target)
        reply, _ = job.pipeline.ask(partial(wire.encode_commit, flags=Flag.NONE, token=reply.token))
        if not isinstance(reply, CommitReply):
            raise _refused(reply, path)
        if not timed and params.mtime_ns is not None:
            job.pipeline.ask(
                partial(wire.encode_set_times, flags=Flag.FOLLOW, base=job.base, mtime_ns=params.mtime_ns, path=path)
            )
    job.tally.entries = 1
    return Skips()


def _fill(incoming: Incoming, target: int, size: int | None, job: Job) -> None:
    """Write what comes to an empty file.

    Raises:
        EndedEarly: Less came than was promised.
        CapacityExceeded: More came than may.
    """
    if size is not None:
        check_bytes(size, job.bounds)
    source = incoming.whole_file()
    if source is not None:
        if not copy_file(source, target, bytes_max=job.bounds.bytes_max, patience=job.patience, tally=job.tally):
            check_bytes(job.bounds.bytes_max + 1, job.bounds)
        return
    if size is not None:
        incoming.copy_to(target, size)
    else:
        check_bytes(incoming.copy_up_to(target, job.bounds.bytes_max + 1), job.bounds)


def _download_tree(params: FileDownloadParams, descriptor: int, job: Job) -> Skips:
    with contextlib.closing(Outgoing(descriptor, job.patience, job.tally)) as outgoing:
        packing = Packing(job.pipeline, base=job.base, bounds=job.bounds, tally=job.tally, patience=job.patience)
        packing.run(outgoing, path_of(params), params.name, follow=params.follow)
        return packing.skips


def _download_file(params: FileDownloadParams, descriptor: int, job: Job) -> Skips:
    path = path_of(params)
    skips = Skips()
    with contextlib.closing(Outgoing(descriptor, job.patience, job.tally)) as outgoing:
        flags = Flag.READ | (Flag.FOLLOW if params.follow else Flag.NONE)
        reply, received = job.pipeline.ask(partial(wire.encode_open, flags=flags, base=job.base, mode=0, path=path))
        if not isinstance(reply, OpenReply):
            raise _refused(reply, path)
        source = taken_file(received, write=False)
        try:
            target = outgoing.empty_file()
            if target is not None:
                if not copy_file(
                    source, target, bytes_max=job.bounds.bytes_max, patience=job.patience, tally=job.tally
                ):
                    check_bytes(job.bounds.bytes_max + 1, job.bounds)
            else:
                check_bytes(reply.facts.size, job.bounds)
                sent = outgoing.copy_from(source, reply.facts.size)
                if sent < reply.facts.size:
                    skips.add(path, "it was cut short while it was read")
                outgoing.flush()
        finally:
            os.close(source)
    job.tally.entries = 1
    return skips


def _refused(reply: wire.FilesReply, path: bytes) -> FileRefused:
    assert isinstance(reply, FileRefusal)
    return FileRefused(reply.errno, reply.type, path)
