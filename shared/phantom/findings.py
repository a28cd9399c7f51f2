"""The focal findings a case may have: where each occurs, how it looks, what it is called.

Within one organ and one modality, brightness and margin together name the finding, so that the diagnosis
follows from the picture.  The several names of a finding are what different authors call it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Modality = Literal["CT", "T1", "T2", "US", "XR"]
Margin = Literal["smooth", "irregular"]

SIZES_CM = {"small": (1.0, 1.5), "medium": (2.5, 3.0, 3.5), "large": (4.5, 5.0, 5.5)}
"""Diameters that are drawn.  None is near 2 or 4 cm, where the size classes meet."""


@dataclass(frozen=True)
class Finding:
    """One kind of focal finding of one organ.

    ``signs`` gives, for each modality that shows it, +1 where it is brighter than its surroundings and -1
    where it is darker.  ``names`` are synonyms, ``differential`` what else an author would list.
    """

    organ: str
    signs: dict[Modality, int]
    margin: Margin
    names: tuple[str, ...]
    differential: tuple[str, ...]
    min_cm: float = 1.5
    max_cm: float = 6.0
    casts: Literal["", "shadow", "enhancement"] = ""  # what ultrasound shows behind it


FINDINGS = (
    Finding(
        "brain",
        {"CT": +1, "T1": +1, "T2": -1},
        "smooth",
        ("cavernoma", "cavernous malformation", "cavernous haemangioma"),
        ("cavernoma", "meningioma", "calcified granuloma"),
    ),
    Finding(
        "brain",
        {"CT": +1},
        "irregular",
        ("intracerebral haemorrhage", "parenchymal haematoma", "intracerebral bleed"),
        ("intracerebral haemorrhage", "haemorrhagic metastasis", "arteriovenous malformation"),
        min_cm=2.5,
    ),
    Finding(
        "brain",
        {"CT": -1, "T1": -1, "T2": +1},
        "smooth",
        ("neuroglial cyst", "intracranial cyst", "glioependymal cyst"),
        ("neuroglial cyst", "arachnoid cyst", "enlarged perivascular space"),
    ),
    Finding(
        "brain",
        {"CT": -1, "T1": -1, "T2": +1},
        "irregular",
        ("glioma", "glial tumour", "astrocytoma"),
        ("glioma", "metastasis", "abscess", "demyelination"),
        min_cm=2.5,
    ),
    Finding(
        "lung",
        {"CT": +1, "XR": +1},
        "smooth",
        ("hamartoma", "pulmonary hamartoma", "benign lung nodule"),
        ("hamartoma", "granuloma", "carcinoid tumour"),
    ),
    Finding(
        "lung",
        {"CT": +1, "XR": +1},
        "irregular",
        ("lung carcinoma", "bronchogenic carcinoma", "primary lung cancer"),
        ("lung carcinoma", "metastasis", "round pneumonia", "tuberculoma"),
        min_cm=2.5,
    ),
    Finding(
        "liver",
        {"CT": +1, "US": +1},
        "smooth",
        ("haemangioma", "hepatic haemangioma", "cavernous haemangioma"),
        ("haemangioma", "focal nodular hyperplasia", "adenoma"),
    ),
    Finding(
        "liver",
        {"CT": -1, "US": -1},
        "smooth",
        ("hepatic cyst", "simple liver cyst", "benign cyst"),
        ("hepatic cyst", "biliary cystadenoma", "hydatid cyst"),
        casts="enhancement",
    ),
    Finding(
        "liver",
        {"CT": -1, "US": -1},
        "irregular",
        ("liver metastasis", "hepatic metastasis", "secondary deposit"),
        ("liver metastasis", "abscess", "hepatocellular carcinoma", "lymphoma"),
        min_cm=2.5,
    ),
    Finding(
        "spleen",
        {"CT": -1},
        "smooth",
        ("splenic cyst", "benign cyst of the spleen", "epidermoid cyst"),
        ("splenic cyst", "lymphangioma", "hydatid cyst"),
    ),
    Finding(
        "spleen",
        {"CT": -1},
        "irregular",
        ("splenic abscess", "abscess of the spleen"),
        ("splenic abscess", "infarct", "lymphoma"),
        min_cm=2.5,
    ),
    Finding(
        "kidney",
        {"CT": -1, "US": -1},
        "smooth",
        ("renal cyst", "simple cortical cyst", "benign renal cyst"),
        ("renal cyst", "cystic nephroma", "hydrocalyx"),
        casts="enhancement",
    ),
    Finding(
        "kidney",
        {"CT": +1},
        "irregular",
        ("renal cell carcinoma", "renal carcinoma", "hypernephroma"),
        ("renal cell carcinoma", "oncocytoma", "angiomyolipoma"),
        min_cm=2.5,
    ),
    Finding(
        "kidney",
        {"US": +1},
        "smooth",
        ("renal stone", "renal calculus", "kidney stone"),
        ("renal stone", "calcified cyst", "nephrocalcinosis"),
        min_cm=1.0,
        max_cm=1.5,
        casts="shadow",
    ),
    Finding(
        "gallbladder",
        {"US": +1},
        "smooth",
        ("gallstone", "biliary calculus", "gallbladder stone"),
        ("gallstone", "polyp", "porcelain gallbladder"),
        min_cm=1.0,
        max_cm=1.5,
        casts="shadow",
    ),
    Finding(
        "vertebra",
        {"T1": +1, "T2": +1},
        "smooth",
        ("vertebral haemangioma", "haemangioma of bone", "intraosseous haemangioma"),
        ("vertebral haemangioma", "focal fatty marrow", "lipoma"),
    ),
    Finding(
        "vertebra",
        {"T1": -1, "T2": +1},
        "irregular",
        ("vertebral metastasis", "bone metastasis", "metastatic deposit"),
        ("vertebral metastasis", "plasmacytoma", "infection"),
    ),
    Finding(
        "bone",
        {"XR": +1},
        "smooth",
        ("bone island", "enostosis"),
        ("bone island", "osteoblastic metastasis", "osteoid osteoma"),
    ),
    Finding(
        "bone",
        {"XR": -1},
        "smooth",
        ("bone cyst", "simple bone cyst", "unicameral cyst"),
        ("bone cyst", "fibrous dysplasia", "chondroma"),
    ),
    Finding(
        "bone",
        {"XR": -1},
        "irregular",
        ("giant cell tumour", "osteoclastoma"),
        ("giant cell tumour", "metastasis", "osteomyelitis"),
        min_cm=2.5,
    ),
)
