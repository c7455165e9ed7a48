"""Speed and memory of the blocks of curation on corpora of two sizes, beside datatrove's own and plain Python.

    export OMP_NUM_THREADS=1
    python benchmarks/curation.py                          # 20 and 200 MB
    python benchmarks/curation.py --megabytes 5 20 --blocks minhash
    python benchmarks/curation.py --megabytes 1 4 --blocks perplexity   # a small reference model, much slower
    python benchmarks/curation.py --smoke                  # in small

The corpus is made on the spot: documents of 200 to 800 words of Python's documentation and standard library, in
another local order each time, in 4 shards. Of them 2 % are an earlier document with one other word, and 2 % have a run
of 100 words of an earlier one. Each side runs in a process of its own, all its passes one after the other by
datatrove's local executor, reading of the shards included. MB/s are megabytes (10⁶ bytes) of text for each CPU second
of the process, after its imports. Memory is the peak of the resident set, and in brackets that before the first pass.
Peers other than datatrove's MinHash run at the smallest size alone; plain Python holds the corpus in memory.
"pipeline" is `curate` with the default steps of recipes/curate.py: it reads, decides, writes and reports.
"""

import argparse
import json
import os
import re
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path
from pydoc_data import topics

import numpy as np

TASKS, BATCH = 4, 500
LIBRARY = Path(sysconfig.get_path("stdlib"))
Side = Callable[[Path, Path], Callable[[], int]]


def make_corpus(folder: Path, megabytes: float) -> int:
    """Write the shards and return the bytes of the texts."""
    sources = [LIBRARY / name for name in ("argparse.py", "typing.py", "inspect.py")]
    sources += sorted(LIBRARY.glob("[a-z]*.py"))
    texts = [*topics.topics.values(), *(path.read_text(errors="replace") for path in sources)]
    words = np.array(" ".join(texts).split(), dtype=object)
    draw, wanted, total = np.random.default_rng(0), int(1e6 * megabytes / TASKS), 0
    folder.mkdir()
    for shard in range(TASKS):
        size, documents = 0, []
        with (folder / f"{shard:05d}.jsonl").open("w") as file:
            while size < wanted:
                document = make_document(words, documents, draw)
                documents = [*documents[-BATCH:], document] if len(documents) > 2 * BATCH else [*documents, document]
                text = "\n".join(" ".join(document[at : at + 12]) for at in range(0, len(document), 12))
                row = {"text": text, "id": f"{shard}-{size}", "url": f"https://site{size % 997}.example.org/{size}"}
                file.write(json.dumps(row) + "\n")
                size += len(text.encode())
        total += size
    return total


def make_document(words: np.ndarray, documents: list, draw: np.random.Generator) -> np.ndarray:
    """Words of a slice of `words` in another order, each moved by a few places; or a copy as the header tells."""
    kind, earlier = draw.random(), documents[draw.integers(len(documents))] if documents else words[:200]
    if kind < 0.02:
        copy = earlier.copy()
        copy[draw.integers(len(copy))] = "changed"
        return copy
    count, start = draw.integers(200, 800), draw.integers(len(words) - 800)
    document = words[start : start + count][np.argsort(np.arange(count) + 8 * draw.random(count))]
    return np.concatenate([document, earlier[50:150]]) if kind > 0.98 else document


def run(steps: list, tasks: int, logs: Path) -> None:
    from datatrove.executor import LocalPipelineExecutor

    LocalPipelineExecutor(steps, tasks, workers=1, logging_dir=str(logs)).run()


def corpus_block(name: str) -> Side:
    """A block of the whole corpus; it returns the number of decisions that change a document."""

    def prepare(shards, work):
        import datatrove.executor  # noqa: F401

        from lifecycle_hf import curation

        block = getattr(curation, name)()
        block(["so that its tables are made"])

        def go():
            for number, (tasks, steps) in enumerate(block.passes(shards, work, TASKS)):
                run(steps, tasks, work / f"logs{number}")
            found = (decision for rank in range(TASKS) for decision in block.decisions(work, rank))
            return sum(not decision.kept or decision.text is not None for decision in found)

        return go

    return prepare


def steps_of(make: Callable[[Path], list]) -> Side:
    """Steps between reading and counting; it returns the number of documents that they change or leave out."""

    def prepare(shards, work):
        import datatrove.executor  # noqa: F401
        from datatrove.pipeline.readers import JsonlReader

        steps, counts = make(work), {"read": 0, "same": 0}

        def remember(data, rank=0, world_size=1):
            for document in data:
                counts["read"] += 1
                document.metadata["length"] = len(document.text)
                yield document

        def compare(data, rank=0, world_size=1):
            for document in data:
                counts["same"] += document.metadata["length"] == len(document.text)

        def go():
            run([JsonlReader(str(shards)), remember, *steps, compare], TASKS, work / "logs")
            return counts["read"] - counts["same"]

        return go

    return prepare


def own_block(name: str) -> Side:
    """A block that decides on each document alone."""

    def make(work):
        from lifecycle_hf.curation import ApplyBlocks

        return [ApplyBlocks([made(name, work)], work / "found")]

    return steps_of(make)


def made(name: str, work: Path):
    """Return a block with its tables or its model made."""
    from lifecycle_hf import curation
    from lifecycle_hf.cli.curating import train_reference

    texts = list(topics.topics.values())
    if name == "QualityClassifier":
        code = [path.read_text(errors="replace")[:3000] for path in sorted(LIBRARY.glob("[a-z]*.py"))]
        block = curation.QualityClassifier.train(texts, code)
    elif name == "PerplexityFilter":
        train_reference(texts, str(work / "reference"), 20, 0)
        block = curation.PerplexityFilter(str(work / "reference")).fit(texts)
    else:
        block = getattr(curation, name)()
    if name == "UrlFilter":
        block(["so that its lists are loaded"], urls=["https://example.org"])
    else:
        block(["so that its tables are made"])
    return block


def datatrove_steps(*names: str) -> Side:
    """Filters or formatters with their defaults."""

    def make(work):
        from datatrove.pipeline import filters, formatters

        return [(getattr(filters, name, None) or getattr(formatters, name))() for name in names]

    return steps_of(make)


def pipeline(shards: Path, work: Path) -> Callable[[], int]:
    """The default steps; it returns the number of documents that they leave out."""
    from lifecycle_hf import curation

    names = ("UrlFilter", "QualityRules", "PIIRemover", "QualityClassifier", "MinHashDedup", "SubstringDedup")
    blocks = [made(name, work) for name in names]

    def go():
        report = curation.curate(shards, work / "clean", blocks, tasks=TASKS)
        return report["steps"][0]["documents"] - report["steps"][-1]["documents"]

    return go


def plain_personal(shards: Path, work: Path) -> Callable[[], int]:
    """E-mail and IP addresses alone, by one pattern."""
    personal = re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]+|\b(?:\d{1,3}\.){3}\d{1,3}\b")
    return lambda: sum(bool(personal.subn("<PII>", text)[1]) for text in read_texts(shards))


def datatrove_minhash(shards: Path, work: Path) -> Callable[[], int]:
    """The four stages; they return the number of documents that the last one left out."""
    import datatrove.executor  # noqa: F401
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import JsonlReader

    signatures, buckets, remove = (str(work / name) for name in ("signatures", "buckets", "remove"))
    config, read, left = MinhashConfig(), JsonlReader(str(shards)), []
    MinhashDedupSignature(signatures, config).get_shingles("so that its tokenizer is loaded")

    def count(data, rank=0, world_size=1):
        left.append(sum(1 for _ in data))

    def go():
        run([read, MinhashDedupSignature(signatures, config)], TASKS, work / "logs1")
        run([MinhashDedupBuckets(signatures, buckets, config=config)], config.num_buckets, work / "logs2")
        run([MinhashDedupCluster(buckets, remove, config)], 1, work / "logs3")
        run([read, MinhashDedupFilter(remove), count], TASKS, work / "logs4")
        return len(read_texts(shards)) - sum(left)

    return go


def read_texts(shards: Path) -> list[str]:
    return [json.loads(line)["text"] for path in sorted(shards.iterdir()) for line in path.open()]


def plain_minhash(shards: Path, work: Path) -> Callable[[], int]:
    """As text-dedup does it: a hash of each n-gram, permutations in numpy, a dictionary for each band."""
    factors, terms = np.random.default_rng(0).integers(1, (1 << 61) - 1, (2, 112), dtype=np.uint64)

    def go():
        bands, parent = [{} for _ in range(14)], {}

        def root(i):
            while parent.setdefault(i, i) != i:
                i = parent[i]
            return i

        for i, text in enumerate(read_texts(shards)):
            words = re.findall(r"\w+", text.lower())
            grams = {" ".join(words[at : at + 5]).encode() for at in range(max(len(words) - 4, 1))}
            hashes = np.array([int.from_bytes(blake2b(gram, digest_size=4).digest(), "big") for gram in grams])
            columns = ((hashes.astype(np.uint64)[:, None] * factors + terms) % np.uint64((1 << 61) - 1)).min(0)
            for band, key in zip(bands, columns.reshape(14, 8)):
                parent[root(i)] = root(band.setdefault(key.tobytes(), i))
        return sum(root(i) != i for i in list(parent))

    return go


def plain_substring(shards: Path, work: Path) -> Callable[[], int]:
    """A set of the hashes of all windows; it returns the number of documents with one that was seen before."""

    def go():
        seen, found = set(), 0
        for text in read_texts(shards):
            words = re.findall(r"\w+|[^\w\s]", text)
            own = {hash(tuple(words[at : at + 50])) for at in range(len(words) - 49)}
            found += not own.isdisjoint(seen)
            seen |= own
        return found

    return go


SIDES: dict[str, dict[str, Side]] = {
    "pipeline": {"lifecycle_hf": pipeline},
    "url": {"lifecycle_hf": own_block("UrlFilter")},
    "rules": {
        "lifecycle_hf": own_block("QualityRules"),
        "datatrove": datatrove_steps("GopherQualityFilter", "GopherRepetitionFilter"),
    },
    "pii": {
        "lifecycle_hf": own_block("PIIRemover"), "datatrove": datatrove_steps("PIIFormatter"),
        "plain Python": plain_personal,
    },
    "quality": {"lifecycle_hf": own_block("QualityClassifier")},
    "perplexity": {"lifecycle_hf": own_block("PerplexityFilter")},
    "minhash": {
        "lifecycle_hf": corpus_block("MinHashDedup"), "datatrove": datatrove_minhash, "plain Python": plain_minhash,
    },
    "substring": {"lifecycle_hf": corpus_block("SubstringDedup"), "plain Python": plain_substring},
}  # fmt: skip
"""By block and side: what makes the function that is timed, from the folder of shards and a folder to work in."""


def resident(name: str) -> float:
    """VmRSS (now) or VmHWM (the peak) of this process, MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) / 1024


def measure(block: str, side: str, shards: str) -> dict:
    """CPU seconds and memory of a side, in this process, which runs nothing else."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # datatrove's logs
    with tempfile.TemporaryDirectory() as work:
        go = SIDES[block][side](Path(shards), Path(work))
        before, start = resident("VmRSS"), time.process_time()
        changed = go()
        return {
            "seconds": time.process_time() - start,
            "before": before,
            "peak": resident("VmHWM"),
            "changed": changed,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--megabytes", type=float, nargs=2, default=(20.0, 200.0), help="a small and a large corpus")
    parser.add_argument("--blocks", nargs="+", choices=SIDES, default=[name for name in SIDES if name != "perplexity"])
    parser.add_argument("--smoke", action="store_true", help="corpora of 0.2 and 0.4 MB")
    parser.add_argument("--output", default="output/bench_curation.json")
    args = parser.parse_args()
    sizes, found, rows = (0.2, 0.4) if args.smoke else tuple(args.megabytes), [], []
    with tempfile.TemporaryDirectory() as folder:
        corpora = {size: Path(folder) / f"{size:g}" for size in sizes}
        sizes = {size: make_corpus(corpora[size], size) / 1e6 for size in sizes}
        for block, side in [(name, side) for name in args.blocks for side in SIDES[name]]:
            told = []
            for size in list(sizes)[: 2 if side == "lifecycle_hf" or (block, side) == ("minhash", "datatrove") else 1]:
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    told.append(pool.submit(measure, block, side, str(corpora[size])).result())
                told[-1] |= {"block": block, "side": side, "megabytes": sizes[size]}
                print(told[-1], file=sys.stderr, flush=True)
            found += told
            rows.append([block, side, *cells(told)])
    small, large = (f"{size:g}" for size in sizes)
    header = (
        f"| block | side | MB/s, {small} MB | MB/s, {large} MB | MiB, {small} MB | MiB, {large} MB | CPU × | MiB × |"
    )
    print(f"{header} changed |\n|:---|:---|{'---:|' * 7}")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(found, indent=1))


def cells(told: list[dict]) -> list[str]:
    """The numbers of a row: speed and memory at each size, their growth, and how many documents the side changes."""
    speed = [f"{one['megabytes'] / one['seconds']:.2f}" for one in told]
    memory = [f"{one['peak']:.0f} ({one['before']:.0f})" for one in told]
    growth = [f"{told[-1][name] / told[0][name]:.2f}" if len(told) > 1 else "" for name in ("seconds", "peak")]
    rest = [""] * (2 - len(told))
    return [*speed, *rest, *memory, *rest, *growth, " / ".join(str(one["changed"]) for one in told)]


if __name__ == "__main__":
    main()
