"""Folders of Hugging Face's libraries: those that ``convert --to hf`` writes, and public copies in light-fairseq's layout.

config says what a ``config.json`` tells, in fairseq's words, so that all else reads such a folder as one of fairseq's;
names has the names of the tensors, folder the files, and writing makes them.
"""
