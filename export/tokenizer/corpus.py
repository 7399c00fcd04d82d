"""Text that the synthetic tokenizer is trained on: written for this project, about pathology reports in general.

It describes no patient. Changing a character changes every synthetic tokenizer
(tests/export/tokenizer/test_convert.py pins one digest).
"""

CORPUS = """\
The slide shows a section of tissue stained with hematoxylin and eosin. At low magnification the normal architecture is
largely replaced by a tumor that grows in irregular nests and sheets. The stroma between the nests is fibrous and holds
a moderate infiltrate of lymphocytes and plasma cells.
At high magnification the tumor cells are large, with abundant eosinophilic cytoplasm, enlarged nuclei and prominent
nucleoli. Mitotic figures are easily found. Areas of necrosis are present in the center of the larger nests.
The findings are consistent with invasive carcinoma. The tumor is poorly differentiated and is graded as grade 3.
What is the main observation in this whole slide image? What is the most likely diagnosis based on the observed
features? Describe the morphology of the tumor cells. Is there evidence of lymphovascular invasion? Is necrosis present?
Answer with the letter of the correct option. A) Yes B) No C) Uncertain D) Not applicable
Generate a comprehensive report of the whole slide image. Describe the global morphology, the key diagnostic features,
the regional structure and the specific features of this slide.
Microscopic description: the glands are crowded and back to back, with little stroma between them. The lining epithelium
is stratified, and the nuclei are hyperchromatic and elongated. Cribriform structures are seen in several areas. Mucin
production is noted in part of the tumor. The pattern is that of a moderately differentiated adenocarcinoma.
Histological typing: squamous cell carcinoma, keratinizing type. Keratin pearls and intercellular bridges are present.
The surface epithelium shows high grade dysplasia next to the invasive component.
Histological typing: clear cell renal cell carcinoma. The cells have clear cytoplasm, distinct cell membranes and a
delicate vascular network. The nucleolar grade is 2. There is no sarcomatoid or rhabdoid differentiation.
Histological typing: urothelial carcinoma, high grade. The papillary fronds are fused and the nuclei are pleomorphic.
Invasion into the lamina propria is identified; the muscularis propria is not involved in this section.
Histological typing: invasive ductal carcinoma of the breast. Tubule formation is seen in less than 10 % of the tumor,
nuclear pleomorphism is marked and the mitotic count is high, which gives a combined histologic grade of 3.
Histological typing: glioblastoma. The tumor is cellular, with microvascular proliferation and palisading necrosis. The
astrocytic cells vary in size and shape, and infiltrate the surrounding brain tissue.
Histological typing: malignant melanoma. The cells are epithelioid and spindle shaped, with fine brown pigment. The
Breslow thickness can not be measured on this section because the surface is ulcerated.
Histological typing: hepatocellular carcinoma with a trabecular pattern. The trabeculae are more than three cells thick
and are lined by endothelial cells. Bile is present in a few canaliculi. The background liver is cirrhotic.
Histological typing: thyroid papillary carcinoma. The nuclei are enlarged, overlapping and clear, with grooves and
occasional inclusions. Psammoma bodies are found in the stroma.
Histological typing: endometrioid carcinoma of the uterus, with squamous differentiation and less than 5 % solid growth.
Histological typing: prostatic adenocarcinoma, acinar type, Gleason score 4 + 3 = 7, grade group 3. Perineural invasion
is present. The tumor occupies about 40 % of the tissue that was examined.
Grading: the tumor is well differentiated. Grading: the tumor is moderately differentiated. Grading: the tumor is poorly
differentiated, with pronounced nuclear pleomorphism and disorganized growth. Low grade, intermediate grade, high grade.
Staging: pT1, pT2, pT3, pT4; pN0, pN1, pN2; M0. The tumor invades through the muscularis propria into the pericolic
tissue. Metastatic carcinoma is found in 2 of 14 lymph nodes. The resection margins are free of tumor. The stage can not
be determined from the slide alone, and correlation with the clinical and radiological findings is recommended.
Immunohistochemistry: the tumor cells are positive for cytokeratin 7, TTF-1 and napsin A, and negative for p40 and
synaptophysin. Estrogen receptor is positive in 90 % of the nuclei, progesterone receptor in 60 %. HER2 is negative
(score 1+). The Ki-67 index is about 25 %. Mismatch repair proteins are retained. PD-L1 is expressed in 1 to 49 % of the
tumor cells.
Molecular subtyping: luminal A, luminal B, HER2 enriched, basal like. The features favor a luminal B subtype. Testing
for EGFR, KRAS, BRAF and ALK may be considered. The IDH mutation status is not known.
Prognosis: the high grade, the presence of lymphovascular invasion and the nodal metastases suggest an unfavorable
outcome. The five year survival depends on the stage. Tumors of low grade without necrosis have a better prognosis.
Is the prognosis of this patient favorable? The absence of invasion suggests a low risk of recurrence.
Treatment planning: surgical resection with clear margins is the first choice. Adjuvant chemotherapy and radiotherapy
should be discussed by the tumor board. Endocrine therapy is indicated because the tumor expresses hormone receptors.
Targeted therapy and immunotherapy may be options for advanced disease. Follow up with imaging every six months.
Regional structure: in the upper left part of the section there is normal mucosa; in the lower right part the tumor
reaches the serosa. The center is necrotic. At the invasive front single cells and small buds are seen. Adipose tissue,
smooth muscle, nerves and blood vessels are included. A band of lymphocytes surrounds the tumor.
Specific features: signet ring cells, giant cells, foamy macrophages, hemosiderin, calcification, ulceration,
granulation tissue, edema, hemorrhage, fibrosis, hyalinization, desmoplasia, atypia, hyperplasia,
metaplasia, dysplasia, apoptosis.
The image quality is adequate. There are folds and a small air bubble near the edge of the section, and the staining is
slightly uneven. These artifacts do not affect the assessment.
Summary: the section contains a malignant epithelial tumor with glandular differentiation, moderate nuclear atypia,
focal necrosis and a desmoplastic stroma. No vascular invasion is identified. The diagnosis is moderately differentiated
adenocarcinoma, grade 2. Clinical correlation is advised.
Summary: the section contains benign tissue with mild chronic inflammation. There is no evidence of malignancy.
This answer is produced by a model without trained weights; it is not a diagnosis and must not be used for any patient.
The lungs, the kidney, the liver, the stomach, the colon, the bladder, the ovary, the cervix, the pancreas, the skin,
the brain, the thyroid, the prostate, the esophagus, the adrenal gland, the head and neck, the soft tissue.
First, second, third, left, right, upper, lower, within, between, around, above, below, before, after, without, because,
therefore, however, although, which, where, when, while, more than, less than, at least, as well as, such as.
Numbers: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 50, 75, 100; 0.5 cm, 1.8 cm, 3.2 cm, 10 high power fields; I, II,
III, IV. Units: mm, cm, um, mpp. Question: Yes or No? Answer: Yes. Answer: No. User: Assistant: "quoted", [brackets],
{braces}, <marks>, a/b, a_b, a*b, x^2, ~5, #1, @, $, &, |, \\, ', `, !, =, <=, >=, ...
Glossary: acinus, adipocyte, alveolar, anaplastic, angiosarcoma, basaloid, biopsy, bronchus, capsule, cartilage,
chondrosarcoma, chromatin, chromophobe, comedo, cytology, cystic, dermis, duodenum, eosinophil, fibroblast, follicular,
ganglion, gastric, germinal center, glomerulus, goblet cell, granuloma, hamartoma, histiocyte, hyperkeratosis,
interstitium, islet, jejunum, koilocyte, leiomyoma, lipoma, lobular, lumen, lymphoma, medullary, meningioma,
mesothelioma, micropapillary, mucosal, myxoid, neuroendocrine, neutrophil, nevus, oligodendroglioma, oncocytic,
osteoid, parakeratosis, peritoneum, pheochromocytoma, plasmacytoid, pleura, polyp, portal tract, rectum, reticulin,
rosette, sarcoma, sebaceous, seminoma, septum, serous, sinusoid, spleen, squamoid, submucosa, teratoma, testis,
thymoma, tonsil, trachea, tubular, ureter, vacuole, verrucous, vesicular, villous, xanthoma.
Procedures: excision, lobectomy, mastectomy, nephrectomy, colectomy, hysterectomy, gastrectomy, thyroidectomy,
needle core, frozen section, paraffin block, fixation in formalin, decalcification, fluorescence in situ hybridization,
sequencing, methylation, microsatellite instability, amplification, deletion, fusion, rearrangement, silver stain.
Reviewers agreed that quantitative judgments, for example counting mitoses or estimating percentages, should always be
repeated by another experienced observer before they influence any therapeutic decision.
Just zones, quick fixes, jagged exudate, blocked vessels, squeezed ducts, waxy casts; KWXYZ QJH FVU PGN ECB DTR LMO.
"""
