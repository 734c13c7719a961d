"""Is the sweep of a file still the one that a study was begun with, and where do the two differ?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def first_difference(there: Any, here: Any, place: str = "") -> str | None:
    """Where two JSON values first differ, in words.

    >>> first_difference({"space": {"lr": [1, 2]}}, {"space": {"lr": [1, 3]}})
    'space.lr[1]: 2 there, 3 here'
    """
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted({*there, *here}):
            inner = f"{place}.{key}".lstrip(".")
            if key not in here or key not in there:
                return f"{inner}: {there.get(key, 'nothing')!r} there, {here.get(key, 'nothing')!r} here"
            difference = first_difference(there[key], here[key], inner)
            if difference is not None:
                return difference
        return None
    if _is_list(there) and _is_list(here) and len(there) == len(here):
        differences = (
            first_difference(a, b, f"{place}[{i}]") for i, (a, b) in enumerate(zip(there, here, strict=True))
        )
        return next((difference for difference in differences if difference is not None), None)
    if there == here and isinstance(there, bool) == isinstance(here, bool):
        return None
    return f"{place}: {there!r} there, {here!r} here"


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
