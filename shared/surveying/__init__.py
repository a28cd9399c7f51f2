"""What every row of a split is, found by all ranks together and kept for the next start.

    keyed = survey_keys(recipe.data, "train", processor, Surveyors.of_capture(recipe))

A file of a data set is looked at in parts of some thousand rows.  What is found of a part is kept in an Arrow file,
under the file's content and all else that it depends on (``kept``), so that another start reads it instead of the
data.
"""

from shared.surveying.keyed import Keyed, keys_fingerprint, survey_keys
from shared.surveying.sharing import Surveyors

__all__ = ["Keyed", "Surveyors", "keys_fingerprint", "survey_keys"]
