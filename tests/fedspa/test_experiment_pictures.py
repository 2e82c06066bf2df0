"""A grid's pictures: what was measured and nothing else, the same bytes, legible names."""

from xml.etree import ElementTree

from experiment_records import ORDER, curves, grid, record
from matplotlib.text import Text

from fedspa.experiments.results.pictures import figures, write_pictures


def test_pictures_are_the_same_bytes_twice_and_have_their_labels_as_text(tmp_path):
    records = [*grid(clients=(4, 16), targets=(0.5, 0.6)), *curves()]
    first = write_pictures(records, tmp_path / "a", ORDER)
    second = write_pictures(records, tmp_path / "b", ORDER)
    names = ["sparsity", "exchanges", "clients", "traffic"]
    assert [path.stem for path in first] == names
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    for path in first:
        text = path.read_text(encoding="utf-8")
        root = ElementTree.fromstring(text)
        shown = {
            "".join(node.itertext()).strip() for node in root.iter() if node.tag[-4:] == "text"
        }
        wanted = {"curve", "l0 curve"} if path.stem == "exchanges" else {"statistics", "FedSpaLLM"}
        assert wanted <= shown
        assert "#ffffff" in text and "<metadata" not in text
        # Every role of a page's style sheet was given a colour.
        assert "#0102" not in text


def test_only_what_was_measured_is_drawn():
    assert figures([record("FedSpaLLM")]) == {}
    corner = [
        record("FedSpaLLM", clients=clients, partition=partition, target=target)
        for clients, partition in ((4, "domain"), (8, "domain"), (8, "iid"))
        for target in (0.5, 0.6)
    ]
    drawn = figures(corner)
    assert list(drawn) == ["sparsity"]
    # Four clients were never measured with IID data.
    assert len(drawn["sparsity"].axes) == 3
    nan = [record("FedSpaLLM", target=t, geometric_mean="nan") for t in (0.5, 0.6)]
    assert figures(nan) == {}


def test_labels_at_lines_never_overlap():
    figure = figures(grid(clients=(4, 16)), ORDER)["sparsity"]
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [Text.get_window_extent(label) for label in axes.texts]
        tops = sorted((box.y0 + box.y1) / 2 for box in boxes)
        heights = [after - before for before, after in zip(tops, tops[1:], strict=False)]
        assert all(height > 0.9 * 8 * figure.dpi / 72 for height in heights)
        assert all(box.x1 <= figure.bbox.x1 for box in boxes)
