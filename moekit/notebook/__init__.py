"""What the notebooks show."""

import atexit
import gc

# When a kernel ends, Python looks for garbage among a million objects of the libraries, which takes two to three seconds.
atexit.register(gc.freeze)
