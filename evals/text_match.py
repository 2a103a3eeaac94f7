"""Exact match and F1 of words, as SQuAD and CoQA score answers: lower case, without punctuation and
articles (Rajpurkar et al., 2016; Reddy et al., 2018)."""

import collections
import re
import string
from collections.abc import Callable, Sequence

Compare = Callable[[str, str], float]


def words(text: str) -> list[str]:
    """Lower case, without punctuation, then without the words a, an and the."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match(answer: str, reference: str) -> float:
    return float(words(answer) == words(reference))


def f1(answer: str, reference: str) -> float:
    """Harmonic mean of the shares of words in common; of two answers without words 1."""
    ours, theirs = words(answer), words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def best(compare: Compare, answer: str, references: Sequence[str]) -> float:
    """Against the reference that is nearest (SQuAD)."""
    return max(compare(answer, reference) for reference in references)


def leave_one_out(compare: Compare, answer: str, references: Sequence[str]) -> float:
    """Mean, over the references, of the best against all others (CoQA): people, too, are compared
    with one fewer."""
    if len(references) == 1:
        return compare(answer, references[0])
    without = (
        [other for j, other in enumerate(references) if j != i] for i in range(len(references))
    )
    return sum(best(compare, answer, others) for others in without) / len(references)
