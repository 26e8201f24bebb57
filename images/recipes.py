"""Which ways of making the default image are open on this host, and the commands of each. Pure.

Three sources, best first: a *registry* (the shipped Containerfile), the *distribution* (its own packages, through its
own bootstrap tool), *busybox* (one static program, always there in a fraction of a second).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType

PATH_INSIDE = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SANDBOX_UID = 1000
SANDBOX_GID = 1000


class Source(enum.StrEnum):
    """Where an image comes from."""

    REGISTRY = "registry"
    DISTRIBUTION = "distribution"
    BUSYBOX = "busybox"


class Family(enum.StrEnum):
    """Distributions that share their packages' names and tools."""

    DEBIAN = "debian"
    FEDORA = "fedora"
    ARCH = "arch"
    OTHER = "other"


FAMILY_BY_ID: MappingProxyType[str, Family] = MappingProxyType(
    {
        "debian": Family.DEBIAN,
        "ubuntu": Family.DEBIAN,
        "fedora": Family.FEDORA,
        "rhel": Family.FEDORA,
        "centos": Family.FEDORA,
        "arch": Family.ARCH,
    }
)

BUSYBOX_INSTALL: MappingProxyType[Family, str] = MappingProxyType(
    {
        Family.DEBIAN: "sudo apt-get install busybox-static",
        Family.FEDORA: "sudo dnf install busybox",
        Family.ARCH: "sudo pacman -S busybox",
        Family.OTHER: "install a static busybox (Debian: busybox-static, Fedora and Arch: busybox)",
    }
)

BOOTSTRAP_INSTALL: MappingProxyType[Family, str] = MappingProxyType(
    {
        Family.DEBIAN: "sudo apt-get install mmdebstrap uidmap",
        Family.FEDORA: "sudo dnf install dnf",
        Family.ARCH: "sudo pacman -S arch-install-scripts",
        Family.OTHER: "sandboxctl image build --source busybox",
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class HostFacts:
    """What the choice depends on."""

    family: Family
    name: str
    """As the distribution calls itself."""
    suite: str
    """Debian's code name, Fedora's release number; empty where there is none."""
    uid: int
    tools: frozenset[str]
    """Those of ``TOOLS`` that are installed."""
    subordinate_ids: bool
    """The user has ranges in /etc/subuid and /etc/subgid."""
    busybox: str | None
    """Path of a static busybox."""
    apt_sources: tuple[tuple[str, str], ...] = ()
    """File name and text of the host's own apt sources."""


TOOLS = ("mmdebstrap", "debootstrap", "dnf", "dnf5", "pacstrap", "newuidmap", "unshare", "setpriv", "tar")


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One source, in the order to try."""

    source: Source
    possible: bool
    reason: str
    """Why it can be tried, or why not."""
    hint: str = ""
    """What to type to make it possible."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How to fill a root file system from a distribution's packages."""

    tool: str
    argv: Callable[[str, Sequence[str], str], tuple[str, ...]]
    """From (root directory, packages, finishing script) to the command."""
    archive_on_stdout: bool
    """The command writes the tar archive itself and runs the finishing script itself; else it fills the directory."""


def plan(source: str, facts: HostFacts) -> list[Attempt]:
    """The sources to try, in order.

    Args:
        source: ``auto``, or the name of one source.
        facts: This host.

    Raises:
        ValueError: there is no such source.
    """
    every = {
        Source.REGISTRY: Attempt(
            source=Source.REGISTRY, possible=True, reason="whether a registry answers is only known by asking it"
        ),
        Source.DISTRIBUTION: _plan_distribution(facts),
        Source.BUSYBOX: _plan_busybox(facts),
    }
    return list(every.values()) if source == "auto" else [every[Source(source)]]


def recipe(facts: HostFacts) -> Recipe | str:
    """The way to the distribution's packages, or the reason why there is none."""
    missing = {"unshare", "setpriv", "tar"} - facts.tools
    if missing:
        return f"{', '.join(sorted(missing))} not found"
    match facts.family:
        case Family.DEBIAN:
            return _recipe_debian(facts)
        case Family.FEDORA:
            return _recipe_fedora(facts)
        case Family.ARCH:
            return _recipe_arch(facts)
        case Family.OTHER:
            return f"no recipe for {facts.name}"


def family(os_release: dict[str, str]) -> Family:
    """The family that /etc/os-release speaks of."""
    names = [os_release.get("ID", ""), *os_release.get("ID_LIKE", "").split()]
    return next((FAMILY_BY_ID[name] for name in names if name in FAMILY_BY_ID), Family.OTHER)


def suite(os_release: dict[str, str]) -> str:
    """The release to bootstrap: that of the distribution whose archive the host uses, for derivatives too."""
    if family(os_release) is Family.FEDORA:
        return os_release.get("VERSION_ID", "")
    return os_release.get("UBUNTU_CODENAME") or os_release.get("VERSION_CODENAME", "")


def parse_os_release(text: str) -> dict[str, str]:
    """The assignments of an os-release file."""
    pairs = (line.strip().partition("=") for line in text.splitlines() if not line.lstrip().startswith("#"))
    return {key: value.strip("\"'") for key, equals, value in pairs if equals}


def parse_packages(text: str) -> tuple[str, ...]:
    """The names in a ``packages.*`` file: one per line, ``#`` starts a comment."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return tuple(line for line in lines if line)


def apt_lines(sources: Iterable[tuple[str, str]], suite_name: str) -> list[str]:
    """One-line apt sources of the distribution's own archive, as the host has them.

    Third parties' sources are left out: a sandbox's image holds the distribution and nothing else. Debian's public
    mirror is the answer where the host names none that a bootstrap can use.
    """
    suites = [suite_name, f"{suite_name}-updates", f"{suite_name}-security"]
    lines: list[str] = []
    for name, text in sources:
        entries = _deb822_entries(text) if name.endswith(".sources") else _one_line_entries(text)
        for uri, entry_suite, components in entries:
            kept = [component for component in components if component in ("main", "universe")]
            if entry_suite in suites and kept and _is_distribution_archive(uri):
                line = f"deb {uri.rstrip('/')} {entry_suite} {' '.join(kept)}"
                if line not in lines:
                    lines.append(line)
    if not any(line.split()[2] == suite_name for line in lines):
        return [f"deb http://deb.debian.org/debian {suite_name} main"]
    return sorted(lines, key=lambda line: suites.index(line.split()[2]))


def _plan_distribution(facts: HostFacts) -> Attempt:
    found = recipe(facts)
    if isinstance(found, str):
        hint = BOOTSTRAP_INSTALL[facts.family]
        return Attempt(source=Source.DISTRIBUTION, possible=False, reason=found, hint=hint)
    return Attempt(source=Source.DISTRIBUTION, possible=True, reason=f"{found.tool} and the packages of {facts.name}")


def _plan_busybox(facts: HostFacts) -> Attempt:
    if facts.busybox is None:
        reason = "no static busybox found"
        return Attempt(source=Source.BUSYBOX, possible=False, reason=reason, hint=BUSYBOX_INSTALL[facts.family])
    return Attempt(source=Source.BUSYBOX, possible=True, reason=f"{facts.busybox} is static")


def _recipe_debian(facts: HostFacts) -> Recipe | str:
    if not facts.suite:
        return "/etc/os-release names no VERSION_CODENAME"
    lines = apt_lines(facts.apt_sources, facts.suite)
    as_root = facts.uid == 0
    as_user = facts.subordinate_ids and "newuidmap" in facts.tools
    if "mmdebstrap" in facts.tools and (as_root or as_user):

        def argv_mmdebstrap(_root: str, packages: Sequence[str], finish: str) -> tuple[str, ...]:
            return (
                "mmdebstrap",
                "--mode=root",
                "--variant=minbase",
                "--format=tar",
                f"--include={','.join(packages)}",
                '--aptopt=Acquire::Languages "none"',
                "--dpkgopt=force-unsafe-io",
                "--dpkgopt=path-exclude=/usr/share/man/*",
                "--dpkgopt=path-exclude=/usr/share/locale/*",
                "--dpkgopt=path-exclude=/usr/share/doc/*",
                "--dpkgopt=path-include=/usr/share/doc/*/copyright",
                "--skip=output/dev",
                f"--customize-hook={finish}",
                facts.suite,
                "-",
                *lines,
            )

        return Recipe(tool="mmdebstrap", argv=argv_mmdebstrap, archive_on_stdout=True)
    if "debootstrap" in facts.tools and as_root:
        mirror, components = lines[0].split()[1], ",".join(lines[0].split()[3:])

        def argv_debootstrap(root: str, packages: Sequence[str], _finish: str) -> tuple[str, ...]:
            return (
                "debootstrap",
                "--variant=minbase",
                f"--components={components}",
                f"--include={','.join(packages)}",
                facts.suite,
                root,
                mirror,
            )

        return Recipe(tool="debootstrap", argv=argv_debootstrap, archive_on_stdout=False)
    if as_root:
        return "neither mmdebstrap nor debootstrap is installed"
    return "an ordinary user needs mmdebstrap, newuidmap and ranges in /etc/subuid and /etc/subgid"


def _recipe_fedora(facts: HostFacts) -> Recipe | str:
    tool = next((name for name in ("dnf5", "dnf") if name in facts.tools), None)
    if tool is None:
        return "dnf is not installed"
    if facts.uid != 0:
        return "dnf --installroot needs root"
    own_options = ("--use-host-config", "--skip-unavailable") if tool == "dnf5" else ("--setopt=strict=0",)

    def argv(root: str, packages: Sequence[str], _finish: str) -> tuple[str, ...]:
        return (
            tool,
            "-y",
            "install",
            f"--installroot={root}",
            f"--releasever={facts.suite}",
            "--setopt=install_weak_deps=False",
            "--setopt=tsflags=nodocs",
            *own_options,
            *packages,
        )

    return Recipe(tool=tool, argv=argv, archive_on_stdout=False)


def _recipe_arch(facts: HostFacts) -> Recipe | str:
    if "pacstrap" not in facts.tools:
        return "pacstrap is not installed"
    if facts.uid != 0:
        return "pacstrap needs root"

    def argv(root: str, packages: Sequence[str], _finish: str) -> tuple[str, ...]:
        return ("pacstrap", "-c", "-G", "-M", root, *packages)

    return Recipe(tool="pacstrap", argv=argv, archive_on_stdout=False)


def _is_distribution_archive(uri: str) -> bool:
    if not uri.startswith(("http://", "https://")):
        return False
    return uri.rstrip("/").rpartition("/")[2] in ("debian", "debian-security", "ubuntu", "ubuntu-ports")


def _one_line_entries(text: str) -> Iterator[tuple[str, str, list[str]]]:
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if not words or words[0] != "deb":
            continue
        if len(words) > 1 and words[1].startswith("["):
            end = next((at for at, word in enumerate(words) if word.endswith("]")), len(words))
            words = [words[0], *words[end + 1 :]]
        if len(words) > 3:
            yield words[1], words[2], words[3:]


def _deb822_entries(text: str) -> Iterator[tuple[str, str, list[str]]]:
    for stanza in _deb822_stanzas(text):
        if "deb" not in stanza.get("types", "").split() or stanza.get("enabled", "yes").lower() in ("no", "false"):
            continue
        for uri in stanza.get("uris", "").split():
            for entry_suite in stanza.get("suites", "").split():
                yield uri, entry_suite, stanza.get("components", "").split()


def _deb822_stanzas(text: str) -> Iterator[dict[str, str]]:
    stanza: dict[str, str] = {}
    key = ""
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            continue
        if not line.strip():
            if stanza:
                yield stanza
            stanza, key = {}, ""
        elif line[0].isspace() and key:
            stanza[key] += f" {line.strip()}"
        else:
            name, _, value = line.partition(":")
            key = name.strip().lower()
            stanza[key] = value.strip()
