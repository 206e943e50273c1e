"""Try hostile pickles on `checkpoint.read` in this process, which an audit hook watches and which has little memory.

Usage: python hostile_pickles.py FOLDER; prints a line of JSON: what was tried, what was refused, what it took, and which
events the hook saw that reading a file does not need.
"""

import gc
import json
import pickle
import re
import signal
import struct
import sys
import time
import zipfile
from pathlib import Path

from moekit import checkpoint

MAGIC = (
    pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
)
NAMES = """posix.system os.system os.popen os.execv os.remove os.spawnl nt.system subprocess.Popen subprocess.call
    subprocess.check_output subprocess.run builtins.eval builtins.exec builtins.compile builtins.open builtins.getattr
    builtins.setattr builtins.__import__ builtins.print builtins.input builtins.breakpoint builtins.map builtins.list
    builtins.bytes builtins.bytearray builtins.int builtins.sum builtins.pow __builtin__.eval __builtin__.execfile
    __builtin__.apply importlib.import_module importlib.reload runpy.run_path runpy.run_module code.interact
    pickle.loads pickle.load _pickle.loads marshal.loads types.FunctionType types.CodeType shutil.rmtree shutil.copy
    socket.socket socket.create_connection urllib.request.urlopen http.client.HTTPConnection ctypes.CDLL ctypes.cdll
    torch.load torch.hub.load torch.jit.load torch.ops.load_library torch._utils.eval torch.storage._load_from_bytes
    torch.serialization.load numpy.load numpy.f2py.compile numpy.testing.runstring omegaconf.OmegaConf.register_new_resolver
    omegaconf.omegaconf.OmegaConf.load operator.attrgetter operator.methodcaller functools.partial functools.reduce
    fairseq.utils.import_user_module fairseq.utils.eval_bool fairseq.checkpoint_utils.torch_persistent_save
    tempfile.NamedTemporaryFile pathlib.Path.unlink threading.Thread multiprocessing.Process asyncio.run pty.spawn
    webbrowser.open timeit.timeit cProfile.run pdb.run doctest.testmod sqlite3.connect logging.config.listen
    moekit.load argparse.FileType codecs.open io.open io.FileIO""".split()

FORMS = ("zip", "old", "bare")
LARGE = 1_000_000


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def named(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def stacked(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return text(module) + text(attribute) + b"\x93"


def payloads(mark: str) -> dict[str, bytes]:
    """Instructions that leave one value on the stack; `mark` is a command that would leave a mark."""
    one = text(mark) + b"\x85"
    found = {f"{name}(text)": named(name) + one + b"R" for name in NAMES}
    found |= {f"STACK_GLOBAL {name}": stacked(name) + one + b"R" for name in NAMES[:12]}
    found |= {f"NEWOBJ {name}": named(name) + one + b"\x81" for name in NAMES[:12]}
    found |= {f"NEWOBJ_EX {name}": named(name) + one + b"}\x92" for name in NAMES[:6]}
    found |= {f"INST {name}": b"(" + text(mark) + b"i" + named(name)[1:] for name in NAMES[:6]}
    found |= {f"OBJ {name}": b"(" + named(name) + text(mark) + b"o" for name in NAMES[:6]}
    deep = b")" + b"\x85" * 40
    lists = b"]" + b"".join(
        b"q" + bytes([n]) + b"]h" + bytes([n]) + b"ah" + bytes([n]) + b"a" for n in range(40)
    )
    key = b")" + b"".join(
        b"q" + bytes([n]) + b"0h" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(40)
    )
    pairs = b"}" + b"".join(
        b"q" + bytes([n]) + b"0}Nh" + bytes([n]) + b"s\x88h" + bytes([n]) + b"s" for n in range(40)
    )
    huge = struct.pack("<i", 2**31 - 1)
    # Its storage, offset, shape, strides, hooks and call, all noted under one number.
    put = b"r\x10\0\0\0"
    storage = b"((h\x03h\x01X\x01\0\0\x000" + put + b"h\x02K\x01t" + put + b"Q"
    tensor = (
        b"h\0" + storage + b"K\0" + 2 * (b"K\x01\x85" + put) + b"\x89h\x01)R" + put + b"t" + put + b"R" + put
    )
    words = (
        named("torch._utils._rebuild_tensor_v2")
        + b"q\0"
        + named("collections.OrderedDict")
        + b"q\x01"
        + text("cpu")
    )
    words += b"q\x02" + text("storage") + b"q\x03"
    # The same with numbers and a storage of its own, in a file that has no storage.
    number = struct.Struct("<I").pack
    own = (
        b"h\0((h\x03h\x01X\x06\0\0\0%06d"
        + b"r%bh\x02K\x01tr%bQK\0K\x01\x85r%bK\x01\x85r%b\x89h\x01)Rr%btr%bRr%ba"
    )
    owns = (own % (n, *(number(7 * n + at) for at in range(10, 17))) for n in range(200_000))
    found |= {
        "EXT1": b"\x82\x01",
        "PERSID": b"P" + mark.encode() + b"\n",
        "BINPERSID of a text": text(mark) + b"Q",
        "BUILD on a dict": b"}" + named("os.system") + b"b",
        "BUILD on a class": named("argparse.Namespace") + b"}" + text("__class__") + named("os.system") + b"sb",
        "BUILD with a call in it": named("collections.OrderedDict") + b")R}" + text("get") + named("os.system") + b"sb",
        "a call of a call": named("builtins.getattr") + named("os.system") + text("x") + b"\x86R" + one + b"R",
        "a call of a text": text("os.system") + one + b"R",
        "a reducer in a reducer": named("copyreg._reconstructor") + named("os.system") + named("builtins.object") + b"N\x87R",
        "a default factory": named("collections.defaultdict") + named("os.system") + b"\x85R",
        "a dotted name": text("os") + text("path.os.system") + b"\x93" + one + b"R",
        "a type of numpy's with objects": named("numpy.dtype") + named("os.system") + b"\x85R",
        "a tensor with a hook": named("torch._utils._rebuild_tensor_v2") + b"(NK\0))\x89" + named("os.system") + b"tR",
        "a list of many bytes": named("builtins.list") + named("builtins.bytes") + b"J\0\x65\xcd\x1d\x85R\x85R",
        "four bytearrays": b"(" + (named("builtins.bytearray") + b"J" + huge + b"\x85R") * 4 + b"t",
        "bytes of a number": named("builtins.bytes") + b"J" + huge + b"\x85R",
        "an odd codec": named("_codecs.encode") + text("x" * 60_000) + text("punycode") + b"\x86R",
        "a codec that unpacks": named("_codecs.decode") + text("x") + text("zlib_codec") + b"\x86R",
        "a large range": named("builtins.range") + b"\x8a\x09" + bytes(8) + b"\x01\x85R" + named("os.system") + b"0",
        "a number of 2 GB": b"\x8b" + huge + b"\x01",
        "a text of 2 GB": b"X" + huge + b"x",
        "a frame of 2^63 bytes": b"\x95" + b"\xff" * 8 + named("os.system"),
        "a memo of 2^31": b"Nr" + huge + named("os.system"),
        "twenty million lists": b"]" * 20_000_000,
        "twenty million marks": b"(" * 20_000_000,
        "twenty million None": b"N" * 20_000_000,
        "twenty million tuples": b")" + b"\x85" * 20_000_000,
        "twenty million memos": b"N" + b"\x94" * 20_000_000,
        "seven million calls": b"))R" * 7_000_000,
        "three hundred thousand tensors": words + b"]" + (tensor + b"a") * 300_000,
        "tensors without their storages": words + b"]" + b"".join(owns),
        "a storage of a kind without an end": b"(" + text("storage") + pairs + text("0") + text("cpu") + b"K\x01tQ",
        "a storage of 2^1,000,000 numbers": b"(" + text("storage") + named("torch.FloatStorage") + text("0") + text("cpu")
        + b"\x8b" + struct.pack("<i", 125_000) + b"\x7f" * 125_000 + b"tQ",
        "nothing to pop": b"0" * 10,
        "a mark that is gone": b"(1t",
        "an odd dictionary": b"(Nd",
        "an end": b"",
    }  # fmt: skip
    hang = b"(" + text("x") + named("os.system") + b"t"
    found |= {"a deep tuple and a name": deep + hang + b"\x86", "lists in lists": lists + hang + b"\x86"}
    found |= {"a key that hashes for ever": b"}" + key + named("os.system") + b"s"}
    return found


def written(folder: Path, payload: bytes, form: str) -> Path:
    pickled = (
        b"\x80\x02}(" + text("cfg") + b"N" + text("model") + b"}" + text("extra_state") + payload + b"u."
    )
    path = folder / "model-shared.pt"
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/version", "3\n")
    elif form == "old":
        path.write_bytes(MAGIC + pickled + pickle.dumps([], 2))
    else:
        path.write_bytes(pickled)
    return path


def peak() -> int:
    """The most bytes in memory since :func:`forget_peak`, pages of files included."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def too_long(*_) -> None:
    raise TimeoutError


def main(folder: Path) -> None:
    mark = folder / "mark"
    events: list[str] = []
    watching, path = False, folder

    def hook(event: str, arguments: tuple) -> None:
        if not watching or event in ("builtins.id", "object.__getattr__", "sys._getframe"):
            return
        if event in ("open", "mmap.__new__", "os.stat") and str(arguments[0]) == str(path):
            return
        events.append(f"{event} {str(arguments)[:100]}")

    # The first use of a function may import what it needs.
    for form in FORMS:
        try:
            checkpoint.read(written(folder, b"N", form))
        except ValueError:
            pass
    sys.addaudithook(hook)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGALRM, too_long)
    took, told, refused, other = {}, {}, 0, []
    # Large ones take seconds. Each is in a file of one form, since the same loop goes through all; each form has some.
    tried = [
        (name, payload, form)
        for number, (name, payload) in enumerate(payloads(f"touch {mark}").items())
        for place, form in enumerate(FORMS)
        if len(payload) < LARGE or place == number % len(FORMS)
    ]
    tried.sort(key=lambda one: len(one[1]))
    for name, payload, form in tried:
        path = written(folder, payload, form)
        if len(payload) >= LARGE:
            gc.collect()
        forget_peak()
        before, start = peak(), time.perf_counter()
        signal.alarm(20)
        watching = True
        try:
            checkpoint.read(path)
            other.append(f"{name} ({form}) was read")
        except ValueError as error:
            refused += 1
            told[f"{name} ({form})"] = str(error)
        except BaseException as error:
            other.append(f"{name} ({form}): {type(error).__name__}: {error}"[:300])
        watching = False
        signal.alarm(0)
        took[f"{name} ({form})"] = (time.perf_counter() - start, peak() - before - path.stat().st_size)
    worst = max(took, key=lambda name: took[name][0]), max(took, key=lambda name: took[name][1])
    summary = {
        "payloads": len(payloads("")),
        "tried": len(tried),
        "refused": refused,
        "other": other,
        "executed": mark.exists(),
        "events": events,
        "slowest": [worst[0], took[worst[0]][0]],
        "largest": [worst[1], took[worst[1]][1]],
        "told": told,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
