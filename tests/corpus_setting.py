"""A corpus as shards, and the passes of a block of the whole corpus over them."""

import json
from itertools import pairwise


def through_passes(block, texts, folder, borders=(), run=None):
    """The decisions about texts that stand in shards, cut at the borders; `run` runs a pass, in this process without.

    The folder holds the files of the shards and of the passes afterwards.
    """
    edges = [0, *borders, len(texts)]
    shards, work = folder / "shards", folder / "work"
    shards.mkdir(parents=True)
    for rank, (start, end) in enumerate(pairwise(edges)):
        lines = [json.dumps({"text": text, "id": str(i), "metadata": {}}) for i, text in enumerate(texts[start:end])]
        (shards / f"{rank:05d}.jsonl").write_text("".join(line + "\n" for line in lines))
    for one in block.passes(shards, work, len(edges) - 1):
        if run is not None:
            run(one)
            continue
        for rank in range(one.tasks):
            for step in one.steps:
                step(None, rank, one.tasks)
    return [decision for rank in range(len(edges) - 1) for decision in block.decisions(work, rank)]


def local_runner(folder, workers):
    """Run a pass by datatrove's local executor."""
    from datatrove.executor import LocalPipelineExecutor

    def run(one):
        folder.mkdir(exist_ok=True)
        logs = folder / str(len(list(folder.iterdir())))
        LocalPipelineExecutor(one.steps, one.tasks, workers, logging_dir=str(logs), start_method="fork").run()

    return run
