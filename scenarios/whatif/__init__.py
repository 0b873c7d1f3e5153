"""What-if studies of simulated worlds: `python -m scenarios.whatif --help`.

setting   the knobs of one world, and what is learnt from it
study     a sweep: from a TOML file or the command line, on all cores
answers   the sentence a study ends with, computed from its rows
plots     its picture
quantities  bandwidths, times and ranges as people write them
"""
