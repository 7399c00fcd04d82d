"""Can wsi-rt stand in for the published scripts? Their files compared with what our engines give, and explained.

`reference` reads the published slide tokens, `slide` compares and explains them, `records` reads questions and answers,
`answers` walks along a reference's answer, `reasons` explains the ones that differ, `report` says the verdict.
"""
