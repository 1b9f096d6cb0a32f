"""The terms of reports: what each means, and links from a term's first use on a page to its meaning."""

from __future__ import annotations

import re
from collections.abc import Container
from html import escape

GLOSSARY = {
    "accuracy": "the fraction of texts that are answered with their true label",
    "amortised": "of a time: that of a whole batch divided by its texts; nobody waits for exactly that time",
    "AUROC": "how well a stage's confidence separates two kinds of text: the probability that a text of one kind has "
    "the higher confidence; 0.5 is chance, 1 is perfect",
    "average precision": "how well a confidence finds the texts to stop: the mean precision over all thresholds",
    "blame": "the first stage on a text's way that decided wrongly is at fault",
    "calibrator": "numbers that correct a stage's probabilities before anything is compared with them; the simplest is "
    "a temperature, by which logits are divided",
    "cascade": "classifiers in series, each of which decides whether a text goes on to the next",
    "confidence": "the number between 0 and 1 that a stage's threshold is compared with",
    "confidence interval": "at 95%: of 100 such sets of texts, about 95 have intervals that contain the value for all "
    "texts of this kind",
    "counterfactual matrix": "the answers that rejected texts would have been given",
    "coverage": "the fraction of texts that are answered and not rejected",
    "cross-validation": "something is chosen on one part of the texts and measured on the rest, in turns",
    "deferral stage": "a stage that answers where its confidence reaches its threshold, and else passes the text on",
    "false accept": "a text out of scope that is answered with a class",
    "false reject": "a text in scope that is rejected",
    "gate": "a stage that passes a text on if the probability of its pass label reaches its threshold, and otherwise "
    "answers with another label",
    "in scope": "a text whose true label is one that the last stage answers with; all others are out of scope",
    "logit": "a stage's score of a label, from which probabilities are computed",
    "macro F1": "the mean of F1 over all true labels; F1 is the harmonic mean of a label's precision and recall",
    "ms/text": "amortised milliseconds per text: the time of a batch divided by its texts",
    "needless deferral": "a text that a deferral stage passes on although its own label is right",
    "optimism": "how much better a metric looks on the texts that thresholds were chosen on than on other texts",
    "oracle ladder": "the accuracy of the cascade if one stage, or all, made no mistake",
    "overconfident answer": "a wrong answer of a deferral stage; recoverable if the later stages would have been right",
    "point": "a percentage point: from 80% to 81% is one point",
    "reach": "the fraction of texts that arrive at a stage",
    "recoverable reject": "a text in scope that was rejected, although the last stage's most probable label is right",
    "reject": "to answer with a label that means “out of scope”",
    "reject precision": "of the rejected texts, the fraction whose true label is the answer",
    "reject recall": "of the texts out of scope, the fraction that is rejected with the right label",
    "rejector": "a logistic regression over scores of all stages, whose output decides what is rejected",
    "replay": "the answers at other thresholds, computed from kept logits",
    "risk": "of the texts that are not rejected, the fraction with a wrong answer",
    "shadow scores": "logits of texts that ended at an earlier stage, computed after the run, so that other thresholds "
    "can be replayed",
    "stage": "one classifier of the cascade",
    "threshold": "the confidence from which on a stage passes a text (a gate), or answers it",
    "unrecoverable reject": "a text in scope that was rejected, and that no thresholds give its true label",
    "wrong class": "a text in scope that is answered with another class",
    "wrong reject": "a text out of scope that is rejected with a wrong label",
}
"""Each term of reports, in alphabetical order, and what it means; both as plain text."""

_FORMS = {
    "in scope": "in[ -]scope|out[ -]of[ -]scope",
    "reject": "reject(?:s|ed|ion|ions)?",
    "shadow scores": "shadow scores?",
    "threshold": "thresholds?",
    "oracle ladder": "oracle ladder|perfect stage",
    "replay": "replay(?:s|ed)?",
    "confidence interval": "(?:confidence )?intervals?",
}
"""The forms of a term, as a regular expression, where an added s is not enough."""

_SKIPPED = ("a", "code", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "table", "dl", "title", "style", "summary", "label")
_TAG = re.compile(r"""(<(?:[^>"']|"[^"]*"|'[^']*')*>)""")
_GROUPS = {f"t{number}": term for number, term in enumerate(GLOSSARY)}
_LONGEST_FIRST = sorted(_GROUPS, key=lambda group: -len(_GROUPS[group]))
_TERMS = re.compile(
    "|".join(
        rf"(?<![\w./-])(?P<{group}>{_FORMS.get(_GROUPS[group], re.escape(_GROUPS[group]) + 's?')})(?![\w-])"
        for group in _LONGEST_FIRST
    ),
    re.IGNORECASE,
)


def link_terms(html: str, *, known: Container[str] = ()) -> tuple[str, list[str]]:
    """Link the first use of each term to the glossary; return the HTML and the terms, in the order of their use.

    Terms in headings, tables, links, code and names are left alone: these hold texts of users, or links already.

    Parameters
    ----------
    html : str
        Well-formed: every `<` and `>` of a text is escaped.
    known : container of str
        Terms that are not linked.

    Examples
    --------
    >>> link_terms("<p>A gate <b>rejects</b>; gates stop.</p><pre>reach</pre>")[1]
    ['gate', 'reject']
    """
    found: list[str] = []

    def link(match: re.Match[str]) -> str:
        term = _GROUPS[str(match.lastgroup)]
        if term in found or term in known:
            return match[0]
        found.append(term)
        return f'<a class="term" href="#{anchor(term)}">{match[0]}</a>'

    parts, depth = _TAG.split(html), 0
    for i, part in enumerate(parts):
        if i % 2:  # a tag
            name = part.strip("</>").split()[0].lower() if part.strip("</> ") else ""
            depth += (name in _SKIPPED) * (-1 if part.startswith("</") else 1)
        elif not depth:
            parts[i] = _TERMS.sub(link, part)
    return "".join(parts), found


def anchor(term: str) -> str:
    """Return the id of a term's entry in the glossary."""
    return f"term:{re.sub(r'[^a-z0-9]+', '-', term.lower())}"


def glossary_html(terms: list[str]) -> str:
    """Return the glossary of some terms, and of the terms in their meanings, as HTML in alphabetical order."""
    meanings: dict[str, str] = {}
    wanted = list(terms)
    while wanted:
        term = wanted.pop()
        meanings[term], used = link_terms(escape(GLOSSARY[term]), known=(term,))
        wanted += [other for other in used if other not in meanings]
    entries = (
        f'<dt id="{anchor(term)}">{escape(term)}</dt><dd>{meanings[term]}</dd>'
        for term in sorted(meanings, key=str.lower)
    )
    return f'<dl class="glossary">{"".join(entries)}</dl>\n'
