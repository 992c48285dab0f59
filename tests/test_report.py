"""The report: an honest verdict, every number on the page, nothing from outside, and a browser's opinion."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gflowgr.report import Chart, Comparison, Estimate, Example, Item, Report, Row, render, verdict, write

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
NASTY = "<script>alert('x')</script> & \"Sons\" (1999)"
VOID = {"meta", "link", "br", "img", "wbr"}


def a_row(name: str, value: float, **others: float | None) -> Row:
    metrics = {"ndcg@10": Estimate(value, value - 0.01, value + 0.01)}
    metrics |= {metric.replace("_at_", "@"): Estimate(number) for metric, number in others.items()}
    return Row(name, f"What {name} is.", metrics, 1_234_000, 12.0, 34.0)


def a_report(ours: float = 0.08, *comparisons: Comparison) -> Report:
    rows = [
        a_row("SASRec", 0.05, gini_at_10=0.9, nll=7.25),
        a_row("Control <1>", 0.04, gini_at_10=0.7, nll=None),
        a_row("Ours", ours, gini_at_10=0.8, nll=6.5),
    ]
    given = comparisons or (
        Comparison("SASRec", 0.03, 0.01, 0.05),
        Comparison("Control <1>", 0.04, 0.02, 0.06),
    )
    return Report(
        title=f"Report on {NASTY}",
        facts="100 ratings.",
        subject="Ours",
        control="Control <1>",
        metric="ndcg@10",
        level=0.95,
        rows=rows,
        comparisons=list(given),
        charts=[
            Chart(
                "NDCG@10",
                "contexts",
                "NDCG",
                {"Ours": [(0.0, 0.01), (1.0, 0.08)], "Control <1>": [(1.0, 0.04)]},
            ),
        ],
        mass={"random": Estimate(0.01, 0.005, 0.02), "policy": Estimate(0.4)},
        mass_note="Three items.",
        time_shares={"Ours": {"forward": 0.4, "rest": 0.6}, "Control <1>": {"forward": 0.5, "rest": 0.5}},
        examples=[
            Example(
                "User 7",
                [Item(NASTY), Item("Alien (1979)", "Horror")],
                Item("Heat (1995)", "Crime"),
                {"Ours": [Item("Jaws (1975)"), Item("Heat (1995)", "Crime")], "SASRec": [Item("Big (1988)")]},
                {"Ours": 1, "SASRec": None},
            )
        ],
        examples_note="At random.",
        notes=["Read it with care."],
        settings={"Budget": {"steps": 3, "note": NASTY}},
        versions={"torch": "2"},
    )


class Page(HTMLParser):
    """Checks that tags close in order, and keeps what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def test_leads_only_if_ahead_of_every_other() -> None:
    lead, gain = verdict(a_report())
    assert lead.startswith("Ours leads: its NDCG@10 of .0800")
    assert "+.0300 over the next best, SASRec (95% interval +.0100 to +.0500)" in lead
    assert gain.startswith("Over Control <1>, which had the same budget, it gains +.0400 NDCG@10, +100% ")
    assert gain.endswith("(95% interval +.0200 to +.0600).")


@pytest.mark.parametrize(
    ("sasrec", "control", "says"),
    [
        (
            (0.01, -0.01, 0.03),
            (0.02, 0.01, 0.03),
            "highest NDCG@10, .0800, but is not safely ahead of SASRec",
        ),
        ((0.03, 0.01, 0.05), (0.04, -0.01, 0.09), "not safely ahead of Control <1>"),
        (
            (-0.03, -0.05, -0.01),
            (0.02, 0.01, 0.03),
            "does not lead: SASRec has the higher NDCG@10, .0500 against .0800",
        ),
        (
            (-0.01, -0.03, 0.01),
            (0.02, 0.01, 0.03),
            "does not lead: SASRec has NDCG@10 .0500 against .0800; the difference",
        ),
    ],
)
def test_does_not_claim_a_lead_it_does_not_have(
    sasrec: tuple[float, float, float], control: tuple[float, float, float], says: str
) -> None:
    lead = verdict(a_report(0.08, Comparison("SASRec", *sasrec), Comparison("Control <1>", *control)))[0]
    assert says in lead
    assert "leads" not in lead


@pytest.mark.parametrize(
    ("interval", "says"),
    [
        ((0.01, -0.02, 0.04), "shows no sure difference"),
        ((-0.02, -0.03, -0.01), "it loses \N{MINUS SIGN}.0200"),
    ],
)
def test_says_what_the_control_shows(interval: tuple[float, float, float], says: str) -> None:
    report = a_report(0.08, Comparison("SASRec", 0.03, 0.01, 0.05), Comparison("Control <1>", *interval))
    assert says in verdict(report)[1]


def test_nothing_on_the_page_comes_from_outside() -> None:
    page = Page(render(a_report()))
    sources = [value or "" for _, name, value in page.attributes if name in ("src", "href", "srcset", "data")]
    assert len(sources) >= 5
    assert all(source.startswith("data:") for source in sources)
    assert "@import" not in render(a_report())
    assert re.findall(r"url\(", render(a_report())) == []


def test_titles_are_escaped_and_shown_as_they_are() -> None:
    text = render(a_report())
    assert "<script" not in text
    words = "".join(Page(text).words)
    assert words.count(NASTY) >= 3
    assert "Control <1>" in words


def test_every_picture_says_in_words_what_it_shows() -> None:
    page = Page(render(a_report()))
    pictures = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert len(pictures) == 4
    assert all(pictures)


def test_the_table_shows_all_numbers_and_marks_the_best() -> None:
    text = render(a_report())
    table = text[text.index("<table") : text.index("</table>")]
    assert re.findall(r'<td class="best">([^<]*)', table) == [".7000", ".0800", "6.50"]
    assert "<small>.070\N{EN DASH}.090</small>" in table
    assert table.count("<td>\N{EN DASH}</td>") == 1
    assert table.count("1,234 k") == 3
    assert table.count("34 in all") == 3


def test_a_hit_is_marked_where_it_is() -> None:
    text = render(a_report())
    assert re.findall(r'<span class="hit">✓ ([^<]*)</span>', text) == ["Heat (1995)"]


def test_the_same_report_gives_the_same_file(tmp_path: Path) -> None:
    write(a_report(), tmp_path / "a.html")
    write(a_report(), tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".html"] == []


def test_the_data_tell_the_same(tmp_path: Path) -> None:
    data = json.loads(a_report().to_json())
    assert data["verdict"] == verdict(a_report())
    assert data["rows"][2]["metrics"]["ndcg@10"]["value"] == 0.08
    assert data["examples"][0]["hits"] == {"Ours": 1, "SASRec": None}


def test_parts_that_are_not_there_leave_no_section() -> None:
    bare = replace(a_report(), charts=[], mass={}, time_shares={}, examples=[])
    text = render(bare)
    Page(text)
    assert all(heading not in text for heading in ("Training</h2>", "Recommendations", "Where the time"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subject": "Theirs"}, "subject is 'Theirs'"),
        ({"control": "Theirs"}, "control is 'Theirs'"),
        ({"comparisons": []}, "each other row once"),
        ({"metric": "recall@5"}, "lacks the metric 'recall@5'"),
        ({"rows": [a_row("Ours", 0.1)] * 2}, "names of their own"),
    ],
)
def test_a_report_that_does_not_fit_together_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(a_report(), **change)  # type: ignore[arg-type]


def browse(path: Path, profile: Path, width: int) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    return subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={profile}",
            f"--window-size={width},900",
            "--enable-logging=stderr",
            "--virtual-time-budget=5000",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_it_without_a_complaint(tmp_path: Path, width: int) -> None:
    # The page has no script; this one asks the browser what it made of it.
    question = """<script>addEventListener("load", () => {
      const page = document.documentElement, pictures = [...document.images];
      page.dataset.pictures = pictures.filter(p => p.complete && p.naturalWidth > 0).length;
      page.dataset.overflow = page.scrollWidth - innerWidth;
      page.dataset.rows = document.querySelectorAll("#results tbody tr").length;
    });</script>"""
    path = tmp_path / "report.html"
    path.write_text(render(a_report()).replace("</body>", question + "</body>"), encoding="utf-8")
    seen = browse(path, tmp_path / "profile", width)
    assert seen.returncode == 0, seen.stderr
    assert "CONSOLE" not in seen.stderr
    asked = dict(re.findall(r'data-(pictures|overflow|rows)="([^"]*)"', seen.stdout))
    assert asked["pictures"] == "4"
    assert asked["rows"] == "3"
    assert int(asked["overflow"]) <= 0
