"""Where the socket and the state are looked for."""

import os
from pathlib import Path

import pytest

from sandboxd.paths import is_private, runtime_dir, socket_path, state_dir


@pytest.fixture
def nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A uid without /run/user."""
    monkeypatch.setattr(os, "geteuid", lambda: 4_000_000)


def test_an_explicit_socket_wins(tmp_path: Path) -> None:
    """Tests and second daemons need it."""
    assert socket_path({"SANDBOXD_SOCKET": "/x/y.sock", "XDG_RUNTIME_DIR": str(tmp_path)}) == "/x/y.sock"


def test_the_session_runtime_directory_is_used_when_it_is_ours(tmp_path: Path) -> None:
    """It goes away with the login, and nobody else can look into it."""
    tmp_path.chmod(0o700)
    assert socket_path({"XDG_RUNTIME_DIR": str(tmp_path)}) == f"{tmp_path}/sandboxd/sandboxd.sock"


@pytest.mark.usefixtures("nobody_is_logged_in")
def test_a_runtime_directory_of_another_user_is_passed_over(tmp_path: Path) -> None:
    """After ``sudo -E`` the variable names a directory that is in another user's hands."""
    assert runtime_dir({"XDG_RUNTIME_DIR": str(tmp_path)}) == "/tmp/sandboxd-4000000"


def test_a_symlink_or_a_directory_open_to_others_is_not_private(tmp_path: Path) -> None:
    """Both let somebody else decide where the socket really is."""
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(real)
    assert is_private(str(real), os.geteuid())
    assert not is_private(str(tmp_path / "link"), os.geteuid())
    assert not is_private(str(tmp_path / "absent"), os.geteuid())
    real.chmod(0o770)
    assert not is_private(str(real), os.geteuid())


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"SANDBOXD_STATE_DIR": "/s", "XDG_STATE_HOME": "/x"}, "/s"),
        ({"XDG_STATE_HOME": "/x", "HOME": "/h"}, "/x/sandboxd"),
        ({"XDG_STATE_HOME": "relative", "HOME": "/h"}, "/h/.local/state/sandboxd"),
        ({"HOME": "/h"}, "/h/.local/state/sandboxd"),
    ],
)
def test_state_follows_the_base_directories(env: dict[str, str], expected: str) -> None:
    """A relative XDG directory is to be ignored, says its specification."""
    assert state_dir(env) == expected
