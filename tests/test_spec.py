"""`cascade.toml`: what is read and written, and each thing that is refused."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from textwrap import dedent

import pytest
from helpers import SPEC

from cascade_lab import CascadeSpec
from cascade_lab.exceptions import SpecError


def write(folder: Path, content: str) -> Path:
    path = folder / "cascade.toml"
    path.write_text(dedent(content), encoding="utf-8")
    return path


def test_a_spec_is_read_with_its_common_keys_and_relative_paths(tmp_path):
    spec = CascadeSpec.read(write(tmp_path, SPEC))
    gate, intent = spec.stages
    assert (spec.name, gate.max_seq_length, intent.max_seq_length) == ("tiny", 24, 24)
    assert gate.vocab_file == tmp_path / "gate" / "vocab.txt"
    assert gate.is_gate
    assert not intent.is_gate
    assert gate.do_lower_case is True  # BERT's own default
    assert spec.labels == ("0", "1", "2", "3", "oos")
    assert spec.thresholds == {"gate": 0.5, "intent": None}


def test_labels_come_from_a_file_too(tmp_path):
    (tmp_path / "labels.txt").write_text("\n".join(map(str, range(40))) + "\n")
    spec = CascadeSpec.read(write(tmp_path, SPEC.replace('["0", "1", "2", "3"]', '"labels.txt"')))
    assert spec.last.labels == tuple(map(str, range(40)))


def test_a_spec_survives_the_way_through_plain_data(tmp_path):
    spec = CascadeSpec.read(write(tmp_path, SPEC))
    again = CascadeSpec.from_dict(spec.to_dict())
    assert again.to_dict() == spec.to_dict()
    assert again.stages[0].threshold == 0.5


def test_three_stages_and_a_rejecting_last_one(tmp_path):
    middle = SPEC[SPEC.index("[[stage]]") : SPEC.rindex("[[stage]]")].replace('name = "gate"', 'name = "topic"')
    middle = middle.replace('["oos", "in"]', '["chat", "spam", "work"]').replace('"in"', '"work"')
    last = SPEC.rindex("[[stage]]")
    spec = CascadeSpec.read(
        write(tmp_path, SPEC[:last] + middle + SPEC[last:] + 'min_probability = 0.3\nreject_label = "unsure"\n')
    )
    assert [stage.name for stage in spec.stages] == ["gate", "topic", "intent"]
    assert spec.reject_labels == ("oos", "chat", "spam", "unsure")
    assert spec.in_scope_labels == ("0", "1", "2", "3")


def test_other_thresholds_make_another_spec(tmp_path):
    spec = CascadeSpec.read(write(tmp_path, SPEC))
    assert spec.with_thresholds({"gate": 1}).stages[0].threshold == 1.0
    assert spec.stages[0].threshold == 0.5
    for thresholds, message in (
        ({"gaet": 0.5}, "no stage is named 'gaet'; did you mean 'gate'?"),
        ({"gate": 1.01}, "threshold is 1.01; it must be a number from 0 to 1"),
        ({"gate": float("nan")}, "threshold is nan"),
        ({"intent": 0.5}, "min_probability needs a reject_label"),
    ):
        with pytest.raises(SpecError, match=message.replace("?", r"\?")):
            spec.with_thresholds(thresholds)


GATE_LABELS = 'labels = ["oos", "in"]'
BAD = {
    "not TOML": ("name =\n", "not TOML: .*line 1"),
    "no stage": ('name = "x"', "has no stage"),
    "unknown key": (SPEC.replace("threshold", "treshold"), "stage 'gate': unknown key 'treshold'; did you mean 'thr"),
    "unknown common key": ("max_seq_len = 3\n" + SPEC, "unknown key 'max_seq_len'; did you mean 'max_seq_length'"),
    "missing key": (SPEC.replace("vocab_file", "# ", 1), "stage 'gate': vocab_file is missing"),
    "missing labels": (SPEC.replace(GATE_LABELS, ""), "stage 'gate': labels is missing"),
    "threshold above 1": (SPEC.replace("0.5", "1.5"), "stage 'gate': threshold is 1.5; it must be a number from 0"),
    "threshold is text": (SPEC.replace("0.5", '"0.5"'), "threshold is '0.5'; it must be a number"),
    "no threshold": (SPEC.replace("threshold = 0.5", ""), "stage 'gate': threshold is missing"),
    "no pass label": (SPEC.replace('pass_label = "in"', ""), "stage 'gate': pass_label is missing"),
    "two of one name": (SPEC.replace('"intent"\n    init', '"GATE"\n    init'), "two stages have that name"),
    "pass label is no label": (SPEC.replace('pass_label = "in"', 'pass_label = "on"'), "'on' is not one of its labels"),
    "doubled label": (SPEC.replace('"2", "3"', '"2", "2"'), "stage 'intent': label '2' occurs twice"),
    "one label": (SPEC.replace('["0", "1", "2", "3"]', '["0"]'), "at least 2 labels, not 1"),
    "label not text": (SPEC.replace('["0", "1", "2", "3"]', "[0, 1]"), "labels must be a list of strings"),
    "labels file missing": (SPEC.replace('["0", "1", "2", "3"]', '"no.txt"'), "labels file .*no.txt cannot be read"),
    "last stage is a gate": (
        SPEC + '    pass_label = "1"\n    threshold = 0.5\n',
        "stage 'intent': .* belong to gates",
    ),
    "reject at a gate": (
        SPEC.replace("threshold", 'reject_label = "x"\n    threshold'),
        "reject_label belongs to the last",
    ),
    "min without reject": (SPEC + "    min_probability = 0.5\n", "min_probability needs a reject_label"),
    "wrong type": (SPEC.replace("= 24", '= "24"'), "max_seq_length must be a whole number, not '24'"),
    "length too small": (SPEC.replace("= 24", "= 2"), "max_seq_length is 2"),
    "name has a line break": (SPEC.replace('name = "gate"', 'name = "ga\\nte"'), "give a name without '='"),
    "stage is no table": ("stage = [1]", "has no stage"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_spec_is_refused_with_a_line_that_names_the_fault(fault, tmp_path):
    content, message = BAD[fault]
    path = write(tmp_path, content)
    with pytest.raises(SpecError, match=message) as caught:
        CascadeSpec.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value).rstrip()


def test_byte_order_marks_are_no_part_of_a_name_or_a_label(tmp_path):
    path = tmp_path / "cascade.toml"
    path.write_text(dedent(SPEC.replace('["0", "1", "2", "3"]', '"labels.txt"')), encoding="utf-8-sig")
    (tmp_path / "labels.txt").write_text("light\u2028on\r\ngarden\r\ndoor\r\n\r\n", encoding="utf-8-sig", newline="")
    spec = CascadeSpec.read(path)
    assert spec.name == "tiny"
    assert spec.last.labels == ("light\u2028on", "garden", "door")


HOSTILE = {
    "nested arrays": (f"tuned_on = {{a = {'[' * 100_000}{']' * 100_000}}}", "too deeply nested"),
    "nested tables": (f"tuned_on = {'{a=' * 100_000}1{'}' * 100_000}", "too deeply nested"),
    "nested a little": (f"tuned_on = {{a = {'[' * 40}{']' * 40}}}\n{SPEC}", "nested more than 32 deep"),
    "long dotted key": (f"{'a.' * 200_000}a = 1", "a key has more than 32 parts"),
    "long dotted table": (f"[{'a . ' * 20_000}a]", "a key has more than 32 parts"),
    "quoted dotted key": (
        f"x = {{{'^.'.replace('^', chr(34) + chr(92) + chr(34) + chr(34)) * 20_000}a = 1}}",
        "32 parts",
    ),
    "long integer": (SPEC.replace("= 24", f"= {'1' * 100_000}"), "not TOML: Exceeds the limit"),
    "hexadecimal integer": (SPEC.replace("= 24", f"= 0x{'f' * 10_000}"), "more than 64 bits"),
    "65 bits": (SPEC.replace("threshold = 0.5", f"temperature = {10**400}\n    threshold = 0.5"), "more than 64 bits"),
    "NUL in a path": (SPEC.replace('"gate/vocab.txt"', '"a\\u0000b"'), "vocab_file is .*contains no NUL"),
    "NUL in labels": (SPEC.replace('["0", "1", "2", "3"]', '"a\\u0000b"'), "labels is .*contains no NUL"),
    "unknown home": (SPEC.replace('"gate/vocab.txt"', '"~no body/v"'), "vocab_file is '~no body/v', but there is no"),
    "unknown home of labels": (SPEC.replace('["0", "1", "2", "3"]', '"~no body/v"'), "labels is .* no such user"),
    "date that does not exist": ("tuned_on = 2026-02-31", "not TOML"),
    "large": ("#" * (9 * 2**20), "is larger than 8 MiB"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_hostile_spec_is_refused_in_one_line_with_bounded_memory(fault, tmp_path):
    content, message = HOSTILE[fault]
    path = write(tmp_path, content)
    tracemalloc.start()
    with pytest.raises(SpecError, match=message) as caught:
        CascadeSpec.read(path)
    assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_many_labels_are_read_in_time_that_grows_with_their_number(tmp_path):
    (tmp_path / "labels.txt").write_text("".join(f"label {i}\n" for i in range(100_000)))
    spec = CascadeSpec.read(write(tmp_path, SPEC.replace('["0", "1", "2", "3"]', '"labels.txt"')))
    assert len(spec.last.labels) == 100_000


def test_a_missing_file_and_bytes_that_are_not_utf8(tmp_path):
    with pytest.raises(SpecError, match=r"none\.toml: cannot be read"):
        CascadeSpec.read(tmp_path / "none.toml")
    path = tmp_path / "cascade.toml"
    path.write_bytes(b'name = "\xff"')
    with pytest.raises(SpecError, match="byte 8 is not UTF-8"):
        CascadeSpec.read(path)


def test_a_null_of_a_manifest_is_left_out_of_the_file(tmp_path):
    spec = CascadeSpec.from_dict(
        {
            "name": "one",
            "calibrated_on": {"last": {"run_id": None, "evalset": {"split": None, "parts": [None, {"n": None}, 3]}}},
            "stage": [{"name": "last", "labels": ["a", "b"]}],
        }
    )
    spec.write(tmp_path / "cascade.toml")
    again = CascadeSpec.read(tmp_path / "cascade.toml")
    assert again.calibrated_on == {"last": {"evalset": {"parts": [{}, 3]}}}
