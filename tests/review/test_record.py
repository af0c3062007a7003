"""The record: durable, append-only, frozen at the first vote, and refusing what it cannot keep safely."""

import itertools
import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from reader_studies import Clock, begin, write_study

from vlmalign.config_yaml import read_yaml, write_yaml
from vlmalign.review import access, audit, database, flow, votes
from vlmalign.review.database import FILE, file_system, open_database
from vlmalign.review.freezing import amend, places, register, versions
from vlmalign.review.outcomes import votes as all_votes
from vlmalign.review.reading import load_study
from vlmalign.review.refusal import Refused

KEYS = (f"key-{number:08}" for number in itertools.count())
JUDGED = {
    "criteria": dict.fromkeys(("clarity", "information", "accuracy", "feasibility"), 3),
    "harm_extent": 0,
    "harm_likelihood": 0,
}
WHOLE = {"preference": "A", "confidence": 1, "answers": {"A": JUDGED, "B": JUDGED}}
GUESSED = {"answers": {"A": {"guess": 0}, "B": {"guess": -1}}}


def change(page, entry=None, **other):
    return votes.Change(
        **{
            "position": page.place.position,
            "revision": page.revision,
            "key": next(KEYS),
            "active_ms": 900,
            "entry": entry,
        }
        | other
    )


def close_next(record, study, name, entry=WHOLE):
    page = votes.current(record, name)
    own = change(page, GUESSED if page.place.purpose == "guess" else entry)
    return own, votes.close(record, study, name, own)


@pytest.fixture
def path(tmp_path):
    return write_study(tmp_path)


def test_what_is_acknowledged_is_synchronous_and_committed(path):
    study, record, _ = begin(path)
    with record.reading() as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert connection.execute("PRAGMA synchronous").fetchone()[0] == 2
    _, saved = close_next(record, study, "R01")
    assert saved.revision == 1
    with record.reading() as connection:
        assert not connection.in_transaction
    # Another process sees it at once: nothing waits in this one.
    other = sqlite3.connect(study.protocol.folder / FILE)
    assert other.execute("SELECT count(*) FROM vote WHERE closed_at > 0").fetchone()[0] == 1


def test_a_server_that_dies_loses_no_acknowledged_vote(path, tmp_path):
    """The files as they are at any moment, copied while the server has them open, hold every vote that was answered."""
    study, record, _ = begin(path)
    for number in range(1, 5):
        close_next(record, study, "R01")
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(study.protocol.folder, copy)
        left = open_database(copy)
        assert sum(vote.closed_at is not None for vote in all_votes(left)) == number
        assert audit.events(left)[-1].kind == "close"


def test_the_same_request_counts_once(path):
    study, record, _ = begin(path)
    own, saved = close_next(record, study, "R01")
    assert votes.close(record, study, "R01", own) == saved  # though the page is closed by now
    assert sum(event.kind == "close" for event in audit.events(record)) == 1
    page = votes.current(record, "R01")
    with pytest.raises(Refused, match="key of this request was used before"):
        votes.save(record, study, "R01", change(page, WHOLE, key=own.key))


def test_twenty_readers_at_once_lose_no_vote(tmp_path):
    """Each sends every request twice, as a browser does that lost the answer; all meet in one record."""
    readers = [f"R{i:02}" for i in range(20)]
    path = write_study(tmp_path, cases=10, readers=readers, design={"readers_per_case": 4, "guesses": 1})
    study, record, _ = begin(path)

    def read_all(name):
        done = 0
        while (page := votes.current(record, name)) is not None:
            own = change(page, GUESSED if page.place.purpose == "guess" else {**WHOLE, "comment": f"{name} {done}"})
            assert votes.close(record, study, name, own) == votes.close(record, study, name, own)
            done += 1
        return done

    with ThreadPoolExecutor(20) as pool:
        done = list(pool.map(read_all, readers))
    assert done == [len(own) for own in places(record).values()]
    found = all_votes(record)
    assert sum(vote.closed_at is not None for vote in found) == sum(done) == 60
    comments = sorted(vote.entry["comment"] for vote in found if "comment" in vote.entry)
    assert comments == sorted(f"{name} {i}" for name in readers for i in range(2))
    assert len(audit.events(record)) == len({event.seq for event in audit.events(record)})


def test_two_windows_do_not_overwrite_each_other(path):
    study, record, _ = begin(path)
    page = votes.current(record, "R01")
    first, second = change(page, {"comment": "one"}), change(page, {"comment": "two"})
    votes.save(record, study, "R01", first)
    with pytest.raises(Refused, match="changed in another window"):
        votes.save(record, study, "R01", second)
    assert votes.current(record, "R01").entry["comment"] == "one"


def test_undo_goes_back_save_by_save_until_the_case_is_closed(path):
    study, record, _ = begin(path)
    texts = ["a", "ab", "abc"]
    for text in texts:
        votes.save(record, study, "R01", change(votes.current(record, "R01"), {"comment": text}))
    seen = []
    while votes.current(record, "R01").can_undo:
        seen.append(votes.undo(record, study, "R01", change(votes.current(record, "R01"))).entry.get("comment"))
    assert seen == ["ab", "a", None]
    with pytest.raises(Refused, match="nothing to undo"):
        votes.undo(record, study, "R01", change(votes.current(record, "R01")))
    votes.save(record, study, "R01", change(votes.current(record, "R01"), {"comment": "new"}))
    assert votes.undo(record, study, "R01", change(votes.current(record, "R01"))).can_undo is False
    before = votes.current(record, "R01")
    close_next(record, study, "R01")
    with pytest.raises(Refused, match="This case is closed"):
        votes.undo(record, study, "R01", change(before))
    # Nothing of it is gone: the log holds every step.
    assert [event.kind for event in audit.events(record) if event.position == 1] == [
        "open",
        *["save"] * 3,
        *["undo"] * 3,
        "save",
        "undo",
        "close",
    ]


def test_a_case_is_closed_only_when_it_is_filled_in(path):
    study, record, _ = begin(path)
    page = votes.current(record, "R01")
    for entry, lacking in (
        ({}, "which answer is better; how sure you are; Answer A: Logical clarity"),
        ({**WHOLE, "answers": {"A": JUDGED}}, "Answer B: Logical clarity"),
        ({**WHOLE, "answers": {"A": JUDGED, "B": {**JUDGED, "criteria": {}}}}, "Answer B: Feasibility"),
    ):
        with pytest.raises(Refused, match=lacking) as error:
            votes.close(record, study, "R01", change(page, entry))
        assert error.value.status == 422
    assert votes.current(record, "R01") == page


@pytest.mark.parametrize(
    "entry",
    [
        {"preference": "C"},
        {"preference": 1},
        {"confidence": 4},
        {"confidence": True},
        {"confidence": 1.0},
        {"comment": "x" * 8001},
        {"comment": 3},
        {"arm": "zebra-sft"},
        {"answers": {"C": {}}},
        {"answers": {"A": {"criteria": {"beauty": 1}}}},
        {"answers": {"A": {"tags": ["beauty"]}}},
        {"answers": {"A": {"tags": "unsafe"}}},
        {"answers": {"A": {"guess": 0}}},
        {"answers": []},
        [],
        None,
    ],
)
def test_what_the_form_does_not_offer_is_refused(path, entry):
    study, record, _ = begin(path)
    page = votes.current(record, "R01")
    with pytest.raises(Refused) as error:
        votes.save(record, study, "R01", change(page, entry))
    assert error.value.status == 400
    assert votes.current(record, "R01") == page


def test_a_full_disk_refuses_the_vote_with_a_sentence_and_keeps_what_was_there(path):
    study, record, _ = begin(path)
    page = votes.current(record, "R01")
    with record.reading() as connection:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
    long = {**WHOLE, "comment": "x" * 8000}
    with pytest.raises(Refused, match="Not saved: the server's disk is full") as error:
        save_often(record, study, long)
    assert error.value.status == 507
    with record.reading() as connection:
        connection.execute("PRAGMA max_page_count = 1000000")
    votes.close(record, study, "R01", change(votes.current(record, "R01"), long))
    assert votes.current(record, "R01").place.position == page.place.position + 1
    audit.events(record)


def save_often(record, study, entry):
    for _ in range(20):
        votes.save(record, study, "R01", change(votes.current(record, "R01"), entry))


MOUNTS = """\
21 1 259:1 / / rw - ext4 /dev/root rw
30 21 0:40 / /media/ward rw - nfs4 server:/ward rw
31 30 259:2 / /media/ward/local\\040disk rw - xfs /dev/sdb rw
32 21 0:41 / /media/share rw - cifs //server/share rw
"""


def test_a_network_file_system_is_refused(tmp_path, monkeypatch):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    kinds = {
        "/media/ward/x": "nfs4",
        "/media/ward/local disk/x": "xfs",
        "/media/share": "cifs",
        "/srv": "ext4",
        "/media/wardrobe": "ext4",
    }
    assert {path: file_system(Path(path), mounts) for path in kinds} == kinds
    mounts.write_text(f"21 1 0:40 / {tmp_path.resolve()} rw - nfs4 server:/ward rw\n")
    monkeypatch.setattr(database, "file_system", lambda path: file_system(path, mounts))
    with pytest.raises(ValueError, match=r"network file system \(nfs4\)"):
        open_database(tmp_path / "record")


def test_other_databases_are_refused(tmp_path):
    folder = tmp_path / "record"
    open_database(folder).close()
    with sqlite3.connect(folder / FILE) as connection:
        connection.execute("PRAGMA user_version = 2")
    with pytest.raises(ValueError, match=r"newer version of vlmalign \(format 2; this one knows 1\)"):
        open_database(folder)
    (folder / FILE).unlink()
    with sqlite3.connect(folder / FILE) as connection:
        connection.execute("CREATE TABLE notes (text)")
    with pytest.raises(ValueError, match="not of a reader study"):
        open_database(folder)
    (folder / FILE).write_bytes(b"not a database at all, but long enough to be read as one" * 20)
    with pytest.raises(ValueError, match="file is not a database"):
        open_database(folder)
    with pytest.raises(ValueError, match="no reader study in"):
        open_database(tmp_path / "elsewhere", create=False)


def test_events_are_neither_changed_nor_removed(path):
    study, record, _ = begin(path)
    close_next(record, study, "R01")
    assert len(audit.events(record)) == 4  # protocol, open, freeze, close
    with record.reading() as connection:
        for statement in ("UPDATE event SET body = '{}' WHERE seq = 3", "DELETE FROM event WHERE seq = 3"):
            with pytest.raises(sqlite3.IntegrityError, match="events are never"):
                connection.execute(statement)
        # Somebody who takes the trigger away as well is found out by the chain.
        connection.execute("DROP TRIGGER event_stays")
        connection.execute("UPDATE event SET body = replace(body, '\"A\"', '\"B\"') WHERE seq = 4")
    with pytest.raises(ValueError, match="event 4 does not follow"):
        audit.events(record)


def edit(path, **changes):
    path.write_text(write_yaml(read_yaml(path.read_text()) | changes))
    return load_study(path)


def test_a_protocol_is_free_before_the_first_vote_and_frozen_by_it(path):
    study, record, _ = begin(path)
    study = edit(path, seed=5)
    assert register(record, study).version == 1
    assert versions(record)[0].hash == study.hash
    assert versions(record)[0].frozen_at is None
    close_next(record, study, "R01")
    assert versions(record)[0].frozen_at is not None
    register(record, study)
    with pytest.raises(
        ValueError, match=r"frozen at the first vote \(version 1\), and this one differs: seed \(5 -> 6\)"
    ):
        register(record, edit(path, seed=6))
    answers = path.parent / "secret-answers-0.jsonl"
    answers.write_text(answers.read_text().replace("couple 3", "pair 3"))
    with pytest.raises(ValueError, match=r"shown.arms.zebra-sft \(the content that is shown\)"):
        register(record, edit(path, seed=5))


def test_a_page_that_was_opened_does_not_outlive_a_change_of_the_protocol(path):
    study, record, _ = begin(path)
    votes.current(record, "R01")
    study = edit(path, seed=6)
    register(record, study)
    assert all_votes(record) == []
    close_next(record, study, "R01")
    assert [vote.revision for vote in all_votes(record)] == [1]


@pytest.mark.parametrize(
    "form",
    [
        {"criteria": {"clarity": "Clarity"}},
        {"tags": {}},
        {"scale": ["bad", "good"]},
        {"confidence": []},
        {"harm": False},
        {"preference": False},
    ],
)
def test_an_amendment_drops_nothing_that_was_answered(path, form):
    study, record, _ = begin(path)
    close_next(record, study, "R01")
    with pytest.raises(ValueError, match="votes that are in would lose their meaning"):
        amend(record, edit(path, form=form), "shorter")
    more = {"criteria": {**study.protocol.form.criteria, "tone": "Tone"}, "scale": ["1", "2", "3", "4", "5"]}
    assert amend(record, edit(path, form=more), "one more criterion")[0].version == 2


def test_a_server_of_another_protocol_takes_no_vote(path):
    study, record, _ = begin(path)
    page = votes.current(record, "R01")
    register(record, edit(path, question="Which one?"))  # by another process, while this server runs
    with pytest.raises(Refused, match="changed while this server ran"):
        votes.close(record, study, "R01", change(page, WHOLE))
    assert audit.events(record)[-1].kind == "protocol"


def test_amendments_are_dated_given_a_reason_and_kept(path):
    study, record, _ = begin(path, clock=Clock())
    with pytest.raises(ValueError, match="no vote is in yet"):
        amend(record, edit(path, question="Which?"), "clearer")
    study = edit(path, question="Which answer is better for this patient?")
    close_next(record, study, "R01")
    with pytest.raises(ValueError, match="nothing to amend"):
        amend(record, study, "for no reason")
    with pytest.raises(ValueError, match=r"these can no longer change: design\.repeats, seed"):
        amend(record, edit(path, seed=9, design={"readers_per_case": 2, "guesses": 1, "repeats": 1}), "more")
    with pytest.raises(ValueError, match="needs a reason"):
        amend(record, edit(path, seed=3, design={"readers_per_case": 2, "guesses": 1}, question="Which?"), " ")
    changed = edit(path, question="Which would you follow?")
    version, changes = amend(record, changed, "asked by two readers")
    assert (version.version, version.reason) == (2, "asked by two readers")
    assert changes == {"question": (None, "Which would you follow?")}
    assert [found.version for found in versions(record)] == [1, 2]
    with pytest.raises(Refused, match="changed while this server ran"):
        close_next(record, study, "R01")
    close_next(record, changed, "R01")
    assert [vote.protocol for vote in all_votes(record)] == [1, 2]


def test_withdrawal_ends_sessions_and_keeps_or_leaves_out_votes(path):
    study, record, _ = begin(path)
    session = access.enter(record, access.invite(record, "R02"))
    close_next(record, study, "R02")
    with pytest.raises(ValueError, match="needs a reason"):
        access.withdraw(record, "R02", "", keep_votes=False)
    access.withdraw(record, "R02", "moved away", keep_votes=False)
    assert access.session(record, session) is None
    with pytest.raises(ValueError, match="R02 was withdrawn"):
        access.invite(record, "R02")
    assert [(vote.person, vote.withdrawn, vote.kept) for vote in all_votes(record)] == [("R02", True, False)]
    counts = flow.counted(record, study)
    assert counts["people"]["withdrawn_votes_left_out"] == 1
    assert counts["pages"]["left_out_with_withdrawn"] == 1
    # Somebody else takes over the cases, by an amendment.
    new = edit(path, replacements={"R03": "R02"})
    amend(record, new, "R02 moved away")
    assert {place.case for place in places(record)["R03"]} == {place.case for place in places(record)["R02"]}
    with pytest.raises(ValueError, match="R01 has not been withdrawn"):
        amend(record, edit(path, replacements={"R03": "R02", "R04": "R01"}), "too early")


def test_clocks_that_were_set_are_counted(path):
    clock = Clock()
    study, record, _ = begin(path, clock=clock)
    page = votes.current(record, "R01")
    clock.now -= 3600  # the server's clock is set back an hour
    votes.close(record, study, "R01", change(page, WHOLE))
    page = votes.current(record, "R01")
    votes.close(record, study, "R01", change(page, WHOLE, active_ms=60_000))  # within milliseconds of the server's
    assert flow.counted(record, study)["clock"] == {"set_back": 1, "stopwatch_ahead": 2, "closed_before_opened": 1}


def test_tokens_open_once_and_are_kept_as_hashes(path):
    clock = Clock()
    study, record, _ = begin(path, clock=clock)
    first = access.invite(record, "R01")
    second = access.invite(record, "R01")
    for wrong in (first, second[:-1], second + "x", "", "x" * 43, "\udcff"):
        with pytest.raises(Refused, match="This link does not work"):
            access.enter(record, wrong)
    session = access.enter(record, second)
    with pytest.raises(Refused, match="used before"):
        access.enter(record, second)
    assert access.session(record, session).name == "R01"
    assert access.session(record, second) is None
    late = access.invite(record, "R02")
    clock.now += access.LINK_DAYS * access.DAY + 1
    with pytest.raises(Refused, match="too old"):
        access.enter(record, late)
    clock.now += access.SESSION_DAYS * access.DAY
    assert access.session(record, session) is None
    record.close()
    stored = b"".join(file.read_bytes() for file in study.protocol.folder.iterdir())
    assert not any(token.encode() in stored for token in (first, second, session, late))


def test_a_changed_request_needs_a_key_and_a_sane_stopwatch(path):
    study, record, _ = begin(path)
    own = change(votes.current(record, "R01"), WHOLE)
    for wrong in (
        replace(own, key="short"),
        replace(own, key="\ud800" * 9),
        replace(own, active_ms=-1),
        replace(own, active_ms=10**12),
    ):
        with pytest.raises(Refused, match="not one that this page sends"):
            votes.close(record, study, "R01", wrong)
