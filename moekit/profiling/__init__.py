"""Where the time of a step goes, on all ranks: ``model.profile(...)``.

    found = model.profile("demo", steps=3)
    found.shares()                       # the parts of a step beside the chip's limit
    found.save_trace("trace.json.gz")    # for Perfetto and Chrome

work.py says what the steps work on, run.py asks the ranks (moekit/worker/profiling.py), events.py reads what torch's profiler tells, naming.py says which part of the
model a kernel belongs to, least.py what the part had to do at least, and table.py puts it together.
"""

from moekit.profiling.naming import PARTS
from moekit.profiling.profile import Profile
from moekit.profiling.run import profile

__all__ = ["PARTS", "Profile", "profile"]
