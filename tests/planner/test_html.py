"""The page: well-formed, whole, without anything from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from shardlab.planner import DenseModel, PlanSettings, plan
from shardlab.planner.html import plan_to_html
from shardlab.planner.html_charts import placement_map, stacked_bar, stacked_columns
from shardlab.planner.rate import rate
from shardlab.planner.request import build_request
from shardlab.planner.result import PlanResult
from shardlab.specs import EmbeddingBagConfig
from tests.planner.fleets import GIB, generated_fleet, machine, tiered

_EMPTY = {"meta", "input", "rect", "line", "br"}


class Page(HTMLParser):
    """Checks that every element is closed where it should be, and keeps the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _EMPTY or tag == "rect":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def small() -> PlanResult:
    tables = [EmbeddingBagConfig(10**6, 64, "<user> & co"), EmbeddingBagConfig(50, 8, "tiny")]
    return plan(tables, "2xcpu", 512, settings=PlanSettings(dense=DenseModel(bytes=10**6)))


@pytest.fixture(scope="module")
def fleet() -> PlanResult:
    return plan(generated_fleet(80), tiered("8x8xh100", 2 * GIB, 100 * GIB), 256)


def test_every_table_and_rank_is_on_the_page(small: PlanResult) -> None:
    page = Page(plan_to_html(small))
    for name in ("<user> & co", "tiny"):
        assert name in page.words
    assert "2 tables on 2xcpu" in page.text
    assert "rank 0" in page.words
    assert "rank 1" in page.words
    assert "1,000,000 x 64" in page.words
    assert "samples per second" in page.words


def test_large_fleets_get_columns_and_all_their_tables(fleet: PlanResult) -> None:
    page = Page(plan_to_html(fleet))
    assert all(entry.table in page.words for entry in fleet.tables)
    assert "64 ranks" in page.text
    assert "ddr of the hosts" in page.text
    assert "The 60 tables of most work." in page.text
    assert "not their first choice" in page.text


@pytest.mark.parametrize("which", ["small", "fleet"])
def test_nothing_comes_from_elsewhere(which: str, request: pytest.FixtureRequest) -> None:
    text = plan_to_html(request.getfixturevalue(which))
    page = Page(text)
    assert not re.search(r"https?:|//\w|@import|url\(", text)
    assert not [attrs for _, attrs in page.tags if {"src", "href"} & attrs.keys()]
    assert "<title>" in text


def test_a_plan_that_does_not_fit_warns(small: PlanResult) -> None:
    tables = [EmbeddingBagConfig(10**6, 64, "<user> & co"), EmbeddingBagConfig(50, 8, "tiny")]
    request = build_request(tables, machine("2xcpu", 10**7), 512, "row_wise_adagrad",
                            PlanSettings())
    page = Page(plan_to_html(rate(small.plan, request)))
    assert "Does not fit: rank 0: hbm holds" in page.text
    assert "the plan was given" in page.text


def test_bars_fill_their_width() -> None:
    bar = stacked_bar([("a", 1.0, "one"), ("b", 0.0, "none"), ("a", 3.0, "three")], 4.0,
                      {"a": "#111", "b": "#222"})
    assert re.findall(r'x="([\d.]+)" width="([\d.]+)"', bar) == [("0.0", "250.0"),
                                                                  ("250.0", "750.0")]
    assert "<title>none" not in bar
    assert "<rect" not in stacked_bar([("a", 0.0, "")], 0.0, {"a": "#111"})


def test_columns_stand_on_the_ground() -> None:
    chart = stacked_columns([[("a", 1.0, "x"), ("a", 1.0, "y")]], 4.0, {"a": "#111"}, limit=3.0)
    assert re.findall(r' y="([\d.]+)"', chart) == ["75.00", "50.00"]
    assert 'y1="25.00"' in chart


def test_the_map_has_a_cell_for_every_place() -> None:
    name = "a_name_that_is_longer_than_any_column"
    chart = placement_map([(name, {0: 1.0, 3: 0.0}), ("b", {1: 0.5})], 4)
    assert chart.count('class="cell"') == 3
    assert f"<title>{name}</title>" in chart
    assert "…" in chart
