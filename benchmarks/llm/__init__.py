"""`wsi-rt bench llm`: the language model against its peers, in prompts, steps and a slide's twenty questions."""
