"""Two-stage fine-tuning of BERT-style encoders on class-imbalanced text.

Start reading at `two_stage.py`. Names below load on first use, so that `import twostage` is cheap.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .data.tables import Table as Table
    from .errors import TwoStageError as TwoStageError
    from .recipe import Recipe as Recipe
    from .two_stage import train_two_stage as train_two_stage

__version__ = "0.1.0"
__all__ = ["Recipe", "Table", "TwoStageError", "train_two_stage"]


def __getattr__(name: str) -> object:
    if name == "train_two_stage":
        from .two_stage import train_two_stage

        return train_two_stage
    if name == "Recipe":
        from .recipe import Recipe

        return Recipe
    if name == "Table":
        from .data.tables import Table

        return Table
    if name == "TwoStageError":
        from .errors import TwoStageError

        return TwoStageError
    raise AttributeError(f"module 'twostage' has no attribute {name!r}")
