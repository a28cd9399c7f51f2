"""A student whose tokenizer is not its teacher's: which of its positions and ids the teacher's targets belong to.

``StudentOfAnother`` is the student's processor: keys are the teacher's, labels its own.  ``VocabularyMap`` says for
each of the teacher's ids with which of the student's its text begins.  ``align`` finds where both have a boundary.
docs/other-tokenizers.md says what that gives, and what it does not.
"""

from shared.other_vocabulary.alignment import Alignment, Coverage, align, regrouped
from shared.other_vocabulary.processor import Aligned, StudentOfAnother, student_of_another
from shared.other_vocabulary.vocabulary_map import VocabularyMap

__all__ = [
    "Aligned",
    "Alignment",
    "Coverage",
    "StudentOfAnother",
    "VocabularyMap",
    "align",
    "regrouped",
    "student_of_another",
]
