"""A WordPiece vocabulary: the same texts give the same tokens, whatever order a hash table has."""

from __future__ import annotations

from helpers import texts

from cascade_lab.bert.vocabulary import SPECIAL_TOKENS, train_vocabulary


def test_the_same_texts_give_the_same_vocabulary():
    """Many pairs of letters are equally frequent, and 60 tokens are fewer than there could be."""
    some = [*texts(40), "Straße ÉTÉ 東京", "abcdefghij klmnopqrst"]
    first = train_vocabulary(some, size=60)
    assert len(first) == len(set(first)) == 60
    assert all(train_vocabulary(some, size=60) == first for _ in range(5))


def test_special_tokens_come_first_then_letters_then_longer_tokens():
    tokens = train_vocabulary(["to be or not to be"] * 3, size=20)
    assert tokens[: len(SPECIAL_TOKENS)] == SPECIAL_TOKENS
    assert tokens[5:14] == ["b", "e", "n", "o", "r", "t", "##e", "##o", "##r"]
    assert {"to", "be"} < set(tokens[15:])
    assert train_vocabulary(["Pay"], size=20, do_lower_case=False)[5] == "P"
