"""Whatever people bring, and what they see: one table a part, tested row by row.

docs/inputs.md is drawn from the same tables by `python -m docs.generate_inputs`.
"""
