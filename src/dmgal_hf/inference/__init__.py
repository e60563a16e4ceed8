"""
For the person with clips: the pipeline, kept support sets, streams, the exported query model, pictures and the page.
Imports `model` and `data`, and neither `hub` nor `training`.
"""
