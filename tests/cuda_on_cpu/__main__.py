"""``python -m tests.cuda_on_cpu address|races [pytest arguments]``: the tests of emulated kernels under a checker.

``address`` builds the kernels with the address and undefined behaviour sanitizers; torch's tensors lie in memory that
the preloaded library guards, so an access beyond a tensor is an error. ``races`` looks for data races by the rules of
CUDA's barriers.
"""

import os
import sys

from tests.cuda_on_cpu import checked_environment


def main() -> None:
    """Set the environment and become pytest."""
    if len(sys.argv) < 2 or sys.argv[1] not in ("address", "races"):
        sys.exit(__doc__)
    arguments = sys.argv[2:] or ["tests"]
    command = [sys.executable, "-m", "pytest", "-m", "emulated", "-p", "no:cacheprovider", *arguments]
    os.execve(sys.executable, command, checked_environment(sys.argv[1]))


if __name__ == "__main__":
    main()
