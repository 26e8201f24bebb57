"""From what a caller wrote to the limits of a sandbox."""

from __future__ import annotations

import pytest

from sandboxd.config import Defaults
from sandboxd.failures import InvalidArgument
from sandboxd.limits import Host, resolve, resolve_update
from sandboxd.protocol import LimitsParams

HOST = Host(cpus_online=(0, 1, 2, 3), memory_bytes=2**34, swap_bytes=0, pid_max=32768, nr_open=2**20)


def nofile(asked: int | None, *, hard_max: int | None, default: int = 4096, host: Host = HOST) -> int | None:
    params = LimitsParams(nofile=asked)
    return resolve(params, Defaults(nofile=default), host, nofile_hard_max=hard_max).limits.nofile_max


def test_open_files_are_bounded_by_what_the_kernel_allows_of_them() -> None:
    """How many processes there may be has nothing to do with it."""
    assert nofile(100_000, hard_max=None) == 100_000
    assert nofile(2**20, hard_max=None) == 2**20
    with pytest.raises(InvalidArgument, match="to 1048576"):
        nofile(2**20 + 1, hard_max=None)
    with pytest.raises(InvalidArgument, match="to 5000"):
        nofile(5001, hard_max=5000)
    with pytest.raises(InvalidArgument, match="to 1048576"):
        nofile(2**20 + 1, hard_max=2**30)


def test_a_default_is_cut_to_what_the_host_has() -> None:
    """One configuration file serves machines of different size."""
    assert nofile(None, hard_max=1000) == 1000
    assert nofile(None, hard_max=None, default=2**25) == 2**20
    small = Host(cpus_online=(0,), memory_bytes=2**30, swap_bytes=0, pid_max=300, nr_open=2**20)
    found = resolve(LimitsParams(), Defaults(memory="900g", cpus="64"), small, nofile_hard_max=None)
    assert found.limits.memory_bytes_max == 2**29
    assert found.limits.cpu_millis == 1000
    assert found.limits.pids_max == 300
    assert found.tmp_bytes_max == 2**29


def test_a_small_default_of_a_tmpfs_is_taken_as_it_is() -> None:
    """It need not be as large as a sandbox's memory must be."""
    found = resolve(LimitsParams(), Defaults(shm="64k", tmp="1m"), HOST, nofile_hard_max=None)
    assert (found.limits.shm_bytes_max, found.tmp_bytes_max) == (64 * 1024, 1024 * 1024)


def test_what_is_fixed_at_create_cannot_be_updated() -> None:
    """The message says where it can be given."""
    with pytest.raises(InvalidArgument, match="cannot change --nofile"):
        resolve_update(LimitsParams(nofile=100), HOST)
