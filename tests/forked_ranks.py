"""Several ranks of one training without the seconds that each takes to import libraries: as torchrun starts them, but
forked from a process that has imported them."""

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from behrt.ranks import EndedElsewhere, Ranks

from .forked_workers import FORKS, LIBRARIES


def environment_of(rank: int, size: int, port: int, **changes: str) -> dict[str, str]:
    """What torchrun tells a process of the others."""
    return {
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        **changes,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def be_rank(answer: Connection, folder: str, environment: dict[str, str], function: Any, arguments: Any) -> None:
    """Answers with what `function` gives, or the name of the error that it raises; what it says goes to a file."""
    os.chdir(folder)
    os.environ.update(environment)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    written = os.open(f"said-{environment['RANK']}.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(written, stream)
    import torch

    from behrt import cli, lifecycle

    torch.set_num_threads(1)
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        setattr(torch.cpu, name, lambda: False)
    cli.SECONDS_TO_SPEAK = 0.0  # nobody waits for the first to end
    lifecycle.draw_curves = lambda *arguments, **named: []
    try:
        answer.send(function(*arguments))
    except BaseException as error:
        traceback.print_exc()
        answer.send(f"{type(error).__name__}: {error}" if isinstance(error, EndedElsewhere) else type(error).__name__)
    os._exit(0)


class ForkedRanks:
    """Ranks that have been started in `folder`, each calling `function(*arguments)`."""

    def __init__(self, folder: Path, size: int, function: Callable[..., Any], *arguments: Any, **changes: str) -> None:
        FORKS.set_forkserver_preload([*LIBRARIES, "torch.distributed", __name__])
        self.folder = folder
        self.processes: list[BaseProcess] = []
        self._answers: list[Connection] = []
        port = free_port()
        for rank in range(size):
            ours, theirs = FORKS.Pipe(duplex=False)
            environment = environment_of(rank, size, port, **changes)
            process = FORKS.Process(target=be_rank, args=(theirs, str(folder), environment, function, arguments))
            process.start()
            theirs.close()
            self.processes.append(process)
            self._answers.append(ours)

    def answers(self) -> list[Any]:
        """What came of each rank; None of one that was killed."""
        found = []
        for answer, process in zip(self._answers, self.processes, strict=True):
            try:
                found.append(answer.recv())
            except EOFError:
                found.append(None)
            process.join()
        return found

    def said(self) -> list[str]:
        """What each has written to the terminal."""
        return [(self.folder / f"said-{rank}.txt").read_text() for rank in range(len(self.processes))]


def joined(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function(ranks, *arguments)` gives on a rank that the others hear."""
    ranks = Ranks.of_environment()
    with ranks.joined():
        return function(ranks, *arguments)


def on_ranks(folder: Path, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What it gives on each of so many ranks."""
    return ForkedRanks(folder, size, joined, function, *arguments).answers()


def command(*words: str) -> int:
    """A behrt command on one rank; its exit code."""
    from behrt.cli import main

    return main(list(words))
