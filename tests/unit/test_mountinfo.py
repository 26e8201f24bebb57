"""What arrived inside is what was meant."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes.errors import UnreadableAnswer
from runtimes.mountinfo import deviations, parse, source

HOST = parse(
    "20 1 8:1 / / rw - ext4 /dev/sda rw\n"
    "21 20 8:2 /home /home rw - ext4 /dev/sdb rw\n"
    "22 21 0:9 / /home/me/with\\040blank/sub rw - ext4 /dev/sdc rw\n"
)
SOURCES = {"/.sandboxd/bin": "/var/bin", "/workspace": "/home/me/with blank"}
INSIDE = [
    "50 1 0:50 / / ro - overlay overlay rw",
    "51 50 0:51 / /proc rw - proc proc rw",
    "52 50 0:52 / /tmp rw - tmpfs tmpfs rw,size=1k",
    "53 50 8:1 /var/lib/engine/hosts /etc/hosts rw - ext4 /dev/sda rw",
    "54 50 8:1 /var/bin /.sandboxd/bin ro,nosuid - ext4 /dev/sda rw",
    "55 50 8:2 /home/me/with\\040blank /workspace rw - ext4 /dev/sdb rw",
    "56 55 0:9 / /workspace/sub rw - ext4 /dev/sdc rw",
]


def _deviations(*changes: str) -> list[str]:
    text = "\n".join([*INSIDE, *changes])
    return deviations(parse(text), HOST, SOURCES, ours=SOURCES, read_only={"/.sandboxd/bin"})


def test_what_was_meant_is_no_deviation() -> None:
    """A project's own submounts come along."""
    assert _deviations() == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("60 50 8:1 /volumes/x /.sandboxd/bin ro - ext4 /dev/sda rw", "something else is mounted at /.sandboxd/bin"),
        ("60 50 8:1 /var/bin /.sandboxd/bin rw - ext4 /dev/sda rw", "/.sandboxd/bin can be written"),
        ("60 50 8:1 /x /.sandboxd rw - ext4 /dev/sda rw", "nothing is mounted at /.sandboxd/bin itself"),
        (
            "60 54 8:1 /x /.sandboxd/bin/sandbox-init ro - ext4 /dev/sda rw",
            "mounted over /.sandboxd/bin/sandbox-init",
        ),
        ("60 50 8:1 /volumes/x /data rw - ext4 /dev/sda rw", "the image declares a volume at /data"),
        ("60 55 8:1 /volumes/x /workspace/.git rw - ext4 /dev/sda rw", "mounted over /workspace/.git"),
        ("60 50 8:2 /home/other /workspace rw - ext4 /dev/sdb rw", "something else is mounted at /workspace"),
    ],
)
def test_what_an_image_put_in_between_is_found(line: str, said: str) -> None:
    """A volume over our programs would be PID 1; one over the project would hide it; one beside it has no limit."""
    assert any(said in clause for clause in _deviations(line))


def test_a_mount_that_did_not_come_is_found() -> None:
    """A symlink in the image leads it elsewhere."""
    inside = parse("\n".join(line for line in INSIDE if "/workspace" not in line))
    assert deviations(inside, HOST, SOURCES, ours=SOURCES, read_only=()) == [
        "nothing is mounted at /workspace itself"
    ]


# Podman 5.4 with crun on Linux 6.18, shortened: binds are made aside, and so have the lower numbers.
CRUN = parse(
    "369 375 8:2 /ann/p /workspace rw,nosuid,nodev,relatime - ext4 /dev/vda rw\n"
    "370 375 8:2 /ann/bin /.sandboxd/bin ro,nosuid,nodev,relatime - ext4 /dev/vda rw\n"
    "371 375 0:104 /containers/hosts /etc/hosts ro,nosuid,nodev,noexec,relatime - tmpfs tmpfs rw,mode=700\n"
    "373 376 0:53 / /dev/shm rw,nosuid,nodev,noexec,relatime - tmpfs shm rw,size=64000k\n"
    "375 337 0:105 / / ro,relatime - overlay overlay rw,userxattr\n"
    "376 375 0:108 / /dev rw,nosuid - tmpfs tmpfs rw,size=65536k,mode=755\n"
    "379 375 0:89 / /sys ro,nosuid,nodev,noexec,relatime - sysfs sysfs ro\n"
    "380 379 0:38 / /sys/fs/cgroup ro,nosuid,nodev,noexec,relatime - cgroup2 cgroup2 rw\n"
    "388 380 0:114 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,size=4k,nr_inodes=1\n"
    "389 388 0:38 /libpod.scope /sys/fs/cgroup ro,nosuid,nodev,noexec,relatime - cgroup2 cgroup2 rw\n"
)


def test_the_order_of_the_lines_says_nothing() -> None:
    """With the root told last, everything would seem to be on it."""
    host = parse("20 1 8:1 / / rw - ext4 /dev/sda rw\n21 20 8:2 / /home rw - ext4 /dev/vda rw\n")
    sources = {"/.sandboxd/bin": "/home/ann/bin", "/workspace": "/home/ann/p"}
    for entries in (CRUN, CRUN[::-1], sorted(CRUN, key=lambda entry: entry.target)):
        assert deviations(entries, host, sources, ours=sources, read_only={"/.sandboxd/bin"}) == []
        assert source(entries, "/sys/fs/cgroup/x") == ("0:38", "/libpod.scope/x")
        assert source(entries, "/dev/shm/x") == ("0:53", "/x")
        assert source(entries, "/etc/passwd") == ("0:105", "/etc/passwd")


def test_what_is_mounted_over_a_directory_hides_what_was_below() -> None:
    hidden = parse("9 8 8:9 / /a/b rw - ext4 d rw\n7 8 8:7 / /a rw - ext4 d rw\n8 1 8:8 / / rw - ext4 d rw\n")
    assert source(hidden, "/a/b/c") == ("8:7", "/b/c")


@pytest.mark.parametrize(
    "text", ["1 1 0:1 / / rw - rootfs rootfs rw\n", "1 2 8:1 / / rw - a b\n2 1 8:1 / / rw - a b\n"]
)
def test_a_table_that_leads_in_circles_has_an_end(text: str) -> None:
    """The first root of a machine lies on itself; the other cannot be, and comes to nothing."""
    assert source(parse(text), "/x") in {("0:1", "/x"), None}


def test_a_source_is_named_by_its_own_file_system() -> None:
    """The same directory has one name there, however it is reached."""
    assert source(HOST, "/home/me/x") == ("8:2", "/home/me/x")
    assert source(HOST, "/var") == ("8:1", "/var")
    assert source(HOST, "/home/me/with blank/sub") == ("0:9", "/")


@given(st.text(alphabet="abc /-:,0123456789\\\n"))
def test_no_text_raises_anything_else(text: str) -> None:
    """A container's mount points are named by its image."""
    with contextlib.suppress(UnreadableAnswer):
        parse(text)
