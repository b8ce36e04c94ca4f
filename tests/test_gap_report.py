"""The report on two modalities: what it says, its tables, pictures, page and files."""

import errno
import json
import os
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mmfast
from mmfast.gap.measures import Gap
from mmfast.gap.report import pictures
from mmfast.gap.report.page import DARK, adaptive
from mmfast.gap.report.tables import as_text, tables
from mmfast.gap.report.words import answers, captions, clean, listed, number, percent, short
from mmfast.gap.survey import Survey, Ways, survey

# what a file may be called
NAMES = ("<script>alert(1)</script> & 'x'.npy", "$y_2$ 日\n#333333.npy")


def both_forms(*names):
    return {f"{name}.{form}" for name in names for form in ("png", "svg")}


OUTPUTS = both_forms("pairs", "cone", "cloud", "ranks", "landscape")
OUTPUTS |= {"report.html", "report.json"}


def sides(N=60, D=16, apart=0.6):
    """Pairs that are alike, and a gap along the first axis."""
    random = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(N, D, generator=random), dim=1)
    y = F.normalize(x + 0.2 * torch.randn(N, D, generator=random), dim=1)
    x[:, 0] += apart
    y[:, 0] -= apart
    return x, y


@pytest.fixture(scope="module")
def found():
    return survey(*sides())


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "deep" / "out"
    return mmfast.gap_report(*sides(), out, names=NAMES), out


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without the seconds that pictures take."""
    monkeypatch.setattr(pictures, "rendered", lambda figure, form: b"<svg><defs></defs></svg>")


def said(found, question):
    """The figure and the text of an answer."""
    (answer,) = (answer for answer in answers(found) if question in answer.question)
    return answer.figure, answer.text


def with_means(found, x, y, rows):
    """The survey of sides with these means, [D] each, all of it in the first two axes."""
    x, y = (F.pad(torch.tensor([mean, 0.0], dtype=torch.float64), (0, 14)) for mean in (x, y))
    sides = (replace(found.x, mean=x, rows=rows), replace(found.y, mean=y, rows=rows))
    return replace(found, x=sides[0], y=sides[1], gap=Gap(x, y))


@pytest.mark.parametrize(
    ("x", "y", "rows", "verdict", "share"),
    [
        # the mean squared distance is 2 - 2 <x, y>
        (0.6, -0.6, 6000, "A wide gap.", 1.44 / 2.72),
        (0.5, 0.0, 6000, "A moderate gap.", 0.25 / 2),
        (0.2, 0.0, 6000, "A narrow gap.", 0.04 / 2),
        # chance: the root of (1 - 0.1^2 + 1) / 60
        (0.1, 0.0, 60, "No gap to speak of: 0.182 is", 0.01 / 2),
    ],
)
def test_says_how_wide_the_gap_is(found, x, y, rows, verdict, share):
    figure, text = said(with_means(found, x, y, rows), "gap?")
    assert text.startswith(verdict)
    assert percent(share) in text
    assert figure == number(x - y)


@pytest.mark.parametrize(
    ("means", "verdict"),
    [
        ((0.6, 0.5), "Each side is a narrow cone."),
        ((0.3, 0.2), "Each side is a wide cone."),
        ((0.19, 0.0), "Neither side is a cone."),
        ((0.6, 0.3), "x is a narrow cone, y is a wide cone."),
    ],
)
def test_says_whether_it_is_a_cone(found, means, verdict):
    x, y = (
        replace(side, name=name, cosines=replace(side.cosines, moments=(mean, 0.1, 0.0, 0.0)))
        for side, name, mean in zip((found.x, found.y), "xy", means, strict=True)
    )
    figure, text = said(replace(found, x=x, y=y), "cone")
    assert text.startswith(verdict)
    assert "0 ± 0.250" in text
    assert figure == f"{means[0]:.3f} and {means[1]:.3f}"


def with_losses(found, best):
    """The survey whose lowest loss is at these shifts, one for each temperature."""
    shifts = found.landscape.shifts
    losses = 1 + (shifts[:, None] - torch.tensor(best, dtype=torch.float64)).square()
    landscape = replace(found.landscape, image_to_text=losses, text_to_image=losses)
    return replace(found, landscape=landscape)


def test_says_what_a_narrower_gap_would_do_to_the_loss(found):
    figure, text = said(with_losses(found, [0, 0, 0.25, 0.5, 0, -0.5]), "narrower")
    assert figure == "at 2 of 6 temperatures"
    assert "No shift along the gap lowers the loss at temperatures 1/100, 1/50 and 1/10." in text
    # 1.25 comes down to 1
    fifth = percent(0.2)
    assert (
        f"narrower gap lowers the loss at temperatures 1/30 and 1/20: by {fifth} for 1/20" in text
    )
    assert f"A wider gap lowers the loss at temperature 1: by {fifth}, at a distance of" in text
    assert "chunks of 50" in text
    assert said(with_losses(found, [0] * 6), "narrower")[0] == "no"
    assert said(with_losses(found, [0.25] * 6), "narrower")[0] == "yes"


def test_says_how_retrieval_compares_with_chance(found):
    way = found.retrieval.x_to_y

    def retrieval(first, labelled=False):
        ways = Ways(replace(way, recall={1: first / 60, 5: 0.5, 10: 0.75}), way)
        return said(replace(found, retrieval=ways, labelled=labelled), "retrieval")[1]

    # a guess finds one of 60 and no more than 4 within three standard deviations
    assert "no better than chance" in retrieval(4)
    assert "5 times as often as by chance" in retrieval(5)
    # of several right ones the chance is not known
    assert "chance" not in retrieval(5, labelled=True)
    assert percent(0.75) in retrieval(5)


def test_says_nothing_of_what_was_not_measured(found, undrawn):
    bare = replace(
        found,
        paired=0,
        pairs=None,
        alignment=float("nan"),
        landscape=None,
        retrieval=Ways(None, None),
        relative_alignment=Ways(float("nan"), float("nan")),
    )
    assert [answer.question[:8] for answer in answers(bare)] == ["How wide", "Is it a "]
    assert set(pictures.drawn(bare)) == both_forms("pairs", "cone", "cloud")
    assert "nan" not in as_text(tables(bare))
    cells = dict(tables(bare)[2].rows)
    assert cells["median rank"] == ("\N{EN DASH}",) * 2


def test_pictures_without_histogram_or_second_axis(undrawn):
    flat = survey(*sides(D=1), bins=0)
    assert set(pictures.drawn(flat)) == both_forms("ranks")


def test_numbers_and_names_in_words():
    assert number(-0.0004) == "0.000"
    assert number(-1.25) == "\N{MINUS SIGN}1.250"
    assert number(float("nan")) == percent(float("nan")) == "\N{EN DASH}"
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert short("abcdefghij", 7) == "abc…hij"
    assert short("abcdefg", 7) == "abcdefg"
    assert clean("a\nb\x1b\udcff.npy") == "a?b??.npy"


def test_tables_hold_the_numbers_and_are_aligned(found):
    made = tables(found)
    between = dict(made[1].rows)
    assert between["gap"] == (number(float(found.gap.distance)),)
    assert between["loss at scale 100"] == (number(found.symmetric_loss),)
    assert dict(made[0].rows)["rows"] == ("60", "60")
    lines = as_text(made).splitlines()
    assert len({len(line) for line in lines if line[:4] in ("rows", "mean", "reca")}) == 2
    rest = found.rest
    assert made[3].rows[0][1][0] == number(float(found.landscape.symmetric[rest, 0]))


def test_densities_are_shares_in_bins_that_fit(found):
    for stats in (found.pairs, found.others, found.x.cosines):
        # a bin more at both ends for what lies outside
        outside = replace(stats, above=2, below=1, count=stats.count + 3)
        edges, heights = pictures._density(outside)
        assert heights @ np.diff(edges) == pytest.approx(1)
        assert edges[0] == -1
        assert edges[-1] == 1
    # few pairs: wide bins; many: the finest there are
    assert len(pictures._density(found.pairs)[1]) < 128
    many = replace(found.others, count=10**12)
    assert len(pictures._density(many)[1]) == 256


def test_cloud_shows_the_gap(found):
    axes = pictures.plot_cloud(found).axes[0]
    x, y = (axes.collections[i].get_offsets()[0] for i in (1, 3))
    arrow = next(text for text in axes.texts if text.get_text() == "")
    assert list(arrow.xy) == pytest.approx(list(x))
    assert list(arrow.xyann) == pytest.approx(list(y))
    in_plane = np.linalg.norm(x - y)
    assert in_plane == pytest.approx(float((found.pca.axes @ found.gap.vector).norm()))
    assert number(in_plane) in captions(found)["cloud"]
    assert x[0] > y[0]


def test_landscape_marks_every_minimum(found):
    shifts = found.landscape.shifts
    # the lowest at rest and a second one at -4
    losses = torch.minimum(shifts.square(), (shifts + 4).square() + 1)[:, None].repeat(1, 6)
    landscape = replace(found.landscape, image_to_text=losses, text_to_image=losses)
    figure = pictures.plot_landscape(replace(found, landscape=landscape))
    assert len(figure.axes) == 6
    for axes in figure.axes:
        rest, _, lowest, others = axes.lines
        gap = float(found.gap.distance)
        assert rest.get_xdata()[0] == pytest.approx(gap)
        assert lowest.get_xydata().ravel().tolist() == pytest.approx([gap, 0])
        assert others.get_ydata().tolist() == [1]


def test_ranks_end_at_all(found):
    there, back, chance = pictures.plot_ranks(found).axes[0].lines
    for line in (there, back, chance):
        assert line.get_xydata()[-1].tolist() == [60, 1]
    assert there.get_ydata()[0] == found.retrieval.x_to_y.recall[1]
    assert chance.get_ydata()[0] == pytest.approx(1 / 60)
    assert len(pictures.plot_ranks(replace(found, labelled=True)).axes[0].lines) == 2


def test_files_of_a_report(report):
    made, out = report
    assert {path.name for path in out.iterdir()} == OUTPUTS
    for path in out.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    for path in out.glob("*.svg"):
        assert ET.parse(path).getroot().tag.endswith("svg")
    assert (made.x.name, made.y.name) == (NAMES[0], "$y_2$ 日?#333333.npy")


def test_json_is_the_survey(report):
    made, out = report
    document = json.loads((out / "report.json").read_text())
    assert document["schema"] == 1
    assert document["versions"]["mmfast"] == mmfast.__version__
    assert document["answers"] == {answer.question: answer.text for answer in answers(made)}
    assert document["inputs"]["x"][:2] == ["float32", [60, 16]]
    again = Survey.from_json(document["survey"])
    assert again.to_json() == made.to_json()
    assert as_text(tables(again)) == as_text(tables(made))


class Page(HTMLParser):
    """Every opening tag with its attributes, and the text outside of the style."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_page_is_clean_and_closed(report):
    made, out = report
    html = (out / "report.html").read_text()
    page = Page(html)
    assert page.open == []
    assert page.of("html")[0]["lang"] == "en"
    assert len(page.of("h1")) == len(page.of("title")) == len(page.of("main")) == 1
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.of("meta")
    assert len(page.of("img")) == 5
    for image in page.of("img"):
        assert image["src"].startswith("data:image/svg+xml;base64,")
        assert len(image["alt"]) > 20
    assert len(page.of("table")) == len(page.of("caption")) == 4
    assert all(head["scope"] in ("row", "col") for head in page.of("th"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    # nothing that would run or be fetched
    assert not page.of("script")
    assert not page.of("link")
    assert not any({"href", "onclick", "onload", "onerror"} & set(has) for _, has in page.tags)
    assert "url(" not in html
    # all that is said stands there, names as they are
    text = "".join(page.text)
    for answer in answers(made):
        assert answer.text in text
    assert NAMES[0] in text
    for table in tables(made):
        for name, cells in table.rows:
            assert all(cell in text for cell in (name, *cells))


def test_page_shows_notes(tmp_path, undrawn):
    x, y = sides()
    y[3] = float("nan")
    mmfast.gap_report(x, y, tmp_path, on_nan="skip", names=("x", "y"))
    page = Page((tmp_path / "report.html").read_text())
    assert "y: 1" in "".join(page.text)


def test_adaptive_pictures_follow_the_reader(report):
    svg = (report[1] / "cone.svg").read_text()
    assert "#333333.npy" in svg
    ET.fromstring(made := adaptive(svg))
    for light, dark in DARK.items():
        assert f"--c{light[1:]}: {dark};" in made
        assert made.count(light) == made.count(f"var(--c{light[1:]}, {light})")
    assert "var(--c0072b2, #0072b2)" in made


def test_same_survey_same_bytes(report):
    made, out = report
    figure = pictures.plot_cone(made)
    for form in ("png", "svg"):
        assert pictures.rendered(figure, form) == (out / f"cone.{form}").read_bytes()


def test_equal_names_are_told_apart(tmp_path, undrawn):
    for folder, rows in zip("ab", sides(), strict=True):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "rows.npy", rows.numpy())
    made = mmfast.gap_report(tmp_path / "a/rows.npy", tmp_path / "b/rows.npy", tmp_path / "out")
    assert (made.x.name, made.y.name) == ("rows.npy (first)", "rows.npy (second)")


def test_full_disk_leaves_no_half_file(tmp_path, monkeypatch, undrawn):
    (tmp_path / "report.json").write_bytes(b"of before")
    real, calls = os.fsync, []

    def fsync(file):
        calls.append(file)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left on device"):
        mmfast.gap_report(*sides(), tmp_path)
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert left.pop("report.json") == b"of before"
    assert list(left.values()) == [b"<svg><defs></defs></svg>"] * 3


def test_without_matplotlib_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(mmfast.gap.report, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pictures need matplotlib: pip install"):
        mmfast.gap_report(*sides(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_goes_on_from_an_interrupt(tmp_path, report, undrawn):
    made, _ = report
    told = []

    def stop(done, total, left):
        told.append(done / total)
        if len(told) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mmfast.gap_report(*sides(), tmp_path, names=NAMES, resume=True, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    again = []
    resumed = mmfast.gap_report(
        *sides(), tmp_path, names=NAMES, resume=True, progress=lambda done, *_: again.append(done)
    )
    assert {path.name for path in tmp_path.iterdir()} == OUTPUTS
    assert len(again) > 0
    plain = [{**one.to_json(), "seconds": 0} for one in (resumed, made)]
    assert plain[0] == plain[1]
