"""Settings and their origins."""

from __future__ import annotations

import pytest

from sandboxd.config import Config, load_config
from sandboxd.failures import InvalidArgument


def test_without_a_file_everything_is_default() -> None:
    """A fresh machine has no configuration."""
    config, entries = load_config("", origin="config.toml", env={})
    assert config == Config()
    assert {entry.origin for entry in entries} == {"default"}
    assert all(entry.description for entry in entries)


def test_the_environment_comes_before_the_file() -> None:
    """What is nearest to the caller counts, and the origin says which it was."""
    config, entries = load_config(
        '[defaults]\nmemory = "1g"\npids = 99\n', origin="config.toml", env={"SANDBOXD_DEFAULTS_MEMORY": "3g"}
    )
    assert config.defaults.memory == "3g"
    assert config.defaults.pids == 99
    origins = {entry.key: entry.origin for entry in entries}
    assert origins["defaults.memory"] == "SANDBOXD_DEFAULTS_MEMORY"
    assert origins["defaults.pids"] == "config.toml"
    assert origins["defaults.cpus"] == "default"


@pytest.mark.parametrize(
    "text",
    [
        "[defaults]\nmemroy = '1g'\n",
        "[default]\n",
        "defaults = 3\n",
        "[defaults]\nnetwork = 'some'\n",
        "= 3",
        "[daemon]\nsandboxes_max = 0\n",
    ],
)
def test_nonsense_is_refused_with_the_place(text: str) -> None:
    """A misspelt key must not silently be no setting."""
    with pytest.raises(InvalidArgument, match=r"config\.toml"):
        load_config(text, origin="config.toml", env={})


def test_numbers_and_lists_come_out_of_variables() -> None:
    """A variable is text, a setting has a type."""
    config, _ = load_config(
        "", origin="x", env={"SANDBOXD_DEFAULTS_PIDS": "77", "SANDBOXD_PATHS_ALLOW": "/srv/a:/srv/b"}
    )
    assert config.defaults.pids == 77
    assert config.paths.allow == ["/srv/a", "/srv/b"]
