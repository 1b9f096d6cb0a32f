"""JSON from elsewhere: an object that has a key twice is refused by name, wherever this package reads JSON."""

from __future__ import annotations

import json
import re

import pytest
from helpers import CONFIG, random_run
from hypothesis import given
from hypothesis import strategies as st
from test_huggingface import altered
from typer.testing import CliRunner

from cascade_lab import EvalSet, Run
from cascade_lab.bert.checkpoint import check_case, read_config
from cascade_lab.cli import app
from cascade_lab.exceptions import CascadeLabError
from cascade_lab.json_files import parse, read_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=9,
)


@given(VALUES)
def test_what_has_no_key_twice_is_parsed_as_ever(value):
    assert parse(json.dumps(value)) == json.loads(json.dumps(value)) == value


@given(st.dictionaries(st.text(max_size=4), VALUES, min_size=1, max_size=4), st.integers(0, 3), st.booleans())
def test_a_key_that_is_there_twice_is_named(content, place, is_inside):
    key = list(content)[place % len(content)]
    items = [*content.items(), (key, None)]
    text = "{" + ", ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in items) + "}"
    with pytest.raises(ValueError, match="is there twice") as raised:
        parse(f'[{{"a": {text}}}]' if is_inside else text)
    assert len(str(raised.value).splitlines()) == 1


def doubled(path, key: str) -> str:
    """Write the first pair of `key` in a JSON file a second time, with another value; return what is expected."""
    text = path.read_text(encoding="utf-8")
    assert f'"{key}"' in text
    path.write_text(re.sub(rf'"{key}"\s*:', f'"{key}": "other", "{key}":', text, count=1), encoding="utf-8")
    return f"the key '{key}' is there twice"


def test_a_manifest(tmp_path):
    random_run(tmp_path / "run", n=9)
    message = doubled(tmp_path / "run" / "manifest.json", "run_id")
    with pytest.raises(CascadeLabError, match=f"manifest.json.*{message}.*; put the file back"):
        Run.read(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.jsonl", '{"text": "x", "label": "p"}\n{"text": "x", "label": "p", "label": "q"}\n', "line 2"),
        ("a.json", '[{"text": "x", "label": "p", "label": "q"}]', ""),
        ("a.json", '{"test": [["x", "p"]], "label": [["y", "p"]], "label": []}', ""),
    ],
)
def test_eval_sets(name, content, where, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(CascadeLabError, match=rf"{name} ?{where}: .*\(the key 'label' is there twice\); fix"):
        EvalSet.read(tmp_path / name)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_files_of_a_hugging_face_directory(name, tmp_path):
    source = altered(tmp_path, "gelu")
    key = {"config.json": "hidden_size", "tokenizer_config.json": "do_lower_case", "tokenizer.json": "lowercase"}[name]
    message = doubled(source / name, key)
    result = CliRunner().invoke(app, ["import-hf", str(source), "--output", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert f"{name}: " in result.stderr
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_files_beside_a_checkpoint(tmp_path):
    config = tmp_path / "bert_config.json"
    config.write_text(json.dumps({**CONFIG, "vocab_size": 9}))
    assert read_config(config)["hidden_act"] == "gelu"
    message = doubled(config, "hidden_act")
    with pytest.raises(CascadeLabError, match=f"bert_config.json: .*{message}.*; give a bert_config_file"):
        read_config(config)
    (tmp_path / "training.json").write_text('{"flags": {"do_lower_case": true, "do_lower_case": false}}')
    with pytest.raises(CascadeLabError, match=r"training.json: .*\(the key 'do_lower_case' is there twice\); copy"):
        check_case("stage 'gate'", True, {tmp_path})
    with pytest.raises(CascadeLabError, match=r"training.json: .*\(the key 'do_lower_case' is there twice\); delete"):
        read_object(tmp_path / "training.json", error=CascadeLabError, way_out="delete the folder")
