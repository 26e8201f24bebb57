"""The units that are installed: what is in them is what systemd reads."""

from __future__ import annotations

from sandboxd.cli import units

COMMAND = ("/opt/with blank/python", "-P", "-m", "sandboxd.daemon")
ODD = '100% "sure" of $HOME, \\ and a\nline'


def values(text: str, key: str) -> list[str]:
    return [line.partition("=")[2] for line in text.splitlines() if line.startswith(f"{key}=")]


def test_the_socket_is_where_clients_look_and_the_users_alone() -> None:
    text = units.socket_unit("/run/user/1000/100%/sandboxd.sock")
    assert values(text, "ListenStream") == ["/run/user/1000/100%%/sandboxd.sock"]
    assert (values(text, "SocketMode"), values(text, "DirectoryMode")) == (["0600"], ["0700"])
    assert values(text, "RemoveOnStop") == ["yes"]


def test_a_stop_ends_the_daemon_and_nothing_else() -> None:
    """Keepers of output and monitors of containers may be in its control group."""
    text = units.service_unit(COMMAND, {})
    assert values(text, "KillMode") == ["process"]
    assert values(text, "Type") == ["notify"]
    assert values(text, "ExecStart") == ['"/opt/with blank/python" "-P" "-m" "sandboxd.daemon"']


def test_odd_characters_are_written_so_that_they_are_read_back() -> None:
    text = units.service_unit(["/bin/a$b%c", ODD], {"SANDBOXD_X": ODD})
    assert values(text, "ExecStart") == ['"/bin/a$$b%%c" "100%% \\"sure\\" of $$HOME, \\\\ and a\\nline"']
    assert values(text, "Environment") == ['"SANDBOXD_X=100%% \\"sure\\" of $HOME, \\\\ and a\\nline"']


def test_what_the_daemon_goes_by_is_handed_on_and_nothing_else() -> None:
    env = {
        "SANDBOXD_DEFAULTS_MEMORY": "1g",
        "DOCKER_HOST": "unix:///x",
        "SECRET": "s",
        "INVOCATION_ID": "1",
        "A": "b",
    }
    kept = units.handed_on({**env, "SANDBOXD_SOCKET": "/s"})
    assert kept == {"SANDBOXD_DEFAULTS_MEMORY": "1g", "DOCKER_HOST": "unix:///x"}
