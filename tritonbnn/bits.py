"""Which channel sits on which bit: the one definition that everyone who packs shares.

Channel ``c`` is bit ``c % 32`` of word ``c // 32`` (natural order), 1 for +1 and 0 for -1. Bits
beyond the last channel are 0 in both operands of a product, so that ``a ^ b`` is 0 there and
``K - 2 popcount(a ^ b)`` holds with the true K.
"""

WORD_BITS = 32


def words(channels: int) -> int:
    """Number of int32 words that hold ``channels`` signs."""
    return -(-channels // WORD_BITS)
