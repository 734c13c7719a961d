"""How is a large library imported sooner?

Python counts new objects and searches all of them for garbage again and again. An import makes hundreds of thousands
and no garbage: torch, MLflow and what they bring take a fifth less time when nobody searches.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def first_import(library: str) -> Iterator[None]:
    """No search for garbage inside, nor later among the objects that are there by its end; where the library is
    imported already, nothing changes."""
    if library in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
