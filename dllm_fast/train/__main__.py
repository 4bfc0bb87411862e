"""`python -m dllm_fast.train`."""

import sys

from dllm_fast.train.training import main

if __name__ == "__main__":
    sys.exit(main())
