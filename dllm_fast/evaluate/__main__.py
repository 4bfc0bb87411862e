"""`python -m dllm_fast.evaluate`: lm-eval's command line, with the model `dllm_fast` registered."""

import sys

from dllm_fast.evaluate.harness import main

if __name__ == "__main__":
    sys.exit(main())
