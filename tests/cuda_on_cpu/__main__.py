"""``python -m tests.cuda_on_cpu address|races [pytest arguments]``: the tests of emulated kernels under a checker.

``address`` builds the kernels with the address and undefined behaviour sanitizers; torch's tensors lie in memory that
the preloaded library guards, so an access beyond a tensor is an error. ``races`` looks for data races by the rules of
CUDA's barriers, in any order of threads, and is slow: without arguments, it leaves out the large cases and those that
are there for the order. Without arguments, two processes share the tests.
"""

import os
import sys

from tests.cuda_on_cpu import checked_environment

#: The tests of single ops; whole detectors take too long under a checker.
TESTS = (
    *("cuda_on_cpu", "device_functions", "bad_input", "anchors", "matching", "matching_kernels", "sampling", "nms"),
    *("sorting", "proposals", "detections", "roi_align", "roi_pool", "roi_kernels"),
)
#: What the race checker leaves out: files, and what pytest's -k says of tests.
SLOW = ("cuda_on_cpu", "device_functions", "bad_input")
LONG = (
    *("order", "large", "thousand", "size", "threshold", "2000", "2048", "chunk", "12000", "oracle", "wait"),
    *("test_pool[64", "test_pool[131", "roi_kernels and dtype1"),  # many channels; bfloat16, whose code is float16's
)


def main() -> None:
    """Set the environment and become pytest."""
    if len(sys.argv) < 2 or sys.argv[1] not in ("address", "races"):
        sys.exit(__doc__)
    races = sys.argv[1] == "races"
    arguments = sys.argv[2:]
    if not arguments:
        arguments = [f"tests/test_{name}.py" for name in TESTS if not (races and name in SLOW)]
        arguments += ["-k", f"not ({' or '.join(LONG)})"] if races else []
        arguments += ["-n", "2"]
    # A sanitizer writes its report to the file that is standard error, and ends the process: pytest must not hold that.
    options = ["-m", "emulated", "-q", "-p", "no:cacheprovider", "--capture=sys"]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    os.execve(sys.executable, command, checked_environment(sys.argv[1]))


if __name__ == "__main__":
    main()
