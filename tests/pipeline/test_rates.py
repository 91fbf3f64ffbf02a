from __future__ import annotations

from pipeline.rates import Counts, Meter


def test_rates_are_those_of_the_window() -> None:
    meter = Meter(Counts(0, 0, 0, 0, 0), window_s=10)
    first = meter.read(Counts(10, 5, 1000, 200, 500))
    assert first == (100, 20, 0.5, 0.5)
    assert first.seconds_left(20) == 40
    # From 10 to 20 s: 15 records, 100 tokens in of which 90 cached, 300 out.
    assert meter.read(Counts(20, 20, 1100, 500, 590)) == (10, 30, 0.9, 1.5)


def test_samples_between_do_not_matter() -> None:
    meter = Meter(Counts(0, 0, 0, 0, 0), window_s=10)
    for second in range(1, 30):
        meter.read(Counts(second, second, 7 * second, 0, 0))
    assert meter.read(Counts(30, 40, 210, 0, 0)).records == (40 - 20) / 10


def test_a_window_without_a_finished_record_takes_their_rate_from_the_beginning() -> None:
    meter = Meter(Counts(0, 0, 0, 0, 0), window_s=10)
    meter.read(Counts(10, 8, 0, 0, 0))
    assert meter.read(Counts(40, 8, 0, 0, 0)).seconds_left(10) == 50


def test_what_cannot_be_known_yet_is_none() -> None:
    rates = Meter(Counts(5, 0, 0, 0, 0)).read(Counts(5, 0, 0, 0, 0))
    assert (rates.cached, rates.seconds_left(3)) == (None, None)
