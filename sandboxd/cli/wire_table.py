"""Fields and defaults of requests, and exit codes. Made by: python -m sandboxd.openrpc --wire-table."""

from __future__ import annotations

PARAMS: dict[str, str] = {
    "sandbox/create": "SandboxCreateParams",
    "sandbox/get": "SandboxParams",
    "sandbox/list": "SandboxListParams",
    "sandbox/update": "SandboxUpdateParams",
    "sandbox/stop": "SandboxStopParams",
    "sandbox/start": "SandboxParams",
    "sandbox/kill": "SandboxParams",
    "sandbox/metrics": "SandboxMetricsParams",
    "sandbox/verify": "SandboxVerifyParams",
    "commands/run": "CommandParams",
    "commands/start": "CommandParams",
    "commands/wait": "CommandRef",
    "commands/signal": "CommandSignalParams",
    "commands/kill": "CommandRef",
    "commands/connect": "CommandConnectParams",
    "commands/logs": "CommandLogsParams",
    "commands/send_stdin": "CommandInputParams",
    "commands/close_stdin": "CommandRef",
    "commands/resize": "CommandResizeParams",
    "commands/list": "CommandListParams",
    "image/list": "ImageListParams",
    "image/build": "ImageBuildParams",
    "daemon/info": "NoParams",
    "daemon/doctor": "NoParams",
    "daemon/config": "NoParams",
    "daemon/shutdown": "NoParams",
}

REQUIRED = object()

FIELDS: dict[str, dict[str, object]] = {
    "CommandConnectParams": {
        "sandbox": REQUIRED,
        "command_id": REQUIRED,
        "stdout_offset": 0,
        "stderr_offset": 0,
    },
    "CommandInputParams": {
        "sandbox": REQUIRED,
        "command_id": REQUIRED,
        "data": REQUIRED,
    },
    "CommandListParams": {
        "sandbox": REQUIRED,
    },
    "CommandLogsParams": {
        "sandbox": REQUIRED,
        "command_id": REQUIRED,
        "stream": "stdout",
        "offset": None,
        "length": 65536,
    },
    "CommandParams": {
        "sandbox": REQUIRED,
        "argv": REQUIRED,
        "env": {},
        "cwd": None,
        "user": None,
        "stdio": "null",
        "stdin": "null",
        "merge_stderr": False,
        "follow": False,
        "pty": None,
        "timeout": None,
        "grace": 2,
        "on_disconnect": "kill",
    },
    "CommandRef": {
        "sandbox": REQUIRED,
        "command_id": REQUIRED,
    },
    "CommandResizeParams": {
        "sandbox": REQUIRED,
        "command_id": REQUIRED,
        "size": REQUIRED,
    },
    "CommandSignalParams": {
        "sandbox": REQUIRED,
        "command_id": REQUIRED,
        "signal": REQUIRED,
        "scope": "group",
    },
    "ImageBuildParams": {
        "engine": None,
        "source": "auto",
        "reference": None,
        "force": False,
    },
    "ImageListParams": {
        "engine": None,
    },
    "LimitsParams": {
        "memory": None,
        "cpus": None,
        "pids": None,
        "cpuset": None,
        "shm": None,
        "tmp": None,
        "nofile": None,
    },
    "NoParams": {},
    "PtySize": {
        "rows": REQUIRED,
        "cols": REQUIRED,
    },
    "SandboxCreateParams": {
        "name": None,
        "engine": None,
        "image": None,
        "workspace": None,
        "limits": {},
        "limits_policy": None,
        "env": {},
        "network": None,
        "metadata": {},
        "ephemeral": False,
    },
    "SandboxListParams": {
        "metadata": {},
    },
    "SandboxMetricsParams": {
        "sandboxes": [],
    },
    "SandboxParams": {
        "sandbox": REQUIRED,
    },
    "SandboxStopParams": {
        "sandbox": REQUIRED,
        "grace": 2,
    },
    "SandboxUpdateParams": {
        "sandbox": REQUIRED,
        "limits": REQUIRED,
        "limits_policy": None,
    },
    "SandboxVerifyParams": {
        "sandbox": REQUIRED,
        "provoke": False,
    },
    "WorkspaceParams": {
        "path": REQUIRED,
        "mode": "rw",
    },
}

EXIT_CODES: dict[str, int] = {
    "internal": 1,
    "invalid_argument": 2,
    "not_found": 5,
    "conflict": 1,
    "timeout": 1,
    "limit_not_enforceable": 4,
    "capacity_exceeded": 1,
    "sandbox_gone": 5,
    "engine_unavailable": 3,
    "unauthorized": 1,
    "unsupported": 4,
    "engine_refused": 1,
    "prerequisite_missing": 4,
    "command_not_started": 1,
}
