"""Reading of files: every format and compression, faults told by file and row, and files that tasks share."""

import gzip
import io
import json
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lifecycle_hf.curation.reading import COLUMNS, Fault, format_of, input_files, read_documents, read_rows

zstandard, warcio = pytest.importorskip("zstandard"), pytest.importorskip("warcio")
NAMES = dict(zip(COLUMNS, COLUMNS))


def documents(folder, tasks=1, columns=NAMES):
    files = input_files(folder)[0]
    return [found for rank in range(tasks) for found in read_documents(files, folder, rank, tasks, columns)]


def faults(folder):
    return {place: row.reason for place, row in documents(folder) if isinstance(row, Fault)}


def texts(folder, **options):
    return [row["text"] for _, row in documents(folder, **options) if not isinstance(row, Fault)]


def json_lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_every_format_gives_the_same_document(tmp_path):
    row = {"text": "Grüße, “world”\nsecond line", "id": "7", "url": "http://a.de/x", "domain": "news"}
    (tmp_path / "a.jsonl").write_bytes(json_lines(row))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(row)))
    whole = zstandard.compress(json_lines(row))
    (tmp_path / "c.jsonl.zst").write_bytes(whole + whole)  # two frames, as parallel compressors write
    pq.write_table(pa.table({name: [value] for name, value in row.items()}), tmp_path / "d.parquet")
    (tmp_path / "e.csv").write_text('domain,id,url,text\nnews,7,http://a.de/x,"Grüße, “world”\nsecond line"\n')
    assert [found for _, found in documents(tmp_path)] == [row] * 6
    (tmp_path / "f.txt").write_text(row["text"])
    place, found = documents(tmp_path)[-1]
    assert place == found["id"] == "f.txt:1" and found["text"] == row["text"] and found["url"] is None


def test_columns_have_other_names(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines({"body": "x", "link": "http://a", "key": 3}))
    columns = NAMES | {"text": "body", "url": "link", "id": "key"}
    assert documents(tmp_path, columns=columns)[0][1] == {"text": "x", "id": "3", "url": "http://a", "domain": None}


def warc(*records):
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    packed = io.BytesIO()
    writer = WARCWriter(packed, gzip=True)
    for kind, content, content_type in records:
        head = StatusAndHeaders("200 OK", [("Content-Type", content_type)], protocol="HTTP/1.1")
        http = {"http_headers": head} if kind == "response" else {"warc_content_type": content_type}
        writer.write_record(writer.create_warc_record("http://a.de/x", kind, payload=io.BytesIO(content), **http))
    return packed.getvalue()


def test_pages_of_a_crawl(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trafilatura", SimpleNamespace(extract=lambda page: page.decode()[3:-4]))
    (tmp_path / "CC-1.warc.gz").write_bytes(
        warc(
            ("metadata", b"x", "text/plain"), ("response", b"<p>A page.</p>", "text/html; charset=utf-8"),
            ("response", b"\x89PNG", "image/png"), ("conversion", b"Plain.", "text/plain"),
            ("conversion", b"\xff\xfe", "text/plain"),
        )
    )  # fmt: skip
    assert texts(tmp_path) == ["A page.", "Plain."] and faults(tmp_path) == {"CC-1.warc.gz:5": "not UTF-8"}
    first = documents(tmp_path)[0][1]
    assert first["url"] == "http://a.de/x" and first["id"].startswith("<urn:uuid:")


def test_trafilatura_takes_the_text_of_a_page(tmp_path):
    pytest.importorskip("trafilatura")
    page = b"<html><body><nav>Menu</nav><article><p>" + b"A long enough paragraph of text. " * 20 + b"</p>"
    (tmp_path / "a.warc.gz").write_bytes(warc(("response", page, "text/html")))
    assert texts(tmp_path)[0].startswith("A long enough paragraph") and "Menu" not in texts(tmp_path)[0]


def test_faults_are_told_by_file_and_row(tmp_path):
    good = json_lines({"text": "good"})
    rows = (
        good + b"\xff\xfe\n" + b"{half\n" + b"[1]\n" + b"\n" + json_lines({"body": "x"}, {"text": None}, {"text": " "})
    )
    (tmp_path / "a.jsonl").write_bytes(rows + b'{"text": "\\ud800"}\n' + good)
    (tmp_path / "b.csv").write_bytes(b"text,url\nGr\xfc\xdfe,x\nok,y\n,z\n")
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 this is none")
    raw = pa.array([b"ok", b"\xff"], pa.binary()).view(pa.string())  # which Arrow does not check
    pq.write_table(pa.table({"text": raw}), tmp_path / "e.parquet")
    (tmp_path / "f.warc").write_bytes(b"no crawl at all\r\n")
    (tmp_path / "g.jsonl").touch()
    assert texts(tmp_path) == ["good", "good", "ok", "ok"]
    assert faults(tmp_path) == {
        "a.jsonl:2": "not UTF-8", "a.jsonl:3": "not JSON", "a.jsonl:4": "not JSON", "a.jsonl:6": "no text",
        "a.jsonl:7": "no text", "a.jsonl:8": "no text", "a.jsonl:9": "not UTF-8", "b.csv:1": "not UTF-8",
        "b.csv:3": "no text", "c.txt:1": "not UTF-8", "d.parquet:1": "broken file", "e.parquet:2": "not UTF-8",
        "f.warc:1": "broken file",
    }  # fmt: skip


@pytest.mark.parametrize("pack", [gzip.compress, lambda data: zstandard.compress(data)])
def test_a_file_that_was_cut_off_gives_what_is_whole(pack, tmp_path):
    rows = json_lines(*({"text": f"{i} {i**9}"} for i in range(20000)))
    suffix = ".gz" if pack is gzip.compress else ".zst"
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(rows)[:-2000])
    (tmp_path / "b.jsonl").write_bytes(json_lines({"text": "next file"}))
    found = texts(tmp_path)
    assert found[:-1] == [f"{i} {i**9}" for i in range(len(found) - 1)] and found[-1] == "next file"
    assert 1000 < len(found) < 20000
    assert faults(tmp_path) == {f"a.jsonl{suffix}:{len(found)}": "broken file"}


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5), tasks=st.integers(1, 7))
def test_tasks_read_each_row_once(sizes, tasks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for i, size in enumerate(sizes):
        (folder / f"{i}.jsonl").write_bytes(json_lines(*({"text": f"{i} {k}"} for k in range(size))))
    assert sorted(texts(folder, tasks=tasks)) == sorted(
        f"{i} {k}" for i, size in enumerate(sizes) for k in range(size)
    )


def test_text_files_are_spread_over_more_tasks(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    files = input_files(tmp_path)[0]
    shares = [len(list(read_documents(files, tmp_path, rank, 5, NAMES))) for rank in range(5)]
    assert shares == [1, 1, 1, 0, 0]


def test_a_shared_file_that_is_broken_is_told_once(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json_lines({"text": "x"}))[:-4])
    assert len(documents(tmp_path, tasks=4)) == 2


def test_a_document_of_50_mb_is_read(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "word " * 10_000_000 + "\n")
    assert len(texts(tmp_path)[0]) == 50_000_000


def test_files_that_cannot_be_read_are_counted_or_refused(tmp_path):
    (tmp_path / "a.pdf").touch()
    with pytest.raises(ValueError, match="holds no file that can be read. Give a file or folder with .jsonl"):
        input_files(tmp_path)
    with pytest.raises(ValueError, match="missing is not there"):
        input_files(tmp_path / "missing")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "B.JSONL.GZ").touch()
    assert input_files(tmp_path) == ([tmp_path / "sub" / "B.JSONL.GZ"], 1)
    assert format_of(tmp_path / "CC.v1.warc.wet.gz") == ".wet" and format_of(tmp_path / "x.parquet.gz") == ".gz"
    assert list(read_rows(tmp_path / "sub" / "B.JSONL.GZ")) == []
