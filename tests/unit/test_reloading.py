"""What is taken over of settings that were changed while the daemon runs, and what waits."""

from __future__ import annotations

from sandboxd.config import load_config
from sandboxd.reloading import FIXED, FOLLOWED, FOLLOWED_KEYS, Reload, plan

BEFORE = """
[defaults]
memory = "1g"
[templates.small]
memory = "64m"
env = { A = "1" }
[templates.gone]
memory = "64m"
[services.web]
port = 80
address = "127.0.0.1:8080"
"""


def reloaded(before: str, after: str) -> Reload:
    old = load_config(before, origin="before.toml", env={})
    new = load_config(after, origin="after.toml", env={})
    return plan(*old, *new)


def test_the_same_settings_change_nothing() -> None:
    found = reloaded(BEFORE, BEFORE.replace('"1g"', '"1g"  # as ever'))
    assert (found.changed, found.waiting) == ([], [])
    assert found.config == load_config(BEFORE, origin="", env={})[0]


def test_defaults_and_templates_change_at_once() -> None:
    after = BEFORE.replace('"1g"', '"2g"').replace('A = "1"', 'A = "2"') + '[templates.new]\nmemory = "32m"\n'
    found = reloaded(BEFORE, after)
    assert found.changed == ["defaults.memory", "templates.small", "templates.new"]
    assert found.waiting == []
    assert found.config.defaults.memory == "2g"
    assert found.config.templates["small"].env == {"A": "2"}
    shown = {entry.key: (entry.value, entry.origin) for entry in found.entries}
    assert shown["defaults.memory"] == ("2g", "after.toml")
    assert shown["templates.new.memory"] == ("32m", "after.toml")


def test_what_is_built_into_something_waits_and_is_shown_as_it_is_in_force() -> None:
    """A page that said otherwise would be believed."""
    after = BEFORE.replace("port = 80\n", "port = 81\n") + "[daemon]\nengine_calls_max = 7\n[chroma]\nport = 9000\n"
    found = reloaded(BEFORE, after)
    assert found.changed == []
    assert sorted(found.waiting) == ["chroma.port", "daemon.engine_calls_max", "services.web"]
    assert found.config == load_config(BEFORE, origin="", env={})[0]
    shown = {entry.key: entry.value for entry in found.entries}
    assert (shown["daemon.engine_calls_max"], shown["chroma.port"]) == ("3", "8000")
    assert (
        shown["services.web"]
        == {entry.key: entry.value for entry in load_config(BEFORE, origin="", env={})[1]}["services.web"]
    )


def test_a_template_that_is_gone_stays_with_its_slots_until_a_restart() -> None:
    """Its sandboxes are somebody's, and its pool is asked what it should hold."""
    found = reloaded(BEFORE, BEFORE.replace('[templates.gone]\nmemory = "64m"\n', ""))
    assert found.waiting == ["templates.gone"]
    assert found.config.templates["gone"].memory == "64m"
    assert "templates.gone.memory" in {entry.key for entry in found.entries}


def test_what_is_said_to_be_fixed_exists() -> None:
    """A key that was renamed would change at once, and in part."""
    config, entries = load_config("", origin="", env={})
    assert {entry.key for entry in entries} >= FIXED | FOLLOWED_KEYS
    assert set(config.__struct_fields__) >= FOLLOWED
