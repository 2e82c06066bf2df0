"""What several files of tests need: a report of made-up results."""

import json

import pytest

from bench import report


@pytest.fixture
def written(tmp_path):
    """Write documents into a folder and the report beside it; return the page's text."""

    def write(*documents, analysis=None):
        folder = tmp_path / "results"
        folder.mkdir(exist_ok=True)
        for index, content in enumerate(documents):
            (folder / f"{index}.json").write_text(json.dumps(content), encoding="utf-8")
        if analysis is not None:
            (tmp_path / "analysis.md").write_text(analysis, encoding="utf-8")
        report.write(folder, tmp_path / "page.md", tmp_path / "analysis.md")
        return (tmp_path / "page.md").read_text(encoding="utf-8")

    return write
