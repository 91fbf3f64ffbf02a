"""The interval of a share against published values."""

import pytest

from pipeline.intervals import wilson


def test_the_wilson_interval_is_that_of_the_formula_by_hand():
    # p = 0.1, n = 10: centre (0.1 + 3.8415/20)/1.38415 = 0.2110, half 1.96*sqrt(0.009 + 0.0096)/1.38415 = 0.1932.
    rate = wilson(1, 10)
    assert rate.low == pytest.approx(0.0179, abs=2e-4)
    assert rate.high == pytest.approx(0.4042, abs=2e-4)
    assert (wilson(0, 5).low, wilson(5, 5).high) == (0.0, 1.0)


def test_the_interval_is_the_one_that_newcombe_printed():
    # Newcombe 1998, table I: 81 of 263 and 15 of 148.
    for hits, cases, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)):
        assert (wilson(hits, cases).low, wilson(hits, cases).high) == pytest.approx((low, high), abs=5e-5)
