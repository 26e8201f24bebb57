"""The settings in force: read from the user's file and the environment, read again on request, and followed."""

from __future__ import annotations

import logging
import os
import pwd
from collections.abc import Callable, Mapping, Sequence

from sandboxd import logs, reloading
from sandboxd.config import Config, load_config
from sandboxd.failures import Failure
from sandboxd.protocol import ConfigEntry, DaemonReloaded
from sandboxd.supervision import Supervision

logger = logging.getLogger(__name__)


class Settings:
    """The settings in force, and who goes by them."""

    def __init__(
        self,
        env: Mapping[str, str],
        config: Config,
        entries: Sequence[ConfigEntry],
        followers: Sequence[Callable[[Config], None]],
        supervision: Supervision,
    ) -> None:
        self._env = env
        self._config = config
        self.entries = entries
        self._followers = followers
        self._supervision = supervision

    def reload(self) -> DaemonReloaded:
        """Read them again.

        Raises:
            Failure: they are no settings; those before stay in force.
        """
        with self._supervision.reloading():
            found = reloading.plan(self._config, self.entries, *load_settings(self._env))
            self._config, self.entries = found.config, found.entries
            logs.set_level(found.config.daemon.log_level)
            for follow in self._followers:
                follow(found.config)
        logger.info("read settings again: changed: %s", ", ".join(found.changed) or "none")
        if found.waiting:
            logger.warning("changed settings that wait for a restart: %s", ", ".join(found.waiting))
        return DaemonReloaded(changed=list(found.changed), waiting=list(found.waiting))


def load_settings(env: Mapping[str, str]) -> tuple[Config, list[ConfigEntry]]:
    """The settings as they are written down now, and where each comes from.

    Raises:
        Failure: they cannot be read, or are none.
    """
    path = env.get("SANDBOXD_CONFIG") or os.path.join(
        env.get("XDG_CONFIG_HOME") or os.path.join(home_dir(env), ".config"), "sandboxd", "config.toml"
    )
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        text = ""
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"cannot read {path}", detail=str(error)) from None
    return load_config(text, origin=path, env=env)


def home_dir(env: Mapping[str, str]) -> str:
    """Of whoever the daemon works for."""
    return env.get("HOME") or pwd.getpwuid(os.geteuid()).pw_dir
