"""A drawn VQA set: section-like pictures, and questions whose answers follow from them.

It stands in for a medical data set where nothing may be downloaded: the same columns as MedPix-VQA, several
questions a picture, answers of one to about sixty words.  ``docs/phantom.md`` says what is drawn.

    python -m shared.phantom work/phantom/data --train 480 --validation 64 --test 64
"""

from __future__ import annotations
