#!/bin/sh
# Run by the Containerfile's build and by images/rootfs.py: makes a distribution's root file system ($1) a sandbox's.
set -eu
root=${1%/}

have() { grep -q "^$1:" "$root/etc/$2"; }
have sandbox passwd || echo 'sandbox:x:1000:1000:sandbox:/home/sandbox:/bin/bash' >>"$root/etc/passwd"
have sandbox group || echo 'sandbox:x:1000:' >>"$root/etc/group"
if [ -f "$root/etc/shadow" ]; then
    have sandbox shadow || echo 'sandbox:!:19000:0:99999:7:::' >>"$root/etc/shadow"
fi
mkdir -p "$root/home/sandbox" "$root/workspace" "$root/tmp" "$root/run"
chown 1000:1000 "$root/home/sandbox" "$root/workspace"
# A tmpfs gets its mode from the directory below it (runc), and root for an owner; the user's uid may be any.
chmod 1777 "$root/tmp" "$root/run" "$root/home/sandbox"

# What the packages' own documentation and the downloads took; licences stay.
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/cache/apt/*.bin "$root"/var/lib/apt/lists/*
rm -rf "$root"/var/cache/dnf "$root"/var/cache/libdnf5 "$root"/var/cache/pacman/pkg/*
rm -rf "$root"/usr/share/man/* "$root"/usr/share/info/* "$root"/usr/share/locale/*
if [ -d "$root/usr/share/doc" ]; then
    find "$root/usr/share/doc" -type f ! -name copyright -delete
fi
find "$root/var/log" -type f -delete 2>/dev/null || true

# Facts of the machine that built it. In a container's build the engine holds these names busy.
if [ -n "$root" ]; then
    rm -f "$root/etc/resolv.conf" "$root/etc/hostname"
    : >"$root/etc/resolv.conf"
    : >"$root/etc/hostname"
fi
