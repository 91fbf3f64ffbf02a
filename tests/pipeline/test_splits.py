import pytest

from pipeline.config.settings import SplitSettings
from pipeline.splits import split_of


def test_prompts_that_begin_alike_share_a_split() -> None:
    shares = SplitSettings()

    def split(*contents: str) -> str:
        roles = ("user", "assistant", "user")
        return split_of([{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)], shares)

    for i in range(50):
        plain = split(f"Wo ist Straße {i}?")
        assert plain == split(f"  wo  IST\nSTRASSE {i}?", "Dort.", "Danke.") == split(f"Wo ist Stra\u00dfe\u3000{i}?")
    found = [split(f"prompt {i}") for i in range(4000)]
    # Three standard deviations of a binomial share of 4,000 are 0.024 and 0.015.
    assert found.count("sft") / 4000 == pytest.approx(0.45, abs=0.024)
    assert found.count("preference") / 4000 == pytest.approx(0.45, abs=0.024)
    assert found.count("test") / 4000 == pytest.approx(0.10, abs=0.015)
