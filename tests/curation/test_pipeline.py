"""curate: what it writes, that workers change nothing, kills at every file, and bad input."""

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
from datasets import load_dataset
from datatrove.executor import LocalPipelineExecutor

from lifecycle_hf.curation import (
    MinHashDedup,
    PIIRemover,
    QualityClassifier,
    QualityRules,
    SubstringDedup,
    UrlFilter,
    curate,
    funnel_table,
)
from lifecycle_hf.curation.decisions import Decision, Pass
from lifecycle_hf.curation.steps import ReadShard, Step
from lifecycle_hf.data.json_lines import whole_file, write_samples
from lifecycle_hf.data.loading import load_splits
from lifecycle_hf.toyworld import crawl

TEXTS = [f"Document {i % 13} tells of {'many ' * (i % 4)}things. mail@x.org" for i in range(40)]
"""13 different documents of i % 13 with 4 lengths of i % 4: all 40 < 52 differ."""


class Short:
    """Remove texts with fewer words; score each by its words."""

    name = "short"

    def __init__(self, least=7):
        self.least = least

    def __call__(self, texts, *, urls=None, domains=None):
        sizes = [len(text.split()) for text in texts]
        return [Decision(reason="" if n >= self.least else "short", scores={"words": float(n)}) for n in sizes]


class Mail:
    """Cut out "mail@x.org"."""

    name = "mail"

    def __call__(self, texts, *, urls=None, domains=None):
        places = [text.find("mail@x.org") for text in texts]
        return [
            Decision(text=text[:i] + text[i + 10 :], spans=((i, i + 10, "mail"),)) if i >= 0 else Decision()
            for text, i in zip(texts, places)
        ]


class FirstWords(Step):
    """Write the first two words of each document of a shard."""

    def __init__(self, shards, work):
        super().__init__()
        self.read, self.work = ReadShard(shards), work

    def run(self, data=None, rank=0, world_size=1):
        with whole_file(self.work / f"{rank}.words") as file:
            for document in self.read.run(None, rank):
                file.write(" ".join(document.text.split()[:2]).encode() + b"\n")
        yield from ()


class Once:
    """Keep the first document of those with the same first two words."""

    name = "once"

    def __call__(self, texts):
        seen = set()
        return [Decision(reason="" if key not in seen and not seen.add(key) else "again") for key in texts]

    def passes(self, shards, work, tasks):
        return [Pass(tasks, [FirstWords(shards, work)])]

    def decisions(self, work, rank):
        keys = [(work / f"{i}.words").read_text().splitlines() for i in range(rank + 1)]
        yield from self([key for part in keys for key in part])[sum(map(len, keys[:-1])) :]


def write_input(folder, texts=TEXTS, files=3):
    folder.mkdir(parents=True)
    for k in range(files):
        lines = [json.dumps({"text": text, "url": f"http://a/{i}"}) for i, text in enumerate(texts) if i % files == k]
        (folder / f"{k}.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def contents(folder):
    """Return the bytes of all files of a finished run."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def removed(folder, step):
    files = sorted((folder / "removed" / step).glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(input, folder of an undisturbed run)."""
    folder = tmp_path_factory.mktemp("whole")
    curate(write_input(folder / "in"), folder / "out", BLOCKS(), tasks=2)
    return folder / "in", folder / "out"


def BLOCKS():
    return [Short(), Once(), Mail()]


@pytest.fixture(scope="module")
def quality():
    return QualityClassifier.train(crawl.trusted()[:40], crawl.junk()[:40])


def real_blocks(quality):
    """The default steps of recipes/curate.py, with a list of domains instead of the 0.8 GB of datatrove's."""
    urls = UrlFilter(integrated=False, domains=["888casino.com"])
    return [urls, QualityRules(), PIIRemover(), quality, MinHashDedup(), SubstringDedup(50)]


@pytest.fixture(scope="module", params=["stand-ins", "real"])
def run_of(request, tmp_path_factory):
    """(input, folder of an undisturbed run, its blocks), of the small blocks above or of the real ones on a crawl."""
    if request.param == "stand-ins":
        return *request.getfixturevalue("whole"), BLOCKS()
    folder, blocks = tmp_path_factory.mktemp("real"), real_blocks(request.getfixturevalue("quality"))
    (folder / "in").mkdir()
    for k in range(3):
        write_samples(folder / "in" / f"{k}.jsonl", crawl.crawl()[k::3])
    report = curate(folder / "in", folder / "out", blocks, tasks=2)
    assert all(sum((step["removed"] | step["spans"]).values()) for step in report["steps"][1:])
    return folder / "in", folder / "out", blocks


def test_what_is_left_after_each_step(whole):
    report = json.loads((whole[1] / "report.json").read_text())
    assert [row["step"] for row in report["steps"]] == ["read", "short", "once", "mail"]
    read, short, once, mail = report["steps"]
    left = [text for text in TEXTS if len(text.split()) >= 7]
    assert (read["documents"], read["bytes"]) == (40, sum(map(len, TEXTS)))
    assert short["removed"] == {"short": 40 - len(left)} and short["documents"] == len(left) == 30
    assert once["documents"] == 13 and once["removed"] == {"again": 17}  # i % 4 > 0 meets every i % 13
    assert mail["documents"] == 13 and mail["spans"] == {"mail": 13} and mail["bytes"] == once["bytes"] - 130
    assert once["tokens"] - mail["tokens"] == 13 * 5  # mail @ x . org
    assert funnel_table(report).count("again 17") == 1 and (whole[1] / "funnel.png").read_bytes()[1:4] == b"PNG"


def test_every_removed_document_and_span_has_its_reason(whole):
    rows = load_dataset("parquet", data_files=str(whole[1] / "data" / "*.parquet"), split="train")
    assert rows.column_names == ["id", "text", "url", "domain", "words"]
    assert all("mail@" not in row["text"] and row["words"] == len(row["text"].split()) + 1 for row in rows)
    short, again, spans = (removed(whole[1], step) for step in ("short", "once", "mail"))
    ids = [*rows["id"], *(row["id"] for row in [*short, *again])]
    assert sorted(ids) == sorted(f"{i % 3}.jsonl:{i // 3 + 1}" for i in range(40))  # each once
    assert {row["reason"] for row in short} == {"short"} and all(len(row["text"].split()) < 7 for row in short)
    assert {row["id"]: row["end"] - row["start"] for row in spans} == dict.fromkeys(rows["id"], 10)


def test_a_finished_run_is_not_made_again(whole):
    before = {path: path.stat().st_mtime_ns for path in whole[1].rglob("*")}
    curate(whole[0], whole[1], BLOCKS(), tasks=2)
    assert before == {path: path.stat().st_mtime_ns for path in whole[1].rglob("*")}


def test_the_result_is_a_dataset_to_pretrain_on(whole):
    train, test = load_splits(str(whole[1]), "pretrain")
    assert len(train) + len(test) == 13 and "text" in train.column_names


def test_json_lines_hold_the_same_rows(whole, tmp_path):
    curate(whole[0], tmp_path / "out", BLOCKS(), tasks=2, output_format="jsonl")
    rows = load_dataset(str(whole[1]), split="train")
    assert load_dataset(str(tmp_path / "out"), split="train", cache_dir=tmp_path).to_list() == rows.to_list()


@pytest.mark.parametrize("run_of", ["real"], indirect=True)
def test_two_and_four_workers_write_the_same(run_of, tmp_path):
    source, whole, blocks = run_of
    for workers in (2, 4):
        curate(source, tmp_path / "out", blocks, tasks=2, workers=workers)
        assert contents(tmp_path / "out") == contents(whole)
        (tmp_path / "out").rename(tmp_path / str(workers))


def killed_at(number, after, call):
    """Run a call in a process that gets SIGKILL before, or after, it moves its file `number`."""

    def run():
        replace, calls = Path.replace, iter(range(10**6))

        def counted(self, target):
            due = next(calls) == number
            if due and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(self, target)
            if due:
                os.kill(os.getpid(), signal.SIGKILL)

        Path.replace = counted
        call()
        os._exit(0)

    process = get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    return process.exitcode == -signal.SIGKILL


def test_a_run_that_is_killed_at_any_file_ends_the_same(run_of, tmp_path):
    """Start n is killed before, and again after, it moves its file n, until a start moves fewer files."""
    source, whole, blocks = run_of
    run, kills = partial(curate, source, tmp_path / "out", blocks, tasks=2), 0
    while killed_at(kills // 2, bool(kills % 2), run):
        kills += 1
    assert kills >= 8
    run()
    assert contents(tmp_path / "out") == contents(whole)


class Slow(Short):
    def __call__(self, texts, **columns):
        (Path(self.marks) / str(os.getpid())).touch()
        time.sleep(0.2)
        return super().__call__(texts, **columns)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from test_pipeline import Mail, Once, Slow, curate
if __name__ == "__main__":
    block = Slow()
    block.marks = {marks!r}
    curate({source!r}, {out!r}, [block, Once(), Mail()], tasks=24, workers=2)
"""


@pytest.mark.slow
def test_a_step_that_leaves_nothing_is_told(tmp_path):
    with pytest.warns(UserWarning, match=f"The step 'short' removed all {len(TEXTS)} documents that were left"):
        report = curate(write_input(tmp_path / "in"), tmp_path / "out", [Short(least=1000), Mail()], tasks=1)
    assert report["steps"][-1]["documents"] == 0


def runs(process: str) -> bool:
    """Return whether a process runs; one that has ended may wait for its parent."""
    try:
        return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_end_with_a_killed_run_and_the_next_one_goes_on(tmp_path):
    source, marks = write_input(tmp_path / "in"), tmp_path / "marks"
    marks.mkdir()
    block = Slow()
    block.marks = str(marks)
    curate(source, tmp_path / "whole", [block, Once(), Mail()], tasks=24)
    (marks / str(os.getpid())).unlink()
    names = {"tests": str(Path(__file__).parent), "source": str(source), "out": str(tmp_path / "out")}
    (tmp_path / "killed.py").write_text(KILLED.format(marks=str(marks), **names))
    process = subprocess.Popen([sys.executable, str(tmp_path / "killed.py")])
    deadline = time.monotonic() + 120
    while len(list(marks.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.kill()
    process.wait()
    while any(runs(worker.name) for worker in marks.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    done = len(list((tmp_path / "out" / "work" / "logs").glob("*/completions/*")))
    assert 0 < done < 24
    curate(source, tmp_path / "out", [block, Once(), Mail()], tasks=24)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_settings_are_refused_by_name(whole, tmp_path):
    with pytest.raises(ValueError, match=r"short.least=7, and this run has 8"):
        curate(whole[0], whole[1], [Short(8), Once(), Mail()], tasks=2)
    with pytest.raises(ValueError, match="tasks=2, and this run has 3"):
        curate(whole[0], whole[1], BLOCKS(), tasks=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": [Short(), Short()]}, "the names .* must differ"),
        ({"workers": 0}, "workers=0 and tasks=8: at least one"),
        ({"columns": {"body": "text"}}, "columns: .*'body'.* known are text, id, url, domain"),
        ({"output_format": "csv"}, "output_format='csv' is neither"),
        ({"output_dir": "in/out"}, "is inside the input"),
        ({"output_dir": "full"}, "has other files already"),
        ({"source": "empty"}, "has no document with text: {'no text': 2}"),
    ],
)
def test_what_cannot_be_done_is_refused(options, message, whole, tmp_path):
    write_input(tmp_path / "in")
    write_input(tmp_path / "empty", ["", " "])
    (tmp_path / "full" / "data").mkdir(parents=True)
    options = {"source": "in", "output_dir": "out", "blocks": BLOCKS()} | options
    paths = {name: tmp_path / options.pop(name) for name in ("source", "output_dir")}
    with pytest.raises(ValueError, match=message):
        curate(**paths, **options)
    assert not (tmp_path / "out" / "data").exists()


def test_two_runs_in_one_folder_are_refused(whole, tmp_path):
    class Again(Short):
        def __call__(self, texts, **columns):
            return curate(whole[0], tmp_path / "out", [self], tasks=2) and []

    with pytest.raises(ValueError, match="is in use by another run. Wait for it"):
        curate(whole[0], tmp_path / "out", [Again()], tasks=2)


def test_faults_of_the_input_are_counted_by_place_or_raise(tmp_path):
    source = write_input(tmp_path / "in")
    (source / "bad.jsonl").write_bytes(b'{"text": "one good row with some words in it"}\n\xff\n{"no": 1}\n')
    (source / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a row of a file that is cut off"}\n')[:-6])
    (source / "empty.jsonl").touch()
    (source / "picture.png").touch()
    report = curate(source, tmp_path / "out", [Short()])
    assert report["steps"][0]["removed"] == {"broken file": 1, "no text": 1, "not UTF-8": 1}
    assert report["steps"][0]["documents"] == 42 and report["left_out"] == 1
    told = {row["id"]: row["reason"] for row in removed(tmp_path / "out", "read")}
    assert told == {"bad.jsonl:2": "not UTF-8", "bad.jsonl:3": "no text", "cut.jsonl.gz:2": "broken file"}
    with pytest.raises(ValueError, match=r"bad.jsonl:2: not UTF-8 \(byte 0xff at offset 0 of the line\). Mend it"):
        curate(source, tmp_path / "strict", [Short()], strict_data=True)
    assert not (tmp_path / "strict" / "data").exists()


def test_a_document_of_50_mb_passes(tmp_path):
    source = write_input(tmp_path / "in", ["a b c d e f " + "x" * 50_000_000, "a short one of some words here"])
    report = curate(source, tmp_path / "out", [Short(), Mail()], tasks=2)
    assert report["steps"][-1]["bytes"] == 50_000_042 and report["steps"][-1]["tokens"] == 14
    assert sorted(map(len, load_dataset(str(tmp_path / "out"), split="train")["text"])) == [30, 50_000_012]


@pytest.mark.slow
def test_the_real_blocks_take_documents_of_50_mb(quality, tmp_path):
    """One that repeats 84 pages, and one without a blank. The rules would remove both."""
    words = " ".join(crawl.trusted())
    text = " ".join(f"{i} {words}" for i in range(50_000_000 // len(words)))
    source = write_input(tmp_path / "in", [text, "x" * 50_000_000, *crawl.trusted()[:3]])
    blocks = [block for block in real_blocks(quality) if block.name != "rules"]
    steps = curate(source, tmp_path / "out", blocks, tasks=2)["steps"]
    assert steps[0]["documents"] == 5 and steps[0]["bytes"] > 99_000_000
    assert steps[3]["removed"] == {"low_quality": 1} and steps[-1]["documents"] == 1  # the pages stand in the long one
    assert steps[-1]["bytes"] == pytest.approx(len(words.encode()), rel=0.02)


def test_a_full_disk_stops_the_run_whole_and_a_second_start_goes_on(whole, tmp_path, monkeypatch):
    opened, room = Path.open, [3000]

    def short_of_room(self, mode="r", *args, **options):
        file = opened(self, mode, *args, **options)
        if mode == "wb":
            write = file.write

            class Full:
                def __enter__(self):
                    return self

                def __exit__(self, *given):
                    file.close()

                def write(self, data):
                    room[0] -= len(data)
                    if room[0] < 0:
                        raise OSError(errno.ENOSPC, "No space left on device")
                    return write(data)

            return Full()
        return file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", short_of_room)
        with pytest.raises(OSError, match="No space left on device"):
            curate(whole[0], tmp_path / "out", BLOCKS(), tasks=2)
    assert not (tmp_path / "out" / "data").exists()
    curate(whole[0], tmp_path / "out", BLOCKS(), tasks=2)
    assert contents(tmp_path / "out") == contents(whole[1])


def test_a_block_that_fails_is_named_with_its_documents(whole, tmp_path):
    class Failing(Short):
        def __call__(self, texts, **columns):
            raise KeyError("no model")

    with pytest.raises(KeyError) as told, suppress(SystemExit):
        curate(whole[0], tmp_path / "out", [Failing()], tasks=2)
    assert told.value.__notes__ == ["The block 'short' failed on the documents 0.jsonl:1 to 2.jsonl:13."]


def test_decisions_that_do_not_fit_the_documents_are_refused(whole, tmp_path):
    class Fewer(Once):
        def decisions(self, work, rank):
            return iter([Decision()])

    class More(Once):
        def decisions(self, work, rank):
            return iter([Decision()] * 99)

    with pytest.raises(ValueError, match="once returned 1 decisions for"):
        curate(whole[0], tmp_path / "fewer", [Fewer()], tasks=2)
    with pytest.raises(ValueError, match="once returned more decisions than shard 0 has documents"):
        curate(whole[0], tmp_path / "more", [More()], tasks=2)


def test_a_block_that_leaves_no_text_removes_the_document(tmp_path):
    source = write_input(tmp_path / "in", ["mail@x.org", "text mail@x.org"])
    report = curate(source, tmp_path / "out", [Mail()], tasks=1)
    assert report["steps"][1] == {
        "step": "mail", "documents": 1, "bytes": 5, "tokens": 1, "removed": {"empty": 1}, "spans": {"mail": 1},
    }  # fmt: skip


def test_another_executor_runs_the_passes(whole, tmp_path):
    made = []

    def executor(**options):
        made.append(LocalPipelineExecutor(workers=1, **options))
        return made[-1]

    curate(whole[0], tmp_path / "out", BLOCKS(), tasks=2, executor=executor)
    assert contents(tmp_path / "out") == contents(whole[1])
    assert [Path(run.logging_dir.path).name for run in made] == ["0_documents", "1_once_0", "1_documents", "data"]


def test_datatrove_logs_into_the_folder_alone(whole, tmp_path, capfd):
    curate(whole[0], tmp_path / "out", BLOCKS(), tasks=2)
    told = capfd.readouterr()
    assert told.out == "" and "PIPELINE" not in told.err and "tasks completed" not in told.err
    assert "Curation" in told.err and "8/8" in told.err


def test_a_tokenizer_counts_the_tokens(whole, tiny_llama, tmp_path):
    tokenizer = tiny_llama[1]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    report = curate(whole[0], tmp_path / "out", BLOCKS(), tasks=2, tokenizer=str(tmp_path / "tokenizer"))
    expected = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS)
    assert report["steps"][0]["tokens"] == expected
