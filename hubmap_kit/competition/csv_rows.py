"""Reading CSV files strictly: every row has every column, and errors name the file, the line, and what to do."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hubmap_kit.errors import TableError

_WIDEST_FIELD = 2**31 - 1  # a run-length string may be far longer than the 128 KiB that the csv module allows


def read_rows(path: str | Path, required: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """The rows of a `.csv` or `.csv.gz` file as (line number, column -> text); the header is line 1 and gives the
    columns.

    Raises TableError when the file is missing, unreadable, empty, not UTF-8 CSV, lacks a required column, names a
    column twice, or a row has more or fewer fields than the header (a sign of a file that was cut off).
    """
    path = Path(path)
    with wide_fields():
        reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
        try:
            lines = [(reader.line_num, fields) for fields in reader if fields]
        except csv.Error as error:
            raise TableError(
                f"{path}, line {reader.line_num} is not CSV ({error}); download or write the file again"
            ) from error
    if not lines:
        raise TableError(f"{path} is empty, but a header and rows were expected; download or write the file again")
    header = lines[0][1]
    _check_header(path, header, required)
    for line, fields in lines[1:]:
        if len(fields) != len(header):
            raise TableError(
                f"{path}, line {line} has {len(fields)} fields, but the header has {len(header)}; "
                "the file may be cut off, download or write it again"
            )
    return [(line, dict(zip(header, fields, strict=True))) for line, fields in lines[1:]]


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise TableError(
            f"{path} does not exist, but a table was expected there; check the path or download the file"
        ) from error
    except UnicodeDecodeError as error:
        raise TableError(
            f"{path} is not text, but UTF-8 CSV was expected; check the path or download the file again"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise TableError(
            f"{path} cannot be read as a table ({error}); check the path or download the file again"
        ) from error


def _check_header(path: Path, header: list[str], required: Sequence[str]) -> None:
    found = ", ".join(header)
    found = found if len(found) <= 120 else found[:117] + "..."
    missing = [name for name in required if name not in header]
    if missing:
        raise TableError(
            f"{path} lacks the column {', '.join(missing)}, found the columns {found}; check that this is the right CSV"
            " file and that its first line is the header"
        )
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise TableError(f"{path} names the column {', '.join(twice)} more than once; keep one of them")


@contextmanager
def wide_fields() -> Iterator[None]:
    """Let the csv module take fields of any length within the block."""
    before = csv.field_size_limit(_WIDEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)
