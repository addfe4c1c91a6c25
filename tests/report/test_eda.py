"""The page and the tables of `hubmap eda`: what they say of known data, that the page needs nothing but itself, and odd
tables.
"""

from __future__ import annotations

import base64
import csv
import gzip
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pandas as pd
import pytest
import tifffile
from scipy import ndimage

from hubmap_kit.competition import rle
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.errors import HubmapError, RleError, SlideError, TableError
from hubmap_kit.jobs.eda import Eda, eda
from hubmap_kit.report import html
from hubmap_kit.report.drawings import DARK_LINE
from hubmap_kit.report.eda_tables import PUBLISHED_OUTLINES, PUBLISHED_SLIDES

FETCHING = {"src", "srcset", "href", "data", "poster", "action", "background", "cite", "formaction", "manifest", "ping"}
Row = dict[str, str]


class Page(HTMLParser):
    """Tags with their attributes, the text of every section by its heading's id, and the tables as lists of rows of
    text.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text: dict[str, str] = {}
        self.tables: list[list[list[str]]] = []
        self.section, self.style = "", ""
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.tags.append((tag, found))
        if tag not in ("meta", "img", "source", "link", "br"):
            self.open.append(tag)
        if tag == "h2":
            self.section = found["id"]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text[self.section] = self.text.get(self.section, "") + data
        if "style" in self.open:
            self.style += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data.strip()

    def table(self, *header: str) -> dict[str, list[str]]:
        """First cell -> the others, of the table whose header begins so."""
        (found,) = [rows for rows in self.tables if tuple(rows[0][: len(header)]) == header]
        return {row[0]: row[1:] for row in found[1:]}


def page_of(done: Eda) -> Page:
    page = Page(done.page.read_text(encoding="utf-8"))
    check_alone(page)
    return page


def check_alone(page: Page) -> None:
    """Nothing on the page reaches for anything outside it, and every drawing is whole."""
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    assert "url(" not in page.style and "@import" not in page.style and "prefers-color-scheme: dark" in page.style
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert "url(" not in attributes.get("style", "")
        for name in FETCHING & set(attributes):
            check_reference(tag, attributes[name], ids)
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")


def check_reference(tag: str, value: str, ids: set[str]) -> None:
    if tag == "a":
        assert value.startswith("#") and value[1:] in ids
        return
    kind, data = re.fullmatch(r"data:(image/[a-z+]+);base64,([A-Za-z0-9+/=]+)", value).groups()
    content = base64.b64decode(data)
    if kind != "image/svg+xml":
        assert cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED) is not None
        return
    assert b"<!" not in content.replace(b"<!--", b"") and b"<?" not in content
    for node in ElementTree.fromstring(content).iter():
        assert node.tag.split("}")[-1] not in ("script", "image", "foreignObject")
        for name, text in node.attrib.items():
            if name.split("}")[-1] == "href":
                assert text.startswith("#")
            assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def frame(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype={"id": str, "ids": str})


@pytest.fixture(scope="module")
def real(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Eda:
    return eda(shared_data / "hubmap-2022" / "train.csv.gz", tmp_path_factory.mktemp("eda") / "real")


def test_the_real_slides_have_the_known_numbers(real: Eda) -> None:
    organs = real.organs.set_index("organ")
    assert (
        dict(organs["slides"])
        == dict(PUBLISHED_SLIDES)
        == {"kidney": 99, "prostate": 93, "largeintestine": 58, "spleen": 53, "lung": 48}
    )
    assert [f"{share:.1%}" for share in organs["share"]] == ["28.2%", "26.5%", "16.5%", "15.1%", "13.7%"]
    assert (100 * organs["coverage_mean"]).round(1).to_dict() == {
        "kidney": 3.0,
        "prostate": 15.4,
        "largeintestine": 19.3,
        "spleen": 10.1,
        "lung": 2.1,
    }
    assert round(100 * organs.loc["lung", "coverage_min"], 2) == 0.07


def test_the_real_units_come_near_the_outlines_that_were_drawn(real: Eda) -> None:
    drawn, organs = sum(PUBLISHED_OUTLINES.values()), real.organs.set_index("organ")
    assert drawn == 4909
    assert abs(organs["units_cut"].sum() / drawn - 1) < 0.02
    assert organs["units"].sum() < 0.98 * drawn and organs["components4"].sum() > 1.02 * drawn, (
        "plain components do not, and the page says so"
    )
    for organ, number in PUBLISHED_OUTLINES.items():
        assert abs(organs.loc[organ, "units_cut"] / number - 1) < (0.3 if organ == "lung" else 0.04)


def test_the_real_units_are_those_of_scipy(real: Eda, shared_data: Path) -> None:
    slides, units = (frame(real.page.parent / f"{name}.csv") for name in ("slides", "units"))
    csv.field_size_limit(2**31 - 1)
    with gzip.open(shared_data / "hubmap-2022" / "train.csv.gz", "rt") as handle:
        rows = list(csv.DictReader(handle))
    assert slides["id"].tolist() == [row["id"] for row in rows]
    for row in rows[5::70]:
        height, width = int(row["img_height"]), int(row["img_width"])
        flat = np.zeros(height * width, np.uint8)
        numbers = [int(part) for part in row["rle"].split()]
        for start, length in zip(numbers[::2], numbers[1::2], strict=True):
            flat[start : start + length] = 1
        labels, number = ndimage.label(flat.reshape(width, height).T, np.ones((3, 3), int))
        mine = units[units["id"] == row["id"]]
        assert sorted(mine["area_px"]) == sorted(np.bincount(labels.ravel())[1:]) and len(mine) == number
        assert mine["area_um2"].to_numpy() == pytest.approx(mine["area_px"].to_numpy() * 0.16, rel=1e-4)
        assert slides.loc[slides["id"] == row["id"], "coverage"].item() == pytest.approx(flat.mean(), rel=1e-4)


def test_the_real_page_says_what_it_lacks(real: Eda) -> None:
    page = page_of(real)
    assert page.table("organ", "outlines drawn")["all"][0] == "4,909"
    assert "no slide file was found" in page.text["colours-and-stains"]
    assert "Sex is known of 141" in page.text["donors"]
    assert page.table("organ", "male")["all"][:4] == ["89", "52", "210", "141"]
    assert page.table("height x width, px")["3000 x 3000"] == ["326", "92.9%"]
    oddities = frame(real.page.parent / "oddities.csv")
    assert {"10488 20563 14388", "24097 9470"} <= set(oddities.loc[oddities["kind"] == "known duplicate tissue", "ids"])
    assert not (real.page.parent / "sources.csv").exists()


def test_slides_with_pixels(sample_data: Path, tmp_path: Path) -> None:
    done = eda(sample_data, tmp_path / "out")
    page = page_of(done)
    assert done.files == done.slides == len(frame(tmp_path / "out" / "slides.csv"))
    sources = frame(tmp_path / "out" / "sources.csv")
    assert set(page.table("source", "organ", "slides", "tissue")) == set(sources["data_source"])
    for stain in ("stain1", "stain2"):
        vectors = sources[[f"{stain}_{colour}" for colour in ("red", "green", "blue")]].to_numpy()
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3) and (vectors > -0.2).all()
    assert (sources[["red", "green", "blue"]].to_numpy() < 240).all(), "the colour of the tissue, not of the glass"
    jpegs = [
        attributes for tag, attributes in page.tags if tag == "img" and attributes["src"].startswith("data:image/jpeg")
    ]
    assert len(jpegs) >= len(done.organs), "units are cut out of the slides"


def test_mean_colour_is_that_of_the_tissue(world: World) -> None:
    row = world.rows()[0]
    pixels = np.full((int(row["img_height"]), int(row["img_width"]), 3), 255, np.uint8)
    pixels[: len(pixels) // 4] = (150, 90, 160)
    tifffile.imwrite(world.slide(row["id"]), pixels)
    found = frame(world.run().page.parent / "slides.csv").set_index("id").loc[row["id"]]
    assert [round(found[name]) for name in ("red", "green", "blue")] == [150, 90, 160]
    assert found["tissue_share"] == pytest.approx(len(pixels) // 4 / len(pixels), abs=1e-4)


class World:
    """A private copy of small slides, to be spoilt."""

    def __init__(self, data: Path, tmp: Path) -> None:
        self.data, self.tmp = data, tmp

    def run(self) -> Eda:
        return eda(self.data, self.tmp / "out")

    def rows(self) -> list[Row]:
        csv.field_size_limit(2**31 - 1)
        with open(self.data / "train.csv", newline="") as handle:
            return list(csv.DictReader(handle))

    def edit(self, change: Callable[[list[Row]], object]) -> None:
        rows = self.rows()
        change(rows)
        with open(self.data / "train.csv", "w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def slide(self, slide_id: str) -> Path:
        return self.data / "train_images" / f"{slide_id}.tiff"

    def kinds(self) -> dict[str, list[str]]:
        """Kind of oddity -> the ids of its rows; the page is checked on the way."""
        page_of(self.run())
        table = frame(self.tmp / "out" / "oddities.csv")
        return {kind: rows["ids"].tolist() for kind, rows in table.groupby("kind")}


@pytest.fixture
def world(sample_data: Path, tmp_path: Path) -> World:
    shutil.copytree(sample_data, tmp_path / "data")
    return World(tmp_path / "data", tmp_path)


def test_oddities_are_found(world: World) -> None:
    rows = world.rows()
    of = {organ: [row for row in rows if row["organ"] == organ] for organ in ORGANS}
    ids = [row["id"] for row in rows]
    size = int(of["spleen"][0]["img_height"]) * int(of["spleen"][0]["img_width"])

    def spoil(rows: list[Row]) -> None:
        by_id = {row["id"]: row for row in rows}
        twice, same = (by_id[row["id"]] for row in of["kidney"][:2])
        same["rle"] = twice["rle"]
        by_id[of["lung"][0]["id"]]["rle"] = ""
        by_id[of["spleen"][0]["id"]]["rle"] = f"0 {size - 3}"
        prostate = by_id[of["prostate"][0]["id"]]
        prostate |= {"sex": "Female", "age": "old"}
        prostate["pixel_size"] = "0.7"

    world.edit(spoil)
    shutil.copyfile(world.slide(ids[0]), world.slide(ids[1]))
    world.slide(ids[2]).write_bytes(b"II*\0 no slide")
    world.slide(ids[3]).unlink()
    found = world.kinds()
    assert f"{of['kidney'][0]['id']} {of['kidney'][1]['id']}" in found["same mask twice"]
    assert found["empty mask"] == [of["lung"][0]["id"]]
    assert (
        of["spleen"][0]["id"] in found["mask nearly everywhere"] and of["spleen"][0]["id"] in found["run starts at 0"]
    )
    assert found["prostate of a woman"] == found["unreadable age"] == [of["prostate"][0]["id"]]
    assert of["prostate"][0]["id"] in found["unusual pixel size"]
    assert found["same picture twice"] == [f"{ids[0]} {ids[1]}"] and found["file that cannot be read"] == [ids[2]]


def test_small_fragments_and_a_file_of_another_size(world: World) -> None:
    row = world.rows()[0]
    height, width = int(row["img_height"]), int(row["img_width"])
    mask = np.zeros((height, width), np.uint8)
    mask[20:90, 20:90] = 1
    mask[120, 120] = mask[130, 130] = 1

    def change(rows: list[Row]) -> None:
        del rows[1:]
        rows[0]["rle"] = rle.encode(mask)

    world.edit(change)
    tifffile.imwrite(world.slide(row["id"]), np.full((height + 1, width, 3), 250, np.uint8))
    found = world.kinds()
    assert found["size differs from the file's"] == [row["id"]]
    units = frame(world.tmp / "out" / "units.csv")
    # The median of one square and two specks is a speck: a share of the median only speaks where most units are whole.
    assert units["area_px"].tolist() == [4900, 1, 1] and "fragments" not in found
    mask[100:170, 160:230] = mask[180:250, 20:90] = 1
    world.edit(lambda rows: rows[0].__setitem__("rle", rle.encode(mask)))
    assert world.kinds()["fragments"] == [row["id"]]
    assert frame(world.tmp / "out" / "units.csv")["fragment"].tolist() == [False] * 3 + [True] * 2


def test_a_table_without_people_units_and_slides(world: World) -> None:
    def empty(rows: list[Row]) -> None:
        for row in rows:
            row["rle"] = ""
            row.pop("age"), row.pop("sex")

    world.edit(empty)
    shutil.rmtree(world.data / "train_images")
    done = world.run()
    page = page_of(done)
    assert done.organs["units"].sum() == 0
    assert "nothing of age or sex" in page.text["donors"] and "No mask holds a unit" in page.text["shape-of-units"]


def test_a_run_without_slides_takes_the_table_of_sources_away(world: World) -> None:
    world.run()
    assert (world.tmp / "out" / "sources.csv").is_file()
    shutil.rmtree(world.data / "train_images")
    world.run()
    assert not (world.tmp / "out" / "sources.csv").exists()


def test_text_of_the_table_is_text_on_the_page() -> None:
    table = html.Table(["<td>"], [[html.Swatch((1, 2, 3), "<s>")]])
    told = html.page("<b>", "<i>", [html.Section("a & b", [html.Note("<script>x</script>"), table])])
    page = Page(told)
    check_alone(page)
    assert not {"b", "i", "s"} & {tag for tag, _ in page.tags} and page.tables == [[["<td>"], ["<s>"]]]


def cut_off(data: Path) -> None:
    (data / "train.csv").write_bytes((data / "train.csv").read_bytes()[:-40])


def rewrite(change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda data: (data / "train.csv").write_text(change((data / "train.csv").read_text()))


@pytest.mark.parametrize(
    ("spoil", "kind", "said"),
    [
        (lambda data: (data / "train.csv").unlink(), TableError, "neither train.csv nor train.csv.gz"),
        (rewrite(lambda text: text.splitlines()[0] + "\n"), TableError, "no rows"),
        (rewrite(lambda text: ""), TableError, "is empty"),
        (rewrite(lambda text: text.replace("organ,", "tissue,", 1)), TableError, "lacks the column organ"),
        (rewrite(lambda text: text.replace("kidney", "kidny", 1)), TableError, "did you mean kidney"),
        (rewrite(lambda text: text + text.splitlines()[1] + "\n"), TableError, "repeats the id"),
        (rewrite(lambda text: re.sub(r",(\d+ \d+)[^,]*,", r",99999999 5,", text, count=1)), RleError, "goes beyond"),
        (cut_off, TableError, "cut off"),
        (lambda data: (data / "train.csv").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe"), TableError, "is not text"),
    ],
)
def test_odd_tables_end_in_one_sentence(
    world: World, spoil: Callable[[Path], object], kind: type[HubmapError], said: str
) -> None:
    spoil(world.data)
    with pytest.raises(kind, match=re.escape(said)) as stop:
        world.run()
    assert "\n" not in str(stop.value) and "train.csv" in str(stop.value) and not (world.tmp / "out").exists()


def test_a_folder_of_slides_that_is_not_there(world: World) -> None:
    with pytest.raises(SlideError, match="not a folder"):
        eda(world.data, world.tmp / "out", world.tmp / "nowhere")


def test_an_output_that_is_a_file(world: World) -> None:
    (world.tmp / "out").write_text("mine")
    with pytest.raises(TableError, match="is a file"):
        world.run()
    assert (world.tmp / "out").read_text() == "mine"


def test_what_a_dark_page_draws_stands_out_from_it(sample_data: Path, tmp_path: Path) -> None:
    """Every colour of data and text, thinned by its opacity, has a contrast of 3 or more to the page, as WCAG 2 asks of
    graphics.
    """
    page = page_of(eda(sample_data, tmp_path / "eda"))
    paper = re.search(r"prefers-color-scheme: dark.*?--paper: (#\w{6})", page.style, re.DOTALL)[1]
    styles = []
    for _, attributes in page.tags:
        if attributes.get("media") == "(prefers-color-scheme: dark)" and "svg" in attributes["srcset"][:30]:
            styles += re.findall(r'style="([^"]*)"', base64.b64decode(attributes["srcset"].split(",")[1]).decode())
    assert len(styles) > 100
    for style in styles:
        share = float(re.search(r"opacity: ([\d.]+)|$", style)[1] or 1)
        for colour in re.findall(r"(?:fill|stroke): (#\w{6})", style):
            seen = [share * over + (1 - share) * under for over, under in zip(rgb(colour), rgb(paper), strict=True)]
            assert colour == DARK_LINE or (luminance(seen) + 0.05) / (luminance(rgb(paper)) + 0.05) >= 3, style


def rgb(text: str) -> list[float]:
    return [int(text[place : place + 2], 16) / 255 for place in (1, 3, 5)]


def luminance(colour: list[float]) -> float:
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
