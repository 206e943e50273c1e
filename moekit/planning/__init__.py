"""How much memory a model takes, before it is loaded, and which of its experts stay on their devices.

``runs`` describes a run and the free memory, ``fitting`` finds a run that fits, ``table`` shows it to the user, and
``residence`` is for experts that are fetched.
"""
