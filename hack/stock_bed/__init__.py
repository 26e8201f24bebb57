"""Test beds that are what users have: Debian with systemd, rootless Podman and, in the machine, control groups v2."""
