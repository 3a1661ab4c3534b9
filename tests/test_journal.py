"""The journal of answers: what was put in comes out, after cuts at any byte, and belongs to one target and process."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_resume_kill import SERVER

from maodun.core.errors import StoreError
from maodun.zoo.foreign.journal import Journal

OWNER = "ab" * 32


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def fill(path: Path, n: int = 5) -> None:
    journal = Journal(path, OWNER)
    for number in range(n):
        journal.note_request(number, None)
        journal.put(key(number), np.full(3, number + 0.5, dtype=np.float32))
    journal.close()


def test_what_was_kept_is_there_in_the_next_life(tmp_path):
    fill(tmp_path / "a.bin")
    journal = Journal(tmp_path / "a.bin", OWNER)
    assert [journal.get(key(number)).tolist() for number in range(5)] == [[n + 0.5] * 3 for n in range(5)]
    assert (journal.requests, journal.images, len(journal), journal.width) == (5, 10, 5, 3)
    assert key(7) not in journal


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 400), noise=st.binary(max_size=30))
def test_a_tail_cut_at_any_byte_costs_only_itself(tmp_path_factory, cut, noise):
    path = tmp_path_factory.mktemp("journal") / "a.bin"
    fill(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:cut] if cut < len(whole) else whole + noise)
    if 0 < cut < 82:
        # Less than a header is no journal yet; nothing of value can have been in it.
        assert len(Journal(path, OWNER)) == 0
        return
    journal = Journal(path, OWNER)
    kept = len(journal)
    assert all(journal.get(key(number)).tolist() == [number + 0.5] * 3 for number in range(kept))
    journal.put(key(99), np.arange(3, dtype=np.float32))
    journal.close()
    again = Journal(path, OWNER)
    assert len(again) == kept + 1
    assert again.get(key(99)).tolist() == [0.0, 1.0, 2.0]


def test_the_first_answer_stays(tmp_path):
    journal = Journal(None, OWNER)
    journal.put(key(1), np.zeros(2, dtype=np.float32))
    journal.put(key(1), np.ones(2, dtype=np.float32))
    assert journal.get(key(1)).tolist() == [0.0, 0.0]


def test_nothing_is_noted_beyond_the_most():
    journal = Journal(None, OWNER)
    assert journal.note_request(3, 5)
    assert not journal.note_request(3, 5)
    assert (journal.requests, journal.images) == (1, 3)


def test_another_target_is_refused(tmp_path):
    fill(tmp_path / "a.bin")
    with pytest.raises(StoreError, match="another target"):
        Journal(tmp_path / "a.bin", "cd" * 32)


def intrude(path: Path) -> None:
    try:
        Journal(path, OWNER)
    except StoreError as error:
        sys.exit(7 if "is in use by another process" in str(error) else 1)


def test_one_process_shares_a_journal_and_another_is_refused(tmp_path):
    path = tmp_path / "a.bin"
    one, two = Journal.at(path, OWNER), Journal.at(path, OWNER)
    assert one is two
    other = SERVER.Process(target=intrude, args=(path,))
    other.start()
    other.join(60)
    assert other.exitcode == 7


def test_a_journal_whose_file_is_gone_is_not_shared(tmp_path):
    path = tmp_path / "a.bin"
    one = Journal.at(path, OWNER)
    path.unlink()
    assert Journal.at(path, OWNER) is not one


def test_a_full_disk_is_one_line(tmp_path):
    with pytest.raises(StoreError, match="cannot be written"):
        Journal(Path("/dev/null/a.bin"), OWNER)


def test_answers_move_over_with_their_bill(tmp_path):
    old, new = Journal(None, OWNER), Journal(tmp_path / "a.bin", OWNER)
    old.note_request(2, None)
    old.note_request(3, None)
    old.put(key(1), np.ones(2, dtype=np.float32))
    new.adopt(old)
    assert (new.requests, new.images, len(new)) == (2, 5, 1)
