"""PadChest (Bustos et al., Medical Image Analysis 66, 2020) in CheXpert's names, as data.

PadChest names 174 findings and 19 diagnoses, read from reports: 27 % by physicians, the others by a network. A film's labels are a
list in text, `['cardiomegaly', 'pleural effusion']`. No map to CheXpert is published with it; this one is ours. It takes a
name only where CheXpert's means the same or more, and never to a parent: "consolidation" is not also Lung Opacity.

Everything else has no counterpart, and a film with nothing else has an empty true set. Among what is left out on purpose:
signs of congestion short of edema (heart insufficiency, hilar congestion, kerley lines, vascular redistribution), volume
loss, costophrenic angle blunting, fissure thickening, granuloma, mass (of which it is not said where), mediastinal mass,
vertebral compression, prostheses and material of surgery, bronchiectasis, emphysema, fibrosis, tuberculosis.

The names "exclude", "suboptimal study" and "unchanged" say that a film's labels are not known from its report: see
`unlabelled` of a table's labels.
"""

from __future__ import annotations

from collections.abc import Mapping

from vlmalign.data.sources.schema import CHEXPERT, OpenMap

_NAMES: Mapping[str, tuple[str, ...]] = {
    "No Finding": ("normal",),
    "Enlarged Cardiomediastinum": ("mediastinal enlargement", "superior mediastinal enlargement"),
    "Cardiomegaly": ("cardiomegaly",),
    "Lung Opacity": (
        "alveolar pattern", "ground glass pattern", "increased density", "infiltrates", "interstitial pattern",
        "miliary opacities", "reticular interstitial pattern", "reticulonodular interstitial pattern",
    ),
    "Lung Lesion": (
        "cavitation", "lepidic adenocarcinoma", "lung metastasis", "multiple nodules", "nodule", "pulmonary mass",
    ),
    "Edema": ("pulmonary edema",),
    "Consolidation": ("air bronchogram", "consolidation"),
    "Pneumonia": ("atypical pneumonia", "pneumonia"),
    "Atelectasis": (
        "atelectasis", "atelectasis basal", "laminar atelectasis", "lobar atelectasis", "round atelectasis",
        "segmental atelectasis", "total atelectasis",
    ),
    "Pneumothorax": ("hydropneumothorax", "pneumothorax"),
    "Pleural Effusion": (
        "empyema", "hemothorax", "hydropneumothorax", "loculated fissural effusion", "loculated pleural effusion",
        "pleural effusion",
    ),
    "Pleural Other": (
        "apical pleural thickening", "calcified pleural plaques", "calcified pleural thickening", "pleural mass",
        "pleural plaques", "pleural thickening",
    ),
    "Fracture": (
        "callus rib fracture", "clavicle fracture", "fracture", "humeral fracture", "rib fracture", "vertebral fracture",
    ),
    "Support Devices": (
        "NSG tube", "aortic endoprosthesis", "artificial aortic heart valve", "artificial heart valve",
        "artificial mitral heart valve", "catheter", "central venous catheter", "central venous catheter via jugular vein",
        "central venous catheter via subclavian vein", "central venous catheter via umbilical vein", "chest drain tube",
        "dai", "double J stent", "dual chamber device", "electrical device", "endoprosthesis", "endotracheal tube",
        "gastrostomy tube", "nephrostomy tube", "pacemaker", "reservoir central venous catheter", "single chamber device",
        "tracheostomy tube", "ventriculoperitoneal drain tube",
    ),
}  # fmt: skip

#: their name -> ours; of one, two
MAPPING: Mapping[str, tuple[str, ...]] = {
    name: tuple(label for label, others in _NAMES.items() if name in others)
    for name in sorted({name for names in _NAMES.values() for name in names})
}

PADCHEST_TO_CHEXPERT = OpenMap("padchest-to-chexpert", CHEXPERT, MAPPING)

OPEN_MAPS: Mapping[str, OpenMap] = {PADCHEST_TO_CHEXPERT.name: PADCHEST_TO_CHEXPERT}
