# shellcheck shell=bash
# What the scripts here know of a host: its distribution, its packages, its root, its Docker daemon. Sourced, not run.
#
# Whoever sources it sets: YES (1: never ask), DRY_RUN (1: print commands that change the machine, run none).

YES=${YES:-0}
DRY_RUN=${DRY_RUN:-0}
OS_RELEASE=${OS_RELEASE:-/etc/os-release}
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

say() { printf '==> %s\n' "$*" >&2; }
warn() { printf 'warning: %s\n' "$*" >&2; }
die() { # die EXIT_CODE BRIEF [WHAT_TO_TYPE]
    printf 'error: %s\n' "$2" >&2
    [[ -z ${3-} ]] || printf '  type: %s\n' "$3" >&2
    exit "$1"
}
have() { command -v "$1" >/dev/null 2>&1; }
is_root() { [[ $(id -u) == 0 ]]; }

# The first Python on PATH that is new enough and can make virtual environments; a pyenv's may hide the system's.
find_python() {
    local candidate
    while read -r candidate; do
        if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done < <(type -ap python3 python3.13 python3.12 python3.11)
    return 1
}

# debian, fedora, arch or other.
distribution() {
    local id='' like='' name
    if [[ -r $OS_RELEASE ]]; then
        # shellcheck disable=SC1090  # a file of assignments
        id=$(. "$OS_RELEASE" && printf '%s' "${ID-}")
        # shellcheck disable=SC1090
        like=$(. "$OS_RELEASE" && printf '%s' "${ID_LIKE-}")
    fi
    for name in $id $like; do
        case $name in
            debian | ubuntu) echo debian && return ;;
            fedora | rhel | centos) echo fedora && return ;;
            arch) echo arch && return ;;
        esac
    done
    echo other
}

# packages_for CAPABILITY DISTRIBUTION: the names that provide it.
packages_for() {
    case $1:$2 in
        podman:debian) echo podman runc crun conmon uidmap slirp4netns fuse-overlayfs netavark aardvark-dns catatonit ;;
        podman:fedora) echo podman ;;
        podman:arch) echo podman ;;
        docker:debian) echo docker.io iptables ;;
        docker:fedora) echo moby-engine ;;
        docker:arch) echo docker ;;
        compiler:debian) echo gcc libc6-dev ;;
        compiler:fedora) echo gcc glibc-static ;;
        compiler:arch) echo gcc ;;
        python:debian) echo python3 python3-venv ;;
        python:fedora) echo python3 ;;
        python:arch) echo python ;;
        busybox:debian) echo busybox-static ;;
        busybox:fedora | busybox:arch) echo busybox ;;
        disk:debian) echo e2fsprogs ;;
        bootstrap:debian) echo mmdebstrap ;;
        bootstrap:fedora) ;;
        bootstrap:arch) echo arch-install-scripts ;;
        *) return 1 ;;
    esac
}

install_command() { # install_command DISTRIBUTION PACKAGE...
    local distribution=$1
    shift
    case $distribution in
        debian) echo apt-get install -y --no-install-recommends "$@" ;;
        fedora) echo dnf install -y "$@" ;;
        arch) echo pacman -S --needed --noconfirm "$@" ;;
        *) return 1 ;;
    esac
}

# Those of the Debian packages that the archive has and the host lacks; older releases lack a few.
debian_missing() {
    local package
    for package in "$@"; do
        if [[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) == installed ]]; then
            continue
        elif [[ -n $(apt-cache search --names-only "^${package//./\\.}\$" 2>/dev/null) ]]; then
            echo "$package"
        else
            warn "$package is not in this release's archive, going on without it"
        fi
    done
}

# Asks once before the first use of sudo.
SUDO_AGREED=0
as_root() {
    if ((DRY_RUN)); then
        if is_root; then echo "would run: $*"; else echo "would run: sudo $*"; fi
        return
    fi
    if is_root; then
        "$@"
        return
    fi
    have sudo || die 4 "this needs root, and there is no sudo" "su -c '$*'"
    if ((!YES && !SUDO_AGREED)); then
        [[ -t 0 ]] || die 4 "this needs root, and there is no terminal to ask on" "sudo $*   (or give --yes)"
        local answer
        read -r -p "run with sudo: $* ? [y/N] " answer
        [[ $answer == [yY]* ]] || die 4 "not without root" "sudo $*"
        SUDO_AGREED=1
    fi
    sudo -- "$@"
}

# install_packages DISTRIBUTION PACKAGE...
install_packages() {
    local distribution=$1
    shift
    (($#)) || return 0
    local command
    command=$(install_command "$distribution" "$@") || die 4 "cannot install packages on this distribution: $*"
    say "installing: $*"
    # shellcheck disable=SC2086  # package names are words
    as_root env DEBIAN_FRONTEND=noninteractive timeout --foreground 900 $command ||
        die 1 "cannot install the packages" "sudo $command"
}

has_systemd() { [[ -d /run/systemd/system ]]; }
docker_answers() { timeout 20 docker info >/dev/null 2>&1; }

# Starts Docker's daemon where none answers. A running one is left alone.
start_docker() {
    docker_answers && return
    if ((DRY_RUN)); then
        echo "would run: start Docker's daemon"
        return
    fi
    if has_systemd; then
        say "starting docker.service"
        as_root timeout 90 systemctl start docker.service ||
            die 3 "cannot start docker.service" "journalctl -u docker.service"
    else
        docker_by_hand || docker_by_hand --iptables=false --ip6tables=false --bridge=none
    fi
    docker_answers || die 3 "Docker's daemon does not answer this user" "docker info"
}

# Where nothing supervises: a dockerd of its own session, with a log that root alone may read.
docker_by_hand() {
    have dockerd || die 3 "there is a docker client and no dockerd" "hack/engines"
    local folder=/run/sandboxd-hack waited
    say "starting dockerd${*:+ $*} (log: $folder/dockerd.log)"
    # shellcheck disable=SC2016  # expands in the inner shell
    as_root sh -c 'mkdir -p -m 700 "$0" && cd / && exec setsid dockerd "$@" </dev/null >"$0/dockerd.log" 2>&1 &' "$folder" "$@"
    for ((waited = 0; waited < 30; waited++)); do
        docker_answers && return
        sleep 1
    done
    as_root tail -n 15 "$folder/dockerd.log" >&2
    warn "dockerd does not answer"
    return 1
}
