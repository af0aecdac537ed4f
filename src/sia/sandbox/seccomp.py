"""A seccomp filter that leaves a target no way to rearrange its sandbox."""

import errno
import functools
import os
import tempfile

# Namespaces and mounts, other processes, kernel facilities with a long record of escapes.
DENIED = (
    "acct", "add_key", "bpf", "chroot", "delete_module", "fanotify_init", "finit_module",
    "fsconfig", "fsmount", "fsopen", "fspick", "init_module", "io_uring_enter", "io_uring_register",
    "io_uring_setup", "kcmp", "kexec_file_load", "kexec_load", "keyctl", "lookup_dcookie", "mount",
    "mount_setattr", "move_mount", "name_to_handle_at", "open_by_handle_at", "open_tree",
    "perf_event_open", "pivot_root", "process_vm_readv", "process_vm_writev", "ptrace", "quotactl",
    "reboot", "request_key", "setns", "swapoff", "swapon", "syslog", "umount2", "unshare",
    "userfaultfd", "vmsplice",
)  # fmt: skip
CLONE_NEWUSER = 0x10000000
AF_VSOCK = 40  # reaches the hypervisor from any network namespace


@functools.cache
def filter_bytes() -> bytes | None:
    """The compiled filter, for `bwrap --seccomp`; None where libseccomp is not installed."""
    try:
        import pyseccomp as seccomp
    except (ImportError, OSError, RuntimeError):
        return None
    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    for name in DENIED:
        number = seccomp.resolve_syscall(seccomp.Arch.NATIVE, name)
        if number >= 0:  # otherwise unknown to this kernel's or library's table
            rules.add_rule(seccomp.ERRNO(errno.EPERM), number)
    new_user = seccomp.Arg(0, seccomp.MASKED_EQ, CLONE_NEWUSER, CLONE_NEWUSER)
    rules.add_rule(seccomp.ERRNO(errno.EPERM), "clone", new_user)
    # The flags of clone3 lie in memory, where a filter cannot look; libc falls back to clone.
    rules.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")
    vsock = seccomp.Arg(0, seccomp.EQ, AF_VSOCK)
    rules.add_rule(seccomp.ERRNO(errno.EAFNOSUPPORT), "socket", vsock)
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def filter_fd(program: bytes) -> int:
    """A new descriptor from which the filter can be read once."""
    fd = os.memfd_create("seccomp")
    os.write(fd, program)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
