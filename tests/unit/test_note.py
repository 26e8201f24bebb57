"""What a container says of its sandbox: enough to have it again, and nothing that is nobody's business."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd import note
from sandboxd.records import EgressRecord, MountRecord, SandboxRecord, WorkspaceRecord
from tests.unit.records import record


def test_a_note_is_read_as_it_was_written() -> None:
    box = record(
        name="box",
        workspace=WorkspaceRecord(path="/srv/p", read_only=True, mounted="same-uid", path_bytes=b"/srv/\xff"),
        template="python",
        ephemeral=True,
        slot=True,
    )
    read = note.read(note.written(box))
    assert read is not None
    for field in note.Note.__struct_fields__:
        assert getattr(read, field) == getattr(box, field)


def test_nothing_in_a_note_is_a_secret() -> None:
    """Everybody who may use the engine can read it."""
    box = record(
        env={"TOKEN": "canary-1"},
        metadata={"key": "canary-2"},
        secrets=("canary-3",),
        egress=EgressRecord(allow=("canary-4",)),
        state_reason="canary-5",
        warnings=("canary-6",),
    )
    assert "canary" not in note.written(box)
    assert not {"env", "metadata", "secrets", "egress", "forwards", "services"} & set(note.Note.__struct_fields__)
    assert set(note.Note.__struct_fields__) <= set(SandboxRecord.__struct_fields__)


@pytest.mark.parametrize("text", ["", "{}", "[]", "nonsense", '{"image": 1}', "[" * 5000, "\ud800", "x" * 20_000])
def test_what_is_no_note_is_none(text: str) -> None:
    """Whoever may use the engine can write a label as well."""
    assert note.read(text) is None


@given(
    field=st.sampled_from(note.Note.__struct_fields__),
    value=st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=20)
    | st.lists(st.text(max_size=5), max_size=3),
)
def test_a_note_that_somebody_has_changed_is_a_note_or_none(field: str, value: object) -> None:
    """Whatever is believed of it is of the right kind, and can be written down."""
    changed = msgspec.json.decode(note.written(record())) | {field: value}
    read = note.read(msgspec.json.encode(changed).decode())
    assert read is None or msgspec.convert(msgspec.to_builtins(read), note.Note) == read


def test_a_note_that_would_be_too_long_is_left_out() -> None:
    """An engine refuses arguments without end, and a sandbox without a note is better than none."""
    mount = MountRecord(path="/x" * 1000, target="/y", read_only=True, mounted="as-is")
    assert note.written(record(mounts=(mount,) * 100)) == ""
    assert len(msgspec.json.encode(mount)) < note.CHARS_MAX
