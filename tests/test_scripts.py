"""Texts, labels and stage names in any script: counted in tokens, kept in safe files, read back as they were."""

from __future__ import annotations

import json
import os
import re
from hashlib import sha256
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pandas as pd
import pytest
from helpers import answered_batches, run_of_probabilities
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cascade_lab.analysis.slicing import find_slices, slices
from cascade_lab.analysis.text_features import features
from cascade_lab.analysis.text_tokens import split_tokens, split_words
from cascade_lab.bert import reference
from cascade_lab.cli import app
from cascade_lab.evalset import EvalSet
from cascade_lab.exceptions import SpecError
from cascade_lab.run import Run
from cascade_lab.serving.collect import collect
from cascade_lab.serving.traffic_log import TrafficLog
from cascade_lab.spec import CascadeSpec
from cascade_lab.stage_files import stage_file

E_ACUTE = "\u00e9"
NAMES = [
    "闸门", "意图 分类", "a/b", "..", "../../x", "/etc/x", "C:\\x", "CON", "nul", "com1", "con.txt", "x" * 300,
    "门" * 300,
    E_ACUTE, normalize("NFD", E_ACUTE), "🙂", "إدخال", "نیم\u200cفاصله", "a.b", ".hidden", "-x", "*?", "stage.x",
    "a'b\"c",
]  # fmt: skip
SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}\.parquet")


def run_with_names(gate: str, last: str) -> Run:
    """Return a run of 40 Chinese texts; its stages have the given names."""
    rng = np.random.default_rng(0)
    stages = [
        {"name": gate, "labels": ["域外", "域内"], "pass_label": "域内", "threshold": 0.5},
        {"name": last, "labels": ["续借", "预约"], "reject_label": "域外"},
    ]
    probabilities = {stage["name"]: rng.dirichlet([1, 1], 40) for stage in stages}
    return run_of_probabilities(stages, rng.choice(["续借", "预约", "域外"], 40).tolist(), probabilities)


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_may_have_a_name_in_any_script(name, tmp_path):
    run = run_with_names(name, "意图")
    read = run.write(tmp_path / "run")
    read.check()
    assert [stage.name for stage in read.spec.stages] == [name, "意图"]
    pd.testing.assert_frame_equal(read.predictions, run.predictions)
    assert np.array_equal(read.scores(name).logits, run.scores(name).logits)
    thresholds = {name: 0.9}
    pd.testing.assert_frame_equal(read.replay(thresholds), run.replay(thresholds))
    files = sorted(path.name for path in (tmp_path / "run" / "scores").iterdir())
    assert len(files) == 2
    assert all(SAFE.fullmatch(file) and file.partition(".")[0].lower() not in ("con", "nul", "com1") for file in files)
    assert sorted(os.listdir(tmp_path)) == ["run"]
    spec = tmp_path / "cascade.toml"
    run.spec.write(spec)
    assert CascadeSpec.read(spec) == run.spec


def test_different_names_have_different_files_on_any_file_system():
    names = [*NAMES, "stage", "gate", "stage-x", "con-", "a_b", "a b", stage_file("闸门").replace(".", "-")]
    assert len({stage_file(name).casefold() for name in names}) == len(names)
    assert stage_file("intent_2-b") == "intent_2-b", "old runs and plain names have the name itself"


@given(st.text(), st.text())
def test_files_of_two_names_are_the_same_only_for_names_that_differ_in_case(one, other):
    assert SAFE.fullmatch(f"{stage_file(one)}.parquet")
    assert (stage_file(one).casefold() == stage_file(other).casefold()) <= (one.casefold() == other.casefold())


@pytest.mark.parametrize(
    ("gate", "last"), [("Gate", "gate"), (E_ACUTE, normalize("NFD", E_ACUTE)), ("门１", "门1"), ("STRASSE", "straße")]
)
def test_names_that_look_alike_are_refused(gate, last):
    spec = run_with_names("闸门", "意图").spec.to_dict()
    for stage, name in zip(spec["stage"], (gate, last), strict=True):
        stage["name"] = name
    with pytest.raises(SpecError, match="two stages have that name, capital letters or not; give each its own"):
        CascadeSpec.from_dict(spec)


@pytest.mark.parametrize(
    "name", ["", " ", " 闸门", "闸门\u3000", "a\nb", "a\tb", "a=b", "a\x1b[31m", "\u202eetag", "a\ud800"]
)
def test_a_name_that_cannot_be_shown_or_typed_is_refused_in_one_line(name):
    spec = run_with_names("闸门", "意图").spec.to_dict()
    spec["stage"][0]["name"] = name
    with pytest.raises(SpecError, match="give a name without '=', line breaks and control characters") as error:
        CascadeSpec.from_dict(spec)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("old", ["con", "Gate_2", "x" * 150])
def test_runs_of_older_versions_are_read_from_the_files_that_they_name(old, tmp_path):
    run = run_with_names(old, "last")
    run.write(tmp_path / "run")
    folder, manifest_file = tmp_path / "run" / "scores", tmp_path / "run" / "manifest.json"
    os.rename(folder / f"{stage_file(old)}.parquet", folder / f"{old}.parquet")
    manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
    manifest["contents"][f"scores/{old}.parquet"] = manifest["contents"].pop(f"scores/{stage_file(old)}.parquet")
    manifest_file.write_text(json.dumps(manifest), encoding="utf-8")
    read = Run.read(tmp_path / "run")
    read.check()
    assert np.array_equal(read.scores(old).logits, run.scores(old).logits)


def test_commands_take_stages_and_labels_in_chinese(tmp_path):
    run = run_with_names("闸门/一", "意图")
    spec, examples = tmp_path / "级联.toml", tmp_path / "测试.tsv"
    run.spec.write(spec)
    run.examples[["text", "label"]].to_csv(examples, sep="\t", index=False)
    given_logits = []
    for i, stage in enumerate(run.spec.stages):
        np.save(tmp_path / f"{i}.npy", run.scores(stage.name).logits)
        given_logits += ["--logits", f"{stage.name}={tmp_path / f'{i}.npy'}"]
    output = tmp_path / "结果"
    result = CliRunner().invoke(
        app, ["import-logits", str(spec), str(examples), *given_logits, "--output", str(output)]
    )
    assert result.exit_code == 0, result.output
    assert "闸门/一" in result.output
    assert Run.read(output).predictions["predicted"].tolist() == run.predictions["predicted"].tolist()


def test_a_traffic_log_of_stages_in_chinese_is_collected(tmp_path):
    run = run_with_names("闸门", "a/b")
    with TrafficLog(tmp_path / "log") as log:
        for batch in answered_batches(run):
            log.add(batch)
    found = collect(tmp_path / "log").run.write(tmp_path / "run")
    assert found.predictions["predicted"].tolist() == run.predictions["predicted"].tolist()
    assert found.predictions["decided_by"].tolist() == run.predictions["decided_by"].tolist()


CHINESE = [
    "我想续借《红楼梦》，可以吗？", "图书馆周末开门吗", "借书证丢了怎么补办", "WiFi密码是多少？", "我要退3本书",
    "I'd like to pay my bill.", "ＡＢＣ，全角 字母", "𠮷野家",
]  # fmt: skip


def test_tokens_of_chinese_and_english_are_those_of_berts_basic_tokenizer():
    basic = reference.load("tokenization").BasicTokenizer(do_lower_case=False)
    for text in CHINESE:
        assert split_tokens(text) == basic.tokenize(text)


def test_letters_of_scripts_without_blanks_are_tokens_each():
    assert split_tokens("カードをなくした。") == list("カードをなくした。")
    assert split_tokens("ที่นี่") == ["ที่", "นี่"]
    assert split_tokens("은행 계좌") == ["은행", "계좌"]
    assert split_words("नमस्ते, दुनिया!") == ["नमस्ते", "दुनिया"]
    assert split_words("我要续借ABC书") == ["我要", "要续", "续借", "abc", "书"]


@given(st.text())
def test_tokens_contain_every_character_but_blanks_and_controls(text):
    joined = "".join(split_tokens(text))
    assert not any(character.isspace() for character in joined)
    kept = [character for character in text if character.isalnum() or character in "。，!?"]
    assert [character for character in joined if character.isalnum() or character in "。，!?"] == kept


@pytest.mark.filterwarnings("ignore:.*slices by wordpieces are left out")
def test_lengths_and_words_of_chinese_texts_make_slices(tmp_path):
    run = run_with_names("闸门", "意图")
    texts = ["我要续借" if i % 2 else "请问怎么预约明天的自习室座位呢" for i in range(40)]
    scores = {stage.name: run.scores(stage.name) for stage in run.spec.stages}
    run = Run(run.manifest, run.examples.assign(text=texts), scores, run.predictions, run.timings)
    table = features(run)
    assert table["n_tokens"].tolist() == [len(text) for text in texts]
    assert {"has_续借", "has_预约"} <= set(table)
    assert slices(run, min_size=5)["rule"].tolist()[0] in ("n_tokens <= 4", "n_tokens > 4")
    assert isinstance(find_slices(run, min_size=5), pd.DataFrame)


def test_a_run_says_which_file_has_which_stage(tmp_path):
    run = run_with_names("闸门", "intent").write(tmp_path / "run")
    for name in ("闸门", "intent"):
        path = f"scores/{stage_file(name)}.parquet"
        assert run.manifest["contents"][path] == sha256((tmp_path / "run" / path).read_bytes()).hexdigest()
        assert Path(path).parent.name == "scores"


def test_no_chinese_text_of_the_walk_through_is_in_two_splits():
    folder = Path(__file__).parents[1] / "data" / "chinese"
    splits = {name: EvalSet.read(folder / f"{name}.tsv").examples for name in ("train", "dev", "test")}
    texts = pd.concat(splits)
    assert texts["text"].is_unique
    assert ((texts["label"] == "域外") == (texts["scope"] == "域外")).all()
    for examples in splits.values():
        counts = examples["label"].value_counts()
        assert len(counts) == 15
        assert counts.min() >= 9
