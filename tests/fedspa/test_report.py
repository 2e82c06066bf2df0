"""The report's numbers, its JSON, its tables, and its page."""

import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedspa.report import (
    ClientResult,
    LayerResult,
    Method,
    Report,
    client_table,
    machine,
    method_rows,
    method_table,
    peak_memory,
    versions,
    write_html,
)

HOSTILE = '<script>alert("x")</script> $\\frac$ & [red]'


def layer(block: int = 0, round: int = 0, name: str = "mlp.up_proj", **change: Any) -> LayerResult:
    values = {"shape": (10, 10), "clients": 3, "sparsity": 0.6, "votes": (40, 15, 20, 25)}
    return LayerResult(round=round, block=block, layer=name, **values | change)  # type: ignore[arg-type]


def client(name: str = "speeches", **change: Any) -> ClientResult:
    values: dict[str, Any] = {
        "samples": 16,
        "seqlen": 512,
        "capacity": 0.5,
        "sparsity": 0.6,
        "blocks": ((0, 1, 2, 5), (1,)),
        "bytes_up": 1_500_000,
        "bytes_down": 3_000_000,
        "loss": 12.5,
    }
    return ClientResult(name=name, **values | change)


DENSE = Method("dense", {"novel": 60.0, "speeches": 15.0}, 0.0003, 0, 0)
FEDERATED = Method("fedspa", {"novel": 250.0, "speeches": 40.0}, 0.60001, 70_000_000, 12_345)
POOLED = Method("centralised", {"novel": 160.0, "speeches": 40.0}, 0.6, 0, 0)


def report(**change: Any) -> Report:
    values: dict[str, Any] = {
        "settings": {"pruner": "sparsegpt", "sparsity": 0.6, "pattern": None},
        "model": {"name": "owner/Small-1M", "type": "llama", "blocks": 2, "parameters": 1_234_567},
        "unprunable": ("model.layers.0.conv.weight",),
        "clients": (client(), client("novel")),
        "layers": (layer(0), layer(1)),
        "methods": (DENSE, FEDERATED, POOLED),
        "result": "fedspa",
        "seconds": {"prune": 83.2, "evaluate": 120.0},
        "peak_memory": 2**30,
        "versions": {"torch": "2.13.0"},
        "machine": {"cpu": "a processor"},
    }
    return Report(**values | change)


# Numbers


def test_the_geometric_mean_is_over_the_domains() -> None:
    assert DENSE.geometric_mean == pytest.approx(30.0)
    assert math.isnan(replace(DENSE, perplexity={}).geometric_mean)
    assert replace(DENSE, perplexity={"a": 2.0, "b": math.inf}).geometric_mean == math.inf


def test_votes_give_intersection_and_agreement() -> None:
    result = layer()
    assert (result.size, result.intersection, result.agreement) == (100, 0.40, 0.65)
    alone = layer(clients=1, votes=(60, 40))
    assert (alone.intersection, alone.agreement) == (0.6, 1.0)
    unvoted = layer(votes=())
    assert math.isnan(unvoted.intersection) and math.isnan(unvoted.agreement)


@pytest.mark.parametrize("votes", [(40, 15, 20, 24), (50, 25, 25)])
def test_votes_must_account_for_every_weight(votes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="3 clients and 100 weights need 4 counts that sum to 100"):
        layer(votes=votes)


def test_the_last_round_of_a_layer_decides_the_sparsity() -> None:
    rounds = (
        layer(0, round=1, sparsity=0.6),
        layer(0, round=0, sparsity=0.3),
        layer(1, round=0, sparsity=0.2, shape=(10, 30), votes=()),
    )
    assert report(layers=rounds).sparsity == pytest.approx((60 + 60) / 400)
    assert report(layers=rounds[::-1]).sparsity == report(layers=rounds).sparsity
    assert report(layers=()).sparsity == 0.0


# JSON


def test_json_gives_the_same_report_back() -> None:
    odd = report(
        methods=(DENSE, replace(FEDERATED, perplexity={"novel": math.inf})),
        clients=(client(HOSTILE, blocks=((), (3,)), loss=math.inf),),
        layers=(layer(), layer(1, votes=())),
    )
    for whole in (report(), odd, Report({}, {}, (), (), ())):
        assert Report.from_json(whole.to_json()) == whole


def test_json_is_strict_and_carries_its_version_but_no_masks() -> None:
    text = report(
        methods=(replace(DENSE, perplexity={"a": math.nan}),), masks={"w": object()}
    ).to_json()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads(text, parse_constant=refuse)
    assert record["format_version"] == 1 and "masks" not in record


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format_version": 2}, "format_version is 2, this FedSpa reads 1"),
        ({"layers": None}, "missing or unknown"),
        ({"colour": "red"}, "missing or unknown .*colour"),
    ],
)
def test_another_format_is_refused_in_a_sentence(change: dict[str, Any], sentence: str) -> None:
    record = json.loads(report().to_json()) | change
    with pytest.raises(ValueError, match=sentence):
        Report.from_json(json.dumps(record))


def test_text_that_is_no_report_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON"):
        Report.from_json("{")
    with pytest.raises(ValueError, match="format_version is None"):
        Report.from_json("[]")


# Tables


def test_method_rows_are_exact_where_it_counts() -> None:
    rows = method_rows([DENSE, FEDERATED, replace(POOLED, perplexity={"speeches": 12_345.6})])
    assert rows[0] == ["dense", "60.00", "15.00", "30.00", "0.0300", "0.00", "0.00"]
    assert rows[1] == ["fedspa", "250.00", "40.00", "100.00", "60.0010", "70.00", "0.0123"]
    assert rows[2][:4] == ["centralised", "–", "12,346", "12,346"]


def shown(table: Any) -> str:
    buffer = io.StringIO()
    Console(file=buffer, width=200, color_system=None).print(table)
    return buffer.getvalue()


def test_tables_show_names_as_they_are() -> None:
    methods = shown(method_table([replace(DENSE, name="[red]dense[/red]")], title="[b]all[/b]"))
    assert "[red]dense[/red]" in methods and "[b]all[/b]" in methods
    assert all(word in methods for word in ("novel", "geometric mean", "sparsity %", "MB up"))
    clients = shown(client_table([client(HOSTILE), client(loss=0.0)]))
    assert HOSTILE in clients and "0–2, 5; 1" in clients and "60.0000" in clients


def test_the_surroundings_are_named_without_the_host() -> None:
    import platform

    assert {"python", "torch"} <= set(versions())
    assert {"cpu", "cores", "platform"} <= set(machine())
    assert platform.node() not in machine()["platform"].split()
    assert peak_memory() > 10_000_000


# The page


class Page(HTMLParser):
    """Collects what a browser would see: text, tags, and every address that it would ask for."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.pictures: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [values["id"] or ""] if "id" in values else []
        if tag == "svg":
            self.pictures.append(values["aria-label"] or "")
        for name in ("src", "href", "xlink:href"):
            assert (values.get(name) or "#").startswith("#"), f"{tag} asks for {values[name]}"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page(tmp_path: Path, shown: Report) -> tuple[Page, str]:
    write_html(shown, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    return Page(html), html


def test_the_page_says_the_result_and_draws_it(tmp_path: Path) -> None:
    parsed, html = page(tmp_path, report())
    text = " ".join("".join(parsed.text).split())
    assert (
        "Small-1M, pruned to 60.0000 % by 2 clients: perplexity 100.00 on 2 domains "
        "(geometric mean), against 30.00 dense and 80.00 with all data pooled." in text
    )
    for expected in (
        "60.0010",
        "3 min 23 s",
        "1.00 GiB",
        "1,234,567",
        "model.layers.0.conv.weight",
    ):
        assert expected in text
    assert [label.split(":")[0] for label in parsed.pictures] == [
        "Perplexity on geometric mean by method",
        "Perplexity on novel by method",
        "Perplexity on speeches by method",
        "Pruned by every client, before the expansion",
        "All clients agree, to keep or to prune",
        "Sent and received by each client",
    ]
    assert len(parsed.ids) == len(set(parsed.ids))


def test_the_page_asks_for_nothing(tmp_path: Path) -> None:
    parsed, html = page(tmp_path, report())
    assert not {"script", "link", "iframe", "img"} & set(parsed.tags)
    addresses = set(re.findall(r"https?://[^\"' )]+", html))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in html


def test_colours_are_left_to_the_style_sheet(tmp_path: Path) -> None:
    _, html = page(tmp_path, report())
    drawings = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert "var(--result)" in drawings and "var(--heat" in drawings
    assert re.findall(r"#[0-9a-f]{6}\b", drawings) == []
    used = set(re.findall(r"var\((--[\w-]+)\)", html))
    assert used <= set(re.findall(r"(--[\w-]+):", html))


def test_names_are_shown_and_never_run(tmp_path: Path) -> None:
    hostile = report(
        clients=(client(HOSTILE), client("$\\frac$")),
        methods=(DENSE, replace(FEDERATED, name=HOSTILE, perplexity={HOSTILE: 3.0})),
        model={"name": HOSTILE},
        result=HOSTILE,
        layers=(layer(name=HOSTILE),),
        unprunable=(HOSTILE,),
    )
    parsed, _ = page(tmp_path, hostile)
    assert "script" not in parsed.tags
    assert "".join(parsed.text).count(HOSTILE) >= 3


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    assert page(tmp_path, report())[1] == page(tmp_path, report())[1]
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("shown", "pictures"),
    [
        (Report({}, {}, (), (), ()), 0),
        (report(methods=(), result=None), 3),
        (report(methods=(replace(DENSE, perplexity={"novel": 8.0}),), result=None), 4),
        (report(methods=(replace(DENSE, perplexity={"novel": math.inf}),), result=None), 4),
        (report(methods=(replace(DENSE, perplexity={}),), result=None), 3),
        (report(result="not there"), 3),
        (report(layers=(layer(votes=()),)), 4),
        (report(layers=(layer(sparsity=0.5), layer(1))), 7),
        (report(layers=(layer(clients=1, votes=(60, 40)),), clients=(client(),)), 5),
        (report(clients=(client(bytes_up=0, bytes_down=0),)), 5),
        (report(layers=(layer(0), layer(0, round=1))), 6),
    ],
    ids=[
        "nothing",
        "no methods",
        "one domain",
        "infinite perplexity",
        "unmeasured",
        "unknown result",
        "no votes",
        "uneven sparsity",
        "one client, one block",
        "no traffic",
        "two rounds",
    ],
)
def test_what_is_missing_is_left_out(tmp_path: Path, shown: Report, pictures: int) -> None:
    parsed, _ = page(tmp_path, shown)
    assert len(parsed.pictures) == pictures


def test_a_large_run_stays_readable(tmp_path: Path) -> None:
    names = [f"experts.{expert}.{part}" for expert in range(8) for part in ("up", "down", "gate")]
    large = report(
        layers=tuple(layer(block, name=name) for block in range(80) for name in names),
        clients=tuple(client(f"client {index}") for index in range(200)),
    )
    parsed, html = page(tmp_path, large)
    assert "experts.*.up" in "".join(parsed.text)
    assert "Numbers of 1000 layers, of 1920" in " ".join("".join(parsed.text).split())
    assert len(html) < 1_500_000
