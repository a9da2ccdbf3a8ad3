"""Who has not the secret cannot join, nor write anything that has an effect."""

from __future__ import annotations

from pathlib import Path

import pytest

from commkit.membership import ElasticOptions, Join, Leave, Member, Place, Seal, encode
from commkit.membership.seal import ForgedRecordError, secret_of

SECRET = b"sixteen bytes or more"
OPTIONS = ElasticOptions(heartbeat_s=0.5, limit_s=5.0)


class Log:
    """As the store keeps it."""

    def __init__(self, *members: Member) -> None:
        self.members, self.texts, self._beat = members, [], 0

    def turn(self, times: int = 20) -> None:
        for _ in range(times):
            self._beat += 1
            for member in self.members:
                member.heard({other.worker: self._beat for other in self.members}, 1.0)
                position, text = member.request(1.0)
                if text and position == len(self.texts):
                    self.texts.append(text)
                have = self.texts[position] if position < len(self.texts) else ""
                member.answer(position, have, 1.0)


def _member(name: str, secret: bytes | None, size: int = 2, place: int = 0) -> Member:
    return Member(name, OPTIONS, size, place, 0.0, Seal(secret, "job"))


def _pair() -> tuple[Log, Member, Member]:
    first, second = _member("a", SECRET), _member("b", SECRET, place=1)
    log = Log(first, second)
    log.turn()
    assert first.view.members == second.view.members == ("a", "b")
    return log, first, second


@pytest.mark.parametrize("secret", [b"another one of them", None])
def test_a_stranger_is_refused_and_changes_nothing(secret: bytes | None) -> None:
    log, first, second = _pair()
    before = list(log.texts)
    stranger = _member("c", secret)
    log.members = (first, second, stranger)
    log.turn()
    assert stranger.refused
    assert log.texts == before
    assert first.working
    assert second.working


@pytest.mark.parametrize(
    "forged",
    [
        encode(Join("c")),
        "0" * 64 + " " + encode(Join("c")),
        Seal(b"another one of them", "job").close(99, encode(Leave("b", "forged"))),
        "not even a record",
        "é" * 80,
    ],
)
def test_what_a_stranger_writes_has_no_effect(forged: str) -> None:
    log, first, second = _pair()
    log.texts.append(forged)
    log.turn()
    assert first.forged == second.forged == 1
    assert first.working
    # Life goes on behind it.
    second.leave("enough")
    log.turn()
    assert first.view.members == ("a",)


def test_a_record_means_nothing_elsewhere_in_the_log_or_in_another_job() -> None:
    log, first, second = _pair()
    third = _member("c", SECRET)
    log.members = (first, second, third)
    assert first.prepare(1, 1)
    assert first.commit(1, 1)  # who joins waits for a step
    log.turn()
    assert third.working
    third.leave("gone")
    log.turn()
    join = next(text for text in log.texts if '"c"' in text and "Join" in text)
    log.texts.append(join)  # written once more
    log.turn()
    assert first.forged == 1
    with pytest.raises(ForgedRecordError):
        Seal(SECRET, "other").open(0, Seal(SECRET, "job").close(0, "{}"))


def test_a_worker_with_a_secret_refuses_those_without() -> None:
    open_log = Log(_member("a", None, 1))
    open_log.turn()
    wary = _member("b", SECRET)
    open_log.members = (*open_log.members, wary)
    open_log.turn()
    assert "COMMKIT_SECRET_FILE" in wary.refused


def test_where_the_secret_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("from the file, with a line end\n")
    assert secret_of({"COMMKIT_SECRET_FILE": str(file)}) == b"from the file, with a line end"
    assert secret_of({"COMMKIT_SECRET": "from here"}) == b"from here"
    assert secret_of({}) is None
    with pytest.raises(ValueError, match="both set"):
        secret_of({"COMMKIT_SECRET": "x", "COMMKIT_SECRET_FILE": str(file)})
    with pytest.raises(ValueError, match="cannot be read"):
        secret_of({"COMMKIT_SECRET_FILE": str(tmp_path / "nothing")})
    with pytest.raises(ValueError, match="has 5 bytes and needs at least 16"):
        Seal(b"short")


def test_the_secret_is_not_shown() -> None:
    given = {"RANK": "0", "WORLD_SIZE": "1", "COMMKIT_STORE": "h:1", "COMMKIT_SECRET": "s" * 20}
    place = Place.from_environment(given)
    assert place.secret == b"s" * 20
    assert "ssss" not in repr(place)
    assert "ssss" not in str(vars(Seal(place.secret)).keys())
