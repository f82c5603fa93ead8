"""Runs command lines of diffpipe in this process as if it were on Windows: nothing of the system is there that Windows lacks.

    python windows_program.py COMMANDS       a JSON list of lists of arguments

Only diffpipe's own modules miss it, for libraries have ways of their own on each system.
"""

from __future__ import annotations

import builtins
import json
import os
import signal
import sys
import types
import warnings
from typing import Any

import torch.distributed

LACKING = {
    "os": "chown chroot fchmod fchown fork forkpty getegid geteuid getgid getpgid getpgrp getpriority getsid getuid killpg lchown"
    " mkfifo nice pathconf posix_fadvise posix_fallocate posix_spawn pread pwrite sched_getaffinity sched_setaffinity sendfile setsid"
    " setuid statvfs sync sysconf tcgetpgrp tcsetpgrp ttyname uname wait wait3 wait4 O_DIRECTORY O_NOFOLLOW O_NONBLOCK WNOHANG",
    "signal": "SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2 SIGWINCH alarm pause pthread_kill"
    " pthread_sigmask setitimer sigwait",
    "torch.distributed": "HashStore",
}
MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "termios", "tty"}


HALVED = {"diffpipe.cli.keys"}  # modules that have another half for Windows, which pyright reads


def ours(name: str | None) -> bool:
    return name is not None and name.partition(".")[0] == "diffpipe" and name not in HALVED


def hide(module: types.ModuleType, names: set[str]) -> None:
    class Lacking(types.ModuleType):
        def __getattribute__(self, name: str) -> Any:
            if name in names and ours(sys._getframe(1).f_globals.get("__name__")):
                raise AttributeError(f"on Windows {module.__name__} has no {name}", name=name, obj=self)
            return super().__getattribute__(name)

    module.__class__ = Lacking


def main() -> None:
    for module, names in {os: "os", signal: "signal", torch.distributed: "torch.distributed"}.items():
        hide(module, set(LACKING[names].split()))
    import_module = builtins.__import__

    def guarded(name: str, globals: Any = None, *rest: Any, **more: Any) -> Any:
        if name in MODULES and ours((globals or {}).get("__name__")):
            raise ImportError(f"on Windows there is no {name}")
        return import_module(name, globals, *rest, **more)

    builtins.__import__ = guarded
    # Text files are read in whatever code page Windows is set to, where nothing says that they are UTF-8.
    warnings.filterwarnings("error", category=EncodingWarning, module=r"diffpipe\.")

    from diffpipe.cli import app

    for arguments in json.loads(sys.argv[1]):
        try:
            app(args=arguments)
        except SystemExit as end:
            if end.code:
                raise


if __name__ == "__main__":
    main()
