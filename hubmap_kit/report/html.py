"""Self-contained HTML pages: pictures travel as data URIs, nothing is fetched, light and dark follow the reader's own
setting.

A page is a list of sections, a section a list of blocks: `Note`, `Table`, `Picture`, `Gallery`. Text is escaped.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jinja2
from PIL import Image

from hubmap_kit.files import write_text

JPEG_QUALITY = 90
_SLUG = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True)
class Note:
    """A paragraph; `warn` sets it off."""

    text: str
    warn: bool = False
    kind: ClassVar[str] = "note"


@dataclass(frozen=True)
class Swatch:
    """A table cell with a patch of a colour before its text; `rgb` in 0..255."""

    rgb: tuple[int, int, int]
    text: str

    @property
    def colour(self) -> str:
        """The colour as CSS writes it."""
        return "#{:02x}{:02x}{:02x}".format(*self.rgb)


Cell = str | Swatch


@dataclass(frozen=True)
class Table:
    """Rows under a header; columns from `text_columns` on hold numbers and are set flush right."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    text_columns: int = 1
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Picture:
    """A drawing by its data URI, with another one for dark pages if need be; `alt` says in words what it shows."""

    light: str
    alt: str
    caption: str = ""
    dark: str = ""
    kind: ClassVar[str] = "picture"


@dataclass(frozen=True)
class Gallery:
    """Small pictures side by side, each with its caption."""

    items: Sequence[Picture]
    caption: str = ""
    kind: ClassVar[str] = "gallery"


Block = Note | Table | Picture | Gallery


@dataclass(frozen=True)
class Section:
    """A heading and its blocks."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """The name that the list of contents links to."""
        return _SLUG.sub("-", self.title.lower()).strip("-")


def problem_sections(problems: Sequence[str]) -> list[Section]:
    """A section that lists what could not be read; none without problems."""
    return [Section("Left out", [Note(problem, warn=True) for problem in problems])] if problems else []


def data_uri(data: bytes, mime: str) -> str:
    """Bytes as a URI that needs no file."""
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"


def encode_picture(picture: Image.Image, form: str) -> str:
    """A picture as a data URI; `form` is JPEG or PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, form, quality=JPEG_QUALITY)  # PNG takes no notice of the quality
    return data_uri(buffer.getvalue(), f"image/{form.lower()}")


def page(title: str, lead: str, sections: Sequence[Section], sortable: bool = False) -> str:
    """The HTML of a page; `lead` is the paragraph under the title.

    `sortable`: tables of three rows and more sort by a click on a column's name.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hubmap_kit.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html.j2")
    return template.render(title=title, lead=lead, sections=sections, sortable=sortable)


def write_page(path: str | Path, title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write a page atomically, as UTF-8."""
    write_text(path, page(title, lead, sections))
