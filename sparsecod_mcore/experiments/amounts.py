"""Large numbers as one says them: 1.2B, 350k."""

_UNITS = {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3}
_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_SAME = 1e-3  # relative


def in_words(count: float, digits: int = 4) -> str:
    """`count` in significant digits and the largest unit that it fills: 1.176B."""
    rounded = float(f"{count:.{digits}g}")
    name, unit = next(((name, unit) for name, unit in _UNITS.items() if rounded >= unit), ("", 1.0))
    return f"{rounded / unit:.{digits}g}{name}"


def agrees(published: str, count: float) -> bool:
    """Whether `count` rounded as `published` is (1.2B, 400M) gives it, or is next to it (1.1768B was cut to 1.176B)."""
    number, unit = published[:-1], _UNITS[published[-1]]
    decimals = len(number.partition(".")[2])
    return round(count / unit, decimals) == float(number) or abs(count / unit / float(number) - 1) < _SAME


def bytes_in_words(size: float, digits: int = 3) -> str:
    """Bytes in decimal units: 1.23 GB."""
    number = in_words(size, digits)
    unit = number[-1] if number[-1] in _UNITS else ""
    return f"{number.removesuffix(unit)} {'G' if unit == 'B' else unit}B"


def seconds_in_words(seconds: float, digits: int = 3) -> str:
    """Seconds in the unit that leaves a number of 1 or more: 1.23 s, 45 ms, 6.7 µs."""
    unit, name = next(((unit, name) for unit, name in _TIMES if seconds >= unit), _TIMES[-1])
    return f"{seconds / unit:.{digits}g} {name}"
