"""
Everything that a checkpoint ships for `trust_remote_code`: configurations, the model and its parts, the adapters with
their PEFT method, and the processor with the reading of videos. Flat, and importing nothing of the rest of dmgal_hf.
"""
