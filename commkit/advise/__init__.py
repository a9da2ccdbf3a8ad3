"""Which scheme, if any, a cluster and a model ask for, and what it would give: the cost model over a probe."""

from .advice import PLAIN, Advice, Row, advise, choose, kind_of
from .question import Options, Question
from .table import lines

__all__ = ["PLAIN", "Advice", "Options", "Question", "Row", "advise", "choose", "kind_of", "lines"]
