"""How the default image is made: what is decided purely, and what the archive of the small one holds."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path, PurePosixPath

import pytest
from pytest_subprocess import FakeProcess

import images
from images import HostFacts, RootfsError, Source, plan
from images.recipes import Family, Recipe, apt_lines, family, parse_os_release, parse_packages, recipe, suite
from images.rootfs import busybox_rootfs, distribution_rootfs, find_busybox, is_static, remove_stale

EVERY_TOOL = frozenset({"mmdebstrap", "debootstrap", "newuidmap", "unshare", "setpriv", "tar"})
HOST = HostFacts(
    family=Family.DEBIAN,
    name="Debian GNU/Linux 12",
    suite="bookworm",
    uid=0,
    tools=EVERY_TOOL,
    subordinate_ids=False,
    busybox="/bin/busybox",
)


def silent(_message: str, _done: int | None, _total: int | None) -> None:
    pass


@pytest.fixture(scope="module")
def busybox_tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("images") / "busybox.tar"
    busybox_rootfs(str(out))
    return out


class TestWhatBusyboxSays:
    """Its list becomes file names in the image. A real busybox never lists nonsense; a fake one may."""

    @pytest.fixture
    def busybox(self) -> str:
        found = find_busybox()
        assert found is not None
        return found

    def test_only_plain_names_become_links(self, fp: FakeProcess, busybox: str, tmp_path: Path) -> None:
        fp.register([busybox, "--list"], stdout="ls\n../../etc/passwd\nbusybox\n/bin/sh\nsh\n..\n")
        busybox_rootfs(str(tmp_path / "out.tar"))
        with tarfile.open(tmp_path / "out.tar") as tar:
            links = {PurePosixPath(member.name).name for member in tar if member.issym() or member.islnk()}
        assert {"ls", "sh"} <= links
        assert not links & {"passwd", "..", "busybox"}

    def test_a_busybox_that_fails_is_a_failure_of_ours(self, fp: FakeProcess, busybox: str, tmp_path: Path) -> None:
        fp.register([busybox, "--list"], returncode=127)
        with pytest.raises(RootfsError, match="cannot use"):
            busybox_rootfs(str(tmp_path / "out.tar"))
        assert list(tmp_path.iterdir()) == []

    def test_a_busybox_that_hangs_is_not_waited_for(self, fp: FakeProcess, busybox: str, tmp_path: Path) -> None:
        def hang(_: object) -> None:
            raise subprocess.TimeoutExpired([busybox, "--list"], 10)

        fp.register([busybox, "--list"], callback=hang)
        with pytest.raises(RootfsError, match="cannot use"):
            busybox_rootfs(str(tmp_path / "out.tar"))


class TestPlan:
    def test_auto_tries_the_richest_source_first(self) -> None:
        assert [attempt.source for attempt in plan("auto", HOST)] == ["registry", "distribution", "busybox"]

    def test_a_named_source_is_the_only_one(self) -> None:
        assert [attempt.source for attempt in plan("busybox", HOST)] == [Source.BUSYBOX]

    def test_an_unknown_source_is_refused(self) -> None:
        with pytest.raises(ValueError, match="floppy"):
            plan("floppy", HOST)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"tools": EVERY_TOOL - {"mmdebstrap", "debootstrap"}}, "neither mmdebstrap nor debootstrap"),
            ({"uid": 1000}, "subuid"),
            ({"uid": 1000, "tools": EVERY_TOOL - {"mmdebstrap"}, "subordinate_ids": True}, "mmdebstrap"),
            ({"tools": EVERY_TOOL - {"unshare"}}, "unshare not found"),
            ({"suite": ""}, "VERSION_CODENAME"),
            ({"family": Family.FEDORA}, "dnf is not installed"),
            ({"family": Family.FEDORA, "tools": EVERY_TOOL | {"dnf"}, "uid": 1000}, "needs root"),
            ({"family": Family.ARCH}, "pacstrap is not installed"),
            ({"family": Family.OTHER, "name": "Plan 9"}, "Plan 9"),
        ],
    )
    def test_an_impossible_source_says_why_and_what_to_type(self, changes: dict[str, object], words: str) -> None:
        attempt = plan("distribution", dataclasses.replace(HOST, **changes))[0]  # type: ignore[arg-type]
        assert not attempt.possible
        assert words in attempt.reason
        assert attempt.hint

    @pytest.mark.parametrize("which", list(Family))
    def test_without_busybox_the_hint_names_the_package(self, which: Family) -> None:
        attempt = plan("busybox", dataclasses.replace(HOST, busybox=None, family=which))[0]
        assert not attempt.possible
        assert "busybox" in attempt.hint

    @pytest.mark.parametrize(
        ("facts", "tool"),
        [
            (HOST, "mmdebstrap"),
            (dataclasses.replace(HOST, tools=EVERY_TOOL - {"mmdebstrap"}), "debootstrap"),
            (dataclasses.replace(HOST, uid=1000, subordinate_ids=True), "mmdebstrap"),
            (dataclasses.replace(HOST, family=Family.FEDORA, suite="42", tools=EVERY_TOOL | {"dnf5", "dnf"}), "dnf5"),
            (dataclasses.replace(HOST, family=Family.ARCH, suite="", tools=EVERY_TOOL | {"pacstrap"}), "pacstrap"),
        ],
    )
    def test_each_distribution_uses_its_own_tool(self, facts: HostFacts, tool: str) -> None:
        found = recipe(facts)
        assert isinstance(found, Recipe)
        argv = found.argv("/build/root", ("bash", "git"), "true")
        assert (found.tool, argv[0]) == (tool, tool)
        assert any("bash" in word for word in argv)
        assert facts.suite in " ".join(argv)


class TestHost:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("ID=debian\nVERSION_CODENAME=bookworm\n", (Family.DEBIAN, "bookworm")),
            ('ID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME="noble"\nUBUNTU_CODENAME=noble', (Family.DEBIAN, "noble")),
            (
                'ID=linuxmint\nID_LIKE="ubuntu debian"\nVERSION_CODENAME=wilma\nUBUNTU_CODENAME=noble',
                (Family.DEBIAN, "noble"),
            ),
            ("ID=fedora\nVERSION_ID=42\n", (Family.FEDORA, "42")),
            ('ID=almalinux\nID_LIKE="rhel centos fedora"\nVERSION_ID="9.5"\n', (Family.FEDORA, "9.5")),
            ("ID=arch\n", (Family.ARCH, "")),
            ("# nothing\nID=nixos\n", (Family.OTHER, "")),
        ],
    )
    def test_os_release_names_family_and_release(self, text: str, expected: tuple[Family, str]) -> None:
        os_release = parse_os_release(text)
        assert (family(os_release), suite(os_release)) == expected

    def test_apt_sources_of_both_forms_give_the_archive_and_no_third_party(self) -> None:
        modern = (
            "Types: deb deb-src\n# a note\nURIs: http://mirror.example/debian/\n"
            "Suites: bookworm bookworm-updates\nComponents: main\n non-free\n\n"
            "Types: deb\nURIs: http://off.example/debian\nSuites: bookworm\nComponents: main\nEnabled: no\n"
        )
        classic = (
            "deb [signed-by=/k.gpg arch=amd64] https://packages.example/debian/12/prod bookworm main\n"
            "deb [ arch=amd64 ] http://mirror.example/debian-security bookworm-security main contrib # yes\n"
            "deb-src http://mirror.example/debian bookworm main\n"
            "deb https://download.example/linux/debian bookworm stable\n"
        )
        assert apt_lines([("debian.sources", modern), ("sources.list", classic)], "bookworm") == [
            "deb http://mirror.example/debian bookworm main",
            "deb http://mirror.example/debian bookworm-updates main",
            "deb http://mirror.example/debian-security bookworm-security main",
        ]

    def test_without_usable_apt_sources_the_public_mirror_is_taken(self) -> None:
        assert apt_lines([("sources.list", "deb cdrom:[x] bookworm main\n")], "bookworm") == [
            "deb http://deb.debian.org/debian bookworm main"
        ]

    def test_every_distribution_has_a_package_list(self) -> None:
        folder = Path(images.context_dir("default"))
        for which in (Family.DEBIAN, Family.FEDORA, Family.ARCH):
            packages = parse_packages((folder / f"packages.{which}").read_text())
            assert {"bash", "ca-certificates", "curl"} <= set(packages)
            assert list(packages) == sorted(packages)

    def test_the_containerfile_uses_the_shared_package_list(self) -> None:
        text = (Path(images.context_dir("default")) / "Containerfile").read_text()
        assert "packages.debian" in text
        assert "finish.sh" in text
        assert "USER 1000:1000" in text

    def test_an_unknown_image_is_refused(self) -> None:
        with pytest.raises(RootfsError, match="cannot find a Containerfile"):
            images.context_dir("nonesuch")


class TestBusybox:
    def test_is_quick(self, tmp_path: Path) -> None:
        began = time.monotonic()
        busybox_rootfs(str(tmp_path / "a.tar"))
        assert time.monotonic() - began < 0.5

    def test_the_same_busybox_gives_the_same_bytes(self, tmp_path: Path, busybox_tar: Path) -> None:
        busybox_rootfs(str(tmp_path / "again.tar"))
        assert (tmp_path / "again.tar").read_bytes() == busybox_tar.read_bytes()

    def test_no_member_leads_outside(self, busybox_tar: Path) -> None:
        with tarfile.open(busybox_tar) as tar:
            for member in tar:
                parts = PurePosixPath(member.name)
                assert not parts.is_absolute()
                assert ".." not in parts.parts
                assert member.isreg() or member.isdir() or member.issym()
                if member.issym():
                    assert not member.linkname.startswith("/")
                    assert os.path.normpath(f"/{parts.parent}/{member.linkname}") != "/"

    def test_nothing_in_it_is_privileged(self, busybox_tar: Path) -> None:
        with tarfile.open(busybox_tar) as tar:
            for member in tar:
                assert not member.mode & 0o6000
                assert (member.uid, member.gid) in ((0, 0), (1000, 1000))

    def test_holds_what_a_sandbox_needs(self, busybox_tar: Path) -> None:
        with tarfile.open(busybox_tar) as tar:
            names = {member.name: member for member in tar}
            passwd = tar.extractfile("etc/passwd")
            assert passwd is not None
            users = {line.split(":")[0]: line.split(":")[2] for line in passwd.read().decode().splitlines()}
        assert users == {"root": "0", "sandbox": "1000", "nobody": "65534"}
        assert {names[name].mode for name in ("tmp", "run", "home/sandbox")} == {0o1777}
        assert names["workspace"].uid == 1000
        assert names["bin/sh"].linkname == "busybox"
        assert {"etc/group", "etc/nsswitch.conf", "etc/os-release", "proc", "sys", "dev", "run"} <= set(names)

    def test_its_shell_runs(self, tmp_path: Path, busybox_tar: Path) -> None:
        subprocess.run(["tar", "--extract", f"--file={busybox_tar}", f"--directory={tmp_path}"], check=True)
        answer = subprocess.run([tmp_path / "bin/sh", "-c", "echo $((6 * 7))"], capture_output=True, check=True)
        assert answer.stdout == b"42\n"

    def test_without_busybox_the_error_names_the_package(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("images.rootfs.find_busybox", lambda: None)
        with pytest.raises(RootfsError) as caught:
            busybox_rootfs(str(tmp_path / "never.tar"))
        assert "busybox" in caught.value.hint
        assert list(tmp_path.iterdir()) == []

    def test_a_busybox_that_fails_is_named_and_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("images.rootfs.find_busybox", lambda: "/bin/false")
        with pytest.raises(RootfsError, match="/bin/false"):
            busybox_rootfs(str(tmp_path / "never.tar"))
        assert list(tmp_path.iterdir()) == []

    def test_dynamic_programs_scripts_and_truncated_ones_are_not_static(self, tmp_path: Path) -> None:
        (tmp_path / "script").write_text("#!/bin/sh\n" + "#" * 100)
        (tmp_path / "short").write_bytes(b"\x7fELF\x02\x01")
        (tmp_path / "cut").write_bytes(Path(sys.executable).resolve().read_bytes()[:80])
        assert not is_static("/bin/sh")
        for name in ("script", "short", "cut", "absent"):
            assert not is_static(str(tmp_path / name))


class TestBuild:
    @pytest.mark.parametrize("source", ["registry", "auto", "floppy"])
    def test_only_the_two_local_sources_can_be_built(self, tmp_path: Path, source: str) -> None:
        with pytest.raises(RootfsError, match="distribution or busybox"):
            images.build_rootfs(source, str(tmp_path / "x.tar"), silent)

    def test_facts_say_what_to_record_in_the_image(self, tmp_path: Path) -> None:
        messages: list[str] = []
        facts = images.build_rootfs(
            "busybox", str(tmp_path / "x.tar"), lambda message, _done, _total: messages.append(message)
        )
        assert facts.source == "busybox"
        assert facts.size_bytes == (tmp_path / "x.tar").stat().st_size
        assert "USER 1000:1000" in facts.changes
        assert 'CMD ["/bin/sh"]' in facts.changes
        assert messages

    def test_an_archive_that_cannot_be_written_is_a_typed_error(self, tmp_path: Path) -> None:
        with pytest.raises(RootfsError, match="cannot write"):
            images.build_rootfs("busybox", str(tmp_path / "absent" / "x.tar"), silent)


def fake_tool(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def fake_bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in front of PATH, where ``setpriv`` and ``unshare`` only run what they are given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("setpriv", "unshare"):
        fake_tool(folder, name, 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"')
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


class TestDistribution:
    """With a fake bootstrap tool: the true ones take half a minute and a mirror."""

    def test_the_tools_archive_becomes_the_image(self, fake_bin: Path, tmp_path: Path) -> None:
        fake_tool(fake_bin, "mmdebstrap", "echo 'I: extracting archives...' >&2; echo archive")
        out, messages = tmp_path / "out" / "d.tar", list[str]()
        out.parent.mkdir()
        facts = distribution_rootfs(str(out), lambda message, _done, _total: messages.append(message), facts=HOST)
        assert out.read_text() == "archive\n"
        assert facts.size_bytes == 8
        assert 'CMD ["/bin/bash"]' in facts.changes
        assert any("extracting archives" in message for message in messages)
        assert [entry.name for entry in out.parent.iterdir()] == ["d.tar"]

    def test_a_failing_tool_says_its_last_words_and_leaves_nothing(self, fake_bin: Path, tmp_path: Path) -> None:
        fake_tool(fake_bin, "mmdebstrap", "echo 'E: no such suite' >&2; exit 25")
        out = tmp_path / "out" / "d.tar"
        out.parent.mkdir()
        with pytest.raises(RootfsError) as caught:
            distribution_rootfs(str(out), silent, facts=HOST)
        assert "exited with 25" in caught.value.brief
        assert "no such suite" in caught.value.detail
        assert list(out.parent.iterdir()) == []

    def test_a_tool_that_hangs_is_ended_with_its_children(self, fake_bin: Path, tmp_path: Path) -> None:
        pid_file = tmp_path / "pid"
        fake_tool(fake_bin, "mmdebstrap", f"sleep 60 & echo $! > {pid_file}; wait")
        out = tmp_path / "out" / "d.tar"
        out.parent.mkdir()
        began = time.monotonic()
        with pytest.raises(RootfsError, match="cannot wait longer"):
            distribution_rootfs(str(out), silent, facts=HOST, deadline_s=0.5)
        assert time.monotonic() - began < 5
        assert list(out.parent.iterdir()) == []
        state = Path(f"/proc/{pid_file.read_text().strip()}/stat")
        assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"

    def test_what_progress_raises_ends_the_build(self, fake_bin: Path, tmp_path: Path) -> None:
        fake_tool(fake_bin, "mmdebstrap", "echo 'I: one' >&2; sleep 60")
        out = tmp_path / "out" / "d.tar"
        out.parent.mkdir()

        def cancelled(_message: str, _done: int | None, _total: int | None) -> None:
            raise InterruptedError("cancelled")

        with pytest.raises(InterruptedError, match="cancelled"):
            distribution_rootfs(str(out), cancelled, facts=HOST)
        assert list(out.parent.iterdir()) == []

    def test_leftovers_of_a_killed_build_are_removed_by_the_next(self, tmp_path: Path) -> None:
        """A build that is killed cannot tidy up; what it held the lock of must not stay for ever."""
        script = (
            "import sys, time\n"
            "from images.rootfs import _work_dir, _written_whole\n"
            "with _written_whole(sys.argv[1]), _work_dir(sys.argv[1], traversable=False) as (path, _):\n"
            "    print(path, flush=True)\n"
            "    time.sleep(60)\n"
        )
        root = Path(images.__file__).resolve().parent.parent
        with subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "x.tar")], stdout=subprocess.PIPE, text=True, cwd=root
        ) as build:
            assert build.stdout is not None
            path = Path(build.stdout.readline().strip())
            assert remove_stale(str(path.parent)) == 0
            assert path.is_dir()
            build.kill()
            build.wait()
        assert path.is_dir()
        assert remove_stale(str(path.parent)) >= 1
        assert not path.exists()
        remove_stale(str(tmp_path))
        assert list(tmp_path.iterdir()) == []
