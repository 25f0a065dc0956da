"""What `rnf …` does: one task or a stream from YAML, reports, masks, exports, and a demonstration.

Commands read files and never run what is in them; what can't be done is said in one sentence, with exit code 2. They
stand on the same public names as a user's own script.
"""
