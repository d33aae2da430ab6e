"""The file beside a saved model with which ``trust_remote_code=True`` finds its classes."""

from __future__ import annotations

from pathlib import Path

NAME = "equilibrium"
AUTO_MAP = {
    "AutoConfig": f"{NAME}.EquilibriumConfig",
    "AutoModelForCausalLM": f"{NAME}.EquilibriumForCausalLM",
}
"""The classes that transformers loads from the file, as in config.json."""
_CODE = '''"""The classes of this model: pip install "equilibria[hf]"."""

from equilibria.hf import EquilibriumConfig, EquilibriumForCausalLM, EquilibriumTokenizer

__all__ = ["EquilibriumConfig", "EquilibriumForCausalLM", "EquilibriumTokenizer"]
'''


def write(folder: Path) -> None:
    """Write the file into the folder of a model."""
    (folder / f"{NAME}.py").write_text(_CODE, encoding="utf-8")
