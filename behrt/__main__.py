"""How does `python -m behrt` start? Exactly as the `behrt` command does, and as a rank of several it ends at once."""

import os
import sys

from behrt.cli import main
from behrt.ranks import Ranks

if __name__ == "__main__":
    code = main()
    if Ranks.of_environment().is_alone:
        raise SystemExit(code)
    # All is written by now. Threads of torch's process groups may still run, and Python's own way to end, which lets
    # no thread go on, now and then aborts a process in which one of them is just looking for Python.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
