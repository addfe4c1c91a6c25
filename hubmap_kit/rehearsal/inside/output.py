"""Carrying the output out: files and folders alone, no larger than the disk that they lay on, and nothing that leads
elsewhere.
"""

from __future__ import annotations

import os
import shutil
import stat

DEPTH = 100  # folders within each other
SHOWN = 5  # of the entries that are left behind
KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class _Copier:
    def __init__(self, room: int) -> None:
        self.room, self.refused = room, list[str]()

    def copy(self, source: int, target: int, above: str = "", depth: int = 0) -> None:
        """Copy what the open folder `source` holds into `target`.

        No link is followed; rights and owners stay behind.
        """
        for name in sorted(os.listdir(source)):
            path, facts = f"{above}{name}", os.stat(name, dir_fd=source, follow_symlinks=False)
            kind = stat.S_IFMT(facts.st_mode)
            if not name.isprintable():  # it could break a line of the report, or play with a terminal
                self.refused.append(f"{path!a} has a name that cannot be printed")
            elif kind == stat.S_IFDIR and depth < DEPTH:
                os.mkdir(name, dir_fd=target)
                inner, made = (
                    os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                    for folder in (source, target)
                )
                try:
                    self.copy(inner, made, f"{path}/", depth + 1)
                finally:
                    os.close(inner)
                    os.close(made)
            elif kind == stat.S_IFDIR:
                self.refused.append(f"a folder lies deeper than {DEPTH} others")
            elif kind != stat.S_IFREG:
                leads = f" to {ascii(os.readlink(name, dir_fd=source))[1:-1]}" if kind == stat.S_IFLNK else ""
                self.refused.append(f"{path} is {KINDS.get(kind, 'no file')}{leads}")
            elif (
                facts.st_size > self.room
            ):  # holes are filled and each name of a file is a file: what fitted there need not fit here
                self.refused.append(f"{path} is more than what fits, {facts.st_size} bytes")
            else:
                self.room -= facts.st_size
                read = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=source)
                written = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=target)
                with open(read, "rb") as one, open(written, "wb") as two:
                    shutil.copyfileobj(one, two, 1 << 20)


def carry_out(source: str, target: int, room: int) -> str:
    """Copy the folder `source` into the open folder `target`, `room` bytes at most; what was left behind, and why, or
    nothing.
    """
    copier, problem = _Copier(room), ""
    folder = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    try:
        copier.copy(folder, target)
    except OSError as error:
        problem = f"the output could not be copied out ({error})"
    finally:
        os.close(folder)
    refused = copier.refused
    more = f" and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
    left = f"not all of the output can be kept: {', '.join(refused[:SHOWN])}{more}" if refused else ""
    return "; ".join(text for text in (problem, left) if text)
