"""Two-stage fine-tuning of BERT-style encoders on class-imbalanced text.

Start reading at `two_stage.py`. Names below load on first use, so that `import twostage` is cheap.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import train_two_stage as train_two_stage
    from .data.containers import Table as Table
    from .data.tables import read_table as read_table
    from .errors import TwoStageError as TwoStageError
    from .recipe import Recipe as Recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "Table", "TwoStageError", "read_table", "train_two_stage"]

_MODULE_OF = {
    "Recipe": ".recipe",
    "Table": ".data.containers",
    "TwoStageError": ".errors",
    "read_table": ".data.tables",
    "train_two_stage": ".api",
}


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        from importlib import import_module

        return getattr(import_module(_MODULE_OF[name], __name__), name)
    raise AttributeError(f"module 'twostage' has no attribute {name!r}")
