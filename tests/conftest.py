"""Real checkpoints for the tests: small random ones that are made here, and CLINC150's where they are to be had."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import json
import subprocess
from pathlib import Path
from textwrap import dedent

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")

collect_ignore = ["benchmarks"]  # scripts of an environment of their own

CLINC150 = Path(__file__).parents[2] / "shared" / "clinc150"
WORDS = [
    "pay",
    "bill",
    "card",
    "lost",
    "play",
    "music",
    "weather",
    "what",
    "is",
    "my",
    "the",
    "a",
    "sing",
    "song",
    "please",
    "now",
]
CONFIG = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "type_vocab_size": 2,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where processes share the tests, keep a file's in one, and those of the one costly fixture in one."""
    for item in items:
        group = "clinc150_run" if "clinc150_run" in getattr(item, "fixturenames", ()) else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def clinc150() -> Path:
    """The folder with CLINC150's files and the two checkpoints that were trained on them."""
    if not (CLINC150 / "cascade.toml").is_file():
        pytest.skip(f"CLINC150 and its checkpoints are not at {CLINC150}")
    return CLINC150


def write_checkpoint(
    folder: Path, num_labels: int, *, seed: int, scale: float = 0.3, leave_out: str = "", **change: np.ndarray
) -> None:
    """Write a checkpoint as run_classifier leaves it: random weights, Adam slots, global_step.

    `leave_out` names a variable that is not written; `change` gives others another value (`__` stands for `/`).
    """
    import tensorflow as tf

    from cascade_lab.bert.checkpoint import variable_shapes

    folder.mkdir(parents=True, exist_ok=True)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"abcdefghijklmnopqrstuvwxyz.?!"]
    tokens = list(dict.fromkeys(tokens)) + [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    config = {**CONFIG, "vocab_size": len(tokens)}
    (folder / "bert_config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)
    tf1 = tf.compat.v1
    with tf.Graph().as_default(), tf1.Session() as session:
        for name, shape in variable_shapes(config, num_labels).items():
            if name == leave_out:
                continue
            center = 1.0 if name.endswith("gamma") else 0.0
            value = change.get(name.replace("/", "__"), center + rng.normal(0, scale, shape))
            for slot in ("", "/adam_m", "/adam_v"):
                tf1.get_variable(name + slot, initializer=np.float32(value))
        tf1.get_variable("global_step", initializer=np.int64(7))
        session.run(tf1.global_variables_initializer())
        tf1.train.Saver().save(session, str(folder / "model.ckpt"), global_step=7)


SPEC = """
    name = "tiny"
    max_seq_length = 24

    [[stage]]
    name = "gate"
    init_checkpoint = "gate"
    bert_config_file = "gate/bert_config.json"
    vocab_file = "gate/vocab.txt"
    labels = ["oos", "in"]
    pass_label = "in"
    threshold = 0.5

    [[stage]]
    name = "intent"
    init_checkpoint = "intent"
    bert_config_file = "intent/bert_config.json"
    vocab_file = "intent/vocab.txt"
    labels = ["0", "1", "2", "3"]
"""


def write_cascade(folder: Path) -> Path:
    """Write a two-stage cascade with random weights; return its cascade.toml."""
    write_checkpoint(folder / "gate", 2, seed=1)
    write_checkpoint(folder / "intent", 4, seed=2)
    path = folder / "cascade.toml"
    path.write_text(dedent(SPEC))
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cascade.toml whose two small random checkpoints are shared by the session: read it, do not change it."""
    return write_cascade(tmp_path_factory.mktemp("tiny"))


def texts(n: int, *, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(n)]


@pytest.fixture(scope="session")
def tiny_evalset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 texts with random labels of the tiny cascade, as tsv."""
    path = tmp_path_factory.mktemp("evalset") / "texts.tsv"
    labels = np.random.default_rng(3).choice(["oos", "0", "1", "2", "3"], 200)
    pd.DataFrame({"text": texts(200), "label": labels}).to_csv(path, sep="\t", index=False)
    return path


@pytest.fixture(scope="session")
def tiny_run(tiny: Path, tiny_evalset: Path, tmp_path_factory: pytest.TempPathFactory):
    """A finished run of the tiny cascade on the 200 texts."""
    from cascade_lab import Cascade, EvalSet

    with Cascade.load(tiny) as cascade:
        return cascade.run(EvalSet.read(tiny_evalset), output=tmp_path_factory.mktemp("runs") / "tiny", batch_size=16)


@pytest.fixture(scope="session")
def clinc150_run(clinc150: Path, tmp_path_factory: pytest.TempPathFactory):
    """A finished run of CLINC150's cascade on its validation split, figures and report included, by the command."""
    from typer.testing import CliRunner

    from cascade_lab import Run
    from cascade_lab.cli import app

    output = tmp_path_factory.mktemp("runs") / "clinc150"
    arguments = ["run", str(clinc150 / "cascade.toml"), str(clinc150 / "data_full.json"), "--split", "val"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "3,100 (100.0%)" in result.output
    return Run.read(output)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.name != "posix" or os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
