"""Frameworks are optional, and each adapter is written against a range of versions."""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Requirement:
    """A framework and the versions of it that its adapter works with.

    Args:
        package: its name on PyPI, which is also the module's with underscores.
        at_least: the oldest version.
        below: the first one that is too new.
        extra: commkit's extra that installs it.
    """

    package: str
    at_least: str
    below: str
    extra: str

    def module(self) -> ModuleType:
        """The framework, imported.

        Raises:
            ModuleNotFoundError: not installed; the message names the extra.
        """
        name = self.package.replace("-", "_")
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:  # it is there, and something that it needs is not
                raise
            raise ModuleNotFoundError(
                f"this part of commkit needs {self.package}; pip install 'commkit[{self.extra}]'",
                name=name,
            ) from error

    def check(self) -> None:
        """
        Raises:
            RuntimeError: a version outside the range.
        """
        from packaging.version import Version  # every framework depends on it, the core does not

        found = importlib.metadata.version(self.package)
        if not Version(self.at_least) <= Version(found) < Version(self.below):
            raise RuntimeError(
                f"{self.package} {found} is outside the range that commkit works with, >={self.at_least},<{self.below}; "
                f"pip install '{self.package}>={self.at_least},<{self.below}'"
            )


LIGHTNING = Requirement("lightning", "2.4", "3", "lightning")
PYTORCH_LIGHTNING = Requirement("pytorch-lightning", "2.4", "3", "lightning")
ACCELERATE = Requirement("accelerate", "1.0", "2", "accelerate")
TORCHFT = Requirement("torchft", "0.2", "0.3", "torchft")
TRANSFORMERS = Requirement("transformers", "5.0", "6", "transformers")
