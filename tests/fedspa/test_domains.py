"""The shipped excerpts: there, readable, and the held-out part unseen in calibration."""

from importlib.resources import files

import pytest

from fedspa.domains import DOMAINS, domain_text


@pytest.mark.parametrize("name", DOMAINS)
def test_both_parts_have_their_size_and_whole_paragraphs(name: str) -> None:
    for part, characters in (("calibration", 100_000), ("heldout", 50_000)):
        text = domain_text(name, part)  # type: ignore[arg-type]
        assert 0.95 * characters < len(text) < 1.15 * characters
        assert all(paragraph.strip() for paragraph in text.split("\n\n"))
        assert "\r" not in text and "\ufffd" not in text


@pytest.mark.parametrize("name", DOMAINS)
def test_no_heldout_paragraph_begins_like_anything_in_calibration(name: str) -> None:
    calibration = domain_text(name, "calibration")
    heldout = domain_text(name, "heldout").split("\n\n")
    assert len(heldout) > 5
    assert [paragraph for paragraph in heldout if paragraph[:50] in calibration] == []


@pytest.mark.parametrize("name", DOMAINS)
def test_heldout_shares_next_to_no_eight_words_with_calibration(name: str) -> None:
    def eights(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return set(zip(*(words[start:] for start in range(8)), strict=False))

    heldout = eights(domain_text(name, "heldout"))
    shared = heldout & eights(domain_text(name, "calibration"))
    assert len(shared) < 0.005 * len(heldout)


def test_an_unknown_domain_is_answered_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match='no domain "poems".*speeches, novel'):
        domain_text("poems")
    with pytest.raises(ValueError, match='part is "test"'):
        domain_text("novel", "test")  # type: ignore[arg-type]


def test_the_licences_travel_with_the_excerpts() -> None:
    corpora = files("fedspa") / "corpora"
    postgresql = (corpora / "LICENSE-postgresql.txt").read_text(encoding="utf-8")
    python = (corpora / "LICENSE-python.txt").read_text(encoding="utf-8")
    assert "PROVIDE MAINTENANCE, SUPPORT, UPDATES, ENHANCEMENTS, OR MODIFICATIONS" in postgresql
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in python and "2023" in python
    readme = (corpora / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in readme for name in DOMAINS)
