"""Attributions, compared with float64 arithmetic and with integrals by hand; how displays and commands show them."""

from __future__ import annotations

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from test_fast import logits_in_float64
from typer.testing import CliRunner

from cascade_lab import CascadeSpec, Stage
from cascade_lab.bert.attributions import attribute, attribute_path
from cascade_lab.bert.checkpoint import read_checkpoint
from cascade_lab.bert.tokenization import Encoding
from cascade_lab.cli import app
from cascade_lab.displays.text import TextAttributionDisplay
from cascade_lab.exceptions import SpecError

TEXT = "Please pay my lost card, unpaid bills ☃ now"
EVIL = '$x_1$ \u202eabc 🙂 \x07 <script>alert(1)</script> <img src=x onerror=alert(1)> =HYPERLINK("a")'


@pytest.fixture(scope="module")
def stages(tiny):
    return CascadeSpec.read(tiny).stages


@pytest.fixture(scope="module")
def fine(stages):
    """The attributions of TEXT and of another text, with many steps."""
    return attribute(stages[-1], [TEXT, "what is my bill"], n_steps=128)


@pytest.fixture(scope="module")
def in_float64(stages):
    """A function from embeddings of TEXT's wordpieces to logits; the embeddings of TEXT; that of [PAD]."""
    checkpoint = read_checkpoint(stages[-1])
    with Stage(stages[-1]) as stage:
        (encoding,) = stage.encode([TEXT])
    in_full = {name: value.astype(np.float64) for name, value in checkpoint.weights.items()}
    table = in_full["bert/embeddings/word_embeddings"]
    numbered = Encoding(list(range(len(encoding.input_ids))), encoding.n_first)

    def logits(embeddings):
        weights = {**in_full, "bert/embeddings/word_embeddings": embeddings}
        return logits_in_float64(checkpoint.config, weights, numbered)

    return logits, table[encoding.input_ids], table[checkpoint.vocab["[PAD]"]]


def slopes(function, x, direction, step=1e-4):
    """The derivative of `function` by each row of `x`, in the direction of that row of `direction`."""
    rows = []
    for row in range(len(x)):
        shift = np.zeros_like(x)
        shift[row] = step * direction[row]
        rows.append((function(x + shift) - function(x - shift)) / (2 * step))
    return np.array(rows)


def test_gradient_x_input_is_the_slope_in_float64(stages, in_float64):
    logits, x, _ = in_float64
    label = int(logits(x).argmin())
    (attribution,) = attribute(stages[-1], [TEXT], target=stages[-1].labels[label], method="gradient_x_input")
    assert attribution.wordpiece_scores == pytest.approx(slopes(lambda at: logits(at)[label], x, x), abs=2e-4)
    assert attribution.logit == pytest.approx(logits(x)[label], abs=1e-4)
    assert attribution.baseline_logit == pytest.approx(logits(np.zeros_like(x))[label], abs=1e-4)
    assert attribution.n_steps == 1
    assert attribution.predicted != attribution.target


def test_integrated_gradients_are_the_integral_in_float64(stages, fine, in_float64):
    logits, x, pad = in_float64
    attribution = fine[0]
    label = int(logits(x).argmax())
    assert attribution.target == attribution.predicted == stages[-1].labels[label]
    baseline = np.tile(pad, (len(x), 1))
    baseline[[0, -1]] = x[[0, -1]]
    middles = (np.arange(60) + 0.5) / 60
    along = [slopes(lambda at: logits(at)[label], baseline + t * (x - baseline), x - baseline) for t in middles]
    assert attribution.wordpiece_scores == pytest.approx(np.mean(along, axis=0), abs=5e-3)
    assert attribution.wordpiece_scores[[0, -1]].tolist() == [0, 0]
    assert attribution.baseline_logit == pytest.approx(logits(baseline)[label], abs=1e-4)


def test_the_completeness_error_falls_with_the_number_of_steps(stages, fine):
    errors = []
    coarse = (attribute(stages[-1], [TEXT, "what is my bill"], n_steps=n_steps) for n_steps in (1, 16))
    for attributions in (*coarse, fine):
        for attribution in attributions:
            expected = attribution.scores.sum() - (attribution.logit - attribution.baseline_logit)
            assert attribution.completeness_error == pytest.approx(expected, abs=1e-9)
        errors.append(max(abs(attribution.completeness_error) for attribution in attributions))
    assert errors[0] > 10 * errors[1] > errors[2]
    assert errors[-1] < 1e-3


def test_the_scores_of_a_product_are_its_integrals():
    """For f = a²b from 0 to (1, 1), a gets ∫2t² = 2/3 and b gets ∫t² = 1/3. Two Gauss points are exact to degree 3."""

    def function(points):
        a, b = points[:, 0, 0], points[:, 1, 0]
        return a**2 * b, np.stack([2 * a * b, a**2], axis=1)[:, :, None]

    scores, value, baseline = attribute_path(function, np.ones((2, 1)), np.zeros((2, 1)), n_steps=2)
    assert scores == pytest.approx([2 / 3, 1 / 3])
    assert (value, baseline) == (1, 0)
    fine_scores, _, _ = attribute_path(function, np.ones((2, 1)), np.zeros((2, 1)), n_steps=100)
    assert fine_scores == pytest.approx([2 / 3, 1 / 3])


def test_a_words_score_is_the_sum_of_its_wordpieces_scores(stages, fine):
    attribution = fine[0]
    words = ["[CLS]", "please", "pay", "my", "lost", "card", ",", "unpaid", "bills", "☃", "now", "[SEP]"]
    assert attribution.words == words
    assert attribution.wordpieces[5:15] == ["card", "[UNK]", "u", "##n", "##p", "##a", "##i", "##d", "bill", "##s"]
    by_word = dict(zip(attribution.words, attribution.scores, strict=True))
    assert by_word["unpaid"] == pytest.approx(attribution.wordpiece_scores[7:13].sum())
    assert by_word["bills"] == pytest.approx(attribution.wordpiece_scores[13:15].sum())
    assert attribution.scores.sum() == pytest.approx(attribution.wordpiece_scores.sum())
    assert attribution.n_unread == 0


def test_words_after_max_seq_length_are_counted_and_pairs_have_two_segments(stages):
    short = replace(stages[-1], max_seq_length=8)
    (truncated,) = attribute(short, ["pay unpaid bill now please"], n_steps=2)
    assert truncated.words == ["[CLS]", "pay", "unpaid", "[SEP]"]
    assert truncated.wordpieces == ["[CLS]", "pay", "u", "##n", "##p", "##a", "##i", "[SEP]"]
    assert truncated.n_unread == 3

    (pair,) = attribute(stages[-1], ["pay my bill"], ["what weather"], n_steps=2)
    assert pair.words == ["[CLS]", "pay", "my", "bill", "[SEP]", "what", "weather", "[SEP]"]
    with Stage(stages[-1]) as stage:
        logits = stage.logits(stage.encode(["pay my bill"], ["what weather"]))[0]
    assert pair.logit == pytest.approx(logits.max(), abs=1e-4)


def test_a_gates_target_is_its_pass_label_and_wrong_arguments_are_refused(stages):
    gate = attribute(stages[0], ["pay my bill", ""], n_steps=1)
    assert {attribution.target for attribution in gate} == {"in"}
    assert gate[1].words == ["[CLS]", "[SEP]"]
    assert gate[1].completeness_error == 0
    for arguments, message in [
        ({"method": "integrated_gradient"}, "did you mean 'integrated_gradients'"),
        ({"target": "9"}, "has no label '9'"),
        ({"n_steps": 0}, "n_steps is 0; it must be at least 1"),
    ]:
        with pytest.raises(SpecError, match=message):
            attribute(stages[-1], ["pay"], **arguments)


def test_hostile_and_long_texts_do_not_change_the_page_or_the_figure(stages):
    texts = [EVIL, "a" * 50_000, "pay the bill " * 4000, "", "שלום עולם"]
    display = TextAttributionDisplay(attribute(stages[-1], texts, n_steps=1), title=EVIL)
    html = display.to_html()
    assert "<script" not in html
    assert "<img" not in html
    assert "\u202e" not in html
    assert "\x07" not in html
    assert "words that are not read" in html
    assert len(html) < 60_000
    display.plot().figure_.canvas.draw()
    drawn = [text.get_text() for text in display.ax_.texts]
    assert r"\$" in drawn
    assert max(map(len, drawn)) < 160
    plt.close("all")


def test_scores_for_and_against_differ_in_more_than_colour(fine):
    attribution = replace(fine[0], words=["good", "bad", "plain"], scores=np.array([2.0, -1.0, 0.01]))
    html = TextAttributionDisplay([attribution]).to_html()
    good, bad, plain = html.split("<bdi")[-3:]
    assert "px solid" in good
    assert "+2.00" in good
    assert "px dashed" in bad
    assert "-1.00" in bad
    assert "border-bottom:none" in plain


def test_examples_of_a_run_are_attributed(tiny_run):
    ids = tiny_run.examples["example_id"].tolist()[3:5]
    display = TextAttributionDisplay.from_run(tiny_run, ids, stage="gate", n_steps=1)
    scores = tiny_run.scores("gate")
    for row, attribution in zip((3, 4), display.attributions, strict=True):
        assert attribution.logit == pytest.approx(float(scores.logits[row, 1]), abs=1e-4)


def test_the_command_shows_words_and_writes_a_page(tiny, tmp_path):
    output = tmp_path / "new" / "page.html"
    arguments = ["attribute", str(tiny), "pay my bill", EVIL, "--stage", "gate", "--output", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "pay" in result.output
    assert "completeness error" in result.output
    page = output.read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert "<script" not in page
    refused = CliRunner().invoke(app, ["attribute", str(tiny), "pay", "--stage", "gat"])
    assert refused.exit_code == 2
    assert "did you mean 'gate'" in refused.output
