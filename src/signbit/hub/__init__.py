"""The only folder that registers things with transformers: config, quantizer, saving, loading, model card.

Nothing is imported here: `register` runs while transformers is still importing itself, and must not import `load`.
"""
