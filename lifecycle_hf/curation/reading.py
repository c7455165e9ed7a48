"""Read documents from files: JSON lines, CSV, Parquet, WARC and plain text, also compressed by gzip or zstd.

datatrove's readers leave out the rest of a file at its first bad byte and only log it. These tell each fault with its
place, and several tasks can share a file.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

COLUMNS = ("text", "id", "url", "domain")
BROKEN = (OSError, EOFError, zlib.error, csv.Error, pa.ArrowException)
_CHUNK = 1 << 18


class Fault(NamedTuple):
    """Hold why something in a file can't be used."""

    reason: str
    detail: str = ""


def input_files(source: str | Path) -> tuple[list[Path], int]:
    """Return the readable files of a folder in the order of their names, or the one file, and how many it left out.

    Raises:
        ValueError: there is no such path, or nothing below it can be read.
    """
    source = Path(source)
    found = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    files = [path for path in found if format_of(path) in FORMATS]
    if not files or not source.exists():
        here = "is not there" if not source.exists() else "holds no file that can be read"
        raise ValueError(f"{source} {here}. Give a file or folder with {' '.join(FORMATS)}, also with .gz or .zst.")
    return files, len(found) - len(files)


def format_of(path: Path) -> str:
    """Return the suffix of a file below that of its compression: .jsonl of a.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes and suffixes[-1] in (".gz", ".zst")
    return "".join(suffixes[-2:-1] if packed and suffixes[-2:-1] != [".parquet"] else suffixes[-1:])


def read_documents(
    files: list[Path], root: Path, rank: int, tasks: int, columns: Mapping[str, str]
) -> Iterator[tuple[str, dict | Fault]]:
    """Yield ("FILE:NUMBER", document or [`Fault`]) of the rows that task `rank` of `tasks` reads.

    Task r reads the files r, r + tasks, …; where there are fewer files than tasks, each task reads every tasks-th row
    of every file. A document has the keys of [`COLUMNS`]; without an id its place is its id.
    """
    shared = len(files) < tasks
    for index, path in enumerate(files):
        if not shared and index % tasks != rank:
            continue
        name = path.relative_to(root).as_posix()
        part, parts = ((rank - index) % tasks, tasks) if shared else (0, 1)
        for number, row in read_rows(path, part, parts, columns.values()):
            place = f"{name}:{number}"
            yield place, row if isinstance(row, Fault) else _document(row, place, columns)


def read_rows(
    path: Path, part: int = 0, parts: int = 1, columns: Iterable[str] = COLUMNS
) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
    """Yield (number, row or [`Fault`]) of every `parts`-th row of a file, beginning with row `part`.

    A row is a line of JSON lines, a row of CSV or Parquet, a record of WARC, or a whole text file. Numbers begin with
    1. A file that can't be read further ends with a fault, which part 0 tells.
    """
    number, (rows, parse) = 0, FORMATS[format_of(path)]
    try:
        with _opened(path) as file:
            for number, item in enumerate(rows(file, columns), 1):
                if (number - 1) % parts == part and (row := parse(item)) is not None:
                    yield number, row
    except BROKEN as error:
        if part == 0:
            yield number + 1, Fault("broken file", f"{type(error).__name__}: {error}")


def _document(row: Mapping[str, Any], place: str, columns: Mapping[str, str]) -> dict | Fault:
    text = row.get(columns["text"])
    if not isinstance(text, str) or not text.strip():
        return Fault("no text", f"the columns are {', '.join(map(str, row))}"[:200])
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Fault("not UTF-8", f"at character {error.start}")
    others = {name: row.get(columns[name]) for name in COLUMNS[1:]}
    clean = {
        name: None if value in (None, "") else str(value).encode("utf-8", "replace").decode()
        for name, value in others.items()
    }
    return {"text": text} | clean | {"id": clean["id"] or place}


class _Zstd(io.RawIOBase):
    """Decompress a file of zstd frames; unlike zstandard's own reader, tell a file that was cut off."""

    def __init__(self, path: Path):
        import zstandard

        self.start = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self.error, self.file, self.frame = zstandard.ZstdError, path.open("rb"), None
        self.packed, self.plain = b"", memoryview(b"")

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.plain:
            self.packed = self.packed or self.file.read(_CHUNK)
            if not self.packed and self.frame is not None:
                raise EOFError("the file ends inside a zstd frame")
            if not self.packed:
                return 0
            self.frame = self.frame or self.start()
            try:
                self.plain = memoryview(self.frame.decompress(self.packed))
            except self.error as error:
                raise OSError(str(error)) from error
            self.packed, self.frame = (self.frame.unused_data, None) if self.frame.eof else (b"", self.frame)
        piece, self.plain = self.plain[: len(buffer)], self.plain[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self):
        self.file.close()
        super().close()


def _opened(path: Path) -> io.BufferedIOBase:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    return io.BufferedReader(_Zstd(path), _CHUNK) if path.suffix.lower() == ".zst" else path.open("rb")


def _json_row(line: bytes) -> dict | Fault | None:
    if not line.strip():
        return None
    try:
        row = json.loads(line.removeprefix(codecs.BOM_UTF8))
    except UnicodeDecodeError as error:
        return Fault("not UTF-8", f"byte 0x{error.object[error.start]:02x} at offset {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return Fault("not JSON", str(error)[:200])
    return row if isinstance(row, dict) else Fault("not JSON", f"a {type(row).__name__}, not an object")


def _csv_rows(file, columns):
    csv.field_size_limit(2**31 - 1)  # its default, 128 KiB, is too little for a document
    return csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline=""))


def _parquet_rows(file, columns):
    with pq.ParquetFile(file) as table:
        names = [name for name in columns if name in table.schema_arrow.names]
        for batch in table.iter_batches(batch_size=256, columns=names):
            for i in range(len(batch)):
                yield {name: batch.column(name)[i] for name in names}


def _parquet_row(row):
    try:
        return {name: value.as_py() for name, value in row.items()}
    except UnicodeDecodeError as error:
        return Fault("not UTF-8", f"byte 0x{error.object[error.start]:02x} at offset {error.start}")


def _whole_text(content: bytes) -> dict | Fault:
    try:
        return {"text": content.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        return Fault("not UTF-8", f"byte 0x{error.object[error.start]:02x} at offset {error.start}")


def _warc_records(file, columns):
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    try:
        yield from ArchiveIterator(file)
    except ArchiveLoadFailed as error:
        raise OSError(str(error).strip()) from error


def _page(record) -> dict | Fault | None:
    """Return a WET record as it is, the text of a page in HTML by trafilatura, and None for other records."""
    content = record.rec_type == "conversion" and "text/plain"
    if record.rec_type == "response" and record.http_headers is not None:
        content = record.http_headers.get_header("Content-Type", "")
    if not content or not ("html" in content or "text/plain" in content):
        return None
    found = {"id": "WARC-Record-ID", "url": "WARC-Target-URI"}
    head = {name: record.rec_headers.get_header(header) for name, header in found.items()}
    page = record.content_stream().read()
    if "html" not in content:
        text = _whole_text(page)
        return text if isinstance(text, Fault) else head | text
    from trafilatura import extract

    return head | {"text": extract(page)}


def _lines(file, columns):
    return file


def _one(file, columns):
    return [file.read()]


FORMATS = (
    dict.fromkeys((".jsonl", ".json", ".ndjson"), (_lines, _json_row))
    | {".csv": (_csv_rows, dict), ".parquet": (_parquet_rows, _parquet_row)}
    | dict.fromkeys((".warc", ".wet"), (_warc_records, _page))
    | dict.fromkeys((".txt", ".md"), (_one, _whole_text))
)
"""For each suffix (how a file is cut into rows, how a row is read)."""
