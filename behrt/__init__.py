"""What does `import behrt` offer? BEHRT models for health records, LoRA adapters, and the runs that trained them.

The names load on first use, so that `import behrt` (and every `behrt --help`) does not wait for torch.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from behrt.config import BEHRTConfig
    from behrt.model import BEHRT, BEHRTForMaskedLM
    from behrt.parameters import apply_lora_to_behrt, count_parameters
    from behrt.runs import load_run

# Medical records are nobody else's business. Read by these libraries when they are imported: by all that honour the
# first, by MLflow, and by the Hugging Face hub, which MLflow and PEFT import where it is installed.
for _name, _value in (
    ("DO_NOT_TRACK", "true"),
    ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ("HF_HUB_DISABLE_TELEMETRY", "1"),
):
    os.environ.setdefault(_name, _value)

__version__ = "0.1.0"

__all__ = [
    "BEHRT",
    "BEHRTConfig",
    "BEHRTForMaskedLM",
    "__version__",
    "apply_lora_to_behrt",
    "count_parameters",
    "load_run",
]

_HOMES = {
    "BEHRT": "behrt.model",
    "BEHRTConfig": "behrt.config",
    "BEHRTForMaskedLM": "behrt.model",
    "apply_lora_to_behrt": "behrt.parameters",
    "count_parameters": "behrt.parameters",
    "load_run": "behrt.runs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
