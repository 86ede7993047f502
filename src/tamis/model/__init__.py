"""Any decoder-only 🤗 Transformers model, unmodified, run on a ragged batch of tokens.

`load_model` gives a `Model`; its `forward` runs the tokens of all sequences flattened into one
row, and calls the given `Attend` in place of the model's own attention, once per layer. Nothing
here knows what a sequence is or keeps keys and values.
"""

from tamis.model.interface import Attend
from tamis.model.loading import load_model
from tamis.model.model import Model
from tamis.model.probe import LayerSpec
from tamis.model.rows import RowRanges

__all__ = ["Attend", "LayerSpec", "Model", "RowRanges", "load_model"]
