"""API keys: their shape, what is stored of them, and how they are found."""

from __future__ import annotations

import hashlib
import re

import pytest

from serve_app.gateway import keys
from serve_app.gateway.config import Key
from serve_app.gateway.errors import AuthenticationFailed

NOW = 1_800_000_000.0


def entry(made: keys.NewKey, **changes: object) -> Key:
    values = {"id": made.prefix, "prefix": made.prefix, "hash": made.hash, "role": "basic", **changes}
    return Key(**values)  # type: ignore[arg-type]


def refusal(ring: keys.KeyRing, presented: str, now: float = NOW) -> AuthenticationFailed:
    with pytest.raises(AuthenticationFailed) as caught:
        ring.find(presented, now)
    assert presented[16:] == "" or presented[16:] not in str(caught.value.body())
    return caught.value


def test_a_key_has_the_documented_shape_and_is_stored_as_its_hash() -> None:
    made = keys.generate()
    assert re.fullmatch(r"rp-[a-z][a-z0-9]{11}-[A-Za-z0-9_-]{43}", made.key)
    assert made.key[3:15] == made.prefix
    assert made.hash == "sha256:" + hashlib.sha256(made.key.encode()).hexdigest() == keys.digest(made.key)
    assert keys.HASH.fullmatch(made.hash)
    assert keys.PREFIX.fullmatch(made.prefix)


def test_keys_differ() -> None:
    many = [keys.generate() for _ in range(500)]
    assert len({one.prefix for one in many}) == 500
    assert len({one.key[16:] for one in many}) == 500


def test_each_of_many_keys_is_found() -> None:
    made = [keys.generate() for _ in range(50)]
    ring = keys.KeyRing(entry(one) for one in made)
    assert len(ring) == 50
    assert [ring.find(one.key, NOW).id for one in made] == [one.prefix for one in made]
    assert [one.id for one in ring] == [one.prefix for one in made]
    assert ring.get(made[7].prefix) == entry(made[7])
    assert ring.get("other") is None


def test_any_changed_character_is_refused() -> None:
    made = keys.generate()
    ring = keys.KeyRing([entry(made)])
    for place in range(len(made.key)):
        other = "A" if made.key[place] != "A" else "B"
        changed = made.key[:place] + other + made.key[place + 1 :]
        # The mark is the authenticator's to check; the hash covers it all the same.
        assert refusal(ring, changed).code == "invalid_api_key"


@pytest.mark.parametrize("presented", ["", "rp-", "rp-abc", "é" * 59, "\ud800" * 59, "rp-" + "0" * 10_000])
def test_what_is_no_key_is_refused(presented: str) -> None:
    ring = keys.KeyRing([entry(keys.generate())])
    error = refusal(ring, presented)
    assert (error.status, error.code) == (401, "invalid_api_key")
    assert error.headers["www-authenticate"].startswith("Bearer")


def test_an_unknown_prefix_takes_a_hash_and_a_comparison_too(monkeypatch: pytest.MonkeyPatch) -> None:
    made = keys.generate()
    compared: list[tuple[bytes, bytes]] = []
    real = keys.hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr(keys.hmac, "compare_digest", compare)
    presented = keys.generate().key
    refusal(keys.KeyRing([entry(made)]), presented)
    assert compared == [(hashlib.sha256(presented.encode()).digest(), bytes(32))]


def test_the_window_of_a_key() -> None:
    made = keys.generate()
    ring = keys.KeyRing([entry(made, not_before="2027-01-01T00:00:00Z", expires="2027-01-02T01:00:00+01:00")])
    begins, ends = keys.moment("2027-01-01"), keys.moment("2027-01-02")
    early = refusal(ring, made.key, begins - 0.001)
    assert (early.code, early.message) == ("invalid_api_key", "The API key is not valid yet.")
    assert ring.find(made.key, begins).id == made.prefix
    assert ring.find(made.key, ends - 0.001).id == made.prefix
    assert refusal(ring, made.key, ends).code == "expired_api_key"


def test_of_an_expired_key_only_its_owner_learns() -> None:
    made = keys.generate()
    ring = keys.KeyRing([entry(made, expires="2020-01-01")])
    assert refusal(ring, made.key).code == "expired_api_key"
    assert refusal(ring, made.key[:-1] + "-").code == "invalid_api_key"


def test_rotation_with_overlap() -> None:
    old, new = keys.generate(), keys.generate()
    ring = keys.KeyRing(
        [entry(old, id="team-1", client="team", expires="2027-01-02"), entry(new, id="team-2", client="team")]
    )
    during = keys.moment("2027-01-01")
    assert {ring.find(one.key, during).client for one in (old, new)} == {"team"}
    assert refusal(ring, old.key, keys.moment("2027-01-02")).code == "expired_api_key"
    assert ring.find(new.key, keys.moment("2027-01-02")).id == "team-2"


def test_a_disabled_key_is_refused() -> None:
    made = keys.generate()
    error = refusal(keys.KeyRing([entry(made, disabled=True)]), made.key)
    assert (error.code, error.message) == ("invalid_api_key", "The API key is disabled.")


def test_moments() -> None:
    assert keys.moment("1970-01-02") == 86400
    assert keys.moment("1970-01-01T01:00:00.5+01:00") == 0.5
    assert keys.moment("1970-01-01T00:00:00Z") == 0
    for wrong in ("1970-01-01T00:00:00", "tomorrow", "2027-13-01", "2027-02-30"):
        with pytest.raises(ValueError):
            keys.moment(wrong)


def test_masks_leave_the_public_part() -> None:
    made = keys.generate()
    assert keys.masked(f"key {made.key}!") == f"key rp-{made.prefix}-...!"
    assert keys.masked("rp-short and text") == "rp-short and text"


def test_a_dissolved_ring_is_empty() -> None:
    made = [keys.generate() for _ in range(1200)]
    ring = keys.KeyRing(entry(one) for one in made)
    ring.dissolve()
    assert len(ring) == 0
    assert refusal(ring, made[0].key).code == "invalid_api_key"
