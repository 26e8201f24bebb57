"""The scripts that people and CI start with, on distributions that are not this one.

They run with ``--dry-run``, a made-up os-release and a PATH that holds a shell and coreutils and nothing else, so
that what they would install is what a bare machine lacks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
BARE = "bash cat chmod cut dirname env grep head id ls mkdir sed sh sha256sum sort tail tr true wc".split()

Script = Callable[..., "subprocess.CompletedProcess[str]"]

OS_RELEASES = {
    "debian": "ID=debian\nVERSION_ID=12\n",
    "ubuntu": 'ID=ubuntu\nID_LIKE=debian\nPRETTY_NAME="Ubuntu 24.04 LTS"\n',
    "fedora": "ID=fedora\nVERSION_ID=42\n",
    "arch": "ID=arch\n",
}


def shell_scripts() -> list[Path]:
    candidates = [*ROOT.glob("hack/*"), *ROOT.glob("hack/*/*"), *ROOT.glob(".ci/*"), *ROOT.glob("images/*/*")]
    found = [path for path in candidates if path.is_file() and path.read_bytes()[:2] == b"#!"]
    return [*sorted(path for path in found if b"sh" in path.read_bytes().splitlines()[0]), ROOT / "hack/host.sh"]


def test_python_without_a_suffix_is_linted_too() -> None:
    """By itself ruff sees only what is named ``*.py``."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    candidates = [path for folder in ("hack", ".ci", "sandboxd/cli") for path in (ROOT / folder).glob("*")]
    scripts = [path for path in candidates if path.is_file() and not path.suffix]
    first_lines = {path: path.read_bytes().partition(b"\n")[0] for path in scripts}
    python = {path for path, line in first_lines.items() if line.startswith(b"#!") and b"python" in line}
    assert {str(path.relative_to(ROOT)) for path in python} == set(settings["extend-include"])


def program(folder: Path, name: str, body: str = "exit 0") -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def bare_bin(tmp_path: Path) -> Path:
    """A PATH of its own, where only the shell's everyday programs are."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in BARE:
        found = shutil.which(name)
        assert found is not None, name
        (folder / name).symlink_to(found)
    program(folder, "timeout", 'while [ "${1#-}" != "$1" ]; do shift; done; shift; exec "$@"')
    return folder


@pytest.fixture
def script(tmp_path: Path, bare_bin: Path) -> Script:
    """Run one script on a made-up distribution. Nobody's packages are asked: apt-cache knows every name."""
    program(bare_bin, "apt-cache", "echo known")
    program(bare_bin, "dpkg-query", "echo not-installed")

    def run(name: str, *arguments: str, distribution: str = "debian") -> subprocess.CompletedProcess[str]:
        release = tmp_path / "os-release"
        release.write_text(OS_RELEASES.get(distribution, f"ID={distribution}\n"))
        # The scripts add the system's own directories behind PATH; a copy without that line stays in the made-up one.
        checkout = tmp_path / "checkout"
        if not checkout.exists():
            shutil.copytree(ROOT / "hack", checkout / "hack", ignore=shutil.ignore_patterns("__pycache__"))
            host = checkout / "hack" / "host.sh"
            lines = host.read_text().splitlines(keepends=True)
            assert sum(line.startswith("PATH=") for line in lines) == 1
            host.write_text("".join(line for line in lines if not line.startswith("PATH=")))
        return subprocess.run(
            [bare_bin / "bash", checkout / "hack" / name, *arguments],
            env={"PATH": str(bare_bin), "OS_RELEASE": str(release)},
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    return run


def installed(answer: subprocess.CompletedProcess[str]) -> list[str]:
    lines = [line for line in answer.stdout.splitlines() if " install " in line or " -S " in line]
    assert len(lines) == 1, answer.stdout + answer.stderr
    return lines[0].split()


class TestQuickstart:
    @pytest.mark.parametrize(
        ("distribution", "manager", "packages"),
        [
            ("debian", "apt-get", {"podman", "uidmap", "gcc", "libc6-dev", "python3-venv", "busybox-static"}),
            ("ubuntu", "apt-get", {"podman", "uidmap", "gcc", "libc6-dev", "python3-venv", "busybox-static"}),
            ("fedora", "dnf", {"podman", "gcc", "glibc-static", "python3", "busybox"}),
            ("arch", "pacman", {"podman", "gcc", "python", "busybox"}),
        ],
    )
    def test_a_bare_machine_gets_its_distributions_own_packages(
        self, script: Script, distribution: str, manager: str, packages: set[str]
    ) -> None:
        answer = script("quickstart", "--dry-run", "--yes", distribution=distribution)
        assert answer.returncode == 0, answer.stderr
        words = installed(answer)
        assert manager in words
        assert packages <= set(words)

    @pytest.mark.parametrize(
        ("distribution", "package"), [("debian", "docker.io"), ("fedora", "moby-engine"), ("arch", "docker")]
    )
    def test_docker_can_be_asked_for(self, script: Script, distribution: str, package: str) -> None:
        words = installed(script("quickstart", "--dry-run", "--engine", "docker", distribution=distribution))
        assert package in words
        assert "podman" not in words

    def test_what_is_there_is_not_installed_again(self, script: Script, bare_bin: Path) -> None:
        for name in ("podman", "runc", "gcc", "python3", "busybox", "mmdebstrap"):
            program(bare_bin, name)
        answer = script("quickstart", "--dry-run")
        assert answer.returncode == 0, answer.stderr
        assert "nothing to install" in answer.stderr
        assert "install -y" not in answer.stdout

    def test_docker_is_taken_where_it_is_the_only_engine(self, script: Script, bare_bin: Path) -> None:
        program(bare_bin, "docker", "exit 1")
        answer = script("quickstart", "--dry-run")
        assert "engine: docker" in answer.stderr
        assert "start Docker's daemon" in answer.stdout

    def test_does_the_whole_job_in_order(self, script: Script) -> None:
        answer = script("quickstart", "--dry-run", "--image-source", "busybox")
        positions = [
            answer.stdout.index(step)
            for step in ("hack/venv", "daemon start", "image build", "run --rm", "create --name", "verify", " rm ")
        ]
        assert positions == sorted(positions)
        assert "--source busybox" in answer.stdout
        assert "sandboxctl shell box" in answer.stdout

    def test_an_unknown_distribution_is_told_what_to_install(self, script: Script) -> None:
        answer = script("quickstart", "--dry-run", distribution="plan9")
        assert answer.returncode == 4
        assert "podman" in answer.stderr
        assert "venv" in answer.stderr

    @pytest.mark.skipif(os.geteuid() != 0, reason="sudo is asked of ordinary users only; this one pretends to be one")
    def test_without_a_terminal_it_names_the_command_and_does_not_use_sudo(
        self, script: Script, bare_bin: Path, tmp_path: Path
    ) -> None:
        (bare_bin / "id").unlink()
        program(bare_bin, "id", "echo 1000")
        program(bare_bin, "sudo", f"touch {tmp_path}/used")
        answer = script("quickstart")
        assert answer.returncode == 4
        assert "sudo apt-get" in answer.stderr.replace("timeout 300 ", "")
        assert not (tmp_path / "used").exists()

    def test_without_sudo_it_names_the_command_for_root(self, script: Script, bare_bin: Path) -> None:
        (bare_bin / "id").unlink()
        program(bare_bin, "id", "echo 1000")
        answer = script("quickstart", "--yes")
        assert answer.returncode == 4
        assert "su -c" in answer.stderr

    @pytest.mark.parametrize("arguments", [["--engine", "lxc"], ["--image-source", "floppy"], ["--nonsense"]])
    def test_a_wrong_argument_is_a_usage_error(self, script: Script, arguments: list[str]) -> None:
        answer = script("quickstart", *arguments)
        assert answer.returncode == 2
        assert "Usage:" in answer.stderr


class TestEngines:
    def test_a_bare_debian_gets_both_engines(self, script: Script) -> None:
        answer = script("engines", "--dry-run", "--yes")
        assert answer.returncode == 0, answer.stderr
        assert {"podman", "runc", "docker.io", "busybox-static", "libc6-dev"} <= set(installed(answer))

    def test_a_docker_from_elsewhere_is_kept(self, script: Script, bare_bin: Path) -> None:
        program(bare_bin, "docker", "exit 1")
        program(bare_bin, "dockerd")
        assert "docker.io" not in installed(script("engines", "--dry-run"))

    def test_a_package_that_the_release_lacks_does_not_stop_it(self, script: Script, bare_bin: Path) -> None:
        program(bare_bin, "apt-cache", 'case "$*" in *netavark*) ;; *) echo known ;; esac')
        answer = script("engines", "--dry-run")
        assert answer.returncode == 0
        assert "netavark is not in this release" in answer.stderr
        assert "netavark" not in installed(answer)

    def test_another_distribution_is_sent_to_quickstart(self, script: Script) -> None:
        answer = script("engines", "--dry-run", distribution="fedora")
        assert answer.returncode == 4
        assert "hack/quickstart" in answer.stderr


class TestEveryScript:
    def test_passes_shellcheck(self) -> None:
        beside = Path(sys.executable).parent / "shellcheck"
        shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
        assert shellcheck is not None, "shellcheck is in the dev group: hack/venv --dev"
        answer = subprocess.run(
            [shellcheck, "--external-sources", *shell_scripts()],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert answer.returncode == 0, answer.stdout

    @pytest.mark.parametrize("name", ["quickstart", "engines", "venv", "test", "check"])
    def test_explains_itself_without_doing_anything(self, script: Script, name: str) -> None:
        answer = script(name, "--help")
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout.startswith(f"Usage: hack/{name}")

    def test_can_be_executed_and_says_who_runs_it(self) -> None:
        for path in shell_scripts():
            second = path.read_text().splitlines()[1]
            assert second.startswith("# "), path
            assert path.suffix == ".sh" or os.access(path, os.X_OK), path


@pytest.mark.parametrize("peer", ["llm-sandbox", "swe-rex"])
def test_a_peer_that_is_not_installed_is_said_to_be_so(peer: str, tmp_path: Path) -> None:
    """And not left out of the figures without a word."""
    (tmp_path / "small").write_text("x")
    words = [sys.executable, "-I", "-S", ROOT / "hack/bench_rows/peers.py", peer, "container", tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=True)
    assert done.stdout.startswith("not installed (No module named ")
