"""What a family of handlers gives to the dispatcher."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from sandboxd.connection import Context

Handler = Callable[[Any, Context], Awaitable[msgspec.Struct]]
"""Request struct and its context in, reply struct out."""
