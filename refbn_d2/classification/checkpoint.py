"""Loading of a classifier's weights; weights of another network or norm are an error."""

from typing import Any

from ..engine.checkpoint import Checkpointer
from ..errors import UserError

__all__ = ["ClassifierCheckpointer"]


class ClassifierCheckpointer(Checkpointer):
    """Raises an error if weights do not fit a TorchvisionClassifier.

    A different number of classes is allowed. BatchNorm's weights fit RefBN and vice versa: a
    missing or an additional reference is not an error.
    """

    def _load_model(self, checkpoint: Any):
        incompatible = super()._load_model(checkpoint)
        if incompatible is None or not hasattr(self.model, "network"):
            return incompatible
        # Parameters of linear layers whose shapes differ in the number of classes only.
        # incorrect_shapes has (key, shape in the file, shape in the model).
        other_classes = {
            key
            for key, there, here in incompatible.incorrect_shapes
            if len(there) <= 2 and there[1:] == here[1:]
        }
        unmatched = [
            key
            for key in [*incompatible.missing_keys, *incompatible.unexpected_keys]
            if key not in other_classes and not key.rpartition(".")[2].startswith("ref_")
        ]
        if unmatched:
            raise UserError(
                f"weights {self._path!r} are of another network or norm: {unmatched[0]} does not "
                "fit; set MODEL.CLASSIFIER.NETWORK and MODEL.CLASSIFIER.NORM to the values with "
                "which they were trained"
            )
        return incompatible
