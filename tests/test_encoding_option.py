"""Files in other encodings are read with the option that the error message names; notices are lines on stderr."""

from __future__ import annotations

import shutil

import pytest
from helpers import texts, write_cascade
from test_checkpoint_reader import names_elsewhere, stage_in
from typer.testing import CliRunner

from cascade_lab import Cascade, Run, Stage
from cascade_lab.bert.checkpoint import read_vocab
from cascade_lab.bert.tokenization import Tokenizer, full_tokenizer
from cascade_lab.cli import app
from cascade_lab.exceptions import CheckpointWarning


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoding")
    write_cascade(folder)
    lines = ["text\tlabel", *(f"{text} café\t{i % 4}" for i, text in enumerate(texts(12)))]
    (folder / "set.tsv").write_bytes("\n".join(lines).encode("cp1252"))
    return folder


ENCODED = ("--encoding", "cp1252")


def test_the_message_names_the_option(folder):
    shown = invoke("run", folder / "cascade.toml", folder / "set.tsv", "--output", folder / "none")
    assert shown.exit_code == 2
    assert "set.tsv line 2: byte " in shown.stderr
    assert "is not UTF-8; save it as UTF-8, or name its encoding, for example --encoding cp1252" in shown.stderr
    shown = invoke("run", folder / "cascade.toml", folder / "set.tsv", "--encoding", "cp-nothing")
    assert shown.exit_code == 2
    assert "no encoding is named 'cp-nothing'; name it like utf-8 or cp1252" in shown.stderr


def test_commands_that_read_texts_take_an_encoding(folder, tmp_path):
    toml, table = folder / "cascade.toml", folder / "set.tsv"
    shown = invoke("run", toml, table, *ENCODED, "--output", tmp_path / "run", "--no-report")
    assert shown.exit_code == 0, shown.output
    assert Run.read(tmp_path / "run").examples["text"][0].endswith(" café")
    shown = invoke("vocabulary", "--train", table, *ENCODED, "--size", 100, "--output", tmp_path / "vocab.txt")
    assert shown.exit_code == 0, shown.output
    assert "é" in (tmp_path / "vocab.txt").read_text() or "e" in read_vocab(tmp_path / "vocab.txt")
    shown = invoke("audit", tmp_path / "run", "--against", table, *ENCODED, "--output", tmp_path / "audit.csv")
    assert shown.exit_code == 0, shown.output
    content = (tmp_path / "audit.csv").read_text("utf-8-sig")
    (tmp_path / "audit.csv").write_bytes(content.encode("cp1252"))
    corrected = ("correct", tmp_path / "run", tmp_path / "audit.csv", "--output", tmp_path / "corrected.tsv")
    if "é" in content:
        assert "--encoding cp1252" in invoke(*corrected).stderr
    assert invoke(*corrected, *ENCODED).exit_code == 0


@pytest.mark.parametrize(
    "command", ["run", "latency", "import-logits", "vocabulary", "audit", "correct", "finetune", "verify-precision"]
)
def test_every_command_with_a_table_has_the_option(command):
    from typer.main import get_command

    names = [option for parameter in get_command(app).commands[command].params for option in parameter.opts]
    assert "--encoding" in names


def test_a_notice_is_one_line_on_stderr(folder, tmp_path):
    """A copied cascade: the files `checkpoint` of both stages still name the originals."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for name in ("gate", "intent"):
        names_elsewhere(copy / name, folder / name)
    shown = invoke("predict", copy / "cascade.toml", "pay my bill")
    assert shown.exit_code == 0
    for name in ("gate", "intent"):
        assert shown.stderr.count(f"note: {copy / name / 'checkpoint'} names a checkpoint in another directory") == 1
    assert "note:" not in shown.stdout
    assert len(shown.stderr.splitlines()) == 2
    shown = invoke("export", copy / "cascade.toml", "--format", "hf", "--output", tmp_path / "hf")
    assert shown.stderr.count("note: ") == 2
    with pytest.warns(CheckpointWarning, match="names a checkpoint in another directory"):
        Cascade.load(copy / "cascade.toml").close()


def test_a_vocabulary_with_a_byte_order_mark_whose_first_token_is_special(folder, tmp_path):
    shutil.copytree(folder / "gate", tmp_path / "gate")
    path = tmp_path / "gate" / "vocab.txt"
    tokens = path.read_text().split("\n")
    tokens[0], tokens[1], tokens[2] = "[CLS]", "[UNK]", "[PAD]"
    path.write_text("\n".join(tokens))
    with Stage(stage_in(tmp_path / "gate")) as stage:
        expected = stage.logits(stage.encode(texts(3)))
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(tokens).encode() + b"\r\n\r\n \r\n")
    with Stage(stage_in(tmp_path / "gate")) as stage:
        encodings = stage.encode([*texts(3), "\u20ac 漢"])
        assert encodings[0].input_ids[0] == 0
        assert stage.logits(encodings[:3]).tolist() == expected.tolist()
    tokenizer = Tokenizer(path, do_lower_case=True, max_seq_length=24)
    assert tokenizer.text(tokenizer.encode(["Pay my bill"], ["now"])[0]) == "pay my bill / now"
    reference = full_tokenizer(path, do_lower_case=True)
    assert reference.convert_ids_to_tokens([0, 1, 2]) == ["[CLS]", "[UNK]", "[PAD]"]
    assert "" not in reference.vocab
