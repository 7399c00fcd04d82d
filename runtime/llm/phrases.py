"""Turns of phrase that pathology reports are full of: guesses for speculation (ngrams.py), never more than guesses."""

from __future__ import annotations

from wsi_rt.runtime.llm.ngrams import NgramText
from wsi_rt.runtime.llm.tokenizer import Tokenizer

# As they stand in the middle of a sentence: tokens at its beginning are spelled otherwise, and the lookup needs two
# tokens of context anyway. A phrase earns its place by the tokens that follow its first two.
PHRASES = (
    "the presence of lymphovascular invasion",
    "the presence of perineural invasion",
    "the presence of necrosis",
    "there is no evidence of lymphovascular invasion or perineural invasion.",
    "there is evidence of lymphovascular invasion",
    "no evidence of distant metastasis",
    "no lymph node involvement or distant metastasis",
    "with a high nuclear-to-cytoplasmic ratio",
    "an increased nuclear-to-cytoplasmic ratio",
    "with hyperchromatic nuclei and prominent nucleoli",
    "enlarged, hyperchromatic nuclei with prominent nucleoli",
    "nuclear pleomorphism and hyperchromasia",
    "significant nuclear pleomorphism, hyperchromasia, and prominent nucleoli",
    "moderate nuclear pleomorphism and mitotic activity",
    "high mitotic activity",
    "frequent mitotic figures, including atypical forms",
    "mitotic figures are frequently observed",
    "areas of necrosis and hemorrhage",
    "abundant eosinophilic cytoplasm",
    "clear to eosinophilic cytoplasm",
    "moderately differentiated adenocarcinoma",
    "poorly differentiated squamous cell carcinoma",
    "well-differentiated adenocarcinoma",
    "invasive ductal carcinoma",
    "invasive lobular carcinoma",
    "infiltrating ductal carcinoma",
    "ductal carcinoma in situ",
    "papillary thyroid carcinoma",
    "clear cell renal cell carcinoma",
    "papillary renal cell carcinoma",
    "hepatocellular carcinoma",
    "high-grade serous carcinoma",
    "endometrioid adenocarcinoma",
    "squamous cell carcinoma with keratin pearls and intercellular bridges",
    "keratinization and intercellular bridges",
    "keratin pearl formation",
    "irregular glandular structures",
    "irregular nests and cords of tumor cells",
    "the tumor cells are arranged in irregular nests",
    "the tumor cells are arranged in sheets and nests",
    "tumor cells arranged in glandular and cribriform patterns",
    "surrounded by a desmoplastic stromal reaction",
    "a desmoplastic stroma with inflammatory infiltrates",
    "lymphocytic infiltration in the surrounding stroma",
    "a dense fibrous stroma",
    "infiltration of inflammatory cells, particularly lymphocytes",
    "the surrounding stroma shows fibrosis and inflammatory infiltration",
    "loss of normal tissue architecture",
    "loss of normal glandular architecture",
    "disorganized cell arrangement",
    "marked variation in cell size and shape",
    "indicating a high degree of malignancy",
    "indicating moderate differentiation",
    "indicating poor differentiation",
    "indicative of a high-grade malignancy",
    "consistent with a diagnosis of",
    "based on the observed features",
    "based on the histological features observed in the slide",
    "the histological type of the tumor is",
    "the tumor is classified as",
    "is graded as moderately differentiated",
    "is graded as Grade II",
    "is graded as Grade III",
    "Gleason score of 4 + 3",
    "the pathological stage is",
    "the tumor invades through the muscularis propria",
    "extends into the surrounding adipose tissue",
    "surgical resection followed by adjuvant chemotherapy",
    "adjuvant chemotherapy and radiation therapy",
    "surgical excision with clear margins",
    "hormone receptor status (ER, PR) and HER2 expression",
    "the prognosis is generally favorable",
    "the prognosis is poor due to",
    "regular follow-up and monitoring for recurrence",
    "suggesting an aggressive tumor behavior",
)


def phrase_text(tokenizer: Tokenizer) -> NgramText:
    text = NgramText()
    for phrase in PHRASES:
        text.add(tokenizer.encode(phrase))
    return text
