"""Tries to rearrange its sandbox, and submits which calls went through."""

import ctypes
import json
import os
import socket
import sys

work = sys.argv[sys.argv.index("--working_dir") + 1]
data = sys.argv[sys.argv.index("--dataset_dir") + 1]
libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWUSER, CLONE_NEWNS, SIGCHLD = 0x10000000, 0x20000, 17
went_through = []


def attempt(name, result):
    if result >= 0:
        went_through.append(name)


attempt("unshare user", libc.unshare(CLONE_NEWUSER))
attempt("unshare mount", libc.unshare(CLONE_NEWNS))
attempt("umount data", libc.umount2(data.encode(), 2))
attempt("mount tmpfs", libc.mount(b"none", b"/tmp", b"tmpfs", 0, None))
attempt("remount data", libc.mount(b"none", data.encode(), None, 32 | 4096, None))
attempt("chroot", libc.chroot(b"/tmp"))
attempt("setuid", libc.setuid(0))
attempt("setns", libc.setns(os.open("/proc/self/ns/mnt", os.O_RDONLY), 0))
if os.uname().machine == "x86_64":
    attempt("bpf", libc.syscall(321, 0, None, 0))
    attempt("keyctl", libc.syscall(250, 0, -3, 0))
    attempt("io_uring", libc.syscall(425, 1, None))
    attempt("ptrace", libc.syscall(101, 16, os.getppid(), 0, 0))
    child = libc.syscall(56, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0)
    if child == 0:
        os._exit(0)
    attempt("clone user", child)
try:
    socket.socket(40, socket.SOCK_STREAM)
    went_through.append("vsock")
except OSError:
    pass
paths = ["/usr/x", "/sia/x", "/x", "/etc/x", "/dev/x", "/sia/data/x", "/sia/harness/x"]
paths += ["/proc/sys/kernel/hostname", "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger"]
for path in paths:
    try:
        os.close(os.open(path, os.O_WRONLY | (0 if path.startswith("/proc") else os.O_CREAT)))
        went_through.append(path)
    except OSError:
        pass
shared = os.statvfs("/dev/shm")
if shared.f_blocks * shared.f_frsize > 100 * 2**20:
    went_through.append("shared memory")
with open(f"{work}/submission.csv", "w") as file:
    file.write(json.dumps(went_through))
