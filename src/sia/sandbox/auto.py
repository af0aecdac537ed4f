"""Picks the strongest sandbox that works on this machine."""

from sia.errors import TargetError
from sia.sandbox.bwrap import Bwrap
from sia.sandbox.docker import Docker
from sia.sandbox.process import Process
from sia.sandbox.protocol import Sandbox


def auto(*, tmp_mib: int = 1024, image: str | None = None, cpus: float | None = None) -> Sandbox:
    """bwrap, then docker where an image is named, then process; each is really tried.

    What is passed over, and how to get it, stands in `protects` of the result. Where nothing works
    the result's `check` says so.

    Args:
        tmp_mib: Size of the private /tmp of bwrap and docker.
        image: For docker; None leaves it out, since no image has a harness's packages by itself.
        cpus: For docker.
    """
    stronger: list[Sandbox] = [Bwrap(tmp_mib=tmp_mib)]
    if image is not None:
        stronger.append(Docker(image=image, cpus=cpus, tmp_mib=tmp_mib))
    reasons = []
    for sandbox in stronger:
        try:
            sandbox.check()
        except TargetError as error:
            reasons.append(str(error))
        else:
            return sandbox
    return Process(instead_of="; ".join(reasons))
