"""Known secrets within texts: found whatever they are made of, taken for nothing else, and at little cost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd import secret_digests
from sandboxd.secret_digests import PART_CHARS_MIN, SecretDigests

AWS = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
KEY = "-----BEGIN KEY-----\nabcdefghijklmnop\nqrstuvwxyz012345\n-----END KEY-----"


def knowing(*values: str | bytes) -> SecretDigests:
    digests = SecretDigests(b"k" * 32)
    for number, value in enumerate(values):
        digests.learn(f"s{number}", value.encode() if isinstance(value, str) else value)
    return digests


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How long each text was that was hashed."""
    lengths: list[int] = []
    real = SecretDigests._digest

    def digest(self: SecretDigests, text: str) -> bytes:
        lengths.append(len(text))
        return real(self, text)

    monkeypatch.setattr(SecretDigests, "_digest", digest)
    return lengths


@pytest.mark.parametrize(
    ("secret", "text"),
    [
        ("hunter2hunter2", "sh -c 'echo hunter2hunter2'"),
        ("hunter2hunter2", '{\\"key\\": \\"hunter2hunter2\\"}'),
        ("hunter2hunter2", "hunter2hunter2\\n"),
        (AWS, f"AWS_SECRET_ACCESS_KEY={AWS}"),
        (AWS, f"X={AWS} aws s3 ls"),
        ("abc/defgh+ijkl==", "K=abc/defgh+ijkl=="),
        ("c2VjcmV0dmFsdWU=", "Authorization: Bearer c2VjcmV0dmFsdWU="),
        ("c2VjcmV0dmFsdWU=", "c2VjcmV0dmFsdWU="),
        ("postgres://me:hunter2@db/x?a=b&c=d", "psql postgres://me:hunter2@db/x?a=b&c=d"),
        ("correct horse battery", "psql -W 'correct horse battery'"),
        (KEY + "\n", f"cat <<E\n{KEY}\nE"),
        ("token-of-windows\r\n", "Bearer token-of-windows"),
        ("1/2/3/4/5", "a 1/2/3/4/5 b"),
        (b"\xff\xfe/\x80binary", b"K=\xff\xfe/\x80binary".decode(errors="surrogateescape")),
    ],
)
def test_a_secret_is_found_within_a_text_whatever_marks_it_holds_itself(secret: str | bytes, text: str) -> None:
    assert knowing("another-secret", secret).name_in(text, chars_min=PART_CHARS_MIN) == "s1"


@pytest.mark.parametrize(
    ("secret", "text"),
    [
        ("correct horse battery", "a battery of correct tests for a horse"),
        ("correct horse battery", "correct  horse  battery"),
        ("correct horse battery", "correct"),
        (AWS, "/srv/K7MDENG+bPxRfiCYEXAMPLEKEY"),
        ("https://example.com/token=1", "curl https://example.com/"),
        (KEY, "-----BEGIN KEY-----\n-----END KEY-----"),
        ("user:root", "user:rootless"),
        ("user:group-9", "superuser:group-9"),
    ],
)
def test_the_words_of_a_secret_are_words_still(secret: str, text: str) -> None:
    """Whoever has a sentence for a password wants to use its words."""
    assert knowing(secret).name_in(text, chars_min=1) is None


@pytest.mark.parametrize("text", ["-phunter2hunter2", "user.hunter2hunter2", 'hunter2""hunter2', "hunter2%68unter2"])
def test_what_is_not_found_is_what_the_documents_say(text: str) -> None:
    """A word that only begins or ends with it, and what a program puts together. See docs/SECURITY.md."""
    assert knowing("hunter2hunter2").name_in(text, chars_min=1) is None


@given(
    secret=st.text(st.sampled_from("ab/= \n:+"), min_size=PART_CHARS_MIN).filter(lambda text: text == text.strip()),
    before=st.text(st.sampled_from("ab/= ")),
    after=st.text(st.sampled_from("ab/= ")),
)
def test_it_is_found_between_marks_and_only_where_it_is(secret: str, before: str, after: str) -> None:
    digests = knowing(secret)
    if any(char in "ab+" for char in secret):
        assert digests.name_in(f"{before} {secret} {after}", chars_min=1) == "s0"
    if secret not in before + after:
        assert digests.name_in(before + after, chars_min=1) is None


def test_a_secret_that_is_forgotten_or_changed_is_not_found_any_more() -> None:
    digests = knowing(AWS, KEY)
    digests.learn("s0", b"hunter2hunter2")
    digests.forget("s1")
    digests.forget("s1")
    assert [digests.name_in(f"x {text} x", chars_min=1) for text in (AWS, KEY, "hunter2hunter2")] == [
        None,
        None,
        "s0",
    ]


def test_only_what_is_as_long_as_a_secret_is_hashed(hashed: list[int]) -> None:
    """The daemon's loop stands still meanwhile, and a request may bring megabytes of arguments."""
    digests = knowing(*(f"{number:03d}-a-secret-of-20-chars"[:20] for number in range(256)))
    hashed.clear()
    for _ in range(64):
        assert digests.name_in(" ".join(f"{number:09d}" for number in range(46)), chars_min=8) is None
    assert hashed == []
    assert digests.name_in("000-a-secret-of-20-chars"[:20], chars_min=8) == "s0"
    assert hashed == [20]


def test_a_secret_that_repeats_itself_does_not_make_a_text_that_does_so_expensive(
    monkeypatch: pytest.MonkeyPatch, hashed: list[int]
) -> None:
    """Each of its places would be compared with all of it: 64 KiB, two hundred thousand times."""
    monkeypatch.setattr(secret_digests, "AROUND_CHARS_MAX", 10_000)
    digests = knowing("repeated " * 100 + "end")
    hashed.clear()
    text = "repeated " * 1000
    assert digests.name_in(text, chars_min=8) is None
    assert sum(hashed) <= 10_000 + len(text)
