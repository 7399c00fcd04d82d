"""Can wsi-rt stand in for the published scripts? Their files compared with what our engines give, and explained.

Tokens: `reference` reads the published ones, `tokens` compares ours with them, `token_hypotheses` has what may differ.
Answers: `records` reads them, `answers` walks along one, `answer_hypotheses` has what may differ.
`report` says the verdict.
"""
