"""What every row of a split is, found by all ranks together and kept for the next start.

    table = survey_rows(split, processor, surveyors, decode=False, show=True)
    keys_of(table), picture_tokens_of(table, processor)

A file of a data set is looked at in parts of some thousand rows.  What is found of a part is kept in an Arrow file,
under the file's content and all else that it depends on (``kept``), so that another start reads it instead of the
data.
"""

from shared.surveying.found import keys_of, num_pictures_of, picture_tokens_of, reasons_of, writers_of
from shared.surveying.keyed import Keyed, keys_fingerprint, survey_keys
from shared.surveying.sharing import Surveyors, survey_rows

__all__ = [
    "Keyed",
    "Surveyors",
    "keys_fingerprint",
    "keys_of",
    "num_pictures_of",
    "picture_tokens_of",
    "reasons_of",
    "survey_keys",
    "survey_rows",
    "writers_of",
]
