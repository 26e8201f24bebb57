"""What people type for limits: read exactly, or refused in one line that says what may be given."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes import quantities
from runtimes.quantities import QuantityError

HOST_BYTES = 25_276_000_000

NONSENSE = [
    "", " ", "banana", "-3", "+3", "0", "1e99", "nan", "inf", "0x10", "64m ", " 64m", "64m\n", "64 m", "6_4m",
    "\u0666\u0664m", "\uff16\uff14m", ".5g", "5.g", "1..5g", "1,5g", "64mm", "64q", "9" * 5000, "m", "0m", "\x00",
    "64m; reboot",
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("64m", 64 * 1024**2),
        ("64M", 64 * 1024**2),
        ("64mb", 64 * 1024**2),
        ("512MiB", 512 * 1024**2),
        ("1.5g", 3 * 1024**3 // 2),
        ("1GB", 1024**3),
        ("67108864", 64 * 1024**2),
        ("67108864b", 64 * 1024**2),
        ("8192k", 8 * 1024**2),
        ("0.01t", 1024**4 // 100),
        ("23.5g", 47 * 1024**3 // 2),
    ],
)
def test_a_size_means_what_the_engines_mean_by_it(text: str, expected: int) -> None:
    assert quantities.parse_memory(text, bytes_max=HOST_BYTES) == expected


@pytest.mark.parametrize("text", [*NONSENSE, "7m", "1.5", "24g", "99999g", "1024t"])
def test_nonsense_for_memory_is_refused_in_one_printable_line(text: str) -> None:
    with pytest.raises(QuantityError) as caught:
        quantities.parse_memory(text, bytes_max=HOST_BYTES)
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 250
    assert caught.value.text == text


def test_the_message_says_what_may_be_given() -> None:
    with pytest.raises(QuantityError) as caught:
        quantities.parse_memory("banana", bytes_max=HOST_BYTES)
    expected = "cannot use 'banana' for --memory: give a size from 8m to 23.5g, such as 512m or 2g"
    assert str(caught.value) == expected


@given(st.integers(min_value=quantities.MEMORY_BYTES_MIN, max_value=2**45))
def test_the_largest_size_that_a_message_names_can_be_given(host_bytes: int) -> None:
    """A person who types what the message offers must not be refused again."""
    named = quantities.format_bytes_short(host_bytes, round_down=True)
    assert quantities.parse_memory(named, bytes_max=host_bytes, bytes_min=1) <= host_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5", 500),
        ("2", 2000),
        ("500m", 500),
        ("0.01", 10),
        ("10m", 10),
        ("1.250", 1250),
        ("0.125000", 125),
        ("4", 4000),
    ],
)
def test_cpus_are_read_to_the_thousandth(text: str, expected: int) -> None:
    assert quantities.parse_cpus(text, cpu_count=4) == expected


@pytest.mark.parametrize("text", [*NONSENSE, "4.001", "5", "0.001", "0.1234", "1.5m", "9m", "1M", "4001m"])
def test_nonsense_for_cpus_is_refused(text: str) -> None:
    with pytest.raises(QuantityError, match=r"for --cpus: give a number from 0\.01 to 4"):
        quantities.parse_cpus(text, cpu_count=4)


@pytest.mark.parametrize("text", [*NONSENSE, "7", "32769", "8.0", "1e3", "99999999999"])
def test_nonsense_for_pids_is_refused(text: str) -> None:
    with pytest.raises(QuantityError, match="for --pids: give a whole number from 8 to 32768"):
        quantities.parse_pids(text, pid_max=32768)


def test_pids_are_read_between_their_bounds() -> None:
    assert [quantities.parse_pids(text, pid_max=32768) for text in ("8", "0100", "32768")] == [8, 100, 32768]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", (0,)), ("0-2,4", (0, 1, 2, 4)), ("4,0", (0, 4)), ("1-1", (1,)), ("0-4", (0, 1, 2, 3, 4))],
)
def test_cpu_lists_come_out_ascending(text: str, expected: tuple[int, ...]) -> None:
    assert quantities.parse_cpuset(text, cpus_online=range(5)) == expected


@pytest.mark.parametrize(
    "text", ["", "5", "2-1", "0,0", "0-2,1", "-1", "0-", "a", "0,,1", "0 1", "0-99999", "\u0660", "0," * 900]
)
def test_nonsense_for_a_cpu_list_is_refused(text: str) -> None:
    with pytest.raises(QuantityError, match="out of the host's CPUs 0-4, such as 0 or 0-4"):
        quantities.parse_cpuset(text, cpus_online=range(5))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1s", 1000),
        ("500ms", 500),
        ("2m", 120_000),
        ("1h", 3_600_000),
        ("30", 30_000),
        ("1.5h", 5_400_000),
        ("0.5", 500),
    ],
)
def test_durations_are_read_to_the_millisecond(text: str, expected: int) -> None:
    assert quantities.parse_duration_ms(text) == expected


@pytest.mark.parametrize(
    "text", ["", "0", "banana", "-3", "1e9", "nan", "1d", "1S", "1M", "1h30m", "0.5ms", "9999999h", "1 s"]
)
def test_nonsense_for_a_duration_is_refused(text: str) -> None:
    """``1M`` may have been meant as minutes, or as months: it is neither."""
    with pytest.raises(QuantityError, match="for --timeout: give a duration from 1ms to 8784h"):
        quantities.parse_duration_ms(text)


@given(st.text(max_size=80))
def test_no_text_raises_anything_but_a_quantity_error(text: str) -> None:
    for parse in (
        lambda: quantities.parse_memory(text, bytes_max=HOST_BYTES),
        lambda: quantities.parse_cpus(text, cpu_count=4),
        lambda: quantities.parse_pids(text, pid_max=32768),
        lambda: quantities.parse_cpuset(text, cpus_online=(0, 1)),
        lambda: quantities.parse_duration_ms(text),
    ):
        with contextlib.suppress(QuantityError):
            parse()


@given(st.integers(min_value=quantities.MEMORY_BYTES_MIN, max_value=2**50))
def test_an_exact_size_reads_back_as_itself(size: int) -> None:
    assert quantities.parse_memory(quantities.format_bytes_exact(size), bytes_max=2**50) == size


@given(st.integers(min_value=10, max_value=8_000_000))
def test_formatted_cpus_read_back_as_themselves(millis: int) -> None:
    assert quantities.parse_cpus(quantities.format_cpus(millis), cpu_count=8000) == millis


@given(st.sets(st.integers(min_value=0, max_value=600), min_size=1, max_size=60))
def test_a_formatted_cpu_list_reads_back_as_itself(cpus: set[int]) -> None:
    text = quantities.format_cpuset(cpus)
    assert quantities.parse_cpuset(text, cpus_online=range(601)) == tuple(sorted(cpus))


@given(st.integers(min_value=1, max_value=quantities.DURATION_MS_MAX))
def test_a_formatted_duration_reads_back_as_itself(duration_ms: int) -> None:
    assert quantities.parse_duration_ms(quantities.format_duration_ms(duration_ms)) == duration_ms


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"), (512, "512 B"), (1023, "1023 B"), (1024, "1 KiB"), (64 * 1024**2, "64 MiB"),
        (3 * 1024**3 // 2, "1.5 GiB"), (1024**2 - 1, "1 MiB"), (1024**5, "1024 TiB"),
    ],
)  # fmt: skip
def test_sizes_are_shown_with_one_decimal_at_most(size: int, expected: str) -> None:
    assert quantities.format_bytes(size) == expected
