"""With which code, and which words, does a command end?

0 done, 2 the user's mistake, 3 refused by the pre-flight, 4 the run was lost, 130 and 143 stopped by a signal.
"""

EXIT_MISTAKE = 2
EXIT_REFUSED = 3
EXIT_LOST = 4
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class RefusedRun(Exception):
    """A run that the pre-flight kept from training."""

    exit_code = EXIT_REFUSED


class LostRun(Exception):
    """A run that ended, but whose model is of no use."""

    exit_code = EXIT_LOST


def one_line(error: Exception) -> str:
    """The message of an error in one line; of an operating system's error, its file and reason."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
