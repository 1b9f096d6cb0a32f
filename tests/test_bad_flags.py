"""Bad flags of the commands: each ends with one line and exit code 2, whatever is wrong, and never with a traceback."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from damages import write_good_runs
from helpers import CONFIG
from typer.testing import CliRunner

from cascade_lab.cli import app

FIT_REJECTOR = [
    "--evidence ,", "--evidence =", "--evidence gate0,,nothing", "--evidence gate1", "--evidence last",
    "--evidence gate0.knn", "--evidence last.", "--evidence .energy", "--evidence other.energy",
    "--evidence gate0.energy.x", "--evidence energie", "--evidence GATE0", "--evidence \x1b[31m",
    "--evidence \u202eenergy", "--evidence mahalanobis", "--evidence knn",
    "--evidence relative_mahalanobis --train-run {plain}", "--evidence knn --train-run {folder}",
    "--evidence knn --train-run none", "--train-run {plain}/manifest.json", "--evidence energy --in-scope-accuracy 2",
    "--evidence energy --in-scope-accuracy -0.1", "--evidence energy --in-scope-accuracy nan",
    "--evidence energy --in-scope-accuracy inf", "--evidence energy --in-scope-accuracy x",
    "--evidence energy --in-scope-accuracy 1.0", "--evidnce energy", "--evidence", "--train-run",
    "--evidence energy --overwrite=1", "--evidence energy extra", "--evidence energy,\x00",
]  # fmt: skip
CALIBRATE = [
    "--method Platt", "--method plat", "--method ''", "--method auto,platt", "--method softmax", "--method \x1b[31m",
    "--method", "--method none", "--method platt,beta", "--method vektor", "--method platt --stage last",
    "--method beta --stage last", "--method isotonic --stage last", "--method vector --stage gate0",
    "--method platt --stage gate1", "--method auto --stage ''", "--method auto --stage GATE0",
    "--method auto --stage gate0,last", "--method auto --stage gate0.x", "--stage", "--stage \u202elast",
    "--method auto --stage gate0 --stage none", "--method platt --everything=1", "--methode platt",
    "--method platt extra", "--method 0", "--method temperature --stage x", "--method=", "--method NaN",
    "--method auto --all", "--method \x00", "--method platt --overwrite --stage none",
]  # fmt: skip
TUNE = [
    "--test {other}", "--test none --maximize accuracy", "--test {folder} --maximize accuracy",
    "--test {plain} --maximize accuracy", "--test {plain}/manifest.json --maximize accuracy",
    "--test '' --maximize accuracy", "--test", "--test \x1b[31m --maximize accuracy",
    "--test {rejector} --maximize accuracy", "--test {other} --maximize acuracy",
    "--test {other} --minimize accuracy --maximize risk", "--test {other} --maximize accuracy --at-least risk",
    "--test {other} --maximize accuracy --at-least x=0.5", "--test {other} --maximize accuracy --at-least risk=nan",
    "--test {other} --maximize accuracy --at-least =0.5",
    "--test {other} --maximize accuracy --at-least accuracy=1e999",
    "--test {other} --maximize accuracy --at-most p95_ms=-1",
    "--test {other} --maximize accuracy --at-least accuracy=2", "--test {other} --maximize accuracy --prevalence 2",
    "--test {other} --maximize accuracy --prevalence nan", "--test {other} --maximize accuracy --prevalence -1",
    "--test {other} --maximize accuracy --stage none", "--test {other} --maximize accuracy --confidence 0.4",
    "--test {other} --maximize accuracy --confidence nan", "--test {other} --maximize accuracy --delta 0.9",
    "--test {other} --maximize accuracy --guarantee x=0.5",
    "--test {other} --maximize accuracy --guarantee accuracy=nan",
    "--test {other} --maximize accuracy --guarantee accuracy=0.3 --by-label",
    "--test {other} --minimize mean_cost --cost x=5", "--test {other} --minimize mean_cost --cost 'false accept=x'",
    "--test {other} --minimize mean_cost --cost 'false accept=nan'",
    "--test {other} --maximize accuracy --cost 'false accept'", "--test {other} --maximize \x00",
]  # fmt: skip
STUDY = [
    "--known-ratio", "--known-ratio ''", "--known-ratio x", "--known-ratio 0", "--known-ratio 2",
    "--known-ratio -0.5", "--known-ratio nan", "--known-ratio inf", "--known-ratio 0.5,", "--known-ratio 0.5;0.75",
    "--known-ratio 0.5,0.5", "--known-ratio 1e-9", "--known-ratio 0.5 --seeds x", "--known-ratio 0.5 --seeds 1.5",
    "--known-ratio 0.5 --seeds -1", "--known-ratio 0.5 --seeds ,", "--known-ratio 0.5 --seeds 0,0",
    "--known-ratio 0.5 --seeds 99999999999999999999", "--known-ratio 0.5 --accept 2", "--known-ratio 0.5 --accept 0",
    "--known-ratio 0.5 --accept nan", "--known-ratio 0.5 --accept x", "--known-ratio 0.5 --evidence energie",
    "--known-ratio 0.5 --evidence ''", "--known-ratio 0.5 --evidence gate,energy", "--known-ratio 0.5 --evidence ,",
    "--known-ratio 0.5 --out-of-scope ''", "--known-ratio 0.5 --out-of-scope nothing", "--seeds 0", "--accept 0.9",
    "--known-ratio 0.5 --data none", "--known-ratio 0.5 --init none", "--known-ratio 0.5 --evidence \x1b[31m",
]  # fmt: skip
MONITOR = [
    "", "--against", "--against none", "--against ''", "--against {folder}", "--against {plain}/manifest.json",
    "--against {other}/scores", "--against \x1b[31m", "--against {other} extra", "--agianst {other}",
    "--against {other} --alpha 0", "--against {other} --alpha 0.6", "--against {other} --alpha nan",
    "--against {other} --alpha x", "--against {other} --alpha -1", "--against {other} --alpha",
    "--against {other} --maximize acuracy", "--against {other} --maximize ''",
    "--against {other} --maximize accuracy --minimize risk", "--against {other} --maximize \x00",
    "--against {other} --minimize x\u202e", "--against {other} --at-least accuracy",
    "--against {other} --at-least x=0.5", "--against {other} --at-least accuracy=nan",
    "--against {other} --at-least accuracy=2", "--against {other} --at-most risk=x",
    "--against {other} --at-most =0.5", "--against {other} --at-most risk=1e999",
    "--against {other} --minimize mean_cost --cost x=5",
    "--against {other} --minimize mean_cost --cost 'false accept=nan'",
    "--against {other} --minimize mean_cost --cost 'false accept'", "--against {other} --overwrite=1",
]  # fmt: skip
INIT = [
    "--gate-labels", "--gate-labels ''", "--gate-labels ,", "--gate-labels oos", "--gate-labels oos,in,out",
    "--gate-labels oos,oos", "--gate-labels none.txt", "--gate-labels {folder}", "--gate-labels {folder}/texts.tsv",
    "--gate-labels \x1b[31m", "--gate-labels \x00", "--intent-labels 0,1", "--intent-labels 0,1,2,2",
    "--intent-labels 0,1,2,", "--intent-labels 5,6,7,8", "--pass-label", "--pass-label ''",
    "--gate-labels oos,in --pass-label nothing",
    "--gate-labels oos,in --pass-label \u202ein", "--limit 0", "--limit -1", "--limit x", "--limit nan", "--limit 1e3",
    "--text-column nothing", "--text-column ''", "--label-column nothing", "--label-column \x1b[31m",
    "--label-map none.csv", "--label-map {folder}", "--label-map {folder}/texts.tsv", "--columns ''", "--columns text",
    "--columns text,,label", "--columns split,text", "--split nothing", "--encoding nothing", "--encoding ''",
    "--overwrite=1", "--gate_labels oos,in", "extra",
]  # fmt: skip
RUNS = [
    "{folder} --sort", "{folder} --sort ''", "{folder} --sort acuracy", "{folder} --sort Accuracy",
    "{folder} --sort accuracy,date", "{folder} --sort name", "{folder} --sort run", "{folder} --sort 0",
    "{folder} --sort nan", "{folder} --sort -date", "{folder} --sort \x1b[31m", "{folder} --sort \u202edate",
    "{folder} --sort \x00", "{folder} --sort same_texts", "{folder} --sort risk", "{folder} --sort=", "--sort",
    "{folder} --sorted accuracy", "{folder} --json=1", "{folder} --jsn", "{folder} --json --sort x",
    "{folder} --json extra", "{folder} {plain}", "{folder} --output x", "{folder} --overwrite", "none", "none --json",
    "{folder}/none", "{folder}/texts.tsv", "{plain}/manifest.json", "{folder}/init", "\x1b[31m", "\u202e", "\x00",
]  # fmt: skip
COMPARE = [
    "", "{plain}", "none", "''", "{folder}", "{plain}/manifest.json", "{plain}/none", "{plain}/scores", "\x1b[31m",
    "\x00", "{other} none", "{other} {plain}", "{other} {other}", "{other} {folder}", "{other} --column",
    "{other} --column nothing", "{other} --column ''", "{other} --column text", "{other} --column label",
    "{other} --column \x1b[31m", "{other} --column \u202e", "{other} --texts", "{other} --texts -1",
    "{other} --texts x", "{other} --texts 1.5", "{other} --texts nan", "{other} --picture",
    "{other} --picture {folder}", "{other} --picture {folder}/texts.tsv", "{other} --picture {folder}/texts.tsv/p.png",
    "{other} --output {folder}", "{other} --output", "{other} --overwrite=1", "{other} --colunm x",
]  # fmt: skip
BAD = {
    "fit-rejector": FIT_REJECTOR,
    "calibrate": CALIBRATE,
    "tune": TUNE,
    "study": STUDY,
    "monitor": MONITOR,
    "init": INIT,
    "runs": RUNS,
    "compare": COMPARE,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flags")
    write_good_runs(folder)
    rows = "".join(f"{split}\ttext {split} {i}\tl{i % 4}\n" for split in ("train", "val", "test") for i in range(24))
    (folder / "texts.tsv").write_text("split\ttext\tlabel\n" + rows)
    (folder / "init").mkdir()
    (folder / "init" / "bert_config.json").write_text(str({**CONFIG, "vocab_size": 9}).replace("'", '"'))
    return folder


@pytest.fixture(scope="module")
def starts(folder, tiny, tiny_evalset) -> dict[str, list[Path]]:
    """The arguments of each command before its flags, where these are not a run."""
    return {
        "study": [folder / "texts.tsv"],
        "init": [tiny.parent / "gate", tiny.parent / "intent", tiny_evalset],
        "runs": [],
    }


@pytest.mark.parametrize("command", BAD)
def test_bad_flags_are_one_line(command, folder, starts, tmp_path):
    assert len(BAD[command]) >= 30
    names = {name: folder / name for name in ("plain", "rejector")} | {
        "other": folder / "plain-other",
        "folder": folder,
    }
    for number, flags in enumerate(BAD[command]):
        words = [word.strip("'") for word in flags.format(**names).replace("false accept", "false@accept").split(" ")]
        words = [word.replace("false@accept", "false accept").replace("''", "") for word in words]
        output = tmp_path / f"{number}{'.toml' * (command == 'init')}"
        start = [command, *map(str, starts.get(command, [folder / "plain"]))]
        start += [] if command == "runs" or "--output" in words else ["--output", str(output)]
        start += ["--init", str(folder / "init")] if command == "study" and "--init" not in words else []
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            result = CliRunner().invoke(app, [*start, *words])
        what = f"{command} {flags!r}: {result.output!r} {result.exception!r}"
        assert isinstance(result.exception, SystemExit), what
        assert result.exit_code == 2, what
        assert "Traceback" not in result.output, what
        assert "\x1b[31m" not in result.stderr, what
        assert "\u202e" not in result.stderr, what
        if not result.stderr.startswith(("Usage:", "╭─ Error")):  # typer's own message of a wrong flag is a box
            assert result.stderr.startswith("error: "), what
            assert result.stderr.count("\n") == 1, what
        assert not output.exists(), what
