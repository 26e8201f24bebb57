"""Settings and their origins."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxd.config import _SETTINGS, Config, load_config
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
        "[templates.t]\nallow = ['not a host!']\n",
        "[services.s]\nport = 1\nimage = 'i'\n",
        "[services.s]\nport = 1\nimage = 'i'\ncommand = ['c']\naddress = '127.0.0.1:1'\n",
        "[services.s]\nport = 1\ncommand = ['c']\nsecrets = ['token']\n",
        "[services.s]\nport = 1\ncommand = ['c']\nnetwork = 'full'\n",
        "[services.s]\nport = 1\nimage = 'i'\ncommand = ['c']\nnetwork = 'host'\n",
        "[services.s]\nport = 1\naddress = '127.0.0.1:1'\nnetwork = 'host'\n",
        "[services.s]\nport = 1\ncommand = ['c']\ndata = '/srv/data'\n",
        "[services.s]\nport = 1\nimage = 'i'\ncommand = ['c']\ndata = 'relative'\n",
        "[services.s]\nport = 1\nimage = 'i'\ncommand = ['c']\ncpus = 'many'\n",
        "[templates.t]\ninject = ['api.example.com X: no secret']\n",
        "[templates.t]\nnetwork = 'full'\nallow = ['pypi']\n",
    ],
)
def test_nonsense_is_refused_with_the_place(text: str) -> None:
    """A misspelt key must not silently be no setting."""
    with pytest.raises(InvalidArgument, match=r"config\.toml"):
        load_config(text, origin="config.toml", env={})


BAD = [
    ("pids", "-3"),
    ("pids", "7"),
    ("pids", "many"),
    ("nofile", "0"),
    ("memory", "banana"),
    ("memory", "1k"),
    ("memory", ""),
    ("cpus", "0"),
    ("cpus", "two"),
    ("image", "-v"),
    ("image", ""),
    ("shm", "1"),
    ("tmp", "-1m"),
    ("output", "x"),
    ("engine", "lxc"),
    ("network", "some"),
    ("limits_policy", "lax"),
]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_a_default_that_no_sandbox_could_have_is_refused_at_once(key: str, value: str) -> None:
    """Else the daemon starts, and each create fails later without a word of the setting."""
    variable = f"SANDBOXD_DEFAULTS_{key.upper()}"
    with pytest.raises(InvalidArgument) as refusal:
        load_config("", origin="config.toml", env={variable: value})
    assert f"defaults.{key} in {variable}" in refusal.value.brief
    assert refusal.value.detail
    assert refusal.value.hint == f"unset {variable}"
    with pytest.raises(InvalidArgument) as refusal:
        load_config(f"[defaults]\n{key} = '{value}'\n", origin="/my files/config.toml", env={})
    assert f"defaults.{key} in /my files/config.toml" in refusal.value.brief
    assert refusal.value.hint == "${EDITOR:-vi} '/my files/config.toml'"


def test_the_place_at_fault_is_named_although_the_other_sets_more() -> None:
    """A variable comes before the file, so the file's value does not matter, right or wrong."""
    text = "[defaults]\nmemory = 'banana'\ncpus = '1'\n"
    config, _ = load_config(text, origin="config.toml", env={"SANDBOXD_DEFAULTS_MEMORY": "1g"})
    assert config.defaults.memory == "1g"
    with pytest.raises(InvalidArgument, match=r"defaults\.memory in config\.toml"):
        load_config(text, origin="config.toml", env={"SANDBOXD_DEFAULTS_CPUS": "1"})


@pytest.mark.parametrize("path", ["x", "./x", "~/x", "~"])
def test_a_relative_path_allows_nothing(path: str) -> None:
    """Relative to what? The daemon's own directory is nobody's business."""
    with pytest.raises(InvalidArgument, match=r"paths\.allow in SANDBOXD_PATHS_ALLOW: .*absolute"):
        load_config("", origin="config.toml", env={"SANDBOXD_PATHS_ALLOW": f"/srv/a:{path}"})
    with pytest.raises(InvalidArgument, match=r"paths\.allow in config\.toml"):
        load_config(f"[paths]\nallow = ['{path}']\n", origin="config.toml", env={})


@pytest.mark.parametrize("variable", ["SANDBOXD_DEFAULTS_MEMROY", "SANDBOXD_PATHS_REFUSE", "SANDBOXD_DAEMON_"])
def test_a_misspelt_variable_is_refused(variable: str) -> None:
    """As a misspelt key of the file is."""
    with pytest.raises(InvalidArgument, match=f"cannot use the variable {variable}: there is no such setting"):
        load_config("", origin="config.toml", env={variable: "1g"})


def test_variables_that_are_no_settings_are_left_alone() -> None:
    """They say where things are, and belong to the rooms that read them."""
    names = ["SANDBOXD_SOCKET", "SANDBOXD_STATE_DIR", "SANDBOXD_CONFIG", "DEFAULTS_MEMORY", "HOME"]
    config, _ = load_config("", origin="config.toml", env=dict.fromkeys(names, "/x"))
    assert config == Config()


def test_the_defaults_pass_their_own_checks() -> None:
    """They are not converted, so nothing else would notice."""
    _, entries = load_config("", origin="config.toml", env={})
    variables = {f"SANDBOXD_{entry.key.replace('.', '_').upper()}": entry.value for entry in entries}
    config, _ = load_config("", origin="config.toml", env=variables)
    assert config == Config()


def test_numbers_and_lists_come_out_of_variables() -> None:
    """A variable is text, a setting has a type."""
    config, _ = load_config(
        "", origin="x", env={"SANDBOXD_DEFAULTS_PIDS": "77", "SANDBOXD_PATHS_ALLOW": "/srv/a:/srv/b"}
    )
    assert config.defaults.pids == 77
    assert config.paths.allow == ["/srv/a", "/srv/b"]


WORDS = st.sampled_from(
    [
        "64m",
        "0",
        "-1",
        "none",
        "auto",
        "docker",
        "banana",
        "10m",
        "1e9",
        "0-1",
        "",
        "/",
        "~",
        "x" * 300,
        "127.0.0.1:80",
    ]
)
VALUES = st.one_of(
    WORDS.map(json.dumps),
    st.text(max_size=10).map(json.dumps),
    st.sampled_from(
        ["0", "1", "-5", "99999999999999999999", "1.5", "nan", "true", "[]", '["a", 1]', "{}", "1979-05-27", "'"]
    ),
)
SECTIONS = st.sampled_from(
    [
        *dict.fromkeys(section for section, _ in _SETTINGS),
        "templates.mine",
        "services.mine",
        "templates",
        "services",
        "x",
    ]
)
KEYS = st.sampled_from(
    [
        *dict.fromkeys(key for _, key in _SETTINGS),
        "pool_min",
        "pool_max",
        "env",
        "command",
        "address",
        "port",
        "health",
        "x",
    ]
)
FILES = st.one_of(
    st.text(max_size=60),
    st.dictionaries(SECTIONS, st.dictionaries(KEYS, VALUES, max_size=3), max_size=3).map(
        lambda sections: "\n".join(
            line
            for section, entries in sections.items()
            for line in (f"[{section}]", *(f"{key} = {value}" for key, value in entries.items()))
        )
    ),
)
VARIABLES = st.dictionaries(
    st.sampled_from([f"SANDBOXD_{section}_{key}".upper() for section, key in _SETTINGS]),
    WORDS | st.text(max_size=10),
    max_size=2,
)


@settings(max_examples=300, deadline=None)
@given(text=FILES, env=VARIABLES)
def test_no_text_and_no_variable_raises_anything_but_a_refusal(text: str, env: dict[str, str]) -> None:
    """A daemon that does not start must say why, in words; and what was accepted must be fit for use."""
    try:
        config, entries = load_config(text, origin="config.toml", env=env)
    except InvalidArgument:
        return
    assert isinstance(config, Config)
    assert entries
