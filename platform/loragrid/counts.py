"""Says how many there are of something, in the grammar of a sentence: 1 pack, 12 trials."""


def count_of(number: int, noun: str) -> str:
    """The number with its noun, which takes a plain `s` where there is not exactly one."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
