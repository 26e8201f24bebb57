"""A command line that is wrong is told what was meant."""

import subprocess

import pytest

from tests.daemon.sandboxctl import CTL, PATIENCE_S


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("daemon stopx", "did you mean stop?"),
        ("create --engine dokker", "did you mean docker?"),
        ("image ls", "did you mean list?"),
        ("pool ls", "did you mean list?"),
        ("service ls", "did you mean list?"),
        ("secret ls", "did you mean list?"),
        ("session list", "did you mean ls?"),
        ("create box", "--name box"),
        ("pool warm small two", "sandboxctl pool warm --help"),
        ("pool drain 2", "sandboxctl pool drain --help"),
        ("pool resize 2 4 8", "sandboxctl pool resize --help"),
        ("pool resize small 2 --min 1", "sandboxctl pool resize --help"),
        ("pool drain small --template big", "sandboxctl pool drain --help"),
        ("run --read-only true", "did you mean --ro?"),
        ("run --readonly true", "did you mean --ro?"),
        ("run -v a:b true", "did you mean --mount SRC:DST[:ro]?"),
        ("run -p 80:80 true", "sandboxctl forward SANDBOX [HOST_PORT:]PORT"),
        ("network box --full", "did you mean --mode full?"),
        ("network box --network full", "did you mean --mode?"),
        ("create --mode full", "did you mean --network?"),
        ("workspace nothing-like-it", "sandboxctl workspace --help"),
    ],
)
def test_a_slip_is_told_what_was_meant(line: str, hint: str) -> None:
    """The habits of other programs are the commonest slips; what helps with none is the list of what there is."""
    done = subprocess.run([*CTL, *line.split()], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == f"hint: {hint}"


def test_what_may_be_left_out_is_not_called_missing() -> None:
    """A diff of everything is the usual one."""
    done = subprocess.run(
        [*CTL, "workspace", "diff"], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.stderr.splitlines()[0] == "sandboxctl: the following arguments are required: SANDBOX"
