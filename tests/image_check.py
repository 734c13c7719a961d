"""Does the Dockerfile build an image that trains, stops and goes on? `python -m tests.image_check` builds it for real.

By Docker where a daemon answers, else by buildah, which needs none (as root; `apt-get install buildah debootstrap`).

Environment, all of it optional:
    BASE_IMAGE: to build on; by buildah, a Debian that debootstrap makes if none is named.
    TORCH_INDEX: where pip finds torch, if the base has none.
    BUILD_FLAGS: further flags of the build: secrets, volumes, another network.
    EPOCHS: of the main job; its own number (50) if empty.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from behrt.history import read_history, read_run
from tests.forked_ranks import free_port
from tests.small_sweeps import until

ROOT = Path(__file__).parents[1]
IMAGE = "localhost/behrt-check"
PACKAGES = "python3,python3-pip,ca-certificates"
SMALL = (
    "train",
    "--num-patients",
    "300",
    "--batch-size",
    "16",
    "--early-stopping-patience",
    "0",
    "--experiment",
    "run",
)


def done(*words: str, code: int = 0) -> str:
    """What a command says, which has to end with this exit code."""
    ended = subprocess.run(words, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert ended.returncode == code, f"{shlex.join(words)}: {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout.strip()


class Container(Protocol):
    def terminate(self) -> None:
        """Sends SIGTERM to its first process."""

    def wait(self) -> tuple[int, str]:
        """Exit code, and what it said."""


class Engine(Protocol):
    """What builds and runs images."""

    def build(self, flags: Sequence[str]) -> None: ...

    def config(self) -> dict[str, Any]:
        """The image's: Entrypoint, Cmd, User, Env, WorkingDir, Healthcheck, Volumes."""

    def size(self) -> int:
        """Bytes of the image, its base included."""

    def start(self, words: Sequence[str], workspace: Path) -> Container:
        """The image's entry point with these words, in a new container over `workspace`."""

    def inside(self, *words: str) -> str:
        """What another program of the image says."""


class Docker:
    """The daemon's client."""

    def build(self, flags: Sequence[str]) -> None:
        done("docker", "build", "--tag", IMAGE, *flags, ".")

    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(done("docker", "image", "inspect", IMAGE))[0]["Config"]
        return found

    def size(self) -> int:
        return int(done("docker", "image", "inspect", "--format", "{{.Size}}", IMAGE))

    def start(self, words: Sequence[str], workspace: Path) -> Container:
        name = done("docker", "run", "--detach", "--volume", f"{workspace}:/workspace", IMAGE, *words)

        class Running:
            def terminate(self) -> None:
                done("docker", "kill", "--signal", "TERM", name)

            def wait(self) -> tuple[int, str]:
                code = int(done("docker", "wait", name))
                said = subprocess.run(["docker", "logs", name], capture_output=True, text=True, check=True)
                done("docker", "rm", name)
                return code, said.stdout + said.stderr

        return Running()

    def inside(self, *words: str) -> str:
        return done("docker", "run", "--rm", "--entrypoint", words[0], IMAGE, *words[1:])


class Buildah:
    """Containers as folders that `chroot` goes into; no daemon, no network of their own."""

    def build(self, flags: Sequence[str]) -> None:
        done("buildah", "bud", "--isolation", "chroot", "--format", "docker", "--tag", IMAGE, *flags, ".")

    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(done("buildah", "inspect", "--type", "image", IMAGE))["Docker"]["config"]
        return found

    def size(self) -> int:
        (image,) = json.loads(done("buildah", "images", "--json", IMAGE))
        return bytes_of(image["size"])

    def start(self, words: Sequence[str], workspace: Path) -> Container:
        name = done("buildah", "from", IMAGE)
        command = ["buildah", "run", "--isolation", "chroot", "--volume", f"{workspace}:/workspace", name, "--"]
        process = subprocess.Popen(
            [*command, *self.config()["Entrypoint"], *words],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

        class Running:
            def terminate(self) -> None:
                os.kill(last_descendant(process.pid), signal.SIGTERM)

            def wait(self) -> tuple[int, str]:
                said, _ = process.communicate()
                done("buildah", "rm", name)
                return process.returncode, said

        return Running()

    def inside(self, *words: str) -> str:
        name = done("buildah", "from", IMAGE)
        try:
            return done("buildah", "run", "--isolation", "chroot", name, "--", *words)
        finally:
            done("buildah", "rm", name)


def bytes_of(text: str) -> int:
    """
    >>> bytes_of("2.5 GB"), bytes_of("297 MB")
    (2500000000, 297000000)
    """
    number, unit = text.split()
    return round(float(number) * {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}[unit.upper()])


def last_descendant(pid: int) -> int:
    """The process at the end of a chain of processes that each start one."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    return last_descendant(int(found[0])) if found else pid


def engine_here() -> Engine:
    """Raises `SystemExit` where no image can be built."""
    if shutil.which("docker") and not subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        return Docker()
    if shutil.which("buildah") and os.geteuid() == 0:
        return Buildah()
    sys.exit("image-check: no Docker daemon answers, and no buildah is installed (apt-get install buildah debootstrap)")


def debian() -> str:
    """A small Debian with Python, made once from Debian's packages."""
    image = "localhost/behrt-check-debian:bookworm"
    if not subprocess.run(["buildah", "inspect", image], capture_output=True, check=False).returncode:
        return image
    if not shutil.which("debootstrap"):
        sys.exit("image-check: debootstrap is not installed (apt-get install debootstrap), and no BASE_IMAGE is named")
    with tempfile.TemporaryDirectory() as folder:
        done("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", folder)
        name = done("buildah", "from", "scratch")
        done("buildah", "add", "--quiet", name, folder, "/")
        done("buildah", "commit", "--quiet", "--rm", name, image)
    return image


def check_config(engine: Engine) -> None:
    """What an image says of itself."""
    config = engine.config()
    assert config["Entrypoint"] == ["behrt"]
    assert config["WorkingDir"] == "/workspace"
    assert config["Healthcheck"]["Test"][0] == "CMD"
    assert not [entry for entry in config["Env"] if re.match(r"\w*(PASSWORD|TOKEN|SECRET|PROXY|CERT)\w*=", entry, re.I)]
    assert engine.inside("id", "-u") == config["User"].partition(":")[0] == "1000"
    engine.inside(*config["Healthcheck"]["Test"][1:])
    engine.inside("torchrun", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "behrt", "--version")
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    installed = json.loads(engine.inside("python", "-c", INSTALLED))
    wrong = {name: found for name, found in installed.items() if name in pins and found.partition("+")[0] != pins[name]}
    assert wrong == {}
    assert set(installed) - set(pins) <= {"behrt", "pip"}, "not pinned"


INSTALLED = """
import importlib.metadata as metadata, json, pathlib
found = {}
for each in metadata.distributions(path=[str(pathlib.Path(metadata.distribution("behrt")._path).parent)]):
    found[each.name] = each.version
print(json.dumps(found))
"""
"""Names and versions of what lies beside behrt; the base's own packages lie elsewhere."""


def workspace_of(engine: Engine, folder: Path) -> Path:
    """An empty volume that belongs to the image's user."""
    for name in ("", "data", "experiments", "sweeps", "mlruns"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        if os.geteuid() in (0, 1000):
            os.chown(folder / name, 1000, 1000)
        else:
            (folder / name).chmod(0o777)
    return folder


def check_main_job(engine: Engine, workspace: Path) -> str:
    """`docker run IMAGE train`, as it is."""
    epochs = os.environ.get("EPOCHS")
    code, said = engine.start(["train", *(["--epochs", epochs] if epochs else [])], workspace).wait()
    assert code == 0, said
    run = read_run(workspace / "experiments" / "behrt_small_mlm")
    assert run["status"] == "FINISHED"
    assert (workspace / "mlruns" / "mlflow.db").exists()
    assert (workspace / "experiments" / "behrt_small_mlm" / "run.json").stat().st_uid == 1000
    return f"{run['epochs']} epochs, val_loss {run['best_val_loss']:.4f}"


def check_stop(engine: Engine, workspace: Path) -> str:
    """SIGTERM in one container, `--resume` in another."""
    folder = workspace / "experiments" / "run"
    container = engine.start([*SMALL, "--epochs", "500"], workspace)
    until(lambda: epochs_of(folder) >= 3)
    container.terminate()
    began = time.monotonic()
    code, said = container.wait()
    seconds = time.monotonic() - began
    assert code == 143, (code, said)
    assert "To go on: behrt train --resume experiments/run" in said
    assert read_run(folder)["status"] == "KILLED"
    former = epochs_of(folder)
    code, said = engine.start(["train", "--resume", "experiments/run", "--epochs", str(former + 2)], workspace).wait()
    assert code == 0, said
    assert read_run(folder)["status"] == "FINISHED"
    assert [point["epoch"] for point in read_history(folder)["val_loss"]] == list(range(1, former + 3))
    return f"ended {seconds:.1f} s after SIGTERM in epoch {former + 1}; another container went on to epoch {former + 2}"


def epochs_of(folder: Path) -> int:
    try:
        return len(read_history(folder)["val_loss"])
    except Exception:  # not there yet
        return 0


def main() -> int:
    engine = engine_here()
    base = os.environ.get("BASE_IMAGE") or ("" if isinstance(engine, Docker) else debian())
    flags = ["--build-arg", f"BASE_IMAGE={base}"] if base else []
    if index := os.environ.get("TORCH_INDEX"):
        flags += ["--build-arg", f"TORCH_INDEX={index}"]
    flags += shlex.split(os.environ.get("BUILD_FLAGS", ""))

    def timed(what: str, action: Callable[[], str | None]) -> None:
        began = time.monotonic()
        found = action()
        print(f"{what}: {f'{found}; ' if found else ''}{time.monotonic() - began:.0f} s", flush=True)  # noqa: T201

    if linter := shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"):
        timed("hadolint", lambda: done(linter, "Dockerfile"))
    timed(f"build on {base or 'its default base'} by {type(engine).__name__.lower()}", lambda: engine.build(flags))
    print(f"size: {engine.size() / 1e9:.2f} GB")  # noqa: T201
    timed("image", lambda: check_config(engine))
    with tempfile.TemporaryDirectory(prefix="behrt-image-") as folder:
        Path(folder).chmod(0o755)
        timed("stop and go on", lambda: check_stop(engine, workspace_of(engine, Path(folder) / "stopped")))
        timed("behrt train", lambda: check_main_job(engine, workspace_of(engine, Path(folder) / "main")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
