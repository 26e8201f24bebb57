"""``exec`` without argparse means what it means with it."""

import contextlib
import io

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sandboxd.cli.commands import VERBS
from sandboxd.cli.shortcut import exec_arguments, without_dashes
from sandboxd.cli.verb import Parser

FLAGS = ["-i", "-t", "-d", "--interactive", "--tty", "--detach", "--json", "-it", "-ti", "-itd", "-ii"]
NEARLY = [
    "-",
    "--",
    "-h",
    "--help",
    "-ith",
    "-x",
    "-tx",
    "-1",
    "-1 2",
    "--inter",
    "--tty=yes",
    "-i=1",
    "--json=",
    "-e=A",
]
TAKING = ["-e", "--env", "-w", "--cwd", "--timeout", "--user", "--env-file"]
VALUES = [
    "A=b",
    "-d",
    "A",
    "A=b=c",
    "=b",
    "=",
    "",
    "A=",
    "/usr",
    "90s",
    "1000",
    "-1",
    "A=-t",
    "a b",
    "-a b",
    "A=ü\udcff",
]
BOXES = ["box", "sb-8j49ys8ve9", "a b", "", "@box", "+box"]

words = st.one_of(
    st.sampled_from(FLAGS).map(lambda flag: [flag]),
    st.sampled_from(NEARLY).map(lambda word: [word]),
    st.tuples(st.sampled_from(TAKING), st.sampled_from(VALUES)).map(list),
    st.builds(lambda flag, value: [f"{flag}={value}"], st.sampled_from(TAKING), st.sampled_from(VALUES)),
    st.builds(lambda flag, value: [f"{flag}{value}"], st.sampled_from(["-e", "-w", "-i"]), st.sampled_from(VALUES)),
    st.sampled_from(BOXES).map(lambda box: [box]),
    st.text(max_size=4).map(lambda text: [text]),
)
anything = st.lists(words, max_size=7).map(lambda parts: [word for part in parts for word in part])
flag = st.one_of(
    st.sampled_from(FLAGS).map(lambda flag: [flag]),
    st.tuples(st.sampled_from(TAKING[:-1]), st.sampled_from(VALUES)).map(list),
)
likely = st.builds(
    lambda flags, command: [*(word for part in flags for word in part), "box", *command],
    *(st.lists(flag, max_size=3), anything),
)


def by_argparse(line: list[str]) -> dict[str, object] | None:
    """What argparse makes of it, or None if it refuses or explains."""
    parser = Parser(prog="sandboxctl exec")
    VERBS["exec"].add_arguments(parser)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            arguments = vars(parser.parse_args(line))
        except SystemExit:
            return None
    return arguments | {"command": without_dashes(arguments["command"])}


@settings(max_examples=500, deadline=None)
@given(anything | likely)
@example(["-e", "A=b", "box", "--", "cmd", "--", "-i", "--json"])
@example(["box", "--", "--", "cmd"])
@example(["-e", "-d", "box", "cmd"])
@example(["--", "box", "cmd"])
@example(["box", "--"])
@example(["box", "cmd", "--help"])
@example(["box", "cmd", "--", "--"])
@example(["-e", "A=b", "-e", "C", "--env=D=", "-w", "/", "box", "cmd", "-e", "E"])
def test_what_is_taken_means_the_same_to_argparse(line: list[str]) -> None:
    """Else a command line would mean one thing in the common form and another with one more flag."""
    taken = exec_arguments(line)
    if taken is not None:
        assert vars(taken) == by_argparse(line)


@pytest.mark.parametrize(
    "line",
    [
        "box true",
        "-i box cat -",
        "-it box sh",
        "-t box sh -c 'exit 3'",
        "-d box sleep 60",
        "--detach --json box sleep 60",
        "-e A=b --env C --env=D=e box env",
        "-w /usr box pwd",
        "--cwd=/usr box pwd",
        "--timeout 90s --user 1000 box id",
        "box -- ls --help",
    ],
)
def test_the_everyday_forms_are_taken(line: str) -> None:
    """A parser that declines everything would be right, and slow."""
    assert exec_arguments(line.split()) is not None


@pytest.mark.parametrize(
    "line",
    ["", "box", "--help", "-h box true", "--env-file f box true", "-e box", "-e =b box true", "--no-such box true"],
)
def test_what_needs_words_is_declined(line: str) -> None:
    """Argparse explains and refuses."""
    assert exec_arguments(line.split()) is None
