"""The state of a long fit in a file, from which the same fit over the same rows goes on."""
from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .atomic import replacing, writing
from .engines.base import fingerprint
from .errors import ConfigError

if TYPE_CHECKING:
    from .plans import Plan

FORMAT = "mlpipe.checkpoint/1"


class Checkpoint:
    """One file; written anew, whole or not at all, after each step. `settings`: what else must be the same."""

    def __init__(self, path: Any, plan: Plan, info: dict[str, Any], settings: tuple[Any, ...]) -> None:
        self.path = Path(path)
        self.plan = fingerprint(json.dumps(plan.recipe.to_json(), sort_keys=True, default=str), *settings)
        # some sources' fingerprints know nothing of their content: the sums over the rows do
        self.source = fingerprint(info.get("fingerprint"), info.get("content"))
        self.steps = 0

    def psi(self) -> np.ndarray | None:
        """The parameters that were saved, None where there is no file. Raises ConfigError for another fit's, or another source's."""
        try:
            record = json.loads(self.path.read_text())
            found = record["format"], record["plan"], record["source"]
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"cannot read the checkpoint {self.path}: {error.strerror or error}", code="checkpoint") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.path} is no checkpoint", code="checkpoint", hint="name another file") from error
        for what, held, wanted in zip(("version", "model", "source"), found, (FORMAT, self.plan, self.source), strict=True):
            if held != wanted:
                hint = "remove it to start afresh, or name another file"
                raise ConfigError(f"the checkpoint {self.path} is of another {what}", code="checkpoint", hint=hint)
        self.steps = int(record["steps"])
        return np.array(record["psi"], dtype=float)

    def save(self, psi: np.ndarray) -> None:
        """Keeps the parameters. Raises ResourceError where the file cannot be written."""
        self.steps += 1
        record = {"format": FORMAT, "plan": self.plan, "source": self.source, "steps": self.steps, "psi": psi.tolist()}
        with writing(f"the checkpoint {self.path}"), replacing(self.path) as file:
            file.write(json.dumps(record).encode())
