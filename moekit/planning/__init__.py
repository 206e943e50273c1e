"""What a model takes of a machine's memory, before anything of it is loaded, and what of it may be fetched.

runs says what is planned and what is free; fitting finds what fits; table is what a user sees; residence is what the ranks
are told about experts that are fetched, and what they tell.
"""
