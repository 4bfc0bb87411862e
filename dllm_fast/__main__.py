"""``python -m dllm_fast``: the configuration, for a bug report. With arguments: what ``dllm-fast`` does with them."""

import sys

from dllm_fast.cli.main import main

sys.exit(main(sys.argv[1:] or ["config"]))
