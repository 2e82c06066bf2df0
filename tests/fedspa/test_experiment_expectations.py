"""Promises of a grid, held to its records."""

import pytest
from experiment_records import curves, failed, record, standalone, variants

from fedspa.experiments.results.expectations import Expectation, check, read_expectations


def test_an_expectation_holds_or_does_not_with_its_numbers():
    records = [
        record("statistics", geometric_mean=50.1),
        record("FedSpaLLM", geometric_mean=55.2),
        record("centralised", "centralised", geometric_mean=50.0),
        standalone([80.0, 100.0]),
    ]
    table = [
        {"lower": "statistics", "higher": "FedSpaLLM", "at_least": 1.1},
        {"lower": "statistics", "higher": "FedSpaLLM", "at_least": 1.11},
        {"lower": "statistics", "higher": "centralised", "within": 0.005},
        {"lower": "statistics", "higher": "centralised", "within": 0.001},
        {"lower": "FedSpaLLM", "higher": "standalone, best client"},
        {"lower": "standalone, mean", "higher": "statistics"},
    ]
    outcomes = check(records, read_expectations(table))
    assert [outcome.met for outcome in outcomes] == [True, False, True, False, True, False]
    assert outcomes[1].sentence == (
        "FedSpaLLM at least 1.11 times statistics: not met at smollm2-135m, 60 %, 4 clients, "
        "by domain: statistics 50.10, FedSpaLLM 55.20, 1.1018 times"
    )


def test_an_expectation_is_checked_wherever_both_are_and_only_where_it_is_meant():
    records = [
        record(name, clients=clients, target=target, partition=partition, geometric_mean=mean)
        for clients, target, partition in ((4, 0.6, "domain"), (8, 0.6, "iid"), (8, 0.7, "iid"))
        for name, mean in (("low", 40.0), ("high", 50.0))
    ]
    records.append(record("low", clients=64))
    for narrowed, count in (
        ({}, 3),
        ({"targets": [0.6]}, 2),
        ({"partitions": ["iid"]}, 2),
        ({"clients": [8], "targets": [0.7, "2:4"]}, 1),
    ):
        table = {"lower": "low", "higher": "high", **narrowed}
        outcomes = check(records, read_expectations([table]))
        assert [outcome.met for outcome in outcomes] == [True] * count


@pytest.mark.parametrize(
    "records",
    [
        [],
        [record("low")],
        [record("low"), record("high", target=0.7)],
        [record("low"), failed("high", "killed")],
        [record("low"), record("high", geometric_mean="nan")],
    ],
    ids=["nothing", "one", "elsewhere", "failed", "undefined"],
)
@pytest.mark.parametrize("kind", [{"at_least": 0.5}, {"within": 9.0}], ids=str)
def test_an_expectation_without_two_numbers_is_not_met(records, kind):
    (outcome,) = check(records, [Expectation("low", "high", **kind)])
    assert not outcome.met
    assert "low" in outcome.sentence and "high" in outcome.sentence


def test_axes_are_compared_value_by_value_or_by_name():
    by_value = check(curves(), [Expectation("curve", "l0 curve")])
    assert len(by_value) == 5 and all(outcome.met for outcome in by_value)
    named = Expectation(
        "FedPrLLM variants, expansion=row, scaling=false",
        "FedPrLLM variants, expansion=column, scaling=false",
        at_least=8.9,
    )
    (outcome,) = check(variants(), [named])
    assert outcome.met


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"at_leest": 1}, "at_least"),
        ({"lower": None}, "lower"),
        ({"within": 0.1, "at_least": 1.0}, "exclude"),
        ({"within": "0.1"}, "'0.1'"),
        ({"at_least": True}, "True"),
        ({"targets": 0.6}, "0.6"),
        ({"clients": []}, "clients"),
        ({"clients": ["4"]}, "'4'"),
    ],
    ids=str,
)
def test_an_expectation_that_cannot_be_meant_is_refused(change, named):
    with pytest.raises(ValueError, match="expect 2: ") as error:
        read_expectations([{"lower": "a", "higher": "b"}, {"lower": "a", "higher": "b"} | change])
    assert named in str(error.value)
