"""The constitution: its file, its digest, its draws."""

import collections
import hashlib
import json
import math

import pytest

from constitution.principles import Constitution, Principle, default_path
from constitution.wording import default_wording


def made(*principles: Principle) -> Constitution:
    return Constitution(tuple(principles), default_wording())


def principle(id: str, about: str = "harm", weight: float = 1.0, text: str = "x") -> Principle:
    return Principle(id, about, text, text, text, weight)


def drawn(constitution: Constitution, count: int, **options: str) -> list[str]:
    return [constitution.draw(7, f"record-{n}", 0, 0, **options).id for n in range(count)]


def test_the_default_constitution_has_enough_principles_in_each_group():
    constitution = Constitution.default()
    groups = collections.Counter(p.about for p in constitution)
    assert len(constitution) >= 16
    assert all(groups[about] >= 4 for about in ("harm", "evasion", "tone"))
    assert constitution.abouts == ("harm", "evasion", "tone", "honesty", "privacy")
    assert [p.id for p in constitution.in_group("privacy")] == ["privacy-details", "privacy-tracking"]
    assert constitution["harm-people"] is constitution.principles[0]


def test_the_default_texts_are_short_and_distinct():
    texts = [t for p in Constitution.default() for t in (p.critique_request, p.revision_request, p.comparison)]
    assert len(set(texts)) == len(texts)
    assert max(len(text.split()) for text in texts) <= 25


def test_the_digest_covers_texts_weights_order_and_wording_but_not_layout():
    source = default_path().read_text(encoding="utf-8")
    same = Constitution.parse("# a comment\n\n" + source.replace("weight: 1.0", "weight: 1"))
    digest = Constitution.default().digest
    assert same.digest == digest
    assert len(digest) == 64
    for old, new in (("steal, cheat", "steal"), ("weight: 1.0", "weight: 2"), ("about: tone", "about: manner")):
        assert Constitution.parse(source.replace(old, new, 1)).digest != digest
    assert Constitution.parse(source + '\nwording:\n  verdict: "Which?"\n').digest != digest
    first, second, *rest = Constitution.default()
    assert made(second, first, *rest).digest != digest


def test_a_draw_is_the_smallest_exponential_key():
    constitution = made(principle("a", weight=1.0), principle("b", weight=3.0), principle("c", weight=0.5))
    for n in range(50):
        keys = {}
        for p in constitution:
            place = json.dumps(["principle", 7, f"r{n}", 2, 1])
            digest = hashlib.sha256((place + p.id).encode()).digest()
            u = (int.from_bytes(digest[:8], "big") // 2**11 + 0.5) / 2**53
            keys[p.id] = -math.log(u) / p.weight
        assert constitution.draw(7, f"r{n}", 2, 1).id == min(keys, key=lambda id: keys[id])


def test_frequencies_follow_the_weights():
    constitution = made(principle("a", weight=1.0), principle("b", weight=2.0), principle("c", weight=5.0))
    counts = collections.Counter(drawn(constitution, 8000))
    # Standard deviation of each share is at most 0.0056.
    for id, share in (("a", 1 / 8), ("b", 2 / 8), ("c", 5 / 8)):
        assert abs(counts[id] / 8000 - share) < 0.02
    uniform = collections.Counter(drawn(constitution, 8000, method="uniform"))
    assert all(abs(uniform[id] / 8000 - 1 / 3) < 0.02 for id in "abc")


def test_editing_a_text_moves_no_draw():
    before = made(*(principle(id) for id in "abcd"))
    after = made(*(principle(id, text="edited" if id == "b" else "x") for id in "abcd"))
    for method in ("weighted", "uniform", "cover"):
        assert drawn(before, 500, method=method) == drawn(after, 500, method=method)


def test_adding_a_principle_moves_only_the_draws_that_it_wins():
    before = made(*(principle(id) for id in "abcd"))
    after = made(principle("new", weight=2.0), *(principle(id) for id in "abcd"))
    for method in ("weighted", "uniform"):
        pairs = list(zip(drawn(before, 2000, method=method), drawn(after, 2000, method=method), strict=True))
        assert all(new in (old, "new") for old, new in pairs)
        assert any(new == "new" for _, new in pairs)


def test_file_order_moves_no_draw():
    forward = made(*(principle(id) for id in "abcd"))
    backward = made(*(principle(id) for id in "dcba"))
    assert drawn(forward, 300) == drawn(backward, 300)


def test_seed_record_sample_and_round_each_draw_anew():
    constitution = Constitution.default()
    places = [(1, "r", 0, 0), (2, "r", 0, 0), (1, "s", 0, 0), (1, "r", 1, 0), (1, "r", 0, 1)]
    rows = [[constitution.draw(a, f"{b}{n}", c, d).id for n in range(40)] for a, b, c, d in places]
    assert len({tuple(row) for row in rows}) == len(places)


def test_cover_goes_through_the_groups_before_it_repeats_one():
    constitution = Constitution.default()
    firsts = set()
    for n in range(60):
        abouts = [constitution.draw(3, f"r{n}", 0, round, "cover").about for round in range(10)]
        assert sorted(abouts[:5]) == sorted(constitution.abouts)
        assert abouts[5:] == abouts[:5]
        firsts.add(abouts[0])
    assert firsts == set(constitution.abouts)


@pytest.mark.parametrize("pair", [0, 1])
def test_two_samples_of_three_rounds_cover_all_five_groups(pair):
    constitution = Constitution.default()
    for n in range(60):
        first, second = (
            [constitution.draw(3, f"r{n}", 2 * pair + sample, round, "cover").about for round in range(5)]
            for sample in (0, 1)
        )
        assert second == first[::-1]
        assert {*first[:3], *second[:3]} == set(constitution.abouts)


def test_draw_many_gives_different_principles_and_one_more_keeps_the_others():
    constitution = Constitution.default()
    three = constitution.draw_many(5, "r", 3)
    assert len({p.id for p in three}) == 3
    assert constitution.draw_many(5, "r", 4)[:3] == three
    assert set(constitution.draw_many(5, "r", 99)) == set(constitution.principles)
    with pytest.raises(ValueError, match="at least one"):
        constitution.draw_many(5, "r", 0)


def test_draw_many_takes_one_of_every_group_before_a_second_of_any():
    constitution = Constitution.default()
    groups = len(constitution.abouts)
    for record in map(str, range(50)):
        drawn = constitution.draw_many(0, record, 2 * groups)
        assert {p.about for p in drawn[:groups]} == set(constitution.abouts)
        assert len({p.id for p in drawn}) == 2 * groups


def test_one_drawn_principle_follows_the_weights_alone():
    # 5 of the 18 default principles, all of weight 1, are about harm.
    constitution = Constitution.default()
    share = sum(constitution.draw_many(0, str(r), 1)[0].about == "harm" for r in range(4000)) / 4000
    assert abs(share - 5 / 18) < 0.03


def test_an_unknown_way_to_draw_is_refused():
    with pytest.raises(ValueError, match="weighted, uniform or cover"):
        Constitution.default().draw(0, "r", 0, 0, "random")  # type: ignore[arg-type]
