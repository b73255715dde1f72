"""What every report is made of, whatever it is about: one rule of uncertainty, tables, the style of pictures, one page.

Nothing here knows of models, tasks or experts; `mtil`, `mtil.model_merging` and `theory` report with it.
"""
