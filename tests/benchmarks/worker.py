"""One contender in a process of its own: loads, then measures what it is told to, a line of JSON at a time.

python tests/benchmarks/worker.py FOLDER '{"contender": "pytorch", "precision": "float32", ...}'
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import contenders


def main(folder: Path, setting: dict[str, Any]) -> None:
    # Libraries print; the lines of JSON have the real standard output to themselves.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(reply: dict[str, Any]) -> None:
        print(json.dumps(reply | {"peak_mb": peak_mb()}), file=out, flush=True)

    name = setting.pop("contender")
    start = perf_counter()
    try:
        if name in JOBS:
            say(JOBS[name](folder, **setting))
            return
        does = getattr(contenders, name)(*[folder] * (not name.endswith("_products")), **setting)
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}".splitlines()[0]})
        return
    sets = {name: content["texts"] for name, content in json.loads((folder / "texts.json").read_text()).items()}
    say({"load_seconds": perf_counter() - start})
    for line in sys.stdin:
        order = json.loads(line)
        try:
            say({"rate": does(order["precision"])} if "precision" in order else calls(does, sets, **order))
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}".splitlines()[0]})


def calls(predict: contenders.Predict, sets: dict[str, list[str]], *, texts: str, n: int, size: int, **options: Any):
    """Answer the first `n` texts of a set, `size` in a call; a call before the first one is for warmth."""
    texts = sets[texts][:n]
    predict(texts[: min(size, 64)], **options)
    seconds, answers, sure = [], [], []
    for first in range(0, n, size):
        start = perf_counter()
        said = predict(texts[first : first + size], **options)
        seconds.append(perf_counter() - start)
        answers += said[0]
        sure += said[1]
    return {"seconds": seconds, "answers": answers, "probabilities": sure}


def growth(folder: Path, *, precision: str, counts: list[int]) -> dict[str, Any]:
    """How time and memory grow with the number of texts, in one process: seconds and peak after each count."""
    texts = json.loads((folder / "grown.json").read_text())
    predict = contenders.cascade_lab(folder, precision=precision)
    predict(texts[: counts[0] // 10])
    rows, first = [], 0
    for n in counts:
        start = perf_counter()
        predict(texts[first : first + n])
        rows.append({"n_texts": n, "seconds": perf_counter() - start, "peak_mb": peak_mb()})
        first += n
    return {"rows": rows}


def memory(folder: Path, *, precision: str) -> dict[str, Any]:
    """The peak of loading every stage and answering one text, over that of TensorFlow with a session that has run."""
    import tensorflow as tf

    import cascade_lab.cascade  # noqa: F401
    from cascade_lab.bert.checkpoint import read_checkpoint
    from cascade_lab.spec import CascadeSpec

    tf1 = tf.compat.v1
    with tf.Graph().as_default(), tf1.Session() as session:
        square_t = tf1.placeholder(tf.float32, [64, 64])
        session.run(tf.matmul(square_t, square_t), {square_t: [[1.0] * 64] * 64})
    before, start = peak_mb(), perf_counter()
    predict = contenders.cascade_lab(folder, precision=precision)
    load_seconds = perf_counter() - start
    predict(["how much is in my account"], batch=1)
    peak = peak_mb()
    stages = CascadeSpec.read(folder / f"cascade-{precision}.toml").stages
    weights_mb = sum(w.nbytes for stage in stages for w in read_checkpoint(stage).weights.values()) / 2**20
    return {"before_mb": before, "over_mb": peak - before, "weights_mb": weights_mb, "load_seconds": load_seconds}


JOBS = {"growth": growth, "memory": memory}


def peak_mb() -> float:
    """The most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
