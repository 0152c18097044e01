"""Files that would run code where they were read carelessly, and a watch on what such code does."""

import builtins
import io
import os
import pickle
import sys
import tarfile
import warnings
import zipfile

import torch

from ctxenc.training import durable

# What Python tells its audit hooks of. Nothing that reads a file of others has a reason for any of these.
FORBIDDEN = {
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "socket.getaddrinfo"),
    *("pickle.find_class", "shutil.unpack_archive", "urllib.Request"),
}
_seen: list[str] | None = None  # None: nobody watches


def _hook(event, arguments):
    if _seen is not None and event in FORBIDDEN:
        _seen.append(f"{event} {arguments!r}"[:200])


sys.addaudithook(_hook)  # for good: Python takes none back


class Watch:
    """Records what is forbidden in its body; there must be none at the end, and no ``marker`` either."""

    def __init__(self, marker):
        self.marker = marker

    def __enter__(self):
        global _seen
        _seen = []

    def __exit__(self, kind, *_):
        global _seen
        seen, _seen = _seen, None
        if kind is None:
            assert not seen, seen
            assert not self.marker.exists()


class Bomb:
    """What pickle makes a call of."""

    def __init__(self, call, *arguments):
        self.made = call, arguments

    def __reduce__(self):
        return self.made


def calls(marker):
    """Calls that leave ``marker`` behind."""
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "system": (os.system, f"touch '{marker}'"),
        "mkdir": (os.mkdir, str(marker)),
        "eval": (builtins.eval, code),
        "exec": (builtins.exec, code),
        "import": (builtins.__import__, "antigravity"),
    }


def pickles(marker):
    """Contents of files, by what they are."""
    made = {}
    for name, (call, argument) in calls(marker).items():
        state = {"state_dict": {"weight": torch.zeros(2), "evil": Bomb(call, argument)}}
        for protocol in range(6):
            plain = {"state_dict": {"evil": Bomb(call, argument)}}
            made[f"{name}, pickle {protocol}"] = pickle.dumps(plain, protocol)
            for zipped in (True, False):
                if protocol >= 2:  # torch takes no other
                    kind = "zip" if zipped else "legacy"
                    made[f"{name}, {kind} {protocol}"] = saved(state, protocol, zipped)
    made["tar"] = tar(pickle.dumps(Bomb(os.mkdir, str(marker)), 2))
    made["a class"] = saved(torch.nn.Linear(2, 2))
    made["a function"] = saved({"state_dict": os.getcwd})
    made["a name with dots"] = dotted("torch.serialization", "os.system", f"touch '{marker}'")
    made["an attribute of torch"] = dotted("torch", "hub.os.system", f"touch '{marker}'")
    made["old opcodes"] = f"cos\nsystem\n(S\"touch '{marker}'\"\ntR.".encode()
    made["an instance"] = f"(S\"touch '{marker}'\"\nios\nsystem\n.".encode()
    made["TorchScript"] = torchscript()
    return made


def saved(content, protocol=2, zipped=True):
    file = io.BytesIO()
    torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def tar(content):
    """The oldest format of torch.save, each of whose members is a pickle."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("sys_info", "storages", "tensors", "pickle", "../../climbed"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def dotted(module, name, argument):
    """A pickle that reaches a function through a module that is allowed."""

    def text(value):
        return b"\x8c" + bytes([len(value.encode())]) + value.encode()

    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(argument) + b"\x85R."


def torchscript():
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        torch.jit.save(torch.jit.script(torch.nn.ReLU()), file)
    return file.getvalue()


def climbing_zip(content):
    """What torch.save writes, and members with names that lead elsewhere."""
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a") as archive:
        for name in ("../../climbed", "/climbed", "archive/../../climbed"):
            archive.writestr(name, "x")
    return file.getvalue()


def forge(folder, changed):
    """Changes files of a checkpoint, as anyone can who makes the checksums anew."""
    files = {each.name: each.read_bytes() for each in folder.iterdir() if each.name != durable.MANIFEST}
    durable.write_folder(folder, (files | changed).items())
