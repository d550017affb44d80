"""Scores of a generated answer, in [0, 1], written anew from the definitions of the benchmarks' own code.

Sources: LongBench's ``metrics.py`` and ``eval.py`` (THUDM/LongBench, all but the last three), SCROLLS' evaluator for
ZeroSCROLLS (second-hand), SynthWiki's ``checkCorrectness``, RULER's ``string_match_all`` (second-hand).
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

#: (prediction, reference answers, all classes) -> score in [0, 1].
Metric = Callable[[str, Sequence[str], Sequence[str]], float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NOT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation, articles and superfluous white space (SQuAD's normalisation)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NOT_PUNCTUATION)).split())


def qa_f1(prediction: str, answer: str) -> float:
    """F1 of the two bags of normalised words."""
    return bag_f1(normalised(prediction).split(), normalised(answer).split())


def bag_f1(found: Sequence[object], wanted: Sequence[object]) -> float:
    """2PR / (P + R) of two bags, with what they share counted as often as both have it; 0 where they share nothing."""
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L as the Python package ``rouge`` 1.0.1 computes it, which LongBench calls; it is not the usual one.

    Texts are cut into sentences at full stops and into words at white space, nothing is lower-cased. With U the set of
    different words in the longest common subsequences of all pairs of sentences, R = |U| / different words of the
    answer, P = |U| / different words of the prediction, F = 2PR / (P + R + 1e-8). An empty text scores 0.
    """
    found, wanted = _sentences(prediction), _sentences(answer)
    union = {word for a in wanted for b in found for word in _common_subsequence(a, b)}
    if not union:
        return 0.0
    recall = len(union) / len({word for sentence in wanted for word in sentence})
    precision = len(union) / len({word for sentence in found for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    """Words of each sentence; the package counts a sentence of white space as one empty word."""
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _lengths(a: Sequence[str], b: Sequence[str]) -> list[list[int]]:
    """Table `[len(a) + 1][len(b) + 1]` of the lengths of longest common subsequences of beginnings."""
    table = [[0] * (len(b) + 1)]
    for x in a:
        row = [0]
        for j, y in enumerate(b):
            row.append(table[-1][j] + 1 if x == y else max(table[-1][j + 1], row[j]))
        table.append(row)
    return table


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """A longest common subsequence; of several the one found from the end, going back in `b` where it can."""
    table, i, j = _lengths(a, b), len(a), len(b)
    found = []
    while i and j:
        if a[i - 1] == b[j - 1]:
            found.append(a[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]


def classification(prediction: str, answer: str, all_classes: Sequence[str]) -> float:
    """1 / (number of classes that the prediction names) if the right one is among them, else 0.

    Classes that are only a part of the right one's name do not count. (The official code drops those while it walks
    over the list, and so keeps the second of two in a row; no class of TREC is a part of another.)
    """
    named = [name for name in all_classes if name in prediction and (name == answer or name not in answer)]
    return 1 / len(named) if answer in named else 0.0


def share_of_numbers(prediction: str, wanted: str) -> float:
    """The share of the numbers in the prediction that are the wanted one; 0 where there is no number."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def count(prediction: str, answer: str) -> float:
    """Share of the prediction's numbers that are the answer's count."""
    return share_of_numbers(prediction, answer)


def retrieval(prediction: str, answer: str) -> float:
    """Share of the prediction's numbers that are the paragraph's, which the answer names as ``Paragraph 3``.

    Raises:
        ValueError: the answer names no paragraph.
    """
    named = re.search(r"Paragraph (\d+)", answer)
    if named is None:
        raise ValueError(f"the reference answer {answer!r} should be of the form 'Paragraph 3'")
    return share_of_numbers(prediction, named.group(1))


def code_similarity(prediction: str, answer: str) -> float:
    """Similarity of the answer to the first line of the prediction that has no backtick, ``#`` or ``//``.

    Similarity is ``fuzzywuzzy``'s ratio without python-Levenshtein: difflib's 2 M / T, where M is the number of
    characters in matching blocks and T that of both strings, rounded to a whole per cent; 0 where one is empty.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if line == answer:
        return 1.0
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100 if line and answer else 0.0


def rouge_geometric(prediction: str, answer: str) -> float:
    """Geometric mean of the F1 of ROUGE-1, ROUGE-2 and ROUGE-L, as in package ``rouge_score`` without stemming.

    Words are runs of lower-case ASCII letters and digits; the longest common subsequence is of the whole texts.
    """
    found, wanted = (re.findall(r"[a-z0-9]+", text.lower()) for text in (prediction, answer))
    if not found or not wanted:
        return 0.0
    pairs = bag_f1(list(zip(found, found[1:], strict=False)), list(zip(wanted, wanted[1:], strict=False)))
    longest = 2 * _lengths(wanted, found)[-1][-1] / (len(found) + len(wanted))
    return math.cbrt(bag_f1(found, wanted) * pairs * longest)


def contains(prediction: str, answer: str) -> float:
    """1 if the prediction contains the answer, whatever the case, newlines, apostrophes and quotes around it."""

    def plain(text: str) -> str:
        """Without what does not count."""
        return text.strip().strip("\"'").replace("'", "").replace("’", "").lower()

    return float(plain(answer) in plain(prediction.replace("\n", "")))


def share_found(prediction: str, answers: Sequence[str]) -> float:
    """The share of the answers that the prediction contains, whatever the case."""
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def _best(score: Callable[[str, str], float]) -> Metric:
    """The best score over the reference answers."""
    return lambda prediction, answers, _: max(score(prediction, answer) for answer in answers)


METRICS: dict[str, Metric] = {
    "qa_f1": _best(qa_f1),
    "rouge_l": _best(rouge_l),
    "classification": lambda text, answers, classes: max(classification(text, each, classes) for each in answers),
    "retrieval": _best(retrieval),
    "count": _best(count),
    "code_similarity": _best(code_similarity),
    "rouge_geometric": _best(rouge_geometric),
    "contains": _best(contains),
    "share_found": lambda text, answers, _: share_found(text, answers),
}
